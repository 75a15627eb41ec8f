"""How an endpoint does: the rules that every storage applies when it writes a result."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from hookwright._clock import SECOND

if TYPE_CHECKING:
    from collections.abc import Collection


class EndpointHealth(NamedTuple):
    """How an endpoint does. Times in microseconds UTC; `last_at` is when it answered, or failed to, last."""

    consecutive_failures: int = 0
    failing_since: int | None = None
    last_success: bool | None = None
    last_at: int | None = None


NO_HEALTH = EndpointHealth()


class HealthPolicy(NamedTuple):
    """When an endpoint is called failing, and when it is disabled: after so many failures in a row, for so long.

    `disable_after` is in microseconds; None never disables.
    """

    failing_at: int = 4
    disable_after: int | None = 5 * 24 * 3600 * SECOND
    disable_failures: int = 20

    def reason_to_disable(
        self, *, gone: bool, counts: bool, failures: int, failing_since: int | None, now: int
    ) -> str | None:
        """Return why an outcome disables its endpoint, whose failures include it; None: it does not."""
        if gone:
            return "gone"
        if not counts or self.disable_after is None or failing_since is None:
            return None
        long_enough = now - failing_since >= self.disable_after
        return "failing" if long_enough and failures >= self.disable_failures else None


class Change(StrEnum):
    """What a settled outcome changed about its endpoint."""

    FAILING = "failing"
    RECOVERED = "recovered"
    DISABLED = "disabled"


def came_true(alert: str, changes: Collection[Change], *, failed: bool) -> bool:
    """Say whether an outcome made an alert true: `failed`, or the value of a Change."""
    return alert in changes or (alert == "failed" and failed)


COOL_DOWN_MOST = 60 * SECOND
"""An endpoint that asks for a pause gets 1 s, doubled each time in a row, at most this."""


def cool_down(in_a_row: int, factor: float) -> int:
    """Return for how many microseconds a lane is closed after so many throttled outcomes in a row."""
    return round(min(COOL_DOWN_MOST, SECOND << min(max(0, in_a_row - 1), 16)) * factor)
