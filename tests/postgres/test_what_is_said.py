"""What errors of PostgreSQL say to whoever has to do something: which server, which grant, and a name that is known."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from hookwright import Clock, CommitLost, Dispatcher, HookwrightError, NewEvent, StorageError, StorageUnavailable
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.application import DRIVERS, KINDS, application
from tests.postgres.cutting import scene
from tests.postgres.proxy import Action, Proxy, at_statement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.postgres.application import App
    from tests.postgres.wire import Message

PASSWORD = "correct-horse"
USER = "somebody"


def lost_commit(message: Message) -> Action | None:
    return Action.CUT_AFTER if message.sql == "COMMIT" else None


async def test_a_commit_that_is_lost_is_told_apart_from_what_was_not_done(
    postgres_dsn: str, postgres_schema: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        setting.proxy.on_message = lost_commit
        with pytest.raises(CommitLost, match="may or may not have happened") as caught:
            await setting.storage.cancel([setting.waiting.id])
    assert isinstance(caught.value, StorageUnavailable)


async def test_health_tells_of_a_claim_whose_commit_was_lost(postgres_dsn: str, postgres_schema: str) -> None:
    def lost_claim(message: Message) -> Action | None:
        return Action.CUT_AFTER if message.runs and "claim_1" in message.sql else None

    async with Proxy(postgres_dsn) as proxy:
        storage = PostgresStorage(proxy.dsn, schema=postgres_schema)
        async with Dispatcher(storage, transport=FakeTransport(), keys=[]) as dispatcher:
            await dispatcher.endpoints.create(URL, events=["*"])
            proxy.on_message = lost_claim
            await dispatcher.emit("video.ready")

            async def told() -> bool:
                problems = (await dispatcher.health()).problems
                return any("CommitLost: the connection broke in a commit" in each for each in problems)

            await until(told)
            proxy.on_message = None


async def refused(dsn: str, schema: str) -> str:
    with pytest.raises(StorageUnavailable) as caught:
        await PostgresStorage(dsn, schema=schema).open(Clock())
    assert PASSWORD not in f"{caught.value!r}"
    assert USER not in f"{caught.value!r}"
    return str(caught.value)


async def test_who_cannot_be_reached_is_named_by_host_port_and_database(
    postgres_schema: str, unused_tcp_port: int
) -> None:
    secret = f"{USER}:{PASSWORD}"
    told = await refused(f"postgresql://{secret}@127.0.0.1:{unused_tcp_port}/app", postgres_schema)
    assert told.startswith(f"PostgreSQL (postgresql://127.0.0.1:{unused_tcp_port}/app) cannot be reached: ")
    told = await refused(f"postgresql://{secret}@/app?host=/nowhere/at/all", postgres_schema)
    assert told.startswith("PostgreSQL (postgresql:///nowhere/at/all/app) cannot be reached: ")


async def test_a_server_that_the_driver_does_not_understand_is_named(postgres_schema: str) -> None:
    async def ask_for_something_unknown(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(struct.pack("!cii", b"R", 8, 99))  # a way to authenticate that there is not
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(ask_for_something_unknown, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        dsn = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/app?sslmode=disable"
        told = await refused_by_the_server(dsn, postgres_schema, StorageError)
    assert told.startswith("the PostgreSQL driver reported an error (InterfaceError: ")
    assert told.endswith(f": postgresql://127.0.0.1:{port}/app")
    assert PASSWORD not in told


async def test_an_address_that_names_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, postgres_schema: str) -> None:
    monkeypatch.setenv("PGHOST", "/nowhere/at/all")
    assert (await refused("postgresql://", postgres_schema)).startswith("PostgreSQL cannot be reached: ")


async def test_whose_connection_was_lost_is_named(postgres_dsn: str, postgres_schema: str) -> None:
    async with Proxy(postgres_dsn) as proxy:
        storage = PostgresStorage(proxy.dsn, schema=postgres_schema)
        await storage.open(Clock())
        try:
            proxy.on_message = at_statement("FROM", Action.CUT_BEFORE)
            with pytest.raises(StorageUnavailable, match="the connection to PostgreSQL was lost") as caught:
                await storage.get_delivery("dlv_1")
        finally:
            await storage.close()
    [_, shown, _] = repr(storage).split("'")
    assert str(caught.value).endswith(f": {shown}")


async def refused_by_the_server(dsn: str, schema: str, kind: type[StorageError]) -> str:
    with pytest.raises(StorageError) as caught:
        await PostgresStorage(dsn, schema=schema).open(Clock())
    assert type(caught.value) is kind
    return str(caught.value)


def with_option(dsn: str, option: str) -> str:
    return f"{dsn}{'&' if '?' in dsn else '?'}{option}"


async def test_a_user_and_a_database_that_are_refused_are_told_with_the_server(
    postgres_dsn: str, postgres_schema: str
) -> None:
    url = urlsplit(postgres_dsn)
    stranger = url._replace(netloc=f"{USER}:{PASSWORD}@{url.netloc.rpartition('@')[2]}")
    for wrong, advice in ((stranger, "refuses the user"), (url._replace(path="/nowhere"), "database does not exist")):
        dsn = wrong.geturl()
        told = await refused_by_the_server(dsn, postgres_schema, StorageError)
        _, shown, _ = repr(PostgresStorage(dsn)).split("'")
        assert advice in told
        assert PASSWORD not in told
        assert told.endswith(f": {shown}")


async def test_a_server_that_is_not_what_is_asked_for_may_be_so_later(postgres_dsn: str, postgres_schema: str) -> None:
    dsn = with_option(postgres_dsn, "target_session_attrs=standby")
    told = await refused_by_the_server(dsn, postgres_schema, StorageUnavailable)
    _, shown, _ = repr(PostgresStorage(dsn)).split("'")
    assert told == f"no server of PostgreSQL ({shown}) is what target_session_attrs asks for"


async def test_an_emit_waits_for_a_server_that_is_what_is_asked_for(postgres_database: str) -> None:
    storage = PostgresStorage(with_option(postgres_database, "target_session_attrs=read-write"))
    name = urlsplit(postgres_database).path.strip("/")
    admin = await asyncpg.connect(postgres_database)
    try:
        async with Dispatcher(storage, transport=FakeTransport(), keys=[]) as dispatcher:
            await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND datname = current_database()"
            )

            async def told() -> bool:
                problems = (await dispatcher.health()).problems
                return any("what target_session_attrs asks for" in each for each in problems)

            await until(told)
            emit = asyncio.create_task(dispatcher.emit("video.ready"))
            await until(told)
            await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert (await emit).durable
    finally:
        await admin.close()


@asynccontextmanager
async def user_of(app: App, *granted: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of a user who may do what he was granted, in a transaction; `{}` in that is who."""
    role = f"role_{app.schema}"
    admin = await asyncpg.connect(app.dsn)
    connection = await asyncpg.connect(app.dsn)
    try:
        await admin.execute(f"CREATE ROLE {role}; " + "; ".join(each.format(role) for each in granted))
        await connection.execute(f"SET ROLE {role}; BEGIN")
        yield connection
        await connection.execute("COMMIT")
    finally:
        await connection.close()
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


async def test_a_user_who_may_not_emit_is_told_what_to_grant_and_that_is_enough(
    postgres_dsn: str, postgres_schema: str
) -> None:
    schema = postgres_schema
    usage = f"GRANT USAGE ON SCHEMA {schema} TO {{}}"
    reading = f"GRANT SELECT ON {schema}.meta, {schema}.event TO {{}}"
    writing = f"GRANT INSERT ON {schema}.event, {schema}.delivery, {schema}.wake TO {{}}"
    async with application(postgres_dsn, postgres_schema) as app:
        await app.dispatcher.endpoints.create(URL, events=["*"])
        advice = "USAGE ON SCHEMA, SELECT ON meta, event and INSERT ON event, delivery, wake"
        for granted in ([], [usage], [usage, reading], [usage, writing]):
            async with user_of(app, *granted) as connection:
                with pytest.raises(StorageError, match=advice) as caught:
                    await app.dispatcher.emit("video.ready", connection=connection)
                assert type(caught.value) is StorageError
        async with user_of(app, usage, reading, writing) as connection:
            for _ in range(2):
                await app.dispatcher.emit("video.ready", event_id="evt_1", connection=connection)
            events = [NewEvent("video.ready", 1), NewEvent("video.ready", 2)]
            several = await app.dispatcher.emit_many(events, connection=connection)
        await app.delivered("evt_1", *(receipt.event_id for receipt in several))


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize(
    ("before", "advice"),
    [
        ("SET TRANSACTION READ ONLY", "emit in a transaction that may write"),
        ("SELECT 1 / 0", "roll it back, and emit again"),
    ],
)
async def test_a_transaction_that_cannot_take_an_event_says_what_to_do(
    postgres_dsn: str, postgres_schema: str, kind: str, before: str, advice: str
) -> None:
    async with application(postgres_dsn, postgres_schema) as app, KINDS[kind](postgres_dsn) as caller:
        await app.dispatcher.endpoints.create(URL, events=["*"])
        await caller.begin()
        with suppress(asyncpg.PostgresError, psycopg.Error, DBAPIError):
            await caller.run(before)
        with pytest.raises(HookwrightError, match=advice) as caught:
            await app.dispatcher.emit("video.ready", connection=caller.connection)
        assert type(caught.value) is StorageError
        await caller.rollback()
        await caller.begin()
        receipt = await app.dispatcher.emit("video.ready", connection=caller.connection)
        await caller.commit()
        await app.delivered(receipt.event_id)
