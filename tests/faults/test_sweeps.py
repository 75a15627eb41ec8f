"""What the simulation found, in small: rows of stopped endpoints end, whatever fails on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookwright import DeliveryState, Dispatcher, MemoryStorage, StorageBusy
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL

if TYPE_CHECKING:
    import pytest


async def test_a_sweep_that_failed_is_repeated_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    sweep, failures = storage.sweep, [StorageBusy("injected")]

    async def failing() -> bool:
        if failures:
            raise failures.pop()
        return await sweep()

    async with Dispatcher(storage, transport=FakeTransport(), clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        receipt = await dispatcher.emit("video.ready")
        await clock.advance(1, settle=dispatcher.drain)
        monkeypatch.setattr(storage, "sweep", failing)
        await dispatcher.endpoints.disable(endpoint.id)
        await clock.advance(3600, settle=dispatcher.drain)
        [delivery] = await dispatcher.deliveries.list(event_id=receipt.event_id)
        assert not failures
        assert delivery.state is DeliveryState.SKIPPED


async def test_a_row_of_a_disabled_endpoint_is_swept_when_its_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    claim, failures = storage.claim, [StorageBusy("it was committed, but nobody heard of it")]

    async def failing(*arguments: Any) -> Any:
        claimed = await claim(*arguments)
        if claimed.leases and failures:
            raise failures.pop()
        return claimed

    monkeypatch.setattr(storage, "claim", failing)
    async with Dispatcher(storage, transport=FakeTransport(), clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")
        await clock.advance(0.1)
        await dispatcher.endpoints.disable(endpoint.id)
        await clock.advance(3600, settle=dispatcher.drain)
        [delivery] = await dispatcher.deliveries.list(event_id=receipt.event_id)
        assert not failures
        assert delivery.state is DeliveryState.SKIPPED
