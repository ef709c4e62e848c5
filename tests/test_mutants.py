"""tools/mutants.py damages each piece as it says, and reports the mutants that survive."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest
from conftest import ROOT
from mutants import Chapter, Mutant, Suite, drawn, equivalents, jobs_of, key_of


def damaged(statements: str, find: Callable[[Chapter], list[Mutant]]) -> list[str]:
    """Return what the mutants of a function's body have in the place of its lines, sorted."""
    source = f"async def function(self):\n{indent(statements, '    ')}\n# --- Demos\nprint()\n"
    found = []
    for mutant in find(Chapter(source)):
        compared = difflib.ndiff(source.splitlines(), mutant.source.splitlines())
        new = [line[2:] for line in compared if line.startswith("+ ")]
        found.append(dedent("\n".join(new)).strip())
    return sorted(found)


@pytest.mark.parametrize(
    ("statement", "mutants"),
    [
        (
            "try: ...\nfinally:\n    # always\n    self.x()\n    self.y()",
            ["except BaseException:\n    raise\nelse:", "pass"],
        ),
        ("try: ...\nexcept OSError: ...\nfinally:\n    self.x()", ["else:", "pass"]),
        (
            "try: ...\nexcept OSError: ...\nelse:\n    self.y()\nfinally:\n    self.x()",
            ["pass", "pass"],
        ),
        (
            "try: ...\nexcept BaseException:\n    self.x()\n    raise",
            ["except Exception:", "pass"],
        ),
        ("try: ...\nexcept OSError:\n    raise", []),
        ("token.reset()", ["pass"]),
        ("await stack.push_async_exit(self)", ["pass"]),
        (
            "def __exit__(self):\n    'Close.'\n    if self:\n        return (\n  0)\n    self.x()",
            ["pass", "return True\n\nreturn True"],
        ),
    ],
)
def test_each_piece_of_cleanup_is_removed_in_each_manner(
    statement: str, mutants: list[str]
) -> None:
    assert damaged(statement, Chapter.mutants) == mutants


@pytest.mark.parametrize(
    ("statement", "mutants"),
    [
        ("if self.open: ...", ["if not (self.open): ..."]),
        ("while not self.open: ...", ["while self.open: ..."]),
        ("if self.x is None: ...", ["if not (self.x is None): ..."]),
        ("if self.x < 3: ...", ["if not (self.x < 3): ...", "if self.x <= 3: ..."]),
        ("yield 1 <= self.x > 2", ["yield 1 < self.x > 2", "yield 1 <= self.x >= 2"]),
        ("yield self.é not in {'é'}", ["yield self.é in {'é'}"]),
        ("yield [x for x in self if x]", ["yield [x for x in self if not (x)]"]),
        ("self.x += (\n    1\n)", ["pass"]),
        ("x = 1\nx = 2", ["pass"]),
        ("return self", ["pass"]),
        ("raise ValueError", ["pass"]),
        ("x = await self.ask()", ["x = self.ask()"]),
        ("await finish(ask())", ["await ask()", "finish(ask())", "pass"]),
        ("with CancelScope(shield=True): ...", ["with CancelScope(shield=False): ..."]),
        (
            "with self._lock, closing(self): ...",
            ['with __import__("contextlib").nullcontext(), closing(self): ...'],
        ),
        ("try: ...\nexcept (OSError, BaseException): ...", ["except (OSError, Exception): ..."]),
        # The last is now above `self.x()`.
        ("try: ...\nfinally:\n    self.x()\n    self.y()", ["pass", "pass", "self.y()"]),
    ],
)
def test_a_statement_is_damaged_in_each_general_manner(statement: str, mutants: list[str]) -> None:
    assert damaged(statement, Chapter.general_mutants) == mutants


@pytest.mark.parametrize(
    "statement",
    [
        '"""Not code."""',
        "x = 1",
        "x: type[BaseException] | None = None",
        "assert self is not None",
        "import os",
        "logger.info('closed', not self)",
        "yield",
        "if sys.platform == 'win32':\n    self.close()",
        "if TYPE_CHECKING:\n    self.close()",
        "with self.clock(): ...",
    ],
)
def test_what_is_no_defect_is_not_generated(statement: str) -> None:
    assert damaged(statement, Chapter.general_mutants) == []


def test_the_stage_is_damaged_in_the_first_chapter_only(tmp_path: Path) -> None:
    source = "# --- Demos\ndef demo():\n    print()\n# --- The stage\ndef say():\n    print()\n"
    for name, expected in (("01_a.py", [("say", "test_stage.py")]), ("02_b.py", [])):
        (tmp_path / name).write_text(source)
        jobs = jobs_of(tmp_path / name)
        assert [(mutant.function, suite.tests.name) for suite, mutant in jobs] == expected


def test_a_sample_does_not_depend_on_line_numbers() -> None:
    source = "".join(f"def f{number}(x):\n    x.close()\n" for number in range(40))
    suite = Suite(Path("01_a.py"), Path("test_01_a.py"))
    samples = []
    for text, size in ((source, 10), ("# A comment.\n" + source, 10), (source, 5)):
        jobs = [(suite, mutant) for mutant in Chapter(text).general_mutants()]
        samples.append({mutant.function for _suite, mutant in drawn(jobs, size, seed=1)})
    assert samples[0] == samples[1]
    assert samples[0] > samples[2]
    assert len(samples[2]) == 5


def test_the_latest_killers_run_first_then_the_fastest() -> None:
    suite = Suite(Path("01_a.py"), Path("test_01_a.py"))
    suite.seconds.update(slow=3.0, fast=0.1, middling=1.0, killer=2.0)
    suite.killers["close"].extendleft(["middling", "killer", "killer"])
    assert suite.order("close") == ["killer", "middling", "fast", "slow"]
    assert suite.order("open") == ["fast", "middling", "killer", "slow"]


# --- The command ---

CHAPTER = """\
from contextlib import contextmanager

@contextmanager
def tested(log):
    try:
        yield
    finally:
        log.append("closed")

@contextmanager
def tested_on_success_only(log):
    try:
        yield
    finally:
        log.append("closed")

def is_long(log):
    return len(log) > 9
"""
TESTS = """\
import importlib.util, os

spec = importlib.util.spec_from_file_location("e", os.environ["WORKSHOP_CHAPTER_01"])
chapter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chapter)

def test_success():
    for manager in (chapter.tested, chapter.tested_on_success_only):
        log = []
        with manager(log):
            pass
        assert log

def test_failure():
    log = []
    try:
        with chapter.tested(log):
            raise ValueError
    except ValueError:
        pass
    assert log

def test_is_long():
    assert not chapter.is_long([])
"""


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    """A chapter with tests of its own."""
    for folder in ("tests", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_01_example.py").write_text(TESTS)
    path = tmp_path / "01_example.py"
    path.write_text(CHAPTER)
    return path


def play(chapter: Path, *options: str, patience: float = 60) -> tuple[int, list[str], str]:
    """Run the command; return its status and what it printed."""
    code = f"import sys, mutants; mutants.PATIENCE = {patience}; sys.exit(mutants.main())"
    outcome = subprocess.run(
        [sys.executable, "-c", code, *options, str(chapter)],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return outcome.returncode, outcome.stdout.splitlines(), outcome.stderr


def test_the_command_fails_for_the_mutant_that_no_test_notices(chapter: Path) -> None:
    printed = [
        "killed   01_example.py:7 finally runs on success only",
        "killed   01_example.py:8 finally does nothing",
        "SURVIVED 01_example.py:14 finally runs on success only",
        "killed   01_example.py:15 finally does nothing",
        "01_example.py: 3 of 4 mutants killed",
    ]
    assert play(chapter) == (1, printed, "")


def test_general_mutants_are_killed_or_survive_or_are_equivalent(chapter: Path) -> None:
    listed = chapter.parent / "tools" / "equivalent_mutants.txt"
    line = "return len(log) > 9"
    listed.write_text(f"# why\n01 | is_long | `len(log) > 9` with `>=` | {line} | 9 or 10\n")
    status, printed, errors = play(chapter, "--general", "9")
    assert (status, errors) == (1, "")
    assert printed[:-1] == [
        "killed   01_example.py:8 tested: statement deleted",
        "killed   01_example.py:15 tested_on_success_only: statement deleted",
        "SURVIVED 01_example.py:18 is_long: statement deleted",
        f"         {line}",
        "equivalent 01_example.py:18 is_long: `len(log) > 9` with `>=`",
        f"         {line}",
        "         9 or 10",
    ]
    totals = "2 of 3 mutants killed (66.7 %), 1 survived, 0 hung, 1 equivalent; "
    assert printed[-1].startswith(f"01_example.py: {totals}")


def test_an_equivalent_mutant_that_is_gone_is_an_error(chapter: Path) -> None:
    listed = chapter.parent / "tools" / "equivalent_mutants.txt"
    listed.write_text("01 | is_long | raise dropped | raise | there was one\n")
    status, printed, errors = play(chapter, "--general", "9")
    assert (status, printed) == (2, [])
    assert "no such mutant" in errors


def test_a_mutant_that_hangs_is_not_killed(chapter: Path) -> None:
    endless = "    while not log:\n        log += [1]\n"
    chapter.write_text(CHAPTER.replace("    return", f"{endless}    return"))
    status, printed, _errors = play(chapter, "--at", "19", patience=1)
    assert status == 1
    assert printed[0] == "HUNG     01_example.py:19 is_long: statement deleted"


def test_tests_that_fail_without_damage_are_named(chapter: Path) -> None:
    chapter.write_text(CHAPTER.replace("> 9", "> None"))
    status, printed, errors = play(chapter)
    assert (status, printed) == (2, [])
    assert "test_is_long" in errors


def test_each_mutant_that_is_listed_as_equivalent_exists() -> None:
    for chapter in sorted(ROOT.glob("0*.py")):
        assert equivalents(chapter).keys() <= {key_of(*job) for job in jobs_of(chapter)}
