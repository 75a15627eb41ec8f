"""Campaigns: kill and look, again and again, on one database; then drain it, and compare."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.crash.child import Command
from tests.crash.databases import SQLiteDatabases
from tests.crash.forkserver import forking
from tests.crash.oracle import Oracle, first_requests
from tests.crash.receiver import receiving

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.crash.databases import Database, Databases
    from tests.crash.forkserver import ForkServer
    from tests.crash.picture import Picture
    from tests.crash.receiver import Receiver

PATIENCE = 60.0
"""Seconds for whatever ends by itself."""

LIFE = (0.01, 0.6)
"""Seconds from `start()` to a random kill, at least and at most."""

RESUMES_WITHIN = 1.0
"""Seconds from `start()` to the first request of what waits, on a quiet machine."""

_NUMBERS_PER_LIFE = 1000


@dataclass
class Figures:
    """What many campaigns found."""

    random_kills: int = 0
    point_kills: int = 0
    points_missed: int = 0
    struck: set[str] = field(default_factory=set)
    acknowledged: int = 0
    requests: int = 0
    repeats: int = 0
    leased_at_kills: list[int] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    killed_before: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.random_kills + self.point_kills

    def count(self, promise: str) -> int:
        """How often a promise was broken."""
        return sum(name == promise for name, _ in self.broken)

    def add(self, oracle: Oracle) -> None:
        """Take over what one campaign's oracle found."""
        self.acknowledged += len(oracle.acknowledged)
        self.requests += oracle.requests.total()
        self.repeats += oracle.repeats
        self.leased_at_kills += oracle.leased_at_kills
        self.broken += oracle.broken


class Point(NamedTuple):
    """A fault point of the scripted life."""

    number: int
    after: bool


class Harness:
    """The processes that survive, and where the databases are."""

    def __init__(
        self, folder: Path, databases: Databases, server: ForkServer, receiver: Receiver, resumes_within: float
    ) -> None:
        self._folder = folder
        self._databases = databases
        self._campaigns = 0
        self.server = server
        self.receiver = receiver
        self.resumes_within = resumes_within
        self.figures = Figures()

    @contextmanager
    def campaign(self) -> Iterator[Campaign]:
        """Begin with no database, and take over what was found."""
        self._campaigns += 1
        folder = self._folder / str(self._campaigns)
        folder.mkdir()
        with self._databases.new(folder) as database:
            campaign = Campaign(self, database, f"/{self._campaigns}/")
            yield campaign
        self.figures.add(campaign.oracle)
        shutil.rmtree(folder)


@contextmanager
def harness(
    folder: Path, seed: int, *, databases: Databases | None = None, resumes_within: float = RESUMES_WITHIN
) -> Iterator[Harness]:
    """Start the fork server and the receiver, and end them. Without `databases` they are SQLite's, in the folder."""
    databases = databases or SQLiteDatabases()
    with ExitStack() as stack:
        receiver = stack.enter_context(receiving(folder / "requests.log", seed))
        server = stack.enter_context(forking(databases.modules))
        yield Harness(folder, databases, server, receiver, resumes_within)


class Campaign:
    """One database, and its oracle."""

    def __init__(self, harness: Harness, database: Database, prefix: str) -> None:
        self._harness = harness
        self._prefix = prefix
        self._waiting = False
        self._command = Command("", database.url, f"http://127.0.0.1:{harness.receiver.port}{prefix}")
        self.database = database
        self.oracle = Oracle(prefix)

    def live(self, kind: str, *, kill_after: float | None = None, **options: Any) -> list[str]:
        """Let a child live until it is killed or ends, look at what it left, and return what it said.

        It says `done` when it ended by itself.
        """
        command = self._command._replace(kind=kind, **options)
        child = self._harness.server.fork(command)
        if kill_after is not None and child.hear("called", PATIENCE):
            time.sleep(kill_after)
            child.kill()
        said = child.ended(PATIENCE)
        failed = [f"{self._prefix} {kind} {line}" for line in said if line.startswith("failed")]
        self.oracle.broken += [("stuck", line) for line in failed]
        self._hear(said)
        self._look(drained=kind == "drain", killed="done" not in said)
        return said

    def _hear(self, said: list[str]) -> None:
        words = [line.split(" ", 1) for line in said]
        self.oracle.acknowledge(word[1] for word in words if word[0] == "ack")
        self._harness.figures.struck.update(word[1] for word in words if word[0] == "struck")
        requests = self._harness.receiver.read()
        self.oracle.receive(requests)
        called = [float(word[1]) for word in words if word[0] == "called"]
        if not called or not self._waiting:
            return
        figures = self._harness.figures
        resumed = min(first_requests(requests, self._prefix, called[0]), default=None)
        lived = time.monotonic() - called[0]
        if resumed is None:
            figures.killed_before += 1
        else:
            figures.resumed.append(resumed)
        if (lived if resumed is None else resumed) > self._harness.resumes_within:
            self.oracle.broken.append(("slow", f"{self._prefix} resumed after {resumed}, lived for {lived}"))

    def _look(self, *, drained: bool, killed: bool) -> None:
        picture = self.database.look()
        self._waiting = picture.pending > 0
        self.oracle.last = picture
        if killed:
            self.oracle.killed(picture)
        if drained:
            self.oracle.drained(picture)


# -- the three kinds --------------------------------------------------------------------------------------------


def kill_at_random(harness: Harness, kills: int, chance: random.Random) -> None:
    """Kill a dispatcher under load, as often and at random moments, and let the last one drain."""
    with harness.campaign() as campaign:
        campaign.live("prepare")
        for number in range(kills):
            campaign.live("load", kill_after=chance.uniform(*LIFE), first=number * _NUMBERS_PER_LIFE)
            harness.figures.random_kills += 1
        drain(harness, campaign)


def drain(harness: Harness, campaign: Campaign) -> None:
    """Let a last process deliver everything, with receivers that answer sooner, and compare."""
    harness.receiver.pace(0.1)
    campaign.live("drain")
    harness.receiver.pace(1.0)


def count_points(harness: Harness) -> list[str]:
    """Live the script once without harm, and return the names of the fault points that it passes."""
    with harness.campaign() as campaign:
        said = campaign.live("script")
    return [line.removeprefix("passed ") for line in said if line.startswith("passed ")]


def every_point(counted: int) -> list[Point]:
    """Return all fault points: each number once, before or after it in turn, and then the other way round."""
    once = [Point(number, number % 2 == 0) for number in range(1, counted + 1)]
    return once + [Point(number, not after) for number, after in once]


def kill_at(harness: Harness, point: Point) -> None:
    """Live the script until a fault point, and let another process recover and drain."""
    with harness.campaign() as campaign:
        ended = "done" in campaign.live("script", at=point.number, after=point.after)
        harness.figures.point_kills += not ended
        harness.figures.points_missed += ended
        campaign.live("drain")


def poison(harness: Harness, **how: float) -> tuple[Picture, int]:
    """Let an event kill whoever sends it until it has ended; return what is left, and how many it killed.

    `how` it does so, and how it is retried, are fields of the command.
    """
    with harness.campaign() as campaign:
        campaign.live("emit poison", **how)
        kills = 0
        while "done" not in campaign.live("poison", **how):
            kills += 1
            if kills > 50:
                raise RuntimeError("the poison does not end")
    return campaign.oracle.last, kills
