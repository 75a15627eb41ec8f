"""History and life: what can be read, what goes, and what is left after a close."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hookwright._clock import SECOND
from hookwright._errors import NotFound, StorageClosed, ValidationFailed
from hookwright._models import DeliveryState, EndpointState
from hookwright.storage._base import SWEEP_ROWS, ClaimRequest, DeliveryFilter
from hookwright.testing._storage_contract_base import EVERYTHING, START, ContractBase, ManualClock, World

if TYPE_CHECKING:
    from collections.abc import Coroutine


class HistoryContract(ContractBase):
    """Lists, counts, attempts, prune."""

    async def test_unknown_ids_are_not_found(self) -> None:
        async with self.opened() as world:
            for verb in (
                world.storage.get_event("evt_none"),
                world.storage.get_delivery("dlv_none"),
                world.storage.attempts("dlv_none"),
            ):
                with pytest.raises(NotFound):
                    await verb

    async def test_deliveries_are_listed_and_counted_by_every_filter_and_by_all_at_once(self) -> None:
        async with self.opened() as world:
            one, other = await world.endpoint(), await world.endpoint()
            event = world.new_event(type="video.ready", tenant="t")
            await world.enqueue(event, world.new_delivery(one), world.new_delivery(other, skipped=True))
            world.pass_time(SECOND)
            since = world.clock.now()
            await world.emit(other, type="export.ready", tenant="u")
            await world.emit(one)
            everything = {
                DeliveryFilter(): 4,
                DeliveryFilter(states=(DeliveryState.SKIPPED,)): 1,
                DeliveryFilter(states=(DeliveryState.PENDING,)): 3,
                DeliveryFilter(endpoint_id=one): 2,
                DeliveryFilter(event_id=event.id): 2,
                DeliveryFilter(event_type="export.ready"): 1,
                DeliveryFilter(since=since): 2,
                DeliveryFilter(tenant="t"): 2,
                DeliveryFilter((DeliveryState.PENDING,), one, event.id, "video.ready", START, None, "t"): 1,
                DeliveryFilter((DeliveryState.PENDING,), one, event.id, "video.ready", since, None, "t"): 0,
                DeliveryFilter(event_id="evt_none"): 0,
            }
            for where, count in everything.items():
                found = await world.deliveries(where)
                assert (len(found), await world.storage.count_deliveries(where)) == (count, count), where
                ids = [delivery.id for delivery in found]
                assert ids == sorted(ids, reverse=True)

    async def test_pages_neither_repeat_nor_miss_a_row_while_others_arrive(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            rows = await world.emit_many(7, endpoint)
            seen: list[str] = []
            cursor = None
            for _ in range(4):
                page = await world.storage.list_deliveries(EVERYTHING, limit=2, cursor=cursor)
                seen += [delivery.id for delivery in page.items]
                cursor = page.next_cursor
                await world.emit(endpoint)
            assert cursor is None
            assert seen == rows[::-1]
            exact = await world.storage.list_deliveries(DeliveryFilter(event_id="evt_none"), limit=2, cursor=None)
            assert (exact.items, exact.next_cursor) == ((), None)
            full = await world.storage.list_deliveries(EVERYTHING, limit=11, cursor=None)
            assert (len(full.items), full.next_cursor) == (11, None)

    async def test_altered_and_foreign_cursors_are_refused(self) -> None:
        async with self.opened() as world:
            await world.emit_many(3, await world.endpoint())
            where = DeliveryFilter(states=(DeliveryState.PENDING,))
            cursor = (await world.storage.list_deliveries(where, limit=1, cursor=None)).next_cursor
            assert cursor is not None
            altered = [cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1 :] for at in range(8)]
            for bad in ("", "x", "\x00", "é", "AAAA", cursor[:-4], cursor + "AAAA", *altered):
                with pytest.raises(ValidationFailed) as refused:
                    await world.storage.list_deliveries(where, limit=1, cursor=bad)
                assert refused.value.field == "cursor"
            for other in (EVERYTHING, DeliveryFilter(states=(DeliveryState.FAILED,)), DeliveryFilter(tenant="pending")):
                with pytest.raises(ValidationFailed):
                    await world.storage.list_deliveries(other, limit=1, cursor=cursor)

    async def test_attempts_are_listed_oldest_first(self) -> None:
        async with self.opened() as world:
            (row,) = await world.emit(await world.endpoint())
            for _ in range(12):
                await world.settle(await world.claim_one(), DeliveryState.PENDING)
            attempts = await world.storage.attempts(row)
            assert [attempt.number for attempt in attempts] == list(range(1, 13))
            assert sorted(attempts, key=lambda attempt: attempt.started_at) == attempts

    async def test_prune_takes_old_events_whole_unless_something_of_them_is_pending(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            ended, waiting = world.new_event(idempotency_key="k"), world.new_event()
            row = world.new_delivery(endpoint)
            await world.enqueue(ended, row, world.new_delivery(endpoint, skipped=True))
            await world.settle(await world.claim_one())
            await world.enqueue(waiting, world.new_delivery(endpoint), world.new_delivery(endpoint, skipped=True))
            unwanted, boundary = world.new_event(), world.new_event()
            await world.enqueue(unwanted)
            world.pass_time()
            before = world.clock.now()
            await world.enqueue(boundary)
            assert await world.storage.prune(before) == 2
            for verb in (
                world.storage.get_event(ended.id),
                world.storage.get_event(unwanted.id),
                world.storage.get_delivery(row.id),
                world.storage.attempts(row.id),
            ):
                with pytest.raises(NotFound):
                    await verb
            assert (await world.storage.get_event(waiting.id)).id == waiting.id
            assert (await world.storage.get_event(boundary.id)).id == boundary.id
            assert len(await world.deliveries()) == 2
            assert await world.storage.prune(before) == 0

    async def test_a_pruned_event_frees_its_idempotency_key(self) -> None:
        async with self.opened() as world:
            await world.enqueue(world.new_event(idempotency_key="k"))
            assert await world.storage.prune(world.clock.now() + 1) == 1
            receipt = await world.enqueue(world.new_event(idempotency_key="k", digest=b"other"))
            assert not receipt.duplicate

    async def test_one_prune_is_bounded(self) -> None:
        async with self.opened() as world:
            revision = await world.revision()
            events = [world.new_event() for _ in range(SWEEP_ROWS + 5)]
            await asyncio.gather(*(world.storage.enqueue(event, [], endpoints_revision=revision) for event in events))
            assert await world.storage.prune(world.clock.now() + 1) == SWEEP_ROWS
            assert await world.storage.prune(world.clock.now() + 1) == 5


class LifeContract(ContractBase):
    """Open, close, and what is in between."""

    async def test_what_was_stored_is_there_for_the_next_process(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint(headers=(("a", "b"),))
            await world.emit(endpoint, endpoint, idempotency_key="k")
            await world.settle(await world.claim_one(), DeliveryState.FAILED)
            await world.storage.set_endpoint_state(endpoint, EndpointState.PAUSED, reason="manual")
            before = await world.snapshot(), await world.storage.get_endpoint(endpoint)
            await self.restart(world)
            assert (await world.snapshot(), await world.storage.get_endpoint(endpoint)) == before
            assert (await world.claim()).leases == []
            assert (await world.enqueue(world.new_event(idempotency_key="k"))).duplicate

    async def test_every_verb_refuses_before_open_and_after_close(self) -> None:
        storage = await self.make_storage()
        world = World(storage, ManualClock())
        await self._refuses_all(world)
        await storage.open(world.clock)
        await storage.close()
        await storage.close()
        await self._refuses_all(world)

    async def _refuses_all(self, world: World) -> None:
        for verb in self._verbs(world):
            with pytest.raises(StorageClosed):
                await verb

    def _verbs(self, world: World) -> list[Coroutine[Any, Any, object]]:
        storage, endpoint = world.storage, world.new_endpoint()
        return [
            storage.acquire(),
            storage.enqueue(world.new_event(), [], endpoints_revision=0),
            storage.claim(ClaimRequest(1, 1, 1, 1, {})),
            storage.settle([]),
            storage.release([]),
            storage.sweep(),
            storage.wait(1.0),
            storage.create_endpoint(endpoint),
            storage.update_endpoint(endpoint),
            storage.set_endpoint_state(endpoint.id, EndpointState.ACTIVE, reason=None),
            storage.delete_endpoint(endpoint.id),
            storage.get_endpoint(endpoint.id),
            storage.list_endpoints(limit=1, cursor=None, tenant=None),
            storage.changes(0),
            storage.get_event("evt"),
            storage.get_delivery("dlv"),
            storage.list_deliveries(EVERYTHING, limit=1, cursor=None),
            storage.count_deliveries(EVERYTHING),
            storage.attempts("dlv"),
            storage.prune(0),
            storage.scrub_endpoints(),
        ]

    async def test_waiting_ends_when_the_time_is_up_or_the_storage_closes(self) -> None:
        async with self.opened() as world:
            await world.storage.wait(0.0)
            assert await world.storage.wait(0.001) is False
            waiting = asyncio.create_task(self._wait_until_closed(world))
            await asyncio.sleep(0)
            await world.storage.close()
            await asyncio.wait_for(waiting, 30)

    async def _wait_until_closed(self, world: World) -> None:
        # Another process may be said to have written at any time; after the close there is nothing to wait for.
        with pytest.raises(StorageClosed):
            while True:
                await world.storage.wait(60)

    async def test_what_was_asked_for_before_a_close_is_written(self) -> None:
        async with self.opened() as world:
            revision = await world.revision()
            events = [world.new_event() for _ in range(20)]
            asked = [
                asyncio.create_task(world.storage.enqueue(event, [], endpoints_revision=revision)) for event in events
            ]
            await asyncio.sleep(0)
            await world.storage.close()
            assert [receipt.event_id for receipt in await asyncio.gather(*asked)] == [event.id for event in events]
            world.storage = await self.reopen(world.storage)
            await world.storage.open(world.clock)
            for event in events:
                assert (await world.storage.get_event(event.id)).id == event.id
