"""Claims and settles of one process: one call of the server does both where they are asked for together.

A worker that writes results asks for leases in their place in the same moment, and both lock the same lanes. So a
settle waits a moment for a claim that takes it along; when none comes, or the claim could not, it goes alone.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from hookwright._errors import StorageError
from hookwright.storage.postgres import _claim, _settle
from hookwright.storage.postgres._pool import CommitLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from hookwright._health import HealthPolicy
    from hookwright._models import Claim, Outcome, Settled
    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.postgres._database import Database
    from hookwright.storage.postgres._pool import Pool

_TICKS = 8
"""Turns of the loop that a settle waits for a claim: it comes after one or two, or while the worker starts attempts."""

_NEXT = 0.05
"""Seconds for which it waits for the claim before, after which there is a next one."""

_LATE = 30.0
"""Seconds for which a claim whose connection is gone may still arrive: the kernel gives up after 14, a statement ends
after 10.
"""

_LATE_LOOK = 0.25
"""Seconds between two looks for it."""


class Offer:
    """Results that a claim may take along: `answer` is the server's, or None where it did not."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = outcomes
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.taken = False
        self.task: asyncio.Task[list[Settled]] | None = None

    def resolve(self, answer: Any) -> None:
        """Give the answer, once."""
        if not self.answer.done():
            self.answer.set_result(answer)


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
        self._offer: Offer | None = None
        self._claiming: asyncio.Task[Claimed] | None = None
        self._unknown: set[str] = set()
        self._lost: dict[str, asyncio.Future[Any]] = {}
        self._late: dict[str, float] = {}
        self._looked = 0.0

    # -- settle -------------------------------------------------------------------------------------------------

    def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy) -> asyncio.Task[list[Settled]]:
        """Begin to settle; see `Storage.settle`."""
        offer = None
        plain = _settle.all_succeeded(outcomes) and self._unknown.isdisjoint(outcome.token for outcome in outcomes)
        if plain and self._offer is None:
            offer = self._offer = Offer(outcomes)
        task = asyncio.get_running_loop().create_task(self._settle(outcomes, policy, offer, plain=plain))
        if offer is not None:
            offer.task = task
        return task

    async def _settle(
        self, outcomes: Sequence[Outcome], policy: HealthPolicy, offer: Offer | None, *, plain: bool
    ) -> list[Settled]:
        tokens = {outcome.token for outcome in outcomes}
        try:
            answer = None if offer is None else await self._taken_along(offer)
            if answer is None and plain:
                successes = partial(_settle.settle_successes, outcomes=outcomes)
                answer = await self._pool.run(successes, first=True, single=True)
            if answer is not None:
                answers = _settle.answers(outcomes, policy, answer)
            else:
                settle = partial(_settle.settle, outcomes=outcomes, policy=policy)
                settle = partial(settle, unknown=self._unknown & tokens, channel=self._channel)
                answers = await self._pool.run(settle, first=True)
        except CommitLost:
            self._unknown |= tokens
            raise
        self._unknown -= tokens
        return answers

    async def _taken_along(self, offer: Offer) -> Any:
        if self._claiming is not None and not self._claiming.done():
            await asyncio.wait({self._claiming}, timeout=_NEXT)
        for _ in range(_TICKS):
            if self._offer is not offer:
                break
            await asyncio.sleep(0)
        else:
            self._offer = None
        return await offer.answer if offer.taken else None

    # -- claim --------------------------------------------------------------------------------------------------

    def take(self, before: set[asyncio.Future[Any]]) -> Offer | None:
        """Return what a claim takes along: nothing where something else was asked for `before`."""
        offer, self._offer = self._offer, None
        if offer is None or before != {offer.task}:
            return None  # it goes alone
        offer.taken = True
        return offer

    def claim(self, request: ClaimRequest, offer: Offer | None) -> tuple[str, asyncio.Task[Claimed]]:
        """Begin to claim; see `Storage.claim`. Return what the tokens of its leases begin with, too."""
        token = _claim.claim_token()
        self._claiming = asyncio.get_running_loop().create_task(self._claim(request, token, offer))
        return token, self._claiming

    async def _claim(self, request: ClaimRequest, token: str, offer: Offer | None) -> Claimed:
        claim = partial(_claim.claim, request=request, owner=self._owner, token=token, shared=self._shared)
        try:
            await self._give_back_lost()
            if offer is not None:
                try:
                    return await self._run(partial(claim, outcomes=offer.outcomes), offer)
                except CommitLost as error:
                    offer.answer.set_exception(error)
                    raise
                except StorageError:  # whose fault it is shows when each goes alone
                    offer.resolve(None)
                    settling = [*request.settling, *(outcome.delivery_id for outcome in offer.outcomes)]
                    claim = partial(claim, request=request._replace(settling=settling))
            return await self._run(partial(claim, outcomes=None), None)
        finally:
            if offer is not None:
                offer.resolve(None)

    async def _run(self, claim: Callable[[Database], Any], offer: Offer | None) -> Claimed:
        begun = self._now()
        claimed, settled, now = await self._pool.run(claim, first=True, single=True)
        if offer is not None:
            offer.resolve(settled)
        return Claimed(claimed, now, begun)

    def lost(self, token: str, claiming: asyncio.Task[Claimed]) -> None:
        """Note a claim whose answer nobody has: what it leased is given back before the next one."""
        self._lost[token] = claiming

    async def _give_back_lost(self) -> None:
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
