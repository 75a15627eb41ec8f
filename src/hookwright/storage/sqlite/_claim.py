"""Claim: lease what is due, in turn, as far as there is room."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from hookwright._clock import FOREVER
from hookwright._ids import new_token
from hookwright._models import Claim, Lease
from hookwright.storage._base import FREE_INTERRUPTIONS, allowed, opens_at
from hookwright.storage.sqlite._bulk import at_once, rows_at_once
from hookwright.storage.sqlite._lanes import REVISION, TURN_BITS, TURNS_END

if TYPE_CHECKING:
    from collections.abc import Sequence

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


_LANES = at_once(
    "turn, endpoint_id, earned, cap, rate_interval, rate_at",
    f"{_heads(1, ':limit')} UNION ALL {_heads(0, ':unproven')}",
)


# For several lanes at once, as many rows of each: a statement costs as much as three rows. Two walks along the queue's
# index, which no sorting interrupts: rows for now, and rows by time.
def _rows(condition: str, order: str) -> str:
    return f"""
SELECT d.endpoint_id, d.id, d.event_id, d.token, d.attempt_count, d.interruptions, d.budget_from, d.created_at,
       d.scheduled_at, e.type, e.data, e.tenant, e.occurred_at, d.renewed_at, d.available_at
FROM json_each(:lanes) AS lane
CROSS JOIN hookwright_delivery AS d ON d.id IN (
    SELECT id FROM hookwright_delivery INDEXED BY hookwright_delivery_queue
    WHERE endpoint_id = lane.value AND state = 'pending' AND {condition} ORDER BY {order} LIMIT :limit
)
CROSS JOIN hookwright_event AS e ON e.id = d.event_id
"""


_ROWS = (
    _rows("available_at = 0", "id")
    + " UNION ALL "
    + _rows("available_at > 0 AND available_at <= :now", "available_at, id")
)


class _Ready(NamedTuple):
    """A lane that is due and not held."""

    endpoint_id: str
    earned: int
    cap: int | None
    rate_interval: int | None
    rate_at: int


def claim(database: Database, request: ClaimRequest, now: int) -> Claim:
    """See `Storage.claim`."""
    claiming = _Claiming(database, request, now)
    # A lane that is early is moved on to its first row's time, and may have hidden one that is due: look again.
    # Each is early at most once for every result that was written, so that this costs what was delivered.
    while claiming.serve(_ready_lanes(database, request, now)):
        pass
    next_due, current = database.execute(_NEXT_DUE_AND_REVISION, (now,)).fetchone()
    return Claim(claiming.leases, None if next_due is None or next_due >= FOREVER else next_due, current)


class _Claiming:
    """One claim: what is left to give, and what was given so far."""

    def __init__(self, database: Database, request: ClaimRequest, now: int) -> None:
        self._database = database
        self._request = request
        self._now = now
        self._left = request.limit
        self._unproven_left = request.unproven_limit
        self._further_left = request.further_limit
        self._taken: Counter[str] = Counter()
        self.leases: list[Lease] = []

    def serve(self, lanes: Sequence[_Ready]) -> bool:
        """Serve these lanes in turn, as far as there is room; say whether one turned out to be early, or closed."""
        early = False
        while True:
            rooms, closed = self._share_out(lanes)
            found = self._due_rows(rooms)
            self._lease([(lane, found[lane.endpoint_id]) for lane in rooms if lane.endpoint_id in found])
            empty = [lane.endpoint_id for lane in rooms if lane.endpoint_id not in found]
            early = _were_early(self._database, empty, self._now) or bool(closed) or early
            # What some did not need is shared out again, among those that were not reached, or might have more.
            lanes = [lane for lane in lanes if lane not in closed and _may_have_more(lane, rooms, found)]
            if not rooms:
                return early

    def _share_out(self, lanes: Sequence[_Ready]) -> tuple[dict[_Ready, int], list[_Ready]]:
        """Return how many rows each may give, in turn, and which lanes are closed for their rate."""
        rooms: dict[_Ready, int] = {}
        closed: list[_Ready] = []
        left, unproven_left, further_left = self._left, self._unproven_left, self._further_left
        for lane in lanes:
            if left <= 0:
                break
            doubtful, first = self._is_doubtful(lane), self._first(lane)
            room = min(_room(lane, self._request) - self._taken[lane.endpoint_id], left, first + further_left)
            room = min(room, unproven_left) if doubtful else room
            if room > 0 and lane.rate_interval is not None:
                room = min(room, allowed(lane.rate_interval, lane.rate_at, self._now))
                if room <= 0:
                    _wait_for_rate(self._database, lane, 0, self._now)
                    closed.append(lane)
            if room > 0:
                rooms[lane] = room
                left, unproven_left = left - room, unproven_left - room * doubtful
                further_left -= room - first
        return rooms, closed

    def _is_doubtful(self, lane: _Ready) -> bool:
        return lane.earned == 0 or lane.endpoint_id in self._request.slow

    def _first(self, lane: _Ready) -> int:
        """Return how many of a lane's rows are not counted as further ones: the first, unless it has one already."""
        return 0 if self._taken[lane.endpoint_id] or lane.endpoint_id in self._request.in_flight else 1

    def _due_rows(self, rooms: dict[_Ready, int]) -> dict[str, list[_Row]]:
        """Return rows that are due, by endpoint: those that wait longest, no more than there is room for."""
        alike: defaultdict[int, list[str]] = defaultdict(list)
        for lane, room in rooms.items():
            alike[room].append(lane.endpoint_id)
        found: dict[str, list[_Row]] = {}
        for room, endpoints in alike.items():
            for endpoint_id, rows in self._longest_waiting(endpoints, room).items():
                held = {*self._request.in_flight.get(endpoint_id, ()), *self._request.settling}
                if any(row[1] in held for row in rows):  # its lease has ended, but not the attempt: look past those
                    rows = self._longest_waiting([endpoint_id], room + len(held))[endpoint_id]
                    rows = [row for row in rows if row[1] not in held]
                if rows:
                    found[endpoint_id] = rows[:room]
        return found

    def _longest_waiting(self, endpoints: Sequence[str], limit: int) -> dict[str, list[_Row]]:
        found: defaultdict[str, list[_Row]] = defaultdict(list)
        wanted = {"lanes": json.dumps(endpoints), "now": self._now, "limit": limit}
        for row in self._database.execute(_ROWS, wanted).fetchall():
            found[row[0]].append(_Row(row))
        for rows in found.values():
            if rows[-1][14]:  # some are due by time: they wait in line with those for now
                rows.sort(key=_due_since)
        return found

    def _lease(self, served: Sequence[tuple[_Ready, list[_Row]]]) -> None:
        """Lease rows, each under a fresh token, and count them."""
        for lane, rows in served:
            if lane.rate_interval is not None:
                _wait_for_rate(self._database, lane, len(rows), self._now)
            self._left -= len(rows)
            self._unproven_left -= len(rows) * self._is_doubtful(lane)
            self._further_left -= len(rows) - self._first(lane)
            self._taken[lane.endpoint_id] += len(rows)
        chosen = [(row, lane.earned > 0) for lane, rows in served for row in rows]
        if chosen:
            until, token = self._now + self._request.lease, new_token()
            self.leases.extend(
                _lease_of(self._database, row, f"{token}{number}", until, proven=proven, now=self._now)
                for number, (row, proven) in enumerate(chosen)
            )
            leased = json.dumps([row[1] for row, _ in chosen])
            self._database.execute(_LEASE, {"leased": leased, "token": token, "until": until})
            _move_on(self._database, [lane.endpoint_id for lane, _ in served], self._now)


def _may_have_more(lane: _Ready, rooms: dict[_Ready, int], found: dict[str, list[_Row]]) -> bool:
    if lane not in rooms:
        return True
    return len(found.get(lane.endpoint_id, ())) == rooms[lane] and lane.rate_interval is None


def _room(lane: _Ready, request: ClaimRequest) -> int:
    held = request.in_flight.get(lane.endpoint_id, ())
    return min(max(1, lane.earned), lane.cap or request.endpoint_concurrency) - len(held)


def _ready_lanes(database: Database, request: ClaimRequest, now: int) -> list[_Ready]:
    """Return the lanes that are due and not held, as many as can matter, in turn."""
    if request.limit <= 0:
        return []
    busy = len(request.in_flight)
    limits = {"now": now, "limit": request.limit + busy, "unproven": min(request.limit, request.unproven_limit) + busy}
    return [_Ready(*row[1:]) for row in sorted(rows_at_once(database, _LANES, limits), key=itemgetter(0, 1))]


def _wait_for_rate(database: Database, lane: _Ready, sent: int, now: int) -> None:
    """Count what was sent, and close a lane until its rate limit allows the next attempt."""
    assert lane.rate_interval is not None
    rate_at = max(lane.rate_at, now) + lane.rate_interval * sent if sent else lane.rate_at
    database.execute(
        "UPDATE hookwright_lane SET rate_at = ?, rate_until = ? WHERE endpoint_id = ?",
        (rate_at, opens_at(lane.rate_interval, rate_at), lane.endpoint_id),
    )


class _Row(tuple[Any, ...]):
    """A row with an event's data, which no traceback shows."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"_Row({self[0]!r})"


def _due_since(row: tuple[Any, ...]) -> tuple[int, str]:
    return (row[14] or row[7], row[1])  # available_at, or created_at when it was due from the beginning


def _lease_of(database: Database, row: _Row, token: str, until: int, *, proven: bool, now: int) -> Lease:
    endpoint_id, delivery_id, event_id, old_token, attempts, interruptions, budget_from = row[:7]
    if old_token is not None:
        attempts, interruptions = attempts + 1, interruptions + 1
        record_interruption(database, delivery_id, attempts, now)
        database.execute(
            "UPDATE hookwright_delivery SET attempt_count = ?, interruptions = ?, last_error = 'interrupted',"
            " last_status = NULL WHERE id = ?",
            (attempts, interruptions, delivery_id),
        )
    created_at, scheduled_at, event_type, data, tenant, occurred_at, renewed_at = row[7:14]
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
        due_at=scheduled_at or renewed_at or created_at,
        number=attempts + 1,
        spent=attempts - budget_from - min(interruptions, FREE_INTERRUPTIONS),
        interruptions=interruptions,
        taken_over=old_token is not None,
        proven=proven,
    )


# A hold that is over goes: it would be the lane's place in the queue for ever, before all who take turns.
_MOVE_ON = f"""
UPDATE hookwright_lane SET hold_until = CASE WHEN hold_until > ?2 THEN hold_until ELSE 0 END, due_at = (
    SELECT CASE WHEN first IS NULL THEN {FOREVER} WHEN first > ?2 THEN first ELSE ?3 END FROM (
        SELECT min(available_at) AS first FROM hookwright_delivery INDEXED BY hookwright_delivery_queue
        WHERE endpoint_id = hookwright_lane.endpoint_id AND state = 'pending'
    )
) WHERE endpoint_id IN (SELECT value FROM json_each(?1))
"""

_LEASE = """
UPDATE hookwright_delivery SET token = :token || leased.key, available_at = :until FROM json_each(:leased) AS leased
WHERE hookwright_delivery.id = leased.value
"""


def _move_on(database: Database, endpoints: list[str], now: int) -> None:
    """Give lanes the time of their first row, or their next turn, behind whoever became due within this one."""
    database.execute(_MOVE_ON, (json.dumps(endpoints), now, (now >> TURN_BITS) + 1))


def _were_early(database: Database, endpoints: list[str], now: int) -> bool:
    """Move lanes on in which nothing was found; say whether one is due later than now."""
    if not endpoints:
        return False
    _move_on(database, endpoints, now)
    later = "SELECT 1 FROM hookwright_lane WHERE due_at > ? AND endpoint_id IN (SELECT value FROM json_each(?)) LIMIT 1"
    return database.execute(later, (now, json.dumps(endpoints))).fetchone() is not None


def _first_later(proven: int) -> str:
    return (
        f"SELECT * FROM (SELECT {_READY} AS ready FROM hookwright_lane WHERE (earned > 0) = {proven}"
        f" AND {_READY} > max(?1, {TURNS_END}) ORDER BY {_READY} LIMIT 1)"
    )


_NEXT_DUE_AND_REVISION = (
    f"SELECT (SELECT min(ready) FROM ({_first_later(0)} UNION ALL {_first_later(1)})), ({REVISION})"
)


def record_interruption(database: Database, delivery_id: str, number: int, now: int) -> None:
    """Write the attempt of which only its beginning is known."""
    database.execute(
        "INSERT INTO hookwright_attempt (delivery_id, number, started_at, duration, error) VALUES (?, ?, ?, 0,"
        " 'interrupted')",
        (delivery_id, number, now),
    )
