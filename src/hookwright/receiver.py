"""For those who receive webhooks: `Verifier` says whether a request is authentic.

This file needs nothing but Python: copy it into a receiver that does not install hookwright.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class VerificationFailed(Exception):
    """The request is not authentic, or too old: answer 401 and do nothing. The message holds no secret."""


class Revealing(Protocol):
    """A `hookwright.Secret`, or anything else that reveals a text."""

    def reveal(self) -> str:
        """Return the text."""
        ...


@dataclass(frozen=True)
class Verified:
    """An authentic webhook. `id` is the same on every attempt: use it to recognise what you have handled already."""

    id: str
    timestamp: datetime
    payload: Any
    body: bytes


class Verifier:
    """Verifies Standard Webhooks 1.0.0 signatures (`v1`, HMAC-SHA256).

    Give the endpoint's `whsec_...` secrets, several during a rotation: one of them must fit one of the signatures.
    `tolerance` is how many seconds a timestamp may differ from `now` (default `time.time`), in both directions.

    Raises ValueError for a secret that is none.

    ```python
    from hookwright import Secret, StandardWebhooks
    from hookwright.receiver import VerificationFailed, Verifier

    secret = Secret.generate()
    body = b'{"type":"ping","timestamp":"2026-01-01T00:00:00.000Z","data":null}'
    headers = StandardWebhooks().sign(event_id="evt_1", timestamp=1767225600, body=body, secrets=[secret])

    verifier = Verifier(secret.reveal(), now=lambda: 1767225600.0)
    print(verifier.verify(body, headers).id)
    try:
        verifier.verify(body + b" ", headers)
    except VerificationFailed as error:
        print(error)
    ```
    """

    def __init__(
        self,
        *secrets: str | Revealing,
        tolerance: float = 300.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        if not secrets:
            raise ValueError("give at least one secret")
        if not tolerance >= 0:
            raise ValueError("tolerance must be 0 or more seconds")
        self._keys = [_key(secret if isinstance(secret, str) else secret.reveal()) for secret in secrets]
        self._tolerance = tolerance
        self._now = now

    def verify(self, body: bytes, headers: Mapping[Any, Any]) -> Verified:
        """Return the webhook, or raise VerificationFailed, whatever the bytes are.

        `body` is the raw body as it came: JSON that was parsed and encoded again has other bytes. Header names may
        have any case; names and values may be text or bytes.
        """
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise VerificationFailed("the body must be the raw bytes")
        body = bytes(body)
        id, sent, signatures = (_header(headers, name) for name in ("id", "timestamp", "signature"))
        timestamp = self._check_time(sent)
        if not self._signed(b"%b.%b.%b" % (id.encode(), sent.encode(), body), signatures):
            raise VerificationFailed("no signature fits")
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            raise VerificationFailed("the body is no JSON") from None
        return Verified(id, datetime.fromtimestamp(timestamp, timezone.utc), payload, body)  # noqa: UP017  # runs on older Pythons

    def _check_time(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 12):  # until the year 33658
            raise VerificationFailed("webhook-timestamp is no number of seconds")
        difference = self._now() - int(text)
        if abs(difference) > self._tolerance:
            raise VerificationFailed("the timestamp is too old" if difference > 0 else "the timestamp is in the future")
        return int(text)

    def _signed(self, content: bytes, signatures: str) -> bool:
        expected = [hmac.digest(key, content, "sha256") for key in self._keys]
        fits = False
        for token in signatures.split(" "):
            version, _, encoded = token.partition(",")
            if version == "v1":
                given = _decoded(encoded)
                # Every key is compared with every signature, so that the time taken tells nothing.
                for digest in expected:
                    fits |= hmac.compare_digest(digest, given)
        return fits


def _key(secret: str) -> bytes:
    key = _decoded(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else b""
    if not 24 <= len(key) <= 64:  # Standard Webhooks 1.0.0
        raise ValueError("a secret is whsec_ and the base64 of 24 to 64 bytes")
    return key


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _header(headers: Mapping[Any, Any], name: str) -> str:
    wanted = f"webhook-{name}"
    found = [value for key, value in headers.items() if _text(key).lower() == wanted]
    if len(found) != 1 or not _text(found[0]):
        raise VerificationFailed(f"there is no {wanted} header, or more than one")
    text = _text(found[0])
    if not text.isascii():
        raise VerificationFailed(f"{wanted} is not ASCII")
    return text


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""
