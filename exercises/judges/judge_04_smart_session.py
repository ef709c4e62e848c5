"""What judges the exercises of chapter 04."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import Context
from typing import Any, NamedTuple

from judging import _, attempt, expect, keep_contract, task

PATIENCE = 2.0  # seconds, after which a job that nobody starts is given up

# --- 1 ---


@task(
    "04.1",
    _("The visitor who stayed an administrator"),
    "ActingAs",
    lesson="python 04_smart_session.py 2 1",
    hint=_(
        "All blocks share one manager, so they share its attributes. Which place has a value of "
        "its own for each task and each thread, and can remember several Tokens?"
    ),
    strong_hint=_(
        "Keep the Tokens in a second ContextVar, as a tuple: add one on entry, take the last one "
        "off on exit. A list would not do: a new task gets a copy of the context, but the list in "
        "it is the same."
    ),
)
def judge_acting_as(answer: Any) -> None:
    with attempt(_("make ActingAs('admin') and ActingAs('editor')")):
        as_admin, as_editor = answer.ActingAs("admin"), answer.ActingAs("editor")
    role: Callable[[], str] = answer.current_role

    def is_now(due: str, where: str) -> None:
        now = role()
        expected = _("{where}, current_role() is {role}").format(where=where, role=repr(due))
        expect(now == due, expected, _("it is {role}").format(role=repr(now)))

    in_block, inner = _("in the block"), _("in the inner block")
    after, after_inner = _("after the block"), _("after the inner block")
    with attempt(_("with as_admin: …")):
        with as_admin:
            is_now("admin", in_block)
        is_now("visitor", after)
    error = ValueError()
    came_out: BaseException | None = None
    with attempt(_("with as_admin: the block raises ValueError")):
        try:
            with as_admin:
                raise error
        except ValueError as caught:
            came_out = caught
        is_now("visitor", after)
        expect(came_out is error, _("the block's exception comes out"), repr(came_out))
    again = _("`with as_admin:` again, inside its own block")
    with attempt(again, _("after both blocks, current_role() is 'visitor'")):
        with as_admin:
            with as_admin:
                is_now("admin", inner)
            is_now("admin", after_inner)
        is_now("visitor", after)
    with attempt(_("as_admin inside as_editor inside as_admin")):
        with as_admin:
            with as_editor:
                with as_admin:
                    is_now("admin", inner)
                is_now("editor", after_inner)
            is_now("admin", after_inner)
        is_now("visitor", after)

    async def overlapping() -> None:
        """Play two tasks: the first one enters first and leaves first."""
        both_in, first_left = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with as_editor:
                with as_admin:
                    await both_in.wait()
                    is_now("admin", _("in the first task's block"))
                is_now("editor", _("after the first task's inner block"))
            is_now("visitor", _("after the first task's blocks"))
            first_left.set()

        async def second() -> None:
            with as_admin:
                both_in.set()
                await first_left.wait()
                is_now("admin", _("in the second task's block, after the first one's has ended"))
            is_now("visitor", _("after the second task's block"))

        await run_both(first(), second())

    called = _(
        "two tasks: the first one is in as_admin, inside as_editor; the second one enters "
        "as_admin; then the first one leaves"
    )
    with attempt(called, _("each task has its own role")):
        Context().run(asyncio.run, overlapping())  # without what was set so far

    async def outliving() -> None:
        """Let a task enter the manager in whose block it was created, and outlive that block."""
        child_in, parent_left = asyncio.Event(), asyncio.Event()

        async def child() -> None:
            try:
                as_admin.__enter__()
            finally:
                child_in.set()
            await parent_left.wait()
            as_admin.__exit__(None, None, None)
            is_now("admin", _("in the new task, after its own block"))

        async def parent() -> None:
            with as_admin:
                new_task = asyncio.create_task(child())
                await child_in.wait()
            is_now("visitor", after)
            parent_left.set()
            await new_task

        await parent()

    called = _(
        "in a block of as_admin, a task is created; it enters as_admin, too; the first block "
        "ends, then the task's own"
    )
    with attempt(called, _("each task has its own role")):
        Context().run(asyncio.run, outliving())

    from contract import Subject

    def subject() -> Subject:
        def leaks() -> object:
            return role() != "visitor" and _("the role {role}").format(role=repr(role()))

        return Subject(
            open=lambda: as_admin,
            leaks=leaks,
            setup_faults="setting a variable cannot fail",
            cleanup_faults="resetting it cannot fail",
        )

    keep_contract(subject)


async def run_both(*coroutines: Any) -> None:
    """Run tasks at once; raise the first error, and cancel the rest."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for each in tasks:
        if each in done:
            each.result()


# --- 2 ---


@task(
    "04.2",
    _("Fields for every log line of a block"),
    "log_fields",
    "current_fields",
    lesson="python 04_smart_session.py 1 2",
    hint=_(
        "A ContextVar keeps one dict for each task. But a new task gets a copy of the context, in "
        "which the dict is still the same: who may change it?"
    ),
    strong_hint=_(
        "Never change a dict that is in the ContextVar. `set` a new one, "
        "`{**outer, **fields}`, and `reset` with the Token in a `finally`. Return a copy."
    ),
)
def judge_log_fields(answer: Any) -> None:
    def are_now(due: dict[str, Any], where: str) -> None:
        now = answer.current_fields()
        expected = _("{where}, current_fields() returns {fields}").format(where=where, fields=due)
        expect(now == due, expected, _("it returns {fields}").format(fields=repr(now)))

    in_block, inner = _("in the block"), _("in the inner block")
    after, after_inner = _("after the block"), _("after the inner block")
    with attempt(_("with log_fields(request=7): …")):
        with answer.log_fields(request=7):
            are_now({"request": 7}, in_block)
        are_now({}, after)
    with attempt(_("log_fields(user='ada') inside log_fields(request=7)")):
        with answer.log_fields(request=7):
            with answer.log_fields(user="ada"):
                are_now({"request": 7, "user": "ada"}, inner)
            are_now({"request": 7}, after_inner)
    with attempt(_("log_fields(user='bob') inside log_fields(user='ada')")):
        with answer.log_fields(user="ada"):
            with answer.log_fields(user="bob"):
                are_now({"user": "bob"}, inner)
            are_now({"user": "ada"}, after_inner)
    for called, error in (
        (_("the inner one of two blocks raises ValueError"), ValueError()),
        (_("in the inner one of two blocks, the user presses Ctrl-C"), KeyboardInterrupt()),
    ):
        with attempt(called), answer.log_fields(request=7):
            came_out: BaseException | None = None
            try:
                with answer.log_fields(request=8, user="ada"):
                    raise error
            except BaseException as caught:
                came_out = caught
            are_now({"request": 7}, after_inner)
            expect(came_out is error, _("the block's exception comes out"), repr(came_out))
    with attempt(_("in a block, the dict that current_fields() has returned is changed")):
        with answer.log_fields(request=7):
            answer.current_fields()["colour"] = "red"
            are_now({"request": 7}, in_block)
        answer.current_fields()["colour"] = "red"
        are_now({}, after)

    async def two_tasks() -> None:
        both_in, first_left = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            are_now({"request": 7}, _("when the first task starts"))
            with answer.log_fields(user="ada"):
                await both_in.wait()
                are_now({"request": 7, "user": "ada"}, _("in the first task's block"))
            are_now({"request": 7}, _("after the first task's block"))
            first_left.set()

        async def second() -> None:
            with answer.log_fields(task=2):
                both_in.set()
                await first_left.wait()
                are_now({"request": 7, "task": 2}, _("in the second task's block"))

        with answer.log_fields(request=7):
            await run_both(first(), second())
            are_now({"request": 7}, _("after both tasks, in the block that created them"))

    called = _(
        "in log_fields(request=7), two tasks are created: one adds user='ada', the other task=2"
    )
    with attempt(called):
        asyncio.run(two_tasks())

    def in_a_thread(add: threading.Event, look: threading.Event) -> None:
        with answer.log_fields(user="bob"):
            add.set()
            look.wait(PATIENCE)

    with attempt(_("while a block is open, a thread adds user='bob'")):
        with answer.log_fields(request=7), ThreadPoolExecutor(1) as executor:
            added, looked = threading.Event(), threading.Event()
            job = executor.submit(in_a_thread, added, looked)
            added.wait(PATIENCE)
            try:
                are_now({"request": 7}, _("in the thread that opened the block"))
            finally:
                looked.set()
            job.result()

    from contract import Subject

    def subject() -> Subject:
        def leaks() -> object:
            left = answer.current_fields()
            return left and _("the fields {fields}").format(fields=left)

        return Subject(
            open=lambda: answer.log_fields(request=7),
            leaks=leaks,
            setup_faults="setting a variable cannot fail",
            cleanup_faults="resetting it cannot fail",
        )

    keep_contract(subject)


# --- 3 ---


class Job(NamedTuple):
    """An item for `work`: what a job does with the answer."""

    module: str  # the answer's name; a process cannot be sent a module
    prompts: tuple[str, ...]
    child: str = ""  # opens this session for a last prompt
    error: BaseException | None = None  # raised after the prompts


def work(job: Job) -> str:
    """Ask what the job says. Return the name of the session in which it runs."""
    answer = sys.modules[job.module]
    here = answer.current_session()
    for prompt in job.prompts:
        answer.ask(prompt)
    if job.child:
        with answer.session(job.child):
            answer.ask(f"{job.child}, inside")
    if job.error is not None:
        raise job.error
    return "None" if here is None else str(here.name)


def number(item: int) -> int:
    return item * item


@task(
    "04.3",
    _("A session that follows its calls into threads and process pools"),
    "run_all",
    "ask",
    lesson="python 04_smart_session.py 3",
    hint=_(
        "No other process can append to your session. What can come back from a job, beside its "
        "result? If a thread brings back the same, you need one way only."
    ),
    strong_hint=_(
        "Submit a function of your own, defined at the top of the file so that it can be pickled. "
        "It makes a new Session with the name of the caller's, makes it current for the job, and "
        "returns it with the result or the error, whatever it is. `run_all` waits for all of "
        "them, adds their calls and children to its own session in order, and only then raises."
    ),
    seconds=20,
)
def judge_run_all(answer: Any) -> None:
    fork = multiprocessing.get_context("fork")  # so that workers know the answer's module
    # Two threads, so that jobs run at once; one process, so that it serves every session.
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(1, mp_context=fork) as processes:
        pools = ((threads, _("in two threads")), (processes, _("in a process")))
        judge_calls(answer, *pools[0])
        judge_order(answer, threads, only_at_once=True)
        judge_calls(answer, *pools[1])
        judge_order(answer, threads)
        for pool, where in pools:
            judge_children(answer, pool, where)
        for pool, where in pools:
            judge_errors(answer, pool, where)
        for pool, where in pools:
            judge_shared_workers(answer, pool, where)
        judge_two_callers(answer)
        judge_in_a_job(answer, threads, processes)

    from contract import Subject

    def subject() -> Subject:
        def leaks() -> object:
            here = answer.current_session()
            return here and _("the session {name} is current").format(name=here.name)

        return Subject(
            open=lambda: answer.session("review"),
            leaks=leaks,
            setup_faults="setting a variable cannot fail",
            cleanup_faults="resetting it cannot fail",
        )

    keep_contract(subject)


def compare(
    session: Any, calls: list[str], children: list[str] | None = None, ordered: bool = True
) -> None:
    """Expect that a session has recorded these calls, and these children."""
    expected = _("session {name} has the calls {calls}").format(name=session.name, calls=calls)
    happened = _("it has {calls}").format(calls=session.calls or _("none"))
    found = session.calls if ordered else sorted(session.calls)
    if found != calls and sorted(found) == sorted(calls):
        happened = _("their order is {calls}").format(calls=found)
    expect(found == calls, expected, happened)
    if children is not None:
        expected = _("session {name} has the children {children}, each with its call")
        names = [child.name for child in session.children]
        expect(
            names == children,
            expected.format(name=session.name, children=children),
            _("it has {children}").format(children=names or _("none")),
        )
        for child in session.children:
            compare(child, [f"{child.name}, inside"])


def judge_calls(answer: Any, pool: Executor, where: str) -> None:
    """Run three jobs."""
    me = answer.__name__
    with attempt(_("run_all with the numbers 3, 1, 2, {where}").format(where=where)):
        squares = answer.run_all(pool, number, iter([3, 1, 2]))
    expect(
        list(squares) == [9, 1, 4],
        _("it returns their squares, in their order: [9, 1, 4]"),
        _("it returns {squares}").format(squares=squares),
    )
    called = _("in session review: an `ask`, run_all with three jobs {where}, an `ask`")
    jobs = [Job(me, (name,)) for name in ("one", "two", "three")]
    with attempt(called.format(where=where)), answer.session("review") as review:
        answer.ask("before")
        names = answer.run_all(pool, work, jobs)
        after_run = list(review.calls)
        answer.ask("after")
    due = ["before", "one", "two", "three"]
    missing = [prompt for prompt in due if prompt not in after_run]
    expect(
        not missing,
        _("when run_all has returned, session review has the calls {calls}").format(calls=due),
        _("it lacks {calls}").format(calls=missing),
    )
    expect(
        names == ["review"] * 3,
        _("in each job, current_session() has the name review"),
        _("the names are {names}").format(names=", ".join(names)),
    )
    compare(review, sorted([*due, "after"]), [], ordered=False)


class Asked:
    """For jobs in two threads: the first one asks when the second one has ended."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.first_started = threading.Event()
        self.third_asked = threading.Event()
        self.in_vain = False

    def __call__(self, prompt: str) -> None:
        if prompt == "two":
            self.first_started.wait(PATIENCE)
        if prompt == "one":
            self.first_started.set()
            self.in_vain = not self.third_asked.wait(PATIENCE)
        self.answer.ask(prompt)
        if prompt == "three":  # it has the thread of the second one
            self.third_asked.set()


def judge_order(answer: Any, threads: Executor, only_at_once: bool = False) -> None:
    """Let the first job ask after the others."""
    asked = Asked(answer)
    called = _("run_all with three jobs in two threads; the first one asks after the others")
    with attempt(called), answer.session("review") as review:
        answer.run_all(threads, asked, ["one", "two", "three"])
    at_once = _("the others start while the first one is running")
    expect(not asked.in_vain, at_once, _("they start when the first one has ended"))
    if not only_at_once:
        compare(review, ["one", "two", "three"], [])


def judge_children(answer: Any, pool: Executor, where: str) -> None:
    """Let jobs open sessions."""
    me = answer.__name__
    called = _("run_all with two jobs {where}, in which each opens a session").format(where=where)
    jobs = [Job(me, ("one",), child="first"), Job(me, ("two",), child="second")]
    with attempt(called), answer.session("review") as review:
        answer.run_all(pool, work, jobs)
    compare(review, ["one", "two"], ["first", "second"])


def judge_errors(answer: Any, pool: Executor, where: str) -> None:
    """Let jobs raise."""
    me = answer.__name__
    for raised in (KeyError("two"), SystemExit("two")):
        name = type(raised).__name__
        called = _(
            "run_all with four jobs {where}; the second one asks and raises {error}, the third "
            "one asks and raises ValueError"
        ).format(where=where, error=name)
        jobs = [
            Job(me, ("one",)),
            Job(me, ("two",), error=raised),
            Job(me, ("three",), error=ValueError("three")),
            Job(me, ("four",), child="fourth"),
        ]
        came_out: BaseException | None = None
        with attempt(called), answer.session("review") as review:
            try:
                answer.run_all(pool, work, jobs)
            except BaseException as caught:
                came_out = caught
        expected = _("the second job's {error} comes out").format(error=name)
        happened = _("{error} comes out").format(error=repr(came_out))
        same = type(came_out) is type(raised) and came_out.args == raised.args
        expect(same, expected, _("no exception") if came_out is None else happened)
        compare(review, ["one", "two", "three", "four"], ["fourth"])


def judge_shared_workers(answer: Any, pool: Executor, where: str) -> None:
    """Use the same workers for another session, and for none."""
    me = answer.__name__
    called = _("run_all {where}, in session first; then in session second").format(where=where)
    with attempt(called):
        with answer.session("first") as first:
            answer.run_all(pool, work, [Job(me, ("one",))])
        with answer.session("second") as second:
            answer.run_all(pool, work, [Job(me, ("two",))])
    compare(first, ["one"], [])
    compare(second, ["two"], [])
    with attempt(_("after that, run_all {where}, outside a session").format(where=where)):
        names = answer.run_all(pool, work, [Job(me, ("three",), child="alone")])
    expect(
        names == ["None"],
        _("in the job, current_session() is None"),
        _("it is a session with the name {name}").format(name=names[0]),
    )
    compare(second, ["two"], [])


class Meeting:
    """For jobs in threads: each one asks when the jobs of both sessions are running."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.barrier = threading.Barrier(4, timeout=PATIENCE)

    def __call__(self, prompt: str) -> None:
        self.barrier.wait()
        self.answer.ask(prompt)
        self.barrier.wait()


def judge_two_callers(answer: Any) -> None:
    """Use one pool from two threads, each in its own session."""
    meeting = Meeting(answer)

    def review(name: str) -> Any:
        with answer.session(name) as made:
            answer.run_all(workers, meeting, [f"{name} 1", f"{name} 2"])
        return made

    called = _("two threads, each in its own session, use run_all with the same four threads")
    with attempt(called), ThreadPoolExecutor(4) as workers, ThreadPoolExecutor(2) as callers:
        sessions = list(callers.map(review, ["first", "second"]))
    for session in sessions:
        compare(session, [f"{session.name} 1", f"{session.name} 2"], [])


def judge_in_a_job(answer: Any, threads: Executor, processes: Executor) -> None:
    """Let a job in a thread use run_all itself, with the process pool."""
    me = answer.__name__

    def review(name: str) -> None:
        with answer.session(name):
            answer.run_all(processes, work, [Job(me, (f"{name}, inside",))])

    called = _("run_all with two jobs in threads, in which each opens a session and uses run_all")
    with attempt(called), answer.session("review") as made:
        answer.run_all(threads, review, ["first", "second"])
    compare(made, [], ["first", "second"])
