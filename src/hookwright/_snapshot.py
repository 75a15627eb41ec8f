"""What `emit` was given, checked and made into bytes, once: an event that nothing can change any more."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticSerializationError, to_json

from hookwright._catalogue import RESERVED, check_type
from hookwright._clock import from_datetime
from hookwright._errors import ValidationFailed
from hookwright._ids import new_id
from hookwright._models import ALL_TENANTS, EventRow, check_text

if TYPE_CHECKING:
    from hookwright._catalogue import Catalogue
    from hookwright._clock import Clock
    from hookwright._models import AttributeValue

Scalar = str | int | bool


class NewEvent(NamedTuple):
    """An event for `emit_many`: the arguments of `emit`."""

    type: str
    data: object = None
    attributes: Mapping[str, AttributeValue] | None = None
    tenant: str | None = None
    idempotency_key: str | None = None
    event_id: str | None = None
    endpoint_id: str | None = None
    occurred_at: datetime | None = None
    deliver_at: datetime | None = None
    trace_context: str | None = None

    def __repr__(self) -> str:
        return f"NewEvent(type={self.type!r}, tenant={self.tenant!r}, event_id={self.event_id!r})"


DATA_LIMIT = 256 * 1024
"""Bytes of an event's data as JSON at most."""


def term(key: str, value: Scalar) -> str:
    """Return one text for an attribute and a value, as JSON: there True is not 1, and a member of an enum its value."""
    return f"{json.dumps(key)}:{json.dumps(value)}"


def of_term(text: str) -> tuple[str, Scalar]:
    """Return attribute and value."""
    [(key, value)] = json.loads(f"{{{text}}}").items()
    return key, value


def snapshot(new: NewEvent, *, catalogue: Catalogue | None, clock: Clock) -> tuple[EventRow, frozenset[str]]:
    """Return the event to store, and the terms of its attributes, which filters look for. Raises ValidationFailed."""
    check_type(new.type)
    if new.type.startswith(RESERVED):
        raise ValidationFailed("type", f"types that begin with {RESERVED!r} are hookwright's own: choose another name")
    encoded = _encode(new.data)
    if catalogue is not None:
        catalogue.check(new.type, new.data, encoded)
    listed = _attributes(new.attributes)
    if new.tenant is not None:
        _check_tenant(new.tenant)
    digest = None
    if new.idempotency_key is not None or new.event_id is not None:
        # It tells a repeated emit from another one under the same key or id. The order of keys counts.
        told = repr((new.type, new.tenant, new.endpoint_id)).encode()
        digest = hashlib.sha256(b"\0".join([told, encoded])).digest()
    event = EventRow(
        new_id("evt", clock.now()) if new.event_id is None else _event_id(new.event_id),
        new.type,
        encoded,
        clock.wall() if new.occurred_at is None else from_datetime(check_aware("occurred_at", new.occurred_at)),
        new.tenant,
        json.dumps(listed) if listed else "{}",
        None if new.idempotency_key is None else _idempotency_key(new.idempotency_key),
        digest,
        None if new.trace_context is None else _trace_context(new.trace_context),
    )
    return event, frozenset([term(key, value) for key, values in listed.items() for value in values])


def _check_tenant(tenant: str) -> None:
    if tenant is ALL_TENANTS:
        raise ValidationFailed("tenant", "ALL_TENANTS is for endpoints.create: an event is of one tenant, or of None")
    if not (isinstance(tenant, str) and tenant):
        raise ValidationFailed("tenant", "must be text or None")
    check_text("tenant", tenant)


def _encode(data: object) -> bytes:
    try:
        encoded = to_json(data)
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise ValidationFailed("data", f"cannot be encoded as JSON: {error}") from None
    if len(encoded) > DATA_LIMIT:
        raise ValidationFailed(
            "data", f"is {len(encoded)} bytes of JSON, at most {DATA_LIMIT} are allowed: send a link"
        )
    if b"NaN" in encoded or b"Infinity" in encoded:
        json.loads(encoded, parse_constant=_refuse_constant)
    return encoded


def _refuse_constant(constant: str) -> None:
    raise ValidationFailed("data", f"holds {constant}, which JSON cannot express: use None or text")


def _attributes(attributes: Mapping[str, AttributeValue] | None) -> dict[str, list[Scalar]]:
    listed: dict[str, list[Scalar]] = {}
    if attributes is not None and not isinstance(attributes, Mapping):
        raise ValidationFailed(
            "attributes", f"must be a mapping, such as {{'index_id': 'idx_1'}}, not {type(attributes).__name__}"
        )
    for key, value in (attributes or {}).items():
        if not isinstance(key, str):
            raise ValidationFailed("attributes", f"the key {key!r} must be text")
        values = [value] if isinstance(value, (str, int)) else value
        if not isinstance(values, (list, tuple, set, frozenset)) or not all(isinstance(v, (str, int)) for v in values):
            raise ValidationFailed("attributes", f"{key!r} must be a str, int or bool, or a list of these")
        listed[key] = list(values)
    return listed


_EVENT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def _event_id(event_id: str) -> str:
    if not isinstance(event_id, str) or not _EVENT_ID.fullmatch(event_id):
        raise ValidationFailed("event_id", "must be 1 to 128 of a-z, A-Z, 0-9, _ and - (it is part of what is signed)")
    return event_id


def _idempotency_key(key: str) -> str:
    if not (isinstance(key, str) and 1 <= len(key) <= 256):  # the message says it
        raise ValidationFailed("idempotency_key", "must be text of 1 to 256 characters")
    return check_text("idempotency_key", key)


_TRACE_CONTEXT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _trace_context(text: str) -> str:
    if not (isinstance(text, str) and _TRACE_CONTEXT.fullmatch(text)):
        raise ValidationFailed("trace_context", "must be a W3C traceparent, such as '00-<32 hex>-<16 hex>-01', or None")
    return text


def check_aware(field: str, moment: datetime) -> datetime:
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValidationFailed(field, "must be a datetime with a time zone, for example datetime.now(UTC)")
    return moment
