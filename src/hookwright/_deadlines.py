"""The backstop behind a transport's own timeout: one timer for all that is in flight, not a context for each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")

OVERTIME = 1.0
"""Seconds after its timeout at which a transport that broke its promise is stopped, at the next look."""

_LOOK = 1.0
"""Seconds between looks."""


class Deadlines:
    """Cancels what runs longer than it promised, 1 to 2 s after that. In real time, whatever the clock."""

    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[object], float] = {}
        self._expired: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def keep(self, promise: Awaitable[T], timeout: float) -> T:
        """Await it in the current task. Raises TimeoutError when it was stopped."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._ends[task] = loop.time() + timeout + OVERTIME
        if self._timer is None:
            self._timer = loop.call_later(_LOOK, self._look)
        try:
            return await promise
        except asyncio.CancelledError:
            # Ours, unless somebody else cancelled the task as well: that one counts.
            if task in self._expired and task.cancelling() <= 1:
                raise TimeoutError from None
            raise
        finally:
            del self._ends[task]
            if task in self._expired:
                self._expired.discard(task)
                task.uncancel()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LOOK, self._look) if self._ends else None
        for task, end in self._ends.items():
            if end <= loop.time() and task not in self._expired:
                self._expired.add(task)
                task.cancel()
