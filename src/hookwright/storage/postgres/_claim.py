"""Claim: lease what is due, in turn, as far as there is room, and wait for nobody.

What another transaction has locked is passed by; it is looked at again in a moment. Step by step: make lanes due that
were woken; lock those that are due; find their rows; lease them; move the lanes on; say when to come again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

from hookwright._clock import FOREVER
from hookwright._ids import new_token
from hookwright._models import Claim, Lease
from hookwright.storage._base import FREE_INTERRUPTIONS, opens_at
from hookwright.storage._rooms import Ready, Rooms
from hookwright.storage.postgres._database import lock_lanes
from hookwright.storage.postgres._lanes import TURN_BITS, TURNS_END, UNLEASED, make_due
from hookwright.storage.postgres._release import adopt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.postgres._database import Database

LOOK_AGAIN = 5_000
"""Microseconds after which a claim comes again that passed by what somebody else had locked."""

_WOKEN = 1_000
"""Rows of `wake` that one claim looks at most at."""

_FOLD = f"""
WITH current AS MATERIALIZED (SELECT hookwright.clock() AS now), waking AS MATERIALIZED (
    SELECT endpoint_id, array_agg(id) AS ids, min(available_at) AS first FROM (
        SELECT id, endpoint_id, available_at FROM hookwright.wake ORDER BY id LIMIT {_WOKEN}
    ) AS next GROUP BY endpoint_id
), locked AS MATERIALIZED (
    SELECT waking.endpoint_id, waking.ids, waking.first FROM waking CROSS JOIN LATERAL (
        SELECT 1 FROM hookwright.lane WHERE endpoint_id = waking.endpoint_id FOR UPDATE SKIP LOCKED
    ) AS held
), folded AS (
    DELETE FROM hookwright.wake AS w USING (SELECT unnest(ids) AS id FROM locked) AS gone WHERE w.id = gone.id
), moved AS (
    UPDATE hookwright.lane AS l SET due_at = due.due_at FROM (
        SELECT endpoint_id, CASE WHEN first > now THEN first ELSE now >> {TURN_BITS} END AS due_at FROM locked, current
    ) AS due WHERE l.endpoint_id = due.endpoint_id AND l.due_at > due.due_at
)
SELECT now, (
    SELECT array_agg(waking.endpoint_id) FROM waking JOIN hookwright.endpoint AS p ON p.id = waking.endpoint_id
    WHERE (p.deleted OR p.state = 'disabled') AND (
        waking.endpoint_id IN (SELECT endpoint_id FROM locked)
        OR NOT EXISTS (SELECT 1 FROM hookwright.lane WHERE endpoint_id = waking.endpoint_id)
    )
) FROM current
"""

_READY = "greatest(due_at, hold_until, rate_until)"
_PROVEN, _UNPROVEN = "earned > 0", "earned = 0"


def _head(proven: str, condition: str, turn: str, limit: str) -> str:
    return (
        f"MATERIALIZED (SELECT {turn} AS turn, endpoint_id, earned, cap, rate_interval, rate_at FROM hookwright.lane"
        f" WHERE {proven} AND {condition} ORDER BY {_READY} LIMIT {limit} FOR UPDATE SKIP LOCKED)"
    )


_BY_TURN = (f"{_READY} < {TURNS_END}", _READY)
_BY_TIME = (f"{_READY} >= {TURNS_END} AND {_READY} <= $1::bigint", f"{_READY} >> {TURN_BITS}")
_LANES = f"""
WITH a AS {_head(_PROVEN, *_BY_TURN, "$2::int")}, b AS {_head(_PROVEN, *_BY_TIME, "$2::int")},
c AS {_head(_UNPROVEN, *_BY_TURN, "$3::int")}, d AS {_head(_UNPROVEN, *_BY_TIME, "$3::int")}
SELECT l.endpoint_id, l.earned, l.cap, l.rate_interval, l.rate_at, CASE WHEN $4::bigint IS NOT NULL THEN (
    SELECT count(*) FROM hookwright.lease WHERE endpoint_id = l.endpoint_id AND until > $1 AND owner <> $4
) END FROM (
    SELECT * FROM a UNION ALL SELECT * FROM b UNION ALL SELECT * FROM c UNION ALL SELECT * FROM d
) AS l ORDER BY l.turn, l.endpoint_id
"""

# Three walks along an index for each lane: rows for now, rows by time, and leases that have ended.
_DUE = f"""
SELECT lane.endpoint_id, due.id, due.ended
FROM unnest($1::text[], $2::int[]) WITH ORDINALITY AS lane (endpoint_id, room, place)
CROSS JOIN LATERAL (
    (SELECT d.id, d.created_at AS since, false AS ended FROM hookwright.delivery AS d
     WHERE d.endpoint_id = lane.endpoint_id AND d.available_at <= 0 AND {UNLEASED} AND d.id <> ALL($4::text[])
     ORDER BY d.available_at, d.id LIMIT lane.room)
    UNION ALL
    (SELECT d.id, d.available_at, false FROM hookwright.delivery AS d
     WHERE d.endpoint_id = lane.endpoint_id AND d.available_at > 0 AND d.available_at <= $3::bigint AND {UNLEASED}
     AND d.id <> ALL($4) ORDER BY d.available_at, d.id LIMIT lane.room)
    UNION ALL
    (SELECT d.id, CASE WHEN held.until > 0 THEN held.until ELSE d.created_at END, true
     FROM hookwright.lease AS held JOIN hookwright.delivery AS d ON d.id = held.delivery_id
     WHERE held.endpoint_id = lane.endpoint_id AND held.until <= $3 AND held.delivery_id <> ALL($4)
     ORDER BY held.until, held.delivery_id LIMIT lane.room)
) AS due ORDER BY lane.place, due.since, due.id
"""

_INTERRUPT = """
WITH taken AS (
    UPDATE hookwright.delivery SET attempt_count = attempt_count + 1, interruptions = interruptions + 1,
        last_error = 'interrupted', last_status = NULL WHERE id = ANY($1::text[]) RETURNING id, attempt_count
)
INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, error)
SELECT id, attempt_count, $2::bigint, 0, 'interrupted' FROM taken
"""

# What is taken over has a row already.
_LEASE = """
WITH chosen AS MATERIALIZED (
    SELECT id, place FROM unnest($1::text[]) WITH ORDINALITY AS chosen (id, place)
), leased AS (
    INSERT INTO hookwright.lease (endpoint_id, delivery_id, token, until, attempt_count, owner)
    SELECT d.endpoint_id, d.id, $2::text || chosen.place, $3::bigint, d.attempt_count, $4::bigint
    FROM chosen JOIN hookwright.delivery AS d ON d.id = chosen.id
    ON CONFLICT (endpoint_id, delivery_id) DO UPDATE
    SET token = excluded.token, until = excluded.until, attempt_count = excluded.attempt_count, owner = excluded.owner
)
SELECT chosen.place, d.endpoint_id, d.id, d.event_id, d.attempt_count, d.interruptions, d.budget_from, d.created_at,
       d.available_at, d.renewed_at, e.type, e.data, e.tenant, e.occurred_at
FROM chosen JOIN hookwright.delivery AS d ON d.id = chosen.id JOIN hookwright.event AS e ON e.id = d.event_id
ORDER BY chosen.place
"""

# A hold that is over goes: it would be the lane's place in the queue for ever, before all who take turns.
_MOVE_ON = f"""
UPDATE hookwright.lane AS l SET hold_until = CASE WHEN l.hold_until > $2::bigint THEN l.hold_until ELSE 0 END,
    due_at = CASE WHEN found.first > $2 THEN found.first ELSE ($2 >> {TURN_BITS}) + 1 END
FROM (
    SELECT moving.endpoint_id, least(coalesce((
        SELECT d.available_at FROM hookwright.delivery AS d
        WHERE d.endpoint_id = moving.endpoint_id AND d.available_at IS NOT NULL AND {UNLEASED}
        ORDER BY d.available_at LIMIT 1
    ), {FOREVER}), coalesce((
        SELECT min(until) FROM hookwright.lease WHERE endpoint_id = moving.endpoint_id
    ), {FOREVER})) AS first FROM unnest($1::text[]) AS moving (endpoint_id)
) AS found WHERE l.endpoint_id = found.endpoint_id RETURNING l.due_at > $2
"""


def _later(proven: str) -> str:
    return (
        f"(SELECT {_READY} AS ready FROM hookwright.lane WHERE {proven}"
        f" AND {_READY} > greatest($1::bigint, {TURNS_END}) ORDER BY {_READY} LIMIT 1)"
    )


def _passed_by(proven: str, allowed: str) -> str:
    return (
        f"({allowed} AND EXISTS (SELECT 1 FROM hookwright.lane WHERE {proven} AND {_READY} <= $1"
        " AND endpoint_id <> ALL($2::text[])))"
    )


_NEXT = f"""
SELECT (SELECT min(ready) FROM ({_later(_PROVEN)} UNION ALL {_later(_UNPROVEN)}) AS later), (
    SELECT value FROM hookwright.meta WHERE key = 'endpoints_revision'
), {_passed_by(_PROVEN, "$3::bool")} OR {_passed_by(_UNPROVEN, "$4::bool")} OR EXISTS (SELECT 1 FROM hookwright.wake)
"""


async def claim(
    database: Database, request: ClaimRequest, *, owner: int, token: str, shared: bool
) -> tuple[Claim, int]:
    """See `Storage.claim`; and return the server's time. `shared`: other processes' leases take up room, too."""
    now, stopped = await database.first(_FOLD)
    if stopped:
        await adopt(database, stopped, now)
    claiming = _Claiming(database, request, owner, token, now)
    while await claiming.serve(await claiming.ready_lanes(shared=shared)):
        pass
    next_due, revision, passed_by = await database.first(_NEXT, now, list(claiming.seen), *claiming.could_give)
    if passed_by and claiming.rooms.left > 0:
        next_due = min(next_due or FOREVER, now + LOOK_AGAIN)
    return Claim(claiming.leases, None if next_due is None or next_due >= FOREVER else next_due, revision), now


class _Claiming:
    """One claim: what is left to give, and what was given so far."""

    def __init__(self, database: Database, request: ClaimRequest, owner: int, token: str, now: int) -> None:
        self._database = database
        self._request = request
        self._owner = owner
        self._token = token
        self._now = now
        self._held = [id for ids in request.in_flight.values() for id in ids] + list(request.settling)
        self.rooms = Rooms(request, now)
        self.seen: set[str] = set()
        self.leases: list[Lease] = []

    @property
    def could_give(self) -> tuple[bool, bool]:
        """Whether rows of proven and of other endpoints would still have been taken."""
        return self.rooms.left > 0, self.rooms.left > 0 and self.rooms.unproven_left > 0

    async def ready_lanes(self, *, shared: bool) -> list[Ready]:
        """Lock the lanes that are due and not held, as many as can matter, and return them in turn."""
        request = self._request
        if request.limit <= 0:
            return []
        busy = len(request.in_flight)
        rows = await self._database.fetch(
            _LANES,
            self._now,
            request.limit + busy,
            min(request.limit, request.unproven_limit) + busy,
            self._owner if shared else None,
        )
        self.seen.update(row[0] for row in rows)
        lanes = []
        for endpoint_id, earned, cap, rate_interval, rate_at, elsewhere in rows:
            left = (cap or request.endpoint_concurrency) - (elsewhere or 0)
            if left > 0:
                lanes.append(Ready(endpoint_id, earned, left if elsewhere else cap, rate_interval, rate_at))
        return lanes

    async def serve(self, lanes: Sequence[Ready]) -> bool:
        """Serve these lanes in turn, as far as there is room; say whether one turned out to be early, or closed."""
        rooms, closed = self.rooms.of(lanes)
        for lane in closed:
            await self._wait_for_rate(lane, 0)
        early, waiting, most = bool(closed), deque(rooms.items()), 4 * self._request.limit
        while waiting and self.rooms.left > 0:
            some: dict[Ready, int] = {}
            asked = 0
            while waiting and asked < most:
                lane, room = waiting.popleft()
                some[lane], asked = room, asked + room
            early = await self._serve(some) or early
            most *= 2  # lanes that have room for many, and few rows
        return early

    async def _serve(self, rooms: dict[Ready, int]) -> bool:
        due: defaultdict[str, list[str]] = defaultdict(list)
        ended: set[str] = set()
        lanes = [lane.endpoint_id for lane in rooms]
        for endpoint_id, id, has_ended in await self._database.fetch(
            _DUE, lanes, list(rooms.values()), self._now, self._held
        ):
            due[endpoint_id].append(id)
            if has_ended:
                ended.add(id)
        served: dict[str, tuple[Ready, list[str]]] = {}
        for lane, room in rooms.items():
            ids = due[lane.endpoint_id]
            given = ids[: self.rooms.give(lane, min(room, len(ids)))]
            if given:
                served[lane.endpoint_id] = (lane, given)
        await self._lease(served, ended)
        empty = [endpoint_id for endpoint_id in lanes if not due[endpoint_id]]
        for lane, given in served.values():
            if lane.rate_interval is not None:
                await self._wait_for_rate(lane, len(given))
        if served:
            await self._database.fetch(_MOVE_ON, list(served), self._now)
        # A lane in which nothing was found was early: another that is due may wait behind it.
        return bool(empty) and any(row[0] for row in await self._database.fetch(_MOVE_ON, empty, self._now))

    async def _lease(self, served: dict[str, tuple[Ready, list[str]]], ended: set[str]) -> None:
        """Lease rows, each under a fresh token."""
        chosen = [id for _, given in served.values() for id in given]
        if not chosen:
            return
        taken_over = ended.intersection(chosen)
        if taken_over:
            await self._database.run(_INTERRUPT, sorted(taken_over), self._now)
        token = f"{self._token}{len(self.leases):x}."
        until = self._now + self._request.lease
        for row in await self._database.fetch(_LEASE, chosen, token, until, self._owner):
            place, endpoint_id, id, event_id, attempts, interruptions, budget_from, created_at = row[:8]
            available_at, renewed_at, event_type, data, tenant, occurred_at = row[8:]
            self.leases.append(
                Lease(
                    id,
                    f"{token}{place}",
                    until,
                    endpoint_id,
                    event_id,
                    event_type,
                    data,
                    tenant,
                    occurred_at,
                    created_at,
                    renewed_at or created_at,
                    due_at=available_at or renewed_at or created_at,
                    number=attempts + 1,
                    spent=attempts - budget_from - min(interruptions, FREE_INTERRUPTIONS),
                    interruptions=interruptions,
                    taken_over=id in taken_over,
                    proven=served[endpoint_id][0].earned > 0,
                )
            )

    async def _wait_for_rate(self, lane: Ready, sent: int) -> None:
        """Count what was sent, and close a lane until its rate limit allows the next attempt."""
        assert lane.rate_interval is not None
        rate_at = max(lane.rate_at, self._now) + lane.rate_interval * sent if sent else lane.rate_at
        await self._database.run(
            "UPDATE hookwright.lane SET rate_at = $1, rate_until = $2 WHERE endpoint_id = $3",
            rate_at,
            opens_at(lane.rate_interval, rate_at),
            lane.endpoint_id,
        )


def claim_token() -> str:
    """Return what the tokens of one claim begin with."""
    return f"{new_token()}."


async def give_back(database: Database, tokens: Sequence[str]) -> None:
    """End the leases of claims whose answer never came: nobody has them, and nothing was sent."""
    leased = "FROM hookwright.lease WHERE left(token, 25) = ANY($1::text[])"
    rows = await database.fetch(f"SELECT DISTINCT endpoint_id {leased}", list(tokens))
    if rows:
        now = await lock_lanes(database, [row[0] for row in rows])
        rows = await database.fetch(f"DELETE {leased} RETURNING endpoint_id", list(tokens))
        await make_due(database, [(row[0], 0) for row in rows], now)
