"""What is wrong with a dispatcher right now: the one place that `health` asks, and how it is logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from hookwright._clock import SECOND
from hookwright._errors import StorageClosed, StorageCorrupt, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._clock import Clock

_logger = logging.getLogger("hookwright")

PASSING = 60.0
"""Seconds for which a failure counts that nothing is certain to clear: no other `emit` may follow one that failed."""


class _Trouble(NamedTuple):
    text: str
    fatal: bool
    at: int
    passing: bool


class Conditions:
    """Troubles by name: each lasts until it is `over`, or, when it is `passing`, for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._troubles: dict[str, _Trouble] = {}

    def trouble(self, name: str, what: str, error: BaseException | None = None, *, fatal: bool = False) -> None:
        """Note that something is wrong until it is `over`. A damaged or closed storage is always fatal."""
        self._note(name, what, error, fatal=fatal, passing=False)

    def passing(self, name: str, what: str, error: Exception | None = None) -> None:
        """Note that something went wrong just now."""
        self._note(name, what, error, fatal=False, passing=True)

    def _note(self, name: str, what: str, error: BaseException | None, *, fatal: bool, passing: bool) -> None:
        text = what if error is None else f"{what}: {type(error).__name__}: {error}"
        fatal = fatal or isinstance(error, (StorageCorrupt, StorageClosed))
        self._troubles[name] = _Trouble(text, fatal, self._clock.now(), passing and not fatal)

    def over(self, name: str) -> None:
        """Note that it is well again."""
        if self._troubles:
            self._troubles.pop(name, None)

    @property
    def failed(self) -> bool:
        """Whether it does not go on by itself: somebody has to look."""
        return any(trouble.fatal for trouble in self._current())

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong, in words."""
        now = self._clock.now()
        return [
            f"{trouble.text} ({(now - trouble.at) // SECOND} s ago)" if trouble.passing else trouble.text
            for trouble in self._current()
        ]

    def _current(self) -> list[_Trouble]:
        since = self._clock.now() - round(PASSING * SECOND)
        return [trouble for trouble in self._troubles.values() if not trouble.passing or trouble.at > since]


def log(what: str, error: Exception) -> None:
    """Log what is repeated until it works: an outage in a line, a defect of ours with where it is."""
    _logger.error("%s: %s", what, error, exc_info=None if isinstance(error, StorageError) else error)
