"""The transport contract: more than anybody can read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright.testing._transport_contract_base import OK_HEAD, ContractBase, Row, Said, answers, row, says_and_closes
from hookwright.transport._base import RESPONSE_HEADERS, RESPONSE_KEPT

if TYPE_CHECKING:
    from hookwright.testing._transport_contract_base import Answer, Peer

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
CHUNKED = OK_HEAD + b"transfer-encoding: chunked\r\n\r\n"
_CUT = Said(200, b"x" * RESPONSE_KEPT, truncated=True)
_SOME = Said(200, None, truncated=True)
_LONG = 20.0


def _pours(head: bytes, piece: bytes, times: int | None = None) -> Answer:
    """Say the same for ever, or so often, as fast as it is taken."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.say(head)
        left = times
        while left is None or left > 0:
            await peer.say(piece)
            await asyncio.sleep(0)
            left = None if left is None else left - 1
        await peer.gone()

    return answer


def _interim(line: bytes) -> bytes:
    return (b"HTTP/1.1 " + line + b"\r\n\r\n") * 500


FLOODS = [
    row("endless chunks", _pours(CHUNKED, b"8000\r\n" + b"x" * 32768 + b"\r\n"), _CUT, within=5, total_timeout=_LONG),
    row("200 MB", _pours(OK_HEAD + b"content-length: 200000000\r\n\r\n", b"x" * 40_000, 5000), _CUT, within=5,
        total_timeout=_LONG),
    row("a body without end", _pours(OK_HEAD + b"\r\n", b"x" * 32768), _CUT, within=5, total_timeout=_LONG),
    row("chunks of one byte", _pours(CHUNKED, b"1\r\nx\r\n" * 5000), _SOME, total_timeout=0.5),
    row("chunks of an empty line", _pours(CHUNKED, b"4\r\n\r\n\r\n\r\n" * 3000), _SOME, total_timeout=0.5),
    row("endless chunk extension", _pours(CHUNKED + b"1;", b"x" * 32768), _SOME, total_timeout=0.5),
    row("endless trailers", _pours(CHUNKED + b"0\r\n", b"a: b\r\n" * 5000), _SOME, total_timeout=0.5),
    row("endless 100", _pours(b"", _interim(b"100 Continue")), "timeout", "protocol_error", total_timeout=0.5),
    row("endless 102", _pours(b"", _interim(b"102 Processing")), "timeout", "protocol_error", total_timeout=0.5),
    row("endless 103", _pours(b"", _interim(b"103 E\r\nlink: a")), "timeout", "protocol_error", total_timeout=0.5),
    row("endless headers", _pours(OK_HEAD, b"a: b\r\n" * 5000), "protocol_error", within=5, total_timeout=_LONG),
    row("an endless header", _pours(OK_HEAD + b"a: ", b"x" * 32768), "protocol_error", within=5, total_timeout=_LONG),
    row("an endless status line", _pours(b"HTTP/1.1 200 ", b"x" * 32768), "protocol_error", within=5,
        total_timeout=_LONG),
    row("endless empty lines", _pours(b"", b"\r\n" * 10_000), "protocol_error", "timeout", total_timeout=0.5),
    row("endless NULs", _pours(b"", b"\x00" * 32768), "protocol_error", within=5, total_timeout=_LONG),
    row("5,000 headers", _pours(OK_HEAD + b"x-header: 12345\r\n" * 5000 + b"content-length: 0\r\n\r\n", b"", 0),
        "protocol_error"),
    row("a header of 2 MB", _pours(OK_HEAD + b"a: ", b"x" * 20_000, 100), "protocol_error"),
    row("10 GB promised, then closed", says_and_closes(OK_HEAD + b"content-length: 10000000000\r\n\r\nabc"),
        Said(200, b"abc", truncated=True)),
]  # fmt: skip


def _headers_of(size: int) -> bytes:
    """Return a head whose header lines, as sent, are of so many bytes."""
    line = b"x-name: 123456\r\n"
    last = b"content-length: 0\r\n"
    count, rest = divmod(size - len(last), len(line))
    filler = line[:-2] + b"7" * rest + b"\r\n"
    return OK_HEAD + line * (count - 1) + filler + last + b"\r\n"


class FloodContract(ContractBase):
    """A flood is cut at a cap or at the deadline; it costs neither the loop's time nor memory."""

    @pytest.mark.parametrize("case", FLOODS, ids=str)
    @SCHEMES
    async def test_a_receiver_that_pours(self, case: Row, scheme: str) -> None:
        await self.judge(case, scheme)

    @pytest.mark.parametrize(("size", "accepted"), [(RESPONSE_HEADERS - 64, True), (RESPONSE_HEADERS + 64, False)])
    async def test_headers_are_accepted_up_to_the_cap(self, size: int, accepted: bool) -> None:
        async with self.facing(answers(_headers_of(size))) as encounter:
            if accepted:
                assert (await encounter.succeeds()).status == 200
            else:
                await encounter.fails("protocol_error")

    async def test_what_is_beyond_the_cap_is_not_read(self) -> None:
        taken = 0

        async def pour(peer: Peer) -> None:
            nonlocal taken
            await peer.request()
            await peer.say(OK_HEAD + b"content-length: 200000000\r\n\r\n")
            while True:
                await peer.say(b"x" * 32768)
                taken += 32768

        async with self.facing(pour) as encounter:
            await encounter.succeeds(total_timeout=_LONG, within=5)
            await encounter.receiver.saw_one_close()
            assert taken < 20_000_000  # what the sockets' buffers hold, and not what was offered

    async def test_a_flood_does_not_delay_others(self) -> None:
        async with self.facing(_pours(b"", _interim(b"103 E"))) as encounter:
            flooded = asyncio.create_task(encounter.send(total_timeout=3))
            await encounter.receiver.arrived.get()
            for number in range(5):
                request = encounter.request(url=encounter.other.url(), endpoint_id=f"ep_x{number}", total_timeout=2)
                answer = await encounter.transport.send(request)
                assert Said(200, b"good").accepts(answer), answer
            flooded.cancel()
            await asyncio.gather(flooded, return_exceptions=True)
