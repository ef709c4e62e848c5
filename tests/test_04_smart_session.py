"""Chapter 04: sessions are found where they should be, and what a client does is recorded."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from contextvars import copy_context
from decimal import Decimal, localcontext
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way, time_limit
from waiting import FakeClock

chapter: Any = load_chapter(4)
smart_session, current_session = chapter.smart_session, chapter.current_session
ask, ask_async, isolated = chapter.ask, chapter.ask_async, chapter.isolated
recording_client, async_recording_client = chapter.recording_client, chapter.async_recording_client
SessionClosedError, Call = chapter.SessionClosedError, chapter.Call
Log = pytest.LogCaptureFixture
OFFLINE: Any = {"api_key": "offline", "base_url": "http://offline/v1"}


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    with time_limit():
        yield


def client_that(server: Any = chapter.stand_in, **options: Any) -> Any:
    """A client whose server is a function, or gives these replies (or errors) in turn."""
    transport = httpx2.MockTransport(Mock(side_effect=server))
    return recording_client(transport, **OFFLINE, **options)


def async_client_that(server: Any = chapter.stand_in) -> Any:
    return async_recording_client(httpx2.MockTransport(Mock(side_effect=server)), **OFFLINE)


def chat(client: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Is it?"}]
    return client.chat.completions.create(model="gpt-4o-mini", messages=messages, **options)


@contextmanager
def asking_session(name: str, server: Any = chapter.stand_in, **options: Any) -> Iterator[Any]:
    """Open a session with a client for `ask`."""
    with client_that(server, **options) as client, smart_session(name, client=client) as session:
        yield session


def test_a_call_is_recorded_in_the_innermost_session() -> None:
    with client_that() as client, smart_session("outer", client=client, model="gpt-4o") as outer:
        ask("one")
        with smart_session("inner", client=async_client_that()) as inner:
            assert current_session() is inner
            ask("two words")  # by the model and the client around it
            with smart_session("innermost", model="gpt-4.1") as innermost:
                answer = asyncio.run(ask_async("now three words"))
        assert current_session() is outer
        ask("now there are four")
        assert not client.is_closed()
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
    with asking_session("outer"), ThreadPoolExecutor(1) as executor:
        with smart_session("inner", client=async_client_that()) as inner:
            await asyncio.gather(ask_async("one"), ask_async("two"))
            await asyncio.to_thread(ask, "three")
            executor.submit(copy_context().run, ask, "four").result()
    assert len(inner.calls) == 4


@pytest.mark.asyncio
async def test_a_task_that_outlives_its_block_gets_an_error() -> None:
    """The block waits for nothing. A call under way is not recorded, a later one not even sent."""
    sent, answer = asyncio.Event(), asyncio.Event()

    async def server(request: httpx2.Request) -> Any:
        assert not sent.is_set()
        sent.set()
        await answer.wait()
        return chapter.stand_in(request)

    async with async_client_that(server) as client:
        with smart_session("block") as session:
            tasks = [asyncio.create_task(chat(client))]
            await sent.wait()
            tasks += [asyncio.create_task(late) for late in (chat(client), ask_async("late"))]
        answer.set()
        for task in tasks:
            with pytest.raises(SessionClosedError, match="session 'block' is closed"):
                await task
    assert session.calls == [Call("/v1/chat/completions", "gpt-4o-mini")]


def test_what_outlives_its_session_nests_in_an_open_one() -> None:
    def late() -> Any:
        with smart_session("late") as session:
            return session

    with smart_session("outer") as outer:
        with smart_session("inner"):
            copy = copy_context()  # as a task has it
        assert copy.run(late).parent is outer
    assert copy.run(current_session) is outer  # `late` put it in the place of `inner`
    assert copy.run(late).parent is None
    assert copy.run(current_session) is None


def suspended() -> Any:
    with smart_session("inside"):
        yield "one"
        yield "two"


def test_out_of_order_the_innermost_open_session_stays_current() -> None:
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


def test_an_isolated_generator_leaks_nothing(caplog: Log) -> None:
    with smart_session("caller") as caller:
        items = isolated(suspended())
        assert next(items) == "one"
        assert current_session() is caller
        items.close()
        assert caller.children[0].closed
        assert list(isolated(suspended())) == ["one", "two"]
    assert caplog.text == ""  # no session ended in another context


def test_a_block_that_ends_in_another_context_warns(caplog: Log) -> None:
    began = copy_context()
    manager = smart_session("wanders")
    session = began.run(manager.__enter__)
    copy = began.run(copy_context)
    copy.run(manager.__exit__, None, None, None)
    assert session.closed
    assert "session 'wanders' ended in another context" in caplog.text
    assert copy.run(current_session) is None
    assert began.run(current_session) is session  # out of reach


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
    opened: list[Any] = []
    subject = Subject(
        partial(noted if way in SYNC_WAYS else noted_in_a_task, opened),
        leaks=lambda: current_session() or [each for each in opened if not each.closed],
        use=lambda session: session.record(Call("/chat")),
        closed_error=SessionClosedError,
        setup_faults="it only makes an object and sets a variable",
        cleanup_faults="it only resets a variable, and copes with a token of another context",
    )
    way(subject)


def test_without_a_session_or_a_client_ask_fails_and_a_call_warns(caplog: Log) -> None:
    with pytest.raises(LookupError, match=r"ask inside `with smart_session"):
        ask("Is it?")
    with smart_session("bare"), pytest.raises(LookupError, match=r"'bare' has no OpenAI client"):
        ask("Is it?")
    with asking_session("wrong kind"), pytest.raises(LookupError, match="no AsyncOpenAI client"):
        asyncio.run(ask_async("Is it?"))
    with client_that() as client:
        assert chat(client).choices
    assert "no session is current: /v1/chat/completions is not recorded" in caplog.text


CACHED = {"cached_tokens": 1000}
USAGE = {"prompt_tokens": 1234, "completion_tokens": 567, "prompt_tokens_details": CACHED}
COST = Decimal("0.0004503")  # of all that


def reply_with(message: Any, finish_reason: Any = "stop", **more: Any) -> httpx2.Response:
    """A reply of Chat Completions."""
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
    reply = {"id": "1", "model": "gpt-4o-mini", "choices": choices, "usage": USAGE}
    return httpx2.Response(200, json=reply | more)


def test_ask_returns_a_content_a_refusal_or_tool_calls() -> None:
    calls = [{"id": "1", "function": {"arguments": "{}", "name": "look"}, "type": "function"}]
    messages = [{"content": "yes"}, {"content": ""}, {"refusal": "no"}, {"tool_calls": calls}]
    with asking_session("whole", map(reply_with, messages)):
        assert [ask("Is it?") for _each in messages] == ["yes", "", "no", json.dumps(calls)]


def test_an_answer_that_is_not_whole_raises_and_is_recorded() -> None:
    texts = [b"<p>Log in</p>", b"[" * 100_000, b"null", b'{"usage": {"prompt_tokens": 1e999}}']
    is_json = {"content-type": "application/json"}
    replies = [httpx2.Response(200, content=text, headers=is_json) for text in texts]
    replies += [reply_with({"content": "half a"}, None), reply_with({}, choices=[])]
    replies += [reply_with(wrong) for wrong in ("yes", {}, {"content": ["?"]}, {"tool_calls": 5})]
    with asking_session("half", replies) as session:
        for _each in replies:
            with pytest.raises(chapter.ReplyError, match="is not a whole chat completion"):
                ask("Is it?")
    assert [bool(call.usage and call.cost) for call in session.calls] == [False] * 4 + [True] * 6
    assert all(call.duration is not None and call.error is None for call in session.calls)


def test_a_call_is_recorded_with_model_tokens_exact_cost_and_duration() -> None:
    model = "gpt-4o-mini-2024-07-18"

    def server(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["accept-encoding"] == "identity"  # to be read as it passes
        reply = reply_with({"content": "yes"}, model=model)
        reply.headers["x-id"], reply.extensions["http_version"] = "7", b"HTTP/2"
        return reply

    with client_that(server, clock=FakeClock()) as client, smart_session("measured") as session:
        with localcontext(prec=2):  # the caller's
            chat(client)
            raw = chat(client.with_options(timeout=5).with_raw_response)
            assert session.cost == Decimal("0.0009006")
    assert (raw.headers["x-id"], raw.http_response.http_version) == ("7", "HTTP/2")
    for call in session.calls:  # neither what was asked nor what was answered is kept
        assert call == Call("/v1/chat/completions", model, call.usage, COST, duration=1.0)


def test_responses_embeddings_and_transcriptions_are_understood() -> None:
    usage = {"input_tokens": 1234, "output_tokens": 567, "input_tokens_details": CACHED}
    reply = {"id": "1", "created_at": 0, "model": "gpt-4o-mini", "output": [], "usage": usage}
    done = sse({"type": "response.completed", "response": reply})
    vectors = {"model": "text-embedding-3-small", "data": [{}], "usage": {"prompt_tokens": 8}}
    replies = [httpx2.Response(200, json=each) for each in (reply, vectors, {})]
    replies.append(httpx2.Response(200, headers=EVENT_STREAM, content=b"".join(done)))
    with client_that(replies) as client, smart_session("all") as session:
        client.responses.create(model="gpt-4o-mini", input="Is it?")
        client.embeddings.create(model="e", input="Is it?", encoding_format="float")
        client.audio.transcriptions.create(model="whisper-1", file=("words.wav", b"words"))
        list(client.responses.create(model="gpt-4o-mini", input="Is it?", stream=True))
    assert [call.cost for call in session.calls] == [COST, Decimal("1.6E-7"), None, COST]
    assert session.calls[2].model is None  # an upload names no model


def test_a_price_of_your_own_gets_the_model_of_the_reply_or_request() -> None:
    prices = {"gpt-4o-mini": Decimal(5), "llama3.2": Decimal(7)}
    replies = [reply_with({}, model=model) for model in (None, "llama3.2")]
    with asking_session("priced", replies, price=lambda _usage, model: prices[model]) as session:
        assert chat(session.client).choices == chat(session.client).choices
    assert session.cost == 12


def test_an_unknown_price_says_what_to_pass_and_loses_no_reply() -> None:
    with asking_session("priced", [reply_with({}, model="llama3.2")]) as session:
        assert chat(session.client).choices
    assert session.calls[0].usage.input_tokens == 1234
    with pytest.raises(LookupError, match=r"'llama3\.2' is unknown: pass price="):
        _cost = session.cost


def test_limits_are_the_sdks_and_http_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock()
    for name, make in {"": recording_client, "Async": async_recording_client}.items():
        monkeypatch.setattr(httpx2, f"{name}HTTPTransport", made)
        with pytest.raises(TypeError, match="http_client"):
            make(http_client=object())
    assert made.call_args_list == [((), {"limits": openai.DEFAULT_CONNECTION_LIMITS})] * 2


def test_closing_a_client_closes_its_transport() -> None:
    transport, async_transport = Mock(), AsyncMock()
    recording_client(transport, **OFFLINE).close()
    asyncio.run(async_recording_client(async_transport, **OFFLINE).close())
    transport.close.assert_called_once_with()
    async_transport.aclose.assert_awaited_once_with()


def test_each_attempt_of_the_sdk_is_a_call_with_its_own_error() -> None:
    at_once = {"retry-after-ms": "1"}
    replies = [httpx2.Response(status, headers=at_once, text="oops") for status in (429, 500)]
    with asking_session("tries", [*replies, reply_with({"content": "yes"})]) as session:
        ask("Is it?")
    outcomes = [(call.error, call.usage is None) for call in session.calls]
    assert outcomes == [("HTTP 429", True), ("HTTP 500", True), (None, False)]
    assert all(call.duration is not None for call in session.calls)


EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def sse(*events: dict[str, Any]) -> list[bytes]:
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events]


CHUNK = {"model": "gpt-4o-mini", "choices": [{"index": 0, "delta": {"content": "Yes"}}]}
STREAM = [*sse(CHUNK, CHUNK, CHUNK | {"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"]
OVERLOADED = {"error": {"message": "overloaded", "type": "server_error"}}


def stream_of(*pieces: bytes | Exception) -> httpx2.Response:
    """A stream in pieces, which an exception breaks off."""
    content: Any = iter(Mock(side_effect=pieces), None)  # gives or raises one after the other
    return httpx2.Response(200, headers=EVENT_STREAM, content=content)


def test_a_stream_is_recorded_however_it_is_cut() -> None:
    whole = b"".join(STREAM).replace(b"\n", b"\r\n")
    reply = stream_of(*(whole[start : start + 7] for start in range(0, len(whole), 7)))
    with client_that([reply], clock=FakeClock()) as client, smart_session("stream") as session:
        create = client.chat.completions.with_streaming_response.create
        with create(model="m", messages=[], stream=True) as response:
            assert b"".join(response.iter_bytes()) == whole
    (call,) = session.calls
    assert call == Call("/v1/chat/completions", "gpt-4o-mini", call.usage, COST, duration=1.0)


def test_a_long_reply_is_not_held_in_memory() -> None:
    for kind in ("text/event-stream", "audio/mpeg"):
        reader = chapter.ReplyReader(Call("/v1/audio/speech"), Mock(), FakeClock(), None)
        reader.watch(httpx2.Response(200, headers={"content-type": kind}))
        for piece in [b"." * 999_999, b".\n"] * 3:
            reader.feed(piece)
        assert not reader._unread


def test_an_abandoned_stream_is_recorded_even_if_it_is_never_closed() -> None:
    source = iter(STREAM)
    reply = httpx2.Response(200, headers=EVENT_STREAM, content=source)
    with smart_session("abandoned") as session:
        session.record(call := Call("/v1/chat/completions"))
        reader = chapter.ReplyReader(call, session, FakeClock(), chapter.list_price)
        pieces = iter(reader.watch(reply).stream)
        next(pieces)
        assert next(source) == STREAM[1]  # nothing was read in advance
        pieces.close()  # as the garbage collector does
    assert (call.usage, call.error, call.duration) == (None, None, 1.0)


@pytest.mark.asyncio
async def test_async_calls_that_are_left_or_cancelled_are_recorded_at_once() -> None:
    async def content() -> AsyncIterator[bytes]:
        for piece in STREAM:
            yield piece

    source = content()
    reply = httpx2.Response(200, headers=EVENT_STREAM, content=source)
    async with async_client_that([reply, asyncio.CancelledError()]) as client:
        with smart_session("left") as session:
            create = client.chat.completions.with_streaming_response.create
            async with create(model="gpt-4o-mini", messages=[], stream=True) as response:
                async with aclosing(response.http_response.aiter_bytes()) as pieces:
                    await anext(pieces)
            assert [piece async for piece in source] == []  # it is closed
            with pytest.raises(asyncio.CancelledError):
                await chat(client)
    assert [call.error for call in session.calls] == [None, "CancelledError"]
    assert all(call.duration is not None for call in session.calls)


def test_a_call_is_complete_even_if_its_connection_fails_to_close() -> None:
    fails = {"side_effect": ConnectionError}
    body, reader = Mock(close=Mock(**fails), aclose=AsyncMock(**fails)), Mock()
    recorded = chapter.RecordedBody(body, reader)
    with pytest.raises(ConnectionError):
        recorded.close()
    with pytest.raises(ConnectionError):
        asyncio.run(recorded.aclose())
    assert reader.finish.call_count == 2


@pytest.mark.parametrize(
    ("reply", "raised", "recorded"),
    [
        (httpx2.ConnectError("refused"), openai.APIConnectionError, "ConnectError"),
        (httpx2.Response(200, json=OVERLOADED), None, "error in the reply"),
        (stream_of(STREAM[0], *sse(OVERLOADED)), openai.APIError, "error in the reply"),
        (stream_of(STREAM[0], httpx2.ReadError("lost")), openai.APIConnectionError, "ReadError"),
    ],
)
def test_an_error_is_recorded_and_comes_out(reply: Any, raised: Any, recorded: str) -> None:
    with asking_session("fails", [reply], max_retries=0, clock=FakeClock()) as session:
        with pytest.raises(raised) if raised else nullcontext():
            list(chat(session.client, stream=True))
    (call,) = session.calls
    assert (call.error, call.model, call.duration) == (recorded, "gpt-4o-mini", 1.0)


@pytest.mark.parametrize("live", [False, True])
def test_each_demo_shows_the_failure_first_and_asks_a_model_only_live(
    live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Mock(side_effect=chapter.stand_in)
    monkeypatch.setattr(chapter, "live", False)  # so that it is False again after the test
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", server)
    monkeypatch.setattr(sys, "argv", ["04_smart_session.py", *["--live"] * live])
    settings = {"API_KEY": "sk-test", "BASE_URL": "http://192.0.2.1/v1", "MODEL": "local-model"}
    for name, value in settings.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    assert chapter.main() == 0
    asked = [call.args[0].url.host for call in server.call_args_list]
    out, err = capsys.readouterr()
    assert (err, asked) == ("", ["192.0.2.1"] * (5 + 4) * live)  # demos 2 and 4
    assert "".join(re.findall(r"^[✗✓](?= )", out, re.MULTILINE)) == "✗✓✗✓✗✓✓✓✓✗✓✗✓"
    assert "they find: ada → bob, bob → None." in out
    assert "Requests sent: 4, recorded: 3." in out
    assert ("Demos 2 and 4 ask a real model." in out) == live
    assert ("call 1: local-model, 1 → 4 tokens, ?" in out) == live  # its price is unknown
    assert ("├── call 1: gpt-4o-mini, 1 → 4 tokens, $0.00000255" in out) == (not live)
    assert ("│   └── call 2: gpt-4o-mini, 2 → 5 tokens, $0.0000033" in out) == (not live)
