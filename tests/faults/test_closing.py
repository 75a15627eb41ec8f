"""`aclose` ends in time, whatever hangs, and loses nothing."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.faults.closing import LIMIT, close_often

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("seed", range(3))
async def test_closing_takes_less_than_a_second_beyond_its_timeout_whatever_hangs(
    seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    figures = await close_often(tmp_path, 10, Random(seed), lambda text: None)
    record_property("aclose, slowest of 10", figures.seconds[-1])
    assert not figures.broken
    assert not figures.unheard
    assert not figures.late, f"more than {LIMIT:g} s"
