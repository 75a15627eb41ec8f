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
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio

from hookwright._clock import SECOND
from hookwright._errors import StorageClosed, WaitTimeout
from hookwright._observe import WorkerFailed
from hookwright.storage._base import ClaimRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hookwright._clock import Clock, Timer
    from hookwright._conditions import Conditions
    from hookwright._delivery import Deliverer
    from hookwright._matching import EndpointCache
    from hookwright._models import Claim, Lease
    from hookwright._observe import ObserverHub
    from hookwright.storage._base import Storage

_logger = logging.getLogger("hookwright")

SLOW = 1 * SECOND
"""An endpoint with an attempt in flight for longer than this counts as unproven."""

CLAIM_MOST = 64
"""Leases that one claim asks for at most: it is a transaction that everybody else waits for."""

TURN = 0.005
"""Seconds that the beginnings of attempts may take in one turn of the loop."""

_LEARNING = 0.3

_BACKOFF_MOST = 5.0
"""Seconds between two looks while the storage fails: a look is cheap, and it may be well again any time."""

_CANCEL_GRACE = 0.1
"""Seconds for what is in flight to end when it is cancelled at shutdown; a transport may not let itself be stopped."""

_RELEASE_GRACE = 0.1
"""Seconds for giving leases back at shutdown; what is not given back is freed by whoever delivers next."""


class _InFlight:
    """What one endpoint has in flight: when each attempt was started, oldest first."""

    __slots__ = ("proven", "started")

    def __init__(self) -> None:
        self.proven = False
        self.started: dict[str, int] = {}


class _Pace:
    """How many attempts are begun in one turn of the loop, so that the host's own callbacks wait for TURN at most.

    How long the beginning of one takes depends on the transport and the size of the data: it is measured.
    """

    def __init__(self) -> None:
        self._each = 0.0

    @property
    def at_once(self) -> int:
        """How many may begin together."""
        return CLAIM_MOST if self._each * CLAIM_MOST <= TURN else max(1, int(TURN / self._each))

    @contextmanager
    def measured(self, count: int) -> Iterator[None]:
        """Measure the first steps of `count` tasks that are created meanwhile."""
        loop, begun = asyncio.get_running_loop(), 0.0

        def begin() -> None:
            nonlocal begun
            begun = loop.time()

        def end() -> None:
            self._each += ((loop.time() - begun) / count - self._each) * _LEARNING

        loop.call_soon(begin)
        yield
        loop.call_soon(end)


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
        self._tasks: dict[str, tuple[asyncio.Task[None], Lease]] = {}
        self._settling: dict[str, str] = {}
        self._pace = _Pace()
        self._wake = asyncio.Event()
        self._stopping = False
        self._asked = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._failures = 0
        self.lag = 0.0
        self._drainers: list[asyncio.Future[None]] = []
        self._sweeper: Timer | None = None

    @property
    def in_flight(self) -> int:
        """How many slots are taken: a slot is free only when its result is on disk."""
        return len(self._tasks)

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def note_settling(self, token: str) -> None:
        """Claim for the slot of a lease whose result is being written: the storage may do both in one transaction."""
        lease = self._tasks[token][1]
        self._settling[token] = lease.delivery_id
        self._leave(lease)
        self._wake.set()

    def note_unsettled(self, token: str) -> None:
        """Count a slot as taken again: its result is not written yet."""
        if self._settling.pop(token, None) is not None:
            lease = self._tasks[token][1]
            self._endpoints.setdefault(lease.endpoint_id, _InFlight()).started[lease.delivery_id] = self._clock.now()

    async def run(self) -> None:
        """Deliver until `stop`. It may be called again when it raised."""
        self._ended.clear()
        try:
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
        free = min(CLAIM_MOST, self._concurrency - len(self._tasks) + len(self._settling))
        if free <= 0:
            return _Pass(idle=False, delay=None)
        claim = None
        try:
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
        return _Pass(idle=not self._tasks and not self._wake.is_set(), delay=delay)

    def _request(self, free: int) -> ClaimRequest:
        slow_before = self._clock.now() - SLOW
        slow = {id for id, endpoint in self._endpoints.items() if next(iter(endpoint.started.values())) < slow_before}
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
            settling=frozenset(self._settling.values()),
        )

    async def _refresh_endpoints(self, claim: Claim) -> None:
        # The claim is the last judge: an endpoint that changed since the cache was read is read again first.
        known = self._cache.revision
        if claim.leases and claim.endpoints_revision > known and await self._cache.refresh(known):
            self._on_stopped_endpoints()

    def _back_off(self, error: Exception) -> _Pass:
        delay = min(_BACKOFF_MOST, 2.0**self._failures)
        self._conditions.trouble("claim", "deliveries cannot be claimed", error)
        self._failures = min(self._failures + 1, 10)
        if self._failures == 1:
            _logger.exception("deliveries cannot be claimed; trying again until they can")
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
        waiting = deque(leases)
        while waiting and len(self._tasks) < self._concurrency and not self._stopping:
            some = min(self._pace.at_once, len(waiting), self._concurrency - len(self._tasks))
            with self._pace.measured(some):
                for _ in range(some):
                    self._start(waiting.popleft())
            if waiting:
                await asyncio.sleep(0)
        if waiting:
            for token in list(self._settling):
                self.note_unsettled(token)
            await self._give_back(list(waiting), sent=False)

    def _start(self, lease: Lease) -> None:
        endpoint = self._endpoints.setdefault(lease.endpoint_id, _InFlight())
        endpoint.proven = lease.proven
        now = self._clock.now()
        endpoint.started[lease.delivery_id] = now
        self.lag = max(0, now - lease.due_at) / SECOND
        task = asyncio.get_running_loop().create_task(self._carry_out(lease, endpoint))
        self._tasks[lease.token] = task, lease

    async def _carry_out(self, lease: Lease, endpoint: _InFlight) -> None:
        again = True
        try:
            settled = await self._deliverer.deliver(lease)
        except StorageClosed:
            pass
        except Exception as error:
            # A defect of ours. The lease ends by itself, and counts as an interruption.
            _logger.exception("delivery %s could not be carried out", lease.delivery_id)
            self._sweep_later()
            self._observers.report(WorkerFailed(error=f"{type(error).__name__}: {error}", retry_in=0.0))
        else:
            # After a success there is nothing new: its slot was claimed for when the result was handed over.
            again = settled is None or settled.next_attempt_at is not None or bool(settled.changes)
            if settled is not None and settled.proven is not None:
                endpoint.proven = settled.proven
            if settled is None or settled.stopped:  # what was given back may belong to an endpoint that is gone
                self._on_stopped_endpoints()
        finally:
            self._free_slot(lease, again=again)

    def _sweep_later(self) -> None:
        """Look for rows of stopped endpoints when the leases have ended that nobody may be working on."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweeper = self._clock.call_later(self._lease / SECOND, self._on_stopped_endpoints)

    def _free_slot(self, lease: Lease, *, again: bool) -> None:
        del self._tasks[lease.token]
        claimed_for = self._settling.pop(lease.token, None) is not None
        if not claimed_for:
            self._leave(lease)
        if again or not claimed_for or (self._drainers and not self._tasks):
            self._wake.set()

    def _leave(self, lease: Lease) -> None:
        endpoint = self._endpoints[lease.endpoint_id]
        del endpoint.started[lease.delivery_id]
        if not endpoint.started:
            del self._endpoints[lease.endpoint_id]

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
        if self._sweeper is not None:
            self._sweeper.cancel()
        ended = asyncio.ensure_future(self._ended.wait())
        # In real time: under a virtual clock that nobody advances, a shutdown would never end.
        await asyncio.wait({ended, *(task for task, _ in self._tasks.values())}, timeout=timeout)
        ended.cancel()
        unfinished = list(self._tasks.values())
        for task, _ in unfinished:
            task.cancel()
        if unfinished:
            _logger.info("closing with %d attempts unfinished: their leases are given back", len(unfinished))
            _, deaf = await asyncio.wait([task for task, _ in unfinished], timeout=_CANCEL_GRACE)
            if deaf:
                _logger.warning("%d attempts did not end when they were cancelled: left behind", len(deaf))
            with anyio.move_on_after(_RELEASE_GRACE):
                await self._give_back([lease for _, lease in unfinished], sent=True)
        for drainer in self._drainers:
            if not drainer.done():
                drainer.set_exception(WaitTimeout("the dispatcher was closed before everything due was delivered"))

    async def _give_back(self, leases: list[Lease], *, sent: bool) -> None:
        if not leases:
            return
        try:
            await self._storage.release(leases, sent=sent)
        except Exception as error:  # noqa: BLE001  # they end by themselves
            _logger.warning("%d leases could not be given back: %s", len(leases), error)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
