"""The same world under Hypothesis, whose failures shrink to the fewest steps that show them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from hookwright import ALL_TENANTS
from tests.simulation._loop import SimulatedLoop, turns_until_idle
from tests.simulation._model import Violation
from tests.simulation._receivers import BEHAVIOURS
from tests.simulation._rules import HOUR
from tests.simulation._simulate import (
    ATTRIBUTES,
    FILTERS,
    JUMPS,
    PATTERNS,
    SPANS,
    TENANTS,
    TYPES,
    of_endpoint,
    of_row,
    seeded,
)
from tests.simulation._world import Parts, World
from tests.simulation.test_simulation import Echo

if TYPE_CHECKING:
    from collections.abc import Awaitable

PICK = st.integers(0, 30)
WHICH = st.integers(0, 1)
TURNS = st.sampled_from((0, 1, 3, 8, 20, 60))


class Machine(RuleBasedStateMachine):
    """Each rule is one operation of the world, and then some turns of the loop."""

    parts = Parts()

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.stack = ExitStack()
        self.world: World | None = None

    def run(self, operation: Awaitable[Any]) -> None:
        async def running() -> None:
            await operation

        self.loop.run_until_complete(running())

    @property
    def there(self) -> World:
        assert self.world is not None
        return self.world

    async def _look(self, count: int) -> None:
        await turns_until_idle(count)
        self.there.check()

    @initialize(seed=st.integers(0, 2**16), two=st.booleans(), concurrency=st.sampled_from((1, 2, 8)))
    def begin(self, seed: int, two: bool, concurrency: int) -> None:
        self.stack.enter_context(seeded(seed))

        async def beginning() -> None:
            self.world = World(seed, self.parts)
            await self.world.start(deliver=True, concurrency=concurrency)
            if two:
                await self.world.start(deliver=False)
            await self.world.subscribe(0, ["*"])

        self.run(beginning())

    @rule(
        which=WHICH,
        events=st.sampled_from(PATTERNS),
        tenant=st.sampled_from((*TENANTS, ALL_TENANTS)),
        filters=st.sampled_from(FILTERS),
        concurrency=st.sampled_from((None, 1, 6)),
        rate_limit=st.sampled_from((None, 0.5)),
        count=TURNS,
    )
    def subscribe(self, which: int, events: list[str], count: int, **options: Any) -> None:
        async def act() -> None:
            self.there.subscribe(which, events, **options)
            await self._look(count)

        self.run(act())

    @rule(
        which=WHICH,
        type=st.sampled_from(TYPES),
        tenant=st.sampled_from(TENANTS),
        attributes=st.sampled_from(ATTRIBUTES),
        key=st.sampled_from((None, None, "key 1", "key 2")),
        delay=st.sampled_from((0.0, 0.0, 30.0)),
        copies=st.integers(1, 3),
        cancelled_after=st.none() | st.integers(0, 12),
        count=TURNS,
    )
    def emit(self, which: int, type: str, copies: int, cancelled_after: int | None, count: int, **options: Any) -> None:
        async def act() -> None:
            self.there.emit(which, [self.there.intent(type, **options) for _ in range(copies)])
            if cancelled_after is not None:
                await turns_until_idle(cancelled_after)
                self.there.cancel_latest()
            await self._look(count)

        self.run(act())

    @rule(pick=PICK, kind=st.sampled_from(BEHAVIOURS), asks=st.sampled_from((0, 7, 300)))
    def behave(self, pick: int, kind: str, asks: int) -> None:
        endpoints = list(self.there.model.endpoints.values())
        self.there.behave(endpoints[pick % len(endpoints)].now.url, kind, asks)

    @rule(seconds=st.sampled_from(SPANS), busy=st.sampled_from((2, 25)))
    def advance(self, seconds: float, busy: int) -> None:
        async def act() -> None:
            await self.there.advance(seconds, busy)
            await self._look(0)

        self.run(act())

    @rule(which=WHICH, pick=PICK, act=st.integers(0, 8), count=TURNS)
    def change_endpoint(self, which: int, pick: int, act: int, count: int) -> None:
        endpoints = list(self.there.model.endpoints)
        actions = of_endpoint(
            endpoints[pick % len(endpoints)], url=self.there.new_url(), events=["video.*"], cap=1, overlap=30.0
        )

        async def acting() -> None:
            self.there.act(which, *actions[act])
            await self._look(count)

        self.run(acting())

    @precondition(lambda self: self.there.model.rows)
    @rule(which=WHICH, pick=PICK, act=st.integers(0, 2), force=st.booleans(), count=TURNS)
    def by_hand(self, which: int, pick: int, act: int, force: bool, count: int) -> None:
        rows = list(self.there.model.rows)

        async def acting() -> None:
            self.there.act(which, *of_row(rows[pick % len(rows)], force=force)[act])
            await self._look(count)

        self.run(acting())

    @rule(verbs=st.integers(1, 6), kind=st.integers(0, 2), after=st.booleans())
    def trouble(self, verbs: int, kind: int, after: bool) -> None:
        self.there.trouble(verbs, kind, after=after)

    @rule(which=WHICH, jump=st.sampled_from(JUMPS), concurrency=st.sampled_from((1, 8)), count=TURNS)
    def crash(self, which: int, jump: float, concurrency: int, count: int) -> None:
        async def act() -> None:
            await turns_until_idle(count)
            await self.there.crash(which, jump=jump, concurrency=concurrency)
            await self._look(0)

        self.run(act())

    @rule(which=WHICH, patience=st.sampled_from((0.0, 10.0)))
    def restart(self, which: int, patience: float) -> None:
        async def act() -> None:
            await self.there.restart(which, concurrency=4, shutdown_timeout=patience)
            await self._look(0)

        self.run(act())

    @rule(seconds=st.sampled_from((-HOUR, HOUR)))
    def jump(self, seconds: float) -> None:
        self.there.jump(seconds)

    @rule()
    def calm_down(self) -> None:
        self.run(self.there.calm_down())

    def teardown(self) -> None:
        try:
            if self.world is not None:
                self.run(self._end(self.world))
        finally:
            self.stack.close()
            self.loop.close()

    async def _end(self, world: World) -> None:
        try:
            if not world.model.wrong:
                await world.finish()
        finally:
            for process in list(world.processes):
                await process.crash()


EXAMPLES = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestMachine = Machine.TestCase
TestMachine.settings = EXAMPLES


def test_the_machine_finds_what_is_broken() -> None:
    class Broken(Machine):
        parts = Parts(around=Echo)

    with pytest.raises(Violation, match="sent twice"):
        run_state_machine_as_test(Broken, settings=settings(EXAMPLES, max_examples=20, phases=[Phase.generate]))
