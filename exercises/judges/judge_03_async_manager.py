"""What judges the exercises of chapter 03."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from judging import _, attempt, expect, keep_contract, task

TURNS = 25  # of the event loop, in which every task goes as far as it can


def keep_asyncio_quiet() -> None:
    """Keep tracebacks of tasks that the judge leaves behind out of the report."""
    logging.getLogger("asyncio").disabled = True


async def settle() -> None:
    for _turn in range(TURNS):
        await asyncio.sleep(0)


async def ended(running: asyncio.Task[None]) -> BaseException | None:
    """Return what came out of a task, which must have ended."""
    await settle()
    expect(running.done(), _("the block and its cleanup end"), _("they never end"))
    if running.cancelled():
        return asyncio.CancelledError()
    error = running.exception()
    if isinstance(error, NotImplementedError):
        raise error
    return error


def comes_out(error: BaseException | None) -> str:
    """Say in words what came out of a block, or should."""
    if error is None:
        return _("no exception comes out")
    return _("{error} comes out").format(error=repr(error))


def expect_error(wanted: BaseException | None, came_out: BaseException | None) -> None:
    """Expect the very same exception, or any CancelledError."""
    same = came_out is wanted
    if isinstance(wanted, asyncio.CancelledError):
        same = isinstance(came_out, asyncio.CancelledError)
    if not same and isinstance(came_out, Exception):
        raise came_out  # so that `attempt` reports its line, too
    expect(same, comes_out(wanted), comes_out(came_out))


# --- 1 ---


@task(
    "03.1",
    _("The licences that vanished"),
    "licence",
    lesson="python 03_async_manager.py 4 7",
    hint=_(
        "Each `await` may raise CancelledError, or what `audit` raises. Ask of each of the three: "
        "if this line raises, which lines never run?"
    ),
    strong_hint=_(
        "Nothing may stand between `get` and `try`: move the first `audit` into the `try`. In "
        "`finally`, put the licence back before you await anything."
    ),
)
def judge_licence(answer: Any) -> None:
    keep_asyncio_quiet()
    stop = asyncio.CancelledError()
    down = OSError("the audit log is down")
    error = ValueError("of the block")
    # What happens; what should come out; where a task waits until it is cancelled; what fails.
    ways: list[tuple[str, BaseException | None, tuple[str, ...], str]] = [
        (_("the block ends well"), None, (), ""),
        (_("the block raises ValueError"), error, (), ""),
        (_("Stop is pressed in the block"), stop, ("block",), ""),
        (_("Stop is pressed while `audit` sends the first line"), stop, ("lent",), ""),
        (_("Stop is pressed while `audit` sends the second line"), stop, ("returned",), ""),
        (
            _("Stop is pressed in the block, and again while `audit` sends the second line"),
            stop,
            ("block", "returned"),
            "",
        ),
        (_("`audit` raises OSError instead of sending the first line"), down, (), "lent"),
        (_("`audit` raises OSError instead of sending the second line"), down, (), "returned"),
    ]
    for called, wanted, waits, fails in ways:
        with attempt(f"async with licence(licences, audit): {called}", comes_out(wanted)):
            asyncio.run(simulate(answer, wanted, waits, fails))

    from contract import Subject

    def subject() -> Subject:
        licences: asyncio.Queue[str] = asyncio.Queue()
        for name in "ABCD":
            licences.put_nowait(name)
        failing: list[str] = []

        async def audit(line: str) -> None:
            await asyncio.sleep(0)
            if line.split()[-1] in failing:
                raise OSError("the audit log is down")

        @contextmanager
        def audit_fails(moment: str) -> Iterator[None]:
            failing.append(moment)
            yield
            failing.remove(moment)

        def leaks() -> str:
            there = "".join(sorted(contents(licences)))
            return "" if there == "ABCD" else f"the queue holds {there!r} instead of 'ABCD'"

        return Subject(
            open=lambda: answer.licence(licences, audit),
            leaks=leaks,
            setup_faults=[lambda: audit_fails("lent")],
            cleanup_faults=[lambda: audit_fails("returned")],
        )

    keep_contract(subject)


def contents(queue: asyncio.Queue[str]) -> list[str]:
    names = [queue.get_nowait() for _name in range(queue.qsize())]
    for name in names:
        queue.put_nowait(name)
    return names


async def simulate(
    answer: Any, wanted: BaseException | None, waits: tuple[str, ...], fails: str
) -> None:
    """Use a licence in one of many ways, and look at the queue, the log and what came out."""
    licences: asyncio.Queue[str] = asyncio.Queue()
    licences.put_nowait("A")
    lines: list[str] = []
    lent: list[str] = []

    async def step(name: str) -> None:
        if name == fails and wanted is not None:
            raise wanted
        if name in waits:
            await asyncio.Event().wait()

    async def audit(line: str) -> None:
        lines.append(line)
        await step(line.split()[-1])

    async def simulation() -> None:
        async with answer.licence(licences, audit) as name:
            lent.append(name)
            free = licences.qsize()
            expect(free == 0, _("the queue is empty in the block"), _("it holds the licence, too"))
            await step("block")
            if isinstance(wanted, ValueError):
                raise wanted

    running = asyncio.create_task(simulation())
    for _stop in waits:
        await settle()
        running.cancel()
    came_out = await ended(running)
    if came_out not in (None, wanted) and isinstance(came_out, Exception):
        raise came_out
    if "lent" not in (*waits, fails):
        got = repr(lent[0]) if lent else _("nothing")
        expect(lent == ["A"], _("the value of the block is 'A'"), _("it is {it}").format(it=got))
    names = contents(licences)
    expect(
        names == ["A"],
        _("licence A is in the queue again, once"),
        _("it is there {n} times, so two simulations could share it").format(n=len(names))
        if names
        else _("the queue is empty: licence A has vanished"),
    )
    expect_error(wanted, came_out)
    if "lent" not in (*waits, fails):
        wanted_lines = ["A lent", "A returned"]
        expected = _("the log gets {lines}").format(lines=wanted_lines)
        expect(lines == wanted_lines, expected, _("it gets {lines}").format(lines=lines))


# --- 2 ---


@task(
    "03.2",
    _("Run a coroutine beside a block"),
    "background",
    lesson="python 03_async_manager.py 6 7",
    hint=_(
        "`await task` passes your own cancellation on to the task, and raises CancelledError both "
        "for yours and for the task's. `asyncio.wait([task])` does neither."
    ),
    strong_hint=_(
        "In `finally`: `task.cancel()`, then `while not task.done():` await "
        "`asyncio.wait([task])` inside a `try` that keeps a CancelledError for later. Raise it "
        "after the loop. Ask for the task's exception only if `task.cancelled()` is false."
    ),
)
def judge_background(answer: Any) -> None:
    keep_asyncio_quiet()
    stop, error, failed = asyncio.CancelledError(), ValueError("of the block"), OSError("no server")
    ways: list[tuple[str, dict[str, Any]]] = [
        (_("the block ends well"), {}),
        (_("the block raises ValueError"), {"raises": error, "wanted": error}),
        (_("the coroutine returns during the block"), {"early": True}),
        (_("the coroutine fails during the block"), {"early": failed, "wanted": failed}),
        (
            _("the coroutine fails during the block, and then the block raises ValueError"),
            {"early": failed, "raises": error, "wanted": error},
        ),
        (_("the block is cancelled"), {"cancels": 1, "wanted": stop}),
        (
            _("the block is cancelled, and again during the cleanup of the coroutine"),
            {"cancels": 1, "cancels_in_cleanup": 1, "wanted": stop},
        ),
        (
            _("the block ends well, but is cancelled during the cleanup of the coroutine"),
            {"cancels_in_cleanup": 1, "wanted": stop},
        ),
        (
            _("the block ends well, but is cancelled twice during the cleanup of the coroutine"),
            {"cancels_in_cleanup": 2, "wanted": stop},
        ),
    ]
    for called, options in ways:
        called = f"async with background(coroutine): {called}"
        with attempt(called, comes_out(options.get("wanted"))):
            asyncio.run(run_beside(answer, **options))

    from contract import Subject

    def subject() -> Subject:
        running: list[str] = []

        async def beat() -> None:
            running.append("the coroutine still runs")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                running.pop()

        @asynccontextmanager
        async def beside() -> AsyncIterator[object]:
            async with answer.background(beat()) as beating:
                await asyncio.sleep(0)
                yield beating

        return Subject(
            open=beside,
            leaks=lambda: running,
            setup_faults="starting a task cannot fail",
            cleanup_faults="the task ends by its cancellation",
        )

    keep_contract(subject)


async def run_beside(
    answer: Any,
    raises: Exception | None = None,
    early: Any = None,
    cancels: int = 0,
    cancels_in_cleanup: int = 0,
    wanted: BaseException | None = None,
) -> None:
    """Run a coroutine beside a block that ends in one of many ways."""
    log: list[str] = []
    end_block, end_cleanup = asyncio.Event(), asyncio.Event()
    values: list[object] = []

    async def beat() -> None:
        log.append("started")
        if isinstance(early, Exception):
            raise early
        if early:
            return
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await end_cleanup.wait()
                log.append("ended")
            except asyncio.CancelledError:
                log.append("interrupted")

    async def job() -> None:
        try:
            async with answer.background(beat()) as value:
                values.append(value)
                await end_block.wait()
                log.append("end of the block")
                if raises:
                    raise raises
        finally:
            log.append("left")

    running = asyncio.create_task(job())
    await settle()
    if not values:
        expect_error(None, await ended(running))
    beside = "started" in log
    expect(beside, _("in the block, the coroutine runs"), _("it has not been started"))
    happened = _("it is {it}").format(it=repr(values[0]))
    is_task = isinstance(values[0], asyncio.Task)
    expect(is_task, _("the value of the block is the task that runs the coroutine"), happened)
    if cancels:
        running.cancel()
    end_block.set()
    if not cancels_in_cleanup:
        end_cleanup.set()
    for _cancel in range(cancels_in_cleanup):
        await settle()
        running.cancel()
    await settle()
    end_cleanup.set()
    came_out = await ended(running)
    waits = _("the cleanup of the coroutine ends before the `async with` statement does")
    interrupted = _("it is interrupted: you pass a cancellation on to the coroutine")
    expect("interrupted" not in log, waits, interrupted)
    if not early:
        happened = _("the statement has ended, and the coroutine still runs")
        expect("ended" in log[: log.index("left")], waits, happened)
    if not cancels:
        own_end = "end of the block" in log
        expect(own_end, _("the block goes on until its own end"), _("it is interrupted"))
    expect_error(wanted, came_out)


# --- 3 ---

LOW, HIGH = 0, 9


@task(
    "03.3",
    _("A pool with priorities"),
    "PriorityPool",
    lesson="python 03_async_manager.py 2 3 4 5",
    hint=_(
        "Let the task that releases an item choose who gets it, and put it into that task's "
        "future. `GPUPool._take`, `_hand_on` and `_give_up` in chapter 03 do so in order of "
        "arrival."
    ),
    strong_hint=_(
        "Keep the waiting tasks in a list, in order of arrival, each with a priority, a future and "
        "a count. `_hand_on(item)` skips futures that are done, then takes the first waiter if its "
        "count has reached `patience`, else the first one with the highest priority, and adds 1 to "
        "the count of each waiter before the chosen one. A waiter that is cancelled removes "
        "itself, and if its future holds an item, it calls `_hand_on` with that item."
    ),
    seconds=20,
)
def judge_priority_pool(answer: Any) -> None:
    keep_asyncio_quiet()
    lend(answer)
    queue_up(answer)
    cancel_waiters(answer)
    be_patient(answer)

    from contract import Subject

    def subject() -> Subject:
        pool = answer.PriorityPool("ABCD")
        return Subject(
            open=pool.acquire,
            leaks=lambda: missing(pool, "ABCD"),
            setup_faults="waiting fails only by cancellation",
            cleanup_faults="giving a device back cannot fail",
        )

    keep_contract(subject)
    for seed in range(STORMS):
        storm(answer, seed, items=1 + 2 * (seed % 2))


def missing(pool: Any, items: str) -> str:
    """Say which items are not in `free`, or there too often."""
    there: list[str] = sorted(pool.free)
    if there == [*items]:
        return ""
    return _("`free` holds {there} instead of {items}").format(there=there, items=[*items])


def expect_all_free(pool: Any, items: str) -> None:
    expected = _("afterwards all items are in `free` again")
    expect(not missing(pool, items), expected, missing(pool, items))


class Users:
    """Tasks that acquire an item, and keep it until they are told to leave."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.served: list[str] = []  # in the order in which their blocks begin
        self.items: dict[str, object] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.leaving: dict[str, asyncio.Event] = {}

    async def come(self, *names: str, priority: int = LOW) -> None:
        for name in names:
            self.leaving[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self.use(name, priority))
            await settle()
            if self.tasks[name].done() and (error := await ended(self.tasks[name])):
                raise error

    async def use(self, name: str, priority: int) -> None:
        async with self.pool.acquire(priority) as item:
            self.served.append(name)
            self.items[name] = item
            await self.leaving[name].wait()

    async def leave(self) -> None:
        """Let the task that holds the item leave its block."""
        name = self.served[-1]
        self.leaving[name].set()
        error = await ended(self.tasks[name])
        if error:
            raise error

    async def leave_all(self, *names: str) -> None:
        """Let one after the other leave; expect that they were served in this order."""
        for position in range(1, len(names) + 1):
            self.expect_served(names[:position], [*names])
            await self.leave()

    def expect_served(self, so_far: tuple[str, ...], order: list[str]) -> None:
        happened = _("the order is {order}").format(order=" ".join(self.served))
        if len(self.served) < len(so_far):
            happened = _("the order is {order}, and then nobody gets the item that was released")
            happened = happened.format(order=" ".join(self.served))
        expected = _("the order of service is {order}").format(order=" ".join(order))
        expect(self.served == [*so_far], expected, happened)


def lend(answer: Any) -> None:
    """A free item is lent at once, and comes back, however the block ends."""
    ways: list[tuple[str, BaseException | None]] = [
        (_("the block ends well"), None),
        (_("the block raises ValueError"), ValueError("of the block")),
        (_("the block is cancelled"), asyncio.CancelledError()),
    ]
    for called, error in ways:

        async def play(error: BaseException | None = error) -> None:
            pool = answer.PriorityPool("AB")
            seen: list[tuple[Any, list[Any]]] = []

            async def use() -> None:
                async with pool.acquire() as item:
                    seen.append((item, [*pool.free]))
                    if error:
                        raise error

            came_out = await ended(asyncio.create_task(use()))
            if not seen:
                expect_error(error, came_out)
            item, free = seen[0]
            is_item = item in ("A", "B")
            happened = _("it is {it}").format(it=repr(item))
            expect(is_item, _("the value of the block is an item of the pool, A or B"), happened)
            happened = _("`free` is {free} in the block").format(free=free)
            expected = _("the item is not in `free` during the block, and the other one is")
            expect(sorted([*free, item]) == ["A", "B"], expected, happened)
            expect_all_free(pool, "AB")
            expect_error(error, came_out)

        with attempt(f"async with pool.acquire() as item: {called}", comes_out(error)):
            asyncio.run(play())


def queue_up(answer: Any) -> None:
    """Tasks wait, and are served by priority; nobody takes an item that was released for them."""

    async def share() -> None:
        users = Users(answer.PriorityPool("A"))
        await users.come("first", "second")
        expected = _("the second task waits until the first one leaves its block")
        expect(users.served == ["first"], expected, _("both have the item at the same time"))
        await users.leave_all("first", "second")
        expect_all_free(users.pool, "A")

    with attempt(_("two tasks acquire the only item")):
        asyncio.run(share())

    async def by_priority() -> None:
        users = Users(answer.PriorityPool("A", patience=99))
        await users.come("first")
        for name, priority in (("a0", 0), ("b5", 5), ("c1", 1), ("d5", 5), ("e9", 9)):
            await users.come(name, priority=priority)
        await users.leave_all("first", "e9", "b5", "d5", "c1", "a0")

    called = _("a0, b5, c1, d5 and e9 wait, in this order, each with the priority in its name")
    with attempt(called):
        asyncio.run(by_priority())

    async def barge() -> None:
        users = Users(answer.PriorityPool("A"))
        async with users.pool.acquire():
            await users.come("waiter")
            users.leaving["waiter"].set()
        # Not one turn of the event loop comes in between.
        async with users.pool.acquire(HIGH):
            users.served.append("newcomer")
        await ended(users.tasks["waiter"])
        expected = _("the item goes to the task that waits, and the newcomer waits for it")
        happened = _("the newcomer takes the item before the waiting task can wake up")
        expect(users.served == ["waiter", "newcomer"], expected, happened)

    called = _("an item is released while a task waits; a newcomer acquires in the same moment")
    with attempt(called):
        asyncio.run(barge())


def cancel_waiters(answer: Any) -> None:
    """A waiter is cancelled: long before the item is released, just before, and just after."""
    moments = {
        "early": _("a task that waits is cancelled; then the item is released"),
        "before": _("a task is cancelled and, before it runs again, the item is released"),
        "after": _("the item is released to a task and, before it runs again, it is cancelled"),
    }
    for moment, called in moments.items():
        for waiting in (("cancelled", "next"), ("cancelled",)):

            async def play(moment: str = moment, waiting: tuple[str, ...] = waiting) -> None:
                users = Users(answer.PriorityPool("A"))
                async with users.pool.acquire():
                    await users.come(*waiting)
                    if moment != "after":
                        users.tasks["cancelled"].cancel()
                    if moment == "early":
                        await settle()
                if moment == "after":
                    users.tasks["cancelled"].cancel()
                came_out = await ended(users.tasks["cancelled"])
                expect_error(asyncio.CancelledError(), came_out)
                if "next" in waiting:
                    expected = _("the next task in line gets the item")
                    expect(users.served == ["next"], expected, _("it gets nothing, and waits on"))
                    await users.leave()
                expected = _("the item is in `free` again")
                lost = _("it is lost: neither in `free` nor lent")
                expect(len(users.pool.free) > 0, expected, lost)
                expect_all_free(users.pool, "A")

            with attempt(called if "next" in waiting else called + _("; no other task waits")):
                asyncio.run(play())


def be_patient(answer: Any) -> None:
    """Nobody is overtaken more often than `patience` times, or moved up before that."""

    async def starve(*waiting: str, earlier: int = 0) -> None:
        users = Users(answer.PriorityPool("A", patience=3))
        await users.come("first")
        early = [f"early{n}" for n in range(1, earlier + 1)]
        late = [f"late{n}" for n in range(1, 8)]
        await users.come(*early, priority=HIGH)
        await users.come(*waiting)
        order = ["first", *early, *late[:3], *waiting, *late[3:]]
        for n in range(1, len(order) + 1):
            if n <= len(late):  # before each release, one more task arrives
                await users.come(late[n - 1], priority=HIGH)
            users.expect_served(tuple(order[:n]), order)
            await users.leave()

    called = _("patience=3: low waits with priority 0; before each release a late one comes with 9")
    with attempt(called):
        asyncio.run(starve("low"))
    called = _("patience=3: early1 to early5 wait with priority 9, then low with 0; late ones come")
    with attempt(called):
        asyncio.run(starve("low", earlier=5))
    called = _("patience=3: low1 and low2 wait with priority 0; late ones come with 9")
    with attempt(called):
        asyncio.run(starve("low1", "low2"))


# --- The storm ---

STORMS = 8
BLOCKS = 500  # a storm
PATIENCE = 5


class ShuffledLoop(asyncio.SelectorEventLoop):
    """An event loop that runs what is ready in random order."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance

    def _run_once(self) -> None:
        loop: Any = self
        ready = [*loop._ready]
        self.chance.shuffle(ready)
        loop._ready.clear()
        loop._ready.extend(ready)
        super()._run_once()  # type: ignore[misc]


@dataclass(eq=False)
class Visit:
    """One call of `acquire`."""

    number: int  # in the order of arrival
    overtaken: int = 0
    cancelled: bool = False


class Storm:
    """Tasks acquire items again and again, and are cancelled at random."""

    def __init__(self, pool: Any, items: str, chance: random.Random) -> None:
        self.pool, self.items, self.chance = pool, items, chance
        self.blocks = 0  # so many have begun
        self.arrivals = 0
        self.lent: set[object] = set()
        self.waiting: list[Visit | None] = [None] * 12  # the visit of each task, while it waits
        self.problems: list[tuple[str, str]] = []

    async def visit_often(self, me: int) -> None:
        while self.blocks < BLOCKS and not self.problems:
            self.arrivals += 1
            visit = self.waiting[me] = Visit(self.arrivals)
            try:
                async with self.pool.acquire(self.chance.choice((0, 0, 1, 9))) as item:
                    self.waiting[me] = None
                    self.begin(visit, item)
                    try:
                        if self.chance.random() < 0.7:
                            await asyncio.sleep(0)
                        if self.chance.random() < 0.1:
                            raise LookupError
                    finally:
                        self.lent.discard(item)
            except (asyncio.CancelledError, LookupError):
                pass
            finally:
                self.waiting[me] = None

    def begin(self, visit: Visit, item: object) -> None:
        self.blocks += 1
        if item in self.lent:
            expected = _("one task at a time has an item")
            self.problems.append((expected, _("two tasks have the same item")))
        self.lent.add(item)
        for other in self.waiting:
            if other and other.number < visit.number and not other.cancelled:
                other.overtaken += 1
                # With several items, tasks may wake up in another order than they were served.
                if other.overtaken > PATIENCE and len(self.items) == 1:
                    expected = _("with patience={n}, nobody is overtaken more than {n} times")
                    happened = _("a task is overtaken {n} times").format(n=other.overtaken)
                    self.problems.append((expected.format(n=PATIENCE), happened))

    async def play(self) -> None:
        tasks = [asyncio.create_task(self.visit_often(me)) for me in range(len(self.waiting))]
        blocks, since = 0, 0
        while not self.problems and not all(each.done() for each in tasks):
            await asyncio.sleep(0)
            since = since + 1 if blocks == self.blocks else 0
            blocks = self.blocks
            if since > 20 * TURNS:
                lost = len(self.items) - len(self.lent)
                happened = _("nobody gets an item any more: {n} of {all} are lost")
                happened = happened.format(n=lost, all=len(self.items))
                self.problems.append((_("the tasks that wait get the items"), happened))
            if blocks < BLOCKS and self.chance.random() < 0.7:
                self.cancel(tasks, self.chance.randrange(len(tasks)))
        for each in tasks:
            each.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end
        for problem in self.problems:
            expect(False, *problem)
        expect_all_free(self.pool, self.items)

    def cancel(self, tasks: list[asyncio.Task[None]], me: int) -> None:
        visit = self.waiting[me]
        if visit:
            visit.cancelled = True
        tasks[me].cancel()


def storm(answer: Any, seed: int, items: int) -> None:
    """Play one storm: on a loop in random order, and with eager tasks where Python has them."""
    chance = random.Random(seed)
    names = "ABC"[:items]
    eager: Callable[..., Any] | None = getattr(asyncio, "eager_task_factory", None)

    async def play() -> None:
        asyncio.get_running_loop().set_task_factory(eager if seed % 4 > 1 else None)
        await Storm(answer.PriorityPool(names, PATIENCE), names, chance).play()

    called = _("a storm: {n} blocks of 12 tasks, cancelled at random; items: {items}; seed {seed}")
    with attempt(called.format(n=BLOCKS, items=items, seed=seed)):
        with asyncio.Runner(loop_factory=lambda: ShuffledLoop(chance)) as runner:
            runner.run(play())
