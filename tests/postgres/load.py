"""A dispatcher that emits and delivers to a real receiver while its server is disturbed, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookwright import CommitUnknown, Dispatcher, NetworkPolicy, StorageUnavailable
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing import Inbox
from tests.conftest import until
from tests.postgres.server import SETTINGS, own_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ENDPOINTS = 4
EMITTERS = 8


@dataclass
class Load:
    """What runs, and what was counted."""

    dispatcher: Dispatcher
    storage: PostgresStorage
    inbox: Inbox
    acknowledged: list[str] = field(default_factory=list)
    given_again: int = 0
    slowest_emit: float = 0.0
    in_flight_at_faults: int = 0
    faults: int = 0

    def note_fault(self) -> None:
        """Something is about to be broken."""
        self.faults += 1
        self.in_flight_at_faults += self.dispatcher._worker._concurrency  # as many as there can be when it strikes

    @property
    def repeats(self) -> int:
        """Requests beyond one for each delivery."""
        sent = Counter((one.path, one.event_id) for one in self.inbox.received)
        return sum(sent.values()) - len(sent)

    @property
    def pids(self) -> list[int]:
        """The server's processes for this dispatcher: its pool's, and the one that it listens with."""
        opened = self.storage._open
        if opened is None or opened.listener is None:
            return []
        listening: Any = opened.listener._connection
        return [*opened.pool.pids, *([] if listening is None else [listening.get_server_pid()])]

    async def emit(self, count: int) -> None:
        """Emit so many events by several emitters, each until it is acknowledged."""
        numbers = iter(range(len(self.acknowledged), len(self.acknowledged) + count))

        async def emitter() -> None:
            for number in numbers:
                began = time.monotonic()
                await self._emit(f"evt_{number:06}")
                self.slowest_emit = max(self.slowest_emit, time.monotonic() - began)

        await asyncio.gather(*(emitter() for _ in range(EMITTERS)))

    async def _emit(self, event_id: str) -> None:
        while True:
            try:
                await self.dispatcher.emit("video.ready", event_id=event_id)
            except (CommitUnknown, StorageUnavailable):
                self.given_again += 1
            else:
                self.acknowledged.append(event_id)
                return

    async def finish(self, timeout: float = 90.0) -> None:
        """Wait until all that was acknowledged is delivered, and check that it is."""
        expected = len(self.acknowledged) * ENDPOINTS
        await until(lambda: self._succeeded(expected), timeout)
        sent = {(one.path, one.event_id) for one in self.inbox.received}
        assert sent == {(f"/{n}", event_id) for n in range(ENDPOINTS) for event_id in self.acknowledged}
        assert self.repeats <= self.in_flight_at_faults, self.repeats
        health = await self.dispatcher.health()
        # A problem that nothing is certain to end is told for a minute.
        assert [problem for problem in health.problems if not problem.startswith("an event could not")] == []

    async def _succeeded(self, expected: int) -> bool:
        try:
            return await self.dispatcher.deliveries.count(status="succeeded") == expected
        except StorageUnavailable:  # a read is not repeated
            return False


@asynccontextmanager
async def loaded(dsn: str, schema: str = "hookwright", **options: Any) -> AsyncIterator[Load]:
    """Run one."""
    storage = PostgresStorage(dsn, schema=schema)
    network = NetworkPolicy.development()
    async with Inbox() as inbox, Dispatcher(storage, network=network, keys=[], **options) as dispatcher:
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(inbox.url_for(f"/{number}"), events=["*"])
        yield Load(dispatcher, storage, inbox)


@dataclass
class Outage:
    """What an outage cost. Seconds, from when the server answers again."""

    seconds: float
    delivering_after: float
    emitting_after: float
    repeats: int
    given_again: int
    state_while: str


async def outage(seconds: float, events: int = 300) -> Outage:
    """Stop a server at once, and start it again after so long, while events are emitted and wait to be delivered."""
    with own_server(SETTINGS | {"fsync": "on"}) as server:
        async with loaded(server.dsn, concurrency=16) as load:

            async def respond(_: object) -> int:
                await asyncio.sleep(0.01)
                return 200

            load.inbox.respond_with(respond)
            await load.emit(events)
            await load.inbox.wait_for(50)
            load.note_fault()
            await asyncio.to_thread(server.stop, immediate=True)
            emitting = asyncio.ensure_future(load.emit(50))
            await asyncio.sleep(seconds)
            state = (await load.dispatcher.health()).state
            acknowledged, received = len(load.acknowledged), len(load.inbox.received)
            await asyncio.to_thread(server.start)
            began = time.monotonic()
            delivering = asyncio.ensure_future(_after(began, lambda: len(load.inbox.received) > received))
            emitted = await _after(began, lambda: len(load.acknowledged) > acknowledged)
            delivered = await delivering
            await emitting
            await load.finish()
            return Outage(seconds, delivered, emitted, load.repeats, load.given_again, state)


async def _after(began: float, condition: Any) -> float:
    await until(condition, 30)
    return time.monotonic() - began
