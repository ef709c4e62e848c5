"""Solution of the capstone of chapter 01: your own `contextmanager`, complete.

It passes all tests that CPython has for `contextlib.contextmanager`, its ContextManagerTestCase.
Chapter 01 shows the short version; this one adds what that one lacks: errors that name the
mistake, a StopIteration that stays one, clean tracebacks, and use as a decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
        """Decorate a function: each call runs in a block of its own."""

        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> Any:
            with type(self)(*self._recipe):  # a generator runs only once
                return function(*args, **kwargs)

        return inside


def contextmanager_from_scratch(
    function: Callable[P, Iterator[T]],
) -> Callable[P, GeneratorManager[T]]:
    """Turn a generator function with one `yield` into a context manager, as contextlib does."""

    @wraps(function)
    def manager(*args: P.args, **kwargs: P.kwargs) -> GeneratorManager[T]:
        return GeneratorManager(function, args, kwargs)

    return manager
