"""scale: ten thousand endpoints: one event for all of them, and one event for each.

What is beside them: emitters while the one big transaction is written, a healthy endpoint while the others get theirs.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._fleet import Fleet, p99
from benchmarks._harness import Report, Result, at_most, tell
from benchmarks._receiver import receivers
from hookwright import DeliverySucceeded, Dispatcher, NetworkPolicy, NewEvent, SQLiteStorage
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._stalls import Watch
    from hookwright import Receipt
    from hookwright._models import EventRow, NewDelivery

ENDPOINTS = 10_000
ROUNDS = 5
EMITTERS = 8
_AT_ONCE = 500


class Clocked(SQLiteStorage):
    """Keeps how long the longest `enqueue` took (ms), from asking to having it on disk."""

    longest = 0.0

    async def enqueue(self, event: EventRow, deliveries: Sequence[NewDelivery], *, endpoints_revision: int) -> Receipt:
        begin = time.perf_counter()
        receipt = await super().enqueue(event, deliveries, endpoints_revision=endpoints_revision)
        if len(deliveries) > 1:
            self.longest = max(self.longest, (time.perf_counter() - begin) * 1000)
        return receipt


class FannedOut(NamedTuple):
    """One event for all (ms): the emit, its transaction, and the emits of others beside it; transactions it took."""

    emit: float
    transaction: float
    others: float
    alone: int


async def _create(dispatcher: Dispatcher, url: str, endpoints: int) -> None:
    for begin in range(0, endpoints, _AT_ONCE):
        span = range(begin, min(begin + _AT_ONCE, endpoints))
        await asyncio.gather(*(dispatcher.endpoints.create(f"{url}all/{n}", events=["all", f"one.{n}"]) for n in span))


async def _fan_out(dispatcher: Dispatcher, storage: Clocked, endpoints: int, watch: Watch) -> FannedOut:
    await dispatcher.emit("few")  # which reads the endpoints, if they changed
    before = storage.transactions
    receipt = await dispatcher.emit("all")
    alone = storage.transactions - before
    assert receipt.delivery_count == endpoints
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
        await dispatcher.emit("all")
        end = time.perf_counter()
        await asyncio.sleep(0.05)
        done = True
        await asyncio.gather(*emitters)
    beside = [(until - since) * 1000 for since, until in emits if until > begin and since < end]
    return FannedOut((end - begin) * 1000, storage.longest, p99(beside), alone)


async def _one_to_all(report: Report, path: Path, endpoints: int, rounds: int, watch: Watch) -> None:
    storage = Clocked(path)
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
        await _create(dispatcher, "https://receiver.example/", endpoints)
        await dispatcher.endpoints.create("https://receiver.example/", events=["few"])
        found = []
        for number in range(rounds):
            tell(f"one event for all: round {number + 1} of {rounds}")
            found.append(await _fan_out(dispatcher, storage, endpoints, watch))
    limit = sorted(one.transaction for one in found)[len(found) // 2] + 20
    shown = (
        ("one event for all: emit", [one.emit for one in found], at_most(1000, "ms")),
        ("  its transaction", [one.transaction for one in found], at_most(1000, "ms")),
        ("  emit p99 of others beside it", [one.others for one in found], at_most(round(limit), "ms")),
    )
    report.results += [Result(name, "ms", values, target=target) for name, values, target in shown]
    assert all(one.alone == 1 for one in found)
    report.notes.append(f"one event for all: one transaction in each of {rounds} rounds; {EMITTERS} emitters beside it")


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
        await _one_to_all(report, Path(folder) / "all.db", endpoints, rounds, watch)
        await _one_to_each(report, Path(folder) / "each.db", endpoints, 1 if quick else 3, seconds, watch)
    return report
