# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4"]
# ///
"""Chapter 03 · Cleanup that awaits

After this chapter you can write a manager whose set-up and cleanup await, share a few devices
fairly among tasks, and lose nothing if a task is cancelled, at any `await`.

    python 03_async_manager.py          run all eight demos, offline
    python 03_async_manager.py 3 7      run demos 3 and 7
    python 03_async_manager.py --step   wait for Enter at each question
    python 03_async_manager.py --live   let a real model answer in demo 8

With an NVIDIA driver and `pip install nvidia-ml-py`, the pool lends your own devices. `--live`
uses OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL.

Read `GPUPool` first. A comment that begins with "subtle:" marks a trap where simpler code fails.
The blocks of tasks overlap, so the demos draw them on a time axis instead of as brackets.

Left out: prices (chapter 02), threads (04), budgets (05), resources known only at run time (07).
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
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import httpx2
from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

Message = ChatCompletionMessageParam
logger = logging.getLogger("workshop.pool")


async def finish(cleanup: Coroutine[Any, Any, object], within: float = 10.0) -> None:
    """Run `cleanup` to completion even if cancelled, then re-raise the cancellation.

    Raises what `cleanup` raises. Raises TimeoutError after `within` seconds: `cleanup` is then
    cancelled, and nobody waits for it any longer.

    `cleanup` runs in its own task, in a copy of the caller's context. So it cannot reset the
    caller's context variables, or exit an anyio cancel scope that the caller entered. An event
    loop that shuts down cancels it, like every other task.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(cleanup)
    deadline = loop.time() + within
    cancelled: asyncio.CancelledError | None = None
    # subtle: a cancelled anyio scope cancels its tasks again at every turn of the event loop, and
    # keeps the loop turning until they end. A shield stops that.
    anyio = sys.modules.get("anyio")
    shield = anyio.CancelScope(shield=True) if anyio else nullcontext()
    with shield:
        while not task.done():
            try:
                # subtle: `await task` would cancel the cleanup, too
                await asyncio.wait([task], timeout=deadline - loop.time())
            except asyncio.CancelledError as error:
                cancelled = error
            if not task.done() and loop.time() >= deadline:
                task.cancel()
                raise TimeoutError(f"the cleanup did not end within {within} s") from cancelled
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
    """Return this machine's NVIDIA devices, even hidden ones, or four stand-ins if it has none."""
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
    """Run a child process that sees `gpu` as its only device, and kill it when the block ends.

    Its output is piped. It leads its own session (not on Windows): Ctrl-C does not reach it, and
    all processes in its process group are killed with it. Raises OSError if the command cannot be
    started, and TimeoutError if a process outside the group holds its output open for 10 s after
    that. No other task may be reading the output when the block ends.
    """
    # subtle: by default CUDA numbers the fastest device first, but NVML goes by the PCI bus
    env = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(gpu.index)}
    started: list[Process] = []
    try:
        # subtle: cancelled twice, asyncio forgets a child that it is starting
        await finish(start_process(started, command, env))
        yield started[0]
    finally:
        for process in started:
            kill_group(process)
            # subtle: wait() alone leaves a full pipe open, or hangs on it
            await finish(process.communicate())


async def start_process(
    started: list[Process], command: Iterable[str], env: Mapping[str, str]
) -> None:
    """Start a child process in its own session, and add it to `started`."""
    starting = asyncio.create_subprocess_exec(
        *command, env=env, stdin=DEVNULL, stdout=PIPE, start_new_session=True
    )
    start = asyncio.create_task(starting)
    try:
        await asyncio.wait([start])
    except asyncio.CancelledError:
        # subtle: only a loop that shuts down gets here. It has cancelled `start`, too. In the
        # middle of a start, asyncio then waits for ever, until it is cancelled a second time.
        await asyncio.sleep(0)
        start.cancel()
    started.append(await start)


def kill_group(process: Process) -> None:
    """Kill a child process, and all others in its process group."""
    with suppress(ProcessLookupError, PermissionError):  # all are dead; the latter: on macOS
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


class PoolClosedError(RuntimeError):
    """The pool is not open."""


@dataclass(frozen=True)
class PoolStatistics:
    """How many devices a pool has, how many are in use, and how many tasks wait for one."""

    total: int
    in_use: int
    waiting: int


class GPUPool:
    """A pool that lends each device to one task at a time: first come, first served.

        async with GPUPool(discover_gpus()) as pool:
            async with pool.acquire(timeout=30) as gpu:
                ...

    When the outer block ends, waiting and later tasks get PoolClosedError, and the pool waits
    until all devices are released. If that wait is cancelled, the pool stays closed, and each
    device is released when its own block ends. Use a pool in one event loop.
    """

    def __init__(self, gpus: Iterable[GPU]) -> None:
        self._gpus = tuple(gpus)
        if not self._gpus or len(set(self._gpus)) < len(self._gpus):
            raise ValueError(f"a GPUPool needs devices, each of them once; it got {self._gpus}")
        self._open = False
        self._free = deque(self._gpus)
        # One future for each waiting task, in the order of arrival. Removing one is O(1).
        self._waiters: OrderedDict[asyncio.Future[GPU], None] = OrderedDict()
        self._all_back = asyncio.Event()

    def statistics(self) -> PoolStatistics:
        """Return the current counts. A device on its way to a waiting task is in use."""
        waiting = sum(not waiter.done() for waiter in self._waiters)
        return PoolStatistics(len(self._gpus), len(self._gpus) - len(self._free), waiting)

    async def __aenter__(self) -> Self:
        """Open the pool. Raises RuntimeError if it is open already."""
        if self._open:
            raise RuntimeError("this GPUPool is open already: make another")
        self._open = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._open = False
        for waiter in self._waiters:
            if not waiter.done():
                message = "this GPUPool was closed while the task waited for a device"
                waiter.set_exception(PoolClosedError(message))
        if len(self._free) < len(self._gpus):
            self._all_back.clear()
            await self._all_back.wait()

    @asynccontextmanager
    async def acquire(self, timeout: float | None = None) -> AsyncIterator[GPU]:
        """Lend a device for the length of a block.

        Wait for at most `timeout` seconds: None waits for ever, 0 takes a device only if one is
        free. Raises TimeoutError, or PoolClosedError if the pool is closed or closes meanwhile.
        """
        gpu = await self._take(timeout)
        try:  # subtle: an await between these two lines could be cancelled, and the device lost
            yield gpu
        finally:
            self._hand_on(gpu)

    async def _take(self, timeout: float | None) -> GPU:
        if not self._open:
            raise PoolClosedError("this GPUPool is not open: acquire inside its `async with`")
        if self._free:  # then nobody waits: _hand_on() serves the waiters first
            return self._free.popleft()
        waiter: asyncio.Future[GPU] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except BaseException as error:
            self._give_up(waiter)
            if isinstance(error, TimeoutError):
                message = f"none of {len(self._gpus)} devices came free within {timeout} s"
                raise TimeoutError(message) from None
            raise

    def _hand_on(self, gpu: GPU) -> None:
        """Give a device to the task that has waited longest, so that no other can take it."""
        while self._waiters:
            waiter, _nothing = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(gpu)
                return
        self._free.append(gpu)
        if len(self._free) == len(self._gpus):
            self._all_back.set()

    def _give_up(self, waiter: asyncio.Future[GPU]) -> None:
        """Leave the line. If the waiter already holds a device, hand it to the next one."""
        self._waiters.pop(waiter, None)
        waiter.cancel()
        served = not waiter.cancelled() and waiter.exception() is None
        if served:
            self._hand_on(waiter.result())


class SessionClosedError(RuntimeError):
    """The session's block has ended."""


class ReplyError(RuntimeError):
    """The server answered, but not with a whole chat completion."""


@dataclass(frozen=True)
class Usage:
    """Tokens, as the API reports them."""

    input_tokens: int = 0
    output_tokens: int = 0


class AsyncLLMSession:
    """A conversation that takes one turn at a time, in the order of the calls.

    `messages` holds whole turns only, and `usage` is the sum of their tokens.
    """

    def __init__(
        self, name: str, model: str, client: AsyncOpenAI, slots: asyncio.Semaphore | None
    ) -> None:
        self.name, self.model = name, model
        self.messages: list[Message] = []
        self.usage = Usage()
        self._client = client
        self._slots = slots or nullcontext()
        self._turn = asyncio.Lock()
        self._closed = False

    async def ask(self, prompt: str) -> str:
        """Take one turn, and return the answer or the refusal ("" if it has only tool calls).

        If the turn fails or is cancelled, the session is as before. Raises SessionClosedError if
        the block has ended, even if it ends during the call. Raises ReplyError if the answer is
        not whole or its usage is missing, and what the client raises.
        """
        self._check_open()
        asked: Message = {"role": "user", "content": prompt}
        async with self._turn, self._slots:  # subtle: the other way round, turns would hoard slots
            answer, usage = await self._complete(asked)
            # subtle: no await from here on. The whole turn is recorded, or none of it.
            self.messages += [asked, answer]
            self.usage = usage
        return str(answer.get("content") or answer.get("refusal") or "")

    async def _complete(self, asked: Message) -> tuple[Message, Usage]:
        """Return the answer as a message, and the usage with that of this call added."""
        self._check_open()
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[*self.messages, asked]
            )
        except Exception:
            self._check_open()  # the end of the block may be the cause: it closes the client
            raise
        self._check_open()
        answer, sent, received = whole_answer(response)
        return answer, Usage(self.usage.input_tokens + sent, self.usage.output_tokens + received)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.name!r} is closed: open a new one")


def whole_answer(response: Any) -> tuple[Message, int, int]:
    """Return an answer's message, and the tokens sent and received.

    Raises ReplyError unless there is a finish reason, the usage, and a content, refusal or tool
    call. (The SDK does not check replies: any part may be missing, or of another type.)
    """
    try:
        reply = response.parse()
        choice, usage = reply.choices[0], reply.usage
        message = choice.message
        said = isinstance(message.content, str) or message.refusal or message.tool_calls
        if said and choice.finish_reason:
            parts = {"content", "refusal", "tool_calls"}
            answer = message.model_dump(include=parts, exclude_none=True, warnings=False)
            answer["role"] = "assistant"
            return answer, int(usage.prompt_tokens), int(usage.completion_tokens)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        pass
    raise ReplyError(f"the answer is not a whole chat completion: {response.text!r:.300}")


@asynccontextmanager
async def async_llm_session(
    name: str,
    *,
    model: str = "gpt-4o-mini",
    client: AsyncOpenAI | None = None,
    max_concurrency: asyncio.Semaphore | None = None,
) -> AsyncIterator[AsyncLLMSession]:
    """Open a conversation with a model.

    Without a `client`, the session makes one from the OPENAI_... variables, and closes it when the
    block ends. All sessions that are given the same `max_concurrency` share its limit.

    When the block ends, it neither awaits nor cancels a turn under way in another task: that
    turn raises SessionClosedError, and is not recorded. If the session made the client, closing
    it ends the call, too.
    """
    session = AsyncLLMSession(name, model, client or AsyncOpenAI(), max_concurrency)
    try:
        yield session
    finally:
        session._closed = True
        if client is None:
            await finish(session._client.close())


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---

LATENCY = 0.03  # seconds that a modelled round trip takes
DEVICES = [GPU(index, f"stand-in GPU {index}", 0) for index in range(4)]
Queue = asyncio.Queue[GPU]
live = False  # --live


@dataclass
class Span:
    """A block on the time axis."""

    row: str
    letter: str
    began: float
    ended: float = 0.0


class Chart:
    """Blocks of tasks on one time axis. An `x` marks a block that an error has ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def span(self, row: str, letter: str) -> Iterator[None]:
        span = Span(row, letter, time.perf_counter())
        self.spans.append(span)
        try:
            yield
        except BaseException:
            span.letter = "x"
            raise
        finally:
            span.ended = time.perf_counter()

    def draw(self) -> None:
        start, end = self.spans[0].began, max(span.ended for span in self.spans)
        width = min(console.width, 100) - 20
        rows: dict[str, list[str]] = {}
        for span in self.spans:
            times = (span.began, span.ended)
            left, right = (int((t - start) / (end - start) * width) for t in times)
            cells = rows.setdefault(span.row, ["·"] * width)
            cells[left:right] = span.letter * (right - left)
        for row, cells in rows.items():
            styles = ["dim" if cell == "·" else f"color({1 + ord(cell) % 6})" for cell in cells]
            console.print(Text.assemble(f"{row:18.18} ", *zip(cells, styles, strict=True)))
        console.print(f"{'':18} 0{1000 * (end - start):{width - 4}.0f} ms\n", style="dim")


@contextmanager
def blocking() -> Iterator[None]:
    time.sleep(LATENCY)
    try:
        yield
    finally:
        time.sleep(LATENCY)


@asynccontextmanager
async def awaiting() -> AsyncIterator[None]:
    await asyncio.sleep(LATENCY)
    try:
        yield
    finally:
        await asyncio.sleep(LATENCY)


async def use_blocking(chart: Chart, row: str) -> None:
    with chart.span(row, "-"), blocking(), chart.span(row, "="):
        await asyncio.sleep(LATENCY)


async def use_awaiting(chart: Chart, row: str) -> None:
    with chart.span(row, "-"):
        async with awaiting():
            with chart.span(row, "="):
                await asyncio.sleep(LATENCY)


async def demo_async_manager() -> None:
    """A manager that awaits

    With `@asynccontextmanager`, the lines around `yield` may `await`: while one task waits for
    its set-up or its cleanup, the event loop runs the others. A manager that calls `time.sleep`
    stops the loop, and so every task. Here a login, the work in the block and a logout take 30 ms
    each. In the chart, `-` is set-up or cleanup, and `=` the block.
    """
    show_code(blocking, awaiting)
    question(_("Three tasks enter such a block. After how many ms does the last one end?"))
    chart = Chart()
    for use in (use_blocking, use_awaiting):
        await asyncio.gather(*(use(chart, f"{use.__name__} {name}") for name in "ABC"))
    chart.draw()
    for title, spans in (("blocking", chart.spans[:6]), ("awaiting", chart.spans[6:])):
        n = [span.letter for span in spans].index("=")
        ms = 1000 * (max(span.ended for span in spans) - spans[0].began)
        text = _("`{title}`: {n} of 3 tasks log in at the same time; all end after {ms:.0f} ms.")
        verdict(n == 3, text.format(title=title, n=n, ms=ms))
    say(_("In `awaiting`, replace both `await asyncio` with `time`, and run demo 1 again."), "→ ")


WORK = """\
import os, sys
for step in range(int(sys.argv[1])):
    sum(range(400_000))
print(os.environ["CUDA_VISIBLE_DEVICES"])"""


async def train(pool: GPUPool, chart: Chart, job: str, steps: int) -> str:
    async with pool.acquire() as gpu:
        with chart.span(f"{gpu.index:2}: {gpu.name}", job):
            command = (sys.executable, "-ISc", WORK, str(steps))
            async with gpu_worker(gpu, *command) as worker:
                output, _errors = await worker.communicate()
                return output.decode().strip()


async def demo_pool() -> None:
    """A GPU pool

    Nine jobs share a few devices. `pool.acquire()` waits in line for a device, and releases it
    however the block ends. In the block, each job runs a worker process, which sees only this
    device and is gone before the next job gets it. (It computes on the CPU, as a stand-in for
    training.) In the chart, a row is a device, and a letter is a job.
    """
    show_code(train)
    question(_("Jobs A to I ask in this order. Which one gets the first device that is released?"))
    jobs = dict(zip("ABCDEFGHI", (9, 4, 6, 3, 5, 8, 4, 7, 5), strict=True))
    chart = Chart()
    async with GPUPool(discover_gpus()) as pool, asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(train(pool, chart, name, jobs[name])) for name in jobs}
    chart.draw()
    seen = {name: task.result() for name, task in tasks.items()}
    say(_("Device seen by each worker: {seen}").format(seen=seen))
    served = "".join(span.letter for span in chart.spans)
    verdict(served == "".join(jobs), _("Served in the order {served}.").format(served=served))
    say(_("In `GPUPool._hand_on`, delete `last=False`, and run demo 2 again."), "→ ")


@asynccontextmanager
async def get_and_put(queue: Queue) -> AsyncIterator[GPU]:
    gpu = await queue.get()
    try:
        yield gpu
    finally:
        queue.put_nowait(gpu)


async def take_turns(name: str, acquire: Any, log: list[str]) -> None:
    for _turn in range(20):
        async with acquire():
            log.append(name)
            await asyncio.sleep(0)


def filled_queue() -> Queue:
    queue = Queue()
    queue.put_nowait(DEVICES[0])
    return queue


async def demo_queue() -> None:
    """A queue as a pool

    An `asyncio.Queue` of devices looks like a pool: `get` a device, then `put` it back. But
    `put` only wakes a waiter. Any task that calls `get` before the waiter runs takes the
    device. `GPUPool._hand_on` gives the device to the waiter directly, so nobody else can take
    it.
    """
    show_code(take_turns, get_and_put, GPUPool._hand_on)
    question(_("A and B share a device. How many of 20 turns does A take before B's first?"))
    async with GPUPool(DEVICES[:1]) as pool:
        by_queue: Any = partial(get_and_put, filled_queue())
        for name, acquire in (("Queue", by_queue), ("GPUPool", pool.acquire)):
            log: list[str] = []
            await asyncio.gather(take_turns("A", acquire, log), take_turns("B", acquire, log))
            before = log.index("B")
            result = _("`{name}`: {log}. Turns of A before B's first: {n}.")
            verdict(before == 1, result.format(name=name, log="".join(log), n=before))
    say(_("In `get_and_put`, end with `await asyncio.sleep(0)`, and run demo 3 again."), "→ ")


async def load_model(gpu: GPU) -> None:
    await asyncio.sleep(LATENCY)


@asynccontextmanager
async def loaded_too_early(queue: Queue) -> AsyncIterator[GPU]:
    gpu = await queue.get()
    await load_model(gpu)
    try:
        yield gpu
    finally:
        queue.put_nowait(gpu)


@asynccontextmanager
async def loaded_in_try(queue: Queue) -> AsyncIterator[GPU]:
    gpu = await queue.get()
    try:
        await load_model(gpu)
        yield gpu
    finally:
        queue.put_nowait(gpu)


async def use(manager: Any, seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds), manager as gpu:
            return str(gpu.name)
    except TimeoutError:
        return "TimeoutError"


async def demo_lost_device() -> None:
    """An `await` between taking and `try`

    Any `await` can raise CancelledError. If it stands between taking a device and the `try`,
    the device is never released, and every later task waits forever. Here `load_model` takes 30
    ms. Job A has 15 ms for it, job B has 100 ms, and there is one device.
    """
    show_code(loaded_too_early)
    question(_("A runs out of time while it loads its model. What becomes of B?"))
    for manager in (loaded_too_early, loaded_in_try):
        queue, runs, results = filled_queue(), {}, []
        for job, seconds in (("A", LATENCY / 2), ("B", 0.1)):
            with trace() as runs[job]:
                results.append(await use(manager(queue), seconds))
        show_code(manager, runs=runs)
        result = _("A: {}, B: {}; devices in the queue afterwards: {} of 1.")
        verdict(queue.qsize() == 1, result.format(*results, queue.qsize()))
    say(_("In `loaded_too_early`, load the model below `try:`, and run demo 4 again."), "→ ")


class CarelessPool(GPUPool):
    def _give_up(self, waiter: asyncio.Future[GPU]) -> None:
        self._waiters.pop(waiter, None)


async def demo_served_and_cancelled() -> None:
    """Served and cancelled in the same tick

    A releases the device to B, which waits for it. In the same turn of the event loop, before B
    runs again, B is cancelled. B's `await` raises CancelledError, but B's future already holds
    the device. So B must check its future, and hand the device on to C.
    """
    show_code(CarelessPool._give_up)
    question(_("B is cancelled, and C waits for at most 100 ms. Does C get the device?"))
    for make_pool in (CarelessPool, GPUPool):
        pool = make_pool(DEVICES[:1])
        await pool.__aenter__()  # without `async with`, which would wait for the lost device
        async with pool.acquire():
            b = asyncio.create_task(use(pool.acquire(), 0.1))
            c = asyncio.create_task(use(pool.acquire(), 0.1))
            await asyncio.sleep(0)
        b.cancel()
        with trace() as path:
            await asyncio.wait([b])
        result = await c
        show_code(make_pool._give_up, runs={"B": path})
        statistics = pool.statistics()
        text = _("C: {result}. Afterwards: {statistics}.")
        verdict(not statistics.in_use, text.format(result=result, statistics=statistics))
    say(_("In `CarelessPool`, delete `_give_up` (leave `pass`), and run demo 5 again."), "→ ")


async def job(pool: GPUPool, span: Any, fails: bool) -> None:
    async with pool.acquire():
        with span:
            await asyncio.sleep(LATENCY)
            if fails:
                raise OSError("A failed")
            await asyncio.sleep(3 * LATENCY)


async def in_gather(jobs: list[Any]) -> None:
    await asyncio.gather(*jobs)


async def in_group(jobs: list[Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(job)


async def in_timeout(jobs: list[Any]) -> None:
    async with asyncio.timeout(LATENCY / 2):
        await in_group(jobs)


async def demo_siblings() -> None:
    """Siblings: `gather`, `TaskGroup`, `timeout`

    Job A fails after 30 ms; B, C and D take 120 ms. `gather` raises at once, while the others
    keep running and hold their devices, but nobody waits for them. A `TaskGroup` cancels them,
    waits for their cleanup, and only then raises. A `timeout` around a group, here 15 ms, ends
    all jobs. In the chart, an `x` is a block that an error ended; `caller` is the awaiting code.
    """
    show_code(job, in_gather, in_group, in_timeout)
    question(_("The error reaches the caller. How many devices are still in use, in each case?"))
    chart, results = Chart(), []
    for run in (in_gather, in_group, in_timeout):
        name = run.__name__
        async with GPUPool(DEVICES) as pool:
            jobs = [job(pool, chart.span(f"{name} {each}", each), each == "A") for each in "ABCD"]
            try:
                with chart.span(f"{name} caller", "="):
                    await run(jobs)
            except* (OSError, TimeoutError) as errors:
                results.append((name, errors.exceptions[0], pool.statistics().in_use))
    chart.draw()
    for name, error, in_use in results:
        text = _("`{name}`: the caller gets {error!r}. Devices still in use: {n}.")
        verdict(in_use == 0, text.format(name=name, error=error, n=in_use))
    say(_("In `in_gather`, add `return_exceptions=True`, and run demo 6 again."), "→ ")


async def release(released: list[str]) -> None:
    await asyncio.sleep(LATENCY)
    released.append("lease")


async def hold(protect: Any, released: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await protect(release(released))


async def unprotected(cleanup: Coroutine[Any, Any, object]) -> None:
    await cleanup


async def demo_cleanup() -> None:
    """An `await` in `finally`

    A task is cancelled, starts its cleanup, and is cancelled again, for example by a timeout
    around it. That interrupts the `await` in its `finally`. With `shield`, the cleanup goes on,
    but nobody waits for it. `finish` waits for it, up to a limit. Here the cleanup releases a
    lease: a round trip of 30 ms.
    """
    show_code(hold, release)
    question(
        _("The task is cancelled twice. Which versions release the lease before the task ends?")
    )
    runs, results = {}, []
    for protect in (unprotected, asyncio.shield, finish):
        released: list[str] = []
        with trace() as runs[protect.__name__]:
            task = asyncio.create_task(hold(protect, released))
            for _cancel in range(2):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            at_its_end = len(released)
            await asyncio.sleep(2 * LATENCY)
        results.append((protect.__name__, at_its_end, len(released)))
    show_code(hold, release, runs=runs)
    for name, now, later in results:
        text = _("`{name}`: leases released when the task ended: {now}, 60 ms later: {later}.")
        verdict(now == 1, text.format(name=name, now=now, later=later))
    say(_("In `finish`, replace `asyncio.wait(...)` with `task`, and run demo 7 again."), "→ ")


class ChartedTransport(httpx2.AsyncHTTPTransport):
    """Charts each request. Answers it as the chat API does, or with --live lets a model answer."""

    def __init__(self, chart: Chart) -> None:
        super().__init__()
        self.chart = chart

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        messages = json.loads(request.content)["messages"]
        with self.chart.span(messages[0]["content"], str(len(messages) // 2 + 1)):
            if live:
                return await super().handle_async_request(request)
            await asyncio.sleep(LATENCY)
        message = {"role": "assistant", "content": "So says the stand-in."}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in"}
        return httpx2.Response(200, json=body | {"choices": [choice], "usage": usage})


async def converse(name: str, **options: Any) -> None:
    async with async_llm_session(name, **options) as session:
        async with asyncio.TaskGroup() as group:
            group.create_task(session.ask(f"{name} says hello"))
            group.create_task(session.ask("and how are you?"))


async def demo_sessions() -> None:
    """Sessions, side by side

    Three conversations run at the same time, and at most two calls. The turns of one conversation
    wait for each other, because each needs the answer before it. Then Dan's turn is cancelled
    half-way, and he asks again. In the chart, a digit is a turn, and an `x` a cancelled one.
    """
    if not live:
        say(_("A stand-in plays the model: {ms:.0f} ms a call.").format(ms=1000 * LATENCY))
    show_code(converse)
    question(_("Dan's turn is cancelled half-way. How many messages does his session hold then?"))
    runs: dict[str, list[int]] = {}
    chart = Chart()
    http = httpx2.AsyncClient(transport=ChartedTransport(chart))
    where: dict[str, Any] = {} if live else {"api_key": "-", "base_url": "http://stand-in/v1"}
    async with AsyncOpenAI(http_client=http, timeout=60, max_retries=0, **where) as client:
        options: dict[str, Any] = {"client": client, "max_concurrency": asyncio.Semaphore(2)}
        options["model"] = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
        async with asyncio.TaskGroup() as group:
            for name in ("Ada", "Bob", "Cem"):
                group.create_task(converse(name, **options))
        async with async_llm_session("Dan", **options) as session:
            with suppress(TimeoutError), trace() as runs[_("cancelled")]:
                async with asyncio.timeout(LATENCY / 2):
                    await session.ask("Dan says hello")
            cancelled = len(session.messages)
            with trace() as runs[_("asked again")]:
                await session.ask("Dan says hello")
    chart.draw()
    show_code(AsyncLLMSession.ask, runs=runs)
    text = _("Dan's messages after the cancelled turn: {before}, after the next: {after}.")
    after = len(session.messages)
    verdict((cancelled, after) == (0, 2), text.format(before=cancelled, after=after))
    say(_("Above `answer, usage`, add `self.messages.append(asked)`, and run demo 8 again."), "→ ")


DEMOS = (
    demo_async_manager,
    demo_pool,
    demo_queue,
    demo_lost_device,
    demo_served_and_cancelled,
    demo_siblings,
    demo_cleanup,
    demo_sessions,
)
KEY_POINTS = """\
* In a coroutine, `await` set-up and cleanup: a blocking call stops every other task.
* Never put an `await` between taking a resource and the `try` that releases it.
* Hand a freed resource to the first waiter in line. Waking that waiter is not enough.
* A cancelled waiter may already hold a resource: hand it on.
* An `await` in cleanup can be cancelled. Finish it anyway, up to a limit.
* Start tasks in a `TaskGroup`: when its block ends, all of them have ended."""


def hide_key(text: str) -> str:
    """Take the API key out of a text, unless it is a word such as "any"."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) > 12 else text


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With --live, exit with one line if the model does not answer."""
    global live
    text = _("ask a real model: OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL")
    parser.add_argument("--live", action="store_true", help=text)
    options = parser.parse_args()
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error(_("--live needs OPENAI_API_KEY; a local server takes any value"))
    live = options.live
    failure: BaseException | None = None
    try:
        try:
            yield options
        except* (OpenAIError, ReplyError) as group:  # from task groups or not
            failure = group
    except asyncio.CancelledError:  # Python 3.11: Ctrl-C after a task group failed
        raise KeyboardInterrupt from None
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if failure:
        problem = hide_key(f"{failure!r:.300}")
        parser.exit(1, f"{parser.prog}: the model did not answer: {problem}\n")


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[str] = []
stepping = False  # --step
OPENING, CLOSING = r"\"'(\[{（「《“‘", r"\"')\]},.;:!?%，。、；：！？）」》”’…—"
WIDE = r"\u2e80-\uffe6"
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        lines.append("")
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


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
    """With --step, wait for Enter until the input ends."""
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


@contextmanager
def bracket(label: str) -> Iterator[None]:
    """Draw where a block begins and how it ends."""
    say(label, "┌ ")
    open_brackets.append(label)
    ending = _("ended")
    try:
        yield
    except BaseException as error:
        ending = _("left by {error}").format(error=type(error).__name__)
        raise
    finally:
        open_brackets.pop()
        say(ending, "└ ")


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
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines)))
    if piece.__doc__:  # keep its line breaks, for the numbers
        code = re.sub(r'(?s)""".*?"""', lambda found: "\n" * found[0].count("\n"), code, count=1)
    return [(n, line) for n, line in enumerate(code.splitlines(), first) if line.strip()]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *runs, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    rows: list[tuple[int, str]] = []
    for piece in pieces:
        rows += [*source(piece), (0, "")]  # and an empty line
    shown = {number for number, _line in rows}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for number, line in rows:
        code = Syntax(line, "python", theme="ansi_dark", word_wrap=True)
        table.add_row(code, *(places(number, path) for path in paths))
    console.print(table)


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(wrap(_(__doc__ or ""), console.width))
    numbers = range(1, len(DEMOS) + 1)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    try:
        with command_line(parser) as options:
            if not set(options.demo) <= set(numbers):
                parser.error(f"choose demos from 1 to {len(DEMOS)}")
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
