"""The exercises: the shipped file fails, the solution passes, each wrong answer is told its cause.

A wrong answer is what a learner may well write. They stand in `wrong_answers/`, one file a
chapter; each has the words that its report must say.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import contract
import judging
import pytest
from conftest import ROOT
from fork_judge import Forks, start_forks

FILES = sorted((ROOT / "exercises").glob("ex_*.py"))
WRONG = Path(__file__).parent / "wrong_answers"
TASKS = {task.id: task for file in FILES for task in judging.tasks_of(file.stem)}


class WrongAnswer(NamedTuple):
    """An answer that a learner may well write."""

    task: str
    title: str
    called: str  # in the report: what was called
    says: str  # in the report: what happened instead
    code: str


def wrong_answers() -> Iterator[WrongAnswer]:
    """Yield those of every chapter."""
    cell = re.compile(r"# %% (\d) (.+)\n# called: (.+)\n# says: (.+)\n((?:(?!# %%).*\n)+)")
    for file in sorted(WRONG.glob("*.py")):
        for number, title, called, says, code in cell.findall(file.read_text() + "\n"):
            yield WrongAnswer(f"{file.name[:2]}.{number}", title, called, says, code)


WRONG_ANSWERS = list(wrong_answers())


def shipped(task: judging.Task) -> Path:
    """Return the file in which the learner solves a task."""
    (file,) = (ROOT / "exercises").glob(f"ex_{task.id[:2]}_*.py")
    return file


def solution(task: judging.Task) -> Path:
    """Return the file of its solution."""
    return ROOT / "exercises" / "solutions" / shipped(task).name


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with start_forks() as forks:
        yield forks


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_as_shipped_it_fails_and_says_why(task: judging.Task, forks: Forks, tmp_path: Path) -> None:
    answer = Path(shutil.copy(shipped(task), tmp_path / "answer.py"))
    report = forks.judge(task, answer)
    assert not report.solved
    assert report.called
    assert report.expected
    assert report.happened
    assert " raise" in report.path or "1" in report.path


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_its_solution_passes(task: judging.Task, forks: Forks, tmp_path: Path) -> None:
    answer = Path(shutil.copy(solution(task), tmp_path / "answer.py"))
    report = forks.judge(task, answer)
    assert report.solved, report
    contract.managers.update(report.managers)
    contract.counts.update(report.counts)


@pytest.mark.parametrize("task", ["01.1", "06.2", "08.1"])
def test_a_new_process_judges_like_a_fork(task: str, forks: Forks, tmp_path: Path) -> None:
    answer = Path(shutil.copy(shipped(TASKS[task]), tmp_path / "answer.py"))
    assert judging.judge(TASKS[task], answer) == forks.judge(TASKS[task], answer)


@pytest.mark.parametrize("wrong", WRONG_ANSWERS, ids=lambda wrong: f"{wrong.task} {wrong.title}")
def test_a_wrong_answer_is_told_its_cause(wrong: WrongAnswer, forks: Forks, tmp_path: Path) -> None:
    task = TASKS[wrong.task]
    answer = tmp_path / "answer.py"
    answer.write_text(solution(task).read_text() + "\n\n" + wrong.code)
    report = forks.judge(task, answer)
    assert not report.solved
    assert wrong.called in report.called
    assert wrong.says in report.happened


def test_pytest_leaves_the_import_to_the_judge() -> None:
    # pytest imports a Python file that the command line names; an answer may hang or exit then.
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", str(FILES[0])]
    tree = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "<Exercise 01.3>" in tree
    assert "<Module" not in tree


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import sys; sys.exit()", "SystemExit, raised in line "),
        ("with open(", "SyntaxError: '(' was never closed"),
        ("import no_such_module", "No module named 'no_such_module', raised in line "),
    ],
)
def test_a_file_that_cannot_be_imported_gets_no_hint(line: str, says: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.py"
    answer.write_text(f"{FILES[0].read_text()}\n{line}")
    report = judging.judge(TASKS["01.1"], answer)
    assert report.called == "import answer.py"
    assert says in report.happened
    assert not report.imported
    assert not report.path


def test_every_task_has_two_wrong_answers_or_more() -> None:
    counts = {name: sum(wrong.task == name for wrong in WRONG_ANSWERS) for name in TASKS}
    assert len(TASKS) == 27
    assert min(counts.values()) >= 2, counts


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_its_hints_say_something(task: judging.Task) -> None:
    assert len(task.hint) > 20
    assert len(task.strong_hint) > len(task.hint) // 2
    assert task.hint != task.strong_hint
    assert re.search(r"\b0\d_\w+\.(py|md)", task.lesson)
    for name in re.findall(r"\b0\d_\w+\.(?:py|md)", task.lesson):
        assert (ROOT / name).exists()
        demos = re.findall(r"(?m)^(?:async )?def demo_", (ROOT / name).read_text(encoding="utf-8"))
        assert all(int(n) <= len(demos) for n in re.findall(r"(?<= )\d+\b", task.lesson))
