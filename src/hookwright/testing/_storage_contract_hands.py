"""What people do by hand, what settling does to an endpoint's health, and rate limits."""

from __future__ import annotations

import itertools

import pytest

from hookwright._clock import SECOND
from hookwright._errors import ConflictError, NotFound, StaleEndpoints
from hookwright._health import Change, EndpointHealth, HealthPolicy
from hookwright._models import (
    AttemptRecord,
    DeliveryState,
    Emission,
    EndpointState,
)
from hookwright.storage._base import DeliveryFilter
from hookwright.testing._storage_contract_base import LEASE, ContractBase, World

PENDING, SUCCEEDED, FAILED = DeliveryState.PENDING, DeliveryState.SUCCEEDED, DeliveryState.FAILED
CANCELLED, SKIPPED = DeliveryState.CANCELLED, DeliveryState.SKIPPED
ENDED = (FAILED, CANCELLED, SKIPPED)
DAY = 86_400 * SECOND


class ManyContract(ContractBase):
    """Several events in one transaction."""

    async def test_several_events_are_stored_together(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            emissions = [Emission(world.new_event(), [world.new_delivery(endpoint)] * n) for n in (1, 0)]
            receipts = await world.storage.enqueue_many(emissions, endpoints_revision=await world.revision())
            assert [(receipt.delivery_count, receipt.duplicate) for receipt in receipts] == [(1, False), (0, False)]
            assert len((await world.claim()).leases) == 1

    async def test_all_or_none(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.enqueue(world.new_event(idempotency_key="k"))
            revision = await world.revision()
            for bad, error in (
                (world.new_event(idempotency_key="k", digest=b"other"), ConflictError),
                (None, StaleEndpoints),
            ):
                good = [world.new_event(idempotency_key="g"), world.new_event(digest=None), world.new_event()]
                emissions = [Emission(event, [world.new_delivery(endpoint)]) for event in good]
                if bad is not None:
                    emissions.insert(2, Emission(bad, [world.new_delivery(endpoint)]))
                with pytest.raises(error):
                    await world.storage.enqueue_many(emissions, endpoints_revision=revision + (bad is None))
                for event in good:
                    with pytest.raises(NotFound):
                        await world.storage.get_event(event.id)
                assert (await world.claim()).leases == []
            receipt = await world.enqueue(world.new_event(idempotency_key="g", digest=b"new"))
            assert not receipt.duplicate

    async def test_two_with_the_same_key_are_one_event(self) -> None:
        async with self.opened() as world:
            emissions = [Emission(world.new_event(idempotency_key="k"), []) for _ in range(2)]
            receipts = await world.storage.enqueue_many(emissions, endpoints_revision=await world.revision())
            assert [receipt.event_id for receipt in receipts] == [emissions[0].event.id] * 2
            assert [receipt.duplicate for receipt in receipts] == [False, True]


class RequeueContract(ContractBase):
    """Sending again, and cancelling."""

    async def test_what_ended_is_sent_again_with_a_new_budget(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            first = await world.claim_one()
            await world.settle(first, FAILED)
            world.pass_time(DAY)
            assert await world.storage.requeue([first.delivery_id, "dlv_unknown"], [SUCCEEDED]) == 0
            assert await world.storage.requeue([first.delivery_id, "dlv_unknown"], ENDED) == 1
            delivery = await world.storage.get_delivery(first.delivery_id)
            assert (delivery.state, delivery.finished_at, delivery.attempt_count) == (PENDING, None, 1)
            assert delivery.next_attempt_at is not None
            requeued_at = world.clock.now()
            again = await world.claim_one()
            assert (again.event_id, again.number, again.spent) == (first.event_id, 2, 0)
            assert (again.since, again.created_at, again.due_at) == (requeued_at, first.created_at, requeued_at)
            await world.settle(again)
            assert [a.number for a in await world.storage.attempts(first.delivery_id)] == [1, 2]

    async def test_the_budget_is_new_whatever_interrupted_it_before(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            for _ in range(5):  # the process dies five times in its company; each later than the third costs one
                world.pass_time(LEASE)
                lease = await world.claim_one()
            assert lease.spent == 2
            await world.settle(lease, FAILED)
            assert await world.storage.requeue([lease.delivery_id], ENDED) == 1
            again = await world.claim_one()
            assert (again.spent, again.interruptions, again.number) == (0, 5, 7)

    async def test_what_waits_for_a_retry_is_due_now(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            lease = await world.claim_one()
            await world.settle(lease, PENDING, retry_in=DAY)
            assert (await world.claim()).leases == []
            assert await world.storage.requeue([lease.delivery_id], [PENDING]) == 1
            assert (await world.claim_one()).delivery_id == lease.delivery_id

    async def test_leased_rows_and_those_that_nobody_would_send_are_left_as_they_are(self) -> None:
        async with self.opened() as world:
            leased, disabled, deleted, expunged = [await world.endpoint() for _ in range(4)]
            rows = [(await world.emit(endpoint))[0] for endpoint in (disabled, deleted, expunged)]
            for lease in (await world.claim()).leases:
                await world.settle(lease, FAILED)
            await world.storage.set_endpoint_state(disabled, EndpointState.DISABLED, reason=None)
            await world.storage.delete_endpoint(deleted)
            await world.storage.expunge((await world.storage.get_delivery(rows[2])).event_id)
            await world.sweep()
            [row] = await world.emit(leased)
            lease = await world.claim_one()
            before = await world.snapshot()
            assert await world.storage.requeue([row, *rows], [PENDING, FAILED]) == 0
            assert await world.snapshot() == before
            assert (await world.settle(lease)).held

    async def test_a_paused_endpoints_rows_are_requeued_and_wait(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            lease = await world.claim_one()
            await world.settle(lease, FAILED)
            await world.storage.set_endpoint_state(endpoint, EndpointState.PAUSED, reason=None)
            assert await world.storage.requeue([lease.delivery_id], ENDED) == 1
            assert (await world.claim()).leases == []
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            assert (await world.claim_one()).delivery_id == lease.delivery_id

    async def test_cancelling_ends_what_is_pending_and_nothing_else(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.prove(endpoint, 3)
            ids = await world.emit_many(3, endpoint)
            [leased] = (await world.claim(1)).leases
            done = await world.claim_one(limit=1, in_flight={endpoint: {leased.delivery_id}})
            await world.settle(done)
            assert set(await world.storage.cancel([*ids, "dlv_unknown"])) == set(ids) - {done.delivery_id}
            assert await world.storage.cancel(ids) == []
            states = {id: (await world.storage.get_delivery(id)).state for id in ids}
            assert states == {id: SUCCEEDED if id == done.delivery_id else CANCELLED for id in ids}
            [attempt] = await world.storage.attempts(leased.delivery_id)
            assert (attempt.error, attempt.number) == ("interrupted", 1)
            late = await world.settle(leased)
            assert not late.held
            assert (await world.claim()).leases == []
            [waiting] = set(ids) - {leased.delivery_id, done.delivery_id}
            assert await world.storage.attempts(waiting) == []

    async def test_several_states_and_a_span_of_time_narrow_a_list(self) -> None:
        async with self.opened() as world:
            await world.emit(await world.endpoint())
            await world.settle(await world.claim_one(), FAILED)
            world.pass_time(SECOND)
            begin = world.clock.now()
            await world.emit(await world.endpoint())
            world.pass_time(SECOND)
            for where, count in (
                (DeliveryFilter(states=(FAILED, PENDING)), 2),
                (DeliveryFilter(states=ENDED), 1),
                (DeliveryFilter(since=begin), 1),
                (DeliveryFilter(until=begin), 1),
                (DeliveryFilter(since=begin, until=begin), 0),
            ):
                assert await world.storage.count_deliveries(where) == count
                page = await world.storage.list_deliveries(where, limit=10, cursor=None)
                assert len(page.items) == count


class ExpungeContract(ContractBase):
    """Removing what was sent and answered."""

    async def test_data_and_responses_go_and_the_record_stays(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            event = world.new_event(data=b'"private"', attributes='{"a": ["private"]}', idempotency_key="k")
            answered, waiting = world.new_delivery(endpoint), world.new_delivery(endpoint)
            await world.enqueue(event, answered, waiting)
            lease = await world.claim_one()
            record = AttemptRecord(
                world.clock.now(), 5, 200, detail="x", response_headers=(("a", "b"),), response_body=b"private"
            )
            await world.storage.settle([world.outcome(lease)._replace(attempt=record)])
            assert await world.expunge(event.id) == [waiting.id]
            assert await world.expunge(event.id) == []
            stored = await world.storage.get_event(event.id)
            assert (stored.data, stored.attributes, stored.idempotency_key) == (b"", {}, "k")
            assert stored.expunged_at is not None
            [attempt] = await world.storage.attempts(answered.id)
            assert (attempt.response_body, attempt.response_headers, attempt.detail) == (b"", (), None)
            assert (attempt.status, attempt.duration) == (200, 5e-6)
            assert (await world.storage.get_delivery(waiting.id)).state is CANCELLED
            with pytest.raises(NotFound):
                await world.storage.expunge("evt_unknown")


class TestingContract(ContractBase):
    """Tests of endpoints."""

    async def test_a_test_is_admitted_once_in_an_interval(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.storage.admit_test(endpoint, SECOND)
            with pytest.raises(ConflictError, match="just now"):
                await world.storage.admit_test(endpoint, SECOND)
            world.pass_time(SECOND)
            await world.storage.admit_test(endpoint, SECOND)
            for unknown in ("ep_unknown", await self._deleted(world)):
                with pytest.raises(NotFound):
                    await world.storage.admit_test(unknown, SECOND)

    async def _deleted(self, world: World) -> str:
        endpoint = await world.endpoint()
        await world.storage.delete_endpoint(endpoint)
        return endpoint

    async def test_a_test_is_recorded_as_ended_and_says_nothing_of_the_endpoints_health(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            event, delivery = world.new_event(type="hookwright.test", digest=None), world.new_delivery(endpoint)
            record = AttemptRecord(world.clock.now(), 7, status=500, error="http_status", response_body=b"no")
            await world.storage.record_test(Emission(event, [delivery]), FAILED, record)
            stored = await world.storage.get_delivery(delivery.id)
            assert (stored.state, stored.attempt_count, stored.event_type) == (FAILED, 1, "hookwright.test")
            assert (stored.last_status, stored.last_error) == (500, "http_status")
            assert stored.finished_at is not None
            [attempt] = await world.storage.attempts(delivery.id)
            assert (attempt.number, attempt.response_body) == (1, b"no")
            assert (await world.storage.get_endpoint(endpoint)).health == EndpointHealth()
            assert (await world.claim()).leases == []


class HealthContract(ContractBase):
    """What outcomes do to an endpoint."""

    async def _outcomes(self, world: World, endpoint: str, *states: DeliveryState, **fields: object) -> list[Change]:
        changes: list[Change] = []
        policy = fields.pop("policy", HealthPolicy())
        assert isinstance(policy, HealthPolicy)
        for state in states:
            await world.emit(endpoint)
            lease = await world.claim_one()
            [settled] = await world.storage.settle([world.outcome(lease, state, **fields)], policy)
            changes.extend(settled.changes)
        return changes

    async def test_failing_is_told_once_and_recovery_once(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            assert await self._outcomes(world, endpoint, *[FAILED] * 3) == []
            assert await self._outcomes(world, endpoint, SUCCEEDED) == []
            assert await self._outcomes(world, endpoint, *[FAILED] * 6) == [Change.FAILING]
            assert await self._outcomes(world, endpoint, SUCCEEDED, SUCCEEDED) == [Change.RECOVERED]

    async def test_health_tells_since_when_and_how_it_went_last(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            assert (await world.storage.get_endpoint(endpoint)).health == EndpointHealth()
            await self._outcomes(world, endpoint, SUCCEEDED)
            assert (await world.storage.get_endpoint(endpoint)).health == EndpointHealth(
                0, None, True, world.clock.now()
            )
            await self._outcomes(world, endpoint, FAILED)
            since = world.clock.now()
            await self._outcomes(world, endpoint, FAILED)
            assert (await world.storage.get_endpoint(endpoint)).health == EndpointHealth(
                2, since, False, world.clock.now()
            )

    async def test_nothing_but_failures_for_long_enough_and_often_enough_disables(self) -> None:
        policy = HealthPolicy(disable_after=DAY, disable_failures=3)
        async with self.opened() as world:
            often, long, both = [await world.endpoint() for _ in range(3)]
            await self._outcomes(world, often, *[FAILED] * 9, policy=policy)
            await self._outcomes(world, long, FAILED, policy=policy)
            await self._outcomes(world, both, FAILED, FAILED, policy=policy)
            world.pass_time(DAY)
            assert await self._outcomes(world, long, FAILED, policy=policy) == []
            assert await self._outcomes(world, often, SUCCEEDED, FAILED, policy=policy) == [Change.RECOVERED]
            [waiting] = await world.emit(both)
            lease = await world.claim_one()
            [settled] = await world.storage.settle([world.outcome(lease, PENDING)._replace(retry_in=DAY)], policy)
            assert (settled.changes, settled.reason, settled.stopped) == ((Change.DISABLED,), "failing", True)
            row = await world.storage.get_endpoint(both)
            assert (row.state, row.disabled_reason) == (EndpointState.DISABLED, "failing")
            await world.sweep()
            assert (await world.storage.get_delivery(waiting)).state is SKIPPED
            await world.storage.set_endpoint_state(both, EndpointState.ACTIVE, reason=None)
            assert await self._outcomes(world, both, FAILED, policy=policy) == []  # it begins anew

    async def test_a_policy_without_a_time_never_disables(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            policy = HealthPolicy(disable_after=None, disable_failures=1)
            await self._outcomes(world, endpoint, FAILED, policy=policy)
            world.pass_time(365 * DAY)
            assert await self._outcomes(world, endpoint, FAILED, policy=policy) == []

    async def test_answers_that_ask_for_a_pause_close_the_lane_for_longer_each_time(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
                await self._outcomes(world, endpoint, FAILED, throttled=1.0)
                settled_at = world.clock.now()
                await world.emit(endpoint)
                claim = await world.claim()
                assert (claim.leases, claim.next_due) == ([], settled_at + seconds * SECOND)
                world.clock.time = settled_at + seconds * SECOND
                lease = await world.claim_one()
                await world.settle(lease, SUCCEEDED, counts=False)
            await self._outcomes(world, endpoint, SUCCEEDED)
            await self._outcomes(world, endpoint, FAILED, throttled=1.5)
            await world.emit(endpoint)
            assert (await world.claim()).next_due == world.clock.now() - 10_000 + 1_500_000

    async def test_a_hold_closes_the_lane_and_the_longer_of_two_counts(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await self._outcomes(world, endpoint, FAILED, hold=9 * SECOND, throttled=1.0)
            held_until = world.clock.now() + 9 * SECOND
            await world.emit(endpoint)
            assert (await world.claim()).next_due == held_until
            world.clock.time = held_until
            assert (await world.claim_one()).endpoint_id == endpoint

    async def test_an_endpoint_that_is_disabled_already_keeps_its_reason(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            lease = await world.claim_one()
            await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="by hand")
            settled = await world.settle(lease, FAILED, gone=True)
            assert (settled.held, settled.changes, settled.stopped) == (True, (), True)
            assert (await world.storage.get_endpoint(endpoint)).disabled_reason == "by hand"

    async def test_alerts_are_stored_when_they_come_true(self) -> None:
        async with self.opened() as world:
            endpoint, operator, gone = [await world.endpoint() for _ in range(3)]
            await world.storage.delete_endpoint(gone)
            await world.sweep()

            def alerts() -> dict[str, Emission]:
                return {
                    name: Emission(
                        world.new_event(type=f"hookwright.{name}", digest=None),
                        [world.new_delivery(operator), world.new_delivery(gone)],
                    )
                    for name in ("failed", "failing", "recovered", "disabled")
                }

            came_true = []
            for state, fields in (
                (PENDING, {"retry_in": DAY}),
                (FAILED, {}),
                (SUCCEEDED, {}),
                (FAILED, {"gone": True}),
            ):
                before = len(await self._told(world, operator))
                await world.emit(endpoint)
                [lease] = [lease for lease in (await world.claim()).leases if lease.endpoint_id == endpoint]
                outcome = world.outcome(lease, state, **fields)._replace(alerts=list(alerts().items()))
                await world.storage.settle([outcome], HealthPolicy(failing_at=2))
                told = await self._told(world, operator)
                came_true.append(told[before:])
            assert [sorted(told) for told in came_true] == [
                [],
                ["failed", "failing"],
                ["recovered"],
                ["disabled", "failed"],
            ]
            assert await self._told(world, gone) == []

    async def _told(self, world: World, endpoint_id: str) -> list[str]:
        where = DeliveryFilter(endpoint_id=endpoint_id)
        page = await world.storage.list_deliveries(where, limit=100, cursor=None)
        return [delivery.event_type.removeprefix("hookwright.") for delivery in reversed(page.items)]


class RateContract(ContractBase):
    """How many attempts a second."""

    async def test_a_rate_limit_allows_a_seconds_worth_at_once_and_then_its_pace(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint(rate_limit=4.0, concurrency=100)
            for _ in range(8):
                await world.prove(endpoint)
                world.pass_time(SECOND)
            await world.emit_many(20, endpoint)
            begin = world.clock.now()
            sent: list[float] = []
            while len(sent) < 20:
                claim = await world.claim()
                for lease in claim.leases:
                    sent.append((world.clock.now() - begin) / SECOND)
                    await world.settle(lease)
                if claim.next_due is not None:
                    world.clock.time = max(world.clock.time, claim.next_due)
            assert len([time for time in sent if time < 0.1]) == 4
            for earlier, later in zip(sent, sent[8:], strict=False):
                assert later - earlier >= 1.0  # never more than eight in a second: the burst and the pace
            assert sent[-1] <= 16 / 4 + 0.5

    async def test_a_slow_rate_spaces_attempts_and_delays_nobody_else(self) -> None:
        async with self.opened() as world:
            slow, other = await world.endpoint(rate_limit=0.1, concurrency=9), await world.endpoint()
            await world.emit_many(3, slow)
            times = []
            for _ in range(3):
                lease = await world.claim_one()
                times.append(world.clock.now())
                await world.settle(lease)
                await world.emit(other)
                claim = await world.claim()
                assert [found.endpoint_id for found in claim.leases] == [other]
                await world.settle(claim.leases[0])
                world.clock.time = max(world.clock.time, times[-1] + 10 * SECOND - 10_000)
            assert all(later - earlier >= 10 * SECOND for earlier, later in itertools.pairwise(times))

    async def test_a_changed_limit_applies_at_once(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(world.new_endpoint(rate_limit=0.001, concurrency=9))
            await world.prove(stored.id)
            await world.emit(stored.id)
            assert (await world.claim()).leases == []
            fresh = await world.storage.get_endpoint(stored.id)
            assert fresh.rate_limit == 0.001


class MonitoringContract(ContractBase):
    """What waits, and how endpoints do."""

    async def test_the_backlog_counts_what_waits_and_since_when(self) -> None:
        async with self.opened() as world:
            assert tuple(await world.storage.backlog()) == (0, 0, None)
            one, paused = await world.endpoint(), await world.endpoint()
            await world.storage.set_endpoint_state(paused, EndpointState.PAUSED, reason=None)
            await world.emit(paused)
            assert tuple(await world.storage.backlog()) == (1, 0, None)
            oldest = world.clock.now()
            await world.emit(one)
            world.pass_time(SECOND)
            await world.emit(one, available_at=world.clock.now() + DAY)
            assert tuple(await world.storage.backlog()) == (3, 0, oldest)
            lease = await world.claim_one()
            assert tuple(await world.storage.backlog()) == (3, 1, None)
            await world.settle(lease, PENDING, retry_in=SECOND)
            retry_at = world.clock.now() + SECOND
            world.pass_time(2 * SECOND)
            assert tuple(await world.storage.backlog()) == (3, 0, retry_at)

    async def test_what_is_leased_is_not_the_oldest_that_waits_even_when_its_process_died(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            world.pass_time(SECOND)
            oldest = world.clock.now()
            await world.emit(endpoint)
            first = await world.claim_one()
            assert tuple(await world.storage.backlog()) == (2, 1, oldest)
            await world.settle(first, PENDING, retry_in=SECOND)
            await world.settle(await world.claim_one())
            oldest = world.clock.now() + 2 * SECOND
            await world.emit(endpoint, available_at=oldest)
            world.pass_time(3 * SECOND)
            assert (await world.claim_one(limit=1)).delivery_id == first.delivery_id
            assert tuple(await world.storage.backlog()) == (2, 1, oldest)
            await self.restart(world)
            assert tuple(await world.storage.backlog()) == (2, 1, oldest)

    async def test_stats_are_of_one_endpoint_and_since_then(self) -> None:
        async with self.opened() as world:
            one, other = await world.endpoint(), await world.endpoint()
            for state in (FAILED, SUCCEEDED):
                await world.emit(one, other)
                for lease in (await world.claim()).leases:
                    await world.settle(lease, state)
                world.pass_time(SECOND)
            assert sorted(await world.storage.stats(one, 0)) == [(1000, False), (1000, True)]
            assert await world.storage.stats(one, world.clock.now() - SECOND) == [(1000, True)]
            assert await world.storage.stats("ep_unknown", 0) == []
