# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 04 · Smart session: a current session that every call finds by itself.

After this chapter you can pass a session down to the last helper without a parameter, in
tasks and in threads, and record every call of an OpenAI client that others use.

    python 04_smart_session.py           play all demos, offline, on a stand-in for the model
    python 04_smart_session.py 2 4       play demos 2 and 4 alone
    python 04_smart_session.py --live    ask OPENAI_MODEL at OPENAI_BASE_URL, with OPENAI_API_KEY

Read `smart_session` first: the rest is what can go wrong with it. Then look at the trees, and
at the table beside llamabot. Left out: the conversation itself (chapter 02), limits (05).
"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
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
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import httpx2
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI, OpenAIError
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
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


# --- Demos: from here on the file tells the story. Copy what is above into production. ---

console = Console(highlight=False)
_ = gettext.translation("workshop", Path(__file__).parent / "locale", fallback=True).gettext
open_brackets: list[str] = []
live = False  # main() sets it for --live


def stand_in(request: httpx2.Request) -> httpx2.Response:
    """The model's part, played in this process: an echo, billed at a token for each word."""
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


# Until main() hears --live, no client that this script makes goes out.
default_transport = default_async_transport = partial(httpx2.MockTransport, stand_in)


def say(text: str) -> None:
    """Print a paragraph inside the open brackets, each of its lines behind their bars."""
    bars = "│ " * len(open_brackets)
    for line in Text.from_markup(text).wrap(console, console.width - len(bars)):
        line.rstrip()
        console.print(Text.assemble((bars, "dim"), line))


@contextmanager
def shown(label: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a manager and draw its scope: a bracket with the times of set-up, use and cleanup."""
    say(f"┌ [bold]{escape(label)}[/]")
    open_brackets.append(label)
    how = ""
    marks = [time.perf_counter()]
    try:
        with manager as value:
            marks.append(time.perf_counter())
            try:
                yield value
            except BaseException as error:
                how = _("left by {error}").format(error=type(error).__name__)
                raise
            finally:
                marks.append(time.perf_counter())
    except BaseException as error:
        failed = _("setup raised {error}") if len(marks) == 1 else _("cleanup raised {error}")
        how = how or failed.format(error=type(error).__name__)
        raise
    finally:
        marks.append(time.perf_counter())
        open_brackets.pop()
        spans = zip((_("setup"), _("use"), _("cleanup")), pairwise(marks), strict=False)
        times = " · ".join(f"{name} {1000 * (end - start):.2f}" for name, (start, end) in spans)
        say(f"└ {how or _('left at its end')}  [dim]{times} ms[/]")


def drawn(session: Session) -> Tree:
    """A session as a tree: its calls, and the sessions nested in it."""
    tree = Tree(f"[bold]{escape(session.name)}[/]  ${session.cost:f}")
    for call in session.calls:
        tokens = f"{call.usage.input_tokens} → {call.usage.output_tokens}" if call.usage else "?"
        cost = "?" if call.cost is None else f"${call.cost:f}"
        took = "?" if call.duration is None else f"{1000 * call.duration:.1f}"
        told = _("{model}: {tokens} tokens, {cost}, {ms} ms").format(
            model=escape(str(call.model)), tokens=tokens, cost=cost, ms=took
        )
        tree.add(f"{told} [red]{call.error or ''}[/]")
    tree.children += map(drawn, session.children)
    return tree


def told(prompt: str) -> None:
    """Ask, and show the answer. It is given no session."""
    say(escape(ask(prompt)))


def demo_nesting() -> None:
    """Every call finds its session

    `told(prompt)` is given no session, yet its call is recorded in the right one: `ask` looks
    into a `ContextVar`. When a block ends, the **token** that `set()` returned puts back what
    was there before, so that the next call is the outer session's again. Costs add up. (The
    stand-in for the model bills a token for each word; the prices are OpenAI's.)
    """
    with shown('smart_session("article")', smart_session("article")) as article:
        told("How can a block be left?")
        model = default_model if live else "gpt-4o"
        with shown(f'smart_session("title", model="{model}")', smart_session("title", model=model)):
            told("What is a good title for that?")
        told("On which ways out does cleanup run?")
    console.print(drawn(article))


recorder: ContextVar[Session | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(session: Session) -> Iterator[Session]:
    """The rule of PromptRecorder in llamabot 0.11.9: set on entering, None on leaving."""
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
    """The rule of span in llamabot 0.19.16: no parent, and a database is written on leaving."""
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

    async def main() -> int:
        with opened("block") as block:
            task = asyncio.create_task(late())  # it begins when the block has ended
        await task
        return len(block.calls)

    return asyncio.run(main())


def parent_of_a_nested_session(opened: Any) -> Any:
    with opened("outer"), opened("inner") as inner:
        return inner.parent and inner.parent.name


def error_when_leaving_goes_wrong(opened: Any) -> None:
    with ExitStack() as stack:
        copy_context().run(stack.enter_context, opened("block"))  # leave it in another context
        raise ValueError("the body's own")


def outcome(scene: Callable[..., Any], *rule: Any) -> str:
    """What a scene returns or raises."""
    try:
        return str(scene(*rule))
    except Exception as error:
        return type(error).__name__


def demo_beside_llamabot() -> None:
    """Beside llamabot

    `PromptRecorder` (llamabot 0.11.9, gone since 0.12.0) was found by a `ContextVar`, too, but
    on leaving it set `None`. Today's `span` (0.19.16) gives a nested span no parent, records no
    tokens, and where its database cannot be written, that error hides the one of the body. The
    middle column runs **these rules**, in a few lines of our own; the right one runs
    `smart_session`. A number tells how many calls were recorded, of the one that was made. The
    warning is ours, from the last scene: what went wrong is logged, and hides nothing.
    """
    theirs, ours = (lambda name: recording(Session(name)), record), (smart_session, ask)
    unwritable = partial(span, database="no such folder/spans.db")
    table = Table(_("scene"), _("llamabot's rule"), "smart_session")
    for scene, rule, our_rule in (
        (after_a_nested_session, theirs, ours),
        (after_entering_it_again, (*theirs, recording), (*ours, Session.as_current)),
        (in_a_task_that_outlives_it, theirs, ours),
        (parent_of_a_nested_session, (span,), (smart_session,)),
        (error_when_leaving_goes_wrong, (unwritable,), (smart_session,)),
    ):
        right, wrong = outcome(scene, *our_rule), outcome(scene, *rule)
        table.add_row(scene.__name__, f"[red]{wrong}[/]", f"[green]{right}[/]")
    console.print(table)


async def in_tasks() -> None:
    await asyncio.gather(ask_async("Does gather inherit it?"))
    async with asyncio.TaskGroup() as group:
        group.create_task(ask_async("Does a TaskGroup?"))
    await asyncio.to_thread(ask, "Does asyncio.to_thread?")


def demo_tasks_and_threads() -> None:
    """Tasks inherit the session, threads do not

    A task starts with a copy of the context in which it was created; `asyncio.to_thread` hands
    one over as well. A thread or an executor starts with an empty one: its call is recorded
    nowhere, as the log says. So give each job a copy. (Python 3.14 has an option for threads,
    `-X thread_inherit_context=1`. llamabot 0.11.9 recorded nothing there, and did not say so.)
    """
    with shown("asyncio.run(in_tasks())", smart_session("tasks")) as tasks:
        asyncio.run(in_tasks())
    console.print(drawn(tasks))
    with ThreadPoolExecutor() as executor:
        with shown("executor.submit(told, ...)", smart_session("empty context")) as empty:
            executor.submit(told, "Does an executor inherit it?").result()
        console.print(drawn(empty))
        with shown("executor.submit(copy_context().run, told, ...)", smart_session("copy")) as copy:
            executor.submit(copy_context().run, told, "Does it with a copy?").result()
        console.print(drawn(copy))


def answers() -> Generator[str, None, None]:
    with smart_session("inside"):
        for prompt in ("one", "two"):
            yield ask(prompt)


def demo_generators() -> None:
    """A suspended generator leaks its session

    A generator runs in the context of whoever calls `next()`. At `yield` its block is still
    open, so its session is now the caller's, too: a manager cannot prevent that from within (the
    recorder of llamabot 0.11.9 leaked likewise). Open the session outside, around the loop. Or
    use `isolated`, which runs each step in a context of the generator's own.
    """
    for code, items in (("answers()", answers()), ("isolated(answers())", isolated(answers()))):
        with closing(items):
            next(items)
            leaked = current_session()
        console.print(
            _("While {code} is suspended, its caller's session is: {name}").format(
                code=code, name=leaked and leaked.name
            )
        )


def somebody_elses(client: OpenAI) -> None:
    """Code that has never heard of sessions."""
    messages: Any = [{"role": "user", "content": "Who records this?"}]
    question: Any = {"model": default_model, "messages": messages}
    client.chat.completions.create(**question)
    with client.chat.completions.create(
        **question, stream=True, stream_options={"include_usage": True}
    ) as stream:
        list(stream)


def demo_recording_client() -> None:
    """A client that records by itself

    `somebody_elses(client)` knows the OpenAI client, but no sessions. Its calls are recorded
    all the same, plain and streamed: below the SDK, a transport reads along as they pass. It
    sees each attempt, too: a server (always a stand-in) is busy, and the SDK tries again.
    """
    with shown('smart_session("not mine")', smart_session("not mine")) as session:
        with shown("recording_client()", recording_client()) as client:
            somebody_elses(client)
    console.print(drawn(session))
    busy = httpx2.Response(429, headers={"retry-after-ms": "10"})
    replies = iter((lambda request: busy, stand_in))
    transport = httpx2.MockTransport(lambda request: next(replies)(request))
    with shown('smart_session("busy")', smart_session("busy")) as session:
        with shown("recording_client(transport)", recording_client(transport)) as client:
            say(escape(ask("Are you there?", client=client)))
    console.print(drawn(session))


def demo_no_session() -> None:
    """Without a session

    `ask` works, and logs that nothing is recorded. Where that must not happen, `strict=True`
    raises. A session whose block has ended takes no calls either, and nothing is sent.
    """
    told("Who pays for this?")
    with shown('smart_session("ended")', smart_session("ended")) as ended:
        told("Who pays for this?")
    for label, manager in (("strict=True", nullcontext()), ("as_current()", ended.as_current())):
        with suppress(LookupError, SessionClosedError), shown(label, manager):
            try:
                ask("Who pays for this?", strict=True)
            except Exception as error:
                say(f"[red]{escape(str(error))}[/]")
                raise


DEMOS = [demo for name, demo in list(globals().items()) if name.startswith("demo_")]


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    demo = DEMOS[number - 1]
    title, lesson = _(inspect.getdoc(demo) or "").split("\n", 1)
    console.rule(f"[bold]{number} · {title}", align="left")
    console.print(Markdown(lesson), "")
    demo()
    console.print()


def show_key_points() -> None:
    points = _("""\
* Keep the token that `set()` returns, and `reset()` with it: `None` is not what was there before.
* A task takes a copy of the context along. What outlives its block must be told so.
* Hand each job of a thread a copy of the context; keep a generator's session inside.
* Record below the SDK, in a transport: then no caller can forget it.""")
    console.rule(_("[bold]Key points"), align="left")
    console.print(Markdown(points))


class Log(logging.Handler):
    """Show what a manager logs among what the demo shows."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"[yellow]{record.levelname}: {escape(record.getMessage())}[/]")


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage above it


def main() -> int:
    global live, default_model, default_transport, default_async_transport
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=__doc__, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help="play only these, by number")
    parser.add_argument("--live", action="store_true", help="ask a real model")
    options = parser.parse_args()
    chosen = options.demo or range(1, len(DEMOS) + 1)
    for number in chosen:
        if not 1 <= number <= len(DEMOS):
            parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
    logging.basicConfig(handlers=[Log()])
    if options.live:
        live, default_model = True, os.environ.get("OPENAI_MODEL", default_model)
        default_transport = httpx2.HTTPTransport
        default_async_transport = httpx2.AsyncHTTPTransport
    try:
        for number in chosen:
            play(number)
        show_key_points()
    except OpenAIError as error:
        parser.exit(1, f"{parser.prog}: {default_model} did not answer: {error}\n")
    except KeyboardInterrupt:
        console.print(_("Interrupted. Every bracket above was closed on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
