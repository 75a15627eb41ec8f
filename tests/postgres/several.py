"""What tests of several processes share: storages and dispatchers on one schema, and whoever holds a lock there."""

from __future__ import annotations

import contextlib
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from hookwright import Clock, Dispatcher, PostgresStorage
from hookwright._clock import SECOND
from hookwright.testing._storage_contract_base import ManualClock, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hookwright._models import Lease
    from hookwright.testing import FakeTransport

HOURS = 5 * 3600 * SECOND


class Ahead(Clock):
    """The clock of a machine that is hours ahead of the server, or behind it."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self._ahead = ahead

    def now(self) -> int:
        return super().now() + self._ahead

    def wall(self) -> int:
        return super().wall() + self._ahead


class Process(World):
    """A storage as one of several processes has it, with ids of its own."""

    def __init__(self, name: str, storage: PostgresStorage) -> None:
        super().__init__(storage, ManualClock(time.time_ns() // 1000))
        self._name = name

    def new_id(self, prefix: str) -> str:
        return super().new_id(f"{prefix}_{self._name}")

    async def claimed(self, **options: Any) -> list[Lease]:
        """Claim once, and return the leases."""
        return (await self.claim(**options)).leases


class Several:
    """Opens them, and closes them all at the end."""

    def __init__(self, dsn: str, schema: str, stack: contextlib.AsyncExitStack) -> None:
        self.dsn = dsn
        self.schema = schema
        self._stack = stack
        self._count = 0

    async def process(self, *, ahead: int = 0, **options: Any) -> Process:
        """A storage that has asked for the right to deliver."""
        storage = PostgresStorage(self.dsn, schema=self.schema, **options)
        await storage.open(Ahead(ahead))
        self._stack.push_async_callback(storage.close)
        await storage.acquire()
        self._count += 1
        return Process("abcdefgh"[self._count - 1], storage)

    async def dispatcher(self, transport: FakeTransport, *, poll_only: bool = False, **options: Any) -> Dispatcher:
        """One that runs."""
        storage = PostgresStorage(self.dsn, schema=self.schema, poll_only=poll_only)
        settings: dict[str, Any] = {"keys": [], "shutdown_timeout": 1.0}
        return await self._stack.enter_async_context(Dispatcher(storage, transport=transport, **(settings | options)))

    async def connection(self) -> asyncpg.Connection:
        """An application's connection, or that of somebody who looks at the tables by hand."""
        connection = await asyncpg.connect(self.dsn)
        self._stack.callback(connection.terminate)
        return connection

    @asynccontextmanager
    async def holding(self, sql: str, *arguments: Any) -> AsyncIterator[None]:
        """Somebody else's transaction, open meanwhile, that has run this; `{}` is the schema."""
        connection = await self.connection()
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(sql.format(self.schema), *arguments)
        yield
        await transaction.rollback()

    async def value(self, sql: str, *arguments: Any) -> Any:
        """Ask beside everybody; `{}` is the schema."""
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetchval(sql.format(self.schema), *arguments)
        finally:
            await connection.close()


def sent(*transports: FakeTransport) -> list[str]:
    """Return the events that were sent."""
    return [dict(request.headers)["webhook-id"] for transport in transports for request in transport.requests]
