"""Chapter 04: sessions are found where they should be, and what a client does is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, closing, suppress
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, cast

import httpx2
import openai
import pytest
from conftest import load_chapter
from contract import ASYNC_WAYS, SYNC_WAYS, Subject, Way

chapter = load_chapter(4)
smart_session, current_session = chapter.smart_session, chapter.current_session
ask, ask_async = chapter.ask, chapter.ask_async
recording_client, async_recording_client = chapter.recording_client, chapter.async_recording_client
SessionClosedError = chapter.SessionClosedError

NO_RETRY_DELAY = {"retry-after-ms": "1"}


def completion(
    prompt_tokens: int = 3, completion_tokens: int = 2, model: str = "gpt-4o-mini", **details: Any
) -> dict[str, Any]:
    """A reply as Chat Completions gives it."""
    message = {"role": "assistant", "content": "yes"}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **details,
    }
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"id": "1", "created": 0, "model": model, "choices": choices, "usage": usage}


def client_that(handler: Callable[[httpx2.Request], httpx2.Response], **options: Any) -> Any:
    return recording_client(httpx2.MockTransport(handler), **options)


def async_client_that(handler: Any, **options: Any) -> Any:
    return async_recording_client(httpx2.MockTransport(handler), **options)


def answering(**reply: Any) -> Callable[[httpx2.Request], httpx2.Response]:
    return lambda request: httpx2.Response(200, json=completion(**reply))


def chat(client: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Is it?"}]
    return client.chat.completions.create(model="gpt-4o-mini", messages=messages, **options)


def paths(calls: list[Any]) -> list[str]:
    return [call.path for call in calls]


def ticking(step: float = 1.0) -> Callable[[], float]:
    """A clock that is `step` seconds later at each reading."""
    readings = iter(range(1_000_000))
    return lambda: next(readings) * step


# --- The current session ---


def test_a_call_is_recorded_in_the_innermost_session() -> None:
    with smart_session("outer") as outer:
        ask("one")
        with smart_session("inner") as inner:
            ask("two")
            assert current_session() is inner
        assert current_session() is outer
        ask("three")
    assert current_session() is None
    assert (len(outer.calls), len(inner.calls)) == (2, 1)


def test_all_calls_rolls_up_the_nested_sessions() -> None:
    with smart_session("outer") as outer:
        with smart_session("first"):
            ask("one")
            with smart_session("deeper"):
                ask("two words")
        with smart_session("second"):
            ask("now three words")
        ask("now these are four")
    assert [call.usage.input_tokens for call in outer.all_calls()] == [4, 1, 2, 3]
    assert outer.cost == sum(call.cost for call in outer.all_calls()) > 0


def test_a_nested_session_knows_its_parent() -> None:
    with smart_session("outer") as outer, smart_session("inner") as inner:
        assert inner.parent is outer
        assert outer.children == [inner]
        assert outer.parent is None


def test_a_nested_session_uses_its_parents_model_unless_it_has_its_own() -> None:
    with smart_session("outer", model="gpt-4o") as outer:
        with smart_session("inherits") as inherits:
            ask("one")
        with smart_session("has its own", model="gpt-4.1") as has_its_own:
            ask("two")
        ask("three")
    assert inherits.calls[0].model == outer.calls[0].model == "gpt-4o"
    assert has_its_own.calls[0].model == "gpt-4.1"


@pytest.mark.parametrize("error", [ValueError("body"), KeyboardInterrupt(), GeneratorExit()])
def test_an_error_leaves_the_block_as_it_is_and_restores_the_session(error: BaseException) -> None:
    with smart_session("outer") as outer:
        with pytest.raises(type(error)) as caught, smart_session("inner") as inner:
            raise error
        assert caught.value is error
        assert current_session() is outer
        assert inner.closed
        assert not outer.closed
        ask("still recorded")
    assert len(outer.calls) == 1


def test_a_session_entered_again_inside_itself_goes_on_recording() -> None:
    with smart_session("same") as session:
        with session.as_current() as again:
            ask("one")
        assert again is session
        assert current_session() is session
        ask("two")
    assert len(session.calls) == 2


def test_a_session_entered_again_shadows_the_one_nested_in_it() -> None:
    with smart_session("outer") as outer, smart_session("inner") as inner:
        with outer.as_current():
            ask("for the outer one")
        ask("for the inner one")
    assert (len(outer.calls), len(inner.calls)) == (1, 1)


def test_an_error_leaves_a_session_that_was_entered_again() -> None:
    with smart_session("same") as session:
        with pytest.raises(ValueError, match="body"), session.as_current():
            raise ValueError("body")
        assert current_session() is session
    with suppress(ValueError), session.as_current():
        raise ValueError
    assert current_session() is None


def test_a_session_entered_again_after_its_block_takes_no_calls() -> None:
    with smart_session("done") as session:
        pass
    with session.as_current(), pytest.raises(SessionClosedError, match="'done' is closed"):
        ask("too late")
    assert session.calls == []


def test_no_call_joins_a_session_that_is_being_closed() -> None:
    class Calls(list[Any]):
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
        session.calls = Calls()
        ask("while it closes")
        closing_thread.join()
    assert len(session.calls) == 1


# --- Tasks ---


@pytest.mark.asyncio
async def test_children_of_gather_taskgroup_and_to_thread_record_in_the_session() -> None:
    with smart_session("parent") as session:
        await asyncio.gather(ask_async("one"), ask_async("two"))
        async with asyncio.TaskGroup() as group:
            group.create_task(ask_async("three"))
        await asyncio.to_thread(ask, "four")
    assert len(session.calls) == 4


@pytest.mark.asyncio
async def test_two_concurrent_tasks_have_a_session_each() -> None:
    both = asyncio.Barrier(2)

    async def job(name: str) -> Any:
        with smart_session(name) as session:
            await both.wait()
            await ask_async(name)
            await both.wait()
            assert current_session() is session
        return session

    with smart_session("around") as around:
        sessions = await asyncio.gather(job("a"), job("b"))
    assert [len(session.calls) for session in sessions] == [1, 1]
    assert len(around.all_calls()) == 2
    assert around.calls == []


@pytest.mark.asyncio
async def test_a_task_that_outlives_its_block_gets_an_error_and_sends_nothing() -> None:
    sent: list[httpx2.Request] = []
    ended = asyncio.Event()

    def handler(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json=completion())

    async with async_client_that(handler) as client:

        async def late() -> None:
            await ended.wait()
            await ask_async("late", client=client)

        with smart_session("block") as session:
            task = asyncio.create_task(late())
            await ask_async("in time", client=client)
        ended.set()
        with pytest.raises(SessionClosedError, match="session 'block' is closed"):
            await task
    assert len(sent) == len(session.calls) == 1


@pytest.mark.asyncio
async def test_a_call_under_way_when_its_block_ends_is_recorded_to_its_end() -> None:
    sent, answer = asyncio.Event(), asyncio.Event()

    async def handler(request: httpx2.Request) -> httpx2.Response:
        sent.set()
        await answer.wait()
        return httpx2.Response(200, json=completion())

    async with async_client_that(handler) as client:
        with smart_session("block") as session:
            task = asyncio.create_task(ask_async("slow", client=client))
            await sent.wait()
        assert [call.duration for call in session.calls] == [None]
        answer.set()
        await task
    assert session.calls[0].usage.input_tokens == 3
    assert session.calls[0].duration is not None


@pytest.mark.asyncio
async def test_a_task_that_outlived_its_session_can_open_one_in_what_is_still_open() -> None:
    ended = asyncio.Event()

    async def late() -> Any:
        await ended.wait()
        with smart_session("late") as session:
            await ask_async("recorded")
        return session

    with smart_session("outer") as outer:
        with smart_session("inner"):
            first = asyncio.create_task(late())
        ended.set()
        assert (await first).parent is outer
        ended.clear()
        second = asyncio.create_task(late())
    ended.set()
    assert (await second).parent is None
    assert len(outer.all_calls()) == 1


# --- Threads ---


def inherited() -> bool:
    """Whether threads inherit the context: an option of Python 3.14, off by default."""
    return bool(getattr(sys.flags, "thread_inherit_context", False))


def in_thread(function: Callable[..., Any], *args: object) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def test_a_plain_thread_does_not_inherit_the_session(caplog: pytest.LogCaptureFixture) -> None:
    with smart_session("parent") as session:
        in_thread(ask, "lost")
    assert len(session.calls) == inherited()
    assert ("not recorded" in caplog.text) is not inherited()


def test_an_executor_does_not_inherit_the_session() -> None:
    with smart_session("parent") as session, ThreadPoolExecutor() as executor:
        executor.submit(ask, "lost").result()
    assert len(session.calls) == inherited()


def test_copy_context_run_hands_the_session_to_threads_and_executors() -> None:
    with smart_session("parent") as session, ThreadPoolExecutor(2) as executor:
        in_thread(contextvars.copy_context().run, ask, "one")
        jobs = [executor.submit(contextvars.copy_context().run, ask, str(n)) for n in range(10)]
        assert all(job.result() for job in jobs)
    assert len(session.calls) == 11


def test_as_current_hands_one_session_to_a_thread() -> None:
    def work() -> None:
        with session.as_current():
            ask("in a thread")
        assert current_session() is None

    with smart_session("parent") as session:
        with ThreadPoolExecutor() as executor:
            executor.submit(work).result()
    assert len(session.calls) == 1


def test_calls_from_many_threads_are_all_recorded() -> None:
    with smart_session("parent") as session, recording_client() as client:
        with ThreadPoolExecutor(8) as executor:
            for _ in range(200):
                executor.submit(contextvars.copy_context().run, lambda: ask("?", client=client))
    assert len(session.calls) == 200
    assert all(call.usage.input_tokens == 1 for call in session.calls)


# --- Generators ---


def words_in_a_session(opened: list[Any]) -> Iterator[str]:
    with smart_session("inside") as session:
        opened.append(session)
        for word in ("one", "two"):
            ask(word)
            yield word


def test_a_generator_suspended_in_a_session_leaks_it_to_its_caller() -> None:
    opened: list[Any] = []
    with closing(words_in_a_session(opened)) as generator:  # type: ignore[type-var]
        next(generator)
        assert current_session() is opened[0]
        ask("not meant for it")
        assert len(opened[0].calls) == 2


def test_a_leaked_session_never_records_in_silence_what_is_not_its_own() -> None:
    def leave_in_the_wrong_order() -> None:
        with smart_session("outer") as outer:
            generator = words_in_a_session([])
            next(generator)
        assert current_session() is None
        generator.close()  # type: ignore[attr-defined]
        with pytest.raises(SessionClosedError, match="'outer'"):  # current where it was entered
            ask("not lost in silence")
        with smart_session("next") as following:
            ask("recorded")
        assert (len(outer.calls), len(following.calls), following.parent) == (0, 1, None)

    contextvars.copy_context().run(leave_in_the_wrong_order)


def test_an_isolated_generator_keeps_its_session_to_itself() -> None:
    opened: list[Any] = []
    with smart_session("caller") as caller:
        for _word in chapter.isolated(words_in_a_session(opened)):
            assert current_session() is caller
            ask("the caller's own")
    assert (len(opened[0].calls), len(caller.calls)) == (2, 2)
    assert opened[0].parent is caller
    assert opened[0].closed


def test_an_isolated_generator_is_closed_where_it_ran_when_its_reader_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened: list[Any] = []
    items = chapter.isolated(words_in_a_session(opened))
    assert next(items) == "one"
    items.close()
    assert opened[0].closed
    assert caplog.text == ""  # it says so where a session is left in another context


def test_an_isolated_generator_passes_its_error_on() -> None:
    def fails() -> Iterator[str]:
        with smart_session("inside"):
            yield "one"
            raise ValueError("in the generator")

    items = chapter.isolated(fails())
    assert next(items) == "one"
    with pytest.raises(ValueError, match="in the generator"):
        next(items)


def left_in_another_context(body_error: Exception | None) -> Any:
    """Enter a session in one context, and leave its block in another."""
    manager = smart_session("wanders")
    session = contextvars.copy_context().run(manager.__enter__)
    if body_error is None:
        manager.__exit__(None, None, None)
    else:
        assert not manager.__exit__(type(body_error), body_error, None)
    return session


def test_a_session_left_in_another_context_is_closed_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = left_in_another_context(None)
    assert session.closed
    assert "session 'wanders' was left in a context that it was not entered in" in caplog.text
    assert current_session() is None


def test_leaving_in_another_context_does_not_hide_the_error_of_the_block() -> None:
    assert left_in_another_context(ValueError("the block's own")).closed


# --- No session ---


def test_without_a_session_ask_works_and_says_that_nothing_is_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "Is it?" in ask("Is it?")
    (record,) = [record for record in caplog.records if record.name == chapter.logger.name]
    assert record.levelno == logging.WARNING
    assert "/chat/completions is not recorded" in record.getMessage()


def test_the_strict_form_raises_where_no_session_is_current() -> None:
    with pytest.raises(LookupError, match=r"ask inside `with smart_session"):
        ask("Is it?", strict=True)
    with smart_session("there is one") as session:
        ask("Is it?", strict=True)
    assert len(session.calls) == 1


@pytest.mark.asyncio
async def test_the_strict_form_raises_in_async_code_too() -> None:
    with pytest.raises(LookupError):
        await ask_async("Is it?", strict=True)


# --- The contract ---


def subject(open_session: Callable[[list[Any]], Any]) -> Subject:
    opened: list[Any] = []

    def leaks() -> list[str]:
        still = [f"{session.name} is open" for session in opened if not session.closed]
        return still + [f"{current} is current" for current in [current_session()] if current]

    return Subject(
        open=lambda: open_session(opened),
        leaks=leaks,
        use=lambda session: session.record(chapter.Call("/chat")),
        closed_error=SessionClosedError,
    )


@contextlib.contextmanager
def noted(opened: list[Any]) -> Iterator[Any]:
    with smart_session("subject") as session:
        opened.append(session)
        yield session


@asynccontextmanager
async def noted_between_awaits(opened: list[Any]) -> AsyncIterator[Any]:
    await asyncio.sleep(0)
    with smart_session("subject") as session:
        opened.append(session)
        await ask_async("on entering")
        try:
            yield session
        finally:
            await ask_async("on leaving")


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
def test_smart_session_keeps_the_cleanup_contract(way: Way) -> None:
    way(subject(noted))


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__)
def test_smart_session_keeps_the_cleanup_contract_in_async_code(way: Way) -> None:
    way(subject(noted_between_awaits))


# --- The recording client ---


def test_a_call_is_recorded_with_model_tokens_cost_and_duration() -> None:
    reply = completion(1234, 567, prompt_tokens_details={"cached_tokens": 1000})
    reply["model"] = "gpt-4o-mini-2024-07-18"
    with client_that(lambda request: httpx2.Response(200, json=reply), clock=ticking()) as client:
        with smart_session("measured") as session:
            assert chat(client).choices[0].message.content == "yes"
    (call,) = session.calls
    assert (call.path, call.error) == ("/v1/chat/completions", None)
    assert call.model == "gpt-4o-mini-2024-07-18"
    assert (call.usage.input_tokens, call.usage.output_tokens) == (1234, 567)
    assert call.usage.cache_read_tokens == 1000
    assert call.cost == Decimal("0.0004503")
    assert call.duration == 1.0


@pytest.mark.asyncio
async def test_an_async_call_is_recorded_with_model_tokens_cost_and_duration() -> None:
    async with async_client_that(answering(prompt_tokens=1000, completion_tokens=500)) as client:
        with smart_session("measured") as session:
            await asyncio.gather(*(chat(client) for _ in range(50)))
    assert len(session.calls) == 50
    assert {call.cost for call in session.calls} == {Decimal("0.00045")}
    assert all(call.model == "gpt-4o-mini" and call.duration > 0 for call in session.calls)


def test_a_copy_of_the_client_records_too() -> None:
    with client_that(answering()) as client, smart_session("copied") as session:
        chat(client.with_options(timeout=5))
    assert len(session.calls) == 1


def test_the_responses_api_is_understood_plain_and_streamed() -> None:
    usage = {"input_tokens": 1234, "output_tokens": 567, "total_tokens": 1801}
    usage |= {"input_tokens_details": {"cached_tokens": 1000}}  # type: ignore[dict-item]
    reply = {"id": "1", "created_at": 0, "model": "gpt-4o-mini", "output": [], "error": None}
    events = [
        {"type": "response.created", "response": reply},
        {"type": "response.completed", "response": reply | {"usage": usage}},
    ]

    def handler(request: httpx2.Request) -> httpx2.Response:
        if json.loads(request.content).get("stream"):
            return httpx2.Response(200, headers=EVENT_STREAM, content=b"".join(sse(*events)))
        return httpx2.Response(200, json=reply | {"usage": usage})

    with client_that(handler) as client, smart_session("responses") as session:
        client.responses.create(model="gpt-4o-mini", input="Is it?")
        list(client.responses.create(model="gpt-4o-mini", input="Is it?", stream=True))
    assert [call.cost for call in session.calls] == [Decimal("0.0004503")] * 2


def test_embeddings_are_understood() -> None:
    reply = {"model": "text-embedding-3-small", "data": [], "usage": {"prompt_tokens": 8}}
    handler = lambda request: httpx2.Response(200, json=reply)  # noqa: E731
    with client_that(handler) as client, smart_session("embeddings") as session:
        with suppress(ValueError):  # the SDK refuses a reply without data
            client.embeddings.create(model="text-embedding-3-small", input="Is it?")
    (call,) = session.calls
    assert (call.usage.input_tokens, call.usage.output_tokens) == (8, 0)
    assert call.cost == Decimal("1.6E-7")


def test_a_model_without_a_price_has_tokens_but_no_cost() -> None:
    with client_that(answering(model="llama3.2")) as client, smart_session("local") as session:
        chat(client)
    assert session.calls[0].usage.input_tokens == 3
    assert session.calls[0].cost is None
    assert session.cost == 0


@pytest.mark.parametrize(
    "response",
    [
        httpx2.Response(200, html="<p>Please log in</p>"),
        httpx2.Response(200, json={"model": "gpt-4o-mini", "usage": {"prompt_tokens": "many"}}),
        httpx2.Response(200, json={"model": "gpt-4o-mini", "usage": {"total_tokens": 5}}),
        httpx2.Response(
            200,
            json={
                "model": "gpt-4o-mini",
                "usage": {"prompt_tokens": 1, "prompt_tokens_details": ["?"]},
            },
        ),
        httpx2.Response(200, json={"model": 4, "usage": {"prompt_tokens": 1}}),
        httpx2.Response(200, json=["not", "an", "object"]),
    ],
    ids=lambda response: response.text[:40],
)
def test_a_reply_that_no_api_gives_is_passed_on_and_its_tokens_stay_unknown(
    response: httpx2.Response,
) -> None:
    with client_that(lambda request: response) as client, smart_session("strange") as session:
        raw = client.chat.completions.with_raw_response.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Is it?"}]
        )
    assert raw.content == response.content
    (call,) = session.calls
    assert (call.usage, call.cost, call.error) == (None, None, None)
    assert call.duration is not None


def test_an_upload_is_sent_as_it_is_and_recorded() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert b"the recorded words" in request.content
        return httpx2.Response(200, json={"text": "words"})

    with client_that(handler) as client, smart_session("upload") as session:
        file = ("words.wav", b"the recorded words")
        client.audio.transcriptions.create(model="whisper-1", file=file)
    (call,) = session.calls
    assert (call.path, call.model) == ("/v1/audio/transcriptions", None)
    assert call.duration is not None


def test_a_request_that_names_no_model_is_recorded_without_one() -> None:
    with client_that(lambda request: httpx2.Response(200, json={})) as client:
        with smart_session("others") as session:
            client.get("/models", cast_to=object)
            client.post("/files", body={"purpose": "batch"}, cast_to=object)
            client.post("/files", body=["batch"], cast_to=object)
    assert [(call.path, call.model) for call in session.calls] == [
        ("/v1/models", None),
        ("/v1/files", None),
        ("/v1/files", None),
    ]


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


def test_the_server_is_asked_not_to_compress() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["accept-encoding"] == "identity"
        return httpx2.Response(200, json=completion())

    with client_that(handler) as client:
        chat(client)


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
    assert [call.model for call in session.calls] == ["gpt-4o-mini"] * 3
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
    sent = asyncio.Event()

    async def handler(request: httpx2.Request) -> httpx2.Response:
        sent.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with async_client_that(handler) as client:
        with smart_session("cancelled") as session:
            task = asyncio.create_task(chat(client))
            await sent.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert [call.error for call in session.calls] == ["CancelledError"]


def test_what_was_asked_and_answered_is_not_kept() -> None:
    with client_that(answering()) as client, smart_session("private") as session:
        chat(client)
    assert "Is it?" not in repr(session)
    assert "yes" not in repr(session)


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

    def reply(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers=EVENT_STREAM, stream=self)


def words(stream: Any) -> list[str]:
    return [event.choices[0].delta.content for event in stream if event.choices]


async def generators_end() -> None:
    """The SDK leaves four generators to the event loop after a stream: it ends one a turn."""
    for _turn in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_is_recorded_from_its_last_event_however_it_is_cut(size: int) -> None:
    whole = b"".join(STREAM).replace(b"\n", b"\r\n" if size == 7 else b"\n")
    body = Body([whole[start : start + size] for start in range(0, len(whole), size)])
    with client_that(body.reply, clock=ticking()) as client, smart_session("streamed") as session:
        assert words(chat(client, stream=True)) == ["Yes", " indeed"]
    (call,) = session.calls
    assert call.cost == Decimal("0.00045")
    assert (call.model, call.error, call.duration) == ("gpt-4o-mini", None, 1.0)
    assert body.closed


def test_a_stream_is_passed_on_piece_by_piece_as_it_comes_and_unchanged() -> None:
    body = Body(STREAM)
    with client_that(body.reply) as client, smart_session("streamed") as session:
        raw = client.chat.completions.with_streaming_response.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Is it?"}], stream=True
        )
        with raw as response:
            received = []
            for piece in response.iter_bytes():
                received.append(piece)
                assert body.sent == received
                assert session.calls[0].duration is None
    assert received == STREAM


@pytest.mark.asyncio
async def test_an_async_stream_is_recorded_from_its_last_event() -> None:
    body = Body(STREAM)
    async with async_client_that(body.reply) as client:
        with smart_session("streamed") as session:
            stream = await chat(client, stream=True)
            assert [len(event.choices) async for event in stream] == [1, 1, 0]
        await generators_end()
    assert session.calls[0].cost == Decimal("0.00045")
    assert session.calls[0].error is None
    assert body.closed


def test_a_stream_without_usage_leaves_the_tokens_unknown() -> None:
    body = Body([*STREAM[:2], STREAM[3]])
    with client_that(body.reply) as client, smart_session("streamed") as session:
        words(chat(client, stream=True))
    (call,) = session.calls
    assert (call.usage, call.cost, call.error) == (None, None, None)
    assert call.duration is not None


def test_a_stream_that_the_reader_leaves_is_closed_and_its_tokens_stay_unknown() -> None:
    body = Body(STREAM)
    with client_that(body.reply) as client, smart_session("left") as session:
        with chat(client, stream=True) as stream:
            next(stream)
    (call,) = session.calls
    assert (call.usage, call.error) == (None, None)
    assert call.duration is not None
    assert body.closed


@pytest.mark.asyncio
async def test_an_async_stream_that_the_reader_leaves_is_closed_at_once_and_no_error() -> None:
    body = Body(STREAM * 50)
    async with async_client_that(body.reply) as client:
        with smart_session("left") as session:
            raw = client.chat.completions.with_streaming_response.create(
                model="gpt-4o-mini", messages=[{"role": "user", "content": "Is it?"}], stream=True
            )
            async with raw as response, aclosing(response.http_response.aiter_bytes()) as pieces:
                await anext(pieces)
            assert body.reading_ended
    assert [call.error for call in session.calls] == [None]
    assert session.calls[0].duration is not None
    assert body.closed


def test_a_stream_that_breaks_is_recorded_with_its_error() -> None:
    body = Body(STREAM[:1], httpx2.ReadError("connection lost"))
    with client_that(body.reply) as client, smart_session("broken") as session:
        with pytest.raises(openai.APIConnectionError):
            words(chat(client, stream=True))
    assert [call.error for call in session.calls] == ["ReadError"]
    assert body.closed


@pytest.mark.asyncio
async def test_an_async_stream_that_breaks_is_recorded_with_its_error() -> None:
    body = Body(STREAM[:1], httpx2.ReadError("connection lost"))
    async with async_client_that(body.reply) as client:
        with smart_session("broken") as session:
            stream = await chat(client, stream=True)
            with pytest.raises(openai.APIConnectionError):
                [event async for event in stream]
    assert [call.error for call in session.calls] == ["ReadError"]
    assert body.closed


def test_a_body_that_fails_to_close_is_recorded_with_its_error() -> None:
    class Stubborn(Body):
        def close(self) -> None:
            raise httpx2.CloseError("still busy")

    body = Stubborn(STREAM)
    with client_that(body.reply) as client, smart_session("stubborn") as session:
        with pytest.raises(httpx2.CloseError):
            words(chat(client, stream=True))
    assert [call.error for call in session.calls] == ["CloseError"]


@pytest.mark.asyncio
async def test_an_async_body_that_fails_to_close_is_recorded_with_its_error() -> None:
    class Stubborn(Body):
        async def aclose(self) -> None:
            raise httpx2.CloseError("still busy")

    async with async_client_that(Stubborn(STREAM).reply) as client:
        with smart_session("stubborn") as session:
            stream = await chat(client, stream=True)
            with pytest.raises(httpx2.CloseError):
                await stream.close()
    assert [call.error for call in session.calls] == ["CloseError"]


def test_an_error_event_in_a_stream_is_recorded() -> None:
    body = Body([STREAM[0], *sse({"error": {"message": "overloaded", "type": "server_error"}})])
    with client_that(body.reply) as client, smart_session("overloaded") as session:
        with pytest.raises(openai.APIError, match="overloaded"):
            words(chat(client, stream=True))
    assert [call.error for call in session.calls] == ["error in the reply"]


def test_an_error_in_a_plain_reply_is_recorded() -> None:
    reply = {"error": {"message": "overloaded"}}
    with client_that(lambda request: httpx2.Response(200, json=reply)) as client:
        with smart_session("overloaded") as session:
            chat(client)
    assert [call.error for call in session.calls] == ["error in the reply"]


def test_a_stream_belongs_to_the_session_in_which_it_was_asked_for() -> None:
    body = Body(STREAM)
    with client_that(body.reply) as client:
        with smart_session("asked") as asked:
            stream = chat(client, stream=True)
        with smart_session("read") as read:
            words(stream)
    assert asked.calls[0].cost == Decimal("0.00045")
    assert read.calls == []


# --- Offline, and out ---


def test_without_a_transport_the_stand_in_answers_even_where_a_key_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://192.0.2.1/v1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")  # it asks no proxy either
    with recording_client() as client, smart_session("offline") as session:
        assert "stand-in" in ask("Is it?", client=client)
        assert "stand-in" in ask("Is it?")
    assert len(session.calls) == 2


@pytest.mark.asyncio
async def test_the_managers_alone_send_to_the_real_server_and_know_no_stand_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who copies the part above the demos must not be answered by a stand-in without knowing."""
    managers, _divider, _demos = inspect.getsource(chapter).partition("\n# --- Demos")
    assert "stand_in" not in managers
    module = types.ModuleType("managers_alone")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclass looks types up
    exec(compile(managers, "managers_alone", "exec"), vars(module))

    def answer(transport: object, request: httpx2.Request) -> httpx2.Response:
        assert request.url.host == "192.0.2.1"
        return cast(httpx2.Response, chapter.stand_in(request))

    async def answer_async(transport: object, request: httpx2.Request) -> httpx2.Response:
        return answer(transport, request)

    monkeypatch.setenv("OPENAI_BASE_URL", "http://192.0.2.1/v1")
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", answer)
    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", answer_async)
    with module.smart_session("real") as session:
        module.ask("Is it?")
        await module.ask_async("Is it?")
    assert len(session.calls) == 2


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_stand_in_streams_as_the_api_does(include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": include_usage}}
    with recording_client() as client, smart_session("offline") as session:
        assert "Is it?" in "".join(words(chat(client, stream=True, **options)))
    assert (session.calls[0].usage is not None) is include_usage


def test_closing_a_client_closes_its_transport() -> None:
    closed: list[str] = []

    class Transport(httpx2.MockTransport):
        def close(self) -> None:
            closed.append("close")

        async def aclose(self) -> None:
            closed.append("aclose")

    async def leave_async() -> None:
        async with async_recording_client(Transport(answering())):
            pass

    with recording_client(Transport(answering())):
        pass
    asyncio.run(leave_async())
    assert closed == ["close", "aclose"]


# --- Beside llamabot ---

THEIRS = (lambda name: chapter.recording(chapter.Session(name)), chapter.record)
OURS = (smart_session, ask)


@pytest.fixture
def theirs() -> Callable[..., Any]:
    """Plays a scene under their rule in a context apart: it does not restore the one it is in."""
    return lambda scene, *more: contextvars.copy_context().run(scene, *THEIRS, *more)


def test_none_without_a_token_loses_what_follows_a_nested_session(
    theirs: Callable[..., Any],
) -> None:
    assert theirs(chapter.after_a_nested_session) == 0
    assert chapter.after_a_nested_session(*OURS) == 1


def test_none_without_a_token_loses_what_follows_entering_it_again(
    theirs: Callable[..., Any],
) -> None:
    assert theirs(chapter.after_entering_it_again, chapter.recording) == 0
    assert chapter.after_entering_it_again(*OURS, chapter.Session.as_current) == 1


def test_a_recorder_that_does_not_know_its_end_records_a_task_that_outlives_it(
    theirs: Callable[..., Any],
) -> None:
    assert theirs(chapter.in_a_task_that_outlives_it) == 1
    with pytest.raises(SessionClosedError):
        chapter.in_a_task_that_outlives_it(*OURS)


def test_their_recorder_too_is_lost_in_threads_and_leaks_from_generators() -> None:
    def in_a_session() -> Iterator[Any]:
        with chapter.recording(chapter.Session("inside")) as session:
            yield session

    def scene() -> tuple[int, int]:
        with chapter.recording(chapter.Session("parent")) as parent:
            in_thread(chapter.record, "lost")
        with closing(in_a_session()) as generator:  # type: ignore[type-var]
            inside = next(generator)
            chapter.record("the caller's own")
        return len(parent.calls), len(inside.calls)

    assert contextvars.copy_context().run(scene) == (inherited(), 1)


def test_a_span_that_looks_for_no_parent_has_none() -> None:
    assert chapter.parent_of_a_nested_session(chapter.span) is None
    assert chapter.parent_of_a_nested_session(smart_session) == "outer"


def test_an_exit_that_writes_can_hide_the_error_of_the_body() -> None:
    unwritable = partial(chapter.span, database="no such folder/spans.db")
    with pytest.raises(sqlite3.OperationalError):
        chapter.error_when_leaving_goes_wrong(unwritable)
    with pytest.raises(ValueError, match="the block's own"):
        chapter.error_when_leaving_goes_wrong(smart_session)


def test_the_table_beside_llamabot_shows_these_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    contextvars.copy_context().run(chapter.demo_beside_llamabot)
    _paths, _rule, table = capsys.readouterr().out.partition("┏")
    rows = [line.split("│")[1:4] for line in table.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["after_a_nested_session", "✗ 0", "✓ 1"],
        ["after_entering_it_again", "✗ 0", "✓ 1"],
        ["in_a_task_that_outlives_it", "✗ 1", "✓ SessionClosedError"],
        ["parent_of_a_nested_session", "✗ None", "✓ outer"],
        ["error_when_leaving_goes_wrong", "✗ OperationalError", "✓ ValueError"],
    ]


# --- The script ---


class StandInServer(BaseHTTPRequestHandler):
    """The stand-in behind a real socket, to see the script go out with --live."""

    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        if "nowhere" in self.path:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_error(404)
            return
        content = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(json.loads(content))
        reply = chapter.stand_in(httpx2.Request("POST", "http://stand-in", content=content))
        self.send_response(200)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    StandInServer.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(chapter.__file__), *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "LANGUAGE": "en", "NO_COLOR": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )


def test_live_asks_the_model_and_the_server_of_the_environment(server: str) -> None:
    ended = run_script("--live", "1", "3", "5", OPENAI_BASE_URL=server, OPENAI_MODEL="local-model")
    assert ended.returncode == 0, ended.stderr
    assert len(StandInServer.asked) == 3 + 5 + 2
    assert {asked["model"] for asked in StandInServer.asked} == {"local-model"}
    assert "local-model: 6 → 9 tokens, ?" in ended.stdout  # no price is known for it


def test_live_ends_with_one_line_where_the_model_does_not_answer(server: str) -> None:
    ended = run_script("--live", "1", OPENAI_BASE_URL=f"{server}/nowhere", OPENAI_MODEL="refused")
    assert ended.returncode == 1
    assert re.fullmatch(r"04_smart_session\.py: refused did not answer: .+\n", ended.stderr)
    assert "└ left by NotFoundError" in ended.stdout


def test_without_live_nothing_goes_out_though_a_key_is_set(server: str) -> None:
    ended = run_script(OPENAI_BASE_URL=server, OPENAI_API_KEY="sk-real", OPENAI_MODEL="local")
    assert ended.returncode == 0, ended.stderr
    assert StandInServer.asked == []
    assert "local" not in ended.stdout.replace("localhost", "")


def test_the_tree_shows_nested_sessions_with_their_tokens_and_costs() -> None:
    ended = run_script("1")
    assert ended.stderr == ""
    _lesson, _rule, tree = ended.stdout.partition("\narticle  $0.00013085\n")
    assert re.sub(r", \d+\.\d ms", "", tree).splitlines()[:4] == [
        "├── gpt-4o-mini: 6 → 9 tokens, $0.0000063 ",
        "├── gpt-4o-mini: 7 → 10 tokens, $0.00000705 ",
        "└── title  $0.0001175",
        "    └── gpt-4o: 7 → 10 tokens, $0.0001175 ",
    ]


def test_the_tree_does_not_invent_a_duration(capsys: pytest.CaptureFixture[str]) -> None:
    session = chapter.Session("under way", calls=[chapter.Call("/v1/chat/completions", "gpt-4o")])
    chapter.console.print(chapter.drawn(session))
    assert "gpt-4o: ? tokens, ?, ? ms" in capsys.readouterr().out


def test_the_generators_demo_shows_the_leak_and_its_absence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chapter.demo_generators()
    leaking, isolated = re.findall(r"^[✗✓] .*", capsys.readouterr().out, re.MULTILINE)
    assert leaking == "✗ While `answers()` is suspended, its caller's session is inside."
    assert isolated == ("✓ While `isolated(answers())` is suspended, its caller's session is None.")


def test_the_path_beside_llamabot_asks_after_the_reset(capsys: pytest.CaptureFixture[str]) -> None:
    """`ask` runs after `set(None)` under their rule, and after `reset(token)` under ours."""
    contextvars.copy_context().run(chapter.demo_beside_llamabot)
    _code, _heading, path = capsys.readouterr().out.partition("order of execution")
    asked, set_none, reset = (
        [int(number) for number in re.findall(rf"{re.escape(line)} +(\d[\d ]*\d)", path)[0].split()]
        for line in ('ask("Is this recorded?")', "recorder.set(None)", "_current.reset(token)")
    )
    assert set_none[0] < asked[0] < set_none[1]
    assert reset[0] < asked[1] < reset[1]


def test_the_thread_demo_says_which_call_was_not_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chapter.demo_tasks_and_threads()
    in_executor = "✓ Calls recorded: 1 of 1." if inherited() else "✗ Calls recorded: 0 of 1."
    assert re.findall(r"^[✗✓] .*", capsys.readouterr().out, re.MULTILINE) == [
        "✓ Calls recorded: 3 of 3.",
        in_executor,
        "✓ Calls recorded: 1 of 1.",
    ]
