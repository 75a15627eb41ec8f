"""Blank: what receivers echo of secrets must not reach the history."""

from __future__ import annotations

import base64
import binascii
import html
import json
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from hookwright._addresses import tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookwright._matching import CachedEndpoint
    from hookwright._prepare import Prepared

MASK = "[secret]"

_LEAST = len(MASK)
"""Characters of a header's value that is taken for a secret: shorter ones ("1", "ok") are found in any answer."""

_SCHEMES = frozenset({"apikey", "basic", "bearer", "token"})
_ESCAPED = "+&<>'\"`="


def secrets_of(prepared: Prepared) -> Sequence[str]:
    """Return what must not be told, in every spelling that we know of."""
    known = prepared.endpoint.blanked
    if not known:  # an endpoint that changes is cached anew
        known.extend(_found(prepared.endpoint))
    return known


def _found(endpoint: CachedEndpoint) -> list[str]:
    values: list[str] = []
    for secret, _ in endpoint.secrets:
        text = secret.reveal()
        # Also without the prefix: a receiver that echoes its configuration may show only the base64 part.
        bare = text.removeprefix("whsec_").removeprefix("whsk_")
        values.extend([text, bare, *(_bytes_of(bare) if bare != text else ())])
    for _, value in endpoint.row.headers:
        scheme, _, token = value.partition(" ")
        values.extend([value, token] if scheme.lower() in _SCHEMES else [value])
    for token in tokens_of(endpoint.row.url):
        values.extend([token, unquote(token), unquote_plus(token)])
    values = [value for value in values if len(value) >= _LEAST]
    # The longest first: one may be a part of another.
    return sorted(dict.fromkeys(spelling for value in values for spelling in _spellings(value)), key=len, reverse=True)


def _bytes_of(bare: str) -> Iterable[str]:
    """Return other spellings of a base64 key's bytes."""
    try:
        key = base64.b64decode(bare, validate=True)
    except (binascii.Error, ValueError):
        return ()
    return (key.hex(), key.hex().upper(), base64.urlsafe_b64encode(key).decode(), bare.rstrip("="))


def _spellings(value: str) -> Iterable[str]:
    """Return a text as it is, and as encoders of JSON, HTML, forms and urls write it."""
    escaped = json.dumps(value)[1:-1]
    yield from (value, escaped, json.dumps(value, ensure_ascii=False)[1:-1], escaped.replace("/", "\\/"))
    yield from (value.replace("/", "\\/"), html.escape(value), quote(value, safe=""), quote(value), quote_plus(value))
    for form in ("\\u%04X", "\\u%04x"):  # those that fear for HTML
        yield "".join(form % ord(c) if c in _ESCAPED else c for c in value)


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


def blank_headers(headers: tuple[tuple[str, str], ...], secrets: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the headers without secrets."""
    together = "\n".join([f"{name}\n{value}" for name, value in headers])
    if not any(value in together for value in secrets):  # nearly always, and at a third of the cost
        return headers
    return tuple((blank_text(name, secrets), blank_text(value, secrets)) for name, value in headers)


def _without_beginning(body: bytes, value: bytes) -> bytes:
    for length in range(min(len(value), len(body)) - 1, _LEAST - 1, -1):
        if body.endswith(value[:length]):
            return body[:-length] + MASK.encode()
    return body
