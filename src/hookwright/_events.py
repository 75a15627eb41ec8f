"""`dispatcher.events`: what was emitted, and removing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import from_datetime
from hookwright._errors import NotFound
from hookwright._models import check_id, check_reader
from hookwright._snapshot import check_aware

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from hookwright._models import Event
    from hookwright.storage._base import Storage


class Events:
    """The events in the outbox. Reached as `dispatcher.events`; works in every process on the storage."""

    def __init__(
        self, storage: Storage, *, check_usable: Callable[[], None], on_cancelled: Callable[[list[str]], None]
    ) -> None:
        self._storage = storage
        self._check_usable = check_usable
        self._on_cancelled = on_cancelled

    async def get(self, event_id: str, *, tenant: str | None = None) -> Event:
        """Return an event with its data, as it was stored. Raises NotFound."""
        self._check_usable()
        event = await self._storage.get_event(check_id("event_id", event_id))
        if check_reader(tenant) is not None and event.tenant != tenant:
            raise NotFound(f"there is no event {event_id!r}")
        return event

    async def expunge(self, event_id: str, *, tenant: str | None = None) -> None:
        """Remove the event's data and attributes and its attempts' responses for good, and leave the record.

        What of it is still waiting is cancelled. On SQLite the bytes are gone from the file and from its WAL when this
        returns. Harmless when repeated. Raises NotFound, or StorageBusy when somebody else's read transaction keeps
        the WAL from being emptied for 5 s: the data is gone from the database all the same, and repeating helps.

        On PostgreSQL it takes a transaction for each thousand deliveries. The first hides the event at once; until its
        turn comes a delivery may still be sent. When this is cancelled or raises midway (a StorageError), repeat it.
        """
        await self.get(event_id, tenant=tenant)
        after: str | None = None
        while True:
            part = await self._storage.expunge(event_id, after)
            self._on_cancelled(part.cancelled)
            if (after := part.after) is None:
                return

    async def prune(self, *, before: datetime) -> int:
        """Delete events emitted before that time, with deliveries and attempts, unless one is pending; say how many.

        Runs in small transactions, so that nothing else waits for long. Raises ValidationFailed without a time zone.
        """
        self._check_usable()
        moment = from_datetime(check_aware("before", before))
        total = 0
        while True:
            pruned = await self._storage.prune(moment)
            if not pruned:
                return total
            total += pruned
