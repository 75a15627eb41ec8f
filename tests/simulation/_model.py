"""The reference model: what has been promised, told by the verbs that took effect, checked against its own rules."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookwright import DeliveryState, EndpointState
from tests.simulation._rules import (
    ENDPOINT_CONCURRENCY,
    RETENTION,
    SECOND,
    Intent,
    Version,
    wants,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright import Receipt
    from hookwright._models import Emission, EndpointRow, EventRow, NewDelivery


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Row:
    """A delivery. `spent` is what counts against its policy, `due` when it may be sent."""

    id: str
    event_id: str
    endpoint_id: str
    state: DeliveryState
    due: int
    why: str
    token: str | None = None
    until: int = 0
    holder: int = 0
    attempts: list[str] = field(default_factory=list)
    spent: int = 0
    interruptions: int = 0


@dataclass
class Known:
    """An endpoint: all its versions, and its health."""

    id: str
    profile: str
    versions: list[Version]
    hold_until: int = 0
    throttles: int = 0
    failures: int = 0
    failing_since: int | None = None
    last_at: int = 0

    @property
    def now(self) -> Version:
        return self.versions[-1]

    def since(self, at: int) -> list[Version]:
        """Return the version in force at `at`, and all later ones."""
        earlier = [version for version in self.versions if version.at <= at]
        return earlier[-1:] + [version for version in self.versions if version.at > at]

    @property
    def stopped(self) -> DeliveryState | None:
        """What becomes of its waiting rows when it is disabled or deleted."""
        if self.now.deleted:
            return DeliveryState.CANCELLED
        return DeliveryState.SKIPPED if self.now.state is EndpointState.DISABLED else None


@dataclass
class Told:
    """An event that is stored."""

    id: str
    intent: Intent
    created_at: int
    rows: list[Row]
    count: int


class Model:
    """Everything that is known, and what was found wrong."""

    def __init__(self) -> None:
        self.at = 0
        self.wrong: list[str] = []
        self.intents: dict[int, Intent] = {}
        self.endpoints: dict[str, Known] = {}
        self.events: dict[str, Told] = {}
        self.keys: dict[str, str] = {}
        self.rows: dict[str, Row] = {}
        self.pruned: set[str] = set()
        self.acknowledged: dict[int, str] = {}
        self.settled: set[tuple[str, int, DeliveryState]] = set()
        self.cancelled: set[str] = set()
        self.disabled: set[str] = set()
        self.ever: set[str] = set()

    def require(self, held: object, what: str) -> None:
        """Note what is wrong; it is raised where the world looks, and not into the dispatcher's arms."""
        if not held:
            self.wrong.append(what)

    # -- events -------------------------------------------------------------------------------------------------

    def enqueued(self, event: EventRow, deliveries: Sequence[NewDelivery], receipt: Receipt, now: int) -> None:
        """An event took effect: it must have exactly the rows that its intent asks for."""
        intent = self.intents[json.loads(event.data)["n"]]
        known = event.id if event.id in self.events else self.keys.get(event.idempotency_key or "")
        self.require(receipt.duplicate == (known is not None), f"{event.id}: duplicate={receipt.duplicate}")
        if known is not None or receipt.duplicate:
            self.require(receipt.event_id == known, f"{event.id}: a duplicate of {known} was told {receipt.event_id}")
            return
        self._as_meant(event, intent)
        expected = {
            endpoint.id: endpoint.now.state is EndpointState.DISABLED
            for endpoint in self.endpoints.values()
            if (wants(endpoint.now, intent) if intent.endpoint_id is None else endpoint.id == intent.endpoint_id)
            and not endpoint.now.deleted
        }
        given = {delivery.endpoint_id: delivery.skipped for delivery in deliveries}
        self.require(
            given == expected and len(deliveries) == len(given), f"{event.id}: rows {given}, and not {expected}"
        )
        self.require(
            receipt.delivery_count == sum(not skipped for skipped in expected.values()), f"{event.id}: {receipt}"
        )
        rows = [
            Row(
                delivery.id,
                event.id,
                delivery.endpoint_id,
                DeliveryState.SKIPPED if delivery.skipped else DeliveryState.PENDING,
                delivery.available_at,
                "emitted",
            )
            for delivery in deliveries
        ]
        self.rows |= {row.id: row for row in rows}
        self.events[event.id] = Told(event.id, intent, now, rows, receipt.delivery_count)
        self.ever.add(event.id)
        if event.idempotency_key is not None:
            self.keys[event.idempotency_key] = event.id

    def _as_meant(self, event: EventRow, intent: Intent) -> None:
        same = (event.type, event.tenant, event.idempotency_key) == (intent.type, intent.tenant, intent.key)
        self.require(same and intent.event_id in (None, event.id), f"{event.id}: {event.type} is not {intent}")
        attributes = {key: list(values) for key, values in intent.attributes}
        self.require(json.loads(event.attributes) == attributes, f"{event.id}: attributes {event.attributes}")

    def enqueued_many(self, emissions: Sequence[Emission], receipts: Sequence[Receipt], now: int) -> None:
        """Several took effect together."""
        for (event, deliveries), receipt in zip(emissions, receipts, strict=True):
            self.enqueued(event, deliveries, receipt, now)

    def acknowledge(self, intent: Intent, receipt: Receipt) -> None:
        """The application was told that its event is safe."""
        id = receipt.event_id
        self.require(id in self.events or id in self.pruned, f"{id} was acknowledged and is not stored")
        self.require(intent.event_id in (None, id) or intent.key is not None, f"{id}: asked for {intent.event_id}")
        told = self.events.get(id)
        if told is not None:
            self.require(told.intent.number == intent.number or receipt.duplicate, f"{id}: it is somebody else's")
            self.require(receipt.delivery_count == told.count, f"{id}: {receipt}, and not {told.count}")
        self.acknowledged[intent.number] = id

    def pruned_before(self, before: int, count: int, now: int) -> None:
        """Old events went: exactly those that are old and ended."""
        self.require(before == now - round(RETENTION * SECOND), f"pruned before {before} at {now}")
        old = [
            told
            for told in self.events.values()
            if told.created_at < before and all(row.state.final for row in told.rows)
        ]
        self.require(count == len(old), f"{count} events were pruned, and not {len(old)}")
        for told in old:
            del self.events[told.id]
            self.pruned.add(told.id)
            if told.intent.key is not None:
                self.keys.pop(told.intent.key, None)
            for row in told.rows:
                del self.rows[row.id]

    # -- endpoints ----------------------------------------------------------------------------------------------

    def stored(self, row: EndpointRow) -> None:
        """An endpoint was created, changed, or made another state."""
        known = self.endpoints.setdefault(row.id, Known(row.id, row.profile, []))
        known.versions.append(self._version(row))

    def set_state(self, row: EndpointRow) -> None:
        """An endpoint was paused, disabled or activated by hand; that ends a hold."""
        self.stored(row)
        known = self.endpoints[row.id]
        known.hold_until = 0
        if row.state is EndpointState.ACTIVE:
            known.failures, known.failing_since, known.throttles = 0, None, 0
        if row.state is EndpointState.DISABLED:
            self.disabled.add(row.id)

    def stop(self, endpoint_id: str, *, deleted: bool) -> None:
        """An endpoint was deleted, or disabled by what it answered."""
        known = self.endpoints[endpoint_id]
        known.versions.append(known.now._replace(at=self.at, state=EndpointState.DISABLED, deleted=deleted))
        self.disabled.add(endpoint_id)

    def _version(self, row: EndpointRow) -> Version:
        return Version(
            self.at,
            row.url,
            row.events,
            row.filters,
            row.tenant,
            row.keys,
            row.concurrency or ENDPOINT_CONCURRENCY,
            row.rate_limit,
            row.state,
            row.deleted,
        )

    # -- what is stored -----------------------------------------------------------------------------------------

    def compare(self, storage: Any) -> None:
        """Compare every row with the storage's; reads it from inside, so that a look costs and changes nothing."""
        self.require(storage._events.keys() == self.events.keys(), "other events are stored than should be")
        self.require(storage._rows.keys() == self.rows.keys(), "other deliveries are stored than should be")
        for row in self.rows.values():
            found = storage._rows.get(row.id)
            if found is None:
                continue
            if row.token is not None:
                self.require(found.available_at == row.until, f"{row.id} is leased until {found.available_at}")
            has = (found.state, found.token, len(found.attempts), found.interruptions, found.endpoint_id)
            should = (row.state, row.token, len(row.attempts), row.interruptions, row.endpoint_id)
            self.require(has == should, f"{row.id} is {has}, and not {should} ({row.why})")
        for known in self.endpoints.values():
            stored = storage._endpoints[known.id]
            same = (stored.state, stored.deleted) == (known.now.state, known.now.deleted)
            self.require(same, f"{known.id} is {stored.state}, deleted={stored.deleted}")
