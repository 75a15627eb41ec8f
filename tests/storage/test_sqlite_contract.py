"""SQLiteStorage keeps the storage contract."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiosqlite
import pytest

from hookwright import SQLiteStorage, Storage
from hookwright.testing import CallersContract, StorageContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class TestSQLiteStorage(CallersContract, StorageContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._folder = tmp_path_factory.mktemp("storage")
        self._numbers = itertools.count()
        self._paths: dict[Storage, Path] = {}

    async def make_storage(self) -> SQLiteStorage:
        return self._at(self._folder / f"{next(self._numbers)}.db")

    async def reopen(self, storage: Storage) -> Storage:
        return self._at(self._paths[storage])

    @asynccontextmanager
    async def callers_transaction(self, storage: Storage) -> AsyncIterator[aiosqlite.Connection]:
        async with aiosqlite.connect(self._paths[storage]) as connection:
            yield connection
            await connection.commit()  # closed without it, what was written is gone

    def _at(self, path: Path) -> SQLiteStorage:
        storage = SQLiteStorage(path)
        self._paths[storage] = path
        return storage
