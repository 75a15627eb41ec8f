"""How rows of either storage become what the application reads, and back. Booleans may be 0 and 1."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from hookwright._clock import to_datetime
from hookwright._health import EndpointHealth
from hookwright._models import (
    ALL_TENANTS,
    AttemptRecord,
    Delivery,
    DeliveryState,
    EndpointRow,
    EndpointState,
    Event,
    Key,
    Lease,
)
from hookwright.storage._base import FREE_INTERRUPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

ENDPOINT_COLUMNS = (
    "id",
    "revision",
    "deleted",
    "state",
    "disabled_reason",
    "tenant",
    "all_tenants",
    "url",
    "events",
    "filters",
    "name",
    "description",
    "metadata",
    "headers",
    "keys",
    "profile",
    "concurrency",
    "timeout",
    "rate_limit",
    "created_at",
    "updated_at",
)
"""As `endpoint_row` reads them."""

SET_BY_APPLICATION = (
    "revision",
    "tenant",
    "all_tenants",
    "url",
    "events",
    "filters",
    "name",
    "description",
    "metadata",
    "headers",
    "keys",
    "profile",
    "concurrency",
    "timeout",
    "rate_limit",
    "updated_at",
)
"""The columns that an update of an endpoint replaces."""


def endpoint_columns(endpoint: EndpointRow) -> dict[str, Any]:
    """Return the columns of an endpoint, but for its revision."""
    everyone = endpoint.tenant is ALL_TENANTS
    return {
        "id": endpoint.id,
        "deleted": False,
        "state": endpoint.state.value,
        "disabled_reason": endpoint.disabled_reason,
        "tenant": None if everyone else endpoint.tenant,
        "all_tenants": everyone,
        "url": endpoint.url,
        "events": json.dumps(endpoint.events),
        "filters": json.dumps(dict(endpoint.filters)),
        "name": endpoint.name,
        "description": endpoint.description,
        "metadata": json.dumps(dict(endpoint.metadata)),
        "headers": json.dumps(endpoint.headers),
        "keys": json.dumps(endpoint.keys),
        "profile": endpoint.profile,
        "concurrency": endpoint.concurrency,
        "timeout": endpoint.timeout,
        "rate_limit": endpoint.rate_limit,
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
    }


def endpoint_row(row: Sequence[Any]) -> EndpointRow:
    """Return an endpoint from ENDPOINT_COLUMNS and failures, failing_since, last_success and last_at of its lane."""
    values = dict(zip(ENDPOINT_COLUMNS, row, strict=False))
    everyone = values.pop("all_tenants")
    values["deleted"] = bool(values["deleted"])
    values["state"] = EndpointState(values["state"])
    values["tenant"] = ALL_TENANTS if everyone else values["tenant"]
    values["events"] = tuple(from_json(values["events"]))
    values["filters"] = {key: tuple(allowed) for key, allowed in json.loads(values["filters"]).items()}
    values["metadata"] = json.loads(values["metadata"])
    values["headers"] = tuple((name, value) for name, value in from_json(values["headers"]))
    values["keys"] = tuple(Key(*key) for key in from_json(values["keys"]))
    health = EndpointHealth(row[-4], row[-3], None if row[-2] is None else bool(row[-2]), row[-1])
    return EndpointRow(**values, health=health)


def event_of(row: Sequence[Any]) -> Event:
    """Return an event from its columns but digest and delivery_count, idempotency_key after the times."""
    return Event(
        id=row[0],
        type=row[1],
        data=row[2],
        tenant=row[3],
        attributes=json.loads(row[4]),
        occurred_at=to_datetime(row[5]),
        created_at=to_datetime(row[6]),
        idempotency_key=row[7],
        trace_context=row[8],
        expunged_at=None if row[9] is None else to_datetime(row[9]),
    )


def attempt_record(row: Sequence[Any]) -> AttemptRecord:
    """Return an attempt from its columns but delivery_id, its number first."""
    return AttemptRecord(
        started_at=row[1],
        duration=row[2],
        status=row[3],
        error=row[4],
        detail=row[5],
        response_headers=tuple((name, value) for name, value in json.loads(row[6] or "[]")),
        response_body=row[7] or b"",
        response_truncated=bool(row[8]),
        body_sha256=row[9],
    )


def delivery_of(row: Sequence[Any]) -> Delivery:
    """Return a delivery; its last column is since when it waits, which is the time of those that are due at once."""
    return Delivery(
        id=row[0],
        event_id=row[1],
        event_type=row[2],
        endpoint_id=row[3],
        state=DeliveryState(row[4]),
        attempt_count=row[5],
        created_at=to_datetime(row[6]),
        next_attempt_at=None if row[7] is None else to_datetime(row[7] or row[11]),
        finished_at=None if row[8] is None else to_datetime(row[8]),
        last_status=row[9],
        last_error=row[10],
    )


def attempt_row(delivery_id: str, number: int, attempt: AttemptRecord) -> tuple[Any, ...]:
    """Return the columns of an attempt. PostgreSQL takes no U+0000 in a text."""
    return (
        delivery_id,
        number,
        attempt.started_at,
        attempt.duration,
        attempt.status,
        attempt.error,
        None if attempt.detail is None else attempt.detail.replace("\0", "\ufffd"),
        json.dumps(attempt.response_headers) if attempt.response_headers else None,
        attempt.response_body or None,
        attempt.response_truncated,
        attempt.body_sha256,
    )


def lease_of(row: Sequence[Any], token: str, until: int, *, taken_over: bool, proven: bool) -> Lease:
    """Return the lease of a row: endpoint, delivery, event, attempt_count, interruptions, budget_from, created_at,
    available_at, renewed_at, and the event's type, data, tenant and occurred_at.
    """
    endpoint_id, delivery_id, event_id, attempts, interruptions, budget_from, created_at = row[:7]
    available_at, renewed_at, event_type, data, tenant, occurred_at = row[7:13]
    return Lease(
        delivery_id,
        token,
        until,
        endpoint_id,
        event_id,
        event_type,
        data,
        tenant,
        occurred_at,
        created_at,
        renewed_at or created_at,
        due_at=available_at or renewed_at or created_at,
        number=attempts + 1,
        spent=attempts - budget_from - min(interruptions, FREE_INTERRUPTIONS),
        interruptions=interruptions,
        taken_over=taken_over,
        proven=proven,
    )
