"""scale: an event for each of ten thousand endpoints, and a healthy endpoint while the others get theirs."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._fleet import Fleet, p99
from benchmarks._harness import Report, Result, at_most, tell
from benchmarks._receiver import receivers
from hookwright import DeliverySucceeded, Dispatcher, NetworkPolicy, NewEvent

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

ENDPOINTS = 10_000
ROUNDS = 3
_AT_ONCE = 500


async def _create(dispatcher: Dispatcher, url: str, endpoints: int) -> None:
    for begin in range(0, endpoints, _AT_ONCE):
        span = range(begin, min(begin + _AT_ONCE, endpoints))
        await asyncio.gather(*(dispatcher.endpoints.create(f"{url}each/{n}", events=[f"one.{n}"]) for n in span))


async def _one_to_each(report: Report, path: Path, endpoints: int, rounds: int, seconds: float, watch: Watch) -> None:
    times, before, beside = [], [], []
    async with (
        receivers(1) as there,
        Dispatcher(
            f"sqlite:///{path}", network=NetworkPolicy.development(), shutdown_timeout=0.2, keys=[]
        ) as dispatcher,
    ):
        fleet = Fleet(dispatcher, there)
        await fleet.create(20)
        await _create(dispatcher, there.answering[0], endpoints)
        for number in range(rounds):
            tell(f"one event for each: round {number + 1} of {rounds}")
            before.append(p99(await fleet.stream(seconds)))
            delivered = asyncio.create_task(_delivered(dispatcher, endpoints))
            async with watch.probing():
                beside.append(p99(await fleet.stream(seconds)))
            times.append(await delivered)
    # The first time nobody of them has answered yet, and half the slots stay free for those that have. Later everybody
    # is trusted, and who emits takes a turn behind all that are due already.
    limit = max(100.0, 1.2 * before[0])
    report.results.append(Result("one event for each: all delivered", "s", times))
    report.results.append(Result("  start delay p99 of others, before", "ms", before))
    report.results.append(
        Result("  meanwhile, none has answered yet", "ms", beside[:1], target=at_most(round(limit), "ms", judged=False))
    )
    if beside[1:]:
        whole = at_most(round(statistics.median(times) * 1000), "ms", judged=False)
        report.results.append(Result("  meanwhile, all have answered", "ms", beside[1:], target=whole))


async def _delivered(dispatcher: Dispatcher, endpoints: int) -> float:
    arrived, all_there = 0, asyncio.Event()

    def count(seen: DeliverySucceeded) -> None:
        nonlocal arrived
        arrived += seen.event_type.startswith("one.")
        if arrived == endpoints:
            all_there.set()

    subscription = dispatcher.observe(count, DeliverySucceeded)
    begin = time.perf_counter()
    for first in range(0, endpoints, _AT_ONCE):
        span = range(first, min(first + _AT_ONCE, endpoints))
        await dispatcher.emit_many([NewEvent(f"one.{n}") for n in span])
    await asyncio.wait_for(all_there.wait(), 120)
    await subscription.aclose()
    return time.perf_counter() - begin


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    endpoints, rounds, seconds = (100, 1, 0.2) if quick else (ENDPOINTS, ROUNDS, 5.0)
    report = Report(f"scale: {endpoints:,} endpoints")
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        await _one_to_each(report, Path(folder) / "each.db", endpoints, rounds, seconds, watch)
    return report
