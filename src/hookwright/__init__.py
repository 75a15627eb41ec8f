"""hookwright: an embeddable, durable webhook dispatcher for asyncio applications.

Start with `Dispatcher`, on SQLite (the default) or PostgreSQL. Receivers verify with `hookwright.receiver`; tests use
`hookwright.testing`.
"""

from hookwright._addresses import NetworkPolicy
from hookwright._catalogue import Catalogue
from hookwright._certificate import ClientCertificate
from hookwright._clock import Clock
from hookwright._deliveries import Deliveries
from hookwright._dispatcher import Dispatcher
from hookwright._endpoints import Endpoints
from hookwright._envelope import CloudEventsEnvelope, Content, Envelope, EventEnvelope, FlatEnvelope, StandardEnvelope
from hookwright._errors import (
    CommitLost,
    CommitUnknown,
    ConfigurationError,
    ConflictError,
    HookwrightError,
    NotFound,
    SchemaTooNew,
    StaleEndpoints,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageUnavailable,
    ValidationFailed,
    WaitTimeout,
)
from hookwright._events import Events
from hookwright._explain import Explanation, Match, Mismatch
from hookwright._models import (
    ALL_TENANTS,
    Attempt,
    Delivery,
    DeliveryState,
    Endpoint,
    EndpointState,
    EndpointStats,
    Event,
    Health,
    LastDelivery,
    Page,
    Payload,
    Receipt,
)
from hookwright._observe import (
    AttemptFailed,
    AttemptStarted,
    DeliveryCancelled,
    DeliveryFailed,
    DeliveryObservation,
    DeliveryRetrying,
    DeliverySucceeded,
    EndpointDisabled,
    EndpointFailing,
    EndpointRecovered,
    EventEmitted,
    LeaseLost,
    Observation,
    Subscription,
    WorkerFailed,
)
from hookwright._profile import Profile, Timeouts
from hookwright._retry import DeliveryError, RetryPolicy
from hookwright._secret import Secret
from hookwright._signing import Ed25519Webhooks, HexSignature, Signer, StandardWebhooks
from hookwright._snapshot import NewEvent
from hookwright._vault import EncryptionKey
from hookwright._version import __version__
from hookwright.receiver import VerificationFailed
from hookwright.storage._base import Storage
from hookwright.storage.memory import MemoryStorage
from hookwright.storage.postgres import PostgresStorage
from hookwright.storage.sqlite import SQLiteStorage
from hookwright.transport._base import Failure, Request, Response, Transport
from hookwright.transport._resolver import Resolver, SystemResolver
from hookwright.transport.direct import DirectTransport
from hookwright.transport.httpx import HttpxTransport

__all__ = [
    "ALL_TENANTS",
    "Attempt",
    "AttemptFailed",
    "AttemptStarted",
    "Catalogue",
    "ClientCertificate",
    "Clock",
    "CloudEventsEnvelope",
    "CommitLost",
    "CommitUnknown",
    "ConfigurationError",
    "ConflictError",
    "Content",
    "Deliveries",
    "Delivery",
    "DeliveryCancelled",
    "DeliveryError",
    "DeliveryFailed",
    "DeliveryObservation",
    "DeliveryRetrying",
    "DeliveryState",
    "DeliverySucceeded",
    "DirectTransport",
    "Dispatcher",
    "Ed25519Webhooks",
    "EncryptionKey",
    "Endpoint",
    "EndpointDisabled",
    "EndpointFailing",
    "EndpointRecovered",
    "EndpointState",
    "EndpointStats",
    "Endpoints",
    "Envelope",
    "Event",
    "EventEmitted",
    "EventEnvelope",
    "Events",
    "Explanation",
    "Failure",
    "FlatEnvelope",
    "Health",
    "HexSignature",
    "HookwrightError",
    "HttpxTransport",
    "LastDelivery",
    "LeaseLost",
    "Match",
    "MemoryStorage",
    "Mismatch",
    "NetworkPolicy",
    "NewEvent",
    "NotFound",
    "Observation",
    "Page",
    "Payload",
    "PostgresStorage",
    "Profile",
    "Receipt",
    "Request",
    "Resolver",
    "Response",
    "RetryPolicy",
    "SQLiteStorage",
    "SchemaTooNew",
    "Secret",
    "Signer",
    "StaleEndpoints",
    "StandardEnvelope",
    "StandardWebhooks",
    "Storage",
    "StorageBusy",
    "StorageClosed",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "Subscription",
    "SystemResolver",
    "Timeouts",
    "Transport",
    "ValidationFailed",
    "VerificationFailed",
    "WaitTimeout",
    "WorkerFailed",
    "__version__",
]
