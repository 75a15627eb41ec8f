"""No secret, header value, url token or event data is shown when what fails is ours, the application's or the disk."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2
import pydantic
import pytest

from hookwright import (
    Catalogue,
    ClientCertificate,
    ConfigurationError,
    ConflictError,
    Content,
    Dispatcher,
    EncryptionKey,
    Endpoint,
    Event,
    Failure,
    FlatEnvelope,
    HookwrightError,
    HttpxTransport,
    NetworkPolicy,
    NewEvent,
    Profile,
    Request,
    Response,
    RetryPolicy,
    Secret,
    StorageBusy,
    StorageFull,
    ValidationFailed,
)
from hookwright._models import EndpointRow, Lease
from hookwright._prepare import Outline
from hookwright.testing import FakeTransport, VirtualClock
from tests import canaries
from tests.canaries import ATTRIBUTE, DATA, GIVEN, HEADERS, IDEMPOTENCY, OLD, PATH, PATH_TOKEN, PAYLOAD, collecting
from tests.conftest import until
from tests.test_canaries import ECHOES, emit, look, look_at_payload, subscribe, sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from tests.canaries import Collector

URL = f"https://receiver.example{PATH}"
ONCE = RetryPolicy.schedule(0)


@asynccontextmanager
async def opened(
    storage: str, collector: Collector, *, key: EncryptionKey = canaries.ENCRYPTION, **options: Any
) -> AsyncIterator[Dispatcher]:
    usual: dict[str, Any] = {"transport": FakeTransport(500), "profiles": {"default": Profile(retry=ONCE)}}
    settings: dict[str, Any] = usual | {"shutdown_timeout": 0} | options
    async with Dispatcher(storage, keys=[key], **settings) as dispatcher:
        dispatcher.observe(collector.observe)
        yield dispatcher


async def refused(
    collector: Collector,
    call: Callable[[], Awaitable[object]],
    kind: type[Exception] = HookwrightError,
    *,
    given: bool = False,
) -> None:
    """Expect an error, and look at it."""
    try:
        await call()
    except kind as error:
        collector.raised("refused", error, given=given)
    else:
        pytest.fail("it was not refused")


# -- what the application brings ----------------------------------------------------------------------------------


def raises(*_: object, **__: object) -> Any:
    raise RuntimeError("not today")


class Telling:
    """A signer that tells all it knows."""

    header_names = ("X-Signature",)

    def check(self, secret: Secret) -> None:
        """Take any."""

    def generate(self) -> Secret:
        return Secret.generate()

    def sign(self, *, secrets: Sequence[Secret], **rest: object) -> dict[str, str]:
        raise RuntimeError(f"{[secret.reveal() for secret in secrets]} {rest}")


class Careless:
    """A transport that puts the request into everything."""

    def __init__(self, *, failing: bool) -> None:
        self.failing = failing

    async def send(self, request: Request) -> Failure:
        if self.failing:
            return Failure("transport_error", f"POST {request.url} {request.headers}")
        raise RuntimeError(f"{tuple(request)}")

    async def aclose(self) -> None:
        """Nothing."""


OPTIONS: dict[str, Any] = {
    "an envelope that raises": {"profiles": {"default": Profile(envelope=raises, retry=ONCE)}},
    "an envelope that returns text": {"profiles": {"default": Profile(envelope=lambda c: c.data.decode(), retry=ONCE)}},  # type: ignore[arg-type, return-value]
    "data that does not fit": {"profiles": {"default": Profile(envelope=FlatEnvelope(type_key="field"), retry=ONCE)}},
    "a signer that tells": {"profiles": {"default": Profile(signers=[Telling()], retry=ONCE)}},
    "a policy that raises": {"profiles": {"default": Profile(retry=RetryPolicy(wait=raises, stop=raises))}},
    "a transport that tells": {"transport": Careless(failing=False)},
    "a transport that fails and tells": {"transport": Careless(failing=True)},
    "a receiver that echoes": {"transport": FakeTransport(lambda r: Response(500, (("x", r.url),), r.url.encode()))},
}


@pytest.mark.parametrize("name", OPTIONS)
async def test_what_the_application_brings_may_fail(name: str, storage_url: str) -> None:
    async with collecting() as collector, opened(storage_url, collector, **OPTIONS[name]) as dispatcher:
        dispatcher.observe(raises)
        endpoint = await subscribe(dispatcher, URL)
        event_id = await emit(dispatcher)
        await dispatcher.drain(timeout=5)
        with suppress(ConflictError):
            collector.show("test", await dispatcher.endpoints.test(endpoint.id))
        [delivery] = await dispatcher.deliveries.list(event_id=event_id)
        for attempt in await dispatcher.deliveries.attempts(delivery.id):
            collector.note("attempt", f"{attempt} {attempt.detail} {attempt.response_headers} {attempt.response_text}")
        try:
            look_at_payload(collector, await dispatcher.deliveries.payload(delivery.id))
        except ConflictError as error:
            collector.raised("payload", error)
        collector.show("health", await dispatcher.health(), await dispatcher.explain("a.b", DATA))
    assert collector.leaks == []


# -- the disk ---------------------------------------------------------------------------------------------------


async def test_a_locked_database_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookwright.storage.sqlite._owner.BUSY_LIMIT", 0.01)
    monkeypatch.setattr("hookwright.storage.sqlite._owner.BUSY_TIMEOUT", 0.01)
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with (
        collecting() as collector,
        opened(f"sqlite:///{tmp_path / 'a.db'}", collector, transport=transport) as one,
    ):
        endpoint = await subscribe(one, URL)
        event_id = await emit(one)
        await until(lambda: transport.requests)
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        transport.release()
        await refused(collector, lambda: emit(one, "another"), StorageBusy, given=True)
        await refused(collector, lambda: subscribe(one, URL), StorageBusy, given=True)
        await refused(collector, lambda: one.endpoints.rotate_secret(endpoint.id), StorageBusy)
        await refused(collector, lambda: one.endpoints.update(endpoint.id, name="b"), StorageBusy)
        await refused(collector, lambda: one.endpoints.reencrypt(), StorageBusy)
        await refused(collector, lambda: one.events.expunge(event_id), StorageBusy)
        collector.show("health", await one.health())
        other.close()
        await one.drain(timeout=10)
    assert collector.leaks == []


async def test_a_full_disk_tells_nothing(tmp_path: Path) -> None:
    async with collecting() as collector, opened(f"sqlite:///{tmp_path / 'a.db'}", collector) as one:
        endpoint = await subscribe(one, URL)
        owner: Any = one._storage._owner  # type: ignore[attr-defined]  # of SQLite's
        await owner.call(lambda database: database.execute("PRAGMA max_page_count = 1").fetchall())

        async def fill() -> None:
            for number in range(200):
                await one.emit("a.b", {"field": PAYLOAD * 100}, idempotency_key=f"{IDEMPOTENCY}-{number}")

        async def grow() -> None:
            for number in range(200):
                await one.endpoints.update(endpoint.id, description="d" * 900, name=str(number))
                await subscribe(one, URL)

        await refused(collector, fill, StorageFull, given=True)
        await refused(collector, grow, StorageFull, given=True)
        collector.show("health", await one.health())
    assert collector.leaks == []


@pytest.mark.parametrize("kind", [sqlite3.OperationalError, RuntimeError])
@pytest.mark.parametrize(
    "place", ["_claim.claim", "_claim._wait_for_rate", "_settle.settle", "_requeue.requeue", "_history.attempts"]
)
async def test_a_defect_of_the_storage_tells_nothing(
    place: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise kind("disk I/O error")

    clock = VirtualClock()
    async with collecting() as collector, opened(f"sqlite:///{tmp_path / 'a.db'}", collector, clock=clock) as one:
        await one.endpoints.update((await subscribe(one, URL)).id, rate_limit=1)
        with monkeypatch.context() as patch:
            patch.setattr(f"hookwright.storage.sqlite.{place}", broken)
            event_id = await emit(one)
            for _ in range(20):
                await asyncio.sleep(0.005)
            [delivery] = await one.deliveries.list(event_id=event_id)
            for call in (one.deliveries.retry, one.deliveries.attempts, one.deliveries.payload):
                try:
                    await call(delivery.id)
                except (HookwrightError, kind) as error:
                    collector.raised(place, error)
            collector.show("health", await one.health())
        await clock.advance(60)
    assert collector.leaks == []


# -- keys, profiles, ends ----------------------------------------------------------------------------------------


async def test_wrong_keys_and_missing_profiles_tell_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    both = {"default": Profile(retry=ONCE), "vendor": Profile(retry=ONCE)}
    wrong = EncryptionKey("k1", canaries._key("another"))
    async with collecting() as collector:
        async with opened(url, collector, deliver=False, profiles=both) as one:
            endpoint = await subscribe(one, URL)
            vendor = await subscribe(one, URL, "vendor")
            await emit(one)
        async with opened(url, collector, key=wrong) as one:
            await one.drain(timeout=5)
            await refused(collector, lambda: one.endpoints.rotate_secret(endpoint.id), ConflictError)
            await refused(collector, lambda: one.endpoints.test(endpoint.id), ConflictError)
            await refused(collector, lambda: one.endpoints.test(vendor.id), ConflictError)
            explanation = await one.explain("a.b", DATA, attributes={"who": ATTRIBUTE})
            collector.show("wrong key", await one.health(), explanation, await one.endpoints.list())
            [*deliveries] = await one.deliveries.list()
            for delivery in deliveries:
                await refused(collector, partial(one.deliveries.payload, delivery.id), ConflictError)
        async with opened(url, collector, key=EncryptionKey("k2", canaries._key("another")), deliver=False) as one:
            await refused(collector, one.endpoints.reencrypt, ConflictError)
        certified = both | {"vendor": Profile(retry=ONCE, client_certificate=canaries.certificate())}
        other = HttpxTransport(FailingInner(), network=NetworkPolicy.delegated())
        async with opened(url, collector, profiles=certified, transport=other) as one:
            await one.endpoints.enable(vendor.id)  # what could not be sent was held
            await one.drain(timeout=5)
            attempts = [a for d in await one.deliveries.list() for a in await one.deliveries.attempts(d.id)]
            assert "auth_error" in {attempt.error for attempt in attempts}
            collector.show("certified", *attempts)
            collector.show("certified", certified["vendor"])
    assert collector.leaks == []


class FailingInner(httpx2.AsyncBaseTransport):
    """Stands for another engine."""

    async def handle_async_request(self, request: Any) -> Any:
        raise RuntimeError(f"{request.url} {request.headers}")

    async def aclose(self) -> None:
        """Nothing."""


async def test_every_end_of_a_delivery_tells_nothing(storage_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    async with collecting() as collector, opened(storage_url, collector, transport=transport) as one:
        endpoint = await subscribe(one, URL)
        events = [await emit(one, f"{IDEMPOTENCY}-{number}") for number in range(4)]
        await until(lambda: transport.requests)
        [delivery] = await one.deliveries.list(event_id=events[0])
        collector.show("cancelled", await one.deliveries.cancel(delivery.id))
        transport.release()  # what is answered now has lost its lease
        await until(lambda: one._deliverer.lost_leases)
        await refused(collector, lambda: one.deliveries.cancel(delivery.id), ConflictError)
        await one.events.expunge(events[1])
        await refused(collector, lambda: one.deliveries.wait("evt_none"), HookwrightError)
        await look(one, collector, events[2])
        collector.show("paused", await one.endpoints.pause(endpoint.id), await one.endpoints.disable(endpoint.id))
        await one.endpoints.delete(endpoint.id)
        await refused(collector, lambda: one.endpoints.get(endpoint.id), HookwrightError)
        hanging = FakeTransport()
        one._deliverer._transport = hanging  # the next one hangs until it is given back
        hanging.respond(URL, hanging.hang)
        await subscribe(one, URL)
        await emit(one, "last")
        await until(lambda: hanging.requests)
    assert collector.leaks == []


# -- what is refused --------------------------------------------------------------------------------------------


class Order(pydantic.BaseModel):
    field: int


def catalogue() -> Catalogue:
    found = Catalogue()
    found.event("order.made")(Order)
    found.add("order.sent", {"type": "object", "properties": {"field": {"type": "integer"}}, "maxProperties": 1})
    return found


URLS = [
    f"ftp://receiver.example{PATH}",
    f"http://receiver.example{PATH}",
    f"https://127.0.0.1{PATH}",
    f"https://receiver.example:22{PATH}",
    f"https://receiver.example:x{PATH}",
    f"https://[receiver{PATH}",
    f"https://user:{PATH_TOKEN}@receiver.example/",
    f"{URL}#fragment",
    f"{URL} ",
    f"{URL}{'x' * 2048}",
    f"https://re ceiver.example{PATH}",
    f"https://metadata{PATH}",
]
FIELDS: list[dict[str, Any]] = [
    {"secret": OLD[:20]},
    {"secret": OLD.removeprefix("whsec_")},
    {"secret": OLD + "!"},
    {"secret": "enc:1:" + OLD},
    {"headers": {"Authorization": HEADERS["Authorization"] + "\r\nX: y"}},
    {"headers": {f"Authorization: {HEADERS['Authorization']}": ""}},
    {"headers": {"webhook-id": HEADERS["Authorization"]}},
    {"headers": {"x-a": canaries.TOKEN, "X-A": canaries.TOKEN}},
    {"headers": [HEADERS["Authorization"]]},
    {"headers": {"X-Token": "enc:1:" + canaries.TOKEN}},
    {"filters": [ATTRIBUTE]},
    {"filters": {"who": [1.5, ATTRIBUTE]}},
    {"metadata": {"who": {ATTRIBUTE}}},
    {"name": ATTRIBUTE * 100},
    {"profile": "none"},
    {"timeout": -1},
]
EVENTS: list[NewEvent] = [
    NewEvent("order.made", {"field": PAYLOAD}),
    NewEvent("order.made", PAYLOAD),
    NewEvent("order.sent", {"field": PAYLOAD}),
    NewEvent("order.sent", {"a": PAYLOAD, "b": PAYLOAD}),
    NewEvent("order.sent", [PAYLOAD]),
    NewEvent("order.none", DATA),
    NewEvent(DATA),  # type: ignore[arg-type]  # the wrong place
    NewEvent("a", {"field": {PAYLOAD: object()}}),
    NewEvent("a", {"field": PAYLOAD + "\ud800"}),
    NewEvent("a", {"field": PAYLOAD, "n": float("nan")}),
    NewEvent("a", PAYLOAD * 20_000),
    NewEvent("a", DATA, attributes={"who": 1.5, "x": ATTRIBUTE}),  # type: ignore[dict-item]  # wrong
    NewEvent("a", DATA, attributes=[ATTRIBUTE]),  # type: ignore[arg-type]  # wrong
    NewEvent("a", DATA, idempotency_key=IDEMPOTENCY * 20),
    NewEvent("a", DATA, event_id=IDEMPOTENCY + "!"),
    NewEvent("a", DATA, trace_context=PAYLOAD),
    NewEvent("a", DATA, occurred_at=PAYLOAD),  # type: ignore[arg-type]  # wrong
    NewEvent("order.sent", {"field": 1}, idempotency_key="again"),
]


async def test_refusals_do_not_repeat_what_was_given(storage_url: str) -> None:
    async with collecting() as collector, opened(storage_url, collector, catalogue=catalogue()) as one:
        for url in URLS:
            await refused(collector, partial(one.endpoints.create, url, events=["*"]), ValidationFailed, given=True)
        for given in FIELDS:
            options: dict[str, Any] = {"url": URL, "events": ["*"]} | given
            await refused(collector, partial(one.endpoints.create, **options), ValidationFailed, given=True)
        await one.emit("order.sent", {}, idempotency_key="again")
        for event in EVENTS:
            await refused(collector, partial(one.emit_many, [event]), given=True)
    assert collector.leaks == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dispatcher(f"mysql://user:{canaries.TOKEN}@db/hooks"),
        lambda: Dispatcher(f"postgresql+asyncpg://user:{canaries.TOKEN}@db/hooks"),
        lambda: Dispatcher("memory:", network=URL),  # type: ignore[arg-type]  # wrong
        lambda: Dispatcher("memory:", keys=[canaries.ENCRYPTION.reveal()]),  # type: ignore[list-item]  # wrong
        lambda: Dispatcher("memory:", keys=canaries.ENCRYPTION.reveal()),  # type: ignore[arg-type]  # wrong
        lambda: EncryptionKey(canaries.ENCRYPTION.reveal(), "k1"),
        lambda: EncryptionKey("k1", canaries.ENCRYPTION.reveal()[:-5]),
        lambda: ClientCertificate(canaries.certificate().certificate, canaries.certificate().key[:150]),
        lambda: ClientCertificate.from_files(canaries.certificate().certificate, canaries.certificate().key),
        lambda: Profile(headers={"X-Api-Key": canaries.TOKEN + "\n"}),
        lambda: Profile(client_certificate=canaries.certificate().key),  # type: ignore[arg-type]  # wrong
        lambda: Secret(OLD.removeprefix("whsec_")),
    ],
)
async def test_parts_that_are_refused_are_not_repeated(make: Callable[[], object]) -> None:
    async with collecting() as collector:
        with pytest.raises((ConfigurationError, ValidationFailed)) as caught:
            make()
        collector.raised("part", caught.value, given=True)
    assert collector.leaks == []


# -- that this test can fail ------------------------------------------------------------------------------------


def _undone(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    names = getattr(kind, "_fields", None) or [field.name for field in fields(kind)]
    monkeypatch.setattr(kind, "__repr__", lambda self: repr([getattr(self, name) for name in names]))


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Endpoint, "endpoint"),
        (Event, "read"),
        (Content, "log hookwright"),
        (Lease, "log hookwright"),
        (EndpointRow, "log hookwright"),
        (Outline, "log hookwright"),
    ],
)
async def test_a_value_that_shows_itself_is_noticed(kind: type, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _undone(monkeypatch, kind)
    bodies = [b"{}"]  # the second time it raises, when the endpoint's headers are ready
    profiles = {"default": Profile(envelope=lambda _: bodies.pop(), retry=ONCE)}
    async with collecting() as collector, opened("memory:", collector, profiles=profiles) as one:
        endpoint = await subscribe(one, URL)
        await emit(one, "an earlier one")
        await one.drain(timeout=5)
        event_id = await emit(one)
        await one.drain(timeout=5)
        collector.show("endpoint", endpoint)
        collector.show("read", await one.events.get(event_id))
    assert any(leak.startswith(where) for leak in collector.leaks)


@pytest.mark.parametrize(
    ("target", "value", "where"),
    [
        ("hookwright._delivery.secrets_of", lambda _: [], "body"),
        ("hookwright._addresses._TOKEN_LENGTH", 1000, "created"),
        ("hookwright._explain.MASK", GIVEN, "payload's headers"),
        ("hookwright.transport._discreet._Discreet.filter", lambda *_: True, "log httpcore2"),
    ],
)
async def test_a_mask_that_is_taken_off_is_noticed(
    target: str, value: object, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, value)
    async with collecting() as collector:
        await sweep(HttpxTransport, ECHOES, "memory:", collector)
    assert any(leak.startswith(where) for leak in collector.leaks)
