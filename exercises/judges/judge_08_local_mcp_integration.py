"""What judges the exercises of chapter 08."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from judging import NotSolvedError, _, attempt, chapter, expect, keep_contract, task

TURNS = 25  # of the event loop, in which every task goes as far as it can
PATIENCE = 3.0  # seconds until something that waits is taken for something that hangs


async def settle() -> None:
    for _turn in range(TURNS):
        await asyncio.sleep(0)


def run_in_turns(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what never waits for real time; notice at once if it hangs."""

    async def main() -> None:
        running = asyncio.create_task(coroutine)
        for _times in range(20):
            await settle()
        if not running.done():
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()
                await asyncio.wait([each], timeout=0)
            expect(False, _("it ends"), _("it waits for ever"))
        running.result()

    asyncio.run(main())


def comes_out(error: BaseException | None) -> str:
    """Say in words what came out of a block, or should."""
    if error is None:
        return _("no exception comes out")
    return _("{error} comes out").format(error=repr(error))


# --- 1 ---


class FakeServers:
    """Servers that can be entered, and may fail then or later."""

    def __init__(self, *fail: str) -> None:
        self.fail = list(fail)  # such as "orders start" and "orders exit"
        self.error = OSError("it is down")
        self.log: list[str] = []
        self.open: list[str] = []
        self.stuck = ""  # the server that never gets ready

    def __getitem__(self, name: str) -> Callable[[], Any]:
        @asynccontextmanager
        async def server() -> AsyncIterator[str]:
            self.open.append(name)
            try:
                await asyncio.sleep(0)
                if name == self.stuck:
                    await asyncio.Event().wait()
                if f"{name} start" in self.fail:
                    raise self.error
                self.log.append(f"enter {name}")
                try:
                    yield f"client of {name}"
                finally:
                    self.log.append(f"exit {name}")
                    await asyncio.sleep(0)
                    if f"{name} exit" in self.fail:
                        raise self.error
            finally:
                self.open.remove(name)

        return server

    def all(self, *names: str) -> dict[str, Callable[[], Any]]:
        return {name: self[name] for name in names}


class Records(logging.Handler):
    """Keeps what is logged as a warning or an error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Keep what is logged, instead of printing it."""
    records = Records()
    root = logging.getLogger()
    root.addHandler(records)
    try:
        yield records.texts
    finally:
        root.removeHandler(records)


@task(
    "08.1",
    _("The report that nobody missed"),
    "connected",
    lesson="python 08_local_mcp_integration.py 3",
    hint=_(
        "The `except` is meant for a server that does not start. What else raises inside this "
        "`try`? And what is `name` then?"
    ),
    strong_hint=_(
        "Move the `try` into the loop, around `enter_async_context` and nothing else, and the "
        "`yield` out of it. Before `raise`, call `error.add_note(...)`."
    ),
)
def judge_connected(answer: Any) -> None:
    error = RuntimeError("orders died during the call")
    with attempt(_("three servers start; the block ends well")):
        run_in_turns(all_start(answer, None))
    with attempt(
        _("three servers start, the last one is optional; the block raises RuntimeError"),
        comes_out(error),
    ):
        run_in_turns(all_start(answer, error))
    for called, names in (
        (_("the last server is optional, and is down"), ("orders", "notes", "pictures")),
        (_("the first server is optional, and is down"), ("pictures", "orders", "notes")),
    ):
        with attempt(called, _("the block begins without it")):
            run_in_turns(optional_is_down(answer, names))
    with attempt(_("the second server is down, and it is not optional")):
        run_in_turns(required_is_down(answer))
    with attempt(_("the task is cancelled while the optional server starts")):
        run_in_turns(cancelled_in_start(answer))

    from contract import Subject

    def subject() -> Subject:
        servers = FakeServers()

        @contextmanager
        def failing(how: str) -> Iterator[BaseException]:
            servers.fail = [how]
            yield servers.error
            servers.fail = []

        return Subject(
            open=lambda: answer.connected(servers.all("orders", "pictures"), ["pictures"]),
            leaks=lambda: servers.open,
            setup_faults=[lambda: failing("orders start")],
            cleanup_faults=[lambda: failing("orders exit"), lambda: failing("pictures exit")],
        )

    with recorded():
        keep_contract(subject)


async def all_start(answer: Any, error: Exception | None) -> None:
    servers = FakeServers()
    came_out: BaseException | None = None
    with recorded() as warnings:
        try:
            targets = servers.all("orders", "notes", "pictures")
            async with answer.connected(targets, ["pictures"]) as clients:
                wanted = {name: f"client of {name}" for name in targets}
                expected = _("the value of the block is {value}").format(value=wanted)
                expect(clients == wanted, expected, _("it is {value}").format(value=clients))
                if error:
                    raise error
        except RuntimeError as caught:
            came_out = caught
    happened = comes_out(came_out)
    if error and came_out is None and warnings:
        happened = _("it disappears, and a warning is logged: {text}").format(text=warnings[0])
    expect(came_out is error, comes_out(error), happened)
    order = ", ".join(servers.log)
    right = "enter orders, enter notes, enter pictures, exit pictures, exit notes, exit orders"
    expect(order == right, right, order)


async def optional_is_down(answer: Any, names: tuple[str, ...]) -> None:
    servers = FakeServers("pictures start")
    with recorded() as warnings:
        async with answer.connected(servers.all(*names), ["pictures"]) as clients:
            wanted = {"orders": "client of orders", "notes": "client of notes"}
            expected = _("the value of the block is {value}").format(value=wanted)
            expect(clients == wanted, expected, _("it is {value}").format(value=clients))
    expect(
        not servers.open,
        _("afterwards, all are exited"),
        _("{names} is not exited").format(names=", ".join(servers.open)),
    )
    logged = (
        _("this is logged: {text}").format(text=warnings) if warnings else _("no warning is logged")
    )
    expected = _("a warning is logged that names `pictures`")
    expect(any("pictures" in text for text in warnings), expected, logged)


async def required_is_down(answer: Any) -> None:
    servers = FakeServers("notes start")
    came_out: BaseException | None = None
    began = False
    try:
        async with answer.connected(servers.all("orders", "notes", "pictures"), ["pictures"]):
            began = True
    except OSError as error:
        came_out = error
    expect(not began, _("the block does not begin"), _("it begins without the server"))
    expect(came_out is servers.error, comes_out(servers.error), comes_out(came_out))
    expected = _("the server before it is exited")
    expect("exit orders" in servers.log, expected, _("it is still open"))
    notes = getattr(came_out, "__notes__", [])
    happened = _("its notes are {notes}").format(notes=notes) if notes else _("it has no note")
    expected = _("the exception has a note that names `notes`")
    expect(any("notes" in note for note in notes), expected, happened)


async def cancelled_in_start(answer: Any) -> None:
    servers = FakeServers()
    servers.stuck = "pictures"

    async def use() -> None:
        async with answer.connected(servers.all("orders", "pictures", "notes"), ["pictures"]):
            pass

    with recorded():
        using = asyncio.create_task(use())
        await settle()
        using.cancel()
        await settle()
    stopped = using.done() and using.cancelled()
    expected = _("CancelledError propagates")
    expect(stopped, expected, _("it disappears, as if the server were only down"))
    expect(not servers.open, _("afterwards, all are exited"), _("one is still open"))


# --- 2 ---


@task(
    "08.2",
    _("Start a server, and leave no process behind"),
    "server_process",
    lesson="python 08_local_mcp_integration.py 1 3",
    hint=_(
        "`start_new_session=True` makes the process group, `os.killpg` signals "
        "it, and `server.wait(timeout)` raises TimeoutExpired. Which of your lines may raise, and "
        "which lines must run even then?"
    ),
    strong_hint=_(
        "In `finally`, put the three steps into a `try` whose own `finally` sends SIGKILL to the "
        "group, closes stdout and calls `wait()`. Closing stdin may raise BrokenPipeError, and "
        "`os.killpg` raises ProcessLookupError if nobody is left: both mean that all is well."
    ),
    seconds=10,  # less than a server needs to end by itself
)
def judge_server_process(answer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, time_limit():
        for called, error in (
            (_("a good server; the block ends well"), None),
            (_("a good server; the block raises ValueError"), ValueError("of the block")),
            (_("a good server; Ctrl-C in the block"), KeyboardInterrupt()),
        ):
            with attempt(called, comes_out(error)):
                good_server(answer, Path(folder), error)
        with attempt(_("a server that ignores the end of its input; grace=0.05")):
            deaf_server(answer, Path(folder))
        with attempt(_("a server that ignores SIGTERM, too; grace=0.05")):
            stubborn_server(answer, Path(folder))
        with attempt(_("a good server that leaves a child behind")):
            server_with_child(answer, Path(folder))
        with attempt(_("a server that has died in the block"), _("no exception comes out")):
            dead_server(answer, Path(folder))
        with attempt(_("a server that ignores all; Ctrl-C while you wait for its exit; grace=60")):
            interrupted_exit(answer, Path(folder))

    from contract import Subject

    def subject() -> Subject:
        started: list[Any] = []

        @contextmanager
        def one() -> Iterator[Any]:
            with answer.server_process(["cat"], 5.0) as server:
                started.append(server)
                yield server

        def talk(server: Any) -> None:
            print("hello", file=server.stdin, flush=True)
            assert server.stdout.readline() == "hello\n"

        return Subject(
            open=one,
            leaks=lambda: ["a server still runs" for each in started if each.returncode is None],
            use=talk,
            closed_error=ValueError,
            setup_faults="a program that cannot start leaves no process",
            cleanup_faults="servers that do not end are judged above",  # of a closed pipe
        )

    keep_contract(subject)


@contextmanager
def time_limit() -> Iterator[None]:
    """End an answer that waits for ever, so that its server can be ended, too."""

    def on_alarm(_number: int, _frame: object) -> None:
        for watch in Watch.open:
            watch.kill()
        raise NotSolvedError(_("it ends"), _("it waits for ever"))

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Watch:
    """A named pipe that a server and its children hold open for as long as one of them lives."""

    open: ClassVar[list[Watch]] = []

    def __init__(self, folder: Path) -> None:
        self.group = 0  # of the server, once it runs
        self.path = Path(tempfile.mkdtemp(dir=folder)) / "pipe"
        os.mkfifo(self.path)

    def __enter__(self) -> Watch:
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.open.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.open.remove(self)
        self.kill()
        os.close(self.descriptor)

    def kill(self) -> None:
        """End what the answer has left running."""
        if self.group and not self.all_ended(0):
            with suppress(OSError):
                os.killpg(self.group, signal.SIGKILL)

    def all_ended(self, seconds: float) -> bool:
        """Return whether all have ended, or do so within `seconds`."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(1000 * seconds))


def start(answer: Any, watch: Watch, script: str, grace: float) -> Any:
    """Make the manager for a server, a shell script that says hello."""
    hold = f"exec 9>{shlex.quote(str(watch.path))} 2>/dev/null"
    return answer.server_process(["sh", "-c", f"{hold}; {script}"], grace)


def hear(server: Any, watch: Watch) -> None:
    """Wait until the server says hello: now it runs, and holds the pipe."""
    watch.group = server.pid
    line = server.stdout.readline()
    expect(
        line == "hello\n",
        _("the server says hello on stdout"),
        _("it says {it}").format(it=repr(line)),
    )


def expect_ended(server: Any, watch: Watch, seconds: float = 1.0) -> None:
    """Expect that nothing is left of a server: no process, no zombie, no pipe."""
    if not watch.all_ended(seconds if server.returncode is not None else 0):
        if server.returncode is None:
            expect(False, _("afterwards, the server has ended"), _("it still runs"))
        expected = _("afterwards, its process group is empty")
        expect(False, expected, _("the server has ended, but its child still runs"))
    expected = _("you have waited for the server")
    expect(server.returncode is not None, expected, _("nobody has: it is a zombie"))
    for name in ("stdin", "stdout"):
        closed = getattr(server, name).closed
        expect(closed, _("{name} is closed").format(name=name), _("it is still open"))


def good_server(answer: Any, folder: Path, error: BaseException | None) -> None:
    """Run a server that saves its data at the end of its input, and exits."""
    came_out: BaseException | None = None
    with Watch(folder) as watch:
        saved = watch.path.with_name("saved")
        script = f"echo hello; cat >/dev/null; echo data >{shlex.quote(str(saved))}; exit 3"
        try:
            with start(answer, watch, script, 10.0) as server:
                hear(server, watch)
                own = os.getpgid(server.pid) == server.pid
                expected = _("the server has its own process group")
                expect(own, expected, _("it is in that of your program"))
                if error:
                    raise error
        except NotSolvedError:
            raise
        except (ValueError, KeyboardInterrupt) as caught:
            if caught is not error:
                raise
            came_out = caught
        expect_ended(server, watch)
        status = server.returncode
        killed = _("it is ended by {name} first")
        happened = killed.format(name=signal.Signals(-status).name) if status < 0 else ""
        expect(saved.exists(), _("the server saves its data"), happened or _("it saves nothing"))
        expect(status == 3, _("the server exits by itself"), happened or str(status))
    expect(came_out is error, comes_out(error), comes_out(came_out))


def deaf_server(answer: Any, folder: Path) -> None:
    """Run a server that ends only by SIGTERM, in order."""
    with Watch(folder) as watch:
        script = "trap 'exit 4' TERM; echo hello; sleep 20 & wait $!"
        with start(answer, watch, script, 0.05) as server:
            hear(server, watch)
        expect_ended(server, watch)
        killed = _("it is killed, and has no chance to do so")
        expect(server.returncode == 4, _("it gets SIGTERM, and exits in order"), killed)


def stubborn_server(answer: Any, folder: Path) -> None:
    """Run a server that ends only by SIGKILL."""
    with Watch(folder) as watch:
        script = "trap '' TERM; echo hello; sleep 20"
        with start(answer, watch, script, 0.05) as server:
            hear(server, watch)
        expect_ended(server, watch)


def server_with_child(answer: Any, folder: Path) -> None:
    """Run a server that exits in order, but not its child."""
    with Watch(folder) as watch:
        script = "sleep 20 </dev/null & echo hello; cat >/dev/null"
        with start(answer, watch, script, 10.0) as server:
            hear(server, watch)
        expect_ended(server, watch)


def dead_server(answer: Any, folder: Path) -> None:
    """Write to a server that has died, without learning it."""
    with Watch(folder) as watch, start(answer, watch, "echo hello; exit 5", 10.0) as server:
        hear(server, watch)
        if hasattr(os, "waitid"):  # macOS has it since Python 3.13
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        else:
            server.wait()
        server.stdin.write("nobody will read this")
    expect(server.returncode == 5, _("its exit status is 5"), str(server.returncode))
    for name in ("stdin", "stdout"):
        closed = getattr(server, name).closed
        expect(closed, _("{name} is closed").format(name=name), _("it is still open"))


def interrupted_exit(answer: Any, folder: Path) -> None:
    """Press Ctrl-C while the answer waits: at the end of its input, the server does that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = False
    server: Any = None
    with Watch(folder) as watch:
        script = "trap '' TERM; echo hello; cat >/dev/null; kill -INT $PPID; sleep 20"
        try:
            with start(answer, watch, script, 60.0) as server:
                hear(server, watch)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGINT, before)
        expect_ended(server, watch)
    expect(interrupted, _("KeyboardInterrupt propagates"), _("it disappears"))


# --- 3 ---


@dataclass(frozen=True)
class Status:
    """What `on_change` is told, as by chapter 08."""

    name: str
    state: str
    error: str = ""
    pid: int | None = None


class DeadServerError(RuntimeError):
    """What a hub raises if its server has died."""


class FakeHub:
    """A hub of one server, which dies when the judge says so."""

    def __init__(self, number: int, on_change: Callable[[Any], None]) -> None:
        self.number, self.on_change = number, on_change
        self.calls: list[str] = []
        self.under_way: asyncio.Future[str] | None = None
        self.dead = False
        self.closed = False

    async def call(self, server: str, tool: str, arguments: Mapping[str, Any] | None = None) -> str:
        expect(server == "notes", _("hub.call gets the name 'notes'"), repr(server))
        if self.dead or self.closed:
            what = "lost" if self.dead else "closed"
            raise DeadServerError(f"hub {self.number} is {what}: it takes no calls")
        self.calls.append(tool)
        if tool == "slow":
            self.under_way = asyncio.get_running_loop().create_future()
            return await self.under_way
        return f"{tool} {dict(arguments or {})} by hub {self.number}"

    def die(self) -> None:
        """Die, as a child does: a call under way fails, and `on_change` hears of it."""
        self.dead = True
        if self.under_way and not self.under_way.done():
            self.under_way.set_exception(DeadServerError("it died during the call"))
        self.on_change(Status("notes", "lost", "ended by itself"))


class World:
    """What an answer gets from the judge: `connect`, `sleep` and `clock`."""

    def __init__(self, *starts: str) -> None:
        self.script = list(starts)  # how the starts go: "", "fails" or "hangs"
        self.hubs: list[FakeHub] = []
        self.starts = 0
        self.open: list[str] = []
        self.overlap = False
        self.delays: list[float] = []
        self.awake = asyncio.Event()
        self.now = 0.0
        self.error = DeadServerError("it does not start")

    @asynccontextmanager
    async def connect(
        self,
        servers: Mapping[str, Any],
        *,
        on_change: Callable[[Any], None] = lambda status: None,
        **_options: Any,
    ) -> AsyncIterator[FakeHub]:
        wanted = {"notes": "its configuration"}
        got = repr(dict(servers))
        expect(dict(servers) == wanted, _("connect gets {it}").format(it=wanted), got)
        number = self.starts = self.starts + 1
        self.overlap = self.overlap or bool(self.open)
        self.open.append(f"hub {number} is open")
        on_change(Status("notes", "starting"))
        try:
            how = self.script.pop(0) if self.script else ""
            await asyncio.sleep(0)
            if how == "hangs":
                await asyncio.Event().wait()
            if how == "fails":
                on_change(Status("notes", "failed", "it does not start"))
                raise self.error
            on_change(Status("notes", "ready", pid=number))
            hub = FakeHub(number, on_change)
            self.hubs.append(hub)
            try:
                yield hub
            finally:
                hub.closed = True
                if not hub.dead:
                    on_change(Status("notes", "stopped"))
        finally:
            await asyncio.sleep(0)
            self.open.remove(f"hub {number} is open")

    async def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        await self.awake.wait()

    def clock(self) -> float:
        return self.now

    def supervised(self, answer: Any, **options: Any) -> Any:
        settings = {"first_delay": 1.0, "max_delay": 5.0, "max_restarts": 3} | options
        return answer.supervised(
            self.connect,
            "notes",
            "its configuration",
            sleep=self.sleep,
            clock=self.clock,
            **settings,
        )

    async def lose(self) -> None:
        """Let the newest server die."""
        self.hubs[-1].die()
        await settle()

    async def wake(self) -> None:
        """Let the delay end."""
        self.awake.set()
        await settle()
        self.awake.clear()


@task(
    "08.3",
    _("Restart a server that dies"),
    "supervised",
    lesson="python 08_local_mcp_integration.py 3",
    hint=_(
        "One task holds all hubs, one after the other; `call` waits for the one that is ready. "
        "`on_change` is a plain function: it can set an Event, or replace a Future that is done."
    ),
    strong_hint=_(
        "Keep the hub in a Future that `call` awaits inside `asyncio.shield`. When `on_change` "
        'hears "lost", replace the Future by a new one at once, and set an Event for the task, '
        "which then leaves `async with connect(...)`. To give up, `set_exception` on the Future. "
        "When the block ends, cancel the task, wait for its end, and do the same."
    ),
    seconds=30,  # about two seconds on a machine that does nothing else
)
def judge_supervised(answer: Any) -> None:
    plays: list[tuple[str, Callable[[Any], Coroutine[Any, Any, None]]]] = [
        (_("the server starts; one call; the block ends"), start_and_end),
        (_("the first start fails"), first_start_fails),
        (_("the server is lost, and the delay goes by"), lost_once),
        (_("the server is lost; a call comes during the delay"), call_waits),
        (_("the server is lost; a call comes before any other task runs"), call_at_once),
        (_("the server dies in the middle of a call"), call_dies),
        (_("first_delay=1, max_delay=5: the server is lost five times"), delays_double),
        (_("max_restarts=3: the server is lost four times"), gives_up),
        (_("max_restarts=3: the server is lost, and then it does not start three times"), fails),
        (_("max_restarts=3: two restarts, then it is ready for 60 s"), recovers),
        (_("the block ends during a delay, and a call waits"), end_in_delay),
        (_("the block ends during a restart"), end_in_restart),
        (_("a call that waits is cancelled, another one waits on"), cancel_a_caller),
        (_("the server is ready; the block raises ValueError"), block_raises),
    ]
    for called, play in plays:
        with attempt(called):
            run_in_turns(play(answer))

    from contract import Subject

    def subject() -> Subject:
        world = World()
        return Subject(
            open=lambda: world.supervised(answer),
            leaks=lambda: world.open,
            use=lambda call: call("add"),
            closed_error=answer.GaveUpError,
            setup_faults=[lambda: fail_starts(world)],
            cleanup_faults="lost servers are judged above",
        )

    keep_contract(subject)
    judge_with_processes(answer)


@contextmanager
def fail_starts(world: World) -> Iterator[BaseException]:
    world.script = ["fails"]
    yield world.error
    world.script = []


def expect_hubs(world: World, number: int) -> None:
    """Expect that so many hubs were opened, one after the other, and that the last one is open."""
    expected = _("the server has been started {n} times").format(n=number)
    happened = _("it has been started {n} times").format(n=world.starts)
    expect(world.starts == number, expected, happened)
    expected = _("a hub is exited before the next one is entered")
    expect(not world.overlap, expected, _("two hubs are open at once"))


def expect_nothing_left(world: World) -> None:
    """Expect that after the block nothing is open or running."""
    expect(not world.open, _("after the block, no hub is open"), ", ".join(world.open))


async def answer_of(call: Any, *arguments: Any) -> str:
    """Return what a call returns or raises, in words; it must not wait."""
    running = asyncio.create_task(call(*arguments))
    await settle()
    if not running.done():
        running.cancel()
        await settle()
        return _("it waits")
    return result_of(running)


def result_of(running: asyncio.Task[Any]) -> str:
    if not running.done():
        return _("it waits")
    if running.cancelled():
        return "CancelledError:"
    if error := running.exception():
        return f"{type(error).__name__}: {error}"
    return str(running.result())


def expect_result(result: str, wanted: str) -> None:
    """Expect that a call returned or raised what it should."""
    if wanted == _("it waits"):
        expected = _("the call waits for the next hub")
    elif wanted.endswith(":"):
        expected = _("the call raises {error}").format(error=wanted.removesuffix(":"))
    else:
        expected = _("the call returns {value}").format(value=wanted)
    expect(result.startswith(wanted), expected, result)


async def start_and_end(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        ready = bool(world.hubs) and not world.hubs[0].closed
        expect(ready, _("in the block, the server is ready"), _("it is not ready"))
        result = await answer_of(call, "add", {"text": "Emma"})
        expect_result(result, "add {'text': 'Emma'} by hub 1")
        expect_result(await answer_of(call, "list"), "list {} by hub 1")
    expect_nothing_left(world)
    await settle()
    expect_hubs(world, 1)
    expect_result(await answer_of(call, "list"), "GaveUpError:")


async def first_start_fails(answer: Any) -> None:
    world = World("fails")
    came_out: BaseException | None = None
    began = False
    try:
        async with world.supervised(answer):
            began = True
    except DeadServerError as error:
        came_out = error
    expect(not began, _("the block does not begin"), _("it begins"))
    expect(came_out is world.error, comes_out(world.error), comes_out(came_out))
    await settle()
    expect_hubs(world, 1)
    expect(not world.delays, _("there is no delay"), str(world.delays))
    expect_nothing_left(world)


async def lost_once(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        await world.lose()
        expected = _("its hub is exited")
        expect(world.hubs[0].closed, expected, _("it is still open"))
        expect_delays(world, [1.0])
        expect_hubs(world, 1)
        await world.wake()
        expect_hubs(world, 2)
        expect_result(await answer_of(call, "list"), "list {} by hub 2")
    expect_nothing_left(world)
    await settle()
    expect_hubs(world, 2)


def expect_delays(world: World, wanted: list[float]) -> None:
    expected = _("sleep has been awaited with {delays}").format(delays=wanted)
    expect(world.delays == wanted, expected, _("with {delays}").format(delays=world.delays))


async def call_waits(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        await world.lose()
        waiting = asyncio.create_task(call("list"))
        await settle()
        expect_result(result_of(waiting), _("it waits"))
        await world.wake()
        expect_result(result_of(waiting), "list {} by hub 2")


async def call_at_once(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        # subtle: both run in this turn of the loop, and a task that waits for news in the next one.
        asyncio.get_running_loop().call_soon(world.hubs[0].die)
        waiting = asyncio.create_task(call("list"))
        await settle()
        expect_result(result_of(waiting), _("it waits"))
        await world.wake()
        expect_result(result_of(waiting), "list {} by hub 2")


async def call_dies(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        dying = asyncio.create_task(call("slow"))
        await settle()
        await world.lose()
        expect_result(result_of(dying), "DeadServerError:")
        await world.wake()
        await settle()
        expected = _("the new server does not get the call again")
        expect(not world.hubs[-1].calls, expected, _("it gets it, and the work is done twice"))


async def delays_double(answer: Any) -> None:
    world = World()
    async with world.supervised(answer, max_restarts=9):
        for _time in range(5):
            await world.lose()
            await world.wake()
        expect_delays(world, [1.0, 2.0, 4.0, 5.0, 5.0])
        expect_hubs(world, 6)


async def gives_up(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        for number in range(3):
            await world.lose()
            await world.wake()
            expect_hubs(world, number + 2)
        await world.lose()
        await world.wake()
        await expect_gave_up(world, call)


async def expect_gave_up(world: World, call: Any) -> None:
    expect_hubs(world, 4)
    expect_delays(world, [1.0, 2.0, 4.0])
    expect(not world.open, _("no hub is open any more"), ", ".join(world.open))
    expect_result(await answer_of(call, "list"), "GaveUpError:")


async def fails(answer: Any) -> None:
    world = World("", "fails", "fails", "fails")
    async with world.supervised(answer) as call:
        await world.lose()
        waiting = asyncio.create_task(call("list"))
        for _time in range(3):
            await world.wake()
        await expect_gave_up(world, call)
        expect_result(result_of(waiting), "GaveUpError:")


async def recovers(answer: Any) -> None:
    world = World()
    async with world.supervised(answer, recovered_after=60.0) as call:
        for seconds in (59.0, 59.0, 60.0, 0.0, 0.0):
            world.now += seconds
            await world.lose()
            world.now += 1000.0  # a delay is no time in which the server was ready
            await world.wake()
        expect_delays(world, [1.0, 2.0, 1.0, 2.0, 4.0])
        await world.lose()
        expect_result(await answer_of(call, "list"), "GaveUpError:")


async def end_in_delay(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        await world.lose()
        waiting = asyncio.create_task(call("list"))
        await settle()
    expect_nothing_left(world)
    await settle()
    expect_result(result_of(waiting), "GaveUpError:")
    await world.wake()
    expect_hubs(world, 1)


async def end_in_restart(answer: Any) -> None:
    world = World("", "hangs")
    async with world.supervised(answer):
        await world.lose()
        await world.wake()
        expect_hubs(world, 2)
    expect_nothing_left(world)


async def cancel_a_caller(answer: Any) -> None:
    world = World()
    async with world.supervised(answer) as call:
        await world.lose()
        first, second = asyncio.create_task(call("list")), asyncio.create_task(call("list"))
        await settle()
        first.cancel()
        await settle()
        expect_result(result_of(first), "CancelledError:")
        expect_result(result_of(second), _("it waits"))
        await world.wake()
        expect_result(result_of(second), "list {} by hub 2")


async def block_raises(answer: Any) -> None:
    world = World()
    error, came_out = ValueError("of the block"), None
    try:
        async with world.supervised(answer):
            raise error
    except (ValueError, ExceptionGroup) as caught:
        came_out = caught
    expect(came_out is error, comes_out(error), comes_out(came_out))
    expect_nothing_left(world)


# --- With real servers ---

SERVER = """\
import json, os, sys

for line in sys.stdin:
    message = json.loads(line)
    result, tool = {}, message.get("params", {}).get("name")
    if message["method"] == "initialize":
        info, version = {"name": "mortal", "version": "1"}, message["params"]["protocolVersion"]
        result = {"capabilities": {"tools": {}}, "serverInfo": info, "protocolVersion": version}
    if message["method"] == "tools/list":
        schema = {"type": "object"}
        result = {"tools": [{"name": name, "inputSchema": schema} for name in ("pid", "die")]}
    if tool == "die":
        os._exit(1)
    if tool == "pid":
        result = {"content": [{"type": "text", "text": str(os.getpid())}]}
    if "id" in message:
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


def judge_with_processes(answer: Any) -> None:
    """Play it once more with chapter 08's own `connect`, and child processes that die."""
    try:
        hubs = chapter(8)
    except ImportError as error:
        expect(False, _("what chapter 08 needs is installed"), str(error))
        return
    config = hubs.ServerConfig(command=sys.executable, args=["-ISc", SERVER], mode="legacy")
    called = _("with `connect` of chapter 08: a child that dies in a call, then one that is killed")
    with attempt(called):
        asyncio.run(play_with_processes(answer, hubs, config))


async def play_with_processes(answer: Any, hubs: Any, config: Any) -> None:
    delays: list[float] = []

    lost_twice = asyncio.Event()

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        if len(delays) == 2:
            lost_twice.set()

    async def pid_of(call: Any) -> int:
        return int((await call("pid")).content[0].text)

    try:
        async with asyncio.timeout(3 * PATIENCE):
            async with answer.supervised(hubs.connect, "mortal", config, sleep=sleep) as call:
                first = await pid_of(call)
                happened = _("it returns")
                try:
                    await call("die")
                except hubs.ServerError:
                    happened = ""
                expected = _("the call during which it dies raises ServerError")
                expect(not happened, expected, happened)
                second = await pid_of(call)
                expect(second != first, _("the next call gets a new process"), _("the old one"))
                os.kill(second, signal.SIGKILL)  # while it is idle
                await lost_twice.wait()
                third = await pid_of(call)
                expect(third != second, _("the next call gets a new process"), _("the old one"))
    except TimeoutError as error:
        raise NotSolvedError(_("it ends"), _("it waits for ever")) from error
    for pid in (first, second, third):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        expected = _("after the block, no child is left")
        expect(False, expected, _("process {pid} still runs").format(pid=pid))
