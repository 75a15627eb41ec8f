"""Fault points at statements strike where they say."""

from __future__ import annotations

import asyncpg
import pytest

from tests.faults.points import Points, every, raising
from tests.postgres.points import asyncpg_statements

PASSED = ["CREATE TABLE", "INSERT INTO", "BEGIN;", "SELECT n", "COMMIT;"]


class Struck(Exception):
    """What strikes."""


async def _live(dsn: str, schema: str, points: Points) -> None:
    connection = await asyncpg.connect(dsn, server_settings={"search_path": schema})
    try:
        with asyncpg_statements(points):
            await connection.execute("CREATE TABLE t (n int)")
            await connection.executemany("INSERT INTO t VALUES ($1)", [(1,), (2,)])
            async with connection.transaction():
                assert await connection.fetchval("SELECT n FROM t WHERE n > $1", 1) == 2
    finally:
        connection.terminate()


async def _made(dsn: str, schema: str) -> bool:
    connection = await asyncpg.connect(dsn)
    try:
        made = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{schema}.t")
        await connection.execute(f"DROP TABLE IF EXISTS {schema}.t")
        return bool(made)
    finally:
        await connection.close()


async def test_every_statement_of_asyncpg_is_a_point_before_it_and_after(
    postgres_dsn: str, postgres_schema: str
) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"CREATE SCHEMA {postgres_schema}")
    await connection.close()
    counted = Points()
    await _live(postgres_dsn, postgres_schema, counted)
    assert [what for name, what in zip(counted.passed, PASSED, strict=True) if name.startswith(what)] == PASSED
    assert await _made(postgres_dsn, postgres_schema)
    for points in every(len(PASSED), raising(Struck())):
        with pytest.raises(Struck):
            await _live(postgres_dsn, postgres_schema, points)
        assert points.struck
        assert await _made(postgres_dsn, postgres_schema) == (repr(points) != "<before 1: CREATE TABLE t (n int)>")
