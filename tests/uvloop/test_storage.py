"""SQLiteStorage on uvloop: what waits for its thread, is cancelled meanwhile, or shares a transaction."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from hookwright import SQLiteStorage
from hookwright.testing._storage_contract_cancel import CancellationContract, NeighbourContract
from hookwright.testing._storage_contract_fence import FenceContract
from hookwright.testing._storage_contract_history import LifeContract
from hookwright.testing._storage_contract_outbox import EnqueueContract, ReleaseContract, SettleContract

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright import Storage


class TestSQLiteStorage(
    EnqueueContract,
    SettleContract,
    FenceContract,
    ReleaseContract,
    LifeContract,
    CancellationContract,
    NeighbourContract,
):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self._folder = tmp_path
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
