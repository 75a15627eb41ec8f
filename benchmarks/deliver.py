"""deliver: CPU and rate of deliveries, against bare loops that only POST and against what one would use instead.

Events are emitted before; what is measured is claim, sign, send, record, settle.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trustme

from benchmarks._harness import CPU, RATE, Cost, Report, Series, alternate_costs, at_least, at_most
from benchmarks._instead import huey_cost, tenacity_cost
from benchmarks._loops import aiohttp_loop, bare_loop, httpx2_loop, httpx_loop, on_uvloop
from benchmarks._receiver import receivers
from hookwright import DirectTransport, Dispatcher, HttpxTransport, NetworkPolicy, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._stalls import Watch
    from hookwright import Request, Transport

ENDPOINTS = 20
IN_FLIGHT = 4 * ENDPOINTS
"""Requests that are in flight at once, in the loops as well: what a dispatcher's defaults allow."""
TEXT = 960
SIZES = (64, 1024, 16 * 1024, 64 * 1024)

BARE = "bare asyncio, the same bytes"
AIOHTTP = "bare aiohttp"
AIOHTTP_TLS = "bare aiohttp, TLS"
AIOHTTP_UVLOOP = "bare aiohttp, uvloop"
HTTPX2 = "bare httpx2"
HTTPX2_TLS = "bare httpx2, TLS"
HTTPX = "bare httpx"
HUEY = "huey, SQLite, FULL"
TENACITY = "tenacity and httpx2, in memory"
AT_ONCE = "hookwright, answered at once"
DIRECT = "hookwright, DirectTransport"
DIRECT_TLS = "hookwright, DirectTransport, TLS"
DIRECT_UVLOOP = "hookwright, DirectTransport, uvloop"
OVER_HTTPX = "hookwright, HttpxTransport"
OVER_HTTPX_TLS = "hookwright, HttpxTransport, TLS"


class AtOnce:
    """A transport that answers at once, and keeps nothing but the last request."""

    last: Request

    async def send(self, request: Request) -> Response:
        """Answer."""
        self.last = request
        return Response(200)

    async def aclose(self) -> None:
        """Do nothing."""


class Counts(NamedTuple):
    """How many deliveries a round has: fewer of what is slow, and of what is big."""

    fast: int
    slow: int
    sizes: tuple[int, ...]


FULL = Counts(4000, 1200, (2000, 2000, 1000, 500))
QUICK = Counts(64, 20, ())


async def _delivered(
    path: Path, urls: list[str], count: int, make: Callable[[], Transport], watch: Watch, *, text: int = TEXT
) -> Cost:
    data = {"video_id": "vid_123", "text": "x" * text}
    async with Dispatcher(
        f"sqlite:///{path}", transport=make(), network=NetworkPolicy.development(), keys=[]
    ) as dispatcher:
        endpoints = [await dispatcher.endpoints.create(url, events=[f"e{n}"]) for n, url in enumerate(urls)]
        for _ in range(3):
            await asyncio.gather(*(dispatcher.emit(f"e{n}", data) for n in range(ENDPOINTS)))
            await dispatcher.drain()
        for endpoint in endpoints:
            await dispatcher.endpoints.pause(endpoint.id)
        await asyncio.gather(*(dispatcher.emit(f"e{number % ENDPOINTS}", data) for number in range(count)))
        await dispatcher.drain()
        for endpoint in endpoints:
            await dispatcher.endpoints.resume(endpoint.id)
        left = (await dispatcher.health()).pending  # what resuming costs is not a delivery's
        assert left is not None
        cpu, begin = time.process_time(), time.perf_counter()
        async with watch.probing():
            await dispatcher.drain()
        return Cost((time.process_time() - cpu) / left * 1e6, left / (time.perf_counter() - begin))


def _message(request: Request) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: 127.0.0.1:65535", "Accept-Encoding: identity"]
    lines.append(f"Content-Length: {len(request.body)}")
    lines.extend(f"{name}: {value}" for name, value in request.headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


class _Rounds:
    """What is measured."""

    def __init__(self, folder: Path, counts: Counts, plain: list[str], secure: list[str], watch: Watch) -> None:
        self._folder = folder
        self._counts = counts
        self._plain = plain
        self._secure = secure
        self._watch = watch
        self._number = 0
        self._message = b""

    def all(self, trusting: ssl.SSLContext) -> dict[str, Callable[[], Awaitable[Cost]]]:
        """Return a round of each."""
        fast, slow = self._counts.fast, self._counts.slow
        plain, secure, local = self._plain, self._secure, NetworkPolicy.development()
        aiohttp = partial(aiohttp_loop, plain, fast, IN_FLIGHT)
        direct_tls = partial(DirectTransport, network=local, ssl_context=trusting)
        httpx_tls = partial(HttpxTransport, network=local, ssl_context=trusting)
        return {
            AT_ONCE: self._at_once,
            BARE: lambda: bare_loop(plain, fast, IN_FLIGHT, self._message),
            AIOHTTP: aiohttp,
            DIRECT: lambda: self._deliver(plain, fast, DirectTransport),
            AIOHTTP_UVLOOP: lambda: on_uvloop(aiohttp),
            DIRECT_UVLOOP: lambda: on_uvloop(lambda: self._deliver(plain, fast, DirectTransport)),
            AIOHTTP_TLS: lambda: aiohttp_loop(secure, fast, IN_FLIGHT, trusting),
            DIRECT_TLS: lambda: self._deliver(secure, fast, direct_tls),
            HTTPX2_TLS: lambda: httpx2_loop(secure, slow, IN_FLIGHT, trusting),
            OVER_HTTPX_TLS: lambda: self._deliver(secure, slow, httpx_tls),
            HTTPX2: lambda: httpx2_loop(plain, slow, IN_FLIGHT),
            OVER_HTTPX: lambda: self._deliver(plain, slow, HttpxTransport),
            HTTPX: lambda: httpx_loop(plain, slow, IN_FLIGHT),
            HUEY: lambda: huey_cost(self._path(), plain, slow),
            TENACITY: lambda: tenacity_cost(plain, slow, IN_FLIGHT),
        }

    async def sizes(self, report: Report, rounds: int) -> None:
        """Add a line for DirectTransport and one for aiohttp: CPU by the size of the data."""
        sizes = SIZES[: len(self._counts.sizes)]
        found: dict[str, list[float]] = {DIRECT: [], AIOHTTP: []}
        for size, count in zip(sizes, self._counts.sizes, strict=True):
            body = b'{"video_id":"vid_123","text":"' + b"x" * size + b'"}'
            ours = partial(self._deliver, self._plain, count, DirectTransport, text=size)
            theirs = partial(aiohttp_loop, self._plain, count, IN_FLIGHT, body=body)
            one = await alternate_costs(f"{size} B", {DIRECT: ours, AIOHTTP: theirs}, count=rounds)
            for name, line in found.items():
                line.append(one.find(name, CPU).median)
                rate = one.find(name, RATE).median
                report.notes.append(f"{size:,} B, {name}: {line[-1]:.0f} us CPU, {rate:,.0f} deliveries/s")
        if sizes:
            report.axes = ("bytes of data", "us CPU a delivery")
            report.series = [Series(name, list(sizes), line) for name, line in found.items()]

    def _path(self) -> Path:
        self._number += 1
        return self._folder / f"{self._number}.db"

    async def _deliver(self, urls: list[str], count: int, make: Callable[[], Transport], *, text: int = TEXT) -> Cost:
        path = self._path()
        try:
            return await _delivered(path, urls, count, make, self._watch, text=text)
        finally:
            path.unlink()

    async def _at_once(self) -> Cost:
        transport = AtOnce()
        cost = await self._deliver(self._plain, self._counts.fast, lambda: transport)
        self._message = _message(transport.last)
        return cost


def _compare(report: Report) -> None:
    report.compare(AT_ONCE, AIOHTTP, unit=CPU, target=at_most(0.35))
    report.compare(DIRECT, BARE, unit=CPU, target=at_most(3.50))
    report.compare(DIRECT, AIOHTTP, unit=CPU)
    report.compare(DIRECT, HTTPX2, unit=CPU, target=at_most(0.17))
    report.compare(DIRECT_UVLOOP, AIOHTTP_UVLOOP, unit=CPU)
    report.compare(DIRECT_TLS, HTTPX2_TLS, unit=CPU, target=at_most(0.40))
    report.compare(DIRECT_TLS, AIOHTTP_TLS, unit=CPU)
    report.compare(OVER_HTTPX, HTTPX2, unit=CPU, target=at_most(0.90))
    report.compare(OVER_HTTPX_TLS, HTTPX2_TLS, unit=CPU)
    report.compare(DIRECT, AIOHTTP, unit=RATE, target=at_least(1.25))
    report.compare(DIRECT, HUEY, unit=RATE, target=at_least(4.0))
    report.compare(DIRECT, HTTPX2, unit=RATE, target=at_least(6.0))
    report.compare(DIRECT, TENACITY, unit=RATE)
    report.compare(DIRECT_UVLOOP, AIOHTTP_UVLOOP, unit=RATE, target=at_least(1.50))
    report.compare(DIRECT_TLS, AIOHTTP_TLS, unit=RATE)
    report.compare(OVER_HTTPX, HUEY, unit=RATE)


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    counts, rounds = (QUICK, 1) if quick else (FULL, 5)
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
        folder = Path(name)
        certificate = folder / "receiver.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        async with receivers(ENDPOINTS) as plain, receivers(ENDPOINTS, certificate=certificate) as secure:
            measured = _Rounds(folder, counts, plain.answering, secure.answering, watch)
            report = await alternate_costs(
                f"deliver: 1 KB events, {ENDPOINTS} endpoints, {IN_FLIGHT} in flight, receivers in other processes",
                measured.all(trusting),
                count=rounds,
            )
            await measured.sizes(report, min(rounds, 3))
    _compare(report)
    return report
