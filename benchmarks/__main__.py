"""`python -m benchmarks list | run NAME... [--json FILE] [--quick]`."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from benchmarks import deliver, dns, emit, gone, history, idle, imports, isolation, million, outage, scale
from benchmarks._harness import save, show

BENCHMARKS = {
    "emit": emit,
    "deliver": deliver,
    "isolation": isolation,
    "history": history,
    "gone": gone,
    "dns": dns,
    "idle": idle,
    "imports": imports,
    "million": million,
    "outage": outage,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    running = commands.add_parser("run", help="run some, or all")
    running.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"])
    running.add_argument("--json", type=Path, help="write the figures to this file")
    running.add_argument("--quick", action="store_true", help="tiny counts: shows that it runs, says nothing of speed")
    options = parser.parse_args()
    if options.command == "list":
        for name, module in BENCHMARKS.items():
            print(f"{name:12}{(module.__doc__ or '').splitlines()[0].partition(': ')[2]}")
        return
    names = list(BENCHMARKS) if "all" in options.names else options.names
    reports = []
    for name in names:
        reports.append(asyncio.run(BENCHMARKS[name].run(quick=options.quick)))
        show(reports[-1])
    if options.json is not None:
        save(reports, options.json)


if __name__ == "__main__":
    main()
