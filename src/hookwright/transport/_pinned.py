"""The default inner transport: a pool for each endpoint and revision, and addresses vetted at the moment of dialling.

Pools are not shared: on a shared keep-alive pool an endpoint that sends an unsolicited second response makes the next
request of another endpoint read it. The address is pinned in the network backend, below TLS, so that the origin keeps
its name: rewriting the url's host would reuse host A's connection for host B without checking B's certificate.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

from hookwright.transport._base import RESPONSE_HEADERS, RESPONSE_READ
from hookwright.transport._resolver import SystemResolver

if TYPE_CHECKING:
    from hookwright._addresses import NetworkPolicy
    from hookwright.transport._resolver import Resolver

POOL_IDLE = 60.0
"""Seconds after which the pool of an endpoint that nothing was sent to is closed."""

POOLS_MOST = 1000
"""Pools that are kept at most while idle."""

ADDRESSES_MOST = 64
"""Addresses of one name that are accepted; more is no host, but an attempt to keep us dialling."""

_DIAL_LEAST = 1.0
_READ_AT_ONCE = 2 * 1024
_BUFFERED = 64 * 1024
_FLOOD = RESPONSE_READ + 2 * RESPONSE_HEADERS
_HEAD_MOST = RESPONSE_HEADERS + 8 * 1024
_FLOOD_PAUSE = 0.1
_EMPTY_LINE = re.compile(rb"\n\r?\n")


class BlockedTarget(Exception):
    """The policy refuses the scheme, or an address of the host; `rule` says why."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class DNSFailed(Exception):
    """The host has no address, or none in time. The text is safe to show: it names neither host nor address."""


class TLSFailed(Exception):
    """The TLS handshake failed. The text is safe to show: it names neither host nor address."""


@dataclass(frozen=True, slots=True)
class PoolKey:
    """Whose connection it is. In `request.extensions["hookwright"]`."""

    endpoint_id: str
    revision: int
    connections: int
    dns_timeout: float
    connect_timeout: float


class _Connection(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """One dialled connection, read as bytes come in: an idle one knows at once that something unasked arrived.

    Of our own, because anyio's resolves a source address on the default executor, and leaves the socket of a cancelled
    TLS handshake to the garbage collector. Reads and writes have no timeouts: the attempt has one deadline, and
    dialling ends at `until`.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
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
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > _BUFFERED:
            self._transport.pause_reading()
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

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._received > _FLOOD:
            # Endless interim responses or one-byte chunks would hold the processor until the deadline.
            await asyncio.sleep(_FLOOD_PAUSE)
        elif self._buffer and self._received >= _READ_AT_ONCE:
            await asyncio.sleep(0)
        while not self._buffer and not self._ended:
            self._transport.resume_reading()
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
            if self._transport.is_closing():
                raise httpcore2.WriteError("the connection broke")
            self._transport.write(buffer[start : start + _BUFFERED])
            await self._writable.wait()

    async def aclose(self) -> None:
        # Not close(): that waits until what is buffered was sent, for a receiver that may never read.
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        plain = self._transport
        try:
            if self._buffer:
                raise TLSFailed("the receiver sent plain text before the TLS handshake")
            async with asyncio.timeout_at(self._until):
                secure = await self._loop.start_tls(
                    plain, self, ssl_context, server_hostname=(server_hostname or "").strip("[]")
                )
        except BaseException as error:  # noqa: BLE001  # raised again, in the dialling's own words where it has any
            plain.abort()
            raise _handshake_error(error) from None
        assert secure is not None
        self._transport = secure
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # On an idle connection: its end, or an answer to no question. In both cases it is not used again.
            return bool(self._buffer) or self._ended or self._transport.is_closing()
        names = {"ssl_object": "ssl_object", "server_addr": "peername"}
        return self._transport.get_extra_info(names[info]) if info in names else None


def _handshake_error(error: BaseException) -> BaseException:
    match error:
        case TimeoutError():
            return httpcore2.ConnectTimeout("no TLS handshake in time")
        case ssl.SSLError():
            return TLSFailed(_tls_words(error))
        case OSError():
            return httpcore2.ConnectError("the connection broke during the TLS handshake")
        case _:
            return error


def _tls_words(error: ssl.SSLError) -> str:
    """OpenSSL's own words, without the host that its text for a mismatch repeats."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if "match" in error.verify_message:
            return "the certificate is for another host"
        return f"certificate verify failed: {error.verify_message}"
    return (error.reason or "the TLS handshake failed").replace("_", " ").lower()


class _VettedBackend(httpcore2.AsyncNetworkBackend):
    """Resolves, vets every address, dials exactly a vetted one, and checks the peer."""

    def __init__(self, policy: NetworkPolicy, resolver: Resolver, key: PoolKey) -> None:
        self._policy = policy
        self._resolver = resolver
        self._key = key

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._addresses(host.strip("[]"), port)
        for address in addresses:
            rule = self._policy.vet(address)
            if rule is not None:
                raise BlockedTarget(rule)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._key.connect_timeout
        failure: Exception = httpcore2.ConnectError("no address of the source address's family")
        for position, address in enumerate(self._of_our_family(addresses)):
            left = until - loop.time()
            if left <= 0:
                break
            share = max(left / (len(addresses) - position), min(left, _DIAL_LEAST))
            try:
                return await self._dial(address, port, share, until)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(self._key.dns_timeout):
                addresses = await self._resolver(host, port)
        except TimeoutError:
            raise DNSFailed("no answer in time") from None
        except socket.gaierror as error:
            raise DNSFailed(error.strerror or "no such name") from None
        except Exception as error:  # noqa: BLE001  # a resolver may be the application's; what it raises is its failure
            raise DNSFailed(f"the resolver failed ({type(error).__name__})") from None
        if not addresses:
            raise DNSFailed("the name has no address")
        if len(addresses) > ADDRESSES_MOST:
            raise DNSFailed(f"the name has more than {ADDRESSES_MOST} addresses")
        return addresses

    def _of_our_family(self, addresses: list[str]) -> list[str]:
        if self._policy.local_address is None:
            return addresses
        version = ipaddress.ip_address(self._policy.local_address).version
        return [address for address in addresses if ipaddress.ip_address(address).version == version]

    async def _dial(self, address: str, port: int, share: float, until: float) -> _Connection:
        source = self._policy.local_address
        try:
            async with asyncio.timeout(share):
                # Both ends are literal addresses, for which asyncio asks no resolver and no executor.
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(until), address, port, local_addr=None if source is None else (source, 0)
                )
        except TimeoutError:
            raise httpcore2.ConnectTimeout("no connection in time") from None
        except OSError:
            raise httpcore2.ConnectError("the connection was refused, or the host is unreachable") from None
        peer = connection.get_extra_info("server_addr")
        if not peer:
            await connection.aclose()
            raise httpcore2.ConnectError("the connection was reset")
        rule = self._policy.vet(str(peer[0]))
        if rule is not None:
            await connection.aclose()
            raise BlockedTarget(rule)
        return connection


class _Pool:
    __slots__ = ("inner", "key", "last_used", "users")

    def __init__(self, key: PoolKey, inner: httpcore2.AsyncConnectionPool) -> None:
        self.key = key
        self.inner = inner
        self.users = 0
        self.last_used = 0.0


class PinnedTransport(httpx2.AsyncBaseTransport):
    """One httpcore2 pool for each endpoint and revision; one TLS context for all, built off the loop (37 ms).

    Every request needs a `PoolKey` in `extensions["hookwright"]`. Pools unused for `pool_idle` seconds are closed,
    and the least recently used idle ones when there are more than `pools_most`.
    """

    def __init__(
        self,
        policy: NetworkPolicy,
        *,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        pool_idle: float | None = None,
        pools_most: int | None = None,
    ) -> None:
        self._policy = policy
        self._ssl_context = ssl_context
        self._own_resolver = SystemResolver() if resolver is None else None
        self._resolver: Resolver = resolver or self._own_resolver  # type: ignore[assignment]  # one of them is there
        self._pool_idle = POOL_IDLE if pool_idle is None else pool_idle
        self._pools_most = POOLS_MOST if pools_most is None else pools_most
        self._context_ready: asyncio.Future[ssl.SSLContext] | None = None
        self._pools: dict[str, _Pool] = {}  # least recently used first
        self._closing: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send over the endpoint's own pool. Raises BlockedTarget, DNSFailed, TLSFailed and httpcore2's exceptions."""
        key: PoolKey = request.extensions["hookwright"]
        url = request.url
        if url.raw_scheme != b"https" and not self._policy.allow_http:
            # The endpoint may have been created under another policy.
            raise BlockedTarget("plain http")
        context = self._ssl_context if url.raw_scheme != b"https" else await self._context()
        pool = self._enter(key, context)
        try:
            answer = await pool.inner.handle_async_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                )
            )
        except BaseException:
            self._leave(pool)
            raise
        received = httpx2.Response(answer.status, headers=answer.headers, stream=_Body(self, pool, answer))
        connection = answer.extensions.get("network_stream")
        if isinstance(connection, _Connection):
            chunked = "transfer-encoding" in received.headers
            connection.begin_body(None if chunked else received.headers.get("content-length"))
        return received

    async def aclose(self) -> None:
        """Close every pool."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for pool in list(self._pools.values()):
            self._retire(pool)
        if self._own_resolver is not None:
            self._own_resolver.close()
        if self._closing:
            await asyncio.wait(self._closing)

    # Nothing between choosing a pool and counting its user may await: another send would close it meanwhile.

    def _enter(self, key: PoolKey, context: ssl.SSLContext | None) -> _Pool:
        pool = self._pools.pop(key.endpoint_id, None)
        if pool is not None and pool.key != key:
            if pool.users == 0:
                self._close(pool)
            pool = None
        if pool is None:
            pool = _Pool(key, self._new_pool(key, context))
        pool.users += 1
        self._pools[key.endpoint_id] = pool
        if len(self._pools) > self._pools_most:
            self._close_surplus()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._pool_idle, self._close_idle)
        return pool

    def _leave(self, pool: _Pool) -> None:
        pool.users -= 1
        pool.last_used = asyncio.get_running_loop().time()
        if pool.users == 0 and self._pools.get(pool.key.endpoint_id) is not pool:
            self._close(pool)

    def _new_pool(self, key: PoolKey, context: ssl.SSLContext | None) -> httpcore2.AsyncConnectionPool:
        return httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=key.connections,
            keepalive_expiry=self._pool_idle,
            network_backend=_VettedBackend(self._policy, self._resolver, key),
        )

    def _close_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for pool in list(self._pools.values()):
            if pool.users == 0 and pool.last_used + self._pool_idle <= now:
                self._retire(pool)
        # At least every quarter: a pool lives at most a quarter longer than promised.
        self._sweep = None
        if self._pools:
            self._sweep = asyncio.get_running_loop().call_later(self._pool_idle / 4, self._close_idle)

    def _close_surplus(self) -> None:
        pool = next((pool for pool in self._pools.values() if pool.users == 0), None)
        if pool is not None:
            self._retire(pool)

    def _retire(self, pool: _Pool) -> None:
        del self._pools[pool.key.endpoint_id]
        self._close(pool)

    def _close(self, pool: _Pool) -> None:
        # A task of its own: a send whose deadline ends here would leave half of the connections open.
        task = asyncio.get_running_loop().create_task(pool.inner.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            if self._context_ready is None:
                loop = asyncio.get_running_loop()
                self._context_ready = loop.create_future()
                threading.Thread(
                    target=_build_context, args=(loop, self._context_ready), name="hookwright-tls", daemon=True
                ).start()
            # Shielded: one attempt's deadline is not the others'.
            try:
                self._ssl_context = await asyncio.shield(self._context_ready)
            except TLSFailed:
                self._context_ready = None
                raise
        return self._ssl_context


class _Body(httpx2.AsyncByteStream):
    """The response's raw body; closing it before its end closes the connection."""

    def __init__(self, transport: PinnedTransport, pool: _Pool, answer: httpcore2.Response) -> None:
        self._transport = transport
        self._pool = pool
        self._answer = answer
        self._left = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._answer.stream, AsyncIterable)
        return aiter(self._answer.stream)

    async def aclose(self) -> None:
        if self._left:
            return
        self._left = True
        try:
            await self._answer.aclose()
        finally:
            self._transport._leave(self._pool)  # noqa: SLF001  # the same file's other half


def _build_context(loop: asyncio.AbstractEventLoop, ready: asyncio.Future[ssl.SSLContext]) -> None:
    # trust_env=False: the environment is the host application's, and SSL_CERT_FILE may be meant for something else.
    try:
        context = httpx2.create_ssl_context(trust_env=False)
        loop.call_soon_threadsafe(ready.set_result, context)
    except OSError as error:  # no certificates, or files that cannot be read
        loop.call_soon_threadsafe(ready.set_exception, TLSFailed(f"no TLS context ({type(error).__name__})"))
    except RuntimeError:  # the loop was closed meanwhile
        return
