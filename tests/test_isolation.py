"""Isolation and scale, as exact figures: what a claim costs, and how far an endpoint is trusted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import Dispatcher, MemoryStorage, Request, Response, SQLiteStorage
from hookwright._clock import SECOND
from hookwright._worker import CLAIM_MOST
from hookwright.storage._base import SWEEP_ROWS, ClaimRequest
from hookwright.storage.sqlite import _claim, _history
from hookwright.testing import FakeTransport
from hookwright.testing._storage_contract_base import ManualClock, World
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hookwright import Failure, Storage
    from hookwright._models import Claim
    from hookwright.storage.sqlite._owner import Database


async def test_one_event_to_many_endpoints_is_one_transaction(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "hooks.db")
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False) as dispatcher:
        await asyncio.gather(*(dispatcher.endpoints.create(f"{URL}/{n}", events=["all"]) for n in range(300)))
        await dispatcher.emit("nobody.wants.it")  # which reads the endpoints
        before = storage.transactions
        receipt = await dispatcher.emit("all")
        assert receipt.delivery_count == 300
        assert storage.transactions - before == 1


def _steps(database: Database, act: Callable[[], object]) -> int:
    """Return how many steps SQLite's machine made for it."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    database.set_progress_handler(count, 1)
    act()
    database.set_progress_handler(None, 1)
    return steps


async def _steps_of_a_claim(path: Path, waiting: int) -> tuple[int, int]:
    """Return how many leases a claim gave, and how many steps SQLite's machine made for it."""
    clock, storage = ManualClock(), SQLiteStorage(path)
    await storage.open(clock)
    world = World(storage, clock)
    endpoints = [await world.endpoint() for _ in range(20)]
    for endpoint in endpoints:
        await world.enqueue(world.new_event(), *(world.new_delivery(endpoint) for _ in range(waiting)))

    def counted(database: Database) -> tuple[int, int]:
        request = ClaimRequest(16, 8, 60 * SECOND, 4, {})
        found: list[Claim] = []
        steps = _steps(database, lambda: found.append(_claim.claim(database, request, clock.now())))
        return len(found[0].leases), steps

    assert storage._owner is not None
    answer = await storage._owner.submit(counted)
    await storage.close()
    return answer


async def test_what_a_claim_costs_does_not_grow_with_what_waits(tmp_path: Path) -> None:
    few = await _steps_of_a_claim(tmp_path / "few.db", 10)
    many = await _steps_of_a_claim(tmp_path / "many.db", 1000)
    assert few == many
    assert few[0] == 8


def _steps_of_a_look(database: Database) -> int:
    return _steps(database, lambda: _history.prunable(database, 2**60, (0, "")))


async def test_what_a_look_for_old_events_costs_does_not_grow_with_what_waits(tmp_path: Path) -> None:
    clock, storage = ManualClock(), SQLiteStorage(tmp_path / "hooks.db")
    await storage.open(clock)
    world = World(storage, clock)
    endpoint, steps = await world.endpoint(), []
    for _ in range(2):
        for _ in range(10):  # events of one moment are sorted, so there must be several
            world.pass_time()
            await world.emit_many(SWEEP_ROWS // 5, endpoint)
        steps.append(await storage._read(_steps_of_a_look))
        assert await storage.prune(2**60) == 0
    await storage.close()
    assert steps[1] <= steps[0] * 1.1  # what is sorted of the last moment is not the same to the step


async def test_whatever_is_due_beyond_one_claim_follows_at_once(storage_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with Dispatcher(storage_url, transport=transport, shutdown_timeout=0) as dispatcher:
        await asyncio.gather(*(dispatcher.endpoints.create(URL, events=["*"]) for _ in range(CLAIM_MOST + 20)))
        await dispatcher.emit("all")
        await until(lambda: len(transport.requests) == CLAIM_MOST + 20)


class _Returning(FakeTransport):
    """Refuses until it is up; then keeps, for each answer in turn, the most that was in flight before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = False
        self.in_flight = self.answered = 0
        self.rooms: Counter[int] = Counter()

    async def send(self, request: Request) -> Response | Failure:
        if not self.up:
            return Response(500)
        self.in_flight += 1
        self.rooms[self.answered] = max(self.rooms[self.answered], self.in_flight)
        for _ in range(20):  # long enough for whatever else there is room for
            await asyncio.sleep(0.001)
        self.in_flight -= 1
        self.answered += 1
        return Response(200)


async def test_an_endpoint_that_comes_back_is_trusted_with_one_and_twice_as_many_for_each_success(
    storage_url: str,
) -> None:
    transport = _Returning()
    async with Dispatcher(storage_url, transport=transport, shutdown_timeout=0) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], concurrency=8)
        await dispatcher.emit("first")
        await dispatcher.drain(timeout=10)
        await dispatcher.endpoints.pause(endpoint.id)
        await asyncio.gather(*(dispatcher.emit("waiting", n) for n in range(60)))
        transport.up = True
        await dispatcher.endpoints.resume(endpoint.id)
        await until(lambda: transport.answered == 60)
    assert transport.rooms[0] == 1
    assert max(transport.rooms.values()) == 8
    assert all(most <= min(8, 2**answered) for answered, most in transport.rooms.items())


@pytest.mark.parametrize("storage", ["memory", "sqlite"])
async def test_a_lane_that_was_held_once_takes_turns_like_any_other(storage: str, tmp_path: Path) -> None:
    clock = ManualClock()
    there: Storage = MemoryStorage() if storage == "memory" else SQLiteStorage(tmp_path / "hooks.db")
    await there.open(clock)
    world = World(there, clock)
    held, other = await world.endpoint(), await world.endpoint()
    for endpoint in (held, other):
        await world.prove(endpoint)
    await world.emit(held)
    await there.release([await world.claim_one()], hold=SECOND)
    world.pass_time(60 * SECOND)
    for endpoint in (held, other):
        await world.emit_many(4, endpoint)
    served: list[Any] = []
    for _ in range(8):
        lease = await world.claim_one(limit=1)
        await world.settle(lease)
        served.append(lease.endpoint_id)
    await there.close()
    assert Counter(served[:4]) == Counter(served[4:]) == {held: 2, other: 2}
