"""The oracle: what must be true after each kill, and when everything has been delivered.

It knows what was acknowledged, what the receivers saw, and what the database said after each kill.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tests.crash.child import CONCURRENCY, wanted
from tests.crash.picture import NOTHING, Picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.crash.picture import Row
    from tests.crash.receiver import Request

Key = tuple[str, str]

PROMISES = {
    "lost": "acknowledged and lost",
    "half": "stored by half",
    "leased": "more leased at a kill than the concurrency",
    "unexplained": "repeated requests that no kill explains",
    "unrecorded": "requests without an attempt row",
    "interruptions": "interruptions miscounted",
    "integrity": "integrity checks that failed",
    "stuck": "processes that failed, or did not drain",
    "slow": "resumed later than after 1 s",
}
"""What can be broken, by the name it has in reports."""


class Oracle:
    """Judges one database's campaign. `prefix` is what its paths begin with; `broken` names each promise broken."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.acknowledged: set[str] = set()
        self.requests: Counter[Key] = Counter()
        self.succeeded: set[Key] = set()
        self.gone: set[Key] = set()
        self.tokens: defaultdict[Key, set[str]] = defaultdict(set)
        self.leased_at_kills: list[int] = []
        self.last = NOTHING
        self.broken: list[tuple[str, str]] = []

    # -- what happens -------------------------------------------------------------------------------------------

    def acknowledge(self, event_ids: Iterable[str]) -> None:
        """The child was told by `emit` that these are stored."""
        self.acknowledged.update(event_ids)

    def receive(self, requests: Iterable[Request]) -> None:
        """A receiver read these; other campaigns' are left out."""
        for request in requests:
            if not request.path.startswith(self._prefix):
                continue
            key = (request.path, request.event_id)
            self.requests[key] += 1
            if request.status == 200:
                self.succeeded.add(key)
            if request.status == 410:
                self.gone.add(key)

    # -- after each kill ----------------------------------------------------------------------------------------

    def killed(self, picture: Picture) -> None:
        """A process was killed, and this is what it left."""
        self._stored(picture)
        new = 0
        for key, row in picture.rows.items():
            if row.token is not None and row.token not in self.tokens[key]:
                self.tokens[key].add(row.token)
                new += 1
        self.leased_at_kills.append(new)
        if new > CONCURRENCY:
            self._break("leased", f"{new} deliveries were leased at once")
        for key, row in picture.rows.items():
            self._explained(key, row)

    def _stored(self, picture: Picture) -> None:
        """The file is sound; what was acknowledged is there; what is there is whole."""
        if picture.integrity != "ok":
            self._break("integrity", picture.integrity)
        for event_id in self.acknowledged - picture.events:
            if not self._pruned(event_id):
                self._break("lost", f"{event_id} was acknowledged and is not in the database")
        found: defaultdict[str, set[str]] = defaultdict(set)
        for path, event_id in picture.rows:
            found[event_id].add(path)
        for event_id in picture.events | found.keys():
            if event_id not in picture.events or found[event_id] != self._paths(event_id):
                self._break("half", f"{event_id} has deliveries for {sorted(found[event_id])}")

    def _explained(self, key: Key, row: Row) -> None:
        """A request has its answer stored, or left in a lease that ended with its process."""
        seen, interrupted = self.requests[key], len(self.tokens[key])
        if seen > row.answered + interrupted:
            self._break("unexplained", f"{key}: {seen} requests, {row.answered} stored, {interrupted} at kills")
        if row.answered > seen:
            self._break("unexplained", f"{key}: {row.answered} answers stored of {seen} requests")

    # -- when everything has been delivered ---------------------------------------------------------------------

    def drained(self, picture: Picture) -> None:
        """The last process ended by itself, and says that nothing is pending."""
        self._stored(picture)
        for key, row in picture.rows.items():
            self._explained(key, row)
            self._recorded(key, row)
        for event_id in sorted(self.acknowledged):
            for path in self._paths(event_id):
                self._delivered((path, event_id), picture)
        for key in self.requests.keys() - picture.rows.keys():
            if not self._pruned(key[1]):
                self._break("unrecorded", f"{key}: {self.requests[key]} requests, and no such delivery")

    def _recorded(self, key: Key, row: Row) -> None:
        if row.state == "pending" or row.token is not None:
            self._break("lost", f"{key} is still {row.state} after the drain")
        if self.requests[key] > row.attempts:
            self._break("unrecorded", f"{key}: {self.requests[key]} requests, {row.attempts} attempts")
        if row.attempts != row.answered + row.interrupted or row.attempts != row.attempt_count:
            self._break("unrecorded", f"{key}: {row}")
        if not row.interruptions == row.interrupted == len(self.tokens[key]):
            self._break("interruptions", f"{key}: leased at {len(self.tokens[key])} kills, but {row}")

    def _delivered(self, key: Key, picture: Picture) -> None:
        row = picture.rows.get(key)
        if row is None:
            return  # pruned, or `_stored` has said so
        if key in self.succeeded and row.state == "succeeded":
            return
        if row.disabled_reason == "gone" and (row.state == "skipped" or (row.state == "failed" and key in self.gone)):
            return  # the receiver said 410: its endpoint is disabled, and what waited is skipped
        self._break("lost", f"{key} is {row.state}, and was{'' if key in self.succeeded else ' not'} answered with 200")

    # -- figures ------------------------------------------------------------------------------------------------

    @property
    def repeats(self) -> int:
        """How many requests there were beyond those whose answers are stored."""
        return sum(seen - self.last.rows[key].answered for key, seen in self.requests.items() if key in self.last.rows)

    def _paths(self, event_id: str) -> set[str]:
        return {self._prefix + part for part in wanted(event_id)}

    def _pruned(self, event_id: str) -> bool:
        """Whether it may be gone: it was old, and delivered."""
        return event_id == "evt_old" and all((path, event_id) in self.succeeded for path in self._paths(event_id))

    def _break(self, promise: str, how: str) -> None:
        self.broken.append((promise, f"{self._prefix} {how}"))


def first_requests(requests: Iterable[Request], prefix: str, called_at: float) -> Iterator[float]:
    """Return when requests of a process came that was started then: not those that a killed one left on their way."""
    return (
        request.at - called_at
        for request in requests
        if request.path.startswith(prefix) and request.connected_at >= called_at
    )
