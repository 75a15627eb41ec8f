"""Claim: lease what is due, in turn, as far as there is room."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from hookwright._clock import FOREVER
from hookwright._ids import new_token
from hookwright._models import Claim, Lease
from hookwright.storage._base import FREE_INTERRUPTIONS, allowed, opens_at
from hookwright.storage.sqlite._lanes import TURN_BITS, TURNS_END, revision

if TYPE_CHECKING:
    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.sqlite._owner import Database

_READY = "max(due_at, hold_until, rate_until)"


def _heads(proven: int, limit: str) -> str:
    columns = "endpoint_id, earned, cap, rate_interval, rate_at"
    lane = f"SELECT {columns}, {_READY} AS ready FROM hookwright_lane WHERE (earned > 0) = {proven}"
    return (
        f"SELECT {columns}, ready AS turn FROM ({lane} AND {_READY} < {TURNS_END}"
        f" ORDER BY {_READY} LIMIT {limit})"
        f" UNION ALL SELECT {columns}, ready >> {TURN_BITS} FROM ({lane}"
        f" AND {_READY} >= {TURNS_END} AND {_READY} <= :now ORDER BY {_READY} LIMIT {limit})"
    )


_LANES = f"{_heads(1, ':limit')} UNION ALL {_heads(0, ':unproven')} ORDER BY turn, endpoint_id"

_ROWS = """
SELECT d.id, d.event_id, d.token, d.attempt_count, d.interruptions, d.budget_from, d.created_at, d.scheduled_at,
       e.type, e.data, e.tenant, e.occurred_at, d.renewed_at, d.available_at
FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
JOIN hookwright_event AS e ON e.id = d.event_id
WHERE d.endpoint_id = :endpoint AND d.state = 'pending'
"""
# Two walks along the queue's index, which no sorting interrupts.
_ROWS_FOR_NOW = f"{_ROWS} AND d.available_at = 0 ORDER BY d.id LIMIT :limit"
_ROWS_BY_TIME = f"{_ROWS} AND d.available_at > 0 AND d.available_at <= :now ORDER BY d.available_at, d.id LIMIT :limit"


class _Ready(NamedTuple):
    """A lane that is due and not held."""

    endpoint_id: str
    earned: int
    cap: int | None
    rate_interval: int | None
    rate_at: int


def claim(database: Database, request: ClaimRequest, now: int) -> Claim:
    """See `Storage.claim`."""
    leases: list[Lease] = []
    taken: Counter[str] = Counter()
    unproven_left, further_left = request.unproven_limit, request.further_limit
    # A lane that is early is moved on to its first row's time, and may have hidden one that is due: look again.
    # Each is early at most once for every result that was written, so that this costs what was delivered.
    early = True
    while early:
        early = False
        before = len(leases)
        for lane in _ready_lanes(database, request, now):
            left = request.limit - len(leases)
            if left <= 0:
                break
            doubtful = lane.earned == 0 or lane.endpoint_id in request.slow
            first = 0 if lane.endpoint_id in request.in_flight or taken[lane.endpoint_id] else 1
            room = min(_room(lane, request) - taken[lane.endpoint_id], left, unproven_left if doubtful else left)
            room = min(room, first + further_left)
            if room <= 0:
                continue
            if lane.rate_interval is not None and not allowed(lane.rate_interval, lane.rate_at, now):
                early = _wait_for_rate(database, lane, 0, now) or early
                continue
            found = _due_rows(database, request, now, lane, limit=room)
            leases.extend(found)
            taken[lane.endpoint_id] += len(found)
            unproven_left -= len(found) * doubtful
            further_left -= max(0, len(found) - first)
            if not found:
                early = _was_early(database, lane.endpoint_id, now) or early
        _lease(database, leases[before:], now)
    return Claim(leases, _next_due(database, now), revision(database))


def _ready_lanes(database: Database, request: ClaimRequest, now: int) -> list[_Ready]:
    """Return the lanes that are due and not held, as many as can matter, in turn."""
    if request.limit <= 0:
        return []
    busy = len(request.in_flight)
    limits = {"now": now, "limit": request.limit + busy, "unproven": min(request.limit, request.unproven_limit) + busy}
    return [_Ready(*row[:5]) for row in database.execute(_LANES, limits).fetchall()]


def _room(lane: _Ready, request: ClaimRequest) -> int:
    held = request.in_flight.get(lane.endpoint_id, ())
    return min(max(1, lane.earned), lane.cap or request.endpoint_concurrency) - len(held)


def _wait_for_rate(database: Database, lane: _Ready, sent: int, now: int) -> bool:
    """Count what was sent, and close a lane until its rate limit allows the next attempt; say whether it is closed."""
    assert lane.rate_interval is not None
    rate_at = max(lane.rate_at, now) + lane.rate_interval * sent if sent else lane.rate_at
    opens = opens_at(lane.rate_interval, rate_at)
    database.execute(
        "UPDATE hookwright_lane SET rate_at = ?, rate_until = ? WHERE endpoint_id = ?",
        (rate_at, opens, lane.endpoint_id),
    )
    return opens > now


class _Row(tuple[Any, ...]):
    """A row with an event's data, which no traceback shows."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"_Row({self[0]!r})"


def _due_rows(database: Database, request: ClaimRequest, now: int, lane: _Ready, *, limit: int) -> list[Lease]:
    if lane.rate_interval is not None:
        limit = min(limit, allowed(lane.rate_interval, lane.rate_at, now))
    # A row of ours whose lease has ended may be due again while we still hold it: look past those.
    held = request.in_flight.get(lane.endpoint_id, ())
    wanted = {"endpoint": lane.endpoint_id, "now": now, "limit": limit + len(held)}
    rows = [*map(_Row, database.execute(_ROWS_FOR_NOW, wanted).fetchall())]
    by_time = [*map(_Row, database.execute(_ROWS_BY_TIME, wanted).fetchall())]
    if by_time:
        rows = sorted(rows + by_time, key=_due_since)
    rows = [row for row in rows if row[0] not in held][:limit]
    if lane.rate_interval is not None and rows:
        _wait_for_rate(database, lane, len(rows), now)
    until, proven = now + request.lease, lane.earned > 0
    return [_lease_of(database, row, lane.endpoint_id, until, proven=proven, now=now) for row in rows]


def _due_since(row: tuple[Any, ...]) -> tuple[int, str]:
    return (row[13] or row[6], row[0])  # available_at, or created_at when it was due from the beginning


def _lease_of(
    database: Database, row: tuple[Any, ...], endpoint_id: str, until: int, *, proven: bool, now: int
) -> Lease:
    delivery_id, event_id, token, attempts, interruptions, budget_from, created_at, scheduled_at = row[:8]
    if token is not None:
        attempts, interruptions = attempts + 1, interruptions + 1
        record_interruption(database, delivery_id, attempts, now)
        database.execute(
            "UPDATE hookwright_delivery SET attempt_count = ?, interruptions = ?, last_error = 'interrupted',"
            " last_status = NULL WHERE id = ?",
            (attempts, interruptions, delivery_id),
        )
    event_type, data, tenant, occurred_at, renewed_at = row[8:13]
    return Lease(
        delivery_id,
        new_token(),
        until,
        endpoint_id,
        event_id,
        event_type,
        data,
        tenant,
        occurred_at,
        created_at,
        renewed_at or created_at,
        due_at=scheduled_at or renewed_at or created_at,
        number=attempts + 1,
        spent=attempts - budget_from - min(interruptions, FREE_INTERRUPTIONS),
        interruptions=interruptions,
        taken_over=token is not None,
        proven=proven,
    )


# A hold that is over goes: it would be the lane's place in the queue for ever, before all who take turns.
_MOVE_ON = f"""
UPDATE hookwright_lane SET hold_until = CASE WHEN hold_until > ?2 THEN hold_until ELSE 0 END, due_at = (
    SELECT CASE WHEN first IS NULL THEN {FOREVER} WHEN first > ?2 THEN first ELSE ?3 END FROM (
        SELECT min(available_at) AS first FROM hookwright_delivery INDEXED BY hookwright_delivery_queue
        WHERE endpoint_id = ?1 AND state = 'pending'
    )
) WHERE endpoint_id = ?1
"""


def _lease(database: Database, leases: list[Lease], now: int) -> None:
    """Write the leases, and give the lanes that were served their next times."""
    database.executemany(
        "UPDATE hookwright_delivery SET token = ?, available_at = ? WHERE id = ?",
        [(lease.token, lease.until, lease.delivery_id) for lease in leases],
    )
    # The next turn: behind whoever became due within this one.
    turn = (now >> TURN_BITS) + 1
    served = dict.fromkeys(lease.endpoint_id for lease in leases)
    database.executemany(_MOVE_ON, [(endpoint_id, now, turn) for endpoint_id in served])


def _was_early(database: Database, endpoint_id: str, now: int) -> bool:
    """Give a lane in which nothing was found its next time; say whether that is later than now."""
    moved = database.execute(_MOVE_ON + " RETURNING due_at", (endpoint_id, now, (now >> TURN_BITS) + 1)).fetchall()
    return bool(moved[0][0] > now)


_NEXT_DUE = " UNION ALL ".join(
    f"SELECT * FROM (SELECT {_READY} FROM hookwright_lane WHERE (earned > 0) = {proven}"
    f" AND {_READY} > max(?1, {TURNS_END}) ORDER BY {_READY} LIMIT 1)"
    for proven in (0, 1)
)


def _next_due(database: Database, now: int) -> int | None:
    due = min((row[0] for row in database.execute(_NEXT_DUE, (now,))), default=FOREVER)
    return None if due >= FOREVER else int(due)


def record_interruption(database: Database, delivery_id: str, number: int, now: int) -> None:
    """Write the attempt of which only its beginning is known."""
    database.execute(
        "INSERT INTO hookwright_attempt (delivery_id, number, started_at, duration, error) VALUES (?, ?, ?, 0,"
        " 'interrupted')",
        (delivery_id, number, now),
    )
