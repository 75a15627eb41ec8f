"""What a database says after a kill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


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
    SELECT delivery_id, count(status) AS answered, count(*) AS attempts,
           count(CASE WHEN error = 'interrupted' THEN 1 END) AS interrupted
    FROM hookwright_attempt GROUP BY delivery_id
) AS a ON a.delivery_id = d.id
"""

_BROKEN = """
SELECT 'a delivery is ' || state || ', available at ' || coalesce(CAST(available_at AS text), 'no time')
FROM hookwright_delivery WHERE (state = 'pending') <> (available_at IS NOT NULL)
UNION SELECT 'a lease of a delivery that is not pending' FROM hookwright_lease
WHERE delivery_id NOT IN (SELECT id FROM hookwright_delivery WHERE state = 'pending')
"""


def picture_of(ask: Callable[[str], Iterable[tuple[Any, ...]]], integrity: str) -> Picture:
    """Read a database: `ask` answers a question, in which tables have the names that SQLite knows them by."""
    broken = [row[0] for row in ask(_BROKEN)]
    events = frozenset(row[0] for row in ask("SELECT id FROM hookwright_event"))
    rows = {(_path(row[0]), row[1]): Row(*row[2:]) for row in ask(_ROWS)}
    return Picture("; ".join(broken) or integrity, events, rows)


def _path(url: str) -> str:
    return "/" + url.split("/", 3)[3]
