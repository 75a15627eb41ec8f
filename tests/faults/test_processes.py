"""Several processes on one file, that are killed, closed, forked and stopped."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import Dispatcher, NetworkPolicy, NewEvent
from hookwright.testing import Inbox
from tests.conftest import until
from tests.faults.fast import FastClock
from tests.faults.processes import Child, child, integrity, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hookwright.testing import Received

    Record = Callable[[str, object], None]

ENDPOINTS = 3
TAKEOVER = 2.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.db"


class Slow:
    """A receiver that answers only once it is let to."""

    def __init__(self, inbox: Inbox) -> None:
        self._gate = asyncio.Event()
        self._inbox = inbox
        inbox.respond_with(self._respond)

    async def _respond(self, received: Received) -> int:
        await self._gate.wait()
        return 200

    def answer(self) -> None:
        self._gate.set()

    @property
    def sent(self) -> Counter[tuple[str, str | None]]:
        return Counter((one.path, one.event_id) for one in self._inbox.received)


def operator(path: Path, **options: Any) -> Dispatcher:
    return Dispatcher(f"sqlite:///{path}", network=NetworkPolicy.development(), keys=[], deliver=False, **options)


async def subscribe(path: Path, inbox: Inbox, **options: Any) -> None:
    async with operator(path, **options) as dispatcher:
        for number in range(ENDPOINTS):
            await dispatcher.endpoints.create(inbox.url_for(f"/{number}"), events=["*"])


async def health(process: Child) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await process.ask("health"))
    return found


def states(path: Path) -> Counter[object]:
    return Counter(row[0] for row in look(path, "SELECT state FROM hookwright_delivery"))


def errors(path: Path) -> list[object]:
    return [row[0] for row in look(path, "SELECT error FROM hookwright_attempt WHERE error IS NOT NULL")]


async def test_when_the_process_that_delivers_is_killed_another_takes_over_within_two_seconds(
    path: Path, record_property: Record
) -> None:
    async with Inbox() as inbox, child("plain", path) as first:
        slow = Slow(inbox)
        await first.hear("started")
        await subscribe(path, inbox)
        async with child("plain", path) as second:
            await second.hear("started")
            assert await first.ask("emit evt_1") == await second.ask("emit evt_1")
            await inbox.wait_for(ENDPOINTS)
            await second.ask("emit evt_2")
            assert (await health(first))["state"] == "healthy"
            assert (await health(second))["state"] == "standby"
            first.signal(signal.SIGKILL)
            killed = time.monotonic()
            await inbox.wait_for(ENDPOINTS + 1)
            taken_over = time.monotonic() - killed
            record_property("kill -9: taken over after", taken_over)
            assert taken_over < TAKEOVER
            slow.answer()
            await until(lambda: states(path)["succeeded"] == 2 * ENDPOINTS)
            now = await health(second)
            assert (now["state"], now["is_delivering"], now["problems"]) == ("healthy", True, [])
        expected = {(f"/{n}", "evt_1"): 2 for n in range(ENDPOINTS)} | {(f"/{n}", "evt_2"): 1 for n in range(ENDPOINTS)}
        assert slow.sent == expected
    assert errors(path) == ["interrupted"] * ENDPOINTS
    assert integrity(path) == "ok"


async def test_when_the_process_that_delivers_closes_another_takes_over_and_nothing_is_repeated(
    path: Path, record_property: Record
) -> None:
    async with Inbox() as inbox, child("plain", path) as first:
        await first.hear("started")
        await subscribe(path, inbox)
        async with child("plain", path) as second:
            await second.hear("started")
            await first.ask("emit evt_1")
            await until(lambda: states(path)["succeeded"] == ENDPOINTS)
            await first.ask("close")
            closed = time.monotonic()
            assert (await health(first))["state"] == "closed"
            await second.ask("emit evt_2")
            await inbox.wait_for(ENDPOINTS + 1)
            taken_over = time.monotonic() - closed
            record_property("aclose: taken over after", taken_over)
            assert taken_over < TAKEOVER
            await until(lambda: states(path)["succeeded"] == 2 * ENDPOINTS)
            assert (await health(second))["state"] == "healthy"
    assert len(inbox.received) == 2 * ENDPOINTS
    assert errors(path) == []
    assert integrity(path) == "ok"


@pytest.mark.parametrize("scenario", [("forks", "_exit"), ("forks", "exit"), ("forks_inside",)])
async def test_a_forked_child_is_told_what_to_do_and_its_end_disturbs_nobody(
    path: Path, scenario: tuple[str, ...]
) -> None:
    async with Inbox() as inbox:
        slow = Slow(inbox)
        await subscribe(path, inbox)
        async with operator(path) as before:
            await before.emit("video.ready", event_id="evt_1")
        async with child(scenario[0], path, *scenario[1:]) as parent:
            assert "create the dispatcher in the child" in await parent.hear("refused")
            assert await parent.hear("forked child ended with") == "7"
            await inbox.wait_for(ENDPOINTS)
            async with child("plain", path) as third:
                await third.hear("started")
                slow.answer()
                await parent.ask("emit evt_2")
                await until(lambda: states(path)["succeeded"] == 2 * ENDPOINTS)
                assert (await health(parent))["state"] == "healthy"
                now = await health(third)
                assert (now["state"], now["is_delivering"]) == ("standby", False)
    assert set(slow.sent.values()) == {1}
    assert len(slow.sent) == 2 * ENDPOINTS
    assert errors(path) == []
    assert integrity(path) == "ok"


async def test_a_process_that_stood_still_for_twice_its_leases_neither_loses_nor_doubles_anything(path: Path) -> None:
    origin, times = time.monotonic_ns(), 40
    clock = FastClock(origin, times)
    async with Inbox() as inbox, operator(path, clock=clock) as other, child("fast", path, origin, times) as worker:
        slow = Slow(inbox)
        await worker.hear("started")
        for number in range(ENDPOINTS):
            await other.endpoints.create(inbox.url_for(f"/{number}"), events=["*"])
        await worker.ask("emit evt_1")
        await inbox.wait_for(ENDPOINTS)
        until_leases_end = clock.now() + 2 * 60 * 1_000_000
        worker.signal(signal.SIGSTOP)
        await other.emit("video.ready", event_id="evt_2")
        await until(lambda: clock.now() > until_leases_end)
        assert (await other.health()).state == "healthy"
        cancelled = (await other.deliveries.list(event_id="evt_1")).items[0]
        await other.deliveries.cancel(cancelled.id)
        slow.answer()
        worker.signal(signal.SIGCONT)
        await until(lambda: states(path) == {"succeeded": 2 * ENDPOINTS - 1, "cancelled": 1})
        now = await health(worker)
        assert (now["state"], now["lost_leases"], now["in_flight"]) == ("healthy", 1, 0)
        assert (await other.deliveries.get(cancelled.id)).state == "cancelled"
    assert set(slow.sent.values()) == {1}
    assert len(slow.sent) == 2 * ENDPOINTS
    assert errors(path) == ["interrupted"]
    assert integrity(path) == "ok"


async def test_a_process_that_is_stopped_again_and_again_at_random_moments_delivers_everything_once(path: Path) -> None:
    chance, origin, times, events = Random(5), time.monotonic_ns(), 100, 100
    clock = FastClock(origin, times)

    async def respond(received: Received) -> int:
        await asyncio.sleep(chance.random() * 0.02)
        return 200

    async with Inbox() as inbox, operator(path, clock=clock) as other, child("fast", path, origin, times) as worker:
        inbox.respond_with(respond)
        await worker.hear("started")
        for number in range(ENDPOINTS):
            await other.endpoints.create(inbox.url_for(f"/{number}"), events=["*"])
        await other.emit_many([NewEvent("video.ready", event_id=f"evt_{number}") for number in range(events)])
        for _ in range(3):
            await inbox.wait_for(len(inbox.received) + 1)
            await asyncio.sleep(chance.random() * 0.05)
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(2 * 60 / times)  # twice the lease
            worker.signal(signal.SIGCONT)
        await until(lambda: states(path)["succeeded"] == events * ENDPOINTS, timeout=20)
        now = await health(worker)
        assert (now["state"], now["lost_leases"], now["in_flight"], now["problems"]) == ("healthy", 0, 0, [])
        sent = Counter((one.path, one.event_id) for one in inbox.received)
    assert len(sent) == events * ENDPOINTS
    assert set(sent.values()) == {1}
    assert look(path, "SELECT DISTINCT attempt_count, interruptions FROM hookwright_delivery") == [(1, 0)]
    assert integrity(path) == "ok"
