"""emit: durable events a second, against one aiosqlite transaction for each event. Nothing is delivered meanwhile."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiosqlite

from benchmarks._harness import Report, Result, alternate, at_least
from hookwright import Dispatcher, SQLiteStorage
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

DATA = {"video_id": "vid_123", "text": "x" * 960}
EMITTERS = 64


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    count = 256 if quick else 6400
    per_transaction: list[float] = []
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        numbers = iter(range(1000))

        async def transaction_each() -> float:
            async with aiosqlite.connect(Path(folder) / f"{next(numbers)}.db", isolation_level=None) as database:
                await database.execute("PRAGMA journal_mode = WAL")
                await database.execute("PRAGMA synchronous = FULL")
                await database.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, type TEXT, data TEXT)")
                await database.execute("CREATE TABLE delivery (id INTEGER PRIMARY KEY, event_id INTEGER, state TEXT)")
                data = '{"video_id":"vid_123","text":"' + "x" * 960 + '"}'
                each = count // 8
                begin = time.perf_counter()
                for number in range(each):
                    await database.execute("BEGIN IMMEDIATE")
                    await database.execute("INSERT INTO event VALUES (?, 'video.ready', ?)", (number, data))
                    await database.execute("INSERT INTO delivery VALUES (?, ?, 'pending')", (number, number))
                    await database.execute("COMMIT")
                return each / (time.perf_counter() - begin)

        async def emitters(number: int) -> float:
            storage = SQLiteStorage(Path(folder) / f"{next(numbers)}.db")
            async with Dispatcher(storage, transport=FakeTransport(), deliver=False, keys=[]) as dispatcher:
                await dispatcher.endpoints.create("https://receiver.example/", events=["*"])
                await dispatcher.emit("warm.up")
                each = count // 8 if number == 1 else count // number
                before, begin = storage.transactions, time.perf_counter()

                async def one() -> None:
                    for _ in range(each):
                        await dispatcher.emit("video.ready", DATA)

                async with watch.probing():
                    await asyncio.gather(*(one() for _ in range(number)))
                took = time.perf_counter() - begin
                if number > 1:
                    per_transaction.append(each * number / (storage.transactions - before))
                return each * number / took

        report = await alternate(
            "emit: 1 KB events, one matching endpoint, FULL",
            {
                "aiosqlite, a transaction each": ("events/s", transaction_each),
                "one emitter": ("events/s", lambda: emitters(1)),
                f"{EMITTERS} emitters": ("events/s", lambda: emitters(EMITTERS)),
            },
            count=1 if quick else 5,
        )
    report.compare("one emitter", "aiosqlite, a transaction each", target=at_least(0.60))
    report.compare(f"{EMITTERS} emitters", "aiosqlite, a transaction each", target=at_least(3.50))
    name = f"events per transaction, {EMITTERS} emitters"
    report.results.append(Result(name, "events", per_transaction, at_least(51.2, "events")))
    return report
