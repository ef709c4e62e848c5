"""The contract is held to what it promises.

It must reject each kind of broken manager, by those ways out that the manager forgot and by no
others, and pass the correct twins. Every manager here lends two books from a shelf, first and
second; each broken one has one defect, which its name tells.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import re
import socket
import subprocess
import sys
import threading
import unittest
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any

import anyio  # noqa: F401  # so that its cancel scopes are tried, too
import contract
import pytest
from conftest import chapter_path
from contract import ASYNC_WAYS, SYNC_WAYS, Broken, Subject, Way, check

# --- The resource ---


class BookClosedError(Exception):
    """A book was read after its block."""


class Book:
    """What the managers give; while it is open it is also the `current` one."""

    is_open = True

    def read(self) -> None:
        if not self.is_open:
            raise BookClosedError
        if current.get() is not self:
            raise LookupError("another book is current")


current: contextvars.ContextVar[Book | None] = contextvars.ContextVar("current", default=None)


class Shelf:
    """Knows what is taken; either end of a loan can be made to fail."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.stuck = ""
        self.newest: Book | None = None

    def leaks(self) -> str:
        left = [*self.taken, *(["current book"] if current.get() else [])]
        return f"still taken: {left}" if left else ""

    @contextmanager
    def sticks(self, where: str) -> Iterator[None]:
        self.stuck = where
        try:
            yield
        finally:
            self.stuck = ""

    def take(self, name: str) -> None:
        if self.stuck == f"take {name}":
            raise OSError(self.stuck)
        self.taken.append(name)

    def give_back(self, name: str) -> None:
        self.taken.remove(name)
        if self.stuck == f"give back {name}":
            raise OSError(self.stuck)  # given back all the same, as close() closes if flush fails

    def take_both(self) -> None:
        self.take("first")
        try:
            self.take("second")
        except BaseException:
            self.give_back("first")
            raise

    def give_back_both(self) -> None:
        try:
            self.give_back("second")
        finally:
            self.give_back("first")

    # The same with awaits: before taking or giving, so that a cancel finds neither half done.

    async def take_soon(self, name: str) -> None:
        await asyncio.sleep(0)
        self.take(name)

    async def give_back_soon(self, name: str) -> None:
        await asyncio.sleep(0)
        self.give_back(name)

    async def take_both_soon(self) -> None:
        await self.take_soon("first")
        try:
            await self.take_soon("second")
        except BaseException:
            await to_the_end(self.give_back_soon("first"))
            raise

    async def give_back_both_soon(self) -> None:
        try:
            await self.give_back_soon("second")
        finally:
            await self.give_back_soon("first")


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, however often this task is cancelled; raise the cancellation afterwards."""
    task = asyncio.create_task(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


@contextmanager
def open_book(book: Book | None = None) -> Iterator[Book]:
    """A book that is open and current inside the block."""
    book = book or Book()
    token = current.set(book)
    try:
        yield book
    finally:
        current.reset(token)
        book.is_open = False


Manager = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
Made = Callable[[Shelf], Manager]


def subject_of(manager: Made) -> Subject:
    shelf = Shelf()
    return Subject(
        open=lambda: manager(shelf),
        leaks=shelf.leaks,
        use=lambda book: book.read(),
        closed_error=BookClosedError,
        setup_faults=[lambda: shelf.sticks("take second")],
        cleanup_faults=[lambda: shelf.sticks("give back second")],
    )


def rejections(manager: Made, ways: tuple[Way, ...]) -> dict[str, Broken]:
    """The names of the ways that reject the manager, with what they say."""
    found = {}
    for way in ways:
        try:
            # What a broken manager leaves set in a context variable is left in a copy.
            contextvars.copy_context().run(way, subject_of(manager))
        except Broken as error:
            found[way.__name__] = error
    return found


# --- Correct managers for `with` ---


@contextmanager
def by_finally(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back_both()


class ByClass:
    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def __enter__(self) -> Book:
        self.shelf.take_both()
        self.book = Book()
        self.token = current.set(self.book)
        return self.book

    def __exit__(self, *raised: object) -> bool | None:
        current.reset(self.token)
        self.book.is_open = False
        self.shelf.give_back_both()
        return None


# --- Broken managers for `with` ---


class NeverCleaningUp(ByClass):
    def __exit__(self, *raised: object) -> None: ...


@contextmanager
def without_finally(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    with open_book() as book:
        yield book
    shelf.give_back_both()


@contextmanager
def except_exception(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    except Exception:
        shelf.give_back_both()
        raise
    shelf.give_back_both()


@contextmanager
def swallowing_all(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf) as book:
        with suppress(BaseException):
            yield book


@contextmanager
def swallowing_errors(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf) as book:
        with suppress(Exception):
            yield book


@contextmanager
def swallowing_cancellation(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf) as book:
        with suppress(asyncio.CancelledError):
            yield book


class TruthyExit(ByClass):
    def __exit__(self, *raised: object) -> bool:
        super().__exit__(*raised)
        return True


@contextmanager
def wrapping_errors(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf) as book:
        try:
            yield book
        except contract.Failure as error:
            raise RuntimeError("something went wrong") from error


class LeakingHalfASetUp(ByClass):
    def __enter__(self) -> Book:
        self.shelf.take("first")
        self.shelf.take("second")
        self.book = Book()
        self.token = current.set(self.book)
        return self.book


@contextmanager
def stopping_at_the_first_failure(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back("second")
        shelf.give_back("first")


@contextmanager
def hiding_its_failure(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    finally:
        with suppress(OSError):
            shelf.give_back_both()


@contextmanager
def hiding_the_bodys_error(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    finally:
        try:
            shelf.give_back_both()
        except OSError:
            raise OSError("could not give the books back") from None


class AcquiringWhenMade(ByClass):
    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf)
        shelf.take_both()

    def __enter__(self) -> Book:
        self.book = Book()
        self.token = current.set(self.book)
        return self.book


@contextmanager
def restoring_none(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    book = Book()
    current.set(book)
    try:
        yield book
    finally:
        book.is_open = False
        current.set(None)
        shelf.give_back_both()


@contextmanager
def never_closing(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf) as book:
        book.read = lambda: None  # type: ignore[method-assign]
        yield book


class Erased(Book):
    def read(self) -> None:
        if not self.is_open:
            raise AttributeError("self.connection is None")


@contextmanager
def failing_oddly_after_close(shelf: Shelf) -> Iterator[Book]:
    with by_finally(shelf), open_book(Erased()) as book:
        yield book


class KeepingItsStateOnTheShelf(ByClass):
    def __enter__(self) -> Book:
        self.shelf.newest = super().__enter__()
        return self.shelf.newest

    def __exit__(self, *raised: object) -> None:
        assert self.shelf.newest is not None
        self.shelf.newest.is_open = False
        current.reset(self.token)
        self.shelf.give_back_both()


class OnlyTheNewest(Book):
    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def read(self) -> None:
        super().read()
        if self.shelf.newest is not self:
            raise LookupError("the newest book is somebody else's")


@contextmanager
def one_global_for_all(shelf: Shelf) -> Iterator[Book]:
    book = OnlyTheNewest(shelf)
    with by_finally(shelf), open_book(book):
        before, shelf.newest = shelf.newest, book
        try:
            yield book
        finally:
            shelf.newest = before


BY_ERRORS = {way.__name__ for way in SYNC_WAYS if way.__name__.startswith("raises_")}
BY_EXCEPTIONS = {"raises_exception", "raises_stop_iteration"}
BY_MORE_THAN_EXCEPTIONS = {"generator_closed"} | BY_ERRORS - BY_EXCEPTIONS
LEFT_BY_ERROR_TOO = {"used_after_close", "nested"}

SYNC_DEFECTS: dict[Made, set[str]] = {
    NeverCleaningUp: {way.__name__ for way in SYNC_WAYS} - {"never_entered", "set_up_fails"},
    without_finally: BY_ERRORS
    | {"generator_closed", "clean_up_fails_after_an_error"}
    | LEFT_BY_ERROR_TOO,
    except_exception: BY_MORE_THAN_EXCEPTIONS,
    swallowing_all: BY_ERRORS | {"generator_closed"},
    swallowing_errors: BY_EXCEPTIONS,
    swallowing_cancellation: {"raises_cancelled_error"},
    TruthyExit: BY_ERRORS | {"generator_closed"},
    wrapping_errors: {"raises_exception"} | LEFT_BY_ERROR_TOO,
    LeakingHalfASetUp: {"set_up_fails"},
    stopping_at_the_first_failure: {"clean_up_fails", "clean_up_fails_after_an_error"},
    hiding_its_failure: {"clean_up_fails"},
    hiding_the_bodys_error: {"clean_up_fails_after_an_error"},
    AcquiringWhenMade: {"never_entered"},
    restoring_none: {"nested"},
    never_closing: {"used_after_close", "nested"},
    failing_oddly_after_close: {"used_after_close", "nested"},
    KeepingItsStateOnTheShelf: {"nested", "concurrent"},
    one_global_for_all: {"concurrent"},
}


# --- Correct managers for `async with` ---


@asynccontextmanager
async def by_shielding(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        await to_the_end(shelf.give_back_both_soon())


@asynccontextmanager
async def by_not_awaiting(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back_both()


@asynccontextmanager
async def by_returning_what_was_granted(shelf: Shelf) -> AsyncIterator[Book]:
    request = granted(shelf)
    try:
        await request
    except asyncio.CancelledError:
        if not request.cancelled():
            shelf.give_back_both()
        raise
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back_both()


def granted(shelf: Shelf) -> asyncio.Future[None]:
    """A request that the shelf grants in a moment, unless it was withdrawn before."""

    def grant() -> None:
        if not request.done():
            try:
                shelf.take_both()
                request.set_result(None)
            except OSError as error:
                request.set_exception(error)

    request = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(grant)
    return request


class ByAsyncClass(ByClass):
    __enter__ = __exit__ = None  # type: ignore[assignment]

    async def __aenter__(self) -> Book:
        await self.shelf.take_both_soon()
        self.book = Book()
        self.token = current.set(self.book)
        return self.book

    async def __aexit__(self, *raised: object) -> bool:
        current.reset(self.token)
        self.book.is_open = False
        await to_the_end(self.shelf.give_back_both_soon())
        return False


# --- Broken managers for `async with` ---


class AsyncNeverCleaningUp(ByAsyncClass):
    async def __aexit__(self, *raised: object) -> bool:
        return False


@asynccontextmanager
async def async_without_finally(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    with open_book() as book:
        yield book
    shelf.give_back_both()


@asynccontextmanager
async def async_except_exception(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    except Exception:
        shelf.give_back_both()
        raise
    shelf.give_back_both()


@asynccontextmanager
async def async_swallowing_all(shelf: Shelf) -> AsyncIterator[Book]:
    async with by_shielding(shelf) as book:
        with suppress(BaseException):
            yield book


@asynccontextmanager
async def async_swallowing_cancellation(shelf: Shelf) -> AsyncIterator[Book]:
    async with by_shielding(shelf) as book:
        with suppress(asyncio.CancelledError):
            yield book


class AsyncTruthyExit(ByAsyncClass):
    async def __aexit__(self, *raised: object) -> bool:
        await super().__aexit__(*raised)
        return True


@asynccontextmanager
async def async_wrapping_errors(shelf: Shelf) -> AsyncIterator[Book]:
    async with by_shielding(shelf) as book:
        try:
            yield book
        except contract.Failure as error:
            raise RuntimeError("something went wrong") from error


@asynccontextmanager
async def renaming_cancellation(shelf: Shelf) -> AsyncIterator[Book]:
    async with by_shielding(shelf) as book:
        try:
            yield book
        except asyncio.CancelledError as error:
            raise TimeoutError("the operator was impatient") from error


class AsyncLeakingHalfASetUp(ByAsyncClass):
    async def __aenter__(self) -> Book:
        await self.shelf.take_soon("first")
        await self.shelf.take_soon("second")
        self.book = Book()
        self.token = current.set(self.book)
        return self.book


class HandlingOnlyExceptionsInSetUp(ByAsyncClass):
    async def __aenter__(self) -> Book:
        await self.shelf.take_soon("first")
        try:
            await self.shelf.take_soon("second")
        except Exception:
            self.shelf.give_back("first")
            raise
        self.book = Book()
        self.token = current.set(self.book)
        return self.book


@asynccontextmanager
async def awaiting_between_acquiring_and_try(shelf: Shelf) -> AsyncIterator[Book]:
    shelf.take_both()
    await asyncio.sleep(0)
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back_both()


@asynccontextmanager
async def losing_what_was_granted(shelf: Shelf) -> AsyncIterator[Book]:
    await granted(shelf)
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.give_back_both()


@asynccontextmanager
async def awaiting_in_finally(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        await shelf.give_back_both_soon()


@asynccontextmanager
async def shielding_without_waiting(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        await asyncio.shield(shelf.give_back_both_soon())


@asynccontextmanager
async def shielding_once(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        cleanup = asyncio.ensure_future(shelf.give_back_both_soon())
        try:
            await asyncio.shield(cleanup)
        except asyncio.CancelledError:
            await cleanup
            raise


@asynccontextmanager
async def shielded_after_a_cancel_only(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    except asyncio.CancelledError:
        await shelf.give_back_both_soon()
        raise
    except BaseException:
        await to_the_end(shelf.give_back_both_soon())
        raise
    else:
        await to_the_end(shelf.give_back_both_soon())


@asynccontextmanager
async def swallowing_a_cancel_of_its_cleanup(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        with suppress(asyncio.CancelledError):
            await to_the_end(shelf.give_back_both_soon())


class AsyncStoppingAtTheFirstFailure(ByAsyncClass):
    async def __aexit__(self, *raised: object) -> bool:
        current.reset(self.token)
        self.book.is_open = False
        self.shelf.give_back("second")
        self.shelf.give_back("first")
        return False


@asynccontextmanager
async def async_hiding_its_failure(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        with suppress(OSError):
            shelf.give_back_both()


@asynccontextmanager
async def async_hiding_the_bodys_error(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    try:
        with open_book() as book:
            yield book
    finally:
        try:
            shelf.give_back_both()
        except OSError:
            raise OSError("could not give the books back") from None


class AsyncAcquiringWhenMade(ByAsyncClass):
    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf)
        shelf.take_both()

    async def __aenter__(self) -> Book:
        self.book = Book()
        self.token = current.set(self.book)
        return self.book


class NeverAwaitingItsHeartbeat(ByAsyncClass):
    async def __aenter__(self) -> Book:
        book = await super().__aenter__()
        self.heartbeat = asyncio.create_task(asyncio.Event().wait(), name="heartbeat")
        return book

    async def __aexit__(self, *raised: object) -> bool:
        self.heartbeat.cancel()
        current.reset(self.token)
        self.book.is_open = False
        self.shelf.give_back_both()
        return False


@asynccontextmanager
async def async_restoring_none(shelf: Shelf) -> AsyncIterator[Book]:
    await shelf.take_both_soon()
    book = Book()
    current.set(book)
    try:
        yield book
    finally:
        book.is_open = False
        current.set(None)
        shelf.give_back_both()


@asynccontextmanager
async def async_never_closing(shelf: Shelf) -> AsyncIterator[Book]:
    async with by_shielding(shelf) as book:
        book.read = lambda: None  # type: ignore[method-assign]
        yield book


@asynccontextmanager
async def async_one_global_for_all(shelf: Shelf) -> AsyncIterator[Book]:
    book = OnlyTheNewest(shelf)
    async with by_shielding(shelf):
        with open_book(book):
            before, shelf.newest = shelf.newest, book
            try:
                yield book
            finally:
                shelf.newest = before


ASYNC_BY_ERRORS = {w.__name__ for w in ASYNC_WAYS if w.__name__.startswith("async_raises_")}
ASYNC_BY_EXCEPTIONS = {"async_raises_exception", "async_raises_stop_iteration"}
ASYNC_BY_MORE = {"async_generator_closed"} | ASYNC_BY_ERRORS - ASYNC_BY_EXCEPTIONS
ASYNC_LEFT_BY_ERROR_TOO = {"async_used_after_close", "async_nested"}
CANCELLED = {w.__name__ for w in ASYNC_WAYS if w.__name__.startswith("async_cancelled")}
WAITING = "async_cancelled_while_it_waits"
SERVED = "async_cancelled_just_as_it_is_served"
AGAIN = "async_cancelled_again_while_it_cleans_up"
TWICE = "async_cancelled_twice_anywhere"
ANYIO = "async_cancelled_by_an_anyio_scope"  # cancels again at each turn, so swallowing is no use

NOT_LEFT = {"async_never_entered", "async_set_up_fails"}

ASYNC_DEFECTS: dict[Made, set[str]] = {
    AsyncNeverCleaningUp: {way.__name__ for way in ASYNC_WAYS} - NOT_LEFT,
    async_without_finally: ASYNC_BY_ERRORS
    | {"async_generator_closed", "async_clean_up_fails_after_an_error"}
    | ASYNC_LEFT_BY_ERROR_TOO
    | CANCELLED,
    async_except_exception: ASYNC_BY_MORE | CANCELLED,
    async_swallowing_all: ASYNC_BY_ERRORS | {"async_generator_closed"} | CANCELLED - {ANYIO},
    async_swallowing_cancellation: {"async_raises_cancelled_error"} | CANCELLED - {ANYIO},
    AsyncTruthyExit: ASYNC_BY_ERRORS | {"async_generator_closed"} | CANCELLED - {ANYIO},
    async_wrapping_errors: {"async_raises_exception"} | ASYNC_LEFT_BY_ERROR_TOO,
    renaming_cancellation: {"async_raises_cancelled_error"} | CANCELLED - {ANYIO},
    AsyncLeakingHalfASetUp: {"async_set_up_fails", WAITING, SERVED, TWICE},
    HandlingOnlyExceptionsInSetUp: {WAITING, SERVED, TWICE},
    awaiting_between_acquiring_and_try: {WAITING, SERVED, TWICE},
    losing_what_was_granted: {SERVED},
    awaiting_in_finally: CANCELLED,
    shielding_without_waiting: CANCELLED - {SERVED},
    shielding_once: {TWICE, ANYIO},
    shielded_after_a_cancel_only: {AGAIN, TWICE, ANYIO},
    swallowing_a_cancel_of_its_cleanup: {WAITING, SERVED, TWICE},
    AsyncStoppingAtTheFirstFailure: {
        "async_clean_up_fails",
        "async_clean_up_fails_after_an_error",
    },
    async_hiding_its_failure: {"async_clean_up_fails"},
    async_hiding_the_bodys_error: {"async_clean_up_fails_after_an_error"},
    AsyncAcquiringWhenMade: {"async_never_entered"},
    NeverAwaitingItsHeartbeat: {way.__name__ for way in ASYNC_WAYS}
    - NOT_LEFT
    - {"async_concurrent"},
    async_restoring_none: {"async_nested"},
    async_never_closing: {"async_used_after_close", "async_nested"},
    async_one_global_for_all: {"async_concurrent"},
}


# --- The tests ---


def async_way(name: str) -> Way:
    return next(way for way in ASYNC_WAYS if way.__name__ == name)


def name_of(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("way", SYNC_WAYS, ids=name_of)
@pytest.mark.parametrize("manager", [by_finally, ByClass], ids=name_of)
def test_a_correct_manager_keeps_the_contract(manager: Made, way: Way) -> None:
    way(subject_of(manager))


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=name_of)
@pytest.mark.parametrize(
    "manager",
    [by_shielding, by_not_awaiting, by_returning_what_was_granted, ByAsyncClass],
    ids=name_of,
)
def test_a_correct_async_manager_keeps_the_contract(manager: Made, way: Way) -> None:
    way(subject_of(manager))


@pytest.mark.parametrize("manager", SYNC_DEFECTS, ids=name_of)
def test_a_broken_manager_is_rejected_by_the_ways_that_it_forgot_and_no_others(
    manager: Made,
) -> None:
    assert rejections(manager, SYNC_WAYS).keys() == SYNC_DEFECTS[manager]


@pytest.mark.parametrize("manager", ASYNC_DEFECTS, ids=name_of)
def test_a_broken_async_manager_is_rejected_by_the_ways_that_it_forgot_and_no_others(
    manager: Made,
) -> None:
    assert rejections(manager, ASYNC_WAYS).keys() == ASYNC_DEFECTS[manager]


def test_each_way_rejects_some_broken_manager() -> None:
    rejecting = set[str]().union(*SYNC_DEFECTS.values(), *ASYNC_DEFECTS.values())
    assert rejecting >= {way.__name__ for way in (*SYNC_WAYS, *ASYNC_WAYS)}


def test_a_message_names_the_way_the_manager_the_await_and_the_leak() -> None:
    messages = rejections(awaiting_between_acquiring_and_try, ASYNC_WAYS)
    line = inspect.getsourcelines(awaiting_between_acquiring_and_try)[1] + 3
    assert messages[WAITING].what == (
        f"awaiting_between_acquiring_and_try left something behind when cancelled while"
        f" it waited in its set-up, at {__file__}:{line} (await asyncio.sleep(0)):"
        " still taken: ['first', 'second']"
    )


def test_check_plays_all_ways_and_raises_every_failure_at_once() -> None:
    check(lambda: subject_of(by_finally))
    check(lambda: subject_of(by_shielding))
    check(subject_of(by_not_awaiting))
    with pytest.raises(ExceptionGroup, match="2 of 15 ways out break it") as raised:
        check(lambda: subject_of(stopping_at_the_first_failure))
    names = [str(error).split(":")[0] for error in raised.value.exceptions]
    assert names == ["clean_up_fails", "clean_up_fails_after_an_error"]
    with pytest.raises(ExceptionGroup, match="5 of 20 ways out break it"):
        check(lambda: subject_of(awaiting_in_finally))


def test_a_subject_whose_oracle_reports_a_leak_at_the_start_is_not_judged() -> None:
    subject = Subject(open=nullcontext, leaks=lambda: "the leak of another test")
    with pytest.raises(AssertionError, match="returns: not judged, before it began: the leak of"):
        contract.returns(subject)


def test_a_way_that_the_subject_gives_no_means_to_try_is_skipped() -> None:
    bare = Subject(open=nullcontext, leaks=bool, visible=False, nestable=False, concurrent=False)
    skipped = []
    for way in SYNC_WAYS:
        try:
            way(bare)
        except unittest.SkipTest:
            skipped.append(way.__name__)
    assert skipped == [
        "set_up_fails",
        "clean_up_fails",
        "clean_up_fails_after_an_error",
        "used_after_close",
        "nested",
        "concurrent",
    ]


def test_what_a_subject_suppresses_on_purpose_may_be_swallowed() -> None:
    subject = Subject(
        open=lambda: suppress(contract.Failure),
        leaks=bool,
        visible=False,
        suppresses=(contract.Failure,),
    )
    contract.raises_exception(subject)
    contract.raises_base_exception(subject)


def test_a_value_without_closed_error_must_stay_usable() -> None:
    contract.used_after_close(
        Subject(open=nullcontext, leaks=bool, visible=False, use=lambda value: None)
    )
    subject = Subject(open=nullcontext, leaks=bool, visible=False, use=lambda value: 1 / 0)
    with pytest.raises(AssertionError, match="used_after_close: ZeroDivisionError"):
        contract.used_after_close(subject)


def test_the_wrong_kind_of_manager_is_told_which_ways_are_meant() -> None:
    with pytest.raises(AssertionError, match="by_shielding is for ASYNC_WAYS"):
        contract.returns(subject_of(by_shielding))
    with pytest.raises(AssertionError, match="by_finally is for SYNC_WAYS"):
        async_way("async_returns")(subject_of(by_finally))


def test_a_fault_that_does_not_strike_is_reported() -> None:
    subject = Subject(
        open=nullcontext,
        leaks=bool,
        visible=False,
        setup_faults=[nullcontext],
        cleanup_faults=[nullcontext],
    )
    with pytest.raises(AssertionError, match=r"to fail under setup_faults\[0\], but was entered"):
        contract.set_up_fails(subject)
    with pytest.raises(AssertionError, match=r"under cleanup_faults\[0\] without a word"):
        contract.clean_up_fails(subject)


def test_blocks_that_wait_for_each_other_are_reported_and_do_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract, "PATIENCE", 0.05)
    lock = threading.Lock()
    with pytest.raises(
        AssertionError, match=r"concurrent: TimeoutError.*4 blocks could not be open"
    ):
        contract.concurrent(Subject(open=lambda: lock, leaks=lock.locked))
    async_lock = asyncio.Lock()
    with pytest.raises(
        AssertionError, match=r"concurrent: TimeoutError.*4 blocks could not be open"
    ):
        async_way("async_concurrent")(Subject(open=lambda: async_lock, leaks=async_lock.locked))


def test_a_manager_that_never_ends_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "PATIENCE", 0.05)
    monkeypatch.setattr(contract, "MOST_SUSPENSIONS", 5)

    @asynccontextmanager
    async def waiting_for_ever() -> AsyncIterator[None]:
        for _ in itertools.count():
            await asyncio.sleep(0)
        yield

    @asynccontextmanager
    async def deaf() -> AsyncIterator[None]:
        try:
            await asyncio.sleep(0)
            yield
        finally:
            await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="waiting_for_ever was cancelled at 5 awaits, and"):
        contract.async_cancelled_while_it_waits(
            Subject(open=waiting_for_ever, leaks=bool, visible=False)
        )
    with pytest.raises(AssertionError, match=r"deaf did not end within 0.05 s when cancelled"):
        contract.async_cancelled_while_it_waits(Subject(open=deaf, leaks=bool, visible=False))


def test_the_nth_await_is_the_same_one_however_long_it_waits_for_a_socket() -> None:
    @asynccontextmanager
    async def conversation() -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        here.setblocking(False)
        with here, there:
            loop.call_later(0.01, there.send, b"hello")
            yield await loop.sock_recv(here, 5)
            loop.call_later(0.01, there.send, b"bye")
            await loop.sock_recv(here, 3)

    awaits: list[tuple[int, str]] = []

    def never(nth: int, phase: str) -> bool:
        awaits.append((nth, phase))
        return False

    subject = Subject(open=conversation, leaks=bool, visible=False)
    assert asyncio.run(contract.cancel(subject, never)) == 0
    assert awaits == [(0, "set-up"), (1, "body"), (2, "cleanup")]
    check(subject)


# --- An oracle that sees ---


@contextmanager
def releasing_twice(shelf: Shelf) -> Iterator[Book]:
    shelf.take_both()
    try:
        with open_book() as book:
            yield book
    finally:
        shelf.taken.clear()


def test_an_inner_block_that_releases_what_the_outer_one_holds_is_rejected() -> None:
    subject = Subject(open=lambda: releasing_twice(shelf), leaks=lambda: shelf.taken)
    shelf = Shelf()
    with pytest.raises(Broken, match="after an inner block `leaks` sees nothing"):
        contract.nested(subject)


def test_a_blind_oracle_is_rejected() -> None:
    shelf = Shelf()
    with pytest.raises(Broken, match="is open, and `leaks` sees nothing") as raised:
        contract.returns(Subject(open=lambda: by_finally(shelf), leaks=lambda: None))
    assert "visible=False" in raised.value.remedy


def test_a_cancellation_that_is_undone_by_uncancel_is_rejected() -> None:
    @asynccontextmanager
    async def undoing() -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            raise

    with pytest.raises(Broken, match=r"undid the cancellation by uncancel\(\) when cancelled"):
        contract.async_cancelled_while_it_waits(Subject(open=undoing, leaks=bool, visible=False))


# --- No way hangs ---


def test_a_lock_that_is_not_nestable_is_reported_and_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract, "PATIENCE", 0.05)
    lock = threading.Lock()
    with pytest.raises(Broken, match=r"lock did not end within 0\.05 s") as raised:
        contract.nested(Subject(open=lambda: lock, leaks=lock.locked))
    assert "nestable=False" in raised.value.remedy
    assert not lock.locked()


def test_a_cleanup_that_hangs_is_reported(
    monkeypatch: pytest.MonkeyPatch, tasks_may_be_abandoned: None
) -> None:
    monkeypatch.setattr(contract, "PATIENCE", 0.05)

    @contextmanager
    def hanging() -> Iterator[None]:
        yield
        threading.Event().wait()

    @asynccontextmanager
    async def async_hanging() -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    with pytest.raises(Broken, match=r"hanging did not end within 0\.05 s"):
        contract.returns(Subject(open=hanging, leaks=bool, visible=False))
    with pytest.raises(Broken, match=r"async_hanging did not end within 0\.05 s"):
        async_way("async_returns")(Subject(open=async_hanging, leaks=bool, visible=False))


# --- Faults, words and the path ---


def test_a_fault_that_comes_out_as_another_error_is_reported() -> None:
    shelf = Shelf()

    @contextmanager
    def stuck() -> Iterator[type[Exception]]:
        with shelf.sticks("take second"):
            yield LookupError

    subject = Subject(
        open=lambda: by_finally(shelf), leaks=shelf.leaks, setup_faults=[stuck], cleanup_faults="no"
    )
    with pytest.raises(Broken, match="not by its <class 'LookupError'>: OSError"):
        contract.set_up_fails(subject)
    with pytest.raises(unittest.SkipTest, match="no"):
        contract.clean_up_fails(subject)


def test_a_failure_shows_the_path_that_ran_and_a_remedy() -> None:
    broken = rejections(without_finally, SYNC_WAYS)["raises_exception"]
    *_before, raised, never_ran = broken.path.splitlines()
    assert raised.split() == ["3", "yield", "book"]
    assert never_ran.strip() == "shelf.give_back_both()"
    assert "`finally`" in broken.remedy


# What the demo that a remedy names must be about: a word of its title.
TITLES = {
    (1, 1): "with",
    (1, 3): "finally",
    (1, 5): "Suppressing",
    (1, 6): "contextmanager",
    (2, 1): "closes",
    (3, 4): "await",
    (3, 5): "Served",
    (3, 7): "await",
    (4, 1): "global",
    (4, 2): "reset",
    (7, 1): "Set-up fails",
    (7, 4): "failures",
}


def test_a_remedy_names_a_demo_about_its_subject() -> None:
    remedies = [value for value in vars(contract).values() if "(chapter" in str(value)]
    places = {(int(n), int(demo)) for text in remedies for n, demo in PLACE.findall(str(text))}
    assert places == TITLES.keys()
    for (number, demo), word in TITLES.items():
        source = chapter_path(number).read_text(encoding="utf-8")
        titles = re.findall(r'(?m)^(?:async )?def demo_\w+.*\n    """(.+)', source)
        assert word in titles[demo - 1], titles


PLACE = re.compile(r"\(chapter (\d+), demo (\d+)\)")


def test_a_debuggers_trace_function_is_left_alone() -> None:
    def tracer(frame: object, event: str, argument: object) -> None: ...

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        contract.returns(subject_of(by_finally))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


# --- From the command line ---

FILE = """
from contextlib import contextmanager
from contract import Subject
held = []
@contextmanager
def careful():
    held.append(1)
    try:
        yield
    finally:
        held.pop()
@contextmanager
def careless():
    held.append(open(__file__))
    yield
    held.pop().close()
def subject():
    return Subject(open=careful, leaks=lambda: held)
"""


def judge_file(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    file = folder / "mine.py"
    file.write_text(FILE)
    command = [sys.executable, contract.__file__, f"{file}:{name}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_manager_from_anywhere_is_judged_from_the_command_line(tmp_path: Path) -> None:
    ended = judge_file(tmp_path, "subject")
    assert ended.returncode == 0, ended.stderr
    assert "✓ nested" in ended.stdout
    assert "- set_up_fails" in ended.stdout
    ended = judge_file(tmp_path, "careless")
    assert ended.returncode == 1, ended.stderr
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("✗ raises_exception"))
    assert "mine.py" in line
    assert judge_file(tmp_path, "").returncode == 2
