"""What a Dispatcher is given: checked when it is made, not when it is first needed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta

from hookwright._addresses import NetworkPolicy
from hookwright._catalogue import Catalogue
from hookwright._clock import Clock
from hookwright._delivery import longest_timeout
from hookwright._errors import ConfigurationError
from hookwright._health import HealthPolicy
from hookwright._profile import Profile
from hookwright._vault import EncryptionKey, Vault
from hookwright.storage._base import Storage
from hookwright.storage.memory import MemoryStorage
from hookwright.storage.postgres import PostgresStorage
from hookwright.storage.sqlite import SQLiteStorage
from hookwright.transport._base import NetworkBound, Transport
from hookwright.transport.httpx import HttpxTransport

_logger = logging.getLogger("hookwright")


def check_settings(
    profiles: Mapping[str, Profile],
    concurrency: int,
    endpoint_concurrency: int,
    lease: float,
    shutdown_timeout: float,
    retention: timedelta | None,
) -> None:
    """Raise ConfigurationError for settings that do not go together."""
    for name, profile in profiles.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ConfigurationError(f"profiles: {name!r} is no name: give printable text")
        if not isinstance(profile, Profile):
            raise ConfigurationError(f"profiles: {name!r} must be a Profile, not {type(profile).__name__}")
    if retention is not None and not isinstance(retention, timedelta):
        raise ConfigurationError(f"retention: must be a timedelta, such as timedelta(days=30), not {retention!r}")
    for name, value in (("concurrency", concurrency), ("endpoint_concurrency", endpoint_concurrency)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name}: must be a whole number of at least 1, not {value!r}")
    longest = max(profile.timeouts.total for profile in profiles.values())
    if longest > longest_timeout(lease):
        raise ConfigurationError(
            f"lease: {lease:g} s must be at least the longest total timeout + 10 s: {longest + 10:g} s"
        )
    if shutdown_timeout < 0:
        raise ConfigurationError("shutdown_timeout: must be 0 or more seconds")
    if retention is not None and retention <= timedelta(0):
        raise ConfigurationError("retention: must be more than 0, or None to keep everything")


def health_policy(disable_after: timedelta | None) -> HealthPolicy:
    """Return the policy. Raises ConfigurationError."""
    if disable_after is None:
        return HealthPolicy(disable_after=None)
    if not isinstance(disable_after, timedelta) or disable_after <= timedelta(0):
        raise ConfigurationError("disable_after: must be a timedelta of more than 0, or None to never disable")
    return HealthPolicy(disable_after=disable_after // timedelta(microseconds=1))


def id_prefix(prefix: str) -> str:
    """Return what ids begin with, without the underscore. Raises ConfigurationError."""
    if not isinstance(prefix, str) or not re.fullmatch(r"[a-z][a-z0-9]{0,15}_?", prefix):
        raise ConfigurationError(f"endpoint_id_prefix: {prefix!r} must be up to 16 of a-z and 0-9, such as 'whk_'")
    return prefix.removesuffix("_")


def check_parts(profiles: object, network: object, transport: object, clock: object, catalogue: object) -> None:
    """Raise ConfigurationError for parts that are not what they should be; None is the default."""
    wanted: dict[str, tuple[object, type]] = {
        "profiles": (profiles, Mapping),
        "network": (network, NetworkPolicy),
        "transport": (transport, Transport),
        "clock": (clock, Clock),
        "catalogue": (catalogue, Catalogue),
    }
    for name, (part, kind) in wanted.items():
        if isinstance(part, type):
            raise ConfigurationError(f"{name}: give an object, {part.__name__}(...), not the class")
        if part is not None and not isinstance(part, kind):
            raise ConfigurationError(
                f"{name}: must be a {kind.__name__}, not {type(part).__name__}{_lacks(part, kind)}"
            )
    if isinstance(catalogue, Catalogue) and isinstance(profiles, Mapping):
        for profile in profiles.values():
            catalogue.check_envelope(getattr(profile, "envelope", None))


def _lacks(part: object, kind: type) -> str:
    missing = [name for name in ("send", "aclose") if kind is Transport and not hasattr(part, name)]
    return f" (it has no {' and no '.join(missing)})" if missing else ""


def network_of(network: NetworkPolicy | None, transport: Transport | None) -> NetworkPolicy:
    """Return the policy: the one given, or the transport's own, or the default."""
    own = transport.network if isinstance(transport, NetworkBound) else None
    return network or own or NetworkPolicy()


def vault_of(keys: Sequence[EncryptionKey] | None, storage: Storage) -> Vault:
    """Return what seals with these keys; None: nothing does, and a durable storage is warned of. ConfigurationError."""
    if keys is None:
        return Vault(on_clear=None if isinstance(storage, MemoryStorage) else _warn_of_clear_text)
    # What was given instead is not shown: it may well be a key. An empty text is a variable that was not set.
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise ConfigurationError(f"keys: give a list, such as keys=[EncryptionKey(...)], not {type(keys).__name__}")
    for key in keys:
        if not isinstance(key, EncryptionKey):
            raise ConfigurationError(f"keys: must hold EncryptionKey('id', ...) only, not {type(key).__name__}")
    return Vault(keys)


def _warn_of_clear_text() -> None:
    _logger.warning(
        "endpoints' secrets are stored in clear text: give keys=[EncryptionKey(...)], or keys=[] if that is meant"
    )


def storage_of(storage: str | Storage) -> Storage:
    """Return the storage that a text names. Raises ConfigurationError."""
    if isinstance(storage, Storage):
        return storage
    if storage == "memory:":
        return MemoryStorage()
    if isinstance(storage, str) and storage.startswith(("postgresql:", "postgres:", "postgresql+")):
        return PostgresStorage(storage)
    path = storage.removeprefix("sqlite:///") if isinstance(storage, str) else ""
    if path in ("", storage) or path.startswith(":"):
        scheme, found, _ = str(storage).partition("://")  # what follows may hold a password, and so may all of it
        shown = f"'{scheme}://...'" if found else "what was given"
        raise ConfigurationError(
            f"storage: {shown} is no storage: use 'sqlite:///hooks.db', 'sqlite:////absolute/hooks.db',"
            " 'postgresql://user:password@host/database', 'memory:' or an instance of Storage (wrap one by a subclass)"
        )
    return SQLiteStorage(path)


def transport_of(transport: Transport | None, network: NetworkPolicy) -> Transport:
    """Return the transport, ours if None is given; one of ours that has no policy of its own keeps to `network`."""
    transport = transport or HttpxTransport()
    if isinstance(transport, NetworkBound):
        transport.keep_to(network)
    return transport
