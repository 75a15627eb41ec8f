"""For those who receive webhooks: `Verifier` says whether a request is authentic.

This file needs nothing but Python: copy it into a receiver that does not install hookwright. Ed25519 alone, which
Python does not have, is asked of the package `cryptography`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import importlib
import ipaddress
import json
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Pairs = list[tuple[Any, Any]]


__all__ = ["Revealing", "VerificationFailed", "Verified", "Verifier"]


class VerificationFailed(Exception):
    """The request is not authentic, or too old: answer 401 and do nothing. The message holds no secret."""


class Revealing(Protocol):
    """A `hookwright.Secret`, or anything else that reveals a text."""

    def reveal(self) -> str:
        """Return the text."""
        ...


@dataclass(frozen=True)
class Verified:
    """An authentic webhook.

    `id` is the same on every attempt: use it to recognise what you have handled already. Where the scheme signs none
    it is empty, and `timestamp` None.
    """

    id: str
    timestamp: datetime | None
    payload: Any
    body: bytes


class Verifier:
    """Verifies Standard Webhooks 1.0.0: `v1` with `whsec_...` secrets, `v1a` with `whpk_...` public keys.

    Give the endpoint's secrets, several during a rotation: one of them must fit one of the signatures. `Verifier.hex`
    makes one for a plain hexadecimal HMAC. `tolerance` is how many seconds a timestamp may differ from `now` (default
    `time.time`), in both directions; `prefix` is that of the header names. `sources`, addresses or networks, are where
    requests may come from: `verify` then needs the `source`.

    Raises ValueError for a secret that is none, ImportError for a public key without `cryptography`.

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
        prefix: str = "webhook-",
        sources: Iterable[str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        if not secrets:
            raise ValueError("give at least one secret")
        texts = [_revealed(secret) for secret in secrets]
        keys = [_symmetric_key(text) for text in texts if not text.startswith("whpk_")]
        public = [_public_key(text) for text in texts if text.startswith("whpk_")]
        self._scheme: _Standard | _Hex = _Standard(keys, public, prefix, _Age(tolerance, now))
        self._sources = _networks(sources)

    @classmethod
    def hex(
        cls,
        *secrets: str | Revealing,
        header: str,
        prefix: str = "",
        algorithm: str = "sha256",
        timestamp: bool = False,
        tolerance: float = 300.0,
        sources: Iterable[str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> Verifier:
        """Return a verifier of hexadecimal HMACs, keyed with the secret's text: `prefix` and the digest in `header`.

        With `timestamp`, the header is `t=<seconds>,v1=<digest>`, and `{timestamp}.{body}` is what is signed; without
        it nothing is known of a request's age. Raises ValueError for a secret shorter than 16 characters.

        ```python
        from hookwright.receiver import Verifier

        verifier = Verifier.hex("the secret of the endpoint", header="X-Vendor-Signature", prefix="sha256=")
        ```
        """
        if not secrets:
            raise ValueError("give at least one secret")
        if algorithm not in {"sha256", "sha384", "sha512"}:
            raise ValueError("algorithm must be sha256, sha384 or sha512")
        texts = [_revealed(secret) for secret in secrets]
        if any(len(text) < 16 for text in texts):
            raise ValueError("a secret must have at least 16 characters")
        verifier = cls.__new__(cls)
        keys = [text.encode() for text in texts]
        age = _Age(tolerance, now) if timestamp else None
        verifier._scheme = _Hex(keys, header, prefix, algorithm, age)  # noqa: SLF001  # another constructor of ours
        verifier._sources = _networks(sources)  # noqa: SLF001
        return verifier

    def verify(
        self, body: bytes, headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]], *, source: str | None = None
    ) -> Verified:
        """Return the webhook, or raise VerificationFailed, whatever the bytes are.

        `body` is the raw body as it came: JSON that was parsed and encoded again has other bytes. `headers` are a
        mapping or pairs; names may have any case, names and values may be text or bytes. `source` is the peer's
        address, when `sources` are set.
        """
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise VerificationFailed("the body must be the raw bytes")
        self._check_source(source)
        body = bytes(body)
        id, seconds = self._scheme.check(body, _pairs(headers))
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            raise VerificationFailed("the body is no JSON") from None
        timestamp = None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)  # noqa: UP017  # runs on older Pythons
        return Verified(id, timestamp, payload, body)

    def _check_source(self, source: str | None) -> None:
        if self._sources is None:
            return
        try:
            address = ipaddress.ip_address(source or "")
        except ValueError:
            raise VerificationFailed("the source is no address") from None
        mapped = getattr(address, "ipv4_mapped", None)
        if not any((mapped or address) in network for network in self._sources):
            raise VerificationFailed("the source is not on the list")


class _Age:
    """Whether a timestamp is near enough to now."""

    def __init__(self, tolerance: float, now: Callable[[], float]) -> None:
        if not tolerance >= 0:
            raise ValueError("tolerance must be 0 or more seconds")
        self._tolerance = tolerance
        self._now = now

    def check(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 12):  # until the year 33658
            raise VerificationFailed("the timestamp is no number of seconds")
        difference = self._now() - int(text)
        if abs(difference) > self._tolerance:
            raise VerificationFailed("the timestamp is too old" if difference > 0 else "the timestamp is in the future")
        return int(text)


class _Standard:
    def __init__(self, keys: list[bytes], public: list[Any], prefix: str, age: _Age) -> None:
        self._keys = keys
        self._public = public
        self._prefix = prefix.lower()
        self._age = age

    def check(self, body: bytes, headers: Pairs) -> tuple[str, int]:
        names = ("id", "timestamp", "signature")
        id, sent, signatures = (_header(headers, self._prefix + name) for name in names)
        timestamp = self._age.check(sent)
        if not self._signed(b"%b.%b.%b" % (id.encode(), sent.encode(), body), signatures):
            raise VerificationFailed("no signature fits: it is by another secret, or not of these raw bytes")
        return id, timestamp

    def _signed(self, content: bytes, signatures: str) -> bool:
        expected = [hmac.digest(key, content, "sha256") for key in self._keys]
        fits = False
        for token in signatures.split(" "):
            version, _, encoded = token.partition(",")
            given = _decoded(encoded)
            if version == "v1":
                # Every key is compared with every signature, so that the time taken tells nothing.
                for digest in expected:
                    fits |= hmac.compare_digest(digest, given)
            elif version == "v1a":
                fits |= any(key(given, content) for key in self._public)
        return fits


class _Hex:
    def __init__(self, keys: list[bytes], header: str, prefix: str, algorithm: str, age: _Age | None) -> None:
        self._keys = keys
        self._header = header.lower()
        self._prefix = prefix
        self._algorithm = algorithm
        self._age = age

    def check(self, body: bytes, headers: Pairs) -> tuple[str, int | None]:
        value = _header(headers, self._header)
        timestamp = None
        given = [value.removeprefix(self._prefix)] if value.startswith(self._prefix) else []
        if self._age is not None:
            parts = [part.partition("=")[::2] for part in value.split(",")]
            times = [text for key, text in parts if key == "t"]
            if len(times) != 1:
                raise VerificationFailed("the signature names no time, or more than one")
            timestamp = self._age.check(times[0])
            body = b"%b.%b" % (times[0].encode(), body)
            given = [text for key, text in parts if key == "v1"]
        fits = False
        for key in self._keys:
            expected = hmac.new(key, body, self._algorithm).hexdigest()
            for text in given:
                fits |= hmac.compare_digest(expected, text)
        if not fits:
            raise VerificationFailed("no signature fits: it is by another secret, or not of these raw bytes")
        return "", timestamp


def _revealed(secret: str | Revealing) -> str:
    if isinstance(secret, str):
        return secret
    if not hasattr(secret, "reveal"):
        raise ValueError(f"a secret must be text, or a hookwright.Secret, not {type(secret).__name__}")
    return secret.reveal()


def _symmetric_key(secret: str) -> bytes:
    key = _decoded(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else b""
    if not 24 <= len(key) <= 64:  # Standard Webhooks 1.0.0
        raise ValueError("a secret is whsec_ and the base64 of 24 to 64 bytes; a public key whpk_ and that of 32")
    return key


def _public_key(text: str) -> Callable[[bytes, bytes], bool]:
    raw = _decoded(text.removeprefix("whpk_"))
    if len(raw) != 32:
        raise ValueError("a public key is whpk_ and the base64 of 32 bytes")
    # By name, and only when it is needed: this file stands alone otherwise.
    key = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey
    invalid = importlib.import_module("cryptography.exceptions").InvalidSignature
    public = key.from_public_bytes(raw)

    def fits(signature: bytes, content: bytes) -> bool:
        try:
            public.verify(signature, content)
        except invalid:
            return False
        return True

    return fits


def _networks(sources: Iterable[str] | None) -> list[Any] | None:
    return None if sources is None else [ipaddress.ip_network(source) for source in sources]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _pairs(headers: Any) -> Pairs:
    try:
        return [(key, value) for key, value in (headers.items() if hasattr(headers, "items") else headers)]
    except (TypeError, ValueError):
        raise VerificationFailed("headers must be a mapping, or pairs of name and value") from None


def _header(headers: Pairs, name: str) -> str:
    found = [value for key, value in headers if _text(key).lower() == name]
    if len(found) != 1 or not _text(found[0]):
        raise VerificationFailed(f"there is no {name} header, or more than one")
    text = _text(found[0])
    if not text.isascii():
        raise VerificationFailed(f"{name} is not ASCII")
    return text


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""
