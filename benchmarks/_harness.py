"""Rounds in alternation, medians and spread, targets, and a table that reads without colour."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

Round = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Target:
    """What is asked of a ratio (unit `x`) or of a median (any other unit); in brackets when it is only shown."""

    relation: Literal["<=", ">="]
    limit: float
    unit: str = "x"
    judged: bool = True

    def met(self, value: float) -> bool:
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        limit = f"{self.limit:.2f}" if self.unit == "x" else f"{self.limit:g}"
        text = f"{self.relation} {limit} {self.unit}"
        return text if self.judged else f"({text})"


def at_most(limit: float, unit: str = "x", *, judged: bool = True) -> Target:
    return Target("<=", limit, unit, judged)


def at_least(limit: float, unit: str = "x", *, judged: bool = True) -> Target:
    return Target(">=", limit, unit, judged)


@dataclass(frozen=True)
class Comparison:
    """A ratio to a reference, or (without a reference) the median itself, beside the target."""

    value: float
    target: Target | None = None
    reference: str = ""

    @property
    def met(self) -> bool | None:
        return self.target.met(self.value) if self.target is not None and self.target.judged else None


@dataclass
class Result:
    """One measured thing: what its rounds gave, and how their median compares."""

    name: str
    unit: str
    values: list[float]
    target: Target | None = None
    comparisons: list[Comparison] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.target is not None:
            self.comparisons.append(Comparison(self.median, self.target))

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Series:
    """A line of the plot."""

    name: str
    x: list[float]
    y: list[float]


@dataclass
class Report:
    """What a benchmark found. Its plot has bars for each unit, and lines (on logarithmic axes) for the series."""

    title: str
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    axes: tuple[str, str] = ("", "")
    stalls: Watch | None = None

    def compare(self, name: str, reference: str, *, target: Target | None = None, unit: str = "") -> None:
        """Put the ratio, the median of each round's own, beside its target."""
        one, other = self.find(name, unit), self.find(reference, unit)
        ratios = [ours / theirs for ours, theirs in zip(one.values, other.values, strict=True)]
        one.comparisons.append(Comparison(statistics.median(ratios), target, reference))

    def find(self, name: str, unit: str = "") -> Result:
        """Return the result of that name; the first, unless a unit tells which."""
        return next(result for result in self.results if result.name == name and unit in ("", result.unit))


async def alternate(title: str, rounds: dict[str, tuple[str, Round]], *, count: int) -> Report:
    """Run every thing `count` times, in turn, and keep what each round returned."""
    report = Report(title, [Result(name, unit, []) for name, (unit, _) in rounds.items()])
    for number in range(count):
        for result in report.results:
            tell(f"round {number + 1} of {count}: {result.name}")
            result.values.append(await rounds[result.name][1]())
    return report


CPU = "us CPU"
RATE = "deliveries/s"


class Cost(NamedTuple):
    """What one delivery, or event, cost (microseconds of CPU), and how many there were in a second."""

    cpu: float
    rate: float


async def alternate_costs(
    title: str, rounds: dict[str, Callable[[], Awaitable[Cost]]], *, count: int, rate: str = RATE
) -> Report:
    """Run every thing `count` times, in turn, and keep CPU and rate of each as results of their own."""
    found: dict[str, list[Cost]] = {name: [] for name in rounds}
    for number in range(count):
        for name, measure in rounds.items():
            tell(f"round {number + 1} of {count}: {name}")
            found[name].append(await measure())
    results = [Result(name, CPU, [cost.cpu for cost in costs]) for name, costs in found.items()]
    results += [Result(name, rate, [cost.rate for cost in costs]) for name, costs in found.items()]
    return Report(title, results)


def tell(progress: str) -> None:
    """Say on standard error how far it is."""
    print(f"  {progress}", file=sys.stderr, flush=True)


def stall_results(stalls: Watch) -> list[Result]:
    """Return the stalls of the loop beside those of an idle one, and what is asked of them."""
    busy, idle = stalls.busy, stalls.idle
    limits = (("p99.9", busy.p999, idle.p999, 10.0), ("worst", busy.worst, idle.worst, 50.0))
    found = []
    for what, value, control, floor in limits:
        found.append(Result(f"loop stalls, {what}: idle loop", "ms", [control]))
        limit = round(max(floor, 2 * control), 1)
        found.append(Result(f"loop stalls, {what}", "ms", [value], at_most(limit, "ms")))
    return found


def show(report: Report) -> None:
    """Print the table."""
    results = report.results + ([] if report.stalls is None else stall_results(report.stalls))
    width = max(len(result.name) for result in results) + 2
    print(f"\n{report.title}")
    print(f"  {'what':{width}}{'median':>10}  {'spread':>21}  {'unit':13}{'ratio':>7}  target")
    for result in results:
        spread = f"{figure(min(result.values))} - {figure(max(result.values))}"
        line = f"  {result.name:{width}}{figure(result.median):>10}  {spread:>21}  {result.unit:13}"
        for shown in [_compared(one) for one in result.comparisons] or [""]:
            print(f"{line}{shown}".rstrip())
            line = " " * len(line)
    for note in report.notes:
        print(f"  {note}")


def figure(value: float) -> str:
    """Return a figure with as many digits as are worth reading."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _compared(comparison: Comparison) -> str:
    ratio = f"{comparison.value:.2f}" if comparison.reference else ""
    words = [str(comparison.target)] if comparison.target is not None else []
    words += [f"of {comparison.reference}"] if comparison.reference else []
    words += [] if comparison.met is None else [": met" if comparison.met else ": MISS"]
    return f"{ratio:>7}  {' '.join(words)}".replace(" :", ":")


def save(report: Report, path: Path, *, command: str) -> None:
    """Write the figures, the machine they are of, and the command that made them."""
    document = {
        "command": command,
        "machine": machine(),
        "title": report.title,
        "results": [_plain(result) for result in report.results],
        "stalls": None if report.stalls is None else [_plain(result) for result in stall_results(report.stalls)],
        "axes": report.axes,
        "series": [vars(series) for series in report.series],
        "notes": report.notes,
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _plain(result: Result) -> dict[str, Any]:
    compared = [
        {"reference": one.reference, "value": one.value, "target": str(one.target or ""), "met": one.met}
        for one in result.comparisons
    ]
    shown = {"name": result.name, "unit": result.unit, "median": result.median, "values": result.values}
    return {**shown, "comparisons": compared}


def machine() -> dict[str, Any]:
    """Return what the figures depend on, and no dates."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": platform.system(),
        "loop": type(asyncio.get_event_loop_policy()).__module__.partition(".")[0],
    }
