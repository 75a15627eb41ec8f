"""What faults from outside share: child processes that are talked to in lines, and a lock that somebody holds."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[2]


class Child:
    """A process that runs one function of `tests.faults._child`, and says in lines how far it is."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.heard: list[str] = []

    @classmethod
    async def start(cls, scenario: str, *arguments: object, options: tuple[str, ...] = ()) -> Self:
        """Start the interpreter with `options`."""
        command = [sys.executable, *options, "-m", "tests.faults._child", scenario, *map(str, arguments)]
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, limit=2**20)
        )

    async def hear(self, begins: str, timeout: float = 20) -> str:
        """Return the rest of the first line from here on that begins so."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout):
            while line := (await self._process.stdout.readline()).decode():
                self.heard.append(line.rstrip())
                if line.startswith(begins):
                    return line.removeprefix(begins).strip()
        raise AssertionError(f"it ended before it said {begins!r}: {self.heard} {await self.errors()}")

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def ask(self, line: str) -> str:
        """Tell it to do something, and return what it answers in a line that begins with the same word."""
        self.tell(line)
        return await self.hear(line.split()[0])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def ended(self, timeout: float = 20) -> int:
        """Wait for its end, and return its exit code."""
        async with asyncio.timeout(timeout):
            return await self._process.wait()

    async def errors(self) -> str:
        """Return what it wrote to standard error, once it has ended."""
        assert self._process.stderr is not None
        return (await self._process.stderr.read()).decode()

    async def stop(self) -> None:
        """Kill it if it has not ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


@asynccontextmanager
async def child(scenario: str, *arguments: object, options: tuple[str, ...] = ()) -> AsyncIterator[Child]:
    """Start one, and leave none behind."""
    started = await Child.start(scenario, *arguments, options=options)
    try:
        yield started
    finally:
        await started.stop()


class Lock:
    """The write lock of a database, held by a plain connection, as by an application's own open transaction."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        """Give it up; harmless when repeated."""
        self._connection.close()


@contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Hold the lock until it is released, or until the end."""
    lock = Lock(path)
    try:
        yield lock
    finally:
        lock.release()


def integrity(path: Path) -> str:
    """Return what SQLite says of the file."""
    return str(look(path, "PRAGMA integrity_check")[0][0])


def look(path: Path, sql: str) -> list[tuple[object, ...]]:
    """Return the rows of a question to the file, past the dispatcher."""
    connection = sqlite3.connect(path, timeout=10)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def say(text: str) -> None:
    """Write a line at once: what is still in a buffer dies with the process."""
    os.write(sys.stdout.fileno(), text.encode() + b"\n")
