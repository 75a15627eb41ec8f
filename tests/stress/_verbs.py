"""What a player asks for, and how often: every verb of the storage, with every outcome."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from hookwright import Clock, ConflictError, DeliveryState, EndpointState, NewEvent, NotFound
from hookwright._clock import SECOND
from hookwright._errors import HookwrightError, StaleEndpoints, StorageBusy
from hookwright._ids import new_id, new_ids
from hookwright._models import AttemptRecord, Emission, EndpointRow, EventRow, Key, NewDelivery, Outcome
from hookwright.storage._base import ClaimRequest, DeliveryFilter
from hookwright.storage._connections import adapted

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Sequence

    import asyncpg

    from hookwright import Dispatcher
    from hookwright._models import Lease
    from hookwright.storage._base import Storage

ENDPOINTS = (12, 24)
"""So many there are, at least and at most."""

TYPES = 12

KEYS = 300
"""Idempotency keys that all processes share, in each minute."""

KEEP = 20
"""Seconds after which events are pruned."""

LEASE = (0.5, 4.0)

EXPECTED: dict[str, tuple[type[HookwrightError], ...]] = {
    "emit": (StaleEndpoints, ConflictError),
    "emit_many": (StaleEndpoints, ConflictError),
    "create": (ConflictError,),
    "update": (ConflictError, NotFound),
    "change_state": (NotFound,),
    "delete": (NotFound,),
    "read": (NotFound,),
    "expunge": (NotFound,),
    "try_out": (NotFound, ConflictError),
    "scrub": (StorageBusy,),
    "dispatch": (ConflictError,),
    "dispatch_many": (ConflictError,),
    "transaction": (ConflictError, StorageBusy),  # its snapshot is older than what has the same key
}
"""What may be raised by what is asked for at the wrong time."""

_SECRET = Key("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
_ENDED = (DeliveryState.FAILED, DeliveryState.CANCELLED, DeliveryState.SKIPPED, DeliveryState.SUCCEEDED)


class Hands:
    """Uses one storage, and one dispatcher, at random."""

    STORAGE: ClassVar[dict[str, float]] = {
        "emit": 20,
        "emit_many": 5,
        "claim": 25,
        "settle": 25,
        "release": 3,
        "abandon": 1,
        "requeue": 3,
        "cancel": 3,
        "change_state": 3,
        "create": 2,
        "update": 2,
        "delete": 1,
        "expunge": 1,
        "try_out": 1,
        "prune": 2,
        "sweep": 4,
        "read": 4,
        "scrub": 0.05,
    }
    DISPATCHER: ClassVar[dict[str, float]] = {"dispatch": 10, "dispatch_many": 3, "health": 1}

    def __init__(self, storage: Storage, dispatcher: Dispatcher, chance: random.Random) -> None:
        self._storage = storage
        self._dispatcher = dispatcher
        self._chance = chance
        self._clock = Clock()
        self._held: dict[str, Lease] = {}
        self._endpoints: dict[str, EndpointRow] = {}
        self._revision = 0

    # -- what is emitted ----------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        changes = await self._storage.changes(self._revision)
        for endpoint in changes.endpoints:
            self._endpoints[endpoint.id] = endpoint
            if endpoint.deleted:
                del self._endpoints[endpoint.id]
        self._revision = max(self._revision, changes.revision)

    def _emission(self) -> Emission:
        """Return an event for a few endpoints, in any order, whose id tells how many rows it has and how many count."""
        chance, now = self._chance, self._clock.now()
        some = chance.sample(list(self._endpoints.values()), min(len(self._endpoints), chance.choice((1, 1, 2, 5))))
        rows = [
            NewDelivery(
                id,
                endpoint.id,
                now + chance.randrange(2 * SECOND) if chance.random() < 0.1 else 0,
                skipped=endpoint.state is EndpointState.DISABLED,
            )
            for id, endpoint in zip(new_ids("dlv", now, len(some)), some, strict=True)
        ]
        key = None
        if chance.random() < 0.3:
            key = f"key {now // (60 * SECOND)} {chance.randrange(KEYS)}"
        digest = b"other" if chance.random() < 0.02 else b"same"
        count = sum(not row.skipped for row in rows)
        event_id = f"evt_stress_{new_id('', now)[1:]}_{len(rows)}_{count}"
        return Emission(EventRow(event_id, "stress.direct", b"{}", now, idempotency_key=key, digest=digest), rows)

    def _type(self) -> str:
        return f"stress.{self._chance.randrange(TYPES)}"

    async def emit(self) -> None:
        await self._fresh(lambda: self._storage.enqueue(*self._emission(), endpoints_revision=self._revision))

    async def emit_many(self) -> None:
        await self._fresh(lambda: self._storage.enqueue_many(self._some(), endpoints_revision=self._revision))

    def _some(self) -> list[Emission]:
        return [self._emission() for _ in range(self._chance.randrange(1, 20))]

    async def _fresh(self, emit: Callable[[], Awaitable[object]]) -> None:
        try:
            await emit()
        except StaleEndpoints:
            await self._refresh()
            await emit()

    async def transaction(self, pool: asyncpg.Pool[Any], pause: float) -> None:
        """Emit in a transaction, through the storage or the dispatcher, wait, and commit or not."""
        async with pool.acquire() as connection:
            transaction = connection.transaction(
                isolation=self._chance.choice(("read_committed", "read_committed", "repeatable_read"))
            )
            await transaction.start()
            try:
                for _ in range(self._chance.randrange(1, 4)):
                    await self._dispatcher.emit(self._type(), {"n": 1}, connection=connection)
                if self._chance.random() < 0.3:
                    with contextlib.suppress(StaleEndpoints):
                        await self._storage.enqueue(
                            *self._emission(), endpoints_revision=self._revision, connection=await adapted(connection)
                        )
                await asyncio.sleep(pause)
            except BaseException:
                await transaction.rollback()
                raise
            await (transaction.commit() if self._chance.random() < 0.7 else transaction.rollback())

    async def opposite(self, pool: asyncpg.Pool[Any], pause: float) -> None:
        """Two transactions that emit to the same two endpoints, each in its own order."""
        pair = self._chance.sample(sorted(self._endpoints), 2) if len(self._endpoints) > 1 else []
        await asyncio.gather(self._in_order(pool, pair, pause), self._in_order(pool, pair[::-1], pause))

    async def _in_order(self, pool: asyncpg.Pool[Any], endpoint_ids: Sequence[str], pause: float) -> None:
        async with pool.acquire() as connection, connection.transaction():
            for endpoint_id in endpoint_ids:
                with contextlib.suppress(NotFound):  # deleted meanwhile: nothing was written
                    await self._dispatcher.emit("stress.app", endpoint_id=endpoint_id, connection=connection)
                await asyncio.sleep(pause / 2)

    async def dispatch(self) -> None:
        key = f"dispatched {self._clock.now() // (60 * SECOND)} {self._chance.randrange(KEYS)}"
        shared = key if self._chance.random() < 0.3 else None
        await asyncio.gather(
            *(
                self._dispatcher.emit(f"stress.{n}", {"n": 1}, idempotency_key=shared if n == 0 else None)
                for n in range(4)
            )
        )

    async def dispatch_many(self) -> None:
        await self._dispatcher.emit_many(
            [NewEvent(self._type(), {"n": n}) for n in range(self._chance.randrange(1, 20))]
        )

    async def health(self) -> None:
        await self._dispatcher.health()

    # -- what is delivered ----------------------------------------------------------------------------------------

    async def claim(self) -> None:
        chance, in_flight = self._chance, dict[str, list[str]]()
        for lease in self._held.values():
            in_flight.setdefault(lease.endpoint_id, []).append(lease.delivery_id)
        limit = chance.choice((1, 4, 16, 64))
        lease_for = round(chance.uniform(*LEASE) * SECOND)
        claim = await self._storage.claim(
            ClaimRequest(limit, max(1, limit // 2), lease_for, chance.choice((1, 4, 16)), in_flight)
        )
        self._held |= {lease.token: lease for lease in claim.leases}

    def _take(self) -> list[Lease]:
        count = min(len(self._held), self._chance.randrange(1, 20))
        return [self._held.pop(token) for token in self._chance.sample(list(self._held), count)]

    async def settle(self) -> None:
        leases = self._take()
        if leases:
            await self._storage.settle([self._outcome(lease) for lease in leases])

    def _outcome(self, lease: Lease) -> Outcome:
        drawn = self._chance.random()
        state = (
            DeliveryState.SUCCEEDED if drawn < 0.6 else DeliveryState.PENDING if drawn < 0.9 else DeliveryState.FAILED
        )
        status = 204 if state is DeliveryState.SUCCEEDED else 503
        return Outcome(
            lease.delivery_id,
            lease.token,
            lease.endpoint_id,
            state,
            AttemptRecord(self._clock.now(), 1000, status=status),
            retry_in=self._chance.randrange(2 * SECOND),
            gone=state is DeliveryState.FAILED and self._chance.random() < 0.02,
            hold=self._chance.choice((0, 0, 0, SECOND // 2)) if status == 503 else 0,
            throttled=self._chance.choice((0.0, 0.0, 0.1)) if status == 503 else 0.0,
        )

    async def release(self) -> None:
        hold = self._chance.choice((0, 0, SECOND // 2))
        await self._storage.release(self._take(), sent=self._chance.random() < 0.5, hold=hold)

    async def abandon(self) -> None:
        """Forget leases, as whoever dies does."""
        self._take()

    async def sweep(self) -> None:
        await self._storage.sweep()

    # -- what is done by hand -------------------------------------------------------------------------------------

    async def _some_deliveries(self, *states: DeliveryState) -> list[str]:
        page = await self._storage.list_deliveries(DeliveryFilter(states=states), limit=200, cursor=None)
        ids = [delivery.id for delivery in page]
        return self._chance.sample(ids, min(len(ids), 20))

    async def requeue(self) -> None:
        await self._storage.requeue(await self._some_deliveries(self._chance.choice(_ENDED)), _ENDED)

    async def cancel(self) -> None:
        await self._storage.cancel((await self._some_deliveries(DeliveryState.PENDING))[:5])

    async def expunge(self) -> None:
        page = await self._storage.list_deliveries(DeliveryFilter(), limit=100, cursor=None)
        if page.items:
            await self._storage.expunge(self._chance.choice(page.items).event_id)  # none has a thousand deliveries

    async def try_out(self) -> None:
        await self._dispatcher.endpoints.test(self._one())

    async def prune(self) -> None:
        await self._storage.prune(self._clock.now() - KEEP * SECOND)

    async def read(self) -> None:
        await self._storage.backlog()
        for id in (await self._some_deliveries())[:2]:
            await self._storage.attempts(id)

    # -- endpoints ------------------------------------------------------------------------------------------------

    def _one(self) -> str:
        return self._chance.choice([*self._endpoints, "ep_none"])

    async def create(self) -> None:
        await self._refresh()
        while len(self._endpoints) < self._chance.randint(*ENDPOINTS):
            now = self._clock.now()
            endpoint = EndpointRow(
                # Names that others give at the same time.
                f"ep_{now // SECOND}_{self._chance.randrange(4)}",
                "https://receiver.example/hooks",
                (self._type(), "hookwright.*")[: self._chance.choice((1, 1, 2))],
                now,
                now,
                keys=(_SECRET,),
                concurrency=self._chance.choice((None, None, 1, 8)),
                rate_limit=self._chance.choice((None, None, None, 50.0)),
            )
            self._endpoints[endpoint.id] = await self._storage.create_endpoint(endpoint)

    async def update(self) -> None:
        endpoint = await self._storage.get_endpoint(self._one())
        await self._storage.update_endpoint(endpoint)

    async def change_state(self) -> None:
        active, paused, disabled = EndpointState.ACTIVE, EndpointState.PAUSED, EndpointState.DISABLED
        state = self._chance.choice((active, active, active, active, paused, disabled))
        await self._storage.set_endpoint_state(self._one(), state, reason="drawn" if state is disabled else None)

    async def delete(self) -> None:
        if len(self._endpoints) > ENDPOINTS[0]:
            await self._storage.delete_endpoint(self._one())

    async def scrub(self) -> None:
        await self._storage.scrub_endpoints()
