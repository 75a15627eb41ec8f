"""Receivers that count, in another process. `python -m benchmarks._counting PORTS` prints the ports as a JSON list.

Paths that begin with `/slow` are answered after 20 ms, others at once. Each line on standard input is answered by one:
`[count, first, last]`, the requests since the last `reset` and when (ns, the monotonic clock) the ends of them came.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from benchmarks._receiver import Answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DELAY = 0.02
"""Seconds after which a slow path is answered."""

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Counting(Answering):
    """Counts; see above."""

    seen: ClassVar[list[int]] = [0, 0, 0]

    def requested(self, path: str) -> None:
        now, seen = time.monotonic_ns(), self.seen
        seen[1] = seen[1] or now
        seen[0], seen[2] = seen[0] + 1, now
        if path.startswith("/slow"):
            asyncio.get_running_loop().call_later(DELAY, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)


async def main(ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Counting, "127.0.0.1", 0, backlog=1024) for _ in range(ports)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while command := await reader.readline():
        print(json.dumps(Counting.seen), flush=True)
        if command == b"reset\n":
            Counting.seen[:] = [0, 0, 0]


class Counter:
    """The other side of the pipe."""

    def __init__(self, process: asyncio.subprocess.Process, urls: list[str]) -> None:
        self._process = process
        self.urls = urls

    async def reset(self) -> None:
        """Count from 0."""
        await self._ask(b"reset\n")

    async def rate(self, count: int, seconds: float) -> float:
        """Wait for so many requests, for so long at most; return how many there were in a second, first to last."""
        async with asyncio.timeout(seconds):
            seen = await self._ask(b"seen\n")
            while seen[0] < count:
                await asyncio.sleep(0.05)
                seen = await self._ask(b"seen\n")
        assert seen[0] == count, f"{seen[0]} requests for {count} deliveries"
        return (count - 1) / (seen[2] - seen[1]) * 1e9

    async def _ask(self, command: bytes) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command)
        found: list[int] = json.loads(await self._process.stdout.readline())
        return found


@asynccontextmanager
async def counting(ports: int) -> AsyncIterator[Counter]:
    """Start the process, and end it."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "benchmarks._counting", str(ports))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    try:
        found = json.loads(await process.stdout.readline())
        yield Counter(process, [f"http://127.0.0.1:{port}/" for port in found])
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
