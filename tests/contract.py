"""The cleanup contract: does a context manager clean up on *every* way out of its block?

A block is not only left at its end. It is left by exceptions that `except Exception` does not
see, by a task's cancellation at any `await` of its set-up, its body or its cleanup, by a set-up
that fails half way, by a cleanup that fails itself. Each *way* below leaves a block in one of
these ways, then asks your oracle whether anything leaked. Describe your manager once:

    def subject() -> Subject:
        pool = Pool(size=2)
        return Subject(
            open=pool.acquire,                           # a new manager at each call
            leaks=lambda: pool.in_use and f"{pool.in_use} connections still taken",
            use=lambda connection: connection.execute("select 1"),
            closed_error=ConnectionReturnedError,        # what `use` raises after the block
        )

Then hold it to every way, each one a test of its own:

    @pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
    def test_a_pool_keeps_the_cleanup_contract(way: Way) -> None:
        way(subject())

ASYNC_WAYS do the same for `async with`, each in an event loop of its own. Without pytest,
`check(subject)` plays all ways and raises one ExceptionGroup of those that failed.

What is demanded: afterwards nothing is left, at once and not "soon"; what the body raised comes
out as the very same object; a failure of cleanup comes out too, and does not hide the body's.
A way that your Subject gives no means to try (no faults, no `use`) raises unittest.SkipTest.

What is left out: signals between two bytecodes, os._exit and kill -9 (nothing in the process
survives these), and real time (there is no sleep in here, and no timing).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import os
import threading
import traceback
import unittest
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import dataclass
from types import CoroutineType
from typing import Any

AnyManager = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
Fault = Callable[[], AbstractContextManager[Any]]

AT_ONCE = 4  # blocks open at the same time, where a subject is concurrent
MOST_SUSPENSIONS = 2000  # more awaits than this are taken for a loop that will never end
PATIENCE = 10.0  # seconds until something that waits is taken for something that hangs
SETTLING = 10  # turns of the event loop in which closed transports let go of their sockets


@dataclass(frozen=True)
class Subject:
    """A manager under examination, and how to see whether it left anything behind."""

    open: Callable[[], AnyManager]  # a new manager at each call; an async one: inside the loop
    leaks: Callable[[], object]  # the oracle: falsy if nothing is left, else what is
    use: Callable[[Any], Any] | None = None  # one use of what `with` gave; may be awaitable
    closed_error: type[Exception] | None = None  # of a use after the block; None: no error
    setup_faults: Sequence[Fault] = ()  # inside each of these contexts entering must fail
    cleanup_faults: Sequence[Fault] = ()  # inside each of these contexts leaving must fail
    suppresses: tuple[type[BaseException], ...] = ()  # what may be swallowed, on purpose
    nestable: bool = True  # may a second block be opened inside the first?
    concurrent: bool = True  # may several threads or tasks have blocks open at once?


class Failure(Exception):
    """What the body of a block raises: an ordinary error."""


class Interruption(BaseException):
    """What the body of a block raises: an error that `except Exception` does not see."""


class Defect(Exception):
    """A manager broke the contract; a way turns this into an AssertionError with its name."""

    def __init__(self, manager: object, what: str) -> None:
        # The generator below @contextmanager says more than the class that it was wrapped in.
        named = getattr(manager, "gen", None) or type(manager)
        super().__init__(f"{named.__qualname__} {what}")


Way = Callable[[Subject], None]


def check(subject: Subject | Callable[[], Subject]) -> None:
    """Play every way that applies; raise one ExceptionGroup of all that failed.

    Give a function that makes the subject if you want each way judged by itself: after a leak
    the oracle of a shared subject goes on reporting it.
    """
    make = subject if callable(subject) else lambda: subject
    ways = ASYNC_WAYS if asyncio.run(is_async(make())) else SYNC_WAYS
    failures = []
    for way in ways:
        try:
            way(make())
        except unittest.SkipTest:
            continue
        except AssertionError as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(ways)} ways out break it", failures)


async def is_async(subject: Subject) -> bool:
    """Open one, to see which it is; and leave it, since it may have acquired something already."""
    manager = subject.open()
    is_async = isinstance(manager, AbstractAsyncContextManager)
    with suppress(Exception):
        if isinstance(manager, AbstractAsyncContextManager):
            async with manager:
                pass
        else:
            with manager:
                pass
    return is_async


# --- What a way is, and how it judges ---


sync_ways: list[Way] = []
async_ways: list[Way] = []


def sync_way(play: Way) -> Way:
    """Enlist a way out of `with`."""
    sync_ways.append(named_in_errors(play))
    return sync_ways[-1]


def async_way(play: Callable[[Subject], Coroutine[Any, Any, None]]) -> Way:
    """Enlist a way out of `async with`, to be played in an event loop of its own."""

    @functools.wraps(play)
    def in_a_loop(subject: Subject) -> None:
        asyncio.run(play(subject))

    async_ways.append(named_in_errors(in_a_loop))
    return async_ways[-1]


def named_in_errors(play: Way) -> Way:
    """What goes wrong in `play` becomes an AssertionError that begins with its name."""

    @functools.wraps(play)
    def way(subject: Subject) -> None:
        if already := subject.leaks():
            raise AssertionError(f"{play.__name__}: not judged, before it began: {already}")
        try:
            play(subject)
        except unittest.SkipTest:
            raise
        except Defect as defect:
            raise AssertionError(f"{play.__name__}: {defect}") from defect.__cause__
        except Exception as error:
            raise AssertionError(f"{play.__name__}: {error!r} came out") from error

    return way


def judge(
    subject: Subject, manager: object, went_in: BaseException | None, came_out: BaseException | None
) -> None:
    """What the body raised must come out, unless the subject says that it may be swallowed."""
    if came_out is None and went_in is not None and not isinstance(went_in, subject.suppresses):
        raise Defect(manager, f"swallowed {went_in!r}")
    if came_out is not None and came_out is not went_in:
        left = "normally" if went_in is None else f"by {went_in!r}"
        raise Defect(manager, f"was left {left}, but {came_out!r} came out") from came_out


def judge_failed_cleanup(
    manager: object, under: str, went_in: BaseException | None, came_out: BaseException | None
) -> None:
    """The failure must come out, and what the body raised must be visible beside it."""
    if came_out is None:
        raise Defect(manager, f"failed to clean up {under} without a word")
    if went_in is not None and not any(went_in is error for error in visible_from(came_out)):
        what = f"failed to clean up {under}: {came_out!r} hides the body's {went_in!r}"
        raise Defect(manager, what) from came_out


def visible_from(error: BaseException) -> Iterator[BaseException]:
    """Every exception that a traceback of `error` shows."""
    yield error
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from visible_from(member)
    shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if shown is not None:
        yield from visible_from(shown)


def nothing_left(subject: Subject, manager: object, how: str = "") -> None:
    """Ask the oracle."""
    if leaked := subject.leaks():
        raise Defect(manager, f"left something behind{how}: {leaked}")


def faults(kind: str, given: Sequence[Fault]) -> Iterator[tuple[str, Fault]]:
    """Each fault with a name for messages; there must be one."""
    only_if(given, f"the subject has no {kind}")
    for number, fault in enumerate(given):
        yield f"under {kind}[{number}]", fault


def only_if(condition: object, reason: str) -> None:
    """Skip a way that this subject is not made for."""
    if not condition:
        raise unittest.SkipTest(reason)


def opened(subject: Subject) -> AbstractContextManager[Any]:
    """A new manager for `with`."""
    manager = subject.open()
    if not isinstance(manager, AbstractContextManager):
        raise Defect(manager, "has no __enter__ and __exit__: are ASYNC_WAYS meant?")
    return manager


def use(subject: Subject, value: object) -> None:
    """Use what `with` gave, once."""
    if subject.use is not None:
        subject.use(value)


# --- The ways out of `with` ---


def leave_by(subject: Subject, error: BaseException | None) -> None:
    """Leave one block by `error`, or normally by None."""
    manager, came_out = opened(subject), None
    try:
        with manager as value:
            use(subject, value)
            if error is not None:
                raise error
    except BaseException as caught:
        came_out = caught
    judge(subject, manager, error, came_out)
    nothing_left(subject, manager)


@sync_way
def returns(subject: Subject) -> None:
    """The body reaches its end."""
    leave_by(subject, None)


@sync_way
def raises_exception(subject: Subject) -> None:
    """The body raises an ordinary error."""
    leave_by(subject, Failure("raised in the body"))


@sync_way
def raises_base_exception(subject: Subject) -> None:
    """The body raises what `except Exception` does not see."""
    leave_by(subject, Interruption("raised in the body"))


@sync_way
def raises_keyboard_interrupt(subject: Subject) -> None:
    """The user presses Ctrl-C."""
    leave_by(subject, KeyboardInterrupt("raised in the body"))


@sync_way
def raises_generator_exit(subject: Subject) -> None:
    """GeneratorExit passes through, in which `yield` is forbidden."""
    leave_by(subject, GeneratorExit("raised in the body"))


@sync_way
def raises_cancelled_error(subject: Subject) -> None:
    """CancelledError passes through: a `with` inside a task that is cancelled."""
    leave_by(subject, asyncio.CancelledError("raised in the body"))


@sync_way
def raises_stop_iteration(subject: Subject) -> None:
    """StopIteration passes through, which a generator would turn into RuntimeError (PEP 479)."""
    leave_by(subject, StopIteration("raised in the body"))


@sync_way
def generator_closed(subject: Subject) -> None:
    """The block stands in a generator that is closed while it is suspended there."""
    manager, came_out = opened(subject), None

    def suspended() -> Generator[None]:
        nonlocal came_out
        try:
            with manager as value:
                use(subject, value)
                yield
        except GeneratorExit as caught:
            came_out = caught
            raise

    generator = suspended()
    next(generator)
    generator.close()
    judge(subject, manager, came_out or GeneratorExit("of generator.close()"), came_out)
    nothing_left(subject, manager)


@sync_way
def set_up_fails(subject: Subject) -> None:
    """Entering fails: what it had acquired by then must be given back."""
    for under, fault in faults("setup_faults", subject.setup_faults):
        manager = None
        with fault():
            try:
                manager = opened(subject)
                with manager:
                    pass
            except Exception:
                pass
            else:
                raise Defect(manager, f"was meant to fail {under}, but was entered")
        nothing_left(subject, manager, f" {under}")


def leave_under(subject: Subject, under: str, fault: Fault, error: BaseException | None) -> None:
    """Leave a block whose cleanup fails."""
    manager, came_out = None, None
    with fault():
        try:
            manager = opened(subject)
            with manager as value:
                use(subject, value)
                if error is not None:
                    raise error
        except BaseException as caught:
            came_out = caught
    judge_failed_cleanup(manager, under, error, came_out)
    nothing_left(subject, manager, f" {under}")


@sync_way
def clean_up_fails(subject: Subject) -> None:
    """Cleanup fails: that must come out, and the rest must be cleaned up all the same."""
    for under, fault in faults("cleanup_faults", subject.cleanup_faults):
        leave_under(subject, under, fault, None)


@sync_way
def clean_up_fails_after_an_error(subject: Subject) -> None:
    """The body fails, then cleanup fails too: neither may hide the other."""
    for under, fault in faults("cleanup_faults", subject.cleanup_faults):
        leave_under(subject, under, fault, Failure("raised in the body"))


@sync_way
def never_entered(subject: Subject) -> None:
    """A manager is made but never entered: it must not have acquired anything."""
    manager = opened(subject)
    nothing_left(subject, manager, " though it was never entered")


@contextlib.contextmanager
def must_be_closed(subject: Subject, manager: object) -> Iterator[None]:
    """What is done inside must raise the closed_error."""
    expected = subject.closed_error or Exception
    try:
        yield
    except expected:
        return
    except Exception as error:
        what = f"raised {error!r} when used after its block, not {expected.__name__}"
        raise Defect(manager, what) from error
    raise Defect(manager, f"could be used after its block: no {expected.__name__} was raised")


@sync_way
def used_after_close(subject: Subject) -> None:
    """What the block gave is used after the block."""
    only_if(subject.use, "the subject has no use")
    for error in (None, Failure("raised in the body")):
        manager = opened(subject)
        with suppress(Failure), manager as value:
            if error is not None:
                raise error
        if subject.closed_error is None:
            use(subject, value)
        else:
            with must_be_closed(subject, manager):
                use(subject, value)
        nothing_left(subject, manager)


@sync_way
def nested(subject: Subject) -> None:
    """A block inside a block, left normally and by an error: the outer one is not disturbed."""
    only_if(subject.nestable, "the subject is not nestable")
    outer = opened(subject)
    with outer as value:
        use(subject, value)
        for error in (None, Failure("raised in the inner body")):
            with suppress(Failure), opened(subject) as inner_value:
                use(subject, inner_value)
                if error is not None:
                    raise error
            use(subject, value)
            if subject.closed_error is not None:
                with must_be_closed(subject, outer):
                    use(subject, inner_value)
    if subject.closed_error is not None:
        with must_be_closed(subject, outer):
            use(subject, value)
    nothing_left(subject, outer)


@sync_way
def concurrent(subject: Subject) -> None:
    """Threads have blocks open at once; half of them leave, and the others go on using theirs."""
    only_if(subject.concurrent, "the subject is not concurrent")
    meeting = threading.Barrier(AT_ONCE, timeout=PATIENCE)
    managers, errors = [], []

    def in_a_thread(leaves_first: bool) -> None:
        try:
            manager = opened(subject)
            managers.append(manager)
            with manager as value:
                meeting.wait()  # all are open
                use(subject, value)
                if not leaves_first:
                    meeting.wait()  # half have left
                    use(subject, value)
            if leaves_first:
                meeting.wait()
            meeting.wait()  # all have left
            nothing_left(subject, manager)  # as seen from this thread's context, too
        except BaseException as error:
            meeting.abort()
            errors.append(error)

    threads = [threading.Thread(target=in_a_thread, args=(n % 2 == 0,)) for n in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise_first(errors, threading.BrokenBarrierError)
    nothing_left(subject, managers[0])


def raise_first(errors: Sequence[BaseException], consequence: type[BaseException]) -> None:
    """Raise the error that made the others give up."""
    causes = [error for error in errors if not isinstance(error, consequence)]
    if causes:
        raise causes[0]
    if errors:
        raise TimeoutError(f"{AT_ONCE} blocks could not be open at once: is it concurrent?")


# --- The ways out of `async with` ---


def opened_async(subject: Subject) -> AbstractAsyncContextManager[Any]:
    """A new manager for `async with`."""
    manager = subject.open()
    if not isinstance(manager, AbstractAsyncContextManager):
        raise Defect(manager, "has no __aenter__ and __aexit__: are SYNC_WAYS meant?")
    return manager


async def use_async(subject: Subject, value: object) -> None:
    """Use what `async with` gave, once."""
    if subject.use is not None:
        result = subject.use(value)
        if inspect.isawaitable(result):
            await result


def other_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of this event loop, without the current one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def nothing_running(manager: object, tasks: set[asyncio.Task[Any]], how: str) -> None:
    """No task of the manager's may go on in the background."""
    if tasks:
        raise Defect(manager, f"was left{how} while its work went on in {tasks}")


async def nothing_left_async(
    subject: Subject,
    manager: object,
    how: str = "",
    context: contextvars.Context | None = None,
) -> None:
    """No task may go on in the background; then ask the oracle, in the context of the block."""
    nothing_running(manager, other_tasks(), how)
    ask = subject.leaks if context is None else functools.partial(context.run, subject.leaks)
    for _ in range(SETTLING):
        if not ask():
            return
        await asyncio.sleep(0)
    if leaked := ask():
        raise Defect(manager, f"left something behind{how}: {leaked}")


async def leave_async_by(subject: Subject, error: BaseException | None) -> None:
    """Leave one block by `error`, or normally by None."""
    manager, came_out = opened_async(subject), None
    try:
        async with manager as value:
            await use_async(subject, value)
            if error is not None:
                raise error
    except BaseException as caught:
        came_out = caught
    judge(subject, manager, error, came_out)
    await nothing_left_async(subject, manager)


@async_way
async def async_returns(subject: Subject) -> None:
    """The body reaches its end."""
    await leave_async_by(subject, None)


@async_way
async def async_raises_exception(subject: Subject) -> None:
    """The body raises an ordinary error."""
    await leave_async_by(subject, Failure("raised in the body"))


@async_way
async def async_raises_base_exception(subject: Subject) -> None:
    """The body raises what `except Exception` does not see."""
    await leave_async_by(subject, Interruption("raised in the body"))


@async_way
async def async_raises_keyboard_interrupt(subject: Subject) -> None:
    """KeyboardInterrupt passes through."""
    await leave_async_by(subject, KeyboardInterrupt("raised in the body"))


@async_way
async def async_raises_generator_exit(subject: Subject) -> None:
    """GeneratorExit passes through."""
    await leave_async_by(subject, GeneratorExit("raised in the body"))


@async_way
async def async_raises_cancelled_error(subject: Subject) -> None:
    """CancelledError passes through, though nobody cancelled this task."""
    await leave_async_by(subject, asyncio.CancelledError("raised in the body"))


@async_way
async def async_raises_stop_iteration(subject: Subject) -> None:
    """StopIteration and StopAsyncIteration pass through; a generator would turn them."""
    await leave_async_by(subject, StopIteration("raised in the body"))
    await leave_async_by(subject, StopAsyncIteration("raised in the body"))


@async_way
async def async_generator_closed(subject: Subject) -> None:
    """The block stands in an async generator that is closed while it is suspended there."""
    manager, came_out = opened_async(subject), None

    async def suspended() -> AsyncGenerator[None]:
        nonlocal came_out
        try:
            async with manager as value:
                await use_async(subject, value)
                yield
        except GeneratorExit as caught:
            came_out = caught
            raise

    generator = suspended()
    await anext(generator)
    await generator.aclose()
    judge(subject, manager, came_out or GeneratorExit("of generator.aclose()"), came_out)
    await nothing_left_async(subject, manager)


@async_way
async def async_set_up_fails(subject: Subject) -> None:
    """Entering fails: what it had acquired by then must be given back."""
    for under, fault in faults("setup_faults", subject.setup_faults):
        manager = None
        with fault():
            try:
                manager = opened_async(subject)
                async with manager:
                    pass
            except Exception:
                pass
            else:
                raise Defect(manager, f"was meant to fail {under}, but was entered")
        await nothing_left_async(subject, manager, f" {under}")


async def leave_async_under(
    subject: Subject, under: str, fault: Fault, error: BaseException | None
) -> None:
    """Leave a block whose cleanup fails."""
    manager, came_out = None, None
    with fault():
        try:
            manager = opened_async(subject)
            async with manager as value:
                await use_async(subject, value)
                if error is not None:
                    raise error
        except BaseException as caught:
            came_out = caught
    judge_failed_cleanup(manager, under, error, came_out)
    await nothing_left_async(subject, manager, f" {under}")


@async_way
async def async_clean_up_fails(subject: Subject) -> None:
    """Cleanup fails: that must come out, and the rest must be cleaned up all the same."""
    for under, fault in faults("cleanup_faults", subject.cleanup_faults):
        await leave_async_under(subject, under, fault, None)


@async_way
async def async_clean_up_fails_after_an_error(subject: Subject) -> None:
    """The body fails, then cleanup fails too: neither may hide the other."""
    for under, fault in faults("cleanup_faults", subject.cleanup_faults):
        await leave_async_under(subject, under, fault, Failure("raised in the body"))


@async_way
async def async_never_entered(subject: Subject) -> None:
    """A manager is made but never entered: it must not have acquired anything."""
    manager = opened_async(subject)
    await nothing_left_async(subject, manager, " though it was never entered")


@async_way
async def async_used_after_close(subject: Subject) -> None:
    """What the block gave is used after the block."""
    only_if(subject.use, "the subject has no use")
    for error in (None, Failure("raised in the body")):
        manager = opened_async(subject)
        with suppress(Failure):
            async with manager as value:
                if error is not None:
                    raise error
        if subject.closed_error is None:
            await use_async(subject, value)
        else:
            with must_be_closed(subject, manager):
                await use_async(subject, value)
        await nothing_left_async(subject, manager)


@async_way
async def async_nested(subject: Subject) -> None:
    """A block inside a block, left normally and by an error: the outer one is not disturbed."""
    only_if(subject.nestable, "the subject is not nestable")
    outer = opened_async(subject)
    async with outer as value:
        await use_async(subject, value)
        for error in (None, Failure("raised in the inner body")):
            with suppress(Failure):
                async with opened_async(subject) as inner_value:
                    await use_async(subject, inner_value)
                    if error is not None:
                        raise error
            await use_async(subject, value)
            if subject.closed_error is not None:
                with must_be_closed(subject, outer):
                    await use_async(subject, inner_value)
    if subject.closed_error is not None:
        with must_be_closed(subject, outer):
            await use_async(subject, value)
    await nothing_left_async(subject, outer)


@async_way
async def async_concurrent(subject: Subject) -> None:
    """Tasks have blocks open at once; half of them leave, and the others go on using theirs."""
    only_if(subject.concurrent, "the subject is not concurrent")
    meeting = asyncio.Barrier(AT_ONCE)
    managers = []

    async def in_a_task(leaves_first: bool) -> None:
        try:
            manager = opened_async(subject)
            managers.append(manager)
            async with manager as value:
                await meeting.wait()  # all are open
                await use_async(subject, value)
                if not leaves_first:
                    await meeting.wait()  # half have left
                    await use_async(subject, value)
            if leaves_first:
                await meeting.wait()
            await meeting.wait()  # all have left
            nothing_left(subject, manager)  # as seen from this task's context, too
        except BaseException:
            await meeting.abort()
            raise

    tasks = [asyncio.create_task(in_a_task(n % 2 == 0)) for n in range(AT_ONCE)]
    _, hanging = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in hanging:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [error for error in ended if isinstance(error, BaseException)]
    raise_first(errors, asyncio.CancelledError if hanging else asyncio.BrokenBarrierError)
    await nothing_left_async(subject, managers[0])


# --- Cancellation at every await ---


class Cancelling:
    """Awaits a coroutine, counts its suspensions, and cancels its task at the chosen ones.

    Suspensions are counted, not turns of the event loop: the n-th is the same `await` in every
    run, however long the coroutine waits there for a socket or a child process.

    At such an `await` there are two moments at which a cancel differs. While it still waits: the
    cancel ends the waiting. And just after it was served (`late`), before the task learned of it:
    the connection, the lock, the GPU is already granted, and CancelledError arrives in its place.
    """

    def __init__(self, subject: Subject, when: Callable[[int, str], bool], late: bool) -> None:
        self.subject = subject
        self.manager: object = None
        self.when = when
        self.late = late
        self.phase = "set-up"
        self.suspensions = 0
        self.cancels: list[tuple[str, BaseException | None]] = []
        self.still_running: set[asyncio.Task[Any]] = set()

    async def block(self) -> None:
        """The block whose ways out are examined."""
        self.manager = manager = opened_async(self.subject)
        async with manager as value:
            try:
                self.phase = "body"
                await use_async(self.subject, value)
                await asyncio.sleep(0)
            finally:
                self.phase = "cleanup"

    def __await__(self) -> Generator[Any, Any, None]:
        block: CoroutineType[Any, Any, None] = self.block()  # type: ignore[assignment]
        resume: Callable[[], Any] = functools.partial(block.send, None)
        while True:
            try:
                awaited = resume()
            except StopIteration:
                return
            cancels = self.when(self.suspensions, self.phase)
            self.suspensions += 1
            if cancels:
                self.cancels.append((self.phase, None))
                self.cancel(awaited)
            try:
                answer = yield awaited
                resume = functools.partial(block.send, answer)
            except BaseException as error:
                if cancels:
                    self.cancels[-1] = (self.cancels[-1][0], error)
                resume = functools.partial(block.throw, error)

    def cancel(self, awaited: Any) -> None:
        """Cancel the task now, while it goes to sleep, or as soon as `awaited` is done."""
        task = asyncio.current_task()
        assert task is not None
        if self.late and asyncio.isfuture(awaited):
            # subtle: callbacks run in the order in which they were added, so this one runs
            # before the task's own, that is, before the task wakes up.
            awaited.add_done_callback(lambda done: task.cancel())
        else:
            task.cancel()

    def story(self) -> str:
        """Where the cancels struck, for a message."""
        if not self.cancels:
            return ", never cancelled"
        moment = "just as it was served" if self.late else "while it waited"
        places = [f"in its {phase}{place_of(error)}" for phase, error in self.cancels]
        return f" when cancelled {moment} {' and again '.join(places)}"


def place_of(error: BaseException | None) -> str:
    """The innermost line of the user's own code that a cancellation went through."""
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    foreign = (__file__, contextlib.__file__, os.path.dirname(asyncio.__file__))
    own = [frame for frame in frames if not frame.filename.startswith(foreign)]
    return f", at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


async def cancel(subject: Subject, when: Callable[[int, str], bool], late: bool = False) -> int:
    """Run a block, cancel it `when`, judge what came out; return how often it was cancelled."""
    run = Cancelling(subject, when, late)
    others = asyncio.all_tasks()  # the contract's own

    async def awaiting() -> None:
        try:
            await run
        finally:
            run.still_running = other_tasks() - others

    context = contextvars.copy_context()
    task = asyncio.get_running_loop().create_task(awaiting(), context=context)
    await asyncio.wait({task}, timeout=PATIENCE)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE)
        raise Defect(run.manager, f"did not end within {PATIENCE} s{run.story()}")
    judge_cancelled(run, task)
    nothing_running(run.manager, run.still_running, run.story())
    await nothing_left_async(subject, run.manager, run.story(), context)
    return len(run.cancels)


def judge_cancelled(run: Cancelling, task: asyncio.Task[None]) -> None:
    """A cancelled task must end as cancelled, and one that was not must end well."""
    if task.cancelled() and run.cancels:
        return
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if isinstance(error, Defect):
        raise error
    if error is not None:
        raise Defect(run.manager, f"let {error!r} out{run.story()}") from error
    if run.cancels and not issubclass(asyncio.CancelledError, run.subject.suppresses):
        raise Defect(run.manager, f"swallowed CancelledError{run.story()}")


def bounded_count(subject: Subject) -> Iterator[int]:
    """0, 1, 2, ... up to the number at which waiting for the end makes no sense."""
    yield from range(MOST_SUSPENSIONS)
    what = f"was cancelled at {MOST_SUSPENSIONS} awaits, and there is still no end of them"
    raise Defect(subject.open(), what)


@async_way
async def async_cancelled_while_it_waits(subject: Subject) -> None:
    """Cancelled at the first await of set-up, body or cleanup; at the second; and so on."""
    for nth in bounded_count(subject):
        if not await cancel(subject, lambda n, phase, nth=nth: n == nth):  # type: ignore[misc]
            return


@async_way
async def async_cancelled_just_as_it_is_served(subject: Subject) -> None:
    """Cancelled when what it waited for was granted already, at every await."""
    for nth in bounded_count(subject):
        if not await cancel(subject, lambda n, phase, nth=nth: n == nth, late=True):  # type: ignore[misc]
            return


@async_way
async def async_cancelled_again_while_it_cleans_up(subject: Subject) -> None:
    """Cancelled in its body, then once more at every await of the cleanup that follows."""
    for nth in bounded_count(subject):
        first: list[int] = []

        def when(n: int, phase: str, nth: int = nth, first: list[int] = first) -> bool:
            if not first and phase == "body":
                first.append(n)
                return True
            return bool(first) and n == first[0] + 1 + nth

        if await cancel(subject, when) < 2:
            return


@async_way
async def async_cancelled_twice_anywhere(subject: Subject) -> None:
    """Cancelled at every await, then once more at every await after that: all pairs.

    The number of runs is the square of the awaits: a subject that starts a process for each of
    them may have to leave this way out.
    """
    for nth in bounded_count(subject):
        for later in bounded_count(subject):
            chosen = (nth, nth + 1 + later)
            cancels = await cancel(subject, lambda n, phase, chosen=chosen: n in chosen)  # type: ignore[misc]
            if cancels == 0:
                return
            if cancels == 1:
                break


SYNC_WAYS = tuple(sync_ways)
ASYNC_WAYS = tuple(async_ways)
