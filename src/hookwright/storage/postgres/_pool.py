"""Connections, and transactions on them: each verb is one, in a task of its own, with an end in time.

Cancelling a caller never cancels SQL. A connection that does not answer is given up, and what was asked of it is
repeated where that is safe: a transaction that was not committed has left nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from hookwright._errors import (
    ConfigurationError,
    HookwrightError,
    StorageBusy,
    StorageClosed,
    StorageError,
    StorageUnavailable,
)
from hookwright.storage.postgres._convert import convert
from hookwright.storage.postgres._database import Database

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import asyncpg

    from hookwright.storage.postgres._database import Names

    Operation = Callable[[Database], Awaitable["T"]]

T = TypeVar("T")

CONNECT_LIMIT = 5.0
"""Seconds that a connection may take to be made."""

TRANSACTION_LIMIT = 12.0
"""Seconds after which a transaction is given up, with its connection: half-open ones answer never."""

PATIENCE = 10.0
"""Seconds for which a verb is repeated while the server cannot be reached."""

CLOSING_LIMIT = 0.3
"""Seconds that transactions under way have left when the storage is closed."""

FIRST_CONNECTIONS = 3
"""Connections that only emit, claim and settle use, so that nobody's history holds them up."""

SETTINGS = {
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


class CommitLost(StorageUnavailable):
    """The connection broke in the commit: the transaction may have happened."""


class Pool:
    """Up to `size` connections to one database. `pooler`: another pool is in between, which keeps no settings."""

    def __init__(self, dsn: str, names: Names, *, size: int, pooler: bool, begin: Callable[[], str]) -> None:
        self._dsn = dsn
        self._names = names
        self._size = size
        self._pooler = pooler
        self._begin = begin
        self._pools: tuple[asyncpg.Pool[Any], asyncpg.Pool[Any]] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        self._foreign: tuple[type[Exception], ...] = ()
        self.pids: set[int] = set()
        self.transactions = 0

    async def open(self) -> None:
        """Make ready to connect; nothing is asked of the server yet. Raises ConfigurationError."""
        asyncpg = driver()
        self._foreign = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
        try:
            side = await self._create(self._size - FIRST_CONNECTIONS, SETTINGS)
            self._pools = side, await self._create(FIRST_CONNECTIONS, SETTINGS | _TUNED)
        except (ValueError, asyncpg.InterfaceError, asyncpg.ClientConfigurationError) as error:
            raise ConfigurationError(f"the PostgreSQL address cannot be read: {type(error).__name__}") from None

    async def _create(self, size: int, settings: Mapping[str, str]) -> asyncpg.Pool[Any]:
        return await driver().create_pool(  # type: ignore[no-any-return]  # the driver is not imported before it is used
            self._dsn,
            min_size=0,
            max_size=size,
            timeout=CONNECT_LIMIT,
            statement_cache_size=0 if self._pooler else 256,
            max_cached_statement_lifetime=0,
            max_inactive_connection_lifetime=300.0,
            server_settings=None if self._pooler else dict(settings),
            init=self._note,
            reset=_keep,
        )

    async def _note(self, connection: Any) -> None:
        pid = connection.get_server_pid()
        self.pids.add(pid)
        connection.add_termination_listener(lambda _: self.pids.discard(pid))

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
        durable: bool = True,
        patience: float = 0.0,
        lock_limit: int | None = None,
    ) -> T:
        """Run a function in a transaction, and return what it returned once that is committed.

        `first`: it is what events wait for: it has connections of its own and plans that are known to be good. While
        the server cannot be reached it is repeated for `patience` seconds, and so it is when another transaction was in
        the way, unless `lock_limit` (milliseconds) says how long it may wait for one. `durable=False`: a crash of the
        server may forget it. Raises StorageError; CommitLost when the connection broke in the commit.
        """
        if self._pools is None or self._closing.is_set():
            raise closed()
        task = asyncio.get_running_loop().create_task(self._run(operation, first, durable, patience, lock_limit))
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
        self, operation: Operation[T], first: bool, durable: bool, patience: float, lock_limit: int | None
    ) -> T:
        begin = self._begin()
        if self._pooler:
            settings = SETTINGS | _TUNED if first else SETTINGS
            begin += "".join(f"; SET LOCAL {name} = {value}" for name, value in settings.items())
        if not durable:
            begin += "; SET LOCAL synchronous_commit = off"
        if lock_limit is not None:
            begin += f"; SET LOCAL lock_timeout = {lock_limit}"

        def repeatable(error: BaseException) -> bool:
            if isinstance(error, StorageBusy):
                return lock_limit is None
            return isinstance(error, StorageUnavailable) and not isinstance(error, CommitLost)

        try:
            return await self._attempt(operation, begin, first)
        except StorageError as error:
            if not patience or not repeatable(error):
                raise
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(repeatable),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(patience),
            sleep=self._pause,
            reraise=True,
        ):
            with attempt:
                return await self._attempt(operation, begin, first)
        raise AssertionError("it has returned or raised")

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
            raise closed()

    async def _attempt(self, operation: Operation[T], begin: str, first: bool) -> T:
        try:
            async with asyncio.timeout(TRANSACTION_LIMIT):
                return await self._transaction(operation, begin, first)
        except self._foreign as error:
            raise convert(error) from error

    async def _transaction(self, operation: Operation[T], begin: str, first: bool) -> T:
        if self._pools is None:
            raise closed()
        pool = self._pools[first]
        connection = await pool.acquire()
        try:
            try:
                await connection.execute(begin)
                answer = await operation(Database(connection, self._names))
            except BaseException as error:
                await _roll_back(connection, error)
                raise
            try:
                await connection.execute("COMMIT")
            except BaseException as error:
                _give_up(connection)
                if not isinstance(error, self._foreign) or isinstance(convert(error), StorageUnavailable):
                    raise CommitLost(
                        "the connection to PostgreSQL broke in a commit: it may or may not be done"
                    ) from error
                raise
            self.transactions += 1
            return answer
        finally:
            await _release(pool, connection)


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
