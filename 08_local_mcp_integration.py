# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "rich>=14.1,<16",
#     "openai>=3.50,<4",
#     "mcp>=2.3,<3",
#     "mcp-server-time>=2026.10",
# ]
# ///
"""Chapter 08 · Several MCP servers, one block

After this chapter you can start MCP servers side by side, let a model use their tools, keep going
if one of them dies, and be sure that no child process is left, however your block ends.

    python 08_local_mcp_integration.py                    run all five demos
    python 08_local_mcp_integration.py 2 4                run demos 2 and 4
    python 08_local_mcp_integration.py --step             wait for Enter
    python 08_local_mcp_integration.py --live             ask a real model in demo 4
    python 08_local_mcp_integration.py serve notes FILE   serve notes in SQLite
    python 08_local_mcp_integration.py serve files DIR    serve a directory

`serve` makes this file an MCP server that speaks over stdin and stdout; with `--http PORT` it
prints its URL and serves HTTP.

Read `connect` and `run_with_tools` first, then run the demos. Child processes, sockets, SQLite
and the OpenAI client are real. Offline, a stand-in plays the model.

For development and tests, give `connect` your `MCPServer` objects: they run in your process (demo
5). For production, name programs and services in an mcp.json (demo 3). The block stays the same.

Left out: OAuth, sampling, prompts and resources (`hub.ask` reaches them), a restart policy (a
capstone, built on `on_change`), a budget for the model (chapter 05), services that report a
forgotten session by 400 instead of 404, renewing a subscription to the list of tools, Windows.
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
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

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
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
State = Literal["starting", "ready", "lost", "failed", "stopped"]
EXIT_TIMEOUT = 2.0  # seconds for a child to exit when its input ends, and again after SIGTERM
LEAVE_TIMEOUT = 5.0  # seconds to end a session with a service, or the lifespan of an MCPServer
LONGEST_LINE = 16 * 2**20  # bytes of one message from a child
MOST_PAGES = 100  # of a list of tools
ARGUMENTS = TypeAdapter(dict[str, Any])
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
        problem = first["msg"].removeprefix("Value error, ")  # from the checks above
        # subtle: the input may be a whole entry, with the secrets in its `env`.
        if first["type"] != "value_error" and not isinstance(first["input"], (dict, list, bytes)):
            problem += f", not {reprlib.repr(first['input'])}"
        raise ConfigError(f"{path}: {where}: {problem}") from None


class ServerError(RuntimeError):
    """A server did not start, did not answer, failed or died. The message says which, and why."""

    def __init__(self, server: str, problem: str) -> None:
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
            # subtle: a failure while they are sent could end the whole connection.
            ARGUMENTS.dump_json(given, warnings="error")
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
        """Ask all servers at once for their tools. Return what is wrong, by server."""
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
        self.client: Any  # while it is entered
        self.scope = anyio.CancelScope(deadline=deadline)  # around the client: cuts it off
        self.work = anyio.CancelScope()  # inside the client: it ends its session first
        self.died = False
        self.forgotten = False  # the service does not know our session any more


class _Owner:
    """Holds one server from start to end, in its own task.

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
        """Ask the task to exit its client, within a limit."""
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
                problem = "forgot our session" if connection.forgotten else "ended"
        except Exception as error:
            problem = _cause(error)
        for line in reversed(self.last_words):
            if words := line.strip(" |+-"):  # without the frame of an ExceptionGroup
                return f"{problem}; its last words: {words}"
        return problem

    async def follow_tools(self, client: Client) -> None:
        """List the tools again whenever the server says that they have changed."""
        async with AsyncExitStack() as stack:
            with suppress(ListenNotSupportedError, MCPError, SubscriptionLost):
                # A server with the newer protocol reports changes only to those who ask.
                await stack.enter_async_context(client.listen(tools_list_changed=True))
                self.tools_changed.set()  # perhaps they changed before
            while True:
                await self.tools_changed.wait()
                self.tools_changed.clear()
                with suppress(MCPError, ValueError):  # then the old list is the best there is
                    tools = await _list_tools(client)
                    if tools != self.status.tools and not self.connection.died:
                        self.set_status("ready", tools=tools)

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
        """Make the task leave a dead connection, unless it is leaving already."""
        if not (self.leaving or connection.scope.cancel_called):
            connection.died = True
            self.settled.clear()
            connection.scope.cancel()

    @asynccontextmanager
    async def transport(
        self, config: ServerConfig, connection: _Connection
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Connect to a child or a service; yield the streams to read and to write."""

        async def on_response(response: httpx2.Response) -> None:
            request = response.request
            in_session = request.method == "POST" and "mcp-session-id" in request.headers
            if in_session and response.status_code == 404:  # as the specification says
                connection.forgotten = True

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

        with cancelled_by_signals():
            async with connect(load_config("mcp.json")) as hub:
                result = await hub.call("time", "get_current_time", {"timezone": "UTC"})
                print(result_text(result))

    Each has `startup_timeout` seconds to be ready. If a required one fails, the others are stopped
    and ServerError is raised; an optional one that fails is only shown in `statuses`. A call has
    `call_timeout` seconds. `on_change` is called with each new status, even if an idle child dies;
    it must not raise. An MCPServer runs right here, in this process.

    If the body does not raise, calls under way may finish first. Every server has time to leave,
    even if the caller is cancelled: up to 5 s to end its session or its lifespan. A child that
    ignores the end of its input for 2 s gets SIGTERM, and 2 s later it is killed, with everything
    in its process group. A process that has left the group survives.
    """
    hub = McpHub(startup_timeout, call_timeout, on_change)
    try:
        # subtle: not a TaskGroup. It would cancel the body when one owner fails, wrap what the body
        # raises, and cancel the owners in the middle of their cleanup. `leave` only asks them.
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
        return "ended"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return f"{type(error).__name__}: {error}".removesuffix(": ")


# --- A model that uses the tools ---

Message: TypeAlias = Any  # a message of the Chat Completions API: a dict
NamedTools: TypeAlias = dict[str, tuple[str, Tool]]  # server and tool by the model's name


class ReplyError(RuntimeError):
    """The model's reply is not a chat completion, or it does not stop asking for tools."""


def chat_tools(hub: McpHub) -> NamedTools:
    """Return the server and the tool behind each name that a model sees: `server__tool`.

    A name has at most 64 letters, digits, `_` and `-`: other characters become `_`, and a name
    that is already taken gets a number.
    """
    named: NamedTools = {}
    for server, tools in hub.tools.items():
        for tool in tools:
            name = valid = re.sub(r"[^a-zA-Z0-9_-]", "_", f"{server}__{tool.name}")[:64]
            number = 1
            while name in named:
                number += 1
                name = f"{valid[:58]}_{number}"
            named[name] = server, tool
    return named


async def run_with_tools(
    client: AsyncOpenAI, model: str, messages: list[Message], hub: McpHub, *, max_rounds: int = 8
) -> list[Message]:
    """Let a model answer `messages` with the hub's tools. Return the new messages, answer last.

    If the model asks for several tools in one reply, they run at the same time. If a tool fails,
    or the model misspells its name or its arguments, the model gets the error and can try again.

    The model may call every tool of the hub without asking you. To offer fewer, filter `named`.
    `messages` stays as it is, so you can send it again after a failure, but what the tools did
    stays done. Raises ReplyError if a reply is not a chat completion, or if the model asks for
    tools more than `max_rounds` times, and what the client raises.
    """
    new: list[Message] = []
    for round_number in range(max_rounds + 1):
        named = chat_tools(hub)
        reply = await ask_model(client, model, messages + new, named)
        new.append(reply)
        calls = reply.get("tool_calls")
        if not calls:
            return new
        if round_number < max_rounds:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run_tool(hub, named, call)) for call in calls]
            new += [task.result() for task in tasks]
    raise ReplyError(f"the model asked for tools more than {max_rounds} times")


async def ask_model(
    client: AsyncOpenAI, model: str, messages: list[Message], named: NamedTools
) -> Message:
    """Send one request, and return the message of the reply. Raises ReplyError if it has none."""
    options: dict[str, Any] = {"model": model, "messages": messages}
    if named:
        options["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": tool.description or "",
                    "parameters": {"type": "object", "properties": {}} | tool.input_schema,
                },
            }
            for name, (_server, tool) in named.items()
        ]
    reply = await client.chat.completions.with_raw_response.create(**options)
    try:
        data = reply.http_response.json()
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"the reply is not JSON: {error}") from error
    match data:
        case {"choices": [{"message": {} as message} as choice, *_]} if is_whole(choice):
            return message | {"role": "assistant"}
    raise ReplyError(f"the reply is not a chat completion: {data!r:.199}")


def is_whole(choice: Mapping[str, Any]) -> bool:
    """Return whether a reply has an end, and tool calls that can be answered, or words."""
    message = choice["message"]
    calls = message.get("tool_calls")
    if not choice.get("finish_reason"):
        return False
    if calls:
        return isinstance(calls, list) and all(is_call(call) for call in calls)
    return isinstance(message.get("content"), str) or isinstance(message.get("refusal"), str)


def is_call(call: object) -> bool:
    match call:
        case {"id": str(), "function": {"name": str()}}:
            return True
    return False


async def run_tool(hub: McpHub, named: NamedTools, call: Message) -> Message:
    """Run a tool. Return a message with its result, or with what went wrong."""
    function = call["function"]
    try:
        server, tool = named[function["name"]]
        given = ARGUMENTS.validate_json(function.get("arguments") or "{}")
        text = result_text(await hub.call(server, tool.name, given))
    except KeyError:
        text = f"Error: no such tool; there are: {', '.join(named)}"
    except ValidationError as error:
        text = f"Error: not a JSON object: {error.errors()[0]['msg']}"
    except ServerError as error:
        text = f"Error: {error}"
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def result_text(result: CallToolResult) -> str:
    """Return a tool's result as text, because the API takes no images and files from tools."""
    parts = [
        part.text if isinstance(part, TextContent) else f"[{part.type} left out]"
        for part in result.content
    ]
    text = "\n".join(parts) or json.dumps(result.structured_content)
    text = text.encode(errors="replace").decode()  # a lone surrogate could not be sent
    return f"Error: {text}" if result.is_error else text


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---


def notes_server(database: str | Path) -> MCPServer[sqlite3.Connection]:
    """Notes in an SQLite file, which is open as long as the server runs."""

    @asynccontextmanager
    async def lifespan(server: MCPServer[sqlite3.Connection]) -> AsyncIterator[sqlite3.Connection]:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS notes (text TEXT NOT NULL)")
            yield connection

    server = MCPServer("notes", lifespan=lifespan, log_level="WARNING")

    @server.tool()
    async def add(text: str, context: Context[sqlite3.Connection]) -> str:
        """Keep a note."""
        with context.request_context.lifespan_context as connection:  # commits
            connection.execute("INSERT INTO notes VALUES (?)", (text,))
        return text

    @server.tool()
    async def search(words: str, context: Context[sqlite3.Connection]) -> list[str]:
        """Return the notes that contain these words, oldest first."""
        query = "SELECT text FROM notes WHERE instr(lower(text), lower(?)) ORDER BY rowid"
        rows = context.request_context.lifespan_context.execute(query, (words,))
        return [text for (text,) in rows]

    return server


def files_server(root: str | Path) -> MCPServer[Any]:
    """The text files below a directory, read-only."""
    top = Path(root).resolve(strict=True)
    server = MCPServer("files", log_level="WARNING")

    @server.tool()
    async def read(path: str) -> str:
        """Return the text of a file. The path is relative to the root."""
        try:
            inside = (top / path).resolve()  # where `..` and symbolic links lead
            if not inside.is_relative_to(top):
                raise ToolError(f"{path!r} is outside the root: use a path below it")
            return inside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ToolError(f"cannot read {path!r}: {error}") from error

    return server


SERVERS: dict[str, Callable[[str], MCPServer[Any]]] = {"notes": notes_server, "files": files_server}


def serve(arguments: list[str]) -> int:
    """Be the MCP server that the command line names. Return the exit status."""
    parser = argparse.ArgumentParser(prog=f"{Path(__file__).name} serve")
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("where", help="notes: an SQLite file; files: a directory")
    parser.add_argument("--http", type=int, metavar="PORT", help="0 takes any free one")
    options = parser.parse_args(arguments)
    server = SERVERS[options.name](options.where)
    try:
        if options.http is None:
            server.run()
        else:
            asyncio.run(serve_http(server, options.http))
    except KeyboardInterrupt:
        return 130
    return 0


async def serve_http(server: MCPServer[Any], port: int) -> None:
    """Print the URL, and serve on loopback until SIGTERM. Requests under way have 3 s to end."""
    app = server.streamable_http_app()
    config = uvicorn.Config(app, ws="none", log_level="warning", timeout_graceful_shutdown=3)
    with socket.create_server(("127.0.0.1", port)) as listening:
        # The socket already listens, so a client that reads this line can connect.
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp", flush=True)
        await uvicorn.Server(config).serve(sockets=[listening])


TIME: dict[str, Any] = {"command": sys.executable, "args": ["-m", "mcp_server_time"]}
POOL = "def acquire():\n    return gpus.pop()\n"
live = False  # --live


def children() -> set[int]:
    """Return the ids of all children of this process; none if the system has no /proc."""
    listings = Path("/proc/self/task").glob("*/children")
    return {int(pid) for listing in listings for pid in listing.read_text().split()}


def verdict_on_children(name: str) -> None:
    """Say which children a function has left."""
    if not Path("/proc").exists():
        say(_("This system has no /proc, so the demo cannot list its children."))
        return
    pids = ", ".join(map(str, sorted(children())))
    text = _("Children left by `{name}`: {pids}.").format(name=name, pids=pids or _("none"))
    verdict(not pids, text)


async def failure_of(work: Awaitable[object]) -> str:
    """Return the error that ends some work, or "no error"."""
    try:
        await work
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _("no error")


def show_statuses(hub: McpHub) -> None:
    """Show the status of each server in a row."""
    titles = (_("server"), _("status"), "pid", _("tools"), _("ready after"), _("what is wrong"))
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for status in hub.statuses.values():
        state = Text(status.state, "green" if status.state == "ready" else "red")
        seconds = f"{status.startup:.2f} s" if status.startup else ""
        pid, tools = str(status.pid or ""), str(len(status.tools))
        table.add_row(status.name, state, pid, tools, seconds, Text(status.error))
    console.print(table, "")


async def forgotten(program: StdioServerParameters) -> Client:
    client = Client(program)
    await client.__aenter__()
    return client


async def connected(servers: Mapping[str, Any]) -> None:
    async with connect(servers) as hub:
        await hub.check()


async def demo_forgotten() -> None:
    """A client that nobody exits

    `forgotten` enters a client by hand and never exits it. Its server keeps running, and a task
    waits for it. `asyncio.run` waits for that task: it never returns, and if your program raises,
    you do not even see the traceback. (Here, the demo exits the client afterwards.)
    """
    show_code(forgotten, connected)
    question(_("Both functions return. Which of them leaves a child process behind?"))
    with cancelled_by_signals():
        client = await forgotten(StdioServerParameters.model_validate(TIME))
        try:
            verdict_on_children("forgotten")
        finally:
            await client.__aexit__(None, None, None)
        await connected({"time": ServerConfig(**TIME)})
        verdict_on_children("connected")
    say(_("Replace the `__aexit__` line with `pass`, run demo 1 again, and press Ctrl-C."), "→ ")


async def gathered(servers: Mapping[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        clients = [Client(server) for server in servers.values()]
        await asyncio.gather(*map(stack.enter_async_context, clients))
        await clients[0].list_tools()


def demo_gather() -> None:
    """A client that another task enters

    `gather` runs each coroutine in its own task. The task that enters a client must also
    exit it, because the client's cancel scope belongs to that task. `connect` gives every server
    an owner task, which enters the client, waits until the block ends, and exits the client.
    """
    show_code(gathered)
    question(_("Both clients are entered, and the call works. Which line raises?"))
    for function in (gathered, connected):
        servers = {"notes": notes_server(":memory:"), "more": notes_server(":memory:")}
        with trace() as path:
            failure = asyncio.run(failure_of(function(servers)))
        show_code(function, runs={_("one run"): path})
        verdict(failure == _("no error"), failure)
    say(_("In `gathered`, enter the clients in a `for` loop, and run demo 2 again."), "→ ")


@contextmanager
def http_service(name: str, where: Path) -> Iterator[IO[str]]:
    """Run one of our servers as a service over HTTP. Yield its output: a line with its URL."""
    command = [sys.executable, __file__, "serve", name, str(where), "--http", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as service:
        assert service.stdout
        try:
            yield service.stdout
        finally:
            service.terminate()


async def work(servers: Any, on_change: Any, lost: asyncio.Event) -> None:
    async with connect(servers, on_change=on_change) as hub:
        show_statuses(hub)
        pid = hub.statuses["time"].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        await lost.wait()
        say(await failure_of(hub.call("time", "get_current_time")), "call │ ")
        problems = await hub.check()
    console.print()
    for name in servers:
        verdict(name not in problems, f"{name}: {problems.get(name, _('answers'))}")


async def work_in(folder: Path) -> None:
    lost = asyncio.Event()

    def on_change(status: ServerStatus) -> None:
        if status.state == "lost":
            say(f"{status.name}: {status.state}: {status.error}", "on_change │ ")
            lost.set()

    with http_service("files", folder) as output:
        servers = {
            "time": TIME,
            "notes": TIME | {"args": [__file__, "serve", "notes", f"{folder}/notes.db"]},
            "files": {"url": (await asyncio.to_thread(output.readline)).strip()},
            "search": {"command": "no-such-program", "required": False},
        }
        path = folder / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        await work(load_config(path), on_change, lost)


async def demo_config() -> None:
    """The servers of an mcp.json

    For production, name the servers in a file, as MCP hosts do: `load_config` reads it. This one
    names two programs, which `connect` starts at the same time, a service, which it reaches by its
    URL, and a program that is missing, which is not required. Then `time` is killed while nobody
    calls it.
    """
    show_code(work)
    question(_("Who notices first that `time` is dead? Which servers still answer?"))
    with cancelled_by_signals(), tempfile.TemporaryDirectory() as folder:
        await work_in(Path(folder))
    verdict_on_children("connect")
    say(_('In `work_in`, delete `"required": False`, and run demo 3 again.'), "→ ")


ROUNDS = (  # the tools that the stand-in asks for, and their arguments
    [("files__read", '{"path": "pool.py"}'), ("notes__serch", '{"words": "pool.py"}')],
    [("notes__search", '{"words": "pool')],
    [("notes__search", '{"words": "pool.py"}')],
)


def stand_in(request: httpx2.Request) -> httpx2.Response:
    """Ask for the tools of ROUNDS, and then repeat the last result."""
    messages = json.loads(request.content)["messages"]
    number = sum(message["role"] == "assistant" for message in messages)
    message: Message = {"content": f"The notes say: {messages[-1]['content']}"}
    if number < len(ROUNDS):
        functions = [{"name": name, "arguments": given} for name, given in ROUNDS[number]]
        calls = [{"id": f["name"], "type": "function", "function": f} for f in functions]
        message = {"content": None, "tool_calls": calls}
    choice = {"message": message, "finish_reason": "stop"}
    return httpx2.Response(200, json={"choices": [choice]})


def model_client() -> AsyncOpenAI:
    """Return the real client, with a stand-in that answers or, with --live, a real model."""
    from openai import AsyncOpenAI  # here, because it would slow down every server

    if live:
        return AsyncOpenAI(timeout=60)
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(stand_in))
    return AsyncOpenAI(api_key="offline", base_url="http://stand-in.invalid/v1", http_client=http)


async def careless(client: Any, model: str, messages: list[Message], hub: McpHub) -> None:
    named = chat_tools(hub)
    while True:
        reply = await ask_model(client, model, messages, named)
        messages.append(reply)
        if not reply.get("tool_calls"):
            return
        for call in reply["tool_calls"]:
            server, tool = named[call["function"]["name"]]
            arguments = json.loads(call["function"]["arguments"])
            result = await hub.call(server, tool.name, arguments)
            answer = {"role": "tool", "content": result_text(result)}
            messages.append(answer | {"tool_call_id": call["id"]})


def show_conversation(messages: list[Message]) -> None:
    names = {"user": _("user"), "tool": _("tool answers"), "assistant": _("model answers")}
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            say(f"{function['name']} {function.get('arguments')}", _("model asks") + " │ ")
        if text := message.get("content") or message.get("refusal"):
            say(text, names[message["role"]] + " │ ")
    console.print()


async def demo_model() -> None:
    """A model that uses the tools

    A model cannot call a tool. It replies with the name and the arguments, the program makes the
    call, and the next request carries the result. Models misspell names and break JSON. If the
    program reports such a mistake instead of raising, the model tries again.
    """
    asked = {"role": "user", "content": "What does pool.py do, and what do the notes say about it?"}
    model = os.environ.get("OPENAI_MODEL") or "gpt-4o-mini"
    if not live:
        say(_("A stand-in plays the model: it asks for tools by a script."))
        show_code(careless)
        question(_("The model asks for `notes__serch`, which does not exist. What happens then?"))
    with tempfile.TemporaryDirectory() as folder:
        await anyio.Path(folder, "pool.py").write_text(POOL)
        servers = {"notes": notes_server(":memory:"), "files": files_server(folder)}
        async with connect(servers) as hub, model_client() as client:
            note = "pool.py: gpus.pop() fails if no GPU is free"
            await hub.call("notes", "add", {"text": note})
            if not live:
                failure = await failure_of(careless(client, model, [asked], hub))
                verdict(failure == _("no error"), f"`careless`: {failure}")
            with trace() as path:
                new = await run_with_tools(client, model, [asked], hub)
    show_conversation([asked, *new])
    show_code(run_with_tools, run_tool, runs={_("one run"): path})
    results = [message["content"] for message in new if message["role"] == "tool"]
    errors = sum(result.startswith("Error: ") for result in results)
    text = _(
        "`run_with_tools` answers. Tool calls: {calls}, errors reported to the model: {errors}."
    )
    verdict(True, text.format(calls=len(results), errors=errors))
    say(_("Pass `max_rounds=2` to `run_with_tools`, and run demo 4 again."), "→ ")


@asynccontextmanager
async def saved_notes(path: Path) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await anyio.Path(path).write_text("GPU 3 is hot")


async def cancelled(opened: Any, server: MCPServer[Any]) -> None:
    with anyio.CancelScope() as scope:
        async with opened(server):
            scope.cancel()
            await anyio.sleep_forever()


def by_client(server: MCPServer[Any]) -> Any:
    return Client(server)


def by_hub(server: MCPServer[Any]) -> Any:
    return connect({"notes": server})


def demo_in_process() -> None:
    """In this process: tests, and a cleanup that awaits

    Give `connect` an `MCPServer`, and it runs in this process: no child, no socket, ready at once.
    That is enough for development and tests. Here the server saves its notes when it ends. A web
    framework cancels a block by an anyio scope: then each `await` in it is cancelled, even in
    `finally`. The hub instead asks the owner task to leave its block, and waits.
    """
    show_code(saved_notes, cancelled)
    question(_("The block is cancelled. Are the notes saved?"))
    for opened in (by_client, by_hub):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "notes.txt")
            server = MCPServer("notes", lifespan=lambda server: saved_notes(path))  # noqa: B023
            with trace() as lines:
                asyncio.run(cancelled(opened, server))
            show_code(cancelled, opened, saved_notes, runs={_("one run"): lines})
            saved = path.read_text() if path.exists() else _("none")
        text = _("`{function}`: saved: {saved}.").format(function=opened.__name__, saved=saved)
        verdict(saved != _("none"), text)
    say(_("In `cancelled`, replace the last two lines with `pass`, and run demo 5 again."), "→ ")


DEMOS = (
    demo_forgotten,
    demo_gather,
    demo_config,
    demo_model,
    demo_in_process,
)
KEY_POINTS = """\
* The task that enters a client must exit it, so give each server an owner task.
* Start together, end together: one context manager around all servers leaves no child behind.
* Name the server in every error, and give every wait a deadline.
* A model only asks for tools. Run them, report every failure to the model, and limit the rounds.
* A call that failed may have done its work. Repeat it only if that is harmless.
* Ask a server to leave, and wait. Cancel it only after a deadline."""


def hide_key(text: str) -> str:
    """Take the API key out of a text, unless it is a word such as "any"."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) > 12 else text


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With --live, exit with one line if the model does not answer."""
    from openai import OpenAIError  # here, because it would slow down every server

    global live
    text = _("ask a real model: OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL")
    parser.add_argument("--live", action="store_true", help=text)
    options = parser.parse_args()
    if sys.platform == "win32":
        parser.exit(2, f"{parser.prog}: Windows is left out: its event loop cannot watch a pipe\n")
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error(_("--live needs OPENAI_API_KEY; a local server takes any value"))
    live = options.live
    try:
        yield options
    except ServerError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (OpenAIError, ReplyError, httpx2.InvalidURL, UnicodeEncodeError) as error:
        problem = hide_key(" ".join(str(error).split()))
        parser.exit(1, f"{parser.prog}: the model did not answer: {problem}\n")
    except KeyboardInterrupt:
        say(_("Children left: {pids}").format(pids=sorted(children()) or _("none")))
        raise


if __name__ == "__main__" and sys.argv[1:2] == ["serve"]:
    sys.exit(serve(sys.argv[2:]))


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
