"""Exercises for chapter 03 · Cleanup that awaits

    .venv/bin/python -m pytest exercises/ex_03_async_manager.py
    .venv/bin/python -m pytest exercises/ex_03_async_manager.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

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
    """The licences that vanished

    A company owns ten licences for a simulator. They wait in a queue, and each simulation borrows
    one. `audit` sends a line to an audit log over the network. Every few days no simulation
    starts any more: the queue is empty, although nobody holds a licence. The audit log is slow,
    and sometimes down. The users are impatient: they press Stop, which cancels their task.

    Fix it: when the `async with` statement has ended, the licence is back in the queue, exactly
    once, even if `audit` raises or the task is cancelled at any `await`, in its cleanup, too. The
    error or the cancellation propagates. The log still gets both lines, unless it fails.
    """
    name = await licences.get()
    await audit(f"{name} lent")
    try:
        yield name
    finally:
        await audit(f"{name} returned")
        licences.put_nowait(name)


# --- 2 · task ---


@asynccontextmanager
async def background(
    coroutine: Coroutine[Any, Any, Any],
) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine beside a block

    A long job tells its server every ten seconds that it is still alive:

        async with background(send_heartbeats(server)) as task:
            ...

    The coroutine runs in a task, which is the value of the block. When the block ends, however it
    ends, cancel the task and wait until it has ended: its own cleanup may `await`. If you are
    cancelled while you wait, go on waiting, and then let the CancelledError propagate.

    A coroutine that ends early does not end the block. If it has failed, its exception propagates
    when the block ends, unless the block itself raises: then the block's exception propagates.
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---


class PriorityPool(Generic[T]):
    """A pool with priorities

    The pool lends each item to one task at a time, as `GPUPool` in chapter 03 does. `free` is the
    list of the items that nobody holds. A task takes a free item at once, or waits in line. It
    can be cancelled at any time, and nothing is lost.

    1. A released item goes straight to the waiting task with the highest priority, and among
    equals to the one that has waited longest. No task that asks later can take it meanwhile.

    2. Nobody starves. A task is overtaken when an item goes to a task that began to wait later.
    Once the task that has waited longest has been overtaken `patience` times, it is next.

    3. A task that is cancelled leaves the line. If it was given an item already, that item goes to
    the next task in line, or back to `free`.
    """

    def __init__(self, items: Iterable[T], patience: int = 3) -> None:
        self.free = list(items)
        self.patience = patience

    @asynccontextmanager
    async def acquire(self, priority: int = 0) -> AsyncIterator[T]:
        raise NotImplementedError
        yield
