# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16"]
# ///
"""Chapter 07 · One resource or any number

After this chapter you can hold one resource, a few, an optional one or a list of any length, and
release them all even if set-up or cleanup fails half-way, or the task is cancelled at any point.

    python 07_asyncexitstack_vs_asynccontextmanager.py          run all seven demos
    python 07_asyncexitstack_vs_asynccontextmanager.py 1 4      run demos 1 and 4
    python 07_asyncexitstack_vs_asynccontextmanager.py --step   wait for Enter at each question

Define one resource with `@asynccontextmanager`. Hold several on an `AsyncExitStack`. The demos use
three real resources: a lock file, a database, and a child process that answers in capital letters.

Read the managers first: they are production code, and they print nothing. Then run the demos, and
look at the lines without a number: they never ran.

Left out: how a single `async with` works (chapter 03), resources that start at the same time (08).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import os
import re
import signal
import sqlite3
import sys
import tempfile
import textwrap
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager as AsyncManager
from contextlib import AbstractContextManager as SyncManager
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
Manager: TypeAlias = AsyncManager[T] | SyncManager[T]
StartedChild: TypeAlias = tuple[asyncio.SubprocessTransport, Process]


@asynccontextmanager
async def open_all(factories: Iterable[Callable[[], Manager[T]]]) -> AsyncIterator[list[T]]:
    """Open one resource per factory, in order, and close them in reverse order.

        async with open_all([partial(lock_file, path) for path in paths]) as locks:
            ...

    Yields the values of the managers, which may be sync or async. It takes factories instead of
    managers, so that after a failure no further resource is even created.
    """
    async with AsyncExitStack() as stack:
        yield [await enter(stack, factory()) for factory in factories]


async def enter(stack: AsyncExitStack, manager: Manager[T]) -> T:
    """Enter a sync or async manager on `stack`, and return its value."""
    if isinstance(manager, AsyncManager):
        return await stack.enter_async_context(manager)
    return stack.enter_context(manager)


class LockHeldError(RuntimeError):
    """The lock file exists: another process, or another block in this one, holds the lock."""


@contextmanager
def lock_file(path: Path) -> Iterator[Path]:
    """Hold a lock: a file that only one holder can create, with the holder's process id in it.

    Raises LockHeldError at once if the file exists. A process that is killed leaves its file.
    """
    try:
        file = path.open("x")  # O_CREAT | O_EXCL: one process creates it, all others fail
    except FileExistsError:
        holder = "?"
        with suppress(OSError):  # the holder may release the lock at this moment
            holder = path.read_text()
        advice = "wait for it, or delete the file if that process is dead"
        raise LockHeldError(f"{path} is held by process {holder}: {advice}") from None
    try:
        with file:
            file.write(str(os.getpid()))
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an SQLite database for one transaction: commit it, or roll it back if the block raises.

    Raises sqlite3.OperationalError if it cannot be opened or another connection keeps it locked.
    """
    connection = sqlite3.connect(path)
    try:
        connection.execute("BEGIN")  # subtle: CREATE TABLE alone does not begin a transaction
        with connection:  # commits or rolls back, but does not close
            yield connection
    finally:
        connection.close()


@asynccontextmanager
async def spawn(*command: str, grace: float = 2.0) -> AsyncIterator[Process]:
    """Run a child process with its stdin and stdout as pipes.

    When the block ends, the child's input ends, and it has `grace` seconds to exit. After that,
    or at once if the block raises, it is killed. It runs in its own session (not on Windows), so
    Ctrl-C does not reach it: Ctrl-C ends the block, and the block ends the child.

    Raises OSError if the child cannot start. Raises TimeoutError if the start takes longer than
    10 s, or if the child has not ended 10 s after it was killed.
    """
    started: list[StartedChild] = []
    try:
        # subtle: asyncio kills a child whose start is cancelled, but may not reap it
        await finish(start_child(command, started))
        process = started[0][1]
        yield process
        process.stdin.close()  # type: ignore[union-attr]
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await process.wait()
    finally:
        if started:
            transport, process = started[0]
            # subtle: wait() may hang while somebody else holds the child's pipes open
            transport.close()  # closes our ends, and kills the child if it is still running
            await finish(process.wait())


async def start_child(command: Iterable[str], started: list[StartedChild]) -> None:
    """Start a child process and add it to `started`."""
    loop = asyncio.get_running_loop()
    protocol = partial(SubprocessStreamProtocol, limit=2**16, loop=loop)
    starting = loop.subprocess_exec(protocol, *command, stderr=None, start_new_session=True)
    start = loop.create_task(starting)
    try:
        await asyncio.wait([start])
    except asyncio.CancelledError:
        # subtle: only a loop that shuts down gets here. It has cancelled `start`, too. In the
        # middle of a start, asyncio then waits for ever, until it is cancelled a second time.
        await asyncio.sleep(0)
        start.cancel()
    transport, streams = await start
    started.append((transport, Process(transport, streams, loop)))


async def finish(cleanup: Coroutine[Any, Any, object], within: float = 10.0) -> None:
    """Run `cleanup` to completion even if cancelled, then re-raise the cancellation.

    Raises what `cleanup` raises. Raises TimeoutError after `within` seconds: `cleanup` is then
    cancelled, and nobody waits for it any longer.

    `cleanup` runs in its own task, in a copy of the caller's context. So it cannot reset the
    caller's context variables, or exit an anyio cancel scope that the caller entered. An event
    loop that shuts down cancels it, like every other task.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(cleanup)
    deadline = loop.time() + within
    cancelled: asyncio.CancelledError | None = None
    # subtle: a cancelled anyio scope cancels its tasks again at every turn of the event loop, and
    # keeps the loop turning until they end. A shield stops that.
    anyio = sys.modules.get("anyio")
    shield = anyio.CancelScope(shield=True) if anyio else nullcontext()
    with shield:
        while not task.done():
            try:
                # subtle: `await task` would cancel the cleanup, too
                await asyncio.wait([task], timeout=deadline - loop.time())
            except asyncio.CancelledError as error:
                cancelled = error
            if not task.done() and loop.time() >= deadline:
                task.cancel()
                raise TimeoutError(f"the cleanup did not end within {within} s") from cancelled
    task.result()
    if cancelled is not None:
        raise cancelled


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---

Command: TypeAlias = tuple[str, ...]
PYTHON = (sys.executable, "-ISc")
UPPER = (*PYTHON, "for line in open(0): print(line.upper(), end='', flush=True)")
DEAF = (*PYTHON, "import time; time.sleep(60)")  # does not notice the end of its input
MISSING = ("no-such-program",)
INSERT = "INSERT INTO notes VALUES (?)"
THREE = (UPPER, UPPER, UPPER)
popen = partial(asyncio.create_subprocess_exec, stdin=PIPE, stdout=PIPE, start_new_session=True)


async def ask(child: Any) -> str:
    """Send one line to a child process, and return its answer."""
    child.stdin.write(b"hello\n")
    await child.stdin.drain()
    return str((await child.stdout.readline()).decode().strip())


async def outcome(awaitable: Awaitable[object]) -> str:
    """Return the result, or the name of the exception."""
    try:
        return str(await awaitable)
    except Exception as error:
        return type(error).__name__


async def both(function: Callable[[Command], Awaitable[object]]) -> dict[str, list[int]]:
    """Call `function` with a child that starts, then with one that cannot. Return the paths."""
    runs: dict[str, list[int]] = {}
    for title, command in ((_("ends well"), UPPER), (_("fails"), MISSING)):
        with suppress(FileNotFoundError), trace() as runs[title]:
            await function(command)
    return runs


async def work(child: Any, notes: sqlite3.Connection) -> None:
    answer = await ask(child)
    notes.execute("CREATE TABLE notes (text)")
    notes.execute(INSERT, [answer])


async def by_hand(folder: Path, command: Command) -> None:
    lock = folder / "lock"
    lock.touch(exist_ok=False)
    child = await popen(*command)
    notes = sqlite3.connect(folder / "notes.db")
    try:
        await work(child, notes)
    finally:
        notes.close()
        child.kill()
        await child.wait()
        lock.unlink()


async def nested(folder: Path, command: Command) -> None:
    with lock_file(folder / "lock"):
        async with spawn(*command) as child:
            with database(folder / "notes.db") as notes:
                await work(child, notes)


async def stacked(folder: Path, command: Command) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(lock_file(folder / "lock"))
        child = await stack.enter_async_context(spawn(*command))
        notes = stack.enter_context(database(folder / "notes.db"))
        await work(child, notes)


async def demo_set_up_fails() -> None:
    """Set-up fails half-way

    A function needs a lock, a child process and a database. Written by hand, one `try` protects
    all three, but only once all three are open. Nested `with` blocks release what is already
    open. So does a stack, without the indentation: `enter_context` enters a manager, and the
    stack exits it when its own block ends, the last one first. (A `with` line runs twice: to
    enter and to exit.)
    """
    show_code(by_hand)
    question(_("The child cannot start. Which lines never run, and what is left behind?"))
    for function in (by_hand, nested, stacked):
        with tempfile.TemporaryDirectory() as folder:
            runs = await both(partial(function, Path(folder)))
            left = "lock" in os.listdir(folder)
        show_code(function, runs=runs)
        text = _("`{function}`: the lock is released.")
        if left:
            text = _("`{function}`: the lock file stays, and blocks the next run.")
        verdict(not left, text.format(function=function.__name__))
    edit = _(
        "In `by_hand`, move both `lock` lines to just above `try:`, and run demo 1 again."
        " What is left then if `touch` fails?"
    )
    say(edit, "→ ")


async def in_a_loop(factories: list[Any]) -> list[str]:
    children = []
    for factory in factories:
        async with factory() as child:
            children.append(child)
    return [await outcome(ask(child)) for child in children]


async def in_open_all(factories: list[Any]) -> list[str]:
    async with open_all(factories) as children:
        return [await outcome(ask(child)) for child in children]


@asynccontextmanager
async def child_in_bracket(name: str, command: Command) -> AsyncIterator[Process]:
    with bracket(name):
        async with spawn(*command) as child:
            yield child


async def demo_any_number() -> None:
    """Any number

    How many children there are is known only at run time, so you cannot nest that many blocks
    by hand. And a block in a loop ends before the next one begins. `open_all` enters all of
    them on one stack. A child answers each line in capital letters. The brackets show when each
    block begins and ends.
    """
    show_code(in_a_loop, in_open_all, open_all)
    question(_("Three children start, and each is sent `hello`. How many answer?"))
    for function in (in_a_loop, in_open_all):
        say(f"{function.__name__}:", style="bold")
        children = enumerate(THREE, 1)
        factories = [partial(child_in_bracket, f"child {n}", command) for n, command in children]
        answers = await outcome(function(factories))
        text = _("`{function}`: {answers}").format(function=function.__name__, answers=answers)
        verdict(answers.count("HELLO") == len(THREE), text)
    edit = _(
        "In `THREE`, replace the last `UPPER` with `MISSING`, and run demo 2 again."
        " When do children 1 and 2 end?"
    )
    say(edit, "→ ")


def add_and_close(text: str, path: Path, notes: Any = None) -> None:
    notes = notes or sqlite3.connect(path)
    try:
        with notes:
            notes.execute(INSERT, [text])
    finally:
        notes.close()


def add(text: str, path: Path, notes: Any = None) -> None:
    with ExitStack() as stack:
        if notes is None:
            notes = stack.enter_context(database(path))
        notes.execute(INSERT, [text])


def demo_optional() -> None:
    """An optional resource

    A function opens a database itself, unless the caller passes an open one. It must close what
    it opened, and only that. With a stack, one `if` is enough: what is not entered is not closed.
    """
    show_code(add_and_close)
    say(_("The function adds `one` on its own connection, and `two` on the caller's."))
    question(_("Then the caller adds `three`. Which notes are in the database?"))
    for function in (add_and_close, add):
        runs: dict[str, list[int]] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "notes.db")
            with database(path) as notes:
                notes.execute("CREATE TABLE notes (text)")
            with trace() as runs[_("its own")]:
                function("one", path)
            with suppress(sqlite3.ProgrammingError), database(path) as notes:
                with trace() as runs[_("the caller's")]:
                    function("two", path, notes)
                notes.execute(INSERT, ["three"])
            with database(path) as notes:
                texts = [text for (text,) in notes.execute("SELECT text FROM notes")]
        show_code(function, runs=runs)
        text = _("`{function}`: the notes are {texts}.")
        text = text.format(function=function.__name__, texts=texts)
        verdict(texts == ["one", "two", "three"], text)
    say(_("Let `add_and_close` close only what it opened, and run demo 3 again."), "→ ")


async def flush(name: str) -> None:
    raise OSError(name)


async def nested_try(error: Exception | None) -> None:
    try:
        try:
            if error:
                raise error
        finally:
            await flush("second")
    finally:
        await flush("first")


async def on_a_stack(error: Exception | None) -> None:
    async with AsyncExitStack() as stack:
        stack.push_async_callback(flush, "first")
        stack.push_async_callback(flush, "second")
        if error:
            raise error


async def flush_all(*names: str) -> None:
    errors = []
    for name in names:
        try:
            await flush(name)
        except OSError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("flush_all", errors)


async def in_a_group(error: Exception | None) -> None:
    async with AsyncExitStack() as stack:
        stack.push_async_callback(flush_all, "second", "first")
        if error:
            raise error


async def errors_of(block: Awaitable[object]) -> list[BaseException]:
    """Return the error that a block raises, then its `__context__`, and so on."""
    errors: list[BaseException] = []
    try:
        await block
    except Exception as caught:
        errors.append(caught)
        while context := errors[-1].__context__:
            errors.append(context)
    return errors


async def demo_order_of_failures() -> None:
    """The order of failures

    If one cleanup raises, the others still run. The caller gets the last error; its
    `__context__` is the error before it, and so on. But if the block ends well, a stack loses
    the errors of all callbacks except the last (python/cpython#102201). An `ExceptionGroup`
    holds errors side by side, and `except*` catches them by type. In this demo, `flush(name)`
    always raises `OSError(name)`.
    """
    show_code(nested_try, on_a_stack, flush_all, in_a_group)
    question(_("The block raises ValueError, then both cleanups raise. What does the caller get?"))
    heading = ("", _("the block raises: 3 errors"), _("it ends well: 2 errors"))
    table = Table(*(Column(title, overflow="fold") for title in heading), show_lines=True)
    found = {}
    for function in (nested_try, on_a_stack, in_a_group):
        columns = [await errors_of(function(error)) for error in (ValueError("block"), None)]
        cells = ["\n↑ ".join(map(repr, errors)) for errors in columns]
        table.add_row(function.__name__, *cells)
        found[function.__name__] = len(re.findall(r"(?:OS|Value)Error", "".join(cells)))
    console.print(table)
    say(_("The first line is what the caller gets. ↑ marks the `__context__` of the line above."))
    say("")
    for name, count in found.items():
        text = _("`{name}`: {count} of 5 errors reach the caller.")
        verdict(count == 5, text.format(name=name, count=count))
    edit = _("In `on_a_stack`, swap the callbacks, and run demo 4 again. Which error is lost now?")
    say(edit, "→ ")


class Translator:
    """A lock and a child process, held from `start` to `aclose`."""

    def __init__(self) -> None:
        self.resources = AsyncExitStack()

    async def start(self, folder: Path, command: Command) -> Process:
        async with AsyncExitStack() as stack:
            stack.enter_context(lock_file(folder / "lock"))
            child = await stack.enter_async_context(spawn(*command))
            self.resources = stack.pop_all()
            return child

    async def aclose(self) -> None:
        await self.resources.aclose()


class CarelessTranslator(Translator):
    async def start(self, folder: Path, command: Command) -> Process:
        async with AsyncExitStack() as stack:
            stack.enter_context(lock_file(folder / "lock"))
            return await stack.enter_async_context(spawn(*command))


async def demo_hand_over() -> None:
    """Resources that outlive a function

    `start` opens a child process for others to use, and `aclose` closes it later. But a stack
    closes everything when its block ends, and `return` ends the block. `pop_all` moves all exits
    to a new stack, which stays open. Call it last: until then, a failure closes what is open.
    """
    show_code(CarelessTranslator.start)
    question(_("The caller sends `hello` to the child that `start` returned. Does it answer?"))
    for translator in (CarelessTranslator(), Translator()):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with trace() as ends_well:
                child = await translator.start(folder, UPPER)
            answer = await outcome(ask(child))
            await translator.aclose()
            with suppress(FileNotFoundError), trace() as fails:
                await translator.start(folder, MISSING)
            left = os.listdir(folder)
        runs = {_("ends well"): ends_well, _("fails"): fails}
        show_code(translator.start, runs=runs)
        text = _("`{name}`: the answer is {answer}; left in the folder: {left}.")
        text = text.format(name=type(translator).__name__, answer=answer, left=left)
        verdict(answer == "HELLO" and not left, text)
    say(_("In `Translator.start`, move `pop_all` up by one line, and run demo 5 again."), "→ ")


@asynccontextmanager
async def patient_child(*command: str) -> AsyncIterator[Process]:
    process = await popen(*command)
    try:
        yield process
    finally:
        try:
            await asyncio.wait_for(process.wait(), timeout=1)
        except TimeoutError:
            process.kill()
            await process.wait()


async def cancelled_twice(manager: AsyncManager[Process]) -> Process:
    """Cancel a task in the manager's block, then in its cleanup. Return the child process."""
    children: asyncio.Queue[Process] = asyncio.Queue()

    async def block() -> None:
        async with manager as child:
            children.put_nowait(child)
            await child.wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(block())
        child = await children.get()
        for _cancellation in range(2):
            task.cancel()
            await asyncio.sleep(0)
    return child


async def demo_cancelled() -> None:
    """A cancellation during cleanup

    Cleanup that awaits can be cancelled like any other code, for example by a timeout around
    it. No stack protects it. So first do what matters without `await`: here, kill the child. In
    `spawn`, `transport.close()` does that. Then `finish` waits for the rest, even if it is
    cancelled again. If nobody waits for a child's end, its exit status stays None.
    """
    show_code(patient_child)
    question(_("The task is cancelled, and again during its cleanup. Is the child killed?"))
    for manager in (patient_child, spawn):
        with trace() as path:
            child = await cancelled_twice(manager(*DEAF))
        show_code(manager, runs={_("cancelled twice"): path})
        status = child.returncode
        if status is None:
            child.kill()
            await child.wait()
        text = _("`{manager}`: the child's exit status after the block is {status}.")
        verdict(status is not None, text.format(manager=manager.__name__, status=status))
    edit = _(
        "In `patient_child`, begin `finally` with `process.kill()`, and run demo 6 again."
        " Why is the status still None?"
    )
    say(edit, "→ ")


def demo_which_one() -> None:
    """Which one?

    They are not rivals: `@asynccontextmanager` defines a manager, and `AsyncExitStack` holds any
    number of them.
    """
    heading = (_("what you have"), _("what you write"), _("demo"))
    table = Table(*(Column(title, overflow="fold") for title in heading))
    for row in (
        (_("a resource of your own"), "@asynccontextmanager", ""),
        (_("a few, known when you write"), "async with a() as x, b() as y:", "1"),
        (_("a list, known only at run time"), "async with open_all(factories) as values:", "2"),
        (_("one that the caller may pass"), "if x is None: x = stack.enter_context(a())", "3"),
        (_("a function that cleans up"), "stack.push_async_callback(f, x)", "4"),
        (_("cleanups that fail independently"), "raise ExceptionGroup(message, errors)", "4"),
        (_("resources that outlive a function"), "self.resources = stack.pop_all()", "5"),
        (_("cleanup that may be cancelled"), "await finish(cleanup())", "6"),
    ):
        table.add_row(*row)
    console.print(table)


DEMOS = (
    demo_set_up_fails,
    demo_any_number,
    demo_optional,
    demo_order_of_failures,
    demo_hand_over,
    demo_cancelled,
    demo_which_one,
)
KEY_POINTS = """\
* Define each resource as its own manager. A stack holds any number of them.
* Enter each resource on the stack as you open it, so that a failure closes what is open.
* Close what you opened, and nothing that the caller opened.
* Call `pop_all` last, once nothing in set-up can fail any more.
* In cleanup, do what matters without `await`, then `finish` the rest."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. This chapter has no options of its own."""
    yield parser.parse_args()


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[str] = []
stepping = False  # --step
OPENING, CLOSING = r"\"'(\[{（「《“‘", r"\"')\]},.;:!?%，。、；：！？）」》”’…—"
WIDE = r"\u2e80-\uffe6"
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        lines.append("")
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Print the result of the runs: ✓ if it is right, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter until the input ends."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except (EOFError, RuntimeError):  # the latter: there is no input at all
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bracket(label: str) -> Iterator[None]:
    """Draw where a block begins and how it ends."""
    say(label, "┌ ")
    open_brackets.append(label)
    ending = _("ended")
    try:
        yield
    except BaseException as error:
        ending = _("left by {error}").format(error=type(error).__name__)
        raise
    finally:
        open_brackets.pop()
        say(ending, "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record the lines of this file's functions that the block runs in this thread, in order."""
    lines: list[int] = []
    last: dict[int, int] = {}  # the line that each frame has reached

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno  # subtle: 3.13 reports a resumed `await` twice
        return on_event

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(on_event)
    try:
        yield lines
    finally:
        sys.settrace(before)


def source(piece: Any) -> list[tuple[int, str]]:
    """Return the numbered lines of a function or class, without docstring and comments."""
    lines, first = inspect.getsourcelines(piece)
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines)))
    if piece.__doc__:  # keep its line breaks, for the numbers
        code = re.sub(r'(?s)""".*?"""', lambda found: "\n" * found[0].count("\n"), code, count=1)
    return [(n, line) for n, line in enumerate(code.splitlines(), first) if line.strip()]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *runs, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    rows: list[tuple[int, str]] = []
    for piece in pieces:
        rows += [*source(piece), (0, "")]  # and an empty line
    shown = {number for number, _line in rows}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for number, line in rows:
        code = Syntax(line, "python", theme="ansi_dark", word_wrap=True)
        table.add_row(code, *(places(number, path) for path in paths))
    console.print(table)


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(wrap(_(__doc__ or ""), console.width))
    numbers = range(1, len(DEMOS) + 1)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    try:
        with command_line(parser) as options:
            if not set(options.demo) <= set(numbers):
                parser.error(f"choose demos from 1 to {len(DEMOS)}")
            stepping = options.step
            for position, number in enumerate(options.demo or numbers):
                if position > 0:
                    pause()
                play(number)
            if not options.demo:
                console.rule(_("[bold]Key points"), align="left")
                for point in _(KEY_POINTS).splitlines():
                    say(point.removeprefix("* "), "• ")
    except KeyboardInterrupt:
        open_brackets.clear()
        say(_("Interrupted. The cleanup ran on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
