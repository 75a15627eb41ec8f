"""One process of many: at random it emits, claims, settles and meddles, until it is told to end or is killed.

`python -m tests.stress._player DSN SEED NUMBER SECONDS`. It says in lines of JSON how it fares.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import asyncpg

from hookwright import Clock, Dispatcher, Failure, PostgresStorage, Profile, Response, RetryPolicy
from tests.stress._verbs import EXPECTED, Hands

if TYPE_CHECKING:
    from hookwright import Request

ACTORS = 3
"""That use the storage at the same time; others emit through the dispatcher, and in transactions of their own."""

TOLD_EVERY = 1.0

LOCKED_FOR = (0.5, 4.0)
"""Seconds that an application's transaction stays open: less than anybody's patience."""

HELD_FOR = (0.5, 2.0)
"""Seconds that somebody holds lanes by hand. One at a time: a lane is never held for longer, in whatever succession."""

ONE_AT_A_TIME = 4711
"""The advisory lock of whoever does."""


class _Answers:
    """A transport that answers at random."""

    def __init__(self, chance: random.Random, figures: Counter[str]) -> None:
        self._chance = chance
        self._figures = figures

    async def send(self, request: Request) -> Response | Failure:
        self._figures["requests"] += 1
        await asyncio.sleep(self._chance.uniform(0.0, 0.05))
        drawn = self._chance.random()
        if drawn < 0.02:
            return Failure("connect_error", "drawn")
        return Response(200 if drawn < 0.85 else 503 if drawn < 0.95 else 429 if drawn < 0.997 else 410)

    async def aclose(self) -> None:
        """Nothing is open."""


class Player:
    """A storage of its own, a dispatcher, and what they are asked for."""

    def __init__(self, dsn: str, seed: int, number: int, seconds: float) -> None:
        self._dsn = dsn
        self._chance = random.Random(f"{seed} {number} {time.time_ns()}")
        self._until = time.monotonic() + seconds
        self._storage = PostgresStorage(dsn)
        self.figures: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.errors: list[str] = []
        self._dispatcher = Dispatcher(
            PostgresStorage(dsn),
            transport=_Answers(self._chance, self.figures),
            profiles={"default": Profile(retry=RetryPolicy.schedule(*[0.3] * 5))},
            concurrency=32,
            shutdown_timeout=1.0,
            operational_events=True,
            keys=[],
        )
        self._hands = Hands(self._storage, self._dispatcher, self._chance)

    async def play(self) -> None:
        """Do it all until the time is over."""
        await self._storage.open(Clock())
        await self._storage.acquire()
        async with self._dispatcher:
            tasks = [self._act(self._hands.STORAGE) for _ in range(ACTORS)]
            tasks += [self._act(self._hands.DISPATCHER), self._transact(), self._transact(), self._lock(), self._tell()]
            await asyncio.gather(*tasks)
        await self._storage.close()
        self._say()

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._until

    async def _act(self, verbs: dict[str, float]) -> None:
        while not self._over:
            [verb] = self._chance.choices(list(verbs), list(verbs.values()))
            await self._measured(verb, getattr(self._hands, verb)())
            await asyncio.sleep(self._chance.uniform(0.0, 0.02))

    async def _measured(self, verb: str, doing: Any) -> None:
        begun = time.monotonic()
        try:
            await doing
        except EXPECTED.get(verb, ()) as error:
            self.figures[f"{verb}: {type(error).__name__}"] += 1
        except Exception as error:  # noqa: BLE001  # that is what is looked for
            self.errors.append(f"{verb} raised {type(error).__name__}: {error}")
        self.figures[verb] += 1
        self.slowest[verb] = max(self.slowest.get(verb, 0.0), time.monotonic() - begun)

    async def _transact(self) -> None:
        """An application: transactions with emits in them, committed or not, some of them left open for a while."""
        async with asyncpg.create_pool(self._dsn, min_size=0, max_size=2) as pool:
            while not self._over:
                drawn = self._chance.random()
                pause = self._chance.uniform(*LOCKED_FOR) if drawn < 0.15 else self._chance.uniform(0.0, 0.02)
                verb = "opposite" if self._chance.random() < 0.3 else "transaction"
                await self._measured(verb, getattr(self._hands, verb)(pool, pause))

    async def _lock(self) -> None:
        """Somebody looks at lanes by hand, and holds a few of them: no claim may wait for it."""
        connection = await asyncpg.connect(self._dsn)
        with contextlib.closing(_Terminating(connection)):
            while not self._over:
                async with connection.transaction():
                    await connection.execute(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})")
                    await connection.execute(
                        "SELECT endpoint_id FROM hookwright.lane WHERE random() < 0.1 ORDER BY endpoint_id"
                        " FOR UPDATE SKIP LOCKED"
                    )
                    await asyncio.sleep(self._chance.uniform(*HELD_FOR))
                self.figures["lanes locked by hand"] += 1
                await asyncio.sleep(self._chance.uniform(*HELD_FOR))

    async def _tell(self) -> None:
        while not self._over:
            await asyncio.sleep(TOLD_EVERY)
            self._say()

    def _say(self) -> None:
        errors, self.errors = self.errors, []
        self.figures["lost leases"] = self._dispatcher._deliverer.lost_leases
        print(json.dumps([self.figures, self.slowest, errors]), flush=True)  # noqa: T201  # to the driver


class _Terminating:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.terminate()


if __name__ == "__main__":
    asyncio.run(Player(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])).play())
