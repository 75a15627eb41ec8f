"""Where the campaigns' databases are: files, or databases of a PostgreSQL server, which is never killed itself."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import psycopg

from tests.crash.picture import NOTHING, picture_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.crash.picture import Picture

PATIENCE = 30.0
"""Seconds that a server may need to notice that its client is dead."""


class Database(Protocol):
    """One campaign's. `url` is what a dispatcher is given."""

    @property
    def url(self) -> str: ...

    def look(self) -> Picture:
        """Say what a process left that is dead."""

    def change(self, sql: str, event_id: str) -> int:
        """Run a statement behind the dispatcher's back; `?` is the event. Return how many rows it changed."""


class Databases(Protocol):
    """Makes them. `name` says of what kind they are; `modules` are what their storage imports."""

    @property
    def name(self) -> str: ...

    @property
    def modules(self) -> tuple[str, ...]: ...

    def new(self, folder: Path) -> AbstractContextManager[Database]:
        """Return one that does not exist yet, and is gone afterwards; `folder` is the campaign's."""


# -- SQLite -------------------------------------------------------------------------------------------------------


class SQLiteDatabase:
    """A file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def look(self) -> Picture:
        """Copy it with its write-ahead log, and read the copy, so that the dispatcher does the recovery, not we."""
        copy = self.path.with_name("copy.db")
        for suffix in ("", "-wal"):
            found, to = self.path.with_name(self.path.name + suffix), copy.with_name(copy.name + suffix)
            to.unlink(missing_ok=True)
            if found.exists():
                shutil.copyfile(found, to)
        with closing(sqlite3.connect(copy)) as connection:
            integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'hookwright_meta'").fetchone() is None:
                return NOTHING._replace(integrity=integrity)
            return picture_of(lambda sql: connection.execute(sql).fetchall(), integrity)

    def change(self, sql: str, event_id: str) -> int:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute(sql, (event_id,)).rowcount


class SQLiteDatabases:
    """Files in the campaigns' folders."""

    name = f"SQLite {sqlite3.sqlite_version}"
    modules = ()

    @contextmanager
    def new(self, folder: Path) -> Iterator[SQLiteDatabase]:
        yield SQLiteDatabase(folder / "hooks.db")


# -- PostgreSQL ---------------------------------------------------------------------------------------------------


class PostgresDatabase:
    """A database of a server."""

    def __init__(self, dsn: str) -> None:
        self.url = dsn

    def look(self) -> Picture:
        """Read it, once the server has seen that the dead process is: until then it may still commit."""
        with psycopg.connect(self.url, autocommit=True) as connection:

            def ask(sql: str) -> list[tuple[Any, ...]]:
                return connection.execute(sql.replace("hookwright_", "hookwright.").encode()).fetchall()

            until = time.monotonic() + PATIENCE
            while sessions := ask(_SESSIONS):
                if time.monotonic() > until:
                    return NOTHING._replace(integrity=f"sessions of a dead process: {sessions}")
                time.sleep(0.002)
            if ask("SELECT to_regclass('hookwright_event')") == [(None,)]:
                return NOTHING
            return picture_of(ask, "ok")

    def change(self, sql: str, event_id: str) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            sql = sql.replace("hookwright_", "hookwright.").replace("?", "%s")
            return connection.execute(sql.encode(), (event_id,)).rowcount


_SESSIONS = """
SELECT pid, state, query FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


class PostgresDatabases:
    """Databases on the server of a superuser's DSN."""

    modules = ("asyncpg", "hookwright.storage.postgres")

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        [[version]] = self._ask("SHOW server_version")
        self.name = f"PostgreSQL {version}"

    @contextmanager
    def new(self, folder: Path) -> Iterator[PostgresDatabase]:
        name = f"crash_{time.time_ns()}"
        self._ask(f"CREATE DATABASE {name}")
        try:
            yield PostgresDatabase(urlsplit(self._dsn)._replace(path=f"/{name}").geturl())
        finally:
            self._ask(f"DROP DATABASE {name} WITH (FORCE)")

    def _ask(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []
