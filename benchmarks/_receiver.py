"""Receivers in another process, answering or hanging. `python -m benchmarks._receiver ANSWERING HANGING [CERTIFICATE]`.

Prints the ports, a JSON list for each kind. Bodies with `"sent":MICROSECONDS` on answering ports are clocked: when
standard input gets a line, the delays (ms) since the last such line are printed as a JSON list.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_SENT = re.compile(rb'"sent":(\d+)')
_LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Answering(asyncio.Protocol):
    """Answers 200 to everything, and looks at no more than it must."""

    delays: list[float]

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
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
            self._buffer = self._buffer[end:]
            self._transport.write(_ANSWER)
            head = self._buffer.find(b"\r\n\r\n")


async def main(answering: int, hanging: int, certificate: str = "") -> None:
    loop = asyncio.get_running_loop()
    Answering.delays = []
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    servers = [await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024, ssl=tls) for _ in range(answering)]
    mute = [await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, backlog=1024) for _ in range(hanging)]
    for kind in (servers, mute):
        print(json.dumps([server.sockets[0].getsockname()[1] for server in kind]), flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        print(json.dumps(Answering.delays), flush=True)
        Answering.delays = []


class Receivers:
    """The other side of the pipe."""

    def __init__(self, process: asyncio.subprocess.Process, answering: list[str], hanging: list[str]) -> None:
        self._process = process
        self.answering = answering
        self.hanging = hanging

    async def delays(self) -> list[float]:
        """Return the delays in milliseconds since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        found: list[float] = json.loads(await self._process.stdout.readline())
        return found


@asynccontextmanager
async def receivers(answering: int, hanging: int = 0, certificate: Path | None = None) -> AsyncIterator[Receivers]:
    """Start the process, and end it."""
    pipe = asyncio.subprocess.PIPE
    further = () if certificate is None else (str(certificate),)
    command = (sys.executable, "-m", "benchmarks._receiver", str(answering), str(hanging), *further)
    scheme = "http" if certificate is None else "https"
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**26)
    assert process.stdout is not None
    try:
        ports = [json.loads(await process.stdout.readline()) for _ in range(2)]
        yield Receivers(process, *([f"{scheme}://127.0.0.1:{port}/" for port in kind] for kind in ports))
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
