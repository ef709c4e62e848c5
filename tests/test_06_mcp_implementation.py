"""Chapter 06, the page: it runs as it stands, and what its tables say is so.

The fences hold most of the page's claims. The tests below hold those of the prose and the tables
that no fence shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest
from conftest import ROOT
from fences import find_fences, run_chapter
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import session, stdio
from mcp.server import MCPServer
from mcp.shared import _httpx_utils

PAGE = ROOT / "06_mcp_implementation.md"
MUTE = StdioServerParameters(command=sys.executable, args=["-c", "import sys; sys.stdin.read()"])


def test_every_fence_of_the_chapter_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    played = run_chapter(PAGE, tmp_path)
    assert played.run == len(played.fences) >= 30
    assert played.skipped == 0


def test_no_fence_is_longer_than_a_screen() -> None:
    assert [f.place for f in find_fences(PAGE) if len(f.source.splitlines()) > 40] == []


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


@pytest.mark.asyncio
async def test_a_server_that_was_stopped_is_noticed_by_a_timeout_alone(tmp_path: Path) -> None:
    (shelf,) = (fence.source for fence in find_fences(PAGE) if fence.file == "shelf.py")
    (tmp_path / "shelf.py").write_text(shelf, encoding="utf-8")
    program = StdioServerParameters(command=sys.executable, args=["shelf.py"], cwd=tmp_path)
    pid = 0

    async def stop(progress: float, total: float | None, message: str | None) -> None:
        nonlocal pid
        pid = int(message or 0)
        os.kill(pid, signal.SIGSTOP)

    async with Client(program) as client:
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
    print("opened", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("closed", file=sys.stderr, flush=True)

server = MCPServer("tells", lifespan=lifespan, log_level="CRITICAL")
server.run("streamable-http", port=0) if "http" in sys.argv else server.run()
"""


def test_a_lifespan_is_closed_by_the_end_of_input_but_over_stdio_not_by_sigterm() -> None:
    """Over HTTP, uvicorn makes an orderly shutdown of SIGTERM."""
    command = [sys.executable, "-c", LIFESPAN]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *arguments], stdin=PIPE, stderr=PIPE)

    with start() as ends, start() as terminated, start("http") as service:
        servers = (ends, terminated, service)
        assert [server.stderr.readline() for server in servers if server.stderr] == [
            b"opened\n"
        ] * 3
        assert ends.stdin is not None
        ends.stdin.close()
        terminated.terminate()
        service.terminate()
        said = [b"closed" in server.stderr.read() for server in servers if server.stderr]
    assert said == [True, False, True]
