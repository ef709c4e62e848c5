"""Chapter 08: the hub against real processes that behave, die, hang, and will not die.

Most servers here are QUICK below: a real child process that speaks MCP without the SDK, and so
starts in 30 ms instead of 600. Look at its words to see in which ways it can misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import mcp.client.stdio
import mcp.shared.jsonrpc_dispatcher
import pytest
import uvicorn
from conftest import chapter_path, child_processes, load_chapter, open_descriptors
from contract import ASYNC_WAYS, Subject, Way
from mcp import Client, MCPError, StdioServerParameters
from mcp.types import CONNECTION_CLOSED

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
    subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
for word in words:
    if word.startswith("once="):  # works the first time; crashes when it is started again
        if os.path.exists(word[5:]):
            sys.exit("not again")
        open(word[5:], "w").close()
    if word.startswith("meets="):  # answers no one until so many others have come, too
        folder, number = word[6:].split(",")
        open(os.path.join(folder, str(os.getpid())), "w").close()
        while len(os.listdir(folder)) < int(number):
            time.sleep(0.002)

def reply(request, **answer):
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)

for line in sys.stdin:
    request = json.loads(line)
    method = request["method"]
    if f"silent-at={method}" in words:
        if "tells" in words:
            print("silent", file=sys.stderr, flush=True)
        continue
    if "id" not in request:
        continue
    if f"dies-at={method}" in words:
        os._exit(3)
    if method == "initialize":
        info, version = {"name": "quick", "version": "1"}, "2025-11-25"
        result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        reply(request, result=result)
    elif method == "tools/list":
        page = request.get("params", {}).get("cursor")
        names = ["waits", "kills"] if page else ["echo", "pid", "dies"]
        tools = [{"name": name, "inputSchema": {"type": "object"}} for name in names]
        reply(request, result={"tools": tools} if page else {"tools": tools, "nextCursor": "2"})
    elif method == "tools/call":
        name, given = request["params"]["name"], request["params"].get("arguments")
        if name == "dies":
            print("so long", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        text = str(os.getpid()) if name == "pid" else json.dumps(given)
        if name == "waits":
            print("waiting", file=sys.stderr, flush=True)
            continue
        reply(request, result={"content": [{"type": "text", "text": text}]})
    else:
        reply(request, error={"code": -32601, "message": "no such method"})
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

    After the test no such server may be alive, whoever its parent is by then.
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
        try:
            if wanted(int(entry.name)):
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile
    return found


def commands(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def group_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[2])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK gives a server 0.1 s each to heed end-of-input and SIGTERM, instead of 2 s."""
    monkeypatch.setattr(mcp.client.stdio, "PROCESS_TERMINATION_TIMEOUT", 0.1)
    monkeypatch.setattr(mcp.client.stdio, "FORCE_KILL_TIMEOUT", 0.1)


def left() -> dict[Any, str]:
    """What a hub may leave behind: descriptors and children."""
    return {**open_descriptors(), **{f"pid {pid}": what for pid, what in child_processes().items()}}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the servers of a test say on stderr, line by line."""
    lines: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("mcp_hub"), Listening()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


async def turns(number: int) -> None:
    """Let the event loop go round."""
    for _turn in range(number):
        await asyncio.sleep(0)


def unread(port: int) -> bool:
    """Whether bytes have arrived at a local port that its process has not read."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [row[4].split(":")[1] for row in rows if row[1].endswith(f":{port:04X}")]
    return any(int(queue, 16) for queue in queues)


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something that will come; not at all if it has."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def text_of(result: Any) -> str:
    return str(chapter.text_of(result))


# --- Configuration ---


def written(folder: Path, document: object) -> Path:
    path = folder / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_hosts_file_is_read_and_its_own_keys_are_passed_over(tmp_path: Path) -> None:
    servers = {
        "a": {"command": "x", "args": ["1"], "env": {"K": "v"}, "cwd": "/", "restart": True},
        "b": {"url": "http://localhost:8000/mcp", "required": False, "disabled": False},
        "c": {"type": "sse", "url": "https://example.org/sse"},
    }
    a, b, c = chapter.load_config(
        written(tmp_path, {"mcpServers": servers, "theme": "dark"})
    ).values()
    assert (a.command, a.args, a.env, a.cwd, a.restart) == ("x", ["1"], {"K": "v"}, "/", True)
    assert (a.required, b.required, b.restart) == (True, False, False)
    assert (str(b.url), c.type) == ("http://localhost:8000/mcp", "sse")
    with pytest.raises(AttributeError):
        a.command = "y"


BAD = {
    "not JSON": ("{", ["mcp.json", "Invalid JSON", "line 1"]),
    "not an object": ("[]", ["mcp.json"]),
    "no servers": ({"servers": {}}, ["mcpServers", "required"]),
    "servers not an object": ({"mcpServers": []}, ["mcpServers", "object", "not []"]),
    "server not an object": ({"mcpServers": {"git": 3}}, ["mcpServers.git", "object", "not 3"]),
    "command": ({"mcpServers": {"git": {"command": 3}}}, ["git.command", "string", "not 3"]),
    "args": ({"mcpServers": {"git": {"command": "x", "args": "y"}}}, ["git.args", "not 'y'"]),
    "an argument": ({"mcpServers": {"git": {"command": "x", "args": [7]}}}, ["git.args.0", "7"]),
    "env": ({"mcpServers": {"git": {"command": "x", "env": {"K": 1}}}}, ["git.env.K", "string"]),
    "cwd": ({"mcpServers": {"git": {"command": "x", "cwd": []}}}, ["git.cwd", "string"]),
    "required": ({"mcpServers": {"git": {"command": "x", "required": 1}}}, ["git.required", "1"]),
    "restart": ({"mcpServers": {"git": {"command": "x", "restart": "no"}}}, ["git.restart"]),
    "url": ({"mcpServers": {"git": {"url": "localhost:80"}}}, ["git.url", "localhost:80"]),
    "port": ({"mcpServers": {"git": {"url": "http://localhost:x/"}}}, ["git.url", "port"]),
    "type": ({"mcpServers": {"git": {"url": "http://h/", "type": "ws"}}}, ["git.type", "'ws'"]),
    "neither": ({"mcpServers": {"git": {}}}, ["git", "either a command"]),
    "both": ({"mcpServers": {"git": {"command": "x", "url": "http://h/"}}}, ["git", "either"]),
}


@pytest.mark.parametrize(("document", "words"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_one_line_that_names_file_server_and_key(
    tmp_path: Path, document: object, words: list[str]
) -> None:
    path = written(tmp_path, document)
    with pytest.raises(chapter.ConfigError) as caught:
        chapter.load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_configuration_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(chapter.ConfigError, match=r"none\.json: No such file"):
        chapter.load_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"command": "no-such-program"}, "MCP server 'git' did not start: No such file"),
        ({"command": 3}, "mcpServers.git.command: Input should be a valid string, not 3"),
    ],
)
def test_on_the_command_line_a_bad_configuration_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    entry: object,
    words: str,
) -> None:
    path = written(tmp_path, {"mcpServers": {"git": entry}})
    monkeypatch.setattr(sys, "argv", ["08_local_mcp_integration.py", "--config", str(path)])
    with pytest.raises(SystemExit) as left_by:
        chapter.main()
    assert left_by.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# --- The contract ---


class Opened:
    """Opens hubs; the oracle tells what is there that was not there before the first of them."""

    def __init__(self, **servers: Any) -> None:
        self.servers = servers
        self.before: dict[Any, str] | None = None

    def hub(self, **options: Any) -> Any:
        if self.before is None:  # here, since the event loop has descriptors of its own
            self.before = left()
        return chapter.connect(self.servers, **options)

    def leaks(self) -> object:
        before = self.before
        return None if before is None else {k: v for k, v in left().items() if k not in before}


async def echo(hub: Any) -> None:
    assert text_of(await hub.call("a", "echo", {"n": 1})) == '{"n": 1}'


@contextmanager
def command_of(config: Any, command: str) -> Iterator[None]:
    """Have a server's configuration name another program for a while."""
    before = config.command
    object.__setattr__(config, "command", command)
    try:
        yield
    finally:
        object.__setattr__(config, "command", before)


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
def test_the_hub_keeps_the_cleanup_contract(way: Way, quick: Quick) -> None:
    opened = Opened(a=quick(), b=(other := quick()))
    way(
        Subject(
            open=opened.hub,
            leaks=opened.leaks,
            use=echo,
            closed_error=ServerError,
            setup_faults=[
                lambda: command_of(other, "/no/such/program"),
                lambda: command_of(other, "false"),
            ],
        )
    )


# --- Starting ---


@pytest.mark.asyncio
async def test_servers_start_at_the_same_time(quick: Quick, tmp_path: Path) -> None:
    """None of them answers before all three run: in turn, the first would never be ready."""
    servers = {name: quick(f"meets={tmp_path},3") for name in "abc"}
    async with chapter.connect(servers) as hub:
        assert {status.state for status in hub.statuses.values()} == {"ready"}


@pytest.mark.asyncio
async def test_the_status_tells_pid_tools_and_start_up_time(quick: Quick) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        for name, status in hub.statuses.items():
            assert (status.name, status.state, status.error) == (name, "ready", "")
            assert status.pid == int(text_of(await hub.call(name, "pid")))
            assert status.startup > 0
        assert hub.statuses["a"].pid != hub.statuses["b"].pid
    assert {(s.state, s.pid) for s in hub.statuses.values()} == {("stopped", None)}


@pytest.mark.asyncio
async def test_tools_are_listed_to_the_last_page(quick: Quick) -> None:
    async with chapter.connect({"a": quick()}) as hub:
        assert [tool.name for tool in hub.tools["a"]] == ["echo", "pid", "dies", "waits", "kills"]
        assert hub.statuses["a"].tools == hub.tools["a"]


@pytest.mark.asyncio
async def test_every_change_of_status_is_told(quick: Quick) -> None:
    told: list[tuple[str, str]] = []
    servers = {"a": quick(), "b": quick("crashes", required=False)}
    async with chapter.connect(servers, on_change=lambda s: told.append((s.name, s.state))):
        pass
    assert sorted(told) == [("a", "ready"), ("a", "stopped"), ("b", "failed")]


@pytest.mark.asyncio
async def test_no_servers_at_all_are_a_hub_without_tools() -> None:
    async with chapter.connect({}) as hub:
        assert (hub.statuses, hub.tools, await hub.check()) == ({}, {}, {})


# In each case: how the server misbehaves, and what the user is told.
BAD_STARTS = {
    "missing program": (["command"], "No such file or directory: no-such-program"),
    "missing directory": (["cwd"], "No such file or directory: /no/such/folder"),
    "crash": (["crashes"], "ended by itself; its last words: no luck today"),
    "crash at discover": (["dies-at=server/discover"], "ended by itself"),
    "crash at initialize": (["dies-at=initialize"], "ended by itself"),
    "crash at tools/list": (["dies-at=tools/list"], "ended by itself"),
    "silent": (["silent-at=server/discover"], "was not ready within 0.2 s"),
    "silent at initialize": (["silent-at=initialize"], "was not ready within 0.2 s"),
    "silent at tools/list": (["silent-at=tools/list"], "was not ready within 0.2 s"),
    "silent and deaf": (
        ["silent-at=server/discover", "ignores-eof", "ignores-sigterm"],
        "was not ready within 0.2 s",
    ),
}
bad_starts = pytest.mark.parametrize(("words", "told"), BAD_STARTS.values(), ids=BAD_STARTS)


def bad(quick: Quick, words: list[str], **options: Any) -> Any:
    if words == ["command"]:
        return chapter.ServerConfig(command="no-such-program", **options)
    if words == ["cwd"]:
        return quick(cwd="/no/such/folder", **options)
    return quick(*words, **options)


@bad_starts
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_required_server_that_fails_is_named_and_the_others_are_stopped(
    quick: Quick, words: list[str], told: str
) -> None:
    before = left()
    seen: list[Any] = []
    servers = {"good": quick(), "bad": bad(quick, words)}
    timeout = 0.2 if "within" in told else 10.0
    with pytest.raises(ServerError) as caught:
        async with chapter.connect(servers, startup_timeout=timeout, on_change=seen.append):
            pytest.fail("was entered")
    assert str(caught.value) == f"MCP server 'bad' did not start: {told}"
    assert caught.value.server == "bad"
    assert seen[-1].name == "good"
    assert seen[-1].state == "stopped"
    assert left() == before


@bad_starts
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_without_an_optional_server_that_fails_the_work_goes_on(
    quick: Quick, words: list[str], told: str
) -> None:
    before = left()
    servers = {"a": quick(), "bad": bad(quick, words, required=False)}
    async with chapter.connect(servers, startup_timeout=0.2 if "within" in told else 10.0) as hub:
        await echo(hub)
        assert (hub.statuses["bad"].state, hub.statuses["bad"].error) == ("failed", told)
        assert list(hub.tools) == ["a"]
        with pytest.raises(ServerError, match=r"'bad' is failed: ") as caught:
            await hub.call("bad", "echo")
        assert str(caught.value).endswith(told)
        assert await hub.check() == {"bad": str(caught.value)}
    assert left() == before


@pytest.mark.asyncio
async def test_a_required_server_that_fails_is_told_before_the_others_are_ready(
    quick: Quick,
) -> None:
    servers = {"slow": quick("silent-at=initialize"), "bad": quick("crashes")}
    with pytest.raises(ServerError, match="'bad' did not start"):
        async with asyncio.timeout(8):
            async with chapter.connect(servers, startup_timeout=60):
                pytest.fail("was entered")


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21])
@pytest.mark.asyncio
async def test_cancelled_while_children_are_being_started(quick: Quick, turns: int) -> None:
    before = left()
    task = asyncio.create_task(anext(opened_forever({"a": quick(), "b": quick()})))
    for _turn in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == before


async def opened_forever(servers: Any) -> Any:
    async with chapter.connect(servers) as hub:
        yield hub
        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("method", ["server/discover", "initialize", "tools/list"])
@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_cancelled_at_each_question_of_the_start(
    quick: Quick, method: str, said: list[str]
) -> None:
    """Twice, the second time during the clean-up; and the server will not go by itself."""
    before = left()
    servers = {"a": quick(f"silent-at={method}", "tells", "ignores-eof", "ignores-sigterm")}
    task = asyncio.create_task(anext(opened_forever(servers)))
    await until(lambda: "silent" in said)
    task.cancel()
    await turns(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == before


# --- Calling ---


@pytest.mark.asyncio
async def test_unknown_servers_and_tools_are_answered_with_what_there_is(quick: Quick) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        with pytest.raises(ServerError, match=r"'c' is not known; there are: a, b$"):
            await hub.call("c", "echo")
        with pytest.raises(ServerError, match=r"'a' has no tool 'x'; it has: echo, pid, dies, "):
            await hub.call("a", "x")


@pytest.mark.asyncio
async def test_a_refusal_by_the_server_names_it(quick: Quick) -> None:
    async with chapter.connect({"a": quick()}) as hub:

        def refuse(client: Any) -> Any:
            return client.session.send_discover("2026-07-28")

        with pytest.raises(ServerError, match=r"'a' refused to say: no such method"):
            await hub._owners["a"].ask("to say", refuse, 5.0)
        await echo(hub)


@pytest.mark.asyncio
async def test_a_server_killed_in_a_call_is_named_and_the_others_go_on(quick: Quick) -> None:
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        with pytest.raises(
            ServerError, match=r"'b' died during tool 'dies'; it is lost$"
        ) as caught:
            await hub.call("b", "dies")
        assert caught.value.server == "b"
        assert hub.statuses["b"].state == "lost"
        assert list(hub.tools) == ["a"]
        await echo(hub)
        with pytest.raises(ServerError, match=r"'b' is lost: died during tool 'dies'"):
            await hub.call("b", "echo")
    assert hub.statuses["b"].state == "lost"


@pytest.mark.asyncio
async def test_every_call_under_way_learns_of_the_death(quick: Quick, said: list[str]) -> None:
    async with chapter.connect({"a": quick()}) as hub:
        calls = [asyncio.create_task(hub.call("a", "waits")) for _call in range(3)]
        await until(lambda: said.count("waiting") == 3)
        os.kill(hub.statuses["a"].pid, signal.SIGKILL)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, ServerError)
            assert "'a' died during tool 'waits'" in str(error)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("given", [{}, {"more than a pipe holds": "x" * 1_000_000}])
@pytest.mark.asyncio
async def test_a_stopped_server_is_an_error_at_the_deadline(
    quick: Quick, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp.shared.jsonrpc_dispatcher, "_ABANDON_WRITE_TIMEOUT", 0.1)
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


@pytest.mark.asyncio
async def test_a_server_that_missed_a_deadline_can_be_called_again(quick: Quick) -> None:
    async with chapter.connect({"a": quick()}, call_timeout=0.1) as hub:
        with pytest.raises(ServerError, match=r"did not answer tool 'waits' within 0.1 s"):
            await hub.call("a", "waits")
        await echo(hub)


@pytest.mark.asyncio
async def test_a_cancelled_call_leaves_the_server_usable(quick: Quick, said: list[str]) -> None:
    async with chapter.connect({"a": quick()}) as hub:
        call = asyncio.create_task(hub.call("a", "waits"))
        await until(lambda: "waiting" in said)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await echo(hub)


@pytest.mark.asyncio
async def test_a_server_is_restarted_once_where_its_configuration_says_so(quick: Quick) -> None:
    states: list[str] = []
    servers = {"a": quick(restart=True)}
    async with chapter.connect(servers, on_change=lambda s: states.append(s.state)) as hub:
        first = hub.statuses["a"].pid
        with pytest.raises(ServerError, match=r"died during tool 'dies'; it is restarting"):
            await hub.call("a", "dies")
        await echo(hub)  # waits until it is back
        assert hub.statuses["a"].pid != first
        assert hub.statuses["a"].error == ""
        with pytest.raises(ServerError, match=r"died during tool 'dies'; it is lost"):
            await hub.call("a", "dies")
    assert states == ["ready", "restarting", "starting", "ready", "lost"]


@pytest.mark.asyncio
async def test_a_restart_that_fails_is_told_to_those_who_wait(quick: Quick, tmp_path: Path) -> None:
    async with chapter.connect({"a": quick(f"once={tmp_path / 'was'}", restart=True)}) as hub:
        with pytest.raises(ServerError, match="it is restarting"):
            await hub.call("a", "dies")
        with pytest.raises(ServerError, match=r"'a' is failed: ended by itself; .* not again"):
            await hub.call("a", "echo")


@pytest.mark.asyncio
async def test_the_block_can_be_left_while_a_server_is_restarting(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chapter, "RESTART_DELAY", 60.0)
    async with chapter.connect({"a": quick(restart=True)}) as hub:
        with pytest.raises(ServerError, match="it is restarting"):
            await hub.call("a", "dies")
    assert hub.statuses["a"].state == "stopped"


@pytest.mark.asyncio
async def test_late_news_of_a_death_do_not_stop_the_server_that_took_its_place(
    quick: Quick,
) -> None:
    back = asyncio.Event()

    async def hear_late(client: Client) -> None:
        await back.wait()
        raise MCPError(CONNECTION_CLOSED, "Connection closed")

    async with chapter.connect({"a": quick(restart=True)}) as hub:
        late = asyncio.create_task(hub._owners["a"].ask("an old call", hear_late, 5.0))
        await asyncio.sleep(0)
        with pytest.raises(ServerError, match="it is restarting"):
            await hub.call("a", "dies")
        await echo(hub)
        back.set()
        with pytest.raises(ServerError, match="died during an old call; it is ready"):
            await late
        await echo(hub)


# --- What they say on stderr ---


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.getMessage()))


@pytest.mark.asyncio
async def test_stderr_is_logged_beside_the_servers_name(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, logger = Kept(), logging.getLogger("mcp_hub")
    monkeypatch.setattr(logger, "handlers", [kept])
    monkeypatch.setattr(logger, "level", logging.INFO)
    async with chapter.connect({"a": quick(), "b": quick()}) as hub:
        with pytest.raises(ServerError):
            await hub.call("b", "dies")
        await until(lambda: kept.lines)
    assert kept.lines == [("mcp_hub.b", "so long")]


@pytest.mark.parametrize("words", [[], ["silent-at=tools/list"], ["crashes"]])
@pytest.mark.asyncio
async def test_nobody_listens_to_stderr_any_more_when_the_block_was_left(
    quick: Quick, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    listened: list[int] = []
    add_reader = loop.add_reader

    def note(fd: Any, *rest: Any) -> None:
        listened.append(fd.fileno())
        add_reader(fd, *rest)

    monkeypatch.setattr(loop, "add_reader", note)
    with contextlib.suppress(ServerError):
        async with chapter.connect({"a": quick(*words)}, startup_timeout=0.2):
            pass
    assert listened
    assert [fd for fd in listened if loop.remove_reader(fd)] == []


@pytest.mark.asyncio
async def test_what_is_said_at_the_very_end_is_heard() -> None:
    with chapter.stderr_lines("a") as (stderr, lines):
        stderr.write("farewell")  # and the event loop has no turn any more
        stderr.flush()
    assert list(lines) == ["farewell"]


# --- Leaving ---


@pytest.mark.asyncio
async def test_no_server_outlives_the_block_not_even_one_that_ignores_sigterm(quick: Quick) -> None:
    """With the SDK's real patience: 2 s after end-of-input SIGTERM, 2 s later SIGKILL."""
    before = left()
    servers = {
        "good": quick(),
        "stubborn": quick("ignores-eof"),
        "deaf": quick("ignores-eof", "ignores-sigterm"),
        "stopped": quick(),
    }
    started = time.monotonic()
    async with chapter.connect(servers) as hub:
        os.kill(hub.statuses["stopped"].pid, signal.SIGSTOP)
    assert time.monotonic() - started < 9  # 4.5 s, and a slow machine
    assert left() == before


@pytest.mark.asyncio
async def test_what_a_server_has_started_does_not_outlive_it(quick: Quick) -> None:
    async with chapter.connect({"a": quick("spawns")}) as hub:
        leader = hub.statuses["a"].pid
        await until(lambda: len(processes(lambda pid: group_of(pid) == leader)) == 2)
    # A killed process that nobody waits for is init's to bury; it is gone or a zombie.
    await until(lambda: not processes(lambda p: group_of(p) == leader and bool(commands(p))))


async def leave_by(error: BaseException, config: Any) -> None:
    async with chapter.connect({"a": config}):
        raise error


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("words", [[], ["ignores-eof"], ["ignores-eof", "ignores-sigterm"]])
@pytest.mark.asyncio
async def test_what_the_body_raises_comes_out_as_itself(quick: Quick, words: list[str]) -> None:
    for error in (KeyError("mine"), asyncio.CancelledError("mine")):
        with pytest.raises(type(error)) as caught:
            await leave_by(error, quick(*words))
        assert caught.value is error


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("words", [[], ["ignores-eof"], ["ignores-eof", "ignores-sigterm"]])
@pytest.mark.asyncio
async def test_cancelled_again_and_again_while_leaving_it_still_ends_the_children(
    quick: Quick, words: list[str]
) -> None:
    before, inside = left(), asyncio.Event()

    async def block() -> None:
        async with chapter.connect({"a": quick(*words)}):
            inside.set()

    task = asyncio.create_task(block())
    await inside.wait()
    while not task.done():
        task.cancel()
        await turns(5)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_timeout_around_the_block_ends_the_children(quick: Quick) -> None:
    before = left()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            async with chapter.connect({"a": quick("ignores-eof")}) as hub:
                await hub.call("a", "waits")
    assert left() == before


@pytest.mark.asyncio
async def test_a_call_under_way_is_let_finish_and_new_ones_are_refused(
    quick: Quick, tmp_path: Path
) -> None:
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
async def test_when_the_body_fails_calls_under_way_are_not_waited_for(
    quick: Quick, said: list[str]
) -> None:
    with pytest.raises(KeyError):
        async with chapter.connect({"a": quick()}, call_timeout=60) as hub:
            late = asyncio.create_task(hub.call("a", "waits"))
            await until(lambda: "waiting" in said)
            raise KeyError
    with pytest.raises(ServerError, match="'a' was stopped during tool 'waits'"):
        await late
    with pytest.raises(ServerError, match="'a' takes no calls any more: its hub is closed"):
        await hub.call("a", "echo")


@pytest.mark.asyncio
async def test_it_may_be_left_in_another_task_than_it_was_entered_in(quick: Quick) -> None:
    before = left()
    manager = chapter.connect({"a": quick()})
    hub = await asyncio.create_task(manager.__aenter__())
    await echo(hub)
    await asyncio.create_task(manager.__aexit__(None, None, None))
    assert left() == before


@pytest.mark.asyncio
async def test_two_hubs_started_together_keep_their_children_apart(quick: Quick) -> None:
    """A process id is known by its stderr, not guessed: else one hub would kill the other's."""
    first, second = chapter.connect({"a": quick()}), chapter.connect({"a": quick()})
    one, two = await asyncio.gather(first.__aenter__(), second.__aenter__())
    assert one.statuses["a"].pid == int(text_of(await one.call("a", "pid")))
    await first.__aexit__(None, None, None)
    await echo(two)
    await second.__aexit__(None, None, None)


# --- Ctrl-C, for real ---

PROGRAM = """\
import asyncio, sys
import mcp.client.stdio
mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT = mcp.client.stdio.FORCE_KILL_TIMEOUT = 0.2
sys.path.insert(0, {tests!r})
from conftest import load_chapter
chapter = load_chapter(8)

def server(*words):
    return chapter.ServerConfig(command=sys.executable, args=["-S", "-E", {quick!r}, *words])

async def main():
    stubborn = ("ignores-eof", "ignores-sigterm")
    start = [{when!r} == "start" and "silent-at=tools/list"]
    servers = {{"a": server(*stubborn, *filter(None, start)), "b": server("ignores-eof")}}
    if {when!r} == "start":
        print("ready", flush=True)
    async with chapter.connect(servers) as hub:
        if {when!r} == "call":
            asyncio.get_running_loop().call_later(0.05, lambda: print("ready", flush=True))
            await hub.call("a", "waits")
    print("not interrupted")

class Tell(chapter.McpHub):
    async def _drain(self):
        await super()._drain()
        if {when!r} == "exit":
            asyncio.get_running_loop().call_later(0.05, lambda: print("ready", flush=True))

chapter.McpHub = Tell
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("when", "presses"), [("start", 1), ("call", 1), ("exit", 1), ("exit", 2)])
@pytest.mark.usefixtures("quick")  # which sees to it that no server is left
def test_ctrl_c_ends_the_children(when: str, presses: int, quick_path: Path) -> None:
    program = PROGRAM.format(when=when, quick=str(quick_path), tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
        for _press in range(presses):
            poll(lambda: waits(run.pid))
            run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=20)
    assert (run.returncode, output) == (130, "")
    # The second press ends the event loop at once; then asyncio may say what it could not close.
    assert errors == "" or presses == 2


def poll(happened: Callable[[], object], deadline: float = 10.0) -> None:
    """Look again and again for something that happens in another process."""
    end = time.monotonic() + deadline
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def waits(pid: int) -> bool:
    """Whether a process has taken the signals that it was sent, and sleeps."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return status["State"].startswith("S") and not int(status["ShdPnd"], 16)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_polite_kill_and_a_closed_terminal_are_taken_as_ctrl_c(
    name: str, quick: Quick, quick_path: Path, tmp_path: Path
) -> None:
    silent = ["-S", "-E", str(quick_path), "silent-at=tools/list"]
    config = tmp_path / "mcp.json"
    config.write_text(
        json.dumps({"mcpServers": {"a": {"command": sys.executable, "args": silent}}})
    )
    command = [sys.executable, str(chapter_path(8)), "--config", str(config)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as run:
        poll(lambda: processes(lambda pid: str(quick_path) in commands(pid)))
        run.send_signal(getattr(signal, name))
        output, errors = run.communicate(timeout=20)
    assert (run.returncode, errors) == (130, "")
    assert "Children left: none" in output


def test_the_handlers_of_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt), chapter.polite_ends_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


# --- Our own servers ---


@pytest.mark.asyncio
async def test_notes_are_kept_found_and_listed(tmp_path: Path) -> None:
    database = tmp_path / "notes.db"
    for text in ("pool.py is small", "Buy 100% milk"):
        async with chapter.connect({"notes": chapter.notes_server(database)}) as hub:
            await hub.call("notes", "add", {"text": text})
    async with chapter.connect({"notes": chapter.notes_server(database)}) as hub:
        assert text_of(await hub.call("notes", "list")) == "pool.py is small\nBuy 100% milk"
        assert (
            text_of(await hub.call("notes", "search", {"words": "POOL.py"})) == "pool.py is small"
        )
        assert text_of(await hub.call("notes", "search", {"words": "%"})) == "Buy 100% milk"
        assert text_of(await hub.call("notes", "search", {"words": "_"})) == ""


@pytest.mark.parametrize("name", ["notes", "files"])
@pytest.mark.asyncio
async def test_a_servers_lifespan_opens_its_resource_and_closes_it(
    tmp_path: Path, name: str
) -> None:
    where = {"notes": tmp_path / "notes.db", "files": tmp_path}[name]
    before = open_descriptors()
    async with chapter.connect({name: chapter.SERVERS[name](where)}):
        opened = {k: path for k, path in open_descriptors().items() if k not in before}
        assert str(where) in opened.values()
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["notes", "files"])
@pytest.mark.asyncio
async def test_a_server_whose_resource_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    server = chapter.SERVERS[name](tmp_path / "no" / "such" / "place")
    with pytest.raises(ServerError, match=f"{name!r} did not start: "):
        async with chapter.connect({name: server}):
            pytest.fail("was entered")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project to serve, and beside it something that is not to be served."""
    project = tmp_path / "project"
    (project / "lib").mkdir(parents=True)
    (project / ".git").mkdir()
    (project / ".git" / "config").write_text("hidden")
    (project / "pool.py").write_text("pass\n")
    (project / "lib" / "gpu.py").write_text("GPU = 1\n")
    (project / "image.png").write_bytes(b"\x89PNG\xff")
    (project / "inside").symlink_to("lib/gpu.py")
    (tmp_path / "secret").write_text("secret")
    (project / "outside").symlink_to("../secret")
    (project / "up").symlink_to("..")
    (tmp_path / "project-2").mkdir()
    (tmp_path / "project-2" / "secret").write_text("secret")
    return project


@pytest.mark.asyncio
async def test_files_below_the_root_are_listed_and_read(project: Path) -> None:
    async with chapter.connect({"files": chapter.files_server(project)}) as hub:
        listed = text_of(await hub.call("files", "list")).splitlines()
        assert {"lib/gpu.py", "pool.py"} <= set(listed)
        assert not any(path.startswith(".git") for path in listed)
        assert text_of(await hub.call("files", "read", {"path": "lib/gpu.py"})) == "GPU = 1"
        assert text_of(await hub.call("files", "read", {"path": "lib/../pool.py"})) == "pass"
        assert text_of(await hub.call("files", "read", {"path": "inside"})) == "GPU = 1"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("../secret", "leads outside the root"),
        ("/etc/hostname", "leads outside the root"),
        ("../project-2/secret", "leads outside the root"),
        ("outside", "leads outside the root"),
        ("up/secret", "leads outside the root"),
        ("none.py", "cannot be read"),
        ("lib", "cannot be read"),
        ("image.png", "cannot be read"),
        ("nul\0byte", "cannot be read"),
    ],
)
@pytest.mark.asyncio
async def test_what_is_not_a_text_file_below_the_root_is_refused(
    project: Path, path: str, told: str
) -> None:
    before = open_descriptors()
    async with chapter.connect({"files": chapter.files_server(project)}) as hub:
        result = await hub.call("files", "read", {"path": path})
        assert result.is_error
        assert told in text_of(result)
        assert "secret" not in text_of(result).replace(repr(path), "")
    assert open_descriptors() == before


@pytest.mark.asyncio
async def test_a_file_that_becomes_a_symlink_after_the_check_is_not_followed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Path.is_relative_to

    def swap_after_check(path: Path, top: Path) -> bool:
        inside = check(path, top)
        path.unlink()
        path.symlink_to("../secret")
        return inside

    async with chapter.connect({"files": chapter.files_server(project)}) as hub:
        monkeypatch.setattr(Path, "is_relative_to", swap_after_check)
        result = await hub.call("files", "read", {"path": "pool.py"})
        monkeypatch.undo()
    assert result.is_error
    assert "cannot be read" in text_of(result)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["songs", "x"], "invalid choice: 'songs'"),
        (["notes"], "required: where"),
        (["notes", "x", "--http", "y"], "invalid int value: 'y'"),
    ],
)
def test_a_bad_serve_command_says_what_is_wrong_and_ends_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as left_by:
        chapter.serve(arguments)
    error = capsys.readouterr().err
    assert left_by.value.code == 2
    assert told in error.splitlines()[-1]


def test_ctrl_c_ends_a_server_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(server: Any, port: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chapter, "serve_http", interrupted)
    assert chapter.serve(["files", str(tmp_path), "--http", "0"]) == 130


# --- Over HTTP ---


@asynccontextmanager
async def http(app: Any) -> AsyncIterator[str]:
    """Serve an ASGI app on loopback, from this very loop; yields its address."""
    others = asyncio.all_tasks()
    config = uvicorn.Config(app, ws="none", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
            for watcher in asyncio.all_tasks() - others:  # sse_starlette's, which it never ends
                watcher.cancel()


@pytest.mark.parametrize("kind", ["http", "sse"])
@pytest.mark.asyncio
async def test_a_service_is_reached_by_its_url(tmp_path: Path, kind: str) -> None:
    server = chapter.notes_server(tmp_path / "notes.db")
    app = server.streamable_http_app() if kind == "http" else server.sse_app()
    async with http(app) as address:
        url = f"{address}/{'mcp' if kind == 'http' else 'sse'}"
        path = written(tmp_path, {"mcpServers": {"notes": {"type": kind, "url": url}}})
        async with chapter.connect(chapter.load_config(path)) as hub:
            await hub.call("notes", "add", {"text": "from afar"})
            assert text_of(await hub.call("notes", "list")) == "from afar"
            assert (await hub.check(), hub.statuses["notes"].pid) == ({}, None)


@pytest.mark.parametrize("kind", ["http", "sse"])
@pytest.mark.asyncio
async def test_a_service_that_is_not_there_is_named(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    before = left()
    with pytest.raises(ServerError, match="'a' did not start: ConnectError: All connection"):
        async with chapter.connect({"a": chapter.ServerConfig(url=url, type=kind)}):
            pytest.fail("was entered")
    assert left() == before


@pytest.mark.asyncio
async def test_a_service_killed_in_a_call_is_named_and_the_others_go_on(
    quick: Quick, tmp_path: Path
) -> None:
    with chapter.http_service("notes", tmp_path / "notes.db") as url:
        address = url()
        servers = {"notes": chapter.ServerConfig(url=address), "a": quick()}
        async with chapter.connect(servers) as hub:
            await hub.call("notes", "add", {"text": "soon gone"})
            (service,) = processes(lambda pid: str(tmp_path / "notes.db") in commands(pid))
            os.kill(service, signal.SIGSTOP)
            call = asyncio.create_task(hub.call("notes", "list"))
            await until(lambda: unread(address.port))  # it has the call, and will not answer it
            os.kill(service, signal.SIGKILL)
            with pytest.raises(ServerError, match="'notes' died during tool 'list'; it is lost"):
                await call
            await echo(hub)


SLOW_SERVICE = """\
import asyncio, contextlib, sys
from pathlib import Path
from mcp.server import MCPServer
sys.path.insert(0, {tests!r})
from conftest import load_chapter

folder = Path({folder!r})

@contextlib.asynccontextmanager
async def lifespan(server):
    yield
    (folder / "closed").touch()

server = MCPServer("slow", lifespan=lifespan, log_level="WARNING")

@server.tool()
async def wait() -> str:
    (folder / "asked").touch()
    while not (folder / "go").exists():
        await asyncio.sleep(0.005)
    return "answered"

asyncio.run(load_chapter(8).serve_http(server, 0))
"""


def test_a_service_that_is_told_to_end_answers_first_and_closes_its_lifespan(
    tmp_path: Path,
) -> None:
    async def end_it_in_a_call(service: subprocess.Popen[str], url: str) -> str:
        config = chapter.ServerConfig(url=url)
        async with chapter.connect({"slow": config}) as hub:
            call = asyncio.create_task(hub.call("slow", "wait"))
            await until((tmp_path / "asked").exists)
            service.terminate()
            (tmp_path / "go").touch()
            return text_of(await call)

    program = SLOW_SERVICE.format(folder=str(tmp_path), tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout
        url = service.stdout.readline().strip()
        assert asyncio.run(end_it_in_a_call(service, url)) == "answered"
    assert (tmp_path / "closed").exists()


# --- All four, for real; and npm's ---


@pytest.mark.asyncio
async def test_all_four_servers_run_from_one_file_and_do_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = left()
    with chapter.workspace() as folder:
        async with chapter.connect(chapter.load_config(folder / "mcp.json")) as hub:
            await chapter.workflow(hub, folder / "project")
            await chapter.workflow(hub, folder / "project")
            notes = text_of(await hub.call("notes", "list")).splitlines()
            assert await hub.check() == {}
            tools = {name: len(tools) for name, tools in hub.tools.items()}
    assert notes == [
        "note 1 on pool.py: 2 lines; Message: Hand out GPUs",
        "note 2 on pool.py: 2 lines; Message: Hand out GPUs",
    ]
    assert (tools["notes"], tools["files"]) == (3, 2)
    assert tools["git"] > 2
    assert left() == before


def npm_server(name: str) -> str:
    """The program of an npm server; in $MCP_NODE_MODULES, or installed globally."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = os.environ.get("MCP_NODE_MODULES") or npm_root()
    program = Path(folder, "@modelcontextprotocol", name, "dist", "index.js")
    if not program.exists():
        pytest.skip(f"@modelcontextprotocol/{name} is not installed: npm install -g it")
    return str(program)


@functools.cache
def npm_root() -> str:
    listed = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True)
    return listed.stdout.strip()


@pytest.mark.asyncio
async def test_npms_servers_work_over_stdio(project: Path) -> None:
    servers = {
        "everything": {"command": "node", "args": [npm_server("server-everything"), "stdio"]},
        "files": {"command": "node", "args": [npm_server("server-filesystem"), str(project)]},
    }
    before = left()
    config = chapter.load_config(written(project.parent, {"mcpServers": servers}))
    async with chapter.connect(config) as hub:
        assert "hello" in text_of(await hub.call("everything", "echo", {"message": "hello"}))
        path = {"path": str(project / "lib" / "gpu.py")}
        assert "GPU = 1" in text_of(await hub.call("files", "read_text_file", path))
    assert left() == before


@pytest.mark.asyncio
async def test_npms_everything_works_over_streamable_http(tmp_path: Path) -> None:
    program = npm_server("server-everything")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with node(program, PORT=str(port)):
        await until(lambda: listens(port))
        url = f"http://127.0.0.1:{port}/mcp"
        path = written(tmp_path, {"mcpServers": {"everything": {"url": url}}})
        async with chapter.connect(chapter.load_config(path)) as hub:
            assert "hello" in text_of(await hub.call("everything", "echo", {"message": "hello"}))


@contextmanager
def node(program: str, **variables: str) -> Iterator[None]:
    """Run an npm server that serves HTTP."""
    command = ["node", program, "streamableHttp"]
    with subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as service:
        try:
            yield
        finally:
            service.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- What the demos claim ---


def test_asyncio_run_does_not_return_while_a_client_is_not_left() -> None:
    script = [sys.executable, "-W", "error", chapter.__file__, "1"]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    shown = " ".join(run.stdout.split())
    assert re.search(r"`main` has returned. Children: \d+, \d+ ", shown)
    assert "✗ 0.2 s later `asyncio.run` has not returned." in shown
    assert "`asyncio.run` has returned, because the demo has killed the children." in shown
    assert run.stderr == ""


FORGETFUL = """\
import asyncio, sys
from mcp import Client, StdioServerParameters

async def main():
    await Client(StdioServerParameters(command=sys.executable, args={arguments!r})).__aenter__()
    print("ready", flush=True)
    raise KeyError("mine")

asyncio.run(main())
"""


@pytest.mark.usefixtures("quick")
def test_while_a_client_is_not_left_not_even_a_traceback_is_shown(quick_path: Path) -> None:
    program = FORGETFUL.format(arguments=["-S", "-E", str(quick_path), "ignores-eof"])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        assert run.stderr
        assert run.stdout.readline() == "ready\n"
        assert select.select([run.stderr], [], [], 0.3)[0] == []
        (server,) = processes(lambda pid: str(quick_path) in commands(pid) and pid != run.pid)
        os.kill(server, signal.SIGKILL)
        assert "KeyError: 'mine'" in run.communicate(timeout=20)[1]


def test_gather_around_a_stack_fails_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    chapter.demo_gather()
    shown = " ".join(capsys.readouterr().out.split())
    assert "? Which line raises? so far, so good" in shown
    assert "async with AsyncExitStack() as stack: 1 6" in shown
    assert "✗ RuntimeError: Attempted to exit cancel scope in a different task" in shown


@pytest.mark.asyncio
async def test_with_children_gather_fails_in_the_same_way(quick_path: Path) -> None:
    program = StdioServerParameters(command=sys.executable, args=["-S", "-E", str(quick_path)])
    with pytest.raises(RuntimeError, match="different task"):
        async with AsyncExitStack() as stack:
            clients = [Client(program) for _number in range(2)]
            await asyncio.gather(*map(stack.enter_async_context, clients))


def test_in_process_there_is_no_child(capsys: pytest.CaptureFixture[str]) -> None:
    chapter.demo_in_process()
    assert "Children: none. Found: kept in memory" in " ".join(capsys.readouterr().out.split())
