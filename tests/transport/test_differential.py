"""Both transports, the same thousand exchanges: what the receiver sees and what the attempt records are the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hookwright import DirectTransport, HttpxTransport, NetworkPolicy, Request, Response

if TYPE_CHECKING:
    from hookwright import Failure, Transport

EXCHANGES = 1000
AT_ONCE = 50

_TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda name: f"x-{name}")
_VALUE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
_STATUS = st.one_of(st.sampled_from([200, 201, 202, 301, 307, 400, 410, 429, 500, 503]), st.integers(200, 599))


class Exchange(NamedTuple):
    """A request, and what the receiver says and does."""

    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    interim: bytes
    answer: bytes
    closes: bool


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bool]:
    """An answer in each of the framings, whole, cut off, or spoilt; and whether the receiver hangs up after it."""
    status = draw(_STATUS)
    body = draw(st.binary(max_size=300) | st.binary(min_size=1).map(lambda seed: (seed * 70_000)[:70_000]))
    fields = draw(st.lists(st.tuples(_TOKEN, _VALUE), max_size=4))
    head = f"HTTP/1.{draw(st.sampled_from([0, 1]))} {status} Said\r\n".encode()
    head += b"".join(f"{name}: {value}\r\n".encode() for name, value in fields)
    framing = draw(st.sampled_from(["length", "chunked", "end"]))
    closes = framing == "end" or draw(st.booleans())
    if status in {204, 304}:
        framing, body, closes = "none", b"", True
    if framing == "length":
        head += b"Content-Length: %d\r\n" % len(body)
    elif framing == "chunked":
        head = head.replace(b"HTTP/1.0", b"HTTP/1.1") + b"Transfer-Encoding: chunked\r\n"
        size = draw(st.integers(50, 9000))
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    if closes:
        head += b"Connection: close\r\n"
    whole = head + b"\r\n" + body
    if draw(st.integers(0, 9)) == 0:
        whole, closes = whole[: draw(st.integers(0, len(whole)))], True
    if draw(st.integers(0, 19)) == 0:
        whole, closes = whole.replace(b"HTTP/1", draw(st.sampled_from([b"HTTQ/1", b"", b"ICY"])), 1), True
    return whole, closes


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    answer, closes = draw(answers())
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * draw(st.sampled_from([0, 0, 0, 1, 2]))
    headers = draw(st.lists(st.tuples(_TOKEN, _VALUE), max_size=4, unique_by=lambda header: header[0]))
    path = draw(st.from_regex(r"\A/[a-z0-9/]{0,20}(\?[a-z]=[a-z0-9%2]{1,9})?\Z"))
    return Exchange(path, tuple(headers), draw(st.binary(max_size=2000)), interim, answer, closes)


class Receiver:
    """Answers each connection's requests with the exchange that the path's first part names."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.seen: dict[str, bytes] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
                body = await reader.readexactly(length)
                sender, number, _ = head.split(b" ")[1].decode()[1:].split("/", 2)
                request, fields = head.rstrip().split(b"\r\n", 1)
                kept = b"\r\n".join(sorted(line.lower() for line in fields.split(b"\r\n")))
                self.seen[f"{sender}/{number}"] = (
                    request.replace(sender.encode(), b"*", 1) + b"\n" + kept + b"\n" + body
                )
                exchange = self.exchanges[int(number)]
                writer.write(exchange.interim + exchange.answer)
                await writer.drain()
                if exchange.closes:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _outcomes(transport: Transport, name: str, url: str, exchanged: list[Exchange]) -> list[Response | Failure]:
    async def send(number: int, exchange: Exchange) -> Response | Failure:
        path = f"{name}/{number}{exchange.path}"
        # An endpoint each: what a spoilt exchange does to the next one on its connection is another test's.
        request = Request(f"{url}{path}", exchange.headers, exchange.body, f"ep_{number % 10}", 1, total_timeout=10.0)
        return await transport.send(request)

    async with asyncio.timeout(30):
        return await asyncio.gather(*(send(*numbered) for numbered in enumerate(exchanged)))


def _comparable(answer: Response | Failure) -> tuple[object, ...]:
    if isinstance(answer, Response):
        headers = tuple((name.lower(), value) for name, value in answer.headers)
        return answer.status, headers, answer.body, answer.truncated
    # A connection that breaks may be reported by its end or by its reset, as the packets come.
    return ("protocol_error" if answer.code == "connect_error" else answer.code,)


@settings(
    max_examples=EXCHANGES // AT_ONCE,
    deadline=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(st.lists(exchanges(), min_size=AT_ONCE, max_size=AT_ONCE))
async def test_a_thousand_exchanges_end_the_same_through_both_transports(exchanged: list[Exchange]) -> None:
    receiver = Receiver()
    receiver.exchanges = exchanged
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    network = NetworkPolicy.development()
    first, second = HttpxTransport(network=network), DirectTransport(network=network)
    try:
        by_httpx = await _outcomes(first, "h", url, exchanged)
        by_direct = await _outcomes(second, "d", url, exchanged)
    finally:
        await first.aclose()
        await second.aclose()
        server.close()
    for number, exchange in enumerate(exchanged):
        assert receiver.seen[f"h/{number}"] == receiver.seen[f"d/{number}"]
        one, other = by_httpx[number], by_direct[number]
        assert _comparable(one) == _comparable(other), (exchange.interim, exchange.answer[:300], one, other)
