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
from contextlib import (
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Fault, Subject, Way
from left_behind import child_processes, open_descriptors
from rich.console import Console
from waiting import until

chapter: Any = load_chapter(7)
patched = mock.patch.object


# --- Every resource keeps the cleanup contract ---


def failing(*_arguments: object, **_options: object) -> Any:
    raise OSError("injected")


def failing_after(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does its work, but then fails."""

    def late(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        failing()

    return late


def fault(target: object, name: str, value: object, error: object = OSError) -> Fault:
    """Replace an attribute inside; `error` must come out."""

    @contextmanager
    def replaced() -> Iterator[object]:
        with patched(target, name, value):
            yield error

    return replaced


def leaks_of(folder: Path) -> Callable[[], object]:
    """The oracle: children, locks in the folder, descriptors of its files, and pipes."""

    def descriptors() -> list[str]:
        held = (f"{folder}/", "pipe:", "socket:")
        return [to for to in open_descriptors().values() if to.startswith(held)]

    before = len(descriptors())

    def leaks() -> object:
        of_the_loop = 2 if asyncio._get_running_loop() else 0
        return child_processes() or [*folder.glob("*.lock"), *descriptors()[before + of_the_loop :]]

    return leaks


def lock_subject(folder: Path) -> Subject:
    path = folder / "the.lock"

    @contextmanager
    def held() -> Iterator[object]:
        path.touch()
        yield chapter.LockHeldError
        path.unlink()

    return Subject(
        lambda: chapter.lock_file(path),
        leaks_of(folder),
        setup_faults=(held, fault(os, "getpid", failing)),
        cleanup_faults=(fault(Path, "unlink", failing_after(Path.unlink)),),
        nestable=False,
        concurrent=False,
    )


def database_subject(folder: Path) -> Subject:
    connect, numbers = sqlite3.connect, count()

    def opening(what: Callable[..., Any], error: type[Exception] = OSError) -> Fault:
        return fault(sqlite3, "connect", what, error)

    def failing_at(method: str) -> Fault:
        late = failing_after(getattr(sqlite3.Connection, method))
        factory = type("Failing", (sqlite3.Connection,), {method: late})
        return opening(partial(connect, factory=factory))

    @contextmanager
    def locked() -> Iterator[None]:
        """A commit fails, but not the rollback after an error."""
        with closing(connect(folder / "locked.db")) as reader:
            reader.executescript("create table others (n); insert into others values (1), (2)")
            reading = reader.execute("select * from others")
            next(reading)
            with patched(sqlite3, "connect", lambda path: connect(folder / "locked.db", timeout=0)):
                yield

    return Subject(
        lambda: chapter.database(folder / f"{next(numbers)}.db"),
        leaks_of(folder),
        use=lambda connection: connection.execute("create table if not exists notes (text)"),
        closed_error=sqlite3.ProgrammingError,
        setup_faults=(
            opening(lambda path: connect(folder), sqlite3.OperationalError),
            failing_at("execute"),
        ),
        cleanup_faults=(locked, failing_at("close")),
    )


async def ask(process: Any) -> None:
    assert await chapter.ask(process) == "HELLO"


def child_subject(folder: Path) -> Subject:
    wait = chapter.Process.wait

    async def waiting_late(process: Any) -> None:
        await wait(process)
        failing()

    return Subject(
        lambda: chapter.spawn(*chapter.UPPER),
        leaks_of(folder),
        use=ask,
        closed_error=ConnectionError,
        setup_faults=(fault(chapter, "UPPER", chapter.MISSING, FileNotFoundError),),
        cleanup_faults=(fault(chapter.Process, "wait", waiting_late),),
    )


def open_all_subject(folder: Path) -> Subject:
    numbers = count()

    def several() -> list[Callable[[], Any]]:
        return [
            lambda: chapter.lock_file(folder / f"{next(numbers)}.lock"),
            lambda: chapter.spawn(*chapter.UPPER),
            lambda: chapter.database(folder / f"{next(numbers)}.db"),
            nullcontext,
        ]

    return Subject(
        lambda: chapter.open_all(several()),
        leaks_of(folder),
        use=lambda values: ask(values[1]),
        closed_error=ConnectionError,
        setup_faults=(
            fault(nullcontext, "__aenter__", failing),
            fault(chapter, "UPPER", chapter.MISSING, FileNotFoundError),
        ),
        cleanup_faults=(fault(nullcontext, "__aexit__", failing),),
    )


WAYS = [(subject, way) for subject in (lock_subject, database_subject) for way in SYNC_WAYS]
WAYS += [(subject, way) for subject in (child_subject, open_all_subject) for way in ASYNC_WAYS]


@pytest.mark.parametrize(("subject", "way"), WAYS)
def test_each_resource_keeps_the_cleanup_contract(
    subject: Callable[[Path], Subject], way: Way, tmp_path: Path
) -> None:
    way(subject(tmp_path))


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
    with pytest.raises(FileNotFoundError), chapter.lock_file(tmp_path / "no folder" / "lock"):
        pytest.fail("entered")


# --- Database ---


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_a_block_commits_or_rolls_back(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "notes.db"
    with chapter.database(path) as connection:
        connection.execute("create table notes (text)")
        connection.execute("insert into notes values ('kept')")
    with pytest.raises(error), chapter.database(path) as connection:
        connection.execute("create table more (text)")
        connection.execute("insert into notes values ('lost')")
        raise error
    with chapter.database(path) as connection:
        assert list(connection.execute("select name from sqlite_master")) == [("notes",)]
        assert list(connection.execute("select * from notes")) == [("kept",)]


# --- Child process ---


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("command", "grace", "error", "status"),
    [
        (chapter.UPPER, 20.0, None, 0),
        (chapter.DEAF, 0.01, None, -signal.SIGKILL),
        (chapter.DEAF, 20.0, ValueError("the block"), -signal.SIGKILL),
        (chapter.DEAF, 20.0, TimeoutError("the block"), -signal.SIGKILL),  # is not the grace
    ],
)
async def test_a_child_has_its_grace_unless_the_block_raises(
    command: tuple[str, ...], grace: float, error: Exception | None, status: int
) -> None:
    with pytest.raises(type(error), match="the block") if error else nullcontext():
        async with chapter.spawn(*command, grace=grace) as process:
            if error:
                raise error
    assert process.returncode == status


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
    forked = tmp_path / "forked"
    forks = f"import os, time\nif os.fork() == 0: open({str(forked)!r}, 'w')\ntime.sleep(60)"
    task = asyncio.create_task(chapter.spawn(*chapter.PYTHON, forks).__aenter__())
    await until(lambda: asked.is_set() and forked.exists())
    (child,) = child_processes()
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    ended, _pending = await asyncio.wait([task], timeout=5)
    os.killpg(child, signal.SIGKILL)  # it leads the group of the grandchild
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
from left_behind import child_processes
from waiting import until_sync
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
until_sync(lambda: {*child_processes().values()} <= {"zombie"})
print("ended")
"""


def test_a_loop_that_shuts_down_in_mid_start_kills_the_child() -> None:
    """asyncio alone waits for ever then."""
    folder, pipe, nowhere = Path(__file__).parent, subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", ABANDON]
    process = subprocess.run(
        command, cwd=folder, stdout=pipe, stderr=nowhere, timeout=45, check=False
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


@pytest.mark.asyncio
async def test_open_all_opens_in_order_and_closes_in_reverse() -> None:
    """Sync and async managers alike. After a failure it does not even create one."""
    log: list[str] = []

    @contextmanager
    def noting(name: str) -> Iterator[str]:
        log.append(f"+{name}")
        try:
            yield name
        finally:
            log.append(f"-{name}")

    @asynccontextmanager
    async def noting_async(name: str) -> AsyncIterator[str]:
        with noting(name):
            await asyncio.sleep(0)
            yield name

    factories: list[Callable[[], Any]] = [partial(noting, "a"), partial(noting_async, "b")]
    async with chapter.open_all(iter(factories)) as values:
        assert values == ["a", "b"]
    with pytest.raises(OSError, match="injected"):
        async with chapter.open_all([*factories, failing, partial(pytest.fail, "created")]):
            pytest.fail("entered")
    assert log == 2 * ["+a", "+b", "-b", "-a"]
    async with chapter.open_all([]) as values:
        assert values == []


@pytest.mark.asyncio
async def test_open_all_lets_a_manager_suppress() -> None:
    async with chapter.open_all([lambda: suppress(ValueError)]):
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


# Each demo's verdicts, and for some lines of code the numbers beside them, of each run that
# reached them: the last such line above the verdict.
SHOWN: dict[str, dict[str, dict[str, list[str]]]] = {
    "demo_set_up_fails": {
        "✗ `by_hand`: the lock file stays, and blocks the next run.": {
            "lock.touch(exist_ok=False)": ["2", "2"],
            "lock.unlink()": ["10"],
        },
        "✓ `nested`: the lock is released.": {},
        "✓ `stacked`: the lock is released.": {
            "async with AsyncExitStack() as stack:": ["1 6", "1 4"],  # left last
        },
    },
    "demo_any_number": {
        f"✗ `in_a_loop`: {3 * ['ConnectionResetError']}": {},
        f"✓ `in_open_all`: {3 * ['HELLO']}": {},
    },
    "demo_optional": {
        "✗ `add_and_close`: the notes are ['one', 'two'].": {},
        "✓ `add`: the notes are ['one', 'two', 'three'].": {
            "notes = stack.enter_context(database(path))": ["3"],
        },
    },
    "demo_hand_over": {
        "✗ `CarelessTranslator`: the answer is ConnectionResetError; left in the folder: [].": {},
        "✓ `Translator`: the answer is HELLO; left in the folder: [].": {},
    },
    "demo_cancelled": {
        "✗ `patient_child`: the child's exit status after the block is None.": {
            "await asyncio.wait_for(process.wait(), timeout=1)": ["5"],
            "process.kill()": [""],
        },
        "✓ `spawn`: the child's exit status after the block is -9.": {"transport.close()": ["8"]},
    },
}


@pytest.mark.parametrize("demo", SHOWN)
def test_a_demo_shows_what_is_lost_and_the_path(demo: str, played: Callable[[str], str]) -> None:
    shown = played(demo)
    assert re.findall("^[✗✓] .*$", shown, re.MULTILINE) == list(SHOWN[demo])
    for verdict, rows in SHOWN[demo].items():
        above, _verdict, shown = shown.partition(verdict)
        for code, numbers in rows.items():
            line = [line for line in above.splitlines() if line.strip().startswith(code)][-1]
            assert re.split(r"\s{2,}", line.partition(code)[2].strip()) == numbers


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
    shown = played("demo_order_of_failures")
    lost = 2 - len(asyncio.run(chapter.errors_of(chapter.on_a_stack(None))))
    raised = ["OSError('first')", "↑ OSError('second')", "↑ ValueError('block')"]
    group = ["ExceptionGroup('flush_all', [OSError('second'), OSError('first')])", raised[2]]
    assert re.findall(r"^│ \w* +│ (.*?) +│", shown, re.MULTILINE) == [*raised, *raised, *group]
    assert re.findall("^[✗✓] .*$", shown, re.MULTILINE) == [
        "✓ `nested_try`: 5 of 5 errors reach the caller.",
        f"{'✗' if lost else '✓'} `on_a_stack`: {5 - lost} of 5 errors reach the caller.",
        "✓ `in_a_group`: 5 of 5 errors reach the caller.",
    ]


def test_the_decision_table_names_the_demo_of_each_row(played: Callable[[str], str]) -> None:
    numbers = re.findall(r"│ (\d*) +│$", played("demo_which_one"), re.MULTILINE)
    assert numbers == ["", "1", "2", "3", "4", "4", "5", "6"]
