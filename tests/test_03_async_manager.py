"""Chapter 03: each claim of its lessons, and the cleanup contract for each of its managers."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partialmethod
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock, patch

import anyio
import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import ASYNC_WAYS, Subject, Way, time_limit
from left_behind import child_processes
from rich.console import Console
from waiting import until, wait_all_tasks_blocked

chapter: Any = load_chapter(3)
Cancelled = asyncio.CancelledError
Patch = pytest.MonkeyPatch
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


def worker(code: str, index: int = 0) -> Any:
    return chapter.gpu_worker(DEVICES[index], sys.executable, "-ISc", code)


def client_of(handler: Callable[[httpx2.Request], Any]) -> openai.AsyncOpenAI:
    """The real client, in front of a handler."""
    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
    return openai.AsyncOpenAI(api_key="-", base_url="http://x/v1", http_client=http, max_retries=0)


JSON = {"content-type": "application/json"}
YES = {"role": "assistant", "content": "Yes."}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def completion(message: Any = YES, finish: str = "stop", usage: Any = USAGE) -> httpx2.Response:
    """What the chat API answers."""
    choice = {"index": 0, "finish_reason": finish, "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "stand-in"}
    text = json.dumps(body | {"choices": [choice], "usage": usage})
    return httpx2.Response(200, text=text, headers=JSON)


# --- The cleanup contract ---


@contextmanager
def fault(error: type[Exception], target: Any, name: str, value: object) -> Iterator[Any]:
    """Give an attribute a value with which `error` must come out."""
    with patch.object(target, name, value):
        yield error


def pool_subject(_patch: Patch) -> Subject:
    pools: list[Any] = []
    given = SimpleNamespace(devices=DEVICES[:2], timeout=None)

    @asynccontextmanager
    async def pool_with_a_device() -> AsyncIterator[Any]:
        """Acquire a device of a pool; others hold all of them until the event loop turns."""
        pools.append(chapter.GPUPool(given.devices))
        async with pools[-1] as pool:
            for _device in given.devices:
                asyncio.get_running_loop().call_soon(pool._hand_on, await pool._take(None))
            async with pool.acquire(given.timeout):
                yield pool

    return Subject(
        pool_with_a_device,
        lambda: [pool for pool in pools if counts(pool)[1:] != (0, 0)],
        use_pool,
        chapter.PoolClosedError,
        setup_faults=[
            lambda: fault(ValueError, given, "devices", []),
            lambda: fault(TimeoutError, given, "timeout", 0),  # in the tick in which it is served
        ],
        cleanup_faults="to release a device awaits nothing and calls nothing that can fail",
    )


# If the second one is not killed, too, the block waits for the end of its output: TimeoutError.
TWO_CHATTERBOXES = "import os; os.fork()\nwhile True: print('never ends', flush=True)"


def worker_subject(_patch: Patch) -> Subject:
    communicate = chapter.Process.communicate

    async def fail(process: Any) -> None:
        await communicate(process)
        raise OSError("injected")

    return Subject(
        lambda: worker(TWO_CHATTERBOXES),
        child_processes,
        lambda worker: worker.stdout.readline(),
        setup_faults=[lambda: fault(FileNotFoundError, sys, "executable", "no such program")],
        cleanup_faults=[lambda: fault(OSError, chapter.Process, "communicate", fail)],
    )


def session_subject(monkeypatch: Patch) -> Subject:
    limit, sessions, clients, closed = asyncio.Semaphore(1), [], [], []

    async def soon(_request: httpx2.Request) -> httpx2.Response:
        for _turn in range(4):  # as a real answer, it takes more than one
            await asyncio.sleep(0)
        return completion()

    def make_client() -> openai.AsyncOpenAI:
        clients.append(client_of(soon))
        return clients[-1]

    def ask(session: Any) -> Any:
        sessions.append(session)
        return session.ask("Is it?")

    async def close(transport: object, error: Exception | None = None) -> None:
        await asyncio.sleep(0)
        closed.append(transport)
        if error:
            raise error

    def leaks() -> list[object]:
        """A turn that is recorded in part, or still blocks others, is a leak, too."""
        left: list[object] = ["a client"] * (len(clients) - len(closed))
        for session in sessions:
            half = len(session.messages) * 5 != session.usage.input_tokens
            left += [session] * (half or session._turn.locked() or not session._closed)
        return left + ["a slot"] * limit.locked()

    monkeypatch.setattr(chapter, "AsyncOpenAI", make_client)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(httpx2.MockTransport, "aclose", close)
    failing = partialmethod(close, OSError("injected"))
    return Subject(
        lambda: chapter.async_llm_session("s", max_concurrency=limit),
        leaks,
        ask,
        chapter.SessionClosedError,
        setup_faults=[
            lambda: fault(openai.OpenAIError, chapter, "AsyncOpenAI", openai.AsyncOpenAI)
        ],
        cleanup_faults=[lambda: fault(OSError, httpx2.MockTransport, "aclose", failing)],
    )


def finish_subject(_patch: Patch) -> Subject:
    """What the chapter teaches: no `await` before `try`, and a cleanup that `finish` ends."""
    held: list[str] = []
    load, told = AsyncMock(), AsyncMock()

    async def give_back() -> None:
        await asyncio.sleep(0)
        held.pop()
        await told()

    @asynccontextmanager
    async def lease() -> AsyncIterator[None]:
        held.append("device")
        try:
            await asyncio.sleep(0)
            await load()
            yield
            await asyncio.sleep(0)
        finally:
            await chapter.finish(give_back())

    return Subject(
        lease,
        lambda: held,
        setup_faults=[lambda: fault(OSError, load, "side_effect", OSError)],
        cleanup_faults=[lambda: fault(OSError, told, "side_effect", OSError)],
    )


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [pool_subject, worker_subject, session_subject, finish_subject])
def test_each_manager_keeps_the_cleanup_contract(make: Any, way: Way, monkeypatch: Patch) -> None:
    way(make(monkeypatch))


# --- The pool, its devices, and their workers ---


@pytest.mark.asyncio
async def test_a_timeout_names_the_devices_and_the_seconds() -> None:
    async with chapter.GPUPool(DEVICES[:1]) as pool, pool.acquire(timeout=0):
        await asyncio.sleep(0.001)  # the timeout does not limit the block
        with pytest.raises(TimeoutError, match=r"^none of 1 devices came free within 0.001 s$"):
            await pool.acquire(timeout=0.001).__aenter__()
        with pytest.raises(TimeoutError, match=r"^$"):  # the caller's timeout stays the caller's
            async with asyncio.timeout(0), pool.acquire(timeout=60):
                pass
        assert not pool._waiters, "who gave up is still in the line"
        with pytest.raises(TypeError):
            await pool.acquire(timeout="soon").__aenter__()


@pytest.mark.asyncio
async def test_a_pool_lends_only_while_it_is_open() -> None:
    with pytest.raises(ValueError, match="each of them once"):
        chapter.GPUPool(DEVICES[:1] * 2)
    async with chapter.GPUPool(DEVICES[:1]) as pool:
        with pytest.raises(RuntimeError, match="is open already"):
            await pool.__aenter__()
    with pytest.raises(chapter.PoolClosedError, match="is not open"):
        await use_pool(pool)


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_fails_waiters_and_waits_for_devices_in_use(cancelled: bool) -> None:
    """Cancelled, it does not wait, but the pool is closed all the same."""
    pool = await chapter.GPUPool(DEVICES[:2]).__aenter__()
    await use_pool(pool)  # once before, all devices had come back
    async with pool.acquire():
        async with pool.acquire():
            tasks = [asyncio.create_task(use_pool(pool)) for _task in range(3)]
            await wait_all_tasks_blocked()
            tasks[0].cancel()
            assert counts(pool) == (2, 2, 2)
            closing = asyncio.create_task(pool.__aexit__(None, None, None))
            await asyncio.sleep(0)
            assert counts(pool) == (2, 2, 0)
            tasks[1].cancel()  # in the tick in which it gets PoolClosedError
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(end) for end in ends] == [Cancelled, Cancelled, chapter.PoolClosedError]
            if cancelled:
                closing.cancel()
        await wait_all_tasks_blocked()
        assert closing.done() == cancelled
        with pytest.raises(chapter.PoolClosedError):
            await use_pool(pool)
    await asyncio.wait([closing])
    assert counts(pool) == (2, 0, 0)


class ShuffledLoop(asyncio.SelectorEventLoop):
    """An event loop that runs what is ready in random order."""

    rng = random.Random()

    def _run_once(self) -> None:
        self.rng.shuffle(self._ready)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


EAGER = getattr(asyncio, "eager_task_factory", None)


@pytest.mark.parametrize("factory", [None, EAGER] if EAGER else [None])
def test_a_storm_of_25_000_acquisitions_loses_no_device(factory: Any) -> None:
    """On a shuffled loop, with timeouts, cancellations, and eager tasks (Python 3.12)."""
    rng, pool, ended = ShuffledLoop.rng, chapter.GPUPool(DEVICES), Counter[str]()
    rng.seed(3)
    holders: dict[Any, Any] = {}

    async def customer() -> None:
        while ended["served"] < 25_000:
            try:
                async with pool.acquire(rng.choice((None, None, None, 0))) as gpu:
                    holders[gpu] = asyncio.current_task()
                    ended["served"] += 1
                    if rng.random() < 0.7:
                        await asyncio.sleep(0)
                    assert holders[gpu] is asyncio.current_task(), f"{gpu} is in two hands"
            except (Cancelled, TimeoutError) as error:
                ended[type(error).__name__] += 1

    async def play() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        async with asyncio.timeout(60), pool:
            customers = [asyncio.create_task(customer()) for _customer in range(40)]
            while not all(task.done() for task in customers):
                await asyncio.sleep(0)
                for task in rng.sample(customers, 2):
                    task.cancel()
            for task in customers:
                assert task.cancelled() or not task.exception()  # the former: before it started

    with asyncio.Runner(loop_factory=ShuffledLoop) as runner:
        runner.run(play())
    assert (counts(pool), len(pool._waiters), set(pool._free)) == ((8, 0, 0), 0, set(DEVICES))
    assert min(ended[end] for end in ("served", "CancelledError", "TimeoutError")) > 500


@pytest.mark.parametrize(
    "breaks", ["nothing", "no device", "import", "nvmlInit", "nvmlDeviceGetMemoryInfo"]
)
def test_devices_are_those_of_a_driver_that_works_or_stand_ins(
    breaks: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    names = [] if breaks == "no device" else ["NVIDIA H200", "NVIDIA L4"]
    nvml = MagicMock()
    nvml.nvmlDeviceGetCount.return_value = len(names)
    nvml.nvmlDeviceGetHandleByIndex.side_effect = int
    nvml.nvmlDeviceGetName.side_effect = names.__getitem__
    nvml.nvmlDeviceGetMemoryInfo.return_value.total = 80 * 1024**3
    half_way = [nvml] if breaks == "nvmlDeviceGetMemoryInfo" else []
    getattr(nvml, breaks).side_effect = [*half_way, RuntimeError("driver lost")]
    monkeypatch.setitem(sys.modules, "pynvml", None if breaks == "import" else nvml)
    caplog.set_level("INFO", "workshop.pool")
    found = [chapter.GPU(index, name, 81920) for index, name in enumerate(names)]
    assert chapter.discover_gpus() == (found if breaks == "nothing" else DEVICES[:4])
    assert nvml.nvmlShutdown.called == (breaks not in ("import", "nvmlInit"))
    assert ("no NVIDIA driver answers (ModuleNotFoundError" in caplog.text) == (breaks == "import")


@pytest.mark.asyncio
async def test_what_a_worker_started_is_killed_even_if_it_ended_first() -> None:
    async with worker("import os, time\nif os.fork() == 0: time.sleep(600)") as process:
        await until(lambda: process.returncode is not None)


@pytest.mark.asyncio
async def test_a_worker_sees_its_device_no_keyboard_and_no_ctrl_c() -> None:
    code = """if True:
        import os
        print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"])
        print(os.path.samestat(os.fstat(0), os.stat(os.devnull)), os.getsid(0) == os.getpid())"""
    async with worker(code, 2) as process:
        output, _errors = await process.communicate()
    assert output.split() == [b"2", b"PCI_BUS_ID", b"True", b"True"]


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
        asyncio.run(main(turns, cancelled=True))"""


def test_a_loop_that_ends_in_mid_start_kills_the_worker() -> None:
    """A worker that is left behind holds stderr open, and a loop that hangs never ends."""
    command = [sys.executable, "-c", LOOPS_THAT_END, str(chapter_path(3))]
    subprocess.run(command, capture_output=True, timeout=20, check=True)


# --- finish ---


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [Cancelled, OSError])
async def test_finish_ends_a_cleanup_then_raises_its_error_or_the_cancellation(error: Any) -> None:
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
    may_end, ended = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        with suppress(Cancelled):
            await asyncio.Event().wait()
        await may_end.wait()
        ended.set()

    task = asyncio.create_task(chapter.finish(stubborn(), within=0.001))
    await asyncio.sleep(0)
    if cancelled:
        task.cancel()
    with pytest.raises(TimeoutError, match=r"did not end within 0.001 s") as raised:
        await task
    assert isinstance(raised.value.__cause__, Cancelled) == cancelled
    may_end.set()
    await ended.wait()


@pytest.mark.asyncio
async def test_finish_sleeps_in_an_anyio_scope_that_is_cancelled() -> None:
    """Without a shield, the scope cancels the task, and so wakes it, at each turn of the loop."""

    async def cleanup() -> None:
        for _turn in range(100):
            await asyncio.sleep(0)

    task: Any = asyncio.current_task()
    with anyio.CancelScope() as scope:
        scope.cancel()
        with suppress(Cancelled):
            await chapter.finish(cleanup())
        wake_ups = task.cancelling()
        await asyncio.sleep(0)  # where the scope cancels the task
    assert wake_ups <= 1


# --- Sessions ---


class Server:
    """A stand-in server: answers when it may, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.may_answer = asyncio.Event()
        self.response: httpx2.Response | None = None

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(json.loads(request.content)["messages"])
        await self.may_answer.wait()
        return self.response or completion()


@asynccontextmanager
async def session_with(handler: Any, **options: Any) -> AsyncIterator[Any]:
    async with client_of(handler) as client:
        async with chapter.async_llm_session("s", client=client, **options) as session:
            yield session
        assert not client.is_closed()  # a session closes only the client that it made


@pytest.mark.asyncio
async def test_a_session_takes_turns_and_sessions_share_the_slots() -> None:
    """Of two slots, the turns that wait for the busy session leave one to the other."""
    server, limit = Server(), asyncio.Semaphore(2)
    shared: Any = {"handler": server, "max_concurrency": limit}
    async with session_with(**shared) as busy, session_with(**shared) as other:
        tasks = [asyncio.create_task(busy.ask(f"turn {n}")) for n in range(3)]
        tasks += [asyncio.create_task(other.ask("other")) for _turn in range(2)]
        await until(lambda: len(server.asked) == 2)
        await wait_all_tasks_blocked()
        server.may_answer.set()
        assert await asyncio.gather(*tasks) == ["Yes."] * 5
    assert {messages[-1]["role"] for messages in server.asked} == {"user"}
    asked = [(messages[-1]["content"], len(messages)) for messages in server.asked]
    assert {*asked[:2]} == {("turn 0", 1), ("other", 1)}
    turns = [turn for turn in asked if turn[0] != "other"]
    assert turns == [("turn 0", 1), ("turn 1", 3), ("turn 2", 5)]
    assert busy.usage == chapter.Usage(input_tokens=30, output_tokens=15)


FAILURES = {
    "status 401": httpx2.Response(401, json={"error": {"message": "no key"}}),
    "HTML": httpx2.Response(200, html="<h1>Proxy error</h1>"),
    "deep JSON": httpx2.Response(200, text="[" * 100_000, headers=JSON),
    "content of numbers": completion({"role": "assistant", "content": [5]}),
    "refusal empty": completion({"content": None, "refusal": "", "tool_calls": []}),
    "empty finish_reason": completion(finish=""),
    "no usage": completion(usage=None),
    "usage infinite": completion(usage=USAGE | {"prompt_tokens": float("inf")}),
}
SAYS = {"status 401": "no key", "HTML": "Proxy error"}


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
async def test_refusals_and_tool_calls_are_recorded_as_sent() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    parts: Any = [{"content": ""}, {"refusal": "No."}, {"tool_calls": [call]}]
    responses = [completion({"role": "assistant", "content": None} | part) for part in parts]
    async with session_with(lambda request: responses.pop(0)) as session:
        assert [await session.ask("?") for _part in parts] == ["", "No.", ""]
        assert session.messages[1::2] == [{"role": "assistant"} | part for part in parts]


@pytest.mark.asyncio
@pytest.mark.parametrize("fails", [False, True])
async def test_a_block_left_in_mid_turn_waits_for_nothing(fails: bool) -> None:
    """The turn under way and the one behind it raise SessionClosedError, and are not recorded."""
    server = Server()
    async with client_of(server) as client:
        async with chapter.async_llm_session("s", client=client) as session:
            turns = [asyncio.create_task(session.ask(f"turn {n}")) for n in range(2)]
            await until(lambda: server.asked)
        with pytest.raises(chapter.SessionClosedError):  # at once: it does not wait in line
            await session.ask("too late")
        server.response = httpx2.Response(500) if fails else None
        server.may_answer.set()
        for turn in turns:
            with pytest.raises(chapter.SessionClosedError, match="session 's' is closed"):
                await turn
    assert (session.messages, session.usage) == ([], chapter.Usage(0, 0))
    assert len(server.asked) == 1


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
def test_a_demo_shows_what_is_lost(demo: str, monkeypatch: Patch) -> None:
    shown, spans = list[str](), list[Any]()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(chapter, "verdict", lambda ok, text: shown.append("✗✓"[ok] + " " + text))
    monkeypatch.setattr(chapter.Chart, "draw", lambda chart: spans.extend(chart.spans))
    asyncio.run(getattr(chapter, demo)())
    begins = [text[: len(expected)] for text, expected in zip(shown, VERDICTS[demo], strict=True)]
    assert begins == VERDICTS[demo]
    for name, letters in CHARTS.get(demo, {}).items():
        assert "".join(span.letter for span in spans if span.row.startswith(name)) == letters


def test_a_chart_draws_all_blocks_on_one_scale(monkeypatch: Patch, capsys: Any) -> None:
    monkeypatch.setattr(chapter, "console", Console(width=80, highlight=False))
    chart = chapter.Chart()
    for span in (("first", "X", 1, 2), ("second", "-", 1.5, 3), ("second", "Y", 2, 2.5)):
        chart.spans.append(chapter.Span(*span))
    chart.draw()
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{'first':19}{30 * 'X'}{30 * '·'}",
        f"{'second':19}{15 * '·'}{15 * '-'}{15 * 'Y'}{15 * '-'}",
        f"{'':19}0{'2000 ms':>59}",
    ]


def test_a_cancelled_run_ends_as_interrupted(monkeypatch: Patch) -> None:
    """On Python 3.11, Ctrl-C surfaces so after a task group has failed."""
    monkeypatch.setattr(chapter, "DEMOS", [AsyncMock(side_effect=Cancelled)])
    monkeypatch.setattr(sys, "argv", ["03_async_manager.py", "1"])
    assert chapter.main() == 130
