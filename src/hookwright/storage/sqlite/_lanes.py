"""What every part of the queue needs to know about lanes, and the counter that tells when endpoints changed.

**A lane may be early, never late.** `due_at` of a lane is at most the least time at which a row of it can be claimed
(`available_at` of those that are pending and not leased, `until` of the leases), or a *turn*: a number far below any
time (the time in steps of 4 ms), which is due whatever a clock does. Lanes with rows for now wait by their turns, so
that one that was just served queues up behind those that waited; lanes with rows for later wait by time. The claim
reads the heads of both queues and serves them in the order of their turns.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hookwright.storage.sqlite._bulk import updates_alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hookwright.storage.sqlite._bulk import Statement
    from hookwright.storage.sqlite._owner import Database

TURN_BITS = 12
"""A turn is a time divided by 2 ** 12: 4 ms."""

TURNS_END = 2**44
"""Below are turns, above are times: a time reaches it in half a year after 1970, a turn in the year 4200."""

UNLEASED = """NOT EXISTS (
    SELECT 1 FROM hookwright_lease WHERE endpoint_id = d.endpoint_id AND delivery_id = d.id
)"""
"""What is true of a delivery `d` that is not leased."""


def make_due(database: Database, rows: Iterable[tuple[str, int]], now: int) -> None:
    """Make lanes due no later than these rows (endpoint, available_at), each lane in one step."""
    for statement in making_due(rows, now):
        database.execute(*statement)


def making_due(rows: Iterable[tuple[str, int]], now: int) -> Iterator[Statement]:
    """Return the statements of `make_due`."""
    earliest: dict[str, int] = {}
    for endpoint_id, available_at in rows:
        due_at = due(available_at, now)
        earliest[endpoint_id] = min(due_at, earliest.get(endpoint_id, due_at))
    return updates_alike(
        "UPDATE hookwright_lane SET due_at = ?1 WHERE endpoint_id IN (SELECT value FROM json_each(?2)) AND due_at > ?1",
        (((due_at,), endpoint_id) for endpoint_id, due_at in earliest.items()),
    )


def due(available_at: int, now: int) -> int:
    """Return what a lane's `due_at` is to be at most for a row that is new."""
    return available_at if available_at > now else now >> TURN_BITS


def end_leases(database: Database, leased: Mapping[str, str]) -> None:
    """Remove the leases of these deliveries; each is given with its endpoint."""
    if leased:
        database.execute(
            "DELETE FROM hookwright_lease WHERE (endpoint_id, delivery_id) IN (SELECT value, key FROM json_each(?))",
            (json.dumps(leased),),
        )


REVISION = "SELECT value FROM hookwright_meta WHERE key = 'endpoints_revision'"
"""The endpoint counter."""


def revision(database: Database) -> int:
    """Return the endpoint counter."""
    return int(database.execute(REVISION).fetchone()[0])


def bump_revision(database: Database) -> int:
    """Count an endpoint change and return the new revision."""
    row = database.execute(
        "UPDATE hookwright_meta SET value = value + 1 WHERE key = 'endpoints_revision' RETURNING value"
    ).fetchall()
    return int(row[0][0])
