"""What every part of the storage contract stands on: a clock set by hand, plain ids, and short ways to say things."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hookwright._clock import SECOND, Clock
from hookwright._models import AttemptRecord, DeliveryState, EndpointRow, EventRow, Key, NewDelivery, Outcome
from hookwright.storage._base import ClaimRequest, DeliveryFilter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Coroutine, Generator, Mapping

    from hookwright._models import Claim, Delivery, Lease, Receipt, Settled
    from hookwright.storage._base import Storage

START = 1_767_225_600 * SECOND
"""2026-01-01 in microseconds UTC."""

MOMENT = SECOND // 100
"""A little time: what passes between two claims."""

LEASE = 60 * SECOND

EVERYTHING = DeliveryFilter()


class ManualClock(Clock):
    """A clock that stands still until it is moved."""

    def __init__(self, now: int = START) -> None:
        self.time = now

    def now(self) -> int:
        """Steady time, as set."""
        return self.time

    def wall(self) -> int:
        """Wall time, the same."""
        return self.time


class World:
    """An open storage, its clock, and verbs that fill in what a test does not care about."""

    def __init__(self, storage: Storage, clock: ManualClock) -> None:
        self.storage = storage
        self.clock = clock
        self._numbers = itertools.count(1)

    def pass_time(self, microseconds: int = MOMENT) -> None:
        """Move the clock on."""
        self.clock.time += microseconds

    def new_id(self, prefix: str) -> str:
        """Return an id that sorts after all earlier ones."""
        return f"{prefix}_{next(self._numbers):08d}"

    def new_endpoint(self, **fields: Any) -> EndpointRow:
        """Return an endpoint that is not stored yet."""
        values: dict[str, Any] = {
            "id": self.new_id("ep"),
            "url": "https://receiver.example/hooks",
            "events": ("*",),
            "created_at": self.clock.now(),
            "updated_at": self.clock.now(),
            "keys": (Key("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"),),
        }
        return EndpointRow(**values | fields)

    async def endpoint(self, **fields: Any) -> str:
        """Store an endpoint and return its id."""
        return (await self.storage.create_endpoint(self.new_endpoint(**fields))).id

    async def revision(self) -> int:
        """Return the endpoint counter."""
        return (await self.storage.changes(0)).revision

    def new_event(self, **fields: Any) -> EventRow:
        """Return an event that is not stored yet."""
        values: dict[str, Any] = {
            "id": self.new_id("evt"),
            "type": "video.processed",
            "data": b'{"n":1}',
            "occurred_at": self.clock.now(),
            "digest": b"d",
        }
        return EventRow(**values | fields)

    def new_delivery(self, endpoint_id: str, available_at: int = 0, *, skipped: bool = False) -> NewDelivery:
        """Return a delivery that is not stored yet."""
        return NewDelivery(self.new_id("dlv"), endpoint_id, available_at, skipped)

    async def emit(self, *endpoint_ids: str, available_at: int = 0, **fields: Any) -> list[str]:
        """Store an event for the endpoints and return its delivery ids."""
        deliveries = [self.new_delivery(endpoint_id, available_at) for endpoint_id in endpoint_ids]
        await self.enqueue(self.new_event(**fields), *deliveries)
        return [delivery.id for delivery in deliveries]

    async def emit_many(self, count: int, endpoint_id: str) -> list[str]:
        """Store `count` events for one endpoint and return their delivery ids."""
        revision = await self.revision()
        deliveries = [self.new_delivery(endpoint_id) for _ in range(count)]
        await asyncio.gather(
            *(self.storage.enqueue(self.new_event(), [row], endpoints_revision=revision) for row in deliveries)
        )
        return [delivery.id for delivery in deliveries]

    async def enqueue(self, event: EventRow, *deliveries: NewDelivery) -> Receipt:
        """Store an event matched against the endpoints as they are."""
        return await self.storage.enqueue(event, deliveries, endpoints_revision=await self.revision())

    async def claim(
        self,
        limit: int = 100,
        *,
        unproven_limit: int | None = None,
        cap: int = 4,
        in_flight: Mapping[str, Collection[str]] | None = None,
        slow: Collection[str] = (),
        settling: Collection[str] = (),
        lease: int = LEASE,
    ) -> Claim:
        """Claim, a moment later than whatever came before."""
        self.pass_time()
        unproven = limit if unproven_limit is None else unproven_limit
        return await self.storage.claim(
            ClaimRequest(limit, unproven, lease, cap, in_flight or {}, slow, settling=settling)
        )

    async def claim_one(self, **options: Any) -> Lease:
        """Claim what is there, which is one row."""
        (lease,) = (await self.claim(**options)).leases
        return lease

    async def settle(self, lease: Lease, state: DeliveryState = DeliveryState.SUCCEEDED, **fields: Any) -> Settled:
        """Settle one lease."""
        (settled,) = await self.storage.settle([self.outcome(lease, state, **fields)])
        return settled

    def outcome(self, lease: Lease, state: DeliveryState = DeliveryState.SUCCEEDED, **fields: Any) -> Outcome:
        """Return what came of a lease: an attempt with a status that suits the state."""
        status = 204 if state is DeliveryState.SUCCEEDED else 503
        error = None if state is DeliveryState.SUCCEEDED else "http_status"
        record = AttemptRecord(self.clock.now(), 1000, status=status, error=error)
        return Outcome(lease.delivery_id, lease.token, lease.endpoint_id, state, record)._replace(**fields)

    async def prove(self, endpoint_id: str, successes: int = 1) -> None:
        """Let the endpoint answer well so many times."""
        for _ in range(successes):
            await self.emit(endpoint_id)
            assert (await self.settle(await self.claim_one())).held

    async def sweep(self) -> None:
        """Sweep until nothing more remains."""
        while await self.storage.sweep():
            pass

    async def state(self, delivery_id: str) -> DeliveryState:
        """Return a delivery's state."""
        return (await self.storage.get_delivery(delivery_id)).state

    async def deliveries(self, where: DeliveryFilter = EVERYTHING) -> list[Delivery]:
        """Return all deliveries, newest first."""
        items: list[Delivery] = []
        cursor = None
        while True:
            page = await self.storage.list_deliveries(where, limit=500, cursor=cursor)
            items.extend(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return items

    async def expunge(self, event_id: str) -> list[str]:
        """Expunge all of an event; return the deliveries that were cancelled."""
        cancelled: list[str] = []
        after = None
        while True:
            part = await self.storage.expunge(event_id, after)
            cancelled.extend(part.cancelled)
            after = part.after
            if after is None:
                return cancelled

    async def written(self) -> None:
        """Return when whatever was asked for before has been written, or never will be: a claim has to see it."""
        await self.storage.claim(ClaimRequest(0, 0, LEASE, 4, {}))

    async def snapshot(self) -> list[Any]:
        """Return all that can be read."""
        await self.written()
        deliveries = await self.deliveries()
        events = {delivery.event_id for delivery in deliveries}
        return [
            await self.storage.changes(0),
            deliveries,
            [await self.storage.get_event(event_id) for event_id in sorted(events)],
            [await self.storage.attempts(delivery.id) for delivery in deliveries],
        ]


class ContractBase:
    """Where the storages under test come from."""

    async def make_storage(self) -> Storage:
        """Return a new, empty storage that is not open yet. Without it the tests raise NotImplementedError."""
        raise NotImplementedError(
            f"define make_storage() in {type(self).__name__}: it returns a new, empty storage that is not open yet"
        )

    async def reopen(self, storage: Storage) -> Storage:
        """Return what a new process would use after this one is closed: another object on the same rows, not open.

        The default is the same object, for storages that keep what they hold when they are closed.
        """
        return storage

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[World]:
        """Open a new storage that has the right to deliver, and close it at the end."""
        clock = ManualClock()
        world = World(await self.make_storage(), clock)
        await world.storage.open(clock)
        try:
            assert await world.storage.acquire()
            yield world
        finally:
            await world.storage.close()

    async def restart(self, world: World) -> None:
        """Close, and open again as a new process that delivers."""
        await world.storage.close()
        world.storage = await self.reopen(world.storage)
        await world.storage.open(world.clock)
        assert await world.storage.acquire()


class CancelledAt:
    """Awaits a coroutine, and cancels the task around it when it suspends for the `number`-th time, counted from 0."""

    def __init__(self, coroutine: Coroutine[Any, Any, object], number: int) -> None:
        self._coroutine = coroutine
        self._number = number
        self.reached = False

    def __await__(self) -> Generator[Any, None, None]:
        # By hand, since the n-th suspension is the coroutine's own, whichever of its inner awaits that is.
        suspensions = 0
        error: BaseException | None = None
        while True:
            try:
                waited = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration:
                return
            if suspensions == self._number:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            suspensions += 1
            error = None
            try:
                yield waited
            except BaseException as raised:  # noqa: BLE001  # it is the coroutine's to catch
                error = raised

    async def run(self) -> bool:
        """Run in a task of its own; say whether that suspension was reached."""

        async def run() -> None:
            await self

        (outcome,) = await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome
        return self.reached
