"""The queue: enqueue, claim, settle, release, sweep. Each is a function of a connection inside a transaction.

**A lane may be early, never late.** `due_at` of a lane is at most the least `available_at` of its pending rows, or a
*turn*: a number far below any time (the time in steps of 4 ms), which is due whatever a clock does. Lanes with rows
for now wait by their turns, so that one that was just served queues up behind those that waited; lanes with rows for
later wait by time. The claim reads the heads of both queues and serves them in the order of their turns.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from hookwright._clock import FOREVER
from hookwright._errors import Conflict, StaleEndpoints
from hookwright._ids import new_token
from hookwright._models import Claim, DeliveryState, EndpointHealth, Lease, Receipt, Settled
from hookwright.storage._base import FREE_INTERRUPTIONS, SWEEP_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import AttemptRecord, NewDelivery, NewEvent, Outcome
    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.sqlite._owner import Database

TURN_BITS = 12
"""A turn is a time divided by 2 ** 12: 4 ms."""

TURNS_END = 2**44
"""Below are turns, above are times: a time reaches it in half a year after 1970, a turn in the year 4200."""

MOST_EARNED = 1024
"""Where the doubling of earned room ends; the cap ends it earlier."""


def enqueue(
    database: Database, event: NewEvent, deliveries: Sequence[NewDelivery], *, endpoints_revision: int, now: int
) -> Receipt:
    """See `Storage.enqueue`."""
    if revision(database) != endpoints_revision:
        duplicate = _duplicate(database, event)
        if duplicate is not None:
            return duplicate
        raise StaleEndpoints("endpoints changed since they were matched: match again and repeat")
    count = sum(not delivery.skipped for delivery in deliveries)
    stored = database.execute(
        "INSERT INTO hookwright_event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            event.id,
            event.type,
            event.tenant,
            event.data,
            event.attributes,
            event.occurred_at,
            now,
            event.idempotency_key,
            event.digest,
            count,
        ),
    ).rowcount
    if not stored:  # the id or the key was there already: the unique indexes say so at no cost to the usual case
        duplicate = _duplicate(database, event)
        assert duplicate is not None
        return duplicate
    database.executemany(
        "INSERT INTO hookwright_delivery (id, event_id, endpoint_id, state, available_at, scheduled_at, created_at,"
        " finished_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (d.id, event.id, d.endpoint_id, "skipped", 0, None, now, now)
            if d.skipped
            else (d.id, event.id, d.endpoint_id, "pending", d.available_at, d.available_at, now, None)
            for d in deliveries
        ],
    )
    _make_due(database, [(d.endpoint_id, d.available_at) for d in deliveries if not d.skipped], now)
    return Receipt(event.id, count)


def _duplicate(database: Database, event: NewEvent) -> Receipt | None:
    # Two look-ups by unique index: an OR would scan.
    select = "SELECT id, digest, delivery_count FROM hookwright_event WHERE "
    found = database.execute(select + "id = ?", (event.id,)).fetchone()
    if found is None and event.idempotency_key is not None:
        found = database.execute(select + "idempotency_key = ?", (event.idempotency_key,)).fetchone()
    if found is None:
        return None
    if found[1] != event.digest:
        key = "event_id" if found[0] == event.id else "idempotency_key"
        raise Conflict(f"{key}: it was used before for another type, data or tenant (event {found[0]}); use a new one")
    return Receipt(found[0], found[2], duplicate=True)


def revision(database: Database) -> int:
    """Return the endpoint counter."""
    return int(database.execute("SELECT value FROM hookwright_meta WHERE key = 'endpoints_revision'").fetchone()[0])


def _make_due(database: Database, rows: Sequence[tuple[str, int]], now: int) -> None:
    turn = now >> TURN_BITS
    database.executemany(
        "UPDATE hookwright_lane SET due_at = ?1 WHERE endpoint_id = ?2 AND due_at > ?1",
        [(available_at if available_at > now else turn, endpoint_id) for endpoint_id, available_at in rows],
    )


# -- claim ------------------------------------------------------------------------------------------------------

_READY = "max(due_at, hold_until)"


def _heads(proven: int, limit: str) -> str:
    lane = f"SELECT endpoint_id, earned, cap, {_READY} AS ready FROM hookwright_lane WHERE (earned > 0) = {proven}"
    return (
        f"SELECT endpoint_id, earned, cap, ready AS turn FROM ({lane} AND {_READY} < {TURNS_END}"
        f" ORDER BY {_READY} LIMIT {limit})"
        f" UNION ALL SELECT endpoint_id, earned, cap, ready >> {TURN_BITS} FROM ({lane}"
        f" AND {_READY} >= {TURNS_END} AND {_READY} <= :now ORDER BY {_READY} LIMIT {limit})"
    )


_LANES = f"{_heads(1, ':limit')} UNION ALL {_heads(0, ':unproven')} ORDER BY turn, endpoint_id"

_ROWS = """
SELECT d.id, d.event_id, d.token, d.attempt_count, d.interruptions, d.budget_from, d.created_at, d.scheduled_at,
       e.type, e.data, e.tenant, e.occurred_at, l.revision
FROM (
    SELECT * FROM (
        SELECT id, created_at AS since FROM hookwright_delivery
        WHERE endpoint_id = :endpoint AND state = 'pending' AND available_at = 0 ORDER BY id LIMIT :limit
    )
    UNION ALL
    SELECT * FROM (
        SELECT id, available_at FROM hookwright_delivery
        WHERE endpoint_id = :endpoint AND state = 'pending' AND available_at > 0 AND available_at <= :now
        ORDER BY available_at, id LIMIT :limit
    )
    ORDER BY since, id LIMIT :limit
) AS due
JOIN hookwright_delivery AS d ON d.id = due.id
JOIN hookwright_event AS e ON e.id = d.event_id
JOIN hookwright_endpoint AS l ON l.id = d.endpoint_id
ORDER BY due.since, d.id
"""


def claim(database: Database, request: ClaimRequest, now: int) -> Claim:
    """See `Storage.claim`."""
    leases: list[Lease] = []
    taken: Counter[str] = Counter()
    unproven_left = request.unproven_limit
    # A lane that is early is moved on to its first row's time, and may have hidden one that is due: look again.
    # Each is early at most once for every result that was written, so that this costs what was delivered.
    early = True
    while early:
        early = False
        for endpoint_id, earned, cap in _ready_lanes(database, request, now):
            left = request.limit - len(leases)
            if left <= 0:
                break
            held = request.in_flight.get(endpoint_id, ())
            doubtful = earned == 0 or endpoint_id in request.slow
            room = min(max(1, earned), cap or request.endpoint_concurrency) - len(held)
            room -= taken[endpoint_id]
            room = min(room, left, unproven_left) if doubtful else min(room, left)
            if room > 0:
                found = _lease_rows(database, request, now, endpoint_id, proven=earned > 0, limit=room, held=held)
                leases.extend(found)
                taken[endpoint_id] += len(found)
                unproven_left -= len(found) * doubtful
                first = _move_on(database, endpoint_id, now)
                early = early or (not found and first > now)
    return Claim(leases, _next_due(database, now))


def _ready_lanes(database: Database, request: ClaimRequest, now: int) -> list[tuple[str, int, int | None]]:
    """Return (endpoint, earned, cap) of the lanes that are due and not held, as many as can matter, in turn."""
    if request.limit <= 0:
        return []
    busy = len(request.in_flight)
    limits = {"now": now, "limit": request.limit + busy, "unproven": min(request.limit, request.unproven_limit) + busy}
    return [row[:3] for row in database.execute(_LANES, limits).fetchall()]


def _lease_rows(
    database: Database,
    request: ClaimRequest,
    now: int,
    endpoint_id: str,
    *,
    proven: bool,
    limit: int,
    held: Any,
) -> list[Lease]:
    # A row of ours whose lease has ended may be due again while we still hold it: look past those.
    rows = database.execute(_ROWS, {"endpoint": endpoint_id, "now": now, "limit": limit + len(held)}).fetchall()
    leases: list[Lease] = []
    for row in [row for row in rows if row[0] not in held][:limit]:
        delivery_id, event_id, token, attempts, interruptions, budget_from, created_at, scheduled_at = row[:8]
        event_type, data, tenant, occurred_at, endpoint_revision = row[8:]
        if token is not None:
            attempts, interruptions = attempts + 1, interruptions + 1
            _record_interruption(database, delivery_id, attempts, now)
            database.execute(
                "UPDATE hookwright_delivery SET attempt_count = ?, interruptions = ?, last_error = 'interrupted',"
                " last_status = NULL WHERE id = ?",
                (attempts, interruptions, delivery_id),
            )
        leases.append(
            Lease(
                delivery_id=delivery_id,
                token=new_token(),
                until=now + request.lease,
                endpoint_id=endpoint_id,
                endpoint_revision=endpoint_revision,
                event_id=event_id,
                event_type=event_type,
                data=data,
                tenant=tenant,
                occurred_at=occurred_at,
                created_at=created_at,
                due_at=scheduled_at or created_at,
                number=attempts + 1,
                spent=attempts - budget_from - min(interruptions, FREE_INTERRUPTIONS),
                interruptions=interruptions,
                taken_over=token is not None,
                proven=proven,
            )
        )
    database.executemany(
        "UPDATE hookwright_delivery SET token = ?, available_at = ? WHERE id = ?",
        [(lease.token, lease.until, lease.delivery_id) for lease in leases],
    )
    return leases


def _move_on(database: Database, endpoint_id: str, now: int) -> int:
    """Give a lane the time of its first row, or a new turn when that is due already; return the time."""
    select_first = "SELECT min(available_at) FROM hookwright_delivery WHERE endpoint_id = ?1 AND state = 'pending'"
    available_at = database.execute(select_first, (endpoint_id,)).fetchone()[0]
    if available_at is None:
        available_at = FOREVER
    database.execute(
        "UPDATE hookwright_lane SET due_at = ? WHERE endpoint_id = ?",
        # The next turn: behind whoever became due within this one.
        (available_at if available_at > now else (now >> TURN_BITS) + 1, endpoint_id),
    )
    return int(available_at)


_NEXT_DUE = " UNION ALL ".join(
    f"SELECT * FROM (SELECT {_READY} FROM hookwright_lane WHERE (earned > 0) = {proven}"
    f" AND {_READY} > max(?1, {TURNS_END}) ORDER BY {_READY} LIMIT 1)"
    for proven in (0, 1)
)


def _next_due(database: Database, now: int) -> int | None:
    due = min((row[0] for row in database.execute(_NEXT_DUE, (now,))), default=FOREVER)
    return None if due >= FOREVER else int(due)


def _record_interruption(database: Database, delivery_id: str, number: int, now: int) -> None:
    database.execute(
        "INSERT INTO hookwright_attempt (delivery_id, number, started_at, duration, error) VALUES (?, ?, ?, 0,"
        " 'interrupted')",
        (delivery_id, number, now),
    )


# -- settle -----------------------------------------------------------------------------------------------------


def settle(database: Database, outcomes: Sequence[Outcome], now: int) -> list[Settled]:
    """See `Storage.settle`."""
    return [_settle_one(database, outcome, now) for outcome in outcomes]


def _settle_one(database: Database, outcome: Outcome, now: int) -> Settled:
    pending = outcome.state is DeliveryState.PENDING
    retry_at = now + outcome.retry_in if pending else None
    attempt = outcome.attempt
    # The fence: the token is compared, never the time.
    row = database.execute(
        "UPDATE hookwright_delivery SET state = ?1, available_at = coalesce(?2, 0), scheduled_at = ?2, token = NULL,"
        " finished_at = ?3, attempt_count = attempt_count + ?4,"
        " last_status = CASE ?4 WHEN 1 THEN ?5 ELSE last_status END,"
        " last_error = CASE ?4 WHEN 1 THEN ?6 ELSE last_error END"
        " WHERE id = ?7 AND token = ?8 RETURNING attempt_count",
        (
            outcome.state.value,
            retry_at,
            None if pending else now,
            int(attempt is not None),
            attempt and attempt.status,
            attempt and attempt.error,
            outcome.delivery_id,
            outcome.token,
        ),
    ).fetchall()
    if not row:
        return Settled(held=False)
    if attempt is not None:
        _record_attempt(database, outcome.delivery_id, row[0][0], attempt)
    if retry_at is not None:
        _make_due(database, [(outcome.endpoint_id, retry_at)], now)
    return Settled(held=True, health=_update_health(database, outcome, now), next_attempt_at=retry_at)


def _record_attempt(database: Database, delivery_id: str, number: int, attempt: AttemptRecord) -> None:
    database.execute(
        "INSERT INTO hookwright_attempt VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            delivery_id,
            number,
            attempt.started_at,
            attempt.duration,
            attempt.status,
            attempt.error,
            attempt.detail,
            json.dumps(attempt.response_headers) if attempt.response_headers else None,
            attempt.response_body or None,
            attempt.response_truncated,
            attempt.body_sha256,
        ),
    )


_ANSWERED = (
    "UPDATE hookwright_lane SET failures = 0, earned = min(:most, max(2, earned * 2)) WHERE endpoint_id = :endpoint"
    " RETURNING failures, earned, sweep"
)
_FAILED = (
    "UPDATE hookwright_lane SET failures = failures + 1, earned = 0 WHERE endpoint_id = :endpoint"
    " RETURNING failures, earned, sweep"
)
_UNCHANGED = "SELECT failures, earned, sweep FROM hookwright_lane WHERE endpoint_id = :endpoint"


def _update_health(database: Database, outcome: Outcome, now: int) -> EndpointHealth | None:
    statement = _UNCHANGED
    if outcome.counts:
        statement = _ANSWERED if outcome.state is DeliveryState.SUCCEEDED else _FAILED
    row = database.execute(statement, {"endpoint": outcome.endpoint_id, "most": MOST_EARNED}).fetchall()
    if not row:  # the endpoint is deleted and swept
        return None
    disabled = outcome.gone and _disable_gone(database, outcome.endpoint_id, now)
    failures, earned, sweep = row[0]
    return EndpointHealth(failures, earned > 0, disabled=disabled, stopped=disabled or sweep is not None)


def _disable_gone(database: Database, endpoint_id: str, now: int) -> bool:
    alive = "SELECT 1 FROM hookwright_endpoint WHERE id = ? AND deleted = 0"
    if database.execute(alive, (endpoint_id,)).fetchone() is None:
        return False
    return set_state(database, endpoint_id, "disabled", reason="gone", now=now)


def set_state(database: Database, endpoint_id: str, state: str, *, reason: str | None, now: int) -> bool:
    """Change endpoint and lane at once; a change takes the next revision. Say whether there was one."""
    database.execute(
        "UPDATE hookwright_lane SET hold_until = ?, sweep = ? WHERE endpoint_id = ?",
        (0 if state == "active" else FOREVER, "skipped" if state == "disabled" else None, endpoint_id),
    )
    changed = database.execute(
        "UPDATE hookwright_endpoint SET state = ?1, disabled_reason = ?2, updated_at = ?3, revision = ?4"
        " WHERE id = ?5 AND deleted = 0 AND (state <> ?1 OR disabled_reason IS NOT ?2) RETURNING 1",
        (state, reason, now, revision(database) + 1, endpoint_id),
    ).fetchall()
    if changed:
        bump_revision(database)
    return bool(changed)


def bump_revision(database: Database) -> int:
    """Count an endpoint change and return the new revision."""
    row = database.execute(
        "UPDATE hookwright_meta SET value = value + 1 WHERE key = 'endpoints_revision' RETURNING value"
    ).fetchall()
    return int(row[0][0])


# -- release, acquire, sweep ------------------------------------------------------------------------------------


def release(database: Database, leases: Sequence[Lease], *, sent: bool, hold: int, now: int) -> None:
    """See `Storage.release`."""
    for lease in leases:
        row = database.execute(
            "UPDATE hookwright_delivery SET available_at = scheduled_at, token = NULL,"
            " attempt_count = attempt_count + ?3, budget_from = budget_from + ?3,"
            " last_error = CASE ?3 WHEN 1 THEN 'interrupted' ELSE last_error END,"
            " last_status = CASE ?3 WHEN 1 THEN NULL ELSE last_status END WHERE id = ?1 AND token = ?2"
            " RETURNING attempt_count, available_at",
            (lease.delivery_id, lease.token, int(sent)),
        ).fetchall()
        if row and sent:
            _record_interruption(database, lease.delivery_id, row[0][0], now)
        if row:
            _make_due(database, [(lease.endpoint_id, row[0][1])], now)
        if row and hold:
            database.execute(
                "UPDATE hookwright_lane SET hold_until = max(hold_until, ?) WHERE endpoint_id = ?",
                (now + hold, lease.endpoint_id),
            )


def free_leases(database: Database, now: int) -> None:
    """What whoever becomes the deliverer does: the rows of the dead are due at once, and nobody is proven any more."""
    endpoints = database.execute(
        "SELECT DISTINCT endpoint_id FROM hookwright_delivery WHERE token IS NOT NULL"
    ).fetchall()
    database.execute("UPDATE hookwright_delivery SET available_at = 0 WHERE token IS NOT NULL")
    _make_due(database, [(row[0], 0) for row in endpoints], now)
    database.execute("UPDATE hookwright_lane SET earned = 0 WHERE (earned > 0) = 1")


def sweep(database: Database, now: int) -> bool:
    """See `Storage.sweep`."""
    left = SWEEP_ROWS
    for endpoint_id, state in database.execute(
        "SELECT endpoint_id, sweep FROM hookwright_lane WHERE sweep IS NOT NULL"
    ).fetchall():
        left -= database.execute(
            "UPDATE hookwright_delivery SET state = ?, token = NULL, available_at = 0, scheduled_at = NULL,"
            " finished_at = ? WHERE id IN (SELECT id FROM hookwright_delivery WHERE endpoint_id = ?"
            " AND state = 'pending' AND (token IS NULL OR available_at <= ?) LIMIT ?)",
            (state, now, endpoint_id, now, left),
        ).rowcount
        if left <= 0:
            return True
        _forget_swept(database, endpoint_id, state)
    return False


def _forget_swept(database: Database, endpoint_id: str, state: str) -> None:
    waiting = database.execute(
        "SELECT 1 FROM hookwright_delivery WHERE endpoint_id = ? AND state = 'pending' LIMIT 1", (endpoint_id,)
    ).fetchone()
    if waiting is None and state == "cancelled":
        database.execute("DELETE FROM hookwright_lane WHERE endpoint_id = ?", (endpoint_id,))
    elif waiting is None:
        database.execute("UPDATE hookwright_lane SET sweep = NULL WHERE endpoint_id = ?", (endpoint_id,))
