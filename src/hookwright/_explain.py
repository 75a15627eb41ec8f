"""Explain: who would get an event, who would not and why, and exactly what would be sent. Nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hookwright._addresses import masked_url
from hookwright._catalogue import candidates
from hookwright._models import EndpointState
from hookwright._prepare import Prepared, Unrenderable, Unusable
from hookwright._snapshot import of_term, term

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hookwright._matching import CachedEndpoint
    from hookwright._models import EndpointRow, EventRow, Lease
    from hookwright._prepare import Preparer
    from hookwright._snapshot import Scalar

MASK = "****"


class Match(NamedTuple):
    """An endpoint that would get the event, and the request. `problem` says why nothing could be sent, or not now.

    The values of the endpoint's own headers are masked: they are never read back.
    """

    endpoint_id: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    problem: str | None

    def __repr__(self) -> str:
        return (
            f"Match(endpoint_id={self.endpoint_id!r}, url={masked_url(self.url)!r}, {len(self.body)} bytes,"
            f" problem={self.problem!r})"
        )


class Mismatch(NamedTuple):
    """An endpoint that would not get the event, and why. Of an event with a tenant, none that never could."""

    endpoint_id: str
    reason: str


class Explanation(NamedTuple):
    """What `dispatcher.explain` returns."""

    matches: tuple[Match, ...]
    mismatches: tuple[Mismatch, ...]


def may_be_told(row: EndpointRow, tenant: str | None) -> bool:
    """Whether what is explained to a tenant may name the endpoint: others' are not told. None hears of all."""
    return tenant is None or row.serves(tenant)


def why_not(
    row: EndpointRow, filters: Mapping[str, Sequence[Scalar]], event: EventRow, terms: frozenset[str]
) -> str | None:
    """Return why the endpoint does not want the event; None: it does."""
    if not row.serves(event.tenant):
        return f"tenant: it serves {row.tenant!r}, the event is of {event.tenant!r}"
    if not set(row.events) & set(candidates(event.type)):
        return f"events: none of {', '.join(row.events)} matches {event.type}"
    for key, allowed in filters.items():
        if terms.isdisjoint(term(key, value) for value in allowed):
            if all(of_term(text)[0] != key for text in terms):
                return f"filters: the event has no attribute {key!r}"
            values = ", ".join(map(repr, sorted(allowed, key=_by_kind)))
            return f"filters: {key!r} must be one of {values}"
    return None


def _by_kind(value: Scalar) -> tuple[str, str]:
    return type(value).__name__, repr(value)


def masked(headers: Iterable[tuple[str, str]], endpoint: CachedEndpoint) -> tuple[tuple[str, str], ...]:
    """Return headers without the values that the endpoint's owner gave."""
    own = {name for name, _ in endpoint.row.headers}
    return tuple((name, MASK if name in own else value) for name, value in headers)


def match_of(preparer: Preparer, lease: Lease, endpoint: CachedEndpoint) -> Match:
    """Return what would be sent for a lease."""
    prepared = preparer.prepare(lease)
    problem = None
    if isinstance(prepared, Unusable):
        problem = prepared.reason
    elif isinstance(prepared, Unrenderable):
        problem = f"the body cannot be rendered: {prepared.error}"
    elif endpoint.row.state is EndpointState.PAUSED:
        problem = "the endpoint is paused: the delivery waits"
    elif endpoint.row.state is EndpointState.DISABLED:
        problem = "the endpoint is disabled: the delivery is recorded as skipped"
    request = prepared.request if isinstance(prepared, Prepared) else None
    return Match(
        endpoint_id=lease.endpoint_id,
        url=endpoint.row.url,
        headers=() if request is None else masked(request.headers, endpoint),
        body=b"" if request is None else request.body,
        problem=problem,
    )
