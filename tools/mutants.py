"""Do the tests notice missing cleanup? Remove it from a chapter, piece by piece, and see.

    python tools/mutants.py 01_basic_concepts.py

Each mutant is the chapter with one piece of cleanup damaged: a `finally` that runs on success
only, or never; an `except ...: cleanup; raise` without its cleanup, or no longer for BaseException;
an `__exit__` that does nothing, or swallows; a ContextVar that is not reset; a callback that is
not pushed on an ExitStack. Only the managers are damaged: the code above the line `# --- Demos`.
The chapter's own test file runs against each mutant. Its first failure kills the mutant. If a
mutant survives, no test covers that cleanup: the mutant is printed and the exit status is 1.

Left out: whether the tests notice *other* damage. Mutation testers such as mutmut check that, but
none of them removes a `finally`.
"""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

STACK_CALLS = {"callback", "push", "push_async_callback", "push_async_exit"}


@dataclass(frozen=True)
class Mutant:
    """A chapter with one piece of cleanup damaged."""

    line: int
    damage: str
    source: str


class Chapter:
    """A chapter's source as lines, so that a mutant differs in the damaged lines alone."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        dividers = [n for n, line in enumerate(self.lines, 1) if line.startswith("# --- Demos")]
        self.end_of_managers = dividers[0] if dividers else len(self.lines) + 1

    def mutants(self) -> Iterator[Mutant]:
        """Yield every mutant, in the order of the file."""
        found: list[Mutant] = []
        for node in ast.walk(self.tree):
            if getattr(node, "lineno", self.end_of_managers) < self.end_of_managers:
                found += self.mutants_at(node)
        yield from sorted(found, key=lambda mutant: mutant.line)

    def mutants_at(self, node: ast.AST) -> Iterator[Mutant]:
        """Yield the mutants that damage one node."""
        if isinstance(node, ast.Try) and node.finalbody:
            yield self.without(node.finalbody, "finally does nothing")
            yield self.on_success_only(node)
        elif isinstance(node, ast.ExceptHandler) and isinstance(node.body[-1], ast.Raise):
            if len(node.body) > 1:
                yield self.without(node.body[:-1], "except raises without cleaning up")
            if isinstance(node.type, ast.Name) and node.type.id == "BaseException":
                yield self.replaced(node.type, "Exception", "except misses BaseException")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in ("__exit__", "__aexit__"):
                yield self.without(body_below_docstring(node), f"{node.name} does nothing")
                yield self.swallowing(node)
        elif isinstance(node, ast.Expr) and (called := method_called(node)):
            if called == "reset":
                yield self.without([node], "context variable is not reset")
            elif called in STACK_CALLS:
                yield self.without([node], f"{called} is not pushed on the stack")

    def without(self, statements: list[ast.stmt], damage: str) -> Mutant:
        """Replace some statements with `pass`."""
        first, last = statements[0], statements[-1]
        return self.changed(first, last, " " * first.col_offset + "pass", damage)

    def replaced(self, node: ast.expr, text: str, damage: str) -> Mutant:
        """Replace one expression with another text."""
        line = self.lines[node.lineno - 1]
        line = line[: node.col_offset] + text + line[node.end_col_offset :]
        return self.changed(node, node, line, damage)

    def on_success_only(self, node: ast.Try) -> Mutant:
        """Replace `finally` with `else`."""
        number = node.finalbody[0].lineno - 1
        while self.lines[number - 1].strip() != "finally:":
            number -= 1
        indent = " " * node.col_offset
        otherwise = f"{indent}else:"
        if not node.handlers:
            otherwise = f"{indent}except BaseException:\n{indent}    raise\n{otherwise}"
        elif node.orelse:
            otherwise = f"{indent}    pass"
        lines = [*self.lines[: number - 1], otherwise, *self.lines[number:]]
        return self.mutant(number, "finally runs on success only", lines)

    def swallowing(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Mutant:
        """Keep the body, but make every return of it True."""
        lines = self.lines.copy()
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return):
                kept = lines[inner.lineno - 1][: inner.col_offset]
                lines[inner.lineno - 1] = f"{kept}return True"
                for number in range(inner.lineno, inner.end_lineno or inner.lineno):
                    lines[number] = ""
        last = node.body[-1]
        lines.insert(last.end_lineno or last.lineno, " " * last.col_offset + "return True")
        return self.mutant(node.lineno, f"{node.name} swallows", lines)

    def changed(self, first: ast.expr | ast.stmt, last: ast.AST, text: str, damage: str) -> Mutant:
        """Replace the lines from one node to another."""
        end = getattr(last, "end_lineno", first.lineno)
        lines = [*self.lines[: first.lineno - 1], text, *self.lines[end:]]
        return self.mutant(first.lineno, damage, lines)

    def mutant(self, line: int, damage: str, lines: list[str]) -> Mutant:
        source = "\n".join(lines) + "\n"
        compile(source, damage, "exec")  # a syntax error would count as killed
        return Mutant(line, damage, source)


def body_below_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the statements of a function, without its docstring if there are others."""
    return node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body


def method_called(node: ast.Expr) -> str:
    """Return the method's name if a statement is only a method call, else ""."""
    call = node.value.value if isinstance(node.value, ast.Await) else node.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
        return call.func.attr
    return ""


def survives(chapter: Path, source: str, timeout: float | None = None) -> bool:
    """Run the chapter's tests against another source; return True if they all pass.

    `load_chapter` in conftest.py finds that source by an environment variable.
    """
    with tempfile.TemporaryDirectory() as folder:
        replaced = Path(folder, chapter.name)
        replaced.write_text(source, encoding="utf-8")
        variable = f"WORKSHOP_CHAPTER_{chapter.name[:2]}"
        tests = chapter.parent / "tests" / f"test_{chapter.stem}.py"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                "-xq",
                "-n0",
                "-p",
                "no:cacheprovider",
                os.fspath(tests),
            ],
            cwd=chapter.parent,
            env=os.environ | {variable: os.fspath(replaced)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False  # a test that hangs has noticed
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and the children that a mutant may have leaked."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many run at once")
    options = parser.parse_args()
    return max(examine(chapter.resolve(), options.jobs) for chapter in options.chapter)


def examine(chapter: Path, jobs: int) -> int:
    """Print the fate of each mutant; return the exit status."""
    source = chapter.read_text(encoding="utf-8")
    started = time.monotonic()
    if not survives(chapter, source):
        print(
            f"{chapter.name}: its tests fail without damage; make them pass first", file=sys.stderr
        )
        return 2
    timeout = 10 + 5 * (time.monotonic() - started)
    mutants = list(Chapter(source).mutants())
    with ThreadPoolExecutor(jobs) as pool:
        fates = pool.map(lambda mutant: survives(chapter, mutant.source, timeout), mutants)
        survivors = 0
        for mutant, survived in zip(mutants, fates, strict=True):
            fate = "SURVIVED" if survived else "killed"
            print(f"{fate:8} {chapter.name}:{mutant.line} {mutant.damage}", flush=True)
            survivors += survived
    print(f"{chapter.name}: {len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
