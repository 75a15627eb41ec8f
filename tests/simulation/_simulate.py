"""One seed, one history: what happens next is drawn, done, and checked."""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from hookwright import ALL_TENANTS, _ids, _secret
from tests.simulation import _loop
from tests.simulation._loop import turns_until_idle
from tests.simulation._receivers import BEHAVIOURS
from tests.simulation._rules import HOUR
from tests.simulation._world import Parts, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hookwright import Dispatcher
    from tests.simulation._rules import Intent

STEPS = 60

Action = tuple[str, "Callable[[Dispatcher], Any]"]

TYPES = ("video.ready", "video.failed", "video", "export.done", "videos.ready")
PATTERNS = (["*"], ["*"], ["video.*"], ["video.ready"], ["export.*", "video"], ["video.ready", "*"])
TENANTS = (None, None, None, None, "one", "two")
FILTERS: tuple[Any, ...] = (
    None,
    None,
    None,
    None,
    None,
    None,
    {"index": ["a", "b"]},
    {"index": [1]},
    {"flag": [True], "index": ["a"]},
)
ATTRIBUTES: tuple[Any, ...] = (
    (),
    (("index", ("a",)),),
    (("index", (1, "b")), ("flag", (True,))),
    (("index", (True,)),),
)
JUMPS = (0.0, 0.0, 0.0, 0.0, 30.0, -30.0, HOUR, -HOUR, 24 * HOUR, -24 * HOUR)
SPANS = (0.1, 1.0, 5.0, 15.0, 61.0, 600.0, 2 * HOUR, 12 * HOUR)


@dataclass
class Trace:
    """What happened under a seed; `failure` is what was found wrong, and None is what all hope for."""

    seed: int
    steps: int
    lines: list[str] = field(default_factory=list)
    failure: str | None = None
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What to type to see it again."""
        return f"python -m tests.simulation --seed {self.seed} --steps {self.steps}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let ids, tokens and secrets come from the seed, and the logger be silent."""
    source = SimpleNamespace(urandom=random.Random(f"ids {seed}").randbytes)
    logger = logging.getLogger("hookwright")
    before = logger.disabled
    logger.disabled = True
    try:
        with patch.object(_ids, "os", source), patch.object(_secret, "os", source):
            yield
    finally:
        logger.disabled = before


def simulate(seed: int, steps: int = STEPS, parts: Parts | None = None) -> Trace:
    """Run one history and return it."""
    trace = Trace(seed, steps)
    with seeded(seed):
        try:
            _loop.run(_live(trace, parts or Parts()))
        except Exception as wrong:  # noqa: BLE001  # whatever it is, the seed and the history so far are kept
            trace.failure = f"{type(wrong).__name__}: {wrong}"
    return trace


async def _live(trace: Trace, parts: Parts) -> None:
    world = World(trace.seed, parts)
    trace.lines = world.lines
    fate = Fate(world, random.Random(f"fate {trace.seed}"))
    try:
        await fate.begin()
        for _ in range(trace.steps):
            await fate.step()
            world.check()
        await world.finish()
        trace.figures = {
            "events": len(world.model.events),
            "deliveries": len(world.model.rows),
            "requests": len(world.receivers.requests),
            "repeats": world.receivers.repeats,
            "crashes": world.crashes,
            "faults": world.disk.faults.struck,
        }
    finally:
        for process in list(world.processes):
            await process.crash()


class Fate:
    """Draws what happens."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world = world
        self._chance = chance
        self._told: list[Intent] = []
        choices: dict[Callable[[], Any], int] = {
            self._emit: 30,
            self._begin_and_cancel: 6,
            self._subscribe: 5,
            self._behave: 14,
            self._advance: 18,
            self._by_hand: 8,
            self._change_state: 10,
            self._change_endpoint: 6,
            self._trouble: 6,
            self._crash: 5,
            self._restart: 3,
            self._jump: 2,
            self._crash_again_and_again: 1,
            self._calm: 2,
        }
        self._choices, self._weights = list(choices), list(choices.values())

    async def begin(self) -> None:
        """Start one process or two, with a few endpoints."""
        chance = self._chance
        await self._world.start(deliver=True, concurrency=chance.choice((1, 2, 4, 8)))
        if chance.random() < 0.3:
            await self._world.start(deliver=False)
        for _ in range(chance.randint(1, 4)):
            await self._subscribe()
        await turns_until_idle(60)

    async def step(self) -> None:
        """Let one thing happen, and then give it some time to be done, or none."""
        await self._chance.choices(self._choices, self._weights)[0]()
        await turns_until_idle(self._chance.choice((0, 1, 3, 8, 20, 60)))

    # -- what can happen ------------------------------------------------------------------------------------------

    def _which(self) -> int:
        return self._chance.randrange(2)

    def _endpoint(self) -> str | None:
        endpoints = list(self._world.model.endpoints)
        return self._chance.choice(endpoints) if endpoints else None

    def _row(self) -> str | None:
        rows = list(self._world.model.rows)
        return self._chance.choice(rows) if rows else None

    async def _subscribe(self) -> None:
        chance = self._chance
        options: dict[str, Any] = {
            "tenant": chance.choice((*TENANTS, ALL_TENANTS)),
            "filters": chance.choice(FILTERS),
            "concurrency": chance.choice((None, None, 1, 2, 6)),
            "rate_limit": chance.choice((None, None, None, 0.5, 5.0)),
            "profile": chance.choice(("default", "default", "patient")),
        }
        self._world.subscribe(self._which(), chance.choice(PATTERNS), **options)

    def _draw(self) -> Intent:
        chance = self._chance
        if self._told and chance.random() < 0.15:
            return chance.choice(self._told)
        intent = self._world.intent(
            chance.choice(TYPES),
            tenant=chance.choice(TENANTS),
            attributes=chance.choice(ATTRIBUTES),
            key=f"key {chance.randrange(20)}" if chance.random() < 0.2 else None,
            event_id=f"own_{chance.randrange(20)}" if chance.random() < 0.2 else None,
            endpoint_id=self._endpoint() if chance.random() < 0.1 else None,
            delay=chance.choice((0.0, 0.0, 0.0, 30.0, HOUR)),
        )
        self._told.append(intent)
        return intent

    async def _emit(self) -> None:
        which = self._which()
        for _ in range(self._chance.choice((1, 1, 1, 2, 5))):
            count = self._chance.choice((1, 1, 1, 3))
            self._world.emit(which, [self._draw() for _ in range(count)])

    async def _begin_and_cancel(self) -> None:
        actions = (self._emit, self._emit, self._by_hand, self._change_state, self._change_endpoint, self._subscribe)
        await self._chance.choice(actions)()
        await turns_until_idle(self._chance.randrange(16))
        self._world.cancel_latest()

    async def _behave(self) -> None:
        urls = [endpoint.now.url for endpoint in self._world.model.endpoints.values()]
        if urls:
            asks = self._chance.choice((0, 0, 7, 300, 7200, 90_000))
            self._world.behave(self._chance.choice(urls), self._chance.choice((*BEHAVIOURS, "200", "200")), asks)

    async def _advance(self) -> None:
        await self._world.advance(self._chance.choice(SPANS), self._chance.choice((2, 10, 25, 40)))

    async def _by_hand(self) -> None:
        id, endpoint_id = self._row(), self._endpoint()
        if id is None or endpoint_id is None:
            return
        actions = [*of_row(id, force=self._chance.random() < 0.3), *of_all(endpoint_id)]
        self._world.act(self._which(), *self._chance.choices(actions, (6, 4, 1, 2, 1))[0])

    async def _change_state(self) -> None:
        await self._change(4, 5, 2, 4, 1, 0, 0, 0, 0)

    async def _change_endpoint(self) -> None:
        await self._change(0, 0, 0, 0, 0, 1, 1, 1, 1)

    async def _change(self, *weights: int) -> None:
        id = self._endpoint()
        if id is None:
            return
        actions = of_endpoint(
            id,
            url=self._world.new_url(),
            events=self._chance.choice(PATTERNS),
            cap=self._chance.choice((None, 1, 5)),
            overlap=self._chance.choice((0.0, 30.0, HOUR)),
        )
        self._world.act(self._which(), *self._chance.choices(actions, weights)[0])

    async def _trouble(self) -> None:
        self._world.trouble(
            self._chance.choice((1, 1, 2, 3, 6)), self._chance.randrange(3), after=self._chance.random() < 0.5
        )

    async def _crash(self) -> None:
        if self._chance.random() < 0.5:
            await self._emit()
        await turns_until_idle(self._chance.randrange(30))
        concurrency = self._chance.choice((1, 2, 4, 8))
        await self._world.crash(self._which(), jump=self._chance.choice(JUMPS), concurrency=concurrency)

    async def _crash_again_and_again(self) -> None:
        for _ in range(self._chance.randint(2, 6)):
            await self._crash()

    async def _calm(self) -> None:
        await self._world.calm_down()

    async def _restart(self) -> None:
        concurrency, patience = self._chance.choice((1, 2, 4, 8)), self._chance.choice((0.0, 10.0))
        await self._world.restart(self._which(), concurrency=concurrency, shutdown_timeout=patience)

    async def _jump(self) -> None:
        self._world.jump(self._chance.choice(JUMPS))


def of_endpoint(id: str, *, url: str, events: list[str], cap: int | None, overlap: float) -> list[Action]:
    """Return what can be done to an endpoint: five states, four changes."""
    return [
        (f"pause {id}", lambda dispatcher: dispatcher.endpoints.pause(id)),
        (f"resume {id}", lambda dispatcher: dispatcher.endpoints.resume(id)),
        (f"disable {id}", lambda dispatcher: dispatcher.endpoints.disable(id)),
        (f"enable {id}", lambda dispatcher: dispatcher.endpoints.enable(id)),
        (f"delete {id}", lambda dispatcher: dispatcher.endpoints.delete(id)),
        (f"update {id} {url}", lambda dispatcher: dispatcher.endpoints.update(id, url=url)),
        (f"update {id} {events}", lambda dispatcher: dispatcher.endpoints.update(id, events=events)),
        (f"update {id} concurrency={cap}", lambda dispatcher: dispatcher.endpoints.update(id, concurrency=cap)),
        (
            f"rotate {id} {overlap}",
            lambda dispatcher: dispatcher.endpoints.rotate_secret(id, overlap=timedelta(seconds=overlap)),
        ),
    ]


def of_row(id: str, *, force: bool) -> list[Action]:
    """Return what can be done to a delivery, and to all that ended without success."""
    return [
        (f"retry {id} force={force}", lambda dispatcher: dispatcher.deliveries.retry(id, force=force)),
        (f"cancel {id}", lambda dispatcher: dispatcher.deliveries.cancel(id)),
        ("replay", lambda dispatcher: dispatcher.deliveries.replay()),
    ]


def of_all(endpoint_id: str) -> list[Action]:
    """Return what can be done to all deliveries of an endpoint."""
    return [
        (f"replay {endpoint_id}", lambda dispatcher: dispatcher.deliveries.replay(endpoint_id=endpoint_id)),
        (f"cancel {endpoint_id}", lambda dispatcher: dispatcher.deliveries.cancel_all(endpoint_id=endpoint_id)),
    ]
