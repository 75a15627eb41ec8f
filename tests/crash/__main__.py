"""`python -m tests.crash --kills 200`: the long form of the crash test."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.crash._child import CONCURRENCY
from tests.crash._cycle import run


def main() -> int:
    """Run, print the figures, and say by the exit code whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hookwright-crash-") as folder:
        report = asyncio.run(
            run(Path(folder), kills=options.kills, seed=options.seed, progress=lambda text: print(text, flush=True))
        )
    print(f"kill -9                       {report.kills}")
    print(f"acknowledged events           {len(report.acknowledged)}")
    print(f"acknowledged and lost         {len(report.lost)}")
    print(f"stored by half                {len(report.half_done)}")
    print(f"repeated attempts             {report.repeats}")
    print(f"in flight at all kills        {sum(report.in_flight)} (at one: at most {max(report.in_flight)})")
    print(f"concurrency                   {CONCURRENCY}")
    print(f"integrity_check               {report.integrity}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
