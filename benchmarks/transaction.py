"""transaction: emit in the caller's transaction, against the same transaction with two plain inserts instead.

Each is a transaction of its own on one connection: one row of the application's, and then the emit, or an event and a
delivery of the same sizes as one would insert by hand. The tables of the latter have a primary key and no other index.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiosqlite
import asyncpg

from benchmarks._harness import CPU, Report, Result, at_most, tell
from benchmarks._server import server, settled_down
from hookwright import Dispatcher, SQLiteStorage
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from benchmarks._server import Server
    from benchmarks._stalls import Watch
    from hookwright import Storage

DATA = {"video_id": "vid_123", "text": "x" * 960}
BYTES = b'{"video_id":"vid_123","text":"' + b"x" * 960 + b'"}'
WARM = 20
KINDS = ("PostgreSQL, asyncpg", "SQLite, aiosqlite")
EMIT, PLAIN = "emit", "two plain inserts"

_TABLES = """
CREATE TABLE business (id text PRIMARY KEY, title text);
CREATE TABLE plain_event (id text PRIMARY KEY, type text, data {blob}, created_at bigint);
CREATE TABLE plain_delivery (id text PRIMARY KEY, event_id text, endpoint_id text, state text, available_at bigint);
"""


class Cost(NamedTuple):
    """What one transaction took: microseconds, and those of CPU in this process."""

    wall: float
    cpu: float


class _Application:
    """An application: its connection, and a dispatcher on the same database."""

    def __init__(self, dispatcher: Dispatcher, connection: Any) -> None:
        self._dispatcher = dispatcher
        self._connection = connection
        self._numbers = itertools.count()

    async def measure(self, transaction: Callable[[str], Awaitable[None]], count: int) -> Cost:
        """Return what a transaction takes, after a few that are not counted."""
        for _ in range(WARM):
            await transaction(self._id())
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(count):
            await transaction(self._id())
        return Cost((time.perf_counter() - begin) / count * 1e6, (time.process_time() - cpu) / count * 1e6)

    async def emit(self, id: str) -> None:
        await self._begin()
        await self._insert("business", id, "a title")
        await self._dispatcher.emit("video.ready", DATA, connection=self._connection)
        await self._connection.execute("COMMIT")

    async def plain(self, id: str) -> None:
        await self._begin()
        await self._insert("business", id, "a title")
        now = time.time_ns() // 1000
        await self._insert("plain_event", f"evt_{id}", "video.ready", BYTES, now)
        await self._insert("plain_delivery", f"dlv_{id}", f"evt_{id}", "ep_" + "0" * 30, "pending", now)
        await self._connection.execute("COMMIT")

    async def _begin(self) -> None:
        await self._connection.execute("BEGIN")

    async def _insert(self, table: str, *values: object) -> None:
        places = ", ".join(f"${number + 1}" for number in range(len(values)))
        await self._connection.execute(f"INSERT INTO {table} VALUES ({places})", *values)

    def _id(self) -> str:
        return f"{next(self._numbers):030}"


class _SQLite(_Application):
    async def _begin(self) -> None:
        await self._connection.execute("BEGIN IMMEDIATE")

    async def _insert(self, table: str, *values: object) -> None:
        places = ", ".join("?" * len(values))
        await self._connection.execute(f"INSERT INTO {table} VALUES ({places})", values)


@asynccontextmanager
async def _dispatcher(storage: Storage) -> AsyncIterator[Dispatcher]:
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
        await dispatcher.endpoints.create("https://receiver.example/", events=["*"])
        yield dispatcher


@asynccontextmanager
async def _on_postgres(there: Server) -> AsyncIterator[_Application]:
    async with there.database() as dsn, _dispatcher(PostgresStorage(dsn)) as dispatcher:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(_TABLES.format(blob="bytea"))
            await settled_down(dsn)
            yield _Application(dispatcher, connection)
        finally:
            await connection.close()


@asynccontextmanager
async def _on_sqlite(folder: Path) -> AsyncIterator[_Application]:
    path = folder / "application.db"
    async with (
        _dispatcher(SQLiteStorage(path)) as dispatcher,
        aiosqlite.connect(path, isolation_level=None) as connection,
    ):
        await connection.execute("PRAGMA synchronous = FULL")
        await connection.executescript(_TABLES.format(blob="blob"))
        yield _SQLite(dispatcher, connection)


async def _measured(application: _Application, found: dict[str, list[Cost]], kind: str, count: int) -> None:
    for what, transaction in ((EMIT, application.emit), (PLAIN, application.plain)):
        found.setdefault(f"{kind}: {what}", []).append(await application.measure(transaction, count))


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    count, rounds = (20, 1) if quick else (400, 5)
    postgres, sqlite = KINDS
    found: dict[str, list[Cost]] = {}
    with server() as there, tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            folder = Path(name) / str(number)
            folder.mkdir()
            async with _on_postgres(there) as application:
                await _measured(application, found, postgres, count)
            async with _on_sqlite(folder) as application:
                await _measured(application, found, sqlite, count)
    results = [Result(name, "us", [cost.wall for cost in costs]) for name, costs in found.items()]
    results += [Result(name, CPU, [cost.cpu for cost in costs]) for name, costs in found.items()]
    report = Report("transaction: one row of the application's and a 1 KB event, one matching endpoint", results)
    for kind in KINDS:
        report.compare(f"{kind}: {EMIT}", f"{kind}: {PLAIN}", unit="us", target=at_most(1.5))
        report.compare(f"{kind}: {EMIT}", f"{kind}: {PLAIN}", unit=CPU)
    return report
