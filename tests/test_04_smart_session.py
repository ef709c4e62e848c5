"""Chapter 04: sessions are found where they should be, and what a client does is recorded."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from decimal import Decimal, localcontext
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, Mock, patch

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way, time_limit
from waiting import FakeClock

chapter = load_chapter(4)
smart_session, current_session = chapter.smart_session, chapter.current_session
ask, ask_async, isolated = chapter.ask, chapter.ask_async, chapter.isolated
recording_client, async_recording_client = chapter.recording_client, chapter.async_recording_client
SessionClosedError, ReplyError, Call = chapter.SessionClosedError, chapter.ReplyError, chapter.Call

Handler = Callable[[httpx2.Request], Any]
OFFLINE: Any = {"api_key": "offline", "base_url": "http://offline/v1"}
NO_RETRY_DELAY = {"retry-after-ms": "1"}


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    with time_limit():
        yield


def completion(
    prompt_tokens: int = 3, completion_tokens: int = 2, model: Any = "gpt-4o-mini", **details: Any
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
    with client_that(handler or answering()) as client:
        with smart_session(name, client=client, **options) as session:
            yield session


# --- The current session: blocks, tasks, threads, generators ---


def test_a_call_is_recorded_in_the_innermost_session() -> None:
    with asking_session("outer", chapter.stand_in, model="gpt-4o") as outer:
        ask("one")
        with smart_session("inner", client=async_client_that(chapter.stand_in)) as inner:
            assert current_session() is inner
            ask("two words")  # by the model and the client around it
            with smart_session("innermost", model="gpt-4.1") as innermost:
                answer = asyncio.run(ask_async("now three words"))
        assert current_session() is outer
        ask("now there are four")
        assert not outer.client.is_closed()
    assert current_session() is None
    assert answer == "(stand-in) You asked: now three words"
    assert (innermost.parent, inner.parent, outer.parent) == (inner, outer, None)
    assert (outer.children, inner.children) == ([inner], [innermost])
    assert [call.usage.input_tokens for call in outer.calls] == [1, 4]
    assert [call.usage.input_tokens for call in outer.all_calls()] == [1, 2, 3, 4]
    assert [call.model for call in outer.all_calls()] == ["gpt-4o", "gpt-4o", "gpt-4.1", "gpt-4o"]
    assert outer.cost == sum(call.cost for call in outer.all_calls()) > inner.cost > 0


@pytest.mark.asyncio
async def test_tasks_and_copied_contexts_inherit_the_session() -> None:
    """Tasks of gather and of a TaskGroup, asyncio.to_thread, and threads with a copy."""
    with client_that(answering()) as client, ThreadPoolExecutor(8) as executor:
        async with async_client_that(answering()) as async_client:
            with smart_session("parent", client=client) as parent:
                with smart_session("inner", client=async_client) as inner:
                    await asyncio.gather(ask_async("one"), ask_async("two"))
                    async with asyncio.TaskGroup() as group:
                        group.create_task(ask_async("three"))
                    await asyncio.to_thread(ask, "four")
                copies = [contextvars.copy_context() for _job in range(20)]
                jobs = [executor.submit(copy.run, ask, "?") for copy in copies]
                assert [job.result() for job in jobs] == ["yes"] * 20
    assert (len(inner.calls), len(parent.calls)) == (4, 20)


@pytest.mark.asyncio
async def test_a_task_that_outlives_its_block_gets_an_error() -> None:
    """The error comes before anything is sent, even if other code calls the client."""
    sent: list[httpx2.Request] = []
    async with async_client_that(lambda request: sent.append(request)) as client:
        with smart_session("block", client=client) as session:
            tasks = [asyncio.create_task(ask_async("late")), asyncio.create_task(chat(client))]
        with smart_session("block"):
            tasks.append(asyncio.create_task(ask_async("late, and without a client")))
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
        return Body(STREAM).reply(request) if stream else answering()(request)

    async with async_client_that(handler) as client:
        with smart_session("block", client=client) as session:
            task = asyncio.create_task(async_words(client) if stream else ask_async("slow"))
            await sent.wait()
        assert not task.done()
        answer.set()
        with pytest.raises(SessionClosedError, match="'block' is closed"):
            await task
        for _turn in range(20):  # the event loop ends the SDK's four generators, one a turn
            await asyncio.sleep(0)
    (call,) = session.calls
    assert (call.usage, call.cost, call.duration, call.error) == (None, None, None, None)


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


def suspended() -> Any:
    with smart_session("inside"):
        yield "one"
        yield "two"


def test_out_of_order_the_innermost_open_session_stays_current() -> None:
    """No closed session is current, and no call is recorded around the wrong block."""
    with smart_session("outer") as outer:
        generator = suspended()
        next(generator)
        with smart_session("caller") as caller:
            generator.close()  # the one in the middle ends first
            assert current_session() is caller
        assert current_session() is outer
        with smart_session("another"):
            generator = suspended()
            next(generator)
        assert current_session().name == "inside"  # still open, though the one around it is not
        generator.close()
        assert current_session() is outer


def test_an_isolated_generator_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with smart_session("caller") as caller:
        items = isolated(suspended())
        assert next(items) == "one"
        assert current_session() is caller
        items.close()
        assert caller.children[0].closed
        assert list(isolated(suspended())) == ["one", "two"]
    assert caplog.text == ""  # no session ended in another context


def test_a_block_that_ends_in_another_context_warns(caplog: pytest.LogCaptureFixture) -> None:
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
# Replies without a whole answer; of the first ones, the tokens are not known either.
NOT_WHOLE: dict[str, dict[str, Any]] = {
    "HTML": {"html": "<p>Please log in</p>"},
    "not UTF-8": {"content": b"\xff\xfe\xff", "headers": JSON},
    "deep": {"content": b"[" * 100_000, "headers": JSON},
    "null": {"json": None},
    "tokens in words": {"json": {"model": "m", "usage": {"prompt_tokens": "many"}}},
    "strange details": {
        "json": {"model": "m", "usage": {"prompt_tokens": 1, "prompt_tokens_details": ["?"]}}
    },
    "infinite tokens": {
        "content": b'{"model": "m", "usage": {"prompt_tokens": 1e999, "completion_tokens": 1}}',
        "headers": JSON,
    },
    "message in words": {"json": completion() | {"choices": [{"message": "yes"}]}},
    "no message": {"json": completion() | {"choices": [{"finish_reason": "stop"}]}},
    "all null": {"json": reply_with(content=None)},
    "strange content": {"json": reply_with(content={"text": "yes"})},
    "strange calls": {"json": reply_with(content=None, tool_calls=5)},
    "no reason": {"json": reply_with(None, content="half a")},
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_an_answer_that_is_not_whole_raises_and_is_recorded(name: str) -> None:
    reply = httpx2.Response(200, **NOT_WHOLE[name])
    with asking_session("half", lambda request: reply) as session:
        with pytest.raises(ReplyError, match="is not a whole chat completion"):
            ask("Is it?")
    (call,) = session.calls
    known = b"total_tokens" in reply.content
    assert (call.usage is not None, call.cost is not None) == (known, known)
    assert (call.error, call.duration is not None) == (None, True)


@contextmanager
def noted(opened: list[Any]) -> Iterator[Any]:
    with smart_session("subject") as session:
        opened.append(session)
        yield session


@asynccontextmanager
async def noted_in_a_task(opened: list[Any]) -> AsyncIterator[Any]:
    with noted(opened) as session:
        yield session


@pytest.mark.parametrize("way", [*SYNC_WAYS, *ASYNC_WAYS], ids=lambda way: way.__name__)
def test_smart_session_keeps_the_cleanup_contract(way: Way) -> None:
    def leaks() -> list[str]:
        still = [f"{session.name} is open" for session in opened if not session.closed]
        return still + [f"{current} is current" for current in [current_session()] if current]

    opened: list[Any] = []
    open_session = noted if way in SYNC_WAYS else noted_in_a_task
    use = lambda session: session.record(Call("/chat"))  # noqa: E731
    subject = Subject(
        partial(open_session, opened),
        leaks,
        use=use,
        closed_error=SessionClosedError,
        setup_faults="it only makes an object and sets a variable",
        cleanup_faults="it only resets a variable, and copes with a token of another context",
    )
    way(subject)


# --- The recording client ---


def test_a_call_is_recorded_with_model_tokens_cost_and_duration() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["accept-encoding"] == "identity"  # to be read as it passes
        reply = completion(1234, 567, prompt_tokens_details={"cached_tokens": 1000})
        reply["model"] = "gpt-4o-mini-2024-07-18"
        extensions = {"http_version": b"HTTP/2"}
        return httpx2.Response(200, json=reply, headers={"x-id": "7"}, extensions=extensions)

    with client_that(handler, clock=FakeClock()) as client, smart_session("measured") as session:
        raw = chat(client.with_options(timeout=5).with_raw_response)
    assert raw.parse().choices[0].message.content == "yes"
    assert (raw.headers["x-id"], raw.http_response.http_version) == ("7", "HTTP/2")
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


PRICES = {"gpt-4o-mini": Decimal(5), "llama3.2": Decimal(7)}


@pytest.mark.parametrize(
    ("model", "price", "cost"),
    [
        (None, lambda usage, model: PRICES[model], 5),  # the request's, if the reply names none
        ("llama3.2", lambda usage, model: PRICES[model], 7),
        ("llama3.2", chapter.list_price, None),
        ("llama3.2", lambda usage, model: 1 / 0, None),
    ],
)
def test_an_unknown_price_says_what_to_pass_and_loses_no_reply(
    model: str | None, price: Any, cost: int | None
) -> None:
    with client_that(answering(model=model), price=price) as client:
        with smart_session("priced") as session:
            assert chat(client).choices
    (call,) = session.calls
    assert (call.model, call.cost) == (model or "gpt-4o-mini", cost)
    assert call.usage.input_tokens == 3
    says = pytest.raises(LookupError, match=r"'llama3\.2' is unknown: pass price=")
    with nullcontext() if cost else says:
        assert session.cost == cost


def test_limits_are_the_sdks_and_http_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock()
    for name in ("HTTPTransport", "AsyncHTTPTransport"):
        monkeypatch.setattr(httpx2, name, made)
    for make in (recording_client, async_recording_client):
        with pytest.raises(TypeError, match="http_client"):
            make(http_client=object())
    assert made.call_args_list == [((), {"limits": openai.DEFAULT_CONNECTION_LIMITS})] * 2


def test_requests_that_name_no_model_are_recorded_without_one() -> None:
    with client_that(lambda request: httpx2.Response(200, json={})) as client:
        with smart_session("others") as session:
            client.audio.transcriptions.create(model="whisper-1", file=("words.wav", b"words"))
            client.get("/models", cast_to=object)
    paths = ["/v1/audio/transcriptions", "/v1/models"]
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
    transport, async_transport = Mock(), AsyncMock()
    recording_client(transport, **OFFLINE).close()
    asyncio.run(async_recording_client(async_transport, **OFFLINE).close())
    transport.close.assert_called_once_with()
    async_transport.aclose.assert_awaited_once_with()


def test_each_attempt_of_the_sdk_is_a_call_with_its_own_error() -> None:
    busy = {"error": {"message": "slow down"}}
    replies = [
        httpx2.Response(429, headers=NO_RETRY_DELAY, json=busy),
        httpx2.Response(500, headers=NO_RETRY_DELAY, text="oops"),
        httpx2.Response(200, json=completion()),
    ]
    with client_that(lambda request: replies.pop(0)) as client, smart_session("tries") as session:
        chat(client)
    assert [call.error for call in session.calls] == ["HTTP 429", "HTTP 500", None]
    assert [call.usage is None for call in session.calls] == [True, True, False]
    assert all(call.duration is not None for call in session.calls)


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


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_is_recorded_as_it_passes_however_it_is_cut(size: int) -> None:
    whole = b"".join(STREAM).replace(b"\n", b"\r\n" if size == 7 else b"\n")
    body = Body([whole[start : start + size] for start in range(0, len(whole), size)])
    received = []
    with client_that(body.reply, clock=FakeClock()) as client, smart_session("stream") as session:
        create = client.chat.completions.with_streaming_response.create
        with create(model="m", messages=[], stream=True) as response:
            for piece in response.iter_bytes():
                received.append(piece)
                assert body.sent == received
    assert b"".join(received) == whole
    (call,) = session.calls
    assert (call.model, call.error, call.duration) == ("gpt-4o-mini", None, 1.0)
    assert call.cost == Decimal("0.00045")
    assert body.closed


def test_an_abandoned_stream_is_recorded_even_if_it_is_never_closed() -> None:
    with smart_session("abandoned") as session:
        session.record(call := Call("/v1/chat/completions"))
        reader = chapter.ReplyReader(call, session, FakeClock(), chapter.list_price)
        pieces = iter(reader.watch(Body(STREAM).reply(None)).stream)
        next(pieces)
        pieces.close()  # as the garbage collector does
    assert (call.usage, call.error, call.duration) == (None, None, 1.0)


LOST = httpx2.ReadError("connection lost")


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.asyncio
async def test_an_async_stream_that_is_left_or_breaks_is_closed_at_once(breaks: bool) -> None:
    body = Body(STREAM[:1], LOST) if breaks else Body(STREAM * 50)
    async with async_client_that(body.reply) as client:
        with smart_session("left") as session:
            create = client.chat.completions.with_streaming_response.create
            raw = create(model="gpt-4o-mini", messages=[], stream=True)
            async with raw as response, aclosing(response.http_response.aiter_bytes()) as pieces:
                await anext(pieces)
                if breaks:
                    with pytest.raises(httpx2.ReadError):
                        await anext(pieces)
            assert body.reading_ended
    (call,) = session.calls
    assert (call.error, call.duration is not None) == ("ReadError" if breaks else None, True)
    assert body.closed


@patch.multiple(Body, close=Mock(side_effect=OSError), aclose=AsyncMock(side_effect=OSError))
@pytest.mark.asyncio
async def test_a_call_is_complete_even_if_its_connection_fails_to_close() -> None:
    with client_that(Body(STREAM).reply) as client, smart_session("fails") as session:
        with pytest.raises(OSError):  # noqa: PT011
            chat(client, stream=True).close()
        async with async_client_that(Body(STREAM).reply) as async_client:
            stream = await chat(async_client, stream=True)
            with pytest.raises(OSError):  # noqa: PT011
                await stream.close()
    assert [call.duration is not None for call in session.calls] == [True, True]


def refuse(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("refused")


OVERLOADED = {"error": {"message": "overloaded", "type": "server_error"}}


@pytest.mark.parametrize(
    ("stream", "handler", "raised", "recorded"),
    [
        (False, refuse, openai.APIConnectionError, "ConnectError"),
        (False, lambda request: httpx2.Response(200, json=OVERLOADED), None, "error in the reply"),
        (True, Body([*STREAM[:1], *sse(OVERLOADED)]).reply, openai.APIError, "error in the reply"),
        (True, Body(STREAM[:1], LOST).reply, openai.APIConnectionError, "ReadError"),
    ],
)
def test_an_error_is_recorded_and_comes_out(
    stream: bool, handler: Handler, raised: type[Exception] | None, recorded: str
) -> None:
    options: Any = {"max_retries": 0, "clock": FakeClock()}
    with client_that(handler, **options) as client, smart_session("fails") as session:
        with pytest.raises(raised) if raised else nullcontext():
            reply = chat(client, stream=stream)
            if stream:
                words(reply)
    (call,) = session.calls
    assert (call.error, call.model, call.duration) == (recorded, "gpt-4o-mini", 1.0)


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


# --- What the demos show ---


TREE = """
article
├── call 1: gpt-4o-mini, 1 → 4 tokens, $0.00000255
├── title
│   └── call 2: gpt-4o-mini, 2 → 5 tokens, $0.0000033
└── call 3: gpt-4o-mini, 3 → 6 tokens, $0.00000405
✓ `smart_session`: article itself recorded 2 of its 2 calls.
"""


@pytest.mark.parametrize("live", [False, True])
def test_each_demo_shows_the_failure_first_and_asks_a_model_only_live(
    live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def handle_request(transport: object, request: httpx2.Request) -> Any:
        asked.append((request.url.host, json.loads(request.content)["model"]))
        return chapter.stand_in(request)

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(chapter, "live", False)  # so that it is False again after the test
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle_request)
    monkeypatch.setattr(sys, "argv", ["04_smart_session.py", *["--live"] * live])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://192.0.2.1/v1")
    monkeypatch.setenv("OPENAI_MODEL", "local-model")
    assert chapter.main() == 0
    out, err = capsys.readouterr()
    assert (err, asked) == ("", [("192.0.2.1", "local-model")] * (5 + 4) * live)  # demos 2 and 4
    assert "".join(re.findall(r"^[✗✓](?= )", out, re.MULTILINE)) == "✗✓✗✓✗✓✓✓✓✗✓✗✓"
    assert "they find: ada → bob, bob → None." in out
    assert "Requests sent: 4, recorded: 3." in out
    assert ("Demos 2 and 4 ask a real model." in out) == live
    assert ("call 1: local-model, 1 → 4 tokens, ?" in out) == live  # its price is unknown
    assert (TREE in re.sub(" +\n", "\n", out)) == (not live)
