"""The capstone of chapter 05: a budget that several processes share, and that no kill -9 breaks."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import judging
import pytest
from conftest import ROOT
from contract import SYNC_WAYS, Subject, Way

solution: Any = judging.load(
    ROOT / "exercises" / "solutions" / "ex_05_nested_managers.py", "solution_05"
)


class FakeClock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def shared(tmp_path: Path, clock: FakeClock) -> Iterator[Any]:
    with solution.shared_budget(tmp_path / "ledger.db", 1, "team", 60.0, clock) as budget:
        yield budget


def amounts(budget: Any) -> tuple[Any, Any]:
    balance = budget.balance()
    return balance.spent, balance.reserved


def test_it_reserves_settles_and_refuses_in_any_precision(shared: Any) -> None:
    with localcontext(prec=2), shared.reserve(Decimal("0.401")) as reservation:
        assert amounts(shared) == (0, Decimal("0.401"))
        with pytest.raises(solution.BudgetExceededError, match=r"has \$0.599 left, but \$0.6 is"):
            shared.reserve(Decimal("0.6")).__enter__()
        reservation.settle(Decimal("0.123456789012"))
        with pytest.raises(RuntimeError, match="settled already"):
            reservation.settle(0)
        assert shared.balance().remaining == Decimal("0.876543210988")
    with solution.shared_budget(shared.path, 1, "team") as again:
        assert amounts(again) == (Decimal("0.123456789012"), 0)
    for wrong in (2, 0.5, Decimal(-1), Decimal("NaN")):
        with pytest.raises((ValueError, TypeError)):
            solution.shared_budget(shared.path, wrong, "team").__enter__()


@pytest.mark.parametrize("error", [None, TimeoutError, KeyboardInterrupt, GeneratorExit])
def test_an_unknown_outcome_costs_the_worst_case(
    error: type[BaseException] | None, shared: Any
) -> None:
    with suppress(error or ValueError), shared.reserve(Decimal("0.25")):
        if error:
            raise error
    assert amounts(shared) == (Decimal("0.25"), 0)


def test_a_lease_changes_what_is_shown_and_never_the_money(shared: Any, clock: FakeClock) -> None:
    with shared.reserve(Decimal("0.75")) as slow:
        clock.now += 60
        assert amounts(shared) == (Decimal("0.75"), 0)
        with pytest.raises(solution.BudgetExceededError), shared.reserve(Decimal("0.5")):
            pass
        slow.settle(Decimal("0.5"))  # a call that outlives its lease
    assert amounts(shared) == (Decimal("0.5"), 0)


def test_two_names_in_one_file_are_two_budgets(shared: Any) -> None:
    with solution.shared_budget(shared.path, 2, "guests") as guests:
        with guests.reserve(2), shared.reserve(1):
            pass
        assert (guests.balance().spent, shared.balance().spent) == (2, 1)


def test_a_known_cost_is_not_lost_if_settling_fails(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(sqlite3.OperationalError), shared.reserve(1) as reservation:
        with monkeypatch.context() as patch:
            patch.setattr(solution, "BOOK", "this is no SQL")
            reservation.settle(Decimal("0.5"))
    assert amounts(shared) == (Decimal("0.5"), 0)


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
def test_reserve_keeps_the_cleanup_contract(
    way: Way, shared: Any, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def broken(statement: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(solution, statement, "this is no SQL")
            yield
        clock.now += 60  # the row that could not be removed is shown as spent

    faults: list[Callable[[], Any]] = [lambda: broken("TAKE"), lambda: broken("KEEP")]
    way(
        Subject(
            open=lambda: shared.reserve(Decimal("0.01")),
            leaks=lambda: shared.balance().reserved,
            use=lambda reservation: None,
            setup_faults=faults,
            cleanup_faults=[lambda: broken("SETTLE")],
        )
    )
    for fault in faults:
        before = shared.balance().spent
        with fault(), pytest.raises(sqlite3.OperationalError), shared.reserve(Decimal("0.01")):
            pass
        assert shared.balance().spent == before


COMMON = """
import json, os, pathlib, random, runpy, signal, sys, time
from decimal import Decimal
solution = runpy.run_path(sys.argv[1])
path, limit, seed = pathlib.Path(sys.argv[2]), Decimal(sys.argv[3]), int(sys.argv[4])
"""
SPENDS = """
chance, paid, refused = random.Random(seed), Decimal(0), 0
with solution["shared_budget"](path, limit, "team") as budget:
    print("ready", flush=True)
    sys.stdin.readline()
    for call in range(100):
        worst = Decimal(chance.randrange(1, 40)) / 100
        try:
            with budget.reserve(worst) as reservation:
                cost = worst * chance.randrange(101) / 100 if call % 5 else worst
                if call % 5:
                    reservation.settle(cost)
                paid += cost
        except solution["BudgetExceededError"]:
            refused += 1
print(paid, refused)
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    path = ROOT / "exercises" / "solutions" / "ex_05_nested_managers.py"
    command = [sys.executable, "-c", COMMON + code, *map(str, (path, *arguments))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder without a disk to wait for, where there is one."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder, "ledger.db")


def test_four_processes_never_overspend_together(in_memory: Path) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(child(SPENDS, in_memory, 2, seed)) for seed in range(4)]
        for each in children:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda each: each.communicate("go\n"), children))
    with solution.shared_budget(in_memory, 2, "team") as budget:
        spent, reserved = amounts(budget)
    assert [errors.count("Traceback") for _paid, errors in outputs] == [0] * 4
    paid, refused = zip(*(output.split() for output, _errors in outputs), strict=True)
    assert sum(map(int, refused)) > 0
    assert reserved == 0
    assert spent == sum(map(Decimal, paid)) <= 2


# Children write a line before and after each step. Each has a clock that is up to a day wrong, and
# is killed somewhere after a line that a seed picks.
KILLED = """
def spend(seed, out):
    chance = random.Random(seed)
    skew = chance.uniform(-86400, 86400)
    clock = lambda: time.time() + skew
    with solution["shared_budget"](path, limit, "team", 1.0, clock) as budget:
        while True:
            os.write(out, b"reserving\\n")
            with budget.reserve(3) as reservation:
                os.write(out, b"reserved\\n")
                reservation.settle(2)
                os.write(out, b"settled\\n")

known = unknown = 0
with solution["shared_budget"](path, limit, "team"):
    for seed in range(200):
        read, write = os.pipe()
        if not (pid := os.fork()):
            spend(seed, write)
        os.close(write)
        with open(read) as lines:
            steps = [lines.readline() for _ in range(1 + seed % 9)]
            for _ in range(seed % 7 * 300):
                pass
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            steps += lines.readlines()
        known += steps.count("settled\\n")
        unknown += steps[-1] != "settled\\n"
print(json.dumps([known, unknown]))
"""


def test_200_kills_with_skewed_clocks_lose_no_call(in_memory: Path) -> None:
    with child(KILLED, in_memory, 100_000, 0) as process:
        output, errors = process.communicate(timeout=60)
    assert errors == ""
    known, unknown = json.loads(output)
    after_all_leases = FakeClock()
    after_all_leases.now = float("inf")
    with solution.shared_budget(in_memory, 100_000, "team", clock=after_all_leases) as budget:
        spent, reserved = amounts(budget)
    assert reserved == 0
    assert unknown > 50
    assert 2 * known <= spent <= 2 * known + 3 * unknown
