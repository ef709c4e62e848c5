"""Chapter 03: each claim of its lessons, and the cleanup contract for each of its managers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any
from unittest.mock import MagicMock

import anyio
import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, Subject, Way
from left_behind import child_processes
from rich.console import Console

chapter: Any = load_chapter(3)


def devices(count: int) -> list[Any]:
    return [chapter.GPU(index, f"stand-in GPU {index}", 0) for index in range(count)]


async def ticks(count: int = 10) -> None:
    """Let the loop turn so often that every task has gone as far as it can."""
    for _tick in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await ticks(1)


# --- The cleanup contract ---

CHATTERBOX = "while True: print('never ends', flush=True)"


def worker(code: str, index: int = 0) -> Any:
    return chapter.gpu_worker(devices(4)[index], sys.executable, "-ISc", code)


@asynccontextmanager
async def waited_for(pool: Any) -> AsyncIterator[Any]:
    """Acquire the only device, which another holds until the event loop turns."""
    async with pool:
        holder = pool.acquire()
        await holder.__aenter__()
        asyncio.get_running_loop().call_soon(leave, holder)
        async with pool.acquire(timeout=9) as gpu:
            yield gpu


def leave(manager: Any) -> None:
    """Leave an async block outside of any task, which works where leaving never suspends."""
    with pytest.raises(StopIteration):
        manager.__aexit__(None, None, None).send(None)


async def use_pool(pool: Any) -> None:
    async with pool.acquire():
        await asyncio.sleep(0)


def client_of(handler: Callable[[httpx2.Request], Any]) -> openai.AsyncOpenAI:
    """The real client, in front of a handler."""
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
    url = "http://api/v1"
    return openai.AsyncOpenAI(api_key="-", base_url=url, http_client=http, max_retries=0)


JSON = {"content-type": "application/json"}


def completion(
    message: object = "Yes.", finish: object = "stop", usage: object = (10, 5)
) -> httpx2.Response:
    """What the chat API answers."""
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": 15}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in"}
    text = json.dumps(body | {"choices": [choice], "usage": usage})
    return httpx2.Response(200, text=text, headers=JSON)


async def soon(request: httpx2.Request) -> httpx2.Response:
    await asyncio.sleep(0)
    return completion()


def clients_made(monkeypatch: pytest.MonkeyPatch, handler: Any = soon) -> list[Any]:
    """The clients that sessions make for themselves from now on: without a network."""
    made: list[Any] = []

    def make() -> openai.AsyncOpenAI:
        client = client_of(handler)
        made.append(client)
        return client

    monkeypatch.setattr(chapter, "AsyncOpenAI", make)
    return made


def subject_named(name: str, monkeypatch: pytest.MonkeyPatch) -> Subject:
    pools: list[Any] = []
    clients = clients_made(monkeypatch)

    def pool(count: int = 8) -> Any:
        pools.append(chapter.GPUPool(devices(count)))
        return pools[-1]

    def lent() -> object:
        return [pool for pool in pools if counts(pool)[1:] != (0, 0)]

    return {
        "pool": Subject(pool, lent, use_pool, chapter.PoolClosedError, visible=False),
        "device": Subject(lambda: waited_for(pool(1)), lent),
        "worker": Subject(
            lambda: worker(CHATTERBOX), child_processes, lambda worker: worker.stdout.readline()
        ),
        "session": Subject(
            lambda: chapter.async_llm_session("s"),
            lambda: [client for client in clients if not client.is_closed()],
            lambda session: session.ask("Is it?"),
            chapter.SessionClosedError,
        ),
    }[name]


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["pool", "device", "worker", "session"])
def test_each_manager_keeps_the_cleanup_contract(
    name: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(subject_named(name, monkeypatch))


# --- The pool: who gets which device, and when ---


class Hands:
    """Tasks that hold a device until they may leave; notes in which order they got it."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.order: list[str] = []
        self.may_leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def take(self, names: str) -> None:
        """Start a task for each letter, and let it go as far as it can."""
        for name in names:
            self.may_leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold(name))
            await ticks()

    async def _hold(self, name: str) -> None:
        async with self.pool.acquire():
            self.order.append(name)
            await self.may_leave[name].wait()

    async def leave(self, names: str = "") -> None:
        """Let some tasks, or all, come to their end, and wait for it."""
        for name in names or self.tasks:
            self.may_leave[name].set()
        async with asyncio.timeout(30):  # for ever, if the pool has lost a device
            await asyncio.gather(*(self.tasks[name] for name in names or self.tasks))


def counts(pool: Any) -> tuple[int, int, int]:
    statistics = pool.statistics()
    return statistics.total, statistics.in_use, statistics.waiting


@pytest.mark.asyncio
async def test_waiters_are_served_first_come_first_served() -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        await hands.take("abcdefgh")
        for name in "bcf":
            hands.tasks.pop(name).cancel()
        await ticks()
        assert counts(pool) == (1, 1, 4)
        await hands.leave()
    assert hands.order == list("adegh")


@pytest.mark.asyncio
@pytest.mark.parametrize("next_in_line", ["c", ""])
@pytest.mark.parametrize("served", [False, True])
async def test_a_waiter_cancelled_in_this_tick_loses_nothing(
    served: bool, next_in_line: str
) -> None:
    async with chapter.GPUPool(devices(1)) as pool:
        hands = Hands(pool)
        async with pool.acquire():
            await hands.take("b" + next_in_line)
            if not served:
                hands.tasks["b"].cancel()
        hands.tasks["b"].cancel()
        with pytest.raises(asyncio.CancelledError):
            await hands.tasks.pop("b")
        await hands.leave()
        async with pool.acquire(timeout=0):
            pass
    assert hands.order == list(next_in_line)
    assert counts(pool) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_timeout_names_the_devices_and_the_seconds() -> None:
    async with chapter.GPUPool(devices(1)) as pool, pool.acquire(timeout=0) as gpu:
        assert gpu == devices(1)[0]
        await ticks()  # the timeout does not limit the block
        with pytest.raises(TimeoutError, match=r"^none of 1 devices came free within 0.001 s$"):
            async with pool.acquire(timeout=0.001):
                pass
        with pytest.raises(TimeoutError, match=r"^$"):  # the caller's timeout stays the caller's
            async with asyncio.timeout(0), pool.acquire(timeout=60):
                pass
        assert counts(pool) == (1, 1, 0)


@pytest.mark.asyncio
async def test_a_pool_lends_only_while_it_is_open() -> None:
    for gpus in ([], devices(1) * 2):
        with pytest.raises(ValueError, match="needs devices, each of them once"):
            chapter.GPUPool(gpus)
    pool = chapter.GPUPool(devices(1))
    for _time in range(2):
        with pytest.raises(chapter.PoolClosedError, match="is not open: acquire inside its"):
            await use_pool(pool)
        async with pool:
            with pytest.raises(RuntimeError, match="is open already: make another"):
                await pool.__aenter__()
            await use_pool(pool)


@pytest.mark.asyncio
async def test_closing_fails_waiters_and_waits_for_devices_in_use() -> None:
    pool = chapter.GPUPool(devices(2))
    await pool.__aenter__()
    await use_pool(pool)  # once before, all devices had come back
    hands = Hands(pool)
    await hands.take("abxc")
    hands.tasks.pop("x").cancel()
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await ticks()
    with pytest.raises(chapter.PoolClosedError, match="closed while the task waited"):
        await hands.tasks.pop("c")
    with pytest.raises(chapter.PoolClosedError, match="is not open"):
        await use_pool(pool)
    await hands.leave("a")
    await ticks()
    assert not closing.done()
    assert counts(pool) == (2, 1, 0)
    await hands.leave("b")
    await closing
    assert counts(pool) == (2, 0, 0)


@pytest.mark.asyncio
async def test_a_closing_that_is_cancelled_still_closes() -> None:
    pool = chapter.GPUPool(devices(1))
    await pool.__aenter__()
    hands = Hands(pool)
    await hands.take("ab")
    closing = asyncio.create_task(pool.__aexit__(None, None, None))
    await asyncio.sleep(0)
    closing.cancel()
    hands.tasks["b"].cancel()  # in the tick in which it gets PoolClosedError
    for task in (closing, hands.tasks.pop("b")):
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(chapter.PoolClosedError):
        await use_pool(pool)
    assert counts(pool) == (1, 1, 0)
    await hands.leave()
    assert counts(pool) == (1, 0, 0)


# --- The pool: under load ---


class ShuffledLoop(asyncio.SelectorEventLoop):
    """An event loop that runs what is ready in random order."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def _run_once(self) -> None:
        loop: Any = self
        ready = list(loop._ready)
        self.rng.shuffle(ready)
        loop._ready.clear()
        loop._ready.extend(ready)
        super()._run_once()  # type: ignore[misc]


async def storm(pool: Any, rng: random.Random, ended: Counter[str]) -> None:
    """Take devices in many ways, while tasks are cancelled at random; count how blocks end."""
    in_hands: set[Any] = set()

    async def customer() -> None:
        while ended["served"] < 25_000:
            try:
                async with pool.acquire(rng.choice((None, None, None, 0))) as gpu:
                    assert gpu not in in_hands, f"{gpu} is in two hands"
                    in_hands.add(gpu)
                    ended["served"] += 1
                    try:
                        if rng.random() < 0.7:
                            await asyncio.sleep(0)
                        if rng.random() < 0.1:
                            raise LookupError
                    finally:
                        in_hands.remove(gpu)
            except (asyncio.CancelledError, TimeoutError, LookupError) as error:
                ended[type(error).__name__] += 1

    customers = [asyncio.create_task(customer()) for _customer in range(40)]
    while ended["served"] < 25_000:
        await asyncio.sleep(0)
        for task in rng.sample(customers, 2):
            task.cancel()
    for end in await asyncio.gather(*customers, return_exceptions=True):
        assert end is None or isinstance(end, asyncio.CancelledError)  # before it started


@pytest.mark.parametrize("eager", [False, True])
def test_a_storm_of_25_000_acquisitions_loses_no_device(eager: bool) -> None:
    """On a shuffled loop, with timeouts, errors, cancellations, and eager tasks (Python 3.12)."""
    rng, ends = random.Random(3), Counter[str]()
    factory = getattr(asyncio, "eager_task_factory", None)
    if eager and factory is None:
        pytest.skip("Python 3.11 has no eager tasks")

    async def play() -> None:
        asyncio.get_running_loop().set_task_factory(factory if eager else None)
        async with asyncio.timeout(60), chapter.GPUPool(devices(8)) as pool:
            await storm(pool, rng, ends)
            assert (counts(pool), len(pool._waiters)) == ((8, 0, 0), 0)
            assert set(pool._free) == set(devices(8))

    with asyncio.Runner(loop_factory=lambda: ShuffledLoop(rng)) as runner:
        runner.run(play())
    assert ends.keys() == {"served", "CancelledError", "TimeoutError", "LookupError"}
    assert min(ends.values()) > 500, ends


# --- Devices and workers ---


STAND_INS = devices(4)


def driver(monkeypatch: pytest.MonkeyPatch, *names: str) -> MagicMock:
    """The module `pynvml`, where a driver answers."""
    nvml = MagicMock()
    nvml.nvmlDeviceGetCount.return_value = len(names)
    nvml.nvmlDeviceGetHandleByIndex.side_effect = lambda index: index
    nvml.nvmlDeviceGetName.side_effect = names
    nvml.nvmlDeviceGetMemoryInfo.return_value.total = 80 * 1024**3
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_devices_are_those_of_a_driver_or_stand_ins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = driver(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    h200, l4 = chapter.GPU(0, "NVIDIA H200", 81920), chapter.GPU(1, "NVIDIA L4", 81920)
    assert chapter.discover_gpus() == [h200, l4]
    assert nvml.nvmlShutdown.called
    driver(monkeypatch)
    assert chapter.discover_gpus() == STAND_INS
    monkeypatch.setitem(sys.modules, "pynvml", None)
    caplog.set_level("INFO", "workshop.pool")
    assert chapter.discover_gpus() == STAND_INS
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize(
    "broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo", "nvmlShutdown"]
)
def test_a_driver_that_fails_is_shut_down_and_replaced(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = driver(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    getattr(nvml, broken).side_effect = [nvml, RuntimeError("driver lost")]
    if broken != "nvmlDeviceGetMemoryInfo":  # that one fails half-way
        getattr(nvml, broken).side_effect = RuntimeError("driver lost")
    assert chapter.discover_gpus() == STAND_INS
    assert nvml.nvmlShutdown.called == (broken != "nvmlInit")


@pytest.mark.asyncio
async def test_a_worker_sees_its_device_no_keyboard_and_no_ctrl_c() -> None:
    code = """if True:
        import os
        print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"])
        print(os.path.samestat(os.fstat(0), os.stat(os.devnull)), os.getsid(0) == os.getpid())"""
    async with worker(code, 2) as process:
        output, _errors = await process.communicate()
    assert output.split() == [b"2", b"PCI_BUS_ID", b"True", b"True"]
    assert process.returncode == 0
    assert "CUDA_DEVICE_ORDER" not in os.environ


# A child of the worker that holds the worker's output open, and writes its process id there.
GRANDCHILD = """if True:
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(60)"])
    print(child.pid, flush=True)"""


@pytest.mark.asyncio
@pytest.mark.parametrize("worker_ends_first", [False, True])
async def test_the_processes_a_worker_starts_are_killed_with_it(worker_ends_first: bool) -> None:
    async with asyncio.timeout(8):  # an orphan would let the block wait for 10 s
        async with worker(GRANDCHILD + ("" if worker_ends_first else "; child.wait()")) as process:
            grandchild = int(await process.stdout.readline())
            if worker_ends_first:
                await until(lambda: process.returncode is not None)
    await until(lambda: not is_running(grandchild))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.asyncio
async def test_two_cancellations_in_mid_start_leave_no_child() -> None:
    for first in range(6):
        for second in range(1, 6):
            task = asyncio.create_task(worker(CHATTERBOX).__aenter__())
            await ticks(first)
            task.cancel()
            await ticks(second)
            task.cancel()
            with suppress(asyncio.CancelledError):
                manager_entered = await task
                manager_entered.kill()
                await manager_entered.communicate()
            assert not child_processes(), (first, second)


LOOP_ENDS_AFTER_N_TICKS = """if True:
    import asyncio, runpy, sys
    chapter = runpy.run_path(sys.argv[1])
    async def user():
        code = "import time; time.sleep(60)"
        async with chapter["gpu_worker"](chapter["GPU"](0, "", 0), sys.executable, "-c", code):
            await asyncio.sleep(0)
    async def main(ticks):
        task = asyncio.create_task(user())
        for _tick in range(ticks):
            await asyncio.sleep(0)
    for ticks in range(14):
        asyncio.run(main(ticks))
    print("done")"""


def test_a_loop_that_ends_in_mid_start_kills_the_worker() -> None:
    """A worker that is left behind holds stderr open, and a loop that hangs never ends."""
    command = [sys.executable, "-c", LOOP_ENDS_AFTER_N_TICKS, os.fspath(chapter_path(3))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ended.stdout == "done\n"


@pytest.mark.asyncio
async def test_a_worker_that_cannot_be_started_says_why() -> None:
    with pytest.raises(FileNotFoundError, match="no such program"):
        async with chapter.gpu_worker(devices(1)[0], "no such program"):
            pass


# --- finish ---


@pytest.mark.asyncio
async def test_finish_ends_the_cleanup_before_it_is_cancelled() -> None:
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
@pytest.mark.parametrize("cancelled", [False, True])
async def test_finish_raises_what_the_cleanup_raises(cancelled: bool) -> None:
    async def cleanup() -> None:
        await asyncio.sleep(0)
        raise OSError("disk full")

    task = asyncio.create_task(chapter.finish(cleanup()))
    await asyncio.sleep(0)
    if cancelled:
        task.cancel()
    with pytest.raises(OSError, match="disk full"):
        await task


@pytest.mark.asyncio
async def test_within_bounds_a_cleanup_that_handles_cancellation() -> None:
    may_end = asyncio.Event()

    async def stubborn() -> None:
        while not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await may_end.wait()

    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError, match=r"the cleanup did not end within 0.001 s"):
            await chapter.finish(stubborn(), within=0.001)
    may_end.set()
    await ticks()


@pytest.mark.asyncio
async def test_finish_sleeps_in_an_anyio_scope_that_is_cancelled() -> None:
    """Without a shield, the scope cancels the task, and so wakes it, at each turn of the loop."""
    task = asyncio.current_task()
    assert task is not None
    with anyio.CancelScope() as scope:
        scope.cancel()
        with suppress(asyncio.CancelledError):
            await chapter.finish(ticks(100))
        wake_ups = task.cancelling()
        await asyncio.sleep(0)  # where the scope cancels the task
    assert scope.cancelled_caught
    assert wake_ups <= 1


# --- Sessions ---


class Server:
    """A stand-in server: answers when it may, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.may_answer = asyncio.Event()
        self.response: httpx2.Response | None = None

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(json.loads(request.content)["messages"])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.may_answer.wait()
        finally:
            self.in_flight -= 1
        return self.response or completion()

    def prompts(self) -> list[str]:
        return [messages[-1]["content"] for messages in self.asked]


@asynccontextmanager
async def session_with(handler: Any, **options: Any) -> AsyncIterator[Any]:
    async with client_of(handler) as client:
        async with chapter.async_llm_session("s", client=client, **options) as session:
            yield session
        assert not client.is_closed()  # a session closes only the client that it made


@pytest.mark.asyncio
async def test_turns_are_taken_one_at_a_time_in_order() -> None:
    server = Server()
    async with session_with(server) as session:
        tasks = [asyncio.create_task(session.ask(f"turn {n}")) for n in range(5)]
        await until(lambda: server.in_flight == 1)
        await ticks()
        assert server.prompts() == ["turn 0"]
        server.may_answer.set()
        assert await asyncio.gather(*tasks) == ["Yes."] * 5
    assert server.most_in_flight == 1
    assert server.prompts() == [f"turn {n}" for n in range(5)]
    assert [len(messages) for messages in server.asked] == [1, 3, 5, 7, 9]
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 5
    assert session.usage == chapter.Usage(input_tokens=50, output_tokens=25)


@pytest.mark.asyncio
async def test_sessions_share_the_concurrency_and_hoard_no_slot() -> None:
    """Two slots: the turns that wait for the busy session leave one to the other session."""
    server, limit = Server(), asyncio.Semaphore(2)
    async with AsyncExitStack() as stack:
        opened = [session_with(server, max_concurrency=limit) for _session in range(3)]
        busy, *others = [await stack.enter_async_context(session) for session in opened]
        tasks = [asyncio.create_task(busy.ask("busy")) for _turn in range(5)]
        tasks += [asyncio.create_task(other.ask("other")) for other in others]
        await until(lambda: server.in_flight == 2)
        await ticks(50)
        assert server.prompts() == ["busy", "other"]
        server.may_answer.set()
        await asyncio.gather(*tasks)
    assert (server.most_in_flight, len(server.asked)) == (2, 7)


@pytest.mark.asyncio
async def test_a_turn_cancelled_at_any_await_is_whole_or_absent() -> None:
    for awaits in range(1000):
        async with session_with(soon) as session:
            task = asyncio.create_task(session.ask("?"))
            await ticks(awaits)
            completed = not task.cancel()
            await asyncio.wait([task])
            assert (len(session.messages), session.usage.input_tokens) == (
                (2, 10) if completed else (0, 0)
            )
            assert await session.ask("again") == "Yes."
        if completed:
            break
    assert 2 < awaits < 999


CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
FAILURES = {
    "status 401": httpx2.Response(401, json={"error": {"message": "no key"}}),
    "status 503": httpx2.Response(503, text="line 1\nline 2"),
    "HTML": httpx2.Response(200, html="<h1>Proxy error</h1>"),
    "broken JSON": httpx2.Response(200, text='{"choi', headers=JSON),
    "deep JSON": httpx2.Response(200, text="[" * 100_000, headers=JSON),
    "not UTF-8": httpx2.Response(200, content=b"\xff{", headers=JSON),
    "an error": httpx2.Response(200, json={"error": {"message": "overloaded"}}),
    "nothing": httpx2.Response(200, json={}),
    "null": httpx2.Response(200, json=None),
    "no choices": httpx2.Response(200, json={"choices": [], "usage": None}),
    "message null": completion(message=None),
    "content of numbers": completion(message={"role": "assistant", "content": [5]}),
    "refusal empty": completion(message={"content": None, "refusal": "", "tool_calls": []}),
    "empty finish_reason": completion(finish=""),
    "no usage": completion(usage=None),
    "usage of nulls": completion(usage=(None, None)),
    "usage of words": completion(usage=("Infinity", 1)),
    "usage infinite": completion(usage=(float("inf"), 1)),
}
SAYS = {"status 401": "no key", "HTML": "Proxy error", "an error": "overloaded"}


@pytest.mark.asyncio
@pytest.mark.parametrize("failure", FAILURES)
async def test_an_answer_that_is_not_whole_records_nothing(failure: str) -> None:
    responses = [FAILURES[failure], completion()]
    async with session_with(lambda request: responses.pop(0)) as session:
        with pytest.raises((openai.APIStatusError, chapter.ReplyError), match=SAYS.get(failure)):
            await session.ask("?")
        assert (session.messages, session.usage) == ([], chapter.Usage(0, 0))
        assert await session.ask("?") == "Yes."


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("part", "text"),
    [({"content": ""}, ""), ({"refusal": "No."}, "No."), ({"tool_calls": CALLS}, "")],
)
async def test_refusals_and_tool_calls_are_recorded_as_sent(
    part: dict[str, Any], text: str
) -> None:
    message = {"role": "assistant", "content": None} | part
    async with session_with(lambda request: completion(message)) as session:
        assert await session.ask("?") == text
        assert session.messages[1] == {"role": "assistant"} | part


@pytest.mark.asyncio
@pytest.mark.parametrize("fails", [False, True])
async def test_a_block_left_in_mid_turn_waits_for_nothing(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn under way and the one behind it raise SessionClosedError, and are not recorded."""
    server = Server()
    clients_made(monkeypatch, server)
    async with chapter.async_llm_session("s") as session:
        turns = [asyncio.create_task(session.ask(f"turn {n}")) for n in range(2)]
        await until(lambda: server.in_flight == 1)
    assert server.in_flight == 1  # the call has not been cancelled
    with pytest.raises(chapter.SessionClosedError):  # at once: it does not wait in line
        await session.ask("too late")
    if fails:
        server.response = httpx2.Response(500)
    server.may_answer.set()
    for turn in turns:
        with pytest.raises(chapter.SessionClosedError, match="session 's' is closed: open a new"):
            await turn
    assert (session.messages, session.usage) == ([], chapter.Usage(0, 0))
    assert server.prompts() == ["turn 0"]


# --- What the demos show ---


VERDICTS = {
    "demo_async_manager": ["✗ `blocking`: 1 of 3", "✓ `awaiting`: 3 of 3"],
    "demo_pool": ["✓ Served in the order ABCDEFGHI."],
    "demo_queue": [f"✗ `Queue`: {20 * 'A'}{20 * 'B'}. ", f"✓ `GPUPool`: {20 * 'AB'}. "],
    "demo_lost_device": ["✗ A: TimeoutError, B: TimeoutError", "✓ A: TimeoutError, B: stand-in"],
    "demo_served_and_cancelled": ["✗ C: TimeoutError. ", "✓ C: stand-in GPU 0. "],
    "demo_siblings": ["✗ `in_gather`", "✓ `in_group`", "✓ `in_timeout`"],
    "demo_cleanup": ["✗ `unprotected`", "✗ `shield`", "✓ `finish`"],
    "demo_sessions": ["✓ Dan's messages after the cancelled turn: 0, after the next: 2."],
}


@pytest.mark.parametrize("demo", VERDICTS)
def test_a_demo_shows_what_is_lost(demo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    shown: list[str] = []
    monkeypatch.setattr(
        chapter, "verdict", lambda holds, text: shown.append(("✓ " if holds else "✗ ") + text)
    )
    asyncio.run(getattr(chapter, demo)())
    begins = [text[: len(expected)] for text, expected in zip(shown, VERDICTS[demo], strict=True)]
    assert begins == VERDICTS[demo]


def test_demo_8_shows_two_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[Any] = []
    monkeypatch.setattr(chapter.Chart, "draw", lambda chart: spans.extend(chart.spans))
    asyncio.run(chapter.demo_sessions())
    for name, turns in (("Ada", "12"), ("Bob", "12"), ("Cem", "12"), ("Dan", "x1")):
        assert "".join(span.letter for span in spans if span.row.startswith(name)) == turns
    at_once = [sum(a.began <= b.began < a.ended for a in spans) for b in spans]
    assert max(at_once) == 2


def test_a_chart_draws_all_blocks_on_one_scale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chapter, "console", Console(width=80, highlight=False))
    chart = chapter.Chart()
    chart.spans.append(chapter.Span("first", "X", 1.0, 2.0))
    chart.spans.append(chapter.Span("second", "-", 1.5, 3.0))
    chart.spans.append(chapter.Span("second", "Y", 2.0, 2.5))
    chart.draw()
    assert capsys.readouterr().out.splitlines() == [
        f"{'first':19}{30 * 'X'}{30 * '·'}",
        f"{'second':19}{15 * '·'}{15 * '-'}{15 * 'Y'}{15 * '-'}",
        f"{'':19}0{'2000 ms':>59}",
        "",
    ]


# --- The command line


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Play the script with arguments, and return its exit status."""
    monkeypatch.setattr(chapter, "live", False)
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", *arguments])
    try:
        return chapter.main()
    except SystemExit as end:
        return end.code


def test_a_cancelled_run_ends_as_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Python 3.11, Ctrl-C surfaces so after a task group has failed."""

    async def demo_interrupted() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(chapter, "DEMOS", (demo_interrupted,))
    assert ended(monkeypatch, "1") == 130
    assert "Interrupted" in capsys.readouterr().out
