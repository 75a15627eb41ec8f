"""Fault points from outside: everything that passes is numbered, and at one of them something strikes.

Not a line of this is in the package. A test first counts what a scenario passes, and then runs it once for every
number, before and after: `for points in every(counted)`. What strikes is a function: one that raises, waits, or kills.
"""

from __future__ import annotations

import copy
import inspect
import os
import signal
import sqlite3
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from hookwright.storage._base import Storage
from hookwright.storage.sqlite import _owner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from hookwright import Failure, Request, Response, Transport

    Strike = Callable[[], object]


class Points:
    """Numbers what passes, from 1; at number `at`, before it happens or `after` it has, calls `strike`, once.

    `only` these names count, if any are given. `passed` are the names so far. A `strike` that returns an awaitable is
    awaited where that is possible.
    """

    def __init__(
        self, strike: Strike | None = None, *, at: int = 0, after: bool = False, only: Collection[str] = ()
    ) -> None:
        self._strike = strike
        self._at = at
        self._after = after
        self._only = frozenset(only)
        self.passed: list[str] = []
        self.struck = False

    def __repr__(self) -> str:
        name = self.passed[self._at - 1] if 0 < self._at <= len(self.passed) else "not reached"
        return f"<{'after' if self._after else 'before'} {self._at}: {name}>"

    def _due(self, name: str, number: int, *, after: bool) -> Any:
        if number != self._at or after != self._after or self._strike is None:
            return None
        self.struck = True
        return self._strike()

    def _number(self, name: str) -> int:
        if self._only and name not in self._only:
            return 0
        self.passed.append(name)
        return len(self.passed)

    @contextmanager
    def passing(self, name: str) -> Iterator[None]:
        """Something synchronous passes."""
        number = self._number(name)
        self._due(name, number, after=False)
        yield
        self._due(name, number, after=True)

    @asynccontextmanager
    async def reaching(self, name: str) -> AsyncIterator[None]:
        """Something asynchronous passes."""
        number = self._number(name)
        struck = self._due(name, number, after=False)
        if inspect.isawaitable(struck):
            await struck
        yield
        struck = self._due(name, number, after=True)
        if inspect.isawaitable(struck):
            await struck


def every(counted: int, strike: Strike, **options: Any) -> Iterator[Points]:
    """Return fault points for all that a first run counted, before and after each."""
    for number in range(1, counted + 1):
        for after in (False, True):
            yield Points(strike, at=number, after=after, **options)


# -- what strikes -----------------------------------------------------------------------------------------------


def kill() -> None:
    """End this process as kill -9 and the out-of-memory killer do."""
    os.kill(os.getpid(), signal.SIGKILL)


def raising(error: BaseException) -> Strike:
    """Return a strike that raises."""

    def strike() -> None:
        raise copy.copy(error)  # an error that is raised again drags its last traceback along

    return strike


def sqlite_error(code: int, text: str = "injected") -> sqlite3.OperationalError:
    """Return the error that SQLite raises with this code."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


# -- what they strike at ------------------------------------------------------------------------------------------


def name_of(sql: str) -> str:
    """Return a statement's first words, for reading."""
    return " ".join(sql.split())[:60]


@contextmanager
def statements(points: Points) -> Iterator[None]:
    """Let every statement of the connections that SQLiteStorage opens meanwhile pass `points`."""

    class Faulty(_owner.Database):
        def execute(self, sql: Any, parameters: Any = (), /) -> Any:
            if callable(sql):
                return super().execute(sql, parameters)
            with points.passing(name_of(sql)):
                return super().execute(sql, parameters)

        def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
            with points.passing(name_of(sql)):
                return super().executemany(sql, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_owner, "Database", Faulty)
        yield


def faulty_storage(inner: Storage, points: Points) -> Storage:
    """Return a storage whose verbs pass `points`, each by its name, on their way to `inner`."""

    def delegate(name: str) -> Any:
        async def verb(self: object, *arguments: Any, **options: Any) -> Any:
            async with points.reaching(name):
                return await getattr(inner, name)(*arguments, **options)

        return verb

    verbs = {name: delegate(name) for name in Storage.__abstractmethods__}
    return cast("Storage", type("FaultyStorage", (Storage,), verbs)())


class FaultyTransport:
    """A transport whose requests pass `points` on their way to `inner`: before one is sent, after its answer came."""

    def __init__(self, inner: Transport, points: Points) -> None:
        self._inner = inner
        self._points = points

    async def send(self, request: Request) -> Response | Failure:
        async with self._points.reaching("send"):
            return await self._inner.send(request)

    async def aclose(self) -> None:
        async with self._points.reaching("aclose"):
            await self._inner.aclose()
