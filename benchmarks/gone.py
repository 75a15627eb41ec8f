"""gone: what a 410 from an endpoint with 100,000 waiting deliveries, and their replay, does to everybody else."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._harness import Report, Result, at_most
from hookwright import Dispatcher, NewEvent, Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks._stalls import Watch

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


async def _stream(dispatcher: Dispatcher, done: Callable[[], bool], watch: Watch) -> tuple[float, float]:
    """Emit to the healthy endpoint until done; return the longest emit, and the longest emit to delivered, in ms."""
    emits, ends = [0.0], [0.0]
    async with watch.probing():
        while not done():
            begin = time.perf_counter()
            receipt = await dispatcher.emit("good")
            emits.append((time.perf_counter() - begin) * 1000)
            await dispatcher.deliveries.wait(receipt.event_id)
            ends.append((time.perf_counter() - begin) * 1000)
            await asyncio.sleep(0.005)
    return max(emits), max(ends)


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    waiting, seconds = (2_000, 0.5) if quick else (WAITING, SECONDS)
    transport = Transport()
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        async with Dispatcher(f"sqlite:///{Path(folder) / 'hooks.db'}", transport=transport, keys=[]) as dispatcher:
            gone = await dispatcher.endpoints.create("https://gone.example/", events=["gone"])
            await dispatcher.endpoints.create("https://good.example/", events=["good"])
            await dispatcher.endpoints.pause(gone.id)
            await dispatcher.emit("good")
            await dispatcher.drain()
            begin = time.perf_counter()
            alone = await _stream(dispatcher, lambda: time.perf_counter() > begin + seconds, watch)
            for _ in range(waiting // 1000):
                await dispatcher.emit_many([NewEvent("gone")] * 1000)
            begin = time.perf_counter()
            await dispatcher.endpoints.resume(gone.id)
            beside = await _stream(dispatcher, lambda: time.perf_counter() > begin + seconds, watch)
            skipped = await dispatcher.deliveries.count(status="skipped")
            await dispatcher.endpoints.enable(gone.id)
            await dispatcher.endpoints.pause(gone.id)
            replay = asyncio.create_task(dispatcher.deliveries.replay(endpoint_id=gone.id, status="skipped"))
            replaying = await _stream(dispatcher, replay.done, watch)
            replayed = await replay
    report = Report(
        f"gone: 410 with {waiting:,} deliveries waiting, then their replay; what another endpoint feels of it"
    )
    for name, found in (("alone", alone), ("beside the 410", beside), ("beside the replay", replaying)):
        for what, longest, reference in (("emit", found[0], alone[0]), ("delivered", found[1], alone[1])):
            target = None if name == "alone" else at_most(round(reference + 50), "ms")
            report.results.append(Result(f"longest {what}, {name}", "ms", [longest], target=target))
    report.notes.append(f"requests to the endpoint that is gone: {transport.gone} (room for one: 1)")
    report.notes.append(f"swept meanwhile: {skipped:,} of {waiting - transport.gone:,}; replayed: {replayed:,}")
    return report
