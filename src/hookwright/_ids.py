"""Ids that sort by the time they were made, cannot be guessed, and hold no `.` (what is signed is joined with dots)."""

from __future__ import annotations

import os


def new_id(prefix: str, now: int) -> str:
    """Return `prefix_` + 12 hex digits of milliseconds + 20 random ones (80 bits); `now` is in microseconds UTC.

    Time-sorted keys are appended at the right edge of a B-tree, where random ones split pages all over it.
    """
    return f"{prefix}_{now // 1000:012x}{os.urandom(10).hex()}"


def new_ids(prefix: str, now: int, count: int) -> list[str]:
    """Return as many of them; the system is asked for random bytes once."""
    begin, random = f"{prefix}_{now // 1000:012x}", os.urandom(10 * count).hex()
    return [begin + random[at : at + 20] for at in range(0, 20 * count, 20)]


def new_token() -> str:
    """Return a fencing token: fresh for every lease, never reused."""
    return os.urandom(12).hex()
