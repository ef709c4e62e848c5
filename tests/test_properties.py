"""Random storms of budgets (chapter 05) beside a plain model of whole numbers."""

from __future__ import annotations

from types import SimpleNamespace as Call
from typing import Any

import pytest

pytest.importorskip("hypothesis")  # only maintainers have it

from conftest import load_chapter
from hypothesis import HealthCheck, settings
from hypothesis import stateful as machine
from hypothesis import strategies as st

chapter: Any = load_chapter(5)
DOLLARS = st.integers(0, 20)
ERRORS = st.sampled_from([None, ValueError, KeyboardInterrupt, GeneratorExit])


def leave(block: Any, kind: type[BaseException] | None) -> None:
    """End a block that was entered by hand: well, or by an error, which comes out."""
    assert not block.__exit__(kind, kind and kind(), None)


class Storm(machine.RuleBasedStateMachine):
    """Blocks of budgets and of reservations begin and end in any order, and in any way."""

    levels: Any = machine.Bundle("levels")  # each is a list: a budget, and those above it
    calls: Any = machine.Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.limits: dict[Any, int] = {}
        self.blocks: dict[Any, Any] = {}  # of the budgets that are open
        self.log: list[Call] = []

    def amounts(self, budget: Any) -> tuple[int, int]:
        calls = [call for call in self.log if budget in call.levels]
        reserved = sum(call.worst_case for call in calls if call.cost is None)
        return sum(call.cost or 0 for call in calls), reserved

    def opened(self, block: Any, limit: int, above: list[Any]) -> list[Any]:
        budget = block.__enter__()
        self.limits[budget], self.blocks[budget] = limit, block
        return [budget, *above]

    @machine.initialize(target=levels, limit=DOLLARS)
    def open_team(self, limit: int) -> list[Any]:
        return self.opened(chapter.budget(limit, "0"), limit, [])

    @machine.rule(target=levels, above=levels, limit=DOLLARS)
    def open_child(self, above: list[Any], limit: int) -> list[Any]:
        return self.opened(above[0].child(limit, str(len(self.limits))), limit, above)

    @machine.rule(target=calls, levels=levels, worst_case=DOLLARS)
    def reserve(self, levels: list[Any], worst_case: int) -> Any:
        block = levels[0].reserve(worst_case)
        for budget in levels:
            too_little = sum(self.amounts(budget)) + worst_case > self.limits[budget]
            if too_little or budget not in self.blocks:
                with pytest.raises(RuntimeError, match=f"udget '{budget.name}'"):
                    block.__enter__()
                return machine.multiple()  # no call
        call = Call(levels=levels, worst_case=worst_case, block=block, cost=None)
        call.reservation = block.__enter__()
        self.log.append(call)
        return call

    @machine.rule(call=machine.consumes(calls), cost=st.none() | DOLLARS, error=ERRORS)
    def end_call(self, call: Call, cost: int | None, error: type[BaseException] | None) -> None:
        if cost is not None:
            call.reservation.settle(cost)
        leave(call.block, error)
        call.cost = call.worst_case if cost is None else cost

    @machine.rule(levels=levels, error=ERRORS)
    def close(self, levels: list[Any], error: type[BaseException] | None) -> None:
        if block := self.blocks.pop(levels[0], None):
            leave(block, error)

    @machine.invariant()
    def each_level_is_right(self) -> None:
        for budget, limit in self.limits.items():
            spent, reserved = self.amounts(budget)
            assert (budget.spent, budget.reserved) == (spent, reserved)
            assert budget.remaining == limit - spent - reserved
            assert budget.is_open is (budget in self.blocks)


def test_budgets_agree_with_whole_numbers_in_any_storm() -> None:
    storms = settings(
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        max_examples=60,
        stateful_step_count=30,
    )
    machine.run_state_machine_as_test(Storm, settings=storms)
