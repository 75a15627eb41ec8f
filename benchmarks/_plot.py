"""Draws a report: bars of medians with whiskers from the least to the most, and lines for its series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks._harness import Report, Result

# Without a salt of its own the same figures would give another file each time.
_STYLE: Any = {"svg.hashsalt": "hookwright", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
_BAR = 0.32
_LINES = 3.2


def draw(report: Report, path: Path) -> None:
    """Write an SVG file."""
    units: dict[str, list[Result]] = {}
    for result in report.results:
        units.setdefault(result.unit, []).append(result)
    heights = [_BAR * len(results) + 0.8 for results in units.values()] + [_LINES] * bool(report.series)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
        every = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (unit, results) in zip(every, units.items(), strict=False):
            _bars(axes, unit, results)
        if report.series:
            _lines(every[-1], report)
        figure.suptitle(report.title, fontsize=10, wrap=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(axes: Axes, unit: str, results: list[Result]) -> None:
    medians = [result.median for result in results]
    below = [result.median - min(result.values) for result in results]
    above = [max(result.values) - result.median for result in results]
    places = range(len(results))
    axes.barh(places, medians, xerr=(below, above), height=0.6, capsize=3, color="#7aa6c2", ecolor="#333333")
    axes.set_yticks(places, [result.name.strip() for result in results])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)


def _lines(axes: Axes, report: Report) -> None:
    for series in report.series:
        axes.plot(series.x, series.y, marker="o", label=series.name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(report.axes[0])
    axes.set_ylabel(report.axes[1])
    axes.grid(alpha=0.3, which="both")
    axes.legend()
