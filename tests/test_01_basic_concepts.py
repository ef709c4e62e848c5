"""Chapter 01: each promise of its managers and lessons, and the cleanup contract."""

from __future__ import annotations

import configparser
import contextlib
import errno
import io
import logging
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject
from waiting import FakeClock

chapter: Any = load_chapter(1)
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
since_3_12 = pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit is newer")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux has")


def interrupted(manager: Any, run: Callable[[], object]) -> Iterator[str]:
    """Play `run` once for each opcode of the manager, with Ctrl-C there; yield the source line.

    A real signal can arrive between any two of them. Last, play it undisturbed, and yield "".
    """
    code = manager.__wrapped__.__code__
    source = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
    nth, left, line = 0, 0, "not yet"

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left, line
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lineno is not None:  # not where Python itself tidies up
            left -= 1
            if left == 0:
                line = source[frame.f_lineno - 1].strip()
                raise KeyboardInterrupt
        return on_event

    while line:
        nth, left, line = nth + 1, nth + 1, ""
        came_out: BaseException | None = None
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # subtle: 3.12 wants one before settrace
        sys.settrace(on_event)
        try:
            run()
        except (KeyboardInterrupt, ValueError) as error:
            came_out = error
        finally:
            sys.settrace(before)
        assert isinstance(came_out, KeyboardInterrupt) == bool(line), "Ctrl-C must stay Ctrl-C"
        yield line
    assert nth > 20


# --- Timers ---


def test_a_timer_times_one_block_after_another_from_zero() -> None:
    timer = chapter.Timer(FakeClock())
    for _round in range(2):
        with timer as entered:
            assert entered is timer
            assert (timer.elapsed, timer.elapsed) == (1, 2)
        assert (timer.elapsed, timer.elapsed) == (3, 3)


def test_a_timer_is_never_read_unstarted_nor_entered_twice() -> None:
    timer = chapter.Timer(FakeClock())
    with pytest.raises(RuntimeError, match="this Timer was never started: enter it in a `with`"):
        _ = timer.elapsed
    with timer:
        with pytest.raises(RuntimeError, match="already running: use another one"):
            timer.__enter__()
    assert timer.elapsed == 1


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_timer_logs_however_the_block_ends(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), suppress(BaseException):
        with chapter.timer("load", FakeClock()) as timer:
            if error:
                raise error
    assert timer.elapsed == 2
    assert caplog.messages == ["load took 1.000000 s"]


def test_ctrl_c_at_any_opcode_of_timer_stays_ctrl_c() -> None:
    def run() -> None:
        with chapter.timer("load"):
            pass

    assert "yield timed" in set(interrupted(chapter.timer, run))


@contextmanager
def failing(owner: Any, name: str, always: bool = True) -> Iterator[type[OSError] | None]:
    """A fault: calls of `owner.name` fail. Not `always`: it is called only if all went well."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield PermissionError if always else None


@ways
def test_both_timers_keep_the_cleanup_contract(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[Any] = []
    clock = SimpleNamespace(read=FakeClock())

    class Watched(chapter.Timer):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, _clock: object) -> None:
            super().__init__(lambda: clock.read())
            timers.append(self)

    monkeypatch.setattr(chapter, "Timer", Watched)
    way(
        Subject(
            open=lambda: chapter.timer("contract"),
            leaks=lambda: [t for t in timers if t._stopped is None and t._started is not None],
            use=lambda timer: timer.elapsed,
            setup_faults=[lambda: failing(clock, "read")],
            cleanup_faults=[lambda: failing(chapter.logger, "info")],
        )
    )


# --- Temporary configuration ---


def test_values_and_absences_are_restored_exactly() -> None:
    config: dict[str, object] = {"kept": 1, "changed": 2, "none": None, "deleted": 3}
    changes = {"changed": 4, "none": 5, "deleted": 6, "added": 7, "config": 8, "llm.model": 9}
    with chapter.temporary_config(config, **changes) as inside:
        assert inside is config
        assert config == {"kept": 1} | changes
        del config["deleted"], config["added"]
        config["other"] = 10  # not the manager's business
    assert config == {"kept": 1, "changed": 2, "none": None, "deleted": 3, "other": 10}


def test_the_environment_is_restored_even_if_it_rejects_a_value() -> None:
    before = dict(os.environ)
    with chapter.temporary_config(os.environ, HOME="/elsewhere", WORKSHOP="on"):
        assert os.path.expanduser("~") == "/elsewhere" or sys.platform == "win32"
    assert dict(os.environ) == before
    with pytest.raises(TypeError), chapter.temporary_config(os.environ, HOME="/x", WORKSHOP=None):
        pytest.fail("the block ran")
    assert dict(os.environ) == before


def test_what_is_not_restored_is_as_the_docstring_says() -> None:
    chain: ChainMap[str, int] = ChainMap({}, {"a": 1})
    with chapter.temporary_config(chain, a=2):
        pass
    assert chain.maps == [{"a": 1}, {"a": 1}]
    parser = configparser.ConfigParser()
    with chapter.temporary_config(parser, DEFAULT={"model": "large"}):
        pass
    assert parser["DEFAULT"] == {"model": "large"}
    config = {"model": "small"}
    first = chapter.temporary_config(config, model="medium")
    with first, chapter.temporary_config(config, model="large"):
        first.__exit__(None, None, None)
        assert config["model"] == "small", "while the second block still runs"


@ways
def test_temporary_config_keeps_the_cleanup_contract(way: Any) -> None:
    class Config(dict[str, int]): ...

    config = Config(a=1)

    @contextmanager
    def restoring_fails(name: str) -> Iterator[object]:
        with failing(config, name) as error:
            yield error
        if name == "pop":  # the one key that could not be restored; the other one must be
            del config["b"]
        else:
            config["a"] = 1

    way(
        Subject(
            open=lambda: chapter.temporary_config(config, a=2, b=3),
            leaks=lambda: config if config != {"a": 1} else None,
            setup_faults=[lambda: failing(config, "update")],
            cleanup_faults=[lambda: restoring_fails("pop"), lambda: restoring_fails("__setitem__")],
            concurrent=False,  # see the test above
        )
    )


# --- Files ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file, alone in its folder."""
    path = tmp_path / "file"
    path.write_text("old")
    return path


@pytest.mark.parametrize(
    ("arguments", "written", "read"),
    [
        ({}, "é", b"\xc3\xa9"),
        ({"encoding": "latin-1"}, "é", b"\xe9"),
        ({"mode": "wb"}, b"\0", b"\0"),
    ],
)
def test_the_file_is_replaced_when_the_block_ends_well(
    path: Path, arguments: Any, written: Any, read: bytes
) -> None:
    with chapter.atomic_write(path, **arguments) as file:
        file.write(written)
        if isinstance(written, str):  # whatever the locale says: Linux would say "UTF-8"
            assert file.encoding == arguments.get("encoding", "utf-8")
        assert path.read_text() == "old"
    assert path.read_bytes() == read
    assert os.listdir(path.parent) == ["file"]


def test_the_whole_draft_is_on_the_disk_before_it_is_renamed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []

    def note(step: str, file: int | Path) -> None:
        steps.append((step, os.stat(file).st_ino, os.stat(file).st_size))

    monkeypatch.setattr(os, "fsync", partial(note, "fsync"))
    monkeypatch.setattr(os, "replace", lambda draft, _target: note("rename", draft))
    with chapter.atomic_write(path) as file:
        number = os.fstat(file.fileno()).st_ino
        file.write("new")
        assert steps == []
    assert steps == [("fsync", number, 3), ("rename", number, 3)], "all 3 bytes, both times"


@on_posix
def test_a_new_file_gets_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with chapter.atomic_write(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o640


@on_posix
def test_at_no_line_can_others_read_the_draft_of_a_secret(path: Path) -> None:
    path.chmod(0o600)
    readable: list[int] = []

    def look(frame: FrameType, _event: str, _argument: object) -> Any:
        drafts = path.parent.glob(".*draft")
        readable.extend(frame.f_lineno for draft in drafts if draft.stat().st_mode & 0o077)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        with chapter.atomic_write(path) as file:
            file.write("new")
    finally:
        sys.settrace(before)
    assert readable == []


@on_posix
def test_owner_mode_and_attributes_are_kept_but_not_the_time(path: Path) -> None:
    def attributes() -> tuple[object, ...]:
        status, names = path.stat(), os.listxattr(path) if sys.platform == "linux" else []
        return status.st_mode, status.st_uid, status.st_gid, [os.getxattr(path, n) for n in names]

    if os.geteuid() == 0:  # nobody else can give a file away
        os.chown(path, 1234, 5678)
    path.chmod(0o4755)  # the set-user-ID bit: chown would clear it, root's own writing would not
    with suppress(OSError, AttributeError):  # macOS, or a file system without
        os.setxattr(path, "user.origin", b"workshop")
    os.utime(path, (1, 1))
    before = attributes()
    with chapter.atomic_write(path):
        pass
    assert attributes() == before
    assert path.stat().st_mtime > 1


@on_posix
def test_if_the_owner_cannot_be_kept_it_says_so_before_the_block(path: Path) -> None:
    error = pytest.raises(PermissionError, match="cannot keep its owner")
    with failing(os, "chown"), error as caught, chapter.atomic_write(path):
        pytest.fail("the block ran")
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, str(path))
    assert (os.listdir(path.parent), path.read_text()) == (["file"], "old")


@on_linux
def test_the_default_acl_of_a_directory_does_not_open_a_private_file(path: Path) -> None:
    path.chmod(0o640)
    everybody = 0xFFFFFFFF
    # The owner may do all, user 1000 may read, and nobody else may do anything.
    entries = [(1, 7, everybody), (2, 4, 1000), (4, 0, everybody), (16, 4, everybody)]
    acl = struct.pack("<I", 2)
    for entry in [*entries, (32, 0, everybody)]:
        acl += struct.pack("<HHI", *entry)
    try:
        os.setxattr(path.parent, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    with chapter.atomic_write(path) as file:
        file.write("new")
    assert "system.posix_acl_access" not in os.listxattr(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_symbolic_links_are_followed_and_hard_links_keep_the_old_content(path: Path) -> None:
    hard, symbolic = path.with_name("hard"), path.with_name("symbolic")
    hard.hardlink_to(path)
    symbolic.symlink_to(path)
    with chapter.atomic_write(symbolic) as file:
        file.write("new")
    assert symbolic.is_symlink()
    assert (path.read_text(), hard.read_text()) == ("new", "old")


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    with chapter.atomic_write(tmp_path / ("x" * 255)) as file:
        file.write("new")
    assert os.listdir(tmp_path) == ["x" * 255]


NOT_REGULAR = (OSError, r"not a regular file: write to it with open\(\)")
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[type[Exception], str]]] = {
    "a directory": (Path.mkdir, NOT_REGULAR),
    "a FIFO": (os.mkfifo, NOT_REGULAR),
    "a link to a device": (lambda path: path.symlink_to(os.devnull), NOT_REGULAR),
    "x" * 256: (lambda path: None, (OSError, "name too long")),
    "mode a": (Path.touch, (ValueError, "mode is 'a', but atomic_write needs 'w' or 'wb'")),
}


@on_posix
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_refused_before_the_block(tmp_path: Path, name: str) -> None:
    make, (error, message) = REFUSED[name]
    make(tmp_path / name)
    before = [(entry.name, entry.inode()) for entry in os.scandir(tmp_path)]
    mode = "a" if name == "mode a" else "w"
    with pytest.raises(error, match=message), chapter.atomic_write(tmp_path / name, mode):
        pytest.fail("the block ran")
    assert [(entry.name, entry.inode()) for entry in os.scandir(tmp_path)] == before


MOUNTED = """
import os, pathlib, runpy, subprocess, sys
chapter = runpy.run_path(sys.argv[1])
os.mkdir("elsewhere")
subprocess.run(["mount", "-t", "tmpfs", "none", "elsewhere"], check=True)
for source in ("elsewhere/source", "source"):
    pathlib.Path(source).write_text("old")
    pathlib.Path("mounted").touch()
    subprocess.run(["mount", "--bind", source, "mounted"], check=True)
    try:
        with chapter["atomic_write"]("mounted") as file:
            print("the block ran")
    except OSError as error:
        print(error.strerror)
    print(pathlib.Path("mounted").read_text(), sorted(os.listdir()))
    subprocess.run(["umount", "mounted"], check=True)
"""


def test_a_mount_point_is_refused_before_the_block_or_after_it(tmp_path: Path) -> None:
    try:
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("mount namespaces are not permitted here")
    command = ["unshare", "-m", sys.executable, "-c", MOUNTED, chapter.__file__]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == [
        "a mount point: write to it with open()",
        "old ['elsewhere', 'mounted']",
        "the block ran",
        "Device or resource busy",
        "old ['elsewhere', 'mounted', 'source']",
    ], ended.stderr


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that was interrupted as it opened
@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_at_any_opcode_leaves_the_old_file_or_the_new_one(path: Path, fails: bool) -> None:
    def write() -> None:
        with chapter.atomic_write(path) as file:
            file.write("n")
            file.flush()
            file.write("ew")
            if fails:
                raise ValueError

    contents = []
    for line in interrupted(chapter.atomic_write, write):
        contents.append(path.read_text())
        path.write_text("old")
        drafts = [name for name in os.listdir(path.parent) if name != "file"]
        # In the cleanup itself it can be left: nothing in Python prevents that.
        assert not drafts or "draft.unlink" in line, line
        for name in drafts:
            path.with_name(name).unlink()
    assert set(contents) == ({"old"} if fails else {"old", "new"})
    assert contents[-1] == ("old" if fails else "new")


@ways
def test_atomic_write_keeps_the_cleanup_contract(way: Any, path: Path) -> None:
    way(
        Subject(
            open=lambda: chapter.atomic_write(path),
            leaks=lambda: [name for name in os.listdir(path.parent) if name != "file"],
            use=lambda file: file.write("x"),
            closed_error=ValueError,
            setup_faults=[lambda: failing(os, "open"), lambda: failing(os, "utime")],
            cleanup_faults=[
                lambda: failing(os, "fsync", always=False),
                lambda: failing(os, "replace", always=False),
            ],
        )
    )


# --- Databases ---


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # for speed
        connection.execute("CREATE TABLE account (name PRIMARY KEY, money)")
        connection.commit()
        yield connection


@pytest.fixture
def other(tmp_path: Path, accounts: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A second connection to the same database."""
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        yield connection


def insert(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("INSERT OR REPLACE INTO account VALUES (?, 1)", [name])


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM account")]


@pytest.mark.parametrize("isolation_level", ["", None, "EXCLUSIVE"])
@pytest.mark.parametrize("autocommit", [False, pytest.param(True, marks=since_3_12)])
def test_a_transaction_is_seen_by_others_when_it_ends_well(
    accounts: Any, other: Any, isolation_level: Any, autocommit: bool
) -> None:
    accounts.isolation_level = isolation_level
    if autocommit:
        accounts.autocommit = True
    with chapter.transaction(accounts) as connection:
        assert connection is accounts
        insert(connection, "Ada")
        assert names(other) == []
    assert names(other) == ["Ada"]


def test_the_write_lock_is_taken_before_the_block(accounts: Any, other: Any) -> None:
    with chapter.transaction(accounts), pytest.raises(sqlite3.OperationalError, match="locked"):
        insert(other, "Bob")


def test_a_transaction_in_a_transaction_is_refused(accounts: sqlite3.Connection) -> None:
    with chapter.transaction(accounts):
        insert(accounts, "Ada")
        with pytest.raises(RuntimeError, match="a transaction is open: end it"):
            chapter.transaction(accounts).__enter__()
    assert names(accounts) == ["Ada"]


@since_3_12
def test_a_connection_with_autocommit_false_is_refused(accounts: Any) -> None:
    accounts.autocommit = False
    with pytest.raises(RuntimeError, match="or connect without autocommit=False"):
        chapter.transaction(accounts).__enter__()


ENDS: dict[str, Callable[[sqlite3.Connection], object]] = {
    "commit()": lambda connection: connection.commit(),
    "rollback()": lambda connection: connection.rollback(),
    "executescript()": lambda connection: connection.executescript("SELECT 1;"),
    "with connection": lambda connection: connection.__exit__(None, None, None),
}


@pytest.mark.parametrize("isolation_level", ["", None])
@pytest.mark.parametrize("end", ENDS)
def test_a_block_that_ends_its_own_transaction_gets_a_clear_error(
    accounts: Any, end: str, isolation_level: Any
) -> None:
    accounts.isolation_level = isolation_level
    error = pytest.raises(sqlite3.OperationalError, match="do_not_commit")
    with error, chapter.transaction(accounts):
        insert(accounts, "Ada")
        ENDS[end](accounts)
        if not isolation_level:
            return  # without an open transaction, the next statement commits at once
        insert(accounts, "Bob")
    assert not accounts.in_transaction
    assert "Bob" not in names(accounts)


def test_a_block_that_rolled_back_and_raised_keeps_its_error(accounts: Any) -> None:
    with pytest.raises(ValueError, match="mine"), chapter.transaction(accounts):
        accounts.rollback()
        raise ValueError("mine")


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_at_any_opcode_leaves_all_of_a_transaction_or_nothing(
    accounts: sqlite3.Connection, fails: bool
) -> None:
    def write() -> None:
        with chapter.transaction(accounts):
            insert(accounts, "Ada")
            if fails:
                raise ValueError
            insert(accounts, "Bob")

    for line in interrupted(chapter.transaction, write):
        in_cleanup = ("except BaseException", "if connection.in_transaction", "ROLLBACK")
        # In the cleanup itself it can stay open: nothing in Python prevents that.
        assert not accounts.in_transaction or any(part in line for part in in_cleanup), line
        accounts.rollback()
        rows = names(accounts)
        assert rows == [] or (rows == ["Ada", "Bob"] and not fails)
        accounts.execute("DELETE FROM account")
        accounts.commit()
    assert rows == ([] if fails else ["Ada", "Bob"])


@ways
def test_transaction_keeps_the_cleanup_contract(way: Any, accounts: Any, other: Any) -> None:
    accounts.isolation_level = None
    for name in ("Ada", "Bob"):
        insert(accounts, name)

    @contextmanager
    def locked_by(statement: str) -> Iterator[None]:
        reading = other.execute(statement)
        reading.fetchone()
        yield
        reading.close()
        other.rollback()

    way(
        Subject(
            open=lambda: chapter.transaction(accounts),
            leaks=lambda: accounts.in_transaction,
            use=lambda connection: insert(connection, "Cem"),
            setup_faults=[lambda: locked_by("BEGIN IMMEDIATE")],
            cleanup_faults=[lambda: locked_by("SELECT name FROM account")],
            nestable=False,
            concurrent=False,  # a connection belongs to one thread
        )
    )


# --- contextmanager, from scratch ---


def generator(story: str) -> Iterator[str]:
    if story == "fails in set-up":
        raise KeyError("from the generator")
    try:
        yield story
    except ValueError:
        if story == "translates":
            raise KeyError("from the generator") from None
        if story != "catches":
            raise
    if story == "fails in cleanup":
        raise KeyError("from the generator")
    if story == "yields twice":
        yield story


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "story", ["fails in set-up", "translates", "passes on", "catches", "fails in cleanup"]
)
def test_from_scratch_does_what_contextlib_does(story: str, error: Any) -> None:
    def play(decorator: Any) -> tuple[object, str]:
        value = None
        try:
            with decorator(generator)(story=story) as value:
                if error:
                    raise error
        except BaseException as came_out:
            return value, repr(came_out)
        return value, "no error"

    assert play(chapter.contextmanager_from_scratch) == play(contextmanager)


def test_from_scratch_suppresses_nothing_if_the_block_ends_well() -> None:
    manager = chapter.contextmanager_from_scratch(generator)("passes on")
    manager.__enter__()
    assert manager.__exit__(None, None, None) is False


def test_from_scratch_reports_a_second_yield() -> None:
    make_manager = chapter.contextmanager_from_scratch(generator)
    with pytest.raises(RuntimeError, match="has a second `yield`"), make_manager("yields twice"):
        pass


def test_from_scratch_lacks_what_its_docstring_says() -> None:
    make_empty = chapter.contextmanager_from_scratch(lambda: iter(()))
    with pytest.raises(StopIteration), make_empty():
        pytest.fail("the block ran")
    make_manager = chapter.contextmanager_from_scratch(generator)
    with pytest.raises(RuntimeError, match="generator raised StopIteration"), make_manager(""):
        raise StopIteration
    with pytest.raises(ValueError, match="mine") as raised, make_manager(""):
        raise ValueError("mine")
    assert "__exit__" in [entry.name for entry in raised.traceback]
    assert not callable(make_manager(""))
    assert make_manager.__name__ != "generator"


# --- What the demos show ---


def output(capsys: pytest.CaptureFixture[str], number: int) -> str:
    chapter.play(number)
    return capsys.readouterr().out


# What each demo prints, in this order: the line, or the verdict, behind its number.
SHOWN = """
1 manager.__exit__(None, None, None) 4
1 ✗ `by_hand`: __enter__(), __exit__(None), __enter__(), __enter__()
1 with manager: 1 4 1 4 1 5
1 ✓ `with_statement`: __enter__(), __exit__(None),
1 __enter__(), __exit__(None), __enter__(), __exit__(ValueError)
2 seconds.append(time.perf_counter() - started) 3
2 ✗ Measured by hand: 1 of 2 runs.
2 self._stopped = self._clock() 13 13
2 ✓ Measured by the timer: 2 of 2 runs.
3 path.touch(exist_ok=False) 1 1 yield 2 2 path.unlink() 3
3 ✗ Left in the folder: ['report.lock']. The next run: FileExistsError.
3 path.unlink() 4 4
3 ✓ Left in the folder: []. The next run: no error.
4 ✗ Afterwards: {'model': 'gpt-4o-mini', 'debug': None}
4 ✓ Afterwards: {'model': 'gpt-4o-mini'}
5 batch.append(int(word)) 3 5 3 5
5 ✗ `1 two 3`: no error, and the batch is [1].
5 ┌ no such file │ ┌ os.remove │ └ left by FileNotFoundError └ ended
5 ┌ . │ ┌ os.remove │ └ left by IsADirectoryError └ left by IsADirectoryError
5 ✓ A missing file: no error; a directory: IsADirectoryError.
6 next(self.generator, None) 6 6
6 ✗ If the block raises, the caller sees: ValueError.
6 next(self.generator) 8 else: self.generator.throw(exc) 8
6 ✓ If the block raises, the caller sees: no error.
7 ✗ `open`: {'report.txt': 'second '}
7 os.replace(draft, target) 16 finally: draft.unlink(missing_ok=True) 17 13
7 ✓ `atomic_write`: {'report.txt': 'first report'}
8 connection.commit() 8 7
8 ✗ `careless_transaction`: Ada 0 + Bob 50 = 50
8 connection.execute("ROLLBACK") 12 raise 13
8 ✓ `transaction`: Ada 50 + Bob 50 = 100
9 │ sys.exit(1) │ 1 │ │
9 │ os.kill(os.getpid(), signal.SIGINT) │ -2 │ │
9 │ os.kill(os.getpid(), signal.SIGTERM) │ -15 │ report.lock │
9 │ os.kill(os.getpid(), signal.SIGKILL) │ -9 │ report.lock │
9 │ os._exit(1) │ 1 │ report.lock │
9 ✗ 3 of 5 ways leave the lock behind.
"""


@on_posix
@pytest.mark.parametrize("number", range(1, 10))
def test_a_demo_shows_the_path_and_the_broken_version_first(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, number)
    expected = [text for n, text in re.findall(r"(?m)^(\d) (.+)", SHOWN) if int(n) == number]
    rest = " ".join(shown.split())
    for text in expected:
        _before, found, rest = rest.partition(text)
        assert found, text
    assert re.findall("(?m)^[✗✓]", shown) == [text[0] for text in expected if text[0] in "✗✓"]


def test_on_windows_the_demo_of_signals_says_that_it_does_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    chapter.demo_kill()
    shown = capsys.readouterr().out
    assert shown == "Windows has no such signals: run this demo on Linux or macOS.\n"


def test_each_tool_of_the_toolbox_works_as_it_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cells = [line.split("│")[1].strip() for line in output(capsys, 10).splitlines() if "│" in line]
    lines = [cell for cell in cells if cell.endswith(":")]
    assert len(lines) == 7
    names = {"connection": sqlite3.connect(":memory:"), "file": io.StringIO(), "folder": tmp_path}
    for line in lines:
        exec(f"{line}\n    pass", {**vars(contextlib), "sys": sys, **names})
