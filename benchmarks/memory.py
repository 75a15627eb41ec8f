"""memory: what a dispatcher takes at rest, with endpoints, after deliveries, and with many waiting; a process each.

The control is the same process when it had only imported what it needs.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._alone import delivering, emitting
from benchmarks._harness import Report, Result, at_most, tell
from benchmarks.backlog import Deliveries, Waiting

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

ROUNDS = 5
IMPORTED, AT_REST = "imported, nothing made", "at rest, no endpoints"
MB = "MB"


class Size(NamedTuple):
    """How much of it."""

    rounds: int
    endpoints: int
    delivered: int
    waiting: int


FULL = Size(ROUNDS, 1_000, 10_000, 100_000)
QUICK = Size(1, 20, 100, 1_000)


async def _at_rest(path: Path, endpoints: int) -> tuple[float, float]:
    waiting = Waiting(path, 0, endpoints, Deliveries(0, 0))
    await waiting.create()
    async with emitting(path) as alone:
        return alone.began["imports"], alone.began["started"]


async def _after(path: Path, endpoints: int, waiting: int, each: Deliveries) -> float:
    there = Waiting(path, waiting, endpoints, each)
    await there.create()
    there.fill()
    return (await delivering(path, *each))["memory"]


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    size = QUICK if quick else FULL
    with_endpoints = f"at rest, {size.endpoints:,} endpoints"
    after = f"after {size.delivered:,} deliveries to them"
    behind = f"after {size.delivered // 10:,}, {size.waiting:,} waiting"
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(size.rounds):
        tell(f"round {number + 1} of {size.rounds}")
        with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as name:
            folder = Path(name)
            imported, rest = await _at_rest(folder / "rest.db", 0)
            found[IMPORTED].append(imported)
            found[AT_REST].append(rest)
            found[with_endpoints].append((await _at_rest(folder / "endpoints.db", size.endpoints))[1])
            all_of_them = Deliveries(size.delivered // 2, size.delivered // 2)
            found[after].append(await _after(folder / "after.db", size.endpoints, size.delivered // 4, all_of_them))
            few = Deliveries(size.delivered // 20, size.delivered // 20)
            found[behind].append(await _after(folder / "behind.db", size.endpoints, size.waiting, few))
    report = Report("memory: a process of its own each", [Result(name, MB, values) for name, values in found.items()])
    report.compare(AT_REST, IMPORTED)
    report.compare(with_endpoints, AT_REST)
    report.compare(after, with_endpoints)
    report.compare(behind, after, target=at_most(1.10))
    return report
