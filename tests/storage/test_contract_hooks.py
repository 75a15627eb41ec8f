"""Whoever puts a storage of his own through the contract is told what he forgot."""

from __future__ import annotations

import pytest

from hookwright import MemoryStorage
from hookwright.testing import CallersContract, StorageContract


class WithoutStorage(StorageContract):
    pass


class WithoutTransaction(CallersContract, StorageContract):
    async def make_storage(self) -> MemoryStorage:
        return MemoryStorage()


async def test_a_contract_that_does_not_know_how_to_make_a_storage_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"define make_storage\(\) in WithoutStorage"):
        await WithoutStorage().test_a_connection_that_does_not_lead_to_the_storage_is_refused()


async def test_a_contract_that_does_not_know_how_to_begin_a_transaction_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"define callers_transaction\(storage\) in WithoutTransaction"):
        await WithoutTransaction().test_what_is_enqueued_in_a_transaction_is_there_when_it_has_committed()
