"""The contract is held to what it promises.

It must reject each kind of broken manager, by those ways out that the manager forgot and by no
others, and pass the correct ones. Every manager here lends two books from a shelf, first and
second; each broken one has one defect, which its name tells. They are written once, for
`async with`; on a shelf at which nobody waits, `Plain` makes the same one for `with`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import re
import signal
import socket
import subprocess
import sys
import threading
import unittest
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio  # noqa: F401  # so that its cancel scopes are tried, too
import contract
import pytest
from conftest import chapter_path
from contract import ASYNC_WAYS, SYNC_WAYS, Broken, Subject, Way, check


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is tried here has no place in the summary of the suite."""
    monkeypatch.setattr(contract, "managers", set())
    monkeypatch.setattr(contract, "counts", Counter())
    return contract.counts


# --- The resource ---


class BookClosedError(Exception):
    """A book was read after its block."""


class Shelf:
    """Knows what is taken; either end of a loan can be made to fail."""

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.taken: list[str] = []
        self.stuck = ""
        self.newest: Book | None = None

    def leaks(self) -> str:
        left = [*self.taken, *(["current book"] if current.get() else [])]
        return f"still taken: {left}" if left else ""

    @contextmanager
    def sticks(self, where: str, error: object = OSError) -> Iterator[object]:
        self.stuck = where
        try:
            yield error
        finally:
            self.stuck = ""

    async def take(self, name: str) -> None:
        if self.waits:
            await asyncio.sleep(0)  # before it is taken, so that a cancel finds nothing half done
        if self.stuck == f"take {name}":
            raise OSError(self.stuck)
        self.taken.append(name)

    def give_back(self, name: str) -> None:
        if name in self.taken:
            self.taken.remove(name)
        if self.stuck == f"give back {name}":
            raise OSError(self.stuck)  # given back all the same, as close() closes if flush fails

    async def take_both(self) -> None:
        await self.take("first")
        try:
            await self.take("second")
        except BaseException:
            self.give_back("first")
            raise

    def give_back_both(self) -> None:
        try:
            self.give_back("second")
        finally:
            self.give_back("first")

    async def give_back_slowly(self) -> None:
        await asyncio.sleep(0)
        try:
            self.give_back("second")
        finally:
            await asyncio.sleep(0)
            self.give_back("first")

    def grant(self) -> asyncio.Future[None]:
        """Lend both books in a moment, unless the request was withdrawn before."""

        def lend() -> None:
            if request.done():
                return
            if self.stuck == "take second":
                request.set_exception(OSError(self.stuck))
            else:
                self.taken += ["first", "second"]
                request.set_result(None)

        request = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lend)
        return request


class Book:
    """What the managers give; while it is open it is also the `current` one."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.is_open = shelf, True

    def read(self) -> None:
        if not self.is_open:
            raise BookClosedError
        if current.get() is not self:
            raise LookupError("another book is current")


current: contextvars.ContextVar[Book | None] = contextvars.ContextVar("current", default=None)


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


# --- Correct managers ---


class Loan:
    """Lends both books. Each broken manager differs from it in one method."""

    swallows: tuple[type[BaseException], ...] = ()
    gives: type[Book] = Book

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    async def __aenter__(self) -> Book:
        await self.take()
        return self.open()

    async def __aexit__(self, kind: object, error: BaseException | None, _trace: object) -> bool:
        self.close()
        await self.give_back()
        return isinstance(error, self.swallows)

    async def take(self) -> None:
        await self.shelf.take_both()

    async def give_back(self) -> None:
        self.shelf.give_back_both()

    def open(self) -> Book:
        self.book = self.gives(self.shelf)
        self.token = current.set(self.book)
        return self.book

    def close(self) -> None:
        current.reset(self.token)
        self.book.is_open = False


class Shielding(Loan):
    async def give_back(self) -> None:
        await to_the_end(self.shelf.give_back_slowly())


class ReturningWhatWasGranted(Loan):
    async def take(self) -> None:
        request = self.shelf.grant()
        try:
            await request
        except asyncio.CancelledError:
            if not request.cancelled():
                self.shelf.give_back_both()
            raise


@asynccontextmanager
async def by_async_generator(shelf: Shelf) -> AsyncIterator[Book]:
    async with Loan(shelf) as book:
        yield book


class Plain:
    """The same manager for `with`."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    def __enter__(self) -> Any:
        return by_hand(self.manager.__aenter__())

    def __exit__(self, *raised: Any) -> Any:
        return by_hand(self.manager.__aexit__(*raised))


def by_hand(coroutine: Any) -> Any:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits")


@contextmanager
def by_generator(shelf: Shelf) -> Iterator[Book]:
    with Plain(Loan(shelf)) as book:
        yield book


# --- Broken managers ---


class LeavingTheVariableSet(Loan):
    def close(self) -> None:
        self.book.is_open = False


class WithoutFinally(Loan):
    async def __aexit__(self, *raised: Any) -> bool:
        return raised == (None, None, None) and await super().__aexit__(*raised)


class ExceptException(Loan):
    async def __aexit__(self, *raised: Any) -> bool:
        return isinstance(raised[1], Exception | None) and await super().__aexit__(*raised)


class SwallowingAll(Loan):
    swallows = (BaseException,)


class SwallowingErrors(Loan):
    swallows = (Exception,)


class SwallowingCancellation(Loan):
    swallows = (asyncio.CancelledError,)


class WrappingErrors(Loan):
    wrapped: type[BaseException] = contract.Failure

    async def __aexit__(self, *raised: Any) -> bool:
        await super().__aexit__(*raised)
        if isinstance(raised[1], self.wrapped):
            raise RuntimeError("something went wrong") from raised[1]
        return False


class WrappingCancellation(WrappingErrors):
    wrapped = asyncio.CancelledError


class LeakingHalfASetUp(Loan):
    async def take(self) -> None:
        await self.shelf.take("first")
        await self.shelf.take("second")


class StoppingAtTheFirstFailure(Loan):
    async def give_back(self) -> None:
        self.shelf.give_back("second")
        self.shelf.give_back("first")


class HidingItsFailure(Loan):
    async def give_back(self) -> None:
        with suppress(OSError):
            self.shelf.give_back_both()


class HidingTheBodysError(Loan):
    async def give_back(self) -> None:
        try:
            self.shelf.give_back_both()
        except OSError:
            raise OSError("could not give the books back") from None


class AcquiringWhenMade(Loan):
    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf)
        shelf.taken += ["first", "second"]

    async def take(self) -> None:
        if self.shelf.stuck == "take second":
            self.shelf.give_back_both()
            raise OSError(self.shelf.stuck)


class RestoringNone(Loan):
    def close(self) -> None:
        current.set(None)
        self.book.is_open = False


class NeverClosed(Book):
    def read(self) -> None: ...


class NeverClosing(Loan):
    gives = NeverClosed


class Erased(Book):
    def read(self) -> None:
        if not self.is_open:
            raise AttributeError("self.connection is None")


class FailingOddlyAfterClose(Loan):
    gives = Erased


class KeepingItsStateOnTheShelf(Loan):
    def open(self) -> Book:
        self.shelf.newest = super().open()
        return self.shelf.newest

    def close(self) -> None:
        assert self.shelf.newest is not None
        self.shelf.newest.is_open = False
        current.reset(self.token)


class OnlyTheNewest(Book):
    def read(self) -> None:
        super().read()
        if self.shelf.newest is not self:
            raise LookupError("the newest book is somebody else's")


class OneGlobalForAll(Loan):
    gives = OnlyTheNewest

    def open(self) -> Book:
        self.before, self.shelf.newest = self.shelf.newest, super().open()
        return self.book

    def close(self) -> None:
        self.shelf.newest = self.before
        super().close()


# --- Broken managers that await in the wrong place ---


class AwaitingBetweenTakingAndTry(Loan):
    async def take(self) -> None:
        await self.shelf.take_both()
        await asyncio.sleep(0)


class LosingWhatWasGranted(Loan):
    async def take(self) -> None:
        await self.shelf.grant()


class AwaitingInCleanup(Loan):
    async def give_back(self) -> None:
        await self.shelf.give_back_slowly()


class ShieldingWithoutWaiting(Loan):
    async def give_back(self) -> None:
        await asyncio.shield(self.shelf.give_back_slowly())


class ShieldingOnce(Loan):
    async def give_back(self) -> None:
        work = asyncio.ensure_future(self.shelf.give_back_slowly())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await work
            raise


class SwallowingACancelOfItsCleanup(Loan):
    async def give_back(self) -> None:
        with suppress(asyncio.CancelledError):
            await to_the_end(self.shelf.give_back_slowly())


class UndoingTheCancellation(Loan):
    async def __aexit__(self, *raised: Any) -> bool:
        if isinstance(raised[1], asyncio.CancelledError) and (task := asyncio.current_task()):
            task.uncancel()
        return await super().__aexit__(*raised)


class NeverAwaitingItsHeartbeat(Loan):
    async def take(self) -> None:
        await super().take()
        self.heartbeat = asyncio.create_task(asyncio.Event().wait(), name="heartbeat")

    def close(self) -> None:
        self.heartbeat.cancel()
        super().close()


# --- The table: which ways out reject which manager ---

Made = Callable[[Shelf], Any]

PLAIN_WAYS = {way.__name__ for way in SYNC_WAYS}
BY_ERRORS = {name for name in PLAIN_WAYS if name.startswith("raises_")}
BY_EXCEPTIONS = {"raises_exception", "raises_stop_iteration"}
LEFT_BY_ERROR_TOO = {"used_after_close", "nested"}
ENTERED = PLAIN_WAYS - {"never_entered", "set_up_fails"}

WAITING = "async_cancelled_while_it_waits"
SERVED = "async_cancelled_just_as_it_is_served"
TWICE = "async_cancelled_twice_anywhere"
ANYIO = "async_cancelled_by_an_anyio_scope"  # cancels again at each turn, so swallowing is no use
SWALLOWED = {WAITING, SERVED, TWICE}
CANCELLED = {*SWALLOWED, ANYIO}

# Of each manager: by these ways, for `with` as for `async with`; and by these, if it awaits.
DEFECTS: dict[Made, tuple[set[str], set[str]]] = {
    LeavingTheVariableSet: (ENTERED, CANCELLED),
    WithoutFinally: (BY_ERRORS | LEFT_BY_ERROR_TOO | {"clean_up_fails_after_an_error"}, CANCELLED),
    ExceptException: (BY_ERRORS - BY_EXCEPTIONS, CANCELLED),
    SwallowingAll: (BY_ERRORS, CANCELLED),
    SwallowingErrors: (BY_EXCEPTIONS, set()),
    SwallowingCancellation: ({"raises_cancelled_error"}, CANCELLED),
    WrappingErrors: ({"raises_exception"} | LEFT_BY_ERROR_TOO, set()),
    WrappingCancellation: ({"raises_cancelled_error"}, CANCELLED),
    LeakingHalfASetUp: ({"set_up_fails"}, SWALLOWED),
    StoppingAtTheFirstFailure: ({"clean_up_fails", "clean_up_fails_after_an_error"}, set()),
    HidingItsFailure: ({"clean_up_fails", "clean_up_fails_after_an_error"}, set()),
    HidingTheBodysError: ({"clean_up_fails_after_an_error"}, set()),
    AcquiringWhenMade: ({"never_entered"}, set()),
    RestoringNone: ({"nested"}, set()),
    NeverClosing: (LEFT_BY_ERROR_TOO, set()),
    FailingOddlyAfterClose: (LEFT_BY_ERROR_TOO, set()),
    KeepingItsStateOnTheShelf: ({"nested", "concurrent"}, set()),
    OneGlobalForAll: ({"concurrent"}, set()),
}
ASYNC_DEFECTS: dict[Made, tuple[set[str], set[str]]] = {
    AwaitingBetweenTakingAndTry: (set(), SWALLOWED),
    LosingWhatWasGranted: (set(), {SERVED}),
    AwaitingInCleanup: (set(), CANCELLED),
    ShieldingWithoutWaiting: (set(), CANCELLED - {SERVED}),
    ShieldingOnce: (set(), {TWICE, ANYIO}),
    SwallowingACancelOfItsCleanup: (set(), SWALLOWED),
    UndoingTheCancellation: (set(), SWALLOWED),
    NeverAwaitingItsHeartbeat: (ENTERED - {"concurrent"}, CANCELLED),
}


def subject_of(manager: Made, waits: bool = True) -> Subject:
    shelf = Shelf(waits)
    return Subject(
        open=lambda: manager(shelf),
        leaks=shelf.leaks,
        use=lambda book: book.read(),
        closed_error=BookClosedError,
        setup_faults=[lambda: shelf.sticks("take second")],
        cleanup_faults=[lambda: shelf.sticks("give back second")],
    )


def plain(manager: Made) -> Subject:
    return subject_of(lambda shelf: Plain(manager(shelf)), waits=False)


def bare(make: Callable[[], Any], leaks: Callable[[], object] = bool, **more: Any) -> Subject:
    """A subject that gives no means to try more than the block itself."""
    faults = {"setup_faults": "it has none", "cleanup_faults": "it has none"}
    return Subject(make, leaks, **({"visible": leaks is not bool} | faults | more))


def rejections(make: Callable[[], Subject], ways: tuple[Way, ...]) -> dict[str, Broken]:
    """The names of the ways that reject the manager, with what they say."""
    found = {}
    for way in ways:
        try:
            # What a broken manager leaves set in a context variable is left in a copy.
            contextvars.copy_context().run(way, make())
        except Broken as error:
            found[way.__name__] = error
        except unittest.SkipTest:
            pass
    return found


def async_way(name: str) -> Way:
    return next(way for way in ASYNC_WAYS if way.__name__ == name)


def test_a_correct_manager_keeps_the_contract() -> None:
    check(lambda: subject_of(by_generator, waits=False))
    check(lambda: plain(Loan))
    for manager in (Loan, Shielding, ReturningWhatWasGranted, by_async_generator):
        check(partial(subject_of, manager))
    check(subject_of(Loan))  # one subject for all ways


@pytest.mark.parametrize("manager", DEFECTS)
def test_the_ways_that_a_manager_forgot_reject_it_and_no_others(manager: Made) -> None:
    expected, _if_it_awaits = DEFECTS[manager]
    assert rejections(partial(plain, manager), SYNC_WAYS).keys() == expected


@pytest.mark.parametrize("manager", DEFECTS | ASYNC_DEFECTS)
def test_the_ways_that_an_async_manager_forgot_reject_it_and_no_others(manager: Made) -> None:
    expected, if_it_awaits = (DEFECTS | ASYNC_DEFECTS)[manager]
    names = {f"async_{name}" for name in expected} | if_it_awaits
    assert rejections(partial(subject_of, manager), ASYNC_WAYS).keys() == names


def test_each_way_rejects_some_broken_manager() -> None:
    rejecting = set[str]().union(*(ways for row in DEFECTS.values() for ways in row))
    assert rejecting == PLAIN_WAYS | CANCELLED
    assert {way.__name__ for way in ASYNC_WAYS} == {f"async_{n}" for n in PLAIN_WAYS} | CANCELLED


def test_an_oracle_that_never_sees_anything_is_rejected() -> None:
    found = rejections(lambda: bare(partial(Loan, Shelf()), lambda: None), ASYNC_WAYS)
    assert found.keys() == {"async_returns", "async_nested"}
    assert found["async_returns"].what == "Loan is open, and `leaks` sees nothing"
    assert "visible=False" in found["async_returns"].remedy


@pytest.mark.parametrize("waits", [False, True])
def test_a_release_of_what_the_outer_block_holds_is_rejected(waits: bool) -> None:
    class ReleasingTwice(Loan):
        async def give_back(self) -> None:
            self.shelf.give_back_both()
            self.shelf.give_back_both()

    def subject() -> Subject:
        shelf = Shelf(waits)
        make = ReleasingTwice if waits else (lambda shelf: Plain(ReleasingTwice(shelf)))
        return bare(partial(make, shelf), lambda: shelf.taken)

    ((name, broken),) = rejections(subject, ASYNC_WAYS if waits else SYNC_WAYS).items()
    assert name == ("async_nested" if waits else "nested")
    assert "is open, but after an inner block `leaks` sees nothing" in broken.what


def test_ten_turns_of_the_event_loop_are_not_a_leak_and_eleven_are() -> None:
    @asynccontextmanager
    async def closing_in(turns: int) -> AsyncIterator[None]:
        held.append(1)
        yield
        release: Callable[[], object] = held.clear
        for _ in range(turns):
            release = partial(asyncio.get_running_loop().call_soon, release)
        release()

    held: list[int] = []
    async_way("async_returns")(bare(lambda: closing_in(10), lambda: held))
    with pytest.raises(Broken, match=r"closing_in left something behind: \[1\]"):
        async_way("async_returns")(bare(lambda: closing_in(11), lambda: held))


# --- What is said ---


def test_a_message_names_the_way_the_manager_the_await_and_the_leak() -> None:
    make = partial(subject_of, AwaitingBetweenTakingAndTry)
    line = inspect.getsourcelines(AwaitingBetweenTakingAndTry.take)[1] + 2
    broken = rejections(make, ASYNC_WAYS)[WAITING]
    assert str(broken).startswith(f"{WAITING}: {broken.what}")
    assert broken.what == (
        f"AwaitingBetweenTakingAndTry left something behind when cancelled while"
        f" it waited in its set-up, at {__file__}:{line} (await asyncio.sleep(0)):"
        " still taken: ['first', 'second']"
    )


def test_a_failure_shows_the_path_that_ran_and_a_remedy_and_no_frame_of_the_contract() -> None:
    taken: list[int] = []

    @contextmanager
    def forgetful() -> Iterator[None]:
        taken.append(1)
        yield
        taken.clear()

    with pytest.raises(Broken) as raised:
        contract.raises_exception(bare(forgetful, lambda: taken))
    assert [line.split() for line in raised.value.path.splitlines()[2:]] == [
        ["def", "forgetful()", "->", "Iterator[None]:"],
        ["1", "taken.append(1)"],
        ["2", "yield"],
        ["taken.clear()"],
    ]
    assert "`finally`" in raised.value.remedy
    shown = str(raised.getrepr())
    assert "the path that ran" in shown
    assert raised.value.remedy in shown
    assert "contract.py:" not in shown.replace("test_contract.py:", "")


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
    remedies = " ".join(str(value) for value in vars(contract).values() if "(chapter" in str(value))
    places = re.findall(r"\(chapter (\d+), demo (\d+)\)", remedies)
    assert {(int(number), int(demo)) for number, demo in places} == TITLES.keys()
    for (number, demo), word in TITLES.items():
        source = chapter_path(number).read_text(encoding="utf-8")
        titles = re.findall(r'(?m)^(?:async )?def demo_\w+.*\n    """(.+)', source)
        assert word in titles[demo - 1], titles


def test_check_raises_every_failure_at_once() -> None:
    with pytest.raises(ExceptionGroup, match="2 of 14 ways out break it") as raised:
        check(lambda: plain(StoppingAtTheFirstFailure))
    names = [str(error).split(":")[0] for error in raised.value.exceptions]
    assert names == ["clean_up_fails", "clean_up_fails_after_an_error"]
    with pytest.raises(ExceptionGroup, match="4 of 18 ways out break it"):
        check(lambda: subject_of(AwaitingInCleanup))


def test_the_wrong_kind_of_manager_is_told_which_ways_are_meant() -> None:
    found = rejections(lambda: subject_of(Loan), SYNC_WAYS)
    assert found.keys() == PLAIN_WAYS
    assert {broken.what for broken in found.values()} == {"Loan is for ASYNC_WAYS"}
    found = rejections(lambda: plain(Loan), ASYNC_WAYS)
    assert found.keys() == {way.__name__ for way in ASYNC_WAYS}
    assert {broken.what for broken in found.values()} == {"Plain is for SYNC_WAYS"}
    with pytest.raises(Broken, match="a plain manager was meant, but something in here awaits"):
        contract.returns(bare(nullcontext, use=lambda value: asyncio.sleep(0)))


def test_the_example_of_the_docstring_judges_a_pool() -> None:
    class ReturnedError(Exception): ...

    class Pool:
        def __init__(self, size: int) -> None:
            self.size, self.in_use = size, 0

        @contextmanager
        def acquire(self) -> Iterator[Any]:
            if self.in_use >= self.size:
                raise LookupError("all are taken")
            self.in_use += 1
            connection = mock.Mock()
            try:
                yield connection
            finally:
                connection.execute.side_effect = ReturnedError
                self.in_use -= released

    code = re.findall(
        r"(?m)^    .*\n", str(contract.__doc__).partition("    python contract.py")[0]
    )
    names = vars(contract) | {"ConnectionReturnedError": ReturnedError, "Pool": Pool}
    names |= {"pytest": pytest, "mock": mock}
    exec("if True:\n" + "".join(code), names)
    released = 1
    assert rejections(names["subject"], SYNC_WAYS) == {}
    for way in set(SYNC_WAYS) - {contract.clean_up_fails, contract.clean_up_fails_after_an_error}:
        names["test_a_pool_keeps_the_cleanup_contract"](way)
    released = 0
    assert rejections(names["subject"], SYNC_WAYS).keys() > BY_ERRORS


# --- What a subject can say ---


def test_a_subject_whose_oracle_reports_a_leak_at_the_start_is_not_judged() -> None:
    subject = bare(nullcontext, lambda: "the leak of another test")
    with pytest.raises(Broken, match="returns: not judged, before it began: the leak of"):
        contract.returns(subject)


def test_a_way_that_the_subject_gives_no_means_to_try_is_skipped() -> None:
    make = partial(bare, nullcontext, nestable=False, concurrent=False)
    found = contract.verdicts(make, SYNC_WAYS)
    reasons = {way.__name__: str(skip) for way, skip in found if skip is not None}
    assert reasons == {
        "set_up_fails": "it has none",
        "clean_up_fails": "it has none",
        "clean_up_fails_after_an_error": "it has none",
        "used_after_close": "the subject has no use",
        "nested": "the subject is not nestable",
        "concurrent": "the subject is not concurrent",
    }


def test_what_a_subject_suppresses_on_purpose_may_be_swallowed() -> None:
    make = partial(bare, partial(suppress, contract.Failure), suppresses=(contract.Failure,))
    assert rejections(make, SYNC_WAYS) == {}

    @asynccontextmanager
    async def shrugging() -> AsyncIterator[None]:
        with suppress(asyncio.CancelledError):
            yield

    make = partial(bare, shrugging, suppresses=(asyncio.CancelledError,))
    assert rejections(make, ASYNC_WAYS) == {}


def test_a_subject_must_give_faults_or_say_why_it_has_none() -> None:
    with pytest.raises(TypeError, match=r"missing 2 required .*'setup_faults' and"):
        Subject(nullcontext, bool)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="needs faults, or a str that says why"):
        bare(nullcontext, setup_faults=[])
    with pytest.raises(TypeError, match="needs faults, or a str that says why"):
        bare(nullcontext, cleanup_faults="")


def test_a_value_without_closed_error_must_stay_usable() -> None:
    contract.used_after_close(bare(nullcontext, use=lambda value: None))
    with pytest.raises(Broken, match="used_after_close: ZeroDivisionError"):
        contract.used_after_close(bare(nullcontext, use=lambda value: 1 / 0))


def test_a_fault_must_strike_and_by_its_own_error() -> None:
    subject = bare(nullcontext, setup_faults=[nullcontext], cleanup_faults=[nullcontext])
    with pytest.raises(Broken, match=r"to fail under setup_faults\[0\], but was entered"):
        contract.set_up_fails(subject)
    with pytest.raises(Broken, match=r"under cleanup_faults\[0\] without a word"):
        contract.clean_up_fails(subject)

    shelf = Shelf(waits=False)
    for error in (OSError, LookupError):
        faults = {
            "setup_faults": [partial(shelf.sticks, "take second", error)],
            "cleanup_faults": [partial(shelf.sticks, "give back second", error)],
        }
        make = partial(bare, partial(by_generator, shelf), shelf.leaks, **faults)
        found = rejections(make, (contract.set_up_fails, contract.clean_up_fails))
        assert len(found) == (0 if error is OSError else 2)
    assert all("not by its <class 'LookupError'>: OSError" in each.what for each in found.values())


# --- No way hangs ---


def hang() -> None:
    """What hangs calls this: the limit must be running, and is brought nearer."""
    left, _interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= 2 * contract.PATIENCE
    signal.setitimer(signal.ITIMER_REAL, 0.05, 1)


# On a busy machine the limit may strike in a weakref's callback, which cannot raise: it strikes
# again a second later.
may_strike_twice = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@may_strike_twice
def test_a_lock_that_is_not_nestable_is_reported(tasks_may_be_abandoned: None) -> None:
    @contextmanager
    def lock() -> Iterator[None]:
        if held.locked():
            hang()
        assert held.acquire(timeout=5)
        try:
            yield
        finally:
            held.release()

    @asynccontextmanager
    async def async_lock() -> AsyncIterator[None]:
        if async_held.locked():
            hang()
        await asyncio.wait_for(async_held.acquire(), 5)
        try:
            yield
        finally:
            async_held.release()

    held, async_held = threading.Lock(), asyncio.Lock()
    found = rejections(lambda: bare(lock, held.locked), (contract.nested,))
    ways = (async_way("async_nested"),)
    found |= rejections(lambda: bare(async_lock, async_held.locked), ways)
    assert found.keys() == {"nested", "async_nested"}
    for broken in found.values():
        assert broken.what.endswith("lock did not end within 10 s")
        assert "nestable=False" in broken.remedy


def test_blocks_that_cannot_be_open_at_once_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "can_interrupt", lambda: False)  # as on Windows
    monkeypatch.setattr(contract, "PATIENCE", 0.02)
    lock, async_lock = threading.Lock(), asyncio.Lock()
    found = rejections(lambda: bare(lambda: lock, lock.locked), (contract.concurrent,))
    ways = (async_way("async_concurrent"),)
    found |= rejections(lambda: bare(lambda: async_lock, async_lock.locked), ways)
    assert found.keys() == {"concurrent", "async_concurrent"}
    for broken in found.values():
        assert "4 blocks could not be open at once: is it concurrent?" in broken.what


@may_strike_twice
def test_a_cleanup_that_hangs_is_reported_by_every_way() -> None:
    ends, limits = threading.Event(), []

    @contextmanager
    def hanging() -> Iterator[None]:
        try:
            yield
        finally:
            limits.append(signal.getitimer(signal.ITIMER_REAL)[0])
            hang()
            ends.wait(5)

    try:
        found = rejections(partial(bare, hanging, at_once=2), SYNC_WAYS)
        assert contract.ways_for(bare(hanging)) == SYNC_WAYS
        assert all(limits)
    finally:
        ends.set()
    assert found.keys() == BY_ERRORS | {"returns", "nested", "concurrent"}
    assert {each.what.partition(">.")[2] for each in found.values()} == {
        "hanging did not end within 10 s"
    }


@may_strike_twice
def test_an_async_cleanup_that_hangs_is_reported(
    monkeypatch: pytest.MonkeyPatch, tasks_may_be_abandoned: None
) -> None:
    @asynccontextmanager
    async def deaf() -> AsyncIterator[None]:
        try:
            yield
        finally:
            if contract.can_interrupt():
                hang()
            await asyncio.wait_for(asyncio.Event().wait(), 5)

    @asynccontextmanager
    async def spinning() -> AsyncIterator[None]:
        try:
            yield
        finally:
            hang()
            for _ in range(10**7):
                pass

    for manager in (deaf, spinning):
        for name in ("async_returns", WAITING, SERVED, TWICE):
            with pytest.raises(Broken, match=f"{manager.__name__} did not end within 10 s"):
                async_way(name)(bare(manager))
    monkeypatch.setattr(contract, "can_interrupt", lambda: False)  # as on Windows
    monkeypatch.setattr(contract, "PATIENCE", 0.02)
    with pytest.raises(Broken, match=r"deaf did not end within 0.02 s when cancelled while"):
        async_way(WAITING)(bare(deaf))


@may_strike_twice
def test_a_manager_that_cannot_even_be_made_is_reported() -> None:
    def make() -> Any:
        hang()
        threading.Event().wait(5)

    with pytest.raises(Broken, match="making the manager did not end within 10 s"):
        contract.returns(bare(make))


def test_awaits_without_an_end_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "MOST_SUSPENSIONS", 5)

    @asynccontextmanager
    async def waiting_for_ever() -> AsyncIterator[None]:
        assert next(made) < 9
        for _ in itertools.count():
            await asyncio.sleep(0)
        yield

    made = itertools.count()
    with pytest.raises(Broken, match="waiting_for_ever was cancelled at 5 awaits, and"):
        async_way(WAITING)(bare(waiting_for_ever))


# --- What is counted, and what is left alone ---


def test_the_nth_await_is_the_same_one_however_long_it_waits(counts: Counter[str]) -> None:
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

    async_way(WAITING)(bare(conversation))
    assert counts == {"ways": 1, "points": 3, "cancellations": 3}  # of set-up, body and cleanup
    async_way(TWICE)(bare(conversation))


def test_an_injection_point_is_an_interruption_of_a_block_that_kept_the_contract(
    counts: Counter[str],
) -> None:
    points = {}
    for way in SYNC_WAYS:
        counts.clear()
        way(subject_of(by_generator, waits=False))
        points[way.__name__] = counts["points"]
    assert counts["cancellations"] == 0
    assert points == dict.fromkeys(PLAIN_WAYS, 0) | dict.fromkeys(BY_ERRORS, 1) | {
        "set_up_fails": 1,
        "clean_up_fails": 1,
        "clean_up_fails_after_an_error": 2,
        "used_after_close": 1,
        "nested": 1,
    }
    counts.clear()
    found = rejections(lambda: subject_of(Loan), (async_way(TWICE), async_way(ANYIO)))
    assert found == {}
    awaits = 3  # two in the set-up, one in the body: a cancelled block waits no more
    assert counts == {"ways": 2, "points": awaits + 1, "cancellations": awaits + 1}
    counts.clear()
    rejections(lambda: subject_of(LeavingTheVariableSet), (async_way(TWICE),))
    rejections(partial(bare, nullcontext), (contract.clean_up_fails,))
    assert counts == {}


def test_a_debuggers_trace_function_is_left_alone() -> None:
    def tracer(frame: object, event: str, argument: object) -> None: ...

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        contract.returns(subject_of(by_generator, waits=False))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


# --- From the command line ---

FILE = """
import signal
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
@contextmanager
def stubborn():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    yield
    signal.pause()
def subject():
    return Subject(
        open=careful, leaks=lambda: held, setup_faults="it counts", cleanup_faults="it counts"
    )
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield file
    sys.modules.pop("mine", None)


def test_a_manager_from_anywhere_is_judged_in_a_table(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contract.main([f"{mine}:subject"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == [way.__name__ for way in SYNC_WAYS]
    assert "✓ nested" in rows
    assert re.search("(?m)^- set_up_fails +not tried: it counts$", "\n".join(rows))
    assert contract.main([f"{mine}:nobody"]) == 2
    assert "has no function 'nobody'" in capsys.readouterr().err
    assert contract.main([]) == 2
    assert "usage: " in capsys.readouterr().err


def test_a_bare_manager_is_judged_by_what_it_leaves_open(mine: Path) -> None:
    command = [sys.executable, contract.__file__, f"{mine}:careless"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    leak = "✗ raises_exception +careless left something behind: .*mine.py"
    assert re.search(leak, ended.stdout)
    assert "the path that ran" in ended.stdout


def test_the_command_line_ends_even_if_nothing_can_interrupt_the_manager(mine: Path) -> None:
    code = f"import contract; contract.GIVE_UP = 0.1; contract.main(['{mine}:stubborn'])"
    folder = Path(contract.__file__).parent
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, timeout=60
    )
    assert ended.returncode == 1
    assert re.search(r'mine.py", line \d+ in stubborn', ended.stderr)
