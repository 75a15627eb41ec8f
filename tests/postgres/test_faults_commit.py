"""A commit whose answer never comes: `emit` finds out what became of it, or says that nobody knows. Never twice.

Emits that come at the same time are one statement, which is its own commit; `emit_many` is a transaction, and so is
every emit behind a pooler.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import CommitUnknown, Dispatcher, NewEvent, StorageBusy, StorageUnavailable
from hookwright.storage.postgres import PostgresStorage, _emits, _enqueue
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.cutting import waiting
from tests.postgres.proxy import Action, Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from hookwright import Receipt
    from hookwright.storage._emitted import Emitted
    from hookwright.storage.postgres._database import Database
    from tests.postgres.wire import Message

CUTS = [Action.CUT_BEFORE, Action.CUT_AFTER]
PATIENCE = 0.5
STATEMENT = "INSERT INTO"
COMMITS = {False: STATEMENT, True: "COMMIT"}
"""What commits an emit, by whether a pooler is in between."""


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_dsn) as running:
        yield running


@asynccontextmanager
async def emitting(proxy: Proxy, schema: str, endpoints: int = 1, *, pooler: bool = False) -> AsyncIterator[Dispatcher]:
    """A dispatcher that does not deliver: every commit is an emit's."""
    storage = PostgresStorage(proxy.dsn, schema=schema, poll_only=pooler)
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


def counting(
    strike: Callable[[Message], Action | None],
) -> tuple[Callable[[Message], Action | None], list[Message]]:
    """Return it, and where it struck."""
    struck: list[Message] = []

    def asked(message: Message) -> Action | None:
        action = strike(message)
        if action is not None:
            struck.append(message)
        return action

    return asked, struck


def unreachable_from(proxy: Proxy, text: str, action: Action) -> Callable[[Message], Action | None]:
    """Strike there, and let nothing through from then on."""
    strike, struck = counting(at_emits(text, action))

    def asked(message: Message) -> Action | None:
        if struck:  # but for the Sync that belongs to what was struck: without it nothing is done
            return None if message.connection == struck[0].connection else Action.CUT_BEFORE
        done = strike(message)
        if done is not None:
            refusing.append(asyncio.ensure_future(proxy.refuse()))
        return done

    refusing: list[asyncio.Future[None]] = []
    return asked


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("action", CUTS)
@pytest.mark.parametrize("endpoints", [0, 2])
@pytest.mark.parametrize("named", [{}, {"idempotency_key": "k"}, {"event_id": "evt_mine"}], ids=str)
async def test_an_emit_whose_commit_is_cut_is_stored_once_and_knows_that_it_is_its_own(
    proxy: Proxy,
    postgres_dsn: str,
    postgres_schema: str,
    pooler: bool,
    action: Action,
    endpoints: int,
    named: dict[str, Any],
) -> None:
    async with emitting(proxy, postgres_schema, endpoints, pooler=pooler) as dispatcher:
        proxy.on_message, struck = counting(at_emits(COMMITS[pooler], action))
        receipt = await dispatcher.emit("video.ready", 1, **named)
        assert (receipt.delivery_count, receipt.duplicate) == (endpoints, False)
        assert len(struck) == 1
        again = await dispatcher.emit("video.ready", 1, event_id=receipt.event_id)
        assert again.duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, endpoints)


@pytest.mark.parametrize("action", CUTS)
async def test_emits_that_are_stored_together_and_cut_are_each_stored_once(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, action: Action
) -> None:
    async with emitting(proxy, postgres_schema) as dispatcher:
        await dispatcher.emit("video.ready", "before", idempotency_key="before")
        proxy.on_message, struck = counting(at_emits(STATEMENT, action))
        emits = [dispatcher.emit("video.ready", number, idempotency_key=f"{number}") for number in range(50)]
        first, *receipts, one, other = await asyncio.gather(
            dispatcher.emit("video.ready", "before", idempotency_key="before"),
            *emits,
            dispatcher.emit("video.ready", "twins", idempotency_key="twins"),
            dispatcher.emit("video.ready", "twins", idempotency_key="twins"),
        )
        assert struck
        assert first.duplicate
        assert one.event_id == other.event_id
        assert one.duplicate != other.duplicate
        assert not any(receipt.duplicate for receipt in receipts)
        proxy.on_message, struck = counting(at_emits("COMMIT", action))
        many = await dispatcher.emit_many([NewEvent("video.ready", number) for number in range(3)])
        assert struck
        assert [receipt.duplicate for receipt in many] == [False] * 3
    assert await stored(postgres_dsn, postgres_schema) == (55, 55)


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("action", CUTS)
async def test_when_nobody_can_be_asked_it_says_so_and_the_event_can_be_given_again(
    proxy: Proxy,
    postgres_dsn: str,
    postgres_schema: str,
    pooler: bool,
    action: Action,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_emits, "PATIENCE", PATIENCE)
    async with emitting(proxy, postgres_schema, pooler=pooler) as dispatcher:
        proxy.on_message = unreachable_from(proxy, COMMITS[pooler], action)
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
        proxy.on_message = unreachable_from(proxy, COMMITS[many], Action.CUT_AFTER)
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


@pytest.mark.parametrize(
    ("where", "form"),
    [
        ("nothing can be connected to", "one"),
        ("cut at login", "one"),
        ("BEGIN", "many"),
        ("BEGIN", "pooler"),
        (STATEMENT, "many"),
        (STATEMENT, "pooler"),
    ],
)
async def test_what_never_came_to_its_commit_is_not_stored_and_says_so(
    proxy: Proxy,
    postgres_dsn: str,
    postgres_schema: str,
    where: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def emit(dispatcher: Dispatcher) -> Receipt:
        if form == "many":
            return (await dispatcher.emit_many([NewEvent("video.ready", 1)]))[0]
        return await dispatcher.emit("video.ready", 1)

    monkeypatch.setattr(_emits, "PATIENCE", PATIENCE)
    async with emitting(proxy, postgres_schema, pooler=form == "pooler") as dispatcher:
        if where in ("BEGIN", STATEMENT):
            proxy.on_message = unreachable_from(proxy, where, Action.CUT_AFTER)
        else:
            await _keep_out(proxy, dispatcher, at_login=where == "cut at login")
        await _unavailable(emit(dispatcher))
        assert await stored(postgres_dsn, postgres_schema) == (0, 0)
        proxy.on_message = None
        await proxy.accept()
        assert not (await emit(dispatcher)).duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


async def _keep_out(proxy: Proxy, dispatcher: Dispatcher, *, at_login: bool) -> None:
    """Cut every connection, and let none be made again."""
    opened: Any = dispatcher._storage
    if at_login:
        proxy.on_message = lambda message: Action.CUT_BEFORE if message.kind == "startup" else None
    else:
        await proxy.refuse()
    proxy.reset()
    await until(lambda: not opened._open.pool._made)


async def _unavailable(emitting: Awaitable[Receipt]) -> None:
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        await emitting
    assert PATIENCE <= time.monotonic() - began < PATIENCE + 2


@pytest.mark.parametrize("state", ["25006", "53200", "40001"])
async def test_a_statement_that_the_server_refuses_is_not_stored_and_says_so(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not end the connection: nobody need be asked."""
    monkeypatch.setattr(_emits, "PATIENCE", 0.1)
    async with emitting(proxy, postgres_schema) as dispatcher:
        other = await asyncpg.connect(postgres_dsn)
        try:
            await _refuse_events(other, postgres_schema, state)
            with pytest.raises(StorageBusy if state == "40001" else StorageUnavailable, match=state):
                await dispatcher.emit("video.ready", 1)
        finally:
            other.terminate()
    assert await stored(postgres_dsn, postgres_schema) == (0, 0)


async def _refuse_events(connection: asyncpg.Connection, schema: str, state: str) -> None:
    await connection.execute(
        f"CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{state}'; END$$;"
        f" CREATE TRIGGER refuse BEFORE INSERT ON {schema}.event EXECUTE FUNCTION {schema}.refuse()"
    )


async def test_what_was_stored_before_the_answer_to_another_could_not_be_read_is_its_own(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement is committed; looking up what was there before fails."""
    failing = True
    found = _enqueue._found

    async def fails_once(database: Database, missing: Sequence[Emitted]) -> dict[str, Any]:
        nonlocal failing
        if failing:
            failing = False
            await database.fetch("DO $$BEGIN RAISE EXCEPTION 'late' USING ERRCODE = '55P03'; END$$")
        return await found(database, missing)

    async with emitting(proxy, postgres_schema) as dispatcher:
        await dispatcher.emit("video.ready", "before", idempotency_key="before")
        monkeypatch.setattr(_enqueue, "_found", fails_once)
        before, new, keyed = await asyncio.gather(
            dispatcher.emit("video.ready", "before", idempotency_key="before"),
            dispatcher.emit("video.ready", "new"),
            dispatcher.emit("video.ready", "new", idempotency_key="new"),
        )
        assert not failing
        assert [before.duplicate, new.duplicate, keyed.duplicate] == [True, False, False]
    assert await stored(postgres_dsn, postgres_schema) == (3, 3)


async def test_the_same_id_twice_at_once_is_one_event_and_one_duplicate_beside_somebody_elses_lock(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str
) -> None:
    async with emitting(proxy, postgres_schema) as dispatcher:
        other = await asyncpg.connect(postgres_dsn)
        try:
            await other.execute("BEGIN")
            await dispatcher.emit("video.ready", "theirs", idempotency_key="theirs", connection=other)
            first, second, waiting = [
                asyncio.ensure_future(dispatcher.emit("video.ready", data, event_id=id, idempotency_key=key))
                for data, id, key in ((1, "evt_same", None), (1, "evt_same", None), ("theirs", None, "theirs"))
            ]
            assert [(await first).duplicate, (await second).duplicate] == [False, True]
            assert not waiting.done()
            await other.execute("COMMIT")
            assert (await waiting).duplicate
        finally:
            other.terminate()
    assert await stored(postgres_dsn, postgres_schema) == (2, 2)


@asynccontextmanager
async def held_up(
    dsn: str, schema: str, emit: Awaitable[Receipt]
) -> AsyncIterator[tuple[asyncio.Future[Receipt], asyncpg.Connection]]:
    """An emit whose statement is under way and waits for a lock, and who holds that, until he commits."""
    other = await asyncpg.connect(dsn)
    try:
        await other.execute(f"BEGIN; LOCK TABLE {schema}.wake IN ACCESS EXCLUSIVE MODE")
        under_way = asyncio.ensure_future(emit)
        await until(lambda: waiting(other, f"{schema}.wake", 1))
        yield under_way, other
    finally:
        other.terminate()


async def test_a_statement_that_is_done_late_is_waited_for(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str
) -> None:
    """The connection breaks, and the server still works on what it was sent."""
    async with emitting(proxy, postgres_schema) as dispatcher:
        asked = dispatcher.emit("video.ready", 1, idempotency_key="k")
        async with held_up(postgres_dsn, postgres_schema, asked) as (emit, other):
            proxy.reset()
            await until(lambda: waiting(other, f"{postgres_schema}.wake", 2))
            assert not emit.done()
            await other.execute("COMMIT")
            assert not (await emit).duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


async def test_closing_while_a_statement_is_under_way_says_that_nobody_knows(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str
) -> None:
    async with emitting(proxy, postgres_schema) as dispatcher:
        asked = dispatcher.emit("video.ready", 1, event_id="evt_mine")
        async with held_up(postgres_dsn, postgres_schema, asked) as (emit, _):
            storage: Any = dispatcher._storage
            await asyncio.wait_for(storage.close(), 2)
            with pytest.raises(CommitUnknown) as raised:
                await asyncio.wait_for(emit, 1)
            assert raised.value.event_id == "evt_mine"
            await dispatcher.aclose()


async def test_a_caller_that_is_cancelled_has_its_event_stored_whole(
    proxy: Proxy, postgres_dsn: str, postgres_schema: str
) -> None:
    async with emitting(proxy, postgres_schema) as dispatcher:
        asked = dispatcher.emit("video.ready", 1, event_id="evt_mine")
        async with held_up(postgres_dsn, postgres_schema, asked) as (emit, other):
            emit.cancel()
            await asyncio.wait({emit})
            assert emit.cancelled()
            await other.execute("COMMIT")
            assert (await dispatcher.emit("video.ready", 1, event_id="evt_mine")).duplicate
    assert await stored(postgres_dsn, postgres_schema) == (1, 1)


async def _is_stored(dsn: str, schema: str, events: int) -> bool:
    return (await stored(dsn, schema))[0] == events
