"""Vault: endpoints' secrets and header values, sealed on their way into the storage and opened on their way out."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from hookwright._errors import ConfigurationError, ValidationFailed
from hookwright._models import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hookwright._models import EndpointRow

_logger = logging.getLogger("hookwright")

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
"""NIST SP 800-38D, 8.2.2: a random nonce of 96 bits serves 2^32 texts under one key."""

_SEALED = re.compile(r"enc:[0-9]{1,3}:")
"""What every sealed text begins with, those of later versions too: they must never be taken for clear text."""


class SealBroken(Exception):
    """A sealed text cannot be opened: its key is not among `keys=`, or it was altered, or it belongs elsewhere.

    Never leaves the package. The message names the place and the key's id, and no text.
    """


class EncryptionKey:
    """A key for what is stored of endpoints: their secrets and header values, under AES-256-GCM.

    `id` (1 to 32 of A-Z, a-z, 0-9 and `_.-`) is stored in clear text beside what the key sealed. `key` is 32 random
    bytes, or the base64 text of them: make it once with `generate`, keep what `reveal` returns where your application
    keeps its secrets. Whoever loses the key loses the endpoints' secrets. Masked in str, repr and format, and never
    pickled.

    Raises ConfigurationError for another id or key.

    ```python
    from hookwright import Dispatcher, EncryptionKey

    text = EncryptionKey.generate("2026-01").reveal()  # once; then from the environment, or a secret store
    async with Dispatcher("sqlite:///hooks.db", keys=[EncryptionKey("2026-01", text)]) as dispatcher:
        await dispatcher.endpoints.create("https://example.com/webhooks", events=["*"])
    ```
    """

    __slots__ = ("_id", "_key")

    _id: str
    _key: bytes

    def __init__(self, id: str, key: bytes | str) -> None:
        if not isinstance(id, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", id):
            raise ConfigurationError("EncryptionKey: id must be 1 to 32 of A-Z, a-z, 0-9 and _.-, such as '2026-01'")
        object.__setattr__(self, "_id", id)
        object.__setattr__(self, "_key", _key_bytes(id, key))

    @classmethod
    def generate(cls, id: str) -> Self:
        """Return a key of 32 random bytes. Raises ConfigurationError for another id."""
        return cls(id, os.urandom(_KEY_BYTES))

    @property
    def id(self) -> str:
        """Its name, which is no secret."""
        return self._id

    def reveal(self) -> str:
        """Return the base64 text of the key: the only way to it."""
        return base64.b64encode(self._key).decode()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("an EncryptionKey cannot be changed")

    def __repr__(self) -> str:
        return f"EncryptionKey({self._id!r}, '****')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncryptionKey) and self._id == other._id and hmac.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash((self._id, self._key))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an EncryptionKey is not pickled: pass .reveal() yourself, where that is safe")


def _key_bytes(id: str, key: object) -> bytes:
    raw = bytes(key) if isinstance(key, (bytes, bytearray)) else b""
    if isinstance(key, str):
        try:
            raw = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
    if len(raw) != _KEY_BYTES:
        raise ConfigurationError(
            f"EncryptionKey {id!r}: key must be 32 bytes, or the base64 text of 32: EncryptionKey.generate({id!r})"
            ".reveal() makes one"
        )
    return raw


def looks_sealed(text: str) -> bool:
    """Whether it begins as sealed texts do."""
    return _SEALED.match(text) is not None


def check_clear(field: str, text: str) -> str:
    """Return a text that can be told from a sealed one. Raises ValidationFailed."""
    if looks_sealed(text):
        raise ValidationFailed(field, "must not begin with 'enc:' and a number: so does what is stored encrypted")
    return text


class Vault:
    """Seals texts where they stand in an EndpointRow, so that storages need not know of it; the names stay clear.

    The first key seals, all open; with none, texts stay clear. A sealed text is `enc:1:`, the key's id, `:` and base64
    of nonce, ciphertext and tag. It opens at its own place in its own endpoint only. What is clear is taken as it is,
    whatever the keys: whoever can write to the storage can put another secret there. `on_clear` is called before the
    first text is stored clear.

    Raises ConfigurationError for two keys of one id, or when `cryptography` is not installed.
    """

    def __init__(self, keys: Sequence[EncryptionKey] = (), *, on_clear: Callable[[], None] | None = None) -> None:
        self._first = keys[0].id if keys else None
        self._on_clear = on_clear
        self._ciphers: dict[str, Any] = {}
        for key in keys:
            if key.id in self._ciphers:
                raise ConfigurationError(f"keys: two have the id {key.id!r}; give a new key a new id")
            self._ciphers[key.id] = _cipher(key._key)  # noqa: SLF001  # raw bytes are not for applications

    def __repr__(self) -> str:
        return f"Vault({', '.join(repr(id) for id in self._ciphers)})"

    @property
    def seals(self) -> bool:
        """Whether there is a key."""
        return self._first is not None

    def sealed(self, row: EndpointRow) -> EndpointRow:
        """Return the row as it is to be stored; what is sealed already, and could not be opened, stays so."""
        if self._first is None:
            on_clear, self._on_clear = self._on_clear, None
            if on_clear is not None:
                on_clear()
            return row
        return _each(row, self._seal)

    def opened(self, row: EndpointRow) -> EndpointRow:
        """Return the row with clear texts. Raises SealBroken."""
        return _each(row, self._open) if any(looks_sealed(text) for text in _texts(row)) else row

    def needs_sealing(self, row: EndpointRow) -> bool:
        """Whether a text is not under the first key; without keys: whether one is sealed."""
        if self._first is None:
            return any(looks_sealed(text) for text in _texts(row))
        return not all(text.startswith(f"enc:1:{self._first}:") for text in _texts(row))

    def readable(self, row: EndpointRow) -> EndpointRow:
        """Return the row with those texts clear that can be opened."""
        return _each(row, self._open_or_leave)

    def _open_or_leave(self, endpoint_id: str, place: str, text: str) -> str:
        try:
            return self._open(endpoint_id, place, text)
        except SealBroken:
            return text

    def _seal(self, endpoint_id: str, place: str, text: str) -> str:
        assert self._first is not None
        if looks_sealed(text):
            return text
        nonce = os.urandom(_NONCE_BYTES)
        ciphertext = self._ciphers[self._first].encrypt(nonce, text.encode(), _bound_to(endpoint_id, place))
        return f"enc:1:{self._first}:{base64.b64encode(nonce + ciphertext).decode()}"

    def _open(self, endpoint_id: str, place: str, text: str) -> str:
        if not looks_sealed(text):
            return text
        _, version, key_id, sealed = (text.split(":", 3) + [""] * 4)[:4]
        if version != "1":
            raise SealBroken(f"its {place} was sealed by a later version of hookwright: upgrade")
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SealBroken(f"its {place} was sealed with the key {key_id!r}, which is not among keys=")
        try:
            raw = base64.b64decode(sealed, validate=True)
            clear: bytes = cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _bound_to(endpoint_id, place))
            return clear.decode()
        except Exception:  # noqa: BLE001  # InvalidTag, or no base64, or too short: none may show what it was about
            raise SealBroken(
                f"its sealed {place} was altered or belongs elsewhere, or the key {key_id!r} is not the one it was"
                " sealed with"
            ) from None


def _cipher(key: bytes) -> Any:
    try:
        # An extra: whoever does not use it need not have it.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigurationError("keys= needs cryptography: pip install 'hookwright[encryption]'") from None
    return AESGCM(key)


def _bound_to(endpoint_id: str, place: str) -> bytes:
    return f"{endpoint_id}\0{place}".encode()


def _header(name: str) -> str:
    return f"header:{name.lower()}"


def _texts(row: EndpointRow) -> Iterator[str]:
    yield from (key.text for key in row.keys)
    yield from (value for _, value in row.headers)


def _each(row: EndpointRow, change: Callable[[str, str, str], str]) -> EndpointRow:
    return replace(
        row,
        keys=tuple(Key(change(row.id, "secret", key.text), key.expires_at) for key in row.keys),
        headers=tuple((name, change(row.id, _header(name), value)) for name, value in row.headers),
    )
