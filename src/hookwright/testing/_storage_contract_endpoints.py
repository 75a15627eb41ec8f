"""Endpoints: revisions, states, tombstones, and the sweep that follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hookwright._clock import SECOND, to_datetime
from hookwright._errors import ConflictError, NotFound, ValidationFailed
from hookwright._health import EndpointHealth
from hookwright._models import ALL_TENANTS, DeliveryState, EndpointState, Key
from hookwright.storage._base import SWEEP_ROWS, DeliveryFilter
from hookwright.testing._storage_contract_base import LEASE, ContractBase, World

PENDING, SKIPPED, CANCELLED = DeliveryState.PENDING, DeliveryState.SKIPPED, DeliveryState.CANCELLED


class EndpointContract(ContractBase):
    """Create, update, state, delete, list, changes."""

    async def test_an_endpoint_comes_back_as_it_was_stored(self) -> None:
        async with self.opened() as world:
            for tenant in (None, "t", ALL_TENANTS):
                endpoint = world.new_endpoint(
                    tenant=tenant,
                    name="n",
                    description="d",
                    events=("video.*", "export.ready"),
                    filters={"index": ("a", 1, True)},
                    metadata={"nested": {"x": [1, None]}},
                    headers=(("x-a", "1"), ("x-b", "2")),
                    keys=(Key("k1"), Key("k2", 7)),
                    profile="p",
                    concurrency=3,
                    timeout=2.5,
                )
                before = await world.revision()
                stored = await world.storage.create_endpoint(endpoint)
                assert stored == replace(endpoint, revision=before + 1)
                assert await world.storage.get_endpoint(endpoint.id) == stored
                assert (await world.storage.get_endpoint(endpoint.id)).tenant is tenant or tenant == "t"

    async def test_an_id_is_used_once_even_after_deletion(self) -> None:
        async with self.opened() as world:
            endpoint = world.new_endpoint()
            await world.storage.create_endpoint(endpoint)
            with pytest.raises(ConflictError):
                await world.storage.create_endpoint(endpoint)
            await world.storage.delete_endpoint(endpoint.id)
            with pytest.raises(ConflictError):
                await world.storage.create_endpoint(endpoint)

    async def test_an_update_replaces_what_the_application_sets_and_nothing_else(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(world.new_endpoint(headers=(("a", "b"),)))
            await world.emit(stored.id)
            await world.settle(await world.claim_one(), DeliveryState.FAILED)
            paused = await world.storage.set_endpoint_state(stored.id, EndpointState.PAUSED, reason="manual")
            wanted = replace(
                paused,
                url="https://other.example/",
                name="n",
                tenant="t",
                headers=(),
                concurrency=2,
                state=EndpointState.ACTIVE,
                disabled_reason="x",
                created_at=1,
                health=EndpointHealth(9),
                updated_at=world.clock.now() + SECOND,
            )
            updated = await world.storage.update_endpoint(wanted)
            assert updated == replace(
                wanted,
                revision=paused.revision + 1,
                state=EndpointState.PAUSED,
                disabled_reason="manual",
                created_at=stored.created_at,
                health=paused.health,
            )
            assert await world.storage.get_endpoint(stored.id) == updated

    async def test_an_update_of_what_somebody_else_changed_is_a_conflict(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(world.new_endpoint())
            updated = await world.storage.update_endpoint(replace(stored, name="one"))
            with pytest.raises(ConflictError):
                await world.storage.update_endpoint(replace(stored, name="two"))
            assert await world.storage.get_endpoint(stored.id) == updated

    async def test_unknown_and_deleted_endpoints_are_not_found(self) -> None:
        async with self.opened() as world:
            deleted = await world.storage.create_endpoint(world.new_endpoint())
            await world.storage.delete_endpoint(deleted.id)
            revision = await world.revision()
            for endpoint in (deleted, world.new_endpoint()):
                for verb in (
                    world.storage.get_endpoint(endpoint.id),
                    world.storage.update_endpoint(endpoint),
                    world.storage.set_endpoint_state(endpoint.id, EndpointState.ACTIVE, reason=None),
                    world.storage.delete_endpoint(endpoint.id),
                ):
                    with pytest.raises(NotFound):
                        await verb
            assert await world.revision() == revision

    async def test_a_claim_knows_the_endpoint_as_it_is(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(world.new_endpoint())
            await world.prove(stored.id, 3)
            await world.emit_many(9, stored.id)
            updated = await world.storage.update_endpoint(replace(stored, concurrency=6))
            claim = await world.claim()
            assert (len(claim.leases), claim.endpoints_revision) == (6, updated.revision)

    async def test_a_pause_holds_its_rows_and_a_resume_makes_them_due_as_scheduled(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            (held,) = await world.emit(endpoint)
            paused = await world.storage.set_endpoint_state(endpoint, EndpointState.PAUSED, reason="manual")
            assert (paused.state, paused.disabled_reason) == (EndpointState.PAUSED, "manual")
            await world.emit(endpoint)
            await world.sweep()
            world.pass_time(LEASE)
            assert (await world.claim()).leases == []
            active = await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            assert (active.state, active.disabled_reason) == (EndpointState.ACTIVE, None)
            assert active.updated_at == world.clock.now()
            assert (await world.claim_one()).delivery_id == held

    async def test_an_endpoint_may_begin_paused(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint(state=EndpointState.PAUSED)
            await world.emit(endpoint)
            assert (await world.claim()).leases == []
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            assert len((await world.claim()).leases) == 1

    async def test_what_matching_reads_has_a_revision_and_health_has_none(self) -> None:
        async with self.opened() as world:
            first = await world.storage.create_endpoint(world.new_endpoint())
            second = await world.storage.create_endpoint(world.new_endpoint())
            await world.prove(first.id)
            await world.emit(first.id)
            await world.settle(await world.claim_one(), DeliveryState.FAILED)
            assert (await world.storage.changes(second.revision)).endpoints == []
            paused = await world.storage.set_endpoint_state(first.id, EndpointState.PAUSED, reason=None)
            changes = await world.storage.changes(second.revision)
            assert changes.revision == paused.revision > second.revision
            assert [(row.id, row.revision, row.state) for row in changes.endpoints] == [
                (first.id, paused.revision, EndpointState.PAUSED)
            ]
            assert {row.id for row in (await world.storage.changes(0)).endpoints} == {first.id, second.id}

    async def test_a_deleted_endpoint_leaves_a_tombstone_that_tells_nothing(self) -> None:
        async with self.opened() as world:
            stored = await world.storage.create_endpoint(
                world.new_endpoint(headers=(("a", "secret"),), metadata={"a": 1}, name="n")
            )
            await world.storage.delete_endpoint(stored.id)
            changes = await world.storage.changes(stored.revision)
            (tombstone,) = changes.endpoints
            assert (tombstone.id, tombstone.deleted) == (stored.id, True)
            assert tombstone.revision == changes.revision == stored.revision + 1
            assert (tombstone.url, tombstone.keys, tombstone.headers, tombstone.metadata) == ("", (), (), {})
            assert (await world.storage.list_endpoints(limit=9, cursor=None, tenant=None)).items == ()

    async def test_scrubbing_leaves_every_endpoint_and_revision_as_it_is(self) -> None:
        async with self.opened() as world:
            await world.storage.scrub_endpoints()
            endpoints = [await world.endpoint(headers=(("a", "x" * number),)) for number in range(30)]
            await world.storage.delete_endpoint(endpoints[3])
            await world.emit(endpoints[7])
            before = await world.storage.changes(0)
            await world.storage.scrub_endpoints()
            assert await world.storage.changes(0) == before
            assert (await world.claim_one()).endpoint_id == endpoints[7]

    async def test_endpoints_are_listed_newest_first_page_by_page_while_others_come_and_go(self) -> None:
        async with self.opened() as world:
            ids = [await world.endpoint(tenant="t") for _ in range(5)]
            await world.endpoint(tenant=None)
            first = await world.storage.list_endpoints(limit=2, cursor=None, tenant="t")
            assert [row.id for row in first.items] == [ids[4], ids[3]]
            await world.endpoint(tenant="t")
            await world.storage.delete_endpoint(ids[3])
            second = await world.storage.list_endpoints(limit=2, cursor=first.next_cursor, tenant="t")
            assert [row.id for row in second.items] == [ids[2], ids[1]]
            third = await world.storage.list_endpoints(limit=2, cursor=second.next_cursor, tenant="t")
            assert ([row.id for row in third.items], third.next_cursor) == ([ids[0]], None)
            everything = await world.storage.list_endpoints(limit=100, cursor=None, tenant=None)
            assert (len(everything.items), everything.next_cursor) == (6, None)

    async def test_a_cursor_of_another_list_is_refused(self) -> None:
        async with self.opened() as world:
            for _ in range(3):
                await world.emit(await world.endpoint(tenant="t"))
            endpoints = (await world.storage.list_endpoints(limit=1, cursor=None, tenant="t")).next_cursor
            rows = (await world.storage.list_deliveries(DeliveryFilter(), limit=1, cursor=None)).next_cursor
            assert endpoints is not None
            for cursor, tenant in ((endpoints, None), (endpoints, "u"), (rows, "t"), (endpoints[:-4] + "AAAA", "t")):
                with pytest.raises(ValidationFailed) as refused:
                    await world.storage.list_endpoints(limit=1, cursor=cursor, tenant=tenant)
                assert refused.value.field == "cursor"


class SweepContract(ContractBase):
    """What becomes of the rows of endpoints that are no more."""

    async def test_waiting_rows_of_a_disabled_endpoint_are_skipped_and_of_a_deleted_one_cancelled(self) -> None:
        async with self.opened() as world:
            disabled, deleted, active = [await world.endpoint() for _ in range(3)]
            rows = await world.emit(disabled, deleted, active)
            await world.storage.set_endpoint_state(disabled, EndpointState.DISABLED, reason="manual")
            await world.storage.delete_endpoint(deleted)
            assert {lease.endpoint_id for lease in (await world.claim()).leases} == {active}
            assert [await world.state(row) for row in rows] == [PENDING] * 3
            await world.sweep()
            assert [await world.state(row) for row in rows] == [SKIPPED, CANCELLED, PENDING]
            for row in rows[:2]:
                delivery = await world.storage.get_delivery(row)
                assert delivery.finished_at == to_datetime(world.clock.now())
                assert (delivery.next_attempt_at, delivery.attempt_count) == (None, 0)
            assert not await world.storage.sweep()

    async def test_one_sweep_is_bounded_and_says_whether_more_remains(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.enqueue(world.new_event(), *(world.new_delivery(endpoint) for _ in range(SWEEP_ROWS + 20)))
            await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="manual")
            assert await world.storage.sweep()
            assert await self._count(world, SKIPPED) == SWEEP_ROWS
            assert not await world.storage.sweep()
            assert await self._count(world, SKIPPED) == SWEEP_ROWS + 20

    async def test_an_endpoint_enabled_before_the_sweep_ended_keeps_the_rest(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.enqueue(world.new_event(), *(world.new_delivery(endpoint) for _ in range(SWEEP_ROWS + 1)))
            await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="manual")
            assert await world.storage.sweep()
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            await world.sweep()
            assert await self._count(world, PENDING) == 1
            assert (await world.settle(await world.claim_one())).held

    async def test_a_leased_row_is_left_until_its_lease_has_ended(self) -> None:
        for deleted, swept in ((False, SKIPPED), (True, CANCELLED)):
            async with self.opened() as world:
                endpoint = await world.endpoint()
                (row,) = await world.emit(endpoint)
                lease = await world.claim_one()
                if deleted:
                    await world.storage.delete_endpoint(endpoint)
                else:
                    await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="manual")
                assert not await world.storage.sweep()
                assert await world.state(row) is PENDING
                world.clock.time = lease.until
                await world.sweep()
                assert await world.state(row) is swept
                assert not (await world.settle(lease)).held
                # The process that held it may have sent its request.
                assert [attempt.error for attempt in await world.storage.attempts(row)] == ["interrupted"]
                delivery = await world.storage.get_delivery(row)
                assert (delivery.attempt_count, delivery.last_error) == (1, "interrupted")

    async def test_a_disabled_endpoint_that_is_enabled_again_delivers_what_comes_then(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            await world.emit(endpoint)
            await world.storage.set_endpoint_state(endpoint, EndpointState.DISABLED, reason="manual")
            await world.sweep()
            await world.storage.set_endpoint_state(endpoint, EndpointState.ACTIVE, reason=None)
            (row,) = await world.emit(endpoint)
            assert (await world.claim_one()).delivery_id == row

    async def _count(self, world: World, state: DeliveryState) -> int:
        return await world.storage.count_deliveries(DeliveryFilter(states=(state,)))
