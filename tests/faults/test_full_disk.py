"""No space is left: while emitting, while claiming, while writing results; and then there is some again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hookwright import Dispatcher, NewEvent, Response, SQLiteStorage, StorageFull
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.faults.processes import integrity, look

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright._models import Health

ENOUGH = 2**30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.db"


class Disk:
    """How much the file may grow."""

    def __init__(self, storage: SQLiteStorage) -> None:
        self._storage = storage

    async def fill(self) -> None:
        """Leave no page more than there are; what is free within them stays."""
        await self._limit(1)

    async def free(self) -> None:
        await self._limit(ENOUGH)

    async def _limit(self, pages: int) -> None:
        # SQLite takes no less than what the file has.
        assert self._storage._owner is not None
        await self._storage._owner.call(
            lambda database: database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        )


async def healthy(dispatcher: Dispatcher) -> bool:
    return (await dispatcher.health()).state == "healthy"


def named(health: Health, what: str) -> bool:
    return health.state == "degraded" and any(what in one and "StorageFull" in one for one in health.problems)


async def test_a_disk_that_is_full_while_emitting_refuses_the_event_whole(path: Path) -> None:
    storage, transport = SQLiteStorage(path), FakeTransport()
    disk = Disk(storage)
    async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
        for number in range(5):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=10)
        await disk.fill()
        with pytest.raises(StorageFull, match="free space and repeat"):
            await dispatcher.emit("video.big", "x" * 200_000)
        with pytest.raises(StorageFull):
            await dispatcher.emit_many([NewEvent("video.small"), NewEvent("video.big", "x" * 200_000)])
        assert named(await dispatcher.health(), "an event could not be stored")
        await disk.free()
        await dispatcher.emit("video.big", "x" * 200_000)
        await dispatcher.drain(timeout=10)
        assert await healthy(dispatcher)
    assert look(path, "SELECT count(*), sum(state = 'succeeded') FROM hookwright_delivery") == [(10, 10)]
    assert look(path, "SELECT count(*) FROM hookwright_event") == [(2,)]
    assert len(transport.requests) == 10
    assert integrity(path) == "ok"


async def test_a_disk_that_is_full_while_claiming_leases_nothing_and_the_worker_goes_on_by_itself(path: Path) -> None:
    storage, transport, endpoints = SQLiteStorage(path), FakeTransport(), 200
    disk = Disk(storage)
    async with Dispatcher(SQLiteStorage(path), transport=transport, keys=[], deliver=False) as emitting:
        for number in range(endpoints):
            await emitting.endpoints.create(f"{URL}/{number}", events=["*"])
        async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
            await disk.fill()
            await emitting.emit("video.ready")
            await until(lambda: _named_by(dispatcher, "deliveries cannot be claimed"))
            health = await dispatcher.health()
            assert (health.leased, health.in_flight, len(transport.requests)) == (0, 0, 0)
            await disk.free()
            await until(lambda: len(transport.requests) == endpoints)
            await dispatcher.drain(timeout=10)
            assert await healthy(dispatcher)
    rows = look(path, "SELECT state, attempt_count, interruptions FROM hookwright_delivery")
    assert rows == [("succeeded", 1, 0)] * endpoints
    assert integrity(path) == "ok"


async def test_results_that_find_the_disk_full_are_kept_in_their_slots_and_written_when_there_is_space(
    path: Path,
) -> None:
    storage, concurrency, endpoints = SQLiteStorage(path), 8, 20
    hanging = FakeTransport()

    async def answer(request: object) -> Response:
        await hanging.hang(request)  # type: ignore[arg-type]  # it looks at nothing of it
        return Response(200, body=b"x" * 16_000)

    transport, disk = FakeTransport(answer), Disk(storage)
    async with Dispatcher(storage, transport=transport, concurrency=concurrency, keys=[]) as dispatcher:
        for number in range(endpoints):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == concurrency // 2)
        await disk.fill()
        hanging.release()
        await until(lambda: _named_by(dispatcher, "results wait to be written"))
        await until(lambda: _is_stuck(dispatcher))
        sent, health = len(transport.requests), await dispatcher.health()
        assert sent <= concurrency
        assert (health.in_flight, health.leased) == (sent, sent)
        assert look(path, "SELECT count(*) FROM hookwright_attempt") == [(0,)]
        await disk.free()
        await until(lambda: len(transport.requests) == endpoints)
        await dispatcher.drain(timeout=10)
        assert await healthy(dispatcher)
    rows = look(path, "SELECT state, attempt_count, interruptions FROM hookwright_delivery")
    assert rows == [("succeeded", 1, 0)] * endpoints
    assert integrity(path) == "ok"


async def _named_by(dispatcher: Dispatcher, what: str) -> bool:
    return named(await dispatcher.health(), what)


async def _is_stuck(dispatcher: Dispatcher) -> bool:
    health = await dispatcher.health()
    return health.in_flight == dispatcher._deliverer._unwritten
