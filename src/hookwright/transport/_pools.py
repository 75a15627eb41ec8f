"""Which connections belong together: those of one endpoint at one revision, and no others.

On a pool that endpoints share, one that sends an unsolicited second response makes the next request of another read it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookwright._certificate import ClientCertificate
    from hookwright.transport._base import Request

T = TypeVar("T")

POOL_IDLE = 60.0
"""Seconds after which the pool of an endpoint that nothing was sent to is closed."""

POOLS_MOST = 1000
"""Pools that are kept at most while idle."""


class PoolKey(NamedTuple):
    """Whose connections they are, how many there may be, where to, and who we say we are.

    Where to: whoever wraps a transport may send an endpoint's requests to another host.
    """

    endpoint_id: str
    revision: int
    connections: int
    origin: str
    client_certificate: ClientCertificate | None


class Pool(Generic[T]):
    """An endpoint's connections, and how many sends use them."""

    __slots__ = ("connections", "key", "last_used", "users")

    def __init__(self, key: PoolKey, connections: T) -> None:
        self.key = key
        self.connections = connections
        self.users = 0
        self.last_used = 0.0


class Pools(Generic[T]):
    """The pools of a transport. Closes those that nobody uses: after `idle` seconds, of an older revision, surplus."""

    def __init__(self, close: Callable[[T], None], *, idle: float = POOL_IDLE, most: int = POOLS_MOST) -> None:
        self._close = close
        self._idle = idle
        self._most = most
        self._pools: dict[str, Pool[T]] = {}  # least recently used first
        self._sweep: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter(self, key: PoolKey, make: Callable[[], T]) -> Pool[T]:
        """Return the endpoint's pool, and keep it open until `leave`. Nothing here awaits."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # Connections and timers of a loop that has ended are dead, and cannot be closed from here.
            self._loop, self._sweep = loop, None
            self._pools.clear()
        pool = self._pools.pop(key.endpoint_id, None)
        if pool is not None and pool.key != key:
            if pool.users == 0:
                self._close(pool.connections)
            pool = None
        if pool is None:
            pool = Pool(key, make())
            if self._sweep is None:
                self._sweep = loop.call_later(self._idle, self._close_idle)
        pool.users += 1
        self._pools[key.endpoint_id] = pool
        self._close_surplus()
        return pool

    def leave(self, pool: Pool[T]) -> None:
        """Say that a send has ended."""
        pool.users -= 1
        pool.last_used = asyncio.get_running_loop().time()
        if pool.users == 0 and self._pools.get(pool.key.endpoint_id) is not pool:
            self._close(pool.connections)
        self._close_surplus()

    def is_current(self, pool: Pool[T]) -> bool:
        """Whether its connections may be used again: the endpoint has not changed meanwhile."""
        return self._pools.get(pool.key.endpoint_id) is pool

    def close(self) -> None:
        """Close all."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for pool in list(self._pools.values()):
            self._retire(pool)

    def _close_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for pool in list(self._pools.values()):
            if pool.users == 0 and pool.last_used + self._idle <= now:
                self._retire(pool)
        # At least every quarter: a pool lives at most a quarter longer than promised.
        self._sweep = None
        if self._pools:
            self._sweep = asyncio.get_running_loop().call_later(self._idle / 4, self._close_idle)

    def _close_surplus(self) -> None:
        surplus = len(self._pools) - self._most
        if surplus > 0:
            idle = [pool for pool in self._pools.values() if pool.users == 0]
            for pool in idle[:surplus]:
                self._retire(pool)

    def _retire(self, pool: Pool[T]) -> None:
        del self._pools[pool.key.endpoint_id]
        self._close(pool.connections)


def key_of(request: Request, origin: str) -> PoolKey:
    """Return whose connections a request uses; `origin` is scheme, host and port (RFC 6454)."""
    return PoolKey(request.endpoint_id, request.revision, request.connections, origin, request.client_certificate)
