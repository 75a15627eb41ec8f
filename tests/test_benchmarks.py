"""The benchmarks run, and each says what it compares with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = [
    "emit",
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
]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_prints_its_reference_and_target(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", name, "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "<=" in done.stdout or ">=" in done.stdout
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["results"]
    assert (tmp_path / f"{name}.svg").read_text("utf-8").startswith("<?xml")


def test_the_list_names_every_benchmark() -> None:
    command = [sys.executable, "-m", "benchmarks", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == NAMES
