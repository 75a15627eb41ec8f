"""NetworkPolicy: where may be sent to. Decided by a table on the address that is dialled, never on a name's text."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

import idna

from hookwright._errors import ConfigurationError, ValidationFailed

URL_LENGTH = 2048
"""Characters of an endpoint's url at most."""

_Network = IPv4Network | IPv6Network
_Address = IPv4Address | IPv6Address

# IANA special-purpose registries, and 168.63.129.16 (a cloud's metadata on a public address). `is_global` is not
# enough: it calls multicast, NAT64 of a loopback and several IPv6 carriers of private IPv4 global.
_REFUSED_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "cloud metadata",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "IETF assignments",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
_REFUSED_V6 = {
    "2001::/23": "IETF assignments",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
}
_TABLE: tuple[tuple[_Network, str], ...] = tuple(
    (ipaddress.ip_network(text), rule) for text, rule in (_REFUSED_V4 | _REFUSED_V6).items()
)
_PUBLIC_V6 = IPv6Network("2000::/3")
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))

_LOCAL_NAMES = re.compile(r"(.*\.)?localhost|metadata\.google\.internal")
_NUMERIC = re.compile(r"(.*\.)?(0[xX][0-9a-fA-F]*|[0-9]+)")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy:
    """Which urls and addresses endpoints may have. By default: https, to public addresses.

    `allow_http` allows http as well; `allow_loopback` the own machine; `allow` networks of yours, as CIDR texts.
    `local_address` is the source address of every connection. The url is checked when an endpoint is created, and
    every address its name resolves to at every dial: if one of them is refused, nothing is sent.

    Raises ConfigurationError for an `allow` that is no network.

    ```python
    from hookwright import NetworkPolicy

    inside = NetworkPolicy(allow=["10.20.0.0/16"])
    print(inside.check_url("https://example.com/hooks"))
    ```
    """

    allow_http: bool = False
    allow_loopback: bool = False
    allow: tuple[str, ...] | list[str] = ()
    local_address: str | None = None

    def __post_init__(self) -> None:
        for text in self.allow:
            try:
                ipaddress.ip_network(text)
            except ValueError as error:
                raise ConfigurationError(f"allow: {text!r} is no network such as '10.0.0.0/8': {error}") from None

    @classmethod
    def development(cls) -> NetworkPolicy:
        """Return the policy for one's own machine: http and loopback are allowed too."""
        return cls(allow_http=True, allow_loopback=True)

    def check_url(self, url: str, field: str = "url") -> str:
        """Return the url in the form that is stored. Raises ValidationFailed, naming the rule."""
        if not isinstance(url, str) or not url or len(url) > URL_LENGTH:
            raise ValidationFailed(field, f"must be text of 1 to {URL_LENGTH} characters, such as https://example.com/")
        if _FORBIDDEN.search(url):
            raise ValidationFailed(field, "holds a space, a control character or a backslash: percent-encode it")
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise ValidationFailed(field, f"is no url: {error}") from None
        self._check_scheme(parts.scheme, field)
        if "@" in parts.netloc:
            raise ValidationFailed(field, "holds a user or password: use headers={'Authorization': ...}")
        if not host or port == 0 or parts.fragment or "#" in url:
            raise ValidationFailed(field, "needs a host, a port above 0 if any, and no fragment (#)")
        host = self._check_host(host, field, bracketed="[" in parts.netloc)
        default = {"http": 80, "https": 443}[parts.scheme]
        netloc = host if port in {None, default} else f"{host}:{port}"
        path = _ascii(parts.path) or "/"
        return f"{parts.scheme}://{netloc}{path}" + (f"?{_ascii(parts.query)}" if parts.query else "")

    def _check_scheme(self, scheme: str, field: str) -> None:
        if scheme not in {"http", "https"}:
            raise ValidationFailed(field, "must start with https://")
        if scheme == "http" and not self.allow_http:
            raise ValidationFailed(
                field, "must be https: plain http shows every event to the network (NetworkPolicy(allow_http=True))"
            )

    def _check_host(self, host: str, field: str, *, bracketed: bool) -> str:
        address = _literal(host, field, bracketed=bracketed)
        if address is None:
            host = _to_ascii(host, field)
            address = _literal(host, field, bracketed=False)
        if address is None:
            if _LOCAL_NAMES.fullmatch(host) and not self.allow_loopback:
                raise ValidationFailed(
                    field,
                    f"{host} is a name of this machine or its cloud (NetworkPolicy.development() allows loopback)",
                )
            return host
        rule = self.vet(str(address))
        if rule is not None:
            raise ValidationFailed(
                field, f"is a refused address ({rule}); NetworkPolicy(allow=[...]) allows networks of yours"
            )
        return f"[{address}]" if address.version == 6 else str(address)  # IPv6

    def vet(self, address: str) -> str | None:
        """Return None when the address may be dialled, else the rule that refuses it."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return "not an address"
        if isinstance(parsed, IPv6Address) and parsed.scope_id is not None:
            return "scoped"
        if isinstance(parsed, IPv6Address) and (parsed in _MAPPED or parsed in _NAT64):
            # It is the IPv4 address it carries that would be reached.
            parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
        if self._allowed(parsed):
            return None
        if isinstance(parsed, IPv6Address) and parsed not in _PUBLIC_V6:
            return "loopback" if parsed.is_loopback else "not public"
        return next((rule for network, rule in _TABLE if parsed in network), None)

    def _allowed(self, address: _Address) -> bool:
        if self.allow_loopback and any(address in network for network in _LOOPBACK):
            return True
        return any(address in ipaddress.ip_network(text) for text in self.allow)


def _literal(host: str, field: str, *, bracketed: bool) -> _Address | None:
    """Return the address that the text is, in every spelling that a resolver would take for one."""
    if bracketed:
        try:
            return IPv6Address(host)
        except ValueError:
            raise ValidationFailed(field, "holds brackets without an IPv6 address") from None
    if not _NUMERIC.fullmatch(host.rstrip(".")):
        return None
    try:
        # 2130706433, 0x7f000001, 0177.1 and 127.1 are names to ipaddress, and 127.0.0.1 to getaddrinfo.
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        raise ValidationFailed(field, "has a host that ends in a number and is no IPv4 address") from None


def _to_ascii(host: str, field: str) -> str:
    try:
        encoded = idna.encode(host.removesuffix("."), uts46=True, std3_rules=False).decode().lower()
    except (idna.IDNAError, UnicodeError) as error:
        raise ValidationFailed(field, f"has no valid host name: {error}") from None
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", encoded):
        raise ValidationFailed(field, "has no valid host name: use letters, digits, - and dots")
    return encoded


def _ascii(text: str) -> str:
    """Percent-encode what is not ASCII (RFC 3986, 2.5), and nothing else."""
    return "".join(c if c.isascii() else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)
