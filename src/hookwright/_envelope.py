"""Envelope: an event becomes the exact bytes of the request's body. A pure function of event and profile."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from hookwright._clock import to_datetime


class Content(NamedTuple):
    """What an envelope is given: `data` is the JSON that was stored, times are microseconds UTC."""

    event_id: str
    event_type: str
    data: bytes
    occurred_at: int


class Envelope(Protocol):
    """Renders the body. Whatever it raises fails the delivery at once, with error `render_error`."""

    def render(self, content: Content) -> bytes:
        """Return the body: the same bytes for the same content, always."""
        ...


class StandardEnvelope:
    """`{"type", "timestamp", "data"}`, as Standard Webhooks 1.0.0 recommends; ISO 8601 with milliseconds and `Z`.

    The event's data is inserted as the bytes that were stored: nothing is parsed or encoded again.

    ```python
    from hookwright import StandardEnvelope

    print(StandardEnvelope())
    ```
    """

    content_type = "application/json"

    def __repr__(self) -> str:
        return "StandardEnvelope()"

    def render(self, content: Content) -> bytes:
        """Return the body."""
        timestamp = to_datetime(content.occurred_at).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # Type and timestamp hold no character that JSON escapes: the type's grammar is checked at emit.
        return b'{"type":"%b","timestamp":"%b","data":%b}' % (
            content.event_type.encode(),
            timestamp.encode(),
            content.data,
        )
