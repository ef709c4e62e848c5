"""Solutions of the exercises of chapter 07, and why they are right."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from functools import partial
from types import MethodType, TracebackType
from typing import Any, Self, TypeAlias

Factory: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]

# --- 1 · bug ---


class Connections:
    """Open one connection for each factory, and close them in reverse order.

    If `__aenter__` raises, `__aexit__` is never called, so set-up needs its own block, whose
    exits are moved out by `pop_all` only when nothing can fail any more. The exits get the
    exception of the block, and their answer is returned, as nested statements would do.
    """

    def __init__(self, factories: Sequence[Factory]) -> None:
        self.factories = factories
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> list[Any]:
        async with AsyncExitStack() as stack:
            values = [await stack.enter_async_context(make()) for make in self.factories]
            self.stack = stack.pop_all()
            return values
        # subtle: an exit may suppress the failure of a later set-up. There is no block to skip.
        raise RuntimeError("a manager suppressed the exception of another one's set-up")

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self.stack.__aexit__(exc_type, exc, traceback)


# --- 2 · task ---


@contextmanager
def cleanups() -> Iterator[Callable[..., None]]:
    """Call functions when the block ends, and raise every exception in one group.

    Even Ctrl-C in a cleanup must not keep the others from running, so `except` names
    BaseException; and `BaseExceptionGroup` makes an ExceptionGroup of itself whenever it can. The
    block's exception is raised again alone if nothing joins it, so that callers can catch it.
    """
    waiting: list[Callable[[], object]] = []
    errors: list[BaseException] = []

    def at_end(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        waiting.append(partial(function, *args, **kwargs))

    try:
        yield at_end
    except BaseException as error:
        errors.append(error)
        call_all(waiting, errors)
        if len(errors) == 1:
            raise
    else:
        call_all(waiting, errors)
    if errors:
        raise BaseExceptionGroup("a block and its cleanups", errors) from None


def call_all(waiting: list[Callable[[], object]], errors: list[BaseException]) -> None:
    """Call the functions, the last one first, and collect what they raise."""
    while waiting:
        try:
            waiting.pop()()
        except BaseException as error:
            errors.append(error)


# --- 3 · capstone ---


class Unwinding:
    """The exception that travels outwards, from one exit to the next."""

    def __init__(self, exc_info: tuple[Any, ...]) -> None:
        self.exc_info = exc_info  # what the next exit gets
        self.block_raised = exc_info[0] is not None
        self.context = exc_info[1] and exc_info[1].__context__
        self.raised_by_exit = False
        self.handled = sys.exc_info()[1]  # Python takes it for the context of what an exit raises

    def suppress(self) -> None:
        """Go on without an exception."""
        self.exc_info = (None, None, None)
        self.raised_by_exit = False

    def replace(self, raised: BaseException) -> None:
        """Go on with an exception that an exit has raised, or raised again."""
        before = self.exc_info[1]
        for oldest in contexts(raised):
            context = oldest.__context__
            if context is None or context is before or context is self.handled:
                break
        # subtle: None may be on purpose, as in `raise ... from None`. But if nothing was handled,
        # and the block ended well, it only says that Python did not know of the exits before.
        implicit = context is self.handled
        if self.handled is None and self.block_raised:
            implicit = False
        # subtle: an exit may raise an old exception again, which must not become its own context
        if implicit and oldest is before:
            oldest.__context__ = self.context
        elif implicit and all(each is not oldest for each in contexts(before)):
            oldest.__context__ = before
        self.context = raised.__context__
        self.exc_info = (type(raised), raised, raised.__traceback__)
        self.raised_by_exit = True

    def end(self) -> bool:
        """Raise what the last exit raised, or tell `with` whether the exception is suppressed."""
        if self.raised_by_exit:
            raised = self.exc_info[1]
            context = raised.__context__
            try:
                raise raised
            finally:
                raised.__context__ = context  # `raise` has just replaced it
        return self.block_raised and self.exc_info[0] is None


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its context, and so on; stop before one that came already."""
    seen: list[BaseException] = []
    while error is not None and all(error is not each for each in seen):
        seen.append(error)
        yield error
        error = error.__context__


class BaseStack:
    """What both stacks share: exits, each with whether it must be awaited."""

    def __init__(self) -> None:
        self._exit_callbacks: deque[tuple[bool, Callable[..., Any]]] = deque()

    def pop_all(self) -> Self:
        """Move all exits to a new stack."""
        new = type(self)()
        self._exit_callbacks, new._exit_callbacks = new._exit_callbacks, self._exit_callbacks
        return new

    def enter_context(self, manager: Any) -> Any:
        """Enter a manager and return its value."""
        enter, leave = methods(manager, "__enter__", "__exit__", "the context manager protocol")
        value = enter()
        self._exit_callbacks.append((False, leave))
        return value

    def push(self, exit_function: Any) -> Any:
        """Add the exit of a manager that is not entered here, or a function like an exit."""
        bound = method(exit_function, "__exit__") or exit_function
        self._exit_callbacks.append((False, bound))
        return exit_function

    def callback(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Add a function that is called at the end."""

        def call(*exc_info: object) -> None:
            function(*args, **kwargs)

        call.__wrapped__ = function  # type: ignore[attr-defined]
        self._exit_callbacks.append((False, call))
        return function


class MyExitStack(BaseStack):
    """A stack of exits, for `with`.

    The stack is unwound by a loop, so that its depth has no limit; one exit's exception is the
    next one's argument, and only the last one is raised. Python takes what `with` handles outside
    the loop for the context of everything raised in it, so each new exception's context is mended.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> bool:
        unwinding = Unwinding(exc_info)
        while self._exit_callbacks:
            _awaits, leave = self._exit_callbacks.pop()
            try:
                if leave(*unwinding.exc_info):
                    unwinding.suppress()
            except BaseException as raised:
                unwinding.replace(raised)
        return unwinding.end()

    def close(self) -> None:
        """Run all exits now."""
        self.__exit__(None, None, None)


class MyAsyncExitStack(BaseStack):
    """A stack of exits, for `async with`; those of sync managers stand beside async ones."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: Any) -> bool:
        unwinding = Unwinding(exc_info)
        while self._exit_callbacks:
            awaits, leave = self._exit_callbacks.pop()
            try:
                answer = leave(*unwinding.exc_info)
                if awaits:
                    answer = await answer
                if answer:
                    unwinding.suppress()
            except BaseException as raised:
                unwinding.replace(raised)
        return unwinding.end()

    async def aclose(self) -> None:
        """Run all exits now."""
        await self.__aexit__(None, None, None)

    async def enter_async_context(self, manager: Any) -> Any:
        """Enter an async manager and return its value."""
        protocol = "the asynchronous context manager protocol"
        enter, leave = methods(manager, "__aenter__", "__aexit__", protocol)
        value = await enter()
        self._exit_callbacks.append((True, leave))
        return value

    def push_async_exit(self, exit_function: Any) -> Any:
        """Add the exit of an async manager that is not entered here, or a function like one."""
        bound = method(exit_function, "__aexit__") or exit_function
        self._exit_callbacks.append((True, bound))
        return exit_function

    def push_async_callback(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a coroutine function that is called and awaited at the end."""

        async def call(*exc_info: object) -> None:
            await function(*args, **kwargs)

        call.__wrapped__ = function  # type: ignore[attr-defined]
        self._exit_callbacks.append((True, call))
        return function


def method(manager: Any, name: str) -> MethodType | None:
    """Return a method of the manager's type, bound to the manager, or None."""
    function = getattr(type(manager), name, None)
    return function and MethodType(function, manager)


def methods(manager: Any, enter: str, leave: str, protocol: str) -> list[MethodType]:
    """Return both methods of a manager. Raises TypeError if one is missing."""
    found = [each for name in (enter, leave) if (each := method(manager, name))]
    if len(found) < 2:
        raise TypeError(f"{type(manager).__qualname__!r} object does not support {protocol}")
    return found
