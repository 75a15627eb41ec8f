"""Emits that come at the same time are stored together: one transaction and one statement for all that wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from hookwright._errors import (
    CommitLost,
    CommitUnknown,
    HookwrightError,
    StorageBusy,
    StorageClosed,
    StorageError,
    StorageUnavailable,
)
from hookwright.storage.postgres._enqueue import enqueue, enqueue_all, mark_own
from hookwright.storage.postgres._pool import PATIENCE, closed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from hookwright._models import Receipt
    from hookwright.storage._emitted import Emitted
    from hookwright.storage.postgres._database import Database
    from hookwright.storage.postgres._pool import Pool

    _Group = Sequence[tuple[Emitted, asyncio.Future[Receipt]]]

T = TypeVar("T")

_OF_ALL = (StorageUnavailable, StorageClosed, CommitUnknown)

_MOST = 500
"""Events that are stored in one transaction at most."""

_WAITING_MOST = 2
"""Connections on which emits wait for somebody else's transaction at most, so that others can emit meanwhile."""

NOTIFY_INTERVAL = 0.02
"""Seconds between two notifications of a process at least: each takes a lock of the whole server in its commit."""


_NOTIFY = "SELECT pg_notify($1, '')"


async def telling(operation: Callable[[Database], Awaitable[T]], channel: str, database: Database) -> T:
    """Do something of which others are told in its own transaction."""
    answer = await operation(database)
    await database.fetch(_NOTIFY, channel)
    return answer


class Notifier:
    """Says in which transactions others are notified of new rows; what was left out is made up for."""

    def __init__(self, channel: str | None, pool: Pool) -> None:
        self.channel = channel
        self._pool = pool
        self._last = 0.0
        self._owed: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    async def run(self, write: Callable[[str | None], Awaitable[T]]) -> T:
        """Write something of which others are told: in its transaction, for which it is given the channel, or later.

        Later is after its commit: whoever looked before would find nothing, and not look again for seconds.
        """
        now = time.monotonic()
        if self.channel is None or now >= self._last + NOTIFY_INTERVAL:
            self._last = now
            return await write(self.channel)
        answer = await write(None)
        if self._owed is None:
            left = self._last + NOTIFY_INTERVAL - time.monotonic()
            self._owed = asyncio.get_running_loop().call_later(max(0.0, left), self._tell)
        return answer

    def _tell(self) -> None:
        self._owed, self._last = None, time.monotonic()
        self._telling = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        with contextlib.suppress(StorageError):  # a hint that is missed is made up for by looking
            await self._pool.run(self._hint, first=True, single=True)

    async def _hint(self, database: Database) -> None:
        await database.fetch(_NOTIFY, self.channel)

    async def close(self) -> None:
        """Notify of what is owed, and no more."""
        owed, self._owed = self._owed, None
        if owed is not None:
            owed.cancel()
            await self._notify()


class Emits:
    """Stores events in the order of their arrival."""

    def __init__(self, pool: Pool, notifier: Notifier) -> None:
        self._pool = pool
        self._notifier = notifier
        self._waiting: deque[tuple[Emitted, asyncio.Future[Receipt]]] = deque()
        self._storing: asyncio.Task[None] | None = None
        self._apart: set[asyncio.Task[None]] = set()
        self._patient = asyncio.Semaphore(_WAITING_MOST)
        self.soon: set[asyncio.Future[Receipt]] = set()
        """Those that are about to be stored, and wait for nobody else's transaction."""

    async def store(self, emitted: Emitted) -> Receipt:
        """Store one with whatever else waits. Raises what `Storage.enqueue` raises."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append((emitted, future))
        self.soon.add(future)
        future.add_done_callback(self.soon.discard)
        if self._storing is None or self._storing.done():
            self._storing = asyncio.get_running_loop().create_task(self._store(), name="hookwright-postgres-emits")
        return await asyncio.shield(future)

    async def store_together(self, waiting: Sequence[Emitted]) -> list[Receipt]:
        """See `Storage.enqueue_many`."""
        store = partial(store_all, self._pool, waiting, together=True)
        try:
            return await self._notifier.run(partial(store, hurried=True))
        except StorageBusy:
            async with self._patient:
                return await self._notifier.run(store)

    async def close(self) -> None:
        """Wait until what was asked for is answered; the pool, when it is closed, sees to that."""
        while tasks := {task for task in (self._storing, *self._apart) if task is not None and not task.done()}:
            await asyncio.wait(tasks)

    async def _store(self) -> None:
        try:
            while self._waiting:
                await self._store_group(self._next())
                await asyncio.sleep(0)  # who was answered asks for the next before we look
        finally:
            for _, future in self._waiting:
                _answer(future, closed())
            self._waiting.clear()

    def _next(self) -> _Group:
        """Take those that one statement can store: an id that is repeated needs a second."""
        group: dict[str, tuple[Emitted, asyncio.Future[Receipt]]] = {}
        while self._waiting and len(group) < _MOST and self._waiting[0][0].event.id not in group:
            one = self._waiting.popleft()
            group[one[0].event.id] = one
        return list(group.values())

    async def _store_group(self, group: _Group, *, hurried: bool = True) -> None:
        emitted = [one for one, _ in group]
        try:
            answers = await self._notifier.run(partial(store_all, self._pool, emitted, hurried=hurried))
        except asyncio.CancelledError:
            for _, future in group:
                _answer(future, StorageClosed("the storage's task was cancelled: it may or may not have been written"))
            raise
        except StorageError as error:
            waits = isinstance(error, StorageBusy)
            if isinstance(error, _OF_ALL) or (waits and not hurried) or (len(group) == 1 and not waits):
                _refuse(group, error)
            else:
                await self._split(group, waits=waits)
        except Exception as error:  # noqa: BLE001  # whatever it is: whoever waits is answered
            _refuse(group, error)
        else:
            for (_, future), answer in zip(group, answers, strict=True):
                _answer(future, answer)

    async def _split(self, group: _Group, *, waits: bool) -> None:
        """One of them is bad, or waits for somebody else's transaction: those that may be it go apart, one by one.

        Only who has an id or key of the application's waits for another that has the same.
        """
        suspects = [one for one in group if not waits or one[0].event.digest is not None]
        self.soon.difference_update(future for _, future in (group if len(group) == 1 else suspects))
        if waits and len(group) == 1:
            self._begin_apart(self._wait(group))
            return
        others = [one for one in group if waits and one[0].event.digest is None]
        if suspects:
            self._begin_apart(self._one_by_one(suspects))
        if others:
            await self._store_group(others, hurried=bool(suspects))

    def _begin_apart(self, storing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(storing)
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)

    async def _one_by_one(self, group: _Group) -> None:
        for one in group:
            await self._store_group([one])

    async def _wait(self, group: _Group) -> None:
        async with self._patient:
            await self._store_group(group, hurried=False)


def _refuse(group: _Group, error: Exception) -> None:
    for emitted, future in group:
        lost = isinstance(error, CommitUnknown)
        _answer(future, CommitUnknown(emitted.event.id) if lost else error)


def _answer(future: asyncio.Future[Receipt], answer: Receipt | Exception) -> None:
    if future.done():  # its caller was cancelled
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
        future.exception()  # its caller may be gone
    else:
        future.set_result(answer)


async def store_all(
    pool: Pool,
    group: Sequence[Emitted],
    channel: str | None,
    *,
    hurried: bool = False,
    together: bool = False,
) -> list[Any]:
    """Store events in one transaction, or each by itself unless `together`.

    When a commit's answer is lost, ask by their ids, by storing them again. Raises CommitUnknown when nobody could be
    asked for 10 s, or StorageError: then nothing was stored.
    """

    put: Callable[..., Awaitable[list[Any]]] = enqueue_all if together else enqueue

    async def store(database: Database) -> list[Any]:
        return await put(database, group, channel, hurried=hurried)

    async def store_again(database: Database) -> list[Any]:
        return await mark_own(database, group, await put(database, group, channel))

    repeats = (StorageUnavailable,) if hurried else (StorageUnavailable, StorageBusy)
    try:
        # Who may wait for somebody else's transaction does so beside the connections that deliver.
        return await pool.run(store, first=hurried, single=not together, patience=PATIENCE, repeats=repeats)
    except CommitLost:
        pass
    # The same ids: what is there is not stored twice, and a commit that is still under way is waited for.
    try:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((StorageUnavailable, StorageBusy)),  # the lost one may still hold locks
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(PATIENCE),
            reraise=True,
        ):
            with attempt:
                return await pool.run(store_again, first=True)
    except HookwrightError as error:
        raise CommitUnknown(group[0].event.id) from error
    raise AssertionError("unreachable")
