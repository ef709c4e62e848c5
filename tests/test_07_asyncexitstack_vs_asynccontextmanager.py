"""Chapter 07: each claim of its lessons, and the cleanup contract for each of its resources."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way
from left_behind import child_processes, open_descriptors
from rich.console import Console

chapter: Any = load_chapter(7)
patched = mock.patch.object
sync_ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
async_ways = pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)


def failing(*_arguments: object, **_options: object) -> Any:
    raise OSError("injected")


# --- Every resource keeps the cleanup contract ---


class Census:
    """What the whole process has open: descriptors, children, and the locks in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = count()
        self.allowed = {False: len(self.descriptors()), True: asyncio.run(self.in_a_loop())}

    async def in_a_loop(self) -> int:
        """An event loop has descriptors of its own."""
        return len(self.descriptors())

    def descriptors(self) -> list[str]:
        """All but the folders that another thread's census is looking into at the same time."""
        opened = open_descriptors().values()
        return [to for to in opened if not to.startswith("/proc/") and to != str(self.folder)]

    def leaks(self) -> object:
        in_a_loop = asyncio._get_running_loop() is not None
        descriptors = self.descriptors()
        return (
            child_processes()
            or list(self.folder.glob("*.lock"))
            or (len(descriptors) > self.allowed[in_a_loop] and descriptors)
        )

    def path(self, kind: str) -> Path:
        return self.folder / f"{next(self.numbers)}.{kind}"


@pytest.fixture
def census(tmp_path: Path) -> Census:
    return Census(tmp_path)


async def ask(process: Any) -> None:
    assert await chapter.ask(process) == "HELLO"


@asynccontextmanager
async def touchy() -> AsyncIterator[None]:
    """Fails in its set-up or in its cleanup, inside `failing_at`."""
    await asyncio.sleep(0)
    if touchy_fails_at == "setup":
        raise OSError("injected")
    try:
        yield
    finally:
        if touchy_fails_at == "cleanup":
            raise OSError("injected")


touchy_fails_at = ""


def failing_at(phase: str) -> Callable[[], Any]:
    return partial(patched, sys.modules[__name__], "touchy_fails_at", phase)


def lock_subject(census: Census) -> Subject:
    path = census.folder / "the.lock"

    @contextmanager
    def held() -> Iterator[None]:
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    return Subject(
        lambda: chapter.lock_file(path),
        census.leaks,
        setup_faults=(held, partial(patched, os, "getpid", failing)),
        nestable=False,
        concurrent=False,
    )


def database_subject(census: Census) -> Subject:
    return Subject(
        lambda: chapter.database(census.path("db")),
        census.leaks,
        use=lambda connection: connection.execute("create table if not exists notes (text)"),
        closed_error=sqlite3.ProgrammingError,
        setup_faults=(partial(patched, census, "path", lambda kind: census.folder),),
    )


def child_subject(census: Census) -> Subject:
    return Subject(
        lambda: chapter.spawn(*chapter.UPPER),
        census.leaks,
        use=ask,
        closed_error=ConnectionError,
        setup_faults=(partial(patched, chapter, "UPPER", ("/no/such/program",)),),
    )


def open_all_subject(census: Census) -> Subject:
    def several() -> list[Callable[[], Any]]:
        return [
            touchy,
            lambda: chapter.lock_file(census.path("lock")),
            lambda: chapter.spawn(*chapter.UPPER),
            lambda: chapter.database(census.path("db")),
            touchy,
        ]

    return Subject(
        lambda: chapter.open_all(several()),
        census.leaks,
        use=lambda values: ask(values[2]),
        closed_error=ConnectionError,
        setup_faults=(failing_at("setup"),),
        cleanup_faults=(failing_at("cleanup"),),
    )


@sync_ways
@pytest.mark.parametrize("subject", [lock_subject, database_subject])
def test_a_sync_resource_keeps_the_cleanup_contract(
    subject: Callable[[Census], Subject], way: Way, census: Census
) -> None:
    way(subject(census))


@async_ways
@pytest.mark.parametrize("subject", [child_subject, open_all_subject])
def test_an_async_resource_keeps_the_cleanup_contract(
    subject: Callable[[Census], Subject], way: Way, census: Census
) -> None:
    way(subject(census))


# --- Lock file ---


def test_a_lock_file_says_who_holds_it_and_refuses_a_second_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    advice = re.escape(f"{path} is held by process {os.getpid()}: wait for it, or delete the ")
    with chapter.lock_file(path) as locked:
        assert locked.read_text() == str(os.getpid())
        with pytest.raises(chapter.LockHeldError, match=advice), chapter.lock_file(path):
            pytest.fail("entered")
        unreadable = patched(Path, "read_text", failing)  # as if it was released at this moment
        with unreadable, pytest.raises(chapter.LockHeldError), chapter.lock_file(path):
            pytest.fail("entered")
        path.unlink()  # raises, if a refused holder has removed it; the end of the block does not


# --- Database ---


def rows(path: Path) -> list[Any]:
    with chapter.database(path) as connection:
        return list(connection.execute("select * from notes"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    with chapter.database(tmp_path / "notes.db") as connection:
        connection.execute("create table notes (text)")
    return tmp_path / "notes.db"


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_a_block_commits_or_rolls_back(notes: Path, error: type[BaseException]) -> None:
    with chapter.database(notes) as connection:
        connection.execute("insert into notes values ('kept')")
    with pytest.raises(error), chapter.database(notes) as connection:
        connection.execute("create table more (text)")
        connection.execute("insert into notes values ('lost')")
        raise error
    with chapter.database(notes) as connection:
        assert list(connection.execute("select name from sqlite_master")) == [("notes",)]
    assert rows(notes) == [("kept",)]


def test_a_commit_that_fails_raises_and_closes(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with chapter.database(notes) as reader:
        list(reader.execute("select * from notes"))  # holds a lock that a commit must wait for
        with (
            pytest.raises(sqlite3.OperationalError, match="locked"),
            chapter.database(notes) as writer,
        ):
            writer.execute("insert into notes values ('lost')")
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            writer.execute("select 1")
    assert rows(notes) == []


# --- Child process ---


@pytest.mark.asyncio
async def test_a_child_can_finish_when_its_input_ends() -> None:
    async with chapter.spawn(*chapter.UPPER) as process:
        await ask(process)
    assert process.returncode == 0


@pytest.mark.asyncio
async def test_a_child_that_outlasts_its_grace_is_killed() -> None:
    timeouts: list[float] = []

    def expiring(seconds: float) -> asyncio.Timeout:
        timeouts.append(seconds)
        return asyncio.timeout_at(0)

    with patched(asyncio, "timeout", expiring):
        async with chapter.spawn(*chapter.DEAF, grace=3600.0) as process:
            pass
    assert timeouts == [3600.0]
    assert process.returncode == -signal.SIGKILL


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [ValueError, TimeoutError])
async def test_a_child_is_killed_at_once_if_the_block_raises(error: type[Exception]) -> None:
    """A timeout of the block is not the grace."""
    with pytest.raises(error, match="the block"):
        async with chapter.spawn(*chapter.DEAF, grace=3600.0) as process:
            raise error("the block")
    assert process.returncode == -signal.SIGKILL


NOISY = "while True: print('x' * 65536)"
FORKS = "import os, time\nif os.fork() == 0: time.sleep(0.5); os._exit(0)\nprint(flush=True)"


@pytest.mark.asyncio
@pytest.mark.parametrize("program", [NOISY, FORKS])
async def test_a_child_whose_pipe_stays_open_is_reaped(program: str) -> None:
    """By its unread output, or by a grandchild: process.wait() alone might never return."""
    async with chapter.spawn(*chapter.PYTHON, program, grace=0.01) as process:
        assert await process.stdout.readline()
    assert process.returncode is not None
    assert not child_processes()


@pytest.mark.asyncio
async def test_a_cancelled_start_does_not_wait_for_a_grandchild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's own cleanup of a cancelled start waits until nobody holds the pipes any more."""
    loop, go, asked = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    connect = loop.connect_read_pipe

    async def slowly(*arguments: Any) -> Any:
        asked.set()
        await go.wait()
        return await connect(*arguments)

    monkeypatch.setattr(loop, "connect_read_pipe", slowly)
    pid = tmp_path / "pid"
    forks = f"""
import os, time
if os.fork() == 0:
    with open({str(pid)!r} + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename({str(pid)!r} + ".new", {str(pid)!r})
time.sleep(60)
"""
    task = asyncio.create_task(chapter.spawn(*chapter.PYTHON, forks).__aenter__())
    async with asyncio.timeout(10):
        await asked.wait()
        while not pid.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    ended, _pending = await asyncio.wait([task], timeout=5)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    await asyncio.wait([task])
    assert ended
    assert task.cancelled()


@pytest.mark.asyncio
@pytest.mark.parametrize("cancels", [1, 2])
async def test_no_child_is_left_whichever_tick_is_cancelled(cancels: int) -> None:
    """Also between the fork and the pipes, where no `await` of the block stands."""

    async def block() -> None:
        async with chapter.spawn(*chapter.DEAF):
            await asyncio.Event().wait()

    for tick in range(15):
        task = asyncio.create_task(block())
        for _tick in range(tick):
            await asyncio.sleep(0)
        for _cancellation in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        assert not child_processes()


ABANDON = """
import asyncio
from conftest import load_chapter
chapter = load_chapter(7)

async def block():
    async with chapter.spawn(*chapter.DEAF):
        await asyncio.Event().wait()

async def abandon(ticks, cancels):
    task = asyncio.create_task(block())
    for _tick in range(ticks):
        await asyncio.sleep(0)
    for _cancellation in range(cancels):
        task.cancel()

for ticks in range(12):
    asyncio.run(abandon(ticks, 0))
    asyncio.run(abandon(ticks, 1))
print("ended")
"""


def test_a_loop_that_shuts_down_in_mid_start_kills_the_child() -> None:
    """asyncio alone waits for ever then. A child that lives on keeps the error stream open."""
    command = [sys.executable, "-c", ABANDON]
    process = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, timeout=30, check=False
    )
    assert process.stdout == b"ended\n"


@pytest.mark.asyncio
@pytest.mark.skipif(not hasattr(os, "getsid"), reason="Windows has no sessions")
async def test_ctrl_c_reaches_a_child_only_through_its_block() -> None:
    """The terminal sends SIGINT to all processes of the session in its foreground."""
    for manager in (chapter.spawn, chapter.patient_child):
        async with manager(*chapter.DEAF) as process:
            assert os.getsid(process.pid) == process.pid
            process.kill()
            await process.wait()


def test_finish_is_that_of_chapter_03() -> None:
    """Its tests stand there."""
    assert inspect.getsource(chapter.finish) in chapter_path(3).read_text()


# --- open_all ---


@contextmanager
def noting(log: list[str], name: str) -> Iterator[str]:
    log.append(f"+{name}")
    try:
        yield name
    finally:
        log.append(f"-{name}")


def noting_factories(log: list[str], names: str) -> list[Callable[[], Any]]:
    """For each name one manager; every second one is an async one."""

    @asynccontextmanager
    async def noting_async(name: str) -> AsyncIterator[str]:
        with noting(log, name):
            await asyncio.sleep(0)
            yield name

    kinds: list[Callable[..., Any]] = [partial(noting, log), noting_async]
    return [partial(kinds[number % 2], name) for number, name in enumerate(names)]


@pytest.mark.asyncio
@pytest.mark.parametrize("names", ["", "a", "abcde"])
async def test_open_all_opens_in_order_and_closes_in_reverse(names: str) -> None:
    log: list[str] = []
    async with chapter.open_all(noting_factories(log, names)) as values:
        assert values == list(names)
    assert log == [f"+{name}" for name in names] + [f"-{name}" for name in reversed(names)]


@pytest.mark.asyncio
async def test_open_all_creates_nothing_after_a_failure() -> None:
    log: list[str] = []
    factories = [*noting_factories(log, "ab"), failing, partial(pytest.fail, "created")]
    with pytest.raises(OSError, match="injected"):
        async with chapter.open_all(factories):
            pytest.fail("entered")
    assert log == ["+a", "+b", "-b", "-a"]


@pytest.mark.asyncio
async def test_open_all_takes_an_iterator_and_lets_a_manager_suppress() -> None:
    async with chapter.open_all(iter([lambda: suppress(ValueError)])):
        raise ValueError("suppressed")


# --- What the demos show ---


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Plays a demo on a wide console; returns what it prints."""

    def play(demo: str) -> str:
        console = Console(file=io.StringIO(), width=200, highlight=False)
        monkeypatch.setattr(chapter, "console", console)
        number = [function.__name__ for function in chapter.DEMOS].index(demo) + 1
        chapter.play(number)
        return cast(io.StringIO, console.file).getvalue()

    return play


VERDICTS = {
    "demo_set_up_fails": [
        "✗ `by_hand`: the lock file stays, and blocks the next run.",
        "✓ `nested`: the lock is released.",
        "✓ `stacked`: the lock is released.",
    ],
    "demo_any_number": [
        f"✗ `in_a_loop`: {3 * ['ConnectionResetError']}",
        f"✓ `in_open_all`: {3 * ['HELLO']}",
    ],
    "demo_optional": [
        "✗ `add_and_close`: the notes are ['one', 'two'].",
        "✓ `add`: the notes are ['one', 'two', 'three'].",
    ],
    "demo_hand_over": [
        "✗ `CarelessTranslator`: the answer is ConnectionResetError; left in the folder: [].",
        "✓ `Translator`: the answer is HELLO; left in the folder: [].",
    ],
    "demo_cancelled": [
        "✗ `patient_child`: the child's exit status after the block is None.",
        "✓ `spawn`: the child's exit status after the block is -9.",
    ],
}


@pytest.mark.parametrize("demo", VERDICTS)
def test_a_demo_shows_what_is_lost(demo: str, played: Callable[[str], str]) -> None:
    lines = played(demo).splitlines()
    assert [line for line in lines if line.startswith(("✗", "✓"))] == VERDICTS[demo]


def row(printed: str, code: str) -> list[str]:
    """The numbers beside the last line with this code: one text for each run that reached it."""
    line = [line for line in printed.splitlines() if line.strip().startswith(code)][-1]
    return re.split(r"\s{2,}", line.partition(code)[2].strip())


def test_the_paths_show_which_cleanup_never_ran(played: Callable[[str], str]) -> None:
    by_hand, _verdict, stacked = played("demo_set_up_fails").partition("✗")
    assert row(by_hand, "lock.touch(exist_ok=False)") == ["2", "2"]
    assert row(by_hand, "lock.unlink()") == ["10"]
    assert row(stacked, "async with AsyncExitStack() as stack:") == ["1 6", "1 4"]  # left last
    patient, spawned = played("demo_cancelled").split("✗")
    assert row(patient, "await asyncio.wait_for(process.wait(), timeout=1)") == ["5"]
    assert row(patient, "process.kill()") == [""]
    assert row(spawned, "transport.close()") == ["8"]
    optional = played("demo_optional")
    assert row(optional, "notes = stack.enter_context(database(path))") == ["3"]


def test_a_child_that_cannot_start_closes_the_ones_before_it(
    played: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What demo 2 suggests to try."""
    monkeypatch.setattr(chapter, "THREE", (chapter.UPPER, chapter.UPPER, chapter.MISSING))
    shown = played("demo_any_number")
    assert shown.count("└ left by FileNotFoundError") == 1 + 3
    assert "✗ `in_open_all`: FileNotFoundError" in shown


def test_the_order_of_failures_is_the_one_that_python_makes(played: Callable[[str], str]) -> None:
    """The gap of the real stack is shown as it is on this Python: it may be closed one day."""

    lost = 2 - len(asyncio.run(chapter.errors_of(chapter.on_a_stack(None))))
    shown = played("demo_order_of_failures")
    verdicts = [line for line in shown.splitlines() if line.startswith(("✗", "✓"))]
    assert verdicts == [
        "✓ `nested_try`: 5 of 5 errors reach the caller.",
        f"{'✗' if lost else '✓'} `on_a_stack`: {5 - lost} of 5 errors reach the caller.",
        "✓ `in_a_group`: 5 of 5 errors reach the caller.",
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize("block", [None, ValueError("block")])
async def test_the_last_error_reaches_the_caller_with_its_context(block: Exception | None) -> None:
    last = [] if block is None else ["ValueError('block')"]
    nested = [repr(error) for error in await chapter.errors_of(chapter.nested_try(block))]
    assert nested == ["OSError('first')", "OSError('second')", *last]
    if block:
        stacked = [repr(error) for error in await chapter.errors_of(chapter.on_a_stack(block))]
        assert stacked == nested
    group, *others = await chapter.errors_of(chapter.in_a_group(block))
    assert [str(error) for error in group.exceptions] == ["second", "first"]
    assert others == [error for error in [block] if error]


def test_the_decision_table_names_the_demo_of_each_row(played: Callable[[str], str]) -> None:
    numbers = re.findall(r"│ (\d*) +│$", played("demo_which_one"), re.MULTILINE)
    assert numbers == ["", "1", "2", "3", "4", "4", "5", "6"]
