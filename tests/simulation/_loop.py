"""An event loop without a world outside: its time stands still while anything can run, and then jumps to what is next.

So shutdowns and deadlines that count real time take none, and the same seed runs the same turns.
"""

from __future__ import annotations

import asyncio
import selectors
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

JUMPS_MOST = 20_000
"""Jumps of the idle loop between two looks of the scheduler; more of them mean that nothing will ever come."""

TURNS_MOST = 20_000
"""Turns after which whatever still runs will never end."""

owner: ContextVar[int] = ContextVar("owner", default=0)
"""The number of the process on whose behalf the current task runs; 0 is the world itself."""


class StandstillError(RuntimeError):
    """The loop waits for something that cannot come."""


class _NoSelector(selectors.SelectSelector):
    """Knows no file, and instead of waiting moves the time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.jumps = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or self.jumps > JUMPS_MOST:
            raise StandstillError("everything waits, and for nothing")
        if timeout > 0:
            self.jumps += 1
            self.time += timeout
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Time is a number; tasks are remembered in the order of their making, each with its owner."""

    def __init__(self) -> None:
        self._virtual = _NoSelector()
        super().__init__(self._virtual)
        self._owned: list[tuple[int, asyncio.Task[Any]]] = []
        self.set_task_factory(self._make)

    def time(self) -> float:
        return self._virtual.time

    @property
    def idle(self) -> bool:
        """Whether nothing else can run, now that the caller does."""
        return not self._ready  # type: ignore[attr-defined]  # a deque, in every version of BaseEventLoop

    def skip(self, seconds: float) -> None:
        """Let so much time pass at once; the world is awake, so what was idle before counts no more."""
        self._virtual.time += seconds
        self._virtual.jumps = 0

    def _make(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        if len(self._owned) > 400:
            self._owned = [(number, other) for number, other in self._owned if not other.done()]
        context = options.get("context")
        self._owned.append((owner.get() if context is None else context.get(owner, 0), task))
        return task

    def tasks_of(self, number: int) -> list[asyncio.Task[Any]]:
        """Return the tasks of a process that have not ended, oldest first."""
        return [task for other, task in self._owned if other == number and not task.done()]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on a loop of its own."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main)


def simulated() -> SimulatedLoop:
    """Return the running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    return loop


async def turns(count: int) -> None:
    """Give the loop so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def turns_until_idle(most: int = TURNS_MOST) -> None:
    """Give the loop turns for as long as anything can run, at most so many. Raises StandstillError after TURNS_MOST."""
    loop = simulated()
    for _ in range(most):
        await asyncio.sleep(0)
        if loop.idle:
            return
    if most == TURNS_MOST:
        raise StandstillError("something runs and runs, and no time passes")
