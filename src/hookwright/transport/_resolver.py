"""Names to addresses, in threads of our own.

Never the loop's default executor: a dozen slow look-ups fill it, and then the host application's own
`asyncio.to_thread` waits. Plain daemon threads: a ThreadPoolExecutor with one hung worker delays interpreter exit.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
import threading
from collections import OrderedDict, deque
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Lookup = Callable[[str, int], Sequence[str]]

T = TypeVar("T")

ANSWER_FRESH = 30.0
"""Seconds for which an answer is used without asking again."""

ANSWER_KEPT = 60.0
"""Seconds for which an answer is used while asking again, which may hang."""

ANSWERS_MOST = 10_000
"""Answers that are kept at most, and names of which is known whether they answered."""


class Resolver(Protocol):
    """Returns the addresses of a host, in the order in which to try them. Raises OSError when there are none.

    An async function `(host, port) -> ["192.0.2.1", ...]` is one. Awaited at every dial, under `Timeouts.dns`: an
    implementation may cache. It need not judge addresses.
    """

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Resolve."""
        ...


class NoThreadLeft(OSError):
    """The system has no thread left for a look-up: nothing was asked."""


class _Standing(IntEnum):
    """What is known of a name; look-ups of a lower standing leave threads to those of a higher one."""

    SILENT = 0
    UNKNOWN = 1
    ANSWERED = 2


# The half rule: names that did not answer last time hold together at most half of the threads, so that those that do
# never wait for them. Names never asked before may be as bad: together with the silent ones they hold three quarters.
_THREADS = {_Standing.SILENT: 8, _Standing.UNKNOWN: 12, _Standing.ANSWERED: 16}

_OVERDUE = 3.0
"""Seconds after which a look-up's thread is given up and counts no more: names may answer once, and then hang."""

_THREADS_MOST = {_Standing.SILENT: 40, _Standing.UNKNOWN: 48, _Standing.ANSWERED: 64}
"""Threads at most, those that were given up included."""


class _Answer(NamedTuple):
    addresses: Sequence[str]
    at: float


class _Job:
    """One look-up of a name, and how many wait for it."""

    __slots__ = ("found", "host", "is_overdue", "overdue", "port", "waiting")

    def __init__(self, host: str, port: int, found: asyncio.Future[Sequence[str]]) -> None:
        self.host = host
        self.port = port
        self.found = found
        self.waiting = 0
        self.is_overdue = False
        self.overdue: asyncio.TimerHandle | None = None


class SystemResolver:
    """The system's resolver (`getaddrinfo`, in daemon threads), with a short memory.

    An answer is used for 30 s, and for 30 s more while a new look-up is under way, however long that takes; never
    longer. There is one look-up at a time for each name. Names that hang delay only themselves, and each other.

    `lookup` replaces `getaddrinfo`: it is called in a thread, and returns addresses or raises OSError.
    """

    def __init__(self, lookup: Lookup | None = None) -> None:
        self._lookup = lookup or _getaddrinfo
        self._threads = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[str, _Job] = {}
        self._running: set[_Job] = set()
        self._waiting: dict[_Standing, deque[_Job]] = {standing: deque() for standing in _Standing}
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._silent: OrderedDict[str, None] = OrderedDict()

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Resolve, or return what is known already."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # Look-ups of a loop that has ended never report back, and their threads may hang for long.
            self.close()
            self._loop = loop
        answer = self._answers.get(host)
        age = ANSWER_KEPT if answer is None else loop.time() - answer.at
        if answer is not None and age < ANSWER_FRESH:
            return answer.addresses
        job = self._jobs.get(host) or self._ask(host, port)
        if answer is not None and age < ANSWER_KEPT:
            return answer.addresses
        return await self._wait_for(job)

    def close(self) -> None:
        """Let the threads end, once their look-ups have."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0
        self._loop = None
        self._begin_anew()

    async def _wait_for(self, job: _Job) -> Sequence[str]:
        job.waiting += 1
        try:
            # Shielded: one caller's deadline is not the others'.
            return await asyncio.shield(job.found)
        except asyncio.CancelledError:
            if job in self._running:  # one that waits for a thread has not been asked
                _remember(self._silent, job.host, None)
            raise
        finally:
            job.waiting -= 1
            if not job.waiting and job not in self._running and self._jobs.get(job.host) is job:
                self._drop(job)

    # -- which look-up next -------------------------------------------------------------------------------------

    def _ask(self, host: str, port: int) -> _Job:
        assert self._loop is not None
        job = self._jobs[host] = _Job(host, port, self._loop.create_future())
        self._waiting[self._standing(host)].append(job)
        self._begin()
        return job

    def _drop(self, job: _Job) -> None:
        """Forget a look-up that has not begun and that nobody waits for any more."""
        del self._jobs[job.host]
        for waiting in self._waiting.values():
            if job in waiting:
                waiting.remove(job)

    def _standing(self, host: str) -> _Standing:
        if host in self._silent:
            return _Standing.SILENT
        return _Standing.ANSWERED if host in self._answers else _Standing.UNKNOWN

    def _begin(self) -> None:
        """Give look-ups to threads, those of the highest standing first."""
        for standing in reversed(_Standing):
            waiting = self._waiting[standing]
            while waiting and self._has_room(standing):
                job = waiting.popleft()
                if not self._start(job):
                    self._refuse_all(job)
                    return

    def _refuse_all(self, first: _Job) -> None:
        waiting = [first, *(job for jobs in self._waiting.values() for job in jobs)]
        for jobs in self._waiting.values():
            jobs.clear()
        for job in waiting:
            self._settle(job, NoThreadLeft("no thread left for a look-up"))

    def _start(self, job: _Job) -> bool:
        assert self._loop is not None
        if self._threads <= len(self._running):
            work = (self._queue,)
            try:
                threading.Thread(target=self._work, args=work, name="hookwright-resolver", daemon=True).start()
            except RuntimeError:  # the system has no thread left
                return False
            self._threads += 1
        self._running.add(job)
        job.overdue = self._loop.call_later(_OVERDUE, self._give_up, job)
        self._queue.put(job)
        return True

    def _give_up(self, job: _Job) -> None:
        job.is_overdue = True
        _remember(self._silent, job.host, None)
        self._begin()

    def _has_room(self, standing: _Standing) -> bool:
        # A name of low standing needs room in its own share and in every wider one.
        if len(self._running) >= _THREADS_MOST[standing]:
            return False
        running = [self._standing(job.host) for job in self._running if not job.is_overdue]
        return all(
            sum(other <= wider for other in running) < _THREADS[wider] for wider in _Standing if wider >= standing
        )

    def _end(self, job: _Job, outcome: Sequence[str] | OSError) -> None:
        if self._loop is not job.found.get_loop():
            return  # closed meanwhile, or used in another loop by now
        self._settle(job, outcome)
        self._begin()

    def _settle(self, job: _Job, outcome: Sequence[str] | OSError) -> None:
        assert self._loop is not None
        self._running.discard(job)
        if job.overdue is not None:
            job.overdue.cancel()
        if self._jobs.get(job.host) is job:
            del self._jobs[job.host]
        if isinstance(outcome, OSError):
            if not isinstance(outcome, NoThreadLeft) and outcome.errno not in {errno.EMFILE, errno.ENFILE}:
                _remember(self._silent, job.host, None)
            if not job.found.done():
                job.found.set_exception(outcome)
                job.found.exception()  # whoever asked may be gone
        else:
            self._silent.pop(job.host, None)
            _remember(self._answers, job.host, _Answer(outcome, self._loop.time()))
            if not job.found.done():
                job.found.set_result(outcome)

    # -- in a thread --------------------------------------------------------------------------------------------

    def _work(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            outcome: Sequence[str] | OSError
            try:
                outcome = self._lookup(job.host, job.port)
            except OSError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001  # an application's look-up; a thread that ends would be missing
                outcome = OSError(f"the look-up raised {type(error).__name__}")
            try:
                job.found.get_loop().call_soon_threadsafe(self._end, job, outcome)
            except RuntimeError:  # the loop is closed, nobody waits any more
                continue


def _getaddrinfo(host: str, port: int) -> Sequence[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(str(error)) from None
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def _remember(memory: OrderedDict[str, T], host: str, what: T) -> None:
    memory[host] = what
    memory.move_to_end(host)
    if len(memory) > ANSWERS_MOST:
        memory.popitem(last=False)
