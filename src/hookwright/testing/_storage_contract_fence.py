"""Fenced: every write that a lease permits, replayed with a token that is no longer the row's, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hookwright._clock import SECOND
from hookwright._models import DeliveryState, Emission, EndpointState
from hookwright.storage._base import ClaimRequest
from hookwright.testing._storage_contract_base import LEASE, ContractBase, World

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hookwright._models import Lease


async def _taken_over(world: World, lease: Lease) -> None:
    world.clock.time = lease.until
    assert (await world.claim_one()).taken_over


async def _ended(world: World, lease: Lease) -> None:
    assert (await world.settle(lease)).held


async def _retried(world: World, lease: Lease) -> None:
    assert (await world.settle(lease, DeliveryState.PENDING, retry_in=LEASE)).held


async def _given_back(world: World, lease: Lease) -> None:
    await world.storage.release([lease])


async def _claimed_again(world: World, lease: Lease) -> None:
    await world.storage.release([lease], sent=True)
    await world.claim_one()


async def _cancelled(world: World, lease: Lease) -> None:
    assert await world.storage.cancel([lease.delivery_id]) == [lease.delivery_id]


async def _sent_again(world: World, lease: Lease) -> None:
    await _cancelled(world, lease)
    assert await world.storage.requeue([lease.delivery_id], [DeliveryState.CANCELLED]) == 1
    await world.claim_one()


async def _swept(world: World, lease: Lease) -> None:
    await world.storage.set_endpoint_state(lease.endpoint_id, EndpointState.DISABLED, reason="manual")
    world.clock.time = lease.until
    await world.sweep()


async def _deleted(world: World, lease: Lease) -> None:
    await world.storage.delete_endpoint(lease.endpoint_id)
    world.clock.time = lease.until
    await world.sweep()


async def _expunged(world: World, lease: Lease) -> None:
    await world.storage.expunge(lease.event_id)


LOSSES: dict[str, Callable[[World, Lease], Awaitable[None]]] = {
    "taken over": _taken_over,
    "ended": _ended,
    "retried": _retried,
    "given back": _given_back,
    "given back and claimed again": _claimed_again,
    "cancelled": _cancelled,
    "cancelled and sent again": _sent_again,
    "swept": _swept,
    "its endpoint deleted": _deleted,
    "expunged": _expunged,
}

OUTCOMES: dict[str, dict[str, Any]] = {
    "succeeded": {"state": DeliveryState.SUCCEEDED},
    "to be retried": {"state": DeliveryState.PENDING, "retry_in": SECOND},
    "failed": {"state": DeliveryState.FAILED},
    "gone": {"state": DeliveryState.FAILED, "gone": True},
    "held": {"state": DeliveryState.FAILED, "hold": 60 * SECOND, "throttled": 1.0},
    "not counted": {"state": DeliveryState.FAILED, "counts": False, "attempt": None},
}

RELEASES: dict[str, dict[str, Any]] = {
    "unsent": {},
    "sent": {"sent": True},
    "with a hold": {"hold": 60 * SECOND},
}


class FenceContract(ContractBase):
    """A worker that comes too late."""

    @pytest.mark.parametrize("loss", LOSSES)
    async def test_no_result_of_a_lost_lease_changes_anything(self, loss: str) -> None:
        for fields in OUTCOMES.values():
            async with self.opened() as world:
                lease = await self._lost(world, loss)
                before = await self._all(world)
                alerts = [(name, Emission(world.new_event(), ())) for name in ("failed", "recovered", "disabled")]
                assert not (await world.settle(lease, **fields, alerts=alerts)).held
                assert await self._all(world) == before

    @pytest.mark.parametrize("loss", LOSSES)
    async def test_giving_a_lost_lease_back_changes_nothing(self, loss: str) -> None:
        for options in RELEASES.values():
            async with self.opened() as world:
                lease = await self._lost(world, loss)
                before = await self._all(world)
                await world.storage.release([lease], **options)
                assert await self._all(world) == before

    async def _lost(self, world: World, loss: str) -> Lease:
        endpoint = await world.endpoint()
        await world.prove(endpoint)
        await world.emit(endpoint)
        lease = await world.claim_one()
        await LOSSES[loss](world, lease)
        return lease

    async def _all(self, world: World) -> list[Any]:
        """Return all that can be read, and what tells of what cannot: when there is work, and how endpoints do."""
        page = await world.storage.list_endpoints(limit=100, cursor=None, tenant=None)
        looking = ClaimRequest(0, 0, LEASE, 4, {})
        return [
            await world.snapshot(),
            [(row.id, row.state, row.health) for row in page.items],
            (await world.storage.claim(looking)).next_due,
            await world.storage.backlog(),
        ]
