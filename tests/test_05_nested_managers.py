"""Chapter 05: budgets that are ledgers, monitors, sessions, and the four as one."""

from __future__ import annotations

import asyncio
import copy
import decimal
import dis
import gc
import itertools
import json
import pickle
import random
import re
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject, Way

chapter: Any = load_chapter(5)
Capsys = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Database = sqlite3.Connection
PROMPT = "What does contextlib do?"


def ways(*unfit: str) -> pytest.MarkDecorator:
    """Every way out, without those that this manager cannot go (it has no fault, for one)."""
    fit = {way.__name__: way for way in SYNC_WAYS if way.__name__ not in unfit}
    return pytest.mark.parametrize("way", fit.values(), ids=fit)


def amounts(budget: Any) -> tuple[Any, Any]:
    return budget.spent, budget.reserved


# --- What an amount is ---


NO_AMOUNTS = ["-0.01", "NaN", "sNaN", "Infinity", "-Infinity", "1000000", "999999.9999999999999"]


@pytest.mark.parametrize("wrong", [0.25, True, "0.25", None, 1 + 2j, *map(Decimal, NO_AMOUNTS)])
def test_an_amount_is_exact_and_from_0_to_below_a_million(wrong: Any) -> None:
    error: type[Exception] = TypeError
    advice = r"pass an exact one, Decimal\('0.25'\)"
    if isinstance(wrong, Decimal):
        error, advice = ValueError, "pass dollars from 0 to below a million"
    with chapter.budget(1) as budget, budget.reserve(1) as reservation:
        for refused in (chapter.budget, partial(budget.child, name="child"), budget.reserve):
            with pytest.raises(error, match=advice):
                refused(wrong).__enter__()
        with pytest.raises(error, match="the actual cost is"):
            reservation.settle(wrong)
        assert amounts(budget) == (0, 1)


def test_what_is_finer_than_a_picodollar_is_rounded_up() -> None:
    assert chapter.format_usd(chapter.money(Decimal("-0"), "it")) == "$0"
    with chapter.budget(1) as budget:
        for _each in range(3):
            with budget.reserve(Decimal(1) / 3) as reservation:
                reservation.settle(Decimal("0.0000000000001"))
        assert amounts(budget) == (Decimal("0.000000000003"), 0)


@pytest.mark.parametrize("precision", [1, 2, 4, 9, 28])
def test_sums_do_not_depend_on_the_decimal_precision(precision: int) -> None:
    with decimal.localcontext(prec=precision), chapter.offline_client() as client:
        with chapter.budget(100) as budget, chapter.session("s", client=client) as chat:
            for _each in range(40):
                with budget.reserve(Decimal("1.23456789")) as reservation:
                    assert budget.reserved == Decimal("1.23456789")
                    reservation.settle(Decimal("1.23456789"))
            with budget.reserve(Decimal("0.123456789")):
                assert budget.remaining == Decimal("50.493827611")
            worst_case, asked = chat.worst_case(PROMPT), chat.ask(PROMPT)
    assert budget.spent == Decimal("49.506172389")
    assert worst_case == Decimal("0.00030855")  # 57 bytes, 500 tokens
    assert (asked, chat.cost) == (PROMPT, Decimal("0.0000057"))  # 14 and 6 tokens


# --- Reserve before, settle after ---


def test_settling_frees_the_rest_of_a_reservation_at_once() -> None:
    with chapter.budget(Decimal("1.00"), "team") as budget:
        with budget.reserve(Decimal("0.40")) as reservation:
            assert amounts(budget) == (0, Decimal("0.40"))
            assert budget.remaining == Decimal("0.60")
            reservation.settle(Decimal("0.15"))
            assert amounts(budget) == (Decimal("0.15"), 0)
        assert (reservation.worst_case, reservation.actual) == (Decimal("0.40"), Decimal("0.15"))
        with budget.reserve(Decimal("0.85")), budget.reserve(0):  # all of the rest, and no more
            with pytest.raises(chapter.BudgetExceededError), budget.reserve(Decimal("1e-12")):
                pass
    assert (budget.name, budget.limit, budget.is_open) == ("team", 1, False)


def test_a_refusal_names_the_level_and_its_money() -> None:
    with chapter.budget(1, "team") as team, team.child(Decimal("0.50"), "agent") as agent:
        with agent.reserve(Decimal("0.30")), pytest.raises(chapter.BudgetExceededError) as caught:
            agent.reserve(Decimal("0.25")).__enter__()
    expected = (
        "budget 'agent' has $0.2 left of $0.5, but $0.25 is needed: wait for other calls, ask for "
        "a shorter answer, or raise the limit"
    )
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (str(error), error.name) == (expected, "agent")


def test_a_reservation_counts_on_every_level_or_on_none() -> None:
    with chapter.budget(5, "team") as team, team.child(9, "agent") as agent:
        with agent.child(9, "step") as step:
            with step.reserve(2) as reservation:
                assert [amounts(level) for level in (team, agent, step)] == [(0, 2)] * 3
                reservation.settle(1)
            with pytest.raises(chapter.BudgetExceededError) as caught, step.reserve(5):
                pass
            assert caught.value.name == "team"
            assert (step.remaining, team.remaining) == (8, 4)  # a cap: nothing is set aside
        assert [amounts(level) for level in (team, agent, step)] == [(1, 0)] * 3


@pytest.mark.parametrize(
    "error", [None, ValueError, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_an_unknown_outcome_costs_the_worst_case(error: type[BaseException] | None) -> None:
    with chapter.budget(2, "team") as team, team.child(2, "agent") as agent:
        with suppress(error or ValueError), agent.reserve(Decimal("0.4")) as reservation:
            if error:
                raise error
        assert [amounts(level) for level in (team, agent)] == [(Decimal("0.4"), 0)] * 2
        assert reservation.actual == Decimal("0.4")


def test_a_cost_above_the_worst_case_counts_in_full() -> None:
    with chapter.budget(1, "team") as team, team.child(1, "agent") as agent:
        with agent.reserve(Decimal("0.9")) as reservation:
            reservation.settle(Decimal("1.1"))
        for level in (team, agent):
            assert amounts(level) == (Decimal("1.1"), 0)
            assert level.remaining == Decimal("-0.1")
        with pytest.raises(chapter.BudgetExceededError, match=r"has \$-0.1 left"):
            agent.reserve(0).__enter__()


def test_a_reservation_is_settled_once() -> None:
    with chapter.budget(3) as budget:
        with budget.reserve(1) as reservation:
            reservation.settle(Decimal("0.5"))
            with pytest.raises(RuntimeError, match=r"this reservation is settled at \$0.5"):
                reservation.settle(Decimal("0.5"))
        with budget.reserve(1) as forgotten:
            pass
        with pytest.raises(RuntimeError, match=r"settled at \$1"):
            forgotten.settle(0)
        assert amounts(budget) == (Decimal("1.5"), 0)


def test_a_budget_takes_no_reservation_once_a_level_is_closed() -> None:
    with ExitStack() as late:
        with chapter.budget(1, "team") as team:
            orphan = late.enter_context(team.child(1, "orphan"))
            with team.child(1, "agent") as agent:
                pass
            with pytest.raises(RuntimeError, match="Budget 'agent' is closed: use it inside"):
                agent.reserve(1).__enter__()
            reservation = late.enter_context(team.reserve(1))
        with pytest.raises(RuntimeError, match="Budget 'team' is closed"), orphan.reserve(0):
            pass
        reservation.settle(Decimal("0.75"))  # what was reserved in time can still settle
    assert amounts(team) == (Decimal("0.75"), 0)


# --- Steps that nothing can divide: threads, signals, the garbage collector ---


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns every few bytecodes: a lock that is missing shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_two_threads_cannot_reserve_the_same_money(monkeypatch: Patch) -> None:
    """Each pauses after its check until the other one has checked, too, or cannot."""
    both_checked = threading.Barrier(2)
    remaining = chapter.Budget.remaining

    def pausing(budget: Any) -> Any:
        found = remaining.fget(budget)
        with suppress(threading.BrokenBarrierError):
            both_checked.wait(0.1)
        return found

    def call(budget: Any) -> None:
        with suppress(chapter.BudgetExceededError), budget.reserve(1):
            pass

    with chapter.budget(1) as team, team.child(1, "a") as first, team.child(1, "b") as second:
        monkeypatch.setattr(chapter.Budget, "remaining", property(pausing))
        with ThreadPoolExecutor(2) as pool:
            for each in [pool.submit(call, first), pool.submit(call, second)]:
                each.result()
        assert sorted([first.spent, second.spent]) == [0, 1]


INTERRUPTIBLE = ("RESUME", "CALL", "JUMP_BACKWARD", "SEND")  # where CPython looks for signals


class InterruptAt:
    """Raise SIGINT at the n-th place at which CPython would act on a signal, in some files."""

    def __init__(self, nth: int) -> None:
        self.nth, self.seen = nth, 0
        self.last: dict[int, str] = {}
        self.files = (chapter.__file__, chapter.contextmanager.__code__.co_filename)

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = True
        if event == "exception":
            self.last[id(frame)] = ""  # a call that raised did not look for signals
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            before = self.last.get(id(frame), "RESUME")
            self.last[id(frame)] = name
            if before.startswith(INTERRUPTIBLE):
                self.seen += 1
                if self.seen == self.nth + 1:
                    raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> InterruptAt:
        sys._getframe().f_trace_opcodes = True  # subtle: 3.12 wants one before settrace
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)


def test_ctrl_c_at_any_bytecode_books_a_call_once() -> None:
    """Once at its cost, at its worst case if that is unknown, or at 0 if it never began."""
    outcomes = []
    for nth in itertools.count():
        with chapter.budget(10, "team") as team, team.child(10, "agent") as agent:
            with suppress(KeyboardInterrupt), InterruptAt(nth) as interrupt:
                with agent.reserve(4) as reservation:
                    reservation.settle(3)
            del interrupt.last
            assert amounts(team) == amounts(agent) == (team.spent, 0)
            with team.reserve(1):  # and the lock is free
                pass
        outcomes.append(team.spent - 1)
        if interrupt.seen <= nth:
            break
    assert set(outcomes) == {0, 3, 4}
    assert len(outcomes) > 40


def test_2000_real_signals_lose_no_call_and_book_none_twice() -> None:
    interrupted = 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    chance = random.Random(5)
    try:
        with chapter.budget(999_999) as team, team.child(999_999, "agent") as agent:
            for _each in range(2000):
                known = None
                spent = team.spent
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 60e-6))
                    with agent.reserve(4) as reservation:
                        reservation.settle(3)
                        known = 3
                    while True:
                        pass
                except KeyboardInterrupt:
                    interrupted += 1
                booked = team.spent - spent
                assert booked == known if known else booked in (0, 3, 4)
                assert (agent.spent, team.reserved, agent.reserved) == (team.spent, 0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 2000
    assert 0 < team.spent < 6000


class Abandoned:
    """A generator that is suspended in a block, in a cycle: only the collector closes it."""

    def __init__(self, manager: Any) -> None:
        self.suspended = self.run(manager)
        next(self.suspended)

    def run(self, manager: Any) -> Iterator[None]:
        with manager:
            yield


def test_the_garbage_collector_may_end_a_block_inside_another() -> None:
    """Neither a deadlock, nor a crash (Python 3.11's decimal), nor a lost sum."""
    thresholds = gc.get_threshold()
    with chapter.budget(999_999) as team, chapter.monitor("m") as monitor:
        gc.set_threshold(1)
        try:
            for _each in range(300):
                Abandoned(team.reserve(1))
                Abandoned(monitor.measure("ask"))
                with team.reserve(3) as reservation, monitor.measure("ask"):
                    reservation.settle(2)
                assert team.spent >= 0
                monitor.report()
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        assert amounts(team) == (900, 0)
        assert monitor.report()["ask"][:2] == (600, 300)


@pytest.mark.usefixtures("frequent_switches")
def test_fifty_threads_never_overspend_on_any_level() -> None:
    """Each call is settled, forgotten, or left by an error before or after that, by chance."""
    paid: list[Decimal] = []

    def storm(seed: int) -> None:
        chance = random.Random(seed)
        start.wait()
        for _each in range(10):
            outcome, worst_case = chance.random(), Decimal(chance.randrange(1, 40)) / 100
            cost = worst_case * chance.randrange(101) / 100 if outcome < 0.7 else worst_case
            with suppress(ValueError, chapter.BudgetExceededError):
                with chance.choice(agents).reserve(worst_case) as reservation:
                    paid.append(cost)
                    if outcome < 0.7:
                        reservation.settle(cost)
                    if not 0.2 < outcome < 0.8:
                        raise ValueError
            assert min(level.remaining for level in levels) >= 0

    with ExitStack() as stack, ThreadPoolExecutor(50) as pool:
        team = stack.enter_context(chapter.budget(10, "team"))
        agents = [stack.enter_context(team.child(6, f"agent {n}")) for n in range(3)]
        levels = [team, *agents]
        start = threading.Barrier(50, timeout=10)
        for each in [pool.submit(storm, seed) for seed in range(50)]:
            each.result()
        assert team.spent == sum(paid) == sum(agent.spent for agent in agents)
        assert [level.reserved for level in levels] == [0] * 4
    assert len(paid) < 500  # some were refused


# --- Monitors ---


def ticks(*durations: float) -> Any:
    """A clock that is read twice for each measurement, which then takes the next duration."""
    return iter([time for each in durations for time in (100.0, 100.0 + each)]).__next__


def test_a_report_has_calls_errors_total_and_percentiles() -> None:
    durations = [float(n) for n in range(1, 21)]
    random.Random(1).shuffle(durations)
    with chapter.monitor("m", clock=ticks(*durations, 7.0)) as monitor:
        for _each in durations:
            with monitor.measure("ask"):
                pass
        with monitor.measure("save"):
            pass
    report = monitor.report()
    assert report["ask"] == (20, 0, 210.0, 10.0, 19.0, 20.0)
    assert report["ask"]._fields == ("calls", "errors", "total", "p50", "p95", "maximum")
    assert report["save"] == (1, 0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_monitor_reports_calls_and_errors_to_its_parents(error: type[BaseException]) -> None:
    with chapter.monitor("run", clock=ticks(1.0, 2.0, 4.0)) as run, run.child("agent") as agent:
        with agent.child("step") as step:
            with step.measure("ask"):
                pass
            with pytest.raises(error), agent.measure("ask"):
                raise error
            with run.measure("ask"):
                pass
            totals = [monitor.report()["ask"][:3] for monitor in (run, agent, step)]
    assert totals == [(3, 1, 7.0), (2, 1, 3.0), (1, 0, 1.0)]


# --- Sessions ---


def test_the_worst_case_bounds_the_input_by_its_bytes() -> None:
    """A token of a byte-level tokenizer is at least one byte, in any language."""
    with chapter.offline_client() as client, chapter.session("s", client=client) as chat:
        for prompt in ("hello", "中文", "🙂", '"' * 9, chapter.PAGE):
            of_input = chat.worst_case(prompt) - Decimal("0.0003")
            # The chat rule adds 7 tokens to the content's; templates add a few more.
            assert of_input >= (len(prompt.encode()) + 7 + 20) * Decimal("0.15e-6")
        assert chat.worst_case(chapter.PAGE) == Decimal("0.00075")
        before = chat.worst_case(prompt)
        chat.ask(prompt)
        assert chat.worst_case(prompt) > 2 * (before - Decimal("0.0003"))  # the history, too


def test_a_session_closes_only_the_client_that_it_made(monkeypatch: Patch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1/")
    with chapter.session("own") as chat:
        assert str(chat._client.base_url) == "http://localhost:11434/v1/"
    assert chat._client.is_closed()
    with chapter.offline_client() as client:
        with chapter.session("guest", client=client) as chat:
            chat.ask("hello")
        assert not client.is_closed()
        with pytest.raises(chapter.SessionClosedError, match="Session 'guest' is closed"):
            chat.ask("hello")
        assert chat.cost < chat.worst_case("hello")  # nothing was sent, nothing is spent


Reply = httpx2.Response | Exception | dict[str, Any]


def answering(*replies: Reply) -> tuple[openai.OpenAI, list[Any]]:
    """A client whose server gives these replies, in turn; and what it was asked."""
    left, asked = list(replies), []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return httpx2.Response(200, json=reply) if isinstance(reply, dict) else reply

    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(api_key="test", http_client=httpx2.Client(transport=transport)), asked


USAGE = {"prompt_tokens": 1234, "completion_tokens": 567, "total_tokens": 1801}
COST = Decimal("0.0005253")  # 1234 at $0.15 a million, 567 at $0.60


def completion(usage: Any = USAGE, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi", **message}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


def page(text: str, kind: str = "application/json", status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, content=text, headers={"content-type": kind})


def test_cached_tokens_are_paid_at_their_own_price() -> None:
    cached = {**USAGE, "prompt_tokens_details": {"cached_tokens": 1000}}
    client, asked = answering(completion(cached))
    with client, chapter.session("s", client=client, max_output_tokens=600) as chat:
        chat.ask("hello")
    assert chat.cost == Decimal("0.0004503")
    assert asked[0]["max_completion_tokens"] == 600


def usage(prompt: Any, answer: Any, cached: Any = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": details}


UNUSABLE = [None, {}, "many", usage(None, 5), usage(0, 5), usage(5, -1), usage(5, 5, 6)]
UNUSABLE += [usage(float("inf"), 5), usage(5.5, 5), usage(10**30, 5), usage(True, 5)]


@pytest.mark.parametrize("reported", UNUSABLE)
def test_a_reply_without_a_usable_usage_costs_the_worst_case(reported: Any) -> None:
    client, _asked = answering(page(json.dumps(completion(reported))))
    with client, chapter.budget(1) as budget, chapter.session("s", client=client) as chat:
        worst_case = chat.worst_case("hello")
        with budget.reserve(worst_case) as reservation:
            assert chat.ask("hello", reservation.settle) == "hi"
    assert chat.cost == budget.spent == worst_case > 0


STATUSES = (400, 401, 404, 422, 429, 500, 503, 529)
NOT_BILLED: list[Any] = [page('{"error": {"message": "no"}}', status=each) for each in STATUSES]
NOT_BILLED += [page("two\nlines", "text/plain", 400), httpx2.ConnectError("refused")]
NOT_BILLED += [httpx2.ConnectTimeout("no route"), httpx2.PoolTimeout("busy")]
UNKNOWN: list[Any] = [page("{}", status=each) for each in (304, 408, 499, 502, 504, 520, 524, 598)]
UNKNOWN += [httpx2.ReadTimeout("late"), httpx2.ReadError("reset")]
UNKNOWN += [httpx2.RemoteProtocolError("half a reply")]
FAILURES = [(each, False) for each in NOT_BILLED] + [(each, True) for each in UNKNOWN]


@pytest.mark.parametrize(("failure", "may_be_billed"), FAILURES, ids=str)
def test_only_a_call_that_providers_do_not_bill_is_free(
    failure: Any, may_be_billed: bool, database: Database
) -> None:
    client, asked = answering(failure, completion())
    with client, governed(database, client) as review:
        worst_case = review.session.worst_case(PROMPT)
        with pytest.raises(openai.OpenAIError):
            review.ask(PROMPT)
        expected = worst_case if may_be_billed else 0
        assert (review.session.cost, *amounts(review.budget)) == (expected, expected, 0)
        assert len(asked) == 1  # not tried again behind the budget's back
        review.ask(PROMPT)
    assert review.budget.spent == expected + COST
    assert review.monitor.report()["ask"][:2] == (2, 1)
    assert turns(database) == [("review", PROMPT, "hi")]


def test_twenty_timeouts_are_not_free() -> None:
    """The server takes each call, but its answer comes too late for a client that waits 20 ms."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=20)) as server:
        url, refused, billed = f"http://127.0.0.1:{server.getsockname()[1]}", 0, 0
        with openai.OpenAI(api_key="k", base_url=url, timeout=0.02) as client:
            with chapter.session("s", client=client) as chat:
                worst_case = chat.worst_case(PROMPT)
                with chapter.budget(9 * worst_case) as budget:
                    for _each in range(20):
                        try:
                            with budget.reserve(worst_case) as reservation:
                                chat.ask(PROMPT, reservation.settle)
                        except openai.APITimeoutError:
                            pass
                        except chapter.BudgetExceededError:
                            refused += 1
        server.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                with server.accept()[0] as connection:
                    billed += len(connection.recv(1))
    assert (billed, refused, budget.spent) == (9, 11, 9 * worst_case)


@pytest.mark.asyncio
@pytest.mark.parametrize("owned", [True, False])
async def test_a_turn_that_outlives_a_timeout_and_its_block_is_paid(
    owned: bool, monkeypatch: Patch
) -> None:
    """`asyncio.timeout` abandons the thread, and the block does not wait for it: it goes on."""
    began, release = threading.Event(), threading.Event()

    def answer() -> None:
        began.set()
        assert release.wait(10)

    costs: list[Decimal] = []
    with chapter.offline_client(answer) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(openai, "OpenAI", lambda: client)
        with chapter.session("s", client=None if owned else client) as chat:
            turn = pool.submit(chat.ask, PROMPT, costs.append)
            assert began.wait(10)
            with chapter.budget(1) as budget:
                with pytest.raises(TimeoutError), budget.reserve(chat.worst_case(PROMPT)):
                    async with asyncio.timeout(0):
                        await asyncio.wrap_future(turn)
                assert amounts(budget) == (chat.worst_case(PROMPT), 0)
            with pytest.raises(RuntimeError, match="session 's' is in a turn: it takes one"):
                chat.ask(PROMPT)
        assert not client.is_closed()
        release.set()
        with pytest.raises(chapter.SessionClosedError):
            turn.result()
        assert client.is_closed() is owned
    assert chat.messages == []
    assert costs == [chat.cost] != [0]


TOOL: Any = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WHOLE: list[Any] = [({"content": "hi"}, "hi"), ({"content": ""}, "")]
WHOLE += [({"content": None, "refusal": "I won't"}, "I won't")]
WHOLE += [({"content": None, "tool_calls": [TOOL]}, "")]


@pytest.mark.parametrize(("message", "answer"), WHOLE)
def test_a_whole_answer_says_something(message: dict[str, Any], answer: str) -> None:
    client, asked = answering(completion(**message), completion())
    with client, chapter.session("s", client=client) as chat:
        assert chat.ask(PROMPT) == answer
        said = {key: value for key, value in message.items() if value is not None}
        assert chat.messages[1:] == [{"role": "assistant", **said}]
        chat.ask(PROMPT)
        assert asked[1]["messages"][:2] == chat.messages[:2]


JSON_TEXTS = ("", "{", "null", "[]", "3", '"x"', "\xff", "{}", "1" * 5000, "[" * 100_000)
BROKEN: list[Any] = [page("<html>Sign in", "text/html"), *map(page, JSON_TEXTS)]
BROKEN += [{"error": {"message": "Sign in"}}, {**completion(), "choices": []}]
BROKEN += [completion(finish=None), completion(finish=""), completion(content=None)]
BROKEN += [completion(content=5), completion(content=["a"]), completion(tool_calls="f")]
BROKEN += [completion(content=None, tool_calls=calls) for calls in ([], 5, [None])]
NO_MESSAGE = {"finish_reason": "stop", "message": None}
BROKEN += [{**completion(), "choices": [choice]} for choice in (None, NO_MESSAGE)]
BROKEN += [page(json.dumps(completion(content="\ud800")))]  # not UTF-8


@pytest.mark.parametrize("reply", BROKEN, ids=range(len(BROKEN)))
def test_what_is_not_a_whole_answer_is_paid_but_not_recorded(reply: Any) -> None:
    text = reply.text if isinstance(reply, httpx2.Response) else str(reply)
    client, _asked = answering(reply, completion())
    costs: list[Decimal] = []
    with client, chapter.session("s", client=client) as chat:
        with pytest.raises(chapter.ReplyError, match="Sign in" if "Sign in" in text else "not"):
            chat.ask(PROMPT, costs.append)
        assert chat.messages == []
        assert chat.cost == (COST if costs else chat.worst_case(PROMPT))
        assert bool(costs) is ("usage" in text)
        assert chat.ask(PROMPT) == "hi"


@pytest.mark.parametrize("wrong", [lambda: 0.5, lambda: 1 // 0])
def test_a_price_that_fails_loses_no_reply(wrong: Any) -> None:
    price = lambda read, wrote, cached: wrong() if wrote == 567 else Decimal(read) / 10_000  # noqa: E731
    client, _asked = answering(completion())
    with client, chapter.session("s", client=client, price=price) as chat:
        worst_case = chat.worst_case(PROMPT)
        assert (chat.ask(PROMPT), chat.cost) == ("hi", worst_case)


def test_an_unknown_price_says_what_to_pass() -> None:
    refused = "the price of 'llama3' is unknown: pass price=, a function of input"
    with pytest.raises(LookupError, match=refused), chapter.session("s", model="llama3"):
        pass
    with chapter.offline_client() as client:
        price = lambda read, wrote, cached: (Decimal(read) + wrote) / 1000  # noqa: E731
        with chapter.session("s", model="llama3", client=client, price=price) as chat:
            assert chat.worst_case(PROMPT) == Decimal("0.557")
            chat.ask(PROMPT)
        assert chat.cost == Decimal("0.020")
        with pytest.raises(TypeError, match=r"the price is 0\.5, a float"):
            chapter.session("s", client=client, price=lambda *counts: 0.5).__enter__()


# --- The four as one ---


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "turns.db", timeout=0)) as connection:
        yield connection


@pytest.fixture
def other(database: Database, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A second connection to the same file."""
    with closing(sqlite3.connect(tmp_path / "turns.db", timeout=0)) as connection:
        yield connection


def turns(database: Database) -> list[Any]:
    return database.execute("SELECT * FROM turn").fetchall()


def governed(database: Database, client: Any, **layers: Any) -> Any:
    layers = {
        "budget": chapter.budget(1, "review"),
        "monitor": chapter.monitor("review"),
        "transaction": partial(chapter.transaction, database),
        "session": chapter.session("review", client=client),
        **layers,
    }
    return chapter.governed_session(**layers)


def test_a_second_turn_at_once_is_refused_before_it_reserves(database: Database) -> None:
    def ask_again() -> None:
        with pytest.raises(RuntimeError, match="'review' is in a turn: it takes one"):
            review.ask("again")
        assert review.budget.reserved == review.session.worst_case(PROMPT)

    with chapter.offline_client(ask_again) as client, governed(database, client) as review:
        review.ask(PROMPT)
        assert amounts(review.budget) == (review.session.cost, 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_passes_every_layer_and_keeps_saved_turns(
    error: type[BaseException], database: Database
) -> None:
    with chapter.offline_client() as client:
        with pytest.raises(error), governed(database, client) as review:
            assert review.ask(PROMPT) == PROMPT
            assert not database.in_transaction
            with review.budget.reserve(Decimal("0.5")), review.monitor.measure("think"):
                raise error
    assert not any(each.is_open for each in (review.budget, review.monitor, review.session))
    report = review.monitor.report()
    assert (report["ask"][:2], report["think"][:2]) == ((1, 0), (1, 1))
    assert amounts(review.budget) == (review.session.cost + Decimal("0.5"), 0)
    assert turns(database) == [("review", PROMPT, PROMPT)]


def test_what_does_not_fit_is_neither_sent_measured_nor_saved(database: Database) -> None:
    client, asked = answering()
    with client, governed(database, client, budget=chapter.budget(Decimal("1e-4"))) as review:
        with pytest.raises(chapter.BudgetExceededError):
            review.ask(PROMPT)
    assert (asked, review.monitor.report(), turns(database)) == ([], {}, [])


@pytest.mark.parametrize("begun", ["database", "other"])
def test_a_turn_that_cannot_be_saved_is_neither_sent_nor_paid(
    begun: str, database: Database, other: Database
) -> None:
    """The transaction that is open is your own, or it locks others out."""
    client, asked = answering()
    with client, governed(database, client) as review:
        {"database": database, "other": other}[begun].execute("BEGIN IMMEDIATE")
        with pytest.raises(
            (RuntimeError, sqlite3.OperationalError), match=r"in a transaction|locked"
        ):
            review.ask(PROMPT)
        assert (asked, review.session.messages, review.monitor.report()) == ([], [], {})
        assert amounts(review.budget) == (0, 0)


def test_a_turn_that_cannot_be_saved_after_all_is_paid_and_in_messages(
    database: Database, other: Database
) -> None:
    begin = partial(other.execute, "BEGIN IMMEDIATE")
    with chapter.offline_client(begin) as client, governed(database, client) as review:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            review.ask(PROMPT)
        assert len(review.session.messages) == 2
        assert amounts(review.budget) == (review.session.cost, 0)


def test_a_governed_session_works_inside_what_is_open(database: Database) -> None:
    with chapter.budget(1, "team") as team, chapter.monitor("team") as meter:
        with chapter.offline_client() as client:
            for budget in (team.child(1, "first"), nullcontext(team)):
                layers = {"budget": budget, "monitor": meter.child("first")}
                with governed(database, client, **layers) as review:
                    review.ask(PROMPT)
        team.check_open()
        assert meter.report()["ask"].calls == 2
        assert team.spent == 2 * review.session.cost > 0
    assert len(turns(database)) == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`autocommit` came with Python 3.12")
def test_a_transaction_refuses_a_connection_without_autocommit() -> None:
    options: dict[str, Any] = {"autocommit": False}
    with closing(sqlite3.connect(":memory:", **options)) as connection:
        with pytest.raises(RuntimeError, match="in a transaction: commit it or roll it back"):
            chapter.transaction(connection).__enter__()


def test_a_commit_that_fails_is_rolled_back(database: Database) -> None:
    database.executescript("PRAGMA foreign_keys = ON; CREATE TABLE a (id INTEGER PRIMARY KEY);")
    database.execute("CREATE TABLE b (a REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), chapter.transaction(database):
        database.execute("INSERT INTO b VALUES (1)")
    assert not database.in_transaction
    assert database.execute("SELECT * FROM b").fetchall() == []


# --- The cleanup contract ---

FAULTS = ("set_up_fails", "clean_up_fails", "clean_up_fails_after_an_error")


@ways(*FAULTS)  # it has none
@pytest.mark.parametrize("kind", ["budget", "monitor"])
def test_budgets_and_monitors_keep_the_cleanup_contract(kind: str, way: Way) -> None:
    opened: list[Any] = []

    def use(scope: Any) -> None:
        opened.append(scope)
        with scope.reserve(1) if kind == "budget" else scope.measure("use"):
            pass

    with chapter.budget(1000) as team, chapter.monitor("m") as meter:
        make = partial(team.child, 1000, "child") if kind == "budget" else partial(meter.child, "m")
        leaks = lambda: [each.name for each in opened if each.is_open] or team.reserved  # noqa: E731
        way(Subject(open=make, leaks=leaks, use=use, closed_error=RuntimeError))


@ways("clean_up_fails", "clean_up_fails_after_an_error")
def test_reserve_keeps_the_cleanup_contract(way: Way) -> None:
    with chapter.budget(1000, "team") as team, team.child(1000, "agent") as agent:

        @contextmanager
        def exhausted() -> Iterator[None]:
            with team.reserve(team.remaining) as reservation:
                yield
                reservation.settle(0)

        leaks = lambda: [each.name for each in (team, agent) if each.reserved]  # noqa: E731
        use = lambda reservation: reservation.worst_case  # noqa: E731
        way(Subject(lambda: agent.reserve(1), leaks, use, setup_faults=[exhausted]))


@ways(*FAULTS)
def test_measure_keeps_the_cleanup_contract(way: Way) -> None:
    started: list[int] = []

    def clock() -> float:
        started.append(1)
        return 0.0

    with chapter.monitor("m", clock) as monitor:

        def leaks() -> object:
            return len(started) != 2 * sum(each.calls for each in monitor.report().values())

        way(Subject(open=lambda: monitor.measure("use"), leaks=leaks, use=lambda none: None))


@ways()
def test_session_keeps_the_cleanup_contract(way: Way, monkeypatch: Patch) -> None:
    real_client, real_close = openai.OpenAI, openai.OpenAI.close
    clients: list[openai.OpenAI] = []
    opened: list[Any] = []

    def make_client() -> openai.OpenAI:
        transport = httpx2.MockTransport(chapter.stand_in)
        clients.append(real_client(api_key="k", http_client=httpx2.Client(transport=transport)))
        return clients[-1]

    def fail(client: openai.OpenAI) -> None:
        real_close(client)
        raise OSError

    def use(chat: Any) -> None:
        opened.append(chat)
        chat.ask("hello")

    def leaks() -> list[str]:
        still_open = [repr(client) for client in clients if not client.is_closed()]
        return still_open + [each.name for each in opened if each.is_open]

    monkeypatch.setattr(openai, "OpenAI", make_client)
    set_up = partial(mock.patch.object, openai, "OpenAI", None)
    clean_up = partial(mock.patch.object, real_client, "close", fail)
    open_one, closed_error = partial(chapter.session, "s"), chapter.SessionClosedError
    way(Subject(open_one, leaks, use, closed_error, [set_up], [clean_up]))


@ways("nested", "concurrent")  # a connection has one transaction at a time, and one thread
def test_a_governed_session_keeps_the_cleanup_contract(
    way: Way, database: Database, other: Database
) -> None:
    opened: list[Any] = []
    real = chapter.Scope.opened

    @contextmanager
    def locked() -> Iterator[None]:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")

    @contextmanager
    def failing(scope: Any) -> Iterator[Any]:
        with real(scope):
            try:
                yield scope
            finally:
                raise OSError

    def use(review: Any) -> None:
        opened.append(review)
        review.ask("hello")

    def leaks() -> list[Any]:
        layers = [each for g in opened for each in (g.budget, g.monitor, g.session)]
        return [each for each in layers if each.is_open] + [True] * database.in_transaction

    with chapter.offline_client() as client:
        faults = [partial(mock.patch.object, chapter.Scope, "opened", failing)]
        open_one = partial(governed, database, client)
        way(Subject(open_one, leaks, use, RuntimeError, [locked], faults))


@ways("nested", "concurrent", *FAULTS)
def test_transaction_keeps_the_cleanup_contract(way: Way, database: Database) -> None:
    def use(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS t (n)")

    way(Subject(lambda: chapter.transaction(database), lambda: database.in_transaction, use))


# --- What the demos claim ---


def played(number: int, capsys: Capsys) -> tuple[str, list[str]]:
    """A demo's output, and the lines with which it says what holds and what does not."""
    chapter.play(number)
    output = capsys.readouterr().out
    return output, [line for line in output.splitlines() if line.startswith(("✓ ", "✗ "))]


def test_three_ways_of_nesting_exit_in_the_same_order(capsys: Capsys) -> None:
    output = " ".join(played(1, capsys)[0].split())
    outcome = "exited c, b, a; raised OSError, with `__context__` ZeroDivisionError."
    assert output.count(outcome) == output.count("✓ ") == 3


def test_ten_calls_at_once_overspend_unless_they_reserve(capsys: Capsys) -> None:
    output, verdicts = played(2, capsys)
    assert verdicts == [
        "✗ `check_then_call`: 10 of 10 sent; spent $0.004125, 412% of the limit.",
        "✓ `reserve_then_call`: 1 of 10 sent; spent $0.0004125, 41% of the limit.",
    ]
    checks, pays = (
        [int(place) for place in re.findall(code + r" +([\d ]+\d)", output)[0].split()]
        for code in (r"if sum\(bills\) < team.limit:", r"bills.append\(chat.cost\)")
    )
    assert len(checks) == len(pays) == 10
    assert max(checks) < min(pays)


def test_calls_that_time_out_are_free_only_in_the_broken_version(capsys: Capsys) -> None:
    output, verdicts = played(3, capsys)
    assert verdicts == [
        "✗ `give_back`: 6 sent; billed by the provider: $90, by the budget: $0.",
        "✓ `keep_open`: 2 sent; billed by the provider: $30, by the budget: $40.",
    ]
    assert output.count("agent refuses") == 4
    assert "agent: $40 of $40 spent" in output


def test_a_monitor_measures_the_calls_that_fail(capsys: Capsys) -> None:
    output, verdicts = played(4, capsys)
    rows = [line.replace("│", " ").split() for line in output.splitlines() if " ms │" in line]
    assert rows == [
        ["18", "0", "9", "ms", "18", "ms", "18", "ms"],
        ["20", "2", "10", "ms", "100", "ms", "100", "ms"],
    ]
    assert [line[0] for line in verdicts] == ["✗", "✓"]


def test_a_transaction_around_the_call_locks_others_out(capsys: Capsys) -> None:
    output, verdicts = played(5, capsys)
    assert verdicts == [
        "✗ `ask_in_transaction`: turns in the file: first.",
        "✓ `GovernedSession.ask`: turns in the file: second, first.",
    ]
    assert "│ │ │ │ the second conversation: database is locked" in output
    assert output.count("left by ConnectionError") == 6


# --- --live ---


def live(monkeypatch: Patch, capsys: Any, *replies: Reply) -> tuple[int, str]:
    """Play demo 5 against a server with these replies; return the exit status and its errors."""
    clients = iter([answering(reply)[0] for reply in replies])
    monkeypatch.setattr(openai, "OpenAI", lambda **options: next(clients))
    monkeypatch.setattr(sys, "argv", ["05_nested_managers.py", "5", "--live"])
    status = 0
    try:
        status = chapter.main()
    except SystemExit as end:
        status = int(end.code or 0)
    assert chapter.options == {}
    return status, capsys.readouterr().err


def test_live_asks_a_model_without_a_published_price(monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("OPENAI_MODEL", "llama3.2")
    assert live(monkeypatch, capsys, completion(), completion()) == (0, "")
