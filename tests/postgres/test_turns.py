"""A settle and the claim that is asked for with it: one call where it can be, and each for itself where not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import DeliveryState, StorageClosed, StorageError
from hookwright._models import AttemptRecord, Claim, Outcome, Settled
from hookwright.storage._base import ClaimRequest
from hookwright.storage.postgres._pool import CommitLost
from tests.conftest import until
from tests.postgres.cutting import Cut, Scene, outcome, scene, waiting
from tests.postgres.proxy import Action

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from hookwright.storage.postgres import PostgresStorage

REQUEST = ClaimRequest(9, 9, 60_000_000, 4, {})


def _results(scene: Scene) -> list[Outcome]:
    return [scene.world.outcome(lease) for lease in (scene.one, scene.other)]


async def _together(storage: PostgresStorage, results: list[Outcome]) -> tuple[list[Settled], Claim]:
    return await asyncio.gather(storage.settle(results), storage.claim(REQUEST))


async def test_a_settle_and_the_claim_asked_for_with_it_are_one_transaction(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, before = setting.storage, setting.storage.transactions
        settled, claim = await _together(storage, _results(setting))
        assert storage.transactions == before + 1
        assert [(each.held, each.proven) for each in settled] == [(True, True), (True, True)]
        assert [lease.endpoint_id for lease in claim.leases] == [setting.endpoint.id]
        for lease in (setting.one, setting.other):
            delivery = await storage.get_delivery(lease.delivery_id)
            assert (delivery.state, delivery.attempt_count) == (DeliveryState.SUCCEEDED, 1)
        # Each lease is settled once, whoever takes the result along.
        again, claim = await _together(storage, _results(setting))
        assert [each.held for each in again] == [False, False]
        assert claim.leases == []


async def test_a_settle_without_a_claim_goes_alone_and_so_does_what_is_no_success(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, world = setting.storage, setting.world
        assert [each.held for each in await storage.settle([world.outcome(setting.one)])] == [True]
        before = storage.transactions
        failed = world.outcome(setting.other, DeliveryState.PENDING, retry_in=1_000_000)
        [settled], claim = await _together(storage, [failed])
        assert (settled.held, len(claim.leases)) == (True, 1)
        assert storage.transactions == before + 2


async def test_what_was_asked_for_before_is_done_before_a_claim_and_no_settle_waits_for_it(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, world = setting.storage, setting.world
        cancelling = asyncio.ensure_future(storage.cancel([d.id for d in await world.deliveries()]))
        await asyncio.sleep(0)
        settled, claim = await _together(storage, _results(setting))
        assert await cancelling
        assert claim.leases == []  # it saw that all were cancelled
        assert len(settled) == 2


async def test_a_lane_that_somebody_holds_keeps_the_claim_from_nothing_and_its_settle_waits(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, other, schema = setting.storage, setting.direct.connection, postgres_schema
        held = setting.other.endpoint_id
        await other.execute(f"BEGIN; SELECT 1 FROM {schema}.lane WHERE endpoint_id = '{held}' FOR UPDATE")
        settling = asyncio.ensure_future(storage.settle(_results(setting)))
        claim = await asyncio.ensure_future(storage.claim(REQUEST))  # asked for after it
        # Their leases are over, and yet nobody takes over what is being settled.
        assert [(lease.endpoint_id, lease.taken_over) for lease in claim.leases] == [(setting.one.endpoint_id, False)]
        await until(lambda: waiting(other, None, 1))
        assert not settling.done()
        await other.execute("COMMIT")
        assert [each.held for each in await settling] == [True, True]


async def test_a_result_that_the_database_refuses_stops_no_claim(postgres_dsn: str, postgres_schema: str) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage = setting.storage
        impossible = AttemptRecord(setting.world.clock.now(), 5, status=2**40)
        refused = setting.world.outcome(setting.other)._replace(attempt=impossible)
        settling = asyncio.ensure_future(outcome(storage.settle([refused]), StorageError))
        claim = await asyncio.ensure_future(storage.claim(REQUEST))  # asked for after it
        assert [lease.endpoint_id for lease in claim.leases] == [setting.one.endpoint_id]
        assert type(await settling) is StorageError
        assert [each.held for each in await storage.settle([setting.world.outcome(setting.other)])] == [True]


async def test_a_claim_that_is_cancelled_leaves_the_settle_its_answer_and_its_leases_to_the_next(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, other, wake = setting.storage, setting.direct.connection, f"{postgres_schema}.wake"
        await other.execute(f"BEGIN; LOCK TABLE {wake} IN ACCESS EXCLUSIVE MODE")
        settling = asyncio.ensure_future(storage.settle(_results(setting)))
        claiming = asyncio.ensure_future(storage.claim(REQUEST))
        await until(lambda: waiting(other, wake, 1))
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        await other.execute("COMMIT")
        assert [each.held for each in await settling] == [True, True]
        [lease] = (await storage.claim(REQUEST)).leases
        assert (lease.number, lease.interruptions, lease.taken_over) == (1, 0, False)


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_cut_leaves_both_unknown_and_each_is_done_once(
    postgres_dsn: str, postgres_schema: str, action: Action
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, results = setting.storage, _results(setting)
        await storage.claim(REQUEST._replace(limit=0))  # there is a connection
        cut = setting.proxy.on_message = Cut(setting.proxy, 1, action, single=True)
        asked: list[Awaitable[Any]] = [storage.settle(results), storage.claim(REQUEST)]
        answers = await asyncio.gather(*(outcome(each, StorageError) for each in asked))
        assert cut.struck
        assert [type(answer) for answer in answers] == [CommitLost, CommitLost]
        setting.proxy.on_message = None
        settled, claim = await _together(storage, results)
        assert [each.held for each in settled] == [True, True]
        [lease] = claim.leases
        assert (lease.number, lease.interruptions, lease.taken_over) == (1, 0, False)
        for each in (setting.one, setting.other):
            assert [attempt.number for attempt in await storage.attempts(each.delivery_id)] == [1]


async def test_where_it_cannot_connect_each_goes_alone(postgres_dsn: str, postgres_schema: str) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage = setting.storage
        assert storage._open is not None
        for pool in storage._open.pool._pools or ():
            await pool.expire_connections()
        cut = setting.proxy.on_message = Cut(setting.proxy, 0, Action.CUT_BEFORE)
        settled, claim = await _together(storage, _results(setting))
        assert cut.struck
        assert [each.held for each in settled] == [True, True]
        assert [lease.taken_over for lease in claim.leases] == [False]


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_closing_answers_both(postgres_dsn: str, postgres_schema: str, turns: int) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage = setting.storage
        asked: list[Awaitable[Any]] = [storage.settle(_results(setting)), storage.claim(REQUEST)]
        answers = [asyncio.ensure_future(outcome(each, StorageError)) for each in asked]
        for _ in range(turns):
            await asyncio.sleep(0)
        await storage.close()
        settled, claim = await asyncio.gather(*answers)
        assert isinstance(settled, StorageClosed) or [each.held for each in settled] == [True, True]
        assert isinstance(claim, StorageClosed) or claim.leases
