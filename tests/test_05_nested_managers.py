"""Chapter 05: budgets that are ledgers, monitors, sessions, and the four as one."""

from __future__ import annotations

import decimal
import gc
import json
import pickle
import random
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject, Way, time_limit
from waiting import PATIENCE, FakeClock

chapter: Any = load_chapter(5)
PROMPT = "What does contextlib do?"


def amounts(*levels: Any) -> tuple[Any, Any]:
    """What is spent and reserved, on each of the levels."""
    (found,) = {(level.spent, level.reserved) for level in levels}
    return found


NO_AMOUNTS = ["-0.01", "NaN", "sNaN", "Infinity", "999999.9999999999999"]


@pytest.mark.parametrize("wrong", [0.25, True, "0.25", *map(Decimal, NO_AMOUNTS)])
def test_an_amount_is_exact_and_from_0_to_below_a_million(wrong: Any) -> None:
    error: Any = TypeError, r"pass an exact one, Decimal\('0.25'\)"
    if isinstance(wrong, Decimal):
        error = ValueError, "pass dollars from 0 to below a million"
    with chapter.budget(1) as budget, budget.reserve(1) as reservation:
        for refused in (chapter.budget, partial(budget.child, name="c"), budget.reserve):
            with pytest.raises(error[0], match=error[1]):
                refused(wrong).__enter__()
        with pytest.raises(error[0], match="the actual cost is"):
            reservation.settle(wrong)
        assert amounts(budget) == (0, 1)


def test_what_is_finer_than_a_picodollar_is_rounded_up() -> None:
    for amount in ("0", "999999.999999999999"):
        assert chapter.format_usd(chapter.money(Decimal(amount), "it")) == f"${amount}"
    assert chapter.format_usd(chapter.money(Decimal("-0"), "it")) == "$0"
    assert chapter.money(Decimal("0.0000000000001"), "it") == Decimal("0.000000000001")


def test_sums_do_not_depend_on_the_decimal_precision() -> None:
    with decimal.localcontext(prec=2), chapter.offline_client() as client:
        with chapter.budget(100) as budget, chapter.session("s", client=client) as chat:
            for _each in range(40):
                with budget.reserve(Decimal("1.23456789")) as reservation:
                    reservation.settle(Decimal("1.23456789"))
            with budget.reserve(Decimal("0.123456789")):
                assert budget.remaining == Decimal("50.493827611")
            worst_case, asked = chat.worst_case(PROMPT), chat.ask(PROMPT)
    assert budget.spent == Decimal("49.506172389")
    assert worst_case == Decimal("0.00030855")  # 57 bytes, 500 tokens
    assert (asked, chat.cost) == (PROMPT, Decimal("0.0000057"))  # 14 and 6 tokens


def test_a_call_counts_on_every_level_and_frees_the_rest_at_once() -> None:
    with chapter.budget(5, "team") as team, team.child(9, "agent") as agent:
        with agent.child(9, "step") as step, step.reserve(2) as reservation:
            assert amounts(team, agent, step) == (0, 2)
            reservation.settle(Decimal("0.5"))
            assert amounts(team, agent, step) == (Decimal("0.5"), 0)
            with pytest.raises(chapter.BudgetExceededError) as refused, step.reserve(5):
                pass
            assert amounts(team, agent, step) == (Decimal("0.5"), 0)  # on all levels, or on none
            assert (step.remaining, team.remaining) == (Decimal("8.5"), Decimal("4.5"))  # a cap
            with step.reserve(Decimal("4.5")), step.reserve(0):  # all of the rest, and no more
                with pytest.raises(chapter.BudgetExceededError), team.reserve(Decimal("1e-12")):
                    pass
    for error in (refused.value, pickle.loads(pickle.dumps(refused.value))):
        assert str(error).startswith("budget 'team' has $4.5 left of $5, but $5 is needed: wait")
        assert error.name == "team"


def test_a_call_is_booked_once_at_its_cost_or_at_its_worst_case() -> None:
    with chapter.budget(4, "team") as team, team.child(2, "agent") as agent:
        with pytest.raises(KeyboardInterrupt), agent.reserve(1) as unknown:
            raise KeyboardInterrupt
        assert amounts(team, agent) == (1, 0)
        with pytest.raises(OSError), agent.reserve(1) as unbilled:  # noqa: PT011
            unbilled.settle(0)
            raise OSError
        assert amounts(team, agent) == (1, 0)
        with agent.reserve(1) as dearer:  # above the worst case: in full
            dearer.settle(Decimal("1.1"))
        assert amounts(team, agent) == (Decimal("2.1"), 0)
        with pytest.raises(chapter.BudgetExceededError, match=r"has \$-0.1 left"):
            agent.reserve(0).__enter__()
        with pytest.raises(RuntimeError, match=r"this reservation is settled at \$1.1"):
            dearer.settle(Decimal("1.1"))
        with pytest.raises(RuntimeError, match=r"settled at \$1"):
            unknown.settle(0)
    booked = [(call.worst_case, call.actual) for call in (unknown, unbilled, dearer)]
    assert booked == [(1, 1), (1, 0), (1, Decimal("1.1"))]


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


def test_two_threads_cannot_reserve_the_same_money() -> None:
    """One lock, of all levels, is held from the check to the addition."""
    add_up, locked = chapter.Budget._add_up, []

    def noted(budget: Any) -> Any:
        locked.append(team._lock.locked())
        return add_up(budget)

    with chapter.budget(1) as team, team.child(1, "agent") as agent:
        with patch.object(chapter.Budget, "_add_up", noted), agent.reserve(1):
            assert locked == [True] * 4  # on two levels, a check and an addition


def test_2000_real_signals_lose_no_call_and_book_none_twice() -> None:
    chance, outcomes = random.Random(5), set()
    with chapter.budget(9_999) as team, team.child(9_999, "agent") as agent, ExitStack() as stack:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGALRM, before)
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        for _each in range(2000):
            spent, known = team.spent, None
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-6, 60e-6))
                with agent.reserve(4) as reservation:
                    if chance.random() < 0.5:
                        reservation.settle(3)
                        known = 3
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert amounts(team, agent) == (team.spent, 0)
            assert not team._lock.locked()
            outcomes.add((known, team.spent - spent))
    assert {(3, 3), (None, 4)} < outcomes <= {(3, 3), (None, 0), (None, 3), (None, 4)}


def test_threads_that_race_for_money_get_no_more_than_there_is() -> None:
    def spend(_number: int) -> int:
        with suppress(chapter.BudgetExceededError), budget.reserve(1) as reservation:
            reservation.settle(1)
            return 1
        return 0

    with chapter.budget(100) as budget, ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(spend, range(400))) == budget.spent == 100


def abandon(manager: Any) -> None:
    """Suspend a generator in the manager's block, in a cycle: only the collector ends it."""

    def run() -> Iterator[Any]:
        with manager:
            yield cycle

    cycle = [run()]
    next(cycle[0])


@time_limit()
def test_the_garbage_collector_may_end_a_block_inside_another() -> None:
    """Neither a deadlock, nor a crash (Python 3.11's decimal), nor a lost sum."""
    with chapter.budget(999_999) as team, chapter.monitor("m") as monitor, ExitStack() as stack:
        stack.callback(gc.set_threshold, *gc.get_threshold())
        for each in range(300):
            gc.set_threshold(1 + each % 9)  # so that it strikes at changing places
            abandon(team.reserve(1))
            abandon(monitor.measure("ask"))
            with team.reserve(3) as reservation, monitor.measure("ask"):
                reservation.settle(2)
            assert team.spent >= 0
            monitor.report()
        gc.collect()
        assert amounts(team) == (900, 0)
        assert monitor.report()["ask"][:2] == (600, 300)


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


def test_percentiles_are_durations_that_were_measured() -> None:
    twenty = [float(seconds) for seconds in range(20, 0, -1)]
    assert chapter.summary(twenty, 0) == (20, 0, 210, 10, 19, 20)


COST = Decimal("0.0005253")  # 1234 at $0.15 a million, 567 at $0.60
HI = {"role": "assistant", "content": "hi"}


def usage(prompt: Any, answer: Any, cached: Any = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": details}


USAGE = usage(1234, 567)


def page(text: str, kind: str = "application/json", status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, content=text, headers={"content-type": kind})


def completion(message: Any = HI, usage: Any = USAGE, finish: Any = "stop") -> httpx2.Response:
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return page(json.dumps({"id": "1", "choices": [choice], "usage": usage}))


def answering(*replies: Any) -> tuple[openai.OpenAI, Mock]:
    """A client whose server gives these replies (or errors) in turn; and that server."""
    server = Mock(side_effect=replies)
    http_client = httpx2.Client(transport=httpx2.MockTransport(server))
    return openai.OpenAI(api_key="test", http_client=http_client), server


def test_the_worst_case_bounds_the_input_by_its_bytes() -> None:
    """A token of a byte-level tokenizer is at least one byte, in any language."""
    with chapter.offline_client() as client, chapter.session("s", client=client) as chat:
        for prompt in ("hello", "中文" * 9, "🙂", '"' * 9, chapter.PAGE):
            of_input = chat.worst_case(prompt) - Decimal("0.0003")
            # The chat rule adds 7 tokens to the content's; templates add a few more.
            assert of_input >= (len(prompt.encode()) + 7 + 20) * Decimal("0.15e-6")
        assert chat.worst_case(chapter.PAGE) == Decimal("0.00075")
        chat.ask(prompt)
        assert chat.worst_case(prompt) > Decimal("0.0012")  # the history, too


def test_cached_tokens_are_paid_at_their_own_price() -> None:
    client, server = answering(completion(usage=usage(1234, 567, cached=1000)))
    with client, chapter.session("s", client=client, max_output_tokens=600) as chat:
        with pytest.raises(ZeroDivisionError):
            chat.ask("hello", lambda cost: 1 // 0)  # a cost that is known is not lost
    assert chat.cost == Decimal("0.0004503")
    assert b'"max_completion_tokens":600' in server.call_args.args[0].content


UNUSABLE = [None, {}, usage(0, 5), usage(5, -1), usage(5, 5, 6), usage(10**30, 5), usage(True, 5)]


@pytest.mark.parametrize("reported", [*UNUSABLE, usage(float("inf"), 5)])
def test_a_reply_without_a_usable_usage_costs_the_worst_case(reported: Any) -> None:
    client, _server = answering(completion(usage=reported))
    with client, chapter.budget(1) as budget, chapter.session("s", client=client) as chat:
        worst_case = chat.worst_case("hello")
        with budget.reserve(worst_case) as reservation:
            assert chat.ask("hello", reservation.settle) == "hi"
    assert chat.cost == budget.spent == worst_case > 0


NOT_BILLED: list[Any] = [page('{"error": "no"}', status=each) for each in (400, 500, 503, 529)]
NOT_BILLED += [httpx2.ConnectError(""), httpx2.ConnectTimeout(""), httpx2.PoolTimeout("")]
UNKNOWN: list[Any] = [page("{}", status=each) for each in (304, 408, 499, 504)]
UNKNOWN += [httpx2.ReadTimeout(""), httpx2.RemoteProtocolError("")]
FAILURES = [(each, False) for each in NOT_BILLED] + [(each, True) for each in UNKNOWN]


@pytest.mark.parametrize(("failure", "billed"), FAILURES, ids=repr)
def test_only_what_providers_do_not_bill_is_free(failure: Any, billed: Any, databases: Any) -> None:
    client, server = answering(failure, completion())
    with client, governed(databases, client) as review:
        expected = review.session.worst_case(PROMPT) if billed else 0
        with pytest.raises(openai.OpenAIError):
            review.ask(PROMPT)
        assert (review.session.cost, *amounts(review.budget)) == (expected, expected, 0)
        assert server.call_count == 1  # not tried again behind the budget's back
        review.ask(PROMPT)
    assert review.budget.spent == expected + COST
    assert review.monitor.report()["ask"][:2] == (2, 1)
    assert databases[0].execute("SELECT * FROM turn").fetchall() == [("review", PROMPT, "hi")]


@pytest.mark.parametrize("owned", [True, False])
def test_a_turn_that_outlives_its_block_is_paid(owned: bool, monkeypatch: Any) -> None:
    """A timeout abandons the thread, and the block does not wait for it: it goes on."""
    began, release, costs = threading.Event(), threading.Event(), list[Decimal]()

    def answer() -> None:
        began.set()
        assert release.wait(PATIENCE)

    with chapter.offline_client(answer) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(openai, "OpenAI", lambda: client)
        with chapter.session("s", client=None if owned else client) as chat:
            turn = pool.submit(chat.ask, PROMPT, costs.append)
            assert began.wait(PATIENCE)
            with chapter.budget(1) as budget:
                with pytest.raises(TimeoutError), budget.reserve(1):
                    turn.result(timeout=0)
                assert amounts(budget) == (1, 0)
        assert not client.is_closed()
        release.set()
        with pytest.raises(chapter.SessionClosedError):
            turn.result()
        assert client.is_closed() is owned
    assert (chat.messages, costs) == ([], [chat.cost])


def test_a_whole_answer_says_something() -> None:
    tool = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said: Any = [{"content": "hi"}, {"content": ""}, {"refusal": "no"}, {"tool_calls": [tool]}]
    client, server = answering(*map(completion, said))
    with client, chapter.session("s", client=client) as chat:
        assert [chat.ask(PROMPT) for _each in said] == ["hi", "", "no", ""]
    assert chat.messages[1::2] == [{"role": "assistant", **each} for each in said]
    assert json.loads(server.call_args.args[0].content)["messages"] == chat.messages[:-1]


NO_MESSAGES: list[Any] = [None, {}, {"content": 5}, {"content": "\ud800"}, {"tool_calls": []}]
NOT_WHOLE = [completion(finish=""), page("null"), page('{"choices": []}')]
NOT_WHOLE += [completion(message) for message in NO_MESSAGES]
BROKEN = [(reply, "not a whole answer") for reply in NOT_WHOLE]
BROKEN += [(page(text), "not JSON") for text in ("{", "[" * 100_000)]
BROKEN += [(page("Sign in", "text/html"), "Sign in"), (page('{"error": "Sign in"}'), "Sign in")]


@pytest.mark.parametrize(("reply", "says"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_not_a_whole_answer_is_paid_but_not_recorded(reply: Any, says: str) -> None:
    client, _server = answering(reply, completion())
    costs: list[Decimal] = []
    with client, chapter.session("s", client=client) as chat:
        with pytest.raises(chapter.ReplyError, match=says):
            chat.ask(PROMPT, costs.append)
        assert chat.messages == []
        assert costs == [COST] * ("usage" in reply.text)
        assert chat.cost == (COST if costs else chat.worst_case(PROMPT))
        assert chat.ask(PROMPT) == "hi"


def test_a_key_that_no_header_can_hold_is_no_fault_of_the_reply() -> None:
    with chapter.offline_client() as client:
        client.api_key = "sk-…"
        with chapter.session("s", client=client) as chat, pytest.raises(UnicodeEncodeError):
            chat.ask(PROMPT)


def test_a_price_of_your_own_is_exact_and_loses_no_reply() -> None:
    price = lambda read, wrote, cached: Decimal(read + wrote) / (1 - cached) / 1000  # noqa: E731
    client, _server = answering(completion(), completion(usage=usage(5, 5, cached=1)))
    with client, chapter.session("s", model="llama3", client=client, price=price) as chat:
        assert chat.worst_case(PROMPT) == Decimal("0.557")
        assert (chat.ask(PROMPT), chat.cost) == ("hi", Decimal("1.801"))
        worst_case = chat.worst_case(PROMPT)
        assert (chat.ask(PROMPT), chat.cost) == ("hi", Decimal("1.801") + worst_case)


def test_an_unknown_price_says_what_to_pass() -> None:
    with pytest.raises(LookupError, match="'llama3' is unknown: pass price=, a function of input"):
        chapter.session("s", model="llama3").__enter__()
    with pytest.raises(TypeError, match=r"the price is 0\.5, a float"):
        chapter.session("s", price=lambda *counts: 0.5).__enter__()


@pytest.fixture
def databases(tmp_path: Path) -> Iterator[Any]:
    """Two connections to one file."""
    connect = partial(sqlite3.connect, tmp_path / "turns.db", timeout=0)
    with closing(connect()) as database, closing(connect()) as other:
        yield database, other


def governed(databases: Any, client: Any, budget: Any = None, monitor: Any = None) -> Any:
    return chapter.governed_session(
        budget=budget or chapter.budget(1, "review"),
        monitor=monitor or chapter.monitor("review"),
        transaction=partial(chapter.transaction, databases[0]),
        session=chapter.session("review", client=client),
    )


@time_limit()
def test_a_second_turn_at_once_is_refused_before_it_reserves(databases: Any) -> None:
    def ask_again() -> None:
        with pytest.raises(RuntimeError, match="'review' is in a turn: it takes one"):
            review.ask("again")
        assert review.budget.reserved == review.session.worst_case(PROMPT)

    with chapter.offline_client(ask_again) as client, governed(databases, client) as review:
        assert review.ask(PROMPT) == PROMPT
        assert amounts(review.budget) == (review.session.cost, 0)


@pytest.mark.parametrize(("busy", "says"), [(None, "needed"), (0, "transaction"), (1, "locked")])
def test_what_cannot_be_paid_or_saved_is_not_sent(busy: Any, says: str, databases: Any) -> None:
    client, server = answering()
    budget = chapter.budget(Decimal("1e-4") if busy is None else 1)
    with client, governed(databases, client, budget) as review:
        if busy is not None:
            databases[busy].execute("BEGIN IMMEDIATE")
        with pytest.raises((RuntimeError, sqlite3.OperationalError), match=says):
            review.ask(PROMPT)
        assert (server.call_count, review.session.messages, review.monitor.report()) == (0, [], {})
        assert (*amounts(review.budget), review.session.cost) == (0, 0, 0)


def test_a_turn_that_cannot_be_saved_after_all_is_paid(databases: Any) -> None:
    begin = partial(databases[1].execute, "BEGIN IMMEDIATE")
    with chapter.offline_client(begin) as client, governed(databases, client) as review:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            review.ask(PROMPT)
        assert len(review.session.messages) == 2
        assert amounts(review.budget) == (review.session.cost, 0)


def test_a_governed_session_works_inside_what_is_open(databases: Any) -> None:
    with chapter.budget(1, "team") as team, chapter.monitor("team") as meter:
        with chapter.offline_client() as client:
            for budget in (team.child(1, "first"), nullcontext(team)):
                with governed(databases, client, budget, meter.child("first")) as review:
                    review.ask(PROMPT)
        team.check_open()
        assert meter.report()["ask"].calls == 2
        assert team.spent == 2 * review.session.cost > 0


@contextmanager
def transaction_in(connection: Any, script: str = "") -> Iterator[type[Exception]]:
    connection.executescript(f"BEGIN; {script}")
    yield Exception
    connection.execute("ROLLBACK")


def a_budget(stack: ExitStack, _databases: Any) -> Subject:
    team, opened = stack.enter_context(chapter.budget(1000)), list[Any]()

    def use(budget: Any) -> None:
        budget.check_open()
        opened.append(budget)

    return Subject(
        open=lambda: team.child(1000, "child"),
        leaks=lambda: [each.name for each in opened if each.is_open],
        use=use,
        closed_error=RuntimeError,
        setup_faults="it takes nothing that could fail",
        cleanup_faults="it is one assignment",
    )


def a_reservation(stack: ExitStack, _databases: Any) -> Subject:
    team = stack.enter_context(chapter.budget(1000, "team"))
    agent = stack.enter_context(team.child(1000, "agent"))
    return Subject(
        open=lambda: agent.reserve(1),
        leaks=lambda: agent.reserved or team.reserved or team.spent - agent.spent,
        setup_faults=[partial(patch.object, team, "limit", Decimal(0))],
        cleanup_faults="it is one assignment",
    )


def a_measurement(stack: ExitStack, _databases: Any) -> Subject:
    clock = FakeClock()
    monitor = stack.enter_context(chapter.monitor("m", clock))
    return Subject(
        open=lambda: monitor.measure("use"),
        leaks=lambda: clock.now - 1000 != 2 * sum(each.calls for each in monitor.report().values()),
        setup_faults=[partial(patch.object, monitor, "_clock", side_effect=OSError)],
        cleanup_faults="it reads the clock, as before, and appends to a list",
    )


def a_session(stack: ExitStack, _databases: Any) -> Subject:
    real_client, clients = openai.OpenAI, list[openai.OpenAI]()

    def make_client() -> openai.OpenAI:
        transport = httpx2.MockTransport(chapter.stand_in)
        clients.append(real_client(api_key="k", http_client=httpx2.Client(transport=transport)))
        return clients[-1]

    stack.enter_context(patch.object(openai, "OpenAI", make_client))
    return Subject(
        open=lambda: chapter.session("s"),
        leaks=lambda: [repr(client) for client in clients if not client.is_closed()],
        use=lambda chat: chat.ask("hello"),
        closed_error=chapter.SessionClosedError,
        setup_faults=[partial(patch.object, openai, "OpenAI", side_effect=OSError)],
        cleanup_faults=[partial(patch.object, httpx2.MockTransport, "close", side_effect=OSError)],
    )


def a_governed_session(stack: ExitStack, databases: Any) -> Subject:
    client, opened = stack.enter_context(chapter.offline_client()), list[Any]()

    @contextmanager
    def failing_at_the_end(scope: Any) -> Iterator[Any]:
        try:
            yield scope
        finally:
            scope.is_open = False
            raise OSError

    def use(review: Any) -> None:
        opened.extend((review.budget, review.monitor, review.session))
        review.ask("hello")

    return Subject(
        open=lambda: governed(databases, client),
        leaks=lambda: [each.name for each in opened if each.is_open] or databases[0].in_transaction,
        use=use,
        closed_error=RuntimeError,
        setup_faults=[lambda: transaction_in(databases[1], "CREATE TABLE t (n)")],
        cleanup_faults=[partial(patch.object, chapter.Scope, "opened", failing_at_the_end)],
        concurrent=False,  # a connection belongs to one thread
    )


def a_transaction(_stack: ExitStack, databases: Any) -> Subject:
    database, other = databases
    database.execute("CREATE TABLE t (n)")
    insert = partial(transaction_in, other, "INSERT INTO t VALUES (1)")
    return Subject(
        open=lambda: chapter.transaction(database),
        leaks=lambda: database.in_transaction,
        setup_faults=[insert, partial(transaction_in, database)],
        cleanup_faults=[lambda: transaction_in(other, "SELECT * FROM t")],  # then none can commit
        nestable=False,
        concurrent=False,
    )


@pytest.mark.parametrize("way", SYNC_WAYS)
@pytest.mark.parametrize(
    "make", [a_budget, a_reservation, a_measurement, a_session, a_transaction, a_governed_session]
)
def test_it_keeps_the_cleanup_contract(make: Any, way: Way, databases: Any) -> None:
    with ExitStack() as stack:
        way(make(stack, databases))


CLAIMS = [
    *["`: exited c, b, a; raised OSError, with `__context__` ZeroDivisionError."] * 3,
    "✗ `check_then_call`: 10 of 10 sent; spent $0.004125, 412% of the limit.",
    "✓ `reserve_then_call`: 1 of 10 sent; spent $0.0004125, 41% of the limit.",
    "✗ `give_back`: 6 sent; billed by the provider: $90, by the budget: $0.",
    *["agent refuses"] * 4,
    "✓ `keep_open`: 2 sent; billed by the provider: $30, by the budget: $40.",
    "✗ `by_hand` measures 18 of 20 calls.",
    "20 │ 2 │ 10 ms │ 100 ms │ 100 ms",
    "✓ `measured` measures 20 of 20 calls.",
    "the second conversation: database is locked",
    "✗ `ask_in_transaction`: turns in the file: first.",
    "✓ `GovernedSession.ask`: turns in the file: second, first.",
]


def test_the_demos_show_what_their_lessons_claim(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 6):
        chapter.play(number)
    rest = " ".join(capsys.readouterr().out.split())
    for claim in CLAIMS:  # in this order
        _before, found, rest = rest.partition(claim)
        assert found, claim
