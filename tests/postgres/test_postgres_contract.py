"""PostgresStorage keeps the storage contract."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright.testing import CallersContract, StorageContract
from tests.postgres.cutting import TABLES
from tests.postgres.manual import ManualPostgresStorage, remember_types

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookwright import Storage


class TestPostgresStorage(CallersContract, StorageContract):
    @pytest.fixture(autouse=True)
    def server(self, postgres_dsn: str, new_schema: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
        remember_types(monkeypatch)
        self._dsn = postgres_dsn
        self._new_schema = new_schema
        self._schemas: dict[Storage, str] = {}
        self._one: str | None = None

    async def make_storage(self) -> ManualPostgresStorage:
        if self._one is None:
            return self._at(self._new_schema())
        if self._one in self._schemas.values():
            await self._empty(self._one)
        return self._at(self._one)

    async def _empty(self, schema: str) -> None:
        connection = await asyncpg.connect(self._dsn)
        try:
            deletes = [f"DELETE FROM {schema}.{table}" for table in TABLES if table != "meta"]
            counter = f"UPDATE {schema}.meta SET value = 0 WHERE key = 'endpoints_revision'"
            await connection.execute("; ".join([*deletes, counter]))
        finally:
            await connection.close()

    def test_a_lane_may_be_early_but_is_never_late(self) -> None:
        self._one = self._new_schema()  # emptied for each example, which is quicker than a new one
        super().test_a_lane_may_be_early_but_is_never_late()

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
