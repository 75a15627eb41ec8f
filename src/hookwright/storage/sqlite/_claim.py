"""Claim: lease what is due, in turn, as far as there is room."""

from __future__ import annotations

import itertools
import json
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from hookwright._clock import FOREVER
from hookwright._ids import new_token
from hookwright._models import Claim
from hookwright.storage._base import opens_at
from hookwright.storage._rooms import Ready, Rooms
from hookwright.storage._rows import lease_of
from hookwright.storage.sqlite._bulk import at_once, rows_at_once
from hookwright.storage.sqlite._lanes import REVISION, TURN_BITS, TURNS_END, UNLEASED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import Lease
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


# Two walks along the queue's index, which no sorting interrupts, for all lanes with one statement: rows for now, and
# rows by time. They pass by what is leased; leases that have ended are a list of their own. What is asked for is only
# looked up when it is chosen. No id of ours has a comma.
def _ids(condition: str, order: str) -> str:
    return f"""(
    SELECT group_concat(id) FROM (
        SELECT d.id FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
        WHERE d.endpoint_id = lane.value AND {condition} AND {UNLEASED} ORDER BY {order} LIMIT :limit
    )
)"""


_DUE = f"""
SELECT json_group_array(json_array(lane.value, {_ids("d.available_at = 0", "d.id")},
    {_ids("d.available_at > 0 AND d.available_at <= :now", "d.available_at, d.id")}, (
    SELECT group_concat(delivery_id) FROM (
        SELECT delivery_id FROM hookwright_lease WHERE endpoint_id = lane.value AND until <= :now
        ORDER BY until, delivery_id LIMIT :limit
    )
)))
FROM json_each(:lanes) AS lane
"""

_BY_WAITING = """
SELECT d.id FROM json_each(?) AS due CROSS JOIN hookwright_delivery AS d ON d.id = due.value
LEFT JOIN hookwright_lease AS l ON l.endpoint_id = d.endpoint_id AND l.delivery_id = d.id
ORDER BY coalesce(nullif(coalesce(l.until, d.available_at), 0), d.created_at), d.id
"""

_ROWS = """
SELECT d.endpoint_id, d.id, d.event_id, d.attempt_count, d.interruptions, d.budget_from, d.created_at, d.available_at,
       d.renewed_at, e.type, e.data, e.tenant, e.occurred_at
FROM json_each(?) AS chosen
CROSS JOIN hookwright_delivery AS d ON d.id = chosen.value
CROSS JOIN hookwright_event AS e ON e.id = d.event_id
"""


_LOOKED_UP = 4
"""Ids that are read at most at first for each row that is wanted."""


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
        self._rooms = Rooms(request, now)
        self._ended: set[str] = set()
        self.leases: list[Lease] = []

    def serve(self, lanes: Sequence[Ready]) -> bool:
        """Serve these lanes in turn, as far as there is room; say whether one turned out to be early, or closed."""
        rooms, closed = self._rooms.of(lanes)
        for lane in closed:
            _wait_for_rate(self._database, lane, 0, self._now)
        early = bool(closed)
        waiting, most = deque(rooms.items()), _LOOKED_UP * self._request.limit
        while waiting and self._rooms.left > 0:
            some: dict[Ready, int] = {}
            asked = 0
            while waiting and asked < most:
                lane, room = waiting.popleft()
                some[lane], asked = room, asked + room
            early = self._serve(some) or early
            most *= 2  # lanes that have room for many, and few rows
        return early

    def _serve(self, rooms: dict[Ready, int]) -> bool:
        due = self._due(rooms)
        served: list[tuple[Ready, list[str]]] = []
        for lane, room in rooms.items():
            ids = due[lane.endpoint_id]
            found = ids[: self._rooms.give(lane, min(room, len(ids)))]
            if found:
                served.append((lane, found))
        self._lease(served)
        return _were_early(self._database, [id for id, found in due.items() if not found], self._now)

    def _due(self, rooms: dict[Ready, int]) -> dict[str, list[str]]:
        """Return the rows that are due, by endpoint: those that wait longest, as many as there is room for."""
        due = self._first_due([lane.endpoint_id for lane in rooms], max(rooms.values()))
        settling = self._request.settling
        for endpoint_id, ids in due.items():
            held = self._request.in_flight.get(endpoint_id, ())
            if any(id in held or id in settling for id in ids):  # a lease has ended, but not its attempt: look on
                further = self._first_due([endpoint_id], max(rooms.values()) + len(held) + len(settling))
                due[endpoint_id] = [id for id in further[endpoint_id] if id not in held and id not in settling]
        return due

    def _first_due(self, endpoints: list[str], limit: int) -> dict[str, list[str]]:
        wanted = {"lanes": json.dumps(endpoints), "now": self._now, "limit": limit}
        due: dict[str, list[str]] = {}
        for endpoint_id, for_now, by_time, ended in rows_at_once(self._database, _DUE, wanted):
            lists = [ids.split(",") for ids in (for_now, by_time, ended) if ids]
            if ended:
                self._ended.update(lists[-1])
            ids = list(itertools.chain(*lists))
            due[endpoint_id] = self._by_waiting(ids) if len(lists) > 1 else ids
        return due

    def _by_waiting(self, ids: list[str]) -> list[str]:
        """Return rows for now, rows by time and rows whose lease has ended in one line."""
        return [row[0] for row in self._database.execute(_BY_WAITING, (json.dumps(ids),)).fetchall()]

    def _lease(self, served: Sequence[tuple[Ready, list[str]]]) -> None:
        """Lease rows, each under a fresh token."""
        if not served:
            return
        places = {id: number for number, id in enumerate(id for _, ids in served for id in ids)}
        chosen = json.dumps(list(places))
        proven = {lane.endpoint_id: lane.earned > 0 for lane, _ in served}
        until, token = self._now + self._request.lease, new_token()
        self.leases.extend(
            self._lease_of(row, f"{token}{places[row[1]]}", until, proven=proven[row[0]])
            for row in map(_Row, self._database.execute(_ROWS, (chosen,)).fetchall())
        )
        self._database.execute(_LEASE, {"leased": chosen, "token": token, "until": until})
        for lane, ids in served:
            if lane.rate_interval is not None:
                _wait_for_rate(self._database, lane, len(ids), self._now)
        _move_on(self._database, list(proven), self._now)

    def _lease_of(self, row: _Row, token: str, until: int, *, proven: bool) -> Lease:
        taken_over = row[1] in self._ended
        if not taken_over:
            return lease_of(row, token, until, taken_over=False, proven=proven)
        delivery_id, attempts, interruptions = row[1], row[3] + 1, row[4] + 1
        record_interruption(self._database, delivery_id, attempts, self._now)
        self._database.execute(
            "UPDATE hookwright_delivery SET interruptions = ? WHERE id = ?", (interruptions, delivery_id)
        )
        row = _Row((*row[:3], attempts, interruptions, *row[5:]))
        return lease_of(row, token, until, taken_over=True, proven=proven)


def _ready_lanes(database: Database, request: ClaimRequest, now: int) -> list[Ready]:
    """Return the lanes that are due and not held, as many as can matter, in turn."""
    if request.limit <= 0:
        return []
    busy = len(request.in_flight)
    limits = {"now": now, "limit": request.limit + busy, "unproven": min(request.limit, request.unproven_limit) + busy}
    return [Ready(*row[1:]) for row in sorted(rows_at_once(database, _LANES, limits), key=itemgetter(0, 1))]


def _wait_for_rate(database: Database, lane: Ready, sent: int, now: int) -> None:
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


# A hold that is over goes: it would be the lane's place in the queue for ever, before all who take turns.
_MOVE_ON = f"""
UPDATE hookwright_lane SET hold_until = CASE WHEN hold_until > ?2 THEN hold_until ELSE 0 END, due_at = (
    SELECT CASE WHEN first > ?2 THEN first ELSE ?3 END FROM (
        SELECT min(coalesce((
            SELECT d.available_at FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
            WHERE d.endpoint_id = hookwright_lane.endpoint_id AND d.available_at IS NOT NULL AND {UNLEASED}
            ORDER BY d.available_at LIMIT 1
        ), {FOREVER}), coalesce((
            SELECT min(until) FROM hookwright_lease WHERE endpoint_id = hookwright_lane.endpoint_id
        ), {FOREVER})) AS first
    )
) WHERE endpoint_id IN (SELECT value FROM json_each(?1))
"""

# What is taken over has a row already.
_LEASE = """
INSERT OR REPLACE INTO hookwright_lease (endpoint_id, delivery_id, token, until, attempt_count)
SELECT d.endpoint_id, d.id, :token || leased.key, :until, d.attempt_count FROM json_each(:leased) AS leased
CROSS JOIN hookwright_delivery AS d ON d.id = leased.value
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
    """Write the attempt of which only its beginning is known, and that it was the delivery's last."""
    database.execute(
        "INSERT INTO hookwright_attempt (delivery_id, number, started_at, duration, error) VALUES (?, ?, ?, 0,"
        " 'interrupted')",
        (delivery_id, number, now),
    )
    database.execute(
        "UPDATE hookwright_delivery SET attempt_count = ?, last_error = 'interrupted', last_status = NULL WHERE id = ?",
        (number, delivery_id),
    )
