"""isolation: what dead endpoints, with many deliveries waiting, do to the healthy ones.

Two dispatchers in one process take turns. They have the same healthy endpoints; one has dead endpoints as well, which
are paused while the other is measured.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._fleet import Fleet, p99, refusing, store_waiting
from benchmarks._harness import Comparison, Report, Result, at_least, at_most, tell
from benchmarks._receiver import receivers
from hookwright import Dispatcher, NetworkPolicy

if TYPE_CHECKING:
    from benchmarks._receiver import Receivers
    from benchmarks._stalls import Watch

ROUNDS = 5


class Case(NamedTuple):
    """How many are healthy, how many dead and how, what waits for all of the dead, and what is asked of the healthy."""

    name: str
    healthy: int
    dead: int
    refusing: bool
    waiting: int
    seconds: float
    each: int
    slower: float


CASES = (
    Case("1 of 21 refuses", 20, 1, True, 100_000, 4.0, 150, 1.2),
    Case("1 of 21 hangs", 20, 1, False, 100_000, 4.0, 150, 1.2),
    Case("100 of 1,000 hang", 900, 100, False, 100_000, 5.0, 3, 2.0),
)
QUICK = (
    Case("1 of 6 refuses", 5, 1, True, 500, 0.2, 5, 1.2),
    Case("1 of 6 hangs", 5, 1, False, 500, 0.2, 5, 1.2),
)


class Measured(NamedTuple):
    """What one turn showed: start delay (ms, p99), deliveries a second, and CPU (us) for each of them."""

    delay: float
    rate: float
    cpu: float


class Side:
    """One of the two dispatchers."""

    def __init__(self, dispatcher: Dispatcher, there: Receivers) -> None:
        self._dispatcher = dispatcher
        self.fleet = Fleet(dispatcher, there)
        self.dead: list[str] = []

    async def add_dead(self, case: Case, answering: str, dead: str, path: Path) -> None:
        """Create endpoints that answered until a moment ago, so that nothing tells them apart, with rows waiting."""
        create, update = self._dispatcher.endpoints.create, self._dispatcher.endpoints.update
        for n in range(case.dead):
            self.dead.append((await create(f"{answering}dead/{n}", events=["dead"])).id)
        for _ in range(4):
            await self._dispatcher.emit("dead")
            await self._dispatcher.drain()
        for n, id in enumerate(self.dead):
            await update(id, url=f"{dead}{n}")
        await self.pause()
        await asyncio.to_thread(store_waiting, path, self.dead, case.waiting)

    async def pause(self) -> None:
        """Hold the dead ones."""
        await asyncio.gather(*(self._dispatcher.endpoints.pause(id) for id in self.dead))

    async def measure(self, case: Case, watch: Watch) -> Measured:
        """Take one turn."""
        await asyncio.gather(*(self._dispatcher.endpoints.resume(id) for id in self.dead))
        async with watch.probing():
            delay = p99(await self.fleet.stream(case.seconds))
        cpu = time.process_time()
        rate = await self.fleet.burst(case.each)
        cpu = time.process_time() - cpu
        await self.pause()
        return Measured(delay, rate, cpu / (case.healthy * case.each) * 1e6)

    async def attempts(self) -> int:
        """Return how many attempts the dead ones had."""
        found = [await self._dispatcher.endpoints.stats(id) for id in self.dead]
        return sum(stats.attempts for stats in found)


async def _compare(case: Case, rounds: int, folder: Path, watch: Watch) -> tuple[list[Measured], list[Measured], int]:
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(receivers(1, 1))
        sides = []
        for name in ("without", "with"):
            dispatcher = Dispatcher(
                f"sqlite:///{folder / name}.db", network=NetworkPolicy.development(), shutdown_timeout=0.2, keys=[]
            )
            sides.append(Side(await stack.enter_async_context(dispatcher), there))
            await sides[-1].fleet.create(case.healthy)
        without, beside = sides
        dead = stack.enter_context(refusing()) if case.refusing else there.hanging[0]
        await beside.add_dead(case, there.answering[0], dead, folder / "with.db")
        found: tuple[list[Measured], list[Measured]] = ([], [])
        for number in range(rounds):
            tell(f"{case.name}: round {number + 1} of {rounds}")
            turns = [(without, found[0]), (beside, found[1])]
            for side, measured in turns if number % 2 == 0 else reversed(turns):
                measured.append(await side.measure(case, watch))
        return *found, await beside.attempts()


def _tell(report: Report, case: Case, without: list[Measured], beside: list[Measured], attempts: int) -> None:
    reference = Result("  start delay p99, without", "ms", [measured.delay for measured in without])
    limit = max(100.0, case.slower * reference.median)
    delays = [measured.delay for measured in beside]
    report.results += [
        reference,
        Result(f"{case.name}: start delay p99", "ms", delays, target=at_most(round(limit), "ms")),
    ]
    report.results.append(Result("  throughput, without", "/s", [measured.rate for measured in without]))
    report.results.append(Result(f"{case.name}: throughput", "/s", [measured.rate for measured in beside]))
    pairs = [two.rate / one.rate for one, two in zip(without, beside, strict=True)]
    target = at_least(0.95) if case.dead == 1 else None
    report.results[-1].comparisons.append(Comparison(statistics.median(pairs), target, "without"))
    report.results.append(Result("  CPU for each, without", "us", [measured.cpu for measured in without]))
    report.results.append(Result(f"{case.name}: CPU for each", "us", [measured.cpu for measured in beside]))
    report.notes.append(f"{case.name}: {case.waiting:,} waited; {attempts:,} attempts at the dead, warm-up included")


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    rounds = 1 if quick else ROUNDS
    report = Report("isolation: the healthy beside the dead; start delay from emit to the receiver's first byte")
    for case in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
            _tell(report, case, *await _compare(case, rounds, Path(folder), watch))
    report.notes.append(f"{rounds} rounds in alternation; the ratio is the median of each round's own")
    return report
