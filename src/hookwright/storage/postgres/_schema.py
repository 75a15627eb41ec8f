"""The schema: created and migrated forward, by one process at a time, all or nothing."""

from __future__ import annotations

import random
from importlib import resources
from typing import TYPE_CHECKING

from hookwright._errors import ConfigurationError
from hookwright.storage.postgres._callers import IDENTITY
from hookwright.storage.postgres._convert import too_new

if TYPE_CHECKING:
    from hookwright.storage.postgres._database import Database, Names

SCHEMA = 1
"""The schema this version writes."""

COMPATIBLE = 1
"""The oldest schema whose version can go on beside this one: migrations add, so that an upgrade may roll."""

OLDEST_SERVER = 140000
"""PostgreSQL 14, as the server numbers it."""


async def migrate(database: Database, names: Names) -> int:
    """Bring the schema up to date, in one transaction, and return its identity. Raises SchemaTooNew, or StorageError.

    Whoever comes second waits for the first. Processes of the version before go on meanwhile and afterwards.
    """
    # A migration may take its time, and whoever comes second waits for it.
    await database.fetch("SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '60s', true)")
    await database.fetch("SELECT pg_advisory_xact_lock(hashtextextended('hookwright ' || $1, 0))", names.schema)
    await _check_server(database)
    schema = await _schema_of(database, names)
    if schema < SCHEMA:
        await _migrate(database, names, schema)
    return int(await database.value(IDENTITY))


async def _check_server(database: Database) -> None:
    version = int(await database.value("SELECT current_setting('server_version_num')"))
    if version < OLDEST_SERVER:
        raise ConfigurationError(f"PostgreSQL 14 or later is needed, the server is {version // 10000}")


async def _migrate(database: Database, names: Names, schema: int) -> None:
    if schema == 0:
        if not await database.value("SELECT to_regnamespace($1) IS NOT NULL", names.quoted):
            await database.run(f"CREATE SCHEMA {names.quoted}")
        await database.run("CREATE TABLE hookwright.meta (key text PRIMARY KEY, value bigint NOT NULL)")
        await database.run(
            "INSERT INTO hookwright.meta VALUES ('schema', 0), ('compatible', 0), ('endpoints_revision', 0),"
            " ('identity', $1)",
            random.SystemRandom().getrandbits(62),
        )
    for number in range(schema + 1, SCHEMA + 1):
        await database.run(_script(number))
    await database.run("UPDATE hookwright.meta SET value = $1 WHERE key = 'schema'", SCHEMA)
    await database.run("UPDATE hookwright.meta SET value = $1 WHERE key = 'compatible'", COMPATIBLE)


async def _schema_of(database: Database, names: Names) -> int:
    if not await database.value("SELECT to_regclass($1) IS NOT NULL", f"{names.quoted}.meta"):
        return 0
    found = {row[0]: row[1] for row in await database.fetch("SELECT key, value FROM hookwright.meta")}
    if not {"schema", "compatible", "identity"} <= found.keys():
        raise ConfigurationError(f"the schema {names.schema!r} holds tables that are not hookwright's: name another")
    schema: int = found["schema"]
    if found["compatible"] > SCHEMA:
        raise too_new(schema, SCHEMA)
    return min(schema, SCHEMA)  # a later one, beside which this version may go on


def _script(number: int) -> str:
    return resources.files("hookwright.storage.sql").joinpath(f"postgres_{number:04}.sql").read_text("utf-8")
