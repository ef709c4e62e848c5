"""Random programs beside a plain model: the budgets of 05, and the capstone of 07."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("hypothesis")  # only maintainers have it

import judging
from conftest import load_chapter
from hypothesis import HealthCheck, given, settings
from hypothesis import stateful as machine
from hypothesis import strategies as st
from test_exercises import TASKS
from test_exercises import solution as solution_file

chapter: Any = load_chapter(5)
solution: Any = judging.load(solution_file(TASKS["07.3"]), "solution_07")
judge: Any = sys.modules["judge_07"]
ALWAYS_THE_SAME = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
DOLLARS = st.integers(0, 20)
ERRORS = st.sampled_from([None, ValueError, KeyboardInterrupt, GeneratorExit])


@dataclass(eq=False)
class Call:
    """A reservation on some levels, and what it costs in whole dollars."""

    levels: list[Any]
    worst_case: int
    block: Any
    reservation: Any
    cost: int | None = None  # unknown


def leave(block: Any, kind: type[BaseException] | None) -> None:
    """End a block that was entered by hand: well, or by an error, which comes out."""
    error = kind and kind()
    assert not block.__exit__(kind, error, error and error.__traceback__)


class Storm(machine.RuleBasedStateMachine):
    """Blocks of budgets and of reservations begin and end in any order, and in any way."""

    levels: Any = machine.Bundle("levels")  # each is a list: a budget, and those above it
    calls: Any = machine.Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.limits: dict[Any, int] = {}
        self.blocks: dict[Any, Any] = {}  # of the budgets that are open
        self.log: list[Call] = []

    def opened(self, block: Any, limit: int, above: list[Any]) -> list[Any]:
        budget = block.__enter__()
        self.limits[budget], self.blocks[budget] = limit, block
        return [budget, *above]

    def amounts(self, budget: Any) -> tuple[int, int]:
        calls = [call for call in self.log if budget in call.levels]
        reserved = sum(call.worst_case for call in calls if call.cost is None)
        return sum(call.cost or 0 for call in calls), reserved

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
                with pytest.raises(RuntimeError, match=f"udget '{budget.name}'") as caught:
                    block.__enter__()
                refused = isinstance(caught.value, chapter.BudgetExceededError)
                assert refused is (budget in self.blocks)
                return machine.multiple()  # no call
        self.log.append(Call(levels, worst_case, block, block.__enter__()))
        return self.log[-1]

    @machine.rule(call=calls, cost=DOLLARS)
    def settle(self, call: Call, cost: int) -> None:
        if call.cost is None:
            call.reservation.settle(cost)
            call.cost = cost
        else:
            with pytest.raises(RuntimeError, match="this reservation is settled"):
                call.reservation.settle(cost)

    @machine.rule(call=machine.consumes(calls), error=ERRORS)
    def end_call(self, call: Call, error: type[BaseException] | None) -> None:
        leave(call.block, error)
        call.block = None
        if call.cost is None:
            call.cost = call.worst_case

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
            if all(call.worst_case >= (call.cost or 0) for call in self.log):
                assert spent <= limit

    def teardown(self) -> None:
        for call in self.log:
            if call.block:
                leave(call.block, None)
        assert not any(budget.reserved for budget in self.limits)


def test_budgets_agree_with_whole_numbers_in_any_storm() -> None:
    storms = settings(ALWAYS_THE_SAME, max_examples=60, stateful_step_count=30)
    machine.run_state_machine_as_test(Storm, settings=storms)


OPERATIONS = ("enter_context", "push", "callback", "pop_all", "close", "raise")
PLANS = (*judge.PLANS, "raise from None", "raise two", "interrupt")
PROGRAMS = st.lists(st.tuples(*map(st.sampled_from, (OPERATIONS, PLANS, range(3)))), max_size=12)


class Step(judge.Step):  # type: ignore[misc]
    """A manager whose exit notes what it gets, then does what is planned."""

    def __exit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> Any:
        error = OSError(self.number)
        suppresses = super().__exit__(exc_type, exc, traceback)
        if self.plan == "raise from None":
            raise error from None
        if self.plan == "raise two":
            try:
                raise LookupError
            finally:
                raise error
        if self.plan == "interrupt":
            raise KeyboardInterrupt(self.number)
        return suppresses


def play(stack_class: Any, program: list[tuple[str, str, int]]) -> list[str]:
    """Run a program in the block of a stack; return what happened."""
    log: list[str] = []
    stacks = [stack_class()]

    def block() -> None:
        for number, (operation, plan, nth) in enumerate(program):
            stack, step = stacks[nth % len(stacks)], Step(plan, number, log)
            if operation == "raise":
                raise ValueError(number)
            if operation == "pop_all":
                stacks.append(stack.pop_all())
            elif operation == "close":
                stack.close()
            elif operation == "callback":
                stack.callback(step.__exit__, None, None, traceback=None)
            else:
                getattr(stack, operation)(step)

    try:
        with stacks[0]:
            block()
    except BaseException as error:
        log.append(judge.chain(error))
    for stack in stacks:
        try:
            stack.close()
        except BaseException as error:
            log.append(judge.chain(error))
    return log


@settings(ALWAYS_THE_SAME, max_examples=500)
@given(PROGRAMS)
def test_500_programs_end_as_with_contextlibs_stack(program: Any) -> None:
    try:
        raise RuntimeError  # subtle: without it, contextlib loses contexts (cpython#102201)
    except RuntimeError:
        assert play(solution.MyExitStack, program) == play(contextlib.ExitStack, program)
