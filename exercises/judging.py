"""How an answer is judged: in a process of its own, and reported in words.

    python exercises/judging.py 01.1                      play task 1 of chapter 01
    python exercises/judging.py 01.1 my_answer.py         play it with another file

A judge (`judges/judge_NN_...py`) calls the learner's code inside `attempt(...)` and compares what
it sees by `expect(...)`. The first difference ends the task: the report says what was called, what
was expected, what happened instead, and which lines of the answer ran, in which order.

The process of its own is for answers that hang, leave threads behind or end the interpreter.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT / "tests"):  # `judging` for the judges, and the cleanup contract
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

_ = gettext.translation("workshop", ROOT / "locale", fallback=True).gettext
MOST_PLACES = 4  # of one line in the path that ran; a loop has many


@dataclass(frozen=True)
class Task:
    """One exercise: which names of the answer are judged, by what, and what helps."""

    id: str  # "01.1": the chapter, and the number of the task in its file
    title: str
    names: tuple[str, ...]  # the path shows these, if they are there; the first one must be
    lesson: str  # what to run or read again, such as "01_basic_concepts.py 3"
    hint: str
    strong_hint: str
    judge: Callable[[ModuleType], None]
    seconds: float  # after this long, it hangs

    @property
    def kind(self) -> str:
        """Return bug, task or capstone."""
        return {"1": _("bug"), "2": _("task"), "3": _("capstone")}[self.id[-1]]


@dataclass
class Report:
    """What a judge found."""

    solved: bool
    called: str = ""
    expected: str = ""
    happened: str = ""
    path: str = ""  # the path that ran
    imported: bool = True  # if not, the hints do not help yet
    story: str = ""  # the task's text, in a language other than the file's
    printed: str = ""  # what the answer printed
    managers: list[str] = field(default_factory=list)  # that kept the cleanup contract
    counts: dict[str, int] = field(default_factory=dict)  # of it: see tests/contract.py


class NotSolvedError(Exception):
    """The answer did something else than its text asks for."""

    def __init__(self, expected: str, happened: str) -> None:
        super().__init__(f"expected: {expected}; happened: {happened}")
        self.expected, self.happened = expected, happened


# --- For judges ---

TASKS: list[Task] = []


def task(
    number: str,
    title: str,
    *names: str,
    lesson: str,
    hint: str,
    strong_hint: str,
    seconds: float = 10.0,
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enlist a function that judges the answer, a module, to this task."""

    def enlist(judge: Callable[[Any], None]) -> Callable[[Any], None]:
        TASKS.append(Task(number, title, names, lesson, hint, strong_hint, judge, seconds))
        return judge

    return enlist


@dataclass
class Progress:
    """What the judge is doing now; the watchdog reads it when the answer hangs."""

    called: str = ""
    lines: list[int] = field(default_factory=list)  # that ran, of the answer
    answer: ModuleType | None = None
    path: str = ""  # of the answer

    @property
    def file(self) -> str | None:
        """The answer's file, even while it is being imported."""
        return getattr(self.answer, "__file__", self.path)


progress = Progress()


@contextmanager
def attempt(called: str, expected: str = "", traced: bool = True) -> Iterator[None]:
    """Call the answer inside this block: it records the path that ran.

    `called` says what the block does with the answer, and `expected` what should come of it: it
    is reported if the block raises. Any exception that leaves the block means: not solved.
    Pass `traced=False` where thousands of calls would take too long.
    """
    progress.called = called
    progress.lines.clear()
    try:
        with record_lines() if traced else nullcontext():
            yield
    except NotSolvedError:
        raise
    except NotImplementedError:
        raise NotSolvedError(
            _("your code"), _("there is none yet, only NotImplementedError")
        ) from None
    except BaseException as error:
        context = error.__context__
        while context is not None:
            if isinstance(context, NotSolvedError):  # found first; cleanup then raised, too
                raise context from None
            context = context.__context__
        happened = in_words(error)
        raise NotSolvedError(expected or _("no exception"), happened) from error


@contextmanager
def record_lines() -> Iterator[None]:
    """Record which lines of the answer run, in every thread that starts in this block."""
    file = progress.file
    last: dict[int, int] = {}

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            progress.lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno
        return on_event

    before = sys.gettrace()
    sys.settrace(on_event)
    threading.settrace(on_event)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(None)


def expect(holds: object, expected: str, happened: str) -> None:
    """End the task unless it holds. Both texts are clauses in words, for the learner."""
    if not holds:
        raise NotSolvedError(expected, happened)


def keep_contract(make_subject: Callable[[], Any], skip: tuple[str, ...] = ()) -> None:
    """Hold a manager to every way out of its block (tests/contract.py).

    `make_subject` makes a new `contract.Subject` for each way; `skip` names ways.
    """
    import contract

    managers = contract.ASYNC_WAYS if is_async(make_subject) else contract.SYNC_WAYS
    expected = _("nothing is left behind, and no exception is lost")
    for way in managers:
        if way.__name__ in skip:
            continue
        summary = (way.__doc__ or "").partition("\n")[0]
        with attempt(
            _("the cleanup contract, one way out of the block: {way}").format(way=summary)
        ):
            try:
                way(make_subject())
            except unittest.SkipTest:
                continue
            except contract.Broken as error:
                faults = r"under (setup|cleanup)_faults\[\d+\]"
                happened = re.sub(faults, r"after its \1 failed", error.what)
                raise NotSolvedError(expected, happened) from error


def is_async(make_subject: Callable[[], Any]) -> bool:
    """Return whether the subject's manager is for `async with`."""
    with attempt(_("make the context manager")):
        return hasattr(type(make_subject().open()), "__aexit__")


def chapter(number: int) -> ModuleType:
    """Return a chapter's script as a module."""
    (path,) = ROOT.glob(f"{number:02d}_*.py")
    return load(path, f"chapter_{number:02d}")


# --- In words ---


def in_words(error: BaseException) -> str:
    """Return an exception and the line of the answer that it came from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == progress.file
    ]
    name = type(error).__name__
    message = str(error).rstrip(".")
    what = f"{name}: {message}" if message else name
    if lines:
        return _("{error}, raised in line {line} of your file").format(error=what, line=lines[-1])
    return _("{error} was raised").format(error=what)


def path_that_ran(task: Task, answer: Path) -> str:
    """Return the answer's code, with the order in which its lines ran.

    That is what the task names, and every other function and class of the file that ran.
    """
    try:
        text = answer.read_text(encoding="utf-8")
        pieces = {node.name: node for node in ast.parse(text).body if isinstance(node, PIECE)}
    except (OSError, SyntaxError):
        return ""
    ran = set(progress.lines)
    shown = [
        line
        for name, node in pieces.items()
        for line in lines_of(node)
        if name in task.names or ran.intersection(lines_of(node))
    ]
    steps = [line for line in progress.lines if line in shown]
    rows = []
    for number in shown:
        code = text.splitlines()[number - 1].rstrip()
        if code and not code.lstrip().startswith("#"):
            places = [str(n) for n, line in enumerate(steps, 1) if line == number]
            more = " …" if len(places) > MOST_PLACES else ""
            rows.append((" ".join(places[:MOST_PLACES]) + more, code))
    width = max((len(places) for places, _code in rows), default=0)
    return "\n".join(f"{places:>{width}}  {code}".rstrip() for places, code in rows)


PIECE = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def lines_of(piece: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[int]:
    """Return the line numbers of a function or class, without those of docstrings."""
    first = min([piece.lineno, *(decorator.lineno for decorator in piece.decorator_list)])
    numbers = set(range(first, (piece.end_lineno or first) + 1))
    for node in ast.walk(piece):
        if isinstance(node, PIECE) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            numbers -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return sorted(numbers)


# --- The process that judges ---


def load(path: Path, name: str) -> ModuleType:
    """Import a file by its path, once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks_of(stem: str) -> list[Task]:
    """Return the tasks of one file of exercises, in order."""
    number = stem[3:5]
    load(HERE / "judges" / f"judge_{stem[3:]}.py", f"judge_{number}")
    return sorted((t for t in TASKS if t.id.startswith(number)), key=lambda t: t.id)


def judge_here(task: Task, answer: Path) -> Report:
    """Judge an answer in this process."""
    progress.called = _("import {file}").format(file=answer.name)
    progress.path = str(answer)
    try:
        with attempt(progress.called):
            progress.answer = load(answer, f"answer_{answer.stem}")
        there = hasattr(progress.answer, task.names[0])
        expect(there, _("the file defines {name}").format(name=task.names[0]), _("it does not"))
        task.judge(progress.answer)
    except NotSolvedError as error:
        report = Report(False, progress.called, error.expected, error.happened)
        return finish_report(task, answer, report)
    return Report(True)


def finish_report(task: Task, answer: Path, report: Report) -> Report:
    """Add the path that ran and, in another language, the task's text."""
    report.imported = hasattr(progress.answer, task.names[0])
    report.path = path_that_ran(task, answer) if report.imported else ""
    asked = getattr(progress.answer, task.names[0], None)
    if asked.__doc__ and _(inspect.getdoc(asked) or "") != inspect.getdoc(asked):
        report.story = _(inspect.getdoc(asked) or "").partition("\n\n")[2]  # less the title
    return report


def main() -> NoReturn:
    """Judge one answer; print the report as JSON."""
    parser = argparse.ArgumentParser(description=_("Judge one exercise."))
    parser.add_argument("task", help=_("chapter and number, such as 01.1"))
    parser.add_argument("answer", nargs="?", type=Path, help=_("a file other than the chapter's"))
    options = parser.parse_args()
    found = sorted(HERE.glob(f"ex_{options.task[:2]}_*.py"))
    tasks = {each.id: each for each in tasks_of(found[0].stem)} if found else {}
    if options.task not in tasks:
        parser.error(f"there is no task {options.task}")
    task, answer = tasks[options.task], (options.answer or found[0]).resolve()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the answer prints does not mix with the report
    once = threading.Lock()

    def tell(report: Report) -> None:
        once.acquire()  # and never release: one report is enough
        if contract := sys.modules.get("contract"):
            report.managers, report.counts = sorted(contract.managers), dict(contract.counts)
        out.write(json.dumps(asdict(report)))
        out.flush()
        if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)  # this process, and every child that the answer left
        os._exit(0)  # an answer may have left threads that never end

    def give_up() -> None:
        expected = _("it ends within {seconds:g} s").format(seconds=task.seconds)
        report = Report(False, progress.called, expected, _("it was still running then"))
        tell(finish_report(task, answer, report))

    watchdog = threading.Timer(task.seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    tell(judge_here(task, answer))
    raise AssertionError("unreachable")


def judge(task: Task, answer: Path) -> Report:
    """Judge an answer in a process of its own; leave no process behind."""
    command = [sys.executable, str(Path(__file__)), task.id, str(answer)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # so that its own children can be ended with it
    )
    try:
        out, printed = child.communicate(timeout=task.seconds + 20)
    except subprocess.TimeoutExpired:
        out, printed = "", ""
    finally:
        if child.returncode is None:  # subtle: a number that was waited for may be reused
            kill_all(child)
    return report_of(out, printed, child.returncode)


def report_of(out: str, printed: str, status: int) -> Report:
    """Return the report that a process wrote, or say how it ended without one."""
    try:
        report = Report(**json.loads(out))
    except ValueError:
        happened = _("the process ended with status {status}").format(status=status)
        report = Report(False, _("run the file"), _("the process goes on"), happened)
    report.printed = re.sub(r"\n{2,}", "\n", printed).strip()[-2000:]
    return report


def kill_all(child: subprocess.Popen[str]) -> None:
    """Kill the process that judges, and what the answer started."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.communicate()


if __name__ == "__main__":
    # subtle: judges import this module by its name, and must find the same list of tasks.
    sys.modules["judging"] = sys.modules["__main__"]
    main()
