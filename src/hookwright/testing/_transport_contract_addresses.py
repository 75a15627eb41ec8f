"""The transport contract: names, and which of their addresses are dialled."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from hookwright._addresses import NetworkPolicy
from hookwright.testing._transport_contract_base import (
    HOST,
    OPEN,
    Encounter,
    Said,
    good,
    receiving,
    trusting,
)
from hookwright.testing._transport_contract_targets import STRICT, DiallingContract

if TYPE_CHECKING:
    from hookwright.transport._resolver import Resolver


def _finds(*turns: list[str] | Exception) -> Resolver:
    """Answer with the next of `turns`, the last one again and again."""
    left = list(turns)

    async def resolve(host: str, port: int) -> list[str]:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return resolve


async def _never(host: str, port: int) -> list[str]:
    await asyncio.Event().wait()
    return []


class AddressContract(DiallingContract):
    """Every address of a name is judged at every dial, and what cannot be resolved in time is a DNS error."""

    @pytest.mark.parametrize(
        "found",
        [
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
            OSError(5, f"{HOST} cannot be resolved"),
            RuntimeError(f"{HOST} s3cret-token"),
            [],
            [f"127.0.{high}.{low}" for high in range(2) for low in range(250)],
        ],
        ids=["no such name", "server failure", "OSError", "a bug", "no address", "500 addresses"],
    )
    async def test_a_name_without_a_usable_answer_is_a_dns_error(self, found: list[str] | Exception) -> None:
        async with self.facing(good, resolver=_finds(found, ["127.0.0.1"])) as encounter:
            await encounter.fails("dns_error")
            assert encounter.receiver.connections == 0
            await encounter.assert_usable()

    async def test_a_resolver_that_stalls_is_a_dns_error_in_time(self) -> None:
        async with self.facing(good, resolver=_never) as encounter:
            await encounter.fails("dns_error", dns_timeout=0.2, total_timeout=5.0, within=0.7)
            await encounter.fails("timeout", dns_timeout=5.0, total_timeout=0.2)
            answer = await encounter.send(url=encounter.receiver.url("127.0.0.1"), revision=2)
            assert Said(200, b"good").accepts(answer), answer  # an address is no name: nobody is asked

    async def test_a_resolver_that_stalls_delays_no_other_name(self) -> None:
        async def some(host: str, port: int) -> list[str]:
            return await _never(host, port) if host.startswith("slow") else ["127.0.0.1"]

        async with self.facing(good, resolver=some) as encounter:
            stalled = [
                asyncio.create_task(
                    encounter.send(url=f"http://slow{number}.example/", endpoint_id=f"ep_slow_{number}")
                )
                for number in range(30)
            ]
            await encounter.assert_usable()
            assert not any(task.done() for task in stalled)
            for task in stalled:
                task.cancel()
            await asyncio.gather(*stalled, return_exceptions=True)

    @pytest.mark.parametrize(
        "addresses",
        [
            ["127.0.0.1"],
            ["1.1.1.1", "127.0.0.1"],
            ["127.0.0.1", "1.1.1.1"],
            ["::1"],
            ["::ffff:127.0.0.1"],
            ["64:ff9b::7f00:1"],
            ["10.0.0.1"],
            ["169.254.169.254"],
            ["0.0.0.0"],  # noqa: S104  # dialled, and nothing is bound to it
        ],
        ids=", ".join,
    )
    async def test_a_name_with_one_refused_address_is_not_dialled_at_all(
        self, addresses: list[str], dialled: list[str]
    ) -> None:
        async with self.facing(good, network=STRICT, resolver=_finds(addresses)) as encounter:
            failure = await encounter.fails("blocked_target")
            assert not any(address in failure.detail for address in addresses)
            assert dialled == []
            assert encounter.receiver.connections == 0

    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"])
    async def test_an_address_in_the_url_is_judged_as_well(self, host: str, dialled: list[str]) -> None:
        async with self.facing(good, network=STRICT) as encounter:
            await encounter.fails("blocked_target", url=encounter.receiver.url(host))
            assert dialled == []

    @pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0"])
    async def test_an_address_in_disguise_is_a_name_and_judged_by_what_it_resolves_to(
        self, host: str, dialled: list[str]
    ) -> None:
        async with self.facing(good, network=STRICT) as encounter:
            await encounter.fails("blocked_target", "dns_error", url=encounter.receiver.url(host))
            assert dialled == []

    async def test_plain_http_is_refused_by_a_policy_that_does_not_allow_it(self, dialled: list[str]) -> None:
        async with self.facing(good, network=NetworkPolicy(allow_loopback=True)) as encounter:
            await encounter.fails("blocked_target")
            assert dialled == []

    async def test_a_rebinding_name_is_judged_again_at_every_dial(self) -> None:
        turns = _finds(["127.0.0.1"], ["127.0.0.1", "10.0.0.1"])
        async with self.facing(good, resolver=turns) as encounter:
            await encounter.succeeds()
            await encounter.fails("blocked_target", revision=2)
            assert encounter.receiver.connections == 1

    async def test_what_was_judged_is_what_is_dialled(self) -> None:
        asked = []

        async def once(host: str, port: int) -> list[str]:
            asked.append((host, port))
            return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

        async with self.facing(good, resolver=once) as encounter:
            await encounter.succeeds()
            assert asked == [(HOST, encounter.receiver.port)]

    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_the_next_address_is_tried_when_one_refuses(self, scheme: str, dialled: list[str]) -> None:
        found = _finds(["127.0.0.98", "127.0.0.99", "127.0.0.1"])
        async with self.facing(good, scheme, resolver=found) as encounter:
            await encounter.succeeds()
            assert encounter.receiver.connections == 1
            assert dialled == ["127.0.0.98", "127.0.0.99", "127.0.0.1"]

    async def test_addresses_that_all_refuse_are_a_connect_error(self) -> None:
        async with self.facing(good, resolver=_finds(["127.0.0.98", "127.0.0.99"])) as encounter:
            await encounter.fails("connect_error")

    async def test_without_a_resolver_the_systems_is_asked(self) -> None:
        async with receiving(good) as receiver:
            transport = self.make_transport(network=OPEN, ssl_context=trusting(), resolver=None)
            encounter = Encounter(transport, receiver, receiver)
            await encounter.succeeds(url=receiver.url("localhost"))
            await encounter.fails("dns_error", url="http://no-such-name.invalid/", revision=2)
            await transport.aclose()
            await receiver.saw_all_close()

    async def test_the_source_address_is_the_policys(self) -> None:
        policy = NetworkPolicy(allow_http=True, allow_loopback=True, local_address="127.0.0.7")
        async with self.facing(good, network=policy) as encounter:
            await encounter.succeeds()
            peer = await encounter.receiver.arrived.get()
            assert peer.writer.get_extra_info("peername")[0] == "127.0.0.7"
