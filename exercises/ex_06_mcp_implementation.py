"""Exercises for chapter 06 · MCP implementation

    .venv/bin/python -m pytest exercises/ex_06_mcp_implementation.py
    .venv/bin/python -m pytest exercises/ex_06_mcp_implementation.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import websockets

T = TypeVar("T")

# --- 1 · bug ---


@asynccontextmanager
async def connected(
    open_client: Callable[[], AbstractAsyncContextManager[T]], startup_timeout: float = 15.0
) -> AsyncIterator[T]:
    """The conversations that broke off

    An assistant talks to its users, and looks things up with the client of an MCP server. Some
    servers never get ready, so somebody limited the start to 15 s. The tests pass. In production,
    every conversation breaks off after 15 s, with a TimeoutError in the middle of an answer.

    Fix it: `startup_timeout` limits the start and nothing else. If the client is not ready
    within so many seconds, TimeoutError propagates, and the client has cleaned up. The block and
    the exit of the client have no limit. As chapter 06 demands, enter and exit the client in the
    task that uses `connected`; it contains cancel scopes of anyio, as the real one does.
    """
    async with asyncio.timeout(startup_timeout):
        async with open_client() as client:
            yield client


# --- 2 · task ---


@asynccontextmanager
async def owned(manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Hold a manager in its own task

    An MCP client must be exited in the task that entered it. Therefore `gathered.py` in chapter
    06 fails. With `owned`, the same lines work, and the clients start side by side:

        async with AsyncExitStack() as stack:
            starts = [stack.enter_async_context(owned(Client(each))) for each in servers]
            clients = await asyncio.gather(*starts)

    Start a task that enters `manager`, waits until the block ends, and exits it. The value of the
    block is the manager's. The manager need not know how the block ended. If it raises when it
    is entered or exited, its exception propagates, and not in an ExceptionGroup.

    The `async with` statement ends only when the manager has been exited, even if you are
    cancelled while you wait for that; then the CancelledError propagates. If you are cancelled
    while the manager is being entered, cancel that, too, and wait for its cleanup.
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---


@asynccontextmanager
async def websocket_streams(socket: Any) -> AsyncIterator[tuple[Any, Any]]:
    """MCP over WebSocket

    Write a custom transport. `socket` is an open connection of the package `websockets`, at either
    end: `async for text in socket` receives until the connection is closed, `await
    socket.send(text)` sends, and both may raise `websockets.ConnectionClosed`. `websocket_client`
    below uses your function, and so does the server of the judge. What works over stdio must work
    here.

    Yield a pair of `anyio` memory streams: one to read what the peer sends, and one to write what
    it should receive. Their items are `SessionMessage(message)`. On the way, each message is a
    text of its own, in JSON:

        from mcp.shared.message import SessionMessage
        from mcp.types import jsonrpc_message_adapter

        message = jsonrpc_message_adapter.validate_json(text)
        text = message.model_dump_json(by_alias=True, exclude_unset=True)

    1. A message can be as large as a picture: 4 MB in JSON.

    2. A text that is not a message disturbs nobody. Put the ValueError into the stream to read,
    instead of an item, and go on.

    3. When the peer closes the connection or dies, the stream to read ends. So does a call that
    waits for its answer, with `MCPError`, and the block can go on.

    4. When the block ends, however it ends, your tasks have ended, and both streams are closed: to
    use them raises `anyio.ClosedResourceError`. `websocket_client` has closed its socket. An
    exception of the block comes out as it is, or in an ExceptionGroup.
    """
    raise NotImplementedError
    yield


@asynccontextmanager
async def websocket_client(url: str) -> AsyncIterator[tuple[Any, Any]]:
    """Connect to `url`, for `Client(websocket_client(url))`. Change it as you like."""
    async with websockets.connect(url, subprotocols=["mcp"]) as socket:
        async with websocket_streams(socket) as streams:
            yield streams
