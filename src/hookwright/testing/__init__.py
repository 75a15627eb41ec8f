"""For tests: a transport that answers by a script, a real receiver, a virtual clock, and the storage contract."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hookwright.testing._clock import VirtualClock
from hookwright.testing._inbox import Inbox, Received
from hookwright.testing._transport import FakeTransport

if TYPE_CHECKING:
    # Not in __all__: `from hookwright.testing import *` must not need what the contract needs.
    from hookwright.testing._storage_contract import StorageContract as StorageContract

__all__ = ["FakeTransport", "Inbox", "Received", "VirtualClock"]

_CONTRACT = "hookwright.testing._storage_contract"
_PARTS = ("base", "cancel", "endpoints", "hands", "history", "lanes", "law", "outbox")


def __getattr__(name: str) -> Any:
    # On demand: the contract needs pytest and Hypothesis, and everything else here must work without them.
    if name != "StorageContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pytest = importlib.import_module("pytest")
    pytest.register_assert_rewrite(*(f"{_CONTRACT}_{part}" for part in _PARTS))
    return importlib.import_module(_CONTRACT).StorageContract
