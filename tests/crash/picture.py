"""What a database says after a kill. Its files are copied first, so that the dispatcher does the recovery, not we."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Row(NamedTuple):
    """A delivery: its columns, its lease's token, and its attempts counted by what they say."""

    state: str
    token: str | None
    attempt_count: int
    interruptions: int
    answered: int
    interrupted: int
    attempts: int
    endpoint_state: str
    disabled_reason: str | None


class Picture(NamedTuple):
    """Everything an oracle asks for; a delivery's key is the path and the event id that its receiver sees."""

    integrity: str
    events: frozenset[str]
    rows: dict[tuple[str, str], Row]

    @property
    def pending(self) -> int:
        return sum(row.state == "pending" for row in self.rows.values())


NOTHING = Picture("ok", frozenset(), {})

_ROWS = """
SELECT p.url, d.event_id, d.state, l.token, d.attempt_count, d.interruptions, coalesce(a.answered, 0),
       coalesce(a.interrupted, 0), coalesce(a.attempts, 0), p.state, p.disabled_reason
FROM hookwright_delivery AS d JOIN hookwright_endpoint AS p ON p.id = d.endpoint_id
LEFT JOIN hookwright_lease AS l ON l.endpoint_id = d.endpoint_id AND l.delivery_id = d.id LEFT JOIN (
    SELECT delivery_id, sum(status IS NOT NULL) AS answered, sum(error IS 'interrupted') AS interrupted,
           count(*) AS attempts
    FROM hookwright_attempt GROUP BY delivery_id
) AS a ON a.delivery_id = d.id
"""

_BROKEN = """
SELECT 'a delivery is ' || state || ', available at ' || coalesce(available_at, 'no time') FROM hookwright_delivery
WHERE (state = 'pending') <> (available_at IS NOT NULL)
UNION SELECT 'a lease of a delivery that is not pending' FROM hookwright_lease
WHERE delivery_id NOT IN (SELECT id FROM hookwright_delivery WHERE state = 'pending')
"""


def look(database: Path) -> Picture:
    """Copy a database that nobody has open, with its write-ahead log, and read the copy."""
    copy = database.with_name("copy.db")
    for suffix in ("", "-wal"):
        found, to = database.with_name(database.name + suffix), copy.with_name(copy.name + suffix)
        to.unlink(missing_ok=True)
        if found.exists():
            shutil.copyfile(found, to)
    with closing(sqlite3.connect(copy)) as connection:
        integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'hookwright_meta'").fetchone() is None:
            return NOTHING._replace(integrity=integrity)
        broken = [row[0] for row in connection.execute(_BROKEN)]
        events = frozenset(row[0] for row in connection.execute("SELECT id FROM hookwright_event"))
        rows = {(_path(row[0]), row[1]): Row(*row[2:]) for row in connection.execute(_ROWS)}
    return Picture("; ".join(broken) or integrity, events, rows)


def _path(url: str) -> str:
    return "/" + url.split("/", 3)[3]
