"""What happened: events, deliveries, attempts. Reads run on the read-only connection; `prune` on the writing one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hookwright._clock import SECOND
from hookwright._errors import NotFound
from hookwright._models import Attempt, Delivery, DeliveryState, Event, Page, to_attempt
from hookwright.storage._base import BACKLOG_COUNTED, STATS_ROWS, SWEEP_ROWS, Backlog
from hookwright.storage._cursor import decode_cursor, encode_cursor
from hookwright.storage._rows import attempt_record, delivery_of, event_of
from hookwright.storage.sqlite._lanes import UNLEASED

if TYPE_CHECKING:
    from hookwright.storage._base import DeliveryFilter
    from hookwright.storage.sqlite._owner import Database

_DELIVERY = (
    "SELECT d.id, d.event_id, e.type, d.endpoint_id, d.state, d.attempt_count, d.created_at, d.available_at,"
    " d.finished_at, d.last_status, d.last_error, coalesce(d.renewed_at, d.created_at)"
    " FROM hookwright_delivery AS d JOIN hookwright_event AS e ON e.id = d.event_id"
)


def get_event(database: Database, event_id: str) -> Event:
    """See `Storage.get_event`."""
    row = database.execute(
        "SELECT id, type, data, tenant, attributes, occurred_at, created_at, idempotency_key, trace_context,"
        " expunged_at FROM hookwright_event WHERE id = ?",
        (event_id,),
    ).fetchone()
    if row is None:
        raise NotFound(f"there is no event {event_id!r}")
    return event_of(row)


def get_delivery(database: Database, delivery_id: str) -> Delivery:
    """See `Storage.get_delivery`."""
    row = database.execute(_DELIVERY + " WHERE d.id = ?", (delivery_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no delivery {delivery_id!r}")
    return delivery_of(row)


def list_deliveries(database: Database, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
    """See `Storage.list_deliveries`."""
    condition, values = _condition(where)
    if cursor is not None:
        condition += " AND d.id < ?"
        values.append(decode_cursor(cursor, "deliveries", tuple(where)))
    rows = database.execute(
        f"{_DELIVERY} WHERE {condition} ORDER BY d.id DESC LIMIT ?", [*values, limit + 1]
    ).fetchall()
    items = tuple(delivery_of(row) for row in rows[:limit])
    more = len(rows) > limit
    return Page(items=items, next_cursor=encode_cursor("deliveries", tuple(where), items[-1].id) if more else None)


def count_deliveries(database: Database, where: DeliveryFilter) -> int:
    """See `Storage.count_deliveries`."""
    condition, values = _condition(where)
    select = "SELECT count(*) FROM hookwright_delivery AS d JOIN hookwright_event AS e ON e.id = d.event_id WHERE "
    return int(database.execute(select + condition, values).fetchone()[0])


def attempts(database: Database, delivery_id: str) -> list[Attempt]:
    """See `Storage.attempts`."""
    get_delivery(database, delivery_id)
    rows = database.execute(
        "SELECT number, started_at, duration, status, error, detail, response_headers, response_body,"
        " response_truncated, body_sha256 FROM hookwright_attempt WHERE delivery_id = ? ORDER BY number",
        (delivery_id,),
    ).fetchall()
    return [to_attempt(delivery_id, row[0], attempt_record(row)) for row in rows]


def prunable(database: Database, before: int, after: tuple[int, str]) -> list[tuple[int, str]]:
    """Return (created_at, id) of the next events that are old enough, in that order.

    Whether deliveries of them are pending is not asked here: while a million are, one read would last seconds.
    """
    found: list[tuple[int, str]] = database.execute(
        "SELECT created_at, id FROM hookwright_event WHERE created_at < ?1 AND (created_at, id) > (?2, ?3)"
        " ORDER BY created_at, id LIMIT ?4",
        (before, *after, SWEEP_ROWS),
    ).fetchall()
    return found


def prune(database: Database, _now: int, *, event_ids: list[str]) -> int:
    """Delete these events, but for those that have a pending delivery by now; say how many."""
    ids = json.dumps(
        [
            row[0]
            for row in database.execute(
                "SELECT id FROM hookwright_event AS e WHERE id IN (SELECT value FROM json_each(?)) AND NOT EXISTS"
                " (SELECT 1 FROM hookwright_delivery WHERE event_id = e.id AND state = 'pending')",
                (json.dumps(event_ids),),
            )
        ]
    )
    events = "(SELECT value FROM json_each(?))"
    database.execute(
        "DELETE FROM hookwright_attempt WHERE delivery_id IN (SELECT id FROM hookwright_delivery WHERE event_id IN"
        f" {events})",
        (ids,),
    )
    database.execute(f"DELETE FROM hookwright_delivery WHERE event_id IN {events}", (ids,))
    return int(database.execute(f"DELETE FROM hookwright_event WHERE id IN {events}", (ids,)).rowcount)


# Ids sort by the time of the emit, a little before the row's own: so `since` bounds a walk along the ids as well, and a
# page of the last hour does not read a history of years.
_AFTER_ID = """d.id > coalesce((
    SELECT max(x.id) FROM hookwright_delivery AS x WHERE x.event_id = (
        SELECT id FROM hookwright_event WHERE created_at < ? AND delivery_count > 0 ORDER BY created_at DESC LIMIT 1
    )
), '')"""
_ID_LAG = 60 * SECOND

_UNSUCCESSFUL = {DeliveryState.FAILED, DeliveryState.CANCELLED, DeliveryState.SKIPPED}
UNSUCCESSFUL = "d.state <> 'pending' AND d.state <> 'succeeded'"


def _condition(where: DeliveryFilter) -> tuple[str, list[Any]]:
    parts = {
        "d.endpoint_id = ?": where.endpoint_id,
        "d.event_id = ?": where.event_id,
        "e.type = ?": where.event_type,
        "d.created_at >= ?": where.since,
        _AFTER_ID: None if where.since is None else where.since - _ID_LAG,
        "d.created_at < ?": where.until,
        "e.tenant = ?": where.tenant,
    }
    if where.states:
        # Written out, and the index's own condition with it: the planner proves nothing, it compares texts.
        wanted = ", ".join(f"'{state.value}'" for state in where.states)
        indexed = f" AND {UNSUCCESSFUL}" if set(where.states) <= _UNSUCCESSFUL else ""
        indexed = " AND d.available_at IS NOT NULL" if where.states == (DeliveryState.PENDING,) else indexed
        one = f"= {wanted}" if len(where.states) == 1 else f"IN ({wanted})"
        parts[f"d.state {one}{indexed} AND 1 = ?"] = 1
    used = {part: value for part, value in parts.items() if value is not None}
    return " AND ".join(["1", *used]), list(used.values())


def stats(database: Database, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
    """See `Storage.stats`."""
    rows = database.execute(
        "SELECT a.duration, a.status BETWEEN 200 AND 299 FROM (SELECT id FROM hookwright_delivery"
        " WHERE endpoint_id = ?1 ORDER BY id DESC LIMIT ?3) AS d JOIN hookwright_attempt AS a ON a.delivery_id = d.id"
        " WHERE a.started_at >= ?2 ORDER BY d.id DESC LIMIT ?3",
        (endpoint_id, since, STATS_ROWS),
    ).fetchall()
    return [(duration, bool(succeeded)) for duration, succeeded in rows]


# Of each lane that is open now, the first row for now and the first by time: two steps in the queue's index.
_OLDEST = f"""
SELECT min((
    SELECT coalesce(d.renewed_at, d.created_at) FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
    WHERE d.endpoint_id = l.endpoint_id AND d.available_at = 0 AND {UNLEASED}
    ORDER BY d.id LIMIT 1
)), min((
    SELECT d.available_at FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
    WHERE d.endpoint_id = l.endpoint_id AND d.available_at > 0 AND d.available_at <= ?1 AND {UNLEASED}
    ORDER BY d.available_at LIMIT 1
)) FROM hookwright_lane AS l WHERE max(l.due_at, l.hold_until, l.rate_until) <= ?1
"""


def backlog(database: Database, now: int) -> Backlog:
    """See `Storage.backlog`."""
    counted = f"SELECT count(*) FROM (SELECT 1 FROM {{}} LIMIT {BACKLOG_COUNTED})"
    waiting = "hookwright_delivery INDEXED BY hookwright_delivery_queue WHERE available_at IS NOT NULL"
    pending = database.execute(counted.format(waiting)).fetchone()[0]
    leased = database.execute(counted.format("hookwright_lease")).fetchone()[0]
    oldest = database.execute(_OLDEST, (now,)).fetchone()
    return Backlog(pending, leased, min((time for time in oldest if time is not None), default=None))
