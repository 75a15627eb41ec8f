"""Where it all lives: the contract, and all that a storage of your own is handed and answers with.

Subclass `Storage`, and put it through `hookwright.testing.StorageContract`. Rows of the outbox are tuples and frozen
dataclasses; times in them are microseconds UTC.
"""

from hookwright._health import Change, EndpointHealth, HealthPolicy
from hookwright._models import (
    AttemptRecord,
    Claim,
    Emission,
    EndpointRow,
    EventRow,
    Key,
    Lease,
    NewDelivery,
    Outcome,
    Settled,
)
from hookwright.storage._base import (
    DEFAULT_HEALTH,
    FREE_INTERRUPTIONS,
    Backlog,
    Changes,
    ClaimRequest,
    DeliveryFilter,
    Expunged,
    Storage,
)
from hookwright.storage._connections import CallersConnection

__all__ = [
    "DEFAULT_HEALTH",
    "FREE_INTERRUPTIONS",
    "AttemptRecord",
    "Backlog",
    "CallersConnection",
    "Change",
    "Changes",
    "Claim",
    "ClaimRequest",
    "DeliveryFilter",
    "Emission",
    "EndpointHealth",
    "EndpointRow",
    "EventRow",
    "Expunged",
    "HealthPolicy",
    "Key",
    "Lease",
    "NewDelivery",
    "Outcome",
    "Settled",
    "Storage",
]
