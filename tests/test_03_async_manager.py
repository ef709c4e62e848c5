"""Chapter 03: each claim of its lessons, and the cleanup contract for each of its managers."""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import json
import os
import random
import re
import sys
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from decimal import Decimal
from typing import Any, cast

import genai_prices
import httpx2
import openai
import pytest
from conftest import child_processes, load_chapter, open_descriptors
from contract import ASYNC_WAYS, Subject, Way
from rich.console import Console

chapter: Any = load_chapter(3)
ways = pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)


@pytest.fixture(autouse=True)
def no_test_hangs(request: pytest.FixtureRequest) -> None:
    """A pool that loses a device would let its test wait for ever; 30 seconds are enough."""
    test = request.node.obj
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def bounded(*args: Any, **kwargs: Any) -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        request.node.obj = bounded


def devices(count: int) -> list[Any]:
    return [chapter.GPU(index, f"stand-in GPU {index}", 0) for index in range(count)]


async def ticks(count: int = 10) -> None:
    """Let the loop turn so often that every task has gone as far as it can."""
    for _tick in range(count):
        await asyncio.sleep(0)


# --- The pool keeps the cleanup contract ---


class Opened:
    """Opens pools and remembers them; the oracle says which of them are not as they were."""

    def __init__(self) -> None:
        self.pools: list[Any] = []

    def pool(self, count: int = 8) -> Any:
        self.pools.append(chapter.GPUPool(devices(count)))
        return self.pools[-1]

    def leaks(self) -> object:
        counts = [pool.statistics() for pool in self.pools]
        return [count for count in counts if count.in_use or count.waiting]


async def use_pool(pool: Any) -> None:
    async with pool.acquire():
        await asyncio.sleep(0)


@ways
def test_a_pool_keeps_the_cleanup_contract(way: Way) -> None:
    opened = Opened()
    subject = Subject(opened.pool, opened.leaks, use_pool, chapter.PoolClosedError)
    way(subject)


@ways
def test_an_acquired_device_keeps_the_cleanup_contract(way: Way) -> None:
    opened = Opened()

    @asynccontextmanager
    async def acquired() -> AsyncIterator[Any]:
        async with opened.pool() as pool, pool.acquire(timeout=9) as gpu:
            yield gpu

    way(Subject(acquired, opened.leaks))


@ways
def test_a_device_that_must_be_waited_for_keeps_the_cleanup_contract(way: Way) -> None:
    opened = Opened()

    @asynccontextmanager
    async def contended() -> AsyncIterator[Any]:
        pool = opened.pool(1)
        async with pool:
            holder = pool.acquire()
            await holder.__aenter__()
            asyncio.get_running_loop().call_soon(leave, holder)
            async with pool.acquire(timeout=9) as gpu:
                yield gpu

    way(Subject(contended, opened.leaks))


def leave(manager: Any) -> None:
    """Leave an async block outside of any task, which works where leaving never suspends."""
    with pytest.raises(StopIteration):
        manager.__aexit__(None, None, None).send(None)


# --- A worker keeps it ---

CHATTERBOX = "import os\nwhile True: print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"


@ways
def test_a_worker_keeps_the_cleanup_contract(way: Way) -> None:
    def worker() -> Any:
        return chapter.gpu_worker(devices(1)[0], sys.executable, "-ISc", CHATTERBOX)

    way(Subject(worker, child_processes, lambda worker: worker.stdout.readline()))


# --- A session keeps it ---


def answer(content: object = "Yes.", **usage: int) -> httpx2.Response:
    """What the chat API answers."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    counts = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15} | usage
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in"}
    return httpx2.Response(200, json=body | {"choices": [choice], "usage": counts})


def client_of(handler: Callable[[httpx2.Request], Any]) -> openai.AsyncOpenAI:
    """The real client, in front of a handler."""
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
    return openai.AsyncOpenAI(
        api_key="-", base_url="http://api/v1", http_client=http, max_retries=0
    )


async def soon(request: httpx2.Request) -> httpx2.Response:
    await asyncio.sleep(0)
    return answer()


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[openai.AsyncOpenAI]:
    """The clients that sessions make for themselves: without a network."""
    made: list[openai.AsyncOpenAI] = []

    def make() -> openai.AsyncOpenAI:
        made.append(client_of(soon))
        return made[-1]

    monkeypatch.setattr(chapter, "AsyncOpenAI", make)
    return made


@ways
def test_a_session_keeps_the_cleanup_contract(way: Way, clients: list[openai.AsyncOpenAI]) -> None:
    def still_open() -> object:
        return [client for client in clients if not client.is_closed()]

    subject = Subject(
        lambda: chapter.async_llm_session("s"),
        still_open,
        lambda session: session.ask("Is it?"),
        chapter.SessionClosedError,
    )
    way(subject)


# --- The pool: who gets which device, and when ---


class Hands:
    """Tasks that hold a device until they are told to leave; notes in which order they got it."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.order: list[str] = []
        self.may_leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def take(self, name: str, timeout: float | None = None) -> None:
        """Start a task, and let it go as far as it can."""
        self.may_leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, timeout))
        await ticks()

    async def _hold(self, name: str, timeout: float | None) -> None:
        async with self.pool.acquire(timeout):
            self.order.append(name)
            await self.may_leave[name].wait()

    async def leave(self, *names: str) -> None:
        """Let some tasks, or all, come to their end, and wait for it."""
        for name in names or self.tasks:
            self.may_leave[name].set()
        await asyncio.gather(*(self.tasks[name] for name in names or self.tasks))


def counts(pool: Any) -> tuple[int, int, int]:
    statistics = pool.statistics()
    return statistics.total, statistics.in_use, statistics.waiting


@pytest.mark.asyncio
async def test_statistics_tell_how_many_devices_are_in_use_and_how_many_tasks_wait() -> None:
    async with chapter.GPUPool(devices(2)) as pool:
        hands = Hands(pool)
        assert counts(pool) == (2, 0, 0)
        await hands.take("a")
        assert counts(pool) == (2, 1, 0)
        for name in "bcd":
            await hands.take(name)
        assert counts(pool) == (2, 2, 2)
        await hands.leave("a")
        assert counts(pool) == (2, 2, 1)
        await hands.leave()
        assert counts(pool) == (2, 0, 0)


@pytest.mark.asyncio
async def test_waiters_are_served_first_come_first_served() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        for name in "abcdefgh":
            await hands.take(name)
        await hands.leave()
    assert hands.order == list("abcdefgh")


@pytest.mark.asyncio
async def test_a_newcomer_cannot_overtake_a_waiter_that_was_handed_a_device_but_not_run_yet() -> (
    None
):
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        first = pool.acquire()
        await first.__aenter__()
        await hands.take("waiter")
        await first.__aexit__(None, None, None)  # the waiter has it, and has not run since
        with pytest.raises(TimeoutError):
            async with pool.acquire(timeout=0):
                hands.order.append("newcomer")
        await hands.leave()
    assert hands.order == ["waiter"]


@pytest.mark.asyncio
async def test_a_device_comes_back_whatever_ends_the_block() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        for error in (ValueError, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError):
            with pytest.raises(error):
                async with pool.acquire():
                    raise error
            assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_cancelled_waiter_is_passed_over() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        for name in "abcd":
            await hands.take(name)
        hands.tasks.pop("b").cancel()
        hands.tasks.pop("c").cancel()
        await ticks()
        assert counts(pool) == (1, 1, 1)
        await hands.leave()
    assert hands.order == ["a", "d"]


@pytest.mark.asyncio
async def test_a_waiter_cancelled_in_the_tick_it_was_handed_a_device_gives_it_to_the_next() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        first = pool.acquire()
        await first.__aenter__()
        await hands.take("b")
        await hands.take("c")
        await first.__aexit__(None, None, None)
        hands.tasks["b"].cancel()
        with pytest.raises(asyncio.CancelledError):
            await hands.tasks.pop("b")
        await hands.leave()
    assert hands.order == ["c"]
    assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_waiter_cancelled_in_the_tick_it_was_handed_the_last_device_sets_it_free() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        first = pool.acquire()
        await first.__aenter__()
        await hands.take("b")
        await first.__aexit__(None, None, None)
        hands.tasks["b"].cancel()
        await asyncio.wait([hands.tasks["b"]])
        assert counts(pool) == (1, 0, 0)
        async with pool.acquire(timeout=0):
            pass


@pytest.mark.asyncio
async def test_a_coroutine_that_is_closed_while_it_waits_leaves_the_queue() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        async with pool.acquire():
            waiting = pool.acquire().__aenter__()
            waiting.send(None)
            assert counts(pool) == (1, 1, 1)
            waiting.close()
            del waiting
            await ticks()
            assert counts(pool) == (1, 1, 0)
        assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_timeout_raises_TimeoutError_that_names_the_pool_and_the_time() -> None:
    async with chapter.GPUPool(devices(3)) as pool:
        hands = Hands(pool)
        for name in "abc":
            await hands.take(name)
        with pytest.raises(TimeoutError, match=r"^none of 3 devices came free within 0.001 s$"):
            async with pool.acquire(timeout=0.001):
                pass
        assert counts(pool) == (3, 3, 0)
        await hands.leave()


@pytest.mark.asyncio
async def test_a_timeout_of_zero_takes_what_is_free() -> None:
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire(timeout=0) as gpu:
        assert gpu == devices(1)[0]


@pytest.mark.asyncio
async def test_a_timeout_does_not_limit_the_block() -> None:
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire(timeout=0):
        await ticks()


@pytest.mark.asyncio
async def test_the_timeout_of_a_caller_stays_the_callers() -> None:
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire():
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0):
                async with pool.acquire(timeout=60):
                    pass
        assert str(caught.value) == ""
        assert counts(pool) == (1, 1, 0)


# --- The pool: opening and closing ---


@pytest.mark.parametrize("gpus", [[], devices(1) * 2])
def test_a_pool_of_no_devices_or_of_one_twice_is_refused(gpus: list[Any]) -> None:
    with pytest.raises(ValueError, match="needs devices, each of them once"):
        chapter.GPUPool(gpus)


@pytest.mark.asyncio
async def test_a_pool_says_what_is_wrong_before_it_is_opened_and_after_it_was_closed() -> None:
    pool = chapter.GPUPool(devices(1))
    with pytest.raises(chapter.PoolClosedError, match="is not open yet: acquire inside its"):
        async with pool.acquire():
            pass
    async with pool:
        with pytest.raises(RuntimeError, match="opens once, and this one is open: make another"):
            await pool.__aenter__()
        async with pool.acquire():
            pass
    with pytest.raises(chapter.PoolClosedError, match="is closed: acquire inside its"):
        async with pool.acquire():
            pass
    with pytest.raises(RuntimeError, match="opens once, and this one is closed: make another"):
        await pool.__aenter__()


@pytest.mark.asyncio
async def test_closing_refuses_newcomers_fails_waiters_and_waits_for_devices_in_use() -> None:
    pool = chapter.GPUPool(devices(2))
    await pool.__aenter__()
    await use_pool(pool)  # once before, all devices had come back
    hands = Hands(pool)
    for name in "abxcd":
        await hands.take(name)
    hands.tasks.pop("x").cancel()
    await ticks()
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await ticks()
    for name in "cd":
        with pytest.raises(chapter.PoolClosedError, match="closed while the task waited"):
            await hands.tasks.pop(name)
    with pytest.raises(chapter.PoolClosedError, match="is closed"):
        async with pool.acquire():
            pass
    await hands.leave("a")
    await ticks()
    assert not closing.done()
    assert counts(pool) == (2, 1, 0)
    await hands.leave("b")
    await closing
    assert counts(pool) == (2, 0, 0)


@pytest.mark.asyncio
async def test_a_cancellation_ends_the_wait_of_closing_and_devices_still_come_back() -> None:
    pool = chapter.GPUPool(devices(1))
    await pool.__aenter__()
    hands = Hands(pool)
    await hands.take("a")
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await ticks()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(chapter.PoolClosedError):
        async with pool.acquire():
            pass
    assert counts(pool) == (1, 1, 0)
    await hands.leave()
    assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_waiter_cancelled_in_the_tick_the_pool_closes_ends_as_cancelled() -> None:
    pool = chapter.GPUPool(devices(1))
    await pool.__aenter__()
    hands = Hands(pool)
    for name in "ab":
        await hands.take(name)
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await asyncio.sleep(0)
    hands.tasks["b"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await hands.tasks.pop("b")
    await hands.leave()
    await closing
    assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_device_handed_on_in_the_tick_the_pool_closes_is_waited_for() -> None:
    pool = chapter.GPUPool(devices(1))
    await pool.__aenter__()
    hands = Hands(pool)
    first = pool.acquire()
    await first.__aenter__()
    await hands.take("b")
    await first.__aexit__(None, None, None)
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await ticks()
    assert (hands.order, closing.done()) == (["b"], False)
    await hands.leave()
    await closing


# --- The pool: under load ---


class Storm:
    """Tasks that take devices in many ways, while others of them are cancelled at random."""

    def __init__(self, pool: Any, acquisitions: int, seed: int) -> None:
        self.pool = pool
        self.random = random.Random(seed)
        self.acquisitions = acquisitions
        self.in_hands: set[Any] = set()
        self.ended = dict.fromkeys(("served", "cancelled", "timed out", "failed"), 0)

    async def one_block(self) -> None:
        timeout = self.random.choice((None, None, None, 0))
        async with self.pool.acquire(timeout) as gpu:
            assert gpu not in self.in_hands, f"{gpu} is in two hands"
            self.in_hands.add(gpu)
            self.ended["served"] += 1
            try:
                if self.random.random() < 0.7:
                    await asyncio.sleep(0)
                if self.random.random() < 0.1:
                    raise LookupError
            finally:
                self.in_hands.remove(gpu)

    async def customer(self) -> None:
        while self.ended["served"] < self.acquisitions:
            try:
                await self.one_block()
            except asyncio.CancelledError:
                self.ended["cancelled"] += 1
            except TimeoutError:
                self.ended["timed out"] += 1
            except LookupError:
                self.ended["failed"] += 1

    async def rage(self) -> None:
        customers = [asyncio.create_task(self.customer()) for _customer in range(40)]
        while self.ended["served"] < self.acquisitions:
            await asyncio.sleep(0)
            for customer in self.random.sample(customers, 2):
                customer.cancel()
        await asyncio.gather(*customers)


@pytest.mark.asyncio
async def test_100_000_acquisitions_under_cancellations_and_timeouts_lose_no_device() -> None:
    async with chapter.GPUPool(devices(8)) as pool:
        storm = Storm(pool, acquisitions=100_000, seed=3)
        await storm.rage()
        assert counts(pool) == (8, 0, 0)
        async with AsyncExitStack() as stack:
            all_of_them = [await stack.enter_async_context(pool.acquire(0)) for _gpu in range(8)]
            assert set(all_of_them) == set(devices(8))
    assert storm.ended["served"] >= 100_000
    assert min(storm.ended.values()) > 1000, storm.ended


class CountingDeque(deque[Any]):
    """Counts each element that any operation touches."""

    touched = 0

    def append(self, item: Any) -> None:
        CountingDeque.touched += 1
        super().append(item)

    def popleft(self) -> Any:
        CountingDeque.touched += 1
        return super().popleft()

    def remove(self, item: Any) -> None:
        CountingDeque.touched += self.index(item) + 1
        super().remove(item)

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            CountingDeque.touched += 1
            yield item


async def touched_by_cancelling(waiters: int, at_once: int) -> int:
    """How many queue elements are touched when so many queued waiters come, and are cancelled."""
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire():
        CountingDeque.touched = 0
        tasks = [asyncio.create_task(use_pool(pool)) for _waiter in range(waiters)]
        await asyncio.sleep(0)
        random.Random(waiters).shuffle(tasks)
        for begin in range(0, waiters, at_once):
            for task in tasks[begin : begin + at_once]:
                task.cancel()
            await asyncio.sleep(0)
        touched = CountingDeque.touched
        await asyncio.wait(tasks)
        assert counts(pool) == (1, 1, 0)
    return touched


@pytest.mark.asyncio
async def test_cancelling_30_000_queued_waiters_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "deque", CountingDeque)
    for waiters in (1_000, 30_000):
        touched = await touched_by_cancelling(waiters, at_once=500)
        assert waiters <= touched <= 4 * waiters, f"{touched / waiters:.0f} for each waiter"


@pytest.mark.asyncio
async def test_waiters_that_come_and_give_up_leave_no_tombstones_behind() -> None:
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire():
        hands = Hands(pool)
        for name in "abc":
            await hands.take(name)
        for _waiter in range(100):
            task = asyncio.create_task(use_pool(pool))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert len(pool._queue) <= 8
        for patient in hands.tasks.values():
            patient.cancel()
        await asyncio.wait(hands.tasks.values())


# --- Devices and workers ---


class FakeNVML(types.ModuleType):
    """The module `pynvml`, where a driver answers; `broken` names the function that fails."""

    def __init__(self, names: Iterable[str], broken: str = "") -> None:
        super().__init__("pynvml")
        self.names = list(names)
        self.broken = broken
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise RuntimeError(f"{name}: driver lost")

    def nvmlInit(self) -> None:
        self._call("nvmlInit")

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:
        self._call("nvmlDeviceGetCount")
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == 1:
            self._call("nvmlDeviceGetMemoryInfo")
        return types.SimpleNamespace(total=80 * 1024**3)


STAND_INS = [chapter.GPU(index, f"stand-in GPU {index}", 0) for index in range(4)]


def test_where_a_driver_answers_real_devices_are_listed_and_nvml_is_shut_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNVML(["NVIDIA H200", "NVIDIA L4"])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert chapter.discover_gpus() == [
        chapter.GPU(0, "NVIDIA H200", 81920),
        chapter.GPU(1, "NVIDIA L4", 81920),
    ]
    assert (nvml.calls[0], nvml.calls[-1]) == ("nvmlInit", "nvmlShutdown")


def test_a_driver_that_fails_half_way_is_shut_down_and_stand_ins_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNVML(["NVIDIA H200", "NVIDIA L4"], broken="nvmlDeviceGetMemoryInfo")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert chapter.discover_gpus() == STAND_INS
    assert nvml.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlShutdown"])
def test_no_failure_of_the_driver_breaks_discovery(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    nvml = FakeNVML(["NVIDIA H200"], broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert chapter.discover_gpus() == STAND_INS
    assert ("nvmlShutdown" in nvml.calls) == (broken != "nvmlInit")


def test_a_driver_without_devices_gives_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML([]))
    assert chapter.discover_gpus() == STAND_INS


def test_without_nvidia_ml_py_stand_ins_say_so_in_their_names_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    caplog.set_level("INFO", "workshop.pool")
    assert chapter.discover_gpus() == STAND_INS
    assert all("stand-in" in gpu.name for gpu in STAND_INS)
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.asyncio
async def test_a_worker_process_sees_its_device_alone() -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])"
    async with chapter.gpu_worker(devices(3)[2], sys.executable, "-ISc", code) as worker:
        output, _errors = await worker.communicate()
    assert output.split() == [b"2", b"PCI_BUS_ID"]
    assert worker.returncode == 0
    assert "CUDA_DEVICE_ORDER" not in os.environ


@contextmanager
def typed(text: bytes) -> Iterator[None]:
    """Something to read on this process's standard input, for a block."""
    keyboard, typing = os.pipe()
    os.write(typing, text)
    os.close(typing)
    stdin = os.dup(0)
    os.dup2(keyboard, 0)
    try:
        yield
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(keyboard)


@pytest.mark.asyncio
async def test_a_worker_gets_neither_the_keyboard_nor_ctrl_c() -> None:
    code = "import os, sys; print(len(sys.stdin.read()), os.getsid(0) == os.getpid())"
    with typed(b"by the user"):
        async with chapter.gpu_worker(devices(1)[0], sys.executable, "-ISc", code) as worker:
            output, _errors = await worker.communicate()
    assert output.split() == [b"0", b"True"]


@pytest.mark.asyncio
async def test_leaving_ends_a_worker_even_one_whose_output_nobody_reads() -> None:
    before = open_descriptors()
    gpu = devices(1)[0]
    async with chapter.gpu_worker(gpu, sys.executable, "-ISc", CHATTERBOX) as worker:
        await until(lambda: len(worker.stdout._buffer) > 2 * 2**16)  # asyncio reads no more
        assert child_processes()
    assert worker.returncode not in (None, 0)
    assert not child_processes()
    assert [
        to for to in open_descriptors().values() if "pipe" in to and to not in before.values()
    ] == []


@pytest.mark.asyncio
async def test_a_worker_is_gone_before_its_device_is_handed_on() -> None:
    async def use_worker(pool: Any, started: asyncio.Event) -> None:
        async with pool.acquire() as gpu:
            assert not child_processes()
            async with chapter.gpu_worker(gpu, sys.executable, "-ISc", CHATTERBOX) as worker:
                await worker.stdout.readline()
                started.set()
                await asyncio.Event().wait()

    async with chapter.GPUPool(devices(1)) as pool:
        events = [asyncio.Event() for _worker in range(3)]
        tasks = [asyncio.create_task(use_worker(pool, started)) for started in events]
        for task, started in zip(tasks, events, strict=True):
            await asyncio.wait_for(started.wait(), 10)
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)


@pytest.mark.asyncio
async def test_a_worker_that_cannot_be_started_says_why() -> None:
    with pytest.raises(FileNotFoundError, match="no such program"):
        async with chapter.gpu_worker(devices(1)[0], "no such program"):
            pass


# --- finish ---


@pytest.mark.asyncio
async def test_finish_ends_the_cleanup_first_and_raises_the_cancellation_then() -> None:
    steps: list[int] = []

    async def cleanup() -> None:
        for step in range(5):
            await asyncio.sleep(0)
            steps.append(step)

    task = asyncio.create_task(chapter.finish(cleanup()))
    while not task.done():
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.asyncio
async def test_finish_raises_what_the_cleanup_raises_also_when_cancelled() -> None:
    async def cleanup() -> None:
        await asyncio.sleep(0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await chapter.finish(cleanup())
    task = asyncio.create_task(chapter.finish(cleanup()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(OSError, match="disk full"):
        await task


@pytest.mark.asyncio
async def test_finish_gives_up_a_cleanup_that_hangs() -> None:
    with pytest.raises(TimeoutError):
        await chapter.finish(asyncio.Event().wait(), within=0.001)


# --- Sessions ---


class Server:
    """A stand-in server: answers when it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.may_answer = asyncio.Event()

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(json.loads(request.content)["messages"])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.may_answer.wait()
        finally:
            self.in_flight -= 1
        return answer(prompt_tokens=1234, completion_tokens=567, **CACHED)


CACHED: dict[str, Any] = {"prompt_tokens_details": {"cached_tokens": 1000}}
PRICE = Decimal("0.0004503")  # US dollars for such a call of gpt-4o-mini, by hand


NOTHING: tuple[list[Any], Any, Decimal] = ([], genai_prices.Usage(), Decimal(0))


def prompts(server: Server) -> list[str]:
    return [messages[-1]["content"] for messages in server.asked]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await ticks(1)


@pytest.mark.asyncio
async def test_turns_of_one_session_are_taken_one_at_a_time_in_the_order_of_the_calls() -> None:
    server = Server()
    async with client_of(server) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            tasks = [asyncio.create_task(session.ask(f"turn {n}")) for n in range(5)]
            await until(lambda: server.in_flight == 1)
            await ticks()
            assert prompts(server) == ["turn 0"]
            server.may_answer.set()
            assert await asyncio.gather(*tasks) == ["Yes."] * 5
    assert server.most_in_flight == 1
    assert prompts(server) == [f"turn {n}" for n in range(5)]
    assert [len(messages) for messages in server.asked] == [1, 3, 5, 7, 9]
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 5


@pytest.mark.asyncio
async def test_sessions_run_side_by_side_within_the_concurrency_that_they_share() -> None:
    server, limit = Server(), asyncio.Semaphore(3)
    async with client_of(server) as client, AsyncExitStack() as stack:
        opened = [
            chapter.async_llm_session(f"s{n}", client=client, max_concurrency=limit)
            for n in range(8)
        ]
        sessions = [await stack.enter_async_context(session) for session in opened]
        tasks = [asyncio.create_task(s.ask("?")) for s in sessions for _turn in range(3)]
        await until(lambda: server.in_flight == 3)
        await ticks(50)
        assert server.in_flight == 3
        server.may_answer.set()
        await asyncio.gather(*tasks)
    assert (server.most_in_flight, len(server.asked)) == (3, 24)


@pytest.mark.asyncio
async def test_turns_that_wait_for_their_session_hoard_no_slot() -> None:
    server, limit = Server(), asyncio.Semaphore(2)
    async with client_of(server) as client:
        busy = chapter.async_llm_session("busy", client=client, max_concurrency=limit)
        other = chapter.async_llm_session("other", client=client, max_concurrency=limit)
        async with busy as busy_session, other as other_session:
            tasks = [asyncio.create_task(busy_session.ask("busy")) for _turn in range(5)]
            await until(lambda: server.in_flight == 1)
            tasks.append(asyncio.create_task(other_session.ask("other")))
            await until(lambda: server.in_flight == 2)
            assert prompts(server) == ["busy", "other"]
            server.may_answer.set()
            await asyncio.gather(*tasks)


@pytest.mark.asyncio
async def test_usage_and_cost_are_exact_under_concurrency() -> None:
    server = Server()
    server.may_answer.set()
    async with client_of(server) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            await asyncio.gather(*(session.ask("?") for _turn in range(20)))
    total = session.usage
    counted = (total.input_tokens, total.cache_read_tokens, total.output_tokens)
    assert counted == (20 * 1234, 20 * 1000, 20 * 567)
    assert session.cost == 20 * PRICE


@pytest.mark.asyncio
async def test_a_model_of_unknown_price_costs_not_a_number_rather_than_nothing() -> None:
    async with client_of(soon) as client:
        async with chapter.async_llm_session("s", model="home-made", client=client) as session:
            assert await session.ask("?") == "Yes."
    assert session.cost.is_nan()
    assert session.usage.output_tokens == 5


@pytest.mark.asyncio
async def test_cancellation_in_mid_call_takes_the_turn_back_and_leaves_the_session_usable() -> None:
    server = Server()
    async with client_of(server) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            cancelled = asyncio.create_task(session.ask("cancelled"))
            behind = asyncio.create_task(session.ask("behind"))
            await until(lambda: server.in_flight == 1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert (session.messages, session.usage, session.cost) == NOTHING
            server.may_answer.set()
            await behind
            assert [message["content"] for message in session.messages] == ["behind", "Yes."]
            assert session.cost == PRICE


@pytest.mark.asyncio
async def test_cancelling_at_every_await_of_a_turn_records_it_whole_or_not_at_all() -> None:
    for awaits in range(1000):
        async with client_of(soon) as client:
            async with chapter.async_llm_session("s", client=client) as session:
                task = asyncio.create_task(session.ask("?"))
                await ticks(awaits)
                completed = not task.cancel()
                await asyncio.wait([task])
                recorded = (len(session.messages), session.usage.input_tokens, session.cost > 0)
                assert recorded == ((2, 10, True) if completed else (0, 0, False))
                assert await session.ask("again") == "Yes."
        if completed:
            break
    assert 2 < awaits < 999


@pytest.mark.asyncio
async def test_a_failed_call_takes_its_turn_back() -> None:
    responses = [httpx2.Response(500, json={}), answer()]
    async with client_of(lambda request: responses.pop(0)) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            with pytest.raises(openai.InternalServerError):
                await session.ask("first")
            assert (session.messages, session.usage, session.cost) == NOTHING
            assert await session.ask("second") == "Yes."


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(200, html="<h1>Proxy error</h1>"),
        httpx2.Response(200, json={}),
        httpx2.Response(200, json={"choices": [], "usage": None}),
    ],
    ids=["html", "empty", "no choices"],
)
async def test_an_answer_that_is_none_is_refused_and_not_recorded(
    response: httpx2.Response,
) -> None:
    async with client_of(lambda request: response) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            with pytest.raises(chapter.ReplyError, match="session 's' got no chat completion, but"):
                await session.ask("?")
            assert (session.messages, session.usage, session.cost) == NOTHING


@pytest.mark.asyncio
async def test_leaving_waits_for_the_turn_under_way_and_refuses_those_behind_it() -> None:
    server = Server()
    async with client_of(server) as client:
        manager = chapter.async_llm_session("s", client=client)
        session = await manager.__aenter__()
        under_way = asyncio.create_task(session.ask("under way"))
        behind = asyncio.create_task(session.ask("behind"))
        await until(lambda: server.in_flight == 1)
        leaving = asyncio.create_task(manager.__aexit__(None, None, None))
        await ticks()
        assert not leaving.done()
        server.may_answer.set()
        assert await under_way == "Yes."
        with pytest.raises(chapter.SessionClosedError, match="session 's' is closed: open a new"):
            await behind
        await leaving
        assert not client.is_closed()
    assert prompts(server) == ["under way"]


@pytest.mark.asyncio
async def test_a_session_closes_the_client_that_it_made_and_no_other(
    clients: list[openai.AsyncOpenAI],
) -> None:
    async with chapter.async_llm_session("s") as session:
        await session.ask("?")
        assert [client.is_closed() for client in clients] == [False]
    assert [client.is_closed() for client in clients] == [True]


@pytest.mark.asyncio
async def test_the_client_is_closed_on_its_loop_even_when_leaving_is_cancelled_again_and_again(
    monkeypatch: pytest.MonkeyPatch, clients: list[openai.AsyncOpenAI]
) -> None:
    closed_on: list[asyncio.AbstractEventLoop] = []

    async def close(client: openai.AsyncOpenAI) -> None:
        await ticks(3)
        closed_on.append(asyncio.get_running_loop())

    monkeypatch.setattr(openai.AsyncOpenAI, "close", close)

    async def use() -> None:
        async with chapter.async_llm_session("s") as session:
            await session.ask("?")
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await until(lambda: len(clients) == 1)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert closed_on == [asyncio.get_running_loop()]


def test_a_session_on_another_loop_is_refused_in_clear_words() -> None:
    async def opened() -> Any:
        manager = chapter.async_llm_session("s", client=client_of(soon))
        return manager, await manager.__aenter__()

    with asyncio.Runner() as its_own:
        manager, session = its_own.run(opened())
        with pytest.raises(RuntimeError, match="'s' belongs to the event loop that opened it"):
            asyncio.run(session.ask("?"))
        its_own.run(manager.__aexit__(None, None, None))


@pytest.mark.asyncio
async def test_a_number_as_max_concurrency_is_answered_with_what_to_pass_instead() -> None:
    with pytest.raises(TypeError, match=r"one asyncio.Semaphore\(4\) to share"):
        async with chapter.async_llm_session("s", max_concurrency=4):
            pass


# --- What the demos show ---


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Plays a demo and returns what it printed; and notes every chart in `chapter.charts`."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(chapter, "charts", [], raising=False)

    class NotedChart(chapter.Chart):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            chapter.charts.append(self)

    monkeypatch.setattr(chapter, "Chart", NotedChart)

    def play(name: str) -> str:
        console = Console(width=80, file=io.StringIO(), highlight=False)
        monkeypatch.setattr(chapter, "console", console)
        asyncio.run(getattr(chapter, name)())
        return cast(io.StringIO, console.file).getvalue()

    return play


Span = tuple[str, str, float, float]


def most_at_once(spans: Iterable[Span]) -> int:
    spans = list(spans)
    return max(sum(a[2] <= b[2] < a[3] for a in spans) for b in spans)


def test_demo_1_each_device_holds_one_job_at_a_time_and_every_job_saw_its_own_device_alone(
    played: Callable[[str], str],
) -> None:
    printed = played("demo_pool")
    spans: list[Span] = chapter.charts[0].spans
    assert sorted(letter for _row, letter, *_times in spans) == list("ABCDEFGHI")
    rows = {row for row, *_rest in spans}
    assert rows == {f"{gpu.index:2}: {gpu.name}" for gpu in STAND_INS}
    assert all(most_at_once(span for span in spans if span[0] == row) == 1 for row in rows)
    device_of = {letter: row[-1] for row, letter, *_times in spans}
    saw = " ".join(f"{job}={device_of[job]}" for job in "ABCDEFGHI")
    assert f"CUDA_VISIBLE_DEVICES, as each worker saw it: {saw}" in " ".join(printed.split())
    assert "✓ After the block: PoolStatistics(total=4, in_use=0, waiting=0)." in printed


def test_demo_1_draws_a_row_for_each_device_though_all_bear_one_name(
    played: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [chapter.GPU(index, "NVIDIA H200", 143_771) for index in range(2)]
    monkeypatch.setattr(chapter, "discover_gpus", lambda: same)
    printed = played("demo_pool").splitlines()
    assert printed[:2] == [f"{index}: NVIDIA H200, 143771 MiB" for index in range(2)]
    rows = [line for line in printed if line.startswith(" ") and "NVIDIA H200" in line]
    assert len(rows) == 2
    for index in range(2):
        assert rows[index].startswith(f" {index}: NVIDIA H200    {'AB'[index]}")


def test_demo_1_shows_progress_bars_in_a_terminal(
    played: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    printed = played("demo_pool")
    assert "━" in printed
    assert "100%" in printed
    assert "stand-in GPU 0" in printed


def test_demo_2_a_queue_starves_the_second_task_and_the_pool_alternates(
    played: Callable[[str], str],
) -> None:
    printed = played("demo_queue")
    assert f"Queue: {30 * 'A'}…\n✗ Turns of A before B's first: 100.\n" in printed
    assert f"GPUPool: {15 * 'AB'}…\n✓ Turns of A before B's first: 1.\n" in printed


def test_demo_3_after_gather_siblings_still_hold_devices_and_after_a_task_group_none_does(
    played: Callable[[str], str],
) -> None:
    printed = " ".join(played("demo_siblings").split())
    results = re.findall(r"([✗✓]) The caller gets (.+?)\. Devices still in use: (\d+)\.", printed)
    failed = "RuntimeError('the worker of job A failed')"
    assert results[0][:2] == ("✗", failed)
    assert int(results[0][2]) > 0
    assert results[1:] == [("✓", failed, "0"), ("✓", "TimeoutError()", "0")]
    for chart, outlives in zip(chapter.charts, (True, False, False), strict=True):
        awaited = next(span[3] for span in chart.spans if span[0] == "await")
        assert any(span[3] > awaited for span in chart.spans) == outlives


def test_demo_4_only_finish_ends_the_cleanup_before_the_task_ends(
    played: Callable[[str], str],
) -> None:
    printed = played("demo_cleanup").splitlines()
    assert [line for line in printed if line.startswith(("✗", "✓"))] == [
        "✗ `unprotected`: leases given back when the task ended: 0, 60 ms later: 0.",
        "✗ `shield`: leases given back when the task ended: 0, 60 ms later: 1.",
        "✓ `finish`: leases given back when the task ended: 1, 60 ms later: 1.",
    ]
    _code, path = (line for line in printed if "given_back.append" in line)
    assert path.split()[1:] == ["5", "5"]  # `unprotected` never ran it


def test_demo_5_two_calls_at_once_in_all_one_in_each_session_and_a_cancelled_turn_leaves_no_trace(
    played: Callable[[str], str],
) -> None:
    printed = played("demo_sessions")
    assert printed.startswith("A stand-in plays the model: 30 ms a call, a token for each word.\n")
    spans: list[Span] = chapter.charts[0].spans
    assert most_at_once(spans) == 2
    for name, turns in (("Ada", "1233"), ("Bob", "12"), ("Cem", "12")):
        own = [span for span in spans if span[0].startswith(name)]
        assert "".join(span[1] for span in own) == turns
        assert most_at_once(own) == 1
    assert "✓ Cancelled half-way. Messages before: 4, after: 4." in printed
    # The words of Ada's whole turns: 3, then 3 + 4 + 4, then 3 + 4 + 4 + 4 + 3; and 4 back each.
    ada = next(line for line in printed.splitlines() if line.startswith("│ Ada"))
    cost = (32 * Decimal("0.15") + 12 * Decimal("0.6")) / 1_000_000
    assert [cell.strip() for cell in ada.split("│")[2:4]] == ["32", "12"]
    assert Decimal(ada.split("│")[4].strip()) == cost


def test_the_chart_draws_each_span_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(width=40, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(chapter, "console", console)
    with pytest.raises(LookupError), chapter.Chart() as chart:
        chart.spans += [("b", "X", 0.010, 0.020), ("a", "Y", 0.0, 0.005), ("a", "Z", 0.005, 0.01)]
        raise LookupError
    assert cast(io.StringIO, console.file).getvalue().splitlines() == [
        f"{'a':19}YYYYYZZZZZ··········",
        f"{'b':19}··········XXXXXXXXXX",
        f"{'':19}0{'20 ms':>19}",
    ]


def test_a_chart_without_spans_draws_nothing(played: Callable[[str], str]) -> None:
    async def nothing() -> None:
        with chapter.Chart():
            pass

    chapter.demo_nothing = nothing
    try:
        assert played("demo_nothing") == ""
    finally:
        del chapter.demo_nothing


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [(401, {"error": {"message": "no such key"}}, "AuthenticationError"), (200, {}, "ReplyError")],
)
def test_live_ends_with_one_line_where_the_model_does_not_answer(
    status: int,
    body: dict[str, Any],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def refuse(*request: object) -> httpx2.Response:
        return httpx2.Response(status, json=body)

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", refuse)
    monkeypatch.setattr(chapter, "live", False)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", "--live", "5"])
    with pytest.raises(SystemExit) as ended:
        chapter.main()
    printed, message = capsys.readouterr()
    assert ended.value.code == 1
    assert message.startswith(f"03_async_manager.py: the model did not answer: {error}(")
    assert message.count("\n") == 1
    assert "stand-in" not in printed


def test_ctrl_c_that_surfaces_as_a_cancellation_is_a_keyboard_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So it is on Python 3.11, after a task group has failed."""

    async def demo_interrupted() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(chapter, "DEMOS", (demo_interrupted,))
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", "1"])
    assert chapter.main() == 130
    assert "Interrupted" in capsys.readouterr().out


def test_live_without_a_key_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", "--live"])
    with pytest.raises(SystemExit) as ended:
        chapter.main()
    assert ended.value.code == 2
    assert "--live needs OPENAI_API_KEY" in capsys.readouterr().err.splitlines()[-1]
