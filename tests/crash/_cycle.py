"""Kill, restart, compare: the driver and its oracle."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hookwright import Dispatcher, NetworkPolicy
from hookwright.testing import Inbox
from tests.crash._child import CONCURRENCY

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookwright.testing import Received

ROOT = Path(__file__).parents[2]
ENDPOINTS = 3


@dataclass
class Report:
    """What happened, and what must not have."""

    kills: int = 0
    acknowledged: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    half_done: set[str] = field(default_factory=set)
    repeats: int = 0
    in_flight: list[int] = field(default_factory=list)
    integrity: str = ""

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        # What one process had in flight may be repeated by a later one than the next, when that is killed early: so
        # repeats are compared with what was in flight at all kills together, and each kill with the concurrency.
        within = self.repeats <= sum(self.in_flight) and max(self.in_flight) <= CONCURRENCY
        return not self.lost and not self.half_done and within and self.integrity == "ok"


async def run(folder: Path, *, kills: int, seed: int, progress: Callable[[str], object]) -> Report:
    """Kill a delivering process `kills` times at random moments, then let one drain, and compare."""
    report, chance = Report(), random.Random(seed)
    received: Counter[tuple[str, str]] = Counter()
    database = folder / "hooks.db"

    async def respond(one: Received) -> int:
        received[one.path, one.event_id or ""] += 1
        await asyncio.sleep(chance.random() * 0.05)
        return 200

    async with Inbox() as inbox:
        inbox.respond_with(respond)
        await _subscribe(database, inbox)
        number = 0
        for _ in range(kills):
            number = await _one_kill(database, number, chance, report)
            report.kills += 1
            report.in_flight.append(_leased(database))
            if report.kills % 10 == 0:
                repeats = received.total() - len(received)
                progress(f"{report.kills} kills, {len(report.acknowledged)} acknowledged, {repeats} repeats so far")
            inbox.clear()
        await _drain(database)
    _compare(database, received, report)
    return report


async def _subscribe(database: Path, inbox: Inbox) -> None:
    network = NetworkPolicy.development()
    async with Dispatcher(f"sqlite:///{database}", network=network, deliver=False) as dispatcher:
        for n in range(ENDPOINTS):
            await dispatcher.endpoints.create(inbox.url_for(f"/{n}"), events=["*"], concurrency=50)


async def _start(database: Path, first: int, count: int) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "tests.crash._child", str(database), str(first), str(count))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, cwd=ROOT)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def _one_kill(database: Path, first: int, chance: random.Random, report: Report) -> int:
    process = await _start(database, first, 1000)
    assert process.stdout is not None
    try:
        await asyncio.sleep(0.02 + chance.random() * 0.4)
    finally:
        process.kill()
    printed = (await process.stdout.read()).decode().splitlines()
    await process.wait()
    report.acknowledged.update(printed)
    return first + 1000


async def _drain(database: Path) -> None:
    process = await _start(database, 0, 0)
    if await process.wait() != 0:
        raise RuntimeError("the last process did not end well")


def _leased(database: Path) -> int:
    """Return how many deliveries the killed process had leased; what earlier ones had is at 0 since its start."""
    with sqlite3.connect(database) as connection:
        count = connection.execute(
            "SELECT count(*) FROM hookwright_delivery WHERE token IS NOT NULL AND available_at > 0"
        ).fetchone()[0]
    connection.close()
    return int(count)


def _compare(database: Path, received: Counter[tuple[str, str]], report: Report) -> None:
    for id in report.acknowledged:
        if any(received[f"/{n}", id] == 0 for n in range(ENDPOINTS)):
            report.lost.add(id)
    report.repeats = received.total() - len(received)
    with sqlite3.connect(database) as connection:
        report.integrity = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
        rows = connection.execute(
            "SELECT e.id, count(d.id) FROM hookwright_event AS e LEFT JOIN hookwright_delivery AS d"
            " ON d.event_id = e.id GROUP BY e.id"
        ).fetchall()
    connection.close()
    report.half_done = {id for id, count in rows if count != ENDPOINTS}
    report.half_done |= report.acknowledged - {id for id, _ in rows}
