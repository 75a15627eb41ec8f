"""What people do to deliveries and events by hand: send again, cancel, try out, expunge."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hookwright._errors import ConflictError, NotFound
from hookwright._models import TEST_TYPE
from hookwright.storage._base import FREE_INTERRUPTIONS
from hookwright.storage._emitted import Emitted
from hookwright.storage._rows import attempt_row
from hookwright.storage.sqlite._bulk import insert_rows
from hookwright.storage.sqlite._claim import record_interruption
from hookwright.storage.sqlite._enqueue import enqueue
from hookwright.storage.sqlite._lanes import UNLEASED, end_leases, make_due, revision

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hookwright._models import AttemptRecord, DeliveryState, Emission
    from hookwright.storage.sqlite._owner import Database


def requeue(database: Database, delivery_ids: Sequence[str], states: Collection[DeliveryState], now: int) -> int:
    """See `Storage.requeue`."""
    rows = database.execute(
        "SELECT d.id, d.endpoint_id FROM hookwright_delivery AS d JOIN hookwright_event AS e ON e.id = d.event_id"
        " JOIN hookwright_endpoint AS p ON p.id = d.endpoint_id"
        " WHERE d.id IN (SELECT value FROM json_each(?)) AND d.state IN (SELECT value FROM json_each(?))"
        " AND p.deleted = 0 AND p.state <> 'disabled' AND e.expunged_at IS NULL"
        f" AND e.type <> '{TEST_TYPE}' AND {UNLEASED}",
        (json.dumps(list(delivery_ids)), json.dumps([state.value for state in states])),
    ).fetchall()
    database.executemany(
        # The budget starts anew; the free interruptions that were used stay used, and are not counted against it.
        "UPDATE hookwright_delivery SET state = 'pending', available_at = 0, finished_at = NULL,"
        f" renewed_at = ?, budget_from = attempt_count - min(interruptions, {FREE_INTERRUPTIONS}) WHERE id = ?",
        [(now, delivery_id) for delivery_id, _ in rows],
    )
    make_due(database, ((endpoint_id, 0) for _, endpoint_id in rows), now)
    return len(rows)


def cancel(database: Database, delivery_ids: Sequence[str], now: int) -> list[str]:
    """See `Storage.cancel`."""
    rows = database.execute(
        "SELECT d.id, d.endpoint_id, l.attempt_count FROM hookwright_delivery AS d LEFT JOIN hookwright_lease AS l"
        " ON l.endpoint_id = d.endpoint_id AND l.delivery_id = d.id"
        " WHERE d.state = 'pending' AND d.id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(delivery_ids)),),
    ).fetchall()
    leased = [row for row in rows if row[2] is not None]
    end_leases(database, {delivery_id: endpoint_id for delivery_id, endpoint_id, _ in leased})
    for delivery_id, _, attempt_count in leased:
        record_interruption(database, delivery_id, attempt_count + 1, now)
    database.executemany(
        "UPDATE hookwright_delivery SET state = 'cancelled', available_at = NULL, finished_at = ? WHERE id = ?",
        [(now, delivery_id) for delivery_id, _, _ in rows],
    )
    return [row[0] for row in rows]


def expunge(database: Database, event_id: str, now: int) -> list[str]:
    """See `Storage.expunge`. What is left in the WAL is the caller's to remove."""
    changed = database.execute(
        "UPDATE hookwright_event SET data = x'', attributes = '{}', expunged_at = coalesce(expunged_at, ?)"
        " WHERE id = ?",
        (now, event_id),
    ).rowcount
    if not changed:
        raise NotFound(f"there is no event {event_id!r}")
    ids = [row[0] for row in database.execute("SELECT id FROM hookwright_delivery WHERE event_id = ?", (event_id,))]
    cancelled = cancel(database, ids, now)
    database.executemany(
        "UPDATE hookwright_attempt SET response_headers = NULL, response_body = NULL, detail = NULL"
        " WHERE delivery_id = ?",
        [(delivery_id,) for delivery_id in ids],
    )
    return cancelled


def admit_test(database: Database, endpoint_id: str, interval: int, now: int) -> None:
    """See `Storage.admit_test`."""
    row = database.execute(
        "SELECT l.tested_at FROM hookwright_lane AS l JOIN hookwright_endpoint AS p ON p.id = l.endpoint_id"
        " WHERE p.id = ? AND p.deleted = 0",
        (endpoint_id,),
    ).fetchone()
    if row is None:
        raise NotFound(f"there is no endpoint {endpoint_id!r}")
    if row[0] is not None and 0 <= now - row[0] < interval:
        raise ConflictError(f"endpoint {endpoint_id} was tested just now: wait {interval // 1_000_000} s between tests")
    database.execute("UPDATE hookwright_lane SET tested_at = ? WHERE endpoint_id = ?", (now, endpoint_id))


def record_test(database: Database, emission: Emission, state: DeliveryState, attempt: AttemptRecord, now: int) -> None:
    """See `Storage.record_test`."""
    [delivery] = emission.deliveries
    skipped = emission._replace(deliveries=[delivery._replace(skipped=True)])
    enqueue(database, [Emitted(*skipped, revision(database))], now)
    database.execute(
        "UPDATE hookwright_delivery SET state = ?, attempt_count = 1, last_status = ?, last_error = ? WHERE id = ?",
        (state.value, attempt.status, attempt.error, delivery.id),
    )
    insert_rows(database, "hookwright_attempt", [attempt_row(delivery.id, 1, attempt)])
