"""Let pytest play the exercises: `.venv/bin/python -m pytest exercises`.

Each task of an `ex_NN_...py` is a test. What is reported about an unsolved one comes from its
judge, in words; there is no traceback. Solved or not depends on the files alone: there is no state.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import judging
import pytest
from judging import Report, Task, _

HERE = Path(__file__).resolve().parent
MARGIN = 12  # columns of "  expected: ", beside which a text is wrapped


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hints", action="store_true", help="show the second, stronger hint, too")


def pytest_configure(config: pytest.Config) -> None:
    # The reports below replace pytest's list of failures and its summary.
    config.option.tbstyle = "no"
    config.option.reportchars = ""
    config.option.no_header = True


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    collectors = yield
    if file_path.parent == HERE and file_path.match("ex_*.py"):
        # subtle: pytest imports a file that the command line names. An answer may hang or exit.
        return [ExerciseFile.from_parent(parent, path=file_path)]
    return collectors


class ExerciseFile(pytest.File):
    """One file of exercises."""

    def collect(self) -> Iterator[pytest.Item]:
        for task in judging.tasks_of(self.path.stem):
            yield Exercise.from_parent(self, name=task.id, task=task)


class UnsolvedError(Exception):
    """An exercise is not solved. Holds the report."""


class Exercise(pytest.Item):
    """One task."""

    def __init__(self, *, task: Task, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.task = task
        self.extra_keyword_matches |= {task.kind, *task.names}  # for `-k`

    def runtest(self) -> None:
        report = judging.judge(self.task, self.path)
        file = self.path.relative_to(HERE.parent).as_posix()
        headline = f"{self.task.id} {self.task.kind} · {self.task.title}"
        self.user_properties += [("exercise", headline), ("file", file)]
        if not report.solved:
            strong = self.config.getoption("--hints")
            self.user_properties.append(("report", in_lines(self.task, report, strong)))
            raise UnsolvedError

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.task.title


# --- What the learner reads ---


def in_lines(task: Task, report: Report, strong: bool) -> str:
    """Return the report on an unsolved task."""
    width = min(shutil.get_terminal_size().columns, 100)
    wrap = stage().wrap
    lines: list[str] = []

    def add(label: str, text: str) -> None:
        if text:
            lines.append(f"  {label}")
            wrapped = "\n".join(wrap(text, width - MARGIN)).splitlines()
            lines.extend(f"    {line}".rstrip() for line in wrapped)

    if report.story:
        add(_("the task:"), report.story)
    add(_("called:"), report.called)
    add(_("expected:"), report.expected)
    add(_("what happened instead:"), report.happened)
    if report.path:
        lines.append("  " + _("your code, in the order of execution (blank: never ran):"))
        lines.extend(f"    {line}".rstrip() for line in report.path.splitlines())
    if report.printed:
        lines.append("  " + _("your code printed:"))
        lines.extend(f"    {line}".rstrip() for line in report.printed.splitlines())
    if report.imported:
        add(_("hint:"), task.hint)
        if strong:
            add(_("stronger hint:"), task.strong_hint)
        add(_("look again at:"), re.sub("^python ", ".venv/bin/python ", task.lesson))
    return "\n".join(lines)


def stage() -> ModuleType:
    """Return chapter 01, whose stage wraps English and Chinese."""
    return judging.chapter(1)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Print what is solved, what is not, and one line of progress."""
    found: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if "exercise" in properties:
                found[properties["exercise"]] = properties
    if not found:
        return
    write = terminalreporter.write_line
    unsolved = [name for name in sorted(found) if "report" in found[name]]
    several = len({properties["file"] for properties in found.values()}) > 1
    write("")
    for name in sorted(found):
        if name not in unsolved:
            solution = found[name]["file"].replace("exercises/", "exercises/solutions/")
            write(f"✓ {name}", green=True)
            write("  " + _("compare: {file}").format(file=solution))
        elif several and name != unsolved[0]:
            write(f"✗ {name}")
        else:
            write(f"✗ {name}", red=True)
            write(found[name]["report"])
            if name != max(found):
                write("")
    write("")
    if exitstatus == pytest.ExitCode.INTERRUPTED:  # the others were not judged
        return
    progress = _("{n} of {all} solved").format(n=len(found) - len(unsolved), all=len(found))
    if unsolved:
        place = found[unsolved[0]]["file"]
        progress += _("; next: {task}, in {file}").format(
            task=unsolved[0].split(" ·")[0], file=place
        )
    write(progress, bold=True)
