"""The world: one disk, receivers, a timeline, and up to two processes; everything that can happen is a method."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from hookwright import (
    ConfigurationError,
    ConflictError,
    DeliveryState,
    EndpointState,
    HookwrightError,
    MemoryStorage,
    NewEvent,
    NotFound,
    StorageError,
)
from hookwright._clock import to_datetime
from hookwright.testing import VirtualClock
from tests.simulation._leases import Leases
from tests.simulation._loop import simulated, turns_until_idle
from tests.simulation._model import Model, Violation
from tests.simulation._port import Disk
from tests.simulation._process import Process
from tests.simulation._receivers import Behaviour, Receivers
from tests.simulation._rules import TIMEOUT, Intent

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Sequence

    from hookwright import Dispatcher, Transport

_RELIEF = 100
_STARTS = 12


@dataclass(frozen=True)
class Parts:
    """What a world is made of; tests put broken parts in, to see them found."""

    storage: Callable[[], MemoryStorage] = MemoryStorage
    around: Callable[[Transport], Transport] = field(default=lambda wire: wire)


class World:
    """Operations do what they say and leave their mark in `lines`; `check` raises Violation for what is wrong."""

    def __init__(self, seed: int, parts: Parts) -> None:
        self.chance = random.Random(seed)
        self.lines: list[str] = []
        self.model = Model()
        self.leases = Leases(self.model)
        self.base = VirtualClock()
        self.disk = Disk(
            parts.storage(), self.model, self.leases, random.Random(self.chance.random()), self.lines.append
        )
        self.receivers = Receivers(self.disk)
        self.processes: list[Process] = []
        self.crashes = 0
        self._around = parts.around
        self._born = 0
        self._urls = 0
        self._numbers = 0
        self._acts: list[asyncio.Task[None]] = []

    # -- processes ------------------------------------------------------------------------------------------------

    async def start(self, *, deliver: bool, concurrency: int = 4, shutdown_timeout: float = 0.0) -> None:
        """Start a process; what fails for the storage's sake is begun again, as a supervisor would."""
        for _ in range(_STARTS):
            self._born += 1
            process = Process(
                self._born,
                self.disk,
                self.receivers,
                self.base,
                random.Random(self.chance.random()),
                deliver=deliver,
                concurrency=concurrency,
                shutdown_timeout=shutdown_timeout,
                around=self._around,
            )
            try:
                await process.start()
            except StorageError as error:
                self._say(f"process {process.number} could not start: {error!r}")
            else:
                self.processes.append(process)
                self._say(f"process {process.number} started, deliver={deliver} concurrency={concurrency}")
                return
        raise Violation("a process does not start, and nothing is wrong any more")

    async def restart(self, which: int, *, concurrency: int, shutdown_timeout: float) -> None:
        """Close a process and start another in its place."""
        process = self._process(which)
        self._say(f"process {process.number} closes")
        await process.close()
        self.processes.remove(process)
        await self.start(deliver=process.deliver, concurrency=concurrency, shutdown_timeout=shutdown_timeout)

    async def crash(self, which: int, *, jump: float, concurrency: int) -> None:
        """Kill a process; the machine's clock may be another when the next one starts."""
        process = self._process(which)
        self._say(f"process {process.number} dies with {sorted(process.wire.under_way)} under way")
        self.crashes += 1
        await process.crash()
        self.processes.remove(process)
        if jump:
            self.jump(jump)
        await self.start(deliver=process.deliver, concurrency=concurrency)

    # -- time and trouble -----------------------------------------------------------------------------------------

    async def advance(self, seconds: float, busy: int | None = None) -> None:
        """Let time pass, for the clock and the loop alike; `busy` turns for each timer are few for a slow machine."""
        self._say(f"{seconds:g} s pass")
        settle = turns_until_idle if busy is None else partial(turns_until_idle, busy)
        await self.base.advance(seconds, settle=settle)
        simulated().skip(seconds)
        await settle()

    def jump(self, seconds: float) -> None:
        """Set the wall clock; running processes keep their steady time."""
        self._say(f"the wall clock is set by {seconds:+g} s")
        self.base.set_wall(to_datetime(self.base.wall()) + timedelta(seconds=seconds))

    def trouble(self, count: int, kind: int, *, after: bool) -> None:
        """Let the next verbs fail."""
        self._say(f"the next {count} verbs raise, after={after}")
        self.disk.faults.set(count, kind, after=after)

    def behave(self, url: str, kind: str, retry_after: int = 0) -> None:
        """Set what a receiver does."""
        self._say(f"{url} does {kind} {retry_after or ''}")
        self.receivers.behave(url, Behaviour(kind, retry_after))

    # -- what the application asks for ----------------------------------------------------------------------------

    def act(self, which: int, what: str, action: Callable[[Dispatcher], Awaitable[object]]) -> asyncio.Task[None]:
        """Begin something in a process; what it raises must be explained by what happened meanwhile."""
        process = self._process(which)
        self._say(f"{process.number}: {what}")
        task = process.run(self._explained(process, what, action))
        self._acts = [other for other in self._acts if not other.done()]
        self._acts.append(task)
        return task

    async def _explained(self, process: Process, what: str, action: Callable[[Dispatcher], Awaitable[object]]) -> None:
        struck = self.disk.faults.struck
        try:
            await action(process.dispatcher)
        except StorageError as error:
            explained = process.closing or self.disk.faults.struck > struck
            self.model.require(explained, f"{what} raised {error!r}, and no fault struck")
        except ConfigurationError as error:
            self.model.require(process.closing, f"{what} raised {error!r}")
        except (ConflictError, NotFound) as error:
            self._say(f"{process.number}: {what} was refused: {error}")
        except HookwrightError as error:
            self.model.require(False, f"{what} raised {error!r}")

    def cancel_latest(self) -> None:
        """Cancel what the application asked for last, wherever it is."""
        if self._acts:
            self._say("the latest is cancelled")
            self._acts[-1].cancel()

    def subscribe(self, which: int, events: Sequence[str], **options: Any) -> asyncio.Task[None]:
        """Create an endpoint with a receiver of its own."""
        url = self.new_url()
        return self.act(
            which,
            f"subscribe {url} to {events} {options}",
            lambda dispatcher: dispatcher.endpoints.create(url, events=events, **options),
        )

    def new_url(self) -> str:
        self._urls += 1
        return f"https://receiver-{self._urls}.example/hooks"

    def intent(self, type: str, **options: Any) -> Intent:
        """Return an event to emit, whose data tells it from all others."""
        self._numbers += 1
        defaults: dict[str, Any] = {
            "tenant": None,
            "attributes": (),
            "event_id": None,
            "key": None,
            "endpoint_id": None,
            "delay": 0.0,
        }
        intent = Intent(self._numbers, type, **(defaults | options))
        self.model.intents[intent.number] = intent
        return intent

    def emit(self, which: int, intents: Sequence[Intent]) -> asyncio.Task[None]:
        """Emit one event, or several at once."""
        clock = self._process(which).clock

        async def action(dispatcher: Dispatcher) -> None:
            events = [_new_event(intent, clock.now()) for intent in intents]
            receipts = (
                await dispatcher.emit_many(events)
                if len(events) > 1
                else [await dispatcher.emit(**events[0]._asdict())]
            )
            for intent, receipt in zip(intents, receipts, strict=True):
                self.model.acknowledge(intent, receipt)
                self._say(f"acknowledged {intent.number} {receipt}")

        return self.act(which, f"emit {[tuple(intent) for intent in intents]}", action)

    # -- looking --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Violation when something is wrong."""
        self.model.compare(self.disk.storage)
        if self.model.wrong:
            raise Violation(self.model.wrong[0])
        for told in self.model.acknowledged.values():
            if told not in self.model.events and told not in self.model.pruned:
                raise Violation(f"{told} was acknowledged and is gone")

    async def rest(self) -> None:
        """Wait for what the application asked for."""
        for _ in range(_RELIEF):
            if all(task.done() for task in self._acts):
                return
            await self.advance(1)
        raise Violation("what the application asked for does not end")

    def _process(self, which: int) -> Process:
        return self.processes[which % len(self.processes)]

    def _say(self, text: str) -> None:
        self.lines.append(f"{self.base.now() / 1e6:.6f} {text}")

    # -- the end --------------------------------------------------------------------------------------------------

    async def calm_down(self) -> None:
        """Let all trouble end, ask for nothing, and see that everything ends by itself within its time."""
        self._say("all trouble ends")
        self.disk.faults.set(0, 0, after=False)
        self.receivers.recover()
        await self.rest()
        await self._settle_down()

    async def finish(self) -> None:
        """Calm down, resume, and look at all of the history."""
        await self.calm_down()
        for endpoint in list(self.model.endpoints.values()):
            if endpoint.now.state is EndpointState.PAUSED and self.chance.random() < 0.7:
                await self._resume(endpoint.id)
        await self._settle_down()
        await self._check_history()

    async def _settle_down(self) -> None:
        await self.advance(2 * TIMEOUT)  # what is in flight ends before the time is measured
        self.check()
        await self._until_all_ended()
        self.check()
        self._check_all_ended()

    async def _resume(self, endpoint_id: str) -> None:
        await self.act(0, f"resume {endpoint_id}", lambda dispatcher: dispatcher.endpoints.resume(endpoint_id))

    def _waiting(self) -> list[str]:
        return [
            row.id
            for row in self.model.rows.values()
            if row.state is DeliveryState.PENDING
            and self.model.endpoints[row.endpoint_id].now.state is not EndpointState.PAUSED
        ]

    async def _until_all_ended(self) -> None:
        process = next(process for process in self.processes if process.deliver)
        now, latest, slow = process.clock.now(), process.clock.now(), 0.0
        for row in self.model.rows.values():
            endpoint = self.model.endpoints[row.endpoint_id]
            if row.state is DeliveryState.PENDING and endpoint.stopped is None:
                latest = max(latest, row.due, row.until if row.token else 0, endpoint.hold_until)
                slow += 1 / (endpoint.now.rate or 1000)
        left = (latest - now) / 1e6 + 300 + slow
        self._say(f"everything must end within {left:g} s")
        while left > 0 and self._waiting():
            step = min(left, 600.0)
            await self.advance(step)
            left -= step

    def _check_all_ended(self) -> None:
        waiting = self._waiting()
        self.model.require(not waiting, f"{len(waiting)} deliveries do not end: {waiting[:3]}")
        for request in self.receivers.requests:
            row = self.model.rows.get(request.delivery_id)
            if row is not None and row.token is None:
                self.model.require(
                    len(row.attempts) >= request.number,
                    f"{row.id}: attempt {request.number} reached its receiver and is not recorded ({row.why})",
                )
        self.check()

    async def _check_history(self) -> None:
        dispatcher = next(process for process in self.processes if process.deliver).dispatcher
        for row in self.model.rows.values():
            attempts = await dispatcher.deliveries.attempts(row.id)
            numbers = [attempt.number for attempt in attempts]
            self.model.require(numbers == list(range(1, len(row.attempts) + 1)), f"{row.id}: attempts {numbers}")
            said = [str(attempt.status or attempt.error) for attempt in attempts]
            self.model.require(said == row.attempts, f"{row.id}: attempts {said}, and not {row.attempts}")
            delivery = await dispatcher.deliveries.get(row.id)
            self.model.require(delivery.state is row.state, f"{row.id} is shown as {delivery.state}")
        self.check()


def _new_event(intent: Intent, now: int) -> NewEvent:
    return NewEvent(
        intent.type,
        {"n": intent.number},
        {key: list(values) for key, values in intent.attributes},
        intent.tenant,
        intent.key,
        intent.event_id,
        intent.endpoint_id,
        deliver_at=to_datetime(now + round(intent.delay * 1e6)) if intent.delay else None,
    )
