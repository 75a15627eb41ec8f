"""Enqueue through a connection of the caller's: one statement in his transaction, which only appends."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from hookwright._errors import ValidationFailed
from hookwright.storage._emitted import stale
from hookwright.storage.postgres._convert import convert
from hookwright.storage.postgres._database import Database
from hookwright.storage.postgres._enqueue import READ_COMMITTED, enqueue_all, enqueue_one

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hookwright._models import Receipt
    from hookwright.storage._connections import CallersConnection
    from hookwright.storage._emitted import Emitted
    from hookwright.storage.postgres._database import Names

IDENTITY = "SELECT value FROM hookwright.meta WHERE key = 'identity'"
"""The number that was drawn when the schema was made: no other has it, but for its copies."""

_THERE = "SELECT current_database()::text, to_regclass($1) IS NOT NULL"

_DRIVERS = {"asyncpg", "psycopg", "sqlalchemy"}


class _Through:
    """A caller's connection, as `Database` uses one."""

    def __init__(self, connection: CallersConnection) -> None:
        self._connection = connection

    async def fetch(self, query: str, *args: Any) -> Sequence[Any]:
        return await self._connection.fetch(query, args)

    async def execute(self, query: str, *args: Any) -> str:
        await self._connection.fetch(query, args)
        return ""


class Callers:
    """The connections of callers that write to one schema. `revision` reads the endpoint counter beside them."""

    def __init__(
        self, names: Names, identity: int, channel: str | None, revision: Callable[[], Awaitable[int]]
    ) -> None:
        self._names = names
        self._identity = identity
        self._channel = channel
        self._revision = revision
        self._admitted: weakref.WeakSet[Any] = weakref.WeakSet()

    async def enqueue(self, connection: CallersConnection, waiting: Sequence[Emitted]) -> list[Receipt]:
        """See `Storage.enqueue`: all or none."""
        database = Database(_Through(connection), self._names)
        try:
            await self._admit(connection)
            if len(waiting) == 1:
                return await self._enqueue(database, waiting)
            async with _savepoint(connection):
                return await self._enqueue(database, waiting)
        except Exception as error:
            if type(error).__module__.partition(".")[0] in _DRIVERS or isinstance(error, OSError):
                raise convert(error, callers=True) from error
            raise

    async def _enqueue(self, database: Database, waiting: Sequence[Emitted]) -> list[Receipt]:
        if len(waiting) == 1:
            receipt = await enqueue_one(database, waiting[0], self._channel)
            if receipt is not None:
                return [receipt]
        elif await database.value(f"SELECT {READ_COMMITTED}"):
            return await enqueue_all(database, waiting, self._channel)
        # His snapshot may be older than this emit, and show an old counter: an endpoint that was created in between
        # is seen from beside it only.
        revision = await self._revision()
        if any(emitted.endpoints_revision != revision for emitted in waiting):
            raise stale()
        latest = [emitted._replace(endpoints_revision=None) for emitted in waiting]
        if len(latest) == 1:
            receipt = await enqueue_one(database, latest[0], self._channel, checked=True)
            assert receipt is not None
            return [receipt]
        return await enqueue_all(database, latest, self._channel)

    async def _admit(self, connection: CallersConnection) -> None:
        """Refuse a connection to anything but our database, before a statement fails and ends his transaction."""
        driver = getattr(connection.driver, "_con", None) or connection.driver  # behind asyncpg's pool
        if driver in self._admitted:
            return
        [(name, there)] = await connection.fetch(_THERE, [f"{self._names.quoted}.meta"])
        found = await connection.fetch(self._names(IDENTITY)) if there else []
        if not found or found[0][0] != self._identity:
            raise ValidationFailed(
                "connection",
                f"it is connected to a database {name!r} that does not hold this dispatcher's events (schema"
                f" {self._names.schema!r}): they must be in one database",
            )
        self._admitted.add(driver)


@contextlib.asynccontextmanager
async def _savepoint(connection: CallersConnection) -> Any:
    await connection.fetch("SAVEPOINT hookwright_emit")
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a connection that is lost has lost this with it
            await connection.fetch("ROLLBACK TO SAVEPOINT hookwright_emit")
            await connection.fetch("RELEASE SAVEPOINT hookwright_emit")
        raise
    await connection.fetch("RELEASE SAVEPOINT hookwright_emit")
