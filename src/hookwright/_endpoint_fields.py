"""What `endpoints.create` and `update` are given: each field checked, with an error that says what would be right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hookwright._catalogue import check_pattern
from hookwright._errors import ValidationFailed
from hookwright._models import ALL_TENANTS, check_text
from hookwright._profile import is_reserved
from hookwright._signing import HEADER_NAME
from hookwright._vault import check_clear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import Tenant


def patterns(events: Sequence[str]) -> tuple[str, ...]:
    """Return the subscription patterns, each once. Raises ValidationFailed."""
    if isinstance(events, str):
        raise ValidationFailed("events", f"give a list of patterns, not one text: [{events!r}]")
    if not isinstance(events, Iterable) or not events:
        raise ValidationFailed("events", "give a list of at least one pattern, such as ['video.*'] or ['*']")
    return tuple(dict.fromkeys(check_pattern(pattern) for pattern in events))


def text(field: str, value: str | None) -> str | None:
    """Return a text, or None. Raises ValidationFailed."""
    if value is not None and (not isinstance(value, str) or len(value) > 1000):  # the message says it
        raise ValidationFailed(field, "must be text of at most 1,000 characters")
    check_text(field, value or "")
    return value


def filters_of(filters: Mapping[str, Sequence[str | int | bool]] | None) -> dict[str, tuple[str | int | bool, ...]]:
    """Return filters with their values as tuples. Raises ValidationFailed."""
    checked: dict[str, tuple[str | int | bool, ...]] = {}
    if filters is not None and not isinstance(filters, Mapping):
        raise ValidationFailed(
            "filters", f"must be a mapping, such as {{'index_id': ['idx_1']}}, not {type(filters).__name__}"
        )
    for key, values in (filters or {}).items():
        if not isinstance(key, str) or not isinstance(values, (str, int, Iterable)):
            raise ValidationFailed("filters", f"{key!r} must be text, with a list of at least one str, int or bool")
        allowed = tuple([values] if isinstance(values, (str, int)) else values)
        if not allowed or not all(isinstance(value, (str, int)) for value in allowed):
            raise ValidationFailed("filters", f"{key!r} needs a list of at least one str, int or bool")
        for text in (key, *(value for value in allowed if isinstance(value, str))):
            check_text("filters", text)
        checked[key] = allowed
    return checked


def metadata_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy that JSON can hold. Raises ValidationFailed."""
    try:
        return dict(json.loads(json.dumps(dict(metadata or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValidationFailed("metadata", f"must be a mapping that JSON can hold: {error}") from None


_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")  # RFC 9110, 5.5, less obs-text


def headers_of(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Return custom headers as pairs. Raises ValidationFailed."""
    if headers is not None and not isinstance(headers, Mapping):
        raise ValidationFailed("headers", f"must be a mapping from name to value, not {type(headers).__name__}")
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not HEADER_NAME.fullmatch(name):
            # What follows may be the value: a whole line was given as the name.
            begin = HEADER_NAME.match(name) if isinstance(name, str) else None
            raise ValidationFailed(
                "headers", f"{begin[0] if begin else ''!r} is no header name (letters, digits and -)"
            )
        if is_reserved(name):
            raise ValidationFailed("headers", f"{name} is set by hookwright or belongs to the connection: leave it out")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValidationFailed(
                "headers", f"the value of {name} must be printable ASCII, one character at least, no line break"
            )
        check_clear("headers", value)
    if len({name.lower() for name in headers or {}}) < len(headers or {}):
        raise ValidationFailed("headers", "names two that differ in case only: they are the same header")
    return tuple((headers or {}).items())


def tenant_of(tenant: Tenant) -> Tenant:
    """Return a tenant. Raises ValidationFailed."""
    if tenant is None or tenant is ALL_TENANTS:
        return tenant
    if isinstance(tenant, str) and tenant:
        return check_text("tenant", tenant)
    raise ValidationFailed("tenant", "must be text, None, or ALL_TENANTS")


def positive(field: str, value: int | None) -> int | None:
    """Return a whole number of at least 1, or None. Raises ValidationFailed."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValidationFailed(field, f"must be a whole number of at least 1, not {value!r}")
    return value


RATE_LIMITS = (0.001, 10_000.0)


def rate(value: float | None) -> float | None:
    """Return a rate limit in attempts per second, or None. Raises ValidationFailed."""
    if value is None:
        return None
    least, most = RATE_LIMITS
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValidationFailed("rate_limit", f"must be attempts per second, from {least:g} to {most:g}, or None")
    return float(value)
