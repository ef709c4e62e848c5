"""Exercises for chapter 04 · Context without parameters

    .venv/bin/python -m pytest exercises/ex_04_smart_session.py
    .venv/bin/python -m pytest exercises/ex_04_smart_session.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# --- 1 · bug ---

_role: ContextVar[str] = ContextVar("role", default="visitor")


def current_role() -> str:
    """Return the role in which the code runs now."""
    return _role.get()


class ActingAs:
    """The visitor who stayed an administrator

    A shop asks `current_role()` before it deletes an order. It makes its managers once, when it
    starts, and every request uses them:

        as_admin = ActingAs("admin")

        with as_admin:
            delete(order)

    In tests this works. In production, requests overlap, and a helper uses `with as_admin:` inside
    `with as_admin:`. Then the end of a block raises RuntimeError or ValueError, and the visitor
    stays an administrator.

    Fix it: you can enter the same manager again, inside its own block, and in several tasks and
    threads at once, in any order. However a block ends, `current_role()` is what it was before the
    block. A task that is created in a block keeps the role of that block, even after the block has
    ended.
    """

    def __init__(self, role: str) -> None:
        self._new_role = role
        self._token: Token[str] | None = None

    def __enter__(self) -> None:
        self._token = _role.set(self._new_role)

    def __exit__(self, *exc_info: object) -> None:
        assert self._token is not None
        _role.reset(self._token)


# --- 2 · task ---


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Fields for every log line of a block

    Each log line of a server should have the number of its request. Most functions that log have
    never heard of requests, so they ask `current_fields()`:

        with log_fields(request=7):
            with log_fields(user="ada"):
                current_fields()  # returns {"request": 7, "user": "ada"}

    Write both functions. `current_fields()` returns a dict with the fields of all open blocks, in
    which an inner block replaces a field of the same name. Whoever gets the dict may change it:
    that changes no log line. However a block ends, the fields are as before.

    A task that is created in a block starts with its fields. But what a task or a thread adds is
    seen by nobody else.
    """
    raise NotImplementedError
    yield


def current_fields() -> dict[str, Any]:
    """Return a dict with the fields of all open blocks."""
    raise NotImplementedError


# --- 3 · capstone ---


@dataclass
class Session:
    """The calls made in a block, and the sessions opened in it."""

    name: str
    calls: list[str] = field(default_factory=list)
    children: list[Session] = field(default_factory=list)


_session: ContextVar[Session | None] = ContextVar("session", default=None)


def current_session() -> Session | None:
    """Return the innermost session, or None."""
    return _session.get()


@contextmanager
def session(name: str) -> Iterator[Session]:
    """Record the calls made in the block. The session is a child of the one around it."""
    made, parent = Session(name), current_session()
    if parent is not None:
        parent.children.append(made)
    token = _session.set(made)
    try:
        yield made
    finally:
        _session.reset(token)


def ask(prompt: str) -> str:
    """Ask a model (this one only repeats the prompt), and record the call."""
    if (here := current_session()) is not None:
        here.calls.append(prompt)
    return f"You asked: {prompt}"


def run_all(
    executor: Executor,
    function: Callable[[T], R],
    items: Iterable[T],
) -> list[R]:
    """A session that follows its calls into threads and process pools

    `session` records each `ask` in its block. But a review of a hundred files asks in a pool of
    threads or processes, and those calls are missing, so nobody knows what the review cost.

    Write `run_all`, which runs `function(item)` in the executor for each item, without waiting for
    one before it submits the next, and returns the results in the order of the items. The executor
    is a ThreadPoolExecutor or a ProcessPoolExecutor. Change the rest of this part as you like, but
    keep its names.

    When `run_all` returns or raises, the session in which it was called is as if this thread had
    run one item after the other: it has all their calls, and as children the sessions that they
    opened, both in the order of the items. While a job runs, `current_session()` has the name of
    that session. Outside a session, it is None, and nothing is recorded.

    A job may raise anything, even SystemExit. Then the other jobs still run to their end, all
    calls are recorded, and at last `run_all` raises the error of the first item that failed.

    Workers are shared: the same thread or process runs jobs of many sessions, and several threads
    may use `run_all` at once. Each call belongs to one session only.
    """
    return list(executor.map(function, items))
