"""The rule that holds all other tests is itself held here: each kind of leak is reported.

One run of pytest shows it, on a file of its own beside a copy of left_behind.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest import mock

import conftest
import pytest
from conftest import ROOT, load_chapter

pytest_plugins = ["pytester"]

HEADING = """
import asyncio, contextlib, contextvars, decimal, os, subprocess, sys, threading
import left_behind, pytest, pytest_asyncio

left_behind.PATIENCE = 0.1
variable = contextvars.ContextVar("variable", default=None)
"""

# Each test is followed by the line that must report it. What it keeps is undone at the end.
LEAKS = r"""
os.environ["WORKSHOP_REMOVED"] = "there before"
kept = contextlib.ExitStack()
teardown_module = kept.close

def test_file():  # open descriptor \d+: '/dev/null'
    kept.enter_context(open(os.devnull))

def test_child():  # child process \d+: '.*python.* -c input\(\)'
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept.callback(child.communicate, b"end")

def test_zombie():  # child process \d+: 'zombie'
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    kept.callback(child.wait)

def test_thread():  # thread <Thread\(forgotten, .*
    stop = threading.Event()
    threading.Thread(target=stop.wait, name="forgotten").start()
    kept.callback(stop.set)

def test_task():  # pending task .*name='of asyncio.run'
    async def main():
        main.task = asyncio.create_task(asyncio.Event().wait(), name="of asyncio.run")
    asyncio.run(main())

@pytest.mark.asyncio
async def test_task_in_async_test():  # pending task .*name='of an async test'
    kept.task = asyncio.create_task(asyncio.Event().wait(), name="of an async test")

def test_added():  # environment WORKSHOP_ADDED: 'left'
    os.environ["WORKSHOP_ADDED"] = "left"

def test_changed():  # environment WORKSHOP_ADDED: 'left' became 'changed'
    os.environ["WORKSHOP_ADDED"] = "changed"

def test_removed():  # environment WORKSHOP_REMOVED is gone
    del os.environ["WORKSHOP_REMOVED"]

def test_directory(tmp_path):  # working directory is: '.*' became '.*test_directory0'
    os.chdir(tmp_path)

def test_removed_directory(tmp_path):  # working directory is: .* no longer exists'
    tmp_path.joinpath("gone").mkdir()
    os.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")

def test_back():  # working directory is: .* no longer exists' became '/'
    os.chdir("/")

def test_variable():  # context variable .*: 'left'
    variable.set("left")

@pytest.mark.asyncio
async def test_variable_in_async_test():  # context variable .*: 'left' became 'inside'
    variable.set("inside")
"""


CLEAN = """
def test_what_ends_a_moment_later():
    threading.Timer(0.02, lambda: None).start()
    decimal.Decimal(1) / 3

def test_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKSHOP", "for this test")
    monkeypatch.chdir(tmp_path)
    variable.reset(variable.set("for this test"))

def test_lesson_about_a_task_that_nobody_awaits(tasks_may_be_abandoned):
    async def main():
        main.task = asyncio.create_task(asyncio.Event().wait())
    asyncio.run(main())

@pytest_asyncio.fixture
async def background():
    async with asyncio.TaskGroup() as group:
        task = group.create_task(asyncio.Event().wait())
        yield
        task.cancel()

@pytest.mark.asyncio
async def test_async(background, monkeypatch):
    monkeypatch.setenv("WORKSHOP", "for this test")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    await asyncio.to_thread(print)
    variable.reset(variable.set("for this test"))
"""

FAILING = """
def test_that_fails_and_leaks():  # environment WORKSHOP: 'left'
    os.environ["WORKSHOP"] = "left"
    raise LookupError
"""


def test_each_leak_is_reported_with_its_kind_and_what_to_do_and_nothing_else(
    pytester: pytest.Pytester,
) -> None:
    rule = (ROOT / "tests" / "left_behind.py").read_text(encoding="utf-8")
    pytester.makepyfile(left_behind=rule)
    pytester.makeconftest("from left_behind import nothing_left_behind, tasks_may_be_abandoned")
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(HEADING + CLEAN + LEAKS + FAILING)
    options = ("-W", "error", "-p", "no:randomly", "-p", "no:cacheprovider")
    outcome = pytester.runpytest_subprocess(*options)
    reports = re.findall("(?m)  # (.*)$", LEAKS + FAILING)
    clean = CLEAN.count("def test_")
    outcome.assert_outcomes(passed=clean + len(reports) - 1, failed=1, errors=len(reports))
    outcome.stdout.re_match_lines([f"- {report}.*; .+" for report in reports])


def test_a_chapter_is_loaded_once_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.py"
    file.write_text("class Thing: ...\n")
    monkeypatch.setenv("WORKSHOP_CHAPTER_77", str(file))
    chapter = load_chapter(77)
    assert chapter is load_chapter(77)
    assert chapter.Thing.__module__ == "chapter_77"
    del sys.modules["chapter_77"]


def test_a_chapter_that_is_not_there_or_is_prose_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    (tmp_path / "97_prose.md").touch()
    with pytest.raises(LookupError, match=r"chapter 97 is prose, 97_prose\.md: it has no module"):
        load_chapter(97)
    with pytest.raises(LookupError, match=r"chapter 98 is not there: no 98_\*\.py in "):
        load_chapter(98)


def test_one_line_sums_up_what_the_contract_tried_in_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = {"ways": 2, "points": 600, "cancellations": 10}
    monkeypatch.setattr(conftest, "judged", [(["a"], tried), (["a", "b"], tried), ([], {})])
    reporter = mock.Mock(stats={})
    conftest.pytest_terminal_summary(reporter, 0)
    conftest.pytest_terminal_summary(reporter, 1)
    begin = "cleanup contract: 2 managers, 4 ways out of a block, 1,200 injection points"
    assert [call.args[0] for call in reporter.write_line.call_args_list] == [
        f"{begin} (20 of them cancellations at an await); left behind: {left}"
        for left in ("nothing", "see the failures")
    ]
