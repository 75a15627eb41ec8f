"""Which endpoints want an event: a cache of all endpoints, exact to a revision that `enqueue` compares."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hookwright._catalogue import candidates
from hookwright._models import ALL_TENANTS, EndpointState
from hookwright._secret import Secret
from hookwright._signing import usable
from hookwright._snapshot import typed
from hookwright._vault import SealBroken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookwright._models import EndpointRow
    from hookwright._signing import Signer
    from hookwright._snapshot import TypedValues
    from hookwright._vault import Vault
    from hookwright.storage._base import Storage


class CachedEndpoint(NamedTuple):
    """An endpoint, with what matching and sending need made ready once.

    `hidden` is filled by `_blank.secrets_of`, `fixed` (headers) by the Preparer. `broken` says why its secrets and
    headers could not be opened; it has none then, and nothing may be sent to it.
    """

    row: EndpointRow
    filters: Mapping[str, TypedValues]
    secrets: tuple[tuple[Secret, int | None], ...]
    checked: dict[int, Sequence[Secret]]
    hidden: list[Any]
    fixed: list[tuple[str, str]]
    broken: str | None = None

    def __repr__(self) -> str:
        return f"CachedEndpoint({self.row!r}, broken={self.broken!r})"

    def live_secrets(self, now: int) -> list[Secret]:
        """Return the secrets that have not expired, newest first."""
        return [secret for secret, expires_at in self.secrets if expires_at is None or expires_at > now]

    def signing(self, signer: Signer, now: int) -> Sequence[Secret]:
        """Return the secrets that this signer signs with now. Raises ValidationFailed when it can use none."""
        known = self.checked.get(id(signer))
        if known is not None:
            return known
        found = usable(signer, self.live_secrets(now))
        if len(self.secrets) == 1:  # several: they expire
            self.checked[id(signer)] = found
        return found

    def wants(self, tenant: str | None, attributes: Mapping[str, TypedValues]) -> bool:
        """Whether tenant and attributes fit: every filter's key must be present, and have a value in common."""
        if self.row.tenant is not ALL_TENANTS and self.row.tenant != tenant:
            return False
        return all(allowed & attributes.get(key, frozenset()) for key, allowed in self.filters.items())


class EndpointCache:
    """All endpoints as of `revision`, found by pattern."""

    def __init__(self, storage: Storage, vault: Vault) -> None:
        self._storage = storage
        self._vault = vault
        self._by_id: dict[str, CachedEndpoint] = {}
        self._by_pattern: defaultdict[str, dict[str, CachedEndpoint]] = defaultdict(dict)
        self._broken: dict[str, str] = {}
        self._refreshing = asyncio.Lock()
        self.revision = -1

    async def refresh(self, seen: int) -> bool:
        """Read what changed, unless the cache is beyond revision `seen` already; say whether an endpoint stopped."""
        async with self._refreshing:
            if self.revision > seen:
                return False
            changes = await self._storage.changes(self.revision)
            for row in changes.endpoints:
                self._replace(row)
            self.revision = changes.revision
            return any(row.deleted or row.state is EndpointState.DISABLED for row in changes.endpoints)

    def _replace(self, row: EndpointRow) -> None:
        old = self._by_id.pop(row.id, None)
        self._broken.pop(row.id, None)
        for pattern in old.row.events if old is not None else ():
            del self._by_pattern[pattern][row.id]
            if not self._by_pattern[pattern]:
                del self._by_pattern[pattern]
        if row.deleted:
            return
        try:
            row, broken = self._vault.opened(row), None
        except SealBroken as error:
            row, broken = replace(row, keys=(), headers=()), str(error)
            self._broken[row.id] = broken
        filters = {key: typed(values) for key, values in row.filters.items()}
        secrets = tuple((Secret.text(key.text), key.expires_at) for key in row.keys)
        new = CachedEndpoint(row, filters, secrets, {}, [], [], broken)
        self._by_id[row.id] = new
        for pattern in row.events:
            self._by_pattern[pattern][row.id] = new

    def get(self, endpoint_id: str) -> CachedEndpoint | None:
        """Return it, or None when it does not exist (any more)."""
        return self._by_id.get(endpoint_id)

    @property
    def broken(self) -> Mapping[str, str]:
        """The endpoints whose secrets or headers cannot be opened, and why."""
        return self._broken

    def all(self) -> list[CachedEndpoint]:
        """Return all that exist."""
        return list(self._by_id.values())

    def match(self, event_type: str, tenant: str | None, attributes: Mapping[str, TypedValues]) -> list[CachedEndpoint]:
        """Return the endpoints that want the event, each once."""
        found: dict[str, CachedEndpoint] = {}
        for pattern in candidates(event_type):
            found |= self._by_pattern.get(pattern, {})
        return [endpoint for endpoint in found.values() if endpoint.wants(tenant, attributes)]
