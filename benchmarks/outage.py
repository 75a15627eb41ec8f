"""outage: endpoints that were down with thousands of deliveries waiting come back at once: their room, and the others.

Rooms are exact: a returning receiver counts what each endpoint has in flight before its first answer, its second, ...
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._fleet import Fleet, p99, store_waiting
from benchmarks._harness import Report, Result, at_most, tell
from benchmarks._receiver import receivers
from hookwright import Dispatcher, NetworkPolicy, Profile, Timeouts

if TYPE_CHECKING:
    from benchmarks._receiver import Receivers
    from benchmarks._stalls import Watch

ROUNDS = 3
HEALTHY = 20
CAP = 16


class Case(NamedTuple):
    """How many were down, what waits for each, and how long is looked."""

    down: int
    each: int
    seconds: float


CASES = (Case(1, 5_000, 5.0), Case(50, 2_000, 5.0))
QUICK = (Case(1, 100, 1.5),)

# They hang for this long while they are down, so that their lanes are closed and everything waits behind them.
_PROFILE = Profile(timeouts=Timeouts(total=0.5, connect=0.4, dns=0.4))


class Measured(NamedTuple):
    """Start delays of the others (ms, p99) before and after, and the rooms of those that came back."""

    before: float
    after: float
    rooms: list[list[int]]


async def _round(case: Case, path: Path, there: Receivers, watch: Watch) -> Measured:
    async with Dispatcher(
        f"sqlite:///{path}",
        profiles={"default": Profile(), "impatient": _PROFILE},
        network=NetworkPolicy.development(),
        shutdown_timeout=0.2,
        keys=[],
    ) as dispatcher:
        fleet = Fleet(dispatcher, there)
        await fleet.create(HEALTHY)
        before = p99(await fleet.stream(case.seconds / 2))
        create = dispatcher.endpoints.create
        back = [
            (await create(f"{there.returning[0]}{n}", events=["back"], concurrency=CAP, profile="impatient")).id
            for n in range(case.down)
        ]
        await asyncio.gather(*(dispatcher.endpoints.pause(id) for id in back))
        await asyncio.to_thread(store_waiting, path, back, case.down * case.each)
        await asyncio.gather(*(dispatcher.endpoints.resume(id) for id in back))
        await dispatcher.drain()  # each has failed once: its lane is closed for a second and a bit
        await there.come_back()
        async with watch.probing():
            after = p99(await fleet.stream(case.seconds))
        return Measured(before, after, await there.rooms())


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    rounds = 1 if quick else ROUNDS
    report = Report("outage: all due at once; start delay of the others, from emit to the receiver's first byte")
    for case in QUICK if quick else CASES:
        found: list[Measured] = []
        for number in range(rounds):
            tell(f"{case.down} come back: round {number + 1} of {rounds}")
            with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
                async with receivers(1, 0, 1) as there:
                    found.append(await _round(case, Path(folder) / "hooks.db", there, watch))
        name = f"{case.down} come back"
        reference = Result(f"start delay p99, before {case.down} do", "ms", [one.before for one in found])
        limit = max(100.0, 1.2 * reference.median)
        after = [one.after for one in found]
        report.results += [
            reference,
            Result(f"{name}: start delay p99", "ms", after, target=at_most(round(limit), "ms")),
        ]
        rooms = [room for one in found for room in one.rooms]
        most = [max(room[place] for room in rooms) for place in range(len(rooms[0]))]
        allowed = [min(CAP, 2**place) for place in range(len(most))]
        assert all(seen <= room for seen, room in zip(most, allowed, strict=True)), (most, allowed)
        report.notes.append(f"{name}, {case.each:,} for each: most in flight before answer 1, 2, ...: {most}")
        report.notes.append(f"  what the law allows: {allowed} (cap {CAP}); endpoints that came back: {len(rooms)}")
    return report
