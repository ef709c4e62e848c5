# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=14.1,<16"]
# ///
"""Chapter 01 · Cleanup runs, however the block ends

After this chapter you can say which lines of a `with` block run when it returns, raises or is
interrupted, write a context manager as a class and as a generator, and spot one that leaks.

    python 01_basic_concepts.py          run all ten demos
    python 01_basic_concepts.py 3 5      run demos 3 and 5
    python 01_basic_concepts.py --step   wait for Enter at each question

Read the managers first: they are production code, and they print nothing. Then run the demos.
Each asks a question, runs a broken version and a right one, and shows the path that ran: the
code, and beside it the order in which its lines ran. A line without a number never ran.

Left out: `async with` (chapter 03), several managers at once (chapters 05 and 07).
"""

from __future__ import annotations

import argparse
import errno
import gettext
import inspect
import logging
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, ParamSpec, Self, TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

P = ParamSpec("P")
T = TypeVar("T")
Clock = Callable[[], float]  # returns seconds since some fixed moment
logger = logging.getLogger("workshop.basics")


class Timer:
    """A timer for a block of code.

        with Timer() as loading:
            load()
        print(loading.elapsed)

    It can time one block after another; each starts from zero.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._stopped: float | None = None

    def __enter__(self) -> Self:
        """Start from zero. Raises RuntimeError if the timer is already running."""
        if self._started is not None and self._stopped is None:
            raise RuntimeError("this Timer is already running: use another one for the inner block")
        self._started, self._stopped = self._clock(), None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds so far, or in total once the block has ended.

        Raises RuntimeError if the timer was never entered.
        """
        if self._started is None:
            raise RuntimeError("this Timer was never started: enter it in a `with` statement")
        end = self._clock() if self._stopped is None else self._stopped
        return end - self._started


@contextmanager
def timer(name: str, clock: Clock = time.perf_counter) -> Iterator[Timer]:
    """Time a block, and log its seconds under `name` even if it raises."""
    timed = Timer(clock)
    try:
        with timed:
            yield timed
    finally:
        logger.info("%s took %.6f s", name, timed.elapsed)


@contextmanager
def temporary_config(
    config: MutableMapping[str, T], /, **changes: T
) -> Iterator[MutableMapping[str, T]]:
    """Change some keys of a mapping for the duration of a block.

    Afterwards each key has its old value again, or is absent again. If the mapping rejects a
    value (`os.environ` takes only str), the error propagates and nothing stays changed. If one
    key cannot be restored, the others still are, and that error propagates.

    The mapping must store its values itself, as dict and os.environ do. For a ChainMap, pass the
    map to change: `chain.maps[0]`. A ConfigParser copies what it is given and is not restored.
    Threads or tasks whose blocks overlap restore each other's values: use a ContextVar there
    (chapter 04).
    """
    with ExitStack() as restore:  # runs every callback, even if one of them raises
        for key in changes:
            if key in config:
                restore.callback(config.__setitem__, key, config[key])
            else:
                restore.callback(config.pop, key, None)
        config.update(changes)
        yield config


@contextmanager
def atomic_write(
    path: str | Path, mode: Literal["w", "wb"] = "w", encoding: str = "utf-8"
) -> Iterator[IO[Any]]:
    """Write a file all or nothing: readers see the old file or the new one, never a part.

    Yield a draft in the same directory, and rename it to `path` when the block ends well.
    Otherwise the old file is untouched, the draft is deleted, and the error propagates.

    The new file gets the old one's owner, mode, and those extended attributes that the system
    lets you set. It is a new inode: hard links still lead to the old content.
    Raises ValueError for another mode. Raises OSError, before the block runs, if `path` cannot
    be replaced: a directory, device, FIFO or mount point, or a file whose owner you cannot set.
    """
    target = Path(path).resolve()  # replace what a symbolic link leads to, not the link
    check_replaceable(target)
    draft = target.with_name(f".{os.urandom(8).hex()}.draft")
    # subtle: open inside the `try`, or Ctrl-C between the two leaves the draft behind.
    try:
        with open_draft(draft, target, mode, encoding) as file:
            copy_attributes(target, draft)
            yield file
            file.flush()
            os.fsync(file.fileno())  # subtle: a rename can reach the disk before the bytes do
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def check_replaceable(target: Path) -> None:
    """Raise OSError unless `target` is free or a regular file that a rename can replace."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file: write to it with open()", str(target))
    if is_mount_point(target):
        raise OSError(errno.EBUSY, "a mount point: write to it with open()", str(target))


def is_mount_point(target: Path) -> bool:
    """Return whether a file is mounted at this path, as containers do (known on Linux only)."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(target).replace(b" ", rb"\040")
    return any(mount.split()[4] == escaped for mount in mounts)


def open_draft(draft: Path, target: Path, mode: str, encoding: str) -> IO[Any]:
    """Create the draft. If there is an old file, nobody else can read it yet."""
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}, but atomic_write needs 'w' or 'wb'")
    permissions = 0o600 if target.exists() else 0o666  # less the umask, as for any new file
    return open(
        draft,
        mode.replace("w", "x"),
        encoding=None if mode == "wb" else encoding,
        opener=lambda name, flags: os.open(name, flags, permissions),
    )


def copy_attributes(target: Path, draft: Path) -> None:
    """Give the draft the old file's owner, mode and extended attributes."""
    if not target.exists():
        return
    if sys.platform != "win32":
        old = target.stat()
        try:
            os.chown(draft, old.st_uid, old.st_gid)  # before the mode, which chown may reset
        except PermissionError:
            message = f"cannot keep its owner {old.st_uid}:{old.st_gid}: write to it with open()"
            raise PermissionError(errno.EPERM, message, str(target)) from None
    shutil.copystat(target, draft)
    os.utime(draft)  # but the content is new


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block did to the database, or roll all of it back if the block raises.

    Raises RuntimeError if a transaction is already open, or if the block ended this one itself:
    `commit()`, `executescript()` and `with connection:` all commit. Raises
    sqlite3.OperationalError if another connection keeps the write lock past the timeout.
    """
    if getattr(connection, "autocommit", None) is False:  # Python 3.12
        raise RuntimeError("with autocommit=False a transaction is always open: connect without it")
    if connection.in_transaction:
        raise RuntimeError("the connection is in a transaction: commit it or roll it back first")
    # subtle: begin inside the `try`. Ctrl-C may arrive when BEGIN has just got its lock.
    try:
        connection.execute("BEGIN IMMEDIATE")  # take the write lock now, not half-way through
        connection.execute("SAVEPOINT block")
        yield connection
        release(connection, "block")
        connection.execute("COMMIT")  # inside the `try`: a failed commit must roll back, too
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def release(connection: sqlite3.Connection, savepoint: str) -> None:
    """Release a savepoint. Raises RuntimeError if a commit or a rollback has removed it."""
    try:
        connection.execute(f"RELEASE {savepoint}")
    except sqlite3.OperationalError as error:
        if "no such savepoint" not in str(error):
            raise
        message = "the block ended its transaction itself: leave commit and rollback to the manager"
        raise RuntimeError(message) from None


class GeneratorManager(AbstractContextManager[T]):
    """What `contextmanager_from_scratch` makes of a generator."""

    def __init__(self, generator: Generator[T, None, None]) -> None:
        self.generator = generator  # its body has not started yet

    def __enter__(self) -> T:
        return next(self.generator)  # run the set-up, up to `yield`

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> bool:
        try:
            if exc is None:
                next(self.generator)  # run the cleanup, after `yield`
            else:
                self.generator.throw(exc)  # raise the block's exception at the `yield`
        except StopIteration:
            return exc is not None  # it ended: so it caught the exception, if there was one
        raise RuntimeError("generator didn't stop")


def contextmanager_from_scratch(
    function: Callable[P, Generator[T, None, None]],
) -> Callable[P, GeneratorManager[T]]:
    """Turn a generator function with one `yield` into a context manager. Only for reading.

    What `contextlib.contextmanager` has besides:
    - If the generator does not yield, the error says so. Here it is a bare StopIteration.
    - A StopIteration that the block raises stays one. Here it becomes a RuntimeError.
    - The traceback does not show the manager's own lines.
    - The manager can decorate a function.
    """

    def make_manager(*args: P.args, **kwargs: P.kwargs) -> GeneratorManager[T]:
        return GeneratorManager(function(*args, **kwargs))

    return make_manager


# --- Demos: each runs a broken version, then a right one. Copy what is above into production. ---


def both(function: Callable[[bool], object]) -> dict[str, list[int]]:
    """Call `function(fails)` twice: it ends well, then it raises. Return the paths that ran."""
    with trace() as ends_well:
        function(False)
    with suppress(Exception), trace() as raises:
        function(True)
    return {_("ends well"): ends_well, _("raises"): raises}


class Recorder:
    """A manager that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> None:
        self.calls.append("__enter__()")

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.calls.append(f"__exit__({exc_type.__name__ if exc_type else None})")


def by_hand(manager: Any, way: str) -> None:
    manager.__enter__()
    if way == "return":
        return
    if way == "raise":
        raise ValueError
    manager.__exit__(None, None, None)


def with_statement(manager: Any, way: str) -> None:
    with manager:
        if way == "return":
            return
        if way == "raise":
            raise ValueError


def demo_with() -> None:
    """What `with` does

    A context manager has two methods. `with` calls `__enter__`, runs the block, and then calls
    `__exit__`, however the block ends. If the block raises, `__exit__` receives the exception.
    In the path below, a `with` line has two numbers: it runs once to enter and once to exit.
    """
    show_code(by_hand, with_statement)
    question(_("One run ends well, one returns early, one raises. Which of them call `__exit__`?"))
    ways = {_("ends well"): "end", _("returns"): "return", _("raises"): "raise"}
    for function in (by_hand, with_statement):
        runs, exits = {}, 0
        for title, way in ways.items():
            recorder = Recorder()
            with suppress(ValueError), trace() as runs[title]:
                function(recorder, way)
            say(f"{title}: {' → '.join(recorder.calls)}")
            exits += len(recorder.calls) - 1
        show_code(function, runs=runs)
        result = _("`{function}` called `__exit__` in {exits} of 3 runs.")
        verdict(exits == 3, result.format(function=function.__name__, exits=exits))
    say(_("In `by_hand`, call `__exit__` in a `finally`, and run demo 1 again."), "→ ")


def work(fails: bool) -> None:
    sum(range(100_000))
    if fails:
        raise ValueError


def timed_by_hand(seconds: list[float], fails: bool) -> None:
    started = time.perf_counter()
    work(fails)
    seconds.append(time.perf_counter() - started)


def timed_block(manager: Any, timers: list[Timer], fails: bool) -> None:
    with manager() as timed:
        timers.append(timed)
        work(fails)


def demo_timer() -> None:
    """A timer, as a class and as a generator

    In a class, `__enter__` is the set-up and `__exit__` is the cleanup. With `@contextmanager`,
    one generator does both: the lines before `yield` are the set-up, `finally` is the cleanup,
    and the block runs while the generator waits at the `yield`.
    """
    show_code(timed_by_hand)
    question(_("`work` runs twice and raises the second time. How many runs are measured?"))
    seconds: list[float] = []
    show_code(timed_by_hand, runs=both(partial(timed_by_hand, seconds)))
    verdict(len(seconds) == 2, _("By hand, {n} of 2 runs are measured.").format(n=len(seconds)))
    timers: list[Timer] = []
    runs = both(partial(timed_block, Timer, timers))
    show_code(timed_block, Timer.__enter__, Timer.__exit__, runs=runs)
    runs = both(partial(timed_block, partial(timer, "work"), timers))
    show_code(timed_block, timer, runs=runs)
    measured = sum(timed.elapsed == timed.elapsed for timed in timers)  # or it still runs
    result = _("By class and by generator, {n} of 4 runs are measured.")
    verdict(measured == 4, result.format(n=measured))
    say(_("In `timed_by_hand`, add `try` and `finally`, and run demo 2 again."), "→ ")


@contextmanager
def careless_lock(path: Path) -> Iterator[None]:
    path.touch(exist_ok=False)
    yield
    path.unlink()


@contextmanager
def careful_lock(path: Path) -> Iterator[None]:
    path.touch(exist_ok=False)
    try:
        yield
    finally:
        path.unlink()


def outcome(make_manager: Callable[[], Any], fails: bool) -> str:
    """Return what comes out of a block that ends well, or fails."""
    try:
        with make_manager():
            work(fails)
    except Exception as error:
        return type(error).__name__
    return _("no error")


def demo_missing_finally() -> None:
    """The missing `finally`

    If the block raises, the exception comes out of `yield`, inside the generator. Without `try`
    and `finally`, the lines below `yield` do not run: the lock file stays and locks out the next
    run. A test in which nothing fails does not notice.
    """
    show_code(careless_lock, careful_lock)
    question(_("The block raises. Which line never runs, and what happens to the next run?"))
    for lock in (careless_lock, careful_lock):
        with tempfile.TemporaryDirectory() as folder:
            make_lock = partial(lock, Path(folder, "report.lock"))
            show_code(lock, runs=both(partial(outcome, make_lock)))
            left = os.listdir(folder)
            next_run = outcome(make_lock, fails=False)
        result = _("Left in the folder: {left}. The next run: {next_run}.")
        verdict(not left, result.format(left=left, next_run=next_run))
    say(_("In `careful_lock`, delete `try:` and `finally:`, and run demo 3 again."), "→ ")


@contextmanager
def careless_config(config: Any, **changes: Any) -> Iterator[None]:
    before = {key: config.get(key) for key in changes}
    config.update(changes)
    try:
        yield
    finally:
        config.update(before)


def demo_temporary_config() -> None:
    """A configuration, changed for one block

    To restore an old value is the easy half. A key that was absent must be absent again. Many
    versions leave it behind as None, and `os.environ` does not even accept None.
    """
    show_code(careless_config)
    question(_("`model` is set before the block, `debug` is not. What are both afterwards?"))
    manager: Any
    for manager in (careless_config, temporary_config):
        settings = {"model": "gpt-4o-mini"}
        with trace() as path, manager(settings, model="gpt-4o", debug="on"):
            say(_("In the block: {settings}").format(settings=settings))
        show_code(manager, runs={_("one run"): path})
        verdict("debug" not in settings, _("Afterwards: {settings}").format(settings=settings))
    say(_("In `temporary_config`, delete `else:` and the line below, and run demo 4 again."), "→ ")


class Batch(list[int]):
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> Any:
        return len(self)


def load(batch: Batch, words: str) -> None:
    with batch:
        for word in words.split():
            batch.append(int(word))
    say(_("{words}: loaded {batch}").format(words=words, batch=batch))


def demo_suppressing() -> None:
    """Suppressing an exception, by mistake and on purpose

    If `__exit__` returns a true value, the exception is gone. `Batch` returns its number of
    rows, and so hides every error after the first row. To suppress on purpose, use `suppress`:
    it names the exceptions that may be ignored.
    """
    show_code(Batch.__exit__, load)
    question(_("One run loads `1 3`, the other `1 two 3`. Does the second one raise?"))
    with trace() as good:
        load(Batch(), "1 3")
    with trace() as bad:
        load(Batch(), "1 two 3")
    show_code(load, Batch.__exit__, runs={"1 3": good, "1 two 3": bad})
    with bracket("with Batch()") as scope, Batch() as batch, scope:
        batch.extend(int(word) for word in ("1", "two", "3"))
    verdict(len(batch) == 3, _("{n} of 3 rows, and nobody sees an error.").format(n=len(batch)))
    console.print()
    with bracket("with suppress(FileNotFoundError)") as scope, suppress(FileNotFoundError), scope:
        os.remove("no such file")
    verdict(not os.path.exists("no such file"), _("The file is gone: that is all we wanted."))
    say(_("Let `Batch.__exit__` return None, and run demo 5 again."), "→ ")


def passes_on() -> Generator[None, None, None]:
    yield


def catches() -> Generator[None, None, None]:
    with suppress(ValueError):
        yield


def demo_from_scratch() -> None:
    """`@contextmanager`, built from scratch

    `next` runs the generator to its `yield`. If the block raises, `throw` raises the same
    exception at that `yield`. Then the generator decides: if it ends, the exception is
    suppressed; if it raises, the caller sees what it raises.
    """
    show_code(catches, passes_on)
    verdict(False, _("Without a decorator: {error}.").format(error=outcome(catches, fails=True)))
    question(_("The block raises. `catches` ends, `passes_on` does not. What comes out of each?"))
    runs, results = {}, []
    for function in (catches, passes_on):
        with trace() as runs[function.__name__]:
            results.append(outcome(contextmanager_from_scratch(function), fails=True))
    show_code(GeneratorManager.__enter__, GeneratorManager.__exit__, runs=runs)
    expected = [outcome(contextmanager(function), fails=True) for function in (catches, passes_on)]
    result = _("`catches`: {}; `passes_on`: {}. With `contextlib` it is the same.")
    verdict(results == expected, result.format(*results))
    say(_("In `__exit__`, return False after StopIteration, and run demo 6 again."), "→ ")


def save(opened: Any, path: Path, fails: bool) -> None:
    with opened(path, "w") as file:
        file.write("new ")
        work(fails)
        file.write("report")


def demo_file() -> None:
    """A file, all or nothing

    `open(path, "w")` empties the file first. If the block then fails, the old report is lost
    and half of the new one remains. `atomic_write` writes a draft, and renames it at the end.
    Deleting the draft is harmless even if there is none, so `open_draft` stands inside the
    `try`: Ctrl-C between the two would leave the draft behind.
    """
    show_code(save)
    question(_("The first run writes a report, the second run fails. What is in the file then?"))
    for opened, pieces in ((open, [save]), (atomic_write, [save, atomic_write])):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "report.txt")
            show_code(*pieces, runs=both(partial(save, opened, path)))
            text, names = path.read_text(), os.listdir(folder)
        result = _("`{opened}`: the file holds {text!r}, the folder {names}.")
        result = result.format(opened=opened.__name__, text=text, names=names)
        verdict((text, names) == ("new report", ["report.txt"]), result)
    say(_("In `atomic_write`, delete the line with `os.replace`, and run demo 7 again."), "→ ")


def transfer(block: Any, bank: sqlite3.Connection, fails: bool) -> None:
    with block(bank):
        bank.execute("UPDATE money SET ada = ada - 50")
        work(fails)
        bank.execute("UPDATE money SET bob = bob + 50")


def demo_database() -> None:
    """A database, all or nothing

    A transfer takes two statements. If the program fails between them, 50 dollars are gone,
    unless both belong to one transaction. The ROLLBACK runs only if a transaction is open, so
    BEGIN stands inside the `try`: Ctrl-C may arrive when BEGIN has just got its lock.
    """
    show_code(transfer)
    question(_("Ada has 100, Bob has 0. The second of two transfers fails. Who has what then?"))
    for block, pieces in ((nullcontext, [transfer]), (transaction, [transfer, transaction])):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as bank:
            bank.execute("CREATE TABLE money AS SELECT 100 AS ada, 0 AS bob")
            show_code(*pieces, runs=both(partial(transfer, block, bank)))
            ada, bob = bank.execute("SELECT ada, bob FROM money").fetchone()
        result = _("`{block}`: Ada has {ada}, Bob has {bob}; {total} of 100 are left.")
        result = result.format(block=block.__name__, ada=ada, bob=bob, total=ada + bob)
        verdict(ada + bob == 100, result)
    say(_("In `transaction`, delete the last three lines, and run demo 8 again."), "→ ")


@contextmanager
def draft(path: str) -> Iterator[None]:
    open(path, "w").close()
    try:
        yield
    finally:
        os.remove(path)


IMPORTS = """\
from __future__ import annotations
import os, signal, sys
from contextlib import contextmanager
"""
ENDINGS = (
    "sys.exit(1)",
    "os.kill(os.getpid(), signal.SIGINT)",
    "os.kill(os.getpid(), signal.SIGTERM)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os._exit(1)",
)


def demo_kill() -> None:
    """What no cleanup survives

    A `finally` is Python code: it runs only while the interpreter lives. An exception unwinds
    the block, and so does Ctrl-C. A signal that kills the process does not, and neither does
    `os._exit`. What they leave half done must be harmless, as the draft of demo 7 is.
    """
    show_code(draft)
    question(
        _("A child process ends inside a `draft` block, in five ways. Which of them clean up?")
    )
    table = Table(_("the block runs"), _("exit status"), _("left in the folder"))
    cleaned_up = 0
    for ending in ENDINGS:
        program = IMPORTS + inspect.getsource(draft) + f"with draft('report.draft'): {ending}"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-ISc", program]
            child = subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL, check=False)
            left = os.listdir(folder)
        cleaned_up += not left
        table.add_row(ending, str(child.returncode), ", ".join(left))
    console.print(table)
    verdict(cleaned_up == 5, _("{n} of 5 ways clean up.").format(n=cleaned_up))
    say(_("Add an exception such as `1 / 0` to `ENDINGS`, and run demo 9 again."), "→ ")


def demo_toolbox() -> None:
    """The toolbox of the standard library

    Look here before you write a manager of your own: `contextlib` has one for each of these.
    """
    table = Table("contextlib", _("use it if"))
    for code, when in (
        ("with closing(connection):", _("an object has `close()` but no `__exit__`")),
        ("with suppress(FileNotFoundError):", _("an error means that there is nothing to do")),
        ("with redirect_stdout(file):", _("code prints what you want to keep")),
        ("with chdir(folder):", _("code works in the current directory")),
        ("with nullcontext(sys.stdout):", _("sometimes there is nothing to clean up")),
        ("with ExitStack() as stack:", _("the number of managers is known only at run time")),
        ("class Traced(ContextDecorator):", _("your class should decorate functions, too")),
    ):
        table.add_row(code, when)
    console.print(table)


DEMOS = (
    demo_with,
    demo_timer,
    demo_missing_finally,
    demo_temporary_config,
    demo_suppressing,
    demo_from_scratch,
    demo_file,
    demo_database,
    demo_kill,
    demo_toolbox,
)
KEY_POINTS = """\
* Put cleanup into `finally` or `__exit__`. An exception in the block comes out of `yield`.
* Acquire before the `try`. If releasing twice does no harm, acquire inside it.
* Restore what was there, and remove what was not there before.
* Return a true value from `__exit__` only if you mean to suppress the exception.
* No `finally` runs after SIGKILL or a power cut, so a half must be harmless."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. This chapter has no options of its own."""
    yield parser.parse_args()


# --- The stage: it shows what stands above. The same in every script, and no part of a lesson. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[bracket] = []
stepping = False  # --step
WIDE = r"\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffe6"
OPENING, CLOSING = re.escape("\"'([{（「《“‘"), re.escape("\"')]},.;:!?%，。、；：！？）」》”’…—")
# A line may break after a space, and beside a wide character that no punctuation clings to.
BREAK = rf"(?<= )(?=[^ ])|(?<![ {OPENING}])(?![ {CLOSING}])(?:(?<=[{WIDE}])|(?=[{WIDE}]))"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        line = ""
        for piece in re.split(BREAK, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(line + part.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines += [line.rstrip(), ""]
    return lines[:-1]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Say what the runs have shown: ✓ if it is what we want, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter. At the end of the input, stop waiting."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except EOFError:
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


class bracket:
    """Draw where a block begins and how it ends: `with bracket("timer"), timer("sort"): ...`.

    Enter it again, as the innermost manager, and it also sees an error that is suppressed:
    `with bracket("quiet") as scope, suppress(OSError), scope: ...`.
    """

    def __init__(self, label: str) -> None:
        self.label, self.depth, self.suppressed = label, 0, ""

    def __enter__(self) -> Self:
        if self.depth == 0:
            say(self.label, "┌ ")
            open_brackets.append(self)
        self.depth += 1
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.depth -= 1
        error = exc_type.__name__ if exc_type else ""
        if self.depth > 0:
            self.suppressed = error  # unless the outer exit sees it, too
            return
        ending = _("left by {error}") if error else _("ended")
        if self.suppressed and not error:
            ending = _("left by {error}, suppressed")
        open_brackets.remove(self)
        say(ending.format(error=error or self.suppressed), "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record which lines of this file run in the block, in their order."""
    lines: list[int] = []
    last: dict[int, int] = {}  # the line that each frame has reached

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line" and frame.f_lineno != last.get(id(frame)):
            lines.append(frame.f_lineno)
        last[id(frame)] = frame.f_lineno  # subtle: 3.13 reports a resumed `await` twice
        return on_event

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(on_event)
    try:
        yield lines
    finally:
        sys.settrace(before)


def source(piece: Any) -> list[tuple[int, str]]:
    """Return the numbered lines of a function or class, without docstring and comments."""
    lines, first = inspect.getsourcelines(piece)
    code = re.sub(r" *#.*", "", textwrap.dedent("".join(lines))).splitlines()
    numbered = list(enumerate(code, first))
    if piece.__doc__:
        start = next(i for i, line in enumerate(code) if '"""' in line)
        del numbered[start : start + piece.__doc__.count("\n") + 1]
    return [(number, line) for number, line in numbered if line]


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    columns = [Column(title, justify="center") for title in runs]
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *columns, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    sources = [source(piece) for piece in pieces]
    shown = {number for lines in sources for number, _text in lines}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for lines in sources:
        for number, text in lines:
            code = Syntax("", "python", theme="ansi_dark").highlight(text)
            code.rstrip()
            code.no_wrap = False
            orders = ([str(n) for n, ran in enumerate(path, 1) if ran == number] for path in paths)
            table.add_row(code, *(" ".join(order) for order in orders))
        if lines is not sources[-1]:
            table.add_row()
    console.print(table, "")


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        import asyncio  # here, so that a chapter without tasks starts sooner

        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    description = "\n".join(wrap(_(__doc__ or ""), console.width))
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    numbers = range(1, len(DEMOS) + 1)
    try:
        with command_line(parser) as options:
            for number in options.demo:
                if number not in numbers:
                    parser.error(f"there is no demo {number}: choose from 1 to {len(DEMOS)}")
            stepping = options.step
            for position, number in enumerate(options.demo or numbers):
                if position > 0:
                    pause()
                play(number)
            if not options.demo:
                console.rule(_("[bold]Key points"), align="left")
                for point in _(KEY_POINTS).splitlines():
                    say(point.removeprefix("* "), "• ")
    except KeyboardInterrupt:
        open_brackets.clear()
        say(_("Interrupted. The cleanup ran on the way out."))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
