# Wrong answers to the exercises of chapter 05. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 a call that times out is given back
# called: times out
# says: 0 cents are spent
@contextmanager
def paid_from(wallet, worst_case):
    if wallet.spent + wallet.reserved + worst_case > wallet.limit:
        raise BudgetExceededError
    wallet.reserved += worst_case
    bill = Bill()
    try:
        yield bill
    finally:
        wallet.reserved -= worst_case
        wallet.spent += bill.cost or 0

# %% 1 a cost of 0 is taken for an unknown one
# called: the cost is 0
# says: 20 cents are spent
@contextmanager
def paid_from(wallet, worst_case):
    if wallet.spent + wallet.reserved + worst_case > wallet.limit:
        raise BudgetExceededError
    wallet.reserved += worst_case
    bill = Bill()
    try:
        yield bill
    finally:
        wallet.reserved -= worst_case
        wallet.spent += bill.cost or worst_case

# %% 1 an error costs the worst case, even if the cost is known
# called: and then the block raises ValueError
# says: 20 cents are spent
@contextmanager
def paid_from(wallet, worst_case):
    if wallet.spent + wallet.reserved + worst_case > wallet.limit:
        raise BudgetExceededError
    wallet.reserved += worst_case
    bill = Bill()
    try:
        yield bill
    except BaseException:
        wallet.spent += worst_case
        raise
    else:
        wallet.spent += worst_case if bill.cost is None else bill.cost
    finally:
        wallet.reserved -= worst_case

# %% 1 the check forgets the calls that are under way
# called: limit 30
# says: both calls are made, and 40 cents are spent
@contextmanager
def paid_from(wallet, worst_case):
    if wallet.spent + worst_case > wallet.limit:
        raise BudgetExceededError
    wallet.reserved += worst_case
    bill = Bill()
    try:
        yield bill
    finally:
        wallet.reserved -= worst_case
        wallet.spent += worst_case if bill.cost is None else bill.cost

# %% 1 the check stands inside the `try`
# called: limit 30
# says: 0 cents are reserved
@contextmanager
def paid_from(wallet, worst_case):
    bill = Bill()
    try:
        if wallet.spent + wallet.reserved + worst_case > wallet.limit:
            raise BudgetExceededError
        wallet.reserved += worst_case
        yield bill
    finally:
        wallet.reserved -= worst_case
        wallet.spent += worst_case if bill.cost is None else bill.cost

# %% 2 a step keeps the time of those inside it
# called: and a search inside it takes 7
# says: {'search': 7.0, 'report': 10.0}
@contextmanager
def step(profile, name):
    started = profile.clock()
    try:
        yield
    finally:
        whole = profile.clock() - started
        profile.seconds[name] = profile.seconds.get(name, 0.0) + whole

# %% 2 what ended inside is not restored
# called: then a has d
# says: 'd': 8.0, 'a': 7.0
@contextmanager
def step(profile, name):
    profile.inside = 0.0
    started = profile.clock()
    try:
        yield
    finally:
        whole = profile.clock() - started
        profile.seconds[name] = profile.seconds.get(name, 0.0) + whole - profile.inside
        profile.inside = whole

# %% 2 a step that raises is not counted
# called: which raises
# says: {'c': 4.0, 'a': 3.0}
@contextmanager
def step(profile, name):
    before, profile.inside = profile.inside, 0.0
    started = profile.clock()
    yield
    whole = profile.clock() - started
    profile.seconds[name] = profile.seconds.get(name, 0.0) + whole - profile.inside
    profile.inside = before + whole

# %% 2 one stack for all profiles
# called: of another profile
# says: {'a': 1.0}
stack = []

@contextmanager
def step(profile, name):
    stack.append(0.0)
    started = profile.clock()
    try:
        yield
    finally:
        whole = profile.clock() - started
        profile.seconds[name] = profile.seconds.get(name, 0.0) + whole - stack.pop()
        if stack:
            stack[-1] += whole

# %% 2 the last run replaces the first
# called: a runs twice
# says: {'a': 2.0}
@contextmanager
def step(profile, name):
    before, profile.inside = profile.inside, 0.0
    started = profile.clock()
    try:
        yield
    finally:
        whole = profile.clock() - started
        profile.seconds[name] = whole - profile.inside
        profile.inside = before + whole

# %% 3 the check and the change are two statements
# called: at the same moment
# says: both are granted, if one reserves between `SELECT
from unittest import mock

class SharedBudget(SharedBudget):
    @contextmanager
    def reserve(self, worst_case):
        if self.balance().remaining < worst_case:
            raise BudgetExceededError
        with mock.patch.dict(globals(), TAKE=TAKE.partition(" AND ")[0]):
            reserving = super().reserve(worst_case)
            reservation = reserving.__enter__()
        try:
            yield reservation
        finally:
            reserving.__exit__(None, None, None)

# %% 3 an old reservation is given back
# called: the lease of $0.75 has ended, its call has not
# says: the lease gave the $0.75 back
class SharedBudget(SharedBudget):
    @contextmanager
    def reserve(self, worst_case):
        with self._transaction() as execute:
            old = "FROM reservation WHERE budget = :name AND expires <= :now"
            row = {"name": self.name, "now": self._clock()}
            execute(f"UPDATE budget SET taken = taken - (SELECT coalesce(sum(worst_case), 0) {old}) WHERE name = :name", **row)
            execute(f"DELETE {old}", **row)
        with super().reserve(worst_case) as reservation:
            yield reservation

# %% 3 a settlement that fails loses the cost
# called: settles at $0.50, which fails
# says: says $1
class Reservation(Reservation):
    def settle(self, actual):
        if self._booked:
            raise RuntimeError("this reservation is settled already")
        self._booked = True
        try:
            self._book(to_picodollars(actual))
        except BaseException:
            self._booked = False
            raise

# %% 3 the path is relative
# called: change the directory
# says: no such table
class SQLite(SQLite):
    def __init__(self, path):
        self._path = path

# %% 3 a balance that takes the lock for writing
# called: while another process is in a transaction
# says: it waits for that process
class SharedBudget(SharedBudget):
    def balance(self):
        with self._transaction() as execute:
            return self._read(execute)

# %% 3 a reservation is one transaction, from the beginning to the end of its block
# called: the other reads the balance
# says: says $0
class SharedBudget(SharedBudget):
    @contextmanager
    def reserve(self, worst_case):
        with self._transaction() as execute:
            row = {"id": "1", "name": self.name, "worst_case": to_picodollars(worst_case)}
            if not execute(TAKE, **row).rowcount:
                raise BudgetExceededError
            execute(KEEP, **row, expires=self._clock() + self._lease)
            self.balance = lambda: self._read(execute)
            yield Reservation(lambda actual: execute(BOOK, **row, actual=actual))

# %% 3 a settlement gives the worst case back, and then takes the cost
# called: `kill -9` just before `BEGIN IMMEDIATE`, after: reserving, reserved
# says: it has taken $0
BOOK = "UPDATE budget SET taken = taken - :worst_case WHERE name = :name"

class SharedBudget(SharedBudget):
    @contextmanager
    def reserve(self, worst_case):
        with super().reserve(worst_case) as reservation:
            give_back = reservation._book

            def give_back_and_take(actual):
                give_back(actual)
                with self._transaction() as execute:
                    take = "UPDATE budget SET taken = taken + :actual WHERE name = :name"
                    execute(take, name=self.name, actual=actual)

            reservation._book = give_back_and_take
            try:
                yield reservation
            finally:
                if not reservation._booked:
                    known = reservation._cost
                    reservation.settle(worst_case if known is None else to_dollars(known))
