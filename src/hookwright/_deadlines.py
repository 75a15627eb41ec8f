"""The backstop behind a transport's own timeout: one timer for all that is in flight, not a context for each."""

from __future__ import annotations

import asyncio

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

    def begin(self, timeout: float) -> asyncio.Task[object]:
        """Watch the current task until `end`, which must be called whatever happens, and return it."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._ends[task] = loop.time() + timeout + OVERTIME
        if self._timer is None:
            self._timer = loop.call_later(_LOOK, self._look)
        return task

    def has_stopped(self, task: asyncio.Task[object]) -> bool:
        """Whether it is we who cancelled a task, and nobody else did as well: that would count. Ask before `end`."""
        return task in self._expired and task.cancelling() <= 1

    def end(self, task: asyncio.Task[object]) -> None:
        """Watch it no longer; a cancellation of ours is over."""
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
