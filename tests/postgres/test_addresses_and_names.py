"""What an address may say, what of it is shown, and which schema is whose."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

import asyncpg
import pytest
import trustme

from hookwright import (
    ConfigurationError,
    Dispatcher,
    PostgresStorage,
    StorageError,
    StorageUnavailable,
    ValidationFailed,
)
from hookwright.storage.postgres import _pool
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql+asyncpg://app:{SECRET}@db.example/app",
        f"postgresql://app:pa/{SECRET}@db.example/app",
        f"postgresql://app:pw[{SECRET}@db.example/app",
        f"postgresql://app:pw@{SECRET}@db.example/app",
        f"postgresql://app:{SECRET}@db.example:port/app",
        f"postgresql://app:12?{SECRET}@db.example/app",
        f"postgresql://app:1234/{SECRET}?y@db.example/app",
        f"postgresql:app:{SECRET}@db.example/app",
        f"host=db.example user=app password={SECRET}",
        f"app:{SECRET}@db.example/app",
        f"//app:{SECRET}@db.example/app",
    ],
)
def test_an_address_that_cannot_be_read_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Dispatcher(address)
    assert SECRET not in f"{refused.value!r} {refused.value.__cause__!r}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"postgresql://app:{SECRET}@db.example:6432/app?sslmode=require", "postgresql://db.example:6432/app"),
        (f"postgres://app:{SECRET}@db.example/app", "postgresql://db.example/app"),
        (
            f"postgresql://?host=db.example&port=6432&user=app&password={SECRET}&database=app",
            "postgresql://db.example:6432/app",
        ),
        ("postgresql://app@[::1]:5432/app", "postgresql://[::1]:5432/app"),
        ("postgresql:///app?host=/var/run/postgresql", "postgresql:///var/run/postgresql/app"),
    ],
)
def test_what_is_shown_of_an_address(address: str, shown: str) -> None:
    assert repr(PostgresStorage(address)) == f"PostgresStorage({shown!r})"


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("app?sslmode=verify", "sslmode"),
        ("app?sslmode=verify-full&sslrootcert=/nowhere/root.crt", "sslrootcert: there is no file '/nowhere/root.crt'"),
        ("app?target_session_attrs=main", "target_session_attrs"),
    ],
)
async def test_what_is_wrong_with_an_address_is_said_when_it_is_opened(rest: str, said: str) -> None:
    dispatcher = Dispatcher(f"postgresql://app:{SECRET}@127.0.0.1:1/{rest}", transport=FakeTransport(), keys=[])
    with pytest.raises(ConfigurationError, match=said) as refused:
        await dispatcher.start()
    assert SECRET not in f"{refused.value!r} {refused.value.__cause__!r}"


def test_several_hosts_are_told_where_to_go() -> None:
    with pytest.raises(ConfigurationError, match="host=a,b&port=5432,5432"):
        PostgresStorage(f"postgresql://app:{SECRET}@a:5432,b:5432/app")


@pytest.mark.parametrize(
    ("parameter", "instead"),
    [("ssl=require", "sslmode="), ("schema=hooks", "schema="), ("pool_size=5", "connections=")],
)
def test_what_other_libraries_take_in_an_address_is_told_where_to_go(parameter: str, instead: str) -> None:
    with pytest.raises(ConfigurationError, match=instead):
        PostgresStorage(f"postgresql://app:{SECRET}@db.example/app?{parameter}")


async def test_a_certificate_that_does_not_verify_is_the_servers_matter_and_told(tmp_path: Path) -> None:
    """An expired one may be renewed any time: it is tried again like a server that cannot be reached."""
    theirs, ours = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.issue_cert("127.0.0.1").configure_cert(context)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # an SSLRequest
        writer.write(b"S")
        with contextlib.suppress(OSError):
            await writer.start_tls(context)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        address = f"postgresql://app:{SECRET}@127.0.0.1:{port}/app?sslmode=verify-full&sslrootcert={tmp_path}/ca.pem"
        with pytest.raises(StorageUnavailable, match="certificate"):
            await asyncio.wait_for(Dispatcher(address, transport=FakeTransport(), keys=[]).start(), 20)


async def test_emits_are_answered_whatever_the_pool_raises(
    postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object, **__: object) -> None:
        raise ConfigurationError("the address has gone bad")

    storage = PostgresStorage(postgres_dsn, schema=postgres_schema)
    async with Dispatcher(storage, transport=FakeTransport(), keys=[]) as dispatcher:
        with monkeypatch.context() as patch:
            patch.setattr(_pool.Pool, "run", run)
            with pytest.raises(ConfigurationError, match="gone bad"):
                await asyncio.wait_for(dispatcher.emit("video.ready"), 10)
        assert (await dispatcher.emit("video.ready")).durable


async def test_a_parameter_that_nobody_knows_is_told_as_such(postgres_dsn: str, postgres_schema: str) -> None:
    both = "&" if "?" in postgres_dsn else "?"
    storage = PostgresStorage(f"{postgres_dsn}{both}aplication_name=web", schema=postgres_schema)
    with pytest.raises(StorageError, match=r"misspelt.*aplication_name"):
        await Dispatcher(storage, transport=FakeTransport(), keys=[]).start()


async def test_options_of_libpq_and_of_hosts_are_left_out(postgres_dsn: str, postgres_schema: str) -> None:
    both = "&" if "?" in postgres_dsn else "?"
    dsn = f"{postgres_dsn}{both}channel_binding=prefer&connect_timeout=5&keepalives=1&pgbouncer=true"
    async with Dispatcher(
        PostgresStorage(dsn, schema=postgres_schema), transport=FakeTransport(), keys=[]
    ) as dispatcher:
        assert (await dispatcher.emit("video.ready")).durable


@pytest.mark.parametrize("schema", ["", "pg_mine", "public", "a$claim$b", "x" * 64, "a\0b"])
def test_a_schema_that_cannot_be_one_is_refused(schema: str) -> None:
    with pytest.raises(ConfigurationError, match="schema"):
        PostgresStorage("postgresql://db.example/app", schema=schema)


async def test_a_schema_with_somebody_elses_tables_is_refused(postgres_dsn: str, new_schema: Callable[[], str]) -> None:
    schema = new_schema()
    connection = await asyncpg.connect(postgres_dsn)
    try:
        await connection.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.meta (key text, value text)")
        with pytest.raises(ConfigurationError, match="not hookwright's"):
            async with Dispatcher(PostgresStorage(postgres_dsn, schema=schema), keys=[]):
                pass
    finally:
        await connection.close()


async def test_text_that_no_database_takes_is_refused_by_every_storage(postgres_dsn: str, postgres_schema: str) -> None:
    for storage in ("memory:", PostgresStorage(postgres_dsn, schema=postgres_schema)):
        async with Dispatcher(storage, transport=FakeTransport(), keys=[]) as dispatcher:
            for field in ("tenant", "idempotency_key"):
                with pytest.raises(ValidationFailed, match=field):
                    await dispatcher.emit("video.ready", **{field: "a\0b"})  # type: ignore[arg-type]  # one of the two
            with pytest.raises(ValidationFailed):
                await dispatcher.deliveries.get("a\0b")
            assert (await dispatcher.health()).state == "healthy"
