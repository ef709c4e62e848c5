# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16"]
# ///
"""Chapter 01 · Basic concepts: what `with` does, and how to write your own context managers.

After this chapter you can say which line runs when a block ends well and when it does not,
write a manager as a class and as a generator, and see at a glance which ones leak.

    python 01_basic_concepts.py          play all ten demos
    python 01_basic_concepts.py 4 5      play demos 4 and 5 alone

Read the managers first: they are production code, and they print nothing. The demos below
them tell the story. Look at the brackets: each opens after a manager's set-up and closes after
its cleanup, however the block in between was left.

Left out: `async with` (chapter 03), several managers at once (chapters 05 and 07).
"""

from __future__ import annotations

import argparse
import contextlib
import gettext
import inspect
import json
import logging
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import wraps
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Literal, NoReturn, ParamSpec, Self, TypeVar

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

P = ParamSpec("P")
T = TypeVar("T")
Clock = Callable[[], float]  # tells the seconds since some moment in the past
logger = logging.getLogger("workshop.basics")


class Timer:
    """Measure how many seconds a block takes.

        with Timer() as loading:
            load()
        print(loading.elapsed)

    The same Timer can measure one block after another; each starts from zero.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._stopped: float | None = None

    def start(self) -> None:
        if self._started is not None and self._stopped is None:
            raise RuntimeError("Timer is running already: give the inner block a Timer of its own")
        self._started, self._stopped = self._clock(), None

    def stop(self) -> None:
        self._stopped = self._clock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def elapsed(self) -> float:
        """Seconds: so far while the block runs, in all once it was left. RuntimeError before it."""
        if self._started is None:
            raise RuntimeError("Timer was never started: enter it with `with` first")
        until = self._clock() if self._stopped is None else self._stopped
        return until - self._started


@contextmanager
def timer(name: str, clock: Clock = time.perf_counter) -> Iterator[Timer]:
    """Measure a block, log its seconds under `name`: Timer's generator twin."""
    measured = Timer(clock)
    measured.start()
    try:
        yield measured
    finally:
        measured.stop()
        logger.info("%s took %.6f s", name, measured.elapsed)


@contextmanager
def temporary_config(
    config: MutableMapping[str, T], /, **changes: T
) -> Iterator[MutableMapping[str, T]]:
    """Change some keys of any mapping for a block, `os.environ` too.

    Afterwards each key is as it was before: it has its old value again, or is absent again.
    What the mapping refuses (`os.environ` takes only str) is raised, and nothing is changed.
    """
    before = {key: config[key] for key in changes if key in config}
    try:
        config.update(changes)
        yield config
    finally:
        for key in changes:
            if key in before:
                config[key] = before[key]
            else:
                config.pop(key, None)


@contextmanager
def atomic_write(
    path: str | Path, mode: Literal["w", "wb"] = "w", encoding: str = "utf-8"
) -> Iterator[IO[Any]]:
    """Write a file all or nothing: a reader sees the old file or the new one, never a half.

    Yields a draft in the same folder, which replaces `path` when the block ends well. When it
    does not, the old file stands, the draft is removed, and the error goes on.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode is {mode!r}, it must be 'w' or 'wb'")
    target = Path(path).resolve()  # where path is a symbolic link, replace what it points to
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.draft")
    file = open(draft, mode.replace("w", "x"), encoding=encoding if mode == "w" else None)
    try:
        with file:
            if target.exists():
                shutil.copymode(target, draft)  # first, lest others can read a secret's draft
            yield file
            file.flush()
            os.fsync(file.fileno())  # subtle: a rename can reach the disk before the bytes do
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)  # already gone when the draft became the target


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block did to the database, or roll all of it back when the block raises.

    Raises RuntimeError when a transaction is open already, and sqlite3.OperationalError when
    another connection holds the write lock for longer than this connection's timeout.
    """
    if connection.in_transaction:
        raise RuntimeError("the connection is in a transaction: commit it or roll it back first")
    connection.execute("BEGIN IMMEDIATE")  # the write lock now, not half-way through the block
    try:
        yield connection
        connection.execute("COMMIT")  # inside the try: a commit that fails must roll back too
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class GeneratorManager(Generic[T]):
    """What `contextmanager_from_scratch` makes of a generator: run it to its `yield`, and on."""

    def __init__(self, function: Callable[..., Iterator[T]], args: Any, kwargs: Any) -> None:
        self.gen: Any = function(*args, **kwargs)  # nothing of its body has run yet
        self._recipe = (function, args, kwargs)
        self.__doc__ = function.__doc__

    def __enter__(self) -> T:
        del self._recipe  # arguments may be large: let go of them
        try:
            value: T = next(self.gen)  # run the set-up, up to `yield`
        except StopIteration:
            raise RuntimeError("generator didn't yield") from None
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if kind is not None and error is None:
            error = kind()  # an old-style caller passed the class alone
        try:
            if error is None:
                next(self.gen)  # run the cleanup
            else:
                self.gen.throw(error)  # raise the block's error at the `yield`
        except StopIteration as end:
            # It returned. After an error this means that it caught it.
            return error is not None and end is not error
        except BaseException as raised:
            # subtle: PEP 479 wraps a StopIteration in a RuntimeError.
            cause = raised.__cause__ if isinstance(raised, RuntimeError) else None
            wrapped = isinstance(error, StopIteration) and cause is error
            if error is None or not (raised is error or wrapped):
                raise
            error.__traceback__ = traceback  # without the frames of this file
            return False  # so that the `with` statement raises it again
        try:
            raise RuntimeError("generator didn't stop: it has a second yield")
        finally:
            self.gen.close()

    def __call__(self, function: Callable[P, Any]) -> Callable[P, Any]:
        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> Any:
            with type(self)(*self._recipe):  # a fresh generator for each call
                return function(*args, **kwargs)

        return inside


def contextmanager_from_scratch(
    function: Callable[P, Iterator[T]],
) -> Callable[P, GeneratorManager[T]]:
    """Make a generator function with one `yield` a context manager, as contextlib's own does."""

    @wraps(function)
    def manager(*args: P.args, **kwargs: P.kwargs) -> GeneratorManager[T]:
        return GeneratorManager(function, args, kwargs)

    return manager


# --- Demos: from here on the file tells the story. Copy what is above into production. ---

console = Console(highlight=False)
_ = gettext.translation("workshop", Path(__file__).parent / "locale", fallback=True).gettext
open_brackets: list[str] = []


def say(text: str) -> None:
    """Print a paragraph inside the open brackets, each of its lines behind their bars."""
    bars = "│ " * len(open_brackets)
    for line in Text.from_markup(text).wrap(console, console.width - len(bars)):
        line.rstrip()
        console.print(Text.assemble((bars, "dim"), line))


@contextmanager
def shown(label: str, manager: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a manager and draw its scope: a bracket with the times of set-up, use and cleanup."""
    say(f"┌ [bold]{escape(label)}[/]")
    open_brackets.append(label)
    how = ""
    marks = [time.perf_counter()]
    try:
        with manager as value:
            marks.append(time.perf_counter())
            try:
                yield value
            except BaseException as error:
                how = _("left by {error}").format(error=type(error).__name__)
                raise
            finally:
                marks.append(time.perf_counter())
    except BaseException as error:
        failed = _("setup raised {error}") if len(marks) == 1 else _("cleanup raised {error}")
        how = how or failed.format(error=type(error).__name__)
        raise
    finally:
        marks.append(time.perf_counter())
        open_brackets.pop()
        spans = zip((_("setup"), _("use"), _("cleanup")), pairwise(marks), strict=False)
        times = " · ".join(f"{name} {1000 * (end - start):.2f}" for name, (start, end) in spans)
        say(f"└ {how or _('left at its end')}  [dim]{times} ms[/]")


def show_code(*pieces: Callable[..., Any] | str) -> None:
    """Print code side by side: text, or functions as they stand in this file."""
    table = Table.grid(padding=(0, 2))
    texts = (piece if isinstance(piece, str) else inspect.getsource(piece) for piece in pieces)
    table.add_row(*(code(textwrap.dedent(text).rstrip()) for text in texts))
    console.print(table, "")


def code(text: str) -> Syntax:
    return Syntax(text, "python", theme="ansi_dark", word_wrap=True, background_color="default")


class Recorder:
    """A manager that notes each call, so that the order can be shown."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> list[str]:
        self.calls.append("__enter__")
        return self.calls

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.calls.append(f"__exit__({kind.__name__ if kind else None})")


def with_statement(manager: Any, body: Any) -> None:
    with manager as value:
        body(value)


def expansion(manager: Any, body: Any) -> None:
    value = manager.__enter__()
    failed = False
    try:
        body(value)
    except BaseException:
        failed = True
        if not manager.__exit__(*sys.exc_info()):
            raise
    finally:
        if not failed:
            manager.__exit__(None, None, None)


def calls_of(run: Callable[[Any, Any], None], error: Exception | None) -> str:
    """Run a block that ends well, or raises `error`, and tell which calls were made."""

    def body(calls: list[str]) -> None:
        calls.append("body")
        if error:
            raise error

    recorder = Recorder()
    with suppress(ValueError):
        run(recorder, body)
    return " → ".join(recorder.calls)


def demo_with() -> None:
    """What with does

    A context manager has two methods. `with` calls `__enter__`, runs the body, and then
    **always** calls `__exit__`, however the body ends. These two functions do the same: the
    left one is what you write, the right one is what Python runs. The table shows the calls
    that were really made.
    """
    show_code(*(inspect.getsource(run).split("\n", 1)[1] for run in (with_statement, expansion)))
    table = Table(_("the body"), _("run by"), _("calls, in their order"))
    for title, error in ((_("ends well"), None), (_("raises"), ValueError())):
        for run in (with_statement, expansion):
            table.add_row(title, run.__name__, calls_of(run, error))
    console.print(table)


def demo_timer_class() -> None:
    """A timer, as a class

    `__enter__` reads the clock, `__exit__` reads it again. `elapsed` runs while the block does
    and stands still afterwards. It is right even when the block raises, because `__exit__` is
    called then, too.
    """
    loading = Timer()
    with shown("loading", loading):
        numbers = json.loads(json.dumps(list(range(50_000))))
        so_far = 1000 * loading.elapsed
        say(_("{n:,} numbers read, {ms:.2f} ms so far").format(n=len(numbers), ms=so_far))
    say(_("elapsed stands at {ms:.2f} ms").format(ms=1000 * loading.elapsed))
    with suppress(ZeroDivisionError), shown("loading", loading):
        sum(numbers) / 0
    say(_("used again, left by an error: {ms:.2f} ms").format(ms=1000 * loading.elapsed))


def demo_timer_generator() -> None:
    """The same timer, as a generator

    With `@contextmanager` a function is enough. What stands before `yield` is set-up, what
    stands in `finally` is cleanup, and the value that is yielded arrives behind `as`.
    """
    show_code(timer)
    with shown('timer("sorting")', timer("sorting")) as sorting:
        ordered = sorted(range(100_000), key=lambda number: -number)
        say(_("{n:,} numbers sorted").format(n=len(ordered)))
    say(_("elapsed stands at {ms:.2f} ms").format(ms=1000 * sorting.elapsed))


@contextmanager
def careless_lock(path: Path) -> Any:
    path.touch(exist_ok=False)
    yield
    path.unlink()


@contextmanager
def careful_lock(path: Path) -> Any:
    path.touch(exist_ok=False)
    try:
        yield
    finally:
        path.unlink()


def demo_missing_finally() -> None:
    """The bug: no try/finally around yield

    An error in the block comes out of `yield`, *inside* the generator. Without `finally`, the
    lines below `yield` are then never reached: here a lock file stays behind, and the next run
    is locked out. It works in every test in which nothing goes wrong.
    """
    show_code(careless_lock, careful_lock)
    with tempfile.TemporaryDirectory() as folder:
        for lock in (careless_lock, careful_lock):
            path = Path(folder, lock.__name__)
            with suppress(ValueError), shown(lock.__name__, lock(path)):
                int("not a number")
            with suppress(FileExistsError), shown(lock.__name__, lock(path)):
                say(_("[green]the second run has the lock[/]"))


@contextmanager
def careless_config(config: Any, key: str, value: str) -> Iterator[None]:
    before = config.get(key)
    config[key] = value
    try:
        yield
    finally:
        config[key] = before


def demo_temporary_config() -> None:
    """Temporary configuration

    Restoring values is the easy half. A key that **was not there** must be gone again; many a
    tutorial leaves it behind as `None`, and `os.environ` does not even take a `None`.
    """
    show_code(careless_config)
    settings: dict[str, Any] = {"model": "gpt-4o-mini"}
    with shown("careless_config(settings, ...)", careless_config(settings, "debug", "on")):
        say(f"settings = {settings}")
    say(f"[red]settings = {settings}[/]")
    try:
        with shown(
            "careless_config(os.environ, ...)", careless_config(os.environ, "WORKSHOP", "on")
        ):
            say(f"WORKSHOP={os.environ['WORKSHOP']}")
    except TypeError as error:
        say(f"[red]TypeError: {error}[/]")
        del os.environ["WORKSHOP"]

    settings = {"model": "gpt-4o-mini"}
    with shown("temporary_config(settings, debug=True)", temporary_config(settings, debug=True)):
        inner = temporary_config(settings, model="gpt-4o", debug=False)
        with shown("temporary_config(settings, model='gpt-4o', debug=False)", inner):
            say(f"settings = {settings}")
        say(f"settings = {settings}")
    say(f"[green]settings = {settings}[/]")
    with shown("temporary_config(os.environ, ...)", temporary_config(os.environ, WORKSHOP="on")):
        say(f"WORKSHOP={os.environ['WORKSHOP']}")
    say(f"[green]'WORKSHOP' in os.environ: {'WORKSHOP' in os.environ}[/]")


def passes_on() -> Iterator[str]:
    yield "value"


def catches() -> Iterator[str]:
    with suppress(ValueError):
        yield "value"


def yields_twice() -> Iterator[str]:
    with suppress(ValueError):
        yield "value"
    yield "another value"


def outcome(decorator: Any, generator: Callable[[], Iterator[str]]) -> str:
    """What comes out of a `with` block that raises ValueError."""
    try:
        with decorator(generator)():
            raise ValueError("from the block")
    except Exception as error:
        return repr(error)
    return _("suppressed")


def demo_from_scratch() -> None:
    """contextmanager, built from scratch

    `@contextmanager` is no magic: `next()` runs the generator to its `yield`, and `throw()`
    raises the block's error at that very place. This is our own; it passes every test that
    CPython has for the original. The table shows both at work on a block that raises.
    """
    show_code(GeneratorManager.__enter__)
    show_code(GeneratorManager.__exit__)
    table = Table(_("the generator"), "contextlib.contextmanager", "contextmanager_from_scratch")
    for generator in (passes_on, catches, yields_twice):
        outcomes = [outcome(d, generator) for d in (contextmanager, contextmanager_from_scratch)]
        table.add_row(generator.__name__, *outcomes)
    console.print(table)


class Batch(list[int]):
    """A list of rows, as a manager. Its `__exit__` is wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> Any:
        return len(self)


def demo_suppressing() -> None:
    """Suppressing, on purpose and by mistake

    When `__exit__` returns something true, the error is gone. `suppress` says so in its name.
    `Batch` returns its number of rows, and so hides any error that comes after the first row.
    """
    with shown("suppress(FileNotFoundError)", suppress(FileNotFoundError)):
        Path("no such file").unlink()
    say(_("[green]on purpose: the file need not be there[/]"))
    console.print()
    show_code(Batch.__exit__)
    with shown("Batch()", Batch()) as rows:
        rows.extend(int(word) for word in ("1", "2", "three", "4"))
    say(_("[red]by mistake: {n} of 4 rows, and no error to be seen[/]").format(n=len(rows)))


def write_half(file: IO[str]) -> None:
    file.write("new rep")
    raise OSError("disk full")


def transfer_half(accounts: sqlite3.Connection) -> None:
    accounts.execute("UPDATE account SET money = money - 50 WHERE name = 'Ada'")
    raise OSError("connection lost")


def demo_files_and_databases() -> None:
    """All or nothing: files and databases

    A block that fails half-way leaves half of its work behind, unless its manager can take it
    back. `atomic_write` writes a draft and renames it; `transaction` has SQLite roll back.
    Each block below fails half-way, first without such a manager, then with it.
    """
    manager: Any
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.txt")
        for manager, colour in ((open, "red"), (atomic_write, "green")):
            report.write_text("old report")
            with suppress(OSError), shown(manager.__name__, manager(report, "w")) as file:
                write_half(file)
            say(f"[{colour}]{report.read_text()!r} in {os.listdir(folder)}[/]")
        with closing(sqlite3.connect(Path(folder, "bank.db"), isolation_level=None)) as accounts:
            accounts.execute("CREATE TABLE account (name TEXT, money INTEGER)")
            for manager, colour in ((nullcontext, "red"), (transaction, "green")):
                accounts.execute("DELETE FROM account")
                accounts.execute("INSERT INTO account VALUES ('Ada', 100), ('Bob', 0)")
                with suppress(OSError), shown(manager.__name__, manager(accounts)):
                    transfer_half(accounts)
                money = accounts.execute("SELECT name, money FROM account").fetchall()
                say(f"[{colour}]{money}[/]")


TOOLBOX = {
    "closing": """\
with closing(sqlite3.connect('')) as db:
    row = db.execute('SELECT 6 * 7')
    result = row.fetchone()""",
    "suppress": """\
with suppress(FileNotFoundError):
    result = open('no such file').read()""",
    "redirect_stdout": """\
with redirect_stdout(StringIO()) as out:
    print('Hello')
result = out.getvalue()""",
    "chdir": """\
with chdir('/'):
    result = os.getcwd()""",
    "nullcontext": """\
with nullcontext(sys.stdout) as out:
    pass  # stdout is not ours to close
result = out.closed""",
    "ExitStack": """\
with ExitStack() as stack:
    for name in ('a', 'b'):
        stack.callback(result.append, name)""",
    "ContextDecorator": """\
@timer('doubling')
def double(x): return 2 * x
result = double(21)""",
}


def demo_toolbox() -> None:
    """The standard library's toolbox

    Look here before you write a manager. The code in the middle is what ran, with `result = []`
    before it; on the right is what `result` was in the end.
    """
    table = Table("contextlib", Column(_("one real use"), min_width=43), "result")
    for name, use in TOOLBOX.items():
        namespace = {**vars(contextlib), **globals(), "StringIO": StringIO, "result": []}
        exec(use, namespace)
        table.add_row(name, code(use), repr(namespace["result"]), end_section=True)
    console.print(table)


CHILD = """\
import contextlib, os, signal, sys

@contextlib.contextmanager
def draft(path):
    open(path, "w").close()
    try:
        yield
    finally:
        os.remove(path)

with draft("report.draft"):
    """


def demo_what_cleanup_cannot_survive() -> None:
    """What cleanup cannot survive

    `finally` is Python code: it runs only while the interpreter lives. An exception unwinds
    the block; a signal that kills, or `os._exit`, does not. So write what must survive in such
    a way that a half is harmless: a draft that is renamed, or the journal of chapter 02.
    """
    show_code(CHILD + "...")
    table = Table(_("a child with this in place of ..."), _("exit status"), _("left on disk"))
    for death in (
        "sys.exit(1)",
        "os.kill(os.getpid(), signal.SIGINT)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os._exit(1)",
        "os.kill(os.getpid(), 9)  # SIGKILL",
    ):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-I", "-c", CHILD + death]
            child = subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL, check=False)
            left = " ".join(os.listdir(folder))
        table.add_row(death, str(child.returncode), f"[red]{left}[/]")
    console.print(table)


DEMOS = [demo for name, demo in list(globals().items()) if name.startswith("demo_")]


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    demo = DEMOS[number - 1]
    title, lesson = _(inspect.getdoc(demo) or "").split("\n", 1)
    console.rule(f"[bold]{number} · {title}", align="left")
    console.print(Markdown(lesson), "")
    demo()
    console.print()


def show_key_points() -> None:
    points = _("""\
* Acquire **before** the `try`, release in `finally`.
* An error in the block comes out of `yield`. Let it pass, unless suppressing is your purpose.
* Restore what was there, and what was *not* there.
* Half done must be harmless: SIGKILL and a power cut run no `finally`.""")
    console.rule(_("[bold]Key points"), align="left")
    console.print(Markdown(points))


class CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage above it


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=__doc__, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help="play only these, by number")
    chosen = parser.parse_args().demo or range(1, len(DEMOS) + 1)
    for number in chosen:
        if not 1 <= number <= len(DEMOS):
            parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
    try:
        for number in chosen:
            play(number)
        show_key_points()
    except KeyboardInterrupt:
        console.print(_("Interrupted. Every bracket above was closed on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
