"""Claims and settles of one process, and what is known of those whose answer was lost.

A claim whose connection broke may have leased rows that nobody has: they are given back before the next one. A settle
whose connection broke may have been written: when it is asked for again, it is answered as the first would have been.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from hookwright._errors import CommitLost
from hookwright.storage.postgres import _claim, _settle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from hookwright._health import HealthPolicy
    from hookwright._models import Claim, Outcome, Settled
    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.postgres._pool import Pool

_LATE = 30.0
"""Seconds for which a claim whose connection is gone may still arrive: the kernel gives up after 14, a statement ends
after 10.
"""

_LATE_LOOK = 0.25
"""Seconds between two looks for it."""


class Claimed(NamedTuple):
    """A claim, the server's time in it, and this process's when it began."""

    claim: Claim
    now: int
    begun: int


class Turns:
    """See the module. `owner` is whose the leases are; `shared`: other processes' leases take up room, too."""

    def __init__(self, pool: Pool, channel: str | None, now: Callable[[], int], *, owner: int, shared: bool) -> None:
        self._pool = pool
        self._channel = channel
        self._now = now
        self._owner = owner
        self._shared = shared
        self._unknown: set[str] = set()
        self._lost: dict[str, asyncio.Future[Any]] = {}
        self._late: dict[str, float] = {}
        self._looked = 0.0

    # -- settle -------------------------------------------------------------------------------------------------

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy) -> list[Settled]:
        """See `Storage.settle`."""
        tokens = {outcome.token for outcome in outcomes}
        unknown = self._unknown & tokens
        try:
            if not unknown and _settle.all_succeeded(outcomes):
                successes = partial(_settle.settle_successes, outcomes=outcomes, policy=policy)
                answers = await self._pool.run(successes, first=True, single=True)
            else:
                answers = await self._pool.run(
                    partial(_settle.settle, outcomes=outcomes, policy=policy, unknown=unknown, channel=self._channel),
                    first=True,
                )
        except CommitLost:
            self._unknown |= tokens
            raise
        self._unknown -= tokens
        return answers

    # -- claim --------------------------------------------------------------------------------------------------

    def claim(self, request: ClaimRequest) -> tuple[str, asyncio.Task[Claimed]]:
        """Begin to claim; see `Storage.claim`. Return what the tokens of its leases begin with, too."""
        token = _claim.claim_token()
        return token, asyncio.get_running_loop().create_task(self._claim(request, token))

    async def _claim(self, request: ClaimRequest, token: str) -> Claimed:
        claim = partial(_claim.claim, request=request, owner=self._owner, token=token, shared=self._shared)
        begun = self._now()
        claimed, now = await self._pool.run(claim, first=True, single=True)
        return Claimed(claimed, now, begun)

    def lost(self, token: str, claiming: asyncio.Task[Claimed]) -> None:
        """Note a claim whose answer nobody has: what it leased is given back before the next one."""
        self._lost[token] = claiming

    async def give_back_lost(self) -> None:
        """End the leases of claims that were written, but whose answer nobody had."""
        began = time.monotonic()
        lost = {token: claiming for token, claiming in self._lost.items() if claiming.done()}
        late = list(self._late) if began >= self._looked + _LATE_LOOK else []
        if not lost and not late:
            return
        found = await self._pool.run(partial(_claim.give_back, tokens=[*lost, *late]), first=True)
        self._looked = began
        for token, claiming in lost.items():
            self._lost.pop(token, None)
            if claiming.cancelled() or claiming.exception() is not None:
                self._late[token] = began + _LATE
        self._late = {token: until for token, until in self._late.items() if token not in found and began < until}
