"""Emits that come at the same time are stored together: one transaction and one statement for all that wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from hookwright._errors import CommitUnknown, HookwrightError, StorageClosed, StorageError, StorageUnavailable
from hookwright.storage.postgres._enqueue import Emitted, enqueue, mark_own
from hookwright.storage.postgres._pool import PATIENCE, CommitLost, closed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hookwright._models import Receipt
    from hookwright.storage.postgres._database import Database
    from hookwright.storage.postgres._pool import Pool

T = TypeVar("T")
_Waiting = tuple[Emitted, "asyncio.Future[Receipt]"]

_MOST = 500
"""Events that are stored in one transaction at most."""

_LOCK_LIMIT = 100
"""Milliseconds that a group waits for another transaction with one of its ids or keys; then each of it goes alone."""

NOTIFY_INTERVAL = 0.02
"""Seconds between two notifications of a process at least: each takes a lock of the whole server in its commit."""


class Notifier:
    """Says in which transactions others are notified of new rows; what was left out is made up for."""

    def __init__(self, channel: str | None, pool: Pool) -> None:
        self._channel = channel
        self._pool = pool
        self._last = 0.0
        self._owed: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    async def run(self, write: Callable[[str | None], Awaitable[T]]) -> T:
        """Write something of which others are told: in its transaction, for which it is given the channel, or later.

        Later is after its commit: whoever looked before would find nothing, and not look again for seconds.
        """
        now = time.monotonic()
        if self._channel is None or now >= self._last + NOTIFY_INTERVAL:
            self._last = now
            return await write(self._channel)
        answer = await write(None)
        if self._owed is None:
            left = self._last + NOTIFY_INTERVAL - time.monotonic()
            self._owed = asyncio.get_running_loop().call_later(max(0.0, left), self._tell)
        return answer

    def channel(self) -> str | None:
        """Return the channel, for what is told of in any case."""
        return self._channel

    def _tell(self) -> None:
        self._owed, self._last = None, time.monotonic()
        self._telling = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        with contextlib.suppress(StorageError):  # a hint that is missed is made up for by looking
            await self._pool.run(lambda database: database.fetch("SELECT pg_notify($1, '')", self._channel), first=True)

    def close(self) -> None:
        """Notify no more."""
        if self._owed is not None:
            self._owed.cancel()


class Emits:
    """Stores events in the order of their arrival."""

    def __init__(self, pool: Pool, notifier: Notifier) -> None:
        self._pool = pool
        self._notifier = notifier
        self._waiting: deque[_Waiting] = deque()
        self._storing: asyncio.Task[None] | None = None
        self._alone: set[asyncio.Task[None]] = set()

    async def store(self, emitted: Emitted) -> Receipt:
        """Store one with whatever else waits. Raises what `Storage.enqueue` raises."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append((emitted, future))
        if self._storing is None or self._storing.done():
            self._storing = asyncio.get_running_loop().create_task(self._store(), name="hookwright-postgres-emits")
        return await asyncio.shield(future)

    async def close(self) -> None:
        """Wait until what was asked for is answered; the pool, when it is closed, sees to that."""
        tasks = {task for task in (self._storing, *self._alone) if task is not None and not task.done()}
        if tasks:
            await asyncio.wait(tasks)

    async def _store(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(_MOST, len(self._waiting)))]
                await self._store_group(group)
                await asyncio.sleep(0)  # who was answered asks for the next before we look
        finally:
            for _, future in self._waiting:
                _answer(future, closed())
            self._waiting.clear()

    async def _store_group(
        self, group: Sequence[tuple[Emitted, asyncio.Future[Receipt]]], *, alone: bool = False
    ) -> None:
        try:
            answers = await self._notifier.run(
                partial(
                    store_all,
                    self._pool,
                    [emitted for emitted, _ in group],
                    first=not alone,
                    lock_limit=None if alone else _LOCK_LIMIT,
                )
            )
        except asyncio.CancelledError:
            for _, future in group:
                _answer(future, StorageClosed("the storage's task was cancelled: it may or may not have been written"))
            raise
        except StorageError as error:
            if alone or isinstance(error, (StorageUnavailable, StorageClosed, CommitUnknown)):
                for emitted, future in group:
                    lost = isinstance(error, CommitUnknown)
                    _answer(future, CommitUnknown(emitted.event.id) if lost else error)
                return
            # One of them is bad, or waits for somebody else's transaction: each by itself, and nobody behind it.
            for one in group:
                task = asyncio.get_running_loop().create_task(self._store_group([one], alone=True))
                self._alone.add(task)
                task.add_done_callback(self._alone.discard)
        else:
            for (_, future), answer in zip(group, answers, strict=True):
                _answer(future, answer)


def _answer(future: asyncio.Future[Receipt], answer: Receipt | HookwrightError) -> None:
    if future.done():  # its caller was cancelled
        return
    if isinstance(answer, HookwrightError):
        future.set_exception(answer)
        future.exception()  # its caller may be gone
    else:
        future.set_result(answer)


async def store_all(
    pool: Pool,
    group: Sequence[Emitted],
    channel: str | None,
    *,
    first: bool = False,
    lock_limit: int | None = None,
    enqueue: Callable[..., Awaitable[list[Any]]] = enqueue,
) -> list[Any]:
    """Store events in one transaction. When a commit's answer is lost, ask by their ids, by storing them again.

    Raises CommitUnknown when nobody could be asked for 10 s, or StorageError: then nothing was stored.
    """

    async def store(database: Database) -> list[Any]:
        return await enqueue(database, group, channel)

    async def store_again(database: Database) -> list[Any]:
        return await mark_own(database, group, await enqueue(database, group, channel))

    try:
        return await pool.run(store, first=first, patience=PATIENCE, lock_limit=lock_limit)
    except CommitLost:
        pass
    # The same ids: what is there is not stored twice, and a commit that is still under way is waited for.
    try:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((CommitLost, StorageUnavailable)),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(PATIENCE),
            reraise=True,
        ):
            with attempt:
                return await pool.run(store_again, first=first, patience=PATIENCE)
    except StorageError as error:
        raise CommitUnknown(group[0].event.id) from error
    raise AssertionError("unreachable")
