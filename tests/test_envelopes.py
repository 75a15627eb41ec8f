"""Bodies: each envelope's exact bytes, and what happens to data that does not fit one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import to_json

from hookwright import (
    CloudEventsEnvelope,
    ConfigurationError,
    Content,
    Dispatcher,
    EventEnvelope,
    FlatEnvelope,
    HexSignature,
    Profile,
    RetryPolicy,
    Secret,
    StandardEnvelope,
)
from hookwright.testing import FakeTransport
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Callable

MOMENT = 1_705_314_600_123_456  # 2024-01-15T10:30:00.123456Z


def content(data: bytes = b'{"id":1}') -> Content:
    return Content("evt_1", "video.ready", data, MOMENT)


@pytest.mark.parametrize(
    ("envelope", "body"),
    [
        (StandardEnvelope(), '{"type":"video.ready","timestamp":"2024-01-15T10:30:00.123Z","data":{"id":1}}'),
        (EventEnvelope(), '{"event":"video.ready","data":{"id":1},"timestamp":"2024-01-15T10:30:00.123Z"}'),
        (
            EventEnvelope(time_format="iso"),
            '{"event":"video.ready","data":{"id":1},"timestamp":"2024-01-15T10:30:00Z"}',
        ),
        (EventEnvelope(time_format="epoch_ms"), '{"event":"video.ready","data":{"id":1},"timestamp":1705314600123}'),
        (FlatEnvelope(time_format="epoch"), '{"event":"video.ready","timestamp":1705314600,"id":1}'),
        (
            FlatEnvelope(type_key="kind", time_key=None, id_key="eventId"),
            '{"kind":"video.ready","eventId":"evt_1","id":1}',
        ),
        (
            CloudEventsEnvelope(source="/videos"),
            '{"specversion":"1.0","id":"evt_1","source":"/videos","type":"video.ready",'
            '"time":"2024-01-15T10:30:00.123Z","datacontenttype":"application/json","data":{"id":1}}',
        ),
    ],
    ids=repr,
)
def test_the_body_is_exactly_this(envelope: Any, body: str) -> None:
    assert envelope.render(content()) == body.encode()


def test_absent_stays_absent_and_everything_else_keeps_its_bytes() -> None:
    data = b'{"a":null,"b":1.50,"c":"\xc3\xa9, \\"{}\\"","d":{"e":null},"f":[1e400,null]}'
    rest = b'"b":1.50,"c":"\xc3\xa9, \\"{}\\"","d":{"e":null},"f":[1e400,null]}'
    assert FlatEnvelope(time_key=None).render(content(data)) == b'{"event":"video.ready",' + rest
    assert b'"a":null' in FlatEnvelope(omit_null=False).render(content(data))
    assert FlatEnvelope(time_key=None).render(content(b"null")) == b'{"event":"video.ready"}'
    assert FlatEnvelope(time_key=None).render(content(b"{}")) == b'{"event":"video.ready"}'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(data=st.dictionaries(st.text(), JSON))
def test_a_flat_body_says_what_the_data_said(data: dict[str, Any]) -> None:
    encoded = to_json(data)
    envelope = FlatEnvelope(type_key="\0event", time_key=None)
    expected = {key: value for key, value in json.loads(encoded).items() if value is not None}
    assert json.loads(envelope.render(content(encoded))) == {"\0event": "video.ready"} | expected


@pytest.mark.parametrize("data", [b"[1]", b"5", b'"text"', b'{"event":1}', b'{"timestamp":null}'])
def test_data_that_does_not_fit_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="data"):
        FlatEnvelope().render(content(data))


async def test_a_body_that_cannot_be_rendered_fails_the_delivery_at_once() -> None:
    transport = FakeTransport()
    profile = Profile(envelope=FlatEnvelope())
    async with Dispatcher("memory:", transport=transport, profiles={"default": profile}) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("list.made", [1, 2])
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert (delivery.state, delivery.last_error, transport.requests) == ("failed", "render_error", [])


class Asset(pydantic.BaseModel):
    asset_id: str
    note: str | None = None


async def test_a_function_is_an_envelope_and_a_content_type_is_sent() -> None:
    transport = FakeTransport()
    profiles = {
        "default": Profile(envelope=lambda content: b"[%b]" % content.data),
        "cloud": Profile(envelope=CloudEventsEnvelope(source="/x")),
        "flat": Profile(envelope=FlatEnvelope(time_key=None)),
        "broken": Profile(envelope=lambda content: content.event_type),  # type: ignore[arg-type,return-value]  # no bytes
    }
    async with Dispatcher("memory:", transport=transport, profiles=profiles) as dispatcher:
        for name in profiles:
            await dispatcher.endpoints.create(f"{URL}/{name}", events=["*"], profile=name)
        receipt = await dispatcher.emit("asset.made", Asset(asset_id="a_1"))
        states = [d.last_error for d in await dispatcher.deliveries.wait(receipt.event_id, timeout=5)]
        assert sorted(filter(None, states)) == ["render_error"]
        sent = {request.url.rpartition("/")[2]: request for request in transport.requests}
        assert sent["default"].body == b'[{"asset_id":"a_1","note":null}]'
        assert sent["flat"].body == b'{"event":"asset.made","asset_id":"a_1"}'
        assert dict(sent["cloud"].headers)["content-type"] == "application/cloudevents+json"
        assert dict(sent["default"].headers)["content-type"] == "application/json"


async def test_what_a_receiver_may_want_to_know_is_available_as_headers() -> None:
    transport = FakeTransport([500, 200])
    headers = {"X-Event": "{event_type} {event_id}", "X-Try": "{attempt}", "X-Delivery": "{delivery_id}", "X-A": "b"}
    profile = Profile(headers=headers, signers=[HexSignature("X-Sig")], retry=RetryPolicy.schedule(0, 0))
    async with Dispatcher("memory:", transport=transport, profiles={"default": profile}) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=Secret.text("0123456789abcdef"))
        receipt = await dispatcher.emit("a.b")
        await dispatcher.deliveries.wait(receipt.event_id, timeout=20)
        [delivery] = (await dispatcher.deliveries.list()).items
        first, second = (dict(request.headers) for request in transport.requests)
        assert first["X-Event"] == second["X-Event"] == f"a.b {receipt.event_id}"
        assert (first["X-Try"], second["X-Try"]) == ("1", "2")
        assert (second["X-Delivery"], second["X-A"]) == (delivery.id, "b")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EventEnvelope(time_format="rfc"), "time_format"),  # type: ignore[arg-type]  # that is tested
        (lambda: FlatEnvelope(type_key="a", time_key="a"), "different"),
        (lambda: FlatEnvelope(type_key=""), "different"),
        (lambda: CloudEventsEnvelope(source=""), "source"),
        (lambda: CloudEventsEnvelope(source="a b"), "source"),
        (lambda: Profile(envelope=5), "envelope"),  # type: ignore[arg-type]  # that is tested
        (lambda: Profile(headers={"X A": "b"}), "header name"),
        (lambda: Profile(headers={"X-A": "{data}"}), "may name only"),
        (lambda: Profile(headers={"X-A": "{event_id.__class__}"}), "may name only"),
        (lambda: Profile(headers={"X-A": "{event_id!r}"}), "may name only"),
        (lambda: Profile(headers={"X-A": "{"}), "template"),
        (lambda: Profile(headers={"X-A": "a\r\nb: c"}), "ASCII"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_set_up(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()
