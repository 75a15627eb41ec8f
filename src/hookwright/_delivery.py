"""One lease, to what came of one attempt: `attempt` is the story, each step is told below it, in the same order.

`settle` writes what came of several, and tells of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from hookwright._blank import blank, blank_headers, blank_text, secrets_of
from hookwright._catalogue import RESERVED
from hookwright._clock import SECOND, to_datetime
from hookwright._deadlines import Deadlines
from hookwright._errors import ConflictError, StorageClosed, StorageError
from hookwright._health import Change
from hookwright._models import AttemptRecord, DeliveryState, Outcome
from hookwright._observe import (
    AttemptFailed,
    AttemptStarted,
    DeliveryFailed,
    DeliveryRetrying,
    DeliverySucceeded,
    EndpointDisabled,
    EndpointFailing,
    EndpointRecovered,
    LeaseLost,
    WorkerFailed,
)
from hookwright._prepare import Prepared, Unrenderable, Unusable
from hookwright._retry import Failed, Gone, Retry, RetryPolicy, Succeeded, retry_after
from hookwright.storage._base import FREE_INTERRUPTIONS, HOLD_MOST
from hookwright.transport._base import Failure, Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookwright._clock import Clock
    from hookwright._conditions import Conditions
    from hookwright._health import HealthPolicy
    from hookwright._models import Emission, Lease, Settled
    from hookwright._observe import ObserverHub
    from hookwright._prepare import Preparer
    from hookwright._profile import Profile
    from hookwright._retry import Random, Verdict
    from hookwright.storage._base import Storage
    from hookwright.transport._base import Transport

_logger = logging.getLogger("hookwright")

LEASE_MARGIN = 5.0
"""Seconds by which a lease must outlast the attempt's total timeout when its request leaves."""

LEASE_SLACK = 5.0
"""Seconds that may pass from a claim to a request: the loop may be late, and leases are given back when it is later."""

UNUSABLE_HOLD = 60.0
"""Seconds for which an endpoint waits whose profile, key or signer cannot be used."""

SPREAD_MOST = 60.0
"""Seconds over which deliveries are spread at most that were interrupted too often: 2, doubled each time."""

LOCAL_HOLD = 1.0
"""Seconds for which an endpoint waits when this machine had no descriptor or port left for it."""

COOL_DOWN_JITTER = 0.25
"""By how much a pause may be longer than planned."""

ENDPOINT_HOLD_MOST = HOLD_MOST / SECOND
"""Seconds for which `Retry-After` closes a whole endpoint at most; the delivery itself waits as long as it says."""

_THROTTLING = frozenset([429, 502, 503, 504])
_THROTTLING_FAILURES = frozenset(["timeout", "connect_timeout", "connect_error", "dns_error", "tls_error"])

_LATE = "the transport did not keep to the total timeout"

_SETTLE_AGAIN = 1.0
"""Seconds between tries to write a result while the storage cannot take it."""


class Sent(NamedTuple):
    """What came of sending. Times in steady microseconds."""

    answer: Response | Failure
    started_at: int
    duration: int


class Attempted(NamedTuple):
    """A lease and what came of it, to be written."""

    lease: Lease
    outcome: Outcome
    verdict: Verdict


def longest_timeout(lease: float) -> float:
    """Return the seconds that an attempt may last under a lease of that length."""
    return lease - LEASE_MARGIN - LEASE_SLACK


class Deliverer:
    """Carries leases out. `on_ended` is told the event's id when a delivery ended."""

    def __init__(
        self,
        storage: Storage,
        transport: Transport,
        *,
        preparer: Preparer,
        clock: Clock,
        observers: ObserverHub,
        conditions: Conditions,
        health: HealthPolicy,
        lease: float,
        random: Random,
        alert: Callable[[str, str, dict[str, Any]], Emission | None] | None,
        on_ended: Callable[[str], None],
    ) -> None:
        self._storage = storage
        self._transport = transport
        self._preparer = preparer
        self._clock = clock
        self._observers = observers
        self._conditions = conditions
        self._unwritten = 0
        self._health = health
        self._longest = longest_timeout(lease)
        self._random = random
        self._alert = alert
        self._on_ended = on_ended
        self._standard = RetryPolicy.standard(random=random)
        self._deadlines = Deadlines()
        self._warned: dict[str, str] = {}
        self.lost_leases = 0

    async def attempt(self, lease: Lease) -> Attempted | None:
        """Attempt the delivery and judge what came of it; None when the lease was given back unused.

        Raises StorageError when it could not be given back: it ends by itself.
        """
        prepared = self._prepare(lease)
        if not isinstance(prepared, Prepared):
            return await self._without_request(lease, prepared)
        if not self._lease_covers(lease, prepared.request):
            await self._release(lease)
            return None
        sent = await self._send(lease, prepared.request)
        if isinstance(sent.answer, Failure) and sent.answer.code == "local_error":
            await self._not_sent(lease, sent.answer)
            return None
        verdict = self._judge(lease, prepared.profile, sent)
        return Attempted(lease, self._outcome(lease, prepared, sent, verdict), verdict)

    async def try_out(self, lease: Lease) -> tuple[AttemptRecord, bool]:
        """Send once what the lease says, and return what came of it and whether it succeeded. Nothing is written.

        Raises ConflictError when nothing can be sent.
        """
        prepared = self._preparer.prepare(lease)
        if isinstance(prepared, Unusable):
            raise ConflictError(f"endpoint {lease.endpoint_id} cannot be sent to: {prepared.reason or 'deleted'}")
        if isinstance(prepared, Unrenderable):
            return _render_error(self._clock.now(), prepared), False
        sent = await self._send(lease, prepared.request)
        if isinstance(sent.answer, Failure) and sent.answer.code == "local_error":
            raise ConflictError(f"nothing could be sent from here: {sent.answer.detail}; repeat when there is room")
        return _record(prepared, sent), isinstance(self._judge(lease, prepared.profile, sent), Succeeded)

    # -- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self, lease: Lease) -> Prepared | Unusable | Outcome:
        found = self._preparer.find(lease)
        if isinstance(found, Unusable):
            return found
        endpoint, outline = found
        if lease.taken_over and lease.interruptions > FREE_INTERRUPTIONS:
            given_up = self._poisoned(lease, outline.profile)
            if given_up is not None:
                return given_up
        if outline.total_timeout > self._longest:
            return Unusable(f"its timeout of {outline.total_timeout:g} s does not fit the lease")
        prepared = self._preparer.render(lease, endpoint, outline)
        if isinstance(prepared, Unrenderable):
            record = _render_error(self._clock.now(), prepared)
            return self._ended_unsent(lease, DeliveryState.FAILED, record)
        if isinstance(prepared, Prepared) and self._warned:
            self._warned.pop(lease.endpoint_id, None)
        return prepared

    def _poisoned(self, lease: Lease, profile: Profile) -> Outcome | None:
        """Let the policy judge a delivery in whose company we died too often; None: go on and try."""
        verdict = self._judged(lease, profile, Failure("interrupted"), attempt=lease.spent)
        if isinstance(verdict, Retry):
            # Which of those that were in flight together kills us is not known: spread, they are not together again.
            spread = min(SPREAD_MOST, 2.0 ** (lease.interruptions - FREE_INTERRUPTIONS)) * self._random.random()
            return self._ended_unsent(lease, DeliveryState.PENDING, None, verdict.delay + round(spread * SECOND))
        return self._ended_unsent(lease, DeliveryState.FAILED, None)

    def _ended_unsent(
        self, lease: Lease, state: DeliveryState, record: AttemptRecord | None, retry_in: int = 0
    ) -> Outcome:
        return Outcome(
            lease.delivery_id,
            lease.token,
            lease.endpoint_id,
            state,
            record,
            retry_in,
            counts=False,
            alerts=self._alerts(lease, state, record, gone=False),
        )

    async def _without_request(self, lease: Lease, why: Unusable | Outcome) -> Attempted | None:
        if isinstance(why, Outcome):
            return Attempted(lease, why, Failed("exhausted" if why.attempt is None else "render_error"))
        if why.reason is not None and self._warned.get(lease.endpoint_id) != why.reason:
            self._warned[lease.endpoint_id] = why.reason
            _logger.warning("endpoint %s waits, it cannot be sent to: %s", lease.endpoint_id, why.reason)
        await self._release(lease, hold=UNUSABLE_HOLD)
        return None

    @property
    def unusable(self) -> Sequence[str]:
        """Endpoints that cannot be sent to, and why: what was warned of, and whatever cannot be opened."""
        found = {**self._warned, **self._preparer.broken}
        return [f"endpoint {endpoint_id}: {reason}" for endpoint_id, reason in found.items()]

    # -- send ---------------------------------------------------------------------------------------------------

    def _lease_covers(self, lease: Lease, request: Request) -> bool:
        # The loop may have stood still since the claim; another process may hold the delivery before we would end.
        return lease.until - self._clock.now() >= round((request.total_timeout + LEASE_MARGIN) * SECOND)

    async def _send(self, lease: Lease, request: Request) -> Sent:
        if self._observers.wanted:
            self._observers.report(AttemptStarted(**_about(lease)))
        task, started_at = self._deadlines.begin(request.total_timeout), self._clock.now()
        try:
            answer = await self._transport.send(request)
            if not isinstance(answer, (Response, Failure)) or not isinstance(answer[0], (int, str)):
                answer = Failure("transport_error", f"it returned {type(answer).__name__}, no Response and no Failure")
        except TimeoutError:
            answer = Failure("timeout", _LATE)
        except asyncio.CancelledError:
            if self._deadlines.has_stopped(task):
                answer = Failure("timeout", _LATE)
            elif task.cancelling():
                raise
            else:
                answer = Failure("transport_error", "CancelledError")  # something in it was cancelled, and not we
        except Exception as error:  # noqa: BLE001  # a transport may be the application's; a failure is a value
            answer = Failure("transport_error", type(error).__name__)
        finally:
            self._deadlines.end(task)
        return Sent(answer, started_at, self._clock.now() - started_at)

    async def _not_sent(self, lease: Lease, failure: Failure) -> None:
        """Give the lease back: it is this machine that could not send, which says nothing of the endpoint."""
        self._conditions.passing("send", f"attempts cannot be made from here: {failure.detail}")
        self._observers.report(WorkerFailed(error=f"local_error: {failure.detail}", retry_in=LOCAL_HOLD))
        await self._release(lease, hold=LOCAL_HOLD)

    async def _release(self, lease: Lease, hold: float = 0.0) -> None:
        try:
            await self._storage.release([lease], hold=round(hold * SECOND))
        except StorageClosed:
            raise
        except StorageError as error:
            _logger.warning("a lease could not be given back: %s", error)
            raise

    # -- judge --------------------------------------------------------------------------------------------------

    def _judge(self, lease: Lease, profile: Profile, sent: Sent) -> Verdict:
        return self._judged(lease, profile, sent.answer, attempt=lease.spent + 1)

    def _judged(self, lease: Lease, profile: Profile, answer: Response | Failure, *, attempt: int) -> Verdict:
        age = self._clock.now() - lease.since
        try:
            return profile.retry.judge(answer, attempt=attempt, age=age, now=self._clock.wall())
        except Exception:  # a strategy is the application's code: its defects must neither stop us nor lose a delivery
            _logger.exception("a retry policy raised; the standard one decides instead: %r", profile.retry)
            return self._standard.judge(answer, attempt=attempt, age=age, now=self._clock.wall())

    def _outcome(self, lease: Lease, prepared: Prepared, sent: Sent, verdict: Verdict) -> Outcome:
        record = _record(prepared, sent)
        state, retry_in, gone, throttled, hold = DeliveryState.SUCCEEDED, 0, False, 0.0, 0
        if not isinstance(verdict, Succeeded):
            state, gone = DeliveryState.FAILED, isinstance(verdict, Gone)
            throttled, hold = self._pause(sent.answer)
            if isinstance(verdict, Retry):
                state, retry_in = DeliveryState.PENDING, verdict.delay
        return Outcome(
            lease.delivery_id,
            lease.token,
            lease.endpoint_id,
            state,
            record,
            retry_in,
            gone,
            hold=hold,
            throttled=throttled,
            alerts=self._alerts(lease, state, record, gone=gone) if self._alert is not None else (),
        )

    def _pause(self, answer: Response | Failure) -> tuple[float, int]:
        """Return how an answer that asks for a pause closes the endpoint's lane: `throttled` and `hold` of Outcome."""
        if isinstance(answer, Failure):
            throttled, asked = answer.code in _THROTTLING_FAILURES, 0.0
        else:
            throttled, asked = answer.status in _THROTTLING, retry_after(answer, self._clock.wall())
        pause = 1.0 + COOL_DOWN_JITTER * self._random.random() if throttled else 0.0
        return pause, round(min(asked, ENDPOINT_HOLD_MOST) * SECOND)

    def _alerts(
        self, lease: Lease, state: DeliveryState, record: AttemptRecord | None, *, gone: bool
    ) -> Sequence[tuple[str, Emission]]:
        """Return the operational events that settling may make true. There are none about operational events."""
        alert = self._alert
        if alert is None or lease.event_type.startswith(RESERVED):
            return ()
        endpoint: dict[str, Any] = {
            "endpoint_id": lease.endpoint_id,
            "error": record.error if record is not None else "interrupted",
            "status": record.status if record is not None else None,
        }
        delivery = endpoint | {
            "delivery_id": lease.delivery_id,
            "event_id": lease.event_id,
            "event_type": lease.event_type,
            "attempt_count": lease.number if record is not None else lease.number - 1,
        }
        possible: list[tuple[str, str, dict[str, Any]]] = []
        if state is DeliveryState.SUCCEEDED:
            possible.append(("recovered", "endpoint.recovered", endpoint))
        else:
            possible.append(("failing", "endpoint.failing", endpoint | {"failures": self._health.failing_at}))
            possible.append(("disabled", "endpoint.disabled", endpoint | {"reason": "gone" if gone else "failing"}))
        if state is DeliveryState.FAILED:
            possible.append(("failed", "delivery.failed", delivery))
        found = ((name, alert(RESERVED + type, lease.endpoint_id, data)) for name, type, data in possible)
        return [(name, emission) for name, emission in found if emission is not None]

    # -- settle -------------------------------------------------------------------------------------------------

    async def settle(self, attempted: Sequence[Attempted]) -> list[Settled]:
        """Write what came of attempts, all or none, and tell of it. Raises what the storage raises."""
        answers = await self._storage.settle([each.outcome for each in attempted], self._health)
        for each, settled in list(zip(attempted, answers, strict=True)):
            try:
                self._report(*each, settled)
            except Exception:  # it is written, and so are the others
                _logger.exception("what came of delivery %s could not be told", each.lease.delivery_id)
        return answers

    async def settle_later(self, attempted: Attempted, error: StorageError) -> Settled:
        """Keep one that the storage could not take, and try until it can. Raises StorageClosed."""
        # It stays in a slot that stays taken: what is kept is bound by the number of slots.
        self._unwritten += 1
        if self._unwritten == 1:
            _logger.warning("results cannot be written; they are kept and tried again until they can: %s", error)
        try:
            while True:
                self._conditions.trouble("settle", f"{self._unwritten} results wait to be written", error)
                await self._clock.sleep(_SETTLE_AGAIN)
                try:
                    return (await self.settle([attempted]))[0]
                except StorageClosed:
                    raise
                except StorageError as again:
                    error = again
        finally:
            self._unwritten -= 1
            if not self._unwritten:
                self._conditions.over("settle")

    # -- report -------------------------------------------------------------------------------------------------

    def _report(self, lease: Lease, outcome: Outcome, verdict: Verdict, settled: Settled) -> None:
        if settled.held and outcome.state.final:
            self._on_ended(lease.event_id)
        if not settled.held:
            self.lost_leases += 1
        if not self._observers.wanted:
            return
        tell, about, attempt = self._observers.report, _about(lease), outcome.attempt
        if not settled.held:
            tell(LeaseLost(**about))
            return
        if attempt is not None and outcome.state is DeliveryState.SUCCEEDED:
            tell(DeliverySucceeded(**about, status=attempt.status or 0, duration=attempt.duration / SECOND))
            self._report_endpoint(lease.endpoint_id, settled)
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
        self._report_endpoint(lease.endpoint_id, settled)

    def _report_endpoint(self, endpoint_id: str, settled: Settled) -> None:
        for change in settled.changes:
            if change is Change.FAILING:
                self._observers.report(EndpointFailing(endpoint_id=endpoint_id, failures=settled.failures))
            elif change is Change.RECOVERED:
                self._observers.report(EndpointRecovered(endpoint_id=endpoint_id))
            else:
                self._observers.report(EndpointDisabled(endpoint_id=endpoint_id, reason=settled.reason))


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


def _render_error(now: int, why: Unrenderable) -> AttemptRecord:
    return AttemptRecord(now, 0, error="render_error", detail=why.error)


def _record(prepared: Prepared, sent: Sent) -> AttemptRecord:
    answer = sent.answer
    if isinstance(answer, Failure):
        return AttemptRecord(
            sent.started_at,
            sent.duration,
            error=answer.code,
            detail=blank_text(answer.detail, secrets_of(prepared)) if answer.detail else None,
            body_sha256=prepared.body_sha256,
        )
    headers, body = answer.headers, answer.body
    if headers or body:
        secrets = secrets_of(prepared)
        headers, body = blank_headers(headers, secrets), blank(body, secrets, truncated=answer.truncated)
    return AttemptRecord(
        sent.started_at,
        sent.duration,
        answer.status,
        None if 200 <= answer.status < 300 else "http_status",  # 2xx is success
        response_headers=headers,
        response_body=body,
        response_truncated=answer.truncated,
        body_sha256=prepared.body_sha256,
    )
