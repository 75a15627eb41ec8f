"""latency: from emit's return to the receiver's first byte, idle and at half load, against what it is made of.

Both processes read the same monotonic clock. A send may begin before the emitter is resumed: a delay may be negative.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import aiosqlite

from benchmarks._fleet import p99
from benchmarks._harness import Report, Result, at_most, tell
from benchmarks._loops import BODY, bare_connection
from benchmarks._receiver import receivers
from hookwright import DirectTransport, Dispatcher, NetworkPolicy

if TYPE_CHECKING:
    from benchmarks._loops import Bare
    from benchmarks._receiver import Receivers
    from benchmarks._stalls import Watch

ROUNDS = 5
ENDPOINTS = 20
EMITTERS = 64
DATA = {"video_id": "vid_123", "text": "x" * 960}

PAUSE = 0.015
"""Seconds between two events, two transactions or two POSTs of the idle rounds: each begins from rest."""

TRANSACTION = "one FULL transaction, p50"
POST = "one bare asyncio POST and answer, p50"
SUM = "one transaction and two POSTs"
IDLE = "idle: emit's return to first byte"
WHOLE = "idle: emit's call to first byte"
LOADED = "half load: emit's return to first byte"


class Size(NamedTuple):
    """How much of it."""

    rounds: int
    each: int
    burst: int
    seconds: float


FULL = Size(ROUNDS, 200, 4000, 4.0)
QUICK = Size(1, 20, 200, 0.5)


class Clocked(NamedTuple):
    """When an emit was called and when it returned (ns), by event."""

    called: dict[str, int]
    returned: dict[str, int]


class Emitter:
    """Emits to endpoints whose receiver keeps when the first byte came."""

    def __init__(self, dispatcher: Dispatcher, there: Receivers) -> None:
        self._dispatcher = dispatcher
        self._there = there

    async def create(self) -> None:
        """Create the endpoints, and let each answer often enough to be trusted."""
        for number, url in enumerate(self._there.answering):
            await self._dispatcher.endpoints.create(f"{url}clocked", events=[f"e{number}"])
        for _ in range(4):
            await asyncio.gather(*(self._dispatcher.emit(f"e{number}", DATA) for number in range(ENDPOINTS)))
            await self._dispatcher.drain()

    async def idle(self, count: int) -> tuple[list[float], list[float]]:
        """Emit one event at a time; return the delays (us) from the call and from the return."""
        await self._there.arrivals()
        clocked = Clocked({}, {})
        for _ in range(count):
            await asyncio.sleep(PAUSE)
            await self._emit(0, clocked)
        await self._dispatcher.drain()
        return await self._delays(clocked)

    async def loaded(self, seconds: float, rate: float) -> list[float]:
        """Emit at an even rate, whatever becomes of it; return the delays (us) from the return."""
        await self._there.arrivals()
        clocked, tasks, begin = Clocked({}, {}), [], time.perf_counter()
        for number in range(round(seconds * rate)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self._emit(number % ENDPOINTS, clocked)))
        await asyncio.gather(*tasks)
        await self._dispatcher.drain()
        return (await self._delays(clocked))[1]

    async def capacity(self, count: int) -> float:
        """Return how many events a second are emitted and delivered when nobody waits between two."""
        begin = time.perf_counter()

        async def emitter(first: int) -> None:
            for number in range(first, count, EMITTERS):
                await self._dispatcher.emit(f"e{number % ENDPOINTS}", DATA)

        await asyncio.gather(*(emitter(first) for first in range(EMITTERS)))
        await self._dispatcher.drain()
        return count / (time.perf_counter() - begin)

    async def _emit(self, number: int, clocked: Clocked) -> None:
        called = time.monotonic_ns()
        receipt = await self._dispatcher.emit(f"e{number}", DATA)
        clocked.returned[receipt.event_id] = time.monotonic_ns()
        clocked.called[receipt.event_id] = called

    async def _delays(self, clocked: Clocked) -> tuple[list[float], list[float]]:
        arrivals = await self._there.arrivals()
        assert arrivals.keys() == clocked.returned.keys()
        since_called, since_returned = (
            [(arrivals[id] - at) / 1000 for id, at in times.items()] for times in (clocked.called, clocked.returned)
        )
        return since_called, since_returned


async def _transactions(database: aiosqlite.Connection, count: int) -> float:
    times = []
    for _ in range(count):
        await asyncio.sleep(PAUSE)
        begin = time.perf_counter()
        await database.execute("INSERT INTO event (data) VALUES (?)", (BODY,))
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


async def _posts(connection: Bare, count: int) -> float:
    message = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    times = []
    for _ in range(count):
        await asyncio.sleep(PAUSE)
        begin = time.perf_counter()
        await connection.post(message)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


async def _rounds(
    size: Size, emitter: Emitter, database: aiosqlite.Connection, connection: Bare, watch: Watch
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(size.rounds):
        tell(f"round {number + 1} of {size.rounds}")
        found[TRANSACTION].append(await _transactions(database, size.each))
        found[POST].append(await _posts(connection, size.each))
        called, returned = await emitter.idle(size.each)
        rate = await emitter.capacity(size.burst) / 2
        found["rate"].append(rate)
        # The probe would keep an idle processor awake, and so is only beside the load.
        async with watch.probing():
            loaded = await emitter.loaded(size.seconds, rate)
        for name, delays in ((IDLE, returned), (WHOLE, called), (LOADED, loaded)):
            found[f"{name}, p50"].append(statistics.median(delays))
            found[f"{name}, p99"].append(p99(delays))
    return found


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
        folder = Path(name)
        async with (
            receivers(ENDPOINTS) as there,
            aiosqlite.connect(folder / "bare.db", isolation_level=None) as database,
            Dispatcher(
                f"sqlite:///{folder / 'hooks.db'}",
                transport=DirectTransport(),
                network=NetworkPolicy.development(),
                keys=[],
            ) as dispatcher,
        ):
            await database.execute("PRAGMA journal_mode = WAL")
            await database.execute("PRAGMA synchronous = FULL")
            await database.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, data BLOB)")
            emitter = Emitter(dispatcher, there)
            await emitter.create()
            connection = await bare_connection(there.answering[0])
            found = await _rounds(QUICK if quick else FULL, emitter, database, connection, watch)
            connection.transport.abort()
    rates = found.pop("rate")
    capacity = 2 * statistics.median(rates)
    report = Report(f"latency: 1 KB events, one at a time, then at half of the {capacity:,.0f} a second that it can")
    report.results += [Result(what, "us", values) for what, values in found.items()]
    sums = [transaction + 2 * post for transaction, post in zip(found[TRANSACTION], found[POST], strict=True)]
    report.results.insert(2, Result(SUM, "us", sums))
    report.results.append(Result("half load", "events/s", rates))
    report.compare(f"{IDLE}, p50", SUM, target=at_most(1.0))
    return report
