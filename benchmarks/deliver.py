"""deliver: CPU for each delivery, against a bare httpx2 loop at the same concurrency.

Events are emitted before; what is measured is claim, sign, send, record, settle.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from benchmarks._harness import Report, alternate
from benchmarks._receiver import receivers
from hookwright import Dispatcher, NetworkPolicy, Response

if TYPE_CHECKING:
    from hookwright import Request, Transport

DATA = {"video_id": "vid_123", "text": "x" * 960}
ENDPOINTS = 20
IN_FLIGHT = 64


class AtOnce:
    """A transport that answers at once, and keeps nothing."""

    async def send(self, request: Request) -> Response:
        """Answer."""
        return Response(200)

    async def aclose(self) -> None:
        """Do nothing."""


async def _bare_loop(urls: list[str], count: int) -> tuple[float, float]:
    body = b'{"video_id":"vid_123","text":"' + b"x" * 960 + b'"}'
    headers = {"content-type": "application/json"}
    limits = httpx2.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
    work = iter(range(count + IN_FLIGHT * 4))
    async with httpx2.AsyncClient(limits=limits, trust_env=False, timeout=15.0) as client:

        async def sender(until: int) -> None:
            for number in work:
                await client.post(urls[number % ENDPOINTS], content=body, headers=headers)
                if number >= until:
                    return

        await asyncio.gather(*(sender(IN_FLIGHT * 2) for _ in range(IN_FLIGHT)))  # connections are warm
        done = next(work)
        cpu, begin = time.process_time(), time.perf_counter()
        await asyncio.gather(*(sender(10**9) for _ in range(IN_FLIGHT)))
        sent = count + IN_FLIGHT * 4 - done - 1
        return (time.process_time() - cpu) / sent * 1e6, sent / (time.perf_counter() - begin)


async def _delivered(path: Path, urls: list[str], count: int, transport: Transport | None) -> tuple[float, float]:
    async with Dispatcher(
        f"sqlite:///{path}", transport=transport, network=NetworkPolicy.development(), concurrency=IN_FLIGHT, keys=[]
    ) as dispatcher:
        endpoints = [await dispatcher.endpoints.create(url, events=[f"e{n}"]) for n, url in enumerate(urls)]
        for _ in range(3):
            await asyncio.gather(*(dispatcher.emit(f"e{n}", DATA) for n in range(ENDPOINTS)))
            await dispatcher.drain()
        for endpoint in endpoints:
            await dispatcher.endpoints.pause(endpoint.id)
        await asyncio.gather(*(dispatcher.emit(f"e{number % ENDPOINTS}", DATA) for number in range(count)))
        await dispatcher.drain()
        cpu, begin = time.process_time(), time.perf_counter()
        for endpoint in endpoints:
            await dispatcher.endpoints.resume(endpoint.id)
        await dispatcher.drain()
        return (time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin)


async def run(*, quick: bool) -> Report:
    """Measure."""
    count = 100 if quick else 4000
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        numbers = iter(range(1000))
        async with receivers(ENDPOINTS) as there:

            async def keep(name: str, measured: tuple[float, float]) -> float:
                rates.setdefault(name, []).append(measured[1])
                return measured[0]

            async def bare() -> float:
                return await keep("bare", await _bare_loop(there.answering, count))

            async def over_httpx() -> float:
                path = Path(folder) / f"{next(numbers)}.db"
                return await keep("hookwright", await _delivered(path, there.answering, count, None))

            async def at_once() -> float:
                path = Path(folder) / f"{next(numbers)}.db"
                return await keep("at once", await _delivered(path, there.answering, count, AtOnce()))

            report = await alternate(
                f"deliver: 1 KB events, {ENDPOINTS} endpoints, {IN_FLIGHT} in flight, receivers in another process",
                {
                    "bare httpx2.AsyncClient.post": ("us CPU", bare),
                    "hookwright, HttpxTransport": ("us CPU", over_httpx),
                    "hookwright, answered at once": ("us CPU", at_once),
                },
                count=1 if quick else 5,
            )
    report.compare("hookwright, HttpxTransport", "bare httpx2.AsyncClient.post", target="<= 0.90")
    report.compare("hookwright, answered at once", "bare httpx2.AsyncClient.post", target="<= 0.08")
    for name, values in rates.items():
        report.notes.append(f"{name}: {sorted(values)[len(values) // 2]:.0f} deliveries/s")
    return report
