"""A storage that fails at the n-th call, for every n: nothing is lost, and the process heals by itself."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from hookwright import (
    DeliveryState,
    Dispatcher,
    MemoryStorage,
    Profile,
    RetryPolicy,
    StorageBusy,
    StorageError,
    StorageFull,
    WorkerFailed,
)
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL
from tests.faults.points import Points, faulty_storage, raising

if TYPE_CHECKING:
    from hookwright import Storage

PROFILES = {"default": Profile(retry=RetryPolicy.schedule(0, 1, 1, 1))}
EVENTS = 5


class Foreign(Exception):
    """What a storage of somebody else's might raise, against its contract."""


ERRORS: list[Exception] = [StorageBusy("injected"), StorageFull("injected"), Foreign("injected")]


async def _live(points: Points) -> Points:
    """Emit, deliver, retry, disable, sweep, prune, with one failure; assert that all ends well in the same process."""
    inner, clock, transport = MemoryStorage(), VirtualClock(), FakeTransport([200, 503, 200])
    dispatcher = Dispatcher(faulty_storage(inner, points), transport=transport, clock=clock, profiles=PROFILES)
    try:
        await dispatcher.start()
    except (StorageError, Foreign):
        await dispatcher.start()  # what failed to start has let go of everything, and can be started
    created = []
    for number in range(2):
        with suppress(StorageError, Foreign):
            created.append((await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])).id)
    receipts = []
    for number in range(EVENTS):
        with suppress(StorageError, Foreign):
            receipts.append(await dispatcher.emit("video.ready", number))
    await clock.advance(150)
    # Not the rows, of which one may be missing since it was never stored, but what was promised.
    for receipt in receipts:
        rows = [row for row in inner._rows.values() if row.event.id == receipt.event_id]
        assert len(rows) == receipt.delivery_count
        assert {row.state for row in rows} <= {DeliveryState.SUCCEEDED}, points
    with suppress(StorageError, Foreign):
        await dispatcher.endpoints.disable(created[0])
    with suppress(StorageError, Foreign):
        await dispatcher.events.prune(before=(await dispatcher.events.get(receipts[0].event_id)).created_at)
    await clock.advance(150)
    before, health = points.struck, await dispatcher.health()
    if not before and points.struck:  # what `health` itself met, it says
        assert health.state == "degraded"
        health = await dispatcher.health()
    assert (health.state, health.problems, health.in_flight) == ("healthy", (), 0), points
    with suppress(StorageError, Foreign):
        await dispatcher.aclose()
    await dispatcher.aclose()
    return points


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
async def test_a_storage_that_fails_at_any_call_loses_nothing_and_stops_nobody(error: Exception, after: bool) -> None:
    counted = len((await _live(Points())).passed)
    assert counted > 30
    for number in range(1, counted + 1):
        async with asyncio.timeout(20):
            points = await _live(Points(raising(error), at=number, after=after))
        assert points.struck or after  # what fails by itself, as a stale emit does, has no after


class Broken:
    """Lets verbs through, or not."""

    def __init__(self, *verbs: str) -> None:
        self._verbs = verbs
        self.on = False

    def around(self, inner: Storage) -> Storage:
        """Return the storage whose verbs fail while this is on."""
        broken = self

        class Struck(Points):
            def _due(self, name: str, number: int, *, after: bool) -> None:
                if broken.on and name in broken._verbs and not after:
                    raise StorageFull("injected")

        return faulty_storage(inner, Struck())


@pytest.mark.parametrize(
    ("verb", "problem"),
    [
        ("claim", "deliveries cannot be claimed: StorageFull: injected"),
        ("settle", "1 results wait to be written: StorageFull: injected"),
        ("enqueue", "an event could not be stored: StorageFull: injected (0 s ago)"),
        ("sweep", "sweep fails and is repeated: StorageFull: injected (0 s ago)"),
        ("backlog", "the storage cannot be read: StorageFull: injected"),
    ],
)
async def test_health_names_what_fails_for_as_long_as_it_does(verb: str, problem: str) -> None:
    broken, clock, transport = Broken(verb), VirtualClock(), FakeTransport()
    storage = broken.around(MemoryStorage())
    async with Dispatcher(storage, transport=transport, clock=clock, profiles=PROFILES) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        assert (await dispatcher.health()).state == "healthy"
        broken.on = True
        with suppress(StorageFull):
            await dispatcher.emit("video.ready")
        if verb == "sweep":
            await dispatcher.endpoints.disable(endpoint.id)
        await clock.advance(0)
        health = await dispatcher.health()
        assert (health.state, health.problems) == ("degraded", (problem,))
        await clock.advance(40)
        assert (await dispatcher.health()).state == "degraded"
        broken.on = False
        await clock.advance(61 if verb == "enqueue" else 31)  # nothing but time is certain to end a failed emit
        health = await dispatcher.health()
        assert (health.state, health.problems, health.pending) == ("healthy", (), 0)


async def test_a_worker_whose_storage_fails_looks_again_more_and_more_seldom_and_not_at_every_emit() -> None:
    broken, clock = Broken("claim"), VirtualClock()
    storage = broken.around(MemoryStorage())
    told: list[WorkerFailed] = []
    async with Dispatcher(storage, transport=FakeTransport(), clock=clock) as dispatcher:
        dispatcher.observe(told.append, WorkerFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        broken.on = True
        for number in range(600):
            await dispatcher.emit("video.ready", number)
            await clock.advance(0.1)
        assert [observed.retry_in for observed in told[:4]] == [1.0, 2.0, 4.0, 5.0]
        assert 10 <= len(told) <= 16
        broken.on = False
        await clock.advance(5, settle=dispatcher.drain)
        assert await dispatcher.deliveries.count(status="succeeded") == 600


async def test_results_that_cannot_be_written_are_kept_within_the_slots() -> None:
    broken, clock, transport = Broken("settle"), VirtualClock(), FakeTransport()
    storage = broken.around(MemoryStorage())
    async with Dispatcher(storage, transport=transport, clock=clock, concurrency=8) as dispatcher:
        for number in range(20):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        broken.on = True
        for number in range(10):
            await dispatcher.emit("video.ready", number)
        await clock.advance(60)
        health = await dispatcher.health()
        kept = health.in_flight
        assert 0 < kept <= 8
        assert len(transport.requests) == kept
        assert health.problems == (f"{kept} results wait to be written: StorageFull: injected",)
        broken.on = False
        await clock.advance(2)
        await dispatcher.drain()
        assert len(transport.requests) == 200  # none was sent twice
        assert await dispatcher.deliveries.count(status="succeeded") == 200
