"""What people do to deliveries and events by hand: send again, cancel, try out, expunge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._errors import ConflictError, NotFound
from hookwright._models import TEST_TYPE
from hookwright.storage._base import FREE_INTERRUPTIONS, Expunged
from hookwright.storage._emitted import Emitted
from hookwright.storage._rows import attempt_row
from hookwright.storage.postgres._database import lock_lanes
from hookwright.storage.postgres._enqueue import enqueue_all
from hookwright.storage.postgres._lanes import UNLEASED, make_due
from hookwright.storage.postgres._release import record_interruptions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hookwright._models import AttemptRecord, DeliveryState, Emission
    from hookwright.storage.postgres._database import Database

EXPUNGE_ROWS = 1000
"""Deliveries that one transaction expunges at most: others wait for it, and it must end in time."""


async def _hold_lanes_of(database: Database, delivery_ids: Sequence[str]) -> int:
    # A delivery keeps its endpoint, so that it need not be looked up again.
    rows = await database.fetch(
        "SELECT DISTINCT endpoint_id FROM hookwright.delivery WHERE id = ANY($1::text[])", list(delivery_ids)
    )
    return await lock_lanes(database, [row[0] for row in rows])


async def requeue(database: Database, delivery_ids: Sequence[str], states: Collection[DeliveryState]) -> int:
    """See `Storage.requeue`."""
    ids = list(delivery_ids)
    now = await _hold_lanes_of(database, ids)
    # Against `prune`, which holds no lane and deletes events of which nothing is pending.
    await database.fetch(
        "SELECT 1 FROM hookwright.event WHERE id IN"
        " (SELECT event_id FROM hookwright.delivery WHERE id = ANY($1::text[])) ORDER BY id FOR SHARE",
        ids,
    )
    rows = await database.fetch(
        # The budget starts anew; the free interruptions that were used stay used, and are not counted against it.
        "UPDATE hookwright.delivery AS d SET state = 'pending', available_at = 0, finished_at = NULL, renewed_at = $3,"
        f" budget_from = d.attempt_count - least(d.interruptions, {FREE_INTERRUPTIONS})"
        " FROM hookwright.event AS e, hookwright.endpoint AS p WHERE d.id = ANY($1::text[])"
        " AND d.state = ANY($2::text[]) AND e.id = d.event_id AND p.id = d.endpoint_id AND NOT p.deleted"
        f" AND p.state <> 'disabled' AND e.expunged_at IS NULL AND e.type <> $4 AND {UNLEASED}"
        " RETURNING d.endpoint_id",
        ids,
        [state.value for state in states],
        now,
        TEST_TYPE,  # a parameter, since it begins like the names of our tables
    )
    await make_due(database, [(row[0], 0) for row in rows], now)
    return len(rows)


async def cancel(database: Database, delivery_ids: Sequence[str]) -> list[str]:
    """See `Storage.cancel`."""
    now = await _hold_lanes_of(database, delivery_ids)
    return await _cancel(database, delivery_ids, now)


async def _cancel(database: Database, delivery_ids: Sequence[str], now: int) -> list[str]:
    # Locked as well, in order: a row that was committed late may have no lane any more.
    rows = await database.fetch(
        "SELECT id FROM hookwright.delivery WHERE id = ANY($1::text[]) AND state = 'pending' ORDER BY id"
        " FOR NO KEY UPDATE",
        list(delivery_ids),
    )
    ids: list[str] = [row[0] for row in rows]
    if not ids:
        return []
    leased = await database.fetch(
        "DELETE FROM hookwright.lease AS l USING hookwright.delivery AS d WHERE d.id = ANY($1::text[])"
        " AND l.endpoint_id = d.endpoint_id AND l.delivery_id = d.id RETURNING l.delivery_id, l.attempt_count + 1",
        ids,
    )
    await record_interruptions(database, [(row[0], row[1]) for row in leased], now)
    await database.run(
        "UPDATE hookwright.delivery SET state = 'cancelled', available_at = NULL, finished_at = $1"
        " WHERE id = ANY($2::text[])",
        now,
        ids,
    )
    return ids


async def expunge(database: Database, event_id: str, after: str) -> Expunged:
    """See `Storage.expunge`. Each part hides the event, so that nothing of it can be sent again, and holds its row.

    The data itself goes with the last part, when nothing is pending any more: a claim, which does not look whether an
    event is hidden, never finds a delivery without it. What was removed stays in the table's file until others land on
    it, and in WAL, replicas and backups: the server's matter.
    """
    # The event first: whoever sees it sees its deliveries, which were committed with it, and none is added later.
    if await database.value("SELECT 1 FROM hookwright.event WHERE id = $1", event_id) is None:
        raise NotFound(f"there is no event {event_id!r}")
    rows = await database.fetch(
        "SELECT id, endpoint_id FROM hookwright.delivery WHERE event_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        event_id,
        after,
        EXPUNGE_ROWS,
    )
    now = await lock_lanes(database, list({row[1] for row in rows}))
    is_last = len(rows) < EXPUNGE_ROWS
    hidden = await database.run(
        "UPDATE hookwright.event SET attributes = '{}', data = CASE WHEN $3 THEN '' ELSE data END,"
        " expunged_at = coalesce(expunged_at, $2) WHERE id = $1",
        event_id,
        now,
        is_last,
    )
    if not hidden:  # pruned meanwhile
        raise NotFound(f"there is no event {event_id!r}")
    ids = [row[0] for row in rows]
    cancelled = await _cancel(database, ids, now)
    await database.run(
        "UPDATE hookwright.attempt SET response_headers = NULL, response_body = NULL, detail = NULL"
        " WHERE delivery_id = ANY($1::text[])"
        " AND (response_headers IS NOT NULL OR response_body IS NOT NULL OR detail IS NOT NULL)",
        ids,
    )
    return Expunged(cancelled, None if is_last else ids[-1])


async def admit_test(database: Database, endpoint_id: str, interval: int) -> None:
    """See `Storage.admit_test`."""
    now = await lock_lanes(database, [endpoint_id])
    row = await database.first(
        "SELECT l.tested_at FROM hookwright.lane AS l JOIN hookwright.endpoint AS p ON p.id = l.endpoint_id"
        " WHERE p.id = $1 AND NOT p.deleted",
        endpoint_id,
    )
    if row is None:
        raise NotFound(f"there is no endpoint {endpoint_id!r}")
    if row[0] is not None and 0 <= now - row[0] < interval:
        raise ConflictError(f"endpoint {endpoint_id} was tested just now: wait {interval // 1_000_000} s between tests")
    await database.run("UPDATE hookwright.lane SET tested_at = $1 WHERE endpoint_id = $2", now, endpoint_id)


async def record_test(database: Database, emission: Emission, state: DeliveryState, attempt: AttemptRecord) -> None:
    """See `Storage.record_test`."""
    event, [delivery] = emission
    await enqueue_all(database, [Emitted(event, [delivery._replace(skipped=True)], None)], None)
    await database.run(
        "UPDATE hookwright.delivery SET state = $1, attempt_count = 1, last_status = $2, last_error = $3 WHERE id = $4",
        state.value,
        attempt.status,
        attempt.error,
        delivery.id,
    )
    await database.run(
        "INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, status, error, detail,"
        " response_headers, response_body, response_truncated, body_sha256)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        *attempt_row(delivery.id, 1, attempt),
    )
