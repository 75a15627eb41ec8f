"""Connections and servers that end under load: nothing is lost, and delivering goes on by itself."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import asyncpg

from tests.postgres.load import loaded, outage
from tests.postgres.server import SETTINGS, own_server

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.postgres.load import Load

    Record = Callable[[str, object], None]

EVENTS = 200
"""Each goes to four endpoints."""

FAULTS = 5

RESUMED = 2.0


async def test_backends_that_are_terminated_at_random_moments_lose_nothing(
    postgres_dsn: str, postgres_schema: str, record_property: Record
) -> None:
    async with loaded(postgres_dsn, postgres_schema, concurrency=64) as load:
        emitting = asyncio.ensure_future(load.emit(EVENTS))
        await _terminate_often(load, postgres_dsn, Random(7), emitting)
        await emitting
        await load.finish()
        record_property("backends terminated, and repeats", (load.faults, load.repeats))
        assert load.faults >= FAULTS
        assert load.repeats == 0  # results are kept until they are written
        assert load.given_again == 0  # within their patience


async def _terminate_often(load: Load, dsn: str, chance: Random, emitting: asyncio.Future[None]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        while not emitting.done() or load.faults < FAULTS:  # on a quick machine it goes on while it delivers
            await asyncio.wait({emitting}, timeout=chance.random() * 0.2)
            load.note_fault()
            await connection.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", load.pids)
    finally:
        connection.terminate()


async def test_a_server_that_is_stopped_at_once_and_restarted_loses_nothing(record_property: Record) -> None:
    with own_server(SETTINGS | {"fsync": "on"}) as server:
        async with loaded(server.dsn, concurrency=64) as load:
            emitting = asyncio.ensure_future(load.emit(EVENTS))
            for received in (100, 300):
                await load.inbox.wait_for(received, timeout=20)
                load.note_fault()
                await asyncio.to_thread(server.restart, immediate=True)
            await emitting
            await load.finish()
            record_property("immediate restarts: repeats, slowest emit", (load.repeats, load.slowest_emit))


async def test_after_an_outage_delivering_and_emitting_resume_within_two_seconds(record_property: Record) -> None:
    found = await outage(4.0, events=100)
    record_property("outage", str(found))
    assert found.delivering_after < RESUMED
    assert found.emitting_after < RESUMED
    assert found.repeats <= 16  # what was in flight: a claim is not flushed before it is sent
    assert found.state_while == "degraded"
