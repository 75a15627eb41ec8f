"""Several processes on one schema: all emit, all deliver, and none waits for another."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import tenacity

from hookwright import DeliveryState, Dispatcher, EndpointState, NewEvent, Profile, RetryPolicy
from hookwright._clock import SECOND
from hookwright.storage import postgres
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.postgres.several import HOURS, Ahead, Process, Several, sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from hookwright._models import Lease

AT_ONCE = 3.0
"""Seconds: far below the minute for which a process looks for nothing by itself here, and for a busy machine enough."""

ACTIVE, PAUSED, DISABLED = EndpointState.ACTIVE, EndpointState.PAUSED, EndpointState.DISABLED


@pytest.fixture
async def several(postgres_dsn: str, postgres_schema: str) -> AsyncIterator[Several]:
    async with AsyncExitStack() as stack:
        yield Several(postgres_dsn, postgres_schema, stack)


@pytest.fixture
def never_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for others' work by himself: what is found was told."""
    monkeypatch.setattr(postgres, "_POLL_LISTENING", 60.0)


# -- one emits, another delivers --------------------------------------------------------------------------------


async def _emit(dispatcher: Dispatcher, several: Several) -> str:
    return (await dispatcher.emit("video.ready")).event_id


async def _emit_many(dispatcher: Dispatcher, several: Several) -> str:
    return (await dispatcher.emit_many([NewEvent("video.ready")]))[0].event_id


async def _emit_in_a_transaction(dispatcher: Dispatcher, several: Several) -> str:
    connection = await several.connection()
    async with connection.transaction():
        return (await dispatcher.emit("video.ready", connection=connection)).event_id


EMITS = [_emit, _emit_many, _emit_in_a_transaction]


@pytest.mark.usefixtures("never_looking")
@pytest.mark.parametrize("emit", EMITS)
async def test_what_one_emits_another_delivers_at_once(
    several: Several, emit: Callable[[Dispatcher, Several], Awaitable[str]]
) -> None:
    here, there = FakeTransport(), FakeTransport()
    emitting = await several.dispatcher(here, deliver=False)
    await several.dispatcher(there)
    await emitting.endpoints.create(URL, events=["*"])
    for _ in range(3):
        event_id = await emit(emitting, several)
        await until(lambda event_id=event_id: event_id in sent(there), timeout=AT_ONCE)
    assert sent(here) == []


@pytest.mark.parametrize("emit", EMITS)
async def test_without_notifications_it_is_found_within_a_second(
    several: Several, emit: Callable[[Dispatcher, Several], Awaitable[str]]
) -> None:
    there = FakeTransport()
    emitting = await several.dispatcher(FakeTransport(), deliver=False, poll_only=True)
    await several.dispatcher(there, poll_only=True)
    await emitting.endpoints.create(URL, events=["*"])
    event_id = await emit(emitting, several)
    await until(lambda: event_id in sent(there), timeout=AT_ONCE)
    listening = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
    statements = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%{}%'"
    assert await several.value(statements) == 0, await several.value(listening)


@pytest.mark.usefixtures("never_looking")
async def test_what_is_resumed_or_sent_again_by_one_is_delivered_by_another_at_once(several: Several) -> None:
    there = FakeTransport([410, 200])
    emitting = await several.dispatcher(FakeTransport(), deliver=False)
    await several.dispatcher(there)
    endpoint = await emitting.endpoints.create(URL, events=["*"])
    failed = await emitting.emit("video.ready")
    await until(lambda: len(there.requests) == 1)
    [delivery] = await emitting.deliveries.wait(failed.event_id, timeout=10)
    assert delivery.state is DeliveryState.FAILED
    await emitting.endpoints.enable(endpoint.id)
    await emitting.deliveries.retry(delivery.id)
    await until(lambda: len(there.requests) == 2, timeout=AT_ONCE)
    await emitting.endpoints.pause(endpoint.id)
    await emitting.emit("video.ready")
    await emitting.endpoints.resume(endpoint.id)
    await until(lambda: len(there.requests) == 3, timeout=AT_ONCE)


async def test_who_waits_is_told_of_what_another_delivered(several: Several) -> None:
    there = FakeTransport()
    emitting = await several.dispatcher(FakeTransport(), deliver=False)
    delivering = await several.dispatcher(there)
    await emitting.endpoints.create(URL, events=["*"])
    receipt = await emitting.emit("video.ready")
    [delivery] = await emitting.deliveries.wait(receipt.event_id, timeout=10)
    assert delivery.state is DeliveryState.SUCCEEDED
    receipts = [await emitting.emit("video.ready") for _ in range(20)]
    await delivering.drain(timeout=10)
    assert set(sent(there)) == {receipt.event_id, *(later.event_id for later in receipts)}
    for later in receipts:
        [delivery] = await emitting.deliveries.wait(later.event_id, timeout=0)
        assert delivery.state is DeliveryState.SUCCEEDED


# -- how many at once ---------------------------------------------------------------------------------------------


async def _proven(process: Process, concurrency: int) -> str:
    endpoint = await process.endpoint(concurrency=concurrency)
    await process.prove(endpoint, 4)
    return endpoint


async def _most_at_once(several: Several, *, shared: bool) -> int:
    """Let two claim at the same time, again and again; return how much both got at most."""
    one, two = [await several.process(shared_concurrency=shared) for _ in range(2)]
    endpoint = await _proven(one, 3)
    await one.emit_many(200, endpoint)
    most = 0
    for _ in range(20):
        leases = await asyncio.gather(one.claimed(), two.claimed())
        more = await asyncio.gather(
            *(
                process.claimed(in_flight={endpoint: [lease.delivery_id for lease in mine]})
                for process, mine in zip((one, two), leases, strict=True)
            )
        )
        most = max(most, sum(map(len, leases)) + sum(map(len, more)))
        for mine in (*leases, *more):
            await one.storage.settle([one.outcome(lease) for lease in mine])
    return most


async def test_each_process_has_an_endpoints_concurrency_for_itself(several: Several) -> None:
    assert await _most_at_once(several, shared=False) == 6


async def test_shared_concurrency_is_never_exceeded_by_all_together(several: Several) -> None:
    assert await _most_at_once(several, shared=True) == 3


# -- a claim waits for nobody -------------------------------------------------------------------------------------


async def _claims_at_once(process: Process) -> list[Lease]:
    begun = time.monotonic()
    leases = await process.claimed()
    assert time.monotonic() - begun < AT_ONCE
    return leases


async def test_a_claim_passes_by_lanes_that_somebody_else_has_locked(several: Several) -> None:
    process = await several.process()
    locked, free = [await process.endpoint() for _ in range(2)]
    await process.emit(locked)
    await process.emit(free)
    await process.written()  # both are due, and not only woken
    async with several.holding("SELECT 1 FROM {}.lane WHERE endpoint_id = $1 FOR UPDATE", locked):
        assert [lease.endpoint_id for lease in await _claims_at_once(process)] == [free]
        # It comes again in a moment: nobody tells when the lock is gone.
        claim = await process.claim()
        assert claim.next_due is not None
    assert [lease.endpoint_id for lease in await process.claimed()] == [locked]


async def test_a_claim_waits_for_no_settle_of_another_process(several: Several) -> None:
    one, two = [await several.process() for _ in range(2)]
    busy, free = [await one.endpoint() for _ in range(2)]
    [delivery] = await one.emit(busy)
    lease = await one.claim_one()
    async with several.holding("SELECT 1 FROM {}.delivery WHERE id = $1 FOR UPDATE", delivery):
        settling = asyncio.create_task(one.settle(lease))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{}%'"
        await until(lambda: _is(several, waiting, 1))
        await two.emit(busy, free)
        assert [lease.endpoint_id for lease in await _claims_at_once(two)] == [free]
        assert not settling.done()
    assert (await settling).held


async def _is(several: Several, sql: str, value: object) -> bool:
    return bool(await several.value(sql) == value)


async def test_a_transaction_that_stays_open_blocks_neither_emits_nor_claims(several: Several) -> None:
    there = FakeTransport()
    one = await several.dispatcher(FakeTransport(), deliver=False)
    two = await several.dispatcher(there)
    endpoint = await one.endpoints.create(URL, events=["*"])
    connection = await several.connection()
    async with connection.transaction():
        await one.emit("video.ready", event_id="evt_open", connection=connection)
        async with asyncio.timeout(AT_ONCE):
            for emitting in (one, two):
                receipt = await emitting.emit("video.ready")
                await until(lambda id=receipt.event_id: id in sent(there))
            await two.endpoints.update(endpoint.id, name="changed meanwhile")
        assert "evt_open" not in sent(there)
    await until(lambda: "evt_open" in sent(there), timeout=AT_ONCE)


async def test_an_emit_that_waits_for_anothers_key_holds_up_no_other(several: Several) -> None:
    there = FakeTransport()
    one = await several.dispatcher(there)
    await one.endpoints.create(URL, events=["*"])
    connection = await several.connection()
    async with connection.transaction():
        first = await one.emit("video.ready", idempotency_key="order 1", connection=connection)
        # More than there are connections.
        same = [asyncio.create_task(one.emit("video.ready", idempotency_key="order 1")) for _ in range(10)]
        await until(
            lambda: _is(several, "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'", True)
        )
        async with asyncio.timeout(AT_ONCE):
            for _ in range(3):
                receipt = await one.emit("video.ready")
                await until(lambda id=receipt.event_id: id in sent(there))
        assert not any(task.done() for task in same)
    for task in same:
        assert (await task).event_id == first.event_id
        assert task.result().duplicate


async def test_transactions_that_emit_in_opposite_order_do_not_meet(several: Several) -> None:
    there = FakeTransport()
    dispatcher = await several.dispatcher(there)
    endpoints = [(await dispatcher.endpoints.create(URL, events=["*"])).id for _ in range(2)]
    one, two = [await several.connection() for _ in range(2)]
    async with asyncio.timeout(AT_ONCE), one.transaction(), two.transaction():
        for mine, theirs in zip(endpoints, reversed(endpoints), strict=True):
            await dispatcher.emit("video.ready", endpoint_id=mine, connection=one)
            await dispatcher.emit("video.ready", endpoint_id=theirs, connection=two)
    await until(lambda: len(there.requests) == 4)


async def test_two_that_deliver_serve_all_endpoints_whatever_waits_for_one(several: Several) -> None:
    one = await several.process()
    endpoints = [await one.endpoint() for _ in range(10)]
    for endpoint in endpoints:
        await one.prove(endpoint)
    await one.emit_many(200, endpoints[0])
    for endpoint in endpoints[1:]:
        await one.emit_many(3, endpoint)
    two = await several.process()
    served: list[str] = []
    for process in (one, two) * 10:
        leases = await process.claimed(limit=8)
        served += [lease.endpoint_id for lease in leases]
        await process.storage.settle([process.outcome(lease) for lease in leases])
    assert set(served[:50]) == set(endpoints)
    assert [served.count(endpoint) for endpoint in endpoints[1:]] == [3] * 9
    assert served.count(endpoints[0]) > 60


# -- endpoints that change elsewhere ------------------------------------------------------------------------------


async def test_an_endpoint_created_elsewhere_is_not_missed_by_an_emit_begun_afterwards(several: Several) -> None:
    one, two = [await several.dispatcher(FakeTransport(), deliver=False) for _ in range(2)]
    for count in range(1, 6):
        await one.endpoints.create(URL, events=["*"])
        assert (await two.emit("video.ready")).delivery_count == count
        assert (await two.emit_many([NewEvent("video.ready")]))[0].delivery_count == count


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
async def test_nor_by_one_in_a_transaction_that_began_before_it_was_created(several: Several, isolation: Any) -> None:
    one, two = [await several.dispatcher(FakeTransport(), deliver=False) for _ in range(2)]
    connection = await several.connection()
    async with connection.transaction(isolation=isolation):
        await connection.fetchval("SELECT count(*) FROM pg_class")  # what it sees is fixed from here on
        await one.endpoints.create(URL, events=["*"])
        assert (await two.emit("video.ready", connection=connection)).delivery_count == 1
        receipts = await two.emit_many([NewEvent("video.ready"), NewEvent("video.ready")], connection=connection)
        assert [receipt.delivery_count for receipt in receipts] == [1, 1]
    assert await several.value("SELECT count(*) FROM {}.delivery") == 3


async def _delete(dispatcher: Dispatcher, endpoint_id: str) -> None:
    await dispatcher.endpoints.delete(endpoint_id)


async def _disable(dispatcher: Dispatcher, endpoint_id: str) -> None:
    await dispatcher.endpoints.disable(endpoint_id)


@pytest.mark.parametrize(("stop", "state"), [(_delete, "cancelled"), (_disable, "skipped")])
async def test_what_is_committed_when_its_endpoint_was_stopped_and_swept_ends_unsent(
    several: Several, stop: Callable[[Dispatcher, str], Awaitable[None]], state: str
) -> None:
    there = FakeTransport()
    one = await several.dispatcher(FakeTransport(), deliver=False, poll_only=True)
    await several.dispatcher(there, poll_only=True)
    endpoint = await one.endpoints.create(URL, events=["*"])
    connection = await several.connection()
    async with connection.transaction():
        receipt = await one.emit("video.ready", connection=connection)
        await stop(one, endpoint.id)
        swept = "SELECT count(*) FROM {}.lane WHERE endpoint_id = $1 AND sweep IS NULL"
        left = 0 if state == "cancelled" else 1
        await until(lambda: _lanes_are(several, swept, endpoint.id, left))
    [delivery] = await one.deliveries.wait(receipt.event_id, timeout=20)
    assert delivery.state == state
    assert sent(there) == []
    assert await several.value("SELECT count(*) FROM {}.wake") == 0


async def _lanes_are(several: Several, sql: str, endpoint_id: str, count: int) -> bool:
    if count == 0:
        sql = "SELECT count(*) FROM {}.lane WHERE endpoint_id = $1"
    return bool(await several.value(sql, endpoint_id) == count)


async def test_an_endpoint_disabled_in_one_gets_nothing_more_from_another(several: Several) -> None:
    there = FakeTransport()
    there.respond(URL, there.hang)
    one = await several.dispatcher(FakeTransport(), deliver=False)
    await several.dispatcher(there)
    endpoint = await one.endpoints.create(URL, events=["*"])
    receipts = [await one.emit("video.ready") for _ in range(5)]
    await until(lambda: len(there.requests) == 1)
    await one.endpoints.disable(endpoint.id)
    there.release()
    states = [(await one.deliveries.wait(receipt.event_id, timeout=20))[0].state for receipt in receipts]
    assert sorted(states) == ["skipped"] * 4 + ["succeeded"]
    assert len(there.requests) == 1


# -- those that die -----------------------------------------------------------------------------------------------


async def _die(process: Process) -> None:
    """Let the server see what it sees when a process was killed."""
    opened = process.storage._open  # type: ignore[attr-defined]  # the contract's World knows the port only
    await opened.listener.close()
    await opened.pool.close()


async def test_who_starts_frees_at_once_what_the_dead_had_and_nothing_of_the_living(several: Several) -> None:
    dying, living = [await several.process() for _ in range(2)]
    endpoints = [await dying.endpoint() for _ in range(2)]
    await dying.emit(endpoints[0])
    lost = await dying.claim_one()
    await living.emit(endpoints[1])
    held = await living.claim_one()
    await _die(dying)
    starting = await several.process()
    taken = await starting.claim_one()
    assert (taken.delivery_id, taken.taken_over, taken.interruptions) == (lost.delivery_id, True, 1)
    assert (await living.settle(held)).held


async def test_who_was_there_before_takes_it_over_when_the_lease_ends(several: Several) -> None:
    dying, living = [await several.process() for _ in range(2)]
    await dying.emit(await dying.endpoint())
    begun = time.monotonic()
    lost = await dying.claim_one(lease=SECOND)
    await _die(dying)
    taken = await _claim_when_due(living)
    assert (taken.delivery_id, taken.taken_over) == (lost.delivery_id, True)
    assert time.monotonic() - begun > 0.9


async def _claim_when_due(process: Process) -> Lease:
    """Claim as a worker does: again when the last claim said, or a little later."""
    leases: list[Lease] = []

    async def claimed() -> bool:
        leases.extend(await process.claimed())
        return bool(leases)

    await until(claimed)
    return leases[0]


# -- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [HOURS, -HOURS])
async def test_leases_last_as_the_servers_clock_says_whatever_a_machines_own_does(several: Several, ahead: int) -> None:
    wrong, right = await several.process(ahead=ahead), await several.process()
    endpoint = await right.endpoint()
    for claiming, waiting in ((wrong, right), (right, wrong)):
        await claiming.emit(endpoint)
        begun = time.monotonic()
        lease = await claiming.claim_one(lease=SECOND)
        own = claiming.storage._now()  # type: ignore[attr-defined]  # its own clock
        assert 0 < lease.until - own <= SECOND
        claim = await waiting.claim()
        assert claim.leases == []
        assert claim.next_due is not None
        assert claim.next_due - waiting.storage._now() <= SECOND  # type: ignore[attr-defined]  # its own clock
        taken = await _claim_when_due(waiting)
        assert taken.taken_over
        assert time.monotonic() - begun > 0.9
        assert not (await claiming.settle(lease)).held
        assert (await waiting.settle(taken)).held


@pytest.mark.parametrize("ahead", [HOURS, -HOURS])
async def test_a_machine_whose_clock_is_hours_off_delivers_and_retries_in_time(several: Several, ahead: int) -> None:
    there = FakeTransport([503, 500, 200])  # the first also closes the endpoint for a second
    profiles = {"default": Profile(retry=RetryPolicy.schedule(0, 0.2, 0.2))}
    await several.dispatcher(there, clock=Ahead(ahead), profiles=profiles)
    emitting = await several.dispatcher(FakeTransport(), deliver=False)
    await emitting.endpoints.create(URL, events=["*"])
    receipt = await emitting.emit("video.ready")
    [delivery] = await emitting.deliveries.wait(receipt.event_id, timeout=20)
    assert (delivery.state, delivery.attempt_count) == (DeliveryState.SUCCEEDED, 3)
    later = await emitting.emit("video.later", deliver_at=datetime.now(UTC) + timedelta(seconds=0.5))
    begun = time.monotonic()
    await emitting.deliveries.wait(later.event_id, timeout=20)
    assert time.monotonic() - begun > 0.3


@pytest.mark.parametrize("ahead", [HOURS, -HOURS])
async def test_retries_end_when_the_event_is_old_by_the_servers_clock(several: Several, ahead: int) -> None:
    there = FakeTransport(503)
    retry = RetryPolicy(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(1.0))
    await several.dispatcher(there, clock=Ahead(ahead), profiles={"default": Profile(retry=retry)})
    emitting = await several.dispatcher(FakeTransport(), deliver=False)
    await emitting.endpoints.create(URL, events=["*"])
    receipt = await emitting.emit("video.ready")
    [delivery] = await emitting.deliveries.wait(receipt.event_id, timeout=20)
    assert delivery.state is DeliveryState.FAILED
    assert 2 <= delivery.attempt_count <= 7
