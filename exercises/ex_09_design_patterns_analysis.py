"""Exercises for chapter 09 · Design patterns

    .venv/bin/python -m pytest exercises/ex_09_design_patterns_analysis.py
    .venv/bin/python -m pytest exercises/ex_09_design_patterns_analysis.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# --- 1 · bug ---

Listener = Callable[[str], None]


@contextmanager
def deployment(lock: threading.Lock, listeners: list[Listener]) -> Iterator[None]:
    """The chat that stopped all deployments

    A deployment holds a lock, and tells its listeners "started" and "ended". On Saturday the chat
    server was down. The listener that posts to the chat raised an error, the log was not told,
    and the lock was never released: nobody could deploy until somebody restarted everything.

    Fix the Observer. A listener that raises an Exception changes nothing: the block runs, the
    other listeners are told, the lock is released, and the block's own exception comes out. The
    listener's exception is logged with its traceback, by `logging.exception`. Ctrl-C is not the
    listener's: KeyboardInterrupt propagates at once, and the lock is released then, too.

    Each listener is told once of each event, even if it removes itself from the list meanwhile.
    """
    for listener in listeners:
        listener("started")
    lock.acquire()
    try:
        yield
    finally:
        for listener in listeners:
            listener("ended")
        lock.release()


# --- 2 · task ---


class Managed:
    """A frame for managers

    Many managers do the same: acquire something, check it, and at the end commit or roll back,
    and release it. Write this frame once (it is a Template Method), so that a class says only
    what it does at each step:

        class Connected(Managed):
            def acquire(self): return connect()
            def check(self, connection): connection.ping()
            def commit(self, connection): connection.commit()
            def roll_back(self, connection): connection.rollback()
            def release(self, connection): connection.close()

        with Connected() as connection:
            ...

    Before the block: `acquire`, then `check`. After a block that ends well: `commit`, then
    `release`. After a block that raises, whatever it raises: `roll_back`, then `release`.

    What was acquired is always released, once, as the last step. If `check` raises, only `release`
    follows. If `commit` raises, `roll_back` and `release` follow. If `roll_back` raises, `release`
    follows. If `acquire` raises, there is nothing to release. Every exception comes out, that of
    the block or that of a step. None is a resource like any other. One object works for one block
    after another.
    """

    def acquire(self) -> Any:
        """Return the resource."""

    def check(self, resource: Any) -> None:
        """Raise an exception if the resource does not work."""

    def commit(self, resource: Any) -> None:
        """Keep what the block did."""

    def roll_back(self, resource: Any) -> None:
        """Drop what the block did."""

    def release(self, resource: Any) -> None:
        """Give the resource back."""

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        raise NotImplementedError


# --- 3 · capstone ---


class BusyError(RuntimeError):
    """Another process exports to the same file."""


class Exporter:
    """Find the pattern

    Every night this class writes a price list, `prices.csv`. Readers must find a whole list at any
    time, so it writes `prices.draft` first. Two exports must not run at once, so it makes a lock
    file, `prices.lock`. Seven attributes keep account of all that, and they are not enough: one
    morning the lock file was still there, because somebody had pressed Ctrl-C. Another morning it
    was gone while an export ran, because a second one had tried to start.

    Find the pattern: it is the same one twice, acquire, use, release. Write it as two managers,
    `exclusive` and `replacement` below. Let `export` use both, and remove the methods that it no
    longer needs. What `export` promises stays: it writes the rows and returns their number. If the
    lock file is there, it raises BusyError, and touches neither this file nor the draft nor the
    list. However it ends, its own lock file and draft are gone, and the list is either the old
    one or the new one.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.lock = target.with_suffix(".lock")
        self.draft_path = target.with_suffix(".draft")
        self.draft: TextIO | None = None
        self.locked = False
        self.complete = False
        self.number = 0

    def open(self) -> None:
        self.locked = True
        try:
            descriptor = os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.close(descriptor)
        except FileExistsError:
            raise BusyError(f"{self.lock} is there") from None
        self.draft = open(self.draft_path, "w", encoding="utf-8")
        self.complete = False
        self.number = 0

    def write(self, name: str, price: str) -> None:
        assert self.draft is not None
        self.draft.write(f"{name},{price}\n")
        self.number += 1

    def close(self) -> None:
        if self.draft is not None:
            self.draft.close()
            self.draft = None
        if self.complete:
            os.replace(self.draft_path, self.target)
        elif self.draft_path.exists():
            self.draft_path.unlink()
        if self.locked:
            self.lock.unlink()
            self.locked = False

    def export(self, rows: Iterable[tuple[str, str]]) -> int:
        try:
            self.open()
            for name, price in rows:
                self.write(name, price)
            self.complete = True
        except Exception:
            self.close()
            raise
        self.close()
        return self.number


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file for a block. Raises BusyError if it is there, and leaves it there."""
    raise NotImplementedError
    yield


@contextmanager
def replacement(target: Path) -> Iterator[TextIO]:
    """Open a draft; it replaces the target if the block ends well, and is deleted if not."""
    raise NotImplementedError
    yield
