"""What happened: events, deliveries, attempts, and how the old ones go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import SECOND
from hookwright._errors import NotFound
from hookwright._models import Attempt, Delivery, DeliveryState, Event, Page, to_attempt
from hookwright.storage._base import BACKLOG_COUNTED, STATS_ROWS, SWEEP_ROWS, Backlog
from hookwright.storage._cursor import decode_cursor, encode_cursor
from hookwright.storage._rows import attempt_record, delivery_of, event_of
from hookwright.storage.postgres._lanes import UNLEASED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from hookwright.storage._base import DeliveryFilter
    from hookwright.storage.postgres._database import Database

_JOINED = "hookwright.delivery AS d JOIN hookwright.event AS e ON e.id = d.event_id"
_DELIVERY = (
    "SELECT d.id, d.event_id, e.type, d.endpoint_id, d.state, d.attempt_count, d.created_at, d.available_at,"
    f" d.finished_at, d.last_status, d.last_error, coalesce(d.renewed_at, d.created_at) FROM {_JOINED}"
)


async def get_event(database: Database, event_id: str) -> Event:
    """See `Storage.get_event`."""
    row = await database.first(
        # What is being expunged still has its data, for those that are under way (see `_requeue`).
        "SELECT id, type, CASE WHEN expunged_at IS NULL THEN data ELSE '' END, tenant, attributes, occurred_at,"
        " created_at, idempotency_key, trace_context, expunged_at FROM hookwright.event WHERE id = $1",
        event_id,
    )
    if row is None:
        raise NotFound(f"there is no event {event_id!r}")
    return event_of(row)


async def get_delivery(database: Database, delivery_id: str) -> Delivery:
    """See `Storage.get_delivery`."""
    row = await database.first(_DELIVERY + " WHERE d.id = $1", delivery_id)
    if row is None:
        raise NotFound(f"there is no delivery {delivery_id!r}")
    return delivery_of(row)


async def list_deliveries(
    database: Database, where: DeliveryFilter, *, limit: int, cursor: str | None
) -> Page[Delivery]:
    """See `Storage.list_deliveries`."""
    condition, values = _condition(where)
    if cursor is not None:
        values.append(decode_cursor(cursor, "deliveries", tuple(where)))
        condition += f" AND d.id < ${len(values)}"
    rows = await database.fetch(
        f"{_DELIVERY} WHERE {condition} ORDER BY d.id DESC LIMIT ${len(values) + 1}", *values, limit + 1
    )
    items = tuple(delivery_of(row) for row in rows[:limit])
    more = len(rows) > limit
    return Page(items=items, next_cursor=encode_cursor("deliveries", tuple(where), items[-1].id) if more else None)


async def count_deliveries(database: Database, where: DeliveryFilter) -> int:
    """See `Storage.count_deliveries`."""
    condition, values = _condition(where)
    tables = "hookwright.delivery AS d" if where.event_type is None and where.tenant is None else _JOINED
    return int(await database.value(f"SELECT count(*) FROM {tables} WHERE {condition}", *values))


# While a large event is expunged, part by part, all of it is hidden.
_SHOWN = ", ".join(
    f"CASE WHEN e.expunged_at IS NULL THEN a.{column} END AS {column}"
    for column in ("detail", "response_headers", "response_body")
)


async def attempts(database: Database, delivery_id: str) -> list[Attempt]:
    """See `Storage.attempts`."""
    await get_delivery(database, delivery_id)
    rows = await database.fetch(
        f"SELECT a.number, a.started_at, a.duration, a.status, a.error, {_SHOWN}, a.response_truncated, a.body_sha256"
        " FROM hookwright.delivery AS d JOIN hookwright.event AS e ON e.id = d.event_id"
        " JOIN hookwright.attempt AS a ON a.delivery_id = d.id WHERE d.id = $1 ORDER BY a.number",
        delivery_id,
    )
    return [to_attempt(delivery_id, row[0], attempt_record(row)) for row in rows]


async def prunable(database: Database, before: int, after: tuple[int, str]) -> list[tuple[int, str]]:
    """Return (created_at, id) of the next events that are old enough, in that order.

    Whether deliveries of them are pending is not asked here: while a million are, one read would last seconds.
    """
    rows = await database.fetch(
        "SELECT created_at, id FROM hookwright.event WHERE created_at < $1 AND (created_at, id) > ($2, $3)"
        " ORDER BY created_at, id LIMIT $4",
        before,
        *after,
        SWEEP_ROWS,
    )
    return [(row[0], row[1]) for row in rows]


async def prune(database: Database, event_ids: Sequence[str]) -> int:
    """Delete these events, but for those that have a pending delivery by now or are in use; say how many.

    The event's row is the lock: what has ended is made pending again by `requeue` only, and changed by `expunge` only,
    which hold it too. No lane is locked, and nothing is waited for.
    """
    held = await database.fetch(
        "SELECT id FROM hookwright.event WHERE id = ANY($1::text[]) ORDER BY id FOR UPDATE SKIP LOCKED", list(event_ids)
    )
    # Another statement: it sees what was committed before the locks were held.
    ended = await database.fetch(
        "SELECT e.id FROM unnest($1::text[]) AS e (id) WHERE (SELECT d.id FROM hookwright.delivery AS d"
        " WHERE d.event_id = e.id AND d.available_at IS NOT NULL LIMIT 1) IS NULL",
        [row[0] for row in held],
    )
    ids = [row[0] for row in ended]
    if not ids:
        return 0
    deliveries = await database.fetch(
        "DELETE FROM hookwright.delivery WHERE event_id = ANY($1::text[]) RETURNING id", ids
    )
    await database.run(
        "DELETE FROM hookwright.attempt WHERE delivery_id = ANY($1::text[])", [row[0] for row in deliveries]
    )
    return await database.run("DELETE FROM hookwright.event WHERE id = ANY($1::text[])", ids)


# Ids sort by the time of the emit, near the row's own: so `since` and `until` bound a walk along the ids as well, and a
# page of an hour does not read a history of years. No id is greater than "~".
_AFTER_ID = """d.id > coalesce((
    SELECT max(x.id) FROM hookwright.delivery AS x WHERE x.event_id = (
        SELECT id FROM hookwright.event WHERE created_at < {} AND delivery_count > 0 ORDER BY created_at DESC LIMIT 1
    )
), '')"""
_BEFORE_ID = """d.id < coalesce((
    SELECT min(x.id) FROM hookwright.delivery AS x WHERE x.event_id = (
        SELECT id FROM hookwright.event WHERE created_at >= {} AND delivery_count > 0 ORDER BY created_at LIMIT 1
    )
), '~')"""
_ID_LAG = 600 * SECOND
"""The id has the time of a process, the row has the server's: so far their clocks may be apart."""


def _condition(where: DeliveryFilter) -> tuple[str, list[Any]]:
    parts = {
        "d.endpoint_id = {}": where.endpoint_id,
        "d.event_id = {}": where.event_id,
        "e.type = {}": where.event_type,
        "d.created_at >= {}": where.since,
        _AFTER_ID: None if where.since is None else where.since - _ID_LAG,
        "d.created_at < {}": where.until,
        _BEFORE_ID: None if where.until is None else where.until + _ID_LAG,
        "e.tenant = {}": where.tenant,
    }
    used = {part: value for part, value in parts.items() if value is not None}
    conditions = [part.format(f"${number}") for number, part in enumerate(used, 1)]
    # Written out, so that the planner sees which index applies: what is pending, and nothing else, has a time.
    wanted = ", ".join(f"'{state.value}'" for state in where.states)
    if where.states == (DeliveryState.PENDING,):
        conditions.append("d.available_at IS NOT NULL")
    elif where.states:
        conditions.append(f"d.state IN ({wanted})")
    return " AND ".join(["true", *conditions]), list(used.values())


async def stats(database: Database, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
    """See `Storage.stats`."""
    rows = await database.fetch(
        "SELECT a.duration, a.status BETWEEN 200 AND 299 FROM (SELECT id FROM hookwright.delivery"
        " WHERE endpoint_id = $1 ORDER BY id DESC LIMIT $3) AS d JOIN hookwright.attempt AS a ON a.delivery_id = d.id"
        " WHERE a.started_at >= $2 ORDER BY d.id DESC LIMIT $3",
        endpoint_id,
        since,
        STATS_ROWS,
    )
    return [(row[0], bool(row[1])) for row in rows]


# Of each lane that is open now, the first row for now and the first by time: two steps in the queue's index, which
# alone gives them in this order. What no claim has looked at yet is named in `wake`.
_OLDEST = f"""
SELECT min((
    SELECT coalesce(d.renewed_at, d.created_at) FROM hookwright.delivery AS d
    WHERE d.endpoint_id = l.endpoint_id AND d.available_at <= 0 AND {UNLEASED}
    ORDER BY d.available_at, d.id LIMIT 1
)), min((
    SELECT d.available_at FROM hookwright.delivery AS d
    WHERE d.endpoint_id = l.endpoint_id AND d.available_at > 0 AND d.available_at <= $1 AND {UNLEASED}
    ORDER BY d.available_at, d.id LIMIT 1
)) FROM hookwright.lane AS l WHERE greatest(l.hold_until, l.rate_until) <= $1 AND (l.due_at <= $1 OR l.endpoint_id IN (
    SELECT endpoint_id FROM (SELECT endpoint_id FROM hookwright.wake ORDER BY id LIMIT {BACKLOG_COUNTED}) AS w
))
"""


async def backlog(database: Database, now: int) -> Backlog:
    """See `Storage.backlog`."""
    # The order is that of the index which holds what waits, and nothing else: the planner takes no other.
    pending = await database.value(
        "SELECT count(*) FROM (SELECT 1 FROM hookwright.delivery WHERE available_at IS NOT NULL"
        f" ORDER BY endpoint_id, available_at, id LIMIT {BACKLOG_COUNTED}) AS waiting"
    )
    leased = await database.value(
        f"SELECT count(*) FROM (SELECT 1 FROM hookwright.lease LIMIT {BACKLOG_COUNTED}) AS held"
    )
    oldest = await database.first(_OLDEST, now)
    return Backlog(pending, leased, min((time for time in oldest if time is not None), default=None))
