"""Verbs of a storage behind the proxy, cut at one statement boundary after the other, on a scene that is put back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from hookwright._models import EndpointState
from hookwright.storage.postgres import PostgresStorage
from hookwright.testing._storage_contract_base import ManualClock, World
from tests.postgres.manual import ManualPostgresStorage
from tests.postgres.proxy import Action, Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from hookwright._models import Delivery, EndpointRow, Lease
    from tests.postgres.wire import Message

TABLES = {
    "meta": "*",
    "endpoint": "*",
    "event": "*",
    "delivery": "*",
    "lease": "endpoint_id, delivery_id, until, attempt_count",  # tokens are new each time
    "attempt": "*",
    "lane": "*",
    "wake": "endpoint_id, available_at",
}

STATEMENTS = ("Q", "E")
"""Messages at which a statement begins. Not its preparation, which changes nothing."""

_NOT_THE_VERBS = ("typeinfo_tree", "set_config('jit'", "SET manual.now")
"""What is in the driver's own questions about types, and in what tells a single statement the time."""


class Direct:
    """A connection past the proxy, for looking and for putting back."""

    def __init__(self, connection: asyncpg.Connection, schema: str) -> None:
        self.connection = connection
        self._schema = schema

    async def dump(self) -> dict[str, list[Any]]:
        """Return all that is stored."""
        found = {}
        for table, columns in TABLES.items():
            rows = await self.connection.fetch(f"SELECT {columns} FROM {self._schema}.{table}")
            found[table] = sorted((dict(row) for row in rows), key=repr)
        return found

    async def save(self) -> None:
        """Remember all that is stored."""
        for table in TABLES:
            await self.connection.execute(f"CREATE TEMP TABLE saved_{table} AS TABLE {self._schema}.{table}")

    async def restore(self) -> None:
        """Put it back."""
        # Not TRUNCATE, which leaves the catalogues full of old rows; those that were cut just now may hold locks.
        copies = "; ".join(
            f"DELETE FROM {self._schema}.{table};"
            f" INSERT INTO {self._schema}.{table} OVERRIDING SYSTEM VALUE TABLE saved_{table}"
            for table in TABLES
        )
        await self.connection.execute(f"BEGIN; {copies}; COMMIT")

    async def backends(self) -> int:
        """Return how many others are connected that work in the schema's pool."""
        count: int = await self.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return count


@asynccontextmanager
async def opened(dsn: str, schema: str) -> AsyncIterator[World]:
    """Open a storage, with the server's own time."""
    clock = ManualClock()
    storage = PostgresStorage(dsn, schema=schema)
    await storage.open(clock)
    try:
        yield World(storage, clock)
    finally:
        await storage.close()


class Scene(NamedTuple):
    """A storage behind a proxy, with something for every verb to act on."""

    world: World
    storage: PostgresStorage
    proxy: Proxy
    direct: Direct
    endpoint: EndpointRow
    disabled: EndpointRow
    one: Lease
    other: Lease
    waiting: Delivery
    failed: Delivery
    quiet_event: str


@asynccontextmanager
async def scene(dsn: str, schema: str) -> AsyncIterator[Scene]:
    """Build one: two endpoints and one that is disabled with rows to sweep, leases, and rows in several states."""
    clock = ManualClock()
    async with Proxy(dsn) as proxy:
        storage = ManualPostgresStorage(proxy.dsn, schema=schema)
        await storage.open(clock)
        connection = await asyncpg.connect(dsn)
        try:
            yield await _furnish(World(storage, clock), storage, proxy, Direct(connection, schema))
        finally:
            await storage.close()
            connection.terminate()


async def _furnish(world: World, storage: ManualPostgresStorage, proxy: Proxy, direct: Direct) -> Scene:
    first, second, disabled = [await storage.create_endpoint(world.new_endpoint()) for _ in range(3)]
    await storage.acquire()
    quiet = world.new_event()
    await world.enqueue(quiet)
    await world.emit(first.id, second.id)
    one, other = (await world.claim(2)).leases
    await world.emit(first.id, disabled.id)
    await world.emit(first.id, available_at=clock_of(world) + 10**12)
    [failed] = await world.emit(second.id, available_at=clock_of(world) + 10**12)
    await storage.cancel([failed])
    await storage.set_endpoint_state(disabled.id, EndpointState.DISABLED, reason="manual")
    world.pass_time(60_000_000)
    deliveries = {delivery.id: delivery for delivery in await world.deliveries()}
    waiting = next(each for each in deliveries.values() if each.next_attempt_at is not None)
    await direct.save()
    return Scene(world, storage, proxy, direct, first, disabled, one, other, waiting, deliveries[failed], quiet.id)


def clock_of(world: World) -> int:
    """Return the time."""
    return world.clock.now()


class Cut:
    """Strikes at the n-th statement from now on, on whatever connection but the one that listens; 0: at a login.

    `single`: the statement is a transaction of its own. `logins`: these count, too.
    """

    def __init__(
        self, proxy: Proxy, number: int, action: Action, *, single: bool = False, logins: bool = False
    ) -> None:
        self.listening = {message.connection for message in proxy.messages if "LISTEN" in message.sql}
        self._number = number
        self._action = action
        self._single = single
        self._logins = logins
        self.passed: list[Message] = []

    def __call__(self, message: Message) -> Action | None:
        if message.connection in self.listening or self.struck:
            return None
        if self._number == 0:
            counts = message.kind == "startup"
        else:
            # After a statement is as before the next one, but for the first and the last of a transaction.
            kinds = STATEMENTS if self._action is Action.CUT_BEFORE or self._single else ("Q",)
            kinds = ("startup", *kinds) if self._logins else kinds
            counts = message.kind in kinds and not any(text in message.sql for text in _NOT_THE_VERBS)
        if not counts:
            return None
        self.passed.append(message)
        return self._action if self.struck else None

    @property
    def struck(self) -> bool:
        """Whether it has."""
        return len(self.passed) >= max(1, self._number)

    def __repr__(self) -> str:
        return f"<{self._action.name} {self._number}: {self.passed[-1] if self.struck else None}>"


async def outcome(coroutine: Awaitable[Any], *errors: type[Exception]) -> Any:
    """Return what it returns, or the error that it raises."""
    try:
        return await coroutine
    except errors as error:
        return error


def idle(storage: PostgresStorage) -> bool:
    """Whether nothing is under way, and every connection of the pool is free."""
    assert storage._open is not None
    pools = storage._open.pool._pools
    assert pools is not None
    free = all(pool.get_idle_size() == pool.get_size() for pool in pools)
    return free and not storage._open.pool._running and not storage._writing


def tasks() -> set[str]:
    """Return the names of the tasks that there are, without the proxy's own and this one."""
    found = (task for task in asyncio.all_tasks() if task is not asyncio.current_task())
    return {task.get_name() for task in found if "Proxy" not in repr(task) and "_Link" not in repr(task)}


async def waiting(connection: asyncpg.Connection, table: str | None, count: int) -> bool:
    """Whether so many wait for a lock of a table, or (None) for what somebody holds of its rows."""
    which = "relation = $1::text::regclass"
    if table is None:  # the second waits for the first one's place in the line
        which = "$1::text IS NULL AND locktype IN ('tuple', 'transactionid')"
    found = await connection.fetchval(f"SELECT count(*) FROM pg_locks WHERE NOT granted AND {which}", table)
    return bool(found == count)
