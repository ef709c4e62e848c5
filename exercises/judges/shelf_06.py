"""The server that judges the transport of exercise 06.3, like the one of chapter 06.

python exercises/judges/shelf_06.py      serve over stdio, as the tests do for comparison
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from mcp.server.mcpserver import Context, MCPServer

log: list[str] = []  # what the lifespans did


@asynccontextmanager
async def books(_server: MCPServer[list[str]]) -> AsyncIterator[list[str]]:
    log.append("opened")
    try:
        yield []
    finally:
        log.append("closed")


server = MCPServer("shelf", lifespan=books, log_level="CRITICAL")


@server.tool()
async def add(title: str, ctx: Context[list[str]]) -> int:
    """Put a book on the shelf; return how many there are."""
    titles = ctx.request_context.lifespan_context
    titles.append(title)
    return len(titles)


@server.tool()
async def echo(text: str, turns: int = 0) -> str:
    """Return the text, after so many turns of the event loop."""
    for _turn in range(turns):
        await asyncio.sleep(0)
    return text


@server.tool()
async def steps(ctx: Context[list[str]]) -> None:
    """Report progress, three times."""
    for step in range(3):
        await ctx.report_progress(step)


@server.tool()
async def wait(ctx: Context[list[str]]) -> None:
    """Report progress, then never return."""
    await ctx.report_progress(0)
    await anyio.sleep_forever()


if __name__ == "__main__":
    server.run()
