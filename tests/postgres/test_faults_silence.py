"""A network that swallows everything: it is noticed, and all goes on by itself when it is back."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import CommitUnknown, Dispatcher, NewEvent
from hookwright.storage.postgres import PostgresStorage, _emits, _listener, _pool
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

NOTICED = 15.0
SCALE = 20
"""The limits are so many times shorter here."""


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (_pool, "CONNECT_LIMIT"),
        (_pool, "ANSWER_LIMIT"),
        (_pool, "TRANSACTION_LIMIT"),
        (_listener, "CONNECT_LIMIT"),
        (_listener, "PING_INTERVAL"),
        (_listener, "PING_LIMIT"),
        (_emits, "PATIENCE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) / SCALE)


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_dsn) as running:
        yield running


@asynccontextmanager
async def running(proxy: Proxy, schema: str, **options: Any) -> AsyncIterator[tuple[Dispatcher, FakeTransport]]:
    transport = FakeTransport()
    storage = PostgresStorage(proxy.dsn, schema=schema)
    async with Dispatcher(storage, transport=transport, keys=[], **options) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await asyncio.gather(*(dispatcher.emit("video.ready", number) for number in range(20)))
        if options.get("deliver", True):
            await dispatcher.drain()
        yield dispatcher, transport


def drop(proxy: Proxy) -> None:
    proxy.to_server.drop()
    proxy.to_client.drop()


def flow(proxy: Proxy) -> None:
    proxy.to_server.flow()
    proxy.to_client.flow()


def test_whatever_is_half_open_is_noticed_within_fifteen_seconds() -> None:
    assert _listener.PING_INTERVAL + _listener.PING_LIMIT < NOTICED
    assert _pool.TRANSACTION_LIMIT < NOTICED  # connecting is a part of it
    kernel = _pool._KEEP_ALIVE
    assert kernel["TCP_KEEPIDLE"] + kernel["TCP_KEEPINTVL"] * kernel["TCP_KEEPCNT"] < NOTICED
    assert kernel["TCP_USER_TIMEOUT"] < NOTICED * 1000


async def test_every_connection_is_kept_alive(proxy: Proxy, postgres_schema: str) -> None:
    async with running(proxy, postgres_schema) as (dispatcher, _):
        opened: Any = dispatcher._storage
        connections = [*opened._open.pool._made.values(), opened._open.listener._connection]
        assert len(connections) >= 2
        for connection in connections:
            one = connection._transport.get_extra_info("socket")
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5


@pytest.mark.usefixtures("short_limits")
async def test_all_goes_on_when_what_was_dropped_flows_again(proxy: Proxy, postgres_schema: str) -> None:
    async with running(proxy, postgres_schema) as (dispatcher, transport):
        opened: Any = dispatcher._storage
        before = opened._open.listener._connection
        drop(proxy)
        emitting = asyncio.ensure_future(dispatcher.emit("video.ready", "while it is gone"))
        dropped = time.monotonic()
        await until(lambda: opened._open.listener._connection is not before)
        assert time.monotonic() - dropped < NOTICED / SCALE + 1
        with pytest.raises(CommitUnknown) as raised:  # it was sent, and nobody can be asked
            await emitting
        assert (await dispatcher.health()).state == "degraded"
        flow(proxy)
        flowing = time.monotonic()
        receipt = await dispatcher.emit("video.ready", "after it")
        assert receipt.delivery_count == 1
        again = await dispatcher.emit("video.ready", "while it is gone", event_id=raised.value.event_id)
        assert not again.duplicate  # what was swallowed never came
        await until(lambda: len(transport.requests) == 22)
        assert time.monotonic() - flowing < 2


EMITS: list[tuple[str, str, Callable[[Dispatcher], Awaitable[object]]]] = [
    ("TRANSACTION_LIMIT", "ANSWER_LIMIT", lambda dispatcher: dispatcher.emit("video.ready")),  # one statement
    ("ANSWER_LIMIT", "TRANSACTION_LIMIT", lambda dispatcher: dispatcher.emit_many([NewEvent("video.ready")])),  # BEGIN
]


@pytest.mark.parametrize(("name", "other", "emit"), EMITS)
@pytest.mark.usefixtures("short_limits")
async def test_one_silent_connection_is_enough_to_suspect_all(
    proxy: Proxy,
    postgres_schema: str,
    name: str,
    other: str,
    emit: Callable[[Dispatcher], Awaitable[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_emits, "PATIENCE", 5.0)
    monkeypatch.setattr(_listener, "PING_INTERVAL", 60.0)
    monkeypatch.setattr(_pool, name, 1.0)
    monkeypatch.setattr(_pool, other, 5.0)
    async with running(proxy, postgres_schema, deliver=False) as (dispatcher, _):
        opened: Any = dispatcher._storage
        await asyncio.gather(*(dispatcher.deliveries.count() for _ in range(3)))
        assert len(opened._open.pool._made) >= 3
        # What there is now stays silent for ever; what is new works.
        drop(proxy)
        silent = set(opened._open.pool._made)
        emitting = asyncio.ensure_future(emit(dispatcher))
        began = time.monotonic()
        await until(lambda: not silent & set(opened._open.pool._made))
        assert time.monotonic() - began < 2.0  # and not one after the other
        flow(proxy)
        await emitting


@pytest.mark.parametrize("how", ["dropped", "refused"])
async def test_closing_in_an_outage_ends_within_a_second(proxy: Proxy, postgres_schema: str, how: str) -> None:
    async with running(proxy, postgres_schema, shutdown_timeout=0.3) as (dispatcher, _):
        if how == "dropped":
            drop(proxy)
        else:
            await proxy.refuse()
            proxy.reset()
        emits = [asyncio.ensure_future(dispatcher.emit("video.ready", number)) for number in range(3)]
        await asyncio.wait(emits, timeout=0.1)
        began = time.monotonic()
        await dispatcher.aclose()
        took = time.monotonic() - began
        assert took < 0.3 + 1.3
        answers = await asyncio.wait_for(asyncio.gather(*emits, return_exceptions=True), 2)
        assert all(isinstance(answer, Exception) for answer in answers)
