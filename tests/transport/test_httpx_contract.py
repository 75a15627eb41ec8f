"""HttpxTransport keeps the transport contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright import HttpxTransport, NetworkPolicy, Transport
from hookwright.testing import TransportContract

if TYPE_CHECKING:
    import ssl

    from hookwright.transport._resolver import Resolver


class TestHttpxTransport(TransportContract):
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        return HttpxTransport(network=network, ssl_context=ssl_context, resolver=resolver)
