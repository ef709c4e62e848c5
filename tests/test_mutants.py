"""tools/mutants.py damages each piece as it says, and reports the mutants that survive."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

from conftest import ROOT
from mutants import Chapter, equivalents, jobs_of, key_of


def damaged(statements: str, find: Any) -> list[str]:
    """Return what the mutants of a function's body have in the place of its lines, sorted."""
    source = f"async def function(self):\n{indent(statements, '    ')}\n# --- Demos\nprint()\n"
    found = []
    for mutant in find(Chapter(source)):
        compared = difflib.ndiff(source.splitlines(), mutant.source.splitlines())
        new = [line[2:] for line in compared if line.startswith("+ ")]
        found.append(dedent("\n".join(new)).strip())
    return sorted(found)


CLEANUP = {
    "try: ...\nexcept OSError: ...\nfinally:\n    self.x()": ["else:", "pass"],
    "try: ...\nexcept BaseException:\n    self.x()\n    raise": ["except Exception:", "pass"],
    "token.reset()": ["pass"],
    "await stack.push_async_exit(self)": ["pass"],
    "def __exit__(self):\n    'Close.'\n    return False": ["pass", "return True\nreturn True"],
}
GENERAL = {
    "if self.open: ...": ["if not (self.open): ..."],
    "if self.x < 3: ...": ["if not (self.x < 3): ...", "if self.x <= 3: ..."],
    "yield self.é not in {'é'}": ["yield self.é in {'é'}"],
    "self.x += 1": ["pass"],
    "raise ValueError": ["pass"],
    "x = await self.ask()": ["x = self.ask()"],
    "await finish(ask())": ["await ask()", "finish(ask())", "pass"],
    "with CancelScope(shield=True): ...": ["with CancelScope(shield=False): ..."],
    "with self._lock: ...": ['with __import__("contextlib").nullcontext(): ...'],
    "try: ...\nexcept BaseException: ...": ["except Exception: ..."],
    # The last is now above `self.x()`.
    "try: ...\nfinally:\n    self.x()\n    self.y()": ["pass", "pass", "self.y()"],
    "x = 1\nassert self is not None\nlogger.info('closed', not self)": [],  # no defects
    "if sys.platform == 'win32':\n    self.close()": [],
}


def test_each_piece_is_damaged_in_each_manner() -> None:
    assert {code: damaged(code, Chapter.mutants) for code in CLEANUP} == CLEANUP
    assert {code: damaged(code, Chapter.general_mutants) for code in GENERAL} == GENERAL


CHAPTER = """\
from contextlib import contextmanager

@contextmanager
def tested(log):
    try:
        yield
    finally:
        log.append("closed")

def is_long(log):
    return len(log) > 9
"""
TESTS = """\
import os, runpy

chapter = runpy.run_path(os.environ["WORKSHOP_CHAPTER_01"])

def test_success():
    with chapter["tested"](log := []):
        pass
    assert log

def test_is_long():
    assert not chapter["is_long"]([])
"""


def play(
    root: Path, chapter: str, *options: str, patience: int = 60, equivalent: str = ""
) -> tuple[int, list[str], str]:
    """Run the command for a chapter; return its status and what it printed."""
    for folder in ("tests", "tools"):
        (root / folder).mkdir()
    (root / "tests" / "test_01_example.py").write_text(TESTS)
    (root / "tools" / "equivalent_mutants.txt").write_text(equivalent)
    (root / "01_example.py").write_text(chapter)
    code = f"import sys, mutants; mutants.PATIENCE = {patience}; sys.exit(mutants.main())"
    ended = subprocess.run(
        [sys.executable, "-c", code, *options, root / "01_example.py"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


def test_the_command_fails_for_the_mutant_that_no_test_notices(tmp_path: Path) -> None:
    survived = "SURVIVED 01_example.py:7 finally runs on success only"
    killed = "killed   01_example.py:8 finally does nothing"
    total = "01_example.py: 1 of 2 mutants killed"
    assert play(tmp_path, CHAPTER) == (1, [survived, killed, total], "")


def test_general_mutants_are_killed_or_survive_or_are_equivalent(tmp_path: Path) -> None:
    equivalent = "01 | is_long | `len(log) > 9` with `>=` | return len(log) > 9 | 9 or 10\n"
    status, printed, errors = play(tmp_path, CHAPTER, "--general", "9", equivalent=equivalent)
    assert (status, errors) == (1, "")
    assert "SURVIVED 01_example.py:11 is_long: statement deleted" in printed
    assert "equivalent 01_example.py:11 is_long: `len(log) > 9` with `>=`" in printed
    assert " 1 of 2 mutants killed (50.0 %), 1 survived, 0 hung, 1 equivalent; " in printed[-1]


def test_a_mutant_that_hangs_is_not_killed(tmp_path: Path) -> None:
    endless = CHAPTER.replace("    return", "    while not log:\n        log += [1]\n    return")
    status, printed, _errors = play(tmp_path, endless, "--at", "12", patience=1)
    assert (status, printed[0]) == (1, "HUNG     01_example.py:12 is_long: statement deleted")


def test_tests_that_fail_without_damage_are_named(tmp_path: Path) -> None:
    status, printed, errors = play(tmp_path, CHAPTER.replace("> 9", "> None"))
    assert (status, printed) == (2, [])
    assert "test_is_long" in errors


def test_each_mutant_that_is_listed_as_equivalent_exists() -> None:
    for chapter in sorted(ROOT.glob("0*.py")):
        if listed := equivalents(chapter):
            assert listed.keys() <= {key_of(*job) for job in jobs_of(chapter)}
