"""The transport contract: connecting and TLS."""

from __future__ import annotations

import asyncio
import datetime
import functools
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from hookwright._certificate import ClientCertificate
from hookwright.testing._transport_contract_base import (
    GOOD,
    HOST,
    ContractBase,
    authority,
    good,
    row,
    serving,
    serving_tls_1_1,
    serving_unknown,
)
from hookwright.transport._base import Failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookwright.testing._transport_contract_base import Encounter, Peer, Row

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])


async def _stalls(peer: Peer) -> None:
    await peer.gone()


async def _drips(peer: Peer) -> None:
    record = b"\x16\x03\x03\x20\x00" + b"\x02\x00\x1f\xfc\x03\x03" + b"\x00" * 8000
    await peer.reader.read(1)
    for position in range(len(record)):
        await peer.say(record[position : position + 1])
        await asyncio.sleep(0.05)


async def _hangs_up(peer: Peer) -> None:
    await peer.reader.read(1)
    peer.writer.close()


async def _resets(peer: Peer) -> None:
    await peer.reader.read(1)
    peer.reset()


async def _answers_plainly(peer: Peer) -> None:
    await peer.reader.read(1)
    await peer.say(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    await peer.gone()


async def _answers_unasked(peer: Peer) -> None:
    await peer.say(GOOD)
    await peer.gone()


async def _answers_rubbish(peer: Peer) -> None:
    await peer.say(b"\x00\xff" * 5000)
    await peer.gone()


async def _speaks_tls_1_1(peer: Peer) -> None:
    # By hand: asyncio's own server hangs up without the alert that tells why.
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = serving_tls_1_1().wrap_bio(incoming, outgoing, server_side=True)
    while True:
        incoming.write(await peer.reader.read(65536))
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await peer.say(outgoing.read())
        except ssl.SSLError:
            await peer.say(outgoing.read())
            await peer.gone()
            return


HANDSHAKES = [
    row("stalled", _stalls, "connect_timeout", bare=True, connect_timeout=0.3, total_timeout=1.0, within=0.8),
    row("stalled, deadline first", _stalls, "timeout", bare=True, connect_timeout=3.0, total_timeout=0.3),
    row("dripped", _drips, "connect_timeout", bare=True, connect_timeout=0.3, total_timeout=1.0, within=0.8),
    row("hung up", _hangs_up, "connect_error", "tls_error", bare=True),
    row("reset", _resets, "connect_error", bare=True),
    row("plain text", _answers_plainly, "tls_error", bare=True),
    row("plain text, unasked", _answers_unasked, "tls_error", bare=True),
    row("rubbish", _answers_rubbish, "tls_error", bare=True),
]


def _expired() -> ssl.SSLContext:
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    return serving(HOST, not_before=now - 2 * day, not_after=now - day)


@asynccontextmanager
async def _full() -> AsyncIterator[int]:
    """A port that nobody answers at: the queue of connections that wait to be accepted is full."""
    listening = socket.socket()
    waiting = []
    try:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(8):
            one = socket.socket()
            one.setblocking(False)
            waiting.append(one)
            one.connect_ex(listening.getsockname())
        try:
            async with asyncio.timeout(0.05):
                one = socket.socket()
                one.setblocking(False)
                waiting.append(one)
                await asyncio.get_running_loop().sock_connect(one, listening.getsockname())
            pytest.skip("this system completes handshakes that nobody accepts")
        except TimeoutError:
            pass
        yield listening.getsockname()[1]
    finally:
        for each in (*waiting, listening):
            each.close()


@functools.cache
def _sender() -> ClientCertificate:
    issued = authority().issue_cert("sender@hooks.example")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return ClientCertificate(chain.decode(), issued.private_key_pem.bytes().decode())


class TLSContract(ContractBase):
    """A connection is made in time and to whom it is meant for, or not at all."""

    @pytest.mark.parametrize("case", HANDSHAKES, ids=str)
    async def test_a_handshake_that_fails(self, case: Row) -> None:
        await self.judge(case, "https")

    @pytest.mark.parametrize(
        ("context", "cause"),
        [
            (lambda: serving("other.example"), ("host", "name", "match")),
            (_expired, ("expired",)),
        ],
        ids=["wrong host", "expired"],
    )
    async def test_a_receiver_that_cannot_be_trusted(
        self, context: Callable[[], ssl.SSLContext], cause: tuple[str, ...]
    ) -> None:
        async with self.facing(good, "https", context=context()) as encounter:
            await self._refused(encounter, *cause)

    async def test_a_receiver_whose_tls_is_too_old(self) -> None:
        async with self.facing(_speaks_tls_1_1, "https", bare=True) as encounter:
            await self._refused(encounter, "version", "protocol")
            await encounter.assert_usable()

    async def test_a_certificate_that_nobody_vouches_for(self) -> None:
        async with self.facing(good, "https", context=serving_unknown()) as encounter:
            await self._refused(encounter, "self-signed", "self signed", "verify", "issuer")

    async def _refused(self, encounter: Encounter, *cause: str) -> None:
        failure = await encounter.fails("tls_error")
        assert any(word in failure.detail.lower() for word in cause), failure
        assert "other.example" not in failure.detail
        assert encounter.receiver.requests == []
        await encounter.receiver.saw_one_close()
        other = encounter.request(url=encounter.other.url(), endpoint_id="ep_other")
        assert not isinstance(await encounter.transport.send(other), Failure)

    async def test_the_name_is_kept_for_tls(self) -> None:
        names: list[str | None] = []
        context = serving(HOST, common_name="sni")  # one of its own: the others are shared
        context.sni_callback = lambda _socket, name, _context: names.append(name)
        async with self.facing(good, "https", context=context) as encounter:
            for _ in range(2):
                await encounter.succeeds()
            assert names == [HOST]

    @SCHEMES
    async def test_a_client_certificate_is_shown_or_nothing_is_sent(self, scheme: str) -> None:
        shown: list[object] = []

        async def asks(peer: Peer) -> None:
            shown.append(peer.writer.get_extra_info("peercert"))
            await good(peer)

        context = serving(HOST, common_name="asks")
        authority().configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        async with self.facing(asks, scheme, context=context if scheme == "https" else None) as encounter:
            await encounter.succeeds()  # a connection is kept on which nothing was shown
            answer = await encounter.send(client_certificate=_sender())
            if isinstance(answer, Failure):
                assert answer.code == "auth_error", answer
                assert len(encounter.receiver.requests) == 1
            else:
                assert scheme == "https", "it was sent without"
                assert [bool(certificate) for certificate in shown] == [False, True]

    @SCHEMES
    async def test_a_receiver_that_never_completes_the_connection_is_a_connect_timeout(self, scheme: str) -> None:
        async with _full() as port, self.facing(good, scheme) as encounter:
            url = f"{scheme}://{HOST}:{port}/hook"
            failure = await encounter.fails(
                "connect_timeout", url=url, connect_timeout=0.3, total_timeout=1.0, within=0.8
            )
            assert str(port) not in failure.detail
            await encounter.fails("timeout", url=url, connect_timeout=3.0, total_timeout=0.3)
            await encounter.assert_usable()

    @SCHEMES
    async def test_a_receiver_that_refuses_is_a_connect_error(self, scheme: str) -> None:
        async with self.facing(good, scheme) as encounter:
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets this port
                port = nobody.getsockname()[1]
                failure = await encounter.fails("connect_error", url=f"{scheme}://{HOST}:{port}/hook")
            assert str(port) not in failure.detail
            await encounter.assert_usable()
