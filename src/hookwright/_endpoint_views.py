"""What an application sees of a stored endpoint: no secrets, no header values, times as datetimes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hookwright._clock import SECOND, to_datetime
from hookwright._models import Endpoint, EndpointStats, LastDelivery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import EndpointRow


def to_stats(attempts: Sequence[tuple[int, bool]]) -> EndpointStats:
    """Return counts and percentiles of (duration, success)."""
    durations = sorted(duration / SECOND for duration, _ in attempts)

    def percentile(part: float) -> float | None:  # by nearest rank
        return durations[max(0, math.ceil(len(durations) * part) - 1)] if durations else None

    return EndpointStats(
        attempts=len(attempts),
        failures=sum(not succeeded for _, succeeded in attempts),
        p50=percentile(0.5),
        p95=percentile(0.95),
        p99=percentile(0.99),
        slowest=durations[-1] if durations else None,
    )


def to_endpoint(row: EndpointRow) -> Endpoint:
    """Return what an application may see of a stored endpoint."""
    return Endpoint(
        id=row.id,
        url=row.url,
        events=row.events,
        name=row.name,
        description=row.description,
        filters=dict(row.filters),
        metadata=dict(row.metadata),
        header_names=tuple(name for name, _ in row.headers),
        tenant=row.tenant,
        profile=row.profile,
        concurrency=row.concurrency,
        timeout=row.timeout,
        rate_limit=row.rate_limit,
        state=row.state,
        disabled_reason=row.disabled_reason,
        created_at=to_datetime(row.created_at),
        updated_at=to_datetime(row.updated_at),
        consecutive_failures=row.health.consecutive_failures,
        failing_since=None if row.health.failing_since is None else to_datetime(row.health.failing_since),
        last_delivery=None
        if row.health.last_at is None
        else LastDelivery(success=bool(row.health.last_success), at=to_datetime(row.health.last_at)),
        secret_last4=row.keys[0].text[-4:] if row.keys else "",
    )
