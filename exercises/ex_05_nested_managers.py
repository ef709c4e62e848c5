"""Exercises for chapter 05 · Managers inside managers

    .venv/bin/python -m pytest exercises/ex_05_nested_managers.py
    .venv/bin/python -m pytest exercises/ex_05_nested_managers.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import NamedTuple


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
    """The bill that was twice the limit

    Every night, twenty agents share a wallet, each one an asyncio task. It works as long as every
    call is answered:

        with paid_from(wallet, worst_case=20) as bill:
            bill.cost = await ask_a_model()

    Last night many calls timed out. In the morning the wallet was full of reservations, and said
    that nothing was spent. But the provider had billed every call, since it does not care whether
    anybody waits for the answer. And together its bills were twice the limit of the wallet.

    Fix it: if the worst case does not fit beside what is spent and what is reserved, raise
    BudgetExceededError. However the block ends, its reservation is gone afterwards, `wallet.spent`
    has grown by the cost, and the block's own exception propagates. An unknown cost counts as the
    worst case. A cost of 0 is known.
    """
    if wallet.spent + worst_case > wallet.limit:
        raise BudgetExceededError
    wallet.reserved += worst_case
    bill = Bill()
    yield bill
    wallet.reserved -= worst_case
    wallet.spent += bill.cost or 0


# --- 2 · task ---


@dataclass
class Profile:
    """How long each step took. You may add fields."""

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def step(profile: Profile, name: str) -> Iterator[None]:
    """Where the time went

    A report takes 10 seconds, of which 7 go to its search. Which of the two is slow? Time them
    without the steps inside them:

        with step(profile, "report"):
            with step(profile, "search"):
                ...

    Afterwards, `profile.seconds` is {"report": 3.0, "search": 7.0}: the seconds of each step, by
    `profile.clock`, without those of the steps that ran inside it. A step that runs again adds to
    its seconds, even if it runs inside a step of the same name. A step that raises counts, too,
    and its exception propagates. Steps of another profile do not count. All run in one thread.
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---

Dollars = Decimal | int
EXACT = Context(prec=50)  # sums do not depend on the caller's decimal context


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


class Reservation:
    """Money set aside for one call. Change it as you like."""

    def settle(self, actual: Dollars) -> None:
        """Record what the call cost. Raises RuntimeError if that is recorded already."""
        raise NotImplementedError


class SharedBudget:
    """One limit in US dollars for all who open it. Change it as you like."""

    def balance(self) -> Balance:
        """Return the amounts of this moment."""
        raise NotImplementedError

    @contextmanager
    def reserve(self, worst_case: Dollars) -> Iterator[Reservation]:
        """Set aside the most that a call can cost."""
        raise NotImplementedError
        yield


@contextmanager
def shared_budget(
    ledger: Path | str,
    limit: Dollars,
    name: str,
    lease: float = 600.0,
    clock: Callable[[], float] = time.time,
) -> Iterator[SharedBudget]:
    """One budget for several processes, then for several machines

    The `Budget` of chapter 05 lives in one process. Ten workers need one that no `kill -9` and no
    wrong clock can overspend. Keep it in a database: `ledger` is the path of an SQLite file, or
    the address of a PostgreSQL database if it begins with `postgresql://`. Solve SQLite first.
    PostgreSQL is judged only if you installed `exercises/requirements.txt`; connect by `psycopg`.

        with shared_budget(Path("ledger.db"), limit=100, name="team") as budget:
            with budget.reserve(Decimal("0.25")) as reservation:
                reservation.settle(ask_a_model())

    Each name in a ledger is its own budget. Opening it raises ValueError if the ledger has
    another limit for this name. A relative path still means the same file after `os.chdir`.
    Amounts are exact in any decimal context: see `to_picodollars`.

    `reserve` sets the worst case aside, so that all threads and processes see it, or raises
    BudgetExceededError. If the block ends before `settle`, or its process dies, the outcome is
    unknown, and the worst case is spent. The block's own exception propagates.

    `settle` replaces the worst case by the cost. A second time, it raises RuntimeError. If the
    database fails, its error propagates, and the end of the block tries once more, with the same
    cost.

    `balance` only reads: it does not wait while another process writes.

    A reservation that is older than `lease` seconds by `clock` is shown as spent, no longer as
    reserved. A lease can promise no more than that. Clocks are wrong and calls are slow, so its
    money is never given back because of its age, and it can still be settled.
    """
    raise NotImplementedError
    yield
