"""A process's way to the storage: it suspends, fails, or is cut off in the middle, as the seed says."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

from hookwright import Storage, StorageBusy, StorageError, StorageFull
from tests.simulation._loop import turns

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from hookwright import MemoryStorage
    from hookwright._clock import Clock
    from tests.simulation._leases import Leases
    from tests.simulation._model import Model
    from tests.simulation._process import Process

ERRORS: tuple[type[StorageError], ...] = (StorageError, StorageFull, StorageBusy)

READS = frozenset(
    {
        "attempts",
        "backlog",
        "changes",
        "count_deliveries",
        "get_delivery",
        "get_endpoint",
        "get_event",
        "list_deliveries",
        "list_endpoints",
        "stats",
    }
)


class Faults:
    """The next so many verbs raise, before they took effect or after."""

    def __init__(self) -> None:
        self.left = 0
        self.kind = 0
        self.after = False
        self.struck = 0

    def set(self, count: int, kind: int, *, after: bool) -> None:
        self.left, self.kind, self.after = count, kind, after

    def take(self) -> tuple[StorageError, bool] | None:
        """Return what the verb that begins now is to raise, and whether after it took effect."""
        if self.left == 0:
            return None
        self.left -= 1
        return ERRORS[self.kind]("injected"), self.after


class Disk:
    """What all processes share: the data that survives them, and what the model learns of each change."""

    def __init__(
        self,
        storage: MemoryStorage,
        model: Model,
        leases: Leases,
        chance: random.Random,
        tell: Callable[[str], None],
    ) -> None:
        self.storage = storage
        self.model = model
        self.leases = leases
        self.chance = chance
        self.tell = tell
        self.faults = Faults()
        self.ports: list[Port] = []

    async def pause(self) -> None:
        """Suspend for a seeded number of the loop's turns."""
        await turns(self.chance.choice((0, 0, 1, 1, 2, 3, 5)))

    async def apply(self, process: Process, name: str, arguments: Any, options: Any) -> Any:
        """Let a verb take effect, between two suspensions and in no time, and tell the model."""
        await self.storage.open(process.clock)
        if name == "acquire" and self.leases.delivering not in (None, process):
            return False
        result = await getattr(self.storage, name)(*arguments, **options)
        if name not in READS:
            self.model.at += 1
            for port in self.ports:
                if port.process is not process:
                    port.foreign.set()
        self._learn(process, name, arguments, options, result)
        return result

    def _learn(self, process: Process, name: str, arguments: Any, options: Any, result: Any) -> None:
        now, model, leases = process.clock.now(), self.model, self.leases
        told: dict[str, Callable[[], None]] = {
            "acquire": lambda: leases.acquired(process, process.clock.now()),
            "enqueue": lambda: model.enqueued(arguments[0], arguments[1], result, now),
            "enqueue_many": lambda: model.enqueued_many(arguments[0], result, now),
            "claim": lambda: leases.claimed(process, arguments[0], result, now),
            "settle": lambda: leases.settled(process, arguments[0], result, now),
            "release": lambda: leases.released(arguments[0], now, **options),
            "requeue": lambda: leases.requeued(arguments[0], arguments[1], result),
            "cancel": lambda: leases.cancelled(arguments[0], result),
            "sweep": lambda: leases.swept(now),
            "create_endpoint": lambda: model.stored(result),
            "update_endpoint": lambda: model.stored(result),
            "set_endpoint_state": lambda: model.set_state(result),
            "delete_endpoint": lambda: model.stop(*arguments, deleted=True),
            "prune": lambda: model.pruned_before(arguments[0], result, now),
        }
        if name in told:
            told[name]()
        if name not in READS and name not in {"claim", "sweep", "prune"}:
            self.tell(f"  {process.number} {name} -> {result}")
        for lease in result.leases if name == "claim" else ():
            self.tell(f"  {process.number} claims {lease.delivery_id} number={lease.number} spent={lease.spent}")


class Port:
    """Opening, closing and waiting, and the way of all other verbs."""

    def __init__(self, disk: Disk, process: Process) -> None:
        self.disk = disk
        self.process = process
        self.foreign = asyncio.Event()
        self.is_open = False
        self._asked: list[asyncio.Event] = []

    async def open(self, clock: Clock) -> None:
        self.is_open = True
        self.disk.ports.append(self)

    async def close(self) -> None:
        await self.cut_off()
        await self.hang_up()

    async def hang_up(self) -> None:
        """What an end of the process does, a good one or not: the right to deliver is free."""
        if self.is_open:
            self.is_open = False
            self.disk.ports.remove(self)
            if self.disk.leases.delivering is self.process:
                await self.disk.storage.close()
            self.disk.leases.ended(self.process)

    async def wait(self, timeout: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.foreign.wait(), timeout)
        await self.cut_off()
        await self.disk.pause()
        found = self.foreign.is_set()
        self.foreign.clear()
        return found

    async def cut_off(self) -> None:
        """For a process that died: no call returns."""
        if not self.process.alive:
            await asyncio.Event().wait()

    async def call(self, name: str, arguments: Any, options: Any) -> Any:
        """Suspend, take effect or fail, suspend."""
        disk = self.disk
        await self.cut_off()
        fault = disk.faults.take()
        error, after = fault or (None, False)
        result = None
        applied = False
        before, decided = list(self._asked), asyncio.Event()
        self._asked.append(decided)
        try:
            await disk.pause()
            await self.cut_off()
            if name == "claim":  # it sees what was asked for before it; all else comes in any order
                for earlier in before:
                    await earlier.wait()
            if error is None or after:
                result = await disk.apply(self.process, name, arguments, options)
                applied = True
            self._decide(decided)
            await disk.pause()
            await self.cut_off()
            if error is not None:
                disk.faults.struck += 1
                disk.tell(f"  {self.process.number} {name} raises {error!r} after={after}")
                raise error
        except BaseException:
            self._was_not_told(name, arguments, result, applied=applied)
            raise
        finally:
            self._decide(decided)
        return result

    def _decide(self, operation: asyncio.Event) -> None:
        operation.set()
        if operation in self._asked:
            self._asked.remove(operation)

    def _was_not_told(self, name: str, arguments: Any, result: Any, *, applied: bool) -> None:
        if name == "claim" and applied:
            self.disk.leases.never_told(result)
        if name == "release" and not applied:
            self.disk.leases.not_released(arguments[0])


def storage_through(port: Port) -> Storage:
    """Return a storage whose verbs go through the port."""

    def delegate(name: str) -> Any:
        own: Any = {"open": port.open, "close": port.close, "wait": port.wait}.get(name)

        async def verb(self: object, *arguments: Any, **options: Any) -> Any:
            return await (port.call(name, arguments, options) if own is None else own(*arguments, **options))

        return verb

    verbs = {name: delegate(name) for name in Storage.__abstractmethods__}
    return cast("Storage", type("SimulatedStorage", (Storage,), verbs)())
