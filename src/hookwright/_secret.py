"""Secret: signing keys that cannot be shown by accident. The standard library only, and a hook for pydantic."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from typing import Any, Final, NoReturn, Self

from hookwright._errors import ValidationFailed

MASK: Final = "whsec_****"
KEY_BYTES: Final = (24, 64)
"""Standard Webhooks 1.0.0: a symmetric secret has 24 to 64 bytes."""


class Secret:
    """A signing secret, masked in str, repr, format, JSON and copies; equal in constant time; never pickled."""

    __slots__ = ("_hmac", "_text")

    _text: str
    _hmac: hmac.HMAC | None

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.startswith(("whsec_", "whsk_")):
            raise ValidationFailed("secret", "must start with whsec_ or whsk_; for any other use Secret.text('...')")
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_hmac", None)

    @classmethod
    def text(cls, text: str) -> Self:
        """Return a secret of any text. Raises ValidationFailed for what is none, or cannot be UTF-8."""
        try:
            if not isinstance(text, str):
                raise ValidationFailed("secret", f"must be text, not {type(text).__name__}")
            text.encode()
        except UnicodeEncodeError:
            raise ValidationFailed("secret", "holds half a surrogate pair, which is no text") from None
        secret = object.__new__(cls)
        object.__setattr__(secret, "_text", text)
        object.__setattr__(secret, "_hmac", None)
        return secret

    @classmethod
    def generate(cls) -> Self:
        """Return a new secret of 32 random bytes."""
        return cls("whsec_" + base64.b64encode(os.urandom(32)).decode())

    def reveal(self) -> str:
        """Return the text itself: the only way to it."""
        return self._text

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, spec: str) -> str:
        return format(MASK, spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled: pass .reveal() yourself, where that is safe")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        # Written out: pydantic_core.core_schema's functions make just such dicts, and importing them takes 18 ms.
        return {"type": "is-instance", "cls": cls, "serialization": {"type": "function-plain", "function": str}}


def standard_webhooks_key(secret: Secret) -> bytes:
    """Return the key bytes of a `whsec_` secret. Raises ValidationFailed."""
    text = secret.reveal()
    if not text.startswith("whsec_"):
        raise ValidationFailed("secret", "Standard Webhooks needs a secret that starts with whsec_")
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise ValidationFailed("secret", "what follows whsec_ must be base64") from None
    if not KEY_BYTES[0] <= len(key) <= KEY_BYTES[1]:
        raise ValidationFailed("secret", f"must hold 24 to 64 bytes, this one holds {len(key)}")
    return key


def standard_webhooks_hmac(secret: Secret) -> hmac.HMAC:
    """Return a new HMAC-SHA256 under the key of a `whsec_` secret. Raises ValidationFailed."""
    if secret._hmac is None:  # noqa: SLF001  # the key schedule is as secret as the text, and kept with it
        object.__setattr__(secret, "_hmac", hmac.new(standard_webhooks_key(secret), digestmod="sha256"))
        assert secret._hmac is not None  # noqa: SLF001
    return secret._hmac.copy()  # noqa: SLF001
