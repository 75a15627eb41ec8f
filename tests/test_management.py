"""What people do by hand: rotate, test, retry, cancel, replay, expunge, explain, emit many at once."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    ALL_TENANTS,
    ConfigurationError,
    ConflictError,
    DeliveryCancelled,
    DeliveryState,
    Dispatcher,
    EventEmitted,
    FlatEnvelope,
    LeaseLost,
    NewEvent,
    NotFound,
    Observation,
    Profile,
    Response,
    RetryPolicy,
    Secret,
    StorageBusy,
    ValidationFailed,
)
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

ONCE = {"default": Profile(retry=RetryPolicy.schedule(0))}


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
async def dispatcher(storage_url: str, transport: FakeTransport, clock: VirtualClock) -> AsyncIterator[Dispatcher]:
    options: dict[str, Any] = {"profiles": ONCE | {"flat": Profile(envelope=FlatEnvelope())}, "clock": clock}
    async with Dispatcher(storage_url, transport=transport, shutdown_timeout=0, **options) as dispatcher:
        yield dispatcher


async def failed(dispatcher: Dispatcher, transport: FakeTransport, count: int = 1) -> list[str]:
    """Return deliveries that failed; later requests succeed."""
    await dispatcher.endpoints.create(URL, events=["*"])
    transport.respond(URL, 500)
    for number in range(count):
        await dispatcher.emit("video.ready", number)
    await dispatcher.drain(timeout=20)
    transport.respond(URL, 200)
    page = await dispatcher.deliveries.list(status="failed", limit=500)
    assert len(page.items) == count
    return [delivery.id for delivery in page.items]


# -- secrets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [timedelta(days=8), timedelta(seconds=-1), 5])
async def test_an_overlap_out_of_range_is_refused(dispatcher: Dispatcher, overlap: Any) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    with pytest.raises(ValidationFailed, match="7 days"):
        await dispatcher.endpoints.rotate_secret(endpoint.id, overlap=overlap)


async def test_at_most_five_secrets_sign_at_once_and_a_leaked_one_ends_at_once(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    for _ in range(4):
        await dispatcher.endpoints.rotate_secret(endpoint.id)
    with pytest.raises(ConflictError, match="5 secrets"):
        await dispatcher.endpoints.rotate_secret(endpoint.id)
    rotated = await dispatcher.endpoints.rotate_secret(endpoint.id, overlap=timedelta(0))
    assert rotated.secret is not None
    with pytest.raises(ValidationFailed, match="whsec_"):
        await dispatcher.endpoints.rotate_secret(endpoint.id, secret="v1,whsec_AAAA")
    with pytest.raises(ValidationFailed, match="24 to 64 bytes"):
        await dispatcher.endpoints.rotate_secret(endpoint.id, secret=Secret("whsec_AAAA"))
    with pytest.raises(NotFound):
        await dispatcher.endpoints.rotate_secret(endpoint.id, tenant="other")


# -- test -------------------------------------------------------------------------------------------------------


async def test_a_test_goes_out_whatever_the_endpoint_wants_and_leaves_its_health_alone(
    dispatcher: Dispatcher, transport: FakeTransport, clock: VirtualClock
) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["never"], filters={"a": ["b"]})
    transport.respond(URL, 410)
    for change in (dispatcher.endpoints.pause, dispatcher.endpoints.disable, dispatcher.endpoints.enable):
        await change(endpoint.id)
        attempt = await dispatcher.endpoints.test(endpoint.id)
        assert (attempt.status, attempt.error) == (410, "http_status")
        with pytest.raises(ConflictError, match="10 s"):
            await dispatcher.endpoints.test(endpoint.id)
        await clock.advance(10)
    after = await dispatcher.endpoints.get(endpoint.id)
    assert (after.state, after.consecutive_failures, after.last_delivery) == ("active", 0, None)
    page = await dispatcher.deliveries.list(event_type="hookwright.test")
    assert [(d.state, d.attempt_count, d.last_status) for d in page.items] == [("failed", 1, 410)] * 3
    assert [a.response_body for a in await dispatcher.deliveries.attempts(page.items[0].id)] == [b""]


async def test_a_process_that_does_not_deliver_can_test(storage_url: str, transport: FakeTransport) -> None:
    async with Dispatcher(storage_url, transport=transport, deliver=False) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        assert (await dispatcher.endpoints.test(endpoint.id)).status == 200
        with pytest.raises(NotFound):
            await dispatcher.endpoints.test("ep_unknown")


async def test_a_test_that_cannot_be_sent_says_why(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"], profile="flat")
    assert (await dispatcher.endpoints.test(endpoint.id)).error is None
    with pytest.raises(NotFound):
        await dispatcher.endpoints.test(endpoint.id, tenant="other")


# -- retry, cancel, replay --------------------------------------------------------------------------------------


async def test_a_retry_by_hand_keeps_the_id_and_the_numbering(dispatcher: Dispatcher, transport: FakeTransport) -> None:
    [delivery_id] = await failed(dispatcher, transport)
    before = await dispatcher.deliveries.get(delivery_id)
    await dispatcher.deliveries.retry(delivery_id)
    [after] = await dispatcher.deliveries.wait(before.event_id, timeout=5)
    assert (after.state, after.attempt_count) == ("succeeded", 2)
    ids = {dict(request.headers)["webhook-id"] for request in transport.requests}
    assert ids == {before.event_id}
    with pytest.raises(ConflictError, match="force=True"):
        await dispatcher.deliveries.retry(delivery_id)
    await dispatcher.deliveries.retry(delivery_id, force=True)
    await dispatcher.drain(timeout=5)
    assert len(transport.requests) == 3


async def test_a_retry_that_cannot_be_says_why(dispatcher: Dispatcher, transport: FakeTransport) -> None:
    [delivery_id] = await failed(dispatcher, transport)
    delivery = await dispatcher.deliveries.get(delivery_id)
    await dispatcher.endpoints.disable(delivery.endpoint_id)
    with pytest.raises(ConflictError, match="enable it first"):
        await dispatcher.deliveries.retry(delivery_id)
    await dispatcher.endpoints.enable(delivery.endpoint_id)
    transport.respond(URL, transport.hang)
    await dispatcher.deliveries.retry(delivery_id)
    await until(lambda: len(transport.requests) == 2)
    with pytest.raises(ConflictError, match="right now"):
        await dispatcher.deliveries.retry(delivery_id)
    transport.release()
    await dispatcher.drain(timeout=5)
    await dispatcher.events.expunge(delivery.event_id)
    with pytest.raises(ConflictError, match="expunged"):
        await dispatcher.deliveries.retry(delivery_id, force=True)
    await dispatcher.endpoints.delete(delivery.endpoint_id)
    with pytest.raises(NotFound):
        await dispatcher.deliveries.retry("dlv_unknown")
    with pytest.raises(NotFound):
        await dispatcher.deliveries.retry(delivery_id, tenant="other")


async def test_a_retry_to_a_deleted_endpoint_says_so(dispatcher: Dispatcher, transport: FakeTransport) -> None:
    [delivery_id] = await failed(dispatcher, transport)
    await dispatcher.endpoints.delete((await dispatcher.deliveries.get(delivery_id)).endpoint_id)
    with pytest.raises(ConflictError, match="was deleted"):
        await dispatcher.deliveries.retry(delivery_id)
    with pytest.raises(ConflictError, match="was deleted"):
        await dispatcher.deliveries.payload(delivery_id)


async def test_cancelling_in_flight_is_at_once_and_the_late_result_is_lost(
    dispatcher: Dispatcher, transport: FakeTransport
) -> None:
    heard: list[Observation] = []
    dispatcher.observe(heard.append, DeliveryCancelled, LeaseLost)
    transport.respond(URL, transport.hang)
    await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("video.ready")
    await until(lambda: transport.requests)
    [delivery] = (await dispatcher.deliveries.list()).items
    cancelled = await dispatcher.deliveries.cancel(delivery.id)
    assert (cancelled.state, cancelled.attempt_count, cancelled.last_error) == ("cancelled", 1, "interrupted")
    assert (await dispatcher.deliveries.wait(receipt.event_id, timeout=5))[0].state == "cancelled"
    with pytest.raises(ConflictError, match="it is cancelled"):
        await dispatcher.deliveries.cancel(delivery.id)
    transport.release()
    await dispatcher.drain(timeout=5)
    assert [type(one) for one in heard] == [DeliveryCancelled, LeaseLost]
    assert (await dispatcher.deliveries.get(delivery.id)).state == "cancelled"
    assert (await dispatcher.health()).lost_leases == 1


async def test_a_replay_sends_again_what_the_filters_name_and_count_says_how_many(
    dispatcher: Dispatcher, transport: FakeTransport, clock: VirtualClock
) -> None:
    await failed(dispatcher, transport, 7)
    await clock.advance(60)
    [endpoint] = (await dispatcher.endpoints.list()).items
    await dispatcher.endpoints.disable(endpoint.id)
    for _ in range(3):
        await dispatcher.emit("export.ready", tenant=None)
    await dispatcher.endpoints.enable(endpoint.id)
    skipped = await dispatcher.deliveries.count(status="skipped")
    assert (skipped, await dispatcher.deliveries.count(status=["failed", "skipped"])) == (3, 10)
    assert await dispatcher.deliveries.replay(event_type="export.ready") == 3
    await dispatcher.drain(timeout=5)
    moment = datetime.fromtimestamp(clock.now() / 1e6, UTC)
    assert await dispatcher.deliveries.replay(since=moment) == 0
    assert await dispatcher.deliveries.replay(until=moment, endpoint_id=endpoint.id, status="failed") == 7
    await dispatcher.drain(timeout=5)
    assert await dispatcher.deliveries.count(status=DeliveryState.SUCCEEDED) == 10
    assert await dispatcher.deliveries.replay() == 0
    for status in ("pending", None, [], ["pending", "failed"]):
        with pytest.raises(ValidationFailed, match="status"):
            await dispatcher.deliveries.replay(status=status)
    with pytest.raises(ValidationFailed, match="must be one of"):
        await dispatcher.deliveries.list(status="done")
    with pytest.raises(ValidationFailed, match="time zone"):
        await dispatcher.deliveries.replay(since=datetime(2026, 1, 1))  # that is what is tested


async def test_many_are_replayed_and_cancelled_in_batches(dispatcher: Dispatcher, transport: FakeTransport) -> None:
    heard: list[Observation] = []
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.endpoints.pause(endpoint.id)
    await dispatcher.emit_many([NewEvent("video.ready", n) for n in range(1100)])
    dispatcher.observe(heard.append, DeliveryCancelled)
    assert await dispatcher.deliveries.cancel_all(endpoint_id=endpoint.id) == 1100
    assert len(heard) == 1100
    assert await dispatcher.deliveries.count(status="cancelled") == 1100
    assert await dispatcher.deliveries.replay() == 1100
    assert await dispatcher.deliveries.count(status="pending") == 1100
    assert transport.requests == []


async def test_a_payload_tells_when_the_profile_has_changed(
    sqlite_url: str, transport: FakeTransport, clock: VirtualClock
) -> None:
    async with Dispatcher(sqlite_url, transport=transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready", {"id": 1})
        await dispatcher.drain(timeout=5)
        [delivery] = (await dispatcher.deliveries.list()).items
        assert (await dispatcher.deliveries.payload(delivery.id)).changed is False
    edited = {"default": Profile(envelope=FlatEnvelope(time_key=None))}
    async with Dispatcher(sqlite_url, transport=transport, clock=clock, profiles=edited, deliver=False) as dispatcher:
        payload = await dispatcher.deliveries.payload(delivery.id)
        assert (payload.changed, payload.body) == (True, b'{"event":"video.ready","id":1}')
        receipt = await dispatcher.emit("video.ready", [1])
        [waiting] = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
        with pytest.raises(ConflictError, match="cannot be rendered"):
            await dispatcher.deliveries.payload(waiting.id)


# -- events -----------------------------------------------------------------------------------------------------


async def test_expunging_removes_payload_and_answers_from_the_file_and_its_wal(
    tmp_path: Path, transport: FakeTransport
) -> None:
    path = tmp_path / "hooks.db"
    transport.respond(URL, Response(200, (("x-told", "ANSWERED-SECRET"),), b"ANSWERED-SECRET"))
    async with Dispatcher(f"sqlite:///{path}", transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit(
            "user.created", {"email": "PRIVATE-ADDRESS"}, attributes={"a": "PRIVATE-ADDRESS"}
        )
        await dispatcher.drain(timeout=10)
        files = (path, path.with_name("hooks.db-wal"))
        assert any(b"PRIVATE-ADDRESS" in file.read_bytes() for file in files)
        await dispatcher.events.expunge(receipt.event_id)
        for file in files:
            assert b"PRIVATE-ADDRESS" not in file.read_bytes()
            assert b"ANSWERED-SECRET" not in file.read_bytes()
        event = await dispatcher.events.get(receipt.event_id)
        assert (event.data, event.expunged_at is not None) == (b"", True)
        assert await dispatcher.deliveries.count(status="succeeded") == 1
        await dispatcher.events.expunge(receipt.event_id)
        with pytest.raises(NotFound):
            await dispatcher.events.expunge(receipt.event_id, tenant="other")


async def test_a_reader_that_keeps_the_wal_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookwright.storage.sqlite.BUSY_LIMIT", 0.0)
    path = tmp_path / "hooks.db"
    async with Dispatcher(f"sqlite:///{path}", deliver=False) as dispatcher:
        receipt = await dispatcher.emit("user.created", "PRIVATE")
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM hookwright_event").fetchall()
        await dispatcher.emit("user.created", "later")
        with pytest.raises(StorageBusy, match="WAL"):
            await dispatcher.events.expunge(receipt.event_id)
        reader.close()
        await dispatcher.events.expunge(receipt.event_id)
        assert b"PRIVATE" not in path.read_bytes()


async def test_pruning_by_hand_spares_what_is_pending(
    dispatcher: Dispatcher, transport: FakeTransport, clock: VirtualClock
) -> None:
    await failed(dispatcher, transport, 3)
    [endpoint] = (await dispatcher.endpoints.list()).items
    await dispatcher.endpoints.pause(endpoint.id)
    waiting = await dispatcher.emit("video.ready")
    await clock.advance(timedelta(days=2))
    moment = datetime.fromtimestamp(clock.now() / 1e6, UTC)
    assert await dispatcher.events.prune(before=moment - timedelta(days=3)) == 0
    assert await dispatcher.events.prune(before=moment) == 3
    assert [d.event_id for d in (await dispatcher.deliveries.list()).items] == [waiting.event_id]


async def test_many_events_are_emitted_in_one_transaction_or_not_at_all(
    dispatcher: Dispatcher, transport: FakeTransport
) -> None:
    heard: list[EventEmitted] = []
    dispatcher.observe(heard.append, EventEmitted)
    endpoint = await dispatcher.endpoints.create(URL, events=["video.*"], filters={"index": ["a"]})
    receipts = await dispatcher.emit_many(
        [
            NewEvent("video.ready", {"n": 1}, attributes={"index": "a"}),
            NewEvent("video.ready", {"n": 2}, attributes={"index": "b"}),
            NewEvent("other", endpoint_id=endpoint.id, idempotency_key="k"),
        ]
    )
    assert [receipt.delivery_count for receipt in receipts] == [1, 0, 1]
    assert [one.event_id for one in heard] == [receipt.event_id for receipt in receipts]
    await dispatcher.drain(timeout=5)
    assert len(transport.requests) == 2
    before = len((await dispatcher.deliveries.list()).items)
    for bad in (NewEvent("not a type"), NewEvent("other", "changed", idempotency_key="k"), NewEvent("a", float("nan"))):
        with pytest.raises((ValidationFailed, ConflictError)):
            await dispatcher.emit_many([NewEvent("video.ready", attributes={"index": "a"}), bad])
    with pytest.raises(NotFound):
        await dispatcher.emit_many([NewEvent("video.ready"), NewEvent("a", endpoint_id="ep_unknown")])
    assert len((await dispatcher.deliveries.list()).items) == before
    assert await dispatcher.emit_many([]) == []


async def test_a_trace_context_is_kept_with_the_event(dispatcher: Dispatcher) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    receipt = await dispatcher.emit("a", trace_context=trace)
    assert (await dispatcher.events.get(receipt.event_id)).trace_context == trace
    with pytest.raises(ValidationFailed, match="traceparent"):
        await dispatcher.emit("a", trace_context="00-zz")


# -- explain ----------------------------------------------------------------------------------------------------


async def test_explaining_tells_who_gets_an_event_what_is_sent_and_why_others_do_not(
    dispatcher: Dispatcher, transport: FakeTransport
) -> None:
    create = dispatcher.endpoints.create
    match = await create(URL, events=["video.*"], headers={"Authorization": "private"})
    by_type = await create(URL, events=["export.ready"])
    by_key = await create(URL, events=["*"], filters={"index": ["a"]})
    by_value = await create(URL, events=["*"], filters={"size": [1, "b"]})
    by_tenant = await create(URL, events=["*"], tenant="acme")
    flat = await create(URL, events=["video.*"], profile="flat")
    paused, disabled = await create(URL, events=["*"]), await create(URL, events=["*"])
    await dispatcher.endpoints.pause(paused.id)
    await dispatcher.endpoints.disable(disabled.id)
    explanation = await dispatcher.explain("video.ready", [1], attributes={"size": 2})
    reasons = {mismatch.endpoint_id: mismatch.reason for mismatch in explanation.mismatches}
    assert reasons == {
        by_type.id: "events: none of export.ready matches video.ready",
        by_key.id: "filters: the event has no attribute 'index'",
        by_value.id: "filters: 'size' must be one of 1, 'b'",
        by_tenant.id: "tenant: it serves 'acme', the event is of None",
    }
    found = {one.endpoint_id: one for one in explanation.matches}
    assert set(found) == {match.id, flat.id, paused.id, disabled.id}
    assert found[match.id].problem is None
    assert json.loads(found[match.id].body)["data"] == [1]
    headers = dict(found[match.id].headers)
    assert headers["Authorization"] == "****"
    assert headers["webhook-signature"].startswith("v1,")
    assert "private" not in repr(explanation)
    problems = [found[endpoint.id].problem or "" for endpoint in (flat, paused, disabled)]
    assert ["cannot be rendered" in problems[0], "waits" in problems[1], "skipped" in problems[2]] == [True] * 3
    assert transport.requests == []
    assert (await dispatcher.deliveries.list()).items == ()
    with pytest.raises(ValidationFailed, match="type"):
        await dispatcher.explain("not a type")


async def test_what_is_explained_to_a_tenant_names_no_endpoint_that_can_never_serve_it(dispatcher: Dispatcher) -> None:
    create = dispatcher.endpoints.create
    for tenant in ("other", None):
        await create(URL, events=["*"], tenant=tenant)
    own = [(await create(URL, events=events, tenant="acme")).id for events in (["*"], ["export.ready"])]
    everyones = await create(URL, events=["export.ready"], tenant=ALL_TENANTS)
    explanation = await dispatcher.explain("video.ready", tenant="acme")
    assert [match.endpoint_id for match in explanation.matches] == own[:1]
    assert {mismatch.endpoint_id for mismatch in explanation.mismatches} == {own[1], everyones.id}


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d: d.endpoints.create(URL, events=["*"], rate_limit=0), "rate_limit: must be attempts per second"),
        (lambda d: d.endpoints.create(URL, events=["*"], rate_limit=True), "rate_limit"),
        (lambda d: d.endpoints.create(URL, events=["*"], headers={"Webhook-Id": "x"}), "headers: Webhook-Id is set"),
        (lambda d: d.emit("hookwright.test"), "hookwright's own"),
        (lambda d: d.deliveries.list(limit=501), "limit"),
        (lambda d: d.deliveries.list(cursor="made-up"), "cursor"),
        (lambda d: d.endpoints.stats("ep_x", since=datetime(2026, 1, 1)), "no endpoint"),
    ],
)
async def test_bad_input_is_refused_with_what_would_be_right(
    dispatcher: Dispatcher, call: Callable[[Dispatcher], Awaitable[object]], says: str
) -> None:
    with pytest.raises((ValidationFailed, NotFound), match=says):
        await call(dispatcher)
    assert (await dispatcher.endpoints.list()).items == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint_id_prefix": "Not ok"}, "endpoint_id_prefix"),
        ({"disable_after": timedelta(0)}, "disable_after"),
        ({"disable_after": 5}, "disable_after"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Dispatcher("memory:", **options)


@pytest.mark.parametrize("verb", ["requeue", "set_endpoint_state"])
async def test_what_was_let_go_by_hand_is_sent_though_that_failed_after_it_took_effect(
    storage_url: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        receipt = await dispatcher.emit("video.ready")
        [delivery] = await dispatcher.deliveries.list(event_id=receipt.event_id)
        if verb == "requeue":
            await dispatcher.deliveries.cancel(delivery.id)
            await dispatcher.endpoints.resume(endpoint.id)
        await dispatcher.drain(timeout=10)
        change = getattr(dispatcher._storage, verb)

        async def failing(*arguments: Any, **options: Any) -> None:
            await change(*arguments, **options)
            raise StorageBusy("it was committed, but nobody heard of it")

        monkeypatch.setattr(dispatcher._storage, verb, failing)
        with pytest.raises(StorageBusy):
            if verb == "requeue":
                await dispatcher.deliveries.retry(delivery.id)
            else:
                await dispatcher.endpoints.resume(endpoint.id)
        await until(lambda: transport.requests)
