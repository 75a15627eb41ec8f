"""Blank: what receivers echo of secrets must not reach the history."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, unquote_plus

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

# No pattern here repeats what another part of it can match: what it is given, a receiver has chosen.
_ESCAPED = re.compile(
    r"\\{1,8}u([0-9a-fA-F]{4})|%([0-9a-fA-F]{2})|&#([0-9]{1,7});|&#[xX]([0-9a-fA-F]{1,5});|&(amp|lt|gt|quot|apos);"
)
_LAST = re.compile(r"(\\+)|\+")
"""What is left then: the backslashes of JSON, and the spaces of forms."""
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_NESTED = 2
"""Escapes within escapes that are seen through: a url in JSON, JSON in JSON."""


class Hidden(NamedTuple):
    """A text that must not be told: without escapes, and the part that is in every spelling and quickly looked for."""

    text: str
    run: str

    def __repr__(self) -> str:
        return "Hidden(...)"


def secrets_of(prepared: Prepared) -> Sequence[Hidden]:
    """Return what must not be told: secrets, header values, and what may be a token in the url."""
    known = prepared.endpoint.hidden
    if not known:  # an endpoint that changes is cached anew
        # The longest first: one may be a part of another.
        texts = sorted(dict.fromkeys(_found(prepared.endpoint)), key=len, reverse=True)
        known.extend(hidden for hidden in map(_hidden, texts) if len(hidden.text) >= _LEAST)
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
        if scheme.lower() == "basic":
            yield from _credential(token)
    for token in tokens_of(endpoint.row.url):
        yield from (token, unquote(token), unquote_plus(token))


def _bytes_of(bare: str) -> Iterable[str]:
    """Return other spellings of a base64 key's bytes."""
    try:
        key = base64.b64decode(bare, validate=True)
    except (binascii.Error, ValueError):
        return ()
    return (key.hex(), key.hex().upper(), base64.urlsafe_b64encode(key).decode().rstrip("="))


def _credential(token: str) -> Iterable[str]:
    """Return what Basic authentication encodes (RFC 7617): user and password, and the password."""
    try:
        text = base64.b64decode(token, validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return ()
    return (text, text.partition(":")[2])


def _hidden(text: str) -> Hidden:
    raw = _raw(text.encode())
    run = max(_PLAIN.findall(raw), key=len, default="")
    return Hidden(_without_escapes(raw)[0], run)


def _raw(data: bytes) -> str:
    return data.decode("latin-1")  # a character for each byte, so that places in the one are places in the other


def _without_escapes(text: str) -> tuple[str, Sequence[int]]:
    """Return the text as if nobody had escaped it, for JSON, HTML or urls, and where each character was (and the end).

    Both what is looked for and what it is looked for in go through here: they need not be exact, they must be alike.
    """
    places: Sequence[int] = range(len(text) + 1)
    for pattern, meant in (*[(_ESCAPED, _meant)] * _NESTED, (_LAST, _meant_last)):
        parts: list[str] = []
        found: list[int] = []
        position = 0
        for match in pattern.finditer(text):
            start = match.start()
            parts.append(text[position:start])
            found.extend(range(position, start))
            meaning = meant(match)
            parts.append(meaning)
            found.extend([start] * len(meaning))
            position = match.end()
        if position:
            parts.append(text[position:])
            found.extend(range(position, len(text) + 1))
            text, places = "".join(parts), [places[at] for at in found]
    return text, places


def _meant(match: re.Match[str]) -> str:
    unicode, percent, decimal, hexadecimal, entity = match.groups()
    if entity is not None:
        return _ENTITIES[entity]
    if decimal is not None:
        return _raw(chr(min(int(decimal), 0x10FFFF)).encode("utf-8", "replace"))
    code = int(unicode or percent or hexadecimal, 16)
    return chr(code) if percent is not None else _raw(chr(code).encode("utf-8", "replace"))


def _meant_last(match: re.Match[str]) -> str:
    return " " if match[1] is None else ""


def blank(body: bytes, secrets: Sequence[Hidden], *, truncated: bool) -> bytes:
    """Return the body without secrets; of a body that was cut, without the beginning of one at its end."""
    if not body:
        return body
    raw = _raw(body)
    wanted = [hidden.text for hidden in secrets if hidden.run in raw]
    cut = [hidden.text for hidden in secrets] if truncated else []
    return _masked(raw, wanted, cut).encode("latin-1") if wanted or cut else body


def blank_text(text: str, secrets: Sequence[Hidden]) -> str:
    """Return the text without secrets."""
    raw = _raw(text.encode("utf-8", "replace"))
    wanted = [hidden.text for hidden in secrets if hidden.run in raw]
    return _masked(raw, wanted, []).encode("latin-1").decode("utf-8", "replace") if wanted else text


def blank_headers(headers: tuple[tuple[str, str], ...], secrets: Sequence[Hidden]) -> tuple[tuple[str, str], ...]:
    """Return the headers without secrets."""
    together = "\n".join([f"{name}\n{value}" for name, value in headers])
    if not any(hidden.run in together for hidden in secrets):  # nearly always
        return headers
    return tuple((blank_text(name, secrets), blank_text(value, secrets)) for name, value in headers)


def _masked(raw: str, wanted: Sequence[str], cut: Sequence[str]) -> str:
    text, places = _without_escapes(raw)
    spans: list[tuple[int, int]] = []
    for value in wanted:
        at = text.find(value)
        while at >= 0:
            spans.append((places[at], places[at + len(value)]))
            at = text.find(value, at + len(value))
    begun = max((_begun(text, value) for value in cut), default=0)
    if begun:
        spans.append((places[len(text) - begun], len(raw)))
    parts, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            parts.extend([raw[end:start], MASK])
        end = max(end, stop)
    return "".join([*parts, raw[end:]])


def _begun(text: str, value: str) -> int:
    """Return how many characters of `value`, from its first, the text ends with, if they are enough to matter."""
    tail = text[-len(value) :]
    return next((n for n in range(len(value) - 1, _LEAST - 1, -1) if tail.endswith(value[:n])), 0)
