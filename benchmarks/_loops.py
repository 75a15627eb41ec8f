"""What deliveries are compared with: loops that do nothing but POST, at the same concurrency."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import aiohttp
import httpx
import httpx2
import uvloop

from benchmarks._harness import Cost

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    Post = Callable[[int], Awaitable[None]]

Found = TypeVar("Found")

BODY = b'{"video_id":"vid_123","text":"' + b"x" * 960 + b'"}'
HEADERS = {"content-type": "application/json"}
_ANSWER = len(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


async def on_uvloop(measure: Callable[[], Coroutine[None, None, Found]]) -> Found:
    """Run it in a uvloop of its own, in a thread of its own, so that one benchmark can use both kinds of loop."""

    def run() -> Found:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(measure())

    return await asyncio.to_thread(run)


async def httpx2_loop(urls: list[str], count: int, in_flight: int, tls: ssl.SSLContext | None = None) -> Cost:
    """POST with one `httpx2.AsyncClient`."""
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None
    )  # else it hangs up to dial the next host
    verify = True if tls is None else tls
    async with httpx2.AsyncClient(limits=limits, trust_env=False, timeout=15.0, verify=verify) as client:

        async def post(number: int) -> None:
            await client.post(urls[number % len(urls)], content=BODY, headers=HEADERS)

        return await _measure(post, count, in_flight)


async def httpx_loop(urls: list[str], count: int, in_flight: int) -> Cost:
    """POST with one `httpx.AsyncClient`."""
    limits = httpx.Limits(
        max_connections=in_flight
    )  # its best: the more connections it has, the longer it looks at them
    async with httpx.AsyncClient(limits=limits, trust_env=False, timeout=15.0) as client:

        async def post(number: int) -> None:
            await client.post(urls[number % len(urls)], content=BODY, headers=HEADERS)

        return await _measure(post, count, in_flight)


async def aiohttp_loop(
    urls: list[str], count: int, in_flight: int, tls: ssl.SSLContext | None = None, body: bytes = BODY
) -> Cost:
    """POST with one `aiohttp.ClientSession`."""
    connector = aiohttp.TCPConnector(limit=in_flight, ssl=True if tls is None else tls)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(15.0)) as session:

        async def post(number: int) -> None:
            async with session.post(urls[number % len(urls)], data=body, headers=HEADERS) as answer:
                await answer.read()

        return await _measure(post, count, in_flight)


class Bare(asyncio.Protocol):
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


async def bare_connection(url: str) -> Bare:
    """Connect."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return (await asyncio.get_running_loop().create_connection(Bare, parts.hostname, parts.port))[1]


async def bare_loop(urls: list[str], count: int, in_flight: int, message: bytes) -> Cost:
    """Write the bytes of a request, and wait for as many as the answer has: what asyncio itself costs."""
    connections = [await bare_connection(urls[number % len(urls)]) for number in range(in_flight)]
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


async def _measure(post: Post, count: int, in_flight: int) -> Cost:
    async def sender(numbers: Iterator[int]) -> None:
        for number in numbers:
            await post(number)

    cost = Cost(0.0, 0.0)
    for amount in (min(in_flight * 2, count), count):  # first the connections get warm
        numbers = iter(range(amount))
        cpu, begin = time.process_time(), time.perf_counter()
        await asyncio.gather(*(sender(numbers) for _ in range(in_flight)))
        cost = Cost((time.process_time() - cpu) / amount * 1e6, amount / (time.perf_counter() - begin))
    return cost
