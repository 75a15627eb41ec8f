"""stall: how late the loop is while everything runs at once, in alternation with an idle loop.

Emitters, deliveries, retries to endpoints that fail, a reader of the history, and endpoints that are created.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._harness import Report, Result, tell
from benchmarks._receiver import receivers
from hookwright import (
    DeliveryRetrying,
    DeliverySucceeded,
    DirectTransport,
    Dispatcher,
    NetworkPolicy,
    Profile,
    RetryPolicy,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._receiver import Receivers
    from benchmarks._stalls import Lateness, Watch

ROUNDS = 5
SECONDS = 6.0
HEALTHY = 20
FAILING = 5
EMITTERS = 8
DATA = {"video_id": "vid_123", "text": "x" * 960}

# Some waits are longer than a round, as they are in life: what waits is part of the load.
_IMPATIENT = Profile(retry=RetryPolicy.schedule(0, 0.2, 0.2, 0.5, 0.5, 60))


class Load:
    """Everything at once, on a dispatcher with a history of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._done = False
        self.counts: Counter[str] = Counter()

    async def create(self, there: Receivers) -> None:
        """Create the endpoints once; later rounds find them."""
        if (await self._dispatcher.endpoints.list(limit=1)).items:
            return
        for number in range(HEALTHY):
            await self._dispatcher.endpoints.create(f"{there.answering[0]}{number}", events=[f"good.{number}"])
        for number in range(FAILING):
            url = f"{there.answering[0]}fail/{number}"
            await self._dispatcher.endpoints.create(url, events=["bad"], profile="impatient")

    async def run(self, seconds: float) -> None:
        """Let everybody work for so long."""
        delivered = self._dispatcher.observe(self._count_delivered, DeliverySucceeded)
        retried = self._dispatcher.observe(self._count_retried, DeliveryRetrying)
        work = [self._repeat(0.005, self._emit) for _ in range(EMITTERS)]
        work += [self._repeat(0.02, self._read), self._repeat(0.05, self._create_one)]
        tasks = [asyncio.create_task(one) for one in work]
        await asyncio.sleep(seconds)
        self._done = True
        await asyncio.gather(*tasks)
        await delivered.aclose()
        await retried.aclose()

    async def _repeat(self, pause: float, work: Callable[[], Awaitable[None]]) -> None:
        while not self._done:
            await work()
            await asyncio.sleep(pause)

    async def _emit(self) -> None:
        self.counts["events"] += 1
        number = self.counts["events"]
        await self._dispatcher.emit("bad" if number % 20 == 0 else f"good.{number % HEALTHY}", DATA)

    async def _read(self) -> None:
        self.counts["pages"] += 1
        page = await self._dispatcher.deliveries.list(limit=50)
        for delivery in page.items[-1:]:
            await self._dispatcher.deliveries.attempts(delivery.id)

    async def _create_one(self) -> None:
        self.counts["endpoints"] += 1
        await self._dispatcher.endpoints.create("https://receiver.example/", events=["other"])

    def _count_delivered(self, seen: DeliverySucceeded) -> None:
        self.counts["deliveries"] += 1

    def _count_retried(self, seen: DeliveryRetrying) -> None:
        self.counts["retries"] += 1


async def _round(path: Path, there: Receivers, seconds: float, watch: Watch) -> tuple[Lateness, Counter[str]]:
    async with Dispatcher(
        f"sqlite:///{path}",
        profiles={"impatient": _IMPATIENT},
        transport=DirectTransport(),
        network=NetworkPolicy.development(),
        shutdown_timeout=0.2,
        keys=[],
    ) as dispatcher:
        load = Load(dispatcher)
        await load.create(there)
        async with watch.probing() as found:
            await load.run(seconds)
        return found, load.counts


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    rounds, seconds = (1, 1.0) if quick else (ROUNDS, SECONDS)
    idle: list[Lateness] = []
    busy: list[Lateness] = []
    counts: list[Counter[str]] = []
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        async with receivers(1) as there:
            for number in range(rounds):
                tell(f"round {number + 1} of {rounds}")
                idle.append(await watch.control(seconds / 2))
                found, counted = await _round(Path(folder) / "hooks.db", there, seconds, watch)
                busy.append(found)
                counts.append(counted)
    report = Report(f"stall: all at once for {seconds:g} s a round: {EMITTERS} emitters, {HEALTHY} endpoints answer")
    for name, found_in in (("an idle loop", idle), ("the mixed load", busy)):
        report.results.append(Result(f"p99.9 in {name}", "ms late", [one.p999 for one in found_in]))
        report.results.append(Result(f"worst in {name}", "ms late", [one.worst for one in found_in]))
    for what in ("events", "deliveries", "retries", "pages", "endpoints"):
        report.results.append(Result(what, "/s", [one[what] / seconds for one in counts]))
    report.notes.append("the last four lines are of all rounds together: what is asked holds for the worst of them")
    return report
