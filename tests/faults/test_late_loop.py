"""A loop that stands still: what no longer is covered by its lease is given back, and nothing is done twice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from hookwright import Dispatcher, SQLiteStorage
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until
from tests.faults.points import Points, faulty_storage
from tests.faults.processes import integrity, look

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright import Request

ENDPOINTS = 20
LEASE = 27.0
TIMEOUT_AND_MARGIN = 15.0 + 5.0


def stand_still(clock: VirtualClock, seconds: float) -> None:
    """Let time pass in which the loop runs nothing."""
    clock._move_to(clock.now() + round(seconds * 1e6))


@pytest.mark.parametrize("seconds", [1.0, 10.0, 60.0])
async def test_a_loop_that_stands_still_between_claim_and_request_gives_back_what_its_leases_do_not_cover(
    seconds: float, tmp_path: Path
) -> None:
    clock, points, path = VirtualClock(), Points(), tmp_path / "hooks.db"

    def first_blocks(request: Request) -> int:
        if len(transport.requests) == 1:
            stand_still(clock, seconds)
        return 200

    transport = FakeTransport(first_blocks)
    storage = faulty_storage(SQLiteStorage(path), points)
    async with Dispatcher(storage, transport=transport, clock=clock, lease=LEASE, keys=[]) as dispatcher:
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=10)
        health = await dispatcher.health()
        assert (health.state, health.pending, health.lost_leases, health.problems) == ("healthy", 0, 0, ())
    covered = seconds <= LEASE - TIMEOUT_AND_MARGIN
    assert points.passed.count("release") == (0 if covered else ENDPOINTS - 1)
    assert points.passed.count("claim") <= 2 + ENDPOINTS
    _once_each(path, transport)


@pytest.mark.parametrize("seconds", [1.0, 10.0, 60.0])
async def test_answers_that_came_while_the_loop_stood_still_count_whatever_the_leases_say(
    seconds: float, tmp_path: Path
) -> None:
    clock, points, path, hanging = VirtualClock(), Points(), tmp_path / "hooks.db", FakeTransport()
    transport = FakeTransport(hanging.hang)
    storage = faulty_storage(SQLiteStorage(path), points)
    async with Dispatcher(storage, transport=transport, clock=clock, lease=LEASE, keys=[]) as dispatcher:
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == ENDPOINTS)
        hanging.release()
        stand_still(clock, seconds)
        await dispatcher.drain(timeout=10)
        health = await dispatcher.health()
        assert (health.state, health.pending, health.lost_leases, health.problems) == ("healthy", 0, 0, ())
    assert points.passed.count("release") == 0
    assert points.passed.count("claim") <= 2 + ENDPOINTS
    _once_each(path, transport)


def _once_each(path: Path, transport: FakeTransport) -> None:
    assert Counter(request.url for request in transport.requests) == {f"{URL}/{n}": 1 for n in range(ENDPOINTS)}
    rows = look(path, "SELECT state, attempt_count, interruptions, budget_from FROM hookwright_delivery")
    assert rows == [("succeeded", 1, 0, 0)] * ENDPOINTS
    assert integrity(path) == "ok"
