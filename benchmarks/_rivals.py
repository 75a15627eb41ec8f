"""procrastinate and pgqueuer: jobs that are stored before, and workers that POST them, each at its best here.

Both have what an application would give them: one aiohttp session, the same body, signed in the same way, as many POSTs
in flight as the dispatcher has, tables that are logged, and the server's own synchronous_commit. Neither keeps
attempts.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import procrastinate
from pgqueuer import AsyncpgPoolDriver, PgQueuer, Queries

from benchmarks._instead import signed
from benchmarks._loops import BODY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pgqueuer.models import Job
    from procrastinate.types import JSONDict

TEXT = BODY.decode()

PROCRASTINATE_CONNECTIONS = 10
"""The best of 4 (its default), 10 and 20."""

DELETE_JOBS = "always"
"""Better than to keep them, which is its default."""

PGQUEUER_CONNECTIONS = 10
"""asyncpg's default."""

PGQUEUER_AHEAD = 1
"""Jobs that it may hold for each that is in flight; the best of 1, 2, 5, and of no bound (the connector's alone)."""

PGQUEUER_BATCH = 40
"""As many as that bound allows, half of it; without the bound the best of 10 (its default), 50, 100 and 250 is 100."""


class _Sender:
    """Signs and POSTs, and raises unless it was accepted."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str]) -> None:
        self._session = session
        self._urls = urls

    async def send(self, number: int, body: bytes) -> None:
        url, headers = self._urls[number % len(self._urls)], signed(f"evt_{number}", body)
        async with self._session.post(url, data=body, headers=headers) as answer:
            await answer.read()
            answer.raise_for_status()


@asynccontextmanager
async def _sender(urls: list[str], in_flight: int) -> AsyncIterator[_Sender]:
    connector = aiohttp.TCPConnector(limit=in_flight)
    # No limit in time: what waits for a connection is waiting, and not slow.
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        yield _Sender(session, urls)


# -- procrastinate ----------------------------------------------------------------------------------------------


def _app(dsn: str) -> procrastinate.App:
    size = PROCRASTINATE_CONNECTIONS
    return procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, min_size=size, max_size=size))


async def store_procrastinate(dsn: str, count: int) -> None:
    """Create the schema and store the jobs."""
    app = _app(dsn)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        defer = app.configure_task("post")
        for begin in range(0, count, 500):
            some = range(begin, min(begin + 500, count))
            jobs: list[JSONDict] = [{"number": number, "body": TEXT} for number in some]
            await defer.batch_defer_async(*jobs)


async def run_procrastinate(dsn: str, urls: list[str], in_flight: int, go: asyncio.Event, stop: asyncio.Event) -> None:
    """Work between the two events."""
    logging.getLogger("procrastinate").setLevel(logging.WARNING)
    app = _app(dsn)
    async with _sender(urls, in_flight) as sender, app.open_async():

        @app.task(name="post", retry=procrastinate.RetryStrategy(max_attempts=10, exponential_wait=2))
        async def post(number: int, body: str) -> None:
            await sender.send(number, body.encode())

        await go.wait()
        working = asyncio.create_task(
            app.run_worker_async(
                concurrency=in_flight, delete_jobs=DELETE_JOBS, wait=True, install_signal_handlers=False
            )
        )
        await stop.wait()
        working.cancel()
        await asyncio.wait([working])


# -- pgqueuer ---------------------------------------------------------------------------------------------------


async def store_pgqueuer(dsn: str, count: int) -> None:
    """Create the schema and store the jobs."""
    async with asyncpg.create_pool(dsn, min_size=1, max_size=4) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))
        await queries.install()
        for begin in range(0, count, 500):
            some = range(begin, min(begin + 500, count))
            await queries.enqueue(["post"] * len(some), [b"%d\n%s" % (n, BODY) for n in some], [0] * len(some))


async def run_pgqueuer(dsn: str, urls: list[str], in_flight: int, go: asyncio.Event, stop: asyncio.Event) -> None:
    """Work between the two events."""
    size = PGQUEUER_CONNECTIONS
    async with _sender(urls, in_flight) as sender, asyncpg.create_pool(dsn, min_size=size, max_size=size) as pool:
        queue = PgQueuer(AsyncpgPoolDriver(pool))

        @queue.entrypoint("post")
        async def post(job: Job) -> None:
            assert job.payload is not None
            number, _, body = job.payload.partition(b"\n")
            await sender.send(int(number), body)

        await go.wait()
        working = asyncio.create_task(
            queue.run(
                batch_size=PGQUEUER_BATCH,
                max_concurrent_tasks=PGQUEUER_AHEAD * in_flight,
                dequeue_timeout=timedelta(seconds=1),
            )
        )
        await stop.wait()
        queue.shutdown.set()
        await working
