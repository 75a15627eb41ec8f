"""Signer: secrets + id + time + bytes -> headers."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Protocol

from hookwright._errors import ValidationFailed
from hookwright._secret import Secret, standard_webhooks_hmac, standard_webhooks_key

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
        prefix = b"%b.%d." % (event_id.encode(), timestamp)
        return {
            "webhook-id": event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join([_signature(secret, prefix, body) for secret in secrets]),
        }


def _signature(secret: Secret, prefix: bytes, body: bytes) -> str:
    mac = standard_webhooks_hmac(secret)
    mac.update(prefix)
    mac.update(body)
    return "v1," + base64.b64encode(mac.digest()).decode()
