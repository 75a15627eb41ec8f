"""A PostgresStorage whose time is set by hand, for the contract suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg

from hookwright.storage.postgres import PostgresStorage

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from hookwright import Clock

_FIRST_OF_OURS = 16384
"""The numbers of types below are PostgreSQL's own, the same in every database."""

_TYPES: dict[frozenset[int], Any] = {}
"""What the driver was told of them."""

_CLOCK = """
SELECT pg_advisory_xact_lock(hashtext('hookwright.clock'));
CREATE OR REPLACE FUNCTION hookwright.clock() RETURNS bigint LANGUAGE sql VOLATILE PARALLEL SAFE
AS $$SELECT current_setting('manual.now')::bigint$$
"""


class ManualPostgresStorage(PostgresStorage):
    """The server's time is that of the clock given to `open`, as it is when a transaction begins.

    `schema` is a name that needs no quotes. A statement that asks for the time outside a transaction fails.
    """

    def __init__(self, dsn: str, *, schema: str) -> None:
        super().__init__(dsn, schema=schema)
        self._manual_clock: Clock | None = None

    async def open(self, clock: Clock) -> None:
        """Open, and put the clock in the place of the server's."""
        self._manual_clock = clock
        await super().open(clock)
        assert self._open is not None
        await self._open.pool.run(lambda database: database.run(_CLOCK))  # on a connection that is there already

    def set_time(self) -> str:
        """Return what tells a transaction the time; one of the application's has to be told, too."""
        [(name, value)] = self._settings().items()
        return f"SET LOCAL {name} = {value}"

    def _settings(self) -> dict[str, str]:
        assert self._manual_clock is not None
        return {"manual.now": f"'{self._manual_clock.now()}'"}


def remember_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the driver ask once what an array of numbers is, and not on every connection: it takes 15 ms each."""
    driver: Any = asyncpg.Connection
    introspect = driver._introspect_types

    async def remembered(connection: Any, typeoids: Iterable[int], timeout: float | None) -> Any:
        oids = frozenset(typeoids)
        if oids not in _TYPES or max(oids) >= _FIRST_OF_OURS:
            _TYPES[oids] = await introspect(connection, oids, timeout)
        return _TYPES[oids]

    monkeypatch.setattr(driver, "_introspect_types", remembered)
