"""NetworkPolicy: where may be sent to. Decided by a table on the address that is dialled, never on a name's text."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import idna

from hookwright._errors import ConfigurationError, ValidationFailed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

URL_LENGTH = 2048
"""Characters of an endpoint's url at most."""

_Network = IPv4Network | IPv6Network
_Address = IPv4Address | IPv6Address

# IANA special-purpose registries. `is_global` is not enough: it calls multicast, NAT64 of a loopback and several IPv6
# carriers of private IPv4 global.
_REFUSED_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
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

# Where clouds hand out credentials, and whoever can make us ask there has them. Some lie within networks that an
# application may have a reason to allow; these stay refused even then, unless one is named by itself.
_METADATA: frozenset[_Address] = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "192.0.0.192",
        "169.254.0.23",
        "169.254.42.42",
        "fd00:42::42",
        "fd00:ec2::23",
        "fd00:ec2::253",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
)

_LOCAL_NAMES = re.compile(r"(.*\.)?localhost")
_METADATA_NAMES = frozenset(["metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"])
_ENDS_IN_NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# urlsplit drops tabs and line ends silently, and what reads a backslash as a slash sees another host than we do.
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\\ud800-\udfff]")
DEFAULT_PORTS = {"http": 80, "https": 443}
_MASK = "***"
_TOKEN_LENGTH = 16
"""Characters of a part of a path that is taken for a token."""

_TOKEN_LEAST = 8
"""Characters of a query's value that is taken for a token: shorter ones are found in any text."""

# Services that take an HTTP request's lines for commands (the bad ports of the WHATWG Fetch standard, of which those
# below 1024 are closed anyway), and data stores and daemons that obey whoever reaches them.
_BAD_PORTS = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080}
)
_DATA_PORTS = frozenset({2375, 2376, 2379, 3306, 5432, 6379, 9200, 11211, 27017})
_REFUSED_PORTS = _BAD_PORTS | _DATA_PORTS


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy:
    """Which urls and addresses endpoints may have. By default: https, to public addresses.

    `allow_http` allows http as well; `allow_loopback` the own machine; `allow` networks of yours, as CIDR texts.
    `local_address` is the source address of every connection (only targets of its family can be reached then).
    Ports are 443, 80 where http is allowed, and 1024 up without those of databases and of the WHATWG Fetch standard's
    bad ports; `allow_ports` adds some. A cloud's metadata addresses stay refused within `allow`, unless one is named
    by itself (`"169.254.169.254/32"`). The url is checked when an endpoint is created, and every address its name
    resolves to at every dial: if one of them is refused, nothing is sent.

    What is public is an explicit table made from the IANA special-purpose address registries (RFC 6890), applied to
    the address that is dialled; an IPv4-mapped or NAT64 address (RFC 6052) is judged as the IPv4 address it carries.

    Raises ConfigurationError for an `allow` that is no network, a port that is none, and a `local_address` that is no
    address.

    ```python
    from hookwright import NetworkPolicy

    inside = NetworkPolicy(allow=["10.20.0.0/16"])
    print(inside.check_url("https://example.com/hooks"))
    print(inside.vet("10.20.0.1"), inside.vet("127.0.0.1"))
    ```
    """

    allow_http: bool = False
    allow_loopback: bool = False
    allow: Sequence[str] = ()
    allow_ports: Collection[int] = ()
    local_address: str | None = None
    is_delegated: bool = field(default=False, init=False)
    _networks: tuple[_Network, ...] = field(default=(), init=False, repr=False, compare=False)
    _named: frozenset[_Address] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.allow, str):
            raise ConfigurationError(f"allow: must be a sequence such as [{self.allow!r}], not one text")
        networks = tuple(_network(text) for text in self.allow)
        object.__setattr__(self, "allow", tuple(self.allow))
        object.__setattr__(self, "_networks", networks + (_LOOPBACK if self.allow_loopback else ()))
        named = frozenset(network.network_address for network in networks if network.num_addresses == 1)
        object.__setattr__(self, "_named", named)
        object.__setattr__(self, "allow_ports", _ports(self.allow_ports))
        if self.local_address is not None and _parsed(self.local_address) is None:
            raise ConfigurationError(f"local_address: {self.local_address!r} is no IP address")

    @classmethod
    def development(cls) -> NetworkPolicy:
        """Return the policy for one's own machine: http and loopback are allowed too."""
        return cls(allow_http=True, allow_loopback=True)

    @classmethod
    def delegated(cls, *, allow_http: bool = False) -> NetworkPolicy:
        """Return the policy of an application whose own transport or egress proxy judges addresses.

        Urls are still parsed strictly and must be https (or http, where `allow_http`); which address a name has, and
        whether it may be reached, is then not ours to decide: any address and port passes. Needed by
        `HttpxTransport(inner)`, and for nothing else: ours refuses it.
        """
        policy = cls(allow_http=allow_http)
        object.__setattr__(policy, "is_delegated", True)
        return policy

    def check_url(self, url: str, field: str = "url") -> str:
        """Return the url in its canonical form: lower-case ASCII host, no default port, a path.

        Decides what the text alone can decide; a name's addresses are judged when they are dialled. Raises
        ValidationFailed, which names `field`, the rule, and the setting that would allow it where there is one.
        """
        if not isinstance(url, str) or not 1 <= len(url) <= URL_LENGTH:
            raise ValidationFailed(field, f"must be text of 1 to {URL_LENGTH} characters, such as https://example.com/")
        if _FORBIDDEN.search(url):
            raise ValidationFailed(field, "holds a space, a control character or a backslash: percent-encode it")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValidationFailed(field, "is no url: its host or port cannot be read") from None
        self._check_scheme(parts.scheme, field)
        _check_parts(parts, port, url, field)
        host = self._check_host(parts, field)
        if not self.permits_port(port or DEFAULT_PORTS[parts.scheme]):
            raise ValidationFailed(
                field, f"has the refused port {port}; NetworkPolicy(allow_ports=[{port}]) would allow it"
            )
        netloc = host if port in {None, DEFAULT_PORTS[parts.scheme]} else f"{host}:{port}"
        query = f"?{_ascii(parts.query)}" if parts.query else ""
        canonical = f"{parts.scheme}://{netloc}{_ascii(parts.path) or '/'}{query}"
        if len(canonical) > URL_LENGTH:
            raise ValidationFailed(field, f"must have at most {URL_LENGTH} characters once it is percent-encoded")
        return canonical

    def _check_scheme(self, scheme: str, field: str) -> None:
        if scheme not in DEFAULT_PORTS:
            raise ValidationFailed(field, "must start with https://, such as https://example.com/webhooks")
        if scheme == "http" and not self.allow_http:
            raise ValidationFailed(
                field,
                "must be https: plain http shows every event to the network (on your own machine:"
                " NetworkPolicy.development(), elsewhere NetworkPolicy(allow_http=True))",
            )

    def _check_host(self, parts: SplitResult, field: str) -> str:
        address, host = _host(parts, field)
        if address is None:
            self._check_name(host, field)
            return host
        rule = self.vet(str(address))
        if rule is not None:
            raise ValidationFailed(field, f"has a refused address ({rule}); {advice(rule)}")
        return f"[{address}]" if address.version == 6 else str(address)  # RFC 3986, 3.2.2: IPv6 in brackets

    def _check_name(self, host: str, field: str) -> None:
        if self.is_delegated:
            return
        if _LOCAL_NAMES.fullmatch(host) and not self.allow_loopback:
            raise ValidationFailed(field, f"has a host that names this machine; {advice('loopback')}")
        if host in _METADATA_NAMES and not self._named & _METADATA:
            raise ValidationFailed(
                field,
                "has a host that names its cloud's metadata; NetworkPolicy(allow=['169.254.169.254']) would allow it",
            )

    def permits_port(self, port: int) -> bool:
        """Whether the port may be dialled."""
        if self.is_delegated or port in self.allow_ports or port == 443:
            return True
        if port < 1024:
            return port == 80 and self.allow_http
        return port not in _REFUSED_PORTS

    def vet(self, address: str) -> str | None:
        """Return None when the address may be dialled, else the name of the rule that refuses it."""
        if self.is_delegated:
            return None
        parsed = _parsed(address)
        if parsed is None:
            return "not an address"
        if isinstance(parsed, IPv6Address) and parsed.scope_id is not None:
            return "scoped"
        if isinstance(parsed, IPv6Address) and (parsed in _MAPPED or parsed in _NAT64):
            # It is the IPv4 address it carries that would be reached.
            parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
        if parsed in _METADATA and parsed not in self._named:
            return "cloud metadata"
        if any(parsed in network for network in self._networks):
            return None
        if isinstance(parsed, IPv6Address) and (int(parsed) >> 32) & 0xFDFFFFFF == 0x5EFE:
            return "ISATAP"  # RFC 5214, 6.1: the interface id carries an IPv4 address
        if isinstance(parsed, IPv6Address) and parsed not in _PUBLIC_V6:
            return "loopback" if parsed.is_loopback else "not public"
        return next((rule for network, rule in _TABLE if parsed in network), None)


def masked_url(url: str) -> str:
    """Return a url as it may be shown: many carry their token in the query, or as a long part of the path."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _MASK
    path = "/".join(_MASK if len(part) >= _TOKEN_LENGTH else part for part in parts.path.split("/"))
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{path}{f'?{_MASK}' if parts.query else ''}"


def tokens_of(url: str) -> list[str]:
    """Return the parts of a url that may be its token, as they are written there."""
    parts = urlsplit(url)
    values = [pair.partition("=")[2] or pair for pair in parts.query.split("&")]
    found = [value for value in values if len(value) >= _TOKEN_LEAST]
    return found + [part for part in parts.path.split("/") if len(part) >= _TOKEN_LENGTH]


def advice(rule: str) -> str:
    """Return what would allow what this rule refuses."""
    if rule == "scheme":
        return "use https"
    setting = {
        "loopback": "allow_loopback=True",
        "cloud metadata": "allow=[that very address]",
        "plain http": "allow_http=True",
        "port": "allow_ports=[...]",
    }.get(rule, "allow=[...]")
    return f"NetworkPolicy({setting}) would allow it"


def _ports(ports: Collection[int]) -> frozenset[int]:
    try:
        found = frozenset(ports)
    except TypeError:
        raise ConfigurationError(f"allow_ports: must be a collection such as [25], not {ports!r}") from None
    for port in found:
        if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
            raise ConfigurationError(f"allow_ports: {port!r} is no port from 1 to 65535")
    return found


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigurationError(f"allow: {text!r} is no network such as '10.0.0.0/8': {error}") from None


def _parsed(address: str) -> _Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


def _check_parts(parts: SplitResult, port: int | None, url: str, field: str) -> None:
    if "@" in parts.netloc:
        raise ValidationFailed(field, "holds a user or password: use headers={'Authorization': ...}")
    if not parts.hostname:
        raise ValidationFailed(field, "needs a host, such as https://example.com/")
    if port == 0:
        raise ValidationFailed(field, "must have a port from 1 to 65535, if any")
    if "#" in url:
        raise ValidationFailed(field, "must not have a fragment (#): it would never be sent")


def _host(parts: SplitResult, field: str) -> tuple[_Address | None, str]:
    """Return the address that the host is, in every spelling a resolver would take for one, or else the name."""
    host = parts.hostname or ""
    if "[" in parts.netloc:
        try:
            return IPv6Address(host), host
        except ValueError:
            raise ValidationFailed(field, "has brackets without an IPv6 address in them") from None
    name = _to_ascii(host, field)
    if not _ENDS_IN_NUMBER.fullmatch(name):
        return None, name
    try:
        # 2130706433, 0x7f000001, 0177.1 and 127.1 are names to ipaddress, and 127.0.0.1 to getaddrinfo.
        return IPv4Address(socket.inet_aton(name)), name
    except OSError:
        raise ValidationFailed(field, "has a host that ends in a number and is no IPv4 address") from None


def _to_ascii(host: str, field: str) -> str:
    name = host.removesuffix(".").lower()
    if not name.isascii() or "xn--" in name:
        try:
            name = idna.encode(name, uts46=True, std3_rules=False).decode().lower()
        except UnicodeError as error:  # idna.IDNAError is one
            raise ValidationFailed(field, f"has no valid host name: {error}") from None
    if not _NAME.fullmatch(name):
        raise ValidationFailed(field, "has no valid host name: use letters, digits, - and dots")
    return name


def _ascii(text: str) -> str:
    """Percent-encode what is not ASCII (RFC 3986, 2.5), and nothing else."""
    return "".join(c if c.isascii() else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)
