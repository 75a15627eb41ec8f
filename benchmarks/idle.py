"""idle: CPU of ten seconds in which nothing happens, with 1,000 endpoints."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks._harness import Report, Result
from hookwright import Dispatcher


async def run(*, quick: bool) -> Report:
    """Measure."""
    seconds = 1 if quick else 10
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        async with Dispatcher(f"sqlite:///{Path(folder) / 'hooks.db'}", keys=[]) as dispatcher:
            for n in range(1000):
                await dispatcher.endpoints.create(f"https://receiver.example/{n}", events=["*"])
            await asyncio.sleep(0.5)
            rounds = []
            for _ in range(1 if quick else 3):
                begin = time.process_time()
                await asyncio.sleep(seconds)
                rounds.append((time.process_time() - begin) * 1000)
    return Report(f"idle: {seconds} s, 1,000 endpoints", [Result("CPU", "ms", rounds, target="<= 20 ms in 10 s")])
