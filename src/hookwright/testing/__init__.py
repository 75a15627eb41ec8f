"""For tests: a transport that answers by a script, a real receiver, a virtual clock, and the contracts."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from hookwright.testing._clock import VirtualClock
from hookwright.testing._inbox import Inbox, Received
from hookwright.testing._transport import FakeTransport

if TYPE_CHECKING:
    # Not in __all__: `from hookwright.testing import *` must not need what the contracts need.
    from hookwright.testing._storage_contract import CallersContract as CallersContract
    from hookwright.testing._storage_contract import StorageContract as StorageContract
    from hookwright.testing._transport_contract import TransportContract as TransportContract

__all__ = ["FakeTransport", "Inbox", "Received", "VirtualClock"]

_STORAGE_PARTS = ("base", "callers", "cancel", "endpoints", "fence", "hands", "history", "lanes", "law", "outbox")
_TRANSPORT_PARTS = ("addresses", "base", "endings", "floods", "framing", "pools", "targets", "tls", "watch")
_CONTRACTS = {
    "CallersContract": ("hookwright.testing._storage_contract", _STORAGE_PARTS),
    "StorageContract": ("hookwright.testing._storage_contract", _STORAGE_PARTS),
    "TransportContract": ("hookwright.testing._transport_contract", _TRANSPORT_PARTS),
}


def __getattr__(name: str) -> Any:
    # On demand: the contracts need pytest, Hypothesis and trustme, and everything else here must work without them.
    if name not in _CONTRACTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, parts = _CONTRACTS[name]
    pytest = importlib.import_module("pytest")
    unread = (f"{module}_{part}" for part in parts if f"{module}_{part}" not in sys.modules)
    pytest.register_assert_rewrite(*unread)
    return getattr(importlib.import_module(module), name)
