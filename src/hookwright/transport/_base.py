"""The seam between deciding and sending: one request in, one value out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from hookwright._addresses import masked_url

if TYPE_CHECKING:
    from hookwright._addresses import NetworkPolicy
    from hookwright._certificate import ClientCertificate

RESPONSE_READ = 64 * 1024
"""Bytes of a response's body that are read at most; then the connection is closed."""

RESPONSE_KEPT = 16 * 1024
"""Bytes of a response's body that are kept in the history."""

RESPONSE_HEADERS = 32 * 1024
"""Bytes of response headers that are accepted at most."""


CONNECTION_HEADERS = frozenset({"host", "accept-encoding", "content-length", "transfer-encoding", "connection"})
"""Headers that a transport sets itself: what a request gives under these names is left out."""


class Request(NamedTuple):
    """One attempt: a POST of `body` to `url`. All times are in seconds.

    `endpoint_id` and `revision` name the pool: connections are never shared between endpoints, nor kept after an
    endpoint's url or secret changed. `connections` bounds that pool. Headers and body are not in its `repr`.
    A transport that changes requests makes a new one: `request._replace(headers=...)`.
    """

    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    endpoint_id: str
    revision: int
    connections: int = 4
    total_timeout: float = 15.0
    connect_timeout: float = 5.0
    dns_timeout: float = 3.0
    client_certificate: ClientCertificate | None = None

    def __repr__(self) -> str:
        return f"Request(url={masked_url(self.url)!r}, endpoint_id={self.endpoint_id!r}, revision={self.revision})"


class Response(NamedTuple):
    """What the receiver answered. The body is raw (never decoded) and capped; `truncated` says that more was sent.

    Headers and body are not in its `repr`: receivers echo what they are sent.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    truncated: bool = False

    def __repr__(self) -> str:
        cut = ", truncated" if self.truncated else ""
        return f"Response(status={self.status}, {len(self.headers)} headers, {len(self.body)} bytes{cut})"


class Failure(NamedTuple):
    """No answer. `detail` says why in words, without the url or an address: customers may be shown it.

    `code` is `dns_error`, `connect_error`, `connect_timeout`, `tls_error`, `auth_error` (what would prove who we are
    cannot be shown), `timeout`, `protocol_error`, `blocked_target` (the network policy) or `transport_error`. With
    `local_error` nothing could be sent for want of something of our own (descriptors, ports, memory): it says nothing
    of the receiver, and costs no attempt.
    """

    code: str
    detail: str = ""


@runtime_checkable
class NetworkBound(Protocol):
    """A transport that keeps to a network policy, and takes the dispatcher's when it was given none.

    `network` is what it was given. A transport that wraps one of ours hands both on.
    """

    @property
    def network(self) -> NetworkPolicy | None:
        """The policy that it was given, or None."""
        ...

    def keep_to(self, network: NetworkPolicy) -> None:
        """Keep to this one."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Sends one attempt. To change requests or responses, wrap one.

    Whoever connects must see to what HttpxTransport and DirectTransport do: the address check (`NetworkPolicy.vet` and
    `permits_port`, at every dial), the client certificate, the caps. `hookwright.testing.TransportContract` tries it
    out. One that wraps ours gives it a `network=`, or hands on `keep_to` and `network` (see `NetworkBound`).

    ```python
    from hookwright import DirectTransport, Dispatcher, NetworkPolicy, Request


    class Traced:
        def __init__(self, inner):
            self.inner = inner

        async def send(self, request: Request):
            return await self.inner.send(request._replace(headers=(*request.headers, ("x-trace", "1"))))

        async def aclose(self):
            await self.inner.aclose()


    network = NetworkPolicy(allow=["10.20.0.0/16"])
    dispatcher = Dispatcher("memory:", network=network, transport=Traced(DirectTransport(network=network)))
    ```
    """

    async def send(self, request: Request) -> Response | Failure:
        """Send `request` within its total timeout, DNS to last byte; never raise but on cancellation."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
