"""Signer: secrets + id + time + bytes -> headers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from hookwright._errors import ConfigurationError, ValidationFailed
from hookwright._secret import Secret, standard_webhooks_hmac, standard_webhooks_key

if TYPE_CHECKING:
    from collections.abc import Sequence

HexAlgorithm = Literal["sha256", "sha384", "sha512"]

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110, 5.6.2: token."""

TEXT_KEY_LENGTH = 16
"""Characters of a text secret at least."""


class Signer(Protocol):
    """Signs one attempt. `header_names` are the headers that it sets."""

    @property
    def header_names(self) -> tuple[str, ...]:
        """The names of the headers that `sign` returns."""
        ...

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed when the secret cannot be used by this signer."""
        ...

    def generate(self) -> Secret:
        """Return a new secret that this signer can use."""
        ...

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the headers that authenticate the body. `secrets` are usable, newest first, at least one."""
        ...


def usable(signer: Signer, secrets: Sequence[Secret]) -> tuple[Secret, ...]:
    """Return those of an endpoint's secrets that the signer can use. Raises ValidationFailed when there is none."""
    found: list[Secret] = []
    why: ValidationFailed | None = None
    for secret in secrets:
        try:
            signer.check(secret)
        except ValidationFailed as error:
            why = why or error
        else:
            found.append(secret)
    if not found:
        raise why or ValidationFailed("secret", "the endpoint has none")
    return tuple(found)


class StandardWebhooks:
    """Standard Webhooks 1.0.0, `v1`: HMAC-SHA256 over `{id}.{timestamp}.{body}`.

    `prefix` is that of the three header names. During a rotation the header holds a signature for each secret.

    ```python
    from hookwright import Secret, StandardWebhooks

    secret = Secret.generate()
    print(StandardWebhooks().sign(event_id="evt_1", timestamp=1700000000, body=b"{}", secrets=[secret]))
    ```
    """

    def __init__(self, *, prefix: str = "webhook-") -> None:
        self._names = _names(prefix)

    def __repr__(self) -> str:
        return f"StandardWebhooks(prefix={self._names[0].removesuffix('id')!r})"

    @property
    def header_names(self) -> tuple[str, ...]:
        """`webhook-id`, `webhook-timestamp`, `webhook-signature`."""
        return self._names

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed unless it is `whsec_` and base64 of 24 to 64 bytes."""
        standard_webhooks_key(secret)

    def generate(self) -> Secret:
        """Return `whsec_` and 32 random bytes."""
        return Secret.generate()

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the three headers. Raises ValidationFailed for an id with a dot, or a secret that it cannot use."""
        prefix = _signed_prefix(event_id, timestamp)
        id_name, timestamp_name, signature_name = self._names
        signatures = [_symmetric(secret, prefix, body) for secret in secrets]
        return {id_name: event_id, timestamp_name: str(timestamp), signature_name: " ".join(signatures)}


def _symmetric(secret: Secret, prefix: bytes, body: bytes) -> str:
    mac = standard_webhooks_hmac(secret)
    mac.update(prefix)
    mac.update(body)
    return "v1," + binascii.b2a_base64(mac.digest(), newline=False).decode()


class Ed25519Webhooks:
    """Standard Webhooks 1.0.0, `v1a`: Ed25519 over `{id}.{timestamp}.{body}`. Needs the extra `ed25519`.

    Secrets are `whsk_` and base64 of the 32 byte seed, or of seed and public key (64 bytes). Receivers verify with
    the public key, which `public_key` gives as `whpk_...`, and hold no secret at all.

    Raises ConfigurationError when `cryptography` is not installed.
    """

    def __init__(self, *, prefix: str = "webhook-") -> None:
        try:
            # An extra: whoever does not use it need not have it.
            from cryptography.hazmat.primitives.asymmetric import ed25519
        except ImportError:
            raise ConfigurationError("Ed25519Webhooks needs cryptography: pip install 'hookwright[ed25519]'") from None
        self._ed25519: Any = ed25519
        self._names = _names(prefix)

    def __repr__(self) -> str:
        return f"Ed25519Webhooks(prefix={self._names[0].removesuffix('id')!r})"

    @property
    def header_names(self) -> tuple[str, ...]:
        """`webhook-id`, `webhook-timestamp`, `webhook-signature`."""
        return self._names

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed unless it is `whsk_` and base64 of a seed, or of a seed and its public key."""
        self._key(secret)

    def generate(self) -> Secret:
        """Return a new `whsk_` secret: seed and public key."""
        key = self._ed25519.Ed25519PrivateKey.generate()
        raw = key.private_bytes_raw() + key.public_key().public_bytes_raw()
        return Secret("whsk_" + base64.b64encode(raw).decode())

    def public_key(self, secret: Secret) -> str:
        """Return the `whpk_...` that receivers verify with; it is no secret."""
        return "whpk_" + base64.b64encode(self._key(secret).public_key().public_bytes_raw()).decode()

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the three headers. Raises ValidationFailed for an id with a dot, or a secret that it cannot use."""
        content = _signed_prefix(event_id, timestamp) + body
        signatures = ["v1a," + base64.b64encode(self._key(secret).sign(content)).decode() for secret in secrets]
        return dict(zip(self._names, (event_id, str(timestamp), " ".join(signatures)), strict=True))

    def _key(self, secret: Secret) -> Any:
        text = secret.reveal()
        try:
            raw = base64.b64decode(text.removeprefix("whsk_"), validate=True) if text.startswith("whsk_") else b""
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) not in {32, 64}:
            raise ValidationFailed("secret", "Ed25519 needs whsk_ and the base64 of 32 or 64 bytes")
        key = self._ed25519.Ed25519PrivateKey.from_private_bytes(raw[:32])
        if raw[32:] not in {b"", key.public_key().public_bytes_raw()}:
            raise ValidationFailed("secret", "the public half of this whsk_ secret does not belong to its seed")
        return key


class HexSignature:
    """A plain hexadecimal HMAC in one header, keyed with the UTF-8 bytes of the secret's text.

    Without `timestamp`, the raw body is signed, and the header is `prefix` and the digest. It can hold one signature
    only: during a rotation that of the newest secret. With `timestamp`, `{timestamp}.{body}` is signed, and the header
    is `t=<seconds>,v1=<digest>`, with a `v1` for each secret. A text secret (`Secret.text`) needs 16 characters.

    Raises ConfigurationError for a bad header name, an unknown algorithm, or a prefix together with `timestamp`.

    ```python
    from hookwright import HexSignature, Secret

    signer = HexSignature("X-Vendor-Signature", prefix="sha256=")
    print(signer.sign(event_id="evt_1", timestamp=0, body=b"{}", secrets=[Secret.text("a secret of the user's")]))
    ```
    """

    def __init__(
        self, header: str, *, prefix: str = "", algorithm: HexAlgorithm = "sha256", timestamp: bool = False
    ) -> None:
        if not isinstance(header, str) or not HEADER_NAME.fullmatch(header):
            raise ConfigurationError(f"HexSignature: {header!r} is no header name (letters, digits and -)")
        if algorithm not in get_args(HexAlgorithm):
            raise ConfigurationError(f"HexSignature: algorithm must be one of {', '.join(get_args(HexAlgorithm))}")
        if timestamp and prefix:
            raise ConfigurationError("HexSignature: the form with a timestamp has no prefix")
        if not (prefix.isascii() and prefix.isprintable()):
            raise ConfigurationError("HexSignature: prefix must be printable ASCII")
        self._header, self._prefix, self._algorithm, self._timestamp = header, prefix, algorithm, timestamp

    def __repr__(self) -> str:
        return (
            f"HexSignature({self._header!r}, prefix={self._prefix!r}, algorithm={self._algorithm!r},"
            f" timestamp={self._timestamp})"
        )

    @property
    def header_names(self) -> tuple[str, ...]:
        """The one header."""
        return (self._header,)

    def check(self, secret: Secret) -> None:
        """Raise ValidationFailed for a text of fewer than 16 characters."""
        if len(secret.reveal()) < TEXT_KEY_LENGTH:
            raise ValidationFailed("secret", f"HexSignature needs at least {TEXT_KEY_LENGTH} characters")

    def generate(self) -> Secret:
        """Return 32 random bytes as a text that starts with `whsec_`; the whole text is the key."""
        return Secret.generate()

    def sign(self, *, event_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
        """Return the one header."""
        if not self._timestamp:
            return {self._header: self._prefix + self._digest(secrets[0], body)}
        content = b"%d.%b" % (timestamp, body)
        return {self._header: ",".join([f"t={timestamp}", *(f"v1={self._digest(s, content)}" for s in secrets)])}

    def _digest(self, secret: Secret, content: bytes) -> str:
        return hmac.new(secret.reveal().encode(), content, getattr(hashlib, self._algorithm)).hexdigest()


def _names(prefix: str) -> tuple[str, str, str]:
    if not isinstance(prefix, str) or not HEADER_NAME.fullmatch(prefix):
        raise ConfigurationError(f"prefix: {prefix!r} cannot begin a header name: use, for example, 'webhook-'")
    return (f"{prefix}id", f"{prefix}timestamp", f"{prefix}signature")


def _signed_prefix(event_id: str, timestamp: int) -> bytes:
    if "." in event_id:
        raise ValidationFailed("event_id", "must hold no dot: it is joined with dots in what is signed")
    return b"%b.%d." % (event_id.encode(), timestamp)
