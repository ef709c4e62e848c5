"""Chapter 01: each promise of its managers and lessons, and the cleanup contract."""

from __future__ import annotations

import configparser
import logging
import os
import socket
import sqlite3
import struct
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject

chapter: Any = load_chapter(1)
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
exits = pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")


class FakeClock:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def interrupt_at_each_opcode(
    manager: Any, run: Callable[[], object], check: Callable[[str], object]
) -> int:
    """Play `run` once for each opcode of the manager, raise KeyboardInterrupt there, and check.

    A real signal can arrive between any two of them. `check` receives the source line.
    """
    code = manager.__wrapped__.__code__
    source = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
    nth, left, line = 0, 0, ""

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

    while True:
        nth, left, line = nth + 1, nth + 1, ""
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # subtle: 3.12 wants one before settrace
        sys.settrace(on_event)
        with suppress(KeyboardInterrupt, ValueError):
            run()
        sys.settrace(before)
        if not line:
            return nth - 1
        check(line)


# --- Timers ---


def test_elapsed_advances_in_the_block_and_stops_after_it() -> None:
    with chapter.Timer(FakeClock()) as timer:
        assert (timer.elapsed, timer.elapsed) == (1, 2)
    assert (timer.elapsed, timer.elapsed) == (3, 3)


@exits
def test_elapsed_is_right_if_the_block_raises(error: type[BaseException]) -> None:
    timer = chapter.Timer(FakeClock())
    with pytest.raises(error), timer:
        raise error
    assert timer.elapsed == 1


def test_a_timer_used_again_starts_from_zero() -> None:
    timer = chapter.Timer(FakeClock())
    for _round in range(3):
        with timer:
            pass
        assert timer.elapsed == 1


def test_a_timer_says_that_it_was_never_started() -> None:
    with pytest.raises(RuntimeError, match="this Timer was never started: enter it in a `with`"):
        _ = chapter.Timer().elapsed


def test_a_running_timer_cannot_be_entered_again() -> None:
    timer = chapter.Timer(FakeClock())
    with timer:
        with pytest.raises(RuntimeError, match="already running: use another one"):
            timer.__enter__()
        assert timer.elapsed == 1
    assert timer.elapsed == 2


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_timer_logs_however_the_block_ends(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), suppress(BaseException):
        with chapter.timer("load", FakeClock()) as timer:
            if error:
                raise error
    assert timer.elapsed == 2
    assert caplog.messages == ["load took 1.000000 s"]


def test_ctrl_c_at_any_opcode_of_timer_stays_ctrl_c() -> None:
    outcomes = []

    def run() -> None:
        try:
            with chapter.timer("load"):
                pass
        except BaseException as error:
            outcomes.append(type(error))
            raise

    assert interrupt_at_each_opcode(chapter.timer, run, lambda _line: None) > 20
    assert set(outcomes) == {KeyboardInterrupt}


@ways
@pytest.mark.parametrize("kind", ["Timer", "timer"])
def test_both_timers_keep_the_cleanup_contract(way: Any, kind: str) -> None:
    opened: list[Any] = []

    class Watched(chapter.Timer):  # type: ignore[misc, name-defined, unused-ignore]
        def __enter__(self) -> Any:
            opened.append(self)
            return super().__enter__()

    def running() -> list[Any]:
        return [timer for timer in opened if timer._stopped is None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "Timer", Watched)
        make = Watched if kind == "Timer" else (lambda: chapter.timer("contract"))
        way(Subject(open=make, leaks=running, use=lambda timer: timer.elapsed))


# --- Temporary configuration ---


def test_values_and_absences_are_restored_exactly() -> None:
    config: dict[str, object] = {"kept": 1, "changed": 2, "none": None}
    with chapter.temporary_config(config, changed=3, added=4, none=5) as inside:
        assert inside is config
        assert config == {"kept": 1, "changed": 3, "none": 5, "added": 4}
    assert config == {"kept": 1, "changed": 2, "none": None}


def test_what_the_block_does_to_the_changed_keys_is_undone() -> None:
    config = {"a": 1}
    with chapter.temporary_config(config, a=2, b=3):
        del config["a"], config["b"]
    assert config == {"a": 1}


def test_what_the_block_does_to_other_keys_stays() -> None:
    config = {"a": 1}
    with chapter.temporary_config(config, a=2):
        config["other"] = 3
    assert config == {"a": 1, "other": 3}


def test_a_key_may_be_named_config_or_contain_dots() -> None:
    config: dict[str, object] = {}
    with chapter.temporary_config(config, config=1, **{"llm.model": "x"}):
        assert config == {"config": 1, "llm.model": "x"}
    assert config == {}


def test_the_environment_is_changed_and_restored() -> None:
    with chapter.temporary_config(os.environ, WORKSHOP_TEST="on", HOME="/elsewhere"):
        assert os.environ["WORKSHOP_TEST"] == "on"
        assert os.path.expanduser("~") == "/elsewhere" or sys.platform == "win32"
    assert "WORKSHOP_TEST" not in os.environ


def test_if_the_mapping_rejects_a_value_nothing_stays_changed() -> None:
    before = dict(os.environ)
    with pytest.raises(TypeError), chapter.temporary_config(os.environ, HOME="/x", WORKSHOP=None):
        pytest.fail("the block ran")
    assert dict(os.environ) == before


class Brittle(dict[str, object]):
    """A mapping that refuses to change some keys."""

    refused: frozenset[str] = frozenset()

    def __setitem__(self, key: str, value: object) -> None:
        if key in self.refused:
            raise OSError(f"{key} is read-only")
        super().__setitem__(key, value)

    def update(self, *others: Any, **changes: Any) -> None:
        for key, value in dict(*others, **changes).items():
            self[key] = value


@pytest.mark.parametrize("refused", ["a", "b", "c"])
def test_if_one_key_cannot_be_restored_the_others_are(refused: str) -> None:
    config = Brittle(a=1, b=2, c=3)
    with (
        pytest.raises(OSError, match=f"{refused} is read-only"),
        chapter.temporary_config(config, a=0, b=0, c=0),
    ):
        config.refused = frozenset(refused)
    assert config == {"a": 1, "b": 2, "c": 3} | {refused: 0}


def test_of_a_chainmap_one_map_is_changed_and_restored() -> None:
    chain: ChainMap[str, int] = ChainMap({}, {"a": 1})
    with chapter.temporary_config(chain.maps[0], a=2):
        assert chain["a"] == 2
    assert chain.maps == [{}, {"a": 1}]
    with chapter.temporary_config(chain, a=2):
        pass
    assert chain.maps[0] == {"a": 1}, "the whole chain is not restored, as the docstring says"


def test_a_config_parser_is_not_restored_as_the_docstring_says() -> None:
    parser = configparser.ConfigParser()
    parser.read_dict({"llm": {"model": "small"}})
    with chapter.temporary_config(parser, llm={"model": "large"}):
        pass
    assert parser["llm"]["model"] == "large"


def test_blocks_that_overlap_restore_each_others_values() -> None:
    config = {"model": "small"}
    first = chapter.temporary_config(config, model="medium")
    second = chapter.temporary_config(config, model="large")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert config["model"] == "small", "while the second block still runs"
    second.__exit__(None, None, None)
    assert config["model"] == "medium", "as the docstring warns"


@ways
def test_temporary_config_keeps_the_cleanup_contract(way: Any) -> None:
    config = Brittle(a=1)

    @contextmanager
    def refusing(key: str) -> Iterator[None]:
        config.refused = frozenset(key)
        try:
            yield
        finally:
            config.refused = frozenset()

    way(
        Subject(
            open=lambda: chapter.temporary_config(config, b=2, c=3),
            leaks=lambda: config if config != {"a": 1} else None,
            setup_faults=[lambda: refusing("c")],
            concurrent=False,  # see the test above
        )
    )


# --- Files ---


def test_atomic_write_replaces_the_file_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with chapter.atomic_write(path) as file:
        file.write("new é")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_write_takes_another_encoding(tmp_path: Path) -> None:
    with chapter.atomic_write(tmp_path / "file", encoding="latin-1") as file:
        file.write("é")
    assert (tmp_path / "file").read_bytes() == b"\xe9"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_gets_the_usual_mode(tmp_path: Path, umask: int, request: Any) -> None:
    request.addfinalizer(partial(os.umask, os.umask(umask)))
    with chapter.atomic_write(tmp_path / "atomic", "wb") as file:
        file.write(b"\0")
    (tmp_path / "plain").write_bytes(b"\0")
    assert (tmp_path / "atomic").read_bytes() == b"\0"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@on_posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_atomic_write_keeps_the_mode_of_the_old_file(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    with chapter.atomic_write(path) as file:
        file.write("new")
    assert path.stat().st_mode & 0o777 == mode


@on_posix
def test_at_no_line_can_others_read_the_draft_of_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    readable: list[int] = []

    def look(frame: FrameType, _event: str, _argument: object) -> Any:
        drafts = tmp_path.glob(".*draft")
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


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away"
)
def test_atomic_write_keeps_the_owner_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 1234, 5678)
    path.chmod(0o4755)
    with chapter.atomic_write(path):
        pass  # root's own writing would not clear the set-user-ID bit, chown would
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)
    assert path.stat().st_mode & 0o7777 == 0o4755


@on_posix
def test_if_the_owner_cannot_be_kept_it_says_so_before_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "chown", refuse)
    with (
        pytest.raises(PermissionError, match="cannot keep its owner") as e,
        chapter.atomic_write(path),
    ):
        pytest.fail("the block ran")
    assert e.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's form of an ACL")
def test_the_default_acl_of_a_directory_does_not_open_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    everybody = 0xFFFFFFFF
    # The owner may do all, user 1000 may read, and nobody else may do anything.
    entries = [(1, 7, everybody), (2, 4, 1000), (4, 0, everybody), (16, 4, everybody)]
    acl = struct.pack("<I", 2)
    for entry in [*entries, (32, 0, everybody)]:
        acl += struct.pack("<HHI", *entry)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    with chapter.atomic_write(path) as file:
        file.write("new")
    assert "system.posix_acl_access" not in os.listxattr(path)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="only Linux has them")
def test_atomic_write_keeps_extended_attributes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    try:
        os.setxattr(path, "user.origin", b"workshop")
    except OSError:
        pytest.skip("this file system has none")
    with chapter.atomic_write(path) as file:
        file.write("new")
    assert os.getxattr(path, "user.origin") == b"workshop"


def test_the_new_file_has_a_new_time_even_if_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.utime(path, (1, 1))
    with chapter.atomic_write(path):
        pass
    assert path.stat().st_mtime > 1


def test_atomic_write_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with chapter.atomic_write(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_hard_link_still_leads_to_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    with chapter.atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert (tmp_path / "link").read_text() == "old"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "link to a device": lambda path: path.symlink_to(os.devnull),
}


@on_posix
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_before_the_block(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has a limit of its own
    path = Path("special")
    SPECIAL[kind](path)
    before = path.stat()
    with (
        pytest.raises(OSError, match=r"not a regular file: write to it with open\(\)"),
        chapter.atomic_write(path),
    ):
        pytest.fail("the block ran")
    assert path.stat().st_ino == before.st_ino
    assert os.listdir() == ["special"]


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


@pytest.mark.parametrize("name", ["报" * 80, "x" * 255])
def test_the_longest_name_is_written(tmp_path: Path, name: str) -> None:
    with chapter.atomic_write(tmp_path / name) as file:
        file.write("new")
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_is_too_long_is_refused_before_the_block(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="name too long"),
        chapter.atomic_write(tmp_path / ("x" * 256)),
    ):
        pytest.fail("the block ran")


def test_a_mode_other_than_w_or_wb_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="mode is 'a', but atomic_write needs 'w' or 'wb'"),
        chapter.atomic_write(tmp_path / "file", "a"),
    ):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


def test_the_whole_draft_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[object] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        order.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with chapter.atomic_write(tmp_path / "file") as file:
        file.write("new")
        assert order == []
    assert order == [3, "replace"], "fsync sees all 3 bytes, so they were flushed before it"


@exits
def test_after_an_error_the_old_file_is_untouched(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), chapter.atomic_write(path) as file:
        file.write("half")
        file.flush()
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that was interrupted as it opened
@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_at_any_opcode_of_atomic_write_leaves_no_draft(tmp_path: Path, fails: bool) -> None:
    path = tmp_path / "file"

    def write() -> None:
        with chapter.atomic_write(path) as file:
            file.write("new")
            if fails:
                raise ValueError

    def check(line: str) -> None:
        drafts = [name for name in os.listdir(tmp_path) if name != "file"]
        # In the cleanup itself it can be left: nothing in Python prevents that.
        assert not drafts or "draft.unlink" in line, line
        for name in drafts:
            (tmp_path / name).unlink()

    assert interrupt_at_each_opcode(chapter.atomic_write, write, check) > 40


@contextmanager
def failing(function: str) -> Iterator[None]:
    def fail(*_arguments: object) -> None:
        raise OSError("disk failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"os.{function}", fail)
        yield


@ways
def test_atomic_write_keeps_the_cleanup_contract(way: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    @contextmanager
    def folder_away() -> Iterator[None]:
        folder.rename(tmp_path / "away")
        try:
            yield
        finally:
            (tmp_path / "away").rename(folder)

    way(
        Subject(
            open=lambda: chapter.atomic_write(folder / "file"),
            leaks=lambda: (
                [name for name in os.listdir(tmp_path / "folder") if name != "file"]
                if folder.exists()
                else None
            ),
            use=lambda file: file.write("x"),
            closed_error=ValueError,
            setup_faults=[folder_away],
            cleanup_faults=[lambda: failing("fsync"), lambda: failing("replace")],
        )
    )


# --- Databases ---


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        connection.execute("CREATE TABLE account (name PRIMARY KEY, money)")
        connection.commit()
        yield connection


def insert(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("INSERT INTO account VALUES (?, 1)", [name])


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM account")]


@pytest.mark.parametrize("isolation_level", ["", None, "EXCLUSIVE"])
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_transaction_commits_if_the_block_ends_well(
    accounts: Any, tmp_path: Path, isolation_level: Any, autocommit: bool
) -> None:
    accounts.isolation_level = isolation_level
    if autocommit:
        if sys.version_info < (3, 12):
            pytest.skip("autocommit came with Python 3.12")
        accounts.autocommit = True
    with chapter.transaction(accounts) as connection:
        assert connection is accounts
        insert(connection, "Ada")
    with closing(sqlite3.connect(tmp_path / "bank.db")) as other:
        assert names(other) == ["Ada"]


@exits
def test_a_transaction_rolls_back_if_the_block_raises(
    accounts: sqlite3.Connection, error: type[BaseException]
) -> None:
    with pytest.raises(error), chapter.transaction(accounts):
        insert(accounts, "Ada")
        raise error
    assert names(accounts) == []
    assert not accounts.in_transaction


def test_a_transaction_in_a_transaction_is_refused(accounts: sqlite3.Connection) -> None:
    with chapter.transaction(accounts):
        insert(accounts, "Ada")
        with pytest.raises(RuntimeError, match="a transaction is open: end it"):
            chapter.transaction(accounts).__enter__()
    assert names(accounts) == ["Ada"]


def enter_the_connection(connection: sqlite3.Connection) -> None:
    with connection:
        pass


ENDS: dict[str, Callable[[sqlite3.Connection], object]] = {
    "commit()": lambda connection: connection.commit(),
    "rollback()": lambda connection: connection.rollback(),
    "executescript()": lambda connection: connection.executescript("SELECT 1;"),
    "with connection": enter_the_connection,
}


@pytest.mark.parametrize("isolation_level", ["", None])
@pytest.mark.parametrize("end", ENDS)
def test_a_block_that_ends_its_own_transaction_gets_a_clear_error(
    accounts: sqlite3.Connection, end: str, isolation_level: Any
) -> None:
    accounts.isolation_level = isolation_level
    with (
        pytest.raises(sqlite3.OperationalError, match="do_not_commit"),
        chapter.transaction(accounts),
    ):
        insert(accounts, "Ada")
        ENDS[end](accounts)
        if not isolation_level:
            return  # without an open transaction, the next statement commits at once
        insert(accounts, "Bob")
    assert not accounts.in_transaction
    assert "Bob" not in names(accounts)


def test_a_block_that_rolled_back_and_raised_gets_its_own_error(
    accounts: sqlite3.Connection,
) -> None:
    with pytest.raises(ValueError, match="mine"), chapter.transaction(accounts):
        accounts.rollback()
        raise ValueError("mine")


def test_a_reader_that_keeps_its_lock_makes_the_commit_fail(
    accounts: sqlite3.Connection, tmp_path: Path
) -> None:
    for name in ("Ada", "Bob"):
        insert(accounts, name)
    accounts.commit()
    with closing(sqlite3.connect(tmp_path / "bank.db")) as reader:
        reading = reader.execute("SELECT name FROM account")
        reading.fetchone()
        with (
            pytest.raises(sqlite3.OperationalError, match="locked"),
            chapter.transaction(accounts),
        ):
            insert(accounts, "Cem")
        reading.close()
    assert names(accounts) == ["Ada", "Bob"]


def test_the_write_lock_is_taken_before_the_block(
    accounts: sqlite3.Connection, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as other:
        with chapter.transaction(accounts):
            assert names(other) == [], "others can still read"
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                insert(other, "Bob")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit came with Python 3.12")
def test_a_connection_with_autocommit_false_is_refused() -> None:
    options: Any = {"autocommit": False}
    with closing(sqlite3.connect(":memory:", **options)) as connection:
        with pytest.raises(RuntimeError, match="or connect without autocommit=False"):
            chapter.transaction(connection).__enter__()


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_at_any_opcode_leaves_no_transaction_open(
    accounts: sqlite3.Connection, fails: bool
) -> None:
    def write() -> None:
        with chapter.transaction(accounts):
            insert(accounts, "Ada")
            if fails:
                raise ValueError

    def check(line: str) -> None:
        in_cleanup = ("except BaseException", "if connection.in_transaction", "ROLLBACK")
        is_open = accounts.in_transaction
        # In the cleanup itself it can stay open: nothing in Python prevents that.
        assert not is_open or any(part in line for part in in_cleanup), line
        accounts.rollback()
        accounts.execute("DELETE FROM account")
        accounts.commit()

    assert interrupt_at_each_opcode(chapter.transaction, write, check) > 20


@ways
def test_transaction_keeps_the_cleanup_contract(
    way: Any, accounts: sqlite3.Connection, tmp_path: Path
) -> None:
    @contextmanager
    def write_lock_taken() -> Iterator[None]:
        with closing(sqlite3.connect(tmp_path / "bank.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def commit_refused() -> Iterator[None]:
        def authorizer(action: int, what: str | None, *_rest: object) -> int:
            commit = (action, what) == (sqlite3.SQLITE_TRANSACTION, "COMMIT")
            return sqlite3.SQLITE_DENY if commit else sqlite3.SQLITE_OK

        accounts.set_authorizer(authorizer)
        try:
            yield
        finally:
            accounts.set_authorizer(None)

    way(
        Subject(
            open=lambda: chapter.transaction(accounts),
            leaks=lambda: accounts.in_transaction,
            use=lambda connection: connection.execute("SELECT 1"),
            setup_faults=[write_lock_taken],
            cleanup_faults=[commit_refused],
            nestable=False,
            concurrent=False,  # a connection belongs to one thread
        )
    )


# --- contextmanager, from scratch ---


def passes_on() -> Iterator[None]:
    yield


def block(fails: bool, make_manager: Callable[[], Any]) -> None:
    with make_manager():
        chapter.work(fails)


@pytest.mark.parametrize("function", [chapter.catches, passes_on])
@pytest.mark.parametrize("fails", [False, True])
def test_from_scratch_does_what_contextlib_does(function: Any, fails: bool) -> None:
    ours = chapter.outcome(block, fails, chapter.contextmanager_from_scratch(function))
    assert ours == chapter.outcome(block, fails, contextmanager(function))


def test_from_scratch_suppresses_nothing_if_the_block_ends_well() -> None:
    manager = chapter.contextmanager_from_scratch(passes_on)()
    manager.__enter__()
    assert manager.__exit__(None, None, None) is False


def test_from_scratch_reports_a_second_yield() -> None:
    @chapter.contextmanager_from_scratch
    def twice() -> Iterator[None]:
        yield
        yield

    with pytest.raises(RuntimeError, match="the generator has a second `yield`"), twice():
        pass


def test_from_scratch_lacks_what_its_docstring_says() -> None:
    make_empty = chapter.contextmanager_from_scratch(lambda: iter(()))
    with pytest.raises(StopIteration), make_empty():
        pytest.fail("the block ran")
    make_manager = chapter.contextmanager_from_scratch(passes_on)
    with pytest.raises(RuntimeError, match="generator raised StopIteration"), make_manager():
        raise StopIteration
    with pytest.raises(ValueError, match="mine") as raised, make_manager():
        raise ValueError("mine")
    assert "__exit__" in [entry.name for entry in raised.traceback]
    assert not callable(make_manager())
    assert make_manager.__name__ != "passes_on"


# --- What the demos show ---


def output(capsys: pytest.CaptureFixture[str], number: int) -> str:
    chapter.play(number)
    return capsys.readouterr().out


SHOWN = {
    1: [
        "manager.__exit__(None, None, None) 4",
        "✗ `by_hand`: __enter__(), __exit__(None), __enter__(), __enter__()",
        "with manager: 1 4 1 4 1 5",
        "✓ `with_statement`: __enter__(), __exit__(None)",
        "__exit__(None), __enter__(), __exit__(None), __enter__(), __exit__(ValueError)",
    ],
    2: [
        "seconds.append(time.perf_counter() - started) 3",
        "self._stopped = self._clock() 13 13",
        "✗ Measured by hand: 1 of 2 runs.",
        "✓ Measured by the timer: 2 of 2 runs.",
    ],
    3: [
        "path.touch(exist_ok=False) 1 1 yield 2 2 path.unlink() 3",
        "path.unlink() 4 4",
        "✗ Left in the folder: ['report.lock']. The next run: FileExistsError.",
        "✓ Left in the folder: []. The next run: no error.",
    ],
    4: [
        "✗ Afterwards: {'model': 'gpt-4o-mini', 'debug': None}",
        "✓ Afterwards: {'model': 'gpt-4o-mini'}",
    ],
    5: [
        "batch.append(int(word)) 3 5 3 5",
        "✗ `1 two 3`: no error, and the batch is [1].",
        "┌ no such file │ ┌ os.remove │ └ left by FileNotFoundError └ ended",
        "┌ . │ ┌ os.remove │ └ left by IsADirectoryError └ left by IsADirectoryError",
        "✓ A missing file: no error; a directory: IsADirectoryError.",
    ],
    6: [
        "next(self.generator, None) 6 6",
        "✗ If the block raises, the caller sees: ValueError.",
        "next(self.generator) 8 else: self.generator.throw(exc) 8",
        "✓ If the block raises, the caller sees: no error.",
    ],
    7: [
        "os.replace(draft, target) 16 finally: draft.unlink(missing_ok=True) 17 13",
        "✗ `open`: {'report.txt': 'second '}",
        "✓ `atomic_write`: {'report.txt': 'first report'}",
    ],
    8: [
        "connection.commit() 8 7",
        "✗ `careless_transaction`: Ada 0 + Bob 50 = 50",
        'connection.execute("ROLLBACK") 12 raise 13',
        "✓ `transaction`: Ada 50 + Bob 50 = 100",
    ],
    9: ["✗ 3 of 5 ways leave the lock behind."],
}


@on_posix
@pytest.mark.parametrize("number", SHOWN)
def test_a_demo_shows_the_path_and_the_broken_version_first(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, number)
    words = " ".join(shown.split())
    positions = [words.find(" ".join(text.split())) for text in SHOWN[number]]
    assert -1 not in positions, dict(zip(SHOWN[number], positions, strict=True))
    marks = [line[0] for line in shown.splitlines() if line.startswith(("✗", "✓"))]
    assert marks == [text[0] for text in SHOWN[number] if text[0] in "✗✓"]


@on_posix
def test_cleanup_survives_an_exit_and_ctrl_c_but_no_kill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {}
    for line in output(capsys, 9).splitlines():
        if line.startswith("│ "):
            ending, status, left = (cell.strip() for cell in line.strip("│").split("│"))
            rows[ending] = (int(status), left)
    assert rows == {
        "sys.exit(1)": (1, ""),
        "os.kill(os.getpid(), signal.SIGINT)": (-2, ""),
        "os.kill(os.getpid(), signal.SIGTERM)": (-15, "report.lock"),
        "os.kill(os.getpid(), signal.SIGKILL)": (-9, "report.lock"),
        "os._exit(1)": (1, "report.lock"),
    }


def test_each_tool_of_the_toolbox_works_as_it_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import contextlib
    import io

    cells = [line.split("│")[1].strip() for line in output(capsys, 10).splitlines() if "│" in line]
    lines = [cell for cell in cells if cell.endswith(":")]
    assert len(lines) == 7
    names = {"connection": sqlite3.connect(":memory:"), "file": io.StringIO(), "folder": tmp_path}
    for line in lines:
        exec(f"{line}\n    pass", {**vars(contextlib), "sys": sys, **names})
