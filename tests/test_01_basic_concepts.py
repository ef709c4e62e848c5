"""Chapter 01: each promise of its managers and lessons, and the cleanup contract."""

from __future__ import annotations

import configparser
import contextlib
import io
import linecache
import logging
import os
import re
import sqlite3
import struct
import sys
from collections import ChainMap, UserDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject, Way
from waiting import FakeClock

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
chapter: Any = load_chapter(1)
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
refused = partial(pytest.fail, "the block ran")


@contextmanager
def failing(owner: Any, name: str) -> Iterator[type[OSError]]:
    """A fault: calls of `owner.name` fail."""
    with mock.patch.object(owner, name, side_effect=PermissionError):
        yield PermissionError


def interrupted(manager: Any, run: Callable[[], object]) -> Iterator[str]:
    """Play `run` once for each opcode of the manager, with Ctrl-C there; yield the source line.

    A real signal can arrive between any two of them. Last, play it undisturbed, and yield "".
    """
    code = manager.__wrapped__.__code__
    nth, left, line = 0, 0, "not yet"

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left, line
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lineno is not None:  # not where Python itself tidies up
            left -= 1
            if left == 0:
                line = linecache.getline(code.co_filename, frame.f_lineno).strip()
                raise KeyboardInterrupt
        return on_event

    before = sys.gettrace()
    while line:
        nth, left, line = nth + 1, nth + 1, ""
        sys._getframe().f_trace_opcodes = True  # subtle: 3.12 wants one before settrace
        sys.settrace(on_event)
        try:
            run()
            assert not line, "Ctrl-C must stay Ctrl-C"
        except KeyboardInterrupt:
            assert line
        finally:
            sys.settrace(before)
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
    with pytest.raises(RuntimeError, match="never started"):
        _ = timer.elapsed
    with timer, pytest.raises(RuntimeError, match="already running: use another one"):
        timer.__enter__()
    assert timer.elapsed == 1


def test_timer_logs_even_if_the_block_raises(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with suppress(KeyboardInterrupt), chapter.timer("load", FakeClock()):
        raise KeyboardInterrupt
    assert caplog.messages == ["load took 1.000000 s"]


@ways
def test_both_timers_keep_the_cleanup_contract(way: Way, monkeypatch: Patch) -> None:
    clock = SimpleNamespace(read=FakeClock())
    timers = [chapter.Timer(lambda: clock.read()) for _block in range(100)]
    monkeypatch.setattr(chapter, "Timer", mock.Mock(side_effect=timers))
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


def test_nothing_stays_changed_if_the_environment_rejects_a_value() -> None:
    before = dict(os.environ)
    with pytest.raises(TypeError), chapter.temporary_config(os.environ, HOME="/x", WORKSHOP=None):
        refused()
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


@pytest.mark.parametrize(("fails", "left"), [("pop", {"a": 1, "b": 3}), ("__setitem__", {"a": 2})])
def test_if_one_key_cannot_be_restored_the_other_is(fails: str, left: dict[str, int]) -> None:
    config = UserDict(a=1)
    with failing(config, fails) as error, pytest.raises(error):
        with chapter.temporary_config(config, a=2, b=3):
            pass
    assert config == left


@ways
def test_temporary_config_keeps_the_cleanup_contract(way: Way) -> None:
    config = UserDict(a=1)  # whose methods can be replaced
    way(
        Subject(
            open=lambda: chapter.temporary_config(config, a=2, b=3),
            leaks=lambda: config["a"] != 1,  # b is removed first: if that fails, a is restored
            setup_faults=[lambda: failing(config, "update")],
            cleanup_faults=[lambda: failing(config, "pop")],
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


def test_the_file_is_replaced_when_the_block_ends_well(path: Path) -> None:
    with chapter.atomic_write(path) as file:
        assert file.encoding == "utf-8"  # whatever the locale says: Linux would say "UTF-8"
    with chapter.atomic_write(path, encoding="latin-1") as file:
        file.write("é")
        assert path.read_text() == ""
    assert path.read_bytes() == b"\xe9"
    with chapter.atomic_write(path, "wb") as file:
        file.write(b"\0")
    assert path.read_bytes() == b"\0"
    assert os.listdir(path.parent) == ["file"]


def test_the_whole_draft_is_on_the_disk_before_the_rename(path: Path, monkeypatch: Patch) -> None:
    steps: list[tuple[str, int]] = []

    def note(step: str, file: int | Path, _target: object = None) -> None:
        steps.append((step, os.stat(file).st_size))

    monkeypatch.setattr(os, "fsync", partial(note, "fsync"))
    monkeypatch.setattr(os, "replace", partial(note, "rename"))
    with chapter.atomic_write(path) as file:
        file.write("new")
    assert steps == [("fsync", 3), ("rename", 3)], "all 3 bytes, both times"


def test_a_new_file_gets_the_usual_mode_and_may_have_the_longest_name(path: Path) -> None:
    longest = path.with_name("x" * 255)
    with chapter.atomic_write(longest):
        pass
    assert longest.stat().st_mode == path.stat().st_mode


@on_posix
def test_at_no_line_can_others_read_the_draft_of_a_secret(path: Path) -> None:
    path.chmod(0o600)
    modes: list[int] = []

    def look(*_event: object) -> Any:
        modes.extend(draft.stat().st_mode & 0o777 for draft in path.parent.glob(".*draft"))
        return look

    with ExitStack() as restore:
        restore.callback(sys.settrace, sys.gettrace())
        sys.settrace(look)
        with chapter.atomic_write(path) as file:
            file.write("new")
    assert set(modes) == {0o600}


@pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux has")
def test_owner_mode_and_attributes_are_kept_but_not_the_time(path: Path) -> None:
    if os.geteuid() == 0:  # nobody else can give a file away
        os.chown(path, 1234, 5678)
    path.chmod(0o4755)  # the set-user-ID bit: chown would clear it, root's own writing would not
    # The folder's default ACL: the owner may do all, user 1000 may read, nobody else anything.
    nobody = 0xFFFFFFFF
    entries = (1, 7, nobody, 2, 4, 1000, 4, 0, nobody, 16, 4, nobody, 32, 0, nobody)
    acl = struct.pack("<I" + 5 * "HHI", 2, *entries)
    with suppress(OSError):  # a file system that has none
        os.setxattr(path.parent, "system.posix_acl_default", acl)
        os.setxattr(path, "user.origin", b"workshop")
    os.utime(path, (1, 1))
    before = path.stat()
    attributes = os.listxattr(path)
    with chapter.atomic_write(path):
        pass
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == before[:1] + before[4:6]
    assert os.listxattr(path) == attributes
    assert after.st_mtime > 1


def test_symbolic_links_are_followed_and_hard_links_keep_the_old_content(path: Path) -> None:
    hard, symbolic = path.with_name("hard"), path.with_name("symbolic")
    hard.hardlink_to(path)
    symbolic.symlink_to(path)
    with chapter.atomic_write(symbolic) as file:
        file.write("new")
    assert symbolic.is_symlink()
    assert (path.read_text(), hard.read_text()) == ("new", "old")


NOT_REGULAR = r"not a regular file: write to it with open\(\)"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, NOT_REGULAR),
    "a FIFO": (os.mkfifo, NOT_REGULAR),
    "a link to a device": (lambda path: path.symlink_to(os.devnull), NOT_REGULAR),
    "a mount point": (Path.touch, "a mount point: write to it with"),
    "a file of another": (Path.touch, "cannot keep its owner"),
    "x" * 256: (lambda path: None, "name too long"),
    "mode a": (Path.touch, "mode is 'a', but atomic_write needs 'w' or 'wb'"),
}


@on_posix
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_refused_before_the_block(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    make(tmp_path / name)
    before, mode = os.listdir(tmp_path), "a" if name == "mode a" else "w"
    error = pytest.raises((OSError, ValueError), match=message)
    mounted = mock.patch("os.path.ismount", lambda path: path.name == "a mount point")
    with error, mounted, failing(os, "chown"), chapter.atomic_write(tmp_path / name, mode):
        refused()
    assert os.listdir(tmp_path) == before


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that was interrupted as it opened
def test_ctrl_c_at_any_opcode_leaves_the_old_file_or_the_new_one(path: Path) -> None:
    def write() -> None:
        with chapter.atomic_write(path) as file:
            file.write("n")
            file.flush()
            file.write("ew")

    contents = []
    for line in interrupted(chapter.atomic_write, write):
        contents.append(path.read_text())
        path.write_text("old")
        for draft in set(path.parent.iterdir()) - {path}:
            # In the cleanup itself it can be left: nothing in Python prevents that.
            assert "draft.unlink" in line
            draft.unlink()
    assert set(contents) == {"old", "new"}
    assert contents[-1] == "new"


@ways
def test_atomic_write_keeps_the_cleanup_contract(way: Way, path: Path) -> None:
    last = ("fsync", "replace")  # called only if the block ends well
    way(
        Subject(
            open=lambda: chapter.atomic_write(path),
            leaks=lambda: [name for name in os.listdir(path.parent) if name != "file"],
            use=lambda file: file.write("x"),
            closed_error=ValueError,
            setup_faults=[lambda: failing(os, "open"), lambda: failing(os, "utime")],
            cleanup_faults=[partial(mock.patch.object, os, n, side_effect=OSError) for n in last],
        )
    )


# --- Databases ---


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Any]:
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # for speed
        connection.execute("CREATE TABLE account (name PRIMARY KEY)")
        yield connection


@pytest.fixture
def other(tmp_path: Path, accounts: object) -> Iterator[Any]:
    """A second connection to the same database."""
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        yield connection


def insert(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("INSERT OR REPLACE INTO account VALUES (?)", [name])


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM account")]


def test_a_transaction_locks_at_once_and_is_seen_at_its_end(accounts: Any, other: Any) -> None:
    with chapter.transaction(accounts) as connection:
        assert connection is accounts
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        insert(connection, "Ada")
        assert names(other) == []
    assert names(other) == ["Ada"]


def test_a_connection_with_an_open_transaction_is_refused(accounts: Any) -> None:
    with chapter.transaction(accounts):
        insert(accounts, "Ada")
        with pytest.raises(RuntimeError, match="a transaction is open: end it"):
            chapter.transaction(accounts).__enter__()
    assert names(accounts) == ["Ada"]
    if sys.version_info >= (3, 12):
        accounts.autocommit = False
        with pytest.raises(RuntimeError, match="connect without autocommit=False"):
            chapter.transaction(accounts).__enter__()


def test_a_block_that_commits_gets_a_clear_error(accounts: Any) -> None:
    leave = partial(accounts.__exit__, None, None, None)
    for end in (accounts.commit, partial(accounts.executescript, "SELECT 1"), leave):
        error = pytest.raises(sqlite3.OperationalError, match="do_not_commit")
        with error, chapter.transaction(accounts):
            end()
            insert(accounts, "Bob")
        assert not accounts.in_transaction
        assert names(accounts) == []


def test_ctrl_c_at_any_opcode_leaves_all_of_a_transaction_or_nothing(accounts: Any) -> None:
    def write() -> None:
        with chapter.transaction(accounts):
            insert(accounts, "Ada")
            insert(accounts, "Bob")

    for line in interrupted(chapter.transaction, write):
        in_cleanup = ("except BaseException", "if connection.in_transaction", "ROLLBACK")
        # In the cleanup itself it can stay open: nothing in Python prevents that.
        assert not accounts.in_transaction or any(part in line for part in in_cleanup), line
        accounts.rollback()
        rows = names(accounts)
        assert rows in ([], ["Ada", "Bob"])
        accounts.execute("DELETE FROM account")
        accounts.commit()
    assert rows == ["Ada", "Bob"]


@ways
def test_transaction_keeps_the_cleanup_contract(way: Way, accounts: Any, other: Any) -> None:
    accounts.isolation_level = None

    @contextmanager
    def locked_by(statements: str) -> Iterator[None]:
        other.executescript(statements)
        yield
        other.rollback()

    way(
        Subject(
            open=lambda: chapter.transaction(accounts),
            leaks=lambda: accounts.in_transaction,
            use=lambda connection: insert(connection, "Cem"),
            setup_faults=[lambda: locked_by("BEGIN IMMEDIATE")],
            cleanup_faults=[lambda: locked_by("BEGIN; SELECT name FROM account")],
            nestable=False,
            concurrent=False,  # a connection belongs to one thread
        )
    )


# --- contextmanager, from scratch ---


def generator(story: str) -> Iterator[str]:
    try:
        yield story
    except ValueError:
        if story == "translates":
            raise KeyError from None
        if story != "catches":
            raise
    if story == "fails in cleanup":
        raise KeyError
    if story == "yields twice":
        yield story


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_from_scratch_does_what_contextlib_does(error: type[BaseException] | None) -> None:
    def play(decorator: Any, story: str) -> object:
        manager = decorator(generator)(story=story)
        try:
            if error is None:
                return manager.__enter__(), manager.__exit__(None, None, None)
            with manager:
                raise error
        except BaseException as came_out:
            return type(came_out)

    for story in ("passes on", "catches", "translates", "fails in cleanup", "yields twice"):
        assert play(chapter.contextmanager_from_scratch, story) == play(contextmanager, story)


def test_from_scratch_lacks_what_its_docstring_says() -> None:
    make_empty = chapter.contextmanager_from_scratch(lambda: iter(()))
    with pytest.raises(StopIteration), make_empty():
        refused()
    make_manager = chapter.contextmanager_from_scratch(generator)
    with pytest.raises(RuntimeError, match="generator raised StopIteration"), make_manager(""):
        raise StopIteration
    with pytest.raises(ValueError, match="mine") as raised, make_manager(""):
        raise ValueError("mine")
    assert "__exit__" in [entry.name for entry in raised.traceback]
    assert not callable(make_manager(""))
    assert make_manager.__name__ != "generator"


# --- What the demos show ---

SHOWN = """
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
6 next(self.generator) 8 else:
6 ✓ If the block raises, the caller sees: no error.
7 ✗ `open`: {'report.txt': 'second '}
7 os.replace(draft, target) 16 finally: draft.unlink(missing_ok=True) 17 13
7 ✓ `atomic_write`: {'report.txt': 'first report'}
8 connection.commit() 8 7
8 ✗ `careless_transaction`: Ada 0 + Bob 50 = 50
8 connection.execute("ROLLBACK") 12 raise 13
8 ✓ `transaction`: Ada 50 + Bob 50 = 100
9 │ sys.exit(1) │ 1 │ │
9 │ os.kill(os.getpid(), signal.SIGTERM) │ -15 │ report.lock │
9 ✗ 3 of 5 ways leave the lock behind.
"""


@on_posix
@pytest.mark.parametrize("number", range(1, 10))
def test_a_demo_shows_the_path_and_the_broken_version_first(number: int, capsys: Capture) -> None:
    chapter.play(number)
    shown = capsys.readouterr().out
    expected = [text for n, text in re.findall(r"(?m)^(\d) (.+)", SHOWN) if int(n) == number]
    rest = " ".join(shown.split())
    for text in expected:
        _before, found, rest = rest.partition(text)
        assert found, text
    assert re.findall("(?m)^[✗✓]", shown) == [text[0] for text in expected if text[0] in "✗✓"]


def test_on_windows_demo_9_says_that_it_does_not_run(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    chapter.demo_kill()
    assert capsys.readouterr().out.startswith("Windows has no such signals: run this demo on")


def test_each_tool_of_the_toolbox_works_as_written(capsys: Capture, tmp_path: Path) -> None:
    chapter.demo_toolbox()
    lines = re.findall(r"│ ((?:with|class) .+:) +│", capsys.readouterr().out)
    assert len(lines) == 7
    names = {"connection": sqlite3.connect(":memory:"), "file": io.StringIO(), "folder": tmp_path}
    for line in lines:
        exec(f"{line}\n    pass", {**vars(contextlib), "sys": sys, **names})
