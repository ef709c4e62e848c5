"""Solutions of the exercises of chapter 08, and why they are right."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from io import FileIO
from typing import Any

import anyio

logger = logging.getLogger("servers")

# --- 1 · bug ---


@asynccontextmanager
async def connected(
    servers: Mapping[str, Callable[[], AbstractAsyncContextManager[Any]]],
    optional: Collection[str] = (),
) -> AsyncIterator[dict[str, Any]]:
    """Enter servers in their order, without the optional ones that fail; yield their values.

    The `try` contains one entry and nothing else, because around a `yield` it would also catch
    what the block raises. It catches Exception, not CancelledError, which is meant for the whole
    task.
    """
    clients: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        for name, open_server in servers.items():
            try:
                clients[name] = await stack.enter_async_context(open_server())
            except Exception as error:
                if name not in optional:
                    error.add_note(f"MCP server {name!r} did not start")
                    raise
                logger.warning("MCP server %r did not start: %r", name, error)
        yield clients


# --- 2 · task ---


@contextmanager
def server_process(command: Sequence[str], grace: float = 2.0) -> Iterator[subprocess.Popen[str]]:
    """Start a server in its own process group, and end the whole group with the block.

    SIGKILL stands in a `finally` around the polite steps, so that no exception in them can skip
    it. It is sent before the server is reaped: until then, no other process can get its id.
    """
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield server
    finally:
        try:
            assert server.stdin is not None
            with suppress(OSError):  # it is dead, and what was written to it is lost
                server.stdin.close()
            if not exits(server, grace):
                signal_group(server, signal.SIGTERM)
                exits(server, grace)
        finally:
            signal_group(server, signal.SIGKILL)
            with suppress(OSError), server:  # closes the pipes, and waits
                pass


def exits(server: subprocess.Popen[str], seconds: float) -> bool:
    """Return whether the server exits within `seconds`. On Linux, its id stays taken."""
    if hasattr(os, "pidfd_open"):
        if server.returncode is not None:
            return True
        with FileIO(os.pidfd_open(server.pid)) as descriptor:
            readable, _writable, _other = select.select([descriptor], [], [], seconds)
            return bool(readable)
    with suppress(subprocess.TimeoutExpired):
        server.wait(seconds)
    return server.returncode is not None


def signal_group(server: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(OSError):  # there is no such group: all have ended
        os.killpg(server.pid, number)


# --- 3 · capstone ---


class GaveUpError(RuntimeError):
    """The server died too often, or the block has ended."""


@asynccontextmanager
async def supervised(
    connect: Callable[..., AbstractAsyncContextManager[Any]],
    name: str,
    config: Any,
    *,
    max_restarts: int = 5,
    first_delay: float = 0.5,
    max_delay: float = 30.0,
    recovered_after: float = 60.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Keep one server running; yield a function that calls its tools.

    One task enters and exits every hub, and `on_change`, which may not wait, only makes news: a
    new future for calls to wait for. So a call never sees a dead hub, nor a hub that is exiting.
    """
    loop = asyncio.get_running_loop()
    current: asyncio.Future[Any] = loop.create_future()  # the hub, as soon as there is one
    started = False
    problem = ""

    async def call(tool: str, arguments: Mapping[str, Any] | None = None) -> Any:
        hub = await asyncio.shield(current)  # subtle: a caller that is cancelled would cancel it
        return await hub.call(name, tool, arguments)

    def refuse(why: str) -> None:
        nonlocal current
        if current.done():
            current = loop.create_future()
        current.set_exception(GaveUpError(f"MCP server {name!r} {why}"))
        current.exception()  # subtle: otherwise asyncio logs it if nobody calls any more

    async def live() -> float:
        """Hold the server until it is lost; return for how long it was ready."""
        lost = asyncio.Event()

        def on_change(status: Any) -> None:
            nonlocal current, problem
            if status.state == "lost" and not lost.is_set():
                lost.set()
                problem = status.error
                if current.done():
                    current = loop.create_future()

        nonlocal started
        async with connect({name: config}, on_change=on_change) as hub:
            started, since = True, clock()
            if not lost.is_set():
                current.set_result(hub)
            await lost.wait()
            return clock() - since

    async def keep() -> None:
        nonlocal problem
        restarts = 0
        while True:
            try:
                if await live() >= recovered_after:
                    restarts = 0
            except Exception as error:
                if not started:
                    raise
                problem = str(error)
            if restarts == max_restarts:
                refuse(f"is lost, after {restarts} restarts: {problem}")
                return
            logger.warning("MCP server %r is restarted: %s", name, problem)
            await sleep(min(first_delay * 2**restarts, max_delay))
            restarts += 1

    keeper = asyncio.create_task(keep())
    try:
        await asyncio.wait([keeper, current], return_when=asyncio.FIRST_COMPLETED)
        if keeper.done():
            keeper.result()  # raises why the server did not start
        yield call
    finally:
        keeper.cancel()
        try:
            await ended(keeper)
        finally:
            refuse("takes no calls any more: its block has ended")


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
