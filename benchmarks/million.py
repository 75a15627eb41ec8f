"""million: starting, claiming, and a new event, with a million deliveries waiting behind a thousand dead endpoints."""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._fleet import refusing, store_waiting
from benchmarks._harness import Report, Result, Target, at_most, tell
from benchmarks._receiver import receivers
from hookwright import Dispatcher, NetworkPolicy

if TYPE_CHECKING:
    from benchmarks._receiver import Receivers
    from benchmarks._stalls import Watch

ROWS = 1_000_000
DEAD = 1_000
ROUNDS = 3
MORE_MEMORY = 100
"""MB that a million deliveries may add to a process."""

# What is asked of what the child measured; the rest is shown.
_TARGETS: dict[str, Target] = {
    "start": at_most(3000, "ms"),
    "claim inside p99": at_most(10, "ms"),
    "claim p99": at_most(10, "ms"),
    "idle endpoint, after start": at_most(1000, "ms"),
    "idle endpoint, later, p99": at_most(1000, "ms"),
}


async def _build(path: Path, there: Receivers, dead: str, endpoints: int, rows: int) -> None:
    async with Dispatcher(f"sqlite:///{path}", network=NetworkPolicy.development(), keys=[]) as dispatcher:
        create = dispatcher.endpoints.create
        await create(f"{there.answering[0]}idle", events=["idle"])
        await dispatcher.emit("idle")  # it has answered before, in a process that ended
        await dispatcher.drain()
        made = await asyncio.gather(*(create(f"{dead}{n}", events=["bad"]) for n in range(endpoints)))
    tell(f"{rows:,} deliveries are being stored")
    await asyncio.to_thread(store_waiting, path, [endpoint.id for endpoint in made], rows)


async def _child(path: Path, url: str, seconds: float) -> dict[str, Any]:
    command = (sys.executable, "-m", "benchmarks._million", str(path), url, str(seconds))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    printed = await process.stdout.read()
    assert await process.wait() == 0
    found: dict[str, Any] = json.loads(printed)
    return found


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    endpoints, rows, seconds, rounds = (20, 2_000, 0.3, 1) if quick else (DEAD, ROWS, 10.0, ROUNDS)
    report = Report(f"million: {rows:,} deliveries wait for {endpoints:,} dead endpoints; a fresh process each")
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder, refusing() as refused:
        async with receivers(1, 1) as there:
            for kind, dead in (("refuse", refused), ("hang", there.hanging[0])):
                path = Path(folder) / f"{kind}.db"
                await _build(path, there, dead, endpoints, rows)
                found = []
                for number in range(rounds):
                    tell(f"they {kind}: round {number + 1} of {rounds}")
                    shutil.copy(path, Path(folder) / "run.db")
                    found.append(await _child(Path(folder) / "run.db", there.answering[0], seconds))
                for name in found[0]:
                    unit = "MB" if "memory" in name else "ms"
                    values, target = [one[name] for one in found], _TARGETS.get(name)
                    if name.startswith("memory after"):
                        before = statistics.median(one["memory before"] for one in found)
                        target = at_most(round(before + MORE_MEMORY), "MB")
                    report.results.append(Result(f"{kind}: {name}", unit, values, target=target))
                path.unlink()
    return report
