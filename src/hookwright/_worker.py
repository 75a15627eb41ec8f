"""Claim, fill slots, deliver, wait; and stop without losing anything.

The *half rule*: deliveries to endpoints that have not proven themselves in this process, whose last attempt failed, or
that have had an attempt in flight for over a second, hold together at most half the slots; and so do, together, all
attempts beyond the first of each endpoint. So a few endpoints that hang can never take all of them, even those that
answered until a moment ago, and nobody waits for a neighbour.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from hookwright._clock import SECOND
from hookwright._conditions import Conditions, log
from hookwright._errors import StorageClosed, StorageError, WaitTimeout
from hookwright._observe import WorkerFailed
from hookwright._pace import Pace
from hookwright.storage._base import ClaimRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hookwright._clock import Clock, Timer
    from hookwright._delivery import Attempted, Deliverer
    from hookwright._matching import EndpointCache
    from hookwright._models import Claim, Lease, Settled
    from hookwright._observe import ObserverHub
    from hookwright.storage._base import Storage

_logger = logging.getLogger("hookwright")

SLOW = 1 * SECOND
"""An endpoint with an attempt in flight for longer than this counts as unproven."""

CLAIM_MOST = 64
"""Leases that one claim asks for at most: it is a transaction that everybody else waits for."""

_LOOK_AGAIN = 1.0
"""Seconds after which the worker looks for an event that a claim may have overtaken."""

_BACKOFF_MOST = 5.0
"""Seconds between two looks while the storage fails: a look is cheap, and it may be well again any time."""

_CANCEL_GRACE = 0.1
"""Seconds for what is in flight to end when it is cancelled at shutdown; a transport may not let itself be stopped."""

_RELEASE_GRACE = 0.1
"""Seconds for giving leases back at shutdown; what is not given back is freed by whoever delivers next."""


class _InFlight:
    """What one endpoint has in flight: when each attempt was started, and whether it answered the last one well."""

    __slots__ = ("proven", "started")

    def __init__(self, *, proven: bool) -> None:
        self.proven = proven
        self.started: dict[str, int] = {}


class _Slot:
    """One attempt, from its beginning until its result is on disk: being written, or still being made by a task."""

    __slots__ = ("attempted", "lease", "started", "task")

    attempted: Attempted

    def __init__(self, lease: Lease, started: int) -> None:
        self.lease = lease
        self.started = started
        self.task: asyncio.Task[None] | None = None


class _Pass(NamedTuple):
    """What one look for work found: whether there is nothing to do at all now, and when to look again by itself.

    After a `failed` one, nothing is looked for until then, unless `drain` or `stop` ask for it.
    """

    idle: bool
    delay: float | None
    failed: bool = False


class Worker:
    """Claims deliveries and carries them out, `concurrency` at a time."""

    def __init__(
        self,
        storage: Storage,
        deliverer: Deliverer,
        *,
        cache: EndpointCache,
        clock: Clock,
        observers: ObserverHub,
        conditions: Conditions,
        concurrency: int,
        endpoint_concurrency: int,
        lease: float,
        on_stopped_endpoints: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._deliverer = deliverer
        self._cache = cache
        self._clock = clock
        self._observers = observers
        self._conditions = conditions
        self._concurrency = concurrency
        self._endpoint_concurrency = endpoint_concurrency
        self._lease = round(lease * SECOND)
        self._on_stopped_endpoints = on_stopped_endpoints
        self._endpoints: dict[str, _InFlight] = {}
        self._slots: dict[str, _Slot] = {}
        self._attempted: list[_Slot] = []
        self._is_writing = False
        self._settling: dict[str, _Slot] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self._waiting: deque[Lease] = deque()
        self._pace = Pace(CLAIM_MOST)
        self._claims = 0
        self._claims_when_stored = 0
        self._looker: Timer | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._asked = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._failures = 0
        self.lag = 0.0
        self._drainers: list[asyncio.Future[None]] = []
        self._sweeper: Timer | None = None
        self._sweep_at = 0

    @property
    def in_flight(self) -> int:
        """How many slots are taken: a slot is free only when its result is on disk."""
        return len(self._slots)

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    @property
    def is_failing(self) -> bool:
        """Whether the last look for work failed."""
        return self._failures > 0

    def look_now(self) -> None:
        """Look for work now, though the last look failed a moment ago."""
        self._asked.set()

    def note_stored(self) -> None:
        """Look again in a while, unless a claim is asked for until then: what was stored may have been overtaken by it.

        A storage carries out in order what it is asked for (see Storage), but one that wraps another may be late.
        """
        self._claims_when_stored = self._claims
        if self._looker is None:
            self._looker = self._clock.call_later(_LOOK_AGAIN, self._look_again)

    def _look_again(self) -> None:
        self._looker = None
        if self._claims == self._claims_when_stored:
            self._wake.set()

    async def run(self) -> None:
        """Deliver until `stop`. It may be called again when it raised."""
        self._ended.clear()
        try:
            await self._give_back_waiting()
            while not self._stopping:
                self._wake.clear()
                self._asked.clear()
                asked = len(self._drainers)
                found = await self._claim_and_start()
                if found.idle:
                    _resolve(self._drainers[:asked])
                    del self._drainers[:asked]
                if found.failed:
                    await self._clock.wait_for(self._asked, found.delay)
                else:
                    await self._sleep(found.delay)
        finally:
            self._ended.set()

    async def _claim_and_start(self) -> _Pass:
        free = min(CLAIM_MOST, self._concurrency - len(self._slots) + len(self._settling))
        if free <= 0:
            return _Pass(idle=False, delay=None)
        claim = None
        try:
            self._claims += 1
            claim = await self._storage.claim(self._request(free))
            await self._refresh_endpoints(claim)
        except StorageClosed as error:
            if not self._stopping:
                self._conditions.trouble("storage", "the storage was closed", error)
            self._stopping = True
            return _Pass(idle=False, delay=None)
        except Exception as error:  # noqa: BLE001  # a worker that ends silently is the worst that can happen
            await self._give_back([] if claim is None else claim.leases, sent=False)
            self._sweep_later()
            return self._back_off(error)
        self._failures = 0
        self._conditions.over("claim")
        if self._stopping:
            await self._give_back(claim.leases, sent=False)
            return _Pass(idle=False, delay=None)
        await self._start_all(claim.leases)
        if len(claim.leases) == free:
            self._wake.set()  # there may be more
        delay = None if claim.next_due is None else max(0.0, (claim.next_due - self._clock.now()) / SECOND)
        # A wake-up since the claim began (a result was written, an event stored) may have brought something due.
        return _Pass(idle=not self._slots and not self._wake.is_set(), delay=delay)

    def _request(self, free: int) -> ClaimRequest:
        slow_before = self._clock.now() - SLOW
        slow = {id for id, endpoint in self._endpoints.items() if min(endpoint.started.values()) < slow_before}
        unproven = sum(
            len(endpoint.started) for id, endpoint in self._endpoints.items() if not endpoint.proven or id in slow
        )
        further = sum(len(endpoint.started) - 1 for endpoint in self._endpoints.values())
        half = max(1, self._concurrency // 2)
        return ClaimRequest(
            limit=free,
            further_limit=max(0, half - further),
            unproven_limit=max(0, half - unproven),
            lease=self._lease,
            endpoint_concurrency=self._endpoint_concurrency,
            in_flight={id: frozenset(endpoint.started) for id, endpoint in self._endpoints.items()},
            slow=slow,
            settling=frozenset(slot.lease.delivery_id for slot in self._settling.values()),
        )

    async def _refresh_endpoints(self, claim: Claim) -> None:
        # The claim is the last judge: an endpoint that changed since the cache was read is read again first.
        revision = claim.endpoints_revision
        if claim.leases and revision > self._cache.revision and await self._cache.refresh(revision - 1):
            self._on_stopped_endpoints()

    def _back_off(self, error: Exception) -> _Pass:
        delay = min(_BACKOFF_MOST, 2.0**self._failures)
        self._conditions.trouble("claim", "deliveries cannot be claimed", error)
        self._failures = min(self._failures + 1, 10)
        if self._failures == 1:
            log("deliveries cannot be claimed; trying again until they can", error)
        self._observers.report(WorkerFailed(error=f"{type(error).__name__}: {error}", retry_in=delay))
        return _Pass(idle=False, delay=delay, failed=True)

    async def _sleep(self, delay: float | None) -> None:
        timer = None if delay is None else self._clock.call_later(delay, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def _start_all(self, leases: list[Lease]) -> None:
        # A slot is free only when its result is on disk; what was claimed for one whose result is not goes back.
        self._waiting.extend(leases)
        while self._waiting and len(self._slots) < self._concurrency and not self._stopping:
            some = min(self._pace.at_once, len(self._waiting), self._concurrency - len(self._slots))
            now = self._clock.now()
            with self._pace.measured(some):
                for _ in range(some):
                    self._start(self._waiting.popleft(), now)
            if self._waiting:
                await asyncio.sleep(0)
        self._unsettle([*self._settling.values()][: len(self._waiting)])
        await self._give_back_waiting()

    async def _give_back_waiting(self) -> None:
        leases = list(self._waiting)
        await self._give_back(leases, sent=False)
        self._waiting.clear()

    def _start(self, lease: Lease, now: int) -> None:
        self.lag = max(0, now - lease.due_at) / SECOND
        slot = self._slots[lease.token] = _Slot(lease, now)
        self._enter(slot)
        self._endpoints[lease.endpoint_id].proven = lease.proven
        slot.task = asyncio.get_running_loop().create_task(self._carry_out(slot))  # the loop may run it at once

    async def _carry_out(self, slot: _Slot) -> None:
        attempted = None
        try:
            attempted = await self._deliverer.attempt(slot.lease)
            if attempted is None:  # what was given back may belong to an endpoint that is gone
                self._on_stopped_endpoints()
        except StorageClosed:
            pass
        except StorageError:  # it was not given back
            self._sweep_later()
        except Exception as error:  # noqa: BLE001  # a defect of ours, which is told
            self._note_defect(slot, error)
        finally:
            if attempted is None:
                self._free([slot], again=True)
        if attempted is not None:
            slot.attempted = attempted
            self._attempted.append(slot)
            self._write_soon()

    def _note_defect(self, slot: _Slot, error: Exception) -> None:
        """Tell of a defect of ours. The lease ends by itself, and counts as an interruption."""
        _logger.error("delivery %s could not be carried out", slot.lease.delivery_id, exc_info=error)
        self._sweep_later()
        self._observers.report(WorkerFailed(error=f"{type(error).__name__}: {error}", retry_in=0.0))

    def _begin_writing(self, writing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(writing)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def _write_soon(self) -> None:
        # Soon: others end in this turn of the loop, and a loop whose tasks begin at once would not wait for them.
        if not self._is_writing:
            self._is_writing = True
            asyncio.get_running_loop().call_soon(lambda: self._begin_writing(self._write_attempted()))

    async def _write_attempted(self) -> None:
        """Write all results that are known, then all that became known meanwhile, until there are none."""
        try:
            while self._attempted:
                slots, self._attempted = self._attempted, []
                await self._write(slots)
        finally:
            self._is_writing = False
            if self._attempted and not self._stopping:  # somebody cancelled this task
                self._write_soon()

    async def _write(self, slots: list[_Slot]) -> None:
        """Write results, and have their slots claimed for meanwhile: the storage may do both in one transaction."""
        for slot in slots:
            self._settling[slot.lease.token] = slot
            self._leave(slot)
        self._wake.set()
        again = True
        try:
            again = self._opens_something(slots, await self._deliverer.settle([slot.attempted for slot in slots]))
        except StorageClosed:
            pass
        except Exception as error:  # noqa: BLE001  # whatever it is, no result may be lost for it
            self._unsettle(slots)
            if len(slots) > 1:  # whose fault it is shows when each is written alone
                for slot in slots:
                    self._begin_writing(self._write([slot]))
                slots = []
            elif isinstance(error, StorageError):  # by a task of its own: it keeps no other waiting
                self._begin_writing(self._write_later(slots[0], error))
                slots = []
            else:
                self._note_defect(slots[0], error)
        finally:
            self._free(slots, again=again)

    async def _write_later(self, slot: _Slot, error: StorageError) -> None:
        again = True
        try:
            again = self._opens_something([slot], [await self._deliverer.settle_later(slot.attempted, error)])
        except StorageClosed:
            pass
        except Exception as defect:  # noqa: BLE001  # a defect of ours, which is told
            self._note_defect(slot, defect)
        finally:
            self._free([slot], again=again)

    def _opens_something(self, slots: list[_Slot], answers: list[Settled]) -> bool:
        """Note what became of endpoints; say whether that lets something be claimed beyond the slots themselves.

        The claim for the slots was asked for before this was known.
        """
        opens = False
        for slot, settled in zip(slots, answers, strict=True):
            endpoint = self._endpoints.get(slot.lease.endpoint_id)
            if endpoint is not None and settled.proven is not None and endpoint.proven != settled.proven:
                endpoint.proven, opens = settled.proven, True
            if not settled.held or settled.next_attempt_at is not None or settled.changes:
                opens = True
            if settled.stopped:
                self._on_stopped_endpoints()
        return opens

    def _sweep_later(self) -> None:
        """Look for rows of stopped endpoints when the leases have ended that nobody may be working on."""
        self._sweep_at = self._clock.now() + self._lease
        if self._sweeper is None and not self._stopping:
            self._sweeper = self._clock.call_later(self._lease / SECOND, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        self._on_stopped_endpoints()
        left = self._sweep_at - self._clock.now()
        if left > 0 and not self._stopping:
            self._sweeper = self._clock.call_later(left / SECOND, self._sweep)

    def _free(self, slots: list[_Slot], *, again: bool) -> None:
        for slot in slots:
            token = slot.lease.token
            del self._slots[token]
            if self._settling.pop(token, None) is None:
                again = True  # nothing was claimed for it
                self._leave(slot)
        if again or (self._drainers and not self._slots):
            self._wake.set()

    def _unsettle(self, slots: list[_Slot]) -> None:
        """Count slots as taken again: their results are not written yet."""
        for slot in slots:
            if self._settling.pop(slot.lease.token, None) is not None:
                self._enter(slot)

    def _enter(self, slot: _Slot) -> None:
        endpoint = self._endpoints.get(slot.lease.endpoint_id)
        if endpoint is None:
            endpoint = self._endpoints[slot.lease.endpoint_id] = _InFlight(proven=slot.lease.proven)
        endpoint.started[slot.lease.delivery_id] = slot.started

    def _leave(self, slot: _Slot) -> None:
        endpoint = self._endpoints[slot.lease.endpoint_id]
        del endpoint.started[slot.lease.delivery_id]
        if not endpoint.started:
            del self._endpoints[slot.lease.endpoint_id]

    async def drain(self, timeout: float | None) -> None:
        """Return when nothing can be claimed now and nothing is in flight, or raise WaitTimeout."""
        drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drainers.append(drained)
        self._wake.set()
        self._asked.set()
        if not await self._clock.wait_all({drained}, timeout):
            drained.cancel()
            raise WaitTimeout(f"{self.in_flight} deliveries are still in flight, or more are due, after {timeout:g} s")
        drained.result()

    async def stop(self, timeout: float) -> None:
        """Claim no more, wait for what is in flight, then cancel the rest and give its leases back at no cost."""
        self._stopping = True
        self._wake.set()
        self._asked.set()
        for timer in (self._sweeper, self._looker):
            if timer is not None:
                timer.cancel()
        ended = asyncio.ensure_future(self._ended.wait())
        await self._finish(timeout, ended)
        ended.cancel()
        leases = [slot.lease for slot in self._slots.values()]
        if leases:
            _logger.info("closing with %d attempts unfinished: their leases are given back", len(leases))
            for slot in self._slots.values():
                if slot.task is not None:
                    slot.task.cancel()
            await self._finish(_CANCEL_GRACE)  # what is known is still written
            if self._tasks():
                _logger.warning("%d attempts did not end when they were cancelled: left behind", len(self._tasks()))
            for writing in self._writing:
                writing.cancel()
        with anyio.move_on_after(_RELEASE_GRACE):
            await self._give_back(leases, sent=True)
            await self._give_back_waiting()
        for drainer in self._drainers:
            if not drainer.done():
                drainer.set_exception(WaitTimeout("the dispatcher was closed before everything due was delivered"))

    async def _finish(self, timeout: float, *others: asyncio.Future[Any]) -> None:
        """Wait until nothing is in flight, and for `others`, that many seconds at most."""
        # In real time: under a virtual clock that nobody advances, a shutdown would never end.
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while True:
            await asyncio.sleep(0)  # an attempt that has just ended has a result to be written
            unfinished, left = {*self._tasks(), *(other for other in others if not other.done())}, until - loop.time()
            if left <= 0 or not (unfinished or self._is_writing):
                return
            if unfinished:
                await asyncio.wait(unfinished, timeout=left)

    def _tasks(self) -> list[asyncio.Task[None]]:
        attempts = (slot.task for slot in self._slots.values())
        return [task for task in (*attempts, *self._writing) if task is not None and not task.done()]

    async def _give_back(self, leases: list[Lease], *, sent: bool) -> None:
        if not leases:
            return
        try:
            await self._storage.release(leases, sent=sent)
        except Exception as error:  # noqa: BLE001  # they end by themselves
            _logger.warning("%d leases could not be given back: %s", len(leases), error)
        self._sweep_later()  # their endpoints may have stopped meanwhile


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
