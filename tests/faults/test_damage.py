"""Damaged files: refused, never written to, and said; and a log that would silently lose what was acknowledged."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from hookwright import Dispatcher, SQLiteStorage, StorageCorrupt
from hookwright.storage.sqlite._wal import check_wal
from hookwright.testing import FakeTransport
from tests.conftest import URL, until

FRAME = 24
HEADER = 32


async def _filled(path: Path, events: int = 40) -> None:
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport(), deliver=False) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        for number in range(events):
            await dispatcher.emit("video.ready", "x" * 500, event_id=f"evt_{number}")


def _damage(path: Path, at: int, length: int = 16) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        there = file.read(length)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in there))


def _bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.glob(path.name + "*") if "-shm" not in file.name}


def _first_page_of(path: Path, name: str) -> int:
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        return int((page - 1) * size)


@pytest.mark.parametrize("at", [0, 100], ids=["its header", "its schema"])
async def test_a_file_with_a_damaged_beginning_is_refused_and_left_as_it_is(tmp_path: Path, at: int) -> None:
    path = tmp_path / "hooks.db"
    await _filled(path)
    _damage(path, at)
    before = _bytes(path)
    dispatcher = Dispatcher(SQLiteStorage(path), transport=FakeTransport())
    with pytest.raises(StorageCorrupt, match=r"restore it from a backup|not an SQLite database"):
        await dispatcher.start()
    health = await dispatcher.health()
    assert health.state == "failed"
    assert health.problems[0].startswith("it could not be started: StorageCorrupt: ")
    await dispatcher.aclose()
    assert _bytes(path) == before


@pytest.mark.parametrize("table", ["hookwright_endpoint", "hookwright_meta"])
async def test_a_damaged_page_that_a_start_reads_is_refused_and_left_as_it_is(tmp_path: Path, table: str) -> None:
    path = tmp_path / "hooks.db"
    await _filled(path)
    _damage(path, _first_page_of(path, table))
    before = _bytes(path)
    with pytest.raises(StorageCorrupt, match="restore it from a backup"):
        await Dispatcher(SQLiteStorage(path), transport=FakeTransport()).start()
    assert _bytes(path) == before


@pytest.mark.parametrize("table", ["hookwright_event", "hookwright_delivery", "hookwright_delivery_queue"])
async def test_a_damaged_page_that_is_met_later_ends_all_writing_and_is_said(tmp_path: Path, table: str) -> None:
    path = tmp_path / "hooks.db"
    await _filled(path)
    _damage(path, _first_page_of(path, table))
    before = _bytes(path)["hooks.db"]
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport(), shutdown_timeout=0) as dispatcher:

        async def has_failed() -> bool:
            return (await dispatcher.health()).state == "failed"

        await until(has_failed)
        problems = (await dispatcher.health()).problems
        assert any("StorageCorrupt" in problem and "restore it from a backup" in problem for problem in problems)
        for _ in range(2):
            with pytest.raises(StorageCorrupt, match="restore it from a backup"):
                await dispatcher.emit("video.ready")
    assert path.read_bytes() == before


async def test_once_damage_was_met_nothing_is_written_that_does_not_touch_it(tmp_path: Path) -> None:
    path, transport = tmp_path / "hooks.db", FakeTransport()
    await _filled(path, events=1)
    _damage(path, _first_page_of(path, "hookwright_attempt"))
    async with Dispatcher(SQLiteStorage(path), transport=transport, shutdown_timeout=0) as dispatcher:

        async def has_failed() -> bool:
            return (await dispatcher.health()).state == "failed"

        await until(has_failed)
        assert len(transport.requests) == 1  # its result cannot be written
        with pytest.raises(StorageCorrupt):
            await dispatcher.emit("video.ready")
        with pytest.raises(StorageCorrupt):
            await dispatcher.endpoints.create(URL, events=["*"])


async def _crashed(tmp_path: Path) -> Path:
    """Return a database as a process leaves it that was killed: acknowledged events are in the log alone."""
    living, dead = tmp_path / "living.db", tmp_path / "dead" / "hooks.db"
    dead.parent.mkdir()
    async with Dispatcher(SQLiteStorage(living), transport=FakeTransport(), deliver=False) as dispatcher:
        for number in range(20):
            await dispatcher.emit("video.ready", number, event_id=f"evt_{number}")
        for file in _bytes(living):
            shutil.copy(tmp_path / file, dead.with_name(file.replace("living", "hooks")))
    return dead


def _frames(log: Path) -> int:
    return (log.stat().st_size - HEADER) // (FRAME + 4096)


async def test_a_whole_log_is_read(tmp_path: Path) -> None:
    path = await _crashed(tmp_path)
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        assert (await dispatcher.events.get("evt_19")).id == "evt_19"
        assert (await dispatcher.health()).state == "healthy"


@pytest.mark.parametrize("part", ["header", "frame header", "salt", "page"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.8])
async def test_a_damaged_log_is_refused_before_what_it_held_is_forgotten(
    tmp_path: Path, part: str, where: float
) -> None:
    path = await _crashed(tmp_path)
    log = path.with_name("hooks.db-wal")
    begin = HEADER + round(_frames(log) * where) * (FRAME + 4096)
    offsets = {"header": 8, "frame header": begin + 4, "salt": begin + 8, "page": begin + FRAME + 1000}
    _damage(log, offsets[part], 1)
    before = _bytes(path)
    dispatcher = Dispatcher(SQLiteStorage(path), transport=FakeTransport())
    with pytest.raises(StorageCorrupt, match="committed transactions follow the damage"):
        await dispatcher.start()
    assert _bytes(path) == before


@pytest.mark.parametrize("cut", [10, 24, 3000])
async def test_a_log_that_ends_in_the_middle_of_a_transaction_is_read_up_to_there(tmp_path: Path, cut: int) -> None:
    path = await _crashed(tmp_path)
    log = path.with_name("hooks.db-wal")
    log.write_bytes(log.read_bytes()[:-cut])
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        assert (await dispatcher.events.get("evt_18")).id == "evt_18"


@pytest.mark.parametrize("content", [b"", b"\0" * 10, b"\0" * 9000])
async def test_a_log_that_was_never_written_is_no_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hooks.db"
    await _filled(path)
    path.with_name("hooks.db-wal").write_bytes(content)
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        assert (await dispatcher.events.get("evt_39")).id == "evt_39"


def _commits(path: Path, *sizes: int) -> bytes:
    """Return the log after a commit of so many rows of a page each, every time from the same beginning."""
    log = b""
    for size in sizes:
        there = path.with_name(f"{size}.db")
        for file in ("", "-wal"):
            shutil.copy(f"{path}{file}", f"{there}{file}")
        with closing(sqlite3.connect(there, isolation_level=None)) as database:
            database.execute("PRAGMA wal_autocheckpoint = 0")
            database.execute("BEGIN")
            database.executemany("INSERT INTO t VALUES (?)", [("x" * 4000,)] * size)
            database.execute("COMMIT")
            written = Path(f"{there}-wal").read_bytes()
        log = written + log[len(written) :]
    return log


async def test_what_commits_that_failed_left_in_the_log_is_no_damage(tmp_path: Path) -> None:
    path, copy = tmp_path / "base.db", tmp_path / "copy.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (a)")
        for file in ("", "-wal"):
            shutil.copy(f"{path}{file}", f"{copy}{file}")
    log = _commits(copy, 40, 20, 3)  # the first two were not synced, and so never acknowledged
    for file, content in (("", copy.read_bytes()), ("-wal", log)):
        Path(f"{path}{file}").write_bytes(content)
    check_wal(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM t").fetchone() == (3,)


async def test_a_log_that_another_process_is_writing_is_no_damage(tmp_path: Path) -> None:
    path, stop = tmp_path / "hooks.db", threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA wal_autocheckpoint = 20")
            database.execute("CREATE TABLE t (a)")
            while not stop.is_set():
                database.execute("INSERT INTO t VALUES ('x')")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            check_wal(path)
    finally:
        stop.set()
        writer.join()
