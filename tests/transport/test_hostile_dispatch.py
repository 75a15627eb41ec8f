"""Every hostile receiver at once, behind a dispatcher: one attempt each, recorded as it ended, and nobody waits."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    Delivery,
    DeliveryState,
    DirectTransport,
    Dispatcher,
    EndpointState,
    HttpxTransport,
    NetworkPolicy,
    Profile,
    RetryPolicy,
    Timeouts,
)
from hookwright.testing._transport_contract_base import Said, deaf, good, loopback, receiving, serving, trusting
from hookwright.testing._transport_contract_endings import ANSWERS, ENDINGS
from hookwright.testing._transport_contract_floods import FLOODS
from hookwright.testing._transport_contract_framing import HEADS, LENGTHS
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hookwright import Attempt
    from hookwright.testing._transport_contract_base import Row

LOCAL = NetworkPolicy.development()
ONCE = Profile(retry=RetryPolicy.schedule(0, 3600), timeouts=Timeouts(total=8.0, connect=8.0, dns=1.0))
ROWS = [row for row in (*ENDINGS, *ANSWERS, *FLOODS, *LENGTHS, *HEADS) if not row.bare]
BOTH = pytest.mark.parametrize("kind", [HttpxTransport, DirectTransport])


@asynccontextmanager
async def dispatching(kind: type[HttpxTransport | DirectTransport], path: Path, **options: Any) -> AsyncIterator[Any]:
    transport = kind(ssl_context=trusting(), resolver=loopback)
    profiles = {"default": options.pop("profile", ONCE)}
    async with Dispatcher(
        f"sqlite:///{path / 'hooks.db'}",
        transport=transport,
        network=LOCAL,
        profiles=profiles,
        shutdown_timeout=0.5,
        keys=[],
        **options,
    ) as dispatcher:
        yield dispatcher


def fits(attempt: Attempt, row: Row) -> bool:
    """Whether the attempt ended as the row says. With us, interim answers without end end by the deadline."""
    if row.name.startswith(("endless 1", "drips interim")):
        return attempt.error == "timeout"
    return any(_is(attempt, expected) for expected in row.expected)


def _is(attempt: Attempt, expected: str | Said) -> bool:
    if not isinstance(expected, Said):
        return attempt.error == expected
    code = None if attempt.status is not None and 200 <= attempt.status < 300 else "http_status"
    truncated = expected.truncated in {None, attempt.response_truncated}
    return (attempt.status, attempt.error) == (expected.status, code) and truncated


@BOTH
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_each_hostile_receiver_costs_one_attempt_and_delays_nobody(
    kind: type[HttpxTransport | DirectTransport], scheme: str, tmp_path: Path
) -> None:
    context = serving() if scheme == "https" else None
    async with dispatching(kind, tmp_path) as dispatcher, AsyncExitStack() as stack:
        healthy = await stack.enter_async_context(receiving(good))
        by_endpoint: dict[str, Row] = {}
        for row in ROWS:
            receiver = await stack.enter_async_context(receiving(row.answer, context))
            timeout = max(10.0, row.changes.get("total_timeout", 0.0))  # a hundred others are at work
            endpoint = await dispatcher.endpoints.create(receiver.url(), events=["*"], timeout=timeout)
            by_endpoint[endpoint.id] = row
        well = await dispatcher.endpoints.create(healthy.url("127.0.0.1"), events=["*"])
        receipt = await dispatcher.emit("video.processed", {"text": "x" * 1000})

        async def tried(endpoint_id: str) -> Delivery | None:
            found = await dispatcher.deliveries.list(event_id=receipt.event_id, endpoint_id=endpoint_id)
            return next((delivery for delivery in found if delivery.attempt_count), None)

        await until(lambda: tried(well.id))
        wrong = []
        for endpoint_id, row in by_endpoint.items():
            await until(lambda endpoint_id=endpoint_id: tried(endpoint_id), timeout=30)
            delivery = await tried(endpoint_id)
            assert delivery is not None
            attempts = await dispatcher.deliveries.attempts(delivery.id)
            if len(attempts) != 1 or not fits(attempts[0], row):
                wrong.append(
                    (row.name, row.expected[0], [(a.status, a.error, a.detail, a.response_truncated) for a in attempts])
                )
        assert wrong == []


@BOTH
async def test_work_that_was_done_but_not_acknowledged_comes_again_with_the_same_id(
    kind: type[HttpxTransport | DirectTransport], tmp_path: Path
) -> None:
    soon = Profile(retry=RetryPolicy.schedule(0, 0), timeouts=Timeouts(total=0.3, connect=0.3, dns=0.3))
    async with receiving(deaf) as receiver, dispatching(kind, tmp_path, profile=soon) as dispatcher:
        await dispatcher.endpoints.create(receiver.url(), events=["*"])
        await dispatcher.emit("video.processed", {})
        peer = await receiver.arrived.get()
        receiver.turn_good()
        del peer
        await until(lambda: len(receiver.requests) == 2)
        first, second = (
            {line for line in request.lower().split(b"\r\n") if line.startswith(b"webhook-id:")}
            for request in receiver.requests
        )
        assert first == second != set()


@BOTH
async def test_a_thousand_endpoints_that_hang_on_one_address_hold_half_the_slots(
    kind: type[HttpxTransport | DirectTransport], tmp_path: Path
) -> None:
    async with (
        receiving(deaf) as hanging,
        receiving(good) as healthy,
        dispatching(kind, tmp_path, concurrency=32) as dispatcher,
    ):
        well = await dispatcher.endpoints.create(healthy.url("127.0.0.1"), events=["good"])
        await dispatcher.emit("good")  # it has answered once, as in a process that has run for a while
        await dispatcher.drain()
        for number in range(1000):
            await dispatcher.endpoints.create(f"{hanging.url('127.0.0.1')}&n={number}", events=["bad"])
        await dispatcher.emit("bad")
        await until(lambda: hanging.open == 16)
        for _ in range(5):
            receipt = await dispatcher.emit("good")
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
            assert delivery.endpoint_id == well.id
            assert delivery.state is DeliveryState.SUCCEEDED
        assert hanging.open <= 16


@BOTH
async def test_an_endpoint_that_is_gone_is_asked_once(
    kind: type[HttpxTransport | DirectTransport], tmp_path: Path
) -> None:
    gone = next(row for row in ANSWERS if row.name == "410")
    async with receiving(gone.answer) as receiver, dispatching(kind, tmp_path) as dispatcher:
        endpoint = await dispatcher.endpoints.create(receiver.url(), events=["*"])
        receipts = await asyncio.gather(*(dispatcher.emit("video.processed", number) for number in range(20)))
        for receipt in receipts:
            await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        assert (await dispatcher.endpoints.get(endpoint.id)).state is EndpointState.DISABLED
        assert len(receiver.requests) == 1
        assert await dispatcher.deliveries.count(status=DeliveryState.SKIPPED) == 19
