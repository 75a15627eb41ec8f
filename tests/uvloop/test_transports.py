"""Both transports keep the transport contract on uvloop: what a loop has a part in, and every third hostile row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hookwright import DirectTransport, HttpxTransport, NetworkPolicy, Transport
from hookwright.testing._transport_contract_addresses import AddressContract
from hookwright.testing._transport_contract_endings import ENDINGS
from hookwright.testing._transport_contract_floods import FLOODS
from hookwright.testing._transport_contract_pools import PoolContract, SendingContract
from hookwright.testing._transport_contract_tls import TLSContract

if TYPE_CHECKING:
    import ssl

    from hookwright.testing._transport_contract_base import Row
    from hookwright.transport._resolver import Resolver


class LoopContract(TLSContract, AddressContract, SendingContract, PoolContract):
    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize("case", [*ENDINGS[::3], *FLOODS[::3]], ids=str)
    async def test_a_hostile_receiver(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)


class TestDirectTransport(LoopContract):
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        return DirectTransport(network=network, ssl_context=ssl_context, resolver=resolver)


class TestHttpxTransport(LoopContract):
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        return HttpxTransport(network=network, ssl_context=ssl_context, resolver=resolver)
