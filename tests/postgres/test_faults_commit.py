"""A commit whose answer never comes: `emit` finds out what became of it, or says that nobody knows. Never twice."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import CommitUnknown, Dispatcher, NewEvent, StorageUnavailable
from hookwright.storage.postgres import PostgresStorage, _emits
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.proxy import Action, Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.postgres.wire import Message

CUTS = [Action.CUT_BEFORE, Action.CUT_AFTER]
PATIENCE = 0.5


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_dsn) as running:
        yield running


@asynccontextmanager
async def emitting(proxy: Proxy, schema: str, endpoints: int = 1) -> AsyncIterator[Dispatcher]:
    """A dispatcher that does not deliver: every commit is an emit's."""
    storage = PostgresStorage(proxy.dsn, schema=schema)
    async with Dispatcher(storage, transport=FakeTransport(), keys=[], deliver=False) as dispatcher:
        for number in range(endpoints):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.explain("video.ready")  # it knows the endpoints: the first emit is matched once
        yield dispatcher


async def stored(dsn: str, schema: str) -> tuple[int, int]:
    """Return how many events and deliveries there are."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = ("event", "delivery")
        events, deliveries = [await connection.fetchval(f"SELECT count(*) FROM {schema}.{table}") for table in tables]
        return events, deliveries
    finally:
        await connection.close()


def at_emits(text: str, action: Action) -> Callable[[Message], Action | None]:
    """Strike at the first statement with this text in a transaction that stores events (at BEGIN: in any)."""
    storing: set[int] = set()
    done = False

    def asked(message: Message) -> Action | None:
        nonlocal done
        if message.runs and ("INSERT INTO" in message.sql or text == "BEGIN"):
            storing.add(message.connection)
        if done or not message.runs or text not in message.sql or message.connection not in storing:
            return None
        done = True
        return action

    return asked


def unreachable_from(proxy: Proxy, text: str, action: Action) -> Callable[[Message], Action | None]:
    """Strike there, and let nothing through from then on."""
    strike, struck = at_emits(text, action), False

    def asked(message: Message) -> Action | None:
        nonlocal struck
        if struck:
            return Action.CUT_BEFORE
        struck = strike(message) is not None
        if struck:
            refusing.append(asyncio.ensure_future(proxy.refuse()))
        return action if struck else None

    refusing: list[asyncio.Future[None]] = []
    return asked


@pytest.mark.parametrize("action", CUTS)
@pytest.mark.parametrize("endpoints", [0, 2])
@pytest.mark.parametrize("named", [{}, {"idempotency_key": "k"}, {"event_id": "evt_mine"}], ids=str)
async def test_an_emit_whose_commit_is_cut_is_stored_once_and_knows_that_it_is_its_own(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, action: Action, endpoints: int, named: dict[str, Any]
) -> None:
    async with emitting(proxy, postgres_schema, endpoints) as dispatcher:
        proxy.on_message = at_emits("COMMIT", action)
        receipt = await dispatcher.emit("video.ready", 1, **named)
        assert (receipt.delivery_count, receipt.duplicate) == (endpoints, False)
        again = await dispatcher.emit("video.ready", 1, event_id=receipt.event_id)
        assert again.duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, endpoints)


@pytest.mark.parametrize("action", CUTS)
async def test_emits_that_are_stored_together_and_cut_are_each_stored_once(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, action: Action
) -> None:
    async with emitting(proxy, postgres_schema) as dispatcher:
        await dispatcher.emit("video.ready", "before", idempotency_key="before")
        proxy.on_message = at_emits("COMMIT", action)
        emits = [dispatcher.emit("video.ready", number, idempotency_key=f"{number}") for number in range(50)]
        first, *receipts = await asyncio.gather(
            dispatcher.emit("video.ready", "before", idempotency_key="before"), *emits
        )
        assert first.duplicate
        assert not any(receipt.duplicate for receipt in receipts)
        proxy.on_message = at_emits("COMMIT", action)
        many = await dispatcher.emit_many([NewEvent("video.ready", number) for number in range(3)])
        assert [receipt.duplicate for receipt in many] == [False] * 3
    assert await stored(postgres_dsn, postgres_schema) == (54, 54)


@pytest.mark.parametrize("action", CUTS)
async def test_when_nobody_can_be_asked_it_says_so_and_the_event_can_be_given_again(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, action: Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_emits, "PATIENCE", PATIENCE)
    async with emitting(proxy, postgres_schema) as dispatcher:
        proxy.on_message = unreachable_from(proxy, "COMMIT", action)
        began = time.monotonic()
        with pytest.raises(CommitUnknown) as raised:
            await dispatcher.emit("video.ready", 1)
        assert PATIENCE <= time.monotonic() - began < PATIENCE + 2
        there = int(action is Action.CUT_AFTER)
        await until(lambda: _is_stored(postgres_dsn, postgres_schema, there))
        proxy.on_message = None
        await proxy.accept()
        receipt = await dispatcher.emit("video.ready", 1, event_id=raised.value.event_id)
        assert receipt.duplicate == (action is Action.CUT_AFTER)
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


@pytest.mark.parametrize("many", [False, True])
async def test_each_of_several_is_told_its_own_id(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    monkeypatch.setattr(_emits, "PATIENCE", PATIENCE)
    async with emitting(proxy, postgres_schema) as dispatcher:
        proxy.on_message = unreachable_from(proxy, "COMMIT", Action.CUT_AFTER)
        ids = [f"evt_{number}" for number in range(5)]
        if many:
            with pytest.raises(CommitUnknown) as raised:
                await dispatcher.emit_many([NewEvent("video.ready", event_id=id) for id in ids])
            assert raised.value.event_id == ids[0]
        else:
            emits = [dispatcher.emit("video.ready", event_id=id) for id in ids]
            told = await asyncio.gather(*emits, return_exceptions=True)
            assert [getattr(error, "event_id", error) for error in told] == ids
        proxy.on_message = None
        await proxy.accept()
        again = [await dispatcher.emit("video.ready", event_id=id) for id in ids]
        assert all(receipt.duplicate for receipt in again)
    assert await stored(postgres_dsn, postgres_schema) == (5, 5)


@pytest.mark.parametrize("text", ["BEGIN", "INSERT INTO"])
async def test_what_never_came_to_a_commit_is_not_stored_and_says_so(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_emits, "PATIENCE", PATIENCE)
    async with emitting(proxy, postgres_schema) as dispatcher:
        proxy.on_message = unreachable_from(proxy, text, Action.CUT_AFTER)
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            await dispatcher.emit("video.ready", 1)
        assert PATIENCE <= time.monotonic() - began < PATIENCE + 2
        assert await stored(postgres_dsn, postgres_schema) == (0, 0)
        proxy.on_message = None
        await proxy.accept()
        assert not (await dispatcher.emit("video.ready", 1)).duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


async def test_a_commit_that_arrives_late_is_waited_for(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks, and the server has not yet read what it was sent last."""
    async with emitting(proxy, postgres_schema) as dispatcher:
        other = await asyncpg.connect(postgres_dsn)
        try:
            await other.execute(f"BEGIN; LOCK TABLE {postgres_schema}.wake IN ACCESS EXCLUSIVE MODE")
            proxy.on_message = at_emits("COMMIT", Action.CUT_AFTER)
            emit = asyncio.ensure_future(dispatcher.emit("video.ready", 1))
            await until(lambda: any("INSERT INTO" in message.sql for message in proxy.messages))
            await other.execute("COMMIT")
            assert not (await emit).duplicate
        finally:
            other.terminate()
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


async def _is_stored(dsn: str, schema: str, events: int) -> bool:
    return (await stored(dsn, schema))[0] == events
