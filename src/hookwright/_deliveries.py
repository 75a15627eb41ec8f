"""`dispatcher.deliveries`: what became of the events, and waiting for it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from hookwright._clock import from_datetime
from hookwright._errors import ConflictError, NotFound, ValidationFailed, WaitTimeout
from hookwright._explain import MASK, match_of
from hookwright._models import (
    TEST_TYPE,
    DeliveryState,
    EndpointState,
    EventRow,
    NewDelivery,
    Payload,
    check_id,
    check_limit,
    check_reader,
)
from hookwright._prepare import lease_of
from hookwright._snapshot import check_aware
from hookwright.storage._base import DeliveryFilter

if TYPE_CHECKING:
    import builtins
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from hookwright._clock import Clock
    from hookwright._matching import EndpointCache
    from hookwright._models import Attempt, Delivery, Page
    from hookwright._prepare import Preparer
    from hookwright.storage._base import Storage

    Status = DeliveryState | str | Sequence[DeliveryState | str] | None

_POLL = 0.25
"""Seconds between looks at the storage while waiting: another process may be the one that delivers."""


REPLAYED = (DeliveryState.FAILED, DeliveryState.SKIPPED, DeliveryState.CANCELLED)
"""What `replay` sends again unless told otherwise."""

_BATCH = 200
"""Deliveries that bulk operations change in one transaction: a bigger one would make others wait."""


class Deliveries:
    """The history of deliveries, and what can be done to them. Reached as `dispatcher.deliveries`.

    Works in every process on the storage. By-id verbs take `tenant=` and answer NotFound for another tenant's. To read,
    `tenant=None` means every tenant: an application with many customers gives it always.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        preparer: Preparer,
        cache: EndpointCache,
        clock: Clock,
        check_usable: Callable[[], None],
        on_requeued: Callable[[], None],
        on_cancelled: Callable[[builtins.list[str]], None],
    ) -> None:
        self._storage = storage
        self._preparer = preparer
        self._cache = cache
        self._clock = clock
        self._check_usable = check_usable
        self._on_requeued = on_requeued
        self._on_cancelled = on_cancelled
        self._waiters: dict[str, set[asyncio.Event]] = {}

    async def get(self, delivery_id: str, *, tenant: str | None = None) -> Delivery:
        """Return a delivery. Raises NotFound."""
        self._check_usable()
        delivery = await self._storage.get_delivery(check_id("delivery_id", delivery_id))
        if check_reader(tenant) is not None and (await self._storage.get_event(delivery.event_id)).tenant != tenant:
            raise NotFound(f"there is no delivery {delivery_id!r}")
        return delivery

    async def list(
        self,
        *,
        status: Status = None,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[Delivery]:
        """Return deliveries, newest first, `limit` (1 to 500) to a page; go on with `next_cursor` and the same filters.

        `status` is one state or several. `since` and `until` (exclusive) are about when they were emitted. Narrowing
        by type or tenant alone looks at every delivery there is: combine them with an endpoint, an event or a state.

        Raises ValidationFailed for a limit out of range, a time without a zone, or a cursor of another list.
        """
        self._check_usable()
        where = _filter(status, endpoint_id, event_id, event_type, since, until, tenant)
        return await self._storage.list_deliveries(where, limit=check_limit(limit), cursor=cursor)

    async def count(
        self,
        *,
        status: Status = None,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
    ) -> int:
        """Return how many deliveries `list` would list with the same filters, at a cost that grows with them."""
        self._check_usable()
        where = _filter(status, endpoint_id, event_id, event_type, since, until, tenant)
        return await self._storage.count_deliveries(where)

    async def retry(self, delivery_id: str, *, force: bool = False, tenant: str | None = None) -> Delivery:
        """Send a delivery again, now, under the same event id; its retry budget starts anew, its numbering goes on.

        One that waits for its next attempt is sent now. Sending again what has succeeded needs `force=True`.

        Raises NotFound, or ConflictError when it is being attempted right now, has succeeded, its endpoint is disabled
        or deleted, or its event expunged.
        """
        delivery = await self.get(delivery_id, tenant=tenant)
        if delivery.state is DeliveryState.SUCCEEDED and not force:
            raise ConflictError(f"delivery {delivery_id} has succeeded: to send it again, give force=True")
        if not await self._requeue([delivery_id], [delivery.state]):
            raise ConflictError(await self._why_not(delivery))
        return await self._storage.get_delivery(delivery_id)

    async def _requeue(self, delivery_ids: builtins.list[str], states: Sequence[DeliveryState]) -> int:
        try:
            return await self._storage.requeue(delivery_ids, states)
        finally:
            self._on_requeued()  # cancelled or failed, it may be done all the same: nobody else would send them

    async def _why_not(self, delivery: Delivery) -> str:
        event = await self._storage.get_event(delivery.event_id)
        if event.type == TEST_TYPE:
            return f"delivery {delivery.id} was a test: use endpoints.test() again"
        if event.expunged_at is not None:
            return f"event {event.id} was expunged: there is nothing left to send"
        try:
            endpoint = await self._storage.get_endpoint(delivery.endpoint_id)
        except NotFound:
            return f"endpoint {delivery.endpoint_id} was deleted"
        if endpoint.state is EndpointState.DISABLED:
            return f"endpoint {endpoint.id} is disabled: enable it first"
        return f"delivery {delivery.id} is being attempted right now: wait for what comes of it"

    async def cancel(self, delivery_id: str, *, tenant: str | None = None) -> Delivery:
        """End a pending delivery, at once. What is in flight of it is recorded as interrupted, and changes nothing.

        Raises NotFound, or ConflictError when it has ended already.
        """
        delivery = await self.get(delivery_id, tenant=tenant)
        cancelled = await self._storage.cancel([delivery_id])
        if not cancelled:
            raise ConflictError(f"delivery {delivery_id} has ended already: it is {delivery.state.value}")
        self._on_cancelled(cancelled)
        return await self._storage.get_delivery(delivery_id)

    async def replay(
        self,
        *,
        status: Status = REPLAYED,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
    ) -> int:
        """Send again all deliveries that `list` would list with these filters; return how many.

        By default those that failed, were skipped (the endpoint was disabled) or cancelled; `count` with the same
        filters says how many that are. Deliveries of disabled or deleted endpoints and of expunged events are left
        out. Runs in small batches, so that nobody waits for it; if it is cancelled, what was requeued stays so.

        Raises ValidationFailed when pending deliveries are asked for, or none; ConflictError when the one endpoint that
        is named is disabled, NotFound when it is unknown.
        """
        self._check_usable()
        states = _states(status)
        if not states or DeliveryState.PENDING in states:
            raise ValidationFailed("status", "must name what has ended: failed, skipped, cancelled or succeeded")

        if endpoint_id is not None:
            endpoint = await self._storage.get_endpoint(check_id("endpoint_id", endpoint_id))
            if endpoint.state is EndpointState.DISABLED:
                raise ConflictError(f"endpoint {endpoint_id} is disabled: enable it first")

        async def again(ids: builtins.list[str]) -> int:
            return await self._requeue(ids, states)

        return await self._in_batches(again, _filter(status, endpoint_id, event_id, event_type, since, until, tenant))

    async def cancel_all(
        self,
        *,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
    ) -> int:
        """Cancel all pending deliveries that `list` would list with these filters; return how many."""

        self._check_usable()

        async def end(ids: builtins.list[str]) -> int:
            cancelled = await self._storage.cancel(ids)
            self._on_cancelled(cancelled)
            return len(cancelled)

        where = _filter(DeliveryState.PENDING, endpoint_id, event_id, event_type, since, until, tenant)
        return await self._in_batches(end, where)

    async def _in_batches(self, change: Callable[[builtins.list[str]], Awaitable[int]], where: DeliveryFilter) -> int:
        total, cursor = 0, None
        while True:
            page = await self._storage.list_deliveries(where, limit=_BATCH, cursor=cursor)
            if page.items:
                total += await change([delivery.id for delivery in page.items])
            cursor = page.next_cursor
            if cursor is None:
                return total

    async def payload(self, delivery_id: str, *, tenant: str | None = None) -> Payload:
        """Return what a delivery sends: the body exactly, and the headers as they would be now, secrets masked.

        Raises NotFound, or ConflictError when there is nothing to show: the endpoint was deleted, the event expunged,
        or the body cannot be rendered.
        """
        delivery = await self.get(delivery_id, tenant=tenant)
        event = await self._storage.get_event(delivery.event_id)
        await self._cache.refresh()
        endpoint = self._cache.get(delivery.endpoint_id)
        if event.expunged_at is not None or endpoint is None:
            raise ConflictError("there is no payload: " + await self._why_not(delivery))
        attempts = await self._storage.attempts(delivery_id)
        now = self._clock.now()
        row = EventRow(event.id, event.type, event.data, from_datetime(event.occurred_at), event.tenant)
        lease = lease_of(row, NewDelivery(delivery_id, delivery.endpoint_id), now)
        lease = lease._replace(number=max(1, len(attempts)))
        match = match_of(self._preparer, lease, endpoint)
        if not match.headers:
            raise ConflictError(f"there is no payload: {match.problem}")
        sent = [attempt.body_sha256 for attempt in attempts if attempt.body_sha256 is not None]
        signed = self._preparer.signature_names(endpoint)
        return Payload(
            url=match.url,
            headers=tuple((name, MASK if name.lower() in signed else value) for name, value in match.headers),
            body=match.body,
            changed=None if not sent else sent[-1] != hashlib.sha256(match.body).hexdigest(),
        )

    async def attempts(self, delivery_id: str, *, tenant: str | None = None) -> Sequence[Attempt]:
        """Return a delivery's attempts, oldest first. Raises NotFound."""
        await self.get(delivery_id, tenant=tenant)
        return await self._storage.attempts(delivery_id)

    async def wait(
        self, event_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> Sequence[Delivery]:
        """Wait until all deliveries of the event have ended, and return them; at once when it has none.

        Raises WaitTimeout after `timeout` seconds of the dispatcher's clock (None: never; under a VirtualClock, advance
        it); the deliveries go on. Raises NotFound.
        """
        self._check_usable()
        event = await self._storage.get_event(check_id("event_id", event_id))
        if check_reader(tenant) is not None and event.tenant != tenant:
            raise NotFound(f"there is no event {event_id!r}")
        until = None if timeout is None else self._clock.now() + round(timeout * 1_000_000)
        ended = asyncio.Event()
        self._waiters.setdefault(event_id, set()).add(ended)
        try:
            while True:
                ended.clear()
                deliveries = await self._all_of(event_id)
                if all(delivery.state.final for delivery in deliveries):
                    return deliveries
                left = _POLL if until is None else min(_POLL, (until - self._clock.now()) / 1_000_000)
                if left <= 0:
                    pending = sum(not delivery.state.final for delivery in deliveries)
                    raise WaitTimeout(f"{pending} of {len(deliveries)} deliveries of {event_id} have not ended yet")
                await self._clock.wait_for(ended, left)
        finally:
            self._forget(event_id, ended)

    def note_ended(self, event_id: str | None) -> None:
        """Wake whoever waits for this event, or for any (None)."""
        for key in [event_id] if event_id is not None else [*self._waiters]:
            for ended in self._waiters.get(key, ()):
                ended.set()

    def _forget(self, event_id: str, ended: asyncio.Event) -> None:
        self._waiters[event_id].discard(ended)
        if not self._waiters[event_id]:
            del self._waiters[event_id]

    async def _all_of(self, event_id: str) -> Sequence[Delivery]:
        found: builtins.list[Delivery] = []
        cursor = None
        while True:
            page = await self._storage.list_deliveries(DeliveryFilter(event_id=event_id), limit=500, cursor=cursor)
            found.extend(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return found


def _states(status: Status) -> tuple[DeliveryState, ...]:
    given = [status] if isinstance(status, str) else list(status or ())
    try:
        return tuple(DeliveryState(state) for state in given)
    except ValueError:
        known = ", ".join(state.value for state in DeliveryState)
        raise ValidationFailed("status", f"must be one of {known}, or several of them, not {status!r}") from None


def _filter(
    status: Status,
    endpoint_id: str | None,
    event_id: str | None,
    event_type: str | None,
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
) -> DeliveryFilter:
    for name, value in (
        ("endpoint_id", endpoint_id),
        ("event_id", event_id),
        ("event_type", event_type),
    ):
        if value is not None:
            check_id(name, value)
    return DeliveryFilter(
        states=_states(status),
        endpoint_id=endpoint_id,
        event_id=event_id,
        event_type=event_type,
        since=None if since is None else from_datetime(check_aware("since", since)),
        until=None if until is None else from_datetime(check_aware("until", until)),
        tenant=check_reader(tenant),
    )
