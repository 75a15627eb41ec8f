"""Services: what runs in the background while a dispatcher does, from standing by to pruning."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from hookwright._clock import SECOND
from hookwright._conditions import Conditions, log
from hookwright._errors import StorageClosed
from hookwright._observe import WorkerFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta

    from hookwright._clock import Clock
    from hookwright._observe import ObserverHub
    from hookwright._worker import Worker
    from hookwright.storage._base import Storage

_logger = logging.getLogger("hookwright")

DEATHS = 5
"""A service that dies so often within a minute makes the dispatcher `failed`; it is then begun once a minute."""

_MINUTE = 60.0
_BEGIN_AGAIN = 1.0
_AGAIN_MOST = 30.0
_STANDBY_INTERVAL = 1.0
_RETENTION_INTERVAL = 3600.0
_WATCH_TIMEOUT = 3600.0
_HINT_PAUSE = 0.2


class Services:
    """Delivers once this process may, and then watches other processes, sweeps and prunes. `deliver=False`: nothing.

    Each service that dies of a defect is begun again, and its death is told. `on_swept` is told that deliveries of
    stopped endpoints may have ended.
    """

    def __init__(
        self,
        storage: Storage,
        worker: Worker,
        *,
        clock: Clock,
        observers: ObserverHub,
        conditions: Conditions,
        retention: timedelta | None,
        deliver: bool,
        on_swept: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._worker = worker
        self._clock = clock
        self._observers = observers
        self._conditions = conditions
        self._retention = retention
        self._deliver = deliver
        self._on_swept = on_swept
        self._sweep = asyncio.Event()
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._delivering = False

    @property
    def delivering(self) -> bool:
        """Whether this process delivers."""
        return self._delivering

    async def start(self) -> None:
        """Ask for the right to deliver, once, and begin. Raises StorageError, and has then not begun."""
        self._delivering = self._deliver and await self._storage.acquire()
        # One task owns the task group, so that starting and stopping may be called from different tasks.
        self._running = asyncio.get_running_loop().create_task(self._serve(), name="hookwright-services")
        self._running.add_done_callback(self._note_end)

    async def stop(self, timeout: float) -> None:
        """Stop the worker, which has `timeout` seconds for what is in flight, and then everything else."""
        await self._worker.stop(timeout)
        self._delivering = False
        self._stopping.set()
        assert self._running is not None
        await asyncio.wait({self._running})

    def _note_end(self, running: asyncio.Task[None]) -> None:
        if self._stopping.is_set():
            return
        # Whoever cancels all tasks of a loop means ours, too. They do not fight back, but they say so.
        self._delivering = False
        self._conditions.trouble("services", "the background tasks have ended: create a new dispatcher", fatal=True)
        if not running.cancelled() and running.exception() is not None:
            _logger.error("the background tasks ended", exc_info=running.exception())

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
        if not self._delivering:
            _logger.warning("another process delivers from %r: standing by, events are accepted", self._storage)
        while not self._delivering:
            await self._clock.sleep(_STANDBY_INTERVAL)
            self._delivering = await self._try_to_acquire()
        self._sweep.set()
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_running, "delivering", self._worker.run)
            group.start_soon(self._keep_running, "watching other processes", self._watch_other_processes)
            group.start_soon(self._keep_running, "sweeping", self._sweep_when_asked)
            if self._retention is not None:
                group.start_soon(self._keep_running, "pruning", partial(self._prune, self._retention))

    async def _keep_running(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a service, and begin it again whenever it dies of a defect, in it or in what it calls."""
        deaths: deque[int] = deque(maxlen=DEATHS)

        def well() -> None:
            deaths.clear()
            self._conditions.over(name)

        too_often = False
        while True:
            alive = self._clock.call_later(_MINUTE, well)
            try:
                return await run()
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                    raise
                deaths.append(self._clock.now())
                in_a_minute = len(deaths) == DEATHS and deaths[-1] - deaths[0] < _MINUTE * SECOND
                too_often = in_a_minute or (too_often and len(deaths) > 1)  # until it has lived for a minute
                delay = _MINUTE if too_often else _BEGIN_AGAIN
                _logger.exception("%s died, and is begun again in %g s", name, delay)
                self._conditions.trouble(name, f"{name} died and is begun again", error, fatal=too_often)
                self._observers.report(WorkerFailed(error=f"{name}: {type(error).__name__}: {error}", retry_in=delay))
            finally:
                alive.cancel()
            await self._clock.sleep(delay)

    async def _try_to_acquire(self) -> bool:
        try:
            acquired = await self._storage.acquire()
        except Exception as error:  # noqa: BLE001  # standing by goes on, whatever the storage says
            self._conditions.trouble("acquire", "the right to deliver cannot be asked for", error)
            log("could not ask the storage for the right to deliver", error)
            return False
        self._conditions.over("acquire")
        return acquired

    async def _watch_other_processes(self) -> None:
        while True:
            if await self._guarded("watch", lambda: self._storage.wait(_WATCH_TIMEOUT)):
                self.endpoints_changed()
                if self._worker.is_failing:  # the storage may be well again
                    await self._clock.sleep(_HINT_PAUSE)
                    self._worker.look_now()

    async def _sweep_when_asked(self) -> None:
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            while await self._guarded("sweep", self._storage.sweep):
                self._on_swept()
            self._on_swept()

    async def _prune(self, retention: timedelta) -> None:
        while True:
            while await self._guarded("prune", lambda: self._storage.prune(self._before(retention))):
                pass
            await self._clock.sleep(_RETENTION_INTERVAL)

    def _before(self, retention: timedelta) -> int:
        return self._clock.now() - round(retention.total_seconds() * SECOND)

    async def _guarded(self, verb: str, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Run a verb of the storage until it does not fail; failures are told, once for each time it begins to fail."""
        delay = _BEGIN_AGAIN
        while True:
            try:
                answer = await operation()
            except StorageClosed as error:
                if not self._stopping.is_set():
                    self._conditions.trouble("storage", "the storage was closed", error)
                await asyncio.Event().wait()
            except Exception as error:  # noqa: BLE001  # whatever it is, it is told and repeated
                if delay == _BEGIN_AGAIN:
                    log(f"{verb} failed; trying again until it does not", error)
                self._conditions.passing(verb, f"{verb} fails and is repeated", error)  # it may then last an hour
                await self._clock.sleep(delay)
                delay = min(_AGAIN_MOST, 2 * delay)
            else:
                self._conditions.over(verb)
                return answer
