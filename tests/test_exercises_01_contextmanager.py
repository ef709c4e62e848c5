"""What CPython's own tests, which judge this capstone, do not see in its solution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import judging
import pytest
from test_exercises import TASKS
from test_exercises import solution as solution_file

solution: Any = judging.load(solution_file(TASKS["01.3"]), "solution_01")


def test_only_the_stop_iteration_that_python_wrapped_is_unwrapped() -> None:
    @solution.my_contextmanager
    def translating() -> Iterator[None]:
        try:
            yield
        except StopIteration as error:
            raise LookupError("exhausted") from error

    with pytest.raises(LookupError, match="exhausted"), translating():
        raise StopIteration


def test_a_generator_with_a_second_yield_is_closed() -> None:
    closed: list[bool] = []

    @solution.my_contextmanager
    def twice() -> Iterator[None]:
        try:
            yield
            yield
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="generator didn't stop: it has a second yield"), twice():
        pass
    assert closed == [True]
