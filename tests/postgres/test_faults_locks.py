"""Somebody else holds locks: verbs end in bounded time and say so, claims pass by, and nobody waits for a neighbour."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import Dispatcher, StorageBusy
from hookwright._models import Lease
from hookwright.storage._emitted import Emitted
from hookwright.storage.postgres import PostgresStorage, _emits, _pool
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.cutting import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hookwright.storage.postgres._database import Database
    from hookwright.testing._storage_contract_base import World

AT_ONCE = 1.0
LOCK_LIMIT = 300
"""Milliseconds, in the place of five seconds."""


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_pool.SETTINGS, "lock_timeout", str(LOCK_LIMIT))
    monkeypatch.setattr(_emits, "PATIENCE", 0.5)


@asynccontextmanager
async def holding(dsn: str, *sql: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("BEGIN")
        for each in sql:
            await connection.execute(each)
        yield connection
    finally:
        connection.terminate()


async def test_a_lane_that_somebody_holds_is_passed_by_and_the_others_are_served(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with opened(postgres_dsn, postgres_schema) as world:
        held, free = await world.endpoint(), await world.endpoint()
        await world.emit(held, free)
        locked = f"SELECT * FROM {postgres_schema}.lane WHERE endpoint_id = '{held}' FOR UPDATE"
        async with holding(postgres_dsn, locked):
            began = time.monotonic()
            claim = await world.claim()
            assert time.monotonic() - began < AT_ONCE
            assert [lease.endpoint_id for lease in claim.leases] == [free]
            assert claim.next_due is not None  # it comes again for the other
            with pytest.raises(StorageBusy, match="holds the lock"):
                await asyncio.wait_for(_settle_something(world, held), 5)
        await until(lambda: _brings(world, held))


async def _settle_something(world: World, endpoint_id: str) -> None:
    lease = Lease("dlv", "t", 0, endpoint_id, "evt", "t", b"", None, 0, 0, 0, 0, 1, 0, 0, False, False)
    await world.storage.settle([world.outcome(lease)])


async def _brings(world: World, endpoint_id: str) -> bool:
    return [lease.endpoint_id for lease in (await world.claim()).leases] == [endpoint_id]


@pytest.mark.parametrize("table", ["event", "delivery", "lane", "lease", "wake", "meta", "endpoint"])
async def test_a_table_that_is_locked_away_makes_verbs_busy_and_nothing_is_lost(
    postgres_dsn: str, postgres_schema: str, table: str
) -> None:
    async with opened(postgres_dsn, postgres_schema) as world:
        endpoint = await world.endpoint()
        await world.emit(endpoint)
        lease = await world.claim_one()
        revision = await world.revision()
        async with holding(postgres_dsn, f"LOCK TABLE {postgres_schema}.{table} IN ACCESS EXCLUSIVE MODE"):
            began = time.monotonic()
            verbs = [
                world.storage.enqueue(world.new_event(), [world.new_delivery(endpoint)], endpoints_revision=revision),
                world.claim(),
                world.storage.settle([world.outcome(lease)]),
                world.storage.release([]),
                world.storage.sweep(),
                world.storage.backlog(),
            ]
            answers = await asyncio.gather(*verbs, return_exceptions=True)
            assert time.monotonic() - began < 0.5 + 8 * LOCK_LIMIT / 1000
            errors = [answer for answer in answers if isinstance(answer, BaseException)]
            assert errors
            assert {type(error) for error in errors} == {StorageBusy}
            assert all("another transaction holds the lock" in str(error) for error in errors)
        before = answers[2]
        [settled] = before if isinstance(before, list) else await world.storage.settle([world.outcome(lease)])
        assert settled.held
        await world.emit(endpoint)
        assert (await world.claim()).leases


async def test_a_transaction_left_open_after_an_emit_with_a_key_holds_up_nobody_else(
    postgres_dsn: str, postgres_schema: str
) -> None:
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    transport = FakeTransport()
    async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        connection = await asyncpg.connect(postgres_dsn)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await dispatcher.emit("video.ready", idempotency_key="k", connection=connection)
            # Ten that want the same key, which must wait, and between them others, which need not.
            same = [asyncio.ensure_future(dispatcher.emit("video.ready", idempotency_key="k")) for _ in range(10)]
            for turn in range(3):
                began = time.monotonic()
                emits = (dispatcher.emit("video.ready", number) for number in range(20))
                await asyncio.wait_for(asyncio.gather(*emits), 5)
                assert time.monotonic() - began < AT_ONCE, turn
            await dispatcher.drain()
            assert len(transport.requests) == 60
            await transaction.rollback()
            answers = await asyncio.gather(*same, return_exceptions=True)
            stored = [answer for answer in answers if not isinstance(answer, StorageBusy)]
            assert [answer for answer in stored if isinstance(answer, BaseException)] == []
            await dispatcher.emit("video.ready", idempotency_key="k")
            await dispatcher.drain()
            assert len(transport.requests) == 61
        finally:
            connection.terminate()


async def test_the_statement_that_others_wait_for_waits_a_moment_only_and_sets_no_limit_for_the_next(
    postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_pool.SETTINGS, "lock_timeout", "5000")
    async with opened(postgres_dsn, postgres_schema) as world:
        endpoint = await world.endpoint()
        event = world.new_event(idempotency_key="k")
        key = f"INSERT INTO {postgres_schema}.event VALUES ('evt', 't', NULL, '', '', 0, 0, 'k', '', 0)"
        emitted = Emitted(event, [world.new_delivery(endpoint)], None)
        storage: Any = world.storage
        pool = storage._open.pool
        async with holding(postgres_dsn, key):
            began = time.monotonic()
            with pytest.raises(StorageBusy):
                await _emits.store_all(pool, [emitted], None, hurried=True)
            assert time.monotonic() - began < AT_ONCE

        async def limit(database: Database) -> object:
            return await database.value("SHOW lock_timeout")

        assert await pool.run(limit, first=True, single=True) == "5s"


async def test_two_transactions_that_emit_the_same_keys_in_opposite_order_hold_up_nobody_else(
    postgres_dsn: str, postgres_schema: str
) -> None:
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    async with Dispatcher(storage, transport=FakeTransport(), keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        one, other = await asyncpg.connect(postgres_dsn), await asyncpg.connect(postgres_dsn)

        async def through(connection: asyncpg.Connection, first: str, second: str, met: asyncio.Barrier) -> None:
            async with connection.transaction():
                await dispatcher.emit("video.ready", idempotency_key=first, connection=connection)
                await met.wait()
                await dispatcher.emit("video.ready", idempotency_key=second, connection=connection)

        try:
            met = asyncio.Barrier(2)
            both = asyncio.gather(through(one, "a", "b", met), through(other, "b", "a", met), return_exceptions=True)
            await until(lambda: met.n_waiting == 0)
            began = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*(dispatcher.emit("video.ready", n) for n in range(20))), 5)
            assert time.monotonic() - began < AT_ONCE
            answers = await asyncio.wait_for(both, 10)
            assert sorted(type(answer).__name__ for answer in answers) == ["NoneType", "StorageBusy"]
            await dispatcher.drain()
            assert await dispatcher.deliveries.count(status="succeeded") == 22
        finally:
            one.terminate()
            other.terminate()
