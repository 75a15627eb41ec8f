"""Settle: write all the results that wait, in one go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hookwright._health import Change, came_true
from hookwright._models import DeliveryState, Settled
from hookwright.storage._emitted import Emitted
from hookwright.storage._lane_health import LANE_COLUMNS, LaneHealth
from hookwright.storage._rows import attempt_row
from hookwright.storage.sqlite._bulk import at_once, insert_rows, update_alike
from hookwright.storage.sqlite._endpoints import set_state
from hookwright.storage.sqlite._enqueue import enqueue
from hookwright.storage.sqlite._lanes import end_leases, make_due, revision

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookwright._health import HealthPolicy
    from hookwright._models import Outcome
    from hookwright.storage.sqlite._owner import Database


def settle(
    database: Database, waiting: Sequence[tuple[Sequence[Outcome], HealthPolicy]], now: int
) -> list[list[Settled]]:
    """Answer each as `Storage.settle` says."""
    everything = [outcome for outcomes, _ in waiting for outcome in outcomes]
    rows, lanes = _read(database, everything)
    answers = [[_settle_one(database, o, rows, lanes, policy, now) for o in outcomes] for outcomes, policy in waiting]
    rows.write(database)
    lanes.write(database)
    make_due(database, rows.retried, now)
    _tell(database, zip(everything, (settled for answer in answers for settled in answer), strict=True), now)
    return answers


def _settle_one(
    database: Database, outcome: Outcome, rows: _Rows, lanes: _Lanes, policy: HealthPolicy, now: int
) -> Settled:
    if not rows.end(outcome, now):
        return Settled(held=False)
    settled = lanes.update(database, outcome, policy, now)
    return settled if outcome.state.final else settled._replace(next_attempt_at=now + outcome.retry_in)


_LEASES = at_once(
    "delivery_id, token, attempt_count",
    "SELECT l.* FROM json_each(?1) AS held CROSS JOIN hookwright_lease AS l"
    " ON l.endpoint_id = held.value AND l.delivery_id = held.key",
)
_LANES = at_once(
    LANE_COLUMNS,
    "SELECT * FROM hookwright_lane WHERE endpoint_id IN (SELECT value FROM json_each(?1))",
)


def _read(database: Database, outcomes: Sequence[Outcome]) -> tuple[_Rows, _Lanes]:
    """Read with one statement what outcomes are compared with, and what they change."""
    held = json.dumps({outcome.delivery_id: outcome.endpoint_id for outcome in outcomes})
    leases, lanes = database.execute(f"SELECT ({_LEASES}), ({_LANES})", (held,)).fetchone()
    return _Rows(json.loads(leases)), _Lanes(json.loads(lanes))


_ENDED = "UPDATE hookwright_delivery SET state = ?, available_at = ?, finished_at = ?"
_OF_THESE = "WHERE id IN (SELECT value FROM json_each(?))"


class _Rows:
    """The deliveries that the outcomes are about: their leases were read at once, and they are written at once."""

    def __init__(self, leases: Sequence[Sequence[Any]]) -> None:
        self._leased = {row[0]: row[1:] for row in leases}
        self._held: dict[str, str] = {}
        self._tried: list[tuple[tuple[Any, ...], str]] = []
        self._untried: list[tuple[tuple[Any, ...], str]] = []
        self._attempts: list[tuple[Any, ...]] = []
        self.retried: list[tuple[str, int]] = []

    def end(self, outcome: Outcome, now: int) -> bool:
        """Note the end of a lease; say whether it held. The fence: the token is compared, never the time."""
        delivery_id, attempt, final = outcome.delivery_id, outcome.attempt, outcome.state.final
        token, count = self._leased.get(delivery_id, (None, 0))
        if token != outcome.token:
            return False
        del self._leased[delivery_id]  # it ends once
        self._held[delivery_id] = outcome.endpoint_id
        retry_at = None if final else now + outcome.retry_in
        if retry_at is not None:
            self.retried.append((outcome.endpoint_id, retry_at))
        ended = (outcome.state.value, retry_at, now if final else None)
        if attempt is None:
            self._untried.append((ended, delivery_id))
        else:
            self._tried.append(((*ended, count + 1, attempt.status, attempt.error), delivery_id))
            self._attempts.append(attempt_row(delivery_id, count + 1, attempt))
        return True

    def write(self, database: Database) -> None:
        """Write what ended: most deliveries alike, with success at their first attempt."""
        end_leases(database, self._held)
        tried = f"{_ENDED}, attempt_count = ?, last_status = ?, last_error = ? {_OF_THESE}"
        update_alike(database, tried, self._tried)
        update_alike(database, f"{_ENDED} {_OF_THESE}", self._untried)
        insert_rows(database, "hookwright_attempt", self._attempts)


class _Lanes:
    """The lanes that the outcomes are about: read at once, written at once."""

    def __init__(self, rows: Sequence[Sequence[Any]]) -> None:
        self._lanes = {row[0]: LaneHealth(row) for row in rows}
        self._earned = {row[0]: row[2] for row in rows}
        self._touched: set[str] = set()

    def update(self, database: Database, outcome: Outcome, policy: HealthPolicy, now: int) -> Settled:
        """Count one outcome."""
        lane = self._lanes.get(outcome.endpoint_id)
        if lane is None:  # the endpoint is deleted and swept
            return Settled(held=True)
        self._touched.add(outcome.endpoint_id)
        changes, reason = lane.count(outcome, policy, now)
        if reason is not None and _disable(database, outcome.endpoint_id, reason, now):
            changes.append(Change.DISABLED)
            lane.stopped = True
        else:
            reason = None
        return Settled(True, None, lane.earned > 0, lane.failures, tuple(changes), reason, lane.stopped)

    def write(self, database: Database) -> None:
        """Write what changed; `earned` is in an index, so that only its changes are worth writing."""
        lanes = [(endpoint_id, self._lanes[endpoint_id]) for endpoint_id in self._touched]
        update_alike(
            database,
            "UPDATE hookwright_lane SET failures = ?, failing_since = ?, throttles = ?, last_success = ?, last_at = ?"
            " WHERE endpoint_id IN (SELECT value FROM json_each(?))",
            ((lane.columns, endpoint_id) for endpoint_id, lane in lanes),
        )
        database.executemany(
            "UPDATE hookwright_lane SET earned = ? WHERE endpoint_id = ?",
            [(lane.earned, id) for id, lane in lanes if lane.earned != self._earned[id]],
        )
        database.executemany(
            "UPDATE hookwright_lane SET hold_until = max(hold_until, ?) WHERE endpoint_id = ?",
            [(lane.hold, id) for id, lane in lanes if lane.hold],
        )


def _disable(database: Database, endpoint_id: str, reason: str, now: int) -> bool:
    alive = "SELECT 1 FROM hookwright_endpoint WHERE id = ? AND deleted = 0 AND state <> 'disabled'"
    if database.execute(alive, (endpoint_id,)).fetchone() is None:
        return False
    return set_state(database, endpoint_id, "disabled", reason=reason, now=now)


def _tell(database: Database, settled: Iterable[tuple[Outcome, Settled]], now: int) -> None:
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
    wanted = json.dumps([delivery.endpoint_id for emission in emissions for delivery in emission.deliveries])
    alive = {
        row[0]
        for row in database.execute(
            "SELECT endpoint_id FROM hookwright_lane WHERE sweep IS NULL AND endpoint_id IN"
            " (SELECT value FROM json_each(?))",
            (wanted,),
        )
    }
    current = revision(database)
    enqueue(
        database,
        [Emitted(event, [d for d in deliveries if d.endpoint_id in alive], current) for event, deliveries in emissions],
        now,
    )
