"""endpoints: emit, start and memory with 10 to 100,000 endpoints of which 10 match; a process for each.

The others want other types, or the same type for other tenants, or other types with two filters each.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._alone import TENANT, emitting
from benchmarks._harness import Report, Result, Series, at_most, tell
from benchmarks._many import store_endpoints, typical
from hookwright import Dispatcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks._alone import Alone
    from benchmarks._stalls import Watch
    from hookwright._models import EndpointRow

ROUNDS = 5
SIZES = (10, 100, 1_000, 10_000, 100_000)
MATCHING = 10
TYPES, TENANTS, FILTERS = "other types", "other tenants", "two filters each"
CPU, WALL = "us CPU", "us"


def _rows(shape: str, count: int) -> Iterator[EndpointRow]:
    for number in range(count):
        if number < MATCHING:
            yield typical(number, TENANT, ["video.*", "export.ready"])
        elif shape == TENANTS:
            yield typical(number, f"tenant{number:06d}", ["video.*", "export.ready"])
        else:
            filters = {"user_id": (f"u{number:06d}",), "plan": ("pro",)} if shape == FILTERS else {}
            yield replace(typical(number, TENANT, [f"type.{number}", "b.*"]), filters=filters)


async def _store(path: Path, shape: str, count: int) -> None:
    async with Dispatcher(f"sqlite:///{path}", deliver=False, keys=[]):
        pass
    store_endpoints(path, _rows(shape, count))


async def _measured(there: dict[str, Alone], rounds: int, events: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in there}
    for alone in there.values():
        await alone.emit(events // 4)  # to get warm
    for number in range(rounds):
        for name, alone in there.items():
            tell(f"round {number + 1} of {rounds}: {name}")
            for figure, value in (await alone.emit(events)).items():
                found[name][figure].append(value)
    return found


def _name(shape: str, size: int) -> str:
    return f"{size:,}, {shape}"


def _report(there: dict[str, Alone], found: dict[str, dict[str, list[float]]], sizes: Sequence[int]) -> Report:
    least, most = sizes[0], sizes[-1]
    report = Report(f"endpoints: {least} to {most:,}, of which {MATCHING} match; 16 emitters, nothing is delivered")
    for figure, unit in (("cpu", CPU), ("wall", WALL)):
        report.results += [Result(name, unit, found[name][figure]) for name in there]
    for shape in (TYPES, TENANTS):
        for unit in (CPU, WALL):
            for size in sizes[1:]:
                target = at_most(1.30) if size == most else None
                report.compare(_name(shape, size), _name(shape, least), unit=unit, target=target)
        began = there[_name(shape, most)].began
        report.results.append(_memory(there, _name(shape, most), _name(shape, least), most - least))
        report.results.append(Result(f"start with {_name(shape, most)}", "ms", [began["start"]]))
        report.results.append(Result("  the loop's worst stall before, idle", "ms", [began["idle"]]))
        report.results.append(Result("  a full pass of the collector before", "ms", [began["collector"]]))
        # To read so much calls the collector, and nobody can divide its pass over all that the process has.
        limit = at_most(round(max(20.0, 2 * began["idle"]) + began["collector"], 1), "ms")
        report.results.append(Result("  the loop's worst stall meanwhile", "ms", [began["stall"]], limit))
        line = [report.find(_name(shape, size), CPU).median for size in sizes]
        report.series.append(Series(f"the others: {shape}", list(sizes), line))
    report.results.append(_memory(there, _name(FILTERS, most), _name(TYPES, least), most - least))
    report.axes = ("endpoints", "us CPU an event")
    return report


def _memory(there: dict[str, Alone], name: str, least: str, more: int) -> Result:
    """Return what each of so many more endpoints takes of the memory than a process has with the least."""
    taken = (there[name].began["started"] - there[least].began["started"]) * 1024 * 1024 / more
    # A process of a hundred endpoints is no measure: the pages it happens to touch are more than they are.
    return Result(f"memory for each of {name}", "B", [taken], at_most(1024, "B", judged=more >= 9_000))


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""
    sizes, rounds, events = ((10, 100), 1, 64) if quick else (SIZES, ROUNDS, 480)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hookwright-bench-")))
        there: dict[str, Alone] = {}
        shapes = [(shape, size) for shape in (TYPES, TENANTS) for size in sizes]
        for shape, size in [*shapes, (FILTERS, sizes[-1])]:
            tell(f"{_name(shape, size)}: they are stored, and read")
            path = folder / f"{len(there)}.db"
            await _store(path, shape, size)
            there[_name(shape, size)] = await stack.enter_async_context(emitting(path))
        found = await _measured(there, rounds, events)
    return _report(there, found, sizes)
