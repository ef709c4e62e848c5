"""The cleanup contract: does a context manager clean up on *every* way out of its block?

A block is not only left at its end. It is left by exceptions that `except Exception` does not
see, by a cancellation at any `await` of set-up, body or cleanup, by a set-up that fails half way,
by a cleanup that fails itself. Each *way* below does one of these, then asks your oracle whether
anything leaked. Describe your manager once:

    def subject():
        pool = Pool(size=4)
        return Subject(
            open=pool.connection,
            leaks=lambda: pool.in_use,
            setup_faults=[lambda: patch.object(pool, "size", 0)],  # now entering must fail
            cleanup_faults="it only counts: nothing in it can fail",
        )

Then hold it to every way, each one a test, with a new pool:

    @pytest.mark.parametrize("way", SYNC_WAYS)
    def test_the_connection_is_released(way):
        way(subject())

ASYNC_WAYS do the same for `async with`, in a new event loop each. Without pytest, `check(subject)`
plays all ways and raises one ExceptionGroup of those that failed. And

    python contract.py some/file.py:subject

prints a table: each way, the verdict, and what leaked. `subject` may also make a bare manager;
then open descriptors and threads are what can leak.

What is demanded: afterwards nothing is left; what the body raised comes out as the very same
object; a failure of cleanup comes out too, and does not hide the body's. (After `async with`, the
event loop may turn ten times before the oracle is asked: a transport closes its socket so.) While
a block is open, the oracle must see something: one that never does proves nothing.
A way that your Subject gives no means to try (no `use`, words for faults) raises SkipTest.

Left out: signals between two bytecodes, os._exit and kill -9 (nothing in the process survives
these), and real time (there is no sleep in here, and no timing; only a limit for what hangs).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import faulthandler
import functools
import inspect
import itertools
import os
import runpy
import signal
import sys
import sysconfig
import threading
import traceback
import types
import unittest
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence, Set
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

__tracebackhide__ = True  # pytest shows your lines, not these
AnyManager = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
# Inside this context, entering (or leaving) must fail. It may yield the error that must come out.
Fault = Callable[[], AbstractContextManager[Any]]
Body = Callable[[Any], Awaitable[None]]
Play = Callable[["Subject"], Coroutine[Any, Any, None]]  # one way, for either kind of block

MOST_SUSPENSIONS = 2000  # more awaits than this are taken for a loop that will never end
PATIENCE = 10.0  # seconds until something that waits is taken for something that hangs
GIVE_UP = 120.0  # seconds until `main` ends the process, if a way cannot be interrupted
THREAD = "contract"  # the name of the contract's own threads
SETTLING = 10  # turns of the event loop in which closed transports let go of their sockets


@dataclass(frozen=True)
class Subject:
    """A manager under examination, and how to see whether it left anything behind."""

    open: Callable[[], AnyManager]  # a new manager at each call; an async one: inside the loop
    leaks: Callable[[], object]  # the oracle: falsy if nothing is left, else what is
    use: Callable[[Any], Any] | None = None  # one use of what `with` gave; may be awaitable
    closed_error: type[Exception] | None = None  # of a use after the block; None: no error
    setup_faults: Sequence[Fault] | str = field(kw_only=True)  # or why entering cannot fail
    cleanup_faults: Sequence[Fault] | str = field(kw_only=True)  # or why leaving cannot fail
    suppresses: tuple[type[BaseException], ...] = ()  # what may be swallowed, on purpose
    nestable: bool = True  # may a second block be opened inside the first?
    concurrent: bool = True  # may several threads or tasks have blocks open at once?
    at_once: int = 4  # how many blocks are opened at once, if it is concurrent
    visible: bool = True  # does the oracle see an open block? False for one that holds nothing

    def __post_init__(self) -> None:
        if not self.setup_faults or not self.cleanup_faults:
            raise TypeError("Subject needs faults, or a str that says why it can have none")


class Failure(Exception):
    """What the body of a block raises: an ordinary error."""


class Hang(BaseException):
    """Raised in what does not end within PATIENCE seconds."""


class Defect(Exception):
    """The manager broke the contract; a way turns this into an AssertionError with its name."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{name_of(Run.manager)} {what}")
        self.remedy = remedy


Way = Callable[[Subject], None]


def check(subject: Subject | Callable[[], Subject]) -> None:
    """Play every way that applies; raise one ExceptionGroup of all that failed.

    Give a function that makes the subject if you want each way judged by itself: after a leak
    the oracle of a shared subject goes on reporting it.
    """
    make = subject if callable(subject) else lambda: subject
    found = [verdict(way, make()) for way in ways_for(make())]
    failures = [each for each in found if isinstance(each, Broken)]
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(found)} ways out break it", failures)


def verdict(way: Way, subject: Subject) -> Broken | unittest.SkipTest | None:
    """Play a way; return what it raised."""
    try:
        way(subject)
    except (Broken, unittest.SkipTest) as found:
        return found
    return None


def ways_for(subject: Subject) -> Sequence[Way]:
    """Return the ways out of the kind of block that the subject opens."""
    is_async = isinstance(first_of(subject.open), AbstractAsyncContextManager)
    return ASYNC_WAYS if is_async else SYNC_WAYS


def first_of(make: Callable[[], Any]) -> Any:
    """Make the first one, in an event loop, since some need one; enter and leave a manager."""
    made: list[Any] = []

    async def look() -> None:
        made.append(make())
        if not isinstance(made[0], Subject):
            await leave(made[0])  # it may have acquired something already

    with suppress(Hang), time_limit():  # if it hangs, its ways will tell
        asyncio.run(look())
    return made[0]


# --- What a way is: written once, for `with` and `async with` ---


class Broken(AssertionError):
    """What a way raises if the manager broke the contract."""

    def __init__(self, way: str, what: str, path: str = "", remedy: str = "") -> None:
        parts = [f"{way}: {what}", path, remedy]
        super().__init__("\n\n".join(part for part in parts if part))
        self.what, self.path, self.remedy = what, path, remedy


class Run:
    """The way that is played now: its manager, the lines of your code that ran, what it tried."""

    manager: object
    lines: list[tuple[types.CodeType, int]]
    tried: collections.Counter[str]


SYNC_WAYS: list[Way] = []
ASYNC_WAYS: list[Way] = []

# What was tried in this process and kept the contract: managers by name, and the number of "ways",
# of "points" (an exception in the body, a fault, a cancellation), of "cancellations" among these.
managers: set[str] = set()
counts: collections.Counter[str] = collections.Counter()


def way(remedy: str, sync: bool = True) -> Callable[[Play], Way]:
    """Enlist a way out of `with` and of `async with`; `remedy` helps if it finds a defect."""

    def enlist(play: Play) -> Way:
        named = judged(play, asyncio.run, remedy)
        ASYNC_WAYS.append(named)
        if not sync:
            return named
        named.__name__ = named.__qualname__ = f"async_{play.__name__}"
        SYNC_WAYS.append(judged(play, drive, remedy))
        return SYNC_WAYS[-1]

    return enlist


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what never waits, since its manager is a plain one."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    coroutine.close()
    raise TypeError("a plain manager was meant, but something in here awaits")


def judged(play: Play, run: Callable[[Coroutine[Any, Any, None]], None], remedy: str) -> Way:
    """Return the way: whatever goes wrong in it becomes a Broken that begins with its name."""

    @functools.wraps(play)
    def judged_way(subject: Subject) -> None:
        name = judged_way.__name__
        if already := subject.leaks():
            raise Broken(name, f"not judged, before it began: {already}")
        Run.manager, Run.lines, Run.tried = None, [], collections.Counter()
        try:
            with time_limit(), recorded_lines():
                run(play(subject))
        except unittest.SkipTest:
            raise
        except Defect as defect:
            helps = defect.remedy or remedy
            raise Broken(name, str(defect), path_that_ran(), helps) from defect.__cause__
        except Hang:
            what = f"{name_of(Run.manager)} did not end within {PATIENCE:g} s"
            raise Broken(name, what, path_that_ran(), HANGS) from None
        except (Exception, BaseExceptionGroup) as error:
            raise Broken(name, f"{error!r} came out", path_that_ran(), remedy) from error
        managers.add(name_of(Run.manager))
        counts.update(Run.tried, ways=1)

    return judged_way


def opened(subject: Subject) -> AnyManager:
    """Return a new manager; its time and its path begin now."""
    in_time()
    Run.lines = []
    Run.manager = manager = subject.open()
    kind = AbstractAsyncContextManager if in_a_loop() else AbstractContextManager
    if not isinstance(manager, kind):
        ways = "ASYNC_WAYS" if isinstance(manager, AbstractAsyncContextManager) else "SYNC_WAYS"
        raise Defect(f"is for {ways}", "`with` and `async with` have ways of their own.")
    return manager


def in_a_loop() -> bool:
    """Return whether this is a way out of `async with`."""
    return asyncio._get_running_loop() is not None


async def do_nothing(value: object) -> None: ...


async def leave(
    manager: AnyManager, body: Body = do_nothing, error: BaseException | None = None
) -> BaseException | None:
    """Open a block, run `body` in it, leave it by `error`; return what came out."""
    if error is not None:
        Run.tried["points"] += 1
    try:
        if isinstance(manager, AbstractAsyncContextManager):
            async with manager as value:
                await body(value)
                if error is not None:
                    raise error
        else:
            with manager as value:
                await body(value)
                if error is not None:
                    raise error
    except (Defect, Hang):
        raise
    except BaseException as came_out:
        return came_out
    return None


def pass_on(came_out: BaseException | None, expected: BaseException | None) -> None:
    """Raise what came out of a block, unless it was to be expected."""
    if came_out is not None and came_out is not expected:
        raise came_out


async def use(subject: Subject, value: object) -> None:
    """Use what the block gave, once."""
    if subject.use is not None:
        await result_of(subject.use(value))


async def result_of(value: object) -> None:
    """Await what may be awaitable."""
    if inspect.isawaitable(value):
        await value


# --- What is demanded ---


def judge(subject: Subject, went_in: BaseException | None, came_out: BaseException | None) -> None:
    """What the body raised must come out, unless the subject says that it may be swallowed."""
    if came_out is None and went_in is not None and not isinstance(went_in, subject.suppresses):
        raise Defect(f"swallowed {went_in!r}", SWALLOWS)
    if came_out is not None and came_out is not went_in:
        left = "normally" if went_in is None else f"by {went_in!r}"
        raise Defect(f"was left {left}, but {came_out!r} came out") from came_out


def visible_from(error: BaseException) -> Iterator[BaseException]:
    """Every exception that a traceback of `error` shows."""
    yield error
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from visible_from(member)
    shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if shown is not None:
        yield from visible_from(shown)


def must_show(expected: object, came_out: BaseException, under: str) -> None:
    """The error that a fault promises must come out, or be visible beside what did."""
    if not isinstance(expected, BaseException | type):
        return
    kind = expected if isinstance(expected, type) else ()
    if not any(error is expected or isinstance(error, kind) for error in visible_from(came_out)):
        raise Defect(f"failed {under}, but not by its {expected!r}: {came_out!r}") from came_out


def nothing_running(tasks: Set[asyncio.Task[Any] | None], how: str) -> None:
    """No task of the manager's may go on in the background."""
    if tasks:
        raise Defect(f"was left{how} while its work went on in {tasks}")


async def nothing_left(
    subject: Subject, how: str = "", context: contextvars.Context | None = None
) -> None:
    """No task may go on in the background; then ask the oracle, in the context of the block."""
    ask = subject.leaks if context is None else functools.partial(context.run, subject.leaks)
    if in_a_loop():
        nothing_running(asyncio.all_tasks() - {asyncio.current_task()}, how)
        for _turn in range(SETTLING):
            if not ask():
                return
            await asyncio.sleep(0)
    if leaked := ask():
        raise Defect(f"left something behind{how}: {leaked}")


def must_see(subject: Subject, what: str) -> None:
    """While a block is open, the oracle must see something."""
    if subject.visible and not subject.leaks():
        raise Defect(what, BLIND)


async def use_after(subject: Subject, value: object) -> None:
    """Use what a block gave after that block: this must raise the closed_error, if it has one."""
    expected = subject.closed_error
    try:
        await use(subject, value)
    except Exception as error:
        if expected is None:
            raise
        if not isinstance(error, expected):
            what = f"raised {error!r} when used after its block, not {expected.__name__}"
            raise Defect(what) from error
        return
    if expected is not None:
        raise Defect(f"could be used after its block: no {expected.__name__} was raised")


def faults(kind: str, given: Sequence[Fault] | str) -> Iterator[tuple[str, Fault]]:
    """Each fault with a name for messages; skip if there is a reason for none."""
    if isinstance(given, str):
        raise unittest.SkipTest(given)
    for number, fault in enumerate(given):
        Run.tried["points"] += 1
        yield f"under {kind}[{number}]", fault


# --- The ways out ---

IN_FINALLY = "Release in `finally` or `__exit__` (chapter 01, demo 3)."
NOT_EXCEPT = "`except Exception` does not see it: release in `finally` (chapter 01, demo 3)."
SWALLOWS = "Let `__exit__` return a true value only to suppress on purpose (chapter 01, demo 5)."
ONE_BY_ONE = "Give each release a `finally` of its own, or an `ExitStack` (chapter 07, demo 4)."
FINISH = "Cleanup that awaits needs `finish`, or no `await` (chapter 03, demo 7)."
BLIND = "Let `leaks` see what an open block holds; if it holds nothing, say visible=False."
PASSES_CANCEL = "Catch CancelledError only to clean up, then `raise` (chapter 03, demo 7)."
HANGS = "Is it nestable? concurrent? If not: Subject(nestable=False, concurrent=False)."


async def leave_by(subject: Subject, error: BaseException | None) -> None:
    """Leave one block by `error`, or normally by None."""
    came_out = await leave(opened(subject), functools.partial(use, subject), error)
    judge(subject, error, came_out)
    await nothing_left(subject)


@way(IN_FINALLY)
async def returns(subject: Subject) -> None:
    """The body reaches its end."""

    async def body(value: object) -> None:
        await use(subject, value)
        must_see(subject, "is open, and `leaks` sees nothing")

    judge(subject, None, await leave(opened(subject), body))
    await nothing_left(subject)


@way(IN_FINALLY)
async def raises_exception(subject: Subject) -> None:
    """The body raises an ordinary error."""
    await leave_by(subject, Failure("raised in the body"))


@way(NOT_EXCEPT)
async def raises_base_exception(subject: Subject) -> None:
    """The body raises what `except Exception` does not see."""
    await leave_by(subject, BaseException("raised in the body"))


@way(NOT_EXCEPT)
async def raises_keyboard_interrupt(subject: Subject) -> None:
    """The user presses Ctrl-C."""
    await leave_by(subject, KeyboardInterrupt("raised in the body"))


@way(NOT_EXCEPT)
async def raises_generator_exit(subject: Subject) -> None:
    """GeneratorExit passes through, in which `yield` is forbidden."""
    await leave_by(subject, GeneratorExit("raised in the body"))


@way(NOT_EXCEPT)
async def raises_cancelled_error(subject: Subject) -> None:
    """CancelledError passes through, though nobody cancelled this task."""
    await leave_by(subject, asyncio.CancelledError("raised in the body"))


@way("Let it pass on unchanged: see what `@contextmanager` does (chapter 01, demo 6).")
async def raises_stop_iteration(subject: Subject) -> None:
    """StopIteration passes through, which a generator would turn into RuntimeError (PEP 479)."""
    await leave_by(subject, StopIteration("raised in the body"))
    if in_a_loop():
        await leave_by(subject, StopAsyncIteration("raised in the body"))


@way("Release what is held already: an `ExitStack` does so (chapter 07, demo 1).")
async def set_up_fails(subject: Subject) -> None:
    """Entering fails: what it had acquired by then must be given back."""
    for under, fault in faults("setup_faults", subject.setup_faults):
        with fault() as expected:
            try:
                came_out = await leave(opened(subject))
            except Defect:
                raise
            except Exception as error:  # some fail when they are made
                came_out = error
            if came_out is None:
                raise Defect(f"was meant to fail {under}, but was entered")
            must_show(expected, came_out, under)
        await nothing_left(subject, f" {under}")


async def leave_under_faults(subject: Subject, error: BaseException | None) -> None:
    """Cleanup fails: that must come out, and the body's error be visible."""
    for under, fault in faults("cleanup_faults", subject.cleanup_faults):
        with fault() as expected:
            came_out = await leave(opened(subject), functools.partial(use, subject), error)
        if came_out is None:
            raise Defect(f"failed to clean up {under} without a word")
        if error is not None and error not in visible_from(came_out):
            what = f"failed to clean up {under}: {came_out!r} hides the body's {error!r}"
            raise Defect(what) from came_out
        must_show(expected, came_out, under)
        await nothing_left(subject, f" {under}")


@way(ONE_BY_ONE)
async def clean_up_fails(subject: Subject) -> None:
    """Cleanup fails: that must come out, and the rest must be cleaned up all the same."""
    await leave_under_faults(subject, None)


@way(ONE_BY_ONE)
async def clean_up_fails_after_an_error(subject: Subject) -> None:
    """The body fails, then cleanup fails too: neither may hide the other."""
    await leave_under_faults(subject, Failure("raised in the body"))


@way("Acquire in `__enter__` or below `def`, not in `__init__` (chapter 01, demo 1).")
async def never_entered(subject: Subject) -> None:
    """A manager is made but never entered: it must not have acquired anything."""
    opened(subject)  # kept in Run, so that its deletion does not release it in time
    await nothing_left(subject, " though it was never entered")


@way("Mark it as closed in the cleanup, and check that at each use (chapter 02, demo 1).")
async def used_after_close(subject: Subject) -> None:
    """What the block gave is used after the block."""
    if subject.use is None:
        raise unittest.SkipTest("the subject has no use")
    given: list[object] = []

    async def keep(value: object) -> None:
        given.append(value)

    for error in (None, Failure("raised in the body")):
        pass_on(await leave(opened(subject), keep, error), error)
        await use_after(subject, given[-1])
        await nothing_left(subject)


@way("Restore what was there before, not None: keep the token (chapter 04, demo 2).")
async def nested(subject: Subject) -> None:
    """A block inside a block, left normally and by an error: the outer one is not disturbed."""
    if not subject.nestable:
        raise unittest.SkipTest("the subject is not nestable")
    given: list[object] = []

    async def inner_body(value: object) -> None:
        given.append(value)
        await use(subject, value)

    async def body(value: object) -> None:
        await use(subject, value)
        for error in (None, Failure("raised in the inner body")):
            pass_on(await leave(subject.open(), inner_body, error), error)
            must_see(subject, "is open, but after an inner block `leaks` sees nothing")
            await use(subject, value)
            await use_after(subject, given[-1])
        given.append(value)

    pass_on(await leave(opened(subject), body), None)
    await use_after(subject, given[-1])
    await nothing_left(subject)


@way("Keep the state of a block in the block, or in a ContextVar (chapter 04, demo 1).")
async def concurrent(subject: Subject) -> None:
    """Threads or tasks have blocks open at once; half leave, the others go on using theirs."""
    if not subject.concurrent:
        raise unittest.SkipTest("the subject is not concurrent")
    meeting: Any = threading.Barrier(subject.at_once, timeout=PATIENCE)
    if in_a_loop():
        meeting = asyncio.Barrier(subject.at_once)
    errors: list[BaseException] = []

    async def take_part(leaves_first: bool) -> None:
        async def body(value: object) -> None:
            await result_of(meeting.wait())  # all are open
            await use(subject, value)
            if not leaves_first:
                await result_of(meeting.wait())  # half have left
                await use(subject, value)

        try:
            pass_on(await leave(opened(subject), body), None)
            if leaves_first:
                await result_of(meeting.wait())
            await result_of(meeting.wait())  # all have left
            if leaked := subject.leaks():  # as seen from this thread's or task's context, too
                raise Defect(f"left something behind: {leaked}")
        except BaseException as error:
            errors.append(error)
            await result_of(meeting.abort())

    parts = [take_part(leaves_first=number % 2 == 0) for number in range(subject.at_once)]
    await play_at_once(parts)
    broken = threading.BrokenBarrierError | asyncio.BrokenBarrierError
    for error in errors:
        if not isinstance(error, broken | asyncio.CancelledError):  # these follow from the others
            raise error
    if errors:
        what = f"{subject.at_once} blocks could not be open at once"
        raise TimeoutError(f"{what}: is it concurrent? Is at_once right?")
    await nothing_left(subject)


async def play_at_once(parts: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Play each part in a task, and cancel those that hang; or in a thread."""
    if in_a_loop():
        tasks = [asyncio.create_task(part) for part in parts]
        _done, hanging = await asyncio.wait(tasks, timeout=PATIENCE)
        for task in hanging:
            task.cancel()
        await asyncio.wait(tasks)
        return
    Thread = functools.partial(threading.Thread, name=THREAD, target=drive, daemon=True)
    threads = [Thread(args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- Cancellation at every await ---


@dataclass
class Cancelling:
    """Runs a block as its task would, and cancels that task `at` some of its awaits, by number.

    The n-th await is the same one in each run, however long the coroutine waits there for a
    socket or a child process.

    At such an `await` there are two moments at which a cancel differs. While it still waits: the
    cancel ends the waiting. And just after it was served (`late`), before the task learned of it:
    the connection, the lock, the GPU is already granted, and CancelledError arrives in its place.
    """

    subject: Subject
    at: Sequence[int]
    late: bool
    phase: str = "set-up"
    cancels: list[tuple[str, BaseException | None]] = field(default_factory=list)

    async def body(self, value: object) -> None:
        """Use what the block gave, and wait once."""
        self.phase = "body"
        try:
            await use(self.subject, value)
            await asyncio.sleep(0)
        finally:
            self.phase = "cleanup"

    def __await__(self) -> Generator[Any, Any, BaseException | None]:
        block = leave(opened(self.subject), self.body)
        resume: Callable[[], Any] = functools.partial(block.send, None)
        numbers = itertools.count()
        while True:
            try:
                awaited = resume()
            except StopIteration as ended:
                return cast(BaseException | None, ended.value)
            if cancels := next(numbers) in self.at:
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
        Run.tried.update(points=1, cancellations=1)
        self.cancels.append((self.phase, None))
        task = asyncio.current_task()
        assert task is not None
        if self.late and asyncio.isfuture(awaited):
            # subtle: callbacks run in the order in which they were added, so this one runs
            # before the task's own, that is, before the task wakes up.
            awaited.add_done_callback(lambda done: task.cancel())
        else:
            task.cancel()

    def story(self) -> str:
        """Where the cancels struck: the innermost lines of your own code that they went through."""
        if not self.cancels:
            return ", never cancelled"
        places = []
        for phase, error in self.cancels:
            frames = traceback.extract_tb(error.__traceback__ if error else None)
            own = [frame for frame in frames if not frame.filename.startswith(FOREIGN)]
            at = f", at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
            places.append(f"in its {phase}{at}")
        moment = "just as it was served" if self.late else "while it waited"
        return f" when cancelled {moment} {' and again '.join(places)}"


async def cancel(subject: Subject, *at: int, late: bool = False) -> int:
    """Run a block, cancel it, judge what came out; return how often it was cancelled."""
    run = Cancelling(subject, at, late)
    others = asyncio.all_tasks()  # the contract's own
    still_running: set[asyncio.Task[Any] | None] = set()

    async def awaiting() -> None:
        try:
            pass_on(await run, None)
        finally:
            still_running.update(asyncio.all_tasks() - others - {asyncio.current_task()})

    context = contextvars.copy_context()
    task = asyncio.get_running_loop().create_task(awaiting(), context=context)
    await asyncio.wait({task}, timeout=PATIENCE)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE)
        raise Defect(f"did not end within {PATIENCE:g} s{run.story()}", HANGS)
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if isinstance(error, Defect | Hang):
        raise error
    if error is not None and not (task.cancelled() and run.cancels):
        raise Defect(f"let {error!r} out{run.story()}") from error
    if task.cancelled() and not task.cancelling():
        raise Defect(f"undid the cancellation by uncancel(){run.story()}", PASSES_CANCEL)
    if run.cancels and not (error or issubclass(asyncio.CancelledError, subject.suppresses)):
        raise Defect(f"swallowed CancelledError{run.story()}", PASSES_CANCEL)
    nothing_running(still_running, run.story())
    await nothing_left(subject, run.story(), context)
    return len(run.cancels)


def count_up(start: int = 0) -> Iterator[int]:
    """Count to the number at which waiting for the end makes no sense."""
    yield from range(start, MOST_SUSPENSIONS)
    raise Defect(f"was cancelled at {MOST_SUSPENSIONS} awaits, and there is still no end of them")


@way("No `await` between taking and `try` (chapter 03, demo 4).", sync=False)
async def async_cancelled_while_it_waits(subject: Subject) -> None:
    """Cancelled at the first await of set-up, body or cleanup; at the second; and so on."""
    for nth in count_up():
        if await cancel(subject, nth) == 0:
            return


@way("A waiter that was served and cancelled must pass it on (chapter 03, demo 5).", sync=False)
async def async_cancelled_just_as_it_is_served(subject: Subject) -> None:
    """Cancelled when what it waited for was granted already, at every await."""
    for nth in count_up():
        if await cancel(subject, nth, late=True) == 0:
            return


@way(FINISH, sync=False)
async def async_cancelled_twice_anywhere(subject: Subject) -> None:
    """Cancelled at every await, then once more at every await after that: all pairs.

    The number of runs is the square of the awaits: a subject that starts a process for each of
    them may have to leave this way out.
    """
    for nth in count_up():
        for later in count_up(nth + 1):
            cancels = await cancel(subject, nth, later)
            if cancels == 0:
                return
            if cancels == 1:
                break


@way(FINISH, sync=False)
async def async_cancelled_by_an_anyio_scope(subject: Subject) -> None:
    """The block stands in an anyio scope that is cancelled, as in Starlette or FastAPI."""
    anyio = sys.modules.get("anyio")
    if anyio is None:
        raise unittest.SkipTest("anyio is not imported")

    async def body(value: object) -> None:
        await use(subject, value)
        Run.tried.update(points=1, cancellations=1)
        scope.cancel()
        await asyncio.sleep(0)

    # subtle: such a scope cancels its task again at each turn of the event loop.
    with anyio.CancelScope() as scope:
        pass_on(await leave(opened(subject), body), None)
    if not scope.cancelled_caught and not issubclass(asyncio.CancelledError, subject.suppresses):
        raise Defect("swallowed the cancellation of an anyio scope", PASSES_CANCEL)
    await nothing_left(subject, " when cancelled by an anyio scope")


# --- A limit for what hangs ---


def in_time() -> None:
    """Let the limit begin anew."""
    if can_interrupt():
        signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE, 1.0)


def can_interrupt() -> bool:
    """Return whether a signal can end what hangs: in the main thread, and not on Windows."""
    main = threading.current_thread() is threading.main_thread()
    return main and hasattr(signal, "setitimer")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise Hang in what does not end."""
    if not can_interrupt():
        yield
        return

    def on_alarm(*_args: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, on_alarm)
    in_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- The path that ran, in the manager's own code ---

FOREIGN = (__file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))


@contextlib.contextmanager
def recorded_lines() -> Iterator[None]:
    """Record the lines of your code that run in this thread, unless a debugger does."""
    if sys.gettrace() is not None:
        yield
        return

    def on_event(frame: types.FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename.startswith(FOREIGN):
            return None
        if event == "line":
            Run.lines.append((frame.f_code, frame.f_lineno))
        return on_event

    sys.settrace(on_event)
    try:
        yield
    finally:
        sys.settrace(None)


def codes_of(manager: object) -> list[types.CodeType]:
    """Return the manager's own functions: the generator below a decorator, or its methods."""
    generator = getattr(manager, "gen", None)
    if code := getattr(generator, "gi_code", None) or getattr(generator, "ag_code", None):
        return [code]
    names = ("__enter__", "__aenter__", "__exit__", "__aexit__")
    codes = [getattr(getattr(type(manager), name, None), "__code__", None) for name in names]
    return [code for code in codes if code and not code.co_filename.startswith(FOREIGN)]


def path_that_ran() -> str:
    """Return the manager's code, with the order of execution beside each line."""
    rows: list[tuple[str, str]] = []
    codes = codes_of(Run.manager)
    own = [(code, line) for code, line in Run.lines if code in codes]
    steps = [step for step, _again in itertools.groupby(own)]  # 3.13 tells a resumed `await` twice
    for code in codes:
        with suppress(OSError):
            source, first = inspect.getsourcelines(code)
            for number, text in enumerate(source, max(first, 1)):
                places = [str(n) for n, step in enumerate(steps, 1) if step == (code, number)]
                rows.append((" ".join(places[:6]), text.rstrip()))
    if not rows:
        return ""
    width = max(len(places) for places, _text in rows)
    lines = [f"  {places:>{width}}  {text}".rstrip() for places, text in rows]
    return "\n".join(["the path that ran (blank: never ran):", *lines])


def name_of(manager: object) -> str:
    """Return what a message calls a manager: the generator's name says more than the class's."""
    if manager is None:
        return "making the manager"
    return str(getattr(getattr(manager, "gen", None) or type(manager), "__qualname__", "it"))


# --- python contract.py some/file.py:subject ---


def what_is_open() -> set[str]:
    """Return the open descriptors and the threads of this process."""
    found = {str(each) for each in threading.enumerate() if each.name != THREAD}
    for link in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            if not (target := os.readlink(link)).endswith("/fd"):  # of this listing
                found.add(f"descriptor {link.name}: {target}")
    return found


def make_subject(factory: Callable[[], Any]) -> Subject:
    """Call the factory; for a bare manager, watch what was not open before the first one."""
    made = first_of(factory)
    if isinstance(made, Subject):
        return made
    before: list[set[str]] = []

    def open_next() -> AnyManager:
        if not before:
            before.append(what_is_open())
        return cast(AnyManager, factory())

    def leaks() -> object:
        return before and sorted(what_is_open() - before[0])

    why = "a bare manager comes without faults"
    return Subject(open_next, leaks, setup_faults=why, cleanup_faults=why, visible=False)


def main(arguments: Sequence[str]) -> int:
    """Judge a manager from anywhere; return 0 if it keeps the contract, 1 if not, 2 if misused."""
    file, _colon, name = (arguments or [""])[0].rpartition(":")
    if len(arguments) != 1 or not Path(file).is_file():
        print("usage: python contract.py some/file.py:subject", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(file).resolve().parent))
    sys.modules["contract"] = sys.modules[__name__]  # the file imports the same Subject
    factory = runpy.run_path(str(Path(file).resolve())).get(name)
    if not callable(factory):
        print(f"{file} has no function {name!r}", file=sys.stderr)
        return 2
    give_up = functools.partial(faulthandler.dump_traceback_later, GIVE_UP, exit=True)
    give_up(file=sys.__stderr__ or 2)
    failures = []
    for each in ways_for(make_subject(factory)):
        give_up(file=sys.__stderr__ or 2)  # anew for each way
        mark, what, found = "✓", "", verdict(each, make_subject(factory))
        if isinstance(found, Broken):
            failures.append(found)
            mark, what = "✗", found.what
        elif found is not None:
            mark, what = "-", f"not tried: {found}"
        print(f"{mark} {each.__name__:<42} {what}".rstrip())
    faulthandler.cancel_dump_traceback_later()
    if failures:
        print(f"\n{failures[0]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
