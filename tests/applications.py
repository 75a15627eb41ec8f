"""An application with a table of its own in the dispatcher's SQLite file, and the connections it may write through."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import aiosqlite
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from hookwright import Dispatcher
from hookwright.testing import FakeTransport
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ORDER = "INSERT INTO orders (what) VALUES ('tea')"


class App:
    """An application with a table of its own in the dispatcher's file."""

    def __init__(self, path: Path, transport: FakeTransport) -> None:
        self.path = path
        self.transport = transport
        self.dispatcher = self.another(transport)

    def another(self, transport: FakeTransport | None = None, **options: Any) -> Dispatcher:
        return Dispatcher(f"sqlite:///{self.path}", transport=transport or FakeTransport(), keys=[], **options)

    async def seen(self, sql: str = "SELECT id FROM hookwright_event ORDER BY id") -> list[str]:
        """What another connection sees."""
        async with aiosqlite.connect(self.path) as other:
            return [row[0] for row in await other.execute_fetchall(sql)]

    async def orders(self) -> list[str]:
        return await self.seen("SELECT what FROM orders ORDER BY id")

    async def delivered(self, *event_ids: str) -> None:
        sent = self.sent
        await until(lambda: set(event_ids) <= set(sent()))

    def sent(self) -> list[str]:
        return [dict(request.headers)["webhook-id"] for request in self.transport.requests]


def immediate(engine: AsyncEngine) -> AsyncEngine:
    """The recipe of the documentation: SQLAlchemy begins each transaction itself, and at once with the lock."""

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def began(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextlib.asynccontextmanager
async def application(path: Path) -> AsyncIterator[App]:
    """One that delivers everything to one endpoint."""
    app = App(path, FakeTransport())
    async with app.dispatcher:
        async with aiosqlite.connect(app.path) as connection:
            await connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, what TEXT)")
        await app.dispatcher.endpoints.create(URL, events=["*"])
        yield app


@contextlib.asynccontextmanager
async def plain(path: Path) -> AsyncIterator[Any]:
    async with aiosqlite.connect(path) as connection:
        yield connection


@contextlib.asynccontextmanager
async def explicit(path: Path) -> AsyncIterator[Any]:
    async with aiosqlite.connect(path, isolation_level=None) as connection:
        yield connection


@contextlib.asynccontextmanager
async def session_of(path: Path) -> AsyncIterator[Any]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()


@contextlib.asynccontextmanager
async def connection_of(path: Path) -> AsyncIterator[Any]:
    engine = immediate(create_async_engine(f"sqlite+aiosqlite:///{path}"))
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


CONNECTIONS = {"aiosqlite": plain, "aiosqlite explicit": explicit, "session": session_of, "connection": connection_of}


async def begin(connection: Any) -> None:
    """The others begin by themselves."""
    if isinstance(connection, aiosqlite.Connection) and connection.isolation_level is None:
        await connection.execute("BEGIN IMMEDIATE")


async def run(connection: Any, sql: str) -> None:
    await connection.execute(text(sql) if isinstance(connection, (AsyncSession, AsyncConnection)) else sql)
