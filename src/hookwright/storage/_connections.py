"""What `emit(connection=)` accepts: a connection of the caller's, spoken to one statement at a time.

Recognised by the names of its classes, so that no driver is imported that the application did not import itself. A
storage writes through `fetch` and decides what; here nothing is begun, committed, rolled back or repeated.
"""

from __future__ import annotations

import contextlib
import re
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from hookwright._errors import StorageUnavailable, ValidationFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Kind = Literal["sqlite", "postgres"]

KNOWN = (
    "aiosqlite.Connection, asyncpg.Connection, psycopg.AsyncConnection, or SQLAlchemy's AsyncSession or AsyncConnection"
    " on one of these"
)
"""What is accepted, as errors tell it."""


class CallersConnection(ABC):
    """A connection of the caller's, for one emit.

    `kind` says which SQL it speaks, and with it which storage can use it. `driver` is the driver's own connection:
    whoever wants to know it later holds it weakly, since it is the application's to close.
    """

    kind: Kind
    driver: Any

    @abstractmethod
    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        """Run one statement in the caller's transaction and return its rows, none when it answers with none.

        `sqlite` takes `?`. `postgres` takes `$1`, `$2`, which may repeat (and a `$1` within a text is taken for one):
        None, bool, int, float, str, bytes, and lists of them for arrays; a type that cannot be inferred is named in
        the SQL. Raises the driver's own errors, also where SQLAlchemy wraps them.
        """

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether a transaction is open now. A driver that begins one by itself does so at the first statement."""

    @property
    @abstractmethod
    def commits_alone(self) -> bool:
        """Whether the next statement would be committed by itself, as far as the driver tells."""


class _AioSQLite(CallersConnection):
    kind: Kind = "sqlite"

    def __init__(self, connection: Any) -> None:
        self.driver = connection

    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        with _told_when_closed():
            if self.driver.row_factory is None:
                rows: Sequence[Sequence[Any]] = await self.driver.execute_fetchall(sql, arguments)
                return rows
            async with self.driver.cursor() as cursor:  # rows as the application likes them may not be sequences
                cursor.row_factory = None
                await cursor.execute(sql, arguments)
                return list(await cursor.fetchall())

    @property
    def in_transaction(self) -> bool:
        with _told_when_closed():
            return bool(self.driver.in_transaction)

    @property
    def commits_alone(self) -> bool:
        # The `autocommit` of Python 3.12 is not told by aiosqlite: a storage looks again behind its first statement.
        with _told_when_closed():
            return self.driver.isolation_level is None and not self.driver.in_transaction


@contextlib.contextmanager
def _told_when_closed(kind: type[Exception] = ValueError) -> Iterator[None]:
    """aiosqlite says ValueError when its connection is closed; others have an error of their own."""
    try:
        yield
    except kind as error:
        raise ValidationFailed("connection", f"it cannot be used ({error}): give one that is open") from error


def _lost() -> StorageUnavailable:
    return StorageUnavailable("your connection is closed, or was lost: begin anew with another")


class _AsyncPG(CallersConnection):
    kind: Kind = "postgres"

    def __init__(self, connection: Any) -> None:
        self.driver = connection

    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        rows: Sequence[Sequence[Any]] = await self.driver.fetch(sql, *arguments)
        return rows

    @property
    def in_transaction(self) -> bool:
        with _told_when_closed(sys.modules["asyncpg"].InterfaceError):  # the pool has it back
            closed = self.driver.is_closed()
        if closed:
            raise _lost()
        return bool(self.driver.is_in_transaction())

    @property
    def commits_alone(self) -> bool:
        return not self.in_transaction


class _Psycopg(CallersConnection):
    kind: Kind = "postgres"

    def __init__(self, connection: Any) -> None:
        self.driver = connection
        self._library: Any = sys.modules["psycopg"]

    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        tuples = self._library.rows.tuple_row
        async with self._library.AsyncRawCursor(self.driver, row_factory=tuples) as cursor:
            await cursor.execute(sql, arguments or None)
            rows: Sequence[Sequence[Any]] = await cursor.fetchall() if cursor.description is not None else []
            return rows

    @property
    def in_transaction(self) -> bool:
        if self.driver.closed:
            raise _lost()
        idle = self._library.pq.TransactionStatus.IDLE
        return bool(self.driver.info.transaction_status != idle)

    @property
    def commits_alone(self) -> bool:
        return not self.in_transaction and bool(self.driver.autocommit)


class _SQLAlchemy(CallersConnection):
    """An AsyncConnection, a session's among them.

    Always through it, never through the driver's connection behind it: what is written there before SQLAlchemy's first
    statement is outside its transaction, and survives its rollback.
    """

    def __init__(self, connection: Any, behind: CallersConnection, translate: Callable[..., tuple[str, Any]]) -> None:
        self._connection = connection
        self._behind = behind
        self._translate = translate
        self.kind = behind.kind
        self.driver = behind.driver

    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        try:
            result = await self._connection.exec_driver_sql(*self._translate(sql, arguments))
        except sys.modules["sqlalchemy"].exc.DBAPIError as error:
            original = _driver_error(error)
        else:
            rows: Sequence[Sequence[Any]] = result.fetchall() if result.returns_rows else []
            return rows
        raise original  # and not from SQLAlchemy's, which shows the parameters: event data is in no exception

    @property
    def in_transaction(self) -> bool:
        return self._behind.in_transaction

    @property
    def commits_alone(self) -> bool:
        if self.kind == "sqlite":  # it may begin one itself, in an event of the application's: see in_transaction then
            return False
        # SQLAlchemy's wrappers of both PostgreSQL drivers begin a transaction at the first statement, unless told so.
        return bool(self._connection.sync_connection.connection.dbapi_connection.autocommit)


def _driver_error(error: Any) -> BaseException:
    original: BaseException = error.orig
    if type(original).__module__.startswith("sqlalchemy.") and original.__cause__ is not None:
        return original.__cause__  # its wrapper of asyncpg has errors of its own
    return original


def _as_it_is(sql: str, arguments: Sequence[Any]) -> tuple[str, Any]:
    return sql, tuple(arguments) or None


_NUMBERED = re.compile(r"\$(\d+)")


def _pyformat(sql: str, arguments: Sequence[Any]) -> tuple[str, Any]:
    named = _NUMBERED.sub(r"%(p\1)s", sql.replace("%", "%%"))
    return named, {f"p{number}": argument for number, argument in enumerate(arguments, 1)}


# SQLAlchemy's drivers: what stands behind its connection, and how parameters are written for it.
_DRIVERS: dict[str, tuple[Callable[[Any], CallersConnection], Callable[..., tuple[str, Any]]]] = {
    "aiosqlite": (_AioSQLite, _as_it_is),
    "asyncpg": (_AsyncPG, _as_it_is),
    "psycopg": (_Psycopg, _pyformat),
}


async def adapted(connection: object) -> CallersConnection:
    """Return what speaks to a connection of the caller's.

    A session is asked for its connection, which begins its transaction as any use of it does.

    Raises ValidationFailed for anything else, and where each statement would be committed by itself.
    """
    names = _class_names(connection)
    adapter: CallersConnection
    if ("aiosqlite", "Connection") in names:
        adapter = _AioSQLite(connection)
    elif names & {("asyncpg", "Connection"), ("asyncpg", "PoolConnectionProxy")}:
        adapter = _AsyncPG(connection)
    elif ("psycopg", "AsyncConnection") in names:
        adapter = _Psycopg(connection)
    elif names & {("sqlalchemy", name) for name in ("AsyncSession", "async_scoped_session", "AsyncConnection")}:
        adapter = await _behind_sqlalchemy(connection)
    else:
        raise ValidationFailed("connection", _refusal(connection, names))
    if adapter.commits_alone:
        raise commits_alone()
    if getattr(getattr(adapter.driver, "pgconn", None), "pipeline_status", 0):
        raise ValidationFailed("connection", "it is in pipeline mode, which answers later: emit outside pipeline()")
    return adapter


def commits_alone() -> ValidationFailed:
    """The error for a connection that would commit each statement by itself."""
    return ValidationFailed(
        "connection",
        "it has no open transaction and would commit the event by itself: begin a transaction first, or emit without"
        " connection=",
    )


async def _behind_sqlalchemy(given: Any) -> CallersConnection:
    errors = sys.modules["sqlalchemy"].exc
    connection = given
    with _told_when_closed(errors.InvalidRequestError):
        if not hasattr(given, "exec_driver_sql"):  # a session
            try:
                connection = await given.connection()
            except errors.UnboundExecutionError as error:
                raise ValidationFailed(
                    "connection", "the session has no one engine: give `await session.connection(bind_arguments={...})`"
                ) from error
            except (errors.DBAPIError, OSError) as error:
                original = _driver_error(error) if isinstance(error, errors.DBAPIError) else error
                name = type(original).__name__
                raise StorageUnavailable(f"your session cannot connect ({name}: {original})") from original
        dialect = connection.dialect
        if dialect.driver not in _DRIVERS:
            raise ValidationFailed("connection", f"SQLAlchemy uses {dialect.name}+{dialect.driver}: give {KNOWN}")
        behind, translate = _DRIVERS[dialect.driver]
        adapter = behind(connection.sync_connection.connection.driver_connection)
    return _SQLAlchemy(connection, adapter, translate)


def _class_names(connection: object) -> set[tuple[str, str]]:
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(connection).__mro__}


_SYNCHRONOUS = {
    ("sqlite3", "Connection"): "aiosqlite.Connection",
    ("psycopg", "Connection"): "psycopg.AsyncConnection",
    ("psycopg2", "connection"): "psycopg.AsyncConnection",
    ("sqlalchemy", "Session"): "sqlalchemy.ext.asyncio.AsyncSession",
    ("sqlalchemy", "Connection"): "sqlalchemy.ext.asyncio.AsyncConnection",
}
_FACTORIES = {
    ("asyncpg", "Pool"): "a connection of the pool's: `async with pool.acquire() as connection`",
    ("psycopg_pool", "AsyncConnectionPool"): "a connection of the pool's: `async with pool.connection() as connection`",
    ("sqlalchemy", "AsyncEngine"): "a connection of the engine's: `async with engine.begin() as connection`",
    ("sqlalchemy", "async_sessionmaker"): "a session: `async with sessions.begin() as session`",
}


def _refusal(connection: object, names: set[tuple[str, str]]) -> str:
    for name in names & _SYNCHRONOUS.keys():
        return f"this one blocks the event loop: give the asyncio one, {_SYNCHRONOUS[name]}"
    for name in names & _FACTORIES.keys():
        return f"give {_FACTORIES[name]}"
    kind = type(connection)
    return f"a {kind.__module__}.{kind.__qualname__} is not known: give {KNOWN}"


def check_kind(connection: CallersConnection, kind: Kind | None, storage: object) -> None:
    """Raise ValidationFailed when a storage cannot be written to through that connection. None: through none."""
    if connection.kind == kind:
        return
    what = "lives in no database that a connection reaches" if kind is None else f"is no {connection.kind} database"
    raise ValidationFailed(
        "connection",
        f"{storage!r} {what}: give the dispatcher the database of your connection (sqlite:///..., postgresql://...), or"
        " emit without connection=",
    )
