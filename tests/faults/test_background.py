"""What runs in the background dies, is cancelled, or is watched by observers that misbehave."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from hookwright import (
    DeliveryFailed,
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    MemoryStorage,
    Observation,
    StorageClosed,
    WaitTimeout,
    WorkerFailed,
)
from hookwright._services import DEATHS
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright._models import Claim
    from hookwright.storage._base import ClaimRequest


class Defect(Exception):
    """What no part of ours means to raise."""


def _dying(monkeypatch: pytest.MonkeyPatch, dispatcher: Dispatcher, times: int) -> list[int]:
    """Let the worker's loop die so many times, as a defect in it would make it."""
    left, sleep = [times], dispatcher._worker._sleep

    async def dies(delay: float | None) -> None:
        if left[0]:
            left[0] -= 1
            raise Defect("injected")
        await sleep(delay)

    monkeypatch.setattr(dispatcher._worker, "_sleep", dies)
    return left


async def test_a_worker_that_dies_is_begun_again_and_says_so(
    monkeypatch: pytest.MonkeyPatch, storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, told = VirtualClock(), list[WorkerFailed]()
    async with Dispatcher(storage_url, transport=FakeTransport(), clock=clock) as dispatcher:
        dispatcher.observe(told.append, WorkerFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.drain()
        _dying(monkeypatch, dispatcher, 1)
        await dispatcher.emit("video.ready")
        await until(lambda: told)
        health = await dispatcher.health()
        assert (health.state, health.problems) == (
            "degraded",
            ("delivering died and is begun again: Defect: injected",),
        )
        assert (told[0].error, told[0].retry_in) == ("delivering: Defect: injected", 1.0)
        await dispatcher.emit("video.ready")
        await clock.advance(1)
        await dispatcher.drain()
        assert await dispatcher.deliveries.count(status="succeeded") == 2
        await clock.advance(61)
        assert (await dispatcher.health()).state == "healthy"
    assert "delivering died" in caplog.text


async def test_a_worker_that_dies_five_times_in_a_minute_is_a_failed_dispatcher_that_still_tries(
    monkeypatch: pytest.MonkeyPatch, storage_url: str
) -> None:
    clock = VirtualClock()
    async with Dispatcher(storage_url, transport=FakeTransport(), clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.drain()
        left = _dying(monkeypatch, dispatcher, DEATHS + 1)
        receipt = await dispatcher.emit("video.ready")
        states: list[str] = []
        for _ in range(DEATHS):
            await until(lambda: left[0] <= DEATHS - len(states))
            await clock.advance(0)
            states.append((await dispatcher.health()).state)
            await clock.advance(1)
        assert states == ["degraded"] * (DEATHS - 1) + ["failed"]
        await dispatcher.emit("video.ready")  # events are still accepted
        await clock.advance(60)
        await until(lambda: not left[0])  # one more death
        await clock.advance(0)
        assert (await dispatcher.health()).state == "failed"
        await clock.advance(60)
        await dispatcher.drain()
        assert [row.state for row in await dispatcher.deliveries.wait(receipt.event_id)] == [DeliveryState.SUCCEEDED]
        assert (await dispatcher.health()).state == "failed"  # until it has lived for a minute
        await clock.advance(60)
        assert (await dispatcher.health()).state == "healthy"


async def test_another_service_that_dies_stops_no_delivery(monkeypatch: pytest.MonkeyPatch, storage_url: str) -> None:
    clock = VirtualClock()
    async with Dispatcher(storage_url, transport=FakeTransport(), clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await clock.advance(1)

        def dies() -> None:
            raise Defect("injected")

        with monkeypatch.context() as patch:
            patch.setattr(dispatcher._services, "_on_swept", dies)
            await dispatcher.endpoints.disable(endpoint.id)

            async def is_told() -> bool:
                return any("sweeping died" in problem for problem in (await dispatcher.health()).problems)

            await until(is_told)
        await dispatcher.endpoints.enable(endpoint.id)
        receipt = await dispatcher.emit("video.ready")
        await clock.advance(0, settle=dispatcher.drain)
        assert [row.state for row in await dispatcher.deliveries.wait(receipt.event_id)] == [DeliveryState.SUCCEEDED]


async def test_whoever_cancels_all_tasks_of_the_loop_gets_errors_and_no_silence(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hooks.db'}"
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    dispatcher = Dispatcher(url, transport=transport, shutdown_timeout=0)
    await dispatcher.start()
    await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("video.ready")
    await until(lambda: transport.requests)
    ours = asyncio.current_task()
    for task in asyncio.all_tasks():
        if task is not ours:
            task.cancel()
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        with pytest.raises(StorageClosed):
            await dispatcher.emit("video.ready")
        await until(lambda: not dispatcher.is_delivering)  # the tasks end one after the other
        health = await dispatcher.health()
        assert health.state == "failed"
        assert "the background tasks have ended: create a new dispatcher" in health.problems
        await dispatcher.aclose()
    async with Dispatcher(url, transport=FakeTransport()) as successor:
        assert successor.is_delivering
        [delivery] = await successor.deliveries.wait(receipt.event_id, timeout=5)
        assert (delivery.state, delivery.attempt_count) == (DeliveryState.SUCCEEDED, 2)


async def test_what_waits_for_a_storage_whose_task_is_cancelled_is_told(sqlite_url: str) -> None:
    dispatcher = Dispatcher(sqlite_url, transport=FakeTransport(), deliver=False)
    await dispatcher.start()
    [owner] = [task for task in asyncio.all_tasks() if task.get_name() == "hookwright-sqlite-owner"]
    emits = [asyncio.create_task(dispatcher.emit("video.ready")) for _ in range(3)]
    await asyncio.sleep(0)
    owner.cancel()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*emits, return_exceptions=True)
    assert [type(answer) for answer in answers] == [StorageClosed] * 3
    assert (await dispatcher.health()).state == "failed"
    await dispatcher.aclose()


async def test_a_service_alone_that_is_cancelled_leaves_nothing_running_after_the_end(tmp_path: Path) -> None:
    url, transport = f"sqlite:///{tmp_path / 'hooks.db'}", FakeTransport()
    transport.respond(URL, transport.hang)
    dispatcher = Dispatcher(url, transport=transport, shutdown_timeout=0)
    await dispatcher.start()
    await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.emit("video.ready")
    await until(lambda: transport.requests)
    before = asyncio.all_tasks()
    [services] = [task for task in before if task.get_name() == "hookwright-services"]
    services.cancel()
    await asyncio.wait({services})
    assert (await dispatcher.health()).state == "failed"
    await dispatcher.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with Dispatcher(url, transport=FakeTransport()) as successor:
        await successor.drain()
        [row] = await successor.deliveries.list()
        assert (row.state, row.attempt_count) == (DeliveryState.SUCCEEDED, 2)


async def test_a_cancellation_that_comes_out_of_the_storage_is_a_death_like_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    claim, left = storage.claim, [asyncio.CancelledError()]

    async def cancelled(request: ClaimRequest) -> Claim:
        if left:
            raise left.pop()
        return await claim(request)

    async with Dispatcher(storage, transport=FakeTransport(), clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.drain()
        monkeypatch.setattr(storage, "claim", cancelled)
        await dispatcher.emit("video.ready")
        await clock.advance(0)
        assert (await dispatcher.health()).state == "degraded"
        await clock.advance(1)
        await dispatcher.drain()
        assert await dispatcher.deliveries.count(status="succeeded") == 1


async def test_a_storage_that_closes_under_the_worker_is_a_failed_dispatcher_for_as_long_as_it_lasts() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with Dispatcher(storage, transport=FakeTransport(), clock=clock) as dispatcher:
        await dispatcher.drain()
        await storage.close()
        with pytest.raises(StorageClosed):
            await dispatcher.emit("video.ready")
        await clock.advance(3600)
        assert (await dispatcher.health()).state == "failed"


async def test_a_drain_that_the_end_overtakes_says_so(storage_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with Dispatcher(storage_url, transport=transport, shutdown_timeout=0) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        draining = asyncio.create_task(dispatcher.drain())
        await until(lambda: transport.requests)
    with pytest.raises(WaitTimeout, match="was closed"):
        await draining


class Watchers:
    """Observers as they should not be."""

    def __init__(self) -> None:
        self.mutations: list[Exception] = []
        self.heard_at_last = asyncio.Event()

    def raises(self, observation: Observation) -> None:
        raise Defect("injected")

    async def raises_later(self, observation: Observation) -> None:
        await asyncio.sleep(0)
        raise Defect("injected")

    async def hangs(self, observation: Observation) -> None:
        await asyncio.Event().wait()

    def mutates(self, observation: Observation) -> None:
        for name in list(vars(observation)):
            try:
                setattr(observation, name, "changed")
            except AttributeError as error:
                self.mutations.append(error)

    async def is_deaf(self, observation: Observation) -> None:
        while not self.heard_at_last.is_set():
            with suppress(asyncio.CancelledError):
                await self.heard_at_last.wait()


async def test_observers_that_raise_hang_or_mutate_change_no_delivery(
    storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    watchers, heard = Watchers(), list[Observation]()
    transport = FakeTransport([500, 200])
    async with Dispatcher(storage_url, transport=transport, clock=VirtualClock()) as dispatcher:
        for watcher in (watchers.raises, watchers.raises_later, watchers.hangs, watchers.mutates):
            dispatcher.observe(watcher)
        dispatcher.observe(heard.append, DeliverySucceeded, DeliveryFailed)
        await dispatcher.endpoints.create(URL, events=["*"])
        for number in range(20):
            await dispatcher.emit("video.ready", number)
        await dispatcher.drain()
        assert await dispatcher.deliveries.count(status="succeeded") == 19
        assert len(heard) == 19
        assert all(one.event_type == "video.ready" for one in heard if isinstance(one, DeliverySucceeded))
        assert watchers.mutations
        assert (await dispatcher.health()).state == "healthy"
    assert caplog.text.count("Watchers.raises raised") == 1


async def test_an_observer_that_cannot_be_cancelled_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    loop, watchers = asyncio.get_running_loop(), Watchers()
    with caplog.at_level(logging.WARNING, "hookwright"):
        async with Dispatcher(MemoryStorage(), transport=FakeTransport(), keys=[]) as dispatcher:
            dispatcher.observe(watchers.is_deaf)
            await dispatcher.endpoints.create(URL, events=["*"])
            await dispatcher.emit("video.ready")
            await dispatcher.drain()
            begun = loop.time()
        assert loop.time() - begun < 2
    watchers.heard_at_last.set()
    assert "is_deaf did not end" in caplog.text
