"""What deliveries cost, in exact counts: a change that raises one fails, and so does one that forgets to lower its pin.

20 endpoints that have earned their room, events of 1 KB, a transport that answers at once, SQLite on a file. How the
counts are made exact, and what each means, is told in `tests/counting.py`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright import DeliverySucceeded, DirectTransport, Dispatcher, HttpxTransport, Request, Response
from hookwright.testing._transport_contract_base import GOOD, OPEN, receiving
from tests.conftest import URL, until
from tests.counting import Counts, counted, differences

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from hookwright import Clock, Receipt, Transport
    from hookwright.testing._transport_contract_base import Peer
    from tests.counting import Counter

# For 1,000 events, each to one endpoint; for 50, "one at a time" and "one from rest". `drain` itself makes two tasks.
# A task for each attempt, and one for all results until there are none.
# fmt: off
PINNED = {
    #                            statements  reads  transactions   hops  tasks  connections
    "backlog":            Counts(       492,     0,           47,    47, 1_025,           0),
    "emit":               Counts(       128,     0,           16,    16,     0,           0),
    "emit and deliver":   Counts(     1_203,     0,           66,    66, 1_003,           0),
    "one at a time":      Counts(     1_104,     0,          101,   101,   102,           0),
    "one from rest":      Counts(     1_100,     0,          100,   100,   100,           0),
}
# fmt: on

EVENTS = 1000
ENDPOINTS = 20
SINGLE = 50
SOCKETS = 4 * ENDPOINTS
DATA = {"video_id": "vid_123", "text": "x" * 960}


class _AtOnce:
    """A transport that answers at once."""

    async def send(self, request: Request) -> Response:
        return Response(200)

    async def aclose(self) -> None:
        return None


class _Scene:
    """A dispatcher whose endpoints have earned their room, on a file that others may open too."""

    def __init__(self, path: Path, counter: Counter, clock: Clock) -> None:
        self.counter = counter
        self._path = path
        self._clock = clock

    def dispatcher(self, *, deliver: bool = True) -> Dispatcher:
        return Dispatcher(
            f"sqlite:///{self._path}",
            transport=_AtOnce(),
            clock=self._clock,
            concurrency=64,
            retention=None,
            deliver=deliver,
            keys=[],
        )

    async def warm(self, dispatcher: Dispatcher) -> None:
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=[f"e{number}"])
        for _ in range(4):  # room is earned: 1, 2, 4
            for number in range(ENDPOINTS):
                await _emit(dispatcher, number)
            await dispatcher.drain()


async def _emit(dispatcher: Dispatcher, number: int) -> Receipt:
    return await dispatcher.emit(f"e{number % ENDPOINTS}", DATA)


async def _emit_all(dispatcher: Dispatcher, count: int) -> None:
    await asyncio.gather(*(_emit(dispatcher, number) for number in range(count)))


class _Emitters:
    """Tasks that emit `count` events between them, one after the other each, once `begin` was called."""

    def __init__(self, dispatcher: Dispatcher, count: int, tasks: int) -> None:
        self._dispatcher = dispatcher
        self._numbers = iter(range(count))
        self._begin = asyncio.Event()
        self._tasks = [asyncio.get_running_loop().create_task(self._run()) for _ in range(tasks)]

    async def _run(self) -> None:
        await self._begin.wait()
        for number in self._numbers:
            await _emit(self._dispatcher, number)

    async def all(self) -> None:
        self._begin.set()
        for task in self._tasks:
            await task


async def _backlog(scene: _Scene) -> Counts:
    """Another process emitted; counted from the look at what waits until all is delivered."""
    async with scene.dispatcher() as delivering, scene.dispatcher(deliver=False) as emitting:
        await scene.warm(delivering)
        await _Emitters(emitting, EVENTS, 64).all()
        before = scene.counter.now()
        await delivering.drain()
        return scene.counter.now().minus(before)


async def _emit_only(scene: _Scene) -> Counts:
    """Another process delivers."""
    async with scene.dispatcher() as delivering, scene.dispatcher(deliver=False) as emitting:
        await scene.warm(delivering)
        await emitting.emit("nobody.wants.it")  # which reads the endpoints
        emitters = _Emitters(emitting, EVENTS, 64)
        before = scene.counter.now()
        await emitters.all()
        return scene.counter.now().minus(before)


async def _emit_and_deliver(scene: _Scene) -> Counts:
    """Delivered while they are emitted."""
    async with scene.dispatcher() as dispatcher:
        await scene.warm(dispatcher)
        emitters = _Emitters(dispatcher, EVENTS, 16)
        before = scene.counter.now()
        await emitters.all()
        await dispatcher.drain()
        return scene.counter.now().minus(before)


async def _one_at_a_time(scene: _Scene) -> Counts:
    """The next is emitted when the last was delivered, as a plain observer hears it."""
    async with scene.dispatcher() as dispatcher:
        await scene.warm(dispatcher)
        delivered = asyncio.Event()
        dispatcher.observe(lambda observation: delivered.set(), DeliverySucceeded)
        before = scene.counter.now()
        for number in range(SINGLE):
            delivered.clear()
            await _emit(dispatcher, number)
            await delivered.wait()
        await dispatcher.drain()
        return scene.counter.now().minus(before)


async def _one_from_rest(scene: _Scene) -> Counts:
    """Counted from the call of emit until it is delivered; what follows that is over when the next is emitted."""
    async with scene.dispatcher() as dispatcher:
        await scene.warm(dispatcher)
        delivered = asyncio.Event()
        dispatcher.observe(lambda observation: delivered.set(), DeliverySucceeded)
        found = Counts(0, 0, 0, 0, 0, 0)
        for number in range(SINGLE):
            delivered.clear()
            before = scene.counter.now()
            await _emit(dispatcher, number)
            await delivered.wait()
            found = found.plus(scene.counter.now().minus(before))
            await dispatcher.drain()
        return found


SCENARIOS: dict[str, Callable[[_Scene], Coroutine[Any, Any, Counts]]] = {
    "backlog": _backlog,
    "emit": _emit_only,
    "emit and deliver": _emit_and_deliver,
    "one at a time": _one_at_a_time,
    "one from rest": _one_from_rest,
}


@pytest.mark.parametrize("name", PINNED)
def test_what_it_costs_is_what_was_pinned(name: str, tmp_path: Path) -> None:
    found = counted(lambda counter, clock: SCENARIOS[name](_Scene(tmp_path / "hooks.db", counter, clock)))
    assert not differences(PINNED[name], found), "\n".join([f"{name}:", *differences(PINNED[name], found)])


class _Holding:
    """A receiver that answers well, and holds its answers back meanwhile."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.request()
            await self.open.wait()
            await peer.say(GOOD)


@pytest.mark.parametrize("make", [HttpxTransport, DirectTransport])
async def test_at_steady_state_no_connection_is_opened(make: Callable[[], Transport], sqlite_url: str) -> None:
    holding = _Holding()
    async with (
        receiving(holding) as receiver,
        Dispatcher(
            sqlite_url, transport=make(), network=OPEN, concurrency=2 * SOCKETS, endpoint_concurrency=4, keys=[]
        ) as dispatcher,
    ):
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(receiver.url("127.0.0.1"), events=[f"e{number}"])
        for _ in range(3):  # room is earned: 1, 2, 4
            await _emit_all(dispatcher, ENDPOINTS)
            await dispatcher.drain()
        holding.open.clear()
        await _emit_all(dispatcher, SOCKETS)
        await until(lambda: len(receiver.requests) == 3 * ENDPOINTS + SOCKETS)
        holding.open.set()
        await dispatcher.drain()
        assert receiver.connections == SOCKETS
        await _emit_all(dispatcher, EVENTS)
        await dispatcher.drain()
        assert len(receiver.requests) == 3 * ENDPOINTS + SOCKETS + EVENTS
        opened = receiver.connections - SOCKETS
        assert opened == 0, f"connections opened: 0 pinned, {opened:,} found for {EVENTS:,} deliveries"
