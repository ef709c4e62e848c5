"""Chapter 07: each claim of its lessons, and the cleanup contract for each of its resources."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import random
import re
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import child_processes, load_chapter, open_descriptors
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way

chapter: Any = load_chapter(7)
sync_ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
async_ways = pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
needs_a_list_of_descriptors = pytest.mark.skipif(
    not open_descriptors(), reason="this system has no list of open descriptors"
)


# --- Every resource keeps the cleanup contract ---


class Census:
    """What the whole process has open: descriptors, children, and the files of one folder."""

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


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def failing(*_arguments: object, **_options: object) -> Any:
    raise OSError("injected")


async def failing_coroutine(*_arguments: object, **_options: object) -> Any:
    raise OSError("injected")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def talk(streams: Any) -> None:
    assert await chapter.ask(*streams) == "hello"


async def talk_to_child(process: Any) -> None:
    assert await chapter.ask(process.stdout, process.stdin) == "HELLO"


async def talk_to_server(address: Any) -> None:
    async with chapter.connection(*address) as streams:
        await talk(streams)


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    async with chapter.echo_server() as address, chapter.connection(*address) as streams:
        yield streams


@asynccontextmanager
async def class_client() -> AsyncIterator[Any]:
    async with chapter.echo_server() as address, chapter.Connection(*address) as streams:
        yield streams


@asynccontextmanager
async def served_by_notes(folder: Path) -> AsyncIterator[Any]:
    server = chapter.NoteServer()
    address = await server.start(folder)
    try:
        yield address
    finally:
        await chapter.uninterrupted(server.aclose())


@asynccontextmanager
async def alone(manager: Any) -> AsyncIterator[Any]:
    """Unwrap an exception that is alone in its group."""
    try:
        async with manager as value:
            yield value
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0]  # noqa: B904


@asynccontextmanager
async def touchy() -> AsyncIterator[None]:
    """Fails in its set-up, or in its cleanup, inside of `failing_at`."""
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


def held(census: Census) -> Any:
    """Somebody else holds the lock."""

    @contextmanager
    def fault() -> Iterator[None]:
        path = census.folder / "the.lock"
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    return fault


def lock_subject(census: Census) -> Subject:
    path = census.folder / "the.lock"
    return Subject(
        lambda: chapter.lock_file(path),
        census.leaks,
        setup_faults=(held(census), partial(patched, os, "getpid", failing)),
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


def server_subject(census: Census) -> Subject:
    return Subject(
        chapter.echo_server,
        census.leaks,
        use=talk_to_server,
        closed_error=ConnectionRefusedError,
        setup_faults=(partial(patched, asyncio.Server, "start_serving", failing_coroutine),),
    )


def connection_subject(census: Census) -> Subject:
    return Subject(
        client,
        census.leaks,
        use=talk,
        closed_error=ConnectionError,
        setup_faults=(partial(patched, asyncio, "open_connection", failing_coroutine),),
    )


def class_subject(census: Census) -> Subject:
    return Subject(class_client, census.leaks, use=talk, closed_error=ConnectionError)


def child_subject(census: Census) -> Subject:
    return Subject(
        lambda: chapter.child_process(*chapter.UPPER),
        census.leaks,
        use=talk_to_child,
        closed_error=ConnectionError,
        setup_faults=(partial(patched, chapter, "UPPER", ("/no/such/program",)),),
    )


def several(census: Census) -> list[Callable[[], Any]]:
    return [
        touchy,
        lambda: chapter.lock_file(census.path("lock")),
        client,
        lambda: chapter.database(census.path("db")),
        touchy,
    ]


def open_all_subject(census: Census) -> Subject:
    return Subject(
        lambda: chapter.open_all(several(census)),
        census.leaks,
        use=lambda values: talk(values[2]),
        closed_error=ConnectionError,
        setup_faults=(failing_at("setup"),),
        cleanup_faults=(failing_at("cleanup"),),
    )


def open_together_subject(census: Census) -> Subject:
    return Subject(
        lambda: alone(chapter.open_together(several(census))),
        census.leaks,
        use=lambda values: talk(values[2]),
        closed_error=ConnectionError,
        setup_faults=(failing_at("setup"),),
        cleanup_faults=(failing_at("cleanup"),),
    )


def notes_subject(census: Census) -> Subject:
    def fresh() -> Path:
        path = census.path("notes")
        path.mkdir()
        return path

    return Subject(
        lambda: served_by_notes(fresh()),
        census.leaks,
        use=talk_to_server,
        closed_error=ConnectionRefusedError,
        setup_faults=(partial(patched, chapter, "echo_server", failing),),
    )


@sync_ways
@pytest.mark.parametrize("subject", [lock_subject, database_subject])
def test_a_sync_resource_keeps_the_cleanup_contract(
    subject: Callable[[Census], Subject], way: Way, census: Census
) -> None:
    way(subject(census))


@async_ways
@pytest.mark.parametrize(
    "subject",
    [
        server_subject,
        connection_subject,
        class_subject,
        child_subject,
        open_all_subject,
        open_together_subject,
        notes_subject,
    ],
)
def test_an_async_resource_keeps_the_cleanup_contract(
    subject: Callable[[Census], Subject], way: Way, census: Census
) -> None:
    way(subject(census))


async def cancelled_after(ticks: int, subject: Subject) -> bool:
    """Cancel a block after some turns of the loop; say whether it had ended before."""

    async def block() -> None:
        async with subject.open() as value:  # type: ignore[union-attr]
            assert subject.use is not None
            await subject.use(value)

    task = asyncio.create_task(block())
    for _tick in range(ticks):
        await asyncio.sleep(0)
    ended = task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not subject.leaks()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return ended


@pytest.mark.parametrize(
    "subject", [server_subject, connection_subject, open_all_subject, open_together_subject]
)
def test_sockets_are_closed_when_cancelled_in_any_turn_of_the_loop(
    subject: Callable[[Census], Subject], census: Census
) -> None:
    """Also where a connection has been accepted in that very turn (python/cpython#109564)."""
    for ticks in count():
        if asyncio.run(cancelled_after(ticks, subject(census))):
            break
        assert ticks < 500


# --- Lock file ---


def test_a_lock_file_names_its_holder_and_is_gone_after_the_block(tmp_path: Path) -> None:
    with chapter.lock_file(tmp_path / "lock") as path:
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_a_second_holder_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with chapter.lock_file(path):
        told = re.escape(f"{path} is held by process {os.getpid()}: wait for it, or delete the ")
        with pytest.raises(chapter.LockHeldError, match=told), chapter.lock_file(path):
            pytest.fail("entered")
        assert path.exists()


def test_a_lock_that_is_let_go_of_while_we_ask_for_its_holder_is_still_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    path.touch()
    unreadable = patched(Path, "read_text", failing)
    with unreadable, pytest.raises(chapter.LockHeldError), chapter.lock_file(path):
        pytest.fail("entered")


def test_a_lock_file_that_somebody_deleted_is_no_error(tmp_path: Path) -> None:
    with chapter.lock_file(tmp_path / "lock") as path:
        path.unlink()


# --- Database ---


def rows(path: Path) -> list[Any]:
    with chapter.database(path) as connection:
        return list(connection.execute("select * from notes"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    with chapter.database(tmp_path / "notes.db") as connection:
        connection.execute("create table notes (text)")
    return tmp_path / "notes.db"


def test_a_transaction_is_committed_at_the_end_of_its_block(notes: Path) -> None:
    with chapter.database(notes) as connection:
        connection.execute("insert into notes values ('kept')")
    assert rows(notes) == [("kept",)]


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_a_transaction_is_rolled_back_by_any_exception(
    notes: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), chapter.database(notes) as connection:
        connection.execute("insert into notes values ('lost')")
        raise error
    assert rows(notes) == []


def test_a_commit_that_fails_is_told_and_the_connection_closed(tmp_path: Path) -> None:
    with (
        pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"),
        chapter.database(tmp_path / "notes.db") as connection,
    ):
        connection.execute("pragma foreign_keys = on")
        connection.execute("create table notes (id primary key)")
        connection.execute(
            "create table tags (note references notes deferrable initially deferred)"
        )
        connection.execute("insert into tags values (1)")
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("select 1")


# --- Child process ---


@pytest.mark.asyncio
async def test_a_child_finishes_by_itself_when_its_input_ends() -> None:
    async with chapter.child_process(*chapter.UPPER) as process:
        await talk_to_child(process)
    assert process.returncode == 0


@pytest.mark.asyncio
async def test_a_child_that_does_not_finish_in_its_grace_is_killed() -> None:
    async with chapter.child_process(*chapter.DEAF, grace=0.01) as process:
        pass
    assert process.returncode == -signal.SIGKILL


@pytest.mark.asyncio
async def test_a_child_is_killed_at_once_when_the_block_fails() -> None:
    with pytest.raises(ValueError, match="the block"):
        async with chapter.child_process(*chapter.DEAF, grace=3600.0) as process:
            raise ValueError("the block")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.asyncio
async def test_a_timeout_of_the_block_is_not_taken_for_that_of_the_grace() -> None:
    with pytest.raises(TimeoutError, match="the block"):
        async with chapter.child_process(*chapter.UPPER):
            raise TimeoutError("the block")


@pytest.mark.asyncio
async def test_a_child_with_unread_output_is_killed_and_reaped_all_the_same() -> None:
    """Its pipe stays open, so that process.wait() alone would never return."""
    noisy = (*chapter.PYTHON, "while True: print('x' * 65536)")
    async with chapter.child_process(*noisy, grace=0.01) as process:
        assert await process.stdout.readline()
    assert process.returncode is not None


@pytest.mark.asyncio
async def test_a_grandchild_that_keeps_the_pipes_open_does_not_keep_us() -> None:
    inherits = "import os, time\nif os.fork() == 0: time.sleep(0.5); os._exit(0)\nprint(flush=True)"
    async with chapter.child_process(*chapter.PYTHON, inherits, grace=0.01) as process:
        assert await process.stdout.readline()
    assert process.returncode is not None
    assert not child_processes()


@pytest.mark.asyncio
async def test_a_spawn_that_is_cancelled_does_not_wait_for_a_grandchild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's own cleanup of a cancelled spawn waits until nobody holds the pipes any more."""
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
    task = asyncio.create_task(chapter.child_process(*chapter.PYTHON, forks).__aenter__())
    await until(lambda: asked.is_set() and pid.exists())
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    ended, _pending = await asyncio.wait([task], timeout=5)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    await asyncio.wait([task])
    assert ended
    assert task.cancelled()


@pytest.mark.asyncio
@pytest.mark.skipif(not hasattr(os, "getsid"), reason="Windows has no sessions")
async def test_ctrl_c_reaches_a_child_through_its_block_alone() -> None:
    """The terminal sends SIGINT to all processes of the session in its foreground."""
    for manager in (chapter.child_process, chapter.naive_child):
        async with manager(*chapter.DEAF) as process:
            assert os.getsid(process.pid) == process.pid
            process.kill()
            await process.wait()


@pytest.mark.asyncio
async def test_a_missing_program_is_told() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        async with chapter.child_process("no-such-program"):
            pytest.fail("entered")


# --- Server and connection ---


@pytest.mark.asyncio
async def test_the_server_echoes_to_several_connections_at_once() -> None:
    async with (
        chapter.echo_server() as address,
        chapter.connection(*address) as one,
        chapter.connection(*address) as two,
    ):
        await asyncio.gather(talk(one), talk(two))


@pytest.mark.asyncio
async def test_leaving_the_server_closes_its_connections() -> None:
    async with AsyncExitStack() as stack:
        async with chapter.echo_server() as address:
            reader, writer = await stack.enter_async_context(chapter.connection(*address))
            await talk((reader, writer))
        with suppress(ConnectionError):
            assert await reader.read() == b""


@pytest.mark.asyncio
async def test_the_server_outlives_a_client_that_neither_reads_nor_says_goodbye() -> None:
    async with chapter.echo_server() as address:
        async with chapter.connection(*address) as (_reader, writer):
            writer.write(b"x" * 2**20)
            await asyncio.sleep(0)
        await talk_to_server(address)


@pytest.mark.asyncio
async def test_leaving_does_not_wait_for_a_peer_that_does_not_read() -> None:
    """Both sides have more to send than the sockets take."""
    async with chapter.echo_server() as address, chapter.connection(*address) as streams:
        streams[1].write(b"x" * 2**24)
        for _tick in range(100):
            await asyncio.sleep(0)
        assert streams[1].transport.get_write_buffer_size() > 0


@pytest.mark.asyncio
async def test_a_connection_that_its_peer_reset_is_left_without_an_error() -> None:
    async with chapter.echo_server() as address:
        async with chapter.connection(*address) as (_reader, writer):
            with patched(writer, "wait_closed", failing_coroutine):
                await chapter.hang_up(writer)


@pytest.mark.asyncio
async def test_connections_that_arrive_while_the_server_closes_are_lost_without_a_trace() -> None:
    """Each is accepted in the one or the other turn of the loop; all stay open on their side."""
    clients: list[socket.socket] = []

    async def flood(address: tuple[str, int]) -> None:
        with suppress(ConnectionRefusedError):
            while True:
                clients.append(socket.create_connection(address))
                await asyncio.sleep(0)

    before = len(open_descriptors())
    try:
        async with chapter.echo_server() as address:
            flooding = asyncio.create_task(flood(address))
            for _tick in range(20):
                await asyncio.sleep(0)
        assert asyncio.all_tasks() <= {asyncio.current_task(), flooding}
        await flooding
        assert len(clients) > 20
        assert len(open_descriptors()) == before + len(clients)
    finally:
        for client in clients:
            client.close()


@pytest.mark.asyncio
async def test_the_server_is_left_when_the_tasks_of_its_connections_have_ended() -> None:
    ended: list[bool] = []
    shut = chapter._shut

    async def spying(server: asyncio.Server, echoes: dict[asyncio.Task[None], Any]) -> None:
        tasks = list(echoes)
        await shut(server, echoes)
        ended.extend(task.done() for task in tasks)

    async with AsyncExitStack() as stack:
        with patched(chapter, "_shut", spying):
            async with chapter.echo_server() as address:
                await talk(await stack.enter_async_context(chapter.connection(*address)))
    assert ended == [True]


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [TimeoutError, OSError, asyncio.CancelledError])
async def test_the_server_closes_a_connection_that_breaks_in_any_way(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: asyncio.StreamReader, n: int = -1) -> bytes:
        raise error

    monkeypatch.setattr(asyncio.StreamReader, "read", broken)
    async with chapter.echo_server() as address, chapter.connection(*address) as (reader, _writer):
        async with asyncio.timeout(5):
            assert await reader.readline() == b""


@pytest.mark.asyncio
async def test_the_server_forgets_the_connections_that_have_ended() -> None:
    left: list[Any] = []
    shut = chapter._shut

    async def spying(server: asyncio.Server, echoes: dict[Any, Any]) -> None:
        left.extend(echoes)
        await shut(server, echoes)

    with patched(chapter, "_shut", spying):
        async with chapter.echo_server() as address:
            for _time in range(3):
                await talk_to_server(address)
            await until(lambda: len(asyncio.all_tasks()) == 1)
    assert left == []


@pytest.mark.asyncio
@pytest.mark.parametrize("cancels", [0, 1, 2])
async def test_a_connection_is_closed_as_soon_as_its_block_is_left(cancels: int) -> None:
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    descriptors: list[int] = []

    async def block() -> None:
        try:
            async with chapter.connection(*address) as (_reader, writer):
                opened.set_result(writer.get_extra_info("socket"))
                if cancels:
                    await asyncio.Event().wait()
        finally:
            descriptors.append(opened.result().fileno())

    async with chapter.echo_server() as address:
        task = asyncio.create_task(block())
        await opened
        for _time in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
    assert descriptors == [-1], "a closed socket has none"


# --- uninterrupted ---


@pytest.mark.asyncio
async def test_uninterrupted_gives_the_result_or_the_error() -> None:
    assert await chapter.uninterrupted(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(OSError, match="injected"):
        await chapter.uninterrupted(failing_coroutine())


@pytest.mark.asyncio
async def test_uninterrupted_ends_before_its_cancellation_however_often_it_is_cancelled() -> None:
    go = asyncio.Event()
    ended = []

    async def cleanup() -> None:
        await go.wait()
        ended.append(True)

    task = asyncio.create_task(chapter.uninterrupted(cleanup()))
    for _time in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


# --- open_all and open_together ---


@contextmanager
def noting(log: list[str], name: str, sync: bool = True) -> Iterator[str]:
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
async def test_open_all_opens_in_order_and_closes_in_reverse_whatever_the_number(
    names: str,
) -> None:
    log: list[str] = []
    async with chapter.open_all(noting_factories(log, names)) as values:
        assert values == list(names)
    assert log == [f"+{name}" for name in names] + [f"-{name}" for name in reversed(names)]


@pytest.mark.asyncio
async def test_open_all_does_not_even_make_what_comes_after_a_failure() -> None:
    log: list[str] = []

    def fail() -> Any:
        raise OSError("injected")

    factories = [*noting_factories(log, "ab"), fail, partial(pytest.fail, "made")]
    with pytest.raises(OSError, match="injected"):
        async with chapter.open_all(factories):
            pytest.fail("entered")
    assert log == ["+a", "+b", "-b", "-a"]


@pytest.mark.asyncio
async def test_open_all_takes_an_iterator_and_lets_a_manager_suppress() -> None:
    async with chapter.open_all(iter([lambda: suppress(ValueError)])):
        raise ValueError("suppressed")


def meeting(log: list[str], barrier: asyncio.Barrier, name: str) -> Any:
    """A manager whose set-up waits until the others are setting up as well."""

    @asynccontextmanager
    async def manager() -> AsyncIterator[str]:
        entered_by = asyncio.current_task()
        await barrier.wait()
        try:
            yield name
        finally:
            assert asyncio.current_task() is entered_by
            await barrier.wait()
            log.append(name)

    return manager


@pytest.mark.asyncio
async def test_open_together_sets_up_and_leaves_all_at_once_each_in_one_task() -> None:
    log: list[str] = []
    barrier = asyncio.Barrier(3)
    async with asyncio.timeout(10):
        async with chapter.open_together([meeting(log, barrier, name) for name in "abc"]) as values:
            assert values == ["a", "b", "c"]
    assert sorted(log) == ["a", "b", "c"]


@pytest.mark.asyncio
async def test_open_together_gives_up_the_others_as_soon_as_one_fails() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def endless() -> AsyncIterator[None]:
        with noting(log, "endless"):
            await asyncio.Event().wait()
        yield

    with pytest.raises(ExceptionGroup) as caught:
        async with chapter.open_together([endless, lambda: failing_manager("third")]):
            pytest.fail("entered")
    assert [str(error) for error in caught.value.exceptions] == ["third"]
    assert log == ["+endless", "-endless"]


@asynccontextmanager
async def failing_manager(what: str) -> AsyncIterator[None]:
    raise OSError(what)
    yield


@pytest.mark.asyncio
async def test_managers_see_a_cancellation_where_the_block_of_open_together_fails(
    notes: Path,
) -> None:
    with pytest.raises(ExceptionGroup):
        async with chapter.open_together([partial(chapter.database, notes)]) as (connection,):
            connection.execute("insert into notes values ('lost')")
            raise ValueError("the block")
    assert rows(notes) == []


@pytest.mark.asyncio
async def test_a_timeout_or_a_variable_acts_on_its_owner_and_not_on_the_block() -> None:
    variable = ContextVar("variable", default="outside")

    @contextmanager
    def bound() -> Iterator[None]:
        token = variable.set("inside")
        yield
        variable.reset(token)

    async with chapter.open_together([bound]):
        assert variable.get() == "outside"
    with pytest.raises(ExceptionGroup) as caught:
        async with chapter.open_together([lambda: asyncio.timeout(0)]):
            await asyncio.Event().wait()
    assert [type(error) for error in caught.value.exceptions] == [TimeoutError]


# --- Our own exit stack, with the real one as its oracle ---


class Step(AbstractAsyncContextManager[None]):
    """One exit of a random sequence: notes what it sees, then does what `plan` says."""

    def __init__(self, log: list[object], number: int, plan: str) -> None:
        self.log, self.number, self.plan = log, number, plan

    async def __aenter__(self) -> None:
        self.log.append(("enter", self.number))
        if self.plan == "fail to enter":
            raise OSError(f"set-up of {self.number}")

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> bool | None:
        await asyncio.sleep(0)
        assert (kind, traceback) == (error and type(error), error and error.__traceback__)
        self.log.append((self.number, label(error)))
        if self.plan == "raise":
            raise OSError(f"exit of {self.number}")
        if self.plan == "raise base":
            raise KeyboardInterrupt(f"exit of {self.number}")
        if self.plan == "raise from":
            raise OSError(f"exit of {self.number}") from error
        if self.plan == "raise again" and error:
            raise error
        return self.plan == "suppress"


PLANS = ["pass", "pass", "suppress", "raise", "raise base", "raise from", "raise again"]


def label(error: BaseException | None) -> object:
    """What an error is, and what it was raised from."""
    return error and (type(error).__name__, str(error), label(error.__cause__))


def contexts(error: BaseException | None) -> list[str]:
    """An error, what was being handled when it was raised, and so on."""
    return [str(error), *contexts(error.__context__)] if error else []


async def unwound(stack: Any, plans: list[str], body: BaseException | None) -> list[object]:
    log: list[object] = []
    try:
        async with stack:
            for number, plan in enumerate(plans):
                await stack.enter_async_context(Step(log, number, plan))
            log.append("block")
            if body:
                raise body
    except BaseException as error:
        log.append(("came out", label(error)))
    return log


@pytest.mark.parametrize("seed", range(20))
def test_our_own_stack_does_what_the_real_one_does_for_random_exits(seed: int) -> None:
    chance = random.Random(seed)

    async def compare() -> None:
        for _case in range(25):
            plans = chance.choices(PLANS, k=chance.randrange(7))
            if chance.random() < 0.1:
                plans.append("fail to enter")
            kind = chance.choice([None, ValueError, asyncio.CancelledError, GeneratorExit])
            ours = await unwound(chapter.TinyExitStack(), plans, kind and kind("block"))
            real = await unwound(AsyncExitStack(), plans, kind and kind("block"))
            assert ours == real, plans

    asyncio.run(compare())


async def came_out(stack: Any, plans: list[str]) -> BaseException:
    try:
        async with stack:
            for number, plan in enumerate(plans):
                await stack.enter_async_context(Step([], number, plan))
            raise ValueError("block")
    except BaseException as error:
        return error


@pytest.mark.asyncio
async def test_where_the_block_failed_the_real_stack_chains_every_error_as_nesting_does() -> None:
    plans = ["raise", "pass", "raise", "suppress", "raise"]
    real = contexts(await came_out(AsyncExitStack(), plans))
    with pytest.raises(OSError, match="exit of 0") as nested:
        async with Step([], 0, "raise"), Step([], 1, "pass"), Step([], 2, "raise"):
            async with Step([], 3, "suppress"), Step([], 4, "raise"):
                raise ValueError("block")
    assert real == contexts(nested.value) == ["exit of 0", "exit of 2"]
    plans = ["raise", "pass", "raise"]
    real = contexts(await came_out(AsyncExitStack(), plans))
    ours = contexts(await came_out(chapter.TinyExitStack(), plans))
    assert real == ["exit of 0", "exit of 2", "block"]
    assert ours == ["exit of 0", "block"], "what the real one adds"


@pytest.mark.asyncio
@pytest.mark.parametrize("stack", [chapter.TinyExitStack, AsyncExitStack])
async def test_a_stack_lets_an_error_pass_without_raising_it_again(stack: Any) -> None:
    assert not await stack().__aexit__(ValueError, ValueError("the block"), None)


def test_our_own_stack_is_twenty_lines_of_code() -> None:
    lines = inspect.getsource(chapter.TinyExitStack).splitlines()
    assert 15 <= len([line for line in lines if line.strip()]) <= 24


# --- What the demos show ---


def output(capsys: pytest.CaptureFixture[str], demo: str) -> list[str]:
    """The lines that a demo prints, without the bars in front; no empty ones."""
    asyncio.run(getattr(chapter, demo)())
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line]


def brackets(lines: list[str]) -> list[str]:
    """Only where a block begins, and how it ends."""
    return [line for line in lines if line[:1] in ("┌", "└")]


def test_the_three_spellings_of_one_resource_do_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_one")
    assert "ask_by_hand: hello" in shown
    assert shown.count("hello") == 2
    assert brackets(shown) == [
        "┌ echo_server",
        "┌ Connection",
        "└ ended",
        "┌ connection",
        "└ ended",
        "└ ended",
    ]


def test_nested_blocks_and_a_stack_open_and_close_in_the_same_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_several")
    nested, on_a_stack, any_number = brackets(shown)[:4], brackets(shown)[4:8], brackets(shown)[8:]
    assert nested == on_a_stack == ["┌ lock_file", "┌ database", "└ ended", "└ ended"]
    assert any_number == ["┌ child 0", "┌ child 1", "┌ child 2", "└ ended", "└ ended", "└ ended"]
    assert "Any number: the children answer HELLO, HELLO, HELLO." in shown


def test_our_own_stack_fails_for_a_sync_manager_and_the_real_one_takes_what_people_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chapter.tempfile, "tempdir", str(tmp_path))
    say, hang_up = chapter.say, chapter.hang_up
    log: list[tuple[str, int]] = []

    def watching(text: str, *mark: str) -> None:
        log.append((text.partition(" ")[0], len(os.listdir(tmp_path))))
        say(text, *mark)

    async def watched(writer: asyncio.StreamWriter) -> None:
        await hang_up(writer)
        log.append(("closed", len(os.listdir(tmp_path))))

    monkeypatch.setattr(chapter, "say", watching)
    monkeypatch.setattr(chapter, "hang_up", watched)
    shown = output(capsys, "demo_stack")
    assert "AttributeError(\"'suppress' object has no attribute '__aenter__'\")" in shown
    assert "push_async_exit sees ValueError('hello') and suppresses it." in shown
    assert log[-4:] == [("closed", 1), ("callback:", 1), ("push_async_exit", 0), ("The", 0)]


@needs_a_list_of_descriptors
def test_by_hand_two_of_four_stay_open_and_on_the_stack_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_third_fails")
    assert "✗ FileExistsError: 2 descriptors stay open." in shown
    assert shown[-1] == "✓ LockHeldError: 0 descriptors stay open."
    assert brackets(shown) == [
        "┌ echo_server",
        "┌ database",
        "┌ lock_file",
        "└ left by LockHeldError",
        "└ left by LockHeldError",
        "└ left by LockHeldError",
    ]
    assert f"is held by process {os.getpid()}: wait for it," in " ".join(shown)


def test_what_a_stack_returns_is_closed_already_unless_its_exits_were_handed_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_hand_over")
    assert shown[-5].startswith("✗ ConnectionRefusedError(")
    assert shown[-4:] == [
        "┌ connection",
        "hello",
        "└ ended",
        "✓ After aclose the folder holds notes.db.",
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize("missing", ["database", "echo_server"])
async def test_a_long_lived_object_whose_start_fails_keeps_nothing(
    missing: str, tmp_path: Path
) -> None:
    server = chapter.NoteServer()
    with patched(chapter, missing, failing), pytest.raises(OSError, match="injected"):
        await server.start(tmp_path)
    assert "lock" not in os.listdir(tmp_path)
    await server.start(tmp_path)
    await server.aclose()


def test_break_leaves_a_generator_open_and_aclosing_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert output(capsys, "demo_generator")[-7:] == [
        "┌ connection",
        "hello",
        "After `break` the connection is still open.",
        "└ left by GeneratorExit",
        "┌ connection",
        "hello",
        "└ left by GeneratorExit",
    ]


@pytest.mark.asyncio
async def test_a_stack_enters_aclosing_like_any_other_manager() -> None:
    async with chapter.echo_server() as address, AsyncExitStack() as stack:
        generator = chapter.answers(address)
        stream = await stack.enter_async_context(aclosing(generator))
        assert await anext(stream) == "hello"
        await stack.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(generator)


def test_the_chain_of_failed_cleanups_is_the_one_that_python_makes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The gap of the real stack is shown as it is on this Python: it may be closed one day."""

    async def with_two_callbacks() -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(failing_with, "first")
            stack.push_async_callback(failing_with, "second")

    async def failing_with(what: str) -> None:
        raise OSError(what)

    with pytest.raises(OSError, match="first") as caught:
        asyncio.run(with_two_callbacks())
    assert contexts(caught.value) in (["first"], ["first", "second"])
    shown = output(capsys, "demo_cleanup_fails")
    assert shown[shown.index("A stack, and the block fails too:") :] == [
        "A stack, and the block fails too:",
        "OSError('first')",
        "OSError('second')",
        "ValueError('the block')",
        "A stack, and the block ends well:",
        *(f"OSError('{what}')" for what in contexts(caught.value)),
        "Nested, and the block ends well:",
        "OSError('first')",
        "OSError('second')",
    ]


def test_every_cleanup_of_a_stack_runs_though_others_fail() -> None:
    log: list[str] = []

    async def with_failures() -> None:
        async with AsyncExitStack() as stack:
            for name in "abc":
                stack.callback(failing)
                stack.callback(log.append, name)

    with pytest.raises(OSError, match="injected"):
        asyncio.run(with_failures())
    assert log == ["c", "b", "a"]


def test_a_cancellation_during_cleanup_leaves_the_naive_child_alive_and_not_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_cancelled")
    assert [line for line in shown if line[0] in "✗✓"] == [
        "✗ naive_child: the child lives on.",
        "✓ child_process: the child is gone.",
    ]


def test_the_path_of_the_naive_child_ends_before_its_kill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_cancelled")
    assert any(re.fullmatch(r"await asyncio.wait_for\(.* 5", line) for line in shown)
    assert shown.count("process.kill()") == 2, "in the code, and without a number in the path"


@needs_a_list_of_descriptors
def test_gather_mixes_up_order_tasks_and_failures_and_owners_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_together")
    assert shown[-8:-4] == [
        "lock_file is open",
        "child_process is open",
        "child_process is closed",
        "lock_file is closed",
    ]
    assert "✗ gather: ValueError: was created in a different Context" in shown
    assert re.fullmatch(r"✗ gather: LockHeldError, [1-9] descriptors stay open\.", shown[-2])
    assert shown[-1] == "✓ open_together: ExceptionGroup, 0 descriptors stay open."


@pytest.mark.asyncio
async def test_a_timeout_entered_by_gather_never_fires() -> None:
    async with AsyncExitStack() as stack:
        (timeout,) = await asyncio.gather(stack.enter_async_context(asyncio.timeout(0)))
        for _tick in range(10):
            await asyncio.sleep(0)
        assert timeout.expired()


def test_the_decision_table_names_for_each_row_a_demo_that_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chapter.demo_which_one()
    numbers = re.findall(r"│ (\d+) +│$", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number in numbers] == [1, 2, 2, *range(3, len(chapter.DEMOS))]


@pytest.mark.asyncio
async def test_a_bracketed_manager_of_either_kind_is_entered_and_exited(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log: list[str] = []
    managers = [factory() for factory in noting_factories(log, "ab")]
    for manager in managers:
        async with chapter.bracketed("label", manager) as value:
            log.append(value)
    with pytest.raises(OSError, match="set-up"):
        async with chapter.bracketed("label", failing_manager("set-up")):
            pytest.fail("entered")
    assert log == ["+a", "a", "-a", "+b", "b", "-b"]
    shown = ["┌ label", "└ ended"] * 2 + ["┌ label", "└ left by OSError"]
    assert capsys.readouterr().out.splitlines() == shown
    assert not chapter.open_brackets


def test_ctrl_c_that_arrives_as_a_cancellation_comes_out_as_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Python 3.11, if a TaskGroup has failed before."""
    monkeypatch.setattr(sys, "argv", ["07.py"])
    with pytest.raises(KeyboardInterrupt), chapter.command_line(argparse.ArgumentParser()):
        raise asyncio.CancelledError
