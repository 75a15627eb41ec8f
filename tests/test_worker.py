"""Slots, fairness, shutdown, restart, standby: what the worker promises."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    DeliveryState,
    Dispatcher,
    LeaseLost,
    MemoryStorage,
    Profile,
    Request,
    RetryPolicy,
    SQLiteStorage,
    StorageBusy,
    StorageClosed,
    StorageFull,
    Timeouts,
    WaitTimeout,
    WorkerFailed,
)
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until

if TYPE_CHECKING:
    from hookwright import Failure, Response


class Gauge(FakeTransport):
    """Counts what is in flight at once, in all and by url; hangs on urls that hold "hang"."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.most_in_all = 0

    async def send(self, request: Request) -> Response | Failure:
        self.now[request.url] += 1
        self.most[request.url] = max(self.most[request.url], self.now[request.url])
        self.most_in_all = max(self.most_in_all, self.now.total())
        try:
            if "hang" in request.url:
                await self.hang(request)
            for _ in range(3):
                await asyncio.sleep(0)
            return await super().send(request)
        finally:
            self.now[request.url] -= 1


async def test_an_endpoint_never_has_more_in_flight_than_its_cap(storage_url: str) -> None:
    gauge = Gauge()
    async with Dispatcher(storage_url, transport=gauge, concurrency=24, shutdown_timeout=0) as dispatcher:
        await dispatcher.endpoints.create(URL + "/default", events=["*"])
        await dispatcher.endpoints.create(URL + "/one", events=["*"], concurrency=1)
        await dispatcher.endpoints.create(URL + "/many", events=["*"], concurrency=9)
        for _ in range(6):  # room is earned: 2, 4, 8, 16
            await dispatcher.emit("video.ready")
            await dispatcher.drain(timeout=10)
        caps = {URL + "/default": 4, URL + "/one": 1, URL + "/many": 9}
        for url in caps:
            gauge.respond(url, gauge.hang)
        await asyncio.gather(*(dispatcher.emit("video.ready", n) for n in range(60)))
        await until(lambda: gauge.now == caps)
        gauge.release()
        await dispatcher.drain(timeout=20)
        assert len(gauge.requests) == 3 * 66
        assert gauge.most == caps


async def test_an_endpoint_has_room_for_one_until_its_first_success(storage_url: str) -> None:
    gauge = Gauge()
    async with Dispatcher(storage_url, transport=gauge, concurrency=20, shutdown_timeout=0) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL + "/hang", events=["*"])
        await asyncio.gather(*(dispatcher.emit("video.ready", n) for n in range(20)))
        await until(lambda: gauge.now.total() == 1)
        with pytest.raises(WaitTimeout, match="in flight"):
            await dispatcher.drain(timeout=0.05)
        assert gauge.most_in_all == 1
        gauge.release()
        await dispatcher.drain(timeout=10)
        assert gauge.most[URL + "/hang"] == 4
        assert await dispatcher.deliveries.count(endpoint_id=endpoint.id, status=DeliveryState.SUCCEEDED) == 20


async def test_endpoints_that_hang_hold_at_most_half_the_slots(storage_url: str) -> None:
    gauge = Gauge()
    async with Dispatcher(storage_url, transport=gauge, concurrency=10, shutdown_timeout=0) as dispatcher:
        for n in range(30):
            await dispatcher.endpoints.create(f"{URL}/hang/{n}", events=["*"])
        healthy = await dispatcher.endpoints.create(URL + "/healthy", events=["good"])
        await dispatcher.emit("bad")
        await until(lambda: gauge.now.total() == 5)
        receipts = [await dispatcher.emit("good", endpoint_id=healthy.id) for _ in range(3)]
        # Unproven itself, it waits for a place in the half that the hanging ones fill.
        await asyncio.sleep(0)
        assert sum(gauge.now.values()) == 5
        gauge.release()
        for receipt in receipts:
            await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        await dispatcher.drain(timeout=10)
        # Now everybody is proven; those that hang again leave half of the slots to the healthy one.
        gauge._released.clear()
        await dispatcher.emit("bad")
        await until(lambda: sum(gauge.now.values()) == 10)
        assert gauge.most_in_all == 10


async def test_a_proven_endpoint_delivers_while_others_hang(storage_url: str) -> None:
    gauge = Gauge()
    async with Dispatcher(storage_url, transport=gauge, concurrency=10, shutdown_timeout=0) as dispatcher:
        healthy = await dispatcher.endpoints.create(URL + "/healthy", events=["good"])
        await dispatcher.emit("good")
        await dispatcher.drain()
        for n in range(30):
            await dispatcher.endpoints.create(f"{URL}/hang/{n}", events=["bad"])
        for _ in range(5):
            await dispatcher.emit("bad")
        await until(lambda: gauge.now.total() == 5)
        receipts = await asyncio.gather(*(dispatcher.emit("good", n) for n in range(50)))
        for receipt in receipts:
            await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        assert await dispatcher.deliveries.count(endpoint_id=healthy.id, status=DeliveryState.SUCCEEDED) == 51
        assert sum(gauge.now.values()) == 5


async def test_an_endpoint_that_is_slow_counts_as_unproven(storage_url: str, clock: VirtualClock) -> None:
    gauge = Gauge()
    gauge.release()
    async with Dispatcher(storage_url, transport=gauge, concurrency=8, clock=clock, shutdown_timeout=0) as dispatcher:
        slow = [await dispatcher.endpoints.create(f"{URL}/hang/{n}", events=["a", "b"]) for n in range(8)]
        healthy = await dispatcher.endpoints.create(URL, events=["good"])
        await dispatcher.emit("good")
        await dispatcher.emit("a")
        await dispatcher.drain()
        gauge._released.clear()
        await asyncio.gather(*(dispatcher.emit("a", endpoint_id=endpoint.id) for endpoint in slow[:4]))
        await until(lambda: gauge.now.total() == 4)
        await clock.advance(2)
        await asyncio.gather(*(dispatcher.emit("b", endpoint_id=endpoint.id) for endpoint in slow[:4]))
        receipt = await dispatcher.emit("good")
        await until(lambda: len(gauge.requests) == 8 + 1 + 1)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
        assert delivery.endpoint_id == healthy.id
        assert gauge.now.total() == 4


async def test_a_dead_endpoint_with_a_long_queue_delays_nobody(storage_url: str) -> None:
    gauge = Gauge()
    async with Dispatcher(storage_url, transport=gauge, concurrency=4, shutdown_timeout=0) as dispatcher:
        dead = await dispatcher.endpoints.create(URL + "/hang", events=["dead"])
        await asyncio.gather(*(dispatcher.emit("dead", n) for n in range(1000)))
        await dispatcher.endpoints.create(URL, events=["good"])
        receipt = await dispatcher.emit("good")
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        assert delivery.state is DeliveryState.SUCCEEDED
        assert await dispatcher.deliveries.count(endpoint_id=dead.id, status=DeliveryState.PENDING) == 1000


async def test_paused_is_held_and_drains_on_resume_in_order_of_the_queue(storage_url: str) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], concurrency=1)
        await dispatcher.endpoints.pause(endpoint.id)
        for n in range(5):
            await dispatcher.emit("video.ready", n)
        await dispatcher.drain(timeout=5)
        assert transport.requests == []
        assert await dispatcher.deliveries.count(status=DeliveryState.PENDING) == 5
        await dispatcher.endpoints.resume(endpoint.id)
        await dispatcher.drain(timeout=5)
        assert sorted(json.loads(request.body)["data"] for request in transport.requests) == [0, 1, 2, 3, 4]


async def test_a_deleted_endpoint_gets_nothing_and_its_deliveries_are_cancelled(storage_url: str) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        receipts = [await dispatcher.emit("video.ready", n) for n in range(5)]
        await dispatcher.endpoints.delete(endpoint.id)
        for receipt in receipts:
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
            assert delivery.state is DeliveryState.CANCELLED
        assert transport.requests == []


async def test_what_is_in_flight_at_deletion_ends_and_what_would_be_retried_is_cancelled(storage_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL + "/late", transport.hang)

    async def late(request: Request) -> int:
        await transport.hang(request)
        return 500

    transport.respond(URL + "/late", late)
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL + "/late", events=["*"])
        receipt = await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == 1)
        await dispatcher.endpoints.delete(endpoint.id)
        transport.release()
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        assert delivery.state is DeliveryState.CANCELLED
        assert delivery.attempt_count == 1


async def test_a_changed_url_is_used_by_the_next_attempt_in_whichever_process(sqlite_url: str) -> None:
    transport = FakeTransport([500, 200])
    profile = {"default": Profile(retry=RetryPolicy.schedule(0, 0.3))}
    async with (
        Dispatcher(sqlite_url, transport=transport, profiles=profile) as deliverer,
        Dispatcher(sqlite_url, profiles=profile, deliver=False) as other,
    ):
        endpoint = await other.endpoints.create(URL, events=["*"])
        await other.emit("video.ready")
        await until(lambda: len(transport.requests) == 1)
        await other.endpoints.update(endpoint.id, url=URL + "/moved", headers={"X-New": "1"})
        await until(lambda: len(transport.requests) == 2)
        await deliverer.drain(timeout=5)
        assert [request.url for request in transport.requests] == [URL, URL + "/moved"]
        assert dict(transport.requests[1].headers)["X-New"] == "1"
        assert transport.requests[1].revision > transport.requests[0].revision


async def test_shutdown_waits_for_what_is_in_flight(storage_url: str) -> None:
    storage = MemoryStorage()
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with Dispatcher(storage, transport=transport, shutdown_timeout=10) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        succeeded: list[Any] = []
        dispatcher.observe(succeeded.append)
        await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == 1)
        closing = asyncio.create_task(dispatcher.aclose())
        await asyncio.sleep(0)
        transport.release()
        await closing
    assert type(succeeded[-1]).__name__ == "DeliverySucceeded"
    assert transport.closed


async def test_shutdown_gives_back_what_hangs_and_it_costs_nothing(sqlite_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    profile = {"default": Profile(retry=RetryPolicy.schedule(0, 0))}
    for _ in range(3):
        before = len(transport.requests)
        async with Dispatcher(sqlite_url, transport=transport, profiles=profile, shutdown_timeout=0.01) as dispatcher:
            if not (await dispatcher.endpoints.list()).items:
                await dispatcher.endpoints.create(URL, events=["*"])
                await dispatcher.emit("video.ready")
            await until(lambda before=before: len(transport.requests) > before)
    async with Dispatcher(sqlite_url, transport=FakeTransport([500, 200]), profiles=profile) as dispatcher:
        [delivery] = (await dispatcher.deliveries.list()).items
        [done] = await dispatcher.deliveries.wait(delivery.event_id, timeout=10)
        assert done.state is DeliveryState.SUCCEEDED
        errors = [attempt.error for attempt in await dispatcher.deliveries.attempts(done.id)]
        assert errors == ["interrupted", "interrupted", "interrupted", "http_status", None]


async def test_a_second_dispatcher_stands_by_and_takes_over(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    first = Dispatcher(sqlite_url, transport=FakeTransport())
    await first.start()
    transport = FakeTransport()
    async with Dispatcher(sqlite_url, transport=transport) as second:
        assert first.is_delivering
        assert not second.is_delivering
        await until(lambda: "standing by" in caplog.text)
        await second.endpoints.create(URL, events=["*"])
        receipt = await second.emit("video.ready")
        [delivery] = await second.deliveries.wait(receipt.event_id, timeout=10)
        assert delivery.state is DeliveryState.SUCCEEDED
        assert transport.requests == []
        await first.aclose()
        assert not first.is_delivering
        await until(lambda: second.is_delivering)
        await second.emit("video.ready")
        await until(lambda: len(transport.requests) == 1)
    assert caplog.text.count("standing by") == 1


async def test_a_delivery_whose_process_died_is_resumed_at_once_and_counted_as_interrupted(sqlite_url: str) -> None:
    dead = SQLiteStorage(sqlite_url.removeprefix("sqlite:///"))
    hung = FakeTransport()
    hung.respond(URL, hung.hang)
    dispatcher = Dispatcher(dead, transport=hung, shutdown_timeout=0)
    await dispatcher.start()
    await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("video.ready")
    await until(lambda: len(hung.requests) == 1)
    await dead.close()  # as a crash does it: the lease stays
    await dispatcher.aclose()
    async with Dispatcher(sqlite_url, transport=FakeTransport()) as successor:
        [delivery] = await successor.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.state is DeliveryState.SUCCEEDED
        errors = [attempt.error for attempt in await successor.deliveries.attempts(delivery.id)]
        assert errors == ["interrupted", None]


@pytest.mark.parametrize("attempts", [1, 3])
async def test_a_delivery_that_kills_its_process_ends_by_its_retry_policy(attempts: int) -> None:
    class Crashing(MemoryStorage):
        """Loses every lease at once, as if the process had died."""

        async def claim(self, request: Any) -> Any:
            for row in self._rows.values():
                row.available_at = 0
            return await super().claim(request)

        async def settle(self, outcomes: Any, policy: Any = None) -> Any:
            if outcomes[0].attempt is None:
                return await super().settle(outcomes, policy)
            raise StorageClosed("dead")

    clock = VirtualClock()
    profile = {"default": Profile(retry=RetryPolicy.schedule(*[0.0] * attempts))}
    transport = FakeTransport()
    async with Dispatcher(Crashing(), transport=transport, clock=clock, profiles=profile) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")
        async with asyncio.timeout(10):
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
        assert delivery.state is DeliveryState.FAILED
        assert delivery.last_error == "interrupted"
        assert len(transport.requests) == 3 + attempts


async def test_a_result_that_comes_too_late_changes_nothing_and_is_reported(clock: VirtualClock) -> None:
    class TakenOver(MemoryStorage):
        async def settle(self, outcomes: Any, policy: Any = None) -> Any:
            if not stolen:
                row = self._rows[outcomes[0].delivery_id]
                stolen.append(row.token)
                row.token, row.available_at = "somebody else's", clock.now() + 60_000_000
            return await super().settle(outcomes, policy)

    stolen: list[Any] = []
    async with Dispatcher(TakenOver(), transport=FakeTransport(), clock=clock) as dispatcher:
        heard: list[Any] = []
        dispatcher.observe(heard.append, LeaseLost)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        [delivery] = (await dispatcher.deliveries.list()).items
        assert len(heard) == 1
        assert (delivery.state, delivery.attempt_count) == (DeliveryState.PENDING, 0)


async def test_a_storage_that_fails_is_tried_again_and_told(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(MemoryStorage):
        async def claim(self, request: Any) -> Any:
            failures["claim"] += 1
            if failures["claim"] <= 4:
                raise StorageBusy("locked")
            return await super().claim(request)

        async def settle(self, outcomes: Any, policy: Any = None) -> Any:
            failures["settle"] += 1
            if failures["settle"] <= 2:
                raise StorageFull("no space")
            return await super().settle(outcomes, policy)

    failures: defaultdict[str, int] = defaultdict(int)
    transport = FakeTransport()
    async with Dispatcher(Failing(), transport=transport, clock=clock) as dispatcher:
        told: list[WorkerFailed] = []
        dispatcher.observe(told.append, WorkerFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        for _ in range(40):
            await clock.advance(1)
        [delivery] = (await dispatcher.deliveries.list()).items
        assert delivery.state is DeliveryState.SUCCEEDED
        assert len(transport.requests) == 1
        assert told
        assert "StorageBusy" in told[0].error
        assert "results cannot be written" in caplog.text


async def test_drain_gives_up_after_its_timeout(storage_url: str, clock: VirtualClock) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    profile = {"default": Profile(timeouts=Timeouts(total=15))}
    async with Dispatcher(
        storage_url, transport=transport, clock=clock, profiles=profile, shutdown_timeout=0
    ) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == 1)
        draining = asyncio.create_task(dispatcher.drain(timeout=3))
        waiting = asyncio.create_task(dispatcher.deliveries.wait(receipt.event_id, timeout=3))
        while not (draining.done() and waiting.done()):
            await clock.advance(0.1)
        with pytest.raises(WaitTimeout, match="1 deliveries"):
            await draining
        with pytest.raises(WaitTimeout, match="1 of 1"):
            await waiting
