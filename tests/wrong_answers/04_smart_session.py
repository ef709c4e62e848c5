# Wrong answers to the exercises of chapter 04. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 the default is not what was there before
# called: again, inside its own block
# says: it is 'visitor'
class ActingAs(ActingAs):
    def __enter__(self):
        _role.set(self._new_role)

    def __exit__(self, *exc_info):
        _role.set("visitor")

# %% 1 one attribute remembers only one block
# called: again, inside its own block
# says: it is 'admin'
class ActingAs(ActingAs):
    def __enter__(self):
        self._before = _role.get()
        _role.set(self._new_role)

    def __exit__(self, *exc_info):
        _role.set(self._before)

# %% 1 a list of Tokens, which all tasks share
# called: two tasks
# says: was created in a different Context
class ActingAs(ActingAs):
    def __init__(self, role):
        self._new_role = role
        self._tokens = []

    def __enter__(self):
        self._tokens.append(_role.set(self._new_role))

    def __exit__(self, *exc_info):
        _role.reset(self._tokens.pop())

# %% 1 a list for each thread, which its tasks share
# called: two tasks
# says: was created in a different Context
import threading


class ActingAs(ActingAs):
    _local = threading.local()

    def __enter__(self):
        if not hasattr(self._local, "tokens"):
            self._local.tokens = []
        self._local.tokens.append(_role.set(self._new_role))

    def __exit__(self, *exc_info):
        _role.reset(self._local.tokens.pop())

# %% 1 a list in a ContextVar, which a new task shares
# called: a task is created; it enters as_admin, too
# says: was created in a different Context
_lists = ContextVar("lists")


class ActingAs(ActingAs):
    def __enter__(self):
        try:
            tokens = _lists.get()
        except LookupError:
            tokens = []
            _lists.set(tokens)
        tokens.append(_role.set(self._new_role))

    def __exit__(self, *exc_info):
        _role.reset(_lists.get().pop())

# %% 2 no `finally`
# called: the inner one of two blocks raises ValueError
# says: it returns {'request': 8, 'user': 'ada'}
@contextmanager
def log_fields(**fields):
    token = _fields.set({**_fields.get(), **fields})
    yield
    _fields.reset(token)

# %% 2 the inner block hides all outer fields
# called: log_fields(user='ada') inside
# says: it returns {'user': 'ada'}
@contextmanager
def log_fields(**fields):
    token = _fields.set(fields)
    try:
        yield
    finally:
        _fields.reset(token)

# %% 2 a replaced field is removed, not restored
# called: log_fields(user='bob') inside
# says: it returns {}
_shared = ContextVar("shared", default={})


@contextmanager
def log_fields(**fields):
    _shared.get().update(fields)
    try:
        yield
    finally:
        for name in fields:
            _shared.get().pop(name, None)


def current_fields():
    return dict(_shared.get())

# %% 2 one dict, changed in place, is the same for all tasks
# called: two tasks are created
# says: it returns {'request': 7, 'user': 'ada', 'task': 2}
_shared = ContextVar("shared")


@contextmanager
def log_fields(**fields):
    if _shared.get(None) is None:
        _shared.set({})
    mine = _shared.get()
    before = dict(mine)
    mine.update(fields)
    try:
        yield
    finally:
        mine.clear()
        mine.update(before)


def current_fields():
    return dict(_shared.get({}))

# %% 2 whoever gets the dict can change the log
# called: is changed
# says: 'colour': 'red'
def current_fields():
    return _fields.get()


_fields = ContextVar("fields", default={})

# %% 3 one copy of the context for all threads
# called: in two threads
# says: is already entered
from contextvars import copy_context
from functools import partial


def run_all(executor, function, items):
    return list(executor.map(partial(copy_context().run, function), items))

# %% 3 a context cannot be sent to a process
# called: in a process
# says: cannot pickle
from contextvars import copy_context


def run_all(executor, function, items):
    futures = [executor.submit(copy_context().run, function, item) for item in items]
    return [future.result() for future in futures]

# %% 3 one job after the other
# called: the first one asks after the others
# says: they start when the first one has ended
def run_all(executor, function, items):
    here, results = current_session(), []
    for item in items:
        outcome = executor.submit(run_job, here and here.name, function, item).result()
        if outcome.error:
            raise outcome.error
        if here is not None:
            here.calls += outcome.record.calls
            here.children += outcome.record.children
        results += outcome.results
    return results

# %% 3 the calls stand in the order in which jobs end
# called: the first one asks after the others
# says: their order is ['two',
def run_all(executor, function, items):
    here = current_session()

    def add(future):
        if here is not None:
            here.calls += future.result().record.calls
            here.children += future.result().record.children

    futures = []
    for item in items:
        futures.append(executor.submit(run_job, here and here.name, function, item))
        futures[-1].add_done_callback(add)
    return [future.result().results[0] for future in futures]

# %% 3 threads record directly, in the order of time, and processes by what they return
# called: the first one asks after the others
# says: their order is ['two', 'three', 'one']
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

run_all_in_processes = run_all


def run_all(executor, function, items):
    if not isinstance(executor, ThreadPoolExecutor):
        return run_all_in_processes(executor, function, items)
    futures = [executor.submit(copy_context().run, function, item) for item in items]
    return [future.result() for future in futures]

# %% 3 sessions that a job opens are lost
# called: each opens a session
# says: it has none
def run_all(executor, function, items):
    here = current_session()
    futures = [executor.submit(run_job, here and here.name, function, item) for item in items]
    outcomes = [future.result() for future in futures]
    for outcome in outcomes:
        if here is not None:
            here.calls += outcome.record.calls
    return [outcome.results[0] for outcome in outcomes]

# %% 3 after an error, the calls of later jobs are lost
# called: the second one asks and raises KeyError
# says: it has ['one', 'two']
def run_all(executor, function, items):
    here, results = current_session(), []
    futures = [executor.submit(run_job, here and here.name, function, item) for item in items]
    for future in futures:
        outcome = future.result()
        if here is not None:
            here.calls += outcome.record.calls
            here.children += outcome.record.children
        if outcome.error:
            raise outcome.error
        results += outcome.results
    return results

# %% 3 an `except Exception` misses SystemExit, and with it the calls
# called: raises SystemExit
# says: it has ['one', 'three', 'four']
def run_job(name, function, item):
    record = None if name is None else Session(name)
    with current(record):
        try:
            return Outcome(record, [function(item)])
        except Exception as error:
            return Outcome(record, [], error)

# %% 3 a worker keeps the session of the job before
# called: outside a session
# says: it is a session with the name
def run_job(name, function, item):
    record = None if name is None else Session(name)
    if record is not None:
        _session.set(record)
    try:
        return Outcome(record, [function(item)])
    except BaseException as error:
        return Outcome(record, [], error)
