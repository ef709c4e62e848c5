"""The rule that holds all other tests is itself held here: each kind of leak is reported.

One run of pytest shows it, beside a copy of left_behind.py. That it reports nothing else, all other
tests show.
"""

from __future__ import annotations

import re
from unittest import mock

import conftest
import pytest
from conftest import ROOT

pytest_plugins = ["pytester"]

# Each test is followed by the line that must report it. What it keeps is undone at the end.
LEAKS = r"""
import asyncio, contextlib, contextvars, os, subprocess, sys, threading
import left_behind, pytest

left_behind.PATIENCE = 0.1
variable = contextvars.ContextVar("variable", default=None)
os.environ["WORKSHOP"] = "there before"
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

@pytest.mark.asyncio
async def test_task():  # pending task .*name='heartbeat'
    kept.task = asyncio.create_task(asyncio.Event().wait(), name="heartbeat")

def test_changed():  # environment WORKSHOP: 'there before' became 'changed'
    os.environ["WORKSHOP"] = "changed"

def test_that_fails_and_removes():  # environment WORKSHOP is gone
    del os.environ["WORKSHOP"]
    raise LookupError

def test_directory(tmp_path):  # working directory is: '.*' became '.*test_directory0'
    os.chdir(tmp_path)

def test_variable():  # context variable .*: 'left'
    variable.set("left")

@pytest.mark.asyncio
async def test_variable_in_async_test():  # context variable .*: 'left' became 'inside'
    variable.set("inside")
"""


def test_each_leak_is_reported_with_its_kind_and_what_to_do(pytester: pytest.Pytester) -> None:
    rule = (ROOT / "tests" / "left_behind.py").read_text(encoding="utf-8")
    pytester.makepyfile(left_behind=rule)
    pytester.makeconftest("from left_behind import nothing_left_behind, tasks_may_be_abandoned")
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(LEAKS)
    options = ("-W", "error", "-p", "no:randomly", "-p", "no:cacheprovider")
    outcome = pytester.runpytest_subprocess(*options)
    reports = re.findall("(?m)  # (.*)$", LEAKS)
    outcome.assert_outcomes(passed=len(reports) - 1, failed=1, errors=len(reports))
    outcome.stdout.re_match_lines([f"- {report}.*; .+" for report in reports])


def test_one_line_sums_up_what_the_contract_tried_in_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = {"ways": 2, "points": 600, "cancellations": 10}
    monkeypatch.setattr(conftest, "judged", [(["a"], tried), (["a", "b"], tried), ([], {})])
    reporter = mock.Mock(stats={})
    for status in (0, 1):
        conftest.pytest_terminal_summary(reporter, status)
    begin = "cleanup contract: 2 managers, 4 ways out of a block, 1,200 injection points"
    assert [call.args[0] for call in reporter.write_line.call_args_list] == [
        f"{begin} (20 of them cancellations at an await); left behind: {left}"
        for left in ("nothing", "see the failures")
    ]
