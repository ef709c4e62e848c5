# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "rich>=14.1,<16",
#     "mcp>=2.3,<3",
#     "mcp-server-git>=2026.10",
#     "mcp-server-time>=2026.10",
# ]
# ///
"""Chapter 08 · Local MCP integration: several real servers in one context manager.

After this chapter you can start MCP servers side by side, call their tools, survive the death of
one of them, and be certain that no child process is left, however your block was left.

    python 08_local_mcp_integration.py                    play all demos
    python 08_local_mcp_integration.py 3                  play demo 3 alone
    python 08_local_mcp_integration.py --config FILE      start the servers of your mcpServers file
    python 08_local_mcp_integration.py serve notes FILE   be an MCP server: notes in an SQLite file
    python 08_local_mcp_integration.py serve files DIR    be another: the files below a directory

`serve` speaks over stdin and stdout; with `--http PORT` it prints its URL and serves HTTP.
Look at `connect` and at `_Owner` first, then at the process ids in the demos. Everything is real:
child processes, sockets, git, SQLite. Nothing leaves the machine.

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
import reprlib
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar

import anyio
import uvicorn
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.sse import sse_client
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CONNECTION_CLOSED, CallToolResult, TextContent, Tool
from pydantic import ConfigDict, HttpUrl, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass
from rich.bar import Bar
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")
State = Literal["starting", "ready", "restarting", "lost", "failed", "stopped"]
RESTART_DELAY = 0.2  # seconds from a server's death to its one restart


class ConfigError(ValueError):
    """The configuration cannot be used; one line says which file, server and key, and why."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class ServerConfig:
    """One entry of `mcpServers`: a program to start, `command`, or a service to reach, `url`."""

    command: str | None = None
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # on top of the SDK's few safe variables
    cwd: str | None = None
    url: HttpUrl | None = None
    type: Literal["", "stdio", "http", "streamable-http", "streamableHttp", "sse"] = ""
    required: bool = True  # False: the work goes on without it
    restart: bool = False  # True: once, when it has died

    @model_validator(mode="after")
    def _either_way(self) -> ServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("there must be either a command, to start it, or a url, to reach it")
        return self


@checked_dataclass
class _ConfigFile:
    mcpServers: dict[str, ServerConfig]  # the hosts' spelling


def load_config(path: str | Path) -> dict[str, ServerConfig]:
    """Read the `mcpServers` JSON of MCP hosts; keys that are a host's own are passed over."""
    try:
        return TypeAdapter(_ConfigFile).validate_json(Path(path).read_bytes()).mcpServers
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        given = reprlib.repr(first["input"])
        raise ConfigError(f"{path}: {where}: {first['msg']}, not {given}") from None


class ServerError(RuntimeError):
    """A server did not start, did not answer, refused or died; the message says which, and why."""

    def __init__(self, server: str, problem: str) -> None:
        super().__init__(f"MCP server {server!r} {problem}")
        self.server = server


@dataclass(frozen=True)
class ServerStatus:
    """What is known of one server now."""

    name: str
    state: State = "starting"
    pid: int | None = None  # of a child process, where the system has /proc
    tools: tuple[Tool, ...] = ()
    startup: float = 0.0  # seconds from its start to its list of tools
    error: str = ""


class McpHub:
    """Servers to be called, from any task of the event loop. `connect` makes it, and ends it."""

    def __init__(
        self, startup_timeout: float, call_timeout: float, on_change: Callable[[ServerStatus], None]
    ) -> None:
        self._startup_timeout, self._call_timeout = startup_timeout, call_timeout
        self._on_change = on_change
        self._owners: dict[str, _Owner] = {}
        self._settled: asyncio.Queue[_Owner] = asyncio.Queue()  # those that are ready or gave up
        self._calls = 0  # under way
        self._call_ended = asyncio.Event()
        self._closed = False

    @property
    def statuses(self) -> dict[str, ServerStatus]:
        """Every server's status; the failed and the lost are there too."""
        return {name: owner.status for name, owner in self._owners.items()}

    @property
    def tools(self) -> dict[str, tuple[Tool, ...]]:
        """The tools of every server that is ready."""
        return {n: status.tools for n, status in self.statuses.items() if status.state == "ready"}

    async def call(
        self, server: str, tool: str, arguments: Mapping[str, Any] | None = None
    ) -> CallToolResult:
        """Call a tool; what the tool itself finds wrong is a result with `is_error`.

        Raises ServerError within the hub's `call_timeout`, or up to 5 s later where the server has
        stopped reading, too. No call is sent twice: a server that died may have done the work.
        """
        if self._closed:
            raise ServerError(server, "takes no calls any more: its hub is closed")
        if server not in self._owners:
            raise ServerError(server, f"is not known; there are: {', '.join(self._owners)}")
        owner = self._owners[server]
        names = [each.name for each in owner.status.tools]
        if names and tool not in names:
            raise ServerError(server, f"has no tool {tool!r}; it has: {', '.join(names)}")
        what, given = f"tool {tool!r}", dict(arguments or {})
        self._calls += 1
        try:
            return await owner.ask(what, lambda c: c.call_tool(tool, given), self._call_timeout)
        finally:
            self._calls -= 1
            self._call_ended.set()

    async def check(self, timeout: float = 2.0) -> dict[str, str]:
        """Ask all servers at once for a sign of life; returns what is wrong, by server.

        A server that has died is noticed by this, or by the next call.
        """
        owners = self._owners.values()
        asked = (owner.ask("the health check", _list_tools, timeout) for owner in owners)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        by_name = zip(self._owners, answers, strict=True)
        return {name: str(answer) for name, answer in by_name if isinstance(answer, BaseException)}

    async def _drain(self) -> None:
        """Take no more calls, and wait for those under way: each of them has a deadline."""
        self._closed = True
        while self._calls:
            self._call_ended.clear()
            await self._call_ended.wait()


class _Owner:
    """Holds one server from start to end, in one task of its own.

    A client's cancel scopes belong to the task that entered it, so no other may enter or leave it.
    Others wait for `settled`, and ask for an end by cancelling `connection` or `life`.
    """

    def __init__(self, name: str, config: ServerConfig | MCPServer[Any], hub: McpHub) -> None:
        self.status = ServerStatus(name)
        self.config, self.hub = config, hub
        self.required = isinstance(config, MCPServer) or config.required
        self.restarts = int(isinstance(config, ServerConfig) and config.restart)
        self.client: Client | None = None
        self.settled = asyncio.Event()
        self.life, self.connection = anyio.CancelScope(), anyio.CancelScope()

    async def run(self) -> None:
        """Hold the server until `life` is cancelled; hold it anew where it may be restarted."""
        with self.life:
            await self.hold()
            while self.status.state == "restarting":
                self.restarts -= 1
                await anyio.sleep(RESTART_DELAY)
                self.become("starting")
                await self.hold()
        if self.status.state in ("starting", "ready", "restarting"):
            self.become("stopped")

    async def hold(self) -> None:
        """Enter, report, wait, leave. Trouble, of whatever kind, ends in the status."""
        limit, started = self.hub._startup_timeout, time.perf_counter()
        problem = f"was not ready within {limit:g} s"
        with stderr_lines(self.status.name) as (errlog, lines):
            try:
                with anyio.move_on_after(limit) as self.connection:
                    async with Client(self.target(errlog)) as self.client:
                        tools = await _list_tools(self.client)
                        self.connection.deadline = math.inf
                        seconds = time.perf_counter() - started
                        self.become("ready", tools=tools, startup=seconds, error="")
                        await anyio.sleep_forever()
            except Exception as error:
                problem = _cause(error)
        words = [line.strip(" |+-") for line in lines]  # without the frame of an ExceptionGroup
        self.ended("; its last words: ".join([problem, *list(filter(None, words))[-1:]]))

    def ended(self, problem: str) -> None:
        """Note that the connection is gone, and have the task leave it."""
        if self.status.state == "starting":
            self.become("failed", error=problem)
        elif self.status.state == "ready":
            self.become("restarting" if self.restarts else "lost", error=problem)
        self.connection.cancel()

    def become(self, state: State, **changes: Any) -> None:
        """Change the status, and wake those who wait for it."""
        self.status = replace(self.status, state=state, **changes)
        if state in ("starting", "restarting"):
            self.settled.clear()
        else:
            self.settled.set()
            self.hub._settled.put_nowait(self)
        self.hub._on_change(self.status)

    async def ask(self, what: str, send: Callable[[Client], Awaitable[T]], limit: float) -> T:
        """One request, within `limit` seconds, and with errors that name the server."""
        name, client = self.status.name, None
        try:
            async with asyncio.timeout(limit):
                await self.settled.wait()
                if self.status.state != "ready" or self.client is None:
                    raise ServerError(name, f"is {self.status.state}: {self.status.error}")
                client = self.client
                return await send(client)
        except TimeoutError:
            raise ServerError(name, f"did not answer {what} within {limit:g} s") from None
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ServerError(name, f"refused {what}: {error}") from error
            if self.life.cancel_called:
                raise ServerError(name, f"was stopped during {what}") from error
            if client is self.client:  # and not one that was started since
                self.ended(f"died during {what}")
            raise ServerError(name, f"died during {what}; it is {self.status.state}") from error

    def target(self, errlog: TextIO) -> Any:
        """What a Client can be made of: a server in this process, or the way to one outside."""
        config = self.config
        if isinstance(config, MCPServer):
            return config
        if config.command is None:
            return sse_client(str(config.url)) if config.type == "sse" else str(config.url)
        program = StdioServerParameters(
            command=config.command, args=config.args, env=config.env, cwd=config.cwd
        )
        return self.child(program, errlog)

    @asynccontextmanager
    async def child(self, program: StdioServerParameters, errlog: TextIO) -> AsyncIterator[Any]:
        """The SDK's stdio_client, with the child's process id in the status."""
        async with AsyncExitStack() as stack:
            stack.callback(self.forget_child)
            # subtle: cancelled between fork and exec, it would leave the child behind for a moment.
            self.connection.shield = True
            streams = await stack.enter_async_context(stdio_client(program, errlog))
            self.connection.shield = False
            self.status = replace(self.status, pid=_pid_of(errlog))
            yield streams

    def forget_child(self) -> None:
        """Kill what is left of the child's process group: what the child itself started, or the
        child, too, if a second Ctrl-C cut its exit short.
        """
        if self.status.pid is not None:
            with suppress(OSError):  # there is nothing left
                os.killpg(self.status.pid, signal.SIGKILL)
            self.status = replace(self.status, pid=None)


@asynccontextmanager
async def connect(
    servers: Mapping[str, ServerConfig | MCPServer[Any]],
    *,
    startup_timeout: float = 10.0,
    call_timeout: float = 30.0,
    on_change: Callable[[ServerStatus], None] = lambda status: None,
) -> AsyncIterator[McpHub]:
    """Start all servers at the same time; yield a hub to call them; end every one of them.

    Each has `startup_timeout` seconds to be ready. A required one that fails raises ServerError,
    once the others are stopped; an optional one is told in `statuses`. Every call has
    `call_timeout` seconds. `on_change` sees each new status, and must not raise. An MCPServer
    serves right here, in this process.

    Leaving waits for the calls under way, if the body ended well, and then for all children to end,
    though the caller be cancelled. One that ignores end-of-input and SIGTERM is killed after 4 s.
    """
    hub = McpHub(startup_timeout, call_timeout, on_change)
    hub._owners = {name: _Owner(name, config, hub) for name, config in servers.items()}
    owners = hub._owners.values()
    # subtle: not a TaskGroup. It would cancel the body when one owner fails, and wrap what the body
    # raises in an ExceptionGroup; and when cancelled it would cancel the owners, in the middle of
    # whatever clean-up they are at. These tasks are only ever asked.
    tasks = {asyncio.create_task(owner.run(), name=f"MCP {owner.status.name}") for owner in owners}
    try:
        await _all_settled(hub)
        yield hub
        await hub._drain()
    finally:
        hub._closed = True
        for owner in owners:
            owner.life.cancel()
        await _all_ended(tasks)


async def _all_settled(hub: McpHub) -> None:
    """Wait until every server is ready, or optional and failed."""
    waiting = set(hub._owners)
    while waiting:
        owner = await hub._settled.get()
        if owner.required and owner.status.state != "ready":
            raise ServerError(owner.status.name, f"did not start: {owner.status.error}")
        waiting.discard(owner.status.name)


async def _all_ended(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for every owner; a cancellation of the waiting is kept until they have ended."""
    cancelled = False
    while tasks:
        try:
            _done, tasks = await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def _list_tools(client: Client) -> tuple[Tool, ...]:
    page = await client.list_tools(cache_mode="bypass")
    tools = page.tools
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tuple(tools)


def _cause(error: BaseException) -> str:
    """What is at the bottom of nested ExceptionGroups, in the reader's terms."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
        return "ended by itself"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return f"{type(error).__name__}: {error}"


def child_pids(whose: str = "thread-self") -> set[int]:
    """The children of this thread, or, by `self/task/*`, of all; none where there is no /proc."""
    listings = Path("/proc").glob(f"{whose}/children")
    return {int(pid) for listing in listings for pid in listing.read_text().split()}


def _pid_of(errlog: TextIO) -> int | None:
    """The child whose stderr this is, known by its pipe; the SDK keeps the process id to itself."""
    for pid in child_pids():
        with suppress(OSError):  # it has ended
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/2"), os.fstat(errlog.fileno())):
                return pid
    return None


@contextmanager
def stderr_lines(server: str) -> Iterator[tuple[TextIO, deque[str]]]:
    """A stderr of its own for one child, and its latest lines; each is logged beside its name."""
    stderr_log, lines = logging.getLogger(f"mcp_hub.{server}"), deque[str](maxlen=20)

    def drain() -> None:  # a line that arrives in two pieces counts as two
        for line in (source.read(65_536) or b"").decode(errors="replace").splitlines():
            lines.append(line)
            stderr_log.info(line)

    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with open(read_end, "rb", buffering=0) as source, open(write_end, "w") as sink:
        loop = asyncio.get_running_loop()
        loop.add_reader(source, drain)
        try:
            yield sink, lines
        finally:
            loop.remove_reader(source)
            drain()  # what a dying child said last


# --- Two servers of our own; `serve NAME` makes this file one of them ---

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


# --- Demos: from here on the file tells the story. Copy what is above into production. ---

console = Console(highlight=False)
_ = gettext.translation("workshop", Path(__file__).parent / "locale", fallback=True).gettext
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


def census() -> str:
    """The ids of all children of this process."""
    if not Path("/proc").exists():
        return _("unknown, this system has no /proc")
    return ", ".join(map(str, sorted(child_pids("self/task/*")))) or _("none")


def status_table(statuses: Mapping[str, ServerStatus]) -> Table:
    table = Table(_("server"), _("status"), "pid", _("tools"), _("ready after"), _("what is wrong"))
    colours = {"ready": "green", "starting": "yellow"}
    for status in statuses.values():
        state = f"[{colours.get(status.state, 'red')}]{status.state}[/]"
        seconds = f"{status.startup:.2f} s" if status.startup else ""
        pid, tools = str(status.pid or ""), str(len(status.tools))
        table.add_row(escape(status.name), state, pid, tools, seconds, escape(status.error))
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
            hub = await stack.enter_async_context(connect(servers, on_change=show))
        console.print(status_table(hub.statuses))
        yield hub


class BesideItsName(logging.Handler):
    """Show what a server says on stderr beside the server's name."""

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.removeprefix("mcp_hub.")
        console.print(f"[dim]{escape(name)} │ {escape(record.getMessage())}[/]")


def text_of(result: CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, TextContent)).strip()


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
    table = Table(_("call"), _("when"), "ms", _("last line of the answer"))
    total = max(end for _label, _begin, end, _text in calls)
    for label, begin, end, text in calls:
        bar, duration = Bar(total, begin, end, width=16), f"{1000 * (end - begin):.1f}"
        table.add_row(label, bar, duration, escape(text.split("\n")[-1]))
    console.print(table)


def demo_forgotten() -> None:
    """Clients that nobody leaves

    Two clients, entered by hand and never left. `main()` returns, but its two servers live on, and
    so **`asyncio.run()` never returns**: it waits for tasks that wait for the children to end. If
    `main()` had raised, not even the traceback would show. The demo must end the children itself.
    """
    program = StdioServerParameters(command=sys.executable, args=["-m", "mcp_server_time"])
    returned = threading.Event()

    async def main() -> None:
        for _number in range(2):
            await Client(program, mode="2026-07-28").__aenter__()  # this mode awaits no answer
        returned.set()

    logging.getLogger("asyncio").disabled = True  # spare us what asyncio says to all this
    runner = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    runner.start()
    try:
        returned.wait()
        console.print(_("main() has returned; children: [red]{pids}[/]").format(pids=census()))
        runner.join(timeout=0.2)
        if runner.is_alive():
            console.print(_("[red]asyncio.run() has not returned 0.2 s later[/]"))
    finally:
        while runner.is_alive():
            for pid in child_pids("self/task/*"):
                os.kill(pid, signal.SIGKILL)
            runner.join(timeout=0.05)
        logging.getLogger("asyncio").disabled = False
    console.print(_("asyncio.run() has returned, now that the demo killed them"))


def demo_gather() -> None:
    """Started by gather, and never left in peace

    `gather` runs each coroutine in a task of its own. A client that is entered there must be left
    there: its cancel scope belongs to that task, which is over. All goes well until the stack is
    closed. (Servers in this process serve to show it; with children it is the same.)
    """

    async def main() -> None:
        async with AsyncExitStack() as stack:
            clients = [Client(notes_server(":memory:")) for _number in range(2)]
            await asyncio.gather(*map(stack.enter_async_context, clients))
            answer = await clients[1].call_tool("add", {"text": "so far, so good"})
            console.print(f"[green]{text_of(answer)}[/]")

    try:
        asyncio.run(main())
    except RuntimeError as error:
        console.print(f"[red]RuntimeError: {error}[/]")


def demo_side_by_side() -> None:
    """One owner task for each

    `connect` gives every server an **owner task**, which enters its client, reports that it is
    ready, waits, and leaves, all by itself. So they start at the same time, and end at the same
    time. Here are the same two servers, once in turn and once together.
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
        text = _("ready in turn after [red]{in_turn:.2f} s[/], together [green]{together:.2f} s[/]")
        console.print(text.format(in_turn=in_turn, together=together))

    with workspace() as folder:
        servers = load_config(folder / "mcp.json")
        del servers["notes"], servers["files"]
        asyncio.run(main())
    console.print(_("children left: [green]{pids}[/]").format(pids=census()))


def demo_development() -> None:
    """Development: four children

    All are required, and what one of them says on stderr is shown beside its name. Then one is
    killed in the middle of a call. That call fails, and names the server; the others go on. (With
    `"restart": true` in its configuration the next call would find it alive again.)
    """
    with workspace() as folder:
        servers = load_config(folder / "mcp.json")
        asyncio.run(develop(servers, folder / "project"))
    console.print(_("children left: [green]{pids}[/]").format(pids=census()))


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
    call = asyncio.create_task(hub.call("time", "get_current_time", {"timezone": "UTC"}))
    await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    try:
        await call
    except ServerError as error:
        console.print(f"[red]ServerError: {escape(str(error))}[/]")
    console.print("files.list:", text_of(await hub.call("files", "list")))
    console.print({name: status.state for name, status in hub.statuses.items()})


@contextmanager
def http_service(name: str, where: Path) -> Iterator[Callable[[], HttpUrl]]:
    """One of our servers as a process of its own that serves HTTP; yields how to learn its URL."""
    command = [sys.executable, __file__, "serve", name, str(where), "--http", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as it:
        assert it.stdout
        output = it.stdout
        try:
            yield lambda: HttpUrl(output.readline().strip())
        finally:
            it.terminate()


def demo_production() -> None:
    """Production: services, some of them optional

    Our own two servers are now services of their own, reached by Streamable HTTP. An optional
    server is missing: the work goes on without it. Health is asked for before the work. The
    workflow is the very same function. The block is left while a call is under way: that one is
    waited for, new ones are refused.
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
    console.print(_("children left: [green]{pids}[/]").format(pids=census()))


async def produce(servers: Mapping[str, ServerConfig], project: Path) -> None:
    async with shown(servers) as hub:
        problems = await hub.check()
        console.print(_("healthy:"), ", ".join(escape(n) for n in servers if n not in problems))
        for problem in problems.values():
            console.print(f"[red]{escape(problem)}[/]")
        await workflow(hub, project)
        late = asyncio.create_task(hub.call("git", "git_status", {"repo_path": str(project)}))
        await asyncio.sleep(0)  # now it is under way
    answer = escape(text_of(late.result()).splitlines()[-1])
    console.print(_("[green]the call under way has its answer: {answer}[/]").format(answer=answer))
    try:
        await hub.call("git", "git_status", {"repo_path": str(project)})
    except ServerError as error:
        console.print(f"[red]ServerError: {escape(str(error))}[/]")


def demo_in_process() -> None:
    """In this process, for tests

    An `MCPServer` in place of a configuration runs right here: no child, no socket, ready at once.
    That is enough to test tools, and a workflow that calls them. It cannot show a missing program,
    a death, a server that does not answer, or a value that is not JSON.
    """

    async def main() -> None:
        async with connect({"notes": notes_server(":memory:")}) as hub:
            await hub.call("notes", "add", {"text": "kept in memory"})
            found = text_of(await hub.call("notes", "search", {"words": "memory"}))
            ms = 1000 * hub.statuses["notes"].startup
            text = _("ready after {ms:.1f} ms; children: {pids}; found: {found}")
            console.print(text.format(ms=ms, pids=census(), found=found))

    asyncio.run(main())


DEMOS = [demo for name, demo in list(globals().items()) if name.startswith("demo_")]


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    demo = DEMOS[number - 1]
    title, lesson = _(inspect.getdoc(demo) or "").split("\n", 1)
    console.rule(f"[bold]{number} · {title}", align="left")
    console.print(Markdown(lesson), "")
    demo()
    console.print()


def show_key_points() -> None:
    points = _("""\
* A client must be left in the task that entered it: give each server one **owner task**.
* Start together, end together: one context manager around them all leaves no child behind.
* Name the server in every error, and give every wait a deadline.
* Required or optional, restarted or not: say it in the configuration, not in the code.
* A call that failed may have done its work. Repeat it only if you know that this is harmless.""")
    console.rule(_("[bold]Key points"), align="left")
    console.print(Markdown(points))


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage above it


def serve(arguments: list[str]) -> int:
    """Be the MCP server that the command line names; returns the exit status."""
    parser = CommandLine(prog=f"{Path(__file__).name} serve")
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
            console.print(f"[bold]{escape(name)}[/]", ", ".join(tool.name for tool in tools))


@contextmanager
def polite_ends_as_ctrl_c() -> Iterator[None]:
    """Clean up on SIGTERM and when the terminal is closed, too: by default both just end Python."""
    polite = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in polite}
    try:
        for each in polite:
            signal.signal(each, lambda *_arguments: signal.raise_signal(signal.SIGINT))
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        return serve(sys.argv[2:])
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=__doc__, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help="play only these, by number")
    parser.add_argument("--config", metavar="FILE", help="start the servers of FILE instead")
    options = parser.parse_args()
    chosen = options.demo or range(1, len(DEMOS) + 1)
    for number in chosen:
        if not 1 <= number <= len(DEMOS):
            parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
    if not options.config and not shutil.which("git"):
        parser.error("there is no git: install it, since the demos make a repository to work on")
    stderr_log = logging.getLogger("mcp_hub")
    stderr_log.setLevel(logging.INFO)
    stderr_log.propagate = False
    stderr_log.handlers = [BesideItsName()]
    try:
        with polite_ends_as_ctrl_c():
            if options.config:
                asyncio.run(show_config(options.config))
                return 0
            for number in chosen:
                play(number)
            show_key_points()
    except (ConfigError, ServerError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        console.print(_("Interrupted. Children left: {pids}").format(pids=census()))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
