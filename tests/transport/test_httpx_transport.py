"""HttpxTransport keeps the transport contract, and what it promises besides: idle pools, inner transports, words."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from hookwright import ConfigurationError, Failure, HttpxTransport, NetworkPolicy, Request, Response, Transport
from hookwright.testing import TransportContract
from hookwright.testing._transport_contract_base import GOOD, HOST, OPEN, good, loopback, receiving, serving, trusting
from hookwright.transport._pinned import PinnedTransport
from tests.transport.answers import code, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hookwright.transport._resolver import Resolver


class TestHttpxTransport(TransportContract):
    def make_transport(
        self, *, network: NetworkPolicy, ssl_context: ssl.SSLContext, resolver: Resolver | None = None
    ) -> Transport:
        return HttpxTransport(network=network, ssl_context=ssl_context, resolver=resolver)


def request(url: str, **changes: Any) -> Request:
    usual = Request(url, (("x-test", "1"),), b'{"a":1}', endpoint_id="ep_1", revision=1, total_timeout=5.0)
    return usual._replace(**changes)


@asynccontextmanager
async def transporting(**options: Any) -> AsyncIterator[HttpxTransport]:
    inner = PinnedTransport(options.pop("policy", OPEN), **{"resolver": loopback} | options)
    transport = HttpxTransport(inner, network=NetworkPolicy.delegated())
    try:
        yield transport
    finally:
        await transport.aclose()


async def test_a_pool_that_nothing_was_sent_to_is_closed_without_another_send() -> None:
    async with receiving(good) as receiver, transporting(pool_idle=0.05) as transport:
        assert code(await transport.send(request("http://127.0.0.1:1024/"))) == "connect_error"  # a user that has left
        assert status(await transport.send(request(receiver.url()))) == 200
        await receiver.saw_one_close()


async def test_the_least_recently_used_idle_pool_makes_room() -> None:
    async with receiving(good) as receiver, transporting(pools_most=2) as transport:
        for endpoint_id in ("a", "b", "a", "c", "a"):
            await transport.send(request(receiver.url(), endpoint_id=endpoint_id))
        assert receiver.connections == 3  # `a` was kept when `c` came
        await transport.send(request(receiver.url(), endpoint_id="b"))
        assert receiver.connections == 4


async def test_a_certificate_nobody_vouches_for_is_a_tls_error_with_our_own_context() -> None:
    async with receiving(good, serving()) as receiver, transporting() as transport:
        answer = await transport.send(request(receiver.url()))
        assert code(answer) == "tls_error"
        assert isinstance(answer, Failure)
        assert answer.detail.startswith("certificate verify failed: ")


async def test_a_certificate_for_another_host_is_told_in_our_own_words() -> None:
    async with receiving(good, serving("other.example")) as receiver, transporting(ssl_context=trusting()) as transport:
        answer = await transport.send(request(receiver.url()))
        assert answer == Failure("tls_error", "the certificate is for another host")


async def test_a_tls_context_that_cannot_be_built_fails_the_attempt_and_is_built_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(**given: bool) -> ssl.SSLContext:
        raise PermissionError("s3cret")

    context = trusting()
    async with receiving(good, serving()) as receiver, transporting() as transport:
        monkeypatch.setattr(httpx2, "create_ssl_context", unreadable)
        assert await transport.send(request(receiver.url())) == Failure("tls_error", "no TLS context (PermissionError)")
        monkeypatch.setattr(httpx2, "create_ssl_context", lambda **given: context)
        assert status(await transport.send(request(receiver.url()))) == 200


async def test_a_source_address_asks_no_executor_and_reaches_its_own_family_only() -> None:
    policy = NetworkPolicy(allow_http=True, allow_loopback=True, local_address="127.0.0.7")
    before = set(threading.enumerate())
    async with receiving(good) as receiver, transporting(policy=policy) as transport:
        assert status(await transport.send(request(receiver.url()))) == 200
        assert code(await transport.send(request(receiver.url("[::1]"), revision=2))) == "connect_error"
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (RuntimeError("hook s3cret"), "the resolver failed (RuntimeError)"),
        ([f"127.0.0.{number}" for number in range(100)], "the name has more than 64 addresses"),
        ([], "the name has no address"),
    ],
    ids=["no such name", "a bug", "many", "none"],
)
async def test_a_dns_error_says_what_the_matter_is(found: Exception | list[str], detail: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        if isinstance(found, Exception):
            raise found
        return found

    async with transporting(resolver=resolve) as transport:
        assert await transport.send(request(f"http://{HOST}/")) == Failure("dns_error", detail)


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
    for transport, expected in ((mocked, 418), (served, 201)):
        answer = await transport.send(request("https://hooks.example/"))
        assert isinstance(answer, Response)
        assert answer == Response(expected, answer.headers, b'{"a":1}')
        await transport.aclose()


async def test_httpx2s_own_transport_sends_over_sockets() -> None:
    async with receiving(good) as receiver:
        transport = HttpxTransport(httpx2.AsyncHTTPTransport(trust_env=False), network=NetworkPolicy.delegated())
        answer = await transport.send(request(receiver.url("127.0.0.1")))
        assert isinstance(answer, Response)
        assert GOOD.endswith(answer.body)
        await transport.aclose()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx2.ConnectTimeout("x"), "connect_timeout"),
        (httpx2.ReadTimeout("x"), "timeout"),
        (httpx2.ConnectError("x"), "connect_error"),
        (httpx2.ProxyError("403 Forbidden"), "connect_error"),
        (httpx2.RemoteProtocolError("x"), "protocol_error"),
        (httpx2.ReadError("x"), "connect_error"),
        (RuntimeError("x"), "transport_error"),
    ],
)
async def test_what_an_inner_transport_raises_becomes_a_failure(error: Exception, expected: str) -> None:
    def raising(request: httpx2.Request) -> httpx2.Response:
        raise error

    answer = await HttpxTransport(httpx2.MockTransport(raising), network=NetworkPolicy.delegated()).send(
        request("https://hooks.example/")
    )
    assert code(answer) == expected


def test_another_inner_transport_must_say_that_addresses_are_not_ours_to_check() -> None:
    inner = httpx2.MockTransport(lambda request: httpx2.Response(200))
    for network in (None, OPEN):
        with pytest.raises(ConfigurationError, match=r"NetworkPolicy\.delegated\(\)"):
            HttpxTransport(inner, network=network)
    with pytest.raises(ConfigurationError, match="delegated"):
        HttpxTransport(network=NetworkPolicy.delegated())
    with pytest.raises(ConfigurationError, match="leave them out"):
        HttpxTransport(inner, network=NetworkPolicy.delegated(), ssl_context=ssl.create_default_context())
