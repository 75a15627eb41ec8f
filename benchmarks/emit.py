"""emit: durable events a second, their CPU and latency, against one aiosqlite transaction for each event.

Nothing is delivered meanwhile.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiosqlite

from benchmarks._fleet import p99
from benchmarks._harness import CPU, Cost, Report, Result, Series, alternate_costs, at_least, at_most
from hookwright import Dispatcher, SQLiteStorage
from hookwright.storage.sqlite._owner import Connected
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._stalls import Watch
    from hookwright.storage.sqlite._owner import Database

DATA = {"video_id": "vid_123", "text": "x" * 960}
EMITTERS = (1, 16, 64, 256)
MANY = 64
MATCHING = (1, 3, 100)
RATE = "events/s"
REFERENCE = "aiosqlite, a transaction each"


class Counts(NamedTuple):
    """How many events a round has."""

    reference: int
    by_emitters: dict[int, int]
    by_matching: dict[int, int]
    rounds: int


FULL = Counts(800, {1: 800, 16: 3200, 64: 12_800, 256: 7680}, {3: 3200, 100: 640}, rounds=5)
QUICK = Counts(16, {1: 16, 16: 32, 64: 128, 256: 256}, {3: 64, 100: 64}, rounds=1)


class _Rounds:
    """What is measured. Latencies and commits (ms) are of the rounds with 64 emitters and one endpoint."""

    def __init__(self, folder: Path, counts: Counts, watch: Watch) -> None:
        self._folder = folder
        self._counts = counts
        self._watch = watch
        self._number = 0
        self.latencies: list[float] = []
        self.medians: list[float] = []
        self.commits: list[float] = []
        self.late_commits: list[float] = []
        self.per_transaction: list[float] = []

    def all(self) -> dict[str, Callable[[], Awaitable[Cost]]]:
        """Return a round of each."""
        rounds: dict[str, Callable[[], Awaitable[Cost]]] = {REFERENCE: self._transactions}
        for emitters, count in self._counts.by_emitters.items():
            rounds[name_of(emitters)] = self._of(emitters, 1, count)
        for matching, count in self._counts.by_matching.items():
            rounds[name_of(MANY, matching)] = self._of(MANY, matching, count)
        return rounds

    def _of(self, emitters: int, matching: int, count: int) -> Callable[[], Awaitable[Cost]]:
        return lambda: self._emit(emitters, matching, count)

    def _path(self) -> Path:
        self._number += 1
        return self._folder / f"{self._number}.db"

    async def _transactions(self) -> Cost:
        count, path = self._counts.reference, self._path()
        async with aiosqlite.connect(path, isolation_level=None) as database:
            await database.execute("PRAGMA journal_mode = WAL")
            await database.execute("PRAGMA synchronous = FULL")
            await database.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, type TEXT, data TEXT)")
            await database.execute("CREATE TABLE delivery (id INTEGER PRIMARY KEY, event_id INTEGER, state TEXT)")
            data = '{"video_id":"vid_123","text":"' + "x" * 960 + '"}'
            cpu, begin = time.process_time(), time.perf_counter()
            for number in range(count):
                await database.execute("BEGIN IMMEDIATE")
                await database.execute("INSERT INTO event VALUES (?, 'video.ready', ?)", (number, data))
                await database.execute("INSERT INTO delivery VALUES (?, ?, 'pending')", (number, number))
                await database.execute("COMMIT")
            cost = Cost((time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin))
        path.unlink()
        return cost

    async def _emit(self, emitters: int, matching: int, count: int) -> Cost:
        path = self._path()
        storage = SQLiteStorage(path)
        latencies: list[float] = []
        async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
            for number in range(matching):
                await dispatcher.endpoints.create(f"https://receiver.example/{number}", events=["*"])
            await dispatcher.emit("warm.up")
            before = storage.transactions
            commits = _clock_commits(storage)

            async def emitter() -> None:
                for _ in range(count // emitters):
                    begin = time.perf_counter()
                    await dispatcher.emit("video.ready", DATA)
                    latencies.append((time.perf_counter() - begin) * 1000)

            cpu, begin = time.process_time(), time.perf_counter()
            async with self._watch.probing():
                await asyncio.gather(*(emitter() for _ in range(emitters)))
            cost = Cost((time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin))
            if (emitters, matching) == (MANY, 1):
                self.latencies.append(p99(latencies))
                self.medians.append(statistics.median(latencies))
                self.commits.append(statistics.median(commits))
                self.late_commits.append(p99(commits))
                self.per_transaction.append(count / (storage.transactions - before))
        path.unlink()
        return cost


def name_of(emitters: int, matching: int = 1) -> str:
    """Return how a round is called."""
    who = "one emitter" if emitters == 1 else f"{emitters} emitters"
    return who if matching == 1 else f"{who}, {matching} endpoints"


def _clock_commits(storage: SQLiteStorage) -> list[float]:
    """Return a list that gets the milliseconds of each group commit: from its hop to the thread until it is on disk."""
    connected, found = storage._opened()._connected, []  # noqa: SLF001  # what a commit takes, nothing public tells

    async def clocked(function: Callable[[Database], Any]) -> Any:
        begin = time.perf_counter()
        answer = await Connected.call(connected, function)
        found.append((time.perf_counter() - begin) * 1000)
        return answer

    connected.call = clocked  # type: ignore[method-assign]  # the same, with a clock beside it
    return found


def _compare(report: Report, measured: _Rounds) -> None:
    many = name_of(MANY)
    report.results += [
        Result(f"median group commit, {many}", "ms", measured.commits),
        Result(f"p99 group commit, {many}", "ms", measured.late_commits),
        Result(f"emit median, {many}", "ms", measured.medians),
        Result(f"emit p99, {many}", "ms", measured.latencies),
        Result(f"events per transaction, {many}", "events", measured.per_transaction, at_least(51.2, "events")),
    ]
    report.compare(f"emit p99, {many}", f"median group commit, {many}", target=at_most(3.0))
    report.compare(name_of(1), REFERENCE, unit=RATE, target=at_least(0.60))
    report.compare(many, REFERENCE, unit=RATE, target=at_least(5.0))
    report.compare(many, REFERENCE, unit=CPU, target=at_most(0.40))
    for result in report.results:
        if result.unit in (CPU, RATE) and result.name != REFERENCE and not result.comparisons:
            report.compare(result.name, REFERENCE, unit=result.unit)
    for matching in MATCHING:
        rate = report.find(name_of(MANY, matching), RATE).median
        report.notes.append(f"{many}, {matching} matching: {rate * matching:,.0f} deliveries/s stored")
    report.axes = ("emitters, or matching endpoints", "us CPU an event")
    by_emitters = [report.find(name_of(emitters), CPU).median for emitters in EMITTERS]
    by_matching = [report.find(name_of(MANY, matching), CPU).median for matching in MATCHING]
    report.series = [
        Series("by emitters, one matching endpoint", list(EMITTERS), by_emitters),
        Series(f"by matching endpoints, {many}", list(MATCHING), by_matching),
    ]


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    counts = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        measured = _Rounds(Path(folder), counts, watch)
        report = await alternate_costs(
            "emit: 1 KB events, one matching endpoint unless said, FULL", measured.all(), count=counts.rounds, rate=RATE
        )
    _compare(report, measured)
    return report
