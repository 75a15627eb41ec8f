"""A database that may be read and not written: said clearly, left as it is, and used again once it may be."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hookwright import Dispatcher, SQLiteStorage, StorageError
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.faults.processes import child, integrity

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may reach: pytest's own belongs to its user alone."""
    with tempfile.TemporaryDirectory(prefix="hookwright-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


@pytest.mark.parametrize(
    ("file_mode", "folder_mode"), [(0o444, 0o555), (0o666, 0o555), (0o444, 0o777)], ids=["both", "folder", "file"]
)
async def test_what_may_not_be_written_is_refused_in_words_that_help_and_left_alone(
    folder: Path, file_mode: int, folder_mode: int
) -> None:
    path = folder / "hooks.db"
    async with Dispatcher(SQLiteStorage(path), transport=FakeTransport(), keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain(timeout=5)
    before = hashlib.sha256(path.read_bytes()).digest()
    for file in folder.iterdir():
        file.chmod(file_mode)
    folder.chmod(folder_mode)
    async with child("nobody", path) as process:
        refused = await process.hear("refused")
        assert refused.startswith("StorageError")
        assert "writable" in refused
        assert await process.hear("state") == "failed"
        assert await process.ended() == 0
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert integrity(path) == "ok"


async def test_a_file_that_cannot_be_written_for_a_while_is_told_and_used_again_once_it_can(tmp_path: Path) -> None:
    storage, transport = SQLiteStorage(tmp_path / "hooks.db"), FakeTransport()

    async def read_only(is_so: bool) -> None:
        assert storage._owner is not None
        await storage._owner.call(lambda database: database.execute(f"PRAGMA query_only = {int(is_so)}"))

    async with Dispatcher(storage, transport=transport, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("before")
        await dispatcher.drain(timeout=5)
        await read_only(True)
        with pytest.raises(StorageError, match="make the file and its folder writable"):
            await dispatcher.emit("during")
        health = await dispatcher.health()
        assert health.state == "degraded"
        assert any("read-only" in problem for problem in health.problems)
        await read_only(False)
        await dispatcher.emit("after")
        await dispatcher.drain(timeout=10)
        await until(lambda: _healthy(dispatcher))
        assert await dispatcher.deliveries.count() == 2
    assert len(transport.requests) == 2


async def _healthy(dispatcher: Dispatcher) -> bool:
    return (await dispatcher.health()).state == "healthy"
