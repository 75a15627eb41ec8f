"""Applications that end without `aclose`: the interpreter's exit waits for nothing, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from hookwright import Dispatcher
from hookwright.testing import FakeTransport, Inbox
from tests.faults.processes import child, integrity, locked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hookwright.testing import Received

ENDINGS = {"returns": 0, "closed_loop": 0, "sys_exit": 3, "raises": 1}
LIMIT = 2.0
BUSY_WAIT = 0.25


@pytest.mark.parametrize("options", [(), ("-X", "dev", "-W", "error")], ids=["plain", "dev"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_forgotten_aclose_ends_within_two_seconds_and_the_next_process_delivers(
    ending: str, options: tuple[str, ...], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "hooks.db"
    async with Inbox() as inbox, child("forgets", path, inbox.url, ending, options=options) as process:
        inbox.respond_with(hang)
        assert await process.hear("in flight, health") == "healthy"
        ends = time.monotonic()
        assert await process.ended() == ENDINGS[ending]
        took = time.monotonic() - ends
    record_property(f"no aclose, {ending}: ended after", took)
    assert took < LIMIT
    assert await delivered_by_the_next(path) == {"evt_1": 1, "evt_2": 1}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_forgotten_aclose_while_somebody_holds_the_lock_ends_as_soon_as_sqlite_lets_go(
    ending: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "hooks.db"
    async with Inbox() as inbox, child("forgets", path, inbox.url, ending, "locked") as process:
        inbox.respond_with(hang)
        await process.hear("in flight")
        with locked(path):
            process.tell("locked")
            await process.hear("waiting")
            ends = time.monotonic()
            assert await process.ended() == ENDINGS[ending]
            took = time.monotonic() - ends
    record_property(f"no aclose, locked, {ending}: ended after", took)
    assert took < LIMIT + BUSY_WAIT
    assert await delivered_by_the_next(path) == {"evt_1": 1, "evt_2": 1}


async def hang(received: Received) -> int:
    await asyncio.Event().wait()
    return 200


async def delivered_by_the_next(path: Path) -> dict[str | None, int]:
    transport = FakeTransport()
    async with Dispatcher(f"sqlite:///{path}", transport=transport, keys=[]) as dispatcher:
        await dispatcher.drain(timeout=10)
        health = await dispatcher.health()
        assert (health.state, health.pending, health.leased) == ("healthy", 0, 0)
    assert integrity(path) == "ok"
    ids = [dict(request.headers)["webhook-id"] for request in transport.requests]
    return {id: ids.count(id) for id in ids}
