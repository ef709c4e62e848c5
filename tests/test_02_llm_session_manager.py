"""Chapter 02: each claim of its lessons, and the cleanup contract for the session."""

from __future__ import annotations

import decimal
import inspect
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import SYNC_WAYS, Subject, Way
from left_behind import open_descriptors

chapter: Any = load_chapter(2)
PARTS = len(range(0, chapter.SOURCE.count("\n"), 200))  # contextlib grows with each Python
ways = pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
MODEL = "gpt-4o-mini"
KEY = "sk-fake-Zq7x0WcM2vT9"
JARGON_SAID = """\
You are a helpful, pattern-following assistant that translates corporate jargon into plain English.
New synergies will help drive top-line growth.
Things working well together will increase revenue.
Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.
Let's talk later when we're less busy about how to do better.
This late pivot means we don't have time to boil the ocean for the client deliverable."""
NAMES = [{}, *[{"name": "example_user"}, {"name": "example_assistant"}] * 2, {}]
JARGON = [
    {"role": "system", **name, "content": content}
    for name, content in zip(NAMES, JARGON_SAID.splitlines(), strict=True)
]
JARGON[-1]["role"] = "user"


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


def answering(request: httpx2.Request) -> httpx2.Response:
    answer: httpx2.Response = chapter.stand_in_answer(json.loads(request.content))
    return answer


def client_of(server: Callable[[httpx2.Request], httpx2.Response]) -> openai.OpenAI:
    http = httpx2.Client(transport=httpx2.MockTransport(server))
    return openai.OpenAI(api_key=KEY, http_client=http, max_retries=0)


def refusal(status: int) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": f"status {status}"}})


def completion(content: str | None, usage: object, finish: str | None = "stop") -> httpx2.Response:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return httpx2.Response(200, json={"choices": [choice], "usage": usage})


def usage_report(prompt: Any, completed: Any, cached: Any = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    tokens = {"prompt_tokens": prompt, "completion_tokens": completed}
    return tokens | {"prompt_tokens_details": details}


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
    plain = chapter.encoding_for("gpt-4o").encode_ordinary("<|endoftext|>")
    request = [{"role": "user", "content": "<|endoftext|>"}]
    assert chapter.count_tokens(request, "gpt-4o") == 3 + 3 + 1 + len(plain)


LOADING = """
import os, runpy, socket, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from tiktoken_ext import openai_public
def no_network(*args, **kwargs):
    raise AssertionError("the network was used")
chapter = runpy.run_path(sys.argv[1])
socket.socket.connect = socket.getaddrinfo = no_network
loads, load = [], openai_public.load_tiktoken_bpe
openai_public.load_tiktoken_bpe = lambda *a, **kw: loads.append(a) or load(*a, **kw)
sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(16) as pool:
    loaded = set(pool.map(chapter["encoding_for"], ["gpt-4o", "gpt-4"] * 8))
print(len(loads), len(loaded), os.environ["TIKTOKEN_CACHE_DIR"], os.listdir(tempfile.gettempdir()))
"""


def test_threads_load_a_tokenizer_once_offline_and_leave_no_trace(tmp_path: Path) -> None:
    temporary, users = tmp_path / "temporary", tmp_path / "users"
    temporary.mkdir()
    users.mkdir()
    damaged = users / chapter.RANK_FILES["o200k_base"]
    damaged.write_bytes(b"damaged")  # tiktoken would delete it, since its checksum is wrong
    environment = {**os.environ, "TMPDIR": str(temporary), "TIKTOKEN_CACHE_DIR": str(users)}
    command = [sys.executable, "-c", LOADING, str(chapter_path(2))]
    loaded = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert loaded.stdout.split() == ["2", "2", str(users), "[]"]
    assert damaged.read_bytes() == b"damaged"


@pytest.mark.parametrize("before", [None, "before"])
def test_a_temporary_variable_is_restored_even_after_an_error(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    if before is not None:
        monkeypatch.setenv("OPENAI_MODEL", before)
    with pytest.raises(KeyboardInterrupt), chapter.temporary_environment("OPENAI_MODEL", "inside"):
        assert os.environ["OPENAI_MODEL"] == "inside"
        raise KeyboardInterrupt
    assert os.environ.get("OPENAI_MODEL") == before


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
    price = partial(chapter.list_price, model=model)
    with decimal.localcontext(prec=2):  # the caller's precision makes no difference
        assert chapter.cost_of(usage, price) == Decimal(dollars)


def test_cached_input_is_counted_and_has_its_own_price() -> None:
    reported = usage_report(1500, 5, cached=1408)
    with session(completion("Hi", reported), completion("Hi", reported)) as talk:
        talk.ask("Hello")
        talk.ask("Hello")
        assert talk.usage == chapter.Usage(2, 3000, 2816, 10)
        full = chapter.Usage(2, 3000, 0, 10)
        assert talk.cost == chapter.list_price(talk.usage, MODEL) < chapter.list_price(full, MODEL)


def test_an_unknown_model_is_an_error_before_anything_is_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(LookupError, match=r"price of 'llama3\.2' is unknown: pass price="),
        session(model="llama3.2", journal=tmp_path / "journal"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_price_that_is_no_decimal_fails_before_the_turn() -> None:
    with pytest.raises(TypeError, match=r"must return a Decimal, not 0\.1"):
        session(price=lambda usage: 0.1).__enter__()


def test_a_price_that_fails_later_leaves_a_rolled_back_turn(tmp_path: Path) -> None:
    def price(usage: Any) -> Any:
        return 0.1 if usage.output_tokens > 1 else Decimal(1)

    with session(price=price, journal=tmp_path / "journal") as talk:
        with pytest.raises(TypeError, match="must return a Decimal") as caught:
            talk.ask("Hello")
        assert "The journal does not have this: price must" in caught.value.__notes__[0]
        assert (talk.messages, talk.usage.requests, talk.cost) == ([], 1, 0)


@pytest.mark.parametrize("precision", [1, 4, 28])
def test_a_cost_does_not_depend_on_the_callers_precision(precision: int, tmp_path: Path) -> None:
    for turns in (3, 6):
        with decimal.localcontext(prec=precision), session(journal=tmp_path / "journal") as talk:
            for _turn in range(3):
                talk.ask("word " * 1500)
            assert decimal.getcontext().prec == precision
        assert talk.usage.requests == turns
        assert talk.cost == chapter.list_price(talk.usage, talk.model)


# --- The life cycle ---


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_after_its_block_a_session_is_closed_or_failed(error: type[BaseException] | None) -> None:
    with suppress(ValueError, KeyboardInterrupt, GeneratorExit), session() as talk:
        assert talk.state is chapter.SessionState.OPEN
        if error is not None:
            raise error
    state = "failed" if error else "closed"
    assert talk.state is chapter.SessionState(state)
    for speak in (ask, read_stream):
        with pytest.raises(chapter.SessionClosedError, match=rf"has ended \({state}\): open"):
            speak(talk, "Hello?")


# --- A turn is a transaction ---

SURROGATE = {"choices": [{"message": {"content": "\ud800"}, "finish_reason": "stop"}]}
NULLS = {"id": None, "choices": None, "usage": None}


def with_text(content: str, kind: str = "application/json") -> Callable[[], httpx2.Response]:
    return lambda: httpx2.Response(200, text=content, headers={"content-type": kind})


FAILURES: dict[str, Any] = {
    "429": (lambda: refusal(429), openai.RateLimitError, 3),
    "500": (lambda: refusal(500), openai.InternalServerError, 3),
    "401": (lambda: refusal(401), openai.AuthenticationError, 1),
    "timeout": (lambda: httpx2.ReadTimeout("slow"), openai.APITimeoutError, 3),
    "no connection": (lambda: httpx2.ConnectError("gone"), openai.APIConnectionError, 3),
    "malformed JSON": (with_text('{"choices": ['), chapter.AnswerError, 1),
    "too deep JSON": (with_text("[" * 100_000), chapter.AnswerError, 1),
    "no text": (with_text('{"choices": [{"message": {}}]}'), chapter.AnswerError, 1),
    "HTML": (with_text("<h1>Welcome</h1>\n<p>to nginx</p>", "text/html"), chapter.AnswerError, 1),
    "nothing": (with_text("", "text/plain"), chapter.AnswerError, 1),
    "an error": (with_text('{"error": {"message": "overloaded"}}'), chapter.AnswerError, 1),
    "nulls": (with_text(json.dumps(NULLS)), chapter.AnswerError, 1),
    "a list": (with_text("[1]"), chapter.AnswerError, 1),
    "a choice of null": (with_text('{"choices": [null]}'), chapter.AnswerError, 1),
    "no choices": (with_text('{"choices": []}'), chapter.AnswerError, 1),
    "no UTF-8": (with_text(json.dumps(SURROGATE)), chapter.AnswerError, 1),
    "Ctrl-C": (KeyboardInterrupt, KeyboardInterrupt, 1),
    "a bug": (lambda: ZeroDivisionError("bug"), ZeroDivisionError, 1),
}
SENT_INSTEAD = {"an error": "overloaded", "HTML": "<h1>Welc"}  # must be in the error


@both_ways
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_turn_leaves_no_trace_but_its_call(
    failure: str, speak: Callable[[Any, str], str], tmp_path: Path
) -> None:
    make, expected, attempts = FAILURES[failure]
    script = [None] + [make() for _attempt in range(attempts)]
    with session(*script, journal=tmp_path / "journal") as talk:
        speak(talk, "first")
        before, usage, cost = talk.messages, talk.usage, talk.cost
        with pytest.raises(expected) as caught:
            speak(talk, "second")
        assert talk.messages == before
        assert talk.usage == usage + chapter.Usage(requests=1)
        assert talk.cost == cost
        assert caught.value.__notes__ == [
            "Session 'talk', turn 2: rolled back, 0 output token(s) billed."
        ]
        assert SENT_INSTEAD.get(failure, "") in str(caught.value)
        assert speak(talk, "second") in talk.messages[-1]["content"]
        after = talk.messages, talk.usage, talk.cost
    with session(journal=tmp_path / "journal") as talk:
        assert (talk.messages, talk.usage, talk.cost) == after


def test_a_call_that_the_client_had_to_retry_counts_once() -> None:
    with session(refusal(429), refusal(500), None) as talk:
        talk.ask("Hello")
        assert (talk.usage.requests, len(talk.messages)) == (1, 2)


CALL = {"index": 0, "function": {"name": "now", "arguments": "{}"}}
ANSWERS = [("content", "", ""), ("refusal", "No.", "No."), ("tool_calls", [CALL], "now{}")]


@both_ways
@pytest.mark.parametrize(("kind", "value", "text"), ANSWERS)
def test_an_empty_text_a_refusal_and_a_call_are_answers(
    kind: str, value: object, text: str, speak: Callable[[Any, str], str]
) -> None:
    where = "message" if speak is ask else "delta"
    answer = {"choices": [{"finish_reason": "stop", where: {kind: value}}]}
    with session(httpx2.Response(200, json=answer) if speak is ask else streamed(answer)) as talk:
        assert speak(talk, "Hello") == text
        assert talk.messages[-1] == {"role": "assistant", "content": text}


@both_ways
def test_without_a_finish_reason_no_answer_is_whole(speak: Callable[..., str]) -> None:
    for finish in ("", None):
        half = completion("half", None, finish) if speak is ask else streamed(piece("half", finish))
        with session(half) as talk:
            with pytest.raises(openai.OpenAIError, match="no end"):
                speak(talk, "Hello")
            assert (talk.messages, talk.usage.output_tokens) == ([], 1)


def test_system_message_and_options_reach_the_api(tmp_path: Path) -> None:
    asked: list[Any] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return answering(request)

    tokens = 0
    for turn, speak in enumerate(("ask", "stream"), 1):
        options = {"journal": tmp_path / "journal", "system": "Be brief."}
        with client_of(server) as client:
            with chapter.llm_session("talk", client=client, **options) as talk:
                "".join(getattr(talk, speak)("Hello", temperature=0.5))
        assert asked[-1]["temperature"] == 0.5
        assert asked[-1]["messages"] == talk.messages[:-1]
        assert talk.messages[0] == {"role": "system", "content": "Be brief."}
        assert len(talk.messages) == 1 + 2 * turn
        tokens += chapter.count_tokens(talk.messages[:-1], talk.model)
        assert talk.usage.input_tokens == tokens


def test_what_a_rejected_answer_was_billed_is_counted() -> None:
    usage = usage_report(100, 7)
    with session(completion(None, usage), completion("cut", usage, None)) as talk:
        for turn in (1, 2):
            with pytest.raises(chapter.AnswerError, match="no text, or no end"):
                talk.ask("Hello")
            assert talk.usage == chapter.Usage(turn, 100 * turn, 0, 7 * turn)
        assert talk.cost == chapter.list_price(talk.usage, talk.model) > 0
        assert talk.messages == []


IMPOSSIBLE = [(5, 0, -1), (5, 6, 1), (None, 0, None), (2**62, 0, 1), (1e999, 0, 1), ("5", 0, 1)]


@both_ways
@pytest.mark.parametrize(("prompt", "cached", "completed"), IMPOSSIBLE)
def test_an_impossible_usage_is_not_believed(
    prompt: Any, cached: int, completed: Any, speak: Callable[..., str], tmp_path: Path
) -> None:
    where = "message" if speak is ask else "delta"
    choice = {where: {"content": "Hi"}, "finish_reason": "stop"}
    usage = usage_report(prompt, completed, cached)
    body = json.dumps({"choices": [choice], "usage": usage})
    answer = with_text(body)() if speak is ask else streamed(body)
    with session(answer, journal=tmp_path / "journal") as talk:
        with pytest.raises(chapter.AnswerError, match="impossible:") as caught:
            speak(talk, "Hello")
        assert "1 output token(s) billed." in caught.value.__notes__[0]
        assert talk.messages == []


@both_ways
def test_a_server_that_reports_no_usage_is_billed_by_count(speak: Callable[..., str]) -> None:
    silent = streamed(piece("hello world"), piece(None, "stop"), "[DONE]")
    with session(completion("hello world", None) if speak is ask else silent) as talk:
        assert speak(talk, "Hello") == "hello world"
        tokens = chapter.count_tokens([{"role": "user", "content": "Hello"}], talk.model)
        assert talk.usage == chapter.Usage(1, tokens, 0, 2)


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


@pytest.mark.parametrize("end", ["close", "lost", "malformed", "nulls", "error"])
def test_an_interrupted_stream_is_rolled_back_and_billed(
    end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "workshop.session")
    ends = {
        "lost": httpx2.ReadError("lost"),
        "malformed": "{",
        "nulls": NULLS,
        "error": {"error": 1},
    }
    rest = ends.get(end, piece("never read"))
    script = (None, streamed(piece(""), piece("hello"), piece(" world"), rest))
    with session(*script, journal=tmp_path / "journal") as talk:
        talk.ask("first")
        messages, usage, cost = talk.messages, talk.usage, talk.cost
        stream = talk.stream("Hello")
        assert next(stream) + next(stream) == "hello world"
        with pytest.raises(openai.OpenAIError) if end in ends else nullcontext():
            next(stream) if end in ends else stream.close()
        assert talk.messages == messages
        question = {"role": "user", "content": "Hello"}
        extra = chapter.Usage(1, chapter.count_tokens([*messages, question], talk.model), 0, 2)
        assert (talk.usage, talk.cost) == (usage + extra, cost + chapter.list_price(extra, MODEL))
        assert "'talk', turn 2: rolled back, 2 output token(s) billed" in caplog.text
        after = talk.usage, talk.cost
    with session(journal=tmp_path / "journal") as talk:
        assert (talk.messages, talk.usage, talk.cost) == (messages, *after)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_end_of_the_block_ends_an_open_stream(error: type[BaseException] | None) -> None:
    slow = Slow(piece("word "), piece("never read"))
    with client_of(slow) as client, suppress(ValueError, KeyboardInterrupt):
        with chapter.llm_session("talk", client=client) as talk:
            stream = talk.stream("Hello")
            assert next(stream) == "word "
            if error is not None:
                raise error
    assert slow.closed
    assert (talk.messages, talk.usage.output_tokens) == ([], 2)
    with pytest.raises(chapter.SessionClosedError):
        next(stream)


# --- Threads ---


class Slow(httpx2.SyncByteStream):
    """A server that answers, or a stream that goes on, when it is told to."""

    closed = False

    def __init__(self, *answers: Any) -> None:
        self.asked, self.may_answer, self.answers = threading.Event(), threading.Event(), answers

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if self.answers:
            return httpx2.Response(200, stream=self)
        self.asked.set()
        self.may_answer.wait()
        return answering(request)

    def __iter__(self) -> Iterator[bytes]:
        for answer in self.answers:
            yield b"data: " + json.dumps(answer).encode() + b"\n\n"
            self.asked.set()
            self.may_answer.wait()

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let the turn end even if the test fails, so that its thread ends."""
        try:
            yield
        finally:
            self.may_answer.set()


@pytest.mark.parametrize("error", [None, ValueError()])
@pytest.mark.parametrize(
    ("speak", "answers"),
    [
        (ask, ()),
        (read_stream, ()),
        (read_stream, (piece("a word", "stop"),)),
        (read_stream, (piece("a word"), NULLS)),
    ],
)
def test_a_block_does_not_wait_for_a_turn_in_a_thread(
    speak: Any, answers: Any, error: Exception | None, tmp_path: Path
) -> None:
    slow = Slow(*answers)
    with client_of(slow) as client, ThreadPoolExecutor(1) as pool, slow.released():
        opened = chapter.llm_session("talk", client=client, journal=tmp_path / "journal")
        talk = opened.__enter__()
        turn = pool.submit(speak, talk, "Hello")
        slow.asked.wait()
        opened.__exit__(error and type(error), error, None)
        assert talk.state is chapter.SessionState("failed" if error else "closed")
        slow.may_answer.set()
        assert type(turn.exception()) is chapter.SessionClosedError
    assert talk.messages == []
    assert talk.usage.output_tokens > 0  # it was paid for
    with session(journal=tmp_path / "journal") as talk:
        assert talk.messages == []


def test_a_second_turn_is_refused_at_once_in_any_thread() -> None:
    slow = Slow()
    with client_of(slow) as client, ThreadPoolExecutor(1) as pool, slow.released():
        with chapter.llm_session("talk", client=client) as talk:
            turn = pool.submit(ask, talk, "Hello")
            slow.asked.wait()
            for speak in (ask, read_stream):
                with pytest.raises(RuntimeError, match="'talk' is in a turn: finish or close"):
                    speak(talk, "Me, too")
            slow.may_answer.set()
            assert turn.result() == talk.messages[-1]["content"]
            stream = talk.stream("And now?")
            next(stream)
            with pytest.raises(RuntimeError, match="'talk' is in a turn"):
                next(talk.stream("Me, too"))
            assert talk.messages[2:] == []
            list(stream)
            assert len(talk.messages) == 4


def test_an_abandoned_stream_may_be_collected_while_a_row_is_written() -> None:
    with session() as talk:
        stream = talk.stream("Hello")
        next(stream)
        with talk._lock:  # as if the garbage collector ran in there
            stream.close()
        assert talk.messages == []


def test_a_stream_that_was_recorded_ends_well_if_the_block_ends_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with session() as talk:
        record = talk._record

        def record_as_the_block_ends(*arguments: Any) -> None:
            record(*arguments)
            talk.state = chapter.SessionState.CLOSED

        monkeypatch.setattr(talk, "_record", record_as_the_block_ends)
        assert read_stream(talk, "Hello") == talk.messages[-1]["content"]


# --- The window ---


@both_ways
def test_a_prompt_that_is_too_long_is_not_sent(speak: Callable[[Any, str], str]) -> None:
    tokens = chapter.count_tokens([{"role": "user", "content": "Hello"}], MODEL)
    with session(KeyboardInterrupt(), max_input_tokens=tokens - 1) as talk:
        with pytest.raises(chapter.ContextWindowError, match=rf"would send {tokens} tokens"):
            speak(talk, "Hello")
        assert (talk.messages, talk.usage) == ([], chapter.Usage())
    with session(max_input_tokens=tokens) as talk:
        speak(talk, "Hello")


# --- The journal ---


def test_the_same_name_and_journal_resume_the_conversation(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with session(None, refusal(400), journal=journal) as talk:
        talk.ask("first")
        with suppress(openai.BadRequestError):
            talk.ask("bad")
        talk.ask("second")
        before = talk.messages, talk.usage, talk.cost
    with session(journal=str(journal)) as talk:
        assert (talk.messages, talk.usage, talk.cost) == before
        talk.ask("third")
        assert len(talk.messages) == 6
    with session(name="another", journal=journal) as talk:
        assert (talk.messages, talk.usage, talk.cost) == ([], chapter.Usage(), 0)


def test_a_journal_is_durable_by_its_settings(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        (mode,) = talk.journal.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = talk.journal.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("delete", 3)  # 3 is EXTRA: the directory is synced, too


NOISE = random.Random(2).randbytes(3000)
DAMAGE: dict[str, bytes | str | Callable[[bytes], bytes]] = {  # new content, SQL, or an edit
    "text": b"Not a database. " * 100,
    "one byte": b"x",
    "half a header": b"SQLite format 3\0",
    "another database": "PRAGMA application_id = 0; PRAGMA journal_mode = WAL",
    "no end": lambda content: content[:-5000],
    "noise": lambda content: content[:9000] + NOISE + content[12000:],
    "a bad cost": "UPDATE turns SET cost = 'x'",
    "a bad count": "UPDATE turns SET input_tokens = NULL",
    "a bad text": "UPDATE turns SET prompt = CAST(x'ff' AS TEXT)",
    "no text": "UPDATE turns SET reply = x'ff'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_damaged_or_foreign_is_refused_and_left_untouched(
    damage: str, tmp_path: Path
) -> None:
    file = tmp_path / "journal"
    with session(journal=file) as talk:
        for _turn in range(30):
            talk.ask("Hello " * 100)
    match DAMAGE[damage]:
        case bytes() as content:
            file.write_bytes(content)
        case str() as statements:
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(statements)
        case edit:
            file.write_bytes(edit(file.read_bytes()))
    before = file.read_bytes()
    reason = "is not a journal of sessions: choose|cannot be used: .+|is damaged in the journal: "
    with pytest.raises(chapter.JournalError, match=reason):
        session(journal=file).__enter__()
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["journal"]


def test_of_two_blocks_on_one_conversation_none_overwrites_the_other(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with session(journal=journal) as one, session(journal=journal) as other:
        reply = one.ask("from one")
        with pytest.raises(chapter.JournalError, match="another session already wrote"):
            other.ask("from the other")
        assert (other.messages, other.usage.requests) == ([], 1)
        one.ask("and on")
    with session(journal=journal) as talk:
        said = [message["content"] for message in talk.messages]
        assert (said[:3], len(said)) == (["from one", reply, "and on"], 4)
        assert talk.cost == one.cost + other.cost  # a reply that found no place was paid for, too


def test_opening_a_journal_leaves_the_locks_of_another_session(tmp_path: Path) -> None:
    """Where a process closes a file, POSIX drops all locks that it has on the file."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], 0).execute('BEGIN IMMEDIATE')"
    command = [sys.executable, "-c", code, str(tmp_path / "journal")]
    with session(journal=tmp_path / "journal") as talk:
        talk.journal.execute("BEGIN IMMEDIATE")
        with session(journal=tmp_path / "journal"):
            assert b"is locked" in subprocess.run(command, stderr=subprocess.PIPE).stderr


def test_many_threads_may_open_a_new_journal_at_the_same_moment(tmp_path: Path) -> None:
    start = threading.Barrier(16)

    def talk_in(path: Path, number: int) -> None:
        start.wait()
        with session(name=f"talk {number}", journal=path) as talk:
            talk.ask("Hello")

    for trial in range(5):
        path = tmp_path / f"journal {trial}"
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(partial(talk_in, path), range(16)))
        with chapter.open_journal(path) as journal:
            assert journal.execute("SELECT count(*) FROM turns").fetchone() == (16,)


def test_a_turn_that_cannot_be_written_down_has_not_happened(tmp_path: Path) -> None:
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("first")
        talk.journal.execute("PRAGMA query_only = ON")  # as if the disk were full
        before = talk.messages
        with pytest.raises(sqlite3.OperationalError) as caught:
            talk.ask("second")
        assert "The journal does not have this: attempt to" in caught.value.__notes__[0]
        assert talk.messages == before
        assert talk.usage.requests == 2
        talk.journal.execute("PRAGMA query_only = OFF")
        talk.ask("second")
        after = talk.messages
    with session(journal=tmp_path / "journal") as talk:
        assert talk.messages == after


@contextmanager
def ctrl_c_at_call(number: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at a call of the session: Python handles signals only at calls.

    That is as a function begins, or after one in C has ended. What a generator resumes is left
    out, since an error in the hook would skip its `finally`.
    """
    calls: list[str] = []

    def on_event(frame: Any, event: str, _argument: object) -> None:
        begins = event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if frame.f_globals is vars(chapter) and (begins or event == "c_return"):
            calls.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(calls) == number:
                raise KeyboardInterrupt

    sys.setprofile(on_event)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def test_ctrl_c_at_any_moment_leaves_session_and_journal_in_step(tmp_path: Path) -> None:
    number, struck = 1, True
    while struck:
        options: dict[str, Any] = {"name": f"talk {number}", "journal": tmp_path / "journal"}
        with session(**options) as talk:
            talk.journal.execute("PRAGMA synchronous = OFF")  # this is not about power cuts
            talk.ask("first")
            with suppress(KeyboardInterrupt), ctrl_c_at_call(number) as calls:
                talk.ask("second")
            struck = len(calls) == number
            talk.ask("third")
            after = talk.messages, talk.usage, talk.cost
        with session(**options) as talk:
            assert (talk.messages, talk.usage, talk.cost) == after, calls[-1]
        asked = [said["content"] for said in talk.messages[::2]]
        assert asked in (["first", "third"], ["first", "second", "third"])
        number += 1
    assert number > 20, "the test would prove nothing"


def test_a_turn_that_ctrl_c_finds_recorded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with session() as talk:
        record = talk._record

        def interrupted(*arguments: Any) -> None:
            record(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(talk, "_record", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            talk.ask("Hello")
        assert caught.value.__notes__ == ["Session 'talk', turn 1: complete and kept."]
        assert (len(talk.messages), talk.usage.requests) == (2, 1)


# --- Killed: each child is a fork of a process that has the chapter loaded already ---

KILLED = """
import json, os, random, runpy, select, signal, sys
os.environ.pop("OPENAI_API_KEY", None)
chapter = runpy.run_path(sys.argv[1])
chapter["encoding_for"]("gpt-4o-mini")

def opened(path):
    return chapter["llm_session"]("talk", client=chapter["offline_client"](), journal=path)

def talk_on(path, writable):
    with opened(path) as talk:
        while True:
            talk.ask(f"question {len(talk.messages) // 2}")
            os.write(writable, b".")

for trial in range(50):
    path = os.path.join(sys.argv[2], f"journal {trial % 10}")  # some are new, some are resumed
    readable, writable = os.pipe()
    if not (child := os.fork()):
        try:
            talk_on(path, writable)
        except BaseException as error:
            os.write(writable, repr(error).encode())
        os._exit(0)
    os.close(writable)
    rng = random.Random(trial)
    said = b"".join(os.read(readable, 1) for _turn in range(rng.randrange(4)))
    select.select([], [], [], rng.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said += os.read(readable, 65536)
    os.close(readable)
    with opened(path) as talk:
        print(json.dumps([path, said.decode(), talk.messages, talk.usage.requests]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_fifty_moments_it_loses_no_acknowledged_turn(tmp_path: Path) -> None:
    turns: Counter[str] = Counter()
    command = [sys.executable, "-c", KILLED, str(chapter_path(2)), str(tmp_path)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for line in ran.stdout.splitlines():
        path, said, messages, requests = json.loads(line)
        assert set(said) <= {"."}, said
        turns[path] += len(said)
        found, half = divmod(len(messages), 2)
        assert (half, requests) == (0, found)
        assert found >= turns[path], "an acknowledged turn is lost"
        assert found <= turns[path] + 1, "more turns than were ever asked"
        for number, message in enumerate(messages[::2]):
            assert message == {"role": "user", "content": f"question {number}"}
            assert f"question {number}" in messages[2 * number + 1]["content"]
        turns[path] = found
    assert sum(turns.values()) > 50


# --- The API key ---


def test_the_key_is_in_no_repr_log_error_or_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = []

    def server(request: httpx2.Request) -> httpx2.Response:
        keys.append(request.headers["authorization"])
        return refusal(401)

    with client_of(server) as client:
        with chapter.llm_session("talk", client=client, journal=tmp_path / "journal") as talk:
            with pytest.raises(openai.AuthenticationError) as caught:
                talk.ask("Hello")
            shown = [repr(talk), repr(talk._begin("x")), repr(caught.value)]
    shown += traceback.format_exception(caught.value)
    shown += [caplog.text, *(repr(record.__dict__) for record in caplog.records)]
    shown.append((tmp_path / "journal").read_bytes().decode("latin-1"))
    assert keys == [f"Bearer {KEY}"], "the test would prove nothing"
    assert not [text for text in shown if KEY in text]


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


@pytest.mark.parametrize("key", [KEY + "\n", KEY + " ", KEY + "é"])
def test_a_malformed_key_is_refused_by_an_error_that_does_not_show_it(key: str) -> None:
    with openai.OpenAI(api_key=key) as client, pytest.raises(ValueError, match="API key") as caught:
        chapter.llm_session("talk", client=client).__enter__()
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in repr(caught.value)


def test_azure_with_an_entra_token_needs_no_key() -> None:
    http = httpx2.Client(transport=httpx2.MockTransport(answering))
    with (
        openai.AzureOpenAI(
            azure_endpoint="https://stand-in.invalid",
            azure_ad_token="a token",
            api_version="2024-10-21",
            http_client=http,
        ) as client,
        chapter.llm_session("talk", client=client) as talk,
    ):
        assert talk.ask("Hello") == "Stand-in reply to 'Hello'."


# --- The cleanup contract ---


@contextmanager
def failing_close(client: type[openai.OpenAI]) -> Iterator[None]:
    """Let every client fail when it is closed, after it was closed."""
    real = client.close

    def close(self: openai.OpenAI) -> None:
        real(self)
        raise OSError("cleanup failed")

    with changed(client, "close", close):
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
            lambda: changed(chapter, "APPLICATION_ID", 0),
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


def test_a_stream_that_cannot_be_closed_ends_the_session_all_the_same() -> None:
    class Broken:
        def close(self) -> None:
            raise OSError("cleanup failed")

    with pytest.raises(OSError, match="cleanup failed"), session() as talk:
        talk._stream = Broken()
    assert talk.state is chapter.SessionState.CLOSED


# --- The script ---


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Play the script in this process. Return its exit status, and both streams."""

    def play(*arguments: str, **environment: str) -> tuple[object, str, str]:
        monkeypatch.setattr(chapter, "live", False)
        monkeypatch.setattr(sys, "argv", [chapter_path(2).name, *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            status = chapter.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return play


def test_only_live_asks_the_model_of_the_environment(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return answering(request)

    monkeypatch.setattr(chapter, "OpenAI", lambda: client_of(server))
    live = {"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "llama3.2"}
    status, text, errors = play("6", "--live", **live)
    assert (status, errors) == (0, "")
    assert {request["model"] for request in asked} == {"llama3.2"}
    prompts = [said["content"] for said in asked[-1]["messages"][::2]]
    assert "".join(prompt.split("\n", 1)[1] for prompt in prompts) == chapter.SOURCE
    assert "No price is known for llama3.2" in text
    assert len(asked) == PARTS


def test_each_demo_shows_what_its_lesson_says(play: Callable[..., Any]) -> None:
    _status, text, _errors = play("1", "2", "3", "4", "6")
    _above, life, tokens, turns, stream, review = re.split(r"(?m)^\d · .+$", text)
    assert "✗ After the block, `is_closed()` of the one passed in: True" in life
    assert "✓ After the block, `is_closed()` of the one passed in: False" in life
    assert "✓ SessionClosedError: session 'tutor' has ended (failed)" in life
    rows = re.findall(r"(?m)^(?:A context|上下文|with open).* (\d+) +(\d+) +(\d+) *$", tokens)
    assert rows[:3] == [("41", "10", "8"), ("16", "4", "12"), ("47", "12", "13")]
    assert "✗ Characters ÷ 4 is right for 0 of 3 texts." in tokens
    assert "request: 3 around the message + 1 for its role + 8 for" in tokens
    assert "✓ Counted before: 15. Reported by the API: 15 in the request, 13 in the" in tokens
    assert Decimal("0.00001005") == (15 * Decimal("0.15") + 13 * Decimal("0.60")) / 10**6
    assert "so this is $0.00001005." in tokens
    assert "✓ ContextWindowError" in tokens
    assert "✗ The conversation: user → user → assistant." in turns
    assert "✓ The conversation: user → assistant." in turns
    assert "✗ The conversation: 'Tell me a story.' → 'Once upon '." in stream
    assert re.search(r"(?m)^whole +1 .*\nhangs up +0 .*\nbreak +0 ", stream)
    assert (review.count("HTTP 429"), review.count("HTTP 500")) == (2, 6)
    assert f"✗ Paid for {PARTS + 2} answers, for {PARTS} parts." in review
    assert f"✓ Paid for {PARTS} answers, for {PARTS} parts." in review


def test_the_killed_child_of_the_demo_loses_nothing(play: Callable[..., Any]) -> None:
    _status, text, _errors = play("5")
    reported, found = re.findall(r"✓ Of (\d+) turns that it reported, `talk.db` has (\d+)", text)[0]
    assert 3 <= int(reported) <= int(found) <= int(reported) + 1
    assert f"✗ Of {reported} turns that it reported, `talk.txt` has " in text
