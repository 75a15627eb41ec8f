"""One lease, to one settled attempt. `deliver` is the story; each step is told below it, in the same order."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from hookwright._clock import SECOND, to_datetime
from hookwright._deadlines import Deadlines
from hookwright._envelope import Content
from hookwright._errors import StorageClosed, StorageError, ValidationFailed
from hookwright._models import AttemptRecord, DeliveryState, Outcome
from hookwright._observe import (
    AttemptFailed,
    AttemptStarted,
    DeliveryFailed,
    DeliveryRetrying,
    DeliverySucceeded,
    EndpointDisabled,
    LeaseLost,
)
from hookwright._retry import Failed, Gone, Retry, Succeeded
from hookwright.storage._base import FREE_INTERRUPTIONS
from hookwright.transport._base import Failure, Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hookwright._clock import Clock
    from hookwright._matching import CachedEndpoint, EndpointCache
    from hookwright._models import Lease, Settled
    from hookwright._observe import ObserverHub
    from hookwright._profile import Profile
    from hookwright._retry import Verdict
    from hookwright.storage._base import Storage
    from hookwright.transport._base import Transport

_logger = logging.getLogger("hookwright")

LEASE_MARGIN = 5.0
"""Seconds by which a lease must outlast the attempt's total timeout when its request leaves."""

UNUSABLE_HOLD = 60.0
"""Seconds for which an endpoint waits whose profile, key or signer cannot be used."""

_SETTLE_AGAIN = 1.0
"""Seconds between tries to write a result while the storage cannot take it."""


class Prepared(NamedTuple):
    """A request ready to leave, and what judging its outcome needs."""

    request: Request
    profile: Profile
    endpoint: CachedEndpoint
    body_sha256: bytes


class Unusable(NamedTuple):
    """Nothing can be sent to this endpoint by this process; `reason` None: it was deleted, and need not be told."""

    reason: str | None


class Sent(NamedTuple):
    """What came of sending. Times in steady microseconds."""

    answer: Response | Failure
    started_at: int
    duration: int


class Deliverer:
    """Carries leases out. `on_ended` is told the event's id when a delivery ended."""

    def __init__(
        self,
        storage: Storage,
        transport: Transport,
        *,
        cache: EndpointCache,
        profiles: Mapping[str, Profile],
        clock: Clock,
        observers: ObserverHub,
        user_agent: str,
        endpoint_concurrency: int,
        on_ended: Callable[[str], None],
    ) -> None:
        self._storage = storage
        self._transport = transport
        self._cache = cache
        self._profiles = profiles
        self._clock = clock
        self._observers = observers
        self._user_agent = user_agent
        self._endpoint_concurrency = endpoint_concurrency
        self._on_ended = on_ended
        self._deadlines = Deadlines()
        self._warned: set[tuple[str, str | None]] = set()

    async def deliver(self, lease: Lease) -> Settled | None:
        """Attempt the delivery and write what came of it; None when the lease was given back unused."""
        prepared = self._prepare(lease)
        if not isinstance(prepared, Prepared):
            return await self._without_request(lease, prepared)
        if not self._lease_covers(lease, prepared.request):
            await self._storage.release([lease])
            return None
        sent = await self._send(lease, prepared.request)
        verdict = self._judge(lease, prepared.profile, sent)
        outcome = self._outcome(lease, prepared, sent, verdict)
        settled = await self._settle(outcome)
        self._report(lease, outcome, verdict, settled)
        return settled

    # -- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self, lease: Lease) -> Prepared | Unusable | Outcome:
        endpoint = self._cache.get(lease.endpoint_id)
        if endpoint is None:
            return Unusable(None)
        profile = self._profiles.get(endpoint.row.profile)
        if profile is None:
            return Unusable(f"this process has no profile {endpoint.row.profile!r}")
        given_up = self._poisoned(lease, profile)
        if given_up is not None:
            return given_up
        content = Content(lease.event_id, lease.event_type, lease.data, lease.occurred_at, lease.tenant)
        try:
            body = profile.renderer.render(content)
        except Exception as error:  # noqa: BLE001  # an envelope is the application's code, and must not stop the worker
            return self._cannot_render(lease, error)
        try:
            headers = self._headers(lease, endpoint, profile, body)
        except ValidationFailed as error:
            return Unusable(str(error))
        timeouts = profile.timeouts
        total = endpoint.row.timeout or timeouts.total
        request = Request(
            url=endpoint.row.url,
            headers=headers,
            body=body,
            endpoint_id=lease.endpoint_id,
            revision=endpoint.row.revision,
            connections=endpoint.row.concurrency or self._endpoint_concurrency,
            total_timeout=total,
            connect_timeout=min(total, timeouts.connect),
            dns_timeout=min(total, timeouts.dns),
        )
        return Prepared(request, profile, endpoint, hashlib.sha256(body).digest())

    def _poisoned(self, lease: Lease, profile: Profile) -> Outcome | None:
        """Let the policy judge a delivery in whose company we died too often; None: go on and try."""
        if not lease.taken_over or lease.interruptions <= FREE_INTERRUPTIONS:
            return None
        verdict = self._judged(lease, profile, Failure("interrupted"), attempt=lease.spent)
        if isinstance(verdict, Retry):
            return Outcome(
                lease.delivery_id,
                lease.token,
                lease.endpoint_id,
                DeliveryState.PENDING,
                None,
                verdict.delay,
                counts=False,
            )
        return Outcome(lease.delivery_id, lease.token, lease.endpoint_id, DeliveryState.FAILED, None, counts=False)

    def _cannot_render(self, lease: Lease, error: Exception) -> Outcome:
        record = AttemptRecord(self._clock.now(), 0, error="render_error", detail=type(error).__name__)
        return Outcome(lease.delivery_id, lease.token, lease.endpoint_id, DeliveryState.FAILED, record, counts=False)

    def _headers(
        self, lease: Lease, endpoint: CachedEndpoint, profile: Profile, body: bytes
    ) -> tuple[tuple[str, str], ...]:
        # Every attempt is signed anew: the timestamp is the attempt's, the id stays (Standard Webhooks 1.0.0).
        timestamp = self._clock.wall() // SECOND
        headers = [
            ("content-type", getattr(profile.envelope, "content_type", "application/json")),
            ("user-agent", self._user_agent),
            *endpoint.row.headers,
        ]
        if profile.headers:
            fields = {
                "event_id": lease.event_id,
                "event_type": lease.event_type,
                "delivery_id": lease.delivery_id,
                "attempt": lease.number,
                "timestamp": timestamp,
            }
            headers.extend((name, value.format_map(fields)) for name, value in profile.headers.items())
        headers.extend(self._signatures(lease, endpoint, profile, timestamp, body))
        return tuple(headers)

    def _signatures(
        self, lease: Lease, endpoint: CachedEndpoint, profile: Profile, timestamp: int, body: bytes
    ) -> Iterable[tuple[str, str]]:
        signed: dict[str, str] = {}
        now = self._clock.now()
        for signer in profile.signers:
            secrets = endpoint.signing(signer, now)
            found = signer.sign(event_id=lease.event_id, timestamp=timestamp, body=body, secrets=secrets)
            for name, value in found.items():
                before = signed.get(name, value)
                # Two kinds of Standard Webhooks share their headers; signatures are a list separated by spaces.
                signed[name] = value if before == value else f"{before} {value}"
        return signed.items()

    async def _without_request(self, lease: Lease, why: Unusable | Outcome) -> Settled | None:
        if isinstance(why, Outcome):
            settled = await self._settle(why)
            self._report(lease, why, Failed("exhausted" if why.attempt is None else "render_error"), settled)
            return settled
        key = (lease.endpoint_id, why.reason)
        if why.reason is not None and key not in self._warned:
            self._warned.add(key)
            _logger.warning("endpoint %s waits, it cannot be sent to: %s", lease.endpoint_id, why.reason)
        await self._storage.release([lease], hold=round(UNUSABLE_HOLD * SECOND))
        return None

    # -- send ---------------------------------------------------------------------------------------------------

    def _lease_covers(self, lease: Lease, request: Request) -> bool:
        # The loop may have stood still since the claim; another process may hold the delivery before we would end.
        return lease.until - self._clock.now() >= round((request.total_timeout + LEASE_MARGIN) * SECOND)

    async def _send(self, lease: Lease, request: Request) -> Sent:
        if self._observers.wanted:
            self._observers.report(AttemptStarted(**_about(lease)))
        started_at = self._clock.now()
        try:
            answer = await self._deadlines.keep(self._transport.send(request), request.total_timeout)
        except TimeoutError:
            answer = Failure("timeout", "the transport did not keep to the total timeout")
        except Exception as error:  # noqa: BLE001  # a transport may be the application's; a failure is a value
            answer = Failure("transport_error", type(error).__name__)
        return Sent(answer, started_at, self._clock.now() - started_at)

    # -- judge --------------------------------------------------------------------------------------------------

    def _judge(self, lease: Lease, profile: Profile, sent: Sent) -> Verdict:
        return self._judged(lease, profile, sent.answer, attempt=lease.spent + 1)

    def _judged(self, lease: Lease, profile: Profile, answer: Response | Failure, *, attempt: int) -> Verdict:
        age = self._clock.now() - lease.created_at
        try:
            return profile.retry.judge(answer, attempt=attempt, age=age, now=self._clock.wall())
        except Exception:  # a strategy is the application's code, and must not stop the worker
            _logger.exception("the retry policy of profile %r raised; the delivery is given up", profile)
            return Failed("policy_error")

    def _outcome(self, lease: Lease, prepared: Prepared, sent: Sent, verdict: Verdict) -> Outcome:
        state, retry_in = DeliveryState.FAILED, 0
        match verdict:
            case Succeeded():
                state = DeliveryState.SUCCEEDED
            case Retry(delay):
                state, retry_in = DeliveryState.PENDING, delay
            case _:
                pass
        return Outcome(
            lease.delivery_id,
            lease.token,
            lease.endpoint_id,
            state,
            _record(prepared, sent),
            retry_in,
            gone=isinstance(verdict, Gone),
        )

    # -- settle -------------------------------------------------------------------------------------------------

    async def _settle(self, outcome: Outcome) -> Settled:
        while True:
            try:
                return (await self._storage.settle([outcome]))[0]
            except StorageClosed:
                raise
            except StorageError as error:
                # The result stays here, in a slot that stays taken: what is kept is bound by the number of slots.
                _logger.warning("a result could not be written yet: %s", error)
                await self._clock.sleep(_SETTLE_AGAIN)

    # -- report -------------------------------------------------------------------------------------------------

    def _report(self, lease: Lease, outcome: Outcome, verdict: Verdict, settled: Settled) -> None:
        if settled.held and outcome.state.final:
            self._on_ended(lease.event_id)
        if not self._observers.wanted:
            return
        tell, about, attempt = self._observers.report, _about(lease), outcome.attempt
        if not settled.held:
            tell(LeaseLost(**about))
            return
        if attempt is not None and outcome.state is DeliveryState.SUCCEEDED:
            tell(DeliverySucceeded(**about, status=attempt.status or 0, duration=attempt.duration / SECOND))
            return
        error, status = "interrupted", None
        if attempt is not None:
            error, status = attempt.error or "", attempt.status
            tell(AttemptFailed(**about, status=status, error=error, duration=attempt.duration / SECOND))
        if settled.next_attempt_at is not None:
            tell(DeliveryRetrying(**about, next_attempt_at=to_datetime(settled.next_attempt_at), error=error))
        else:
            reason = verdict.reason if isinstance(verdict, Failed) else "gone"
            tell(DeliveryFailed(**about, reason=reason, status=status, error=error))
        if settled.health is not None and settled.health.disabled:
            tell(EndpointDisabled(endpoint_id=lease.endpoint_id, reason="gone"))


class _About(TypedDict):
    delivery_id: str
    event_id: str
    event_type: str
    endpoint_id: str
    attempt: int


def _about(lease: Lease) -> _About:
    return {
        "delivery_id": lease.delivery_id,
        "event_id": lease.event_id,
        "event_type": lease.event_type,
        "endpoint_id": lease.endpoint_id,
        "attempt": lease.number,
    }


def _record(prepared: Prepared, sent: Sent) -> AttemptRecord:
    answer = sent.answer
    if isinstance(answer, Failure):
        return AttemptRecord(
            sent.started_at,
            sent.duration,
            error=answer.code,
            detail=answer.detail or None,
            body_sha256=prepared.body_sha256,
        )
    return AttemptRecord(
        sent.started_at,
        sent.duration,
        status=answer.status,
        error=None if 200 <= answer.status < 300 else "http_status",  # 2xx is success
        response_headers=tuple((name, _blank_text(value, prepared)) for name, value in answer.headers),
        response_body=_blank(answer.body, prepared),
        response_truncated=answer.truncated,
        body_sha256=prepared.body_sha256,
    )


def _blank(body: bytes, prepared: Prepared) -> bytes:
    """Blank the secrets that a receiver echoes: they must not reach the history."""
    if body:
        for value in _secret_values(prepared):
            body = body.replace(value.encode(), b"[secret]")
    return body


def _blank_text(text: str, prepared: Prepared) -> str:
    for value in _secret_values(prepared):
        text = text.replace(value, "[secret]")
    return text


def _secret_values(prepared: Prepared) -> list[str]:
    values: list[str] = []
    for secret, _ in prepared.endpoint.secrets:
        text = secret.reveal()
        # Also without the prefix: a receiver that echoes its configuration may show only the base64 part.
        values.extend([text, text.removeprefix("whsec_")])
    return values + [value for _, value in prepared.endpoint.row.headers]
