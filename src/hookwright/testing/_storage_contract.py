"""StorageContract: every promise of `storage/_base.py` as a test, for any backend."""

from __future__ import annotations

from hookwright.testing._storage_contract_callers import CallersContract, ForeignConnectionContract
from hookwright.testing._storage_contract_cancel import CancellationContract, NeighbourContract
from hookwright.testing._storage_contract_endpoints import EndpointContract, SweepContract
from hookwright.testing._storage_contract_fence import FenceContract
from hookwright.testing._storage_contract_hands import (
    ExpungeContract,
    HealthContract,
    ManyContract,
    MonitoringContract,
    RateContract,
    RequeueContract,
    TestingContract,
)
from hookwright.testing._storage_contract_history import HistoryContract, LifeContract
from hookwright.testing._storage_contract_lanes import NextDueContract, RoomContract, SetBackContract, TurnContract
from hookwright.testing._storage_contract_law import LaneLawContract
from hookwright.testing._storage_contract_outbox import EnqueueContract, ReleaseContract, SettleContract

__all__ = ["CallersContract", "StorageContract"]


class StorageContract(
    EnqueueContract,
    ForeignConnectionContract,
    SettleContract,
    FenceContract,
    ReleaseContract,
    RoomContract,
    SetBackContract,
    TurnContract,
    NextDueContract,
    LaneLawContract,
    EndpointContract,
    SweepContract,
    HistoryContract,
    LifeContract,
    CancellationContract,
    NeighbourContract,
    ManyContract,
    RequeueContract,
    ExpungeContract,
    TestingContract,
    HealthContract,
    RateContract,
    MonitoringContract,
):
    """What a storage must do to be one: subclass it in a test module, and say how to make yours.

    Needs pytest, pytest-asyncio in auto mode, and Hypothesis. `make_storage` returns a new, empty storage that is not
    open; it may be called several times in a test. A durable storage also says what the next process would use:
    `reopen` returns another object on the same rows. A storage that loses everything with its object keeps the
    default, which is the same object again. Where a connection of an application's can reach the storage's database,
    put `CallersContract` beside it. Time is set by hand and begins in 2026; nothing sleeps.

    ```python
    from hookwright import MemoryStorage
    from hookwright.testing import StorageContract


    class TestMemoryStorage(StorageContract):
        async def make_storage(self) -> MemoryStorage:
            return MemoryStorage()
    ```
    """
