"""`emit(connection=)`: the event is in the caller's transaction, and nowhere else before that commits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from hookwright import (
    ConflictError,
    Dispatcher,
    EventEmitted,
    NewEvent,
    NotFound,
    StorageBusy,
    StorageError,
    ValidationFailed,
)
from hookwright.storage.sqlite._callers import _LOOK_MOST
from hookwright.storage.sqlite._schema import resets_the_log_safely
from hookwright.testing import FakeTransport
from hookwright.testing._storage_contract_base import CancelledAt
from tests.applications import CONNECTIONS, ORDER, App, application, begin, explicit, immediate, plain, run, session_of
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Finish = Callable[[], Awaitable[None]]


CANARY = "in-no-exception"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with application(tmp_path / "app.db") as app:
        yield app


@pytest.fixture(params=CONNECTIONS)
async def connection(request: pytest.FixtureRequest, app: App) -> AsyncIterator[Any]:
    async with CONNECTIONS[request.param](app.path) as opened:
        yield opened


# -- commit and rollback ------------------------------------------------------------------------------------------


async def test_an_event_is_seen_and_sent_when_the_transaction_commits_and_not_before(app: App, connection: Any) -> None:
    await begin(connection)
    await run(connection, ORDER)
    receipt = await app.dispatcher.emit("order.placed", {"what": "tea"}, connection=connection)
    assert (receipt.delivery_count, receipt.duplicate, receipt.durable) == (1, False, False)
    assert await app.seen() == []
    assert await app.orders() == []
    with pytest.raises(NotFound):
        await app.dispatcher.deliveries.wait(receipt.event_id, timeout=5)
    await connection.commit()
    assert await app.seen() == [receipt.event_id]
    await app.delivered(receipt.event_id)
    [delivery] = await app.dispatcher.deliveries.wait(receipt.event_id, timeout=5)
    assert delivery.state == "succeeded"


async def test_what_is_rolled_back_never_was(app: App, connection: Any) -> None:
    await begin(connection)
    await run(connection, ORDER)
    await app.dispatcher.emit("order.placed", connection=connection)
    await connection.rollback()
    assert await app.seen() == []
    assert await app.seen("SELECT id FROM hookwright_delivery") == []
    assert await app.orders() == []
    last = await app.dispatcher.emit("order.placed")  # and the lock is free
    await app.delivered(last.event_id)
    assert app.sent() == [last.event_id]


async def test_closing_without_a_commit_is_a_rollback(app: App) -> None:
    for opened in CONNECTIONS.values():
        async with opened(app.path) as connection:
            await begin(connection)
            await app.dispatcher.emit("order.placed", connection=connection)
    await until(lambda: not app.dispatcher._emitter._watching)
    assert await app.seen() == []


@pytest.mark.parametrize("kind", ["aiosqlite explicit", "connection"])
async def test_a_savepoint_takes_back_what_was_emitted_in_it(app: App, kind: str) -> None:
    async with CONNECTIONS[kind](app.path) as connection:
        await begin(connection)
        first = await app.dispatcher.emit("order.placed", connection=connection)
        await run(connection, "SAVEPOINT mine")
        await app.dispatcher.emit("order.paid", connection=connection)
        await run(connection, "ROLLBACK TO mine")
        await run(connection, "RELEASE mine")
        await run(connection, "SAVEPOINT mine")
        last = await app.dispatcher.emit("order.sent", connection=connection)
        await run(connection, "RELEASE mine")
        await connection.commit()
    assert await app.seen() == [first.event_id, last.event_id]
    await app.delivered(first.event_id, last.event_id)
    assert len(app.sent()) == 2


async def test_a_nested_transaction_of_sqlalchemy_takes_back_what_was_emitted_in_it(app: App) -> None:
    engine = immediate(create_async_engine(f"sqlite+aiosqlite:///{app.path}"))
    async with AsyncSession(engine) as session, session.begin():
        with contextlib.suppress(ZeroDivisionError):
            async with session.begin_nested():
                await app.dispatcher.emit("order.placed", connection=session)
                raise ZeroDivisionError
        async with session.begin_nested():
            kept = await app.dispatcher.emit("order.placed", connection=session)
    await engine.dispose()
    assert await app.seen() == [kept.event_id]


async def test_several_events_are_in_one_transaction_all_or_none(app: App, connection: Any) -> None:
    await begin(connection)
    await run(connection, ORDER)
    await app.dispatcher.emit("order.placed", {"n": 1}, event_id="evt_mine", connection=connection)
    with pytest.raises(ConflictError):
        await app.dispatcher.emit_many(
            [NewEvent("order.paid"), NewEvent("order.placed", {"n": 2}, event_id="evt_mine")], connection=connection
        )
    receipts = await app.dispatcher.emit_many([NewEvent("order.paid"), NewEvent("order.sent")], connection=connection)
    await connection.commit()
    ids = [receipt.event_id for receipt in receipts]
    assert [receipt.durable for receipt in receipts] == [False, False]
    assert await app.seen() == sorted(["evt_mine", *ids])
    await app.delivered("evt_mine", *ids)


# -- waking -------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_the_watch_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks as seldom as at a transaction that takes its time; the look four times a second comes too late."""
    monkeypatch.setattr("hookwright.storage.sqlite._POLL", 60)
    monkeypatch.setattr("hookwright.storage.sqlite._callers._LOOK_FIRST", _LOOK_MOST)


@pytest.mark.usefixtures("only_the_watch_wakes")
async def test_delivery_begins_within_50_ms_of_the_commit(app: App, connection: Any) -> None:
    delays = []
    for _ in range(10):
        await begin(connection)
        receipt = await app.dispatcher.emit("order.placed", connection=connection)
        began = time.perf_counter()
        await connection.commit()
        await app.delivered(receipt.event_id)
        delays.append(time.perf_counter() - began)
    assert sorted(delays)[4] < 0.05  # not the worst: others use the machine, too


@pytest.mark.usefixtures("only_the_watch_wakes")
async def test_transactions_without_a_pause_between_them_are_delivered_one_by_one(app: App) -> None:
    async with aiosqlite.connect(app.path, isolation_level=None) as connection:
        await connection.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            receipt = await app.dispatcher.emit("order.placed", connection=connection)
            await connection.executescript("BEGIN")  # commits first: both at once
            await app.delivered(receipt.event_id)


async def test_the_watch_ends_although_the_driver_has_begun_the_next_transaction(app: App) -> None:
    async with aiosqlite.connect(app.path, isolation_level=None) as connection:
        await connection.execute("BEGIN IMMEDIATE")
        receipt = await app.dispatcher.emit("order.placed", connection=connection)
        await connection.executescript("BEGIN")  # as with Python 3.12's autocommit=False
        await app.delivered(receipt.event_id)
        await until(lambda: not app.dispatcher._emitter._watching)
        assert connection.in_transaction


async def test_a_transaction_is_watched_by_one_task_which_ends_with_it(app: App, connection: Any) -> None:
    await begin(connection)
    for _ in range(5):
        await app.dispatcher.emit("order.placed", connection=connection)
    assert len(app.dispatcher._emitter._watching) == 1
    await connection.rollback()
    await until(lambda: not app.dispatcher._emitter._watching)


async def test_what_nobody_wants_is_not_watched(app: App) -> None:
    async with app.another(deliver=False) as another, aiosqlite.connect(app.path) as connection:
        [endpoint] = (await another.endpoints.list()).items
        await another.endpoints.delete(endpoint.id)
        receipt = await another.emit("order.placed", connection=connection)
        assert receipt.delivery_count == 0
        assert not another._emitter._watching
        await connection.commit()
    assert await app.seen() == [receipt.event_id]


async def test_closing_leaves_no_task_behind_while_a_transaction_is_open(app: App) -> None:
    before = asyncio.all_tasks()
    async with aiosqlite.connect(app.path) as connection:
        another = app.another()
        async with another:
            receipt = await another.emit("order.placed", connection=connection)
        assert asyncio.all_tasks() <= before
        await connection.commit()
    await app.delivered(receipt.event_id)


async def test_the_watch_does_not_keep_a_connection_alive(app: App) -> None:
    connection = await aiosqlite.connect(app.path)
    await app.dispatcher.emit("order.placed", connection=connection)
    connection.stop()  # what it warns of when it is forgotten
    connection._connection = None
    known = weakref.ref(connection)
    del connection
    gc.collect()
    assert known() is None
    await until(lambda: not app.dispatcher._emitter._watching)


async def test_what_a_process_that_does_not_deliver_commits_is_delivered_by_another(app: App) -> None:
    async with app.another(deliver=False) as emitting, aiosqlite.connect(app.path) as connection:
        receipt = await emitting.emit("order.placed", connection=connection)
        await connection.commit()
        await app.delivered(receipt.event_id)


async def test_observers_hear_of_an_event_when_its_rows_are_in_the_transaction(app: App, connection: Any) -> None:
    await begin(connection)
    heard: list[Any] = []
    app.dispatcher.observe(heard.append, EventEmitted)
    receipt = await app.dispatcher.emit("order.placed", connection=connection)
    assert [observation.event_id for observation in heard] == [receipt.event_id]
    await connection.rollback()


# -- matching, keys, refusals ---------------------------------------------------------------------------------------


async def test_an_endpoint_created_by_another_process_just_before_is_not_missed(app: App, connection: Any) -> None:
    async with app.another(deliver=False) as another:
        await another.endpoints.create(f"{URL}/new", events=["order.*"])
        await begin(connection)
        receipt = await app.dispatcher.emit("order.placed", connection=connection)
        assert receipt.delivery_count == 2
        await connection.commit()
    await app.delivered(receipt.event_id)


async def test_an_endpoint_that_is_not_known_yet_is_found_while_a_plain_emit_waits_for_the_lock(
    app: App,
) -> None:
    async with app.another(deliver=False) as another:
        await another.endpoints.create(f"{URL}/new", events=["order.*"])
    async with aiosqlite.connect(app.path) as connection:
        await connection.execute(ORDER)
        waiting = asyncio.create_task(app.dispatcher.emit("order.placed"))
        await asyncio.sleep(0)
        async with asyncio.timeout(3):
            receipt = await app.dispatcher.emit("order.placed", connection=connection)
        await connection.commit()
    assert receipt.delivery_count == (await waiting).delivery_count == 2


async def test_the_same_key_is_a_duplicate_within_a_transaction_and_across_them(app: App, connection: Any) -> None:
    await begin(connection)
    first = await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key="k", connection=connection)
    again = await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key="k", connection=connection)
    await connection.commit()
    later = await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key="k")
    assert (again.event_id, again.duplicate, again.durable) == (first.event_id, True, False)
    assert (later.event_id, later.duplicate, later.durable) == (first.event_id, True, True)
    await app.delivered(first.event_id)


async def test_a_key_that_was_rolled_back_was_not_used(app: App, connection: Any) -> None:
    await begin(connection)
    await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key="k", connection=connection)
    await connection.rollback()
    receipt = await app.dispatcher.emit("order.placed", {"n": 2}, idempotency_key="k")
    assert not receipt.duplicate


async def test_a_conflict_leaves_the_transaction_as_it_was(app: App, connection: Any) -> None:
    await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key="k")
    await begin(connection)
    await run(connection, ORDER)
    with pytest.raises(ConflictError):
        await app.dispatcher.emit("order.placed", {"n": 2}, idempotency_key="k", connection=connection)
    kept = await app.dispatcher.emit("order.paid", connection=connection)
    await run(connection, ORDER)
    await connection.commit()
    assert await app.orders() == ["tea", "tea"]
    assert len(await app.seen()) == 2
    await app.delivered(kept.event_id)


@pytest.mark.parametrize("table", ["event", "delivery"])
async def test_what_fails_midway_leaves_nothing_of_ours(app: App, connection: Any, table: str) -> None:
    await app.seen(  # something between event and deliveries that fails
        f"CREATE TRIGGER broken BEFORE INSERT ON hookwright_{table} BEGIN SELECT RAISE(FAIL, 'no'); END"
    )
    await begin(connection)
    await run(connection, ORDER)
    with pytest.raises(StorageError, match="no") as caught:
        await app.dispatcher.emit("order.placed", {"data": CANARY}, connection=connection)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    await connection.commit()
    assert await app.orders() == ["tea"]
    assert await app.seen() == []


async def test_an_emit_that_is_cancelled_anywhere_leaves_the_transaction_usable(app: App) -> None:
    reached, number = True, 0
    async with aiosqlite.connect(app.path) as connection:
        while reached:
            await connection.execute(ORDER)
            reached = await CancelledAt(
                app.dispatcher.emit("order.placed", event_id=f"evt_{number}", connection=connection), number
            ).run()
            number += 1
            await connection.commit()
        halves = "SELECT count(*) FROM hookwright_event WHERE id NOT IN (SELECT event_id FROM hookwright_delivery)"
        assert [row[0] for row in await connection.execute_fetchall(halves)] == [0]
    assert number > 6
    assert await app.orders() == ["tea"] * number
    assert f"evt_{number - 1}" in await app.seen()


async def test_a_wrong_argument_is_refused_before_the_transaction_is_touched(app: App) -> None:
    async with aiosqlite.connect(app.path) as connection:
        with pytest.raises(ValidationFailed):
            await app.dispatcher.emit("", connection=connection)
        with pytest.raises(NotFound):
            await app.dispatcher.emit("order.placed", endpoint_id="ep_none", connection=connection)
        assert not connection.in_transaction


async def test_a_connection_without_a_transaction_of_its_own_is_refused(app: App) -> None:
    async with aiosqlite.connect(app.path, isolation_level=None) as connection:
        with pytest.raises(ValidationFailed, match="begin a transaction first"):
            await app.dispatcher.emit("order.placed", connection=connection)
    engine = create_async_engine(f"sqlite+aiosqlite:///{app.path}", isolation_level="AUTOCOMMIT")
    async with engine.connect() as wrapped:
        with pytest.raises(ValidationFailed, match="begin a transaction first"):
            await app.dispatcher.emit("order.placed", connection=wrapped)
    await engine.dispose()
    assert await app.seen() == []


async def test_a_connection_to_another_file_is_refused(app: App, tmp_path: Path) -> None:
    async with app.another() as dispatcher:
        for path in (tmp_path / "other.db", ":memory:"):
            async with aiosqlite.connect(path) as connection:
                await connection.execute("CREATE TABLE hookwright_meta (key, value)")
                with pytest.raises(ValidationFailed, match="one file"):
                    await dispatcher.emit("order.placed", connection=connection)
        link = tmp_path / "link.db"
        link.symlink_to(app.path)
        async with aiosqlite.connect(link) as connection:
            await dispatcher.emit("order.placed", connection=connection)
            await connection.rollback()


async def test_memory_has_no_transaction_to_emit_in(app: App) -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher, aiosqlite.connect(app.path) as given:
        with pytest.raises(ValidationFailed, match="lives in no database"):
            await dispatcher.emit("order.placed", connection=given)
        with pytest.raises(ValidationFailed, match="lives in no database"):
            await dispatcher.emit_many([NewEvent("order.placed"), NewEvent("order.paid")], connection=given)
        with pytest.raises(ValidationFailed, match="is not known"):
            await dispatcher.emit("order.placed", connection=object())


# -- one writer at a time -------------------------------------------------------------------------------------------


async def test_a_transaction_that_read_too_early_is_told_to_begin_immediate(tmp_path: Path) -> None:
    app = App(tmp_path / "quiet.db", FakeTransport())
    async with app.another(deliver=False) as dispatcher, explicit(app.path) as connection:
        await connection.execute("BEGIN")
        await connection.execute_fetchall("SELECT * FROM sqlite_master")
        await dispatcher.emit("order.paid")
        with pytest.raises(StorageBusy, match=r"somebody else has written.*BEGIN IMMEDIATE"):
            await dispatcher.emit("order.placed", connection=connection)
        assert connection.in_transaction
    assert len(await app.seen()) == 1


async def test_a_transaction_that_has_read_and_meets_a_writer_is_told_to_begin_immediate(app: App) -> None:
    async with explicit(app.path) as writing, session_of(app.path) as session, plain(app.path) as connection:
        await begin(writing)
        await connection.execute("BEGIN")
        await connection.execute_fetchall("SELECT * FROM orders")
        await session.execute(text("BEGIN"))
        await session.execute(text("SELECT * FROM orders"))
        for reading in (connection, session):
            with pytest.raises(StorageBusy, match=r"another writer.*BEGIN IMMEDIATE"):
                await app.dispatcher.emit("order.placed", connection=reading)
        await writing.rollback()


async def test_a_plain_emit_in_ones_own_transaction_says_to_pass_the_connection(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hookwright.storage.sqlite._owner.BUSY_LIMIT", 0.3)  # it would take 5 s
    async with aiosqlite.connect(app.path) as connection:
        await connection.execute(ORDER)
        with pytest.raises(StorageBusy, match=r"your own open transaction.*connection="):
            await app.dispatcher.emit("order.placed")
        await connection.rollback()


async def test_everything_works_while_the_application_writes_to_the_same_file(app: App) -> None:
    stop = asyncio.Event()

    async def write(connection: aiosqlite.Connection) -> int:
        count = 0
        while not stop.is_set():
            await connection.execute(ORDER)
            await connection.execute(ORDER)
            await connection.commit()
            count += 2
        return count

    async with aiosqlite.connect(app.path) as one, aiosqlite.connect(app.path) as two:
        writers = [asyncio.create_task(write(one)), asyncio.create_task(write(two))]
        receipts = []
        for number in range(20):
            await app.dispatcher.endpoints.create(f"{URL}/{number}", events=["other"])
            receipts.append(await app.dispatcher.emit("order.placed", {"n": number}))
            async with aiosqlite.connect(app.path) as connection:
                receipts.append(await app.dispatcher.emit("order.paid", connection=connection))
                await connection.commit()
        await app.delivered(*(receipt.event_id for receipt in receipts))
        stop.set()
        written = sum(await asyncio.gather(*writers))
    assert len(await app.orders()) == written
    assert len(await app.seen()) == 40
    assert (await app.dispatcher.health()).problems == ()


async def test_an_sqlite_with_the_wal_bug_is_warned_of_once_and_checkpoints_are_ours(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = "hookwright.storage.sqlite._schema"
    for safe in (False, True):
        monkeypatch.setattr(f"{schema}.resets_the_log_safely", lambda safe=safe: safe)
        caplog.clear()
        async with app.another(deliver=False) as dispatcher, plain(app.path) as one, plain(app.path) as two:
            for connection in (one, two, one):
                await dispatcher.emit("order.placed", connection=connection)
                await connection.commit()
            kept = [row[0] for c in (one, two) for row in await c.execute_fetchall("PRAGMA wal_autocheckpoint")]
        warned = [record.getMessage() for record in caplog.records if "walresetbug" in record.getMessage()]
        assert (len(warned), kept) == ((0, [1000, 1000]) if safe else (1, [0, 0]))


@pytest.mark.parametrize(
    ("version", "safe"),
    [((3, 40, 1), False), ((3, 44, 6), True), ((3, 45, 0), False), ((3, 50, 7), True), ((3, 51, 2), False)],
)
def test_the_versions_of_sqlite_that_have_the_wal_bug_are_known(version: tuple[int, ...], safe: bool) -> None:

    assert resets_the_log_safely(version) is safe
    assert resets_the_log_safely((3, 51, 3))
    assert resets_the_log_safely((4, 0, 0))
