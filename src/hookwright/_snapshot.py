"""What `emit` was given, checked and made into bytes, once: an event that nothing can change any more."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic_core import PydanticSerializationError, to_json

from hookwright._catalogue import check_type
from hookwright._clock import from_datetime
from hookwright._errors import ValidationFailed
from hookwright._ids import new_id
from hookwright._models import NewEvent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookwright._clock import Clock
    from hookwright._models import AttributeValue

Scalar = str | int | bool
TypedValues = frozenset[tuple[type, Scalar]]

DATA_LIMIT = 256 * 1024
"""Bytes of an event's data as JSON at most."""


def typed(values: Sequence[Scalar]) -> TypedValues:
    """Return the values with their types: to Python True equals 1, to a filter it does not."""
    return frozenset((type(value), value) for value in values)


def snapshot(
    type: str,
    data: object,
    *,
    attributes: Mapping[str, AttributeValue] | None,
    tenant: str | None,
    idempotency_key: str | None,
    event_id: str | None,
    occurred_at: datetime | None,
    clock: Clock,
) -> tuple[NewEvent, dict[str, TypedValues]]:
    """Return the event to store, and its attributes as filters compare them. Raises ValidationFailed."""
    check_type(type)
    encoded = _encode(data)
    listed = _attributes(attributes)
    if tenant is not None and not (isinstance(tenant, str) and tenant):
        raise ValidationFailed("tenant", "must be text or None")
    digest = None
    if idempotency_key is not None or event_id is not None:
        # It tells a repeated emit from another one under the same key or id. The order of keys counts.
        digest = hashlib.sha256(b"\0".join([type.encode(), repr(tenant).encode(), encoded])).digest()
    event = NewEvent(
        id=new_id("evt", clock.now()) if event_id is None else _event_id(event_id),
        type=type,
        data=encoded,
        occurred_at=clock.wall() if occurred_at is None else from_datetime(check_aware("occurred_at", occurred_at)),
        tenant=tenant,
        attributes=json.dumps(listed) if listed else "{}",
        idempotency_key=_idempotency_key(idempotency_key),
        digest=digest,
    )
    return event, {key: typed(values) for key, values in listed.items()}


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
    for key, value in (attributes or {}).items():
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


def _idempotency_key(key: str | None) -> str | None:
    if key is not None and not (isinstance(key, str) and 1 <= len(key) <= 256):  # the message says it
        raise ValidationFailed("idempotency_key", "must be text of 1 to 256 characters")
    return key


def check_aware(field: str, moment: datetime) -> datetime:
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValidationFailed(field, "must be a datetime with a time zone, for example datetime.now(UTC)")
    return moment
