"""Each row of docs/seeds.md: what the four systems of the seed documents do, by configuration alone."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import flask
import pydantic
import pytest
from examples.seeds import videocloud, videogen, videopilot, videovector

from hookwright import (
    Catalogue,
    DeliveryFailed,
    DeliveryState,
    Dispatcher,
    EndpointFailing,
    EndpointState,
    NetworkPolicy,
    Request,
    Response,
    Secret,
    ValidationFailed,
)
from hookwright.receiver import VerificationFailed, Verifier
from hookwright.testing import FakeTransport, Inbox, VirtualClock
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookwright import Observation, Profile

SECRET = "your_webhook_secret"  # the seed's own example


@asynccontextmanager
async def speaking(profile: Profile, transport: Any, **options: Any) -> AsyncIterator[Dispatcher]:
    async with Dispatcher("memory:", profiles={"default": profile}, transport=transport, **options) as dispatcher:
        yield dispatcher


async def sent_by(profile: Profile, secret: Secret | None, type: str, data: object) -> tuple[Request, Secret]:
    transport = FakeTransport()
    async with speaking(profile, transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], secret=secret)
        await dispatcher.emit(type, data)
        await dispatcher.drain(timeout=5)
        assert endpoint.secret is not None
        return transport.requests[0], endpoint.secret


# -- VideoVector ------------------------------------------------------------------------------------------------


async def test_v1_an_endpoint_has_a_name_a_scope_and_metadata() -> None:
    transport = FakeTransport()
    async with speaking(videovector.PROFILE, transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(
            "https://example.com/webhooks/videovector",
            name="Prompt terminal notifications",
            events=["prompt_run.completed", "prompt_run.failed"],
            filters=videovector.SCOPE,
            metadata={"owner": "review-ops"},
        )
        assert (endpoint.name, endpoint.metadata) == ("Prompt terminal notifications", {"owner": "review-ops"})
        for index, wanted in (("idx_archive", 1), ("idx_other", 0)):
            receipt = await dispatcher.emit("prompt_run.completed", attributes={"index_ids": [index]})
            assert receipt.delivery_count == wanted
        assert (await dispatcher.emit("prompt_run.completed")).delivery_count == 0
        assert (await dispatcher.emit("prompt_run.started", attributes=videovector.SCOPE)).delivery_count == 0


async def test_v2_the_secret_is_shown_at_creation_and_after_rotation_and_later_its_last_four() -> None:
    async with speaking(videovector.PROFILE, FakeTransport()) as dispatcher:
        created = await dispatcher.endpoints.create(URL, events=["*"])
        rotated = await dispatcher.endpoints.rotate_secret(created.id)
        assert created.secret is not None
        assert rotated.secret is not None
        assert rotated.secret != created.secret
        read = await dispatcher.endpoints.get(created.id)
        assert (read.secret, read.secret_last4) == (None, rotated.secret.reveal()[-4:])
        [listed] = (await dispatcher.endpoints.list()).items
        assert listed == read


async def test_v3_a_test_is_sent_and_its_outcome_returned() -> None:
    transport = FakeTransport([204, 500])
    clock = VirtualClock()
    async with speaking(videovector.PROFILE, transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["prompt_run.completed"])
        attempt = await dispatcher.endpoints.test(endpoint.id)
        assert (attempt.status, attempt.number) == (204, 1)
        moved = await dispatcher.endpoints.update(endpoint.id, url=URL + "/new")
        await clock.advance(10)
        attempt = await dispatcher.endpoints.test(endpoint.id)
        assert (attempt.status, transport.requests[1].url) == (500, moved.url)
        assert json.loads(transport.requests[1].body)["type"] == "hookwright.test"


async def test_v4_a_paused_endpoint_loses_nothing_and_drains_on_resume_and_a_deleted_one_is_gone() -> None:
    transport = FakeTransport()
    async with speaking(videovector.PROFILE, transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.pause(endpoint.id)
        for number in range(5):
            await dispatcher.emit("export.ready", number)
        await dispatcher.drain(timeout=5)
        assert transport.requests == []
        await dispatcher.endpoints.resume(endpoint.id)
        await dispatcher.drain(timeout=5)
        assert sorted(json.loads(request.body)["data"] for request in transport.requests) == [0, 1, 2, 3, 4]
        await dispatcher.endpoints.delete(endpoint.id)
        assert (await dispatcher.emit("export.ready")).delivery_count == 0


async def test_v5_history_shows_status_attempts_answers_schedule_and_the_exact_payload() -> None:
    transport = FakeTransport([Response(503, (("server", "x"),), b"come back later"), 204])
    clock = VirtualClock()
    async with speaking(videovector.PROFILE, transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], headers={"X-Team": "private"})
        await dispatcher.emit("export.ready", {"id": 1})
        await dispatcher.drain(timeout=5)
        [waiting] = (await dispatcher.deliveries.list(status="pending")).items
        assert (waiting.attempt_count, waiting.last_status) == (1, 503)
        [attempt] = await dispatcher.deliveries.attempts(waiting.id)
        assert waiting.next_attempt_at == attempt.started_at + timedelta(seconds=5)
        assert (attempt.response_body, attempt.response_headers) == (b"come back later", (("server", "x"),))
        payload = await dispatcher.deliveries.payload(waiting.id)
        assert (payload.body, payload.changed) == (transport.requests[0].body, False)
        shown = dict(payload.headers)
        assert (shown["X-Team"], shown["webhook-signature"]) == ("****", "****")
        assert shown["webhook-id"] == waiting.event_id
        await clock.advance(10, settle=dispatcher.drain)
        [done] = (await dispatcher.deliveries.list(status=[DeliveryState.SUCCEEDED])).items
        assert (done.state, done.attempt_count, done.next_attempt_at) == ("succeeded", 2, None)


async def test_v6_a_failed_delivery_is_retried_by_hand() -> None:
    transport = FakeTransport([500] * 5 + [200])
    clock = VirtualClock()
    async with speaking(videocloud.PROFILE, transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=Secret.text(SECRET))
        receipt = await dispatcher.emit("video.uploaded")
        await clock.advance(timedelta(hours=2), settle=dispatcher.drain)
        [failed] = (await dispatcher.deliveries.list(status="failed")).items
        again = await dispatcher.deliveries.retry(failed.id)
        assert again.state is DeliveryState.PENDING
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        assert (delivery.state, delivery.attempt_count) == ("succeeded", 6)
        assert {dict(request.headers)["user-agent"] for request in transport.requests}


async def test_v7_old_and_new_secret_sign_during_the_overlap_and_only_the_new_one_after_it() -> None:
    transport = FakeTransport()
    clock = VirtualClock()
    async with speaking(videovector.PROFILE, transport, clock=clock) as dispatcher:
        created = await dispatcher.endpoints.create(URL, events=["*"])
        rotated = await dispatcher.endpoints.rotate_secret(created.id, overlap=timedelta(hours=1))
        assert created.secret is not None
        assert rotated.secret is not None
        for passed, old_fits in ((0, True), (3599, True), (1, False)):
            await clock.advance(passed)
            await dispatcher.emit("export.ready")
            await dispatcher.drain(timeout=5)
            request = transport.requests[-1]
            for secret, fits in ((rotated.secret, True), (created.secret, old_fits)):
                verifier = Verifier(secret, now=lambda: clock.wall() / 1e6)
                if fits:
                    assert verifier.verify(request.body, dict(request.headers)).id
                else:
                    with pytest.raises(VerificationFailed):
                        verifier.verify(request.body, dict(request.headers))


# -- VideoPilot -------------------------------------------------------------------------------------------------


async def test_p1_the_body_is_event_data_and_timestamp_with_milliseconds() -> None:
    data = {"video_id": "video_123abc", "title": "Space Discovery", "scene_count": 8, "total_duration": 87.5}
    request, _ = await sent_by(videopilot.PROFILE, None, "video.media_ready", data)
    body = json.loads(request.body)
    assert list(body) == ["event", "data", "timestamp"]
    assert (body["event"], body["data"]) == ("video.media_ready", data)
    moment = datetime.strptime(body["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(moment.timestamp() - time.time()) < 60
    assert len(body["timestamp"]) == len("2024-01-15T10:30:00.000Z")


def flask_receiver(check: Callable[[bytes, str], bool], header: str, seen: list[Any]) -> flask.Flask:
    """The seed's own Flask receiver, with its check."""
    app = flask.Flask(__name__)

    @app.route("/webhook", methods=["POST"])
    def handle_webhook() -> tuple[str, int]:
        signature = flask.request.headers.get(header)
        payload = flask.request.get_data()
        if not check(payload, str(signature)):
            return "Invalid signature", 401
        seen.append(flask.request.get_json())
        return "OK", 200

    return app


def deliver_to(app: flask.Flask, request: Request, body: bytes) -> int:
    headers = [(name, value) for name, value in request.headers if name != "user-agent"]
    return app.test_client().post("/webhook", data=body, headers=headers).status_code


def pilot_check(payload: bytes, signature: str) -> bool:
    expected = "sha256=" + hmac.new(SECRET.encode("utf-8"), payload, hashlib.sha256).hexdigest()
    return hmac.compare_digest(signature, expected)


def cloud_check(payload: bytes, signature: str) -> bool:
    return hmac.compare_digest(signature, hmac.new(SECRET.encode(), payload, "sha256").hexdigest())


async def test_p2_the_seeds_flask_and_express_receivers_accept_it_unchanged() -> None:
    data = {"render_job_id": "render_789xyz", "title": "Träume ☃", "duration": 87.5}
    request, _ = await sent_by(videopilot.PROFILE, Secret.text(SECRET), "render.completed", data)
    seen: list[Any] = []
    app = flask_receiver(pilot_check, "X-VideoPilot-Signature", seen)
    assert deliver_to(app, request, request.body) == 200
    assert (seen[0]["event"], seen[0]["data"]) == ("render.completed", data)
    for position in range(0, len(request.body), 7):
        changed = bytearray(request.body)
        changed[position] ^= 1
        assert deliver_to(app, request, bytes(changed)) == 401
    # Express: crypto.createHmac('sha256', secret).update(req.body.toString(), 'utf8'), 'sha256=' + digest('hex')
    text = request.body.decode("utf-8")
    digest = hmac.new(SECRET.encode(), text.encode("utf-8"), "sha256").hexdigest()
    assert dict(request.headers)["X-VideoPilot-Signature"] == "sha256=" + digest


async def test_p3_the_receiver_has_30_seconds_and_there_are_3_retries_with_exponential_backoff() -> None:
    clock, transport = VirtualClock(), FakeTransport(500)
    started: list[float] = []
    async with speaking(videopilot.PROFILE, transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=Secret.text(SECRET))
        dispatcher.observe(lambda _: started.append(clock.now() / 1e6), DeliveryFailed)
        receipt = await dispatcher.emit("video.script_ready")
        await clock.advance(timedelta(hours=1), settle=dispatcher.drain)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
        times = [a.started_at for a in await dispatcher.deliveries.attempts(delivery.id)]
        gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
        assert (delivery.state, gaps) == ("failed", [10, 20, 40])
        assert {request.total_timeout for request in transport.requests} == {30.0}


async def test_p4_a_stable_event_id_reaches_the_receiver_on_every_attempt() -> None:
    clock, transport = VirtualClock(), FakeTransport([500, 500, 200])
    async with speaking(videopilot.PROFILE, transport, clock=clock) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=Secret.text(SECRET))
        receipt = await dispatcher.emit("video.script_ready")
        await clock.advance(timedelta(hours=1), settle=dispatcher.drain)
        ids = [dict(request.headers)["X-VideoPilot-Event-Id"] for request in transport.requests]
        assert ids == [receipt.event_id] * 3


async def test_p5_webhooks_are_seen_and_verified_on_ones_own_machine() -> None:
    lines: list[str] = []
    profiles = {"default": videopilot.PROFILE}
    async with (
        Inbox(echo=lines.append) as inbox,
        Dispatcher("memory:", profiles=profiles, network=NetworkPolicy.development()) as dispatcher,
    ):
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["*"], secret=Secret.text(SECRET))
        assert endpoint.secret is not None
        inbox.expect(Verifier.hex(endpoint.secret, header="X-VideoPilot-Signature", prefix="sha256="))
        await dispatcher.emit("render.started", {"quality": "high"})
        await dispatcher.drain(timeout=10)
        [received] = inbox.received
        assert received.verified
        assert "render.started" in lines[0]


# -- VideoGen ---------------------------------------------------------------------------------------------------


async def test_g1_create_answers_id_time_and_secret_once_and_list_and_delete_work() -> None:
    async with speaking(videogen.PROFILE, FakeTransport()) as dispatcher:
        created = await dispatcher.endpoints.create(
            "https://your-server.com/webhooks/videogen",
            events=["tool_execution.succeeded", "tool_execution.failed"],
            description="the editor's",
        )
        assert created.secret is not None
        answer = {
            "endpointId": created.id,
            "url": created.url,
            "events": list(created.events),
            "createdAt": created.created_at.timestamp(),
            "description": created.description,
            "signingSecret": created.secret.reveal(),
            "signingSecretLast4": created.secret_last4,
        }
        assert str(answer["signingSecret"]).endswith(created.secret_last4)
        assert abs(time.time() - created.created_at.timestamp()) < 60
        [listed] = (await dispatcher.endpoints.list()).items
        assert listed == replace(created, secret=None)
        await dispatcher.endpoints.delete(created.id)
        assert (await dispatcher.endpoints.list()).items == ()


class Execution(pydantic.BaseModel):
    toolExecutionId: str  # noqa: N815  # as the seed names it
    toolType: str  # noqa: N815
    results: list[dict[str, Any]] | None = None


async def test_g2_the_body_is_flat_with_epoch_seconds_and_absent_fields_are_absent() -> None:
    data = Execution(toolExecutionId="vg_exec_1", toolType="GENERATE_IMAGE")
    request, _ = await sent_by(videogen.PROFILE, None, "tool_execution.failed", data)
    body = json.loads(request.body)
    assert abs(body.pop("occurredAt") - time.time()) < 60
    assert body == {
        "event": "tool_execution.failed",
        "toolExecutionId": "vg_exec_1",
        "toolType": "GENERATE_IMAGE",
    }


async def test_g3_standard_webhooks_signatures_and_a_helper_that_raises() -> None:
    request, secret = await sent_by(videogen.PROFILE, None, "file.upload.completed", {"fileId": "vg_file_1"})
    headers = dict(request.headers)
    assert {"webhook-id", "webhook-timestamp", "webhook-signature"} <= headers.keys()
    assert Verifier(secret).verify(request.body, headers).payload["fileId"] == "vg_file_1"
    with pytest.raises(VerificationFailed, match="signature"):
        Verifier(secret).verify(request.body + b" ", headers)
    with pytest.raises(VerificationFailed, match="too old"):
        Verifier(secret, now=lambda: time.time() + 301).verify(request.body, headers)


async def test_g4_the_catalogue_is_closed_and_exported_as_documentation() -> None:
    catalogue = Catalogue()
    catalogue.event("tool_execution.succeeded", description="An execution is done.")(Execution)
    catalogue.add("file.playback_ready", description="HLS streaming is available.")
    async with speaking(videogen.PROFILE, FakeTransport(), catalogue=catalogue) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["tool_execution.*"])
        with pytest.raises(ValidationFailed, match=r"tool_execution\.paused.*matches nothing"):
            await dispatcher.endpoints.create(URL, events=["tool_execution.paused"])
        with pytest.raises(ValidationFailed, match="not in the catalogue"):
            await dispatcher.emit("tool_execution.paused")
    assert "HLS streaming is available." in catalogue.markdown()
    assert set(catalogue.openapi()["webhooks"]) == {"file.playback_ready", "tool_execution.succeeded"}


# -- VideoCloud -------------------------------------------------------------------------------------------------


async def test_c1_a_chosen_secret_whk_ids_a_status_the_last_delivery_updates_and_delete() -> None:
    async with speaking(videocloud.PROFILE, FakeTransport([200, 500]), endpoint_id_prefix="whk_") as dispatcher:
        created = await dispatcher.endpoints.create(
            "https://your-server.com/webhooks", events=["video.uploaded"], secret=Secret.text(SECRET)
        )
        assert created.id.startswith("whk_")
        assert (created.state, created.last_delivery) == (EndpointState.ACTIVE, None)
        for success in (True, False):
            await dispatcher.emit("video.uploaded")
            await dispatcher.drain(timeout=5)
            [listed] = (await dispatcher.endpoints.list()).items
            assert listed.last_delivery is not None
            assert listed.last_delivery.success is success
            assert abs(listed.last_delivery.at.timestamp() - time.time()) < 60
        updated = await dispatcher.endpoints.update(created.id, events=["video.uploaded", "video.deleted"])
        changed = await dispatcher.endpoints.rotate_secret(
            created.id, secret=Secret.text("new_webhook_secret"), overlap=timedelta(0)
        )
        assert (updated.events, changed.secret_last4) == (("video.uploaded", "video.deleted"), "cret")
        await dispatcher.endpoints.delete(created.id)
        assert (await dispatcher.endpoints.list()).items == ()


async def test_c2_the_seeds_own_receivers_accept_it_unchanged() -> None:
    data = {"commentId": "com_123456", "content": "Great vidéo!", "parentId": None}
    request, _ = await sent_by(videocloud.PROFILE, Secret.text(SECRET), "comment.created", data)
    seen: list[Any] = []
    app = flask_receiver(cloud_check, "X-VideoCloud-Signature", seen)
    assert deliver_to(app, request, request.body) == 200
    assert (seen[0]["event"], seen[0]["data"]) == ("comment.created", data)
    assert len(seen[0]["timestamp"]) == len("2024-03-31T12:00:00Z")
    for position in range(0, len(request.body), 7):
        changed = bytearray(request.body)
        changed[position] ^= 1
        assert deliver_to(app, request, bytes(changed)) == 401


@pytest.mark.parametrize("observed", [True, False])
async def test_c3_the_retry_table_and_then_the_operator_is_notified(observed: bool) -> None:
    clock = VirtualClock()
    transport = FakeTransport(500)
    transport.respond("https://operator.example/", 200)
    told: list[Observation] = []
    async with speaking(videocloud.PROFILE, transport, clock=clock, operational_events=True) as dispatcher:
        secret = Secret.text(SECRET)
        await dispatcher.endpoints.create(URL, events=["video.*"], secret=secret)
        await dispatcher.endpoints.create(
            "https://operator.example/", events=["hookwright.delivery.failed"], secret=secret
        )
        if observed:
            dispatcher.observe(told.append, DeliveryFailed, EndpointFailing)
        receipt = await dispatcher.emit("video.uploaded", {"videoId": "vid_123456"})
        await clock.advance(timedelta(hours=2), settle=dispatcher.drain)
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id)
        times = [a.started_at for a in await dispatcher.deliveries.attempts(delivery.id)]
        gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
        assert (delivery.state, gaps) == ("failed", [60, 300, 900, 1800])
        [notice] = [request for request in transport.requests if "operator" in request.url]
        body = json.loads(notice.body)
        assert (body["event"], body["data"]["delivery_id"]) == ("hookwright.delivery.failed", delivery.id)
        assert body["data"]["attempt_count"] == 5
        if observed:
            assert [type(one) for one in told] == [EndpointFailing, DeliveryFailed]


async def test_c4_the_source_address_is_chosen_and_can_be_checked() -> None:
    network = replace(NetworkPolicy.development(), local_address="127.0.0.2")
    async with Inbox() as inbox, Dispatcher("memory:", network=network) as dispatcher:
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["*"])
        assert endpoint.secret is not None
        await dispatcher.emit("video.uploaded")
        await dispatcher.drain(timeout=10)
        [received] = inbox.received
        assert received.source == "127.0.0.2"
        listed = Verifier(endpoint.secret, sources=["127.0.0.2/32"])
        assert listed.verify(received.body, received.headers, source=received.source).payload["type"]
        with pytest.raises(VerificationFailed, match="source"):
            listed.verify(received.body, received.headers, source="127.0.0.1")


async def test_c5_failures_latency_and_backlog_are_visible() -> None:
    clock, transport = VirtualClock(), FakeTransport([200, 500])
    async with speaking(videocloud.PROFILE, transport, clock=clock) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], secret=Secret.text(SECRET))
        for _ in range(6):
            await dispatcher.emit("video.uploaded")
            await dispatcher.drain(timeout=5)
            await clock.advance(1)
        stats = await dispatcher.endpoints.stats(endpoint.id)
        assert (stats.attempts, stats.failures) == (6, 5)
        assert stats.p99 is not None
        health = await dispatcher.health()
        assert (health.state, health.pending, health.is_delivering) == ("healthy", 5, True)
        failing = await dispatcher.endpoints.get(endpoint.id)
        assert failing.consecutive_failures == 5
        assert failing.failing_since is not None
