"""MemoryStorage keeps the storage contract."""

from __future__ import annotations

from hookwright import MemoryStorage
from hookwright.testing import StorageContract


class TestMemoryStorage(StorageContract):
    async def make_storage(self) -> MemoryStorage:
        return MemoryStorage()
