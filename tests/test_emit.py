"""What `emit` promises: safe when it returns, refused whole when it cannot be."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import math
import os
from datetime import UTC, datetime, timedelta
from typing import Any

import pydantic
import pytest

from hookwright import (
    ALL_TENANTS,
    ConfigurationError,
    ConflictError,
    DeliveryState,
    Dispatcher,
    EventEmitted,
    NewEvent,
    NotFound,
    StorageBusy,
    ValidationFailed,
)
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until


class Index(enum.StrEnum):
    B = "b"


class Processed(pydantic.BaseModel):
    video_id: str
    seconds: float


@dataclasses.dataclass
class Rendered:
    job: str


@pytest.mark.parametrize(
    ("data", "stored"),
    [
        (None, b"null"),
        ({"ü": [1, True, None]}, '{"ü":[1,true,null]}'.encode()),
        (Processed(video_id="v", seconds=1.5), b'{"video_id":"v","seconds":1.5}'),
        (Rendered("r"), b'{"job":"r"}'),
        ("NaN and Infinity are words here", b'"NaN and Infinity are words here"'),
        (datetime(2026, 1, 1, tzinfo=UTC), b'"2026-01-01T00:00:00Z"'),
    ],
)
async def test_data_is_stored_as_json(storage_url: str, data: object, stored: bytes) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        receipt = await dispatcher.emit("video.processed", data)
        assert (await dispatcher.events.get(receipt.event_id)).data == stored


async def test_data_is_what_it_was_when_emit_was_called(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        data = {"status": "ready"}
        emitting = asyncio.create_task(dispatcher.emit("video.processed", data))
        await asyncio.sleep(0)
        data["status"] = "changed"
        receipt = await emitting
        assert json.loads((await dispatcher.events.get(receipt.event_id)).data) == {"status": "ready"}


_circle: list[Any] = []
_circle.append(_circle)


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        ({"data": math.nan}, "data", "NaN"),
        ({"data": [-math.inf]}, "data", "-Infinity"),
        ({"data": object()}, "data", "JSON"),
        ({"data": _circle}, "data", "JSON"),
        ({"data": "x" * 262_144}, "data", "262144"),
        ({"data": b"\xff"}, "data", "JSON"),
        ({"type": "video..ready"}, "type", "video.processed"),
        ({"type": ""}, "type", "event type"),
        ({"type": "v" * 129}, "type", "128"),
        ({"type": "video.*"}, "type", "event type"),
        ({"type": 5}, "type", "event type"),
        ({"tenant": ""}, "tenant", "text"),
        ({"attributes": {"index": 1.5}}, "attributes", "str, int or bool"),
        ({"attributes": {"index": [None]}}, "attributes", "str, int or bool"),
        ({"event_id": "a.b"}, "event_id", "128"),
        ({"idempotency_key": ""}, "idempotency_key", "256"),
        ({"occurred_at": datetime(2026, 1, 1)}, "occurred_at", "time zone"),
        ({"deliver_at": datetime(2026, 1, 1)}, "deliver_at", "time zone"),
    ],
)
async def test_what_cannot_be_emitted_is_refused_by_name_and_nothing_is_written(
    storage_url: str, arguments: dict[str, Any], field: str, says: str
) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        with pytest.raises(ValidationFailed, match=says) as caught:
            await dispatcher.emit(**({"type": "video.ready"} | arguments))
        assert caught.value.field == field
        assert await dispatcher.deliveries.count() == 0


async def test_an_event_that_nobody_wants_is_stored(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        receipt = await dispatcher.emit("video.ready", 1)
        assert receipt.delivery_count == 0
        assert not await dispatcher.deliveries.wait(receipt.event_id)
        assert (await dispatcher.events.get(receipt.event_id)).type == "video.ready"


async def test_the_same_idempotency_key_stores_one_event(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        heard: list[EventEmitted] = []
        dispatcher.observe(heard.append, EventEmitted)
        first, *others = await asyncio.gather(
            *(dispatcher.emit("video.ready", {"n": 1}, idempotency_key="k") for _ in range(50))
        )
        assert not first.duplicate
        assert all(other.duplicate and other.event_id == first.event_id for other in others)
        assert all(other.delivery_count == 1 for other in others)
        assert await dispatcher.deliveries.count() == 1
        assert len(heard) == 1


@pytest.mark.parametrize("key", ["idempotency_key", "event_id"])
async def test_a_key_used_for_something_else_is_a_conflict(storage_url: str, key: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        await dispatcher.emit("video.ready", {"n": 1}, **{key: "k"})  # type: ignore[arg-type]  # one of two names
        others = [("video.ready", {"n": 2}, None), ("video.x", {"n": 1}, None), ("video.ready", {"n": 1}, "t")]
        for type, data, tenant in others:
            with pytest.raises(ConflictError, match=key):
                await dispatcher.emit(type, data, tenant=tenant, **{key: "k"})  # type: ignore[arg-type]  # see above
        assert (await dispatcher.emit("video.ready", {"n": 1}, **{key: "k"})).duplicate  # type: ignore[arg-type]  # see above


async def test_events_reach_endpoints_by_pattern_tenant_and_attributes(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        create = dispatcher.endpoints.create
        names = {
            (await create(URL, events=["*"])).id: "all",
            (await create(URL, events=["video.*", "video.ready"])).id: "prefix, once",
            (await create(URL, events=["video"])).id: "exact parent",
            (await create(URL, events=["video.ready"], tenant="acme")).id: "acme",
            (await create(URL, events=["video.ready"], tenant=ALL_TENANTS)).id: "everyone",
            (await create(URL, events=["*"], filters={"index": ["a", "b"], "big": [True]})).id: "filtered",
        }

        async def reached(type: str, **options: Any) -> set[str]:
            receipt = await dispatcher.emit(type, None, **options)
            deliveries = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
            assert receipt.delivery_count == len(deliveries)
            return {names[delivery.endpoint_id] for delivery in deliveries}

        assert await reached("video.ready") == {"all", "prefix, once", "everyone"}
        assert await reached("video.ready.hd") == {"all", "prefix, once"}
        assert await reached("video") == {"all", "exact parent"}
        assert await reached("videos.ready") == {"all"}
        assert await reached("video.ready", tenant="acme") == {"acme", "everyone"}
        filtered = await reached("x", attributes={"index": ["z", "b"], "big": True})
        assert filtered == {"all", "filtered"}
        filtered = await reached("x", attributes={"index": Index.B, "big": True})
        assert filtered == {"all", "filtered"}  # a member of an enum is its value, as in JSON
        assert await reached("x", attributes={"index": "b", "big": 1}) == {"all"}  # 1 is not True
        assert await reached("x", attributes={"index": "b"}) == {"all"}


async def test_an_event_can_be_sent_to_one_endpoint(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        one = await dispatcher.endpoints.create(URL, events=["other"])
        await dispatcher.endpoints.create(URL, events=["*"])
        theirs = await dispatcher.endpoints.create(URL, events=["*"], tenant="acme")
        receipt = await dispatcher.emit("video.ready", endpoint_id=one.id)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.endpoint_id == one.id
        with pytest.raises(NotFound):
            await dispatcher.emit("video.ready", endpoint_id="ep_unknown")
        with pytest.raises(NotFound):
            await dispatcher.emit("video.ready", endpoint_id=theirs.id)


async def test_deliver_at_postpones_the_first_attempt(clock: VirtualClock, storage_url: str) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        at = datetime(2026, 1, 1, 1, tzinfo=UTC)
        receipt = await dispatcher.emit("video.ready", deliver_at=at, occurred_at=at - timedelta(days=1))
        [waiting] = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
        assert waiting.next_attempt_at == at
        await clock.advance(3599, settle=dispatcher.drain)
        assert transport.requests == []
        await clock.advance(1, settle=dispatcher.drain)
        assert len(transport.requests) == 1
        assert b'"timestamp":"2025-12-31T01:00:00.000Z"' in transport.requests[0].body


async def test_an_endpoint_created_before_an_emit_began_is_never_missed(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        missed = 0

        async def storm() -> None:
            nonlocal missed
            for _ in range(20):
                known = len((await dispatcher.endpoints.list(limit=500)).items)
                receipt = await dispatcher.emit("video.ready")
                missed += receipt.delivery_count < known

        async def grow() -> None:
            for _ in range(30):
                await dispatcher.endpoints.create(URL, events=["video.*"])

        await asyncio.gather(grow(), *(storm() for _ in range(20)))
        assert missed == 0


async def test_use_at_the_wrong_time_or_place_says_which() -> None:
    dispatcher = Dispatcher("memory:", transport=FakeTransport())
    assert "new" in repr(dispatcher)
    with pytest.raises(ConfigurationError, match="has not been started"):
        await dispatcher.emit("video.ready")
    await dispatcher.start()
    with pytest.raises(ConfigurationError, match="is running"):
        await dispatcher.start()
    with pytest.raises(ConfigurationError, match="another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(dispatcher.emit("video.ready")))
    await dispatcher.aclose()
    await dispatcher.aclose()
    with pytest.raises(ConfigurationError, match="is closed"):
        await dispatcher.endpoints.get("ep_1")
    never = Dispatcher("memory:")
    await never.aclose()


async def test_use_in_a_forked_child_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        here = os.getpid()
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: here + 1)
            with pytest.raises(ConfigurationError, match="forked"):
                await dispatcher.emit("video.ready")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"storage": "hooks.db"}, "sqlite:///"),
        ({"storage": "sqlite:///"}, "sqlite:///"),
        ({"storage": "sqlite:///:memory:"}, "memory:"),
        ({"storage": "mysql://x"}, "sqlite:///"),
        ({"concurrency": 0}, "concurrency"),
        ({"endpoint_concurrency": True}, "endpoint_concurrency"),
        ({"lease": 24.9}, "25 s"),
        ({"shutdown_timeout": -1}, "shutdown_timeout"),
        ({"retention": timedelta(0)}, "retention"),
    ],
)
async def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Dispatcher(**({"storage": "memory:"} | settings))


async def test_a_process_that_does_not_deliver_emits_and_reads(sqlite_url: str) -> None:
    async with Dispatcher(sqlite_url, transport=FakeTransport(), deliver=False) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        assert not dispatcher.is_delivering
        assert await dispatcher.deliveries.count(status=DeliveryState.PENDING) == 1
        with pytest.raises(ConfigurationError, match="does not deliver"):
            await dispatcher.drain()


@pytest.mark.parametrize("many", [False, True])
async def test_an_event_is_sent_though_its_emit_failed_after_it_was_stored(
    storage_url: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.drain(timeout=10)
        verb = "enqueue_many" if many else "enqueue"
        enqueue = getattr(dispatcher._storage, verb)

        async def failing(*arguments: Any, **options: Any) -> None:
            await enqueue(*arguments, **options)
            raise StorageBusy("it was committed, but nobody heard of it")

        monkeypatch.setattr(dispatcher._storage, verb, failing)
        with pytest.raises(StorageBusy):
            await (dispatcher.emit_many([NewEvent("video.ready")]) if many else dispatcher.emit("video.ready"))
        await until(lambda: transport.requests)
