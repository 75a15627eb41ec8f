"""`python -m tests.simulation --seeds 10000`: many histories, each drawn from its seed; `--seed N` shows one."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from tests.simulation._simulate import STEPS, simulate

if TYPE_CHECKING:
    from tests.simulation._simulate import Trace

_BATCH = 25
_REPORT = 500


def _run(seed: int, steps: int) -> Trace:
    trace = simulate(seed, steps)
    trace.lines = []
    return trace


def show(seed: int, steps: int) -> int:
    """Print all of one history."""
    trace = simulate(seed, steps)
    for line in trace.lines:
        print(line)
    print(f"seed {seed}: {trace.failure or 'every promise was kept'}")
    return 0 if trace.failure is None else 1


def run_many(first: int, count: int, steps: int, jobs: int) -> int:
    """Run the seeds from `first` on, print what fails and how to see it again, and then the figures."""
    figures: Counter[str] = Counter()
    failed: list[Trace] = []
    begun = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        traces = pool.map(partial(_run, steps=steps), range(first, first + count), chunksize=_BATCH)
        for number, trace in enumerate(traces, start=1):
            figures.update(trace.figures)
            if trace.failure is not None:
                failed.append(trace)
                print(f"seed {trace.seed} failed: {trace.failure}\n    {trace.command}", flush=True)
            if number % _REPORT == 0:
                print(f"{number} of {count} seeds, {len(failed)} failed", flush=True)
    print(f"seeds       {count} ({first} to {first + count - 1}), {steps} steps each")
    for name, figure in figures.items():
        print(f"{name:<11} {figure}")
    print(f"seconds     {time.monotonic() - begun:.0f} on {jobs} processes")
    print(f"failed      {len(failed)}")
    return 1 if failed else 0


def main() -> int:
    """Run what is asked for; the exit code says whether every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one alone, and print what happens")
    parser.add_argument("--steps", type=int, default=STEPS, help="what happens in each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    if options.seed is not None:
        return show(options.seed, options.steps)
    return run_many(options.first, options.seeds, options.steps, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
