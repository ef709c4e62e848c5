"""Do the tests notice damage? Damage a chapter, piece by piece, and see.

    python tools/mutants.py 01_basic_concepts.py          remove its cleanup
    python tools/mutants.py --general 300 0*.py           300 other damages, drawn from all chapters
    python tools/mutants.py --general 60 --list 0*.py     only print them
    python tools/mutants.py --at 95 01_basic_concepts.py  every damage of one line

Each mutant is the chapter with one piece damaged. Without `--general`, a piece of cleanup: a
`finally` that runs on success only, or never; an `except ...: cleanup; raise` without its cleanup,
or no longer for BaseException; an `__exit__` that does nothing, or swallows; a ContextVar that is
not reset; a callback that is not pushed on an ExitStack. With `--general N`, a sample of N from all
of these: a condition negated, a comparison changed, a statement deleted; `raise`, `await`, `finish`
or a shield dropped; a lock not taken; BaseException narrowed to Exception; two statements of a
cleanup swapped. Only the managers are damaged, the code above the line `# --- Demos`, and the stage
of chapter 01. The sample depends on the seed and on each damage, not on line numbers.

The chapter's own test file runs against each mutant, first the tests that killed a mutant of the
same function. The first failure kills the mutant; one that SURVIVED has passed them all; one that
HUNG is not killed either. `equivalent_mutants.txt` lists the damages that nobody could notice, with
the argument: they are not run. The exit status is 1 if a cleanup mutant was not killed, or fewer
than 95 % of the general ones.

Each run is a process that is forked once the packages are imported, so this needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ENOUGH = 95  # percent of the general mutants
PATIENCE = 60.0  # seconds for a test, besides three times what the slowest takes without damage
STACK_CALLS = {"callback", "push", "push_async_callback", "push_async_exit"}
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
LOCK = re.compile(r"(?<![a-z])(lock|mutex|semaphore|limiter|condition)", re.IGNORECASE)
PROTECTIONS = {"finish", "shield", "asyncio.shield"}  # the first is chapter 03's
CLEANUP = {"__exit__", "__aexit__", "close", "aclose", "_close", "stop", "shutdown"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutant:
    """A chapter with one piece damaged."""

    line: int
    damage: str
    build: Callable[[], str]
    function: str = ""  # its qualified name; "" if the damage is to the cleanup
    code: str = ""  # the line before the damage, without its indentation
    stage: bool = False  # is it below the line `# --- The stage`?

    @property
    def source(self) -> str:
        source = self.build()
        compile(source, self.damage, "exec", dont_inherit=True)  # SyntaxErrors would be killed
        return source


class Chapter:
    """A chapter's source, and the mutants of it: each differs in the damaged lines alone."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.bytes = source.encode()  # in which ast counts the columns
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.tree = ast.parse(source)
        self.end_of_managers = self.divider("# --- Demos")
        self.stage = self.divider("# --- The stage")

    def divider(self, text: str) -> int:
        """Return the number of the line that begins with `text`, else that after the last."""
        found = [number for number, line in enumerate(self.lines, 1) if line.startswith(text)]
        return found[0] if found else len(self.lines) + 1

    def span(self, first: Any, last: Any = None) -> slice:
        """Return where the text from one node to another is in the bytes."""
        last = last or first
        start = self.starts[first.lineno - 1] + first.col_offset
        return slice(start, self.starts[last.end_lineno - 1] + last.end_col_offset)

    def text(self, first: Any, last: Any = None) -> str:
        return self.bytes[self.span(first, last)].decode()

    def replaced(self, first: Any, last: Any, text: str, damage: str, function: str = "") -> Mutant:
        """Replace the text from one node to another, without changing the number of lines."""
        build = partial(self.with_text, self.span(first, last), text)
        return self.mutant(first.lineno, damage, build, function)

    def with_text(self, span: slice, text: str) -> str:
        text += "\n" * (self.bytes[span].count(b"\n") - text.count("\n"))
        return (self.bytes[: span.start] + text.encode() + self.bytes[span.stop :]).decode()

    def mutant(
        self, line: int, damage: str, build: Callable[[], str], function: str = ""
    ) -> Mutant:
        code = self.lines[line - 1].strip()
        return Mutant(line, damage, build, function, code, line > self.stage)

    # --- Cleanup ---

    def mutants(self) -> list[Mutant]:
        """Return every mutant without a piece of cleanup, in the order of the file."""
        found: list[Mutant] = []
        for node in ast.walk(self.tree):
            if getattr(node, "lineno", self.end_of_managers) < self.end_of_managers:
                found += self.mutants_at(node)
        return sorted(found, key=lambda mutant: mutant.line)

    def mutants_at(self, node: ast.AST) -> Iterator[Mutant]:
        """Yield the mutants that damage the cleanup of one node."""
        if isinstance(node, ast.Try) and node.finalbody:
            yield self.without(node.finalbody, "finally does nothing")
            yield self.on_success_only(node)
        elif isinstance(node, ast.ExceptHandler) and isinstance(node.body[-1], ast.Raise):
            if len(node.body) > 1:
                yield self.without(node.body[:-1], "except raises without cleaning up")
            if isinstance(node.type, ast.Name) and node.type.id == "BaseException":
                yield self.replaced(
                    node.type, node.type, "Exception", "except misses BaseException"
                )
        elif isinstance(node, Function) and node.name in ("__exit__", "__aexit__"):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            yield self.without(body, f"{node.name} does nothing")
            yield self.swallowing(node)
        elif isinstance(node, ast.Expr) and (called := method_called(node)):
            if called == "reset":
                yield self.without([node], "context variable is not reset")
            elif called in STACK_CALLS:
                yield self.without([node], f"{called} is not pushed on the stack")

    def without(self, statements: list[ast.stmt], damage: str) -> Mutant:
        """Replace some statements with `pass`."""
        return self.replaced(statements[0], statements[-1], "pass", damage)

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
        lines = [*self.lines[: number - 1], otherwise, *self.lines[number:], ""]
        return self.mutant(number, "finally runs on success only", lambda: "\n".join(lines))

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
        damage = f"{node.name} swallows"
        return self.mutant(node.lineno, damage, lambda: "\n".join([*lines, ""]))

    # --- General damage ---

    def general_mutants(self, stage: bool = False) -> list[Mutant]:
        """Return every mutant with general damage, in the order of the file."""
        self.first_bindings = {*first_bindings(self.tree)}
        found = [
            mutant
            for mutant in self.damaged_below(self.tree, "")
            if mutant.line < self.end_of_managers or (stage and mutant.stage)
        ]
        return sorted(found, key=lambda mutant: mutant.line)

    def damaged_below(self, node: ast.AST, function: str) -> Iterator[Mutant]:
        """Yield the mutants of all that is below a node of `function`."""
        if isinstance(node, Function | ast.ClassDef):
            function = f"{function}.{node.name}".removeprefix(".")
        for child in parts(node):
            for first, last, text, damage in self.damages(child, node):
                yield self.replaced(first, last, text, damage, function or "module")
            yield from self.damaged_below(child, function)
        for first, last in swappable(cleanup_of(node)):
            between = self.bytes[self.span(first).stop : self.span(last).start].decode()
            text = self.text(last) + between + self.text(first)
            yield self.replaced(first, last, text, "swapped with the next statement", function)

    def damages(self, node: Any, parent: ast.AST) -> Iterator[tuple[Any, Any, str, str]]:
        """Yield each damage of one node: from which node to which, the new text, its name."""
        if isinstance(node, ast.Raise):
            yield node, node, "pass", "raise dropped"
        elif is_deletable(node) and node not in self.first_bindings:
            yield node, node, "pass", "statement deleted"
        elif isinstance(node, ast.Compare):
            yield from self.compared(node, parent)
        elif isinstance(node, ast.withitem) and LOCK.search(self.text(node.context_expr)):
            lock, nothing = node.context_expr, '__import__("contextlib").nullcontext()'
            yield lock, lock, nothing, f"`{self.folded(lock)}` not taken"
        for test in tests_of(node):
            if not is_negation(test):
                yield test, test, f"not ({self.text(test)})", f"`{self.folded(test)}` negated"
        text, damage = "", ""
        if is_negation(node):
            text, damage = self.text(node.operand), "negated"
        elif isinstance(node, ast.Await):
            text, damage = self.text(node.value), "without await"
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in PROTECTIONS:
            text, damage = self.text(node.args[0]), "without protection"
        elif isinstance(node, ast.keyword) and node.arg == "shield":
            text, damage = "shield=False", "becomes `shield=False`"
        elif isinstance(node, ast.Name) and node.id == "BaseException":
            text, damage = "Exception", "becomes `Exception`"
        if text:
            yield node, node, text, f"`{self.folded(node)}` {damage}"

    def compared(self, node: ast.Compare, parent: ast.AST) -> Iterator[tuple[Any, Any, str, str]]:
        """Yield the node with each of its comparisons changed."""
        for operator, (left, right) in zip(
            node.ops, pairwise([node.left, *node.comparators]), strict=True
        ):
            before, after = COMPARISONS[type(operator)]
            if node in tests_of(parent) and len(node.ops) == 1 and before[0] not in "<>":
                continue  # the same as the condition negated
            between = self.bytes[self.span(left).stop : self.span(right).start].decode()
            text = self.text(left) + between.replace(before, after, 1) + self.text(right)
            yield left, right, text, f"`{self.folded(left, right)}` with `{after}`"

    def folded(self, first: Any, last: Any = None) -> str:
        return " ".join(self.text(first, last).split())


def method_called(node: ast.Expr) -> str:
    """Return the method's name if a statement is only a method call, else ""."""
    call = node.value.value if isinstance(node.value, ast.Await) else node.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
        return call.func.attr
    return ""


# --- What is damaged, and what is not ---


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is directly below a node and can be damaged."""
    holds = always(node.test) if isinstance(node, ast.If) else None
    for name, value in ast.iter_fields(node):
        dead = holds is not None and name != ("body" if holds else "orelse")
        if not dead and name not in ("annotation", "returns"):
            below = value if isinstance(value, list) else [value]
            yield from (it for it in below if isinstance(it, ast.AST) and not is_passed_over(it))


def always(test: ast.expr) -> bool | None:
    """Return what a condition is on this system and Python, or None if that does not decide it."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    if names in ({"TYPE_CHECKING"}, {"__name__"}):
        return False
    if names == {"sys"} and attributes <= {"platform", "version_info"}:
        return bool(eval(ast.unparse(test), {"sys": sys}))
    return None


def is_passed_over(node: ast.AST) -> bool:
    """Return True for docstrings, assertions, imports, types, logging calls and `__all__`."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("logg")
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id.startswith("__")
    if isinstance(node, ast.Subscript):
        return "BaseException" in ast.unparse(node.slice)
    return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom)


def tests_of(node: ast.AST) -> list[ast.expr]:
    """Return the conditions of a node."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        fixed = isinstance(node.test, ast.Constant) or always(node.test) is not None
        return [] if fixed else [node.test]
    if isinstance(node, ast.match_case) and node.guard:
        return [node.guard]
    return node.ifs if isinstance(node, ast.comprehension) else []


def is_negation(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def is_deletable(node: ast.AST) -> bool:
    """Return True for a simple statement without which the code still compiles."""
    if isinstance(node, ast.Expr):  # without `yield`, the function is no generator
        return not isinstance(node.value, ast.Yield | ast.YieldFrom)
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    kinds = ast.Assign | ast.AugAssign | ast.Delete | ast.Return | ast.Break | ast.Continue
    return isinstance(node, kinds)


def first_bindings(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the assignments that give a name its first value: without it, nothing runs."""
    bindings = ast.Assign | ast.AnnAssign
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.ClassDef):
            yield from (node for node in scope.body if isinstance(node, bindings))
        elif isinstance(scope, Function):
            known: set[str] = set()
            for node in sorted(ast.walk(scope), key=lambda node: getattr(node, "lineno", 0)):
                if isinstance(node, bindings) and names_bound(node) - known:
                    yield node
                known |= names_bound(node)


def names_bound(node: ast.AST) -> set[str]:
    """Return the names that an assignment, a loop, an argument or the like binds."""
    if isinstance(node, ast.Global | ast.Nonlocal | ast.arg):
        return {node.arg} if isinstance(node, ast.arg) else {*node.names}
    bound = [*getattr(node, "targets", []), getattr(node, "target", None)]
    names = [name for target in bound if target for name in ast.walk(target)]
    return {it.id for it in names if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store)}


def cleanup_of(node: ast.AST) -> list[ast.stmt]:
    """Return the statements directly below a node that clean up."""
    if isinstance(node, ast.Try):
        return node.finalbody
    if isinstance(node, ast.ExceptHandler) or (isinstance(node, Function) and node.name in CLEANUP):
        return node.body
    return []


def swappable(block: list[ast.stmt]) -> Iterator[tuple[ast.stmt, ast.stmt]]:
    """Yield neighbours of which either could come first."""
    movable = ast.Expr | ast.Assign | ast.AugAssign | ast.If | ast.With | ast.AsyncWith | ast.Try
    for first, last in pairwise(block):
        both = (first, last)
        if not all(isinstance(it, movable) and not is_passed_over(it) for it in both):
            continue
        used = {node.id for node in ast.walk(last) if isinstance(node, ast.Name)}
        if not all(isinstance(it, ast.Assign) for it in both) and not names_bound(first) & used:
            yield both


# --- Running the tests ---


@dataclass(eq=False)
class Suite:
    """The tests of a chapter, and what their runs have shown."""

    chapter: Path
    tests: Path
    killers: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    # How long each test takes without damage.
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def order(self, function: str) -> list[str]:
        """Return the tests in the order in which they should see a mutant of `function`."""
        fastest = sorted(self.seconds, key=lambda test: self.seconds[test])
        return [*dict.fromkeys([*self.killers[function], *fastest])]


class Reporter:
    """A plugin for pytest. It sorts the tests, and writes a line when one begins, ends or fails."""

    def __init__(self, report: Path, order: Iterable[str]) -> None:
        self.file = report.open("a", buffering=1, encoding="utf-8")
        self.order = {test: place for place, test in enumerate(order)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print("began", nodeid, file=self.file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        print(f"{report.duration:.3f}", report.nodeid, file=self.file)
        if report.failed:
            print("failed", report.nodeid, file=self.file)

    def pytest_sessionfinish(self) -> None:
        paths = sysconfig.get_paths()
        installed = (paths["stdlib"], paths["purelib"], paths["platlib"])
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(installed):
                print("imported", name, file=self.file)


class Run:
    """The tests of a suite against a source, in a process of their own."""

    def __init__(self, suite: Suite, mutant: Mutant) -> None:
        self.suite, self.function = suite, mutant.function
        self.fate = self.test = ""
        self.limit = PATIENCE + 3 * max(suite.seconds.values(), default=200.0)
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.report = self.folder / "report"
        self.report.touch()
        chapter = self.folder / suite.chapter.name
        chapter.write_text(mutant.source, encoding="utf-8")
        (self.folder / "locale").symlink_to(suite.chapter.parent / "locale")
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = play(suite, chapter, Reporter(self.report, suite.order(mutant.function)))
            finally:
                os._exit(status)

    def lines(self) -> list[tuple[str, str]]:
        """Return the lines of the report: a word, and what it is about."""
        split = (line.partition(" ") for line in self.report.read_text("utf-8").splitlines())
        return [(word, rest) for word, _space, rest in split]

    def silent(self) -> float:
        """Return for how many seconds no test has begun or ended."""
        return time.time() - self.report.stat().st_mtime

    def is_over(self) -> bool:
        """Find out the fate, and the test that decided it."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            self.fate = "killed" if status else "SURVIVED"
        elif self.silent() > self.limit:
            self.fate = "HUNG"
        else:
            return False
        decisive = "failed" if ended else "began"
        self.test = ([rest for word, rest in self.lines() if word == decisive] or [""])[-1]
        if self.fate == "killed" and self.test:
            self.suite.killers[self.function].appendleft(self.test)
        return True

    def end(self) -> None:
        """Kill the process, and the children that a mutant may have leaked."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def play(suite: Suite, chapter: Path, reporter: Reporter) -> int:
    """Run the tests in this process; `chapter_path` in conftest.py finds the damaged chapter."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.chdir(suite.chapter.parent)
    os.environ[f"WORKSHOP_CHAPTER_{suite.chapter.name[:2]}"] = str(chapter)
    options = ["-xq", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # A plugin that was imported before the fork cannot be rewritten for better messages.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options += [f"--basetemp={chapter.parent / 'tmp'}", str(suite.tests)]
    return pytest.main(options, plugins=[reporter])


def finished(starts: Iterable[Callable[[], Run]], at_once: int) -> Iterator[tuple[int, Run]]:
    """Start runs, some at once, and yield each with its number when it is over."""
    waiting = deque(enumerate(starts))
    running: dict[int, Run] = {}
    try:
        while waiting or running:
            # A run that has been silent for long only waits: another one may start beside it.
            busy = sum(1 if run.silent() < 5 else 0.5 for run in running.values())
            if waiting and busy < at_once:
                number, start = waiting.popleft()
                running[number] = start()
            for number, run in list(running.items()):
                if run.is_over():
                    yield number, run
                    running.pop(number).end()
            time.sleep(0.01)
    finally:
        for run in running.values():
            run.end()


def failing_without_damage(suites: list[Suite], at_once: int) -> list[str]:
    """Time each test against the chapters as they are; import what they import, and freeze it."""
    intact = [Mutant(0, "", partial(suite.chapter.read_text, "utf-8")) for suite in suites]
    starts = [partial(Run, *job) for job in zip(suites, intact, strict=True)]
    failing = []
    imported: dict[str, None] = {}
    for _number, run in finished(starts, at_once):
        if run.fate != "SURVIVED":
            failing.append(run.test or f"{run.suite.tests} ({run.fate})")
        for word, rest in run.lines():
            if word == "imported":
                imported[rest] = None
            elif word not in ("began", "failed"):
                run.suite.seconds[rest] += float(word)
    for name in imported:
        with suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1, "a package started a thread: it would not be forked"
    gc.collect()
    gc.freeze()  # no collection looks at it again
    return failing


# --- The command ---

Job = tuple[Suite, Mutant]
Key = tuple[str, str, str, str]  # chapter, function, damage, line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", nargs="+", type=Path)
    parser.add_argument("--general", type=int, metavar="N", help="draw N of the general mutants")
    parser.add_argument("--seed", type=int, default=1, help="of that sample (default: 1)")
    parser.add_argument("--at", type=int, metavar="LINE", help="play every mutant of this line")
    parser.add_argument("--list", action="store_true", help="print the mutants, play none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many run at once")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run outlives this one
    chapters = [chapter.resolve() for chapter in options.chapter]
    jobs = [job for chapter in chapters for job in jobs_of(chapter)]
    general = [job for job in jobs if job[1].function]
    excused = {key: why for chapter in chapters for key, why in equivalents(chapter).items()}
    for key in excused.keys() - {key_of(*job) for job in general}:
        parser.error(f"no such mutant, though it is listed as equivalent: {' | '.join(key)}")
    if options.at:
        jobs = [job for job in jobs if job[1].line == options.at]
    elif options.general:
        jobs = drawn(general, options.general, options.seed)
    else:
        jobs = [job for job in jobs if not job[1].function]
    if options.list:
        for job in jobs:
            print(named(*job))
        return 0
    return examine(jobs, excused, options.jobs)


def jobs_of(chapter: Path) -> list[Job]:
    """Return every mutant of a chapter with the tests that should notice it."""
    source = Chapter(chapter.read_text("utf-8"))
    managers = Suite(chapter, chapter.parent / "tests" / f"test_{chapter.stem}.py")
    stage = Suite(chapter, chapter.parent / "tests" / "test_stage.py")
    first = chapter.name.startswith("01")  # the stage is the same in every script
    mutants = [*source.mutants(), *source.general_mutants(stage=first)]
    return [(stage if mutant.stage else managers, mutant) for mutant in mutants]


def equivalents(chapter: Path) -> dict[Key, str]:
    """Return the argument for each mutant of the chapter that is listed as equivalent."""
    listed = chapter.parent / "tools" / "equivalent_mutants.txt"
    found: dict[Key, str] = {}
    for line in listed.read_text("utf-8").splitlines() if listed.exists() else ():
        if line.startswith(chapter.name[:2]):
            entry, _bar, argument = line.rpartition(" | ")
            number, function, damage, code = entry.split(" | ", 3)
            found[number, function, damage, code] = argument
    return found


def key_of(suite: Suite, mutant: Mutant) -> Key:
    return suite.chapter.name[:2], mutant.function, mutant.damage, mutant.code


def named(suite: Suite, mutant: Mutant) -> str:
    function = mutant.function and f"{mutant.function}: "
    return f"{suite.chapter.name}:{mutant.line} {function}{mutant.damage}"


def drawn(jobs: list[Job], number: int, seed: int) -> list[Job]:
    """Return a sample. Each job has its own lot: so editing one function changes no other's."""
    lots = [random.Random(f"{seed} {key_of(*job)}").random() for job in jobs]
    chosen = sorted(range(len(jobs)), key=lots.__getitem__)[:number]
    return [jobs[place] for place in sorted(chosen)]


def examine(jobs: list[Job], excused: dict[Key, str], at_once: int) -> int:
    """Print the fate of each mutant, in the order of the files; return the exit status."""
    started = time.monotonic()
    played = [job for job in jobs if key_of(*job) not in excused]
    if failing := failing_without_damage(
        list(dict.fromkeys(suite for suite, _ in played)), at_once
    ):
        print(f"fails without damage; make it pass first: {', '.join(failing)}", file=sys.stderr)
        return 2
    runs = finished([partial(Run, *job) for job in played], at_once)
    over: dict[int, Run] = {}
    count: Counter[str] = Counter()
    for job in jobs:
        fate, remark = "equivalent", excused.get(key_of(*job), "")
        if not remark:
            while (number := count.total() - count["equivalent"]) not in over:
                over.update([next(runs)])
            fate = over[number].fate
            remark = f"in {over[number].test}" if fate == "HUNG" else ""
        count[fate] += 1
        print(f"{fate:8} {named(*job)}")
        if job[1].function and fate != "killed":
            print(f"         {job[1].code}")
        print(f"         {remark}\n" if remark else "", end="", flush=True)
    return summary(jobs, count, time.monotonic() - started)


def summary(jobs: list[Job], count: Counter[str], seconds: float) -> int:
    """Print the totals; return the exit status."""
    names = {suite.chapter.name for suite, _mutant in jobs}
    title = names.pop() if len(names) == 1 else f"{len(names)} chapters"
    killed, of = count["killed"], count.total() - count["equivalent"]
    print(f"{title}: {killed} of {of} mutants killed", end="")
    if not any(mutant.function for _suite, mutant in jobs):
        print()
        return 0 if killed == of else 1
    percent = 100 * killed / of if of else 100.0
    print(
        f" ({percent:.1f} %), {count['SURVIVED']} survived, {count['HUNG']} hung, "
        f"{count['equivalent']} equivalent; {seconds:.0f} s"
    )
    return 0 if percent >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
