"""Observations: what hooks are told, always after it is on disk. Observers can neither fail nor change a delivery."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, dataclass_transform

from hookwright._errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

_logger = logging.getLogger("hookwright")

_CANCEL_GRACE = 0.1
QUEUE_LENGTH = 1000
"""Observations that wait for one async observer at most; the newest are dropped and counted."""


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=True)
class Observation:
    """The base of all: subscribe to it to hear everything. `vars(observation)` gives its fields.

    Typed as dataclasses are, and made by hand: fourteen dataclasses take a twentieth of the whole import.
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an observation cannot be changed: {name}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class EventEmitted(Observation):
    """An event and its deliveries are in the outbox."""

    event_id: str
    event_type: str
    delivery_count: int


class DeliveryObservation(Observation):
    """The base of everything about one delivery."""

    delivery_id: str
    event_id: str
    event_type: str
    endpoint_id: str
    attempt: int


class AttemptStarted(DeliveryObservation):
    """A request is about to be sent. The one observation that is not about something stored, but the lease is."""


class AttemptFailed(DeliveryObservation):
    """An attempt did not succeed; `status` is the answer's, `error` the code, `duration` in seconds.

    Followed by DeliveryRetrying or DeliveryFailed for the same delivery.
    """

    status: int | None
    error: str
    duration: float


class DeliverySucceeded(DeliveryObservation):
    """The receiver answered 2xx."""

    status: int
    duration: float


class DeliveryRetrying(DeliveryObservation):
    """The delivery will be tried again, at `next_attempt_at` or soon after."""

    next_attempt_at: datetime
    error: str


class DeliveryFailed(DeliveryObservation):
    """The delivery ended without success; `reason` is `exhausted`, `refused`, `gone` or `render_error`.

    Not for what is skipped because its endpoint was disabled: see EndpointDisabled, and list those by `skipped`.
    """

    reason: str
    status: int | None
    error: str


class DeliveryCancelled(Observation):
    """A delivery was cancelled by hand; what is in flight of it changes nothing any more."""

    delivery_id: str


class EndpointFailing(Observation):
    """An endpoint has failed `failures` attempts in a row (the fourth, by default); told once until it recovers."""

    endpoint_id: str
    failures: int


class EndpointRecovered(Observation):
    """An endpoint that was failing has answered with success."""

    endpoint_id: str


class EndpointDisabled(Observation):
    """An endpoint was disabled: by the application (`reason` as given), by its answer 410 (`gone`), or because nothing
    but failures came of it for days (`failing`).
    """

    endpoint_id: str
    reason: str | None


class LeaseLost(DeliveryObservation):
    """Somebody else took the delivery over, or ended it, before our result was written: ours changed nothing."""


class WorkerFailed(Observation):
    """Something of our own failed: the storage could not be reached, or a background task died. It goes on after
    `retry_in` seconds.
    """

    error: str
    retry_in: float


class Subscription:
    """One observer's place. `dropped` counts what its full queue could not take (async observers only)."""

    def __init__(
        self, hub: ObserverHub, function: Callable[[Any], object], kinds: tuple[type[Observation], ...]
    ) -> None:
        self._hub = hub
        self._function = function
        self._kinds = kinds
        self._queue: deque[Observation] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told = False
        self._is_async: bool = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  # an instance with an async __call__ is an async observer
        )
        self.dropped = 0

    def __repr__(self) -> str:
        return f"Subscription({self._name}, dropped={self.dropped})"

    @property
    def _name(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    def offer(self, observation: Observation) -> None:
        """Hand over one observation, without waiting and without raising."""
        if not isinstance(observation, self._kinds):
            return
        if not self._is_async:
            self._call(observation)
        elif len(self._queue) >= QUEUE_LENGTH:
            self.dropped += 1
        else:
            self._queue.append(observation)
            self._arrived.set()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(
                    self._run(), name=f"hookwright-observer-{self._name}"
                )

    def _call(self, observation: Observation) -> None:
        try:
            self._function(observation)
        except Exception:  # noqa: BLE001  # an observer cannot fail a delivery
            self._report()

    async def _run(self) -> None:
        while True:
            while self._queue:
                # Removed only when it is done, so that `flush` waits for the last one too.
                try:
                    await self._function(self._queue[0])  # type: ignore[misc]  # _is_async says that it is awaitable
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    self._report()  # something that it awaited was cancelled, and not we
                except Exception:  # noqa: BLE001  # an observer cannot fail a delivery
                    self._report()
                if self._task is None:  # closed meanwhile: by itself, or deaf to the cancellation
                    return
                self._queue.popleft()
            self._hub.emptied()
            self._arrived.clear()
            await self._arrived.wait()

    def _report(self) -> None:
        if not self._told:
            self._told = True
            _logger.exception("observer %s raised; it goes on being called, this is logged once", self._name)

    @property
    def idle(self) -> bool:
        """Whether nothing waits for it."""
        return not self._queue

    async def aclose(self) -> None:
        """Stop observing. What waits in its queue is not delivered; harmless when repeated."""
        self._hub.remove(self)
        task, self._task = self._task, None
        self._queue.clear()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            _, deaf = await asyncio.wait({task}, timeout=_CANCEL_GRACE)
            if deaf:
                _logger.warning("observer %s did not end when it was cancelled: left behind", self._name)


class ObserverHub:
    """All subscriptions of a dispatcher."""

    def __init__(self) -> None:
        self._subscriptions: tuple[Subscription, ...] = ()
        self._emptied = asyncio.Event()

    def subscribe(self, function: Callable[[Any], object], kinds: tuple[type[Observation], ...]) -> Subscription:
        """Add an observer of these classes and their subclasses; none means all."""
        if not callable(function):
            raise ConfigurationError(f"an observer must be a function of one observation, not {function!r}")
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Observation)):
                raise ConfigurationError(f"{kind!r} is no Observation class: use, for example, DeliveryFailed")
        subscription = Subscription(self, function, kinds or (Observation,))
        self._subscriptions += (subscription,)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Take an observer out."""
        self._subscriptions = tuple(other for other in self._subscriptions if other is not subscription)

    @property
    def wanted(self) -> bool:
        """Whether anybody listens; lets the hot path build nothing for nobody."""
        return bool(self._subscriptions)

    def report(self, observation: Observation) -> None:
        """Tell everybody."""
        for subscription in self._subscriptions:
            subscription.offer(observation)

    def emptied(self) -> None:
        """Called by a subscription that has nothing left."""
        self._emptied.set()

    async def aclose(self, grace: float) -> None:
        """Give the queues `grace` seconds to empty, then stop all observers."""
        try:
            async with asyncio.timeout(grace):
                while not all(subscription.idle for subscription in self._subscriptions):
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            pass
        await asyncio.gather(*(subscription.aclose() for subscription in self._subscriptions))
