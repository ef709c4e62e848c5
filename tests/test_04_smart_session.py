"""Chapter 04: sessions are found where they should be, and what a client does is recorded."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from decimal import Decimal, localcontext
from functools import partial
from itertools import count
from typing import Any

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way
from openai.providers import bedrock

chapter = load_chapter(4)
smart_session, current_session = chapter.smart_session, chapter.current_session
ask, ask_async, isolated = chapter.ask, chapter.ask_async, chapter.isolated
recording_client, async_recording_client = chapter.recording_client, chapter.async_recording_client
SessionClosedError, ReplyError, Call = chapter.SessionClosedError, chapter.ReplyError, chapter.Call

Handler = Callable[[httpx2.Request], Any]
OFFLINE: Any = {"api_key": "offline", "base_url": "http://offline/v1"}
NO_RETRY_DELAY = {"retry-after-ms": "1"}


def completion(
    prompt_tokens: int = 3, completion_tokens: int = 2, model: str = "gpt-4o-mini", **details: Any
) -> dict[str, Any]:
    """A reply as Chat Completions gives it."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, **details}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
    return {"id": "1", "created": 0, "model": model, "choices": [choice], "usage": usage}


def answering(**reply: Any) -> Handler:
    return lambda request: httpx2.Response(200, json=completion(**reply))


def client_that(handler: Handler, **options: Any) -> Any:
    return recording_client(httpx2.MockTransport(handler), **OFFLINE, **options)


def async_client_that(handler: Handler, **options: Any) -> Any:
    return async_recording_client(httpx2.MockTransport(handler), **OFFLINE, **options)


def chat(client: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Is it?"}]
    return client.chat.completions.create(model="gpt-4o-mini", messages=messages, **options)


@contextmanager
def asking_session(name: str, handler: Handler | None = None, **options: Any) -> Iterator[Any]:
    """Open a session with a client for `ask`."""
    with (
        client_that(handler or answering()) as client,
        smart_session(name, client=client, **options) as session,
    ):
        yield session


def ticking() -> Callable[[], float]:
    """Return a clock that is a second later at each reading."""
    return partial(next, map(float, count()))


# --- The current session ---


def test_a_call_is_recorded_in_the_innermost_session() -> None:
    with asking_session("outer", chapter.stand_in) as outer:
        ask("one")
        with smart_session("inner") as inner:
            ask("two words")
            assert current_session() is inner
        assert current_session() is outer
        ask("now three words")
    assert current_session() is None
    assert (inner.parent, outer.parent, outer.children) == (outer, None, [inner])
    assert [call.usage.input_tokens for call in outer.calls] == [1, 3]
    assert [call.usage.input_tokens for call in outer.all_calls()] == [1, 2, 3]
    assert outer.cost == sum(call.cost for call in outer.all_calls()) > inner.cost > 0


def test_a_nested_session_uses_the_model_and_client_around_it() -> None:
    with asking_session("outer", chapter.stand_in, model="gpt-4o") as outer:
        with smart_session("between", client=async_client_that(chapter.stand_in)):
            ask("one")
            with smart_session("inner", model="gpt-4.1"):
                asyncio.run(ask_async("two"))
        assert not outer.client.is_closed()
    assert [call.model for call in outer.all_calls()] == ["gpt-4o", "gpt-4.1"]


def test_no_call_joins_a_session_that_is_being_closed() -> None:
    class Entries(list[Any]):
        """A list in which an append lets another thread try to close the session first."""

        def append(self, call: object) -> None:
            closing_thread.start()
            assert not closed.wait(0.02)
            super().append(call)

    def close() -> None:
        session.close()
        closed.set()

    closed = threading.Event()
    with smart_session("raced") as session:
        closing_thread = threading.Thread(target=close)
        session.entries = Entries()
        session.record(Call("while it closes"))
        closing_thread.join()
    assert len(session.calls) == 1


# --- Tasks and threads ---


@pytest.mark.asyncio
async def test_gather_taskgroup_and_to_thread_inherit_the_session() -> None:
    with client_that(answering()) as client:
        async with async_client_that(answering()) as async_client:
            with smart_session("parent", client=client) as parent:
                with smart_session("inner", client=async_client):
                    await asyncio.gather(ask_async("one"), ask_async("two"))
                    async with asyncio.TaskGroup() as group:
                        group.create_task(ask_async("three"))
                    await asyncio.to_thread(ask, "four")
    assert len(parent.all_calls()) == 4


@pytest.mark.asyncio
async def test_a_task_that_outlives_its_block_gets_an_error() -> None:
    """The error comes before anything is sent, even if other code calls the client."""
    sent: list[httpx2.Request] = []
    async with async_client_that(lambda request: sent.append(request)) as client:
        with smart_session("block", client=client) as session:
            tasks = [asyncio.create_task(ask_async("late")), asyncio.create_task(chat(client))]
        for task in tasks:  # they start now
            with pytest.raises(SessionClosedError, match="session 'block' is closed"):
                await task
    assert sent == session.calls == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio
async def test_a_call_under_way_when_its_block_ends_raises(stream: bool) -> None:
    """The block waits for nothing and cancels nothing; the call's outcome is not recorded."""
    sent, answer = asyncio.Event(), asyncio.Event()

    async def handler(request: httpx2.Request) -> httpx2.Response:
        sent.set()
        await answer.wait()
        if stream:
            return Body(STREAM).reply(request)
        return httpx2.Response(200, json=completion())

    async def read(client: Any) -> None:
        async for _event in await chat(client, stream=True):
            pass

    async with async_client_that(handler) as client:
        with smart_session("block", client=client) as session:
            task = asyncio.create_task(read(client) if stream else ask_async("slow"))
            await sent.wait()
        assert not task.done()
        answer.set()
        with pytest.raises(SessionClosedError, match="'block' is closed"):
            await task
        await generators_end()
    (call,) = session.calls
    assert (call.usage, call.cost, call.duration, call.error) == (None, None, None, None)


def test_ask_refuses_an_answer_that_comes_after_its_block() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        current_session().close()  # as another thread does that leaves the block
        return httpx2.Response(200, json=completion())

    http_client = httpx2.Client(transport=httpx2.MockTransport(handler))
    with openai.OpenAI(http_client=http_client, **OFFLINE) as client:
        with smart_session("block", client=client), pytest.raises(SessionClosedError):
            ask("slow")


def test_a_retry_after_the_block_raises_and_is_not_sent() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        current_session().close()
        sent.append(request)
        return httpx2.Response(500, headers=NO_RETRY_DELAY)

    sent: list[httpx2.Request] = []
    with asking_session("block", handler), pytest.raises(SessionClosedError):
        ask("slow")
    assert len(sent) == 1


def test_what_outlives_its_session_nests_in_an_open_one() -> None:
    def late() -> Any:
        with smart_session("late") as session:
            return session

    with smart_session("outer") as outer:
        with smart_session("inner"):
            copy = contextvars.copy_context()  # as a task has it
        assert copy.run(late).parent is outer
    assert copy.run(current_session) is outer  # `late` put it in the place of `inner`
    assert copy.run(late).parent is None
    assert copy.run(current_session) is None


def inherited() -> bool:
    """Whether threads inherit the context: an option of Python 3.14, off by default."""
    return bool(getattr(sys.flags, "thread_inherit_context", False))


def test_copy_context_run_hands_the_session_to_many_threads() -> None:
    with asking_session("parent") as session, ThreadPoolExecutor(8) as executor:
        jobs = [executor.submit(contextvars.copy_context().run, ask, "?") for _ in range(200)]
        assert all(job.result() for job in jobs)
    assert len(session.calls) == 200
    assert all(call.usage.input_tokens == 3 for call in session.calls)


# --- Generators, and blocks that end out of order ---


def suspended(opened: list[Any]) -> Iterator[str]:
    with smart_session("inside") as session:
        opened.append(session)
        yield "one"
        yield "two"


def test_after_exits_out_of_order_no_closed_session_is_current() -> None:
    def outer_ends_first() -> None:
        with smart_session("outer"):
            generator = suspended([])
            next(generator)
        assert current_session().name == "inside"  # still open
        generator.close()  # type: ignore[attr-defined]
        assert current_session() is None

    contextvars.copy_context().run(outer_ends_first)


def test_out_of_order_the_innermost_open_session_stays_current() -> None:
    """The one in the middle ends first: no call is recorded around the wrong block."""
    with smart_session("outer") as outer:
        generator = suspended([])
        next(generator)
        with smart_session("caller") as caller:
            generator.close()  # type: ignore[attr-defined]
            assert current_session() is caller
        assert current_session() is outer


def test_an_isolated_generator_is_closed_in_its_own_context(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened: list[Any] = []
    items = isolated(suspended(opened))
    assert next(items) == "one"
    items.close()
    assert opened[0].closed
    assert caplog.text == ""  # no session ended in another context


def test_a_block_that_ends_in_another_context_is_closed_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began = contextvars.copy_context()
    manager = smart_session("wanders")
    session = began.run(manager.__enter__)
    copy = began.run(contextvars.copy_context)
    error = ValueError("the block's own")
    assert not copy.run(manager.__exit__, type(error), error, None)  # it propagates, unhidden
    assert session.closed
    assert "session 'wanders' ended in another context" in caplog.text
    assert copy.run(current_session) is None
    assert began.run(current_session) is session  # out of reach


# --- Asking ---


def test_ask_without_a_session_or_a_client_says_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"ask inside `with smart_session"):
        ask("Is it?")
    with smart_session("bare"), pytest.raises(LookupError, match=r"'bare' has no OpenAI client"):
        ask("Is it?")
    with asking_session("wrong kind"), pytest.raises(LookupError, match="no AsyncOpenAI client"):
        asyncio.run(ask_async("Is it?"))


def reply_with(finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return completion() | {"choices": [choice]}


TOOL = {"id": "1", "function": {"arguments": "{}", "name": "look"}, "type": "function"}
WHOLE: list[tuple[dict[str, Any], str]] = [
    (reply_with(content="yes"), "yes"),
    (reply_with("length", content=""), ""),
    (reply_with(content=None, refusal="I will not."), "I will not."),
    (reply_with("tool_calls", content=None, tool_calls=[TOOL]), json.dumps([TOOL])),
]


@pytest.mark.parametrize(("reply", "answer"), WHOLE, ids=lambda value: str(value)[:9])
def test_ask_returns_a_content_a_refusal_or_tool_calls(reply: Any, answer: str) -> None:
    with asking_session("whole", lambda request: httpx2.Response(200, json=reply)):
        assert ask("Is it?") == answer


JSON = {"content-type": "application/json"}
NOT_WHOLE = {
    "HTML": {"html": "<p>Please log in</p>"},
    "cut off": {"content": b'{"choi', "headers": JSON},
    "not UTF-8": {"content": b"\xff\xfe\xff", "headers": JSON},
    "long number": {"content": b'{"created": %s}' % (b"9" * 5000), "headers": JSON},
    "deep": {"content": b"[" * 100_000, "headers": JSON},
    "nothing": {"content": b""},
    "error": {"json": {"error": {"message": "overloaded"}}},
    "null": {"json": None},
    "null message": {"json": completion() | {"choices": [{"finish_reason": "stop"}]}},
    "all null": {"json": reply_with(content=None)},
    "strange content": {"json": reply_with(content={"text": "yes"})},
    "no reason": {"json": reply_with(None, content="half a")},
    "empty reason": {"json": reply_with("", content="half a")},
}


@pytest.mark.parametrize("reply", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_ask_raises_if_the_answer_is_not_whole(reply: dict[str, Any]) -> None:
    with asking_session("half", lambda request: httpx2.Response(200, **reply)) as session:
        with pytest.raises(ReplyError):
            ask("Is it?")
    assert len(session.calls) == 1


def test_a_prompt_that_cannot_be_sent_is_no_reply_error() -> None:
    with asking_session("surrogate"), pytest.raises(UnicodeEncodeError):
        ask("\ud800")


# --- The contract ---


def subject(open_session: Callable[[list[Any]], Any]) -> Subject:
    opened: list[Any] = []

    def leaks() -> list[str]:
        still = [f"{session.name} is open" for session in opened if not session.closed]
        return still + [f"{current} is current" for current in [current_session()] if current]

    return Subject(
        open=lambda: open_session(opened),
        leaks=leaks,
        use=lambda session: session.record(Call("/chat")),
        closed_error=SessionClosedError,
    )


@contextmanager
def noted(opened: list[Any]) -> Iterator[Any]:
    with smart_session("subject") as session:
        opened.append(session)
        yield session


@asynccontextmanager
async def noted_between_awaits(opened: list[Any]) -> AsyncIterator[Any]:
    await asyncio.sleep(0)
    with smart_session("subject") as session:
        opened.append(session)
        await asyncio.sleep(0)
        try:
            yield session
        finally:
            await asyncio.sleep(0)


@pytest.mark.parametrize("way", [*SYNC_WAYS, *ASYNC_WAYS], ids=lambda way: way.__name__)
def test_smart_session_keeps_the_cleanup_contract(way: Way) -> None:
    way(subject(noted if way in SYNC_WAYS else noted_between_awaits))


# --- The recording client ---


def test_a_call_is_recorded_with_model_tokens_cost_and_duration() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["accept-encoding"] == "identity"  # to be read as it passes
        reply = completion(1234, 567, prompt_tokens_details={"cached_tokens": 1000})
        return httpx2.Response(200, json=reply | {"model": "gpt-4o-mini-2024-07-18"})

    with client_that(handler, clock=ticking()) as client, smart_session("measured") as session:
        assert chat(client.with_options(timeout=5)).choices[0].message.content == "yes"
    (call,) = session.calls
    assert (call.path, call.error) == ("/v1/chat/completions", None)
    assert call.model == "gpt-4o-mini-2024-07-18"
    assert (call.usage.input_tokens, call.usage.output_tokens) == (1234, 567)
    assert call.usage.cache_read_tokens == 1000
    assert (call.cost, call.duration) == (Decimal("0.0004503"), 1.0)
    assert "Is it?" not in repr(call)  # neither what was asked nor what was answered is kept
    assert "yes" not in repr(call)


def test_costs_do_not_depend_on_the_decimal_precision_of_the_caller() -> None:
    with localcontext(prec=2), asking_session("rough", answering(prompt_tokens=1234)) as session:
        ask("one")
        ask("two")
        assert [call.cost for call in session.calls] == [Decimal("0.0001863")] * 2
        assert session.cost == Decimal("0.0003726")


def test_the_responses_api_and_embeddings_are_understood() -> None:
    usage = {"input_tokens": 1234, "output_tokens": 567, "total_tokens": 1801}
    details = {"input_tokens_details": {"cached_tokens": 1000}}
    reply = {"id": "1", "created_at": 0, "model": "gpt-4o-mini", "output": [], "error": None}
    whole = reply | {"usage": usage | details}
    done = {"type": "response.completed", "response": whole}
    body = b"".join(sse({"type": "response.created", "response": reply}, done))
    vectors = {"model": "text-embedding-3-small", "data": [{}], "usage": {"prompt_tokens": 8}}
    replies = [
        httpx2.Response(200, json=whole),
        httpx2.Response(200, headers=EVENT_STREAM, content=body),
        httpx2.Response(200, json=vectors),
    ]
    with client_that(lambda request: replies.pop(0)) as client, smart_session("all") as session:
        client.responses.create(model="gpt-4o-mini", input="Is it?")
        list(client.responses.create(model="gpt-4o-mini", input="Is it?", stream=True))
        client.embeddings.create(model="e", input="Is it?", encoding_format="float")
    costs = [Decimal("0.0004503"), Decimal("0.0004503"), Decimal("1.6E-7")]
    assert [call.cost for call in session.calls] == costs


@pytest.mark.parametrize(
    "price", [None, lambda usage, model: 1 / 0, lambda usage, model: Decimal(7)]
)
def test_an_unknown_price_is_an_error_that_says_what_to_pass(price: Any) -> None:
    with client_that(answering(model="llama3.2"), price=price) as client:
        with smart_session("local") as session:
            assert chat(client).choices  # a paid reply is not lost
    assert session.calls[0].usage.input_tokens == 3
    if session.calls[0].cost is None:
        with pytest.raises(LookupError, match=r"'llama3\.2' is unknown: pass price="):
            _ = session.cost
    else:
        assert session.cost == 7


def test_transports_have_the_limits_of_the_sdk_and_replace_http_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[Any] = []
    for name in ("HTTPTransport", "AsyncHTTPTransport"):
        transport = lambda **options: limits.append(options["limits"])  # noqa: E731
        monkeypatch.setattr(httpx2, name, transport)
    for make in (recording_client, async_recording_client):
        make(**OFFLINE)
        with pytest.raises(TypeError, match="pass the transport="):
            make(http_client=object())
    assert limits == [openai.DEFAULT_CONNECTION_LIMITS] * 2


WORKLOAD = {"identity_provider_id": "i", "service_account_id": "s"} | {
    "provider": {"token_type": "jwt", "get_token": lambda: "token"}
}


@pytest.mark.parametrize(
    ("variable", "options", "key"),
    [
        ("sk-env", {}, "sk-env"),
        ("", {}, "none"),
        ("sk-env", {"api_key": None}, "sk-env"),
        ("sk-env", {"api_key": "sk-own"}, "sk-own"),
        ("", {"admin_api_key": "sk-admin"}, ""),
        ("sk-env", {"workload_identity": WORKLOAD}, "workload-identity-auth"),
        ("sk-env", {"provider": bedrock(region="us-east-1", api_key="b")}, ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_key_is_filled_in_only_if_there_is_no_other_credential(
    variable: str, options: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", variable)
    for make in (recording_client, async_recording_client):
        assert make(**options).api_key == key


STRANGE = [
    {"html": "<p>Please log in</p>"},
    {"json": {"model": "gpt-4o-mini", "usage": {"prompt_tokens": "many"}}},
    {"json": {"model": "gpt-4o-mini", "usage": {"total_tokens": 5}}},
    {"json": {"model": "m", "usage": {"prompt_tokens": 1, "prompt_tokens_details": ["?"]}}},
    {"json": ["not", "an", "object"]},
    {"text": '{"model": "m", "usage": {"prompt_tokens": 1e999, "completion_tokens": 1}}'}
    | {"headers": {"content-type": "application/json"}},
]


@pytest.mark.parametrize("reply", STRANGE, ids=str)
def test_a_strange_reply_passes_and_its_tokens_stay_unknown(reply: dict[str, Any]) -> None:
    response = httpx2.Response(200, **reply)
    with client_that(lambda request: response) as client, smart_session("strange") as session:
        raw = client.chat.completions.with_raw_response.create(model="m", messages=[])
    assert raw.content == response.content
    (call,) = session.calls
    assert (call.usage, call.cost, call.error) == (None, None, None)
    assert call.duration is not None


def test_requests_that_name_no_model_are_recorded_without_one() -> None:
    with client_that(lambda request: httpx2.Response(200, json={})) as client:
        with smart_session("others") as session:
            client.audio.transcriptions.create(model="whisper-1", file=("words.wav", b"words"))
            client.get("/models", cast_to=object)
            client.post("/files", body=["batch"], cast_to=object)
    paths = ["/v1/audio/transcriptions", "/v1/models", "/v1/files"]
    assert [(call.path, call.model) for call in session.calls] == [(path, None) for path in paths]


@pytest.mark.parametrize("content_type", ["text/event-stream", "audio/mpeg"])
def test_a_long_reply_is_not_held_in_memory(content_type: str) -> None:
    million = b"." * 999_999 + b"\n"
    body = httpx2.Response(200, stream=Body([million] * 30), headers={"content-type": content_type})
    with client_that(lambda request: body) as client, smart_session("long"):
        speech = client.audio.speech.with_streaming_response
        with speech.create(model="tts-1", voice="alloy", input="Yes.") as response:
            tracemalloc.start()
            try:
                assert sum(len(piece) for piece in response.iter_bytes()) == 30_000_000
                _now, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert peak < 10_000_000


def test_a_call_outside_a_session_is_sent_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with client_that(answering()) as client:
        assert chat(client).choices
    assert "no session is current: /v1/chat/completions is not recorded" in caplog.text


def test_closing_a_client_closes_its_transport() -> None:
    closed: list[str] = []

    class Transport(httpx2.MockTransport):
        def close(self) -> None:
            closed.append("close")

        async def aclose(self) -> None:
            closed.append("aclose")

    recording_client(Transport(answering()), **OFFLINE).close()
    asyncio.run(async_recording_client(Transport(answering()), **OFFLINE).close())
    assert closed == ["close", "aclose"]


# --- Errors ---


def test_each_attempt_of_the_sdk_is_a_call_with_its_own_error() -> None:
    replies = [
        httpx2.Response(429, headers=NO_RETRY_DELAY, json={"error": {"message": "slow down"}}),
        httpx2.Response(500, headers=NO_RETRY_DELAY, text="oops"),
        httpx2.Response(200, json=completion()),
    ]
    with client_that(lambda request: replies.pop(0)) as client, smart_session("tries") as session:
        chat(client)
    assert [call.error for call in session.calls] == ["HTTP 429", "HTTP 500", None]
    assert [call.usage is None for call in session.calls] == [True, True, False]
    assert all(call.duration is not None for call in session.calls)


def test_a_call_without_a_connection_is_recorded_with_its_error() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    with client_that(handler, max_retries=0, clock=ticking()) as client:
        with smart_session("refused") as session, pytest.raises(openai.APIConnectionError):
            chat(client)
    (call,) = session.calls
    assert (call.error, call.duration, call.model) == ("ConnectError", 1.0, "gpt-4o-mini")


@pytest.mark.asyncio
async def test_a_cancelled_call_is_recorded_as_cancelled() -> None:
    async def handler(request: httpx2.Request) -> None:
        task.cancel()
        await asyncio.Event().wait()

    async with async_client_that(handler) as client:
        with smart_session("cancelled") as session:
            task = asyncio.create_task(chat(client))
            with pytest.raises(asyncio.CancelledError):
                await task
    assert [call.error for call in session.calls] == ["CancelledError"]


def test_an_error_in_a_reply_is_recorded_plain_and_streamed() -> None:
    error = {"error": {"message": "overloaded", "type": "server_error"}}
    replies = [httpx2.Response(200, json=error), Body([STREAM[0], *sse(error)]).reply(None)]
    with client_that(lambda request: replies.pop(0)) as client, smart_session("busy") as session:
        chat(client)
        with pytest.raises(openai.APIError, match="overloaded"):
            words(chat(client, stream=True))
    assert [call.error for call in session.calls] == ["error in the reply"] * 2


# --- Streams ---

EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def sse(*events: dict[str, Any]) -> list[bytes]:
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events]


def chunk(word: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [] if word is None else [{"index": 0, "delta": {"content": word}}]
    return {"id": "1", "created": 0, "model": "gpt-4o-mini", "choices": choices, **more}


USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
STREAM = [*sse(chunk("Yes", usage=None), chunk(" indeed"), chunk(usage=USAGE)), b"data: [DONE]\n\n"]


class Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A reply in pieces, which notes how far it was read and whether it was closed."""

    def __init__(self, pieces: list[bytes], error: Exception | None = None) -> None:
        self.pieces, self.error = pieces, error
        self.sent: list[bytes] = []
        self.closed = self.reading_ended = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.sent.append(piece)
            yield piece
        if self.error:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self:
                await asyncio.sleep(0)
                yield piece
        finally:
            self.reading_ended = True

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True

    def reply(self, request: object) -> httpx2.Response:
        return httpx2.Response(200, headers=EVENT_STREAM, stream=self)


def words(stream: Any) -> list[str]:
    return [event.choices[0].delta.content for event in stream if event.choices]


async def async_words(client: Any) -> list[str]:
    stream = await chat(client, stream=True)
    return [event.choices[0].delta.content async for event in stream if event.choices]


async def generators_end() -> None:
    """Wait until the event loop has ended the SDK's four generators, one a turn."""
    for _turn in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_is_recorded_however_it_is_cut(size: int) -> None:
    whole = b"".join(STREAM).replace(b"\n", b"\r\n" if size == 7 else b"\n")
    body = Body([whole[start : start + size] for start in range(0, len(whole), size)])
    with client_that(body.reply, clock=ticking()) as client, smart_session("streamed") as session:
        assert words(chat(client, stream=True)) == ["Yes", " indeed"]
    (call,) = session.calls
    assert call.cost == Decimal("0.00045")
    assert (call.model, call.error, call.duration) == ("gpt-4o-mini", None, 1.0)
    assert body.closed


def test_a_stream_is_passed_on_piece_by_piece_as_it_comes() -> None:
    body = Body(STREAM)
    with client_that(body.reply) as client, smart_session("streamed") as session:
        create = client.chat.completions.with_streaming_response.create
        with create(model="gpt-4o-mini", messages=[], stream=True) as response:
            received = []
            for piece in response.iter_bytes():
                received.append(piece)
                assert body.sent == received
                assert session.calls[0].duration is None
    assert received == STREAM


def test_an_abandoned_stream_is_recorded_even_if_it_is_never_closed() -> None:
    with smart_session("abandoned") as session:
        session.record(call := Call("/v1/chat/completions"))
        reader = chapter.ReplyReader(call, session, ticking(), chapter.list_price)
        pieces = iter(reader.watch(Body(STREAM).reply(None)).stream)
        next(pieces)
        with session._lock:  # where the garbage collector may strike
            pieces.close()
    assert (call.usage, call.error, call.duration) == (None, None, 1.0)


@pytest.mark.asyncio
async def test_an_async_stream_that_is_left_is_closed_at_once() -> None:
    body = Body(STREAM * 50)
    async with async_client_that(body.reply) as client:
        with smart_session("left") as session:
            create = client.chat.completions.with_streaming_response.create
            raw = create(model="gpt-4o-mini", messages=[], stream=True)
            async with raw as response, aclosing(response.http_response.aiter_bytes()) as pieces:
                await anext(pieces)
            assert body.reading_ended
    assert [call.error for call in session.calls] == [None]
    assert session.calls[0].duration is not None
    assert body.closed


@pytest.mark.asyncio
async def test_a_stream_that_breaks_is_recorded_with_its_error() -> None:
    bodies = [Body(STREAM[:1], httpx2.ReadError("connection lost")) for _ in range(2)]
    with client_that(bodies[0].reply) as client, smart_session("broken") as session:
        with pytest.raises(openai.APIConnectionError):
            words(chat(client, stream=True))
        async with async_client_that(bodies[1].reply) as async_client:
            with pytest.raises(openai.APIConnectionError):
                await async_words(async_client)
    assert [call.error for call in session.calls] == ["ReadError"] * 2
    assert [body.closed for body in bodies] == [True] * 2


# --- Offline, and live ---


def test_the_managers_alone_know_no_stand_in() -> None:
    managers, _divider, _demos = inspect.getsource(chapter).partition("\n# --- Demos")
    assert not re.search("stand_in|OFFLINE|offline", managers.partition("import")[2])


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Play the script in this process; return its status and output, and what it sent."""

    def run(handler: Handler, *arguments: str, **environment: str) -> tuple[Any, ...]:
        sent: list[httpx2.Request] = []

        def handle_request(transport: object, request: httpx2.Request) -> Any:
            sent.append(request)
            return handler(request)

        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the SDK's attempts
        monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle_request)
        monkeypatch.setattr(sys, "argv", ["04_smart_session.py", *arguments])
        for name, value in {"OPENAI_API_KEY": "sk-test", **environment}.items():
            monkeypatch.setenv(name, value)
        try:
            status = chapter.main()
        except SystemExit as end:
            status = end.code
        finally:
            monkeypatch.setattr(chapter, "live", False)
        return (status, *capsys.readouterr(), sent)

    return run


def test_live_asks_the_model_and_the_server_of_the_environment(play: Any) -> None:
    options = {"OPENAI_BASE_URL": "http://192.0.2.1/v1", "OPENAI_MODEL": "local-model"}
    status, out, err, sent = play(chapter.stand_in, "--live", "2", "4", **options)
    assert (status, err) == (0, "")
    assert [(r.url.host, json.loads(r.content)["model"]) for r in sent] == [
        ("192.0.2.1", "local-model")
    ] * 10
    assert "call 1: local-model, 1 → 4 tokens, ?" in out  # its price is unknown
    status, _out, err, _sent = play(chapter.stand_in, "--live", OPENAI_API_KEY="")
    assert status == 2
    assert "--live needs OPENAI_API_KEY; a local server takes any value" in err


FAILING: dict[str, Handler] = {
    "refused": lambda request: httpx2.Response(404, html="<p>\nNot\nhere\n</p>"),
    "busy": lambda request: httpx2.Response(500),
    "half a body": lambda request: Body([b"{"], httpx2.ReadError("lost")).reply(request),
    "silent": lambda request: Body([], httpx2.ReadTimeout("")).reply(request),
} | {
    name: lambda _r, reply=reply: httpx2.Response(200, **reply) for name, reply in NOT_WHOLE.items()
}


@pytest.mark.parametrize("handler", FAILING.values(), ids=FAILING)
def test_live_ends_with_one_line_if_the_endpoint_fails(handler: Handler, play: Any) -> None:
    status, out, err, _sent = play(handler, "--live", "2")
    assert status == 1
    assert re.fullmatch(r"04_smart_session\.py: the model did not answer: .+\n", err)
    assert "└ left by" in out


TREE = """
article
├── call 1: gpt-4o-mini, 1 → 4 tokens, $0.00000255
├── title
│   └── call 2: gpt-4o-mini, 2 → 5 tokens, $0.0000033
└── call 3: gpt-4o-mini, 3 → 6 tokens, $0.00000405
✓ `smart_session`: article itself recorded 2 of its 2 calls.
"""


def test_each_demo_shows_the_failure_first_and_sends_nothing_out(play: Any) -> None:
    status, out, err, sent = play(chapter.stand_in, OPENAI_MODEL="local-model")
    assert (status, err, sent) == (0, "", [])
    verdicts = "".join(re.findall(r"^[✗✓](?= )", out, re.MULTILINE))
    assert verdicts == "✗✓" + "✗✓" + ("✓" if inherited() else "✗") + "✓✓✓✓" + "✗✓" * 3
    assert "they find: ada → bob, bob → None." in out
    assert "Requests sent: 4, recorded: 3." in out
    assert TREE in re.sub(" +\n", "\n", out)
    assert "local-model" not in out
