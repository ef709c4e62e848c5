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
Most ask a question, then run a broken version and a right one, and show the path that ran: the
code, with the order of execution beside each line. A line without a number never ran.

Left out: `async with` (chapter 03), several managers at once (chapters 05 and 07).
"""

from __future__ import annotations

import argparse
import asyncio
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
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, ParamSpec, Self, TypeVar

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

    It can time one block after another, each from zero. Raises RuntimeError if it is running.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._stopped: float | None = None

    def __enter__(self) -> Self:
        if self._started is not None and self._stopped is None:
            raise RuntimeError("this Timer is already running: use another one for the inner block")
        self._started, self._stopped = self._clock(), None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds so far, or in total after the block. Raises RuntimeError if never entered."""
        if self._started is None:
            raise RuntimeError("this Timer was never started: enter it in a `with` statement")
        end = self._clock() if self._stopped is None else self._stopped
        return end - self._started


@contextmanager
def timer(name: str, clock: Clock = time.perf_counter) -> Iterator[Timer]:
    """Time a block, and log its seconds under `name` even if it raises."""
    with Timer(clock) as timed:
        try:
            yield timed
        finally:
            logger.info("%s took %.6f s", name, timed.elapsed)


@contextmanager
def temporary_config(
    config: MutableMapping[str, T], /, **changes: T
) -> Iterator[MutableMapping[str, T]]:
    """Change some keys of a mapping for the duration of a block.

    When the block ends, each key gets its old value back or is removed. If the mapping rejects a
    value (`os.environ` takes only str), the error propagates and nothing stays changed. If one
    key cannot be restored, the others still are, and that error propagates.

    The mapping must store its values itself, as dict and os.environ do. In a ChainMap, change one
    map: `chain.maps[0]`. A ConfigParser copies what it is given and is not restored. Blocks that
    overlap in threads or tasks restore each other's values: use a ContextVar there (chapter 04).
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
def atomic_write(path: str | Path, mode: str = "w", encoding: str = "utf-8") -> Iterator[IO[Any]]:
    """Write a file all or nothing: readers see the old file or the new one, never a part.

    Yield a draft in the same directory, and rename it to `path` when the block ends well.
    Otherwise the old file is untouched, the draft is deleted, and the error propagates.

    The new file keeps the old one's owner, mode and extended attributes, except what writing
    clears (set-user-ID, capabilities). Hard links keep the old content.
    Raises ValueError if `mode` is not "w" or "wb". Raises OSError before the block runs if `path`
    is a directory, device, FIFO or mount point, or if you may not set the owner, and after the
    block if the rename fails (an immutable file, or one mounted from the same file system).
    """
    target = Path(path).resolve()  # replace the target of a symbolic link, not the link
    check_replaceable(target)
    draft = target.with_name(f".{os.urandom(8).hex()}.draft")
    # subtle: open inside the `try`. Ctrl-C between the two would leave the draft behind.
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
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(target.stat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file: write to it with open()", str(target))
        if os.path.ismount(target):
            raise OSError(errno.EBUSY, "a mount point: write to it with open()", str(target))


def open_draft(draft: Path, target: Path, mode: str, encoding: str) -> IO[Any]:
    """Create the draft. If there is an old file, nobody else can read it yet."""
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}, but atomic_write needs 'w' or 'wb'")
    permissions = 0o600 if target.exists() else 0o666  # less the umask, as for any new file
    opener = partial(os.open, mode=permissions)
    return open(draft, mode, encoding=encoding if mode == "w" else None, opener=opener)


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
    if sys.platform == "linux":
        with suppress(OSError):  # subtle: the directory's default ACL may let others read it
            os.removexattr(draft, "system.posix_acl_access")
    shutil.copystat(target, draft)
    os.utime(draft)  # but the content is new


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block did to the database, or roll all of it back if the block raises.

    Leave commit and rollback to the manager. `commit()`, `executescript()` and `with connection:`
    inside the block commit what came before them, and the manager then raises
    sqlite3.OperationalError, as it does if another connection keeps a lock past the timeout.
    Raises RuntimeError if a transaction is already open.
    """
    if connection.in_transaction:  # always, with autocommit=False of Python 3.12
        raise RuntimeError("a transaction is open: end it, or connect without autocommit=False")
    # subtle: begin inside the `try`. Ctrl-C right after BEGIN would leave the transaction open.
    try:
        connection.execute("BEGIN IMMEDIATE")  # take the write lock now, not half-way through
        connection.execute("SAVEPOINT do_not_commit")
        yield connection
        # If the block committed or rolled back, this fails: "no such savepoint: do_not_commit"
        connection.execute("RELEASE do_not_commit")
        connection.execute("COMMIT")  # inside the `try`: a failed commit must roll back, too
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


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
            return exc is not None  # it ended, so it caught the exception (if any)
        raise RuntimeError("the generator has a second `yield`")


def contextmanager_from_scratch(
    function: Callable[P, Generator[T, None, None]],
) -> Callable[P, GeneratorManager[T]]:
    """Turn a generator function with one `yield` into a context manager. For study only.

    What `contextlib.contextmanager` does better:
    - If the generator does not yield, the error says so. Here it is a bare StopIteration.
    - A StopIteration from the block propagates. Here it becomes a RuntimeError.
    - The traceback does not show the manager's own lines.
    - The function keeps its name and docstring, and its managers can decorate functions.
    """
    return lambda *args, **kwargs: GeneratorManager(function(*args, **kwargs))


# --- Demos: a broken version, then a right one. For production, copy what stands above. ---


def work(fails: bool) -> None:
    if fails:
        raise ValueError


def both(function: Callable[..., object], *arguments: Any) -> dict[str, list[int]]:
    """Call `function(fails, ...)` twice: it ends well, then it raises. Return both paths."""
    with trace() as ends_well:
        function(False, *arguments)
    with suppress(ValueError), trace() as raises:
        function(True, *arguments)
    return {_("ends well"): ends_well, _("raises"): raises}


def outcome(function: Callable[..., object], *arguments: Any) -> str:
    """Call a function; return the name of the exception that it raises, if any."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__
    return _("no error")


class Recorder(list[str]):
    def __enter__(self) -> None:
        self.append("__enter__()")

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self.append(f"__exit__({exc_type.__name__ if exc_type else None})")


def by_hand(manager: Recorder, way: str) -> None:
    manager.__enter__()
    if way == "return":
        return
    if way == "raise":
        raise ValueError
    manager.__exit__(None, None, None)


def with_statement(manager: Recorder, way: str) -> None:
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
    show_code(by_hand)
    question(_("One run ends well, one returns early, one raises. Which of them call `__exit__`?"))
    ways = {_("ends well"): "end", _("returns"): "return", _("raises"): "raise"}
    for function in (by_hand, with_statement):
        recorder, runs = Recorder(), {}
        for title, way in ways.items():
            with suppress(ValueError), trace() as runs[title]:
                function(recorder, way)
        show_code(function, runs=runs)
        verdict(len(recorder) == 6, f"`{function.__name__}`: {', '.join(recorder)}")
    say(_("In `by_hand`, call `__exit__` in a `finally`, and run demo 1 again."), "→ ")


def timed_by_hand(fails: bool, seconds: list[float]) -> None:
    started = time.perf_counter()
    work(fails)
    seconds.append(time.perf_counter() - started)


def timed_block(fails: bool, timers: list[Timer]) -> None:
    with timer("work") as timed:
        timers.append(timed)
        work(fails)


def demo_timer() -> None:
    """A timer, as a class and as a generator

    In a class, `__enter__` is the set-up and `__exit__` is the cleanup. With `@contextmanager`,
    a generator is enough: the lines before `yield` are the set-up, those in `finally` are the
    cleanup, and the block runs at the `yield`. Here the generator uses the class, and logs.
    """
    show_code(timed_by_hand)
    question(_("`work` runs twice and raises the second time. How many runs are measured?"))
    seconds: list[float] = []
    show_code(timed_by_hand, runs=both(timed_by_hand, seconds))
    verdict(len(seconds) == 2, _("Measured by hand: {n} of 2 runs.").format(n=len(seconds)))
    timers: list[Timer] = []
    show_code(timed_block, timer, Timer.__enter__, Timer.__exit__, runs=both(timed_block, timers))
    stopped = [timed for timed in timers if timed._stopped is not None]
    verdict(len(stopped) == 2, _("Measured by the timer: {n} of 2 runs.").format(n=len(stopped)))
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


def use(fails: bool, lock: Any, path: Path) -> None:
    with lock(path):
        work(fails)


def demo_missing_finally() -> None:
    """The missing `finally`

    If the block raises, the exception comes out of `yield`, inside the generator. Without `try`
    and `finally`, the lines below `yield` do not run: the lock file stays and blocks the next
    run. A test in which nothing fails still passes.
    """
    show_code(careless_lock)
    question(_("The block raises. Which line never runs, and what happens to the next run?"))
    for lock in (careless_lock, careful_lock):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "report.lock")
            show_code(lock, runs=both(use, lock, path))
            left = os.listdir(folder)
            next_run = outcome(use, False, lock, path)
        result = _("Left in the folder: {left}. The next run: {next_run}.")
        verdict(not left, result.format(left=left, next_run=next_run))
    say(_("In `careless_lock`, add `try` and `finally`, and run demo 3 again."), "→ ")


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

    Restoring an old value is the easy half. A key that was absent must be absent again; a
    common mistake leaves it behind as None. `temporary_config` puts one callback for each key
    on an `ExitStack`, which calls them all when its block ends, the last one first.
    """
    show_code(careless_config)
    question(_("`model` is set before the block, `debug` is not. What are both afterwards?"))
    manager: Any
    for manager in (careless_config, temporary_config):
        settings = {"model": "gpt-4o-mini"}
        with trace() as path, manager(settings, model="gpt-4o", debug="on"):
            say(_("In the block: {settings}").format(settings=settings))
        show_code(manager, runs={_("ends well"): path})
        verdict("debug" not in settings, _("Afterwards: {settings}").format(settings=settings))
    say(_("In `temporary_config`, delete `else:` and the line below, and run demo 4 again."), "→ ")


class Batch(list[int]):
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> Any:
        return len(self)


def load(batch: Batch, words: str) -> None:
    with batch:
        for word in words.split():
            batch.append(int(word))


def discard(path: str) -> None:
    with bracket(path), suppress(FileNotFoundError), bracket("os.remove"):
        os.remove(path)


def demo_suppressing() -> None:
    """Suppressing an exception, by mistake and on purpose

    If `__exit__` returns a true value, the exception is gone. `Batch.__exit__` returns the
    number of rows, so it hides every error after the first row. To suppress on purpose, use
    `suppress`, and name the exceptions to ignore.
    """
    show_code(load, Batch.__exit__)
    question(_("One run loads `1 3`, the other `1 two 3`. Does the second one raise?"))
    runs = {}
    for words in ("1 3", "1 two 3"):
        batch = Batch()
        with trace() as runs[words]:
            error = outcome(load, batch, words)
    show_code(load, Batch.__exit__, runs=runs)
    result = _("`1 two 3`: {error}, and the batch is {batch}.")
    verdict(error == "ValueError", result.format(error=error, batch=batch))
    show_code(discard)
    missing, directory = outcome(discard, "no such file"), outcome(discard, ".")
    result = _("A missing file: {missing}; a directory: {directory}.")
    verdict(directory != missing, result.format(missing=missing, directory=directory))
    say(_("Let `Batch.__exit__` return None, and run demo 5 again."), "→ ")


class CarelessManager(GeneratorManager[T]):
    def __exit__(self, *exc_info: object) -> Any:
        next(self.generator, None)


def catches() -> Generator[None, None, None]:
    try:
        yield
    except ValueError:
        pass


def managed(fails: bool, manager: Any) -> None:
    with manager(catches()):
        work(fails)


def demo_from_scratch() -> None:
    """`@contextmanager`, built from scratch

    `next` runs the generator to its `yield`. If the block raises, `throw` raises the same
    exception at that `yield`. Then the generator decides: if it ends, the exception is
    suppressed; if it raises, the caller sees what it raises.
    """
    show_code(CarelessManager.__exit__, catches)
    question(_("The block raises ValueError. Does `catches` ever see it?"))
    for manager in (CarelessManager, GeneratorManager):
        show_code(managed, manager.__exit__, catches, runs=both(managed, manager))
        error = outcome(managed, True, manager)
        result = _("If the block raises, the caller sees: {error}.").format(error=error)
        verdict(error != "ValueError", result)
    say(_("In `GeneratorManager`, let `__exit__` return False, and run demo 6 again."), "→ ")


def save(fails: bool, opened: Any, path: Path) -> None:
    with opened(path, "w") as file:
        file.write("second " if fails else "first ")
        work(fails)
        file.write("report")


def demo_file() -> None:
    """A file, all or nothing

    `open(path, "w")` empties the file first. If the block then fails, the old report is lost
    and half of the new one remains. `atomic_write` writes a draft, and renames it at the end.
    """
    show_code(save)
    question(_("The first run writes a report, the second run fails. What is in the file then?"))
    for opened, pieces in ((open, [save]), (atomic_write, [save, atomic_write])):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "report.txt")
            show_code(*pieces, runs=both(save, opened, path))
            files = {file.name: file.read_text() for file in Path(folder).iterdir()}
        verdict(files == {"report.txt": "first report"}, f"`{opened.__name__}`: {files}")
    say(_("In `atomic_write`, delete the line with `os.replace`, and run demo 7 again."), "→ ")


@contextmanager
def careless_transaction(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    finally:
        connection.commit()


def transfer(fails: bool, block: Any, bank: sqlite3.Connection) -> None:
    with block(bank):
        bank.execute("UPDATE money SET ada = ada - 50")
        work(fails)
        bank.execute("UPDATE money SET bob = bob + 50")


def demo_database() -> None:
    """A database, all or nothing

    A transfer takes two statements. Both must count, or neither. `careless_transaction` commits
    in a `finally`, so it also commits half a transfer. `transaction` commits only if the block
    ends well; otherwise it rolls back.
    """
    show_code(transfer, careless_transaction)
    question(_("Ada has 100, Bob has 0. The second of two transfers fails. Who has what then?"))
    for block in (careless_transaction, transaction):
        with closing(sqlite3.connect(":memory:")) as bank:
            bank.execute("CREATE TABLE money AS SELECT 100 AS ada, 0 AS bob")
            show_code(transfer, block, runs=both(transfer, block, bank))
            ada, bob = bank.execute("SELECT ada, bob FROM money").fetchone()
        verdict(ada + bob == 100, f"`{block.__name__}`: Ada {ada} + Bob {bob} = {ada + bob}")
    say(_("In `transaction`, replace `ROLLBACK` with `COMMIT`, and run demo 8 again."), "→ ")


CHILD = """\
from __future__ import annotations
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
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
    the block, and so does Ctrl-C (SIGINT). A signal that kills the process does not, and neither
    does `os._exit`. This lock then blocks the next run; a draft of `atomic_write` does no harm.
    (A negative exit status is minus the number of the signal that killed the process.)
    """
    if sys.platform == "win32":
        say(_("Windows has no such signals: run this demo on Linux or macOS."))
        return
    show_code(careful_lock)
    question(_("A child process ends inside this lock, in five ways. Which of them clean up?"))
    table = Table(_("the block runs"), _("exit status"), _("left in the folder"))
    leftovers = []
    for ending in ENDINGS:
        block = f"with careful_lock(Path('report.lock')): {ending}"
        command = [sys.executable, "-ISc", CHILD + inspect.getsource(careful_lock) + block]
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL, check=False)
            left = os.listdir(folder)
        table.add_row(ending, str(child.returncode), ", ".join(left))
        leftovers += left
    console.print(table)
    verdict(not leftovers, _("{n} of 5 ways leave the lock behind.").format(n=len(leftovers)))
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))"
    say(_("Add `{handler}` to `CHILD`, and run demo 9 again.").format(handler=handler), "→ ")


def demo_toolbox() -> None:
    """The toolbox of the standard library

    Look into `contextlib` before you write a manager of your own.
    """
    table = Table("contextlib", _("use it if"))
    table.add_row("with closing(connection):", _("the block should end with `close()`"))
    table.add_row("with suppress(KeyError):", _("an exception means that all is well"))
    table.add_row("with redirect_stdout(file):", _("code prints what you want to keep"))
    table.add_row("with chdir(folder):", _("code works in the current directory"))
    table.add_row("with nullcontext(sys.stdout):", _("sometimes there is nothing to clean up"))
    table.add_row("with ExitStack() as stack:", _("the number of managers can vary"))
    table.add_row("class Traced(ContextDecorator):", _("your class should decorate functions, too"))
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
* Acquire before the `try`. Acquire inside it only if cleanup is harmless without a resource.
* Restore what was there, and remove what was not there before.
* Return a true value from `__exit__` only if you mean to suppress the exception.
* No `finally` runs after SIGKILL or a power cut: make sure that a leftover does no harm."""


@contextmanager
def command_line(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """Parse the command line. This chapter has no options of its own."""
    yield parser.parse_args()


# --- The stage: it prints the demos. The same in every script; you can skip it. ---

LOCALE = Path(__file__).parent / "locale"
_ = gettext.translation("workshop", LOCALE, fallback=True).gettext
console = Console(highlight=False)
open_brackets: list[str] = []
stepping = False  # --step
OPENING, CLOSING = r"\"'(\[{（「《“‘", r"\"')\]},.;:!?%，。、；：！？）」》”’…—"
WIDE = r"\u2e80-\uffe6"
# What a line never splits: a word or a wide character, and the punctuation that clings to it.
PIECE = rf"[{OPENING}]*(?:[{WIDE}]|[^ {WIDE}]+(?<![{OPENING}])|[^ ])[{CLOSING}]* *"


def wrap(text: str, width: int) -> list[str]:
    """Break paragraphs into lines of at most `width` cells; an indented one stays as it is."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.split("\n"), ""]
            continue
        lines.append("")
        for piece in re.findall(PIECE, " ".join(paragraph.split())):
            for part in chop_cells(piece, width):
                if cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


def say(text: str, mark: str = "", style: str = "") -> None:
    """Print text behind the bars of the open brackets, with `mark` before its first line."""
    bars = "│ " * len(open_brackets)
    for line in wrap(text, console.width - cell_len(bars + mark)):
        console.print(Text.assemble((bars, "dim"), (mark + line, style)), soft_wrap=True)
        mark = " " * cell_len(mark)


def verdict(holds: bool, text: str) -> None:
    """Print the result of the runs: ✓ if it is right, ✗ if something was lost."""
    say(text, "✓ " if holds else "✗ ", "green" if holds else "red")
    say("")


def question(text: str) -> None:
    """Ask what will happen, before the learner sees it."""
    say(text, "? ", "bold")
    pause()
    console.print()


def pause() -> None:
    """With --step, wait for Enter until the input ends."""
    global stepping
    if not stepping:
        return
    # subtle: in a task, asyncio's handler would keep Ctrl-C from interrupting `input`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        input(_("  Press Enter to continue: "))
    except (EOFError, RuntimeError):  # the latter: there is no input at all
        stepping = False
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bracket(label: str) -> Iterator[None]:
    """Draw where a block begins and how it ends."""
    say(label, "┌ ")
    open_brackets.append(label)
    ending = _("ended")
    try:
        yield
    except BaseException as error:
        ending = _("left by {error}").format(error=type(error).__name__)
        raise
    finally:
        open_brackets.pop()
        say(ending, "└ ")


@contextmanager
def trace() -> Iterator[list[int]]:
    """Record the lines of this file's functions that the block runs in this thread, in order."""
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
    code = re.sub(r"(?m)(^|  ) *#.*", "", textwrap.dedent("".join(lines)))
    if piece.__doc__:  # keep its line breaks, for the numbers
        code = re.sub(r'(?s)""".*?"""', lambda found: "\n" * found[0].count("\n"), code, count=1)
    return [(n, line) for n, line in enumerate(code.splitlines(), first) if line.strip()]


def places(number: int, path: list[int]) -> str:
    """Return where a line comes in a path, such as "2 4"."""
    return " ".join(str(place) for place, line in enumerate(path, 1) if line == number)


def show_code(*pieces: Any, runs: Mapping[str, list[int]] | None = None) -> None:
    """Print code and the path that ran: a column for each run, with the order of its lines."""
    runs = runs or {}
    heading = Column(_("order of execution (blank: never ran)"), overflow="fold")
    table = Table(heading, *runs, box=None, padding=(0, 2, 0, 0), show_header=bool(runs))
    rows: list[tuple[int, str]] = []
    for piece in pieces:
        rows += [*source(piece), (0, "")]  # and an empty line
    shown = {number for number, _line in rows}
    paths = [[number for number in run if number in shown] for run in runs.values()]
    for number, line in rows:
        code = Syntax(line, "python", theme="ansi_dark", word_wrap=True)
        table.add_row(code, *(places(number, path) for path in paths))
    console.print(table)


def play(number: int) -> None:
    """Show a demo's title and lesson, then run it."""
    title, _blank, lesson = _(inspect.getdoc(DEMOS[number - 1]) or "").partition("\n\n")
    console.rule(f"[bold]{number} · {title}", align="left")
    say(lesson)
    console.print()
    running = DEMOS[number - 1]()
    if inspect.iscoroutine(running):
        asyncio.run(running)
    console.print()


def main() -> int:
    """Play the demos that the command line names; return the exit status."""
    global stepping
    gettext.bindtextdomain("workshop", LOCALE)
    gettext.textdomain("workshop")  # for argparse's own words
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(wrap(_(__doc__ or ""), console.width))
    numbers = range(1, len(DEMOS) + 1)
    parser.add_argument("demo", nargs="*", type=int, help=_("run only these demos, by number"))
    parser.add_argument("--step", action="store_true", help=_("wait for Enter at each question"))
    try:
        with command_line(parser) as options:
            if not set(options.demo) <= set(numbers):
                parser.error(f"choose demos from 1 to {len(DEMOS)}")
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
