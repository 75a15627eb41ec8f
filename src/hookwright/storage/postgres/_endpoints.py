"""Endpoints. Each write holds the endpoint's lane from the first on, and takes the next revision at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import FOREVER
from hookwright._errors import ConflictError, NotFound
from hookwright._models import EndpointRow, EndpointState, Page
from hookwright.storage._base import CHANGES_MOST, Changes, rate_interval
from hookwright.storage._cursor import decode_cursor, encode_cursor
from hookwright.storage._rows import ENDPOINT_COLUMNS, SET_BY_APPLICATION, endpoint_columns, endpoint_row
from hookwright.storage.postgres._database import lock_lanes

if TYPE_CHECKING:
    from typing import Any

    from hookwright.storage.postgres._database import Database

_ROW = (
    f"{', '.join('p.' + column for column in ENDPOINT_COLUMNS)},"
    " coalesce(l.failures, 0), l.failing_since, l.last_success, l.last_at"
)
_TABLES = "hookwright.endpoint AS p LEFT JOIN hookwright.lane AS l ON l.endpoint_id = p.id"
_SELECT = f"SELECT {_ROW} FROM {_TABLES}"

REVISION = "SELECT value FROM hookwright.meta WHERE key = 'endpoints_revision'"
"""The endpoint counter."""


async def revision(database: Database) -> int:
    """Return the endpoint counter."""
    return int(await database.value(REVISION))


async def bump_revision(database: Database, endpoint_id: str) -> None:
    """Count an endpoint change, and give the endpoint that number.

    The last thing that a transaction locks. Whoever comes next waits for its commit, so that no reader sees a number
    before all that are less.
    """
    await database.run(
        "WITH bumped AS (UPDATE hookwright.meta SET value = value + 1 WHERE key = 'endpoints_revision' RETURNING value)"
        " UPDATE hookwright.endpoint AS p SET revision = bumped.value FROM bumped WHERE p.id = $1",
        endpoint_id,
    )


async def create(database: Database, endpoint: EndpointRow) -> EndpointRow:
    """See `Storage.create_endpoint`."""
    # The lane first: of two that create the same id, the second waits here until the first has committed.
    columns = endpoint_columns(endpoint) | {"revision": 0}
    created = await database.run(
        "INSERT INTO hookwright.lane (endpoint_id, due_at, hold_until, cap, rate_interval)"
        " VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
        endpoint.id,
        FOREVER,
        0 if endpoint.state is EndpointState.ACTIVE else FOREVER,
        endpoint.concurrency,
        rate_interval(endpoint),
    ) and await database.run(
        f"INSERT INTO hookwright.endpoint ({', '.join(ENDPOINT_COLUMNS)})"
        f" VALUES ({', '.join(f'${number}' for number, _ in enumerate(ENDPOINT_COLUMNS, 1))}) ON CONFLICT DO NOTHING",
        *(columns[column] for column in ENDPOINT_COLUMNS),
    )
    if not created:
        raise ConflictError(f"id: there is an endpoint {endpoint.id} already")
    await bump_revision(database, endpoint.id)
    return await get(database, endpoint.id)


_SET = [column for column in SET_BY_APPLICATION if column != "revision"]
_UPDATE = (
    f"UPDATE hookwright.endpoint SET {', '.join(f'{column} = ${number}' for number, column in enumerate(_SET, 2))}"
    " WHERE id = $1"
)


async def update(database: Database, endpoint: EndpointRow) -> EndpointRow:
    """See `Storage.update_endpoint`."""
    await lock_lanes(database, [endpoint.id])
    stored = await get(database, endpoint.id)
    if stored.revision != endpoint.revision:
        raise ConflictError(f"endpoint {endpoint.id} was changed by somebody else meanwhile: read it and repeat")
    await database.run(
        "UPDATE hookwright.lane SET cap = $1, rate_interval = $2::bigint,"
        " rate_at = CASE WHEN rate_interval IS NOT DISTINCT FROM $2::bigint THEN rate_at ELSE 0 END,"
        " rate_until = CASE WHEN rate_interval IS NOT DISTINCT FROM $2::bigint THEN rate_until ELSE 0 END"
        " WHERE endpoint_id = $3",
        endpoint.concurrency,
        rate_interval(endpoint),
        endpoint.id,
    )
    columns = endpoint_columns(endpoint)
    await database.run(_UPDATE, endpoint.id, *(columns[column] for column in _SET))
    await bump_revision(database, endpoint.id)
    return await get(database, endpoint.id)


async def change_state(
    database: Database, endpoint_id: str, state: EndpointState, *, reason: str | None
) -> EndpointRow:
    """See `Storage.set_endpoint_state`."""
    now = await lock_lanes(database, [endpoint_id])
    await get(database, endpoint_id)
    await set_state(database, endpoint_id, state.value, reason=reason, now=now)
    return await get(database, endpoint_id)


async def set_state(database: Database, endpoint_id: str, state: str, *, reason: str | None, now: int) -> bool:
    """Change endpoint and lane at once; a change takes the next revision. Say whether there was one.

    The caller holds the lane, and knows that the endpoint is not deleted.
    """
    # Active: a person has looked at it, its failures begin anew.
    anew = ", failures = 0, failing_since = NULL, throttles = 0" if state == "active" else ""
    await database.run(
        f"UPDATE hookwright.lane SET hold_until = $1, sweep = $2{anew} WHERE endpoint_id = $3",
        0 if state == "active" else FOREVER,
        "skipped" if state == "disabled" else None,
        endpoint_id,
    )
    changed = await database.run(
        "UPDATE hookwright.endpoint SET state = $1::text, disabled_reason = $2::text, updated_at = $3"
        " WHERE id = $4 AND NOT deleted AND (state <> $1::text OR disabled_reason IS DISTINCT FROM $2::text)",
        state,
        reason,
        now,
        endpoint_id,
    )
    if changed:
        await bump_revision(database, endpoint_id)
    return bool(changed)


async def delete(database: Database, endpoint_id: str) -> None:
    """See `Storage.delete_endpoint`."""
    now = await lock_lanes(database, [endpoint_id])
    await get(database, endpoint_id)
    await database.run(
        "UPDATE hookwright.lane SET hold_until = $1, sweep = 'cancelled' WHERE endpoint_id = $2", FOREVER, endpoint_id
    )
    await database.run(
        "UPDATE hookwright.endpoint SET deleted = true, updated_at = $1, state = 'disabled', url = '', events = '[]',"
        " filters = '{}', metadata = '{}', headers = '[]', keys = '[]', name = NULL, description = NULL WHERE id = $2",
        now,
        endpoint_id,
    )
    await bump_revision(database, endpoint_id)


async def rewrite(database: Database) -> None:
    """Write the table anew into another file, without the rows that were changed or deleted; the old file goes.

    An update leaves the old row in its page, and VACUUM only gives its place away: the bytes stay until something
    lands on them. Versions that a transaction which is still open could see are copied; WAL, replicas and backups are
    the server's, they keep what was written as long as it was told to. Nobody reads endpoints meanwhile. In a
    transaction of its own; it gives up when it must wait for others, sooner than PostgreSQL looks for deadlocks.
    """
    await database.run("SET LOCAL lock_timeout = 20")  # claims of all processes queue behind it meanwhile
    await database.run("CLUSTER hookwright.endpoint USING endpoint_pkey")


async def get(database: Database, endpoint_id: str) -> EndpointRow:
    """See `Storage.get_endpoint`."""
    row = await database.first(_SELECT + " WHERE p.id = $1 AND NOT p.deleted", endpoint_id)
    if row is None:
        raise NotFound(f"there is no endpoint {endpoint_id!r}")
    return endpoint_row(row)


async def page(database: Database, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
    """See `Storage.list_endpoints`."""
    where = "NOT p.deleted"
    values: list[Any] = [limit + 1]
    if tenant is not None:
        values.append(tenant)
        where += f" AND p.tenant = ${len(values)}"
    if cursor is not None:
        values.append(decode_cursor(cursor, "endpoints", tenant))
        where += f" AND p.id < ${len(values)}"
    rows = await database.fetch(f"{_SELECT} WHERE {where} ORDER BY p.id DESC LIMIT $1", *values)
    items = tuple(endpoint_row(row) for row in rows[:limit])
    more = len(rows) > limit
    return Page(items=items, next_cursor=encode_cursor("endpoints", tenant, items[-1].id) if more else None)


# One statement: between two of them others commit, and the counter would tell of changes that were not read.
_CHANGES = f"""
SELECT m.value, changed.* FROM hookwright.meta AS m LEFT JOIN LATERAL (
    SELECT {_ROW} FROM {_TABLES} WHERE p.revision > $1 ORDER BY p.revision LIMIT $2
) AS changed ON true WHERE m.key = 'endpoints_revision' ORDER BY changed.revision
"""


async def changes(database: Database, since_revision: int) -> Changes:
    """See `Storage.changes`."""
    # Each change has a revision of its own, so that none is cut in two by the limit.
    rows = await database.fetch(_CHANGES, since_revision, CHANGES_MOST)
    current = rows[0][0]
    changed = [endpoint_row(row[1:]) for row in rows if row[1] is not None]
    more = len(changed) == CHANGES_MOST and changed[-1].revision < current
    return Changes(changed[-1].revision if more else current, changed, more)
