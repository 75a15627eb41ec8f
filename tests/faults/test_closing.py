"""`aclose` ends in time, whatever hangs, and loses nothing."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.faults.closing import close_often

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The promised second is measured by `python -m tests.faults --closing 1000`, on a quiet machine; here, that it ends.
PATIENCE = 5.0


@pytest.mark.parametrize("seed", range(3))
async def test_closing_ends_and_loses_nothing_whatever_hangs(
    seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    figures = await close_often(tmp_path, 10, Random(seed), lambda text: None)
    record_property("aclose, slowest of 10", figures.seconds[-1])
    assert not figures.broken
    assert not figures.unheard
    assert figures.seconds[-1] < PATIENCE
