"""What the server says, as errors of ours: typed, with advice, and without secrets."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from hookwright import (
    Clock,
    ConfigurationError,
    Dispatcher,
    HookwrightError,
    SchemaTooNew,
    StorageError,
    StorageUnavailable,
)
from hookwright.storage.postgres import PostgresStorage, _convert
from hookwright.testing import FakeTransport
from tests.conftest import URL
from tests.postgres.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PASSWORD = "correct-horse"

STATES = sorted(_convert._BY_STATE)


@pytest.fixture
async def admin(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.parametrize("state", STATES)
async def test_each_state_that_the_server_may_report_becomes_the_error_that_it_is(
    admin: asyncpg.Connection, state: str
) -> None:
    kind, advice = _convert._BY_STATE[state]
    raised = f"{state}999"[:5]
    with pytest.raises(asyncpg.PostgresError) as caught:
        await admin.execute(
            f"DO $$BEGIN RAISE EXCEPTION 'told' USING ERRCODE = '{raised}', DETAIL = '{PASSWORD}'; END$$"
        )
    found = _convert.convert(caught.value)
    assert type(found) is kind
    assert str(found) == f"{advice} (PostgreSQL {raised}: told)"
    assert PASSWORD not in str(found)


async def test_a_state_that_nobody_thought_of_is_a_storage_error(admin: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await admin.execute("SELECT 1 / 0")
    assert type(_convert.convert(caught.value)) is StorageError


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionRefusedError(111, "refused"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    ],
    ids=repr,
)
def test_whatever_says_that_there_is_no_connection_is_unavailable(error: Exception) -> None:
    assert type(_convert.convert(error)) is StorageUnavailable


async def refusal(storage: PostgresStorage) -> HookwrightError:
    with pytest.raises(HookwrightError) as caught:
        await storage.open(Clock())
    await storage.close()
    assert PASSWORD not in f"{caught.value!r} {caught.value} {storage!r}"
    return caught.value


def at(dsn: str, *, user: str = "postgres", database: str = "postgres") -> str:
    url = urlsplit(dsn)
    where = url.netloc.rpartition("@")[2]
    return f"postgresql://{user}:{PASSWORD}@{where}/{database}?{url.query}"


async def test_a_database_that_is_not_there(postgres_dsn: str, postgres_schema: str) -> None:
    error = await refusal(PostgresStorage(at(postgres_dsn, database="nowhere"), schema=postgres_schema))
    assert type(error) is StorageError
    assert "CREATE DATABASE" in str(error)


async def test_a_user_that_is_not_there(postgres_dsn: str, postgres_schema: str) -> None:
    error = await refusal(PostgresStorage(at(postgres_dsn, user="nobody_such"), schema=postgres_schema))
    assert type(error) is StorageError
    assert "pg_hba.conf" in str(error)


async def test_a_server_that_is_not_there(postgres_dsn: str, postgres_schema: str) -> None:
    async with Proxy(postgres_dsn) as proxy:
        await proxy.refuse()
        error = await refusal(PostgresStorage(at(proxy.dsn), schema=postgres_schema))
    assert type(error) is StorageUnavailable
    error = await refusal(PostgresStorage(f"postgresql://u:{PASSWORD}@nowhere.invalid/db", schema=postgres_schema))
    assert type(error) is StorageUnavailable


@pytest.mark.parametrize(
    "dsn", ["mysql://h/d", "host=h password=correct-horse", "", f"postgresql://u:{PASSWORD}@h:port/d"]
)
async def test_what_is_no_address(dsn: str, postgres_schema: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await PostgresStorage(dsn, schema=postgres_schema).open(Clock())
    assert PASSWORD not in str(caught.value)


async def test_a_user_who_may_not_create_a_schema_is_told_what_to_grant(
    postgres_dsn: str, postgres_schema: str, admin: asyncpg.Connection
) -> None:
    role = f"role_{postgres_schema}"
    await admin.execute(f"CREATE ROLE {role} LOGIN")
    try:
        error = await refusal(PostgresStorage(at(postgres_dsn, user=role), schema=postgres_schema))
        assert type(error) is StorageError
        assert "GRANT CREATE ON DATABASE" in str(error)
        assert not await admin.fetchval("SELECT to_regnamespace($1) IS NOT NULL", postgres_schema)
    finally:
        await admin.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("idempotency_key", {"idempotency_key": "a\0b"}),
        ("event_id", {"event_id": "a\0b"}),
        ("tenant", {"tenant": "a\0b"}),
        ("data", {"data": {"a\0b": "c\0d"}}),
        ("attributes", {"attributes": {"a": "b\0c"}}),
    ],
)
async def test_texts_with_nul_are_stored_or_refused_and_nobody_else_suffers(
    postgres_dsn: str, postgres_schema: str, field: str, fields: dict[str, Any]
) -> None:
    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    transport = FakeTransport()
    async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        emits = [dispatcher.emit("video.ready", number) for number in range(3)]
        bad = dispatcher.emit("video.ready", **fields)
        told, *receipts = await asyncio.gather(bad, *emits, return_exceptions=True)
        assert not any(isinstance(receipt, BaseException) for receipt in receipts)
        if isinstance(told, BaseException):
            assert isinstance(told, HookwrightError)
            assert re.search(r"U\+0000|character|must", str(told)), told
        await dispatcher.drain()
        assert len(transport.requests) >= 3
        assert (await dispatcher.health()).pending == 0


async def _newer(admin: asyncpg.Connection, schema: str) -> list[object]:
    tables = await admin.fetch("SELECT relname, xmin::text FROM pg_class WHERE relnamespace = $1::regnamespace", schema)
    return [*map(tuple, tables), *map(tuple, await admin.fetch(f"SELECT * FROM {schema}.meta"))]


async def test_a_schema_of_a_later_version_that_this_one_would_not_understand_is_refused_and_untouched(
    postgres_dsn: str, new_schema: Callable[[], str], admin: asyncpg.Connection
) -> None:
    schema = new_schema()
    storage = PostgresStorage(postgres_dsn, schema=schema)
    await storage.open(Clock())
    await storage.close()
    await admin.execute(f"UPDATE {schema}.meta SET value = 9 WHERE key IN ('schema', 'compatible')")
    before = await _newer(admin, schema)
    error = await refusal(PostgresStorage(postgres_dsn, schema=schema))
    assert type(error) is SchemaTooNew
    assert "schema 9" in str(error)
    assert "upgrade" in str(error)
    assert await _newer(admin, schema) == before
