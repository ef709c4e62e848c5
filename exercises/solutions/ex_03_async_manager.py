"""Solutions of the exercises of chapter 03, and why they are right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# --- 1 · bug ---


@asynccontextmanager
async def licence(
    licences: asyncio.Queue[str], audit: Callable[[str], Awaitable[None]]
) -> AsyncIterator[str]:
    """Lend a licence for a block.

    No `await` stands between `get` and `try`, so no cancellation can come in between. The licence
    is back before the cleanup awaits anything, so it does not matter how that `await` ends.
    """
    name = await licences.get()
    try:
        await audit(f"{name} lent")
        yield name
    finally:
        licences.put_nowait(name)
        await audit(f"{name} returned")


# --- 2 · task ---


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine in a task for the length of a block.

    `await task` would raise CancelledError both for the task's cancellation and for ours, and
    nobody could tell them apart: `asyncio.wait` raises only ours. It is kept, not suppressed, so
    that whoever cancelled this block sees that it worked.
    """
    task = asyncio.create_task(coroutine)
    cancelled: asyncio.CancelledError | None = None
    try:
        yield task
    finally:
        task.cancel()
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
        failure = None if task.cancelled() else task.exception()
        if cancelled is not None:
            raise cancelled
    if failure is not None:
        raise failure


# --- 3 · capstone ---


class Waiter(Generic[T]):
    """A task in line."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.overtaken = 0
        self.item: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class PriorityPool(Generic[T]):
    """A pool that lends each item to one task at a time, by priority and with patience.

    The one who releases an item chooses the next holder and puts the item into its future: so
    nobody can come in between, and each decision is made once, without an `await`. Whoever
    waited longest has been overtaken most, so that looking at this one waiter prevents starvation.
    """

    def __init__(self, items: Iterable[T], patience: int = 3) -> None:
        self.free = list(items)
        self.patience = patience
        self._line: list[Waiter[T]] = []  # in the order of arrival

    @asynccontextmanager
    async def acquire(self, priority: int = 0) -> AsyncIterator[T]:
        """Lend an item for the length of a block."""
        item = self.free.pop() if self.free else await self._wait(priority)
        try:  # subtle: an await between these two lines could be cancelled, and the item lost
            yield item
        finally:
            self._hand_on(item)

    async def _wait(self, priority: int) -> T:
        waiter: Waiter[T] = Waiter(priority)
        self._line.append(waiter)
        try:
            return await waiter.item
        except BaseException:
            if waiter in self._line:
                self._line.remove(waiter)
            if waiter.item.done() and not waiter.item.cancelled():
                # subtle: it was served in the same turn of the event loop, before its cancellation
                self._hand_on(waiter.item.result())
            raise

    def _hand_on(self, item: T) -> None:
        """Give an item to the next task in line, or back to `free`."""
        # subtle: a waiter that was cancelled in this tick has not left the line yet
        line = [waiter for waiter in self._line if not waiter.item.done()]
        if not line:
            self.free.append(item)
            return
        chosen = line[0]
        if chosen.overtaken < self.patience:
            chosen = max(line, key=lambda waiter: waiter.priority)  # of equals, the first one
        for waiter in line[: line.index(chosen)]:
            waiter.overtaken += 1
        self._line.remove(chosen)
        chosen.item.set_result(item)
