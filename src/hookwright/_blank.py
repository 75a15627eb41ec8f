"""Blank: what receivers echo of secrets must not reach the history."""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote, unquote_plus

from hookwright._addresses import tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookwright._matching import CachedEndpoint
    from hookwright._prepare import Prepared

MASK = "[secret]"

_LEAST = len(MASK)
"""Characters of a header's value that is taken for a secret: shorter ones ("1", "ok") are found in any answer."""

_SCHEMES = frozenset({"apikey", "basic", "bearer", "token"})
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")
"""What every encoder leaves as it is (RFC 3986, 2.3)."""


class Hidden(NamedTuple):
    """A text that must not be told. `run` is in every spelling of it, and quickly looked for."""

    text: str
    run: str
    spelled: re.Pattern[str]
    spelled_bytes: re.Pattern[bytes]

    def __repr__(self) -> str:
        return "Hidden(...)"


def secrets_of(prepared: Prepared) -> Sequence[Hidden]:
    """Return what must not be told: secrets, header values, and what may be a token in the url."""
    known = prepared.endpoint.hidden
    if not known:  # an endpoint that changes is cached anew
        # The longest first: one may be a part of another.
        texts = sorted(dict.fromkeys(_found(prepared.endpoint)), key=len, reverse=True)
        known.extend(_hidden(text) for text in texts if len(text) >= _LEAST)
    return known


def _found(endpoint: CachedEndpoint) -> Iterable[str]:
    for secret, _ in endpoint.secrets:
        text = secret.reveal()
        yield text
        if text.startswith(("whsec_", "whsk_")):
            # Also without the prefix: a receiver that echoes its configuration may show only the base64 part.
            bare = text.partition("_")[2]
            yield from (bare, bare.rstrip("="), *_bytes_of(bare))
    for _, value in endpoint.row.headers:
        scheme, _, token = value.partition(" ")
        yield from (value, token) if scheme.lower() in _SCHEMES else (value,)
    for token in tokens_of(endpoint.row.url):
        yield from (token, unquote(token), unquote_plus(token))


def _bytes_of(bare: str) -> Iterable[str]:
    """Return other spellings of a base64 key's bytes."""
    try:
        key = base64.b64decode(bare, validate=True)
    except (binascii.Error, ValueError):
        return ()
    return (key.hex(), key.hex().upper(), base64.urlsafe_b64encode(key).decode().rstrip("="))


def _hidden(text: str) -> Hidden:
    pattern = "".join(map(_spelled, text))
    run = max(_PLAIN.findall(text), key=len, default="")
    return Hidden(text, run, re.compile(pattern), re.compile(pattern.encode()))


def _spelled(character: str) -> str:
    """Return a pattern for a character as encoders of JSON (in JSON), HTML, forms and urls write it."""
    if _PLAIN.fullmatch(character):
        return re.escape(character)
    code = ord(character)
    forms = [rf"\\*{re.escape(character)}", rf"\\+u(?i:{code:04x})", f"(?i:{quote(character, safe='')})", f"&#{code};"]
    forms += [f"&#x(?i:{code:x});", re.escape(html.escape(character)), *([r"\+"] if character == " " else [])]
    return f"(?:{'|'.join(forms)})"


def blank(body: bytes, secrets: Sequence[Hidden], *, truncated: bool) -> bytes:
    """Return the body without secrets; of a body that was cut, without the beginning of one at its end."""
    for hidden in secrets if body else ():
        if hidden.run.encode() in body:
            body = hidden.spelled_bytes.sub(MASK.encode(), body)
        if truncated:
            escaped = json.dumps(hidden.text)[1:-1]
            for spelling in (hidden.text, escaped, escaped.replace("/", "\\/"), quote(hidden.text, safe="")):
                body = _without_beginning(body, spelling.encode())
    return body


def blank_text(text: str, secrets: Sequence[Hidden]) -> str:
    """Return the text without secrets."""
    for hidden in secrets:
        if hidden.run in text:
            text = hidden.spelled.sub(MASK, text)
    return text


def blank_headers(headers: tuple[tuple[str, str], ...], secrets: Sequence[Hidden]) -> tuple[tuple[str, str], ...]:
    """Return the headers without secrets."""
    together = "\n".join([f"{name}\n{value}" for name, value in headers])
    if not any(hidden.run in together for hidden in secrets):  # nearly always
        return headers
    return tuple((blank_text(name, secrets), blank_text(value, secrets)) for name, value in headers)


def _without_beginning(body: bytes, value: bytes) -> bytes:
    for length in range(min(len(value), len(body)) - 1, _LEAST - 1, -1):
        if body.endswith(value[:length]):
            return body[:-length] + MASK.encode()
    return body
