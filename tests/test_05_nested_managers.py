"""Chapter 05: budgets that are never overspent, monitors, sessions, and the three as one."""

from __future__ import annotations

import argparse
import array
import asyncio
import copy
import decimal
import functools
import importlib.util
import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import SYNC_WAYS, Subject, Way

chapter: Any = load_chapter(5)
PAGE = "word" + " word" * 992  # 993 tokens; with the chat rule's 7 exactly 1,000


def ways(*unfit: str) -> pytest.MarkDecorator:
    """Every way out, without those that this manager cannot go (it has no fault, for one)."""
    fit = [way for way in SYNC_WAYS if way.__name__ not in unfit]
    return pytest.mark.parametrize("way", fit, ids=lambda way: way.__name__)


class FakeClock:
    """A clock that stands until it is told to go on."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def amounts(budget: Any) -> tuple[Any, Any]:
    balance = budget.balance()
    return balance.spent, balance.reserved


# --- What an amount is ---


@pytest.mark.parametrize("wrong", [0.25, True, "0.25", None, 1 + 2j])
def test_an_amount_is_a_decimal_or_an_int_and_never_a_float_or_bool(wrong: Any) -> None:
    with chapter.budget(1) as budget:
        refusing: list[Callable[[], Any]] = [
            lambda: chapter.budget(wrong),
            lambda: budget.child(wrong, "child"),
            lambda: budget.reserve(wrong),
        ]
        for refused in refusing:
            with pytest.raises(TypeError, match=r"pass an exact one, Decimal\('0.25'\)"):
                refused()
        with budget.reserve(1) as held:
            with pytest.raises(TypeError, match="the actual cost is"):
                held.settle(wrong)
            held.settle(0)
        assert amounts(budget) == (0, 0)


@pytest.mark.parametrize("wrong", ["-0.01", "NaN", "sNaN", "Infinity", "-Infinity", "1000000"])
def test_an_amount_is_finite_not_negative_and_below_a_million(wrong: str) -> None:
    with chapter.budget(1) as budget:
        refusing: list[Callable[[], Any]] = [
            lambda: chapter.budget(Decimal(wrong)),
            lambda: budget.reserve(Decimal(wrong)),
        ]
        for refused in refusing:
            with pytest.raises(ValueError, match="pass dollars from 0 to below a million"):
                refused()
        with budget.reserve(1) as held:
            with pytest.raises(ValueError, match="the actual cost is"):
                held.settle(Decimal(wrong))
            assert held.actual is None
            held.settle(0)


def test_what_is_finer_than_a_picodollar_is_rounded_up_so_that_sums_are_exact() -> None:
    with chapter.budget(1) as budget:
        for _each in range(3):
            with budget.reserve(Decimal(1) / 3) as held:
                held.settle(Decimal("0.0000000000001"))
        assert amounts(budget) == (Decimal("0.000000000003"), 0)


def test_sums_are_exact_in_a_thread_whose_decimal_context_rounds() -> None:
    with chapter.budget(100) as budget, decimal.localcontext(prec=3):
        for _each in range(10):
            with budget.reserve(Decimal("1.23456789")) as held:
                held.settle(Decimal("1.23456789"))
    assert budget.spent == Decimal("12.3456789")
    assert budget.reserved == 0


# --- Reserve before, settle after ---


def test_a_reservation_is_held_until_settling_gives_the_difference_back_at_once() -> None:
    with chapter.budget(Decimal("1.00"), "team") as budget:
        with budget.reserve(Decimal("0.40")) as held:
            assert amounts(budget) == (0, Decimal("0.40"))
            assert budget.remaining == Decimal("0.60")
            held.settle(Decimal("0.15"))
            assert amounts(budget) == (Decimal("0.15"), 0)
        assert amounts(budget) == (Decimal("0.15"), 0)
        assert budget.remaining == Decimal("0.85")
        assert (held.worst_case, held.actual) == (Decimal("0.40"), Decimal("0.15"))


def test_all_of_the_limit_can_be_reserved_and_nothing_above_it() -> None:
    with chapter.budget(1) as budget:
        with budget.reserve(1):
            with pytest.raises(chapter.BudgetExceededError), budget.reserve(Decimal("1e-12")):
                pass
            with budget.reserve(0) as free:
                free.settle(0)


def test_what_does_not_fit_names_the_level_what_is_left_and_what_was_asked() -> None:
    with chapter.budget(1, "team") as team, team.child(Decimal("0.50"), "agent") as agent:
        with agent.reserve(Decimal("0.30")) as held:
            with pytest.raises(chapter.BudgetExceededError) as caught:
                with agent.reserve(Decimal("0.25")):
                    pytest.fail("reserved more than is left")
            held.settle(Decimal("0.30"))
    error = caught.value
    assert (error.name, error.asked) == ("agent", Decimal("0.25"))
    assert error.balance.remaining == Decimal("0.20")
    assert str(error) == (
        "budget 'agent': $0.25 was asked, and $0.2 is left of $0.5, with $0.3 reserved by calls "
        "under way: wait for those, ask for a shorter answer, or raise the limit"
    )


def test_the_error_survives_the_way_home_from_another_process() -> None:
    with chapter.budget(1) as budget, pytest.raises(chapter.BudgetExceededError) as caught:
        budget.reserve(2).__enter__()
    for travelled in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert str(travelled) == str(caught.value)
        assert travelled.asked == 2


def test_a_refused_reservation_changes_nothing_on_any_level() -> None:
    with chapter.budget(1, "team") as team:
        with team.child(3, "agent") as agent, agent.child(3, "step") as step:
            with pytest.raises(chapter.BudgetExceededError) as caught, step.reserve(2):
                pass
            assert caught.value.name == "team"
            assert [amounts(level) for level in (team, agent, step)] == [(0, 0)] * 3


def test_a_reservation_counts_in_every_ancestor() -> None:
    with chapter.budget(5, "team") as team, team.child(4, "agent") as agent:
        with agent.child(3, "step") as step, step.reserve(2) as held:
            assert [amounts(level) for level in (team, agent, step)] == [(0, 2)] * 3
            held.settle(1)
        assert [amounts(level) for level in (team, agent, step)] == [(1, 0)] * 3


def test_a_child_is_a_cap_and_sets_nothing_aside() -> None:
    with chapter.budget(2, "team") as team:
        with team.child(2, "first") as first, team.child(2, "second") as second:
            assert team.remaining == 2
            with first.reserve(2):
                with pytest.raises(chapter.BudgetExceededError) as caught, second.reserve(1):
                    pass
                assert caught.value.name == "team"
                assert second.remaining == 2  # its own; only reserve knows of the team's


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_an_exception_gives_back_what_was_not_spent(error: type[BaseException]) -> None:
    with chapter.budget(1, "team") as team, team.child(1, "agent") as agent:
        with pytest.raises(error), agent.reserve(1):
            raise error
        assert [amounts(level) for level in (team, agent)] == [(0, 0)] * 2


def test_what_was_settled_before_an_exception_stays_spent() -> None:
    with chapter.budget(1) as budget:
        with pytest.raises(ValueError), budget.reserve(1) as held:  # noqa: PT011
            held.settle(Decimal("0.25"))
            raise ValueError
        assert amounts(budget) == (Decimal("0.25"), 0)


@pytest.mark.asyncio
async def test_a_cancelled_task_gives_back_what_was_not_spent() -> None:
    with chapter.budget(1) as budget:
        inside = asyncio.Event()

        async def call() -> None:
            with budget.reserve(1):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(call())
        await inside.wait()
        assert amounts(budget) == (0, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert amounts(budget) == (0, 0)


def test_a_block_that_ends_well_without_settling_counts_as_its_worst_case(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with chapter.budget(1) as budget:
        with budget.reserve(Decimal("0.4")) as held:
            pass
        assert amounts(budget) == (Decimal("0.4"), 0)
        assert held.actual == Decimal("0.4")
    assert caplog.messages == ["never settled: all of $0.4 counts as spent"]


def test_settling_above_the_reserve_is_recorded_truthfully_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with chapter.budget(1, "team") as team, team.child(1, "agent") as agent:
        with agent.reserve(Decimal("0.9")) as held:
            held.settle(Decimal("1.1"))
        for level in (team, agent):
            assert amounts(level) == (Decimal("1.1"), 0)
            assert level.remaining == Decimal("-0.1")
            assert level.overrun == Decimal("0.2")
        with pytest.raises(chapter.BudgetExceededError, match=r"\$-0.1 is left"):
            agent.reserve(0).__enter__()
        with chapter.budget(1) as other, other.reserve(1) as cheap:
            cheap.settle(0)
        assert other.overrun == 0
    assert caplog.messages == ["reserved $0.9, but the call cost $1.1"]


def test_settling_within_the_reserve_reports_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with chapter.budget(1) as budget, budget.reserve(1) as held:
        held.settle(1)
    assert budget.overrun == 0
    assert not caplog.messages


def test_a_second_settle_and_one_after_the_block_are_refused() -> None:
    with chapter.budget(3) as budget:
        with budget.reserve(1) as held:
            held.settle(Decimal("0.5"))
            with pytest.raises(RuntimeError, match=r"settled at \$0.5: settle once"):
                held.settle(Decimal("0.5"))
        with pytest.raises(RuntimeError, match=r"settled at \$0.5: settle once, inside its block"):
            held.settle(0)
        with suppress(ValueError), budget.reserve(1) as given_back:
            raise ValueError
        with pytest.raises(RuntimeError, match=r"settled at \$0: "):
            given_back.settle(1)
        with pytest.raises(RuntimeError, match="this reservation is not made: settle once, inside"):
            budget.reserve(1).settle(1)
        assert amounts(budget) == (Decimal("0.5"), 0)


def test_a_reservation_serves_one_call() -> None:
    with chapter.budget(3) as budget, budget.reserve(1) as held:
        with pytest.raises(RuntimeError, match="serves one call: reserve again for another"), held:
            pass
        assert amounts(budget) == (0, 1)
        held.settle(1)
        with pytest.raises(RuntimeError, match="serves one call"), held:
            pass


def test_a_budget_takes_no_reservation_outside_its_block_or_that_of_its_parent() -> None:
    with chapter.budget(1, "team") as team:
        early = team.child(1, "early")
        with team.child(1, "agent") as agent:
            pass
        orphan = team.child(1, "orphan")
        for name, outside in (("early", early), ("agent", agent)):
            with pytest.raises(RuntimeError, match=f"Budget '{name}' is not open: use it inside"):
                outside.reserve(1).__enter__()
    with pytest.raises(RuntimeError, match="Budget 'team' is not open"), orphan, orphan.reserve(1):
        pass
    assert amounts(team) == (0, 0)


@pytest.mark.parametrize("kind", ["budget", "monitor", "session"])
def test_what_is_open_is_not_opened_a_second_time_and_stays_open(kind: str) -> None:
    arguments = {"budget": (1, "one"), "monitor": ("one",), "session": ("one",)}[kind]
    given = {"client": stand_in()} if kind == "session" else {}
    with getattr(chapter, kind)(*arguments, **given) as opened:
        with pytest.raises(RuntimeError, match="'one' is open already: open another one"):
            opened.__enter__()
        opened.check_open()


def test_what_was_reserved_in_time_can_settle_after_the_budget_closed() -> None:
    with ExitStack() as late:
        with chapter.budget(1) as budget:
            held = late.enter_context(budget.reserve(1))
        held.settle(Decimal("0.75"))
    assert amounts(budget) == (Decimal("0.75"), 0)


# --- Steps that nobody can divide ---


class Meeting:
    """Runs two threads so that the second one gets its chance in the middle of the first.

    The first calls `pause` there, and waits for the second to end. Where a lock keeps the second
    out, it cannot: then the first goes on after a moment.
    """

    def __init__(self) -> None:
        self.paused, self.other_ended = threading.Event(), threading.Event()

    def pause(self) -> None:
        if not self.paused.is_set():
            self.paused.set()
            self.other_ended.wait(0.1)

    def run(self, first: Callable[[], object], second: Callable[[], object]) -> list[Any]:
        """The error of each, or None."""

        def come_second() -> None:
            assert self.paused.wait(10)
            try:
                second()
            finally:
                self.other_ended.set()

        with ThreadPoolExecutor(2) as pool:
            return [each.exception() for each in (pool.submit(first), pool.submit(come_second))]

    def amount(self) -> Decimal:
        """Zero dollars, in the middle of whose addition the first thread pauses."""
        meeting = self

        class Pausing(Decimal):
            def __add__(self, other: Any) -> Decimal:
                meeting.pause()
                return Decimal(Decimal(self) + other)

        return Pausing()


def test_two_threads_cannot_reserve_the_same_money() -> None:
    meeting = Meeting()
    with chapter.budget(1) as budget:
        budget.spent = meeting.amount()
        errors = meeting.run(budget.reserve(1).__enter__, budget.reserve(1).__enter__)
        assert [type(error) for error in errors] == [type(None), chapter.BudgetExceededError]
        assert amounts(budget) == (0, 1)


def test_two_children_cannot_reserve_the_same_money_of_their_parent() -> None:
    meeting = Meeting()
    with chapter.budget(1) as team, team.child(1, "a") as first, team.child(1, "b") as second:
        team.spent = meeting.amount()
        errors = meeting.run(first.reserve(1).__enter__, second.reserve(1).__enter__)
        assert [type(error) for error in errors] == [type(None), chapter.BudgetExceededError]
        assert amounts(team) == (0, 1)


def test_two_settlements_at_once_are_both_recorded() -> None:
    meeting = Meeting()
    with chapter.budget(2) as budget, budget.reserve(1) as first, budget.reserve(1) as second:
        budget.spent = meeting.amount()
        assert meeting.run(lambda: first.settle(1), lambda: second.settle(1)) == [None, None]
        assert amounts(budget) == (2, 0)


def test_of_two_threads_that_settle_one_reservation_one_is_refused() -> None:
    meeting = Meeting()
    with chapter.budget(2) as budget, budget.reserve(1) as held:
        budget.spent = meeting.amount()
        errors = meeting.run(lambda: held.settle(1), lambda: held.settle(1))
        assert [type(error) for error in errors] == [type(None), RuntimeError]
        assert amounts(budget) == (1, 0)


def test_two_measurements_at_once_are_both_counted() -> None:
    meeting = Meeting()

    class Pausing(Counter[str]):
        def __getitem__(self, key: str) -> int:
            errors = super().__getitem__(key)
            meeting.pause()
            return errors

    with chapter.monitor("m") as monitor:
        monitor._errors = Pausing()

        def fail() -> None:
            with suppress(ValueError), monitor.measure("ask"):
                raise ValueError

        assert meeting.run(fail, fail) == [None, None]
        assert monitor.report()["ask"].errors == 2


def test_two_threads_that_need_the_encoding_at_once_load_it_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = Meeting()
    seen: list[str] = []

    def get_encoding(name: str) -> None:
        meeting.pause()
        seen.append(os.environ["TIKTOKEN_CACHE_DIR"])

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    load = chapter.encoding.__wrapped__
    assert meeting.run(load, load) == [None, None]
    assert len(seen) == 2
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


# --- Storms ---


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns every few bytecodes: a lock that is missing shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def three_deep() -> Iterator[tuple[list[Any], list[Any]]]:
    """A budget with two children with two children each: all levels, and the leaves."""
    with ExitStack() as stack:
        team = stack.enter_context(chapter.budget(10, "team"))
        agents = [stack.enter_context(team.child(6, f"agent {n}")) for n in range(2)]
        steps = [
            stack.enter_context(agent.child(4, f"{agent.name}, step {n}"))
            for agent in agents
            for n in range(2)
        ]
        yield [team, *agents, *steps], steps


def assert_never_overspent(levels: list[Any]) -> None:
    for level in levels:
        balance = level.balance()
        assert 0 <= balance.spent + balance.reserved <= balance.limit, (level.name, balance)
        assert balance.reserved >= 0


def assert_books_agree(levels: list[Any], paid: list[Decimal]) -> None:
    team, agents, steps = levels[0], levels[1:3], levels[3:]
    assert all(level.reserved == 0 for level in levels)
    assert team.spent == sum(paid) == sum(agent.spent for agent in agents)
    assert [agent.spent for agent in agents] == [
        steps[0].spent + steps[1].spent,
        steps[2].spent + steps[3].spent,
    ]


class Failure(Exception):
    """What a call in a storm fails with."""


def storm_call(chance: random.Random, paid: list[Decimal]) -> Callable[[Any], None]:
    """One call's outcome, drawn beforehand: settle at random, fail before or after, or forget."""
    outcome, share = chance.random(), chance.randrange(101)

    def ends(held: Any) -> None:
        if outcome < 0.2:
            raise Failure
        if outcome < 0.3:
            paid.append(held.worst_case)  # never settled
            return
        cost = held.worst_case * share / 100
        held.settle(cost)
        paid.append(cost)
        if outcome < 0.4:
            raise Failure

    return ends


@pytest.mark.usefixtures("frequent_switches")
def test_fifty_threads_in_a_storm_never_overspend_on_any_of_three_levels() -> None:
    paid: list[Decimal] = []
    refused: list[str] = []

    def storm(seed: int, levels: list[Any], steps: list[Any], start: threading.Barrier) -> None:
        chance = random.Random(seed)
        start.wait()
        for _each in range(20):
            ends = storm_call(chance, paid)
            try:
                with chance.choice(steps).reserve(Decimal(chance.randrange(1, 100)) / 100) as held:
                    assert_never_overspent(levels)
                    ends(held)
            except chapter.BudgetExceededError as error:
                refused.append(error.name)
            except Failure:
                pass
            assert_never_overspent(levels)

    with three_deep() as (levels, steps), ThreadPoolExecutor(50) as pool:
        start = threading.Barrier(50, timeout=10)
        storms = [pool.submit(storm, seed, levels, steps, start) for seed in range(50)]
        for each in storms:
            each.result()
        assert_books_agree(levels, paid)
    assert any(name == "team" for name in refused)
    assert any("step" in name for name in refused)


@pytest.mark.asyncio
async def test_five_hundred_tasks_in_a_storm_never_overspend_on_any_of_three_levels() -> None:
    chance = random.Random(5)
    paid: list[Decimal] = []
    refused: list[str] = []

    async def call(step: Any, worst_case: Decimal, ends: Callable[[Any], None]) -> None:
        for _turn in range(chance.randrange(5)):
            await asyncio.sleep(0)
        try:
            with step.reserve(worst_case) as held:
                for _turn in range(chance.randrange(5)):
                    await asyncio.sleep(0)
                    assert_never_overspent(levels)
                ends(held)
        except chapter.BudgetExceededError as error:
            refused.append(error.name)
        except Failure:
            pass

    with three_deep() as (levels, steps):
        tasks = [
            asyncio.create_task(
                call(
                    chance.choice(steps),
                    Decimal(chance.randrange(1, 100)) / 100,
                    storm_call(chance, paid),
                )
            )
            for _each in range(500)
        ]
        while running := [task for task in tasks if not task.done()]:
            chance.choice(running).cancel()
            await asyncio.sleep(0)
            assert_never_overspent(levels)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError}
        assert asyncio.CancelledError in {type(end) for end in ended}
        assert_books_agree(levels, paid)
    assert refused


# --- Ten calls at once ---


class Counted:
    """The offline client, and how many requests reached its transport."""

    def __init__(self) -> None:
        self.client = chapter.offline_client()
        self.sent = 0
        inner = self.client._client._transport
        answer = inner.handler

        def counting(request: httpx2.Request) -> httpx2.Response:
            self.sent += 1
            response: httpx2.Response = answer(request)
            return response

        inner.handler = counting


@pytest.mark.usefixtures("frequent_switches")
def test_of_ten_threads_that_call_at_once_only_the_one_that_fits_sends() -> None:
    counted = Counted()
    start = threading.Barrier(10, timeout=10)

    def call(number: int) -> None:
        with chapter.session(f"call {number}", client=counted.client) as chat:
            worst_case = chat.worst_case(PAGE)
            start.wait()
            with budget.reserve(worst_case) as held:
                chat.ask(PAGE)
                held.settle(chat.cost)

    with (
        counted.client,
        chapter.budget(Decimal("0.0005")) as budget,
        ThreadPoolExecutor(10) as pool,
    ):
        calls = [pool.submit(call, number) for number in range(10)]
        errors = [type(each.exception()) for each in calls]
    assert counted.sent == 1
    assert errors.count(chapter.BudgetExceededError) == 9
    assert errors.count(type(None)) == 1
    assert amounts(budget) == (Decimal("0.00045"), 0)


# --- Shared by processes ---

CHILD = """
import pathlib, runpy, sys
from decimal import Decimal
chapter = runpy.run_path(sys.argv[1])
path, limit = pathlib.Path(sys.argv[2]), Decimal(sys.argv[3])
"""
SPENDS = (
    CHILD
    + """
import random
chance, paid, refused = random.Random(int(sys.argv[4])), Decimal(0), 0
with chapter["shared_budget"](path, limit, "team") as budget:
    print("ready", flush=True)
    sys.stdin.readline()
    for call in range(100):
        worst = Decimal(chance.randrange(1, 40)) / 100
        try:
            with budget.reserve(worst) as held:
                if call % 5 == 0:
                    balance = budget.balance()
                    assert balance.spent + balance.reserved <= balance.limit, balance
                    raise ZeroDivisionError
                cost = worst * chance.randrange(101) / 100
                held.settle(cost)
                paid += cost
        except ZeroDivisionError:
            pass
        except chapter["BudgetExceededError"]:
            refused += 1
print(paid, refused)
"""
)
DIES = (
    CHILD
    + """
with chapter["shared_budget"](path, limit, "team", lease=60) as budget, budget.reserve(limit):
    print("reserved", flush=True)
    sys.stdin.readline()
"""
)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, chapter.__file__, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_four_processes_that_each_try_a_hundred_calls_never_overspend_together() -> None:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a file, but no disk to wait for
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)), "ledger.db")
        children = [stack.enter_context(child(SPENDS, path, 2, seed)) for seed in range(4)]
        for each in children:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda each: each.communicate("go\n"), children))
        with chapter.shared_budget(path, 2, "team") as budget:
            balance = budget.balance()
    assert [
        (each.returncode, errors) for each, (_paid, errors) in zip(children, outputs, strict=True)
    ] == [(0, "")] * 4
    paid = [Decimal(output.split()[0]) for output, _errors in outputs]
    refused = [int(output.split()[1]) for output, _errors in outputs]
    assert sum(refused) > 0
    assert balance.reserved == 0
    assert balance.spent == sum(paid) <= balance.limit


def test_the_reservation_of_a_killed_process_is_recovered_when_its_lease_expires(
    tmp_path: Path,
) -> None:
    path, clock = tmp_path / "ledger.db", FakeClock()
    with child(DIES, path, 1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    [[expires]] = rows(path, "SELECT expires FROM lease")
    with chapter.shared_budget(path, 1, "team", clock=clock) as budget:
        clock.now = expires - 0.001
        with pytest.raises(chapter.BudgetExceededError, match=r"\$1 reserved"):
            budget.reserve(1).__enter__()
        clock.now = expires
        assert amounts(budget) == (0, 0)
        with budget.reserve(1) as held:
            held.settle(1)
    assert rows(path, "SELECT * FROM lease") == []


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def shared(tmp_path: Path, clock: FakeClock) -> Iterator[Any]:
    with chapter.shared_budget(tmp_path / "ledger.db", 1, "team", 60.0, clock) as budget:
        yield budget


def test_a_shared_budget_reserves_settles_and_gives_back_as_budget_does(shared: Any) -> None:
    with shared.reserve(Decimal("0.40")) as held:
        assert amounts(shared) == (0, Decimal("0.40"))
        held.settle(Decimal("0.15"))
        assert amounts(shared) == (Decimal("0.15"), 0)
    with pytest.raises(KeyboardInterrupt), shared.reserve(Decimal("0.85")):
        assert shared.balance().remaining == 0
        with pytest.raises(chapter.BudgetExceededError) as caught, shared.reserve(Decimal("1e-12")):
            pass
        raise KeyboardInterrupt
    assert amounts(shared) == (Decimal("0.15"), 0)
    assert (caught.value.name, caught.value.balance.reserved) == ("team", Decimal("0.85"))
    with shared.reserve(Decimal("0.05")):
        pass
    assert amounts(shared) == (Decimal("0.20"), 0)


def test_a_call_that_outlives_its_lease_is_still_paid_and_reported(
    shared: Any, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with shared.reserve(1) as slow:
        clock.now += 60
        with shared.reserve(1) as other:  # the lease has expired, so there is room again
            slow.settle(1)
            assert amounts(shared) == (1, 1)  # the truth: more than the limit may be spent
            other.settle(0)
    assert amounts(shared) == (1, 0)
    assert caplog.messages == ["a lease of budget 'team' expired in mid-call: lease longer"]


def test_the_number_of_an_expired_lease_is_never_given_to_another(
    shared: Any, clock: FakeClock
) -> None:
    with shared.reserve(Decimal("0.5")) as slow:
        clock.now += 60
        assert amounts(shared) == (0, 0)
        with shared.reserve(Decimal("0.25")) as other:
            slow.settle(Decimal("0.1"))
            assert amounts(shared) == (Decimal("0.1"), Decimal("0.25"))
            other.settle(Decimal("0.2"))
    assert amounts(shared) == (Decimal("0.3"), 0)


def test_two_names_in_one_file_are_two_budgets(shared: Any, clock: FakeClock) -> None:
    with chapter.shared_budget(shared.path, 2, "guests", 30.0, clock) as guests:
        with guests.reserve(2), shared.reserve(1):
            clock.now += 30  # the guests' lease is over, not the team's
            assert amounts(guests) == (0, 0)
            assert amounts(shared) == (0, 1)


def test_what_was_spent_is_known_when_the_file_is_opened_again(shared: Any) -> None:
    with shared.reserve(1) as held:
        held.settle(Decimal("0.123456789012"))
    with chapter.shared_budget(shared.path, 1, "team") as again:
        assert amounts(again) == (Decimal("0.123456789012"), 0)


def test_another_limit_for_a_known_name_is_refused(shared: Any) -> None:
    with pytest.raises(ValueError, match=r"limits 'team' to \$1: open it so"):
        chapter.shared_budget(shared.path, 2, "team").__enter__()
    assert shared.balance().limit == 1


def test_a_refusal_tells_the_balance_that_refused_it(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moment later there may be room: an error that tells of that would contradict itself."""
    held = shared.reserve(Decimal("0.9"))
    held.__enter__()
    real = shared.balance

    def a_moment_later() -> Any:
        held.settle(0)
        return real()

    monkeypatch.setattr(shared, "balance", a_moment_later)
    with pytest.raises(chapter.BudgetExceededError) as refused, shared.reserve(1):
        pytest.fail("there was room")
    assert refused.value.balance.reserved == Decimal("0.9")


def test_a_closed_shared_budget_takes_no_reservation_but_settles(tmp_path: Path) -> None:
    with ExitStack() as late:
        with chapter.shared_budget(tmp_path / "ledger.db", 1, "team") as budget:
            held = late.enter_context(budget.reserve(1))
        with pytest.raises(RuntimeError, match="SharedBudget 'team' is not open"):
            budget.reserve(0).__enter__()
        held.settle(Decimal("0.5"))
    assert amounts(budget) == (Decimal("0.5"), 0)


def test_a_settlement_that_could_not_be_written_can_be_tried_again(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared.reserve(1) as held:
        with monkeypatch.context() as patch:
            patch.setattr(chapter, "BOOK", "this is no SQL")
            with pytest.raises(sqlite3.OperationalError):
                held.settle(Decimal("0.5"))
        assert amounts(shared) == (0, 1)
        held.settle(Decimal("0.5"))
    assert amounts(shared) == (Decimal("0.5"), 0)


def test_a_shared_budget_closes_every_connection_that_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recording(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", recording)
    with chapter.shared_budget(tmp_path / "ledger.db", 1, "team") as budget:
        with suppress(ValueError), budget.reserve(1):
            raise ValueError
        with suppress(chapter.BudgetExceededError), budget.reserve(2):
            pass
        budget.balance()
    assert len(opened) >= 5
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_threads_share_one_open_shared_budget(shared: Any) -> None:
    def call(_number: int) -> bool:
        try:
            with shared.reserve(Decimal("0.3")) as held:
                held.settle(Decimal("0.3"))
        except chapter.BudgetExceededError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(call, range(4))) == [False, True, True, True]
    assert amounts(shared) == (Decimal("0.9"), 0)


# --- Monitors ---


class Steps:
    """A clock that is read twice for each measurement, which then takes the next duration."""

    def __init__(self, *durations: float) -> None:
        self.times = [time for each in durations for time in (100.0, 100.0 + each)]

    def __call__(self) -> float:
        return self.times.pop(0)


def test_a_report_has_calls_errors_total_and_percentiles_by_operation() -> None:
    durations = [float(n) for n in range(1, 21)]
    random.Random(1).shuffle(durations)
    with chapter.monitor("m", clock=Steps(*durations, 7.0)) as monitor:
        for _each in durations:
            with monitor.measure("ask"):
                pass
        with monitor.measure("save"):
            pass
    report = monitor.report()
    assert report["ask"] == (20, 0, 210.0, 10.0, 19.0, 20.0)
    assert report["ask"]._fields == ("calls", "errors", "total", "p50", "p95", "maximum")
    assert report["save"] == (1, 0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 99, 100, 101])
def test_a_percentile_is_the_least_duration_that_so_many_do_not_exceed(count: int) -> None:
    durations = [float(n) for n in range(count)]
    statistics = chapter.summary(array.array("d", durations[::-1]), 0)
    for percent, found in ((50, statistics.p50), (95, statistics.p95)):
        enough = [n for n in durations if 100 * sum(d <= n for d in durations) >= percent * count]
        assert found == min(enough)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_failure_is_timed_counted_and_passed_on(error: type[BaseException]) -> None:
    with chapter.monitor("m", clock=Steps(1.0, 2.0)) as monitor:
        with monitor.measure("ask"):
            pass
        with pytest.raises(error), monitor.measure("ask"):
            raise error
        assert monitor.report() == {"ask": (2, 1, 3.0, 1.0, 2.0, 2.0)}


def test_a_nested_monitor_reports_to_its_parents_at_once() -> None:
    with chapter.monitor("run", clock=Steps(1.0, 2.0, 4.0)) as run, run.child("agent") as agent:
        with agent.child("step") as step:
            with step.measure("ask"):
                pass
            with suppress(ValueError), agent.measure("ask"):
                raise ValueError
            with run.measure("ask"):
                pass
            totals = [monitor.report()["ask"][:3] for monitor in (run, agent, step)]
    assert totals == [(3, 1, 7.0), (2, 1, 3.0), (1, 0, 1.0)]


def test_a_closed_monitor_measures_nothing_but_keeps_its_report() -> None:
    with chapter.monitor("m") as monitor, monitor.measure("ask"):
        pass
    with pytest.raises(RuntimeError, match="Monitor 'm' is not open: use it inside"):
        monitor.measure("ask").__enter__()
    assert monitor.report()["ask"].calls == 1


def test_a_kept_duration_takes_eight_bytes() -> None:
    with chapter.monitor("m", Steps(*[1.0] * 1000)) as watched:
        for _call in range(1000):
            with watched.measure("ask"):
                pass
        assert watched._taken["ask"].itemsize == 8
        assert watched.report()["ask"].total == 1000


@pytest.mark.usefixtures("frequent_switches")
def test_threads_lose_no_measurement() -> None:
    with chapter.monitor("m") as monitor, ThreadPoolExecutor(8) as pool:

        def measure(_number: int) -> None:
            with suppress(ValueError), monitor.measure("ask"):
                raise ValueError

        list(pool.map(measure, range(400)))
        assert monitor.report()["ask"][:2] == (400, 400)


class FakeTrace:
    """As much of opentelemetry.trace as a monitor uses; it notes each span's life."""

    def __init__(self) -> None:
        self.spans: list[str] = []

    def get_tracer(self, _name: str) -> FakeTrace:
        return self

    @contextmanager
    def start_as_current_span(self, name: str) -> Iterator[None]:
        self.spans.append(f"start {name}")
        try:
            yield
        except BaseException as error:
            self.spans.append(f"error {name}: {error!r}")
            raise
        finally:
            self.spans.append(f"end {name}")


def test_a_measurement_is_an_opentelemetry_span_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrace()
    monkeypatch.setattr(chapter, "start_span", fake.start_as_current_span)
    with chapter.monitor("m") as monitor, suppress(ValueError), monitor.measure("outer"):
        with monitor.measure("inner"):
            pass
        raise ValueError
    assert fake.spans == [
        "start m/outer",
        "start m/inner",
        "end m/inner",
        "error m/outer: ValueError()",
        "end m/outer",
    ]


@pytest.mark.parametrize("installed", [False, True])
def test_opentelemetry_is_optional(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = types.ModuleType("opentelemetry.trace")
    fake = FakeTrace()
    trace.get_tracer = fake.get_tracer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opentelemetry", types.ModuleType("opentelemetry"))
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace if installed else None)
    spec = importlib.util.spec_from_file_location("chapter_05_again", chapter.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    with again.monitor("m") as monitor, monitor.measure("ask"):
        pass
    assert fake.spans == (["start m/ask", "end m/ask"] if installed else [])
    assert monitor.report()["ask"].calls == 1


# --- Sessions ---

COOKBOOK = """\
system||You are a helpful, pattern-following assistant that translates corporate jargon into plain \
English.
system|example_user|New synergies will help drive top-line growth.
system|example_assistant|Things working well together will increase revenue.
system|example_user|Let's circle back when we have more bandwidth to touch base on opportunities \
for increased leverage.
system|example_assistant|Let's talk later when we're less busy about how to do better.
user||This late pivot means we don't have time to boil the ocean for the client deliverable."""


def test_tokens_are_counted_as_the_api_counted_the_cookbooks_conversation() -> None:
    messages = [
        {"role": role, "content": content} | ({"name": name} if name else {})
        for role, name, content in (line.split("|") for line in COOKBOOK.splitlines())
    ]
    assert chapter.count_tokens(messages) == 124
    assert chapter.count_tokens([{"role": "user", "content": PAGE}]) == 1000
    assert chapter.count_tokens([{"role": "user", "content": "<|endoftext|>"}]) > 8


def test_the_encoding_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "/a/cache/of/the/users"):
        if before is None:
            monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", before)
        encoding = chapter.encoding.__wrapped__()
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == before
    assert encoding.encode("hello world") == [24912, 2375]


def test_an_encoding_that_cannot_be_loaded_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/a/cache/of/the/users")
    monkeypatch.setattr("tiktoken.get_encoding", {}.__getitem__)
    with pytest.raises(KeyError):
        chapter.encoding.__wrapped__()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "/a/cache/of/the/users"


def test_prices_are_the_published_ones() -> None:
    assert chapter.price("gpt-4o-mini", 1000, 500) == Decimal("0.00045")
    assert chapter.price("gpt-4o-mini", 1234, 567, cached=1000) == Decimal("0.0004503")
    assert chapter.price("gpt-4o", 1000, 100) == Decimal("0.0035")


def test_a_session_counts_what_its_calls_really_cost() -> None:
    with (
        chapter.offline_client() as client,
        chapter.session("review", client=client, longest=5) as chat,
    ):
        assert chat.ask("one two three") == "one two three"
        first = chapter.price("gpt-4o-mini", 10, 3)
        assert chat.cost == first
        worst_case = chat.worst_case("four five six seven eight nine")
        assert chat.ask("four five six seven eight nine") == "four five six seven eight"
        assert chat.cost == first + worst_case  # this answer was as long as it could be
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_a_session_closes_the_client_that_it_made_and_not_one_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1/")
    with chapter.session("own") as chat:
        assert str(chat._client.base_url) == "http://localhost:11434/v1/"
    with pytest.raises(RuntimeError, match="Session 'own' is not open: use it inside"):
        chat.ask("hello")
    assert chat._client.is_closed()
    with chapter.offline_client() as client:
        with chapter.session("guest", client=client) as chat:
            chat.ask("hello")
        with pytest.raises(RuntimeError, match="is not open"):
            chat.ask("hello")
        assert not client.is_closed()


def answering(*replies: dict[str, Any]) -> tuple[openai.OpenAI, list[Any]]:
    """A client whose server gives these replies, in turn; and what it was asked."""
    left, asked = list(replies), []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        reply = left.pop(0)
        return httpx2.Response(reply.pop("status", 200), json=reply)

    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(api_key="test", http_client=httpx2.Client(transport=transport)), asked


def completion(usage: dict[str, Any] | None, choices: int = 1) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return {**head, "choices": [choice] * choices, "usage": usage}


USAGE = {"prompt_tokens": 1234, "completion_tokens": 567, "total_tokens": 1801}


def test_cached_tokens_are_paid_at_their_own_price() -> None:
    client, asked = answering(
        completion({**USAGE, "prompt_tokens_details": {"cached_tokens": 1000}}),
    )
    with client, chapter.session("s", client=client, longest=600) as chat:
        chat.ask("hello")
    assert chat.cost == Decimal("0.0004503")
    assert asked[0]["max_completion_tokens"] == 600


def test_a_reply_without_usage_costs_the_worst_case() -> None:
    client, _asked = answering(completion(None))
    with client, chapter.session("s", client=client) as chat:
        worst_case = chat.worst_case("hello")
        chat.ask("hello")
    assert chat.cost == worst_case > 0


def test_a_failed_call_is_not_tried_again_behind_the_budgets_back() -> None:
    client, asked = answering({"status": 500}, completion(USAGE))
    with client, chapter.session("s", client=client) as chat:
        with pytest.raises(openai.InternalServerError):
            chat.ask("hello")
        assert (len(asked), chat.messages, chat.cost) == (1, [], 0)
        chat.ask("hello again")
        assert len(chat.messages) == 2


def test_a_model_without_a_price_is_an_error_or_priced_as_one_that_has_it() -> None:
    refused = "the price of 'llama3' is unknown: name a model with a known one as priced_as"
    with pytest.raises(LookupError, match=refused), chapter.session("s", model="llama3"):
        pass
    with (
        chapter.offline_client() as client,
        chapter.session("s", model="llama3", client=client, priced_as="gpt-4o-mini") as chat,
    ):
        chat.ask("hello")
    assert chat.cost > 0


# --- The four as one ---


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "turns.db")) as connection:
        yield connection


@functools.cache
def stand_in() -> openai.OpenAI:
    """One client for many sessions; it has no socket, and nothing to close."""
    client: openai.OpenAI = chapter.offline_client()
    return client


class Governed:
    """A governed session whose four layers can be looked at afterwards."""

    def __init__(self, database: sqlite3.Connection, client: Any = None) -> None:
        self.database = database
        self.budget = chapter.budget(1, "review")
        self.monitor = chapter.monitor("review")
        self.chat = chapter.session("review", client=client or stand_in())

    def open(self) -> AbstractContextManager[Any]:
        manager: AbstractContextManager[Any] = chapter.governed_session(
            self.budget, self.monitor, chapter.transaction(self.database), self.chat
        )
        return manager

    def turns(self) -> list[Any]:
        try:
            return self.database.execute("SELECT * FROM turn").fetchall()
        except sqlite3.OperationalError:
            return []

    def leaks(self) -> list[str]:
        """Which layers were not cleaned up."""
        left = {
            "the budget is open": self.budget.is_open,
            "money is reserved": self.budget.reserved,
            "the monitor is open": self.monitor.is_open,
            "the transaction is open": self.database.in_transaction,
            "the session is open": self.chat.is_open,
        }
        return [what for what, is_left in left.items() if is_left]


def test_a_governed_call_is_paid_measured_and_kept(database: sqlite3.Connection) -> None:
    governed = Governed(database)
    with governed.open() as review:
        assert review.ask("hello world") == "hello world"
        assert governed.budget.reserved == 0
    assert governed.leaks() == []
    assert governed.budget.spent == governed.chat.cost == chapter.price("gpt-4o-mini", 9, 2)
    assert governed.monitor.report()["ask"][:2] == (1, 0)
    assert governed.turns() == [("review", "hello world", "hello world")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_innermost_block_passes_every_layer_and_each_does_its_part(
    error: type[BaseException], database: sqlite3.Connection
) -> None:
    governed = Governed(database)
    with pytest.raises(error), governed.open() as review:
        review.ask("hello world")
        with review.budget.reserve(Decimal("0.5")), review.monitor.measure("think"):
            raise error
    assert governed.leaks() == []  # the reservation was given back, and every layer closed
    assert governed.monitor.report()["think"].errors == 1  # counted
    assert governed.turns() == []  # rolled back
    assert governed.budget.spent == governed.chat.cost > 0  # and what was spent is spent


def test_a_call_that_fails_is_counted_and_its_reserve_given_back(
    database: sqlite3.Connection,
) -> None:
    client, asked = answering({"status": 500}, completion(USAGE))
    governed = Governed(database, client)
    with client, governed.open() as review:
        with pytest.raises(openai.InternalServerError):
            review.ask("hello")
        assert amounts(governed.budget) == (0, 0)
        review.ask("hello")
    assert len(asked) == 2
    assert governed.monitor.report()["ask"][:2] == (2, 1)
    assert governed.budget.spent == chapter.price("gpt-4o-mini", 1234, 567)
    assert len(governed.turns()) == 1


def test_a_reply_that_is_of_no_use_was_paid_for_all_the_same(database: sqlite3.Connection) -> None:
    client, _asked = answering(completion(USAGE, choices=0))
    governed = Governed(database, client)
    with client, governed.open() as review, pytest.raises(IndexError):
        review.ask("hello")
    assert amounts(governed.budget) == (chapter.price("gpt-4o-mini", 1234, 567), 0)
    assert governed.monitor.report()["ask"].errors == 1


def test_what_does_not_fit_is_neither_sent_nor_measured_nor_kept(
    database: sqlite3.Connection,
) -> None:
    client, asked = answering()
    governed = Governed(database, client)
    governed.budget = chapter.budget(Decimal("0.0001"), "review")
    with client, governed.open() as review, pytest.raises(chapter.BudgetExceededError):
        review.ask("hello")
    assert (asked, governed.monitor.report(), governed.turns()) == ([], {}, [])


def test_a_governed_session_works_inside_other_budgets_and_monitors(
    database: sqlite3.Connection, shared: Any
) -> None:
    with chapter.budget(1, "team") as team, chapter.monitor("team") as meter:
        for name in ("first", "second"):
            with chapter.governed_session(
                team.child(1, name),
                meter.child(name),
                chapter.transaction(database),
                chapter.talk(name),
            ) as governed:
                governed.ask("hello")
    with chapter.governed_session(
        nullcontext(shared),
        chapter.monitor("m"),
        chapter.transaction(database),
        chapter.talk("third"),
    ) as governed:
        governed.ask("hello")
    shared.check_open()
    assert meter.report()["ask"].calls == 2
    assert team.spent == 2 * shared.balance().spent > 0
    turns = database.execute("SELECT session FROM turn").fetchall()
    assert turns == [("first",), ("second",), ("third",)]


class CleanupError(Exception):
    """What a layer's cleanup fails with."""


@contextmanager
def failing_on_exit(manager: AbstractContextManager[Any]) -> Iterator[Any]:
    with manager as value:
        try:
            yield value
        finally:
            raise CleanupError


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("body", [None, ValueError("raised in the body")])
def test_an_exception_in_one_layers_cleanup_stops_none_of_the_others(
    layer: int, body: Exception | None, database: sqlite3.Connection
) -> None:
    governed = Governed(database)
    transaction = chapter.transaction(database)
    layers = [governed.budget, governed.monitor, transaction, governed.chat]
    layers[layer] = failing_on_exit(layers[layer])
    with pytest.raises(CleanupError) as caught, chapter.governed_session(*layers) as review:
        review.ask("hello")
        if body is not None:
            raise body
    assert governed.leaks() == []
    assert caught.value.__context__ is body
    # Only what fails inside the transaction rolls it back; what fails outside comes too late.
    assert len(governed.turns()) == (0 if body or layer >= 2 else 1)


def test_a_transaction_has_the_write_lock_from_its_beginning(
    database: sqlite3.Connection, tmp_path: Path
) -> None:
    with chapter.transaction(database), closing(sqlite3.connect(tmp_path / "turns.db")) as other:
        other.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_a_transaction_inside_another_is_refused_and_leaves_the_outer_one_alone(
    database: sqlite3.Connection,
) -> None:
    with chapter.transaction(database):
        database.execute("CREATE TABLE t (n)")
        with pytest.raises(RuntimeError, match="in a transaction: commit it or roll it back"):
            chapter.transaction(database).__enter__()
        database.execute("INSERT INTO t VALUES (1)")
    assert database.execute("SELECT n FROM t").fetchall() == [(1,)]


def test_a_commit_that_fails_is_rolled_back_and_stops_no_other_layer(
    database: sqlite3.Connection,
) -> None:
    database.executescript("PRAGMA foreign_keys = ON; CREATE TABLE a (id INTEGER PRIMARY KEY);")
    database.execute("CREATE TABLE b (a REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
    governed = Governed(database)
    with pytest.raises(sqlite3.IntegrityError), governed.open() as review:
        review.ask("hello")
        review.connection.execute("INSERT INTO b VALUES (1)")
    assert governed.leaks() == []
    assert governed.turns() == []
    assert governed.budget.spent > 0


# --- The cleanup contract ---


def take_and_settle(budget: Any) -> None:
    with budget.reserve(1) as held:
        held.settle(1)


def measure_once(monitor: Any) -> None:
    with monitor.measure("use"):
        pass


@ways("set_up_fails", "clean_up_fails", "clean_up_fails_after_an_error")  # neither can
@pytest.mark.parametrize("kind", ["budget", "child", "monitor", "nested monitor"])
def test_budgets_and_monitors_keep_the_cleanup_contract(kind: str, way: Way) -> None:
    opened: list[Any] = []
    with chapter.budget(1000) as team, chapter.monitor("m") as meter:
        make: Callable[[], Any]
        make, use = {
            "budget": (lambda: chapter.budget(1000), take_and_settle),
            "child": (lambda: team.child(1000, "child"), take_and_settle),
            "monitor": (lambda: chapter.monitor("m"), measure_once),
            "nested monitor": (lambda: meter.child("child"), measure_once),
        }[kind]

        def open_one() -> Any:
            opened.append(make())
            return opened[-1]

        way(
            Subject(
                open=open_one,
                leaks=lambda: [each.name for each in opened if each.is_open] or team.reserved,
                use=use,
                closed_error=RuntimeError,
            )
        )


@ways("clean_up_fails", "clean_up_fails_after_an_error")
def test_reserve_keeps_the_cleanup_contract(way: Way) -> None:
    with chapter.budget(1000, "team") as team, team.child(1000, "agent") as agent:
        with agent.child(1000, "step") as step:

            @contextmanager
            def exhausted() -> Iterator[None]:
                with team.reserve(team.remaining) as held:
                    yield
                    held.settle(0)

            way(
                Subject(
                    open=lambda: step.reserve(1),
                    leaks=lambda: [each.name for each in (team, agent, step) if each.reserved],
                    use=lambda held: held.worst_case,
                    setup_faults=[exhausted],
                )
            )


@ways()
def test_reserve_in_a_shared_budget_keeps_the_cleanup_contract(
    way: Way, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def broken(statement: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(chapter, statement, "this is no SQL")
            yield
        shared._clock.now += 60  # what could not be written is given back as the lease expires

    way(
        Subject(
            open=lambda: shared.reserve(Decimal("0.01")),
            leaks=lambda: shared.balance().reserved,
            use=lambda held: held.worst_case,
            setup_faults=[lambda: broken("TAKE"), lambda: broken("LEASE")],
            cleanup_faults=[lambda: broken("BOOK")],
        )
    )


def test_a_reservation_whose_lease_cannot_be_written_is_not_made(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chapter, "LEASE", "this is no SQL")
        with pytest.raises(sqlite3.OperationalError), shared.reserve(1):
            pass
    assert amounts(shared) == (0, 0)


@ways("clean_up_fails", "clean_up_fails_after_an_error")
def test_measure_keeps_the_cleanup_contract(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrace()
    monkeypatch.setattr(chapter, "start_span", fake.start_as_current_span)
    with chapter.monitor("m") as monitor:

        @contextmanager
        def no_tracer() -> Iterator[None]:
            with monkeypatch.context() as patch:
                patch.setattr(chapter, "start_span", None)
                yield

        def leaks() -> object:
            started = sum(line.startswith("start") for line in fake.spans)
            ended = sum(line.startswith("end") for line in fake.spans)
            recorded = sum(operation.calls for operation in monitor.report().values())
            return (started, ended, recorded) if not started == ended == recorded else None

        way(
            Subject(
                open=lambda: monitor.measure("use"),
                leaks=leaks,
                use=lambda _none: None,
                setup_faults=[no_tracer],
            )
        )


@ways()
def test_session_keeps_the_cleanup_contract(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    real_client = openai.OpenAI
    clients: list[openai.OpenAI] = []
    opened: list[Any] = []

    def offline() -> openai.OpenAI:
        with monkeypatch.context() as patch:
            patch.setattr(openai, "OpenAI", real_client)
            clients.append(chapter.offline_client())
        return clients[-1]

    def open_one() -> Any:
        opened.append(chapter.session("s"))
        return opened[-1]

    @contextmanager
    def no_client() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(openai, "OpenAI", None)
            yield

    @contextmanager
    def closing_fails() -> Iterator[None]:
        def fail(client: openai.OpenAI) -> None:
            real_close(client)
            raise OSError

        real_close = real_client.close
        with monkeypatch.context() as patch:
            patch.setattr(real_client, "close", fail)
            yield

    monkeypatch.setattr(openai, "OpenAI", offline)
    way(
        Subject(
            open=open_one,
            leaks=lambda: (
                [client for client in clients if not client.is_closed()]
                + [each.name for each in opened if each.is_open]
            ),
            use=lambda chat: chat.ask("hello"),
            closed_error=RuntimeError,
            setup_faults=[no_client],
            cleanup_faults=[closing_fails],
        )
    )


@ways("nested", "concurrent")  # a connection has one transaction at a time, and one thread
def test_transaction_and_governed_session_keep_the_cleanup_contract(
    way: Way, database: sqlite3.Connection
) -> None:
    made: list[Governed] = []
    faulty: list[int] = []

    @contextmanager
    def fault(layer: int) -> Iterator[None]:
        faulty.append(layer)
        yield
        faulty.remove(layer)

    def open_one() -> Any:
        made.append(governed := Governed(database))
        kept = chapter.transaction(database)
        layers = [governed.budget, governed.monitor, kept, governed.chat]
        for layer in faulty:
            layers[layer] = failing_on_exit(layers[layer])
        return chapter.governed_session(*layers)

    way(
        Subject(
            open=open_one,
            leaks=lambda: [left for governed in made for left in governed.leaks()],
            use=lambda review: review.ask("hello"),
            closed_error=RuntimeError,
            setup_faults=[lambda: database_locked(database)],
            cleanup_faults=[lambda n=n: fault(n) for n in range(4)],  # type: ignore[misc]
        )
    )


@contextmanager
def database_locked(database: sqlite3.Connection) -> Iterator[None]:
    """Another connection holds the write lock, and nobody waits for it."""
    database.execute("PRAGMA busy_timeout = 0")
    [(_number, _name, path)] = database.execute("PRAGMA database_list")
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.rollback()


# --- What the demos claim ---


def played(demo: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    demo()
    return capsys.readouterr().out


def verdicts(output: str) -> list[str]:
    """The lines with which a demo says what holds, and what does not."""
    return [line for line in output.splitlines() if line.startswith(("✓ ", "✗ "))]


def cells(output: str) -> list[list[str]]:
    """The cells of the tables in what a demo printed."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def test_check_then_call_spends_nine_times_the_limit_and_reserve_then_call_what_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = played(chapter.demo_never_overspent, capsys)
    assert verdicts(output) == [
        "✗ `check_then_call`: 10 sent, 0 refused; spent $0.0045, 900% of the limit.",
        "✓ `reserve_then_call`: 1 sent, 9 refused; spent $0.00045, 90% of the limit.",
    ]
    assert "$0.00045 was asked, and $0.00005 is left of $0.0005" in " ".join(output.split())


def test_the_path_shows_that_all_ten_check_before_one_pays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = played(chapter.demo_never_overspent, capsys)
    checked, paid = (
        [
            int(number)
            for number in re.findall(rf"^ +{line} +(\d[\d ]+)$", output, re.MULTILINE)[0].split()
        ]
        for line in (r"if budget\.spent >= budget\.limit:", r"budget\.spent \+= chat\.cost")
    )
    assert len(checked) == len(paid) == 10
    assert max(checked) < min(paid)


def test_the_first_lesson_has_the_numbers_right() -> None:
    lesson = chapter.demo_never_overspent.__doc__
    with chapter.talk("lesson") as chat:
        assert chat.longest == 500
        assert f"costs up to {chapter.usd(chat.worst_case(chapter.PAGE))}" in lesson
    assert chapter.count_tokens([{"role": "user", "content": chapter.PAGE}]) == 1000


def test_each_level_has_spent_what_the_nested_budgets_demo_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verdicts(played(chapter.demo_nested_budgets, capsys)) == [
        "✓ Each level has spent $15, and has nothing reserved."
    ]


def test_the_nested_budgets_demo_draws_what_is_spent_reserved_and_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [line.strip("│ ") for line in played(chapter.demo_nested_budgets, capsys).splitlines()]
    assert [line for line in lines if line.startswith("step ")] == [
        "step   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒····· █ $0 ▒ $30 · $10 left",
        "step   ████████············ █ $15 ▒ $0 · $25 left",
        "step   ████████············ █ $15 ▒ $0 · $25 left",
    ]
    assert [line for line in lines if line.startswith("└")] == [
        "└ ended",
        "└ left by TimeoutError",
        "└ left by BudgetExceededError",
        *["└ ended"] * 3,
    ]
    assert "budget 'step': $30 was asked, and $25 is left of $40" in " ".join(lines)


def test_the_processes_demo_shows_a_lease_that_outlives_its_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = played(chapter.demo_shared_by_processes, capsys)
    fitted = [int(calls) for calls in output.split("by process: ")[1].split(".")[0].split(", ")]
    bars = [line.split("█ $")[1] for line in output.splitlines() if line.startswith("shared ")]
    spent = chapter.usd(sum(fitted) * Decimal("0.005")).strip("$")
    assert len(fitted) == 4
    assert [bar.split(" · ")[0] for bar in bars] == [
        f"{spent} ▒ $0.02",
        f"{spent} ▒ $0.02",
        f"{spent} ▒ $0",
    ]
    assert 0 < Decimal(spent) <= Decimal("0.08")
    taken = chapter.usd(Decimal(spent) + Decimal("0.02"))
    assert verdicts(output) == [
        f"✓ Spent and reserved: {taken} of $0.1.",
        "✓ Still reserved: $0.",
    ]


def test_three_ways_of_nesting_leave_in_the_same_order_and_with_the_same_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = " ".join(played(chapter.demo_three_ways, capsys).split())
    outcome = "Exited: c, b, a. Raised: OSError; `__context__`: ZeroDivisionError."
    assert output.count(outcome) == output.count("✓ ") == 3


def test_in_the_governed_demo_each_layer_does_its_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = played(chapter.demo_governed_session, capsys)
    assert verdicts(output) == [
        "✓ Turns kept in the database: [('first', 'What does a context manager do?')]"
    ]
    assert [row[:3] for row in cells(output)[-2:]] == [["ask", "2", "0"], ["tool", "2", "1"]]
    bars = [line for line in output.splitlines() if line.startswith("team ")]
    assert [bar.split("█ ")[-1].split(" · ")[0] for bar in bars] == [
        "$0.0001063 ▒ $0",
        "$0.0001096 ▒ $0",
    ]
    assert output.count("left by ConnectionError") == 4


def test_live_asks_the_endpoint_and_the_model_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1/")
    monkeypatch.setenv("OPENAI_MODEL", "llama3")
    parser = argparse.ArgumentParser(prog="chapter")
    with chapter.live_model(parser, "gpt-4o-mini"):
        with chapter.session("live", **chapter.options) as chat:
            assert str(chat._client.base_url) == "http://localhost:11434/v1/"
            assert chat.model == "llama3"
    assert chat._client.is_closed()
    assert chapter.options == {}


def test_live_ends_with_one_line_where_the_model_has_no_price_or_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="chapter")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_MODEL", "llama3")
    with pytest.raises(SystemExit) as ended, chapter.live_model(parser, None):
        pass
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended, chapter.live_model(parser, "gpt-4o-mini"):
        raise openai.APIConnectionError(request=httpx2.Request("POST", "http://localhost"))
    assert ended.value.code == 1
    unknown = "the price of 'llama3' is unknown: name a model with a known one as priced_as"
    assert capsys.readouterr().err.splitlines() == [
        "usage: chapter [-h]",
        f"chapter: error: {unknown}",
        "chapter: llama3 did not answer: Connection error.",
    ]
    assert chapter.options == {}


def test_without_live_a_key_in_the_environment_sends_nothing_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/")
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:2/")
    with chapter.talk("offline") as chat:
        assert chat.ask("hello") == "hello"
        assert chat._client.api_key == "offline"
