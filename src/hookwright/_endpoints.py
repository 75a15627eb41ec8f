"""`dispatcher.endpoints`: the receivers, from create to delete."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from hookwright._catalogue import check_pattern
from hookwright._clock import to_datetime
from hookwright._errors import ConflictError, NotFound, ValidationFailed
from hookwright._ids import new_id
from hookwright._models import ALL_TENANTS, Endpoint, EndpointRow, EndpointState, Key, Page, check_limit
from hookwright._observe import EndpointDisabled
from hookwright._secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hookwright._addresses import NetworkPolicy
    from hookwright._clock import Clock
    from hookwright._models import Tenant
    from hookwright._observe import ObserverHub
    from hookwright._profile import Profile
    from hookwright.storage._base import Storage

_LEASE_MARGIN = 5.0
"""Seconds by which a lease must outlast the longest attempt."""


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""The default of an `update` argument: leave it as it is. None would mean: set it to None."""


class Endpoints:
    """Create, read, change and remove endpoints. Reached as `dispatcher.endpoints`.

    Every change takes effect with the next attempt, in whichever process; existing deliveries keep their endpoint
    when its events or filters change. By-id verbs take `tenant=`, and answer NotFound when the endpoint is another's.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        clock: Clock,
        network: NetworkPolicy,
        profiles: Mapping[str, Profile],
        lease: float,
        observers: ObserverHub,
        check_usable: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._network = network
        self._profiles = profiles
        self._lease = lease
        self._observers = observers
        self._check_usable = check_usable
        self._changed = changed

    async def create(
        self,
        url: str,
        *,
        events: Sequence[str],
        name: str | None = None,
        description: str | None = None,
        filters: Mapping[str, Sequence[str | int | bool]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: Tenant = None,
        secret: Secret | str | None = None,
        profile: str = "default",
        concurrency: int | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Subscribe a receiver; from the next `emit` on it gets what matches.

        `events` are patterns: `*`, `video.*` (any depth below `video`), or exact types. `filters` narrow further: each
        key must be among the event's attributes, with a value in common. `secret` None makes one of 32 random bytes;
        it is on the returned endpoint and on no later one: show it to the receiver's owner now. `concurrency` bounds
        the attempts in flight to it (default: the dispatcher's `endpoint_concurrency`), `timeout` (seconds) replaces
        the profile's total. Header values are never read back.

        Raises ValidationFailed, naming the argument and what would be right.
        """
        self._check_usable()
        given = self._secret(profile, secret)
        now = self._clock.now()
        row = EndpointRow(
            id=new_id("ep", now),
            url=self._network.check_url(url),
            events=_patterns(events),
            created_at=now,
            updated_at=now,
            keys=(Key(given.reveal()),),
            name=_text("name", name),
            description=_text("description", description),
            filters=_filters(filters),
            metadata=_metadata(metadata),
            headers=_headers(headers),
            tenant=_tenant(tenant),
            profile=profile,
            concurrency=_positive("concurrency", concurrency),
            timeout=timeout,
        )
        self._check_profile(row)
        stored = await self._storage.create_endpoint(row)
        return replace(to_endpoint(stored), secret=given)

    async def get(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Return an endpoint. Raises NotFound."""
        return to_endpoint(await self._row(endpoint_id, tenant))

    async def list(self, *, limit: int = 50, cursor: str | None = None, tenant: str | None = None) -> Page[Endpoint]:
        """Return endpoints, newest first, `limit` (1 to 500) to a page; go on with `next_cursor`.

        Raises ValidationFailed for a limit out of range or a cursor that did not come from the same list.
        """
        self._check_usable()
        page = await self._storage.list_endpoints(limit=check_limit(limit), cursor=cursor, tenant=tenant)
        return Page(items=tuple(to_endpoint(row) for row in page.items), next_cursor=page.next_cursor)

    async def update(
        self,
        endpoint_id: str,
        *,
        url: str | Unset = UNSET,
        events: Sequence[str] | Unset = UNSET,
        name: str | Unset | None = UNSET,
        description: str | Unset | None = UNSET,
        filters: Mapping[str, Sequence[str | int | bool]] | Unset | None = UNSET,
        metadata: Mapping[str, Any] | Unset | None = UNSET,
        headers: Mapping[str, str] | Unset | None = UNSET,
        profile: str | Unset = UNSET,
        concurrency: int | Unset | None = UNSET,
        timeout: float | Unset | None = UNSET,
        tenant: str | None = None,
    ) -> Endpoint:
        """Change what is given and leave the rest; the checks are those of `create`.

        Raises NotFound, ValidationFailed, or ConflictError when somebody else changed the endpoint at the same moment.
        """
        row = await self._row(endpoint_id, tenant)
        given: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "url": (url, self._network.check_url),
            "events": (events, _patterns),
            "name": (name, lambda value: _text("name", value)),
            "description": (description, lambda value: _text("description", value)),
            "filters": (filters, _filters),
            "metadata": (metadata, _metadata),
            "headers": (headers, _headers),
            "profile": (profile, str),
            "concurrency": (concurrency, lambda value: _positive("concurrency", value)),
            "timeout": (timeout, lambda value: value),
        }
        changed = {key: check(value) for key, (value, check) in given.items() if value is not UNSET}
        new = replace(row, updated_at=self._clock.now(), **changed)
        self._check_profile(new)
        stored = await self._storage.update_endpoint(new)
        self._changed()
        return to_endpoint(stored)

    async def pause(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Hold deliveries: they are kept, and wait until `resume`. Attempts in flight end as they may."""
        return await self._set_state(endpoint_id, EndpointState.PAUSED, None, tenant)

    async def resume(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Go on after `pause`: what was held becomes due. ConflictError: it is disabled (`enable` it)."""
        row = await self._row(endpoint_id, tenant)
        if row.state is EndpointState.DISABLED:
            raise ConflictError(f"endpoint {endpoint_id} is disabled, not paused: use endpoints.enable()")
        return await self._set_state(endpoint_id, EndpointState.ACTIVE, None, tenant)

    async def disable(self, endpoint_id: str, *, reason: str | None = None, tenant: str | None = None) -> Endpoint:
        """Send nothing more: new and waiting deliveries are recorded as skipped. Harmless when repeated."""
        endpoint = await self._set_state(endpoint_id, EndpointState.DISABLED, _text("reason", reason), tenant)
        self._observers.report(EndpointDisabled(endpoint_id=endpoint_id, reason=reason))
        return endpoint

    async def enable(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Make a disabled (or paused) endpoint active; what is already skipped stays skipped."""
        return await self._set_state(endpoint_id, EndpointState.ACTIVE, None, tenant)

    async def delete(self, endpoint_id: str, *, tenant: str | None = None) -> None:
        """Remove it: its waiting deliveries are cancelled, its history stays. Raises NotFound."""
        await self._row(endpoint_id, tenant)
        await self._storage.delete_endpoint(endpoint_id)
        self._changed()

    async def _set_state(
        self, endpoint_id: str, state: EndpointState, reason: str | None, tenant: str | None
    ) -> Endpoint:
        await self._row(endpoint_id, tenant)
        row = await self._storage.set_endpoint_state(endpoint_id, state, reason=reason)
        self._changed()
        return to_endpoint(row)

    async def _row(self, endpoint_id: str, tenant: str | None) -> EndpointRow:
        self._check_usable()
        row = await self._storage.get_endpoint(endpoint_id)
        if tenant is not None and row.tenant != tenant:
            raise NotFound(f"there is no endpoint {endpoint_id!r}")
        return row

    def _profile(self, name: str) -> Profile:
        profile = self._profiles.get(name)
        if profile is None:
            known = ", ".join(sorted(self._profiles))
            raise ValidationFailed("profile", f"there is no profile {name!r}; the dispatcher has: {known}")
        return profile

    def _secret(self, profile: str, secret: Secret | str | None) -> Secret:
        """Return the given secret, or a new one of the kind that the profile's first signer makes."""
        if secret is None:
            signers = self._profile(profile).signers
            return signers[0].generate() if signers else Secret.generate()
        return secret if isinstance(secret, Secret) else Secret(secret)

    def _check_profile(self, row: EndpointRow) -> None:
        profile = self._profile(row.profile)
        for signer in profile.signers:
            signer.check(Secret.text(row.keys[0].text))
        for name, _ in row.headers:
            if name.lower() in profile.header_names:
                raise ValidationFailed("headers", f"{name} is set by the profile {row.profile!r}: leave it out")
        longest = self._lease - _LEASE_MARGIN
        if row.timeout is not None and not 0 < row.timeout <= longest:
            raise ValidationFailed("timeout", f"must be more than 0 and at most {longest:g} s, the lease less 5 s")


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
        state=row.state,
        disabled_reason=row.disabled_reason,
        created_at=to_datetime(row.created_at),
        updated_at=to_datetime(row.updated_at),
        consecutive_failures=row.consecutive_failures,
    )


def _patterns(events: Sequence[str]) -> tuple[str, ...]:
    if isinstance(events, str) or not events:
        raise ValidationFailed("events", "give a list of at least one pattern, such as ['video.*'] or ['*']")
    return tuple(dict.fromkeys(check_pattern(pattern) for pattern in events))


def _text(field: str, value: str | None) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > 1000):  # the message says it
        raise ValidationFailed(field, "must be text of at most 1,000 characters")
    return value


def _filters(filters: Mapping[str, Sequence[str | int | bool]] | None) -> dict[str, tuple[str | int | bool, ...]]:
    checked: dict[str, tuple[str | int | bool, ...]] = {}
    for key, values in (filters or {}).items():
        allowed = tuple([values] if isinstance(values, (str, int)) else values)
        if not allowed or not all(isinstance(value, (str, int)) for value in allowed):
            raise ValidationFailed("filters", f"{key!r} needs a list of at least one str, int or bool")
        checked[key] = allowed
    return checked


def _metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(metadata or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValidationFailed("metadata", f"must be a mapping that JSON can hold: {error}") from None


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: token
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")  # RFC 9110, 5.5, less obs-text
_RESERVED_HEADERS = frozenset(
    [
        "connection",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "accept-encoding",
    ]
)
_RESERVED_PREFIXES = ("content-", "proxy-", "webhook-")


def _headers(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValidationFailed("headers", f"{name!r} is no header name (letters, digits and -)")
        if name.lower() in _RESERVED_HEADERS or name.lower().startswith(_RESERVED_PREFIXES):
            raise ValidationFailed("headers", f"{name} is set by hookwright or belongs to the connection: leave it out")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValidationFailed("headers", f"the value of {name} must be printable ASCII without line breaks")
    return tuple((headers or {}).items())


def _tenant(tenant: Tenant) -> Tenant:
    if tenant is None or tenant is ALL_TENANTS or (isinstance(tenant, str) and tenant):
        return tenant
    raise ValidationFailed("tenant", "must be text, None, or ALL_TENANTS")


def _positive(field: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValidationFailed(field, f"must be a whole number of at least 1, not {value!r}")
    return value
