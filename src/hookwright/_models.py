"""The values: what applications read (frozen dataclasses) and what the hot path hands on (named tuples).

`DELIVERY_STATES` is the delivery's state machine as a table; `docs/design.md` draws its diagram from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003  # whoever reads the dataclasses' types needs it: pydantic, web frameworks
from enum import StrEnum
from typing import Any, Final, Generic, NamedTuple, TypeVar

from hookwright._addresses import masked_url
from hookwright._clock import SECOND, to_datetime
from hookwright._errors import ValidationFailed
from hookwright._health import NO_HEALTH, Change, EndpointHealth
from hookwright._secret import Secret  # noqa: TC001  # the same

T = TypeVar("T")

AttributeValue = str | int | bool | Sequence[str | int | bool]
"""What an event's attribute may be: one value, or several of which any may match."""


class AllTenants(StrEnum):
    """The type of `ALL_TENANTS`: `endpoints.create(url, tenant=ALL_TENANTS)` receives every tenant's events, and those
    of none.
    """

    ALL = "*"


ALL_TENANTS: Final = AllTenants.ALL
"""`tenant=ALL_TENANTS`: the endpoint receives the events of every tenant, and of none. Refused but in `create`."""

Tenant = str | AllTenants | None


class EndpointState(StrEnum):
    """What an endpoint does with new events: deliver, hold, or record as skipped."""

    ACTIVE = "active"
    PAUSED = "paused"
    DISABLED = "disabled"


class DeliveryState(StrEnum):
    """Where a delivery stands. Waiting, leased and retrying are `pending`: there is no "executing" to be stuck in."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def final(self) -> bool:
        """Whether nothing more happens by itself."""
        return self is not DeliveryState.PENDING


DELIVERY_STATES: Final[tuple[tuple[DeliveryState | None, str, DeliveryState], ...]] = (
    (None, "emit", DeliveryState.PENDING),
    (None, "emit, endpoint disabled", DeliveryState.SKIPPED),
    (DeliveryState.PENDING, "attempt failed, retry due later", DeliveryState.PENDING),
    (DeliveryState.PENDING, "2xx", DeliveryState.SUCCEEDED),
    (DeliveryState.PENDING, "retries exhausted, 410 Gone, or body cannot be rendered", DeliveryState.FAILED),
    (DeliveryState.PENDING, "endpoint disabled", DeliveryState.SKIPPED),
    (DeliveryState.PENDING, "cancel, or endpoint deleted", DeliveryState.CANCELLED),
    (DeliveryState.FAILED, "retry or replay", DeliveryState.PENDING),
    (DeliveryState.SKIPPED, "retry or replay", DeliveryState.PENDING),
    (DeliveryState.CANCELLED, "retry or replay", DeliveryState.PENDING),
    (DeliveryState.SUCCEEDED, "retry with force", DeliveryState.PENDING),
)
"""(from, because of, to). `None` is before the delivery exists."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What the application emitted, snapshotted at that moment. `data` is the exact JSON that was stored.

    After `expunge` the data is empty and `expunged_at` says when. Data, attributes and key are not in its `repr`.
    """

    id: str
    type: str
    data: bytes = field(repr=False)
    tenant: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict, repr=False)
    occurred_at: datetime
    created_at: datetime
    idempotency_key: str | None = field(default=None, repr=False)
    trace_context: str | None = None
    expunged_at: datetime | None = None


class LastDelivery(NamedTuple):
    """How an endpoint answered last, and when."""

    success: bool
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A subscribed receiver. Header values are never read back, and `secret` is set only on what `create` and
    `rotate_secret` returned; later there is `secret_last4`.

    `failing_since` is the time of the first of the `consecutive_failures`. `rate_limit` is in attempts per second.
    """

    id: str
    url: str
    events: tuple[str, ...]
    name: str | None = None
    description: str | None = None
    filters: Mapping[str, tuple[str | int | bool, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    header_names: tuple[str, ...] = ()
    tenant: Tenant = None
    profile: str = "default"
    concurrency: int | None = None
    timeout: float | None = None
    rate_limit: float | None = None
    state: EndpointState = EndpointState.ACTIVE
    disabled_reason: str | None = None
    created_at: datetime
    updated_at: datetime
    consecutive_failures: int = 0
    failing_since: datetime | None = None
    last_delivery: LastDelivery | None = None
    secret: Secret | None = None
    secret_last4: str = ""

    def __repr__(self) -> str:
        return (
            f"Endpoint(id={self.id!r}, url={masked_url(self.url)!r}, events={self.events!r}, tenant={self.tenant!r},"
            f" state={self.state.value!r})"
        )


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One event on its way to one endpoint. `next_attempt_at` is None once the delivery has ended."""

    id: str
    event_id: str
    event_type: str
    endpoint_id: str
    state: DeliveryState
    attempt_count: int = 0
    created_at: datetime
    next_attempt_at: datetime | None = None
    finished_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One HTTP try. `error` is a code (see `docs/design.md`), `detail` its cause; the body is as it came, capped."""

    delivery_id: str
    number: int
    started_at: datetime
    duration: float
    status: int | None = None
    error: str | None = None
    detail: str | None = None
    response_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    response_body: bytes = field(default=b"", repr=False)
    response_truncated: bool = False
    body_sha256: str | None = None

    @property
    def response_text(self) -> str:
        """The response's body as text, whatever the receiver sent: what is no UTF-8 is replaced."""
        return self.response_body.decode("utf-8", "replace")


class EndpointStats(NamedTuple):
    """How an endpoint's attempts went. Durations in seconds, None when there were no attempts."""

    attempts: int
    failures: int
    p50: float | None
    p95: float | None
    p99: float | None
    slowest: float | None


class Payload(NamedTuple):
    """What a delivery sends: the exact body, and the headers as of now with secret values masked.

    `changed`: the body is no longer what the last attempt sent, since the profile was changed; None: there was none.
    """

    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    changed: bool | None

    def __repr__(self) -> str:
        return f"Payload(url={masked_url(self.url)!r}, {len(self.body)} bytes, changed={self.changed})"


class Health(NamedTuple):
    """How a dispatcher does.

    `state` is `new`, `healthy`, `degraded` (something is wrong, and it goes on trying), `standby` (another process
    delivers), `failed` (somebody has to look) or `closed`; docs/reliability.md says what to do in each. `problems` say
    in words what is wrong, endpoints that cannot be sent to included. `pending` and `leased` deliveries are counted up
    to 10,000; None: not known, as the storage is not open or cannot be read. `oldest_due` is how long (seconds) the
    oldest delivery that could be sent now has been waiting, as far as is known; `lag` how late the last attempt began
    (held back by a pause or a limit, too). `lost_leases` counts results that came too late.
    """

    state: str
    is_delivering: bool
    pending: int | None
    leased: int | None
    in_flight: int
    oldest_due: float | None
    lag: float
    lost_leases: int
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """A slice of a list, newest first, and the cursor that continues it (None at the end). Iterates over its items."""

    items: tuple[T, ...]
    next_cursor: str | None = None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


PAGE_LIMIT = 500
"""Items on a page at most."""


def check_id(field: str, value: object) -> str:
    """Return an id or a name, or raise ValidationFailed: an object is easily given in place of its `.id`."""
    if not isinstance(value, str):
        raise ValidationFailed(field, f"must be text, such as an `.id`, not {type(value).__name__}")
    return check_text(field, value)


def check_text(field: str, value: str) -> str:
    """Return a text that UTF-8 and every database can hold, or raise ValidationFailed."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValidationFailed(field, "holds half a surrogate pair, which is no text") from None
    if "\0" in value:
        raise ValidationFailed(field, "holds U+0000, which databases do not take in a text")
    return value


def check_reader(tenant: str | None) -> str | None:
    """Return whose things are asked for (None: everybody's), or raise ValidationFailed."""
    if tenant is ALL_TENANTS:
        raise ValidationFailed("tenant", "ALL_TENANTS is for endpoints.create: to read every tenant's, give None")
    return None if tenant is None else check_id("tenant", tenant)


def check_limit(limit: int) -> int:
    """Return a page's size, or raise ValidationFailed."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= PAGE_LIMIT:
        raise ValidationFailed("limit", f"must be a whole number from 1 to {PAGE_LIMIT}, not {limit!r}")
    return limit


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `emit` returns once the event is safe. `duplicate`: it had been stored before, nothing was added.

    Not `durable`: it was emitted with `connection=`, and is accepted only: stored when the caller's transaction
    commits, and gone if that does not.
    """

    event_id: str
    delivery_count: int
    duplicate: bool = False
    durable: bool = True


class EventRow(NamedTuple):
    """An event ready to be stored: validated, its data already bytes. Times in microseconds UTC."""

    id: str
    type: str
    data: bytes
    occurred_at: int
    tenant: str | None = None
    attributes: str = "{}"
    idempotency_key: str | None = None
    digest: bytes | None = None
    trace_context: str | None = None

    def __repr__(self) -> str:
        return f"EventRow(id={self.id!r}, type={self.type!r})"


class NewDelivery(NamedTuple):
    """One row of the fan-out. `available_at` 0 is at once, whatever a clock does; `skipped` rows are only recorded."""

    id: str
    endpoint_id: str
    available_at: int = 0
    skipped: bool = False


class Key(NamedTuple):
    """A signing secret as it is stored. `expires_at` (microseconds UTC): when it stops signing; None is never."""

    text: str
    expires_at: int | None = None

    def __repr__(self) -> str:
        return f"Key(expires_at={self.expires_at})"


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """An endpoint as storage keeps it, with what `Endpoint` never shows: the keys, newest first, and header values.

    `revision` is the storage's endpoint counter at the last change of anything that matching or sending reads.
    """

    id: str
    url: str
    events: tuple[str, ...]
    created_at: int
    updated_at: int
    keys: tuple[Key, ...] = ()
    name: str | None = None
    description: str | None = None
    filters: Mapping[str, tuple[str | int | bool, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tenant: Tenant = None
    profile: str = "default"
    concurrency: int | None = None
    timeout: float | None = None
    rate_limit: float | None = None
    state: EndpointState = EndpointState.ACTIVE
    disabled_reason: str | None = None
    deleted: bool = False
    revision: int = 0
    health: EndpointHealth = NO_HEALTH

    def __repr__(self) -> str:
        return f"EndpointRow(id={self.id!r}, revision={self.revision})"

    def serves(self, tenant: str | None) -> bool:
        """Whether it may get events of this tenant (None: of none)."""
        return self.tenant is ALL_TENANTS or self.tenant == tenant


class Lease(NamedTuple):
    """The right to attempt a delivery until `until` (steady microseconds), under `token`.

    `number` is the coming attempt's. `spent` is how many attempts have counted against the retry policy so far;
    `since` is when the budget began (at emit, or at the last retry by hand);
    `interruptions` how often a process died with this delivery in flight; `taken_over` says that it just happened.
    `proven` says that the endpoint answered its last attempt with success, in this process.
    """

    delivery_id: str
    token: str
    until: int
    endpoint_id: str
    event_id: str
    event_type: str
    data: bytes
    tenant: str | None
    occurred_at: int
    created_at: int
    since: int
    due_at: int
    number: int
    spent: int
    interruptions: int
    taken_over: bool
    proven: bool

    def __repr__(self) -> str:
        return f"Lease(delivery_id={self.delivery_id!r}, endpoint_id={self.endpoint_id!r}, number={self.number})"


class Claim(NamedTuple):
    """What a claim brought, and when to come again: the next time anything becomes due (None: nothing is waiting).

    `endpoints_revision` is the storage's endpoint counter: whoever sends must know the endpoints as of it.
    """

    leases: list[Lease]
    next_due: int | None
    endpoints_revision: int


class AttemptRecord(NamedTuple):
    """One try, as it is stored. Times in microseconds UTC."""

    started_at: int
    duration: int
    status: int | None = None
    error: str | None = None
    detail: str | None = None
    response_headers: tuple[tuple[str, str], ...] = ()
    response_body: bytes = b""
    response_truncated: bool = False
    body_sha256: bytes | None = None

    def __repr__(self) -> str:
        return f"AttemptRecord(status={self.status}, error={self.error!r}, detail={self.detail!r})"


def to_attempt(delivery_id: str, number: int, record: AttemptRecord) -> Attempt:
    """Return what an application reads of a stored attempt."""
    return Attempt(
        delivery_id=delivery_id,
        number=number,
        started_at=to_datetime(record.started_at),
        duration=record.duration / SECOND,
        status=record.status,
        error=record.error,
        detail=record.detail,
        response_headers=record.response_headers,
        response_body=record.response_body,
        response_truncated=record.response_truncated,
        body_sha256=record.body_sha256.hex() if record.body_sha256 is not None else None,
    )


TEST_TYPE = "hookwright.test"
"""The type of the event that `endpoints.test` sends; it is never sent again."""


class Emission(NamedTuple):
    """An event with its rows: what is stored together."""

    event: EventRow
    deliveries: Sequence[NewDelivery]


class Outcome(NamedTuple):
    """A leased delivery's new state. `retry_in` (microseconds) goes with PENDING; `gone` disables the endpoint as well.

    `attempt` is None when nothing was sent (the budget was already spent on interruptions). `counts`: it says something
    about the endpoint. `hold` (microseconds) closes its lane for that long. `throttled`: it is one of the answers that
    ask for a pause, whose length grows with their number in a row and is multiplied by this (0: it is none of them).
    `alerts` are events to store in the same transaction if they come true: `failed`, or the value of a Change.
    """

    delivery_id: str
    token: str
    endpoint_id: str
    state: DeliveryState
    attempt: AttemptRecord | None
    retry_in: int = 0
    gone: bool = False
    counts: bool = True
    hold: int = 0
    throttled: float = 0.0
    alerts: Sequence[tuple[str, Emission]] = ()


class Settled(NamedTuple):
    """Whether the lease still held (if not, nothing was written), and what became of delivery and endpoint.

    `proven`: the endpoint answered with success just now; None when it no longer exists. `changes` are what this very
    outcome brought about, and `reason` why it was disabled. `stopped`: it is disabled or deleted, and rows of it wait
    to be swept.
    """

    held: bool
    next_attempt_at: int | None = None
    proven: bool | None = None
    failures: int = 0
    changes: tuple[Change, ...] = ()
    reason: str | None = None
    stopped: bool = False
