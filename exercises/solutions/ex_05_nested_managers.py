"""Solutions of the exercises of chapter 05, and why they are right."""

from __future__ import annotations

import importlib
import logging
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any, NamedTuple


class BudgetExceededError(RuntimeError):
    """A worst case does not fit. Nothing is reserved: do not make the call."""


# --- 1 · bug ---


@dataclass
class Wallet:
    """What all calls of one night may cost together, in cents."""

    limit: int
    spent: int = 0
    reserved: int = 0  # the worst cases of the calls that are under way


@dataclass
class Bill:
    """What one call costs, in cents. None until the answer says it."""

    cost: int | None = None


@contextmanager
def paid_from(wallet: Wallet, worst_case: int) -> Iterator[Bill]:
    """Pay one call.

    What is reserved counts like what is spent, because each call under way may cost its worst
    case. `finally` pays however the block ends, and asks for None, because `cost or worst_case`
    would charge the worst case for a call that cost nothing.
    """
    if wallet.spent + wallet.reserved + worst_case > wallet.limit:
        raise BudgetExceededError(f"{worst_case} cents do not fit into {wallet}")
    wallet.reserved += worst_case
    bill = Bill()
    try:
        yield bill
    finally:
        wallet.reserved -= worst_case
        wallet.spent += worst_case if bill.cost is None else bill.cost


# --- 2 · task ---


@dataclass
class Profile:
    """How long each step took, without the steps inside it."""

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    inside: float = 0.0  # the seconds of the steps that ended inside the current one


@contextmanager
def step(profile: Profile, name: str) -> Iterator[None]:
    """Time a step.

    Blocks end in reverse order, so the local variables of the generators are the stack, and one
    number is enough for what ended inside. It is restored in `finally`, so that a step that raises
    does not leave its own seconds to the wrong step.
    """
    before, profile.inside = profile.inside, 0.0
    started = profile.clock()
    try:
        yield
    finally:
        whole = profile.clock() - started
        profile.seconds[name] = profile.seconds.get(name, 0.0) + whole - profile.inside
        profile.inside = before + whole


# --- 3 · capstone ---

Dollars = Decimal | int
logger = logging.getLogger("workshop.shared_budget")
EXACT = Context(prec=50)  # sums do not depend on the caller's decimal context

TABLES = (
    """CREATE TABLE IF NOT EXISTS budget (
        name TEXT PRIMARY KEY, cap BIGINT NOT NULL, taken BIGINT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS reservation (
        id TEXT PRIMARY KEY, budget TEXT NOT NULL, worst_case BIGINT NOT NULL,
        expires DOUBLE PRECISION NOT NULL)""",
)
OPEN = "INSERT INTO budget VALUES (:name, :cap, 0) ON CONFLICT (name) DO NOTHING"
TAKE = """\
UPDATE budget SET taken = taken + :worst_case
WHERE name = :name AND taken + :worst_case <= cap"""
KEEP = "INSERT INTO reservation VALUES (:id, :name, :worst_case, :expires)"
SETTLE = "DELETE FROM reservation WHERE id = :id"  # by its id: a second time changes nothing
BOOK = "UPDATE budget SET taken = taken - :worst_case + :actual WHERE name = :name"
READ = """\
SELECT cap, taken, (SELECT coalesce(sum(worst_case), 0) FROM reservation
                    WHERE budget = :name AND expires > :now)
FROM budget WHERE name = :name"""


def to_picodollars(amount: Dollars) -> int:
    """Return an amount in US dollars, rounded up, as an integer: databases add those exactly.

    Raises TypeError for a float or bool, and ValueError unless 0 <= amount < a million dollars.
    """
    if isinstance(amount, bool) or not isinstance(amount, Dollars):
        raise TypeError(f"{amount!r} is not an exact amount: pass Decimal('0.25')")
    if not (Decimal(amount).is_finite() and 0 <= amount < 1_000_000):
        raise ValueError(f"{amount} is not in the range from 0 to below a million dollars")
    exact = Decimal(amount).quantize(Decimal("1e-12"), ROUND_CEILING, EXACT)
    return int(exact.scaleb(12, EXACT))


def to_dollars(picodollars: int) -> Decimal:
    """Return what `to_picodollars` made an integer of."""
    return Decimal(picodollars).scaleb(-12, EXACT)


class Balance(NamedTuple):
    """A budget's money at one moment, in US dollars."""

    limit: Decimal
    spent: Decimal
    reserved: Decimal

    @property
    def remaining(self) -> Decimal:
        """What can still be reserved."""
        return EXACT.subtract(EXACT.subtract(self.limit, self.spent), self.reserved)


class SQLite:
    """A ledger for several processes."""

    # subtle: take the write lock at once. After a plain BEGIN, two processes that have read
    # would wait for each other, and one of them would fail.
    begin = "BEGIN IMMEDIATE"
    tables = TABLES

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path).absolute()  # os.chdir must not lead to a second ledger

    def connect(self) -> Any:
        return sqlite3.connect(self._path, timeout=60, isolation_level=None)

    def adapt(self, statement: str) -> str:
        return statement


class PostgreSQL:
    """A ledger for several machines."""

    # subtle: not a stricter level. An UPDATE that waited for another one must look again at the
    # row, instead of failing.
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
    # subtle: IF NOT EXISTS is not enough if two processes create a table at the same moment.
    tables = ("SELECT pg_advisory_xact_lock(505)", *TABLES)

    def __init__(self, address: str) -> None:
        self._address = address

    def connect(self) -> Any:
        return importlib.import_module("psycopg").connect(self._address, autocommit=True)

    def adapt(self, statement: str) -> str:
        return re.sub(r":(\w+)", r"%(\1)s", statement)


class Reservation:
    """Money set aside for one call."""

    def __init__(self, book: Callable[[int], None]) -> None:
        self._book = book
        self._cost: int | None = None
        self._booked = False

    def settle(self, actual: Dollars) -> None:
        """Record what the call cost; settle at 0 only a call that was not billed.

        If the database fails, its error propagates, and the block's end tries once more with the
        same cost. Raises RuntimeError if the reservation is settled already.
        """
        if self._booked:
            raise RuntimeError("this reservation is settled already")
        self._cost = to_picodollars(actual)
        self._book(self._cost)
        self._booked = True


class SharedBudget:
    """A limit in US dollars for all who open the same name in the same ledger.

    Each step waits for the database, and an event loop waits with it. Each step opens a
    connection of its own, so threads and forks may share a budget.
    """

    def __init__(
        self,
        ledger: SQLite | PostgreSQL,
        limit: Dollars,
        name: str,
        lease: float,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self._ledger, self._cap = ledger, to_picodollars(limit)
        self._lease, self._clock = lease, clock

    def open(self) -> None:
        """Enter the limit. Raises ValueError if there is another one."""
        with self._transaction() as execute:
            for statement in self._ledger.tables:
                execute(statement)
            execute(OPEN, name=self.name, cap=self._cap)
            known = self._read(execute).limit
        if known != to_dollars(self._cap):
            raise ValueError(f"the ledger limits {self.name!r} to ${known.normalize(EXACT):f}")

    def balance(self) -> Balance:
        """Return the amounts of one moment. This takes no lock."""
        with self._connection() as execute:
            return self._read(execute)

    @contextmanager
    def reserve(self, worst_case: Dollars) -> Iterator[Reservation]:
        """Set aside the most that a call can cost.

        If the block ends before `settle`, for whatever reason, or the process dies, the whole
        worst case is spent. Raises BudgetExceededError if too little is left.
        """
        worst, number = to_picodollars(worst_case), uuid.uuid4().hex
        row = {"id": number, "name": self.name, "worst_case": worst}
        with self._transaction() as execute:
            if not execute(TAKE, **row).rowcount:
                left = self._read(execute).remaining.normalize(EXACT)
                message = f"budget {self.name!r} has ${left:f} left, but ${worst_case} is needed"
                raise BudgetExceededError(message)
            execute(KEEP, **row, expires=self._clock() + self._lease)

        def book(actual: int) -> None:
            with self._transaction() as execute:
                if execute(SETTLE, id=number).rowcount:
                    execute(BOOK, **row, actual=actual)

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
    def _connection(self) -> Iterator[Callable[..., Any]]:
        """Open a connection for one step; yield a function that executes a statement."""
        with closing(self._ledger.connect()) as connection:

            def execute(statement: str, **values: object) -> Any:
                return connection.execute(self._ledger.adapt(statement), values or ())

            yield execute

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., Any]]:
        """Commit what one step did. If it fails, closing the connection rolls all of it back."""
        with self._connection() as execute:
            execute(self._ledger.begin)
            yield execute
            execute("COMMIT")

    def _read(self, execute: Callable[..., Any]) -> Balance:
        row = execute(READ, name=self.name, now=self._clock()).fetchone()
        limit, taken, reserved = (to_dollars(int(amount)) for amount in row)
        return Balance(limit, EXACT.subtract(taken, reserved), reserved)


@contextmanager
def shared_budget(
    ledger: Path | str,
    limit: Dollars,
    name: str,
    lease: float = 600.0,
    clock: Callable[[], float] = time.time,
) -> Iterator[SharedBudget]:
    """Open a budget. Raises ValueError if the ledger has another limit for this name.

    One UPDATE decides whether a worst case fits, so nobody can reserve between the question and
    the answer. A reservation is taken money until it is settled, so that a dead process leaves
    nothing to recover, and no clock decides about money: it only changes what is shown.
    """
    is_postgresql = isinstance(ledger, str) and ledger.startswith("postgresql://")
    place = PostgreSQL(str(ledger)) if is_postgresql else SQLite(ledger)
    opened = SharedBudget(place, limit, name, lease, clock)
    opened.open()
    yield opened
