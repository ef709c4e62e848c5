"""Solutions of the exercises of chapter 01, and why they are right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# --- 1 · bug ---


@contextmanager
def maintenance(flags: MutableMapping[str, bool]) -> Iterator[None]:
    """Close the site for a block.

    `finally` runs however the block ends; `except Exception` would miss Ctrl-C. The old value is
    restored, not False, because an inner block must not open the site for the outer one.
    """
    before = flags.get("maintenance", False)
    flags["maintenance"] = True
    try:
        yield
    finally:
        flags["maintenance"] = before


# --- 2 · task ---


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Change environment variables for a block; None removes one.

    The changes stand inside the `try`, because the second one may fail after the first one. A
    name that was absent is removed again: restoring None would be an error, and "" is not absent.
    """
    before = {name: os.environ.get(name) for name in changes}
    try:
        put(changes)
        yield
    finally:
        put(before)


def put(values: Mapping[str, str | None]) -> None:
    """Set environment variables; None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# --- 3 · capstone ---


class GeneratorManager(Generic[T]):
    """A context manager that runs a generator to its `yield`, and then to its end."""

    def __init__(self, function: Callable[..., Iterator[T]], args: Any, kwargs: Any) -> None:
        self.gen: Any = function(*args, **kwargs)  # its body has not started yet
        self._recipe = (function, args, kwargs)
        self.__doc__ = function.__doc__

    def __enter__(self) -> T:
        del self._recipe  # release the arguments: they may be large
        try:
            value: T = next(self.gen)  # run the set-up, up to `yield`
        except StopIteration:
            raise RuntimeError("generator didn't yield") from None
        return value

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if exc_type is not None and exc is None:
            exc = exc_type()  # an old-style caller passed only the class
        try:
            if exc is None:
                next(self.gen)  # run the cleanup
            else:
                self.gen.throw(exc)  # raise the block's exception at the `yield`
        except StopIteration as end:
            # It ended. After an exception, that means that it caught the exception.
            return exc is not None and end is not exc
        except BaseException as raised:
            # subtle: Python wraps a StopIteration that leaves a generator (PEP 479).
            cause = raised.__cause__ if isinstance(raised, RuntimeError) else None
            wrapped = isinstance(exc, StopIteration) and cause is exc
            if exc is None or not (raised is exc or wrapped):
                raise
            exc.__traceback__ = traceback  # without the lines of this file
            return False  # so that the `with` statement raises it again
        try:
            raise RuntimeError("generator didn't stop: it has a second yield")
        finally:
            self.gen.close()

    def __call__(self, function: Callable[P, Any]) -> Callable[P, Any]:
        """Decorate a function: each call runs in its own block."""

        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> Any:
            with type(self)(*self._recipe):  # a generator runs only once
                return function(*args, **kwargs)

        return inside


def my_contextmanager(
    function: Callable[P, Iterator[T]],
) -> Callable[P, GeneratorManager[T]]:
    """Turn a generator function with one `yield` into a context manager, as contextlib does.

    The manager keeps the recipe, not only the generator, so that a decorated function gets a new
    generator at each call. An exception that the generator raises again is left to `with`, so
    that its traceback and its identity stay; only a new one comes from here.
    """

    @wraps(function)
    def manager(*args: P.args, **kwargs: P.kwargs) -> GeneratorManager[T]:
        return GeneratorManager(function, args, kwargs)

    return manager
