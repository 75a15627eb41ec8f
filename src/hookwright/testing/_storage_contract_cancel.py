"""All or nothing: a caller cancelled at any await, and a bad operation among good ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import pytest

from hookwright._errors import ConflictError, NotFound, StaleEndpoints, StorageError
from hookwright._models import DeliveryState, EndpointRow, EndpointState, Receipt
from hookwright.storage._base import ClaimRequest
from hookwright.testing._storage_contract_base import LEASE, CancelledAt, ContractBase, ManualClock, World

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hookwright._models import Lease


class _Scene(NamedTuple):
    """What the verbs below act on: three endpoints, one of them disabled with rows to sweep, and two leases."""

    world: World
    endpoint: EndpointRow
    one: Lease
    other: Lease


Verb: TypeAlias = "Coroutine[Any, Any, object]"


def _enqueue(scene: _Scene) -> Verb:
    world = scene.world
    rows = [world.new_delivery(scene.endpoint.id) for _ in range(3)]
    return world.storage.enqueue(world.new_event(), rows, endpoints_revision=4)


def _settle(scene: _Scene) -> Verb:
    world = scene.world
    retry = world.outcome(scene.other, DeliveryState.PENDING, retry_in=LEASE)
    return world.storage.settle([world.outcome(scene.one, DeliveryState.FAILED, gone=True), retry])


WRITES: dict[str, Callable[[_Scene], Verb]] = {
    "acquire": lambda scene: scene.world.storage.acquire(),
    "enqueue": _enqueue,
    "claim": lambda scene: scene.world.storage.claim(ClaimRequest(9, 9, LEASE, 4, {})),
    "settle": _settle,
    "release": lambda scene: scene.world.storage.release([scene.one, scene.other], sent=True, hold=LEASE),
    "sweep": lambda scene: scene.world.storage.sweep(),
    "create_endpoint": lambda scene: scene.world.storage.create_endpoint(scene.world.new_endpoint()),
    "update_endpoint": lambda scene: scene.world.storage.update_endpoint(replace(scene.endpoint, name="new")),
    "set_endpoint_state": lambda scene: scene.world.storage.set_endpoint_state(
        scene.endpoint.id, EndpointState.PAUSED, reason="manual"
    ),
    "delete_endpoint": lambda scene: scene.world.storage.delete_endpoint(scene.endpoint.id),
    "prune": lambda scene: scene.world.storage.prune(scene.world.clock.now() + 1),
}


class CancellationContract(ContractBase):
    """A caller that goes away."""

    @pytest.mark.parametrize("name", WRITES)
    async def test_a_write_whose_caller_is_cancelled_at_any_await_is_there_whole_or_not_at_all(self, name: str) -> None:
        async with self.opened() as world:
            scene = await self._scene(world)
            untouched = await world.snapshot()
            await WRITES[name](scene)
            done = await world.snapshot()
        number, reached = 0, True
        while reached:
            async with self.opened() as world:
                reached = await CancelledAt(WRITES[name](await self._scene(world)), number).run()
                assert await world.snapshot() in (untouched, done)
                await self._still_works(world)
            number += 1

    async def _scene(self, world: World) -> _Scene:
        first, second, disabled = [await world.storage.create_endpoint(world.new_endpoint()) for _ in range(3)]
        await world.enqueue(world.new_event())
        await world.emit(first.id, second.id, disabled.id, disabled.id)
        await world.emit(first.id)
        one, other = (await world.claim(2)).leases
        await world.storage.set_endpoint_state(disabled.id, EndpointState.DISABLED, reason="manual")
        return _Scene(world, first, one, other)

    async def _still_works(self, world: World) -> None:
        await self._deliver_one(world)
        await self.restart(world)
        await self._deliver_one(world)

    async def _deliver_one(self, world: World) -> None:
        (row,) = await world.emit(await world.endpoint())
        leases = {lease.delivery_id: lease for lease in (await world.claim()).leases}
        assert (await world.settle(leases[row])).held
        assert await world.state(row) is DeliveryState.SUCCEEDED

    async def test_rows_leased_by_a_cancelled_claim_come_back_when_their_lease_ends(self) -> None:
        number, reached = 0, True
        while reached:
            async with self.opened() as world:
                (row,) = await world.emit(await world.endpoint())
                reached = await CancelledAt(world.storage.claim(ClaimRequest(9, 9, LEASE, 4, {})), number).run()
                await world.written()
                world.pass_time(LEASE)
                assert (await world.claim_one()).delivery_id == row
            number += 1

    async def test_an_open_cancelled_at_any_await_can_be_repeated(self) -> None:
        number, reached = 0, True
        while reached:
            clock = ManualClock()
            storage = await self.make_storage()
            reached = await CancelledAt(storage.open(clock), number).run()
            await storage.close()
            await self._next_process_works(World(await self.reopen(storage), clock))
            number += 1

    async def test_a_close_cancelled_at_any_await_can_be_repeated_and_gives_up_the_right_to_deliver(self) -> None:
        number, reached = 0, True
        while reached:
            async with self.opened() as world:
                await world.emit(await world.endpoint())
                reached = await CancelledAt(world.storage.close(), number).run()
                await world.storage.close()
                await self._next_process_works(World(await self.reopen(world.storage), world.clock))
            number += 1

    async def _next_process_works(self, world: World) -> None:
        await world.storage.open(world.clock)
        try:
            assert await world.storage.acquire()
            await world.storage.sweep()
        finally:
            await world.storage.close()


class NeighbourContract(ContractBase):
    """A bad operation."""

    async def test_a_bad_operation_fails_alone_though_it_is_written_together_with_good_ones(self) -> None:
        async with self.opened() as world:
            endpoint = await world.storage.create_endpoint(world.new_endpoint())
            known = world.new_event(idempotency_key="k")
            await world.enqueue(known, world.new_delivery(endpoint.id))
            lease = await world.claim_one()
            revision = await world.revision()
            twice = world.new_delivery(endpoint.id)
            events = [world.new_event() for _ in range(5)]

            def enqueue(number: int, *rows: Any, revision: int = revision, **changed: Any) -> Verb:
                event = events[number]._replace(**changed)
                return world.storage.enqueue(event, rows, endpoints_revision=revision)

            answers = await asyncio.gather(
                enqueue(0, world.new_delivery(endpoint.id)),
                enqueue(1, twice, twice),
                enqueue(2, idempotency_key="k", digest=b"other"),
                world.settle(lease),
                enqueue(3, revision=revision + 1),
                world.storage.get_endpoint("ep_none"),
                world.storage.create_endpoint(endpoint),
                enqueue(4, world.new_delivery(endpoint.id)),
                return_exceptions=True,
            )
            kinds = [type(answer) if isinstance(answer, Exception) else None for answer in answers]
            assert kinds == [None, StorageError, ConflictError, None, StaleEndpoints, NotFound, ConflictError, None]
            assert answers[0] == Receipt(events[0].id, 1)
            assert answers[7] == Receipt(events[4].id, 1)
            assert await world.state(lease.delivery_id) is DeliveryState.SUCCEEDED
            for number, stored in enumerate((True, False, False, False, True)):
                if stored:
                    await world.storage.get_event(events[number].id)
                else:
                    with pytest.raises(NotFound):
                        await world.storage.get_event(events[number].id)
            assert len(await world.deliveries()) == 3
            with pytest.raises(NotFound):
                await world.storage.get_delivery(twice.id)
