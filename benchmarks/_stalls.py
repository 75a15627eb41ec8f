"""How late the loop is: a probe that asks to be called every 2 ms, and the same probe in a loop with nothing to do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

INTERVAL = 0.002


@dataclass
class Lateness:
    """How late each call of the probe was, in milliseconds."""

    values: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def p999(self) -> float:
        return sorted(self.values)[int(self.count * 0.999)] if self.values else 0.0

    @property
    def worst(self) -> float:
        return max(self.values, default=0.0)


@asynccontextmanager
async def stalls() -> AsyncIterator[Lateness]:
    """Probe the running loop."""
    found = Lateness()
    loop, late = asyncio.get_running_loop(), found.values.append
    due = loop.time() + INTERVAL
    timer: asyncio.TimerHandle

    def probe() -> None:
        nonlocal due, timer
        now = loop.time()
        late((now - due) * 1000)
        due = now + INTERVAL
        timer = loop.call_at(due, probe)

    timer = loop.call_at(due, probe)
    try:
        yield found
        await asyncio.sleep(0)
    finally:
        timer.cancel()
        # What made the loop late until now has not been seen by a probe that is still due.
        if loop.time() > due:
            late((loop.time() - due) * 1000)


@dataclass
class Watch:
    """What a benchmark's measured rounds did to the loop, and what an idle loop shows in the same process."""

    busy: Lateness = field(default_factory=Lateness)
    idle: Lateness = field(default_factory=Lateness)

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[Lateness]:
        """Probe the loop in which a dispatcher works."""
        async with stalls() as found:
            yield found
        self.busy.values += found.values

    async def control(self, seconds: float) -> Lateness:
        """Probe the loop while it does nothing."""
        async with stalls() as found:
            await asyncio.sleep(seconds)
        self.idle.values += found.values
        return found
