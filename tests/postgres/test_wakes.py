"""What is committed while a lane changes hands is seen by who has it next."""

from __future__ import annotations

import asyncio

import asyncpg

from hookwright import DeliveryState
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing._storage_contract_base import ManualClock, World
from tests.conftest import until
from tests.postgres.cutting import scene, waiting

SLEEPER = """
CREATE OR REPLACE FUNCTION {schema}.clock() RETURNS bigint LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF current_setting('hookwright.wait', true) = 'yes' THEN
        PERFORM set_config('hookwright.wait', 'no', false);
        PERFORM pg_advisory_lock(4711);
        PERFORM pg_advisory_unlock(4711);
    END IF;
    RETURN (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
END $$
"""
CLAIM = "SELECT * FROM {schema}.claim_1(10, 10, 100, 60000000, 4, '{{}}', '{{}}', '{{}}', '{{}}', $1, 7, false)"


async def test_a_wake_is_not_lost_to_a_claim_that_moved_the_lane_on(postgres_dsn: str, postgres_schema: str) -> None:
    claim = CLAIM.format(schema=postgres_schema)
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    first, second, admin = [await asyncpg.connect(postgres_dsn) for _ in range(3)]
    world = World(storage, ManualClock())
    await storage.open(world.clock)
    try:
        assert await storage.acquire()
        endpoint = await world.endpoint()
        await world.prove(endpoint, 3)
        await world.emit(endpoint)
        await world.emit(endpoint)
        assert len((await world.claim(limit=1)).leases) == 1  # the lane is left early: it has another row

        transaction = first.transaction()
        await transaction.start()
        assert len(await first.fetch(claim, "a.")) == 2  # that row, and the summary: the lane is moved on
        await world.emit(endpoint)
        await admin.execute(SLEEPER.format(schema=postgres_schema))
        await admin.execute("SELECT pg_advisory_lock(4711)")
        await second.execute("SET hookwright.wait = 'yes'")
        looking = asyncio.create_task(second.fetch(claim, "b."))
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 4711"
        await until(lambda: admin.fetchval(waits))
        await transaction.commit()
        await admin.execute("SELECT pg_advisory_unlock(4711)")
        found = len(await looking) - 1
        found += len(await first.fetch(claim, "c.")) - 1
        assert found == 1
    finally:
        for connection in (first, second, admin):
            await connection.close()
        await storage.close()


async def test_an_endpoint_that_is_deleted_while_its_last_result_waits_for_the_lane_stays_deleted(
    postgres_dsn: str, postgres_schema: str
) -> None:
    """The result, which would disable it, began before: what it read of the endpoint then is not true any more."""
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, world, other = setting.storage, setting.world, setting.direct.connection
        endpoint = setting.endpoint.id
        await world.emit(endpoint)
        lane = f"{postgres_schema}.lane WHERE endpoint_id = '{endpoint}'"
        await other.execute(f"BEGIN; SELECT 1 FROM {lane} FOR UPDATE")
        deleting = asyncio.ensure_future(storage.delete_endpoint(endpoint))
        await until(lambda: waiting(other, None, 1))
        gone = world.outcome(setting.one, DeliveryState.FAILED, gone=True)
        settling = asyncio.ensure_future(storage.settle([gone]))
        await until(lambda: waiting(other, None, 2))
        await other.execute("COMMIT")
        await deleting
        [settled] = await settling
        assert (settled.held, settled.stopped, settled.reason) == (True, True, None)
        while await storage.sweep():
            pass
        assert await other.fetchval(f"SELECT count(*) FROM {lane}") == 0
        states = {delivery.state for delivery in await world.deliveries() if delivery.endpoint_id == endpoint}
        assert states == {DeliveryState.FAILED, DeliveryState.CANCELLED}
