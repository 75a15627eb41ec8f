"""The wall clock jumps: while a dispatcher runs, and while none does."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from hookwright import DeliveryState, Dispatcher, Profile, Response, RetryPolicy, Secret
from hookwright.receiver import Verifier
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import URL, until

if TYPE_CHECKING:
    from hookwright import Request

JUMPS = {
    "an hour on": timedelta(hours=1),
    "an hour back": timedelta(hours=-1),
    "a year on": timedelta(days=365),
    "a year back": timedelta(days=-365),
    "a day back": timedelta(days=-1),
}
MORNING = datetime(2026, 6, 1, 8, tzinfo=UTC)
MINUTE = 60.0
PROFILES = {"default": Profile(retry=RetryPolicy.schedule(0, MINUTE, MINUTE, jitter=0.0))}
jumps = pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)


@jumps
async def test_while_it_runs_a_jump_moves_no_retry_and_holds_no_fresh_event(sqlite_url: str, jump: timedelta) -> None:
    clock, transport = VirtualClock(MORNING), FakeTransport([500, 200])
    secret = Secret.generate()
    async with Dispatcher(sqlite_url, transport=transport, clock=clock, profiles=PROFILES) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=secret)
        await dispatcher.emit("first")
        await dispatcher.drain()
        clock.set_wall(MORNING + jump)
        await dispatcher.emit("fresh")
        await dispatcher.drain()
        assert len(transport.requests) == 2
        await clock.advance(MINUTE - 1, settle=dispatcher.drain)
        assert len(transport.requests) == 2
        await clock.advance(1, settle=dispatcher.drain)
        assert len(transport.requests) == 3
        # What is signed says the wall's time: receivers compare it with theirs.
        now = (MORNING + jump + timedelta(minutes=1)).timestamp()
        verifier = Verifier(secret.reveal(), now=lambda: now)
        assert verifier.verify(transport.requests[2].body, transport.requests[2].headers).payload["type"] == "first"
        assert (await dispatcher.health()).state == "healthy"


@jumps
async def test_over_a_restart_fresh_events_go_at_once_and_retries_are_late_by_the_jump_at_most(
    sqlite_url: str, jump: timedelta
) -> None:
    clock, transport = VirtualClock(MORNING), FakeTransport()
    transport.respond(URL, [Response(503, (("Retry-After", "50"),)), 200])
    async with Dispatcher(sqlite_url, transport=transport, clock=clock, profiles=PROFILES) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])  # it answers with a hold
        other = await dispatcher.endpoints.create(f"{URL}/other", events=["*"], rate_limit=0.1)
        await dispatcher.emit("first")
        await dispatcher.drain()
    before = len(transport.requests)
    assert before == 2
    clock = VirtualClock(MORNING + jump)
    # Without retention, which would look for old events every hour of a year.
    async with Dispatcher(
        sqlite_url, transport=transport, clock=clock, profiles=PROFILES, retention=None
    ) as dispatcher:
        fresh = await dispatcher.emit("fresh", endpoint_id=other.id)
        await clock.advance(10, settle=dispatcher.drain)  # its rate limit's own time
        assert [row.state for row in await dispatcher.deliveries.wait(fresh.event_id)] == [DeliveryState.SUCCEEDED]
        late = max(timedelta(0), -jump)
        await clock.advance(timedelta(minutes=11) + late, settle=dispatcher.drain)
        assert await dispatcher.deliveries.count(status="pending") == 0
        assert len(transport.requests) == before + 2
        assert (await dispatcher.health()).state == "healthy"


class Crowd(FakeTransport):
    """Knows how many requests it had to answer at once."""

    def __init__(self) -> None:
        super().__init__(500)
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.calm = True

    async def send(self, request: Request) -> Response:
        if self.calm:
            self.requests.append(request)
            return Response(500)
        self.now[request.url] += 1
        self.most[request.url] = max(self.most[request.url], self.now[request.url])
        self.requests.append(request)
        await until(lambda: True)
        self.now[request.url] -= 1
        return Response(500)


async def test_a_year_on_over_a_restart_makes_all_retries_due_and_yet_no_storm(sqlite_url: str) -> None:
    transport = Crowd()
    clock = VirtualClock(MORNING)
    async with Dispatcher(sqlite_url, transport=transport, clock=clock, profiles=PROFILES) as dispatcher:
        for number in range(3):
            await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
        for number in range(40):
            await dispatcher.emit("video.ready", number)
        await dispatcher.drain()
    transport.requests.clear()
    transport.calm = False
    clock = VirtualClock(MORNING + timedelta(days=365))
    async with Dispatcher(sqlite_url, transport=transport, clock=clock, profiles=PROFILES) as dispatcher:
        await dispatcher.drain()
        assert len(transport.requests) == 120  # each once
        assert set(transport.most.values()) == {1}  # an endpoint that failed has room for one
        assert await dispatcher.deliveries.count(status="pending") == 120
