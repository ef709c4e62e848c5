"""Chapter 02: each claim of its lessons, and the cleanup contract for the session."""

from __future__ import annotations

import decimal
import gc
import inspect
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from decimal import Decimal
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import SYNC_WAYS, Subject, Way
from left_behind import open_descriptors
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

chapter: Any = load_chapter(2)
PARTS = len(range(0, chapter.SOURCE.count("\n"), 200))  # contextlib grows with each Python
MODEL = "gpt-4o-mini"
KEY = "sk-fake-Zq7x0WcM2vT9"
Speak = Callable[[Any, str], str]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@contextmanager
def session(
    *script: Any,
    name: str = "talk",
    key: str = "offline",
    seen: Callable[[httpx2.Response], object] = lambda response: None,
    **options: Any,
) -> Iterator[Any]:
    """A session whose server follows the script; `seen` is called with each response."""
    with chapter.offline_client(*script, on_response=seen) as client:
        client.api_key, client.max_retries = key, 0
        with chapter.llm_session(name, client=client, **options) as opened:
            yield opened


def ask(talk: Any, prompt: str) -> str:
    return str(talk.ask(prompt))


def read_stream(talk: Any, prompt: str) -> str:
    return "".join(talk.stream(prompt))


both_ways = pytest.mark.parametrize("speak", [ask, read_stream])


def with_text(content: str) -> httpx2.Response:
    kind = "text/html" if content.startswith("<") else "application/json"
    return httpx2.Response(200, text=content, headers={"content-type": kind})


def streamed(*events: Any) -> httpx2.Response:
    """A stream of these chunks. An error among them is raised, and a Gate holds what follows."""

    def lines() -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Gate):
                event()
                continue
            if isinstance(event, BaseException):
                raise event
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()

    return httpx2.Response(200, content=lines())


def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def answer(speak: Speak, said: Any, finish: str | None = "stop", **more: Any) -> httpx2.Response:
    """One answer, as a completion or as a stream of one chunk."""
    where = "message" if speak is ask else "delta"
    body = {"choices": [{where: said, "finish_reason": finish}], **more}
    return with_text(json.dumps(body)) if speak is ask else streamed(body)


def usage_report(prompt: Any, completed: Any, cached: Any = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    tokens = {"prompt_tokens": prompt, "completion_tokens": completed}
    return tokens | {"prompt_tokens_details": details}


def asking(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def kept(talk: Any) -> tuple[Any, Any, Any]:
    """All that a session remembers, and a journal with it."""
    return talk.messages, talk.usage, talk.cost


class Gate:
    """Hold a server at one place, until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, response: object = None) -> None:
        self.reached.set()
        assert self.opened.wait(30)


# --- Tokens ---

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


def test_the_encodings_give_the_published_tokens() -> None:
    assert chapter.encoding_for("gpt-4").encode("hello world") == [15339, 1917]
    for model in ("gpt-4o", "llama3.2", "text-davinci-003"):  # the latter's is not in the wheel
        assert chapter.encoding_for(model).encode("hello world") == [24912, 2375]


def test_the_chat_rule_counts_what_the_api_confirmed() -> None:
    assert chapter.count_tokens(JARGON, "gpt-4o") == 124
    assert chapter.count_tokens(JARGON, "gpt-4") == 129
    special = asking("<|endoftext|>")  # it looks like a special token, but is text
    assert chapter.count_tokens(special, "gpt-4o") == 3 + 3 + 1 + 7


def test_threads_load_a_tokenizer_once_offline_without_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = openai_public.load_tiktoken_bpe

    def load_locked(*arguments: Any, **options: Any) -> Any:
        assert chapter.loading.locked()  # the environment belongs to all threads
        loads.append(arguments)
        return load(*arguments, **options)

    def no_network(*arguments: object) -> None:
        raise AssertionError("the network was used")

    users, temporary = tmp_path / "users", tmp_path / "temporary"
    users.mkdir()
    temporary.mkdir()
    damaged = users / chapter.RANK_FILES["o200k_base"]
    damaged.write_bytes(b"damaged")  # tiktoken would delete it, since its checksum is wrong
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(users))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load_locked)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    chapter.encoding_for.cache_clear()
    with ThreadPoolExecutor(16) as pool:
        loaded = set(pool.map(chapter.encoding_for, ["gpt-4o", "gpt-4"] * 8))
    assert (len(loads), len(loaded)) == (2, 2)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(users)
    assert (damaged.read_bytes(), os.listdir(temporary)) == (b"damaged", [])


@pytest.mark.parametrize("before", [{}, {"OPENAI_MODEL": "before"}])
def test_a_temporary_variable_is_restored_after_an_error(before: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", before.copy())
        with pytest.raises(KeyboardInterrupt), chapter.temporary_environment("OPENAI_MODEL", "x"):
            assert os.environ == {"OPENAI_MODEL": "x"}
            raise KeyboardInterrupt
        assert os.environ == before


# --- Cost ---


@pytest.mark.parametrize(
    ("model", "fresh", "cached", "output", "dollars"),
    [
        ("gpt-4o-mini", 1000, 0, 500, "0.00045"),
        ("gpt-4o-mini", 1234, 1000, 567, "0.0004503"),
        ("gpt-5-mini", 1234, 1000, 567, "0.0012175"),
        ("o3", 1000, 0, 100, "0.0028"),  # today's price: once it was 5 times as much
    ],
)
def test_prices_are_exact(model: str, fresh: int, cached: int, output: int, dollars: str) -> None:
    usage = chapter.Usage(1, fresh, cached, output)
    price = partial(chapter.list_price, model=model)
    with decimal.localcontext(prec=2):  # the caller's precision makes no difference
        assert chapter.cost_of(usage, price) == Decimal(dollars)


def test_cached_input_is_counted_and_has_its_own_price() -> None:
    reports = [usage_report(1500, 5, cached=cached) for cached in (1408, 1500)]
    with session(*(answer(ask, {"content": "Hi"}, usage=report) for report in reports)) as talk:
        talk.ask("Hello")
        talk.ask("Hello")
        assert talk.usage == chapter.Usage(2, 3000, 2908, 10)
        full = chapter.Usage(2, 3000, 0, 10)
        assert talk.cost == chapter.list_price(talk.usage, MODEL) < chapter.list_price(full, MODEL)


@pytest.mark.parametrize("model", ["llama3.2", "claude-3-5-haiku-latest"])
def test_a_model_that_openai_does_not_sell_needs_a_price(model: str, journal: Path) -> None:
    with pytest.raises(LookupError, match=rf"price of '{model}' is unknown: pass price="):
        session(model=model, journal=journal).__enter__()
    assert not journal.exists()
    with session(model=model, price=lambda usage: Decimal(2)) as talk:
        talk.ask("Hello")
        assert talk.cost == 2


def test_a_price_that_is_no_decimal_fails_before_the_turn() -> None:
    with pytest.raises(TypeError, match=r"must return a Decimal, not 0\.1"):
        session(price=lambda usage: 0.1).__enter__()


# --- A turn is a transaction ---

NULLS = {"id": None, "choices": None, "usage": None}
HI = {"content": "Hi"}
HI_TWICE = [piece(""), piece("Hi"), piece(" Hi")]
REPORTED = {"usage": usage_report(100, 7)}
BILL = chapter.Usage(1, 100, 0, 7)
WRONG = chapter.AnswerError
# What the server does: refuses with a status, sends a text, the arguments of `answer`, or a list
# of chunks, or raises. Then the error, its text, and the bill: as reported, or as many output
# tokens as were counted.
FAILURES: dict[str, Any] = {
    "429": (429, openai.RateLimitError, "", 0),
    "500": (500, openai.InternalServerError, "", 0),
    "timeout": (httpx2.ReadTimeout, openai.APITimeoutError, "", 0),
    "no connection": (httpx2.ConnectError, openai.APIConnectionError, "", 0),
    "Ctrl-C": (KeyboardInterrupt, KeyboardInterrupt, "", 0),
    "a bug": (ZeroDivisionError, ZeroDivisionError, "", 0),
    "malformed JSON": ('{"choices": [', WRONG, "", 0),
    "too deep JSON": ("[" * 100_000, WRONG, "", 0),
    "HTML": ("<h1>Hi</h1>\n<p>...", WRONG, "<h1>Hi", 0),
    "nothing": ("", WRONG, "", 0),
    "an error": (json.dumps({"error": "wait, " * 25 + "no GPU"}), WRONG, "no GPU", 0),
    "nulls": (json.dumps(NULLS), WRONG, "", 0),
    "a list": ("[1]", WRONG, "", 0),
    "a choice of null": ('{"choices": [null]}', WRONG, "", 0),
    "no choices": ('{"choices": []}', WRONG, "", 0),
    "no UTF-8": ({"said": {"content": "\ud800"}}, WRONG, "", 0),
    "no text": ({"said": {}}, WRONG, "no text, or no end: []", 0),
    "no text, but a bill": ({"said": {}, **REPORTED}, WRONG, "no text, or no end: []", BILL),
    "no end": ({"said": HI, "finish": None}, WRONG, "no text, or no end: ['Hi']", 1),
    "an empty end": ({"said": HI, "finish": ""}, WRONG, "no text, or no end: ['Hi']", 1),
    "no end, but a bill": ({"said": HI, "finish": None, **REPORTED}, WRONG, "no end: ", BILL),
    "negative usage": ({"said": HI, "usage": usage_report(5, -1)}, WRONG, "impossible: ", 1),
    "cached beyond all usage": (
        {"said": HI, "usage": usage_report(5, 1, 6)},
        WRONG,
        "impossible: ",
        1,
    ),
    "null usage": ({"said": HI, "usage": usage_report(None, None)}, WRONG, "impossible: ", 1),
    "huge usage": ({"said": HI, "usage": usage_report(10**12, 1)}, WRONG, "impossible: ", 1),
    "infinite usage": ({"said": HI, "usage": usage_report(1e999, 1)}, WRONG, "impossible: ", 1),
    "text usage": ({"said": HI, "usage": usage_report("5", 1)}, WRONG, "impossible: ", 1),
    "a lost stream": ([*HI_TWICE, httpx2.ReadError("lost")], openai.APIConnectionError, "", 2),
    "malformed JSON in a stream": ([*HI_TWICE, "{"], WRONG, "cannot be read: ", 2),
    "nulls in a stream": ([*HI_TWICE, NULLS], WRONG, "", 2),
    "an error in a stream": ([*HI_TWICE, {"error": {"message": "no"}}], openai.APIError, "no", 2),
}


def failing(sent: Any, speak: Speak) -> Any:
    """An item of a script that fails as a row of FAILURES says."""
    match sent:
        case int():
            return chapter.failed(sent)
        case str():
            return with_text(sent)
        case dict():
            return answer(speak, **sent)
        case list():
            return streamed(*sent)
    return sent("lost")


@pytest.mark.parametrize(
    ("failure", "speak"),
    [(name, read_stream) for name in FAILURES]
    + [(name, ask) for name in FAILURES if "stream" not in name],
)
def test_a_failed_turn_leaves_no_trace_but_its_bill(
    failure: str, speak: Speak, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "workshop.session")
    sent, expected, text, bill = FAILURES[failure]
    with session(None, failing(sent, speak), journal=journal) as talk:
        speak(talk, "first")
        before, usage, _cost = kept(talk)
        if isinstance(bill, int):
            tokens = chapter.count_tokens([*before, *asking("second")], MODEL) if bill else 0
            bill = chapter.Usage(1, tokens, 0, bill)
        with pytest.raises(expected) as caught:
            speak(talk, "second")
        assert text in str(caught.value)
        assert kept(talk) == (before, usage + bill, talk.price(usage + bill))
        note = f"'talk', turn 2: rolled back, {bill.output_tokens} output token(s) billed."
        assert caught.value.__notes__ == [f"Session {note}"]
        assert note in caplog.text
        assert speak(talk, "second") in talk.messages[-1]["content"]
        after = kept(talk)
    with session(journal=journal) as talk:
        assert kept(talk) == after


def test_an_error_page_that_is_cut_off_is_no_answer() -> None:
    page = streamed("Bad gateway", httpx2.ReadError("lost"))
    page.headers["content-type"] = "text/html"
    with session(page) as talk, pytest.raises(WRONG, match="cannot be read: lost"):
        read_stream(talk, "Hello")


CALL = {"index": 0, "function": {"name": "now", "arguments": "{}"}}


@both_ways
@pytest.mark.parametrize(
    ("kind", "value", "text", "output"),
    [
        ("content", "", "", 0),
        ("content", "hello world", "hello world", 2),
        ("refusal", "No.", "No.", 2),
        ("tool_calls", [CALL], "now{}", 2),
    ],
)
def test_a_text_a_refusal_and_a_call_are_answers_and_counted(
    kind: str, value: object, text: str, output: int, speak: Speak
) -> None:
    with session(answer(speak, {kind: value})) as talk:  # without a usage
        assert speak(talk, "Hello") == text
        assert talk.messages[-1] == {"role": "assistant", "content": text}
        tokens = chapter.count_tokens(asking("Hello"), MODEL)
        assert talk.usage == chapter.Usage(1, tokens, 0, output)


def test_of_several_answers_the_first_is_kept_with_its_end() -> None:
    second = {"index": 1, "delta": {"content": "Another"}, "finish_reason": None}
    chunks = [piece("One", "stop"), {"choices": [second]}, piece(""), "[DONE]"]
    with session(streamed(*chunks)) as talk:
        assert read_stream(talk, "Hello") == talk.messages[-1]["content"] == "One"


def test_system_message_and_options_reach_the_api(journal: Path) -> None:
    tokens = 0
    for turn, speak in enumerate(("ask", "stream"), 1):
        responses: list[httpx2.Response] = []
        with session(journal=journal, system="Be brief.", seen=responses.append) as talk:
            "".join(getattr(talk, speak)("Hello", temperature=0.5))
        asked = json.loads(responses[0].request.content)
        assert asked["temperature"] == 0.5
        assert asked["messages"] == talk.messages[:-1]
        assert talk.messages[0] == {"role": "system", "content": "Be brief."}
        assert len(talk.messages) == 1 + 2 * turn
        tokens += chapter.count_tokens(talk.messages[:-1], talk.model)
        assert talk.usage.input_tokens == tokens
    assert asked["stream_options"] == {"include_usage": True}


@both_ways
def test_a_question_that_cannot_be_encoded_is_its_own_fault(speak: Speak) -> None:
    with session() as talk:
        with pytest.raises(UnicodeEncodeError):
            speak(talk, "\ud800")
        assert (talk.messages, talk.usage.requests) == ([], 1)


@both_ways
def test_a_prompt_that_is_too_long_is_not_sent(speak: Speak) -> None:
    tokens = chapter.count_tokens(asking("Hello"), MODEL)
    with session(KeyboardInterrupt(), max_input_tokens=tokens - 1) as talk:
        with pytest.raises(chapter.ContextWindowError, match=rf"would send {tokens} tokens"):
            speak(talk, "Hello")
        assert (talk.messages, talk.usage) == ([], chapter.Usage())
    with session(max_input_tokens=tokens) as talk:
        speak(talk, "Hello")


# --- Streams ---


@pytest.mark.parametrize(
    ("end", "later"), [("close", StopIteration), ("the block", chapter.SessionClosedError)]
)
def test_a_stream_that_is_not_read_is_closed_and_billed(end: str, later: type[Exception]) -> None:
    responses: list[httpx2.Response] = []
    with session(streamed(*HI_TWICE, piece("never read")), seen=responses.append) as talk:
        stream = talk.stream("Hello")
        assert [next(stream), next(stream)] == ["Hi", " Hi"]
        if end == "close":
            stream.close()
            assert responses[0].is_closed
    assert responses[0].is_closed
    bill = chapter.Usage(1, chapter.count_tokens(asking("Hello"), MODEL), 0, 2)
    assert kept(talk) == ([], bill, talk.price(bill))
    with pytest.raises(later):
        next(stream)


def test_a_stream_that_cannot_be_closed_ends_the_session() -> None:
    class Broken:
        def close(self) -> None:
            raise ValueError("cleanup failed")

    with pytest.raises(ValueError, match="cleanup failed"), session() as talk:
        talk._stream = Broken()
    assert talk.state is chapter.SessionState.CLOSED


def test_an_abandoned_stream_may_be_collected_in_a_write() -> None:
    with session() as talk:
        stream = talk.stream("Hello")
        next(stream)
        with talk._lock:  # as if the garbage collector ran in there
            assert talk._lock._is_owned(), "not an RLock: this would wait for ever"
            stream.close()
        assert talk.messages == []


def test_a_recorded_stream_ends_well_if_the_block_ends_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with session() as talk:
        record = talk._record

        def record_as_the_block_ends(*arguments: Any) -> None:
            record(*arguments)
            talk.state = chapter.SessionState.CLOSED

        monkeypatch.setattr(talk, "_record", record_as_the_block_ends)
        assert read_stream(talk, "Hello") == talk.messages[-1]["content"]


# --- Threads ---


@pytest.mark.parametrize("error", [None, ValueError()])
@pytest.mark.parametrize(
    ("speak", "chunks"),
    [
        (ask, ()),
        (read_stream, ()),
        (read_stream, (piece("a word", "stop"),)),
        (read_stream, (piece("a word"), NULLS)),
    ],
)
def test_a_block_does_not_wait_for_a_turn_in_a_thread(
    speak: Speak, chunks: tuple[Any, ...], error: Exception | None, journal: Path
) -> None:
    gate = Gate()
    script = [streamed(chunks[0], gate, *chunks[1:])] if chunks else []
    hold = str if chunks else gate
    with chapter.offline_client(*script, on_response=hold) as client, ThreadPoolExecutor(1) as pool:
        opened = chapter.llm_session("talk", client=client, journal=journal)
        talk = opened.__enter__()
        turn = pool.submit(speak, talk, "Hello")
        assert gate.reached.wait(30)
        opened.__exit__(error and type(error), error, None)
        assert talk.state is chapter.SessionState("failed" if error else "closed")
        gate.opened.set()
        assert isinstance(turn.exception(), chapter.SessionClosedError)
        after = kept(talk)
        with pytest.raises(
            chapter.SessionClosedError, match=rf"ended \({talk.state.value}\): open"
        ):
            speak(talk, "Hello?")
        assert kept(talk) == after  # nothing was sent
    assert talk.messages == []
    assert talk.usage.output_tokens > 0  # it was paid for
    with session(journal=journal) as talk:
        assert talk.messages == []


def test_a_second_turn_is_refused_at_once_in_any_thread() -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as pool, session(seen=gate) as talk:
        turn = pool.submit(ask, talk, "Hello")
        assert gate.reached.wait(30)
        for speak in (ask, read_stream):
            with pytest.raises(RuntimeError, match="'talk' is in a turn: finish or close"):
                speak(talk, "Me, too")
        gate.opened.set()
        assert turn.result() == talk.messages[-1]["content"]
        stream = talk.stream("And now?")
        next(stream)
        with pytest.raises(RuntimeError, match="'talk' is in a turn"):
            next(talk.stream("Me, too"))
        assert talk.messages[2:] == []
        list(stream)
        assert len(talk.messages) == 4


def test_what_threads_share_changes_only_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked: list[str] = []

    def set_attribute(talk: Any, name: str, value: object) -> None:
        if value is not False and not talk._lock._is_owned():  # False: the turn is over
            unlocked.append(name)
        object.__setattr__(talk, name, value)

    with session() as talk:
        monkeypatch.setattr(chapter.LLMSession, "__setattr__", set_attribute)
        talk.ask("Hello")
    assert set(unlocked) == {"_stream"}  # which only the turn that runs may change


# --- The journal ---


def test_the_same_name_and_journal_resume_the_conversation(journal: Path) -> None:
    with decimal.localcontext(prec=1):  # the caller's precision makes no difference
        with session(None, chapter.failed(400), journal=journal) as talk:
            talk.ask("first")
            with suppress(openai.BadRequestError):
                talk.ask("bad")
            talk.ask("second")
            before = kept(talk)
        with session(journal=str(journal)) as talk:
            assert kept(talk) == before
            (mode,) = talk.journal.execute("PRAGMA journal_mode").fetchone()
            (synchronous,) = talk.journal.execute("PRAGMA synchronous").fetchone()
            assert (mode, synchronous) == ("delete", 3)  # EXTRA: the directory is synced, too
            talk.ask("third")
            assert (len(talk.messages), talk.usage.requests) == (6, 4)
        assert decimal.getcontext().prec == 1
    assert talk.cost == talk.price(talk.usage)
    with session(name="another", journal=journal) as talk:
        assert kept(talk) == ([], chapter.Usage(), 0)


@pytest.fixture(scope="module")
def long_journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What is in the file of a journal with thirty turns."""
    file = tmp_path_factory.mktemp("long") / "journal"
    with session(journal=file) as talk:
        talk.journal.execute("PRAGMA synchronous = OFF")
        for _turn in range(30):
            talk.ask("Hello " * 100)
    return file.read_bytes()


DAMAGE: dict[str, bytes | str | Callable[[bytes], bytes]] = {  # new content, SQL, or an edit
    "text": b"Not a database. " * 100,
    "one byte": b"x",
    "half a header": b"SQLite format 3\0",
    "another database": "PRAGMA application_id = 0; PRAGMA journal_mode = WAL",
    "no end": lambda content: content[:-5000],
    "noise": lambda content: content[:9000] + b"noise" * 600 + content[12000:],
    "a bad cost": "UPDATE turns SET cost = 'x'",
    "a bad count": "UPDATE turns SET input_tokens = NULL",
    "a bad text": "UPDATE turns SET prompt = CAST(x'ff' AS TEXT)",
    "no text": "UPDATE turns SET reply = x'ff'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused_and_untouched(
    damage: str, tmp_path: Path, long_journal: bytes
) -> None:
    file = tmp_path / "journal"
    file.write_bytes(long_journal)
    match DAMAGE[damage]:
        case bytes() as content:
            file.write_bytes(content)
        case str() as statements:
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(statements)
        case edit:
            file.write_bytes(edit(long_journal))
    before = file.read_bytes()
    reason = "is not a journal of sessions: choose|cannot be used: .+|is damaged in the journal: "
    with pytest.raises(chapter.JournalError, match=reason):
        session(journal=file).__enter__()
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["journal"]


def test_a_set_up_that_was_killed_half_way_is_undone_first(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "dying", isolation_level=None)) as dying:
        dying.executescript("PRAGMA cache_size = 1; BEGIN; CREATE TABLE turns (half)")
        dying.execute("INSERT INTO turns VALUES (zeroblob(100000))")  # so pages are written now
        for end in ("", "-journal"):
            (tmp_path / f"journal{end}").write_bytes((tmp_path / f"dying{end}").read_bytes())
    assert (tmp_path / "journal").stat().st_size > 0, "the test would prove nothing"
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("Hello")


def test_of_two_blocks_on_one_conversation_none_overwrites(journal: Path) -> None:
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


def test_opening_a_journal_leaves_the_locks_of_another_session(journal: Path) -> None:
    """Where a process closes a file, POSIX drops all locks that it has on the file."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], 0).execute('BEGIN IMMEDIATE')"
    command = [sys.executable, "-c", code, str(journal)]
    with session(journal=journal) as talk:
        talk.journal.execute("BEGIN IMMEDIATE")
        with session(journal=journal):
            assert b"is locked" in subprocess.run(command, stderr=subprocess.PIPE).stderr


def test_many_threads_may_open_a_new_journal_at_one_moment(tmp_path: Path) -> None:
    threads = 16
    start = threading.Barrier(threads)

    def talk_in(path: Path, number: int) -> None:
        start.wait(30)
        with session(name=f"talk {number}", journal=path) as talk:
            talk.ask("Hello")

    for trial in range(2):
        path = tmp_path / f"journal {trial}"
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(talk_in, path), range(threads)))
        with chapter.open_journal(path) as journal:
            assert journal.execute("SELECT count(*) FROM turns").fetchone() == (threads,)


def test_a_turn_that_cannot_be_written_has_not_happened(journal: Path) -> None:
    costs = [Decimal(1), 0.1, 0.1]  # the last two when a call is paid for
    with session(journal=journal) as talk:
        talk.ask("first")
        talk.journal.execute("PRAGMA query_only = ON")  # as if the disk were full
        before = talk.messages
        with pytest.raises(sqlite3.OperationalError) as caught:
            talk.ask("second")
        assert "The journal does not have this: attempt to" in caught.value.__notes__[0]
        assert (talk.messages, talk.usage.requests) == (before, 2)
        assert talk.cost == chapter.list_price(talk.usage, MODEL)
        talk.journal.execute("PRAGMA query_only = OFF")
        talk.ask("second")
        after = talk.messages
    with session(journal=journal, price=lambda usage: costs.pop(0)) as talk:
        assert talk.messages == after
        with pytest.raises(TypeError, match="must return a Decimal") as no_price:
            talk.ask("third")
        assert "The journal does not have this: price must" in no_price.value.__notes__[0]
        assert talk.messages == after


@contextmanager
def ctrl_c_at_call(number: int, first: Callable[[], object]) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at a call of the session: Python handles signals only at calls.

    That is as a function begins, or after one in C has ended. What a generator resumes is left
    out, since an error in the hook would skip its `finally`; so is what the garbage collector
    ends.
    """
    calls: list[str] = []

    def on_event(frame: Any, event: str, _argument: object) -> None:
        begins = event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if frame.f_globals is vars(chapter) and (begins or event == "c_return"):
            calls.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(calls) == number:
                first()
                raise KeyboardInterrupt

    gc.disable()
    sys.setprofile(on_event)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        gc.enable()


def test_ctrl_c_or_a_kill_at_any_call_loses_no_recorded_turn(tmp_path: Path) -> None:
    file, copy = tmp_path / "journal", tmp_path / "copy"
    notes = set()
    for number in count(1):
        name = f"talk {number}"
        with session(name=name, journal=file) as talk:
            talk.journal.execute("PRAGMA synchronous = OFF")  # this is not about power cuts
            talk.ask("first")
            try:
                # The copy is what a process leaves that is killed there.
                with ctrl_c_at_call(number, lambda: shutil.copy(file, copy)) as calls:
                    talk.ask("second")
            except KeyboardInterrupt as interrupt:
                notes.add(" ".join(getattr(interrupt, "__notes__", ())).replace(name, "talk"))
            if len(calls) < number:
                break
            turns = len(talk.messages) // 2
            talk.ask("third")
            after = kept(talk)
        with session(name=name, journal=file) as talk:
            assert kept(talk) == after, calls[-1]
            asked = [said["content"] for said in talk.messages[::2]]
            assert asked == [*["first", "second"][:turns], "third"], calls[-1]
        with session(name=name, journal=copy) as talk:
            assert len(talk.messages) == 2 * turns, calls[-1]
    assert number > 20, "the test would prove nothing"
    recorded = "Session 'talk', turn 2: complete and kept."
    assert {note for note in notes if "rolled back" not in note} == {"", recorded}


# --- Killed: each child is a fork of a process that has the chapter loaded already ---

KILLED = """
import gc, json, os, random, runpy, select, signal, sys
os.environ.pop("OPENAI_API_KEY", None)
chapter = runpy.run_path(sys.argv[1])
chapter["encoding_for"]("gpt-4o-mini")
gc.freeze()

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


@both_ways
def test_the_key_is_in_no_repr_log_error_or_journal(
    speak: Speak, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    responses: list[httpx2.Response] = []
    error = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": KEY}}
    with session(
        httpx2.Response(401, json=error), key=KEY, journal=journal, seen=responses.append
    ) as talk:
        with pytest.raises(openai.AuthenticationError, match=r"provided: \*\*\*") as caught:
            speak(talk, "Hello")
        shown = [repr(talk), repr(talk._begin("x")), repr(caught.value), caught.value.message]
    shown += traceback.format_exception(caught.value)
    shown += [caplog.text, *(repr(record.__dict__) for record in caplog.records)]
    shown.append(journal.read_bytes().decode("latin-1"))
    assert KEY in responses[0].request.headers["authorization"], "the test would prove nothing"
    assert not [text for text in shown if KEY in text]


def test_an_ordinary_word_that_serves_as_key_is_left_in_errors() -> None:
    error = {"error": {"message": "ollama-local: no such model"}}
    with session(httpx2.Response(404, json=error), key="ollama-local") as talk:
        with pytest.raises(openai.NotFoundError, match="ollama-local: no such model"):
            talk.ask("Hello")


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"{KEY} ", f"{KEY}é"])
def test_a_malformed_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        session(key=key).__enter__()
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_azure_with_an_entra_token_needs_no_key() -> None:
    transport = httpx2.MockTransport(lambda request: answer(ask, HI))
    with (
        openai.AzureOpenAI(
            azure_endpoint="https://stand-in.invalid",
            azure_ad_token="a token",
            api_version="2024-10-21",
            http_client=httpx2.Client(transport=transport),
        ) as client,
        chapter.llm_session("talk", client=client) as talk,
    ):
        assert talk.ask("Hello") == "Hi"


# --- The cleanup contract ---


@contextmanager
def changed(expected: object, target: object, name: str, value: object) -> Iterator[object]:
    """A fault for the contract, and the error that must come out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield expected


def session_subject(journal: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Sessions that make their own client; the oracle looks for open clients and open files."""
    made: list[openai.OpenAI] = []
    names = (f"talk {number}" for number in count())
    real, close = openai.OpenAI, openai.OpenAI.close
    journal.touch()

    def own_client(**options: Any) -> openai.OpenAI:
        made.append(real(**options) if options else chapter.offline_client())
        return made[-1]

    def leaks() -> list[object]:
        files = [file for file in open_descriptors().values() if file == str(journal)]
        return files + [client for client in made if not client.is_closed()]

    def failing(*arguments: object) -> None:
        raise OSError("set-up failed")

    def failing_close(client: openai.OpenAI) -> None:
        close(client)
        raise OSError("cleanup failed")

    monkeypatch.setattr(chapter, "OpenAI", own_client)
    damaged = chapter.JournalError
    return Subject(
        open=lambda: chapter.llm_session(next(names), journal=journal),
        leaks=leaks,
        use=lambda talk: talk.ask("Hello"),
        closed_error=chapter.SessionClosedError,
        setup_faults=[
            lambda: changed(damaged, chapter, "SET_UP", "CREATE TABLE broken ("),
            lambda: changed(OSError, chapter, "LLMSession", failing),
            lambda: changed(damaged, chapter, "APPLICATION_ID", 0),
        ],
        cleanup_faults=[lambda: changed(OSError, openai.OpenAI, "close", failing_close)],
    )


def journal_subject(journal: Path, _patch: object) -> Subject:
    return Subject(
        open=lambda: chapter.open_journal(journal),
        leaks=lambda: [file for file in open_descriptors().values() if file == str(journal)],
        use=lambda rows: rows.execute("SELECT * FROM turns"),
        closed_error=sqlite3.ProgrammingError,
        setup_faults=[lambda: changed(chapter.JournalError, chapter, "SET_UP", "BROKEN (")],
        cleanup_faults="each row is on the disk by then: closing writes nothing",
    )


@pytest.fixture
def talk() -> Iterator[Any]:
    with session() as talk:
        yield talk


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
def test_a_turn_keeps_the_cleanup_contract(way: Way, talk: Any) -> None:
    way(
        Subject(
            open=lambda: talk._turn("Hello"),
            leaks=lambda: talk._in_turn or len(talk.messages) % 2,
            nestable=False,
            concurrent=False,
            setup_faults=[lambda: changed(chapter.ContextWindowError, talk, "max_input_tokens", 0)],
            cleanup_faults="if a failed turn cannot be recorded, a note on its error says so",
        )
    )


def environment_subject(_journal: object, _patch: object) -> Subject:
    return Subject(
        open=lambda: chapter.temporary_environment("TALK", "yes"),
        leaks=lambda: os.environ.get("TALK"),
        concurrent=False,  # the environment belongs to all threads
        setup_faults="a text can be set at any time",
        cleanup_faults="and deleted, too",
    )


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [session_subject, journal_subject, environment_subject])
def test_each_manager_keeps_the_cleanup_contract(
    make: Callable[..., Subject], way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(make(tmp_path / "journal", monkeypatch))


# --- The script ---


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Play the script in this process. Return what it printed."""

    def play(*arguments: str) -> str:
        monkeypatch.setattr(chapter, "live", False)
        monkeypatch.setattr(sys, "argv", [chapter_path(2).name, *arguments])
        assert chapter.main() == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        return str(printed)

    return play


def test_only_live_asks_the_model_of_the_environment(
    play: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    responses: list[httpx2.Response] = []
    client = chapter.offline_client(on_response=responses.append)
    monkeypatch.setattr(chapter, "OpenAI", lambda: client)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_MODEL", "llama3.2")
    text = play("6", "--live")
    asked = [json.loads(response.request.content) for response in responses]
    assert {request["model"] for request in asked} == {"llama3.2"}
    prompts = [said["content"] for said in asked[-1]["messages"][::2]]
    assert "".join(prompt.split("\n", 1)[1] for prompt in prompts) == chapter.SOURCE
    assert "No price is known for llama3.2" in text
    assert len(asked) == PARTS


def test_each_demo_shows_what_its_lesson_says(play: Callable[..., str]) -> None:
    _above, life, tokens, turns, stream, kill, review = re.split(r"(?m)^\d · .+$", play())
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
    reported, found = re.findall(r"✓ Of (\d+) turns that it reported, `talk.db` has (\d+)", kill)[0]
    assert 3 <= int(reported) <= int(found) <= int(reported) + 1
    assert f"✗ Of {reported} turns that it reported, `talk.txt` has " in kill
    assert (review.count("HTTP 429"), review.count("HTTP 500")) == (2, 6)
    assert f"✗ Paid for {PARTS + 2} answers, for {PARTS} parts." in review
    assert f"✓ Paid for {PARTS} answers, for {PARTS} parts." in review
