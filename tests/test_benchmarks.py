"""The benchmarks run, and each says what it compares with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks._document import fill
from benchmarks._harness import Report, Result, Series, at_least, at_most, save, show
from benchmarks._plot import draw
from benchmarks._stalls import stalls

ROOT = Path(__file__).parents[1]
# Benchmarks are not run under the measurement of coverage, which makes them slow and says nothing of the tests.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
NAMES = [
    "emit",
    "fanout",
    "endpoints",
    "backlog",
    "memory",
    "deliver",
    "latency",
    "isolation",
    "history",
    "gone",
    "dns",
    "idle",
    "import",
    "million",
    "outage",
    "scale",
    "stall",
    "postgres",
    "transaction",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_prints_its_reference_and_target(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", name, "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=PLAIN)
    assert done.returncode == 0, done.stderr
    assert "<=" in done.stdout or ">=" in done.stdout
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["results"]
    assert (tmp_path / f"{name}.svg").read_text("utf-8").startswith("<?xml")


def test_the_list_names_every_benchmark() -> None:
    command = [sys.executable, "-m", "benchmarks", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT, env=PLAIN)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == NAMES


def example() -> Report:
    results = [Result("ours", "us", [1.0, 2.0, 3.0]), Result("theirs", "us", [4.0, 4.0, 5.0])]
    report = Report("an example", results, series=[Series("ours", [1, 10], [2, 3])], axes=("bytes", "us"))
    report.compare("ours", "theirs", target=at_most(0.35))
    report.compare("ours", "theirs", target=at_least(0.5))
    return report


def test_the_table_says_of_every_target_whether_it_was_met(capsys: pytest.CaptureFixture[str]) -> None:
    show(example())
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("0.50  <= 0.35 x of theirs: MISS")
    assert lines[4].endswith("0.50  >= 0.50 x of theirs: met")


def test_the_same_figures_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(example(), tmp_path / f"{name}.json", command="run")
        draw(example(), tmp_path / f"{name}.svg")
    for kind in ("json", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


async def test_the_probe_sees_a_loop_that_is_blocked() -> None:
    async with stalls() as found:
        await asyncio.sleep(0.01)
        time.sleep(0.05)  # noqa: ASYNC251  # what the probe is to see
        await asyncio.sleep(0.01)
    assert found.worst >= 40
    assert found.count >= 2


def test_the_performance_page_shows_the_figures_of_the_results(tmp_path: Path) -> None:
    page, copy = ROOT / "docs" / "performance.md", tmp_path / "performance.md"
    copy.write_text(page.read_text("utf-8"), "utf-8")
    assert "deliver" in fill(copy, ROOT / "benchmarks" / "results")
    assert copy.read_text("utf-8") == page.read_text("utf-8"), "run: python -m benchmarks document"
