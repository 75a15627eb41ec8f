"""The facade that an application embeds. Start reading here: `emit` at the top, then downward through the layers."""

from __future__ import annotations

import asyncio
import logging
import os
import random as random_module
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Self, TypeVar

from hookwright._clock import SECOND, Clock
from hookwright._conditions import Conditions
from hookwright._deliveries import Deliveries
from hookwright._delivery import Deliverer
from hookwright._emitter import Emitter
from hookwright._endpoints import Endpoints
from hookwright._errors import ConfigurationError
from hookwright._events import Events
from hookwright._matching import EndpointCache
from hookwright._models import Health, Receipt
from hookwright._observe import DeliveryCancelled, ObserverHub
from hookwright._prepare import Preparer
from hookwright._profile import Profile
from hookwright._services import Services
from hookwright._settings import (
    check_parts,
    check_settings,
    health_policy,
    id_prefix,
    network_of,
    storage_of,
    transport_of,
    vault_of,
)
from hookwright._snapshot import NewEvent
from hookwright._version import __version__
from hookwright._worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from hookwright._addresses import NetworkPolicy
    from hookwright._catalogue import Catalogue
    from hookwright._explain import Explanation
    from hookwright._models import AttributeValue
    from hookwright._observe import Observation, Subscription
    from hookwright._retry import Random
    from hookwright._vault import EncryptionKey
    from hookwright.storage._base import Storage
    from hookwright.transport._base import Transport

    ObserverT = TypeVar("ObserverT", bound=Callable[..., object])

_logger = logging.getLogger("hookwright")

# Seconds that closing may take beyond `shutdown_timeout`: observers and connections are closed at the same time.
_OBSERVER_GRACE = 0.5
_TRANSPORT_GRACE = 0.2


class _State(Enum):
    NEW = "has not been started: use `async with Dispatcher(...)`, or await start()"
    RUNNING = "is running"
    CLOSED = "is closed: create a new one"


class Dispatcher:
    """Emits events to subscribed HTTP endpoints: durably, signed, retried, without another service.

    `storage` is `"sqlite:///hooks.db"` (relative), `"sqlite:////var/lib/hooks.db"` (absolute),
    `"postgresql://user:password@host/database"`, `"memory:"` (lost with the process: for tests), or a Storage, such as
    `PostgresStorage(...)`. `profiles` name the ways endpoints are spoken to. `network` says where may be sent to: by
    default what the transport was given, or else public addresses over HTTPS only. `concurrency` attempts are in flight
    at once, of these `endpoint_concurrency` to one endpoint. Times are in seconds: a `lease` must outlast the longest
    attempt by 10 s; `shutdown_timeout` is how long `aclose` lets attempts finish. Events older than `retention` (None:
    never) go, unless a delivery is pending. An endpoint with nothing but failures for `disable_after` (None: never),
    and at least 20, is disabled. With a `catalogue`, only its event types exist. `operational_events` makes events of
    what happens to endpoints and failed deliveries: `hookwright.endpoint.failing`, `.recovered`, `.disabled` and
    `hookwright.delivery.failed`, for endpoints that subscribe to them or to `hookwright.*` (`*` does not match them).
    They carry the tenant of the endpoint that they are about: an operator's endpoint has `tenant=ALL_TENANTS`.
    `endpoint_id_prefix` begins the ids of endpoints; `random` spreads pauses. `deliver=False` makes a process that
    emits and reads but leaves delivering to another. `keys` encrypt what is stored of endpoints' secrets and header
    values: the first does, the others still open what they once encrypted (see `endpoints.reencrypt`). An endpoint
    whose key is missing is held, never sent to unsigned. `keys=[]` stores clear text; so does None, with a warning.

    Processes may share a storage. On SQLite one delivers and others stand by to take over; on PostgreSQL all deliver.

    Raises ConfigurationError for settings that do not go together.

    ```python
    from hookwright import Dispatcher, NetworkPolicy
    from hookwright.testing import Inbox

    async with Inbox() as inbox, Dispatcher("memory:", network=NetworkPolicy.development()) as dispatcher:
        await dispatcher.endpoints.create(inbox.url, events=["video.*"])
        receipt = await dispatcher.emit("video.processed", {"video_id": "vid_123", "status": "ready"})
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=5)
        print(delivery.state)
    ```
    """

    def __init__(
        self,
        storage: str | Storage = "sqlite:///hooks.db",
        *,
        profiles: Mapping[str, Profile] | None = None,
        network: NetworkPolicy | None = None,
        transport: Transport | None = None,
        clock: Clock | None = None,
        concurrency: int = 256,
        endpoint_concurrency: int = 4,
        lease: float = 60.0,
        shutdown_timeout: float = 10.0,
        retention: timedelta | None = timedelta(days=30),
        disable_after: timedelta | None = timedelta(days=5),
        catalogue: Catalogue | None = None,
        operational_events: bool = False,
        endpoint_id_prefix: str = "ep",
        random: Random | None = None,
        deliver: bool = True,
        keys: Sequence[EncryptionKey] | None = None,
    ) -> None:
        check_parts(profiles, network, transport, clock, catalogue)
        profiles = {"default": Profile(), **(profiles or {})}
        check_settings(profiles, concurrency, endpoint_concurrency, lease, shutdown_timeout, retention)
        network = network_of(network, transport)
        self._storage = storage_of(storage)
        self._transport = transport_of(transport, network)
        self._clock = clock or Clock()
        self._shutdown_timeout = shutdown_timeout
        self._deliver = deliver
        self._observers = ObserverHub()
        self._conditions = Conditions(self._clock)
        self._vault = vault_of(keys, self._storage)
        self._cache = EndpointCache(self._storage, self._vault)
        self._preparer = Preparer(
            self._cache,
            profiles,
            clock=self._clock,
            user_agent=f"hookwright/{__version__}",
            endpoint_concurrency=endpoint_concurrency,
        )
        self._emitter = Emitter(
            self._storage,
            cache=self._cache,
            catalogue=catalogue,
            clock=self._clock,
            observers=self._observers,
            conditions=self._conditions,
            preparer=self._preparer,
            on_storing=self._wake,
            on_stored=lambda: self._worker.note_stored(),
            on_stopped_endpoints=self._endpoints_changed,
        )
        self._deliverer = Deliverer(
            self._storage,
            self._transport,
            preparer=self._preparer,
            clock=self._clock,
            observers=self._observers,
            conditions=self._conditions,
            health=health_policy(disable_after),
            lease=lease,
            random=random or random_module.Random(),  # noqa: S311  # spreads load, guards nothing
            alert=self._emitter.alert if operational_events else None,
            on_ended=self._note_ended,
        )
        self._make_facades(network, profiles, catalogue, id_prefix(endpoint_id_prefix), lease, operational_events)
        self._make_services(concurrency, endpoint_concurrency, lease, retention)
        self._state = _State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._closing: asyncio.Task[None] | None = None

    def _make_facades(
        self,
        network: NetworkPolicy,
        profiles: Mapping[str, Profile],
        catalogue: Catalogue | None,
        id_prefix: str,
        lease: float,
        operational: bool,
    ) -> None:
        self.deliveries = Deliveries(
            self._storage,
            preparer=self._preparer,
            cache=self._cache,
            clock=self._clock,
            check_usable=self._check_usable,
            on_requeued=self._wake,
            on_cancelled=self._note_cancelled,
        )
        self.events = Events(self._storage, check_usable=self._check_usable, on_cancelled=self._note_cancelled)
        self.endpoints = Endpoints(
            self._storage,
            clock=self._clock,
            network=network,
            profiles=profiles,
            cache=self._cache,
            vault=self._vault,
            catalogue=catalogue,
            operational=operational,
            id_prefix=id_prefix,
            lease=lease,
            observers=self._observers,
            check_usable=self._check_usable,
            changed=self._endpoints_changed,
            try_out=self._deliverer.try_out,
        )

    def _make_services(
        self, concurrency: int, endpoint_concurrency: int, lease: float, retention: timedelta | None
    ) -> None:
        self._worker = Worker(
            self._storage,
            self._deliverer,
            cache=self._cache,
            clock=self._clock,
            observers=self._observers,
            conditions=self._conditions,
            concurrency=concurrency,
            endpoint_concurrency=endpoint_concurrency,
            lease=lease,
            on_stopped_endpoints=self._endpoints_changed,
        )
        self._services = Services(
            self._storage,
            self._worker,
            clock=self._clock,
            observers=self._observers,
            conditions=self._conditions,
            retention=retention,
            deliver=self._deliver,
            on_swept=lambda: self.deliveries.note_ended(None),
        )

    def __repr__(self) -> str:
        return f"Dispatcher({self._storage!r}, {self._state.name.lower()})"

    # -- emit ---------------------------------------------------------------------------------------------------

    async def emit(
        self,
        type: str,
        data: object = None,
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        event_id: str | None = None,
        endpoint_id: str | None = None,
        occurred_at: datetime | None = None,
        deliver_at: datetime | None = None,
        trace_context: str | None = None,
        connection: object = None,
    ) -> Receipt:
        """Store an event and one delivery for each endpoint that wants it; return when that is on disk.

        `data` is anything JSON can hold, a pydantic model or a dataclass; it is encoded now, at most 256 KiB.
        `attributes` are what endpoints' `filters` look at, and are not sent. `tenant` says whose event it is: endpoints
        of the same tenant get it (None is a tenant of its own), and those of ALL_TENANTS. With an `idempotency_key` or
        your own `event_id`, emitting the same again stores nothing and answers `duplicate=True`. `endpoint_id` sends to
        that endpoint alone, whatever it subscribed to. `deliver_at` postpones the first attempt. `trace_context` (a W3C
        traceparent) is kept with the event. With a catalogue, the type must be declared and the data fit it.

        With a `connection` of yours (aiosqlite's, asyncpg's, psycopg's AsyncConnection, SQLAlchemy's AsyncSession or
        AsyncConnection) the event is written in your transaction: it exists, and is sent, once that commits. Nothing is
        committed for you, and `receipt.durable` is False: see docs/transactional-emit.md.

        After a cancellation or a crash the event may or may not be stored: repeat with the same key or id.

        Raises ValidationFailed (nothing was stored), ConflictError when the key or id was used for something else,
        NotFound for an unknown endpoint_id, or StorageError.
        """
        self._check_usable()
        return await self._emitter.emit(
            NewEvent(
                type,
                data,
                attributes,
                tenant,
                idempotency_key,
                event_id,
                endpoint_id,
                occurred_at,
                deliver_at,
                trace_context,
            ),
            connection,
        )

    async def emit_many(self, events: Iterable[NewEvent], *, connection: object = None) -> Sequence[Receipt]:
        """Store several events in one transaction (of yours: `connection`), all or none; return receipts in order.

        Raises what `emit` raises, for the first that is refused: then nothing was stored.
        """
        self._check_usable()
        return await self._emitter.emit_many(events, connection)

    async def explain(
        self,
        type: str,
        data: object = None,
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        tenant: str | None = None,
    ) -> Explanation:
        """Return who would get this event, who would not and why, and the exact requests. Nothing is written or sent.

        With a `tenant`, endpoints that can never serve it, other tenants' and those of none, are left out.

        Raises what `emit` raises for the same arguments.

        ```python
        from hookwright import Dispatcher

        async with Dispatcher("memory:") as dispatcher:
            await dispatcher.endpoints.create("https://example.com/webhooks", events=["export.*"])
            explanation = await dispatcher.explain("video.processed", {"video_id": "vid_123"})
            print(explanation.mismatches[0].reason)
        ```
        """
        self._check_usable()
        return await self._emitter.explain(NewEvent(type, data, attributes, tenant))

    # -- observe ------------------------------------------------------------------------------------------------

    def on(self, *kinds: type[Observation]) -> Callable[[ObserverT], ObserverT]:
        """Decorate an observer of these Observation classes and their subclasses (none: of all). See `observe`.

        Raises ConfigurationError for `@dispatcher.on` without parentheses.
        """
        if any(not isinstance(kind, type) for kind in kinds):
            raise ConfigurationError("use @dispatcher.on() for all, or @dispatcher.on(DeliveryFailed) for some")

        def register(function: ObserverT) -> ObserverT:
            self.observe(function, *kinds)
            return function

        return register

    def observe(self, function: Callable[..., object], *kinds: type[Observation]) -> Subscription:
        """Call `function` with every observation of these classes and their subclasses (none: of all).

        A plain function runs at once and must not block. An async one has a queue of 1,000 and sees things in order;
        when it is slower than that, the newest are dropped and counted in `.dropped`. Observers hear of what this
        process did, after it was stored, at most once. What they raise is logged once and changes nothing.
        """
        return self._observers.subscribe(function, kinds)

    async def health(self) -> Health:
        """Return how this dispatcher does: cheap enough to be asked for every second, whatever the backlog.

        Works before start and after close too, and says so; a storage that cannot answer is one of the `problems`.
        """
        pending = leased = oldest = None
        if self._state is _State.RUNNING:
            try:
                pending, leased, oldest = await self._storage.backlog()
                self._conditions.over("read")
            except Exception as error:  # noqa: BLE001  # whoever asks for health wants to hear what is wrong
                self._conditions.trouble("read", "the storage cannot be read", error)
        problems = (*self._conditions.problems, *self._deliverer.unusable)
        return Health(
            state=self._condition(problems),
            is_delivering=self._services.delivering,
            pending=pending,
            leased=leased,
            in_flight=self._worker.in_flight,
            oldest_due=None if oldest is None else max(0, self._clock.now() - oldest) / SECOND,
            lag=self._worker.lag,
            lost_leases=self._deliverer.lost_leases,
            problems=problems,
        )

    def _condition(self, problems: Sequence[str]) -> str:
        if self._state is _State.CLOSED:
            return "closed"
        if self._conditions.failed:
            return "failed"
        if self._state is _State.NEW:
            return "new"
        if problems:
            return "degraded"
        return "standby" if self._deliver and not self._services.delivering else "healthy"

    # -- life ---------------------------------------------------------------------------------------------------

    @property
    def is_delivering(self) -> bool:
        """Whether this process delivers; False while it stands by, with `deliver=False`, and when not running."""
        return self._services.delivering

    async def start(self) -> None:
        """Open the storage and begin to deliver. Raises ConfigurationError when started before, or StorageError."""
        if self._state is not _State.NEW:
            raise ConfigurationError(f"the dispatcher {self._state.value}")
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        try:
            await self._begin()
        except Exception as error:
            self._conditions.trouble("start", "it could not be started", error, fatal=True)
            raise
        self._conditions.over("start")
        self._state = _State.RUNNING

    async def _begin(self) -> None:
        await self._storage.open(self._clock)
        try:
            await self._cache.refresh()
            await self._services.start()
        except BaseException:
            await self._storage.close()
            raise

    async def aclose(self) -> None:
        """Stop claiming, let attempts finish for `shutdown_timeout`, give back the rest at no cost, close everything.

        It takes less than a second beyond that, whatever hangs: receivers, observers (they have half a second for what
        waits in their queues), or another's lock on the database. Only a disk that does not answer is waited for. What
        could not be written is delivered again by whoever delivers next. Harmless when repeated, or when it was never
        started. When it is cancelled the closing goes on: call it again to wait for that, or to try again what failed.
        Raises StorageError.
        """
        if self._closing is None and self._state is not _State.RUNNING:
            self._state = _State.CLOSED
            return
        if self._closing is None or _has_failed(self._closing):
            if self._state is _State.RUNNING:
                self._check_usable()
            self._state = _State.CLOSED
            self._closing = asyncio.get_running_loop().create_task(self._close(), name="hookwright-closing")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._services.stop(self._shutdown_timeout)
        await self._emitter.aclose()
        await asyncio.gather(self._observers.aclose(_OBSERVER_GRACE), self._close_storage())

    async def _close_storage(self) -> None:
        # It may be the application's: the storage is closed, whatever it does.
        closing = asyncio.ensure_future(self._transport.aclose())
        done, _ = await asyncio.wait({closing}, timeout=_TRANSPORT_GRACE)
        if not done:
            closing.cancel()
            _logger.warning("the transport did not close in time: left behind")
        elif not closing.cancelled() and closing.exception() is not None:
            _logger.warning("the transport could not be closed", exc_info=closing.exception())
        await self._storage.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def drain(self, timeout: float | None = None) -> None:
        """Return when nothing is due now and nothing is in flight; retries due later and held lanes do not count.

        Raises WaitTimeout after `timeout` seconds of the dispatcher's clock (one that stands still never ends it), or
        ConfigurationError in a process that does not deliver.
        """
        self._check_usable()
        if not self._services.delivering:
            raise ConfigurationError("this process does not deliver, it cannot drain: wait for events instead")
        await self._worker.drain(timeout)

    def _wake(self) -> None:
        self._worker.wake()

    def _note_ended(self, event_id: str) -> None:
        self.deliveries.note_ended(event_id)

    def _note_cancelled(self, delivery_ids: list[str]) -> None:
        if not delivery_ids:
            return
        self.deliveries.note_ended(None)
        for delivery_id in delivery_ids if self._observers.wanted else ():
            self._observers.report(DeliveryCancelled(delivery_id=delivery_id))

    def _endpoints_changed(self) -> None:
        self._services.endpoints_changed()

    def _check_usable(self) -> None:
        if self._state is not _State.RUNNING:
            raise ConfigurationError(f"the dispatcher {self._state.value}")
        if os.getpid() != self._pid:
            raise ConfigurationError("the process was forked after start(): create the dispatcher in the child")
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError("the dispatcher was started in another event loop: use it in that one")


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
