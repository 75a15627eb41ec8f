"""Signer: secrets + id + time + bytes -> headers."""

from __future__ import annotations

import base64
import hmac
from typing import TYPE_CHECKING, Protocol

from hookwright._errors import ValidationFailed
from hookwright._secret import Secret, standard_webhooks_key

if TYPE_CHECKING:
    from collections.abc import Sequence


class Signer(Protocol):
    """Signs one attempt."""

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed when the secret cannot be used by this signer."""
        ...

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the headers that authenticate the body."""
        ...


class StandardWebhooks:
    """Standard Webhooks 1.0.0, `v1`: HMAC-SHA256 over `{id}.{timestamp}.{body}`."""

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed unless it is `whsec_` and base64 of 24 to 64 bytes."""
        standard_webhooks_key(secret)

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the three `webhook-*` headers."""
        if "." in event_id:
            raise ValidationFailed("event_id", "must hold no dot: it is joined with dots in what is signed")
        content = b"%b.%d.%b" % (event_id.encode(), timestamp, body)
        tokens = [
            "v1," + base64.b64encode(hmac.digest(standard_webhooks_key(secret), content, "sha256")).decode()
            for secret in secrets
        ]
        return {
            "webhook-id": event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(tokens),
        }
