"""An application with a table of its own in the dispatcher's database, and the connections it may write through."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from hookwright import Dispatcher
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import FakeTransport
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager


class App:
    """What it sees beside all others is what is committed."""

    def __init__(self, dsn: str, schema: str, beside: asyncpg.Connection) -> None:
        self.dsn = dsn
        self.schema = schema
        self.transport = FakeTransport()
        self.dispatcher = self.another(transport=self.transport)
        self.order = f"""INSERT INTO "{schema}".orders VALUES ('tea')"""
        self._beside = beside

    def another(self, *, poll_only: bool = False, **options: Any) -> Dispatcher:
        storage = PostgresStorage(self.dsn, schema=self.schema, poll_only=poll_only)
        return Dispatcher(storage, **{"transport": FakeTransport(), "keys": [], **options})

    async def query(self, sql: str) -> list[Any]:
        """The first column, as another connection sees it; tables are the dispatcher's."""
        await self._beside.execute(f'SET search_path = "{self.schema}"')
        return [row[0] for row in await self._beside.fetch(sql)]

    async def events(self) -> list[str]:
        return await self.query("SELECT id FROM event ORDER BY id")

    async def rows(self) -> int:
        """How many rows of ours there are."""
        found = await self.query(
            "SELECT (SELECT count(*) FROM event) + (SELECT count(*) FROM delivery) + (SELECT count(*) FROM wake)"
        )
        return int(found[0])

    async def orders(self) -> int:
        return len(await self.query("SELECT * FROM orders"))

    async def waiting(self) -> int:
        """How many connections wait for a lock with a statement on our tables."""
        return len(
            await self.query(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, current_schema()) > 0"
            )
        )

    def sent(self, transport: FakeTransport | None = None) -> list[str]:
        return [dict(request.headers)["webhook-id"] for request in (transport or self.transport).requests]

    async def delivered(self, *event_ids: str, transport: FakeTransport | None = None) -> None:
        await until(lambda: set(event_ids) <= set(self.sent(transport)))


@contextlib.asynccontextmanager
async def application(dsn: str, schema: str) -> AsyncIterator[App]:
    """One that delivers."""
    beside = await asyncpg.connect(dsn)
    app = App(dsn, schema, beside)
    try:
        async with app.dispatcher:
            await app.query("CREATE TABLE orders (what text)")
            yield app
    finally:
        await beside.close()


class Caller:
    """A connection and its transactions, in the words of its driver."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._transaction: Any = None

    async def begin(self, isolation: str | None = None) -> None:
        """The others than asyncpg's begin by themselves."""
        if hasattr(self.connection, "is_in_transaction"):
            self._transaction = self.connection.transaction()
            await self._transaction.start()
        if isolation is not None:
            await self.run(f"SET TRANSACTION ISOLATION LEVEL {isolation}")

    async def run(self, sql: str) -> Sequence[Any]:
        if hasattr(self.connection, "is_in_transaction"):
            return list(await self.connection.fetch(sql))
        if isinstance(self.connection, psycopg.AsyncConnection):
            cursor = await self.connection.execute(sql.encode())
            return await cursor.fetchall() if cursor.description else []
        result = await self.connection.execute(text(sql))
        return list(result.all()) if result.returns_rows else []

    async def commit(self) -> None:
        await (self._transaction or self.connection).commit()
        self._transaction = None

    async def rollback(self) -> None:
        await (self._transaction or self.connection).rollback()
        self._transaction = None


@contextlib.asynccontextmanager
async def engine_of(dsn: str, driver: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    async def connect() -> Any:
        return await asyncpg.connect(dsn)

    # asyncpg takes no socket's folder from an URL of SQLAlchemy's.
    how = {"async_creator": connect} if driver == "asyncpg" else {}
    engine = create_async_engine(dsn.replace("postgresql://", f"postgresql+{driver}://"), **how, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def _asyncpg(dsn: str) -> AsyncIterator[Caller]:
    connection = await asyncpg.connect(dsn)
    try:
        yield Caller(connection)
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def _pool(dsn: str) -> AsyncIterator[Caller]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        yield Caller(connection)


@contextlib.asynccontextmanager
async def _psycopg(dsn: str) -> AsyncIterator[Caller]:
    connection = await psycopg.AsyncConnection.connect(dsn)
    try:
        yield Caller(connection)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def _connection(dsn: str, driver: str) -> AsyncIterator[Caller]:
    async with engine_of(dsn, driver) as engine, engine.connect() as connection:
        yield Caller(connection)


@contextlib.asynccontextmanager
async def _session(dsn: str, driver: str) -> AsyncIterator[Caller]:
    async with engine_of(dsn, driver) as engine, AsyncSession(engine) as session:
        yield Caller(session)


KINDS: dict[str, Callable[[str], AbstractAsyncContextManager[Caller]]] = {
    "asyncpg": _asyncpg,
    "asyncpg-pool": _pool,
    "psycopg": _psycopg,
    "connection-asyncpg": lambda dsn: _connection(dsn, "asyncpg"),
    "connection-psycopg": lambda dsn: _connection(dsn, "psycopg"),
    "session-asyncpg": lambda dsn: _session(dsn, "asyncpg"),
    "session-psycopg": lambda dsn: _session(dsn, "psycopg"),
}

DRIVERS = ["asyncpg", "psycopg", "session-asyncpg"]
"""One of each that has errors of its own."""
