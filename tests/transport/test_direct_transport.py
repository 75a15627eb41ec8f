"""DirectTransport: what it promises beyond the contract, and where it could go wrong by itself."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import ConfigurationError, DirectTransport, Dispatcher, Failure, NetworkPolicy, Request, Response
from hookwright.testing._transport_contract_base import OPEN, Peer, answers, deaf, good, loopback, receiving, says
from hookwright.transport import direct
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def request(url: str, **changes: Any) -> Request:
    return Request(url, (("x-test", "1"),), b"{}", endpoint_id="ep_1", revision=1, total_timeout=5.0)._replace(
        **changes
    )


@asynccontextmanager
async def transporting(**options: Any) -> AsyncIterator[DirectTransport]:
    transport = DirectTransport(network=OPEN, resolver=loopback, **options)
    try:
        yield transport
    finally:
        await transport.aclose()


def status(answer: Response | Failure) -> int:
    assert isinstance(answer, Response), answer
    return answer.status


def code(answer: Response | Failure) -> str:
    assert isinstance(answer, Failure), answer
    return answer.code


async def test_a_kept_connection_that_breaks_is_replaced_once_and_not_once_for_each_that_was_kept() -> None:
    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await peer.request()
        peer.writer.close()

    async with receiving(once) as receiver, transporting() as transport:
        together = [transport.send(request(receiver.url(), connections=8)) for _ in range(8)]
        assert {status(answer) for answer in await asyncio.gather(*together)} == {200}
        before = len(receiver.requests)
        assert status(await transport.send(request(receiver.url(), connections=8))) == 200
        assert len(receiver.requests) - before <= 2


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 150 X\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 199 X\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 103 X\r\ncontent-length: 5\r\n\r\nhello",
    ],
)
async def test_an_interim_answer_with_a_body_is_no_part_of_the_answer(interim: bytes) -> None:
    final = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    async with receiving(says(interim + final)) as receiver, transporting() as transport:
        assert code(await transport.send(request(receiver.url()))) == "protocol_error"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 X\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 304 X\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.0 200 X\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_a_connection_on_which_a_body_may_come_late_is_not_kept(head: bytes) -> None:
    async with receiving(answers(head)) as receiver, transporting() as transport:
        for _ in range(2):
            await transport.send(request(receiver.url()))
        assert receiver.connections == 2


async def test_closing_ends_those_who_wait_for_a_connection_too() -> None:
    async with receiving(deaf) as receiver:
        transport = DirectTransport(network=OPEN, resolver=loopback)
        sent = [asyncio.create_task(transport.send(request(receiver.url(), connections=1))) for _ in range(4)]
        await receiver.arrived.get()
        await transport.aclose()
        receiver.turn_good()
        assert {type(answer) for answer in await asyncio.gather(*sent)} == {Failure}
        assert code(await transport.send(request(receiver.url()))) == "transport_error"
        assert receiver.connections == 1


@pytest.mark.parametrize("name", ["Content-Length ", "Transfer-Encoding\t", "A: b", "", "a\r\nb", "a b", "ä"])
async def test_a_header_name_that_is_none_is_not_sent(name: str) -> None:
    async with receiving(good) as receiver, transporting() as transport:
        assert code(await transport.send(request(receiver.url(), headers=((name, "x"),)))) == "protocol_error"
        assert receiver.requests == []


async def test_idle_connections_beyond_the_most_are_closed_when_many_end_at_once() -> None:
    async with receiving(good) as receiver, transporting(pools_most=5) as transport:
        sent = [transport.send(request(receiver.url(), endpoint_id=f"ep_{number}")) for number in range(30)]
        await asyncio.gather(*sent)
        await until(lambda: receiver.open == 5)


async def test_two_dispatchers_do_not_share_a_transport_under_two_policies() -> None:
    transport = DirectTransport()
    Dispatcher("memory:", transport=transport)
    Dispatcher("memory:", transport=transport)  # the same policy
    with pytest.raises(ConfigurationError, match="network= of its own"):
        Dispatcher("memory:", transport=transport, network=NetworkPolicy.development())
    own = DirectTransport(network=OPEN)
    Dispatcher("memory:", transport=own)  # takes the transport's, since it was given none
    await own.aclose()


def test_one_transport_serves_one_loop_after_another() -> None:
    transport = DirectTransport(network=OPEN, resolver=loopback)

    async def once() -> int:
        async with receiving(good) as receiver:
            return status(await transport.send(request(receiver.url())))

    assert [asyncio.run(once()) for _ in range(2)] == [200, 200]


def test_without_httptools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(direct.__dict__["__builtins__"], "__import__", _no_httptools)
    with pytest.raises(ConfigurationError, match=r"hookwright\[fast\]"):
        DirectTransport()


def _no_httptools(name: str, *rest: Any) -> Any:
    raise ImportError(name)
