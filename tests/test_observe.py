"""Observers: in order, after the fact, and without any power over a delivery."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import pytest

from hookwright import (
    ConfigurationError,
    DeliveryFailed,
    DeliveryObservation,
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    EndpointDisabled,
    EventEmitted,
    Observation,
)
from hookwright.testing import FakeTransport
from tests.conftest import URL, until


async def test_a_base_class_hears_its_children() -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        everything: list[Any] = []
        deliveries: list[Any] = []
        successes: list[Any] = []
        dispatcher.observe(everything.append)
        dispatcher.observe(deliveries.append, DeliveryObservation)

        @dispatcher.on(DeliverySucceeded, DeliveryFailed)
        def note(observation: Observation) -> None:
            successes.append(observation)

        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        names = [type(observation).__name__ for observation in everything]
        assert names == ["EventEmitted", "AttemptStarted", "DeliverySucceeded"]
        assert deliveries == everything[1:]
        assert successes == everything[2:]


async def test_an_observer_hears_only_of_what_is_stored() -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        states: list[DeliveryState] = []

        @dispatcher.on(DeliverySucceeded)
        async def look(observation: DeliverySucceeded) -> None:
            states.append((await dispatcher.deliveries.get(observation.delivery_id)).state)

        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
    assert states == [DeliveryState.SUCCEEDED]


async def test_what_observers_raise_changes_nothing_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:

        @dispatcher.on(Observation)
        def sync_observer(observation: Observation) -> None:
            raise RuntimeError("mine")

        @dispatcher.on(Observation)
        async def async_observer(observation: Observation) -> None:
            raise RuntimeError("mine too")

        await dispatcher.endpoints.create(URL, events=["*"])
        for _ in range(3):
            await dispatcher.emit("video.ready")
        await dispatcher.drain()
        assert await dispatcher.deliveries.count(status=DeliveryState.SUCCEEDED) == 3
    assert caplog.text.count("sync_observer raised") == 2  # one of them is called a-sync_observer
    assert caplog.text.count("async_observer raised") == 1


async def test_a_slow_async_observer_slows_nobody_sees_things_in_order_and_counts_what_it_lost() -> None:
    gate = asyncio.Event()
    seen: list[str] = []

    class Slow:
        async def __call__(self, observation: EventEmitted) -> None:
            await gate.wait()
            seen.append(observation.event_id)

    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        slow = dispatcher.observe(Slow(), EventEmitted)
        ids = [(await dispatcher.emit("video.ready")).event_id for _ in range(1005)]
        assert slow.dropped == 5
        assert "dropped=5" in repr(slow)
        gate.set()
    assert seen == ids[:1000]


async def test_an_observer_that_hangs_delays_the_end_by_a_second_at_most() -> None:
    hung = asyncio.Event()

    async def hang(observation: Observation) -> None:
        hung.set()
        await asyncio.Event().wait()

    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        dispatcher.observe(hang)
        await dispatcher.emit("video.ready")
        await hung.wait()
        begin = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begin < 2


async def test_a_closed_subscription_hears_nothing_more() -> None:
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        heard: list[Any] = []

        async def note(observation: Observation) -> None:
            heard.append(observation)

        subscription = dispatcher.observe(note, EventEmitted)
        await dispatcher.emit("video.ready")
        while not heard:
            await asyncio.sleep(0)
        await subscription.aclose()
        await subscription.aclose()
        await dispatcher.emit("video.ready")
    assert len(heard) == 1


async def test_an_observer_that_closes_itself_or_is_deaf_to_its_end_ends_quietly() -> None:
    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: raised.append(what))
    heard, end = [0, 0], asyncio.Event()

    async def closes_itself(observation: Observation) -> None:
        heard[0] += 1
        await itself.aclose()

    async def deaf(observation: Observation) -> None:
        heard[1] += 1
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()

    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        itself = dispatcher.observe(closes_itself)
        dispatcher.observe(deaf)
        await dispatcher.emit("video.ready")
        await dispatcher.emit("video.ready")
        await until(lambda: all(heard))
    end.set()
    await until(lambda: not [task for task in asyncio.all_tasks() if "hookwright-observer" in task.get_name()])
    gc.collect()
    assert heard == [1, 1]
    assert not raised


@pytest.mark.parametrize(("function", "kinds"), [("print", ()), (print, (str,)), (print, ("DeliveryFailed",))])
def test_what_is_no_observer_or_no_observation_is_refused(function: Any, kinds: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"observer|Observation"):
        Dispatcher("memory:").observe(function, *kinds)


def test_an_observation_is_a_value() -> None:
    one = EndpointDisabled(endpoint_id="ep_1", reason="gone")
    assert one == EndpointDisabled(endpoint_id="ep_1", reason="gone")
    assert len({one, EndpointDisabled(endpoint_id="ep_1", reason="gone")}) == 1
    assert one != EndpointDisabled(endpoint_id="ep_1", reason=None)
    assert one != "ep_1"
    assert vars(one) == {"endpoint_id": "ep_1", "reason": "gone"}
    assert repr(one) == "EndpointDisabled(endpoint_id='ep_1', reason='gone')"
    with pytest.raises(AttributeError, match="cannot be changed"):
        one.reason = "other"  # type: ignore[misc]  # that is what is tested
