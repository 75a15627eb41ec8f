"""Endpoints that fail: pauses, failing, recovery, disabling, operational events; and how the dispatcher itself does."""

from __future__ import annotations

import json
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    Dispatcher,
    EndpointDisabled,
    EndpointFailing,
    EndpointRecovered,
    EndpointState,
    Failure,
    MemoryStorage,
    Observation,
    Profile,
    Response,
    RetryPolicy,
    StorageError,
)
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Sequence

OFTEN = {"default": Profile(retry=RetryPolicy.schedule(*[0] * 30))}


class Never(Random):
    def random(self) -> float:
        return 0.0


async def run(
    script: Any, storage_url: str, advance: float | timedelta, **options: Any
) -> tuple[Sequence[float], list[Observation]]:
    """Return the seconds at which attempts began, and what was heard of the endpoint."""
    clock, transport = VirtualClock(), FakeTransport(script)
    begin = clock.now()
    heard: list[Observation] = []
    options = {"profiles": OFTEN, "random": Never(), **options}
    async with Dispatcher(storage_url, transport=transport, clock=clock, **options) as dispatcher:
        dispatcher.observe(heard.append, EndpointFailing, EndpointRecovered, EndpointDisabled)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await clock.advance(advance, settle=dispatcher.drain)
        [delivery] = (await dispatcher.deliveries.list()).items
        attempts = await dispatcher.deliveries.attempts(delivery.id)
        return [attempt.started_at.timestamp() - begin / 1e6 for attempt in attempts], heard


@pytest.mark.parametrize(
    "answer",
    [429, 502, 503, 504, *map(Failure, ["timeout", "connect_timeout", "connect_error", "dns_error", "tls_error"])],
)
async def test_an_endpoint_that_is_overloaded_gets_longer_and_longer_pauses(answer: Any, storage_url: str) -> None:
    times, _ = await run([answer] * 8 + [200], storage_url, 400)
    assert [round(time) for time in times] == [0, 1, 3, 7, 15, 31, 63, 123, 183]


async def test_any_other_failure_makes_no_pause(storage_url: str) -> None:
    times, _ = await run([500] * 8 + [Failure("protocol_error"), 200], storage_url, 1)
    assert len(times) == 10
    assert max(times) < 1


async def test_a_pause_is_for_the_endpoint_and_not_for_one_delivery(storage_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport([503, 200])
    async with Dispatcher(storage_url, transport=transport, clock=clock, random=Never()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        await dispatcher.emit("b")
        await dispatcher.drain(timeout=5)
        assert len(transport.requests) == 1
        await clock.advance(1, settle=dispatcher.drain)
        assert len(transport.requests) == 2


async def test_retry_after_holds_the_endpoint_ten_minutes_at_most_and_the_delivery_as_long_as_it_says(
    storage_url: str,
) -> None:
    clock = VirtualClock()
    transport = FakeTransport([Response(500, (("Retry-After", "3600"),)), 200])
    begin = clock.now()
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles=OFTEN) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        slow = await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        other = await dispatcher.emit("b")
        await clock.advance(timedelta(hours=2), settle=dispatcher.drain)
        ended = {}
        for receipt in (slow, other):
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
            last = (await dispatcher.deliveries.attempts(delivery.id))[-1]
            ended[receipt.event_id] = round(last.started_at.timestamp() - begin / 1e6)
        assert ended == {slow.event_id: 3600, other.event_id: 600}


async def test_the_fourth_failure_in_a_row_is_told_once_and_so_is_recovery(storage_url: str) -> None:
    _, heard = await run([500] * 9 + [200], storage_url, 1)
    assert [type(one) for one in heard] == [EndpointFailing, EndpointRecovered]
    assert isinstance(heard[0], EndpointFailing)
    assert heard[0].failures == 4
    _, heard = await run([500] * 3 + [200], storage_url.replace(".db", "2.db"), 1)
    assert heard == []


async def test_nothing_but_failures_for_five_days_disables(storage_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport(500)
    daily = {"default": Profile(retry=RetryPolicy.schedule(*[0] + [6 * 3600] * 30))}
    heard: list[EndpointDisabled] = []
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles=daily) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        dispatcher.observe(heard.append, EndpointDisabled)
        await dispatcher.emit("a")
        await clock.advance(timedelta(days=4, hours=23), settle=dispatcher.drain)
        assert (await dispatcher.endpoints.get(endpoint.id)).state is EndpointState.ACTIVE
        await clock.advance(timedelta(days=1), settle=dispatcher.drain)
        disabled = await dispatcher.endpoints.get(endpoint.id)
        assert (disabled.state, disabled.disabled_reason) == (EndpointState.DISABLED, "failing")
        assert [one.reason for one in heard] == ["failing"]
        [delivery] = (await dispatcher.deliveries.list()).items
        assert delivery.state == "skipped"
        sent = len(transport.requests)
        transport.respond(URL, 200)
        await dispatcher.endpoints.enable(endpoint.id)
        assert await dispatcher.deliveries.replay() == 1
        await clock.advance(60, settle=dispatcher.drain)
        assert len(transport.requests) == sent + 1


async def test_disabling_can_be_turned_off(storage_url: str) -> None:
    daily = {"default": Profile(retry=RetryPolicy.schedule(*[0] + [6 * 3600] * 30))}
    times, heard = await run(500, storage_url, timedelta(days=9), profiles=daily, disable_after=None)
    assert len(times) == 31
    assert not [one for one in heard if isinstance(one, EndpointDisabled)]


async def test_operational_events_tell_of_endpoints_and_of_failed_deliveries_but_not_of_themselves(
    storage_url: str,
) -> None:
    clock, transport = VirtualClock(), FakeTransport([500] * 5 + [200, 410])
    transport.respond("https://operator.example/", [500] * 40)
    profiles = {"default": Profile(retry=RetryPolicy.schedule(*[0] * 5))}
    async with Dispatcher(
        storage_url, transport=transport, clock=clock, profiles=profiles, operational_events=True
    ) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.create("https://operator.example/", events=["hookwright.*"])
        for _ in range(3):
            await dispatcher.emit("video.ready")
            await clock.advance(10, settle=dispatcher.drain)
        told: dict[str, list[Any]] = {}
        for request in transport.requests:
            if "operator" in request.url:
                body = json.loads(request.body)
                told.setdefault(body["type"], []).append(body["data"])
            else:
                assert json.loads(request.body)["type"] == "video.ready"  # "*" does not match operational events
        assert set(told) == {
            "hookwright.delivery.failed",
            "hookwright.endpoint.failing",
            "hookwright.endpoint.recovered",
            "hookwright.endpoint.disabled",
        }
        assert told["hookwright.endpoint.disabled"][0] == {
            "endpoint_id": endpoint.id,
            "endpoint_name": None,
            "tenant": None,
            "error": "http_status",
            "status": 410,
            "reason": "gone",
        }
        failed = told["hookwright.delivery.failed"][0]
        assert (failed["endpoint_id"], failed["event_type"], failed["attempt_count"]) == (endpoint.id, "video.ready", 5)
        # The operator's endpoint fails as well, and nothing is told of that: 3 events of ours, no more.
        about = await dispatcher.deliveries.count(event_type="hookwright.delivery.failed")
        assert about == 2


async def test_without_operational_events_nothing_is_stored_but_what_was_emitted(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport(410)) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=5)
        assert await dispatcher.deliveries.count() == 1


async def test_a_rate_limit_spaces_attempts(storage_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport()
    async with Dispatcher(storage_url, transport=transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], rate_limit=0.5)
        for _ in range(5):
            await dispatcher.emit("video.ready")
        for seconds in range(10):
            await dispatcher.drain(timeout=5)
            assert len(transport.requests) == min(5, seconds // 2 + 1)
            await clock.advance(1, settle=dispatcher.drain)


async def test_the_dispatchers_health_in_every_state(storage_url: str, clock: VirtualClock) -> None:
    transport = FakeTransport()
    dispatcher = Dispatcher(storage_url, transport=transport, clock=clock)
    health = await dispatcher.health()
    assert (health.state, health.pending, health.leased) == ("new", None, None)
    async with dispatcher:
        transport.respond(URL, transport.hang)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("a")
        await dispatcher.emit("b")
        while not transport.requests:
            await clock.advance(0)
        await clock.advance(30)
        health = await dispatcher.health()
        assert (health.state, health.pending, health.leased, health.in_flight) == ("healthy", 2, 1, 1)
        assert (health.oldest_due, health.problems) == (30.0, ())
        transport.release()
        await dispatcher.drain(timeout=5)
        health = await dispatcher.health()
        assert (health.pending, health.oldest_due, health.lag) == (0, None, 30.0)
    health = await dispatcher.health()
    assert (health.state, health.pending, health.leased) == ("closed", None, None)


async def test_an_endpoint_that_cannot_be_sent_to_and_a_broken_storage_are_named(clock: VirtualClock) -> None:
    class Broken(MemoryStorage):
        broken = False

        async def backlog(self) -> Any:
            if self.broken:
                raise StorageError("the disk is gone")
            return await super().backlog()

    storage = Broken()
    other = {"other": Profile()}
    async with Dispatcher(storage, transport=FakeTransport(), clock=clock, profiles=other) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], profile="other")
        dispatcher._preparer._profiles = {}
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        health = await dispatcher.health()
        assert health.problems == (f"endpoint {endpoint.id}: this process has no profile 'other'",)
        storage.broken = True
        health = await dispatcher.health()
        assert (health.state, health.problems[0]) == (
            "degraded",
            "the storage cannot be read: StorageError: the disk is gone",
        )
        assert (health.pending, health.leased, health.oldest_due) == (None, None, None)
        storage.broken = False
        assert (await dispatcher.health()).pending == 1
