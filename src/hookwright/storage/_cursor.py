"""Cursors: opaque to callers, bound to the list and filters they were made for."""

from __future__ import annotations

import base64
import binascii
import hashlib

from hookwright._errors import ValidationFailed

_CHECK = 6


def encode_cursor(kind: str, filters: object, position: str) -> str:
    """Return the cursor that continues after `position`."""
    return base64.urlsafe_b64encode(_check(kind, filters, position) + position.encode()).decode()


def decode_cursor(cursor: str, kind: str, filters: object) -> str:
    """Return the position. Raises ValidationFailed for a cursor that we did not make, or made for another list."""
    try:
        raw = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True)
        position = raw[_CHECK:].decode()
    except (AttributeError, binascii.Error, ValueError):
        raw, position = b"", ""
    if not position or raw[:_CHECK] != _check(kind, filters, position):
        raise ValidationFailed(
            "cursor", "is not one that this list returned: pass next_cursor on, with the same filters"
        )
    return position


def _check(kind: str, filters: object, position: str) -> bytes:
    return hashlib.sha256(repr((kind, filters, position)).encode()).digest()[:_CHECK]
