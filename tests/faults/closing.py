"""Closing in time, whatever hangs: one run of it, drawn by chance, and the figures of many."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hookwright import Dispatcher, Failure, Observation, Receipt, Request, Response, StorageBusy, StorageClosed
from tests.conftest import URL, until
from tests.faults.processes import integrity, locked, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

SHUTDOWN_TIMEOUT = 0.2
LIMIT = SHUTDOWN_TIMEOUT + 1.0
EVENTS = 3


class Hanging:
    """A transport, and an observer, that hang until released: willing to be cancelled, or deaf to it."""

    def __init__(self, receiver: str, observer: str) -> None:
        self._receiver = receiver
        self._observer = observer
        self._answer = asyncio.Event()
        self._end = asyncio.Event()
        self.sent = 0

    def answer(self) -> None:
        """Let receivers answer that are only slow."""
        if self._receiver == "answers":
            self._answer.set()

    def end(self) -> None:
        """Let everything end, that the loop can."""
        self._answer.set()
        self._end.set()

    async def send(self, request: Request) -> Response | Failure:
        """Answer once it is let to."""
        self.sent += 1
        await self._hang(self._answer, deaf=self._receiver == "deaf")
        return Response(200)

    async def observe(self, observation: Observation) -> None:
        """Hang, if it is such a one."""
        if self._observer != "quick":
            await self._hang(self._end, deaf=self._observer == "deaf")

    async def aclose(self) -> None:
        """Hang as the receivers do."""
        if self._receiver != "answers":
            await self._hang(self._end, deaf=self._receiver == "deaf")

    async def _hang(self, event: asyncio.Event, *, deaf: bool) -> None:
        while not event.is_set():
            try:
                await event.wait()
            except asyncio.CancelledError:
                if not deaf:
                    raise


@dataclass
class Closed:
    """One run: what hung, how long closing took, and what was not kept."""

    what: str
    seconds: float
    broken: list[str] = field(default_factory=list)


@dataclass
class Figures:
    """Many runs."""

    runs: list[Closed] = field(default_factory=list)
    unheard: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """How long each took, sorted."""
        return sorted(run.seconds for run in self.runs)

    @property
    def late(self) -> list[Closed]:
        """Those that took too long."""
        return [run for run in self.runs if run.seconds > LIMIT]

    @property
    def broken(self) -> list[Closed]:
        """Those after which something was lost, or said wrongly."""
        return [run for run in self.runs if run.broken]

    def percentile(self, share: float) -> float:
        """Return the time within which this share of them closed."""
        return self.seconds[min(len(self.runs) - 1, int(share * len(self.runs)))]


async def close_often(folder: Path, runs: int, chance: Random, progress: Callable[[str], object]) -> Figures:
    """Close dispatchers one after the other, each with a file of its own."""
    figures = Figures()
    # What tasks raise that nobody awaits any more would only be logged.
    asyncio.get_running_loop().set_exception_handler(lambda _, what: figures.unheard.append(str(what)))
    for number in range(1, runs + 1):
        file = folder / f"{number}.db"
        figures.runs.append(await close_once(file, chance))
        for left in folder.glob(f"{number}.db*"):
            left.unlink()
        gc.collect()
        if number % 100 == 0:
            progress(f"{number} closed, {len(figures.late)} too late, {len(figures.broken)} broken")
    return figures


async def close_once(path: Path, chance: Random) -> Closed:
    """Close one dispatcher amid its work; what hangs is drawn."""
    receiver, observer = chance.choice(["answers", "hangs", "deaf"]), chance.choice(["quick", "hangs", "deaf"])
    is_locked = chance.random() < 0.5
    hanging = Hanging(receiver, observer)
    dispatcher = Dispatcher(f"sqlite:///{path}", transport=hanging, shutdown_timeout=SHUTDOWN_TIMEOUT)
    await dispatcher.start()
    dispatcher.observe(hanging.observe)
    for number in range(EVENTS):
        await dispatcher.endpoints.create(f"{URL}/{number}", events=["*"])
    await dispatcher.emit("video.ready")
    await until(lambda: hanging.sent == EVENTS)
    closed = Closed(f"receivers: {receiver}, observer: {observer}, locked: {is_locked}", 0.0)
    with locked(path) as lock:
        if not is_locked:
            lock.release()
        hanging.answer()
        late = asyncio.ensure_future(dispatcher.emit("video.late"))
        await asyncio.sleep(chance.random() * 0.1)
        begun = time.monotonic()
        await dispatcher.aclose()
        closed.seconds = time.monotonic() - begun
        closed.broken += await _after(dispatcher, late)
    hanging.end()
    closed.broken += _kept(path, late)
    return closed


async def _after(dispatcher: Dispatcher, late: asyncio.Future[Receipt]) -> list[str]:
    state = (await dispatcher.health()).state
    await asyncio.wait({late}, timeout=0.1)
    return [
        *([] if state == "closed" else [f"health says {state}"]),
        *([] if late.done() else ["an emit never returned"]),
    ]


def _kept(path: Path, late: asyncio.Future[Receipt]) -> list[str]:
    broken = [] if integrity(path) == "ok" else ["the file is damaged"]
    emitted, unhappy = 1, None
    if late.done() and (unhappy := late.exception()) is None:
        emitted += 1
    if unhappy is not None and not isinstance(unhappy, (StorageBusy, StorageClosed)):
        broken.append(f"emit raised {unhappy!r}")
    rows = look(path, "SELECT state, attempt_count - budget_from FROM hookwright_delivery")
    if len(rows) != emitted * EVENTS:
        broken.append(f"{emitted} events were acknowledged, and there are {len(rows)} deliveries")
    if any(state not in {"pending", "succeeded"} or (state == "pending" and spent) for state, spent in rows):
        broken.append(f"closing cost attempts: {rows}")
    return broken
