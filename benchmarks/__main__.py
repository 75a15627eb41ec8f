"""`python -m benchmarks list | run NAME... [--results DIR] [--quick] | document`."""

from __future__ import annotations

import argparse
import asyncio
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from benchmarks import (
    backlog,
    deliver,
    dns,
    emit,
    endpoints,
    fanout,
    gone,
    history,
    idle,
    imports,
    isolation,
    latency,
    memory,
    million,
    outage,
    postgres,
    scale,
    stall,
    transaction,
)
from benchmarks._document import fill
from benchmarks._harness import save, show
from benchmarks._plot import draw
from benchmarks._stalls import Watch

if TYPE_CHECKING:
    from benchmarks._harness import Report


class Benchmark(Protocol):
    """A module that measures. It probes the loop (`watch.probing()`) where a dispatcher works in what it measures."""

    __doc__: str | None

    async def run(self, *, quick: bool, watch: Watch) -> Report: ...


BENCHMARKS: dict[str, Benchmark] = {
    "emit": emit,
    "fanout": fanout,
    "endpoints": endpoints,
    "backlog": backlog,
    "memory": memory,
    "deliver": deliver,
    "latency": latency,
    "isolation": isolation,
    "history": history,
    "gone": gone,
    "dns": dns,
    "idle": idle,
    "import": imports,
    "million": million,
    "outage": outage,
    "scale": scale,
    "stall": stall,
    "postgres": postgres,
    "transaction": transaction,
}
RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


async def _measure(benchmark: Benchmark, *, quick: bool) -> Report:
    # What is imported here, matplotlib and four HTTP clients, no application has: the collector need not walk it.
    gc.collect()
    gc.freeze()
    watch = Watch()
    seconds = 0.2 if quick else 3.0
    await watch.control(seconds)
    report = await benchmark.run(quick=quick, watch=watch)
    await watch.control(seconds)
    if watch.busy.values:
        report.stalls = watch
    return report


def _run(names: list[str], folder: Path | None, *, quick: bool) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        report = asyncio.run(_measure(BENCHMARKS[name], quick=quick))
        if quick:
            report.title = f"QUICK, the figures say nothing: {report.title}"
        show(report)
        if folder is not None:
            command = f"python -m benchmarks run {name}{' --quick' if quick else ''}"
            save(report, folder / f"{name}.json", command=command)
            draw(report, folder / f"{name}.svg")
            print(f"  written to {folder}: {name}.json, {name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    running = commands.add_parser("run", help="run some, or all; write NAME.json and NAME.svg for each")
    running.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"])
    running.add_argument("--results", type=Path, help="the folder for the files (default: benchmarks/results)")
    running.add_argument(
        "--quick", action="store_true", help="tiny counts: shows that it runs, not how fast; writes only with --results"
    )
    commands.add_parser("document", help="write the figures in benchmarks/results into docs/performance.md")
    options = parser.parse_args()
    if options.command == "list":
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:12}{(benchmark.__doc__ or '').splitlines()[0].partition(': ')[2]}")
        return
    if options.command == "document":
        print(f"{PAGE.name}: {', '.join(fill(PAGE, RESULTS))}")
        return
    if options.results is not None and options.results.is_file():
        parser.error(f"--results: {options.results} is a file: give a folder")
    folder = options.results or (None if options.quick else RESULTS)
    _run(list(BENCHMARKS) if "all" in options.names else options.names, folder, quick=options.quick)


if __name__ == "__main__":
    main()
