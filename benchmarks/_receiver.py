"""Receivers in another process. `python -m benchmarks._receiver ANSWERING HANGING RETURNING [CERTIFICATE]`.

Prints the ports, a JSON list for each kind. Returning ones hang until they are told that they are up. Bodies with
`"sent":MICROSECONDS` on answering ports are clocked. Each line on standard input is answered by one: `delays` by those
(ms) since the last time, `up` by null, `rooms` by how many requests the endpoints on returning ports had at once,
`arrivals` by when (ns, the monotonic clock) the first byte of each event came to paths that begin with `/clocked`.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_SENT = re.compile(rb'"sent":(\d+)')
_ID = re.compile(rb"\r\n[Ww]ebhook-[Ii]d: ([^\r]+)")
_LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_FAILURE = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"


PAUSE = 0.01
"""Seconds before a returning receiver answers, so that what it is sent at once can be counted."""

ROOMS = 8
"""Of so many first answers a returning receiver keeps what was in flight before each."""


class Answering(asyncio.Protocol):
    """Answers 500 to paths that begin with `/fail` and 200 to all others, and looks at no more than it must."""

    delays: ClassVar[list[float]] = []
    arrivals: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        self._buffer = b""
        self._begun = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self._begun = time.monotonic_ns()
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        while head != -1:
            length = _LENGTH.search(self._buffer, 0, head)
            end = head + 4 + int(length[1] if length else 0)
            if len(self._buffer) < end:
                return
            sent = _SENT.search(self._buffer, head, end)
            if sent:
                type(self).delays.append(time.time() * 1000 - int(sent[1]) / 1000)
            path = self._buffer[: self._buffer.find(b"\r\n")].split(b" ")[1]
            id = _ID.search(self._buffer, 0, head) if path.startswith(b"/clocked") else None
            if id:
                self.arrivals[id[1].decode()] = self._begun
            self._buffer = self._buffer[end:]
            self.requested(path.decode())
            head = self._buffer.find(b"\r\n\r\n")

    def requested(self, path: str) -> None:
        self._transport.write(_FAILURE if path.startswith("/fail") else _ANSWER)


class Returning(Answering):
    """Hangs until it is up; then answers after a while, and counts what each path has in flight meanwhile."""

    up: ClassVar[bool] = False
    in_flight: ClassVar[Counter[str]] = Counter()
    answered: ClassVar[Counter[str]] = Counter()
    rooms: ClassVar[dict[str, list[int]]] = {}

    def requested(self, path: str) -> None:
        if not self.up:
            return
        self.in_flight[path] += 1
        rooms = self.rooms.setdefault(path, [0] * (ROOMS + 1))
        place = min(ROOMS, self.answered[path])
        rooms[place] = max(rooms[place], self.in_flight[path])
        asyncio.get_running_loop().call_later(PAUSE, self._answer, path)

    def _answer(self, path: str) -> None:
        self.in_flight[path] -= 1
        self.answered[path] += 1
        self._transport.write(_ANSWER)


def _told(command: bytes) -> object:
    if command == b"up\n":
        Returning.up = True
        return None
    if command == b"rooms\n":
        return list(Returning.rooms.values())
    if command == b"arrivals\n":
        arrivals, Answering.arrivals = Answering.arrivals, {}
        return arrivals
    delays, Answering.delays = Answering.delays, []
    return delays


async def main(answering: int, hanging: int, returning: int, certificate: str = "") -> None:
    loop = asyncio.get_running_loop()
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    servers = [await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024, ssl=tls) for _ in range(answering)]
    mute = [await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, backlog=1024) for _ in range(hanging)]
    back = [await loop.create_server(Returning, "127.0.0.1", 0, backlog=1024) for _ in range(returning)]
    for kind in (servers, mute, back):
        print(json.dumps([server.sockets[0].getsockname()[1] for server in kind]), flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while command := await reader.readline():
        print(json.dumps(_told(command)), flush=True)


class Receivers:
    """The other side of the pipe."""

    def __init__(
        self, process: asyncio.subprocess.Process, answering: list[str], hanging: list[str], returning: list[str]
    ) -> None:
        self._process = process
        self.answering = answering
        self.hanging = hanging
        self.returning = returning

    async def delays(self) -> list[float]:
        """Return the delays in milliseconds since the last call."""
        found: list[float] = await self._ask(b"delays\n")
        return found

    async def arrivals(self) -> dict[str, int]:
        """Return when the first byte of each event's request came, of those since the last call."""
        found: dict[str, int] = await self._ask(b"arrivals\n")
        return found

    async def come_back(self) -> None:
        """Let the returning ones answer from now on."""
        await self._ask(b"up\n")

    async def rooms(self) -> list[list[int]]:
        """Return, for each returning endpoint, the most it had in flight before its first answer, its second, ..."""
        found: list[list[int]] = await self._ask(b"rooms\n")
        return found

    async def _ask(self, command: bytes) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command)
        return json.loads(await self._process.stdout.readline())


@asynccontextmanager
async def receivers(
    answering: int, hanging: int = 0, returning: int = 0, *, certificate: Path | None = None
) -> AsyncIterator[Receivers]:
    """Start the process, and end it."""
    pipe = asyncio.subprocess.PIPE
    further = () if certificate is None else (str(certificate),)
    counts = (str(answering), str(hanging), str(returning))
    command = (sys.executable, "-m", "benchmarks._receiver", *counts, *further)
    scheme = "http" if certificate is None else "https"
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**26)
    assert process.stdout is not None
    try:
        ports = [json.loads(await process.stdout.readline()) for _ in range(3)]
        yield Receivers(process, *([f"{scheme}://127.0.0.1:{port}/" for port in kind] for kind in ports))
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
