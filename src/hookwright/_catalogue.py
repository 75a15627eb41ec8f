"""Event types: how they are named, and the patterns by which endpoints subscribe to them."""

from __future__ import annotations

import re

from hookwright._errors import ValidationFailed

TYPE_LENGTH = 128
"""Characters of an event type at most."""

_TYPE = re.compile(r"[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*")


def check_type(value: object, field: str = "type") -> str:
    """Return an event type, or raise ValidationFailed."""
    if not isinstance(value, str) or not _TYPE.fullmatch(value) or len(value) > TYPE_LENGTH:
        raise ValidationFailed(
            field,
            f"{_shown(value)} is no event type: use dot-separated words of a-z, A-Z, 0-9, _ and -, such as"
            f" 'video.processed', at most {TYPE_LENGTH} characters",
        )
    return value


def check_pattern(value: object, field: str = "events") -> str:
    """Return a subscription pattern, or raise ValidationFailed."""
    if value == "*":
        return "*"
    exact = value.removesuffix(".*") if isinstance(value, str) else ""
    if not _TYPE.fullmatch(exact) or len(exact) > TYPE_LENGTH:
        raise ValidationFailed(
            field, f"{_shown(value)} is no pattern: use '*', a prefix such as 'video.*', or an exact event type"
        )
    assert isinstance(value, str)
    return value


def candidates(event_type: str) -> list[str]:
    """Return every pattern that matches the type: itself, `a.b.*` and `a.*` above it, and `*`.

    An index from pattern to endpoints is asked for these, so that matching costs the type's depth and not the number
    of endpoints.
    """
    found = ["*", event_type]
    dot = event_type.find(".")
    while dot != -1:
        found.append(event_type[:dot] + ".*")
        dot = event_type.find(".", dot + 1)
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."  # a message stays on a line
