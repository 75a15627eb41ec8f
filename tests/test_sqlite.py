"""What only a file can promise: durability, modes, refusals, and many writers at the price of one."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest

from hookwright import (
    Clock,
    ConfigurationError,
    Dispatcher,
    SchemaTooNew,
    SQLiteStorage,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageFull,
)
from hookwright._models import EndpointRow, Key
from hookwright.storage.sqlite import _claim, _owner, _release, _schema, _settle
from hookwright.testing import FakeTransport
from tests.conftest import URL

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.db"


async def test_64_emitters_share_their_transactions(path: Path) -> None:
    storage = SQLiteStorage(path)
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("warm.up")
        before = storage.transactions

        async def emitter() -> None:
            for _ in range(20):
                await dispatcher.emit("video.ready", {"n": 1})

        await asyncio.gather(*(emitter() for _ in range(64)))
        transactions = storage.transactions - before
        assert 64 * 20 / transactions >= 0.8 * 64
        assert await dispatcher.deliveries.count() == 64 * 20 + 1


async def test_the_files_are_their_owners_only(path: Path) -> None:
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        await dispatcher.emit("video.ready")
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    async with Dispatcher(SQLiteStorage(path)):
        pass
    with sqlite3.connect(path) as database:
        database.execute("UPDATE hookwright_meta SET value = 99 WHERE key = 'schema'")
    database.close()
    before = path.read_bytes()
    with pytest.raises(SchemaTooNew, match="upgrade"):
        await Dispatcher(SQLiteStorage(path)).start()
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"my diary" * 500)
    with pytest.raises(StorageCorrupt, match="not an SQLite database"):
        await Dispatcher(SQLiteStorage(path)).start()
    assert path.read_bytes() == b"my diary" * 500


async def test_the_applications_own_tables_may_be_in_the_file(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE video (id TEXT)")
    database.close()
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        await dispatcher.emit("video.ready")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM video").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM hookwright_event").fetchone() == (1,)
    database.close()


async def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        await Dispatcher(SQLiteStorage(tmp_path / "no" / "hooks.db")).start()


async def test_a_failed_migration_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(number: int) -> list[str]:
        return ["CREATE TABLE hookwright_event (id TEXT)", "CREATE NONSENSE"]

    with monkeypatch.context() as patched:
        patched.setattr(_schema, "_statements", broken)
        with pytest.raises(StorageError, match="NONSENSE"):
            await Dispatcher(SQLiteStorage(path)).start()
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport()) as dispatcher:
        await dispatcher.emit("video.ready")


async def test_a_lock_that_is_held_is_waited_for_and_then_busy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_owner, "BUSY_LIMIT", 0.3)
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport(), deliver=False) as dispatcher:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageBusy, match="commit it first"):
            await dispatcher.emit("video.ready", event_id="busy")
        waiting = asyncio.create_task(dispatcher.emit("video.ready", event_id="patient"))
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
        other.close()
        assert (await waiting).event_id == "patient"


async def test_a_full_disk_refuses_the_event_whole_and_goes_on_when_there_is_space(path: Path) -> None:
    storage = SQLiteStorage(path)
    async with Dispatcher(storage, transport=FakeTransport(), deliver=False) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])

        async def limit(pages: int) -> None:
            assert storage._owner is not None
            await storage._owner.call(lambda database: database.execute(f"PRAGMA max_page_count = {pages}").fetchall())

        await limit(60)
        results = await asyncio.gather(
            dispatcher.emit("video.ready", "x" * 250_000, event_id="large"),
            dispatcher.emit("video.ready", "x", event_id="small"),
            return_exceptions=True,
        )
        assert isinstance(results[0], StorageFull)
        assert not isinstance(results[1], BaseException)
        assert await dispatcher.deliveries.count() == 1
        await limit(10_000)
        assert not (await dispatcher.emit("video.ready", "x" * 250_000, event_id="large")).duplicate


async def test_a_storage_serves_one_dispatcher_and_may_be_opened_again(path: Path) -> None:
    storage = SQLiteStorage(path)
    assert "hooks.db" in repr(storage)
    assert storage.transactions == 0
    async with Dispatcher(storage, transport=FakeTransport()):
        with pytest.raises(ConfigurationError, match="its own"):
            await storage.open(Clock())
    with pytest.raises(StorageClosed):
        await storage.sweep()
    async with Dispatcher(storage, transport=FakeTransport()) as dispatcher:
        await dispatcher.emit("video.ready")


def test_a_forgotten_aclose_does_not_hang_the_interpreters_exit(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, time\n"
        "from hookwright import Dispatcher\n"
        "async def main():\n"
        "    dispatcher = Dispatcher(f'sqlite:///{sys.argv[1]}')\n"
        "    await dispatcher.start()\n"
        "    await dispatcher.emit('video.ready')\n"
        "    print('emitted', flush=True)\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(main())\n"
        "print(time.monotonic(), flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "hooks.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    emitted, left_main_at = done.stdout.split()
    assert emitted == "emitted"
    assert time.monotonic() - float(left_main_at) < 2


@pytest.mark.parametrize("statement", [_claim._DUE, _claim._MOVE_ON, _release._SWEEP])
async def test_whoever_walks_the_queue_reads_its_index_alone(path: Path, statement: str) -> None:
    plan = await _plan(path, statement)
    walks = [step for step in plan if "hookwright_delivery_queue" in step]
    assert walks
    assert all("COVERING INDEX hookwright_delivery_queue (endpoint_id=?" in step for step in walks)
    assert [step for step in plan if "hookwright_lease" in step]


@pytest.mark.parametrize(
    "statement", [_claim._DUE, _claim._MOVE_ON, _claim._ROWS, _claim._LEASE, _claim._BY_WAITING, _settle._LEASES]
)
async def test_deliveries_and_leases_are_looked_up_never_scanned(path: Path, statement: str) -> None:
    plan = await _plan(path, statement)
    read = [step for step in plan if step.split()[1] in {"d", "l", "hookwright_delivery", "hookwright_lease"}]
    assert read
    assert all(step.startswith("SEARCH") for step in read)


async def _plan(path: Path, statement: str) -> list[str]:
    async with Dispatcher(f"sqlite:///{path}", keys=[], deliver=False):
        pass
    with closing(sqlite3.connect(path)) as database:
        whatever = re.sub(r"\?\d?|:\w+", "1", statement)
        return [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {whatever}")]


async def test_scrubbing_clears_what_divided_pages_left_behind(path: Path) -> None:
    storage, random = SQLiteStorage(path), Random(4)  # with this seed `secure_delete` alone leaves two copies
    await storage.open(Clock())
    rows = [_endpoint(random) for _ in range(300)]
    rows = list(await asyncio.gather(*map(storage.create_endpoint, rows)))
    for change in (_headers, _headers, _key):
        random.shuffle(rows)
        rows = list(await asyncio.gather(*(storage.update_endpoint(change(row, random)) for row in rows)))
    await storage.scrub_endpoints()
    found = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"yyyy" in found
    assert b"MARKE" not in found
    await storage.close()


def _endpoint(random: Random) -> EndpointRow:
    row = EndpointRow(f"ep_{random.random()}", "u", ("*",), 0, 0, keys=(Key("MARKER" * random.randint(1, 9)),))
    return replace(row, headers=(("a", "x" * random.randint(0, 900)),))


def _headers(row: EndpointRow, random: Random) -> EndpointRow:
    return replace(row, headers=(("a", "x" * random.randint(0, 2500)),))


def _key(row: EndpointRow, random: Random) -> EndpointRow:
    return replace(row, keys=(Key("y" * random.randint(60, 300)),))
