"""Endpoints: each write is a function of a connection inside a transaction, and takes the next revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import FOREVER
from hookwright._errors import ConflictError, NotFound
from hookwright._models import EndpointRow, EndpointState, Page
from hookwright.storage._base import CHANGES_MOST, Changes, rate_interval
from hookwright.storage._cursor import decode_cursor, encode_cursor
from hookwright.storage._rows import ENDPOINT_COLUMNS, SET_BY_APPLICATION, endpoint_columns, endpoint_row
from hookwright.storage.sqlite._lanes import bump_revision, revision

if TYPE_CHECKING:
    from hookwright.storage.sqlite._owner import Database

_SELECT = (
    f"SELECT {', '.join('p.' + column for column in ENDPOINT_COLUMNS)},"
    " coalesce(l.failures, 0), l.failing_since, l.last_success, l.last_at"
    " FROM hookwright_endpoint AS p LEFT JOIN hookwright_lane AS l ON l.endpoint_id = p.id"
)


def create(database: Database, endpoint: EndpointRow) -> EndpointRow:
    """See `Storage.create_endpoint`."""
    if database.execute("SELECT 1 FROM hookwright_endpoint WHERE id = ?", (endpoint.id,)).fetchone():
        raise ConflictError(f"id: there is an endpoint {endpoint.id} already")
    names = ", ".join(f":{column}" for column in ENDPOINT_COLUMNS)
    # The values have no name: they hold secrets, and an error shows what has one.
    database.execute(
        f"INSERT INTO hookwright_endpoint ({', '.join(ENDPOINT_COLUMNS)}) VALUES ({names})",
        endpoint_columns(endpoint) | {"revision": bump_revision(database)},
    )
    database.execute(
        "INSERT INTO hookwright_lane (endpoint_id, due_at, hold_until, cap, rate_interval) VALUES (?, ?, ?, ?, ?)",
        (
            endpoint.id,
            FOREVER,
            0 if endpoint.state is EndpointState.ACTIVE else FOREVER,
            endpoint.concurrency,
            rate_interval(endpoint),
        ),
    )
    return get(database, endpoint.id)


def update(database: Database, endpoint: EndpointRow) -> EndpointRow:
    """See `Storage.update_endpoint`."""
    stored = get(database, endpoint.id)
    if stored.revision != endpoint.revision:
        raise ConflictError(f"endpoint {endpoint.id} was changed by somebody else meanwhile: read it and repeat")
    assignments = ", ".join(f"{column} = :{column}" for column in SET_BY_APPLICATION)
    database.execute(
        f"UPDATE hookwright_endpoint SET {assignments} WHERE id = :id",
        endpoint_columns(endpoint) | {"revision": bump_revision(database)},
    )
    database.execute(
        "UPDATE hookwright_lane SET cap = ?1, rate_interval = ?2, rate_at = CASE WHEN rate_interval IS ?2 THEN rate_at"
        " ELSE 0 END, rate_until = CASE WHEN rate_interval IS ?2 THEN rate_until ELSE 0 END WHERE endpoint_id = ?3",
        (endpoint.concurrency, rate_interval(endpoint), endpoint.id),
    )
    return get(database, endpoint.id)


def change_state(
    database: Database, endpoint_id: str, state: EndpointState, *, reason: str | None, now: int
) -> EndpointRow:
    """See `Storage.set_endpoint_state`."""
    get(database, endpoint_id)
    set_state(database, endpoint_id, state.value, reason=reason, now=now)
    return get(database, endpoint_id)


def set_state(database: Database, endpoint_id: str, state: str, *, reason: str | None, now: int) -> bool:
    """Change endpoint and lane at once; a change takes the next revision. Say whether there was one."""
    database.execute(
        "UPDATE hookwright_lane SET hold_until = ?, sweep = ? WHERE endpoint_id = ?",
        (0 if state == "active" else FOREVER, "skipped" if state == "disabled" else None, endpoint_id),
    )
    if state == "active":  # a person has looked at it: its failures begin anew
        database.execute(
            "UPDATE hookwright_lane SET failures = 0, failing_since = NULL, throttles = 0 WHERE endpoint_id = ?",
            (endpoint_id,),
        )
    changed = database.execute(
        "UPDATE hookwright_endpoint SET state = ?1, disabled_reason = ?2, updated_at = ?3, revision = ?4"
        " WHERE id = ?5 AND deleted = 0 AND (state <> ?1 OR disabled_reason IS NOT ?2) RETURNING 1",
        (state, reason, now, revision(database) + 1, endpoint_id),
    ).fetchall()
    if changed:
        bump_revision(database)
    return bool(changed)


def delete(database: Database, endpoint_id: str, now: int) -> None:
    """See `Storage.delete_endpoint`."""
    get(database, endpoint_id)
    database.execute(
        "UPDATE hookwright_endpoint SET deleted = 1, revision = ?, updated_at = ?, state = 'disabled', url = '',"
        " events = '[]', filters = '{}', metadata = '{}', headers = '[]', keys = '[]', name = NULL, description = NULL"
        " WHERE id = ?",
        (bump_revision(database), now, endpoint_id),
    )
    database.execute(
        "UPDATE hookwright_lane SET hold_until = ?, sweep = 'cancelled' WHERE endpoint_id = ?", (FOREVER, endpoint_id)
    )


def rewrite(database: Database) -> None:
    """Write the table anew, on cleared pages.

    `secure_delete` clears what a statement deletes, but not what moves when a page is divided: the bytes that were left
    behind stay until something lands on them. Only a page that is given up is cleared whole.
    """
    rows = database.execute("SELECT * FROM hookwright_endpoint").fetchall()
    database.execute("DELETE FROM hookwright_endpoint")
    if rows:
        places = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT INTO hookwright_endpoint VALUES ({places})", rows)


def get(database: Database, endpoint_id: str) -> EndpointRow:
    """See `Storage.get_endpoint`."""
    row = database.execute(_SELECT + " WHERE p.id = ? AND p.deleted = 0", (endpoint_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no endpoint {endpoint_id!r}")
    return endpoint_row(row)


def page(database: Database, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
    """See `Storage.list_endpoints`."""
    where, values = "p.deleted = 0", []
    if tenant is not None:
        where += " AND p.tenant = ?"
        values.append(tenant)
    if cursor is not None:
        where += " AND p.id < ?"
        values.append(decode_cursor(cursor, "endpoints", tenant))
    rows = database.execute(f"{_SELECT} WHERE {where} ORDER BY p.id DESC LIMIT ?", [*values, limit + 1]).fetchall()
    items = tuple(endpoint_row(row) for row in rows[:limit])
    more = len(rows) > limit
    return Page(items=items, next_cursor=encode_cursor("endpoints", tenant, items[-1].id) if more else None)


def changes(database: Database, since_revision: int) -> Changes:
    """See `Storage.changes`."""
    # Each change has a revision of its own, so that none is cut in two by the limit.
    rows = database.execute(
        _SELECT + " WHERE p.revision > ? ORDER BY p.revision LIMIT ?", (since_revision, CHANGES_MOST)
    ).fetchall()
    changed = [endpoint_row(row) for row in rows]
    current = revision(database)
    more = len(changed) == CHANGES_MOST and changed[-1].revision < current
    return Changes(changed[-1].revision if more else current, changed, more)
