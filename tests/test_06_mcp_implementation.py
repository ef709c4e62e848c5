"""Chapter 06, the page: it runs as it stands, and what its tables say is so.

The fences hold most of the page's claims. The tests below hold those of the prose and the tables
that no fence shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import anyio
import pytest
from conftest import ROOT, load_chapter
from fences import find_fences, run_chapter
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import session, stdio
from mcp.server import MCPServer
from mcp.shared import _httpx_utils

PAGE = ROOT / "06_mcp_implementation.md"
MUTE = StdioServerParameters(command=sys.executable, args=["-c", "import sys; sys.stdin.read()"])


def source_on_the_page(name: str) -> str:
    (source,) = (fence.source for fence in find_fences(PAGE) if fence.file == name)
    return source


def file_of_the_page(name: str) -> dict[str, Any]:
    """What a file that the page tells its reader to save defines."""
    namespace: dict[str, Any] = {}
    exec(source_on_the_page(name), namespace)
    return namespace


def test_every_fence_of_the_chapter_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    played = run_chapter(PAGE, tmp_path)
    assert played.run == len(played.fences) >= 30
    assert played.skipped == 0


def test_no_fence_is_longer_than_a_screen() -> None:
    assert [f.place for f in find_fences(PAGE) if len(f.source.splitlines()) > 35] == []


def test_the_chapter_installs_what_the_project_requires() -> None:
    (command,) = re.findall(r"pip install (.+)", PAGE.read_text(encoding="utf-8"))
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in required.splitlines()]
    assert shlex.split(command) == [line for line in lines if re.match("mcp|websockets", line)]


def test_the_limits_that_the_page_names_are_those_of_the_sdk() -> None:
    assert session.DISCOVER_TIMEOUT_SECONDS == 10.0
    assert stdio.PROCESS_TERMINATION_TIMEOUT == stdio.FORCE_KILL_TIMEOUT == 2.0
    assert _httpx_utils.MCP_DEFAULT_SSE_READ_TIMEOUT == 300.0


@pytest.mark.asyncio
async def test_a_client_is_entered_once() -> None:
    client = Client(MCPServer("once"))
    async with client:
        pass
    with pytest.raises(RuntimeError, match="cannot reenter"):
        await client.__aenter__()


@pytest.mark.asyncio
async def test_two_stacks_closed_in_the_order_of_opening_fail() -> None:
    first, second = contextlib.AsyncExitStack(), contextlib.AsyncExitStack()
    await first.enter_async_context(Client(MCPServer("first")))
    await second.enter_async_context(Client(MCPServer("second")))
    with pytest.raises(RuntimeError, match="isn't the current"):
        await first.aclose()
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):
        await second.aclose()


@pytest.mark.asyncio
async def test_a_tool_that_is_a_plain_function_runs_in_a_worker_thread() -> None:
    server = MCPServer("threads")

    @server.tool()
    def plain() -> bool:
        import threading

        return threading.current_thread() is threading.main_thread()

    @server.tool()
    async def coroutine() -> bool:
        import threading

        return threading.current_thread() is threading.main_thread()

    async with Client(server) as client:
        plain_in_main = (await client.call_tool("plain")).structured_content
        coroutine_in_main = (await client.call_tool("coroutine")).structured_content
    assert (plain_in_main, coroutine_in_main) == ({"result": False}, {"result": True})


@pytest.mark.asyncio
async def test_a_call_that_times_out_is_cancelled_in_the_server() -> None:
    server, cancelled = MCPServer("slow"), anyio.Event()

    @server.tool()
    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        except BaseException:
            cancelled.set()
            raise

    async with Client(server, read_timeout_seconds=0.05) as client:
        with pytest.raises(MCPError, match="Timed out"):
            await client.call_tool("wait")
        with anyio.fail_after(5):
            await cancelled.wait()


class Servers:
    """In-process servers that count how many of their lifespans are open."""

    def __init__(self) -> None:
        self.open = 0
        self.opened = 0

    def new(self, name: str) -> MCPServer[None]:
        @asynccontextmanager
        async def lifespan(server: MCPServer[None]) -> AsyncIterator[None]:
            self.open += 1
            self.opened += 1
            try:
                yield
            finally:
                self.open -= 1

        return MCPServer(name, lifespan=lifespan)


def test_a_fleet_cancelled_at_any_await_closes_every_client_that_it_opened() -> None:
    fleet = file_of_the_page("fleet.py")["fleet"]
    servers = Servers()

    async def use() -> None:
        async with fleet({name: servers.new(name) for name in "abc"}) as clients:
            await clients["b"].list_tools()

    async def cancelled_after(ticks: int) -> bool:
        task = asyncio.create_task(use())
        for _tick in range(ticks):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert servers.open == 0, f"cancelled after {ticks} turns of the loop"
        return finished

    assert any(asyncio.run(cancelled_after(ticks)) for ticks in range(1000))
    assert servers.opened > 3


@pytest.mark.asyncio
async def test_a_fleet_limits_the_start_of_a_client_and_not_its_life() -> None:
    fleet = file_of_the_page("fleet.py")["fleet"]
    async with fleet({"a": Servers().new("a")}, startup_timeout=0.2) as clients:
        await anyio.sleep(0.3)  # longer than the limit
        assert (await clients["a"].list_tools()).tools == []


@pytest.mark.asyncio
async def test_a_fleet_of_none_is_ready_at_once() -> None:
    async with file_of_the_page("fleet.py")["fleet"]({}) as clients:
        assert clients == {}


def program(code: str) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=["-c", code])


def innermost(error: BaseException) -> list[BaseException]:
    """What is in groups, and in groups within groups."""
    if isinstance(error, BaseExceptionGroup):
        return [one for inner in error.exceptions for one in innermost(inner)]
    return [error]


def noted(error: BaseException) -> bool:
    """The error, or a group around it, says which server it was."""
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return "MCP server 'bad'" in getattr(error, "__notes__", ()) or any(map(noted, inner))


BAD_STARTS = {
    "missing": (StdioServerParameters(command="no-such-program"), FileNotFoundError),
    "no program": (StdioServerParameters(command=os.devnull), PermissionError),
    "ends at once": (program("raise SystemExit"), MCPError),
    "does not answer": (MUTE, TimeoutError),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("what", BAD_STARTS)
async def test_the_table_says_what_comes_out_when_a_server_does_not_start(what: str) -> None:
    fleet, servers = file_of_the_page("fleet.py")["fleet"], Servers()
    target, expected = BAD_STARTS[what]
    with pytest.raises(ExceptionGroup) as raised:
        async with fleet({"good": servers.new("good"), "bad": target}, startup_timeout=0.5):
            raise AssertionError("it started")
    assert [type(error) for error in innermost(raised.value)] == [expected]
    assert noted(raised.value)
    assert servers.open == 0


@pytest.mark.asyncio
async def test_an_error_in_the_block_comes_out_of_the_fleet_in_a_group() -> None:
    fleet = file_of_the_page("fleet.py")["fleet"]
    with pytest.raises(ExceptionGroup) as raised:
        async with fleet({"a": Servers().new("a")}):
            raise ValueError("mine")
    assert [type(error) for error in raised.value.exceptions] == [ValueError]


# It prints something before each answer.
TALKS = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if "id" in request:
        none = {"tools": [], "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
        print(SAID, end=END)
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": none}), flush=True)
"""


@pytest.mark.asyncio
async def test_a_line_on_stdout_is_skipped_but_half_a_line_swallows_the_answer() -> None:
    async def ask(end: str, limit: float | None) -> None:
        code = TALKS.replace("SAID", "'working'").replace("END", repr(end))
        options: dict[str, Any] = {"mode": "2026-07-28", "read_timeout_seconds": limit}
        async with Client(program(code), **options) as client:
            assert (await client.list_tools()).tools == []

    await ask("\n", limit=None)
    with pytest.raises(ExceptionGroup) as raised:
        await ask("", limit=0.3)
    (error,) = innermost(raised.value)
    assert isinstance(error, MCPError)
    assert error.code == -32001


SIGNALLED = """
import asyncio, os, signal, sys
from fleet import fleet
from mcp import StdioServerParameters
from mcp.client import stdio

stdio.PROCESS_TERMINATION_TIMEOUT = 0.1
DEAF = "import os, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"


async def main():
    deaf = StdioServerParameters(command=sys.executable, args=["-c", "import sys; " + DEAF])
    async with fleet({"deaf": deaf}, mode="2026-07-28"):
        print("open", flush=True)
        await asyncio.sleep(60)

if "polite" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
asyncio.run(main())
"""


def test_sigterm_leaves_a_deaf_server_behind_unless_it_is_made_the_same_as_ctrl_c(
    tmp_path: Path,
) -> None:
    (tmp_path / "fleet.py").write_text(source_on_the_page("fleet.py"), encoding="utf-8")
    assert "signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))" in (
        PAGE.read_text(encoding="utf-8")
    )

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SIGNALLED, *arguments]
        return subprocess.Popen(command, stdout=PIPE, stderr=PIPE, cwd=tmp_path)

    with start() as rude, start("polite") as polite:
        deaf = []
        for client in (rude, polite):
            assert client.stdout is not None
            assert client.stderr is not None
            assert client.stdout.readline() == b"open\n"
            deaf.append(int(client.stderr.readline()))
            client.terminate()
        rude.wait()
        os.kill(deaf[0], signal.SIGKILL)  # it is there, so this does not raise
        assert polite.wait() == -signal.SIGINT
        with pytest.raises(ProcessLookupError):
            os.kill(deaf[1], 0)


@pytest.mark.asyncio
async def test_a_server_that_was_stopped_is_noticed_by_a_timeout_alone(tmp_path: Path) -> None:
    (tmp_path / "shelf.py").write_text(source_on_the_page("shelf.py"), encoding="utf-8")
    shelf = StdioServerParameters(command=sys.executable, args=["shelf.py"], cwd=tmp_path)
    pid = 0

    async def stop(progress: float, total: float | None, message: str | None) -> None:
        nonlocal pid
        pid = int(message or 0)
        os.kill(pid, signal.SIGSTOP)

    async with Client(shelf) as client:
        with pytest.raises(MCPError, match="timed out"):
            await client.call_tool("wait", read_timeout_seconds=1, progress_callback=stop)
        os.kill(pid, signal.SIGCONT)
        assert (await client.call_tool("add", {"title": "Emma"})).structured_content


LIFESPAN = """
import sys
from contextlib import asynccontextmanager
from mcp.server import MCPServer

@asynccontextmanager
async def lifespan(server):
    print("printed", flush=True)
    print("opened", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("closed", file=sys.stderr, flush=True)

server = MCPServer("tells", lifespan=lifespan, log_level="CRITICAL")
server.run("streamable-http", port=0) if "http" in sys.argv else server.run()
"""


def test_a_lifespan_is_closed_by_the_end_of_input_but_over_stdio_not_by_sigterm() -> None:
    """Over HTTP, uvicorn makes an orderly shutdown of SIGTERM. Over stdio, prints go to stderr."""
    command = [sys.executable, "-c", LIFESPAN]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *arguments], stdin=PIPE, stdout=PIPE, stderr=PIPE)

    with start() as ends, start() as terminated, start("http") as service:
        servers = (ends, terminated, service)
        before = [
            b"".join(iter(server.stderr.readline, b"opened\n"))
            for server in servers
            if server.stderr
        ]
        assert ends.stdin is not None
        ends.stdin.close()
        terminated.terminate()
        service.terminate()
        said = [server.stderr.read() for server in servers if server.stderr]
        printed = [server.stdout.read() for server in servers if server.stdout]
    assert [b"closed" in text for text in said] == [True, False, True]
    assert before == [b"printed\n", b"printed\n", b""]
    assert printed == [b"", b"", b"printed\n"]


@contextmanager
def span(name: str, database: str = ":memory:") -> Iterator[Any]:
    """The rule of llamabot's span in 0.19: no parent, and the exit writes to a database."""
    try:
        yield load_chapter(4).Session(name)
    finally:
        sqlite3.connect(database).close()


def test_the_rules_of_llamabot_lose_what_chapter_04_keeps() -> None:
    chapter = load_chapter(4)

    def current_after_a_nested_block(opened: Any, current: Any) -> Any:
        with opened("outer"), contextlib.ExitStack() as stack:
            stack.enter_context(opened("inner"))
            stack.close()
            return current() and current().name

    def late_call(opened: Any, current: Any) -> int:
        with opened("block") as session:
            task = contextvars.copy_context()
        task.run(lambda: current().record(chapter.Call("late")))
        return len(session.calls)

    theirs = (chapter.recording, chapter.recorder.get)
    ours = (chapter.smart_session, chapter.current_session)
    apart = contextvars.copy_context()
    assert apart.run(current_after_a_nested_block, *theirs) is None
    assert current_after_a_nested_block(*ours) == "outer"
    assert apart.run(late_call, *theirs) == 1
    with pytest.raises(chapter.SessionClosedError):
        late_call(*ours)
    with span("outer"), span("inner") as inner:
        assert inner.parent is None
    with chapter.smart_session("outer") as outer, chapter.smart_session("inner") as inner:
        assert inner.parent is outer
    with pytest.raises(sqlite3.OperationalError), span("lost", "no such folder/spans.db"):
        raise ValueError("the block's own")
