"""One emit on its way into a storage, and what is said when it is refused: the same for every database."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hookwright._errors import ConflictError, StaleEndpoints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import EventRow, NewDelivery


class Emitted(NamedTuple):
    """The arguments of one `Storage.enqueue`. `endpoints_revision` None: it is known to be the latest."""

    event: EventRow
    deliveries: Sequence[NewDelivery]
    endpoints_revision: int | None

    @property
    def delivery_count(self) -> int:
        """How many of its rows are sent: those that are skipped are only recorded."""
        return sum(not delivery.skipped for delivery in self.deliveries)


def stale() -> StaleEndpoints:
    """Return the error for an event that was matched against other endpoints than there are now."""
    return StaleEndpoints("endpoints changed since they were matched: match again and repeat")


def used_before(event: EventRow, id: str, tenant: str | None) -> ConflictError:
    """Return the error for an id or key of the application's that another event has, `id` of `tenant`."""
    key = "event_id" if id == event.id else "idempotency_key"
    # Another tenant's ids are not told.
    which = f" (event {id})" if tenant == event.tenant else ""
    return ConflictError(f"{key}: used before for another type, data, target or tenant{which}; use a new one")
