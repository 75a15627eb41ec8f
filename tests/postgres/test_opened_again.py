"""A storage that is closed and opened again is a new process's: it knows nothing of what was under way before."""

from __future__ import annotations

import pytest

from hookwright import StorageUnavailable
from hookwright.storage._base import ClaimRequest
from tests.postgres.cutting import scene
from tests.postgres.proxy import Action, at_statement

REQUEST = ClaimRequest(9, 9, 60_000_000, 4, {})


async def test_results_of_the_time_before_are_not_asked_about(postgres_dsn: str, postgres_schema: str) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, outcomes = setting.storage, [setting.world.outcome(setting.one)]
        setting.proxy.on_message = at_statement("settle_1", Action.CUT_AFTER)
        with pytest.raises(StorageUnavailable):
            await storage.settle(outcomes)
        await storage.close()
        await storage.open(setting.world.clock)
        assert [settled.held for settled in await storage.settle(outcomes)] == [False]
        assert len(await storage.attempts(setting.one.delivery_id)) == 1


async def test_claims_of_the_time_before_cost_nothing_and_their_leases_are_freed(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage = setting.storage
        await storage.settle([setting.world.outcome(setting.one), setting.world.outcome(setting.other)])
        setting.proxy.on_message = at_statement("claim_1", Action.CUT_AFTER)
        with pytest.raises(StorageUnavailable):
            await storage.claim(REQUEST)
        await storage.close()
        await storage.open(setting.world.clock)
        before = storage.transactions
        assert (await storage.claim(REQUEST)).leases == []
        assert storage.transactions == before + 1
        assert await storage.acquire()
        assert (await storage.claim(REQUEST)).leases
