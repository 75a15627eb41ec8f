"""Slots: claimed for while their results are being written, taken and freed, and nothing lost in between."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    Failure,
    LeaseLost,
    MemoryStorage,
    Profile,
    Request,
    Response,
    StorageBusy,
)
from hookwright._pace import Pace
from hookwright.storage._base import DEFAULT_HEALTH
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookwright import Clock
    from hookwright._health import HealthPolicy
    from hookwright._models import Claim, Lease, Outcome, Settled
    from hookwright.storage._base import ClaimRequest


class _SlowToSettle(MemoryStorage):
    """Settles when it is let, and keeps what claims asked for and brought."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: list[tuple[ClaimRequest, Claim]] = []
        self.settling = asyncio.Event()
        self.may_settle = asyncio.Event()

    async def claim(self, request: ClaimRequest) -> Claim:
        found = await super().claim(request)
        self.claims.append((request, found))
        return found

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        self.settling.set()
        await self.may_settle.wait()
        return await super().settle(outcomes, policy)


async def test_what_is_being_settled_is_named_in_the_claim_and_leaves_its_slot_to_it() -> None:
    storage, transport = _SlowToSettle(), FakeTransport()
    async with Dispatcher(storage, transport=transport, concurrency=1, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(f"{URL}/1", events=["*"])
        await dispatcher.endpoints.create(f"{URL}/2", events=["*"])
        await dispatcher.emit("video.ready")
        await storage.settling.wait()
        await until(lambda: storage.claims[-1][0].settling)
        request, found = storage.claims[-1]
        [settling] = request.settling
        assert (request.limit, request.in_flight) == (1, {})
        [claimed] = found.leases
        assert claimed.delivery_id != settling
        # What is claimed is not begun before its slot is free: it is given back.
        await until(lambda: [row.token for row in storage._rows.values()].count(None) == 1)
        asked = len(storage.claims)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(transport.requests), len(storage.claims)) == (1, asked)  # nor claimed again and again
        storage.may_settle.set()
        await dispatcher.drain(timeout=5)
        assert sorted(request.url for request in transport.requests) == [f"{URL}/1", f"{URL}/2"]


async def test_a_delivery_that_was_cancelled_and_retried_in_flight_is_sent_again_when_its_late_result_is_refused(
    storage_url: str,
) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with Dispatcher(storage_url, transport=transport, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")
        await until(lambda: transport.requests)
        [delivery] = (await dispatcher.deliveries.list()).items
        await dispatcher.deliveries.cancel(delivery.id)
        await dispatcher.deliveries.retry(delivery.id)
        transport.release()
        [ended] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert (ended.state, len(transport.requests)) == (DeliveryState.SUCCEEDED, 2)


class _ByHand:
    """A transport whose requests are answered by hand, once it is told to."""

    def __init__(self) -> None:
        self.quick = True
        self.sent: list[str] = []
        self.asked: list[asyncio.Future[int]] = []

    async def send(self, request: Request) -> Response:
        if self.quick:
            return Response(200)
        self.sent.append(request.url.rpartition("/")[2])
        self.asked.append(asyncio.get_running_loop().create_future())
        return Response(await self.asked[-1])

    async def aclose(self) -> None:
        return


async def test_an_endpoint_that_proves_itself_makes_room_for_others_at_once(sqlite_url: str) -> None:
    transport = _ByHand()
    async with Dispatcher(sqlite_url, transport=transport, keys=[], concurrency=4, shutdown_timeout=0) as dispatcher:
        for name in ("a", "b", "c"):
            await dispatcher.endpoints.create(f"{URL}/{name}", events=[name])
        for _ in range(5):
            await dispatcher.emit("a")
            await dispatcher.drain()
        transport.quick = False
        for _ in range(3):
            await dispatcher.emit("a")
        await until(lambda: len(transport.asked) == 3)
        transport.asked[0].set_result(500)  # half of the four slots are for endpoints like this one
        await until(lambda: dispatcher._worker.in_flight == 2)
        await dispatcher.emit("b")
        await dispatcher.emit("c")
        transport.asked[1].set_result(200)
        await until(lambda: sorted(transport.sent[3:]) == ["b", "c"])


async def test_a_slot_is_taken_before_its_attempt_begins_even_where_tasks_begin_at_once(sqlite_url: str) -> None:
    loop = asyncio.get_running_loop()

    def eager(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Do what Python 3.12's eager tasks do: run to the first suspension, here and now."""
        if "_carry_out" not in getattr(coro, "__qualname__", ""):
            return asyncio.Task(coro, loop=loop, **options)
        try:
            waits_for = coro.send(None)
        except StopIteration:
            return asyncio.Task(asyncio.sleep(0), loop=loop, **options)
        return asyncio.Task(_resumed(coro, waits_for), loop=loop, **options)

    async def _resumed(coro: Any, future: Any) -> None:
        while True:
            future._asyncio_future_blocking = False
            try:
                await future
                future = coro.send(None)
            except StopIteration:
                return

    def unable(_: object) -> bytes:
        raise ValueError("cannot render")

    loop.set_task_factory(eager)
    try:
        profiles = {"default": Profile(envelope=unable)}
        async with Dispatcher(sqlite_url, transport=FakeTransport(), profiles=profiles, keys=[]) as dispatcher:
            await dispatcher.endpoints.create(URL, events=["*"])
            receipt = await dispatcher.emit("video.ready")
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
            assert delivery.state is DeliveryState.FAILED
            assert (await dispatcher.health()).state == "healthy"
    finally:
        loop.set_task_factory(None)


async def test_leases_that_were_not_begun_when_the_worker_was_cancelled_cost_nothing(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hookwright._pace.Pace.at_once", 1)

    def first_ends_the_services(request: Request) -> int:
        for task in asyncio.all_tasks():
            if task.get_name() == "hookwright-services":
                task.cancel()
        return 200

    dispatcher = Dispatcher(sqlite_url, transport=FakeTransport(first_ends_the_services), keys=[])
    await dispatcher.start()
    for number in range(10):
        await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
    await dispatcher.emit("video.ready")
    await until(lambda: not dispatcher.is_delivering)
    assert dispatcher._worker._waiting
    await dispatcher.aclose()
    async with Dispatcher(sqlite_url, transport=FakeTransport(), keys=[]) as successor:
        await successor.drain(timeout=5)
        rows = (await successor.deliveries.list()).items
    assert [(row.state, row.attempt_count) for row in rows] == [(DeliveryState.SUCCEEDED, 1)] * 10


class _LateToStore(MemoryStorage):
    """Wraps carelessly: it awaits something before it hands on."""

    async def enqueue(self, *arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.01)
        return await super().enqueue(*arguments, **options)


async def test_an_event_that_its_claim_overtook_is_looked_for_a_second_later() -> None:
    clock, transport = VirtualClock(), FakeTransport()
    async with Dispatcher(_LateToStore(), transport=transport, clock=clock, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        for _ in range(10):
            await asyncio.sleep(0)
        assert not transport.requests
        await clock.advance(1)
        await until(lambda: transport.requests)


class _Settling(MemoryStorage):
    """Keeps how many results each call wrote, and raises what `refuse` returns for their endpoints."""

    def __init__(self, refuse: Callable[[list[str]], Exception | None] = lambda endpoints: None) -> None:
        super().__init__()
        self.written: list[int] = []
        self._refuse = refuse

    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        endpoints = [outcome.endpoint_id for outcome in outcomes]
        refusal = self._refuse(endpoints)
        if refusal is not None:
            raise refusal
        self.written.append(len(outcomes))
        return await super().settle(outcomes, policy)


async def _answer_three_at_once(storage: _Settling, clock: Clock | None = None) -> list[DeliveryState]:
    """Return how deliveries to the endpoints 1, 2 and 3 ended that were answered in one turn of the loop."""
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with Dispatcher(storage, transport=transport, clock=clock, keys=[], shutdown_timeout=1) as dispatcher:
        for number in "123":
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == 3)
        transport.release()
        if isinstance(clock, VirtualClock):
            for _ in range(10):
                await asyncio.sleep(0)
            await clock.advance(1)
        await until(lambda: not dispatcher._worker.in_flight)
        return sorted(row.state for row in (await dispatcher.deliveries.list()).items)


async def test_results_of_one_turn_of_the_loop_are_written_together() -> None:
    storage = _Settling()
    assert await _answer_three_at_once(storage) == [DeliveryState.SUCCEEDED] * 3
    assert storage.written == [3]


async def test_a_result_that_cannot_be_written_keeps_no_other_from_being_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad: list[str] = []

    def refuse(endpoints: list[str]) -> ValueError | None:
        bad.extend(endpoints[:1] if not bad else [])
        return ValueError("a defect") if bad[0] in endpoints else None

    storage = _Settling(refuse)
    assert await _answer_three_at_once(storage) == [DeliveryState.PENDING, *[DeliveryState.SUCCEEDED] * 2]
    assert storage.written == [1, 1]
    assert [record.message for record in caplog.records if "could not be carried out" in record.message]


async def test_results_that_the_storage_cannot_take_together_are_written_one_by_one_or_a_second_later() -> None:
    refused: list[int] = []

    def refuse(endpoints: list[str]) -> StorageBusy | None:
        if len(endpoints) > 1 or refused.count(1) < 2:
            refused.append(len(endpoints))
            return StorageBusy("locked")
        return None

    storage = _Settling(refuse)
    assert await _answer_three_at_once(storage, VirtualClock()) == [DeliveryState.SUCCEEDED] * 3
    assert (refused, storage.written) == ([3, 1, 1], [1, 1, 1])


class _NotGivenBack(MemoryStorage):
    """Takes no lease back."""

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        raise StorageBusy("locked")


async def test_a_delivery_whose_lease_could_not_be_given_back_ends_with_its_endpoint_when_the_lease_does() -> None:
    clock = VirtualClock()
    transport = FakeTransport(Failure("local_error", "no descriptor is left"))
    async with Dispatcher(_NotGivenBack(), transport=transport, clock=clock, keys=[]) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], concurrency=2)
        receipts = []
        for seconds in (30, 29):
            receipts.append(await dispatcher.emit("video.ready"))
            await until(lambda: len(transport.requests) == len(receipts) and not dispatcher._worker.in_flight)
            await clock.advance(seconds)
        await dispatcher.endpoints.disable(endpoint.id)
        for receipt, seconds in zip(receipts, (1, 30), strict=True):  # each lease ends when it is 60 s old
            await clock.advance(seconds)
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
            assert delivery.state is DeliveryState.SKIPPED


@pytest.mark.parametrize("turns", range(8))
async def test_what_was_answered_before_a_shutdown_cancelled_it_is_written(turns: int, sqlite_url: str) -> None:
    may_answer, answered = asyncio.Event(), asyncio.Event()

    async def answer(request: Request) -> int:
        await may_answer.wait()
        answered.set()
        return 200

    transport = FakeTransport(answer)
    dispatcher = Dispatcher(sqlite_url, transport=transport, keys=[], shutdown_timeout=0)
    await dispatcher.start()
    await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.emit("video.ready")
    await until(lambda: transport.requests)
    closing = asyncio.ensure_future(dispatcher.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    may_answer.set()
    await closing
    assert dispatcher._worker.in_flight == 0
    async with Dispatcher(sqlite_url, transport=transport, keys=[], deliver=False) as reading:
        [row] = (await reading.deliveries.list()).items
        state = DeliveryState.SUCCEEDED if answered.is_set() else DeliveryState.PENDING
        assert (row.state, row.attempt_count) == (state, 1)


async def test_what_cannot_be_told_of_one_result_keeps_nobody_from_hearing_of_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(microseconds: int) -> None:
        raise OverflowError

    monkeypatch.setattr("hookwright._delivery.to_datetime", fails)  # of the time of a retry
    transport = FakeTransport()
    heard: list[object] = []
    async with Dispatcher("memory:", transport=transport, keys=[], shutdown_timeout=1) as dispatcher:
        dispatcher.observe(heard.append, DeliverySucceeded, LeaseLost)

        async def fail(request: Request) -> int:
            await transport.hang(request)
            return 500

        for number in "123":
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
            transport.respond(f"{URL}/{number}", fail if number == "1" else transport.hang)
        await dispatcher.emit("video.ready")
        await until(lambda: len(transport.requests) == 3)
        transport.release()
        await until(lambda: not dispatcher._worker.in_flight)
        await until(lambda: len(heard) == 2)
    assert [type(observation) for observation in heard] == [DeliverySucceeded] * 2
    assert [record.message for record in caplog.records if "could not be told" in record.message]


async def test_the_pace_counts_attempts_that_a_loop_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, now = Pace(64), 0.0
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        with pace.measured(10):
            now += 0.1
        await asyncio.sleep(0)
    assert pace.at_once < 10


async def test_a_writer_that_somebody_cancelled_is_followed_by_another() -> None:
    storage, transport = _SlowToSettle(), FakeTransport()
    transport.respond(f"{URL}/2", transport.hang)
    async with Dispatcher(storage, transport=transport, keys=[], shutdown_timeout=1) as dispatcher:
        for number in "12":
            await dispatcher.endpoints.create(f"{URL}/{number}", events=[f"e{number}"])
        await dispatcher.emit("e1")
        receipt = await dispatcher.emit("e2")
        await storage.settling.wait()
        [writing] = dispatcher._worker._writing
        transport.release()
        await until(lambda: dispatcher._worker._attempted)
        writing.cancel()
        storage.may_settle.set()
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.state is DeliveryState.SUCCEEDED


async def test_a_result_that_the_storage_never_takes_keeps_no_later_one_from_being_written() -> None:
    bad: list[str] = []

    def refuse(endpoints: list[str]) -> StorageBusy | None:
        bad.extend(endpoints if not bad else [])
        return StorageBusy("locked") if bad[0] in endpoints else None

    clock, transport = VirtualClock(), FakeTransport()
    async with Dispatcher(
        _Settling(refuse), transport=transport, clock=clock, keys=[], shutdown_timeout=0
    ) as dispatcher:
        for number in "12":
            await dispatcher.endpoints.create(f"{URL}/{number}", events=[f"e{number}"])
        await dispatcher.emit("e1")
        await until(lambda: dispatcher._deliverer._unwritten)
        receipt = await dispatcher.emit("e2")
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert (delivery.state, dispatcher._worker.in_flight) == (DeliveryState.SUCCEEDED, 1)
