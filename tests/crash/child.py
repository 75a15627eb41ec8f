"""What the processes do that are killed: a load, a scripted life, a poison, and the drain after them.

Event ids say where an event must arrive: see `wanted`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from hookwright import Clock, Dispatcher, NetworkPolicy, NewEvent, Profile, RetryPolicy
from hookwright.transport.httpx import HttpxTransport
from tests.faults.points import FaultyTransport, Points, kill, statements
from tests.postgres.points import asyncpg_statements

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookwright import Failure, Request, Response

    Say = Callable[[str], object]

CONCURRENCY = 50
RATE = 200
TYPES = 24
"""The load has so many event types, with two endpoints each."""

NEIGHBOURS = 6
_RETENTION = timedelta(days=30)


class Command(NamedTuple):
    """What a child is told. `storage` is the dispatcher's; `url` ends where an endpoint's own part begins.

    `first` is the load's first number; `at` and `after` name a fault point of the life; `seconds` is how long after its
    request has left a poison kills. `attempts` is how often a delivery is tried.
    """

    kind: str
    storage: str
    url: str
    first: int = 0
    at: int = 0
    after: bool = False
    seconds: float = 0.0
    attempts: int = 50


def wanted(event_id: str) -> set[str]:
    """Return the endpoints' own parts of the paths at which an event must arrive."""
    _, kind, *_ = event_id.split("_")
    if kind.isdecimal():
        return {f"load/{int(kind) % TYPES}", f"load/{int(kind) % TYPES + TYPES}"}
    return {"both": {"ok", "flaky"}, "old": {"ok"}, "near": {f"near/{event_id[-1]}/ok"}}.get(kind, {kind})


def live(command: Command, say: Say) -> None:
    """Do what is commanded, and say what becomes of it."""
    asyncio.run(_LIVES[command.kind](command, say))
    say("done")


@asynccontextmanager
async def _running(command: Command, say: Say, **options: Any) -> AsyncIterator[Dispatcher]:
    """Start a dispatcher, say when `start` was called and when it returned, and close it."""
    retry = RetryPolicy.schedule(*[0.05] * command.attempts, jitter=0.0)
    settings: dict[str, Any] = {
        "profiles": {"default": Profile(retry=retry)},
        "network": NetworkPolicy.development(),
        "concurrency": CONCURRENCY,
        "endpoint_concurrency": CONCURRENCY,
        "retention": _RETENTION,
        "disable_after": None,
        "keys": [],
    }
    dispatcher = Dispatcher(command.storage, **(settings | options))
    say(f"called {time.monotonic()}")
    async with dispatcher:
        say(f"started {time.monotonic()}")
        yield dispatcher


# -- under load, until it is killed -------------------------------------------------------------------------------


async def _prepare(command: Command, say: Say) -> None:
    async with _running(command, say, deliver=False) as dispatcher:
        for number in range(2 * TYPES):
            await dispatcher.endpoints.create(f"{command.url}load/{number}", events=[f"crash.{number % TYPES}"])


async def _load(command: Command, say: Say) -> None:
    async with _running(command, say) as dispatcher, asyncio.TaskGroup() as group:

        async def one(number: int) -> None:
            receipt = await dispatcher.emit(f"crash.{number % TYPES}", {"n": number}, event_id=f"evt_{number}")
            say(f"ack {receipt.event_id}")

        loop = asyncio.get_running_loop()
        due = loop.time()
        for number in itertools.count(command.first):
            group.create_task(one(number))
            due += 1 / RATE
            await asyncio.sleep(due - loop.time())


async def _drain(command: Command, say: Say) -> None:
    async with _running(command, say) as dispatcher:
        while (await dispatcher.health()).pending:
            await asyncio.sleep(0.01)


# -- a life of which every point is known ---------------------------------------------------------------------------


class _Earlier(Clock):
    """So long ago that what ends now is pruned at the next start."""

    def now(self) -> int:
        return super().now() - 2 * int(_RETENTION.total_seconds()) * 1_000_000


async def _script(command: Command, say: Say) -> None:
    """Live once, and die at fault point `at`; 0: say all their names."""

    def strike() -> None:
        say(f"struck {command.at} {command.after}")
        kill()

    points = Points(strike, at=command.at, after=command.after)
    with statements(points), asyncpg_statements(points):
        await _first_half(command, say, points)
        await _second_half(command, say, points)
    for name in points.passed if command.at == 0 else ():
        say(f"passed {name}")


async def _first_half(command: Command, say: Say, points: Points) -> None:
    """Migrate, create endpoints, and leave an old event behind."""
    async with _running(command, say, transport=_faulty(points), clock=_Earlier()) as dispatcher:
        await dispatcher.endpoints.create(f"{command.url}ok", events=["crash.ok", "crash.both"])
        await dispatcher.endpoints.create(f"{command.url}flaky", events=["crash.both"])
        receipt = await dispatcher.emit("crash.ok", event_id="evt_old")
        await _acknowledge(dispatcher, say, receipt.event_id)


async def _second_half(command: Command, say: Say, points: Points) -> None:
    """Prune it, deliver, fail and retry, lose an endpoint and sweep what waits for it."""
    async with _running(command, say, transport=_faulty(points)) as dispatcher:
        await dispatcher.endpoints.create(f"{command.url}gone", events=["crash.gone"], concurrency=1)
        receipt = await dispatcher.emit("crash.both", event_id="evt_both")
        await _acknowledge(dispatcher, say, receipt.event_id)
        receipts = await dispatcher.emit_many([NewEvent("crash.gone", event_id=f"evt_gone_{n}") for n in (1, 2)])
        await _acknowledge(dispatcher, say, *(receipt.event_id for receipt in receipts))


def _faulty(points: Points) -> FaultyTransport:
    return FaultyTransport(HttpxTransport(network=NetworkPolicy.development()), points)


async def _acknowledge(dispatcher: Dispatcher, say: Say, *event_ids: str) -> None:
    """Say that they are stored, and go on when they have ended, so that the next step has the same numbers always."""
    for event_id in event_ids:
        say(f"ack {event_id}")
    await dispatcher.deliveries.wait(event_ids[-1], timeout=20)
    await dispatcher.drain(timeout=20)


# -- an event that kills whoever sends it -------------------------------------------------------------------------


class _Poisoned:
    """A transport that dies of one path, so many seconds after the request began."""

    def __init__(self, path: str, seconds: float) -> None:
        self._inner = HttpxTransport(network=NetworkPolicy.development())
        self._path = path
        self._seconds = seconds

    async def send(self, request: Request) -> Response | Failure:
        if request.url.endswith(self._path):
            asyncio.get_running_loop().call_later(self._seconds, os.kill, os.getpid(), signal.SIGKILL)
        return await self._inner.send(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _emit_poison(command: Command, say: Say) -> None:
    async with _running(command, say, deliver=False) as dispatcher:
        for name in ("poison", *(f"near_{number}" for number in range(NEIGHBOURS))):
            [path] = wanted(f"evt_{name}")
            await dispatcher.endpoints.create(f"{command.url}{path}", events=[f"crash.{name}"])
            receipt = await dispatcher.emit(f"crash.{name}", event_id=f"evt_{name}")
            say(f"ack {receipt.event_id}")


async def _poison(command: Command, say: Say) -> None:
    transport = _Poisoned("/poison", command.seconds)
    async with _running(command, say, transport=transport) as dispatcher:
        while (await dispatcher.health()).pending:
            await asyncio.sleep(0.01)


_LIVES = {
    "prepare": _prepare,
    "load": _load,
    "drain": _drain,
    "script": _script,
    "emit poison": _emit_poison,
    "poison": _poison,
}
