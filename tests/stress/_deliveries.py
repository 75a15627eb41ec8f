"""So many deliveries by several processes that nobody disturbs: each exactly once, and all of them take part.

`python -m tests.stress._deliveries DSN SCHEMA NUMBER EVENTS` is one of them: a dispatcher that emits so many and
delivers whatever it claims, until it is told to end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from hookwright import DeliverySucceeded, DirectTransport, Dispatcher, NetworkPolicy, PostgresStorage
from tests.crash.receiver import ROOT, Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import Callable

ENDPOINTS = 40
FAN_OUT = 2
EMITTERS = 64
"""Emits that one process has under way at once."""

SILENT_MOST = 60.0
"""Seconds without a result after which no more are waited for."""

ENDS_WITHIN = 900.0
"""Seconds for all of it."""


@dataclass
class Counted:
    """What came of it. `shares`: how many each process delivered."""

    shares: list[int] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0
    repeated: int = 0
    missing: int = 0
    kills: int = 0
    states: list[Any] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def told(counted: Counted) -> str:
    """Return the figures as a line."""
    return (
        f"{counted.requests:,} requests in {counted.seconds:.1f} s, {counted.requests / counted.seconds:,.0f}/s;"
        f" {counted.kills} processes killed, {counted.repeated} repeated, {counted.missing} missing;"
        f" delivered by each process: {counted.shares};"
        f" in the database: {counted.states}"
    )


# -- one process --------------------------------------------------------------------------------------------------


def _dispatcher(dsn: str, schema: str, **options: Any) -> Dispatcher:
    return Dispatcher(
        PostgresStorage(dsn, schema=schema),
        network=NetworkPolicy.development(),
        transport=DirectTransport(),
        endpoint_concurrency=16,
        keys=[],
        **options,
    )


async def deliver(dsn: str, schema: str, number: int, events: int) -> None:
    """Say `ready`; at a line, emit; say how many were delivered, again and again; end when the input does."""
    delivered = 0
    loop, commands = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    dispatcher = _dispatcher(dsn, schema)

    @dispatcher.on(DeliverySucceeded)
    def count(_: DeliverySucceeded) -> None:
        nonlocal delivered
        delivered += 1

    async with dispatcher:
        _say("ready")
        await commands.readline()
        numbers = iter(range(events))

        async def emit() -> None:
            for n in numbers:
                await dispatcher.emit(f"stress.{n % (ENDPOINTS // FAN_OUT)}", {"n": n}, event_id=f"evt_{number}_{n}")

        await asyncio.gather(*(emit() for _ in range(EMITTERS)))
        ended = loop.create_task(commands.read())
        while not ended.done():
            await asyncio.wait({ended}, timeout=0.2)
            _say(delivered)
    _say(delivered)


def _say(what: object) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


# -- the driver -----------------------------------------------------------------------------------------------------


class Deliveries:
    """Starts them, counts what arrives, and ends them."""

    def __init__(
        self,
        dsn: str,
        deliveries: int,
        processes: int,
        say: Callable[[str], object],
        *,
        kills: int = 0,
        schema: str = "hookwright",
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._events = deliveries // FAN_OUT // processes
        self._processes = processes
        self._kills = kills
        self._killed = 0
        self._say = say
        self._arrived: Counter[tuple[str, str]] = Counter()
        self._counts = [0] * processes

    @property
    def _wanted(self) -> int:
        return self._events * self._processes * FAN_OUT

    async def run(self) -> Counted:
        """Return the figures when all has arrived and all have ended."""
        counted = Counted()
        with (
            tempfile.TemporaryDirectory(prefix="hookwright-stress-") as folder,
            receiving(Path(folder) / "requests.log", seed=1) as receiver,
        ):
            await self._create(f"http://127.0.0.1:{receiver.port}/")
            async with asyncio.timeout(ENDS_WITHIN):
                counted.seconds = await self._let_them(receiver)
            self._count(receiver)
        await self._judge(counted)
        return counted

    async def _create(self, url: str) -> None:
        connection = await asyncpg.connect(self._dsn)
        await connection.execute(f'DROP SCHEMA IF EXISTS "{self._schema}" CASCADE')
        await connection.close()
        async with _dispatcher(self._dsn, self._schema, deliver=False) as dispatcher:
            for number in range(ENDPOINTS):
                events = [f"stress.{number % (ENDPOINTS // FAN_OUT)}"]
                await dispatcher.endpoints.create(f"{url}{number}/ok", events=events)

    async def _let_them(self, receiver: Receiver) -> float:
        processes = [await self._start(number) for number in range(self._processes)]
        try:
            for process in processes:
                await _ready(process)
            begun = time.monotonic()
            hearing = [asyncio.create_task(self._hear(n, process)) for n, process in enumerate(processes)]
            await self._wait(receiver, processes, hearing)
            seconds = time.monotonic() - begun
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
            await asyncio.gather(*hearing)
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
        return seconds

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        command = ("-m", "tests.stress._deliveries", self._dsn, self._schema, str(number), str(self._events))
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(sys.executable, *command, stdin=pipe, stdout=pipe, cwd=ROOT)

    async def _hear(self, number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"begin\n")
        before = self._counts[number]
        async for line in process.stdout:
            if line.endswith(b"\n"):  # else it was killed meanwhile
                self._counts[number] = before + json.loads(line)
        if await process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"process {number} ended with {process.returncode}")

    async def _wait(
        self, receiver: Receiver, processes: list[asyncio.subprocess.Process], hearing: list[asyncio.Task[None]]
    ) -> None:
        """Until all is stored that will be, or nothing has come for long. Kill some, and let others begin anew."""
        last, since, told = -1, time.monotonic(), time.monotonic()
        while (stored := await self._stored()) < self._wanted and not any(task.done() for task in hearing):
            look_again = 0.2 if self._killed == self._kills else 0.02
            await asyncio.wait(hearing, timeout=look_again, return_when=asyncio.FIRST_COMPLETED)
            self._count(receiver)
            if stored > last:
                last, since = stored, time.monotonic()
            if time.monotonic() - since > SILENT_MOST:
                return
            if time.monotonic() - told > 5:
                told = time.monotonic()
                self._say(f"{self._arrived.total():,}/{self._wanted:,} requests, {stored:,} stored")
            if self._killed < self._kills and stored >= self._wanted * (self._killed + 1) / (self._kills + 1):
                number = self._killed % self._processes
                self._killed += 1
                processes[number].kill()
                await hearing[number]
                # It emits everything again under the same ids.
                processes[number] = await self._start(number)
                await _ready(processes[number])
                hearing[number] = asyncio.create_task(self._hear(number, processes[number]))

    async def _stored(self) -> int:
        """Return how many results are known: told by those that live, or, when some were killed, in the tables."""
        if not self._kills:
            return sum(self._counts)
        connection = await asyncpg.connect(self._dsn)
        ended = f'SELECT count(*) FROM "{self._schema}".delivery WHERE available_at IS NULL'
        found = await connection.fetchval(ended)
        await connection.close()
        return int(found)

    def _count(self, receiver: Receiver) -> None:
        self._arrived.update((request.path, request.event_id) for request in receiver.read())

    async def _judge(self, counted: Counted) -> None:
        wanted = {
            (f"/{endpoint}/ok", f"evt_{number}_{n}")
            for number in range(self._processes)
            for n in range(self._events)
            for endpoint in range(n % (ENDPOINTS // FAN_OUT), ENDPOINTS, ENDPOINTS // FAN_OUT)
        }
        counted.shares, counted.kills = self._counts, self._killed
        counted.requests = self._arrived.total()
        counted.repeated = counted.requests - len(self._arrived)
        counted.missing = len(wanted - self._arrived.keys())
        connection = await asyncpg.connect(self._dsn)
        rows = await connection.fetch(
            f'SELECT state, attempt_count, count(*) FROM "{self._schema}".delivery GROUP BY 1, 2 ORDER BY 1, 2'
        )
        await connection.close()
        counted.states = [tuple(row) for row in rows]
        if counted.missing or self._arrived.keys() - wanted:
            counted.broken.append(f"{counted.missing} deliveries never arrived")
        if {row[0] for row in rows} != {"succeeded"} or sum(row[2] for row in rows) != len(wanted):
            counted.broken.append(f"in the database: {counted.states}")
        if counted.requests > sum(row[1] * row[2] for row in rows):
            counted.broken.append("there were more requests than attempts")
        if min(counted.shares) < len(wanted) / self._processes / 4:
            counted.broken.append(f"the work was not shared: {counted.shares}")
        if not self._kills and counted.states != [("succeeded", 1, len(wanted))]:
            counted.broken.append(f"not at the first attempt: {counted.states}")
        if not self._kills and (counted.repeated or sum(counted.shares) != len(wanted)):
            counted.broken.append(f"{counted.repeated} were sent twice: {self._arrived.most_common(3)}")


async def _ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    await process.stdout.readline()


if __name__ == "__main__":
    asyncio.run(deliver(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
