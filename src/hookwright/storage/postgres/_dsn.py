"""What an address says: read once, shown without its password, and handed on as the driver takes it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from hookwright._errors import ConfigurationError

_ADVICE = "use a URL: postgresql://user:password@host:5432/database, with special characters percent-encoded"

# libpq's, and poolers' of other languages, which asyncpg would send to the server as settings of the session.
_NOT_OURS = {
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "connection_limit",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "pgbouncer",
    "pool_timeout",
    "sslcompression",
    "tcp_user_timeout",
}

# What users of other libraries try.
_ELSEWHERE = {
    "ssl": "that is SQLAlchemy's; write sslmode=",
    "schema": "give it beside the address: PostgresStorage(..., schema=...)",
    "pool_size": "give it beside the address: PostgresStorage(..., connections=...)",
}


class Address(NamedTuple):
    """An address: what may be `shown` of it, and the `dsn` that the driver takes."""

    shown: str
    dsn: str


def read_dsn(dsn: object) -> Address:
    """Read an address, once for all who connect to it. Raises ConfigurationError, showing nothing."""
    if isinstance(dsn, str) and "," in dsn.partition("?")[0].rpartition("@")[2].partition("/")[0]:
        raise ConfigurationError(
            "dsn: several hosts go behind the question mark: postgresql://user@/database?host=a,b&port=5432,5432"
        )
    try:
        url = urlsplit(dsn) if isinstance(dsn, str) else urlsplit("")
        scheme, host, port = url.scheme, url.hostname or "", url.port
    except ValueError:
        raise ConfigurationError(f"dsn: it cannot be read; {_ADVICE}") from None
    if scheme.startswith("postgresql+"):
        raise ConfigurationError(f"dsn: {scheme}:// is SQLAlchemy's; take out the driver: postgresql://...")
    # The driver would take what is behind the first one for the host, and ask a name server for it.
    has_two_hosts = url.netloc.count("@") > 1
    options = parse_qsl(url.query, keep_blank_values=True)
    is_cut = "@" in url.path or url.fragment or any("@" in name for name, _ in options)  # in the password
    if scheme not in {"postgresql", "postgres"} or has_two_hosts or is_cut:
        raise ConfigurationError(f"dsn: it cannot be read; {_ADVICE}")
    for name, _ in options:
        if name in _ELSEWHERE:
            raise ConfigurationError(f"dsn: {name}: {_ELSEWHERE[name]}")
    kept = urlencode([(name, value) for name, value in options if name not in _NOT_OURS])
    given = dict(options)
    where = (f"[{host}]" if ":" in host else host) or given.get("host", "")
    at = port or given.get("port")
    database = url.path.strip("/") or given.get("database") or given.get("dbname") or ""
    shown = (f"{where}:{at}" if at else where) + (f"/{database}" if database else "")
    return Address(f"postgresql://{shown}", url._replace(query=kept).geturl())


def check_files(dsn: str) -> None:
    """Raise ConfigurationError for a certificate or key that an address names and that is not there."""
    for name, path in parse_qsl(urlsplit(dsn).query):
        if name in {"sslrootcert", "sslcert", "sslkey", "sslcrl"} and not Path(path).is_file():
            raise ConfigurationError(f"dsn: {name}: there is no file {path!r}")
