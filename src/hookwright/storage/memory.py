"""MemoryStorage: plain dictionaries, the reference model that the other backends are compared with."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hookwright._clock import FOREVER, Clock, to_datetime
from hookwright._errors import ConflictError, NotFound, StaleEndpoints, StorageClosed, StorageError
from hookwright._ids import new_token
from hookwright._models import (
    Attempt,
    AttemptRecord,
    Claim,
    Delivery,
    DeliveryState,
    EndpointHealth,
    EndpointRow,
    EndpointState,
    Event,
    Lease,
    NewDelivery,
    NewEvent,
    Page,
    Receipt,
    Settled,
    to_attempt,
)
from hookwright.storage._base import (
    FREE_INTERRUPTIONS,
    SWEEP_ROWS,
    Changes,
    ClaimRequest,
    DeliveryFilter,
    Storage,
)
from hookwright.storage._cursor import decode_cursor, encode_cursor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hookwright._models import Outcome


@dataclass
class _Row:
    id: str
    event: NewEvent
    endpoint_id: str
    state: DeliveryState
    available_at: int
    scheduled_at: int | None
    created_at: int
    token: str | None = None
    interruptions: int = 0
    budget_from: int = 0
    finished_at: int | None = None
    last_status: int | None = None
    last_error: str | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)

    @property
    def due_since(self) -> int:
        return self.available_at or self.created_at


@dataclass
class _Lane:
    hold_until: int = 0
    earned: int = 0
    failures: int = 0
    sweep: DeliveryState | None = None
    served: int = 0
    rows: dict[str, _Row] = field(default_factory=dict)


class MemoryStorage(Storage):
    """Everything in this object, lost with it: for tests, and for trying things out.

    ```python
    from hookwright import Dispatcher

    async with Dispatcher("memory:") as dispatcher:
        print(await dispatcher.emit("video.processed", {"video_id": "vid_123"}))
    ```
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._closing = asyncio.Event()
        self._acquired = False
        self._revision = 0
        self._serving = 0
        self._events: dict[str, tuple[NewEvent, int, int]] = {}
        self._event_rows: dict[str, list[_Row]] = {}
        self._keys: dict[str, str] = {}
        self._rows: dict[str, _Row] = {}
        self._endpoints: dict[str, EndpointRow] = {}
        self._lanes: dict[str, _Lane] = {}

    def __repr__(self) -> str:
        return "MemoryStorage()"

    async def open(self, clock: Clock) -> None:
        """See `Storage.open`."""
        self._clock = clock
        self._closing.clear()

    async def close(self) -> None:
        """See `Storage.close`."""
        self._clock = None
        self._acquired = False
        self._closing.set()

    async def acquire(self) -> bool:
        """See `Storage.acquire`."""
        self._now()
        if not self._acquired:
            self._acquired = True
            for lane in self._lanes.values():
                lane.earned = 0
                for row in lane.rows.values():
                    row.available_at = row.available_at if row.token is None else 0
        return True

    # -- the outbox ---------------------------------------------------------------------------------------------

    async def enqueue(self, event: NewEvent, deliveries: Sequence[NewDelivery], *, endpoints_revision: int) -> Receipt:
        """See `Storage.enqueue`."""
        now = self._now()
        known = event.id if event.id in self._events else self._keys.get(event.idempotency_key or "")
        if known is not None:
            stored, _, count = self._events[known]
            if stored.digest != event.digest:
                name = "event_id" if known == event.id else "idempotency_key"
                raise ConflictError(f"{name}: it was used before for another type, data or tenant (event {known})")
            return Receipt(known, count, duplicate=True)
        if endpoints_revision != self._revision:
            raise StaleEndpoints("endpoints changed since they were matched: match again and repeat")
        ids = [delivery.id for delivery in deliveries]
        if len(set(ids)) < len(ids) or not self._rows.keys().isdisjoint(ids):
            raise StorageError("a delivery id was used before: make a new one for each delivery")
        count = sum(not delivery.skipped for delivery in deliveries)
        self._events[event.id] = (event, now, count)
        if event.idempotency_key is not None:
            self._keys[event.idempotency_key] = event.id
        rows = [_new_row(event, delivery, now) for delivery in deliveries]
        self._event_rows[event.id] = rows
        for row in rows:
            self._rows[row.id] = row
            if row.state is DeliveryState.PENDING:
                self._lanes[row.endpoint_id].rows[row.id] = row
        return Receipt(event.id, count)

    async def claim(self, request: ClaimRequest) -> Claim:
        """See `Storage.claim`."""
        now = self._now()
        leases: list[Lease] = []
        unproven_left = request.unproven_limit
        due = [(id, lane) for id, lane in self._lanes.items() if self._first_due(id, lane, request, now)]
        for endpoint_id, lane in sorted(due, key=lambda item: (item[1].served, item[0])):
            doubtful = lane.earned == 0 or endpoint_id in request.slow
            held = request.in_flight.get(endpoint_id, ())
            cap = self._endpoints[endpoint_id].concurrency or request.endpoint_concurrency
            room = min(min(max(1, lane.earned), cap) - len(held), request.limit - len(leases))
            if doubtful:
                room = min(room, unproven_left)
            found = [row for row in self._due_rows(lane, now) if row.id not in held][: max(0, room)]
            if found:
                self._serving += 1
                lane.served = self._serving
                unproven_left -= len(found) if doubtful else 0
            leases.extend(self._lease(row, lane, request.lease, now) for row in found)
        later = (
            max(lane.hold_until, min(row.available_at for row in lane.rows.values()))
            for lane in self._lanes.values()
            if lane.rows
        )
        next_due = min((time for time in later if now < time < FOREVER), default=None)
        return Claim(leases, next_due, self._revision)

    def _first_due(self, endpoint_id: str, lane: _Lane, request: ClaimRequest, now: int) -> bool:
        held = request.in_flight.get(endpoint_id, ())
        return lane.hold_until <= now and any(row.id not in held for row in self._due_rows(lane, now))

    def _due_rows(self, lane: _Lane, now: int) -> list[_Row]:
        return sorted(
            (row for row in lane.rows.values() if row.available_at <= now), key=lambda row: (row.due_since, row.id)
        )

    def _lease(self, row: _Row, lane: _Lane, duration: int, now: int) -> Lease:
        taken_over = row.token is not None
        if taken_over:
            row.interruptions += 1
            _interrupt(row, now)
        row.token, row.available_at = new_token(), now + duration
        return Lease(
            delivery_id=row.id,
            token=row.token,
            until=row.available_at,
            endpoint_id=row.endpoint_id,
            event_id=row.event.id,
            event_type=row.event.type,
            data=row.event.data,
            tenant=row.event.tenant,
            occurred_at=row.event.occurred_at,
            created_at=row.created_at,
            due_at=row.scheduled_at or row.created_at,
            number=len(row.attempts) + 1,
            spent=len(row.attempts) - row.budget_from - min(row.interruptions, FREE_INTERRUPTIONS),
            interruptions=row.interruptions,
            taken_over=taken_over,
            proven=lane.earned > 0,
        )

    async def settle(self, outcomes: Sequence[Outcome]) -> list[Settled]:
        """See `Storage.settle`."""
        now = self._now()
        return [self._settle_one(outcome, now) for outcome in outcomes]

    def _settle_one(self, outcome: Outcome, now: int) -> Settled:
        row = self._rows.get(outcome.delivery_id)
        if row is None or row.token is None or row.token != outcome.token:
            return Settled(held=False)
        if outcome.attempt is not None:
            row.attempts.append(outcome.attempt)
            row.last_status, row.last_error = outcome.attempt.status, outcome.attempt.error
        retry_at = now + outcome.retry_in if outcome.state is DeliveryState.PENDING else None
        row.state, row.token, row.scheduled_at, row.available_at = outcome.state, None, retry_at, retry_at or 0
        if outcome.state.final:
            self._end(row, outcome.state, now)
        return Settled(held=True, health=self._update_health(outcome, now), next_attempt_at=retry_at)

    def _update_health(self, outcome: Outcome, now: int) -> EndpointHealth | None:
        lane = self._lanes.get(outcome.endpoint_id)
        if lane is None:
            return None
        if outcome.counts and outcome.state is DeliveryState.SUCCEEDED:
            lane.failures, lane.earned = 0, min(1024, max(2, lane.earned * 2))
        elif outcome.counts:
            lane.failures, lane.earned = lane.failures + 1, 0
        disabled = outcome.gone and self._change_state(outcome.endpoint_id, EndpointState.DISABLED, "gone", now)
        return EndpointHealth(lane.failures, lane.earned > 0, disabled=disabled, stopped=lane.sweep is not None)

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        """See `Storage.release`."""
        now = self._now()
        for lease in leases:
            row = self._rows.get(lease.delivery_id)
            if row is None or row.token is None or row.token != lease.token:
                continue
            row.token, row.available_at = None, row.scheduled_at or 0
            if sent:
                _interrupt(row, now)
                row.budget_from += 1
            if hold:
                lane = self._lanes[row.endpoint_id]
                lane.hold_until = max(lane.hold_until, now + hold)

    async def sweep(self) -> bool:
        """See `Storage.sweep`."""
        now, left = self._now(), SWEEP_ROWS
        for endpoint_id, lane in list(self._lanes.items()):
            if lane.sweep is None:
                continue
            for row in list(lane.rows.values()):
                if left == 0:
                    return True
                if row.token is None or row.available_at <= now:
                    self._end(row, lane.sweep, now)
                    left -= 1
            if not lane.rows and lane.sweep is DeliveryState.CANCELLED:
                del self._lanes[endpoint_id]
            elif not lane.rows:
                lane.sweep = None
        return left == 0

    def _end(self, row: _Row, state: DeliveryState, now: int) -> None:
        row.state, row.token, row.available_at, row.scheduled_at, row.finished_at = state, None, 0, None, now
        self._lanes[row.endpoint_id].rows.pop(row.id, None)

    async def wait(self, timeout: float) -> bool:
        """See `Storage.wait`: there is no other process."""
        self._now()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), timeout)
        return False

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def create_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.create_endpoint`."""
        self._now()
        if endpoint.id in self._endpoints:
            raise ConflictError(f"id: there is an endpoint {endpoint.id} already")
        held = 0 if endpoint.state is EndpointState.ACTIVE else FOREVER
        self._lanes[endpoint.id] = _Lane(hold_until=held)
        return self._store(endpoint)

    async def update_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.update_endpoint`."""
        stored = await self.get_endpoint(endpoint.id)
        if stored.revision != endpoint.revision:
            raise ConflictError(f"endpoint {endpoint.id} was changed by somebody else meanwhile: read it and repeat")
        return self._store(
            replace(
                endpoint,
                state=stored.state,
                disabled_reason=stored.disabled_reason,
                created_at=stored.created_at,
                consecutive_failures=stored.consecutive_failures,
            )
        )

    async def set_endpoint_state(self, endpoint_id: str, state: EndpointState, *, reason: str | None) -> EndpointRow:
        """See `Storage.set_endpoint_state`."""
        await self.get_endpoint(endpoint_id)
        self._change_state(endpoint_id, state, reason, self._now())
        return await self.get_endpoint(endpoint_id)

    async def delete_endpoint(self, endpoint_id: str) -> None:
        """See `Storage.delete_endpoint`."""
        stored = await self.get_endpoint(endpoint_id)
        lane = self._lanes[endpoint_id]
        lane.hold_until, lane.sweep = FOREVER, DeliveryState.CANCELLED
        self._store(
            EndpointRow(
                id=endpoint_id,
                url="",
                events=(),
                created_at=stored.created_at,
                updated_at=self._now(),
                tenant=stored.tenant,
                state=EndpointState.DISABLED,
                deleted=True,
            )
        )

    async def get_endpoint(self, endpoint_id: str) -> EndpointRow:
        """See `Storage.get_endpoint`."""
        self._now()
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None or endpoint.deleted:
            raise NotFound(f"there is no endpoint {endpoint_id!r}")
        return replace(endpoint, consecutive_failures=self._lanes[endpoint_id].failures)

    async def list_endpoints(self, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
        """See `Storage.list_endpoints`."""
        self._now()
        after = None if cursor is None else decode_cursor(cursor, "endpoints", tenant)
        ids = [
            id
            for id, endpoint in sorted(self._endpoints.items(), reverse=True)
            if not endpoint.deleted and tenant in {None, endpoint.tenant} and (after is None or id < after)
        ]
        items = tuple([await self.get_endpoint(id) for id in ids[:limit]])
        more = len(ids) > limit
        return Page(items=items, next_cursor=encode_cursor("endpoints", tenant, items[-1].id) if more else None)

    async def changes(self, since_revision: int) -> Changes:
        """See `Storage.changes`."""
        self._now()
        newer = [endpoint for endpoint in self._endpoints.values() if endpoint.revision > since_revision]
        return Changes(self._revision, sorted(newer, key=lambda endpoint: endpoint.revision))

    def _store(self, endpoint: EndpointRow) -> EndpointRow:
        self._revision += 1
        self._endpoints[endpoint.id] = replace(endpoint, revision=self._revision)
        return self._endpoints[endpoint.id]

    def _change_state(self, endpoint_id: str, state: EndpointState, reason: str | None, now: int) -> bool:
        endpoint = self._endpoints[endpoint_id]
        if endpoint.deleted:
            return False
        lane = self._lanes[endpoint_id]
        lane.hold_until = 0 if state is EndpointState.ACTIVE else FOREVER  # ends a hold, also of an active endpoint
        lane.sweep = DeliveryState.SKIPPED if state is EndpointState.DISABLED else None
        if (endpoint.state, endpoint.disabled_reason) == (state, reason):
            return False
        self._store(replace(endpoint, state=state, disabled_reason=reason, updated_at=now))
        return True

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
        )

    async def get_delivery(self, delivery_id: str) -> Delivery:
        """See `Storage.get_delivery`."""
        self._now()
        if delivery_id not in self._rows:
            raise NotFound(f"there is no delivery {delivery_id!r}")
        return _to_delivery(self._rows[delivery_id])

    async def list_deliveries(self, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
        """See `Storage.list_deliveries`."""
        after = None if cursor is None else decode_cursor(cursor, "deliveries", tuple(where))
        rows = [row for row in self._matching(where) if after is None or row.id < after]
        rows.sort(key=lambda row: row.id, reverse=True)
        items = tuple(_to_delivery(row) for row in rows[:limit])
        more = len(rows) > limit
        return Page(items=items, next_cursor=encode_cursor("deliveries", tuple(where), items[-1].id) if more else None)

    async def count_deliveries(self, where: DeliveryFilter) -> int:
        """See `Storage.count_deliveries`."""
        return sum(1 for _ in self._matching(where))

    def _matching(self, where: DeliveryFilter) -> Iterator[_Row]:
        self._now()
        rows = self._rows.values() if where.event_id is None else self._event_rows.get(where.event_id, [])
        for row in rows:
            wanted = (
                (where.state, row.state),
                (where.endpoint_id, row.endpoint_id),
                (where.event_type, row.event.type),
                (where.tenant, row.event.tenant),
            )
            if all(want is None or want == has for want, has in wanted) and row.created_at >= (where.since or 0):
                yield row

    async def attempts(self, delivery_id: str) -> list[Attempt]:
        """See `Storage.attempts`."""
        await self.get_delivery(delivery_id)
        return [
            to_attempt(delivery_id, number, record)
            for number, record in enumerate(self._rows[delivery_id].attempts, start=1)
        ]

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
            self._keys.pop(event.idempotency_key or "", None)
            for row in self._event_rows.pop(id):
                del self._rows[row.id]
        return len(old)

    def _now(self) -> int:
        if self._clock is None:
            raise StorageClosed("the storage is not open: use it inside `async with Dispatcher(...)`, or after start()")
        return self._clock.now()


def _new_row(event: NewEvent, delivery: NewDelivery, now: int) -> _Row:
    state = DeliveryState.SKIPPED if delivery.skipped else DeliveryState.PENDING
    ended = now if delivery.skipped else None
    scheduled_at = None if delivery.skipped else delivery.available_at
    return _Row(
        delivery.id, event, delivery.endpoint_id, state, delivery.available_at, scheduled_at, now, finished_at=ended
    )


def _interrupt(row: _Row, now: int) -> None:
    row.attempts.append(AttemptRecord(now, 0, error="interrupted"))
    row.last_status, row.last_error = None, "interrupted"


def _to_delivery(row: _Row) -> Delivery:
    return Delivery(
        id=row.id,
        event_id=row.event.id,
        event_type=row.event.type,
        endpoint_id=row.endpoint_id,
        state=row.state,
        attempt_count=len(row.attempts),
        created_at=to_datetime(row.created_at),
        next_attempt_at=None if row.scheduled_at is None else to_datetime(row.scheduled_at or row.created_at),
        finished_at=None if row.finished_at is None else to_datetime(row.finished_at),
        last_status=row.last_status,
        last_error=row.last_error,
    )
