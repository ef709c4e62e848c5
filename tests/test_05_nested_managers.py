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
import signal
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
from waiting import PATIENCE, FakeClock

chapter: Any = load_chapter(5)
Capsys = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Database = sqlite3.Connection
PROMPT = "What does contextlib do?"


def amounts(*levels: Any) -> tuple[Any, Any]:
    """What is spent and reserved, on each of the levels."""
    (found,) = {(level.spent, level.reserved) for level in levels}
    return found


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
    for amount in ("0", "999999.999999999999"):
        assert chapter.format_usd(chapter.money(Decimal(amount), "it")) == f"${amount}"
    assert chapter.format_usd(chapter.money(Decimal("-0"), "it")) == "$0"
    with chapter.budget(1) as budget:
        for _each in range(3):
            with budget.reserve(Decimal(1) / 3) as reservation:
                reservation.settle(Decimal("0.0000000000001"))
        assert amounts(budget) == (Decimal("0.000000000003"), 0)


def test_sums_do_not_depend_on_the_decimal_precision() -> None:
    with decimal.localcontext(prec=2), chapter.offline_client() as client:
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


def test_a_call_counts_on_every_level_and_frees_the_rest_at_once() -> None:
    with chapter.budget(5, "team") as team, team.child(9, "agent") as agent:
        with agent.child(9, "step") as step, step.reserve(2) as reservation:
            assert amounts(team, agent, step) == (0, 2)
            reservation.settle(Decimal("0.5"))
            assert amounts(team, agent, step) == (Decimal("0.5"), 0)
            with pytest.raises(chapter.BudgetExceededError) as caught, step.reserve(5):
                pass
            assert caught.value.name == "team"
            assert amounts(team, agent, step) == (Decimal("0.5"), 0)  # on all levels, or on none
            assert (step.remaining, team.remaining) == (Decimal("8.5"), Decimal("4.5"))  # a cap
            with step.reserve(Decimal("4.5")), step.reserve(0):  # all of the rest, and no more
                with pytest.raises(chapter.BudgetExceededError), team.reserve(Decimal("1e-12")):
                    pass
    assert (reservation.worst_case, reservation.actual) == (2, Decimal("0.5"))
    assert (team.name, team.limit, team.is_open) == ("team", 5, False)


def test_a_refusal_names_the_level_and_its_money() -> None:
    with chapter.budget(1, "team") as team, team.child(Decimal("0.50"), "agent") as agent:
        with agent.reserve(Decimal("0.30")), pytest.raises(chapter.BudgetExceededError) as caught:
            agent.reserve(Decimal("0.25")).__enter__()
    says = "budget 'agent' has $0.2 left of $0.5, but $0.25 is needed: wait for other calls, "
    says += "ask for a shorter answer, or raise the limit"
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (str(error), error.name) == (says, "agent")


@pytest.mark.parametrize(
    ("cost", "error", "booked"),
    [
        (None, None, Decimal("0.9")),  # unknown: the worst case
        (None, KeyboardInterrupt, Decimal("0.9")),
        (0, ValueError, 0),
        (Decimal("1.1"), None, Decimal("1.1")),  # above the worst case: in full
    ],
)
def test_a_call_is_booked_at_its_cost_or_at_its_worst_case(
    cost: Any, error: type[BaseException] | None, booked: Any
) -> None:
    with chapter.budget(1, "team") as team, team.child(1, "agent") as agent:
        with suppress(error or ValueError), agent.reserve(Decimal("0.9")) as reservation:
            if cost is not None:
                reservation.settle(cost)
            if error:
                raise error
        assert amounts(team, agent) == (booked, 0)
        assert team.remaining == agent.remaining == 1 - booked
        if booked > 1:
            with pytest.raises(chapter.BudgetExceededError, match=r"has \$-0.1 left"):
                agent.reserve(0).__enter__()
        assert reservation.actual == booked


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


def test_two_threads_cannot_reserve_the_same_money(monkeypatch: Patch) -> None:
    """Each pauses after its check until the other one has checked, too, or waits for the lock."""
    both_checked = threading.Barrier(2, timeout=PATIENCE)
    remaining = chapter.Budget.remaining

    class WatchedLock:
        lock = threading.Lock()

        def __enter__(self) -> None:
            if not self.lock.acquire(blocking=False):
                both_checked.abort()  # this one waits here, and cannot check
                self.lock.acquire()

        def __exit__(self, *exc_info: object) -> None:
            self.lock.release()

    def pausing(budget: Any) -> Any:
        found = remaining.fget(budget)
        with suppress(threading.BrokenBarrierError):
            both_checked.wait()
        return found

    def call(budget: Any) -> None:
        with suppress(chapter.BudgetExceededError), budget.reserve(1):
            pass

    with chapter.budget(1) as team:
        team._lock = WatchedLock()
        monkeypatch.setattr(chapter.Budget, "remaining", property(pausing))
        with team.child(1, "a") as first, team.child(1, "b") as second:
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(call, (first, second))) == [None, None]
    assert sorted([first.spent, second.spent]) == [0, 1]


INTERRUPTIBLE = ("RESUME", "CALL", "JUMP_BACKWARD", "SEND")  # where CPython looks for signals


@contextmanager
def ctrl_c_at(nth: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th such place; yield the places that were reached."""
    files = (chapter.__file__, chapter.contextmanager.__code__.co_filename)
    last: dict[int, str] = {}  # the operation before, of each frame
    seen: list[int] = []

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "exception":
            last[id(frame)] = ""  # a call that raised did not look for signals
        if event == "opcode":
            before = last.get(id(frame), "RESUME")
            last[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(INTERRUPTIBLE):
                seen.append(frame.f_lineno)
                if len(seen) == nth:
                    raise KeyboardInterrupt
        return trace

    sys._getframe().f_trace_opcodes = True  # subtle: 3.12 wants one before settrace
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)


@pytest.mark.parametrize(("cost", "booked"), [(3, {0, 3, 4}), (None, {0, 4})])
def test_ctrl_c_at_any_bytecode_books_a_call_once(cost: int | None, booked: set[int]) -> None:
    """Once at its cost, at its worst case if that is unknown, or at 0 if it never began."""
    outcomes = []
    for nth in itertools.count(1):
        with chapter.budget(10, "team") as team, team.child(10, "agent") as agent:
            with suppress(KeyboardInterrupt), ctrl_c_at(nth) as reached:
                with agent.reserve(4) as reservation:
                    if cost is not None:
                        reservation.settle(cost)
            outcomes.append(team.spent)
            assert amounts(team, agent) == (team.spent, 0)
            assert not team._lock.locked()
        if len(reached) < nth:
            break
    assert set(outcomes) == booked
    assert len(outcomes) > 40


def test_2000_real_signals_lose_no_call_and_book_none_twice() -> None:
    chance, outcomes = random.Random(5), set()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with chapter.budget(999_999) as team, team.child(999_999, "agent") as agent:
            for _each in range(2000):
                spent, known = team.spent, None
                with suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-6, 60e-6))
                    with agent.reserve(4) as reservation:
                        reservation.settle(3)
                        known = 3
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert amounts(team, agent) == (team.spent, 0)
                assert not team._lock.locked()
                outcomes.add((known, team.spent - spent))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert {(3, 3)} < outcomes <= {(3, 3), (None, 0), (None, 3), (None, 4)}


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


# --- Monitors ---


def test_a_report_has_calls_errors_total_and_percentiles() -> None:
    durations = [float(n) for n in range(1, 21)]
    random.Random(1).shuffle(durations)
    steps = itertools.chain.from_iterable((0.5, each) for each in (*durations, 7.0))
    with chapter.monitor("m", clock=FakeClock(*steps)) as monitor:
        for _each in durations:
            with monitor.measure("ask"):
                pass
        with monitor.measure("save"):
            pass
    report = monitor.report()
    assert report["ask"] == (20, 0, 210.0, 10.0, 19.0, 20.0)
    assert report["ask"]._fields == ("calls", "errors", "total", "p50", "p95", "maximum")
    assert report["save"] == (1, 0, 7.0, 7.0, 7.0, 7.0)


def test_a_monitor_reports_calls_and_errors_to_its_parents() -> None:
    clock = FakeClock(0.5, 1.0, 0.5, 2.0, 0.5, 4.0)
    with chapter.monitor("run", clock) as run, run.child("agent") as agent:
        with agent.child("step") as step:
            with step.measure("ask"):
                pass
            with pytest.raises(KeyboardInterrupt), agent.measure("ask"):
                raise KeyboardInterrupt
            with run.measure("ask"):
                pass
            totals = [monitor.report()["ask"][:3] for monitor in (run, agent, step)]
        with pytest.raises(RuntimeError, match="Monitor 'step' is closed"), step.measure("ask"):
            pass
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


def test_a_client_that_is_passed_in_stays_open() -> None:
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
    client, asked = answering(completion(cached), completion(cached))
    with client, chapter.session("s", client=client, max_output_tokens=600) as chat:
        chat.ask("hello")
        assert chat.cost == Decimal("0.0004503")
        with pytest.raises(ZeroDivisionError):
            chat.ask("hello", lambda cost: 1 // 0)
    assert chat.cost == 2 * Decimal("0.0004503")
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


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.asyncio
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


NOT_JSON = [page(text) for text in ("", "{", "\xff", "1" * 5000, "[" * 100_000)]
NOT_WHOLE: list[Any] = [page(text) for text in ("null", "[]", "3", '"x"', "{}")]
NOT_WHOLE += [{**completion(), "choices": []}, completion(finish=None), completion(finish="")]
NOT_WHOLE += [completion(content=wrong) for wrong in (None, 5, ["a"])]
NOT_WHOLE += [completion(content=None, tool_calls=calls) for calls in ([], 5, [None])]
NOT_WHOLE += [completion(tool_calls="f"), page(json.dumps(completion(content="\ud800")))]
NO_MESSAGE = {"finish_reason": "stop", "message": None}
NOT_WHOLE += [{**completion(), "choices": [choice]} for choice in (None, NO_MESSAGE)]
SIGN_IN: list[Any] = [
    page("<html>Sign in", "text/html"),
    {"error": {"message": 9 * "please " + "Sign in"}},
]
BROKEN = [(reply, "not JSON") for reply in NOT_JSON] + [(reply, "Sign in") for reply in SIGN_IN]
BROKEN += [(reply, "not a whole answer") for reply in NOT_WHOLE]


@pytest.mark.parametrize(("reply", "says"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_not_a_whole_answer_is_paid_but_not_recorded(reply: Any, says: str) -> None:
    text = reply.text if isinstance(reply, httpx2.Response) else str(reply)
    client, _asked = answering(reply, completion())
    costs: list[Decimal] = []
    with client, chapter.session("s", client=client) as chat:
        with pytest.raises(chapter.ReplyError, match=says):
            chat.ask(PROMPT, costs.append)
        assert chat.messages == []
        assert chat.cost == (COST if costs else chat.worst_case(PROMPT))
        assert bool(costs) is ("usage" in text)
        assert chat.ask(PROMPT) == "hi"


def test_a_reply_that_is_too_deep_to_be_shown_is_not_a_whole_answer() -> None:
    reply: list[Any] = []
    for _each in range(100_000):
        reply = [reply]
    with pytest.raises(chapter.ReplyError, match="nested too deeply"):
        chapter.message_of(reply)


def test_a_key_that_no_header_can_hold_is_no_fault_of_the_reply() -> None:
    client, asked = answering()
    client.api_key = "sk-…"
    with client, chapter.session("s", client=client) as chat:
        with pytest.raises(UnicodeEncodeError):
            chat.ask(PROMPT)
    assert asked == []


@pytest.mark.parametrize("wrong", [lambda: 0.5, lambda: 1 // 0])
def test_a_price_that_fails_loses_no_reply(wrong: Any) -> None:
    price = lambda read, wrote, cached: wrong() if wrote == 567 else Decimal(read) / 10_000  # noqa: E731
    client, _asked = answering(completion())
    with client, chapter.session("s", client=client, price=price) as chat:
        worst_case = chat.worst_case(PROMPT)
        assert (chat.ask(PROMPT), chat.cost) == ("hi", worst_case)


@pytest.mark.parametrize("model", ["llama3", "claude-3-5-haiku-latest"])  # OpenAI has neither
def test_an_unknown_price_says_what_to_pass(model: str) -> None:
    refused = f"the price of '{model}' is unknown: pass price=, a function of input"
    with pytest.raises(LookupError, match=refused), chapter.session("s", model=model):
        pass


def test_a_price_of_your_own_is_a_function_of_three_counts() -> None:
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
        assert review.ask(PROMPT) == PROMPT
        assert amounts(review.budget) == (review.session.cost, 0)


@pytest.mark.parametrize(
    ("hindrance", "says"),
    [("budget", "is needed"), ("database", "in a transaction"), ("other", "locked")],
)
def test_a_turn_that_cannot_be_paid_or_saved_is_not_sent(
    hindrance: str, says: str, database: Database, other: Database
) -> None:
    client, asked = answering()
    limit = Decimal("1e-4") if hindrance == "budget" else 1
    with client, governed(database, client, budget=chapter.budget(limit)) as review:
        if hindrance != "budget":
            {"database": database, "other": other}[hindrance].execute("BEGIN IMMEDIATE")
        with pytest.raises((RuntimeError, sqlite3.OperationalError), match=says):
            review.ask(PROMPT)
        assert (asked, review.session.messages, review.monitor.report()) == ([], [], {})
        assert amounts(review.budget) == (0, 0)
        assert review.session.cost == 0
    assert turns(database) == []


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


# --- The cleanup contract ---


@contextmanager
def transaction_in(connection: Database, *statements: str) -> Iterator[type[Exception]]:
    for statement in ("BEGIN", *statements):
        connection.execute(statement)
    yield Exception
    connection.execute("ROLLBACK")


@contextmanager
def budget_subject(_database: Database, _other: Database) -> Iterator[Subject]:
    opened: list[Any] = []

    def use(budget: Any) -> None:
        budget.check_open()
        opened.append(budget)

    with chapter.budget(1000) as team:
        yield Subject(
            open=lambda: team.child(1000, "child"),
            leaks=lambda: [each.name for each in opened if each.is_open],
            use=use,
            closed_error=RuntimeError,
            setup_faults="it takes nothing that could fail",
            cleanup_faults="it is one assignment",
        )


@contextmanager
def reserve_subject(_database: Database, _other: Database) -> Iterator[Subject]:
    with chapter.budget(1000, "team") as team, team.child(1000, "agent") as agent:

        @contextmanager
        def exhausted() -> Iterator[type[Exception]]:
            with team.reserve(team.remaining) as reservation:
                yield chapter.BudgetExceededError
                reservation.settle(0)

        yield Subject(
            open=lambda: agent.reserve(1),
            leaks=lambda: agent.reserved or team.reserved or team.spent - agent.spent,
            setup_faults=[exhausted],
            cleanup_faults="it is one assignment",
        )


@contextmanager
def measure_subject(_database: Database, _other: Database) -> Iterator[Subject]:
    clock = FakeClock()
    with chapter.monitor("m", clock) as monitor:

        def leaks() -> object:
            ended = sum(each.calls for each in monitor.report().values())
            return clock.now - 1000 != 2 * ended and "not measured"

        yield Subject(
            open=lambda: monitor.measure("use"),
            leaks=leaks,
            setup_faults=[lambda: mock.patch.object(monitor, "_clock", side_effect=OSError)],
            cleanup_faults="it reads the clock, as before, and appends to a list",
        )


@contextmanager
def session_subject(_database: Database, _other: Database) -> Iterator[Subject]:
    real_client, real_close = openai.OpenAI, openai.OpenAI.close
    clients: list[openai.OpenAI] = []

    def failing(client: openai.OpenAI) -> None:
        real_close(client)
        raise OSError

    def make_client() -> openai.OpenAI:
        transport = httpx2.MockTransport(chapter.stand_in)
        clients.append(real_client(api_key="k", http_client=httpx2.Client(transport=transport)))
        return clients[-1]

    with mock.patch.object(openai, "OpenAI", make_client):
        yield Subject(
            open=lambda: chapter.session("s"),
            leaks=lambda: [repr(client) for client in clients if not client.is_closed()],
            use=lambda chat: chat.ask("hello"),
            closed_error=chapter.SessionClosedError,
            setup_faults=[lambda: mock.patch.object(openai, "OpenAI", side_effect=OSError)],
            cleanup_faults=[lambda: mock.patch.object(real_client, "close", failing)],
        )


@contextmanager
def governed_subject(database: Database, other: Database) -> Iterator[Subject]:
    opened: list[Any] = []
    real = chapter.Scope.opened

    @contextmanager
    def failing_at_the_end(scope: Any) -> Iterator[Any]:
        with real(scope):
            try:
                yield scope
            finally:
                raise OSError

    def use(review: Any) -> None:
        opened.append(review)
        review.ask("hello")

    def leaks() -> object:
        layers = [each for g in opened for each in (g.budget, g.monitor, g.session)]
        return [each.name for each in layers if each.is_open] or database.in_transaction

    with chapter.offline_client() as client:
        yield Subject(
            open=lambda: governed(database, client),
            leaks=leaks,
            use=use,
            closed_error=RuntimeError,
            setup_faults=[lambda: transaction_in(other, "CREATE TABLE t (n)")],
            cleanup_faults=[lambda: mock.patch.object(chapter.Scope, "opened", failing_at_the_end)],
            concurrent=False,  # a connection belongs to one thread
        )


@contextmanager
def transaction_subject(database: Database, other: Database) -> Iterator[Subject]:
    database.execute("CREATE TABLE t (n)")
    yield Subject(
        open=lambda: chapter.transaction(database),
        leaks=lambda: database.in_transaction,
        setup_faults=[
            lambda: transaction_in(other, "INSERT INTO t VALUES (1)"),
            lambda: transaction_in(database),
        ],
        cleanup_faults=[lambda: transaction_in(other, "SELECT * FROM t")],  # then none can commit
        nestable=False,
        concurrent=False,
    )


SUBJECTS: list[Any] = [budget_subject, reserve_subject, measure_subject, session_subject]
SUBJECTS += [transaction_subject, governed_subject]


@pytest.mark.parametrize("way", SYNC_WAYS)
@pytest.mark.parametrize("make_subject", SUBJECTS)
def test_it_keeps_the_cleanup_contract(
    make_subject: Any, way: Way, database: Database, other: Database
) -> None:
    with make_subject(database, other) as subject:
        way(subject)


# --- What the demos claim, and --live ---


CLAIMS = {
    1: ["`: exited c, b, a; raised OSError, with `__context__` ZeroDivisionError."] * 3,
    2: [
        "✗ `check_then_call`: 10 of 10 sent; spent $0.004125, 412% of the limit.",
        "✓ `reserve_then_call`: 1 of 10 sent; spent $0.0004125, 41% of the limit.",
    ],
    3: [
        "✗ `give_back`: 6 sent; billed by the provider: $90, by the budget: $0.",
        *["agent refuses"] * 4,
        "agent: $40 of $40 spent",
        "✓ `keep_open`: 2 sent; billed by the provider: $30, by the budget: $40.",
    ],
    4: [
        "18 │ 0 │ 9 ms │ 18 ms │ 18 ms",
        "✗ `by_hand` measures 18 of 20 calls.",
        "20 │ 2 │ 10 ms │ 100 ms │ 100 ms",
        "✓ `measured` measures 20 of 20 calls.",
    ],
    5: [
        "│ │ │ │ the second conversation: database is locked",
        *["left by ConnectionError"] * 3,
        "✗ `ask_in_transaction`: turns in the file: first.",
        *["left by ConnectionError"] * 3,
        "✓ `GovernedSession.ask`: turns in the file: second, first.",
    ],
}


@pytest.mark.parametrize("number", CLAIMS)
def test_a_demo_shows_what_its_lesson_claims(number: int, capsys: Capsys) -> None:
    chapter.play(number)
    rest = " ".join(capsys.readouterr().out.split())
    for claim in CLAIMS[number]:  # in this order
        _before, found, rest = rest.partition(claim)
        assert found, claim


def test_live_asks_a_model_without_a_published_price(monkeypatch: Patch, capsys: Capsys) -> None:
    for name, value in {"API_KEY": "any", "MODEL": "llama3.2"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    clients = [answering(completion())[0] for _each in range(2)]
    monkeypatch.setattr(openai, "OpenAI", lambda **options: clients.pop())
    monkeypatch.setattr(sys, "argv", ["05_nested_managers.py", "5", "--live"])
    assert (chapter.main(), chapter.options, capsys.readouterr().err) == (0, {}, "")
