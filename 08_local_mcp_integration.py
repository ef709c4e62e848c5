# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "rich>=14.1,<16",
#     "mcp>=2.3,<3",
#     "mcp-server-git>=2026.10",
#     "mcp-server-time>=2026.10",
# ]
# ///
"""Chapter 08 · Several MCP servers, one block

After this chapter you can start MCP servers side by side, call their tools, go on when one of
them dies, and be sure that no child process is left, however your block ends.

    python 08_local_mcp_integration.py                    run all six demos
    python 08_local_mcp_integration.py 2 4                run demos 2 and 4
    python 08_local_mcp_integration.py --step             wait for Enter
    python 08_local_mcp_integration.py --config FILE      start your servers
    python 08_local_mcp_integration.py serve notes FILE   serve notes in SQLite
    python 08_local_mcp_integration.py serve files DIR    serve a directory

`--config` takes an mcpServers file, as MCP hosts use it. `serve` makes this file an MCP server
that speaks over stdin and stdout; with `--http PORT` it prints its URL and serves HTTP.

Look at `connect` and at `_Owner` first, then at the process ids in the demos. Everything is real:
child processes, sockets, git, SQLite. Nothing leaves your machine.

Left out: prompts and resources, authentication, Windows (its event loop cannot watch a pipe).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import json
import logging
import math
import os
import re
import reprlib
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, Literal, Self, TypeVar

import anyio
import httpx2
import uvicorn
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.sse import sse_client
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.message import SessionMessage
from mcp.types import (
    CallToolResult,
    TextContent,
    Tool,
    ToolListChangedNotification,
    jsonrpc_message_adapter,
)
from pydantic import (
    BeforeValidator,
    ConfigDict,
    HttpUrl,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import to_json
from rich.bar import Bar
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.live import Live
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
State = Literal["starting", "ready", "lost", "failed", "stopped"]
EXIT_TIMEOUT = 2.0  # seconds for a child to exit when its input ends, and again after SIGTERM
LEAVE_TIMEOUT = 5.0  # seconds to end a session with a service, or the lifespan of an MCPServer
LONGEST_LINE = 16 * 2**20  # bytes of one message from a child
MOST_PAGES = 100  # of a list of tools
logger = logging.getLogger("mcp_hub")


class ConfigError(ValueError):
    """The configuration cannot be used. One line says which file, server and key, and why."""


def _expand(value: object, info: ValidationInfo) -> object:
    """Replace each ${NAME} in a configuration file by that environment variable."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    if info.context is None or not isinstance(value, str):  # no file, or not valid anyway
        return value
    return re.sub(r"\$\{(.*?)\}", variable, value)


Expanded = Annotated[str, BeforeValidator(_expand)]


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class ServerConfig:
    """One entry of `mcpServers`: a program to start, `command`, or a service to reach, `url`."""

    command: Expanded | None = None
    args: list[Expanded] = field(default_factory=list)
    env: dict[str, Expanded] = field(default_factory=dict)  # besides PATH, HOME and a few more
    cwd: Expanded | None = None
    url: Annotated[HttpUrl, BeforeValidator(_expand)] | None = None
    headers: dict[str, Expanded] = field(default_factory=dict)  # sent with each request to a url
    type: Literal["", "stdio", "http", "streamable-http", "streamableHttp", "sse"] = ""
    mode: Literal["auto", "legacy", "2026-07-28"] = "auto"  # "auto": the newer protocol first
    required: bool = True  # False: the work goes on without it
    disabled: bool = False  # True: `connect` leaves it out

    @model_validator(mode="after")
    def _either_way(self) -> ServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("there must be either a command, to start it, or a url, to reach it")
        if self.type and (self.type == "stdio") != (self.url is None):
            raise ValueError(f"{self.type!r} is not the type of a server with this command or url")
        return self


@checked_dataclass
class _ConfigFile:
    mcpServers: dict[str, ServerConfig]  # the hosts' spelling

    @field_validator("mcpServers", mode="before")
    @classmethod
    def _check_keys(cls, entries: Any, info: ValidationInfo) -> Any:
        """Drop the disabled servers, whose variables may be unset. Warn of unknown keys."""
        known = {each.name for each in fields(ServerConfig)}
        for name, entry in list(entries.items()) if isinstance(entries, dict) else []:
            if not isinstance(entry, dict):
                continue
            for key in entry.keys() - known:
                logger.warning("%s: mcpServers.%s: unknown key %r", info.context, name, key)
            if entry.get("disabled") is True:
                del entries[name]
        return entries


def load_config(path: str | Path) -> dict[str, ServerConfig]:
    """Read the `mcpServers` JSON of MCP hosts, without the disabled servers.

    Each ${NAME} in a value becomes that environment variable. An unknown key is logged as a
    warning and ignored. Raises ConfigError if the file cannot be read or used.
    """
    try:
        document = Path(path).read_bytes()
        return TypeAdapter(_ConfigFile).validate_json(document, context=path).mcpServers
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        given = reprlib.repr(first["input"])
        raise ConfigError(f"{path}: {where}: {first['msg']}, not {given}") from None


class ServerError(RuntimeError):
    """A server did not start, did not answer, failed or died. The message says which, and why."""

    def __init__(self, server: str, problem: str) -> None:
        super().__init__(server, problem)  # both arguments, so that it can be pickled
        self.server, self.problem = server, problem

    def __str__(self) -> str:
        return f"MCP server {self.server!r} {self.problem}"


@dataclass(frozen=True)
class ServerStatus:
    """What is known of one server now."""

    name: str
    state: State = "starting"
    pid: int | None = None  # of a child process
    tools: tuple[Tool, ...] = ()
    startup: float = 0.0  # seconds from its start to its list of tools
    error: str = ""


class McpHub:
    """Servers to call, from any task of the event loop. Made and closed by `connect`."""

    def __init__(
        self, startup_timeout: float, call_timeout: float, on_change: Callable[[ServerStatus], None]
    ) -> None:
        self._startup_timeout, self._call_timeout = startup_timeout, call_timeout
        self._on_change = on_change
        self._owners: dict[str, _Owner] = {}
        self._calls = 0  # under way
        self._news = asyncio.Event()  # a status has changed, or a call has ended
        self._closed = False

    @property
    def statuses(self) -> dict[str, ServerStatus]:
        """The status of every server, including those that failed or were lost."""
        return {name: owner.status for name, owner in self._owners.items()}

    @property
    def tools(self) -> dict[str, tuple[Tool, ...]]:
        """The tools of every server that is ready."""
        return {n: status.tools for n, status in self.statuses.items() if status.state == "ready"}

    async def call(
        self, server: str, tool: str, arguments: Mapping[str, Any] | None = None
    ) -> CallToolResult:
        """Call a tool. If the tool itself reports an error, the result has `is_error`.

        Raises ServerError, whatever goes wrong, within the hub's `call_timeout`, or up to 5 s later
        if the server has stopped reading. No call is sent twice: a server that died may have done
        the work. A child that died stays lost. A service that was lost is reached again by the next
        call, or by the same one if the service only refused it because it forgot our session.
        """
        names = [each.name for each in self._owner(server).status.tools]
        if names and tool not in names:
            raise ServerError(server, f"has no tool {tool!r}; it has: {', '.join(names)}")
        given = dict(arguments or {})
        try:
            to_json(given)  # subtle: to fail while it is sent could end the whole connection
        except ValueError as error:
            raise ServerError(server, f"cannot be sent these arguments: {error}") from error
        return await self.ask(
            server, lambda client: client.call_tool(tool, given), f"tool {tool!r}"
        )

    async def ask(
        self, server: str, request: Callable[[Client], Awaitable[T]], what: str = "the request"
    ) -> T:
        """Make any other request: `await hub.ask("git", lambda client: client.list_prompts())`.

        `request` gets the SDK's Client for this one request. Raises ServerError, as `call` does.
        """
        owner = self._owner(server)
        self._calls += 1
        try:
            return await owner.ask(what, request, self._call_timeout)
        finally:
            self._calls -= 1
            self._news.set()

    async def check(self, timeout: float = 2.0) -> dict[str, str]:
        """Ask all servers at once for a sign of life. Return what is wrong, by server."""
        owners = self._owners.values()
        asked = (owner.ask("the health check", _list_tools, timeout) for owner in owners)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        by_name = zip(self._owners, answers, strict=True)
        return {name: str(answer) for name, answer in by_name if isinstance(answer, Exception)}

    def _owner(self, server: str) -> _Owner:
        if self._closed:
            raise ServerError(server, "takes no calls any more: its hub is closed")
        if server not in self._owners:
            raise ServerError(server, f"is not known; there are: {', '.join(self._owners)}")
        return self._owners[server]

    def _all_settled(self) -> bool:
        """Return whether every server is ready, or optional and failed."""
        for owner in self._owners.values():
            if owner.required and owner.status.state in ("failed", "lost"):
                raise ServerError(owner.status.name, f"did not start: {owner.status.error}")
        return all(owner.settled.is_set() for owner in self._owners.values())

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()


class _Connection:
    """One client of one server, and the two ways to end it."""

    def __init__(self, deadline: float) -> None:
        self.client: Any = None
        self.scope = anyio.CancelScope(deadline=deadline)  # around the client: cuts it off
        self.work = anyio.CancelScope()  # inside the client: has it end its session first
        self.died = False
        self.forgotten = False  # the service does not know our session any more


class _Owner:
    """Holds one server from start to end, in one task of its own.

    A client's cancel scopes belong to the task that entered it, so no other may enter or leave it.
    Other tasks wait for `settled`, and ask for the end by `leave`.
    """

    def __init__(self, name: str, config: ServerConfig | MCPServer[Any], hub: McpHub) -> None:
        self.status = ServerStatus(name)
        self.config, self.hub = config, hub
        self.required = isinstance(config, MCPServer) or config.required
        self.is_service = isinstance(config, ServerConfig) and config.url is not None
        self.connection = _Connection(math.inf)
        self.last_words: deque[str] = deque(maxlen=20)
        self.tools_changed = asyncio.Event()
        self.settled = asyncio.Event()  # ready, or given up
        self.wanted = asyncio.Event()  # by a call, after the service was lost
        self.leaving = False
        self.task = asyncio.create_task(self.run(), name=f"MCP {name}")

    def leave(self) -> None:
        """Have the task leave in an orderly way, within a limit."""
        self.leaving = True
        self.wanted.set()
        if self.status.state == "ready":
            self.connection.work.cancel()
        else:
            # subtle: asyncio's cancellation, which strikes once. A scope's would strike at every
            # `await` of the cleanup, too; that is for the deadline.
            self.connection.scope.deadline = anyio.current_time() + LEAVE_TIMEOUT
            self.task.cancel()

    async def run(self) -> None:
        """Hold the server, and again whenever it is wanted, until `leave`."""
        try:
            while not self.leaving:
                self.wanted.clear()
                await self.hold()
                await self.wanted.wait()
        finally:
            if self.status.state in ("starting", "ready"):
                self.set_status("stopped", pid=None)

    async def hold(self) -> None:
        """Start the server, stay, and note in the status what went wrong.

        A server that exits or is silent when asked for the newer protocol is started once more
        with the older one, for the second half of the time.
        """
        started, limit = anyio.current_time(), self.hub._startup_timeout
        attempts = {"auto": limit}  # until when, in seconds from now
        if isinstance(self.config, ServerConfig):
            attempts = {self.config.mode: limit}
            if self.config.mode == "auto":
                attempts = {"auto": limit / 2, "legacy": limit}
        for mode, seconds in attempts.items():
            self.connection = _Connection(started + seconds)
            problem = await self.hold_once(mode, started)
            if self.leaving or self.status.state == "ready":
                break
        if not self.leaving:
            state: State = "lost" if self.status.state == "ready" else "failed"
            self.set_status(state, error=problem, pid=None)

    async def hold_once(self, mode: str, started: float) -> str:
        """Enter a client, report, stay, leave. Return what went wrong."""
        connection = self.connection
        problem = f"was not ready within {self.hub._startup_timeout:g} s"
        self.last_words.clear()
        try:
            with connection.scope:
                target: Any = self.config
                if isinstance(target, ServerConfig):
                    target = self.transport(target, connection)
                client = Client(target, mode=mode, message_handler=self.on_message)
                async with client as connection.client:
                    with connection.work:
                        tools = await _list_tools(client)
                        connection.scope.deadline = math.inf
                        seconds = anyio.current_time() - started
                        self.set_status("ready", tools=tools, startup=seconds, error="")
                        await self.follow_tools(client)
                    connection.scope.deadline = anyio.current_time() + LEAVE_TIMEOUT
            if connection.died:
                problem = "forgot our session" if connection.forgotten else "ended by itself"
        except Exception as error:
            problem = _cause(error)
        for line in reversed(self.last_words):
            if words := line.strip(" |+-"):  # without the frame of an ExceptionGroup
                return f"{problem}; its last words: {words}"
        return problem

    async def follow_tools(self, client: Client) -> None:
        """List the tools again whenever the server says that they have changed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.subscribe, client)
            while True:
                await self.tools_changed.wait()
                self.tools_changed.clear()
                with suppress(MCPError, ValueError):  # then the old list is the best there is
                    tools = await _list_tools(client)
                    if tools != self.status.tools and not self.connection.died:
                        self.set_status("ready", tools=tools)

    async def subscribe(self, client: Client) -> None:
        """Ask for changes, as the newer protocol demands. `on_message` hears them, in both."""
        with suppress(ListenNotSupportedError, MCPError):
            while True:
                with suppress(SubscriptionLost):
                    async with client.listen(tools_list_changed=True) as changes:
                        self.tools_changed.set()  # perhaps they did before
                        async for _change in changes:
                            pass
                        return
                await anyio.sleep(1.0)

    async def on_message(self, message: object) -> None:
        if isinstance(message, ToolListChangedNotification):
            self.tools_changed.set()

    def set_status(self, state: State, **changes: Any) -> None:
        """Change the status, and wake those who wait for it."""
        self.status = replace(self.status, state=state, **changes)
        self.settled.set()
        self.hub._news.set()
        self.hub._on_change(self.status)

    async def ready(self) -> _Connection:
        """Wait for the connection; if the service was lost, for a new one."""
        await self.settled.wait()
        if self.is_service and self.status.state in ("lost", "failed"):
            self.set_status("starting", error="")
            self.settled.clear()
            self.wanted.set()
            await self.settled.wait()
        if self.status.state != "ready":
            raise ServerError(self.status.name, f"is {self.status.state}: {self.status.error}")
        return self.connection

    async def ask(self, what: str, request: Callable[[Client], Awaitable[T]], limit: float) -> T:
        """Make one request within `limit` seconds. Every error is a ServerError."""
        name = self.status.name
        try:
            async with asyncio.timeout(limit):
                resent = False
                while True:
                    connection = await self.ready()
                    try:
                        return await request(connection.client)
                    except Exception as error:
                        working = not (connection.died or self.leaving)
                        if connection.forgotten and working and not resent:
                            resent = True
                            self.end(connection)
                            continue
                        problem = f"failed at {what}: {_cause(error)}"
                        if self.leaving:
                            problem = f"was stopped during {what}"
                        elif connection.died:
                            await self.settled.wait()  # until the reason is known
                            problem = f"died during {what}: {self.status.error}"
                        raise ServerError(name, problem) from error
        except TimeoutError:
            raise ServerError(name, f"did not answer {what} within {limit:g} s") from None

    def end(self, connection: _Connection) -> None:
        """Have the task leave a dead connection, unless it is leaving already."""
        if not (self.leaving or connection.scope.cancel_called):
            connection.died = True
            self.settled.clear()
            connection.scope.cancel()

    @asynccontextmanager
    async def transport(
        self, config: ServerConfig, connection: _Connection
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Open the way to a server outside; yield the streams to read and to write."""

        async def on_response(response: httpx2.Response) -> None:
            # By the specification, 404 means that our session is over, and that we must initialise
            # a new one. Many servers answer 400 instead, and name the session in their words.
            request = response.request
            if request.method == "POST" and "mcp-session-id" in request.headers:
                if response.status_code == 404:
                    connection.forgotten = True
                elif response.status_code == 400:
                    connection.forgotten = b"session" in (await response.aread()).lower()

        url, headers = str(config.url), config.headers
        async with AsyncExitStack() as stack:
            if config.url is None:
                way = _run_child(config, self.on_stderr, self.on_start)
            elif config.type == "sse":
                way = sse_client(url, headers=headers)
            else:
                http = await stack.enter_async_context(create_mcp_http_client(headers=headers))
                http.event_hooks["response"].append(on_response)
                way = streamable_http_client(url, http_client=http)
            read, write = await stack.enter_async_context(way)
            yield _Watched(read, lambda: self.end(connection)), write

    def on_start(self, pid: int) -> None:
        self.status = replace(self.status, pid=pid)

    def on_stderr(self, line: str) -> None:
        self.last_words.append(line)
        logging.getLogger(f"mcp_hub.{self.status.name}").info(line)


class _Watched(AsyncExitStack):
    """A read stream that reports when the client stops reading it: the connection has ended.

    An error code cannot tell that, since a healthy server may answer with any code.
    """

    def __init__(self, stream: Any, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._stream = stream
        self.push_async_exit(stream)
        self.callback(on_end)

    def __aiter__(self) -> AsyncIterator[Any]:
        return aiter(self._stream)


@asynccontextmanager
async def _run_child(
    config: ServerConfig, on_stderr: Callable[[str], None], on_start: Callable[[int], None]
) -> AsyncIterator[tuple[Any, Any]]:
    """Start a server as a child process; yield the streams of messages from it and to it.

    To end it, close its input, then send SIGTERM, then kill what is left of its process group.
    The SDK's `stdio_client` keeps the process to itself, and asyncio reaps it: then another process
    may get its id. Here nobody reaps the child before its group has been killed.
    """
    process: Any = _start(config)
    # subtle: no `await` from here to the first callback. A cancellation would leave the child.
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    incoming, from_child = anyio.create_memory_object_stream[SessionMessage]()
    to_child, outgoing = anyio.create_memory_object_stream[SessionMessage]()

    async def read() -> None:
        unfinished = bytearray()
        while chunk := await _next_bytes(stdout):
            unfinished += chunk
            if b"\n" in chunk:
                *lines, unfinished = unfinished.split(b"\n")
                for line in lines:
                    await receive(line.decode(errors="replace"))
            elif len(unfinished) > LONGEST_LINE:
                on_stderr(f"a line on stdout has more than {LONGEST_LINE} bytes")
                return

    async def receive(line: str) -> None:
        try:
            message = jsonrpc_message_adapter.validate_json(line, by_name=False)
        except ValueError:
            on_stderr(f"on stdout, but not a message: {line:.200}")
            return
        with suppress(anyio.BrokenResourceError):  # nobody listens any more
            await incoming.send(SessionMessage(message))

    async def write() -> None:
        os.set_blocking(stdin.fileno(), False)
        async for item in outgoing:
            message = item.message.model_dump(mode="json", by_alias=True, exclude_unset=True)
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                await anyio.wait_writable(stdin)
                data = data[stdin.write(data) or 0 :]

    async def listen() -> None:
        while chunk := await _next_bytes(stderr):  # a line in two pieces counts as two
            for line in chunk.decode(errors="replace").splitlines():
                on_stderr(line)

    async def watch() -> None:
        await asyncio.wait({exited, reading, writing}, return_when=asyncio.FIRST_COMPLETED)
        # Its last message may still be in the pipe, which what it has started may hold open.
        await asyncio.wait({reading}, timeout=0.5)
        incoming.close()
        outgoing.close()

    async def ask_to_exit() -> None:
        with anyio.CancelScope(shield=True):
            writing.cancel()
            await asyncio.wait({writing})
            stdin.close()
            await asyncio.wait({exited}, timeout=EXIT_TIMEOUT)
            if not exited.done():
                kill_group(signal.SIGTERM)
                await asyncio.wait({exited}, timeout=EXIT_TIMEOUT)

    def kill_group(number: signal.Signals) -> None:
        with suppress(OSError):  # on macOS, if nobody but the child is left
            os.killpg(process.pid, number)

    async def end_tasks() -> None:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)

    jobs = (_exit_of(process), read(), write(), listen(), watch())
    exited, reading, writing, *_others = tasks = [asyncio.create_task(job) for job in jobs]
    async with AsyncExitStack() as stack:
        stack.callback(process.wait, 1.0)
        for stream in (stdin, stdout, stderr, incoming, from_child, to_child, outgoing):
            stack.enter_context(stream)
        stack.push_async_callback(end_tasks)
        stack.callback(kill_group, signal.SIGKILL)
        stack.push_async_callback(ask_to_exit)
        on_start(process.pid)
        yield from_child, to_child


def _start(config: ServerConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(config.command), *config.args],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=get_default_environment() | config.env,
        cwd=config.cwd,
        start_new_session=True,
    )


async def _next_bytes(pipe: IO[bytes]) -> bytes:
    """Wait until there is something to read; return b"" at the end."""
    await anyio.wait_readable(pipe)
    return os.read(pipe.fileno(), 65_536)


async def _exit_of(process: subprocess.Popen[bytes]) -> None:
    """Wait until a child has ended. Linux can do so without reaping it: its id stays taken."""
    if hasattr(os, "pidfd_open"):
        with FileIO(os.pidfd_open(process.pid)) as descriptor:
            await anyio.wait_readable(descriptor)
        return
    while True:
        if process.poll() is not None:
            return
        await anyio.sleep(0.02)


@asynccontextmanager
async def connect(
    servers: Mapping[str, ServerConfig | MCPServer[Any]],
    *,
    startup_timeout: float = 30.0,
    call_timeout: float = 30.0,
    on_change: Callable[[ServerStatus], None] = lambda status: None,
) -> AsyncIterator[McpHub]:
    """Start all servers at the same time; yield a hub to call them; end every one of them.

    Each has `startup_timeout` seconds to be ready. If a required one fails, the others are stopped
    and ServerError is raised; an optional one that fails is only shown in `statuses`. A call has
    `call_timeout` seconds. `on_change` is called with each new status, even if an idle child dies;
    it must not raise. An MCPServer runs right here, in this process.

    If the body ends well, calls under way may finish first. All servers are left politely, even if
    the caller is cancelled: a session is ended and a lifespan runs to its end, for up to 5 s. A
    child that ignores the end of its input for 2 s gets SIGTERM, and 2 s later it is killed, with
    everything in its process group. A process that has left the group survives.
    """
    hub = McpHub(startup_timeout, call_timeout, on_change)
    try:
        # subtle: not a TaskGroup. It would cancel the body when one owner fails, wrap what the body
        # raises, and cancel the owners in the middle of their cleanup. These are only asked.
        for name, config in servers.items():
            if isinstance(config, MCPServer) or not config.disabled:
                hub._owners[name] = _Owner(name, config, hub)
        await hub._until(hub._all_settled)
        yield hub
        hub._closed = True
        await hub._until(lambda: hub._calls == 0)  # each of them has a deadline
    finally:
        hub._closed = True
        for owner in hub._owners.values():
            owner.leave()
        await _all_ended({owner.task for owner in hub._owners.values()})


async def _all_ended(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for every task even if cancelled, by asyncio or by anyio; then re-raise."""
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # subtle: without, anyio would cancel it again and again
        while tasks:
            try:
                _done, tasks = await asyncio.wait(tasks)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Cancel this task on SIGINT (Ctrl-C), SIGTERM or SIGHUP, then raise KeyboardInterrupt.

    Put it around `connect`, in the main task. By default, SIGTERM and SIGHUP end Python without
    cleanup, a second Ctrl-C interrupts the cleanup, and a shell's background job ignores Ctrl-C.
    Raises ValueError outside the main thread.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def cancel(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            loop.add_signal_handler(number, cancel, number)
        yield
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


async def _list_tools(client: Client) -> tuple[Tool, ...]:
    """Return all tools, page by page. Raises ValueError if there is always another page."""
    tools: list[Tool] = []
    cursor = None
    for _page in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor, cache_mode="bypass")
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            return tuple(tools)
    raise ValueError(f"its list of tools has no end: there is more after {MOST_PAGES} pages")


def _cause(error: BaseException) -> str:
    """Return what is at the bottom of nested ExceptionGroups, in the reader's terms."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, MCPError) and error.message == "Connection closed":  # the SDK's words
        return "ended by itself"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return f"{type(error).__name__}: {error}"


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---

log = logging.getLogger("workshop.server")


def notes_server(database: str | Path) -> MCPServer[sqlite3.Connection]:
    """Notes in an SQLite file, which is open as long as the server serves."""

    @asynccontextmanager
    async def lifespan(server: MCPServer[sqlite3.Connection]) -> AsyncIterator[sqlite3.Connection]:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS notes (text TEXT NOT NULL)")
            log.info("%s is open", Path(database).name)
            yield connection
        log.info("%s is closed", Path(database).name)

    server = MCPServer("notes", lifespan=lifespan, log_level="WARNING")

    @server.tool()
    async def add(text: str, context: Context[sqlite3.Connection]) -> str:
        """Keep a note."""
        with context.request_context.lifespan_context as connection:  # commits
            connection.execute("INSERT INTO notes VALUES (?)", (text,))
        return text

    @server.tool()
    async def search(words: str, context: Context[sqlite3.Connection]) -> list[str]:
        """The notes in which these words occur, oldest first."""
        query = "SELECT text FROM notes WHERE instr(lower(text), lower(?)) ORDER BY rowid"
        rows = context.request_context.lifespan_context.execute(query, (words,))
        return [text for (text,) in rows]

    @server.tool("list")
    async def list_notes(context: Context[sqlite3.Connection]) -> list[str]:
        """All notes, oldest first."""
        query = "SELECT text FROM notes ORDER BY rowid"
        return [text for (text,) in context.request_context.lifespan_context.execute(query)]

    return server


def files_server(root: str | Path) -> MCPServer[int]:
    """The files below a directory, to be read only. The directory is open while it serves."""
    top = Path(root).resolve()

    @asynccontextmanager
    async def lifespan(server: MCPServer[int]) -> AsyncIterator[int]:
        directory = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield directory
        finally:
            os.close(directory)

    server = MCPServer("files", lifespan=lifespan, log_level="WARNING")

    @server.tool()
    async def read(path: str, context: Context[int]) -> str:
        """The text of one file; `path` is relative to the root."""
        try:
            inside = (top / path).resolve()  # where `..` and symlinks lead
            if not inside.is_relative_to(top):
                raise ToolError(f"{path!r} leads outside the root: ask for a path below it")
            return _read(context.request_context.lifespan_context, inside.relative_to(top))
        except (OSError, ValueError) as error:
            raise ToolError(f"{path!r} cannot be read: {error}") from error

    @server.tool("list")
    async def list_files() -> list[str]:
        """Every file's path, relative to the root; hidden files and directories are left out."""
        found = (path.relative_to(top) for path in top.rglob("*") if path.is_file())
        return sorted(str(p) for p in found if not any(part.startswith(".") for part in p.parts))

    return server


def _read(directory: int, path: Path) -> str:
    """Read a file below an open directory; not if it has become a symlink since it was checked."""

    def open_below(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=directory)

    with open(path, encoding="utf-8", opener=open_below) as file:
        return file.read()


SERVERS: dict[str, Callable[[str], MCPServer[Any]]] = {"notes": notes_server, "files": files_server}


async def serve_http(server: MCPServer[Any], port: int) -> None:
    """Serve on loopback until SIGTERM, which lets the requests under way end first (3 s)."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        # subtle: inherited by connections; asyncio sets it only where it made the socket itself.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The socket listens already, so whoever reads this line can connect.
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp", flush=True)
        config = uvicorn.Config(
            server.streamable_http_app(),
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=3,
        )
        await uvicorn.Server(config).serve(sockets=[listening])


GIT = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=no"]


@contextmanager
def workspace() -> Iterator[Path]:
    """A directory with a git repository, and an mcp.json that names four servers around it."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        project.mkdir()
        project.joinpath("pool.py").write_text("def acquire():\n    return gpus.pop()\n")
        for command in (["init", "-qb", "main"], ["add", "."], ["commit", "-qm", "Hand out GPUs"]):
            subprocess.run([*GIT, *command], cwd=project, check=True)
        arguments = {
            "git": ["-m", "mcp_server_git", "--repository", str(project)],
            "time": ["-m", "mcp_server_time", "--local-timezone", "UTC"],
            "notes": [__file__, "serve", "notes", str(project.with_name("notes.db"))],
            "files": [__file__, "serve", "files", str(project)],
        }
        servers = {n: {"command": sys.executable, "args": args} for n, args in arguments.items()}
        Path(folder, "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        yield Path(folder)


def child_pids(whose: str = "thread-self") -> set[int]:
    """The children of this thread, or, by `self/task/*`, of all; none where there is no /proc."""
    listings = Path("/proc").glob(f"{whose}/children")
    return {int(pid) for listing in listings for pid in listing.read_text().split()}


def census() -> str:
    """Return the ids of all children of this process."""
    if not Path("/proc").exists():
        return _("unknown, this system has no /proc")
    return ", ".join(map(str, sorted(child_pids("self/task/*")))) or _("none")


def say_children_left() -> None:
    """Say which children this process still has."""
    pids = census()
    verdict(pids == _("none"), _("Children left: {pids}").format(pids=pids))


def status_table(statuses: Mapping[str, ServerStatus]) -> Table:
    """Show the status of each server in a row."""
    titles = (_("server"), _("status"), "pid", _("tools"), _("ready after"), _("what is wrong"))
    table = Table(*(Column(title, overflow="fold") for title in titles))
    colours = {"ready": "green", "starting": "yellow"}
    for status in statuses.values():
        state = Text(status.state, colours.get(status.state, "red"))
        seconds = f"{status.startup:.2f} s" if status.startup else ""
        pid, tools = str(status.pid or ""), str(len(status.tools))
        table.add_row(status.name, state, pid, tools, seconds, Text(status.error))
    return table


@asynccontextmanager
async def shown(servers: Mapping[str, ServerConfig]) -> AsyncIterator[McpHub]:
    """`connect`, with a live table of the servers until all are ready."""
    statuses = {name: ServerStatus(name) for name in servers}

    def show(status: ServerStatus) -> None:
        statuses[status.name] = status
        if live.is_started:
            live.update(status_table(statuses), refresh=True)

    async with AsyncExitStack() as stack:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            stack.enter_context(cancelled_by_signals())
            hub = await stack.enter_async_context(connect(servers, on_change=show))
        console.print(status_table(hub.statuses))
        yield hub


class BesideItsName(logging.Handler):
    """Show what a server says on stderr beside the server's name."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), f"{record.name.removeprefix('mcp_hub.')} │ ", "dim")


def text_of(result: CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, TextContent)).strip()


def start(call: Coroutine[Any, Any, CallToolResult]) -> asyncio.Task[CallToolResult]:
    """Start a call as a task. If Ctrl-C leaves nobody to await it, its error is not reported."""
    task = asyncio.create_task(call)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def workflow(hub: McpHub, project: Path) -> None:
    """Find the notes about a file, read it, look at its history, and write a note about it."""
    calls: list[tuple[str, float, float, str]] = []
    started = time.perf_counter()

    async def call(server: str, tool: str, **arguments: Any) -> list[str]:
        begin = time.perf_counter() - started
        text = text_of(await hub.call(server, tool, arguments))
        calls.append((f"{server}.{tool}", begin, time.perf_counter() - started, text))
        return text.splitlines()

    async with asyncio.TaskGroup() as group:  # three questions that need not wait for one another
        notes = group.create_task(call("notes", "search", words="pool.py"))
        source = group.create_task(call("files", "read", path="pool.py"))
        history = group.create_task(call("git", "git_log", repo_path=str(project), max_count=1))
    number, lines, change = len(notes.result()) + 1, len(source.result()), history.result()[-1]
    await call("notes", "add", text=f"note {number} on pool.py: {lines} lines; {change}")
    show_timeline(calls)


def show_timeline(calls: list[tuple[str, float, float, str]]) -> None:
    titles = (_("call"), _("when"), "ms", _("last line of the answer"))
    table = Table(*(Column(title, overflow="fold") for title in titles))
    total = max(end for _label, _begin, end, _text in calls)
    for label, begin, end, text in calls:
        bar, duration = Bar(total, begin, end, width=16), f"{1000 * (end - begin):.1f}"
        table.add_row(label, bar, duration, Text(text.split("\n")[-1]))
    console.print(table)


def demo_forgotten() -> None:
    """Clients that nobody exits

    Two clients are entered by hand and never exited. `main` returns, but its two servers live
    on, so `asyncio.run` never returns: it waits for tasks that wait for the children to end. If
    `main` raised, you would not even see the traceback.
    """
    program = StdioServerParameters(command=sys.executable, args=["-m", "mcp_server_time"])
    returned = threading.Event()

    async def main() -> None:
        for _number in range(2):
            await Client(program, mode="2026-07-28").__aenter__()  # this mode awaits no answer
        returned.set()

    show_code(main)
    question(_("`main` returns. Does `asyncio.run(main())` return, too?"))
    logging.getLogger("asyncio").disabled = True  # spare us what asyncio says to all this
    runner = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    runner.start()
    try:
        returned.wait()
        say(_("`main` has returned. Children: {pids}").format(pids=census()))
        runner.join(timeout=0.2)
        if runner.is_alive():
            verdict(False, _("0.2 s later `asyncio.run` has not returned."))
    finally:
        while runner.is_alive():
            for pid in child_pids("self/task/*"):
                os.kill(pid, signal.SIGKILL)
            runner.join(timeout=0.05)
        logging.getLogger("asyncio").disabled = False
    say(_("`asyncio.run` has returned, because the demo has killed the children."))


def demo_gather() -> None:
    """Clients that another task enters

    `gather` runs each coroutine in a task of its own. The task that enters a client must exit
    it, because the client's cancel scope belongs to that task. Here those tasks are over before
    the stack closes. The servers run in this process; with children it is the same.
    """

    async def main() -> None:
        async with AsyncExitStack() as stack:
            clients = [Client(notes_server(":memory:")) for _number in range(2)]
            await asyncio.gather(*map(stack.enter_async_context, clients))
            answer = await clients[1].call_tool("add", {"text": "so far, so good"})
            say(text_of(answer))

    show_code(main)
    question(_("Which line raises?"))
    failure = ""
    with trace() as path:
        try:
            asyncio.run(main())
        except RuntimeError as error:
            failure = f"RuntimeError: {error}"
    show_code(main, runs={_("one run"): path})
    verdict(not failure, failure or _("no error"))


def demo_side_by_side() -> None:
    """One owner task for each

    `connect` gives every server an owner task, which enters the client, reports that it is
    ready, waits, and exits the client. So the servers start at the same time, and end at the
    same time. Here are the same two servers, first in turn and then together.
    """

    async def main() -> None:
        started = time.perf_counter()
        async with AsyncExitStack() as stack:
            for name, config in servers.items():
                await stack.enter_async_context(connect({name: config}))
            in_turn = time.perf_counter() - started
        started = time.perf_counter()
        async with connect(servers):
            together = time.perf_counter() - started
        result = _("Ready in turn after {in_turn:.2f} s, together after {together:.2f} s.")
        verdict(together < in_turn, result.format(in_turn=in_turn, together=together))

    with workspace() as folder:
        servers = load_config(folder / "mcp.json")
        del servers["notes"], servers["files"]
        asyncio.run(main())
    say_children_left()


def demo_development() -> None:
    """Development: four children

    All four are required. What a server writes to stderr is shown beside its name. Then one is
    killed in the middle of a call: that call fails and names the server, and the others go on.
    """
    with workspace() as folder:
        servers = load_config(folder / "mcp.json")
        asyncio.run(develop(servers, folder / "project"))
    say_children_left()


async def develop(servers: Mapping[str, ServerConfig], project: Path) -> None:
    async with shown(servers) as hub:
        await workflow(hub, project)
        await kill_one(hub)


async def kill_one(hub: McpHub) -> None:
    """Kill a server in the middle of a call, then call another one, and look at both."""
    pid = hub.statuses["time"].pid
    if pid is None:
        return  # without /proc we do not know whom
    os.kill(pid, signal.SIGSTOP)  # so that it cannot answer before it is killed
    call = start(hub.call("time", "get_current_time", {"timezone": "UTC"}))
    await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    try:
        await call
    except ServerError as error:
        verdict(False, f"ServerError: {error}")
    say("files.list: " + text_of(await hub.call("files", "list")))
    say(", ".join(f"{name}: {status.state}" for name, status in hub.statuses.items()))


@contextmanager
def http_service(name: str, where: Path) -> Iterator[Callable[[], HttpUrl]]:
    """Run one of our servers as a service over HTTP; yield a function that returns its URL."""
    command = [sys.executable, __file__, "serve", name, str(where), "--http", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as service:
        assert service.stdout
        output = service.stdout
        try:
            yield lambda: HttpUrl(output.readline().strip())
        finally:
            service.terminate()


def demo_production() -> None:
    """Production: services, some of them optional

    Our own two servers are now services, reached by Streamable HTTP. An optional server is
    missing, and the work goes on without it, after a health check. The workflow is the same
    function as before. The block ends while a call is under way: `connect` waits for that call
    and refuses new ones.
    """
    with (
        workspace() as folder,
        http_service("notes", folder / "notes.db") as notes_url,
        http_service("files", folder / "project") as files_url,
    ):
        servers = {
            "git": load_config(folder / "mcp.json")["git"],  # the official one, a child as before
            "notes": ServerConfig(url=notes_url()),
            "files": ServerConfig(url=files_url()),
            "search": ServerConfig(command="no-such-program", required=False),
        }
        asyncio.run(produce(servers, folder / "project"))
    say_children_left()


async def produce(servers: Mapping[str, ServerConfig], project: Path) -> None:
    async with shown(servers) as hub:
        problems = await hub.check()
        healthy = [name for name in servers if name not in problems]
        say(_("Healthy: {names}").format(names=", ".join(healthy)))
        for problem in problems.values():
            verdict(False, problem)
        await workflow(hub, project)
        late = start(hub.call("git", "git_status", {"repo_path": str(project)}))
        await asyncio.sleep(0)  # now it is under way
    answer = _("The call under way has its answer: {answer}")
    text = answer.format(answer=text_of(late.result()).splitlines()[-1])
    verdict(not late.result().is_error, text)
    try:
        await hub.call("git", "git_status", {"repo_path": str(project)})
    except ServerError as error:
        say(f"ServerError: {error}")


def demo_in_process() -> None:
    """In this process, for tests

    Pass an `MCPServer` instead of a configuration, and it runs in this process: no child, no
    socket, ready at once. That is enough to test tools, and a workflow that calls them. It cannot
    show a missing program, a crash, a server that does not answer, or a value that is not JSON.
    """

    async def main() -> None:
        async with connect({"notes": notes_server(":memory:")}) as hub:
            await hub.call("notes", "add", {"text": "kept in memory"})
            found = text_of(await hub.call("notes", "search", {"words": "memory"}))
            ms, pids = 1000 * hub.statuses["notes"].startup, census()
            result = _("Ready after {ms:.1f} ms. Children: {pids}. Found: {found}")
            verdict(pids == _("none"), result.format(ms=ms, pids=pids, found=found))

    asyncio.run(main())


def serve(arguments: list[str]) -> int:
    """Be the MCP server that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"{Path(__file__).name} serve")
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("where", help="notes: an SQLite file; files: a directory")
    parser.add_argument("--http", type=int, metavar="PORT", help="0 takes any free one")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    server = SERVERS[options.name](options.where)
    try:
        if options.http is None:
            log.setLevel(logging.INFO)
            server.run()
        else:
            asyncio.run(serve_http(server, options.http))
    except KeyboardInterrupt:
        return 130
    return 0


async def show_config(path: str) -> None:
    """Start the servers of a configuration, list their tools, and end them."""
    async with shown(load_config(path)) as hub:
        for name, tools in hub.tools.items():
            say(", ".join(tool.name for tool in tools), f"{name}: ")


DEMOS = (
    demo_forgotten,
    demo_gather,
    demo_side_by_side,
    demo_development,
    demo_production,
    demo_in_process,
)
KEY_POINTS = """\
* The task that enters a client must exit it, so give each server an owner task.
* Start together, end together: one context manager around all servers leaves no child behind.
* Name the server in every error, and give every wait a deadline.
* Required or optional, restarted or not: say it in the configuration, not in the code.
* A call that failed may have done its work. Repeat it only if you know that this is harmless."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line; run `--config` and exit."""
    parser.add_argument("--config", metavar="FILE", help=_("start the servers of FILE instead"))
    options = parser.parse_args()
    if not options.config and not shutil.which("git"):
        parser.error("there is no git: install it, because the demos make a repository")
    stderr_log = logging.getLogger("mcp_hub")
    stderr_log.setLevel(logging.INFO)
    stderr_log.propagate = False
    stderr_log.handlers = [BesideItsName()]
    try:
        if options.config:
            asyncio.run(show_config(options.config))
            parser.exit()
        yield options
    except (ConfigError, ServerError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        say(_("Children left: {pids}").format(pids=census()))
        raise


if __name__ == "__main__" and sys.argv[1:2] == ["serve"]:
    sys.exit(serve(sys.argv[2:]))


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
