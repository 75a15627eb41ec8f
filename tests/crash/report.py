"""What a run found, as a table, and in docs/reliability.md."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tests.crash.child import CONCURRENCY
from tests.crash.oracle import PROMISES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.crash.campaign import Figures

BEGIN, END = "<!-- crash:begin -->", "<!-- crash:end -->"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that so many percent do not exceed; 0 of none."""
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def rows(figures: Figures, points: int) -> list[tuple[str, str]]:
    """Return the table's rows: what was done, what came of it, and how often each promise was broken."""
    at_kills = sum(figures.leased_at_kills)
    resumed = [f"{1000 * percentile(figures.resumed, percent):.0f} ms" for percent in (50, 99, 100)]
    done = [
        ("kills (SIGKILL)", f"{figures.kills:,}"),
        ("… at random moments under load", f"{figures.random_kills:,}"),
        ("… at fault points, before or after each", f"{figures.point_kills:,}"),
        ("fault points of the scripted life, and how many were struck", f"{2 * points:,} / {len(figures.struck):,}"),
        ("events acknowledged", f"{figures.acknowledged:,}"),
        ("requests received", f"{figures.requests:,}"),
        ("deliveries leased at all kills", f"{at_kills:,}"),
        ("… at one kill, at most", f"{max(figures.leased_at_kills, default=0)} of {CONCURRENCY}"),
        ("requests repeated after a kill", f"{figures.repeats:,}"),
        ("from `start()` to the first request, p50 / p99 / most", " / ".join(resumed)),
        ("… measured so often, and so often killed before it", f"{len(figures.resumed):,} / {figures.killed_before:,}"),
    ]
    return done + [(f"**{text}**", f"**{figures.count(name)}**") for name, text in PROMISES.items()]


def table(figures: Figures, points: int) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows(figures, points))]
    return "\n".join(lines)


def write(page: Path, figures: Figures, points: int, command: str, seconds: float, storage: str) -> None:
    """Put the figures between the page's two markers."""
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}, {storage}"
    day = datetime.now(UTC).date().isoformat()
    head = f"`{command}`, {day}, {seconds / 60:.0f} min on {machine}:"
    page.write_text(f"{before}{BEGIN}\n{head}\n\n{table(figures, points)}\n{END}{after}", "utf-8")
