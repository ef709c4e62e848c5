"""What CPython's own tests, which judge this capstone, do not see in its solution."""

from __future__ import annotations

import contextlib
import itertools
import sys
from functools import partial
from signal import SIGINT, default_int_handler
from typing import Any

import judging
import pytest
from test_exercises import TASKS
from test_exercises import solution as solution_file

solution: Any = judging.load(solution_file(TASKS["07.3"]), "solution_07")
judge: Any = sys.modules["judge_07"]


class Step(judge.Step):  # type: ignore[misc]
    """One manager of a stack; its exit may also raise again what it gets."""

    def __exit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> Any:
        suppresses = super().__exit__(exc_type, exc, traceback)
        if self.plan == "raise again" and exc:
            raise exc
        return suppresses


@pytest.mark.parametrize("stack_class", [solution.MyExitStack, solution.MyAsyncExitStack])
@pytest.mark.parametrize("error", [None, ValueError])
def test_a_stack_of_three_does_what_nested_statements_do(
    stack_class: Any, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contextlib's stack does not, if the block ends well or an exit raises an error again."""
    monkeypatch.setattr(judge, "Step", Step)
    for plans in itertools.product((*judge.PLANS, "raise again"), repeat=3):
        wanted = judge.outcome(judge.nested, plans, error and error("block"))
        stacked = partial(judge.stacked, stack_class)
        assert judge.outcome(stacked, plans, error and error("block")) == wanted, plans


# --- Random programs ---

OPERATIONS = ("enter_context", "push", "callback", "interrupt", "pop_all", "close", "raise")


def what_happens(stack_class: Any, program: list[tuple[str, str, int]]) -> list[str]:
    log: list[str] = []
    stacks = [stack_class()]

    def attempt(action: Any) -> None:
        try:
            action()
        except BaseException as error:
            log.append(judge.chain(error))

    def block() -> None:
        with stacks[0]:
            for number, (operation, plan, nth) in enumerate(program):
                stack, step = stacks[nth % len(stacks)], judge.Step(plan, number, log)
                if operation == "raise":
                    raise ValueError(number)
                if operation == "interrupt":
                    stack.callback(default_int_handler, SIGINT, None)
                elif operation == "pop_all":
                    stacks.append(stack.pop_all())
                elif operation == "close":
                    stack.close()
                elif operation == "callback":
                    stack.callback(step.__exit__, None, None, traceback=None)
                else:
                    getattr(stack, operation)(step)

    attempt(block)
    for stack in stacks:
        attempt(stack.close)
    return log


def ends_as_with_contextlib(program: list[tuple[str, str, int]]) -> None:
    try:
        raise RuntimeError  # subtle: without it, contextlib loses contexts (cpython#102201)
    except RuntimeError:
        stacks = solution.MyExitStack, contextlib.ExitStack
        mine, theirs = [what_happens(stack_class, program) for stack_class in stacks]
    assert mine == theirs


def test_500_programs_end_as_with_contextlibs_stack() -> None:
    hypothesis = pytest.importorskip("hypothesis")  # only maintainers have it
    st = hypothesis.strategies
    plans = st.sampled_from(judge.PLANS)
    steps = st.tuples(st.sampled_from(OPERATIONS), plans, st.integers(0, 2))
    always_the_same = hypothesis.settings(
        derandomize=True, deadline=None, database=None, max_examples=500
    )
    always_the_same(hypothesis.given(st.lists(steps, max_size=12))(ends_as_with_contextlib))()
