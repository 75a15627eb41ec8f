"""deliver: CPU for each delivery, against bare loops that only POST at the same concurrency.

Events are emitted before; what is measured is claim, sign, send, record, settle.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trustme

from benchmarks._harness import Report, alternate, at_most
from benchmarks._loops import Measured, bare_loop, httpx2_loop
from benchmarks._receiver import receivers
from hookwright import DirectTransport, Dispatcher, NetworkPolicy, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._stalls import Watch
    from hookwright import Request, Transport

DATA = {"video_id": "vid_123", "text": "x" * 960}
ENDPOINTS = 20
IN_FLIGHT = 64

HTTPX2 = "bare httpx2.AsyncClient.post"
HTTPX2_TLS = "bare httpx2.AsyncClient.post, TLS"
BARE = "bare asyncio, the same bytes"
OVER_HTTPX = "hookwright, HttpxTransport"
DIRECT = "hookwright, DirectTransport"
DIRECT_TLS = "hookwright, DirectTransport, TLS"
AT_ONCE = "hookwright, answered at once"


class AtOnce:
    """A transport that answers at once, and keeps nothing but the last request."""

    last: Request

    async def send(self, request: Request) -> Response:
        """Answer."""
        self.last = request
        return Response(200)

    async def aclose(self) -> None:
        """Do nothing."""


async def _delivered(path: Path, urls: list[str], count: int, transport: Transport | None, watch: Watch) -> Measured:
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
        async with watch.probing():
            for endpoint in endpoints:
                await dispatcher.endpoints.resume(endpoint.id)
            await dispatcher.drain()
        return Measured((time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin))


def _message(request: Request) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: 127.0.0.1:65535", "Accept-Encoding: identity"]
    lines.append(f"Content-Length: {len(request.body)}")
    lines.extend(f"{name}: {value}" for name, value in request.headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


class _Rounds:
    """What is measured, and how many deliveries a second there were beside it."""

    def __init__(
        self, folder: Path, count: int, plain: list[str], secure: list[str], trusting: ssl.SSLContext, watch: Watch
    ) -> None:
        self._folder = folder
        self._count = count
        self._plain = plain
        self._secure = secure
        self._trusting = trusting
        self._watch = watch
        self._number = 0
        self._message = b""
        self.rates: dict[str, list[float]] = {}

    def all(self) -> dict[str, tuple[str, Callable[[], Awaitable[float]]]]:
        trusting, local = self._trusting, NetworkPolicy.development()
        found: dict[str, Callable[[], Awaitable[Measured]]] = {
            AT_ONCE: self._at_once,
            HTTPX2: lambda: httpx2_loop(self._plain, self._count, IN_FLIGHT),
            BARE: lambda: bare_loop(self._plain, self._count, IN_FLIGHT, self._message),
            OVER_HTTPX: lambda: self._deliver(self._plain, None),
            DIRECT: lambda: self._deliver(self._plain, DirectTransport()),
            HTTPX2_TLS: lambda: httpx2_loop(self._secure, self._count, IN_FLIGHT, trusting),
            DIRECT_TLS: lambda: self._deliver(self._secure, DirectTransport(network=local, ssl_context=trusting)),
        }
        return {name: ("us CPU", self._keeping(name, measure)) for name, measure in found.items()}

    def _keeping(self, name: str, measure: Callable[[], Awaitable[Measured]]) -> Callable[[], Awaitable[float]]:
        async def one_round() -> float:
            measured = await measure()
            self.rates.setdefault(name, []).append(measured.rate)
            return measured.cpu

        return one_round

    async def _deliver(self, urls: list[str], transport: Transport | None) -> Measured:
        self._number += 1
        return await _delivered(self._folder / f"{self._number}.db", urls, self._count, transport, self._watch)

    async def _at_once(self) -> Measured:
        transport = AtOnce()
        measured = await self._deliver(self._plain, transport)
        self._message = _message(transport.last)
        return measured


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    count = 100 if quick else 4000
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
        folder = Path(name)
        certificate = folder / "receiver.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        async with receivers(ENDPOINTS) as plain, receivers(ENDPOINTS, certificate=certificate) as secure:
            rounds = _Rounds(folder, count, plain.answering, secure.answering, trusting, watch)
            report = await alternate(
                f"deliver: 1 KB events, {ENDPOINTS} endpoints, {IN_FLIGHT} in flight, receivers in other processes",
                rounds.all(),
                count=1 if quick else 5,
            )
    report.compare(AT_ONCE, HTTPX2, target=at_most(0.08))
    report.compare(OVER_HTTPX, HTTPX2, target=at_most(0.90))
    report.compare(DIRECT, HTTPX2, target=at_most(0.17))
    report.compare(DIRECT_TLS, HTTPX2_TLS, target=at_most(0.40))
    middle = {name: sorted(values)[len(values) // 2] for name, values in rounds.rates.items()}
    cpu = {result.name: result.median for result in report.results}
    report.notes.append(f"DirectTransport / bare asyncio: {cpu[DIRECT] / cpu[BARE]:.2f} x the CPU, target <= 5")
    report.notes.append(f"DirectTransport / httpx2: {middle[DIRECT] / middle[HTTPX2]:.2f} x the rate, target >= 6")
    report.notes.append("a second: " + ", ".join(f"{name} {rate:.0f}" for name, rate in middle.items()))
    return report
