"""What the simulation is set to, and the model's own matching: written without a look at the package's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hookwright import ALL_TENANTS, Profile, RetryPolicy, Timeouts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookwright import EndpointState
    from hookwright._models import Key

SECOND = 1_000_000
HOUR = 3600.0

LEASE = 60.0
LEASE_MARGIN = 5.0
TIMEOUT = 10.0
ENDPOINT_CONCURRENCY = 3
FREE = 3
RETRY_AFTER_MOST = 86_400.0
DISABLE_AFTER = 6 * HOUR
DISABLE_FAILURES = 20
RETENTION = 72 * HOUR

SCHEDULES: dict[str, tuple[float, ...]] = {
    "default": (0.0, 5.0, 60.0, 600.0),
    "patient": (0.0, 5.0, 300.0, 1800.0, 7200.0, 36000.0),
}


def profiles() -> dict[str, Profile]:
    """Return the profiles; each request names its delivery and attempt."""
    headers = {"x-delivery": "{delivery_id}", "x-attempt": "{attempt}"}
    return {
        name: Profile(headers=headers, retry=RetryPolicy.schedule(*delays), timeouts=Timeouts(total=TIMEOUT))
        for name, delays in SCHEDULES.items()
    }


Scalar = str | int | bool


class Intent(NamedTuple):
    """An event as the application meant it; `number` is its data, and tells it from all others."""

    number: int
    type: str
    tenant: str | None
    attributes: tuple[tuple[str, tuple[Scalar, ...]], ...]
    event_id: str | None
    key: str | None
    endpoint_id: str | None
    delay: float


class Version(NamedTuple):
    """An endpoint from one change of it to the next; `at` is the model's count of what was written."""

    at: int
    url: str
    events: Sequence[str]
    filters: Mapping[str, Sequence[Scalar]]
    tenant: str | None
    keys: Sequence[Key]
    cap: int
    rate: float | None
    state: EndpointState
    deleted: bool


def wants(version: Version, intent: Intent) -> bool:
    """Say whether an endpoint is to get the event."""
    if version.deleted:
        return False
    if version.tenant != ALL_TENANTS and version.tenant != intent.tenant:
        return False
    if not any(_matches(pattern, intent.type) for pattern in version.events):
        return False
    had = dict(intent.attributes)
    return all(_in_common(allowed, had.get(key, ())) for key, allowed in version.filters.items())


def _matches(pattern: str, type: str) -> bool:
    if pattern.endswith(".*"):
        return type.startswith(pattern[:-1])
    return pattern in ("*", type)


def _in_common(allowed: Sequence[Scalar], had: Sequence[Scalar]) -> bool:
    return any(one == other and type(one) is type(other) for one in allowed for other in had)
