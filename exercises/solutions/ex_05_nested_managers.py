"""Solution of the capstone of chapter 05: one budget for several processes.

The ledger is an SQLite file. `TAKE`, one statement that no other process can divide, decides
whether a worst case fits. Each reservation is a row until it is settled. If its process dies, the
row stays: the outcome is unknown, so the worst case is spent. Nothing has to be recovered, and no
clock decides about money. (For several machines, run the same statements on PostgreSQL.)
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import NamedTuple

Dollars = Decimal | int
logger = logging.getLogger("workshop.shared_budget")
EXACT = Context(prec=50)  # sums do not depend on the caller's decimal context

TABLES = """
CREATE TABLE IF NOT EXISTS budget (
    name TEXT PRIMARY KEY, cap INTEGER NOT NULL, taken INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS reservation (
    id INTEGER PRIMARY KEY AUTOINCREMENT, budget TEXT, worst_case INTEGER, expires REAL);"""
OPEN = "INSERT INTO budget (name, cap) VALUES (:name, :cap) ON CONFLICT DO NOTHING"
TAKE = """\
UPDATE budget SET taken = taken + :worst_case
WHERE name = :name AND taken + :worst_case <= cap"""
KEEP = """\
INSERT INTO reservation (budget, worst_case, expires) VALUES (:name, :worst_case, :expires)"""
SETTLE = "DELETE FROM reservation WHERE id = :id"  # by its id: a second time changes nothing
BOOK = "UPDATE budget SET taken = taken - :worst_case + :actual WHERE name = :name"
READ = """\
SELECT cap, taken, (SELECT coalesce(sum(worst_case), 0) FROM reservation
                    WHERE budget = :name AND expires > :now)
FROM budget WHERE name = :name"""


def picodollars(amount: Dollars, what: str) -> int:
    """Return an amount in US dollars, rounded up, as what SQLite adds exactly: an integer.

    Raises TypeError for a float or bool, and ValueError unless 0 <= amount < a million dollars.
    """
    if isinstance(amount, bool) or not isinstance(amount, Dollars):
        raise TypeError(f"{what} is {amount!r}: pass an exact amount, Decimal('0.25')")
    if not (Decimal(amount).is_finite() and 0 <= amount < 1_000_000):
        raise ValueError(f"{what} is {amount}: pass dollars from 0 to below a million")
    exact = Decimal(amount).quantize(Decimal("1e-12"), ROUND_CEILING, EXACT)
    return int(exact.scaleb(12, EXACT))


class Balance(NamedTuple):
    """A budget's money at one moment, in US dollars."""

    limit: Decimal
    spent: Decimal
    reserved: Decimal

    @property
    def remaining(self) -> Decimal:
        return EXACT.subtract(EXACT.subtract(self.limit, self.spent), self.reserved)


class BudgetExceededError(RuntimeError):
    """A worst case does not fit. Nothing is reserved: do not make the call."""


class Reservation:
    """Money set aside for one call."""

    def __init__(self, book: Callable[[int], None]) -> None:
        self._book = book
        self._cost: int | None = None
        self._booked = False

    def settle(self, actual: Dollars) -> None:
        """Record what the call cost; settle at 0 only a call that was not billed.

        If this raises sqlite3.Error, the block's end tries once more, with the same cost. Raises
        RuntimeError if the reservation is settled already.
        """
        if self._booked:
            raise RuntimeError("this reservation is settled already")
        self._cost = picodollars(actual, "the actual cost")
        self._book(self._cost)
        self._booked = True


class SharedBudget:
    """A limit in US dollars for all processes that open the same name in the same file.

    Each step waits for the disk, and an event loop waits with it. A reservation older than
    `lease` seconds is shown as spent, no longer as reserved; if its call still lives, it can
    settle as usual. A fork may use it, too: each step opens a connection of its own.
    """

    def __init__(
        self, path: Path, limit: Dollars, name: str, lease: float, clock: Callable[[], float]
    ) -> None:
        self.path, self.name = path, name
        self._cap = picodollars(limit, f"the limit of budget {name!r}")
        self._lease, self._clock = lease, clock

    def open(self) -> None:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection:
            connection.executescript(TABLES)
        with self._ledger() as ledger:
            ledger.execute(OPEN, {"name": self.name, "cap": self._cap})
            known = self._read(ledger).limit
        if known != Decimal(self._cap).scaleb(-12, EXACT):
            raise ValueError(f"{self.path} limits {self.name!r} to ${known.normalize(EXACT):f}")

    def balance(self) -> Balance:
        """Return the amounts of one moment."""
        with self._ledger() as ledger:
            return self._read(ledger)

    @contextmanager
    def reserve(self, worst_case: Dollars) -> Iterator[Reservation]:
        """Set aside the most that a call can cost.

        If the block ends before `settle`, for whatever reason, or the process dies, the whole
        worst case is spent. Raises BudgetExceededError if too little is left.
        """
        worst = picodollars(worst_case, "the worst case")
        row = {"name": self.name, "worst_case": worst, "expires": self._clock() + self._lease}
        with self._ledger() as ledger:
            if not ledger.execute(TAKE, row).rowcount:
                left = self._read(ledger).remaining.normalize(EXACT)
                message = f"budget {self.name!r} has ${left:f} left, but ${worst_case} is needed"
                raise BudgetExceededError(message)
            number = ledger.execute(KEEP, row).lastrowid

        def book(actual: int) -> None:
            with self._ledger() as ledger:
                if ledger.execute(SETTLE, {"id": number}).rowcount:
                    ledger.execute(BOOK, {**row, "actual": actual})

        reservation = Reservation(book)
        try:
            yield reservation
        finally:
            if not reservation._booked:
                known = reservation._cost
                if known is None:
                    logger.warning("%r: unknown outcome, $%s spent", self.name, worst_case)
                book(worst if known is None else known)

    @contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        """Open a connection and a transaction, for one step."""
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _read(self, ledger: sqlite3.Connection) -> Balance:
        row = ledger.execute(READ, {"name": self.name, "now": self._clock()}).fetchone()
        limit, taken, reserved = (Decimal(amount).scaleb(-12, EXACT) for amount in row)
        return Balance(limit, EXACT.subtract(taken, reserved), reserved)


@contextmanager
def shared_budget(
    path: Path,
    limit: Dollars,
    name: str,
    lease: float = 600.0,
    clock: Callable[[], float] = time.time,
) -> Iterator[SharedBudget]:
    """Open a budget in a file. Raises ValueError if the file has another limit for this name."""
    opened = SharedBudget(path, limit, name, lease, clock)
    opened.open()
    yield opened
