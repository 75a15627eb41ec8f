"""TransportContract: hostile receivers on real sockets, for any transport."""

from __future__ import annotations

from hookwright.testing._transport_contract_addresses import AddressContract
from hookwright.testing._transport_contract_endings import EndingContract
from hookwright.testing._transport_contract_floods import FloodContract
from hookwright.testing._transport_contract_framing import FramingContract
from hookwright.testing._transport_contract_pools import PoolContract, SendingContract
from hookwright.testing._transport_contract_targets import TargetContract
from hookwright.testing._transport_contract_tls import TLSContract


class TransportContract(
    EndingContract,
    FramingContract,
    FloodContract,
    TLSContract,
    TargetContract,
    AddressContract,
    SendingContract,
    PoolContract,
):
    """What a transport must do to be one: subclass it in a test module, and say how to make yours.

    Needs pytest, pytest-asyncio in auto mode, and trustme. `make_transport` returns a new transport that keeps to
    `network`, verifies certificates by `ssl_context` and, unless `resolver` is None, asks it for every name. The
    receivers are raw asyncio servers on loopback, over http and https. Besides its own row, every attempt is held to
    what holds for all: it ends within the total timeout and half a second, holds the loop for no more than 50 ms of
    processor time at once, grows the process by less than 5 MB (on Linux), tells nothing about the receiver in a
    Failure's detail, and leaves the transport usable, for the same endpoint too, which has one connection. Time on the
    loop is taken from asyncio's own callbacks: under another loop it is not measured. No test waits longer than it
    must; the whole takes half a minute.

    ```python
    import ssl
    from typing import Any

    from hookwright import HttpxTransport, NetworkPolicy, Transport
    from hookwright.testing import TransportContract


    class TestHttpxTransport(TransportContract):
        def make_transport(
            self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Any = None
        ) -> Transport:
            return HttpxTransport(network=network, ssl_context=ssl_context, resolver=resolver)
    ```
    """
