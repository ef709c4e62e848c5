"""What judges the exercises of chapter 01."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import unittest
from contextlib import suppress
from typing import Any
from unittest import mock

from judging import _, attempt, expect, keep_contract, task


@task(
    "01.1",
    _("The site that stayed closed"),
    "maintenance",
    lesson="python 01_basic_concepts.py 3 4",
    hint=_(
        "The exception comes out of `yield`. Which statement runs code even then? And what was "
        "the flag before the block?"
    ),
    strong_hint=_(
        "Put the last line into a `finally`. Before the `try`, remember what the flag was: False "
        "is right only for the outermost block."
    ),
)
def judge_maintenance(answer: Any) -> None:
    open_again = _("the site is open again")
    ways: list[tuple[str, BaseException | None]] = [
        (_("with maintenance(flags): the block ends well"), None),
        (_("with maintenance(flags): the block raises ValueError"), ValueError()),
        (_("with maintenance(flags): the user presses Ctrl-C"), KeyboardInterrupt()),
    ]
    for called, error in ways:
        flags = {"maintenance": False}
        came_out: BaseException | None = None
        with attempt(called, open_again):
            try:
                with answer.maintenance(flags):
                    closed = flags["maintenance"]
                    if error:
                        raise error
            except BaseException as caught:
                if error is None:
                    raise
                came_out = caught
        expect(closed, _("the site is closed during the block"), _("it is open"))
        expect(not flags["maintenance"], open_again, _("it is still closed"))
        expect(
            came_out is error,
            _("the block's exception comes out"),
            _("it disappears, so nobody learns that the migration failed")
            if came_out is None
            else _("another one comes out: {error}").format(error=repr(came_out)),
        )
    flags = {"maintenance": False}
    with attempt(_("one block inside another; the inner one ends")), answer.maintenance(flags):
        with answer.maintenance(flags):
            pass
        expect(
            flags["maintenance"],
            _("the site stays closed until the outer block ends"),
            _("the inner block opens it"),
        )
    flags = {}
    with attempt(_("`flags` has no key `maintenance`, since the site is open"), open_again):
        with answer.maintenance(flags):
            pass
    expect(
        not flags.get("maintenance"),
        open_again,
        _("afterwards flags is {flags}").format(flags=flags),
    )


@task(
    "01.2",
    _("Change environment variables for one block"),
    "environment",
    lesson="python 01_basic_concepts.py 4",
    hint=_(
        "What was absent must be absent again: None cannot be stored, and a variable that is "
        "absent cannot be deleted. And what if the second change fails after the first one?"
    ),
    strong_hint=_(
        "Make a copy, `before = dict(os.environ)`, change inside a `try`, and in `finally` restore "
        "each name in `changes`: its old value if `before` has one, else remove it."
    ),
)
def judge_environment(answer: Any) -> None:
    names = {"WORKSHOP_SET": "old", "WORKSHOP_ALSO_SET": "old"}
    for called, error in (
        (_("change two variables and remove one; the block ends well"), None),
        (_("change two variables and remove one; the block raises ValueError"), ValueError()),
        (_("change two variables and remove one; the user presses Ctrl-C"), KeyboardInterrupt()),
    ):
        with mock.patch.dict(os.environ, names):
            before = dict(os.environ)
            inside: dict[str, str] = {}
            with attempt(called), suppress(ValueError, KeyboardInterrupt):
                with answer.environment(
                    WORKSHOP_SET="new", WORKSHOP_ABSENT="new", WORKSHOP_ALSO_SET=None
                ):
                    inside = dict(os.environ)
                    if error:
                        raise error
            for name, value in (("WORKSHOP_SET", "new"), ("WORKSHOP_ABSENT", "new")):
                expect(
                    inside.get(name) == value,
                    _("in the block, {name} is {value}").format(name=name, value=repr(value)),
                    _("it is {value}").format(value=repr(inside.get(name))),
                )
            expect(
                "WORKSHOP_ALSO_SET" not in inside,
                _("in the block, WORKSHOP_ALSO_SET is absent, since it was given as None"),
                _("it is {value}").format(value=repr(inside.get("WORKSHOP_ALSO_SET"))),
            )
            compare_environment(before)
    with mock.patch.dict(os.environ, names):
        before = dict(os.environ)
        called = _('environment(WORKSHOP_SET="new", WORKSHOP_ABSENT=5): 5 is not a str')
        raised = False
        propagates = _("the TypeError of `os.environ` propagates")
        with attempt(called, propagates):
            try:
                with answer.environment(WORKSHOP_SET="new", WORKSHOP_ABSENT=5):
                    pass
            except TypeError:
                raised = True
        expect(raised, propagates, _("no exception comes out"))
        compare_environment(before)
        called = _("environment(WORKSHOP_ABSENT=None): it is absent already")
        with attempt(called), answer.environment(WORKSHOP_ABSENT=None):
            pass
        compare_environment(before)


def compare_environment(before: dict[str, str]) -> None:
    """Expect that os.environ is as it was before the block."""
    for name in sorted(before.keys() | os.environ.keys()):
        was, now = before.get(name), os.environ.get(name)
        if was is None:
            expected = _("afterwards, {name} is absent, as before").format(name=name)
        else:
            expected = _("afterwards, {name} is {value}").format(name=name, value=repr(was))
        happened = _("it is absent") if now is None else _("it is {value}").format(value=repr(now))
        expect(was == now, expected, happened)


@task(
    "01.3",
    _("Your own `contextmanager`, complete"),
    "my_contextmanager",
    "GeneratorManager",
    lesson="python 01_basic_concepts.py 6",
    hint=_(
        "Read the name of the test, and what it compares. The docstring of "
        "`contextmanager_from_scratch` in chapter 01 lists what the short version lacks."
    ),
    strong_hint=_(
        "The exception that comes out of `throw` may be the one that you threw in. Then restore "
        "its `__traceback__`, and return False. A StopIteration that leaves a generator becomes "
        "a RuntimeError; its `__cause__` is the StopIteration. A decorated function needs a new "
        "generator for each call, but `__enter__` drops the arguments: they may be large."
    ),
    seconds=20,
)
def judge_my_contextmanager(answer: Any) -> None:
    try:
        suite = importlib.import_module("test.test_contextlib")
    except ImportError:  # some distributions leave Python's own tests out
        suite = None
    if suite is not None:
        for name in unittest.defaultTestLoader.getTestCaseNames(suite.ContextManagerTestCase):
            run_cpython_test(suite, name, answer)

    from contract import Subject

    def subject() -> Subject:
        held: list[object] = []

        @answer.my_contextmanager
        def hold() -> Any:
            held.append(hold)
            try:
                yield
            finally:
                held.remove(hold)

        return Subject(
            open=hold,
            leaks=lambda: held,
            setup_faults="it only appends to a list",
            cleanup_faults="it only removes from a list",
        )

    keep_contract(subject)


def run_cpython_test(suite: Any, name: str, answer: Any) -> None:
    """Run one of CPython's tests of `contextlib.contextmanager` on the answer."""
    result = unittest.TestResult()
    line = inspect.getsourcelines(getattr(suite.ContextManagerTestCase, name))[1]
    called = _("{test}, a test of Python itself: {file}, line {line}")
    with attempt(called.format(test=name, file=suite.__file__, line=line)):
        with mock.patch.object(suite, "contextmanager", answer.my_contextmanager):
            suite.ContextManagerTestCase(name).run(result)
    for _test, report in result.errors + result.failures:
        errors = re.findall(r"(?m)^[\w.]+(?:: .*)?$", report)  # of a chain, the last one came out
        expect(False, _("it passes, as it does with contextlib's"), errors[-1])
