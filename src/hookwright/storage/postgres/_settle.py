"""Settle: lock the lanes of all that ended, in order, compare the tokens, and write it all with one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookwright._clock import FOREVER
from hookwright._health import Change, came_true
from hookwright._models import DeliveryState, Settled
from hookwright.storage._emitted import Emitted
from hookwright.storage._lane_health import LANE_COLUMNS, LaneHealth
from hookwright.storage._rows import attempt_row
from hookwright.storage.postgres._database import columns_of
from hookwright.storage.postgres._endpoints import set_state
from hookwright.storage.postgres._enqueue import enqueue
from hookwright.storage.postgres._lanes import TURN_BITS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from hookwright._health import HealthPolicy
    from hookwright._models import Outcome
    from hookwright.storage.postgres._database import Database

_LANES = f"""
SELECT {LANE_COLUMNS} FROM hookwright.lane WHERE endpoint_id = ANY($1::text[]) ORDER BY endpoint_id FOR UPDATE
"""

# After the lock: a lease that was read before it may be another one by now, and an endpoint be deleted.
_LEASES = """
SELECT hookwright.clock(), array_agg(held.delivery_id), array_agg(held.token), array_agg(held.attempt_count), (
    SELECT array_agg(p.id) FROM hookwright.endpoint AS p
    WHERE p.id = ANY($1::text[]) AND (p.deleted OR p.state = 'disabled')
)
FROM unnest($1::text[], $2::text[]) AS ended (endpoint_id, delivery_id)
JOIN hookwright.lease AS held ON held.endpoint_id = ended.endpoint_id AND held.delivery_id = ended.delivery_id
"""

_WRITE = """
WITH given_up AS (
    DELETE FROM hookwright.lease AS held USING unnest($1::text[], $2::text[]) AS ended (endpoint_id, delivery_id)
    WHERE held.endpoint_id = ended.endpoint_id AND held.delivery_id = ended.delivery_id
), rows AS (
    UPDATE hookwright.delivery AS d SET state = ended.state, available_at = ended.available_at,
        finished_at = ended.finished_at, attempt_count = coalesce(ended.number, d.attempt_count),
        last_status = CASE WHEN ended.number IS NULL THEN d.last_status ELSE ended.status END,
        last_error = CASE WHEN ended.number IS NULL THEN d.last_error ELSE ended.error END
    FROM unnest($2, $3::text[], $4::bigint[], $5::bigint[], $6::int[], $7::int[], $8::text[])
        AS ended (id, state, available_at, finished_at, number, status, error)
    WHERE d.id = ended.id
), attempts AS (
    INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, status, error, detail, response_headers,
        response_body, response_truncated, body_sha256)
    SELECT * FROM unnest($9::text[], $10::int[], $11::bigint[], $12::bigint[], $13::int[], $14::text[], $15::text[],
        $16::text[], $17::bytea[], $18::bool[], $19::bytea[])
)
UPDATE hookwright.lane AS l SET failures = h.failures, failing_since = h.failing_since, throttles = h.throttles,
    last_success = h.last_success, last_at = h.last_at, earned = h.earned, hold_until = greatest(l.hold_until, h.hold),
    due_at = least(l.due_at, h.due_at)
FROM unnest($20::text[], $21::int[], $22::bigint[], $23::int[], $24::bool[], $25::bigint[], $26::int[], $27::bigint[],
    $28::bigint[]) AS h (endpoint_id, failures, failing_since, throttles, last_success, last_at, earned, hold, due_at)
WHERE l.endpoint_id = h.endpoint_id
"""

_ATTEMPT_COLUMNS = 11
_LANE_COLUMNS = 9


async def settle(
    database: Database,
    outcomes: Sequence[Outcome],
    policy: HealthPolicy,
    unknown: Collection[str],
    channel: str | None,
) -> list[Settled]:
    """See `Storage.settle`. `unknown` are tokens of results that may be written: then they are answered as held."""
    endpoints = sorted({outcome.endpoint_id for outcome in outcomes})
    lanes = {row[0]: row for row in await database.fetch(_LANES, endpoints)}
    now, *leases, over = await database.first(
        _LEASES, [outcome.endpoint_id for outcome in outcomes], [outcome.delivery_id for outcome in outcomes]
    )
    leased = {id: (token, count) for id, token, count in zip(*(column or () for column in leases), strict=True)}
    settling = _Settling(lanes, set(over or ()), leased, policy, now)
    answers = [settling.settle(outcome) for outcome in outcomes]
    if settling.ended:
        await database.run(_WRITE, *settling.arguments())
    for endpoint_id, reason in settling.disabled:  # last: others wait for the endpoint counter
        await set_state(database, endpoint_id, "disabled", reason=reason, now=now)
    if unknown and not all(answer.held for answer in answers):
        answers = await _written_before(database, outcomes, answers, unknown, now)
    await _tell(database, zip(outcomes, answers, strict=True), channel)
    return answers


_SUCCEEDED = (
    "SELECT * FROM hookwright.settle_1($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::int[],"
    " $7::text[], $8::bytea[], $9::bool[], $10::bytea[])"
)


def all_succeeded(outcomes: Sequence[Outcome]) -> bool:
    """Whether all are plain successes of different deliveries, as most are: one call settles them."""
    return len({outcome.delivery_id for outcome in outcomes}) == len(outcomes) > 0 and all(
        outcome.state is DeliveryState.SUCCEEDED
        and outcome.attempt is not None
        and outcome.attempt.error is None
        and outcome.attempt.detail is None
        and outcome.counts
        and not (outcome.gone or outcome.hold or outcome.throttled or outcome.alerts)
        for outcome in outcomes
    )


async def settle_successes(database: Database, outcomes: Sequence[Outcome], policy: HealthPolicy) -> list[Settled]:
    """Do what `settle` does for results of which `all_succeeded`, in one call of a function in the server."""
    rows = [attempt_row(outcome.delivery_id, 0, outcome.attempt) for outcome in outcomes if outcome.attempt is not None]
    _, _, started, duration, status, _, _, headers, body, truncated, sha256 = columns_of(rows, _ATTEMPT_COLUMNS)
    _, held, lanes, failures, stopped = await database.first(
        _SUCCEEDED,
        [outcome.delivery_id for outcome in outcomes],
        [outcome.endpoint_id for outcome in outcomes],
        [outcome.token for outcome in outcomes],
        *(started, duration, status, headers, body, truncated, sha256),
    )
    before = {lane: (count, over) for lane, count, over in zip(lanes or (), failures or (), stopped or (), strict=True)}
    kept, answers = set(held or ()), []
    for place, outcome in enumerate(outcomes, 1):
        if place not in kept:
            answers.append(Settled(held=False))
        elif outcome.endpoint_id not in before:  # the endpoint is deleted and swept
            answers.append(Settled(held=True))
        else:
            count, over = before[outcome.endpoint_id]
            before[outcome.endpoint_id] = 0, over
            changes = (Change.RECOVERED,) if count >= policy.failing_at else ()
            answers.append(Settled(True, None, True, 0, changes, None, over))
    return answers


class _Settling:
    """One settle: what was read, and what is to be written."""

    def __init__(
        self,
        lanes: dict[str, Any],
        over: set[str],
        leased: dict[str, tuple[str, int]],
        policy: HealthPolicy,
        now: int,
    ) -> None:
        self._lanes = {endpoint_id: LaneHealth(row) for endpoint_id, row in lanes.items()}
        self._over = over
        self._leased = leased
        self._policy = policy
        self._now = now
        self._touched: dict[str, int] = {}
        self._attempts: list[tuple[Any, ...]] = []
        self.ended: list[tuple[Any, ...]] = []
        self.disabled: list[tuple[str, str]] = []

    def settle(self, outcome: Outcome) -> Settled:
        """Note the end of a lease, unless it is not ours any more: the token is compared, never the time."""
        token, count = self._leased.get(outcome.delivery_id, (None, 0))
        if token != outcome.token:
            return Settled(held=False)
        del self._leased[outcome.delivery_id]  # it ends once
        final, retry_at = outcome.state.final, self._now + outcome.retry_in
        self._end(outcome, count + 1, None if final else retry_at)
        settled = self._count(outcome, FOREVER if final else retry_at)
        return settled if final else settled._replace(next_attempt_at=retry_at)

    def _end(self, outcome: Outcome, number: int, retry_at: int | None) -> None:
        attempt = outcome.attempt
        tried = (None, None, None) if attempt is None else (number, attempt.status, attempt.error)
        finished_at = self._now if retry_at is None else None
        id = outcome.delivery_id
        self.ended.append((outcome.endpoint_id, id, outcome.state.value, retry_at, finished_at, *tried))
        if attempt is not None:
            self._attempts.append(attempt_row(id, number, attempt))

    def _count(self, outcome: Outcome, due_at: int) -> Settled:
        endpoint_id = outcome.endpoint_id
        lane = self._lanes.get(endpoint_id)
        if lane is None:  # the endpoint is deleted and swept
            return Settled(held=True)
        due_at = due_at if due_at > self._now else self._now >> TURN_BITS
        self._touched[endpoint_id] = min(due_at, self._touched.get(endpoint_id, due_at))
        changes, reason = lane.count(outcome, self._policy, self._now)
        if reason is not None and endpoint_id not in self._over:
            self.disabled.append((endpoint_id, reason))
            self._over.add(endpoint_id)
            changes.append(Change.DISABLED)
            lane.stopped = True
        else:
            reason = None
        return Settled(True, None, lane.earned > 0, lane.failures, tuple(changes), reason, lane.stopped)

    def arguments(self) -> list[list[Any]]:
        """Return the columns that _WRITE takes."""
        lanes = []
        for endpoint_id, due_at in self._touched.items():
            lane = self._lanes[endpoint_id]
            lanes.append((endpoint_id, *lane.columns, lane.earned, lane.hold, due_at))
        return [
            *columns_of(self.ended, 8),
            *columns_of(self._attempts, _ATTEMPT_COLUMNS),
            *columns_of(lanes, _LANE_COLUMNS),
        ]


_WRITTEN = """
SELECT a.delivery_id FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS told (id, started_at, duration)
JOIN hookwright.attempt AS a ON a.delivery_id = told.id AND a.started_at = told.started_at
    AND a.duration = told.duration
"""


async def _written_before(
    database: Database, outcomes: Sequence[Outcome], answers: list[Settled], unknown: Collection[str], now: int
) -> list[Settled]:
    """Answer as held what was written by a commit whose answer never came."""
    told = [(o.delivery_id, o.attempt.started_at, o.attempt.duration) for o in outcomes if o.attempt is not None]
    written = {row[0] for row in await database.fetch(_WRITTEN, *columns_of(told, 3))}
    return [
        Settled(held=True, next_attempt_at=None if outcome.state.final else now + outcome.retry_in)
        if not answer.held and outcome.token in unknown and outcome.delivery_id in written
        else answer
        for outcome, answer in zip(outcomes, answers, strict=True)
    ]


async def _tell(database: Database, settled: Iterable[tuple[Outcome, Settled]], channel: str | None) -> None:
    """Store the operational events that came true, for endpoints that are still there."""
    emissions = [
        emission
        for outcome, answer in settled
        if answer.held and outcome.alerts
        for name, emission in outcome.alerts
        if came_true(name, answer.changes, failed=outcome.state is DeliveryState.FAILED)
    ]
    if not emissions:
        return
    wanted = [delivery.endpoint_id for emission in emissions for delivery in emission.deliveries]
    rows = await database.fetch(
        "SELECT endpoint_id FROM hookwright.lane WHERE sweep IS NULL AND endpoint_id = ANY($1::text[])", wanted
    )
    alive = {row[0] for row in rows}
    await enqueue(
        database,
        [Emitted(event, [d for d in deliveries if d.endpoint_id in alive], None) for event, deliveries in emissions],
        channel,
    )
