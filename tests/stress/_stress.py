"""Starts the players, looks at the tables all along, ends it all, and judges."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from hookwright import Clock, EndpointState, PostgresStorage
from hookwright._clock import SECOND
from hookwright._models import DeliveryState, Outcome
from hookwright.storage._base import ClaimRequest
from tests.crash.receiver import ROOT
from tests.stress._laws import broken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Say = Callable[[str], object]

SCHEMA = "hookwright"

LOOK_EVERY = 5.0

CLAIM_MOST = 2.5
"""Seconds that a claim may take on a busy machine: others hold locks for up to 4."""

DRAIN_WITHIN = 120.0

PATIENCE = 60.0
"""Seconds beyond its time that a player may need to end."""


class Options(NamedTuple):
    """What is asked for. `kill_every` is in seconds; 0: nobody is killed."""

    dsn: str
    processes: int = 4
    seconds: float = 600.0
    seed: int = 1
    kill_every: float = 20.0


@dataclass
class Figures:
    """What the players told, all together."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    looks: int = 0
    kills: int = 0
    deadlocks: int = 0
    drained: int = 0


class _Process:
    """One player, and what it told last."""

    def __init__(self, options: Options, number: int, left: float) -> None:
        self._command = (options.dsn, str(options.seed), str(number), str(left))
        self._latest: Counter[str] = Counter()
        self.killed = False

    async def run(self, figures: Figures) -> None:
        """Let it play to its end; take over what it told."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.stress._player", *self._command, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed meanwhile
            counts, slowest, errors = json.loads(line)
            figures.counts.update(Counter(counts) - self._latest)
            self._latest = Counter(counts)
            for verb, seconds in slowest.items():
                figures.slowest[verb] = max(figures.slowest.get(verb, 0.0), seconds)
            figures.broken += errors
        if await self.process.wait() and not self.killed:
            figures.broken.append(f"a process ended with {self.process.returncode}")

    def kill(self) -> None:
        """End it as the out-of-memory killer does."""
        self.killed = True
        self.process.kill()


class Stress:
    """One run."""

    def __init__(self, options: Options, say: Say) -> None:
        self._options = options
        self._say = say
        self._chance = random.Random(options.seed)
        self._begun = time.monotonic()
        self._players: dict[int, _Process] = {}
        self.figures = Figures()

    @property
    def _left(self) -> float:
        return self._begun + self._options.seconds - time.monotonic()

    async def run(self) -> Figures:
        """Run to the end, and judge."""
        connection = await asyncpg.connect(self._options.dsn)
        try:
            await connection.execute(f'DROP SCHEMA IF EXISTS "{SCHEMA}" CASCADE')
            async with self._storage() as storage:
                before = await _deadlocks(connection)
                async with asyncio.timeout(self._options.seconds + PATIENCE), asyncio.TaskGroup() as group:
                    for number in range(self._options.processes):
                        group.create_task(self._keep_playing(number))
                    group.create_task(self._kill_now_and_then())
                    group.create_task(self._look(connection, before))
                await self._drain(storage)
                await self._judge(connection, before)
        finally:
            connection.terminate()
        return self.figures

    @asynccontextmanager
    async def _storage(self) -> AsyncIterator[PostgresStorage]:
        storage = PostgresStorage(self._options.dsn)
        await storage.open(Clock())
        try:
            yield storage
        finally:
            await storage.close()

    async def _keep_playing(self, number: int) -> None:
        while self._left > 0:
            self._players[number] = player = _Process(self._options, number, self._left)
            await player.run(self.figures)

    async def _kill_now_and_then(self) -> None:
        while self._options.kill_every and self._left > self._options.kill_every:
            await asyncio.sleep(self._options.kill_every)
            self._players[self._chance.randrange(self._options.processes)].kill()
            self.figures.kills += 1

    async def _look(self, connection: asyncpg.Connection, before: int) -> None:
        told = 0
        while self._left > 0:
            await asyncio.sleep(min(LOOK_EVERY, max(0.0, self._left)))
            figures = self.figures
            figures.broken += await broken(connection, SCHEMA)
            figures.looks += 1
            figures.deadlocks = await _deadlocks(connection) - before
            counts = figures.counts
            self._say(
                f"{self._options.seconds - self._left:.0f} s: {sum(counts.values()):,} done, {counts['claim']:,} claims"
                f" (slowest {1000 * figures.slowest.get('claim', 0):.0f} ms), {figures.kills} kills,"
                f" {figures.deadlocks} deadlocks, {len(figures.broken)} broken"
            )
            for what in figures.broken[told : told + 10]:
                self._say(f"  BROKEN {what}")
            told = len(figures.broken)

    async def _drain(self, storage: PostgresStorage) -> None:
        """Nobody else is there any more: all that is pending must come out."""
        await storage.acquire()
        for endpoint in (await storage.changes(0)).endpoints:
            if endpoint.state is EndpointState.PAUSED and not endpoint.deleted:
                await storage.set_endpoint_state(endpoint.id, EndpointState.ACTIVE, reason=None)
        until = time.monotonic() + DRAIN_WITHIN
        self._say(f"all have ended after {time.monotonic() - self._begun:.0f} s; left: {await storage.backlog()}")
        while (await storage.backlog()).pending:
            if time.monotonic() > until:
                self.figures.broken.append(f"it does not drain: {await storage.backlog()}")
                return
            claim = await storage.claim(ClaimRequest(256, 256, 60 * SECOND, 256, {}))
            ended = [
                Outcome(lease.delivery_id, lease.token, lease.endpoint_id, DeliveryState.SUCCEEDED, None)
                for lease in claim.leases
            ]
            self.figures.drained += len(ended)
            if not all(settled.held for settled in await storage.settle(ended)):
                self.figures.broken.append("a lease was lost though nobody else was there")
            await storage.sweep()
            await asyncio.sleep(0.01)

    async def _judge(self, connection: asyncpg.Connection, before: int) -> None:
        figures = self.figures
        figures.broken += await broken(connection, SCHEMA)
        await asyncio.sleep(1.5)  # statistics come late
        figures.deadlocks = await _deadlocks(connection) - before
        if figures.deadlocks:
            figures.broken.append(f"{figures.deadlocks} deadlocks")
        if figures.slowest.get("claim", 0.0) > CLAIM_MOST:
            figures.broken.append(f"a claim took {figures.slowest['claim']:.1f} s")


async def _deadlocks(connection: asyncpg.Connection) -> int:
    found = await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return int(found)


def table(figures: Figures) -> str:
    """Return what was done, how often, and how long it took at most."""
    lines = [f"{'verb':<36} {'times':>9} {'slowest':>9}"]
    for what, count in sorted(figures.counts.items()):
        slowest = f"{1000 * figures.slowest[what]:.0f} ms" if what in figures.slowest else ""
        lines.append(f"{what:<36} {count:>9,} {slowest:>9}")
    lines.append(
        f"looked at {figures.looks} times, {figures.kills} processes killed, {figures.drained:,} deliveries drained,"
        f" {figures.deadlocks} deadlocks, {len(figures.broken)} broken"
    )
    return "\n".join(lines)
