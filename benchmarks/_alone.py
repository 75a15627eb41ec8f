"""A dispatcher in a process of its own: what it takes of the memory is its own, and nobody else's objects slow it down.

`python -m benchmarks._alone DATABASE` starts, and then emits as many events as each line on its standard input says.
`python -m benchmarks._alone DATABASE WARM COUNT` delivers WARM deliveries, and then measures COUNT more.
Both print what they measured as JSON objects, one in a line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from benchmarks._many import resident
from benchmarks._stalls import stalls
from hookwright import DeliverySucceeded, Dispatcher, Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hookwright import Request

EMITTERS = 16
IDLE = 0.5
"""Seconds in which the loop does nothing, before the dispatcher is started."""

TYPE, TENANT = "video.ready", "acme"

Figures = dict[str, float]


class AtOnce:
    """A transport that answers at once, and keeps nothing."""

    async def send(self, request: Request) -> Response:
        """Answer."""
        return Response(200)

    async def aclose(self) -> None:
        """Do nothing."""


# -- in the process itself --------------------------------------------------------------------------------------


def _say(figures: Figures) -> None:
    print(json.dumps(figures), flush=True)


async def _started(dispatcher: Dispatcher) -> Figures:
    async with stalls() as idle:
        await asyncio.sleep(IDLE)
    begin = time.perf_counter()
    gc.collect()
    collector = (time.perf_counter() - begin) * 1000
    imports, begin = resident(), time.perf_counter()
    async with stalls() as seen:
        await dispatcher.start()
    took = (time.perf_counter() - begin) * 1000
    stalled = {"idle": idle.worst, "collector": collector, "stall": seen.worst}
    return {"imports": imports, "start": took, "started": resident(), **stalled}


async def _emit(dispatcher: Dispatcher, count: int) -> Figures:
    async def emitter() -> None:
        for _ in range(count // EMITTERS):
            await dispatcher.emit(TYPE, tenant=TENANT)

    cpu, begin = time.process_time(), time.perf_counter()
    await asyncio.gather(*(emitter() for _ in range(EMITTERS)))
    each = count / 1e6
    return {"cpu": (time.process_time() - cpu) / each, "wall": (time.perf_counter() - begin) / each}


async def _emitting(path: str) -> None:
    dispatcher = Dispatcher(f"sqlite:///{path}", transport=AtOnce(), deliver=False, keys=[])
    _say(await _started(dispatcher))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _say(await _emit(dispatcher, int(line)))
    await dispatcher.aclose()


async def _delivering(path: str, warm: int, count: int) -> None:
    dispatcher = Dispatcher(f"sqlite:///{path}", transport=AtOnce(), shutdown_timeout=1.0, keys=[])
    marks = {warm: asyncio.Event(), warm + count: asyncio.Event()}
    delivered = 0
    cpu: list[float] = []

    def note(_: DeliverySucceeded) -> None:
        nonlocal delivered
        delivered += 1
        if delivered in marks:
            cpu.append(time.process_time())
            marks[delivered].set()

    dispatcher.observe(note, DeliverySucceeded)
    figures = await _started(dispatcher)
    await marks[warm].wait()
    begin = time.perf_counter()
    await marks[warm + count].wait()
    figures["wall"] = (time.perf_counter() - begin) / count * 1e6
    figures["cpu"] = (cpu[1] - cpu[0]) / count * 1e6
    figures["memory"] = resident()
    await dispatcher.aclose()
    _say(figures)


# -- from outside -----------------------------------------------------------------------------------------------


class Alone:
    """A process that emits when it is asked to. `began` is what starting took."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.began: Figures = {}

    async def read(self) -> Figures:
        """Return the next figures."""
        assert self._process.stdout is not None
        found: Figures = json.loads(await self._process.stdout.readline())
        return found

    async def emit(self, count: int) -> Figures:
        """Emit, and return what an event took (us)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n".encode())
        return await self.read()


async def _process(*arguments: object) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "benchmarks._alone", *map(str, arguments))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


@asynccontextmanager
async def emitting(path: Path) -> AsyncIterator[Alone]:
    """Start a process that emits, and end it."""
    process = await _process(path)
    assert process.stdin is not None
    alone = Alone(process)
    try:
        alone.began = await alone.read()
        yield alone
    finally:
        process.stdin.close()
        await process.wait()


async def delivering(path: Path, warm: int, count: int) -> Figures:
    """Let a process deliver what waits there, and return its figures: `cpu` and `wall` in us a delivery."""
    process = await _process(path, warm, count)
    printed, _ = await process.communicate()
    found: Figures = json.loads(printed)
    return found


if __name__ == "__main__":
    if sys.argv[2:]:
        asyncio.run(_delivering(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        asyncio.run(_emitting(sys.argv[1]))
