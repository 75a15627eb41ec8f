"""SQLiteStorage keeps the storage contract."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from hookwright import SQLiteStorage, Storage
from hookwright.testing import StorageContract

if TYPE_CHECKING:
    from pathlib import Path


class TestSQLiteStorage(StorageContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._folder = tmp_path_factory.mktemp("storage")
        self._numbers = itertools.count()
        self._paths: dict[Storage, Path] = {}

    async def make_storage(self) -> SQLiteStorage:
        return self._at(self._folder / f"{next(self._numbers)}.db")

    async def reopen(self, storage: Storage) -> Storage:
        return self._at(self._paths[storage])

    def _at(self, path: Path) -> SQLiteStorage:
        storage = SQLiteStorage(path)
        self._paths[storage] = path
        return storage
