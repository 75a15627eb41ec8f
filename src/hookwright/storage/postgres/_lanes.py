"""What the queue needs to know about lanes. What a turn is, `hookwright.storage.sqlite._lanes` tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookwright.storage.postgres._database import Database

TURN_BITS = 12
"""A turn is a time divided by 2 ** 12: 4 ms."""

TURNS_END = 2**44
"""Below are turns, above are times: a time reaches it in half a year after 1970, a turn in the year 4200."""

UNLEASED = """NOT EXISTS (
    SELECT 1 FROM hookwright.lease AS held WHERE held.endpoint_id = d.endpoint_id AND held.delivery_id = d.id
)"""
"""What is true of a delivery `d` that is not leased."""


async def make_due(database: Database, rows: Iterable[tuple[str, int]], now: int) -> None:
    """Make lanes due no later than these rows (endpoint, available_at); the caller holds the lanes."""
    turn = now >> TURN_BITS
    earliest: dict[str, int] = {}
    for endpoint_id, available_at in rows:
        due_at = available_at if available_at > now else turn
        earliest[endpoint_id] = min(due_at, earliest.get(endpoint_id, due_at))
    if earliest:
        await database.run(
            "UPDATE hookwright.lane AS l SET due_at = new.due_at FROM unnest($1::text[], $2::bigint[])"
            " AS new (endpoint_id, due_at) WHERE l.endpoint_id = new.endpoint_id AND l.due_at > new.due_at",
            list(earliest),
            list(earliest.values()),
        )
