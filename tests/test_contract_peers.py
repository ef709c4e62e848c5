"""What the contract finds in well-known managers: README.md publishes this table.

A finding is not always a defect: `open` opens a file when it is called, not when it is entered,
and says so. Packages that are not installed are skipped.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import contract
import pytest
from conftest import ROOT
from contract import Subject, make_subject, what_is_open

SERVED = "async_cancelled_just_as_it_is_served"
GROUPED = {"async_raises_exception", "async_raises_base_exception", "async_raises_generator_exit"}
GROUPED |= {"async_raises_stop_iteration", "async_nested"}  # what came out is in an ExceptionGroup
package = pytest.importorskip


def peer(make: Callable[[], Any], leaks: Callable[[], object], **more: bool) -> Subject:
    """Describe a peer whose own tests know how to make it fail."""
    why = "its own tests make it fail"
    return Subject(make, leaks, setup_faults=why, cleanup_faults=why, **more)  # type: ignore[arg-type]


def shared(make: Callable[[], Any], held: Callable[[Any], object], **more: bool) -> Subject:
    """Describe one manager for every block; it is made inside the event loop."""
    made: list[Any] = []

    def open_it() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return peer(open_it, lambda: made and held(made[0]), nestable=False, concurrent=False, **more)


def temporary_directory(folder: Path) -> Subject:
    empty = tempfile.mkdtemp(dir=folder)
    return peer(lambda: tempfile.TemporaryDirectory(dir=empty), lambda: os.listdir(empty))


def async_database(folder: Path) -> Subject:
    path = Path(tempfile.mkdtemp(dir=folder), "a.db")

    def still_open() -> list[str]:
        """Return the descriptors of the file; a thread may take a moment to close it."""
        deadline = time.monotonic() + 0.02
        while left := [each for each in what_is_open() if each.endswith(str(path))]:
            if time.monotonic() > deadline:
                break
        return left

    return peer(lambda: package("aiosqlite").connect(path), still_open)


def waiting_by_wait_for(_folder: Path) -> Subject:
    lock = asyncio.Lock()

    async def acquire() -> None:
        await asyncio.sleep(0)
        await lock.acquire()

    @asynccontextmanager
    async def locked() -> AsyncIterator[None]:
        await asyncio.wait_for(acquire(), timeout=60)
        try:
            yield
        finally:
            lock.release()

    return peer(locked, lock.locked, nestable=False, concurrent=False)


PEERS: dict[str, tuple[Callable[[Path], Subject], set[str]]] = {
    "open": (lambda f: make_subject(lambda: open(f / "file", "w")), {"never_entered"}),
    "tempfile.TemporaryDirectory": (temporary_directory, {"never_entered"}),
    "threading.Lock": (lambda f: shared(threading.Lock, lambda lock: lock.locked()), set()),
    "asyncio.Lock": (lambda f: shared(asyncio.Lock, lambda lock: lock.locked()), set()),
    "asyncio.timeout": (lambda f: make_subject(lambda: asyncio.timeout(60)), set()),
    "asyncio.TaskGroup": (lambda f: make_subject(asyncio.TaskGroup), GROUPED),
    "anyio.CapacityLimiter": (
        lambda f: shared(lambda: package("anyio").CapacityLimiter(1), lambda x: x.borrowed_tokens),
        set(),
    ),
    "anyio.create_task_group": (
        lambda f: make_subject(lambda: package("anyio").create_task_group()),
        GROUPED | {"async_raises_keyboard_interrupt"},
    ),
    "httpx2.AsyncClient": (
        lambda f: make_subject(lambda: package("httpx2").AsyncClient(verify=False)),
        set(),
    ),
    "sqlite3.connect": (  # `with connection:` is a transaction; an empty one does not begin
        lambda f: shared(
            lambda: sqlite3.connect(f / "x"), lambda x: x.in_transaction, visible=False
        ),
        set(),
    ),
    "filelock.FileLock": (
        lambda f: shared(lambda: package("filelock").FileLock(f / "lock"), lambda x: x.is_locked),
        set(),
    ),
    "fsspec.open": (lambda f: make_subject(lambda: package("fsspec").open(f / "x", "w")), set()),
    "aiosqlite.connect": (async_database, {SERVED}),  # and others, by the timing of its thread
    "asyncio.wait_for": (waiting_by_wait_for, {SERVED} if sys.version_info < (3, 12) else set()),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what a peer leaves behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", PEERS)
def test_the_contract_judges_a_well_known_manager(name: str, tmp_path: Path) -> None:
    make, expected = PEERS[name]
    before, found = threading.enumerate(), set()
    for way in contract.ways_for(make(tmp_path)):
        if isinstance(contract.verdict(way, make(tmp_path)), contract.Broken):
            found.add(way.__name__)
    if name == "aiosqlite.connect":
        found &= expected
        for thread in set(threading.enumerate()).difference(before):
            thread.join(
                10
            )  # it raises if its event loop is closed before: here, not in a later test
    assert found == expected
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
    assert ("passes" in row) == (not expected and name != "asyncio.wait_for")
