"""Opening and migrating: by several at once, cut anywhere, under any name, and while the version before goes on."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import Clock, Dispatcher, NewEvent, StorageError
from hookwright.storage.postgres import PostgresStorage, _schema
from hookwright.testing import FakeTransport
from hookwright.testing._storage_contract_base import ManualClock, World
from tests.conftest import URL, until
from tests.postgres.cutting import Cut
from tests.postgres.proxy import Action, Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROOT = Path(__file__).parents[2]

_OPEN = """
import asyncio, sys
from hookwright import Clock
from hookwright.storage.postgres import PostgresStorage

async def main():
    storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
    sys.stdin.readline()
    await storage.open(Clock())
    assert await storage.acquire()
    print((await storage.changes(0)).revision)
    await storage.close()

asyncio.run(main())
"""


@pytest.fixture
async def admin(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def test_five_processes_that_open_a_fresh_schema_at_once(postgres_dsn: str, postgres_schema: str) -> None:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-c", _OPEN, postgres_dsn, postgres_schema]
    processes = [
        await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT) for _ in range(5)
    ]
    told = await asyncio.wait_for(asyncio.gather(*(process.communicate(b"go\n") for process in processes)), 60)
    assert [(process.returncode, *answer) for process, answer in zip(processes, told, strict=True)] == [
        (0, b"0\n", b"")
    ] * 5


async def test_ten_storages_that_open_a_fresh_schema_at_once(postgres_dsn: str, postgres_schema: str) -> None:
    storages = [PostgresStorage(postgres_dsn, schema=postgres_schema) for _ in range(10)]
    await asyncio.gather(*(storage.open(Clock()) for storage in storages))
    assert all(await asyncio.gather(*(storage.acquire() for storage in storages)))
    await asyncio.gather(*(storage.close() for storage in storages))


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_migration_cut_at_any_statement_is_all_or_nothing(
    postgres_dsn: str, new_schema: Callable[[], str], admin: asyncpg.Connection, action: Action
) -> None:
    number, struck = 0, True
    async with Proxy(postgres_dsn) as proxy:
        while struck:
            number, schema = number + 1, new_schema()
            proxy.messages.clear()
            cut = proxy.on_message = Cut(proxy, number, action, logins=True)
            cut.listening.clear()
            storage = PostgresStorage(proxy.dsn, schema=schema)
            try:
                await storage.open(Clock())
            except StorageError:
                tables = await admin.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = $1", schema)
                assert tables in (0, 8), cut
            proxy.on_message, struck = None, cut.struck
            if struck:
                await storage.close()
                await storage.open(Clock())
            assert (await storage.changes(0)).revision == 0
            await storage.close()
    assert number > 3


@pytest.mark.parametrize("name", ['With "quotes" and \'', "Ünïcode ☃", "select", "a.b", "x" * 63])
async def test_a_schema_may_have_any_name(postgres_dsn: str, admin: asyncpg.Connection, name: str) -> None:
    storage, transport = PostgresStorage(postgres_dsn, schema=name), FakeTransport()
    quoted = name.replace('"', '""')
    try:
        async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
            await dispatcher.endpoints.create(URL, events=["*"])
            await dispatcher.emit_many([NewEvent("video.ready", number) for number in range(3)])
            await until(lambda: len(transport.requests) == 3)
            await dispatcher.drain()
            assert await dispatcher.deliveries.count(status="succeeded") == 3
        assert await admin.fetchval(f'SELECT count(*) FROM "{quoted}".event') == 3
    finally:
        await admin.execute(f'DROP SCHEMA IF EXISTS "{quoted}" CASCADE')


_SECOND = """
ALTER TABLE hookwright.delivery ADD COLUMN priority integer NOT NULL DEFAULT 0;
ALTER TABLE hookwright.lane ADD COLUMN weight integer NOT NULL DEFAULT 1;
ALTER TABLE hookwright.event ADD COLUMN source text;
CREATE INDEX delivery_priority ON hookwright.delivery (priority, id) WHERE priority > 0;
"""


class Newer:
    """Makes the version that follows: schema 2, which version 1 may go on beside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._script: Any = _schema._script

    def on(self) -> None:
        """From now on whoever opens is of the next version."""
        self._patch.setattr(_schema, "SCHEMA", 2)
        self._patch.setattr(_schema, "_script", lambda number: _SECOND if number == 2 else self._script(number))

    def off(self) -> None:
        """From now on whoever opens is of this version."""
        self._patch.setattr(_schema, "SCHEMA", 1)


async def test_the_next_version_migrates_while_this_one_goes_on(
    postgres_dsn: str, postgres_schema: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, transport = Newer(monkeypatch), FakeTransport()
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    async with Dispatcher(storage, transport=transport, keys=[]) as old:
        for number in range(4):
            await old.endpoints.create(f"{URL}/{number}", events=["*"])
        numbers, emitted, migrated = itertools.count(), 0, asyncio.Event()

        async def emit() -> None:
            nonlocal emitted
            while not migrated.is_set():
                await old.emit("video.ready", idempotency_key=f"{next(numbers)}")
                emitted += 1

        emitting = [asyncio.ensure_future(emit()) for _ in range(3)]
        await until(lambda: len(transport.requests) > 20)
        newer.on()
        upgraded = PostgresStorage(postgres_dsn, schema=postgres_schema)
        await upgraded.open(ManualClock())
        assert await upgraded.acquire()
        newer.off()
        at = len(transport.requests)
        await until(lambda: len(transport.requests) > at + 20)
        migrated.set()
        await asyncio.gather(*emitting)
        await old.drain()
        assert len(transport.requests) == 4 * emitted
        assert await admin.fetchval(f"SELECT value FROM {postgres_schema}.meta WHERE key = 'schema'") == 2
    await _use(World(upgraded, ManualClock()))
    await upgraded.close()
    again = PostgresStorage(postgres_dsn, schema=postgres_schema)  # this version, started after the upgrade
    await again.open(ManualClock())
    await _use(World(again, ManualClock()))
    await again.close()
    found = {row[0]: row[1] for row in await admin.fetch(f"SELECT key, value FROM {postgres_schema}.meta")}
    assert (found["schema"], found["compatible"]) == (2, 1)


async def _use(world: World) -> None:
    """Emit, claim and settle."""
    endpoint = (await world.storage.changes(0)).endpoints[0]
    stamp = f"{id(world)}"
    event, row = world.new_event(id=f"evt_{stamp}"), world.new_delivery(endpoint.id)._replace(id=f"dlv_{stamp}")
    await world.enqueue(event, row)
    lease = next(lease for lease in (await world.claim()).leases if lease.delivery_id == row.id)
    assert (await world.settle(lease)).held


async def test_what_this_version_leaves_alone_of_a_later_schema_stays(
    postgres_dsn: str, postgres_schema: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Newer(monkeypatch)
    newer.on()
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    await storage.open(Clock())
    await storage.close()
    newer.off()
    before = await admin.fetch(f"SELECT * FROM {postgres_schema}.meta ORDER BY key")
    await storage.open(Clock())
    await storage.close()
    assert await admin.fetch(f"SELECT * FROM {postgres_schema}.meta ORDER BY key") == before
