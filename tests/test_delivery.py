"""From lease to settled attempt: signed, judged, retried, recorded, reported."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import tenacity

from hookwright import (
    AttemptFailed,
    AttemptStarted,
    Content,
    DeliveryFailed,
    DeliveryRetrying,
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    EndpointDisabled,
    EndpointState,
    Failure,
    MemoryStorage,
    Observation,
    Profile,
    Request,
    Response,
    RetryPolicy,
    Secret,
    Timeouts,
)
from hookwright.receiver import Verifier
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from hookwright import Attempt, Delivery


def kinds(observations: Sequence[Observation]) -> list[str]:
    return [type(observation).__name__ for observation in observations]


async def only(dispatcher: Dispatcher) -> tuple[Delivery, Sequence[Attempt]]:
    [delivery] = (await dispatcher.deliveries.list()).items
    return delivery, await dispatcher.deliveries.attempts(delivery.id)


async def test_a_delivery_is_signed_so_that_the_receiver_can_verify_it(storage_url: str, clock: VirtualClock) -> None:
    transport = FakeTransport([500, 200])
    async with Dispatcher(storage_url, transport=transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], headers={"X-Team": "video"})
        receipt = await dispatcher.emit("video.ready", {"id": 1})
        await clock.advance(10, settle=dispatcher.drain)
        assert endpoint.secret is not None
        verifier = Verifier(endpoint.secret, now=lambda: clock.wall() / 1e6)
        first, second = (verifier.verify(request.body, dict(request.headers)) for request in transport.requests)
        assert first.id == second.id == receipt.event_id
        assert first.timestamp is not None
        assert second.timestamp is not None
        assert (second.timestamp - first.timestamp) == timedelta(seconds=5)
        assert first.payload == {"type": "video.ready", "timestamp": "2026-01-01T00:00:00.000Z", "data": {"id": 1}}
        headers = dict(transport.requests[0].headers)
        assert headers["X-Team"] == "video"
        assert headers["content-type"] == "application/json"
        assert headers["user-agent"].startswith("hookwright/")


async def test_the_default_schedule_makes_ten_attempts_over_75_hours(storage_url: str, clock: VirtualClock) -> None:
    started: list[int] = []

    def refuse(request: Request) -> int:
        started.append((clock.now() - begin) // 1_000_000)
        return 503

    async with Dispatcher(storage_url, transport=FakeTransport(refuse), clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        heard: list[Observation] = []
        dispatcher.observe(heard.append, DeliveryRetrying, DeliveryFailed)
        begin = clock.now()
        await dispatcher.emit("video.ready")
        await clock.advance(timedelta(hours=100), settle=dispatcher.drain)
        gaps = [later - earlier for earlier, later in zip([0, *started], started, strict=False)]
        exact = [0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
        assert gaps[:2] == exact[:2]
        for gap, delay in zip(gaps, exact, strict=True):
            assert delay - 1 <= gap <= delay + min(delay // 10, 900)
        assert kinds(heard) == ["DeliveryRetrying"] * 9 + ["DeliveryFailed"]
        delivery, attempts = await only(dispatcher)
        assert delivery.state is DeliveryState.FAILED
        assert delivery.next_attempt_at is None
        assert (delivery.last_status, delivery.last_error) == (503, "http_status")
        assert [attempt.number for attempt in attempts] == list(range(1, 11))


async def test_every_outcome_is_told_after_it_is_stored(storage_url: str, clock: VirtualClock) -> None:
    profile = Profile(retry=RetryPolicy.schedule(0, 1))
    transport = FakeTransport([Failure("timeout", "too late"), 204])
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles={"default": profile}) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        heard: list[Any] = []
        dispatcher.observe(heard.append)
        await dispatcher.emit("video.ready")
        await clock.advance(2, settle=dispatcher.drain)
        assert kinds(heard) == [
            "EventEmitted",
            "AttemptStarted",
            "AttemptFailed",
            "DeliveryRetrying",
            "AttemptStarted",
            "DeliverySucceeded",
        ]
        assert (heard[2].error, heard[2].status, heard[2].attempt) == ("timeout", None, 1)
        assert heard[3].next_attempt_at == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
        assert (heard[5].status, heard[5].attempt) == (204, 2)
        _, [failed, succeeded] = await only(dispatcher)
        assert (failed.error, failed.detail, failed.status) == ("timeout", "too late", None)
        assert (succeeded.error, succeeded.status) == (None, 204)


async def test_410_disables_the_endpoint_and_nothing_more_is_sent(storage_url: str, clock: VirtualClock) -> None:
    transport = FakeTransport(410)
    async with Dispatcher(storage_url, transport=transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], concurrency=1)
        heard: list[Any] = []
        dispatcher.observe(heard.append, DeliveryFailed, EndpointDisabled)
        await dispatcher.endpoints.pause(endpoint.id)
        for _ in range(5):
            await dispatcher.emit("video.ready")
        await dispatcher.endpoints.resume(endpoint.id)
        await dispatcher.deliveries.wait((await dispatcher.deliveries.list()).items[0].event_id, timeout=None)
        await clock.advance(timedelta(days=5), settle=dispatcher.drain)
        assert len(transport.requests) == 1
        assert kinds(heard) == ["DeliveryFailed", "EndpointDisabled"]
        assert (heard[0].reason, heard[1].reason) == ("gone", "gone")
        assert (await dispatcher.endpoints.get(endpoint.id)).state is EndpointState.DISABLED
        assert await dispatcher.deliveries.count(status=DeliveryState.FAILED) == 1
        assert await dispatcher.deliveries.count(status=DeliveryState.SKIPPED) == 4
        assert (await dispatcher.emit("video.ready")).delivery_count == 0
        assert await dispatcher.deliveries.count(status=DeliveryState.SKIPPED) == 5


async def test_retry_after_is_a_floor_and_never_a_shortcut(storage_url: str, clock: VirtualClock) -> None:
    answers: list[Response | int] = [
        Response(503, (("Retry-After", "60"),)),
        Response(429, (("retry-after", "1"),)),
        200,
    ]
    times: list[int] = []
    replies: Iterator[Response | int] = iter(answers)

    def answer(request: Request) -> Response | int:
        times.append(clock.now() // 1_000_000)
        return next(replies)

    async with Dispatcher(storage_url, transport=FakeTransport(answer), clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await clock.advance(3600, settle=dispatcher.drain)
        assert times[1] - times[0] == 60
        assert 300 <= times[2] - times[1] <= 331


async def test_any_tenacity_strategy_decides(storage_url: str, clock: VirtualClock) -> None:
    policy = RetryPolicy(
        wait=tenacity.wait_fixed(10),
        stop=tenacity.stop_after_delay(25),
        retry=tenacity.retry_if_exception(lambda error: getattr(error, "status", None) != 404),
    )
    transport = FakeTransport(500)
    profiles = {"default": Profile(retry=policy)}
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles=profiles) as dispatcher:
        heard: list[Any] = []
        dispatcher.observe(heard.append, DeliveryFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await clock.advance(100, settle=dispatcher.drain)
        assert len(transport.requests) == 4  # at 0, 10, 20 and 30 s: the age is looked at after each
        transport.respond(URL, 404)
        await dispatcher.emit("video.ready")
        await clock.advance(100, settle=dispatcher.drain)
        assert len(transport.requests) == 5
        assert [failed.reason for failed in heard] == ["exhausted", "refused"]


async def test_a_policy_or_an_envelope_that_raises_fails_that_delivery_only(
    storage_url: str, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def render(self, content: Content) -> bytes:
            if content.event_type == "bad":
                raise KeyError(content.event_type)
            return content.data

    def broken(state: tenacity.RetryCallState) -> float:
        raise ZeroDivisionError

    profiles = {
        "default": Profile(envelope=Broken()),
        "policy": Profile(retry=RetryPolicy(wait=broken, stop=tenacity.stop_never)),
    }
    transport = FakeTransport(500)
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles=profiles) as dispatcher:
        heard: list[Any] = []
        dispatcher.observe(heard.append, DeliveryFailed)
        await dispatcher.endpoints.create(URL, events=["bad"])
        await dispatcher.emit("bad")
        await dispatcher.drain()
        assert transport.requests == []
        _, [attempt] = await only(dispatcher)
        assert (attempt.error, attempt.detail) == ("render_error", "KeyError")
        with caplog.at_level(logging.ERROR, "hookwright"):
            await dispatcher.endpoints.create(URL, events=["good"], profile="policy")
            await dispatcher.emit("good")
            await dispatcher.drain()
        assert [failed.reason for failed in heard] == ["render_error"]
        assert "retry policy" in caplog.text
        # The standard policy decides in its place: nothing is lost by a defect of a strategy.
        [waiting] = (await dispatcher.deliveries.list(status="pending")).items
        assert waiting.next_attempt_at is not None
        [attempt] = await dispatcher.deliveries.attempts(waiting.id)
        assert waiting.next_attempt_at - attempt.started_at == timedelta(seconds=5)


async def test_a_transport_that_raises_or_hangs_is_a_failed_attempt(storage_url: str) -> None:
    class Unruly(FakeTransport):
        async def send(self, request: Request) -> Response | Failure:
            self.requests.append(request)
            if len(self.requests) == 1:
                raise RuntimeError("with a https://user:secret@url")
            await asyncio.Event().wait()
            raise AssertionError

    profile = Profile(retry=RetryPolicy.schedule(0, 0), timeouts=Timeouts(total=0.01, connect=0.01, dns=0.01))
    async with Dispatcher(storage_url, transport=Unruly(), profiles={"default": profile}) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=10)
        _, [raised, hung] = await only(dispatcher)
        assert (raised.error, raised.detail) == ("transport_error", "RuntimeError")
        assert hung.error == "timeout"


async def test_an_endpoint_whose_profile_this_process_lacks_waits_and_costs_no_attempt(
    sqlite_url: str, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    special = {"special": Profile()}
    async with Dispatcher(sqlite_url, transport=FakeTransport(), profiles=special, deliver=False) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], profile="special")
        await dispatcher.emit("video.ready")
        await dispatcher.emit("video.ready")
    async with Dispatcher(sqlite_url, transport=FakeTransport(), clock=clock) as dispatcher:
        await clock.advance(timedelta(hours=1), settle=dispatcher.drain)
        deliveries = (await dispatcher.deliveries.list()).items
        assert [(d.state, d.attempt_count) for d in deliveries] == [(DeliveryState.PENDING, 0)] * 2
        assert caplog.text.count("special") == 1
        await dispatcher.endpoints.update(endpoint.id, profile="default")
        await clock.advance(61, settle=dispatcher.drain)
        assert await dispatcher.deliveries.count(status=DeliveryState.SUCCEEDED) == 2


async def test_secrets_that_a_receiver_echoes_do_not_reach_the_history(storage_url: str) -> None:
    secret = Secret.generate()

    def echo(request: Request) -> Response:
        body = f"{secret.reveal()} {secret.reveal().removeprefix('whsec_')} token-123 and more".encode()
        return Response(200, (("x-echo", "token-123"),), body)

    async with Dispatcher(storage_url, transport=FakeTransport(echo)) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=secret, headers={"Authorization": "token-123"})
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        _, [attempt] = await only(dispatcher)
        assert attempt.response_body == b"[secret] [secret] [secret] and more"
        assert attempt.response_headers == (("x-echo", "[secret]"),)


async def test_no_request_leaves_on_a_lease_that_no_longer_covers_it(clock: VirtualClock) -> None:
    class Stalled(MemoryStorage):
        """As if the loop stood still between claim and send."""

        async def claim(self, request: Any) -> Any:
            claim = await super().claim(request)
            leased.extend(claim.leases)
            if claim.leases and len(leased) == 1:
                await clock.advance(41)
            return claim

    leased: list[Any] = []
    transport = FakeTransport()
    async with Dispatcher(Stalled(), transport=transport, clock=clock, lease=60) as dispatcher:
        started: list[Any] = []
        dispatcher.observe(started.append, AttemptStarted, DeliverySucceeded, AttemptFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        assert len(leased) == 2  # the first was given back unused
        assert kinds(started) == ["AttemptStarted", "DeliverySucceeded"]
        assert (await only(dispatcher))[0].attempt_count == 1
