"""Who gets how much of a claim: the arithmetic of rooms, the same for every storage."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from hookwright.storage._base import allowed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookwright.storage._base import ClaimRequest


class Ready(NamedTuple):
    """A lane that is due and not held."""

    endpoint_id: str
    earned: int
    cap: int | None
    rate_interval: int | None
    rate_at: int


class Rooms:
    """What is left to give in one claim, and what was given so far."""

    def __init__(self, request: ClaimRequest, now: int) -> None:
        self._request = request
        self._now = now
        self.left = request.limit
        self.unproven_left = request.unproven_limit
        self._further_left = request.further_limit
        self._taken: Counter[str] = Counter()

    def of(self, lanes: Iterable[Ready]) -> tuple[dict[Ready, int], list[Ready]]:
        """Return the lanes with room, in turn, and how much they have; and those that are closed for their rate."""
        rooms: dict[Ready, int] = {}
        closed: list[Ready] = []
        for lane in lanes:
            room = self._room(lane)
            if room > 0 and lane.rate_interval is not None:
                room = min(room, allowed(lane.rate_interval, lane.rate_at, self._now))
                if room <= 0:
                    closed.append(lane)
            room = min(room, self.left, self._first(lane) + self._further_left)
            if room > 0:
                rooms[lane] = room
        return rooms, closed

    def _room(self, lane: Ready) -> int:
        request = self._request
        held = len(request.in_flight.get(lane.endpoint_id, ())) + self._taken[lane.endpoint_id]
        return min(max(1, lane.earned), lane.cap or request.endpoint_concurrency) - held

    def give(self, lane: Ready, count: int) -> int:
        """Return how many of so many rows a lane may give, as far as there is any left, and count them."""
        first = self._first(lane)
        count = min(count, self.left, first + self._further_left)
        if lane.earned == 0 or lane.endpoint_id in self._request.slow:
            count = min(count, self.unproven_left)
            self.unproven_left -= count
        self.left -= count
        self._further_left -= max(0, count - first)
        self._taken[lane.endpoint_id] += count
        return count

    def _first(self, lane: Ready) -> int:
        """Return how many of a lane's rows are not counted as further ones: the first, unless it has one already."""
        return 0 if self._taken[lane.endpoint_id] or lane.endpoint_id in self._request.in_flight else 1
