"""What most tests share: where a dispatcher keeps its events, and the time it lives in."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("hookwright.testing")

from hookwright.testing import VirtualClock  # noqa: E402  # what is rewritten must not have been read before
from tests.postgres.plugin import (  # noqa: E402, F401  # hooks and fixtures
    new_schema,
    postgres_database,
    postgres_dsn,
    postgres_schema,
    pytest_configure,
    pytest_configure_node,
    pytest_unconfigure,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

URL = "https://receiver.example/hooks"


def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: many tests wait for other processes, or for time to pass."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=["memory", "sqlite"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'hooks.db'}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'hooks.db'}"


async def until(condition: Callable[[], object] | Callable[[], Awaitable[object]], timeout: float = 10) -> None:
    """Wait for the thing itself, looking again and again."""
    async with asyncio.timeout(timeout):
        while True:
            met = condition()
            if asyncio.iscoroutine(met):
                met = await met
            if met:
                return
            await asyncio.sleep(0.001)  # not 0: a loop that spins keeps the interpreter's lock from SQLite's thread
