"""The transport contract: what is sent, and whose connection it is sent on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright.testing._transport_contract_base import (
    GOOD,
    HOST,
    OK_HEAD,
    PATIENCE,
    ContractBase,
    Said,
    deaf,
    good,
    quietly,
    receiving,
    says_and_closes,
)
from hookwright.transport._base import Response

if TYPE_CHECKING:
    from hookwright.testing._transport_contract_base import Encounter, Peer

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


async def _closes_each(peer: Peer) -> None:
    await peer.request()
    await peer.say(OK_HEAD + b"connection: close\r\ncontent-length: 4\r\n\r\ngood")
    await peer.gone()


async def _closes_when_told(peer: Peer) -> None:
    await peer.request()
    await peer.say(GOOD)
    await peer.receiver.turned.wait()
    peer.writer.close()


async def _same(encounter: Encounter, times: int, **changes: object) -> None:
    for _ in range(times):
        answer = await encounter.send(**changes)
        assert Said(200, b"good").accepts(answer), answer


class SendingContract(ContractBase):
    """One plain POST leaves, and nothing that was not asked for."""

    @SCHEMES
    async def test_what_is_sent_is_what_was_given_and_three_headers_more(self, scheme: str) -> None:
        given = (("Host", "evil.example"), ("content-length", "99"), ("Accept-Encoding", "gzip"), ("x-test", "1"))
        async with self.facing(good, scheme) as encounter:
            for body in (b"12345", b"", bytes(range(256)) * 100):
                await encounter.succeeds(headers=given, body=body)
                head, _, sent = encounter.receiver.requests[-1].partition(b"\r\n\r\n")
                lines = head.split(b"\r\n")
                assert lines[0] == b"POST /hook?token=s3cret-token HTTP/1.1"
                assert sorted(line.lower() for line in lines[1:]) == [
                    b"accept-encoding: identity",
                    b"content-length: %d" % len(body),
                    b"host: %b:%d" % (HOST.encode(), encounter.receiver.port),
                    b"x-test: 1",
                ]
                assert sent == body

    @pytest.mark.parametrize("path", ["", "/", "/a/b%20c?x=%2F&y=%C3%A9&&z", "/..%2F//a;b=c"])
    async def test_the_url_is_sent_as_it_was_given(self, path: str) -> None:
        async with self.facing(good) as encounter:
            await encounter.succeeds(url=f"http://{HOST}:{encounter.receiver.port}{path}")
            line = encounter.receiver.requests[0].partition(b"\r\n")[0]
            assert line == b"POST %b HTTP/1.1" % (path or "/").encode()

    @SCHEMES
    async def test_a_request_larger_than_any_buffer_arrives_whole(self, scheme: str) -> None:
        total = 8_000_000
        got = bytearray()

        async def gather(peer: Peer) -> None:
            await peer.reader.readuntil(b"\r\n\r\n")
            while len(got) < total:
                got.extend(await peer.reader.read(65536))
            await peer.say(GOOD)

        body = bytes(range(250)) * (total // 250)
        async with self.facing(gather, scheme) as encounter:
            answer = await encounter.send(body=body, total_timeout=20.0)
            assert Said(200, b"good").accepts(answer), answer
            assert got == body

    @pytest.mark.parametrize("value", ["s3cret-token\r\nx: y", "s3cret-token\x00", "s3cret-token\u00e9"])
    async def test_a_header_that_cannot_be_sent_is_neither_sent_nor_repeated(self, value: str) -> None:
        async with self.facing(good) as encounter:
            await encounter.fails("protocol_error", "transport_error", headers=(("x-key", value),))
            assert encounter.receiver.requests == []
            await encounter.assert_usable()

    @SCHEMES
    async def test_proxies_of_the_environment_are_not_used(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async with receiving(deaf) as proxy:
            for name in PROXIES:
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}/")
            monkeypatch.delenv("NO_PROXY", raising=False)
            async with self.facing(good, scheme) as encounter:
                await encounter.succeeds()
            assert proxy.connections == 0

    async def test_an_answer_does_not_wait_for_the_whole_request(self) -> None:
        async def refuse(peer: Peer) -> None:
            await peer.reader.readuntil(b"\r\n\r\n")
            await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
            await peer.gone()

        async with self.facing(refuse) as encounter:
            assert (await encounter.succeeds(body=b"x" * 1000)).status == 413


class PoolContract(ContractBase):
    """A connection is its endpoint's and its revision's; it is used again when that is safe, and closed when not."""

    @SCHEMES
    async def test_a_connection_is_used_again(self, scheme: str) -> None:
        async with self.facing(good, scheme) as encounter:
            await _same(encounter, 3)
            assert encounter.receiver.connections == 1

    @SCHEMES
    async def test_a_receiver_that_says_close_is_not_asked_again_on_that_connection(self, scheme: str) -> None:
        async with self.facing(_closes_each, scheme) as encounter:
            for number in (1, 2, 3):
                await _same(encounter, 1)
                await encounter.receiver.saw_one_close()
                assert encounter.receiver.connections == number

    async def test_http_1_0_without_keep_alive_is_not_kept(self) -> None:
        async with self.facing(says_and_closes(b"HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\ngood")) as encounter:
            await _same(encounter, 2)
            assert encounter.receiver.connections == 2

    @SCHEMES
    async def test_a_connection_that_was_closed_while_idle_is_replaced(self, scheme: str) -> None:
        async with self.facing(_closes_when_told, scheme) as encounter:
            await _same(encounter, 1)
            encounter.receiver.turn_good()
            await encounter.receiver.saw_one_close()
            for _ in range(10):  # turns of the loop: until the transport has seen the end
                await asyncio.sleep(0)
            await _same(encounter, 2)
            assert encounter.receiver.connections == 2

    async def test_a_new_revision_uses_a_new_connection(self) -> None:
        async with self.facing(good) as encounter:
            for revision, connections in ((1, 1), (1, 1), (2, 2), (2, 2), (3, 3)):
                await _same(encounter, 1, revision=revision)
                assert encounter.receiver.connections == connections
            await encounter.receiver.saw_one_close()
            await encounter.receiver.saw_one_close()  # those of the revisions that are gone

    async def test_a_new_revision_does_not_take_a_connection_that_is_in_use(self) -> None:
        answering = asyncio.Event()

        async def wait(peer: Peer) -> None:
            await peer.request()
            await answering.wait()
            await peer.say(GOOD)
            await peer.gone()

        async with self.facing(wait) as encounter:
            old = asyncio.create_task(encounter.send())
            await encounter.receiver.arrived.get()
            encounter.receiver.turn_good()
            await _same(encounter, 1, revision=2)
            answering.set()
            assert Said(200, b"good").accepts(await old)
            await encounter.receiver.saw_one_close()

    @SCHEMES
    async def test_two_endpoints_never_share_a_connection(self, scheme: str) -> None:
        async with self.facing(good, scheme) as encounter:
            for _ in range(2):
                for endpoint_id in ("ep_a", "ep_b", "ep_c"):
                    await _same(encounter, 1, endpoint_id=endpoint_id)
            assert encounter.receiver.connections == 3

    async def test_a_connection_to_one_host_carries_nothing_for_another(self) -> None:
        async with self.facing(good) as encounter, receiving(good) as elsewhere:
            await encounter.succeeds()
            answer = await encounter.send(url=elsewhere.url())
            assert Said(200, b"good").accepts(answer), answer
            assert (len(encounter.receiver.requests), len(elsewhere.requests)) == (1, 1)

    @pytest.mark.parametrize("connections", [1, 2, 5])
    async def test_an_endpoint_never_has_more_connections_than_it_may(self, connections: int) -> None:
        most = 0

        async def count(peer: Peer) -> None:
            nonlocal most
            most = max(most, peer.receiver.open)
            await good(peer)

        async with self.facing(count) as encounter:
            sent = await asyncio.gather(*(encounter.send(connections=connections) for _ in range(12)))
            assert all(Said(200, b"good").accepts(answer) for answer in sent), sent
            assert most == connections

    async def test_waiting_for_a_connection_counts_as_well(self) -> None:
        async with self.facing(deaf) as encounter:
            first = asyncio.create_task(encounter.send(total_timeout=PATIENCE))
            await encounter.receiver.arrived.get()
            await encounter.fails("timeout", "connect_timeout", total_timeout=0.3)
            assert encounter.receiver.connections == 1
            await quietly(first)
            await encounter.assert_usable()

    @pytest.mark.parametrize("begun", [b"", OK_HEAD, OK_HEAD + b"content-length: 9\r\n\r\nx"],
                             ids=["request", "head", "body"])  # fmt: skip
    @SCHEMES
    async def test_a_cancelled_send_raises_and_closes_its_connection(self, begun: bytes, scheme: str) -> None:
        async def begin(peer: Peer) -> None:
            await peer.request()
            await peer.say(begun)
            await peer.gone()

        async with self.facing(begin, scheme) as encounter:
            task = asyncio.create_task(encounter.send())
            await encounter.receiver.arrived.get()
            for _ in range(10):  # turns of the loop: until the transport has read what was sent
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await encounter.receiver.saw_one_close()
            await encounter.assert_usable()

    async def test_a_send_that_is_cancelled_during_its_handshake_closes_its_connection(self) -> None:
        async def stall(peer: Peer) -> None:
            await peer.reader.read(1)
            peer.receiver.arrived.put_nowait(peer)
            await peer.gone()

        async with self.facing(stall, "https", bare=True) as encounter:
            task = asyncio.create_task(encounter.send())
            await encounter.receiver.arrived.get()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await encounter.receiver.saw_one_close()
            await encounter.assert_usable()

    async def test_many_cancelled_sends_leave_every_slot_free(self) -> None:
        async with self.facing(deaf) as encounter:
            tasks = [asyncio.create_task(encounter.send(connections=4)) for _ in range(12)]
            for _ in range(4):
                await encounter.receiver.arrived.get()
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in ended)
            encounter.receiver.turn_good()
            sent = await asyncio.gather(*(encounter.send(connections=4) for _ in range(12)))
            assert all(isinstance(answer, Response) for answer in sent), sent

    @SCHEMES
    async def test_closing_closes_every_connection(self, scheme: str) -> None:
        async with self.facing(good, scheme) as encounter:
            for endpoint_id in ("ep_a", "ep_b"):
                await _same(encounter, 1, endpoint_id=endpoint_id)
            assert encounter.receiver.open == 2
            await encounter.transport.aclose()
            await encounter.receiver.saw_all_close()
            await encounter.transport.aclose()  # again, and nothing happens
