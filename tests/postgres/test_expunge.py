"""An event with more deliveries than one transaction may hold is expunged, part by part, whatever goes wrong midway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import pytest

from hookwright import DeliveryCancelled, DeliveryState, Dispatcher, StorageBusy, StorageUnavailable
from hookwright._models import AttemptRecord
from hookwright.storage import postgres
from hookwright.storage._base import DeliveryFilter
from hookwright.storage.postgres import PostgresStorage, _pool, _requeue
from hookwright.testing import FakeTransport
from tests.postgres.cutting import opened
from tests.postgres.proxy import Action, Proxy

if TYPE_CHECKING:
    from hookwright._models import EventRow
    from hookwright.testing._storage_contract_base import World
    from tests.postgres.wire import Message

PART = 500
DELIVERIES = 3000
DATA = b'"private"'
PENDING, CANCELLED = (DeliveryFilter(states=(state,)) for state in (DeliveryState.PENDING, DeliveryState.CANCELLED))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_requeue, "EXPUNGE_ROWS", PART)


async def stored(world: World, *endpoint_ids: str, count: int = DELIVERIES) -> tuple[EventRow, list[str]]:
    """Store an event of so many deliveries: for one endpoint after the other, and in parts of equal size."""
    event = world.new_event(data=DATA, attributes='{"a": ["private"]}')
    rows = [world.new_delivery(endpoint) for endpoint in endpoint_ids for _ in range(count // len(endpoint_ids))]
    await world.enqueue(event, *rows)
    return event, [row.id for row in rows]


async def answer(world: World) -> str:
    """Deliver one of them, and return its id."""
    lease = await world.claim_one(limit=1)
    record = AttemptRecord(
        world.clock.now(), 5, 200, detail="x", response_headers=(("a", "b"),), response_body=b"private"
    )
    await world.storage.settle([world.outcome(lease)._replace(attempt=record)])
    return lease.delivery_id


async def nothing_is_left(dsn: str, schema: str, event: EventRow) -> bool:
    """Look past the storage: at what is in the tables, and not what they show."""
    connection = await asyncpg.connect(dsn)
    try:
        [(data, attributes)] = await connection.fetch(
            f"SELECT data, attributes FROM {schema}.event WHERE id = $1", event.id
        )
        waiting = await connection.fetchval(f"SELECT count(*) FROM {schema}.delivery WHERE available_at IS NOT NULL")
        kept = await connection.fetchval(
            f"SELECT count(*) FROM {schema}.attempt WHERE response_headers IS NOT NULL"
            " OR response_body IS NOT NULL OR detail IS NOT NULL"
        )
        return (data, attributes, waiting, kept) == (b"", "{}", 0, 0)
    finally:
        await connection.close()


async def test_three_thousand_deliveries_are_expunged_in_several_transactions(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with opened(postgres_dsn, postgres_schema) as world:
        event, ids = await stored(world, await world.endpoint(), await world.endpoint())
        answered = await answer(world)
        assert isinstance(world.storage, PostgresStorage)
        before = world.storage.transactions
        cancelled = await world.expunge(event.id)
        assert sorted(cancelled) == sorted(set(ids) - {answered})
        assert world.storage.transactions - before == 1 + DELIVERIES // PART  # the last finds no more
        assert await nothing_is_left(postgres_dsn, postgres_schema, event)
        assert await world.storage.count_deliveries(CANCELLED) == DELIVERIES - 1
        [attempt] = await world.storage.attempts(answered)
        assert (attempt.status, attempt.response_body, attempt.response_headers) == (200, b"", ())
        assert await world.expunge(event.id) == []


async def test_what_ended_midway_is_hidden_and_sent_as_it_was_or_not_at_all_and_goes_on_when_given_again(
    postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "PATIENCE", 0.5)
    monkeypatch.setitem(_pool.SETTINGS, "lock_timeout", "500")
    async with opened(postgres_dsn, postgres_schema) as world:
        free, held = await world.endpoint(), await world.endpoint()
        event, ids = await stored(world, free, held)
        answered = {await answer(world) for _ in range(2)}  # one of each
        connection = await asyncpg.connect(postgres_dsn)
        await connection.execute(f"BEGIN; SELECT 1 FROM {postgres_schema}.lane WHERE endpoint_id = '{held}' FOR UPDATE")
        with pytest.raises(StorageBusy):
            await world.expunge(event.id)
        await connection.execute("ROLLBACK")
        await connection.close()

        shown = await world.storage.get_event(event.id)
        assert (shown.data, shown.attributes, shown.expunged_at is None) == (b"", {}, False)
        for delivery_id in answered:
            assert not any(
                attempt.response_body or attempt.response_headers or attempt.detail
                for attempt in await world.storage.attempts(delivery_id)
            )
        cancelled = [id for id in ids[: DELIVERIES // 2] if id not in answered]
        assert [delivery.id for delivery in reversed(await world.deliveries(CANCELLED))] == cancelled
        assert await world.storage.requeue(cancelled, [DeliveryState.CANCELLED]) == 0
        lease = await world.claim_one(limit=1)
        assert (lease.endpoint_id, lease.data) == (held, DATA)

        again = await world.expunge(event.id)
        assert sorted([*cancelled, *answered, *again]) == sorted(ids)
        assert await nothing_is_left(postgres_dsn, postgres_schema, event)
        assert (await world.storage.get_event(event.id)).expunged_at == shown.expunged_at
        assert not (await world.settle(lease)).held
        assert (await world.claim()).leases == []


async def test_who_watches_is_told_of_every_delivery_that_was_cancelled(
    postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requeue, "EXPUNGE_ROWS", 5)
    told: list[str] = []
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
        dispatcher.observe(lambda each: told.append(each.delivery_id), DeliveryCancelled)
        for number in range(12):
            await dispatcher.endpoints.create(f"https://receiver.example/{number}", events=["*"])
        receipt = await dispatcher.emit("video.ready", DATA.decode())
        await dispatcher.events.expunge(receipt.event_id)
        deliveries = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
    assert sorted(told) == sorted(delivery.id for delivery in deliveries)
    assert len(told) == 12


async def test_a_commit_whose_answer_is_lost_anywhere_is_made_good_by_giving_it_again(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with Proxy(postgres_dsn) as proxy, opened(proxy.dsn, postgres_schema) as world:
        endpoint = await world.endpoint()
        number, failed = 0, True
        while failed:
            event, _ = await stored(world, endpoint, count=2 * PART + 1)
            await answer(world)
            failed = await _fails_at_commit(world, proxy, event, number)
            number += failed
            await world.expunge(event.id)
            assert await nothing_is_left(postgres_dsn, postgres_schema, event)
        assert number == 3  # parts


async def _fails_at_commit(world: World, proxy: Proxy, event: EventRow, number: int) -> bool:
    """Expunge, with the answer of that commit lost; False: there were not so many."""
    commits = 0

    def strike(message: Message) -> Action | None:
        nonlocal commits
        commits += message.sql == "COMMIT"
        return Action.CUT_AFTER if message.sql == "COMMIT" and commits == number + 1 else None

    proxy.on_message = strike
    try:
        await world.expunge(event.id)
    except StorageUnavailable:
        return True
    finally:
        proxy.on_message = None
    return False
