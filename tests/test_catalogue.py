"""The catalogue: what is refused, and what is exported."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jsonschema
import pydantic
import pytest

from hookwright import (
    Catalogue,
    CloudEventsEnvelope,
    ConfigurationError,
    Dispatcher,
    EventEnvelope,
    FlatEnvelope,
    NotFound,
    Profile,
    StandardEnvelope,
    ValidationFailed,
)
from hookwright._envelope import Content
from hookwright.testing import FakeTransport
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Callable


class Format(pydantic.BaseModel):
    quality: str
    size: int = pydantic.Field(description="in bytes | roughly")


class Processed(pydantic.BaseModel):
    """A video can be watched."""

    video_id: str
    formats: list[Format] = []
    note: str | None = None


def catalogue() -> Catalogue:
    catalogue = Catalogue()
    catalogue.event("video.processed", examples=[{"video_id": "vid_1"}, Processed(video_id="vid_2")])(Processed)
    schema = {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}
    catalogue.add("user.created", schema, description="Somebody | registered.", examples=[{"id": 1}])
    catalogue.add("system.ping")
    return catalogue


@dataclasses.dataclass
class User:
    id: int


@pytest.mark.parametrize(
    ("type", "data"),
    [
        ("video.processed", Processed(video_id="a")),
        ("video.processed", {"video_id": "a", "formats": [{"quality": "720p", "size": 1}]}),
        ("user.created", {"id": 5}),
        ("user.created", User(5)),
        ("system.ping", None),
        ("system.ping", [1, {"anything": "goes"}]),
    ],
)
async def test_data_that_fits_is_stored_as_it_was_given(type: str, data: Any) -> None:
    transport = FakeTransport()
    async with Dispatcher("memory:", catalogue=catalogue(), transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        assert (await dispatcher.emit(type, data)).delivery_count == 1
        assert (await dispatcher.explain(type, data)).matches


@pytest.mark.parametrize(
    ("type", "data", "says"),
    [
        ("video.deleted", None, "not in the catalogue, which has: system.ping, user.created, video.processed"),
        ("video.processed", {}, "video_id: Field required"),
        ("video.processed", None, "does not fit"),
        ("video.processed", {"video_id": "a", "formats": [{"quality": "x"}]}, r"formats\.0\.size: Field required"),
        ("video.processed", User(1), "video_id"),
        ("video.processed", {"video_id": "a", "formats": [{"quality": "x", "size": "1"}]}, "valid integer"),
        ("video.processed", object(), "cannot be encoded"),
        ("user.created", {"id": "5"}, r"\$\.id: it is not of type 'integer'"),
        ("user.created", None, "not of type 'object'"),
    ],
)
async def test_anything_else_is_refused_and_nothing_is_written(type: str, data: Any, says: str) -> None:
    async with Dispatcher("memory:", catalogue=catalogue(), transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        with pytest.raises(ValidationFailed, match=says):
            await dispatcher.emit(type, data)
        assert await dispatcher.deliveries.count() == 0


@pytest.mark.parametrize("pattern", ["*", "video.*", "video.processed", "hookwright.*", "hookwright.endpoint.failing"])
async def test_patterns_that_match_something_are_taken(pattern: str) -> None:
    options: dict[str, Any] = {"catalogue": catalogue(), "transport": FakeTransport(), "operational_events": True}
    async with Dispatcher("memory:", **options) as dispatcher:
        assert (await dispatcher.endpoints.create(URL, events=[pattern])).events == (pattern,)


async def test_subscriptions_to_events_of_ours_that_never_come_are_refused() -> None:
    async with Dispatcher("memory:", transport=FakeTransport(), operational_events=True) as dispatcher:
        with pytest.raises(ValidationFailed, match="none of ours, which are: "):
            await dispatcher.endpoints.create(URL, events=["hookwright.delivry.faild"])
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        with pytest.raises(ValidationFailed, match="operational_events=True"):
            await dispatcher.endpoints.create(URL, events=["hookwright.*"])


def test_an_envelope_that_cannot_hold_a_types_data_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="cannot hold data with a field 'id'"):
        Dispatcher("memory:", catalogue=catalogue(), profiles={"x": Profile(envelope=FlatEnvelope(id_key="id"))})
    with pytest.raises(ConfigurationError, match="openapi"):
        catalogue().openapi(envelope=Profile())  # type: ignore[arg-type]  # that is tested
    with pytest.raises(ConfigurationError, match=r"use @catalogue\.event\('"):
        catalogue().event(Processed)  # type: ignore[arg-type]


def test_definitions_of_two_types_do_not_meet() -> None:
    both = Catalogue()

    class Item(pydantic.BaseModel):
        a: int

    first = pydantic.create_model("First", item=(Item, ...))
    both.event("a.first")(first)
    both.add("a.second", {"$defs": {"Item": {"type": "string"}}, "$ref": "#/$defs/Item"})
    document = both.openapi()
    assert document["components"]["schemas"]["a.second.Item"] == {"type": "string"}
    assert document["components"]["schemas"]["a.first.Item"]["properties"]["a"]["type"] == "integer"
    body = document["webhooks"]["a.second"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["data"]["$ref"] == "#/components/schemas/a.second.Item"


@pytest.mark.parametrize("pattern", ["video", "video.proc", "videos.*", "video.processed.*", "user.deleted"])
async def test_patterns_that_match_nothing_are_refused(pattern: str) -> None:
    async with Dispatcher("memory:", catalogue=catalogue(), transport=FakeTransport()) as dispatcher:
        with pytest.raises(ValidationFailed, match="matches nothing in the catalogue"):
            await dispatcher.endpoints.create(URL, events=["*", pattern])
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        with pytest.raises(ValidationFailed, match="matches nothing"):
            await dispatcher.endpoints.update(endpoint.id, events=[pattern])


@pytest.mark.parametrize(
    ("declare", "error", "says"),
    [
        (lambda c: c.add("video.processed"), ConfigurationError, "already"),
        (lambda c: c.add("not a type"), ValidationFailed, "name"),
        (lambda c: c.add("hookwright.x"), ConfigurationError, "own"),
        (lambda c: c.add("x", {"type": 5}), ConfigurationError, "no JSON Schema"),
        (lambda c: c.add("x", {"type": "object"}, examples=[5]), ConfigurationError, "example does not fit"),
        (lambda c: c.event("x")(User), ConfigurationError, "pydantic model"),
        (lambda c: c.event("x", examples=[{}])(Processed), ConfigurationError, "example does not fit"),
        (lambda c: c.json_schema("x"), NotFound, "not in the catalogue"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(
    declare: Callable[[Catalogue], object], error: type[Exception], says: str
) -> None:
    declared = catalogue()
    with pytest.raises(error, match=says):
        declare(declared)
    assert declared.names == ("system.ping", "user.created", "video.processed")


@pytest.mark.parametrize(
    "envelope",
    [
        StandardEnvelope(),
        EventEnvelope(time_format="epoch"),
        FlatEnvelope(id_key="event_id"),
        CloudEventsEnvelope(source="/x"),
    ],
    ids=repr,
)
def test_the_exported_schema_is_that_of_the_body(envelope: Any) -> None:
    document = catalogue().openapi(title="Videos", version="2", envelope=envelope)
    assert (document["openapi"], document["info"]) == ("3.1.0", {"title": "Videos", "version": "2"})
    assert set(document["webhooks"]) == set(catalogue().names)
    operation = document["webhooks"]["video.processed"]["post"]
    assert operation["description"] == "A video can be watched."
    [(content_type, content)] = operation["requestBody"]["content"].items()
    assert content_type == getattr(envelope, "content_type", "application/json")
    validator = jsonschema.Draft202012Validator(content["schema"] | {"components": document["components"]})
    data = b'{"video_id":"a","formats":[{"quality":"x","size":1}]}'
    body = pydantic.TypeAdapter(Any).validate_json(
        envelope.render(Content("evt_1", "video.processed", data, 1_700_000_000_000_000))
    )
    validator.validate(body)
    wrong = envelope.render(Content("evt_1", "video.processed", b'{"video_id":5}', 1_700_000_000_000_000))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(pydantic.TypeAdapter(Any).validate_json(wrong))


def test_the_document_for_people_names_types_fields_and_examples() -> None:
    text = catalogue().markdown()
    assert text.index("## `system.ping`") < text.index("## `user.created`") < text.index("## `video.processed`")
    assert "| `video_id` | string | required |" in text
    assert "| `formats` | array of Format | optional |" in text
    assert "| `note` | string or null | optional |" in text
    assert '"video_id": "vid_2"' in text
    assert catalogue().json_schema("system.ping") == {}
    assert catalogue().json_schema("user.created")["required"] == ["id"]
    assert repr(catalogue()) == "Catalogue(system.ping, user.created, video.processed)"
    assert Catalogue().openapi() == {
        "openapi": "3.1.0",
        "info": {"title": "Webhooks", "version": "1"},
        "webhooks": {},
    }
