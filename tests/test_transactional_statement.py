"""`emit(connection=)` on SQLite where it is one statement: it does what several do, or nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest

from hookwright import Receipt, SQLiteStorage, StorageError, ValidationFailed
from hookwright._clock import Clock
from hookwright._errors import StaleEndpoints
from hookwright._models import EndpointRow, EventRow, Key, NewDelivery
from hookwright.storage._connections import _AioSQLite, adapted
from hookwright.testing._storage_contract_base import CancelledAt
from tests.applications import ORDER, App, application, begin, explicit, plain, run
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with application(tmp_path / "app.db") as app:
        yield app


class Spoken(list[str]):
    """The statements that our adapter ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = _AioSQLite.fetch

        async def fetch(itself: _AioSQLite, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
            self.append(sql.split("(")[0])
            return await real(itself, sql, arguments)

        monkeypatch.setattr(_AioSQLite, "fetch", fetch)


IN_ONE = "INSERT INTO hookwright_emit VALUES "


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[tuple[SQLiteStorage, Path]]:
    storage = SQLiteStorage(tmp_path / "storage.db")
    await storage.open(Clock())
    for number in range(3):
        await storage.create_endpoint(EndpointRow(f"ep_{number}", URL, ("*",), 0, 0, (Key("secret"),)))
    yield storage, tmp_path / "storage.db"
    await storage.close()


async def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    async with aiosqlite.connect(path) as connection:
        return [tuple(row) for row in await connection.execute_fetchall(sql)]


def event_row(event_id: str, **more: Any) -> EventRow:
    return EventRow(event_id, "order.placed", b"{}", 5, **more)


async def test_an_event_is_one_statement_in_a_transaction_that_is_open(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with explicit(app.path) as connection:
        await begin(connection)
        await app.dispatcher.emit("order.placed", connection=connection)
        spoken = Spoken(monkeypatch)
        await app.dispatcher.emit("order.placed", connection=connection)
        assert spoken == [IN_ONE]
        await connection.commit()
        spoken.clear()
        with pytest.raises(ValidationFailed, match="begin a transaction first"):
            await app.dispatcher.emit("order.placed", connection=connection)
    async with plain(app.path) as connection:  # begins with what changes nothing, should it commit by itself
        await app.dispatcher.emit("order.placed", connection=connection)
    assert IN_ONE not in spoken
    assert len(await app.seen()) == 2


@pytest.mark.parametrize("trusted", ["ON", "OFF"])
async def test_one_statement_writes_the_rows_that_several_write(
    opened: tuple[SQLiteStorage, Path], trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, path = opened
    now = time.time_ns() // 1000
    later = now + 3_600_000_000
    revision = (await storage.changes(0)).revision
    more = {"tenant": "acme", "attributes": '{"a":1}', "trace_context": "00-1"}
    found = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr("hookwright.storage.sqlite._enqueue.in_one", lambda *_: None)
        async with explicit(path) as connection:
            await connection.execute(f"PRAGMA trusted_schema = {trusted}")
            await connection.execute("BEGIN IMMEDIATE")
            await connection.execute("UPDATE hookwright_lane SET due_at = 1 << 60")
            adapter = await adapted(connection)
            spoken = Spoken(monkeypatch)
            for number, deliveries in enumerate(
                [
                    [NewDelivery("d0", "ep_0"), NewDelivery("d1", "ep_1", skipped=True)],
                    [NewDelivery("d2", "ep_1", later), NewDelivery("d3", "ep_2", later)],
                    [NewDelivery("d4", "ep_0", later)],
                    [NewDelivery("d5", "ep_2", skipped=True)],
                    [],
                    [NewDelivery("d6", "ep_0", later), NewDelivery("d7", "ep_1", later - 1)],  # takes several
                ]
            ):
                receipt = await storage.enqueue(
                    event_row(f"evt_{number}", **more), deliveries, endpoints_revision=revision, connection=adapter
                )
                assert receipt == Receipt(f"evt_{number}", sum(not delivery.skipped for delivery in deliveries))
            assert spoken.count(IN_ONE) == (5 if fast else 0)
            tables = {}
            for table, order in (("event", "id"), ("delivery", "id"), ("lane", "endpoint_id")):
                cursor = await connection.execute(f"SELECT * FROM hookwright_{table} ORDER BY {order}")
                names = [column[0] for column in cursor.description]
                tables[table] = [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]
            await connection.rollback()
        for row in [*tables["event"], *tables["delivery"]]:
            assert row.pop("created_at") > now - 10_000_000
        for row in tables["delivery"]:
            assert (row.pop("finished_at") is not None) == (row["state"] == "skipped")
        dues = [row.pop("due_at") for row in tables["lane"]]
        assert dues[0] == pytest.approx(now >> 12, abs=100_000)  # a turn
        assert dues[1:] == [later - 1, later]
        found.append(tables)
    assert found[0] == found[1]
    assert await rows(path, "SELECT * FROM hookwright_event") == []


async def test_one_statement_backs_out_all_of_itself_and_nothing_else(opened: tuple[SQLiteStorage, Path]) -> None:
    storage, path = opened
    revision = (await storage.changes(0)).revision
    async with explicit(path) as connection:
        await connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, what TEXT)")
        await connection.execute("BEGIN")
        await connection.execute(ORDER)
        adapter = await adapted(connection)
        some = [NewDelivery("d0", "ep_0")]
        await storage.enqueue(event_row("evt_0"), some, endpoints_revision=revision, connection=adapter)
        due = await connection.execute_fetchall("SELECT due_at FROM hookwright_lane ORDER BY endpoint_id")
        repeated = [NewDelivery("d1", "ep_1"), NewDelivery("d1", "ep_2", skipped=True)]
        for event_id, deliveries in (
            ("evt_1", [NewDelivery("d1", "ep_1"), *some]),
            ("evt_1", repeated),
            ("evt_1", [repeated[0], repeated[0]]),
            ("evt_0", []),
        ):
            with pytest.raises(StorageError, match="UNIQUE"):
                await storage.enqueue(event_row(event_id), deliveries, endpoints_revision=revision, connection=adapter)
        with pytest.raises(StaleEndpoints):
            await storage.enqueue(event_row("evt_2"), [], endpoints_revision=revision - 1, connection=adapter)
        assert await connection.execute_fetchall("SELECT due_at FROM hookwright_lane ORDER BY endpoint_id") == due
        await connection.commit()
    assert await rows(path, "SELECT what FROM orders") == [("tea",)]
    assert await rows(path, "SELECT id FROM hookwright_event") == [("evt_0",)]
    assert await rows(path, "SELECT id FROM hookwright_delivery") == [("d0",)]


async def test_one_statement_takes_a_thousand_deliveries(opened: tuple[SQLiteStorage, Path]) -> None:
    storage, path = opened
    deliveries = [NewDelivery(f"d{number:04}", f"ep_{number % 3}") for number in range(1000)]
    async with explicit(path) as connection:
        await connection.execute("BEGIN")
        revision = (await storage.changes(0)).revision
        receipt = await storage.enqueue(
            event_row("evt_0"), deliveries, endpoints_revision=revision, connection=await adapted(connection)
        )
        await connection.commit()
    assert receipt.delivery_count == 1000
    found = await rows(path, "SELECT id, endpoint_id FROM hookwright_delivery ORDER BY id")
    assert found == [(delivery.id, delivery.endpoint_id) for delivery in deliveries]


async def test_one_statement_that_is_cancelled_leaves_nothing(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async with explicit(app.path) as connection:
        await begin(connection)
        await app.dispatcher.emit("order.placed", connection=connection)
        spoken = Spoken(monkeypatch)
        await run(connection, ORDER)
        assert await CancelledAt(app.dispatcher.emit("order.paid", connection=connection), 0).run()
        assert [sql.split()[0] for sql in spoken] == ["INSERT", "DELETE", "DELETE"]
        await connection.commit()
    assert await app.orders() == ["tea"]
    assert len(await app.seen()) == len(await app.seen("SELECT id FROM hookwright_delivery")) == 1


async def test_an_application_changes_its_own_tables_beside_ours(app: App) -> None:
    """SQLite looks at every trigger in the file when a table is renamed, as Alembic's batches do."""
    async with explicit(app.path) as connection:
        for sql in (
            "CREATE TABLE changed (id INTEGER PRIMARY KEY, what TEXT, more TEXT)",
            "DROP TABLE orders",
            "ALTER TABLE changed RENAME TO orders",
            "ALTER TABLE orders RENAME COLUMN more TO less",
            "ALTER TABLE orders DROP COLUMN less",
        ):
            await connection.execute(sql)
