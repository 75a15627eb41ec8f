"""postgres: emit, claim and deliver on PostgreSQL, with 1, 2 and 4 processes, against procrastinate and pgqueuer.

All on one server, fsync on, with the synchronous_commit that it comes with, each round in a database of its own that
was vacuumed before the clock starts. The jobs of the other two are POSTed by aiohttp, signed as ours; what each was
given to be at its best is said in `_rivals.py`. Rates are those that the receiver sees, from first to last request.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from benchmarks._counting import counting
from benchmarks._harness import CPU, RATE, Cost, Report, Result, alternate_costs, at_least, tell
from benchmarks._many import typical
from benchmarks._rivals import store_pgqueuer, store_procrastinate
from benchmarks._server import server, settled_down
from benchmarks._workers import workers
from hookwright import DirectTransport, Dispatcher, NetworkPolicy, SQLiteStorage
from hookwright._clock import Clock
from hookwright._ids import new_id
from hookwright._models import AttemptRecord, DeliveryState, Emission, EventRow, NewDelivery, Outcome
from hookwright.storage._base import ClaimRequest
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._counting import Counter
    from benchmarks._server import Server
    from benchmarks._stalls import Watch
    from hookwright import Storage

    _Named = dict[str, Callable[[], Awaitable[Cost]]]

ENDPOINTS = 20
IN_FLIGHT = 4 * ENDPOINTS
EMITTERS = 64
CONNECTIONS = 6
"""What a PostgresStorage has by default."""
CONCURRENCY = 256
"""What a dispatcher has by default; its endpoints allow no more than IN_FLIGHT."""
SLOW_CONCURRENCY = 8
CLAIM = 80
"""Rows of a claim, and of the settle after it."""
GROUP = 100
"""Events that are stored in one transaction before."""
PATIENCE = 120.0

DATA = {"video_id": "vid_123", "text": "x" * 960}
BYTES = b'{"video_id":"vid_123","text":"' + b"x" * 960 + b'"}'
EVENTS, ROWS = "events/s", "rows/s"
SERVER_CPU = "us CPU, server"

EMIT = f"emit, {EMITTERS} emitters"
PLAIN = f"asyncpg, {EMITTERS} at once, {CONNECTIONS} connections"
PLAIN_MANY = f"asyncpg, {EMITTERS} at once, {EMITTERS} connections"
CLAIMED = "claim and settle, PostgreSQL"
CLAIMED_SQLITE = "claim and settle, SQLite"
HOOKWRIGHT = "deliver, hookwright"
PROCRASTINATE = "deliver, procrastinate"
PGQUEUER = "deliver, pgqueuer"


class Counts(NamedTuple):
    """How many there are in a round."""

    emits: int
    plain: int
    claims: int
    fast: int
    slow: int
    each_process: int
    rounds: int
    processes: tuple[int, ...]


FULL = Counts(
    emits=6400, plain=1600, claims=3200, fast=4000, slow=800, each_process=1000, rounds=5, processes=(1, 2, 4)
)
QUICK = Counts(emits=128, plain=64, claims=160, fast=80, slow=40, each_process=16, rounds=1, processes=(1, 4))


# -- emit -------------------------------------------------------------------------------------------------------

_PLAIN = """
CREATE TABLE event (id text PRIMARY KEY, type text, data bytea, created_at bigint);
CREATE TABLE delivery (id text PRIMARY KEY, event_id text, endpoint_id text, state text, available_at bigint);
"""


async def _at_once(count: int, one: Callable[[], Awaitable[object]]) -> Cost:
    async def emitter() -> None:
        for _ in range(count // EMITTERS):
            await one()

    cpu, begin = time.process_time(), time.perf_counter()
    await asyncio.gather(*(emitter() for _ in range(EMITTERS)))
    return Cost((time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin))


async def _emit(dsn: str, count: int, watch: Watch) -> Cost:
    storage = PostgresStorage(dsn, connections=CONNECTIONS)
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
        await dispatcher.endpoints.create("https://receiver.example/", events=["*"])
        for _ in range(3):
            await dispatcher.emit("warm.up")
        async with watch.probing():
            return await _at_once(count, lambda: dispatcher.emit("video.ready", DATA))


async def _plain(dsn: str, count: int, size: int) -> Cost:
    numbers = itertools.count()
    async with asyncpg.create_pool(dsn, min_size=size, max_size=size) as pool:
        await pool.execute(_PLAIN)

        async def one() -> None:
            id = f"{next(numbers):030}"
            async with pool.acquire() as connection, connection.transaction():
                now = time.time_ns() // 1000
                await connection.execute("INSERT INTO event VALUES ($1, $2, $3, $4)", id, "video.ready", BYTES, now)
                await connection.execute(
                    "INSERT INTO delivery VALUES ($1, $2, $3, $4, $5)", id, id, "ep_1", "pending", now
                )

        return await _at_once(count, one)


# -- claim ------------------------------------------------------------------------------------------------------


async def _claimed(storage: Storage, count: int) -> Cost:
    """Claim and settle all, in turn; what the first rows of each endpoint take is not counted."""
    await storage.open(Clock())
    try:
        await storage.acquire()
        endpoints = [typical(number, None, ["*"]) for number in range(ENDPOINTS)]
        for endpoint in endpoints:
            await storage.create_endpoint(endpoint)
        revision = (await storage.changes(0)).revision
        cost = Cost(0.0, 0.0)
        for amount in (4 * ENDPOINTS, count):
            now = time.time_ns() // 1000
            for first in range(0, amount, GROUP):
                numbers = range(first, min(first + GROUP, amount))
                emissions = [_emission(endpoints[number % ENDPOINTS].id, now) for number in numbers]
                await storage.enqueue_many(emissions, endpoints_revision=revision)
            cpu, begin = time.process_time(), time.perf_counter()
            await _claim_all(storage, amount)
            cost = Cost((time.process_time() - cpu) / amount * 1e6, amount / (time.perf_counter() - begin))
        return cost
    finally:
        await storage.close()


def _emission(endpoint_id: str, now: int) -> Emission:
    event = EventRow(new_id("evt", now), "video.ready", BYTES, now)
    return Emission(event, [NewDelivery(new_id("dlv", now), endpoint_id)])


async def _claim_all(storage: Storage, count: int) -> None:
    request = ClaimRequest(CLAIM, CLAIM, 60_000_000, CLAIM // ENDPOINTS, {})
    until = time.perf_counter() + PATIENCE
    while count:
        leases = (await storage.claim(request)).leases
        assert leases or time.perf_counter() < until, f"{count} rows are not claimed"
        now = time.time_ns() // 1000
        answer = AttemptRecord(now, 1000, 200, body_sha256=b"x" * 32)
        outcomes = [
            Outcome(lease.delivery_id, lease.token, lease.endpoint_id, DeliveryState.SUCCEEDED, answer)
            for lease in leases
        ]
        if outcomes:
            await storage.settle(outcomes)
        count -= len(outcomes)


# -- deliver ----------------------------------------------------------------------------------------------------


async def _store_hookwright(dsn: str, count: int, urls: list[str]) -> None:
    """Create endpoints, let them answer a few times, and emit what is to wait for them."""
    network = NetworkPolicy.development()
    storage = PostgresStorage(dsn)
    async with Dispatcher(storage, transport=DirectTransport(), network=network, keys=[]) as dispatcher:
        for number, url in enumerate(urls):
            await dispatcher.endpoints.create(url, events=[f"e{number}"])
        for _ in range(3):
            await asyncio.gather(*(dispatcher.emit(f"e{number}", DATA) for number in range(len(urls))))
            await dispatcher.drain(PATIENCE)
    async with Dispatcher(PostgresStorage(dsn), transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
        await asyncio.gather(*(dispatcher.emit(f"e{number % len(urls)}", DATA) for number in range(count)))


class _Deliveries:
    """What is delivered. `servers`: the server's CPU, in each round."""

    def __init__(self, there: Server, counter: Counter) -> None:
        self._there = there
        self._counter = counter
        self.servers: defaultdict[str, list[float]] = defaultdict(list)

    async def hookwright(
        self, name: str, count: int, *, processes: int = 1, in_flight: int = CONCURRENCY, path: str = ""
    ) -> Cost:
        urls = [url + path for url in self._counter.urls]
        async with self._there.database() as dsn:
            await _store_hookwright(dsn, count, urls)
            return await self._run(name, "hookwright", dsn, count, urls, processes=processes, in_flight=in_flight)

    async def rival(self, name: str, kind: str, count: int, store: Callable[[str, int], Awaitable[None]]) -> Cost:
        async with self._there.database() as dsn:
            await store(dsn, count)
            return await self._run(name, kind, dsn, count, self._counter.urls, processes=1, in_flight=IN_FLIGHT)

    async def _run(
        self, name: str, kind: str, dsn: str, count: int, urls: list[str], *, processes: int, in_flight: int
    ) -> Cost:
        await settled_down(dsn)
        await self._counter.reset()
        async with workers(kind, dsn, urls, in_flight=in_flight, count=processes) as started:
            before = self._there.cpu()
            for worker in started:
                worker.go()
            rate = await self._counter.rate(count, PATIENCE)
            cpu = sum([await worker.stop() for worker in started])
            self.servers[name].append((self._there.cpu() - before) / count * 1e6)
        return Cost(cpu / count * 1e6, rate)


def name_of(processes: int) -> str:
    """Return how a round with so many is called."""
    return f"deliver, 20 ms, {processes} process{'es' if processes > 1 else ''}"


# -- all --------------------------------------------------------------------------------------------------------


class _Rounds:
    """What is measured."""

    def __init__(self, there: Server, counts: Counts, watch: Watch) -> None:
        self._there = there
        self._counts = counts
        self._watch = watch

    async def emits(self) -> Report:
        counts = self._counts

        async def emit() -> Cost:
            async with self._there.database() as dsn:
                return await _emit(dsn, counts.emits, self._watch)

        async def plain(size: int) -> Cost:
            async with self._there.database() as dsn:
                return await _plain(dsn, counts.plain, size)

        rounds: _Named = {EMIT: emit, PLAIN: lambda: plain(CONNECTIONS), PLAIN_MANY: lambda: plain(EMITTERS)}
        report = await alternate_costs("", rounds, count=counts.rounds, rate=EVENTS)
        for unit in (EVENTS, CPU):
            report.compare(EMIT, PLAIN, unit=unit)
            report.compare(EMIT, PLAIN_MANY, unit=unit)
        return report

    async def claims(self) -> Report:
        counts = self._counts

        async def postgres() -> Cost:
            async with self._there.database() as dsn:
                return await _claimed(PostgresStorage(dsn), counts.claims)

        async def sqlite() -> Cost:
            with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
                return await _claimed(SQLiteStorage(Path(folder) / "claim.db"), counts.claims)

        rounds: _Named = {CLAIMED: postgres, CLAIMED_SQLITE: sqlite}
        report = await alternate_costs("", rounds, count=counts.rounds, rate=ROWS)
        for name in rounds:
            rates = report.find(name, ROWS).values
            report.results.append(Result(name, "us", [1e6 / rate for rate in rates]))
        report.results = [result for result in report.results if result.unit != ROWS]
        for unit in (CPU, "us"):
            report.compare(CLAIMED, CLAIMED_SQLITE, unit=unit)
        return report

    async def deliveries(self, counter: Counter) -> Report:
        counts, measured = self._counts, _Deliveries(self._there, counter)

        def several(processes: int) -> Callable[[], Awaitable[Cost]]:
            name, count = name_of(processes), counts.each_process * processes
            return lambda: measured.hookwright(
                name, count, processes=processes, in_flight=SLOW_CONCURRENCY, path="slow"
            )

        rounds: _Named = {
            HOOKWRIGHT: lambda: measured.hookwright(HOOKWRIGHT, counts.fast),
            PGQUEUER: lambda: measured.rival(PGQUEUER, "pgqueuer", counts.fast, store_pgqueuer),
            PROCRASTINATE: lambda: measured.rival(PROCRASTINATE, "procrastinate", counts.slow, store_procrastinate),
            **{name_of(processes): several(processes) for processes in counts.processes},
        }
        report = await alternate_costs("", rounds, count=counts.rounds)
        if self._there.pid is not None:
            report.results += [Result(name, SERVER_CPU, values) for name, values in measured.servers.items()]
        report.compare(HOOKWRIGHT, PROCRASTINATE, unit=RATE, target=at_least(3.0))
        report.compare(HOOKWRIGHT, PGQUEUER, unit=RATE, target=at_least(1.5))
        for processes in counts.processes[1:]:
            target = at_least(1.6) if processes == 4 else None
            report.compare(name_of(processes), name_of(1), unit=RATE, target=target)
        return report


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    counts = QUICK if quick else FULL
    report = Report(f"postgres: 1 KB events; {ENDPOINTS} endpoints, {IN_FLIGHT} in flight at receivers in a process")
    with server() as there:
        tell("the server is there")
        measured = _Rounds(there, counts, watch)
        async with counting(ENDPOINTS) as counter:
            for part in (await measured.emits(), await measured.claims(), await measured.deliveries(counter)):
                report.results += part.results
    return report
