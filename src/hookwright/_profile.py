"""Profile: how an endpoint is spoken to. Endpoints store the profile's name, so an edited one applies at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING

from hookwright._certificate import ClientCertificate
from hookwright._envelope import CallableEnvelope, Envelope, StandardEnvelope
from hookwright._errors import ConfigurationError
from hookwright._retry import RetryPolicy
from hookwright._signing import HEADER_NAME, Ed25519Webhooks, Signer, StandardWebhooks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from hookwright._envelope import Content

HEADER_FIELDS = ("event_id", "event_type", "delivery_id", "attempt", "timestamp")
"""What the values of a profile's headers may name."""


_RESERVED_HEADERS = frozenset(
    [
        "connection",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "accept-encoding",
    ]
)
_RESERVED_PREFIXES = ("content-", "proxy-", "webhook-")


def is_reserved(name: str) -> bool:
    """Whether a header belongs to hookwright or to the connection, so that nobody else may set it."""
    return name.lower() in _RESERVED_HEADERS or name.lower().startswith(_RESERVED_PREFIXES)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: `total` from DNS to the response's last byte, and within it `connect` (TCP and TLS) and `dns`.

    Raises ConfigurationError unless 0 < dns, connect <= total.
    """

    total: float = 15.0
    connect: float = 5.0
    dns: float = 3.0

    def __post_init__(self) -> None:
        if not all(isinstance(seconds, (int, float)) for seconds in (self.total, self.connect, self.dns)):
            raise ConfigurationError("Timeouts: total, connect and dns must be numbers of seconds")
        if not (0 < self.connect <= self.total and 0 < self.dns <= self.total):
            raise ConfigurationError(
                f"Timeouts: dns ({self.dns:g}) and connect ({self.connect:g}) must be more than 0 seconds and at most"
                f" total ({self.total:g})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Envelope, signers, headers, retry policy and timeouts, under one name that endpoints refer to.

    `envelope` renders the body: an Envelope, or a function from Content to bytes. Every one of the `signers` signs
    every attempt. An endpoint's secret must suit all of them. A profile named `default` in the dispatcher's `profiles`
    replaces the default one; `endpoints.create(..., profile="patient")` chooses another. `headers` are sent with each
    attempt; their values may name `{event_id}`, `{event_type}`, `{delivery_id}`, `{attempt}` (from 1) and `{timestamp}`
    (seconds). `client_certificate` is presented to receivers that ask for one (mutual TLS).

    Raises ConfigurationError for what cannot work.

    ```python
    from hookwright import EventEnvelope, HexSignature, Profile, RetryPolicy, Timeouts

    vendor = Profile(
        envelope=EventEnvelope(),
        signers=[HexSignature("X-Vendor-Signature", prefix="sha256=")],
        headers={"X-Vendor-Event-Id": "{event_id}"},
        retry=RetryPolicy.schedule(0, 60, 300),
        timeouts=Timeouts(total=30.0),
    )
    profiles = {"default": Profile(retry=RetryPolicy.schedule(0, 60)), "vendor": vendor}
    ```
    """

    envelope: Envelope | Callable[[Content], bytes] = field(default_factory=StandardEnvelope)
    signers: Sequence[Signer] = field(default_factory=lambda: (StandardWebhooks(),))
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy.standard)
    timeouts: Timeouts = field(default_factory=Timeouts)
    client_certificate: ClientCertificate | None = None
    renderer: Envelope = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.envelope, type) or not (hasattr(self.envelope, "render") or callable(self.envelope)):
            raise ConfigurationError(f"Profile: envelope must be an Envelope or a function, not {self.envelope!r}")
        renderer = self.envelope if hasattr(self.envelope, "render") else CallableEnvelope(self.envelope)
        object.__setattr__(self, "renderer", renderer)
        if not isinstance(self.retry, RetryPolicy):
            raise ConfigurationError(
                f"Profile: retry: give RetryPolicy.schedule(0, 60) or the like, not {self.retry!r}"
            )
        if not isinstance(self.timeouts, Timeouts):
            raise ConfigurationError(f"Profile: timeouts: give Timeouts(total=30.0) or the like, not {self.timeouts!r}")
        if self.client_certificate is not None and not isinstance(self.client_certificate, ClientCertificate):
            raise ConfigurationError("Profile: client_certificate: give ClientCertificate.from_files(...) or the like")
        signed = self._check_signers()
        for name, value in self.headers.items():
            _check_header(name, value)
            if is_reserved(name) or name.lower() in signed or name.lower() == "user-agent":
                raise ConfigurationError(f"Profile: {name} is set by a signer or the connection: leave it out")
        if len({name.lower() for name in self.headers}) < len(self.headers):
            raise ConfigurationError("Profile: headers names two that differ in case only: they are the same header")

    def _check_signers(self) -> Collection[str]:
        """Return the names of the headers that the signers set, in lower case."""
        if not isinstance(self.signers, Sequence) or not all(hasattr(signer, "sign") for signer in self.signers):
            raise ConfigurationError(f"Profile: signers: give a list, [StandardWebhooks()], not {self.signers!r}")
        signed = {name.lower(): name for signer in self.signers for name in signer.header_names}
        for name in {name for signer in self.signers for name in signer.header_names}:
            if (is_reserved(name) and not name.lower().startswith("webhook-")) or signed[name.lower()] != name:
                raise ConfigurationError(f"Profile: no signer can set {name}: it is the connection's or another's")
        if {StandardWebhooks, Ed25519Webhooks} <= {type(signer) for signer in self.signers}:
            raise ConfigurationError(
                "Profile: StandardWebhooks and Ed25519Webhooks need two kinds of secrets: make two profiles, and move"
                " endpoints with rotate_secret(profile=...)"
            )
        return signed

    @property
    def header_names(self) -> frozenset[str]:
        """The names of all the headers that the profile sets, in lower case."""
        signed = (name for signer in self.signers for name in signer.header_names)
        return frozenset(name.lower() for name in (*signed, *self.headers))


def _check_header(name: str, value: str) -> None:
    if not isinstance(name, str) or not HEADER_NAME.fullmatch(name):
        raise ConfigurationError(f"Profile: {name!r} is no header name (letters, digits and -)")
    try:
        used = {part[1] for part in Formatter().parse(value) if part[1] is not None}
        plain = all(not part[2] and not part[3] for part in Formatter().parse(value))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"Profile: the value of {name} is no template: {error}") from None
    if not used <= set(HEADER_FIELDS) or not plain:
        raise ConfigurationError(f"Profile: the value of {name} may name only {', '.join(HEADER_FIELDS)}")
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        raise ConfigurationError(f"Profile: the value of {name} must be printable ASCII")
