# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16"]
# ///
"""Chapter 07 · AsyncExitStack vs @asynccontextmanager: one resource, several, any number.

After this chapter you can open any number of real resources (sockets, child processes, an SQLite
transaction, a lock file) so that none is left behind when set-up fails half way, when cleanup
fails, or when a cancellation arrives in the middle of either; and you know which tool when.

    python 07_asyncexitstack_vs_asynccontextmanager.py          play all nine demos
    python 07_asyncexitstack_vs_asynccontextmanager.py 4 9      play demos 4 and 9 alone

Read the managers first: they are production code, and they print nothing. Then watch in which
order the brackets close, and what the broken versions leave open.

Left out: what a single `async with` does (chapter 03), MCP servers held this way (chapter 08).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import os
import sqlite3
import sys
import tempfile
import time
from asyncio.subprocess import Process, SubprocessStreamProtocol
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager as AsyncManager
from contextlib import AbstractContextManager as SyncManager
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Self, TypeAlias, TypeVar

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.syntax import Syntax
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


# --- Demos: from here on the file tells the story. Copy what is above into production. ---

console = Console(highlight=False)
_ = gettext.translation("workshop", Path(__file__).parent / "locale", fallback=True).gettext
open_brackets: list[str] = []
PYTHON = (sys.executable, "-S", "-E", "-c")
UPPER = (*PYTHON, "for line in open(0): print(line.upper(), end='', flush=True)")
DEAF = (*PYTHON, "import time; time.sleep(60)")  # a child that does not notice its input's end


def say(text: str) -> None:
    """Print a paragraph inside the open brackets, each of its lines behind their bars."""
    bars = "│ " * len(open_brackets)
    for line in Text.from_markup(text).wrap(console, console.width - len(bars)):
        line.rstrip()
        console.print(Text.assemble((bars, "dim"), line))


@asynccontextmanager
async def shown(label: str, manager: Manager[T]) -> AsyncIterator[T]:
    """Enter a manager and draw its scope: a bracket with the times of set-up, use and cleanup."""
    say(f"┌ [bold]{escape(label)}[/]")
    open_brackets.append(label)
    how, left_by = _("left at its end"), None
    marks = [time.perf_counter()]
    try:
        async with AsyncExitStack() as stack:
            value = await enter(stack, manager)
            marks.append(time.perf_counter())
            try:
                yield value
            except BaseException as error:
                how, left_by = _("left by {error}").format(error=type(error).__name__), error
                raise
            finally:
                marks.append(time.perf_counter())
    except BaseException as error:
        if error is not left_by:
            failed = _("setup raised {error}") if len(marks) == 1 else _("cleanup raised {error}")
            how = failed.format(error=type(error).__name__)
        raise
    finally:
        marks.append(time.perf_counter())
        open_brackets.remove(label)
        spans = zip((_("setup"), _("use"), _("cleanup")), pairwise(marks), strict=False)
        times = " · ".join(f"{name} {1000 * (end - start):.2f}" for name, (start, end) in spans)
        say(f"└ [bold]{escape(label)}[/] {how}  [dim]{times} ms[/]")


def show_code(*pieces: Callable[..., Any]) -> None:
    """Print functions and classes as they stand in this file."""
    syntax = partial(Syntax, theme="ansi_dark", word_wrap=True, background_color="default")
    for piece in pieces:
        console.print(syntax(inspect.getsource(piece).rstrip(), "python"), "")


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
    """How many files and sockets this process has open (0 on Windows, which has no list)."""
    return len(list(Path("/dev/fd").glob("*")))


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

    By hand, set-up and cleanup stand around `try/finally`, at every use. In a class they are two
    methods. In a generator they stand in one place, in the order in which they happen:
    `@asynccontextmanager` is the tool for **one resource of your own**.
    """
    show_code(ask_by_hand, Connection, connection)
    async with shown("echo_server", echo_server()) as address:
        say(f"ask_by_hand: {await ask_by_hand(*address)}")
        async with shown("Connection", Connection(*address)) as streams:
            say(await ask(*streams))
        async with shown("connection", connection(*address)) as streams:
            say(await ask(*streams))


async def demo_several() -> None:
    """Several resources: nested blocks, one stack, any number

    A fixed few nest in one `async with`. A stack does the same at run time: each entry adds one,
    all are left in reverse order. `open_all` is that stack for a list of factories, however long.
    """
    with tempfile.TemporaryDirectory() as name:
        lock, notes = Path(name, "lock"), Path(name, "notes.db")
        async with shown("lock_file", lock_file(lock)), shown("database", database(notes)):
            say(_("Nested: what opens first closes last."))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(shown("lock_file", lock_file(lock)))
            await stack.enter_async_context(shown("database", database(notes)))
            say(_("On a stack: just the same."))
    children = [partial(shown, f"child {n}", child_process(*UPPER)) for n in range(3)]
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
    """A stack of our own, in twenty lines, and what the real one adds

    At heart it is a list of exits, run backwards: each sees the error that the one before let
    through. Ours fails for a sync manager; the real one takes it (`enter_context`), and functions
    (`callback`, `push_async_callback`), and bare exits (`push_async_exit`), which may suppress.
    """
    show_code(TinyExitStack)
    async with echo_server() as address, TinyExitStack() as tiny:
        say(await ask(*await tiny.enter_async_context(shown("connection", connection(*address)))))
        sync_manager: Any = suppress(ValueError)
        say(escape(repr(await failure_of(tiny.enter_async_context(sync_manager)))))

    async def forgive(kind: object, error: object, traceback: object) -> bool:
        say(_("push_async_exit sees {error} and suppresses it.").format(error=escape(repr(error))))
        return kind is ValueError

    async with echo_server() as address, AsyncExitStack() as stack:
        stack.push_async_exit(forgive)
        stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(say, _("callback: the connection is closed, the folder not yet."))
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

    By hand, four are acquired and then one `try/finally` releases them: the failure of the third
    skips it, and two stay open. On a stack each exit is registered as soon as there is something
    to leave: what was opened is closed, and nothing else.
    """
    with tempfile.TemporaryDirectory() as name, lock_file(Path(name, "lock")) as lock:
        before = descriptors()
        opened: list[Any] = []
        error = await failure_of(start_by_hand(Path(name), opened))
        found = _("{error}: {count} descriptors stay open.")
        say(found.format(error=type(error).__name__, count=descriptors() - before))
        for resource in opened:
            resource.close()
        four: list[Callable[[], Manager[Any]]] = [
            lambda: shown("echo_server", echo_server()),
            lambda: shown("database", database(Path(name, "notes.db"))),
            lambda: shown("lock_file", lock_file(lock)),
            lambda: shown("child_process", child_process(*UPPER)),
        ]
        error = await failure_of(open_all(four).__aenter__())
        say(escape(str(error)))
        say(found.format(error=type(error).__name__, count=descriptors() - before))


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
    """Resources that outlive the function that opens them: pop_all

    At the end of its block a stack is emptied, so that what such a function returns is closed
    already. `pop_all` moves the exits to a new stack, once set-up has succeeded; an object that
    lives long keeps this one as an attribute.
    """

    async def start() -> tuple[str, int]:
        async with AsyncExitStack() as stack:
            return await stack.enter_async_context(echo_server())

    say(escape(repr(await failure_of(asyncio.open_connection(*await start())))))
    server = NoteServer()
    with tempfile.TemporaryDirectory() as name:
        address = await server.start(Path(name))
        async with aclosing(server), shown("connection", connection(*address)) as streams:
            say(await ask(*streams))
        say(_("After aclose the folder holds {names}.").format(names=", ".join(os.listdir(name))))


async def answers(address: tuple[str, int]) -> AsyncGenerator[str, None]:
    async with shown("connection", connection(*address)) as streams:
        while True:
            yield await ask(*streams)


async def demo_generator() -> None:
    """A generator that holds a resource: aclosing

    `break` leaves the loop, not the generator: what that holds stays open until it is collected
    as garbage, if ever. `aclosing` leaves the generator where its block ends.
    """
    async with echo_server() as address:
        left = answers(address)
        async for answer in left:
            say(answer)
            break
        say(_("After break the connection is open still."))
        await left.aclose()
        async with aclosing(answers(address)) as stream:
            async for answer in stream:
                say(answer)
                break


async def demo_cleanup_fails() -> None:
    """Cleanup that fails: the others still run, and the errors are chained

    Every exit runs, whatever those before it raised. The last error comes out; its `__context__`
    leads back to the others. But where the *block* ended well, a stack may lose all errors of
    callbacks but the last (python/cpython#102201), and nested blocks do not.
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

    blocks = {
        _("A stack, and the block fails too"): stacked(ValueError("the block")),
        _("A stack, and the block ends well"): stacked(None),
        _("Nested, and the block ends well"): nested(),
    }
    for name, block in blocks.items():
        say(f"[bold]{name}:[/]")
        error: BaseException | None = await failure_of(block)
        while error:
            say(f"  {escape(repr(error))}")
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
            process.kill()  # but when that wait is cancelled, nobody does


async def demo_cancelled() -> None:
    """A cancellation during cleanup

    Cleanup that awaits can be cancelled like any other code: by a second Ctrl-C, by a timeout
    around it. What stands after that `await` never runs, and no stack helps. So do what decides
    at once, without `await` (`kill`, `abort`, `close`), and shield the rest, which then is short.
    """

    async def use(name: str, manager: AsyncManager[Process]) -> None:
        process = None
        try:
            async with manager as process:
                opened.set()
                await process.wait()
        finally:
            lives = process and process.returncode is None
            said = _("{name}: the child lives on.") if lives else _("{name}: the child is gone.")
            say(said.format(name=name))
            if process and lives:
                process.kill()
                await uninterrupted(process.wait())

    for child in (naive_child, child_process):
        opened = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(use(child.__name__, child(*DEAF)))
            await opened.wait()
            task.cancel()  # ends the block
            await asyncio.sleep(0)
            task.cancel()  # strikes its cleanup


async def demo_together() -> None:
    """Set-ups at the same time: not by gather, but by owners

    `gather` enters each manager in a task of its own, which ends at once. The stack gets the
    exits in the order in which set-ups *finished*. A manager bound to its task is left in another
    one. And where one set-up fails, the others go on, and enter a stack that was left already.
    In `open_together` a task that enters a manager stays to leave it, and none is forgotten.
    """
    stack, current = AsyncExitStack(), ContextVar[str]("current")

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
        found = _("{name}: {error}, {count} descriptors stay open.")
        kind = type(error).__name__
        say(found.format(name=name, error=kind, count=descriptors() - before))

    with tempfile.TemporaryDirectory() as name, lock_file(Path(name, "held")) as held:
        before = descriptors()
        child, lock = partial(child_process, *UPPER), partial(lock_file, Path(name, "lock"))
        await gathered(shown("child_process", child()), shown("lock_file", lock()))
        say(_("gather: the child, first in the list, opened last and closed first."))
        error = await failure_of(gathered(bound()))
        say(f"gather: {type(error).__name__}: {escape(str(error).rpartition('> ')[2])}")
        try:
            error = await failure_of(gathered(child(), lock_file(held)))
        finally:  # the child is still opening
            late = asyncio.all_tasks() - {asyncio.current_task()}
            await uninterrupted(asyncio.gather(*late, return_exceptions=True))
        report("gather", error)
        await stack.aclose()
        pair: list[Callable[[], Manager[Any]]] = [child, partial(lock_file, held)]
        report("open_together", await failure_of(open_together(pair).__aenter__()))


DEMOS = [demo for name, demo in list(globals().items()) if name.startswith("demo_")]


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    demo = DEMOS[number - 1]
    title, lesson = _(inspect.getdoc(demo) or "").split("\n", 1)
    console.rule(f"[bold]{number} · {title}", align="left")
    console.print(Markdown(lesson), "")
    asyncio.run(demo())
    console.print()


DECISIONS = _("""\
| What you have | `@asynccontextmanager` | `AsyncExitStack` | demo |
|---|---|---|---|
| one resource of your own | yes | too much | 1 |
| a few, known as you write | nest them in one `async with` | too much | 2 |
| a number known at run time | around a stack: `open_all` | yes | 2 |
| cleanup that is a function | needs a wrapper | `callback`, `push_async_callback` | 3 |
| set-up that fails half way | cleans up its own part | leaves those that are open | 4 |
| resources that outlive a function | no | `pop_all` | 5 |
| a generator left early | no: `aclosing` | enters `aclosing` like any other | 6 |
| several cleanups that fail | all chained | all chained, if the block failed | 7 |
| a cancellation in cleanup | shield it here | cannot help | 8 |
| set-ups at the same time | in an owner task each | not by `gather` | 9 |

They are not rivals: write each resource with the one, hold several with the other.""")


def show_key_points() -> None:
    points = _("""\
* Register each exit as soon as there is something to leave; `pop_all` once set-up succeeded.
* In cleanup, decide without `await`, then shield the short rest.
* The task that enters a manager leaves it.""")
    console.rule(_("[bold]Which one?"), align="left")
    console.print(Markdown(DECISIONS), "")
    console.rule(_("[bold]Key points"), align="left")
    console.print(Markdown(points))


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage above it


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=__doc__, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help="play only these, by number")
    chosen = parser.parse_args().demo or range(1, len(DEMOS) + 1)
    for number in chosen:
        if not 1 <= number <= len(DEMOS):
            parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
    try:
        for number in chosen:
            play(number)
        show_key_points()
    except (KeyboardInterrupt, asyncio.CancelledError):  # the latter: 3.11, after a group failed
        console.print(_("Interrupted. Every bracket above was closed on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
