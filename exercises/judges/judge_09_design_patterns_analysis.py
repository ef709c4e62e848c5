"""What judges the exercises of chapter 09."""

from __future__ import annotations

import io
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from judging import _, attempt, expect, keep_contract, task


def same_comes_out(came_out: BaseException | None, error: BaseException | None) -> None:
    """Expect that this exception, or none, came out."""
    expect(
        came_out is error,
        _("the block's exception comes out")
        if error is not None
        else _("no exception comes out, since the block ended well"),
        _("no exception comes out") if came_out is None else comes_out(came_out),
    )


def comes_out(error: BaseException) -> str:
    """Say that this exception came out."""
    return _("{error} comes out").format(error=repr(error))


# --- 1 · bug ---


@task(
    "09.1",
    _("The chat that stopped all deployments"),
    "deployment",
    "notify",
    lesson="09_design_patterns_analysis.md, Observer",
    hint=_(
        "Who may stop the cleanup? Make the lock the outermost block. Then write one function "
        "that tells one event to all listeners, and is careful with each of them."
    ),
    strong_hint=_(
        "`with lock:` around everything. In a function `notify(listeners, event)`, loop over "
        "`tuple(listeners)`, and put the call of each listener into a `try` with `except "
        "Exception: logging.exception(...)`. Call it before and after the block."
    ),
)
def judge_deployment(answer: Any) -> None:
    with attempt(_("two listeners; the block ends well")):
        heard, came_out, _records = deploy(answer)
    same_comes_out(came_out, None)
    compare_heard(heard)

    for called, event, error in (
        (_("the chat raises ConnectionError at `ended`; the block ends well"), "ended", None),
        (
            _("the chat raises ConnectionError at `ended`; the block raises ValueError"),
            "ended",
            ValueError("of the block"),
        ),
        (_("the chat raises ConnectionError at `started`"), "started", None),
    ):
        down = ConnectionError("the chat is down")
        with attempt(called):
            heard, came_out, records = deploy(answer, {event: down}, error)
        same_comes_out(came_out, error)
        compare_heard(heard)
        texts = [record.getMessage() for record in records]
        expect(records, _("the listener's exception is logged"), _("nothing is logged"))
        expect(
            any(record.exc_info and record.exc_info[1] is down for record in records),
            _("it is logged with its traceback"),
            _("the log has {texts}, without a traceback").format(texts=texts),
        )

    for called, event in (
        (_("the user presses Ctrl-C while the chat is told `ended`"), "ended"),
        (_("the user presses Ctrl-C while the chat is told `started`"), "started"),
    ):
        ctrl_c = KeyboardInterrupt()
        with attempt(called):
            _heard, came_out, _records = deploy(answer, {event: ctrl_c})
        expect(
            came_out is ctrl_c,
            _("KeyboardInterrupt comes out"),
            _("no exception comes out, so Ctrl-C does nothing")
            if came_out is None
            else comes_out(came_out),
        )

    for called, event in (
        (_("the first listener removes itself when it is told `started`"), "started"),
        (_("the first listener removes itself when it is told `ended`"), "ended"),
    ):
        log: list[str] = []
        listeners: list[Callable[[str], None]] = []

        def once(told: str, event: str = event, listeners: list[Any] = listeners) -> None:
            if told == event:
                listeners.pop(0)

        listeners += [once, log.append]
        with attempt(called), answer.deployment(threading.Lock(), listeners):
            pass
        compare_heard(log)

    from contract import Subject

    def subject() -> Subject:
        lock, fails_at = threading.Lock(), list[str]()

        def listener(event: str) -> None:
            if event in fails_at:
                raise KeyboardInterrupt

        @contextmanager
        def ctrl_c_at(event: str) -> Iterator[type[BaseException]]:
            fails_at.append(event)
            yield KeyboardInterrupt
            fails_at.clear()

        return Subject(
            open=lambda: answer.deployment(lock, [listener]),
            leaks=lambda: lock.locked() and "the lock",
            setup_faults=[lambda: ctrl_c_at("started")],
            cleanup_faults=[lambda: ctrl_c_at("ended")],
            nestable=False,
            concurrent=False,
        )

    keep_contract(subject)


def deploy(
    answer: Any, chat: dict[str, BaseException] | None = None, error: BaseException | None = None
) -> tuple[list[str], BaseException | None, list[logging.LogRecord]]:
    """Deploy; return what the log heard, what came out, and what was logged.

    `chat` has the exceptions of a listener before the log, by event.
    """
    lock, heard, came_out, held = threading.Lock(), list[str](), None, None
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]

    def chatting(event: str) -> None:
        if chat and event in chat:
            raise chat[event]

    logging.getLogger().addHandler(handler)
    try:
        with answer.deployment(lock, [chatting, heard.append]):
            held = lock.locked()
            if error is not None:
                raise error
    except BaseException as caught:
        came_out = caught
    finally:
        logging.getLogger().removeHandler(handler)
    if isinstance(came_out, NotImplementedError):
        raise came_out
    if held is not None:
        expect(held, _("during the block, the lock is held"), _("it is free"))
    expect(
        not lock.locked(),
        _("after the block, the lock is released"),
        _("it is still held, so nobody can deploy")
        if came_out is error
        else _("it is still held, and {error} comes out").format(error=repr(came_out)),
    )
    if came_out is None or came_out is error:
        expect(held is not None, _("the block runs"), _("it does not run"))
    return heard, came_out, records


def compare_heard(heard: list[str]) -> None:
    """Expect that a listener was told all."""
    expect(
        heard == ["started", "ended"],
        _("the listener after it in the list is told {events}").format(
            events="['started', 'ended']"
        ),
        _("it is told {events}").format(events=heard),
    )


# --- 2 · task ---


@task(
    "09.2",
    _("A frame for managers"),
    "Managed",
    lesson="09_design_patterns_analysis.md, Template Method",
    hint=_(
        "Draw the steps as `try` blocks inside each other. Which step is the `finally` of all the "
        "others? How does `__exit__` know whether the block raised?"
    ),
    strong_hint=_(
        "In `__enter__`, release in an `except BaseException` around `check`, and raise again. In "
        "`__exit__`, ask `exc_type is None`; put `commit` into a `try` whose `except "
        "BaseException` rolls back and raises again; and put all of that into a `try` whose "
        "`finally` releases."
    ),
)
def judge_managed(answer: Any) -> None:
    well, raises = ["acquire", "check"], ["block"]
    ends: list[tuple[str, list[str], list[str]]] = [
        (_("the block ends well"), [], [*well, "block", "commit", "release"]),
        (_("the block raises ValueError"), raises, [*well, "block", "roll_back", "release"]),
        (_("`acquire` raises"), ["acquire"], ["acquire"]),
        (_("`check` raises"), ["check"], [*well, "release"]),
        (_("`commit` raises"), ["commit"], [*well, "block", "commit", "roll_back", "release"]),
        (
            _("the block raises, and then `roll_back` does"),
            ["block", "roll_back"],
            [*well, "block", "roll_back", "release"],
        ),
        (
            _("`commit` raises, and then `roll_back` does"),
            ["commit", "roll_back"],
            [*well, "block", "commit", "roll_back", "release"],
        ),
        (_("`release` raises"), ["release"], [*well, "block", "commit", "release"]),
    ]
    for called, fails, steps in ends:
        play(answer, called, fails, steps, ValueError)
    steps = [*well, "block", "roll_back", "release"]
    play(answer, _("the user presses Ctrl-C in the block"), ["block"], steps, KeyboardInterrupt)
    steps = [*well, "release"]
    play(answer, _("the user presses Ctrl-C during `check`"), ["check"], steps, KeyboardInterrupt)

    manager = recorded(answer, [], ValueError)
    for called in (_("the block ends well"), _("the same object is used for a second block")):
        manager.log.clear()
        with attempt(called), manager as resource:
            expect(
                resource is manager.resource,
                _("the block gets what `acquire` returned"),
                _("it gets {value}").format(value=repr(resource)),
            )
        expect(
            manager.log == [*well, "commit", "release"],
            _("the steps are {steps}").format(steps=", ".join([*well, "commit", "release"])),
            _("they are {steps}").format(steps=", ".join(manager.log)),
        )

    from contract import Subject

    def subject() -> Subject:
        held: list[object] = []
        fails: list[str] = []

        class Counted(answer.Managed):  # type: ignore[misc]
            def acquire(self) -> object:
                fail("acquire")
                resource = object()
                held.append(resource)
                return resource

            def check(self, _resource: object) -> None:
                fail("check")

            def commit(self, _resource: object) -> None:
                fail("commit")

            def roll_back(self, _resource: object) -> None:
                fail("commit")

            def release(self, resource: object) -> None:
                held.remove(resource)
                fail("release")

        def fail(step: str) -> None:
            if step in fails:
                raise OSError(step)

        @contextmanager
        def failing(step: str) -> Iterator[type[Exception]]:
            fails.append(step)
            yield OSError
            fails.remove(step)

        return Subject(
            open=Counted,
            leaks=lambda: held,
            setup_faults=[lambda: failing("acquire"), lambda: failing("check")],
            cleanup_faults=[lambda: failing("commit"), lambda: failing("release")],
        )

    keep_contract(subject)


def recorded(answer: Any, fails: list[str], error: type[BaseException]) -> Any:
    """Return a manager that records its steps in `log`, and raises in some of them."""

    class Recorded(answer.Managed):  # type: ignore[misc]
        resource = None  # a resource like any other
        log: list[str]

        def step(self, name: str) -> None:
            self.log.append(name)
            if name in fails:
                raise error(name)

        def acquire(self) -> None:
            self.step("acquire")

        def check(self, resource: object) -> None:
            assert resource is self.resource
            self.step("check")

        def commit(self, resource: object) -> None:
            assert resource is self.resource
            self.step("commit")

        def roll_back(self, resource: object) -> None:
            assert resource is self.resource
            self.step("roll_back")

        def release(self, resource: object) -> None:
            assert resource is self.resource
            self.step("release")

    manager = Recorded()
    manager.log = []
    return manager


def play(
    answer: Any, called: str, fails: list[str], steps: list[str], error: type[BaseException]
) -> None:
    """Run one block, and compare the steps and what comes out."""
    manager, came_out = recorded(answer, fails, error), None
    with attempt(called):
        try:
            with manager:
                manager.step("block")
        except error as caught:
            came_out = caught
    expect(
        manager.log == steps,
        _("the steps are {steps}").format(steps=", ".join(steps)),
        _("they are {steps}").format(steps=", ".join(manager.log)),
    )
    raised = fails[-1] if fails else None
    shown = str(came_out) if came_out is not None else None
    expect(
        shown == raised,
        _("the exception of `{step}` comes out").format(step=raised)
        if raised
        else _("no exception"),
        _("no exception comes out")
        if shown is None
        else _("that of `{step}` comes out").format(step=shown),
    )


# --- 3 · capstone ---

OLD, NEW = "apple,1\n", "apple,2\npear,3\n"
ROWS = [("apple", "2"), ("pear", "3")]


@task(
    "09.3",
    _("Find the pattern"),
    "Exporter",
    "exclusive",
    "replacement",
    lesson="09_design_patterns_analysis.md, RAII",
    hint=_(
        "A flag such as `locked` repeats what the position in the code says: inside the block of "
        "`exclusive` the lock is held, outside it is not. Which of the two managers must be the "
        "outer one?"
    ),
    strong_hint=_(
        "Acquire above `try`, release in `finally`: then only what was acquired is released. "
        "`replacement` closes the draft and replaces the target inside its `try`, after `yield`, "
        "and deletes what is left of the draft in `finally`. `export` is one `with exclusive(...), "
        "replacement(...) as draft:` and a loop."
    ),
)
def judge_exporter(answer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        exports(answer, files)
        exports_fail(answer, files)
        another_export_runs(answer, files)
        files_are_in_the_way(answer, files)
        judge_exclusive(answer, files)
        judge_replacement(answer, files)
        export_uses_both(answer, files)


class Files:
    """The folder of an export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target, self.draft, self.lock = (
            folder / f"prices.{suffix}" for suffix in ("csv", "draft", "lock")
        )

    def begin(self) -> None:
        """Leave the old list only."""
        for path in (self.target, self.draft, self.lock):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        self.target.write_text(OLD)

    def compare(self, *, new: bool) -> None:
        """Expect the old or the new list, and nothing else."""
        expect(
            not self.lock.exists(),
            _("afterwards, prices.lock is gone"),
            _("it is still there, so every later export raises BusyError"),
        )
        expect(
            not self.draft.exists(),
            _("afterwards, prices.draft is gone"),
            _("it is still there"),
        )
        found = self.target.read_text()
        expect(
            found == (NEW if new else OLD),
            _("afterwards, prices.csv is the new list")
            if new
            else _("afterwards, prices.csv is the old list"),
            _("it contains {text}").format(text=repr(found)),
        )


def exports(answer: Any, files: Files) -> None:
    files.begin()
    exporter = None
    for called in (_("export two rows"), _("export two rows again, with the same object")):
        with attempt(called):
            exporter = exporter or answer.Exporter(files.target)
            number = exporter.export(iter(ROWS))
        files.compare(new=True)
        expect(
            number == 2,
            _("`export` returns 2, the number of rows"),
            _("it returns {value}").format(value=repr(number)),
        )


def exports_fail(answer: Any, files: Files) -> None:
    for called, error in (
        (_("the rows raise ValueError after the first one"), ValueError()),
        (_("the user presses Ctrl-C after the first row"), KeyboardInterrupt()),
    ):
        files.begin()
        came_out: BaseException | None = None

        def rows(error: BaseException = error) -> Iterator[tuple[str, str]]:
            yield ROWS[0]
            raise error

        with attempt(called):
            try:
                answer.Exporter(files.target).export(rows())
            except type(error) as caught:
                came_out = caught
        files.compare(new=False)
        same_comes_out(came_out, error)


def another_export_runs(answer: Any, files: Files) -> None:
    files.begin()
    exporter = answer.Exporter(files.target)
    busy = False
    with attempt(_("export; the lock file and the draft of another export are there")):
        exporter.export(ROWS)  # its state must not matter below
        files.begin()
        files.lock.touch()
        files.draft.write_text("apple")
        try:
            exporter.export(ROWS)
        except answer.BusyError:
            busy = True
    expect(busy, _("BusyError"), _("no exception"))
    expect(
        files.lock.exists(),
        _("the lock file of the other export is still there"),
        _("it is gone, so a third export could start"),
    )
    expect(
        files.draft.exists(),
        _("the draft of the other export is still there"),
        _("it is gone"),
    )
    expect(
        files.draft.read_text() == "apple",
        _("the draft of the other export is as it was"),
        _("it contains {text}").format(text=repr(files.draft.read_text())),
    )
    found = files.target.read_text()
    expect(
        found == OLD,
        _("prices.csv is the old list"),
        _("it contains {text}").format(text=repr(found)),
    )


def files_are_in_the_way(answer: Any, files: Files) -> None:
    files.begin()
    files.draft.mkdir()
    failed = False
    with attempt(_("prices.draft is a folder, so it cannot be opened")):
        try:
            answer.Exporter(files.target).export(ROWS)
        except OSError:
            failed = True
    files.draft.rmdir()
    files.compare(new=False)
    expect(failed, _("OSError"), _("no exception"))

    files.begin()
    files.target.unlink()
    files.target.mkdir()
    failed = False
    with attempt(_("prices.csv is a folder, so it cannot be replaced")):
        try:
            answer.Exporter(files.target).export(ROWS)
        except OSError:
            failed = True
    files.target.rmdir()
    files.target.write_text(OLD)
    files.compare(new=False)
    expect(failed, _("OSError"), _("no exception"))


@contextmanager
def folder_at(path: Path) -> Iterator[None]:
    """Put a folder where a file is meant to be."""
    path.unlink(missing_ok=True)
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()


def judge_exclusive(answer: Any, files: Files) -> None:
    files.begin()
    busy = False
    with attempt(_("with exclusive(lock)")), answer.exclusive(files.lock):
        expect(
            files.lock.exists(), _("during the block, the lock file is there"), _("it is not there")
        )
        try:
            with answer.exclusive(files.lock):
                pass
        except answer.BusyError:
            busy = True
    expect(busy, _("a second `exclusive` inside raises BusyError"), _("no exception"))

    from contract import Subject

    elsewhere = files.folder / "elsewhere"

    @contextmanager
    def no_folder() -> Iterator[type[Exception]]:
        elsewhere.rmdir()
        try:
            yield OSError
        finally:
            elsewhere.mkdir()

    elsewhere.mkdir()
    keep_contract(
        lambda: Subject(
            open=lambda: answer.exclusive(elsewhere / "prices.lock"),
            leaks=lambda: [path.name for path in elsewhere.iterdir()],
            setup_faults=[no_folder],
            nestable=False,
            concurrent=False,
            cleanup_faults="it only deletes the file that it made",
        )
    )


def judge_replacement(answer: Any, files: Files) -> None:
    files.begin()
    with attempt(_("with replacement(target) as draft")), answer.replacement(files.target) as draft:
        draft.write(NEW)
        draft.flush()
        found = files.target.read_text()
        expect(
            found == OLD,
            _("during the block, the target is the old list"),
            _("it contains {text}").format(text=repr(found)),
        )
    files.compare(new=True)

    from contract import Subject

    keep_contract(
        lambda: Subject(
            open=lambda: answer.replacement(files.target),
            leaks=lambda: files.draft.exists() and files.draft.name,
            use=lambda draft: draft.write("apple"),
            closed_error=ValueError,
            setup_faults=[lambda: folder_at(files.draft)],
            cleanup_faults=[lambda: folder_at(files.target)],
            nestable=False,
            concurrent=False,
        )
    )


def export_uses_both(answer: Any, files: Files) -> None:
    """Replace the managers: then no file may be made by anybody else."""
    files.begin()
    events: list[str] = []
    written = io.StringIO()

    @contextmanager
    def exclusive(_lock: object) -> Iterator[None]:
        events.append("enter exclusive")
        yield
        events.append("exit exclusive")

    @contextmanager
    def replacement(_target: object) -> Iterator[io.StringIO]:
        events.append("enter replacement")
        yield written
        events.append("exit replacement")

    def rows() -> Iterator[tuple[str, str]]:
        for name in (files.lock.name, files.draft.name):
            expect(
                not (files.folder / name).exists(),
                _("only `exclusive` and `replacement` make files"),
                _("`export` makes {name} without them").format(name=name),
            )
        yield from ROWS

    with (
        attempt(_("export, with an `exclusive` and a `replacement` that make no files")),
        mock.patch.object(answer, "exclusive", exclusive),
        mock.patch.object(answer, "replacement", replacement),
    ):
        answer.Exporter(files.target).export(rows())
        expect(
            written.getvalue() == NEW,
            _("the rows are written to what `replacement` gives"),
            _("it gets {text}").format(text=repr(written.getvalue())),
        )
    wanted = ["enter exclusive", "enter replacement", "exit replacement", "exit exclusive"]
    expect(
        events == wanted,
        _("the order is: {events}").format(events=", ".join(wanted)),
        _("it is: {events}").format(events=", ".join(events)),
    )
