"""HttpxTransport: one attempt over any httpx2 transport, never through a client object.

A client would bring a cookie jar that carries one tenant's cookies to another, redirects, the environment's proxies,
content decoding (590 bytes of gzip become 268 MB), and no total timeout.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import httpcore2
import httpx2

from hookwright._addresses import NetworkPolicy
from hookwright._errors import ConfigurationError
from hookwright.transport._base import RESPONSE_HEADERS, RESPONSE_KEPT, RESPONSE_READ, Failure, Request, Response
from hookwright.transport._pinned import BlockedTarget, DNSFailed, PinnedTransport, PoolKey

if TYPE_CHECKING:
    from hookwright.transport._resolver import Resolver

_URLS_KEPT = 4096


class HttpxTransport:
    """Sends over `inner`, any `httpx2.AsyncBaseTransport`; None is ours, which keeps to `network`.

    The whole attempt, DNS to last byte, has one deadline. Redirects, cookies, proxies and the environment are not
    looked at; the body is read raw up to 64 KiB, of which 16 KiB are kept. With an `inner` of your own the address
    check is not ours. `ssl_context` replaces the default one, `resolver` the system's.

    Raises ConfigurationError when `inner` is given together with what only ours uses.

    ```python
    import httpx2
    from hookwright import HttpxTransport

    transport = HttpxTransport(httpx2.MockTransport(lambda request: httpx2.Response(204)))
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
        if inner is not None and not (network is None and ssl_context is None and resolver is None):
            raise ConfigurationError(
                "network, ssl_context and resolver are for our own inner transport: leave them out"
            )
        self._inner = inner or PinnedTransport(network or NetworkPolicy(), ssl_context=ssl_context, resolver=resolver)
        self._urls: dict[str, httpx2.URL] = {}

    async def send(self, request: Request) -> Response | Failure:
        """Send one attempt; see `Transport.send`."""
        partial: list[Response] = []
        deadline = asyncio.timeout(request.total_timeout)
        try:
            async with deadline:
                return await self._exchange(request, partial)
        except Exception as error:  # noqa: BLE001  # a failure is a value; every exception is converted in one place
            # Once there is a status the attempt is judged by it, however the body ended.
            return partial[0] if partial else _failure(error, expired=deadline.expired())

    async def aclose(self) -> None:
        """Close every connection."""
        await self._inner.aclose()

    async def _exchange(self, request: Request, partial: list[Response]) -> Response | Failure:
        answer = await self._inner.handle_async_request(self._build(request))
        try:
            headers = tuple(
                (name.decode("ascii", "replace"), value.decode("utf-8", "replace"))
                for name, value in answer.headers.raw
            )
            if not 200 <= answer.status_code <= 599:  # RFC 9110, 15: what an answer may be
                return Failure("protocol_error", f"status {answer.status_code}")
            if sum(len(name) + len(value) for name, value in headers) > RESPONSE_HEADERS:
                return Failure("protocol_error", "response headers over 32 KiB")
            partial.append(Response(answer.status_code, headers, b"", truncated=True))
            body, whole = await self._read(answer, partial)
            return Response(answer.status_code, headers, body, truncated=not whole)
        finally:
            await answer.stream.aclose()  # type: ignore[union-attr]  # the answer to an async transport has an async stream

    async def _read(self, answer: httpx2.Response, partial: list[Response]) -> tuple[bytes, bool]:
        if answer.status_code == 204:  # No Content
            return b"", True
        body = bytearray()
        async for chunk in answer.stream:  # type: ignore[union-attr]  # see above
            body += chunk
            if len(body) > RESPONSE_KEPT:
                partial[0] = Response(
                    answer.status_code, partial[0].headers, bytes(body[:RESPONSE_KEPT]), truncated=True
                )
            if len(body) > RESPONSE_READ:
                return bytes(body[:RESPONSE_KEPT]), False
            if len(body) <= RESPONSE_KEPT:
                partial[0] = Response(answer.status_code, partial[0].headers, bytes(body), truncated=True)
        return bytes(body[:RESPONSE_KEPT]), len(body) <= RESPONSE_KEPT

    def _build(self, request: Request) -> httpx2.Request:
        url = self._urls.get(request.url)
        if url is None:
            if len(self._urls) >= _URLS_KEPT:
                self._urls.clear()
            url = self._urls[request.url] = httpx2.URL(request.url)
        headers = [
            (b"Host", url.netloc),
            (b"Accept-Encoding", b"identity"),
            (b"Content-Length", str(len(request.body)).encode()),
            *((name.encode("ascii"), value.encode("ascii")) for name, value in request.headers),
        ]
        key = PoolKey(
            request.endpoint_id, request.revision, request.connections, request.dns_timeout, request.connect_timeout
        )
        return httpx2.Request(
            "POST", url, headers=headers, stream=httpx2.ByteStream(request.body), extensions={"hookwright": key}
        )


_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str, str], ...] = (
    (DNSFailed, "dns_error", ""),
    ((httpcore2.ConnectTimeout, httpx2.ConnectTimeout), "connect_timeout", "no connection in time"),
    ((httpcore2.TimeoutException, httpx2.TimeoutException), "timeout", "no answer in time"),
    ((httpcore2.ConnectError, httpx2.ConnectError), "connect_error", "the connection was refused, or is unreachable"),
    ((httpcore2.ProtocolError, httpx2.ProtocolError), "protocol_error", ""),
    ((httpcore2.NetworkError, httpx2.NetworkError, OSError), "connection_error", "the connection broke"),
)


def _failure(error: BaseException, *, expired: bool) -> Failure:
    """Turn whatever the HTTP libraries raise into a value: the only place that knows their exceptions."""
    if isinstance(error, TimeoutError) and expired:
        return Failure("timeout", "no complete answer within the total timeout")
    if isinstance(error, BlockedTarget):
        return Failure("blocked_target", f"the host resolves to a refused address ({error.rule})")
    tls = _cause(error, ssl.SSLError)
    if tls is not None:
        return Failure("tls_error", getattr(tls, "verify_message", "") or getattr(tls, "reason", "") or "TLS failed")
    for kinds, code, detail in _CODES:
        if isinstance(error, kinds):
            return Failure(code, detail or str(error)[:200])
    return Failure("transport_error", type(error).__name__)


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error
