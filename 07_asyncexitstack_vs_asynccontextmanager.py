# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16"]
# ///
"""Chapter 07 · One resource or any number

After this chapter you can open any number of real resources (sockets, child processes, an SQLite
transaction, a lock file) and leave none behind if set-up fails half way, if cleanup fails, or if
a cancellation arrives in the middle of either. You also know which tool to use when.

    python 07_asyncexitstack_vs_asynccontextmanager.py         run all ten demos
    python 07_asyncexitstack_vs_asynccontextmanager.py 4 8     run demos 4 and 8
    python 07_asyncexitstack_vs_asynccontextmanager.py --step  wait for Enter

Read the managers first: they are production code, and they print nothing. Then run the demos.
Look at the order in which the brackets close, and at what the broken versions leave open.

Left out: what a single `async with` does (chapter 03), MCP servers held this way (chapter 08).
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
from asyncio.subprocess import Process, SubprocessStreamProtocol
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager as AsyncManager
from contextlib import AbstractContextManager as SyncManager
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeAlias, TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
Manager: TypeAlias = AsyncManager[T] | SyncManager[T]
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def enter(stack: AsyncExitStack, manager: Manager[T]) -> T:
    """Enter a manager of either kind on `stack`, and return its value."""
    if isinstance(manager, AsyncManager):
        return await stack.enter_async_context(manager)
    return stack.enter_context(manager)


@asynccontextmanager
async def open_all(factories: Iterable[Callable[[], Manager[T]]]) -> AsyncIterator[list[T]]:
    """Open as many resources as there are factories, one after another; close in reverse order.

    Yields their values in the order of the factories. It takes factories, not managers, so that
    nothing is even created after one that fails; those that are open by then are closed.
    """
    async with AsyncExitStack() as stack:
        yield [await enter(stack, factory()) for factory in factories]


async def uninterrupted(cleanup: Awaitable[T]) -> T:
    """Await `cleanup` to its end; a cancellation that arrives meanwhile is raised after it.

    Only for cleanup that ends by itself, and soon: nothing can interrupt it.
    """
    task = asyncio.ensure_future(cleanup)
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with suppress(asyncio.CancelledError):  # the first one is on its way out already
                await asyncio.wait([task])


class LockHeldError(RuntimeError):
    """The lock file exists: another holder has not let go of it."""


@contextmanager
def lock_file(path: Path) -> Iterator[Path]:
    """Hold `path` as a lock: a file that only one holder can create, with its process id in it.

    Raises LockHeldError at once where it exists. A killed process leaves its file behind.
    """
    try:
        file = path.open("x")  # O_CREAT | O_EXCL: created by us, or not at all
    except FileExistsError:
        holder = "?"
        with suppress(OSError):  # let go of in this very moment
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
    """One SQLite connection with one transaction: committed, or rolled back by any exception."""
    connection = sqlite3.connect(path)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


@asynccontextmanager
async def child_process(*command: str, grace: float = 2.0) -> AsyncIterator[Process]:
    """Run a child process with its stdin and stdout as pipes; raises OSError if it cannot start.

    At the end of the block its input ends, and it has `grace` seconds to finish by itself. After
    that, or when the block is left by an exception, it is killed. It is reaped in any case.
    A Ctrl-C does not reach it, but ends the block, and so the child.
    """
    loop = asyncio.get_running_loop()
    protocol = partial(SubprocessStreamProtocol, limit=2**16, loop=loop)
    spawn = loop.subprocess_exec(protocol, *command, stderr=None, start_new_session=True)
    # subtle: a cancelled spawn kills its child, but may not stay to reap it. As a task of its own
    # it always ends, so that the cleanup below always learns of the child.
    spawning = asyncio.create_task(spawn)
    try:
        process = Process(*await asyncio.shield(spawning), loop)
        yield process
        process.stdin.close()  # type: ignore[union-attr]
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await process.wait()
    finally:
        await uninterrupted(_reap(spawning))


async def _reap(spawning: asyncio.Task[Any]) -> None:
    transport, protocol = await spawning
    # subtle: wait() alone may never return, as output that nobody reads keeps its pipe open.
    transport.close()  # ends the pipes, and kills the child if it is still there
    await Process(transport, protocol, asyncio.get_running_loop()).wait()


@asynccontextmanager
async def connection(host: str, port: int) -> AsyncIterator[Streams]:
    """A TCP connection; what was written but not drained is dropped."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        await hang_up(writer)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close at once, also where the peer no longer reads or is gone."""
    writer.transport.abort()  # this decides: to cancel what follows leaves nothing open
    with suppress(OSError):  # the peer hung up first
        await writer.wait_closed()


@asynccontextmanager
async def echo_server(host: str = "127.0.0.1") -> AsyncIterator[tuple[str, int]]:
    """Serve on a free port and send back all that arrives; yields (host, port).

    At the end of the block the port and every connection are closed.
    """
    echoes: dict[asyncio.Task[Any] | None, asyncio.StreamWriter] = {}

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        echoes[asyncio.current_task()] = writer
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the peer is gone, and with it whoever could be told
        finally:
            writer.close()
            del echoes[asyncio.current_task()]

    # subtle: with start_serving=True a cancellation in here would leave the port open for good.
    server = await asyncio.start_server(echo, host, 0, start_serving=False)
    try:
        await server.start_serving()
        yield server.sockets[0].getsockname()
    finally:
        await uninterrupted(_shut(server, echoes))


async def _shut(server: asyncio.Server, echoes: dict[Any, asyncio.StreamWriter]) -> None:
    # subtle: a connection accepted in this tick joins the server in a later one; a server closed
    # in between loses its socket (python/cpython#109564). So: accept no more, let join, close.
    with suppress(NotImplementedError):  # Windows accepts and joins in one step
        server.get_loop().remove_reader(server.sockets[0].fileno())
    for _tick in range(3):
        await asyncio.sleep(0)
    server.close()
    for writer in echoes.values():
        writer.transport.abort()
    await asyncio.gather(*echoes)


@asynccontextmanager
async def open_together(factories: Iterable[Callable[[], Manager[T]]]) -> AsyncIterator[list[T]]:
    """`open_all` for resources that do not need each other: set up, and left, at the same time.

    Each manager has an owner, a task that both enters and leaves it; where the block fails, it is
    cancelled. Errors come out in an ExceptionGroup, as from any TaskGroup. Not for managers that
    act on the current task (a timeout, a context variable): they would act on their owner.
    """
    loop, leave = asyncio.get_running_loop(), asyncio.Event()

    async def own(manager: Manager[T], entered: asyncio.Future[T]) -> None:
        async with AsyncExitStack() as stack:
            entered.set_result(await enter(stack, manager))
            await leave.wait()

    async with asyncio.TaskGroup() as owners:
        opening: list[asyncio.Future[T]] = []
        for factory in factories:
            opening.append(loop.create_future())
            owners.create_task(own(factory(), opening[-1]))
        # subtle: to cancel us must not cancel a future which an owner is about to set.
        yield [await asyncio.shield(entered) for entered in opening]
        leave.set()


# --- Demos: each runs a broken version, then a right one. Copy what is above into production. ---

PYTHON = (sys.executable, "-S", "-E", "-c")
UPPER = (*PYTHON, "for line in open(0): print(line.upper(), end='', flush=True)")
DEAF = (*PYTHON, "import time; time.sleep(60)")  # a child that does not notice its input's end


async def ask(reader: Any, writer: Any) -> str:
    """Send one line, and return the line that comes back."""
    writer.write(b"hello\n")
    await writer.drain()
    return str((await reader.readline()).decode().strip())


async def failure_of(block: Awaitable[object]) -> Exception:
    """Await a block that is meant to fail, and return what came out of it."""
    try:
        await block
    except Exception as error:  # not BaseException: Ctrl-C must get through
        return error
    raise AssertionError(f"{block} did not fail")


def descriptors() -> int:
    """Return how many files and sockets are open (0 on Windows, which has no list)."""
    return len(list(Path("/dev/fd").glob("*")))


@asynccontextmanager
async def bracketed(label: str, manager: Manager[T]) -> AsyncIterator[T]:
    """Draw a bracket around a manager of either kind, for a list of factories."""
    with bracket(label):
        async with AsyncExitStack() as stack:
            yield await enter(stack, manager)


class Connection:
    """`connection` as a class: set-up in one method, cleanup in another."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    async def __aenter__(self) -> Streams:
        reader, self._writer = await asyncio.open_connection(*self._address)
        return reader, self._writer

    async def __aexit__(self, *error: object) -> None:
        await hang_up(self._writer)


async def ask_by_hand(host: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        return await ask(reader, writer)
    finally:
        await hang_up(writer)


async def demo_one() -> None:
    """One resource: three spellings of the same thing

    By hand, you write `try` and `finally` at every use. In a class, set-up and cleanup are two
    methods. In a generator they stand in one place, in the order in which they happen:
    `@asynccontextmanager` is the tool for one resource of your own.
    """
    show_code(ask_by_hand, Connection, connection)
    with bracket("echo_server"):
        async with echo_server() as address:
            say(f"ask_by_hand: {await ask_by_hand(*address)}")
            with bracket("Connection"):
                async with Connection(*address) as streams:
                    say(await ask(*streams))
            with bracket("connection"):
                async with connection(*address) as streams:
                    say(await ask(*streams))


async def demo_several() -> None:
    """Several resources: nested, on a stack, any number

    If you know the resources as you write, nest them in one `async with`. A stack does the same
    at run time: each entry adds one exit, and the exits run in reverse order. `open_all` is such
    a stack for a list of factories of any length.
    """
    show_code(open_all)
    with tempfile.TemporaryDirectory() as name:
        lock, notes = Path(name, "lock"), Path(name, "notes.db")
        with bracket("lock_file"), lock_file(lock), bracket("database"), database(notes):
            say(_("Nested: what opens first closes last."))
        async with AsyncExitStack() as stack:
            stack.enter_context(bracket("lock_file"))
            stack.enter_context(lock_file(lock))
            stack.enter_context(bracket("database"))
            stack.enter_context(database(notes))
            say(_("On a stack: the same order."))
    children = [partial(bracketed, f"child {n}", child_process(*UPPER)) for n in range(3)]
    async with open_all(children) as processes:
        answers = [await ask(process.stdout, process.stdin) for process in processes]
        say(_("Any number: the children answer {answers}.").format(answers=", ".join(answers)))


class TinyExitStack:
    """The heart of `AsyncExitStack`: a list of exits, run backwards."""

    def __init__(self) -> None:
        self._exits: list[Callable[..., Awaitable[bool | None]]] = []

    async def enter_async_context(self, manager: AsyncManager[T]) -> T:
        value = await manager.__aenter__()
        self._exits.append(manager.__aexit__)
        return value

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *arrived: Any) -> bool:
        details = arrived
        while self._exits:
            try:
                if await self._exits.pop()(*details):
                    details = (None, None, None)  # suppressed
            except BaseException as error:
                details = (type(error), error, error.__traceback__)
        if details[1] not in (None, arrived[1]):
            raise details[1]
        return details[1] is None


async def demo_stack() -> None:
    """A stack of our own, and what the real one adds

    At heart a stack is a list of exits, run backwards: each exit sees the error that the one
    before let through. Ours has twenty lines, and fails for a sync manager. The real one takes
    sync managers (`enter_context`), functions (`callback`, `push_async_callback`), and single
    exits (`push_async_exit`), which may suppress the error.
    """
    show_code(TinyExitStack)
    async with echo_server() as address, TinyExitStack() as tiny:
        streams = await tiny.enter_async_context(bracketed("connection", connection(*address)))
        say(await ask(*streams))
        sync_manager: Any = suppress(ValueError)
        say(repr(await failure_of(tiny.enter_async_context(sync_manager))))

    async def forgive(exc_type: object, error: object, traceback: object) -> bool:
        say(_("push_async_exit sees {error} and suppresses it.").format(error=repr(error)))
        return exc_type is ValueError

    async with echo_server() as address, AsyncExitStack() as stack:
        stack.push_async_exit(forgive)
        stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(say, _("callback: the connection is closed, the folder is still there."))
        reader, writer = await asyncio.open_connection(*address)
        stack.push_async_callback(hang_up, writer)
        raise ValueError(await ask(reader, writer))
    say(_("The folder is gone, and the work goes on."))


async def start_by_hand(folder: Path, opened: list[Any]) -> None:
    opened.append(server := await asyncio.start_server(lambda *streams: None, "127.0.0.1", 0))
    opened.append(notes := sqlite3.connect(folder / "notes.db"))
    lock = (folder / "lock").open("x")  # fails: somebody holds it
    child = await asyncio.create_subprocess_exec(*UPPER)
    try:
        await child.wait()
    finally:
        lock.close()
        notes.close()
        server.close()


async def demo_third_fails() -> None:
    """Set-up fails at the third of four resources

    By hand, you acquire four resources, and then one `try` releases them. The third fails before
    that `try`, and the first two stay open. A stack registers each exit as soon as its resource
    is open, so it closes what was opened, and nothing else.
    """
    show_code(start_by_hand)
    question(_("Somebody holds the lock, so `open` raises. Which lines never run?"))
    with tempfile.TemporaryDirectory() as name, lock_file(Path(name, "lock")) as lock:
        before = descriptors()
        opened: list[Any] = []
        with trace() as path:
            error = await failure_of(start_by_hand(Path(name), opened))
        show_code(start_by_hand, runs={_("one run"): path})
        found, count = _("{error}: {count} descriptors stay open."), descriptors() - before
        verdict(count == 0, found.format(error=type(error).__name__, count=count))
        for resource in opened:
            resource.close()
        four: list[Callable[[], Manager[Any]]] = [
            lambda: bracketed("echo_server", echo_server()),
            lambda: bracketed("database", database(Path(name, "notes.db"))),
            lambda: bracketed("lock_file", lock_file(lock)),
            lambda: bracketed("child_process", child_process(*UPPER)),
        ]
        error = await failure_of(open_all(four).__aenter__())
        say(str(error))
        count = descriptors() - before
        verdict(count == 0, found.format(error=type(error).__name__, count=count))


class NoteServer:
    """A lock, a database and a server, open from `start` to `aclose`, in whichever functions."""

    async def start(self, folder: Path) -> tuple[str, int]:
        async with AsyncExitStack() as stack:
            stack.enter_context(lock_file(folder / "lock"))
            self.notes = stack.enter_context(database(folder / "notes.db"))
            address = await stack.enter_async_context(echo_server())
            self._stack = stack.pop_all()  # set-up has succeeded: from here on the exits are ours
        return address

    async def aclose(self) -> None:
        await self._stack.aclose()


async def demo_hand_over() -> None:
    """Resources that outlive a function: pop_all

    A stack runs its exits when its block ends, so the first function below returns the address
    of a server that is already closed. `pop_all` moves the exits to a new stack once set-up has
    succeeded. An object that lives longer keeps the new stack as an attribute.
    """

    async def start() -> tuple[str, int]:
        async with AsyncExitStack() as stack:
            return await stack.enter_async_context(echo_server())

    show_code(start, NoteServer)
    verdict(False, repr(await failure_of(asyncio.open_connection(*await start()))))
    server = NoteServer()
    with tempfile.TemporaryDirectory() as name:
        address = await server.start(Path(name))
        async with aclosing(server):
            with bracket("connection"):
                async with connection(*address) as streams:
                    say(await ask(*streams))
        names = os.listdir(name)
        left = _("After aclose the folder holds {names}.").format(names=", ".join(names))
        verdict("lock" not in names, left)


async def answers(address: tuple[str, int]) -> AsyncGenerator[str, None]:
    with bracket("connection"):
        async with connection(*address) as streams:
            while True:
                yield await ask(*streams)


async def demo_generator() -> None:
    """A generator that holds a resource: aclosing

    `break` leaves the loop, not the generator. What the generator holds stays open until it is
    collected as garbage, if ever. `aclosing` closes the generator when its block ends.
    """
    show_code(answers)
    async with echo_server() as address:
        left = answers(address)
        async for answer in left:
            say(answer)
            break
        say(_("After `break` the connection is still open."))
        await left.aclose()
        async with aclosing(answers(address)) as stream:
            async for answer in stream:
                say(answer)
                break


async def demo_cleanup_fails() -> None:
    """Cleanup that fails: the other exits still run

    Every exit runs, even if one before it raised. The last error comes out, and its
    `__context__` leads back to the others. But if the block ended well, a stack may lose every
    error of its callbacks except the last (python/cpython#102201). Nested blocks lose none.
    """

    async def flush(name: str) -> None:
        raise OSError(name)

    async def stacked(block_error: Exception | None) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(flush, "first")
            stack.push_async_callback(flush, "second")
            if block_error:
                raise block_error

    async def nested() -> None:
        try:
            await flush("second")
        finally:
            await flush("first")

    show_code(stacked, nested)
    blocks = {
        _("A stack, and the block fails too"): stacked(ValueError("the block")),
        _("A stack, and the block ends well"): stacked(None),
        _("Nested, and the block ends well"): nested(),
    }
    for name, block in blocks.items():
        say(f"{name}:", style="bold")
        error: BaseException | None = await failure_of(block)
        while error:
            say(repr(error), "  ")
            error = error.__context__


@asynccontextmanager
async def naive_child(*command: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    try:
        yield process
    finally:
        try:
            await asyncio.wait_for(process.wait(), timeout=1)
        except TimeoutError:
            process.kill()  # but if that wait is cancelled, nobody does


async def demo_cancelled() -> None:
    """A cancellation during cleanup

    Cleanup that awaits can be cancelled like any other code: by a second Ctrl-C, or by a timeout
    around it. The lines after that `await` never run, and no stack helps. So do what matters
    first and without `await` (`kill`, `abort`, `close`), then shield the rest, which is short.
    """
    lives = False

    async def use(manager: AsyncManager[Process]) -> None:
        nonlocal lives
        process = None
        try:
            async with manager as process:
                opened.set()
                await process.wait()
        finally:
            lives = process is not None and process.returncode is None
            if process and lives:
                process.kill()
                await uninterrupted(process.wait())

    show_code(naive_child)
    question(_("The block is cancelled, and then its cleanup. Does `process.kill` run?"))
    for child in (naive_child, child_process):
        opened = asyncio.Event()
        with trace() as path:
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(use(child(*DEAF)))
                await opened.wait()
                task.cancel()  # ends the block
                await asyncio.sleep(0)
                task.cancel()  # strikes its cleanup
        show_code(child, runs={_("cancelled twice"): path})
        result = _("{name}: the child lives on.") if lives else _("{name}: the child is gone.")
        verdict(not lives, result.format(name=child.__name__))


async def demo_together() -> None:
    """Set-ups at the same time: owners, not gather

    `gather` enters each manager in a task of its own, which ends at once. The stack gets the
    exits in the order in which the set-ups finish. A manager that is bound to its task exits in
    another one. And if one set-up fails, the others go on, and enter a stack that is already
    closed. In `open_together`, the task that enters a manager stays to exit it.
    """
    stack, current = AsyncExitStack(), ContextVar[str]("current")

    @asynccontextmanager
    async def announced(name: str, manager: Manager[Any]) -> AsyncIterator[None]:
        async with AsyncExitStack() as own:
            await enter(own, manager)
            say(_("{name} is open").format(name=name))
            yield
        say(_("{name} is closed").format(name=name))

    @asynccontextmanager
    async def bound() -> AsyncIterator[None]:
        token = current.set("in the task that enters")
        try:
            yield
        finally:
            current.reset(token)

    async def gathered(*managers: Manager[Any]) -> None:
        async with stack:
            await asyncio.gather(*(enter(stack, manager) for manager in managers))

    def report(name: str, error: BaseException) -> None:
        found, count = _("{name}: {error}, {count} descriptors stay open."), descriptors() - before
        verdict(count == 0, found.format(name=name, error=type(error).__name__, count=count))

    show_code(gathered, open_together)
    with tempfile.TemporaryDirectory() as name, lock_file(Path(name, "held")) as held:
        before = descriptors()
        child, lock = partial(child_process, *UPPER), partial(lock_file, Path(name, "lock"))
        await gathered(announced("child_process", child()), announced("lock_file", lock()))
        verdict(False, _("gather: the child is first in the list, opens last and closes first."))
        error = await failure_of(gathered(bound()))
        verdict(False, f"gather: {type(error).__name__}: {str(error).rpartition('> ')[2]}")
        try:
            error = await failure_of(gathered(child(), lock_file(held)))
        finally:  # the child is still opening
            late = asyncio.all_tasks() - {asyncio.current_task()}
            await uninterrupted(asyncio.gather(*late, return_exceptions=True))
        report("gather", error)
        await stack.aclose()
        pair: list[Callable[[], Manager[Any]]] = [child, partial(lock_file, held)]
        report("open_together", await failure_of(open_together(pair).__aenter__()))


def demo_which_one() -> None:
    """Which one?

    They are not rivals: write each resource with `@asynccontextmanager`, and hold several with
    `AsyncExitStack`.
    """
    heading = (_("What you have"), "@asynccontextmanager", "AsyncExitStack", _("demo"))
    table = Table(*(Column(title, overflow="fold") for title in heading))
    for row in (
        (_("one resource of your own"), _("yes"), _("too much"), "1"),
        (_("a few, known as you write"), _("nest them in one `async with`"), _("too much"), "2"),
        (_("a number known at run time"), _("around a stack: `open_all`"), _("yes"), "2"),
        (
            _("cleanup that is a function"),
            _("needs a wrapper"),
            _("`callback` or `push_async_callback`"),
            "3",
        ),
        (
            _("set-up that fails half way"),
            _("cleans up its own part"),
            _("closes those that are open"),
            "4",
        ),
        (_("resources that outlive a function"), _("no"), "`pop_all`", "5"),
        (_("a generator left early"), _("no: `aclosing`"), _("enters `aclosing`"), "6"),
        (
            _("several cleanups that fail"),
            _("all chained"),
            _("all chained, if the block failed"),
            "7",
        ),
        (_("a cancellation in cleanup"), _("shield it here"), _("cannot help"), "8"),
        (_("set-ups at the same time"), _("in an owner task each"), _("not with `gather`"), "9"),
    ):
        table.add_row(*row)
    console.print(table)


DEMOS = (
    demo_one,
    demo_several,
    demo_stack,
    demo_third_fails,
    demo_hand_over,
    demo_generator,
    demo_cleanup_fails,
    demo_cancelled,
    demo_together,
    demo_which_one,
)
KEY_POINTS = """\
* Register each exit as soon as its resource is open; call `pop_all` once set-up has succeeded.
* In cleanup, do what matters without `await`, then shield the short rest.
* The task that enters a manager exits it."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. This chapter has no options of its own."""
    try:
        yield parser.parse_args()
    except asyncio.CancelledError:  # Python 3.11: Ctrl-C after a TaskGroup has failed
        raise KeyboardInterrupt from None


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[bracket] = []
stepping = False  # --step
WIDE = r"\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffe6"
OPENING, CLOSING = re.escape("\"'([{（「《“‘"), re.escape("\"')]},.;:!?%，。、；：！？）」》”’…—")
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        line = ""
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(line + part.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines += [line.rstrip(), ""]
    return lines[:-1]


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
    """With --step, wait for Enter. At the end of the input, stop waiting for it."""
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


class bracket:
    """Draw where a block begins and how it ends: `with bracket("timer"), timer("sort"): ...`.

    Enter it again, as the innermost manager, and it also sees an error that is suppressed:
    `with bracket("quiet") as scope, suppress(OSError), scope: ...`.
    """

    def __init__(self, label: str) -> None:
        self.label, self.depth, self.error = label, 0, ""

    def __enter__(self) -> Self:
        if self.depth == 0:
            self.error = ""
            say(self.label, "┌ ")
            open_brackets.append(self)
        self.depth += 1
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.depth -= 1
        if exc_type:
            self.error = exc_type.__name__
        if self.depth == 0:
            ending = _("left by {error}, suppressed") if self.error else _("ended")
            if exc_type:
                ending = _("left by {error}")
            open_brackets.remove(self)
            say(ending.format(error=self.error), "└ ")


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
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines))).splitlines()
    numbered = list(enumerate(code, first))
    if piece.__doc__:
        start = next(i for i, line in enumerate(code) if '"""' in line)
        del numbered[start : start + piece.__doc__.count("\n") + 1]
    return [(number, line) for number, line in numbered if line]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    python = Syntax("", "python", theme="ansi_dark")
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    columns = [heading, *(Column(title, justify="center") for title in runs)]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    sources = [source(piece) for piece in pieces]
    shown = {number for lines in sources for number, _text in lines}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for lines in sources:
        for number, text in lines:
            code = python.highlight(text)
            code.rstrip()
            code.no_wrap = False
            table.add_row(code, *(places(number, path) for path in paths))
        if lines is not sources[-1]:
            table.add_row()
    console.print(table, "")


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        import asyncio  # here, so that a chapter without tasks starts sooner

        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    description = "\n".join(wrap(_(__doc__ or ""), console.width))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    numbers = range(1, len(DEMOS) + 1)
    try:
        with command_line(parser) as options:
            for number in options.demo:
                if number not in numbers:
                    parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
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
