"""Chapter 08: the hub against real processes that behave, die, hang, and will not die.

Most servers are QUICK below, real processes without the SDK: they start in 30 ms. See its words.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import httpx2
import pytest
import uvicorn
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, Subject, Way
from left_behind import child_processes, open_descriptors
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import Tool
from openai import APIStatusError, AsyncOpenAI
from starlette.responses import JSONResponse, Response
from waiting import until

chapter: Any = load_chapter(8)
ServerError = chapter.ServerError
text_of = chapter.result_text
INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Quick = Callable[..., Any]
Said = Callable[[], list[str]]
Jump = Callable[[Callable[[], object]], Coroutine[Any, Any, None]]

QUICK = """\
import fcntl, json, os, signal, subprocess, sys, time

words = sys.argv[1:]
def ignore(*signal_and_frame):
    print("ignores-sigterm", file=sys.stderr, flush=True)

if "ignores-sigterm" in words:
    signal.signal(signal.SIGTERM, ignore)
if "crashes" in words:
    sys.exit("no luck at all\\n  | no luck today\\n  +------\\n")
for word in {"spawns", "daemon"} & set(words):  # each holds all three pipes
    sleep = ["sleep", str(10**6 + os.getpid())]
    subprocess.Popen(sleep, start_new_session=word == "daemon")

tools = [{"name": name, "inputSchema": {"type": "object"}} for name in
         "echo pid dies waits grows refuses lies babbles garbles quits get_current_time".split()]
tools[6]["outputSchema"] = {"type": "object", "required": ["truth"]}

def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

def call(name, arguments):
    text = str(os.getpid()) if name == "pid" else json.dumps(arguments)
    if name == "dies":
        print("so long", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "waits":
        print("waiting", file=sys.stderr, flush=True)
        return {}
    elif name == "grows":
        tools.append({"name": "grown", "inputSchema": {"type": "object"}})
        send(method="notifications/tools/list_changed")
    elif name == "refuses":
        return {"error": {"code": -32000, "message": "not today"}}
    elif name == "garbles":
        os.write(1, b"\\xff is not a message\\n")
        os.write(2, b"x" * 200_000)  # more than a pipe holds: somebody must read it
    elif name == "quits":
        fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)
        text = "x" * 900_000  # all of it is in the pipe when it exits
    while name == "babbles":
        os.write(1, b"x" * 65536)
    return {"result": {"content": [{"type": "text", "text": text}], "structuredContent": {}}}

for line in sys.stdin:
    request = json.loads(line)
    method, params = request["method"], request.get("params", {})
    answer = {"error": {"code": -32601, "message": "no such method"}}
    if f"silent-at={method}" in words:
        print("silent", file=sys.stderr, flush=True)
        continue
    if f"dies-at={method}" in words:
        os._exit(3)
    if method == "initialize":
        info, version = {"name": "quick", "version": "1"}, "2025-11-25"
        result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        answer = {"result": result}
    elif method == "tools/list":
        page = int(params.get("cursor", 0))
        answer = {"result": {"tools": tools[3 * page:][:3]}}
        if 3 * page + 3 < len(tools) or "endless" in words:
            answer["result"]["nextCursor"] = str(0 if "repeats" in words else page + 1)
    elif method == "tools/call":
        answer = call(params["name"], params.get("arguments"))
    if "id" in request and answer:
        send(id=request["id"], **answer)
    if params.get("name") == "quits":
        os._exit(0)
for word in words:
    if word.startswith("farewell="):
        for _line in range(3000):  # more than a pipe holds
            send(method="notifications/farewell")
        open(word[9:], "w").close()
while "ignores-eof" in words:
    print("ignores-eof", file=sys.stderr, flush=True)
    time.sleep(1000)
"""
QUICK += f"# for the tests in process {os.getpid()}\n"


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A test that hangs shows where, and ends all."""
    faulthandler.dump_traceback_later(45, exit=True, file=sys.__stderr__ or 2)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def quick(monkeypatch: Patch) -> Iterator[Quick]:
    """Makes the configuration of a quick server that misbehaves in the given ways.

    It speaks the older protocol, so "auto" asks it once for the newer one in vain. It has 0.1 s
    each to heed the end of its input and SIGTERM, instead of 2 s. After the test no such server may
    be alive, whoever its parent is by then, and no pipe was closed while the loop watched it.
    """
    closed, loop = list[int](), asyncio.SelectorEventLoop

    def checked(remove: Callable[[Any, int], bool]) -> Callable[[Any, int], bool]:
        def checked_remove(loop: Any, descriptor: int) -> bool:
            closed.extend({descriptor} - {*open_descriptors()})
            return remove(loop, descriptor)

        return checked_remove

    monkeypatch.setattr(loop, "remove_reader", checked(loop.remove_reader))
    monkeypatch.setattr(loop, "remove_writer", checked(loop.remove_writer))
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 0.1)
    monkeypatch.setattr("mcp.shared.jsonrpc_dispatcher._ABANDON_WRITE_TIMEOUT", 0.1)

    def config(*words: str, command: str = sys.executable, **options: Any) -> Any:
        args = ["-S", "-E", "-c", QUICK, *words]
        return chapter.ServerConfig(command=command, args=args, **options)

    yield config
    assert not closed
    assert not [group for group, command in processes() if QUICK in command]


def processes() -> list[tuple[int, str]]:
    """The group and the command of each process that has not ended (init buries zombies)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, _parent, group, *_more = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found.append((int(group), (folder / "cmdline").read_text(errors="replace")))
    return found


def left() -> dict[Any, str]:
    """What a hub may leave behind: descriptors and children."""
    return {**open_descriptors(), **{f"pid {pid}": what for pid, what in child_processes().items()}}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Returns what servers say on stderr, and the hub's warnings, with the logger's name."""
    caplog.set_level("INFO", "mcp_hub")
    return lambda: [f"{name}: {text}" for name, _level, text in caplog.record_tuples]


@pytest.fixture
def kills(monkeypatch: Patch) -> list[tuple[int, int, str]]:
    """What the hub kills: group, signal, and what its leader is then ("zombie" if it has ended)."""
    sent, killpg = list[tuple[int, int, str]](), os.killpg

    def kill(group: int, number: int) -> None:
        sent.append((group, number, child_processes().get(group, "gone")))
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", kill)
    return sent


@pytest.fixture
def jump(monkeypatch: Patch) -> Jump:
    """Lets 31 s pass for the event loop once a condition holds: a limit of 30 s is reached."""
    passed, real = 0.0, asyncio.BaseEventLoop.time
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: real(loop) + passed)

    async def after(condition: Callable[[], object]) -> None:
        nonlocal passed
        await until(condition)
        passed += 31

    return after


def states(changes: list[str]) -> Callable[[Any], None]:
    return lambda status: changes.append(status.state)


async def echo(hub: Any, server: str = "a") -> None:
    assert text_of(await hub.call(server, "echo", {"n": 1})) == '{"n": 1}'


# --- Configuration ---


def written(folder: Path, document: object) -> Path:
    path = folder / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_hosts_file_is_read_and_filled_in(tmp_path: Path, said: Said, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOST", "example.org")
    servers = {
        "a": {"command": "${HOST}", "args": ["-h ${HOST}"], "env": {"K": "${HOST}"}, "cwd": "/"},
        "b": {"url": "http://${HOST}/mcp", "headers": {"X": "${HOST}"}, "required": False},
        "c": {"type": "sse", "url": "https://example.org/sse", "mode": "legacy", "argz": []},
        "off": {"command": "${NOT_SET}", "disabled": True},
    }
    path = written(tmp_path, {"mcpServers": servers, "theme": "dark"})
    a, b, c = chapter.load_config(path).values()
    assert (a.command, a.args, a.cwd) == ("example.org", ["-h example.org"], "/")
    assert (a.env, b.headers) == ({"K": "example.org"}, {"X": "example.org"})
    assert (str(b.url), c.type) == ("http://example.org/mcp", "sse")
    assert (a.mode, c.mode, a.required, b.required) == ("auto", "legacy", True, False)
    assert said() == [f"mcp_hub: {path}: mcpServers.c: unknown key 'argz'"]
    with pytest.raises(AttributeError):
        a.command = "y"
    assert chapter.ServerConfig(command="${HOST}").command == "${HOST}"  # not from a file


SECRET = {"K": "sk-secret"}
# The entry of a server, or the whole file, and what the user is told.
BAD: dict[str, tuple[Any, list[str]]] = {
    "no file": (None, ["No such file"]),
    "not JSON": ("{", ["mcp.json", "Invalid JSON", "line 1"]),
    "server not an object": (3, ["mcpServers.git", "object", "not 3"]),
    "command": ({"command": 3}, ["git.command", "string", "not 3"]),
    "disabled": ({"command": "x", "disabled": 1}, ["git.disabled"]),
    "mode": ({"command": "x", "mode": "old"}, ["git.mode", "'old'"]),
    "url": ({"url": "localhost:80"}, ["git.url", "localhost:80"]),
    "type": ({"url": "http://h/", "type": "ws"}, ["git.type", "'ws'"]),
    "neither": ({}, ["git", "either a command"]),
    "both": ({"command": "x", "url": "http://h/", "env": SECRET}, ["git", "either a command"]),
    "another host's": ('{"servers": {"K": "sk-secret"}}', ["mcpServers", "required"]),
    "http command": ({"command": "x", "type": "http"}, ["git", "'http'"]),
    "unset": ({"command": "x", "args": ["${NOT_SET}"]}, ["git.args.0", "variable NOT_SET is not"]),
}


@pytest.mark.parametrize(("given", "words"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_one_line(tmp_path: Path, given: object, words: list[str]) -> None:
    document = given if isinstance(given, str) else {"mcpServers": {"git": given}}
    path = tmp_path / "mcp.json" if given is None else written(tmp_path, document)
    with pytest.raises(chapter.ConfigError) as caught:
        chapter.load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert "sk-secret" not in message


# --- The contract, and starting ---


@pytest.mark.parametrize("way", ASYNC_WAYS)
def test_the_hub_keeps_the_cleanup_contract(way: Way, quick: Quick) -> None:
    """With a child and a server in this process."""
    before: dict[Any, str] = {}
    slow = Slow(0)
    servers = {"a": (child := quick(mode="legacy")), "b": slow.server}

    def connected() -> Any:
        before.update({} if before else left())  # here: the event loop has descriptors of its own
        return chapter.connect(servers)

    def leaks() -> object:
        there = [what for key, what in left().items() if before and key not in before]
        return there or (slow.opened != slow.closed and "a lifespan")

    subject = Subject(
        open=connected,
        leaks=leaks,
        use=echo,
        closed_error=ServerError,
        setup_faults=[
            partial(mock.patch.dict, vars(child), command=command)
            for command in ("/no/such/program", "false")
        ],
        cleanup_faults="a server that fails to end is given up or killed: that is no error",
    )
    way(subject)


@pytest.mark.asyncio
async def test_the_status_has_pid_tools_and_start_up_time(quick: Quick) -> None:
    changes: list[tuple[str, str]] = []
    servers = {"a": quick(), "b": quick("crashes", required=False), "off": quick(disabled=True)}
    connected = chapter.connect(servers, on_change=lambda s: changes.append((s.name, s.state)))
    async with connected as hub:
        status = hub.statuses["a"]
        assert (status.name, status.state, status.error) == ("a", "ready", "")
        assert status.pid == int(text_of(await hub.call("a", "pid")))
        assert status.startup > 0
        assert [tool.name for tool in status.tools][-2:] == ["quits", "get_current_time"]
        assert hub.tools == {"a": status.tools}
    assert sorted(changes) == [("a", "ready"), ("a", "stopped"), ("b", "failed")]
    assert {name: status.pid for name, status in hub.statuses.items()} == {"a": None, "b": None}


@pytest.mark.parametrize("probed", ["silent", "dies"])
@pytest.mark.asyncio
async def test_a_server_that_fears_the_newer_protocol_starts(
    quick: Quick, said: Said, jump: Jump, probed: str
) -> None:
    silence = asyncio.create_task(jump(said)) if probed == "silent" else None
    servers = {"a": quick(f"{probed}-at=server/discover", "ignores-eof")}
    async with chapter.connect(servers, startup_timeout=60) as hub:
        await echo(hub)
    if silence:
        await silence


# In each case: how the server misbehaves or is configured, and what the user is told.
LATE = r"was not ready within 30 s(; its last words: .*)?"
ENDLESS = "ValueError: its list of tools has no end: there is more after 100 pages"
BAD_STARTS: dict[str, tuple[str, Any, str]] = {
    "program": ("", {"command": "no-such-program"}, "No such file or directory: no-such-program"),
    "directory": ("", {"cwd": "/no/such/folder"}, "No such file or directory: /no/such/folder"),
    "crash": ("crashes", {}, "ended; its last words: no luck today"),
    "crash at initialize": ("dies-at=initialize", {}, "ended"),
    "crash at tools/list": ("dies-at=tools/list", {}, "ended"),
    "silent at initialize": ("silent-at=initialize ignores-eof ignores-sigterm", {}, LATE),
    "silent at tools/list": ("silent-at=tools/list", {}, LATE),
    "dead at the second try": ("silent-at=server/discover dies-at=initialize", {}, "ended"),
    "endless list": ("endless", {}, ENDLESS),
    "repeated cursor": ("endless repeats", {}, ENDLESS),
}


@pytest.mark.parametrize(("words", "options", "told"), BAD_STARTS.values(), ids=BAD_STARTS)
@pytest.mark.asyncio
async def test_a_failed_start_is_named(
    quick: Quick, said: Said, jump: Jump, words: str, options: Any, told: str
) -> None:
    """The other servers stop if it is required, and go on if it is optional."""
    seen: list[Any] = []

    @asynccontextmanager
    async def connected(**more: Any) -> AsyncIterator[Any]:
        silences = len(said())
        late = [jump(lambda: seen and len(said()) > silences)] if "silent" in words else []
        jumps = [asyncio.create_task(each) for each in late]
        servers = {"a": quick(mode="legacy"), "bad": quick(*words.split(), **options, **more)}
        limit = 30 if told is LATE else 60
        try:
            connected = chapter.connect(servers, startup_timeout=limit, on_change=seen.append)
            async with connected as hub:
                yield hub
        finally:
            await asyncio.gather(*jumps)

    with pytest.raises(ServerError) as caught:
        async with connected():
            pytest.fail("was entered")
    assert re.fullmatch(f"MCP server 'bad' did not start: {told}", str(caught.value))
    assert caught.value.server == "bad"
    assert (seen[-1].name, seen[-1].state) == ("a", "stopped")
    seen.clear()
    async with connected(required=False) as hub:
        await echo(hub)
        assert hub.statuses["bad"].state == "failed"
        assert list(hub.tools) == ["a"]
        with pytest.raises(ServerError, match=r"'bad' is failed: ") as caught:
            await hub.call("bad", "echo")
        assert re.fullmatch(f".*: {told}", str(caught.value))
        assert await hub.check() == {"bad": str(caught.value)}


@pytest.mark.asyncio
async def test_servers_start_together_and_a_failure_stops_the_others_at_once(
    quick: Quick, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(chapter, "LEAVE_TIMEOUT", 60)
    servers = {"slow": quick("silent-at=initialize"), "bad": quick("crashes")}
    with pytest.raises(ServerError, match="'bad' did not start"):
        async with asyncio.timeout(30), chapter.connect(servers, startup_timeout=60):
            pytest.fail("was entered")


@pytest.mark.asyncio
async def test_with_no_descriptor_left_connect_fails(quick: Quick) -> None:
    """With every number of free descriptors from none to enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first_free := os.dup(0))
    failed = 0
    try:
        for limit in range(first_free, first_free + 100):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            with suppress(ServerError):
                async with chapter.connect({"a": quick(mode="legacy")}) as hub:
                    await echo(hub)
                    break
            failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 3 < failed < 100


# --- Calling ---


# In each case: a tool and its arguments, or a request, and what the user is told.
BAD_CALLS: list[tuple[Any, Any, str]] = [
    ("x", {}, "has no tool 'x'; it has: echo, pid, dies, "),
    ("refuses", {}, "failed at tool 'refuses': MCPError: not today"),  # with code -32000
    ("lies", {}, "failed at tool 'lies': RuntimeError: Invalid structured content"),
    ("waits", {}, "did not answer tool 'waits' within 30 s"),
    ("echo", {"text": "\ud800"}, "cannot be sent these arguments: Error serializing to JSON: "),
    ("echo", {"text": object()}, "cannot be sent these arguments: Unable to serialize unknown"),
    ("echo", {1: 2}, "cannot be sent these arguments: Pydantic"),
    (lambda client: client.read_resource(3), None, "failed at the request: ValidationError: "),
    (mock.AsyncMock(side_effect=OSError), None, "failed at the request: OSError"),
    (lambda client: client.list_prompts(), None, "failed at the request: MCPError: no such method"),
]


@pytest.mark.asyncio
async def test_whatever_a_call_meets_is_a_server_error_and_the_server_lives(
    quick: Quick, said: Said, jump: Jump
) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        waited = asyncio.create_task(jump(said))  # "waiting"
        for tool, arguments, told in BAD_CALLS:
            with pytest.raises(ServerError) as caught:
                await (hub.ask("a", tool) if arguments is None else hub.call("a", tool, arguments))
            assert str(caught.value).startswith(f"MCP server 'a' {told}")
            assert not str(caught.value).endswith(": ")
            copy = pickle.loads(pickle.dumps(caught.value))
            assert (str(copy), copy.server) == (str(caught.value), "a")
            await echo(hub)
            assert hub.statuses["a"].state == "ready"
        with pytest.raises(ServerError, match=r"'c' is not known; there are: a, b$"):
            await hub.call("c", "echo")
        await waited


@pytest.mark.asyncio
async def test_odd_bytes_do_no_harm_and_last_words_are_heard(
    quick: Quick, tmp_path: Path, said: Said, monkeypatch: Patch
) -> None:
    """A child has time to say goodbye, too, and its last answer arrives."""
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 10)
    servers = {"a": quick(f"farewell={tmp_path / 'done'}"), "b": quick(), "c": quick()}
    async with chapter.connect(servers) as hub:
        assert len(text_of(await hub.call("c", "quits"))) == 900_000
        await hub.call("a", "garbles")
        given = {"text": "\N{SNOWMAN}" * 1_000_000}  # more than a pipe holds
        assert json.loads(text_of(await hub.call("a", "echo", given))) == given
        page = await hub.ask("a", lambda client: client.list_tools(cursor="2"))
        assert [tool.name for tool in page.tools] == ["lies", "babbles", "garbles"]
        with pytest.raises(ServerError):
            await hub.call("b", "dies")
    garbled = "mcp_hub.a: on stdout, but not a message: � is not a message"
    assert [line for line in said() if "xxx" not in line] == [garbled, "mcp_hub.b: so long"]
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("name", ["dies", "babbles"])
@pytest.mark.asyncio
async def test_a_lost_server_is_named(quick: Quick, name: str, monkeypatch: Patch) -> None:
    """It has died, or sends a line without an end. Each call under way learns of it."""
    monkeypatch.setattr(chapter, "LONGEST_LINE", 100_000)
    words = {"dies": "so long", "babbles": "a line on stdout has more than 100000 bytes"}[name]
    problem = f"ended; its last words: {words}"
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        calls = [hub.call("b", tool) for tool in ("waits", "waits", name)]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, ServerError)
            assert re.match(f"MCP server 'b' died during tool '.*': {problem}", str(error))
        status = hub.statuses["b"]
        assert (status.state, status.pid, status.error) == ("lost", None, problem)
        assert list(hub.tools) == ["a"]
        await echo(hub)
        with pytest.raises(ServerError, match=f"'b' is lost: {problem}"):
            await hub.call("b", "echo")
    assert hub.statuses["b"].state == "lost"


@pytest.mark.parametrize(("words", "has_pidfd"), [([], True), (["spawns"], True), ([], False)])
@pytest.mark.asyncio
async def test_the_death_of_an_idle_server_is_noticed_when_it_happens(
    quick: Quick, words: list[str], has_pidfd: bool, kills: list[Any], monkeypatch: Patch
) -> None:
    """Even if its own child holds the pipes open; and on macOS.

    On Linux, its id stays its own until its group has been killed.
    """
    changes = list[Any]()
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    servers = {"a": quick(*words), "b": quick()}
    async with chapter.connect(servers, on_change=changes.append) as hub:
        pids = [status.pid for status in hub.statuses.values()]
        os.kill(pids[0], KILL)
        await until(lambda: hub.statuses["a"].state == "lost")
    assert [(change.state, change.pid) for change in changes[2:3]] == [("lost", None)]
    assert [group for group, number, _what in kills if number == KILL] == pids
    assert not has_pidfd or "gone" not in [what for _group, _number, what in kills]


@pytest.mark.asyncio
async def test_a_stopped_server_is_an_error_at_the_deadline(quick: Quick, jump: Jump) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        os.kill(hub.statuses["b"].pid, signal.SIGSTOP)
        given = {"more than a pipe holds": "x" * 1_000_000}
        called = asyncio.create_task(hub.call("b", "echo", given))
        await asyncio.sleep(0)
        await jump(lambda: hub._calls)
        with pytest.raises(ServerError, match=r"'b' did not answer tool 'echo' within 30 s"):
            await called
        told = "MCP server 'b' did not answer the health check within 0.1 s"
        assert await hub.check(timeout=0.1) == {"b": told}
        await echo(hub)


def tools_server(lifespan: Any = None) -> MCPServer[Any]:
    """A server in this process, with tools that end in different ways."""
    server = MCPServer("tools", lifespan=lifespan, log_level="CRITICAL")
    waiting = asyncio.Event()

    async def echo(n: int = 0) -> str:
        return json.dumps({"n": n})

    async def waits() -> str:
        await waiting.wait()
        return "waited"

    async def wakes() -> None:
        waiting.set()

    async def fails() -> str:
        raise ToolError("no luck")

    async def draws() -> list[Any]:
        return ["a dot:", Image(data=b"dot", format="png")]

    async def halves() -> str:
        return "\udc80 x"  # half a character, which could not be sent to a model

    async def grows(context: Context[Any]) -> None:
        server.add_tool(lambda: "big", name="grown")
        await context.notify_tools_changed()

    for tool in (echo, waits, wakes, fails, draws, halves, grows):
        server.add_tool(tool, structured_output=False if tool in (draws, halves) else None)
    return server


@pytest.mark.parametrize("kind", ["child", "http", "sse"])
@pytest.mark.asyncio
async def test_a_changed_list_of_tools_is_fetched_again(
    quick: Quick, kind: str, monkeypatch: Patch
) -> None:
    """By the older protocol and by the newer one, which may change before it is listened to."""
    server, changes, listen = tools_server(), list[str](), chapter.Client.listen

    def late(client: Any, **options: Any) -> Any:
        server.add_tool(lambda: "early", name="early")
        return listen(client, **options)

    monkeypatch.setattr(chapter.Client, "listen", late)
    app = server.sse_app() if kind == "sse" else server.streamable_http_app()
    async with http(app) as port:
        config = quick() if kind == "child" else service_at(port, type=kind)
        async with chapter.connect({"a": config}, on_change=states(changes)) as hub:
            if kind == "http":
                await until(lambda: hub.tools["a"][-1].name == "early")
            await hub.call("a", "grows")
            await until(lambda: hub.tools["a"][-1].name == "grown")
            assert await hub.check() == {}
    assert changes == ["ready"] * (3 if kind == "http" else 2) + ["stopped"]


# --- Leaving ---


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.asyncio
async def test_what_a_server_has_started_does_not_outlive_it(quick: Quick, wrapped: bool) -> None:
    """Even if a shell has started it, with a stderr of its own. A daemon leaves the group."""
    config = quick("spawns", "daemon")
    if wrapped:
        arguments = ["-c", 'exec "$0" "$@" 2>>/dev/null', config.command, *config.args]
        config = chapter.ServerConfig(command="sh", args=arguments)
    async with chapter.connect({"a": config}) as hub:
        leader = hub.statuses["a"].pid
        assert leader == int(text_of(await hub.call("a", "pid")))
        assert [group for group, _command in processes()].count(leader) == 2
    await until(lambda: leader not in dict(processes()))
    (daemon,) = (group for group, command in processes() if f"{10**6 + leader}" in command)
    os.killpg(daemon, signal.SIGKILL)  # it survived, so this does not raise


@pytest.mark.asyncio
async def test_a_child_is_asked_to_end_before_it_is_killed(
    quick: Quick, said: Said, jump: Jump, kills: list[Any], monkeypatch: Patch
) -> None:
    """By the end of its input, then by SIGTERM, and each time it is waited for."""
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 30)
    servers = {"a": [], "b": ["ignores-eof"], "c": ["ignores-eof", "ignores-sigterm"]}

    async def limits(name: str) -> None:
        for word in servers[name]:
            await jump(lambda: f"mcp_hub.{name}: {word}" in said())  # noqa: B023

    for name, words in servers.items():
        reached = asyncio.create_task(limits(name))
        async with chapter.connect({name: quick(*words)}):
            pass
        await reached
    assert [number for _group, number, _what in kills] == [KILL, TERM, KILL, TERM, KILL]
    assert [what == "zombie" for _group, _number, what in kills] == [
        True,
        False,
        True,
        False,
        False,
    ]


class Slow:
    """An in-process server whose lifespan awaits something when it ends."""

    def __init__(self, seconds: float = 0.05, starts: bool = True) -> None:
        self.opened, self.closed, self.seconds, self.starts = 0, 0, seconds, starts
        self.server = tools_server(self.lifespan)

    @asynccontextmanager
    async def lifespan(self, server: Any) -> AsyncIterator[None]:
        self.opened += 1
        try:
            while not self.starts:
                await asyncio.Event().wait()
            yield
        finally:
            await asyncio.sleep(self.seconds)
            self.closed += 1


@pytest.mark.parametrize("ending", [KeyError("mine"), asyncio.CancelledError("mine")])
@pytest.mark.parametrize(("seconds", "limit"), [(0.05, 10), (1000, 0.05)])
@pytest.mark.asyncio
async def test_a_lifespan_in_this_process_has_time_to_end(
    seconds: float, limit: float, ending: BaseException, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(chapter, "LEAVE_TIMEOUT", limit)
    slow = Slow(seconds)
    with pytest.raises(type(ending)) as caught:
        async with chapter.connect({"a": slow.server}):
            raise ending
    assert caught.value is ending
    assert slow.closed == (seconds < limit)


@pytest.mark.parametrize(("seconds", "limit"), [(0.05, 10), (1000, 0.05)])
@pytest.mark.asyncio
async def test_a_lifespan_that_is_cancelled_in_its_start_has_time_to_end(
    quick: Quick, seconds: float, limit: float, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(chapter, "LEAVE_TIMEOUT", limit)
    slow = Slow(seconds, starts=False)
    servers = {"a": slow.server, "b": quick("crashes")}
    with pytest.raises(ServerError, match="'b' did not start"):
        async with chapter.connect(servers, startup_timeout=1000):
            pytest.fail("was entered")
    assert (slow.opened, slow.closed) == (1, seconds < limit)


@pytest.mark.parametrize("moment", ["starting", "waiting"])
@pytest.mark.asyncio
async def test_a_cancelled_scope_ends_servers(quick: Quick, moment: str, said: Said) -> None:
    """A scope of anyio cancels all that waits in it, again and again."""
    before, slow, changes = left(), Slow(), list[str]()
    silent = ["silent-at=tools/list"] if moment == "starting" else []
    servers = {"a": quick(*silent, mode="legacy"), "b": slow.server}

    async def block() -> None:
        try:
            async with chapter.connect(servers, on_change=states(changes)) as hub:
                await hub.call("a", "waits")
        except asyncio.CancelledError:
            changes.append("cancelled")
            raise

    used = time.process_time()
    with suppress(ExceptionGroup):
        async with anyio.create_task_group() as group:
            group.start_soon(block)
            await until(lambda: said() and slow.opened)
            raise KeyError
    assert changes[-3:] == ["stopped", "stopped", "cancelled"]
    assert slow.closed == slow.opened
    assert left() == before
    assert time.process_time() - used < 2.0  # it has not turned in a circle


@pytest.mark.asyncio
async def test_a_call_under_way_may_finish_and_new_ones_are_refused(
    quick: Quick, said: Said, jump: Jump
) -> None:
    async def while_it_closes() -> BaseException | None:
        await until(lambda: said() and quick_one.done())
        new = asyncio.create_task(hub.call("a", "echo"))
        await asyncio.wait([new])
        await jump(lambda: True)
        return new.exception()

    async with chapter.connect({"a": quick()}) as hub:
        late = asyncio.create_task(hub.call("a", "waits"))
        quick_one = asyncio.create_task(hub.call("a", "echo", {"n": 2}))
        refused = asyncio.create_task(while_it_closes())
        await asyncio.sleep(0)
    assert late.done()
    assert str(late.exception()).endswith("did not answer tool 'waits' within 30 s")
    assert text_of(quick_one.result()) == '{"n": 2}'
    assert str(await refused) == "MCP server 'a' takes no calls any more: its hub is closed"


@pytest.mark.asyncio
async def test_a_failing_body_does_not_wait_for_calls(quick: Quick, said: Said) -> None:
    with pytest.raises(KeyError):
        async with chapter.connect({"a": quick()}, call_timeout=60) as hub:
            late = asyncio.create_task(hub.call("a", "waits"))
            await until(said)
            raise KeyError
    with pytest.raises(ServerError, match="'a' was stopped during tool 'waits'"):
        await late
    with pytest.raises(ServerError, match="its hub is closed"):
        await hub.call("a", "echo")


@pytest.mark.asyncio
async def test_another_task_than_the_one_that_entered_may_leave(quick: Quick) -> None:
    manager = chapter.connect({"a": quick()})
    hub = await asyncio.create_task(manager.__aenter__())
    await echo(hub)
    await asyncio.create_task(manager.__aexit__(None, None, None))
    assert hub.statuses["a"].state == "stopped"


# --- Signals, for real ---


def terminated(number: int, frame: Any) -> None:
    pytest.fail(f"signal {number} was not handled")


@pytest.mark.parametrize(
    ("moment", "signals", "ignored", "safe"),
    [
        ("silent", [INT, INT], False, True),  # while it starts
        ("leaving", [INT, INT], False, True),
        ("silent", [HUP, TERM], False, True),
        ("waiting", [INT], True, True),  # a shell's `&` has it ignore SIGINT
        ("waiting", [INT], False, False),
    ],
)
def test_no_child_outlives_signals(
    quick: Quick, said: Said, moment: str, signals: list[int], ignored: bool, safe: bool
) -> None:
    """One Ctrl-C does no harm without `cancelled_by_signals`; a second one may strike anywhere."""
    start = ["silent-at=tools/list"] if moment == "silent" else []
    stubborn = quick("ignores-eof", "ignores-sigterm", "spawns", *start)
    strikes: list[asyncio.Task[None]] = []

    async def strike(task: asyncio.Task[Any]) -> None:
        await until(lambda: f"mcp_hub.a: {moment}" in said())
        for number in signals:
            signal.raise_signal(number)
            cancelled = task.cancelling()
            await until(lambda: not safe or task.cancelling() > cancelled)  # noqa: B023

    async def main() -> None:
        task = asyncio.current_task()
        assert task
        strikes.append(asyncio.create_task(strike(task)))
        with chapter.cancelled_by_signals() if safe else nullcontext():
            async with chapter.connect({"a": stubborn, "b": quick("ignores-eof")}) as hub:
                if moment == "waiting":
                    await hub.call("a", "waits")
                logging.getLogger("mcp_hub.a").info("leaving")
        await asyncio.Event().wait()

    handlers: dict[int, Any] = {INT: signal.default_int_handler, TERM: terminated, HUP: terminated}
    handlers[INT] = signal.SIG_IGN if ignored else signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not strikes[0].cancelled()
    assert not [line for line in said() if line.startswith("asyncio: ")]


@pytest.mark.asyncio
@pytest.mark.parametrize("raised", [KeyError, asyncio.CancelledError])
async def test_without_a_signal_an_error_passes(raised: type[BaseException]) -> None:
    before = signal.getsignal(TERM)
    with pytest.raises(raised), chapter.cancelled_by_signals():
        assert signal.getsignal(TERM) != before
        raise raised
    with chapter.cancelled_by_signals():
        pass
    assert signal.getsignal(TERM) == before


# --- Over HTTP ---


@asynccontextmanager
async def http(app: Any, port: int = 0) -> AsyncIterator[int]:
    """Serve an ASGI app on loopback, from this very loop; yields its port."""
    config = uvicorn.Config(app, ws="none", log_level="critical", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await serving
            for task in asyncio.all_tasks():
                if "sse_starlette" in repr(task):  # a watcher, which it never ends
                    task.cancel()


def service(requests: list[str]) -> Any:
    """A service with sessions, as the older protocol has them. It records its requests."""
    app = tools_server().streamable_http_app()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def record(event: Any) -> None:
            if event["type"] == "http.response.start":
                token = dict(scope["headers"]).get(b"x-token", b"none").decode()
                requests.append(f"{scope['method']} {event['status']} {token}")
            await send(event)

        await app(scope, receive, record)

    return answer


def service_at(port: int, **options: Any) -> Any:
    path = "sse" if options.get("type") == "sse" else "mcp"
    return chapter.ServerConfig(url=f"http://127.0.0.1:{port}/{path}", **options)


@pytest.mark.parametrize(("status", "sent"), [(404, 2), (500, 1)])
@pytest.mark.asyncio
async def test_only_a_forgotten_session_sends_a_call_again_and_only_once(
    status: int, sent: int
) -> None:
    calls, real = [], service([])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        first = [await receive()] if scope["type"] == "http" else []
        if first and b"tools/call" in first[0]["body"]:
            calls.append(scope["path"])
            await Response(status_code=status)(scope, receive, send)
            return

        async def receive_again() -> Any:
            return first.pop() if first else await receive()

        await real(scope, receive_again, send)

    async with http(app) as port:
        async with chapter.connect({"a": service_at(port, mode="legacy")}) as hub:
            with pytest.raises(ServerError, match="tool 'echo'"):
                await echo(hub)
    assert len(calls) == sent


@pytest.mark.asyncio
async def test_a_service_that_went_away_is_reached_again_by_the_next_call(quick: Quick) -> None:
    """By the same call if the service is back, but has forgotten our session."""
    changes, requests = list[str](), list[str]()
    async with AsyncExitStack() as stack:
        async with http(service([])) as port:
            config = service_at(port, headers={"X-Token": "secret"}, mode="legacy")
            connected = chapter.connect({"a": config, "b": quick()}, on_change=states(changes))
            hub = await stack.enter_async_context(connected)
            await echo(hub)
        async with http(service(requests), port):
            await echo(hub)
            assert hub.statuses["a"].state == "ready"
        for problem in ("died during tool 'echo'", "is failed"):
            with pytest.raises(ServerError, match=f"'a' {problem}: ConnectError: "):
                await hub.call("a", "echo", {"n": 1})
        await echo(hub, "b")
        async with http(service(requests), port):
            assert await hub.check() == {}
            await echo(hub)
            await stack.aclose()
    assert requests.count("POST 404 secret") == 1
    assert requests[-1] == "DELETE 200 secret"  # the session is ended
    forgotten, down = ["lost", "starting", "ready"], ["lost", "starting", "failed"]
    back = ["starting", "ready", "stopped", "stopped"]
    assert changes == ["ready", "ready", *forgotten, *down, *back]


# --- A model that uses the tools ---

USER = {"role": "user", "content": "Go."}
DONE = {"content": "Done."}


def asks(*calls: tuple[str, object]) -> dict[str, Any]:
    """A reply that asks for tools."""
    functions = [{"name": name, "arguments": given} for name, given in calls]
    numbered = enumerate(functions)
    return {"tool_calls": [{"id": f"c{n}", "type": "function", "function": f} for n, f in numbered]}


def completion(message: Any) -> Any:
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


async def talk(*script: Any, hub: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Let a scripted model run the hub's tools. Return the new messages and the requests."""
    requests: list[Any] = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        requests.append(json.loads(request.content))
        reply = script[len(requests) - 1]
        known = isinstance(reply, httpx2.Response)
        return reply if known else httpx2.Response(200, json=completion(reply))

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    client = AsyncOpenAI(api_key="-", base_url="http://x", http_client=http, max_retries=0)
    messages = [USER]
    async with client:
        try:
            new = await chapter.run_with_tools(client, "m", messages, hub, **options)
        finally:
            assert messages == [USER], "a failed turn can be sent again"
    return new, requests


def stub(**tools: list[str]) -> Any:
    """A hub whose calls all fail."""
    schema = {"type": "object"}
    listed = {n: [Tool(name=t, input_schema=schema) for t in ts] for n, ts in tools.items()}
    call = mock.AsyncMock(side_effect=ServerError("a", "died"))
    return mock.NonCallableMock(tools=listed, call=call)


def test_the_model_sees_valid_and_unique_names() -> None:
    hub = stub(**{"my notes": ["add"], "my_notes": ["add", "é.x"], "s" * 70: ["one", "two"]})
    named = chapter.chat_tools(hub)
    assert [(server, tool.name) for server, tool in named.values()] == [
        (server, tool.name) for server, tools in hub.tools.items() for tool in tools
    ]
    assert list(named)[:3] == ["my_notes__add", "my_notes__add_2", "my_notes____x"]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in named)


@pytest.mark.asyncio
async def test_each_round_offers_the_tools_of_that_moment() -> None:
    """In the API's form. A dead server is reported to the model."""
    hub = stub(a=["b"])

    def call(*_call: object) -> None:
        hub.tools |= stub(new=["c"]).tools
        raise ServerError("a", "died")

    hub.call.side_effect = call
    new, (first, second) = await talk(asks(("a__b", "{}")), DONE, hub=hub)
    empty = {"type": "object", "properties": {}}
    function = {"name": "a__b", "description": "", "parameters": empty}
    assert first["tools"] == [{"type": "function", "function": function}]
    assert [tool["function"]["name"] for tool in second["tools"]] == ["a__b", "new__c"]
    assert new[1]["content"] == "Error: MCP server 'a' died"
    new, (request,) = await talk({"content": None, "refusal": "No."}, hub=stub())
    assert "tools" not in request
    assert new[0]["refusal"] == "No."


# What the model asks for in one reply, and what it is told.
ANSWERS: list[tuple[str, object, str]] = [
    ("t__waits", "", "waited"),  # for the next one
    ("t__wakes", "", '{"result": null}'),
    ("t__fails", "", "Error: Error executing tool fails: no luck"),
    ("t__draws", "", r"a dot:\n\[image left out\]"),
    ("t__halves", "", r"\? x"),
    ("t__echo", "", '{"n": 0}'),
    ("t__ecco", "{}", "Error: no such tool; there are: t__echo, t__waits, .*"),
    ("t__echo", '{"n": "x', "Error: not a JSON object: Invalid JSON: EOF.*"),
    ("t__echo", '{"x":' * 9999, "Error: not a JSON object.*"),
    ("t__echo", "[1]", "Error: not a JSON object: Input should be an object"),
    ("t__echo", {"n": 1}, "Error: not a JSON object.*"),
    ("t__echo", r'{"n": "\ud800"}', "Error: not a JSON object.*"),
    ("t__echo", '{"n": "x"}', "Error: Error executing tool echo.*"),
]


@pytest.mark.asyncio
async def test_tools_run_together_and_answers_and_mistakes_come_in_order() -> None:
    reply = asks(*((name, given) for name, given, _told in ANSWERS)) | {"reasoning": "kept"}
    async with chapter.connect({"t": tools_server()}) as hub:
        new, requests = await talk(reply, DONE, hub=hub)
    assert new == [{"role": "assistant"} | reply, *new[1:-1], {"role": "assistant"} | DONE]
    for message, (_name, _given, told) in zip(new[1:-1], ANSWERS, strict=True):
        assert re.fullmatch(told, message["content"], re.DOTALL)
    assert [m["tool_call_id"] for m in new[1:-1]] == [call["id"] for call in reply["tool_calls"]]
    assert requests[1]["messages"] == [USER, *new[:-1]]


@pytest.mark.asyncio
async def test_the_rounds_of_tools_are_limited() -> None:
    for rounds in (0, 2):
        hub = stub(a=["b"])
        script = [asks(("a__b", "{}"))] * 9
        with pytest.raises(chapter.ReplyError, match=f"asked for tools more than {rounds} times"):
            await talk(*script, hub=hub, max_rounds=rounds)
        assert hub.call.await_count == rounds
        new, _requests = await talk(*script[:rounds], DONE, hub=hub, max_rounds=rounds)
        assert new[-1]["content"] == "Done."


BAD_REPLIES: list[Any] = [  # others: in test_hostile_endpoints.py
    httpx2.Response(200, text="[" * 99999),
    httpx2.Response(200, json={"choices": [{"message": {"content": "Half"}}]}),
    {"content": "x", "tool_calls": {"a": "b"}},
    {"tool_calls": [{"function": {"name": "a__b", "arguments": "{}"}}]},  # without id
    {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "a__b"}}]},
]


@pytest.mark.parametrize("reply", [*BAD_REPLIES, httpx2.Response(500, json={})])
@pytest.mark.asyncio
async def test_a_reply_that_is_no_chat_completion_is_an_error(reply: Any) -> None:
    """The client's own errors propagate."""
    errors, told = (chapter.ReplyError, APIStatusError), "the reply is not|Error code: 500"
    with pytest.raises(errors, match=told) as caught:
        await talk(asks(("a__b", "{}")), reply, hub=stub(a=["b"]))
    assert isinstance(caught.value, APIStatusError) == (reply not in BAD_REPLIES)


@pytest.mark.asyncio
async def test_a_model_behind_a_foreign_server_uses_the_tools() -> None:
    """It sends neither usage nor types, and reasons aloud, as several such servers do."""
    asking = asks(("t__echo", "")) | {"reasoning_content": "Hm."}
    replies = [completion(message) for message in (asking, DONE)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/v1/chat/completions"  # a lifespan has none
        await JSONResponse(replies.pop(0))(scope, receive, send)

    async with http(app) as port, chapter.connect({"t": tools_server()}) as hub:
        async with AsyncOpenAI(api_key="-", base_url=f"http://127.0.0.1:{port}/v1") as client:
            new = await chapter.run_with_tools(client, "m", [USER], hub)
    assert [message["content"] for message in new[1:]] == ['{"n": 0}', "Done."]
    assert new[0] == asking | {"role": "assistant"}


# --- The demos and their servers ---

SHOWN = {
    "1": r"✗ Children left by `forgotten`: \d+\. ✓ Children left by `connected`: none\.",
    "2": r"✗ RuntimeError: Attempted to exit cancel scope in a different task .* ✓ no error",
    "3": r"on_change │ time: lost: ended call │ ServerError: MCP server 'time' is lost: ended "
    r"✗ time: .* ✓ notes: answers ✓ files: answers ✗ search: .* is failed: .*no-such-program "
    r"✓ Children left by `connect`: none\.",
    "4": r"✗ `careless`: KeyError: 'notes__serch' .* model answers │ The notes say: pool.py: gpus"
    r".* ✓ `run_with_tools` answers\. Tool calls: 4, errors reported to the model: 2\.",
    "5": r"✗ `by_client`: saved: none\. .* ✓ `by_hub`: saved: GPU 3 is hot\.",
}


@pytest.mark.parametrize(("number", "shown"), SHOWN.items(), ids=SHOWN)
def test_what_a_demo_shows(
    number: str, shown: str, quick: Quick, monkeypatch: Patch, capsys: Capture
) -> None:
    """A quick server stands in for the server of times, which test_scripts.py plays."""
    monkeypatch.setattr(chapter, "TIME", {"command": sys.executable, "args": quick().args})
    monkeypatch.setattr(sys, "argv", ["08.py", number])
    assert chapter.main() == 0
    out, err = capsys.readouterr()
    assert re.search(shown, " ".join(out.split())), out
    assert err == ""


def test_on_windows_the_script_ends_with_one_line() -> None:
    """It can be imported there. A server that is started imports no client of a model."""
    program = f"""if True:
        import mcp, os, runpy, signal, sys
        del os.killpg, os.pidfd_open, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP
        chapter = runpy.run_path({str(chapter_path(8))!r})
        print("openai" in sys.modules)
        sys.platform, sys.argv = "win32", ["08.py", "1"]
        chapter["main"]()"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    told = "08.py: Windows is left out: its event loop cannot watch a pipe\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "False\n", told)


@pytest.mark.asyncio
async def test_only_text_files_below_the_root_are_read(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    (root / "gpu.py").write_text("GPU = 1\n")
    (root / "data").write_bytes(b"\xff")
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    told = {"gpu.py": "GPU = 1\n"}
    for path in ("../secret", "link", str(tmp_path / "secret")):
        told[path] = f"{path!r} is outside the root: use a path below it"
    for path in ("data", ".", "no such file", "a\0b"):
        told[path] = f"cannot read {path!r}: "
    async with chapter.connect({"files": chapter.files_server(root)}) as hub:
        for path, text in told.items():
            assert text in text_of(await hub.call("files", "read", {"path": path}))
