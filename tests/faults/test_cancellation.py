"""A caller that is cancelled at its n-th suspension, for every n: all or nothing, and everybody else goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import DeliveryState, Dispatcher, EndpointState, NewEvent
from hookwright.testing import FakeTransport
from hookwright.testing._storage_contract_base import CancelledAt
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Verb = Callable[[Dispatcher, str, str], Coroutine[Any, Any, object]]

VERBS: dict[str, Verb] = {
    "emit": lambda d, _, __: d.emit("video.ready", event_id="evt_x"),
    "emit to one": lambda d, endpoint, _: d.emit("video.ready", event_id="evt_x", endpoint_id=endpoint),
    "emit_many": lambda d, _, __: d.emit_many([NewEvent("video.ready", event_id="evt_x"), NewEvent("video.ready")]),
    "explain": lambda d, _, __: d.explain("video.ready"),
    "create": lambda d, _, __: d.endpoints.create(f"{URL}/new", events=["*"]),
    "update": lambda d, endpoint, _: d.endpoints.update(endpoint, name="new"),
    "rotate_secret": lambda d, endpoint, _: d.endpoints.rotate_secret(endpoint),
    "pause": lambda d, endpoint, _: d.endpoints.pause(endpoint),
    "disable": lambda d, endpoint, _: d.endpoints.disable(endpoint),
    "delete": lambda d, endpoint, _: d.endpoints.delete(endpoint),
    "test": lambda d, endpoint, _: d.endpoints.test(endpoint),
    "retry": lambda d, _, delivery: d.deliveries.retry(delivery, force=True),
    "cancel": lambda d, _, delivery: d.deliveries.cancel(delivery),
    "replay": lambda d, endpoint, _: d.deliveries.replay(endpoint_id=endpoint, status="succeeded"),
    "list": lambda d, _, __: d.deliveries.list(),
    "attempts": lambda d, _, delivery: d.deliveries.attempts(delivery),
    "wait": lambda d, _, __: d.deliveries.wait("evt_first", timeout=5),
    "drain": lambda d, _, __: d.drain(timeout=5),
    "health": lambda d, _, __: d.health(),
}


@pytest.mark.parametrize("name", VERBS)
async def test_a_verb_that_is_cancelled_at_any_suspension_is_done_whole_or_not_at_all(
    tmp_path: Path, name: str
) -> None:
    number, reached = 0, True
    while reached:
        transport = FakeTransport()
        async with (
            asyncio.timeout(20),
            Dispatcher(f"sqlite:///{tmp_path / f'{number}.db'}", transport=transport) as dispatcher,
        ):
            endpoint = await dispatcher.endpoints.create(URL, events=["*"])
            await dispatcher.endpoints.create(f"{URL}/other", events=["*"])
            await dispatcher.emit("video.ready", event_id="evt_first")
            await dispatcher.drain()
            first = next(iter(await dispatcher.deliveries.list()))
            try:
                reached = await CancelledAt(VERBS[name](dispatcher, endpoint.id, first.id), number).run()
            except Exception:  # noqa: BLE001  # it ran to its own refusal: a delivery that ended cannot be cancelled
                reached = False
            await dispatcher.drain()
            await _is_whole(dispatcher)
        number += 1
    assert number >= 2


async def _is_whole(dispatcher: Dispatcher) -> None:
    """Everything that is stored has ended, with all its rows, and the dispatcher goes on."""
    rows = list(await dispatcher.deliveries.list(limit=100))
    stored = [row for row in rows if row.event_id == "evt_x"]
    assert len(stored) in (0, 1, 2)
    states = [endpoint.state for endpoint in await dispatcher.endpoints.list()]
    again = await dispatcher.emit("video.ready", event_id="evt_x2")
    assert again.delivery_count == len(states) - states.count(EndpointState.DISABLED)
    await dispatcher.drain()
    sent = [row.state for row in await dispatcher.deliveries.list(event_id="evt_x2")]
    assert sent.count(DeliveryState.SUCCEEDED) == states.count(EndpointState.ACTIVE)
    assert (await dispatcher.health()).state == "healthy"


async def test_a_start_that_is_cancelled_at_any_suspension_can_be_begun_again(tmp_path: Path) -> None:
    number, reached = 0, True
    while reached:
        path = tmp_path / f"{number}.db"
        dispatcher = Dispatcher(f"sqlite:///{path}", transport=FakeTransport())
        async with asyncio.timeout(20):
            reached = await CancelledAt(dispatcher.start(), number).run()
            if reached:
                await dispatcher.start()
            await dispatcher.emit("video.ready")
            await dispatcher.aclose()
        number += 1
    assert number > 3


async def test_an_aclose_that_is_cancelled_at_any_suspension_goes_on_and_lets_go_of_everything(tmp_path: Path) -> None:
    number, reached = 0, True
    while reached:
        url, transport = f"sqlite:///{tmp_path / f'{number}.db'}", FakeTransport()
        transport.respond(URL, transport.hang)
        dispatcher = Dispatcher(url, transport=transport, shutdown_timeout=0)
        async with asyncio.timeout(20):
            await dispatcher.start()
            await dispatcher.endpoints.create(URL, events=["*"])
            await dispatcher.emit("video.ready")
            reached = await CancelledAt(dispatcher.aclose(), number).run()
            await dispatcher.aclose()
            async with Dispatcher(url, transport=FakeTransport()) as successor:
                assert successor.is_delivering
                await successor.drain()
                assert await successor.deliveries.count(status="succeeded") == 1
        number += 1


@pytest.mark.parametrize("step", ["attempt", "settle"])
async def test_cancelling_a_delivery_at_any_suspension_loses_and_repeats_no_result(step: str, tmp_path: Path) -> None:
    """As a defect or a stranger would: the lease ends by itself, and the next process takes it over at once."""
    number, reached = 0, True
    while reached:
        url, transport = f"sqlite:///{tmp_path / f'{number}.db'}", FakeTransport()
        async with asyncio.timeout(20), Dispatcher(url, transport=transport, shutdown_timeout=0) as dispatcher:
            await dispatcher.endpoints.create(URL, events=["*"])
            carry_out = getattr(dispatcher._deliverer, step)
            cancelled: list[bool] = []

            async def strange(given: Any, number: int = number, carry_out: Any = carry_out) -> Any:
                driver = CancelledAt(carry_out(given), number)
                try:
                    return await driver
                finally:
                    cancelled.append(driver.reached)  # noqa: B023

            setattr(dispatcher._deliverer, step, strange)  # cancels at its n-th suspension
            await dispatcher.emit("video.ready", event_id="evt_x")
            while not cancelled:
                await asyncio.sleep(0.001)
            reached = cancelled[0]
        async with asyncio.timeout(20), Dispatcher(url, transport=transport) as successor:
            await successor.drain()
            [row] = await successor.deliveries.list(event_id="evt_x")
            assert row.state is DeliveryState.SUCCEEDED
            assert len(await successor.deliveries.attempts(row.id)) == row.attempt_count
            assert len(transport.requests) <= row.attempt_count <= 2
        number += 1
