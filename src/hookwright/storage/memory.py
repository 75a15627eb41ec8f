"""MemoryStorage: plain dictionaries, the reference model that the other backends are compared with."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from hookwright._clock import FOREVER, SECOND, Clock
from hookwright._errors import ConflictError, HookwrightError, NotFound, StorageError
from hookwright._health import Change, EndpointHealth, came_true, cool_down
from hookwright._ids import new_token
from hookwright._models import (
    ALL_TENANTS,
    Claim,
    DeliveryState,
    EndpointRow,
    EndpointState,
    EventRow,
    Lease,
    NewDelivery,
    Page,
    Receipt,
    Settled,
)
from hookwright.storage._base import (
    DEFAULT_HEALTH,
    FREE_INTERRUPTIONS,
    HOLD_MOST,
    SWEEP_ROWS,
    UNTRIED_MOST,
    Changes,
    ClaimRequest,
    allowed,
    opens_at,
    rate_interval,
)
from hookwright.storage._connections import CallersConnection, check_kind
from hookwright.storage._cursor import decode_cursor, encode_cursor
from hookwright.storage._emitted import stale, used_before
from hookwright.storage._memory_history import MemoryHistory, MemoryLane, MemoryRow, interrupt, new_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._health import HealthPolicy
    from hookwright._models import Emission, Outcome


class MemoryStorage(MemoryHistory):
    """Everything in this object, lost with it: for tests, and for trying things out.

    ```python
    from hookwright import Dispatcher

    async with Dispatcher("memory:") as dispatcher:
        print(await dispatcher.emit("video.processed", {"video_id": "vid_123"}))
    ```
    """

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
            for endpoint_id, lane in self._lanes.items():
                lane.earned = int(lane.health.last_success or False)
                self._shorten(lane, rate_interval(self._endpoints[endpoint_id]))
                for row in lane.rows.values():
                    row.available_at = row.available_at if row.token is None else 0
        return True

    def _shorten(self, lane: MemoryLane, interval: int | None) -> None:
        """Let nothing reach further than it could now: the wall clock may have been set back."""
        now = self._now()
        if lane.hold_until < FOREVER:
            lane.hold_until = min(lane.hold_until, now + HOLD_MOST)
        health = lane.health
        untried = now - (health.last_at or now)
        if health.failing_since is not None and not 0 <= untried <= UNTRIED_MOST:
            lane.health = health._replace(failing_since=now)
        lane.rate_at = min(lane.rate_at, now + max(SECOND, interval or 0))
        lane.rate_until = min(lane.rate_until, lane.rate_at)

    # -- the outbox ---------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        event: EventRow,
        deliveries: Sequence[NewDelivery],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> Receipt:
        """See `Storage.enqueue`: there is no transaction of a caller's to write in."""
        now = self._now()
        if connection is not None:
            check_kind(connection, None, self)
        by_key = None if event.idempotency_key is None else self._keys.get(event.idempotency_key)
        known = event.id if event.id in self._events else by_key
        if known is not None:
            stored, _, count = self._events[known]
            if stored.digest != event.digest:
                raise used_before(event, known, stored.tenant)
            return Receipt(known, count, duplicate=True)
        if endpoints_revision != self._revision:
            raise stale()
        ids = [delivery.id for delivery in deliveries]
        if len(set(ids)) < len(ids) or not self._rows.keys().isdisjoint(ids):
            raise StorageError("a delivery id was used before: make a new one for each delivery")
        count = sum(not delivery.skipped for delivery in deliveries)
        self._events[event.id] = (event, now, count)
        if event.idempotency_key is not None:
            self._keys[event.idempotency_key] = event.id
        rows = [new_row(event, delivery, now) for delivery in deliveries]
        self._event_rows[event.id] = rows
        for row in rows:
            self._rows[row.id] = row
            if row.state is DeliveryState.PENDING:
                self._lanes[row.endpoint_id].rows[row.id] = row
        return Receipt(event.id, count)

    async def enqueue_many(
        self,
        emissions: Sequence[Emission],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> list[Receipt]:
        """See `Storage.enqueue_many`."""
        if connection is not None:
            check_kind(connection, None, self)
        receipts: list[Receipt] = []
        try:
            for event, deliveries in emissions:
                receipts.append(await self.enqueue(event, deliveries, endpoints_revision=endpoints_revision))
        except HookwrightError:
            for receipt in receipts:
                if not receipt.duplicate:
                    self._forget(receipt.event_id)
            raise
        return receipts

    def _forget(self, event_id: str) -> None:
        event, _, _ = self._events.pop(event_id)
        self._keys.pop(event.idempotency_key, None)
        for row in self._event_rows.pop(event_id):
            del self._rows[row.id]
            self._lanes[row.endpoint_id].rows.pop(row.id, None)

    async def claim(self, request: ClaimRequest) -> Claim:
        """See `Storage.claim`."""
        now = self._now()
        leases: list[Lease] = []
        unproven_left, further_left = request.unproven_limit, request.further_limit
        due = [(id, lane) for id, lane in self._lanes.items() if self._first_due(id, lane, request, now)]
        for endpoint_id, lane in sorted(due, key=lambda item: (item[1].served, item[0])):
            doubtful = lane.earned == 0 or endpoint_id in request.slow
            held = request.in_flight.get(endpoint_id, ())
            cap = self._endpoints[endpoint_id].concurrency or request.endpoint_concurrency
            room = min(min(max(1, lane.earned), cap) - len(held), request.limit - len(leases))
            if doubtful:
                room = min(room, unproven_left)
            interval = rate_interval(self._endpoints[endpoint_id])
            if interval is not None:
                room = min(room, allowed(interval, lane.rate_at, now))
            first = 0 if held else 1
            room = min(room, first + further_left)
            taken = {*held, *request.settling}
            claimable = [row for row in self._due_rows(lane, now) if row.id not in taken]
            found = claimable[: max(0, room)]
            further_left -= max(0, len(found) - first)
            if found:
                self._serving += 1
                lane.served = self._serving
                unproven_left -= len(found) if doubtful else 0
                if interval is not None:
                    lane.rate_at = max(lane.rate_at, now) + interval * len(found)
                    lane.rate_until = opens_at(interval, lane.rate_at)
            leases.extend(self._lease(row, lane, request.lease, now) for row in found)
        later = (
            max(lane.hold_until, lane.rate_until, min(row.available_at for row in lane.rows.values()))
            for lane in self._lanes.values()
            if lane.rows
        )
        next_due = min((time for time in later if now < time < FOREVER), default=None)
        return Claim(leases, next_due, self._revision)

    def _first_due(self, endpoint_id: str, lane: MemoryLane, request: ClaimRequest, now: int) -> bool:
        held = request.in_flight.get(endpoint_id, ())
        return max(lane.hold_until, lane.rate_until) <= now and any(
            row.id not in held and row.id not in request.settling for row in self._due_rows(lane, now)
        )

    def _due_rows(self, lane: MemoryLane, now: int) -> list[MemoryRow]:
        return sorted(
            (row for row in lane.rows.values() if row.available_at <= now), key=lambda row: (row.due_since, row.id)
        )

    def _lease(self, row: MemoryRow, lane: MemoryLane, duration: int, now: int) -> Lease:
        taken_over = row.token is not None
        if taken_over:
            row.interruptions += 1
            interrupt(row, now)
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
            since=row.since,
            due_at=row.scheduled_at or row.since,
            number=len(row.attempts) + 1,
            spent=len(row.attempts) - row.budget_from - min(row.interruptions, FREE_INTERRUPTIONS),
            interruptions=row.interruptions,
            taken_over=taken_over,
            proven=lane.earned > 0,
        )

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        """See `Storage.settle`."""
        now = self._now()
        return [await self._settle_one(outcome, policy, now) for outcome in outcomes]

    async def _settle_one(self, outcome: Outcome, policy: HealthPolicy, now: int) -> Settled:
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
        settled = self._update_health(outcome, policy, now)._replace(next_attempt_at=retry_at)
        for name, emission in outcome.alerts:
            if came_true(name, settled.changes, failed=outcome.state is DeliveryState.FAILED):
                lanes = {id for id, lane in self._lanes.items() if lane.sweep is None}
                deliveries = [delivery for delivery in emission.deliveries if delivery.endpoint_id in lanes]
                await self.enqueue(emission.event, deliveries, endpoints_revision=self._revision)
        return settled

    def _update_health(self, outcome: Outcome, policy: HealthPolicy, now: int) -> Settled:
        lane = self._lanes.get(outcome.endpoint_id)
        if lane is None:
            return Settled(held=True)
        changes: list[Change] = []
        failures, since, _, _ = lane.health
        if outcome.counts and outcome.state is DeliveryState.SUCCEEDED:
            changes += [Change.RECOVERED] if failures >= policy.failing_at else []
            lane.health, lane.earned = EndpointHealth(0, None, True, now), min(1024, max(2, lane.earned * 2))
        elif outcome.counts:
            lane.health, lane.earned = EndpointHealth(failures + 1, since or now, False, now), 0
            changes += [Change.FAILING] if failures + 1 == policy.failing_at else []
        if outcome.counts:
            lane.throttles = lane.throttles + 1 if outcome.throttled else 0
        pause = cool_down(lane.throttles, outcome.throttled) if outcome.throttled else 0
        if pause or outcome.hold:
            lane.hold_until = max(lane.hold_until, now + max(pause, outcome.hold))
        reason = policy.reason_to_disable(
            gone=outcome.gone,
            counts=outcome.counts,
            failures=lane.health.consecutive_failures,
            failing_since=lane.health.failing_since,
            now=now,
        )
        is_disabled = self._endpoints[outcome.endpoint_id].state is EndpointState.DISABLED
        if reason and not is_disabled and self._change_state(outcome.endpoint_id, EndpointState.DISABLED, reason, now):
            changes.append(Change.DISABLED)
        return Settled(
            True,
            None,
            lane.earned > 0,
            lane.health.consecutive_failures,
            tuple(changes),
            reason if Change.DISABLED in changes else None,
            lane.sweep is not None,
        )

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        """See `Storage.release`."""
        now = self._now()
        for lease in leases:
            row = self._rows.get(lease.delivery_id)
            if row is None or row.token is None or row.token != lease.token:
                continue
            row.token, row.available_at = None, row.scheduled_at or 0
            if sent:
                interrupt(row, now)
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
                    if row.token is not None:
                        interrupt(row, now)
                    self._end(row, lane.sweep, now)
                    left -= 1
            if not lane.rows and lane.sweep is DeliveryState.CANCELLED:
                del self._lanes[endpoint_id]
            elif not lane.rows:
                lane.sweep = None
        return left == 0

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
        self._lanes[endpoint.id] = MemoryLane(hold_until=held)
        return self._store(endpoint)

    async def update_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """See `Storage.update_endpoint`."""
        stored = await self.get_endpoint(endpoint.id)
        if stored.revision != endpoint.revision:
            raise ConflictError(f"endpoint {endpoint.id} was changed by somebody else meanwhile: read it and repeat")
        if endpoint.rate_limit != stored.rate_limit:
            self._lanes[endpoint.id].rate_at = self._lanes[endpoint.id].rate_until = 0
        return self._store(
            replace(
                endpoint,
                state=stored.state,
                disabled_reason=stored.disabled_reason,
                created_at=stored.created_at,
                health=stored.health,
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

    async def scrub_endpoints(self) -> None:
        """See `Storage.scrub_endpoints`: what was replaced is nowhere."""
        self._now()

    async def get_endpoint(self, endpoint_id: str) -> EndpointRow:
        """See `Storage.get_endpoint`."""
        self._now()
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None or endpoint.deleted:
            raise NotFound(f"there is no endpoint {endpoint_id!r}")
        return replace(endpoint, health=self._lanes[endpoint_id].health)

    async def list_endpoints(self, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
        """See `Storage.list_endpoints`."""
        self._now()
        after = None if cursor is None else decode_cursor(cursor, "endpoints", tenant)
        ids = [
            id
            for id, endpoint in sorted(self._endpoints.items(), reverse=True)
            if not endpoint.deleted
            and (tenant is None or (endpoint.tenant is not ALL_TENANTS and endpoint.tenant == tenant))
            and (after is None or id < after)
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
        if state is EndpointState.ACTIVE:  # a person has looked at it: its failures begin anew
            lane.health, lane.throttles = lane.health._replace(consecutive_failures=0, failing_since=None), 0
        if (endpoint.state, endpoint.disabled_reason) == (state, reason):
            return False
        self._store(replace(endpoint, state=state, disabled_reason=reason, updated_at=now))
        return True
