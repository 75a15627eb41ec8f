"""Enqueue: all the events that wait, with their rows, in one statement that appends and changes nothing.

So an application's transaction that stays open after an emit blocks neither another's emit nor a claim. Two emits with
the same id or idempotency key wait for each other, for which the second has `lock_timeout`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hookwright._errors import HookwrightError
from hookwright._models import Receipt
from hookwright.storage._emitted import stale, used_before
from hookwright.storage.postgres._database import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright.storage._emitted import Emitted
    from hookwright.storage.postgres._database import Database


READ_COMMITTED = "current_setting('transaction_isolation') = 'read committed'"

# The order of ids and keys is that in which everybody inserts them: two that store the same ones wait in a line. What
# is already there is left out, and looked at afterwards.
ENQUEUE = """
WITH current AS MATERIALIZED (
    SELECT value AS revision, hookwright.clock() AS now,
        set_config('lock_timeout', coalesce($18::text, current_setting('lock_timeout')), true)
    FROM hookwright.meta WHERE key = 'endpoints_revision'
), new AS (
    INSERT INTO hookwright.event (id, type, tenant, data, attributes, occurred_at, created_at, idempotency_key, digest,
        delivery_count, trace_context)
    SELECT e.id, e.type, e.tenant, e.data, e.attributes, e.occurred_at, current.now, e.key, e.digest, e.count, e.trace
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::bigint[], $7::text[], $8::bytea[],
        $9::int[], $10::text[], $11::bigint[])
        AS e(id, type, tenant, data, attributes, occurred_at, key, digest, count, trace, revision), current
    WHERE coalesce(e.revision, current.revision) = current.revision
    ORDER BY e.key, e.id
    ON CONFLICT DO NOTHING
    RETURNING id
), rows AS (
    SELECT d.id, d.event_id, d.endpoint_id, d.available_at, d.skipped
    FROM unnest($12::text[], $13::text[], $14::text[], $15::bigint[], $16::bool[])
        AS d(id, event_id, endpoint_id, available_at, skipped)
    WHERE (d.event_id IN (SELECT id FROM new)) IS TRUE  -- looked up, not joined: that would compare all with all
), stored AS (
    INSERT INTO hookwright.delivery (id, event_id, endpoint_id, state, available_at, created_at, finished_at)
    SELECT id, event_id, endpoint_id, CASE WHEN skipped THEN 'skipped' ELSE 'pending' END,
        CASE WHEN NOT skipped THEN available_at END, current.now, CASE WHEN skipped THEN current.now END
    FROM rows, current
), woken AS (
    INSERT INTO hookwright.wake (endpoint_id, available_at)
    SELECT endpoint_id, min(available_at) FROM rows WHERE NOT skipped GROUP BY endpoint_id
)
SELECT (SELECT array_agg(id) FROM new),
    CASE WHEN $17::text IS NOT NULL AND EXISTS (SELECT 1 FROM rows WHERE NOT skipped)
        THEN pg_notify($17, '') IS NULL END
FROM current
"""

# Whose id was ours has no digest: its data is compared, when it is given again after CommitUnknown.
_SEEN = "id, digest, delivery_count, tenant, idempotency_key, type, CASE WHEN digest IS NULL THEN data END"

_FOUND = f"""
SELECT {_SEEN} FROM hookwright.event WHERE id = ANY($1::text[]) UNION
SELECT {_SEEN} FROM hookwright.event WHERE idempotency_key = ANY($2::text[])
"""


HURRIED = "50"
"""Milliseconds that a `hurried` one waits for a transaction with the same id or key: as long as a commit may take."""


async def enqueue(
    database: Database, waiting: Sequence[Emitted], channel: str | None, *, hurried: bool = False
) -> list[Receipt | HookwrightError]:
    """Answer each as `Storage.enqueue` says: its receipt, or why it was refused. With a channel, tell of new rows."""
    ids: dict[str, int] = {}
    again = next((n for n, emitted in enumerate(waiting) if ids.setdefault(emitted.event.id, n) != n), None)
    if again is not None:  # both would get the rows of both: what is repeated comes in a statement of its own
        before = await enqueue(database, waiting[:again], channel, hurried=hurried)
        return before + await enqueue(database, waiting[again:], channel, hurried=hurried)
    limit = HURRIED if hurried else None
    stored = await database.value(ENQUEUE, *_arguments(waiting, channel), limit)
    return await _answers(database, waiting, set(stored or ()))


async def _answers(database: Database, waiting: Sequence[Emitted], new: set[str]) -> list[Receipt | HookwrightError]:
    found: dict[str, Any] = {}
    if len(new) < len(waiting):
        found = await _found(database, [emitted for emitted in waiting if emitted.event.id not in new])
    answers: list[Receipt | HookwrightError] = []
    for emitted in waiting:
        event = emitted.event
        if event.id in new:
            found[event.id] = (
                event.id,
                event.digest,
                emitted.delivery_count,
                event.tenant,
                event.idempotency_key,
                "",
                None,
            )
            if event.idempotency_key is not None:
                found[f"key {event.idempotency_key}"] = found[event.id]
            answers.append(Receipt(event.id, emitted.delivery_count))
        else:
            answers.append(_refused(emitted, found))
    return answers


async def enqueue_all(
    database: Database, waiting: Sequence[Emitted], channel: str | None, *, hurried: bool = False
) -> list[Receipt]:
    """See `Storage.enqueue_many`. A refusal of one raises, so that nothing of the others stays."""
    return _all(await enqueue(database, waiting, channel, hurried=hurried))


_EMIT = """
SELECT hookwright.emit_1($1::text, $2::text, $3::text, $4::bytea, $5::text, $6::bigint, $7::text, $8::bytea,
    $9::int, $10::text, $11::bigint, $12::text[], $13::text[], $14::bigint[], $15::bool[], $16::text, $17::bool)
"""


async def enqueue_one(
    database: Database, emitted: Emitted, channel: str | None, *, checked: bool = False
) -> Receipt | None:
    """Store one event in somebody else's transaction, as `Storage.enqueue` does.

    None, and nothing is written: its snapshot may be older than the emit, so that the endpoint counter must be looked
    at from beside it, unless that is `checked`.
    """
    rows = [(row.id, row.endpoint_id, row.available_at, row.skipped) for row in emitted.deliveries]
    stored = await database.value(_EMIT, *_event(emitted), *columns_of(rows, 4), channel, checked)
    if stored < 0:
        return None
    if stored:
        return Receipt(emitted.event.id, emitted.delivery_count)
    return _all(await _answers(database, [emitted], set()))[0]


def _all(answers: Sequence[Receipt | HookwrightError]) -> list[Receipt]:
    for answer in answers:
        if isinstance(answer, HookwrightError):
            raise answer
    return [answer for answer in answers if isinstance(answer, Receipt)]


async def mark_own(
    database: Database, waiting: Sequence[Emitted], answers: list[Receipt | HookwrightError]
) -> list[Receipt | HookwrightError]:
    """Tell duplicates from what we ourselves stored before, by a commit whose answer never came."""
    firsts = [emitted.deliveries[0].id for emitted in waiting if emitted.deliveries]
    # One without rows is known by its time, to the microsecond.
    alone = [emitted.event for emitted in waiting if not emitted.deliveries]
    found = await database.fetch(_OURS, firsts, [event.id for event in alone], [event.occurred_at for event in alone])
    ours = {row[0] for row in found}

    def own(emitted: Emitted) -> bool:
        mark = emitted.deliveries[0].id if emitted.deliveries else emitted.event.id
        return mark in ours or emitted.event.digest is None

    return [
        replace(answer, duplicate=False) if isinstance(answer, Receipt) and own(emitted) else answer
        for emitted, answer in zip(waiting, answers, strict=True)
    ]


_OURS = """
SELECT id FROM hookwright.delivery WHERE id = ANY($1::text[]) UNION ALL
SELECT e.id FROM unnest($2::text[], $3::bigint[]) AS alone (id, at)
JOIN hookwright.event AS e ON e.id = alone.id AND e.occurred_at = alone.at
"""


async def _found(database: Database, missing: Sequence[Emitted]) -> dict[str, Any]:
    ids = [emitted.event.id for emitted in missing]
    keys = [emitted.event.idempotency_key for emitted in missing if emitted.event.idempotency_key is not None]
    rows = await database.fetch(_FOUND, ids, keys)
    return {row[0]: row for row in rows} | {f"key {row[4]}": row for row in rows if row[4] is not None}


def _refused(emitted: Emitted, found: dict[str, Any]) -> Receipt | HookwrightError:
    """Return why nothing was stored of one: it is there already, something else is, or endpoints changed."""
    event = emitted.event
    there = found.get(event.id) or found.get(f"key {event.idempotency_key}")
    if there is None:
        return stale()
    id, digest, delivery_count, tenant, _, type, data = there
    if digest != event.digest and (id, type, data, tenant) != (event.id, event.type, event.data, event.tenant):
        return used_before(event, id, tenant)
    return Receipt(id, delivery_count, duplicate=True)


def _arguments(waiting: Sequence[Emitted], channel: str | None) -> tuple[Any, ...]:
    """Return what ENQUEUE takes: the columns of the events, those of their rows, and whom to tell."""
    events = [_event(emitted) for emitted in waiting]
    rows = [
        (row.id, emitted.event.id, row.endpoint_id, row.available_at, row.skipped)
        for emitted in waiting
        for row in emitted.deliveries
    ]
    return (*columns_of(events, 11), *columns_of(rows, 5), channel)


def _event(emitted: Emitted) -> tuple[Any, ...]:
    event = emitted.event
    return (
        event.id,
        event.type,
        event.tenant,
        event.data,
        event.attributes,
        event.occurred_at,
        event.idempotency_key,
        event.digest,
        emitted.delivery_count,
        event.trace_context,
        emitted.endpoints_revision,
    )
