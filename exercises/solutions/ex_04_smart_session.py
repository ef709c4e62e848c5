"""Solutions of the exercises of chapter 04, and why they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# --- 1 · bug ---

_role: ContextVar[str] = ContextVar("role", default="visitor")
_tokens: ContextVar[tuple[Token[str], ...]] = ContextVar("tokens", default=())


def current_role() -> str:
    """Return the role in which the code runs now."""
    return _role.get()


class ActingAs:
    """Give code a role for a block.

    What an open block has to remember belongs to the context that opened it, not to the manager,
    because all tasks share the manager. It is a tuple, since a task's copy of the context would
    share a list with the original.
    """

    def __init__(self, role: str) -> None:
        self._new_role = role

    def __enter__(self) -> None:
        _tokens.set((*_tokens.get(), _role.set(self._new_role)))

    def __exit__(self, *exc_info: object) -> None:
        *outer, token = _tokens.get()
        _tokens.set(tuple(outer))
        _role.reset(token)


# --- 2 · task ---

_fields: ContextVar[Mapping[str, Any]] = ContextVar("fields", default=MappingProxyType({}))


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Add fields to every log line of the block.

    Each block makes a new dict and never changes an old one: a context is copied without its
    values, so tasks share them. `reset` restores the outer block's dict, and with it what was
    replaced or absent.
    """
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def current_fields() -> dict[str, Any]:
    """Return a copy of the fields of all open blocks."""
    return dict(_fields.get())


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
def current(made: Session | None) -> Iterator[None]:
    """Make a session the current one for a block; None hides the one around it."""
    token = _session.set(made)
    try:
        yield
    finally:
        _session.reset(token)


@contextmanager
def session(name: str) -> Iterator[Session]:
    """Record the calls made in the block. The session is a child of the one around it."""
    made, parent = Session(name), current_session()
    if parent is not None:
        parent.children.append(made)
    with current(made):
        yield made


def ask(prompt: str) -> str:
    """Ask a model (this one only repeats the prompt), and record the call."""
    if (here := current_session()) is not None:
        here.calls.append(prompt)
    return f"You asked: {prompt}"


@dataclass
class Outcome(Generic[R]):
    """What comes back from a job."""

    record: Session | None
    results: list[R]  # one, or none if it raised
    error: BaseException | None = None


def run_job(name: str | None, function: Callable[[T], R], item: T) -> Outcome[R]:
    """Run a job in its own session, in whichever thread or process this is."""
    record = None if name is None else Session(name)
    with current(record):
        try:
            return Outcome(record, [function(item)])
        except BaseException as error:
            return Outcome(record, [], error)


def run_all(executor: Executor, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Run a function for each item in the executor, and record the calls in the current session.

    No process can append to a list of another one, so each job records into its own session,
    which comes back as a part of the outcome, even with an error. Only this thread adds them to
    the caller's session, which makes threads and processes alike, and the order that of the items.
    """
    here = current_session()
    name = None if here is None else here.name
    futures: list[Future[Outcome[R]]] = []
    try:
        for item in items:
            futures.append(executor.submit(run_job, name, function, item))  # noqa: PERF401
        wait(futures)
    finally:
        for future in futures:
            future.cancel()  # after Ctrl-C, what has not started need not start
        outcomes = [outcome_of(future) for future in futures]
        for outcome in outcomes:
            if here is not None and outcome.record is not None:
                here.calls += outcome.record.calls
                here.children += outcome.record.children
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [result for outcome in outcomes for result in outcome.results]


def outcome_of(future: Future[Outcome[R]]) -> Outcome[R]:
    """Return a job's outcome, even if its process died, or its result cannot be pickled."""
    try:
        return future.result()
    except BaseException as error:
        return Outcome(None, [], error)
