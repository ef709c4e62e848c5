"""Solutions of the exercises of chapter 06, and why they are right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import websockets

T = TypeVar("T")

# --- 1 · bug ---


@asynccontextmanager
async def connected(
    open_client: Callable[[], AbstractAsyncContextManager[T]], startup_timeout: float = 15.0
) -> AsyncIterator[T]:
    """Enter a client within a time limit; yield it.

    A stack takes the entry apart from the exit, so that the limit ends before the block begins.
    `anyio.fail_after` cannot do that, because scopes must end in reverse order; nor can
    `wait_for`, which on Python 3.11 enters the client in another task.
    """
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(startup_timeout):
            client = await stack.enter_async_context(open_client())
        yield client


# --- 2 · task ---


@asynccontextmanager
async def owned(manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enter and exit a manager in its own task; yield its value.

    The task does both and is awaited to its end, so neither a caller in another task nor a
    cancellation can separate the two. It is not in a TaskGroup, which would wrap exceptions and
    cancel the exit.
    """
    values: list[T] = []
    settled, leave = asyncio.Event(), asyncio.Event()

    async def own() -> None:
        async with manager as value:
            values.append(value)
            settled.set()
            await leave.wait()

    owner = asyncio.create_task(own())
    owner.add_done_callback(lambda done: settled.set())
    try:
        await settled.wait()
        if not values:
            owner.result()  # raises why the manager was not entered
        yield values[0]
    finally:
        leave.set()
        if not values:
            owner.cancel()
        await ended(owner)


async def ended(task: asyncio.Task[None]) -> None:
    """Wait for a task even if cancelled, then raise its exception or the cancellation."""
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # subtle: without, anyio would cancel it again and again
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    try:
        if not task.cancelled():
            task.result()
    finally:
        if cancelled is not None:
            raise cancelled


# --- 3 · capstone ---

LARGEST_MESSAGE = 64 * 2**20  # bytes; the default of websockets is 1 MiB


@asynccontextmanager
async def websocket_streams(socket: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Yield a stream to read and one to write, as `Client` expects them, over an open WebSocket.

    The task that reads closes its end of the stream when the socket ends, because that is what
    fails the calls under way. Nothing else may stop it: a text that is not a message goes to the
    session, which logs it.
    """
    from mcp.shared.message import SessionMessage  # here, since it takes half a second
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream[Any](0)
    write, outgoing = anyio.create_memory_object_stream[Any](0)

    async def receive() -> None:
        with suppress(websockets.ConnectionClosed, anyio.BrokenResourceError):
            async for text in socket:
                try:
                    item: Any = SessionMessage(jsonrpc_message_adapter.validate_json(text))
                except ValueError as error:
                    item = error
                await incoming.send(item)
        incoming.close()

    async def send() -> None:
        with suppress(websockets.ConnectionClosed):
            async for item in outgoing:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                await socket.send(text)
        outgoing.close()  # a later message fails at once

    with incoming, read, write, outgoing:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(send)
            try:
                yield read, write
            finally:
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def websocket_client(url: str) -> AsyncIterator[tuple[Any, Any]]:
    """Connect to `url`, for `Client(websocket_client(url))`."""
    options: Any = {"subprotocols": ["mcp"], "max_size": LARGEST_MESSAGE}
    async with websockets.connect(url, **options) as socket:
        async with websocket_streams(socket) as streams:
            yield streams
