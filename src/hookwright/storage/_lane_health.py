"""What a result does to its endpoint's health and room: the same for every storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookwright._health import Change, cool_down
from hookwright._models import DeliveryState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._health import HealthPolicy
    from hookwright._models import Outcome

MOST_EARNED = 1024
"""Where the doubling of earned room ends; the cap ends it earlier."""

LANE_COLUMNS = "endpoint_id, failures, earned, failing_since, throttles, last_success, last_at, sweep"
"""What `LaneHealth` is made of, in this order."""


class LaneHealth:
    """What one endpoint's lane says about its health. `hold` is until when results of now close it."""

    __slots__ = ("earned", "failing_since", "failures", "hold", "last_at", "last_success", "stopped", "throttles")

    def __init__(self, row: Sequence[Any]) -> None:
        self.failures, self.earned, self.failing_since, self.throttles = row[1:5]
        self.last_success, self.last_at = row[5:7]
        self.stopped = row[7] is not None
        self.hold = 0

    @property
    def columns(self) -> tuple[Any, ...]:
        """What every outcome may change, in order: failures, failing_since, throttles, last_success, last_at."""
        return (self.failures, self.failing_since, self.throttles, self.last_success, self.last_at)

    def count(self, outcome: Outcome, policy: HealthPolicy, now: int) -> tuple[list[Change], str | None]:
        """Count one outcome; return what it brought about, and why the endpoint is to be disabled, if it is."""
        succeeded = outcome.state is DeliveryState.SUCCEEDED
        changes: list[Change] = []
        if outcome.counts:
            self.last_success, self.last_at = succeeded, now
            if succeeded:
                if self.failures >= policy.failing_at:
                    changes.append(Change.RECOVERED)
                self.failures, self.failing_since, self.earned = 0, None, min(MOST_EARNED, max(2, self.earned * 2))
            else:
                self.failures, self.failing_since, self.earned = self.failures + 1, self.failing_since or now, 0
                if self.failures == policy.failing_at:
                    changes.append(Change.FAILING)
            self.throttles = self.throttles + 1 if outcome.throttled else 0
        if outcome.hold or outcome.throttled:
            pause = cool_down(self.throttles, outcome.throttled) if outcome.throttled else 0
            self.hold = max(self.hold, now + max(outcome.hold, pause))
        reason = policy.reason_to_disable(
            gone=outcome.gone,
            counts=outcome.counts,
            failures=self.failures,
            failing_since=self.failing_since,
            now=now,
        )
        return changes, reason
