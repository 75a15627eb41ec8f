"""Which endpoints want an event: a cache of all endpoints, exact to a revision that `enqueue` compares."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic_core import from_json, to_json

from hookwright._catalogue import candidates
from hookwright._errors import StorageError
from hookwright._models import ALL_TENANTS, EndpointRow, EndpointState, Key
from hookwright._secret import Secret
from hookwright._signing import usable
from hookwright._snapshot import of_term, term
from hookwright._vault import SealBroken

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hookwright._clock import Clock
    from hookwright._models import Tenant
    from hookwright._signing import Signer
    from hookwright._snapshot import Scalar
    from hookwright._vault import Vault
    from hookwright.storage._base import Storage

    Allowed = str | tuple[str, ...] | frozenset[str]

HOT_MOST: Final = 10_000
"""Endpoints that are kept ready to be sent to, at about 4 KB each.

Any other is made ready when a delivery needs it, which takes 0.1 to 0.3 ms with all that its first request needs.
"""

_FEW: Final = 8
"""Values that a filter looks for one by one."""

_AT_ONCE: Final = 32
"""Changed endpoints that are taken over before other tasks of the loop have their turn."""


class CachedEndpoint(NamedTuple):
    """An endpoint, with what sending needs made ready once.

    Of the row, what neither matching nor sending reads (description, metadata, times, health) is left out. `hidden` is
    filled by `_blank.secrets_of`, `outline` by the Preparer. `broken` says why its secrets and headers could
    not be opened; it has none then, and nothing may be sent to it.
    """

    row: EndpointRow
    secrets: tuple[tuple[Secret, int | None], ...]
    checked: dict[int, Sequence[Secret]]
    hidden: list[Any]
    outline: list[Any]
    broken: str | None = None

    def __repr__(self) -> str:
        return f"CachedEndpoint({self.row!r}, broken={self.broken!r})"

    def live_secrets(self, now: int) -> list[Secret]:
        """Return the secrets that have not expired, newest first."""
        return [secret for secret, expires_at in self.secrets if expires_at is None or expires_at > now]

    def signing(self, signer: Signer, clock: Clock) -> Sequence[Secret]:
        """Return the secrets that this signer signs with now. Raises ValidationFailed when it can use none."""
        known = self.checked.get(id(signer))
        if known is not None:
            return known
        found = usable(signer, self.live_secrets(clock.now()))
        if len(self.secrets) == 1:  # several: they expire
            self.checked[id(signer)] = found
        return found


class SubscriptionIndex:
    """Endpoints by tenant and pattern, so that finding those of an event does not depend on how many others exist."""

    def __init__(self) -> None:
        # Most have one endpoint, and need no dict of their own. Those of the others keep the order, and have no values.
        self._one: dict[str, str] = {}
        self._several: dict[str, dict[str, None]] = {}

    def add(self, endpoint_id: str, tenant: Tenant, patterns: Iterable[str]) -> None:
        """Put an endpoint under each pattern."""
        for pattern in patterns:
            key = self._key(tenant, pattern)
            if key in self._several:
                self._several[key][endpoint_id] = None
            elif key in self._one:
                self._several[key] = {self._one.pop(key): None, endpoint_id: None}
            else:
                self._one[key] = endpoint_id

    def discard(self, endpoint_id: str, tenant: Tenant, patterns: Iterable[str]) -> None:
        """Take an endpoint from under each pattern that it was put under."""
        for pattern in patterns:
            key = self._key(tenant, pattern)
            if key in self._one:
                del self._one[key]
                continue
            del self._several[key][endpoint_id]
            if not self._several[key]:
                del self._several[key]

    def find(self, event_type: str, tenant: str | None) -> dict[str, None]:
        """Return those whose patterns match the type, of the tenant and of all tenants, each once."""
        found: dict[str, None] = {}
        for pattern in candidates(event_type):
            for key in (self._key(tenant, pattern), self._key(ALL_TENANTS, pattern)):
                if key in self._one:
                    found[self._one[key]] = None
                elif key in self._several:
                    found |= self._several[key]
        return found

    def _key(self, tenant: Tenant, pattern: str) -> str:
        """Return one text for both. No pattern holds a NUL, no tenant is an empty text, and one may be called "*"."""
        return pattern if tenant is ALL_TENANTS else f"{pattern}\0{tenant or ''}"


class EndpointCache:
    """All endpoints as of `revision`, found by tenant and pattern.

    Of each it keeps a few hundred bytes: the row, packed as the storage gave it, sealed when it is encrypted. Those
    that are sent to are kept ready, HOT_MOST of them.
    """

    def __init__(self, storage: Storage, vault: Vault) -> None:
        self._storage = storage
        self._vault = vault
        # Here and in the index, texts and bytes: the garbage collector need not look at a hundred thousand endpoints.
        self._packed: dict[str, bytes] = {}
        self._index = SubscriptionIndex()
        self._filters: dict[str, tuple[Allowed, ...]] = {}
        self._disabled: set[str] = set()
        self._broken: dict[str, str] = {}
        self._hot: OrderedDict[str, CachedEndpoint] = OrderedDict()
        self._refreshing = asyncio.Lock()
        self.revision = -1

    async def refresh(self, seen: int | None = None) -> bool:
        """Read what changed, unless the cache is beyond revision `seen` already; say whether an endpoint stopped.

        To see a change, `seen` must be the revision before it: another refresh may be under way that began earlier.
        Other tasks run meanwhile, and see some endpoints as they were and others as they are, under the old revision:
        what they matched so is refused by `enqueue` as stale.
        """
        async with self._refreshing:
            if seen is not None and self.revision > seen:
                return False
            stopped, revision, more = False, self.revision, True
            while more:
                since = revision
                revision, rows, more = await self._storage.changes(since)
                if more and revision <= since:
                    raise StorageError(f"changes({since}) says that there are more, but comes no further: see Changes")
                for begin in range(0, len(rows), _AT_ONCE):
                    await asyncio.sleep(0)
                    for row in rows[begin : begin + _AT_ONCE]:
                        self._replace(row)
                        stopped = stopped or row.deleted or row.state is EndpointState.DISABLED
            self.revision = revision
            return stopped

    def _replace(self, row: EndpointRow) -> None:
        self._forget(row.id)
        if row.deleted:
            return
        self._packed[row.id] = _pack(row)
        self._index.add(row.id, row.tenant, row.events)
        if row.filters:
            self._filters[row.id] = tuple(_allowed(key, values) for key, values in row.filters.items())
        if row.state is EndpointState.DISABLED:
            self._disabled.add(row.id)
        try:
            self._vault.opened(row)  # each one now: whoever is broken is named before anything is to be sent to it
        except SealBroken as error:
            self._broken[row.id] = str(error)

    def _forget(self, endpoint_id: str) -> None:
        old = self.row(endpoint_id)
        if old is None:
            return
        self._index.discard(old.id, old.tenant, old.events)
        del self._packed[old.id]
        self._filters.pop(old.id, None)
        self._disabled.discard(old.id)
        self._broken.pop(old.id, None)
        self._hot.pop(old.id, None)

    def row(self, endpoint_id: str) -> EndpointRow | None:
        """Return what matching and sending read of its row, as it is stored; None when it does not exist (any more)."""
        packed = self._packed.get(endpoint_id)
        return None if packed is None else _unpack(endpoint_id, packed)

    def get(self, endpoint_id: str) -> CachedEndpoint | None:
        """Return it ready to be sent to, or None when it does not exist (any more)."""
        hot = self._hot.get(endpoint_id)
        if hot is not None:
            self._hot.move_to_end(endpoint_id)
            return hot
        row = self.row(endpoint_id)
        if row is None:
            return None
        hot = self._hot[endpoint_id] = self._ready(row)
        if len(self._hot) > HOT_MOST:
            self._hot.popitem(last=False)
        return hot

    def _ready(self, row: EndpointRow) -> CachedEndpoint:
        broken = self._broken.get(row.id)
        row = self._vault.opened(row) if broken is None else replace(row, keys=(), headers=())
        secrets = tuple((Secret.text(key.text), key.expires_at) for key in row.keys)
        return CachedEndpoint(row, secrets, {}, [], [], broken)

    def exists(self, endpoint_id: str) -> bool:
        """Whether it does, and was not deleted."""
        return endpoint_id in self._packed

    def is_disabled(self, endpoint_id: str) -> bool:
        """Whether new events are only recorded for it."""
        return endpoint_id in self._disabled

    def filters(self, endpoint_id: str) -> dict[str, list[Scalar]]:
        """Return what it asks of attributes: for each key the values of which it takes one."""
        found: dict[str, list[Scalar]] = {}
        for allowed in self._filters.get(endpoint_id, ()):
            for key, value in map(of_term, [allowed] if isinstance(allowed, str) else allowed):
                found.setdefault(key, []).append(value)
        return found

    @property
    def broken(self) -> Mapping[str, str]:
        """The endpoints whose secrets or headers cannot be opened, and why."""
        return self._broken

    def all(self) -> list[str]:
        """Return the ids of all that exist."""
        return list(self._packed)

    def match(self, event_type: str, tenant: str | None, terms: frozenset[str]) -> list[str]:
        """Return the ids of the endpoints that want the event, each once.

        Of each of an endpoint's filters one of its terms must be among those of the event's attributes.
        """
        filters = self._filters
        return [
            endpoint_id
            for endpoint_id in self._index.find(event_type, tenant)
            if endpoint_id not in filters or _fit(filters[endpoint_id], terms)
        ]


def _allowed(key: str, values: Sequence[Scalar]) -> Allowed:
    """Return the terms of one filter: most have one, and a set takes more memory than ten texts."""
    terms = tuple(dict.fromkeys(term(key, value) for value in values))
    if len(terms) == 1:
        return terms[0]
    return terms if len(terms) <= _FEW else frozenset(terms)


def _fit(filters: Iterable[Allowed], terms: frozenset[str]) -> bool:
    for allowed in filters:
        if (allowed not in terms) if isinstance(allowed, str) else terms.isdisjoint(allowed):
            return False
    return True


def _pack(row: EndpointRow) -> bytes:
    everyone = row.tenant is ALL_TENANTS
    told = (row.url, row.events, row.name, row.tenant, everyone, row.profile, row.concurrency, row.timeout)
    return to_json((*told, row.state, row.revision, row.keys, row.headers))


def _unpack(endpoint_id: str, packed: bytes) -> EndpointRow:
    url, events, name, tenant, everyone, profile, concurrency, timeout, state, revision, keys, headers = from_json(
        packed
    )
    return EndpointRow(
        id=endpoint_id,
        url=url,
        events=tuple(events),
        created_at=0,
        updated_at=0,
        keys=tuple(Key(*key) for key in keys),
        name=name,
        headers=tuple((header, value) for header, value in headers),
        tenant=ALL_TENANTS if everyone else tenant,
        profile=profile,
        concurrency=concurrency,
        timeout=timeout,
        state=EndpointState(state),
        revision=revision,
    )
