"""What every part of the transport contract stands on: raw receivers, and rows to judge by."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import socket
import ssl
import struct
import sys
import warnings
from abc import abstractmethod
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import trustme

from hookwright._addresses import NetworkPolicy
from hookwright.testing._transport_contract_watch import RECEIVING, Watch
from hookwright.transport._base import Failure, Request, Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from hookwright.transport._base import Transport
    from hookwright.transport._resolver import Resolver

    Answer = Callable[["Peer"], Awaitable[None]]

HOST = "hooks.example"
TELLTALE = "s3cret-token"
OPEN = NetworkPolicy.development()
OK_HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD = OK_HEAD + b"content-length: 4\r\n\r\ngood"

LATE = 0.5
"""Seconds an attempt may end after its total timeout."""

STALL = 0.05 if sys.gettrace() is None else 0.5
"""Seconds of processor time that one callback of the loop may take.

A tracer, as coverage's, makes every line cost up to ten times as much, and a guest's processor time holds what its host
took away from it.
"""

GROWTH = 5 * 1024 * 1024
"""Bytes by which an attempt may let the process grow."""

PATIENCE = 10.0
"""Seconds after which something awaited is given up: longer than any of it takes."""

_KEPT = 64 * 1024


class Said(NamedTuple):
    """A response that is expected. None is anything."""

    status: int | None = 200
    body: bytes | None = None
    truncated: bool | None = False

    def accepts(self, answer: Response | Failure) -> bool:
        """Whether it is this response."""
        return (
            isinstance(answer, Response)
            and self.status in {None, answer.status}
            and (self.body is None or answer.body == self.body)
            and self.truncated in {None, answer.truncated}
        )


@dataclass(frozen=True)
class Row:
    """A hostile receiver, and what the attempt ends with: one of `expected`, a Failure's code or a response.

    `closes` says that its connection must be closed afterwards. `bare` has the row speak before, or instead of, a TLS
    handshake. `within` is for what must end long before the total timeout.
    """

    name: str
    answer: Answer
    expected: tuple[str | Said, ...]
    closes: bool = True
    bare: bool = False
    within: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def row(name: str, answer: Answer, *expected: str | Said, **rest: Any) -> Row:
    """Return a row; what is not a field of a row changes its request."""
    fields = {name: rest.pop(name) for name in ("closes", "bare", "within") if name in rest}
    return Row(name, answer, expected, **fields, changes=rest)


class Peer:
    """The receiver's end of one connection."""

    def __init__(self, receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.receiver = receiver
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Read a whole request. Returns its head and as much of its body as is worth keeping."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        left = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        body = b""
        while left:
            part = await self.reader.read(min(left, _KEPT))
            if not part:
                raise asyncio.IncompleteReadError(body, left)
            left -= len(part)
            body = (body + part)[:_KEPT]
        self.receiver.requests.append(head + body)
        self.receiver.arrived.put_nowait(self)
        return head + body

    async def say(self, *parts: bytes) -> None:
        """Write, each part as soon as there is room for it."""
        for part in parts:
            if self.writer.is_closing():  # to which uvloop lets nobody write
                raise ConnectionResetError
            self.writer.write(part)
            await self.writer.drain()

    async def gone(self) -> None:
        """Read until the other side is gone."""
        while await self.reader.read(_KEPT):
            pass

    def reset(self) -> None:
        """Close with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Receiver:
    """A raw server on loopback: `answer` has the first word on every connection until `turn_good`, then it is good."""

    def __init__(self, answer: Answer, context: ssl.SSLContext | None, *, bare: bool) -> None:
        self.connections = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.arrived: asyncio.Queue[Peer] = asyncio.Queue()
        self.turned = asyncio.Event()
        self.port = 0
        self._answer: Answer | None = answer
        self._context = context
        self._bare = bare
        self._closed: asyncio.Queue[None] = asyncio.Queue()
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: set[asyncio.Task[Any]] = set()

    def url(self, host: str = HOST) -> str:
        """Return the address, with a secret in it that nothing may tell."""
        return f"{'https' if self._context else 'http'}://{host}:{self.port}/hook?token={TELLTALE}"

    def turn_good(self) -> None:
        """Answer every request on new connections with `good`."""
        self._answer = None
        self.turned.set()

    async def saw_one_close(self) -> None:
        """Wait until one more connection is closed by the other side, or broken."""
        async with asyncio.timeout(PATIENCE):
            await self._closed.get()

    async def saw_all_close(self) -> None:
        """Wait until no connection is open."""
        async with asyncio.timeout(PATIENCE):
            await self._empty.wait()

    async def accept(self, listener: socket.socket) -> None:
        """Serve every connection, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            there, _ = await loop.sock_accept(listener)
            self._tasks.add(loop.create_task(self._serve(there)))

    async def _serve(self, there: socket.socket) -> None:
        """Serve one connection to its end."""
        self.connections += 1
        self.open += 1
        self._empty.clear()
        try:
            await self._converse(there)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            if not self.open:
                self._empty.set()
            self._closed.put_nowait(None)
            there.close()

    async def _converse(self, there: socket.socket) -> None:
        answer = self._answer
        # TLS from the first byte on: a loop may have read the other side's when one begins with it later.
        peer = await self._greet(there, None if self._bare and answer is not None else self._context)
        try:
            if answer is not None:
                await answer(peer)
            while not peer.writer.is_closing():
                await peer.request()
                await peer.say(GOOD)
            await peer.gone()
        finally:
            peer.writer.transport.abort()

    async def _greet(self, there: socket.socket, tls: ssl.SSLContext | None) -> Peer:
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, there, ssl=tls)
        return Peer(self, reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def end(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def receiving(
    answer: Answer, context: ssl.SSLContext | None = None, *, bare: bool = False
) -> AsyncIterator[Receiver]:
    """Run a receiver; what it does on the loop is marked as its own, and does not count as the transport's."""
    receiver = Receiver(answer, context, bare=bare)
    marked = contextvars.copy_context()
    marked.run(RECEIVING.set, True)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.setblocking(False)
        receiver.port = listener.getsockname()[1]
        accepting = asyncio.get_running_loop().create_task(receiver.accept(listener), context=marked)
        try:
            yield receiver
        finally:
            await quietly(accepting)
            await receiver.end()


async def good(peer: Peer) -> None:
    """Answer every request well."""
    while True:
        await peer.request()
        await peer.say(GOOD)


async def deaf(peer: Peer) -> None:
    """Read a request and never answer."""
    await peer.request()
    await peer.gone()


def says(*parts: bytes) -> Answer:
    """Answer a request with `parts`, and wait for the other side to close."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.say(*parts)
        await peer.gone()

    return answer


def answers(*parts: bytes) -> Answer:
    """Answer a request with `parts`; the connection may be used again."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.say(*parts)

    return answer


def says_and_closes(*parts: bytes) -> Answer:
    """Answer a request with `parts` and close in order."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.say(*parts)
        peer.writer.close()

    return answer


async def loopback(host: str, port: int) -> list[str]:
    """Resolve every name to this machine."""
    return ["127.0.0.1"]


@functools.cache
def authority() -> trustme.CA:
    """Return the certificate authority of all receivers."""
    return trustme.CA()


@functools.cache
def serving(name: str = HOST, **options: Any) -> ssl.SSLContext:
    """Return a receiver's TLS context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(name, **options).configure_cert(context)
    return context


def serving_unknown() -> ssl.SSLContext:
    """Return the TLS context of a receiver that vouches for itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert(HOST).configure_cert(context)
    return context


def serving_tls_1_1() -> ssl.SSLContext:
    """Return the TLS context of a receiver that was never updated."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(HOST).configure_cert(context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def trusting() -> ssl.SSLContext:
    """Return a sender's TLS context, which trusts the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


class Encounter:
    """A transport, the receiver it is about to meet, and a good one for another endpoint."""

    def __init__(self, transport: Transport, receiver: Receiver, other: Receiver) -> None:
        self.transport = transport
        self.receiver = receiver
        self.other = other

    def request(self, **changes: Any) -> Request:
        """Return a request to the receiver. Its endpoint has one connection: one that is lost would be missed."""
        usual = Request(
            self.receiver.url(),
            headers=(("content-type", "application/json"), ("x-test", "1")),
            body=b'{"a":1}',
            endpoint_id="ep_1",
            revision=1,
            connections=1,
            total_timeout=5.0,
            connect_timeout=4.0,
            dns_timeout=3.0,
        )
        return usual._replace(**changes)

    async def send(self, **changes: Any) -> Response | Failure:
        """Send a request to the receiver."""
        return await self.transport.send(self.request(**changes))

    async def attempt(self, within: float | None = None, **changes: Any) -> Response | Failure:
        """Send a request to the receiver, and hold the transport to the bounds of every attempt."""
        request = self.request(**changes)
        with Watch() as watch:
            # In a task of its own: the callback in which the watch ends is not measured.
            answer = await asyncio.create_task(_send(self.transport, request))
        assert watch.seconds < (within or request.total_timeout + LATE), f"took {watch.seconds:.2f} s"
        assert watch.longest < STALL, f"held the loop for {watch.longest:.3f} s"
        assert watch.growth < GROWTH, f"grew by {watch.growth} bytes"
        tells_nothing(answer, request, self.receiver)
        return answer

    async def fails(self, *codes: str, **changes: Any) -> Failure:
        """Attempt, and expect one of the codes."""
        answer = await self.attempt(**changes)
        assert isinstance(answer, Failure), answer
        assert answer.code in codes, answer
        return answer

    async def succeeds(self, **changes: Any) -> Response:
        """Attempt, and expect a response."""
        answer = await self.attempt(**changes)
        assert isinstance(answer, Response), answer
        return answer

    async def assert_usable(self) -> None:
        """Another endpoint is served, and so is the same one as soon as its receiver is good."""
        answer = await self.transport.send(self.request(url=self.other.url(), endpoint_id="ep_other"))
        assert Said(200, b"good").accepts(answer), answer
        self.receiver.turn_good()
        answer = await self.transport.send(self.request())
        assert Said(200, b"good").accepts(answer), answer


async def _send(transport: Transport, request: Request) -> Response | Failure:
    return await transport.send(request)


def tells_nothing(answer: Response | Failure, request: Request, receiver: Receiver) -> None:
    """A failure's detail may be shown to a tenant: no url, host, address, port or content."""
    if isinstance(answer, Failure):
        for secret in (request.url, HOST, "127.0.0.1", str(receiver.port), "/hook", TELLTALE, "x-test"):
            assert secret not in answer.detail, answer


class ContractBase:
    """How to make the transport, and how to put it before a receiver."""

    @abstractmethod
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        """Return a new transport."""
        raise NotImplementedError

    @asynccontextmanager
    async def facing(
        self,
        answer: Answer,
        scheme: str = "http",
        *,
        bare: bool = False,
        context: ssl.SSLContext | None = None,
        network: NetworkPolicy = OPEN,
        resolver: Resolver = loopback,
    ) -> AsyncIterator[Encounter]:
        """Put a new transport before a receiver; at the end, no connection may be left."""
        tls = (context or serving()) if scheme == "https" else None
        async with (
            receiving(answer, tls, bare=bare) as receiver,
            receiving(good, tls and serving()) as other,
        ):
            transport = self.make_transport(network=network, ssl_context=trusting(), resolver=resolver)
            try:
                yield Encounter(transport, receiver, other)
            finally:
                receiver.turn_good()
                await transport.aclose()
            await receiver.saw_all_close()
            await other.saw_all_close()

    async def judge(self, case: Row, scheme: str) -> None:
        """Put the transport before a row's receiver."""
        async with self.facing(case.answer, scheme, bare=case.bare) as encounter:
            answer = await encounter.attempt(within=case.within, **case.changes)
            accepted = [
                one.accepts(answer) if isinstance(one, Said) else _has_code(answer, one) for one in case.expected
            ]
            assert any(accepted), f"{answer!r:.300}, and not {case.expected}"
            assert encounter.receiver.connections <= 1
            assert len(encounter.receiver.requests) <= 1
            if case.closes:
                await encounter.receiver.saw_one_close()
            await encounter.assert_usable()


def _has_code(answer: Response | Failure, code: str) -> bool:
    return isinstance(answer, Failure) and answer.code == code


async def quietly(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
