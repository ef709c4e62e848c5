# Wrong answers to the exercises of chapter 03. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 an `except Exception` misses the cancellation
# called: Stop is pressed while `audit` sends the first line
# says: licence A has vanished
@asynccontextmanager
async def licence(licences, audit):
    name = await licences.get()
    try:
        await audit(f"{name} lent")
    except Exception:
        licences.put_nowait(name)
        raise
    try:
        yield name
    finally:
        licences.put_nowait(name)
        await audit(f"{name} returned")

# %% 1 the cleanup awaits before it puts the licence back
# called: Stop is pressed while `audit` sends the second line
# says: licence A has vanished
@asynccontextmanager
async def licence(licences, audit):
    name = await licences.get()
    try:
        await audit(f"{name} lent")
        yield name
    finally:
        await asyncio.shield(audit(f"{name} returned"))
        licences.put_nowait(name)

# %% 1 the licence is put back twice
# called: Stop is pressed while `audit` sends the first line
# says: it is there 2 times
@asynccontextmanager
async def licence(licences, audit):
    name = await licences.get()
    try:
        try:
            await audit(f"{name} lent")
        except BaseException:
            licences.put_nowait(name)
            raise
        yield name
    finally:
        licences.put_nowait(name)
        await audit(f"{name} returned")

# %% 1 the failure of the log is suppressed
# called: `audit` raises OSError instead of sending the first line
# says: no exception comes out
@asynccontextmanager
async def licence(licences, audit):
    name = await licences.get()
    try:
        with suppress(OSError):
            await audit(f"{name} lent")
        yield name
    finally:
        licences.put_nowait(name)
        with suppress(OSError):
            await audit(f"{name} returned")

from contextlib import suppress

# %% 2 nobody waits for the task that was cancelled
# called: background(coroutine): the block ends well
# says: the coroutine still runs
@asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()

# %% 2 a task group wraps the block's exception
# called: the block raises ValueError
# says: unhandled errors in a TaskGroup
@asynccontextmanager
async def background(coroutine):
    async with asyncio.TaskGroup() as group:
        task = group.create_task(coroutine)
        yield task
        task.cancel()

# %% 2 the failure is read only if somebody waits for it
# called: the coroutine fails during the block
# says: no exception comes out
@asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

# %% 2 `await task` passes the second cancellation on
# called: cancelled, and again during the cleanup of the coroutine
# says: you pass a cancellation on to the coroutine
@asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    failure = None
    try:
        yield task
    finally:
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except Exception as error:
            failure = error
    if failure:
        raise failure

# %% 2 a shield ends the wait, but not the cleanup
# called: cancelled, and again during the cleanup of the coroutine
# says: the statement has ended, and the coroutine still runs
@asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    failure = None
    try:
        yield task
    finally:
        task.cancel()
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            failure = error
    if failure:
        raise failure

# %% 2 the caller's cancellation is swallowed
# called: ends well, but is cancelled during the cleanup
# says: no exception comes out
@asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                pass
    if not task.cancelled():
        task.result()

# %% 3 equal priorities compare futures
# called: a0, b5, c1, d5 and e9 wait
# says: '<' not supported
import heapq


class PriorityPool:
    def __init__(self, items, patience=3):
        self.free = list(items)
        self.heap = []

    @asynccontextmanager
    async def acquire(self, priority=0):
        if self.free:
            item = self.free.pop()
        else:
            future = asyncio.get_running_loop().create_future()
            heapq.heappush(self.heap, (-priority, future))
            item = await future
        try:
            yield item
        finally:
            if self.heap:
                heapq.heappop(self.heap)[1].set_result(item)
            else:
                self.free.append(item)

# %% 3 a waiter is woken, and a newcomer is faster
# called: a newcomer acquires in the same moment
# says: the newcomer takes the item
class PriorityPool(PriorityPool):
    @asynccontextmanager
    async def acquire(self, priority=0):
        while not self.free:
            await self._wait(priority)
        item = self.free.pop()
        try:
            yield item
        finally:
            self.free.append(item)
            if self._line:
                chosen = max(self._line, key=lambda waiter: waiter.priority)
                self._line.remove(chosen)
                chosen.item.set_result(item)

# %% 3 a waiter that was cancelled in this tick gets the item
# called: cancelled and, before it runs again, the item is released
# says: InvalidStateError
class PriorityPool(PriorityPool):
    def _hand_on(self, item):
        if not self._line:
            self.free.append(item)
            return
        chosen = max(self._line, key=lambda waiter: waiter.priority)
        self._line.remove(chosen)
        chosen.item.set_result(item)

# %% 3 a waiter that was served and cancelled keeps the item
# called: the item is released to a task and, before it runs again, it is cancelled
# says: it gets nothing
class PriorityPool(PriorityPool):
    async def _wait(self, priority):
        waiter = Waiter(priority)
        self._line.append(waiter)
        try:
            return await waiter.item
        finally:
            if waiter in self._line:
                self._line.remove(waiter)

# %% 3 the item of a cancelled waiter goes past the line
# called: the item is released to a task and, before it runs again, it is cancelled
# says: it gets nothing, and waits on
class PriorityPool(PriorityPool):
    async def _wait(self, priority):
        waiter = Waiter(priority)
        self._line.append(waiter)
        try:
            return await waiter.item
        except asyncio.CancelledError:
            if waiter in self._line:
                self._line.remove(waiter)
            elif not waiter.item.cancelled():
                self.free.append(waiter.item.result())
            raise

# %% 3 patience is forgotten
# called: patience=3: low waits with priority 0
# says: first late1 late2 late3 late4
class PriorityPool(PriorityPool):
    def __init__(self, items, patience=3):
        super().__init__(items, 10**9)

# %% 3 each release that passes a task by counts as overtaking
# called: early1 to early5 wait with priority 9, then low with 0
# says: first early1 early2 early3 low
class PriorityPool(PriorityPool):
    def _hand_on(self, item):
        line = [waiter for waiter in self._line if not waiter.item.done()]
        if not line:
            self.free.append(item)
            return
        tired = [waiter for waiter in line if waiter.overtaken >= self.patience]
        chosen = (tired or sorted(line, key=lambda waiter: -waiter.priority))[0]
        for waiter in line:
            waiter.overtaken += waiter.priority < chosen.priority
        self._line.remove(chosen)
        chosen.item.set_result(item)

# %% 3 one count for the whole pool
# called: low1 and low2 wait with priority 0
# says: first late1 late2 late3 low1 late4
class PriorityPool(PriorityPool):
    passed = 0

    def _hand_on(self, item):
        line = [waiter for waiter in self._line if not waiter.item.done()]
        if not line:
            self.free.append(item)
            return
        chosen = max(line, key=lambda waiter: waiter.priority)
        if self.passed >= self.patience:
            chosen = line[0]
        self.passed = 0 if chosen is line[0] else self.passed + 1
        self._line.remove(chosen)
        chosen.item.set_result(item)

# %% 3 an `await` between being served and `try`
# called: a storm
# says: nobody gets an item any more: 1 of 1 are lost
class PriorityPool(PriorityPool):
    async def _wait(self, priority):
        item = await super()._wait(priority)
        await asyncio.sleep(0)
        return item
