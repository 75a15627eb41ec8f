"""PostgreSQL: several processes emit and deliver from one database, which is also the application's."""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hookwright._errors import CommitLost, ConfigurationError, StorageBusy
from hookwright.storage._base import DEFAULT_HEALTH, SWEEP_ROWS, Expunged, Storage
from hookwright.storage._connections import CallersConnection, check_kind
from hookwright.storage._emitted import Emitted
from hookwright.storage.postgres import _claim, _endpoints, _history, _release, _requeue, _schema
from hookwright.storage.postgres._callers import Callers
from hookwright.storage.postgres._database import Names
from hookwright.storage.postgres._dsn import read_dsn
from hookwright.storage.postgres._emits import Emits, Notifier, telling
from hookwright.storage.postgres._listener import Listener
from hookwright.storage.postgres._pool import CLOSING_LIMIT, FIRST_CONNECTIONS, PATIENCE, Pool, closed
from hookwright.storage.postgres._turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from hookwright._clock import Clock
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
    from hookwright.storage.postgres._database import Database

T = TypeVar("T")

__all__ = ["PostgresStorage"]

_POLL = 0.5
"""Seconds between looks for other processes' work, where notifications cannot be had."""

_POLL_LISTENING = 5.0
"""The same, where they can: for the one that was missed."""

_MIGRATION_LIMIT = 3600.0
"""Seconds that a migration may take."""

_BARRIER = 0.25
"""Seconds for which a claim waits for what was asked for before it; what takes longer waits for somebody's lock."""


class PostgresStorage(Storage):
    """One schema of a PostgreSQL database, 14 or later. Needs the extra `postgres`.

    `dsn` is a URL, as asyncpg takes it: `postgresql://user:password@host/database?sslmode=verify-full`. `schema` is
    where hookwright's tables are; `open` creates and migrates it, which the user must be allowed to. Every write is a
    transaction that is committed when the verb returns.

    All processes that open it emit and deliver. Each uses up to `connections` connections, and one more that listens
    (LISTEN) for the others' work. With `poll_only` there is no such connection and no prepared statement, as pgbouncer
    in transaction mode needs it; others' work is then found within half a second, and leases of a process that died end
    by themselves. The server's clock alone says when anything is due.

    How many attempts an endpoint gets at once (its own `concurrency`, or `endpoint_concurrency`) holds for each
    process; with `shared_concurrency` it holds for all of them together, which costs each claim a look at all leases of
    the endpoints it serves.

    While the server cannot be reached, emits and changes are tried again for 10 s and then raise StorageUnavailable, or
    CommitUnknown; delivering goes on by itself when it is back, however long that takes. `transactions` counts the
    commits of this object.

    >>> PostgresStorage("postgresql://app:secret@db.example/app")
    PostgresStorage('postgresql://db.example/app')
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "hookwright",
        connections: int = 6,
        poll_only: bool = False,
        shared_concurrency: bool = False,
    ) -> None:
        self._address = read_dsn(dsn)
        if not isinstance(connections, int) or connections <= FIRST_CONNECTIONS:
            raise ConfigurationError("connections: use 4 or more; three are for emit, claim and settle alone")
        self._names = Names(schema)
        self._poll_only = poll_only
        self._connections = connections
        self._shared = shared_concurrency
        self._owner = 0
        self._open: _Open | None = None
        self._closing: asyncio.Event = asyncio.Event()
        self._closed: asyncio.Task[None] | None = None
        self._freed = False
        self._pruned = (0, "")
        self._writing: set[asyncio.Future[Any]] = set()

    def __repr__(self) -> str:
        return f"PostgresStorage({self._address.shown!r})"

    @property
    def transactions(self) -> int:
        """How many transactions were committed since `open`; an exact figure for tests and benchmarks."""
        return self._open.pool.transactions if self._open is not None else 0

    # -- life ---------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, str]:
        """Return what each transaction is told besides: for tests, which set the time."""
        return {}

    async def open(self, clock: Clock) -> None:
        """See `Storage.open`. Raises ConfigurationError when it is open already, or asyncpg is not installed."""
        if self._open is not None:
            raise ConfigurationError("this PostgresStorage is open already: give each dispatcher its own")
        if self._closed is not None:
            await asyncio.shield(self._closed)
        self._closed = None
        self._closing.clear()
        self._begin_anew()
        pool = Pool(self._address, self._names, size=self._connections, pooler=self._poll_only, settings=self._settings)
        channel = None if self._poll_only else self._names.channel
        listener = None if channel is None else Listener(self._address, channel, self._owner, pool.pids, pool.suspect)
        try:
            await pool.open()
            migrate = partial(_schema.migrate, names=self._names)
            # Processes of the version before work meanwhile: one of the two may have to give way (a deadlock).
            identity = await pool.run(migrate, patience=PATIENCE, repeats=(StorageBusy,), limit=_MIGRATION_LIMIT)
            if listener is not None:
                await listener.open()
        except BaseException:
            await pool.close()
            if listener is not None:
                await listener.close()
            raise
        notifier = Notifier(channel, pool)
        callers = Callers(self._names, identity, channel, partial(pool.run, _endpoints.revision, first=True))
        turns = Turns(pool, channel, clock.now, owner=self._owner, shared=self._shared)
        self._open = _Open(clock, pool, listener, notifier, Emits(pool, notifier), callers, turns)

    def _begin_anew(self) -> None:
        """Forget what was open before: its leases are a dead process's, which `acquire` frees unless `poll_only`."""
        # By its number others see whether this process is alive (see acquire); by one below 0 nobody does.
        owner = random.SystemRandom().getrandbits(62)
        self._owner = -owner if self._poll_only else owner
        self._freed, self._pruned = False, (0, "")

    async def close(self) -> None:
        """See `Storage.close`. What is under way has 0.3 s; what was not written by then may or may not be."""
        if self._open is not None and self._closed is None:
            self._closed = asyncio.get_running_loop().create_task(self._close(self._open))
        self._open = None
        if self._closed is not None:
            # Shielded: a caller that is cancelled here may call again, the closing goes on meanwhile.
            await asyncio.shield(self._closed)

    async def _close(self, opened: _Open) -> None:
        self._closing.set()
        if asked := self._writing | opened.emits.soon:
            await asyncio.wait(asked, timeout=CLOSING_LIMIT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(opened.notifier.close(), CLOSING_LIMIT)
        closing = opened.pool.close()
        await (closing if opened.listener is None else asyncio.gather(closing, opened.listener.close()))
        await opened.emits.close()

    async def acquire(self) -> bool:
        """See `Storage.acquire`. Every process may deliver: freed are the leases of those that are not alive."""
        opened = self._opened()

        async def free(database: Database) -> None:
            alone = opened.listener is not None and await opened.listener.alone(database)
            await _release.free_leases(database, alone=alone)

        if not self._freed:
            await opened.pool.run(free, patience=PATIENCE)
            self._freed = True  # only now: after a failure or a cancellation it is tried again
        return True

    # -- the outbox ---------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        event: EventRow,
        deliveries: Sequence[NewDelivery],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> Receipt:
        """See `Storage.enqueue`. Raises CommitUnknown."""
        emits = self._opened().emits
        emitted = Emitted(event, deliveries, endpoints_revision)
        if connection is not None:
            return (await self._enqueue_through(connection, [emitted]))[0]
        return await emits.store(emitted)

    async def enqueue_many(
        self,
        emissions: Sequence[Emission],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> list[Receipt]:
        """See `Storage.enqueue_many`. Raises CommitUnknown."""
        parts = self._opened()
        waiting = [Emitted(*emission, endpoints_revision) for emission in emissions]
        if connection is not None:
            return await self._enqueue_through(connection, waiting)
        return await self._wrote(parts.emits.store_together(waiting))

    async def _enqueue_through(self, connection: CallersConnection, waiting: Sequence[Emitted]) -> list[Receipt]:
        check_kind(connection, "postgres", self)
        return await self._opened().callers.enqueue(connection, waiting)

    async def claim(self, request: ClaimRequest) -> Claim:
        """See `Storage.claim`. Never waits for a lock; what others have locked is looked at again in a moment."""
        opened = self._opened()
        if asked := self._writing | opened.emits.soon:
            _, late = await asyncio.wait(asked, timeout=_BARRIER)
            self._writing -= late  # the next claim does not wait for them again
            opened.emits.soon -= late
        await opened.turns.give_back_lost()
        token, claiming = opened.turns.claim(request)
        try:
            claim, now, begun = await self._wrote(claiming)
        except (CommitLost, asyncio.CancelledError):
            opened.turns.lost(token, claiming)
            raise
        return _claim.in_our_time(claim, now - begun, now - self._now())

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        """See `Storage.settle`."""
        return await self._wrote(self._opened().turns.settle(outcomes, policy))

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        """See `Storage.release`."""
        release = partial(_release.release, leases=leases, sent=sent, hold=hold)
        await self._write(release, first=True, patience=0.0, tell=True)

    async def requeue(self, delivery_ids: Sequence[str], states: Collection[DeliveryState]) -> int:
        """See `Storage.requeue`."""
        return await self._write(partial(_requeue.requeue, delivery_ids=delivery_ids, states=states), tell=True)

    async def cancel(self, delivery_ids: Sequence[str]) -> list[str]:
        """See `Storage.cancel`."""
        return await self._write(partial(_requeue.cancel, delivery_ids=delivery_ids))

    async def admit_test(self, endpoint_id: str, interval: int) -> None:
        """See `Storage.admit_test`."""
        await self._write(partial(_requeue.admit_test, endpoint_id=endpoint_id, interval=interval))

    async def record_test(self, emission: Emission, state: DeliveryState, attempt: AttemptRecord) -> None:
        """See `Storage.record_test`."""
        await self._write(partial(_requeue.record_test, emission=emission, state=state, attempt=attempt))

    async def sweep(self) -> bool:
        """See `Storage.sweep`."""
        return await self._write(_release.sweep, patience=0.0)

    async def wait(self, timeout: float) -> bool:
        """See `Storage.wait`."""
        listener, loop = self._opened().listener, asyncio.get_running_loop()
        waiting = {loop.create_task(self._closing.wait())}
        if listener is not None:
            waiting.add(loop.create_task(listener.heard.wait()))
        # Others may have written at any time, and a notification be missed: a look that finds nothing is cheap.
        look = _POLL if listener is None else _POLL_LISTENING
        try:
            done, _ = await asyncio.wait(waiting, timeout=min(look, timeout), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        heard = listener is not None and listener.heard.is_set()
        if listener is not None:
            listener.heard.clear()
        return not self._closing.is_set() and (bool(done) or heard or timeout >= look)

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def create_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.create_endpoint`."""
        return await self._write(partial(_endpoints.create, endpoint=endpoint))

    async def update_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.update_endpoint`."""
        return await self._write(partial(_endpoints.update, endpoint=endpoint), tell=True)

    async def set_endpoint_state(self, endpoint_id: str, state: EndpointState, *, reason: str | None) -> EndpointRow:
        """See `Storage.set_endpoint_state`."""
        change = partial(_endpoints.change_state, endpoint_id=endpoint_id, state=state, reason=reason)
        return await self._write(change, tell=True)

    async def delete_endpoint(self, endpoint_id: str) -> None:
        """See `Storage.delete_endpoint`."""
        await self._write(partial(_endpoints.delete, endpoint_id=endpoint_id), tell=True)

    async def scrub_endpoints(self) -> None:
        """See `Storage.scrub_endpoints`. The server's log and backups keep what they have."""
        await self._write(_endpoints.rewrite)

    async def get_endpoint(self, endpoint_id: str) -> EndpointRow:
        """See `Storage.get_endpoint`."""
        # As emits ask: beside the connections on which they may wait for somebody else's transaction.
        return await self._read(partial(_endpoints.get, endpoint_id=endpoint_id), first=True, patience=PATIENCE)

    async def list_endpoints(self, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
        """See `Storage.list_endpoints`."""
        return await self._read(partial(_endpoints.page, limit=limit, cursor=cursor, tenant=tenant))

    async def changes(self, since_revision: int) -> Changes:
        """See `Storage.changes`."""
        changes = partial(_endpoints.changes, since_revision=since_revision)
        return await self._read(changes, first=True, patience=PATIENCE)  # emits wait for it

    # -- history ------------------------------------------------------------------------------------------------

    async def get_event(self, event_id: str) -> Event:
        """See `Storage.get_event`."""
        return await self._read(partial(_history.get_event, event_id=event_id))

    async def get_delivery(self, delivery_id: str) -> Delivery:
        """See `Storage.get_delivery`."""
        return await self._read(partial(_history.get_delivery, delivery_id=delivery_id))

    async def list_deliveries(self, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
        """See `Storage.list_deliveries`."""
        return await self._read(partial(_history.list_deliveries, where=where, limit=limit, cursor=cursor))

    async def count_deliveries(self, where: DeliveryFilter) -> int:
        """See `Storage.count_deliveries`."""
        return await self._read(partial(_history.count_deliveries, where=where))

    async def attempts(self, delivery_id: str) -> list[Attempt]:
        """See `Storage.attempts`."""
        return await self._read(partial(_history.attempts, delivery_id=delivery_id))

    async def stats(self, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
        """See `Storage.stats`."""
        return await self._read(partial(_history.stats, endpoint_id=endpoint_id, since=since))

    async def backlog(self) -> Backlog:
        """See `Storage.backlog`."""

        async def read(database: Database) -> tuple[Backlog, int]:
            now = await database.now()
            return await _history.backlog(database, now), now

        backlog, now = await self._read(read)
        ahead = now - self._now()
        return backlog if backlog.oldest_due is None else backlog._replace(oldest_due=backlog.oldest_due - ahead)

    async def expunge(self, event_id: str, after: str | None = None) -> Expunged:
        """See `Storage.expunge`: 1,000 deliveries in a call. Old versions of the row stay in the server's files until
        it has vacuumed, and in its log and backups for as long as these are kept.
        """
        return await self._write(partial(_requeue.expunge, event_id=event_id, after=after or ""))

    async def prune(self, before: int) -> int:
        """See `Storage.prune`."""
        # Found by reading, which locks nothing, and looked at again when they are deleted.
        while True:
            found = await self._read(partial(_history.prunable, before=before, after=self._pruned))
            self._pruned = found[-1] if len(found) == SWEEP_ROWS else (0, "")
            ids = [event_id for _, event_id in found]
            deleted: int = await self._write(partial(_history.prune, event_ids=ids), patience=0.0)
            if deleted or len(found) < SWEEP_ROWS:
                return deleted

    # -- what all verbs do --------------------------------------------------------------------------------------

    def _opened(self) -> _Open:
        if self._open is None:
            raise closed()
        return self._open

    def _now(self) -> int:
        return self._opened().clock.now()

    async def _read(
        self, operation: Callable[[Database], Awaitable[T]], *, first: bool = False, patience: float = 0.0
    ) -> T:
        return await self._opened().pool.run(operation, first=first, reads=True, patience=patience)

    async def _write(
        self,
        operation: Callable[[Database], Awaitable[T]],
        *,
        first: bool = False,
        patience: float = PATIENCE,
        tell: bool = False,
    ) -> T:
        opened = self._opened()

        def write(channel: str | None) -> Awaitable[T]:
            writing = operation if channel is None else partial(telling, operation, channel)
            return opened.pool.run(writing, first=first, patience=patience)

        return await self._wrote(opened.notifier.run(write) if tell else write(None))

    async def _wrote(self, writing: Awaitable[T]) -> T:
        """Await a write that a claim asked for later has to see."""
        task = asyncio.ensure_future(writing)
        self._writing.add(task)
        task.add_done_callback(self._note_written)
        return await asyncio.shield(task)

    def _note_written(self, task: asyncio.Future[Any]) -> None:
        self._writing.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone


class _Open(NamedTuple):
    """What there is while the storage is open."""

    clock: Clock
    pool: Pool
    listener: Listener | None
    notifier: Notifier
    emits: Emits
    callers: Callers
    turns: Turns
