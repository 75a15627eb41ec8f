"""gone: what a 410 from an endpoint with 100,000 waiting deliveries does to everybody else's emits and deliveries."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks._harness import Report, Result
from hookwright import Dispatcher, NewEvent, Request, Response

WAITING = 100_000
SECONDS = 6.0


class Transport:
    """Answers 410 to one url, 200 to all others, and keeps when."""

    def __init__(self) -> None:
        self.gone = 0
        self.last_gone = 0.0

    async def send(self, request: Request) -> Response:
        """Answer."""
        if "gone" in request.url:
            self.gone += 1
            self.last_gone = time.perf_counter()
            return Response(410)
        return Response(200)

    async def aclose(self) -> None:
        """Do nothing."""


async def _waits(path: Path, waiting: int, seconds: float) -> tuple[list[float], list[float], Transport, int]:
    """Return how long emits took, and how long until each was delivered, in milliseconds."""
    transport = Transport()
    emits: list[float] = []
    ends: list[float] = []
    async with Dispatcher(f"sqlite:///{path}", transport=transport) as dispatcher:
        gone = await dispatcher.endpoints.create("https://gone.example/", events=["gone"])
        await dispatcher.endpoints.create("https://good.example/", events=["good"])
        await dispatcher.endpoints.pause(gone.id)
        for _ in range(waiting // 1000):
            await dispatcher.emit_many([NewEvent("gone")] * 1000)
        await dispatcher.emit("good")
        await dispatcher.drain()
        if waiting:
            await dispatcher.endpoints.resume(gone.id)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            begin = time.perf_counter()
            receipt = await dispatcher.emit("good")
            emits.append((time.perf_counter() - begin) * 1000)
            await dispatcher.deliveries.wait(receipt.event_id)
            ends.append((time.perf_counter() - begin) * 1000)
            await asyncio.sleep(0.005)
        skipped = await dispatcher.deliveries.count(status="skipped")
    return emits, ends, transport, skipped


async def run(*, quick: bool) -> Report:
    """Measure."""
    waiting, seconds = (2_000, 0.5) if quick else (WAITING, SECONDS)
    report = Report(
        f"gone: 410 with {waiting:,} deliveries waiting; emits and deliveries of another endpoint meanwhile"
    )
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        alone = await _waits(Path(folder) / "a.db", 0, seconds)
        beside = await _waits(Path(folder) / "b.db", waiting, seconds)
    for name, position in (("emit", 0), ("emit to delivered", 1)):
        before, after = alone[position], beside[position]
        assert isinstance(before, list)
        assert isinstance(after, list)
        report.results.append(Result(f"longest {name}, alone", "ms", [max(before)]))
        limit = f"<= {max(before) + 50:.0f} ms"
        report.results.append(Result(f"longest {name}, beside the 410", "ms", [max(after)], target=limit))
    report.notes.append(f"requests to the endpoint that is gone: {beside[2].gone} (room for one: 1)")
    report.notes.append(f"swept meanwhile: {beside[3]:,} of {waiting - beside[2].gone:,}")
    return report
