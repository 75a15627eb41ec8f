"""backlog: CPU of a delivery and memory of the process with 1,000 to 1,000,000 waiting, a fresh process each.

Beside it a bare indexed select on the same file.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._alone import delivering
from benchmarks._fleet import store_waiting
from benchmarks._harness import CPU, Report, Result, Series, at_most, tell
from benchmarks._many import store_endpoints, typical
from hookwright import Dispatcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._stalls import Watch

ROUNDS = 5
SIZES = (1_000, 10_000, 100_000, 1_000_000)
FLEETS = (20, 1_000)
SELECTS = 2_000
WALL, MB = "us", "MB"


class Deliveries(NamedTuple):
    """How many there are in a round before it is measured, and while it is."""

    warm: int
    measured: int


class Waiting:
    """A database in which so many wait, on average, while a round is measured."""

    def __init__(self, path: Path, waiting: int, endpoints: int, each: Deliveries) -> None:
        self.path = path
        self.name = f"{waiting:,} wait, {endpoints:,} endpoints"
        self._level = waiting + each.warm + each.measured // 2
        self._rows = [typical(number, None, ["bad"]) for number in range(endpoints)]
        self._stored = 0

    async def create(self) -> None:
        """Store the endpoints."""
        async with Dispatcher(f"sqlite:///{self.path}", deliver=False, keys=[]):
            pass
        store_endpoints(self.path, self._rows)

    def fill(self) -> None:
        """Store what is missing. All endpoints have answered their last attempt, and have something that is due."""
        database = sqlite3.connect(self.path, isolation_level=None)
        [left] = database.execute("SELECT count(*) FROM hookwright_delivery WHERE state = 'pending'").fetchone()
        store_waiting(self.path, [row.id for row in self._rows], self._level - left, first=self._stored)
        self._stored += self._level - left
        database.execute(
            "UPDATE hookwright_lane SET due_at = 0, earned = 1, last_success = 1, failures = 0, failing_since = NULL"
        )
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()

    def select(self) -> float:
        """Return what one select of an endpoint's next row takes (us of CPU)."""
        database = sqlite3.connect(self.path, isolation_level=None)
        ids = [self._rows[number % len(self._rows)].id for number in range(SELECTS)]
        begin = time.process_time()
        for endpoint_id in ids:
            database.execute(
                "SELECT id FROM hookwright_delivery WHERE endpoint_id = ? AND available_at IS NOT NULL"
                " ORDER BY available_at, id LIMIT 1",
                (endpoint_id,),
            ).fetchone()
        took = (time.process_time() - begin) / SELECTS * 1e6
        database.close()
        return took


async def _measured(
    all_waiting: list[Waiting], each: Deliveries, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {one.name: defaultdict(list) for one in all_waiting}
    selects: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for one in all_waiting:
            tell(f"round {number + 1} of {rounds}: {one.name}")
            await asyncio.to_thread(one.fill)
            selects[one.name].append(one.select())
            for figure, value in (await delivering(one.path, *each)).items():
                found[one.name][figure].append(value)
    return found, selects


def _compare(report: Report, names: Sequence[str]) -> None:
    least, most = names[0], names[-1]
    for name in names[1:]:
        report.compare(name, least, unit=CPU, target=at_most(1.20) if name == most else None)
        report.compare(f"select: {name}", f"select: {least}")
    after = f"memory: {most}"
    report.compare(after, f"memory: {least}", target=at_most(1.10))
    report.compare(after, f"memory at start: {most}")


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    sizes = (100, 1_000) if quick else SIZES
    fleets = FLEETS[:1] if quick else FLEETS
    each, rounds = (Deliveries(50, 100), 1) if quick else (Deliveries(500, 1_500), ROUNDS)
    report = Report(f"backlog: deliveries answered at once, {each.measured:,} measured while so many wait")
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
        folder = Path(name)
        by_fleet = {
            fleet: [Waiting(folder / f"{fleet}-{size}.db", size, fleet, each) for size in sizes] for fleet in fleets
        }
        all_waiting = [one for line in by_fleet.values() for one in line]
        for one in all_waiting:
            await one.create()
        found, selects = await _measured(all_waiting, each, rounds)
    report.results += [Result(name, CPU, figures["cpu"]) for name, figures in found.items()]
    report.results += [Result(f"select: {name}", "us CPU each", values) for name, values in selects.items()]
    report.results += [Result(name, WALL, figures["wall"]) for name, figures in found.items()]
    for name, figures in found.items():
        report.results.append(Result(f"memory at start: {name}", MB, figures["started"]))
        report.results.append(Result(f"memory: {name}", MB, figures["memory"]))
    report.axes = ("waiting", "us CPU a delivery, or a select")
    for fleet, line in by_fleet.items():
        names = [one.name for one in line]
        _compare(report, names)
        of_fleet = [report.find(name, CPU).median for name in names]
        bare = [report.find(f"select: {name}").median for name in names]
        report.series.append(Series(f"a delivery, {fleet:,} endpoints", list(sizes), of_fleet))
        report.series.append(Series(f"a bare select, {fleet:,} endpoints", list(sizes), bare))
    return report
