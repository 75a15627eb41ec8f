"""kill -9 at random moments: nothing acknowledged is lost, and no more is repeated than was in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.crash._cycle import run

if TYPE_CHECKING:
    from pathlib import Path


async def test_twenty_kills_lose_nothing_and_repeat_at_most_what_was_in_flight(tmp_path: Path) -> None:
    progress: list[str] = []
    report = await run(tmp_path, kills=20, seed=7, progress=progress.append)
    assert report.kills == 20
    assert report.acknowledged
    assert report.good, report
    assert len(progress) == 2
