"""One process of the application: a dispatcher with a clock, a way to the storage and a transport of its own."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hookwright import (
    AttemptFailed,
    DeliveryCancelled,
    DeliveryFailed,
    DeliveryRetrying,
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    EndpointDisabled,
    EventEmitted,
    WorkerFailed,
)
from hookwright._clock import Clock
from tests.simulation._loop import owner, simulated, turns
from tests.simulation._port import Port, storage_through
from tests.simulation._receivers import Wire
from tests.simulation._rules import DISABLE_AFTER, ENDPOINT_CONCURRENCY, LEASE, RETENTION, profiles

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

    from hookwright import Observation, Transport
    from hookwright.testing import VirtualClock
    from tests.simulation._leases import Held
    from tests.simulation._port import Disk
    from tests.simulation._receivers import Receivers

_UNWINDING = 50


class ProcessClock(Clock):
    """Steady time as a process has it: the wall clock when it began, plus the time since."""

    def __init__(self, base: VirtualClock) -> None:
        self._base = base
        self._ahead = base.wall() - base.now()

    def now(self) -> int:
        return self._base.now() + self._ahead

    def wall(self) -> int:
        return self._base.wall()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Any:
        return self._base.call_later(seconds, callback)


class Process:
    """Started once, and ended once: by `close`, or by `crash`."""

    def __init__(
        self,
        number: int,
        disk: Disk,
        receivers: Receivers,
        base: VirtualClock,
        chance: random.Random,
        *,
        deliver: bool,
        concurrency: int,
        shutdown_timeout: float,
        around: Callable[[Transport], Transport],
    ) -> None:
        self.number = number
        self.alive = True
        self.closing = False
        self.concurrency = concurrency
        self.deliver = deliver
        self.clock = ProcessClock(base)
        self.leases: dict[str, Held] = {}
        self._disk = disk
        self.port = Port(disk, self)
        self.wire = Wire(receivers, disk, self)
        self.dispatcher = Dispatcher(
            storage_through(self.port),
            profiles=profiles(),
            transport=around(self.wire),
            clock=self.clock,
            concurrency=concurrency,
            endpoint_concurrency=ENDPOINT_CONCURRENCY,
            lease=LEASE,
            shutdown_timeout=shutdown_timeout,
            retention=timedelta(seconds=RETENTION),
            disable_after=timedelta(seconds=DISABLE_AFTER),
            random=chance,
            deliver=deliver,
            keys=[],
        )
        self.dispatcher.observe(self._hear)

    def run(self, action: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin something on this process's behalf; it dies with it."""
        token = owner.set(self.number)
        try:
            return asyncio.get_running_loop().create_task(action)
        finally:
            owner.reset(token)

    async def start(self) -> None:
        await self.run(self.dispatcher.start())

    async def close(self) -> None:
        """End well."""
        self.closing = True
        await self.run(self.dispatcher.aclose())
        self.wire.under_way.clear()

    async def crash(self) -> None:
        """End now: nothing that it still does reaches anything."""
        self.alive = False
        self.wire.die()
        loop = simulated()
        await turns(3)  # what was made but not begun must begin, or it would complain
        for _ in range(_UNWINDING):
            tasks = loop.tasks_of(self.number)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            await turns(3)
        assert not loop.tasks_of(self.number), "something outlives its process"
        await self.port.hang_up()

    # -- what observers are told ----------------------------------------------------------------------------------

    def _hear(self, observation: Observation) -> None:
        model = self._disk.model
        about = vars(observation)
        ended = {
            DeliverySucceeded: DeliveryState.SUCCEEDED,
            DeliveryRetrying: DeliveryState.PENDING,
            DeliveryFailed: DeliveryState.FAILED,
        }.get(type(observation))
        true = True
        if not self.alive:
            return
        if ended is not None:
            true = (about["delivery_id"], about["attempt"], ended) in model.settled
        elif isinstance(observation, AttemptFailed):
            true = any(
                (observation.delivery_id, observation.attempt, state) in model.settled for state in DeliveryState
            )
        elif isinstance(observation, EventEmitted):
            true = observation.event_id in model.ever
        elif isinstance(observation, DeliveryCancelled):
            true = observation.delivery_id in model.cancelled
        elif isinstance(observation, EndpointDisabled):
            true = observation.endpoint_id in model.disabled
        elif isinstance(observation, WorkerFailed):
            true = "injected" in observation.error
        model.require(true, f"process {self.number} was told what is not so: {observation}")
