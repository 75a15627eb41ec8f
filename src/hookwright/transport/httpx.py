"""HttpxTransport: one attempt over any httpx2 transport, never through a client object.

A client would bring a cookie jar that carries one tenant's cookies to another, redirects, the environment's proxies,
content decoding (590 bytes of gzip become 268 MB), and no total timeout.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import httpcore2
import httpx2

from hookwright._errors import ConfigurationError
from hookwright.transport._base import (
    CONNECTION_HEADERS,
    RESPONSE_HEADERS,
    RESPONSE_KEPT,
    RESPONSE_READ,
    Failure,
    Request,
    Response,
)
from hookwright.transport._dial import DialFailed
from hookwright.transport._discreet import attempting, be_discreet
from hookwright.transport._pinned import PinnedTransport

if TYPE_CHECKING:
    from hookwright._addresses import NetworkPolicy
    from hookwright.transport._resolver import Resolver

_URLS_KEPT = 4096


class HttpxTransport:
    """Sends over `inner`, any `httpx2.AsyncBaseTransport`; None is ours, which keeps to `network`.

    The whole attempt, DNS to last byte, has one deadline. Redirects, cookies, proxies and the environment are not
    looked at; the body is read raw up to 64 KiB, of which 16 KiB are kept. `ssl_context` replaces the default one,
    `resolver` the system's; without a `network`, the dispatcher's is kept to. An `inner` of your own (a proxy, HTTP/2,
    another engine) makes its own connections: that the address check is then not ours must be said, with
    `network=NetworkPolicy.delegated()`.

    Raises ConfigurationError when it is not, and for settings that only our own inner transport uses.

    ```python
    import httpx2
    from hookwright import HttpxTransport, NetworkPolicy

    mock = httpx2.MockTransport(lambda request: httpx2.Response(204))
    transport = HttpxTransport(mock, network=NetworkPolicy.delegated())
    ```
    """

    def __init__(
        self,
        inner: httpx2.AsyncBaseTransport | None = None,
        *,
        network: NetworkPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        if inner is not None and (network is None or not network.is_delegated):
            raise ConfigurationError(
                "inner: addresses are then not checked by us: say so with HttpxTransport(inner,"
                " network=NetworkPolicy.delegated())"
            )
        if inner is not None and not (ssl_context is None and resolver is None):
            raise ConfigurationError("ssl_context and resolver are for our own inner transport: leave them out")
        self._own: PinnedTransport | None = None
        if inner is None:
            inner = self._own = PinnedTransport(network, ssl_context=ssl_context, resolver=resolver)
        self._inner = inner
        be_discreet()
        self._network = network
        self._urls: dict[str, httpx2.URL] = {}

    @property
    def network(self) -> NetworkPolicy | None:
        """The policy that was given to this transport itself."""
        return self._network

    def keep_to(self, network: NetworkPolicy) -> None:
        """Keep to a dispatcher's network policy, unless one was given to this transport itself.

        Raises ConfigurationError when another dispatcher's is kept to already.
        """
        if self._own is not None:
            self._own.keep_to(network)

    async def send(self, request: Request) -> Response | Failure:
        """Send one attempt; see `Transport.send`. Raises nothing but an outer cancellation."""
        if request.client_certificate is not None and self._own is None:
            return Failure("auth_error", "a client certificate cannot be presented through another inner transport")
        answer = _Answer()
        quiet = attempting.set(True)
        deadline = asyncio.timeout(request.total_timeout)
        try:
            async with deadline:
                await self._exchange(request, answer)
        except Exception as error:  # noqa: BLE001  # a failure is a value; every exception is converted in one place
            # Once there is a status the attempt is judged by it, however the body ended.
            return answer.response() or _failure(error, expired=deadline.expired())
        finally:
            attempting.reset(quiet)
        return answer.response() or Failure("protocol_error", answer.refused)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._inner.aclose()

    async def _exchange(self, request: Request, answer: _Answer) -> None:
        received = await self._inner.handle_async_request(self._build(request))
        stream = received.stream
        assert isinstance(stream, httpx2.AsyncByteStream)
        try:
            if answer.accept_head(received):
                await answer.read(stream)
        finally:
            await stream.aclose()

    def _build(self, request: Request) -> httpx2.Request:
        url = self._urls.get(request.url)
        if url is None:
            if len(self._urls) >= _URLS_KEPT:
                self._urls.clear()
            url = self._urls[request.url] = httpx2.URL(request.url)
        headers = [
            (b"Host", url.netloc),
            (b"Accept-Encoding", b"identity"),
            (b"Content-Length", b"%d" % len(request.body)),
        ]
        for name, value in request.headers:
            if name.lower() not in CONNECTION_HEADERS:
                headers.append((name.encode("ascii"), value.encode("ascii")))
        return httpx2.Request(
            "POST", url, headers=headers, stream=httpx2.ByteStream(request.body), extensions={"hookwright": request}
        )


class _Answer:
    """What has arrived so far; from the status line on, a response whatever happens to the body."""

    __slots__ = ("_body", "_headers", "_status", "_whole", "refused")

    def __init__(self) -> None:
        self._status = 0
        self._headers: tuple[tuple[str, str], ...] = ()
        self._body = bytearray()
        self._whole = False
        self.refused = ""

    def accept_head(self, received: httpx2.Response) -> bool:
        """Take status and headers, unless `refused` says why not."""
        raw = received.headers.raw
        if not 200 <= received.status_code <= 599:  # RFC 9110, 15: what a final answer may be
            self.refused = f"status {received.status_code} is no final HTTP status"
        elif {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in raw}:
            # RFC 9112, 6.3: which of the two ends the body is what request smuggling is made of.
            self.refused = "both Content-Length and Transfer-Encoding"
        elif sum(len(name) + len(value) + 4 for name, value in raw) > RESPONSE_HEADERS:  # as sent, with ": " and CRLF
            self.refused = f"response headers over {RESPONSE_HEADERS // 1024} KiB"
        else:
            self._headers = tuple(
                (name.decode("ascii", "replace"), value.decode("utf-8", "replace")) for name, value in raw
            )
            self._status = received.status_code
        return not self.refused

    async def read(self, stream: httpx2.AsyncByteStream) -> None:
        """Read the raw body up to the cap."""
        chunks = aiter(stream)
        try:
            async for chunk in chunks:
                self._body += chunk
                if len(self._body) > RESPONSE_READ:
                    return
            self._whole = True
        finally:
            if isinstance(chunks, AsyncGenerator):
                # Left to the collector, an unfinished generator would be closed at some later time.
                await chunks.aclose()

    def response(self) -> Response | None:
        """Return the response, or None before its head was accepted."""
        if not self._status:
            return None
        truncated = not self._whole or len(self._body) > RESPONSE_KEPT
        return Response(self._status, self._headers, bytes(self._body[:RESPONSE_KEPT]), truncated=truncated)


# In order: a subclass before its base. An empty detail is the exception's own words.
_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str, str], ...] = (
    ((httpcore2.ProxyError, httpx2.ProxyError), "connect_error", "the proxy refused, or could not connect"),
    ((httpcore2.ConnectTimeout, httpx2.ConnectTimeout), "connect_timeout", "no connection in time"),
    ((httpcore2.TimeoutException, httpx2.TimeoutException), "timeout", "no answer in time"),
    ((httpcore2.ConnectError, httpx2.ConnectError), "connect_error", "no connection: refused, reset or unreachable"),
    ((httpcore2.ProtocolError, httpx2.ProtocolError), "protocol_error", ""),
    ((httpcore2.NetworkError, httpx2.NetworkError, OSError), "connect_error", "the connection broke"),
)
# h11 repeats what it received, or was given, from the first quote, bracket or colon on; that may be a secret of ours.
_REPEATED = re.compile(r"\s*(?:b?['\"]|bytearray|[:(\[]).*", re.DOTALL)


def _failure(error: BaseException, *, expired: bool) -> Failure:
    """Turn whatever the HTTP libraries raise into a value: the only place that knows their exceptions."""
    if isinstance(error, TimeoutError) and expired:
        return Failure("timeout", "no complete answer within the total timeout")
    if isinstance(error, DialFailed):
        return Failure(error.code, str(error)[:200])
    if _caused_by_tls(error):
        return Failure("tls_error", "the TLS handshake failed")
    for kinds, code, detail in _CODES:
        if isinstance(error, kinds):
            return Failure(code, detail or _REPEATED.sub("", str(error))[:200])
    return Failure("transport_error", type(error).__name__)


def _caused_by_tls(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None
