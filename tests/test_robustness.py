"""What a careful reader found: each of these once lost, doubled or held something."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    ConfigurationError,
    ConflictError,
    Content,
    DeliverySucceeded,
    Dispatcher,
    Ed25519Webhooks,
    HexSignature,
    MemoryStorage,
    NewEvent,
    Profile,
    Response,
    RetryPolicy,
    Secret,
    SQLiteStorage,
    StandardWebhooks,
    StorageBusy,
    StorageError,
    Timeouts,
    ValidationFailed,
)
from hookwright._models import DeliveryState, Outcome
from hookwright.receiver import Verifier
from hookwright.storage._base import ClaimRequest, DeliveryFilter
from hookwright.storage.sqlite import _history
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until
from tests.test_worker import Gauge

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright import Failure, Request


async def test_the_longest_timeout_that_is_taken_is_sent_with(storage_url: str) -> None:
    transport = FakeTransport()
    profiles = {"default": Profile(timeouts=Timeouts(total=15.0))}
    async with Dispatcher(storage_url, transport=transport, profiles=profiles, lease=25.0) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.create(URL, events=["*"], timeout=15)
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        assert [request.total_timeout for request in transport.requests] == [15.0, 15.0]


async def test_an_endpoint_whose_timeout_fits_no_lease_here_waits_and_is_told_of(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    transport = FakeTransport()
    async with Dispatcher(sqlite_url, deliver=False, lease=120.0) as other:
        endpoint = await other.endpoints.create(URL, events=["*"], timeout=100)
        await other.emit("a")
    async with Dispatcher(sqlite_url, transport=transport) as dispatcher:
        with caplog.at_level(logging.WARNING, "hookwright"):
            await dispatcher.drain(timeout=5)
        assert "does not fit the lease" in caplog.text
        assert (await dispatcher.health()).problems == (
            f"endpoint {endpoint.id}: its timeout of 100 s does not fit the lease",
        )
        assert transport.requests == []
        await dispatcher.endpoints.update(endpoint.id, timeout=20)
        await dispatcher.endpoints.enable(endpoint.id)
        await dispatcher.drain(timeout=5)
        assert len(transport.requests) == 1
        assert (await dispatcher.health()).problems == ()


async def test_endpoints_that_were_healthy_until_a_moment_ago_leave_slots_to_others(storage_url: str) -> None:
    gauge = Gauge()
    gauge.release()
    async with Dispatcher(storage_url, transport=gauge, concurrency=20, shutdown_timeout=0) as dispatcher:
        for n in range(8):
            await dispatcher.endpoints.create(f"{URL}/hang/{n}", events=["*"], concurrency=9)
        await dispatcher.endpoints.create(URL + "/healthy", events=["good", "first"])
        for _ in range(5):
            await dispatcher.emit("first")
            await dispatcher.drain(timeout=10)
        gauge._released.clear()
        await asyncio.gather(*(dispatcher.emit("bad") for _ in range(20)))
        await until(lambda: gauge.now.total() == 8 + 10)  # one each, and half the slots beyond that
        healthy = [endpoint for endpoint in (await dispatcher.endpoints.list()) if "healthy" in endpoint.url]
        receipts = [await dispatcher.emit("good", endpoint_id=healthy[0].id) for _ in range(5)]
        for receipt in receipts:
            [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
            assert delivery.state == "succeeded"
        assert gauge.now.total() == 18


async def test_an_aclose_that_was_cancelled_goes_on_and_can_be_waited_for(sqlite_url: str) -> None:
    transport = FakeTransport()
    transport.respond(URL, transport.hang)
    dispatcher = Dispatcher(sqlite_url, transport=transport, shutdown_timeout=0.3)
    await dispatcher.start()
    await dispatcher.endpoints.create(URL, events=["*"])
    await dispatcher.emit("a")
    await until(lambda: transport.requests)
    closing = asyncio.create_task(dispatcher.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await asyncio.gather(dispatcher.aclose(), dispatcher.aclose())
    assert transport.closed
    async with Dispatcher(sqlite_url, transport=FakeTransport()) as successor:
        assert successor.is_delivering


async def test_a_result_is_written_before_the_lease_is_given_back(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "hooks.db")
    async with Dispatcher(storage, deliver=False) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("a")
        [lease] = (await storage.claim(ClaimRequest(9, 9, 60_000_000, 4, {}))).leases
        outcome = Outcome(lease.delivery_id, lease.token, lease.endpoint_id, DeliveryState.SUCCEEDED, None)
        _, [settled], _ = await asyncio.gather(
            storage.sweep(), storage.settle([outcome]), storage.release([lease], sent=True)
        )
        assert settled.held
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
        assert delivery.state == "succeeded"


async def test_a_delivery_whose_endpoint_is_deleted_while_it_is_leased_ends(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        receipt = await dispatcher.emit("a")
        claim = dispatcher._storage.claim

        async def claim_and_delete(request: ClaimRequest) -> Any:
            found = await claim(request)
            if found.leases:
                await dispatcher._storage.delete_endpoint(endpoint.id)
                await dispatcher._storage.sweep()
                await dispatcher._cache.refresh(dispatcher._cache.revision)
            return found

        dispatcher._storage.claim = claim_and_delete  # type: ignore[method-assign]  # deletes between claim and send
        await dispatcher.endpoints.resume(endpoint.id)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.state == "cancelled"


async def test_leases_are_given_back_when_the_endpoints_cannot_be_read(clock: VirtualClock) -> None:
    class Flaky(MemoryStorage):
        fail = 0

        async def changes(self, since_revision: int) -> Any:
            if self.fail:
                self.fail -= 1
                raise StorageError("the disk hiccups")
            return await super().changes(since_revision)

    storage, transport = Flaky(), FakeTransport()
    async with Dispatcher(storage, transport=transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        await dispatcher.emit("a")
        await storage.set_endpoint_state(endpoint.id, endpoint.state, reason=None)
        storage.fail = 1
        dispatcher._worker.wake()
        await until(lambda: storage.fail == 0)
        await clock.advance(2, settle=dispatcher.drain)
        [delivery] = await dispatcher.deliveries.list()
        assert (delivery.state, delivery.attempt_count) == ("succeeded", 1)


async def test_a_process_that_changes_its_folder_keeps_its_lock_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link.db").symlink_to("real.db")
    async with (
        Dispatcher("sqlite:///real.db", transport=FakeTransport()) as one,
        Dispatcher("sqlite:///link.db", transport=FakeTransport()) as other,
    ):
        os.chdir(elsewhere)
        assert not await other._storage.acquire()
        assert (one.is_delivering, other.is_delivering) == (True, False)
        await other.endpoints.create(URL, events=["*"])
        receipt = await other.emit("a")
        await other.deliveries.wait(receipt.event_id, timeout=5)
    assert [path.name for path in elsewhere.iterdir()] == []


async def test_a_cancellation_of_somebody_else_ends_neither_an_observer_nor_a_delivery(
    storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Cancels(FakeTransport):
        async def send(self, request: Request) -> Response | Failure:
            if not self.requests:
                self.requests.append(request)
                raise asyncio.CancelledError
            return await super().send(request)

    heard: list[DeliverySucceeded] = []

    async def observe(succeeded: DeliverySucceeded) -> None:
        heard.append(succeeded)
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    profiles = {"default": Profile(retry=RetryPolicy.schedule(0, 0))}
    async with Dispatcher(storage_url, transport=Cancels(), profiles=profiles) as dispatcher:
        dispatcher.observe(observe, DeliverySucceeded)
        await dispatcher.endpoints.create(URL, events=["*"])
        for _ in range(3):
            await dispatcher.emit("a")
            await dispatcher.drain(timeout=5)
        await until(lambda: len(heard) == 3)
        first = list(await dispatcher.deliveries.list())[-1]
        attempts = await dispatcher.deliveries.attempts(first.id)
        assert [(a.error, a.detail) for a in attempts] == [("transport_error", "CancelledError"), (None, None)]
    assert "observer" in caplog.text


async def test_taking_over_is_tried_again_whole_when_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()
    dead, heir = SQLiteStorage(tmp_path / "hooks.db"), SQLiteStorage(tmp_path / "hooks.db")
    async with Dispatcher(dead, deliver=False, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("a")
        assert len((await dead.claim(ClaimRequest(9, 9, 60_000_000, 4, {}))).leases) == 1
    await heir.open(clock)

    def busy(*_: object) -> None:
        raise StorageBusy("held")

    with monkeypatch.context() as patch:
        patch.setattr("hookwright.storage.sqlite._release.free_leases", busy)
        with pytest.raises(StorageBusy):
            await heir.acquire()
    assert await heir.acquire()
    [lease] = (await heir.claim(ClaimRequest(9, 9, 60_000_000, 4, {}))).leases
    assert lease.taken_over
    await heir.close()


async def test_what_is_blanked_is_what_could_be_a_secret(storage_url: str) -> None:
    headers = {"X-Version": "1", "X-Env": "ok", "Authorization": "Bearer abc/def/ghi"}
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], headers=headers)
        assert endpoint.secret is not None
        text = endpoint.secret.reveal()
        body = f'{{"status":"ok","took":1,"auth":"Bearer abc\\/def\\/ghi","cut":"{text[:20]}'.encode()
        transport.respond(URL, Response(200, body=body, truncated=True))
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        [delivery] = await dispatcher.deliveries.list()
        [attempt] = await dispatcher.deliveries.attempts(delivery.id)
        assert attempt.response_body == b'{"status":"ok","took":1,"auth":"[secret]","cut":"[secret]'


async def test_a_delivery_of_long_ago_is_due_at_once(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("a", deliver_at=datetime(1960, 1, 1, tzinfo=UTC))
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert delivery.state == "succeeded"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tenant": "\ud800"}, "tenant: holds half a surrogate"),
        ({"idempotency_key": "\ud800"}, "idempotency_key"),
        ({"endpoint_id": "\ud800"}, "endpoint_id"),
        ({"attributes": {("a",): 1}}, "attributes: the key"),
        ({"attributes": ["a"]}, "attributes: must be a mapping"),
    ],
)
async def test_text_that_is_none_is_refused(storage_url: str, given: dict[str, Any], says: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        with pytest.raises(ValidationFailed, match=says):
            await dispatcher.emit("a", **given)


async def test_each_header_is_sent_once_and_nobody_sets_ours(storage_url: str) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], headers={"User-Agent": "Vendor/1"})
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        names = [name.lower() for name, _ in transport.requests[0].headers]
        assert len(names) == len(set(names))
        assert dict(transport.requests[0].headers)["User-Agent"] == "Vendor/1"
        with pytest.raises(ValidationFailed, match="differ in case only"):
            await dispatcher.endpoints.create(URL, events=["*"], headers={"X-A": "1", "x-a": "2"})
    refused: tuple[dict[str, str], ...] = ({"Content-Type": "x"}, {"Expect": "x"}, {"webhook-id": "x"}, {"X-Sig": "x"})
    for headers in (*refused, {"X-A": "1", "x-a": "2"}):
        with pytest.raises(ConfigurationError, match="Profile"):
            Profile(headers=headers, signers=[HexSignature("X-Sig")])


async def test_a_rate_limit_that_is_taken_away_holds_nothing_back(storage_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport()
    async with Dispatcher(storage_url, transport=transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], rate_limit=0.001)
        for _ in range(2):
            await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        assert len(transport.requests) == 1
        await dispatcher.endpoints.update(endpoint.id, rate_limit=None)
        await dispatcher.drain(timeout=5)
        assert len(transport.requests) == 2


async def test_pruning_walks_past_what_is_pending(sqlite_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport()
    async with Dispatcher(sqlite_url, transport=transport, clock=clock) as dispatcher:
        paused = await dispatcher.endpoints.create(URL, events=["wait"])
        await dispatcher.endpoints.create(URL, events=["go"])
        await dispatcher.endpoints.pause(paused.id)
        for number in range(700):
            await dispatcher.emit("wait" if number % 2 else "go")
        await dispatcher.drain(timeout=20)
        await clock.advance(timedelta(days=1))
        moment = datetime.fromtimestamp(clock.now() / 1e6, UTC)
        assert await dispatcher.events.prune(before=moment) == 350
        assert await dispatcher.events.prune(before=moment) == 0
        assert await dispatcher.deliveries.count(status="pending") == 350


async def test_a_test_that_failed_is_not_sent_again(storage_url: str) -> None:
    transport = FakeTransport(500)
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.test(endpoint.id)
        assert await dispatcher.deliveries.replay(endpoint_id=endpoint.id) == 0
        [delivery] = await dispatcher.deliveries.list()
        with pytest.raises(ConflictError, match="was a test"):
            await dispatcher.deliveries.retry(delivery.id)
        await dispatcher.endpoints.disable(endpoint.id)
        with pytest.raises(ConflictError, match="enable it first"):
            await dispatcher.deliveries.replay(endpoint_id=endpoint.id)


async def test_a_signer_or_an_envelope_of_the_application_that_misbehaves_is_named(storage_url: str) -> None:
    class Broken(HexSignature):
        def sign(self, **_: Any) -> dict[str, str]:
            raise ConnectionError("the key service is down")

    class Text:
        def render(self, content: Content) -> bytes:
            return content.event_type  # type: ignore[return-value]  # that is what is tested

    profiles = {"signer": Profile(signers=[Broken("X-Sig")]), "envelope": Profile(envelope=Text())}
    async with Dispatcher(storage_url, transport=FakeTransport(), profiles=profiles) as dispatcher:
        held = await dispatcher.endpoints.create(URL, events=["*"], profile="signer")
        text = await dispatcher.endpoints.create(URL, events=["*"], profile="envelope")
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        assert (await dispatcher.health()).problems == (f"endpoint {held.id}: a signer raised ConnectionError",)
        [failed] = await dispatcher.deliveries.list(endpoint_id=text.id)
        assert (failed.state, failed.last_error) == ("failed", "render_error")
        [waiting] = await dispatcher.deliveries.list(endpoint_id=held.id)
        assert (waiting.state, waiting.attempt_count) == ("pending", 0)


async def test_an_endpoint_moves_to_another_kind_of_secret_and_profile_at_once(storage_url: str) -> None:
    transport = FakeTransport()
    signer = Ed25519Webhooks()
    async with Dispatcher(storage_url, transport=transport, profiles={"ed": Profile(signers=[signer])}) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        moved = await dispatcher.endpoints.rotate_secret(endpoint.id, profile="ed")
        assert moved.secret is not None
        assert (moved.profile, moved.secret.reveal()[:5]) == ("ed", "whsk_")
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        verifier = Verifier(signer.public_key(moved.secret))
        assert verifier.verify(transport.requests[0].body, transport.requests[0].headers).payload["type"] == "a"
    with pytest.raises(ConfigurationError, match="two profiles"):
        Profile(signers=[StandardWebhooks(), signer])


@pytest.mark.parametrize("header", ["Content-Length", "Host"])
def test_a_signer_cannot_set_what_belongs_to_the_connection(header: str) -> None:
    with pytest.raises(ConfigurationError, match="no signer can set"):
        Profile(signers=[HexSignature(header)])
    with pytest.raises(ConfigurationError, match="no signer can set"):
        Profile(signers=[HexSignature("X-Sig"), HexSignature("x-sig")])


async def test_a_key_for_one_endpoint_is_not_a_key_for_another(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        one, other = [await dispatcher.endpoints.create(URL, events=["*"]) for _ in range(2)]
        await dispatcher.emit("a", idempotency_key="k", endpoint_id=one.id)
        with pytest.raises(ConflictError, match="target"):
            await dispatcher.emit("a", idempotency_key="k", endpoint_id=other.id)


async def test_the_index_of_unsuccessful_deliveries_is_used(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "hooks.db")
    async with Dispatcher(storage, deliver=False):
        states = (DeliveryState.FAILED,)
        condition, values = _history._condition(DeliveryFilter(states=states))
        sql = f"EXPLAIN QUERY PLAN {_history._DELIVERY} WHERE {condition} ORDER BY d.id DESC LIMIT 51"
        plan = await storage._read(lambda database: database.execute(sql, values).fetchall())
        assert "hookwright_delivery_unsuccessful" in plan[0][3]


async def test_a_page_of_the_last_hour_does_not_read_the_whole_history(sqlite_url: str, clock: VirtualClock) -> None:
    async with Dispatcher(sqlite_url, transport=FakeTransport(), clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        moments = []
        for _ in range(30):
            moments.append(datetime.fromtimestamp(clock.now() / 1e6, UTC))
            for _ in range(3):
                await dispatcher.emit("a")
            await clock.advance(45)
        await dispatcher.drain(timeout=10)
        for number, since in enumerate(moments):
            assert await dispatcher.deliveries.count(since=since) == 3 * (30 - number)
            assert await dispatcher.deliveries.count(since=since, endpoint_id=endpoint.id) == 3 * (30 - number)
        storage = dispatcher._storage
        assert isinstance(storage, SQLiteStorage)
        where = DeliveryFilter(since=round(moments[-1].timestamp() * 1e6), endpoint_id=endpoint.id)
        condition, values = _history._condition(where)
        sql = f"EXPLAIN QUERY PLAN {_history._DELIVERY} WHERE {condition} ORDER BY d.id DESC LIMIT 51"
        plan = await storage._read(lambda database: database.execute(sql, values).fetchall())
        assert "(endpoint_id=? AND id>?)" in plan[0][3]


async def test_what_is_sent_again_is_due_now(storage_url: str) -> None:
    clock, transport = VirtualClock(), FakeTransport(500)
    profiles = {"default": Profile(retry=RetryPolicy.schedule(0))}
    async with Dispatcher(storage_url, transport=transport, clock=clock, profiles=profiles) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=5)
        await dispatcher.endpoints.pause(endpoint.id)
        await clock.advance(timedelta(days=5))
        [failed] = await dispatcher.deliveries.list()
        again = await dispatcher.deliveries.retry(failed.id)
        assert again.next_attempt_at == datetime.fromtimestamp(clock.now() / 1e6, UTC)


@pytest.mark.parametrize("given", [{"filters": {"k": None}}, {"filters": {1: ["a"]}}])
async def test_filters_that_can_never_match_are_refused(storage_url: str, given: dict[str, Any]) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        with pytest.raises(ValidationFailed, match="filters"):
            await dispatcher.endpoints.create(URL, events=["*"], **given)
        wrong: tuple[Any, ...] = (NewEvent("a"), [{"type": "a"}], [("a", None)])
        for events in wrong:
            with pytest.raises(ValidationFailed, match="give a list of NewEvent"):
                await dispatcher.emit_many(events)
    for text in (5, "\ud800"):
        with pytest.raises(ValidationFailed, match="secret"):
            Secret.text(text)  # type: ignore[arg-type]  # that is what is tested


async def test_a_cursor_with_anything_added_is_refused(storage_url: str) -> None:
    async with Dispatcher(storage_url, transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        for _ in range(2):
            await dispatcher.emit("a")
        cursor = (await dispatcher.deliveries.list(limit=1)).next_cursor
        assert cursor is not None
        assert len(await dispatcher.deliveries.list(limit=1, cursor=cursor)) == 1
        for changed in (cursor + "!", "\u00e9" + cursor, cursor[:4] + "?" + cursor[4:], cursor[:-4]):
            with pytest.raises(ValidationFailed, match="cursor"):
                await dispatcher.deliveries.list(limit=1, cursor=changed)
