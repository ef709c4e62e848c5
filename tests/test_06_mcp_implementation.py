"""Chapter 06, the page: it runs as it stands, and what its tables say is so.

The fences hold most of the page's claims; these tests hold what only prose and tables say.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from subprocess import PIPE
from typing import Any

import anyio
import httpx2
import pytest
from conftest import ROOT
from fences import find_fences, run_chapter
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import session, stdio
from mcp.server import MCPServer
from mcp.server.caching import CacheHint
from mcp.shared import _httpx_utils

PAGE = ROOT / "06_mcp_implementation.md"


def page_file(name: str) -> str:
    (source,) = (fence.source for fence in find_fences(PAGE) if fence.file == name)
    return source


def fleet(*arguments: Any, **options: Any) -> Any:
    """The page's own fleet."""
    namespace: dict[str, Any] = {}
    exec(page_file("fleet.py"), namespace)
    return namespace["fleet"](*arguments, **options)


def python(*arguments: str, **options: Any) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=list(arguments), **options)


def test_every_fence_of_the_chapter_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    played = run_chapter(PAGE, tmp_path)
    assert played.run == len(played.fences) >= 25
    assert played.skipped == 0
    assert [f.place for f in played.fences if len(f.source.splitlines()) > 40] == []


def test_the_chapter_installs_what_the_project_requires() -> None:
    (command,) = re.findall(r"pip install (.+)", PAGE.read_text(encoding="utf-8"))
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in required.splitlines()]
    assert shlex.split(command) == [line for line in lines if re.match("mcp|websockets", line)]


def test_the_limits_and_variables_that_the_page_names_are_those_of_the_sdk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEY", "sk-...")
    assert {"PATH"} <= stdio.get_default_environment().keys() <= os.environ.keys() - {"API_KEY"}
    assert session.DISCOVER_TIMEOUT_SECONDS == 10.0
    assert stdio.PROCESS_TERMINATION_TIMEOUT == stdio.FORCE_KILL_TIMEOUT == 2.0
    assert _httpx_utils.MCP_DEFAULT_SSE_READ_TIMEOUT == 300.0
    assert httpx2.AsyncClient().timeout.read == 5.0


@pytest.mark.asyncio
async def test_a_client_is_entered_once_and_a_pinned_one_knows_no_server() -> None:
    client = Client(MCPServer("once"), mode="2026-07-28")
    async with client:
        assert (client.server_info, client.server_capabilities.tools) == (None, None)
    with pytest.raises(RuntimeError, match="cannot reenter"):
        await client.__aenter__()


@pytest.mark.asyncio
@pytest.mark.parametrize("module", ["mcp_server_git", "mcp_server_time"])
async def test_the_official_servers_refuse_an_unknown_tool_by_an_error(module: str) -> None:
    async with Client(python("-m", module)) as client:
        with pytest.raises(MCPError, match="Unknown tool") as raised:
            await client.call_tool("no_such_tool")
        tool = (await client.list_tools()).tools[0].name
        result = await client.call_tool(tool, {"timezone": "UTC", "repo_path": str(ROOT)})
    assert raised.value.code == -32602
    assert (result.structured_content is None) == (module == "mcp_server_git")


@pytest.mark.asyncio
async def test_plain_tools_run_on_threads_late_ones_are_cancelled_lists_are_cached() -> None:
    server = MCPServer("tools", cache_hints={"tools/list": CacheHint(ttl_ms=60_000)})
    cancelled = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    @server.tool()
    def plain() -> bool:
        return threading.current_thread() is threading.main_thread()

    async with Client(server, read_timeout_seconds=5) as client:
        assert (await client.call_tool("plain")).structured_content == {"result": False}
        assert len((await client.list_tools()).tools) == 1
        server.add_tool(wait)
        assert len((await client.list_tools()).tools) == 1  # from the client's cache
        assert len((await client.list_tools(cache_mode="bypass")).tools) == 2
        with pytest.raises(MCPError, match="Timed out"):
            await client.call_tool("wait", read_timeout_seconds=0.05)
        with anyio.fail_after(5):
            await cancelled.wait()


def recorded(name: str, events: list[str]) -> MCPServer[None]:
    @asynccontextmanager
    async def lifespan(server: MCPServer[None]) -> AsyncIterator[None]:
        events.append("open")
        try:
            yield
        finally:
            events.append("close")

    return MCPServer(name, lifespan=lifespan)


def test_a_fleet_cancelled_at_any_await_closes_every_client_that_it_opened() -> None:
    events: list[str] = []

    async def use() -> None:
        async with fleet({name: recorded(name, events) for name in "abc"}) as clients:
            await clients["b"].list_tools()

    async def cancelled_after(ticks: int) -> bool:
        task = asyncio.create_task(use())
        for _tick in range(ticks):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert events.count("open") == events.count("close"), f"cancelled after {ticks} turns"
        return finished

    assert any(asyncio.run(cancelled_after(ticks)) for ticks in range(1000))
    assert events.count("open") > 3


@pytest.mark.asyncio
async def test_a_fleet_limits_the_start_of_a_client_and_not_its_life() -> None:
    async with fleet({"a": MCPServer("a")}, startup_timeout=0.2) as clients, fleet({}) as none:
        await anyio.sleep(0.3)  # longer than the limit
        assert (await clients["a"].list_tools()).tools == []
    assert none == {}


BAD_STARTS = {
    "missing": (StdioServerParameters(command="no-such-program"), FileNotFoundError),
    "no program": (StdioServerParameters(command=os.devnull), PermissionError),
    "ends at once": (python("-c", ""), MCPError),
    "does not answer": (python("-c", "import sys; sys.stdin.read()"), TimeoutError),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("what", BAD_STARTS)
async def test_the_table_says_what_comes_out_when_a_server_does_not_start(what: str) -> None:
    events: list[str] = []
    target, expected = BAD_STARTS[what]
    limit = 0.5 if expected is TimeoutError else 10
    with pytest.raises(ExceptionGroup) as raised:
        async with fleet({"good": recorded("good", events), "bad": target}, startup_timeout=limit):
            raise AssertionError("it started")
    (error,) = raised.value.exceptions
    assert error.__notes__ == ["MCP server 'bad' did not start"]
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert type(error) is expected
    assert events.count("open") == events.count("close")


TALKS = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    result = {"tools": [], "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    sys.stdout.buffer.write(eval(sys.argv[1]))
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""


@pytest.mark.asyncio
@pytest.mark.parametrize("said", [b"a line\n", b"half a line", b"\xff\n"])
async def test_a_line_on_stdout_is_skipped_but_half_a_line_or_a_bad_byte_is_not(
    said: bytes,
) -> None:
    async def ask(answers: bool, **options: Any) -> None:
        server = python("-c", TALKS, repr(said), **options)
        limit = None if answers else 0.5
        with nullcontext() if answers else pytest.raises(ExceptionGroup):
            async with Client(server, mode="2026-07-28", read_timeout_seconds=limit) as client:
                assert (await client.list_tools()).tools == []

    await ask(said == b"a line\n")
    await ask(said != b"half a line", encoding_error_handler="replace")


PROGRAM = """
import asyncio, signal, sys
from fleet import fleet
from mcp import Client, StdioServerParameters
from mcp.client import stdio
from on_signals import cancel_on_signals

stdio.PROCESS_TERMINATION_TIMEOUT = 0.2
DEAF = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"


async def main():
    deaf = StdioServerParameters(command=sys.executable, args=["-c", DEAF])
    if "forgets" in sys.argv:
        await Client(deaf, mode="2026-07-28").__aenter__()
        print("raising", flush=True)
        raise ValueError("you will never see me")
    if "cancels" in sys.argv:
        cancel_on_signals()
    async with fleet({"deaf": deaf}, mode="2026-07-28"):
        await asyncio.sleep(60)


signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job that ends in &
asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["dies", "cancels", "cancels twice", "forgets"])
def test_only_a_program_that_cancels_on_signals_ends_its_deaf_server(
    way: str, tmp_path: Path
) -> None:
    """A forgotten client even keeps it from ending after an exception, without a word."""
    for name in ("fleet.py", "on_signals.py"):
        (tmp_path / name).write_text(page_file(name), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, *way.split()]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, cwd=tmp_path) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        deaf = int(client.stderr.readline())
        if way != "forgets":
            for _ in range(1 + ("twice" in way)):
                client.terminate()
            client.wait()
            assert client.returncode == (-signal.SIGTERM if way == "dies" else 1)
        else:
            assert client.stdout.readline() == b"raising\n"
            with pytest.raises(subprocess.TimeoutExpired):
                client.wait(timeout=0.5)
            client.kill()
        if "cancels" in way:
            with pytest.raises(ProcessLookupError):
                os.kill(deaf, 0)
        else:
            os.kill(deaf, signal.SIGKILL)  # it is there, so this does not raise
            assert b"ValueError" not in client.stderr.read()


GROUP = """
import asyncio, sys
from mcp import ClientSessionGroup, MCPError, StdioServerParameters
async def main():
    time = StdioServerParameters(command=sys.executable, args=["-m", "mcp_server_time"])
    async with ClientSessionGroup() as group:
        await asyncio.gather(group.connect_to_server(time))
        try:
            await group.connect_to_server(time)
        except MCPError as error:
            print(error)
asyncio.run(main())
"""


def test_the_sdks_group_refuses_equal_names_and_breaks_under_gather() -> None:
    command = [sys.executable, "-c", GROUP]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert re.search("get_current_time.* already exist in group tools", ended.stdout)
    assert "Attempted to exit cancel scope in a different task" in ended.stderr
