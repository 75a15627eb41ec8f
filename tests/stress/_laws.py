"""What must be true of the tables whenever anybody looks: each law is one statement that counts what breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import FOREVER
from hookwright.storage.postgres._lanes import TURNS_END

if TYPE_CHECKING:
    import asyncpg

_PENDING = "d.available_at IS NOT NULL"
_UNLEASED = "NOT EXISTS (SELECT 1 FROM lease AS x WHERE x.endpoint_id = d.endpoint_id AND x.delivery_id = d.id)"

# When the lane should be looked at: its first row that nobody holds, or its first lease that ends.
_FIRST = f"""
SELECT endpoint_id, min(first) AS first FROM (
    SELECT d.endpoint_id, d.available_at AS first FROM delivery AS d WHERE {_PENDING} AND {_UNLEASED}
    UNION ALL SELECT endpoint_id, until FROM lease
) AS waiting GROUP BY endpoint_id
"""

_WOKEN = (
    "EXISTS (SELECT 1 FROM wake AS w WHERE w.endpoint_id = f.endpoint_id AND w.available_at <= greatest(f.first, 0))"
)

LAWS = {
    "what is pending, and nothing else, has a time": (
        "SELECT d.id FROM delivery AS d WHERE (state = 'pending') <> (available_at IS NOT NULL)"
        " OR (state = 'pending') <> (finished_at IS NULL)"
    ),
    "no lease without a pending delivery": (
        "SELECT l.delivery_id FROM lease AS l LEFT JOIN delivery AS d ON d.id = l.delivery_id"
        " WHERE d.state IS DISTINCT FROM 'pending' OR d.endpoint_id <> l.endpoint_id"
    ),
    "attempt_count is the number of attempts": (
        "SELECT d.id, d.attempt_count, count(a.number) FROM delivery AS d LEFT JOIN attempt AS a"
        " ON a.delivery_id = d.id GROUP BY d.id HAVING d.attempt_count <> count(a.number)"
        " OR d.attempt_count <> coalesce(max(a.number), 0)"
        " OR d.interruptions > count(a.number) FILTER (WHERE a.error = 'interrupted')"
    ),
    "a lease knows how many attempts there were": (
        "SELECT l.delivery_id FROM lease AS l JOIN delivery AS d ON d.id = l.delivery_id"
        " WHERE l.attempt_count <> d.attempt_count"
    ),
    "an event has all its deliveries": (
        "SELECT e.id, e.delivery_count, count(d.id) FROM event AS e LEFT JOIN delivery AS d ON d.event_id = e.id"
        " WHERE e.type <> 'hookwright.test' GROUP BY e.id HAVING count(d.id) < e.delivery_count OR"
        " (e.id LIKE 'evt\\_stress\\_%' AND (count(d.id), e.delivery_count)"
        " <> (split_part(e.id, '_', 4)::int, split_part(e.id, '_', 5)::int))"
    ),
    "no delivery without its event, no attempt without its delivery": (
        "SELECT d.id FROM delivery AS d WHERE NOT EXISTS (SELECT 1 FROM event AS e WHERE e.id = d.event_id)"
        " UNION ALL SELECT a.delivery_id FROM attempt AS a"
        " WHERE NOT EXISTS (SELECT 1 FROM delivery AS d WHERE d.id = a.delivery_id)"
    ),
    "a lane is early, never late": (
        f"SELECT f.endpoint_id, f.first, l.due_at FROM ({_FIRST}) AS f JOIN lane AS l ON l.endpoint_id = f.endpoint_id"
        f" JOIN endpoint AS p ON p.id = f.endpoint_id WHERE p.state <> 'disabled' AND NOT p.deleted"
        f" AND l.due_at >= {TURNS_END} AND l.due_at > greatest(f.first, clock()) AND NOT {_WOKEN}"
    ),
    "what waits for an endpoint that is stopped will be swept": (
        f"SELECT f.endpoint_id FROM ({_FIRST}) AS f JOIN endpoint AS p ON p.id = f.endpoint_id"
        " LEFT JOIN lane AS l ON l.endpoint_id = f.endpoint_id WHERE (p.state = 'disabled' OR p.deleted)"
        " AND l.sweep IS NULL AND NOT EXISTS (SELECT 1 FROM wake AS w WHERE w.endpoint_id = f.endpoint_id)"
    ),
    "a lane is as open as its endpoint": (
        "SELECT p.id, p.state, p.deleted, l.hold_until, l.sweep FROM endpoint AS p"
        " LEFT JOIN lane AS l ON l.endpoint_id = p.id WHERE NOT CASE"
        " WHEN p.deleted THEN l.endpoint_id IS NULL OR l.sweep IS NOT DISTINCT FROM 'cancelled'"
        f" WHEN p.state = 'disabled' THEN l.hold_until = {FOREVER} AND coalesce(l.sweep, 'skipped') = 'skipped'"
        f" WHEN p.state = 'paused' THEN l.hold_until = {FOREVER} AND l.sweep IS NULL"
        f" ELSE l.hold_until < {FOREVER} AND l.sweep IS NULL END"
    ),
    "the counter is the newest revision, and each is taken once": (
        "SELECT max(revision) FROM endpoint HAVING max(revision) <> (SELECT value FROM meta"
        " WHERE key = 'endpoints_revision') OR count(*) <> count(DISTINCT revision)"
    ),
}
"""What each is called, and a statement that finds what breaks it."""


async def broken(connection: asyncpg.Connection, schema: str) -> list[str]:
    """Look at one moment, and say which laws do not hold in it."""
    found = []
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute(f'SET LOCAL search_path = "{schema}"')
        for law, sql in LAWS.items():
            rows = await connection.fetch(sql)
            if rows:
                found.append(f"{law}: {len(rows)} times, such as {tuple(rows[0])}")
    return found
