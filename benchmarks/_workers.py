"""Processes that deliver from a database. `python -m benchmarks._workers KIND DSN IN_FLIGHT URL...`.

Each prints a line when it is ready, works from the first line on its standard input until the second, and prints the
CPU (seconds) that it took for that.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hookwright import DirectTransport, Dispatcher, NetworkPolicy
from hookwright.storage.postgres import PostgresStorage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    Run = Callable[[str, list[str], int, asyncio.Event, asyncio.Event], Coroutine[None, None, None]]

LIMIT = 150.0
"""Seconds after which a process ends, whatever it is told."""


# -- in the process itself --------------------------------------------------------------------------------------


async def run_hookwright(dsn: str, _: list[str], in_flight: int, go: asyncio.Event, stop: asyncio.Event) -> None:
    """Work between the two events."""
    dispatcher = Dispatcher(
        PostgresStorage(dsn),
        transport=DirectTransport(),
        network=NetworkPolicy.development(),
        keys=[],
        concurrency=in_flight,
    )
    await go.wait()
    async with dispatcher:
        await stop.wait()


def _kind(name: str) -> Run:
    if name == "hookwright":
        return run_hookwright
    # Only here: they take half a second to import.
    from benchmarks._rivals import run_pgqueuer, run_procrastinate

    return {"procrastinate": run_procrastinate, "pgqueuer": run_pgqueuer}[name]


async def main(kind: str, dsn: str, in_flight: int, urls: list[str]) -> None:
    go, stop = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(LIMIT):
        working = asyncio.create_task(_kind(kind)(dsn, urls, in_flight, go, stop))
        await asyncio.sleep(0.2)  # until it has connected
        print("ready", flush=True)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.readline()
        begin = time.process_time()
        go.set()
        await reader.readline()
        stop.set()
        await working
        print(json.dumps(time.process_time() - begin), flush=True)


# -- from outside -----------------------------------------------------------------------------------------------


class Worker:
    """A process that is told when to begin and when to end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def go(self) -> None:
        """Let it begin."""
        self._write()

    async def stop(self) -> float:
        """Let it end, and return its CPU in seconds."""
        assert self._process.stdout is not None
        self._write()
        async with asyncio.timeout(LIMIT):
            return float(await self._process.stdout.readline())

    def _write(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")


@asynccontextmanager
async def workers(
    kind: str, dsn: str, urls: list[str], *, in_flight: int, count: int = 1
) -> AsyncIterator[list[Worker]]:
    """Start so many, give them when all are ready, and end them."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "benchmarks._workers", kind, dsn, str(in_flight), *urls)
    started: list[asyncio.subprocess.Process] = []
    try:
        for _ in range(count):
            started.append(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))  # noqa: PERF401
        async with asyncio.timeout(LIMIT):
            for process in started:
                assert process.stdout is not None
                assert await process.stdout.readline() == b"ready\n"
        yield [Worker(process) for process in started]
    finally:
        for process in started:
            if process.returncode is None:
                process.terminate()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
