"""`dispatcher.endpoints`: the receivers, from create to delete."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from hookwright._catalogue import check_reserved
from hookwright._clock import SECOND, from_datetime
from hookwright._delivery import longest_timeout
from hookwright._endpoint_fields import (
    filters_of,
    headers_of,
    metadata_of,
    patterns,
    positive,
    rate,
    tenant_of,
    text,
)
from hookwright._endpoint_views import to_endpoint, to_stats
from hookwright._errors import ConfigurationError, ConflictError, NotFound, ValidationFailed
from hookwright._ids import new_id
from hookwright._models import (
    ALL_TENANTS,
    TEST_TYPE,
    Attempt,
    DeliveryState,
    Emission,
    Endpoint,
    EndpointRow,
    EndpointState,
    EndpointStats,
    EventRow,
    Key,
    Lease,
    NewDelivery,
    Page,
    check_id,
    check_limit,
    check_reader,
    to_attempt,
)
from hookwright._observe import EndpointDisabled
from hookwright._prepare import lease_of
from hookwright._secret import Secret
from hookwright._snapshot import check_aware
from hookwright._vault import SealBroken, check_clear, looks_sealed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hookwright._addresses import NetworkPolicy
    from hookwright._catalogue import Catalogue
    from hookwright._clock import Clock
    from hookwright._matching import EndpointCache
    from hookwright._models import AttemptRecord, Tenant
    from hookwright._observe import ObserverHub
    from hookwright._profile import Profile
    from hookwright._vault import Vault
    from hookwright.storage._base import Storage

TEST_INTERVAL = 10 * SECOND
"""Between two tests of an endpoint."""

OVERLAP_MOST = timedelta(days=7)

KEYS_MOST = 5
"""Secrets of an endpoint that sign at once, at most: each adds a signature to the header."""


_PAGE = 100
"""Endpoints that `reencrypt` reads at once."""


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""The default of an `update` argument: leave it as it is. None would mean: set it to None."""


class Endpoints:
    """Create, read, change and remove endpoints. Reached as `dispatcher.endpoints`.

    Every change takes effect with the next attempt, in whichever process; existing deliveries keep their endpoint when
    its events or filters change. By-id verbs take `tenant=`, and answer NotFound when the endpoint is another's. To
    create, `tenant=None` means that the endpoint serves events without a tenant; to read it means every tenant, so that
    an application with many customers gives it always.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        clock: Clock,
        network: NetworkPolicy,
        profiles: Mapping[str, Profile],
        cache: EndpointCache,
        vault: Vault,
        catalogue: Catalogue | None,
        operational: bool,
        id_prefix: str,
        lease: float,
        observers: ObserverHub,
        check_usable: Callable[[], None],
        changed: Callable[[], None],
        try_out: Callable[[Lease], Awaitable[tuple[AttemptRecord, bool]]],
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._network = network
        self._profiles = profiles
        self._cache = cache
        self._vault = vault
        self._catalogue = catalogue
        self._operational = operational
        self._id_prefix = id_prefix
        self._lease = lease
        self._observers = observers
        self._check_usable = check_usable
        self._changed = changed
        self._try_out = try_out

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
        rate_limit: float | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Subscribe a receiver; from the next `emit` on it gets what matches.

        `events` are patterns: `*`, `video.*` (any depth below `video`), or exact types. `filters` narrow further: each
        key must be among the event's attributes, with a value in common. `secret` None makes one of 32 random bytes;
        it is on the returned endpoint and on no later one: show it to the receiver's owner now. `concurrency` bounds
        the attempts in flight to it (default: the dispatcher's `endpoint_concurrency`), `rate_limit` those begun in a
        second (of which all may come at once), and `timeout` (seconds) replaces the profile's total. Header values are
        never read back.

        Raises ValidationFailed, naming the argument and what would be right.
        """
        self._check_usable()
        given = self._secret(profile, secret)
        now = self._clock.now()
        row = EndpointRow(
            id=new_id(self._id_prefix, now),
            url=self._network.check_url(url),
            events=self._patterns(events),
            created_at=now,
            updated_at=now,
            keys=(Key(given.reveal()),),
            name=text("name", name),
            description=text("description", description),
            filters=filters_of(filters),
            metadata=metadata_of(metadata),
            headers=headers_of(headers),
            tenant=tenant_of(tenant),
            profile=profile,
            concurrency=positive("concurrency", concurrency),
            rate_limit=rate(rate_limit),
            timeout=timeout,
        )
        self._check_profile(row)
        stored = await self._storage.create_endpoint(self._vault.sealed(row))
        return replace(self._shown(stored), secret=given)

    async def get(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Return an endpoint; without `secret_last4` when its key is not among `keys=`. Raises NotFound."""
        return self._shown(await self._row(endpoint_id, tenant))

    async def list(self, *, limit: int = 50, cursor: str | None = None, tenant: str | None = None) -> Page[Endpoint]:
        """Return endpoints, newest first, `limit` (1 to 500) to a page; go on with `next_cursor`.

        Raises ValidationFailed for a limit out of range or a cursor that did not come from the same list.
        """
        self._check_usable()
        page = await self._storage.list_endpoints(limit=check_limit(limit), cursor=cursor, tenant=check_reader(tenant))
        return Page(items=tuple(self._shown(row) for row in page.items), next_cursor=page.next_cursor)

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
        rate_limit: float | Unset | None = UNSET,
        timeout: float | Unset | None = UNSET,
        tenant: str | None = None,
    ) -> Endpoint:
        """Change what is given and leave the rest; the checks are those of `create`.

        What is stored encrypted and cannot be opened stays as it is, unless it is what is given. Raises NotFound,
        ValidationFailed, or ConflictError when somebody else changed the endpoint at the same moment.
        """
        row = await self._row(endpoint_id, tenant)
        given: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "url": (url, self._network.check_url),
            "events": (events, self._patterns),
            "name": (name, lambda value: text("name", value)),
            "description": (description, lambda value: text("description", value)),
            "filters": (filters, filters_of),
            "metadata": (metadata, metadata_of),
            "headers": (headers, headers_of),
            "profile": (profile, str),
            "concurrency": (concurrency, lambda value: positive("concurrency", value)),
            "rate_limit": (rate_limit, rate),
            "timeout": (timeout, lambda value: value),
        }
        changed = {key: check(value) for key, (value, check) in given.items() if value is not UNSET}
        return self._shown(await self._replace(replace(row, updated_at=self._clock.now(), **changed)))

    async def rotate_secret(
        self,
        endpoint_id: str,
        *,
        secret: Secret | str | None = None,
        overlap: timedelta = timedelta(hours=24),
        profile: str | None = None,
        tenant: str | None = None,
    ) -> Endpoint:
        """Give the endpoint a new secret, and return it on the endpoint this once.

        Until `overlap` has passed (0 to 7 days) the earlier ones go on signing, so that the receiver has time to change
        over; with `timedelta(0)` they end at once, as they must when they leaked. A plain HexSignature header holds one
        signature only: that of the new secret. `profile` changes to another one at the same moment, whose signers need
        another kind of secret; earlier secrets that they cannot use end with that.

        Raises NotFound, ValidationFailed, or ConflictError when more than five secrets would sign at once. When the key
        that the earlier secrets were encrypted with is lost, an overlap of 0 leaves them out.
        """
        if not isinstance(overlap, timedelta) or not timedelta(0) <= overlap <= OVERLAP_MOST:
            raise ValidationFailed("overlap", "must be a timedelta from 0 to 7 days")
        row = await self._row(endpoint_id, tenant)
        row = row if profile is None else replace(row, profile=profile)
        given = self._secret(row.profile, secret)
        now = self._clock.now()
        end = now + overlap // timedelta(microseconds=1)
        earlier = [Key(key.text, min(end, key.expires_at or end)) for key in row.keys]
        live = [key for key in earlier if key.expires_at is not None and key.expires_at > now]
        if live:
            self._check_readable(replace(row, keys=tuple(live), headers=()))
        if len(live) >= KEYS_MOST:
            raise ConflictError(f"{KEYS_MOST} secrets of {endpoint_id} sign already: wait, or rotate with overlap=0")
        stored = await self._replace(replace(row, updated_at=now, keys=(Key(given.reveal()), *live)))
        return replace(self._shown(stored), secret=given)

    async def reencrypt(self) -> int:
        """Encrypt all endpoints' secrets and header values with the first of `keys=`; return how many had to change.

        Afterwards the keys that came after the first are not needed any more, and what was stored before, in clear text
        perhaps, is not to be read in the database's files either. Copies made of them earlier still hold it. First
        give the new key to every process that uses the database; emitting and delivering go on. To repeat it does no
        harm.

        Raises ConfigurationError without keys (nothing is ever decrypted in the storage), StorageBusy when readers keep
        old pages alive, and ConflictError for endpoints that cannot be opened, once all others are done.
        """
        self._check_usable()
        if not self._vault.seals:
            raise ConfigurationError("reencrypt: the dispatcher has no keys=: give the one to encrypt with first")
        count, cursor = 0, None
        broken: dict[str, SealBroken] = {}
        while True:
            page = await self._storage.list_endpoints(limit=_PAGE, cursor=cursor, tenant=None)
            for row in page.items:
                try:
                    count += await self._reseal(row)
                except SealBroken as error:
                    broken[row.id] = error
                except NotFound:
                    pass
            cursor = page.next_cursor
            if cursor is None:
                break
        self._changed()
        await self._storage.scrub_endpoints()
        if broken:
            id, why = next(iter(broken.items()))
            raise ConflictError(f"{len(broken)} endpoints cannot be opened, the others are done; of {id}: {why}")
        return count

    async def _reseal(self, row: EndpointRow) -> bool:
        while True:
            opened = self._vault.opened(row)  # also what is under the first key: it may be another of the same id
            if not self._vault.needs_sealing(row):
                return False
            new = self._vault.sealed(opened)
            try:
                await self._storage.update_endpoint(new)
            except ConflictError:  # changed meanwhile, and perhaps by a process that has other keys
                row = await self._storage.get_endpoint(row.id)
            else:
                return True

    async def test(self, endpoint_id: str, *, tenant: str | None = None) -> Attempt:
        """Send a signed event of type `hookwright.test` now, once, and return what came of it.

        It ignores what the endpoint subscribed to, and whether it is paused or disabled; it is recorded as a delivery,
        and touches neither retries nor the endpoint's health. Works in a process that does not deliver, too.

        Raises NotFound, or ConflictError: tested less than 10 s ago, or nothing can be sent to it.
        """
        row = await self._row(endpoint_id, tenant)
        await self._storage.admit_test(endpoint_id, TEST_INTERVAL)
        await self._cache.refresh(row.revision - 1)
        now = self._clock.now()
        event = EventRow(
            id=new_id("evt", now),
            type=TEST_TYPE,
            data=b'{"test":true}',
            occurred_at=self._clock.wall(),
            tenant=None if row.tenant is ALL_TENANTS else row.tenant,
        )
        delivery = NewDelivery(new_id("dlv", now), endpoint_id)
        record, succeeded = await self._try_out(lease_of(event, delivery, now))
        state = DeliveryState.SUCCEEDED if succeeded else DeliveryState.FAILED
        await self._storage.record_test(Emission(event, [delivery]), state, record)
        return to_attempt(delivery.id, 1, record)

    async def stats(
        self, endpoint_id: str, *, since: datetime | None = None, tenant: str | None = None
    ) -> EndpointStats:
        """Return how many attempts were made since then (default: the last day), how many failed, and their durations.

        At most the newest 100,000 attempts are looked at. Raises NotFound, or ValidationFailed for a time without zone.
        """
        await self._row(endpoint_id, tenant)
        begin = self._clock.now() - 86_400 * SECOND if since is None else from_datetime(check_aware("since", since))
        return to_stats(await self._storage.stats(endpoint_id, begin))

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
        """Send nothing more: new and waiting deliveries are recorded as skipped. Harmless when repeated.

        Those that wait are marked soon after, in batches.
        """
        endpoint = await self._set_state(endpoint_id, EndpointState.DISABLED, text("reason", reason), tenant)
        self._observers.report(EndpointDisabled(endpoint_id=endpoint_id, reason=reason))
        return endpoint

    async def enable(self, endpoint_id: str, *, tenant: str | None = None) -> Endpoint:
        """Make a disabled (or paused) endpoint active; what is already skipped stays skipped."""
        return await self._set_state(endpoint_id, EndpointState.ACTIVE, None, tenant)

    async def delete(self, endpoint_id: str, *, tenant: str | None = None) -> None:
        """Remove it: its history stays, what waits is cancelled (soon after, in batches). Raises NotFound."""
        await self._row(endpoint_id, tenant)
        try:
            await self._storage.delete_endpoint(endpoint_id)
        finally:
            self._changed()

    async def _set_state(
        self, endpoint_id: str, state: EndpointState, reason: str | None, tenant: str | None
    ) -> Endpoint:
        await self._row(endpoint_id, tenant)
        try:
            row = await self._storage.set_endpoint_state(endpoint_id, state, reason=reason)
        finally:
            self._changed()  # cancelled or failed, it may be done all the same: nobody else would sweep or send
        return self._shown(row)

    async def _replace(self, row: EndpointRow) -> EndpointRow:
        """Check and store a row in which some texts are new and clear, and others as they were read.

        What cannot be opened stays as it is: an endpoint whose key is lost gets a new secret, then new headers.
        """
        new = self._vault.readable(row)
        self._check_profile(new)
        try:
            return await self._storage.update_endpoint(self._vault.sealed(new))
        finally:
            self._changed()

    def _check_readable(self, row: EndpointRow) -> None:
        try:
            self._vault.opened(row)
        except SealBroken as error:
            raise ConflictError(f"endpoint {row.id} was left as it is (an overlap of 0 would help): {error}") from None

    def _shown(self, row: EndpointRow) -> Endpoint:
        try:
            return to_endpoint(self._vault.opened(row))
        except SealBroken:
            return to_endpoint(replace(row, keys=()))

    async def _row(self, endpoint_id: str, tenant: str | None) -> EndpointRow:
        self._check_usable()
        row = await self._storage.get_endpoint(check_id("endpoint_id", endpoint_id))
        if check_reader(tenant) is not None and (row.tenant is ALL_TENANTS or row.tenant != tenant):
            raise NotFound(f"there is no endpoint {endpoint_id!r}")
        return row

    def _patterns(self, events: Sequence[str]) -> tuple[str, ...]:
        found = patterns(events)
        for pattern in found:
            check_reserved(pattern, operational=self._operational)
        for pattern in found if self._catalogue is not None else ():
            assert self._catalogue is not None
            self._catalogue.check_pattern(pattern)
        return found

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
        given = secret if isinstance(secret, Secret) else Secret(secret)
        check_clear("secret", given.reveal())
        return given

    def _check_profile(self, row: EndpointRow) -> None:
        profile = self._profile(row.profile)
        if not looks_sealed(row.keys[0].text):
            for signer in profile.signers:
                signer.check(Secret.text(row.keys[0].text))
        if profile.client_certificate is not None and not row.url.startswith("https:"):
            raise ValidationFailed("url", f"must be https: the profile {row.profile!r} presents a client certificate")
        for name, _ in row.headers:
            if name.lower() in profile.header_names:
                raise ValidationFailed("headers", f"{name} is set by the profile {row.profile!r}: leave it out")
        longest = longest_timeout(self._lease)
        is_number = isinstance(row.timeout, (int, float)) and not isinstance(row.timeout, bool)
        if row.timeout is not None and not (is_number and 0 < row.timeout <= longest):
            raise ValidationFailed("timeout", f"must be more than 0 and at most {longest:g} s, the lease less 10 s")
