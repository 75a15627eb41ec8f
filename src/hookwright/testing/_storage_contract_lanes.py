"""The claim: room, turns, the half rule, and when to come again."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from hookwright._clock import SECOND
from hookwright._health import Change
from hookwright._models import DeliveryState, EndpointState
from hookwright.storage._base import HOLD_MOST
from hookwright.testing._storage_contract_base import LEASE, ContractBase, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import Lease


DAY = 24 * 3600 * SECOND


def _endpoints(leases: Sequence[Lease]) -> Counter[str]:
    return Counter(lease.endpoint_id for lease in leases)


class RoomContract(ContractBase):
    """How much of what is due a claim may bring."""

    async def test_a_lease_says_all_that_an_attempt_needs(self) -> None:
        async with self.opened() as world:
            endpoint = await world.storage.create_endpoint(world.new_endpoint())
            event = world.new_event(tenant="t", occurred_at=7, data=b'{"n": 1}')
            row = world.new_delivery(endpoint.id)
            await world.enqueue(event, row)
            created_at = world.clock.now()
            lease = await world.claim_one()
            assert (lease.delivery_id, lease.endpoint_id, lease.event_id) == (row.id, endpoint.id, event.id)
            assert (lease.event_type, lease.data, lease.tenant) == (event.type, b'{"n": 1}', "t")
            assert (lease.occurred_at, lease.created_at, lease.due_at) == (7, created_at, created_at)
            assert lease.until == world.clock.now() + LEASE
            assert not lease.proven

    async def test_a_claim_brings_no_more_than_its_limit_and_every_row_under_a_fresh_token(self) -> None:
        async with self.opened() as world:
            await world.emit(*[await world.endpoint() for _ in range(5)])
            first, second = (await world.claim(3)).leases, (await world.claim(3)).leases
            assert (len(first), len(second)) == (3, 2)
            assert len({lease.token for lease in first + second}) == 5
            assert len({lease.delivery_id for lease in first + second}) == 5
            assert (await world.claim(0)).leases == []

    async def test_an_endpoint_has_room_for_one_until_it_answers_then_for_two_doubling_up_to_the_cap(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit_many(40, endpoint)
            rooms = []
            for _ in range(5):
                leases = (await world.claim(cap=7)).leases
                rooms.append(len(leases))
                await world.storage.release(leases[1:])
                assert (await world.settle(leases[0])).held
            assert rooms == [1, 2, 4, 7, 7]
            lease, *others = (await world.claim(cap=7)).leases
            await world.storage.release(others)
            await world.settle(lease, DeliveryState.FAILED)
            assert len((await world.claim(cap=7)).leases) == 1

    async def test_an_endpoint_with_a_concurrency_of_its_own_has_that_cap(self) -> None:
        async with self.opened() as world:
            wide, narrow = await world.endpoint(concurrency=6), await world.endpoint(concurrency=1)
            for endpoint in (wide, narrow):
                await world.prove(endpoint, 5)
            for endpoint in (wide, narrow):
                await world.emit_many(9, endpoint)
            assert _endpoints((await world.claim(cap=2)).leases) == {wide: 6, narrow: 1}

    async def test_what_is_in_flight_takes_up_room_and_is_never_claimed_again(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 2)
            rows = await world.emit_many(3, endpoint)
            held = [lease.delivery_id for lease in (await world.claim()).leases]
            assert held == rows
            world.pass_time(2 * LEASE)  # the leases have ended, but this process still works on them
            assert (await world.claim(in_flight={endpoint: held})).leases == []
            (first, _) = await world.emit(endpoint, endpoint)
            more = await world.claim_one(in_flight={endpoint: held})
            assert more.delivery_id == first
            held.append(first)
            assert (await world.claim(in_flight={endpoint: held})).leases == []

    async def test_a_claim_sees_what_was_asked_for_before_it_even_when_both_are_asked_for_at_once(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            revision, row, event = await world.revision(), world.new_delivery(endpoint), world.new_event()
            storing = asyncio.ensure_future(world.storage.enqueue(event, [row], endpoints_revision=revision))
            _, claim = await asyncio.gather(storing, world.claim())
            [lease] = claim.leases
            assert lease.delivery_id == row.id
            settling = asyncio.ensure_future(world.storage.settle([world.outcome(lease, DeliveryState.PENDING)]))
            _, claim = await asyncio.gather(settling, world.claim())
            assert [(again.delivery_id, again.number) for again in claim.leases] == [(row.id, 2)]

    async def test_what_is_being_settled_takes_up_no_room_and_is_not_claimed_either(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 2)
            rows = await world.emit_many(6, endpoint)
            settling = [lease.delivery_id for lease in (await world.claim()).leases]
            assert settling == rows[:4]
            world.pass_time(2 * LEASE)  # the leases have ended, but this process is about to write what came of them
            found = (await world.claim(settling=settling)).leases
            assert [lease.delivery_id for lease in found] == rows[4:]
            again = await world.claim(in_flight={endpoint: rows[4:]})  # it failed: they are taken over
            assert [lease.delivery_id for lease in again.leases] == rows[:2]

    async def test_the_half_rule_limits_endpoints_that_are_unproven_or_slow_and_nobody_else(self) -> None:
        async with self.opened() as world:
            proven, slow = await world.endpoint(), await world.endpoint()
            for endpoint in (proven, slow):
                await world.prove(endpoint, 2)
            for endpoint in (proven, slow):
                await world.emit_many(8, endpoint)
            unproven = [await world.endpoint() for _ in range(4)]
            await world.emit(*unproven)
            brought = _endpoints((await world.claim(unproven_limit=3, slow={slow})).leases)
            assert brought[proven] == 4
            assert brought.total() - brought[proven] == 3
            brought = _endpoints((await world.claim(unproven_limit=0, slow={slow})).leases)
            assert set(brought) == {proven}

    async def test_within_a_lane_the_row_that_has_been_due_longest_comes_first(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 3)
            now = world.clock.now()
            (third,) = await world.emit(endpoint, available_at=now + 2 * SECOND)
            (first,) = await world.emit(endpoint)
            (second,) = await world.emit(endpoint, available_at=now + SECOND)
            (future,) = await world.emit(endpoint, available_at=now + 60 * SECOND)
            world.pass_time(3 * SECOND)
            (fourth,) = await world.emit(endpoint)
            leases = (await world.claim()).leases
            assert [lease.delivery_id for lease in leases] == [first, second, third, fourth]
            assert [lease.due_at - now for lease in leases] == [0, SECOND, 2 * SECOND, 3 * SECOND]
            assert await world.state(future) is DeliveryState.PENDING

    async def test_rows_whose_leases_have_ended_come_in_the_order_in_which_they_ended_and_no_earlier(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 3)
            rows = await world.emit(endpoint, endpoint, endpoint)
            ends = [(await world.claim_one(limit=1, lease=seconds * SECOND)).until for seconds in (30, 10, 20)]
            (fresh,) = await world.emit(endpoint)
            world.clock.time = ends[1] - SECOND
            assert (await world.claim_one()).delivery_id == fresh
            world.clock.time = ends[0]
            taken_over = [await world.claim_one(limit=1) for _ in rows]
            assert [lease.delivery_id for lease in taken_over] == [rows[1], rows[2], rows[0]]
            assert all(lease.taken_over for lease in taken_over)

    async def test_an_immediate_delivery_is_due_though_the_clock_was_set_back(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            world.pass_time(-3600 * SECOND)
            assert len((await world.claim()).leases) == 1


class SetBackContract(ContractBase):
    """The wall clock was set back while nobody delivered: what was stored lies in the future."""

    async def test_a_hold_that_was_set_before_is_no_longer_than_one_that_is_set_now(self) -> None:
        async with self.opened() as world:
            held = await world.endpoint()
            await world.emit(held)
            await world.settle(await world.claim_one(), DeliveryState.FAILED, hold=HOLD_MOST)
            await self._set_back(world, by=DAY)
            (fresh,) = await world.emit(held)
            world.pass_time(HOLD_MOST)
            assert (await world.claim_one()).delivery_id == fresh

    async def test_a_paused_endpoint_stays_paused(self) -> None:
        async with self.opened() as world:
            paused = await world.endpoint()
            await world.storage.set_endpoint_state(paused, EndpointState.PAUSED, reason=None)
            await world.emit(paused)
            await self._set_back(world, by=DAY)
            world.pass_time(HOLD_MOST)
            assert not (await world.claim()).leases

    async def test_a_rate_limit_waits_for_one_attempt_at_most(self) -> None:
        async with self.opened() as world:
            slow = await world.endpoint(rate_limit=0.1)
            await world.emit(slow)
            await world.settle(await world.claim_one())
            await self._set_back(world, by=DAY)
            (fresh,) = await world.emit(slow)
            world.pass_time(10 * SECOND)
            assert (await world.claim_one()).delivery_id == fresh

    async def test_lanes_that_waited_before_are_not_passed_over_by_busy_ones(self) -> None:
        async with self.opened() as world:
            waiting, busy = await world.endpoint(), await world.endpoint()
            await world.emit(waiting)
            await self._set_back(world, by=DAY)
            await world.emit_many(5, busy)
            served = []
            for _ in range(3):
                lease = await world.claim_one(limit=1)
                served.append(lease.endpoint_id)
                await world.settle(lease)
            assert waiting in served

    async def test_a_retry_is_late_by_at_most_the_jump_and_a_fresh_event_not_at_all(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            await world.settle(await world.claim_one(), DeliveryState.PENDING, retry_in=60 * SECOND)
            await self._set_back(world, by=DAY)
            (fresh,) = await world.emit(endpoint)
            lease = await world.claim_one()
            assert lease.delivery_id == fresh
            await world.settle(lease)
            world.pass_time(DAY + 60 * SECOND)
            assert len((await world.claim()).leases) == 1

    async def test_time_in_which_nobody_tried_does_not_count_as_failing(self) -> None:
        for jump in (365 * DAY, -365 * DAY):
            async with self.opened() as world:
                endpoint = await world.endpoint()
                await world.emit(endpoint)
                for _ in range(30):
                    await world.settle(await world.claim_one(), DeliveryState.PENDING, retry_in=0)
                await world.settle(await world.claim_one(), DeliveryState.FAILED)
                await self._set_back(world, by=-jump)
                await self.restart(world)
                for days, changes in ((0, ()), (6, (Change.DISABLED,))):
                    world.pass_time(days * DAY)
                    await world.emit(endpoint)
                    settled = await world.settle(await world.claim_one(), DeliveryState.FAILED)
                    assert (settled.held, settled.changes) == (True, changes)

    async def _set_back(self, world: World, by: int) -> None:
        world.clock.time -= by
        await self.restart(world)


class TurnContract(ContractBase):
    """Nobody waits for a neighbour."""

    async def test_lanes_are_served_in_turn(self) -> None:
        async with self.opened() as world:
            endpoints = [await world.endpoint() for _ in range(5)]
            for endpoint in endpoints:
                await world.emit_many(4, endpoint)
            for _ in range(4):
                served = [await self._serve_one(world) for _ in endpoints]
                assert sorted(served) == endpoints

    async def test_lanes_with_retries_and_lanes_with_new_rows_do_not_starve_each_other(self) -> None:
        async with self.opened() as world:
            fresh = [await world.endpoint() for _ in range(3)]
            retrying = [await world.endpoint() for _ in range(3)]
            due = world.clock.now() + SECOND
            for _ in range(6):
                await world.emit(*fresh)
                await world.emit(*retrying, available_at=due)
            world.pass_time(SECOND)
            for _ in range(6):
                served = [await self._serve_one(world) for _ in range(6)]
                assert sorted(served) == fresh + retrying

    async def test_a_dead_endpoint_with_thousands_of_rows_keeps_nobody_from_being_served(self) -> None:
        async with self.opened() as world:
            dead = await world.endpoint()
            rows = [world.new_delivery(dead) for _ in range(3000)]
            await world.enqueue(world.new_event(), *rows)
            healthy = [await world.endpoint() for _ in range(10)]
            for _ in range(3):
                await world.emit(*healthy)
            left = Counter(dict.fromkeys(healthy, 3))
            for _ in range(6):
                leases = (await world.claim(8)).leases
                for lease in leases:
                    failed = lease.endpoint_id == dead
                    state = DeliveryState.PENDING if failed else DeliveryState.SUCCEEDED
                    await world.settle(lease, state, retry_in=LEASE)
                left -= _endpoints([lease for lease in leases if lease.endpoint_id != dead])
            assert not left

    async def test_lanes_without_room_hide_no_other(self) -> None:
        async with self.opened() as world:
            full = [await world.endpoint() for _ in range(6)]
            for _ in range(2):
                await world.emit(*full)
            in_flight = {lease.endpoint_id: [lease.delivery_id] for lease in (await world.claim()).leases}
            assert sorted(in_flight) == full
            free = await world.endpoint()
            await world.emit(free)
            assert (await world.claim_one(limit=1, in_flight=in_flight)).endpoint_id == free

    async def test_lanes_that_are_early_hide_none_that_is_due(self) -> None:
        async with self.opened() as world:
            done = [await world.endpoint() for _ in range(6)]
            waiting = await world.endpoint()
            await world.emit(*done, waiting)
            due = world.clock.now() + 2 * LEASE
            for lease in (await world.claim()).leases:
                later = lease.endpoint_id == waiting
                await world.settle(
                    lease,
                    DeliveryState.PENDING if later else DeliveryState.FAILED,
                    retry_in=due - world.clock.now(),
                )
            world.clock.time = due
            assert (await world.claim_one(limit=1)).endpoint_id == waiting

    async def _serve_one(self, world: World) -> str:
        lease = await world.claim_one(limit=1)
        assert (await world.settle(lease)).held
        return lease.endpoint_id


class NextDueContract(ContractBase):
    """When to come again by oneself."""

    async def test_nothing_waiting_is_nothing_to_come_again_for(self) -> None:
        async with self.opened() as world:
            assert (await world.claim()).next_due is None
            endpoint = await world.endpoint()
            await world.emit(endpoint, endpoint)
            # One is leased, the other is due already and has no room: both open when something settles.
            assert (await world.claim()).next_due is None

    async def test_it_is_the_earliest_of_schedules_lease_ends_and_holds(self) -> None:
        async with self.opened() as world:
            scheduled, leased, held = [await world.endpoint() for _ in range(3)]
            start = world.clock.now()
            await world.emit(scheduled, available_at=start + 100 * SECOND)
            await world.emit(leased)
            lease = await world.claim_one(lease=90 * SECOND)
            await world.emit(held)
            await world.storage.release([await world.claim_one()], hold=80 * SECOND)
            hold_until = world.clock.now() + 80 * SECOND
            assert (await world.claim()).next_due == hold_until
            world.clock.time = hold_until
            assert (await world.settle(await world.claim_one())).held
            assert (await world.claim()).next_due == lease.until
            assert (await world.settle(lease)).held
            world.clock.time = lease.until
            assert (await world.claim()).next_due == start + 100 * SECOND

    async def test_paused_lanes_are_not_waited_for(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint, available_at=world.clock.now() + SECOND)
            await world.storage.set_endpoint_state(endpoint, EndpointState.PAUSED, reason=None)
            assert (await world.claim()).next_due is None
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            assert (await world.claim()).next_due is not None

    async def test_following_it_never_spins_and_reaches_every_row(self) -> None:
        async with self.opened() as world:
            endpoints = [await world.endpoint() for _ in range(4)]
            start = world.clock.now()
            for step in range(1, 4):
                for endpoint in endpoints:
                    await world.emit(endpoint, available_at=start + step * SECOND)
            reached, looks = 0, 0
            next_due: int | None = start
            while next_due is not None:
                looks += 1
                world.clock.time = max(world.clock.now(), next_due)
                claim = await world.claim(3)
                assert claim.next_due is None or claim.next_due > world.clock.now()
                reached += len(claim.leases)
                for lease in claim.leases:
                    await world.settle(lease)
                next_due = world.clock.now() if claim.leases else claim.next_due
            assert reached == 12
            assert looks <= 30
