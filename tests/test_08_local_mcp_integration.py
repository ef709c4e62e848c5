"""Chapter 08: the hub against real processes that behave, die, hang, and will not die.

Most servers here are QUICK below: a real child process that speaks MCP without the SDK, and so
starts in 30 ms instead of 600. Look at its words to see in which ways it can misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
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
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

chapter: Any = load_chapter(8)
ServerError = chapter.ServerError

QUICK = """\
import json, os, signal, subprocess, sys, time

words = sys.argv[1:]
if "ignores-sigterm" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "crashes" in words:
    sys.exit("no luck at all\\n  | no luck today\\n  +------\\n")
if "spawns" in words:
    subprocess.Popen(["sleep", "1000"])  # which holds all three pipes
for word in words:
    if word.startswith("meets="):  # answers no one until so many others have come, too
        folder, number = word[6:].split(",")
        open(os.path.join(folder, str(os.getpid())), "w").close()
        while len(os.listdir(folder)) < int(number):
            time.sleep(0.002)

tools = [{"name": name, "inputSchema": {"type": "object"}} for name in
         "echo pid dies waits grows refuses lies babbles garbles".split()]
tools[6]["outputSchema"] = {"type": "object", "required": ["truth"]}

def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

def call(name, arguments):
    text, more = json.dumps(arguments), {}
    if name == "pid":
        text = str(os.getpid())
    elif name == "dies":
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
    elif name == "lies":
        more = {"structuredContent": {"lie": 1}}
    elif name == "garbles":
        os.write(1, b"\\xff is not a message\\n")
    while name == "babbles":
        os.write(1, b"x" * 65536)
    return {"result": {"content": [{"type": "text", "text": text}], **more}}

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
for word in words:
    if word.startswith("farewell="):
        for _line in range(3000):  # more than a pipe holds
            send(method="notifications/farewell")
        open(word[9:], "w").close()
while "ignores-eof" in words:
    time.sleep(1000)
"""


Quick = Callable[..., Any]


@pytest.fixture(scope="module")
def quick_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("servers") / "quick.py"
    path.write_text(QUICK)
    return path


@pytest.fixture
def quick(quick_path: Path) -> Iterator[Quick]:
    """Makes the configuration of a quick server that misbehaves in the given ways.

    It speaks the older protocol, so "auto" asks it once for the newer one in vain. After the test
    no such server may be alive, whoever its parent is by then.
    """

    def config(*words: str, **options: Any) -> Any:
        arguments = ["-S", "-E", str(quick_path), *words]
        return chapter.ServerConfig(command=sys.executable, args=arguments, **options)

    yield config
    assert not processes(lambda pid: str(quick_path) in commands(pid))


def processes(wanted: Callable[[int], bool]) -> set[int]:
    """All processes of this machine that are wanted."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if wanted(int(entry.name)):
                found.add(int(entry.name))
    return found


def commands(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def living_group(leader: int) -> set[int]:
    """The processes of a group that have not ended: a killed orphan is init's to bury."""

    def belongs(pid: int) -> bool:
        state, _parent, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
        return int(group) == leader and state != "Z"

    return processes(belongs)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has 0.1 s each to heed the end of its input and SIGTERM, instead of 2 s."""
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 0.1)
    monkeypatch.setattr("mcp.shared.jsonrpc_dispatcher._ABANDON_WRITE_TIMEOUT", 0.1)


def left() -> dict[Any, str]:
    """What a hub may leave behind: descriptors and children."""
    return {**open_descriptors(), **{f"pid {pid}": what for pid, what in child_processes().items()}}


Said = Callable[[], list[str]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Returns what servers say on stderr, and the hub's warnings, with the logger's name."""
    caplog.set_level("INFO", "mcp_hub")
    return lambda: [f"{name}: {text}" for name, _level, text in caplog.record_tuples]


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something that will come; not at all if it has."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def text_of(result: Any) -> str:
    return "\n".join(part.text for part in result.content)


async def echo(hub: Any, server: str = "a") -> None:
    assert text_of(await hub.call(server, "echo", {"n": 1})) == '{"n": 1}'


# --- Configuration ---


def written(folder: Path, document: object) -> Path:
    path = folder / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_hosts_file_is_read_and_its_variables_are_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST", "example.org")
    servers = {
        "a": {"command": "${HOST}", "args": ["-h ${HOST}"], "env": {"K": "${HOST}"}, "cwd": "/"},
        "b": {"url": "http://${HOST}/mcp", "headers": {"X": "${HOST}"}, "required": False},
        "c": {"type": "sse", "url": "https://example.org/sse", "mode": "legacy"},
        "off": {"command": "${NOT_SET}", "disabled": True},
    }
    path = written(tmp_path, {"mcpServers": servers, "theme": "dark"})
    a, b, c = chapter.load_config(path).values()
    assert (a.command, a.args, a.cwd) == ("example.org", ["-h example.org"], "/")
    assert (a.env, b.headers) == ({"K": "example.org"}, {"X": "example.org"})
    assert (str(b.url), c.type) == ("http://example.org/mcp", "sse")
    assert (a.mode, c.mode, a.required, b.required) == ("auto", "legacy", True, False)
    with pytest.raises(AttributeError):
        a.command = "y"
    assert chapter.ServerConfig(command="${HOST}").command == "${HOST}"  # not from a file


def test_an_unknown_key_is_a_warning(tmp_path: Path, said: Said) -> None:
    path = written(tmp_path, {"mcpServers": {"git": {"command": "x", "argz": []}}})
    assert list(chapter.load_config(path)) == ["git"]
    assert said() == [f"mcp_hub: {path}: mcpServers.git: unknown key 'argz'"]


BAD: dict[str, tuple[Any, list[str]]] = {
    "no file": (None, ["No such file"]),
    "not JSON": ("{", ["mcp.json", "Invalid JSON", "line 1"]),
    "no servers": ({"servers": {}}, ["mcpServers", "required"]),
    "server not an object": ({"mcpServers": {"git": 3}}, ["mcpServers.git", "object", "not 3"]),
    "command": ({"mcpServers": {"git": {"command": 3}}}, ["git.command", "string", "not 3"]),
    "disabled": ({"mcpServers": {"git": {"command": "x", "disabled": 1}}}, ["git.disabled"]),
    "mode": ({"mcpServers": {"git": {"command": "x", "mode": "old"}}}, ["git.mode", "'old'"]),
    "url": ({"mcpServers": {"git": {"url": "localhost:80"}}}, ["git.url", "localhost:80"]),
    "type": ({"mcpServers": {"git": {"url": "http://h/", "type": "ws"}}}, ["git.type", "'ws'"]),
    "neither": ({"mcpServers": {"git": {}}}, ["git", "either a command"]),
    "http command": ({"mcpServers": {"git": {"command": "x", "type": "http"}}}, ["git", "'http'"]),
    "unset": (
        {"mcpServers": {"git": {"command": "x", "args": ["${NOT_SET}"]}}},
        ["git.args.0", "the environment variable NOT_SET is not set"],
    ),
}


@pytest.mark.parametrize(("document", "words"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_one_line_that_names_the_key(
    tmp_path: Path, document: object, words: list[str]
) -> None:
    path = tmp_path / "mcp.json" if document is None else written(tmp_path, document)
    with pytest.raises(chapter.ConfigError) as caught:
        chapter.load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.asyncio
async def test_disabled_or_no_servers_are_a_hub_without_tools(quick: Quick) -> None:
    async with chapter.connect({"off": quick(disabled=True)}) as hub:
        assert (hub.statuses, hub.tools, await hub.check()) == ({}, {}, {})


# --- The contract ---


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
def test_the_hub_keeps_the_cleanup_contract(way: Way, quick: Quick) -> None:
    servers = {"a": quick(mode="legacy"), "b": (other := quick())}
    before: dict[Any, str] = {}

    def connected() -> Any:
        before.update({} if before else left())  # here: the event loop has descriptors of its own
        return chapter.connect(servers)

    faults = [
        lambda: mock.patch.dict(vars(other), command="/no/such/program"),
        lambda: mock.patch.dict(vars(other), command="false"),
    ]
    subject = Subject(
        open=connected,
        leaks=lambda: {key: what for key, what in left().items() if before and key not in before},
        use=echo,
        closed_error=ServerError,
        setup_faults=faults,
    )
    way(subject)


# --- Starting ---


@pytest.mark.asyncio
async def test_servers_start_at_the_same_time(quick: Quick, tmp_path: Path) -> None:
    """None of them answers before all three run: in turn, the first would never be ready."""
    servers = {name: quick(f"meets={tmp_path},3") for name in "abc"}
    async with chapter.connect(servers) as hub:
        assert {status.state for status in hub.statuses.values()} == {"ready"}


@pytest.mark.asyncio
async def test_the_status_has_pid_tools_and_start_up_time(quick: Quick) -> None:
    changes: list[tuple[str, str]] = []
    servers = {"a": quick(), "b": quick("crashes", required=False)}
    async with chapter.connect(
        servers, on_change=lambda s: changes.append((s.name, s.state))
    ) as hub:
        status = hub.statuses["a"]
        assert (status.name, status.state, status.error) == ("a", "ready", "")
        assert status.pid == int(text_of(await hub.call("a", "pid")))
        assert status.startup > 0
        assert [tool.name for tool in status.tools][-1:] == ["garbles"]  # on the last page
        assert hub.tools == {"a": status.tools}
    assert sorted(changes) == [("a", "ready"), ("a", "stopped"), ("b", "failed")]
    assert {status.pid for status in hub.statuses.values()} == {None}


@pytest.mark.parametrize("probed", ["silent", "dies"])
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_server_that_cannot_bear_the_newer_protocol_gets_the_older(
    quick: Quick, probed: str
) -> None:
    servers = {"a": quick(f"{probed}-at=server/discover", "ignores-eof")}
    async with chapter.connect(servers, startup_timeout=4.0) as hub:
        await echo(hub)


# In each case: how the server misbehaves, and what the user is told.
BAD_STARTS = {
    "missing program": (["command"], "No such file or directory: no-such-program"),
    "missing directory": (["cwd"], "No such file or directory: /no/such/folder"),
    "crash": (["crashes"], "ended; its last words: no luck today"),
    "crash at initialize": (["dies-at=initialize"], "ended"),
    "crash at tools/list": (["dies-at=tools/list"], "ended"),
    "silent at initialize": (
        ["silent-at=initialize", "ignores-eof", "ignores-sigterm"],
        "was not ready within 0.4 s",
    ),
    "silent at tools/list": (["silent-at=tools/list"], "was not ready within 0.4 s"),
    "endless list": (["endless"], "ValueError: its list of tools has no end: "),
    "repeated cursor": (["endless", "repeats"], "ValueError: its list of tools has no end: "),
}


@pytest.mark.parametrize(("words", "told"), BAD_STARTS.values(), ids=BAD_STARTS)
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_server_that_does_not_start_is_named_and_the_others_go_on_or_stop(
    quick: Quick, words: list[str], told: str
) -> None:
    """They stop if it is required, and go on if it is optional."""
    before = left()
    seen: list[Any] = []
    timeout = 0.4 if "within" in told else 30.0

    def servers(**options: Any) -> dict[str, Any]:
        if words == ["command"]:
            bad = chapter.ServerConfig(command="no-such-program", **options)
        elif words == ["cwd"]:
            bad = quick(cwd="/no/such/folder", **options)
        else:
            bad = quick(*words, **options)
        return {"a": quick(mode="legacy"), "bad": bad}

    with pytest.raises(ServerError) as caught:
        async with chapter.connect(servers(), startup_timeout=timeout, on_change=seen.append):
            pytest.fail("was entered")
    assert str(caught.value).startswith(f"MCP server 'bad' did not start: {told}")
    assert caught.value.server == "bad"
    assert (seen[-1].name, seen[-1].state) == ("a", "stopped")
    async with chapter.connect(servers(required=False), startup_timeout=timeout) as hub:
        await echo(hub)
        assert hub.statuses["bad"].state == "failed"
        assert list(hub.tools) == ["a"]
        with pytest.raises(ServerError, match=r"'bad' is failed: ") as caught:
            await hub.call("bad", "echo")
        assert told in str(caught.value)
        assert await hub.check() == {"bad": str(caught.value)}
    assert left() == before


@pytest.mark.asyncio
async def test_a_required_failure_does_not_wait_for_the_others(quick: Quick) -> None:
    servers = {"slow": quick("silent-at=initialize"), "bad": quick("crashes")}
    with pytest.raises(ServerError, match="'bad' did not start"):
        async with asyncio.timeout(8):
            async with chapter.connect(servers, startup_timeout=60):
                pytest.fail("was entered")


@pytest.mark.asyncio
async def test_with_no_descriptor_left_connect_fails(quick: Quick) -> None:
    """With every number of free descriptors from none to enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 20, hard))
    taken, failed = [], 0
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        while taken:
            with contextlib.suppress(ServerError):
                async with asyncio.timeout(8), chapter.connect({"a": quick(mode="legacy")}) as hub:
                    await echo(hub)
                    break
            failed += 1
            os.close(taken.pop())
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed > 3
    assert taken


# --- Calling ---


async def without_a_word(client: object) -> None:
    raise OSError


# In each case: a tool and its arguments, or a request, and what the user is told.
BAD_CALLS: list[tuple[Any, Any, str]] = [
    ("x", {}, "has no tool 'x'; it has: echo, pid, dies, "),
    ("refuses", {}, "failed at tool 'refuses': MCPError: not today"),  # with code -32000
    ("lies", {}, "failed at tool 'lies': RuntimeError: Invalid structured content"),
    ("waits", {}, "did not answer tool 'waits' within 0.5 s"),
    ("echo", {"text": "\ud800"}, "cannot be sent these arguments: Error serializing to JSON: "),
    ("echo", {"text": object()}, "cannot be sent these arguments: Unable to serialize unknown"),
    (lambda client: client.read_resource(3), None, "failed at the request: ValidationError: "),
    (without_a_word, None, "failed at the request: OSError"),
    (lambda client: client.list_prompts(), None, "failed at the request: MCPError: no such method"),
]


@pytest.mark.parametrize(("tool", "arguments", "told"), BAD_CALLS)
@pytest.mark.asyncio
async def test_whatever_a_call_meets_is_a_server_error_and_the_server_lives(
    quick: Quick, tool: Any, arguments: Any, told: str
) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}, call_timeout=0.5) as hub:
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


@pytest.mark.asyncio
async def test_odd_bytes_and_many_bytes_do_no_harm(quick: Quick, said: Said) -> None:
    async with chapter.connect({"a": quick()}) as hub:
        await hub.call("a", "garbles")
        given = {"text": "\N{SNOWMAN}" * 1_000_000}  # more than a pipe holds
        assert json.loads(text_of(await hub.call("a", "echo", given))) == given
        page = await hub.ask("a", lambda client: client.list_tools(cursor="2"))
        assert [tool.name for tool in page.tools] == ["lies", "babbles", "garbles"]
    assert said() == ["mcp_hub.a: on stdout, but not a message: � is not a message"]


@pytest.mark.parametrize("name", ["dies", "babbles"])
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_server_lost_in_a_call_is_named_and_the_others_go_on(
    quick: Quick, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    quick: Quick, words: list[str], has_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a process that it started holds its pipes open; and on macOS."""
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    changes: list[Any] = []
    async with chapter.connect({"a": quick(*words)}, on_change=changes.append) as hub:
        os.kill(hub.statuses["a"].pid, signal.SIGKILL)
        await until(lambda: hub.statuses["a"].state == "lost")
    assert [(change.state, change.pid) for change in changes[1:]] == [("lost", None)]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("given", [{}, {"more than a pipe holds": "x" * 1_000_000}])
@pytest.mark.asyncio
async def test_a_stopped_server_is_an_error_at_the_deadline(
    quick: Quick, given: dict[str, str]
) -> None:
    before = left()
    async with chapter.connect({"a": quick(), "b": quick()}, call_timeout=0.2) as hub:
        os.kill(hub.statuses["b"].pid, signal.SIGSTOP)
        with pytest.raises(ServerError, match=r"'b' did not answer tool 'echo' within 0.2 s"):
            await hub.call("b", "echo", given)
        assert await hub.check(timeout=0.1) == {
            "b": "MCP server 'b' did not answer the health check within 0.1 s"
        }
        await echo(hub)
    assert left() == before


def growing_server() -> MCPServer[Any]:
    """A server that gets a tool while it serves, and says so."""
    server = MCPServer("growing", log_level="WARNING")

    @server.tool()
    async def echo(n: int) -> str:
        return json.dumps({"n": n})

    @server.tool()
    async def grows(context: Context[Any]) -> str:
        server.add_tool(lambda: "big", name="grown")
        await context.notify_tools_changed()
        return "done"

    return server


@pytest.mark.parametrize("era", ["older", "newer"])
@pytest.mark.asyncio
async def test_a_changed_list_of_tools_is_fetched_again(quick: Quick, era: str) -> None:
    config = quick() if era == "older" else growing_server()
    changes: list[Any] = []
    async with chapter.connect({"a": config}, on_change=changes.append) as hub:
        assert "grown" not in {tool.name for tool in hub.tools["a"]}
        await hub.call("a", "grows")
        await until(lambda: "grown" in {tool.name for tool in hub.tools["a"]})
    assert [change.state for change in changes] == ["ready", "ready", "stopped"]


# --- Leaving ---


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.asyncio
async def test_what_a_server_has_started_does_not_outlive_it(quick: Quick, wrapped: bool) -> None:
    """Even if a shell has started the server, with a stderr of its own."""
    config = quick("spawns")
    if wrapped:
        arguments = ["-c", 'exec "$0" "$@" 2>>/dev/null', config.command, *config.args]
        config = chapter.ServerConfig(command="sh", args=arguments)
    async with chapter.connect({"a": config}) as hub:
        leader = hub.statuses["a"].pid
        assert leader == int(text_of(await hub.call("a", "pid")))
        assert len(living_group(leader)) == 2
    await until(lambda: not living_group(leader))


@pytest.mark.asyncio
async def test_a_process_id_is_not_used_after_it_was_given_up(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may give it to another process as soon as the child has been reaped."""
    killed: list[int] = []

    def killpg(group: int, number: int) -> None:
        assert group in child_processes()  # a zombie, perhaps: it still has its id
        killed.append(group)
        os.kill(group, number)

    monkeypatch.setattr(os, "killpg", killpg)
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        pids = [status.pid for status in hub.statuses.values()]
        os.kill(pids[0], signal.SIGKILL)
        await until(lambda: hub.statuses["a"].state == "lost")
    assert killed == pids


@pytest.mark.asyncio
async def test_a_child_can_say_goodbye_and_its_last_words_are_heard(
    quick: Quick, tmp_path: Path, said: Said
) -> None:
    async with chapter.connect({"a": quick(f"farewell={tmp_path / 'done'}"), "b": quick()}) as hub:
        with pytest.raises(ServerError):
            await hub.call("b", "dies")
    assert said() == ["mcp_hub.b: so long"]
    assert (tmp_path / "done").exists()


class Slow:
    """An in-process server whose lifespan awaits something when it ends."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.opened, self.closed, self.seconds = False, False, seconds
        self.server = MCPServer("slow", lifespan=self.lifespan, log_level="WARNING")
        self.server.add_tool(self.waits)

    @asynccontextmanager
    async def lifespan(self, server: Any) -> AsyncIterator[None]:
        self.opened = True
        try:
            yield
        finally:
            await asyncio.sleep(self.seconds)
            self.closed = True

    async def waits(self) -> None:
        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("seconds", "closed"), [(0.05, True), (1000, False)])
@pytest.mark.asyncio
async def test_a_lifespan_in_this_process_has_time_to_end(
    seconds: float, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chapter, "LEAVE_TIMEOUT", 0.5)
    for ending in (KeyError("mine"), asyncio.CancelledError("mine")):
        slow = Slow(seconds)
        with pytest.raises(type(ending)) as caught:
            async with chapter.connect({"a": slow.server}):
                raise ending
        assert caught.value is ending
        assert slow.closed == closed


@pytest.mark.parametrize("kind", ["child", "in-process", "starting"])
@pytest.mark.parametrize("way", ["timeout", "sibling"])
@pytest.mark.asyncio
async def test_inside_a_cancelled_scope_the_hub_ends_its_servers(
    quick: Quick, kind: str, way: str, said: Said
) -> None:
    """A scope of anyio cancels all that waits in it, again and again."""
    before, slow = left(), Slow()
    silent = quick("silent-at=tools/list", mode="legacy")
    config = {"child": quick(), "in-process": slow.server, "starting": silent}[kind]
    changes: list[str] = []
    left_by: list[BaseException] = []

    async def block() -> None:
        try:
            connected = chapter.connect({"a": config}, on_change=lambda s: changes.append(s.state))
            async with connected as hub:
                await hub.call("a", "waits")
        except BaseException as error:
            left_by.append(error)
            raise

    async def end() -> None:
        await until(lambda: slow.opened or said() or changes)
        raise KeyError("sibling")

    used = time.process_time()
    with contextlib.suppress(TimeoutError, ExceptionGroup):
        with anyio.fail_after(0.5 if way == "timeout" else 60):
            async with anyio.create_task_group() as group:
                group.start_soon(block)
                if way == "sibling":
                    group.start_soon(end)
    assert isinstance(left_by[0], asyncio.CancelledError)
    assert changes[-1] == "stopped"
    assert slow.closed == slow.opened
    assert left() == before
    assert time.process_time() - used < 2.0  # it has not turned in a circle


@pytest.mark.asyncio
async def test_a_call_under_way_may_finish_and_new_ones_are_refused(quick: Quick) -> None:
    async with chapter.connect({"a": quick()}, call_timeout=0.3) as hub:
        late = asyncio.create_task(hub.call("a", "waits"))
        quick_one = asyncio.create_task(hub.call("a", "echo", {"n": 2}))
        await asyncio.sleep(0)
    assert late.done()
    with pytest.raises(ServerError, match=r"did not answer tool 'waits' within 0.3 s"):
        late.result()
    assert text_of(quick_one.result()) == '{"n": 2}'
    with pytest.raises(ServerError, match=r"'a' takes no calls any more: its hub is closed"):
        await hub.call("a", "echo")


@pytest.mark.asyncio
async def test_if_the_body_fails_calls_under_way_are_not_waited_for(
    quick: Quick, said: Said
) -> None:
    with pytest.raises(KeyError):
        async with chapter.connect({"a": quick()}, call_timeout=60) as hub:
            late = asyncio.create_task(hub.call("a", "waits"))
            await until(said)
            raise KeyError
    with pytest.raises(ServerError, match="'a' was stopped during tool 'waits'"):
        await late


@pytest.mark.asyncio
async def test_it_may_be_left_in_another_task_than_it_was_entered_in(quick: Quick) -> None:
    """And beside another hub, whose children live on."""
    async with chapter.connect({"a": quick()}) as other:
        before = left()
        manager = chapter.connect({"a": quick()})
        hub = await asyncio.create_task(manager.__aenter__())
        await echo(hub)
        await asyncio.create_task(manager.__aexit__(None, None, None))
        assert left() == before
        await echo(other)


# --- Signals, for real ---

PROGRAM = """\
import asyncio, contextlib, importlib.util, logging, signal, sys
spec = importlib.util.spec_from_file_location("chapter_08", {path!r})
sys.modules["chapter_08"] = chapter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chapter)
chapter.EXIT_TIMEOUT = 0.2

def server(*words):
    return chapter.ServerConfig(command=sys.executable, args=["-S", "-E", {quick!r}, *words])

async def main():
    start = ["silent-at=tools/list"] if {when!r} == "start" else []
    stubborn = server("ignores-eof", "ignores-sigterm", "spawns", *start)
    with chapter.cancelled_by_signals() if {safe} else contextlib.nullcontext():
        async with chapter.connect({{"a": stubborn, "b": server("ignores-eof")}}) as hub:
            if {when!r} == "call":
                await hub.call("a", "waits")
            print("leaving", file=sys.stderr, flush=True)
        print("not interrupted")

logging.basicConfig(level="INFO", format="%(message)s")
print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""
MOMENTS = {"start": "silent\n", "call": "waiting\n", "exit": "leaving\n"}
AS_A_JOB = ["sh", "-c", '"$@" & child=$!; echo $child; wait $child', "sh"]


@pytest.mark.parametrize(
    ("when", "signals", "background", "safe"),
    [
        ("start", ["SIGINT", "SIGINT"], False, True),
        ("exit", ["SIGINT", "SIGINT"], False, True),
        ("start", ["SIGHUP", "SIGTERM"], False, True),
        ("call", ["SIGTERM"], True, True),  # a shell has started it with `&`: it ignores SIGINT
        ("call", ["SIGINT"], False, False),
    ],
)
@pytest.mark.usefixtures("quick")  # which sees to it that no server is left
def test_no_child_outlives_signals(
    when: str, signals: list[str], background: bool, safe: bool, quick_path: Path
) -> None:
    """One Ctrl-C does no harm without `cancelled_by_signals`; a second one may strike anywhere."""
    path = str(chapter_path(8))
    program = PROGRAM.format(when=when, safe=safe, quick=str(quick_path), path=path)
    command = [*(AS_A_JOB if background else []), sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stdout
        assert run.stderr
        pid = int(run.stdout.readline()) if background else run.pid
        while run.stderr.readline() != MOMENTS[when]:
            assert run.poll() is None
        for name in signals:
            os.kill(pid, getattr(signal, name))
            poll(lambda: not pending(pid))
        output, errors = run.communicate(timeout=20)
    assert (run.returncode, output) == (130, f"{background}\n")
    assert "Traceback" not in errors or not safe


def poll(happened: Callable[[], object], deadline: float = 10.0) -> None:
    """Look again and again for something that happens in another process."""
    end = time.monotonic() + deadline
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def pending(pid: int) -> int:
    """The signals that a process was sent and has not taken."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(dict(line.split(":\t", 1) for line in status.splitlines())["ShdPnd"], 16)


@pytest.mark.asyncio
async def test_the_handlers_of_signals_are_restored() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for raises in (None, KeyError, asyncio.CancelledError):
        with contextlib.suppress(KeyError, asyncio.CancelledError):
            with chapter.cancelled_by_signals():
                if raises:
                    raise raises
        assert [signal.getsignal(number) for number in numbers] == before


# --- Over HTTP ---


@asynccontextmanager
async def http(app: Any, port: int = 0) -> AsyncIterator[int]:
    """Serve an ASGI app on loopback, from this very loop; yields its port."""
    config = uvicorn.Config(app, ws="none", log_level="critical", timeout_graceful_shutdown=1)
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


class Service:
    """A service with sessions, as the older protocol has them, that records its requests."""

    def __init__(self) -> None:
        self.app = growing_server().streamable_http_app()
        self.requests: list[str] = []
        self.headers: dict[bytes, bytes] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def record(event: Any) -> None:
            if event["type"] == "http.response.start":
                self.requests.append(f"{scope['method']} {event['status']}")
            await send(event)

        self.headers = dict(scope.get("headers", ()))
        await self.app(scope, receive, record)


def service_at(port: int, **options: Any) -> Any:
    return chapter.ServerConfig(url=f"http://127.0.0.1:{port}/mcp", **options)


@pytest.mark.parametrize("other", ["", "crashes"])
@pytest.mark.asyncio
async def test_headers_are_sent_and_the_session_is_ended(quick: Quick, other: str) -> None:
    """Even if another server does not start."""
    service = Service()
    async with http(service) as port:
        config = service_at(port, headers={"X-Token": "secret"}, mode="legacy")
        with contextlib.suppress(ServerError):
            async with chapter.connect({"a": config, "b": quick(other)}) as hub:
                await echo(hub)
        assert service.headers[b"x-token"] == b"secret"
    assert service.requests[-1] == "DELETE 200"


@pytest.mark.asyncio
async def test_a_forgotten_session_is_initialised_again(quick: Quick) -> None:
    changes: list[str] = []
    async with AsyncExitStack() as stack:
        async with http(Service()) as port:
            servers = {"a": service_at(port, mode="legacy"), "b": quick()}
            connected = chapter.connect(servers, on_change=lambda s: changes.append(s.state))
            hub = await stack.enter_async_context(connected)
            await echo(hub)
        async with http(deployed_again := Service(), port):
            await echo(hub)
            await echo(hub, "b")
            assert hub.statuses["a"].state == "ready"
            await stack.aclose()
    assert deployed_again.requests.count("POST 404") == 1
    assert changes == ["ready", "ready", "lost", "starting", "ready", "stopped", "stopped"]


@pytest.mark.asyncio
async def test_after_an_outage_the_next_call_tries_again(quick: Quick) -> None:
    async with AsyncExitStack() as stack:
        async with http(Service()) as port:
            servers = {"a": service_at(port, mode="legacy"), "b": quick()}
            hub = await stack.enter_async_context(chapter.connect(servers))
            await echo(hub)
        for problem in ("died during tool 'echo'", "is failed"):
            with pytest.raises(ServerError, match=f"'a' {problem}: ConnectError: "):
                await hub.call("a", "echo", {"n": 1})
        await echo(hub, "b")
        async with http(Service(), port):
            assert await hub.check() == {}
            await echo(hub)
            await stack.aclose()


@pytest.mark.parametrize("kind", ["http", "sse"])
@pytest.mark.asyncio
async def test_a_service_is_reached_by_its_url(tmp_path: Path, kind: str) -> None:
    server = growing_server()
    app = server.streamable_http_app() if kind == "http" else server.sse_app()
    async with http(app) as port:
        url = f"http://127.0.0.1:{port}/{'mcp' if kind == 'http' else 'sse'}"
        path = written(tmp_path, {"mcpServers": {"a": {"type": kind, "url": url}}})
        async with chapter.connect(chapter.load_config(path)) as hub:
            assert text_of(await hub.call("a", "grows")) == "done"
            await until(lambda: "grown" in {tool.name for tool in hub.tools["a"]})
            assert await hub.check() == {}


# --- A model that uses the tools ---

USER = {"role": "user", "content": "Go."}
DONE = {"content": "Done."}


def asks(*calls: tuple[str, object]) -> dict[str, Any]:
    """A reply that asks for tools."""
    functions = [{"name": name, "arguments": given} for name, given in calls]
    numbered = enumerate(functions)
    return {"tool_calls": [{"id": f"c{n}", "type": "function", "function": f} for n, f in numbered]}


def choice(message: Any) -> Any:
    return {"message": message, "finish_reason": "stop"}


async def talk(
    *script: Any, servers: Any = None, hub: Any = None, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Let a scripted model run the tools. Return the new messages and the requests."""
    requests: list[Any] = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        requests.append(json.loads(request.content))
        reply = script[len(requests) - 1]
        if isinstance(reply, httpx2.Response):
            return reply
        return httpx2.Response(200, json={"choices": [choice(reply)]})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    async with (
        chapter.connect(servers or {}) as connected,
        AsyncOpenAI(api_key="-", base_url="http://x", http_client=http, max_retries=0) as client,
    ):
        messages = [USER]
        try:
            new = await chapter.run_with_tools(client, "m", messages, hub or connected, **options)
        finally:
            assert messages == [USER], "a failed turn can be sent again"
    return new, requests


def tools_server() -> MCPServer[Any]:
    """Tools that end in different ways."""
    server, waiting = MCPServer("tools", log_level="ERROR"), asyncio.Event()

    @server.tool()
    async def echo(text: str = "nothing") -> str:
        return text

    @server.tool()
    async def waits() -> str:
        await waiting.wait()
        return "waited"

    @server.tool()
    async def wakes() -> None:
        waiting.set()

    @server.tool()
    async def fails() -> str:
        raise ToolError("no luck")

    @server.tool(structured_output=False)
    async def draws() -> list[Any]:
        return ["a dot:", Image(data=b"dot", format="png")]

    return server


def stub(before_call: Callable[[], object] = list, **tools: list[str]) -> Any:
    """A hub whose calls all fail."""

    async def call(server: str, *_call: object) -> None:
        before_call()
        raise chapter.ServerError(server, "died")

    listed = {
        n: [Tool(name=t, input_schema={"type": "object"}) for t in ts] for n, ts in tools.items()
    }
    return SimpleNamespace(tools=listed, call=call)


def test_the_model_sees_valid_and_unique_names() -> None:
    hub = stub(list, **{"my notes": ["add"], "my_notes": ["add", "é.x"], "s" * 70: ["one", "two"]})
    named = chapter.chat_tools(hub)
    assert [(server, tool.name) for server, tool in named.values()] == [
        (server, tool.name) for server, tools in hub.tools.items() for tool in tools
    ]
    assert list(named)[:3] == ["my_notes__add", "my_notes__add_2", "my_notes____x"]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in named)


@pytest.mark.asyncio
async def test_tools_are_sent_as_the_api_requires_them() -> None:
    _new, (request,) = await talk(DONE, hub=stub(a=["b"]))
    empty = {"type": "object", "properties": {}}
    function = {"name": "a__b", "description": "", "parameters": empty}
    assert request["tools"] == [{"type": "function", "function": function}]
    _new, (request,) = await talk(DONE)
    assert "tools" not in request


@pytest.mark.asyncio
async def test_tools_run_together_and_answer_in_order() -> None:
    """The first tool waits for the second one."""
    names = ("waits", "wakes", "fails", "draws", "echo")
    reply = asks(*((f"t__{name}", "") for name in names)) | {"reasoning": "kept"}
    new, requests = await talk(reply, DONE, servers={"t": tools_server()})
    assert new == [{"role": "assistant"} | reply, *new[1:-1], {"role": "assistant"} | DONE]
    assert [m["content"] for m in new[1:-1]] == [
        "waited",
        '{"result": null}',
        "Error: Error executing tool fails: no luck",
        "a dot:\n[image left out]",
        "nothing",
    ]
    assert [m["tool_call_id"] for m in new[1:-1]] == [call["id"] for call in reply["tool_calls"]]
    assert requests[1]["messages"] == [USER, *new[:-1]]


MISTAKES = {
    "unknown tool": (("t__ecco", "{}"), "Error: no such tool; there are: t__echo, t__waits"),
    "cut off": (("t__echo", '{"text": "x'), "Error: not a JSON object: Invalid JSON: EOF"),
    "too deep": (("t__echo", '{"x":' * 9999), "Error: not a JSON object"),
    "no object": (("t__echo", "[1]"), "Error: not a JSON object: Input should be an object"),
    "not a string": (("t__echo", {"text": "x"}), "Error: not a JSON object"),
    "half a character": (("t__echo", r'{"text": "\ud800"}'), "Error: not a JSON object"),
    "wrong type": (("t__echo", '{"text": 3}'), "Error: Error executing tool echo"),
}


@pytest.mark.parametrize(("call", "told"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.asyncio
async def test_a_mistake_is_told_to_the_model_which_goes_on(
    call: tuple[str, object], told: str
) -> None:
    new, _requests = await talk(asks(call), DONE, servers={"t": tools_server()})
    assert new[1]["content"].startswith(told)
    assert new[2]["content"] == "Done."


@pytest.mark.asyncio
async def test_a_server_that_died_is_told_to_the_model() -> None:
    new, _requests = await talk(asks(("a__b", "{}")), DONE, hub=stub(a=["b"]))
    assert new[1]["content"] == "Error: MCP server 'a' died"


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.asyncio
async def test_the_rounds_of_tools_are_limited(rounds: int) -> None:
    calls: list[str] = []
    hub = stub(lambda: calls.append("b"), a=["b"])
    script = [asks(("a__b", "{}"))] * 9
    with pytest.raises(chapter.ReplyError, match=f"asked for tools more than {rounds} times"):
        await talk(*script, hub=hub, max_rounds=rounds)
    assert calls == ["b"] * rounds
    new, _requests = await talk(*script[:rounds], DONE, hub=hub, max_rounds=rounds)
    assert new[-1]["content"] == "Done."


@pytest.mark.asyncio
async def test_each_round_offers_the_tools_of_that_moment() -> None:
    hub = stub(lambda: hub.tools.update(stub(new=["c"]).tools), a=["b"])
    _new, requests = await talk(asks(("a__b", "{}")), DONE, hub=hub)
    assert [len(request["tools"]) for request in requests] == [1, 2]


BAD_REPLIES = {  # others: in test_hostile_endpoints.py
    "too deep": httpx2.Response(200, text="[" * 99999),
    "calls are no list": {"content": "x", "tool_calls": {"a": "b"}},
    "a call without id": {"tool_calls": [{"function": {"name": "a__b", "arguments": "{}"}}]},
    "a custom tool": {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "a__b"}}]},
}


@pytest.mark.parametrize("reply", BAD_REPLIES.values(), ids=BAD_REPLIES)
@pytest.mark.asyncio
async def test_a_reply_that_is_no_chat_completion_is_an_error(reply: Any) -> None:
    with pytest.raises(chapter.ReplyError, match="the reply is not"):
        await talk(asks(("a__b", "{}")), reply, hub=stub(a=["b"]))


@pytest.mark.asyncio
async def test_what_the_client_raises_propagates() -> None:
    with pytest.raises(APIStatusError):
        await talk(httpx2.Response(500, json={}))
    new, _requests = await talk({"content": None, "refusal": "No."})
    assert new[0]["refusal"] == "No."


@pytest.mark.asyncio
async def test_a_model_behind_a_foreign_server_uses_the_tools() -> None:
    """It sends neither usage nor types, and reasons aloud, as several such servers do."""
    asking = asks(("t__echo", "")) | {"reasoning_content": "Hm."}
    replies = [{"choices": [choice(message)]} for message in (asking, DONE)]

    async def complete(_request: Request) -> JSONResponse:
        return JSONResponse(replies.pop(0))

    app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    async with http(app) as port, chapter.connect({"t": tools_server()}) as hub:
        async with AsyncOpenAI(api_key="-", base_url=f"http://127.0.0.1:{port}/v1") as client:
            new = await chapter.run_with_tools(client, "m", [USER], hub)
    assert [message["content"] for message in new[1:]] == ["nothing", "Done."]
    assert new[0] == asking | {"role": "assistant"}


# --- What the demos show ---

Play = Callable[..., tuple[object, str, str]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """Run the script in this process. Return its status, what it printed in one line, errors."""

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["08.py", *arguments])
        try:
            status = chapter.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, " ".join(out.split()), err

    return run


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
def test_what_a_demo_shows(play: Play, number: str, shown: str) -> None:
    status, out, err = play(number)
    assert (status, err) == (0, "")
    assert re.search(shown, out), out


def test_windows_ends_the_script_with_one_line(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    status, _out, err = play("1")
    assert status == 2
    assert err.endswith("08.py: error: Windows is left out: its event loop cannot watch a pipe\n")


def test_the_script_is_imported_on_windows_and_without_openai() -> None:
    """A server that is started needs no client of a model."""
    program = f"""if True:
        import mcp, os, runpy, signal, sys
        del os.killpg, os.pidfd_open, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP
        runpy.run_path({str(chapter_path(8))!r})
        sys.exit("openai" in sys.modules)"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- The two servers ---


@pytest.mark.asyncio
async def test_only_text_files_below_the_root_are_read(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    (root / "gpu.py").write_text("GPU = 1\n")
    (root / "data").write_bytes(b"\xff")
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    async with chapter.connect({"files": chapter.files_server(root)}) as hub:

        async def read(path: str) -> str:
            return str(chapter.result_text(await hub.call("files", "read", {"path": path})))

        assert await read("gpu.py") == "GPU = 1\n"
        for path in ("../secret", "link", str(tmp_path / "secret")):
            assert f"{path!r} is outside the root: use a path below it" in await read(path)
        for path in ("data", ".", "no such file", "a\0b"):
            assert f"cannot read {path!r}: " in await read(path)
