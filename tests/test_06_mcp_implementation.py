"""Chapter 06, the page: it runs as it stands, and what its tables say is so.

The fences hold most of the page's claims; these tests hold what only prose and tables say.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import select
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
from mcp import Client, ClientSessionGroup, MCPError, StdioServerParameters
from mcp.client import session, stdio
from mcp.server import MCPServer
from mcp.server.caching import CacheHint
from mcp.shared import _httpx_utils
from waiting import wait_all_tasks_blocked

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


def test_every_fence_of_the_chapter_runs_and_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "PROCESS_TERMINATION_TIMEOUT", 1.2)  # more than the page's own 1 s
    played = run_chapter(PAGE, tmp_path)
    assert (played.run, played.skipped) == (len(played.fences), 0)
    assert played.run >= 25


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


@pytest.fixture
def repository(tmp_path: Path) -> str:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    return str(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["git", "time"])
async def test_the_official_servers_refuse_an_unknown_tool_by_an_error(
    name: str, repository: str
) -> None:
    official = importlib.import_module(f"mcp_server_{name}.server")
    async with Client(official.create_server(None)) as client:
        with pytest.raises(MCPError, match="Unknown tool") as raised:
            await client.call_tool("no_such_tool")
        tool = (await client.list_tools()).tools[0].name
        result = await client.call_tool(tool, {"timezone": "UTC", "repo_path": repository})
    assert raised.value.code == -32602
    assert not result.is_error
    assert (result.structured_content is None) == (name == "git")


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

    async with Client(server, read_timeout_seconds=30) as client:
        assert (await client.call_tool("plain")).structured_content == {"result": False}
        assert len((await client.list_tools()).tools) == 1
        server.add_tool(wait)
        assert len((await client.list_tools()).tools) == 1  # from the client's cache
        assert len((await client.list_tools(cache_mode="bypass")).tools) == 2
        with pytest.raises(MCPError, match="Timed out"):
            await client.call_tool("wait", read_timeout_seconds=0.05)
        with anyio.fail_after(30):
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
async def test_a_fleet_limits_the_start_of_a_client_and_not_its_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    now = loop.time
    async with fleet({"a": MCPServer("a")}) as clients, fleet({}) as none:
        monkeypatch.setattr(loop, "time", lambda: now() + 3600)  # every limit has passed
        await wait_all_tasks_blocked()
        assert (await clients["a"].list_tools()).tools == []
    assert none == {}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (StdioServerParameters(command=os.devnull), PermissionError),
        (python("-c", ""), MCPError),
    ],
    ids=["not executable", "ends at once"],
)
async def test_the_table_says_what_comes_out_when_a_server_does_not_start(
    bad: StdioServerParameters, expected: type[Exception]
) -> None:
    """A missing program, and one that does not answer, are in the page's own blocks."""
    events: list[str] = []
    with pytest.raises(ExceptionGroup) as raised:
        async with fleet({"good": recorded("good", events), "bad": bad}):
            raise AssertionError("it started")
    (error,) = raised.value.exceptions
    assert error.__notes__ == ["MCP server 'bad' did not start"]
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert type(error) is expected
    assert events.count("open") == events.count("close")


TALKS = """
import json, sys
result = {
    "resultType": "complete", "ttlMs": 0, "cacheScope": "private",
    "protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "", "version": ""},
    "tools": [{"name": "get", "inputSchema": {"type": "object"}}], "prompts": [], "resources": [],
}
for line in sys.stdin:
    request = json.loads(line)
    if "id" in request:
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
        limit = None if answers else 0.3
        with nullcontext() if answers else pytest.raises(ExceptionGroup):
            async with Client(server, mode="2026-07-28", read_timeout_seconds=limit) as client:
                assert len((await client.list_tools()).tools) == 1

    await ask(said == b"a line\n")
    await ask(said != b"half a line", encoding_error_handler="replace")


def test_the_sdks_group_refuses_equal_names_and_breaks_under_gather() -> None:
    server = python("-c", TALKS, "b''")

    async def main() -> None:
        async with ClientSessionGroup() as group:
            await asyncio.gather(group.connect_to_server(server))
            with pytest.raises(MCPError, match=r"get.* already exist in group tools"):
                await group.connect_to_server(server)

    with pytest.raises(RuntimeError, match="exit cancel scope in a different task"):
        asyncio.run(main())


# Each line of its input names a way, which it plays in a child of its own: so it imports mcp once.
PROGRAM = """
import asyncio, os, signal, sys
from fleet import fleet
from mcp import Client, StdioServerParameters
from mcp.client import stdio
from on_signals import cancel_on_signals

stdio.PROCESS_TERMINATION_TIMEOUT = 0.2
DEAF = '''
import os, sys, time
print("deaf", os.getpid(), os.getppid(), file=sys.stderr, flush=True)
time.sleep(60)
'''


async def main(way):
    deaf = StdioServerParameters(command=sys.executable, args=["-c", DEAF])
    if way == "forgets":
        await Client(deaf, mode="2026-07-28").__aenter__()
        print("raising", flush=True)
        raise ValueError("you will never see me")
    if way == "cancels":
        cancel_on_signals()
    async with fleet({"deaf": deaf}, mode="2026-07-28"):
        await asyncio.sleep(60)


signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job that ends in &
for line in sys.stdin:
    if not (child := os.fork()):
        sys.exit(asyncio.run(main(line.strip())))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_only_a_program_that_cancels_on_signals_ends_its_deaf_server(tmp_path: Path) -> None:
    """A forgotten client even keeps it from ending after an exception, without a word."""
    for name in ("fleet.py", "on_signals.py"):
        (tmp_path / name).write_text(page_file(name), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=tmp_path, text=True
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        lines = iter(parent.stderr or ())

        def play(way: str) -> tuple[int, int]:
            """Let a program go this way until its server runs; return the ids of both."""
            print(way, file=parent.stdin, flush=True)
            server, program = next(line for line in lines if line.startswith("deaf ")).split()[1:]
            return int(server), int(program)

        for way, signals, status in (("cancels", 1, 1), ("cancels", 2, 1), ("dies", 1, -15)):
            server, program = play(way)
            for _ in range(signals):
                os.kill(program, signal.SIGTERM)
            assert parent.stdout.readline() == f"{status}\n"
            with pytest.raises(ProcessLookupError) if way == "cancels" else nullcontext():
                os.kill(server, signal.SIGKILL)

        server, program = play("forgets")
        assert parent.stdout.readline() == "raising\n"
        assert select.select([parent.stdout], [], [], 0.5)[0] == []  # it does not end
        os.kill(program, signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        parent.stdin.close()
        assert "ValueError" not in "".join(lines)
