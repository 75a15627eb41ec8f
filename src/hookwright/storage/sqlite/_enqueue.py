"""Enqueue: all the events that wait, with their rows, in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hookwright._errors import ConflictError, HookwrightError, StaleEndpoints
from hookwright._models import Receipt
from hookwright.storage.sqlite._bulk import insert_rows
from hookwright.storage.sqlite._lanes import make_due, revision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from hookwright._models import EventRow, NewDelivery
    from hookwright.storage.sqlite._owner import Database


class Emitted(NamedTuple):
    """The arguments of one `Storage.enqueue`."""

    event: EventRow
    deliveries: Sequence[NewDelivery]
    endpoints_revision: int


def enqueue_many(database: Database, waiting: Sequence[Emitted], now: int) -> list[Receipt]:
    """See `Storage.enqueue_many`. A refusal of one raises, so that nothing of the others stays."""
    answers = enqueue(database, waiting, now)
    for answer in answers:
        if isinstance(answer, HookwrightError):
            raise answer
    return [answer for answer in answers if isinstance(answer, Receipt)]


def enqueue(database: Database, waiting: Sequence[Emitted], now: int) -> list[Receipt | HookwrightError]:
    """Answer each as `Storage.enqueue` says: its receipt, or why it was refused."""
    current = revision(database)
    new: list[Emitted] = []
    answers = [_admit(database, emitted, new, current, now) for emitted in waiting]
    events = [_event_row(emitted, now) for emitted in new if not _is_keyed(emitted.event)]
    insert_rows(database, "hookwright_event", events)
    deliveries = [_delivery_row(emitted.event.id, delivery, now) for emitted in new for delivery in emitted.deliveries]
    insert_rows(database, _DELIVERY, deliveries)
    due = ((d.endpoint_id, d.available_at) for emitted in new for d in emitted.deliveries if not d.skipped)
    make_due(database, due, now)
    return answers


def _admit(
    database: Database, emitted: Emitted, new: list[Emitted], current: int, now: int
) -> Receipt | HookwrightError:
    """Decide about one, and put it with the new ones unless it is refused or a duplicate."""
    event = emitted.event
    if _is_keyed(event):
        try:
            duplicate = _duplicate(database, event)
        except ConflictError as conflict:
            return conflict
        if duplicate is not None:
            return duplicate
    if emitted.endpoints_revision != current:
        return StaleEndpoints("endpoints changed since they were matched: match again and repeat")
    if _is_keyed(event):  # at once, so that the next one in this group with the same key finds it
        insert_rows(database, "hookwright_event", [_event_row(emitted, now)])
    new.append(emitted)
    return Receipt(event.id, _count(emitted))


def _is_keyed(event: EventRow) -> bool:
    """Whether the application may emit it again. Ids of ours are drawn from 2 ** 80: only the unique index looks."""
    return event.digest is not None or event.idempotency_key is not None


def _duplicate(database: Database, event: EventRow) -> Receipt | None:
    # Two look-ups by unique index: an OR would scan.
    select = "SELECT id, digest, delivery_count, tenant FROM hookwright_event WHERE "
    found = database.execute(select + "id = ?", (event.id,)).fetchone()
    if found is None and event.idempotency_key is not None:
        found = database.execute(select + "idempotency_key = ?", (event.idempotency_key,)).fetchone()
    if found is None:
        return None
    if found[1] != event.digest:
        key = "event_id" if found[0] == event.id else "idempotency_key"
        # Another tenant's ids are not told.
        which = f" (event {found[0]})" if found[3] == event.tenant else ""
        raise ConflictError(f"{key}: used before for another type, data, target or tenant{which}; use a new one")
    return Receipt(found[0], found[2], duplicate=True)


_DELIVERY = "hookwright_delivery (id, event_id, endpoint_id, state, available_at, created_at, finished_at)"


def _event_row(emitted: Emitted, now: int) -> tuple[Any, ...]:
    event = emitted.event
    return (
        event.id,
        event.type,
        event.tenant,
        event.data,
        event.attributes,
        event.occurred_at,
        now,
        event.idempotency_key,
        event.digest,
        _count(emitted),
        event.trace_context,
        None,
    )


def _count(emitted: Emitted) -> int:
    return sum(not delivery.skipped for delivery in emitted.deliveries)


def _delivery_row(event_id: str, delivery: NewDelivery, now: int) -> tuple[Any, ...]:
    if delivery.skipped:
        return (delivery.id, event_id, delivery.endpoint_id, "skipped", None, now, now)
    return (delivery.id, event_id, delivery.endpoint_id, "pending", delivery.available_at, now, None)
