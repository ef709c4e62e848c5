"""Run the Python fences of a Markdown chapter, and compare what they print with the page.

    run_chapter(path)              in a test: raises at the first fence that differs from the page
    python tools/fences.py FILE    the same by hand; --write copies the output into the page
    python tools/fences.py --extract FOLDER FILE    write the page's code into FOLDER

How a chapter is written:

- All ```python fences share one namespace. `await` works at the top level, as in
  `python -m asyncio`. Each fence is a task of its own, on one event loop in debug mode.
- The ```text fence that follows, after blank lines only, is the output. It must be equal except
  for what `VARIES`. A fence without one must print nothing.
- A fence whose first line is `# name.py` is a file. It is saved in the folder where the chapter
  runs, so that child processes find it and later fences can import it.
- A ```bash fence that says only `python name.py` runs such a file.
- `<!-- not run: the reason -->` directly above a fence: it is compiled but not run.

Sybil silently ignores a fence labelled `py` or `python title=...`. `python_looking` therefore
counts the fences independently, and a chapter does not run if the two counts differ.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import contextvars
import difflib
import gc
import importlib.machinery
import inspect
import io
import logging
import re
import runpy
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0  # seconds after which an awaiting fence is taken to hang

# All that may differ between the page and a run. Everything else is compared letter by letter.
VARIES = (
    (re.compile(r" *\b\d+(\.\d+)? ms\b"), " # ms"),  # a time, and the blanks that align it
    (re.compile(r"\bpid \d+"), "pid #"),
    (re.compile(r"\b(127\.0\.0\.1|localhost):\d+"), r"\1:#"),  # a port
    (re.compile(r"(/[\w.+-]+)*/(tmp|T)/[\w./+-]+"), "/tmp/#"),  # a temporary path
    (re.compile(r"\b0x[0-9a-f]{6,}"), "0x#"),  # an address in a repr
)


def settled(output: str) -> str:
    """Return the output with `#` for everything that varies, without trailing blanks."""
    for pattern, replacement in VARIES:
        output = pattern.sub(replacement, output)
    return "\n".join(line.rstrip() for line in output.strip("\n").splitlines())


@dataclass(frozen=True)
class Fence:
    """One Python fence."""

    place: str  # file:line, of its first line of code
    line: int
    source: str
    expected: str | None  # what the text fence says
    output: tuple[int, int] | None  # where that stands in the page
    file: str | None  # the name under which it is saved
    reason: str | None  # why it is not run
    program: str | None  # a command: the file that it runs


@dataclass(frozen=True)
class Played:
    """The outcome of running a chapter."""

    fences: list[Fence]
    run: int
    skipped: int


def find_fences(path: Path) -> list[Fence]:
    """Return the Python fences and the commands of a page, as Sybil finds them."""
    return [example.parsed for example in Sybil([_parser(None)]).parse(path).examples()]


def python_looking(text: str) -> int:
    """Count the fences that look like Python to a reader, whatever their label, line by line."""
    count, closing = 0, ""
    for line in text.splitlines():
        opened = re.match(r"[ \t>*+-]*(`{3,}|~{3,})(.*)", line)
        if closing:
            closing = "" if line.strip() == closing else closing
        elif opened:
            closing = opened[1]
            count += bool(re.match(r"[\s{.]*(py|ipython|pycon)", opened[2], re.IGNORECASE))
    return count


def _parser(evaluator: Any) -> Any:
    def parse(document: Document) -> Iterable[Region]:
        regions = list(FencedCodeBlockLexer(r"\w+")(document))
        for region, following in zip(regions, [*regions[1:], None], strict=True):
            fence = _fence(document, region, following)
            if region.lexemes["language"] == "python" or fence.program:
                yield Region(region.start, region.end, parsed=fence, evaluator=evaluator)

    return parse


def _fence(document: Document, region: Region, following: Region | None) -> Fence:
    text = document.text
    line = text.count("\n", 0, region.start) + 2

    def directly_follows(other: Region) -> bool:
        return not text[region.end : other.start].strip()

    expected = output = None
    if following and following.lexemes["language"] == "text" and directly_follows(following):
        shown = following.lexemes["source"]
        start = following.start + shown.offset
        expected, output = str(shown), (start, start + len(shown))
    source = str(region.lexemes["source"])
    named = re.match(r"# (\w+\.py)\n", source)
    is_bash = region.lexemes["language"] == "bash"
    command = re.fullmatch(r"python (\w+\.py)\n?", source) if is_bash else None
    reason = re.search(r"<!-- not run: ((?:(?!-->).)+?) -->\s*\Z", text[: region.start], re.DOTALL)
    return Fence(
        place=f"{Path(document.path).name}:{line}",
        line=line,
        source=source,
        expected=expected,
        output=output,
        file=named and named[1],
        reason=reason and reason[1],
        program=command and command[1],
    )


def run_chapter(path: Path, folder: Path | None = None) -> Played:
    """Run the page in `folder` (default: the repository, where the chapters are).

    Raises AssertionError, or what the fence raised with a note, naming the page and its line.
    """
    return Run(path, folder or ROOT).play(_compare)


def _compare(fence: Fence, printed: str) -> str | None:
    wanted = settled(fence.expected or "")
    if settled(printed) == wanted:
        return None
    lines = difflib.unified_diff(
        wanted.splitlines(), settled(printed).splitlines(), "the page", "this run", lineterm=""
    )
    return f"{fence.place} does not print what the page says:\n" + "\n".join(lines)


class Run:
    """One run of one chapter: its namespace, its event loop, its folder."""

    def __init__(self, path: Path, folder: Path, debug: bool = True) -> None:
        self.path = path
        self.folder = folder
        self.printed: dict[Fence, str] = {}
        self._main = types.ModuleType(f"page_{path.stem}")
        self._modules = {self._main.__name__}
        self._context = contextvars.copy_context()
        self._runner = asyncio.Runner(debug=debug)

    def play(self, judge: Any) -> Played:
        """Run all fences in order. `judge(fence, printed)` returns what is wrong, or None."""

        def evaluate(example: Example) -> str | None:
            verdict: str | None = judge(example.parsed, self._outcome(example.parsed))
            return verdict

        document = Sybil([_parser(evaluate)]).parse(self.path)
        fences = [example.parsed for example in document.examples()]
        labelled = sum(fence.program is None for fence in fences)
        if (looking := python_looking(document.text)) != labelled:
            raise AssertionError(
                f"{self.path.name} has {looking} fences that look like Python, of which"
                f" {labelled} are labelled ```python and nothing else: only those are run"
            )
        with self._loop_and_modules(), contextlib.chdir(self.folder):
            for example in document.examples():
                example.evaluate()
        skipped = sum(fence.reason is not None for fence in fences)
        return Played(fences, run=len(self.printed), skipped=skipped)

    def _outcome(self, fence: Fence) -> str:
        """Run one fence; return what it printed."""
        code = None if fence.program else self._compiled(fence)
        if fence.reason is not None:
            return fence.expected or ""
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            try:
                if code is None:
                    self._run_program(fence)
                elif fence.file:
                    self._save(fence, code)
                else:
                    self._execute(code, self._main)
            except BaseException as error:
                error.add_note(f"{fence.place} raised; it had printed:\n{stdout.getvalue()}")
                raise
        self.printed[fence] = stdout.getvalue()
        return self.printed[fence]

    def _run_program(self, fence: Fence) -> None:
        """Run a saved file from the top, in this process, which has imported what it needs."""
        assert fence.program is not None
        with mock.patch.object(sys, "argv", [fence.program]):
            runpy.run_path(fence.program, run_name="__main__")

    def _compiled(self, fence: Fence) -> types.CodeType:
        padded = "\n" * (fence.line - 1) + fence.source  # so that a traceback names the page's line
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code: types.CodeType = compile(padded, str(self.path), "exec", flags, dont_inherit=True)
        return code

    def _execute(self, code: types.CodeType, module: types.ModuleType) -> None:
        if code.co_flags & inspect.CO_COROUTINE:
            self._runner.run(self._limited(code, module), context=self._context)
        else:
            self._context.run(exec, code, module.__dict__)

    async def _limited(self, code: types.CodeType, module: types.ModuleType) -> None:
        async with asyncio.timeout(LIMIT):
            await eval(code, module.__dict__)

    def _save(self, fence: Fence, code: types.CodeType) -> None:
        assert fence.file is not None
        if self.folder == ROOT:
            raise AssertionError(f"{fence.place} is a file: run its chapter in a folder of its own")
        path = self.folder / fence.file
        path.write_text(fence.source, encoding="utf-8")
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path.stem, None, origin=str(path))
        self._import(module)
        self._execute(code, module)

    def _import(self, module: types.ModuleType) -> None:
        if module.__name__ in sys.modules and module.__name__ not in self._modules:
            raise AssertionError(f"{module.__name__} is a module already: give it another name")
        self._modules.add(module.__name__)
        sys.modules[module.__name__] = module

    @contextlib.contextmanager
    def _loop_and_modules(self) -> Iterator[None]:
        """Make the page's modules importable, and raise what asyncio only logs."""
        logged: list[str] = []
        listener = logging.Handler(logging.ERROR)
        listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("asyncio").addHandler(listener)
        levels = {logger: logger.level for logger in _loggers()}
        self._import(self._main)
        try:
            with self._runner:
                yield
                gc.collect()  # a task nobody looked at complains when it is collected
        finally:
            logging.getLogger("asyncio").removeHandler(listener)
            for logger in _loggers():
                logger.setLevel(levels.get(logger, logging.NOTSET))
            for name in self._modules:
                sys.modules.pop(name, None)
        if logged:
            raise AssertionError(f"asyncio logged, in {self.path.name}:\n" + "\n".join(logged))


def _loggers() -> list[logging.Logger]:
    known = list(logging.root.manager.loggerDict)
    return [logging.getLogger(), *map(logging.getLogger, known)]


def rewrite(path: Path, folder: Path) -> int:
    """Copy what the fences print into the page where it differs; return how many did."""
    run = Run(path, folder, debug=False)  # the page shows the times that a reader gets
    played = run.play(lambda fence, printed: None)
    text = path.read_text(encoding="utf-8")
    changed = 0
    for fence in reversed(played.fences):
        printed = run.printed.get(fence)
        if printed is None or _compare(fence, printed) is None:
            continue
        changed += 1
        if fence.output is None:
            raise AssertionError(f"{fence.place} prints; put an empty ```text fence under it first")
        start, end = fence.output
        text = text[:start] + printed.rstrip("\n") + "\n" + text[end:]
    path.write_text(text, encoding="utf-8")
    return changed


def extract(path: Path, folder: Path) -> None:
    """Write the page's files into `folder`, and its other fences, in order, into blocks.py."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = ""
    for fence in find_fences(path):
        if fence.file:
            (folder / fence.file).write_text(fence.source, encoding="utf-8")
        elif not fence.program and not fence.reason:
            blocks += f"    # {fence.place}\n{textwrap.indent(fence.source, '    ')}\n"
    program = f"import asyncio\n\n\nasync def main():\n{blocks}\nasyncio.run(main())\n"
    (folder / "blocks.py").write_text(program, encoding="utf-8")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--extract"]:
        extract(Path(arguments[2]), Path(arguments[1]).expanduser())
        return 0
    write = "--write" in arguments
    for path in (Path(argument).resolve() for argument in arguments if argument != "--write"):
        files = any(fence.file for fence in find_fences(path))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if files else ROOT
            if write:
                print(f"{path.name}: {rewrite(path, folder)} outputs rewritten")
            else:
                played = run_chapter(path, folder)
                print(f"{path.name}: {played.run} fences run, {played.skipped} not run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
