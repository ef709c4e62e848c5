"""Chapter 03: each claim of its lessons, and the cleanup contract for each of its managers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import anyio
import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, Fault, Subject, Way, time_limit
from left_behind import child_processes
from rich.console import Console
from waiting import until, wait_all_tasks_blocked

chapter: Any = load_chapter(3)
DEVICES = [chapter.GPU(index, f"stand-in GPU {index}", 0) for index in range(8)]


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A pool that has lost a device waits for ever."""
    with time_limit():
        yield


def counts(pool: Any) -> tuple[int, int, int]:
    statistics = pool.statistics()
    return statistics.total, statistics.in_use, statistics.waiting


async def use_pool(pool: Any) -> None:
    async with pool.acquire():
        await asyncio.sleep(0)


CHATTERBOX = "while True: print('never ends', flush=True)"


def worker(code: str, index: int = 0) -> Any:
    return chapter.gpu_worker(DEVICES[index], sys.executable, "-ISc", code)


def client_of(handler: Callable[[httpx2.Request], Any]) -> openai.AsyncOpenAI:
    """The real client, in front of a handler."""
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
    url = "http://api/v1"
    return openai.AsyncOpenAI(api_key="-", base_url=url, http_client=http, max_retries=0)


def clients_made(monkeypatch: pytest.MonkeyPatch, handler: Any) -> list[Any]:
    """The clients that sessions make for themselves from now on: without a network."""
    made: list[Any] = []

    def make() -> openai.AsyncOpenAI:
        made.append(client_of(handler))
        return made[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(chapter, "AsyncOpenAI", make)
    return made


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


# --- The cleanup contract ---


def fault(error: type[Exception], target: Any, name: str, value: object) -> Fault:
    """Give an attribute a value with which `error` must come out."""

    @contextmanager
    def injected() -> Iterator[type[Exception]]:
        with patch.object(target, name, value):
            yield error

    return injected


def pool_subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    pools: list[Any] = []
    given = SimpleNamespace(devices=DEVICES[:2], timeout=None)

    @asynccontextmanager
    async def pool_with_a_device() -> AsyncIterator[Any]:
        """Acquire a device of a pool; others hold all of them until the event loop turns."""
        pools.append(chapter.GPUPool(given.devices))
        async with pools[-1] as pool:
            for _device in given.devices:
                holder = pool.acquire()
                await holder.__aenter__()
                asyncio.get_running_loop().call_soon(leave, holder)
            async with pool.acquire(given.timeout):
                yield pool

    def leave(holder: Any) -> None:
        """Leave the block outside of any task, which works since leaving never suspends."""
        with pytest.raises(StopIteration):
            holder.__aexit__(None, None, None).send(None)

    return Subject(
        pool_with_a_device,
        lambda: [pool for pool in pools if counts(pool)[1:] != (0, 0)],
        use_pool,
        chapter.PoolClosedError,
        setup_faults=[
            fault(ValueError, given, "devices", []),
            fault(TimeoutError, given, "timeout", 0),  # in the tick in which it is served
        ],
        cleanup_faults="to release a device awaits nothing and calls nothing that can fail",
    )


def worker_subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    communicate = chapter.Process.communicate

    async def fail(process: Any) -> None:
        await communicate(process)
        raise OSError("injected")

    return Subject(
        lambda: worker(CHATTERBOX),
        child_processes,
        lambda worker: worker.stdout.readline(),
        setup_faults=[fault(FileNotFoundError, sys, "executable", "no such program")],
        cleanup_faults=[fault(OSError, chapter.Process, "communicate", fail)],
    )


def session_subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    async def soon(request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0)
        return completion()

    async def fail(transport: object) -> None:
        raise OSError("injected")

    clients = clients_made(monkeypatch, soon)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    limit, sessions = asyncio.Semaphore(1), []

    def ask(session: Any) -> Any:
        sessions.append(session)
        return session.ask("Is it?")

    def leaks() -> list[str]:
        """A turn that is recorded in part, or still blocks others, is a leak, too."""
        left = [f"{client} is open" for client in clients if not client.is_closed()]
        for session in sessions:
            whole = len(session.messages) * 5 == session.usage.input_tokens
            left += [] if whole else [f"half a turn: {session.messages}, {session.usage}"]
            left += ["a turn that blocks others"] * session._turn.locked()
            left += ["a session that takes turns"] * (not session._closed)
        return left + ["a slot"] * limit.locked()

    return Subject(
        lambda: chapter.async_llm_session("s", max_concurrency=limit),
        leaks,
        ask,
        chapter.SessionClosedError,
        setup_faults=[fault(openai.OpenAIError, chapter, "AsyncOpenAI", openai.AsyncOpenAI)],
        cleanup_faults=[fault(OSError, httpx2.MockTransport, "aclose", fail)],
    )


def finish_subject(_monkeypatch: pytest.MonkeyPatch) -> Subject:
    """What the chapter teaches: no `await` before `try`, and a cleanup that `finish` ends."""
    held: list[str] = []
    broken = SimpleNamespace(at="")

    async def give_back(name: str) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        held.remove(name)
        if broken.at == name:
            raise OSError(name)

    async def give_back_in_full(name: str) -> None:
        await chapter.finish(give_back(name))

    @asynccontextmanager
    async def lease() -> AsyncIterator[str]:
        async with AsyncExitStack() as stack:
            for name in ("device", "memory"):
                held.append(name)
                stack.push_async_callback(give_back_in_full, name)
                await asyncio.sleep(0)
                if broken.at == "set-up":
                    raise OSError("set-up")
            yield "both"

    return Subject(
        lease,
        lambda: held,
        setup_faults=[fault(OSError, broken, "at", "set-up")],
        cleanup_faults=[fault(OSError, broken, "at", name) for name in ("device", "memory")],
    )


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [pool_subject, worker_subject, session_subject, finish_subject])
def test_each_manager_keeps_the_cleanup_contract(
    make: Callable[[pytest.MonkeyPatch], Subject], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(make(monkeypatch))


# --- The pool: who gets which device, and when ---


async def queue_up(pool: Any, names: str, served: list[str]) -> dict[str, asyncio.Task[None]]:
    """Start a task for each letter that takes a device for a moment, and let it wait."""

    async def take(name: str) -> None:
        async with pool.acquire():
            served.append(name)
            await asyncio.sleep(0)

    tasks = {name: asyncio.create_task(take(name)) for name in names}
    await wait_all_tasks_blocked()
    return tasks


@pytest.mark.asyncio
async def test_waiters_are_served_first_come_first_served() -> None:
    """Those that are cancelled are passed over, even in the tick in which they were served."""
    served: list[str] = []
    async with chapter.GPUPool(DEVICES[:1]) as pool:
        async with pool.acquire():
            tasks = await queue_up(pool, "abcdefg", served)
            for name in "abe":
                tasks.pop(name).cancel()
            assert counts(pool) == (1, 1, 4)
        tasks.pop("c").cancel()  # it holds the device already
        assert counts(pool) == (1, 1, 3)
        await asyncio.gather(*tasks.values())
        assert counts(pool) == (1, 0, 0)
    assert served == ["d", "f", "g"]


@pytest.mark.asyncio
async def test_a_timeout_names_the_devices_and_the_seconds() -> None:
    async with chapter.GPUPool(DEVICES[:1]) as pool, pool.acquire(timeout=0) as gpu:
        assert gpu == DEVICES[0]
        await asyncio.sleep(0.001)  # the timeout does not limit the block
        with pytest.raises(TimeoutError, match=r"^none of 1 devices came free within 0.001 s$"):
            async with pool.acquire(timeout=0.001):
                pass
        with pytest.raises(TimeoutError, match=r"^$"):  # the caller's timeout stays the caller's
            async with asyncio.timeout(0), pool.acquire(timeout=60):
                pass
        with pytest.raises(TypeError):
            async with pool.acquire(timeout="soon"):
                pass
        assert counts(pool) == (1, 1, 0)


@pytest.mark.asyncio
async def test_a_pool_lends_only_while_it_is_open() -> None:
    for gpus in ([], DEVICES[:1] * 2):
        with pytest.raises(ValueError, match="needs devices, each of them once"):
            chapter.GPUPool(gpus)
    pool = chapter.GPUPool(DEVICES[:1])
    for _time in range(2):
        with pytest.raises(chapter.PoolClosedError, match="is not open: acquire inside its"):
            await use_pool(pool)
        async with pool:
            with pytest.raises(RuntimeError, match="is open already: make another"):
                await pool.__aenter__()
            await use_pool(pool)


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_fails_waiters_and_waits_for_devices_in_use(cancelled: bool) -> None:
    """Cancelled, it does not wait, but the pool is closed all the same."""
    pool = chapter.GPUPool(DEVICES[:2])
    await pool.__aenter__()
    await use_pool(pool)  # once before, all devices had come back
    async with pool.acquire():
        async with pool.acquire():
            tasks = await queue_up(pool, "xy", [])
            tasks["x"].cancel()
            closing = asyncio.create_task(pool.__aexit__(None, None, None))
            await asyncio.sleep(0)
            assert counts(pool) == (2, 2, 0)
            if cancelled:
                closing.cancel()
                tasks["y"].cancel()  # in the tick in which it gets PoolClosedError
            x, y = await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert isinstance(x, asyncio.CancelledError)
            assert isinstance(y, asyncio.CancelledError if cancelled else chapter.PoolClosedError)
            assert cancelled or "closed while the task waited" in str(y)
            with pytest.raises(chapter.PoolClosedError, match="is not open"):
                await use_pool(pool)
        await wait_all_tasks_blocked()
        assert closing.done() == closing.cancelled() == cancelled
        assert counts(pool) == (2, 1, 0)
    assert counts(pool) == (2, 0, 0)
    await asyncio.wait([closing])


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
    while not all(task.done() for task in customers):
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
        async with asyncio.timeout(60), chapter.GPUPool(DEVICES) as pool:
            await storm(pool, rng, ends)
            assert (counts(pool), len(pool._waiters)) == ((8, 0, 0), 0)
            assert set(pool._free) == set(DEVICES)

    with asyncio.Runner(loop_factory=lambda: ShuffledLoop(rng)) as runner:
        runner.run(play())
    assert ends.keys() == {"served", "CancelledError", "TimeoutError", "LookupError"}
    assert min(ends.values()) > 500, ends


# --- Devices and workers ---


BREAKS = [
    "nothing",
    "import",
    "nvmlInit",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetMemoryInfo",
    "nvmlShutdown",
]


@pytest.mark.parametrize("breaks", BREAKS)
@pytest.mark.parametrize("names", [(), ("NVIDIA H200", "NVIDIA L4")])
def test_devices_are_those_of_a_driver_that_works_or_stand_ins(
    names: tuple[str, ...],
    breaks: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nvml = MagicMock()
    nvml.nvmlDeviceGetCount.return_value = len(names)
    nvml.nvmlDeviceGetHandleByIndex.side_effect = lambda index: index
    nvml.nvmlDeviceGetName.side_effect = lambda index: names[index]
    nvml.nvmlDeviceGetMemoryInfo.return_value.total = 80 * 1024**3
    half_way = [nvml] if breaks == "nvmlDeviceGetMemoryInfo" else []
    getattr(nvml, breaks).side_effect = [*half_way, RuntimeError("driver lost")]
    monkeypatch.setitem(sys.modules, "pynvml", None if breaks == "import" else nvml)
    caplog.set_level("INFO", "workshop.pool")
    found = [chapter.GPU(index, name, 81920) for index, name in enumerate(names)]
    works = found and breaks == "nothing"
    assert chapter.discover_gpus() == (found if works else DEVICES[:4])
    assert nvml.nvmlShutdown.called == (breaks not in ("import", "nvmlInit"))
    assert ("no NVIDIA driver answers (ModuleNotFoundError" in caplog.text) == (breaks == "import")


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


# A worker with a child, which holds the worker's output open.
WITH_CHILD = """if True:
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(60)"])
    print("started", flush=True)"""


@pytest.mark.asyncio
@pytest.mark.parametrize("worker_ends_first", [False, True])
async def test_the_processes_a_worker_starts_are_killed_with_it(worker_ends_first: bool) -> None:
    """If not, the block waits for the end of the output, and raises TimeoutError."""
    async with worker(WITH_CHILD + ("" if worker_ends_first else "; child.wait()")) as process:
        assert await process.stdout.readline() == b"started\n"
        if worker_ends_first:
            await until(lambda: process.returncode is not None)


LOOPS_THAT_END = """if True:
    import asyncio, runpy, sys
    chapter = runpy.run_path(sys.argv[1])
    async def user():
        command = (sys.executable, "-ISc", "import time; time.sleep(60)")
        async with chapter["gpu_worker"](chapter["GPU"](0, "", 0), *command):
            await asyncio.sleep(0)
    async def main(turns, cancelled):
        task = asyncio.create_task(user())
        for _turn in range(turns):
            await asyncio.sleep(0)
        if cancelled:
            task.cancel()
    for turns in range(14):
        asyncio.run(main(turns, cancelled=False))
        asyncio.run(main(turns, cancelled=True))
    print("done")"""


def test_a_loop_that_ends_in_mid_start_kills_the_worker() -> None:
    """A worker that is left behind holds stderr open, and a loop that hangs never ends."""
    command = [sys.executable, "-c", LOOPS_THAT_END, os.fspath(chapter_path(3))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ended.stdout == "done\n"


# --- finish ---


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [asyncio.CancelledError, OSError])
async def test_finish_ends_the_cleanup_then_raises_its_error_or_the_cancellation(
    error: type[BaseException],
) -> None:
    steps: list[int] = []

    async def cleanup() -> None:
        for step in range(5):
            await asyncio.sleep(0)
            steps.append(step)
        if error is OSError:
            raise OSError("disk full")

    task = asyncio.create_task(chapter.finish(cleanup()))
    while not task.done():
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(error):
        await task
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled", [False, True])
async def test_within_bounds_a_cleanup_that_handles_cancellation(cancelled: bool) -> None:
    steps: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            steps.append("cancelled")
            await asyncio.sleep(0.01)
            steps.append("ended")

    task = asyncio.create_task(chapter.finish(stubborn(), within=0.001))
    await asyncio.sleep(0)
    if cancelled:
        task.cancel()
    with pytest.raises(TimeoutError, match=r"the cleanup did not end within 0.001 s") as raised:
        await task
    assert isinstance(raised.value.__cause__, asyncio.CancelledError) == cancelled
    assert "ended" not in steps
    await until(lambda: steps == ["cancelled", "ended"])


@pytest.mark.asyncio
async def test_finish_sleeps_in_an_anyio_scope_that_is_cancelled() -> None:
    """Without a shield, the scope cancels the task, and so wakes it, at each turn of the loop."""

    async def cleanup() -> None:
        for _turn in range(100):
            await asyncio.sleep(0)

    task = asyncio.current_task()
    assert task is not None
    with anyio.CancelScope() as scope:
        scope.cancel()
        with suppress(asyncio.CancelledError):
            await chapter.finish(cleanup())
        wake_ups = task.cancelling()
        await asyncio.sleep(0)  # where the scope cancels the task
    assert scope.cancelled_caught
    assert wake_ups <= 1


# --- Sessions ---


class Server:
    """A stand-in server: answers when it may, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.answered = 0
        self.may_answer = asyncio.Event()
        self.response: httpx2.Response | None = None

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(json.loads(request.content)["messages"])
        await self.may_answer.wait()
        self.answered += 1
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
async def test_a_session_takes_turns_and_sessions_share_the_slots() -> None:
    """Of two slots, the turns that wait for the busy session leave one to the others."""
    server, limit = Server(), asyncio.Semaphore(2)
    async with AsyncExitStack() as stack:
        opened = [session_with(server, max_concurrency=limit) for _session in range(3)]
        busy, *others = [await stack.enter_async_context(session) for session in opened]
        tasks = [asyncio.create_task(busy.ask(f"turn {n}")) for n in range(5)]
        tasks += [asyncio.create_task(other.ask("other")) for other in others]
        await until(lambda: len(server.asked) == 2)
        await wait_all_tasks_blocked()
        assert server.prompts() == ["turn 0", "other"]
        server.may_answer.set()
        assert await asyncio.gather(*tasks) == ["Yes."] * 7
    asked = [messages for messages in server.asked if messages[-1]["content"] != "other"]
    assert [messages[-1]["content"] for messages in asked] == [f"turn {n}" for n in range(5)]
    assert [len(messages) for messages in asked] == [1, 3, 5, 7, 9]
    assert [message["role"] for message in busy.messages] == ["user", "assistant"] * 5
    assert busy.usage == chapter.Usage(input_tokens=50, output_tokens=25)


CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
FAILURES = {
    "status 401": httpx2.Response(401, json={"error": {"message": "no key"}}),
    "HTML": httpx2.Response(200, html="<h1>Proxy error</h1>"),
    "broken JSON": httpx2.Response(200, text='{"choi', headers=JSON),
    "deep JSON": httpx2.Response(200, text="[" * 100_000, headers=JSON),
    "not UTF-8": httpx2.Response(200, content=b"\xff{", headers=JSON),
    "an error": httpx2.Response(200, json={"error": {"message": "overloaded"}}),
    "null": httpx2.Response(200, json=None),
    "no choices": httpx2.Response(200, json={"choices": [], "usage": None}),
    "content of numbers": completion(message={"role": "assistant", "content": [5]}),
    "refusal empty": completion(message={"content": None, "refusal": "", "tool_calls": []}),
    "empty finish_reason": completion(finish=""),
    "no usage": completion(usage=None),
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
        await until(lambda: server.asked)
    with pytest.raises(chapter.SessionClosedError):  # at once: it does not wait in line
        await session.ask("too late")
    if fails:
        server.response = httpx2.Response(500)
    server.may_answer.set()
    for turn in turns:
        with pytest.raises(chapter.SessionClosedError, match="session 's' is closed: open a new"):
            await turn
    assert (session.messages, session.usage) == ([], chapter.Usage(0, 0))
    assert (server.prompts(), server.answered) == (["turn 0"], 1)  # it was not cancelled


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
# The blocks that a chart draws, in the order in which they began; `x` is one that an error ended.
CHARTS = {
    "demo_async_manager": {"use_blocking": "-=-=-=", "use_awaiting": "---==="},
    "demo_siblings": {"in_gather": "xxBCD", "in_group": "xxxxx", "in_timeout": "xxxxx"},
    "demo_sessions": {"Ada": "12", "Bob": "12", "Cem": "12", "Dan": "x1"},
}


@pytest.mark.parametrize("demo", VERDICTS)
def test_a_demo_shows_what_is_lost(demo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    spans: list[Any] = []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(
        chapter, "verdict", lambda holds, text: shown.append(("✓ " if holds else "✗ ") + text)
    )
    monkeypatch.setattr(chapter.Chart, "draw", lambda chart: spans.extend(chart.spans))
    asyncio.run(getattr(chapter, demo)())
    begins = [text[: len(expected)] for text, expected in zip(shown, VERDICTS[demo], strict=True)]
    assert begins == VERDICTS[demo]
    for name, letters in CHARTS.get(demo, {}).items():
        assert "".join(span.letter for span in spans if span.row.startswith(name)) == letters
    if demo == "demo_sessions":
        assert max(sum(a.began <= b.began < a.ended for a in spans) for b in spans) == 2


def test_a_chart_draws_all_blocks_on_one_scale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chapter, "console", Console(width=80, highlight=False))
    chart = chapter.Chart()
    for span in (("first", "X", 1, 2), ("second", "-", 1.5, 3), ("second", "Y", 2, 2.5)):
        chart.spans.append(chapter.Span(*span))
    chart.draw()
    assert capsys.readouterr().out.splitlines() == [
        f"{'first':19}{30 * 'X'}{30 * '·'}",
        f"{'second':19}{15 * '·'}{15 * '-'}{15 * 'Y'}{15 * '-'}",
        f"{'':19}0{'2000 ms':>59}",
        "",
    ]


def test_a_cancelled_run_ends_as_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Python 3.11, Ctrl-C surfaces so after a task group has failed."""

    async def demo_interrupted() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(chapter, "DEMOS", (demo_interrupted,))
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", "1"])
    assert chapter.main() == 130
    assert "Interrupted" in capsys.readouterr().out
