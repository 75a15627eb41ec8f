"""PostgresStorage keeps the storage contract."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright.testing import CallersContract, StorageContract
from tests.postgres.manual import ManualPostgresStorage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookwright import Storage


class TestPostgresStorage(CallersContract, StorageContract):
    @pytest.fixture(autouse=True)
    def server(self, postgres_dsn: str, new_schema: Callable[[], str]) -> None:
        self._dsn = postgres_dsn
        self._new_schema = new_schema
        self._schemas: dict[Storage, str] = {}

    async def make_storage(self) -> ManualPostgresStorage:
        return self._at(self._new_schema())

    async def reopen(self, storage: Storage) -> Storage:
        return self._at(self._schemas[storage])

    def _at(self, schema: str) -> ManualPostgresStorage:
        storage = ManualPostgresStorage(self._dsn, schema=schema)
        self._schemas[storage] = schema
        return storage

    @asynccontextmanager
    async def callers_transaction(self, storage: Storage) -> AsyncIterator[Any]:
        assert isinstance(storage, ManualPostgresStorage)
        connection = await asyncpg.connect(self._dsn)
        try:
            async with connection.transaction():
                await connection.execute(storage.set_time())
                yield connection
        finally:
            await connection.close()
