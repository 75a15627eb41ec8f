"""Release, take over, sweep: how rows that nobody will settle go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import FOREVER, SECOND
from hookwright.storage._base import HOLD_MOST, SWEEP_ROWS, UNTRIED_MOST
from hookwright.storage.postgres._database import lock_lanes
from hookwright.storage.postgres._lanes import TURN_BITS, TURNS_END, UNLEASED, make_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import Lease
    from hookwright.storage.postgres._database import Database


async def record_interruptions(database: Database, interrupted: Sequence[tuple[str, int]], now: int) -> None:
    """Write attempts (delivery, number) of which only the beginning is known, and that they were the last ones."""
    if interrupted:
        await database.run(
            "WITH told AS MATERIALIZED (SELECT * FROM unnest($1::text[], $2::integer[]) AS u (id, number)),"
            " written AS (INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, error)"
            " SELECT id, number, $3::bigint, 0, 'interrupted' FROM told)"
            " UPDATE hookwright.delivery AS d SET attempt_count = told.number, last_error = 'interrupted',"
            " last_status = NULL FROM told WHERE d.id = told.id",
            [row[0] for row in interrupted],
            [row[1] for row in interrupted],
            now,
        )


async def release(database: Database, leases: Sequence[Lease], *, sent: bool, hold: int) -> None:
    """See `Storage.release`."""
    if not leases:
        return
    now = await lock_lanes(database, list({lease.endpoint_id for lease in leases}))
    rows = await database.fetch(
        "DELETE FROM hookwright.lease AS l USING unnest($1::text[], $2::text[], $3::text[])"
        " AS given (endpoint_id, delivery_id, token), hookwright.delivery AS d"
        " WHERE l.endpoint_id = given.endpoint_id AND l.delivery_id = given.delivery_id AND l.token = given.token"
        " AND d.id = given.delivery_id RETURNING d.id, l.endpoint_id, d.attempt_count, d.available_at",
        [lease.endpoint_id for lease in leases],
        [lease.delivery_id for lease in leases],
        [lease.token for lease in leases],
    )
    if sent and rows:
        await record_interruptions(database, [(row[0], row[2] + 1) for row in rows], now)
        await database.run(
            "UPDATE hookwright.delivery SET budget_from = budget_from + 1 WHERE id = ANY($1::text[])",
            [row[0] for row in rows],
        )
    await make_due(database, [(row[1], row[3]) for row in rows], now)
    if hold and rows:
        await database.run(
            "UPDATE hookwright.lane SET hold_until = greatest(hold_until, $1) WHERE endpoint_id = ANY($2::text[])",
            now + hold,
            list({row[1] for row in rows}),
        )


# Those whose last attempt succeeded are proven, with room for one: else all would share the half of the slots that is
# left for whoever hangs. The server's clock may have been set back: no turn, hold or limit reaches further than it
# could now. $1 is now, $2 the turn, $4 whether nobody else delivers.
_RATE_MOST = f"$1::bigint + greatest(rate_interval, {SECOND})"
_AHEAD = {
    "earned": ("$4::bool AND earned <> (last_success IS TRUE)::integer", "(last_success IS TRUE)::integer"),
    "due_at": (f"due_at > $2::bigint AND due_at < {TURNS_END}", "$2::bigint"),
    "hold_until": (f"hold_until > $1::bigint + {HOLD_MOST} AND hold_until < {FOREVER}", f"$1::bigint + {HOLD_MOST}"),
    "failing_since": (
        f"failing_since IS NOT NULL AND (last_at > $1::bigint OR last_at < $1::bigint - {UNTRIED_MOST})",
        "$1::bigint",
    ),
    "rate_at": (f"rate_interval IS NOT NULL AND rate_at > {_RATE_MOST}", _RATE_MOST),
    "rate_until": (
        f"rate_interval IS NOT NULL AND rate_at > {_RATE_MOST}",
        f"least(rate_until, {_RATE_MOST})",
    ),
}
_IS_AHEAD = " OR ".join(f"({condition})" for condition, _ in _AHEAD.values())
_SET_BACK = ", ".join(
    f"{column} = CASE WHEN {condition} THEN {value} ELSE {column} END" for column, (condition, value) in _AHEAD.items()
)


async def free_leases(database: Database, *, alone: bool) -> None:
    """What whoever begins to deliver does: the rows of the dead are due at once, and nobody has earned more than 1.

    Who lives holds the advisory lock of its number, in another session than this; those with numbers below 0 do not
    show it. `alone`: no other process has the storage open, so that what endpoints have earned begins anew.
    """
    owners = await database.fetch("SELECT DISTINCT owner FROM hookwright.lease WHERE owner > 0")
    # By a list of values: there the lock is tried once for each, and for nobody else.
    dead = await database.fetch(
        "SELECT owner FROM unnest($1::bigint[]) AS o (owner) WHERE pg_try_advisory_xact_lock(owner)",
        [row[0] for row in owners],
    )
    of_dead = [row[0] for row in dead]
    now = await database.now()
    lanes = await database.fetch(
        "SELECT endpoint_id FROM hookwright.lease WHERE owner = ANY($3::bigint[])"
        f" UNION SELECT endpoint_id FROM hookwright.lane WHERE {_IS_AHEAD}",
        now,
        now >> TURN_BITS,
        of_dead,
        alone,
    )
    if not lanes:
        return
    endpoints = [row[0] for row in lanes]
    now = await lock_lanes(database, endpoints)
    freed = await database.fetch(
        "UPDATE hookwright.lease SET until = 0 WHERE owner = ANY($1::bigint[]) AND endpoint_id = ANY($2::text[])"
        " RETURNING endpoint_id",
        of_dead,
        endpoints,
    )
    await make_due(database, [(row[0], 0) for row in freed], now)
    await database.run(
        f"UPDATE hookwright.lane SET {_SET_BACK} WHERE endpoint_id = ANY($3::text[]) AND ({_IS_AHEAD})",
        now,
        now >> TURN_BITS,
        endpoints,
        alone,
    )


# The endpoint's own index holds what was swept before, and every batch would pass by it: the queue's index alone gives
# this order. Rows that are locked are being cancelled by somebody who had no lane to hold.
_WAITING = f"""
SELECT first.id, s.state FROM unnest($1::text[], $2::text[]) AS s (endpoint_id, state) CROSS JOIN LATERAL (
    SELECT d.id FROM hookwright.delivery AS d
    WHERE d.endpoint_id = s.endpoint_id AND d.available_at IS NOT NULL AND {UNLEASED}
    ORDER BY d.available_at, d.id LIMIT {SWEEP_ROWS} FOR NO KEY UPDATE OF d SKIP LOCKED
) AS first LIMIT {SWEEP_ROWS}
"""

_NONE_WAITS = """(
    SELECT d.available_at FROM hookwright.delivery AS d
    WHERE d.endpoint_id = l.endpoint_id AND d.available_at IS NOT NULL ORDER BY d.available_at, d.id LIMIT 1
) IS NULL"""


async def sweep(database: Database) -> bool:
    """See `Storage.sweep`. Lanes that somebody else holds are left to the next time."""
    lanes = await database.fetch(
        "SELECT endpoint_id, sweep FROM hookwright.lane WHERE sweep IS NOT NULL ORDER BY endpoint_id"
        " FOR UPDATE SKIP LOCKED"
    )
    if not lanes:
        return False
    now = await database.now()
    endpoints = [row[0] for row in lanes]
    # Requests of a process that died may have left.
    ended = await database.fetch(
        "DELETE FROM hookwright.lease WHERE endpoint_id = ANY($1::text[]) AND until <= $2"
        " RETURNING delivery_id, attempt_count + 1",
        endpoints,
        now,
    )
    await record_interruptions(database, [(row[0], row[1]) for row in ended], now)
    # Else a lane of a million rows would be sorted for each batch, where few wait in most lanes.
    await database.fetch("SELECT set_config('enable_sort', 'off', true)")
    waiting = await database.fetch(_WAITING, endpoints, [row[1] for row in lanes])
    for state in {row[1] for row in waiting}:
        await database.run(
            "UPDATE hookwright.delivery SET state = $1, available_at = NULL, finished_at = $2"
            " WHERE id = ANY($3::text[])",
            state,
            now,
            [row[0] for row in waiting if row[1] == state],
        )
    if len(waiting) >= SWEEP_ROWS:
        return True
    await database.run(
        f"DELETE FROM hookwright.lane AS l WHERE endpoint_id = ANY($1::text[]) AND sweep = 'cancelled'"
        f" AND {_NONE_WAITS}",
        endpoints,
    )
    await database.run(
        f"UPDATE hookwright.lane AS l SET sweep = NULL WHERE endpoint_id = ANY($1::text[]) AND sweep = 'skipped'"
        f" AND {_NONE_WAITS}",
        endpoints,
    )
    return False
