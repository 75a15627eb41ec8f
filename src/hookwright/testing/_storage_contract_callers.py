"""The part of the storage contract about transactions of the application's own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from hookwright._errors import ConflictError, NotFound, StaleEndpoints, ValidationFailed
from hookwright._models import Emission, Receipt
from hookwright.storage._connections import CallersConnection, adapted
from hookwright.testing._storage_contract_base import ContractBase

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from hookwright.storage._base import Storage


class _Foreign(CallersConnection):
    """Leads to a database of a kind that no storage is."""

    kind = "foreign"  # type: ignore[assignment]  # that is the point
    driver = None
    in_transaction = True
    commits_alone = False

    async def fetch(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[Sequence[Any]]:
        raise AssertionError("it was written through")


class _RolledBackError(Exception):
    """Ends a transaction of the application's without a commit."""


class ForeignConnectionContract(ContractBase):
    """`connection=` that does not lead to the storage."""

    async def test_a_connection_that_does_not_lead_to_the_storage_is_refused(self) -> None:
        async with self.opened() as world:
            event, revision = world.new_event(), await world.revision()
            with pytest.raises(ValidationFailed, match="connection"):
                await world.storage.enqueue(event, [], endpoints_revision=revision, connection=_Foreign())
            with pytest.raises(ValidationFailed, match="connection"):
                await world.storage.enqueue_many(
                    [Emission(event, [])], endpoints_revision=revision, connection=_Foreign()
                )
            with pytest.raises(NotFound):
                await world.storage.get_event(event.id)


class CallersContract(ContractBase):
    """`connection=` that leads to the storage: mixed in beside StorageContract where a connection can.

    ```python
    class TestMyStorage(CallersContract, StorageContract): ...
    ```
    """

    def callers_transaction(self, storage: Storage) -> AbstractAsyncContextManager[Any]:
        """Return what yields a connection in a transaction of its own, to the database of an open storage.

        Left normally it commits, left by an exception it rolls back. The connection is of a kind that
        `emit(connection=)` accepts. Without it the tests raise NotImplementedError.
        """
        raise NotImplementedError(
            f"define callers_transaction(storage) in {type(self).__name__}: an async context manager that yields a"
            " connection in a transaction to the storage's database; without such connections leave CallersContract out"
        )

    async def test_what_is_enqueued_in_a_transaction_is_there_when_it_has_committed(self) -> None:
        async with self.opened() as world:
            endpoint = await world.endpoint()
            event, row, revision = world.new_event(), world.new_delivery(endpoint), await world.revision()
            async with self.callers_transaction(world.storage) as connection:
                receipt = await world.storage.enqueue(
                    event, [row], endpoints_revision=revision, connection=await adapted(connection)
                )
                assert (receipt.event_id, receipt.delivery_count, receipt.duplicate) == (event.id, 1, False)
                with pytest.raises(NotFound):
                    await world.storage.get_event(event.id)
            assert (await world.storage.get_event(event.id)).id == event.id
            assert [lease.delivery_id for lease in (await world.claim()).leases] == [row.id]

    async def test_what_is_enqueued_in_a_transaction_is_gone_when_it_is_rolled_back(self) -> None:
        async with self.opened() as world:
            endpoint, revision = await world.endpoint(), await world.revision()
            event = world.new_event(idempotency_key="k")
            with suppress(_RolledBackError):
                async with self.callers_transaction(world.storage) as connection:
                    callers = await adapted(connection)
                    row = world.new_delivery(endpoint)
                    await world.storage.enqueue(event, [row], endpoints_revision=revision, connection=callers)
                    raise _RolledBackError
            with pytest.raises(NotFound):
                await world.storage.get_event(event.id)
            assert (await world.claim()).leases == []
            later = world.new_event(idempotency_key="k", digest=b"other")
            assert not (await world.enqueue(later)).duplicate

    async def test_what_is_refused_leaves_the_transaction_as_it_was(self) -> None:
        async with self.opened() as world:
            endpoint, revision = await world.endpoint(), await world.revision()
            first, last = world.new_event(idempotency_key="k"), world.new_event()
            refused = world.new_event(idempotency_key="k", digest=b"other")
            async with self.callers_transaction(world.storage) as connection:
                callers = await adapted(connection)

                async def enqueue(event: Any, revision: int = revision) -> Receipt:
                    row = world.new_delivery(endpoint)
                    return await world.storage.enqueue(event, [row], endpoints_revision=revision, connection=callers)

                await enqueue(first)
                with pytest.raises(ConflictError):
                    await enqueue(refused)
                with pytest.raises(StaleEndpoints):
                    await enqueue(world.new_event(), revision - 1)
                again = await enqueue(first._replace(id=world.new_id("evt")))
                assert (again.event_id, again.delivery_count, again.duplicate) == (first.id, 1, True)
                await enqueue(last)
            for event in (first, last):
                assert (await world.storage.get_event(event.id)).id == event.id
            with pytest.raises(NotFound):
                await world.storage.get_event(refused.id)

    async def test_several_events_are_in_the_transaction_or_none(self) -> None:
        async with self.opened() as world:
            endpoint, revision = await world.endpoint(), await world.revision()
            used = world.new_event(idempotency_key="k")
            await world.enqueue(used)
            kept = [Emission(world.new_event(), [world.new_delivery(endpoint)]) for _ in range(3)]
            conflict = Emission(world.new_event(idempotency_key="k", digest=b"other"), [])
            missing = Emission(world.new_event(), [world.new_delivery(endpoint)])
            async with self.callers_transaction(world.storage) as connection:
                callers = await adapted(connection)
                with pytest.raises(ConflictError):
                    await world.storage.enqueue_many(
                        [missing, conflict], endpoints_revision=revision, connection=callers
                    )
                receipts = await world.storage.enqueue_many(kept, endpoints_revision=revision, connection=callers)
                assert [receipt.event_id for receipt in receipts] == [emission.event.id for emission in kept]
            for emission in kept:
                assert (await world.storage.get_event(emission.event.id)).id == emission.event.id
            with pytest.raises(NotFound):
                await world.storage.get_event(missing.event.id)
