"""`python -m tests.faults --closing 1000`, `--locks` and `--postgres-outage 60`: the long forms, with their figures."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from random import Random

from tests.faults.closing import LIMIT, close_often
from tests.faults.locks import hold, well
from tests.postgres.load import outage


def main() -> int:
    """Run, print the figures, and say by the exit code whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--closing", type=int, metavar="RUNS", default=0)
    parser.add_argument("--locks", action="store_true")
    parser.add_argument("--postgres-outage", type=float, metavar="SECONDS", default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not options.closing and not options.locks and not options.postgres_outage:
        parser.error("say what: --closing 1000, --locks, or --postgres-outage 60")
    good = not options.postgres_outage or asyncio.run(_outage(options.postgres_outage))
    with tempfile.TemporaryDirectory(prefix="hookwright-faults-") as folder:
        if options.locks:
            good = asyncio.run(_locks(Path(folder))) and good
        if options.closing:
            good = asyncio.run(_closing(Path(folder), options.closing, options.seed)) and good
    return 0 if good else 1


async def _closing(folder: Path, runs: int, seed: int) -> bool:
    figures = await close_often(folder, runs, Random(seed), lambda text: print(text, flush=True))
    for what in figures.unheard:
        print(what)
    for run in (*figures.late, *figures.broken):
        print(f"{run.seconds:.3f} s  {run.what}  {run.broken}")
    print(f"closed                        {len(figures.runs)}")
    print(f"p50                           {figures.percentile(0.5):.3f} s")
    print(f"p99                           {figures.percentile(0.99):.3f} s")
    print(f"max                           {figures.seconds[-1]:.3f} s")
    print(f"within {LIMIT:g} s                  {len(figures.runs) - len(figures.late)}")
    print(f"broken promises               {len(figures.broken)}")
    return not figures.late and not figures.broken and not figures.unheard


async def _outage(seconds: float) -> bool:
    found = await outage(seconds)
    print(f"server away                   {found.seconds:g} s, health meanwhile: {found.state_while}")
    print(f"delivering again after        {found.delivering_after:.2f} s")
    print(f"emitting again after          {found.emitting_after:.2f} s ({found.given_again} were given again)")
    print(f"repeated requests             {found.repeats}")
    return found.delivering_after < 2 and found.emitting_after < 2


async def _locks(folder: Path) -> bool:
    print("lock held   emit answered        after    on after release   health while, after", flush=True)
    good = True
    for seconds in (1.0, 5.0, 30.0):
        held = await hold(folder / f"{seconds:g}.db", seconds)
        good = good and well(held)
        print(
            f"{seconds:6.0f} s   {held.answer:18} {held.answered_after:6.2f} s   {held.delivered_after:10.2f} s"
            f"        {held.state_while}, {held.state_after}",
            flush=True,
        )
    return good


if __name__ == "__main__":
    sys.exit(main())
