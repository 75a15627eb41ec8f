"""fanout: what each delivery costs an emit to 1, 10, ... 10,000 endpoints, and the emits of others beside it."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks._fleet import p99
from benchmarks._harness import Report, Result, Series, at_most, tell
from benchmarks._many import store_endpoints, typical
from hookwright import Dispatcher, SQLiteStorage
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._stalls import Watch
    from hookwright import Receipt
    from hookwright._models import EventRow, NewDelivery

ROUNDS = 5
EMITTERS = 8
ROWS = 10_000
"""A round emits events until about so many deliveries are stored, or a fiftieth as many events."""

WALL, CPU = "us each", "us CPU each"
OURS, REFERENCE = "one event to {:,}", "bare executemany of {:,} rows"


class Clocked(SQLiteStorage):
    """Keeps how long the longest `enqueue` took (ms), from asking to having it on disk."""

    longest = 0.0

    async def enqueue(self, event: EventRow, deliveries: Sequence[NewDelivery], **how: Any) -> Receipt:
        begin = time.perf_counter()
        receipt = await super().enqueue(event, deliveries, **how)
        if len(deliveries) > 1:
            self.longest = max(self.longest, (time.perf_counter() - begin) * 1000)
        return receipt


class Spent(NamedTuple):
    """Microseconds of each delivery, or row."""

    wall: float
    cpu: float


class Beside(NamedTuple):
    """One event for all (ms): the emit, its transaction, and the emits of others beside it."""

    emit: float
    transaction: float
    others: float


class _Bare:
    """The same columns in a table that has but its primary key, one FULL transaction for each event."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        columns = "id TEXT PRIMARY KEY, event_id, endpoint_id, state, available_at, created_at, finished_at"
        self._database.execute(f"CREATE TABLE delivery ({columns}) WITHOUT ROWID")
        self._number = 0

    def store(self, rows: int) -> None:
        self._number += 1
        event_id = f"evt_{self._number:028x}"
        prefix = f"dlv_{self._number:012x}"
        made = [(f"{prefix}{n:016x}", event_id, f"ep_{n:028x}", "pending", 0, n, None) for n in range(rows)]
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?)", made)
        self._database.execute("COMMIT")

    async def spent(self, rows: int, events: int) -> Spent:
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(events):
            await asyncio.to_thread(self.store, rows)
        each = rows * events / 1e6
        return Spent((time.perf_counter() - begin) / each, (time.process_time() - cpu) / each)


async def _spent(dispatcher: Dispatcher, endpoints: int, events: int) -> Spent:
    cpu, begin = time.process_time(), time.perf_counter()
    for _ in range(events):
        receipt = await dispatcher.emit(f"to.{endpoints}")
        assert receipt.delivery_count == endpoints
    each = endpoints * events / 1e6
    return Spent((time.perf_counter() - begin) / each, (time.process_time() - cpu) / each)


async def _beside(dispatcher: Dispatcher, storage: Clocked, endpoints: int, watch: Watch) -> Beside:
    storage.longest, done = 0.0, False
    emits: list[tuple[float, float]] = []

    async def emitter() -> None:
        while not done:
            begin = time.perf_counter()
            await dispatcher.emit("few")
            emits.append((begin, time.perf_counter()))

    async with watch.probing():
        emitters = [asyncio.create_task(emitter()) for _ in range(EMITTERS)]
        await asyncio.sleep(0.2)
        begin = time.perf_counter()
        await dispatcher.emit(f"to.{endpoints}")
        end = time.perf_counter()
        await asyncio.sleep(0.05)
        done = True
        await asyncio.gather(*emitters)
    beside = [(until - since) * 1000 for since, until in emits if until > begin and since < end]
    return Beside((end - begin) * 1000, storage.longest, p99(beside))


def _report(spent: dict[str, list[Spent]], beside: list[Beside], sizes: Sequence[int]) -> Report:
    most = sizes[-1]
    report = Report(f"fanout: one event to 1 ... {most:,} endpoints, FULL; nothing is delivered meanwhile")
    report.results += [Result(name, WALL, [one.wall for one in found]) for name, found in spent.items()]
    report.results += [Result(name, CPU, [one.cpu for one in found]) for name, found in spent.items()]
    for size in sizes:
        for unit in (WALL, CPU):
            report.compare(OURS.format(size), REFERENCE.format(size), unit=unit)
    limit = sorted(one.transaction for one in beside)[len(beside) // 2] + 20
    shown = (
        (f"{most:,}, {EMITTERS} emitters beside it: emit", [one.emit for one in beside], at_most(1000, "ms")),
        ("  its transaction", [one.transaction for one in beside], at_most(1000, "ms")),
        ("  emit p99 of the others", [one.others for one in beside], at_most(round(limit), "ms")),
    )
    report.results += [Result(name, "ms", values, target) for name, values, target in shown]
    report.axes = ("endpoints", "us a delivery")
    for name, template in (("emit", OURS), ("bare executemany", REFERENCE)):
        line = [report.find(template.format(size), WALL).median for size in sizes]
        report.series.append(Series(name, list(sizes), line))
    return report


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    sizes, rows, rounds = ((1, 10, 100), 100, 1) if quick else ((1, 10, 100, 1_000, 10_000), ROWS, ROUNDS)
    spent: defaultdict[str, list[Spent]] = defaultdict(list)
    beside = []
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        path = Path(folder) / "hooks.db"
        storage, bare = Clocked(path), _Bare(Path(folder) / "bare.db")
        async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
            await dispatcher.endpoints.create("https://receiver.example/", events=["few"])
            types = [[f"to.{size}" for size in sizes if number < size] for number in range(sizes[-1])]
            store_endpoints(path, [typical(number, None, each) for number, each in enumerate(types)])
            await dispatcher.emit("few")  # which reads the endpoints
            for number in range(rounds):
                for size in sizes:
                    tell(f"round {number + 1} of {rounds}: {size:,}")
                    events = min(max(1, rows // size), max(1, rows // 50))
                    spent[REFERENCE.format(size)].append(await bare.spent(size, events))
                    before = storage.transactions
                    spent[OURS.format(size)].append(await _spent(dispatcher, size, events))
                    assert storage.transactions - before == events
                beside.append(await _beside(dispatcher, storage, sizes[-1], watch))
    report = _report(spent, beside, sizes)
    report.notes.append(f"one transaction for each event, in each of {rounds} rounds")
    return report
