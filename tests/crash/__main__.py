"""`python -m tests.crash --cycles 1000`: the long form. Its exit code says whether every promise was kept."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.crash.campaign import count_points, every_point, harness, kill_at, kill_at_random
from tests.crash.databases import PostgresDatabases, SQLiteDatabases
from tests.crash.report import table, write
from tests.postgres.server import own_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.crash.campaign import Harness, Point

BATCH = 25
"""Kills of one kind before those of the other."""


def run(crash: Harness, cycles: int, chance: random.Random, points: Iterator[Point]) -> None:
    """Kill so often, at random and at fault points in turn, and say how it goes."""
    began, told = time.monotonic(), 0
    while crash.figures.kills < cycles:
        kill_at_random(crash, min(BATCH, cycles - crash.figures.kills), chance)
        for point in itertools.islice(points, min(BATCH, cycles - crash.figures.kills)):
            kill_at(crash, point)
        figures, seconds = crash.figures, time.monotonic() - began
        rate = figures.kills / seconds
        left = (cycles - figures.kills) / rate
        print(f"{figures.kills}/{cycles} kills, {rate:.1f}/s, {left:.0f} s left, {len(figures.broken)} broken")
        for promise, how in figures.broken[told : told + 10]:
            print(f"  BROKEN {promise}: {how}")
        told = len(figures.broken)
        sys.stdout.flush()


def main() -> int:
    """Run, print the figures, and write them down where it was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--storage", metavar="DSN", help="a PostgreSQL server's (superuser) instead of SQLite files")
    where.add_argument("--postgres", action="store_true", help="the same, on a server that is started for it")
    options = parser.parse_args()
    began = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hookwright-crash-"))
        dsn = stack.enter_context(own_server()).dsn if options.postgres else options.storage
        databases = SQLiteDatabases() if dsn is None else PostgresDatabases(dsn)
        crash = stack.enter_context(harness(Path(folder), options.seed, databases=databases))
        counted = len(count_points(crash))
        run(crash, options.cycles, random.Random(options.seed), itertools.cycle(every_point(counted)))
    print(table(crash.figures, counted))
    if options.report is not None:
        kind = "" if dsn is None else " --postgres"
        command = f"python -m tests.crash --cycles {options.cycles} --seed {options.seed}{kind}"
        write(options.report, crash.figures, counted, command, time.monotonic() - began, databases.name)
    return 1 if crash.figures.broken else 0


if __name__ == "__main__":
    sys.exit(main())
