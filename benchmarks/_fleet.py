"""Healthy endpoints of a dispatcher: a stream of events that is clocked, a burst that is drained, and what waits."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hookwright import DeliverySucceeded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks._receiver import Receivers
    from hookwright import Dispatcher

RATE = 100
"""Events a second in a stream, each to one healthy endpoint in turn."""

_WARM = 4
"""Events that a healthy endpoint answers before anything is measured: it has earned its whole room."""

_FILL = """
WITH RECURSIVE n(i) AS (SELECT ?1 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?2)
"""
_BATCH = 100_000


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[int(len(values) * 0.99)]


class Fleet:
    """Endpoints that answer, each with an event type of its own, on one port of the receivers."""

    def __init__(self, dispatcher: Dispatcher, there: Receivers) -> None:
        self._dispatcher = dispatcher
        self._there = there
        self._ids: list[str] = []

    async def create(self, count: int) -> None:
        """Create them, and let each answer often enough to be trusted."""
        url = self._there.answering[0]
        for n in range(count):
            endpoint = await self._dispatcher.endpoints.create(f"{url}{n}", events=["good", f"good.{n}"])
            self._ids.append(endpoint.id)
        for _ in range(_WARM):
            await self._dispatcher.emit("good")
            await self._dispatcher.drain()

    async def stream(self, seconds: float, rate: int = RATE) -> list[float]:
        """Emit at an even rate, whatever becomes of it; return the start delays (ms) as the receiver saw them.

        The time in the data is when the event was to be emitted: a loop that was late is counted.
        """
        await self._there.delays()
        begin, begin_wall = time.perf_counter(), time.time_ns() // 1000
        emits = []
        for number in range(round(seconds * rate)):
            after = number / rate
            await asyncio.sleep(max(0.0, begin + after - time.perf_counter()))
            data = {"sent": begin_wall + round(after * 1_000_000)}
            emits.append(asyncio.create_task(self._dispatcher.emit(f"good.{number % len(self._ids)}", data)))
        await asyncio.gather(*emits)
        found: list[float] = []
        until = time.perf_counter() + 120
        while len(found) < len(emits) and time.perf_counter() < until:
            await asyncio.sleep(0.05)
            found.extend(await self._there.delays())
        assert len(found) == len(emits), f"{len(found)} of {len(emits)} arrived"
        return found

    async def burst(self, each: int) -> float:
        """Let `each` events wait for each of them, open all at once, and return the deliveries in a second."""
        total = each * len(self._ids)
        endpoints = self._dispatcher.endpoints
        await asyncio.gather(*(endpoints.pause(id) for id in self._ids))
        for _ in range(each):
            await self._dispatcher.emit("good", {"text": "x" * 960})
        arrived, all_there = 0, asyncio.Event()

        def count(seen: DeliverySucceeded) -> None:
            nonlocal arrived
            arrived += seen.event_type == "good"
            if arrived == total:
                all_there.set()

        subscription = self._dispatcher.observe(count, DeliverySucceeded)
        begin = time.perf_counter()
        await asyncio.gather(*(endpoints.resume(id) for id in self._ids))
        await asyncio.wait_for(all_there.wait(), 60)
        took = time.perf_counter() - begin
        await subscription.aclose()
        return total / took


@contextmanager
def refusing() -> Iterator[str]:
    """Give the url of a port on which nobody listens, and nobody else may."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/"


def store_waiting(path: Path, endpoints: Sequence[str], rows: int, *, first: int = 0) -> None:
    """Store events that wait for these endpoints in turn, quickly. Nobody may have the file open for delivering.

    `first` is how many were stored so before: their ids go on from there.
    """
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("CREATE TEMP TABLE endpoint (i INTEGER PRIMARY KEY, id TEXT)")
    database.executemany("INSERT INTO endpoint VALUES (?, ?)", enumerate(endpoints))
    now = time.time_ns() // 1000
    last = first + rows
    for begin in range(first, last, _BATCH):
        span = (begin, min(begin + _BATCH, last))
        database.execute("BEGIN")
        database.execute(
            _FILL + "INSERT INTO hookwright_event SELECT printf('evt_00%010x%020d', i, i), 'bad', NULL, x'7b7d', '{}',"
            f" {now} - {last} + i, {now} - {last} + i, NULL, NULL, 1, NULL, NULL FROM n",
            span,
        )
        database.execute(
            _FILL + "INSERT INTO hookwright_delivery (id, event_id, endpoint_id, state, available_at,"
            " created_at) SELECT printf('dlv_00%010x%020d', i, i), printf('evt_00%010x%020d', i, i),"
            f" (SELECT id FROM endpoint WHERE endpoint.i = n.i % {len(endpoints)}), 'pending', 0,"
            f" {now} - {last} + i FROM n",
            span,
        )
        database.execute("COMMIT")
    # Early is allowed: the first claim of a lane finds out. They have failed before, and no pause holds them any more.
    database.execute(
        "UPDATE hookwright_lane SET due_at = 0, failures = 5, failing_since = ?, last_success = 0, last_at = ?"
        " WHERE endpoint_id IN (SELECT id FROM endpoint) AND earned = 0",
        (now, now),
    )
    database.execute("UPDATE hookwright_lane SET due_at = 0 WHERE endpoint_id IN (SELECT id FROM endpoint)")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
