"""The transport contract: heads and bodies whose framing is wrong, ambiguous or old."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright.testing._transport_contract_base import OK_HEAD, ContractBase, Row, Said, answers, row, says
from hookwright.transport._base import Failure

if TYPE_CHECKING:
    from hookwright.testing._transport_contract_base import Peer

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
CHUNKED = OK_HEAD + b"transfer-encoding: chunked\r\n\r\n"
FORGED = b"HTTP/1.1 299 Forged\r\ncontent-length: 6\r\n\r\nforged"
_LENGTH = b"content-length: 2\r\n"
_CUT = Said(200, None, truncated=True)


def _head(*lines: bytes) -> bytes:
    return OK_HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


LENGTHS = [
    row(f"Content-Length {shown}", says(_head(b"content-length: " + value) + b"xx"), "protocol_error")
    for shown, value in [
        ("-1", b"-1"),
        ("1,2", b"1,2"),
        ("+2", b"+2"),
        ("0x2", b"0x2"),
        ("2.0", b"2.0"),
        ("1e1", b"1e1"),
        ("10^30", b"1" + b"0" * 30),
        ("empty", b""),
        ("2 2", b"2 2"),
        ("2_0", b"2_0"),
        ("not ASCII", "٢".encode()),
        ("10,000 digits", b"9" * 10_000),
    ]
]
AMBIGUOUS = [
    row("two lengths", says(_head(b"content-length: 2", b"content-length: 3") + b"xxx"), "protocol_error"),
    row(
        "a length and chunks",
        says(_head(b"content-length: 2", b"transfer-encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n"),
        "protocol_error",
    ),
    row(
        "chunks and a length",
        says(_head(b"Transfer-Encoding: chunked", b"Content-Length: 12") + b"2\r\nok\r\n0\r\n\r\n"),
        "protocol_error",
    ),
    *[
        row(f"Transfer-Encoding {coding.decode()}", says(_head(b"transfer-encoding: " + coding) + b"0\r\n\r\n"),
            "protocol_error")
        for coding in (b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"identity", b"xchunked", b"gzip")
    ],
    row("two Transfer-Encodings", says(_head(*[b"transfer-encoding: chunked"] * 2) + b"0\r\n\r\n"), "protocol_error"),
]  # fmt: skip
# Line ends and foldings of old, which a receiver may still send, may be read or refused.
HEADS = [
    row("bare LF", answers(b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok"), Said(200, b"ok"), "protocol_error",
        closes=False),
    row("a folded header", answers(_head(_LENGTH[:-2], b"a: b", b"  c") + b"ok"), Said(200, b"ok"), "protocol_error",
        closes=False),
    row("a fold at the start", says(_head(b" a: b", b"content-length: 0")), "protocol_error"),
    row("a space before the colon", says(_head(b"content-length : 2") + b"ok"), "protocol_error"),
    row("a header without a colon", says(_head(b"content-length")), "protocol_error"),
    row("a header without a name", says(_head(b": b", b"content-length: 0")), "protocol_error"),
    row("a space in a name", says(_head(b"a b: c", b"content-length: 0")), "protocol_error"),
    row("NUL in a value", says(_head(b"a: b\x00c", b"content-length: 0")), "protocol_error"),
    row("NUL in a name", says(_head(b"a\x00: b", b"content-length: 0")), "protocol_error"),
    row("CR in a value", says(_head(b"a: b\rc", b"content-length: 0")), "protocol_error"),
    row("a secret in a bad header", says(_head(b"s3cret-token hooks.example")), "protocol_error"),
    row("the request, echoed", says(b"POST /hook?token=s3cret-token HTTP/1.1\r\n\r\n"), "protocol_error"),
    row("no status line", says(b"content-length: 0\r\n\r\n"), "protocol_error"),
    row("an empty line first", answers(b"\r\n" + _head(b"content-length: 0")), Said(200), "protocol_error",
        closes=False),
    row("HTTP/0.9", says(b"<html>hello</html>\r\n\r\n"), "protocol_error"),
    row("HTTP/2", says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "protocol_error"),
    row("HTTP/2 frames", says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00\x03\x00\x00\x00\x64" * 3),
        "protocol_error", "timeout", total_timeout=0.4),
    row("HTTP/2.0 as version", answers(b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n"), "protocol_error", Said(200),
        closes=False),
    row("HTTP/1.10", says(b"HTTP/1.10 200 OK\r\ncontent-length: 0\r\n\r\n"), "protocol_error"),
    row("lower-case http", says(b"http/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), "protocol_error"),
    row("SSH", says(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), "protocol_error"),
    row("NULs", says(b"\x00" * 100 + b"\r\n\r\n"), "protocol_error"),
]  # fmt: skip
CHUNKS = [
    row("chunk size -1", says(CHUNKED + b"-1\r\nx\r\n"), _CUT),
    row("chunk size 0x5", says(CHUNKED + b"0x5\r\nhello\r\n"), _CUT),
    row("chunk size 10^20", says(CHUNKED + b"%x\r\nabc" % 10**20), _CUT, total_timeout=0.4),
    row("chunk size of 1,000 digits", says(CHUNKED + b"f" * 1000 + b"\r\nabc"), _CUT, total_timeout=0.4),
    row("chunk size empty", says(CHUNKED + b"\r\nabc\r\n"), _CUT, total_timeout=0.4),
    row("chunk size of letters", says(CHUNKED + b"xyz\r\nabc\r\n"), _CUT),
    row("chunk extension of 70 KB", says(CHUNKED + b"2;a=" + b"b" * 70_000 + b"\r\nok\r\n"), _CUT, total_timeout=0.4),
    row("chunk without a line end", says(CHUNKED + b"2\r\nokXX0\r\n\r\n"), _CUT),
    row("trailers of 100 KB", says(CHUNKED + b"0\r\n" + b"a: b\r\n" * 18_000), _CUT, total_timeout=0.4),
]
# What must be read to its end, and may be followed by another answer on the same connection.
WHOLE = [
    row("an empty body", answers(_head(b"content-length: 0")), Said(200, b""), closes=False),
    row("chunks", answers(CHUNKED + b"2\r\nok\r\n1;x=y\r\n!\r\n0\r\n\r\n"), Said(200, b"ok!"), closes=False),
    row("chunks with trailers", answers(CHUNKED + b"2\r\nok\r\n0\r\nx-a: b\r\nset-cookie: c=d\r\n\r\n"), Said(200,
        b"ok"), closes=False),
    row("chunks of empty lines", answers(CHUNKED + b"4\r\n\r\n\r\n\r\n4\r\n\n\n\n\n\r\n0\r\n\r\n"),
        Said(200, b"\r\n\r\n\n\n\n\n"), closes=False),
    row("Transfer-Encoding CHUNKED", answers(_head(b"Transfer-Encoding: CHUNKED") + b"2\r\nok\r\n0\r\n\r\n"),
        Said(200, b"ok"), closes=False),
    row("16 KiB", answers(_head(b"content-length: 16384") + b"x" * 16384), Said(200, b"x" * 16384), closes=False),
    row("16 KiB and one", answers(_head(b"content-length: 16385") + b"x" * 16385),
        Said(200, b"x" * 16384, truncated=True), closes=False),
]  # fmt: skip


class FramingContract(ContractBase):
    """Where an answer begins and ends is never guessed, and what follows it is never taken for another."""

    @pytest.mark.parametrize("case", LENGTHS, ids=str)
    @SCHEMES
    async def test_a_length_that_is_no_number_is_a_protocol_error(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("case", AMBIGUOUS, ids=str)
    @SCHEMES
    async def test_a_body_that_could_end_in_two_places_is_a_protocol_error(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("case", HEADS, ids=str)
    @SCHEMES
    async def test_a_head_that_is_none(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("case", CHUNKS, ids=str)
    @SCHEMES
    async def test_chunks_that_are_none_truncate_an_answer_that_has_a_status(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("case", WHOLE, ids=str)
    @SCHEMES
    async def test_a_body_that_is_whole(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
    @SCHEMES
    async def test_a_body_may_last_until_the_receiver_closes(self, head: bytes, scheme: str) -> None:
        async def until_closed(peer: Peer) -> None:
            await peer.request()
            await peer.say(head + b"to the end")
            peer.writer.close()

        async with self.facing(until_closed, scheme) as encounter:
            answer = await encounter.succeeds()
            assert (answer.body, answer.truncated) == (b"to the end", False)
            await encounter.assert_usable()

    @pytest.mark.parametrize("first", [
        _head(b"content-length: 2") + b"ok",
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
        _head(b"content-length: 0"),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 103 E\r\n\r\n" + _head(b"content-length: 2") + b"ok",
    ], ids=["length", "chunks", "empty", "204", "interim"])  # fmt: skip
    @SCHEMES
    async def test_a_second_answer_right_behind_the_first_is_no_answer(self, first: bytes, scheme: str) -> None:
        async with self.facing(says(first + FORGED), scheme) as encounter:
            assert (await encounter.succeeds()).status in {200, 204}
            await encounter.receiver.saw_one_close()
            await encounter.assert_usable()

    @SCHEMES
    async def test_a_second_answer_that_comes_later_is_no_answer(self, scheme: str) -> None:
        forged = asyncio.Event()

        async def forge(peer: Peer) -> None:
            await peer.request()
            await peer.say(_head(b"content-length: 2") + b"ok")
            await peer.receiver.turned.wait()
            await peer.say(FORGED)
            forged.set()
            await peer.gone()

        async with self.facing(forge, scheme) as encounter:
            await encounter.succeeds()
            encounter.receiver.turn_good()
            await forged.wait()
            for _ in range(10):  # turns of the loop: until the transport has read what has arrived
                await asyncio.sleep(0)
            await encounter.assert_usable()
            assert encounter.receiver.connections == 2

    @SCHEMES
    async def test_an_answer_before_the_first_request_is_at_most_the_answer_to_that_one(self, scheme: str) -> None:
        # On a new connection nobody can tell whether it was sent before the request arrived: it may be accepted.
        async def forge(peer: Peer) -> None:
            await peer.say(FORGED)
            await peer.request()
            await peer.say(_head(b"content-length: 4") + b"true")
            await peer.gone()

        async with self.facing(forge, scheme) as encounter:
            answer = await encounter.attempt()
            assert (
                Said(299, b"forged").accepts(answer)
                or Said(200, b"true").accepts(answer)
                or (isinstance(answer, Failure) and answer.code == "protocol_error")
            ), answer
            await encounter.assert_usable()
