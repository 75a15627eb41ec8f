"""One connection inside one transaction, and the names of our tables in it."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from hookwright._errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_SCHEMA = 63
"""Bytes that PostgreSQL keeps of a name."""

_PREFIX = re.compile(r"\bhookwright\.")


class Names:
    """Puts the schema's name into statements, which all say `hookwright.`; each is written out once."""

    def __init__(self, schema: str) -> None:
        if not schema or set(schema) & {"\0", "$"} or len(schema.encode()) > LONGEST_SCHEMA or schema.startswith("pg_"):
            raise ConfigurationError(
                f"schema: {schema!r} cannot be one; use up to {LONGEST_SCHEMA} bytes without $, not beginning with pg_"
            )
        if schema == "public":
            raise ConfigurationError("schema: public is the application's; give hookwright's tables one of their own")
        self.schema = schema
        quoted = schema.replace('"', '""')
        self.quoted = f'"{quoted}"'
        self.channel = f"hookwright_{sha256(schema.encode()).hexdigest()[:16]}"
        self._written: dict[str, str] = {}

    def __call__(self, sql: str) -> str:
        """Return the statement for this schema."""
        written = self._written.get(sql)
        if written is None:
            written = self._written[sql] = _PREFIX.sub(lambda _: f"{self.quoted}.", sql)
        return written


class Connection(Protocol):
    """What is used of an asyncpg connection."""

    async def fetch(self, query: str, *args: Any) -> Sequence[Any]:
        """Run one statement and return its rows."""

    async def execute(self, query: str, *args: Any) -> str:
        """Run one statement, or several without arguments, and return the last one's command tag."""


class Database:
    """The connection of a transaction. Statements say `hookwright.` where the schema's name belongs."""

    __slots__ = ("_connection", "_names", "done")

    def __init__(self, connection: Connection, names: Names) -> None:
        self._connection = connection
        self._names = names
        self.done = 0
        """Statements that were answered: outside a transaction, what they wrote stays."""

    async def fetch(self, sql: str, *arguments: Any) -> Sequence[Any]:
        """Return the rows of one statement; a row can be read by position and by name."""
        rows = await self._connection.fetch(self._names(sql), *arguments)
        self.done += 1
        return rows

    async def first(self, sql: str, *arguments: Any) -> Any:
        """Return the first row of one statement, or None."""
        rows = await self.fetch(sql, *arguments)
        return rows[0] if rows else None

    async def value(self, sql: str, *arguments: Any) -> Any:
        """Return the first column of the first row, or None."""
        rows = await self.fetch(sql, *arguments)
        return rows[0][0] if rows else None

    async def run(self, sql: str, *arguments: Any) -> int:
        """Run a statement that changes rows; return how many it changed."""
        tag = await self._connection.execute(self._names(sql), *arguments)
        self.done += 1
        number = tag.rpartition(" ")[2]
        return int(number) if number.isdigit() else 0

    async def now(self) -> int:
        """Return the time: the server's."""
        return int(await self.value("SELECT hookwright.clock()"))


def columns_of(rows: Sequence[tuple[Any, ...]], count: int) -> list[list[Any]]:
    """Return the columns of rows that have so many, as `unnest` takes them."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]


async def lock_lanes(database: Database, endpoint_ids: Sequence[str]) -> int:
    """Lock the lanes of these endpoints, in the order in which everybody does, and return the time after that.

    Whoever changes deliveries or leases of an endpoint, or the endpoint, holds its lane. What is read before the lock
    is held may be old: read after it.

    Once in a transaction, and before it locks anything else. What comes after it, in this order: endpoints, events by
    id (`requeue` shares them, `expunge` and `prune` have them alone; `prune` holds no lane, and skips what is locked),
    deliveries by id, and last the endpoint counter. Who cannot keep to it skips what is locked, as claims and `sweep`.
    """
    await database.fetch(
        "SELECT endpoint_id FROM hookwright.lane WHERE endpoint_id = ANY($1::text[]) ORDER BY endpoint_id FOR UPDATE",
        list(endpoint_ids),
    )
    return await database.now()
