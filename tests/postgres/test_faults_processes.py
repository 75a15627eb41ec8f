"""Processes that stand still or die while others deliver from the same schema, in a time that runs faster."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import Clock, Dispatcher, NetworkPolicy
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import Inbox
from tests.conftest import until
from tests.faults.fast import FastClock
from tests.faults.processes import Child, child
from tests.faults.test_processes import ENDPOINTS, Slow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Record = Callable[[str, object], None]

TIMES = 20
LEASE = 60.0

# As FastClock: the leases of a minute end after three seconds.
_FAST = """
CREATE OR REPLACE FUNCTION {schema}.clock() RETURNS bigint LANGUAGE sql VOLATILE PARALLEL SAFE AS
$$SELECT 1800000000000000 + ((extract(epoch FROM clock_timestamp()) - {origin}) * 1000000 * {times})::bigint$$
"""


class World:
    """A schema whose time runs faster, and who looks into it."""

    def __init__(self, dsn: str, schema: str, connection: asyncpg.Connection) -> None:
        self.dsn = dsn
        self.schema = schema
        self.origin = time.monotonic_ns()
        self.clock = FastClock(self.origin, TIMES)
        self._connection = connection

    def operator(self) -> Dispatcher:
        """Return a dispatcher that does not deliver."""
        storage, network = PostgresStorage(self.dsn, schema=self.schema), NetworkPolicy.development()
        return Dispatcher(storage, network=network, keys=[], clock=self.clock, deliver=False)

    def process(self) -> Any:
        """Start a process that delivers."""
        return child("postgres", self.dsn, self.schema, self.origin, TIMES)

    async def look(self, sql: str) -> Counter[Any]:
        """Return how often each value is there."""
        return Counter(row[0] for row in await self._connection.fetch(sql.format(schema=self.schema)))

    async def states(self) -> Counter[Any]:
        """Return how many deliveries are in each state."""
        return await self.look("SELECT state FROM {schema}.delivery")


@pytest.fixture
async def world(postgres_dsn: str, postgres_schema: str) -> AsyncIterator[World]:
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    await storage.open(Clock())
    await storage.close()
    connection = await asyncpg.connect(postgres_dsn)
    try:
        made = World(postgres_dsn, postgres_schema, connection)
        await connection.execute(_FAST.format(schema=postgres_schema, origin=time.time(), times=TIMES))
        yield made
    finally:
        await connection.close()


@asynccontextmanager
async def subscribed(world: World) -> AsyncIterator[tuple[Slow, Inbox, Dispatcher]]:
    async with Inbox() as inbox, world.operator() as operator:
        for number in range(ENDPOINTS):
            await operator.endpoints.create(inbox.url_for(f"/{number}"), events=["*"])
        yield Slow(inbox), inbox, operator


async def health(process: Child) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await process.ask("health"))
    return found


async def test_when_one_stands_still_for_twice_its_leases_another_takes_over(
    world: World, record_property: Record
) -> None:
    async with subscribed(world) as (slow, inbox, _), world.process() as first:
        await first.hear("started")
        await first.ask("emit evt_1")
        await inbox.wait_for(ENDPOINTS)
        async with world.process() as second:
            await second.hear("started")
            first.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            await second.ask("emit evt_2")
            slow.answer()
            await until(lambda: _all(world, 2 * ENDPOINTS), 20)
            record_property("SIGSTOP: taken over after (of a lease)", (time.monotonic() - stopped) * TIMES / LEASE)
            await until(lambda: time.monotonic() - stopped > 2 * LEASE / TIMES)
            first.signal(signal.SIGCONT)
            # Its late results are refused; it notices, and goes on.
            await until(lambda: _lost(first, ENDPOINTS), 20)
            await first.ask("emit evt_3")
            await until(lambda: _all(world, 3 * ENDPOINTS), 20)
            now = await health(first)
            assert (now["state"], now["in_flight"], (await health(second))["lost_leases"]) == ("healthy", 0, 0)
    # One repeat for each that was in flight, and none beside.
    once = {(f"/{n}", f"evt_{event}"): 1 for n in range(ENDPOINTS) for event in (2, 3)}
    assert slow.sent == once | {(f"/{n}", "evt_1"): 2 for n in range(ENDPOINTS)}
    assert await world.look("SELECT error FROM {schema}.attempt") == {"interrupted": ENDPOINTS, None: 3 * ENDPOINTS}


async def test_when_one_is_killed_whoever_starts_takes_over_at_once(world: World, record_property: Record) -> None:
    async with subscribed(world) as (slow, inbox, _), world.process() as first:
        await first.hear("started")
        await first.ask("emit evt_1")
        await inbox.wait_for(ENDPOINTS)
        first.signal(signal.SIGKILL)
        await first.ended()
        killed = time.monotonic()
        slow.answer()
        async with world.process() as second:
            await second.hear("started")
            started = time.monotonic()
            await until(lambda: _all(world, ENDPOINTS), 20)
            record_property("SIGKILL: all delivered after the next start", time.monotonic() - started)
            assert time.monotonic() - killed < LEASE  # and not after the lease
    assert set(slow.sent.values()) == {2}


async def _all(world: World, count: int) -> bool:
    return await world.states() == {"succeeded": count}


async def _lost(process: Child, count: int) -> bool:
    return bool((await health(process))["lost_leases"] == count)
