"""What deliveries are compared with: loops that do nothing but POST, at the same concurrency."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import httpx2

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator

    Post = Callable[[int], Awaitable[None]]

BODY = b'{"video_id":"vid_123","text":"' + b"x" * 960 + b'"}'
_ANSWER = len(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


class Measured(NamedTuple):
    """What one POST cost (microseconds of CPU), and how many there were in a second."""

    cpu: float
    rate: float


async def httpx2_loop(urls: list[str], count: int, in_flight: int, tls: ssl.SSLContext | None = None) -> Measured:
    """POST with one `httpx2.AsyncClient`."""
    headers = {"content-type": "application/json"}
    limits = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    verify = True if tls is None else tls
    async with httpx2.AsyncClient(limits=limits, trust_env=False, timeout=15.0, verify=verify) as client:

        async def post(number: int) -> None:
            await client.post(urls[number % len(urls)], content=BODY, headers=headers)

        return await _measure(post, count, in_flight)


class _Bare(asyncio.Protocol):
    """Writes what it is told, and knows how long the answer is."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left == 0:
            assert self.answered is not None
            self.answered.set_result(None)

    def post(self, message: bytes) -> asyncio.Future[None]:
        self._left = _ANSWER
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        return self.answered


async def bare_loop(urls: list[str], count: int, in_flight: int, message: bytes) -> Measured:
    """Write the bytes of a request, and wait for as many as the answer has: what asyncio itself costs."""
    loop = asyncio.get_running_loop()
    connections = []
    for number in range(in_flight):
        parts = urlsplit(urls[number % len(urls)])
        assert parts.hostname is not None
        assert parts.port is not None
        connections.append((await loop.create_connection(_Bare, parts.hostname, parts.port))[1])
    idle = list(connections)

    async def post(number: int) -> None:
        connection = idle.pop()
        await connection.post(message)
        idle.append(connection)

    try:
        return await _measure(post, count, in_flight)
    finally:
        for connection in connections:
            connection.transport.abort()


async def _measure(post: Post, count: int, in_flight: int) -> Measured:
    async def sender(numbers: Iterator[int]) -> None:
        for number in numbers:
            await post(number)

    measured = Measured(0.0, 0.0)
    for amount in (in_flight * 2, count):  # first the connections get warm
        numbers = iter(range(amount))
        cpu, begin = time.process_time(), time.perf_counter()
        await asyncio.gather(*(sender(numbers) for _ in range(in_flight)))
        measured = Measured((time.process_time() - cpu) / amount * 1e6, amount / (time.perf_counter() - begin))
    return measured
