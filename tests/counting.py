"""Exact counts of what a scenario costs: on a loop whose order depends on nothing but itself.

How many operations share a transaction depends on who arrives while another one is written, and so on how busy the
machine is. Here another thread's answer comes when nothing else can run, as if every disk were slow: whoever could ask
for something meanwhile has. Time moves by a millisecond with each answer, and no timer fires.

Nothing is counted inside the package, but at what it stands on: sqlite3's connections, the loop's tasks, and the calls
by which other threads answer the loop.
"""

from __future__ import annotations

import asyncio
import queue
import selectors
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVarTuple

import pytest

from hookwright._clock import SECOND, Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

_Arguments = TypeVarTuple("_Arguments")

PATIENCE = 30.0
"""Real seconds after which an answer that did not come never will."""

HOP = SECOND // 1000
"""Microseconds of the scenario's time that pass until another thread's answer."""

_START = 1_767_225_600 * SECOND


class Counts(NamedTuple):
    """What something cost.

    `statements` are the runs of a prepared statement on connections that write, BEGIN and COMMIT among them; each row
    of an `executemany` is one, since SQLite runs it again for each. `reads` are the same on connections that do not
    write. `transactions` are commits of either. A `hop` is a call that another thread answered.
    """

    statements: int
    reads: int
    transactions: int
    hops: int
    tasks: int
    connections: int

    def plus(self, other: Counts) -> Counts:
        """Return both together."""
        return Counts(*(one + another for one, another in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        """Return what came since `other`."""
        return Counts(*(now - before for now, before in zip(self, other, strict=True)))


def differences(pinned: Counts, found: Counts) -> list[str]:
    """Return one line for each count that is not as it was pinned."""
    lines: list[str] = []
    for name, before, now in zip(Counts._fields, pinned, found, strict=True):
        if before != now:
            advice = ": better, lower the pin" if now < before else ": find out why, or raise the pin and say why"
            lines.append(f"{name}: {before:,} pinned, {now:,} found ({now - before:+,}){advice}")
    return lines


class _Answers(selectors.SelectSelector):
    """Instead of waiting for files, takes the next answer of another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.taken = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            try:
                answer = self.waiting.get(timeout=PATIENCE)
            except queue.Empty:
                raise RuntimeError("everything waits, and for nothing") from None
            self.taken += 1
            answer()
        return []


class CountingLoop(asyncio.SelectorEventLoop):
    """Time stands still for its timers. Other threads' answers come one by one, each when nothing else can run."""

    def __init__(self) -> None:
        self._answers = _Answers()
        super().__init__(self._answers)
        self._own = threading.get_ident()
        self.tasks = 0
        self.set_task_factory(self._make)

    @property
    def hops(self) -> int:
        """How many answers came."""
        return self._answers.taken

    def time(self) -> float:
        return 0.0

    def call_soon_threadsafe(
        self, callback: Callable[[*_Arguments], object], *args: *_Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() == self._own:
            return super().call_soon_threadsafe(callback, *args, context=context)
        self._answers.waiting.put(lambda: self.call_soon(callback, *args, context=context))
        return asyncio.Handle(callback, args, self, context)

    def _make(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        self.tasks += 1
        return asyncio.Task(coroutine, loop=loop, **options)


class CountingClock(Clock):
    """The scenario's time: a millisecond for each answer."""

    def __init__(self, loop: CountingLoop) -> None:
        self._loop = loop

    def now(self) -> int:
        return _START + HOP * self._loop.hops

    def wall(self) -> int:
        return self.now()


class _Traced:
    """What one of sqlite3's connections ran."""

    def __init__(self) -> None:
        self.statements = 0
        self.commits = 0
        self.writes = False

    def note(self, statement: str) -> None:
        verb = statement.lstrip().upper()
        if verb.startswith("--"):  # a step within a statement, as a trigger's
            return
        self.statements += 1
        self.commits += verb.startswith("COMMIT")
        self.writes = self.writes or verb.startswith("BEGIN IMMEDIATE")


class Counter:
    """Counts from its making on."""

    def __init__(self, loop: CountingLoop) -> None:
        self._loop = loop
        self._traced: list[_Traced] = []

    def connect(self, real: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        """Return what takes the place of `sqlite3.connect`."""

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection, traced = real(*arguments, **options), _Traced()
            connection.set_trace_callback(traced.note)
            self._traced.append(traced)
            return connection

        return connect

    def now(self) -> Counts:
        """Return the counts so far."""
        return Counts(
            statements=sum(traced.statements for traced in self._traced if traced.writes),
            reads=sum(traced.statements for traced in self._traced if not traced.writes),
            transactions=sum(traced.commits for traced in self._traced),
            hops=self._loop.hops,
            tasks=self._loop.tasks,
            connections=len(self._traced),
        )


def counted(scenario: Callable[[Counter, Clock], Coroutine[Any, Any, Counts]]) -> Counts:
    """Run a scenario on a loop of its own, and return what it says."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner, pytest.MonkeyPatch.context() as patch:
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop)
        counter = Counter(loop)
        patch.setattr(sqlite3, "connect", counter.connect(sqlite3.connect))
        return runner.run(scenario(counter, CountingClock(loop)))
