"""Opening the file: its mode, its settings, its schema, and the lock that says which process delivers."""

from __future__ import annotations

import os
import sqlite3
from importlib import resources
from typing import TYPE_CHECKING

from hookwright._errors import ConfigurationError, SchemaTooNew
from hookwright.storage.sqlite._owner import Database, transaction
from hookwright.storage.sqlite._wal import check_wal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = 1
"""The schema this version writes."""

_OLDEST_SQLITE = (3, 35, 0)  # RETURNING

_FIXED = ((3, 44, 6), (3, 50, 7), (3, 51, 3))  # https://sqlite.org/wal.html#walresetbug


def resets_the_log_safely(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether SQLite is free of the race of two checkpoints that may damage a database (3.7.0 to 3.51.2 have it)."""
    return version >= _FIXED[-1] or any(version[:2] == fixed[:2] and version >= fixed for fixed in _FIXED)


RISK = (
    f"this Python has SQLite {sqlite3.sqlite_version}, where two connections that move the WAL into the file at the"
    " same moment may damage it (fixed in 3.51.3, see https://sqlite.org/wal.html#walresetbug). Connections given as"
    " connection= no longer do so from now on (PRAGMA wal_autocheckpoint = 0): set it on the application's other"
    " connections to the file, too, or use a Python with a later SQLite"
)


def create_file(path: Path) -> None:
    """Create the file for its owner only: SQLite would make it readable for everybody; the WAL inherits the mode."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise ConfigurationError(f"SQLite 3.35 or later is needed, this Python has {sqlite3.sqlite_version}")
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def prepare_writer(path: Path, database: Database) -> None:
    """Check what the file is before anything is read or written through SQLite, then set it up and migrate."""
    check_wal(path)
    _refuse_newer(database)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA secure_delete = ON")
    database.execute("PRAGMA foreign_keys = OFF")
    with transaction(database):
        _migrate(database)


def prepare_reader(database: Database) -> None:
    """Make a connection that cannot write."""
    database.execute("PRAGMA query_only = ON")


def data_version(database: Database) -> int:
    """Return a number that changes when another connection commits."""
    return int(database.execute("PRAGMA data_version").fetchone()[0])


def empty_wal(database: Database) -> bool:
    """Move everything into the database file and truncate the WAL; say whether no reader was in the way."""
    busy, _, _ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def wal_stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with every commit, whoever's it is; None: there is no WAL yet."""
    try:
        found = path.with_name(path.name + "-wal").stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _refuse_newer(database: Database) -> int:
    found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'hookwright_meta'").fetchone()
    if found is None:
        return 0
    schema = int(database.execute("SELECT value FROM hookwright_meta WHERE key = 'schema'").fetchone()[0])
    if schema > SCHEMA:
        raise SchemaTooNew(
            f"the database has schema {schema}, this version knows up to {SCHEMA}: upgrade, or use another file"
        )
    return schema


def _migrate(database: Database) -> None:
    schema = _refuse_newer(database)
    if schema == 0:
        database.execute("CREATE TABLE hookwright_meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID")
        database.execute("INSERT INTO hookwright_meta VALUES ('schema', 0), ('endpoints_revision', 0)")
    for number in range(schema + 1, SCHEMA + 1):
        for statement in _statements(number):
            database.execute(statement)
        database.execute("UPDATE hookwright_meta SET value = ? WHERE key = 'schema'", (number,))


def _statements(number: int) -> Iterator[str]:
    # Not executescript: it commits first, and a migration is all or nothing.
    script = resources.files("hookwright.storage.sql").joinpath(f"sqlite_{number:04}.sql").read_text("utf-8")
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


class DeliverLock:
    """The right to deliver from a file: `BEGIN EXCLUSIVE` on a side file, keyed by the real path.

    It excludes within a process and across processes, is not inherited by a fork, and is free 0.2 ms after kill -9.
    All methods run in the writer's thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    @property
    def held(self) -> bool:
        """Whether it is ours."""
        return self._connection is not None

    def acquire(self) -> bool:
        """Try to take it, without waiting."""
        if self._connection is not None:
            return True
        side = self._path.resolve()
        side = side.with_name(side.name + "-deliver.lock")
        create_file(side)
        connection = sqlite3.connect(side, isolation_level=None, timeout=0)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                return False
            raise
        self._connection = connection
        return True

    def release(self) -> None:
        """Give it up; harmless when not held."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
