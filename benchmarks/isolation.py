"""isolation: what endpoints that hang do to the start delay of the healthy ones, 20,000 deliveries behind them."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks._harness import Report, Result
from benchmarks._receiver import receivers
from hookwright import Dispatcher, NetworkPolicy

CASES = ((1, 20), (20, 100), (100, 1000))
STREAM = 50
"""Events a second, each to one healthy endpoint."""


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def _delays(path: Path, hanging: int, total: int, waiting: int, seconds: float) -> list[float]:
    async with (
        receivers(1, 1) as there,
        Dispatcher(
            f"sqlite:///{path}", network=NetworkPolicy.development(), shutdown_timeout=0.2, keys=[]
        ) as dispatcher,
    ):
        good = [
            await dispatcher.endpoints.create(f"{there.answering[0]}{n}", events=["good", f"good.{n}"])
            for n in range(total - hanging)
        ]
        await dispatcher.emit("good")  # everybody healthy has answered once, as in a process that has run for a while
        await dispatcher.drain()
        # Those that will hang have answered too, until a moment ago: nothing tells them apart but what happens now.
        bad = [
            await dispatcher.endpoints.create(f"{there.answering[0]}{n}", events=["bad", f"bad.{n}"])
            for n in range(hanging)
        ]
        for _ in range(3 if bad else 0):
            await dispatcher.emit("bad")
            await dispatcher.drain()
        for n, endpoint in enumerate(bad):
            await dispatcher.endpoints.update(endpoint.id, url=f"{there.hanging[0]}{n}")
        each = waiting // hanging if hanging else 0
        for n in range(hanging):
            await asyncio.gather(*(dispatcher.emit(f"bad.{n}", i) for i in range(each)))
        await there.delays()
        for number in range(round(seconds * STREAM)):
            sent = time.time_ns() // 1000
            await dispatcher.emit(f"good.{number % len(good)}", {"sent": sent})
            await asyncio.sleep(1 / STREAM)
        await asyncio.sleep(0.3)
        assert len(bad) == hanging
        return await there.delays()


async def run(*, quick: bool) -> Report:
    """Measure."""
    report = Report("isolation: start delay of healthy endpoints, emit to the receiver's first byte, p99")
    cases = CASES[:1] if quick else CASES
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        for hanging, total in cases:
            waiting, seconds = (100, 0.5) if quick else (20_000, 6.0)
            print(f"  {hanging} of {total} hang", flush=True)
            alone = await _delays(Path(folder) / f"a{total}.db", 0, total - hanging, 0, seconds)
            beside = await _delays(Path(folder) / f"b{total}.db", hanging, total, waiting, seconds)
            limit = max(100.0, 2 * _p99(alone))
            report.results.append(Result(f"without them, of {total}", "ms p99", [_p99(alone)]))
            report.results.append(
                Result(f"{hanging} of {total} hang", "ms p99", [_p99(beside)], target=f"<= {limit:.0f} ms")
            )
            report.notes.append(f"{hanging} of {total}: {len(beside)} clocked of {round(seconds * STREAM)}")
    return report
