# Wrong answers to the exercises of chapter 08. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 the block is outside, but one server that is down ends the loop
# called: the first server is optional, and is down
# says: it is {}
@asynccontextmanager
async def connected(servers, optional=()):
    clients = {}
    async with AsyncExitStack() as stack:
        try:
            for name, open_server in servers.items():
                clients[name] = await stack.enter_async_context(open_server())
        except Exception as error:
            if name not in optional:
                error.add_note(f"{name} did not start")
                raise
            logger.warning("%s did not start: %r", name, error)
        yield clients

# %% 1 the cancellation counts as a server that is down
# called: the task is cancelled while the optional server starts
# says: it disappears, as if the server were only down
@asynccontextmanager
async def connected(servers, optional=()):
    clients = {}
    async with AsyncExitStack() as stack:
        for name, open_server in servers.items():
            try:
                clients[name] = await stack.enter_async_context(open_server())
            except BaseException as error:
                if name not in optional:
                    error.add_note(f"{name} did not start")
                    raise
                logger.warning("%s did not start: %r", name, error)
        yield clients

# %% 1 an error of another type, which has lost its cause
# called: the second server is down
# says: ConnectionError('notes did not start') comes out
@asynccontextmanager
async def connected(servers, optional=()):
    clients = {}
    async with AsyncExitStack() as stack:
        for name, open_server in servers.items():
            try:
                clients[name] = await stack.enter_async_context(open_server())
            except Exception as error:
                if name not in optional:
                    raise ConnectionError(f"{name} did not start") from error
                logger.warning("%s did not start: %r", name, error)
        yield clients

# %% 1 nobody learns which server it was
# called: the second server is down
# says: it has no note
@asynccontextmanager
async def connected(servers, optional=()):
    clients = {}
    async with AsyncExitStack() as stack:
        for name, open_server in servers.items():
            try:
                clients[name] = await stack.enter_async_context(open_server())
            except Exception as error:
                if name not in optional:
                    raise
                logger.warning("%s did not start: %r", name, error)
        yield clients

# %% 1 the missing server is silently missing
# called: the last server is optional, and is down
# says: no warning is logged
@asynccontextmanager
async def connected(servers, optional=()):
    clients = {}
    async with AsyncExitStack() as stack:
        for name, open_server in servers.items():
            try:
                clients[name] = await stack.enter_async_context(open_server())
            except Exception as error:
                if name not in optional:
                    error.add_note(f"{name} did not start")
                    raise
        yield clients

# %% 2 SIGTERM at once, and no time to save
# called: a good server; the block ends well
# says: it is ended by SIGTERM first
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        signal_group(server, signal.SIGTERM)
        try:
            server.wait(grace)
        except subprocess.TimeoutExpired:
            signal_group(server, signal.SIGKILL)
        server.stdin.close()
        server.stdout.close()
        server.wait()

# %% 2 only the server is killed, not its children
# called: leaves a child behind
# says: its child still runs
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        try:
            with suppress(OSError):
                server.stdin.close()
            if not exits(server, grace):
                signal_group(server, signal.SIGTERM)
                exits(server, grace)
        finally:
            if server.poll() is None:
                signal_group(server, signal.SIGKILL)
            server.stdout.close()
            server.wait()

# %% 2 no SIGKILL for those who ignore SIGTERM
# called: ignores SIGTERM, too
# says: it still runs
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        with suppress(OSError):
            server.stdin.close()
        if not exits(server, grace):
            signal_group(server, signal.SIGTERM)
            exits(server, grace)
        server.stdout.close()
        server.poll()

# %% 2 it waits for a server that does not listen
# called: a server that ignores the end of its input
# says: it waits for ever
@contextmanager
def server_process(command, grace=2.0):
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            yield server
        finally:
            server.stdin.close()
            server.wait()
            signal_group(server, signal.SIGKILL)

# %% 2 it is killed, but nobody waits for it
# called: a good server; the block ends well
# says: it is a zombie
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        with suppress(OSError):
            server.stdin.close()
        exits(server, grace)
        signal_group(server, signal.SIGKILL)
        server.stdout.close()

# %% 2 a server that is dead already is an error
# called: a server that has died in the block
# says: BrokenPipeError
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        try:
            server.stdin.close()
            if not exits(server, grace):
                signal_group(server, signal.SIGTERM)
                exits(server, grace)
        finally:
            signal_group(server, signal.SIGKILL)
            server.stdout.close()
            server.wait()

# %% 2 Ctrl-C skips the last step
# called: Ctrl-C while you wait for its exit
# says: it still runs
@contextmanager
def server_process(command, grace=2.0):
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        with suppress(OSError):
            server.stdin.close()
        if not exits(server, grace):
            signal_group(server, signal.SIGTERM)
            exits(server, grace)
        signal_group(server, signal.SIGKILL)
        server.stdout.close()
        server.wait()

# %% 3 the call is repeated by the new server
# called: dies in the middle of a call
# says: it waits
solved = supervised


@asynccontextmanager
async def supervised(*args, **options):
    async with solved(*args, **options) as call:

        async def call_again(*given):
            while True:
                try:
                    return await call(*given)
                except GaveUpError:
                    raise
                except RuntimeError:
                    pass

        yield call_again

# %% 3 the next hub is entered inside the dead one
# called: the server is lost, and the delay goes by
# says: it is still open
@asynccontextmanager
async def supervised(connect, name, config, *, max_restarts=5, first_delay=0.5, max_delay=30.0,
                     recovered_after=60.0, sleep=asyncio.sleep, clock=time.monotonic):
    hubs, closed, lost = [], [], asyncio.Event()

    def on_change(status):
        if status.state == "lost":
            lost.set()

    async def keep(stack):
        for restart in range(max_restarts):
            await lost.wait()
            lost.clear()
            await sleep(min(first_delay * 2**restart, max_delay))
            again = connect({name: config}, on_change=on_change)
            hubs.append(await stack.enter_async_context(again))

    async def call(tool, arguments=None):
        if closed:
            raise GaveUpError
        return await hubs[-1].call(name, tool, arguments)

    async with AsyncExitStack() as stack:
        hubs.append(await stack.enter_async_context(connect({name: config}, on_change=on_change)))
        keeper = asyncio.create_task(keep(stack))
        try:
            yield call
        finally:
            closed.append(True)
            keeper.cancel()
            await asyncio.wait([keeper])

# %% 3 a call between the report and the restart meets the dead hub
# called: a call comes before any other task runs
# says: hub 1 is lost: it takes no calls
@asynccontextmanager
async def supervised(connect, name, config, *, max_restarts=5, first_delay=0.5, max_delay=30.0,
                     recovered_after=60.0, sleep=asyncio.sleep, clock=time.monotonic):
    ready, hubs, closed = asyncio.Event(), [], []

    async def keep():
        restarts = 0
        while True:
            lost = asyncio.Event()

            def on_change(status):
                if status.state == "lost":
                    lost.set()

            async with connect({name: config}, on_change=on_change) as hub:
                hubs.append(hub)
                ready.set()
                await lost.wait()
                ready.clear()
            await sleep(min(first_delay * 2**restarts, max_delay))
            restarts += 1

    async def call(tool, arguments=None):
        if closed:
            raise GaveUpError
        await ready.wait()
        return await hubs[-1].call(name, tool, arguments)

    keeper = asyncio.create_task(keep())
    keeper.add_done_callback(lambda done: ready.set())
    try:
        await ready.wait()
        if keeper.done():
            keeper.result()
        yield call
    finally:
        closed.append(True)
        keeper.cancel()
        await asyncio.wait([keeper])

# %% 3 the end of the block is taken for a death
# called: the server starts; one call
# says: hub 2 is open
@asynccontextmanager
async def supervised(connect, name, config, *, max_restarts=5, first_delay=0.5, max_delay=30.0,
                     recovered_after=60.0, sleep=asyncio.sleep, clock=time.monotonic):
    tasks = []

    async def again():
        async with connect({name: config}, on_change=on_change):
            await asyncio.Event().wait()

    def on_change(status):
        if status.state in ("lost", "stopped") and not tasks:
            tasks.append(asyncio.create_task(again()))

    async with connect({name: config}, on_change=on_change) as hub:
        yield lambda tool, arguments=None: hub.call(name, tool, arguments)

# %% 3 the first start is retried, too
# called: the first start fails
# says: it waits for ever
@asynccontextmanager
async def supervised(connect, name, config, *, max_restarts=5, first_delay=0.5, max_delay=30.0,
                     recovered_after=60.0, sleep=asyncio.sleep, clock=time.monotonic):
    hub = asyncio.get_running_loop().create_future()
    closed = []

    async def keep():
        for restart in range(max_restarts):
            try:
                async with connect({name: config}) as ready:
                    hub.set_result(ready)
                    await asyncio.Event().wait()
            except Exception:
                await sleep(min(first_delay * 2**restart, max_delay))

    async def call(tool, arguments=None):
        if closed:
            raise GaveUpError
        return await (await hub).call(name, tool, arguments)

    keeper = asyncio.create_task(keep())
    try:
        await asyncio.shield(hub)
        yield call
    finally:
        closed.append(True)
        keeper.cancel()
        await asyncio.wait([keeper])

# %% 3 the delay has no upper limit
# called: the server is lost five times
# says: with [1.0, 2.0, 4.0, 8.0, 16.0]
solved = supervised


def supervised(*args, max_delay=30.0, **options):
    return solved(*args, max_delay=1e9, **options)

# %% 3 the restarts never stop
# called: the server is lost four times
# says: it has been started 5 times
solved = supervised


def supervised(*args, max_restarts=5, **options):
    return solved(*args, max_restarts=10**6, **options)

# %% 3 a recovery that is never noticed
# called: two restarts, then it is ready for 60 s
# says: with [1.0, 2.0, 4.0]
solved = supervised


def supervised(*args, recovered_after=60.0, **options):
    return solved(*args, recovered_after=float("inf"), **options)

# %% 3 a caller that is cancelled takes the others with it
# called: a call that waits is cancelled
# says: CancelledError
class asyncio(type("asyncio", (), vars(asyncio))):
    @staticmethod
    def shield(future):
        return future
