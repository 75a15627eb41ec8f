"""Every statement of a whole life, from migration to close: whatever fails there, nothing is lost or half-done."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest

from hookwright import DeliveryState, Dispatcher, HookwrightError, Profile, Receipt, RetryPolicy, SQLiteStorage
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL
from tests.faults.points import Points, raising, sqlite_error, statements

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.points import Strike

PROFILES = {"default": Profile(retry=RetryPolicy.schedule(0, 1, 1))}
EVENTS = 4
PARTS = 4


class Life(NamedTuple):
    """What a life acknowledged, and what its receivers saw."""

    receipts: list[Receipt]
    transport: FakeTransport


async def _live(path: Path, points: Points) -> Life:
    """Migrate, subscribe, emit, claim, send, settle, retry, sweep, prune, close: as far as it gets."""
    clock, transport = VirtualClock(), FakeTransport([200, 503, 200])
    receipts: list[Receipt] = []
    with statements(points):
        dispatcher = Dispatcher(
            SQLiteStorage(path),
            transport=transport,
            clock=clock,
            profiles=PROFILES,
            retention=timedelta(days=1),
            shutdown_timeout=0.2,
        )
        try:
            await dispatcher.start()
        except HookwrightError:
            return Life([], transport)
        try:
            for number in range(2):
                with suppress(HookwrightError):
                    await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
            for number in range(EVENTS):
                with suppress(HookwrightError):
                    receipts.append(await dispatcher.emit("video.ready", number, event_id=f"evt_{number}"))
            await clock.advance(40)
            endpoints = list(await _unless_it_fails(dispatcher))
            if endpoints:
                with suppress(HookwrightError):
                    await dispatcher.endpoints.disable(endpoints[0])
            await clock.advance(timedelta(days=2))
        finally:
            await dispatcher.aclose()
    return Life(receipts, transport)


async def _unless_it_fails(dispatcher: Dispatcher) -> list[str]:
    with suppress(HookwrightError):
        return [endpoint.id for endpoint in await dispatcher.endpoints.list()]
    return []


async def _recover(path: Path, life: Life) -> None:
    """Start anew without faults: what was acknowledged is there whole, and everything ends."""
    clock = VirtualClock()
    async with Dispatcher(SQLiteStorage(path), transport=life.transport, clock=clock, profiles=PROFILES) as dispatcher:
        await clock.advance(timedelta(days=1), settle=dispatcher.drain)
        rows = list(await dispatcher.deliveries.list(limit=100))
        assert all(row.state is not DeliveryState.PENDING for row in rows), rows
        sent = {(dict(request.headers)["webhook-id"], request.url) for request in life.transport.requests}
        for receipt in life.receipts:
            reached = sum(event_id == receipt.event_id for event_id, _ in sent)
            skipped = sum(row.event_id == receipt.event_id and row.state is DeliveryState.SKIPPED for row in rows)
            assert reached + skipped >= receipt.delivery_count, receipt
        assert (await dispatcher.health()).state == "healthy"
        receipt = await dispatcher.emit("video.ready")
        await dispatcher.drain()
        assert receipt.delivery_count <= 2
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        halves = database.execute(
            "SELECT id FROM hookwright_event AS e WHERE delivery_count >"
            " (SELECT count(*) FROM hookwright_delivery WHERE event_id = e.id)"
        ).fetchall()
        assert halves == []


async def _count(path: Path) -> int:
    points = Points()
    life = await _live(path, points)
    assert [receipt.delivery_count for receipt in life.receipts] == [2] * EVENTS
    return len(points.passed)


STRIKES: dict[str, Strike] = {
    "an I/O error": raising(sqlite_error(sqlite3.SQLITE_IOERR, "disk I/O error")),
    "a full disk": raising(sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full")),
}


@pytest.mark.parametrize("what", STRIKES)
@pytest.mark.parametrize("part", range(PARTS))
async def test_a_fault_at_any_statement_loses_and_halves_nothing(tmp_path: Path, what: str, part: int) -> None:
    counted = await _count(tmp_path / "counted.db")
    assert counted > 100
    # At each statement one error strikes before it and another after it.
    for number in range(1 + part, counted + 1, PARTS):
        points = Points(STRIKES[what], at=number, after=bool((number + list(STRIKES).index(what)) % 2))
        path = tmp_path / f"{number}.db"
        async with asyncio.timeout(30):
            life = await _live(path, points)
            await _recover(path, life)
