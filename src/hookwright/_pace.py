"""The pace at which attempts begin: as many in one turn of the loop as the host does not feel."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TURN = 0.005
"""Seconds that the beginnings of attempts may take in one turn of the loop."""

_LEARNING = 0.3
"""The weight of the latest measurement."""


class Pace:
    """How many attempts begin in one turn of the loop, at most `most`: the host's own callbacks wait for TURN at most.

    How long the beginning of one takes depends on the transport and the size of the data: it is measured.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._each = 0.0

    @property
    def at_once(self) -> int:
        """How many may begin together."""
        return self._most if self._each * self._most <= TURN else max(1, int(TURN / self._each))

    @contextmanager
    def measured(self, count: int) -> Iterator[None]:
        """Measure the first steps of `count` tasks that are created meanwhile."""
        loop = asyncio.get_running_loop()
        entered = begun = loop.time()

        def begin() -> None:
            nonlocal begun
            begun = loop.time()

        def end() -> None:
            self._each += ((here + loop.time() - begun) / count - self._each) * _LEARNING

        loop.call_soon(begin)
        yield
        here = loop.time() - entered  # a loop whose tasks begin at once ran them here
        loop.call_soon(end)
