"""Services: what runs in the background while a dispatcher does, from standing by to pruning."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from hookwright._clock import SECOND
from hookwright._errors import StorageClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta

    from hookwright._clock import Clock
    from hookwright._worker import Worker
    from hookwright.storage._base import Storage

_logger = logging.getLogger("hookwright")

_STANDBY_INTERVAL = 1.0
_RETENTION_INTERVAL = 3600.0
_WATCH_TIMEOUT = 3600.0


class Services:
    """Delivers once this process may, and then watches other processes, sweeps and prunes. `deliver=False`: nothing.

    `on_swept` is told that deliveries of stopped endpoints may have ended.
    """

    def __init__(
        self,
        storage: Storage,
        worker: Worker,
        *,
        clock: Clock,
        retention: timedelta | None,
        deliver: bool,
        on_swept: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._worker = worker
        self._clock = clock
        self._retention = retention
        self._deliver = deliver
        self._on_swept = on_swept
        self._sweep = asyncio.Event()
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self.delivering = False

    async def start(self) -> None:
        """Ask for the right to deliver, once, and begin. Raises StorageError, and has then not begun."""
        self.delivering = self._deliver and await self._storage.acquire()
        # One task owns the task group, so that starting and stopping may be called from different tasks.
        self._running = asyncio.get_running_loop().create_task(self._serve(), name="hookwright-services")

    async def stop(self, timeout: float) -> None:
        """Stop the worker, which has `timeout` seconds for what is in flight, and then everything else."""
        if self.delivering:
            await self._worker.stop(timeout)
        self.delivering = False
        self._stopping.set()
        assert self._running is not None
        await asyncio.wait({self._running})

    def endpoints_changed(self) -> None:
        """Sweep soon, and look for work: lanes may have opened, or their endpoints stopped."""
        self._sweep.set()
        self._worker.wake()

    async def _serve(self) -> None:
        async with anyio.create_task_group() as group:
            if self._deliver:
                group.start_soon(self._deliver_when_acquired)
            await self._stopping.wait()
            group.cancel_scope.cancel()

    async def _deliver_when_acquired(self) -> None:
        if not self.delivering:
            _logger.warning("another process delivers from %r: standing by, events are accepted", self._storage)
        while not self.delivering:
            await self._clock.sleep(_STANDBY_INTERVAL)
            self.delivering = await self._try_to_acquire()
        self._sweep.set()
        async with anyio.create_task_group() as group:
            group.start_soon(self._worker.run)
            group.start_soon(self._watch_other_processes)
            group.start_soon(self._sweep_when_asked)
            if self._retention is not None:
                group.start_soon(self._prune, self._retention)

    async def _try_to_acquire(self) -> bool:
        try:
            return await self._storage.acquire()
        except Exception:  # standing by goes on, whatever the storage says
            _logger.exception("could not ask the storage for the right to deliver")
            return False

    async def _watch_other_processes(self) -> None:
        while True:
            if await self._guarded(lambda: self._storage.wait(_WATCH_TIMEOUT)):
                self.endpoints_changed()

    async def _sweep_when_asked(self) -> None:
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            while await self._guarded(self._storage.sweep):
                self._on_swept()
            self._on_swept()

    async def _prune(self, retention: timedelta) -> None:
        while True:
            before = self._clock.now() - round(retention.total_seconds() * SECOND)
            while await self._guarded(partial(self._storage.prune, before)):
                pass
            await self._clock.sleep(_RETENTION_INTERVAL)

    async def _guarded(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Run a background operation; whatever it raises is logged, and it is asked for again a second later."""
        try:
            return await operation()
        except StorageClosed:
            await asyncio.Event().wait()
        except Exception:
            _logger.exception("a background operation failed and is repeated")
            await self._clock.sleep(_STANDBY_INTERVAL)
        return None
