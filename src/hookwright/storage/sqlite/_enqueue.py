"""Enqueue: all the events that wait, with their rows, in one go.

What is asked and written is a generator of statements that is sent their rows. Our own connection runs them in its
thread without a pause; through a connection of the caller's they go one by one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hookwright._errors import ConflictError, HookwrightError
from hookwright._models import Receipt
from hookwright.storage._emitted import stale, used_before
from hookwright.storage.sqlite._bulk import inserts
from hookwright.storage.sqlite._lanes import due, making_due, revision

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import Any, TypeVar

    from hookwright._models import EventRow, NewDelivery
    from hookwright.storage._emitted import Emitted
    from hookwright.storage.sqlite._bulk import Statement
    from hookwright.storage.sqlite._owner import Database

    T = TypeVar("T")
    Steps = Generator[Statement, Sequence[Sequence[Any]], T]


def enqueue_many(database: Database, waiting: Sequence[Emitted], now: int) -> list[Receipt]:
    """See `Storage.enqueue_many`. A refusal of one raises, so that nothing of the others stays."""
    answers = enqueue(database, waiting, now)
    for answer in answers:
        if isinstance(answer, HookwrightError):
            raise answer
    return [answer for answer in answers if isinstance(answer, Receipt)]


def enqueue(database: Database, waiting: Sequence[Emitted], now: int) -> list[Receipt | HookwrightError]:
    """Answer each as `Storage.enqueue` says: its receipt, or why it was refused."""
    steps = enqueueing(waiting, revision(database), now)
    try:
        statement = next(steps)
        while True:
            statement = steps.send(database.execute(*statement).fetchall())
    except StopIteration as end:
        answers: list[Receipt | HookwrightError] = end.value
        return answers


def enqueueing(waiting: Sequence[Emitted], current: int, now: int) -> Steps[list[Receipt | HookwrightError]]:
    """Return the steps of `enqueue`, given the endpoint counter as it is in their transaction."""
    new: list[Emitted] = []
    answers: list[Receipt | HookwrightError] = []
    for emitted in waiting:
        if _is_keyed(emitted.event):
            answers.append((yield from _admit_keyed(emitted, new, current, now)))
        else:
            answers.append(_admit(emitted, new, current))
    events = [_event_row(emitted, now) for emitted in new if not _is_keyed(emitted.event)]
    yield from inserts("hookwright_event", events)
    deliveries = [_delivery_row(emitted.event.id, delivery, now) for emitted in new for delivery in emitted.deliveries]
    yield from inserts(_DELIVERY, deliveries)
    yield from making_due(
        ((d.endpoint_id, d.available_at) for emitted in new for d in emitted.deliveries if not d.skipped), now
    )
    return answers


STALE = "hookwright: stale endpoints"
"""What the statement of `in_one` fails with when it was matched against other endpoints than there are now."""


def in_one(emitted: Emitted, now: int) -> Statement | None:
    """Return one statement that does what `enqueueing` does for one event, or fails and does nothing.

    None: it takes several, for an event that may be a duplicate, or whose deliveries are not all for the same time.
    `hookwright_emit` is a view; its trigger does the work.
    """
    event = emitted.event
    times = {delivery.available_at for delivery in emitted.deliveries if not delivery.skipped}
    pending = {delivery.id: delivery.endpoint_id for delivery in emitted.deliveries if not delivery.skipped}
    skipped = {delivery.id: delivery.endpoint_id for delivery in emitted.deliveries if delivery.skipped}
    if _is_keyed(event) or len(times) > 1 or len(pending) + len(skipped) < len(emitted.deliveries):
        return None
    available_at = times.pop() if times else 0
    return _IN_ONE, (
        emitted.endpoints_revision,
        event.id,
        event.type,
        event.tenant,
        event.data,
        event.attributes,
        event.occurred_at,
        now,
        len(pending),
        event.trace_context,
        json.dumps(pending),
        available_at,
        due(available_at, now),
        json.dumps(skipped),
    )


_IN_ONE = f"INSERT INTO hookwright_emit VALUES ({', '.join('?' * 14)})"


def _admit(emitted: Emitted, new: list[Emitted], current: int) -> Receipt | HookwrightError:
    """Decide about one, and put it with the new ones unless it is refused or a duplicate."""
    if emitted.endpoints_revision != current:
        return stale()
    new.append(emitted)
    return receipt(emitted)


def receipt(emitted: Emitted) -> Receipt:
    """Return the receipt of an event that is new."""
    return Receipt(emitted.event.id, emitted.delivery_count)


def _admit_keyed(emitted: Emitted, new: list[Emitted], current: int, now: int) -> Steps[Receipt | HookwrightError]:
    try:
        duplicate = yield from _duplicate(emitted.event)
    except ConflictError as conflict:
        return conflict
    if duplicate is not None:
        return duplicate
    answer = _admit(emitted, new, current)
    if isinstance(answer, Receipt):  # at once, so that the next one in this group with the same key finds it
        yield from inserts("hookwright_event", [_event_row(emitted, now)])
    return answer


def _is_keyed(event: EventRow) -> bool:
    """Whether the application may emit it again. Ids of ours are drawn from 2 ** 80: only the unique index looks."""
    return event.digest is not None or event.idempotency_key is not None


def _duplicate(event: EventRow) -> Steps[Receipt | None]:
    # Two look-ups by unique index: an OR would scan.
    select = "SELECT id, digest, delivery_count, tenant FROM hookwright_event WHERE "
    rows = yield select + "id = ?", (event.id,)
    if not rows and event.idempotency_key is not None:
        rows = yield select + "idempotency_key = ?", (event.idempotency_key,)
    if not rows:
        return None
    found = rows[0]
    if found[1] != event.digest:
        raise used_before(event, found[0], found[3])
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
        emitted.delivery_count,
        event.trace_context,
        None,
    )


def _delivery_row(event_id: str, delivery: NewDelivery, now: int) -> tuple[Any, ...]:
    if delivery.skipped:
        return (delivery.id, event_id, delivery.endpoint_id, "skipped", None, now, now)
    return (delivery.id, event_id, delivery.endpoint_id, "pending", delivery.available_at, now, None)
