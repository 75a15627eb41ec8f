"""`emit(connection=)` on PostgreSQL beside other transactions, at every isolation level, and when it fails."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import ConflictError, NewEvent, StorageBusy, StorageError, StorageUnavailable
from tests.conftest import URL, until
from tests.postgres.application import DRIVERS, KINDS, App, Caller, application
from tests.postgres.proxy import Action, Proxy, at_statement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CANARY = "in-no-message"
LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]


@pytest.fixture
async def app(postgres_dsn: str, postgres_schema: str) -> AsyncIterator[App]:
    async with application(postgres_dsn, postgres_schema) as app:
        await app.dispatcher.endpoints.create(URL, events=["order.*"])
        yield app


@contextlib.asynccontextmanager
async def begun(app: App, kind: str = "asyncpg", isolation: str | None = None) -> AsyncIterator[Caller]:
    """One whose transaction has its snapshot."""
    async with KINDS[kind](app.dsn) as caller:
        await caller.begin(isolation)
        await caller.run("SET LOCAL deadlock_timeout = '50ms'")
        await caller.run(f'SELECT * FROM "{app.schema}".orders')
        yield caller


def state_of(error: BaseException) -> Any:
    return getattr(error.__cause__, "sqlstate", None)


# -- snapshots that are old ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("isolation", LEVELS)
async def test_an_endpoint_that_the_snapshot_does_not_show_is_not_missed(app: App, kind: str, isolation: str) -> None:
    async with app.another(deliver=False) as another, begun(app, kind, isolation) as caller, asyncio.timeout(5):
        await another.endpoints.create(URL, events=["order.*"])  # which our cache does not know
        first = await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        await app.dispatcher.endpoints.create(URL, events=["order.*"])
        await app.dispatcher.emit("order.known")  # our cache is newer than the snapshot
        second = await app.dispatcher.emit("order.placed", connection=caller.connection)
        [third, fourth] = await app.dispatcher.emit_many([NewEvent("order.placed")] * 2, connection=caller.connection)
        twice = await app.dispatcher.emit_many(
            [NewEvent("order.placed", event_id="evt_twice")] * 2, connection=caller.connection
        )
        again = await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        receipts = [first, second, third, fourth, *twice]
        assert [receipt.delivery_count for receipt in receipts] == [2, 3, 3, 3, 3, 3]
        assert (again.event_id, again.duplicate) == (first.event_id, True)
        await caller.commit()
    await app.delivered(*(receipt.event_id for receipt in receipts))


@pytest.mark.parametrize("kind", DRIVERS)
async def test_an_endpoint_created_by_another_process_just_before_is_not_missed(app: App, kind: str) -> None:
    async with app.another(deliver=False) as another, begun(app, kind) as caller:
        await another.endpoints.create(URL, events=["order.*"])
        receipt = await app.dispatcher.emit("order.placed", connection=caller.connection)
        assert receipt.delivery_count == 2
        await caller.rollback()
    assert await app.rows() == 0


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("isolation", LEVELS)
async def test_a_key_that_the_snapshot_does_not_show_ends_the_transaction(app: App, kind: str, isolation: str) -> None:
    async with begun(app, kind, isolation) as caller:
        await app.dispatcher.emit("order.placed", idempotency_key="k")
        with pytest.raises(StorageBusy, match="repeat yours") as caught:
            await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        assert state_of(caught.value) == "40001"
        with pytest.raises(StorageError, match="25P02"):
            await app.dispatcher.emit("order.placed", connection=caller.connection)
        await caller.rollback()
        await caller.begin()
        receipt = await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        assert receipt.duplicate
        await caller.rollback()


# -- transactions that are left open -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "mine"])
async def test_a_transaction_left_open_holds_up_nobody(app: App, key: str | None) -> None:
    emit, endpoints = app.dispatcher.emit, app.dispatcher.endpoints
    async with begun(app) as open_one, begun(app, "psycopg", LEVELS[1]) as other, asyncio.timeout(5):
        first = await emit("order.placed", {"n": 1}, idempotency_key=key, connection=open_one.connection)
        receipts = [await emit("order.placed", idempotency_key=f"{n}") for n in range(3)]
        receipts += await app.dispatcher.emit_many([NewEvent("order.placed")] * 3)
        receipts.append(await emit("order.placed", idempotency_key="others", connection=other.connection))
        await other.commit()
        for receipt in receipts:
            await app.dispatcher.deliveries.wait(receipt.event_id, timeout=5)  # claimed, sent and settled
        [endpoint] = (await endpoints.list()).items
        for change in (endpoints.disable, endpoints.enable):
            await change(endpoint.id)
        await endpoints.create(URL, events=["other"])
        assert await app.waiting() == 0
        await open_one.commit()
    await app.delivered(first.event_id)


async def test_what_waits_for_a_key_holds_up_nothing_but_itself(app: App) -> None:
    [endpoint] = (await app.dispatcher.endpoints.list()).items
    async with begun(app, isolation="REPEATABLE READ") as caller:
        await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        plain = [asyncio.create_task(app.dispatcher.emit("order.placed", idempotency_key="k")) for _ in range(5)]
        await until(lambda: _is_waiting(app, 3))
        async with asyncio.timeout(2):  # a lock is waited for for 5 s
            receipt = await app.dispatcher.emit("order.paid", endpoint_id=endpoint.id, connection=caller.connection)
        await caller.commit()
        assert all(receipt.duplicate for receipt in await asyncio.gather(*plain))
    await app.delivered(receipt.event_id)


async def _is_waiting(app: App, number: int) -> bool:
    return await app.waiting() >= number


@pytest.mark.parametrize("kind", DRIVERS)
async def test_two_that_use_the_same_keys_in_opposite_order_end(app: App, kind: str) -> None:
    async def place(caller: Caller, keys: str, meet: asyncio.Barrier) -> str:
        for key in keys:
            try:
                await app.dispatcher.emit("order.placed", idempotency_key=key, connection=caller.connection)
            except StorageBusy as error:
                await caller.rollback()
                return str(state_of(error))
            if key == keys[0]:
                await meet.wait()
        await caller.commit()
        return "done"

    meet = asyncio.Barrier(2)
    async with begun(app, kind) as one, begun(app, kind) as two, asyncio.timeout(5):
        ends = await asyncio.gather(place(one, "ab", meet), place(two, "ba", meet))
    assert sorted(ends) == ["40P01", "done"]
    assert len(await app.events()) == 2


async def test_two_that_emit_to_the_same_endpoints_in_opposite_order_do_not_wait(app: App) -> None:
    for name in ("a", "b"):
        await app.dispatcher.endpoints.create(URL, events=[name])
    emit = app.dispatcher.emit
    async with begun(app) as one, begun(app, "psycopg") as two, asyncio.timeout(5):
        for mine, yours in (("a", "b"), ("b", "a")):
            await emit(mine, connection=one.connection)
            await emit(yours, connection=two.connection)
            await app.dispatcher.emit_many([NewEvent(mine), NewEvent(yours)], connection=one.connection)
        assert await app.waiting() == 0
        await two.commit()
        await one.commit()
    await until(lambda: len(app.sent()) == 8)


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_lock_that_is_not_given_is_told_with_the_drivers_error(app: App, kind: str) -> None:
    async with begun(app) as holding, begun(app, kind) as caller:
        await app.dispatcher.emit("order.placed", idempotency_key="k", connection=holding.connection)
        await caller.run("SET LOCAL lock_timeout = '50ms'")
        with pytest.raises(StorageBusy, match=r"another transaction holds the lock.*55P03") as caught:
            await app.dispatcher.emit("order.placed", idempotency_key="k", connection=caller.connection)
        assert state_of(caught.value) == "55P03"
        await caller.rollback()
        await holding.rollback()
    assert await app.rows() == 0


@pytest.mark.parametrize("kind", DRIVERS)
async def test_several_that_fail_take_back_only_themselves(app: App, kind: str) -> None:
    async with begun(app) as holding, begun(app, kind) as caller:
        await app.dispatcher.emit("order.placed", idempotency_key="k", connection=holding.connection)
        await caller.run(app.order)
        await caller.run("SET LOCAL lock_timeout = '50ms'")
        with pytest.raises(StorageBusy, match="another transaction holds the lock"):
            await app.dispatcher.emit_many(
                [NewEvent("order.paid"), NewEvent("order.placed", idempotency_key="k")], connection=caller.connection
            )
        kept = await app.dispatcher.emit("order.placed", connection=caller.connection)
        await caller.commit()
    await app.delivered(kept.event_id)
    assert (await app.events(), await app.orders()) == ([kept.event_id], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_connection_that_is_lost_in_the_middle_is_told(app: App, kind: str, action: Action) -> None:
    async with Proxy(app.dsn) as proxy:
        with contextlib.suppress(Exception):  # leaving a connection that is lost
            async with KINDS[kind](proxy.dsn) as caller:
                await caller.begin()
                await caller.run(app.order)
                proxy.on_message = at_statement("emit_1", action)
                with pytest.raises(StorageUnavailable) as caught:
                    await app.dispatcher.emit("order.placed", {"n": CANARY}, connection=caller.connection)
                assert caught.value.__cause__ is not None
                assert CANARY not in str(caught.value)
    assert caught.value is not None
    await until(lambda: _has_nothing(app))


async def _has_nothing(app: App) -> bool:
    return (await app.rows(), await app.orders()) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_emitted_is_in_no_message(app: App, kind: str) -> None:
    await app.query("ALTER TABLE event ADD CONSTRAINT ours CHECK (type <> 'order.bad')")
    await app.dispatcher.emit("order.placed", {"n": 1}, idempotency_key=f"k {CANARY}", tenant=CANARY)
    for type, kind_of_error, key in (("order.bad", StorageError, "a"), ("order.placed", ConflictError, "k")):
        async with begun(app, kind) as caller:
            with pytest.raises(kind_of_error) as caught:
                await app.dispatcher.emit(
                    type, {"data": CANARY}, idempotency_key=f"{key} {CANARY}", connection=caller.connection
                )
            assert CANARY not in str(caught.value)
            assert state_of(caught.value) in {"23514", None}
            await caller.rollback()
