"""The default inner transport: a pool for each endpoint and revision, and addresses vetted at the moment of dialling.

Pools are not shared: on a shared keep-alive pool an endpoint that sends an unsolicited second response makes the next
request of another endpoint read it. The address is pinned in the network backend, below TLS, so that the origin keeps
its name: rewriting the url's host would reuse host A's connection for host B without checking B's certificate.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

from hookwright.transport._resolver import SystemResolver

if TYPE_CHECKING:
    import ssl

    from hookwright._addresses import NetworkPolicy
    from hookwright.transport._resolver import Resolver

POOL_IDLE = 60.0
"""Seconds after which the pool of an endpoint that nothing was sent to is closed."""

POOLS_MOST = 1000
"""Pools that are kept at most while idle."""


class BlockedTarget(Exception):
    """The policy refuses an address of the host; `rule` says which rule."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class DNSFailed(Exception):
    """The host has no address, or none in time."""


@dataclass(frozen=True, slots=True)
class PoolKey:
    """Whose connection it is. In `request.extensions["hookwright"]`."""

    endpoint_id: str
    revision: int
    connections: int
    dns_timeout: float
    connect_timeout: float


class _VettedBackend(httpcore2.AsyncNetworkBackend):
    """Resolves, vets every address, dials exactly a vetted one, and checks the peer."""

    def __init__(self, policy: NetworkPolicy, resolver: Resolver, key: PoolKey) -> None:
        self._policy = policy
        self._resolver = resolver
        self._key = key
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        for address in addresses:
            rule = self._policy.vet(address)
            if rule is not None:
                raise BlockedTarget(rule)
        deadline = asyncio.get_running_loop().time() + (timeout or self._key.connect_timeout)
        failure: Exception = DNSFailed("no address")
        for position, address in enumerate(addresses):
            left = deadline - asyncio.get_running_loop().time()
            share = left / (len(addresses) - position)
            try:
                stream = await self._inner.connect_tcp(
                    address,
                    port,
                    timeout=max(share, 0.001),
                    local_address=self._policy.local_address,
                    socket_options=socket_options,
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
                continue
            return await self._check_peer(stream)
        raise failure

    async def _resolve(self, host: str, port: int) -> list[str]:
        try:
            async with asyncio.timeout(self._key.dns_timeout):
                addresses = await self._resolver(host.strip("[]"), port)
        except TimeoutError:
            raise DNSFailed("no answer in time") from None
        except OSError as error:
            raise DNSFailed(error.strerror or "no such name") from None
        if not addresses:
            raise DNSFailed("no address")
        return addresses

    async def _check_peer(self, stream: httpcore2.AsyncNetworkStream) -> httpcore2.AsyncNetworkStream:
        rule = self._policy.vet(str(stream.get_extra_info("server_addr")[0]))
        if rule is not None:
            await stream.aclose()
            raise BlockedTarget(rule)
        return stream


class _Pool:
    __slots__ = ("inner", "key", "last_used", "users")

    def __init__(self, key: PoolKey, inner: httpcore2.AsyncConnectionPool) -> None:
        self.key = key
        self.inner = inner
        self.users = 0
        self.last_used = 0.0


class PinnedTransport(httpx2.AsyncBaseTransport):
    """One httpcore2 pool for each endpoint and revision; one TLS context for all, built off the loop (37 ms)."""

    def __init__(
        self, policy: NetworkPolicy, *, ssl_context: ssl.SSLContext | None = None, resolver: Resolver | None = None
    ) -> None:
        self._policy = policy
        self._ssl_context = ssl_context
        self._own_resolver = SystemResolver() if resolver is None else None
        self._resolver: Resolver = resolver or self._own_resolver  # type: ignore[assignment]  # one of them is there
        self._context_ready: asyncio.Future[ssl.SSLContext] | None = None
        self._pools: dict[str, _Pool] = {}
        self._next_look = 0.0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send over the endpoint's own pool."""
        key: PoolKey = request.extensions["hookwright"]
        tls = request.url.raw_scheme == b"https"
        context = await self._context() if tls else self._ssl_context
        pool = await self._pool(key, context)
        pool.users += 1
        url = request.url
        try:
            answer = await pool.inner.handle_async_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions={"timeout": {"connect": key.connect_timeout}},
                )
            )
        except BaseException:
            await self._leave(pool)
            raise
        return httpx2.Response(
            answer.status, headers=answer.headers, stream=_Body(self, pool, answer), extensions=answer.extensions
        )

    async def aclose(self) -> None:
        """Close every pool."""
        pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            await pool.inner.aclose()
        if self._own_resolver is not None:
            self._own_resolver.close()

    async def _pool(self, key: PoolKey, context: ssl.SSLContext | None) -> _Pool:
        pool = self._pools.get(key.endpoint_id)
        now = asyncio.get_running_loop().time()
        if pool is None or pool.key != key:
            if pool is not None and pool.users == 0:
                await pool.inner.aclose()
            pool = self._pools[key.endpoint_id] = _Pool(key, self._new_pool(key, context))
        pool.last_used = now
        if now >= self._next_look or len(self._pools) > POOLS_MOST:
            await self._close_idle(now)
        return pool

    def _new_pool(self, key: PoolKey, context: ssl.SSLContext | None) -> httpcore2.AsyncConnectionPool:
        return httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=key.connections,
            keepalive_expiry=POOL_IDLE,
            network_backend=_VettedBackend(self._policy, self._resolver, key),
        )

    async def _close_idle(self, now: float) -> None:
        self._next_look = now + POOL_IDLE / 4
        idle = sorted((pool for pool in self._pools.values() if pool.users == 0), key=lambda pool: pool.last_used)
        surplus = len(self._pools) - POOLS_MOST
        for position, pool in enumerate(idle):
            if pool.last_used == now or (pool.last_used + POOL_IDLE > now and position >= surplus):
                continue
            del self._pools[pool.key.endpoint_id]
            await pool.inner.aclose()

    async def _leave(self, pool: _Pool) -> None:
        pool.users -= 1
        if pool.users == 0 and self._pools.get(pool.key.endpoint_id) is not pool:
            await pool.inner.aclose()

    async def _context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            if self._context_ready is None:
                self._context_ready = asyncio.get_running_loop().create_future()
                threading.Thread(
                    target=_build_context,
                    args=(asyncio.get_running_loop(), self._context_ready),
                    name="hookwright-tls",
                    daemon=True,
                ).start()
            self._ssl_context = await asyncio.shield(self._context_ready)
        return self._ssl_context


class _Body(httpx2.AsyncByteStream):
    """The response's raw body; closing it before its end closes the connection."""

    def __init__(self, transport: PinnedTransport, pool: _Pool, answer: httpcore2.Response) -> None:
        self._transport = transport
        self._pool = pool
        self._answer = answer
        self._left = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._answer.stream, AsyncIterable)
        async for chunk in self._answer.stream:
            yield chunk

    async def aclose(self) -> None:
        await self._answer.aclose()
        if not self._left:
            self._left = True
            await self._transport._leave(self._pool)  # noqa: SLF001  # the same file's other half


def _build_context(loop: asyncio.AbstractEventLoop, ready: asyncio.Future[ssl.SSLContext]) -> None:
    context = httpcore2.default_ssl_context()
    try:
        loop.call_soon_threadsafe(ready.set_result, context)
    except RuntimeError:  # the loop was closed meanwhile
        return
