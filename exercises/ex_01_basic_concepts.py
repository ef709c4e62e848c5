"""Exercises for chapter 01 · Cleanup runs, however the block ends

    .venv/bin/python -m pytest exercises/ex_01_basic_concepts.py
    .venv/bin/python -m pytest exercises/ex_01_basic_concepts.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

# --- 1 · bug ---


@contextmanager
def maintenance(flags: MutableMapping[str, bool]) -> Iterator[None]:
    """The site that stayed closed

    A deployment closes the site while it migrates the database. On Friday evening a migration
    failed, and the site stayed closed until Monday. Since then, somebody presses Ctrl-C as soon
    as a migration hangs, and then the site stays closed as well.

    Fix it: however the block ends, the site is as it was before, and the block's exception
    propagates. If `flags` has no key "maintenance", the site is open. Blocks nest: a deployment
    calls scripts that close the site, too.
    """
    flags["maintenance"] = True
    yield
    flags["maintenance"] = False


# --- 2 · task ---


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Change environment variables for one block

    A test needs `OPENAI_MODEL` to be set, and `OPENAI_API_KEY` to be absent:

        with environment(OPENAI_MODEL="gpt-4o-mini", OPENAI_API_KEY=None):
            ...

    In the block, each variable in `os.environ` has its new value; None removes it, if it is there.
    Afterwards, these variables are as before: old values are back, and what was absent is absent
    again. If a value cannot be set (it is not a str, for example), the error propagates and
    nothing stays changed.
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---


class GeneratorManager:
    """What the decorator makes of a generator. Change it as you like."""

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self.gen = generator  # Python's tests look for this name

    def __enter__(self) -> Any:
        return next(self.gen)

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> bool:
        try:
            if exc is None:
                next(self.gen)
            else:
                self.gen.throw(exc)
        except StopIteration:
            return exc is not None
        raise RuntimeError("the generator has a second `yield`")


def my_contextmanager(function: Callable[..., Generator[Any, None, None]]) -> Any:
    """Your own `contextmanager`, complete

    Chapter 01 rebuilds `@contextmanager` in 20 lines and says what they lack. Complete them,
    without `contextlib`: Python's own tests for `contextlib.contextmanager` will judge yours.
    """

    def make_manager(*args: Any, **kwargs: Any) -> GeneratorManager:
        return GeneratorManager(function(*args, **kwargs))

    return make_manager
