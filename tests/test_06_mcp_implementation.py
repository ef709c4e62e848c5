"""Chapter 06, the page: it runs as it stands, and what only its prose and tables say is so."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import select
import shlex
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from subprocess import PIPE, Popen
from typing import Any

import anyio
import httpx2
import pytest
from conftest import ROOT
from fences import find_fences, run_chapter
from git import Repo
from mcp import Client, ClientSessionGroup, MCPError, StdioServerParameters
from mcp.client import session, stdio
from mcp.server import MCPServer
from mcp.shared import _httpx_utils
from waiting import wait_all_tasks_blocked

PAGE = ROOT / "06_mcp_implementation.md"
FILES = {fence.file: fence.source for fence in find_fences(PAGE)}
Patch = pytest.MonkeyPatch


def fleet(*arguments: Any, **options: Any) -> Any:
    namespace: dict[str, Any] = {}
    exec(FILES["fleet.py"], namespace)
    return namespace["fleet"](*arguments, **options)


def test_every_fence_runs_and_prints_what_the_page_says(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(stdio, "PROCESS_TERMINATION_TIMEOUT", 1.2)  # more than the page's own 1 s
    played = run_chapter(PAGE, tmp_path)
    assert played.run == len(played.fences) >= 25


def test_the_chapter_installs_what_the_project_requires() -> None:
    (command,) = re.findall(r"pip install (.+)", PAGE.read_text(encoding="utf-8"))
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert shlex.split(command) == re.findall(r"(?m)^(?:mcp|websockets)[^#\s]*", required)


def test_the_limits_and_variables_are_those_of_the_sdk(monkeypatch: Patch) -> None:
    monkeypatch.setenv("API_KEY", "sk-...")
    assert {"PATH"} <= stdio.get_default_environment().keys() <= os.environ.keys() - {"API_KEY"}
    assert session.DISCOVER_TIMEOUT_SECONDS == 10.0
    assert stdio.PROCESS_TERMINATION_TIMEOUT == stdio.FORCE_KILL_TIMEOUT == 2.0
    assert _httpx_utils.MCP_DEFAULT_SSE_READ_TIMEOUT == 300.0
    assert httpx2.AsyncClient().timeout.read == 5.0


@pytest.mark.asyncio
async def test_a_client_is_entered_once_and_a_pinned_one_asks_nothing() -> None:
    async with Client(MCPServer("once"), mode="2026-07-28") as client:
        assert (client.server_info, client.server_capabilities.tools) == (None, None)
    with pytest.raises(RuntimeError, match="cannot reenter"):
        await client.__aenter__()


@pytest.mark.asyncio
@pytest.mark.parametrize(("name", "tool"), [("git", "git_status"), ("time", "get_current_time")])
async def test_official_servers_refuse_unknown_tools(name: str, tool: str, tmp_path: Path) -> None:
    Repo.init(tmp_path)
    server = importlib.import_module(f"mcp_server_{name}.server").create_server(None)
    async with Client(server) as client:
        with pytest.raises(MCPError, match="Unknown tool") as raised:
            await client.call_tool("no_such_tool")
        result = await client.call_tool(tool, {"timezone": "UTC", "repo_path": str(tmp_path)})
    assert raised.value.code == -32602
    assert (result.is_error, result.structured_content is None) == (False, name == "git")


@pytest.mark.asyncio
async def test_plain_tools_run_on_threads_and_late_ones_are_cancelled() -> None:
    server, cancelled = MCPServer("tools"), asyncio.Event()

    @server.tool()
    def plain() -> bool:
        return threading.current_thread() is threading.main_thread()

    @server.tool()
    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with Client(server) as client:
        assert (await client.call_tool("plain")).structured_content == {"result": False}
        with pytest.raises(MCPError, match="Timed out"):
            await client.call_tool("wait", read_timeout_seconds=0.05)
        await asyncio.wait_for(cancelled.wait(), 30)


def test_a_fleet_cancelled_at_any_await_leaves_no_task() -> None:
    async def use() -> None:
        async with fleet({name: MCPServer(name) for name in "abc"}) as clients:
            await clients["b"].list_tools()

    async def cancelled_after(ticks: int) -> bool:
        task = asyncio.create_task(use())
        for _tick in range(ticks):
            await asyncio.sleep(0)
        finished = not task.cancel()
        await asyncio.wait({task})
        assert asyncio.all_tasks() == {asyncio.current_task()}, f"cancelled after {ticks} turns"
        return finished

    assert any(asyncio.run(cancelled_after(ticks)) for ticks in range(1000))


@pytest.mark.asyncio
async def test_a_fleet_limits_the_start_of_a_client_and_not_its_life(monkeypatch: Patch) -> None:
    loop = asyncio.get_running_loop()
    now = loop.time
    async with fleet({"a": MCPServer("a")}) as clients, fleet({}) as none:
        monkeypatch.setattr(loop, "time", lambda: now() + 3600)  # every limit has passed
        await wait_all_tasks_blocked()
        assert (await clients["a"].list_tools()).tools == []
    assert none == {}


@pytest.mark.asyncio
@pytest.mark.parametrize(("command", "error"), [(os.devnull, PermissionError), ("true", MCPError)])
async def test_a_failed_start_is_an_error_in_a_group(command: str, error: type[Exception]) -> None:
    servers = {"good": MCPServer("good"), "bad": StdioServerParameters(command=command)}
    with pytest.RaisesGroup(error, flatten_subgroups=True):
        async with fleet(servers):
            pytest.fail("it started")


TALKS = """
import json, sys
tool = {"name": "get", "inputSchema": {"type": "object"}}
result = {
    "resultType": "complete", "ttlMs": 0, "cacheScope": "private", "protocolVersion": "2025-11-25",
    "capabilities": {}, "serverInfo": {"name": "", "version": ""}, "tools": [tool], "prompts": [],
    "resources": [],
}
for line in sys.stdin:
    request = json.loads(line)
    if "id" in request:
        sys.stdout.buffer.write(eval(sys.argv[1]))
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""


def talking(said: bytes, **options: Any) -> StdioServerParameters:
    arguments = ["-c", TALKS, repr(said)]
    return StdioServerParameters(command=sys.executable, args=arguments, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("server", "answers"),
    [
        (talking(b"a line\n"), True),
        (talking(b"half a line"), False),
        (talking(b"\xff\n"), False),
        (talking(b"\xff\n", encoding_error_handler="replace"), True),
    ],
)
async def test_a_whole_line_is_skipped_but_half_a_one_is_not(server: Any, answers: bool) -> None:
    limit = None if answers else 0.3
    with nullcontext() if answers else pytest.raises(ExceptionGroup):
        async with Client(server, mode="2026-07-28", read_timeout_seconds=limit) as client:
            assert len((await client.list_tools()).tools) == 1


def test_the_sdks_group_refuses_equal_names_and_breaks_in_gather() -> None:
    async def main() -> None:
        async with ClientSessionGroup() as group:
            await asyncio.gather(group.connect_to_server(talking(b"")))
            with pytest.raises(MCPError, match=r"get.* already exist in group tools"):
                await group.connect_to_server(talking(b""))

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
code = "import os, time; os.write(2, b'%d %d\\\\n' % (os.getpid(), os.getppid())); time.sleep(60)"
deaf = StdioServerParameters(command=sys.executable, args=["-c", code])

async def main(way):
    if way == "forgets":
        await Client(deaf, mode="2026-07-28").__aenter__()
        raise ValueError("you will never see me")
    if way == "cancels":
        cancel_on_signals()
    async with fleet({"deaf": deaf}, mode="2026-07-28"):
        await asyncio.sleep(60)

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job that ends in &
for line in sys.stdin:
    if not os.fork():
        asyncio.run(main(line.strip()))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_only_a_program_that_cancels_on_signals_ends_its_server(tmp_path: Path) -> None:
    """A forgotten client even keeps it from ending after an exception, without a word."""
    for name in ("fleet.py", "on_signals.py"):
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    options: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "text": True}
    parent: Any
    with Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, **options) as parent:
        for way, status in (("cancels", 1), ("dies", -SIGTERM), ("forgets", -SIGKILL)):
            print(way, file=parent.stdin, flush=True)
            ids = next(line for line in parent.stderr if re.match(r"\d+ \d+$", line))
            server, program = map(int, ids.split())
            if way == "forgets":
                assert select.select([parent.stdout], [], [], 0.5)[0] == []  # it does not end
                os.kill(program, SIGKILL)
            else:
                os.kill(program, SIGINT)
                os.kill(program, SIGTERM)
            assert parent.stdout.readline() == f"{int(status)}\n"
            with pytest.raises(ProcessLookupError) if way == "cancels" else nullcontext():
                os.kill(server, SIGKILL)
        parent.stdin.close()
        assert "ValueError" not in parent.stderr.read()
