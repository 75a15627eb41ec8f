"""DirectTransport keeps the transport contract, all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright import DirectTransport, NetworkPolicy, Transport
from hookwright.testing import TransportContract

if TYPE_CHECKING:
    import ssl

    from hookwright.transport._resolver import Resolver


class TestDirectTransport(TransportContract):
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        return DirectTransport(network=network, ssl_context=ssl_context, resolver=resolver)
