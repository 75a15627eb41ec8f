"""The model of leases: who may send what, what an answer makes of a delivery, and why it is sent again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hookwright import DeliveryState, EndpointState
from hookwright._health import Change
from tests.simulation._rules import DISABLE_AFTER, DISABLE_FAILURES, FREE, LEASE, SCHEDULES, SECOND

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hookwright._models import Claim, Lease, Outcome, Settled
    from hookwright.storage._base import ClaimRequest
    from tests.simulation._model import Model, Row

_THROTTLING = {"429", "502", "503", "504", "timeout", "connect_timeout", "connect_error", "dns_error", "tls_error"}
_HOLD_MOST = 600 * SECOND
_UNTRIED_MOST = 48 * 3600 * SECOND
_COOL_DOWN_MOST = 60


@dataclass
class Held:
    """A lease as its process has it. `answer` is the transport's, `at` the model's count when it was claimed."""

    delivery_id: str
    number: int
    until: int
    at: int
    sent: bool = False
    reached: bool = False
    answer: str | None = None
    retry_after: float = 0.0


class Holder(Protocol):
    """A process, as far as leases go."""

    number: int
    alive: bool
    leases: dict[str, Held]


class Leases:
    """Follows every lease from claim to its end."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._require = model.require
        self.delivering: Holder | None = None
        self.lost: set[str] = set()
        """Tokens that nobody works on: what claimed them was not told, or they could not be given back."""

    def acquired(self, process: Holder, now: int) -> None:
        """A process may deliver: what the one before it had leased is free, and no hold is longer than it could be."""
        if self.delivering is process:
            return
        self._require(self.delivering is None, f"process {process.number} delivers beside another")
        self.delivering = process
        for row in self._model.rows.values():
            row.until = 0
        for endpoint in self._model.endpoints.values():
            endpoint.hold_until = min(endpoint.hold_until, now + _HOLD_MOST)
            untried = now - endpoint.last_at
            if endpoint.failing_since is not None and not 0 <= untried <= _UNTRIED_MOST:
                endpoint.failing_since = now

    def ended(self, process: Holder) -> None:
        """A process has closed its storage, or died."""
        if self.delivering is process:
            self.delivering = None

    # -- claim --------------------------------------------------------------------------------------------------

    def claimed(self, process: Holder, request: ClaimRequest, claim: Claim, now: int) -> None:
        """Rows were leased: each must have been free, due, and its endpoint active."""
        self._require(self.delivering is process, f"process {process.number} claims, and does not deliver")
        self._require(len(claim.leases) <= request.limit, f"{len(claim.leases)} leases, the limit is {request.limit}")
        for lease in claim.leases:
            row = self._model.rows.get(lease.delivery_id)
            if row is None:
                self._require(False, f"{lease.delivery_id} was claimed, and does not exist")
                continue
            self._check_claimable(process, request, row, now)
            if row.token is not None:
                self._take_over(process, row, now)
            expected = (len(row.attempts) + 1, row.spent, now + round(LEASE * SECOND))
            has = (lease.number, lease.spent, lease.until)
            self._require(has == expected, f"{row.id}: number, spent, until are {has}, and not {expected}")
            row.token, row.until, row.holder = lease.token, lease.until, process.number
            process.leases[row.id] = Held(row.id, lease.number, lease.until, self._model.at)

    def _check_claimable(self, process: Holder, request: ClaimRequest, row: Row, now: int) -> None:
        endpoint = self._model.endpoints[row.endpoint_id]
        self._require(row.state is DeliveryState.PENDING, f"{row.id} was claimed, and is {row.state}")
        active = endpoint.now.state is EndpointState.ACTIVE and not endpoint.now.deleted
        self._require(active, f"{row.id} was claimed, its endpoint is {endpoint.now.state}")
        self._require(endpoint.hold_until <= now, f"{row.id} was claimed, its endpoint is held")
        due = row.until if row.token is not None else row.due
        self._require(due <= now, f"{row.id} was claimed {due - now} too early")
        held = request.in_flight.get(row.endpoint_id, ())
        self._require(row.id not in held, f"{row.id} was claimed twice by process {process.number}")

    def _take_over(self, process: Holder, row: Row, now: int) -> None:
        explained = row.token in self.lost or row.holder != process.number
        self._require(explained, f"{row.id}: its lease was taken over without a reason")
        row.attempts.append("interrupted")
        row.interruptions += 1
        row.spent += row.interruptions > FREE

    def never_told(self, claim: Claim) -> None:
        """A claim took effect, and its caller was not told."""
        self.lost |= {lease.token for lease in claim.leases}

    # -- settle -------------------------------------------------------------------------------------------------

    def settled(self, process: Holder, outcomes: Sequence[Outcome], results: Sequence[Settled], now: int) -> None:
        """Results were written: those whose token still stood, and only they."""
        for outcome, result in zip(outcomes, results, strict=True):
            row = self._model.rows.get(outcome.delivery_id)
            held = row is not None and row.token is not None and row.token == outcome.token
            self._require(result.held == held, f"{outcome.delivery_id}: held={result.held}")
            if row is not None and held:
                self._settle(process.leases[row.id], row, outcome, result, now)

    def _settle(self, held: Held, row: Row, outcome: Outcome, result: Settled, now: int) -> None:
        row.token = None
        if outcome.attempt is None:
            self._require(row.interruptions > FREE and not held.sent, f"{row.id}: was given up, and not for crashes")
        else:
            said = str(outcome.attempt.status or outcome.attempt.error)
            self._require(said == held.answer, f"{row.id}: {said} was written, the answer was {held.answer}")
            row.attempts.append(said)
            row.spent += 1
        endpoint = self._model.endpoints[row.endpoint_id]
        most = len(SCHEDULES[endpoint.profile])
        self._require(row.spent <= most, f"{row.id}: {row.spent} attempts, the policy has {most}")
        gone = outcome.attempt is not None and held.answer == "410"
        expected = DeliveryState.FAILED if gone or row.spent >= most else DeliveryState.PENDING
        if outcome.attempt is not None and (held.answer or "").startswith("2"):
            expected = DeliveryState.SUCCEEDED
        self._require(outcome.state is expected, f"{row.id} became {outcome.state}, and not {expected}: {held}")
        row.state, row.why = outcome.state, f"settled {held.answer}"
        if outcome.state is DeliveryState.PENDING:
            row.due = now + outcome.retry_in
            floor = max(held.retry_after, SCHEDULES[endpoint.profile][min(row.spent, most - 1)])
            self._require(outcome.retry_in >= floor * SECOND, f"{row.id}: a retry after {outcome.retry_in}")
        self._model.settled.add((row.id, held.number, outcome.state))
        self._health(row, outcome, result, gone=gone, now=now)

    def _health(self, row: Row, outcome: Outcome, result: Settled, *, gone: bool, now: int) -> None:
        endpoint = self._model.endpoints[row.endpoint_id]
        if outcome.attempt is not None:
            endpoint.last_at = now
        if outcome.attempt is not None and outcome.state is DeliveryState.SUCCEEDED:
            endpoint.failures, endpoint.failing_since, endpoint.throttles = 0, None, 0
        elif outcome.attempt is not None:
            endpoint.failures += 1
            endpoint.failing_since = endpoint.failing_since or now
            throttled = row.attempts[-1] in _THROTTLING
            endpoint.throttles = endpoint.throttles + 1 if throttled else 0
            if throttled or outcome.hold:
                pause = min(_COOL_DOWN_MOST, 2 ** (endpoint.throttles - 1)) * outcome.throttled if throttled else 0
                endpoint.hold_until = max(endpoint.hold_until, now + max(round(pause * SECOND), outcome.hold))
        long = endpoint.failing_since is not None and now - endpoint.failing_since >= DISABLE_AFTER * SECOND
        failing = long and endpoint.failures >= DISABLE_FAILURES and outcome.attempt is not None
        stops = (gone or failing) and endpoint.stopped is None
        self._require((Change.DISABLED in result.changes) == stops, f"{endpoint.id}: {result.changes}, gone={gone}")
        if stops:
            self._model.stop(endpoint.id, deleted=False)
            endpoint.hold_until = 0

    # -- other ends ---------------------------------------------------------------------------------------------

    def released(self, leases: Sequence[Lease], now: int, *, sent: bool = False, hold: int = 0) -> None:
        """Leases were given back."""
        for lease in leases:
            row = self._model.rows.get(lease.delivery_id)
            if row is None or row.token is None or row.token != lease.token:
                continue
            row.token, row.why = None, "given back"
            if sent:
                row.attempts.append("interrupted")
            if hold:
                endpoint = self._model.endpoints[row.endpoint_id]
                endpoint.hold_until = max(endpoint.hold_until, now + hold)

    def not_released(self, leases: Sequence[Lease]) -> None:
        """Leases were to be given back, and that failed: they end by themselves."""
        self.lost |= {lease.token for lease in leases}

    def requeued(self, ids: Sequence[str], states: Collection[DeliveryState], count: int) -> None:
        """Rows were made due again by hand, with a new budget."""
        rows = [self._model.rows[id] for id in ids if id in self._model.rows]
        again = [
            row
            for row in rows
            if row.state in states and row.token is None and not self._model.endpoints[row.endpoint_id].stopped
        ]
        self._require(count == len(again), f"{count} were requeued, and not {len(again)}")
        for row in again:
            row.state, row.due, row.spent, row.why = DeliveryState.PENDING, 0, 0, "requeued"

    def cancelled(self, ids: Sequence[str], ended: Collection[str]) -> None:
        """Rows were ended by hand."""
        rows = [self._model.rows[id] for id in ids if id in self._model.rows]
        pending = [row for row in rows if row.state is DeliveryState.PENDING]
        self._require(set(ended) == {row.id for row in pending}, f"{ended} were cancelled, and not {pending}")
        for row in pending:
            if row.token is not None:
                row.attempts.append("interrupted")
            row.state, row.token, row.why = DeliveryState.CANCELLED, None, "cancelled by hand"
            self._model.cancelled.add(row.id)

    def swept(self, now: int) -> None:
        """The rows of stopped endpoints ended, but for those that are leased."""
        for row in self._model.rows.values():
            state = self._model.endpoints[row.endpoint_id].stopped
            if state is None or row.state is not DeliveryState.PENDING:
                continue
            if row.token is None or row.until <= now:
                row.attempts += [] if row.token is None else ["interrupted"]
                row.state, row.token, row.why = state, None, "swept"
