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
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
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
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult, ImageContent, TextContent, Tool
from openai import AsyncOpenAI
from waiting import until, until_sync

chapter: Any = load_chapter(8)
Config, ServerError = chapter.ServerConfig, chapter.ServerError
text_of = chapter.result_text
INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Quick = Callable[..., Any]
Said = Callable[[], list[str]]
Jump = Callable[..., Any]

QUICK = """\
import fcntl, json, os, signal, subprocess, sys, time

words = sys.argv[1:]
def say(word):
    os.write(2, f"{word}\\n".encode())

if "ignores-sigterm" in words:
    signal.signal(signal.SIGTERM, lambda *_signal: say("ignores-sigterm"))
if "crashes" in words:
    sys.exit("no luck at all\\n  | no luck today\\n  +------\\n")
if "spawns" in words:  # it holds all three pipes
    subprocess.Popen(["sleep", "NUMBER"])
if "daemon" in words:
    say(subprocess.Popen(["sleep", "NUMBER"], start_new_session=True).pid)

tools = [{"name": name, "inputSchema": {"type": "object"}} for name in
         "echo waits grows refuses lies babbles garbles quits get_current_time".split()]
tools[4]["outputSchema"] = {"type": "object", "required": ["truth"]}

def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

def call(name, arguments):
    text = json.dumps(arguments)
    if name == "waits":
        say("waiting")
        return {}
    elif name == "grows":
        tools.append({"name": "grown", "inputSchema": {"type": "object"}})
        send(method="notifications/tools/list_changed")
    elif name == "refuses":
        return {"error": {"code": -32000, "message": "not today"}}
    elif name == "garbles":
        os.write(1, b"\\xff is not a message\\n")
        say("x" * 200_000)  # more than a pipe holds: somebody must read it
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
        say("silent")
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
            answer["result"]["nextCursor"] = str(page + 1)
    elif method == "tools/call":
        answer = call(params["name"], params.get("arguments"))
    if "id" in request and answer:
        send(id=request["id"], **answer)
    if params.get("name") == "quits":
        os._exit(0)
if "farewell" in words:
    for _line in range(3000):  # more than a pipe holds
        send(method="notifications/farewell")
while "ignores-eof" in words:
    say("ignores-eof")
    time.sleep(1000)
"""
NUMBER = str(10**9 + os.getpid())  # in the command of each process that this file starts
QUICK = QUICK.replace("NUMBER", NUMBER)


@pytest.fixture(autouse=True)
def quick(monkeypatch: Patch) -> Iterator[Quick]:
    """Makes the configuration of a quick server that misbehaves in the given ways.

    It speaks the older protocol, so "auto" asks it once for the newer one in vain. It has 0.1 s
    each to heed the end of its input and SIGTERM, instead of 2 s. After the test no such server,
    and nothing that it has started, may be alive, and no pipe was closed while the loop watched it.
    A test that hangs shows where, and ends all.
    """
    closed, unregister = list[Any](), selectors.DefaultSelector.unregister

    def checked(selector: Any, descriptor: Any) -> Any:
        closed.extend({descriptor} - {*open_descriptors()})
        return unregister(selector, descriptor)

    monkeypatch.setattr(selectors.DefaultSelector, "unregister", checked)
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 0.1)
    monkeypatch.setattr("mcp.shared.jsonrpc_dispatcher._ABANDON_WRITE_TIMEOUT", 0.1)

    def config(*words: str, command: str = sys.executable, **options: Any) -> Any:
        args = ["-S", "-E", "-c", QUICK, *words]
        return Config(command=command, args=args, **options)

    # Sooner than pytest's own limit, in place of it; pytest lifts it after the last clean-up.
    faulthandler.dump_traceback_later(45, exit=True, file=sys.__stderr__ or 2)
    yield config
    until_sync(lambda: not any(NUMBER in command for command in commands()))
    assert not closed


def commands() -> list[str]:
    """The commands of all processes; one that has ended has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found.append(path.read_text(errors="replace"))
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Returns what servers say on stderr, and the hub's warnings, with the logger's name."""
    caplog.set_level("INFO", "mcp_hub")
    return lambda: [f"{name}: {text}" for name, _level, text in caplog.record_tuples]


@pytest.fixture
def jump(monkeypatch: Patch, said: Said) -> Jump:
    """Lets 31 s pass for the event loop each time that a server says the next of these words."""
    passed, real = 0.0, asyncio.BaseEventLoop.time
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: real(loop) + passed)

    @asynccontextmanager
    async def jumping(*words: str) -> AsyncIterator[None]:
        async def jump() -> None:
            nonlocal passed
            for word in words:
                await until(lambda: word in "".join(said()))  # noqa: B023
                passed += 31

        task = asyncio.create_task(jump())
        yield
        await task

    return jumping


async def echo(hub: Any, server: str = "a") -> None:
    assert text_of(await hub.call(server, "echo", {"n": 1})) == '{"n": 1}'


def test_a_hosts_file_is_read_and_filled_in(tmp_path: Path, said: Said, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOST", "example.org")
    servers = {
        "a": {"command": "${HOST}", "args": ["-h ${HOST}"], "env": {"K": "${HOST}"}, "cwd": "/"},
        "b": {"url": "http://${HOST}/mcp", "headers": {"K": "${HOST}"}, "required": False},
        "c": {"type": "sse", "url": "https://example.org/sse", "mode": "legacy", "argz": []},
        "off": {"command": "${NOT_SET}", "disabled": True},
    }
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers, "theme": "dark"}))
    args, variables = ["-h example.org"], {"K": "example.org"}
    assert chapter.load_config(path) == {
        "a": Config(command="example.org", args=args, env=variables, cwd="/"),
        "b": Config(url="http://example.org/mcp", headers=variables, required=False),
        "c": Config(type="sse", url="https://example.org/sse", mode="legacy"),
    }
    assert said() == [f"mcp_hub: {path}: mcpServers.c: unknown key 'argz'"]
    assert Config(command="${HOST}").command == "${HOST}"  # not from a file


# The entry of a server, or the whole file, and what the user is told.
BOTH = {"command": "x", "url": "http://h/", "env": {"K": "sk-secret"}}
BAD: dict[str, tuple[Any, str]] = {
    "no file": (None, "No such file"),
    "not JSON": ("{", "the file: Invalid JSON"),
    "server not an object": (3, "mcpServers.git: "),
    "command": ({"command": 3}, "git.command: Input should be a valid string, not 3"),
    "both": (BOTH, "git: there must be either a command"),
    "another host's": ('{"servers": {"K": "sk-secret"}}', "mcpServers: Field required"),
    "http command": ({"command": "x", "type": "http"}, "git: 'http' is not the type"),
    "unset": ({"command": "x", "args": ["${NOT_SET}"]}, "args.0: the environment variable NOT_SET"),
}


@pytest.mark.parametrize(("given", "told"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_one_line(tmp_path: Path, given: object, told: str) -> None:
    path = tmp_path / "mcp.json"
    if given is not None:
        document = given if isinstance(given, str) else json.dumps({"mcpServers": {"git": given}})
        path.write_text(document)
    with pytest.raises(chapter.ConfigError, match=f"^{path}: .*{told}.*$") as caught:
        chapter.load_config(path)
    assert "sk-secret" not in str(caught.value)


def slow_server(events: list[str], seconds: float = 0, starts: bool = True) -> MCPServer[Any]:
    """A server in this process whose lifespan awaits something when it ends."""

    @asynccontextmanager
    async def lifespan(server: Any) -> AsyncIterator[None]:
        events.append("opened")
        try:
            while not starts:
                await asyncio.Event().wait()
            yield
        finally:
            await asyncio.sleep(seconds)
            events.append("closed")

    return tools_server(lifespan)


@pytest.mark.parametrize("way", ASYNC_WAYS)
def test_the_hub_keeps_the_cleanup_contract(way: Way, quick: Quick) -> None:
    """With a child and a server in this process."""
    events, child = list[str](), quick(mode="legacy")
    servers = {"a": child, "b": slow_server(events)}
    broken = [partial(mock.patch.dict, vars(child), command=c) for c in ("/no/such", "false")]
    subject = Subject(
        open=lambda: chapter.connect(servers),
        leaks=lambda: child_processes() or events.count("opened") != events.count("closed"),
        use=echo,
        closed_error=ServerError,
        setup_faults=broken,
        cleanup_faults="a server that fails to end is given up or killed: that is no error",
    )
    way(subject)


# In each case: how the server misbehaves or is configured, and what the user is told, if anything.
LATE = r"was not ready within 60 s(; its last words: .*)?"
ENDLESS = "ValueError: its list of tools has no end: there is more after 100 pages"
STARTS: dict[str, tuple[str, Any, str]] = {
    "dies when probed": ("dies-at=server/discover ignores-eof", {}, ""),
    "silent when probed": ("silent-at=server/discover ignores-eof", {}, ""),
    "program": ("", {"command": "no-such-program"}, "No such file or directory: no-such-program"),
    "crash": ("crashes", {}, "ended; its last words: no luck today"),
    "dead at the second try": ("silent-at=server/discover dies-at=initialize", {}, "ended"),
    "silent": ("silent-at=initialize ignores-eof ignores-sigterm", {}, LATE),
    "endless list": ("endless", {}, ENDLESS),
}


@pytest.mark.parametrize(("words", "options", "told"), STARTS.values(), ids=STARTS)
@pytest.mark.asyncio
async def test_a_start_succeeds_with_the_older_protocol_or_is_named(
    quick: Quick, jump: Jump, words: str, options: Any, told: str
) -> None:
    def on_change(status: Any) -> None:
        logging.getLogger("mcp_hub").info(f"{status.name} is {status.state}")

    b = quick(*words.split(), required=False, **options)
    servers = {"a": quick(mode="legacy"), "b": b, "off": quick(disabled=True)}
    jumps = ["a is ready"] * (told is LATE) + ["silent"] * ("silent" in words)
    late = jump(*jumps)
    async with late, chapter.connect(servers, startup_timeout=60, on_change=on_change) as hub:
        await echo(hub)
        assert hub.statuses["a"].startup > 0
        if not told:
            await echo(hub, "b")
            return
        assert (hub.statuses["b"].state, list(hub.tools)) == ("failed", ["a"])
        with pytest.raises(ServerError) as caught:
            await hub.call("b", "echo")
        assert re.fullmatch(f"MCP server 'b' is failed: {told}", str(caught.value))
        assert await hub.check() == {"b": str(caught.value)}


@pytest.mark.asyncio
async def test_with_no_descriptor_left_connect_fails(quick: Quick) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first_free := os.dup(0))
    failed = 0
    for limit in range(first_free, first_free + 30):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            async with chapter.connect({"a": quick(mode="legacy")}):
                break
        except ServerError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 3 < failed < 30


# In each case: a tool and its arguments, or a request, and what the user is told.
BAD_CALLS: list[tuple[Any, Any, str]] = [
    ("x", {}, "has no tool 'x'; it has: echo, waits, "),
    ("refuses", {}, "failed at tool 'refuses': MCPError: not today"),  # with code -32000
    ("lies", {}, "failed at tool 'lies': RuntimeError: Invalid structured content"),
    ("waits", {}, "did not answer tool 'waits' within 30 s"),
    ("echo", {"text": "\ud800"}, "cannot be sent these arguments: Error serializing to JSON: "),
    ("echo", {1: 2}, "cannot be sent these arguments: Pydantic"),
    (mock.AsyncMock(side_effect=OSError), None, "failed at the request: OSError"),
    (lambda client: client.list_prompts(), None, "failed at the request: MCPError: no such method"),
]


@pytest.mark.asyncio
async def test_whatever_a_call_meets_is_a_server_error(quick: Quick, jump: Jump) -> None:
    async with jump("waiting"), chapter.connect({"a": quick(), "b": quick()}) as hub:
        for tool, arguments, told in BAD_CALLS:
            with pytest.raises(ServerError) as caught:
                await (hub.ask("a", tool) if arguments is None else hub.call("a", tool, arguments))
            assert str(caught.value).startswith(f"MCP server 'a' {told}")
            assert not str(caught.value).endswith(": ")
            copy = pickle.loads(pickle.dumps(caught.value))
            assert (str(copy), copy.server) == (str(caught.value), "a")
            await echo(hub)
        with pytest.raises(ServerError, match=r"'c' is not known; there are: a, b$"):
            await hub.call("c", "echo")


@pytest.mark.asyncio
async def test_odd_bytes_do_no_harm_and_the_last_answer_arrives(quick: Quick, said: Said) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        assert len(text_of(await hub.call("b", "quits"))) == 900_000
        await hub.call("a", "garbles")
        given = {"text": "\N{SNOWMAN}" * 1_000_000}  # more than a pipe holds
        assert json.loads(text_of(await hub.call("a", "echo", given))) == given
        page = await hub.ask("a", lambda client: client.list_tools(cursor="2"))
        assert [tool.name for tool in page.tools] == ["garbles", "quits", "get_current_time"]
    garbled = "mcp_hub.a: on stdout, but not a message: � is not a message"
    assert [line for line in said() if "xxx" not in line] == [garbled]


@pytest.mark.asyncio
async def test_a_lost_server_is_named(quick: Quick, monkeypatch: Patch) -> None:
    """It sends a line without an end. Each call under way learns of it."""
    monkeypatch.setattr(chapter, "LONGEST_LINE", 100_000)
    problem = "ended; its last words: a line on stdout has more than 100000 bytes"
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        calls = [hub.call("b", tool) for tool in ("waits", "waits", "babbles")]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert re.match(f"MCP server 'b' died during tool '.*': {problem}", str(error))
        assert list(hub.tools) == ["a"]
        await echo(hub)
        with pytest.raises(ServerError, match=f"'b' is lost: {problem}"):
            await hub.call("b", "echo")
    assert hub.statuses["b"].state == "lost"


@pytest.mark.parametrize("has_pidfd", [True, False])
@pytest.mark.asyncio
async def test_an_idle_death_is_noticed(quick: Quick, has_pidfd: bool, monkeypatch: Patch) -> None:
    """Even if a shell started it and its child holds the pipes. On Linux, its id is not freed."""
    changes, killed, killpg = list[Any](), list[Any](), os.killpg

    def kill(group: int, number: int) -> None:
        killed.append((group, not has_pidfd or group in child_processes()))
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", kill)
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    arguments = ["-c", 'exec "$0" "$@" 2>>/dev/null', sys.executable, *quick("spawns").args]
    servers = {"a": Config(command="sh", args=arguments)}
    async with chapter.connect(servers, on_change=changes.append) as hub:
        pid = hub.statuses["a"].pid
        os.kill(pid, KILL)
        await until(lambda: hub.statuses["a"].state == "lost")
    assert [(change.state, change.pid) for change in changes] == [("ready", pid), ("lost", None)]
    assert killed == [(pid, True)]


@pytest.mark.asyncio
async def test_a_stopped_server_is_an_error_at_the_deadline(quick: Quick) -> None:
    async with chapter.connect({"a": quick()}, call_timeout=0.2) as hub:
        os.kill(hub.statuses["a"].pid, signal.SIGSTOP)
        with pytest.raises(ServerError, match="'a' did not answer tool 'echo' within"):
            await hub.call("a", "echo", {"more than a pipe holds": "x" * 1_000_000})


def tools_server(lifespan: Any = None) -> MCPServer[Any]:
    """A server in this process, with tools that end in different ways."""
    server = MCPServer("tools", lifespan=lifespan, log_level="CRITICAL")
    both = asyncio.Barrier(2)

    async def echo(n: int = 0) -> str:
        return json.dumps({"n": n})

    async def meets() -> None:
        await both.wait()

    async def grows(context: Context[Any]) -> None:
        server.add_tool(lambda: "big", name="grown")
        await context.notify_tools_changed()

    for tool in (echo, meets, grows):
        server.add_tool(tool)
    return server


@pytest.mark.parametrize("kind", ["child", "mcp", "sse"])
@pytest.mark.asyncio
async def test_a_changed_list_is_fetched_again(quick: Quick, kind: str, monkeypatch: Patch) -> None:
    """By the older protocol and by the newer one, which may change before it is listened to."""
    server, changes, listen = tools_server(), list[Any](), chapter.Client.listen

    def late(client: Any, **options: Any) -> Any:
        server.add_tool(lambda: "early", name="early")
        return listen(client, **options)

    monkeypatch.setattr(chapter.Client, "listen", late)
    app = server.sse_app() if kind == "sse" else server.streamable_http_app()
    async with http(app) as port:
        service = Config(url=f"http://127.0.0.1:{port}/{kind}", type="sse" if kind == "sse" else "")
        servers = {"a": quick() if kind == "child" else service}
        async with chapter.connect(servers, on_change=changes.append) as hub:
            if kind == "mcp":
                await until(lambda: hub.tools["a"][-1].name == "early")
            await hub.call("a", "grows")
            await until(lambda: hub.tools["a"][-1].name == "grown")
    assert len(changes) == (4 if kind == "mcp" else 3)


# --- Leaving, also by real signals ---


@pytest.mark.asyncio
async def test_a_child_is_asked_to_end_first(quick: Quick, jump: Jump, monkeypatch: Patch) -> None:
    """By the end of its input, then by SIGTERM, and each time it is waited for."""
    monkeypatch.setattr(chapter, "EXIT_TIMEOUT", 30)
    for words, signals in (("farewell", [KILL]), ("ignores-eof ignores-sigterm", [TERM, KILL])):
        with mock.patch("os.killpg", wraps=os.killpg) as killed:
            limits = jump(*re.findall(r"ignores-\w+", words))
            async with limits, chapter.connect({"a": quick(*words.split())}):
                pass
        assert [call.args[1] for call in killed.call_args_list] == signals


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize(("seconds", "limit"), [(0.05, 10), (1000, 0.05)])
@pytest.mark.asyncio
async def test_a_lifespan_in_this_process_has_time_to_end(
    quick: Quick, starts: bool, seconds: float, limit: float, monkeypatch: Patch
) -> None:
    """Even if it is cancelled in its start, because another server failed."""
    monkeypatch.setattr(chapter, "LEAVE_TIMEOUT", limit)
    events: list[str] = []
    servers: Any = {"a": slow_server(events, seconds, starts)}
    servers |= {} if starts else {"b": quick("crashes")}
    error, told = (KeyError, "mine") if starts else (ServerError, "'b' .*; its last words: no luck")
    with pytest.raises(error, match=told):
        async with chapter.connect(servers, startup_timeout=1000):
            raise KeyError("mine")
    assert events == (["opened", "closed"] if seconds < limit else ["opened"])


@pytest.mark.asyncio
async def test_a_cancelled_scope_ends_servers_that_start(quick: Quick) -> None:
    """Even behind `cancelled_by_signals`. The contract cancels a block that was entered."""
    servers, changes = {"a": quick(), "b": quick("silent-at=tools/list")}, list[str]()

    def on_change(status: Any) -> None:
        changes.append(status.state)
        scope.cancel()

    with mock.patch("asyncio.wait", wraps=asyncio.wait) as wait, anyio.CancelScope() as scope:
        with chapter.cancelled_by_signals():
            async with chapter.connect(servers, on_change=on_change):
                pytest.fail("was entered")
    assert (scope.cancelled_caught, changes) == (True, ["ready", "stopped", "stopped"])
    assert wait.call_count < 20  # it has not turned in a circle


@pytest.mark.asyncio
async def test_a_call_may_finish_but_none_may_begin(quick: Quick, said: Said, jump: Jump) -> None:
    async def while_it_closes() -> None:
        await until(lambda: said() and quick_one.done())
        with pytest.raises(ServerError, match="'a' takes no calls any more: its hub is closed"):
            await hub.call("a", "echo")
        async with jump("waiting"):
            pass

    async with chapter.connect({"a": quick()}) as hub:
        late = asyncio.create_task(hub.call("a", "waits"))
        quick_one = asyncio.create_task(hub.call("a", "echo", {"n": 2}))
        refused = asyncio.create_task(while_it_closes())
        await asyncio.sleep(0)
    assert str(late.exception()).endswith("did not answer tool 'waits' within 30 s")
    assert text_of(quick_one.result()) == '{"n": 2}'
    await refused


@pytest.mark.asyncio
async def test_a_failing_body_waits_for_no_call_and_no_daemon(quick: Quick, said: Said) -> None:
    with pytest.raises(KeyError):
        async with chapter.connect({"a": quick("daemon")}, call_timeout=60) as hub:
            late = asyncio.create_task(hub.call("a", "waits"))
            await until(lambda: "mcp_hub.a: waiting" in said())
            raise KeyError
    os.kill(int(said()[0].split()[1]), KILL)  # the daemon holds the pipes, and is still there
    with pytest.raises(ServerError, match="'a' was stopped during tool 'waits'"):
        await late
    with pytest.raises(ServerError, match="its hub is closed"):
        await hub.call("a", "echo")


@pytest.mark.asyncio
async def test_another_task_may_leave_than_the_one_that_entered(quick: Quick) -> None:
    manager = chapter.connect({"a": quick()})
    await echo(await asyncio.create_task(manager.__aenter__()))
    await asyncio.create_task(manager.__aexit__(None, None, None))


def test_one_ctrl_c_does_no_harm_without_our_handler(quick: Quick) -> None:
    """asyncio.run then cancels its main task. A second Ctrl-C could strike anywhere."""

    async def main() -> None:
        async with chapter.connect({"a": quick("ignores-eof", "spawns")}) as hub:
            asyncio.get_running_loop().call_soon(signal.raise_signal, INT)
            await hub.call("a", "waits")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


# The case of "waiting" begins with SIGINT ignored, as in what a shell starts with `&`.
STRIKES = [("silent", [INT, INT]), ("silent", [HUP, TERM]), ("leaving", [INT, INT])]


@pytest.mark.parametrize(("moment", "signals"), [*STRIKES, ("waiting", [INT])])
def test_no_child_outlives_signals(quick: Quick, said: Said, moment: str, signals: Any) -> None:
    start = ["silent-at=tools/list"] if moment == "silent" else []
    stubborn = quick("ignores-eof", "ignores-sigterm", "spawns", *start)

    async def strike(task: Any) -> None:
        await until(lambda: f"mcp_hub.a: {moment}" in said())
        for number in signals:
            cancelled = task.cancelling()
            signal.raise_signal(number)
            await until(lambda: task.cancelling() > cancelled)  # noqa: B023

    async def main() -> None:
        striking = asyncio.create_task(strike(asyncio.current_task()))
        with pytest.raises(KeyboardInterrupt), chapter.cancelled_by_signals():
            async with chapter.connect({"a": stubborn, "b": quick("ignores-eof")}) as hub:
                if moment == "waiting":
                    await hub.call("a", "waits")
                logging.getLogger("mcp_hub.a").info("leaving")
            await asyncio.Event().wait()
        await striking

    usual = signal.getsignal(INT)
    try:
        signal.signal(INT, signal.SIG_IGN if moment == "waiting" else usual)
        before = [signal.getsignal(number) for number in (INT, TERM, HUP)]
        asyncio.run(main())
        assert [signal.getsignal(number) for number in (INT, TERM, HUP)] == before
    finally:
        signal.signal(INT, usual)
    assert not [line for line in said() if line.startswith("asyncio: ")]


@asynccontextmanager
async def http(app: Any = None, port: int = 0) -> AsyncIterator[int]:
    """Serve an ASGI app on loopback, from this very loop; yields its port."""
    app = app or tools_server().streamable_http_app()
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


@pytest.mark.parametrize(("status", "sent"), [(404, 2), (500, 1)])
@pytest.mark.asyncio
async def test_only_a_forgotten_session_resends(status: int, sent: int, monkeypatch: Patch) -> None:
    """Once. Each request has the headers, and the last one ends the session."""
    requests, calls, transport = list[Any](), list[Any](), chapter.streamable_http_client

    async def refuse(response: httpx2.Response) -> None:
        requests.append((response.request.method, response.request.headers["x-token"]))
        if b"tools/call" in response.request.content:
            calls.append(response)
            response.status_code = status

    def spied(url: str, http_client: httpx2.AsyncClient) -> Any:
        assert http_client.timeout.read == 300  # the SDK's own: a plain client waits for 5 s
        http_client.event_hooks["response"].insert(0, refuse)
        return transport(url, http_client=http_client)

    monkeypatch.setattr(chapter, "streamable_http_client", spied)
    async with http() as port:
        url = f"http://127.0.0.1:{port}/mcp"
        config = Config(url=url, mode="legacy", headers={"X-Token": "secret"})
        async with chapter.connect({"a": config}) as hub:
            with pytest.raises(ServerError, match="tool 'echo'"):
                await echo(hub)
    assert len(calls) == sent
    assert requests[-1] == ("DELETE", "secret")


@pytest.mark.asyncio
async def test_a_service_that_went_away_is_reached_again(quick: Quick) -> None:
    """By the same call if the service is back, but has forgotten our session."""
    changes: list[str] = []
    async with AsyncExitStack() as stack:
        async with http() as port:
            config = Config(url=f"http://127.0.0.1:{port}/mcp", mode="legacy")
            servers = {"a": config, "b": quick()}
            connected = chapter.connect(servers, on_change=lambda s: changes.append(s.state))
            hub = await stack.enter_async_context(connected)
        async with http(port=port):
            await echo(hub)
            assert hub.statuses["a"].state == "ready"
        for problem in ("died during tool 'echo'", "is failed"):
            with pytest.raises(ServerError, match=f"'a' {problem}: ConnectError: "):
                await echo(hub)
        await echo(hub, "b")
        async with http(port=port):
            assert await hub.check() == {}
            await echo(hub)
            await stack.aclose()
    forgotten, down = ["lost", "starting", "ready"], ["lost", "starting", "failed"]
    back = ["starting", "ready", "stopped", "stopped"]
    assert changes == ["ready", "ready", *forgotten, *down, *back]


# --- A model that uses the tools ---

ASKED = [{"role": "user", "content": "Go."}]
DONE = {"content": "Done."}


def asks(*calls: tuple[str, object]) -> dict[str, Any]:
    functions = [{"name": name, "arguments": given} for name, given in calls]
    numbered = enumerate(functions)
    return {"tool_calls": [{"id": f"c{n}", "type": "function", "function": f} for n, f in numbered]}


async def talk(*script: Any, hub: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Let a scripted model run the hub's tools. Return the new messages and the requests."""
    requests: list[Any] = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        requests.append(json.loads(request.content))
        reply = script[len(requests) - 1]
        if isinstance(reply, httpx2.Response):
            return reply
        choice = {"message": reply, "finish_reason": "stop"}
        return httpx2.Response(200, json={"choices": [choice]})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    async with AsyncOpenAI(api_key="-", base_url="http://x", http_client=http) as client:
        new = await chapter.run_with_tools(client, "m", ASKED, hub, **options)
    return new, requests


def stub(**tools: list[str]) -> Any:
    schema = {"type": "object"}
    listed = {n: [Tool(name=t, input_schema=schema) for t in ts] for n, ts in tools.items()}
    call = mock.AsyncMock(side_effect=ServerError("a", "died"))
    return mock.NonCallableMock(tools=listed, call=call)


def test_the_model_sees_valid_and_unique_names() -> None:
    hub = stub(**{"my notes": ["add"], "my_notes": ["add", "é.x"], "s" * 70: ["one", "two"]})
    named = chapter.chat_tools(hub)
    assert [tool.name for _server, tool in named.values()] == ["add", "add", "é.x", "one", "two"]
    assert list(named)[:3] == ["my_notes__add", "my_notes__add_2", "my_notes____x"]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in named)


@pytest.mark.asyncio
async def test_each_round_offers_the_tools_of_that_moment() -> None:
    """In the API's form. A dead server is reported to the model."""
    hub = stub()
    moments = [stub(a=["b"]).tools, stub(new=["c"]).tools]
    type(hub).tools = mock.PropertyMock(side_effect=moments)
    new, (first, second) = await talk(asks(("a__b", "{}")), DONE, hub=hub)
    empty = {"type": "object", "properties": {}}
    function = {"name": "a__b", "description": "", "parameters": empty}
    assert first["tools"] == [{"type": "function", "function": function}]
    assert [tool["function"]["name"] for tool in second["tools"]] == ["new__c"]
    assert new[1]["content"] == "Error: MCP server 'a' died"
    new, (request,) = await talk({"content": None, "refusal": "No."}, hub=stub())
    assert "tools" not in request
    assert new[0]["refusal"] == "No."


# What the model asks for in one reply, and what it is told.
ANSWERS: list[tuple[str, object, str]] = [
    ("t__meets", "", '{"result": null}'),  # it waits for the next one
    ("t__meets", "", '{"result": null}'),
    ("t__echo", "", '{"n": 0}'),
    ("t__ecco", "{}", "Error: no such tool; there are: t__echo, t__meets, .*"),
    ("t__echo", '{"n": "x', "Error: not a JSON object: Invalid JSON: EOF.*"),
    ("t__echo", r'{"n": "\ud800"}', "Error: not a JSON object.*"),
    ("t__echo", '{"n": "x"}', "Error: Error executing tool echo.*"),
]


def test_a_result_is_text_for_the_model() -> None:
    text = TextContent(type="text", text="half a character: \udc80")
    image = ImageContent(type="image", data="", mime_type="image/png")
    result = CallToolResult(content=[text, image], is_error=True)
    assert text_of(result) == "Error: half a character: ?\n[image left out]"


@pytest.mark.asyncio
async def test_tools_run_together_and_answers_come_in_order() -> None:
    reply = asks(*((name, given) for name, given, _told in ANSWERS)) | {"reasoning": "kept"}
    async with chapter.connect({"t": tools_server()}) as hub:
        new, requests = await talk(reply, DONE, hub=hub)
    assert new == [{"role": "assistant"} | reply, *new[1:-1], {"role": "assistant"} | DONE]
    for message, (_name, _given, told) in zip(new[1:-1], ANSWERS, strict=True):
        assert re.fullmatch(told, message["content"], re.DOTALL)
    assert [m["tool_call_id"] for m in new[1:-1]] == [call["id"] for call in reply["tool_calls"]]
    assert requests[1]["messages"] == [*ASKED, *new[:-1]]


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.asyncio
async def test_the_rounds_of_tools_are_limited(rounds: int) -> None:
    hub = stub(a=["b"])
    script = [asks(("a__b", "{}"))] * 9
    with pytest.raises(chapter.ReplyError, match=f"asked for tools more than {rounds} times"):
        await talk(*script, hub=hub, max_rounds=rounds)
    assert hub.call.await_count == rounds
    assert len(ASKED) == 1  # it can be sent again
    new, _requests = await talk(*script[:rounds], DONE, hub=hub, max_rounds=rounds)
    assert new[-1]["content"] == "Done."


BAD_REPLIES: list[Any] = [  # others: in test_hostile_endpoints.py
    httpx2.Response(200, text="[" * 99999),
    httpx2.Response(200, json={"choices": [{"message": {"content": "Half"}}]}),
    {"content": "x", "tool_calls": {"a": "b"}},
    {"tool_calls": [{"function": {"name": "a__b", "arguments": "{}"}}]},  # without id
]


@pytest.mark.parametrize("reply", BAD_REPLIES)
@pytest.mark.asyncio
async def test_a_reply_that_is_no_chat_completion_is_an_error(reply: Any) -> None:
    with pytest.raises(chapter.ReplyError, match="the reply is not"):
        await talk(asks(("a__b", "{}")), reply, hub=stub(a=["b"]))


# --- The demos and their servers ---

SHOWN = [
    r"✗ Children left by `forgotten`: \d+\. ✓ Children left by `connected`: none\.",
    r"✗ RuntimeError: Attempted to exit cancel scope in a different task .* ✓ no error",
    r"on_change │ time: lost: .* ✗ time: .* ✓ notes: .* ✓ files: .* ✗ search: .* ✓ Children",
    r"✗ `careless`: KeyError: 'notes__serch' .* ✓ .* 4, errors reported to the model: 2\.",
    r"✗ `by_client`: saved: none\. .* ✓ `by_hub`: saved: GPU 3 is hot\.",
]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_what_a_demo_shows(number: int, quick: Quick, monkeypatch: Patch, capsys: Capture) -> None:
    """A quick server stands in for the server of times, which test_scripts.py plays."""
    monkeypatch.setattr(chapter, "TIME", {"command": sys.executable, "args": quick().args})
    monkeypatch.setattr(sys, "argv", ["08.py", str(number)])
    assert chapter.main() == 0
    out = capsys.readouterr().out
    assert re.search(SHOWN[number - 1], " ".join(out.split())), out


def test_on_windows_the_script_ends_with_one_line(monkeypatch: Patch, capsys: Capture) -> None:
    """It can be imported there."""
    for name in ("os.killpg", "os.pidfd_open", "signal.SIGHUP", "signal.SIGKILL"):
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["08.py", "1"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(chapter_path(8)))["main"]()
    told = "08.py: Windows is left out: its event loop cannot watch a pipe\n"
    assert capsys.readouterr().err == told


@pytest.mark.asyncio
async def test_no_file_outside_the_root_is_read(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    async with chapter.connect({"files": chapter.files_server(root)}) as hub:
        for path in ("../secret", "link", str(tmp_path / "secret")):
            result = await hub.call("files", "read", {"path": path})
            assert "is outside the root: use a path below it" in text_of(result)
