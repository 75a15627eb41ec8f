"""A connection of its own that hears of other processes' work, and that shows that this process is alive.

A notification is a hint: whoever misses one looks by himself a little later. The connection is asked every few seconds
whether it still answers, so that one that is half-open is noticed, and is made again for as long as that takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from hookwright._errors import StorageUnavailable
from hookwright.storage.postgres._convert import convert
from hookwright.storage.postgres._pool import CLOSING_LIMIT, CONNECT_LIMIT, driver, keep_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hookwright.storage.postgres._database import Database
    from hookwright.storage.postgres._dsn import Address

_logger = logging.getLogger("hookwright")

PING_INTERVAL = 5.0
"""Seconds between two questions whether the connection still answers."""

PING_LIMIT = 5.0
"""Seconds that an answer may take: one that is half-open is noticed within 10."""

LISTENING = 1_752_134_519
"""The first number of the advisory lock that all who listen share ("hook"); the second is the channel's."""

_OTHERS = """
SELECT EXISTS (
    SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = $1::int
    AND objid = hashtext($2)::oid AND pid <> $3::int
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""

RECONNECT_MOST = 1.0
"""Seconds between two attempts to connect again, at most; each is drawn at random below a bound that doubles.

Delivering goes on when one of them succeeds, so that it is not longer.
"""

_KEEP_ALIVE = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 3; SET tcp_keepalives_count = 3"
"""So that the server notices, too, when this process is gone without a word: its locks say that it is alive."""


class Listener:
    """Listens for as long as it is open. `heard` is set by each notification, and when it listens again after a gap.

    `on_silence` is called when the server did not answer.
    """

    def __init__(
        self, address: Address, channel: str, owner: int, own: Collection[int], on_silence: Callable[[], None]
    ) -> None:
        self._where, self._dsn = address
        self._channel = channel
        self._owner = owner
        self._own = own
        self._on_silence = on_silence
        self._connection: Any = None
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self.heard = asyncio.Event()

    async def open(self) -> None:
        """Connect, listen, and show that this process is alive. Raises StorageError."""
        try:
            await self._connect()
        except Exception as error:
            raise convert(error, self._where) from error
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="hookwright-postgres-listener")

    async def alone(self, database: Database) -> bool:
        """Say whether no other process listens, and so may deliver."""
        pid = -1 if self._connection is None else self._connection.get_server_pid()
        return not await database.value(_OTHERS, LISTENING, self._channel, pid)

    async def close(self) -> None:
        """Say that this process delivers no more, and disconnect."""
        if self._connection is not None:
            # The server may see the end of a connection late, and others wait for leases of whoever seems alive.
            with contextlib.suppress(Exception):
                await self._connection.execute("SELECT pg_advisory_unlock_all()", timeout=CLOSING_LIMIT)
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._terminate()

    async def _connect(self) -> None:
        asyncpg = driver()
        connection = self._connection = await asyncpg.connect(
            self._dsn, timeout=CONNECT_LIMIT, command_timeout=PING_LIMIT, statement_cache_size=0
        )
        keep_alive(connection)
        quoted, literal = self._channel.replace('"', '""'), self._channel.replace("'", "''")
        # Its own work a process knows of; what it hears from its pool's connections is that.
        self._lost.clear()
        connection.add_termination_listener(lambda _: self._lost.set())
        await connection.add_listener(self._channel, self._hear)
        await connection.execute(
            f'{_KEEP_ALIVE}; LISTEN "{quoted}"; SELECT pg_advisory_lock_shared({self._owner});'
            f" SELECT pg_advisory_lock_shared({LISTENING}, hashtext('{literal}'))"
        )

    def _hear(self, _connection: object, pid: int, _channel: str, _payload: object) -> None:
        if pid not in self._own:
            self.heard.set()

    async def _watch(self) -> None:
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), PING_INTERVAL)
                try:
                    await self._connection.execute("SELECT 1")
                except Exception as error:  # noqa: BLE001  # whatever it is: it is made again
                    self._terminate()
                    if isinstance(error, TimeoutError):
                        self._on_silence()
                    lost = convert(error, self._where)
                    _logger.warning("the connection that listens to PostgreSQL was lost: %s", lost)
                    await self._reconnect()
        finally:
            self._terminate()

    async def _reconnect(self) -> None:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(StorageUnavailable),
            wait=wait_random_exponential(multiplier=0.1, max=RECONNECT_MOST),
            reraise=True,
        ):
            with attempt:
                try:
                    await self._connect()
                except Exception as error:
                    self._terminate()
                    raise StorageUnavailable(str(convert(error, self._where))) from error
        self.heard.set()  # nobody knows what was said meanwhile
        _logger.warning("listening to PostgreSQL again")

    def _terminate(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.terminate()
