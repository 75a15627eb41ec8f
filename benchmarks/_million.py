"""A dispatcher in a process of its own, on a database in which a million deliveries wait.

`python -m benchmarks._million DATABASE URL SECONDS` prints what it measured as one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks._fleet import p99
from hookwright import DeliverySucceeded, Dispatcher, NetworkPolicy, SQLiteStorage
from hookwright.storage.sqlite import _claim

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hookwright._models import Claim
    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.sqlite._owner import Database

    T = TypeVar("T")

INSIDE: list[float] = []
"""Milliseconds of each claim in its transaction."""

CPU: list[float] = []
"""The same, as what the thread was computing: without what it waited for the interpreter and the disk."""


def _clocked(database: Database, request: ClaimRequest, now: int) -> Claim:
    begin, cpu = time.perf_counter(), time.thread_time()
    claim = _claim_itself(database, request, now)
    INSIDE.append((time.perf_counter() - begin) * 1000)
    CPU.append((time.thread_time() - cpu) * 1000)
    return claim


_claim_itself, _claim.claim = _claim.claim, _clocked


class Clocked(SQLiteStorage):
    """Keeps the milliseconds of each claim, from asking to having it on disk."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.claims: list[float] = []

    async def claim(self, request: ClaimRequest) -> Claim:
        begin = time.perf_counter()
        claim = await super().claim(request)
        self.claims.append((time.perf_counter() - begin) * 1000)
        return claim


def _memory() -> float:
    """Return the most this process has had in memory so far (MB)."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss begins with what the parent had
        return int(status.read_text("ascii").partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


async def _took(ask: Callable[[], Awaitable[object]]) -> float:
    begin = time.perf_counter()
    await ask()
    return (time.perf_counter() - begin) * 1000


class _Reached:
    """Emits, and waits until the answer is written."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._arrived: dict[str, asyncio.Event] = {}
        dispatcher.observe(self._note, DeliverySucceeded)

    def _note(self, seen: DeliverySucceeded) -> None:
        if seen.event_id in self._arrived:
            self._arrived[seen.event_id].set()

    async def reach(self, type: str, timeout: float) -> float:
        """Return the milliseconds from emit to the written answer; what was not there in time counts as `timeout`."""
        begin = time.perf_counter()
        id = f"evt_{type}_{time.time_ns()}"
        arrived = self._arrived[id] = asyncio.Event()
        await self._dispatcher.emit(type, event_id=id)
        try:
            await asyncio.wait_for(arrived.wait(), timeout)
        except TimeoutError:
            return timeout * 1000
        return (time.perf_counter() - begin) * 1000


async def main(path: str, url: str, seconds: float) -> dict[str, Any]:
    storage = Clocked(path)
    dispatcher = Dispatcher(storage, network=NetworkPolicy.development(), shutdown_timeout=0.2, keys=[])
    before = _memory()
    reached = _Reached(dispatcher)
    start = await _took(dispatcher.start)
    started = _memory()
    first = await reached.reach("idle", seconds)
    await dispatcher.endpoints.create(url, events=["new"])
    new = asyncio.create_task(reached.reach("new", seconds))
    begin, later, health, pages = time.perf_counter(), [], [], []
    while time.perf_counter() < begin + seconds:
        later.append(await reached.reach("idle", seconds))
        health.append(await _took(dispatcher.health))
        pages.append(await _took(dispatcher.deliveries.list))
        await asyncio.sleep(0.1)
    found = {
        "start": start,
        "memory before": before,
        "memory after start": started,
        "memory after running": _memory(),
        "claim inside median": sorted(INSIDE)[len(INSIDE) // 2],
        "claim inside p99": p99(INSIDE),
        "claim inside p99, CPU": p99(CPU),
        "claim p99": p99(storage.claims),
        "idle endpoint, after start": first,
        "idle endpoint, later, p99": p99(later),
        "new endpoint": await new,
        "health p99": p99(health),
        "first page p99": p99(pages),
    }
    await dispatcher.aclose()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
