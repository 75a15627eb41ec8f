"""A PostgreSQL server for one run: TEST_POSTGRES_DSN, or one from the package index with its defaults (fsync on)."""

from __future__ import annotations

import itertools
import os
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
from tests.postgres.server import DSN_VARIABLE, SETTINGS, own_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_numbers = itertools.count(1)


class Server:
    """A server: `pid` is that of its first process, or None when it is not ours."""

    def __init__(self, dsn: str, pid: int | None) -> None:
        self._dsn = dsn
        self.pid = pid

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """Give the DSN of a database that is empty, and drop it at the end."""
        name = f"hookwright_bench_{os.getpid()}_{next(_numbers)}"
        await self._run(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(self._dsn)._replace(path=f"/{name}").geturl()
        finally:
            await self._run(f"DROP DATABASE {name} WITH (FORCE)")

    async def _run(self, statement: str) -> None:
        connection = await asyncpg.connect(self._dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def cpu(self) -> float:
        """Return the seconds of CPU of all its processes until now, also of those that ended; 0 if that is unknown."""
        if self.pid is None or not Path("/proc/self/stat").exists():
            return 0.0
        ticks = sum(_times(self.pid))
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii").split()
        for child in children:
            try:
                ticks += sum(_times(int(child))[:2])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        return ticks / os.sysconf("SC_CLK_TCK")


def _times(pid: int) -> list[int]:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


async def settled_down(dsn: str) -> None:
    """Give every contender the same start: no dead rows, fresh statistics, nothing to be written out."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


@contextmanager
def server() -> Iterator[Server]:
    """Start one, which ends with this process whatever becomes of it; or take the one that was given."""
    given = os.environ.get(DSN_VARIABLE)
    if given:
        yield Server(given, None)
        return
    with own_server({**SETTINGS, "fsync": "on"}) as own:
        yield Server(own.dsn, own.pid)
