"""VirtualClock: time that moves only when told to."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from hookwright._clock import SECOND, Clock, from_datetime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_START = datetime(2026, 1, 1, tzinfo=UTC)
_ROUNDS = 25
"""Turns of the loop that are given to whatever a timer woke, when there is no `settle` to say that it has ended."""


class _Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        if self.callback is not None:
            self.callback()


class VirtualClock(Clock):
    """A clock for tests: a retry schedule of days runs in milliseconds, and the same every time.

    It starts at `start` (default 2026-01-01 UTC) and stands still until `advance`.

    ```python
    from datetime import timedelta
    from hookwright import Dispatcher
    from hookwright.testing import FakeTransport, VirtualClock

    clock, transport = VirtualClock(), FakeTransport(503)
    async with Dispatcher("memory:", clock=clock, transport=transport) as dispatcher:
        await dispatcher.endpoints.create("https://example.com/hooks", events=["*"])
        await dispatcher.emit("ping", {})
        await clock.advance(timedelta(hours=80), settle=dispatcher.drain)
        print(len(transport.requests))
    ```
    """

    def __init__(self, start: datetime = _START) -> None:
        self._now = self._wall = from_datetime(start)
        self._timers: list[tuple[int, int, _Timer]] = []
        self._order = itertools.count()

    def now(self) -> int:
        """Virtual steady time."""
        return self._now

    def wall(self) -> int:
        """Virtual wall time in microseconds UTC; a Verifier wants seconds: `now=lambda: clock.wall() / 1e6`."""
        return self._wall

    def set_wall(self, moment: datetime) -> None:
        """Set the wall clock, as an administrator would: steady time and timers do not notice."""
        self._wall = from_datetime(moment)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Timer:
        """Call `callback` when `advance` comes past `seconds` from now."""
        timer = _Timer(callback)
        if seconds <= 0:
            asyncio.get_running_loop().call_soon(timer.fire)
            return timer
        heapq.heappush(self._timers, (self._now + round(seconds * SECOND), next(self._order), timer))
        return timer

    async def advance(self, by: float | timedelta, *, settle: Callable[[], Awaitable[object]] | None = None) -> None:
        """Move on by seconds or a timedelta, through every timer on the way, in order.

        Before the first step and after each, `settle` is awaited, so that what a timer woke has ended before time goes
        on: pass `dispatcher.drain`. Without one, the loop gets a few turns.
        """
        seconds = by.total_seconds() if isinstance(by, timedelta) else by
        target = self._now + round(seconds * SECOND)
        await self._settle(settle)
        while self._timers and self._timers[0][0] <= target:
            due = self._timers[0][0]
            self._move_to(max(due, self._now))
            while self._timers and self._timers[0][0] <= self._now:
                timer = heapq.heappop(self._timers)[2]
                timer.fire()
            await self._settle(settle)
        self._move_to(target)
        await self._settle(settle)

    def _move_to(self, now: int) -> None:
        self._wall += now - self._now
        self._now = now

    async def _settle(self, settle: Callable[[], Awaitable[object]] | None) -> None:
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
        if settle is not None:
            await settle()
