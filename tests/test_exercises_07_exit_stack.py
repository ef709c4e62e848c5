"""What CPython's own tests, which judge this capstone, do not see in its solution."""

from __future__ import annotations

import itertools
import sys
from functools import partial
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
