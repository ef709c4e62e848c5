# Wrong answers to the exercises of chapter 07. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 the stack's own block ends with `__aenter__`
# called: the block ends well
# says: open 1, open 2, open 3, close 3, close 2, close 1, block
class Connections(Connections):
    async def __aenter__(self):
        async with AsyncExitStack() as stack:
            return [await stack.enter_async_context(make()) for make in self.factories]

# %% 1 an `except Exception` misses the cancellation
# called: the task is cancelled while connection 3 is being opened
# says: still open: connection 1, 2
class Connections(Connections):
    async def __aenter__(self):
        self.stack = AsyncExitStack()
        try:
            return [await self.stack.enter_async_context(make()) for make in self.factories]
        except Exception as error:
            await self.stack.__aexit__(type(error), error, error.__traceback__)
            raise

# %% 1 after a failed set-up, `aclose` tells the exits that all went well
# called: connection 3 cannot be opened
# says: the exit of connection 2 gets None
class Connections(Connections):
    async def __aenter__(self):
        self.stack = AsyncExitStack()
        try:
            return [await self.stack.enter_async_context(make()) for make in self.factories]
        except BaseException:
            await self.stack.aclose()
            raise

# %% 1 `pop_all` comes before the last connection
# called: connection 3 cannot be opened
# says: still open: connection 1, 2
class Connections(Connections):
    async def __aenter__(self):
        async with AsyncExitStack() as stack:
            *others, last = self.factories
            values = [await stack.enter_async_context(make()) for make in others]
            self.stack = stack.pop_all()
            return [*values, await self.stack.enter_async_context(last())]

# %% 1 `aclose` tells the exits that the block ended well
# called: the block is cancelled
# says: the exit of connection 3 gets None
class Connections(Connections):
    async def __aexit__(self, *exc_info):
        await self.stack.aclose()

# %% 1 the answer of the exits is not returned
# called: the exit of connection 1 suppresses it
# says: of the block
class Connections(Connections):
    async def __aexit__(self, *exc_info):
        await self.stack.__aexit__(*exc_info)

# %% 1 an object for one block only
# called: the same object is used for two blocks
# says: these connections are closed
class Connections(Connections):
    is_closed = False

    async def __aenter__(self):
        if self.is_closed:
            raise RuntimeError("these connections are closed")
        return await super().__aenter__()

    async def __aexit__(self, *exc_info):
        self.is_closed = True
        return await super().__aexit__(*exc_info)

# %% 2 an exit stack loses errors
# called: two calls of three raise OSError
# says: ExceptionGroup with [OSError('second')] comes out
@contextmanager
def cleanups():
    try:
        with ExitStack() as stack:
            yield lambda function, *args, **kwargs: stack.callback(function, *args, **kwargs) and None
    except OSError as error:
        raise BaseExceptionGroup("cleanups", [error])

from contextlib import ExitStack

# %% 2 an exit stack raises no group
# called: the first call of three raises OSError
# says: OSError('first') comes out alone
@contextmanager
def cleanups():
    with ExitStack() as stack:
        yield stack.callback

from contextlib import ExitStack

# %% 2 the first failure ends the cleanup
# called: the first call of three raises OSError
# says: the order of the calls is [3]
@contextmanager
def cleanups():
    waiting = []
    try:
        yield lambda function, *args, **kwargs: waiting.append(partial(function, *args, **kwargs))
    finally:
        errors = []
        try:
            while waiting:
                waiting.pop()()
        except Exception as error:
            errors.append(error)
        if errors:
            raise BaseExceptionGroup("cleanups", errors)

# %% 2 a group even for the block's exception alone
# called: three functions; the block raises ValueError
# says: ExceptionGroup('cleanups', [ValueError('block')]) comes out
@contextmanager
def cleanups():
    waiting, errors = [], []
    try:
        yield lambda function, *args, **kwargs: waiting.append(partial(function, *args, **kwargs))
    except BaseException as error:
        errors.append(error)
    call_all(waiting, errors)
    if errors:
        raise BaseExceptionGroup("cleanups", errors)

# %% 2 the block's exception is only the context of the group
# called: the block raises ValueError, and two calls OSError
# says: ExceptionGroup with [OSError('first'), OSError('second')]
@contextmanager
def cleanups():
    waiting, errors = [], []
    try:
        yield lambda function, *args, **kwargs: waiting.append(partial(function, *args, **kwargs))
    finally:
        call_all(waiting, errors)
        if errors:
            raise BaseExceptionGroup("cleanups", errors)

# %% 2 Ctrl-C in a function ends the cleanup
# called: Ctrl-C in the second
# says: the order of the calls is [3, 2]
def call_all(waiting, errors):
    while waiting:
        try:
            waiting.pop()()
        except Exception as error:
            errors.append(error)

# %% 2 an ExceptionGroup cannot hold Ctrl-C
# called: Ctrl-C in the second
# says: TypeError: Cannot nest BaseExceptions in an ExceptionGroup
BaseExceptionGroup = ExceptionGroup

# %% 3 the first exit that raises is the last one that runs
# called: the block ends well; the exits of the managers on the stack do this: 1 return, 2 raise
# says: exit 2 gets None; OSError('exit 2') comes out
class MyExitStack(MyExitStack):
    def __exit__(self, *exc_info):
        suppressed = False
        while self._exit_callbacks:
            _awaits, leave = self._exit_callbacks.pop()
            if leave(*exc_info):
                suppressed, exc_info = True, (None, None, None)
        return suppressed

# %% 3 the contexts are left to Python
# called: the block raises ValueError; the exits of the managers on the stack do this: 1 raise, 2 suppress
# says: OSError('exit 1') with the context ValueError('block') comes out
class Unwinding(Unwinding):
    def replace(self, raised):
        self.exc_info = (type(raised), raised, raised.__traceback__)
        self.raised_by_exit = True

# %% 3 each exit runs while the exception before it is raised again
# called: the block raises ValueError; the exits of the managers on the stack do this: 1 return, 2 raise, 3 suppress
# says: exit 1 gets OSError('exit 2') with the context ValueError('block')
class MyExitStack(MyExitStack):
    def __exit__(self, *exc_info):
        unwinding = Unwinding(exc_info)
        while self._exit_callbacks:
            _awaits, leave = self._exit_callbacks.pop()
            try:
                try:
                    if unwinding.exc_info[1]:
                        raise unwinding.exc_info[1]
                except BaseException:
                    if leave(*unwinding.exc_info):
                        unwinding.suppress()
                else:
                    leave(None, None, None)
            except BaseException as raised:
                unwinding.replace(raised)
        return unwinding.end()

# %% 3 the traceback of the exit is cut off
# called: TestExitStack.test_exit_exception_traceback
# says: Lists differ
class Unwinding(Unwinding):
    def end(self):
        if self.raised_by_exit:
            raised = self.exc_info[1]
            context = raised.__context__
            try:
                raise raised.with_traceback(None)
            finally:
                raised.__context__ = context
        return super().end()

# %% 3 nested calls run out of stack
# called: TestExitStack.test_excessive_nesting
# says: RecursionError
class MyExitStack(MyExitStack):
    def __exit__(self, *exc_info):
        if not self._exit_callbacks:
            return False
        _awaits, leave = self._exit_callbacks.popleft()
        unwinding = Unwinding(exc_info)
        try:
            if self.__exit__(*exc_info):
                unwinding.suppress()
        except BaseException as raised:
            unwinding.replace(raised)
        try:
            if leave(*unwinding.exc_info):
                unwinding.suppress()
        except BaseException as raised:
            unwinding.replace(raised)
        return unwinding.end()

# %% 3 methods are looked up on the object
# called: TestExitStack.test_instance_bypass
# says: 'object' object is not callable
def method(manager, name):
    return getattr(manager, name, None)

# %% 3 `pop_all` names a class
# called: TestAsyncExitStack.test_pop_all
# says: 'MyAsyncExitStack' object has no attribute 'close'
class MyAsyncExitStack(MyAsyncExitStack):
    def pop_all(self):
        new = MyAsyncExitStack()
        self._exit_callbacks, new._exit_callbacks = new._exit_callbacks, self._exit_callbacks
        return new

# %% 3 the exits of async managers are not awaited
# called: TestAsyncExitStack.test_enter_async_context,
# says: [1, 2, 4] != [1, 2, 3, 4]
class MyAsyncExitStack(MyAsyncExitStack):
    async def enter_async_context(self, manager):
        value = await super().enter_async_context(manager)
        self._exit_callbacks.append((False, self._exit_callbacks.pop()[1]))
        return value
