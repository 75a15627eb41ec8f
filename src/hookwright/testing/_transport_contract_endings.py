"""The transport contract: how an attempt ends when the receiver hangs, breaks off, drips or answers oddly."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from hookwright.testing._transport_contract_base import (
    OK_HEAD,
    ContractBase,
    Peer,
    Row,
    Said,
    answers,
    deaf,
    row,
    says,
    says_and_closes,
)

if TYPE_CHECKING:
    from hookwright.testing._transport_contract_base import Answer

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
_EMPTY = b"content-length: 0\r\n\r\n"


async def _ignores(peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a write transport in name only
    await peer.receiver.turned.wait()
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await peer.gone()


async def _resets(peer: Peer) -> None:
    peer.reset()


async def _resets_after_reading(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def _hangs_up(peer: Peer) -> None:
    peer.writer.close()


def _drips(head: bytes, drop: bytes) -> Answer:
    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.say(head)
        while True:
            await peer.say(drop)
            await asyncio.sleep(0.05)

    return answer


async def _reads_slowly(peer: Peer) -> None:
    while not peer.receiver.turned.is_set():
        await peer.reader.read(1)
        with suppress(TimeoutError):
            await asyncio.wait_for(peer.receiver.turned.wait(), 1)
    await peer.gone()


async def _works_and_hangs(peer: Peer) -> None:
    await peer.request()
    await asyncio.sleep(0.1)
    await peer.gone()


async def _answers_late(peer: Peer) -> None:
    await peer.request()
    await asyncio.sleep(0.5)
    await peer.say(OK_HEAD + b"content-length: 4\r\n\r\nlate")


ENDINGS = [
    row("never reads", _ignores, "timeout", closes=False, total_timeout=0.4),
    row("never answers", deaf, "timeout", total_timeout=0.4),
    row("does the work, then hangs", _works_and_hangs, "timeout", total_timeout=0.4),
    row("answers just before the timeout", _answers_late, Said(200, b"late"), closes=False, total_timeout=0.9),
    row("resets at once", _resets, "connect_error", "protocol_error"),
    row("resets after it read the request", _resets_after_reading, "connect_error"),
    row("hangs up unasked", _hangs_up, "protocol_error", "connect_error"),
    row("closes at once", says_and_closes(), "protocol_error"),
    row("closes within the status line", says_and_closes(b"HTTP/1.1 20"), "protocol_error"),
    row("closes within the headers", says_and_closes(OK_HEAD + b"a: b\r\n"), "protocol_error"),
    row(
        "closes after the headers",
        says_and_closes(OK_HEAD + b"content-length: 9\r\n\r\n"),
        Said(200, b"", truncated=True),
    ),
    row(
        "closes within a chunk",
        says_and_closes(OK_HEAD + b"transfer-encoding: chunked\r\n\r\n9\r\nab"),
        Said(200, None, truncated=True),
    ),
    row("drips the status line", _drips(b"", b"H"), "timeout", "protocol_error", total_timeout=0.4),
    row("drips headers", _drips(OK_HEAD, b"a: b\r\n"), "timeout", total_timeout=0.4),
    row("drips one endless header", _drips(OK_HEAD + b"a: ", b"b"), "timeout", total_timeout=0.4),
    row(
        "drips the body",
        _drips(OK_HEAD + b"content-length: 999\r\n\r\n", b"x"),
        Said(200, None, truncated=True),
        total_timeout=0.4,
    ),
    row(
        "drips an endless chunked body",
        _drips(OK_HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        Said(200, None, truncated=True),
        total_timeout=0.4,
    ),
    row(
        "drips interim answers",
        _drips(b"", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n"),
        "timeout",
        total_timeout=0.4,
    ),
    row("reads one byte a second", _reads_slowly, "timeout", closes=False, total_timeout=0.4, body=b"x" * 2_000_000),
]

_BOMB = gzip.compress(b"\0" * 10_000_000)
_TWICE = gzip.compress(_BOMB)
_UGLY = b'<script>alert(1)</script>\x1b[2J\x00\xff{"token":"s3cret-token"}\r\n'
_MANY_COOKIES = b"".join(b"set-cookie: c%d=%d; path=/\r\n" % (number, number) for number in range(1000))


def _encoded(encoding: bytes, body: bytes) -> bytes:
    return OK_HEAD + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n%b" % (encoding, len(body), body)


def _status(status: bytes, rest: bytes = _EMPTY) -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + rest


ANSWERS = [
    row("a gzip bomb", answers(_encoded(b"gzip", _BOMB)), Said(200, _BOMB[:16384]), closes=False),
    row("a gzip bomb in gzip", answers(_encoded(b"gzip, gzip", _TWICE)), Said(200, _TWICE), closes=False),
    row("invalid gzip", answers(_encoded(b"gzip", b"nope")), Said(200, b"nope"), closes=False),
    row("secrets, HTML and escapes", answers(_encoded(b"identity", _UGLY)), Said(200, _UGLY), closes=False),
    row("204", answers(_status(b"204 No Content", b"\r\n")), Said(204, b""), closes=False),
    row("204 with a length", answers(_status(b"204 X", b"content-length: 9\r\n\r\n")), Said(204, b""), closes=False),
    row("304", answers(_status(b"304 Not Modified", b"\r\n")), Said(304, b""), closes=False),
    row("304 with a length", answers(_status(b"304 X", b"content-length: 9\r\n\r\n")), Said(304, b""), closes=False),
    row("410", answers(_status(b"410 Gone")), Said(410, b""), closes=False),
    row("500", answers(_status(b"500 Oh", b"content-length: 2\r\n\r\nno")), Said(500, b"no"), closes=False),
    row("599", answers(_status(b"599 Oh")), Said(599), closes=False),
    row("no reason", answers(_status(b"200 ")), Said(200), closes=False),
    row("101", says(_status(b"101 Switching", b"connection: upgrade\r\nupgrade: x\r\n\r\n")), "protocol_error"),
    row("199 alone", says(_status(b"199 X")), "timeout", "protocol_error", total_timeout=0.4),
    row("status 600", says(_status(b"600 X")), "protocol_error"),
    row("status 999", says(_status(b"999 X")), "protocol_error"),
    row("status 000", says(_status(b"000 X")), "protocol_error", "timeout", total_timeout=0.4),
    row("status of letters", says(_status(b"abc X")), "protocol_error"),
    row("status of four digits", says(_status(b"2000 X")), "protocol_error"),
    row("status of two digits", says(_status(b"20 X")), "protocol_error"),
    row("status below zero", says(_status(b"-200 X")), "protocol_error"),
    row("100, 102 and 103 before", answers(*[_status(each, b"\r\n") for each in (b"100 C", b"102 P", b"103 E")],
        _status(b"200 K")), Said(200), closes=False),
    *[
        row(f"{status} redirect", answers(_status(b"%d X" % status, b"location: %b\r\n" % target + _EMPTY)),
            Said(status), closes=False)
        for status, target in [
            (301, b"/hook"),
            (302, b"http://169.254.169.254/"),
            (303, b"http://127.0.0.1:1/"),
            (307, b"http://169.254.169.254/"),
            (308, b"//hooks.example/"),
        ]
    ],
]  # fmt: skip


class EndingContract(ContractBase):
    """Whatever the receiver does: the attempt ends in time, as a value, and leaves nothing behind."""

    @pytest.mark.parametrize("case", ENDINGS, ids=str)
    @SCHEMES
    async def test_a_receiver_that_hangs_or_breaks_off(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("case", ANSWERS, ids=str)
    @SCHEMES
    async def test_a_receiver_that_answers(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("status", [204, 304])
    @SCHEMES
    async def test_a_body_that_must_not_be_is_nobodys_answer(self, status: int, scheme: str) -> None:
        forged = b"HTTP/1.1 %d X\r\n\r\nHTTP/1.1 299 Forged\r\ncontent-length: 0\r\n\r\n" % status
        async with self.facing(says(forged), scheme) as encounter:
            answer = await encounter.succeeds()
            assert (answer.status, answer.body) == (status, b"")
            await encounter.receiver.saw_one_close()
            await encounter.assert_usable()

    async def test_header_values_that_are_no_ascii_are_replaced_and_not_refused(self) -> None:
        head = OK_HEAD + b"x-latin: caf\xe9\r\nx-rubbish: \xff\xfe\r\nx-utf: \xc3\xa9\r\n" + _EMPTY
        async with self.facing(answers(head)) as encounter:
            headers = {name.lower(): value for name, value in (await encounter.succeeds()).headers}
            assert headers["x-utf"] == "\u00e9"
            assert headers["x-latin"] == "caf\ufffd"
            assert headers["x-rubbish"] == "\ufffd\ufffd"
            await encounter.assert_usable()

    async def test_cookies_are_not_sent_back(self) -> None:
        async with self.facing(answers(OK_HEAD + _MANY_COOKIES + _EMPTY)) as encounter:
            answer = await encounter.succeeds()
            assert (answer.status, len(answer.headers)) == (200, 1001)
            await encounter.assert_usable()
            assert len(encounter.receiver.requests) == 2
            assert not any(b"cookie:" in each.lower() for each in encounter.receiver.requests)
