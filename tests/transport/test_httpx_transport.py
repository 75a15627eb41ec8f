"""HttpxTransport's own promises on real sockets: connections, TLS, names, deadlines, and what a failure tells."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trustme

from hookwright import Failure, HttpxTransport, NetworkPolicy, Request, Response
from hookwright.transport._pinned import PinnedTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Answer = Callable[["Receiver", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OPEN = NetworkPolicy.development()
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Receiver:
    """A raw server on loopback. `closed` is set when a connection's other side is gone."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.port = 0

    def url(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/hook?token=s3cret"


@asynccontextmanager
async def receiving(answer: Answer, context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        receiver.connections += 1
        try:
            await answer(receiver, reader, writer)
            while await reader.read(65536):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            receiver.closed.set()
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


async def read_request(receiver: Receiver, reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    receiver.requests.append(head + await reader.readexactly(length))
    receiver.arrived.put_nowait(head)


def answers(*parts: bytes) -> Answer:
    """Answer every request of a connection with the next of `parts`, the last one again and again."""

    async def answer(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while True:
            await read_request(receiver, reader)
            writer.write(parts[min(number, len(parts) - 1)])
            number += 1

    return answer


async def hangs(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(receiver, reader)
    await reader.read(1)


def request(url: str, **changes: Any) -> Request:
    usual = Request(url, (("x-test", "1"),), b"{}", endpoint_id="ep_1", revision=1, total_timeout=5.0)
    return usual._replace(**changes)


@asynccontextmanager
async def transporting(inner: httpx2.AsyncBaseTransport) -> AsyncIterator[HttpxTransport]:
    transport = HttpxTransport(inner, network=NetworkPolicy.delegated())
    try:
        yield transport
    finally:
        await transport.aclose()


def pinned(
    *, policy: NetworkPolicy = OPEN, context: ssl.SSLContext | None = None, idle: float = 60.0, most: int = 1000
) -> PinnedTransport:
    async def loopback(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    return PinnedTransport(policy, ssl_context=context, resolver=loopback, pool_idle=idle, pools_most=most)


def status(answer: Response | Failure) -> int:
    assert isinstance(answer, Response), answer
    return answer.status


def code(answer: Response | Failure) -> str:
    assert isinstance(answer, Failure), answer
    assert not any(secret in answer.detail for secret in ("s3cret", "hook", "127.0.0.1", "token")), answer
    return answer.code


async def test_host_length_and_encoding_are_ours_and_are_sent_once() -> None:
    given = (("Host", "evil.example"), ("content-length", "99"), ("Accept-Encoding", "gzip"), ("x-test", "1"))
    async with receiving(answers(OK)) as receiver, transporting(pinned()) as transport:
        assert status(await transport.send(request(receiver.url(), headers=given, body=b"12345"))) == 200
    head, _, body = receiver.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /hook?token=s3cret HTTP/1.1"
    assert sorted(line.lower() for line in lines[1:]) == [
        b"accept-encoding: identity",
        b"content-length: 5",
        b"host: 127.0.0.1:%d" % receiver.port,
        b"x-test: 1",
    ]
    assert body == b"12345"


@pytest.mark.parametrize("answer", [OK, b"HTTP/1.1 204 No Content\r\n\r\n", CHUNKED + b"2\r\nok\r\n0\r\n\r\n"])
async def test_a_connection_whose_answer_was_read_to_its_end_is_used_again(answer: bytes) -> None:
    async with receiving(answers(answer)) as receiver, transporting(pinned()) as transport:
        for _ in range(3):
            assert status(await transport.send(request(receiver.url()))) in {200, 204}
        assert receiver.connections == 1


async def test_an_endpoint_never_has_more_connections_than_it_may() -> None:
    async with receiving(answers(OK)) as receiver, transporting(pinned()) as transport:
        sent = await asyncio.gather(*(transport.send(request(receiver.url(), connections=2)) for _ in range(12)))
        assert [status(answer) for answer in sent] == [200] * 12
        assert receiver.connections <= 2


async def test_a_new_revision_closes_the_connections_of_the_old_one_once_they_are_idle() -> None:
    async with receiving(hangs) as receiver, transporting(pinned()) as transport:
        old = asyncio.create_task(transport.send(request(receiver.url())))
        await receiver.arrived.get()
        new = asyncio.create_task(transport.send(request(receiver.url(), revision=2)))
        await receiver.arrived.get()
        assert receiver.connections == 2
        assert not receiver.closed.is_set()  # one that is in use is not taken away
        old.cancel()
        async with asyncio.timeout(5):
            await receiver.closed.wait()
        new.cancel()
        await asyncio.gather(old, new, return_exceptions=True)


async def test_a_pool_that_nothing_was_sent_to_is_closed_without_another_send() -> None:
    async with receiving(answers(OK)) as receiver, transporting(pinned(idle=0.05)) as transport:
        assert code(await transport.send(request("http://127.0.0.1:1024/"))) == "connect_error"  # a user that has left
        assert status(await transport.send(request(receiver.url()))) == 200
        async with asyncio.timeout(5):
            await receiver.closed.wait()


async def test_the_least_recently_used_idle_pool_makes_room() -> None:
    async with receiving(answers(OK)) as receiver, transporting(pinned(most=2)) as transport:
        for endpoint_id in ("a", "b", "a", "c", "a"):
            await transport.send(request(receiver.url(), endpoint_id=endpoint_id))
        assert receiver.connections == 3  # `a` was kept when `c` came
        await transport.send(request(receiver.url(), endpoint_id="b"))
        assert receiver.connections == 4


async def test_an_idle_connection_that_something_arrived_on_is_not_used_again() -> None:
    forge = asyncio.Event()
    forged = asyncio.Event()

    async def answer(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(receiver, reader)
        writer.write(OK)
        await forge.wait()
        writer.write(b"HTTP/1.1 299 Forged\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        forged.set()

    async with receiving(answer) as receiver, transporting(pinned()) as transport:
        assert status(await transport.send(request(receiver.url()))) == 200
        forge.set()
        await forged.wait()
        for _ in range(5):  # turns of the loop: until ours has read what has arrived
            await asyncio.sleep(0)
        assert status(await transport.send(request(receiver.url()))) == 200
        assert receiver.connections == 2


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx"])
async def test_a_cancelled_send_raises_and_closes_its_connection_whatever_has_arrived(begun: bytes) -> None:
    async with receiving(answers(begun)) as receiver, transporting(pinned()) as transport:
        task = asyncio.create_task(transport.send(request(receiver.url())))
        await receiver.arrived.get()
        for _ in range(5):  # turns of the loop: until ours has read what was sent
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await receiver.closed.wait()


async def test_a_request_larger_than_any_buffer_arrives_whole() -> None:
    body = bytes(range(256)) * 40_000
    async with receiving(answers(OK)) as receiver, transporting(pinned()) as transport:
        assert status(await transport.send(request(receiver.url(), body=body))) == 200
        assert receiver.requests[0].endswith(b"\r\n\r\n" + body)


async def test_two_hundred_megabytes_are_cut_at_the_cap_and_not_at_the_deadline() -> None:
    sent = 0

    async def pour(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(receiver, reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 200000000\r\n\r\n")
        while sent < 200_000_000:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with receiving(pour) as receiver, transporting(pinned()) as transport:
        begin = time.monotonic()
        answer = await transport.send(request(receiver.url(), total_timeout=30))
        assert answer == Response(200, (("content-length", "200000000"),), b"x" * 16384, truncated=True)
        assert time.monotonic() - begin < 5
        async with asyncio.timeout(5):
            await receiver.closed.wait()
        assert sent < 20_000_000  # what the sockets' buffers hold, and not what was offered


@pytest.mark.parametrize(("count", "accepted"), [(2000, True), (2200, False)])
async def test_response_headers_over_32_kib_as_sent_are_a_protocol_error(count: int, accepted: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n" + b"x-name: 123456\r\n" * count + b"\r\n"  # of 16 bytes each
    async with receiving(answers(head)) as receiver, transporting(pinned()) as transport:
        answer = await transport.send(request(receiver.url()))
        assert (isinstance(answer, Response) or code(answer)) == (accepted or "protocol_error")


async def test_a_receiver_that_never_reads_a_large_request_ends_in_a_timeout() -> None:
    async def deaf(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with receiving(deaf) as receiver, transporting(pinned()) as transport:
        answer = await transport.send(request(receiver.url(), body=b"x" * 20_000_000, total_timeout=0.3))
        assert code(answer) == "timeout"


@pytest.mark.parametrize("flood", [b"HTTP/1.1 103 E\r\n\r\n", CHUNKED + b"1\r\nx\r\n" * 10_000])
async def test_a_flood_of_tiny_pieces_neither_outlasts_the_deadline_nor_holds_the_loop(flood: bytes) -> None:
    async def answer(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(receiver, reader)
        piece = flood if flood.startswith(b"HTTP/1.1 103") else b"1\r\nx\r\n"
        writer.write(flood)
        while True:
            writer.write(piece * 2000)
            await writer.drain()

    stalls = []

    async def watch() -> None:
        while True:
            begin = time.thread_time()  # not wall time: that would measure how busy the machine is
            await asyncio.sleep(0.001)
            stalls.append(time.thread_time() - begin)

    async with receiving(answer) as receiver, transporting(pinned()) as transport:
        watching = asyncio.create_task(watch())
        begin = time.monotonic()
        await transport.send(request(receiver.url(), total_timeout=0.5))
        assert time.monotonic() - begin < 1.0
        watching.cancel()
    assert max(stalls) < 0.25  # 0.03 s it is; 0.5 s, were everything parsed that has arrived


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def serving(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(context)
    return context


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_https_keeps_the_name_for_sni_and_host_and_reuses_the_connection(
    serving: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    names: list[str | None] = []
    serving.sni_callback = lambda _socket, name, _context: names.append(name)
    async with receiving(answers(OK), serving) as receiver, transporting(pinned(context=trusting)) as transport:
        for _ in range(2):
            assert status(await transport.send(request(receiver.url("hooks.example", "https")))) == 200
        assert names == ["hooks.example"]
        assert b"host: hooks.example:%d" % receiver.port in receiver.requests[0].lower()


async def test_a_certificate_for_another_host_is_a_tls_error(serving: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    async with receiving(answers(OK), serving) as receiver, transporting(pinned(context=trusting)) as transport:
        answer = await transport.send(request(receiver.url("other.example", "https")))
        assert answer == Failure("tls_error", "the certificate is for another host")
        assert receiver.requests == []


async def test_a_certificate_nobody_vouches_for_is_a_tls_error_with_our_own_context(serving: ssl.SSLContext) -> None:
    async with receiving(answers(OK), serving) as receiver, transporting(pinned()) as transport:
        url = receiver.url("hooks.example", "https")
        both = await asyncio.gather(*(transport.send(request(url, endpoint_id=name)) for name in "ab"))
        assert [code(answer) for answer in both] == ["tls_error"] * 2
        assert isinstance(both[0], Failure)
        assert both[0].detail.startswith("certificate verify failed: ")


@pytest.mark.parametrize(("said", "expected"), [(b"HTTP/1.1 400 X\r\n\r\n", "tls_error"), (b"", "connect_error")])
async def test_a_receiver_that_speaks_no_tls_is_told_from_one_that_hangs_up(
    said: bytes, expected: str, trusting: ssl.SSLContext
) -> None:
    async def answer(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(said)
        writer.close()

    async with receiving(answer) as receiver, transporting(pinned(context=trusting)) as transport:
        assert code(await transport.send(request(receiver.url("hooks.example", "https")))) == expected


async def test_a_tls_context_that_cannot_be_built_fails_the_attempt_and_is_built_by_the_next(
    monkeypatch: pytest.MonkeyPatch, serving: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    def unreadable(**given: bool) -> ssl.SSLContext:
        raise PermissionError("s3cret")

    async with receiving(answers(OK), serving) as receiver, transporting(pinned()) as transport:
        url = receiver.url("hooks.example", "https")
        monkeypatch.setattr(httpx2, "create_ssl_context", unreadable)
        assert code(await transport.send(request(url))) == "tls_error"
        monkeypatch.setattr(httpx2, "create_ssl_context", lambda **given: trusting)
        assert status(await transport.send(request(url))) == 200


async def test_a_stalled_handshake_is_a_connect_timeout_and_its_socket_is_closed(trusting: ssl.SSLContext) -> None:
    async def stall(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    for connect, total, expected in ((0.1, 5.0, "connect_timeout"), (5.0, 0.1, "timeout")):
        async with receiving(stall) as receiver, transporting(pinned(context=trusting)) as transport:
            url = receiver.url("hooks.example", "https")
            assert code(await transport.send(request(url, connect_timeout=connect, total_timeout=total))) == expected
            async with asyncio.timeout(5):
                await receiver.closed.wait()


async def test_plain_http_is_refused_at_dial_by_a_policy_that_does_not_allow_it() -> None:
    policy = NetworkPolicy(allow_loopback=True)
    async with receiving(answers(OK)) as receiver, transporting(pinned(policy=policy)) as transport:
        assert code(await transport.send(request(receiver.url()))) == "blocked_target"
        assert receiver.connections == 0


async def test_the_source_address_is_the_policys_and_asks_no_executor() -> None:
    policy = NetworkPolicy(allow_http=True, allow_loopback=True, local_address="127.0.0.7")
    sources = []
    before = set(threading.enumerate())

    async def note(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sources.append(writer.get_extra_info("peername")[0])
        await answers(OK)(receiver, reader, writer)

    async with receiving(note) as receiver, transporting(pinned(policy=policy)) as transport:
        assert status(await transport.send(request(receiver.url()))) == 200
        assert code(await transport.send(request(receiver.url("[::1]"), revision=2))) == "connect_error"
    assert sources == ["127.0.0.7"]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (RuntimeError("hook s3cret"), "the resolver failed (RuntimeError)"),
        ([f"127.0.0.{number}" for number in range(100)], "the name has more than 64 addresses"),
    ],
)
async def test_what_a_resolver_cannot_answer_is_a_dns_error(found: Exception | list[str], detail: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        if isinstance(found, Exception):
            raise found
        return found

    async with transporting(PinnedTransport(OPEN, resolver=resolve)) as transport:
        assert await transport.send(request("http://hooks.example/")) == Failure("dns_error", detail)


async def test_a_rebinding_name_is_judged_again_at_every_dial() -> None:
    turns = iter((["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]))

    async def rebind(host: str, port: int) -> list[str]:
        return next(turns)

    async with receiving(answers(OK)) as receiver, transporting(PinnedTransport(OPEN, resolver=rebind)) as transport:
        assert status(await transport.send(request(receiver.url("hooks.example")))) == 200
        again = request(receiver.url("hooks.example"), revision=2)
        assert code(await transport.send(again)) == "blocked_target"
        assert receiver.connections == 1


async def test_stalled_lookups_delay_neither_the_hosts_threads_nor_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *rest: int, **named: int) -> object:
        if host.endswith("stalls.example"):
            release.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        async with receiving(answers(OK)) as receiver, transporting(PinnedTransport(OPEN)) as transport:
            stalled = [
                request(f"http://{number}.stalls.example/", endpoint_id=str(number), dns_timeout=0.3)
                for number in range(6)
            ]
            begin = time.monotonic()
            waiting = [asyncio.create_task(transport.send(each)) for each in (*stalled, stalled[0])]
            assert status(await transport.send(request(receiver.url("localhost")))) == 200
            assert await asyncio.to_thread(lambda: 42) == 42
            assert not any(task.done() for task in waiting)
            assert [code(await task) for task in waiting] == ["dns_error"] * 7
            assert time.monotonic() - begin < 2
    finally:
        release.set()


@pytest.mark.parametrize(
    "line",
    [b"POST /hook?token=s3cret\r\n\r\n", b"HTTP/1.1 200 OK\r\ntoken s3cret\r\n\r\n", b"HTTP/1.1 200 \x00hook\r\n\r\n"],
)
async def test_a_receiver_cannot_write_what_it_received_into_the_detail(line: bytes) -> None:
    async with receiving(answers(line)) as receiver, transporting(pinned()) as transport:
        assert code(await transport.send(request(receiver.url()))) == "protocol_error"


async def test_a_header_that_cannot_be_sent_is_not_repeated() -> None:
    async with receiving(answers(OK)) as receiver, transporting(pinned()) as transport:
        for value in ("s3cret\r\nx: y", "s3cr\u00e9t"):
            answer = await transport.send(request(receiver.url(), headers=(("x-key", value),)))
            assert code(answer) in {"protocol_error", "transport_error"}
