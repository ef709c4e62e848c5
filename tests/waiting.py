"""What tests use instead of sleeping: conditions with a deadline, and clocks of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import cycle

from anyio import wait_all_tasks_blocked

__all__ = ["FakeClock", "until", "until_sync", "wait_all_tasks_blocked"]
PATIENCE = 30.0  # seconds until something that should happen is taken for something that will not


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks run until the condition holds. Raises TimeoutError if it never does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def until_sync(condition: Callable[[], object]) -> None:
    """Wait until the condition holds, for what other threads or processes do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come true in {PATIENCE:g} s")
        time.sleep(0.001)


class FakeClock:
    """A clock that each reading advances by the next of `steps`, over and over."""

    def __init__(self, *steps: float) -> None:
        self.now = 1000.0
        self._steps = cycle(steps or (1.0,))

    def __call__(self) -> float:
        self.now += next(self._steps)
        return self.now
