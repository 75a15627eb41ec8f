"""The proxy does to a driver's connections what it says."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.conftest import until
from tests.postgres.proxy import Action, Proxy, at_number, at_statement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.postgres.wire import Message

GONE = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)
"""What a driver raises whose connection is lost."""

AT_ONCE = 0.1
"""Seconds after which what hangs is held to hang."""


class Table:
    """A table of one test's, looked at past the proxy."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._dsn = dsn
        self.name = f"{schema}.t"
        self._make = f"CREATE SCHEMA {schema}; CREATE TABLE {self.name} (n int)"

    async def make(self) -> None:
        """Make it."""
        await self._ask(self._make)

    async def rows(self) -> list[int]:
        """Return what is in it."""
        return [row["n"] for row in await self._ask(f"SELECT n FROM {self.name} ORDER BY n")]

    async def sessions(self) -> int:
        """Count the sessions that `connected` made for it and that are there."""
        return len(await self._ask(f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{self.name}'"))

    async def _ask(self, sql: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self._dsn)
        try:
            if sql.startswith("SELECT"):
                return await connection.fetch(sql)
            await connection.execute(sql)
            return []
        finally:
            await connection.close()


@pytest.fixture
async def table(postgres_dsn: str, postgres_schema: str) -> Table:
    made = Table(postgres_dsn, postgres_schema)
    await made.make()
    return made


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_dsn) as running:
        yield running


@asynccontextmanager
async def connected(proxy: Proxy, table: Table | None = None) -> AsyncIterator[asyncpg.Connection]:
    """Connect through the proxy, and leave nothing behind, whatever became of the connection."""
    name = "" if table is None else table.name
    connection = await asyncpg.connect(proxy.dsn, server_settings={"application_name": name})
    try:
        yield connection
    finally:
        connection.terminate()


async def insert(connection: asyncpg.Connection, table: Table, number: int = 1) -> None:
    """In a transaction of its own, with a prepared statement."""
    async with connection.transaction():
        await connection.execute(f"INSERT INTO {table.name} VALUES ($1)", number)


async def hangs(connection: asyncpg.Connection) -> bool:
    """Whether a question is not answered."""
    asked = asyncio.create_task(connection.fetchval("SELECT 1"))
    await asyncio.wait([asked], timeout=AT_ONCE)
    hung = not asked.done()
    connection.terminate()
    with suppress(*GONE):
        await asked
    return hung


async def test_it_passes_everything_and_numbers_the_messages(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        await insert(connection, table)
        assert await connection.fetchval("SELECT repeat('x', 3000000)") == "x" * 3_000_000
        await connection.close()
    assert await table.rows() == [1]
    assert [message.number for message in proxy.messages] == list(range(1, len(proxy.messages) + 1))
    assert proxy.messages[0].kind == "startup"
    assert proxy.messages[-1].kind == "X"
    assert [message.sql for message in proxy.messages if message.runs][:3] == [
        "BEGIN;",
        f"INSERT INTO {table.name} VALUES ($1)",
        "COMMIT;",
    ]
    assert proxy.to_client.passed > 3_000_000
    await until(lambda: proxy.connections == 0)


async def test_cut_before_the_commit_leaves_no_row(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        proxy.on_message = at_statement("COMMIT", Action.CUT_BEFORE)
        with pytest.raises(GONE):
            await insert(connection, table)
    await until(lambda: _none(table))
    assert await table.rows() == []


async def test_cut_after_the_commit_leaves_the_row(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        proxy.on_message = at_statement("COMMIT", Action.CUT_AFTER)
        with pytest.raises(GONE):
            await insert(connection, table)
        assert await table.rows() == [1]
    async with connected(proxy, table) as connection:
        await insert(connection, table, 2)
    assert await table.rows() == [1, 2]


async def test_cut_at_the_nth_statement_of_a_kind(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        proxy.on_message = at_statement("INSERT", Action.CUT_BEFORE, nth=3)
        await insert(connection, table, 1)
        await insert(connection, table, 2)
        with pytest.raises(GONE):
            await insert(connection, table, 3)
    assert await table.rows() == [1, 2]


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_cut_at_any_message_leaves_all_or_nothing(proxy: Proxy, table: Table, action: Action) -> None:
    async with connected(proxy, table) as connection:
        await insert(connection, table, 0)
        counted = list(proxy.messages)
    assert counted[-1].sql == "COMMIT;"
    for at in range(1, len(counted) + 1):
        await until(lambda: proxy.connections == 0)  # a goodbye is a message too
        proxy.messages.clear()
        proxy.on_message = at_number(at, action)
        with pytest.raises(GONE):
            async with connected(proxy, table) as connection:
                await insert(connection, table, at)
        await until(lambda: _none(table))
        done = at == len(counted) and action is Action.CUT_AFTER
        assert (at in await table.rows()) == done, counted[at - 1]


async def test_a_message_can_be_left_without_its_answer(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        proxy.on_message = at_statement("COMMIT", Action.HANG_AFTER)
        asked = asyncio.create_task(insert(connection, table))
        await until(lambda: _there(table, 1))
        assert not asked.done()
        proxy.reset()
        with pytest.raises(GONE):
            await asked


async def test_a_message_can_be_left_on_the_way(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        proxy.on_message = at_statement("COMMIT", Action.HANG_BEFORE)
        asked = asyncio.create_task(insert(connection, table))
        await until(lambda: any("COMMIT" in message.sql for message in proxy.messages))
        connection.terminate()
        with pytest.raises(GONE):
            await asked
    assert await table.sessions() == 1  # the server was not told
    assert await table.rows() == []
    proxy.reset()
    await until(lambda: _none(table))


@pytest.mark.parametrize("way", ["to_server", "to_client"])
async def test_what_is_dropped_hangs_the_client(proxy: Proxy, way: str) -> None:
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        getattr(proxy, way).drop()
        assert await hangs(connection)
    with pytest.raises(TimeoutError):
        await asyncpg.connect(proxy.dsn, timeout=AT_ONCE)
    getattr(proxy, way).flow()
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_close_that_is_dropped_is_not_seen_by_the_server(proxy: Proxy, table: Table) -> None:
    async with connected(proxy, table) as connection:
        await insert(connection, table)
        proxy.to_server.drop()
    assert await table.sessions() == 1
    proxy.to_server.flow()
    await until(lambda: _none(table))


async def test_a_reset_raises_in_the_client(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        asked = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        await until(lambda: "pg_sleep" in proxy.messages[-1].sql)
        proxy.reset()
        with pytest.raises(GONE):
            await asked
        with pytest.raises(GONE):
            await connection.execute("SELECT 1")


@pytest.mark.parametrize("way", ["to_server", "to_client"])
async def test_a_delay_delays(proxy: Proxy, way: str) -> None:
    async with connected(proxy) as connection:
        getattr(proxy, way).delay = 0.2
        began = time.monotonic()
        assert await connection.fetchval("SELECT 1") == 1
        assert time.monotonic() - began >= 0.2


async def test_new_connections_are_refused_and_old_ones_live_on(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncpg.connect(proxy.dsn)
        assert await connection.fetchval("SELECT 1") == 1
        await proxy.accept()
        async with connected(proxy) as another:
            assert await another.fetchval("SELECT 1") == 1
    assert proxy.accepted == 2


@pytest.mark.parametrize("way", ["to_server", "to_client"])
async def test_a_connection_is_cut_after_so_many_bytes(proxy: Proxy, way: str) -> None:
    async with connected(proxy) as connection:
        direction = getattr(proxy, way)
        passed, direction.cut_after = direction.passed, 9
        with pytest.raises(GONE):
            await connection.fetchval("SELECT 1")
        assert direction.passed == passed + 9
        assert direction.cut_after is None
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_client_that_asks_for_encryption_is_told_that_there_is_none(proxy: Proxy) -> None:
    connection = await asyncpg.connect(proxy.dsn, ssl="prefer")
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_no_server_is_what_the_client_sees_too() -> None:
    async with Proxy("postgresql://postgres@/postgres?host=/nowhere") as proxy:
        with pytest.raises(GONE):
            await asyncpg.connect(proxy.dsn)


async def test_an_error_of_the_tests_own_is_not_lost(postgres_dsn: str) -> None:
    def asked(message: Message) -> None:
        raise LookupError(message)

    with pytest.raises(LookupError):
        async with Proxy(postgres_dsn) as proxy:
            proxy.on_message = asked
            with pytest.raises(GONE):
                await asyncpg.connect(proxy.dsn)


async def _none(table: Table) -> bool:
    return await table.sessions() == 0


async def _there(table: Table, number: int) -> bool:
    return number in await table.rows()
