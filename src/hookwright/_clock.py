"""The one source of time. Times are integer microseconds UTC; durations in public arguments are seconds."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

SECOND = 1_000_000
"""Microseconds in a second."""

FOREVER = 2**62
"""Later than any time."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Timer(Protocol):
    """What `Clock.call_later` returns."""

    def cancel(self) -> None:
        """Do not call, if it has not been called yet."""


class Clock:
    """The machine's clock: `now()` for schedules and leases, `wall()` for signatures and `occurred_at`.

    `now()` is the wall clock at construction plus the monotonic time since, so that a clock that is set back or
    forward while the process runs neither delays a retry nor fires it early. `wall()` follows such changes.
    """

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """Steady time in microseconds UTC."""
        return (self._offset + time.monotonic_ns()) // 1000

    def wall(self) -> int:
        """Wall time in microseconds UTC."""
        return time.time_ns() // 1000

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` on the running loop after `seconds` of steady time."""
        return asyncio.get_running_loop().call_later(seconds, callback)

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds` of steady time."""
        done = asyncio.Event()
        timer = self.call_later(seconds, done.set)
        try:
            await done.wait()
        finally:
            timer.cancel()

    async def wait_for(self, event: asyncio.Event, seconds: float | None) -> bool:
        """Wait until `event` is set, at most `seconds`; say whether it was."""
        waiter = asyncio.ensure_future(event.wait())
        try:
            return await self.wait_all({waiter}, seconds) or event.is_set()
        finally:
            waiter.cancel()

    async def wait_all(self, futures: set[asyncio.Future[Any]], seconds: float | None) -> bool:
        """Wait until all are done, at most `seconds`; say whether they are. They go on in any case."""
        done = asyncio.ensure_future(asyncio.wait(futures))
        expired = asyncio.Event()
        timer = None if seconds is None else self.call_later(seconds, expired.set)
        waiter = asyncio.ensure_future(expired.wait())
        try:
            await asyncio.wait({done, waiter}, return_when=asyncio.FIRST_COMPLETED)
            return done.done()
        finally:
            done.cancel()
            waiter.cancel()
            if timer is not None:
                timer.cancel()


def to_datetime(microseconds: int) -> datetime:
    """Convert microseconds UTC to an aware datetime, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def from_datetime(moment: datetime) -> int:
    """Convert an aware datetime to microseconds UTC, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)
