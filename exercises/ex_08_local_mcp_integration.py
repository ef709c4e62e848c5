"""Exercises for chapter 08 · Several MCP servers, one block

    .venv/bin/python -m pytest exercises/ex_08_local_mcp_integration.py
    .venv/bin/python -m pytest exercises/ex_08_local_mcp_integration.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

import asyncio
import logging
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
)
from typing import Any

logger = logging.getLogger("servers")

# --- 1 · bug ---


@asynccontextmanager
async def connected(
    servers: Mapping[str, Callable[[], AbstractAsyncContextManager[Any]]],
    optional: Collection[str] = (),
) -> AsyncIterator[dict[str, Any]]:
    """The report that nobody missed

    Every night, a program writes a report with the tools of three MCP servers. The last one,
    `pictures`, is optional. When it was down, the program stopped: "generator didn't yield". On
    another night, `orders` died during the work. Half of the report was missing, but the program
    ended well and logged a warning about `pictures`.

    Fix it: start the servers in their order. An optional one that cannot be entered is left out,
    and a warning is logged that names it. If another one cannot be entered, its exception
    propagates, with a note (`add_note`) that names the server. Exceptions of the block propagate,
    whatever they are, and so does a cancellation. The servers are exited in reverse order.
    """
    clients: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        try:
            for name, open_server in servers.items():
                clients[name] = await stack.enter_async_context(open_server())
            yield clients
        except Exception as error:
            if name not in optional:
                raise
            logger.warning("MCP server %r does not start: %r", name, error)


# --- 2 · task ---


@contextmanager
def server_process(command: Sequence[str], grace: float = 2.0) -> Iterator[subprocess.Popen[str]]:
    """Start a server, and leave no process behind

    The value of the block is the server, a `subprocess.Popen` in text mode, with pipes for stdin
    and stdout, in its own session (so its pid is also the id of its process group):

        with server_process([sys.executable, "server.py"]) as server:
            print("hello", file=server.stdin, flush=True)

    However the block ends, end the server in three steps. Close its stdin, for a good server then
    saves its data and exits. If it still runs after `grace` seconds, send SIGTERM to its process
    group. If it still runs after `grace` seconds more, send SIGKILL to the group.

    Send this SIGKILL in any case: a server that exits may leave children of its own behind. Even
    if Ctrl-C interrupts the steps, the group is killed, and KeyboardInterrupt propagates. In the
    end, you have waited for the server and closed both pipes. A server that has died already, even
    before it has read what was written to it, is no error. (This task is for Linux and macOS.)
    """
    raise NotImplementedError
    yield


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
    """Restart a server that dies

    In chapter 08, a child that dies stays lost. Write a policy on top of it, to be used so:

        async with supervised(connect, "notes", config) as call:
            result = await call("add", {"text": "Emma"})

    `connect` is the one of chapter 08. These lines start a server and call a tool; when it dies,
    `on_change` gets a status whose `state` is "lost" (there are other states, too):

        async with connect({name: config}, on_change=on_change) as hub:
            result = await hub.call(name, tool, arguments)

    1. The block begins when the server is ready. If this first start fails, its exception
    propagates: a misspelt command is not restarted.

    2. When the server is lost, exit its hub, await `sleep(delay)`, and start the server again, with
    a new hub. The delay is `first_delay`, doubled for each further restart, but at most
    `max_delay`. A restart in which `connect` raises an Exception counts, and the next one follows.

    3. After `max_restarts` restarts, do not restart it again: `call` raises GaveUpError, and the
    block goes on. But if the server was ready for `recovered_after` seconds by `clock()` before it
    was lost, it had recovered: its restarts and delays are counted from the beginning.

    4. From the moment of the report "lost", calls wait for the next hub. A call during which the
    server dies raises what the hub raises. It is never repeated, since it may have done its work.

    5. However and whenever the block ends, its own exception propagates, the hub has been exited,
    and no task still runs. Calls that still wait, and later ones, raise GaveUpError.
    """
    raise NotImplementedError
    yield
