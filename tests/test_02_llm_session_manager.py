"""Chapter 02: each claim of its lessons, and the cleanup contract for the session."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter, open_descriptors
from contract import SYNC_WAYS, Subject, Way

chapter: Any = load_chapter(2)
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
KEY = "sk-fake-Zq7x0WcM2vT9"
JARGON = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon"
        " into plain English.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "New synergies will help drive top-line growth.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities"
        " for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client"
        " deliverable.",
    },
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK sleeps between its attempts; nobody has to wait for that here."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@contextmanager
def session(
    *script: httpx2.Response | BaseException | None, name: str = "talk", **options: Any
) -> Iterator[Any]:
    with (
        chapter.offline_client(*script) as client,
        chapter.llm_session(name, client=client, **options) as opened,
    ):
        yield opened


def refusal(status: int) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": f"status {status}"}})


def completion(content: str | None, usage: object, finish: str | None = "stop") -> httpx2.Response:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return httpx2.Response(200, json={"choices": [choice], "usage": usage})


def streamed(*events: object) -> httpx2.Response:
    """A stream of these chunks; an error among them is raised in its place."""

    def lines() -> Iterator[bytes]:
        for event in events:
            if isinstance(event, BaseException):
                raise event
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()

    return httpx2.Response(200, content=lines())


def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def ask(talk: Any, prompt: str) -> str:
    return str(talk.ask(prompt))


def read_stream(talk: Any, prompt: str) -> str:
    return "".join(talk.stream(prompt))


both_ways = pytest.mark.parametrize("speak", [ask, read_stream])


# --- Tokens ---


def test_the_encodings_give_the_published_tokens() -> None:
    assert chapter.encoding_for("gpt-4").encode("hello world") == [15339, 1917]
    assert chapter.encoding_for("gpt-4o").encode("hello world") == [24912, 2375]
    great = chapter.encoding_for("gpt-4o-mini").encode("tiktoken is great!")
    assert great == [83, 8251, 2488, 382, 2212, 0]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("gpt-4o", 124), ("gpt-4o-mini", 124), ("gpt-4", 129), ("gpt-3.5-turbo", 129)],
)
def test_the_chat_rule_counts_what_the_api_confirmed(model: str, tokens: int) -> None:
    assert chapter.count_tokens(JARGON, model) == tokens


def test_text_that_looks_like_a_special_token_is_text() -> None:
    plain = chapter.count_tokens([{"role": "user", "content": "<|endoftext|>"}], "gpt-4o")
    assert plain == 3 + 3 + 1 + len(chapter.encoding_for("gpt-4o").encode_ordinary("<|endoftext|>"))
    with session() as talk:
        talk.ask("<|endoftext|> <|im_start|>")


def test_a_model_that_is_no_openai_one_is_counted_with_o200k_base() -> None:
    assert chapter.encoding_for("llama3.2").name == "o200k_base"
    assert chapter.encoding_for("gpt-oss-120b").name == "o200k_base"


LOADING = """
import os, runpy, socket, sys, tempfile
def no_network(*args, **kwargs):
    raise AssertionError("the network was used")
chapter = runpy.run_path(sys.argv[1])
socket.socket.connect = socket.getaddrinfo = no_network
for model in ("gpt-4o", "gpt-4"):
    chapter["encoding_for"](model)
print(os.environ.get("TIKTOKEN_CACHE_DIR"), os.listdir(tempfile.gettempdir()))
"""


def test_tokenizers_load_without_network_and_leave_no_trace(tmp_path: Path) -> None:
    temporary, users = tmp_path / "temporary", tmp_path / "users"
    temporary.mkdir()
    users.mkdir()
    damaged = users / chapter.RANK_FILES["o200k_base"]
    damaged.write_bytes(b"damaged")  # tiktoken would delete it, since its checksum is wrong
    environment = {**os.environ, "TMPDIR": str(temporary), "TIKTOKEN_CACHE_DIR": str(users)}
    command = [sys.executable, "-c", LOADING, str(chapter_path(2))]
    loaded = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert loaded.stdout.split() == [str(users), "[]"]
    assert damaged.read_bytes() == b"damaged"


def test_tokenizers_load_one_at_a_time_since_the_environment_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = threading.Barrier(2)
    met = []

    def load(name: str) -> None:
        with suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(timeout=0.1))

    monkeypatch.setattr(chapter.tiktoken, "get_encoding", load)
    loaders = [
        threading.Thread(target=chapter.encoding_for.__wrapped__, args=(model,))
        for model in ("gpt-4o", "gpt-4")
    ]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
    assert not met
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("before", [None, "before"])
def test_a_temporary_variable_is_as_before_also_after_an_error(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("WORKSHOP", raising=False)
    else:
        monkeypatch.setenv("WORKSHOP", before)
    with pytest.raises(KeyboardInterrupt), chapter.temporary_environment("WORKSHOP", "inside"):
        assert os.environ["WORKSHOP"] == "inside"
        raise KeyboardInterrupt
    assert os.environ.get("WORKSHOP") == before


def test_the_count_before_a_call_is_the_input_that_the_api_reports() -> None:
    with session() as talk:
        for prompt in ("Hello", "你好，世界", "<|endoftext|> again"):
            before = talk.usage.input_tokens
            question = {"role": "user", "content": prompt}
            counted = chapter.count_tokens([*talk.messages, question], talk.model)
            assert counted == talk._begin(question).input_tokens
            talk.ask(prompt)
            assert talk.usage.input_tokens - before == counted


def test_counting_a_thousand_turns_encodes_each_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    real = chapter.encoding_for("gpt-4o-mini")

    class Counting:
        def encode_ordinary(self, text: str) -> list[int]:
            nonlocal encoded
            encoded += len(text)
            return list(real.encode_ordinary(text))

    monkeypatch.setattr(chapter, "encoding_for", lambda model: Counting())
    # The real client needs seconds for a thousand long requests; this one does not look at them.
    answer = SimpleNamespace(
        usage=SimpleNamespace(prompt_tokens=1, prompt_tokens_details=None, completion_tokens=1),
        choices=[
            SimpleNamespace(message=SimpleNamespace(content="y" * 20), finish_reason="stop"),
        ],
    )
    client: Any = MagicMock(api_key=KEY)
    client.chat.completions.with_raw_response.create.return_value = SimpleNamespace(
        retries_taken=0, http_response=io.BytesIO(), parse=lambda: answer
    )
    with chapter.llm_session("long", client=client, max_input_tokens=10**9) as talk:
        per_turn = []
        for _turn in range(1000):
            before = encoded
            talk.ask("x" * 30)
            per_turn.append(encoded - before)
    assert set(per_turn) == {len("user" + "x" * 30) + len("assistant" + "y" * 20)}


# --- Cost ---


@pytest.mark.parametrize(
    ("model", "fresh", "cached", "output", "dollars"),
    [
        ("gpt-4o-mini", 1000, 0, 500, "0.00045"),
        ("gpt-4o-mini", 1234, 1000, 567, "0.0004503"),
        ("gpt-4o", 1000, 0, 100, "0.0035"),
        ("gpt-5-mini", 1234, 1000, 567, "0.0012175"),
    ],
)
def test_prices_are_exact(model: str, fresh: int, cached: int, output: int, dollars: str) -> None:
    usage = chapter.Usage(1, fresh, cached, output)
    day = datetime(2026, 11, 20, tzinfo=UTC)
    assert chapter.list_price(usage, model, at=day) == Decimal(dollars)


def test_a_session_costs_the_sum_of_its_turns() -> None:
    with session() as talk:
        bills = []
        for prompt in ("one", "two", "three"):
            before = talk.usage, talk.cost
            talk.ask(prompt)
            spent = chapter.Usage(
                1,
                talk.usage.input_tokens - before[0].input_tokens,
                0,
                talk.usage.output_tokens - before[0].output_tokens,
            )
            bills.append(chapter.list_price(spent, talk.model))
            assert talk.cost - before[1] == bills[-1] > 0
        assert talk.cost == sum(bills)


def test_cached_input_is_counted_and_has_its_own_price() -> None:
    with session() as talk:
        talk.ask("word " * 1500)
        assert talk.usage.cached_input_tokens == 0
        talk.ask("and again")
        assert talk.usage.cached_input_tokens == 1408  # 1,504 in whole steps of 128
        full = chapter.Usage(2, talk.usage.input_tokens, 0, talk.usage.output_tokens)
        assert talk.cost == chapter.list_price(talk.usage, talk.model)
        assert talk.cost < chapter.list_price(full, talk.model)


def test_an_unknown_model_is_an_error_before_anything_is_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(LookupError, match=r"price of 'llama3\.2' is unknown: pass price="),
        session(model="llama3.2", journal=tmp_path / "journal"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_an_unknown_model_may_have_a_price_of_yours() -> None:
    def price(usage: Any) -> Decimal:
        return Decimal(2 * usage.input_tokens + usage.output_tokens)

    with session(model="llama3.2", price=price) as talk:
        talk.ask("Hello")
        assert talk.cost == 2 * talk.usage.input_tokens + talk.usage.output_tokens > 0


# --- The life cycle ---


def test_a_session_is_open_in_its_block_and_closed_after_it() -> None:
    with session() as talk:
        assert talk.state is chapter.SessionState.OPEN
    assert talk.state is chapter.SessionState.CLOSED
    with pytest.raises(chapter.SessionClosedError, match="'talk' is closed: open it again"):
        talk.ask("Hello?")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_session_whose_block_was_left_by_an_error_has_failed(error: type[BaseException]) -> None:
    with pytest.raises(error), session() as talk:
        raise error
    assert talk.state is chapter.SessionState.FAILED
    with pytest.raises(chapter.SessionClosedError, match="'talk' is failed: open it again"):
        next(talk.stream("Hello?"))


def test_a_turn_that_failed_leaves_the_session_open() -> None:
    with session(refusal(400)) as talk:
        with pytest.raises(openai.BadRequestError):
            talk.ask("Hello")
        assert talk.state is chapter.SessionState.OPEN
        assert talk.ask("Hello").startswith("Stand-in reply")


def test_what_a_session_shows_cannot_be_used_to_change_the_conversation() -> None:
    with session() as talk:
        talk.ask("Hello")
        talk.messages.clear()
        talk.messages[0]["content"] = "changed"
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
        assert talk.messages[0]["content"] == "Hello"


def test_a_client_that_was_passed_in_stays_open() -> None:
    with chapter.offline_client() as client:
        with chapter.llm_session("talk", client=client) as talk:
            talk.ask("Hello")
        assert not client.is_closed()
        with pytest.raises(ValueError), chapter.llm_session("talk", client=client):  # noqa: PT011
            raise ValueError
        assert not client.is_closed()


def test_the_sdks_own_with_closes_even_an_http_client_that_was_passed_in() -> None:
    http = httpx2.Client()
    with openai.OpenAI(api_key=KEY, http_client=http):
        pass
    assert http.is_closed


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_client_that_the_session_made_is_closed(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with suppress(ValueError, KeyboardInterrupt), chapter.llm_session("talk") as talk:
        assert not talk.client.is_closed()
        if error is not None:
            raise error
    assert talk.client.is_closed()


# --- A turn is a transaction ---

NULLS = {"id": None, "choices": None, "usage": None}
FAILURES: dict[str, tuple[Callable[[], Any], type[BaseException], int]] = {
    "429": (lambda: refusal(429), openai.RateLimitError, 3),
    "500": (lambda: refusal(500), openai.InternalServerError, 3),
    "400": (lambda: refusal(400), openai.BadRequestError, 1),
    "401": (lambda: refusal(401), openai.AuthenticationError, 1),
    "timeout": (lambda: httpx2.ReadTimeout("slow"), openai.APITimeoutError, 3),
    "no connection": (lambda: httpx2.ConnectError("gone"), openai.APIConnectionError, 3),
    "malformed JSON": (
        lambda: httpx2.Response(
            200, content=b'{"choices": [', headers={"content-type": "application/json"}
        ),
        openai.APIResponseValidationError,
        1,
    ),
    "HTML with status 200": (
        lambda: httpx2.Response(200, html="<h1>Welcome</h1>"),
        openai.APIResponseValidationError,
        1,
    ),
    "a schema of nulls": (
        lambda: httpx2.Response(200, json=NULLS),
        openai.APIResponseValidationError,
        1,
    ),
    "a list": (lambda: httpx2.Response(200, json=[1]), openai.APIResponseValidationError, 1),
    "a choice of null": (
        lambda: httpx2.Response(200, json={"choices": [None]}),
        openai.APIResponseValidationError,
        1,
    ),
    "no choices": (
        lambda: httpx2.Response(200, json={"choices": []}),
        openai.APIResponseValidationError,
        1,
    ),
    "Ctrl-C": (KeyboardInterrupt, KeyboardInterrupt, 1),
    "a bug": (lambda: ZeroDivisionError("bug"), ZeroDivisionError, 1),
}


@both_ways
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_turn_leaves_the_conversation_and_counts_its_requests(
    failure: str, speak: Callable[[Any, str], str], tmp_path: Path
) -> None:
    make, expected, requests = FAILURES[failure]
    script = [None] + [make() for _attempt in range(requests)]
    with session(*script, journal=tmp_path / "journal") as talk:
        speak(talk, "first")
        before, usage, cost = talk.messages, talk.usage, talk.cost
        with pytest.raises(expected) as caught:
            speak(talk, "second")
        assert talk.messages == before
        assert talk.usage == usage + chapter.Usage(requests=requests)
        assert talk.cost == cost
        (note,) = caught.value.__notes__
        assert f"'talk', turn 2: rolled back after {requests} request(s)" in note
        assert speak(talk, "second") in talk.messages[-1]["content"]
        after = talk.messages, talk.usage, talk.cost
    with session(journal=tmp_path / "journal") as talk:
        assert (talk.messages, talk.usage, talk.cost) == after


def test_requests_that_the_client_retried_are_counted() -> None:
    with session(refusal(429), refusal(500), None) as talk:
        talk.ask("Hello")
        assert talk.usage.requests == 3
        assert len(talk.messages) == 2


def test_of_a_call_that_ctrl_c_cut_short_one_request_is_counted() -> None:
    with session(refusal(500), KeyboardInterrupt()) as talk:
        with pytest.raises(KeyboardInterrupt):
            talk.ask("Hello")
        assert (talk.messages, talk.usage) == ([], chapter.Usage(requests=1))


@pytest.mark.parametrize(("status", "advice"), [(429, "Ask again"), (401, "Correct model, key")])
def test_the_note_says_what_to_do(status: int, advice: str) -> None:
    with (
        session(*(refusal(status) for _attempt in range(3))) as talk,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        talk.ask("Hello")
    assert advice in caught.value.__notes__[0]


def test_what_a_rejected_answer_was_billed_is_counted() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    with session(completion(None, usage, "content_filter"), completion("cut", usage, None)) as talk:
        for turn in (1, 2):
            with pytest.raises(openai.APIResponseValidationError, match="no text, or no end"):
                talk.ask("Hello")
            assert talk.usage == chapter.Usage(turn, 100 * turn, 0, 7 * turn)
        assert talk.cost == chapter.list_price(talk.usage, talk.model) > 0
        assert talk.messages == []


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 5, "completion_tokens": -1},
        {"prompt_tokens": None, "completion_tokens": None},
        {
            "prompt_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 6},
            "completion_tokens": 1,
        },
        "many",
    ],
)
def test_an_impossible_usage_is_not_believed(usage: object) -> None:
    with session(completion("Hi", usage)) as talk:
        with pytest.raises(openai.APIResponseValidationError):
            talk.ask("Hello")
        assert (talk.messages, talk.usage) == ([], chapter.Usage(1))


@both_ways
def test_a_server_that_reports_no_usage_is_billed_by_count(speak: Callable[..., str]) -> None:
    silent = (
        completion("hello world", None)
        if speak is ask
        else streamed(piece("hello world"), piece(None, "stop"), "[DONE]")
    )
    with session(silent) as talk:
        assert speak(talk, "Hello") == "hello world"
        tokens = chapter.count_tokens([{"role": "user", "content": "Hello"}], talk.model)
        assert talk.usage == chapter.Usage(1, tokens, 0, 2)


def test_usage_without_details_is_read() -> None:
    with session(completion("Hi", {"prompt_tokens": 9, "completion_tokens": 1})) as talk:
        talk.ask("Hello")
        assert talk.usage == chapter.Usage(1, 9, 0, 1)


def test_an_empty_reply_is_a_reply() -> None:
    with session(completion("", {"prompt_tokens": 9, "completion_tokens": 0})) as talk:
        assert talk.ask("Hello") == ""
        assert talk.messages[-1] == {"role": "assistant", "content": ""}


# --- Streams ---


def test_a_stream_gives_the_reply_in_pieces_and_is_a_turn() -> None:
    with session() as talk:
        pieces = list(talk.stream("Hello"))
        assert len(pieces) > 2
        assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
        assert talk.usage.requests == 1
    with session() as asked:
        asked.ask("Hello")
    assert (talk.messages, talk.usage, talk.cost) == (asked.messages, asked.usage, asked.cost)


def test_a_stream_is_billed_by_the_usage_that_the_api_reports() -> None:
    with session() as talk:
        read_stream(talk, "word " * 1500)
        read_stream(talk, "and again")
        assert talk.usage.cached_input_tokens == 1408  # which no count of ours could know


def interrupted(talk: Any, how: str) -> str:
    """Read two pieces of a stream, then stop in one of several ways."""
    stream = talk.stream("Hello")
    read = str(next(stream) + next(stream))
    if how == "close":
        stream.close()
    elif how == "break":
        del stream
    elif how == "error in the loop":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    else:
        with pytest.raises(openai.APIConnectionError):
            next(stream)
    return read


@pytest.mark.parametrize("how", ["close", "break", "error in the loop", "connection lost"])
def test_an_interrupted_stream_is_rolled_back_and_billed_by_count(how: str, tmp_path: Path) -> None:
    script = (None, streamed(piece(""), piece("hello"), piece(" world"), httpx2.ReadError("lost")))
    with session(*script, journal=tmp_path / "journal") as talk:
        talk.ask("first")
        messages, usage, cost = talk.messages, talk.usage, talk.cost
        assert interrupted(talk, how) == "hello world"
        assert talk.messages == messages
        question = {"role": "user", "content": "Hello"}
        tokens = chapter.count_tokens([*messages, question], talk.model)
        extra = chapter.Usage(1, tokens, 0, 2)
        assert talk.usage == usage + extra
        assert talk.cost == cost + chapter.list_price(extra, talk.model)
        after = talk.usage, talk.cost
    with session(journal=tmp_path / "journal") as talk:
        assert (talk.messages, talk.usage, talk.cost) == (messages, *after)
        talk.ask("second")


def test_an_error_of_the_reader_is_not_taken_for_one_of_the_server() -> None:
    with session() as talk:
        stream = talk.stream("Hello")
        next(stream)
        with pytest.raises(ValueError, match="mine"):
            stream.throw(ValueError("mine"))
        assert talk.messages == []


def test_an_interrupted_stream_is_reported_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "workshop.session"), session() as talk:
        stream = talk.stream("Hello")
        assert next(stream) == "Stand-in "
        stream.close()
    tokens = len(chapter.encoding_for("gpt-4o-mini").encode("Stand-in "))
    expected = f"'talk', turn 1: rolled back after 1 request(s) and {tokens} output token(s)"
    assert expected in caplog.text


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_the_session_ends_an_open_stream(error: type[BaseException] | None) -> None:
    closed = []

    class Body(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for _number in range(100):
                yield b"data: " + json.dumps(piece("word ")).encode() + b"\n\n"

        def close(self) -> None:
            closed.append(True)

    with suppress(ValueError, KeyboardInterrupt), session(httpx2.Response(200, stream=Body())) as t:
        stream = t.stream("Hello")
        assert next(stream) == "word "
        if error is not None:
            raise error
    assert closed
    assert t.usage.output_tokens == len(chapter.encoding_for(t.model).encode("word "))
    with pytest.raises(chapter.SessionClosedError):
        next(stream)
    assert t.messages == []


def test_a_stream_that_was_not_begun_has_no_effect() -> None:
    with session() as talk:
        stream = talk.stream("Hello")
        assert talk.ask("Hi") is not None
    with pytest.raises(chapter.SessionClosedError):
        next(stream)
    assert talk.usage.requests == 1


def test_a_second_turn_during_a_stream_is_refused() -> None:
    with session() as talk:
        stream = talk.stream("Hello")
        next(stream)
        for speak in (ask, read_stream):
            with pytest.raises(RuntimeError, match="'talk' is in a turn: finish or close"):
                speak(talk, "and this?")
        rest = "".join(stream)
        assert talk.messages[-1]["content"].endswith(rest)
        assert talk.usage.requests == 1
        talk.ask("now")


@pytest.mark.parametrize(
    "events",
    [
        (piece("half"),),
        (piece("half"), "[DONE]"),
        (piece("half"), '{"choices": ['),
        (piece("half"), NULLS),
        (piece("half"), {"error": {"message": "overloaded"}}),
    ],
)
def test_a_stream_that_ends_too_early_or_badly_is_rolled_back_and_billed(
    events: tuple[object, ...],
) -> None:
    with session(streamed(*events)) as talk:
        with pytest.raises(openai.APIError):
            read_stream(talk, "Hello")
        assert talk.messages == []
        assert (talk.usage.requests, talk.usage.output_tokens) == (1, 1)


# --- The window ---


@both_ways
def test_a_prompt_that_is_too_long_is_refused_before_anything_is_sent(
    speak: Callable[[Any, str], str],
) -> None:
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return refusal(400)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with (
        openai.OpenAI(api_key=KEY, http_client=http) as client,
        chapter.llm_session("talk", client=client, max_input_tokens=50) as talk,
    ):
        with pytest.raises(chapter.ContextWindowError, match=r"'talk' would send \d+ tokens.* 50:"):
            speak(talk, "word " * 60)
        assert not sent
        assert (talk.messages, talk.usage) == ([], chapter.Usage())
        assert talk.state is chapter.SessionState.OPEN


def test_the_window_is_exact() -> None:
    question = {"role": "user", "content": "Hello"}
    tokens = chapter.count_tokens([question], "gpt-4o-mini")
    with session(max_input_tokens=tokens - 1) as talk:
        with pytest.raises(chapter.ContextWindowError):
            talk.ask("Hello")
    with session(max_input_tokens=tokens) as talk:
        talk.ask("Hello")


# --- The journal ---


def test_the_same_name_and_journal_resume_the_conversation(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with session(None, refusal(400), journal=journal) as talk:
        talk.ask("first")
        with suppress(openai.BadRequestError):
            talk.ask("bad")
        talk.ask("second")
        before = talk.messages, talk.usage, talk.cost, talk._tokens
    with session(journal=str(journal)) as talk:
        assert (talk.messages, talk.usage, talk.cost, talk._tokens) == before
        talk.ask("third")
        assert len(talk.messages) == 6
    with session(name="another", journal=journal) as talk:
        assert (talk.messages, talk.usage, talk.cost) == ([], chapter.Usage(), 0)


def test_a_session_may_be_used_in_another_thread(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        worker = threading.Thread(target=talk.ask, args=("Hello",))
        worker.start()
        worker.join()
        assert len(talk.messages) == 2


def test_a_cost_of_many_digits_is_kept_exactly(tmp_path: Path) -> None:
    exact = Decimal("0.1234567890123456789012345678")
    for turns in (1, 2):
        with session(journal=tmp_path / "j", price=lambda usage: exact) as talk:
            talk.ask("Hello")
            assert talk.cost == exact * turns


def test_a_turn_is_in_the_journal_when_ask_returns(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        for turn in (1, 2, 3):
            reply = talk.ask("Hello")
            with closing(sqlite3.connect(tmp_path / "journal")) as other:
                rows = other.execute("SELECT number, reply FROM turns").fetchall()
            assert len(rows) == turn
            assert rows[-1] == (turn, reply)


def test_a_journal_is_durable_by_its_settings(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        (mode,) = talk.journal.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = talk.journal.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("wal", 2)  # 2 is FULL


def foreign_files(folder: Path) -> Iterator[Path]:
    text = folder / "notes.txt"
    text.write_text("Not a database. " * 100)
    yield text
    short = folder / "short"
    short.write_bytes(b"x")
    yield short
    truncated_header = folder / "truncated"
    truncated_header.write_bytes(b"SQLite format 3\0")
    yield truncated_header
    database = folder / "bank.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE account (money)")
    yield database
    newer = folder / "newer"
    with chapter.open_journal(newer) as journal:
        journal.execute("PRAGMA user_version = 2")
    yield newer


def test_a_foreign_file_is_refused_and_left_untouched(tmp_path: Path) -> None:
    for file in foreign_files(tmp_path):
        before, listed = file.read_bytes(), os.listdir(tmp_path)
        reason = "is no journal of sessions: choose another|cannot be used: file is not a database"
        with pytest.raises(chapter.JournalError, match=reason):
            session(journal=file).__enter__()
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) == listed


@pytest.mark.parametrize("damage", ["cut", "overwritten", "tail overwritten"])
def test_a_damaged_journal_is_refused_and_left_untouched(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "journal"
    with session(journal=file) as talk:
        for _turn in range(30):
            talk.ask("Hello " * 100)
    content = file.read_bytes()
    noise = random.Random(2).randbytes(3000)
    before = {
        "cut": content[:-5000],
        "overwritten": content[:100] + noise + content[100 + len(noise) :],
        "tail overwritten": content[:9000] + noise + content[9000 + len(noise) :],
    }[damage]
    assert before != content
    file.write_bytes(before)
    with pytest.raises(chapter.JournalError, match=r"journal cannot be used: .+"):
        session(journal=file).__enter__()
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["journal"]


def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()  # what a kill leaves behind just after the file was created
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("Hello")
    with session(journal=tmp_path / "journal") as talk:
        assert len(talk.messages) == 2


def test_of_two_blocks_on_one_conversation_none_overwrites_the_other(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with session(journal=journal) as one, session(journal=journal) as other:
        reply = one.ask("from one")
        with pytest.raises(chapter.JournalError, match="from another block") as caught:
            other.ask("from the other")
        assert caught.value.__notes__[0].endswith("Open the session again.")
        assert other.messages == []
        assert other.usage.requests == 1
        bill = one.cost + other.cost
        one.ask("and on")
        bill = one.cost + other.cost
    with session(journal=journal) as talk:
        assert [message["content"] for message in talk.messages[:2]] == ["from one", reply]
        assert len(talk.messages) == 4
        assert talk.cost == bill  # the reply that found no place was paid for all the same


COUNT_TURNS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(*connection.execute("SELECT count(*) FROM turns").fetchone())
connection.close()
"""


def test_a_second_session_on_the_journal_leaves_the_first_its_locks(tmp_path: Path) -> None:
    """Without them, a process that closes the file last deletes a log that is still written to."""
    journal = tmp_path / "journal"

    def turns_seen_by_another_process() -> int:
        command = [sys.executable, "-c", COUNT_TURNS, str(journal)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    with session(name="first", journal=journal) as talk, session(name="second", journal=journal):
        for turn in (1, 2, 3):
            talk.ask("Hello")
            assert turns_seen_by_another_process() == turn


def test_a_journal_is_known_as_one_while_another_process_adds_to_it(tmp_path: Path) -> None:
    """SQLite writes the first page first, and it tells of pages that are not there yet."""
    file = tmp_path / "journal"
    with session(journal=file) as talk:
        for _turn in range(3):
            talk.ask("Hello " * 1000)
    os.truncate(file, 8192)
    assert chapter.is_journal(file)


def test_opening_a_new_journal_waits_for_another_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "new", isolation_level=None)) as reader,
        closing(sqlite3.connect(tmp_path / "new", timeout=0)) as journal,
    ):
        reader.executescript("CREATE TABLE t (x); BEGIN; SELECT * FROM t")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            chapter.write_ahead(journal, patience=0)
        monkeypatch.setattr(time, "sleep", lambda seconds: reader.rollback())
        chapter.write_ahead(journal)
        assert journal.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_journal_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "journal"
    with pytest.raises(chapter.JournalError, match=r"missing.journal cannot be used: unable to"):
        session(journal=missing).__enter__()


def test_a_turn_cannot_begin_after_its_block(tmp_path: Path) -> None:
    class TakenLate:
        """A lock for which a thread waited so long that the session was closed meanwhile."""

        def locked(self) -> bool:
            return False

        def __enter__(self) -> None:
            talk.state = chapter.SessionState.CLOSED

        def __exit__(self, *error: object) -> None:
            pass

    with session() as talk:
        talk._one_turn = TakenLate()
        with pytest.raises(chapter.SessionClosedError):
            talk.ask("Hello?")
        assert talk.usage == chapter.Usage()


def test_a_turn_that_cannot_be_written_down_has_not_happened(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("first")
        talk.journal.execute("PRAGMA query_only = ON")  # as if the disk were full
        before = talk.messages
        with pytest.raises(sqlite3.OperationalError) as caught:
            talk.ask("second")
        assert "Its cost is missing in the journal" in caught.value.__notes__[0]
        assert talk.messages == before
        assert talk.usage.requests == 2
        talk.journal.execute("PRAGMA query_only = OFF")
        talk.ask("second")
        after = talk.messages
    with session(journal=tmp_path / "journal") as talk:
        assert talk.messages == after


class InterruptedAfter:
    """A journal at which Ctrl-C strikes while a row is being written to the disk."""

    def __init__(self, journal: sqlite3.Connection) -> None:
        self.journal = journal

    @property
    def total_changes(self) -> int:
        return self.journal.total_changes

    def execute(self, *arguments: Any) -> None:
        self.journal.execute(*arguments)
        raise KeyboardInterrupt


def test_ctrl_c_while_the_turn_is_written_leaves_it_written_once(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("first")
        talk.journal = InterruptedAfter(real := talk.journal)
        with pytest.raises(KeyboardInterrupt) as caught:
            talk.ask("second")
        assert caught.value.__notes__ == ["Session 'talk', turn 2: complete and kept."]
        assert [said["content"] for said in talk.messages[::2]] == ["first", "second"]
        talk.journal = real
        talk.ask("third")
        after = talk.messages, talk.usage, talk.cost, talk._tokens
    with session(journal=tmp_path / "journal") as talk:
        assert (talk.messages, talk.usage, talk.cost, talk._tokens) == after
        assert talk.usage.requests == 3


# --- Processes: each child below is a fork of one that has the chapter loaded already ---

FORKS = """
import json, os, random, runpy, select, signal, sys
os.environ.pop("OPENAI_API_KEY", None)
chapter = runpy.run_path(sys.argv[1])
chapter["encoding_for"]("gpt-4o-mini")
folder, trials = sys.argv[2], int(sys.argv[3])

def fork(work):
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        return pid, readable
    try:
        work(writable)
    except BaseException as error:
        os.write(writable, f"{error!r}".encode())
    finally:
        os._exit(0)

def opened(path):
    return chapter["llm_session"]("talk", client=chapter["offline_client"](), journal=path)
"""
KILLED = (
    FORKS
    + """
def talk_on(path, acknowledged):
    with opened(path) as talk:
        while True:
            reply = talk.ask(f"question {len(talk.messages) // 2}")
            os.write(acknowledged, b".")

for trial in range(trials):
    path = os.path.join(folder, f"journal {trial % 10}")  # some are new, some are resumed
    rng = random.Random(trial)
    child, readable = fork(lambda acknowledged: talk_on(path, acknowledged))
    said = b"".join(os.read(readable, 1) for _turn in range(rng.randrange(4)))
    select.select([], [], [], rng.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said += os.read(readable, 65536)
    os.close(readable)
    with opened(path) as talk:
        print(json.dumps([path, said.decode(), talk.messages, talk.usage.requests]))
"""
)
SHARED = (
    FORKS
    + """
def talk_together(path, acknowledged, who):
    said = 0
    while said < 10:
        with opened(path) as talk:
            try:
                while said < 10:
                    talk.ask(f"{who} {said}")
                    os.write(acknowledged, f"{who} {said}\\n".encode())
                    said += 1
            except chapter["JournalError"]:
                os.write(acknowledged, b"stale\\n")

path = os.path.join(folder, "journal")
children = [fork(lambda w, who=who: talk_together(path, w, who)) for who in range(trials)]
for pid, readable in children:
    with open(readable) as lines:
        print(lines.read())
    os.waitpid(pid, 0)
with opened(path) as talk:
    print(json.dumps([talk.messages, talk.usage.requests]))
"""
)
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def run(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, str(chapter_path(2)), *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()


@forking
def test_killed_at_fifty_moments_it_loses_no_acknowledged_turn(tmp_path: Path) -> None:
    turns: Counter[str] = Counter()
    for line in run(KILLED, str(tmp_path), "50"):
        path, said, messages, requests = json.loads(line)
        assert set(said) <= {"."}, said
        turns[path] += len(said)
        found, half = divmod(len(messages), 2)
        assert not half
        assert found >= turns[path], "an acknowledged turn is lost"
        assert found <= turns[path] + 1, "more turns than were ever asked"
        assert requests == found
        for number, message in enumerate(messages[::2]):
            assert message == {"role": "user", "content": f"question {number}"}
            assert f"question {number}" in messages[2 * number + 1]["content"]
        turns[path] = found
    assert sum(turns.values()) > 50


@forking
def test_processes_that_share_a_conversation_overwrite_nothing(tmp_path: Path) -> None:
    *lines, last = run(SHARED, str(tmp_path), "3")
    said = Counter(line for line in lines if line)
    stale = said.pop("stale", 0)
    messages, requests = json.loads(last)
    assert Counter(message["content"] for message in messages[::2]) == said
    assert len(said) == 30
    assert requests == 30 + stale


# --- The API key ---


@contextmanager
def loopback(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """A real HTTP server on this machine that speaks Chat Completions; and what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, self.headers["authorization"], asked))
            body = json.dumps(answer(asked)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


def hello(asked: Mapping[str, Any]) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def test_the_key_is_in_no_repr_log_line_error_or_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = []
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with loopback(hello) as (url, seen):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with chapter.llm_session("talk", journal=tmp_path / "journal") as talk:
            talk.ask("Hello")
            shown += [repr(talk), str(talk), repr(talk._begin({"role": "user", "content": "x"}))]
        with pytest.raises(chapter.SessionClosedError) as caught:
            talk.ask("Hello")
        shown += traceback.format_exception(caught.value)
    assert seen[0][1] == f"Bearer {KEY}", "the test would prove nothing"
    for make, error, _requests in FAILURES.values():
        http = httpx2.Client(
            transport=httpx2.MockTransport(lambda request, make=make: broken(make()))
        )
        client = openai.OpenAI(api_key=KEY, http_client=http)
        with client, chapter.llm_session("x", client=client, journal=tmp_path / "journal") as talk:
            with pytest.raises((error, openai.APIError)) as failed:
                talk.ask("Hello")
            shown += [repr(failed.value), *failed.value.__notes__]
            shown += traceback.format_exception(failed.value)
    shown += [caplog.text, *(repr(record.__dict__) for record in caplog.records)]
    shown += [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
    assert "rolled back" in caplog.text
    assert not [text for text in shown if KEY in text]


def broken(event: httpx2.Response | BaseException) -> httpx2.Response:
    if isinstance(event, BaseException):
        raise event
    return event


@both_ways
def test_a_key_that_the_server_quotes_is_taken_out_of_its_error(speak: Callable[..., str]) -> None:
    error = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": KEY}}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(401, json=error))
    with (
        openai.OpenAI(api_key=KEY, http_client=httpx2.Client(transport=transport)) as client,
        chapter.llm_session("talk", client=client) as talk,
        pytest.raises(openai.AuthenticationError, match=r"provided: \*\*\*") as caught,
    ):
        speak(talk, "Hello")
    shown = [repr(caught.value), *traceback.format_exception(caught.value)]
    assert not [text for text in shown if KEY in text]


def test_an_ordinary_word_that_serves_as_key_is_left_in_messages() -> None:
    error = {"error": {"message": "offline: no such model"}}
    with session(httpx2.Response(404, json=error)) as talk:
        with pytest.raises(openai.NotFoundError, match="offline: no such model"):
            talk.ask("Hello")


@pytest.mark.parametrize("key", [KEY + "\n", f"{KEY} {KEY}", KEY + "é"])
def test_a_malformed_key_is_refused_by_an_error_that_does_not_show_it(key: str) -> None:
    with openai.OpenAI(api_key=key) as client, pytest.raises(ValueError, match="API key") as caught:
        chapter.llm_session("talk", client=client).__enter__()
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in repr(caught.value)


# --- The cleanup contract ---


@contextmanager
def failing_close(target: type[Any]) -> Iterator[None]:
    """Everything of this class fails when it is closed, after it was closed; but fails only once.

    The garbage collector closes the SDK's generators again, where nobody could catch the error.
    """
    real = target.close
    failed: list[Any] = []

    def close(self: Any) -> None:
        real(self)
        if not any(self is earlier for earlier in failed):
            failed.append(self)
            raise OSError("cleanup failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "close", close)
        yield


@contextmanager
def changed(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def subject(folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Sessions that make their own client; the oracle looks for open clients and open files."""
    made: list[openai.OpenAI] = []
    names = (f"talk {number}" for number in range(1000))
    journal = None if folder is None else folder / "journal"
    before = open_descriptors().keys()
    real = chapter.OpenAI

    def own_client(**options: Any) -> openai.OpenAI:
        made.append(real(**options) if options else chapter.offline_client())
        return made[-1]

    def leaks() -> list[object]:
        clients: list[object] = [client for client in made if not client.is_closed()]
        files = [file for fd, file in open_descriptors().items() if fd not in before]
        return clients + [file for file in files if not file.startswith("/proc/")]

    def failing(*args: object, **options: object) -> None:
        raise OSError("set-up failed")

    monkeypatch.setattr(chapter, "OpenAI", own_client)
    faults = [lambda: changed(chapter, "LLMSession", failing), lambda: changed(chapter, "Usage", 0)]
    if journal is not None:
        journal.touch()
        faults = [
            lambda: changed(chapter, "SET_UP", "CREATE TABLE broken ("),
            *faults,
            lambda: changed(chapter, "MARKS", {"user_version": 2}),
        ]
    return Subject(
        open=lambda: chapter.llm_session(next(names), journal=journal),
        leaks=leaks,
        use=lambda talk: talk.ask("Hello"),
        closed_error=chapter.SessionClosedError,
        setup_faults=faults,
        cleanup_faults=[lambda: failing_close(real)],
    )


@ways
@pytest.mark.parametrize("journaled", [False, True])
def test_a_session_keeps_the_cleanup_contract(
    way: Way, journaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(subject(tmp_path if journaled else None, monkeypatch))


@pytest.mark.parametrize("error", [None, ValueError("in the block")])
def test_a_stream_that_cannot_be_closed_keeps_nothing_else_open(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = subject(tmp_path, monkeypatch)
    with failing_close(httpx2.Response), pytest.raises(OSError, match="cleanup failed") as caught:
        with judged.open() as talk:  # type: ignore[union-attr]
            stream = talk.stream("Hello")
            next(stream)
            if error is not None:
                raise error
    assert not judged.leaks()
    assert error is None or caught.value.__context__ is not None


# --- The script ---


@pytest.fixture
def play(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Play the script in this process: its exit status, and what it wrote to both streams."""

    def play(*arguments: str, **environment: str) -> tuple[object, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(chapter, "live", False)
            patch.setattr(sys, "argv", [str(chapter_path(2)), *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                status = chapter.main()
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()

    return play


def test_only_live_goes_to_the_endpoint_and_the_rest_stays_here(play: Callable[..., Any]) -> None:
    with loopback(hello) as (url, seen):
        live = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "llama3.2"}
        status, offline, errors = play("1", "2", "3", "4", "6", **live)
        assert (status, errors) == (0, "")
        assert not seen
        status, online, errors = play("6", "--live", **live)
    assert (status, errors) == (0, "")
    assert {path for path, _key, _asked in seen} == {"/v1/chat/completions"}
    assert {asked["model"] for _path, _key, asked in seen} == {"llama3.2"}
    prompts = [said["content"] for said in seen[-1][2]["messages"][::2]]
    assert "".join(prompt.split("\n", 1)[1] for prompt in prompts) == chapter.SOURCE
    assert KEY not in online + offline


def test_the_reader_is_told_what_is_a_stand_in_and_what_has_no_price(
    play: Callable[..., Any],
) -> None:
    _status, offline, _errors = play("6")
    assert "A stand-in plays the model" in offline
    with loopback(hello) as (url, _seen):
        _status, online, _errors = play(
            "6", "--live", OPENAI_BASE_URL=url, OPENAI_API_KEY=KEY, OPENAI_MODEL="llama3.2"
        )
    assert "A stand-in plays the model" not in online
    assert "No price is known for llama3.2" in online


def test_live_without_a_key_says_what_is_missing(play: Callable[..., Any]) -> None:
    status, _output, errors = play("--live", OPENAI_API_KEY="")
    assert status == 2
    assert "--live needs OPENAI_API_KEY" in errors.splitlines()[-1]


def rows_of(text: str) -> list[list[str]]:
    """The body of a table, cell by cell: the lines below its header that end with dollars."""
    _above, _header, below = text.partition(" USD")
    lines = [line for line in below.splitlines() if re.search(r" 0\.\d+ *$", line)]
    return [line.replace(",", "").split() for line in lines]


def test_what_the_lessons_say_is_what_the_run_shows(play: Callable[..., Any]) -> None:
    _status, text, _errors = play("1", "2", "3", "4", "6")
    _above, life, tokens, turns, stream, review = re.split(r"(?m)^\d · .+$", text)
    assert re.search(r"└ ended\nsession 'tutor': closed · turns 1 ", life)
    assert re.search(r"└ left by ZeroDivisionError\nsession 'accountant': failed · turns 1 ", life)
    assert "SessionClosedError: session 'tutor' is closed" in life
    assert "✓ After both sessions, `client.is_closed()` is False." in life
    assert "✓ After its own block, it is True." in life

    assert [row[0] for row in rows_of(tokens)] == ["English", "中文", "Python", "thanks"]
    for _kind, guess, counted, reported, *_rest in rows_of(tokens):
        assert counted == reported != guess
    assert [row[0] for row in rows_of(tokens) if row[4] != "0"] == ["thanks"]
    assert "ContextWindowError" in tokens
    assert "✓ In 4 of 4 turns, the count is the input that the API reports." in tokens

    assert "✗ The conversation: user → user → assistant." in turns
    assert re.search(r"messages\.append.*assistant.* {6}4 *\n", turns)  # in the second call only
    assert turns.count(": closed · turns 1 ") == turns.count("turn 2: rolled back") == 4
    assert "✓ 4 of 4 sessions keep the first turn" in turns

    assert "✓ The conversation: []." in stream
    assert "'Stand-in '" in stream
    assert "closed · turns 0 · requests 2 " in stream

    parts = rows_of(review)
    assert [row[0] for row in parts] == ["1", "2", "3", *map(str, range(3, len(parts)))]
    assert [row[1] for row in parts] == ["1", "2", "3", *["1"] * (len(parts) - 3)]
    assert (
        review.count("session 'review': failed · turns 2 ")
        == review.count("└ left by InternalServerError")
        == review.count("InternalServerError: Error")
        == 1
    )
    assert sum(Decimal(row[5]) for row in parts) == Decimal(parts[-1][6])
    requests = sum(int(row[1]) for row in parts)
    closed = f"session 'review': closed · turns {len(parts) - 1} · requests {requests} "
    assert closed in review
    assert f" · ${parts[-1][6]}\n" in review
    assert f"✓ {len(parts) - 1} of {len(parts) - 1} parts are reviewed." in review


def test_the_killed_child_of_the_demo_loses_nothing_that_it_reported(
    play: Callable[..., Any],
) -> None:
    _status, text, _errors = play("5")
    ((reported, found),) = re.findall(r"(?s)had reported (\d+) turns.*resumed with (\d+)", text)
    assert 3 <= int(reported) <= int(found) <= int(reported) + 1
    assert f"✓ Of the {reported} turns that it reported, 0 are lost." in text
