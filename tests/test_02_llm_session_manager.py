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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import httpx2
import openai
import pytest
from conftest import chapter_path, load_chapter
from contract import SYNC_WAYS, Subject, Way
from left_behind import open_descriptors
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
chapter: Any = load_chapter(2)
Usage, ask = chapter.Usage, chapter.LLMSession.ask
PARTS = len(range(0, chapter.SOURCE.count("\n"), 200))  # contextlib grows with each Python
MODEL = "gpt-4o-mini"
HELLO_TOKENS = 8  # of a request with this one word
KEY = "sk-fake-Zq7x0WcM2vT9"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@contextmanager
def session(
    *script: Any, name: str = "talk", key: str = "offline", seen: Any = str, **options: Any
) -> Iterator[Any]:
    """A session whose server follows the script; `seen` is called with each response."""
    with chapter.offline_client(*script, on_response=seen) as client:
        client.api_key, client.max_retries = key, 0
        with chapter.llm_session(name, client=client, **options) as opened:
            yield opened


def read_stream(talk: Any, prompt: str) -> str:
    return "".join(talk.stream(prompt))


def kept(talk: Any) -> tuple[Any, Any, Any]:
    """All that a session remembers, and a journal with it."""
    return talk.messages, talk.usage, talk.cost


def completion(said: object, finish: str | None = "stop", **more: Any) -> str:
    return json.dumps({"choices": [{"message": said, "finish_reason": finish}], **more})


def piece(said: object, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish}]}


def usage_report(prompt: Any, completed: Any, cached: Any = 0) -> dict[str, Any]:
    tokens = {"prompt_tokens": prompt, "completion_tokens": completed}
    return tokens | {"prompt_tokens_details": {"cached_tokens": cached}}


def sent(text: str) -> httpx2.Response:
    kind = "text/html" if text.startswith("<") else "application/json"
    return httpx2.Response(200, text=text, headers={"content-type": kind})


def wait_twice(gate: threading.Barrier, _response: object = None) -> None:
    """Hold a server: first until the test sees it here, then until the test lets it go on."""
    gate.wait(30)
    gate.wait(30)


def streamed(*events: Any, kind: str = "text/event-stream") -> httpx2.Response:
    """A stream of these chunks. An error among them is raised, and a gate holds what follows."""

    def lines() -> Iterator[bytes]:
        for event in events:
            if isinstance(event, threading.Barrier):
                wait_twice(event)
            elif isinstance(event, Exception):
                raise event
            else:
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()

    return httpx2.Response(200, content=lines(), headers={"content-type": kind})


# --- Tokens and cost ---


def test_the_encodings_give_the_published_tokens() -> None:
    assert chapter.encoding_for("gpt-4").encode("hello world") == [15339, 1917]
    for model in ("gpt-4o", "llama3.2", "text-davinci-003"):  # the latter's is not in the wheel
        assert chapter.encoding_for(model).encode("hello world") == [24912, 2375]


def test_the_chat_rule_counts_messages_names_and_the_reply() -> None:
    said = [chapter.message("user", "<|endoftext|>")]  # it looks like a special token, but is text
    assert chapter.count_tokens(said, "gpt-4o") == 3 + 3 + 1 + 7
    named = [*said, {"role": "user", "name": "user", "content": ""}]
    assert chapter.count_tokens(named, "gpt-4o") == 3 + 3 + 1 + 7 + 3 + 1 + 1 + 1


def test_threads_load_a_tokenizer_once_and_offline(tmp_path: Path, monkeypatch: Patch) -> None:
    load = openai_public.load_tiktoken_bpe

    def load_locked(*arguments: Any, **options: Any) -> Any:
        assert chapter.loading.locked()  # the environment belongs to all threads
        return load(*arguments, **options)

    damaged = tmp_path / chapter.RANK_FILES["o200k_base"]
    damaged.write_bytes(b"damaged")  # tiktoken would delete it, since its checksum is wrong
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load_locked)
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=AssertionError))
    chapter.encoding_for.cache_clear()
    with ThreadPoolExecutor(16) as pool:
        loaded = set(pool.map(chapter.encoding_for, ["gpt-4o", "gpt-4"] * 8))
    assert len(loaded) == 2
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"damaged"]


def test_sums_and_prices_are_exact_also_of_cached_input() -> None:
    with decimal.localcontext(prec=2):  # the caller's precision makes no difference
        for model, usage, dollars in (
            ("gpt-4o-mini", Usage(1, 234, 0, 67) + Usage(1, 1000, 1000, 500), "0.0004503"),
            ("o3", Usage(1, 1000, 0, 100), "0.0028"),  # today's price: once it was 5 times as much
        ):
            price = partial(chapter.list_price, model=model)
            assert chapter.cost_of(usage, price) == Decimal(dollars)


def test_without_a_known_price_the_block_does_not_begin(journal: Path) -> None:
    for model in ("llama3.2", "claude-3-5-haiku-latest"):
        with pytest.raises(LookupError, match=rf"price of '{model}' is unknown: pass price="):
            session(model=model, journal=journal).__enter__()
    with pytest.raises(TypeError, match=r"must return a Decimal, not 0\.1"):
        session(price=lambda usage: 0.1, journal=journal).__enter__()
    assert not journal.exists()
    with session(model="llama3.2", price=lambda usage: Decimal(2)) as talk:
        talk.ask("Hello")
        assert talk.cost == 2


# --- A turn is a transaction ---

NULLS = {"id": None, "choices": None, "usage": None}
HI, NO_GPU = {"content": "Hi"}, {"error": {"message": "ollama-local: no GPU"}}
HI_TWICE = [piece({"content": text}) for text in ("", "Hi", " Hi")]
REPORTED, BILL = usage_report(100, 7, cached=100), Usage(1, 100, 100, 7)
WRONG, LOST = chapter.AnswerError, httpx2.ReadError("lost")
# What the server does: an item of a script. Then the error, its text, and the bill: as reported, or
# as many output tokens as were counted.
FAILURES: dict[str, tuple[Any, type[BaseException], str, Any]] = {
    "404": (httpx2.Response(404, json=NO_GPU), openai.NotFoundError, "ollama-local: no GPU", 0),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, "", 0),
    "malformed JSON": (sent('{"choices": ['), WRONG, "cannot be read: ", 0),
    "too deep JSON": (sent("[" * 100_000), WRONG, "cannot be read: ", 0),
    "an error": (sent(json.dumps({"error": "wait, " * 25 + "no GPU"})), WRONG, "no GPU", 0),
    "nulls": (sent(json.dumps(NULLS)), WRONG, "", 0),
    "no UTF-8": (sent(completion({"content": "\ud800"})), WRONG, "", 0),
    "no text, but a bill": (sent(completion({}, usage=REPORTED)), WRONG, "no text", BILL),
    "an empty end": (sent(completion(HI, "")), WRONG, "no text, or no end: ['Hi']", 1),
    "negative usage": (sent(completion(HI, usage=usage_report(5, -1))), WRONG, "impossible: ", 1),
    "more is cached": (sent(completion(HI, usage=usage_report(5, 1, 6))), WRONG, "impossible: ", 1),
    "huge usage": (sent(completion(HI, usage=usage_report(10**12, 1))), WRONG, "impossible: ", 1),
    "infinite": (sent(completion(HI, usage=usage_report(1e999, 1))), WRONG, "impossible: ", 1),
    "HTML for a stream": (sent("<h1>Hi</h1>\n<p>..."), WRONG, "<h1>Hi", 0),
    "an error for a stream": (sent(json.dumps(NO_GPU)), WRONG, "no GPU", 0),
    "a page for a stream, cut off": (streamed("<h1>", LOST, kind="text/html"), WRONG, ": lost", 0),
    "a lost stream": (streamed(*HI_TWICE, LOST), openai.APIConnectionError, "", 2),
    "a malformed stream": (streamed(*HI_TWICE, "{"), WRONG, "cannot be read: ", 2),
    "an error in a stream": (streamed(*HI_TWICE, NO_GPU), openai.APIError, "no GPU", 2),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_turn_leaves_no_trace_but_its_bill(case: str, journal: Path, caplog: Log) -> None:
    caplog.set_level(logging.INFO, "workshop.session")
    item, expected, text, bill = FAILURES[case]
    speak = read_stream if "stream" in case else ask
    # An ordinary word that serves as key is no secret: it stays in errors.
    with session(None, item, key="ollama-local", journal=journal) as talk:
        speak(talk, "first")
        before, usage, _cost = kept(talk)
        if isinstance(bill, int):
            request = [*before, chapter.message("user", "second")]
            bill = Usage(1, bill and chapter.count_tokens(request, MODEL), 0, bill)
        with pytest.raises(expected) as caught:
            speak(talk, "second")
        assert text in str(caught.value)
        assert kept(talk) == (before, usage + bill, talk.price(usage + bill))
        note = f"'talk', turn 2: rolled back, {bill.output_tokens} output token(s) billed."
        assert caught.value.__notes__ == [f"Session {note}"]
        assert note in caplog.text
        assert speak(talk, "second") == talk.messages[-1]["content"]
        after = kept(talk)
    with session(journal=journal) as talk:
        assert kept(talk) == after


CALL = {"index": 0, "function": {"name": "now", "arguments": "{}"}}
ANSWERS = [({"content": ""}, ""), ({"refusal": "No."}, "No."), ({"tool_calls": [CALL]}, "now{}")]


@pytest.mark.parametrize(("said", "text"), ANSWERS)
def test_a_text_a_refusal_and_a_call_are_answers_and_counted(said: Any, text: str) -> None:
    bill = Usage(1, HELLO_TOKENS, 0, 2 if text else 0)
    with session(sent(completion(said))) as talk:  # without a usage
        assert talk.ask("Hello") == text
        assert talk.messages[-1] == {"role": "assistant", "content": text}
        assert talk.usage == bill
    second = piece({"content": "Another"}, index=1)  # of n=2
    with session(streamed(piece(said, "stop"), second, "[DONE]")) as talk:
        assert (read_stream(talk, "Hello"), talk.usage) == (text, bill)


def test_system_message_and_options_reach_the_api(journal: Path) -> None:
    for turn, speak in enumerate(("ask", "stream"), 1):
        seen: list[httpx2.Response] = []
        with session(journal=journal, system="Be brief.", seen=seen.append) as talk:
            "".join(getattr(talk, speak)("Hello", temperature=0.5))
        asked = json.loads(seen[0].request.content)
        assert asked["temperature"] == 0.5
        assert asked["messages"] == talk.messages[:-1]
        assert talk.messages[0] == {"role": "system", "content": "Be brief."}
        assert len(talk.messages) == 1 + 2 * turn


def test_a_question_that_cannot_be_encoded_is_its_own_fault() -> None:
    with session() as talk, pytest.raises(UnicodeEncodeError):
        talk.ask("\ud800")
    assert (talk.messages, talk.usage.requests) == ([], 1)


def test_a_prompt_that_is_too_long_is_not_sent() -> None:
    with session(KeyboardInterrupt(), max_input_tokens=HELLO_TOKENS - 1) as talk:
        with pytest.raises(chapter.ContextWindowError, match="would send 8 tokens"):
            talk.ask("Hello")
        assert (talk.messages, talk.usage) == ([], Usage())
    with session(max_input_tokens=HELLO_TOKENS) as talk:
        talk.ask("Hello")


# --- Streams and threads ---


def test_a_stream_that_is_not_read_is_closed_and_billed() -> None:
    seen: list[httpx2.Response] = []
    with session(streamed(*HI_TWICE, piece(HI)), seen=seen.append) as talk:
        stream = talk.stream("Hello")
        assert [next(stream), next(stream)] == ["Hi", " Hi"]
    assert seen[0].is_closed
    bill = Usage(1, HELLO_TOKENS, 0, 2)
    assert kept(talk) == ([], bill, talk.price(bill))
    with pytest.raises(chapter.SessionClosedError):
        next(stream)


def test_a_stream_that_cannot_be_closed_ends_the_session() -> None:
    with pytest.raises(ValueError, match="cleanup failed"), session() as talk:
        talk._stream = Mock(**{"close.side_effect": ValueError("cleanup failed")})
    assert talk.state is chapter.SessionState.CLOSED


def test_a_recorded_stream_ends_well_if_the_block_ends_then(monkeypatch: Patch) -> None:
    with session() as talk:
        record = talk._record

        def record_as_the_block_ends(*arguments: Any) -> None:
            record(*arguments)
            talk.state = chapter.SessionState.CLOSED

        monkeypatch.setattr(talk, "_record", record_as_the_block_ends)
        assert read_stream(talk, "Hello") == talk.messages[-1]["content"]


@pytest.mark.parametrize("chunks", [(), (piece(HI, "stop"),), (piece(HI), NULLS)])
def test_a_block_does_not_wait_for_a_turn_in_a_thread(chunks: Any, journal: Path) -> None:
    gate = threading.Barrier(2)
    speak = read_stream if chunks else ask
    script = [streamed(chunks[0], gate, *chunks[1:])] if chunks else []
    seen = str if chunks else partial(wait_twice, gate)
    with ThreadPoolExecutor(1) as pool:
        with session(*script, seen=seen, journal=journal) as talk:
            turn = pool.submit(speak, talk, "Hello")
            gate.wait(30)
        gate.wait(30)
        assert isinstance(turn.exception(), chapter.SessionClosedError)
    after = kept(talk)
    with pytest.raises(chapter.SessionClosedError, match=r"ended \(closed\): open it again"):
        speak(talk, "Hello?")
    assert kept(talk) == after  # nothing was sent
    assert talk.messages == []
    assert talk.usage.output_tokens > 0  # it was paid for
    with session(journal=journal) as talk:
        assert talk.messages == []


def test_a_second_turn_is_refused_at_once_in_any_thread() -> None:
    gate = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool, session(seen=partial(wait_twice, gate)) as talk:
        turn = pool.submit(ask, talk, "Hello")
        gate.wait(30)
        for speak in (ask, read_stream):
            with pytest.raises(RuntimeError, match="'talk' is in a turn: finish or close"):
                speak(talk, "Me, too")
        gate.wait(30)
        assert turn.result() == talk.messages[-1]["content"]


def test_what_threads_share_changes_only_under_the_lock(monkeypatch: Patch) -> None:
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
        with session(journal=journal) as talk:
            talk.ask("first")
            talk.ask("second")
        with session(journal=str(journal)) as again:
            assert kept(again) == kept(talk)
            synchronous = again.journal.execute("PRAGMA synchronous").fetchone()
            assert synchronous == (3,)  # EXTRA: the directory is synced, too
            again.ask("third")
    assert (len(again.messages), again.cost) == (6, again.price(again.usage))
    with session(name="another", journal=journal) as other:
        assert kept(other) == ([], Usage(), 0)


FOREIGN, UNUSABLE = "is not a journal of sessions: choose", "cannot be used: "
LOST_TURN = "session 'talk' is damaged in the journal: "
DAMAGE: dict[str, tuple[Any, str]] = {  # SQL, or an edit of the file; then the error
    "text": (lambda content: b"Not a database. " * 100, UNUSABLE),
    "noise": (lambda content: content[:8192] + b"noise" * 100 + content[8692:], UNUSABLE),
    "another database": ("PRAGMA application_id = 0; PRAGMA journal_mode = WAL", FOREIGN),
    "a bad cost": ("UPDATE turns SET cost = 'x'", LOST_TURN),
    "a bad count": ("UPDATE turns SET input_tokens = NULL", LOST_TURN),
    "a bad text": ("UPDATE turns SET prompt = CAST(x'ff' AS TEXT)", LOST_TURN),
    "no text": ("UPDATE turns SET reply = x'ff'", LOST_TURN),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_an_unusable_file_is_refused_and_untouched(damage: Any, reason: str, journal: Path) -> None:
    with session(journal=journal) as talk:
        talk.ask("Hello")
    if isinstance(damage, str):
        with closing(sqlite3.connect(journal)) as connection:
            connection.executescript(damage)
    else:
        journal.write_bytes(damage(journal.read_bytes()))
    before = journal.read_bytes()
    with pytest.raises(chapter.JournalError, match=reason):
        session(journal=journal).__enter__()
    assert journal.read_bytes() == before
    assert os.listdir(journal.parent) == ["journal"]


def test_a_set_up_that_was_killed_half_way_is_undone_first(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "dying", isolation_level=None)) as dying:
        dying.executescript("PRAGMA cache_size = 1; BEGIN; CREATE TABLE turns (half)")
        dying.execute("INSERT INTO turns VALUES (zeroblob(100000))")  # so pages are written now
        for end in ("", "-journal"):
            shutil.copy(tmp_path / f"dying{end}", tmp_path / f"journal{end}")
    assert (tmp_path / "journal").stat().st_size > 0, "the test would prove nothing"
    with session(journal=tmp_path / "journal") as talk:
        talk.ask("Hello")


def test_of_two_blocks_on_one_conversation_none_overwrites(journal: Path) -> None:
    with session(journal=journal) as one, session(journal=journal) as other:
        one.ask("from one")
        with pytest.raises(chapter.JournalError, match="another session already wrote"):
            other.ask("from the other")
        assert (other.messages, other.usage.requests) == ([], 1)
        one.ask("and on")
    with session(journal=journal) as talk:
        assert talk.messages == one.messages
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
    start = threading.Barrier(16)
    chapter.encoding_for(MODEL)  # now, so that no thread waits for it

    def talk_in_a_thread(number: int) -> None:
        start.wait(30)
        with session(name=str(number), journal=tmp_path / f"journal {number // 16}") as talk:
            talk.ask("Hello")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(talk_in_a_thread, range(32)))


def test_a_turn_that_cannot_be_written_has_not_happened(journal: Path) -> None:
    with session(journal=journal) as talk:
        talk.ask("first")
        talk.journal.execute("PRAGMA query_only = ON")  # as if the disk were full
        before = talk.messages
        with pytest.raises(sqlite3.OperationalError) as caught:
            talk.ask("second")
        assert "The journal does not have this: attempt to" in caught.value.__notes__[0]
        assert (talk.messages, talk.usage.requests) == (before, 2)
        assert talk.cost == talk.price(talk.usage)
        talk.journal.execute("PRAGMA query_only = OFF")
        talk.ask("second")
    with session(journal=journal) as again:
        assert again.messages == talk.messages


def test_ctrl_c_at_any_call_loses_no_recorded_turn(tmp_path: Path) -> None:
    """At a call: Python handles signals as a function begins, or after one in C has ended.

    What a generator resumes is left out, since an error in the hook would skip its `finally`; so
    is what the collector ends.
    """
    calls, notes = list[str](), set()

    def on_event(frame: Any, event: str, _argument: object) -> None:
        begins = event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if frame.f_globals is vars(chapter) and (begins or event == "c_return"):
            calls.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(calls) == number:
                raise KeyboardInterrupt

    for number in count(1):
        calls.clear()
        journal = tmp_path / str(number)
        with session(journal=journal) as talk:
            talk.journal.execute("PRAGMA synchronous = OFF")  # this is not about power cuts
            talk.ask("first")
            gc.disable()
            sys.setprofile(on_event)
            try:
                talk.ask("second")
            except KeyboardInterrupt as interrupt:
                notes.add(" ".join(getattr(interrupt, "__notes__", ())))
            finally:
                sys.setprofile(None)
                gc.enable()
            if len(calls) < number:
                break
            turns = len(talk.messages) // 2
            talk.ask("third")
        with session(journal=journal) as again:
            assert kept(again) == kept(talk), calls[-1]
            asked = [said["content"] for said in again.messages[::2]]
            assert asked == [*["first", "second"][:turns], "third"], calls[-1]
    recorded = "Session 'talk', turn 2: complete and kept."
    assert {note for note in notes if "rolled back" not in note} == {"", recorded}


# Each child is a fork of a process that has the chapter loaded already.
KILLED = """
import os, random, select, signal, sys
from conftest import load_chapter
chapter = load_chapter(2)
chapter.encoding_for("gpt-4o-mini")
turns = [0] * 10
for trial in range(50):
    path = f"{sys.argv[1]}/{trial % 10}"  # some are new, some are resumed
    readable, writable = os.pipe()
    if not (child := os.fork()):
        os.dup2(writable, 1)
        try:
            chapter.talk_on(path)
        finally:
            os._exit(1)
    os.close(writable)
    rng = random.Random(trial)
    said = b"".join(os.read(readable, 4) for _turn in range(rng.randrange(4)))
    select.select([], [], [], rng.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child has failed"
    said += os.read(readable, 65536)
    os.close(readable)
    acknowledged = int(said.split()[-1]) if said else turns[trial % 10]
    with chapter.offline_client() as client:
        with chapter.llm_session("talk", client=client, journal=f"{path}.db") as talk:
            found = turns[trial % 10] = talk.usage.requests
            assert len(talk.messages) == 2 * found
            assert acknowledged <= found <= acknowledged + 1, (acknowledged, found)
assert sum(turns) > 50
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_fifty_moments_it_loses_no_acknowledged_turn(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parent, check=True)


# --- The API key ---


def test_the_key_is_in_no_repr_log_error_or_journal(journal: Path, caplog: Log) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[httpx2.Response] = []
    error = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": KEY}}
    refused = httpx2.Response(401, json=error)
    with session(refused, key=KEY, journal=journal, seen=seen.append) as talk:
        with pytest.raises(openai.AuthenticationError, match=r"provided: \*\*\*") as caught:
            talk.ask("Hello")
    shown = [repr(talk), caught.value.message, *traceback.format_exception(caught.value)]
    shown += [caplog.text, *(repr(record.__dict__) for record in caplog.records)]
    shown.append(journal.read_bytes().decode("latin-1"))
    assert KEY in seen[0].request.headers["authorization"], "the test would prove nothing"
    assert not [text for text in shown if KEY in text]


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"{KEY} ", f"{KEY}é"])
def test_a_malformed_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        session(key=key).__enter__()
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_azure_with_an_entra_token_needs_no_key() -> None:
    where: Any = {"azure_endpoint": "https://stand-in.invalid", "api_version": "2024-10-21"}
    with openai.AzureOpenAI(azure_ad_token="a token", **where) as client:
        chapter.check_key(client.api_key)


# --- The cleanup contract, and the script ---


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("manager", ["session", "journal", "turn", "environment"])
def test_each_manager_keeps_the_cleanup_contract(manager: str, way: Way, journal: Path) -> None:
    """Sessions make their own client here; the oracle looks for open clients and open files."""
    made: list[openai.OpenAI] = []
    names = (f"talk {number}" for number in count())
    real, close = openai.OpenAI, openai.OpenAI.close
    journal.touch()

    def own_client(**options: Any) -> openai.OpenAI:
        made.append(real(**options) if options else chapter.offline_client())
        return made[-1]

    def failing_close(client: openai.OpenAI) -> None:
        close(client)
        raise OSError("cleanup failed")

    def leaks() -> list[object]:
        files = [file for file in open_descriptors().values() if file == str(journal)]
        return files + [client for client in made if not client.is_closed()]

    with session() as talk, patch.object(chapter, "OpenAI", own_client):
        subjects = {
            "session": Subject(
                open=lambda: chapter.llm_session(next(names), journal=journal),
                leaks=leaks,
                use=lambda talk: talk.ask("Hello"),
                closed_error=chapter.SessionClosedError,
                setup_faults=[lambda: patch.object(chapter, "LLMSession", side_effect=OSError)],
                cleanup_faults=[lambda: patch.object(openai.OpenAI, "close", failing_close)],
            ),
            "journal": Subject(
                open=lambda: chapter.open_journal(journal),
                leaks=leaks,
                use=lambda rows: rows.execute("SELECT * FROM turns"),
                closed_error=sqlite3.ProgrammingError,
                setup_faults=[lambda: patch.object(chapter, "SET_UP", "BROKEN (")],
                cleanup_faults="each row is on the disk by then: closing writes nothing",
            ),
            "turn": Subject(
                open=lambda: talk._turn("Hello"),
                leaks=lambda: talk._in_turn or len(talk.messages) % 2,
                nestable=False,
                concurrent=False,
                setup_faults=[lambda: patch.object(talk, "max_input_tokens", 0)],
                cleanup_faults="if a failed turn cannot be recorded, a note on its error says so",
            ),
            "environment": Subject(
                open=lambda: chapter.temporary_environment("TALK", "yes"),
                leaks=lambda: os.environ.get("TALK"),
                concurrent=False,  # the environment belongs to all threads
                setup_faults="a text can be set at any time",
                cleanup_faults="and deleted, too",
            ),
        }
        way(subjects[manager])


def play(monkeypatch: Patch, *arguments: str) -> str:
    """Play the script in this process. Return what it printed."""
    monkeypatch.setattr(chapter, "live", False)
    monkeypatch.setattr(sys, "argv", [chapter_path(2).name, *arguments])
    with chapter.console.capture() as captured:
        assert chapter.main() == 0
    return str(captured.get())


def test_only_live_asks_the_model_of_the_environment(monkeypatch: Patch) -> None:
    seen: list[httpx2.Response] = []
    client = chapter.offline_client(on_response=seen.append)
    monkeypatch.setattr(chapter, "OpenAI", lambda: client)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_MODEL", "llama3.2")
    assert "No price is known for llama3.2" in play(monkeypatch, "6", "--live")
    asked = [json.loads(response.request.content) for response in seen]
    assert {request["model"] for request in asked} == {"llama3.2"}
    prompts = [said["content"] for said in asked[-1]["messages"][::2]]
    assert "".join(prompt.split("\n", 1)[1] for prompt in prompts) == chapter.SOURCE


def test_each_demo_shows_what_its_lesson_says(monkeypatch: Patch) -> None:
    demos = re.split(r"(?m)^\d · .+$", play(monkeypatch))
    _above, life, tokens, turns, stream, kill, review = demos
    assert "✗ After the block, `is_closed()` of the one passed in: True" in life
    assert "✓ After the block, `is_closed()` of the one passed in: False" in life
    assert "✓ SessionClosedError: session 'tutor' has ended (failed)" in life
    rows = re.findall(r"(?m)^(?:A context|上下文|with open).* (\d+) +(\d+) +(\d+) *$", tokens)
    assert rows[:3] == [("41", "10", "8"), ("16", "4", "12"), ("47", "12", "13")]
    assert "✓ Counted before: 15. Reported by the API: 15 in the request, 13 in the" in tokens
    assert "so this is $0.00001005." in tokens  # 15 * $0.15 + 13 * $0.60 for a million
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
