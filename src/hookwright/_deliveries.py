"""`dispatcher.deliveries`: what became of the events, and waiting for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hookwright._clock import from_datetime
from hookwright._errors import NotFound, ValidationFailed, WaitTimeout
from hookwright._models import check_limit
from hookwright.storage._base import DeliveryFilter

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from hookwright._clock import Clock
    from hookwright._models import Attempt, Delivery, DeliveryState, Event, Page
    from hookwright.storage._base import Storage

_POLL = 0.25
"""Seconds between looks at the storage while waiting: another process may be the one that delivers."""


class Deliveries:
    """The history of deliveries. Reached as `dispatcher.deliveries`; works in every process on the storage."""

    def __init__(self, storage: Storage, *, clock: Clock, check_usable: Callable[[], None]) -> None:
        self._storage = storage
        self._clock = clock
        self._check_usable = check_usable
        self._waiters: dict[str, set[asyncio.Event]] = {}

    async def get(self, delivery_id: str, *, tenant: str | None = None) -> Delivery:
        """Return a delivery. Raises NotFound."""
        self._check_usable()
        delivery = await self._storage.get_delivery(delivery_id)
        if tenant is not None and (await self._storage.get_event(delivery.event_id)).tenant != tenant:
            raise NotFound(f"there is no delivery {delivery_id!r}")
        return delivery

    async def list(
        self,
        *,
        status: DeliveryState | None = None,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        tenant: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[Delivery]:
        """Return deliveries, newest first, `limit` (1 to 500) to a page; go on with `next_cursor` and the same filters.

        Raises ValidationFailed for a limit out of range, a `since` without a time zone, or a cursor of another list.
        """
        self._check_usable()
        where = _filter(status, endpoint_id, event_id, event_type, since, tenant)
        return await self._storage.list_deliveries(where, limit=check_limit(limit), cursor=cursor)

    async def count(
        self,
        *,
        status: DeliveryState | None = None,
        endpoint_id: str | None = None,
        event_id: str | None = None,
        event_type: str | None = None,
        since: datetime | None = None,
        tenant: str | None = None,
    ) -> int:
        """Return how many deliveries `list` would list with the same filters."""
        self._check_usable()
        where = _filter(status, endpoint_id, event_id, event_type, since, tenant)
        return await self._storage.count_deliveries(where)

    async def attempts(self, delivery_id: str, *, tenant: str | None = None) -> Sequence[Attempt]:
        """Return a delivery's attempts, oldest first. Raises NotFound."""
        await self.get(delivery_id, tenant=tenant)
        return await self._storage.attempts(delivery_id)

    async def event(self, event_id: str, *, tenant: str | None = None) -> Event:
        """Return an event with its data, as it was stored. Raises NotFound."""
        self._check_usable()
        event = await self._storage.get_event(event_id)
        if tenant is not None and event.tenant != tenant:
            raise NotFound(f"there is no event {event_id!r}")
        return event

    async def wait(self, event_id: str, *, timeout: float | None = None) -> Sequence[Delivery]:
        """Wait until all deliveries of the event have ended, and return them; at once when it has none.

        Raises WaitTimeout after `timeout` seconds (None: never); the deliveries go on. Raises NotFound.
        """
        self._check_usable()
        await self._storage.get_event(event_id)
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


def _filter(
    state: DeliveryState | None,
    endpoint_id: str | None,
    event_id: str | None,
    event_type: str | None,
    since: datetime | None,
    tenant: str | None,
) -> DeliveryFilter:
    if since is not None and since.tzinfo is None:
        raise ValidationFailed("since", "must have a time zone, for example datetime.now(UTC)")
    return DeliveryFilter(
        state=state,
        endpoint_id=endpoint_id,
        event_id=event_id,
        event_type=event_type,
        since=None if since is None else from_datetime(since),
        tenant=tenant,
    )
