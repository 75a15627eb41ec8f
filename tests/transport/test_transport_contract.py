"""The transport contract finds what it is there to find: each of these transports breaks one of its promises."""

from __future__ import annotations

import asyncio
import mmap
import socket
import time
from typing import TYPE_CHECKING

import pytest

from hookwright import Failure, HttpxTransport, NetworkPolicy, Request, Response, Transport
from hookwright.testing._transport_contract_base import HOST, STALL, ContractBase, Row, Said, answers, deaf, row, says

if TYPE_CHECKING:
    import ssl

    from hookwright.transport._resolver import Resolver

EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
CLEAN = row("clean", answers(EMPTY), Said(200), closes=False)
SILENT = row("silent", deaf, "timeout", total_timeout=0.2)
TWICE = row("twice", says(EMPTY + EMPTY), Said(200))


class Honest:
    """Sends as HttpxTransport does, and may do something before and after."""

    def __init__(self, inner: HttpxTransport) -> None:
        self._inner = inner

    async def send(self, request: Request) -> Response | Failure:
        return await self._inner.send(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Busy(Honest):
    async def send(self, request: Request) -> Response | Failure:
        until = time.thread_time() + 2 * STALL
        while time.thread_time() < until:
            pass
        return await self._inner.send(request)


class Hungry(Honest):
    async def send(self, request: Request) -> Response | Failure:
        answer = await self._inner.send(request)
        del request
        with mmap.mmap(-1, 8_000_000) as taken:  # from the system: the allocator may have kept as much
            for place in range(0, len(taken), mmap.PAGESIZE):
                taken[place] = 1
        return answer


class Late(Honest):
    async def send(self, request: Request) -> Response | Failure:
        return await self._inner.send(request._replace(total_timeout=request.total_timeout + 1))


class Talkative(Honest):
    async def send(self, request: Request) -> Response | Failure:
        answer = await self._inner.send(request)
        return Failure(answer.code, f"no answer from {HOST}") if isinstance(answer, Failure) else answer


class Repeating(Honest):
    async def send(self, request: Request) -> Response | Failure:
        await self._inner.send(request)
        return await self._inner.send(request)


class Forgetful(Honest):
    async def aclose(self) -> None:
        pass


class Leaking(Honest):
    """Keeps a connection of its own for each endpoint open."""

    async def send(self, request: Request) -> Response | Failure:
        port = int(request.url.split(":")[2].split("/")[0])
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        self.left = [*getattr(self, "left", []), sock]
        return await self._inner.send(request)

    async def aclose(self) -> None:
        await self._inner.aclose()
        for sock in getattr(self, "left", []):
            sock.close()


class Broken(ContractBase):
    def __init__(self, kind: type[Honest]) -> None:
        self.kind = kind
        self.made: list[HttpxTransport] = []

    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        self.made.append(HttpxTransport(network=network, ssl_context=ssl_context, resolver=resolver))
        return self.kind(self.made[-1])


@pytest.mark.parametrize("case", [CLEAN, SILENT, TWICE], ids=str)
async def test_a_transport_that_keeps_its_promises_passes(case: Row) -> None:
    await Broken(Honest).judge(case, "https")


@pytest.mark.parametrize(
    ("kind", "case", "found"),
    [
        (Busy, CLEAN, "held the loop"),
        (Hungry, CLEAN, "grew by"),
        (Late, SILENT, "took"),
        (Talkative, SILENT, "no answer from"),
        (Repeating, CLEAN, "connections|requests"),
        (Leaking, CLEAN, "connections"),
    ],
)
async def test_a_transport_that_breaks_a_promise_fails(kind: type[Honest], case: Row, found: str) -> None:
    broken = Broken(kind)
    with pytest.raises(AssertionError, match=found):
        await broken.judge(case, "http")


async def test_a_transport_that_leaves_connections_open_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookwright.testing._transport_contract_base.PATIENCE", 0.3)
    broken = Broken(Forgetful)
    with pytest.raises(TimeoutError):
        await broken.judge(CLEAN, "http")
    for each in broken.made:
        await each.aclose()
