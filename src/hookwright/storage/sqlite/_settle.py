"""Settle: write all the results that wait, in one go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hookwright._models import DeliveryState, EndpointHealth, Settled
from hookwright.storage.sqlite._endpoints import set_state
from hookwright.storage.sqlite._lanes import make_due

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookwright._models import AttemptRecord, Outcome
    from hookwright.storage.sqlite._owner import Database

MOST_EARNED = 1024
"""Where the doubling of earned room ends; the cap ends it earlier."""


def settle(database: Database, waiting: Sequence[Sequence[Outcome]], now: int) -> list[list[Settled]]:
    """Answer each as `Storage.settle` says."""
    ended: list[Outcome] = []
    lanes = _Lanes(database, (outcome.endpoint_id for outcomes in waiting for outcome in outcomes))
    answers = [[_settle_one(database, outcome, lanes, ended, now) for outcome in outcomes] for outcomes in waiting]
    database.executemany(_INSERT_ATTEMPT, [_attempt_row(o.delivery_id, o.attempt) for o in ended if o.attempt])
    lanes.write(database)
    make_due(database, ((o.endpoint_id, now + o.retry_in) for o in ended if not o.state.final), now)
    return answers


# The fence: the token is compared, never the time.
_END = (
    "UPDATE hookwright_delivery SET state = ?1, available_at = coalesce(?2, 0), scheduled_at = ?2, token = NULL,"
    " finished_at = ?3 WHERE id = ?4 AND token = ?5"
)
_END_WITH_ATTEMPT = (
    "UPDATE hookwright_delivery SET state = ?1, available_at = coalesce(?2, 0), scheduled_at = ?2, token = NULL,"
    " finished_at = ?3, attempt_count = attempt_count + 1, last_status = ?6, last_error = ?7"
    " WHERE id = ?4 AND token = ?5"
)


def _settle_one(database: Database, outcome: Outcome, lanes: _Lanes, ended: list[Outcome], now: int) -> Settled:
    retry_at, finished_at = (None, now) if outcome.state.final else (now + outcome.retry_in, None)
    written = (outcome.state.value, retry_at, finished_at, outcome.delivery_id, outcome.token)
    attempt = outcome.attempt
    if attempt is None:
        held = database.execute(_END, written).rowcount
    else:
        held = database.execute(_END_WITH_ATTEMPT, (*written, attempt.status, attempt.error)).rowcount
    if not held:
        return Settled(held=False)
    ended.append(outcome)
    return Settled(True, lanes.update(database, outcome, now), retry_at)


_INSERT_ATTEMPT = (
    "INSERT INTO hookwright_attempt SELECT ?1, attempt_count, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10"
    " FROM hookwright_delivery WHERE id = ?1"
)


def _attempt_row(delivery_id: str, attempt: AttemptRecord) -> tuple[Any, ...]:
    return (
        delivery_id,
        attempt.started_at,
        attempt.duration,
        attempt.status,
        attempt.error,
        attempt.detail,
        json.dumps(attempt.response_headers) if attempt.response_headers else None,
        attempt.response_body or None,
        attempt.response_truncated,
        attempt.body_sha256,
    )


class _Lanes:
    """The health of the endpoints that the outcomes are about: read once, written once where it changed."""

    def __init__(self, database: Database, endpoint_ids: Iterable[str]) -> None:
        rows = database.execute(
            "SELECT endpoint_id, failures, earned, sweep FROM hookwright_lane"
            " WHERE endpoint_id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(set(endpoint_ids))),),
        ).fetchall()
        self._health: dict[str, tuple[int, int]] = {row[0]: (row[1], row[2]) for row in rows}
        self._stopped = {row[0] for row in rows if row[3] is not None}
        self._changed: set[str] = set()

    def update(self, database: Database, outcome: Outcome, now: int) -> EndpointHealth | None:
        """Count one outcome; None: the endpoint is deleted and swept."""
        endpoint_id = outcome.endpoint_id
        before = self._health.get(endpoint_id)
        if before is None:
            return None
        failures, earned = before
        if outcome.counts and outcome.state is DeliveryState.SUCCEEDED:
            failures, earned = 0, min(MOST_EARNED, max(2, earned * 2))
        elif outcome.counts:
            failures, earned = failures + 1, 0
        if (failures, earned) != before:
            self._health[endpoint_id] = (failures, earned)
            self._changed.add(endpoint_id)
        disabled = outcome.gone and _disable_gone(database, endpoint_id, now)
        if disabled:
            self._stopped.add(endpoint_id)
        return EndpointHealth(failures, earned > 0, disabled, endpoint_id in self._stopped)

    def write(self, database: Database) -> None:
        """Write what changed."""
        database.executemany(
            "UPDATE hookwright_lane SET failures = ?, earned = ? WHERE endpoint_id = ?",
            [(*self._health[endpoint_id], endpoint_id) for endpoint_id in self._changed],
        )


def _disable_gone(database: Database, endpoint_id: str, now: int) -> bool:
    alive = "SELECT 1 FROM hookwright_endpoint WHERE id = ? AND deleted = 0"
    if database.execute(alive, (endpoint_id,)).fetchone() is None:
        return False
    return set_state(database, endpoint_id, "disabled", reason="gone", now=now)
