"""Exercises for chapter 07 · One resource or any number

    .venv/bin/python -m pytest exercises/ex_07_asyncexitstack_vs_asynccontextmanager.py
    .venv/bin/python -m pytest exercises/ex_07_asyncexitstack_vs_asynccontextmanager.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from typing import Any, TypeAlias

Factory: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]

# --- 1 · bug ---


class Connections:
    """The connections that nobody closed

    A shop connects to its database and to its mail servers when it starts. One night, a mail
    server was down. The shop was restarted every ten seconds, and each attempt left a connection
    to the database open, until the database accepted no more. In the morning somebody found half
    an order in the database: a block had raised, and the transaction was committed all the same.

    Fix it: `async with Connections(factories) as values` does what nested `async with`
    statements do, one for each factory's manager, the first one outermost. If a manager cannot be
    entered, or the task is cancelled meanwhile, those before it are exited. Each exit gets the
    exception that ended the block or the set-up, or None, and may suppress that of the block. An
    object can be used again after its block.
    """

    def __init__(self, factories: Sequence[Factory]) -> None:
        self.factories = factories
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> list[Any]:
        enter = self.stack.enter_async_context
        return [await enter(make()) for make in self.factories]

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.stack.aclose()


# --- 2 · task ---


@contextmanager
def cleanups() -> Iterator[Callable[..., None]]:
    """Clean up, and lose no error

    An installer notes, step by step, what has to be done at the end:

        with cleanups() as at_end:
            at_end(os.remove, "download.tmp")
            at_end(notify, "admin", subject="installed")

    However the block ends, these functions are called with their arguments, the last one first,
    and all of them, even if some raise. If none raises, the block ends as it would without them.
    Otherwise, a `BaseExceptionGroup` comes out. It holds every exception: first that of the block,
    if it has raised, then those of the functions, in the order in which they were raised. If all
    are of type `Exception`, it is an `ExceptionGroup`. (A stack would lose most of them: demo 4.)
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---


class MyExitStack:
    """Your own `ExitStack`, then your own `AsyncExitStack`

    Write both classes, with all their methods, but without those of `contextlib`. This lists them:

        python -m pydoc contextlib.ExitStack contextlib.AsyncExitStack

    Python's own tests for the two classes judge yours. They look inside, too: `_exit_callbacks`
    holds a pair for each exit, the last one at the right. The first item of a pair is for your own
    use. The second one is what you will call with `(exc_type, exc, traceback)`. For a manager it
    is the bound `__exit__` or `__aexit__`, for `push(f)` it is `f`, and for `callback(f, ...)` a
    function of your own, with another name and no docstring, whose `__wrapped__` is `f`.

    Look up the methods of a manager on its type, as `with` does. If one is missing, raise a
    TypeError with the words of `with`: "... does not support the context manager protocol", or "the
    asynchronous context manager protocol". `f` may have any keyword arguments, even `self`.
    `pop_all` makes a stack of the type of `self`. What each exit gets, and what comes out, is the
    same as in nested `with` statements, and so is each exception's `__context__`.
    """

    def __init__(self) -> None:
        self._exit_callbacks: deque[tuple[Any, Callable[..., Any]]] = deque()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: Any) -> bool:
        while self._exit_callbacks:
            _yours, exit_function = self._exit_callbacks.pop()
            exit_function(*exc_info)
        return False

    def enter_context(self, manager: Any) -> Any:
        value = manager.__enter__()
        self._exit_callbacks.append((None, manager.__exit__))
        return value


class MyAsyncExitStack:
    """Your own `AsyncExitStack`. It takes sync managers and functions, too."""
