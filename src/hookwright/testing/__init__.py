"""For tests: a transport that answers by a script, a real receiver, a virtual clock, and the storage contract."""

from hookwright.testing._clock import VirtualClock
from hookwright.testing._inbox import Inbox, Received
from hookwright.testing._transport import FakeTransport

__all__ = ["FakeTransport", "Inbox", "Received", "VirtualClock"]
