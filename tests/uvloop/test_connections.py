"""What uvloop's transports do otherwise: they read before `create_connection` returns, and take nothing once closed."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import pytest

from hookwright import DirectTransport, Failure, HttpxTransport, NetworkPolicy, Request, Response
from hookwright.testing import Inbox
from hookwright.testing._transport_contract_base import (
    HOST,
    OPEN,
    deaf,
    good,
    loopback,
    quietly,
    receiving,
    serving,
    tells_nothing,
    trusting,
)
from hookwright.transport import _pinned, direct
from hookwright.transport._connection import BUFFER, Connection
from hookwright.transport._dial import DialFailed, Dialled, Dialler, Reached, Target, TLSFailed, attach, secure
from hookwright.transport._pinned import _Stream
from tests.conftest import until
from tests.transport.answers import code

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from hookwright import Transport

KINDS = pytest.mark.parametrize("kind", [DirectTransport, HttpxTransport])
SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])


class Kind(Protocol):
    """A transport of ours."""

    def __call__(self, **options: Any) -> Transport: ...


def request(url: str, **changes: Any) -> Request:
    usual = Request(url, (("x-test", "1"),), b"{}", endpoint_id="ep_1", revision=1, total_timeout=5.0)
    return usual._replace(**changes)


def transport_of(kind: Kind, network: NetworkPolicy = OPEN) -> Transport:
    return kind(network=network, ssl_context=trusting(), resolver=loopback)


# -- before `create_connection` returns ----------------------------------------------------------------------------


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def connection_of(kind: str, reached: Reached) -> Dialled:
    if kind == "direct":
        return Connection(direct._parser_class(), bytearray(BUFFER))
    return _Stream(reached)


async def dialled() -> tuple[Reached, socket.socket]:
    """Return both sides of a connection."""
    with listening() as listener:
        reached = await Dialler(OPEN, None).connect(Target("127.0.0.1", listener.getsockname()[1], 1.0, 1.0))
        return reached, listener.accept()[0]


async def attached(kind: str, says: Callable[[socket.socket], object]) -> tuple[Dialled, Reached]:
    """Return a connection whose other side has spoken before it was attached, and is gone."""
    reached, there = await dialled()
    with there:
        says(there)
        return await attach(partial(connection_of, kind, reached), reached), reached


def resets(there: socket.socket) -> None:
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("kind", ["direct", "pooled"])
@pytest.mark.parametrize("size", [1, 200_000])
async def test_what_comes_before_the_handshake_is_a_tls_error(kind: str, size: int) -> None:
    connection, reached = await attached(kind, lambda there: there.send(b"x" * size))
    await until(lambda: connection.has_received)
    with pytest.raises(TLSFailed, match="plain text before"):
        await secure(connection, trusting(), HOST, reached)
    assert connection.transport.is_closing()


@pytest.mark.parametrize("kind", ["direct", "pooled"])
@pytest.mark.parametrize("ends", [resets, socket.socket.close], ids=["reset", "closed"])
async def test_an_end_before_the_handshake_is_no_connection(kind: str, ends: Callable[[socket.socket], object]) -> None:
    connection, reached = await attached(kind, ends)
    await until(connection.transport.is_closing)
    with pytest.raises(DialFailed) as raised:
        await secure(connection, trusting(), HOST, reached)
    assert raised.value.code == "connect_error"
    assert str(raised.value) == "the connection broke during the TLS handshake"


async def test_a_reset_before_the_request_is_told_as_one() -> None:
    connection, _ = await attached("direct", resets)
    assert isinstance(connection, Connection)
    await until(connection.transport.is_closing)
    await asyncio.sleep(0)
    answer = await connection.post(b"POST / HTTP/1.1\r\n\r\n", asyncio.get_running_loop().time() + 1)
    assert answer == Failure("connect_error", "the connection broke")


# -- once closed -----------------------------------------------------------------------------------------------------


async def test_a_reset_that_the_second_piece_of_a_request_meets_is_no_connection() -> None:
    reached, there = await dialled()
    connection = await attach(partial(Connection, direct._parser_class(), bytearray(BUFFER)), reached)
    resets(there)
    there.close()
    answer = await connection.post(b"x" * 4_000_000, asyncio.get_running_loop().time() + 1)
    assert answer == Failure("connect_error", "the connection broke")


@KINDS
@SCHEMES
async def test_a_receiver_that_resets_amid_a_large_request_is_no_connection(kind: Kind, scheme: str) -> None:
    async def resets_amid(peer: Any) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    async with receiving(resets_amid, serving() if scheme == "https" else None) as receiver:
        transport = transport_of(kind)
        for _ in range(10):
            sent = request(receiver.url(), body=b"x" * 4_000_000)
            answer = await transport.send(sent)
            assert code(answer) == "connect_error"
            tells_nothing(answer, sent, receiver)
        await transport.aclose()


async def test_an_inbox_whose_sender_has_gone_complains_to_nobody() -> None:
    async with Inbox() as inbox:
        gone, writers = asyncio.Event(), inbox._connections

        async def late(received: object) -> int:
            await gone.wait()
            return 200

        inbox.respond_with(late)
        with socket.create_connection(("127.0.0.1", urlsplit(inbox.url).port)) as sender:
            sender.send(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
            await inbox.wait_for(1)
            resets(sender)
        await until(lambda: all(writer.is_closing() for writer in writers))
        gone.set()
        await until(lambda: not writers)
    gc.collect()  # what a task raised is told when nobody has it any more


# -- what must not depend on the loop --------------------------------------------------------------------------------


@KINDS
@SCHEMES
async def test_a_small_request_does_not_wait_for_the_receivers_acknowledgement(
    kind: Kind, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Dialled] = []

    async def noting(factory: Callable[[], Any], reached: Reached) -> Any:
        made.append(await attach(factory, reached))
        return made[-1]

    monkeypatch.setattr(direct, "attach", noting)
    monkeypatch.setattr(_pinned, "attach", noting)
    async with receiving(good, serving() if scheme == "https" else None) as receiver:
        transport = transport_of(kind)
        assert isinstance(await transport.send(request(receiver.url())), Response)
        [connection] = made
        there = connection.transport.get_extra_info("socket")
        assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await transport.aclose()


@KINDS
async def test_nobody_listening_is_a_connect_error_and_an_inner_address_is_blocked(kind: Kind) -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
    refused = transport_of(kind)
    assert code(await refused.send(request(f"http://127.0.0.1:{port}/"))) == "connect_error"
    await refused.aclose()
    strict = transport_of(kind, NetworkPolicy(allow_http=True))
    for host in ("127.0.0.1", "[::1]", "169.254.169.254", HOST):  # the last one's address is this machine's
        assert code(await strict.send(request(f"http://{host}/"))) == "blocked_target"
    await strict.aclose()


async def come_and_go(kind: Kind, tls: ssl.SSLContext | None) -> None:
    async with receiving(good, tls) as receiver, receiving(deaf, tls) as silent:
        transport = transport_of(kind)
        together = [transport.send(request(receiver.url(), connections=4)) for _ in range(20)]
        assert all(isinstance(answer, Response) for answer in await asyncio.gather(*together))
        hung = asyncio.create_task(transport.send(request(silent.url(), endpoint_id="ep_2")))
        await silent.arrived.get()
        await quietly(hung)
        await silent.saw_all_close()
        await transport.aclose()
        await receiver.saw_all_close()


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@KINDS
@SCHEMES
async def test_nothing_stays_open(kind: Kind, scheme: str) -> None:
    tls = serving() if scheme == "https" else None
    await come_and_go(kind, tls)  # the loop has descriptors of its own, once it has served
    before = descriptors()
    await come_and_go(kind, tls)
    await until(lambda: descriptors() == before)
