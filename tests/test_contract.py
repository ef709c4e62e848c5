"""The contract is held to what it promises.

It must reject each defect by those ways out that the manager forgot and by no others, and pass the
correct manager: a loan of two books from a shelf, first and second.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio  # noqa: F401  # so that its cancel scopes are tried, too
import contract
import pytest
from conftest import ROOT, chapter_path
from contract import ASYNC_WAYS, SYNC_WAYS, Broken, Subject, Way, check


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is tried here has no place in the summary of the suite."""
    monkeypatch.setattr(contract, "managers", set())
    monkeypatch.setattr(contract, "counts", Counter())
    return contract.counts


# --- The manager under examination ---


class Book:
    """What a loan gives; while it is open it is also the `current` one."""

    is_open = True

    def read(self) -> None:
        if not self.is_open:
            raise ValueError("read of closed book")
        if current.get() is not self:
            raise LookupError("another book is current")


current: contextvars.ContextVar[Book | None] = contextvars.ContextVar("current", default=None)


class Shelf:
    """Knows what is taken; either end of a loan can be made to fail."""

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.taken: list[str] = []
        self.stuck = ""
        self.newest = Book()

    def leaks(self) -> object:
        left = [*self.taken, *(["current book"] if current.get() else [])]
        return left and f"still taken: {left}"

    @contextmanager
    def sticks(self, where: str) -> Iterator[type[OSError]]:
        with mock.patch.object(self, "stuck", where):
            yield OSError

    async def take(self, name: str) -> None:
        if self.waits:
            await asyncio.sleep(0)  # before it is taken, so that a cancel finds nothing half done
        if self.stuck == f"take {name}":
            raise OSError
        self.taken.append(name)

    def grant(self, request: asyncio.Future[None]) -> None:
        if self.stuck == "take second":
            request.set_exception(OSError)
        elif not request.done():
            self.taken += ["first", "second"]
            request.set_result(None)

    def give_back(self, name: str) -> None:
        if name in self.taken:
            self.taken.remove(name)
        if self.stuck == f"give back {name}":
            raise OSError  # given back all the same, as close() closes if flush fails

    def give_back_both(self) -> None:
        try:
            self.give_back("second")
        finally:
            self.give_back("first")

    async def give_back_slowly(self) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.give_back_both()


class Loan:
    """Lends both books, correctly or with one defect."""

    def __init__(self, shelf: Shelf, defect: str = "") -> None:
        self.shelf, self.defect = shelf, defect
        if defect == "acquires when made":
            shelf.taken += ["first", "second"]

    async def __aenter__(self) -> Any:
        if self.defect == "loses what was granted":
            request = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(self.shelf.grant, request)
            await request
        elif self.defect != "acquires when made":
            await self.shelf.take("first")
            try:
                await self.shelf.take("second")
            except BaseException:
                if self.defect != "leaks half a set-up":
                    self.shelf.give_back("first")
                raise
        if self.defect == "never awaits its heartbeat":
            self.heartbeat = asyncio.create_task(asyncio.Event().wait())
        self.book = self.shelf.newest = Book()
        self.token = current.set(self.book)
        return mock.Mock() if self.defect == "never closes" else self.book

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error and self.defect == "has no finally":
            return False
        if self.defect == "catches Exception" and not isinstance(error, Exception | None):
            return False
        if isinstance(error, asyncio.CancelledError) and self.defect == "undoes a cancellation":
            task: Any = asyncio.current_task()
            task.uncancel()
        self.close()
        await self.give_back()
        if isinstance(error, contract.Failure) and self.defect == "wraps":
            raise RuntimeError("something went wrong") from error
        return self.defect == "swallows"

    def close(self) -> None:
        if self.defect == "never awaits its heartbeat":
            self.heartbeat.cancel()
        if self.defect == "restores None":
            current.set(None)
        elif self.defect != "leaves the variable set":
            current.reset(self.token)
        book = self.shelf.newest if self.defect == "keeps its state on the shelf" else self.book
        book.is_open = self.defect == "fails oddly after close"

    async def give_back(self) -> None:
        match self.defect:
            case "stops at the first failure":
                self.shelf.give_back("second")
                self.shelf.give_back("first")
            case "hides its failure":
                with suppress(OSError):
                    self.shelf.give_back_both()
            case "hides the body's error":
                try:
                    self.shelf.give_back_both()
                except OSError:
                    raise OSError("could not give the books back") from None
            case "awaits in its cleanup":
                await self.shelf.give_back_slowly()
            case "shields without waiting":
                await asyncio.shield(self.shelf.give_back_slowly())
            case "shields once":
                work = asyncio.ensure_future(self.shelf.give_back_slowly())
                try:
                    await asyncio.shield(work)
                except asyncio.CancelledError:
                    await work
                    raise
            case _:
                self.shelf.give_back_both()
                if self.defect == "releases twice":
                    self.shelf.give_back_both()


class Plain:
    """The same for `with`, from a shelf at which nobody waits."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    def __enter__(self) -> Any:
        return contract.drive(self.manager.__aenter__())

    def __exit__(self, *raised: Any) -> Any:
        return contract.drive(self.manager.__aexit__(*raised))


# --- The table: which ways out reject which defect ---

PLAIN_WAYS = {way.__name__ for way in SYNC_WAYS}
ASYNC = {way.__name__: way for way in ASYNC_WAYS}
BY_ERRORS = {name for name in PLAIN_WAYS if name.startswith("raises_")}
BY_FAULTS = {"clean_up_fails", "clean_up_fails_after_an_error"}
ERRORS_TOO = {"used_after_close", "nested"}
ENTERED = PLAIN_WAYS - {"never_entered", "set_up_fails"}

WAITING = "async_cancelled_while_it_waits"
SERVED = "async_cancelled_just_as_it_is_served"
TWICE = "async_cancelled_twice_anywhere"
ANYIO = "async_cancelled_by_an_anyio_scope"  # cancels again at each turn, so swallowing is no use
SWALLOWED = {WAITING, SERVED, TWICE}
CANCELLED = {*SWALLOWED, ANYIO}

# By these ways, for `with` as for `async with`; and by these, if it awaits.
DEFECTS: dict[str, tuple[set[str], set[str]]] = {
    "leaves the variable set": (ENTERED, CANCELLED),
    "has no finally": (BY_ERRORS | ERRORS_TOO | {"clean_up_fails_after_an_error"}, CANCELLED),
    "swallows": (BY_ERRORS, CANCELLED),
    "catches Exception": (BY_ERRORS - {"raises_exception", "raises_stop_iteration"}, CANCELLED),
    "wraps": ({"raises_exception"} | ERRORS_TOO, set()),
    "leaks half a set-up": ({"set_up_fails"}, SWALLOWED),
    "stops at the first failure": (BY_FAULTS, set()),
    "hides its failure": (BY_FAULTS, set()),
    "hides the body's error": ({"clean_up_fails_after_an_error"}, set()),
    "acquires when made": ({"never_entered", "set_up_fails"}, set()),
    "restores None": ({"nested"}, set()),
    "never closes": (ERRORS_TOO, set()),
    "fails oddly after close": (ERRORS_TOO, set()),
    "keeps its state on the shelf": ({"nested", "concurrent"}, set()),
}
ASYNC_DEFECTS: dict[str, tuple[set[str], set[str]]] = {
    "loses what was granted": (set(), {SERVED}),
    "awaits in its cleanup": (set(), CANCELLED),
    "shields without waiting": (set(), CANCELLED - {SERVED}),
    "shields once": (set(), {TWICE, ANYIO}),
    "undoes a cancellation": (set(), SWALLOWED),
    "never awaits its heartbeat": (ENTERED - {"concurrent"}, CANCELLED),
}


def loan(defect: str = "", plain: bool = False) -> Subject:
    shelf = Shelf(waits=not plain)
    return Subject(
        open=lambda: Plain(Loan(shelf, defect)) if plain else Loan(shelf, defect),
        leaks=shelf.leaks,
        use=lambda book: book.read(),
        closed_error=ValueError,
        setup_faults=[lambda: shelf.sticks("take second")],
        cleanup_faults=[lambda: shelf.sticks("give back second")],
    )


def bare(make: Callable[[], Any], leaks: Callable[[], object] = bool, **more: Any) -> Subject:
    """A subject that gives no means to try more than the block itself."""
    faults = {"setup_faults": "it has none", "cleanup_faults": "it has none"}
    return Subject(make, leaks, **({"visible": leaks is not bool} | faults | more))


def rejections(make: Callable[[], Subject], ways: Sequence[Way]) -> dict[str, Broken]:
    """The names of the ways that reject the manager, with what they say."""
    found = {}
    for way in ways:
        # What a broken manager leaves set in a context variable is left in a copy.
        verdict = contextvars.copy_context().run(contract.verdict, way, make())
        if isinstance(verdict, Broken):
            found[way.__name__] = verdict
    return found


def test_a_correct_manager_keeps_the_contract() -> None:
    check(lambda: loan(plain=True))
    check(loan())  # one subject for all ways


@pytest.mark.parametrize("defect", DEFECTS | ASYNC_DEFECTS)
def test_the_ways_that_a_manager_forgot_reject_it_and_no_others(defect: str) -> None:
    expected, if_it_awaits = (DEFECTS | ASYNC_DEFECTS)[defect]
    names = {f"async_{name}" for name in expected} | if_it_awaits
    assert rejections(lambda: loan(defect), ASYNC_WAYS).keys() == names
    if defect in DEFECTS:
        assert rejections(lambda: loan(defect, plain=True), SYNC_WAYS).keys() == expected


def test_each_way_rejects_some_broken_manager() -> None:
    rejecting = set[str]().union(*(ways for row in DEFECTS.values() for ways in row))
    assert rejecting == PLAIN_WAYS | CANCELLED
    assert ASYNC.keys() == {f"async_{name}" for name in PLAIN_WAYS} | CANCELLED


def test_an_oracle_that_never_sees_anything_is_rejected() -> None:
    found = rejections(lambda: bare(lambda: Loan(Shelf()), lambda: None), ASYNC_WAYS)
    assert found.keys() == {"async_returns", "async_nested"}
    assert found["async_returns"].what == "Loan is open, and `leaks` sees nothing"
    assert "visible=False" in found["async_returns"].remedy


def test_a_release_of_what_the_outer_block_holds_is_rejected() -> None:
    shelf = Shelf()
    make = partial(bare, lambda: Loan(shelf, "releases twice"), lambda: shelf.taken)
    ((name, broken),) = rejections(make, ASYNC_WAYS).items()
    assert name == "async_nested"
    assert "is open, but after an inner block `leaks` sees nothing" in broken.what


def test_ten_turns_of_the_event_loop_are_not_a_leak_and_eleven_are() -> None:
    @asynccontextmanager
    async def closing_in(turns: int) -> AsyncIterator[None]:
        held.append(1)
        yield
        release: Callable[[], object] = held.clear
        for _ in range(turns):
            release = partial(asyncio.get_running_loop().call_soon, release)
        release()

    held: list[int] = []
    ASYNC["async_returns"](bare(lambda: closing_in(10), lambda: held))
    with pytest.raises(Broken, match=r"closing_in left something behind: \[1\]"):
        ASYNC["async_returns"](bare(lambda: closing_in(11), lambda: held))


# --- What is said ---


def test_a_failure_names_the_way_the_await_and_the_leak_and_shows_the_path_and_a_remedy() -> None:
    taken: list[int] = []

    @asynccontextmanager
    async def forgetful() -> AsyncIterator[None]:
        taken.append(1)
        await asyncio.sleep(0)
        yield
        taken.clear()

    with pytest.raises(Broken) as raised:
        ASYNC[WAITING](bare(forgetful, lambda: taken))
    line = inspect.getsourcelines(forgetful)[1] + 3
    assert str(raised.value).startswith(f"{WAITING}: ")
    assert raised.value.what.endswith(
        "forgetful left something behind when cancelled while it waited in its set-up,"
        f" at {__file__}:{line} (await asyncio.sleep(0)): [1]"
    )
    path = [" ".join(text.split()[:2]) for text in raised.value.path.splitlines()[2:]]
    assert path == ["async def", "1 taken.append(1)", "2 await", "yield", "taken.clear()"]
    shown = str(raised.getrepr())
    assert "the path that ran" in shown
    assert "No `await` between taking and `try`" in shown
    assert "contract.py:" not in shown.replace("test_contract.py:", "")


def test_a_remedy_names_a_demo_with_a_word_of_its_subject_in_the_title() -> None:
    words = {
        1: {1: "with", 3: "finally", 5: "Suppressing", 6: "contextmanager"},
        2: {1: "closes"},
        3: {4: "await", 5: "Served", 7: "await"},
        4: {1: "global", 2: "reset"},
        7: {1: "Set-up fails", 4: "failures"},
    }
    places = re.findall(r"\(chapter (\d+), demo (\d+)\)", inspect.getsource(contract))
    named = {(number, demo) for number, demos in words.items() for demo in demos}
    assert {(int(number), int(demo)) for number, demo in places} == named
    for number, demo in named:
        source = chapter_path(number).read_text(encoding="utf-8")
        titles = re.findall(r'(?m)^(?:async )?def demo_\w+.*\n    """(.+)', source)
        assert words[number][demo] in titles[demo - 1]


def test_check_raises_every_failure_at_once() -> None:
    with pytest.raises(ExceptionGroup, match="2 of 14 ways out break it") as raised:
        check(lambda: loan("stops at the first failure", plain=True))
    names = [str(error).split(":")[0] for error in raised.value.exceptions]
    assert names == ["clean_up_fails", "clean_up_fails_after_an_error"]


def test_the_wrong_kind_of_manager_is_told_which_ways_are_meant() -> None:
    found = rejections(loan, SYNC_WAYS)
    assert [broken.what for broken in found.values()] == ["Loan is for ASYNC_WAYS"] * 14
    found = rejections(lambda: loan(plain=True), ASYNC_WAYS)
    assert [broken.what for broken in found.values()] == ["Plain is for SYNC_WAYS"] * 18
    with pytest.raises(Broken, match="a plain manager was meant, but something in here awaits"):
        contract.returns(bare(nullcontext, use=lambda value: asyncio.sleep(0)))


def test_the_example_of_the_docstring_is_the_one_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (fence,) = re.findall(r"(?s)```python\n(.*?)```", readme)
    for function in re.split(r"\n\n(?=def|@)", fence)[1:]:
        assert textwrap.indent(function.strip(), "    ") in str(contract.__doc__)


# --- What a subject can say ---


def test_a_subject_whose_oracle_reports_a_leak_at_the_start_is_not_judged() -> None:
    with pytest.raises(Broken, match="returns: not judged, before it began: the leak of"):
        contract.returns(bare(nullcontext, lambda: "the leak of another test"))


def test_a_way_that_the_subject_gives_no_means_to_try_is_skipped() -> None:
    make = partial(bare, nullcontext, nestable=False, concurrent=False)
    found = {way.__name__: contract.verdict(way, make()) for way in SYNC_WAYS}
    skipped = {name: str(skip) for name, skip in found.items() if skip is not None}
    assert skipped == dict.fromkeys(BY_FAULTS | {"set_up_fails"}, "it has none") | {
        "used_after_close": "the subject has no use",
        "nested": "the subject is not nestable",
        "concurrent": "the subject is not concurrent",
    }


def test_what_a_subject_suppresses_on_purpose_may_be_swallowed() -> None:
    @asynccontextmanager
    async def shrugging() -> AsyncIterator[None]:
        with suppress(contract.Failure, asyncio.CancelledError):
            yield

    check(bare(shrugging, suppresses=(contract.Failure, asyncio.CancelledError)))


def test_a_subject_must_give_faults_or_say_why_it_has_none() -> None:
    with pytest.raises(TypeError, match=r"missing 2 required .*'setup_faults' and"):
        Subject(nullcontext, bool)  # type: ignore[call-arg]
    for kind in ("setup_faults", "cleanup_faults"):
        with pytest.raises(TypeError, match="needs faults, or a str that says why"):
            bare(nullcontext, bool, **{kind: []})


def test_a_value_without_closed_error_must_stay_usable() -> None:
    contract.used_after_close(bare(nullcontext, use=lambda value: None))
    with pytest.raises(Broken, match="used_after_close: ZeroDivisionError"):
        contract.used_after_close(bare(nullcontext, use=lambda value: 1 / 0))


def test_a_fault_must_strike_and_by_its_own_error() -> None:
    subject = bare(nullcontext, setup_faults=[nullcontext], cleanup_faults=[nullcontext])
    with pytest.raises(Broken, match=r"to fail under setup_faults\[0\], but was entered"):
        contract.set_up_fails(subject)
    with pytest.raises(Broken, match=r"under cleanup_faults\[0\] without a word"):
        contract.clean_up_fails(subject)

    @contextmanager
    def failing() -> Iterator[None]:
        raise ExceptionGroup("", [OSError()])
        yield

    contract.set_up_fails(bare(failing, setup_faults=[partial(nullcontext, OSError)]))
    with pytest.raises(Broken, match="not by its <class 'LookupError'>: Exc"):
        contract.set_up_fails(bare(failing, setup_faults=[partial(nullcontext, LookupError)]))


# --- No way hangs ---


def limit_is_near() -> None:
    """What hangs calls this: the limit must be running, and is brought nearer."""
    left, _interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= 2 * contract.PATIENCE
    signal.setitimer(signal.ITIMER_REAL, 0.05, 1)


# On a busy machine the limit may strike in a weakref's callback, which cannot raise: it strikes
# again a second later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_hangs_is_reported_by_every_way(tasks_may_be_abandoned: None) -> None:
    @contextmanager
    def locked() -> Iterator[None]:
        if lock.locked():
            hang()
        with lock:
            yield

    @contextmanager
    def hanging() -> Iterator[None]:
        try:
            yield
        finally:
            hang()

    def hang() -> Any:
        limit_is_near()
        ends.wait(5)

    @asynccontextmanager
    async def deaf() -> AsyncIterator[None]:
        try:
            yield
        finally:
            limit_is_near()
            await asyncio.wait_for(asyncio.Event().wait(), 5)

    ends, lock = threading.Event(), threading.Lock()
    entered = BY_ERRORS | {"returns", "nested", "concurrent"}
    assert contract.ways_for(bare(hanging)) is SYNC_WAYS
    found = rejections(partial(bare, hanging, at_once=2), SYNC_WAYS)
    assert found.keys() == entered
    names = {"async_returns", *SWALLOWED}
    found |= rejections(partial(bare, deaf), [ASYNC[name] for name in names])
    assert found.keys() == entered | names
    assert all("did not end within 10 s" in broken.what for broken in found.values())
    with pytest.raises(Broken, match="making the manager did not end within 10 s"):
        contract.returns(bare(hang))
    with pytest.raises(Broken, match=r"(?s)locked did not end within 10 s.*nestable=False"):
        contract.nested(bare(locked, lock.locked))
    ends.set()


def test_without_signals_what_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def waiting() -> AsyncIterator[None]:
        yield
        await asyncio.wait_for(asyncio.Event().wait(), 5)

    monkeypatch.setattr(contract, "can_interrupt", lambda: False)  # as on Windows
    monkeypatch.setattr(contract, "PATIENCE", 0.02)
    with pytest.raises(Broken, match=r"waiting did not end within 0.02 s"):
        ASYNC[WAITING](bare(waiting))
    lock, async_lock = threading.Lock(), asyncio.Lock()
    with pytest.raises(Broken, match="4 blocks could not be open at once: is it conc"):
        contract.concurrent(bare(lambda: lock, lock.locked))
    with pytest.raises(Broken, match="4 blocks could not be open at once: is it conc"):
        ASYNC["async_concurrent"](bare(lambda: async_lock, async_lock.locked))


def test_awaits_without_an_end_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def waiting_for_ever() -> AsyncIterator[None]:
        for _ in range(100):
            await asyncio.sleep(0)
        yield

    monkeypatch.setattr(contract, "MOST_SUSPENSIONS", 5)
    with pytest.raises(Broken, match="waiting_for_ever was cancelled at 5 awaits, and"):
        ASYNC[WAITING](bare(waiting_for_ever))


def test_the_injection_points_of_a_kept_contract_are_counted(counts: Counter[str]) -> None:
    check(lambda: loan(plain=True))
    faults, left_by_error = 1 + 1 + 1, len(BY_ERRORS) + 1 + len(ERRORS_TOO)
    assert counts == {"ways": 14, "points": faults + left_by_error}
    assert contract.managers == {"Plain"}
    counts.clear()
    for name in (TWICE, ANYIO):
        ASYNC[name](loan())
    awaits = 3  # two in the set-up, one in the body: a cancelled block waits no more
    assert counts == {"ways": 2, "points": awaits + 1, "cancellations": awaits + 1}
    counts.clear()
    rejections(lambda: loan("leaves the variable set"), [ASYNC[TWICE]])
    contract.verdict(contract.clean_up_fails, bare(nullcontext))  # skipped
    assert counts == {}


def test_a_debuggers_trace_function_is_left_alone() -> None:
    with mock.patch.object(sys, "gettrace"), mock.patch.object(sys, "settrace") as settrace:
        contract.returns(loan(plain=True))
    assert settrace.mock_calls == []


# --- From the command line ---

FILE = """
import signal
from contextlib import contextmanager
from contract import Subject
held = []
@contextmanager
def careful():
    held.append(1)
    try:
        yield
    finally:
        held.pop()
@contextmanager
def careless():
    held.append(open(__file__))
    yield
    held.pop().close()
@contextmanager
def stubborn():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    yield
    signal.pause()
def subject():
    return Subject(careful, lambda: held, setup_faults="it counts", cleanup_faults="it counts")
"""


def judge(folder: Path, factory: str) -> subprocess.CompletedProcess[str]:
    # A module of this name is imported already: it must not be taken for the file.
    folder.joinpath("select.py").write_text(FILE)
    command = [sys.executable, contract.__file__, f"select.py:{factory}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_manager_is_judged_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = judge(tmp_path, "subject")
    rows = ended.stdout.splitlines()
    assert [row.split()[1] for row in rows] == [way.__name__ for way in SYNC_WAYS]
    assert "✓ nested" in rows
    assert re.search("(?m)^- set_up_fails +not tried: it counts$", ended.stdout)
    assert ended.returncode == 0
    ended = judge(tmp_path, "nobody")
    assert (ended.returncode, ended.stderr) == (2, "select.py has no function 'nobody'\n")
    assert contract.main([]) == 2
    assert "usage: " in capsys.readouterr().err


def test_a_bare_manager_is_judged_by_what_it_leaves_open(tmp_path: Path) -> None:
    ended = judge(tmp_path, "careless")
    assert ended.returncode == 1
    assert re.search(
        "✗ raises_exception +careless left something behind: .*select.py", ended.stdout
    )
    assert "the path that ran" in ended.stdout


def test_the_command_ends_even_if_nothing_can_interrupt_a_manager(tmp_path: Path) -> None:
    tmp_path.joinpath("mine.py").write_text(FILE)
    code = "import contract; contract.GIVE_UP = 0.1; contract.main(['mine.py:stubborn'])"
    options: Any = {"env": {"PYTHONPATH": str(ROOT / "tests")}, "cwd": tmp_path, "timeout": 60}
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, **options)
    assert (ended.returncode, b"in stubborn" in ended.stderr) == (1, True)
