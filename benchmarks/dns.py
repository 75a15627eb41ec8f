"""dns: how long the application's own `asyncio.to_thread` takes while the DNS of 100 endpoints hangs.

And what a healthy endpoint's deliveries wait beside them. The look-ups hang for 30 s, as a resolver that is gone does.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._harness import Report, Result, at_most, tell
from hookwright import DirectTransport, Dispatcher, NetworkPolicy, SystemResolver
from hookwright.testing import Inbox

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

HANGING = 100


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def _measure(path: Path, hanging: int, seconds: float, watch: Watch) -> tuple[list[float], list[float]]:
    """Return the delays (ms) of the application's threads, and of deliveries to the healthy endpoint."""
    release = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        if host.startswith("gone"):
            release.wait(30)
            raise OSError("no answer")
        return ["127.0.0.1"]

    transport = DirectTransport(resolver=SystemResolver(lookup))
    threads: list[float] = []
    deliveries: list[float] = []
    try:
        async with (
            Inbox() as inbox,
            Dispatcher(
                f"sqlite:///{path}",
                network=NetworkPolicy.development(),
                transport=transport,
                shutdown_timeout=0.2,
                keys=[],
            ) as dispatcher,
            AsyncExitStack() as stack,
        ):
            await dispatcher.endpoints.create(inbox.url.replace("127.0.0.1", "healthy.example"), events=["good"])
            for number in range(hanging):
                await dispatcher.endpoints.create(f"https://gone{number}.example/", events=["bad"])
            await dispatcher.emit("good")
            await dispatcher.drain()
            await stack.enter_async_context(watch.probing())
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                if hanging:
                    await dispatcher.emit("bad")
                begin = time.perf_counter()
                receipt = await dispatcher.emit("good")
                await dispatcher.deliveries.wait(receipt.event_id)
                deliveries.append((time.perf_counter() - begin) * 1000)
                for _ in range(10):
                    begin = time.perf_counter()
                    await asyncio.to_thread(int)
                    threads.append((time.perf_counter() - begin) * 1000)
                    await asyncio.sleep(0.005)
    finally:
        release.set()
    return threads, deliveries


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    report = Report(f"dns: beside {HANGING} endpoints whose names hang, p99")
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        for hanging in (0, HANGING):
            tell(f"{hanging} names hang")
            path = Path(folder) / f"{hanging}.db"
            threads, deliveries = await _measure(path, hanging, 0.5 if quick else 8.0, watch)
            target = at_most(20, "ms") if hanging else None
            report.results.append(Result(f"to_thread, {hanging} hang", "ms p99", [_p99(threads)], target=target))
            report.results.append(Result(f"emit to delivered, {hanging} hang", "ms p99", [_p99(deliveries)]))
    return report
