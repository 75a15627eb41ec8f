"""One task owns the one writing connection: whatever waits is run as one transaction, in one hop to its thread.

Two tasks on one connection would share a transaction, so that one's COMMIT commits the other's half; and a cancelled
`await connection.execute("BEGIN")` runs later and holds the lock. Hence callers hand over an operation and await a
future: cancelling the caller never cancels SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import aiosqlite

from hookwright._errors import (
    HookwrightError,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageFull,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

T = TypeVar("T")

BUSY_TIMEOUT = 0.25
"""Seconds inside SQLite: `interrupt()` does not end a busy wait, so it is short and repeated from outside."""

BUSY_LIMIT = 5.0
"""Seconds after which an operation that found the database locked gives up."""

CLOSING_LIMIT = 0.2
"""The same, for what is waiting when the storage is closed: whoever closes is about to end."""

ANSWERED_AT_ONCE = 8
"""Callers that go on in one turn of the loop: each asks for the next thing there; an emit to 100 takes 0.4 ms."""


class Database(sqlite3.Connection):
    """A connection whose `execute` also takes a function and runs it whole in the connection's own thread.

    This makes a transaction one thread hop (50-70 us) instead of one for each statement, through `factory=`,
    sqlite3's documented hook, and `execute_fetchall`, aiosqlite's public method.
    """

    def execute(self, sql: Any, parameters: Any = (), /) -> Any:
        """Run a statement, or a function of this connection."""
        if callable(sql):
            return _Result(sql(self))
        return super().execute(sql, parameters)


class _Result:
    """What a function returned, in the shape that `execute_fetchall` expects of a cursor."""

    def __init__(self, value: object) -> None:
        self._value = value

    def fetchall(self) -> object:
        return self._value


class Connected:
    """An aiosqlite connection that runs functions, and whose thread never outlives the main thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: aiosqlite.Connection | None = None
        self._closed = threading.Event()

    async def open(self, prepare: Callable[[Database], None]) -> None:
        """Connect, then run `prepare` in the connection's thread."""
        try:
            self._connection = await aiosqlite.connect(
                self._path, factory=Database, isolation_level=None, timeout=BUSY_TIMEOUT, cached_statements=256
            )
        except (sqlite3.Error, OSError) as error:
            raise convert(error) from error
        watchdog = threading.Thread(target=self._stop_with_main, name="hookwright-sqlite-exit", daemon=True)
        watchdog.start()
        try:
            await self.call(prepare)
        except BaseException:
            await self.close()
            raise

    def _stop_with_main(self) -> None:
        # aiosqlite's thread is not a daemon: without this a forgotten `aclose` would hang the interpreter's exit.
        main, connection = threading.main_thread(), self._connection
        while main.is_alive() and not self._closed.is_set():
            main.join(5.0)
        if not self._closed.is_set() and connection is not None:
            connection.stop()

    async def call(self, function: Callable[[Database], T]) -> T:
        """Run `function` in the connection's thread, with foreign errors converted."""
        if self._connection is None or self._closed.is_set():
            raise closed()
        try:
            return await self._connection.execute_fetchall(function)  # type: ignore[return-value]  # see Database
        except (sqlite3.Error, OSError) as error:
            raise convert(error) from error

    async def interrupt(self) -> None:
        """End the statement that is running in the connection's thread: it raises StorageClosed."""
        if self._connection is not None:
            await self._connection.interrupt()

    async def close(self) -> None:
        """Disconnect; harmless when repeated."""
        connection, self._connection = self._connection, None
        self._closed.set()
        if connection is not None:
            await connection.close()


Run = Callable[["Database", list[Any]], list[Any]]
"""Does everything of one kind that waits: arguments to answers. An answer that is an exception is a refusal."""


class _Operation:
    __slots__ = ("argument", "future", "give_up_at", "run")

    def __init__(self, run: Run, argument: Any, future: asyncio.Future[Any]) -> None:
        self.run = run
        self.argument = argument
        self.future = future
        self.give_up_at = time.monotonic() + BUSY_LIMIT


class Owner:
    """Runs operations in the order of their arrival, as many to a transaction as are waiting.

    `transactions` and `operations` count what was committed.
    """

    def __init__(self, path: Path) -> None:
        self._connected = Connected(path)
        self._waiting: deque[_Operation] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._give_up_at = math.inf
        self._damage: StorageCorrupt | None = None
        self.transactions = 0
        self.operations = 0

    async def open(self, prepare: Callable[[Database], None]) -> None:
        """Connect, run `prepare` in the connection's thread, and start."""
        await self._connected.open(prepare)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="hookwright-sqlite-owner")

    async def submit(self, function: Callable[[Database], T]) -> T:
        """Run `function` in the next transaction and return what it returned, once that is on disk."""
        answer: T = await self.submit_to(one_by_one, function)
        return answer

    async def submit_to(self, run: Run, argument: object) -> Any:
        """Have `run` called in the next transaction, once for all arguments that wait for it; return our answer."""
        if self._closing or self._task is None:
            raise closed()
        if self._damage is not None:  # what is damaged is not written to again
            raise StorageCorrupt(*self._damage.args)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(_Operation(run, argument, future))
        self._arrived.set()
        return await future

    async def call(self, function: Callable[[Database], T]) -> T:
        """Run `function` in the connection's thread, outside any transaction."""
        try:
            return await self._connected.call(function)
        except StorageCorrupt as error:
            self._damage = error
            raise

    async def finish(self) -> None:
        """Take nothing more, and write what is waiting; what finds the database locked for 0.2 s gives up."""
        self._closing = True
        self._give_up_at = time.monotonic() + CLOSING_LIMIT
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Finish what is waiting, then disconnect."""
        await self.finish()
        await self._connected.close()

    async def _run(self) -> None:
        try:
            while not (self._closing and not self._waiting):
                if not self._waiting:
                    self._arrived.clear()
                    await self._arrived.wait()
                # Callers whose futures were just resolved run before we do, so that what they ask for next is in this
                # group and not in the one after it.
                await asyncio.sleep(0)
                if self._waiting:
                    group = list(self._waiting)
                    self._waiting.clear()
                    if self._damage is not None:
                        self._fail(group, StorageCorrupt(*self._damage.args))
                    else:
                        await self._commit(group)
        finally:
            # Whoever cancels all tasks of a loop cancels this one, too: nobody may wait for it for ever.
            self._closing = True
            self._fail(self._waiting, closed())

    async def _commit(self, group: list[_Operation]) -> None:
        try:
            answers = await self._connected.call(lambda database: run_group(database, group))
        except Exception as error:  # noqa: BLE001  # the owner must outlive whatever an operation raised
            answers = [error] * len(group)
        except BaseException:
            self._fail(group, StorageClosed("the storage's task was cancelled: it may or may not have been written"))
            raise
        else:
            self.transactions += 1
            self.operations += len(group)
        await self._answer(group, answers)

    async def _answer(self, group: list[_Operation], answers: list[Any]) -> None:
        """Answer in the order of arrival, a few in each turn of the loop; the rest at once when we are cancelled."""
        self._damage = next((answer for answer in answers if isinstance(answer, StorageCorrupt)), self._damage)
        pairs = list(zip(group, answers, strict=True))
        if again := [operation for operation, answer in pairs if isinstance(answer, StorageBusy)]:
            self._retry_later(again, answers[-1])
        left = iter([pair for pair in pairs if not isinstance(pair[1], StorageBusy)])
        try:
            for number, (operation, answer) in enumerate(left, 1):
                _resolve(operation.future, answer)
                if number % ANSWERED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        finally:
            for operation, answer in left:
                _resolve(operation.future, answer)

    def _retry_later(self, group: list[_Operation], error: StorageBusy) -> None:
        now = time.monotonic()
        late = [op for op in group if min(op.give_up_at, self._give_up_at) <= now]
        self._fail(late, error)
        self._waiting.extendleft(reversed([op for op in group if op not in late]))

    def _fail(self, group: Iterable[_Operation], error: BaseException) -> None:
        for operation in group:
            _resolve(operation.future, error)


def _resolve(future: asyncio.Future[Any], answer: object) -> None:
    if future.done():  # its caller was cancelled
        return
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def run_group(database: Database, group: list[_Operation]) -> list[Any]:
    """Run all in one transaction, neighbours of one kind together.

    When one fails that has written, roll back and run each alone. A refusal that wrote nothing (a duplicate, a stale
    revision) fails alone and leaves the transaction as it was.
    """
    try:
        return _together(database, group)
    except sqlite3.Error as error:
        if isinstance(convert(error), (StorageBusy, StorageCorrupt)):
            raise
    except Exception:  # noqa: BLE001, S110  # whose it is shows when each runs alone
        pass
    answers: list[Any] = []
    for operation in group:
        answer = _alone(database, operation)
        if isinstance(answer, (StorageBusy, StorageCorrupt)):
            # Nothing more is tried: it would wait as long again for the lock, or write to what is damaged.
            return answers + [answer] * (len(group) - len(answers))
        answers.append(answer)
    return answers


def _together(database: Database, group: list[_Operation]) -> list[Any]:
    # In the order of their arrival: a result must be written before the lease is given back.
    answers: list[Any] = []
    with transaction(database):
        for run, operations in itertools.groupby(group, key=lambda operation: operation.run):
            answers.extend(run(database, [operation.argument for operation in operations]))
    return answers


def _alone(database: Database, operation: _Operation) -> Any:
    try:
        with transaction(database):
            return operation.run(database, [operation.argument])[0]
    except (sqlite3.Error, OSError) as error:
        return convert(error)
    except Exception as error:  # noqa: BLE001  # it goes to the caller whose operation raised it
        return error


def one_by_one(database: Database, functions: list[Callable[[Database], Any]]) -> list[Any]:
    """Run functions that have no more in common than the transaction."""
    answers: list[Any] = []
    for function in functions:
        before = database.total_changes
        try:
            answers.append(function(database))
        except HookwrightError as error:
            if database.total_changes != before:
                raise
            answers.append(error)
    return answers


@contextlib.contextmanager
def transaction(database: Database, begin: str = "BEGIN IMMEDIATE") -> Any:
    """Commit on leaving, roll back on any error. A deferred BEGIN that writes would ignore the busy timeout."""
    database.execute(begin)
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        # SQLITE_FULL and some others roll back by themselves; another ROLLBACK would raise.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def closed() -> StorageClosed:
    """The error for any use before `open` or after `close`."""
    return StorageClosed("the storage is not open, or not any more: use it between start() and aclose()")


_BY_CODE = {
    sqlite3.SQLITE_BUSY: (
        StorageBusy,
        "another writer holds the database's lock; if it is your own open transaction, commit it first, or emit in it"
        " with connection=",
    ),
    sqlite3.SQLITE_LOCKED: (StorageBusy, "another statement holds a table's lock; repeat"),
    sqlite3.SQLITE_FULL: (StorageFull, "the disk, or the quota, is full; free space and repeat"),
    sqlite3.SQLITE_CORRUPT: (StorageCorrupt, "the database file is damaged; restore it from a backup"),
    sqlite3.SQLITE_NOTADB: (
        StorageCorrupt,
        "the file is not an SQLite database, or its header is damaged; restore it from a backup, or give another path",
    ),
    sqlite3.SQLITE_READONLY: (StorageError, "the database is read-only; make the file and its folder writable"),
    sqlite3.SQLITE_INTERRUPT: (StorageClosed, "the storage was closed meanwhile"),
    sqlite3.SQLITE_CANTOPEN: (StorageError, "the database cannot be opened; does its folder exist and is it writable?"),
}


def convert(error: sqlite3.Error | OSError) -> StorageError:
    """Turn a driver's error into one of ours: the only place that knows both."""
    if isinstance(error, OSError):
        return StorageError(f"the database cannot be opened: {os.strerror(error.errno or 0)}")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    kind, advice = _BY_CODE.get(code, (StorageError, "the database reported an error"))
    return kind(f"{advice} (SQLite: {error})")


DRIVER_ERRORS = (sqlite3.Error, OSError)
"""What `convert` and `convert_callers` take."""


def convert_callers(error: sqlite3.Error | OSError) -> StorageError:
    """Do what `convert` does for an error on a connection of the caller's, where other advice helps."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_BUSY_SNAPSHOT:
        return StorageBusy(
            "somebody else has written since your transaction began to read, so that it cannot write any more: roll it"
            f" back, and begin it with BEGIN IMMEDIATE (SQLite: {error})"
        )
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        return StorageBusy(
            "another writer holds the database's lock, and a transaction that has only read does not wait for it: roll"
            f" it back, and begin it with BEGIN IMMEDIATE, which waits as long as your timeout= (SQLite: {error})"
        )
    return convert(error)


def raised_in_trigger(error: sqlite3.Error | OSError) -> bool:
    """Whether a trigger said so, by RAISE."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_CONSTRAINT_TRIGGER
