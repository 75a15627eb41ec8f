"""Connections, and transactions on them: each verb is one, in a task of its own, with an end in time.

Cancelling a caller never cancels SQL. A connection that does not answer is given up, and what was asked of it is
repeated where that is safe: a transaction that was not committed has left nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from hookwright._errors import (
    CommitLost,
    ConfigurationError,
    HookwrightError,
    StorageBusy,
    StorageClosed,
    StorageError,
    StorageUnavailable,
)
from hookwright.storage.postgres._convert import convert
from hookwright.storage.postgres._database import Database
from hookwright.storage.postgres._dsn import check_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import asyncpg

    from hookwright.storage.postgres._database import Names
    from hookwright.storage.postgres._dsn import Address

    Operation = Callable[[Database], Awaitable["T"]]

T = TypeVar("T")

CONNECT_LIMIT = 5.0
"""Seconds that a connection may take to be made."""

TRANSACTION_LIMIT = 12.0
"""Seconds after which a transaction is given up, with its connection: half-open ones answer never."""

ANSWER_LIMIT = 5.0
"""Seconds for the answer to BEGIN: a connection that takes longer is half-open, and all idle ones may be."""

PATIENCE = 10.0
"""Seconds for which a verb is repeated while the server cannot be reached."""

CLOSING_LIMIT = 0.3
"""Seconds that transactions under way have left when the storage is closed."""

_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 14_000}

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"

FIRST_CONNECTIONS = 3
"""Connections that only emit, claim and settle use, so that nobody's history holds them up."""

SETTINGS = {
    "default_transaction_isolation": "'read committed'",
    "default_transaction_read_only": "off",
    "jit": "off",
    "statement_timeout": "10000",
    "lock_timeout": "5000",
    "idle_in_transaction_session_timeout": "10000",
}
"""What every connection of ours is told: times in milliseconds, after which the server gives up."""

_TUNED = {f"enable_{kind}": "off" for kind in ("seqscan", "bitmapscan", "sort", "hashjoin", "mergejoin", "hashagg")} | {
    "plan_cache_mode": "force_generic_plan"
}
"""For statements that have one good plan, whatever the statistics say of tables that were empty a minute ago."""


class Pool:
    """Up to `size` connections to one database. `pooler`: another pool is in between, which keeps no settings."""

    def __init__(
        self, address: Address, names: Names, *, size: int, pooler: bool, settings: Callable[[], dict[str, str]]
    ) -> None:
        self._where, self._dsn = address
        self._names = names
        self._size = size
        self._pooler = pooler
        self._settings = settings
        self._pools: tuple[asyncpg.Pool[Any], asyncpg.Pool[Any]] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        self._foreign: tuple[type[Exception], ...] = ()
        self._made: dict[int, Any] = {}
        self._busy: set[int] = set()
        self.pids: set[int] = set()
        self.transactions = 0

    async def open(self) -> None:
        """Make ready to connect; nothing is asked of the server yet. Raises ConfigurationError."""
        asyncpg = driver()
        check_files(self._dsn)
        self._foreign = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
        try:
            side = await self._create(self._size - FIRST_CONNECTIONS, SETTINGS)
            self._pools = side, await self._create(FIRST_CONNECTIONS, SETTINGS | _TUNED)
        except (ValueError, asyncpg.InterfaceError, asyncpg.ClientConfigurationError) as error:
            raise _unreadable(error) from None

    async def _create(self, size: int, settings: Mapping[str, str]) -> asyncpg.Pool[Any]:
        return await driver().create_pool(  # type: ignore[no-any-return]  # the driver is not imported before it is used
            self._dsn,
            min_size=0,
            max_size=size,
            timeout=CONNECT_LIMIT,
            statement_cache_size=0 if self._pooler else 256,
            max_cached_statement_lifetime=0,
            max_inactive_connection_lifetime=300.0,
            init=partial(self._prepare, settings=settings),
            reset=_keep,
        )

    async def _prepare(self, connection: Any, settings: Mapping[str, str]) -> None:
        # By statements: a pooler that keeps sessions refuses most of them at the start of a connection.
        if not self._pooler:
            await connection.execute("; ".join(f"SET {name} = {value}" for name, value in settings.items()))
        pid = connection.get_server_pid()
        self.pids.add(pid)
        self._made[pid] = connection
        connection.add_termination_listener(lambda _: self._forget(pid))
        keep_alive(connection)

    def _forget(self, pid: int) -> None:
        self.pids.discard(pid)
        self._made.pop(pid, None)

    def suspect(self) -> None:
        """Close what is idle: a connection of this process was found half-open, and these may be, too."""
        for pid, connection in list(self._made.items()):
            if pid not in self._busy:
                _give_up(connection)

    async def close(self) -> None:
        """Let what is under way end, for a moment, and disconnect."""
        self._closing.set()
        if self._running:
            await asyncio.wait(set(self._running), timeout=CLOSING_LIMIT)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=CLOSING_LIMIT)
        pools, self._pools = self._pools or (), None
        for pool in pools:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(pool.close(), CLOSING_LIMIT)
            pool.terminate()

    async def run(
        self,
        operation: Operation[T],
        *,
        first: bool = False,
        single: bool = False,
        reads: bool = False,
        patience: float = 0.0,
        repeats: tuple[type[StorageError], ...] = (StorageUnavailable, StorageBusy),
        limit: float | None = None,
    ) -> T:
        """Run a function in a transaction, and return what it returned once that is committed (or ended: it `reads`).

        `first`: it is what events wait for: it has connections of its own and plans that are known to be good.
        `single`: each statement may be a transaction of its own, which saves two turns of the loop; the first may
        write, and others read. What is met of `repeats` (that the server cannot be reached, that another transaction
        was in the way) is tried again for `patience` seconds.

        Raises StorageError; CommitLost when the connection broke in the commit, or in a statement that is one.
        """
        if self._pools is None or self._closing.is_set():
            raise closed()
        attempt = partial(
            self._attempt, operation, first, single and not self._pooler, reads, limit or TRANSACTION_LIMIT
        )
        task = asyncio.get_running_loop().create_task(self._run(attempt, repeats, patience))
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, and not our caller
                raise StorageClosed("the storage was closed meanwhile: it may or may not have been written") from None
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone

    async def _run(
        self, run: Callable[[], Awaitable[T]], passing: tuple[type[StorageError], ...], patience: float
    ) -> T:
        began = time.monotonic()
        try:
            return await run()
        except passing as error:
            if not patience or isinstance(error, CommitLost):
                raise
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, passing) and not isinstance(error, CommitLost)),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(patience - (time.monotonic() - began)),
            sleep=self._pause,
            reraise=True,
        ):
            with attempt:
                return await run()
        raise AssertionError("unreachable")

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
            raise closed()

    async def _attempt(self, operation: Operation[T], first: bool, single: bool, reads: bool, limit: float) -> T:
        if self._pools is None:
            raise closed()
        pool = self._pools[first]
        try:
            async with asyncio.timeout(limit):
                try:
                    connection = await pool.acquire()
                except OSError:  # a certificate that does not verify is a ValueError, too
                    raise
                except ValueError as error:
                    raise _unreadable(error) from None
                pid = connection.get_server_pid()
                self._busy.add(pid)
                try:
                    if single:
                        return await self._statements(operation, connection)
                    return await self._transaction(operation, connection, first, reads)
                finally:
                    self._busy.discard(pid)
                    await _release(pool, connection)
        except self._foreign as error:
            if isinstance(error, TimeoutError):
                self.suspect()
            raise convert(error, self._where) from error

    async def _statements(self, operation: Operation[T], connection: Any) -> T:
        database = Database(connection, self._names)
        try:
            for name, value in self._settings().items():
                await connection.execute(f"SET {name} = {value}")
            answer = await operation(database)
        except BaseException as error:
            if not isinstance(getattr(error, "sqlstate", None), str) and not isinstance(error, HookwrightError):
                _give_up(connection)
            if database.done and isinstance(error, self._foreign):
                raise CommitLost("what was written stays, but what became of it could not be read") from error
            if not _rolled_back(error):
                self._lost(error)
            raise
        self.transactions += 1
        return answer

    def _lost(self, error: BaseException) -> None:
        """Raise CommitLost for an error that leaves open whether what was asked for has happened."""
        if isinstance(error, (TimeoutError, asyncio.CancelledError)):
            self.suspect()
        elif not isinstance(error, self._foreign) or not isinstance(convert(error), StorageUnavailable):
            return
        raise CommitLost("the connection broke in a commit: it may or may not have happened") from error

    async def _transaction(self, operation: Operation[T], connection: Any, first: bool, reads: bool) -> T:
        settings = self._settings()
        if self._pooler:
            settings = settings | SETTINGS | (_TUNED if first else {})
        begin = BEGIN + "".join(f"; SET LOCAL {name} = {value}" for name, value in settings.items())
        try:
            await connection.execute(begin, timeout=ANSWER_LIMIT)
            answer = await operation(Database(connection, self._names))
        except BaseException as error:
            await _roll_back(connection, error)
            raise
        try:
            await connection.execute("COMMIT")
        except BaseException as error:
            _give_up(connection)
            if reads and isinstance(error, self._foreign):
                return answer  # it was read, whatever becomes of the connection
            self._lost(error)
            raise
        self.transactions += 1
        return answer


def _unreadable(error: Exception) -> ConfigurationError:
    told = str(error).partition("\n")[0]
    if not isinstance(error, driver().ClientConfigurationError) or "URI" in told or "DSN" in told:
        told = type(error).__name__  # what it says may hold the password
    return ConfigurationError(f"the PostgreSQL address cannot be used: {told}")


def keep_alive(connection: Any) -> None:
    """Have the kernel ask whether the other side is still there: it has 14 s to say so."""
    transport = getattr(connection, "_transport", None)
    one = None if transport is None else transport.get_extra_info("socket")
    if one is None or one.family not in (socket.AF_INET, socket.AF_INET6):
        return
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not every system has each
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _give_up(connection: Any) -> None:
    """Close a connection at once; one that was lost is the pool's no more, and says so."""
    with contextlib.suppress(Exception):
        connection.terminate()


async def _release(pool: Any, connection: Any) -> None:
    """Give a connection back; whatever goes wrong with it then does not change what became of the transaction."""
    try:
        await pool.release(connection)
    except BaseException as error:
        _give_up(connection)
        if not isinstance(error, Exception):
            raise


async def _roll_back(connection: Any, error: BaseException) -> None:
    """End a transaction that failed; a connection on which that may not work is given up."""
    if isinstance(error, (HookwrightError, StorageError)) or isinstance(getattr(error, "sqlstate", None), str):
        try:
            if not connection.is_closed():
                await connection.execute("ROLLBACK")
                return
        except Exception:  # noqa: BLE001, S110  # then it is given up
            pass
        except BaseException:
            _give_up(connection)
            raise
    _give_up(connection)


def _rolled_back(error: BaseException) -> bool:
    """Whether the server says that the statement failed, and not that it ends the connection, maybe after it."""
    return getattr(error, "severity_en", None) == "ERROR"


async def _keep(connection: Any) -> None:
    """Leave a connection as it is between two transactions: all that these set is gone with them."""


def driver() -> Any:
    """Return asyncpg. Raises ConfigurationError when it is not installed."""
    try:
        import asyncpg
    except ImportError:
        raise ConfigurationError("PostgreSQL needs asyncpg: pip install 'hookwright[postgres]'") from None
    return asyncpg


def closed() -> StorageClosed:
    """The error for any use before `open` or after `close`."""
    return StorageClosed("the storage is not open, or not any more: use it between start() and aclose()")
