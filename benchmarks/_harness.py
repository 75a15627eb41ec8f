"""Rounds in alternation, medians and spread, and a table that reads without colour."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

Round = Callable[[], Awaitable[float]]


@dataclass
class Result:
    """One measured thing: the median of its rounds, its spread, and how it compares with the reference."""

    name: str
    unit: str
    values: list[float]
    reference: str = ""
    ratio: float | None = None
    target: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass
class Report:
    """What a benchmark found."""

    title: str
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, name: str, reference: str, *, target: str, invert: bool = False) -> None:
        """Put the ratio of two medians beside its target."""
        by_name = {result.name: result for result in self.results}
        one, other = by_name[name], by_name[reference]
        ratio = one.median / other.median
        one.ratio, one.reference, one.target = (1 / ratio if invert else ratio), reference, target


async def alternate(title: str, rounds: dict[str, tuple[str, Round]], *, count: int) -> Report:
    """Run every thing `count` times, in turn, and keep what each round returned."""
    report = Report(title, [Result(name, unit, []) for name, (unit, _) in rounds.items()])
    for number in range(count):
        for result in report.results:
            if sys.stderr.isatty():
                print(f"\r  round {number + 1} of {count}: {result.name:40}", end="", file=sys.stderr, flush=True)
            result.values.append(await rounds[result.name][1]())
        if not sys.stderr.isatty():
            print(f"  round {number + 1} of {count}", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return report


def show(report: Report) -> None:
    """Print the table."""
    print(f"\n{report.title}")
    print(f"  {'what':34}{'median':>10}  {'spread':>19}  {'unit':14}{'ratio':>7}  target")
    for result in report.results:
        spread = f"{min(result.values):.1f} - {max(result.values):.1f}"
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        against = f"{result.target} of {result.reference}" if result.reference else result.target
        print(f"  {result.name:34}{result.median:>10.1f}  {spread:>19}  {result.unit:14}{ratio:>7}  {against}")
    for note in report.notes:
        print(f"  {note}")


def save(reports: list[Report], path: Path) -> None:
    """Write everything as JSON."""
    path.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n", encoding="utf-8")
