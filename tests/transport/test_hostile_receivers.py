"""HttpxTransport against real sockets: hostile receivers, TLS, DNS, and pools that do not mix."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trustme

from hookwright import ConfigurationError, Failure, HttpxTransport, NetworkPolicy, Request, Response
from hookwright.testing import Inbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OPEN = NetworkPolicy.development()


def request(
    url: str, *, endpoint: str = "ep_1", revision: int = 1, total: float = 0.4, connections: int = 4
) -> Request:
    return Request(
        url=url,
        headers=(("content-type", "application/json"), ("x-test", "1")),
        body=b'{"a":1}',
        endpoint_id=endpoint,
        revision=revision,
        total_timeout=total,
        connect_timeout=total,
        dns_timeout=min(total, 0.2),
    )


@asynccontextmanager
async def server(handler: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A raw receiver: `handler(reader, writer)` is called once the head of a request has been read."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{port}/"
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


@asynccontextmanager
async def sending(**options: Any) -> AsyncIterator[HttpxTransport]:
    transport = HttpxTransport(network=OPEN, **options)
    try:
        yield transport
    finally:
        await transport.aclose()


def answering(*parts: bytes, pause: float = 0.0, forever: bool = False) -> Any:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            for part in parts:
                writer.write(part)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
            if not forever:
                await asyncio.Event().wait()
            await asyncio.sleep(0)

    return handler


def closing(data: bytes) -> Any:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return handler


HEAD = b"HTTP/1.1 200 OK\r\n"

HOSTILE: dict[str, tuple[Any, object]] = {
    "never answers": (answering(), "timeout"),
    "closes at once": (closing(b""), "protocol_error"),
    "closes right after the headers": (closing(HEAD + b"content-length: 9\r\n\r\n"), (200, b"", True)),
    "drips headers": (answering(HEAD, b"a: b\r\n", pause=0.05, forever=True), "timeout"),
    "drips the body": (
        answering(HEAD + b"content-length: 99\r\n\r\n", *[b"x"] * 99, pause=0.15),
        (200, None, True),
    ),
    "endless 103": (answering(b"HTTP/1.1 103 Early Hints\r\na: b\r\n\r\n", forever=True, pause=0.01), "timeout"),
    "two megabytes of header": (closing(HEAD + b"a: " + b"x" * 2_000_000 + b"\r\n\r\n"), "protocol_error"),
    "10 GB promised, then close": (closing(HEAD + b"content-length: 10000000000\r\n\r\nabc"), (200, b"abc", True)),
    "negative length": (closing(HEAD + b"content-length: -1\r\n\r\n"), "protocol_error"),
    "invalid gzip": (
        closing(HEAD + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope"),
        (200, b"nope", False),
    ),
    "101 Switching Protocols": (closing(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n"), "protocol_error"),
    "status 600": (closing(b"HTTP/1.1 600 X\r\ncontent-length: 0\r\n\r\n"), "protocol_error"),
    "status text": (closing(b"HTTP/1.1 abc X\r\ncontent-length: 0\r\n\r\n"), "protocol_error"),
    "204 with a body": (closing(b"HTTP/1.1 204 X\r\n\r\nxxx"), (204, b"", False)),
    "latin-1 header": (closing(HEAD + b"x-a: \xe9\r\ncontent-length: 0\r\n\r\n"), (200, b"", False)),
    "redirect": (
        closing(b"HTTP/1.1 307 X\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"),
        (307, b"", False),
    ),
}


@pytest.mark.parametrize("row", HOSTILE)
async def test_a_hostile_receiver_ends_as_a_value_within_the_total_timeout(row: str) -> None:
    handler, expected = HOSTILE[row]
    async with server(handler) as url, sending() as transport:
        begin = time.monotonic()
        answer = await transport.send(request(url))
        assert time.monotonic() - begin < 0.9
        if isinstance(expected, str):
            assert isinstance(answer, Failure)
            assert answer.code == expected
            assert "127.0.0.1" not in answer.detail
        else:
            assert isinstance(expected, tuple)
            status, body, truncated = expected
            assert isinstance(answer, Response)
            assert (answer.status, answer.truncated) == (status, truncated)
            assert body is None or answer.body == body


async def test_an_endless_body_is_cut_at_the_cap_and_its_connection_closed() -> None:
    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
        finally:
            closed.set()

    async with server(endless) as url, sending() as transport:
        answer = await transport.send(request(url, total=5))
        assert isinstance(answer, Response)
        assert (answer.status, len(answer.body), answer.truncated) == (200, 16384, True)
        await asyncio.wait_for(closed.wait(), 5)


async def test_a_gzip_bomb_is_kept_as_the_bytes_that_came() -> None:
    bomb = gzip.compress(gzip.compress(b"\0" * 10_000_000))
    head = HEAD + b"content-encoding: gzip, gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    async with server(closing(head + bomb)) as url, sending() as transport:
        answer = await transport.send(request(url))
        assert isinstance(answer, Response)
        assert answer.body == bomb


async def test_what_is_sent_is_a_plain_post(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    async with Inbox() as inbox, sending() as transport:
        inbox.respond_with((200, {"Set-Cookie": "a=b; Path=/"}, b"ok"))
        for _ in range(2):
            answer = await transport.send(request(inbox.url + "path?x=%2F"))
            assert isinstance(answer, Response)
            assert answer.body == b"ok"
        first, second = inbox.received
        assert (first.method, first.path, first.body) == ("POST", "/path?x=%2F", b'{"a":1}')
        assert first.headers["accept-encoding"] == "identity"
        assert first.headers["x-test"] == "1"
        assert "cookie" not in second.headers


@asynccontextmanager
async def counting() -> AsyncIterator[tuple[str, list[int]]]:
    connections: list[int] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        while True:
            connections[-1] += 1
            await reader.readexactly(7)
            writer.write(HEAD + b"content-length: 0\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")

    async with server(handler) as url:
        yield url, connections


async def test_an_endpoint_reuses_its_connection_until_its_revision_changes() -> None:
    async with counting() as (url, connections), sending() as transport:
        for revision in (1, 1, 1, 2, 2):
            assert isinstance(await transport.send(request(url, revision=revision)), Response)
        assert connections == [3, 2]
        await transport.send(request(url, endpoint="ep_2"))
        assert connections == [3, 2, 1]


async def test_a_cancelled_request_does_not_poison_its_pool() -> None:
    transport = HttpxTransport(network=OPEN)
    async with Inbox() as inbox:
        never = asyncio.Event()

        async def hang(received: object) -> int:
            await never.wait()
            return 200

        inbox.respond_with(hang)
        tasks = [asyncio.create_task(transport.send(request(inbox.url, total=30))) for _ in range(8)]
        await inbox.wait_for(4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        inbox.respond_with(200)
        answers = await asyncio.gather(*(transport.send(request(inbox.url, total=5)) for _ in range(8)))
        assert all(isinstance(answer, Response) for answer in answers)
    await transport.aclose()


async def test_an_unsolicited_response_hurts_only_the_endpoint_that_sent_it() -> None:
    forged = HEAD + b"content-length: 0\r\n\r\n"

    async def forging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n" + forged)
        await asyncio.Event().wait()

    async with server(forging) as url, sending() as transport:
        await transport.send(request(url, endpoint="ep_a"))
        answer = await transport.send(request(url, endpoint="ep_b"))
        assert isinstance(answer, Response)
        assert answer.status == 500


async def test_a_refused_connection_is_a_connect_error() -> None:
    async with server(answering()) as url:
        pass
    async with sending() as transport:
        answer = await transport.send(request(url))
        assert isinstance(answer, Failure)
        assert answer.code == "connect_error"


async def test_a_reset_after_the_request_was_read_is_a_connect_error() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER: close with RST
        writer.transport.abort()

    async with server(reset) as url, sending() as transport:
        answer = await transport.send(request(url))
        assert isinstance(answer, Failure)
        assert answer.code in {"connect_error", "protocol_error"}


async def test_tls_is_verified_against_the_name_and_built_off_the_loop() -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    for names, trusted, code in (
        (["hooks.example"], True, None),
        (["other.example"], True, "tls_error"),
        (["hooks.example"], False, "tls_error"),
    ):
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(serving)
        context = trusting if trusted else None
        async with (
            server(closing(HEAD + b"content-length: 0\r\n\r\n"), serving) as url,
            sending(ssl_context=context, resolver=resolve) as transport,
        ):
            named = url.replace("127.0.0.1", "hooks.example")
            answer = await transport.send(request(named, total=5))
            assert (answer.code if isinstance(answer, Failure) else None) == code


@pytest.mark.parametrize(
    ("addresses", "code"),
    [
        (["127.0.0.1"], "blocked_target"),
        (["1.1.1.1", "127.0.0.1"], "blocked_target"),
        (["::ffff:10.0.0.1"], "blocked_target"),
        ([], "dns_error"),
    ],
)
async def test_an_address_is_vetted_at_dial_and_no_socket_opened(addresses: list[str], code: str) -> None:
    async with Inbox() as inbox:

        async def resolve(host: str, port: int) -> list[str]:
            return addresses

        transport = HttpxTransport(network=NetworkPolicy(allow_http=True), resolver=resolve)
        answer = await transport.send(request(inbox.url.replace("127.0.0.1", "hooks.example")))
        await transport.aclose()
        assert isinstance(answer, Failure)
        assert answer.code == code
        assert not any(address in answer.detail for address in addresses)
        assert inbox.received == []


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    async with Inbox() as inbox:

        async def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.99", "127.0.0.1"]

        async with sending(resolver=resolve) as transport:
            answer = await transport.send(request(inbox.url.replace("127.0.0.1", "hooks.example")))
            assert isinstance(answer, Response)


async def test_a_lookup_that_stalls_is_a_dns_error_and_delays_nobody() -> None:
    async def stall(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async with sending(resolver=stall) as transport:
        answer = await transport.send(request("http://hooks.example/", total=2))
        assert isinstance(answer, Failure)
        assert (answer.code, answer.detail) == ("dns_error", "no answer in time")


async def test_the_systems_resolver_answers_and_refuses() -> None:
    async with Inbox() as inbox, sending() as transport:
        local = inbox.url.replace("127.0.0.1", "localhost")
        both = await asyncio.gather(*(transport.send(request(local, endpoint=e, total=5)) for e in "ab"))
        assert [type(answer) for answer in both] == [Response, Response]
        answer = await transport.send(request("http://no-such-name.invalid/", total=5))
        assert isinstance(answer, Failure)
        assert answer.code == "dns_error"


def test_a_stuck_lookup_does_not_delay_the_interpreters_exit() -> None:
    program = (
        "import asyncio, socket, threading\n"
        "from hookwright.transport._resolver import SystemResolver\n"
        "started = threading.Event()\n"
        "def stuck(*a, **k): started.set(); threading.Event().wait()\n"
        "socket.getaddrinfo = stuck\n"
        "async def main():\n"
        "    try:\n"
        "        async with asyncio.timeout(0.2): await SystemResolver()('h', 1)\n"
        "    except TimeoutError: print('given up', started.is_set())\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout == "given up True\n"


async def test_any_httpx2_transport_may_be_inside() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    mocked = HttpxTransport(
        httpx2.MockTransport(lambda request: httpx2.Response(418, content=request.content)),
        network=NetworkPolicy.delegated(),
    )
    served = HttpxTransport(httpx2.ASGITransport(app), network=NetworkPolicy.delegated())
    for transport, status in ((mocked, 418), (served, 201)):
        answer = await transport.send(request("https://hooks.example/"))
        assert answer == Response(status, answer.headers, b'{"a":1}')  # type: ignore[union-attr]  # a Failure differs
        await transport.aclose()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx2.ConnectTimeout("x"), "connect_timeout"),
        (httpx2.ReadTimeout("x"), "timeout"),
        (httpx2.ConnectError("x"), "connect_error"),
        (httpx2.RemoteProtocolError("x"), "protocol_error"),
        (httpx2.ReadError("x"), "connect_error"),
        (RuntimeError("x"), "transport_error"),
    ],
)
async def test_what_an_inner_transport_raises_becomes_a_failure(error: Exception, code: str) -> None:
    def raising(request: httpx2.Request) -> httpx2.Response:
        raise error

    answer = await HttpxTransport(httpx2.MockTransport(raising), network=NetworkPolicy.delegated()).send(
        request("https://hooks.example/")
    )
    assert isinstance(answer, Failure)
    assert answer.code == code


def test_another_inner_transport_must_say_that_addresses_are_not_ours_to_check() -> None:
    inner = httpx2.MockTransport(lambda request: httpx2.Response(200))
    for network in (None, OPEN):
        with pytest.raises(ConfigurationError, match=r"NetworkPolicy\.delegated\(\)"):
            HttpxTransport(inner, network=network)
    with pytest.raises(ConfigurationError, match="delegated"):
        HttpxTransport(network=NetworkPolicy.delegated())
    with pytest.raises(ConfigurationError, match="leave them out"):
        HttpxTransport(inner, network=NetworkPolicy.delegated(), ssl_context=ssl.create_default_context())
