"""Emit: snapshot the arguments, match, store event and deliveries in one transaction, wake the worker."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import to_json

from hookwright._clock import from_datetime
from hookwright._errors import NotFound, StaleEndpoints, StorageError, ValidationFailed
from hookwright._explain import Explanation, Match, Mismatch, match_of, may_be_told, why_not
from hookwright._ids import new_id, new_ids
from hookwright._models import ALL_TENANTS, Emission, EventRow, NewDelivery, Receipt, check_id
from hookwright._observe import EventEmitted
from hookwright._prepare import lease_of
from hookwright._snapshot import NewEvent, check_aware, snapshot
from hookwright.storage._connections import adapted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hookwright._catalogue import Catalogue
    from hookwright._clock import Clock
    from hookwright._conditions import Conditions
    from hookwright._matching import EndpointCache
    from hookwright._observe import ObserverHub
    from hookwright._prepare import Preparer
    from hookwright.storage._base import Storage
    from hookwright.storage._connections import CallersConnection

_logger = logging.getLogger("hookwright")

_EXPLAINED_AT_ONCE = 100
"""Endpoints that `explain` looks at before other tasks of the loop have their turn."""


class _Emitting(NamedTuple):
    """An event on its way into the outbox: what it is matched by, and when it may be sent."""

    event: EventRow
    terms: frozenset[str]
    endpoint_id: str | None
    available_at: int


class Emitter:
    """Puts events into the outbox."""

    def __init__(
        self,
        storage: Storage,
        *,
        cache: EndpointCache,
        catalogue: Catalogue | None,
        clock: Clock,
        observers: ObserverHub,
        conditions: Conditions,
        preparer: Preparer,
        on_storing: Callable[[], None],
        on_stored: Callable[[], None],
        on_stopped_endpoints: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._cache = cache
        self._catalogue = catalogue
        self._clock = clock
        self._observers = observers
        self._conditions = conditions
        self._preparer = preparer
        self._on_storing = on_storing
        self._on_stored = on_stored
        self._on_stopped_endpoints = on_stopped_endpoints
        self._watching: set[asyncio.Task[None]] = set()
        self._risk = storage.connection_risk

    async def aclose(self) -> None:
        """Watch the application's transactions no longer: what they commit is delivered by whoever delivers next."""
        watching = [*self._watching]
        for task in watching:
            task.cancel()
        if watching:
            await asyncio.wait(watching)

    async def emit(self, new: NewEvent, connection: object = None) -> Receipt:
        """See `Dispatcher.emit`."""
        if connection is not None:
            [receipt] = await self._emit_through(connection, [new])
            return receipt
        emitting = self._emitting(new)
        if emitting.endpoint_id is not None:
            await self._check_serves(emitting.endpoint_id, new.tenant)
        while True:
            revision = self._cache.revision
            event, deliveries = self._match(emitting)
            if deliveries:
                self._on_storing()
            try:
                receipt = await self._storage.enqueue(event, deliveries, endpoints_revision=revision)
            except StaleEndpoints:
                await self._match_again(revision)
            except BaseException as error:
                self._not_told(error)
                raise
            else:
                self._conditions.over("emit")
                self._tell_emitted(event, receipt)
                return receipt

    async def emit_many(self, events: Iterable[NewEvent], connection: object = None) -> Sequence[Receipt]:
        """See `Dispatcher.emit_many`."""
        given = [] if isinstance(events, NewEvent) else list(events)
        if isinstance(events, NewEvent) or not all(isinstance(event, NewEvent) for event in given):
            raise ValidationFailed("events", "give a list of NewEvent: emit_many([NewEvent('video.ready', data)])")
        if connection is not None:
            return await self._emit_through(connection, given)
        emitting = await self._checked(given)
        while True:
            revision = self._cache.revision
            emissions = [self._match(one) for one in emitting]
            self._on_storing()
            try:
                receipts = await self._storage.enqueue_many(emissions, endpoints_revision=revision)
            except StaleEndpoints:
                await self._match_again(revision)
            except BaseException as error:
                self._not_told(error)
                raise
            else:
                self._conditions.over("emit")
                for emission, receipt in zip(emissions, receipts, strict=True):
                    self._tell_emitted(emission.event, receipt)
                return receipts

    async def _checked(self, events: Sequence[NewEvent]) -> list[_Emitting]:
        emitting = [self._emitting(event) for event in events]
        for one in emitting:
            if one.endpoint_id is not None:
                await self._check_serves(one.endpoint_id, one.event.tenant)
        return emitting

    async def _emit_through(self, connection: object, events: Sequence[NewEvent]) -> list[Receipt]:
        """Write through a connection of the application's. The worker is woken when its transaction has ended."""
        emitting = await self._checked(events)
        callers = await adapted(connection)
        if self._risk is not None:
            _logger.warning(self._risk)
            self._risk = None
        while True:
            revision = self._cache.revision
            emissions = [self._match(one) for one in emitting]
            try:
                receipts = await self._store_through(callers, emissions, revision)
            except StaleEndpoints:  # nothing of ours is in the transaction
                await self._match_again(revision)
            else:
                if any(receipt.delivery_count and not receipt.duplicate for receipt in receipts):
                    self._watch(callers)
                for emission, receipt in zip(emissions, receipts, strict=True):
                    if not receipt.duplicate:
                        self._report(emission.event, receipt)
                return [replace(receipt, durable=False) for receipt in receipts]

    async def _store_through(
        self, connection: CallersConnection, emissions: Sequence[Emission], revision: int
    ) -> list[Receipt]:
        if len(emissions) != 1:
            return await self._storage.enqueue_many(emissions, endpoints_revision=revision, connection=connection)
        [(event, deliveries)] = emissions
        return [await self._storage.enqueue(event, deliveries, endpoints_revision=revision, connection=connection)]

    def _watch(self, connection: CallersConnection) -> None:
        watching = self._storage.watch(connection, self._on_storing)
        if watching is not None:
            task = asyncio.get_running_loop().create_task(watching, name="hookwright-watching-a-transaction")
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)

    def _emitting(self, new: NewEvent) -> _Emitting:
        event, terms = snapshot(new, catalogue=self._catalogue, clock=self._clock)
        available_at = 0 if new.deliver_at is None else max(0, from_datetime(check_aware("deliver_at", new.deliver_at)))
        return _Emitting(event, terms, new.endpoint_id, available_at)

    def _not_told(self, error: BaseException) -> None:
        """It was cancelled or failed, and may be stored all the same: then nobody else would send it."""
        self._on_storing()
        if isinstance(error, StorageError):
            self._conditions.passing("emit", "an event could not be stored", error)

    async def _match_again(self, revision: int) -> None:
        # An endpoint that was created before this emit began is never missed, whichever process created it.
        if await self._cache.refresh(revision):
            self._on_stopped_endpoints()

    def _tell_emitted(self, event: EventRow, receipt: Receipt) -> None:
        if receipt.duplicate:
            return
        self._on_stored()
        self._report(event, receipt)

    def _report(self, event: EventRow, receipt: Receipt) -> None:
        if self._observers.wanted:
            self._observers.report(
                EventEmitted(event_id=event.id, event_type=event.type, delivery_count=receipt.delivery_count)
            )

    async def _check_serves(self, endpoint_id: str, tenant: str | None) -> None:
        endpoint = await self._storage.get_endpoint(check_id("endpoint_id", endpoint_id))
        if not endpoint.serves(tenant):
            raise NotFound(
                f"there is no endpoint {endpoint_id!r} for tenant {tenant!r}: emit with the endpoint's tenant"
            )

    def _match(self, emitting: _Emitting) -> Emission:
        event = emitting.event
        if emitting.endpoint_id is None:
            wanting = self._cache.match(event.type, event.tenant, emitting.terms)
        else:
            wanting = [emitting.endpoint_id] if self._cache.exists(emitting.endpoint_id) else []
        return Emission(event, self._new_deliveries(wanting, emitting.available_at))

    def _new_deliveries(self, wanting: Sequence[str], available_at: int = 0) -> list[NewDelivery]:
        ids = new_ids("dlv", self._clock.now(), len(wanting))
        is_disabled = self._cache.is_disabled
        return [
            NewDelivery(id, endpoint_id, available_at, is_disabled(endpoint_id))
            for id, endpoint_id in zip(ids, wanting, strict=True)
        ]

    def alert(self, type: str, endpoint_id: str, data: dict[str, Any]) -> Emission | None:
        """Return an operational event about an endpoint, if anybody subscribed to it."""
        about = self._cache.get(endpoint_id)
        tenant = about.row.tenant if about is not None and about.row.tenant is not ALL_TENANTS else None
        wanting = self._cache.match(type, tenant, frozenset())
        if not wanting:
            return None
        now = self._clock.now()
        about_it = {"tenant": tenant, "endpoint_name": None if about is None else about.row.name}
        event = EventRow(new_id("evt", now), type, to_json(data | about_it), self._clock.wall(), tenant)
        return Emission(event, self._new_deliveries(wanting))

    async def explain(self, new: NewEvent) -> Explanation:
        """See `Dispatcher.explain`."""
        event, terms = snapshot(new, catalogue=self._catalogue, clock=self._clock)
        await self._cache.refresh()
        matches: list[Match] = []
        mismatches: list[Mismatch] = []
        for number, endpoint_id in enumerate(self._cache.all()):
            if number % _EXPLAINED_AT_ONCE == 0:
                await asyncio.sleep(0)
            row = self._cache.row(endpoint_id)
            if row is None or not may_be_told(row, event.tenant):
                continue
            reason = why_not(row, self._cache.filters(endpoint_id), event, terms)
            endpoint = self._cache.get(endpoint_id) if reason is None else None
            if reason is not None:
                mismatches.append(Mismatch(endpoint_id=endpoint_id, reason=reason))
            elif endpoint is not None:
                [delivery] = self._new_deliveries([endpoint_id])
                lease = lease_of(event, delivery, self._clock.now())
                matches.append(match_of(self._preparer, lease, endpoint))
        return Explanation(matches=tuple(matches), mismatches=tuple(mismatches))
