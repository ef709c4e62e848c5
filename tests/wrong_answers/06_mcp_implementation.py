# Wrong answers to the exercises of chapter 06. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 a scope of anyio must not end before what is entered inside it
# called: the block ends at once
# says: Attempted to exit a cancel scope that isn't the current task
@asynccontextmanager
async def connected(open_client, startup_timeout=15.0):
    async with AsyncExitStack() as stack:
        with anyio.fail_after(startup_timeout):
            client = await stack.enter_async_context(open_client())
        yield client

# %% 1 the start runs in another task, as in `wait_for` of Python 3.11
# called: the block ends at once
# says: Attempted to exit cancel scope in a different task than it was entered in
@asynccontextmanager
async def connected(open_client, startup_timeout=15.0):
    async with AsyncExitStack() as stack:
        start = asyncio.create_task(stack.enter_async_context(open_client()))
        yield await asyncio.wait_for(start, startup_timeout)

# %% 1 the limit is off in the block, and on again in the exit
# called: the exit of the client takes a minute
# says: after 16 s, TimeoutError() comes out
@asynccontextmanager
async def connected(open_client, startup_timeout=15.0):
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(startup_timeout) as limit:
        async with open_client() as client:
            limit.reschedule(None)
            try:
                yield client
            finally:
                limit.reschedule(loop.time() + startup_timeout)

# %% 1 no limit at all
# called: the client would be ready after an hour
# says: after 3600 s, the block begins
@asynccontextmanager
async def connected(open_client, startup_timeout=15.0):
    async with open_client() as client:
        yield client

# %% 1 entered by hand, and exited only if the block ends well
# called: the block raises ValueError
# says: one is still open
@asynccontextmanager
async def connected(open_client, startup_timeout=15.0):
    manager = open_client()
    async with asyncio.timeout(startup_timeout):
        client = await manager.__aenter__()
    yield client
    await manager.__aexit__(None, None, None)

# %% 2 the task that uses it enters and exits it
# called: the block ends well
# says: the task that uses `owned` enters it
@asynccontextmanager
async def owned(manager):
    async with manager as value:
        yield value

# %% 2 a task enters it, and another one exits it
# called: the block ends well
# says: in a different task than it was entered in
@asynccontextmanager
async def owned(manager):
    value = await asyncio.create_task(manager.__aenter__())
    try:
        yield value
    finally:
        await asyncio.create_task(manager.__aexit__(None, None, None))

# %% 2 a failed start is never noticed
# called: raises OSError when it is entered
# says: it waits for ever
@asynccontextmanager
async def owned(manager):
    ready, leave = asyncio.Event(), asyncio.Event()
    values = []

    async def own():
        async with manager as value:
            values.append(value)
            ready.set()
            await leave.wait()

    owner = asyncio.create_task(own())
    await ready.wait()
    try:
        yield values[0]
    finally:
        leave.set()
        await ended(owner)

# %% 2 a task group wraps every exception
# called: raises OSError when it is entered
# says: ExceptionGroup('unhandled errors in a TaskGroup'
@asynccontextmanager
async def owned(manager):
    ready, leave = asyncio.Event(), asyncio.Event()
    values = []

    async def own():
        try:
            async with manager as value:
                values.append(value)
                ready.set()
                await leave.wait()
        finally:
            ready.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(own())
        try:
            await ready.wait()
            if not values:
                await task
            yield values[0]
        finally:
            leave.set()

# %% 2 nobody exits it if the caller is cancelled while it is entered
# called: cancelled while the client is being entered
# says: the client is still being entered
@asynccontextmanager
async def owned(manager):
    ready, leave = asyncio.Event(), asyncio.Event()
    values = []

    async def own():
        async with manager as value:
            values.append(value)
            ready.set()
            await leave.wait()

    owner = asyncio.create_task(own())
    owner.add_done_callback(lambda done: ready.set())
    await ready.wait()
    if not values:
        owner.result()
    try:
        yield values[0]
    finally:
        leave.set()
        await ended(owner)

# %% 2 `await owner` passes the cancellation on to the exit
# called: cancelled while the client is being exited
# says: it is cut off
async def ended(task):
    try:
        await task
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():
            raise

# %% 2 the wait for the exit is shielded, but not awaited again
# called: cancelled while the client is being exited
# says: the statement has ended, and the client still cleans up
async def ended(task):
    if not task.cancelled():
        await asyncio.shield(task)

# %% 2 the cancellation is swallowed
# called: cancelled while the client is being exited
# says: no exception comes out
async def ended(task):
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            pass
    if not task.cancelled():
        task.result()

# %% 3 a text that is not a message ends everything
# called: a text that is not a message
# says: ValidationError
@asynccontextmanager
async def websocket_streams(socket):
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream(0)
    write, outgoing = anyio.create_memory_object_stream(0)

    async def receive():
        async with incoming:
            with suppress(websockets.ConnectionClosed):
                async for text in socket:
                    await incoming.send(SessionMessage(jsonrpc_message_adapter.validate_json(text)))

    async def send():
        async with outgoing:
            with suppress(websockets.ConnectionClosed):
                async for item in outgoing:
                    await socket.send(
                        item.message.model_dump_json(by_alias=True, exclude_unset=True)
                    )

    async with read, write, anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(send)
        yield read, write
        tasks.cancel_scope.cancel()

# %% 3 nobody closes the stream to read when the peer has gone
# called: the peer closes the connection
# says: nobody closes the other end
@asynccontextmanager
async def websocket_streams(socket):
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream(0)
    write, outgoing = anyio.create_memory_object_stream(0)

    async def receive():
        with suppress(websockets.ConnectionClosed):
            async for text in socket:
                try:
                    item = SessionMessage(jsonrpc_message_adapter.validate_json(text))
                except ValueError as error:
                    item = error
                await incoming.send(item)

    async def send():
        with suppress(websockets.ConnectionClosed):
            async for item in outgoing:
                await socket.send(item.message.model_dump_json(by_alias=True, exclude_unset=True))

    async with read, write, incoming, outgoing, anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(send)
        yield read, write
        tasks.cancel_scope.cancel()

# %% 3 a closed connection is expected, a broken one is not
# called: the connection breaks
# says: ConnectionClosedError
class websockets:
    from websockets import ConnectionClosedOK as ConnectionClosed, connect

# %% 3 the end of the block does not end the tasks
# called: as (read, write)
# says: it waits for ever
@asynccontextmanager
async def websocket_streams(socket):
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream(0)
    write, outgoing = anyio.create_memory_object_stream(0)

    async def receive():
        async with incoming:
            with suppress(websockets.ConnectionClosed):
                async for text in socket:
                    await incoming.send(SessionMessage(jsonrpc_message_adapter.validate_json(text)))

    async def send():
        async with outgoing:
            async for item in outgoing:
                await socket.send(item.message.model_dump_json(by_alias=True, exclude_unset=True))

    async with read, write, anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(send)
        yield read, write

# %% 3 the names of Python instead of those of the wire
# called: what does the peer receive?
# says: params
@asynccontextmanager
async def websocket_streams(socket):
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream(0)
    write, outgoing = anyio.create_memory_object_stream(0)

    async def receive():
        async with incoming:
            with suppress(websockets.ConnectionClosed):
                async for text in socket:
                    await incoming.send(SessionMessage(jsonrpc_message_adapter.validate_json(text)))

    async def send():
        async with outgoing:
            async for item in outgoing:
                await socket.send(item.message.model_dump_json())

    async with read, write, anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(send)
        try:
            yield read, write
        finally:
            tasks.cancel_scope.cancel()

# %% 3 websockets refuses more than 1 MiB
# called: an answer of 4 MB
# says: Who refuses so large a message?
@asynccontextmanager
async def websocket_client(url):
    async with websockets.connect(url, subprotocols=["mcp"]) as socket:
        async with websocket_streams(socket) as streams:
            yield streams

# %% 3 the tasks are cancelled only if the block ends well
# called: one way out of the block: The body raises an ordinary error
# says: its work went on
@asynccontextmanager
async def websocket_streams(socket):
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    incoming, read = anyio.create_memory_object_stream(0)
    write, outgoing = anyio.create_memory_object_stream(0)

    async def receive():
        with suppress(websockets.ConnectionClosed, anyio.BrokenResourceError):
            async for text in socket:
                try:
                    item = SessionMessage(jsonrpc_message_adapter.validate_json(text))
                except ValueError as error:
                    item = error
                await incoming.send(item)
        incoming.close()

    async def send():
        with suppress(websockets.ConnectionClosed):
            async for item in outgoing:
                await socket.send(item.message.model_dump_json(by_alias=True, exclude_unset=True))

    with incoming, read, write, outgoing:
        tasks = [asyncio.create_task(receive()), asyncio.create_task(send())]
        yield read, write
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
