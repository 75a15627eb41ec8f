"""Arguments of the wrong kind are refused at once, with what would be right; and small conveniences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    ALL_TENANTS,
    ConfigurationError,
    Dispatcher,
    NetworkPolicy,
    NewEvent,
    NotFound,
    Profile,
    Response,
    RetryPolicy,
    ValidationFailed,
)
from hookwright.testing import FakeTransport, Inbox, VirtualClock
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
async def dispatcher(storage_url: str, transport: FakeTransport) -> AsyncIterator[Dispatcher]:
    async with Dispatcher(storage_url, transport=transport, shutdown_timeout=0) as dispatcher:
        yield dispatcher


async def test_an_object_in_place_of_its_id_is_refused(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("a")
    given: Any = endpoint
    for call in (
        lambda: dispatcher.endpoints.get(given),
        lambda: dispatcher.endpoints.pause(given),
        lambda: dispatcher.deliveries.get(given),
        lambda: dispatcher.deliveries.list(endpoint_id=given),
        lambda: dispatcher.events.get(given),
        lambda: dispatcher.emit("a", endpoint_id=given),
    ):
        with pytest.raises(ValidationFailed, match=r"must be text, such as an `\.id`, not Endpoint"):
            await call()
    other: Any = receipt
    with pytest.raises(ValidationFailed, match="not Receipt"):
        await dispatcher.deliveries.wait(other)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.emit("a", tenant=ALL_TENANTS),
        lambda d: d.emit_many([NewEvent("a", tenant=ALL_TENANTS)]),
        lambda d: d.explain("a", tenant=ALL_TENANTS),
    ],
)
async def test_an_event_of_all_tenants_is_refused(
    dispatcher: Dispatcher, call: Callable[[Dispatcher], Awaitable[object]]
) -> None:
    with pytest.raises(ValidationFailed, match=r"tenant: ALL_TENANTS .* an event is of one tenant, or of None"):
        await call(dispatcher)


async def test_who_reads_what_is_every_tenants_is_told_to_give_none(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"], tenant=ALL_TENANTS)
    receipt = await dispatcher.emit("a")
    [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
    for call in (
        lambda: dispatcher.endpoints.list(tenant=ALL_TENANTS),
        lambda: dispatcher.endpoints.pause(endpoint.id, tenant=ALL_TENANTS),
        lambda: dispatcher.deliveries.list(tenant=ALL_TENANTS),
        lambda: dispatcher.deliveries.count(tenant=ALL_TENANTS),
        lambda: dispatcher.deliveries.get(delivery.id, tenant=ALL_TENANTS),
        lambda: dispatcher.deliveries.wait(receipt.event_id, tenant=ALL_TENANTS),
        lambda: dispatcher.events.get(receipt.event_id, tenant=ALL_TENANTS),
    ):
        with pytest.raises(ValidationFailed, match=r"tenant: ALL_TENANTS .* read every tenant's, give None"):
            await call()


async def test_a_tenant_called_like_the_value_of_all_tenants_is_one_like_any_other(dispatcher: Dispatcher) -> None:
    everyones = await dispatcher.endpoints.create(URL, events=["*"], tenant=ALL_TENANTS)
    own = await dispatcher.endpoints.create(URL, events=["*"], tenant="*")
    assert [endpoint.id for endpoint in await dispatcher.endpoints.list(tenant="*")] == [own.id]
    with pytest.raises(NotFound):
        await dispatcher.endpoints.delete(everyones.id, tenant="*")
    assert (await dispatcher.endpoints.get(own.id, tenant="*")).tenant == "*"
    assert (await dispatcher.emit("a", tenant="*")).delivery_count == 2
    assert (await dispatcher.emit("a", tenant="t")).delivery_count == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"events": "order.*"}, r"not one text: \['order\.\*'\]"),
        ({"events": 5}, "list of at least one"),
        ({"filters": ["a"]}, "must be a mapping"),
        ({"headers": ["a"]}, "must be a mapping"),
        ({"timeout": "5"}, "timeout: must be more than 0"),
        ({"timeout": True}, "timeout"),
    ],
)
async def test_fields_of_the_wrong_kind_are_refused(dispatcher: Dispatcher, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationFailed, match=says):
        await dispatcher.endpoints.create(**{"url": URL, "events": ["*"]} | options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Dispatcher("memory:", network="dev"), "network: must be a NetworkPolicy"),  # type: ignore[arg-type]
        (lambda: Dispatcher("memory:", clock=5), "clock: must be a Clock"),  # type: ignore[arg-type]
        (lambda: Dispatcher("memory:", transport=5), "transport: must be a Transport"),  # type: ignore[arg-type]
        (lambda: Dispatcher("memory:", retention=30), "retention: must be a timedelta"),  # type: ignore[arg-type]
        (lambda: Dispatcher("memory:", profiles=[Profile()]), "profiles: must be a Mapping"),  # type: ignore[arg-type]
        (lambda: Dispatcher("memory:", profiles={"half \ud800": Profile()}), "is no name: give printable text"),
        (lambda: Dispatcher("memory:", profiles={"x": 5}), "'x' must be a Profile"),  # type: ignore[dict-item]
        (lambda: Dispatcher("memory:").on(print), r"@dispatcher\.on\(\)"),  # type: ignore[arg-type]
        (lambda: Profile(retry=[1, 2]), "retry: give"),  # type: ignore[arg-type]
        (lambda: Profile(timeouts=5), "timeouts: give"),  # type: ignore[arg-type]
        (lambda: RetryPolicy.schedule([0, 1]), "numbers of seconds"),  # type: ignore[arg-type]
    ],
)
def test_parts_of_the_wrong_kind_are_refused_at_once(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


async def test_an_inbox_can_live_in_the_dispatchers_time(clock: VirtualClock) -> None:
    network = NetworkPolicy.development()
    async with Inbox(clock=clock) as inbox, Dispatcher("memory:", clock=clock, network=network) as dispatcher:
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["*"])
        inbox.expect(endpoint.secret)
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        assert [received.verified for received in inbox.received] == [True]


async def test_answers_read_as_text_and_pages_iterate(dispatcher: Dispatcher, transport: FakeTransport) -> None:
    transport.respond("https://RECEIVER.example/hooks", Response(200, body=b"\xff ok"))
    await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.emit("a")
    await dispatcher.drain(timeout=5)
    page = await dispatcher.deliveries.list()
    assert len(page) == 1
    for delivery in page:
        [attempt] = await dispatcher.deliveries.attempts(delivery.id)
        assert attempt.response_text == "\ufffd ok"
