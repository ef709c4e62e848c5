# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 05 · Managers inside managers

After this chapter you can nest managers and say in which order they end, cap what calls to a
model cost even if some of them time out, and choose the order of layers that work together.

    python 05_nested_managers.py            run all five demos
    python 05_nested_managers.py 2 3        run demos 2 and 3
    python 05_nested_managers.py --step     wait for Enter at each question
    python 05_nested_managers.py 5 --live   ask a real model in demo 5

Read `Budget.reserve` first, then run the demos. Offline, the OpenAI client and the prices are
real. A stand-in answers: it repeats the question and bills one token for every four bytes.

Left out: one budget for several processes (a capstone, with its solution in
exercises/solutions/ex_05_nested_managers.py), waiting for money (chapter 03 waits for a GPU).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import genai_prices
import httpx2
import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
Dollars = Decimal | int
Clock = Callable[[], float]  # returns seconds since some fixed moment
Price = Callable[[int, int, int], Decimal]  # of input, output and cached input tokens
EXACT = Context(prec=50)  # sums do not depend on the caller's decimal context


def money(amount: Dollars, what: str) -> Decimal:
    """Return an amount in US dollars, rounded up to a picodollar.

    Raises TypeError for a float or bool, and ValueError unless 0 <= amount < a million dollars.
    """
    if isinstance(amount, bool) or not isinstance(amount, Dollars):
        kind = type(amount).__name__
        raise TypeError(f"{what} is {amount!r}, a {kind}: pass an exact one, Decimal('0.25')")
    exact = Decimal(amount)
    if not (exact.is_finite() and 0 <= exact <= Decimal("999999.999999999999")):
        raise ValueError(f"{what} is {exact}: pass dollars from 0 to below a million")
    return exact.copy_abs().quantize(Decimal("1e-12"), ROUND_CEILING, EXACT)  # abs: no "-0"


def format_usd(amount: Decimal) -> str:
    return f"${amount.normalize(EXACT):f}"


@dataclass(eq=False)
class Scope:
    """An object that works only inside the `with` block that made it."""

    name: str
    is_open: bool = field(default=True, init=False)
    closed_error: ClassVar[type[RuntimeError]] = RuntimeError

    def check_open(self) -> None:
        if not self.is_open:
            kind = type(self).__name__
            raise self.closed_error(f"{kind} {self.name!r} is closed: use it inside its block")

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Work for the duration of a block."""
        try:
            yield self
        finally:
            self.is_open = False


class BudgetExceededError(RuntimeError):
    """A worst case does not fit. Nothing is reserved on any level: do not make the call."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name  # of the level that refuses


class Reservation:
    """Money set aside for one call: `with budget.reserve(worst_case) as reservation`."""

    def __init__(self, worst_case: Decimal) -> None:
        self.worst_case = worst_case
        self._outcome: dict[str, Decimal] = {}  # empty until the cost is known

    @property
    def actual(self) -> Decimal | None:
        """What the call cost, or None while that is unknown."""
        return self._outcome.get("cost")

    def settle(self, actual: Dollars) -> None:
        """Record what the call cost. The rest of the worst case can be reserved again at once.

        Settle at 0 only a call that was not billed. A cost above the worst case counts in full.
        Raises RuntimeError if the reservation is settled already.
        """
        cost = money(actual, "the actual cost")
        # subtle: one step, which no thread and no signal can divide. The first cost stays.
        if self._outcome.setdefault("cost", cost) is not cost:
            first = format_usd(self._outcome["cost"])
            raise RuntimeError(f"this reservation is settled at {first}")


class Budget(Scope):
    """A limit in US dollars for all calls inside, from any number of tasks and threads.

    A child's calls count on every level above it. A call is settled on all levels in one step,
    which no signal can divide: each level adds up the reservations that it knows.

    A forked process gets a copy, and copies know nothing of each other: open a new budget
    there. Do not reserve in a signal handler or a `__del__`: it could deadlock.
    """

    def __init__(self, limit: Dollars, name: str, parent: Budget | None = None) -> None:
        super().__init__(name)
        self.limit = money(limit, f"the limit of budget {name!r}")
        self._levels: tuple[Budget, ...] = (self, *(parent._levels if parent else ()))
        self._lock: threading.Lock = parent._lock if parent else threading.Lock()
        # What ended reservations cost, and the others. One tuple, replaced in one step.
        self._ledger: tuple[Decimal, tuple[Reservation, ...]] = (Decimal(0), ())

    @property
    def spent(self) -> Decimal:
        return self._add_up()[0]

    @property
    def reserved(self) -> Decimal:
        return self._add_up()[1]

    @property
    def remaining(self) -> Decimal:
        """What can still be reserved on this level. A level above it may have less.

        Negative if a call cost more than its worst case.
        """
        spent, reserved, _under_way = self._add_up()
        return EXACT.subtract(EXACT.subtract(self.limit, spent), reserved)

    def child(self, limit: Dollars, name: str) -> AbstractContextManager[Budget]:
        """Open a budget inside this one. It is a cap, not a share: nothing is set aside for it."""
        return Budget(limit, name, parent=self).opened()

    @contextmanager
    def reserve(self, worst_case: Dollars) -> Iterator[Reservation]:
        """Set aside the most that a call can cost, on this level and all above it, or on none.

        If the block ends before `settle`, for whatever reason, the outcome is unknown and the
        whole worst case is spent: a call that timed out may have been billed.
        Raises BudgetExceededError if a level has too little left, RuntimeError if one is closed.
        """
        reservation = Reservation(money(worst_case, "the worst case"))
        try:
            self._add(reservation)
        except BaseException:
            reservation._outcome.setdefault("cost", Decimal(0))  # nothing was sent
            raise
        try:
            yield reservation
        finally:
            # subtle: not `settle`. Ctrl-C during that call could leave the cost unrecorded.
            reservation._outcome.setdefault("cost", reservation.worst_case)

    def _add(self, reservation: Reservation) -> None:
        with self._lock:  # nobody reserves between the check and the addition
            for level in self._levels:
                # subtle: not `if` here. Ctrl-C after it would keep the lock, on Python 3.13.0.
                level._check_fits(reservation.worst_case)
            for level in self._levels:
                spent, _reserved, under_way = level._add_up()
                level._ledger = (spent, (*under_way, reservation))

    def _check_fits(self, worst_case: Decimal) -> None:
        self.check_open()
        remaining = self.remaining
        if worst_case > remaining:
            left = f"{format_usd(remaining)} left of {format_usd(self.limit)}"
            raise BudgetExceededError(
                f"budget {self.name!r} has {left}, but {format_usd(worst_case)} is needed: "
                "wait for other calls, ask for a shorter answer, or raise the limit",
                self.name,
            )

    def _add_up(self) -> tuple[Decimal, Decimal, list[Reservation]]:
        """Return what is spent, what is reserved, and the reservations that are under way."""
        spent, reservations = self._ledger
        reserved, under_way = Decimal(0), []
        for reservation in reservations:
            cost = reservation.actual
            if cost is None:
                reserved = EXACT.add(reserved, reservation.worst_case)
                under_way.append(reservation)
            else:
                spent = EXACT.add(spent, cost)
        return spent, reserved, under_way


def budget(limit: Dollars, name: str = "budget") -> AbstractContextManager[Budget]:
    """Cap what the calls in a block cost. A reservation that outlives it still counts."""
    return Budget(limit, name).opened()


class Statistics(NamedTuple):
    """The calls of one operation: durations in seconds, percentiles by nearest rank."""

    calls: int
    errors: int
    total: float
    p50: float
    p95: float
    maximum: float


def summary(durations: list[float], errors: int) -> Statistics:
    ranked = sorted(durations)
    # Nearest rank: the shortest duration that at least so many per cent do not exceed.
    p50, p95 = (ranked[(percent * len(ranked) + 99) // 100 - 1] for percent in (50, 95))
    return Statistics(len(ranked), errors, sum(ranked), p50, p95, ranked[-1])


class Monitor(Scope):
    """Durations and errors by operation, from any number of tasks and threads.

    What a child measures is in the reports of all levels above it, too. Every measurement is
    kept, so that percentiles are exact.
    """

    def __init__(self, name: str, clock: Clock, parent: Monitor | None = None) -> None:
        super().__init__(name)
        self._clock = clock
        self._levels: tuple[Monitor, ...] = (self, *(parent._levels if parent else ()))
        # Of all levels: who measured, the operation, its seconds, and whether it failed.
        self._log: list[tuple[Monitor, str, float, bool]] = parent._log if parent else []

    def child(self, name: str) -> AbstractContextManager[Monitor]:
        """Open a monitor inside this one."""
        return Monitor(name, self._clock, parent=self).opened()

    @contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        """Time a block, and count it as an error if it raises or is cancelled.

        Raises RuntimeError if the monitor is closed.
        """
        self.check_open()
        started, failed = self._clock(), True
        try:
            yield
            failed = False
        finally:
            seconds = self._clock() - started
            # One step, so no lock: the garbage collector may end a `measure` inside another.
            self._log.append((self, operation, seconds, failed))

    def report(self) -> dict[str, Statistics]:
        """Return what was measured so far, by operation. It works after the block, too."""
        durations: dict[str, list[float]] = defaultdict(list)
        errors: Counter[str] = Counter()
        for measured_by, operation, seconds, failed in self._log.copy():
            if self in measured_by._levels:
                durations[operation].append(seconds)
                errors[operation] += failed
        return {name: summary(taken, errors[name]) for name, taken in durations.items()}


def monitor(name: str, clock: Clock = time.perf_counter) -> AbstractContextManager[Monitor]:
    """Measure operations in a block."""
    return Monitor(name, clock).opened()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block did to the database, or roll all of it back if the block raises.

    Raises RuntimeError if a transaction is already open (with `autocommit=False`, one always is).
    Chapter 01 says more.
    """
    if connection.in_transaction:
        raise RuntimeError("the connection is in a transaction: commit it or roll it back first")
    # subtle: begin inside the `try`. Ctrl-C right after BEGIN would leave the transaction open.
    try:
        connection.execute("BEGIN IMMEDIATE")  # take the write lock now, not half-way through
        yield connection
        connection.execute("COMMIT")  # inside the `try`: a failed commit must roll back, too
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class SessionClosedError(RuntimeError):
    """The session's block has ended."""


class ReplyError(RuntimeError):
    """The server's reply is not a whole answer."""


def list_price(model: str, input_tokens: int, output_tokens: int, cached: int) -> Decimal:
    """Return US dollars by genai-prices. Raises LookupError if the price is unknown."""
    usage = genai_prices.Usage(
        input_tokens=input_tokens, cache_read_tokens=cached, output_tokens=output_tokens
    )
    try:
        with localcontext(EXACT):
            return genai_prices.calc_price(usage, model, provider_id="openai").total_price
    except LookupError:
        advice = "pass price=, a function of input, output and cached tokens"
        raise LookupError(f"the price of {model!r} is unknown: {advice}") from None


def was_refused(error: openai.OpenAIError) -> bool:
    """Return whether a failed call can be given back.

    That is so only if the connection failed, or with an HTTP error that providers do not bill.
    A gateway's status, such as 408 or 504, does not count: the model behind it may go on.
    """
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        return status in (503, 529) or (400 <= status <= 500 and status not in (408, 499))
    never_sent = httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout
    return isinstance(error.__cause__, never_sent)


def message_of(completion: Any) -> dict[str, Any]:
    """Return the answer as a message. Raises ReplyError if it is not whole.

    It is whole if it has a finish reason, and a content, a refusal or calls of tools.
    """
    with suppress(AttributeError, LookupError, TypeError, ValueError, RecursionError):
        choice = completion.choices[0]
        parts = {"content", "refusal", "tool_calls"}
        said = choice.message.model_dump(include=parts, exclude_none=True, warnings=False)
        message = {"role": "assistant", **said}
        ChatCompletionMessage.model_validate(message)
        json.dumps(message, ensure_ascii=False).encode()  # the next request must hold it, too
        if choice.finish_reason and ("content" in said or "refusal" in said or said["tool_calls"]):
            return message
    shown = "nested too deeply"
    with suppress(ValueError, RecursionError):
        is_object = isinstance(completion, ChatCompletion)
        shown = str(completion.to_dict(mode="python", warnings=False) if is_object else completion)
    raise ReplyError(f"the reply is not a whole answer: {textwrap.shorten(shown, 200)}")


@dataclass(eq=False, repr=False)
class Session(Scope):
    """One conversation with a model. It takes one turn at a time.

    `cost` is in US dollars, so far. A call whose outcome is unknown counts as its worst case.
    """

    model: str
    max_output_tokens: int
    _price: Price
    _client: openai.OpenAI
    _owns_client: bool
    messages: list[Any] = field(default_factory=list)
    cost: Decimal = Decimal(0)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # held while a turn is under way
    closed_error = SessionClosedError

    def worst_case(self, prompt: str) -> Decimal:
        """Return the most that asking this now can cost.

        A token of a byte-level tokenizer has at least one byte, so the request in JSON has at
        least as many bytes as the input has tokens. The bound holds if the server adds nothing to
        the prompt and keeps to the output limit.
        """
        size = len(json.dumps(self._request(prompt), ensure_ascii=False).encode())
        return money(self._price(size, self.max_output_tokens, 0), "the price")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the session for one turn. After Ctrl-C in a turn, open a new session.

        The end of the session's block does not interrupt a turn. Raises RuntimeError if another
        turn is under way.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"session {self.name!r} is in a turn: it takes one at a time")
        try:
            self.check_open()
            yield
        finally:
            self._lock.release()
            self._close_client()

    def ask(self, prompt: str, settle: Callable[[Decimal], object] = lambda cost: None) -> str:
        """Ask, and return the answer ("" if it has only calls of tools).

        Call `settle` with the cost, if that is known, even if the turn fails. A turn that fails
        is not in `messages`. Raises openai.OpenAIError if there is no reply, ReplyError if the
        reply is not a whole answer, and SessionClosedError if the session's block has ended.
        """
        with self.turn():
            return self.ask_in_turn(prompt, settle)

    def ask_in_turn(self, prompt: str, settle: Callable[[Decimal], object]) -> str:
        """Ask, as `ask` does, but inside the block of `turn`."""
        answer = message_of(self._call(prompt, settle))
        self.check_open()
        self.messages = [*self._request(prompt), answer]
        return str(answer.get("content") or answer.get("refusal") or "")

    def _request(self, prompt: str) -> list[Any]:
        return [*self.messages, {"role": "user", "content": prompt}]

    def _call(self, prompt: str, settle: Callable[[Decimal], object]) -> Any:
        worst_case, cost = self.worst_case(prompt), None
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=self._request(prompt),
                max_completion_tokens=self.max_output_tokens,
            )
            with suppress(Exception):  # an unusable report costs the worst case, not the answer
                cost = self._cost_of(completion.usage)
            return completion
        except openai.OpenAIError as error:
            if was_refused(error):
                cost = Decimal(0)
            raise
        except UnicodeEncodeError:  # of the request: the API key is not ASCII
            raise
        except (ValueError, RecursionError) as error:  # the SDK lets them through
            raise ReplyError(f"the reply is not JSON that Python reads: {error}") from error
        finally:
            self.cost = EXACT.add(self.cost, worst_case if cost is None else cost)
            if cost is not None:
                settle(cost)

    def _cost_of(self, usage: Any) -> Decimal:
        """Return the price of a reported usage. Raises any exception if it is unusable."""
        cached = getattr(usage.prompt_tokens_details, "cached_tokens", None) or 0
        counts = (usage.prompt_tokens, usage.completion_tokens, cached)
        if not all(type(count) is int and count >= 0 for count in counts) or counts[0] == 0:
            raise ValueError(f"impossible: {counts}")
        return money(self._price(*counts), "the price")

    def _close_client(self) -> None:
        """Close the session's own client, once the block has ended and no turn is under way."""
        if self._owns_client and not self.is_open and not self._lock.locked():
            self._client.close()


@contextmanager
def session(
    name: str,
    *,
    model: str = "gpt-4o-mini",
    client: openai.OpenAI | None = None,
    max_output_tokens: int = 500,
    price: Price | None = None,
) -> Iterator[Session]:
    """Hold a conversation with a model.

    Without a client, make one from OPENAI_API_KEY and OPENAI_BASE_URL, and close it at the end; a
    client that you pass in stays open. Raises LookupError if the price of the model is unknown,
    and TypeError if `price` returns a float.
    """
    price = price or partial(list_price, model)
    money(price(1, 1, 0), "the price")  # fail now, not when the first call is paid
    # subtle: a reservation covers one attempt. A retry after a timeout may be billed, too.
    one_attempt = (client or openai.OpenAI()).with_options(max_retries=0)
    chat = Session(name, model, max_output_tokens, price, one_attempt, client is None)
    try:
        with chat.opened():
            yield chat
    finally:
        chat._close_client()


@dataclass(frozen=True)
class GovernedSession:
    """A session that pays each call from a budget, measures it, and saves it in a database."""

    budget: Budget
    monitor: Monitor
    transaction: Callable[[], AbstractContextManager[sqlite3.Connection]]
    session: Session

    def ask(self, prompt: str) -> str:
        """Reserve, measure, call, settle; then save the turn, in its own transaction.

        Nothing is sent if the call does not fit, if another thread is in a turn, or if
        `transaction` cannot begin. If the turn cannot be saved after all, that error propagates:
        then the turn is paid for, and in `session.messages`.
        """
        with self.session.turn():
            with self.transaction():
                pass  # fail now if nothing can be saved, not when the call is paid
            worst_case = self.session.worst_case(prompt)
            with self.budget.reserve(worst_case) as reservation:
                with self.monitor.measure("ask"):
                    answer = self.session.ask_in_turn(prompt, reservation.settle)
            with self.transaction() as connection:
                turn = (self.session.name, prompt, answer)
                connection.execute("INSERT INTO turn VALUES (?, ?, ?)", turn)
        return answer


@contextmanager
def governed_session(
    *,
    budget: AbstractContextManager[Budget],
    monitor: AbstractContextManager[Monitor],
    transaction: Callable[[], AbstractContextManager[sqlite3.Connection]],
    session: AbstractContextManager[Session],
) -> Iterator[GovernedSession]:
    """Compose four managers into one.

        with governed_session(
            budget=team.child(1, "review"),
            monitor=monitor("review"),
            transaction=partial(transaction, database),
            session=session("review"),
        ) as review:
            review.ask("What does contextlib do?")

    The block is not one transaction: that would lock the database while the model answers. Each
    turn is saved as soon as it is answered, and stays saved if the block fails later.
    To pass in a budget or monitor that is open already, use `nullcontext(team)`.
    """
    with budget as opened_budget, monitor as opened_monitor, session as opened_session:
        with transaction() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS turn (session, prompt, answer)")
        yield GovernedSession(opened_budget, opened_monitor, transaction, opened_session)


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---

options: dict[str, Any] = {}  # of the session in demo 5: --live puts its model and price here


def stand_in(request: httpx2.Request) -> httpx2.Response:
    """Repeat the question, and bill one token for every four bytes."""
    asked = json.loads(request.content)
    answer = asked["messages"][-1]["content"][: 4 * asked["max_completion_tokens"]]
    size = len(json.dumps(asked["messages"], ensure_ascii=False).encode())
    usage = {"prompt_tokens": size // 4, "completion_tokens": len(answer.encode()) // 4}
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
    return httpx2.Response(200, json={"choices": [choice], "usage": usage})


def offline_client(while_answering: Callable[[], None] = lambda: None) -> openai.OpenAI:
    """The real client on an in-process transport, where the stand-in answers."""
    hooks = {"request": [lambda request: while_answering()]}
    http_client = httpx2.Client(transport=httpx2.MockTransport(stand_in), event_hooks=hooks)
    return openai.OpenAI(api_key="offline", http_client=http_client)


def live_client(while_answering: Callable[[], None]) -> openai.OpenAI:
    hooks = {"request": [lambda request: while_answering()]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks)
    return openai.OpenAI(http_client=http_client, timeout=60)


@contextmanager
def shown(label: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a manager, and draw its bracket."""
    with bracket(label), manager as value:
        yield value


@contextmanager
def layer(name: str, exited: list[str]) -> Iterator[None]:
    """Record the exit. The cleanup of `b` fails."""
    try:
        yield
    finally:
        exited.append(name)
        if name == "b":
            raise OSError


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
    """Three ways to nest, and the order in which they end

    One block with several managers is the usual choice. Nest blocks if something happens between
    two layers. Use an `ExitStack` if you know only at run time how many layers there are.
    All three exit the layers in reverse order. Here `work` raises ZeroDivisionError, and then the
    cleanup of `b` raises OSError.
    """
    show_code(nested, in_one_block, on_a_stack)
    question(_("Which layers are cleaned up, and which of the two errors propagates?"))
    for way in (nested, in_one_block, on_a_stack):
        exited: list[str] = []
        raised = first = "None"
        try:
            with trace() as run:
                way(*(layer(name, exited) for name in "abc"))
        except Exception as error:
            raised, first = type(error).__name__, type(error.__context__).__name__
        show_code(way, runs={_("one run"): run})
        result = _("`{way}`: exited {layers}; raised {raised}, with `__context__` {first}.")
        layers = ", ".join(exited)
        result = result.format(way=way.__name__, layers=layers, raised=raised, first=first)
        verdict(exited == ["c", "b", "a"], result)
    say(_("In `in_one_block`, swap `a` and `c`, and run demo 1 again."), "→ ")


PAGE = ("word " * 600)[:2967]  # with the 33 bytes around it, a request of 3,000 bytes


async def check_then_call(team: Budget, chat: Session, bills: Any) -> None:
    if sum(bills) < team.limit:
        await asyncio.to_thread(chat.ask, PAGE)
        bills.append(chat.cost)


async def reserve_then_call(team: Budget, chat: Session, bills: Any) -> None:
    with team.reserve(chat.worst_case(PAGE)) as reservation:
        await asyncio.to_thread(chat.ask, PAGE, reservation.settle)
        bills.append(chat.cost)


async def all_at_once(calls: list[Any]) -> None:
    """Run all calls. A BudgetExceededError does not stop the others."""
    await asyncio.gather(*calls, return_exceptions=True)


def demo_never_overspent() -> None:
    """Ten calls at once, and money for one

    The worst case of a call is bounded, not estimated: a request of 3,000 bytes has at most
    3,000 tokens. At $0.15 a million in and $0.60 out, and with at most 500 tokens out, it costs
    at most $0.00075. The limit is $0.001. `check_then_call` looks first and pays later;
    `reserve_then_call` sets the worst case aside first. (The stand-in bills 750 and 500 tokens:
    $0.0004125.)
    """
    show_code(check_then_call, reserve_then_call)
    question(_("Ten tasks start at once. How many calls does each version send?"))
    for call in (check_then_call, reserve_then_call):
        bills: list[Decimal] = []
        with ExitStack() as stack:
            team = stack.enter_context(budget(Decimal("0.001"), "team"))
            client = stack.enter_context(offline_client())
            chats = [stack.enter_context(session(f"{n}", client=client)) for n in range(10)]
            with trace() as run:
                asyncio.run(all_at_once([call(team, chat, bills) for chat in chats]))
        show_code(call, runs={_("ten tasks"): run})
        spent = sum(bills, Decimal(0))
        share = f"{spent / team.limit:.0%}"
        result = _("`{call}`: {sent} of 10 sent; spent {spent}, {share} of the limit.")
        amounts = {"sent": len(bills), "spent": format_usd(spent), "share": share}
        result = result.format(call=call.__name__, **amounts)
        verdict(spent <= team.limit, result)
    advice = _(
        "In `check_then_call`, put `{line}` above the `await`, instead of the last line. Run demo "
        "2 again: why two calls?"
    )
    say(advice.format(line="bills.append(chat.worst_case(PAGE))"), "→ ")


def slow_call(bill: list[int]) -> int:
    bill.append(15)
    raise TimeoutError


def give_back(step: Budget, bill: list[int]) -> None:
    with step.reserve(20) as reservation:
        try:
            reservation.settle(slow_call(bill))
        except TimeoutError:
            reservation.settle(0)
            raise


def keep_open(step: Budget, bill: list[int]) -> None:
    with step.reserve(20) as reservation:
        reservation.settle(slow_call(bill))


def demo_nested_budgets() -> None:
    """Budgets inside budgets, and calls that time out

    A reservation must fit on its own level and on every level above it. A caller that times out
    does not know the outcome: here the provider bills $15, but the answer comes too late. So if
    the outcome is unknown, the whole worst case counts as spent. Settle at 0 only a call that
    was not billed: never sent, or refused with an HTTP error that providers do not bill.
    """
    show_code(slow_call, give_back, keep_open)
    question(
        _("Six calls are tried. Each call that is sent times out. How many are sent? Who refuses?")
    )
    for call in (give_back, keep_open):
        bill: list[int] = []
        runs = []
        with (
            shown("budget(100, 'team')", budget(100, "team")) as team,
            shown("team.child(40, 'agent')", team.child(40, "agent")) as agent,
            shown("agent.child(60, 'step')", agent.child(60, "step")) as step,
        ):
            for n in range(1, 7):
                outcome = _("settled")
                try:
                    with trace() as run:
                        call(step, bill)
                except TimeoutError as error:
                    outcome = type(error).__name__
                except BudgetExceededError as error:
                    outcome = _("{name} refuses").format(name=error.name)
                say(f"{n}: {outcome}")
                runs.append(run)
            for level in (team, agent, step):
                spent, limit = format_usd(level.spent), format_usd(level.limit)
                amounts = _("{name}: {spent} of {limit} spent")
                say(amounts.format(name=level.name, spent=spent, limit=limit))
        result = _(
            "`{call}`: {sent} sent; billed by the provider: ${billed}, by the budget: {spent}."
        )
        sent, billed, spent = len(bill), sum(bill), format_usd(step.spent)
        result = result.format(call=call.__name__, sent=sent, billed=billed, spent=spent)
        verdict(billed <= step.spent, result)
    show_code(keep_open, Budget.reserve, runs={_("the first call"): runs[0]})
    advice = _("In `slow_call`, replace `{old}` with `{new}`, and run demo 3 again.")
    say(advice.format(old="raise TimeoutError", new="return 15"), "→ ")


calls_ms: list[int] = []


def clock() -> float:
    """Return the seconds that all calls took so far: a clock that only they move."""
    return sum(calls_ms) / 1000


def slow_model(ms: int) -> None:
    calls_ms.append(ms)
    if ms == 100:
        raise TimeoutError


def by_hand(seconds: list[float], ms: int) -> None:
    started = clock()
    slow_model(ms)
    seconds.append(clock() - started)


def measured(watched: Monitor, ms: int) -> None:
    with watched.measure("ask"):
        slow_model(ms)


def demo_monitor() -> None:
    """A monitor over twenty calls

    Eighteen calls take 1, 2, 3 and so on up to 18 ms; the last two time out after 100 ms. (A fake
    clock plays the time.) p50 is the 10th of twenty durations in order, p95 the 19th: half of the
    calls, and 95 of 100, are not slower. The mean would hide the two: it is 18.6 ms.
    """
    show_code(by_hand, measured)
    question(_("The calls that fail are the slow ones. Which version measures them?"))
    seconds: list[float] = []
    with monitor("team", clock) as team:
        for call in (partial(by_hand, seconds), partial(measured, team)):
            for ms in (*range(1, 19), 100, 100):
                with suppress(TimeoutError), trace() as run:
                    call(ms)
            pieces = [by_hand] if call.func is by_hand else [measured, Monitor.measure]
            show_code(*pieces, runs={_("the last call"): run})
            found = team.report().get("ask") or summary(seconds, 0)
            table = Table(_("calls"), _("errors"), "p50", "p95", _("longest"))
            times = (f"{1000 * each:.0f} ms" for each in (found.p50, found.p95, found.maximum))
            table.add_row(str(found.calls), str(found.errors), *times)
            console.print(table)
            result = _("`{call}` measures {n} of 20 calls.")
            verdict(found.calls == 20, result.format(call=call.func.__name__, n=found.calls))
    say(_("In `by_hand`, add `try` and `finally`, and run demo 4 again."), "→ ")


def ask_in_transaction(self: GovernedSession, prompt: str) -> str:
    worst_case = self.session.worst_case(prompt)
    with self.transaction() as connection:
        with self.budget.reserve(worst_case) as reservation:
            with self.monitor.measure("ask"):
                answer = self.session.ask(prompt, reservation.settle)
        turn = (self.session.name, prompt, answer)
        connection.execute("INSERT INTO turn VALUES (?, ?, ?)", turn)
    return answer


def save_turn(database: sqlite3.Connection) -> None:
    """Save a turn of the second conversation."""
    outcome = _("saved")
    try:
        with transaction(database):
            database.execute("INSERT INTO turn VALUES ('second', 'And why?', 'Because.')")
    except sqlite3.OperationalError as error:
        outcome = str(error)
    say(_("the second conversation: {outcome}").format(outcome=outcome), style="bold")


def converse(ask: Callable[[GovernedSession, str], str], path: Path) -> list[str]:
    """Ask once, then let a tool fail. Return the sessions whose turns are in the database."""
    with ExitStack() as stack:
        database = stack.enter_context(closing(sqlite3.connect(path)))
        other = stack.enter_context(closing(sqlite3.connect(path, timeout=0)))
        make_client = live_client if options else offline_client
        client = stack.enter_context(make_client(partial(save_turn, other)))
        governed = governed_session(
            budget=shown("budget(1, 'first')", budget(1, "first")),
            monitor=shown("monitor('first')", monitor("first")),
            transaction=lambda: shown("transaction(database)", transaction(database)),
            session=shown("session('first')", session("first", client=client, **options)),
        )
        with suppress(BudgetExceededError, ConnectionError), governed as review:
            ask(review, "What does a context manager do?")
            raise ConnectionError("the tool does not answer")
        return [row[0] for row in database.execute("SELECT session FROM turn")]


def demo_governed_session() -> None:
    """The four as one, and two layers that swap places

    `governed_session` composes a budget, a monitor, a transaction and a session. Their order
    matters: a transaction holds the write lock of the database, and a model may take a minute to
    answer. `ask_in_transaction` calls the model inside the transaction, `GovernedSession.ask`
    before it. (Its empty transaction checks that the turn can be saved. The very first transaction
    of a run creates the table.) Each run asks once, then a tool fails.
    """
    show_code(ask_in_transaction, GovernedSession.ask)
    question(_("While the model answers, a second conversation saves a turn. Does that work?"))
    for ask in (ask_in_transaction, GovernedSession.ask):
        with tempfile.TemporaryDirectory() as folder:
            turns = converse(ask, Path(folder, "turns.db"))
        result = _("`{ask}`: turns in the file: {turns}.")
        verdict(len(turns) == 2, result.format(ask=ask.__qualname__, turns=", ".join(turns)))
    advice = _("In `converse`, open `budget(0, 'first')`, and run demo 5 again: what is skipped?")
    say(advice, "→ ")


DEMOS = (
    demo_three_ways,
    demo_never_overspent,
    demo_nested_budgets,
    demo_monitor,
    demo_governed_session,
)
KEY_POINTS = """\
* Layers end in reverse order, and a cleanup that fails does not stop the others.
* Reserve the worst case before the call, and settle the actual cost after it.
* If the outcome is unknown, the worst case is spent. Give back only what was never billed.
* Measure calls that fail, too: they are often the slow ones.
* Never hold a lock or a transaction while you wait for a model."""


def hide_key(text: str) -> str:
    """Take the API key out of a text, unless it is a word such as "any"."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) > 12 else text


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With --live, exit with one line if the model does not answer."""
    live = _("ask a real model: OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL")
    parser.add_argument("--live", action="store_true", help=live)
    arguments = parser.parse_args()
    if arguments.live:
        if not os.environ.get("OPENAI_API_KEY"):
            parser.error(_("--live needs OPENAI_API_KEY; a local server takes any value"))
        options["model"] = os.environ.get("OPENAI_MODEL") or "gpt-4o-mini"
        options["price"] = partial(list_price, "gpt-4o-mini")  # good enough for a demo
    try:
        yield arguments
    except (openai.OpenAIError, ReplyError, httpx2.InvalidURL, UnicodeEncodeError) as error:
        if not options:
            raise
        problem = hide_key(" ".join(str(error).split()))
        parser.exit(1, f"{parser.prog}: the model did not answer: {problem}\n")
    finally:
        options.clear()


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[str] = []
stepping = False  # --step
OPENING, CLOSING = r"\"'(\[{（「《“‘", r"\"')\]},.;:!?%，。、；：！？）」》”’…—"
WIDE = r"\u2e80-\uffe6"
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        lines.append("")
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


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
    """With --step, wait for Enter until the input ends."""
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


@contextmanager
def bracket(label: str) -> Iterator[None]:
    """Draw where a block begins and how it ends."""
    say(label, "┌ ")
    open_brackets.append(label)
    ending = _("ended")
    try:
        yield
    except BaseException as error:
        ending = _("left by {error}").format(error=type(error).__name__)
        raise
    finally:
        open_brackets.pop()
        say(ending, "└ ")


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
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines)))
    if piece.__doc__:  # keep its line breaks, for the numbers
        code = re.sub(r'(?s)""".*?"""', lambda found: "\n" * found[0].count("\n"), code, count=1)
    return [(n, line) for n, line in enumerate(code.splitlines(), first) if line.strip()]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *runs, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    rows: list[tuple[int, str]] = []
    for piece in pieces:
        rows += [*source(piece), (0, "")]  # and an empty line
    shown = {number for number, _line in rows}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for number, line in rows:
        code = Syntax(line, "python", theme="ansi_dark", word_wrap=True)
        table.add_row(code, *(places(number, path) for path in paths))
    console.print(table)


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(wrap(_(__doc__ or ""), console.width))
    numbers = range(1, len(DEMOS) + 1)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    try:
        with command_line(parser) as options:
            if not set(options.demo) <= set(numbers):
                parser.error(f"choose demos from 1 to {len(DEMOS)}")
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
