"""A PostgresStorage whose time is set by hand, for the contract suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from hookwright.storage.postgres import PostgresStorage

if TYPE_CHECKING:
    from hookwright import Clock

_CLOCK = """
SELECT pg_advisory_xact_lock(hashtext('{schema}'));
CREATE OR REPLACE FUNCTION {schema}.clock() RETURNS bigint LANGUAGE sql VOLATILE PARALLEL SAFE
AS $$SELECT current_setting('hookwright.now')::bigint$$
"""


class ManualPostgresStorage(PostgresStorage):
    """The server's time is that of the clock given to `open`, as it is when a transaction begins.

    `schema` is a name that needs no quotes. A statement that asks for the time outside a transaction fails.
    """

    def __init__(self, dsn: str, *, schema: str) -> None:
        super().__init__(dsn, schema=schema)
        self._manual_dsn = dsn
        self._manual_schema = schema
        self._manual_clock: Clock | None = None

    async def open(self, clock: Clock) -> None:
        """Open, and put the clock in the place of the server's."""
        self._manual_clock = clock
        await super().open(clock)
        connection = await asyncpg.connect(self._manual_dsn)
        try:
            await connection.execute(_CLOCK.format(schema=self._manual_schema))
        finally:
            await connection.close()

    def set_time(self) -> str:
        """Return what tells a transaction the time; one of the application's has to be told, too."""
        [(name, value)] = self._settings().items()
        return f"SET LOCAL {name} = {value}"

    def _settings(self) -> dict[str, str]:
        assert self._manual_clock is not None
        return {"hookwright.now": f"'{self._manual_clock.now()}'"}
