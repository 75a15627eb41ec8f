"""Blank: what receivers echo of secrets must not reach the history."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._prepare import Prepared

MASK = "[secret]"

_LEAST = len(MASK)
"""Characters of a header's value that is taken for a secret: shorter ones ("1", "ok") are found in any answer."""


def secrets_of(prepared: Prepared) -> list[str]:
    """Return what must not be told, in every spelling that we know of."""
    values: list[str] = []
    for secret, _ in prepared.endpoint.secrets:
        text = secret.reveal()
        # Also without the prefix: a receiver that echoes its configuration may show only the base64 part.
        values.extend([text, text.removeprefix("whsec_").removeprefix("whsk_")])
    values.extend(value for _, value in prepared.endpoint.row.headers if len(value) >= _LEAST)
    # And as some JSON encoders write it.
    values.extend([value.replace("/", "\\/") for value in values if "/" in value])
    return values


def blank(body: bytes, secrets: Sequence[str], *, truncated: bool) -> bytes:
    """Return the body without secrets; of a body that was cut, without the beginning of one at its end."""
    for value in secrets if body else ():
        raw = value.encode()
        body = body.replace(raw, MASK.encode())
        if truncated:
            body = _without_beginning(body, raw)
    return body


def blank_text(text: str, secrets: Sequence[str]) -> str:
    """Return the text without secrets."""
    for value in secrets:
        text = text.replace(value, MASK)
    return text


def _without_beginning(body: bytes, value: bytes) -> bytes:
    for length in range(min(len(value), len(body)) - 1, _LEAST - 1, -1):
        if body.endswith(value[:length]):
            return body[:-length] + MASK.encode()
    return body
