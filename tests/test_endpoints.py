"""`dispatcher.endpoints`: what is kept, what is shown, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pydantic
import pytest

from hookwright import (
    ALL_TENANTS,
    ConflictError,
    DeliveryState,
    Dispatcher,
    Endpoint,
    EndpointDisabled,
    EndpointState,
    HttpxTransport,
    NetworkPolicy,
    NotFound,
    Secret,
    ValidationFailed,
)
from hookwright.testing import FakeTransport, Inbox
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def dispatcher(storage_url: str) -> AsyncIterator[Dispatcher]:
    async with Dispatcher(storage_url, transport=FakeTransport()) as running:
        yield running


async def test_what_was_given_is_kept_and_the_secret_is_shown_once(dispatcher: Dispatcher) -> None:
    created = await dispatcher.endpoints.create(
        "https://Receiver.Example:443/hooks?a=1",
        events=["video.*", "export.ready", "video.*"],
        name="Review",
        description="for the archive",
        filters={"index_id": ["idx_archive"], "size": 3},  # type: ignore[dict-item]  # one value stands for a list
        metadata={"owner": {"team": "ops"}},
        headers={"Authorization": "Bearer top-secret-value"},
        tenant="acme",
        concurrency=2,
        timeout=20,
    )
    assert created.secret is not None
    read = await dispatcher.endpoints.get(created.id, tenant="acme")
    assert read.secret is None
    assert read == replace(created, secret=None)
    assert read.url == "https://receiver.example/hooks?a=1"
    assert read.events == ("video.*", "export.ready")
    assert read.filters == {"index_id": ("idx_archive",), "size": (3,)}
    assert read.metadata == {"owner": {"team": "ops"}}
    assert read.header_names == ("Authorization",)
    assert (read.tenant, read.concurrency, read.timeout, read.state) == ("acme", 2, 20, EndpointState.ACTIVE)
    # As a web framework would answer with it.
    shown = pydantic.TypeAdapter(Endpoint).dump_json(created).decode() + repr(created) + str(created)
    assert created.secret.reveal() not in shown
    assert "top-secret-value" not in shown


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"url": "ftp://example.com/"}, "url", "https"),
        ({"url": "http://example.com/"}, "url", "allow_http"),
        ({"url": "https://127.0.0.1/"}, "url", "loopback"),
        ({"events": []}, "events", "at least one"),
        ({"events": "video.*"}, "events", "list"),
        ({"events": ["video*"]}, "events", "pattern"),
        ({"events": [7]}, "events", "pattern"),
        ({"events": ["v" * 200]}, "events", "pattern"),
        ({"name": "x" * 1001}, "name", "1,000"),
        ({"filters": {"a": []}}, "filters", "at least one"),
        ({"filters": {"a": [1.5]}}, "filters", "str, int or bool"),
        ({"metadata": {"a": object()}}, "metadata", "JSON"),
        ({"metadata": {"a": float("nan")}}, "metadata", "JSON"),
        ({"headers": {"Bad Name": "x"}}, "headers", "header name"),
        ({"headers": {"Host": "x"}}, "headers", "leave it out"),
        ({"headers": {"webhook-id": "x"}}, "headers", "leave it out"),
        ({"headers": {"Content-Type": "x"}}, "headers", "leave it out"),
        ({"headers": {"X-A": "a\r\nb: c"}}, "headers", "printable"),
        ({"headers": {"X-A": "é"}}, "headers", "printable"),
        ({"tenant": ""}, "tenant", "ALL_TENANTS"),
        ({"secret": "hunter2"}, "secret", "Secret.text"),
        ({"secret": "v1,whsec_abc"}, "secret", "whsec_"),
        ({"secret": Secret.text("short")}, "secret", "whsec_"),
        ({"secret": "whsec_" + "A" * 12}, "secret", "24"),
        ({"secret": "whsec_!!"}, "secret", "base64"),
        ({"profile": "other"}, "profile", "default"),
        ({"concurrency": 0}, "concurrency", "at least 1"),
        ({"concurrency": True}, "concurrency", "at least 1"),
        ({"timeout": 0}, "timeout", "50"),
        ({"timeout": 50.1}, "timeout", "50"),
    ],
)
async def test_what_cannot_work_is_refused_by_name_and_changes_nothing(
    dispatcher: Dispatcher, given: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(ValidationFailed, match=says) as caught:
        await dispatcher.endpoints.create(**({"url": URL, "events": ["*"]} | given))
    assert caught.value.field == field
    assert (await dispatcher.endpoints.list()).items == ()
    existing = await dispatcher.endpoints.create(URL, events=["*"])
    if not given.keys() & {"tenant", "secret"}:
        with pytest.raises(ValidationFailed):
            await dispatcher.endpoints.update(existing.id, **given)
        assert await dispatcher.endpoints.get(existing.id) == replace(existing, secret=None)


async def test_update_changes_what_is_given_and_nothing_else(dispatcher: Dispatcher) -> None:
    before = await dispatcher.endpoints.create(URL, events=["a"], name="n", concurrency=3, metadata={"k": 1})
    after = await dispatcher.endpoints.update(before.id, events=["b.*"], concurrency=None, filters={"x": ["y"]})
    assert (after.events, after.concurrency, after.filters) == (("b.*",), None, {"x": ("y",)})
    assert (after.name, after.metadata, after.url) == ("n", {"k": 1}, URL)
    assert after.updated_at >= before.updated_at
    assert (await dispatcher.emit("a")).delivery_count == 0
    assert (await dispatcher.emit("b.c", attributes={"x": "y"})).delivery_count == 1


async def test_of_two_updates_at_once_one_is_a_conflict(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["a"])
    done = await asyncio.gather(
        *(dispatcher.endpoints.update(endpoint.id, name=str(n)) for n in range(5)), return_exceptions=True
    )
    conflicts = [result for result in done if isinstance(result, ConflictError)]
    assert len(conflicts) + sum(not isinstance(result, BaseException) for result in done) == 5
    assert (await dispatcher.endpoints.get(endpoint.id)).name is not None


async def test_listing_goes_on_where_the_cursor_says(dispatcher: Dispatcher) -> None:
    ids = [(await dispatcher.endpoints.create(URL, events=["*"], tenant=f"t{n % 2}")).id for n in range(5)]
    first = await dispatcher.endpoints.list(limit=3)
    rest = await dispatcher.endpoints.list(limit=3, cursor=first.next_cursor)
    assert sorted(item.id for item in first.items + rest.items) == sorted(ids)
    assert rest.next_cursor is None
    assert {item.tenant for item in (await dispatcher.endpoints.list(tenant="t1")).items} == {"t1"}
    for limit in (0, 501, True, "5"):
        with pytest.raises(ValidationFailed, match="limit"):
            await dispatcher.endpoints.list(limit=limit)  # type: ignore[arg-type]  # that is what is tested
    for cursor in ("", "rubbish", "é", (first.next_cursor or "")[:-4] + "AAAA"):
        with pytest.raises(ValidationFailed, match="cursor"):
            await dispatcher.endpoints.list(cursor=cursor)
    with pytest.raises(ValidationFailed, match="cursor"):
        await dispatcher.endpoints.list(cursor=first.next_cursor, tenant="t1")


async def test_another_tenants_endpoint_is_not_found(dispatcher: Dispatcher) -> None:
    theirs = await dispatcher.endpoints.create(URL, events=["*"], tenant="them")
    everyones = await dispatcher.endpoints.create(URL, events=["*"], tenant=ALL_TENANTS)
    for verb in ("get", "pause", "resume", "disable", "enable", "delete", "update"):
        for endpoint in (theirs, everyones):
            with pytest.raises(NotFound):
                await getattr(dispatcher.endpoints, verb)(endpoint.id, tenant="us")
        with pytest.raises(NotFound):
            await getattr(dispatcher.endpoints, verb)("ep_unknown")
    assert (await dispatcher.endpoints.get(theirs.id)).state is EndpointState.ACTIVE


async def test_disabled_records_as_skipped_and_enabled_delivers_again(dispatcher: Dispatcher) -> None:
    told: list[EndpointDisabled] = []
    dispatcher.observe(told.append, EndpointDisabled)
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.endpoints.pause(endpoint.id)
    held = await dispatcher.emit("video.ready")
    disabled = await dispatcher.endpoints.disable(endpoint.id, reason="unpaid")
    assert (disabled.state, disabled.disabled_reason) == (EndpointState.DISABLED, "unpaid")
    assert [observation.reason for observation in told] == ["unpaid"]
    with pytest.raises(ConflictError, match="enable"):
        await dispatcher.endpoints.resume(endpoint.id)
    [swept] = await dispatcher.deliveries.wait(held.event_id, timeout=5)
    assert swept.state is DeliveryState.SKIPPED
    assert (await dispatcher.emit("video.ready")).delivery_count == 0
    enabled = await dispatcher.endpoints.enable(endpoint.id)
    assert enabled.disabled_reason is None
    receipt = await dispatcher.emit("video.ready")
    [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
    assert delivery.state is DeliveryState.SUCCEEDED


async def test_deleted_is_gone_and_its_history_stays(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("video.ready")
    await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
    await dispatcher.endpoints.delete(endpoint.id)
    with pytest.raises(NotFound):
        await dispatcher.endpoints.get(endpoint.id)
    assert (await dispatcher.endpoints.list()).items == ()
    assert (await dispatcher.emit("video.ready")).delivery_count == 0
    assert await dispatcher.deliveries.count(endpoint_id=endpoint.id) == 1


async def test_history_answers_by_every_filter(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"], tenant=ALL_TENANTS)
    first = await dispatcher.emit("video.ready", {"n": 1}, tenant="acme")
    await dispatcher.emit("video.gone")
    [delivery] = await dispatcher.deliveries.wait(first.event_id, timeout=5)
    await dispatcher.drain()
    count = dispatcher.deliveries.count
    assert await count(event_type="video.ready", endpoint_id=endpoint.id, status=DeliveryState.SUCCEEDED) == 1
    assert await count(tenant="acme") == 1
    assert await count(since=delivery.created_at) == 2
    with pytest.raises(ValidationFailed, match="time zone"):
        await count(since=delivery.created_at.replace(tzinfo=None))
    assert (await dispatcher.deliveries.get(delivery.id, tenant="acme")) == delivery
    assert json.loads((await dispatcher.events.get(first.event_id, tenant="acme")).data) == {"n": 1}
    for verb in ("get", "attempts"):
        with pytest.raises(NotFound):
            await getattr(dispatcher.deliveries, verb)(delivery.id, tenant="other")
        with pytest.raises(NotFound):
            await getattr(dispatcher.deliveries, verb)("dlv_unknown")
    with pytest.raises(NotFound):
        await dispatcher.events.get(first.event_id, tenant="other")
    with pytest.raises(NotFound):
        await dispatcher.deliveries.wait("evt_unknown")


async def test_the_default_transport_delivers_over_real_sockets(sqlite_url: str) -> None:
    async with Inbox() as inbox, Dispatcher(sqlite_url, network=NetworkPolicy.development()) as dispatcher:
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["*"])
        inbox.expect(endpoint.secret)
        receipt = await dispatcher.emit("video.ready", {"id": 1})
        [webhook] = await inbox.wait_for(1)
        assert (webhook.verified, webhook.event_id) == (True, receipt.event_id)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.last_status == 200
    async with Inbox() as inbox:
        transport = HttpxTransport(network=NetworkPolicy(allow_http=True))
        policy = NetworkPolicy.development()
        async with Dispatcher("memory:", network=policy, transport=transport) as dispatcher:
            await dispatcher.endpoints.create(inbox.url, events=["*"])
            receipt = await dispatcher.emit("video.ready")
            await dispatcher.drain(timeout=5)
            [blocked] = (await dispatcher.deliveries.list()).items
            assert (blocked.state, blocked.last_error) == (DeliveryState.PENDING, "blocked_target")
            assert inbox.received == []
