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
from functools import cache, partial
from pathlib import Path
from typing import Any

import contract
import pytest
from conftest import ROOT
from contract import Subject, make_subject, what_is_open

SERVED = "async_cancelled_just_as_it_is_served"
GROUPED = {  # what came out is in an ExceptionGroup
    "async_raises_exception",
    "async_raises_base_exception",
    "async_raises_generator_exit",
    "async_raises_stop_iteration",
    "async_nested",
}
Make = Callable[[Path], Subject]
package = pytest.importorskip


def peer(make: Callable[[], Any], leaks: Callable[[], object], **more: bool) -> Subject:
    """Describe a peer whose own tests know how to make it fail."""
    why = "its own tests make it fail"
    return Subject(make, leaks, setup_faults=why, cleanup_faults=why, **more)  # type: ignore[arg-type]


def lock_of(make: Callable[[], Any], held: Callable[[Any], object]) -> Subject:
    """Describe one lock that every block shares; it is made inside the event loop."""
    made: list[Any] = []

    def open_it() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return peer(open_it, lambda: made and held(made[0]), nestable=False, concurrent=False)


def database(folder: Path) -> Subject:
    connection = sqlite3.connect(folder / "money.db")
    return peer(
        lambda: connection,  # `with connection:` is a transaction
        lambda: connection.in_transaction and "an open transaction",
        nestable=False,
        concurrent=False,
        visible=False,  # an empty transaction does not begin
    )


def http_client(_folder: Path) -> Subject:
    return make_subject(lambda: package("httpx2").AsyncClient(verify=certificates()))


@cache
def certificates() -> Any:
    """Load the certificates once: it takes a while."""
    return package("httpx2").create_ssl_context()


def temporary_directory(folder: Path) -> Subject:
    empty = tempfile.mkdtemp(dir=folder)
    return peer(lambda: tempfile.TemporaryDirectory(dir=empty), lambda: os.listdir(empty))


def async_database(folder: Path) -> Subject:
    path = Path(tempfile.mkdtemp(dir=folder), "a.db")
    return peer(lambda: package("aiosqlite").connect(path), lambda: still_open(path))


def waiting_by_wait_for(_folder: Path) -> Subject:
    taken: list[int] = []

    async def take() -> int:
        await asyncio.sleep(0)
        taken.append(1)
        return 1

    @asynccontextmanager
    async def lent() -> AsyncIterator[int]:
        try:
            yield await asyncio.wait_for(take(), timeout=60)
        finally:
            taken.clear()

    return peer(lent, lambda: taken, nestable=False, concurrent=False)


PEERS: dict[str, tuple[Make, set[str]]] = {
    "open": (lambda f: make_subject(lambda: open(f / "file", "w")), {"never_entered"}),
    "tempfile.TemporaryDirectory": (temporary_directory, {"never_entered"}),
    "threading.Lock": (lambda f: lock_of(threading.Lock, lambda lock: lock.locked()), set()),
    "asyncio.Lock": (lambda f: lock_of(asyncio.Lock, lambda lock: lock.locked()), set()),
    "asyncio.timeout": (lambda f: make_subject(lambda: asyncio.timeout(60)), set()),
    "asyncio.TaskGroup": (lambda f: make_subject(asyncio.TaskGroup), GROUPED),
    "anyio.CapacityLimiter": (
        lambda f: lock_of(lambda: package("anyio").CapacityLimiter(1), lambda x: x.borrowed_tokens),
        set(),
    ),
    "anyio.create_task_group": (
        lambda f: make_subject(lambda: package("anyio").create_task_group()),
        GROUPED | {"async_raises_keyboard_interrupt"},
    ),
    "httpx2.AsyncClient": (http_client, set()),
    "sqlite3.connect": (database, set()),
    "filelock.FileLock": (
        lambda f: lock_of(lambda: package("filelock").FileLock(f / "lock"), lambda x: x.is_locked),
        set(),
    ),
    "fsspec.open": (lambda f: make_subject(lambda: package("fsspec").open(f / "x", "w")), set()),
    "aiosqlite.connect": (async_database, {SERVED}),  # and others, by the timing of its thread
    "asyncio.wait_for": (waiting_by_wait_for, {SERVED} if sys.version_info < (3, 12) else set()),
}


def still_open(path: Path) -> list[str]:
    """Return this process's descriptors of a file; a thread may take a moment to close it."""
    deadline = time.monotonic() + 0.02
    while left := [each for each in what_is_open() if each.endswith(str(path))]:
        if time.monotonic() > deadline:
            return left
    return []


FINDINGS = {name for name, (_make, expected) in PEERS.items() if expected} | {"asyncio.wait_for"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what a peer leaves behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", PEERS)
def test_the_contract_judges_a_well_known_manager(name: str, tmp_path: Path) -> None:
    make, expected = PEERS[name]
    subject = partial(make, tmp_path)
    judged = contract.verdicts(subject, contract.ways_for(subject()))
    found = {way.__name__: each.what for way, each in judged if isinstance(each, contract.Broken)}
    if name == "aiosqlite.connect":
        assert found.keys() >= expected, found
    else:
        assert found.keys() == expected, found


@pytest.mark.parametrize("name", PEERS)
def test_the_readme_tells_what_the_contract_finds(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
    assert ("passes" in row) == (name not in FINDINGS)
