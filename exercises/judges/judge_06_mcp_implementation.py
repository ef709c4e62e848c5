"""What judges the exercises of chapter 06."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from judging import NotSolvedError, _, attempt, expect, keep_contract, load, task

TURNS = 25  # of the event loop, in which every task goes as far as it can
PATIENCE = 2.0  # seconds until something that waits is taken for something that hangs


async def settle() -> None:
    for _turn in range(TURNS):
        await asyncio.sleep(0)


def run_in_turns(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what never waits for real time; notice at once if it hangs."""

    async def main() -> None:
        running = asyncio.create_task(coroutine)
        for _times in range(4):
            await settle()
        if not running.done():
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()
                await asyncio.wait([each], timeout=0)
            expect(False, _("it ends"), _("it waits for ever"))
        running.result()

    asyncio.run(main())


def comes_out(error: BaseException | None) -> str:
    """Say in words what came out of a block, or should."""
    if error is None:
        return _("no exception comes out")
    return _("{error} comes out").format(error=repr(error))


# --- 1 ---


class FakeTime(asyncio.SelectorEventLoop):
    """An event loop that does not wait for its timers: its clock jumps to the next one."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        timers = [each.when() for each in self._scheduled if not each.cancelled()]  # type: ignore[attr-defined]
        if timers and not self._ready:  # type: ignore[attr-defined]
            self.now = max(self.now, min(timers))
        super()._run_once()  # type: ignore[misc]


class FakeClients:
    """Opens clients that take their time and, like real ones, contain a cancel scope."""

    def __init__(self, start: float = 0.0, end: float = 0.0, fails: str = "") -> None:
        self.start, self.end, self.fails = start, end, fails
        self.open: list[str] = []
        self.log: list[str] = []
        self.tasks: list[asyncio.Task[Any] | None] = []  # that enter and exit
        self.starting = 0
        self.most_starting = 0  # at the same time

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[str]:
        import anyio

        self.open.append("a client is open")
        self.tasks.append(asyncio.current_task())
        try:
            with anyio.CancelScope():
                self.starting += 1
                self.most_starting = max(self.starting, self.most_starting)
                try:
                    await asyncio.sleep(self.start)
                    if self.fails == "start":
                        raise OSError("the client does not start")
                finally:
                    self.starting -= 1
                try:
                    yield "the client"
                finally:
                    self.tasks.append(asyncio.current_task())
                    self.log.append("exit begins")
                    await asyncio.sleep(self.end)
                    self.log.append("exit ends")
                    if self.fails == "exit":
                        raise OSError("the client does not exit")
        finally:
            self.open.pop()


@task(
    "06.1",
    _("The conversations that broke off"),
    "connected",
    lesson="06_mcp_implementation.md#the-start",
    hint=_(
        "`async with open_client()` is an entry, a block and an exit. The limit must contain only "
        "the entry. What lets you enter a manager here, and exit it later?"
    ),
    strong_hint=_(
        "In `async with AsyncExitStack() as stack:`, put only `await stack.enter_async_context("
        "open_client())` into `async with asyncio.timeout(startup_timeout):`. Put the `yield` "
        "behind that, but still inside the stack."
    ),
)
def judge_connected(answer: Any) -> None:
    value_error, timeout_error = ValueError("of the block"), TimeoutError("of the block")
    with attempt(_("connected(open_client): the block ends at once")):
        with_fake_time(use_connected(answer, FakeClients(start=1)))
    with attempt(
        _("connected(open_client, 15.0): ready after 14 s; the block takes a minute"),
        _("the block reaches its end"),
    ):
        with_fake_time(use_connected(answer, FakeClients(start=14), block=60))
    with attempt(_("connected(open_client, 15.0): the client would be ready after an hour")):
        with_fake_time(start_too_long(answer, FakeClients(start=3600)))
    with attempt(
        _("connected(open_client, 15.0): the exit of the client takes a minute"),
        _("the exit reaches its end"),
    ):
        with_fake_time(use_connected(answer, FakeClients(start=1, end=60)))
    for called, error in (
        (_("connected(open_client): the block raises ValueError"), value_error),
        (_("connected(open_client): the block raises its own TimeoutError"), timeout_error),
    ):
        with attempt(called, comes_out(error)):
            with_fake_time(use_connected(answer, FakeClients(start=1), raises=error))

    from contract import Subject

    def subject() -> Subject:
        clients = FakeClients()
        return Subject(
            open=lambda: answer.connected(clients),
            leaks=lambda: clients.open,
            setup_faults=[lambda: failing(clients, "start")],
            cleanup_faults=[lambda: failing(clients, "exit")],
        )

    keep_contract(subject)


def with_fake_time(coroutine: Any) -> None:
    with asyncio.Runner(loop_factory=FakeTime) as runner:
        runner.run(coroutine)


@contextmanager
def failing(clients: FakeClients, moment: str) -> Iterator[type[Exception]]:
    """Let clients fail when they are entered or exited."""
    clients.fails = moment
    yield OSError
    clients.fails = ""


async def use_connected(
    answer: Any, clients: FakeClients, block: float = 0.0, raises: Exception | None = None
) -> None:
    """Use a client in a block, and look at what was entered and exited when, and by whom."""
    values: list[object] = []
    came_out: BaseException | None = None
    reached = False
    try:
        async with answer.connected(clients, 15.0) as value:
            values.append(value)
            await asyncio.sleep(block)
            reached = True
            if raises:
                raise raises
    except TimeoutError as error:
        came_out = error
    except ValueError as error:
        came_out = error
    if came_out is not raises:
        now = asyncio.get_running_loop().time()
        cut_off = _("after {n:g} s, {error} comes out").format(n=now, error=repr(came_out))
        if "exit begins" in clients.log and reached:
            expect("exit ends" in clients.log, _("the exit reaches its end"), cut_off)
        expect(reached, _("the block reaches its end"), cut_off)
        expect(came_out is raises, comes_out(raises), comes_out(came_out))
    expect(
        values == ["the client"],
        _("the value of the block is that of the client"),
        _("it is {value}").format(value=repr(values[0])),
    )
    expect(not clients.open, _("afterwards, no client is open"), _("one is still open"))
    own = asyncio.current_task()
    expect(
        all(each is own for each in clients.tasks),
        _("the client is entered and exited in the task that uses `connected`"),
        _("another task does that"),
    )


async def start_too_long(answer: Any, clients: FakeClients) -> None:
    """Open a client that would take an hour."""
    expected = _("after 15 s, TimeoutError comes out")
    entered = False
    came_out: BaseException | None = None
    try:
        async with answer.connected(clients, 15.0):
            entered = True
    except TimeoutError as error:
        came_out = error
    now = asyncio.get_running_loop().time()
    expect(not entered, expected, _("after {n:g} s, the block begins").format(n=now))
    happened = _("after {n:g} s, {what}").format(n=now, what=comes_out(came_out))
    expect(came_out and now == 15, expected, happened)
    still = _("it is still being started")
    expect(not clients.open, _("then the client that was being started has cleaned up"), still)


# --- 2 ---


@task(
    "06.2",
    _("Hold a manager in its own task"),
    "owned",
    lesson="06_mcp_implementation.md#several-clients-one-owner-task-each",
    hint=_(
        "The task needs two signals: one that it sends, ready or failed, and one that it waits "
        "for, the end of the block. Only `async with manager` inside the task enters and exits it."
    ),
    strong_hint=_(
        "Wait for an Event that the task sets when the manager is entered, and that "
        "`task.add_done_callback` sets when the task fails. In `finally`: set the other Event, "
        "`cancel()` the task if it is not ready, and await `asyncio.wait([task])` in a loop that "
        "keeps a CancelledError for later. Then `task.result()` raises what went wrong, and what "
        "you kept comes out."
    ),
)
def judge_owned(answer: Any) -> None:
    with attempt(_("async with owned(client): the block ends well")):
        run_in_turns(use_owned(answer))
    with attempt(_("asyncio.gather enters owned(client) twice, and another task exits both")):
        run_in_turns(gather_owned(answer))
    for called, moment in (
        (_("owned(client): the client raises OSError when it is entered"), "start"),
        (_("owned(client): the client raises OSError when it is exited"), "exit"),
    ):
        with attempt(called, _("this OSError comes out")):
            run_in_turns(fail_owned(answer, moment))
    error = ValueError("of the block")
    with attempt(_("async with owned(client): the block raises ValueError"), comes_out(error)):
        run_in_turns(use_owned(answer, error))
    with attempt(_("owned(client): cancelled while the client is being entered")):
        asyncio.run(cancel_owned(answer, in_exit=False))
    with attempt(_("owned(client): cancelled while the client is being exited")):
        asyncio.run(cancel_owned(answer, in_exit=True))

    from contract import Subject

    def subject() -> Subject:
        clients = FakeClients()
        return Subject(
            open=lambda: answer.owned(clients()),
            leaks=lambda: clients.open,
            setup_faults=[lambda: failing(clients, "start")],
            cleanup_faults=[lambda: failing(clients, "exit")],
        )

    keep_contract(subject)


async def use_owned(answer: Any, raises: Exception | None = None) -> None:
    """Hold one client, in the way that is most simple."""
    clients = FakeClients()
    came_out: BaseException | None = None
    values: list[object] = []
    try:
        async with answer.owned(clients()) as value:
            values.append(value)
            expect(clients.open, _("in the block, the manager is entered"), _("it is not entered"))
            expect(not clients.log, _("in the block, the manager is entered"), _("it was exited"))
            if raises:
                raise raises
    except (ValueError, ExceptionGroup) as error:
        came_out = error
    happened = _("it is {value}").format(value=repr(values[0]) if values else _("nothing"))
    expect(values == ["the client"], _("the value of the block is the manager's"), happened)
    expect(came_out is raises, comes_out(raises), comes_out(came_out))
    expect_exited(clients)
    entered, exited = clients.tasks
    expected = _("one task enters the manager, and the same task exits it")
    expect(entered is exited, expected, _("one task enters it, and another one exits it"))
    own = asyncio.current_task()
    expected = _("its own task enters the manager")
    expect(entered is not own, expected, _("the task that uses `owned` enters it"))


def expect_exited(clients: FakeClients) -> None:
    """Expect that the manager was exited before the statement has ended."""
    expected = _("the manager has been exited when the `async with` statement has ended")
    if "exit begins" in clients.log:
        expect("exit ends" in clients.log, expected, _("its exit was begun, but it did not end"))
    expect(not clients.open, expected, _("it is still entered"))


async def gather_owned(answer: Any) -> None:
    """Enter two clients side by side, in tasks that end; exit them in this one."""
    clients = FakeClients()
    async with AsyncExitStack() as stack:
        starts = [stack.enter_async_context(answer.owned(clients())) for _client in range(2)]
        await asyncio.gather(*starts)
        entered = len(clients.open) == 2 and not clients.log
        expect(entered, _("in the block, both managers are entered"), _("one was exited already"))
        together = clients.most_starting == 2
        expect(together, _("both start side by side"), _("one starts after the other"))
    expect_exited(clients)


async def fail_owned(answer: Any, moment: str) -> None:
    clients = FakeClients(fails=moment)
    came_out: BaseException | None = None
    try:
        async with answer.owned(clients()):
            began = True
            expect(moment == "exit", _("the block does not begin"), _("it begins"))
    except Exception as error:
        came_out = error
        began = False
    del began
    if isinstance(came_out, NotSolvedError | NotImplementedError):
        raise came_out
    same = isinstance(came_out, OSError) and moment in str(came_out)
    if isinstance(came_out, Exception) and not isinstance(came_out, OSError | ExceptionGroup):
        raise came_out  # so that `attempt` reports its line, too
    expect(same, _("this OSError comes out"), comes_out(came_out))
    expect_exited(clients)


async def cancel_owned(answer: Any, in_exit: bool) -> None:
    """Cancel the one who uses `owned`, while the manager needs time."""
    log: list[str] = []
    go_on, block_ended = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        log.append("entering")
        try:
            if not in_exit:
                await asyncio.Event().wait()
            yield
        finally:
            log.append("cleaning up")
            try:
                await go_on.wait()
                log.append("clean")
            except asyncio.CancelledError:
                log.append("cut off")
                raise

    async def user() -> None:
        try:
            async with answer.owned(slow()):
                log.append("block")
        finally:
            block_ended.set()

    using = asyncio.create_task(user())
    await settle()
    using.cancel()
    await settle()
    early, cleaning_up = block_ended.is_set(), "cleaning up" in log
    go_on.set()
    await settle()
    ended = using.done()
    error = None if using.cancelled() or not ended else using.exception()
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
        await asyncio.wait([each])
    if isinstance(error, NotImplementedError):
        raise error
    if not in_exit:
        expected = _("the entry is cancelled, too, and the client cleans up")
        expect(cleaning_up, expected, _("the client is still being entered"))
    expected = _("the cleanup of the client ends before the `async with` statement does")
    expect("cut off" not in log, expected, _("you pass a cancellation on to it, and it is cut off"))
    expect(not early, expected, _("the statement has ended, and the client still cleans up"))
    expect(ended, _("then the `async with` statement ends"), _("it never ends"))
    wanted = asyncio.CancelledError()
    expect(using.cancelled(), comes_out(wanted), comes_out(error))


# --- 3 ---


@task(
    "06.3",
    _("MCP over WebSocket"),
    "websocket_streams",
    "websocket_client",
    lesson="06_mcp_implementation.md#custom-transports",
    hint=_(
        "`create_memory_object_stream(0)`, of anyio, makes both ends of a stream: you need two. "
        "One task moves texts from the socket to the stream to read, another one moves messages "
        "from the stream to write to the socket. Ask of each: how does it end, and who learns it?"
    ),
    strong_hint=_(
        "When the socket ends, close *your* end of the stream to read: that is what fails the "
        "calls under way. Catch ConnectionClosed in both tasks, and ValueError around only "
        "`validate_json`. When the block ends, cancel the task group, in `finally`. Close all "
        "four ends by `with`. `websockets.connect` has a `max_size` of 1 MiB unless you say "
        "otherwise."
    ),
    seconds=30,  # about two seconds on a machine that does nothing else
)
def judge_websocket(answer: Any) -> None:
    shelf()  # imports mcp, for half a second that is not the answer's
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    with mock.patch.dict(os.environ, proxies | {"NO_PROXY": "*"}):
        loggers = [logging.getLogger(name) for name in ("mcp", "websockets")]
        for each in loggers:
            each.setLevel(logging.CRITICAL)  # they log what happens here on purpose
        judge_streams(answer)
        judge_sessions(answer)
    judge_transport_contract(answer)


def run(coroutine: Awaitable[None], seconds: float = 3 * PATIENCE) -> None:
    """Run it on an event loop, with a limit for what hangs, and find its error in its groups."""

    async def limited() -> None:
        async with asyncio.timeout(seconds) as limit:
            try:
                await coroutine
            except asyncio.CancelledError:
                if limit.expired():
                    expect(False, _("it ends"), _("it waits for ever"))
                raise

    try:
        asyncio.run(limited())
    except TimeoutError as error:
        raise NotSolvedError(_("it ends"), _("it waits for ever")) from error
    except BaseExceptionGroup as group:
        raise_cause(group)


def raise_cause(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the most telling of the exceptions in a group."""
    leaves: list[BaseException] = []

    def collect(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                collect(each)
        else:
            leaves.append(error)

    collect(group)
    consequences = ("EndOfStream", "BrokenResourceError", "ClosedResourceError", "MCPError")
    raise min(
        leaves,
        key=lambda error: (
            not isinstance(error, NotSolvedError | NotImplementedError),
            type(error).__name__ in consequences,
            not isinstance(error, Exception),
        ),
    )


REQUEST = '{"jsonrpc":"2.0","id":7,"method":"tools/list"}'
NOTICE = '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"é"}}'


@asynccontextmanager
async def peer(behaviour: Callable[[Any], Awaitable[None]]) -> AsyncIterator[str]:
    """Serve WebSockets on this machine; yield the URL. Errors of the behaviour come out."""
    import websockets

    errors: list[BaseException] = []

    async def handle(connection: Any) -> None:
        try:
            await behaviour(connection)
        except websockets.ConnectionClosed:
            pass
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            errors.append(error)

    options: Any = {"subprotocols": ["mcp"], "max_size": None, "ping_interval": None}
    async with websockets.serve(handle, "127.0.0.1", 0, close_timeout=1, **options) as service:
        try:
            yield f"ws://127.0.0.1:{service.sockets[0].getsockname()[1]}"
        except BaseException:
            if errors:
                raise errors[0] from None
            raise
    if errors:
        raise errors[0]


def judge_streams(answer: Any) -> None:
    """Look at the streams, without MCP: what goes in must come out."""
    pair = _("it yields a pair: a stream to read, a stream to write")
    with attempt(_("async with websocket_client(url) as (read, write)"), pair):
        run(open_once(answer), PATIENCE)
    with attempt(_("the peer sends a message; `await read.receive()`")):
        run(receive_two(answer, NOTICE))
    with attempt(_("a SessionMessage is sent by `write.send`; what does the peer receive?")):
        run(send_one(answer))
    with attempt(
        _("the peer sends a text that is not a message, and then a message"),
        _("the stream to read gives the ValueError, and then the message"),
    ):
        run(receive_two(answer, "by the way"))
    with attempt(_("the peer closes the connection; `await read.receive()`")):
        run(peer_closes(answer, abruptly=False))
    with attempt(_("the connection breaks; `await read.receive()`")):
        run(peer_closes(answer, abruptly=True))
    with attempt(_("the block ends; `await read.receive()`, `await write.send(...)`")):
        run(use_after_block(answer, None))
    error = ValueError("of the block")
    with attempt(
        _("async with websocket_client(url): the block raises ValueError"), comes_out(error)
    ):
        run(use_after_block(answer, error))


async def open_once(answer: Any) -> None:
    seen: list[object] = []

    async def behave(connection: Any) -> None:
        seen.append(connection.subprotocol)
        await connection.wait_closed()

    async with peer(behave) as url, answer.websocket_client(url) as value:
        kind = _("it yields {value}").format(value=repr(value))
        expected = _("it yields a pair: a stream to read, a stream to write")
        expect(isinstance(value, tuple) and len(value) == 2, expected, kind)
        read, write = value
        expect(hasattr(read, "receive") and hasattr(write, "send"), expected, kind)
    got = _("it is {value}").format(value=repr(seen[0] if seen else None))
    expect(seen == ["mcp"], _("the subprotocol of the connection is 'mcp'"), got)


async def receive_two(answer: Any, first_text: str) -> None:
    """Receive a text, then a request."""

    async def behave(connection: Any) -> None:
        await connection.send(first_text)
        await connection.send(REQUEST)
        await connection.wait_closed()

    async with peer(behave) as url, answer.websocket_client(url) as (read, _write):
        first, second = await read.receive(), await read.receive()
    if first_text == NOTICE:
        method = getattr(getattr(first, "message", None), "method", None)
        said = getattr(getattr(first, "message", None), "params", None) or {}
        right = method == "notifications/message" and said.get("data") == "é"
        expected = _("it returns a SessionMessage that holds the message of the peer")
        expect(right, expected, _("it returns {value}").format(value=repr(first)))
    else:
        expected = _("the stream to read gives the ValueError")
        happened = _("it gives {value}").format(value=repr(first))
        expect(isinstance(first, ValueError), expected, happened)
    expected = _("then it returns the request with the id 7")
    happened = _("it returns {value}").format(value=repr(second))
    expect(getattr(getattr(second, "message", None), "id", None) == 7, expected, happened)


async def send_one(answer: Any) -> None:
    import json

    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    texts: list[object] = []
    arrived = asyncio.Event()

    async def behave(connection: Any) -> None:
        async for text in connection:
            texts.append(text)
            arrived.set()

    message = jsonrpc_message_adapter.validate_json(REQUEST)
    async with peer(behave) as url, answer.websocket_client(url) as (_read, write):
        await write.send(SessionMessage(message))
        await arrived.wait()
    expected = _("a text, {text}").format(text=REQUEST)
    happened = repr(texts[0])
    expect(isinstance(texts[0], str), expected, happened)
    with suppress(ValueError):
        texts[0] = json.loads(str(texts[0]))
    expect(texts[0] == json.loads(REQUEST), expected, happened)


async def peer_closes(answer: Any, abruptly: bool) -> None:
    """Wait for a message when the connection ends."""
    import anyio

    async def behave(connection: Any) -> None:
        if abruptly:
            connection.transport.abort()

    waits_for_ever = _("`receive` waits for ever: nobody closes the other end of this stream")
    expected = _("the stream to read ends: anyio.EndOfStream")
    async with peer(behave) as url:
        reached = False
        async with answer.websocket_client(url) as (read, _write):
            try:
                async with asyncio.timeout(PATIENCE):
                    item = await read.receive()
                expect(False, expected, _("it returns {value}").format(value=repr(item)))
            except anyio.EndOfStream:
                reached = True
            except anyio.ClosedResourceError as error:
                happened = _("{error}: you closed the end that the client reads")
                expect(False, expected, happened.format(error=type(error).__name__))
            except TimeoutError:
                expect(False, expected, waits_for_ever)
            await settle()
        expect(reached, expected, _("the block is cancelled from inside"))


async def use_after_block(answer: Any, raises: Exception | None) -> None:
    import anyio

    async def behave(connection: Any) -> None:
        await connection.wait_closed()
        ended.append("the socket")

    ended: list[str] = []
    others = asyncio.all_tasks()
    came_out = ""
    async with peer(behave) as url:
        try:
            async with answer.websocket_client(url) as (read, write):
                await settle()
                if raises:
                    raise raises
        except (ValueError, BaseExceptionGroup) as error:
            came_out = repr(error)
        await settle()
        expected = _("`websocket_client` has closed its socket")
        expect(ended, expected, _("it is still open"))
        await expect_closed("read", read.receive(), anyio.ClosedResourceError)
        await expect_closed("write", write.send("anything"), anyio.ClosedResourceError)
    await settle()
    running = [each for each in asyncio.all_tasks() - others if not each.done()]
    names = ", ".join(sorted(map(name_of, running)))
    expected = _("your tasks have ended")
    expect(not running, expected, _("one still runs: {names}").format(names=names))
    happened = came_out or _("no exception comes out")
    expect(repr(raises) in came_out or not raises, comes_out(raises), happened)


def name_of(task: asyncio.Task[Any]) -> str:
    """Return what a learner may recognise a task by."""
    coroutine: Any = task.get_coro()
    return coroutine.__qualname__ if task.get_name().startswith("Task-") else task.get_name()


async def expect_closed(name: str, use: Awaitable[object], closed: type[Exception]) -> None:
    """Expect that a stream is closed."""
    happened = _("`{name}` can still be used").format(name=name)
    try:
        async with asyncio.timeout(0.1):
            await use
    except closed:
        return
    except TimeoutError:
        happened = _("`{name}` is still open: it waits for ever").format(name=name)
    except Exception as error:
        happened = _("`{name}` raises {error}").format(name=name, error=repr(error))
    expect(False, _("both streams are closed: ClosedResourceError"), happened)


# --- What works over stdio must work here ---


def shelf() -> Any:
    """Return the module with the server; `log` says what its lifespans did."""
    module: Any = load(Path(__file__).with_name("shelf_06.py"), "shelf_06")
    module.log.clear()
    return module


@asynccontextmanager
async def served(answer: Any, connections: list[Any]) -> AsyncIterator[str]:
    """Serve a shelf over WebSocket, by the answer's own streams; yield the URL."""
    mcp = shelf().server._lowlevel_server  # subtle: mcp 2.3 has no public way

    async def behave(connection: Any) -> None:
        connections.append(connection)
        async with answer.websocket_streams(connection) as (read, write):
            await mcp.run(read, write, mcp.create_initialization_options())

    async with peer(behave) as url:
        yield url


async def count_books(client: Any) -> None:
    for number in (1, 2):
        result = await client.call_tool("add", {"title": "Emma"})
        got = result.structured_content
        expected = _("call {n} of the tool `add` returns {n}").format(n=number)
        expect(got == {"result": number}, expected, _("it returns {value}").format(value=got))


async def call_side_by_side(client: Any) -> None:
    texts = [str(number) for number in range(30)]
    calls = (client.call_tool("echo", {"text": text, "turns": 100 - int(text)}) for text in texts)
    answers = [result.content[0].text for result in await asyncio.gather(*calls)]
    expect(answers == texts, _("each call gets its own answer"), _("some get another one"))


async def echo_texts(client: Any) -> None:
    for text in ("line 1\nline 2\r\n", "é, 漢字, 🎈, \u2028, \0", ""):
        result = await client.call_tool("echo", {"text": text})
        got = result.content[0].text
        happened = _("it returns {value}").format(value=repr(got))
        expect(got == text, _("echo returns {text}").format(text=repr(text)), happened)


async def send_picture(client: Any) -> None:
    from mcp import MCPError

    try:
        result = await client.call_tool("echo", {"text": "*" * 4_000_000})
    except MCPError as error:
        happened = _("the call fails: {error}. Who refuses so large a message?")
        expect(False, _("all of it comes back"), happened.format(error=error))
    got = len(result.content[0].text)
    happened = _("{n} characters come back").format(n=got)
    expect(got == 4_000_000, _("all of it comes back"), happened)


async def hear_progress(client: Any) -> None:
    heard: list[float] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        heard.append(progress)

    await client.call_tool("steps", progress_callback=on_progress)
    await settle()
    happened = _("the client hears of {it}").format(it=heard)
    expect(heard == [0, 1, 2], _("the client hears of the steps 0, 1, 2"), happened)


def conversations() -> list[tuple[str, Callable[[Any], Awaitable[None]]]]:
    """What a client and its server do over any transport: here, and in the tests over stdio."""
    return [
        (_("two calls, one after the other"), count_books),
        (_("30 calls side by side"), call_side_by_side),
        (_("texts with line breaks and any characters"), echo_texts),
        (_("a tool reports its progress"), hear_progress),
        (_("an answer of 4 MB"), send_picture),
    ]


def judge_sessions(answer: Any) -> None:
    """Let a client and a server speak MCP over the answer."""
    for mode in ("legacy", "2026-07-28", "auto"):
        for title, talk in conversations():
            called = _("Client(websocket_client(url), mode={mode}): {what}")
            with attempt(called.format(mode=repr(mode), what=title)):
                run(converse(answer, mode, talk))
            if mode == "auto":  # the beginning is what differs
                break
    with attempt(_("two clients of one server; one leaves, the other one goes on")):
        run(two_clients(answer))
    for called, abruptly in (
        (_("the server closes the connection in the middle of a call"), False),
        (_("the connection breaks in the middle of a call"), True),
    ):
        with attempt(called):
            run(lose_server(answer, abruptly))


async def converse(answer: Any, mode: str, talk: Callable[[Any], Awaitable[None]]) -> None:
    from mcp import Client

    async with served(answer, []) as url:
        async with Client(answer.websocket_client(url), mode=mode) as client:
            await talk(client)
    await settle()
    expected = _("when the client has left, the lifespan of the server ends")
    expect(sys.modules["shelf_06"].log == ["opened", "closed"], expected, _("it is still open"))


async def two_clients(answer: Any) -> None:
    from mcp import Client

    async with served(answer, []) as url:
        async with Client(answer.websocket_client(url)) as stays:
            async with Client(answer.websocket_client(url)) as leaves:
                await count_books(leaves)
            await count_books(stays)  # over stdio, too, each client has its own lifespan


async def lose_server(answer: Any, abruptly: bool) -> None:
    """Lose the connection in the middle of a call."""
    from mcp import Client, MCPError

    connections: list[Any] = []
    under_way = asyncio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        under_way.set()

    fails = _("the call fails: MCPError, Connection closed")
    reached = False
    try:
        async with served(answer, connections) as url:
            async with Client(answer.websocket_client(url)) as client:
                call = asyncio.create_task(client.call_tool("wait", progress_callback=on_progress))
                await under_way.wait()
                if abruptly:
                    connections[0].transport.abort()
                else:
                    await connections[0].close()
                done, _waiting = await asyncio.wait([call], timeout=PATIENCE)
                if not done:
                    call.cancel()
                expect(done, fails, _("the call waits for ever"))
                expect(isinstance(call.exception(), MCPError), fails, comes_out(call.exception()))
                try:
                    async with asyncio.timeout(PATIENCE):
                        await client.call_tool("add", {"title": "Emma"})
                    expect(False, _("the next call fails, too"), _("it returns"))
                except MCPError:
                    reached = True
                except TimeoutError:
                    expect(False, _("the next call fails, too"), _("it waits for ever"))
    except BaseExceptionGroup as group:
        if reached:
            happened = _("{error} comes out").format(error=repr(group))
            expect(False, _("after that, the block ends without an error"), happened)
        raise
    expect(reached, _("the block goes on"), _("it is cancelled from inside"))


# --- The contract ---


class FakeSocket:
    """A WebSocket whose peer is silent."""

    def __init__(self) -> None:
        self.readers: list[str] = []

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await self.recv()

    async def recv(self, decode: bool | None = None) -> str:
        self.readers.append("a task still reads from the socket")
        silence: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            return await silence
        finally:
            self.readers.pop()

    async def send(self, text: str) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None: ...


class WithoutGroups:
    """A manager from which the block's exception comes out as it is, as from a group."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.gen = getattr(manager, "gen", None)  # so that reports show the answer's code

    async def __aenter__(self) -> Any:
        return await self.manager.__aenter__()

    async def __aexit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> bool:
        try:
            return bool(await self.manager.__aexit__(exc_type, exc, traceback))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            if error is exc:
                return False
            raise


async def let_it_begin(_streams: object) -> None:
    for _turn in range(3):
        await asyncio.sleep(0)


def judge_transport_contract(answer: Any) -> None:
    from contract import Subject

    def subject() -> Subject:
        sockets: list[FakeSocket] = []

        def open_streams() -> Any:
            sockets.append(FakeSocket())
            return WithoutGroups(answer.websocket_streams(sockets[-1]))

        return Subject(
            open=open_streams,
            leaks=lambda: [each for socket in sockets for each in socket.readers],
            use=let_it_begin,
            setup_faults="it only starts tasks",
            cleanup_faults="it only cancels its tasks",
        )

    keep_contract(subject)
