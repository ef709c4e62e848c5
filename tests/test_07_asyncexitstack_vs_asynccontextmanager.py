"""Chapter 07: each claim of its lessons, and the cleanup contract for each of its resources."""

from __future__ import annotations

import inspect
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from signal import SIGKILL
from typing import Any
from unittest import mock

import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Fault, Subject, Way
from left_behind import child_processes, open_descriptors
from rich.console import Console

chapter: Any = load_chapter(7)
patched = mock.patch.object


def failing(*_arguments: object, **_options: object) -> Any:
    raise OSError("injected")


def failing_after(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does its work, but then fails."""

    def late(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        failing()

    return late


@contextmanager
def fault(target: object, name: str, value: object, error: object = OSError) -> Iterator[object]:
    """Replace an attribute inside; `error` must come out."""
    with patched(target, name, value):
        yield error


def left_in(folder: Path) -> list[object]:
    """The oracle: children, locks in the folder, descriptors of its files."""
    held = [file for file in open_descriptors().values() if file.startswith(f"{folder}/")]
    return [*child_processes(), *folder.glob("*.lock"), *held]


def lock_subject(folder: Path) -> Subject:
    return Subject(
        lambda: chapter.lock_file(folder / "the.lock"),
        lambda: left_in(folder),
        setup_faults=[partial(fault, os, "getpid", failing)],
        cleanup_faults=[partial(fault, Path, "unlink", failing_after(Path.unlink))],
        nestable=False,
        concurrent=False,
    )


def database_subject(folder: Path) -> Subject:
    connect, numbers = sqlite3.connect, count()

    def failing_at(method: str) -> Fault:
        late = failing_after(getattr(sqlite3.Connection, method))
        factory = type("Failing", (sqlite3.Connection,), {method: late})
        return partial(fault, sqlite3, "connect", partial(connect, factory=factory))

    return Subject(
        lambda: chapter.database(folder / f"{next(numbers)}.db"),
        lambda: left_in(folder),
        use=lambda connection: connection.execute("create table if not exists notes (text)"),
        closed_error=sqlite3.ProgrammingError,
        setup_faults=[failing_at("execute")],
        cleanup_faults=[failing_at("__exit__"), failing_at("close")],
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
        lambda: left_in(folder),
        use=ask,
        closed_error=ConnectionError,
        setup_faults=[partial(fault, chapter, "UPPER", chapter.MISSING, FileNotFoundError)],
        cleanup_faults=[partial(fault, chapter.Process, "wait", waiting_late)],
    )


def open_all_subject(folder: Path) -> Subject:
    numbers = count()

    def several() -> list[Callable[[], Any]]:
        lock = partial(chapter.lock_file, folder / f"{next(numbers)}.lock")
        return [lock, partial(chapter.spawn, *chapter.UPPER), nullcontext]

    return Subject(
        lambda: chapter.open_all(several()),
        lambda: left_in(folder),
        use=lambda values: ask(values[1]),
        closed_error=ConnectionError,
        setup_faults=[partial(fault, nullcontext, "__aenter__", failing)],
        cleanup_faults=[partial(fault, nullcontext, "__aexit__", failing)],
    )


WAYS = [(subject, way) for subject in (lock_subject, database_subject) for way in SYNC_WAYS]
WAYS += [(subject, way) for subject in (child_subject, open_all_subject) for way in ASYNC_WAYS]


@pytest.mark.parametrize(("subject", "way"), WAYS)
def test_each_resource_keeps_the_cleanup_contract(subject: Any, way: Way, tmp_path: Path) -> None:
    way(subject(tmp_path))


def test_a_lock_file_says_who_holds_it_and_refuses_a_second_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    advice = re.escape(f"{path} is held by process {os.getpid()}: wait for it, or delete the ")
    with chapter.lock_file(path):
        with pytest.raises(chapter.LockHeldError, match=advice), chapter.lock_file(path):
            pytest.fail("entered")
        unreadable = patched(Path, "read_text", failing)  # as if it was released at this moment
        with unreadable, pytest.raises(chapter.LockHeldError), chapter.lock_file(path):
            pytest.fail("entered")
        with pytest.raises(FileNotFoundError), chapter.lock_file(tmp_path / "no folder" / "lock"):
            pytest.fail("entered")
        path.unlink()  # raises, if a refused holder has removed it; the end of the block does not


def test_a_block_commits_or_rolls_back(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    with chapter.database(path) as connection:
        connection.execute("create table notes (text)")
        connection.execute("insert into notes values ('kept')")
    with pytest.raises(KeyboardInterrupt), chapter.database(path) as connection:
        connection.execute("create table more (text)")
        connection.execute("insert into notes values ('lost')")
        raise KeyboardInterrupt
    with chapter.database(path) as connection:
        assert list(connection.execute("select name from sqlite_master")) == [("notes",)]
        assert list(connection.execute("select * from notes")) == [("kept",)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("command", "grace", "error", "status"),
    [
        (chapter.UPPER, 20.0, None, 0),
        (chapter.DEAF, 0.01, None, -SIGKILL),
        ((*chapter.PYTHON, "while True: print('x' * 65536)"), 0.01, None, -SIGKILL),  # fills a pipe
        (chapter.DEAF, 20.0, TimeoutError("the block"), -SIGKILL),  # is not the grace
    ],
)
async def test_a_child_has_its_grace_unless_the_block_raises(
    command: tuple[str, ...], grace: float, error: Exception | None, status: int
) -> None:
    with pytest.raises(TimeoutError, match="the block") if error else nullcontext():
        async with chapter.spawn(*command, grace=grace) as process:
            assert os.getsid(process.pid) == process.pid  # Ctrl-C does not reach its session
            if error:
                raise error
    assert process.returncode == status


ABANDON = """if True:
    import asyncio
    from conftest import load_chapter
    from left_behind import child_processes
    from waiting import until_sync
    chapter = load_chapter(7)
    async def block():
        async with chapter.spawn(*chapter.DEAF):
            await asyncio.Event().wait()
    async def abandon(ticks, cancelled):
        task = asyncio.create_task(block())
        for _tick in range(ticks):
            await asyncio.sleep(0)
        if cancelled:
            task.cancel()
    for ticks in 5 * [2, 3, 4, 5, 6]:
        asyncio.run(abandon(ticks, cancelled=False))
        asyncio.run(abandon(ticks, cancelled=True))
    until_sync(lambda: {*child_processes().values()} <= {"zombie"})"""


def test_a_loop_that_shuts_down_in_mid_start_kills_the_child() -> None:
    """asyncio alone waits for ever then."""
    command, nowhere = [sys.executable, "-c", ABANDON], subprocess.DEVNULL
    subprocess.run(command, cwd=Path(__file__).parent, stderr=nowhere, timeout=45, check=True)


def test_finish_is_that_of_chapter_03_which_tests_it() -> None:
    assert inspect.getsource(chapter.finish) in chapter_path(3).read_text()


@pytest.mark.asyncio
async def test_open_all_opens_in_order_and_closes_in_reverse() -> None:
    """After a failure it does not even create a manager."""
    log: list[str] = []

    @contextmanager
    def noting(name: str) -> Iterator[str]:
        log.append(f"+{name}")
        yield name
        log.append(f"-{name}")

    async with chapter.open_all(partial(noting, name) for name in "ab") as values:
        assert values == ["a", "b"]
    assert log == ["+a", "+b", "-b", "-a"]
    with pytest.raises(OSError, match="injected"):
        async with chapter.open_all([failing, partial(pytest.fail, "created")]):
            pytest.fail("entered")


# Lines that each demo shows, in this order; the numbers beside code say in which run it ran when.
SHOWN = {
    "demo_set_up_fails": [
        "lock.touch(exist_ok=False) 2 2",
        "lock.unlink() 10",
        "✗ `by_hand`: the lock file stays, and blocks the next run.",
        "✓ `nested`: the lock is released.",
        "async with AsyncExitStack() as stack: 1 6 1 4",  # left last
        "✓ `stacked`: the lock is released.",
    ],
    "demo_any_number": [
        f"✗ `in_a_loop`: {3 * ['ConnectionResetError']}",
        f"✓ `in_open_all`: {3 * ['HELLO']}",
    ],
    "demo_optional": [
        "✗ `add_and_close`: the notes are ['one', 'two'].",
        "notes = stack.enter_context(database(path)) 3",
        "✓ `add`: the notes are ['one', 'two', 'three'].",
    ],
    "demo_order_of_failures": [
        "│ nested_try │ OSError('first') │ OSError('first') │",
        "│ │ ↑ OSError('second') │ ↑ OSError('second') │",
        "│ │ ↑ ValueError('block') │ │",
        "✓ `nested_try`: 5 of 5 errors reach the caller.",
        "✗ `on_a_stack`: 4 of 5 errors reach the caller.",
        "✓ `in_a_group`: 5 of 5 errors reach the caller.",
    ],
    "demo_hand_over": [
        "✗ `CarelessTranslator`: the answer is ConnectionResetError; left in the folder: [].",
        "✓ `Translator`: the answer is HELLO; left in the folder: [].",
    ],
    "demo_cancelled": [
        "await asyncio.wait_for(process.wait(), timeout=1) 5",
        "process.kill()",  # never runs
        "✗ `patient_child`: the child's exit status after the block is None.",
        "✓ `spawn`: the child's exit status after the block is -9.",
    ],
    "demo_which_one": [
        "│ a few, known when you write │ async with a() as x, b() as y: │ 1 │",
        "│ cleanup that may be cancelled │ await finish(cleanup()) │ 6 │",
    ],
}


@pytest.mark.parametrize("demo", SHOWN)
def test_a_demo_shows_the_loss_and_the_path(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    with patched(chapter, "console", Console(width=200, highlight=False)):
        chapter.play([function.__name__ for function in chapter.DEMOS].index(demo) + 1)
    shown = capsys.readouterr().out
    lines = (" ".join(line.split()) for line in shown.splitlines())
    for expected in SHOWN[demo]:
        assert expected in lines, shown  # looks from the last find on
