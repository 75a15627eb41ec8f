"""The storage contract. A backend keeps these promises; `hookwright.testing.StorageContract` proves that it does.

Semantic verbs, no policy, no events, no logging. Every verb that writes is one transaction: after an error or a
cancelled caller everything of it is there, or nothing. Times are microseconds UTC of the clock given to `open`
(PostgreSQL uses its own). Words: a *lane* is an endpoint's place in the queue; a *row* is a delivery.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from hookwright._clock import SECOND
from hookwright._health import HealthPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
    from typing import Any

    from hookwright._clock import Clock
    from hookwright._models import (
        Attempt,
        AttemptRecord,
        Claim,
        Delivery,
        DeliveryState,
        Emission,
        EndpointRow,
        EndpointState,
        Event,
        EventRow,
        Lease,
        NewDelivery,
        Outcome,
        Page,
        Receipt,
        Settled,
    )
    from hookwright.storage._connections import CallersConnection

DEFAULT_HEALTH = HealthPolicy()

FREE_INTERRUPTIONS = 3
"""So many crashes of ours cost a delivery nothing; each later one costs an attempt, so that a poison pill ends."""


HOLD_MOST = 600 * SECOND
"""No lane is held for longer, but by its state. `acquire` shortens holds that a clock set back would make longer."""


UNTRIED_MOST = 2 * 24 * 3600 * SECOND
"""Time since a lane's last attempt that counts as failing, when `acquire` finds it: longer, and nobody has tried."""


def rate_interval(endpoint: EndpointRow) -> int | None:
    """Return the microseconds between two attempts to an endpoint, or None when it has no rate limit."""
    return None if endpoint.rate_limit is None else max(1, round(1_000_000 / endpoint.rate_limit))


def _tolerance(interval: int) -> int:
    # What may be sent at once: as much as a second allows, and one attempt at least.
    return max(0, 1_000_000 - interval)


def allowed(interval: int, rate_at: int, now: int) -> int:
    """Return how many attempts a rate limit allows now (the generic cell rate algorithm, ITU-T I.371)."""
    return max(0, (now + _tolerance(interval) - max(rate_at, now)) // interval + 1)


def opens_at(interval: int, rate_at: int) -> int:
    """Return when the next attempt is allowed."""
    return rate_at - _tolerance(interval)


SWEEP_ROWS = 500
"""Rows that one `sweep` transaction changes at most: a bigger one would stop every other writer."""


class ClaimRequest(NamedTuple):
    """How much to claim, and of what.

    `limit` rows at most; of these at most `unproven_limit` from endpoints that are not proven or are in `slow`.
    `in_flight` names the rows that this process holds, by endpoint: they are never claimed again and take up their
    endpoint's room. `settling` are rows whose results are being written: they take up no room, and are not claimed
    either, lest they be sent again when that fails. Of the rows that are not the only one of their endpoint, in this
    claim and in flight, `further_limit` at most. `endpoint_concurrency` is the room of an endpoint that sets none.
    `lease` is in microseconds.
    """

    limit: int
    unproven_limit: int
    lease: int
    endpoint_concurrency: int
    in_flight: Mapping[str, Collection[str]]
    slow: Collection[str] = ()
    further_limit: int = 2**31
    settling: Collection[str] = ()


CHANGES_MOST = 1_000
"""Endpoints that one `changes` should return at most: writers may have to wait for it."""


class Changes(NamedTuple):
    """The endpoints whose matching, state, url, secret or profile changed since a revision; deleted ones are marked.

    They are all that changed up to `revision`. With `more`, others have changed after it, and `revision` is greater
    than what was asked for: whoever asks goes on with `changes(revision)` until there are no more.
    """

    revision: int
    endpoints: Sequence[EndpointRow]
    more: bool = False


class DeliveryFilter(NamedTuple):
    """What `list_deliveries` and `count_deliveries` narrow by; None and () narrow nothing. `until` is exclusive."""

    states: tuple[DeliveryState, ...] = ()
    endpoint_id: str | None = None
    event_id: str | None = None
    event_type: str | None = None
    since: int | None = None
    until: int | None = None
    tenant: str | None = None


class Backlog(NamedTuple):
    """What waits: rows that are pending and leased, each counted up to BACKLOG_COUNTED, and since when the oldest of
    those that could be sent now could be.
    """

    pending: int
    leased: int
    oldest_due: int | None


class Expunged(NamedTuple):
    """What one call of `Storage.expunge` did: the deliveries it cancelled, and after which the next call goes on."""

    cancelled: list[str]
    after: str | None = None


BACKLOG_COUNTED = 10_000
"""Rows that `backlog` counts at most, so that it stays cheap."""

STATS_ROWS = 100_000
"""Attempts that `stats` looks at most at: the newest."""


class Storage(ABC):
    """Where events, deliveries, attempts and endpoints live.

    A claim sees whatever this object was asked to write before it, even when both are asked for at once: who writes an
    event or a result asks for the claim beside it, so that a storage can do both in one transaction. One that wraps
    another keeps that order: it awaits nothing before it hands on `enqueue`, `enqueue_many`, `settle` or `claim`. What
    a claim overtook lies until something else makes the worker look, for a second at most.
    """

    # -- life ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self, clock: Clock) -> None:
        """Connect and migrate forward, all or nothing.

        Raises SchemaTooNew, StorageCorrupt, StorageBusy or StorageFull, and has then changed nothing.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish what was asked for, give up the right to deliver, and disconnect. Harmless when repeated.

        Every later verb raises StorageClosed.
        """

    @abstractmethod
    async def acquire(self) -> bool:
        """Try to become the one that delivers; say whether this storage object now is.

        Whoever becomes it (the first True) frees the leases of those that died: their rows are available at once, and
        their tokens stay until the next claim, which records the interruption. Endpoints whose last attempt succeeded
        are proven, with room for one. Since the wall clock may have been set back meanwhile, no lane is held beyond
        HOLD_MOST from now, nor by its rate limit for longer than one attempt takes, and none waits behind turns of a
        later time. When nobody tried for UNTRIED_MOST, or the
        last attempt lies in the future, the time of failing begins anew.
        """

    # -- the outbox ---------------------------------------------------------------------------------------------

    @abstractmethod
    async def enqueue(
        self,
        event: EventRow,
        deliveries: Sequence[NewDelivery],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> Receipt:
        """Store the event and its rows in one durable transaction, and make each row's lane due no later than the row.

        Raises StaleEndpoints when the endpoint counter is no longer `endpoints_revision`, and ConflictError when the
        idempotency key or event id was used for something else (another digest). When it was used for the same,
        nothing is written and the first event's receipt is returned with `duplicate=True`. Rows of skipped
        deliveries are stored in state `skipped`, and are not counted in the receipt.

        With a `connection` the same is written in the caller's transaction on it: nobody sees it before that commits,
        and it is gone when that, or a savepoint around it, is rolled back. Nothing is committed, and no work of the
        caller's is rolled back or repeated. Whatever is raised, the caller's transaction holds nothing of ours, and is
        as usable as the database leaves it. Counter, keys and ids are compared as the transaction sees them.
        Raises ValidationFailed, with nothing written, for a connection that does not lead to this storage's database
        or would commit by itself.
        """

    @abstractmethod
    async def enqueue_many(
        self,
        emissions: Sequence[Emission],
        *,
        endpoints_revision: int,
        connection: CallersConnection | None = None,
    ) -> list[Receipt]:
        """Store several events with their rows, all or none, as `enqueue` stores one. Raises what it raises."""

    def watch(
        self,
        connection: CallersConnection,  # for those that have to
        committed: Callable[[], None],
    ) -> Coroutine[Any, Any, None] | None:
        """Return what calls `committed` within 20 ms of the commit of what was enqueued through the connection.

        To be run beside everything else, and cancelled at will; it ends by itself when the transaction has ended. It
        may call when nothing was committed, holds the connection weakly and runs nothing through it. None: there is
        nothing to run, since `wait` hears of such a commit as quickly, or somebody runs it for that connection already.
        """
        return None

    @property
    def connection_risk(self) -> str | None:
        """What an application should know before it uses `connection=`, if anything; it is told once."""
        return None

    @abstractmethod
    async def claim(self, request: ClaimRequest) -> Claim:
        """Lease rows that are due, under fresh tokens. No other claim brings them until the lease has ended.

        A lane is open when it is due, not held, and has room. The room of a proven endpoint is what it earned: 2 after
        its first success, then doubled by each success up to its cap; the room of any other endpoint is 1.
        Open lanes are served in turn: one that was just served comes after those that waited. Within a lane, the row
        that has been due longest comes first; one that is taken over has been since its lease ended, or since it was
        stored when `acquire` freed it. The cost is bound by `limit` and `in_flight`, not by the backlog.

        A row whose lease has ended without a result is taken over from a process that died: an `interrupted` attempt
        is written, `interruptions` counts it, and the lease says `taken_over`. Users see the row's time as it was.

        `next_due` is the earliest time after now at which a lane becomes open to a worker that holds nothing; lanes
        that are due already but found no room are not in it: they open when something settles.
        """

    @abstractmethod
    async def settle(self, outcomes: Sequence[Outcome], policy: HealthPolicy = DEFAULT_HEALTH) -> list[Settled]:
        """Write attempt, delivery state and endpoint health for each outcome whose token is still the row's.

        All or none. When it raises, they are given again, one by one.
        A stale token changes nothing and is answered with `held=False`. An expired lease that nobody took settles.
        A success proves the endpoint and resets its failures, anything else that `counts` adds one and unproves it.
        PENDING makes the row available after `retry_in`. `gone` disables the endpoint (reason `gone`) in the same
        transaction; so do failures in a row that are as many, and for as long, as the policy says (reason `failing`).
        `hold` and `throttled` close the lane for a while (see Outcome). Alerts that came true are stored as `enqueue`
        would store them, for endpoints that are neither disabled nor deleted.
        A row of a disabled or deleted endpoint that would be retried is left to `sweep`.
        """

    @abstractmethod
    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        """Give leases back: rows are available as before. With `sent`, an `interrupted` attempt that costs nothing
        is recorded for each, since a request may have left. `hold` (microseconds from now) closes their lanes until
        then; `set_endpoint_state` ends a hold early. Stale tokens change nothing.
        """

    @abstractmethod
    async def requeue(self, delivery_ids: Sequence[str], states: Collection[DeliveryState]) -> int:
        """Make those of the deliveries that are in one of the states available now, with a new budget; say how many.

        Left as they are: leased rows, rows of disabled or deleted endpoints (nobody would ever send or sweep them), and
        of expunged events and tests. The cost is that of the ids given.
        """

    @abstractmethod
    async def cancel(self, delivery_ids: Sequence[str]) -> list[str]:
        """End those of the deliveries that are pending as `cancelled`, and return their ids.

        A leased row loses its token, and an `interrupted` attempt is recorded: a request may have left.
        """

    @abstractmethod
    async def admit_test(self, endpoint_id: str, interval: int) -> None:
        """Note that an endpoint is tested now.

        Raises NotFound, or ConflictError when the last time was less than `interval` microseconds ago.
        """

    @abstractmethod
    async def record_test(self, emission: Emission, state: DeliveryState, attempt: AttemptRecord) -> None:
        """Store an event with one delivery, which has ended in this state with this one attempt.

        The endpoint's health is not touched.
        """

    @abstractmethod
    async def sweep(self) -> bool:
        """Mark waiting rows of disabled endpoints `skipped` and of deleted ones `cancelled`, SWEEP_ROWS at most.

        Rows that are leased are left until their lease has ended. Says whether more remains to be done now.
        """

    @abstractmethod
    async def wait(self, timeout: float) -> bool:
        """Wait until another process may have written, at most `timeout` seconds of real time; say whether it may."""

    # -- endpoints ----------------------------------------------------------------------------------------------

    @abstractmethod
    async def create_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """Store a new endpoint and its lane under the next revision, which the answer carries.

        Raises ConflictError when the id exists.
        """

    @abstractmethod
    async def update_endpoint(self, endpoint: EndpointRow) -> EndpointRow:
        """Replace what the application sets (not state, health or created_at) under the next revision.

        Raises ConflictError when the stored revision is no longer `endpoint.revision`: somebody else changed it.
        Raises NotFound for an unknown or deleted id.
        """

    @abstractmethod
    async def set_endpoint_state(self, endpoint_id: str, state: EndpointState, *, reason: str | None) -> EndpointRow:
        """Pause, disable or activate, endpoint and lane at once, under the next revision. NotFound: unknown or deleted.

        Paused: rows wait. Disabled: rows are swept. Active: rows that still wait are due as scheduled.
        """

    @abstractmethod
    async def delete_endpoint(self, endpoint_id: str) -> None:
        """Leave a tombstone without url, keys, headers and metadata, under the next revision.

        Its waiting rows are swept. NotFound: unknown or deleted.
        """

    @abstractmethod
    async def scrub_endpoints(self) -> None:
        """Make what endpoints held before they were changed or deleted unreadable, in the file and its WAL too.

        Endpoints and revisions stay as they are.
        """

    @abstractmethod
    async def get_endpoint(self, endpoint_id: str) -> EndpointRow:
        """Return it. NotFound: unknown or deleted."""

    @abstractmethod
    async def list_endpoints(self, *, limit: int, cursor: str | None, tenant: str | None) -> Page[EndpointRow]:
        """List newest first. `tenant` None lists all. ValidationFailed: a cursor that we did not make."""

    @abstractmethod
    async def changes(self, since_revision: int) -> Changes:
        """Return the endpoints with a greater revision, tombstones included, and the counter's value.

        It waits for no writer: a caller that has a transaction open may be waiting for this.

        When there are too many for one answer: those with the least revisions, and the greatest of these, with `more`.
        """

    # -- history ------------------------------------------------------------------------------------------------

    @abstractmethod
    async def get_event(self, event_id: str) -> Event:
        """Return it. NotFound: unknown."""

    @abstractmethod
    async def get_delivery(self, delivery_id: str) -> Delivery:
        """Return it. NotFound: unknown."""

    @abstractmethod
    async def list_deliveries(self, where: DeliveryFilter, *, limit: int, cursor: str | None) -> Page[Delivery]:
        """List newest first. ValidationFailed: a cursor that we did not make, or made for other filters."""

    @abstractmethod
    async def count_deliveries(self, where: DeliveryFilter) -> int:
        """Count what `list_deliveries` would list."""

    @abstractmethod
    async def attempts(self, delivery_id: str) -> list[Attempt]:
        """Return the attempts of a delivery, oldest first. NotFound: unknown delivery."""

    @abstractmethod
    async def stats(self, endpoint_id: str, since: int) -> list[tuple[int, bool]]:
        """Return duration and success of the endpoint's attempts since then, the newest first, STATS_ROWS at most."""

    @abstractmethod
    async def backlog(self) -> Backlog:
        """Return what waits, at a cost that does not grow with it beyond BACKLOG_COUNTED."""

    @abstractmethod
    async def expunge(self, event_id: str, after: str | None = None) -> Expunged:
        """Remove an event's data and attributes, and its attempts' responses, for good: from the file and its WAL too.

        The records stay, and pending deliveries are cancelled. One call may do a part only, where there are many
        deliveries: the first hides all of it from whoever reads, and the event is expunged when `Expunged.after` is
        None, to which calls with `after` lead. Whatever is sent until then is sent as it was, never without its data.
        NotFound: unknown event.
        """

    @abstractmethod
    async def prune(self, before: int) -> int:
        """Delete events created before, with deliveries and attempts, unless one is pending; SWEEP_ROWS events at most.

        Returns how many events went; 0: there is nothing left to delete.
        """
