"""Somebody else holds the database's write lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright.storage.sqlite import _owner
from tests.faults.locks import hold, well

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


async def test_a_lock_that_is_held_for_a_second_is_waited_for(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    held = await hold(tmp_path / "hooks.db", 1.0)
    record_property("lock held 1 s: emit answered after", held.answered_after)
    record_property("lock held 1 s: deliveries on after", held.delivered_after)
    assert held.answer == "stored"
    assert held.answered_after >= 1.0
    assert well(held), held


async def test_a_lock_that_is_held_for_six_times_the_limit_is_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setattr(_owner, "BUSY_LIMIT", 0.5)  # 30 s for the real one: `python -m tests.faults --locks`
    held = await hold(tmp_path / "hooks.db", 3.0)
    record_property("lock held for 6 limits: emit answered after", held.answered_after)
    record_property("lock held for 6 limits: deliveries on after", held.delivered_after)
    assert held.answer == "StorageBusy"
    assert held.state_while == "degraded"
    assert any("an event could not be stored: StorageBusy" in problem for problem in held.problems)
    assert well(held), held
