"""Somebody else holds the write lock: for how long emits wait, and when deliveries go on."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

from hookwright import Dispatcher, Profile, RetryPolicy, StorageBusy
from hookwright.storage.sqlite import _owner
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.faults.processes import integrity, locked, look

if TYPE_CHECKING:
    from pathlib import Path

GOES_ON = 5.5
"""Seconds after the release within which deliveries go on: the longest pause between two claims, and half a second."""

_ROUND = 1.0
"""Seconds by which an answer may be later: a busy wait of SQLite's cannot be ended from outside."""


class Held(NamedTuple):
    """What came of it."""

    seconds: float
    answer: str
    advice: str
    answered_after: float
    delivered_after: float
    stored: int
    acknowledged: int
    sent: int
    state_while: str
    problems: tuple[str, ...]
    state_after: str
    integrity: str


def well(held: Held) -> bool:
    """Whether every promise was kept."""
    if held.seconds < _owner.BUSY_LIMIT:
        answered = held.answer == "stored" and held.answered_after < held.seconds + _ROUND
    else:
        answered = held.answer == "StorageBusy" and "commit it first" in held.advice
        # One that was held for just as long as an emit waits may be answered either way.
        answered = answered or (held.seconds < _owner.BUSY_LIMIT + _ROUND and held.answer == "stored")
        answered = answered and held.answered_after < _owner.BUSY_LIMIT + _ROUND
    whole = held.stored == held.acknowledged == held.sent and held.integrity == "ok"
    told = held.state_while == ("degraded" if held.seconds > _owner.BUSY_LIMIT else "healthy")
    return answered and whole and told and held.state_after == "healthy" and held.delivered_after < GOES_ON


async def hold(path: Path, seconds: float) -> Held:
    """Hold the lock for so long, with deliveries in flight and an emit that waits for it."""
    transport = FakeTransport()
    transport.respond(URL + "/hangs", transport.hang)
    profiles = {"default": Profile(retry=RetryPolicy.schedule(0, 0, 0))}
    async with Dispatcher(f"sqlite:///{path}", transport=transport, profiles=profiles) as dispatcher:
        waits = await dispatcher.endpoints.create(URL + "/hangs", events=["*"])
        await dispatcher.emit("before")
        await until(lambda: len(transport.requests) == 1)
        begun = time.monotonic()
        with locked(path) as lock:
            transport.release()  # its result waits for the lock, too
            emitting = asyncio.ensure_future(_emit(dispatcher))
            await asyncio.sleep(0.6 * seconds)  # the lock's own time
            while_held = await dispatcher.health()
            await asyncio.sleep(seconds - (time.monotonic() - begun))
            lock.release()
        released = time.monotonic()
        answer, advice, answered_at = await emitting
        expected = 1 + (answer == "stored")
        await until(lambda: _ended(dispatcher, expected), timeout=30)
        delivered = time.monotonic() - released
        await dispatcher.emit("after")
        await dispatcher.drain(timeout=10)
        await until(lambda: _is_healthy(dispatcher), timeout=10)
        return Held(
            seconds,
            answer,
            advice,
            answered_at - begun,
            delivered,
            stored=len(look(path, "SELECT 1 FROM hookwright_delivery WHERE state = 'succeeded'")),
            acknowledged=expected + 1,
            sent=len([one for one in transport.requests if one.endpoint_id == waits.id]),
            state_while=while_held.state,
            problems=while_held.problems,
            state_after=(await dispatcher.health()).state,
            integrity=integrity(path),
        )


async def _ended(dispatcher: Dispatcher, count: int) -> bool:
    return await dispatcher.deliveries.count(status="succeeded") == count


async def _is_healthy(dispatcher: Dispatcher) -> bool:
    return (await dispatcher.health()).state == "healthy"


async def _emit(dispatcher: Dispatcher) -> tuple[str, str, float]:
    answer, advice = "stored", ""
    try:
        await dispatcher.emit("during")
    except StorageBusy as error:
        answer, advice = "StorageBusy", str(error)
    return answer, advice, time.monotonic()
