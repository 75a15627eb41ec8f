"""DirectTransport: the fast one. Connections of our own over the httptools parser, HTTP/1.1 POST and no more."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from hookwright._addresses import DEFAULT_PORTS
from hookwright._errors import ConfigurationError
from hookwright._signing import HEADER_NAME
from hookwright.transport._base import CONNECTION_HEADERS, Failure, Request, Response
from hookwright.transport._connection import BUFFER, Connection, Stale
from hookwright.transport._dial import DialFailed, Dialler, Target, attach, secure
from hookwright.transport._pools import POOL_IDLE, POOLS_MOST, Pools, key_of
from hookwright.transport._tls import TLSContexts

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from hookwright._addresses import NetworkPolicy
    from hookwright.transport._pools import Pool
    from hookwright.transport._resolver import Resolver

_WAYS_KEPT = 4096
_UNSENDABLE = re.compile(r"[^\t\x20-\x7e\r\n]")
_NAMES_KEPT = 1000
_STORED_URL = re.compile(r"[a-z]+://[^/?#@\\]+([/?][^#\\]*)?")


class _Way(NamedTuple):
    """A url, taken apart once."""

    scheme: str
    host: str
    port: int
    origin: str
    begin: str

    def __repr__(self) -> str:
        return f"_Way({self.scheme}://{self.host}:{self.port})"


class _Connections:
    """An endpoint's connections: those in use, those that wait to be used again, and who waits for one."""

    __slots__ = ("dialling", "idle", "is_closed", "open", "waiting")

    def __init__(self) -> None:
        self.is_closed = False
        self.open: set[Connection] = set()
        self.idle: list[Connection] = []
        self.dialling = 0
        self.waiting: deque[asyncio.Future[None]] = deque()

    def take_idle(self) -> Connection | None:
        """Return one that can be used again; close those that cannot."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_quiet:
                return connection
            self.discard(connection)
        return None

    def discard_idle(self) -> None:
        """Close those that wait to be used again."""
        while self.idle:
            self.discard(self.idle.pop())

    def close(self) -> None:
        """Close all, and whatever is being dialled as soon as it is there."""
        self.is_closed = True
        for connection in self.open:
            connection.abort()
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_exception(DialFailed("the transport was closed"))

    def keep(self, connection: Connection) -> None:
        """Keep it for the next request."""
        self.idle.append(connection)
        self.wake()

    def discard(self, connection: Connection) -> None:
        """Close it."""
        connection.abort()
        self.open.discard(connection)
        self.wake()

    def wake(self) -> None:
        """Let the first who waits look again."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class DirectTransport:
    """Sends over connections of our own: a tenth of what an HTTP client costs. Needs `hookwright[fast]` (httptools).

    HTTP/1.1 POST and nothing else. The same promises as HttpxTransport, and one more: bytes that nobody asked for close
    their connection before it is used again. A kept connection that turns out to be closed before a byte of the answer
    came is replaced once, within the same attempt: the receiver may then see the request twice, with the same id.
    `ssl_context` replaces the default one, `resolver` the system's; without a `network`, the dispatcher's is kept to.

    Raises ConfigurationError without httptools, and for `NetworkPolicy.delegated()`.

    ```python
    from hookwright import DirectTransport, Dispatcher

    dispatcher = Dispatcher("memory:", transport=DirectTransport())
    ```
    """

    def __init__(
        self,
        *,
        network: NetworkPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        pool_idle: float = POOL_IDLE,
        pools_most: int = POOLS_MOST,
    ) -> None:
        self._make_parser = _parser_class()
        self._dialler = Dialler(network, resolver)
        self._contexts = TLSContexts(ssl_context)
        self._pools: Pools[_Connections] = Pools(_Connections.close, idle=pool_idle, most=pools_most)
        self._ways: dict[str, _Way] = {}
        self._buffer = bytearray(BUFFER)
        self._names: set[str] = set()
        self._is_closed = False

    @property
    def network(self) -> NetworkPolicy | None:
        """The policy that was given to this transport itself."""
        return self._dialler.network

    def keep_to(self, network: NetworkPolicy) -> None:
        """Keep to a dispatcher's network policy, unless one was given to this transport itself.

        Raises ConfigurationError when another dispatcher's is kept to already.
        """
        self._dialler.keep_to(network)

    async def send(self, request: Request) -> Response | Failure:
        """Send one attempt; see `Transport.send`. Raises nothing but an outer cancellation."""
        until = asyncio.get_running_loop().time() + request.total_timeout
        try:
            way = self._ways.get(request.url) or self._take_apart(request.url)
            message = self._compose(way, request)
            if self._is_closed:
                return Failure("transport_error", "the transport is closed")
            self._dialler.check_scheme(way.scheme)
            pool = self._pools.enter(key_of(request, way.origin), _Connections)
            try:
                return await self._exchange(pool, way, request, message, until)
            finally:
                self._pools.leave(pool)
        except DialFailed as error:
            return Failure(error.code, str(error)[:200])
        except TimeoutError:
            return Failure("timeout", "no complete answer within the total timeout")
        except Exception as error:  # noqa: BLE001  # a failure is a value
            return Failure("transport_error", type(error).__name__)

    async def aclose(self) -> None:
        """Close every connection; attempts in flight end as failures."""
        self._is_closed = True
        self._pools.close()
        self._dialler.close()

    async def _exchange(
        self, pool: Pool[_Connections], way: _Way, request: Request, message: bytes, until: float
    ) -> Response | Failure:
        connections, is_again = pool.connections, False
        while True:
            connection = connections.take_idle() or await self._open(connections, way, request, until)
            try:
                answer = await connection.post(message, until)
            except Stale:
                connections.discard(connection)
                if is_again:
                    return Failure("connect_error", "the connection broke")
                # Those that were kept with it are as old: the request goes out once more, on a new one.
                is_again = True
                connections.discard_idle()
                continue
            except BaseException:
                connections.discard(connection)
                raise
            if connection.is_reusable and self._pools.is_current(pool):
                connections.keep(connection)
            else:
                connections.discard(connection)
            return answer

    async def _open(self, connections: _Connections, way: _Way, request: Request, until: float) -> Connection:
        """Return a connection: a new one, or when there are as many as may be, the next that becomes free."""
        async with asyncio.timeout_at(until):
            while len(connections.open) + connections.dialling >= request.connections:
                turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                connections.waiting.append(turn)
                try:
                    await turn
                except BaseException:
                    if turn.done() and not turn.cancelled():
                        connections.wake()  # it was our turn, and we are gone
                    raise
                idle = connections.take_idle()
                if idle is not None:
                    return idle
            connections.dialling += 1
            try:
                connection = await self._dial(way, request)
            except BaseException:
                connections.wake()
                raise
            finally:
                connections.dialling -= 1
            if connections.is_closed:
                connection.abort()
                raise DialFailed("the transport was closed")
            connections.open.add(connection)
            return connection

    async def _dial(self, way: _Way, request: Request) -> Connection:
        context = await self._contexts.of(way.scheme, request.client_certificate)
        target = Target(way.host, way.port, request.dns_timeout, request.connect_timeout)
        reached = await self._dialler.connect(target)
        connection = await attach(lambda: Connection(self._make_parser, self._buffer), reached)
        if context is not None:
            await secure(connection, context, way.host, reached)
        return connection

    def _compose(self, way: _Way, request: Request) -> bytes:
        lines = [f"{way.begin}{len(request.body)}\r\n"]
        for name, value in request.headers:
            if name not in self._names:
                if name.lower() in CONNECTION_HEADERS:
                    continue
                self._check_name(name)
            lines.append(f"{name}: {value}\r\n")
        lines.append("\r\n")
        head = "".join(lines)
        # Whoever can put a line end into a header writes requests of his own. Four lines of the head are ours.
        if head.count("\n") != len(lines) + 3 or head.count("\r") != len(lines) + 3 or _UNSENDABLE.search(head):
            raise _Unsendable("a header holds a line end, or what is not printable ASCII")
        return head.encode("ascii") + request.body

    def _check_name(self, name: str) -> None:
        if not HEADER_NAME.fullmatch(name):
            raise _Unsendable("a header's name is none (RFC 9110, 5.6.2)")
        if len(self._names) >= _NAMES_KEPT:
            self._names.clear()
        self._names.add(name)

    def _take_apart(self, url: str) -> _Way:
        # urlsplit drops line ends and tabs without a word, and keeps a user and password in the Host header.
        if not _STORED_URL.fullmatch(url) or not url.isascii() or not url.isprintable() or " " in url:
            raise _Unsendable("the url is not in the form in which endpoints store it")
        parts = urlsplit(url)
        host = parts.hostname or ""
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        if len(self._ways) >= _WAYS_KEPT:
            self._ways.clear()
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        way = self._ways[url] = _Way(
            parts.scheme,
            host,
            port,
            f"{parts.scheme}://{host}:{port}",
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept-Encoding: identity\r\nContent-Length: ",
        )
        return way


class _Unsendable(DialFailed):
    """What was given cannot be sent."""

    code = "protocol_error"


def _parser_class() -> Callable[[object], Any]:
    try:
        from httptools import HttpResponseParser
    except ImportError:
        raise ConfigurationError("DirectTransport needs httptools: pip install 'hookwright[fast]'") from None
    return HttpResponseParser
