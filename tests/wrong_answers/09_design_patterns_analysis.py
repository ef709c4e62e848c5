# Wrong answers to the exercises of chapter 09. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 the lock is released first, and the listener's exception still comes out
# called: at `ended`; the block ends well
# says: ConnectionError('the chat is down') comes out
@contextmanager
def deployment(lock, listeners):
    with lock:
        for listener in tuple(listeners):
            listener("started")
        try:
            yield
        finally:
            lock.release()
            try:
                for listener in tuple(listeners):
                    listener("ended")
            finally:
                lock.acquire()

# %% 1 one `try` around all listeners
# called: at `ended`
# says: it is told ['started']
def notify(listeners, event):
    try:
        for listener in tuple(listeners):
            listener(event)
    except Exception:
        logging.exception("a listener failed at %r", event)

# %% 1 the listener's exception is swallowed
# called: at `ended`
# says: nothing is logged
def notify(listeners, event):
    for listener in tuple(listeners):
        with suppress(Exception):
            listener(event)

from contextlib import suppress

# %% 1 Ctrl-C in a listener is taken for the listener's own exception
# called: Ctrl-C while the chat is told `ended`
# says: so Ctrl-C does nothing
def notify(listeners, event):
    for listener in tuple(listeners):
        try:
            listener(event)
        except BaseException:
            logging.exception("the listener %r failed at %r", listener, event)

# %% 1 a loop over the list itself misses the next listener
# called: removes itself when it is told `started`
# says: it is told ['ended']
def notify(listeners, event):
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            logging.exception("the listener %r failed at %r", listener, event)

# %% 2 what fails its check is not released
# called: `check` raises
# says: they are acquire, check
class Managed(Managed):
    def __enter__(self):
        self._resource = self.acquire()
        self.check(self._resource)
        return self._resource

# %% 2 a failing commit is not rolled back
# called: `commit` raises
# says: they are acquire, check, block, commit, release
class Managed(Managed):
    def _commit(self, resource):
        self.commit(resource)

# %% 2 a failing rollback keeps the resource
# called: and then `roll_back` does
# says: they are acquire, check, block, roll_back
class Managed(Managed):
    def __exit__(self, exc_type, exc, traceback):
        try:
            if exc_type is None:
                self.commit(self._resource)
        except BaseException:
            self.roll_back(self._resource)
            self.release(self._resource)
            raise
        if exc_type is not None:
            self.roll_back(self._resource)
        self.release(self._resource)

# %% 2 Ctrl-C commits half of the work
# called: presses Ctrl-C in the block
# says: they are acquire, check, block, commit, release
class Managed(Managed):
    def __exit__(self, exc_type, exc, traceback):
        try:
            if isinstance(exc, Exception):
                self.roll_back(self._resource)
            else:
                self._commit(self._resource)
        finally:
            self.release(self._resource)

# %% 2 a resource that is None is not released
# called: the block ends well
# says: they are acquire, check, block
class Managed(Managed):
    _resource = None

    def __exit__(self, exc_type, exc, traceback):
        if self._resource:
            super().__exit__(exc_type, exc, traceback)

# %% 3 the lock of another export is deleted
# called: of another export are there
# says: it is gone, so a third export could start
@contextmanager
def exclusive(lock):
    try:
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            raise BusyError(lock) from None
        yield
    finally:
        lock.unlink(missing_ok=True)

# %% 3 the draft is opened before the lock is held
# called: of another export are there
# says: it is gone
class Exporter(Exporter):
    def export(self, rows):
        number = 0
        with replacement(self.target) as draft, exclusive(self.target.with_suffix(".lock")):
            for name, price in rows:
                draft.write(f"{name},{price}\n")
                number += 1
        return number

# %% 3 half of a list replaces the whole one
# called: the rows raise ValueError
# says: it contains 'apple,2\n'
@contextmanager
def replacement(target):
    path = target.with_suffix(".draft")
    with open(path, "w", encoding="utf-8") as draft:
        try:
            yield draft
        finally:
            draft.close()
            os.replace(path, target)

# %% 3 a draft that cannot become the list stays
# called: prices.csv is a folder
# says: it is still there
@contextmanager
def replacement(target):
    path = target.with_suffix(".draft")
    try:
        with open(path, "w", encoding="utf-8") as draft:
            yield draft
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    os.replace(path, target)

# %% 3 the lock is released after some exceptions only
# called: prices.draft is a folder
# says: it is still there, so every later export
@contextmanager
def exclusive(lock):
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        raise BusyError(lock) from None
    try:
        yield
    except (ValueError, KeyboardInterrupt):
        lock.unlink()
        raise
    else:
        lock.unlink()

# %% 3 `export` does the work of the managers itself
# called: that make no files
# says: `export` makes prices.draft without them
class Exporter(Exporter):
    def export(self, rows):
        number = 0
        path = self.target.with_suffix(".draft")
        with exclusive(self.target.with_suffix(".lock")):
            with open(path, "w", encoding="utf-8") as draft:
                try:
                    for name, price in rows:
                        draft.write(f"{name},{price}\n")
                        number += 1
                    draft.close()
                    os.replace(path, self.target)
                finally:
                    path.unlink(missing_ok=True)
        return number
