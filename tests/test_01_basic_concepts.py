"""Chapter 01: each claim of its lessons, and the cleanup contract for each of its managers."""

from __future__ import annotations

import importlib
import logging
import os
import sqlite3
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject

chapter: Any = load_chapter(1)
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)


class FakeClock:
    """A clock that goes one second on each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


# --- Timers ---


def test_elapsed_runs_while_the_block_does_and_stands_still_after_it() -> None:
    clock = FakeClock()
    with chapter.Timer(clock) as timer:
        assert (timer.elapsed, timer.elapsed) == (1, 2)
    assert (timer.elapsed, timer.elapsed) == (3, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_elapsed_is_right_when_the_block_raises(error: type[BaseException]) -> None:
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
    with pytest.raises(RuntimeError, match=r"Timer was never started: enter it with `with`"):
        _ = chapter.Timer().elapsed


def test_a_running_timer_refuses_to_be_entered_again_and_runs_on() -> None:
    timer = chapter.Timer(FakeClock())
    with timer:
        with pytest.raises(RuntimeError, match="running already"):
            timer.__enter__()
        assert timer.elapsed == 1
    assert timer.elapsed == 2


def test_the_generator_twin_measures_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), chapter.timer("load", FakeClock()) as timer:
        assert timer.elapsed == 1
    assert timer.elapsed == 2
    assert caplog.messages == ["load took 2.000000 s"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_generator_twin_logs_a_block_that_raises_too(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(error),
        chapter.timer("load", FakeClock()) as timer,
    ):
        raise error
    assert timer.elapsed == 1
    assert caplog.messages == ["load took 1.000000 s"]


def running_timers(opened: list[Any]) -> list[Any]:
    return [timer for timer in opened if timer._started is not None and timer._stopped is None]


@ways
@pytest.mark.parametrize("twin", ["Timer", "timer"])
def test_both_timers_keep_the_cleanup_contract(way: Any, twin: str) -> None:
    opened: list[Any] = []

    class Watched(chapter.Timer):  # type: ignore[misc, name-defined, unused-ignore]
        def start(self) -> None:
            super().start()
            opened.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "Timer", Watched)
        make = Watched if twin == "Timer" else (lambda: chapter.timer("contract"))
        use = lambda timer: timer.elapsed  # noqa: E731
        way(Subject(open=make, leaks=lambda: running_timers(opened), use=use))


# --- Temporary configuration ---


def test_values_and_absences_are_restored_exactly() -> None:
    config: dict[str, object] = {"kept": 1, "changed": 2, "none": None}
    with chapter.temporary_config(config, changed=3, added=4, none=5) as inside:
        assert inside is config
        assert config == {"kept": 1, "changed": 3, "none": 5, "added": 4}
    assert config == {"kept": 1, "changed": 2, "none": None}


def test_what_the_block_does_to_the_changed_keys_is_undone_too() -> None:
    config = {"a": 1}
    with chapter.temporary_config(config, a=2, b=3):
        del config["a"], config["b"]
    assert config == {"a": 1}


def test_what_the_block_does_to_other_keys_stays() -> None:
    config = {"a": 1}
    with chapter.temporary_config(config, a=2):
        config["other"] = 3
    assert config == {"a": 1, "other": 3}


def test_a_key_may_be_called_config_or_hold_dots() -> None:
    config: dict[str, object] = {}
    with chapter.temporary_config(config, config=1, **{"llm.model": "x"}):
        assert config == {"config": 1, "llm.model": "x"}
    assert config == {}


def test_nested_changes_are_undone_one_by_one() -> None:
    config = {"model": "small"}
    with chapter.temporary_config(config, model="medium"):
        with chapter.temporary_config(config, model="large"):
            assert config["model"] == "large"
        assert config["model"] == "medium"
    assert config["model"] == "small"


def test_the_environment_takes_and_loses_a_variable() -> None:
    with chapter.temporary_config(os.environ, WORKSHOP_TEST="on", HOME="/elsewhere"):
        assert os.environ["WORKSHOP_TEST"] == "on"
        assert os.path.expanduser("~") == "/elsewhere" or sys.platform == "win32"
    assert "WORKSHOP_TEST" not in os.environ


def test_what_the_environment_refuses_is_raised_and_nothing_stays_changed() -> None:
    before = dict(os.environ)
    with pytest.raises(TypeError), chapter.temporary_config(os.environ, HOME="/x", WORKSHOP=None):
        pytest.fail("the block ran")
    assert dict(os.environ) == before


class Brittle(dict[str, object]):
    """A mapping that can be told to refuse."""

    refuses = False

    def __setitem__(self, key: str, value: object) -> None:
        if self.refuses:
            raise OSError("read-only")
        super().__setitem__(key, value)

    def update(self, *others: Any, **changes: Any) -> None:
        for key, value in dict(*others, **changes).items():
            self[key] = value


@ways
def test_temporary_config_keeps_the_cleanup_contract(way: Any) -> None:
    config = Brittle(a=1)

    @contextmanager
    def refusing() -> Iterator[None]:
        config.refuses = True
        try:
            yield
        finally:
            config.refuses = False

    way(
        Subject(
            open=lambda: chapter.temporary_config(config, b=2, c=3),
            leaks=lambda: config if config != {"a": 1} else None,
            setup_faults=[refusing],
            concurrent=False,  # one mapping, changed by many at once: nobody's value is right
        )
    )


# --- Files and databases ---


def test_atomic_write_replaces_the_file_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with chapter.atomic_write(path) as file:
        file.write("new é")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_write_makes_a_file_that_was_not_there_with_the_usual_rights(tmp_path: Path) -> None:
    with chapter.atomic_write(tmp_path / "atomic", "wb") as file:
        file.write(b"\0")
    (tmp_path / "plain").write_bytes(b"\0")
    assert (tmp_path / "atomic").read_bytes() == b"\0"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_keeps_the_rights_of_the_file_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    with chapter.atomic_write(path) as file:
        assert Path(file.name).stat().st_mode & 0o777 == 0o600, "others can read the draft"
        file.write("new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_atomic_write_writes_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with chapter.atomic_write(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_atomic_write_forces_the_draft_to_disk_before_it_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noting(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: object) -> None:
            order.append(name)
            original(*arguments)

        return noted

    monkeypatch.setattr(os, "fsync", noting("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noting("replace", os.replace))
    with chapter.atomic_write(tmp_path / "file") as file:
        file.write("new")
        assert order == []
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_after_an_error_the_old_file_stands_and_no_draft_remains(
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


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("0" * 20_000)
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for digit in "123456789":
            with chapter.atomic_write(path) as file:
                for _block in range(20):
                    file.write(digit * 1_000)
                    file.flush()
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(text == text[0] * 20_000 for text in seen)


def test_atomic_write_refuses_a_mode_that_does_not_write_a_whole_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"mode is 'a', it must be 'w' or 'wb'"),
        chapter.atomic_write(tmp_path / "file", "a"),
    ):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


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


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "bank.db", timeout=0)) as connection:
        connection.execute("CREATE TABLE account (name PRIMARY KEY, money)")
        connection.commit()
        yield connection


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM account")]


@pytest.mark.parametrize("isolation_level", ["", None, "EXCLUSIVE"])
def test_a_transaction_commits_what_ended_well(
    accounts: sqlite3.Connection, tmp_path: Path, isolation_level: Any
) -> None:
    accounts.isolation_level = isolation_level
    with chapter.transaction(accounts) as connection:
        assert connection is accounts
        connection.execute("INSERT INTO account VALUES ('Ada', 1)")
    with closing(sqlite3.connect(tmp_path / "bank.db")) as other:
        assert names(other) == ["Ada"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_transaction_rolls_back_what_raised(
    accounts: sqlite3.Connection, error: type[BaseException]
) -> None:
    with pytest.raises(error), chapter.transaction(accounts):
        accounts.execute("INSERT INTO account VALUES ('Ada', 1)")
        raise error
    assert names(accounts) == []
    assert not accounts.in_transaction


def test_a_commit_that_fails_rolls_back(accounts: sqlite3.Connection) -> None:
    accounts.execute("PRAGMA foreign_keys = ON")
    accounts.execute(
        "CREATE TABLE card (owner REFERENCES account (name) DEFERRABLE INITIALLY DEFERRED)"
    )
    with (
        pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"),
        chapter.transaction(accounts),
    ):
        accounts.execute("INSERT INTO card VALUES ('nobody')")
    assert not accounts.in_transaction
    assert accounts.execute("SELECT count(*) FROM card").fetchone() == (0,)


def test_a_transaction_in_a_transaction_is_refused(accounts: sqlite3.Connection) -> None:
    with chapter.transaction(accounts):
        accounts.execute("INSERT INTO account VALUES ('Ada', 1)")
        with pytest.raises(RuntimeError, match="commit it or roll it back first"):
            chapter.transaction(accounts).__enter__()
    assert names(accounts) == ["Ada"]


def test_a_block_that_rolled_back_by_itself_gets_its_own_error(
    accounts: sqlite3.Connection,
) -> None:
    with pytest.raises(ValueError, match="mine"), chapter.transaction(accounts):
        accounts.rollback()
        raise ValueError("mine")


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


def cpython_tests() -> list[str]:
    try:
        suite = importlib.import_module("test.test_contextlib")
    except ImportError:  # some distributions leave the interpreter's own tests out
        return []
    return unittest.defaultTestLoader.getTestCaseNames(suite.ContextManagerTestCase)  # type: ignore[return-value, unused-ignore]


@pytest.mark.skipif(not cpython_tests(), reason="this Python comes without its test package")
@pytest.mark.parametrize("name", cpython_tests())
def test_from_scratch_passes_every_test_that_cpython_has_for_the_original(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = importlib.import_module("test.test_contextlib")
    monkeypatch.setattr(suite, "contextmanager", chapter.contextmanager_from_scratch)
    result = unittest.TestResult()
    suite.ContextManagerTestCase(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    assert result.errors + result.failures == []


def test_the_tests_of_cpython_do_fail_where_ours_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpython_tests():
        pytest.skip("this Python comes without its test package")
    suite = importlib.import_module("test.test_contextlib")
    monkeypatch.setattr(suite, "contextmanager", lambda function: function)
    result = unittest.TestResult()
    for name in cpython_tests():
        suite.ContextManagerTestCase(name).run(result)
    assert len(result.errors + result.failures) > 10


def test_from_scratch_works_as_a_decorator_that_opens_anew_for_each_call() -> None:
    calls: list[str] = []

    @chapter.contextmanager_from_scratch
    def noted(name: str) -> Iterator[None]:
        calls.append(f"enter {name}")
        try:
            yield
        finally:
            calls.append(f"exit {name}")

    @noted("x")
    def double(number: int) -> int:
        """Twice the number."""
        calls.append("call")
        return 2 * number

    assert (double(2), double(3)) == (4, 6)
    assert calls == ["enter x", "call", "exit x"] * 2
    assert double.__doc__ == "Twice the number."


def test_from_scratch_unwraps_only_the_stop_iteration_that_pep_479_wrapped() -> None:
    @chapter.contextmanager_from_scratch
    def translating() -> Iterator[None]:
        try:
            yield
        except StopIteration as error:
            raise LookupError("exhausted") from error

    with pytest.raises(LookupError, match="exhausted"), translating():
        raise StopIteration


def test_from_scratch_closes_a_generator_that_does_not_stop() -> None:
    closed: list[bool] = []

    @chapter.contextmanager_from_scratch
    def twice() -> Iterator[None]:
        try:
            yield
            yield
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="generator didn't stop: it has a second yield"), twice():
        pass
    assert closed == [True]


@ways
def test_a_manager_from_scratch_keeps_the_cleanup_contract(way: Any) -> None:
    held: list[object] = []

    @chapter.contextmanager_from_scratch
    def hold() -> Iterator[object]:
        token = object()
        held.append(token)
        try:
            yield token
        finally:
            held.remove(token)

    way(Subject(open=hold, leaks=lambda: held))


# --- What the demos claim ---


def output(capsys: pytest.CaptureFixture[str], demo: str) -> str:
    getattr(chapter, demo)()
    return capsys.readouterr().out


@pytest.mark.parametrize("leave", ["ends", "raises", "returns"])
def test_the_expansion_does_what_the_with_statement_does(leave: str) -> None:
    def body(_value: object) -> None:
        if leave == "raises":
            raise ValueError("from the body")

    calls = []
    for run in (chapter.with_statement, chapter.expansion):
        recorder = chapter.Recorder()
        try:
            run(recorder, body)
        except ValueError as error:
            recorder.calls.append(str(error))
        calls.append(recorder.calls)
    assert calls[0] == calls[1]
    assert calls[0][0] == "__enter__"


def test_the_expansion_lets_a_manager_suppress_as_with_does() -> None:
    for run in (chapter.with_statement, chapter.expansion):
        run(chapter.suppress(ValueError), lambda _value: int("x"))


def test_the_demo_of_with_shows_the_same_calls_for_both(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "demo_with")
    assert shown.count("__enter__ → body → __exit__(None)") == 2
    assert shown.count("__enter__ → body → __exit__(ValueError)") == 2


def test_without_finally_the_lock_stays_and_the_second_run_is_locked_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="x"), chapter.careless_lock(tmp_path / "lock"):
        int("x")
    assert (tmp_path / "lock").exists()
    with pytest.raises(ValueError, match="x"), chapter.careful_lock(tmp_path / "careful"):
        int("x")
    assert not (tmp_path / "careful").exists()
    shown = output(capsys, "demo_missing_finally")
    assert shown.count("setup raised FileExistsError") == 1
    assert shown.count("the second run has the lock") == 1


def test_the_demo_of_configuration_shows_the_none_that_stays_and_the_type_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_temporary_config")
    assert "settings = {'model': 'gpt-4o-mini', 'debug': None}" in shown
    assert "cleanup raised TypeError" in shown
    assert "TypeError: str expected, not NoneType" in shown
    assert "'WORKSHOP' in os.environ: False" in shown


def test_the_demo_from_scratch_shows_both_doing_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_from_scratch")
    assert shown.count("ValueError('from the block')") == 2
    assert shown.count("suppressed") == 2
    (row,) = [line for line in shown.splitlines() if line.startswith("│ yields_twice")]
    assert row.count('RuntimeError("generator') == 2


def test_a_truthy_exit_hides_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with chapter.Batch() as rows:
        rows.append(1)
        raise ValueError("hidden")
    with pytest.raises(ValueError, match="seen"), chapter.Batch():
        raise ValueError("seen, for there are no rows")
    assert "2 of 4 rows, and no error to be seen" in output(capsys, "demo_suppressing")


def test_the_demo_of_files_and_databases_shows_the_halves_and_the_wholes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = output(capsys, "demo_files_and_databases")
    results = [line for line in shown.splitlines() if line[0] in "'["]
    assert results == [
        "'new rep' in ['report.txt']",
        "'old report' in ['report.txt']",
        "[('Ada', 50), ('Bob', 0)]",
        "[('Ada', 100), ('Bob', 0)]",
    ]


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("closing", (42,)),
        ("suppress", []),
        ("redirect_stdout", "Hello\n"),
        ("chdir", os.path.abspath("/")),
        ("nullcontext", False),
        ("ExitStack", ["b", "a"]),
        ("ContextDecorator", 42),
    ],
)
def test_each_tool_of_the_toolbox_leaves_the_result_that_is_shown(
    name: str, result: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(chapter.TOOLBOX) == {
        *("closing", "suppress", "redirect_stdout", "chdir"),
        *("nullcontext", "ExitStack", "ContextDecorator"),
    }
    shown = output(capsys, "demo_toolbox")
    (row,) = [line for line in shown.splitlines() if line.startswith(f"│ {name} ")]
    assert row.rstrip(" │").endswith(repr(result))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to die of")
def test_cleanup_survives_an_exit_and_an_interrupt_but_no_kill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {}
    for line in output(capsys, "demo_what_cleanup_cannot_survive").splitlines():
        if line.startswith("│ "):
            death, status, left = (cell.strip() for cell in line.strip("│").split("│"))
            rows[death.split("  #")[0]] = (int(status), left)
    assert rows == {
        "sys.exit(1)": (1, ""),
        "os.kill(os.getpid(), signal.SIGINT)": (-2, ""),
        "os.kill(os.getpid(), signal.SIGTERM)": (-15, "report.draft"),
        "os._exit(1)": (1, "report.draft"),
        "os.kill(os.getpid(), 9)": (-9, "report.draft"),
    }


# --- How a scope is drawn ---


@contextmanager
def breaking(part: str) -> Iterator[None]:
    if part == "setup":
        raise OSError
    yield
    if part == "cleanup":
        raise OSError


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("none", "left at its end  setup 0.00 · use 0.00 · cleanup"),
        ("setup", "setup raised OSError  setup 0.00 ms"),
        ("body", "left by OSError  setup"),
        ("cleanup", "cleanup raised OSError  setup"),
    ],
)
def test_a_bracket_tells_how_the_block_was_left(
    part: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manager: AbstractContextManager[None] = breaking(part)
    try:
        with chapter.shown("label", manager):
            if part == "body":
                raise OSError
    except OSError:
        assert part != "none"
    first, last = capsys.readouterr().out.splitlines()
    assert first == "┌ label"
    assert told.split("  ")[0] in last
    assert ("cleanup" in last.split("  ")[1]) == (part != "setup")
    assert chapter.open_brackets == []
