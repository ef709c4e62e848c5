# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16", "openai>=3.50,<4", "genai-prices>=0.2,<0.3"]
# ///
"""Chapter 04 · Context without parameters

After this chapter you can hand a session to the innermost helper without a parameter, say which
tasks and threads inherit it, and record every call of an OpenAI client that other code uses.

    python 04_smart_session.py          run all five demos
    python 04_smart_session.py 2 4      run demos 2 and 4
    python 04_smart_session.py --step   wait for Enter at each question
    python 04_smart_session.py --live   ask a real model

The demos run offline: a stand-in answers instead of a model. With `--live`, demos 2 and 4 ask
OPENAI_MODEL at OPENAI_BASE_URL, with OPENAI_API_KEY.

Read `smart_session` and `restore` first: a `ContextVar`, set and reset. Then run the demos, and
look at who records each call.

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
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager, suppress
from contextvars import ContextVar, Token, copy_context
from dataclasses import dataclass, field
from decimal import Context, Decimal, localcontext
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import httpx2
import openai
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

T = TypeVar("T")
Clock = Callable[[], float]  # returns seconds since some fixed moment
Price = Callable[[Usage, str], Decimal]  # returns the US dollars for a model's tokens
Client = openai.OpenAI | openai.AsyncOpenAI
DEFAULT_MODEL = "gpt-4o-mini"
EXACT = Context(prec=50)  # for money, whatever precision the caller works with
logger = logging.getLogger("workshop.smart_session")


class SessionClosedError(RuntimeError):
    """The session's block has ended: it takes no more calls."""


class ReplyError(RuntimeError):
    """The server answered, but not with a whole chat completion."""


@dataclass
class Call:
    """One request to the API; each attempt of the SDK is a call. None means "not known (yet)"."""

    path: str
    model: str | None = None  # as the reply names it, otherwise as the request does
    usage: Usage | None = None  # the tokens that the API reports
    cost: Decimal | None = None  # US dollars
    duration: float | None = None  # seconds, to the end of the reply
    error: str | None = None  # an exception's name, or an HTTP status


@dataclass(eq=False)
class Session:
    """The calls made in a block, and the sessions nested in it. Tasks and threads can share it."""

    name: str
    model: str | None = None
    client: Client | None = None
    parent: Session | None = None
    entries: list[Call | Session] = field(default_factory=list)  # in the order of time
    closed: bool = False

    def __post_init__(self) -> None:
        if self.parent:
            self.parent.entries.append(self)

    @property
    def calls(self) -> list[Call]:
        """The session's own calls."""
        return [entry for entry in self.entries if isinstance(entry, Call)]

    @property
    def children(self) -> list[Session]:
        """The sessions nested in this one."""
        return [entry for entry in self.entries if isinstance(entry, Session)]

    def all_calls(self) -> list[Call]:
        """Return the session's own calls and those of all nested sessions, in order."""
        calls: list[Call] = []
        for entry in self.entries:
            calls += [entry] if isinstance(entry, Call) else entry.all_calls()
        return calls

    @property
    def cost(self) -> Decimal:
        """US dollars of all calls whose tokens are known.

        Raises LookupError if the price of a model is unknown.
        """
        total = Decimal(0)
        for call in self.all_calls():
            if call.usage is not None and call.cost is None:
                raise LookupError(
                    f"the price of {call.model!r} is unknown: pass price=... to `recording_client`"
                )
            total = EXACT.add(total, call.cost or 0)
        return total

    def record(self, call: Call) -> None:
        """Add a call. Raises SessionClosedError if the block has ended."""
        self.check_open()
        self.entries.append(call)

    def check_open(self) -> None:
        """Raise SessionClosedError if the block has ended."""
        if self.closed:
            raise SessionClosedError(
                f"session {self.name!r} is closed, because its block has ended: "
                "open a new `with smart_session(...):` for this call"
            )


_current: ContextVar[Session | None] = ContextVar("current_session", default=None)


def current_session() -> Session | None:
    """Return the innermost session.

    A task that outlives its session still gets it, closed, until it opens its own session.
    """
    return _current.get()


@contextmanager
def smart_session(
    name: str, *, model: str | None = None, client: Client | None = None
) -> Iterator[Session]:
    """Open a session that records the calls made in the block, however deep.

    It nests in the current session, whose model and client it uses unless it has its own.
    Make the client with `recording_client`, and close it yourself. Tasks and `asyncio.to_thread`
    inherit the session. Threads and executors do not: let them run `copy_context().run`.

    The end of the block waits for no call and cancels none. A call that is still under way raises
    SessionClosedError when it reads the reply, or at a retry. Its tokens and cost are not recorded.

    If blocks end out of order, the innermost open session stays current. If a block ends in another
    context (in a thread, or when the event loop finalizes a generator), a warning is logged, and
    the closed session stays current where the block began, until another session opens there.
    """
    parent = innermost_open(current_session())
    session = Session(name, model, client, parent)
    token = _current.set(session)
    try:
        yield session
    finally:
        session.closed = True
        restore(session, token)


def restore(session: Session, token: Token[Session | None]) -> None:
    """Restore what was current before `session`, unless a nested block is still open."""
    innermost = innermost_open(_current.get())
    try:
        _current.reset(token)
    except ValueError:
        logger.warning("session %r ended in another context", session.name)
    if _current.get() is not innermost:
        _current.set(innermost)  # the blocks ended out of order


def outwards(session: Session | None) -> Iterator[Session]:
    """Yield the session, then those around it."""
    while session:
        yield session
        session = session.parent


def innermost_open(session: Session | None) -> Session | None:
    """Return the session, or the nearest one around it whose block has not ended."""
    return next((each for each in outwards(session) if not each.closed), None)


def isolated(generator: Generator[T, None, object]) -> Generator[T, None, None]:
    """Run the generator in its own context, so that its session does not leak to the caller.

    It is for a `for` loop: no send, no throw, and the return value is lost. The steps run in one
    context, copied at the first one. For an asynchronous generator, open the session around the
    loop instead.
    """
    context, end = copy_context(), object()
    try:
        while True:
            item = context.run(next, generator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]
    finally:
        context.run(generator.close)


def ask(prompt: str) -> str:
    """Ask the current session's model, through its OpenAI client or that of a session around it.

    Raises LookupError if no session is current or none has such a client, SessionClosedError if
    the session's block has ended, and ReplyError if the answer is not whole. An answer is whole if
    it has a `finish_reason`, and a content, a refusal or tool calls (which come back as JSON).
    """
    client, model = client_and_model(openai.OpenAI)
    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}]
    )
    return whole_answer(reply.content)


async def ask_async(prompt: str) -> str:
    """Ask like `ask`, through an AsyncOpenAI client."""
    client, model = client_and_model(openai.AsyncOpenAI)
    reply = await client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}]
    )
    return whole_answer(reply.content)


def client_and_model(kind: type[T]) -> tuple[T, str]:
    """Return a client and a model, each from the innermost session that has one."""
    session = current_session()
    if session is None:
        raise LookupError("no session is current: ask inside `with smart_session(...):`")
    session.check_open()
    clients = [each.client for each in outwards(session) if isinstance(each.client, kind)]
    if not clients:
        raise LookupError(
            f"session {session.name!r} has no {kind.__name__} client: pass client=... to "
            "`smart_session`, made by `recording_client` or `async_recording_client`"
        )
    model = next((each.model for each in outwards(session) if each.model), DEFAULT_MODEL)
    return clients[0], model


def whole_answer(reply: bytes) -> str:
    """Return the text of an answer. Raises ReplyError if it is not whole."""
    # subtle: the SDK validates no reply, so any part may be missing or of another type.
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        choice = json.loads(reply)["choices"][0]
        message = choice["message"]
        answer = message.get("refusal") or message.get("content")
        if not answer and message.get("tool_calls"):
            answer = json.dumps([dict(call) for call in message["tool_calls"]])
        if choice["finish_reason"] and isinstance(answer, str):
            return answer
    raise ReplyError(f"the reply is not a whole chat completion: {reply[:100]!r}")


def list_price(usage: Usage, model: str) -> Decimal:
    """Return today's price from genai-prices. Raises LookupError if it does not know the model."""
    with localcontext(EXACT):
        return calc_price(usage, model, provider_id="openai").total_price


def recording_client(
    transport: httpx2.BaseTransport | None = None,
    clock: Clock = time.perf_counter,
    price: Price = list_price,
    **options: Any,
) -> openai.OpenAI:
    """Make an OpenAI client that records each call in the session current where it is made.

    Code that uses the client needs no change. A call without a session is sent, and a warning is
    logged. The client sends through `transport`, by default with the connection limits of the SDK
    but without HTTPS_PROXY: for a proxy, pass `httpx2.HTTPTransport(proxy=...)`. `price` returns
    what tokens cost, by default today's list price. The options are those of OpenAI, except
    `http_client`: pass its transport instead.
    """
    transport = transport or httpx2.HTTPTransport(limits=openai.DEFAULT_CONNECTION_LIMITS)
    recorder = RecordingTransport(transport, clock, price)
    http_client = openai.DefaultHttpxClient(transport=recorder, headers=PLAIN)
    return openai.OpenAI(http_client=http_client, **options)


def async_recording_client(
    transport: httpx2.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
    price: Price = list_price,
    **options: Any,
) -> openai.AsyncOpenAI:
    """Make an AsyncOpenAI client like `recording_client`. Use it in `async with`, on one loop."""
    transport = transport or httpx2.AsyncHTTPTransport(limits=openai.DEFAULT_CONNECTION_LIMITS)
    recorder = RecordingTransport(transport, clock, price)
    http_client = openai.DefaultAsyncHttpxClient(transport=recorder, headers=PLAIN)
    return openai.AsyncOpenAI(http_client=http_client, **options)


PLAIN = {"accept-encoding": "identity"}  # a compressed reply cannot be read as it passes
PROVIDER = get_snapshot().find_provider(None, "openai", None)  # knows where replies count tokens
FLAVORS = {"completions": "chat", "responses": "responses", "embeddings": "embeddings"}


class RecordingTransport(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A transport that records each request, and forwards it to another transport."""

    def __init__(self, transport: Any, clock: Clock, price: Price) -> None:
        self._transport, self._clock, self._price = transport, clock, price

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        with self._record(request) as reader:
            reply = self._transport.handle_request(request)
            return reader.watch(reply)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with self._record(request) as reader:
            reply = await self._transport.handle_async_request(request)
            return reader.watch(reply)

    def close(self) -> None:
        self._transport.close()

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _record(self, request: httpx2.Request) -> ReplyReader:
        call, session = Call(request.url.path), current_session()
        with suppress(Exception):  # an upload, for example, names no model
            call.model = json.loads(request.content)["model"]
        if session is None:
            logger.warning("no session is current: %s is not recorded", call.path)
            session = Session("not recorded")
        session.record(call)  # raises if the session is closed: nothing is sent
        return ReplyReader(call, session, self._clock, self._price)


class RecordedBody(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A reply's body that passes on each piece as it comes, and shows it to a reader."""

    def __init__(self, body: Any, reader: ReplyReader) -> None:
        self._body, self._reader = body, reader

    def __iter__(self) -> Iterator[bytes]:
        with self._reader:
            for chunk in self._body:
                self._reader.feed(chunk)
                yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._reader:
            async with aclosing(aiter(self._body)) as body:  # subtle: `async for` closes nothing
                async for chunk in body:
                    self._reader.feed(chunk)
                    yield chunk

    def close(self) -> None:
        self._reader.finish()
        self._body.close()

    async def aclose(self) -> None:
        self._reader.finish()
        await self._body.aclose()


class ReplyReader:
    """Reads what a reply says about itself: model, tokens, error. Then it completes the call.

    It keeps one JSON reply or one event of a stream, and nothing of any other type. As a context
    manager, it completes the call if its block raises.
    """

    def __init__(self, call: Call, session: Session, clock: Clock, price: Price) -> None:
        self._call, self._session, self._clock, self._price = call, session, clock, price
        self._started = clock()
        self._facts: dict[str, Any] = {}
        self._kind, self._unread = "", bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        if exc_type is GeneratorExit:  # the caller has read enough: that is no error
            self.finish()
        elif exc_type:
            self.finish(exc_type.__name__)

    def watch(self, reply: httpx2.Response) -> httpx2.Response:
        """Return the same reply, with a body that this reader reads along."""
        self._kind = reply.headers.get("content-type", "")
        if reply.is_error:
            self._facts["error"] = f"HTTP {reply.status_code}"
        body = RecordedBody(reply.stream, self)
        return httpx2.Response(
            reply.status_code, headers=reply.headers, stream=body, extensions=reply.extensions
        )

    def feed(self, chunk: bytes) -> None:
        """Read the next piece. Raises SessionClosedError if the session's block has ended."""
        self._session.check_open()
        if "event-stream" in self._kind:  # a line is an event
            self._unread += chunk
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                self._read(line.removeprefix(b"data:"))
        elif "json" in self._kind:
            self._unread += chunk

    def _read(self, text: bytearray) -> None:
        with suppress(Exception):  # a reply may hold anything: what is not known stays unknown
            reply = json.loads(text)
            reply = reply.get("response") or reply  # an event of the Responses API wraps it
            if reply.get("error"):
                self._facts.setdefault("error", "error in the reply")
            flavor = FLAVORS[self._call.path.rpartition("/")[2]]
            model, usage = PROVIDER.extract_usage(reply, api_flavor=flavor)
            self._facts |= {"model": model or self._call.model, "usage": usage}

    def finish(self, error: str | None = None) -> None:
        """Complete the call, unless it is complete or its session is closed."""
        if self._session.closed or self._call.duration is not None:
            return
        self._read(self._unread)
        if error:
            self._facts["error"] = error
        with suppress(Exception):  # a paid reply must not be lost; `Session.cost` will raise
            self._facts["cost"] = self._price(self._facts["usage"], self._facts["model"])
        self._facts["duration"] = self._clock() - self._started
        vars(self._call).update(self._facts)


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---

live = False  # --live
OFFLINE: dict[str, Any] = {"api_key": "offline", "base_url": "http://stand-in/v1"}


def stand_in(request: httpx2.Request) -> httpx2.Response:
    """Answer as the API does: repeat the prompt, and bill a token for each word."""
    body = json.loads(request.content)
    prompt = body["messages"][-1]["content"]
    message = {"role": "assistant", "content": f"(stand-in) You asked: {prompt}"}
    asked, answered = len(prompt.split()), len(message["content"].split())
    usage = {"prompt_tokens": asked, "completion_tokens": answered}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "delta": message}
    reply = {"id": "stand-in", "created": 0, "model": body["model"], "choices": [choice]}
    if not body.get("stream"):
        return httpx2.Response(200, json=reply | {"usage": usage})
    events = [reply]
    if "stream_options" in body:
        events.append(reply | {"choices": [], "usage": usage})
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return httpx2.Response(200, content=text, headers={"content-type": "text/event-stream"})


def offline_client() -> openai.OpenAI:
    """Make a recording client that asks the stand-in."""
    return recording_client(httpx2.MockTransport(stand_in), **OFFLINE)


@contextmanager
def asking_session(name: str) -> Iterator[Session]:
    """Open a session that asks the stand-in or, with --live, a real model."""
    client = recording_client(timeout=120) if live else offline_client()
    model = os.environ.get("OPENAI_MODEL") if live else None
    with client, smart_session(name, model=model, client=client) as session:
        yield session


def tree_of(session: Session, numbers: Iterator[int]) -> Tree:
    """Return a session's calls, numbered in order, and the sessions nested in it, as a tree."""
    tree = Tree(Text(session.name))
    for entry in session.entries:
        if isinstance(entry, Session):
            tree.children.append(tree_of(entry, numbers))
            continue
        usage = entry.usage
        tokens = f"{usage.input_tokens} → {usage.output_tokens}" if usage else "?"
        cost = "?" if entry.cost is None else f"${entry.cost:f}"
        line = _("call {number}: {model}, {tokens} tokens, {cost}").format(
            number=next(numbers), model=entry.model, tokens=tokens, cost=cost
        )
        tree.add(Text(f"{line}, {entry.error}" if entry.error else line))
    return tree


innermost: Session | None = None


@contextmanager
def global_session(name: str) -> Iterator[None]:
    global innermost
    before, innermost = innermost, Session(name)
    try:
        yield
    finally:
        innermost = before


async def job(opened: Any, current: Any, name: str) -> str:
    with opened(name):
        await asyncio.sleep(0)
        found = current()
    return f"{name} → {found.name if found else None}"


async def demo_global() -> None:
    """A global, and two tasks that mix it up

    A helper deep in the code should find its session without a parameter. A global can do that
    while one task runs. But at an `await`, another task runs and sets the same global. A
    `ContextVar` has a value for each task. (`sleep(0)` only lets the other task run.)
    """
    global innermost
    innermost = None
    show_code(job, global_session)
    question(
        _("Two tasks run `job`, one called ada, one called bob. Which session does each find?")
    )
    for opened, current in ((global_session, lambda: innermost), (smart_session, current_session)):
        with trace() as path:
            jobs = [job(opened, current, name) for name in ("ada", "bob")]
            found = await asyncio.gather(*jobs)
        show_code(job, opened, runs={_("both tasks"): path})
        result = _("With `{opened}`, they find: {found}.")
        result = result.format(opened=opened.__name__, found=", ".join(found))
        verdict(found == ["ada → ada", "bob → bob"], result)
    say(_("In `job`, delete the line with `sleep`, and run demo 1 again."), "→ ")


@contextmanager
def recording(name: str) -> Iterator[Session]:
    session = Session(name, parent=current_session())
    _current.set(session)
    try:
        yield session
    finally:
        _current.set(None)


def article(opened: Any) -> None:
    say(ask("Before?"))
    with opened("title"):
        say(ask("Inside it?"))
    say(ask("After the block?"))


def demo_token() -> None:
    """`set` returns a Token, and `reset` needs it

    `set` returns a Token that remembers the value before, and `reset(token)` restores it. llamabot
    gave this chapter its idea: until 0.11.9, its `PromptRecorder` set the variable to `None` on
    exit, as `recording` does. Nobody passes a session to `ask`, which looks for the current one.
    In the trees, `1 → 4 tokens` is one in, four out. (The stand-in bills a token a word: $0.15 a
    million in, $0.60 out.)
    """
    show_code(article, recording)
    question(_("The inner block has ended, the outer one has not. Who records the third call?"))
    for opened, pieces in ((recording, []), (smart_session, [restore])):
        with suppress(LookupError), asking_session("article") as session, bracket("article"):
            with trace() as path:
                copy_context().run(article, opened)
        show_code(article, opened, *pieces, runs={opened.__name__: path})
        console.print(tree_of(session, count(1)))
        result = _("`{opened}`: article itself recorded {n} of its 2 calls.")
        result = result.format(opened=opened.__name__, n=len(session.calls))
        verdict(len(session.calls) == 2, result)
    say(_("In `recording`, keep the Token and `reset` with it, and run demo 2 again."), "→ ")


async def find_everywhere(executor: Executor) -> dict[str, Any]:
    run = copy_context().run
    return {
        "an executor": executor.submit(current_session).result(),
        "with a copy": executor.submit(run, current_session).result(),
        "to_thread": await asyncio.to_thread(current_session),
        "this task": current_session(),
    }


async def outlive(client: Any) -> tuple[list[Call], Any]:
    with smart_session("report", client=client) as session:
        task = asyncio.create_task(ask_async("Too late?"))
    [answer] = await asyncio.gather(task, return_exceptions=True)
    return session.calls, answer


async def demo_tasks_and_threads() -> None:
    """Tasks inherit the session, threads do not

    A task, even one of `gather` or a TaskGroup, starts with a copy of the context in which it is
    created. `asyncio.to_thread` passes on a copy, too. A thread or an executor starts with an
    empty context, so give each job a copy. (Python 3.14 has an option for threads,
    `-X thread_inherit_context=1`.) A task keeps its copy after the block has ended, so a closed
    session must refuse its calls.
    """
    show_code(find_everywhere)
    question(_("The session report is current. Which of the four calls does not find it?"))
    with ThreadPoolExecutor() as executor, smart_session("report") as session:
        ways = await asyncio.create_task(find_everywhere(executor))
    for way, found in ways.items():
        verdict(found is session, f"{way}: {found.name if found else None}")
    show_code(outlive)
    question(_("The task starts after the block has ended. Is its question sent?"))
    async with async_recording_client(httpx2.MockTransport(stand_in), **OFFLINE) as client:
        with trace() as path:
            calls, answer = await outlive(client)
    show_code(outlive, runs={_("too late"): path})
    result = _("report recorded {n} calls, and the task got: {answer}")
    refused = isinstance(answer, SessionClosedError)
    verdict(refused or len(calls) == 1, result.format(n=len(calls), answer=answer))
    say(_("In `outlive`, indent the line with `gather`, and run demo 3 again."), "→ ")


def answers() -> Generator[str, None, None]:
    with smart_session("inside"):
        yield ask("One?")
        yield ask("And another one?")


def read_one(items: Iterator[str]) -> None:
    next(items)
    ask("Is this mine?")


def demo_generators() -> None:
    """A suspended generator leaks its session

    A generator runs in its caller's context. While it is suspended at `yield`, its block has
    not ended, so its session is current for the caller, too. No manager inside the generator
    can prevent that. `isolated` runs each step in the generator's own context. Or the caller
    opens the session, around the loop.
    """
    show_code(read_one, answers)
    question(_("Call 1 is the generator's. Call 2 is the caller's own: who records it?"))
    for code, items, pieces in (
        ("answers()", answers(), [answers]),
        ("isolated(answers())", isolated(answers()), [answers, isolated]),
    ):
        with asking_session("caller") as session, closing(items), trace() as path:
            read_one(items)
        show_code(read_one, *pieces, runs={_("one answer"): path})
        console.print(tree_of(session, count(1)))
        result = _("`{code}`: caller itself recorded {n} of its 1 calls.")
        verdict(len(session.calls) == 1, result.format(code=code, n=len(session.calls)))
    say(
        _("In `isolated`, replace `context.run(...)` with `next(...)`, and run demo 4 again."), "→ "
    )


def busy_at_first(sent: list[httpx2.Request]) -> httpx2.MockTransport:
    """Return the stand-in as a server that is busy for the first of the requests `sent` to it."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        if len(sent) > 1:
            return stand_in(request)
        return httpx2.Response(429, headers={"retry-after-ms": "10"})

    return httpx2.MockTransport(answer)


def wrapped_client(transport: Any, **options: Any) -> Any:
    http_client = httpx2.Client(transport=transport)
    client: Any = openai.OpenAI(http_client=http_client, **options)
    create = client.chat.completions.create

    def recorded(**request: Any) -> Any:
        reply = create(**request)
        if session := current_session():
            session.record(Call("create", request["model"]))
        return reply

    client.chat.completions.create = recorded
    return client


def somebody_elses(client: Any) -> None:
    messages = [{"role": "user", "content": "Who records this?"}]
    create = client.chat.completions.create
    create = partial(create, model=DEFAULT_MODEL, messages=messages)
    create()
    list(create(stream=True, stream_options={"include_usage": True}))
    with create(stream=True) as stream:
        next(stream)


def demo_recording_client() -> None:
    """A client that records every call

    `somebody_elses` has never heard of sessions. A wrapper around `create` sees only what
    enters and leaves the SDK. It misses retries, and a stream's tokens. A transport below the
    SDK sees each request, and reads each reply as it passes. The last stream is left after one
    event: its tokens stay unknown. (The server is always a stand-in. It is busy at first, so
    the SDK retries.)
    """
    show_code(somebody_elses, wrapped_client)
    question(_("Three calls, and the first one is sent twice. How many does the wrapper record?"))
    for make, pieces in (
        (wrapped_client, [wrapped_client]),
        (recording_client, [RecordingTransport.handle_request, RecordedBody.__iter__]),
    ):
        sent: list[httpx2.Request] = []
        with trace() as path, smart_session("report") as session:
            with make(busy_at_first(sent), **OFFLINE) as client:
                somebody_elses(client)
        show_code(*pieces, runs={make.__name__: path})
        console.print(tree_of(session, count(1)))
        result = _("Requests sent: {sent}, recorded: {recorded}.")
        result = result.format(sent=len(sent), recorded=len(session.calls))
        verdict(len(sent) == len(session.calls), result)
    say(_("In `somebody_elses`, delete `stream_options`, and run demo 5 again."), "→ ")


DEMOS = (
    demo_global,
    demo_token,
    demo_tasks_and_threads,
    demo_generators,
    demo_recording_client,
)
KEY_POINTS = """\
* All tasks share a global. A `ContextVar` has a value for each task and each thread.
* Keep the Token that `set()` returns, and `reset()` with it in a `finally`.
* A task keeps its copy of the context: a session whose block has ended must refuse its calls.
* Run a thread's job in a copy of the context, and a generator in its own context.
* Record below the SDK, in a transport. Nobody can forget it there."""


def hide_key(text: str) -> str:
    """Take the API key out of a text, unless it is a word such as "any"."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return text.replace(key, "***") if len(key) > 12 else text


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. If a real model does not answer, exit with one line."""
    global live
    text = _("ask a real model in demos 2 and 4: OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_MODEL")
    parser.add_argument("--live", action="store_true", help=text)
    options = parser.parse_args()
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        parser.error(_("--live needs OPENAI_API_KEY; a local server takes any value"))
    live = options.live
    if live:
        say(_("Demos 2 and 4 ask a real model. The others stay offline."))
    try:
        yield options
    except (openai.OpenAIError, ReplyError, httpx2.InvalidURL, ValueError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        message = hide_key(message)
        parser.exit(1, f"{parser.prog}: the model did not answer: {message}\n")


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
