# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 03 · Cleanup that awaits

After this chapter you can write a manager whose set-up and cleanup await, share a few devices
fairly among tasks, and lose nothing if a task is cancelled, at any `await`.

    python 03_async_manager.py          run all five demos, offline
    python 03_async_manager.py 2 3      run demos 2 and 3
    python 03_async_manager.py --step   wait for Enter at each question
    python 03_async_manager.py --live   let a real model answer in demo 5

With an NVIDIA driver and `pip install nvidia-ml-py`, the pool lends your own devices. `--live`
uses OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL.

Read `GPUPool` first. A comment that begins with "subtle:" marks a trap where simpler code fails.
The blocks of tasks overlap, so the demos draw them on a time axis instead of as brackets.

Left out: threads (chapter 04), budgets (05), resources known only at run time (07).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import importlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import textwrap
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import genai_prices
import httpx2
from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from openai.types.completion_usage import CompletionUsage
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

logger = logging.getLogger("workshop.pool")


async def finish(cleanup: Coroutine[Any, Any, object], within: float = 10.0) -> None:
    """Await `cleanup` to its end, also when cancelled meanwhile; the cancellation is raised then.

    Raises what `cleanup` raises, and `TimeoutError` after `within` seconds, lest it hang for ever.
    """
    task = asyncio.ensure_future(asyncio.wait_for(cleanup, within))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])  # subtle: `await task` would pass the cancellation on to it
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


@dataclass(frozen=True)
class GPU:
    """A device: its index in PCI bus order, its name, its memory in MiB (0 for a stand-in)."""

    index: int
    name: str
    memory_mib: int


def discover_gpus() -> list[GPU]:
    """List this machine's NVIDIA devices, hidden ones too, or else four stand-ins named so."""
    gpus = []
    try:
        nvml = importlib.import_module("pynvml")  # from nvidia-ml-py, which is optional
        nvml.nvmlInit()
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(device).total // 2**20
                gpus.append(GPU(index, nvml.nvmlDeviceGetName(device), memory))
        finally:
            nvml.nvmlShutdown()
    except Exception as error:  # NVMLError is a class of the module that may be missing
        logger.info("no NVIDIA driver answers (%r): using stand-ins", error)
        gpus.clear()
    return gpus or [GPU(index, f"stand-in GPU {index}", 0) for index in range(4)]


@asynccontextmanager
async def gpu_worker(gpu: GPU, *command: str) -> AsyncIterator[Process]:
    """Run a child process that sees `gpu` as its only device; it is ended and reaped on leaving.

    Its output is piped. Ctrl-C does not reach it, but ends the block, and so the child.
    """
    # subtle: by default CUDA numbers the fastest device first, where NVML goes by the PCI bus
    env = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(gpu.index)}
    starting = asyncio.create_subprocess_exec(
        *command, env=env, stdin=DEVNULL, stdout=PIPE, start_new_session=True
    )
    # subtle: cancelled twice, a start leaves its child behind; a task of its own is cancelled once
    start = asyncio.create_task(starting)
    try:
        yield await start
    finally:
        await finish(end(start))


async def end(start: asyncio.Task[Process]) -> None:
    process = await start
    if process.returncode is None:
        process.kill()
    await process.communicate()  # subtle: wait() alone leaves a full pipe open, or hangs on it


class PoolClosedError(RuntimeError):
    """The pool is not open yet, or not any more."""


@dataclass(frozen=True)
class PoolStatistics:
    """How many devices a pool has, how many of them are in use, and how many tasks wait."""

    total: int
    in_use: int
    waiting: int


class GPUPool:
    """Lend each device to one task at a time; first come, first served.

        async with GPUPool(discover_gpus()) as pool:
            async with pool.acquire(timeout=30) as gpu:
                ...

    Leaving the outer block refuses newcomers, fails whoever waits with `PoolClosedError`, and
    waits for the devices in use. A cancellation ends that wait: the pool is closed all the same,
    and the devices come back when their blocks end. A pool opens once, and serves one event loop.
    """

    def __init__(self, gpus: Iterable[GPU]) -> None:
        self._gpus = tuple(gpus)
        if not self._gpus or len(set(self._gpus)) < len(self._gpus):
            raise ValueError(f"a GPUPool needs devices, each of them once; it got {self._gpus}")
        self._state = "not open yet"
        self._free = deque(self._gpus)
        # Who waits has a future here: it gets a device, or None when the pool closes. A cancelled
        # one stays as a tombstone, since deque.remove() would search the queue for each of them.
        self._queue: deque[asyncio.Future[GPU | None]] = deque()
        self._gone = 0  # waiters who gave up since the tombstones were last swept away
        self._all_back = asyncio.Event()

    def statistics(self) -> PoolStatistics:
        """Count; a device that is on its way to a task is in use."""
        waiting = sum(not waiter.done() for waiter in self._queue)
        return PoolStatistics(len(self._gpus), len(self._gpus) - len(self._free), waiting)

    async def __aenter__(self) -> Self:
        if self._state != "not open yet":
            raise RuntimeError(f"a GPUPool opens once, and this one is {self._state}: make another")
        self._state = "open"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._state = "closed"
        for waiter in self._queue:
            if not waiter.done():
                waiter.set_result(None)
        if len(self._free) < len(self._gpus):
            self._all_back.clear()
            await self._all_back.wait()

    @asynccontextmanager
    async def acquire(self, timeout: float | None = None) -> AsyncIterator[GPU]:
        """Lend a device for the length of a block.

        Waits for `timeout` seconds at most; None is for ever, 0 takes what is free or nothing.
        Raises `TimeoutError`, or `PoolClosedError` where the pool is closed or closes meanwhile.
        """
        gpu = await self._next(timeout)
        try:  # subtle: an await between these two lines could be cancelled, and the device lost
            yield gpu
        finally:
            self._hand_on(gpu)

    async def _next(self, timeout: float | None) -> GPU:
        if self._state != "open":
            raise PoolClosedError(f"this GPUPool is {self._state}: acquire inside its `async with`")
        if self._free:  # so nobody waits: _hand_on() serves the queue first
            return self._free.popleft()
        waiter: asyncio.Future[GPU | None] = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                gpu = await waiter
        except BaseException as error:
            self._give_up(waiter)
            if isinstance(error, TimeoutError):
                message = f"none of {len(self._gpus)} devices came free within {timeout} s"
                raise TimeoutError(message) from None
            raise
        if gpu is None:
            raise PoolClosedError("this GPUPool was closed while the task waited for a device")
        return gpu

    def _hand_on(self, gpu: GPU) -> None:
        """Give a device to whoever waits longest. It is never free in between: no one barges in."""
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(gpu)
                return
        self._free.append(gpu)
        if len(self._free) == len(self._gpus):
            self._all_back.set()

    def _give_up(self, waiter: asyncio.Future[GPU | None]) -> None:
        waiter.cancel()
        if not waiter.cancelled():  # subtle: a device was handed over in this very tick
            gpu = waiter.result()
            if gpu is not None:
                self._hand_on(gpu)
            return
        self._gone += 1
        if self._gone > len(self._queue) // 2:  # so each who gave up pays for two at most
            self._queue = deque(other for other in self._queue if not other.done())
            self._gone = 0


class SessionClosedError(RuntimeError):
    """The session was used after its block was left."""


class ReplyError(RuntimeError):
    """The server answered, but not with a whole chat completion."""


class AsyncLLMSession:
    """A conversation whose turns are taken one at a time, in the order of the calls.

    `messages` holds whole turns only; `usage` (as the API told) and `cost` (US dollars) are the
    sums over them. A model whose price genai-prices does not know costs NaN: zero would be false.
    """

    def __init__(self, name: str, model: str, client: AsyncOpenAI, slots: Any) -> None:
        self.name, self.model = name, model
        self.messages: list[ChatCompletionMessageParam] = []
        self.usage, self.cost = genai_prices.Usage(), Decimal(0)
        self._client, self._slots = client, slots
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def ask(self, prompt: str) -> str:
        """Take one turn. When it fails or is cancelled, the session is as it was before.

        Raises `SessionClosedError` once the block is left, `RuntimeError` on another event loop,
        `ReplyError`, and what the client raises. A provider may charge for a call that was
        cancelled on its way; `cost` knows the answers that arrived.
        """
        self._refuse_misuse()
        async with self._turn, self._slots:  # subtle: the other way round, turns would hoard slots
            self._refuse_misuse()  # for the session may have closed meanwhile
            asked: ChatCompletionMessageParam = {"role": "user", "content": prompt}
            reply = await self._client.chat.completions.create(
                model=self.model, messages=[*self.messages, asked]
            )
            if not (isinstance(reply, ChatCompletion) and reply.choices and reply.usage):
                raise ReplyError(f"session {self.name!r} got no chat completion, but {reply!r:.99}")
            # subtle: no await from here on. Either the whole turn is recorded, or none of it.
            self._count(reply.usage)
            answer = reply.choices[0].message.content or ""
            self.messages += [asked, {"role": "assistant", "content": answer}]
            return answer

    def _count(self, told: CompletionUsage) -> None:
        cached = told.prompt_tokens_details and told.prompt_tokens_details.cached_tokens
        tokens = {"input_tokens": told.prompt_tokens, "output_tokens": told.completion_tokens}
        usage = genai_prices.Usage(**tokens, cache_read_tokens=cached or 0)
        try:
            price = genai_prices.calc_price(usage, self.model, provider_id="openai").total_price
        except LookupError:
            price = Decimal("NaN")
        self.usage, self.cost = self.usage + usage, self.cost + price

    def _refuse_misuse(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.name!r} is closed: open a new one")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(f"session {self.name!r} belongs to the event loop that opened it")

    async def _close(self) -> None:
        self._closed = True
        async with self._turn:  # the turn under way ends first; those behind it are refused
            pass


@asynccontextmanager
async def async_llm_session(
    name: str,
    *,
    model: str = "gpt-4o-mini",
    client: AsyncOpenAI | None = None,
    max_concurrency: asyncio.Semaphore | None = None,
) -> AsyncIterator[AsyncLLMSession]:
    """Open a conversation with a model; leaving waits for the turn under way, refuses all others.

    Without a `client` it makes one from the OPENAI_... variables, and closes it on the same loop.
    `max_concurrency` bounds the calls of all sessions that are given the same semaphore; a number
    could only bound one session, whose turns never overlap anyway.
    """
    if isinstance(max_concurrency, int):
        raise TypeError(f"give the sessions one asyncio.Semaphore({max_concurrency}) to share")
    async with AsyncExitStack() as stack:
        if client is None:
            client = AsyncOpenAI()
            stack.push_async_callback(lambda: finish(client.close()))
        session = AsyncLLMSession(name, model, client, max_concurrency or nullcontext())
        stack.push_async_callback(session._close)
        yield session


# --- Demos: each runs a broken version, then a right one. Copy what is above into production. ---

LATENCY = 0.03  # seconds that a modelled round trip takes
WORK = """\
import os, sys
for step in range(int(sys.argv[1])):
    sum(range(400_000))
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.exit("--fail" in sys.argv)"""
live = False  # --live
Jobs = Iterable[Coroutine[Any, Any, str]]
Protect = Callable[[Any], Awaitable[object]]


class Chart:
    """Scopes on a time axis, as those of tasks overlap. It is drawn however its block is left."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, float, float]] = []

    @asynccontextmanager
    async def span(self, row: str, letter: str) -> AsyncIterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append((row, letter, began, time.perf_counter()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.spans:
            self.draw()

    def draw(self) -> None:
        first = min(began for _row, _letter, began, _ended in self.spans)
        total = max(ended for *_span, ended in self.spans) - first
        width = min(console.width, 100) - 20
        for row in sorted({span[0] for span in self.spans}):
            cells = ["·"] * width
            for _row, letter, began, ended in (span for span in self.spans if span[0] == row):
                left, right = (int((at - first) / total * width) for at in (began, ended))
                cells[left:right] = letter * (right - left)
            styles = {cell: f"color({1 + ord(cell) % 6})" for cell in cells} | {"·": "dim"}
            console.print(Text.assemble(f"{row:18.18} ", *((cell, styles[cell]) for cell in cells)))
        console.print(f"{'':18} 0{1000 * total:{width - 4}.0f} ms", style="dim")


def label(gpu: GPU) -> str:
    return f"{gpu.index:2}: {gpu.name}"  # the name alone may be that of all devices


async def train(
    pool: GPUPool,
    chart: Chart,
    job: str,
    *arguments: str,
    step_done: Callable[[], object] = lambda: None,
) -> str:
    """Hold a device while a worker process takes steps; return the device that the worker saw."""
    seen = ""
    async with pool.acquire() as gpu, chart.span(label(gpu), job):
        async with gpu_worker(gpu, sys.executable, "-ISc", WORK, *arguments) as worker:
            assert worker.stdout
            async for line in worker.stdout:
                seen = line.decode().strip()
                step_done()
            if await worker.wait():
                raise RuntimeError(f"the worker of job {job} failed")
    return seen


async def demo_pool() -> None:
    """A GPU pool

    Nine jobs share a few devices. `pool.acquire()` waits in line for a device, and releases it
    however the block ends. In the block, each job runs a worker process, which sees only this
    device and is gone before the next job gets it. (It computes on the CPU, as a stand-in for
    training.) The chart shows what happened; a letter is a job.
    """
    gpus, tasks = discover_gpus(), {}
    for gpu in gpus:
        say(label(gpu).strip() + (f", {gpu.memory_mib} MiB" if gpu.memory_mib else ""))
    question(_("The jobs A to I ask in this order. Which job gets the first device that is free?"))
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with Chart() as chart, bars:
        async with GPUPool(gpus) as pool, asyncio.TaskGroup() as group:
            for job, steps in zip("ABCDEFGHI", (9, 4, 6, 3, 5, 8, 4, 7, 5), strict=True):
                bar = bars.add_task(job, total=steps)
                step_done = partial(bars.update, bar, advance=1, refresh=True)
                work = train(pool, chart, job, str(steps), step_done=step_done)
                tasks[job] = group.create_task(work)
    seen = " ".join(f"{job}={task.result()}" for job, task in tasks.items())
    say(_("CUDA_VISIBLE_DEVICES, as each worker saw it: {seen}").format(seen=seen))
    statistics = pool.statistics()
    released = statistics.in_use == statistics.waiting == 0
    verdict(released, _("After the block: {statistics}.").format(statistics=statistics))


@asynccontextmanager
async def get_and_put(queue: asyncio.Queue[GPU]) -> AsyncIterator[GPU]:
    gpu = await queue.get()
    try:
        yield gpu
    finally:
        queue.put_nowait(gpu)


async def take_turns(name: str, acquire: Callable[[], Any], log: list[str]) -> None:
    for _turn in range(100):
        async with acquire():
            log.append(name)
            await asyncio.sleep(0)


async def demo_queue() -> None:
    """The bug: a queue as a pool

    Is an `asyncio.Queue` of devices a pool: `get` a device, then `put` it back? `put` only wakes
    a waiter. A task that calls `get` before the waiter runs takes the device away from it.
    `GPUPool` hands the device to the waiter, so it is never free in between.
    """
    show_code(get_and_put, GPUPool._hand_on)
    question(
        _("A and B share a device, 100 turns each. How many turns does A take before B's first?")
    )
    queue: asyncio.Queue[GPU] = asyncio.Queue()
    queue.put_nowait(gpu := discover_gpus()[0])
    async with GPUPool([gpu]) as pool:
        for name, acquire in (("Queue", lambda: get_and_put(queue)), ("GPUPool", pool.acquire)):
            log: list[str] = []
            await asyncio.gather(take_turns("A", acquire, log), take_turns("B", acquire, log))
            say(f"{name}: {''.join(log[:30])}…")
            before = log.index("B")
            verdict(before == 1, _("Turns of A before B's first: {n}.").format(n=before))


async def in_a_group(jobs: Jobs, seconds: float | None = None) -> None:
    async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(job)


async def demo_siblings() -> None:
    """The bug: gather leaves siblings running

    Job A fails. `gather` raises at once; the other jobs keep running and hold their devices, but
    nobody waits for them any more. A `TaskGroup` cancels them, waits for their cleanup, and only
    then raises. `asyncio.timeout` around it ends a group that takes too long. In the charts, the
    row `await` is the caller.
    """
    show_code(in_a_group)
    question(_("The error reaches the caller. How many devices are still in use then?"))
    for name, run, arguments in (
        ("gather(*jobs)", lambda jobs: asyncio.gather(*jobs), ("1", "--fail")),
        ("TaskGroup()", in_a_group, ("1", "--fail")),
        ("timeout(0.05)", lambda jobs: in_a_group(jobs, 0.05), ("9999",)),
    ):
        say(name, style="bold")
        error, in_use = "", 0
        with Chart() as chart:
            async with GPUPool(discover_gpus()) as pool:
                jobs = [train(pool, chart, "A", *arguments)]
                jobs += [train(pool, chart, job, "6") for job in "BCDE"]
                try:
                    async with chart.span("await", "="):
                        await run(jobs)
                except* (RuntimeError, TimeoutError) as errors:
                    error, in_use = repr(errors.exceptions[0]), pool.statistics().in_use
        result = _("The caller gets {error}. Devices still in use: {n}.")
        verdict(in_use == 0, result.format(error=error, n=in_use))


async def release(given_back: list[str]) -> None:
    await asyncio.sleep(LATENCY)
    given_back.append("lease")


async def hold(protect: Protect, given_back: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await protect(release(given_back))


def unprotected(cleanup: Awaitable[object]) -> Awaitable[object]:
    return cleanup


async def demo_cleanup() -> None:
    """The bug: an await in finally

    A task is cancelled, starts its cleanup, and is cancelled again, for example by a timeout
    around it. That interrupts the `await` in its `finally`. With `shield`, the cleanup goes on,
    but nobody waits for it. `finish` waits for it, up to a limit. Here the cleanup gives back a
    lease: a modelled round trip of 30 ms.
    """
    show_code(hold, release)
    question(_("The task is cancelled twice. Which of the three versions give back the lease?"))
    runs, results = {}, []
    for protect in (unprotected, asyncio.shield, finish):
        given_back: list[str] = []
        with trace() as runs[protect.__name__]:
            task = asyncio.create_task(hold(protect, given_back))
            for _cancel in range(2):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            at_its_end = len(given_back)
            await asyncio.sleep(2 * LATENCY)
        results.append((protect.__name__, at_its_end, len(given_back)))
    show_code(hold, release, runs=runs)
    for name, now, later in results:
        result = _("`{name}`: leases given back when the task ended: {now}, 60 ms later: {later}.")
        verdict(now == 1, result.format(name=name, now=now, later=later))


async def stand_in(request: httpx2.Request) -> httpx2.Response:
    """Answer as the chat API does. The words are a stand-in's, and it takes a word for a token."""
    await asyncio.sleep(LATENCY)
    answer = {"role": "assistant", "content": "So says the stand-in."}
    words = sum(len(m["content"].split()) for m in json.loads(request.content)["messages"])
    usage = {"prompt_tokens": words, "completion_tokens": 4, "total_tokens": words + 4}
    choice = {"index": 0, "finish_reason": "stop", "message": answer}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in"}
    return httpx2.Response(200, json=body | {"choices": [choice], "usage": usage})


@asynccontextmanager
async def charted_client(chart: Chart) -> AsyncIterator[AsyncOpenAI]:
    """The real client, in front of the stand-in or, with --live, a model; charts each request."""
    async with httpx2.AsyncHTTPTransport() as network:

        async def answer(request: httpx2.Request) -> httpx2.Response:
            messages = json.loads(request.content)["messages"]
            async with chart.span(messages[0]["content"], str(len(messages) // 2 + 1)):
                return await (network.handle_async_request if live else stand_in)(request)

        http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
        options: dict[str, Any] = {} if live else {"api_key": "-", "base_url": "http://stand-in/v1"}
        async with AsyncOpenAI(http_client=http, **options) as client:
            yield client


async def demo_sessions() -> None:
    """Model sessions, side by side

    Three conversations run at the same time, and at most two calls. The turns of one conversation
    wait for each other, because each needs the answer before it. A digit in the chart is a turn.
    Ada's third turn is cancelled half-way: it leaves no trace in her session, which stays usable.
    """
    model = os.environ.get("OPENAI_MODEL", "gpt-4o-mini") if live else "gpt-4o-mini"
    if not live:
        note = _("A stand-in plays the model: {ms:.0f} ms a call, a token for each word.")
        say(note.format(ms=1000 * LATENCY))
    question(
        _("Ada's session has 4 messages when her third turn is cancelled. How many afterwards?")
    )
    options: dict[str, Any] = {"model": model, "max_concurrency": asyncio.Semaphore(2)}
    with Chart() as chart:
        async with charted_client(chart) as client, AsyncExitStack() as stack:
            opened = [async_llm_session(n, client=client, **options) for n in ("Ada", "Bob", "Cem")]
            sessions = [await stack.enter_async_context(session) for session in opened]
            async with asyncio.TaskGroup() as group:
                for session in sessions:
                    group.create_task(session.ask(f"{session.name} says hello"))
                    group.create_task(session.ask("and how are you?"))
            ada = sessions[0]
            before = len(ada.messages)
            try:
                async with asyncio.timeout(LATENCY / 2):
                    await ada.ask("tell me more")
            except TimeoutError:
                after = len(ada.messages)
                result = _("Cancelled half-way. Messages before: {before}, after: {after}.")
                verdict(after == before, result.format(before=before, after=after))
            await ada.ask("tell me less")
    table = Table(_("session"), _("tokens in"), _("tokens out"), "US$")
    for session in sessions:
        tokens = str(session.usage.input_tokens), str(session.usage.output_tokens)
        table.add_row(session.name, *tokens, str(session.cost))
    console.print(table)


DEMOS = (demo_pool, demo_queue, demo_siblings, demo_cleanup, demo_sessions)
KEY_POINTS = """\
* Never put an `await` between taking a resource and the `try` that releases it.
* Hand a freed resource to the first waiter in line. Waking that waiter is not enough.
* A cancelled waiter may already hold a resource: hand it on.
* An `await` in cleanup can be cancelled. Finish it anyway, up to a limit.
* Start tasks in a `TaskGroup`: when its block ends, all of them have ended."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With --live, exit with one line if the model does not answer."""
    global live
    parser.add_argument("--live", action="store_true", help=_("ask a real model"))
    options = parser.parse_args()
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error("--live needs OPENAI_API_KEY (any word, if the server asks for none)")
    live = options.live
    failures: list[Exception] = []
    try:
        try:
            yield options
        except* (OpenAIError, ReplyError) as group:  # from a task group or not
            failures += group.exceptions
    except asyncio.CancelledError:  # Python 3.11: Ctrl-C after a task group failed
        raise KeyboardInterrupt from None
    if failures:
        parser.exit(1, f"{parser.prog}: the model did not answer: {failures[0]!r}\n")


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[bracket] = []
stepping = False  # --step
WIDE = r"\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffe6"
OPENING, CLOSING = re.escape("\"'([{（「《“‘"), re.escape("\"')]},.;:!?%，。、；：！？）」》”’…—")
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        line = ""
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(line + part.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines += [line.rstrip(), ""]
    return lines[:-1]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Print the result of the runs: ✓ if it is right, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter. At the end of the input, stop waiting for it."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except (EOFError, RuntimeError):  # the latter: there is no input at all
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


class bracket:
    """Draw where a block begins and how it ends: `with bracket("timer"), timer("sort"): ...`.

    Enter it again, as the innermost manager, and it also sees an error that is suppressed:
    `with bracket("quiet") as scope, suppress(OSError), scope: ...`.
    """

    def __init__(self, label: str) -> None:
        self.label, self.depth, self.error = label, 0, ""

    def __enter__(self) -> Self:
        if self.depth == 0:
            self.error = ""
            say(self.label, "┌ ")
            open_brackets.append(self)
        self.depth += 1
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.depth -= 1
        if exc_type:
            self.error = exc_type.__name__
        if self.depth == 0:
            ending = _("left by {error}, suppressed") if self.error else _("ended")
            if exc_type:
                ending = _("left by {error}")
            open_brackets.remove(self)
            say(ending.format(error=self.error), "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record the lines of this file's functions that the block runs in this thread, in order."""
    lines: list[int] = []
    last: dict[int, int] = {}  # the line that each frame has reached

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno  # subtle: 3.13 reports a resumed `await` twice
        return on_event

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(on_event)
    try:
        yield lines
    finally:
        sys.settrace(before)


def source(piece: Any) -> list[tuple[int, str]]:
    """Return the numbered lines of a function or class, without docstring and comments."""
    lines, first = inspect.getsourcelines(piece)
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines))).splitlines()
    numbered = list(enumerate(code, first))
    if piece.__doc__:
        start = next(i for i, line in enumerate(code) if '"""' in line)
        del numbered[start : start + piece.__doc__.count("\n") + 1]
    return [(number, line) for number, line in numbered if line]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    python = Syntax("", "python", theme="ansi_dark")
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    columns = [heading, *(Column(title, justify="center") for title in runs)]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    sources = [source(piece) for piece in pieces]
    shown = {number for lines in sources for number, _text in lines}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for lines in sources:
        for number, text in lines:
            code = python.highlight(text)
            code.rstrip()
            code.no_wrap = False
            table.add_row(code, *(places(number, path) for path in paths))
        if lines is not sources[-1]:
            table.add_row()
    console.print(table, "")


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        import asyncio  # here, so that a chapter without tasks starts sooner

        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    description = "\n".join(wrap(_(__doc__ or ""), console.width))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    numbers = range(1, len(DEMOS) + 1)
    try:
        with command_line(parser) as options:
            for number in options.demo:
                if number not in numbers:
                    parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
            stepping = options.step
            for position, number in enumerate(options.demo or numbers):
                if position > 0:
                    pause()
                play(number)
            if not options.demo:
                console.rule(_("[bold]Key points"), align="left")
                for point in _(KEY_POINTS).splitlines():
                    say(point.removeprefix("* "), "• ")
    except KeyboardInterrupt:
        open_brackets.clear()
        say(_("Interrupted. The cleanup ran on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
