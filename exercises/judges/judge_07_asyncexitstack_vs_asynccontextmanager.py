"""What judges the exercises of chapter 07."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import itertools
import logging
import traceback
import unittest
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from judging import NotSolvedError, _, attempt, expect, in_words, keep_contract, progress, task

# --- 1 ---

TURNS = 25  # of the event loop, in which every task goes as far as it can


@task(
    "07.1",
    _("The connections that nobody closed"),
    "Connections",
    lesson="python 07_asyncexitstack_vs_asynccontextmanager.py 1 5",
    hint=_(
        "If `__aenter__` raises, Python does not call `__aexit__`: who closes then? And what does "
        "`aclose` tell the exits about how the block ended?"
    ),
    strong_hint=_(
        "In `__aenter__`, enter the managers on a new stack, inside its own `async with`, and move "
        "its exits with `self.stack = stack.pop_all()` when all are entered. In `__aexit__`, "
        "return what `self.stack.__aexit__(*exc_info)` returns."
    ),
)
def judge_connections(answer: Any) -> None:
    logging.getLogger("asyncio").disabled = True  # tracebacks of tasks are no part of the report
    stop, error, refused = asyncio.CancelledError(), ValueError("of the block"), OSError("refused")
    ways: list[tuple[str, dict[str, Any]]] = [
        (_("the block ends well"), {}),
        (_("connection 3 cannot be opened"), {"fails": 3, "error": refused}),
        (
            _("the task is cancelled while connection 3 is being opened"),
            {"waits": 3, "error": stop},
        ),
        (_("the block is cancelled"), {"waits": 4, "error": stop}),
        (_("the block raises ValueError"), {"fails": 4, "error": error}),
        (
            _("the block raises ValueError, and the exit of connection 1 suppresses it"),
            {"fails": 4, "error": error, "suppressed": True},
        ),
    ]
    for called, options in ways:
        called = f"async with Connections([open_1, open_2, open_3]): {called}"
        with attempt(called, comes_out(None if "suppressed" in options else options.get("error"))):
            asyncio.run(connect(answer, **options))
    with attempt(_("the same object is used for two blocks, one after the other")):
        asyncio.run(connect(answer, times=2))

    from contract import Subject

    def subject() -> Subject:
        opened: list[str] = []
        fails: list[str] = []

        @asynccontextmanager
        async def connection(name: str) -> AsyncIterator[str]:
            await asyncio.sleep(0)
            if name in fails:
                raise OSError(f"connection {name} is refused")
            opened.append(name)
            try:
                yield name
            finally:
                opened.remove(name)
                await asyncio.sleep(0)
                if f"exit of {name}" in fails:
                    raise OSError(f"connection {name} is broken")

        @contextmanager
        def fault(name: str) -> Iterator[None]:
            fails.append(name)
            yield
            fails.remove(name)

        return Subject(
            open=lambda: answer.Connections([partial(connection, name) for name in "12"]),
            leaks=lambda: [f"connection {name} is open" for name in opened],
            setup_faults=[lambda: fault("2")],
            cleanup_faults=[lambda: fault("exit of 1"), lambda: fault("exit of 2")],
        )

    keep_contract(subject)


def comes_out(error: BaseException | None) -> str:
    """Say in words what came out of a block, or should."""
    if error is None:
        return _("no exception comes out")
    return _("{error} comes out").format(error=repr(error))


class Connection:
    """Notes when it is opened and closed, and how its block ended."""

    def __init__(self, number: int, log: list[str], seen: list[Any], **options: Any) -> None:
        self.number, self.log, self.seen, self.options = number, log, seen, options

    async def __aenter__(self) -> str:
        await arrive(self.number, **self.options)
        self.log.append(f"open {self.number}")
        return f"connection {self.number}"

    async def __aexit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> bool:
        self.log.append(f"close {self.number}")
        self.seen.append((self.number, exc))
        return self.number == 1 and "suppressed" in self.options and exc is not None


async def arrive(
    number: int, fails: int = 0, waits: int = 0, error: Any = None, suppressed: bool = False
) -> None:
    """Raise `error` if this is the place that fails; wait for a cancellation if it waits."""
    if number == fails:
        raise error
    if number == waits:
        await asyncio.Event().wait()


async def connect(answer: Any, times: int = 1, **options: Any) -> None:
    """Open three connections; something happens on the way (1 to 3) or in the block (4)."""
    log: list[str] = []
    seen: list[tuple[int, BaseException | None]] = []
    values: list[Any] = []
    factories = [partial(Connection, n, log, seen, **options) for n in (1, 2, 3)]
    connections = answer.Connections(factories)

    async def block() -> None:
        async with connections as value:
            values.append(value)
            log.append("block")
            await arrive(4, **options)

    error = options.get("error")
    reaches_block = not {options.get("fails"), options.get("waits")} & {1, 2, 3}
    last = 3 if reaches_block else 2
    for _time in range(times):
        log.clear()
        running = asyncio.create_task(block())
        await settle()
        if "waits" in options:
            running.cancel()
            await settle()
        expect(running.done(), _("it ends"), _("it never ends"))
        came_out = asyncio.CancelledError() if running.cancelled() else running.exception()
        wanted = [f"open {n}" for n in range(1, last + 1)]
        wanted += ["block"] if reaches_block else []
        wanted += [f"close {n}" for n in range(last, 0, -1)]
        if came_out is not None and came_out is not error and isinstance(came_out, Exception):
            raise came_out
        opened = {line.removeprefix("open ") for line in log if line.startswith("open")}
        left = opened - {line.removeprefix("close ") for line in log}
        expected = _("every connection that was opened is closed afterwards")
        happened = _("still open: connection {names}").format(names=", ".join(sorted(left)))
        expect(not left, expected, happened)
        expected = _("in this order: {order}").format(order=", ".join(wanted))
        expect(log == wanted, expected, _("in this order: {order}").format(order=", ".join(log)))
    if reaches_block:
        names = [f"connection {n}" for n in (1, 2, 3)]
        happened = _("it is {it}").format(it=repr(values[0]))
        expect(values[0] == names, _("the value of the block is {it}").format(it=names), happened)
    for number, exc in seen:
        same = exc is error or (exc and isinstance(error, asyncio.CancelledError))
        expected = _("the exit of connection {n} gets {error}")
        happened = expected.format(n=number, error=repr(exc))
        expect(same, expected.format(n=number, error=repr(error)), happened)
    if "suppressed" in options:
        error = None
    same = came_out is error
    if isinstance(error, asyncio.CancelledError):
        same = isinstance(came_out, asyncio.CancelledError)
    expect(same, comes_out(error), comes_out(came_out))


async def settle() -> None:
    for _turn in range(TURNS):
        await asyncio.sleep(0)


# --- 2 ---


@task(
    "07.2",
    _("Clean up, and lose no error"),
    "cleanups",
    lesson="python 07_asyncexitstack_vs_asynccontextmanager.py 4",
    hint=_(
        "Collect the functions in a list, and what they raise in another one. Which exceptions "
        "does `except Exception` not catch?"
    ),
    strong_hint=_(
        "Put `yield` into a `try`, and note the block's exception in `except BaseException`. Call "
        "each function in a `try` of its own. In the end, raise the block's exception itself if it "
        "is the only one, else `BaseExceptionGroup(message, errors)`: it makes an ExceptionGroup "
        "of itself if it can."
    ),
)
def judge_cleanups(answer: Any) -> None:
    block = ValueError("block")
    stop = KeyboardInterrupt("block")
    first, second, ctrl_c = OSError("first"), OSError("second"), KeyboardInterrupt("second")
    # What happens; what the block raises; what the exits raise, in the order of their calls.
    ways: list[tuple[str, BaseException | None, list[BaseException | None]]] = [
        (_("three functions are registered; the block ends well"), None, [None, None, None]),
        (_("three functions; the block raises ValueError"), block, [None, None, None]),
        (_("three functions; Ctrl-C in the block"), stop, [None, None, None]),
        (_("the first call of three raises OSError"), None, [first, None, None]),
        (_("two calls of three raise OSError"), None, [first, None, second]),
        (_("the block raises ValueError, and two calls OSError"), block, [first, None, second]),
        (_("the first call raises OSError; Ctrl-C in the second"), None, [first, ctrl_c, None]),
        (_("Ctrl-C in the block; the first call raises OSError"), stop, [first, None, None]),
    ]
    for called, raised, exits in ways:
        with attempt(f"with cleanups() as at_end: {called}"):
            clean_up(answer, raised, exits)

    from contract import Subject

    def subject() -> Subject:
        held: list[str] = []
        fails: list[str] = []

        def release(name: str) -> None:
            held.remove(name)
            if fails:
                raise OSError("the release fails")

        @contextmanager
        def two() -> Iterator[object]:
            with answer.cleanups() as at_end:
                for name in ("first", "second"):
                    held.append(name)
                    at_end(release, name)
                yield held

        @contextmanager
        def fault() -> Iterator[None]:
            fails.append("release")
            yield
            fails.clear()

        return Subject(
            open=two,
            leaks=lambda: held,
            cleanup_faults=[fault],
            setup_faults="a new stack holds nothing that can fail",
        )

    keep_contract(subject)


def clean_up(
    answer: Any, raised: BaseException | None, exits: Sequence[BaseException | None]
) -> None:
    """Use `cleanups` with functions that raise; look at the calls and at what came out."""
    calls: list[object] = []
    came_out: BaseException | None = None

    def function(number: int, /, *, raises: BaseException | None) -> None:
        calls.append(number)
        if raises:
            raise raises

    try:
        with answer.cleanups() as at_end:
            for number, error in enumerate(reversed(exits), 1):
                at_end(function, number, raises=error)
            expect(
                not calls, _("the functions are called after the block"), _("they are called in it")
            )
            if raised:
                raise raised
    except NotSolvedError:
        raise
    except BaseException as error:
        came_out = error
    wanted = [each for each in (raised, *exits) if each]
    foreign = came_out is not None and not isinstance(came_out, BaseExceptionGroup)
    if foreign and not any(came_out is each for each in wanted):
        raise came_out  # type: ignore[misc]
    happened = _("the order of the calls is {order}").format(order=calls)
    numbers = [*range(len(exits), 0, -1)]
    expected = _("all functions are called, the last one first: {order}").format(order=numbers)
    expect(calls == numbers, expected, happened)
    if not any(exits):
        expect(came_out is raised, comes_out(raised), comes_out(came_out))
        return
    kind = ExceptionGroup if all(isinstance(each, Exception) for each in wanted) else None
    name = (kind or BaseExceptionGroup).__name__
    expected = _("{kind} with {errors} comes out").format(kind=name, errors=wanted)
    if not isinstance(came_out, BaseExceptionGroup):
        lost = [each for each in wanted if each is not came_out]
        happened = _("{error} comes out").format(error=repr(came_out))
        if lost:
            happened = _("{error} comes out, and these are lost: {lost}")
            happened = happened.format(error=repr(came_out), lost=lost)
        elif came_out is not None:
            happened = _("{error} comes out alone").format(error=repr(came_out))
        expect(False, expected, happened)
        return
    inside = [*came_out.exceptions]
    happened = _("{kind} with {errors} comes out").format(
        kind=type(came_out).__name__, errors=inside
    )
    same = len(inside) == len(wanted) and all(map(lambda a, b: a is b, inside, wanted))
    expect(same and isinstance(came_out, kind or BaseExceptionGroup), expected, happened)


# --- 3 ---

# What each of Python's tests asks for, the basic ones first.
MEANING = {
    "no_resources": _("an empty stack can be entered and left"),
    "instance_docs": _("a stack has the docstring of its class"),
    "callback": _("callback(f, ...) calls f(...) at the end, and returns f"),
    "enter_context": _("enter_context enters a manager, and exits it when the block ends"),
    "enter_async_context": _("enter_async_context does the same for an async manager"),
    "enter_context_errors": _("enter_context raises TypeError for what is not a context manager"),
    "enter_async_context_errors": _("enter_async_context raises TypeError for what is not one"),
    "instance_bypass": _("methods are looked up on the type of a manager"),
    "instance_bypass_async": _("methods are looked up on the type of an async manager"),
    "async_callback": _("push_async_callback(f, ...) awaits f(...) at the end, and returns f"),
    "push": _("push adds a manager's exit, or a function, and returns what it was given"),
    "async_push": _("push_async_exit does the same with an async exit"),
    "close": _("close, or aclose, runs the exits at once"),
    "pop_all": _("pop_all moves the exits to a new stack of the same type"),
    "exit_raise": _("if no exit suppresses it, the block's exception comes out"),
    "exit_suppress": _("an exit that returns a true value suppresses the block's exception"),
    "body_exception_suppress": _("the block's exception is suppressed by a manager's exit"),
}
MEANING_OF_CHAINS = {
    "exit_exception_chaining": _("each exit runs, and gets what the exit before it raised"),
    "async_exit_exception_chaining": _("each async exit runs, and gets what the last one raised"),
    "exit_exception_non_suppressing": _("an exception that an exit raises is not suppressed"),
    "exit_exception_chaining_suppress": _("an exit can suppress what an exit before it raised"),
    "exit_exception_traceback": _(
        "the traceback shows the exit that raised; that of the block's exception stays as it is"
    ),
    "exit_exception_with_correct_context": _("a `__context__` that is right stays as it is"),
    "exit_exception_with_existing_context": _("only the end of a chain of contexts is changed"),
    "exit_exception_explicit_none_context": _("a `__context__` that an exit sets to None stays"),
    "async_exit_exception_explicit_none_context": _(
        "a `__context__` that an async exit sets to None stays"
    ),
    "dont_reraise_RuntimeError": _("the very exception comes out, with the contexts that it had"),
    "excessive_nesting": _("10,000 exits are no problem"),
}


@task(
    "07.3",
    _("Your own `ExitStack`, then your own `AsyncExitStack`"),
    "MyExitStack",
    "MyAsyncExitStack",
    lesson="python 07_asyncexitstack_vs_asynccontextmanager.py 4 5",
    hint=_(
        "Keep what the next exit gets in a variable: after an exit has raised, it is the new "
        "exception; after one has suppressed it, three times None. If a test is named above, "
        "read it: it is short."
    ),
    strong_hint=_(
        "Python takes the exception that `sys.exc_info()` shows in your `__exit__` for the context "
        "of whatever an exit raises. Follow the new exception's `__context__` to its end: if it is "
        "that one, replace it by what you have just passed to the exit. A final `raise error` sets "
        "`error.__context__`, too: keep it, and restore it in a `finally`."
    ),
    seconds=20,
)
def judge_exit_stacks(answer: Any) -> None:
    logging.getLogger("asyncio").disabled = True  # it warns of slow tests
    pythons = suite("test.test_contextlib")
    judge_stack(answer, pythons, pythons and pythons.TestExitStack, answer.MyExitStack)

    from contract import Subject

    def subject(asynchronous: bool) -> Subject:
        held: list[str] = []
        fails: list[str] = []

        @contextmanager
        def hold() -> Iterator[list[str]]:
            held.append("a resource")
            try:
                yield held
            finally:
                held.pop()
                if fails:
                    raise OSError("the release fails")

        @contextmanager
        def on_stack() -> Iterator[list[str]]:
            with answer.MyExitStack() as stack:
                yield stack.enter_context(hold())

        @asynccontextmanager
        async def on_async_stack() -> AsyncIterator[list[str]]:
            async with answer.MyAsyncExitStack() as stack:
                stack.push_async_callback(asyncio.sleep, 0)
                yield stack.enter_context(hold())

        @contextmanager
        def fault() -> Iterator[None]:
            fails.append("release")
            yield
            fails.clear()

        manager: Any = on_async_stack if asynchronous else on_stack
        return Subject(
            open=manager,
            leaks=lambda: held,
            cleanup_faults=[fault],
            setup_faults="a new stack holds nothing that can fail",
        )

    keep_contract(lambda: subject(asynchronous=False))
    found = hasattr(answer, "MyAsyncExitStack")
    expect(found, _("the file defines {name}").format(name="MyAsyncExitStack"), _("it does not"))
    pythons = suite("test.test_contextlib_async")
    base, stack_class = pythons and pythons.TestAsyncExitStack, answer.MyAsyncExitStack
    if base:
        # Python's class adds `with` and `close`, so that the tests of ExitStack run with it, too.
        added = {k: v for k, v in vars(base.SyncAsyncExitStack).items() if callable(v)}
        stack_class = type(stack_class.__name__, (stack_class,), added)
    judge_stack(answer, pythons, base, stack_class)
    keep_contract(lambda: subject(asynchronous=True))


def judge_stack(answer: Any, module: Any, base: Any, stack_class: Any) -> None:
    """Run Python's own tests, and between the basic and the subtle ones a comparison in words."""
    real = ExitStack if stack_class is answer.MyExitStack else contextlib.AsyncExitStack
    with attempt(f"{stack_class.__name__}()"):
        stack = stack_class()
        methods = [name for name in dir(real) if not name.startswith("_")]
        missing = ", ".join(name for name in methods if not hasattr(stack, name))
        expected = _("it has all methods of `{name}`").format(name=real.__name__)
        expect(not missing, expected, _("it lacks {names}").format(names=missing))
    if base is None:
        compare(stack_class)
        return
    test_class = type(base.__name__, (base,), {"exit_stack": stack_class})
    names = unittest.defaultTestLoader.getTestCaseNames(test_class)
    basic = [name for key in MEANING if (name := f"test_{key}") in names]
    chains = [name for key in MEANING_OF_CHAINS if (name := f"test_{key}") in names]
    for name in basic:
        play(answer, module, test_class(name))
    compare(stack_class)
    for name in (*chains, *(name for name in names if name not in basic + chains)):
        play(answer, module, test_class(name))


def suite(name: str) -> Any:
    """Return a module of Python's own tests, or None: some distributions leave them out."""
    try:
        return importlib.import_module(name)
    except (ImportError, unittest.SkipTest):
        return None


class FirstError(unittest.TestResult):
    """Keeps the first error or failure of a test."""

    error: BaseException | None = None

    def addError(self, test: Any, err: Any) -> None:
        self.error = self.error or err[1]

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err:
            self.addError(subtest, err)


def play(answer: Any, module: Any, test: Any) -> None:
    """Run one of Python's own tests on a stack."""
    name = test.id().split(".")[-1]
    function = getattr(type(test), name)
    called = _("{test}, a test of Python itself: {file}, line {line}").format(
        test=f"{type(test).__name__}.{name}",
        file=inspect.getsourcefile(function),
        line=inspect.getsourcelines(function)[1],
    )
    meanings = MEANING | MEANING_OF_CHAINS
    expected = meanings.get(
        name.removeprefix("test_"), _("it passes, as it does with contextlib's")
    )
    result = FirstError()
    with ExitStack() as patches:
        if hasattr(module, "AsyncExitStack"):
            stack = answer.MyAsyncExitStack
            patches.enter_context(mock.patch.object(module, "AsyncExitStack", stack))
        if name == "test_exit_exception_traceback":
            patches.enter_context(own_lines(test))
        with attempt(called, expected):
            test.run(result)
    if result.error:
        raise NotSolvedError(expected, what_failed(result.error)) from result.error


def what_failed(error: BaseException) -> str:
    """Say which statement of a test failed, or which line of the answer raised what."""
    own = getattr(progress.answer, "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename == own for frame in frames) and not isinstance(error, AssertionError):
        return in_words(error)
    place = next(frame for frame in reversed(frames) if "unittest" not in frame.filename)
    first_line = str(error).partition("\n")[0]
    text = _("{error}; this statement of the test fails, in line {line}: {statement}")
    error_text = f"{type(error).__name__}: {first_line}"
    return text.format(error=error_text, line=place.lineno, statement=place.line)


@contextmanager
def own_lines(test: Any) -> Iterator[None]:
    """Let the test that compares tracebacks expect the answer's own lines.

    It knows contextlib's lines by heart. So those that the answer ran take their place, and only
    what stands around them is compared.
    """
    extract = traceback.extract_tb
    own = getattr(progress.answer, "__file__", None)

    def extract_tb(*args: Any) -> list[traceback.FrameSummary]:
        frames = [*extract(*args)]
        if len(frames) > 2 and frames[-2].filename == own:
            test.callback_error_internal_frames = [(f.name, f.line) for f in frames[1:-2]]
            frames[-2] = traceback.FrameSummary(
                own, frames[-2].lineno, "_exit_wrapper", line="callback(*args, **kwds)"
            )
        return frames

    names = test.test_exit_exception_traceback.__func__.__globals__
    with mock.patch.dict(names, traceback=SimpleNamespace(extract_tb=extract_tb)):
        yield


# --- Every short stack, compared with nested statements ---


PLANS = ("return", "suppress", "raise", "raise from")


class Step:
    """One manager of a stack. It notes what its exit gets, then does what `plan` says."""

    def __init__(self, plan: str, number: int, log: list[str]) -> None:
        self.plan, self.number, self.log = plan, number, log

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> bool:
        self.log.append(_("exit {n} gets {error}").format(n=self.number, error=chain(exc)))
        if self.plan == "raise":
            raise OSError(f"exit {self.number}")
        if self.plan == "raise from":
            raise OSError(f"exit {self.number}") from exc
        return self.plan == "suppress"

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc_info: Any) -> bool:
        return self.__exit__(*exc_info)


def chain(error: BaseException | None, longest: int = 9) -> str:
    """Return an exception, its context, and so on."""
    if error is None or error.__context__ is None or longest == 0:
        return repr(error)
    context = chain(error.__context__, longest - 1)
    return _("{error} with the context {context}").format(error=repr(error), context=context)


async def nested(steps: Sequence[Step], block: Callable[[], None]) -> None:
    if not steps:
        block()
        return
    async with steps[0]:
        await nested(steps[1:], block)


async def stacked(stack_class: Any, steps: Sequence[Step], block: Callable[[], None]) -> None:
    stack = stack_class()
    if hasattr(type(stack), "__aenter__"):
        async with stack:
            for step in steps:
                await stack.enter_async_context(step)
            block()
    else:
        with stack:
            for step in steps:
                stack.enter_context(step)
            block()


def outcome(use: Any, plans: Sequence[str], error: BaseException | None) -> str:
    """Say what each exit gets, and what comes out."""
    log: list[str] = []
    steps = [Step(plan, n, log) for n, plan in enumerate(plans, 1)]

    def block() -> None:
        if error:
            raise error

    try:
        asyncio_free(use(steps, block))
        log.append(comes_out(None))
    except NotImplementedError:
        raise
    except Exception as raised:
        log.append(_("{error} comes out").format(error=chain(raised)))
    return "; ".join(log)


def asyncio_free(coroutine: Any) -> None:
    """Run a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("it waits")


def compare(stack_class: Any) -> None:
    """Expect what nested statements do, or what contextlib's stack does (cpython#102201)."""
    real = contextlib.ExitStack
    if hasattr(stack_class, "__aenter__"):
        real = contextlib.AsyncExitStack  # type: ignore[assignment]
    for length in range(4):
        for plans in itertools.product(
            ("return", "suppress", "raise", "raise from"), repeat=length
        ):
            for raises in (False, True):
                uses = [nested, partial(stacked, real), partial(stacked, stack_class)]
                block = _("the block raises ValueError") if raises else _("the block ends well")
                called = _("{block}; the exits of the managers on the stack do this: {plans}")
                if not plans:
                    called = _("{block}; the stack is empty")
                does = ", ".join(f"{n} {plan}" for n, plan in enumerate(plans, 1))
                called = called.format(block=block, plans=does)
                called = f"{stack_class.__name__}: {called}"
                errors = [ValueError("block") if raises else None for _use in uses]
                with attempt(called):
                    wanted, also, found = map(outcome, uses, [plans] * 3, errors)
                expect(found in (wanted, also), wanted, found)
