"""Fail every test that leaves something behind. One file, to be copied beside your own tests:

    from left_behind import nothing_left_behind, tasks_may_be_abandoned  # in conftest.py

The fixture holds *every* test to it: open descriptors, child processes, threads, asyncio tasks,
environment, working directory and context variables are afterwards as they were before (see
`KINDS`). It needs pytest, and nothing of this workshop. Where a platform has no list of a kind,
that kind is not compared.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import functools
import gc
import inspect
import operator
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 1.0  # seconds that a reaper thread or a closing transport has to finish its work


@dataclass(frozen=True)
class Kind:
    """One kind of thing that a test may leave behind."""

    name: str
    look: Callable[[], Mapping[Any, Any]]  # what is there now, by identity
    advice: str
    same: Callable[[Any, Any], Any] = operator.eq
    restored: bool = False  # must what was there before be there again, too?
    reaped: bool = False  # does it end a moment after it was told to end?

    def left(self, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> list[str]:
        """A sentence for each thing that differs."""
        found = [f"{key} is gone" for key in before if self.restored and key not in after]
        for key, value in after.items():
            if key not in before:
                found.append(f"{key}: {value!r}")
            elif not self.same(before[key], value):
                found.append(f"{key}: {before[key]!r} became {value!r}")
        return [f"{self.name} {what}; {self.advice}" for what in found]


def open_descriptors() -> dict[int, str]:
    """What each open descriptor points to; nothing where the system has no list of them."""
    found = {}
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        try:
            found[int(name)] = os.readlink(f"/dev/fd/{name}")
        except FileNotFoundError:
            pass  # the listing's own descriptor: closed by now
        except OSError:  # not a link: macOS
            found[int(name)] = f"inode {os.fstat(int(name)).st_ino}"
    return found


def child_processes() -> dict[int, str]:
    """The command line of each child; nothing where there is no /proc.

    A child that has ended but was never waited for (a zombie) is still a child.
    """
    children = {}
    for thread in Path("/proc/self/task").glob("*/children"):
        try:
            for pid in thread.read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                children[int(pid)] = command.decode(errors="replace").strip() or "zombie"
        except (FileNotFoundError, ProcessLookupError):
            pass  # ended between the listing and the look
    return children


def environment() -> dict[str, str]:
    """os.environ, without the one variable in which pytest itself writes its progress."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def running_threads() -> dict[threading.Thread, str]:
    return {thread: thread.name for thread in threading.enumerate()}


RESET = "reset it with the token that set() returned"
CONTEXT = Kind("context variable", contextvars.copy_context, RESET, operator.is_, restored=True)
KINDS = (
    Kind("open descriptor", open_descriptors, "close it, best in a `with`", reaped=True),
    Kind("child process", child_processes, "end it and wait() for it", reaped=True),
    Kind("thread", running_threads, "tell it to stop and join() it", reaped=True),
    Kind("environment", environment, "use monkeypatch.setenv or delenv", restored=True),
    Kind("working directory", lambda: {"is": os.getcwd()}, "use monkeypatch.chdir"),
    CONTEXT,
)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves behind what was not there before it."""
    # subtle: decimal keeps its context in a context variable, which its first use sets.
    decimal.getcontext()
    found: list[str] = []
    test = getattr(request.node, "obj", None)
    if inspect.iscoroutinefunction(test):
        request.node.obj = reporting_context_variables(test, found)
    before = [kind.look() for kind in KINDS]
    # subtle: not the monkeypatch fixture, which the test shares: that one is undone after this
    # fixture has looked, and would make every test's own setenv and chdir look like a leak.
    with pytest.MonkeyPatch.context() as patch:
        if "tasks_may_be_abandoned" not in request.fixturenames:
            patch.setattr(asyncio.Runner, "close", reporting_pending_tasks(found))
        yield
    for kind, earlier in zip(KINDS, before, strict=True):
        found += still_there(kind, earlier)
    if found:
        pytest.fail("The test left behind\n- " + "\n- ".join(found), pytrace=False)


@pytest.fixture
def tasks_may_be_abandoned() -> None:
    """For a test that plays a demo whose very point is a task that nobody awaits."""


def still_there(kind: Kind, before: Mapping[Any, Any]) -> list[str]:
    """What is left of one kind, once those that end a moment later had the time to."""
    deadline = time.monotonic() + PATIENCE
    while (left := kind.left(before, kind.look())) and kind.reaped and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    return left


def reporting_pending_tasks(found: list[str]) -> Callable[[asyncio.Runner], None]:
    """`Runner.close`, which cancels pending tasks in silence, made to report them first.

    asyncio.run and pytest-asyncio both end their loop by it.
    """
    close = asyncio.Runner.close

    def close_and_report(runner: asyncio.Runner) -> None:
        with suppress(RuntimeError):  # closed before
            pending = asyncio.all_tasks(runner.get_loop())
            found.extend(f"pending task {task!r}; cancel it and await it" for task in pending)
        close(runner)

    return close_and_report


def reporting_context_variables(
    test: Callable[..., Awaitable[None]], found: list[str]
) -> Callable[..., Awaitable[None]]:
    """An async test runs in a context of its own; this looks at it from inside."""

    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        before = CONTEXT.look()
        try:
            await test(*args, **kwargs)
        finally:
            found.extend(CONTEXT.left(before, CONTEXT.look()))

    return watched
