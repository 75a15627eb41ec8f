"""What a memory storage does when it is acquired anew: by another dispatcher, whose clock may be another."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hookwright import DeliveryState, Dispatcher, MemoryStorage
from hookwright.storage._base import ClaimRequest
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL

MORNING = datetime(2026, 1, 2, 8, tzinfo=UTC)


async def test_a_clock_that_was_set_back_closes_no_rate_limited_endpoint() -> None:
    storage, transport = MemoryStorage(), FakeTransport()
    async with Dispatcher(storage, transport=transport, clock=VirtualClock(MORNING)) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], rate_limit=0.5)
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=10)
    clock = VirtualClock(MORNING - timedelta(days=1))
    async with Dispatcher(storage, transport=transport, clock=clock) as dispatcher:
        await dispatcher.emit("video.ready")
        await clock.advance(5, settle=dispatcher.drain)
        assert len(transport.requests) == 2


async def test_a_sweep_records_that_a_request_of_a_dead_process_may_have_left() -> None:
    storage, clock = MemoryStorage(), VirtualClock(MORNING)
    dispatcher = Dispatcher(storage, transport=FakeTransport(), clock=clock, deliver=False)
    async with dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")
        assert len((await storage.claim(ClaimRequest(10, 10, 60_000_000, 4, {}))).leases) == 1
        await dispatcher.endpoints.disable(endpoint.id)
        await clock.advance(61)
        await storage.sweep()
        [delivery] = await dispatcher.deliveries.list(event_id=receipt.event_id)
        assert delivery.state is DeliveryState.SKIPPED
        assert [attempt.error for attempt in await dispatcher.deliveries.attempts(delivery.id)] == ["interrupted"]
