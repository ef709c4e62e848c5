# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 04 · Context without parameters

After this chapter you can give a session to the last helper without a parameter, in tasks and
in threads, and record every call of an OpenAI client that other code uses.

    python 04_smart_session.py          run all six demos
    python 04_smart_session.py 2 4      run demos 2 and 4
    python 04_smart_session.py --step   wait for Enter at each question
    python 04_smart_session.py --live   ask a real model

The demos run offline: a stand-in plays the model. With `--live` they ask OPENAI_MODEL at
OPENAI_BASE_URL, with OPENAI_API_KEY.

Read `smart_session` first: the rest is what can go wrong with it. Then look at the trees of
calls, and at the path that ran beside llamabot's.

Left out: the conversation itself (chapter 02), and a limit on what it costs (chapter 05).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import json
import logging
import os
import re
import signal
import sqlite3
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    ExitStack,
    aclosing,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import httpx2
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI, OpenAIError
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

T = TypeVar("T")
Clock = Callable[[], float]
logger = logging.getLogger("workshop.smart_session")

# What an ask without a session of its own model uses, and what the clients made below send through.
default_model = "gpt-4o-mini"
default_transport: Callable[[], httpx2.BaseTransport] = httpx2.HTTPTransport
default_async_transport: Callable[[], httpx2.AsyncBaseTransport] = httpx2.AsyncHTTPTransport


class SessionClosedError(RuntimeError):
    """The session's block has ended: it takes no more calls."""


@dataclass
class Call:
    """One HTTP request to the API, each attempt of the SDK by itself. None: not known (yet)."""

    path: str
    model: str | None = None  # as the reply names it, or else the request
    usage: Usage | None = None  # the tokens that the API reports
    cost: Decimal | None = None  # US dollars, by today's price list
    duration: float | None = None  # seconds, to the end of the reply
    error: str | None = None  # an exception's name, or an HTTP status


@dataclass(eq=False)
class Session:
    """The calls made in a block, and in the sessions nested in it. Tasks and threads share it."""

    name: str
    model: str | None = None  # the one that `ask` uses here
    parent: Session | None = None
    calls: list[Call] = field(default_factory=list)
    children: list[Session] = field(default_factory=list)
    closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def all_calls(self) -> list[Call]:
        """Its own calls, then those of the sessions nested in it."""
        return self.calls + [call for child in self.children for call in child.all_calls()]

    @property
    def cost(self) -> Decimal:
        """US dollars of all calls whose cost is known."""
        return sum((call.cost for call in self.all_calls() if call.cost), Decimal(0))

    def record(self, call: Call) -> None:
        """Add a call. Raises SessionClosedError once the session's block has ended."""
        with self._lock:  # or a thread could close it between the check and the append
            if self.closed:
                raise SessionClosedError(
                    f"session {self.name!r} is closed, its block has ended: "
                    "what goes on needs a `with smart_session(...):` of its own"
                )
            self.calls.append(call)

    def close(self) -> None:
        with self._lock:
            self.closed = True

    @contextmanager
    def as_current(self) -> Iterator[Self]:
        """Make it current once more: nested in itself, in another task, in a thread.

        It still ends with the block that opened it.
        """
        token = _current.set(self)
        try:
            yield self
        finally:
            try:
                _current.reset(token)
            except ValueError:
                # subtle: left in another context than entered, as when the event loop ends a
                # generator. That context is out of reach; raising would hide the block's error.
                logger.warning(
                    "session %r was left in a context that it was not entered in", self.name
                )


_current: ContextVar[Session | None] = ContextVar("current_session", default=None)


def current_session() -> Session | None:
    """The innermost session. A task that outlived its session still sees it, closed."""
    return _current.get()


@contextmanager
def smart_session(name: str, *, model: str | None = None) -> Iterator[Session]:
    """Open a session, current for every call that the block makes, however deep.

    It nests in the session around it, whose model it uses unless it has its own. Tasks and
    `asyncio.to_thread` inherit it; threads and executors have to be handed the context.
    """
    parent = current_session()
    while parent and parent.closed:  # we outlived it: nest in what is still open
        parent = parent.parent
    session = Session(name, model or (parent.model if parent else None), parent)
    if parent:
        parent.children.append(session)
    with closing(session), session.as_current():
        yield session


def isolated(generator: Generator[T, None, object]) -> Generator[T, None, None]:
    """The same items, but a session that the generator opens is current in it alone.

    Its steps run in one copy of the context of the first `next()`. This is for plain generators:
    with an async one, open the session around the loop.
    """
    context, end = copy_context(), object()
    try:
        while (item := context.run(next, generator, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        context.run(generator.close)


def ask(prompt: str, *, client: OpenAI | None = None, strict: bool = False) -> str:
    """The model's answer to a prompt; the call is recorded in the current session.

    client: made by `recording_client`; without it, one is opened for this call.
    strict: raise LookupError where no session is current, rather than log a warning.
    Raises SessionClosedError, and sends nothing, where the session's block has ended.
    """
    with nullcontext(client) if client else recording_client() as api:
        reply = api.chat.completions.create(**_chat_request(prompt, strict))
    return reply.choices[0].message.content or ""


async def ask_async(prompt: str, *, client: AsyncOpenAI | None = None, strict: bool = False) -> str:
    """`ask`, awaited: its client is made by `async_recording_client`."""
    async with nullcontext(client) if client else async_recording_client() as api:
        reply = await api.chat.completions.create(**_chat_request(prompt, strict))
    return reply.choices[0].message.content or ""


def _chat_request(prompt: str, strict: bool) -> dict[str, Any]:
    session = current_session()
    if strict and session is None:
        raise LookupError("no session is current: ask inside `with smart_session(...):`")
    model = (session and session.model) or default_model
    return {"model": model, "messages": [{"role": "user", "content": prompt}]}


def recording_client(
    transport: httpx2.BaseTransport | None = None, clock: Clock = time.perf_counter, **options: Any
) -> OpenAI:
    """An OpenAI client whose every call is recorded in the session current where it is made.

    Code that uses the client need not know: its transport does the recording.
    transport: what it sends through, `default_transport()` where it is None. This one asks no
    HTTPS_PROXY: for a proxy, pass `httpx2.HTTPTransport(proxy=...)`.
    clock: seconds, for durations. The options are those of OpenAI.
    """
    options.setdefault("api_key", os.environ.get("OPENAI_API_KEY", "none"))  # as for Ollama
    recorder = _Recorder(transport or default_transport(), clock)
    return OpenAI(http_client=DefaultHttpxClient(transport=recorder, headers=PLAIN), **options)


def async_recording_client(
    transport: httpx2.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
    **options: Any,
) -> AsyncOpenAI:
    """The same, asynchronous. Close it, best by `async with`, on the loop that uses it."""
    options.setdefault("api_key", os.environ.get("OPENAI_API_KEY", "none"))
    recorder = _Recorder(transport or default_async_transport(), clock)
    http_client = DefaultAsyncHttpxClient(transport=recorder, headers=PLAIN)
    return AsyncOpenAI(http_client=http_client, **options)


PLAIN = {"accept-encoding": "identity"}  # a compressed reply cannot be read as it passes by
PROVIDER = get_snapshot().find_provider(None, "openai", None)  # knows where replies count tokens
FLAVORS = {"completions": "chat", "responses": "responses", "embeddings": "embeddings"}


class _Recorder(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Hands each request to another transport, and records it: also one that fails."""

    def __init__(self, transport: Any, clock: Clock) -> None:
        self._transport, self._clock = transport, clock

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        with _Recording(request, self._clock) as recording:
            return recording.watch(self._transport.handle_request(request))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with _Recording(request, self._clock) as recording:
            return recording.watch(await self._transport.handle_async_request(request))

    def close(self) -> None:
        self._transport.close()

    async def aclose(self) -> None:
        await self._transport.aclose()


class _Recording(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """One call: a block that notes what it raises, then the reply's body, read along."""

    def __init__(self, request: httpx2.Request, clock: Clock) -> None:
        self.call = call = Call(request.url.path)
        with suppress(httpx2.RequestNotRead, LookupError, TypeError, ValueError):  # an upload
            call.model = json.loads(request.content)["model"]
        if session := current_session():
            session.record(call)  # raises where the session is closed: nothing is sent
        else:
            logger.warning("no session is current: %s is not recorded", call.path)
        self._clock, self._started = clock, clock()
        self._error: str | None = None
        self._kind, self._unread = "", bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error and not isinstance(error, GeneratorExit):  # that one: the reader has enough
            self._end(type(error).__name__)

    def watch(self, reply: httpx2.Response) -> httpx2.Response:
        """The same reply, with this recording as its body."""
        self._body: Any = reply.stream
        self._kind = reply.headers.get("content-type", "")
        self._error = f"HTTP {reply.status_code}" if reply.is_error else None
        return httpx2.Response(
            reply.status_code, headers=reply.headers, stream=self, extensions=reply.extensions
        )

    def __iter__(self) -> Iterator[bytes]:
        with self:
            for chunk in self._body:
                yield self._read(chunk)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self:
            async with aclosing(aiter(self._body)) as body:  # subtle: `async for` closes nothing
                async for chunk in body:
                    yield self._read(chunk)

    def close(self) -> None:
        with self:
            self._body.close()
        self._end()

    async def aclose(self) -> None:
        with self:
            await self._body.aclose()
        self._end()

    def _read(self, chunk: bytes) -> bytes:
        self._unread += chunk if "json" in self._kind or "event-stream" in self._kind else b""
        if "event-stream" in self._kind:  # a line is an event: keep no more than that
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                self._note(line.removeprefix(b"data:"))
        return chunk

    def _end(self, error: str | None = None) -> None:
        if self.call.duration is None:  # or else an error has ended it before
            self._note(self._unread)
            self.call.error = error or self._error
            self.call.duration = self._clock() - self._started

    def _note(self, text: bytearray) -> None:
        """Take what a reply, or an event of it, says of itself. What is missing stays unknown."""
        with suppress(AttributeError, LookupError, ValueError):
            reply = json.loads(text)
            reply = reply.get("response") or reply  # events of the Responses API wrap it
            self._error = self._error or (reply.get("error") and "error in the reply")
            flavor = FLAVORS[self.call.path.rpartition("/")[2]]
            self.call.model, self.call.usage = PROVIDER.extract_usage(reply, api_flavor=flavor)
            price = calc_price(self.call.usage, str(self.call.model), provider_id="openai")
            self.call.cost = price.total_price


# --- Demos: each shows what can go wrong. Copy what is above into production. ---

live = False  # --live


def stand_in(request: httpx2.Request) -> httpx2.Response:
    """Answer as the API does: repeat the prompt, and bill a token for each word."""
    body = json.loads(request.content)
    prompt = body["messages"][-1]["content"]
    message = {"role": "assistant", "content": f"(stand-in) You asked: {prompt}"}
    asked, answered = len(prompt.split()), len(message["content"].split())
    usage = {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }
    choice = {"index": 0, "finish_reason": "stop", "message": message, "delta": message}
    reply = {"id": "stand-in", "created": 0, "model": body["model"], "choices": [choice]}
    if not body.get("stream"):
        return httpx2.Response(200, json=reply | {"usage": usage})
    wants_usage = body.get("stream_options", {}).get("include_usage")
    chunks = [reply, reply | {"choices": [], "usage": usage}] if wants_usage else [reply]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return httpx2.Response(200, content=events, headers={"content-type": "text/event-stream"})


# Without --live, no client that this script makes sends anything out.
default_transport = default_async_transport = partial(httpx2.MockTransport, stand_in)


class Log(logging.Handler):
    """Show what a manager logs, in its place among what the demo prints."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname}: {record.getMessage()}", style="yellow")


def drawn(session: Session) -> Tree:
    """Draw a session as a tree: its calls, and the sessions nested in it."""
    tree = Tree(Text.assemble((session.name, "bold"), f"  ${session.cost:f}"))
    for call in session.calls:
        tokens = f"{call.usage.input_tokens} → {call.usage.output_tokens}" if call.usage else "?"
        cost = "?" if call.cost is None else f"${call.cost:f}"
        took = "?" if call.duration is None else f"{1000 * call.duration:.1f}"
        line = _("{model}: {tokens} tokens, {cost}, {ms} ms").format(
            model=call.model, tokens=tokens, cost=cost, ms=took
        )
        tree.add(Text.assemble(line, (f" {call.error or ''}", "red")))
    tree.children += map(drawn, session.children)
    return tree


def show_recorded(session: Session, made: int) -> None:
    """Show the calls that a session has recorded, of those that were made."""
    console.print(drawn(session))
    recorded = len(session.all_calls())
    result = _("Calls recorded: {recorded} of {made}.")
    verdict(recorded == made, result.format(recorded=recorded, made=made))


def show_answer(prompt: str) -> None:
    say(ask(prompt))


def demo_nesting() -> None:
    """Every call finds its session

    `show_answer(prompt)` gets no session, yet its call is recorded in the right one: `ask` looks
    it up in a `ContextVar`. When a block ends, the Token that `set()` returned restores what was
    there before, so the next call belongs to the outer session again. A session's cost includes
    the sessions inside it. (The stand-in bills a token for each word, at OpenAI's prices.)
    """
    show_code(show_answer, smart_session)
    question(_("One call comes before a nested session, one in it, one after it. Who records it?"))
    model = default_model if live else "gpt-4o"
    with bracket('smart_session("article")'), smart_session("article") as article:
        show_answer("How can a block be left?")
        with bracket(f'smart_session("title", model="{model}")'):
            with smart_session("title", model=model):
                show_answer("What is a good title for that?")
        show_answer("On which ways out does cleanup run?")
    show_recorded(article, made=3)


recorder: ContextVar[Session | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(session: Session) -> Iterator[Session]:
    """The rule of PromptRecorder in llamabot 0.11.9: set it on entry, set None on exit."""
    recorder.set(session)
    try:
        yield session
    finally:
        recorder.set(None)


def record(prompt: str) -> None:
    if session := recorder.get():
        session.calls.append(Call(prompt))


@contextmanager
def span(name: str, database: str = ":memory:") -> Iterator[Session]:
    """The rule of span in llamabot 0.19.16: no parent, and exit writes to a database."""
    try:
        yield Session(name)
    finally:
        sqlite3.connect(database).close()


def after_a_nested_session(opened: Any, ask: Any) -> int:
    with opened("outer") as outer:
        with opened("inner"):
            pass
        ask("Is this recorded?")
    return len(outer.calls)


def after_entering_it_again(opened: Any, ask: Any, again: Any) -> int:
    with opened("same") as same:
        with again(same):
            pass
        ask("Is this recorded?")
    return len(same.calls)


def in_a_task_that_outlives_it(opened: Any, ask: Any) -> int:
    async def late() -> None:
        ask("Is this recorded?")

    async def outlive() -> int:
        with opened("block") as block:
            task = asyncio.create_task(late())  # it starts after the block has ended
        await task
        return len(block.calls)

    return asyncio.run(outlive())


def parent_of_a_nested_session(opened: Any) -> Any:
    with opened("outer"), opened("inner") as inner:
        return inner.parent and inner.parent.name


def error_when_leaving_goes_wrong(opened: Any) -> None:
    with ExitStack() as stack:
        copy_context().run(stack.enter_context, opened("block"))  # it is left in another context
        raise ValueError("the block's own")


def outcome(scene: Callable[..., Any], *rule: Any) -> str:
    """Return what a scene returns, or the name of what it raises."""
    try:
        return str(scene(*rule))
    except Exception as error:
        return type(error).__name__


def demo_beside_llamabot() -> None:
    """Beside llamabot

    `PromptRecorder` (llamabot 0.11.9, gone since 0.12.0) used a `ContextVar`, too, but set it to
    `None` on exit. Today's `span` (0.19.16) gives a nested span no parent, records no tokens, and
    if its database cannot be written, that error hides the block's own. The middle column runs
    these rules, in a few lines of our own; the right one runs `smart_session`. A number counts
    the recorded calls: those scenes make one call each, and a call made after the block has ended
    must not count. The last scene logs the warning above the table: `smart_session` reports what
    went wrong, and hides no error.
    """
    show_code(after_a_nested_session, recording)
    question(_("Nothing fails here. When `ask` is called, which session is current?"))
    theirs, ours = (lambda name: recording(Session(name)), record), (smart_session, ask)
    with trace() as their_run:
        after_a_nested_session(*theirs)
    with trace() as our_run:
        after_a_nested_session(*ours)
    runs = {_("llamabot's rule"): their_run, "smart_session": our_run}
    show_code(after_a_nested_session, recording, Session.as_current, runs=runs)
    unwritable = partial(span, database="no such folder/spans.db")
    titles = (_("scene"), _("llamabot's rule"), "smart_session")
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for scene, right, rule, our_rule in (
        (after_a_nested_session, "1", theirs, ours),
        (after_entering_it_again, "1", (*theirs, recording), (*ours, Session.as_current)),
        (in_a_task_that_outlives_it, "SessionClosedError", theirs, ours),
        (parent_of_a_nested_session, "outer", (span,), (smart_session,)),
        (error_when_leaving_goes_wrong, "ValueError", (unwritable,), (smart_session,)),
    ):
        results = [outcome(scene, *each) for each in (rule, our_rule)]
        marked = (f"✓ {result}" if result == right else f"✗ {result}" for result in results)
        table.add_row(scene.__name__, *marked)
    console.print(table)


async def in_tasks() -> None:
    await asyncio.gather(ask_async("Does gather inherit it?"))
    async with asyncio.TaskGroup() as group:
        group.create_task(ask_async("Does a TaskGroup?"))
    await asyncio.to_thread(ask, "Does asyncio.to_thread?")


def demo_tasks_and_threads() -> None:
    """Tasks inherit the session, threads do not

    A task starts with a copy of the context in which it was created, and `asyncio.to_thread`
    passes on a copy, too. A thread or an executor starts with an empty context: its call is
    recorded nowhere, and a warning is logged. So give each job a copy. (Python 3.14 has an option
    for threads, `-X thread_inherit_context=1`. llamabot 0.11.9 recorded nothing there, and logged
    nothing either.)
    """
    show_code(in_tasks)
    question(_("Two tasks, `to_thread` and an executor make a call each. Which is not recorded?"))
    with bracket("asyncio.run(in_tasks())"), smart_session("tasks") as tasks:
        asyncio.run(in_tasks())
    show_recorded(tasks, made=3)
    prompt = "Does an executor inherit it?"
    with ThreadPoolExecutor() as executor:
        with bracket("executor.submit(show_answer, prompt)"), smart_session("empty") as empty:
            executor.submit(show_answer, prompt).result()
        show_recorded(empty, made=1)
        with bracket("executor.submit(copy_context().run, show_answer, prompt)"):
            with smart_session("copy") as copy:
                executor.submit(copy_context().run, show_answer, prompt).result()
        show_recorded(copy, made=1)


def answers() -> Generator[str, None, None]:
    with smart_session("inside"):
        for prompt in ("one", "two"):
            yield ask(prompt)


def demo_generators() -> None:
    """A suspended generator leaks its session

    A generator runs in the context of whoever calls `next()`. While it is suspended at `yield`,
    its block is still open, so its session is the caller's current session, too. A manager cannot
    prevent that from inside; the recorder of llamabot 0.11.9 leaked in the same way. Open the
    session around the loop, in the caller. Or use `isolated`, which runs each step in a context
    of the generator's own.
    """
    show_code(answers, isolated)
    question(_("The caller takes one answer. What does its `current_session()` return then?"))
    for code, items in (("answers()", answers()), ("isolated(answers())", isolated(answers()))):
        with closing(items):
            next(items)
            leaked = current_session()
        result = _("While `{code}` is suspended, its caller's session is {name}.")
        verdict(leaked is None, result.format(code=code, name=leaked and leaked.name))


def somebody_elses(client: OpenAI) -> None:
    """Code that has never heard of sessions."""
    messages: Any = [{"role": "user", "content": "Who records this?"}]
    request: Any = {"model": default_model, "messages": messages}
    client.chat.completions.create(**request)
    with client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ) as stream:
        list(stream)


def demo_recording_client() -> None:
    """A client that records its calls

    `somebody_elses(client)` knows the OpenAI client, but no sessions. Its calls are recorded
    anyway, plain and streamed: below the SDK, a transport reads each reply as it passes. It also
    sees each attempt: a server (always a stand-in) is busy, and the SDK retries.
    """
    show_code(somebody_elses)
    question(_("Then a server is busy once, and the SDK retries. Is that one call, or two?"))
    with bracket('smart_session("not mine")'), smart_session("not mine") as session:
        with bracket("recording_client()"), recording_client() as client:
            somebody_elses(client)
    show_recorded(session, made=2)
    busy = httpx2.Response(429, headers={"retry-after-ms": "10"})
    replies = iter((lambda request: busy, stand_in))
    transport = httpx2.MockTransport(lambda request: next(replies)(request))
    with bracket('smart_session("busy")'), smart_session("busy") as session:
        with bracket("recording_client(transport)"), recording_client(transport) as client:
            say(ask("Are you there?", client=client))
    show_recorded(session, made=2)


def demo_no_session() -> None:
    """Without a session

    `ask` works, and logs that nothing is recorded. If that must not happen, pass `strict=True`:
    then it raises. A session whose block has ended takes no calls either, and nothing is sent.
    """
    prompt = "Who pays for this?"
    show_answer(prompt)
    with bracket('smart_session("ended")'), smart_session("ended") as ended:
        show_answer(prompt)
    for label, manager in (("strict=True", nullcontext()), ("as_current()", ended.as_current())):
        with suppress(LookupError, SessionClosedError), bracket(label), manager:
            try:
                ask(prompt, strict=True)
            except Exception as error:
                say(str(error))
                raise
    show_recorded(ended, made=1)


DEMOS = (
    demo_nesting,
    demo_beside_llamabot,
    demo_tasks_and_threads,
    demo_generators,
    demo_recording_client,
    demo_no_session,
)
KEY_POINTS = """\
* Keep the Token that `set()` returns, and `reset()` with it: it restores what was there before.
* A task takes a copy of the context along: a session whose block has ended must refuse its calls.
* Give each job of a thread a copy of the context, and each generator a context of its own.
* Record below the SDK, in a transport: then no caller can forget it."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. If a real model does not answer, exit with one line."""
    global live, default_model, default_transport, default_async_transport
    parser.add_argument("--live", action="store_true", help=_("ask a real model"))
    options = parser.parse_args()
    logging.basicConfig(handlers=[Log()])
    if options.live:
        live, default_model = True, os.environ.get("OPENAI_MODEL", default_model)
        default_transport = httpx2.HTTPTransport
        default_async_transport = httpx2.AsyncHTTPTransport
    try:
        yield options
    except OpenAIError as error:
        parser.exit(1, f"{parser.prog}: {default_model} did not answer: {error}\n")


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
