"""Envelope: an event becomes the exact bytes of the request's body. A pure function of event and profile."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from hookwright._clock import SECOND, to_datetime
from hookwright._errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TimeFormat = Literal["iso_ms", "iso", "epoch", "epoch_ms"]
"""`2026-01-15T10:30:00.000Z`, `2026-01-15T10:30:00Z`, whole seconds, or whole milliseconds since 1970."""


class UnfitData(ValueError):
    """The data does not fit the envelope. The message names keys, and nothing of their values."""


class Content(NamedTuple):
    """What an envelope is given: `data` is the JSON that was stored, `occurred_at` microseconds UTC."""

    event_id: str
    event_type: str
    data: bytes
    occurred_at: int
    tenant: str | None = None

    def __repr__(self) -> str:
        return f"Content(event_id={self.event_id!r}, event_type={self.event_type!r}, {len(self.data)} bytes)"


class Envelope(Protocol):
    """Renders the body. Whatever it raises fails the delivery at once, with error `render_error`.

    A `content_type` attribute, where there is one, is sent as the header of that name (otherwise `application/json`).
    """

    def render(self, content: Content) -> bytes:
        """Return the body: the same bytes for the same content, always."""
        ...


class StandardEnvelope:
    """`{"type", "timestamp", "data"}`, as Standard Webhooks 1.0.0 recommends.

    The event's data is inserted as the bytes that were stored: nothing is parsed or encoded again.

    ```python
    from hookwright import Content, StandardEnvelope

    print(StandardEnvelope().render(Content("evt_1", "video.ready", b'{"id":"vid_1"}', 1_700_000_000_000_000)))
    ```
    """

    def __init__(self, *, time_format: TimeFormat = "iso_ms") -> None:
        self._time_format = _checked(time_format)

    def __repr__(self) -> str:
        return f"StandardEnvelope(time_format={self._time_format!r})"

    def render(self, content: Content) -> bytes:
        """Return the body."""
        # Type and timestamp hold no character that JSON escapes: the type's grammar is checked at emit.
        return b'{"type":"%b","timestamp":%b,"data":%b}' % (
            content.event_type.encode(),
            _time(content.occurred_at, self._time_format),
            content.data,
        )

    def schema(self, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of the body, given that of the data."""
        fields = {"type": {"const": event_type}, "timestamp": _time_schema(self._time_format), "data": data}
        return _object_schema(fields)


class EventEnvelope:
    """`{"event", "data", "timestamp"}`.

    ```python
    from hookwright import Content, EventEnvelope

    print(EventEnvelope(time_format="iso").render(Content("evt_1", "video.ready", b"null", 1_700_000_000_000_000)))
    ```
    """

    def __init__(self, *, time_format: TimeFormat = "iso_ms") -> None:
        self._time_format = _checked(time_format)

    def __repr__(self) -> str:
        return f"EventEnvelope(time_format={self._time_format!r})"

    def render(self, content: Content) -> bytes:
        """Return the body."""
        return b'{"event":"%b","data":%b,"timestamp":%b}' % (
            content.event_type.encode(),
            content.data,
            _time(content.occurred_at, self._time_format),
        )

    def schema(self, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of the body, given that of the data."""
        fields = {"event": {"const": event_type}, "data": data, "timestamp": _time_schema(self._time_format)}
        return _object_schema(fields)


class FlatEnvelope:
    """The event's own fields at top level, beside its type, time and, with `id_key`, its id.

    The data must be a JSON object (or null, which adds nothing) without fields of these names. With `omit_null`, top
    level fields that are null are left out: an optional field of a pydantic model that was never set is null in JSON,
    and receivers expect it to be absent. All else is passed on byte for byte.

    Raises ConfigurationError for keys that are equal or empty. Data that does not fit fails the delivery.

    ```python
    from hookwright import Content, FlatEnvelope

    flat = FlatEnvelope(type_key="event", time_key="occurredAt", time_format="epoch")
    print(flat.render(Content("evt_1", "file.ready", b'{"fileId":"f_1","results":null}', 1_700_000_000_000_000)))
    ```
    """

    def __init__(
        self,
        *,
        type_key: str = "event",
        time_key: str | None = "timestamp",
        id_key: str | None = None,
        time_format: TimeFormat = "iso_ms",
        omit_null: bool = True,
    ) -> None:
        self._keys = [type_key, *(key for key in (time_key, id_key) if key is not None)]
        if not all(isinstance(key, str) and key for key in self._keys) or len(set(self._keys)) < len(self._keys):
            raise ConfigurationError("FlatEnvelope: type_key, time_key and id_key must be different names")
        self._type_key, self._time_key, self._id_key = type_key, time_key, id_key
        self._time_format = _checked(time_format)
        self._omit_null = omit_null

    def __repr__(self) -> str:
        return f"FlatEnvelope(keys={self._keys!r}, time_format={self._time_format!r}, omit_null={self._omit_null})"

    def render(self, content: Content) -> bytes:
        """Return the body. Raises ValueError for data that is no object, or holds one of the envelope's keys."""
        fields = [(self._type_key, json.dumps(content.event_type))]
        if self._time_key is not None:
            fields.append((self._time_key, _time(content.occurred_at, self._time_format).decode()))
        if self._id_key is not None:
            fields.append((self._id_key, json.dumps(content.event_id)))
        for key, raw in _members(content.data.decode()):
            if key in self._keys:
                raise UnfitData(f"the data has a field {key!r}, which is the envelope's")
            if raw != "null" or not self._omit_null:
                fields.append((key, raw))
        return ("{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{raw}" for key, raw in fields) + "}").encode()

    def schema(self, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of the body, given that of the data. Raises ConfigurationError when they clash."""
        fields: dict[str, Any] = {self._type_key: {"const": event_type}}
        if self._time_key is not None:
            fields[self._time_key] = _time_schema(self._time_format)
        if self._id_key is not None:
            fields[self._id_key] = {"type": "string"}
        clash = fields.keys() & data.get("properties", {}).keys()
        if clash:
            raise ConfigurationError(f"{event_type}: {self!r} cannot hold data with a field {min(clash)!r}")
        return {"allOf": [_object_schema(fields), data]}


class CloudEventsEnvelope:
    """A CloudEvents 1.0.2 event in structured JSON mode, `application/cloudevents+json`.

    `source` is the context attribute of that name: a URI reference that, with the id, names the event uniquely.

    Raises ConfigurationError for an empty source, or one with spaces.

    ```python
    from hookwright import CloudEventsEnvelope, Content

    envelope = CloudEventsEnvelope(source="https://videos.example/")
    print(envelope.render(Content("evt_1", "video.ready", b'{"id":"vid_1"}', 1_700_000_000_000_000)))
    ```
    """

    content_type = "application/cloudevents+json"

    def __init__(self, *, source: str) -> None:
        if not isinstance(source, str) or not source or not source.isascii() or any(map(str.isspace, source)):
            raise ConfigurationError("CloudEventsEnvelope: source must be a URI reference, such as '/videos'")
        self._source = source

    def __repr__(self) -> str:
        return f"CloudEventsEnvelope(source={self._source!r})"

    def render(self, content: Content) -> bytes:
        """Return the body."""
        return (
            b'{"specversion":"1.0","id":"%b","source":%b,"type":"%b","time":%b,'
            b'"datacontenttype":"application/json","data":%b}'
        ) % (
            content.event_id.encode(),
            json.dumps(self._source).encode(),
            content.event_type.encode(),
            _time(content.occurred_at, "iso_ms"),
            content.data,
        )

    def schema(self, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of the body, given that of the data."""
        return _object_schema(
            {
                "specversion": {"const": "1.0"},
                "id": {"type": "string"},
                "source": {"const": self._source},
                "type": {"const": event_type},
                "time": _time_schema("iso_ms"),
                "datacontenttype": {"const": "application/json"},
                "data": data,
            }
        )


class CallableEnvelope:
    """A function as an envelope: what `Profile(envelope=function)` makes of it."""

    def __init__(self, function: Callable[[Content], bytes]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return f"CallableEnvelope({self.function!r})"

    def render(self, content: Content) -> bytes:
        """Return what the function returns."""
        return self.function(content)


def _checked(time_format: TimeFormat) -> TimeFormat:
    if time_format not in get_args(TimeFormat):
        raise ConfigurationError(f"time_format: must be one of {', '.join(get_args(TimeFormat))}, not {time_format!r}")
    return time_format


def _time(microseconds: int, time_format: TimeFormat) -> bytes:
    """Return the moment as a JSON value."""
    if time_format == "epoch":
        return b"%d" % (microseconds // SECOND)
    if time_format == "epoch_ms":
        return b"%d" % (microseconds // 1000)
    seconds, rest = divmod(microseconds, SECOND)
    if time_format == "iso_ms":
        return b'"%b.%03dZ"' % (_second(seconds), rest // 1000)
    return b'"%bZ"' % _second(seconds)


@lru_cache(maxsize=64)  # events come in order of time: a second is seldom asked for alone
def _second(seconds: int) -> bytes:
    return to_datetime(seconds * SECOND).isoformat(timespec="seconds").removesuffix("+00:00").encode()


def _time_schema(time_format: TimeFormat) -> dict[str, Any]:
    return {"type": "integer"} if time_format.startswith("epoch") else {"type": "string", "format": "date-time"}


def _object_schema(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields)}


def _members(text: str) -> Iterator[tuple[str, str]]:
    """Split a JSON object, as we encoded it (no spaces), into its keys and the text of their values."""
    if text in {"null", "{}"}:
        return
    if not text.startswith("{"):
        raise UnfitData("the data is no JSON object: its fields cannot be put at top level")
    decoder, position = json.JSONDecoder(), 1
    while True:
        key, position = decoder.raw_decode(text, position)
        _, end = decoder.raw_decode(text, position + 1)
        yield key, text[position + 1 : end]
        if text[end] == "}":
            return
        position = end + 1
