"""idle: CPU of ten seconds in which nothing happens, with 1,000 endpoints."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._harness import Report, Result, at_most
from hookwright import Dispatcher

if TYPE_CHECKING:
    from benchmarks._stalls import Watch


async def run(*, quick: bool, watch: Watch) -> Report:
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
            # The probe itself costs more than what is measured, and so comes after it.
            async with watch.probing():
                await asyncio.sleep(seconds)
    result = Result("CPU", "ms", rounds, at_most(2 * seconds, "ms"))
    return Report(f"idle: {seconds} s, 1,000 endpoints", [result])
