"""`emit(connection=)` on PostgreSQL: the event is in the caller's transaction, and nowhere else before that commits."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from hookwright import (
    ConflictError,
    DeliveryState,
    Dispatcher,
    NewEvent,
    NotFound,
    StorageUnavailable,
    ValidationFailed,
)
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.application import DRIVERS, KINDS, App, Caller, application, engine_of
from tests.postgres.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@pytest.fixture
async def app(postgres_dsn: str, postgres_schema: str) -> AsyncIterator[App]:
    async with application(postgres_dsn, postgres_schema) as app:
        await app.dispatcher.endpoints.create(URL, events=["order.*"])
        yield app


@pytest.fixture(params=KINDS)
async def caller(request: pytest.FixtureRequest, app: App) -> AsyncIterator[Caller]:
    async with KINDS[request.param](app.dsn) as opened:
        yield opened


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not notified does not hear."""
    monkeypatch.setattr("hookwright.storage.postgres._POLL", 60)
    monkeypatch.setattr("hookwright.storage.postgres._POLL_LISTENING", 60)


# -- commit and rollback ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nobody_looks")
async def test_an_event_is_seen_and_sent_when_the_transaction_commits_and_not_before(app: App, caller: Caller) -> None:
    delays = []
    for count in range(7):
        await caller.begin()
        await caller.run(app.order)
        receipt = await app.dispatcher.emit("order.placed", {"n": count}, connection=caller.connection)
        assert (receipt.delivery_count, receipt.duplicate, receipt.durable) == (1, False, False)
        assert (len(await app.events()), await app.orders(), len(app.sent())) == (count, count, count)
        with pytest.raises(NotFound):
            await app.dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        began = time.perf_counter()
        await caller.commit()
        await app.delivered(receipt.event_id)
        delays.append(time.perf_counter() - began)
    assert min(delays) < 0.05  # nobody looks within a minute; and others use the machine, too
    assert await app.orders() == 7


async def test_what_is_rolled_back_never_was(app: App, caller: Caller) -> None:
    await caller.begin()
    await caller.run(app.order)
    first = await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
    again = await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
    assert (again.event_id, again.duplicate, again.durable) == (first.event_id, True, False)
    await caller.rollback()
    assert (await app.rows(), await app.orders()) == (0, 0)
    later = await app.dispatcher.emit("order.placed", {"another": 1}, idempotency_key="k")
    assert not later.duplicate
    await app.delivered(later.event_id)
    assert app.sent() == [later.event_id]


async def test_a_savepoint_takes_back_what_was_emitted_in_it(app: App, caller: Caller) -> None:
    emit, connection = app.dispatcher.emit, caller.connection
    await caller.begin()
    first = await emit("order.placed", connection=connection)
    for number, kept in enumerate((False, True)):
        await caller.run(f"SAVEPOINT mine_{number}")
        await emit("order.paid", event_id=f"evt_{kept}", connection=connection)
        await app.dispatcher.emit_many([NewEvent("order.sent", event_id=f"evt_many_{kept}")] * 2, connection=connection)
        await caller.run(f"{'RELEASE' if kept else 'ROLLBACK TO'} SAVEPOINT mine_{number}")
    await caller.commit()
    expected = {first.event_id, "evt_True", "evt_many_True"}
    assert set(await app.events()) == expected
    await app.delivered(*expected)
    assert len(app.sent()) == 3


async def test_a_conflict_leaves_the_transaction_as_it_was(app: App, caller: Caller) -> None:
    emit, connection = app.dispatcher.emit, caller.connection
    used = await emit("order.placed", {"n": 1}, idempotency_key="k")
    await caller.begin()
    await caller.run(app.order)
    again = await emit("order.placed", {"n": 1}, idempotency_key="k", connection=connection)
    assert (again.event_id, again.duplicate) == (used.event_id, True)
    with pytest.raises(ConflictError):
        await emit("order.placed", {"n": 2}, idempotency_key="k", connection=connection)
    with pytest.raises(ConflictError):
        await app.dispatcher.emit_many(
            [NewEvent("order.paid"), NewEvent("order.placed", {"n": 2}, idempotency_key="k")], connection=connection
        )
    receipts = await app.dispatcher.emit_many([NewEvent("order.paid"), NewEvent("order.sent")], connection=connection)
    assert await app.dispatcher.emit_many([], connection=connection) == []
    await caller.run(app.order)
    await caller.commit()
    ids = [receipt.event_id for receipt in receipts]
    assert (set(await app.events()), await app.orders()) == ({used.event_id, *ids}, 2)
    assert [receipt.durable for receipt in receipts] == [False, False]
    await app.delivered(*ids)


# -- waking -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nobody_looks")
async def test_what_another_process_commits_is_heard(app: App) -> None:
    async with app.another(deliver=False) as emitting, KINDS["asyncpg"](app.dsn) as caller:
        await caller.begin()
        receipt = await emitting.emit("order.placed", connection=caller.connection)
        await caller.commit()
        await app.delivered(receipt.event_id)


async def test_those_that_only_look_find_it_within_a_second(app: App) -> None:
    transport = FakeTransport()
    await app.dispatcher.aclose()
    async with (
        app.another(poll_only=True, transport=transport),
        app.another(poll_only=True, deliver=False) as emitting,
        KINDS["psycopg"](app.dsn) as caller,
    ):
        receipt = await emitting.emit("order.placed", connection=caller.connection)
        began = time.perf_counter()
        await caller.commit()
        await app.delivered(receipt.event_id, transport=transport)
        assert time.perf_counter() - began < 1


# -- what is stored -----------------------------------------------------------------------------------------------


async def test_later_skipped_and_unwanted_events(app: App) -> None:
    off = await app.dispatcher.endpoints.create(URL, events=["off"])
    await app.dispatcher.endpoints.disable(off.id)
    at = datetime.now(UTC) + timedelta(hours=1)
    async with KINDS["asyncpg"](app.dsn) as caller:
        await caller.begin()
        emit, connection = app.dispatcher.emit, caller.connection
        later = await emit("order.later", deliver_at=at, connection=connection)
        skipped = await emit("off", connection=connection)
        unwanted = await emit("other", connection=connection)
        only = await emit("any", endpoint_id=off.id, connection=connection)
        await caller.commit()
    counts = [receipt.delivery_count for receipt in (later, skipped, unwanted, only)]
    assert counts == [1, 0, 0, 0]
    assert await app.query("SELECT state FROM delivery ORDER BY state") == ["pending", "skipped", "skipped"]
    [delivery] = (await app.dispatcher.deliveries.list(event_id=later.event_id)).items
    assert delivery.next_attempt_at == at
    last = await app.dispatcher.emit("order.now")
    await app.delivered(last.event_id)
    assert app.sent() == [last.event_id]


async def test_what_was_for_an_endpoint_that_is_deleted_before_the_commit_is_cancelled(app: App) -> None:
    async with KINDS["asyncpg"](app.dsn) as caller:
        await caller.begin()
        receipt = await app.dispatcher.emit("order.placed", connection=caller.connection)
        [endpoint] = (await app.dispatcher.endpoints.list()).items
        async with asyncio.timeout(2):
            await app.dispatcher.endpoints.delete(endpoint.id)
        await caller.commit()
    [delivery] = await app.dispatcher.deliveries.wait(receipt.event_id, timeout=10)
    assert delivery.state == DeliveryState.CANCELLED
    assert app.sent() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_an_emit_is_one_statement_and_the_first_one_two(kind: str, app: App) -> None:
    async with Proxy(app.dsn) as proxy, KINDS[kind](proxy.dsn) as caller:

        async def statements(emits: int = 1, key: str | None = None) -> int:
            proxy.messages.clear()
            if emits == 1:
                await app.dispatcher.emit("order.placed", idempotency_key=key, connection=caller.connection)
            else:
                await app.dispatcher.emit_many([NewEvent("order.placed")] * emits, connection=caller.connection)
            # Once for each connection asyncpg asks what arrays are.
            own = ("BEGIN", "set_config('jit'", "typeinfo_tree")
            ran = [message.sql for message in proxy.messages if message.runs]
            return sum(not any(text in sql for text in own) for sql in ran)

        await app.dispatcher.emit("order.placed")  # it knows the endpoint now
        await caller.begin()
        await caller.run("SELECT 1")
        assert [await statements(key="k"), await statements(), await statements(5)] == [3, 1, 4]
        assert await statements(key="k") == 2
        await caller.commit()
        await caller.begin()
        await caller.run("SELECT 1")
        assert await statements() == 1
        await caller.rollback()


# -- refusals -------------------------------------------------------------------------------------------------------


async def test_a_connection_without_a_transaction_of_its_own_is_refused(app: App) -> None:
    async def refused(connection: object) -> None:
        with pytest.raises(ValidationFailed, match="begin a transaction first"):
            await app.dispatcher.emit("order.placed", connection=connection)

    for kind in ("asyncpg", "asyncpg-pool"):
        async with KINDS[kind](app.dsn) as caller:
            await refused(caller.connection)
    async with await psycopg.AsyncConnection.connect(app.dsn, autocommit=True) as connection:
        await refused(connection)
        async with connection.transaction():
            kept = await app.dispatcher.emit("order.placed", connection=connection)
    for driver in ("asyncpg", "psycopg"):
        async with engine_of(app.dsn, driver, isolation_level="AUTOCOMMIT") as engine, engine.connect() as wrapped:
            await refused(wrapped)
    assert await app.events() == [kept.event_id]


async def test_a_wrong_argument_is_refused_before_the_transaction_is_touched(app: App) -> None:
    async with KINDS["psycopg"](app.dsn) as caller:
        with pytest.raises(ValidationFailed):
            await app.dispatcher.emit("", connection=caller.connection)
        with pytest.raises(NotFound):
            await app.dispatcher.emit("order.placed", endpoint_id="ep_none", connection=caller.connection)
        assert caller.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_connection_that_cannot_be_used_is_refused(app: App) -> None:
    given: dict[str, Any] = {}
    for kind in KINDS:
        async with KINDS[kind](app.dsn) as caller:
            given[kind] = caller.connection
            if kind.startswith("connection"):
                given[f"{kind} not started"] = caller.connection.engine.connect()
    expected = {"asyncpg": "is closed", "psycopg": "is closed", "asyncpg-pool": "released back to the pool"}
    for kind, connection in given.items():
        if not kind.startswith("session"):  # that connects again
            advice = expected.get(kind, "has not been started" if "not" in kind else "it cannot be used")
            with pytest.raises(StorageUnavailable if advice == "is closed" else ValidationFailed, match=advice):
                await app.dispatcher.emit("order.placed", connection=connection)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_session_that_cannot_connect_is_told_so(app: App, driver: str) -> None:
    async with Proxy(app.dsn) as proxy:
        await proxy.refuse()
        async with engine_of(proxy.dsn, driver) as engine, AsyncSession(engine) as session:
            with pytest.raises(StorageUnavailable, match="your session cannot connect"):
                await app.dispatcher.emit("order.placed", connection=session)


@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_connection_to_another_database_is_refused_and_left_usable(
    kind: str, app: App, postgres_database: str
) -> None:
    async def refused() -> None:
        async with KINDS[kind](postgres_database) as caller:
            await caller.begin()
            await caller.run("CREATE TABLE mine (n int)")
            with pytest.raises(ValidationFailed, match="must be in one database"):
                await app.dispatcher.emit("order.placed", connection=caller.connection)
            await caller.run("DROP TABLE mine")
            await caller.commit()

    await refused()  # no schema at all
    beside = await asyncpg.connect(postgres_database)
    await beside.execute("CREATE TABLE taken (n int)")  # so that the numbers of tables differ
    await beside.close()
    storage = PostgresStorage(postgres_database, schema=app.schema)
    async with Dispatcher(storage, transport=FakeTransport(), keys=[], deliver=False):
        await refused()  # one of the same name


async def test_the_schema_may_have_any_name(postgres_database: str, new_schema: Callable[[], str]) -> None:
    async with application(postgres_database, new_schema()) as other:  # another dispatcher's, in the same database
        await other.dispatcher.endpoints.create(URL, events=["*"])
        async with (
            application(postgres_database, "Mine, not 'yours' %s") as app,
            KINDS["psycopg"](app.dsn) as caller,
        ):
            await app.dispatcher.endpoints.create(URL, events=["*"])
            for kind in DRIVERS:
                async with KINDS[kind](app.dsn) as caller:
                    await caller.begin()
                    receipt = await app.dispatcher.emit("order.placed", connection=caller.connection)
                    await caller.commit()
                    await app.delivered(receipt.event_id)
            assert len(await app.events()) == 3
        assert await other.events() == []


async def test_sqlite_and_postgres_do_not_mix(app: App) -> None:
    async with (
        Dispatcher("memory:", transport=FakeTransport()) as memory,
        KINDS["psycopg"](app.dsn) as caller,
    ):
        with pytest.raises(ValidationFailed, match="lives in no database"):
            await memory.emit("order.placed", connection=caller.connection)
        with pytest.raises(ValidationFailed, match=r"is not known: give aiosqlite.*asyncpg.*psycopg.*SQLAlchemy"):
            await app.dispatcher.emit("order.placed", connection=object())


async def test_nothing_is_watched(app: App) -> None:
    before = asyncio.all_tasks()
    async with KINDS["psycopg"](app.dsn) as caller:
        await app.dispatcher.emit("order.placed", connection=caller.connection)
        await until(lambda: asyncio.all_tasks() <= before)
