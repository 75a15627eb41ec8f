"""Receivers in a process of their own, which survive every kill. `python -m tests.crash.receiver LOG SEED`.

Prints its port. Every request is written to the log before it is answered: path, webhook-id, status, the time it was
read and the time its connection was made (CLOCK_MONOTONIC, which all processes share). Ends at the end of its standard
input, on which `pace N` scales all delays.

What a path ends in says how it is answered: `ok` 200; `flaky` 500 at an event's first request; `gone` 410; `poison`
never; anything else after 75 to 175 ms, and one time in ten with 500.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
_NEVER = 3600.0
_HEAD = re.compile(rb"POST (\S+) HTTP/1\.1\r\n", re.IGNORECASE)
_ID = re.compile(rb"\r\nwebhook-id: *(\S+)\r\n", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Request(NamedTuple):
    """One line of the log."""

    path: str
    event_id: str
    status: int
    at: float
    connected_at: float


# -- the process ------------------------------------------------------------------------------------------------


class _Answers:
    """Decides about answers, and writes the log."""

    def __init__(self, log: int, seed: int) -> None:
        self._log = log
        self._chance = random.Random(seed)
        self._seen: set[tuple[str, str]] = set()
        self.pace = 1.0

    def answer(self, path: str, event_id: str, connected_at: float) -> tuple[int, float]:
        """Log the request; return the status and the delay of its answer."""
        status, delay = self._decide(path, event_id)
        line = f"{path} {event_id} {status} {time.monotonic():.6f} {connected_at:.6f}\n"
        os.write(self._log, line.encode())
        return status, delay * self.pace

    def _decide(self, path: str, event_id: str) -> tuple[int, float]:
        kind = path.rsplit("/", 1)[-1]
        if kind == "ok":
            return 200, 0.0
        if kind == "gone":
            return 410, 0.0
        if kind == "poison":
            return 200, _NEVER
        if kind == "flaky":
            first = (path, event_id) not in self._seen
            self._seen.add((path, event_id))
            return 500 if first else 200, 0.0
        return 500 if self._chance.random() < 0.1 else 200, self._chance.uniform(0.075, 0.175)


class _Connection(asyncio.Protocol):
    """Reads one request at a time."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._buffer = b""
        self._connected_at = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end == -1:
            return
        head = self._buffer[: end + 2]
        path, event_id, length = _HEAD.match(head), _ID.search(head), _LENGTH.search(head)
        assert path is not None
        assert event_id is not None
        assert length is not None
        if len(self._buffer) < end + 4 + int(length[1]):
            return
        self._buffer = b""
        status, delay = self._answers.answer(path[1].decode(), event_id[1].decode(), self._connected_at)
        asyncio.get_running_loop().call_later(delay, self._write, status)

    def _write(self, status: int) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 %d -\r\ncontent-length: 0\r\n\r\n" % status)


async def _serve(log: Path, seed: int) -> None:
    loop = asyncio.get_running_loop()
    answers = _Answers(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), seed)
    server = await loop.create_server(lambda: _Connection(answers), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        answers.pace = float(line.split()[1])


# -- the other side of the pipe -----------------------------------------------------------------------------------


class Receiver:
    """Reads what the process has logged."""

    def __init__(self, port: int, commands: IO[bytes], log: Path) -> None:
        self.port = port
        self._commands = commands
        self._log = log.open("rb")
        self._rest = b""

    def pace(self, factor: float) -> None:
        """Scale all delays from now on."""
        self._commands.write(b"pace %f\n" % factor)
        self._commands.flush()

    def read(self) -> list[Request]:
        """Return what was logged since the last call."""
        *lines, self._rest = (self._rest + self._log.read()).split(b"\n")
        found = (line.decode().split(" ") for line in lines)
        return [Request(path, id, int(status), float(at), float(made)) for path, id, status, at, made in found]

    def close(self) -> None:
        self._log.close()


@contextmanager
def receiving(log: Path, seed: int) -> Iterator[Receiver]:
    """Start the process, and end it."""
    command = (sys.executable, "-m", "tests.crash.receiver", str(log), str(seed))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        receiver = Receiver(int(process.stdout.readline()), process.stdin, log)
        try:
            yield receiver
        finally:
            receiver.close()
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
