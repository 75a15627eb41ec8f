"""Enqueue, settle and release: durable, once, fenced, and what an interruption costs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hookwright._clock import SECOND, to_datetime
from hookwright._errors import ConflictError, NotFound, StaleEndpoints
from hookwright._health import Change
from hookwright._models import DeliveryState, EndpointState, Lease, Receipt, Settled
from hookwright.storage._base import FREE_INTERRUPTIONS
from hookwright.testing._storage_contract_base import LEASE, START, ContractBase, World

PENDING, SUCCEEDED, FAILED = DeliveryState.PENDING, DeliveryState.SUCCEEDED, DeliveryState.FAILED


class EnqueueContract(ContractBase):
    """The way in."""

    async def test_an_event_and_its_deliveries_are_there_once_enqueue_returned(self) -> None:
        async with self.opened() as world:
            one, other = await world.endpoint(), await world.endpoint()
            event = world.new_event(tenant="t", attributes='{"index": ["a", 1, true]}', idempotency_key="k")
            first, second = world.new_delivery(one), world.new_delivery(other, START + 5 * SECOND)
            assert await world.enqueue(event, first, second) == Receipt(event.id, 2)
            stored = await world.storage.get_event(event.id)
            assert (stored.type, stored.data, stored.tenant) == (event.type, event.data, "t")
            assert stored.attributes == {"index": ["a", 1, True]}
            assert (stored.created_at, stored.occurred_at) == (to_datetime(START), to_datetime(START))
            assert stored.idempotency_key == "k"
            now, later = await world.storage.get_delivery(first.id), await world.storage.get_delivery(second.id)
            assert (now.state, now.endpoint_id, now.attempt_count) == (PENDING, one, 0)
            assert (now.event_id, now.event_type) == (event.id, event.type)
            assert (now.created_at, now.next_attempt_at) == (to_datetime(START), to_datetime(START))
            assert later.next_attempt_at == to_datetime(START + 5 * SECOND)
            assert await world.storage.attempts(first.id) == []

    async def test_an_event_that_nobody_wants_is_stored(self) -> None:
        async with self.opened() as world:
            event = world.new_event()
            assert await world.enqueue(event) == Receipt(event.id, 0)
            assert (await world.storage.get_event(event.id)).id == event.id

    async def test_skipped_deliveries_are_recorded_but_neither_counted_nor_claimed(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            row = world.new_delivery(endpoint, skipped=True)
            assert (await world.enqueue(world.new_event(idempotency_key="k"), row)).delivery_count == 0
            stored = await world.storage.get_delivery(row.id)
            assert (stored.state, stored.next_attempt_at) == (DeliveryState.SKIPPED, None)
            assert stored.finished_at == to_datetime(START)
            assert (await world.claim()).leases == []
            again = await world.enqueue(world.new_event(idempotency_key="k"))
            assert (again.delivery_count, again.duplicate) == (0, True)

    async def test_a_repeated_event_id_or_idempotency_key_stores_nothing_and_answers_with_the_first(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            event = world.new_event(idempotency_key="k", tenant="a")
            await world.enqueue(event, world.new_delivery(endpoint), world.new_delivery(endpoint))
            by_key = world.new_event(idempotency_key="k", tenant="b")
            for repeated in (event, by_key, event._replace(idempotency_key=None)):
                receipt = await world.enqueue(repeated, world.new_delivery(endpoint))
                assert receipt == Receipt(event.id, 2, duplicate=True)
            assert len(await world.deliveries()) == 2
            with pytest.raises(NotFound):
                await world.storage.get_event(by_key.id)

    async def test_a_used_event_id_or_key_with_another_digest_is_a_conflict_and_stores_nothing(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            event = world.new_event(idempotency_key="k")
            await world.enqueue(event, world.new_delivery(endpoint))
            other = world.new_event(idempotency_key="k", digest=b"other")
            for changed in (other, event._replace(digest=b"other"), other._replace(digest=None)):
                with pytest.raises(ConflictError):
                    await world.enqueue(changed, world.new_delivery(endpoint))
            assert len(await world.deliveries()) == 1

    async def test_a_conflict_names_the_event_but_not_another_tenants(self) -> None:
        async with self.opened() as world:
            event = world.new_event(idempotency_key="k", tenant="a")
            await world.enqueue(event)
            other = world.new_event(idempotency_key="k", tenant="a", digest=b"other")
            for tenant, named in (("a", True), ("b", False), (None, False)):
                with pytest.raises(ConflictError, match="idempotency_key: used before") as refused:
                    await world.enqueue(other._replace(tenant=tenant))
                assert (event.id in str(refused.value)) == named
            with pytest.raises(ConflictError, match="event_id: used before"):
                await world.enqueue(event._replace(digest=b"other"))

    async def test_a_duplicate_is_recognised_before_stale_endpoints_are(self) -> None:
        async with self.opened() as world:
            event = world.new_event()
            await world.enqueue(event)
            receipt = await world.storage.enqueue(event, [], endpoints_revision=await world.revision() + 7)
            assert receipt == Receipt(event.id, 0, duplicate=True)

    async def test_every_change_of_an_endpoint_makes_earlier_matches_stale(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(world.new_endpoint())
            changes = (
                lambda: world.endpoint(),
                lambda: world.storage.update_endpoint(replace(stored, name="n")),
                lambda: world.storage.set_endpoint_state(stored.id, EndpointState.PAUSED, reason=None),
                lambda: world.storage.delete_endpoint(stored.id),
            )
            for change in changes:
                matched_at = await world.revision()
                await change()
                event = world.new_event()
                with pytest.raises(StaleEndpoints):
                    await world.storage.enqueue(event, [], endpoints_revision=matched_at)
                with pytest.raises(NotFound):
                    await world.storage.get_event(event.id)

    async def test_of_fifty_tasks_with_one_idempotency_key_one_stores_and_all_hear_of_it(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            revision = await world.revision()
            receipts = await asyncio.gather(
                *(
                    world.storage.enqueue(
                        world.new_event(idempotency_key="k"),
                        [world.new_delivery(endpoint)],
                        endpoints_revision=revision,
                    )
                    for _ in range(50)
                )
            )
            assert sum(not receipt.duplicate for receipt in receipts) == 1
            assert {(receipt.event_id, receipt.delivery_count) for receipt in receipts} == {(receipts[0].event_id, 1)}
            assert len(await world.deliveries()) == 1

    async def test_an_endpoint_created_during_a_storm_of_emits_is_never_missed(self) -> None:
        async with self.opened() as world:
            created: list[str] = []
            missed: list[str] = []

            async def emit_a_while() -> None:
                for _ in range(8):
                    wanted = list(created)
                    event = world.new_event()
                    changes = await world.storage.changes(0)
                    while True:
                        rows = [world.new_delivery(endpoint.id) for endpoint in changes.endpoints]
                        await asyncio.sleep(0)  # others run between the match and the write
                        try:
                            await world.storage.enqueue(event, rows, endpoints_revision=changes.revision)
                        except StaleEndpoints:
                            changes = await world.storage.changes(0)
                        else:
                            break
                    missed.extend(set(wanted) - {row.endpoint_id for row in rows})

            async def create_some() -> None:
                while len(created) < 8:
                    created.append(await world.endpoint())

            await asyncio.gather(create_some(), *(emit_a_while() for _ in range(12)))
            assert len(created) == 8
            assert missed == []


class SettleContract(ContractBase):
    """The way out, and the fence around it."""

    async def test_a_success_is_recorded_whole(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            outcome = world.outcome(lease)
            assert outcome.attempt is not None
            record = outcome.attempt._replace(
                duration=1_500_000,
                response_headers=(("server", "x"), ("a", "b")),
                response_body=b"\x00ok",
                response_truncated=True,
                detail="fine",
                body_sha256=b"\x01" * 32,
            )
            (settled,) = await world.storage.settle([outcome._replace(attempt=record)])
            assert (settled.held, settled.next_attempt_at) == (True, None)
            delivery = await world.storage.get_delivery(lease.delivery_id)
            assert (delivery.state, delivery.attempt_count, delivery.last_status) == (SUCCEEDED, 1, 204)
            assert (delivery.last_error, delivery.next_attempt_at) == (None, None)
            assert delivery.finished_at == to_datetime(world.clock.now())
            (attempt,) = await world.storage.attempts(lease.delivery_id)
            assert (attempt.delivery_id, attempt.number, attempt.duration) == (lease.delivery_id, 1, 1.5)
            assert (attempt.started_at, attempt.status) == (to_datetime(record.started_at), 204)
            assert (attempt.error, attempt.detail, attempt.response_body) == (None, "fine", b"\x00ok")
            assert attempt.response_headers == (("server", "x"), ("a", "b"))
            assert (attempt.response_truncated, attempt.body_sha256) == (True, "01" * 32)

    async def test_a_retry_waits_for_as_long_as_it_was_told_and_keeps_its_count(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            settled = await world.settle(lease, PENDING, retry_in=5 * SECOND)
            due = world.clock.now() + 5 * SECOND
            assert (settled.held, settled.next_attempt_at) == (True, due)
            delivery = await world.storage.get_delivery(lease.delivery_id)
            assert (delivery.state, delivery.finished_at) == (PENDING, None)
            assert delivery.next_attempt_at == to_datetime(due)
            assert (delivery.last_status, delivery.last_error) == (503, "http_status")
            claim = await world.claim()
            assert (claim.leases, claim.next_due) == ([], due)
            world.clock.time = due
            again = await world.claim_one()
            assert (again.number, again.spent, again.due_at, again.taken_over) == (2, 1, due, False)
            assert again.token != lease.token

    async def test_without_an_attempt_nothing_is_counted(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            await world.settle(await world.claim_one(), PENDING)
            lease = await world.claim_one()
            settled = await world.settle(lease, FAILED, attempt=None, counts=False)
            assert settled.held
            delivery = await world.storage.get_delivery(lease.delivery_id)
            assert (delivery.state, delivery.attempt_count) == (FAILED, 1)
            assert (delivery.last_status, delivery.last_error) == (503, "http_status")
            assert len(await world.storage.attempts(lease.delivery_id)) == 1

    async def test_health_counts_failures_until_a_success_and_only_what_counts(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            seen = []
            for state, counts in ((FAILED, True), (PENDING, True), (FAILED, False), (SUCCEEDED, False)):
                await world.emit(endpoint)
                settled = await world.settle(await world.claim_one(), state, retry_in=LEASE, counts=counts)
                seen.append((settled.failures, settled.proven, settled.changes))
                assert sum(row.attempt_count for row in await world.deliveries()) == len(seen)
                assert (await world.storage.get_endpoint(endpoint)).health.consecutive_failures == settled.failures
            assert seen == [(1, False, ()), (2, False, ()), (2, False, ()), (2, False, ())]
            await world.prove(endpoint)
            assert (await world.storage.get_endpoint(endpoint)).health.consecutive_failures == 0
            await world.emit(endpoint)
            lease = await world.claim_one()
            assert lease.proven
            settled = await world.settle(lease, FAILED)
            assert (settled.failures, settled.proven) == (1, False)

    async def test_gone_disables_the_endpoint_at_once_and_leaves_its_rows_to_the_sweep(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            _, waiting = await world.emit(endpoint, endpoint)
            revision = await world.revision()
            settled = await world.settle(await world.claim_one(), FAILED, gone=True)
            assert (settled.changes, settled.reason, settled.stopped) == ((Change.DISABLED,), "gone", True)
            row = await world.storage.get_endpoint(endpoint)
            assert (row.state, row.disabled_reason) == (EndpointState.DISABLED, "gone")
            assert row.revision == await world.revision() == revision + 1
            assert (await world.claim()).leases == []
            await world.sweep()
            assert await world.state(waiting) is DeliveryState.SKIPPED

    async def test_results_of_one_call_stand_each_for_itself(self) -> None:
        async with self.opened() as world:
            one, other = await world.endpoint(), await world.endpoint()
            await world.emit(one, other)
            first, second = (await world.claim()).leases
            stale = first._replace(token=second.token)
            outcomes = [world.outcome(stale), world.outcome(second), world.outcome(first, FAILED)]
            assert [settled.held for settled in await world.storage.settle(outcomes)] == [False, True, True]
            assert await world.state(first.delivery_id) is FAILED
            assert await world.state(second.delivery_id) is SUCCEEDED
            assert await world.storage.settle([]) == []

    async def test_an_expired_lease_that_nobody_took_settles(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            world.pass_time(10 * LEASE)
            assert (await world.settle(lease)).held
            assert await world.state(lease.delivery_id) is SUCCEEDED

    async def test_a_stale_token_changes_nothing_whichever_write_carries_it(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            stale = [await self._lease_taken_over(world)]
            holder = await world.claim_one()
            await self._nothing_changes(world, stale)
            await world.storage.release([holder])
            stale.append(holder)
            await self._nothing_changes(world, stale)
            holder = await world.claim_one()
            assert (await world.settle(holder, PENDING, retry_in=SECOND)).held
            stale.append(holder)
            await self._nothing_changes(world, stale)
            world.pass_time(SECOND)
            holder = await world.claim_one()
            assert (await world.settle(holder)).held
            stale.append(holder)
            await self._nothing_changes(world, stale)

    async def _lease_taken_over(self, world: World) -> Lease:
        lease = await world.claim_one()
        world.pass_time(LEASE)
        return lease

    async def _nothing_changes(self, world: World, stale: list[Lease]) -> None:
        before = await world.snapshot()
        for lease in [*stale, stale[0]._replace(token=""), stale[0]._replace(delivery_id="dlv_unknown")]:
            for state in (SUCCEEDED, FAILED, PENDING):
                settled = await world.settle(lease, state, gone=True)
                assert settled == Settled(held=False)
            await world.storage.release([lease], hold=LEASE)
            await world.storage.release([lease], sent=True)
        assert await world.snapshot() == before

    async def test_a_result_for_a_stopped_endpoint_is_recorded_but_a_retry_is_left_to_the_sweep(self) -> None:
        for deleted, swept in ((False, DeliveryState.SKIPPED), (True, DeliveryState.CANCELLED)):
            async with self.opened() as world:
                endpoint = await world.endpoint()
                await world.prove(endpoint, 3)
                rows = await world.emit(endpoint, endpoint, endpoint)
                leases = (await world.claim()).leases
                if deleted:
                    await world.storage.delete_endpoint(endpoint)
                else:
                    await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="manual")
                await world.sweep()
                for lease, state in zip(leases, (SUCCEEDED, FAILED, PENDING), strict=True):
                    assert (await world.settle(lease, state)).held
                assert [await world.state(row) for row in rows] == [SUCCEEDED, FAILED, PENDING]
                assert (await world.claim()).leases == []
                await world.sweep()
                assert [await world.state(row) for row in rows] == [SUCCEEDED, FAILED, swept]


class ReleaseContract(ContractBase):
    """Giving leases back, and losing them."""

    async def test_a_released_row_is_due_as_scheduled_and_nothing_is_counted(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            lease = await world.claim_one()
            (behind,) = await world.emit(endpoint)
            await world.storage.release([lease])
            again = await world.claim_one()
            assert again.delivery_id == lease.delivery_id
            assert (again.number, again.spent, again.interruptions, again.taken_over) == (1, 0, 0, False)
            await world.settle(again, PENDING, retry_in=SECOND)
            await world.settle(await world.claim_one(), FAILED)
            assert await world.state(behind) is FAILED
            world.pass_time(SECOND)
            retried = await world.claim_one()
            await world.storage.release([retried])
            delivery = await world.storage.get_delivery(lease.delivery_id)
            assert delivery.next_attempt_at == to_datetime(retried.due_at)
            assert (await world.claim_one()).due_at == retried.due_at
            assert len(await world.storage.attempts(lease.delivery_id)) == 1

    async def test_a_lease_released_after_sending_records_an_interruption_that_costs_nothing(self) -> None:
        async with self.opened() as world:
            (row,) = await world.emit(await world.endpoint())
            for number in range(1, 2 * FREE_INTERRUPTIONS):
                lease = await world.claim_one()
                assert (lease.number, lease.spent, lease.interruptions) == (number, 0, 0)
                await world.storage.release([lease], sent=True)
                delivery = await world.storage.get_delivery(row)
                assert (delivery.state, delivery.attempt_count) == (PENDING, number)
                assert (delivery.last_status, delivery.last_error) == (None, "interrupted")
            attempts = await world.storage.attempts(row)
            assert [attempt.error for attempt in attempts] == ["interrupted"] * len(attempts)

    async def test_a_hold_closes_the_lane_until_then_and_no_longer(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint, endpoint)
            await world.storage.release([await world.claim_one()], hold=60 * SECOND)
            until = world.clock.now() + 60 * SECOND
            claim = await world.claim()
            assert (claim.leases, claim.next_due) == ([], until)
            world.clock.time = until
            assert len((await world.claim()).leases) == 1

    async def test_a_shorter_hold_does_not_end_a_longer_one(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint)
            await world.emit(endpoint, endpoint)
            one, other = (await world.claim()).leases
            await world.storage.release([one], hold=60 * SECOND)
            until = world.clock.now() + 60 * SECOND
            await world.storage.release([other], hold=SECOND)
            assert (await world.claim()).next_due == until

    async def test_setting_the_state_ends_a_hold(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            await world.storage.release([await world.claim_one()], hold=60 * SECOND)
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            assert len((await world.claim()).leases) == 1

    async def test_a_takeover_is_recorded_and_the_first_are_free(self) -> None:
        async with self.opened() as world:
            (row,) = await world.emit(await world.endpoint())
            lease = await world.claim_one()
            assert (lease.number, lease.spent, lease.interruptions, lease.taken_over) == (1, 0, 0, False)
            assert (await world.claim()).leases == []
            for times in range(1, FREE_INTERRUPTIONS + 3):
                world.clock.time = lease.until
                lease = await world.claim_one()
                assert (lease.taken_over, lease.interruptions, lease.number) == (True, times, times + 1)
                assert lease.spent == max(0, times - FREE_INTERRUPTIONS)
                attempt = (await world.storage.attempts(row))[-1]
                assert (attempt.number, attempt.error, attempt.duration) == (times, "interrupted", 0.0)
                assert (attempt.status, attempt.started_at) == (None, to_datetime(world.clock.now()))
                delivery = await world.storage.get_delivery(row)
                assert (delivery.attempt_count, delivery.last_error) == (times, "interrupted")
            assert (await world.settle(lease, PENDING, retry_in=SECOND)).held
            world.pass_time(SECOND)
            calm = await world.claim_one()
            assert (calm.taken_over, calm.spent, calm.number) == (False, 3, FREE_INTERRUPTIONS + 4)

    async def test_whoever_becomes_the_deliverer_takes_the_leases_of_the_dead_at_once(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 2)
            await world.emit(endpoint, endpoint)
            dead = (await world.claim()).leases
            assert [lease.proven for lease in dead] == [True, True]
            await self.restart(world)
            lease = await world.claim_one()  # its last attempt succeeded: it is proven, and has room for one
            assert (lease.taken_over, lease.proven, lease.interruptions) == (True, True, 1)
            assert not (await world.settle(dead[0])).held
            assert (await world.settle(dead[1])).held

    async def test_whoever_becomes_the_deliverer_trusts_no_endpoint_that_failed_last_or_was_never_tried(self) -> None:
        async with self.opened() as world:
            failed, fresh = await world.endpoint(), await world.endpoint()
            await world.prove(failed)
            await world.emit(failed)
            await world.settle(await world.claim_one(), DeliveryState.FAILED)
            await self.restart(world)
            await world.emit(failed, fresh)
            assert [lease.proven for lease in (await world.claim()).leases] == [False, False]

    async def test_acquiring_again_frees_nothing(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            assert await world.storage.acquire()
            assert (await world.claim()).leases == []
            assert (await world.settle(lease)).held
