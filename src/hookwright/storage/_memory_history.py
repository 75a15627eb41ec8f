"""The memory backend's rows, and what is read of them: the half of `MemoryStorage` that is no queue."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hookwright._clock import FOREVER, to_datetime
from hookwright._errors import ConflictError, NotFound, StorageClosed
from hookwright._health import NO_HEALTH, EndpointHealth
from hookwright._models import (
    TEST_TYPE,
    Attempt,
    AttemptRecord,
    Delivery,
    DeliveryState,
    Emission,
    EndpointRow,
    EndpointState,
    Event,
    EventRow,
    NewDelivery,
    Page,
    to_attempt,
)
from hookwright.storage._base import (
    BACKLOG_COUNTED,
    FREE_INTERRUPTIONS,
    STATS_ROWS,
    SWEEP_ROWS,
    Backlog,
    DeliveryFilter,
    Expunged,
    Storage,
)
from hookwright.storage._cursor import decode_cursor, encode_cursor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from hookwright._clock import Clock


@dataclass
class MemoryRow:
    """A delivery."""

    id: str
    event: EventRow
    endpoint_id: str
    state: DeliveryState
    available_at: int
    scheduled_at: int | None
    created_at: int
    token: str | None = None
    interruptions: int = 0
    budget_from: int = 0
    renewed_at: int | None = None
    finished_at: int | None = None
    last_status: int | None = None
    last_error: str | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)

    @property
    def since(self) -> int:
        """When its budget began."""
        return self.renewed_at or self.created_at

    @property
    def due_since(self) -> int:
        """Since when it has been waiting to be sent."""
        return self.available_at or self.created_at


@dataclass
class MemoryLane:
    """An endpoint's place in the queue, and its health."""

    hold_until: int = 0
    earned: int = 0
    health: EndpointHealth = NO_HEALTH
    throttles: int = 0
    rate_at: int = 0
    rate_until: int = 0
    tested_at: int | None = None
    sweep: DeliveryState | None = None
    served: int = 0
    rows: dict[str, MemoryRow] = field(default_factory=dict)


class MemoryHistory(Storage):
    """All rows, and the verbs that read and mend them."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._closing = asyncio.Event()
        self._acquired = False
        self._revision = 0
        self._serving = 0
        self._events: dict[str, tuple[EventRow, int, int]] = {}
        self._event_rows: dict[str, list[MemoryRow]] = {}
        self._keys: dict[str | None, str] = {}
        self._expunged: dict[str, int] = {}
        self._rows: dict[str, MemoryRow] = {}
        self._endpoints: dict[str, EndpointRow] = {}
        self._lanes: dict[str, MemoryLane] = {}

    # -- history ------------------------------------------------------------------------------------------------

    async def get_event(self, event_id: str) -> Event:
        """See `Storage.get_event`."""
        self._now()
        if event_id not in self._events:
            raise NotFound(f"there is no event {event_id!r}")
        event, created_at, _ = self._events[event_id]
        return Event(
            id=event.id,
            type=event.type,
            data=event.data,
            tenant=event.tenant,
            attributes=json.loads(event.attributes),
            occurred_at=to_datetime(event.occurred_at),
            created_at=to_datetime(created_at),
            idempotency_key=event.idempotency_key,
            trace_context=event.trace_context,
            expunged_at=to_datetime(self._expunged[event_id]) if event_id in self._expunged else None,
        )

    async def get_delivery(self, delivery_id: str) -> Delivery:
        """See `Storage.get_delivery`."""
        self._now()
        if delivery_id not in self._rows:
            raise NotFound(f"there is no delivery {delivery_id!r}")
        return to_delivery(self._rows[delivery_id])

    async def list_deliveries(self, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
        """See `Storage.list_deliveries`."""
        after = None if cursor is None else decode_cursor(cursor, "deliveries", tuple(where))
        rows = [row for row in self._matching(where) if after is None or row.id < after]
        rows.sort(key=lambda row: row.id, reverse=True)
        items = tuple(to_delivery(row) for row in rows[:limit])
        more = len(rows) > limit
        return Page(items=items, next_cursor=encode_cursor("deliveries", tuple(where), items[-1].id) if more else None)

    async def count_deliveries(self, where: DeliveryFilter) -> int:
        """See `Storage.count_deliveries`."""
        return sum(1 for _ in self._matching(where))

    def _matching(self, where: DeliveryFilter) -> Iterator[MemoryRow]:
        self._now()
        rows = self._rows.values() if where.event_id is None else self._event_rows.get(where.event_id, [])
        for row in rows:
            wanted = (
                (where.endpoint_id, row.endpoint_id),
                (where.event_type, row.event.type),
                (where.tenant, row.event.tenant),
            )
            in_time = (where.since or 0) <= row.created_at < (FOREVER if where.until is None else where.until)
            in_state = not where.states or row.state in where.states
            if in_time and in_state and all(want is None or want == has for want, has in wanted):
                yield row

    async def attempts(self, delivery_id: str) -> list[Attempt]:
        """See `Storage.attempts`."""
        await self.get_delivery(delivery_id)
        return [
            to_attempt(delivery_id, number, record)
            for number, record in enumerate(self._rows[delivery_id].attempts, start=1)
        ]

    async def stats(self, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
        """See `Storage.stats`."""
        rows = sorted(self._matching(DeliveryFilter(endpoint_id=endpoint_id)), key=lambda row: row.id, reverse=True)
        attempts = [attempt for row in rows for attempt in row.attempts if attempt.started_at >= since]
        return [(a.duration, a.status is not None and 200 <= a.status < 300) for a in attempts[:STATS_ROWS]]  # 2xx

    async def backlog(self) -> Backlog:
        """See `Storage.backlog`."""
        now = self._now()
        pending = [row for lane in self._lanes.values() for row in lane.rows.values()]
        leased = sum(row.token is not None for row in pending)
        due = [
            row.available_at or row.since
            for lane in self._lanes.values()
            if max(lane.hold_until, lane.rate_until) <= now
            for row in lane.rows.values()
            if row.token is None and row.available_at <= now
        ]
        return Backlog(min(len(pending), BACKLOG_COUNTED), min(leased, BACKLOG_COUNTED), min(due, default=None))

    # -- by hand ------------------------------------------------------------------------------------------------

    async def requeue(self, delivery_ids: Sequence[str], states: Collection[DeliveryState]) -> int:
        """See `Storage.requeue`."""
        now = self._now()
        rows = [self._rows[id] for id in delivery_ids if id in self._rows]
        changed = [row for row in rows if row.state in states and row.token is None and self._can_go_on(row)]
        for row in changed:
            row.state, row.available_at, row.scheduled_at, row.finished_at = DeliveryState.PENDING, 0, 0, None
            row.renewed_at = now
            row.budget_from = len(row.attempts) - min(row.interruptions, FREE_INTERRUPTIONS)
            self._lanes[row.endpoint_id].rows[row.id] = row
        return len(changed)

    def _can_go_on(self, row: MemoryRow) -> bool:
        endpoint = self._endpoints[row.endpoint_id]
        stopped = endpoint.deleted or endpoint.state is EndpointState.DISABLED
        return not stopped and row.event.id not in self._expunged and row.event.type != TEST_TYPE

    async def cancel(self, delivery_ids: Sequence[str]) -> list[str]:
        """See `Storage.cancel`."""
        now = self._now()
        rows = [self._rows[id] for id in delivery_ids if id in self._rows]
        pending = [row for row in rows if row.state is DeliveryState.PENDING]
        for row in pending:
            if row.token is not None:
                interrupt(row, now)
            self._end(row, DeliveryState.CANCELLED, now)
        return [row.id for row in pending]

    async def expunge(self, event_id: str, after: str | None = None) -> Expunged:  # it is done at once
        """See `Storage.expunge`."""
        now = self._now()
        await self.get_event(event_id)
        event, created_at, count = self._events[event_id]
        bare = event._replace(data=b"", attributes="{}")
        self._events[event_id] = (bare, created_at, count)
        self._expunged.setdefault(event_id, now)
        rows = self._event_rows[event_id]
        cancelled = await self.cancel([row.id for row in rows])
        for row in rows:
            row.event = bare
            row.attempts = [
                attempt._replace(response_headers=(), response_body=b"", detail=None) for attempt in row.attempts
            ]
        return Expunged(cancelled)

    async def admit_test(self, endpoint_id: str, interval: int) -> None:
        """See `Storage.admit_test`."""
        now = self._now()
        await self.get_endpoint(endpoint_id)
        lane = self._lanes[endpoint_id]
        if lane.tested_at is not None and 0 <= now - lane.tested_at < interval:
            raise ConflictError(
                f"endpoint {endpoint_id} was tested just now: wait {interval // 1_000_000} s between tests"
            )
        lane.tested_at = now

    async def record_test(self, emission: Emission, state: DeliveryState, attempt: AttemptRecord) -> None:
        """See `Storage.record_test`."""
        now = self._now()
        [delivery] = emission.deliveries
        row = new_row(emission.event, delivery._replace(skipped=True), now)
        row.state, row.attempts, row.last_status, row.last_error = state, [attempt], attempt.status, attempt.error
        self._events[emission.event.id] = (emission.event, now, 0)
        self._event_rows[emission.event.id] = [row]
        self._rows[row.id] = row

    async def prune(self, before: int) -> int:
        """See `Storage.prune`."""
        self._now()
        old = [
            id
            for id, (_, created_at, _) in self._events.items()
            if created_at < before and all(row.state.final for row in self._event_rows[id])
        ][:SWEEP_ROWS]
        for id in old:
            event, _, _ = self._events.pop(id)
            self._keys.pop(event.idempotency_key, None)
            self._expunged.pop(id, None)
            for row in self._event_rows.pop(id):
                del self._rows[row.id]
        return len(old)

    def _now(self) -> int:
        if self._clock is None:
            raise StorageClosed("the storage is not open: use it inside `async with Dispatcher(...)`, or after start()")
        return self._clock.now()

    def _end(self, row: MemoryRow, state: DeliveryState, now: int) -> None:
        row.state, row.token, row.available_at, row.scheduled_at, row.finished_at = state, None, 0, None, now
        self._lanes[row.endpoint_id].rows.pop(row.id, None)


def new_row(event: EventRow, delivery: NewDelivery, now: int) -> MemoryRow:
    """Return a delivery that was just emitted."""
    state = DeliveryState.SKIPPED if delivery.skipped else DeliveryState.PENDING
    ended = now if delivery.skipped else None
    scheduled_at = None if delivery.skipped else delivery.available_at
    return MemoryRow(
        delivery.id, event, delivery.endpoint_id, state, delivery.available_at, scheduled_at, now, finished_at=ended
    )


def interrupt(row: MemoryRow, now: int) -> None:
    """Record an attempt of which only its beginning is known."""
    row.attempts.append(AttemptRecord(now, 0, error="interrupted"))
    row.last_status, row.last_error = None, "interrupted"


def to_delivery(row: MemoryRow) -> Delivery:
    """Return what an application reads of a delivery."""
    return Delivery(
        id=row.id,
        event_id=row.event.id,
        event_type=row.event.type,
        endpoint_id=row.endpoint_id,
        state=row.state,
        attempt_count=len(row.attempts),
        created_at=to_datetime(row.created_at),
        next_attempt_at=None if row.scheduled_at is None else to_datetime(row.scheduled_at or row.since),
        finished_at=None if row.finished_at is None else to_datetime(row.finished_at),
        last_status=row.last_status,
        last_error=row.last_error,
    )
