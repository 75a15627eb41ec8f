"""Many rows with one statement, and one step of it.

SQLite's thread hands the interpreter's lock over for every step, and waits to get it back from a busy event loop: what
a row takes by itself is ten times what it takes among others.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hookwright.storage.sqlite._owner import Database


def at_once(columns: str, source: str) -> str:
    """Return a query that answers with all rows of `source` in one: see `rows_at_once`."""
    return f"SELECT json_group_array(json_array({columns})) FROM ({source})"


def rows_at_once(database: Database, query: str, parameters: Any) -> list[list[Any]]:
    """Return the rows of a query that `at_once` made."""
    rows: list[list[Any]] = json.loads(database.execute(query, parameters).fetchone()[0])
    return rows


Statement = tuple[str, "Sequence[Any]"]
"""SQL and its parameters."""


def update_alike(database: Database, update: str, changes: Iterable[tuple[tuple[Any, ...], str]]) -> None:
    """Run an update once for all rows that change alike: its last parameter is their keys, for `json_each`."""
    for statement in updates_alike(update, changes):
        database.execute(*statement)


def updates_alike(update: str, changes: Iterable[tuple[tuple[Any, ...], str]]) -> Iterator[Statement]:
    """Return the statements of `update_alike`."""
    alike: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for values, key in changes:
        alike[values].append(key)
    for values, keys in alike.items():
        yield update, (*values, json.dumps(keys))


_TOGETHER = 32


def insert_rows(database: Database, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows into a table, or into some columns of it, several with one statement."""
    for statement in inserts(into, rows):
        database.execute(*statement)


def inserts(into: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[Statement]:
    """Return the statements of `insert_rows`."""
    for begin in range(0, len(rows), _TOGETHER):
        some = rows[begin : begin + _TOGETHER]
        one = f"({', '.join('?' * len(some[0]))})"
        values = ", ".join([one] * len(some))
        yield f"INSERT INTO {into} VALUES {values}", [*itertools.chain.from_iterable(some)]
