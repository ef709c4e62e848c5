# Wrong answers to the exercises of chapter 01. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 an `except` in place of `finally` misses Ctrl-C
# called: presses Ctrl-C
# says: it is still closed
@contextmanager
def maintenance(flags):
    before = flags.get("maintenance", False)
    flags["maintenance"] = True
    try:
        yield
    except Exception:
        flags["maintenance"] = before
        raise
    flags["maintenance"] = before

# %% 1 False is not what was there before
# called: one block inside another
# says: the inner block opens it
@contextmanager
def maintenance(flags):
    flags["maintenance"] = True
    try:
        yield
    finally:
        flags["maintenance"] = False

# %% 1 a return in `finally` swallows the exception
# called: raises ValueError
# says: it disappears
@contextmanager
def maintenance(flags):
    before = flags.get("maintenance", False)
    flags["maintenance"] = True
    try:
        yield
    finally:
        flags["maintenance"] = before
        return

# %% 2 what was absent becomes empty
# called: the block ends well
# says: it is ''
@contextmanager
def environment(**changes):
    before = {name: os.environ.get(name, "") for name in changes}
    try:
        put(changes)
        yield
    finally:
        put(before)

# %% 2 the changes stand before the `try`
# called: 5 is not a str
# says: it is 'new'
@contextmanager
def environment(**changes):
    before = {name: os.environ.get(name) for name in changes}
    put(changes)
    try:
        yield
    finally:
        put(before)

# %% 2 None is stored as a text
# called: the block ends well
# says: it is 'None'
@contextmanager
def environment(**changes):
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in changes.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

# %% 2 an absent variable cannot be deleted
# called: it is absent already
# says: KeyError: 'WORKSHOP_ABSENT'
@contextmanager
def environment(**changes):
    before = {name: os.environ.get(name) for name in changes}
    try:
        for name, value in changes.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        yield
    finally:
        put(before)

# %% 3 the arguments stay alive during the block
# called: test_nokeepref
# says: is not None
class GeneratorManager(GeneratorManager):
    def __enter__(self):
        try:
            return next(self.gen)
        except StopIteration:
            raise RuntimeError("generator didn't yield") from None

# %% 3 a StopIteration of the block becomes a RuntimeError
# called: contextmanager_except_stopiter
# says: is not StopIteration('spam')
class GeneratorManager(GeneratorManager):
    def __exit__(self, exc_type, exc, traceback):
        try:
            return super().__exit__(exc_type, exc, traceback)
        except BaseException as raised:
            raise raised
        finally:
            if type(exc) is StopIteration and "issue29692" not in str(exc):
                raise RuntimeError("generator raised StopIteration") from exc
