"""DirectTransport: what it promises beyond the contract, and where it could go wrong by itself."""

from __future__ import annotations

import asyncio
import math
import select
import socket
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import ConfigurationError, DirectTransport, Dispatcher, Failure, NetworkPolicy, Request, Response
from hookwright.testing import Inbox
from hookwright.testing._transport_contract_base import GOOD, OPEN, Peer, answers, deaf, good, loopback, receiving, says
from hookwright.transport import direct
from hookwright.transport._dial import HANDSHAKES_AT_ONCE, Dialler, Handshakes, Target
from tests.conftest import until
from tests.transport.answers import code, status

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


async def test_closing_ends_what_is_being_dialled() -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(host: str, port: int) -> list[str]:
        asked.set()
        await may_answer.wait()
        return ["127.0.0.1"]

    async with receiving(good) as receiver:
        transport = DirectTransport(network=OPEN, resolver=slow)
        sent = asyncio.create_task(transport.send(request(receiver.url())))
        await asked.wait()
        await transport.aclose()
        may_answer.set()
        assert isinstance(await sent, Failure)
        await receiver.saw_all_close()
        assert receiver.requests == []


class Forger(threading.Thread):
    """A receiver in a thread: it answers, and when it is told to it sends another answer that nobody asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/"
        self.forge = threading.Event()

    def run(self) -> None:
        first, _ = self.listening.accept()
        with first:
            first.recv(65536)
            first.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            self.forge.wait(10)
            first.sendall(b"HTTP/1.1 202 Forged\r\ncontent-length: 0\r\n\r\n")
            second, _ = self.listening.accept()
            with second:
                second.recv(65536)
                second.sendall(b"HTTP/1.1 201 True\r\ncontent-length: 0\r\n\r\n")


async def test_what_the_kernel_holds_before_a_request_is_no_answer_to_it() -> None:
    receiver = Forger()
    receiver.start()
    async with transporting() as transport:
        assert status(await transport.send(request(receiver.url))) == 200
        [pool] = transport._pools._pools.values()
        [kept] = pool.connections.idle
        receiver.forge.set()
        # The loop does not run meanwhile: it cannot have seen what is there.
        assert select.select([kept.transport.get_extra_info("socket").fileno()], [], [], 10)[0]
        assert status(await transport.send(request(receiver.url))) == 201
    receiver.join(10)
    receiver.listening.close()


async def test_a_body_is_not_read_beyond_the_cap_to_keep_its_connection() -> None:
    long = b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + b"x" * 200_000
    async with receiving(answers(long)) as receiver, transporting() as transport:
        for _ in range(2):
            answer = await transport.send(request(receiver.url()))
            assert isinstance(answer, Response)
            assert (len(answer.body), answer.truncated) == (16 * 1024, True)
        assert receiver.connections == 2


async def test_endless_interim_answers_are_not_listened_to_until_the_deadline() -> None:
    async def pours(peer: Peer) -> None:
        await peer.request()
        while True:
            await peer.say(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2000)

    async with receiving(pours) as receiver, transporting() as transport:
        begin = time.thread_time()
        assert code(await transport.send(request(receiver.url(), total_timeout=1.0))) == "timeout"
        assert time.thread_time() - begin < 0.5  # of the processor; listening takes all of the second


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


async def test_a_small_request_does_not_wait_for_the_receivers_acknowledgement() -> None:
    async with Inbox() as inbox:
        port = int(inbox.url.rsplit(":", 1)[1].split("/")[0])
        dialler = Dialler(NetworkPolicy.development(), None)
        reached = await dialler.connect(Target("127.0.0.1", port, 3.0, 5.0))
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=reached.socket)
        there = transport.get_extra_info("socket")
        assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.close()
        dialler.close()


@pytest.mark.parametrize(("each", "most"), [(math.inf, HANDSHAKES_AT_ONCE), (1e-9, 7)], ids=["quick", "slow"])
async def test_tls_handshakes_begin_a_few_in_each_turn_of_the_loop_in_order_and_more_where_turns_are_slow(
    each: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hookwright.transport._dial.HANDSHAKE_EACH", each)
    handshakes, begun, turns = Handshakes(), [], 0
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(count)

    async def begin(number: int) -> None:
        await handshakes.turn()
        begun.append((number, turns))

    async with asyncio.timeout(5):
        tasks = [loop.create_task(begin(number)) for number in range(10)]
        count()
        await asyncio.sleep(0)
        tasks[3].cancel()  # given up while it waited
        await asyncio.wait(tasks)
    assert [number for number, _ in begun] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert max(Counter(turn for _, turn in begun).values()) == most


def test_handshakes_that_a_loop_left_undone_keep_none_of_the_next_one() -> None:
    handshakes = Handshakes()

    async def leave_one_waiting() -> None:
        for _ in range(HANDSHAKES_AT_ONCE):
            await handshakes.turn()
        waiting = handshakes.turn()
        waiting.send(None)
        waiting.close()

    async def begin() -> None:
        async with asyncio.timeout(5):
            for _ in range(HANDSHAKES_AT_ONCE + 1):
                await handshakes.turn()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_one_waiting())
    loop.close()
    asyncio.run(begin())


async def test_a_kept_connection_keeps_each_request_to_its_own_timeout() -> None:
    loop = asyncio.get_running_loop()
    first_ends, later = 0.0, asyncio.Event()

    async def thrice(peer: Peer) -> None:
        await peer.request()
        await peer.say(GOOD)
        await peer.request()
        await asyncio.sleep(first_ends - loop.time() + 0.05)  # beyond what the first request was given
        await peer.say(GOOD)
        await peer.request()
        await later.wait()

    async with receiving(thrice) as receiver, transporting() as transport, asyncio.timeout(20):
        first_ends = loop.time() + 0.5
        assert status(await transport.send(request(receiver.url(), total_timeout=0.5))) == 200
        assert status(await transport.send(request(receiver.url(), total_timeout=30.0))) == 200
        begun = loop.time()
        assert code(await transport.send(request(receiver.url(), total_timeout=0.1))) == "timeout"
        assert loop.time() - begun < 10  # and not the thirty seconds of the one before
        assert receiver.connections == 1
        later.set()
