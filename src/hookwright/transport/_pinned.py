"""The default inner transport: an httpcore2 pool for each endpoint and revision, over connections that we dial.

The address is pinned in the network backend, below TLS, so that the origin keeps its name: rewriting the url's host
would reuse host A's connection for host B without checking B's certificate.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import httpcore2
import httpx2

from hookwright.transport._base import RESPONSE_HEADERS, RESPONSE_READ
from hookwright.transport._dial import Dialler, Reached, Target, attach, secure
from hookwright.transport._pools import POOL_IDLE, POOLS_MOST, Pools, key_of
from hookwright.transport._tls import TLSContexts

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from hookwright._addresses import NetworkPolicy
    from hookwright.transport._base import Request
    from hookwright.transport._resolver import Resolver

_READ_AT_ONCE = 2 * 1024
_BUFFERED = 64 * 1024
_FLOOD = RESPONSE_READ + 2 * RESPONSE_HEADERS
_HEAD_MOST = RESPONSE_HEADERS + 8 * 1024
_FLOOD_PAUSE = 0.1
_EMPTY_LINE = re.compile(rb"\n\r?\n")


class _Stream(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """One dialled connection, read as bytes come in: an idle one knows at once that something unasked arrived.

    Reads and writes have no timeouts: the attempt has one deadline, and dialling as `reached` says.
    """

    def __init__(self, reached: Reached) -> None:
        self._reached = reached
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.beneath: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._received = 0
        self._head_left: int | None = None
        self._body_left: int | None = None
        self._tail = b""
        self._ended = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    # -- asyncio's side -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > _BUFFERED:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- httpcore2's side ---------------------------------------------------------------------------------------

    @property
    def has_received(self) -> bool:
        """Whether something arrived that nobody has read."""
        return bool(self._buffer)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._received > _FLOOD:
            # Endless interim responses or one-byte chunks would hold the processor until the deadline.
            await asyncio.sleep(_FLOOD_PAUSE)
        elif self._buffer and self._received >= _READ_AT_ONCE:
            await asyncio.sleep(0)
        while not self._buffer and not self._ended:
            self.transport.resume_reading()
            self._reader = self._loop.create_future()
            await self._reader
        if self._error is not None and not self._buffer:
            raise httpcore2.ReadError("the connection broke")
        # Little at once: the parser does not yield between the events in it. 64 KiB of one-byte chunks take it 0.5 s.
        data = self._piece(min(max_bytes, _READ_AT_ONCE))
        del self._buffer[: len(data)]
        self._received += len(data)
        return data

    def begin_body(self, length: str | None) -> None:
        """Say that the head was read, and the body's length where it has one: digits, the parser has seen to it."""
        self._head_left = None
        self._body_left = None if length is None else int(length)

    def _piece(self, most: int) -> bytes:
        # Never beyond a message: what follows was not asked for. It stays here, where it is seen, and not in the
        # parser, which would take it for the answer to the next request. A head and a chunked body end in an empty
        # line; one within a chunk only makes the pieces smaller.
        if self._body_left is not None:
            data = bytes(self._buffer[: min(most, self._body_left)])
            self._body_left -= len(data)
            return data
        data = bytes(self._buffer[:most])
        end = _EMPTY_LINE.search(self._tail + data)
        if end is not None:
            data = data[: end.end() - len(self._tail)]
        self._tail = b"" if end is not None else (self._tail + data)[-2:]
        if self._head_left is not None:
            self._head_left = _HEAD_MOST if end is not None else self._head_left - len(data)
            if self._head_left < 0:  # the parser would take 100 KiB, and all of them at once
                raise httpcore2.RemoteProtocolError(f"response headers over {RESPONSE_HEADERS // 1024} KiB")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._received = 0
        self._head_left, self._body_left, self._tail = _HEAD_MOST, None, b""
        for start in range(0, len(buffer), _BUFFERED):  # TLS would take everything at once, three times over
            if self.transport.is_closing():
                raise httpcore2.WriteError("the connection broke")
            self.transport.write(buffer[start : start + _BUFFERED])
            await self._writable.wait()

    async def aclose(self) -> None:
        # Not close(): that waits until what is buffered was sent, for a receiver that may never read.
        self.transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        await secure(self, ssl_context, (server_hostname or "").strip("[]"), self._reached)
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # On an idle connection: its end, or an answer to no question. In both cases it is not used again.
            return bool(self._buffer) or self._ended or self.transport.is_closing()
        return self.transport.get_extra_info("ssl_object") if info == "ssl_object" else None


class _Backend(httpcore2.AsyncNetworkBackend):
    """Dials for one endpoint."""

    def __init__(self, dialler: Dialler, request: Request) -> None:
        self._dialler = dialler
        self._dns_timeout = request.dns_timeout
        self._connect_timeout = request.connect_timeout

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        reached = await self._dialler.connect(Target(host.strip("[]"), port, self._dns_timeout, self._connect_timeout))
        return await attach(partial(_Stream, reached), reached)


class PinnedTransport(httpx2.AsyncBaseTransport):
    """One httpcore2 pool for each endpoint and revision; one TLS context for all, but for client certificates.

    Every request needs ours, a `Request`, in `extensions["hookwright"]`. Pools unused for `pool_idle` seconds are
    closed, and the least recently used idle ones when there are more than `pools_most`.
    """

    def __init__(
        self,
        network: NetworkPolicy | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        pool_idle: float = POOL_IDLE,
        pools_most: int = POOLS_MOST,
    ) -> None:
        self._contexts = TLSContexts(ssl_context)
        self._dialler = Dialler(network, resolver)
        self._pools: Pools[httpcore2.AsyncConnectionPool] = Pools(self._close, idle=pool_idle, most=pools_most)
        self._pool_idle = pool_idle
        self._closing: set[asyncio.Task[None]] = set()

    def keep_to(self, network: NetworkPolicy) -> None:
        """Judge by a dispatcher's policy, where none was given."""
        self._dialler.keep_to(network)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send over the endpoint's own pool. Raises DialFailed and httpcore2's exceptions."""
        ours: Request = request.extensions["hookwright"]
        url = request.url
        self._dialler.check_scheme(url.scheme)
        context = await self._contexts.of(url.scheme, ours.client_certificate)
        pool = self._pools.enter(key_of(ours, f"{url.scheme}://{url.netloc!r}"), lambda: self._new_pool(ours, context))
        try:
            answer = await pool.connections.handle_async_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                )
            )
        except BaseException:
            self._pools.leave(pool)
            raise
        body = _Body(answer, partial(self._pools.leave, pool))
        received = httpx2.Response(answer.status, headers=answer.headers, stream=body)
        stream = answer.extensions.get("network_stream")
        if isinstance(stream, _Stream):
            chunked = "transfer-encoding" in received.headers
            stream.begin_body(None if chunked else received.headers.get("content-length"))
        return received

    async def aclose(self) -> None:
        """Close every pool."""
        self._pools.close()
        self._dialler.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def _new_pool(self, request: Request, context: ssl.SSLContext | None) -> httpcore2.AsyncConnectionPool:
        return httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=request.connections,
            keepalive_expiry=self._pool_idle,
            network_backend=_Backend(self._dialler, request),
        )

    def _close(self, pool: httpcore2.AsyncConnectionPool) -> None:
        # A task of its own: a send whose deadline ends here would leave half of the connections open.
        task = asyncio.get_running_loop().create_task(pool.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Body(httpx2.AsyncByteStream):
    """The response's raw body; closing it before its end closes the connection."""

    def __init__(self, answer: httpcore2.Response, leave: Callable[[], None]) -> None:
        self._answer = answer
        self._leave: Callable[[], None] | None = leave

    def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._answer.stream, AsyncIterable)
        return aiter(self._answer.stream)

    async def aclose(self) -> None:
        leave, self._leave = self._leave, None
        if leave is None:
            return
        try:
            await self._answer.aclose()
        finally:
            leave()
