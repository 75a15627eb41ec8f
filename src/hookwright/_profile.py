"""Profile: how an endpoint is spoken to. Endpoints store the profile's name, so an edited one applies at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hookwright._envelope import Envelope, StandardEnvelope
from hookwright._errors import ConfigurationError
from hookwright._retry import RetryPolicy
from hookwright._signing import Signer, StandardWebhooks

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: `total` from DNS to the response's last byte, and within it `connect` (TCP and TLS) and `dns`.

    Raises ConfigurationError unless 0 < dns, connect <= total.
    """

    total: float = 15.0
    connect: float = 5.0
    dns: float = 3.0

    def __post_init__(self) -> None:
        if not (0 < self.connect <= self.total and 0 < self.dns <= self.total):
            raise ConfigurationError("Timeouts: dns and connect must be more than 0 seconds and at most total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Envelope, signers, retry policy and timeouts, under one name that endpoints refer to.

    ```python
    from hookwright import Profile, RetryPolicy, Timeouts

    patient = Profile(retry=RetryPolicy.schedule(0, 60, 300), timeouts=Timeouts(total=30.0))
    ```
    """

    envelope: Envelope = field(default_factory=StandardEnvelope)
    signers: Sequence[Signer] = field(default_factory=lambda: (StandardWebhooks(),))
    retry: RetryPolicy = field(default_factory=RetryPolicy.standard)
    timeouts: Timeouts = field(default_factory=Timeouts)
