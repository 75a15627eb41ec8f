"""Names to addresses, in threads of our own.

Never the loop's default executor: a dozen slow look-ups fill it, and then the host application's own
`asyncio.to_thread` waits. Plain daemon threads: a ThreadPoolExecutor with one hung worker delays interpreter exit.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from typing import Protocol

_THREADS = 16


class Resolver(Protocol):
    """Returns the addresses of a host, in the order in which to try them. Raises OSError when there are none."""

    async def __call__(self, host: str, port: int) -> list[str]:
        """Resolve."""
        ...


class SystemResolver:
    """The system's resolver, in daemon threads; one look-up at a time for each name."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[str, int, asyncio.Future[list[str]]] | None] = queue.SimpleQueue()
        self._lookups: dict[tuple[str, int], asyncio.Future[list[str]]] = {}
        self._threads = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        """Resolve; whoever asks for the same name meanwhile shares the look-up."""
        key = (host, port)
        lookup = self._lookups.get(key)
        if lookup is None or lookup.get_loop() is not asyncio.get_running_loop():
            lookup = self._lookups[key] = asyncio.get_running_loop().create_future()
            lookup.add_done_callback(lambda done: self._forget(key, done))
            self._ensure_thread()
            self._jobs.put((host, port, lookup))
        # Shielded: one caller's deadline is not the others'.
        return await asyncio.shield(lookup)

    def close(self) -> None:
        """Let the threads end, once their look-ups have."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0

    def _forget(self, key: tuple[str, int], lookup: asyncio.Future[list[str]]) -> None:
        if not lookup.cancelled():
            lookup.exception()  # the one who asked may be gone
        if self._lookups.get(key) is lookup:
            del self._lookups[key]

    def _ensure_thread(self) -> None:
        if self._threads < _THREADS and len(self._lookups) > self._threads:
            self._threads += 1
            threading.Thread(target=self._work, name="hookwright-resolver", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            host, port, future = job
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                outcome: list[str] | OSError = list(dict.fromkeys(str(info[4][0]) for info in found))
            except (OSError, UnicodeError) as error:
                outcome = error if isinstance(error, OSError) else OSError(str(error))
            try:
                future.get_loop().call_soon_threadsafe(_finish, future, outcome)
            except RuntimeError:  # the loop is closed, nobody waits any more
                continue


def _finish(future: asyncio.Future[list[str]], outcome: list[str] | OSError) -> None:
    if future.done():
        return
    if isinstance(outcome, OSError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
