"""What docs/postgres.md says that a role needs is enough for all that it does."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import pytest

from hookwright import Dispatcher, NewEvent, PostgresStorage, StorageError
from hookwright.testing import FakeTransport
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Iterator

ROLES = ("owner", "worker", "emitter")


@pytest.fixture
def roles(postgres_dsn: str) -> Iterator[dict[str, str]]:
    """The names of three roles that may nothing yet."""
    names = {role: f"test_{role}_{uuid.uuid4().hex[:8]}" for role in ROLES}
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        for name in names.values():
            connection.execute(f"CREATE ROLE {name}".encode())
        yield names
        for name in names.values():
            connection.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def database(roles: dict[str, str], postgres_database: str) -> str:
    """Where they may something: it is gone before they are."""
    return postgres_database


def _dispatcher(database: str, role: str) -> Dispatcher:
    storage = PostgresStorage(f"{database}{'&' if '?' in database else '?'}role={role}", schema="hooks")
    return Dispatcher(storage, transport=FakeTransport(), keys=[])


async def _live(dispatcher: Dispatcher) -> None:
    endpoint = await dispatcher.endpoints.create(URL, events=["*"])
    receipt = await dispatcher.emit("video.ready", idempotency_key="k")
    assert (await dispatcher.emit("video.ready", idempotency_key="k")).duplicate
    [many] = await dispatcher.emit_many([NewEvent("video.ready")])
    [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
    assert delivery.state == "succeeded"
    await dispatcher.deliveries.wait(many.event_id, timeout=10)
    await dispatcher.deliveries.replay(endpoint_id=endpoint.id)
    await dispatcher.endpoints.test(endpoint.id)
    await dispatcher.endpoints.pause(endpoint.id)
    waiting = await dispatcher.emit("video.ready")
    [delivery] = await dispatcher.deliveries.list(event_id=waiting.event_id)
    await dispatcher.deliveries.cancel(delivery.id)
    await dispatcher.endpoints.disable(endpoint.id)
    await dispatcher.endpoints.delete(endpoint.id)
    await dispatcher.events.expunge(receipt.event_id)
    storage = dispatcher._storage
    while await storage.sweep():
        pass
    await storage.prune(2**62)
    assert (await dispatcher.health()).problems == ()


@pytest.mark.parametrize("made", ["a schema made beforehand", "by itself"])
async def test_a_role_needs_no_more_than_is_said(database: str, roles: dict[str, str], made: str) -> None:
    admin = await asyncpg.connect(database)
    owner, worker, emitter = (roles[role] for role in ROLES)
    try:
        await admin.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        with pytest.raises(StorageError, match="GRANT CREATE ON DATABASE to make the schema"):
            await _dispatcher(database, owner).start()
        if made == "by itself":
            await admin.execute(f"GRANT CREATE ON DATABASE {database.partition('?')[0].rpartition('/')[2]} TO {owner}")
        else:
            await admin.execute(f"CREATE SCHEMA hooks; GRANT USAGE, CREATE ON SCHEMA hooks TO {owner}")
        async with _dispatcher(database, owner) as dispatcher:
            await _live(dispatcher)
            await dispatcher._storage.scrub_endpoints()

        with pytest.raises(StorageError, match="USAGE ON SCHEMA and SELECT, INSERT, UPDATE, DELETE ON its tables"):
            await _dispatcher(database, worker).start()
        await admin.execute(
            f"GRANT USAGE ON SCHEMA hooks TO {worker};"
            f" GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA hooks TO {worker};"
            f" GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA hooks TO {worker}"
        )
        async with _dispatcher(database, worker) as dispatcher:
            await _live(dispatcher)
            with pytest.raises(StorageError, match="42501"):
                await dispatcher._storage.scrub_endpoints()

            await admin.execute(
                f"GRANT USAGE ON SCHEMA hooks TO {emitter};"
                f" GRANT SELECT ON hooks.meta, hooks.event TO {emitter};"
                f" GRANT INSERT ON hooks.event, hooks.delivery, hooks.wake TO {emitter};"
                f" GRANT EXECUTE ON FUNCTION hooks.clock, hooks.emit_1 TO {emitter}"
            )
            await dispatcher.endpoints.create(URL, events=["*"])
            await admin.execute(f"SET ROLE {emitter}")
            for isolation in ("read_committed", "serializable"):
                async with admin.transaction(isolation=isolation):
                    key: dict[str, Any] = {"idempotency_key": isolation, "connection": admin}
                    one = await dispatcher.emit("video.ready", **key)
                    assert (await dispatcher.emit("video.ready", **key)).duplicate
                    [two] = await dispatcher.emit_many([NewEvent("video.ready")], connection=admin)
                for receipt in (one, two):
                    [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
                    assert delivery.state == "succeeded"
    finally:
        await admin.close()
