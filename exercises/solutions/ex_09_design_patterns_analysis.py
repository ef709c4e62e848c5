"""Solutions of the exercises of chapter 09, and why they are right."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Generic, TextIO, TypeVar

T = TypeVar("T")

# --- 1 · bug ---

Listener = Callable[[str], None]


@contextmanager
def deployment(lock: threading.Lock, listeners: list[Listener]) -> Iterator[None]:
    """Hold the lock for a block, and tell the listeners.

    The lock is the outermost block, so it is released whatever a listener does, Ctrl-C included.
    `notify` loops over a copy and catches Exception for each listener, because a listener may
    know of an event but has no say in it.
    """
    with lock:
        notify(listeners, "started")
        try:
            yield
        finally:
            notify(listeners, "ended")


def notify(listeners: list[Listener], event: str) -> None:
    """Tell every listener; log what they raise."""
    for listener in tuple(listeners):
        try:
            listener(event)
        except Exception:
            logging.exception("the listener %r failed at %r", listener, event)


# --- 2 · task ---


class Managed(Generic[T]):
    """A frame for managers: a subclass fills in the steps.

    `release` stands in a `finally`, and `roll_back` in an `except BaseException`, so that the next
    step runs even if one fails, and Python chains the exceptions. What decides is whether there is
    an exception, never what kind it is, because Ctrl-C must not commit half of the work.
    """

    _resource: T

    def acquire(self) -> T:
        """Return the resource."""
        raise NotImplementedError

    def check(self, resource: T) -> None:
        """Raise an exception if the resource does not work."""

    def commit(self, resource: T) -> None:
        """Keep what the block did."""

    def roll_back(self, resource: T) -> None:
        """Drop what the block did."""

    def release(self, resource: T) -> None:
        """Give the resource back."""

    def __enter__(self) -> T:
        resource = self.acquire()
        try:
            self.check(resource)
        except BaseException:
            self.release(resource)
            raise
        self._resource = resource
        return resource

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        resource = self._resource
        del self._resource
        try:
            if exc_type is None:
                self._commit(resource)
            else:
                self.roll_back(resource)
        finally:
            self.release(resource)

    def _commit(self, resource: T) -> None:
        try:
            self.commit(resource)
        except BaseException:
            self.roll_back(resource)
            raise


# --- 3 · capstone ---


class BusyError(RuntimeError):
    """Another process exports to the same file."""


class Exporter:
    """Write a price list to a file, one export at a time.

    Each resource is a manager (RAII), so there is no flag that could be wrong: what was not
    acquired is not released. The lock is the outer one, because without it nobody may touch the
    draft, and it is released only when the draft has become the list.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def export(self, rows: Iterable[tuple[str, str]]) -> int:
        """Write the rows; return their number. Raises BusyError if another export is running."""
        number = 0
        with exclusive(self.target.with_suffix(".lock")), replacement(self.target) as draft:
            for name, price in rows:
                draft.write(f"{name},{price}\n")
                number += 1
        return number


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file for a block. Raises BusyError if it is there, and leaves it there."""
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        raise BusyError(f"{lock} is there: another export is running, or was killed") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # somebody may have deleted it by hand


@contextmanager
def replacement(target: Path) -> Iterator[TextIO]:
    """Open a draft; it replaces the target if the block ends well, and is deleted if not."""
    path = target.with_suffix(".draft")
    with open(path, "w", encoding="utf-8") as draft:
        try:
            yield draft
            draft.close()  # now all of it is written
            os.replace(path, target)
        finally:
            path.unlink(missing_ok=True)  # not there if it has become the list
