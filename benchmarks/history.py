"""history: pages of a history of a million deliveries against a bare indexed select, and emitting beside it."""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._harness import Report, Result, alternate, at_least, at_most, tell
from hookwright import Dispatcher
from hookwright.testing import FakeTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks._stalls import Watch

ROWS = 1_000_000
ENDPOINTS = 20
PAGE = 50
ROUNDS = 9
FILL = """
WITH RECURSIVE n(i) AS (SELECT ?1 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?2)
"""
STATE = "CASE i % 10 WHEN 0 THEN 'failed' ELSE 'succeeded' END"


def _fill(path: Path, endpoints: list[str], rows: int) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("CREATE TEMP TABLE endpoint (i INTEGER PRIMARY KEY, id TEXT)")
    database.executemany("INSERT INTO endpoint VALUES (?, ?)", enumerate(endpoints))
    now = time.time_ns() // 1000
    for begin in range(0, rows, 100_000):
        span = (begin, min(begin + 100_000, rows))
        tell(f"{span[1]:,} of {rows:,} deliveries stored")
        database.execute("BEGIN")
        database.execute(
            FILL + "INSERT INTO hookwright_event SELECT printf('evt_00%010x%020d', i, i), 'type.' || (i % 5), NULL,"
            f" x'7b7d', '{{}}', {now} - {rows} + i, {now} - {rows} + i, NULL, NULL, 1, NULL, NULL FROM n",
            span,
        )
        database.execute(
            FILL + "INSERT INTO hookwright_delivery SELECT printf('dlv_00%010x%020d', i, i),"
            f" printf('evt_00%010x%020d', i, i), (SELECT id FROM endpoint WHERE endpoint.i = n.i % {len(endpoints)}),"
            f" {STATE}, NULL, 1, 0, 0, {now} - {rows} + i, NULL, {now}, 200, NULL FROM n",
            span,
        )
        database.execute(
            FILL + f"INSERT INTO hookwright_attempt SELECT printf('dlv_00%010x%020d', i, i), 1, {now}, 9000, 200, NULL,"
            " NULL, NULL, NULL, 0, NULL FROM n",
            span,
        )
        database.execute("COMMIT")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


async def _pages(dispatcher: Dispatcher, path: Path, endpoint: str, where: dict[str, Any], rows: int) -> list[Result]:
    """Time the first and the thousandth page, and a bare select of as many rows, in alternation."""
    listing = dispatcher.deliveries.list
    cursor, passed = None, 0
    while passed < min(999 * PAGE, rows // 20):
        page = await listing(**where, limit=500, cursor=cursor)
        if page.next_cursor is None:
            break
        cursor, passed = page.next_cursor, passed + 500
    bare = sqlite3.connect(path, isolation_level=None)
    select = "SELECT * FROM hookwright_delivery WHERE endpoint_id = ? ORDER BY id DESC LIMIT ?"
    times: dict[str, list[float]] = {"bare": [], "first": [], "far": []}
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        assert bare.execute(select, (endpoint, PAGE + 1)).fetchall()
        times["bare"].append((time.perf_counter() - begin) * 1000)
        for name, at in (("first", None), ("far", cursor)):
            begin = time.perf_counter()
            assert (await listing(**where, limit=PAGE, cursor=at)).items
            times[name].append((time.perf_counter() - begin) * 1000)
    bare.close()
    limit = max(20.0, 2 * statistics.median(times["bare"]))
    shown = ", ".join(f"{key}" for key in where) or "everything"
    return [
        Result(f"bare select ({shown})", "ms", times["bare"]),
        Result(f"first page ({shown})", "ms", times["first"], target=at_most(round(limit), "ms")),
        Result(f"page {passed // PAGE + 1} ({shown})", "ms", times["far"], target=at_most(round(limit), "ms")),
    ]


async def _emitting(dispatcher: Dispatcher, count: int, watch: Watch) -> float:
    begin = time.perf_counter()

    async def one() -> None:
        for _ in range(count // 64):
            await dispatcher.emit("type.1", {"text": "x" * 960})

    async with watch.probing():
        await asyncio.gather(*(one() for _ in range(64)))
    return count // 64 * 64 / (time.perf_counter() - begin)


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    rows = 2_000 if quick else ROWS
    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as folder:
        paths = [Path(folder) / name for name in ("full.db", "empty.db")]
        options: dict[str, Any] = {"transport": FakeTransport(), "deliver": False, "keys": []}
        async with Dispatcher(f"sqlite:///{paths[0]}", **options) as full:
            ids = [(await full.endpoints.create("https://a.example/", events=["type.1"])).id for _ in range(ENDPOINTS)]
        await asyncio.to_thread(_fill, paths[0], ids, rows)
        async with (
            Dispatcher(f"sqlite:///{paths[0]}", **options) as full,
            Dispatcher(f"sqlite:///{paths[1]}", **options) as empty,
        ):
            for _ in range(ENDPOINTS):
                await empty.endpoints.create("https://a.example/", events=["type.1"])
            found: list[Result] = []
            filters: list[dict[str, Any]] = [
                {},
                {"endpoint_id": ids[3]},
                {"status": "failed"},
                {"endpoint_id": ids[3], "event_type": "type.3"},
            ]
            for where in filters:
                found.extend(await _pages(full, paths[0], ids[3], where, rows))
            count = 64 if quick else 1280
            rounds: dict[str, Callable[[], Any]] = {
                "emit, empty database": lambda: _emitting(empty, count, watch),
                "emit, beside the history": lambda: _emitting(full, count, watch),
            }
            report = await alternate(
                f"history: {rows:,} deliveries; emit to {ENDPOINTS} endpoints, 64 emitters",
                {name: ("events/s", measure) for name, measure in rounds.items()},
                count=1 if quick else ROUNDS,
            )
    report.compare("emit, beside the history", "emit, empty database", target=at_least(0.87))
    report.results[:0] = found
    report.notes.append("0.87 of the rate is 1.15 x the time")
    return report
