"""`python -m tests.stress`: several processes on one PostgreSQL. Its exit code says whether every promise was kept.

By default each does everything at random, some are killed, and the laws of the tables are looked at all along. With
`--deliveries N` they emit and deliver so many instead, without faults, to a receiver that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.postgres.server import own_server
from tests.stress._deliveries import Deliveries, told
from tests.stress._stress import Options, Stress, table

if TYPE_CHECKING:
    from collections.abc import Sequence


def say(line: str) -> None:
    """Tell it now, in a pipe too."""
    print(line, flush=True)


def finish(report: str, broken: Sequence[str]) -> int:
    """Print what was found; return the exit code."""
    say(report)
    for what in broken[:20]:
        say(f"BROKEN {what}")
    return 1 if broken else 0


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds; 0: kill nobody")
    parser.add_argument("--deliveries", type=int, help="count these, without faults")
    parser.add_argument("--kills", type=int, default=0, help="with --deliveries: kill so many processes on the way")
    parser.add_argument("--storage", metavar="DSN", help="a database for this alone: its schema hookwright is dropped")
    given = parser.parse_args()
    with ExitStack() as stack:
        dsn = given.storage or stack.enter_context(own_server()).dsn
        if given.deliveries:
            counted = asyncio.run(Deliveries(dsn, given.deliveries, given.processes, say, kills=given.kills).run())
            return finish(told(counted), counted.broken)
        options = Options(dsn, given.processes, given.minutes * 60, given.seed, given.kill_every)
        figures = asyncio.run(Stress(options, say).run())
        return finish(table(figures), figures.broken)


if __name__ == "__main__":
    sys.exit(main())
