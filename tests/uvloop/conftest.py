"""Everything in this folder runs on uvloop, and must not make that complain."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import uvloop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a protocol raises, and what a task raised that nobody awaits, is only logged."""
    yield
    records = caplog.get_records("call")
    assert [one.getMessage() for one in records if one.name == "asyncio" and one.levelno >= logging.ERROR] == []
