"""The short forms; `python -m tests.stress` is the long one. And what the laws of the tables notice."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest

from hookwright import Clock, EndpointState, PostgresStorage
from tests.crash.databases import PostgresDatabases
from tests.postgres.several import Process
from tests.stress._deliveries import Deliveries, told
from tests.stress._laws import broken
from tests.stress._stress import SCHEMA, Options, Stress, table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def database(postgres_dsn: str, tmp_path: Path) -> Iterator[str]:
    """A database of its own: deadlocks are counted for a whole one."""
    with PostgresDatabases(postgres_dsn).new(tmp_path) as made:
        yield made.url


async def test_two_processes_deliver_each_exactly_once(database: str) -> None:
    counted = await Deliveries(database, 2000, 2, print).run()
    assert counted.broken == [], told(counted)
    assert counted.repeated == counted.missing == 0


async def test_nothing_is_lost_when_one_of_three_is_killed(database: str) -> None:
    counted = await Deliveries(database, 3000, 3, print, kills=1).run()
    assert counted.broken == [], told(counted)
    assert counted.kills == 1


async def test_processes_that_do_everything_at_once_break_no_law(database: str) -> None:
    figures = await Stress(Options(database, processes=2, seconds=8.0, kill_every=0.0), print).run()
    assert figures.broken == [], table(figures)
    assert figures.counts["claim"] > 0


@asynccontextmanager
async def _a_lease(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """One row is leased, one waits, one has ended."""
    storage = PostgresStorage(dsn)
    await storage.open(Clock())
    await storage.acquire()
    process = Process("a", storage)
    endpoint = await process.endpoint()
    await process.emit(endpoint)
    await process.settle(await process.claim_one())
    await process.emit_many(2, endpoint)
    await process.claim_one(limit=1)
    await process.endpoint(state=EndpointState.PAUSED)
    connection = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA})
    yield connection
    await connection.close()
    await storage.close()


@pytest.mark.parametrize(
    ("law", "sql"),
    [
        ("what is pending", "UPDATE delivery SET available_at = 0 WHERE state = 'succeeded'"),
        ("no lease without", "UPDATE lease SET delivery_id = (SELECT id FROM delivery WHERE state = 'succeeded')"),
        ("attempt_count", "DELETE FROM attempt"),
        ("a lease knows", "UPDATE lease SET attempt_count = 1"),
        ("an event has", "DELETE FROM delivery WHERE state = 'succeeded'"),
        ("no delivery without", "DELETE FROM event"),
        ("a lane is early", f"UPDATE lane SET due_at = {2**61}"),
        ("what waits for", "UPDATE endpoint SET state = 'disabled'"),
        ("a lane is as open", "UPDATE lane SET hold_until = 0"),
        ("the counter", "UPDATE endpoint SET revision = 9"),
    ],
)
async def test_a_law_that_is_broken_is_noticed(database: str, law: str, sql: str) -> None:
    async with _a_lease(database) as connection:
        assert await broken(connection, SCHEMA) == []
        await connection.execute(sql)
        assert any(found.startswith(law) for found in await broken(connection, SCHEMA))


async def test_a_claim_that_was_slow_is_noticed(database: str) -> None:
    stress = Stress(Options(database, processes=0, seconds=0.0), print)
    stress.figures.slowest["claim"] = 5.0
    figures = await stress.run()
    assert figures.broken == ["a claim took 5.0 s"]
