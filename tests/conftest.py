"""What most tests share: where a dispatcher keeps its events, and the time it lives in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hookwright.testing import VirtualClock

if TYPE_CHECKING:
    from pathlib import Path

URL = "https://receiver.example/hooks"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=["memory", "sqlite"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'hooks.db'}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'hooks.db'}"
