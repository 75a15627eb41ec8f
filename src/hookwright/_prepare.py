"""Prepare: what would be sent for a lease, or why nothing can be. Deliveries, tests and explanations all ask here."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, NamedTuple

from hookwright._clock import SECOND
from hookwright._envelope import Content, UnfitData
from hookwright._errors import ValidationFailed
from hookwright._models import Lease
from hookwright.transport._base import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hookwright._clock import Clock
    from hookwright._matching import CachedEndpoint, EndpointCache
    from hookwright._models import EventRow, NewDelivery
    from hookwright._profile import Profile
    from hookwright._signing import Signer


_logger = logging.getLogger("hookwright")


class Outline(NamedTuple):
    """What all requests to an endpoint have in common. `signer` is None unless there is exactly one."""

    profile: Profile
    signer: Signer | None
    headers: tuple[tuple[str, str], ...]
    connections: int
    total_timeout: float
    connect_timeout: float
    dns_timeout: float

    def __repr__(self) -> str:
        return f"Outline({len(self.headers)} headers)"


class Prepared(NamedTuple):
    """A request ready to leave, and what judging its outcome needs."""

    request: Request
    profile: Profile
    endpoint: CachedEndpoint
    body_sha256: bytes


class Unusable(NamedTuple):
    """Nothing can be sent to this endpoint by this process; `reason` None: it was deleted, and need not be told."""

    reason: str | None


class Unrenderable(NamedTuple):
    """The envelope refused the data, or raised this kind of error."""

    error: str


class Preparer:
    """Makes requests of leases."""

    def __init__(
        self,
        cache: EndpointCache,
        profiles: Mapping[str, Profile],
        *,
        clock: Clock,
        user_agent: str,
        endpoint_concurrency: int,
    ) -> None:
        self._cache = cache
        self._profiles = profiles
        self._clock = clock
        self._user_agent = user_agent
        self._endpoint_concurrency = endpoint_concurrency
        self._told: set[str] = set()

    @property
    def broken(self) -> Mapping[str, str]:
        """The endpoints whose secrets or headers cannot be opened, and why."""
        return self._cache.broken

    def find(self, lease: Lease) -> tuple[CachedEndpoint, Outline] | Unusable:
        """Return the lease's endpoint, and what is known of every request to it."""
        endpoint = self._cache.get(lease.endpoint_id)
        if endpoint is None:
            return Unusable(None)
        if not endpoint.outline:  # an endpoint that changes is cached anew
            if endpoint.broken is not None:
                return Unusable(endpoint.broken)
            profile = self._profiles.get(endpoint.row.profile)
            if profile is None:
                return Unusable(f"this process has no profile {endpoint.row.profile!r}")
            endpoint.outline.append(self._outline(endpoint, profile))
        return endpoint, endpoint.outline[0]

    def prepare(self, lease: Lease) -> Prepared | Unusable | Unrenderable:
        """Find, render and sign."""
        found = self.find(lease)
        return found if isinstance(found, Unusable) else self.render(lease, *found)

    def render(self, lease: Lease, endpoint: CachedEndpoint, outline: Outline) -> Prepared | Unusable | Unrenderable:
        """Render and sign."""
        profile = outline.profile
        content = Content(lease.event_id, lease.event_type, lease.data, lease.occurred_at, lease.tenant)
        try:
            body = profile.renderer.render(content)
            if not isinstance(body, bytes):
                body = type(body).__name__  # and no more of it: what is raised shows this frame
                raise TypeError(f"the envelope returned {body}, not bytes")
        except UnfitData as error:
            return Unrenderable(str(error))
        except Exception as error:  # an envelope is the application's code, and must not stop the worker
            if lease.endpoint_id not in self._told:
                self._told.add(lease.endpoint_id)
                _logger.exception("the envelope of profile %r raised; this is logged once", endpoint.row.profile)
            return Unrenderable(type(error).__name__)
        try:
            headers = self._headers(lease, endpoint, outline, body)
        except ValidationFailed as error:
            return Unusable(str(error))
        except Exception as error:  # noqa: BLE001  # a signer may be the application's code, and ask a service
            return Unusable(f"a signer raised {type(error).__name__}")
        row = endpoint.row
        request = Request(
            row.url,
            headers,
            body,
            row.id,
            row.revision,
            outline.connections,
            outline.total_timeout,
            outline.connect_timeout,
            outline.dns_timeout,
            profile.client_certificate,
        )
        return Prepared(request, profile, endpoint, hashlib.sha256(body).digest())

    def signature_names(self, endpoint: CachedEndpoint) -> frozenset[str]:
        """Return the lower case names of the headers whose values authenticate."""
        profile = self._profiles.get(endpoint.row.profile)
        names = (name for signer in (profile.signers if profile else ()) for name in signer.header_names)
        return frozenset(name.lower() for name in names if not name.lower().endswith(("-id", "-timestamp")))

    def _outline(self, endpoint: CachedEndpoint, profile: Profile) -> Outline:
        row, timeouts = endpoint.row, profile.timeouts
        headers = [("content-type", getattr(profile.envelope, "content_type", "application/json"))]
        if not any(name.lower() == "user-agent" for name, _ in row.headers):
            headers.append(("user-agent", self._user_agent))
        total = row.timeout or timeouts.total
        return Outline(
            profile,
            profile.signers[0] if len(profile.signers) == 1 else None,
            (*headers, *row.headers),
            row.concurrency or self._endpoint_concurrency,
            total,
            min(total, timeouts.connect),
            min(total, timeouts.dns),
        )

    def _headers(
        self, lease: Lease, endpoint: CachedEndpoint, outline: Outline, body: bytes
    ) -> tuple[tuple[str, str], ...]:
        # Every attempt is signed anew: the timestamp is the attempt's, the id stays (Standard Webhooks 1.0.0).
        timestamp, profile, signer = self._clock.wall() // SECOND, outline.profile, outline.signer
        templates: Iterable[tuple[str, str]] = ()
        if profile.headers:
            fields = {
                "event_id": lease.event_id,
                "event_type": lease.event_type,
                "delivery_id": lease.delivery_id,
                "attempt": lease.number,
                "timestamp": timestamp,
            }
            templates = [(name, value.format_map(fields)) for name, value in profile.headers.items()]
        if signer is None:
            signed = self._signed_by_all(lease, endpoint, profile, timestamp, body)
        else:
            secrets = endpoint.signing(signer, self._clock)
            signed = signer.sign(event_id=lease.event_id, timestamp=timestamp, body=body, secrets=secrets)
        return (*outline.headers, *templates, *signed.items())

    def _signed_by_all(
        self, lease: Lease, endpoint: CachedEndpoint, profile: Profile, timestamp: int, body: bytes
    ) -> dict[str, str]:
        signed: dict[str, str] = {}
        for signer in profile.signers:
            secrets = endpoint.signing(signer, self._clock)
            found = signer.sign(event_id=lease.event_id, timestamp=timestamp, body=body, secrets=secrets)
            for name, value in found.items():
                before = signed.get(name, value)
                # Two kinds of Standard Webhooks share their headers; signatures are a list separated by spaces.
                signed[name] = value if before == value else f"{before} {value}"
        return signed


def lease_of(event: EventRow, delivery: NewDelivery, now: int) -> Lease:
    """Return a lease of a delivery that is not in the storage, and that nobody can settle."""
    return Lease(
        delivery.id,
        "",
        now,
        delivery.endpoint_id,
        event.id,
        event.type,
        event.data,
        event.tenant,
        event.occurred_at,
        created_at=now,
        since=now,
        due_at=now,
        number=1,
        spent=0,
        interruptions=0,
        taken_over=False,
        proven=False,
    )
