"""The default storage: one SQLite file, WAL and FULL, one writing connection, group commit."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hookwright._errors import ConfigurationError, StorageBusy
from hookwright.storage._base import DEFAULT_HEALTH, SWEEP_ROWS, Expunged, Storage
from hookwright.storage._connections import CallersConnection, check_kind
from hookwright.storage._emitted import Emitted
from hookwright.storage.sqlite import _claim, _endpoints, _enqueue, _history, _release, _requeue, _schema, _settle
from hookwright.storage.sqlite._callers import Callers
from hookwright.storage.sqlite._owner import BUSY_LIMIT, Connected, Database, Owner, closed, convert, transaction

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Coroutine, Sequence
    from typing import Any, TypeVar

    from hookwright._clock import Clock
    from hookwright._errors import HookwrightError
    from hookwright._health import HealthPolicy
    from hookwright._models import (
        Attempt,
        AttemptRecord,
        Claim,
        Delivery,
        DeliveryState,
        Emission,
        EndpointRow,
        EndpointState,
        Event,
        EventRow,
        Lease,
        NewDelivery,
        Outcome,
        Page,
        Receipt,
        Settled,
    )
    from hookwright.storage._base import Backlog, Changes, ClaimRequest, DeliveryFilter

    T = TypeVar("T")

__all__ = ["SQLiteStorage"]

_POLL = 0.25
"""Seconds between looks at the WAL's size and time, which every commit changes."""

_SURE = 8
"""Every so many looks `PRAGMA data_version` is asked all the same: two commits may share one tick of a file's time."""


class SQLiteStorage(Storage):
    """One SQLite file. It is created readable by its owner only; its folder must exist.

    Every write is a transaction that has been fsynced when the verb returns. Whatever is asked for while one is being
    written goes into the next together, so that many writers cost little more than one. Several processes may open
    the same file: all emit, one delivers (`acquire`). `transactions` counts the commits of this object.

    >>> SQLiteStorage("hooks.db")
    SQLiteStorage('hooks.db')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._clock: Clock | None = None
        self._owner: Owner | None = None
        self._reader: Connected | None = None
        self._file = self._path
        self._callers = Callers(self._path)
        self._lock = _schema.DeliverLock(self._path)
        self._freed = False
        self._closing = asyncio.Event()
        self._closed: asyncio.Task[None] | None = None
        self._version: int | None = None
        self._stamp: tuple[int, int] | None = None
        self._looks = 0
        self._pruned = (0, "")

    def __repr__(self) -> str:
        return f"SQLiteStorage({str(self._path)!r})"

    @property
    def transactions(self) -> int:
        """How many transactions were committed since `open`; an exact figure for tests and benchmarks."""
        return self._owner.transactions if self._owner is not None else 0

    async def open(self, clock: Clock) -> None:
        """See `Storage.open`. Raises ConfigurationError when it is open already."""
        if self._owner is not None:
            raise ConfigurationError("this SQLiteStorage is open already: give each dispatcher its own")
        if self._closed is not None:
            await asyncio.shield(self._closed)
        self._closed = None
        self._closing.clear()
        try:
            # The one real path for file, WAL and lock: the process may change its folder, and the path be a link.
            self._file = self._path.resolve()
            _schema.create_file(self._file)
        except OSError as error:
            raise convert(error) from error
        self._lock, self._freed, self._callers = _schema.DeliverLock(self._file), False, Callers(self._file)
        owner, reader = Owner(self._file), Connected(self._file)
        await owner.open(partial(_schema.prepare_writer, self._file))
        try:
            await reader.open(_schema.prepare_reader)
        except BaseException:
            await owner.close()
            raise
        self._clock, self._owner, self._reader = clock, owner, reader

    async def close(self) -> None:
        """See `Storage.close`."""
        if self._owner is not None and self._closed is None:
            self._closed = asyncio.get_running_loop().create_task(self._close(self._owner, self._reader))
        self._owner = self._reader = None
        if self._closed is not None:
            # Shielded: a caller that is cancelled here may call again, the closing goes on meanwhile.
            await asyncio.shield(self._closed)

    async def _close(self, owner: Owner, reader: Connected | None) -> None:
        self._closing.set()
        if reader is not None:
            await reader.interrupt()
            await reader.close()
        try:
            await owner.finish()
            await owner.call(lambda _: self._lock.release())
        finally:
            await owner.close()

    async def acquire(self) -> bool:
        """See `Storage.acquire`."""
        owner, now = self._opened(), self._now()
        if not await owner.call(lambda _: self._lock.acquire()):
            return False
        if not self._freed:
            # What others commit from here on is news; what they committed before, the first claim sees.
            self._version = await owner.call(_schema.data_version)
            await owner.submit(lambda database: _release.free_leases(database, now))
            self._freed = True  # only now: after a failure or a cancellation it is tried again
        return True

    async def enqueue(
        self,
        event: EventRow,
        deliveries: Sequence[NewDelivery],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> Receipt:
        """See `Storage.enqueue`."""
        emitted = Emitted(event, deliveries, endpoints_revision)
        if connection is not None:
            return (await self._enqueue_through(connection, [emitted]))[0]
        receipt: Receipt = await self._opened().submit_to(self._enqueue_all, emitted)
        return receipt

    def _enqueue_all(self, database: Database, waiting: list[Emitted]) -> list[Receipt | HookwrightError]:
        return _enqueue.enqueue(database, waiting, self._now())

    async def enqueue_many(
        self,
        emissions: Sequence[Emission],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> list[Receipt]:
        """See `Storage.enqueue_many`."""
        waiting = [Emitted(*emission, endpoints_revision) for emission in emissions]
        if connection is not None:
            return await self._enqueue_through(connection, waiting)
        return await self._write(lambda database, now: _enqueue.enqueue_many(database, waiting, now))

    async def _enqueue_through(self, connection: CallersConnection, waiting: Sequence[Emitted]) -> list[Receipt]:
        now = self._now()
        check_kind(connection, "sqlite", self)
        return await self._callers.enqueue(connection, waiting, now)

    def watch(self, connection: CallersConnection, committed: Callable[[], None]) -> Coroutine[Any, Any, None] | None:
        """See `Storage.watch`: by the connection's `in_transaction`, which costs no statement, and the WAL's stamp."""
        return self._callers.watch(connection, committed, lambda: self.transactions)

    @property
    def connection_risk(self) -> str | None:
        """See `Storage.connection_risk`: an SQLite with the WAL-reset bug."""
        return None if _schema.resets_the_log_safely() else _schema.RISK

    async def claim(self, request: ClaimRequest) -> Claim:
        """See `Storage.claim`."""
        return await self._write(lambda database, now: _claim.claim(database, request, now))

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        """See `Storage.settle`."""
        settled: list[Settled] = await self._opened().submit_to(self._settle_all, (outcomes, policy))
        return settled

    def _settle_all(
        self, database: Database, waiting: list[tuple[Sequence[Outcome], HealthPolicy]]
    ) -> list[list[Settled]]:
        return _settle.settle(database, waiting, self._now())

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        """See `Storage.release`."""
        await self._write(lambda database, now: _release.release(database, leases, sent=sent, hold=hold, now=now))

    async def requeue(self, delivery_ids: Sequence[str], states: Collection[DeliveryState]) -> int:
        """See `Storage.requeue`."""
        return await self._write(lambda database, now: _requeue.requeue(database, delivery_ids, states, now))

    async def cancel(self, delivery_ids: Sequence[str]) -> list[str]:
        """See `Storage.cancel`."""
        return await self._write(lambda database, now: _requeue.cancel(database, delivery_ids, now))

    async def admit_test(self, endpoint_id: str, interval: int) -> None:
        """See `Storage.admit_test`."""
        await self._write(lambda database, now: _requeue.admit_test(database, endpoint_id, interval, now))

    async def record_test(self, emission: Emission, state: DeliveryState, attempt: AttemptRecord) -> None:
        """See `Storage.record_test`."""
        await self._write(lambda database, now: _requeue.record_test(database, emission, state, attempt, now))

    async def sweep(self) -> bool:
        """See `Storage.sweep`."""
        return await self._write(_release.sweep)

    async def wait(self, timeout: float) -> bool:
        """See `Storage.wait`."""
        owner, loop = self._opened(), asyncio.get_running_loop()
        until = loop.time() + timeout
        closing = loop.create_task(self._closing.wait())
        try:
            while (left := until - loop.time()) > 0:
                await asyncio.wait({closing}, timeout=min(left, _POLL))
                if closing.done():
                    return False
                if await self._others_committed(owner):
                    return True
            return False
        finally:
            closing.cancel()

    async def _others_committed(self, owner: Owner) -> bool:
        # A stat costs a hundredth of a question to the writing connection, and shows our own commits as well.
        stamp, before = _schema.wal_stamp(self._file), self._stamp
        self._looks += 1
        if stamp == before and self._looks % _SURE:
            return False
        # On the writing connection, whose data_version does not count its own commits.
        version = await owner.call(_schema.data_version)
        changed = self._version not in {None, version}
        self._stamp, self._version = stamp, version
        return changed

    async def create_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.create_endpoint`."""
        return await self._write(lambda database, _: _endpoints.create(database, endpoint))

    async def update_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.update_endpoint`."""
        return await self._write(lambda database, _: _endpoints.update(database, endpoint))

    async def set_endpoint_state(self, endpoint_id: str, state: EndpointState, *, reason: str | None) -> EndpointRow:
        """See `Storage.set_endpoint_state`."""
        return await self._write(
            lambda database, now: _endpoints.change_state(database, endpoint_id, state, reason=reason, now=now)
        )

    async def delete_endpoint(self, endpoint_id: str) -> None:
        """See `Storage.delete_endpoint`."""
        await self._write(lambda database, now: _endpoints.delete(database, endpoint_id, now))

    async def scrub_endpoints(self) -> None:
        """See `Storage.scrub_endpoints`. Raises StorageBusy when other readers keep the WAL from being emptied for 5 s.

        Every endpoint is written again in one transaction.
        """
        await self._write(lambda database, _: _endpoints.rewrite(database))
        await self._empty_wal()

    async def get_endpoint(self, endpoint_id: str) -> EndpointRow:
        """See `Storage.get_endpoint`."""
        return await self._read(lambda database: _endpoints.get(database, endpoint_id))

    async def list_endpoints(self, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
        """See `Storage.list_endpoints`."""
        return await self._read(lambda database: _endpoints.page(database, limit=limit, cursor=cursor, tenant=tenant))

    async def changes(self, since_revision: int) -> Changes:
        """See `Storage.changes`."""

        def read(database: Database) -> Changes:
            with transaction(database, "BEGIN"):
                return _endpoints.changes(database, since_revision)

        # On the writer's connection, where it is quick: behind a long read of the history every emit would wait for
        # it. Outside the writer's transactions: those wait for callers' that may be waiting for this.
        return await self._opened().call(read)

    async def get_event(self, event_id: str) -> Event:
        """See `Storage.get_event`."""
        return await self._read(lambda database: _history.get_event(database, event_id))

    async def get_delivery(self, delivery_id: str) -> Delivery:
        """See `Storage.get_delivery`."""
        return await self._read(lambda database: _history.get_delivery(database, delivery_id))

    async def list_deliveries(self, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
        """See `Storage.list_deliveries`."""
        return await self._read(lambda database: _history.list_deliveries(database, where, limit=limit, cursor=cursor))

    async def count_deliveries(self, where: DeliveryFilter) -> int:
        """See `Storage.count_deliveries`."""
        return await self._read(lambda database: _history.count_deliveries(database, where))

    async def attempts(self, delivery_id: str) -> list[Attempt]:
        """See `Storage.attempts`."""
        return await self._read(lambda database: _history.attempts(database, delivery_id))

    async def stats(self, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
        """See `Storage.stats`."""
        return await self._read(lambda database: _history.stats(database, endpoint_id, since))

    async def backlog(self) -> Backlog:
        """See `Storage.backlog`."""
        now = self._now()
        return await self._read(lambda database: _history.backlog(database, now))

    async def expunge(self, event_id: str, after: str | None = None) -> Expunged:  # it is done at once
        """See `Storage.expunge`. Raises StorageBusy when other readers keep the WAL from being emptied for 5 s."""
        cancelled = await self._write(lambda database, now: _requeue.expunge(database, event_id, now))
        await self._empty_wal()
        return Expunged(cancelled)

    async def _empty_wal(self) -> None:
        until = asyncio.get_running_loop().time() + BUSY_LIMIT
        while not await self._opened().call(_schema.empty_wal):
            if asyncio.get_running_loop().time() > until:
                raise StorageBusy("done, but a reader keeps old pages in the WAL: end its transaction and repeat")
            await asyncio.sleep(_POLL)

    async def prune(self, before: int) -> int:
        """See `Storage.prune`."""
        # Found by reading, which blocks no writer, and looked at again when they are deleted.
        while True:
            found = await self._read(lambda database: _history.prunable(database, before, self._pruned))
            self._pruned = found[-1] if len(found) == SWEEP_ROWS else (0, "")
            ids = [event_id for _, event_id in found]
            deleted = await self._write(partial(_history.prune, event_ids=ids))
            if deleted or len(found) < SWEEP_ROWS:
                return deleted

    def _opened(self) -> Owner:
        if self._owner is None:
            raise closed()
        return self._owner

    def _now(self) -> int:
        if self._clock is None:
            raise closed()
        return self._clock.now()

    async def _write(self, operation: Callable[[Database, int], T]) -> T:
        owner = self._opened()
        # The time is taken in the transaction, not when it was asked for: it may have waited for a lock meanwhile.
        return await owner.submit(lambda database: operation(database, self._now()))

    async def _read(self, operation: Callable[[Database], T]) -> T:
        if self._reader is None:
            raise closed()

        def read(database: Database) -> T:
            if self._closing.is_set():
                raise closed()
            with transaction(database, "BEGIN"):
                return operation(database)

        return await self._reader.call(read)
