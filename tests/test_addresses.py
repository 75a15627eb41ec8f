"""Which urls and addresses may be sent to: the rows of the list of hostile targets that the policy alone decides."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookwright import ConfigurationError, NetworkPolicy, ValidationFailed
from hookwright._addresses import masked_url

# With http allowed, so that the rule on addresses refuses and not the one on schemes.
OVER_HTTP = NetworkPolicy(allow_http=True)

REFUSED_HOSTS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0X7F000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "0",
    "0x",
    "0.0.0.0",
    "10.0.0.1",
    "172.31.255.254",
    "192.168.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "192.0.0.192",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "0xffffffff",
    "192.88.99.1",
    "168.63.129.16",
    "100.64.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:a9fe:a9fe]",
    "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[fe80::1%25eth0]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[100::1]",
    "[3fff::1]",
    "[5f00::1]",
    "localhost",
    "LOCALHOST.",
    "foo.localhost",
    "metadata.google.internal",
    "127。0。0。1",
    "\uff11\uff12\uff17.0.0.1",  # full-width digits
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "127.0.0.1%00.example.com",
    "example.com@127.0.0.1",
    "example.com\\@127.0.0.1",
    "127.0.0.1?@example.com",
    "[127.0.0.1]",
    "[v1.x]",
    "/127.0.0.1",
    "127.0.0.1:0",
    "1.2.3.4.5",
    "1.2.3.256",
]

REFUSED_URLS = [
    "",
    "//127.0.0.1/",
    "https:example.com",
    "https://example.com:99999/",
    "https://example.com:0/",
    "https://example.com:x/",
    "https://[::1/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_x",
    "ftp://example.com/",
    "javascript:alert(1)",
    "data:text/plain,x",
    "https://example.com/\r\nX: 1",
    "https://example.com/\tx",
    "https://example.com/a b",
    " https://example.com/",
    "https://example.com/\x00",
    "https://example.com/\x85",
    "https://example.com/\ud800",
    "https://user:pw@example.com/",
    "https://user@example.com/",
    "https://a..b/",
    "https://-a.example/",
    "https://exa mple.com/",
    "https://exa%6dple.com/",
    "https://xn--0.example/",
    "https://" + "a" * 64 + ".example/",
    "https://" + "a." * 127 + "example/",
    "https://example.com/#fragment",
    "https://example.com/#",
    "https://example.com/" + "a" * 2048,
    "https://example.com/" + "ü" * 1000,
]


@pytest.mark.parametrize("host", REFUSED_HOSTS)
def test_a_url_to_an_inner_address_is_refused_in_every_spelling(host: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        OVER_HTTP.check_url(f"http://{host}/")
    assert refused.value.field == "url"
    assert "allow_http" not in refused.value.message  # another rule than the scheme's


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    for policy in (NetworkPolicy(), OVER_HTTP, NetworkPolicy.development()):
        with pytest.raises(ValidationFailed):
            policy.check_url(url)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValidationFailed):
        NetworkPolicy().check_url(b"https://example.com/")  # type: ignore[arg-type]  # what an untyped caller may pass


@pytest.mark.parametrize(
    ("url", "stored"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM.:443/a?b=c", "https://example.com/a?b=c"),
        ("https://example.com:8443/", "https://example.com:8443/"),
        ("https://bücher.example/ü?ä=1", "https://xn--bcher-kva.example/%C3%BC?%C3%A4=1"),
        ("https://xn--bcher-kva.example/", "https://xn--bcher-kva.example/"),
        ("https://r3---sn_a.example/%20", "https://r3---sn_a.example/%20"),
        ("https://1.1.1.1/", "https://1.1.1.1/"),
        ("https://[2606:4700:4700:0::1111]/", "https://[2606:4700:4700::1111]/"),
        ("https://example.com/?", "https://example.com/"),
    ],
)
def test_a_public_https_url_is_stored_in_one_form(url: str, stored: str) -> None:
    assert NetworkPolicy().check_url(url) == stored
    assert NetworkPolicy().check_url(stored) == stored


def test_a_refusal_names_the_field_and_the_setting_that_would_allow_it() -> None:
    cases = {
        "http://example.com/": ("allow_http=True", NetworkPolicy()),
        "http://127.0.0.1/": ("allow_loopback=True", OVER_HTTP),
        "http://localhost/": ("allow_loopback=True", OVER_HTTP),
        "http://10.1.2.3/": ("allow=[...]", OVER_HTTP),
    }
    for url, (setting, policy) in cases.items():
        with pytest.raises(ValidationFailed, match="callback: ") as refused:
            policy.check_url(url, "callback")
        assert setting in refused.value.message


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:8080", "a.localhost:1024"])
def test_development_allows_http_and_the_own_machine(host: str) -> None:
    assert NetworkPolicy.development().check_url(f"http://{host}/") == f"http://{host}/"


@pytest.mark.parametrize("address", ["10.0.0.1", "0.0.0.0", "169.254.169.254", "fe80::1", "::ffff:10.0.0.1"])
def test_development_allows_nothing_else_that_is_private(address: str) -> None:
    assert NetworkPolicy.development().vet(address) is not None


PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "192.88.98.255",
    "192.88.100.1",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2001:200::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_may_be_dialled(address: str) -> None:
    assert NetworkPolicy().vet(address) is None


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("192.168.255.255", "private"),
        ("169.254.169.254", "cloud metadata"),
        ("169.254.1.1", "link-local"),
        ("100.127.255.255", "carrier-grade NAT"),
        ("192.0.0.1", "IETF assignments"),
        ("192.0.2.1", "documentation"),
        ("198.51.100.1", "documentation"),
        ("203.0.113.1", "documentation"),
        ("198.19.255.255", "benchmarking"),
        ("192.88.99.1", "6to4 relay"),
        ("168.63.129.16", "cloud metadata"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("0.1.2.3", "this network"),
        ("2001::1", "IETF assignments"),
        ("2001:db8::1", "documentation"),
        ("3fff::1", "documentation"),
        ("2002:808:808::1", "6to4"),
        ("fc00::1", "not public"),
        ("64:ff9b:1::1", "not public"),
        ("2607:f8b0::5efe:7f00:1", "ISATAP"),
        ("2607:f8b0::200:5efe:a00:1", "ISATAP"),
        ("fd00:42::42", "cloud metadata"),
        ("169.254.42.42", "cloud metadata"),
        ("fe80::1%eth0", "scoped"),
        ("2606:4700::1%1", "scoped"),
        ("example.com", "not an address"),
        ("127.1", "not an address"),
    ],
)
def test_a_refused_address_is_refused_by_a_named_rule(address: str, rule: str) -> None:
    assert NetworkPolicy().vet(address) == rule


def test_a_network_of_ones_own_can_be_allowed() -> None:
    policy = NetworkPolicy(allow=["10.0.0.0/8", "fd00:1::/32"])
    assert policy.vet("10.1.2.3") is None
    assert policy.vet("::ffff:10.1.2.3") is None
    assert policy.vet("fd00:1::5") is None
    assert policy.vet("172.16.0.1") == "private"
    assert policy.check_url("https://10.1.2.3/") == "https://10.1.2.3/"


def test_a_policy_is_a_value() -> None:
    networks = ["10.0.0.0/8"]
    policy = NetworkPolicy(allow=networks)
    networks.append("0.0.0.0/0")
    assert policy == NetworkPolicy(allow=("10.0.0.0/8",))
    assert policy.vet("127.0.0.1") == "loopback"
    with pytest.raises(AttributeError):
        policy.allow_http = True  # type: ignore[misc]  # that it is frozen is what is tested


@pytest.mark.parametrize("allow", [["10.0.0.1/8"], ["example.com"], ["10.0.0.0/33"], "10.0.0.0/8"])
def test_an_allowed_network_that_is_none_is_an_error_of_configuration(allow: list[str] | str) -> None:
    with pytest.raises(ConfigurationError, match="allow"):
        NetworkPolicy(allow=allow)


def test_a_source_address_that_is_none_is_an_error_of_configuration() -> None:
    assert NetworkPolicy(local_address="192.0.2.1").local_address == "192.0.2.1"
    with pytest.raises(ConfigurationError, match="local_address"):
        NetworkPolicy(local_address="eth0")


# 100 examples of 100 addresses: 10,000 of each property.
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def hundred(*, v: Literal[4, 6], network: str | None = None) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.ip_addresses(v=v, network=network), min_size=100, max_size=100)


@MANY
@given(hundred(v=4))
def test_an_ipv4_address_is_judged_the_same_however_it_is_carried(addresses: list[ipaddress.IPv4Address]) -> None:
    for address in addresses:
        verdict = NetworkPolicy().vet(str(address))
        carried = int(address)
        assert NetworkPolicy().vet(str(ipaddress.IPv6Address((0xFFFF << 32) | carried))) == verdict
        assert NetworkPolicy().vet(str(ipaddress.IPv6Address((0x64FF9B << 96) | carried))) == verdict


@MANY
@given(hundred(v=6))
def test_nothing_but_global_unicast_and_carried_ipv4_is_public(addresses: list[ipaddress.IPv6Address]) -> None:
    for address in addresses:
        carried = int(address) >> 32 in {0xFFFF, 0x64FF9B << 64}
        if not carried and int(address) >> 125 != 0b001:
            assert NetworkPolicy().vet(str(address)) is not None


@MANY
@given(hundred(v=6, network="::/8"))
def test_everything_in_the_first_eighth_is_refused_but_public_ipv4_that_it_carries(
    addresses: list[ipaddress.IPv6Address],
) -> None:
    for address in addresses:
        carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        carries = int(address) >> 32 in {0xFFFF, 0x64FF9B << 64}
        assert NetworkPolicy().vet(str(address)) is not None or (carries and NetworkPolicy().vet(str(carried)) is None)


@MANY
@given(hundred(v=6, network="2002::/16"))
def test_every_6to4_address_is_refused(addresses: list[ipaddress.IPv6Address]) -> None:
    assert {NetworkPolicy().vet(str(address)) for address in addresses} == {"6to4"}


@pytest.mark.parametrize("port", [1, 22, 25, 80, 1023, 2375, 3306, 5432, 6000, 6379, 6667, 9200, 10080, 11211, 27017])
def test_a_port_of_another_service_is_refused_unless_it_is_allowed(port: int) -> None:
    with pytest.raises(ValidationFailed, match=rf"allow_ports=\[{port}\]"):
        NetworkPolicy().check_url(f"https://example.com:{port}/")
    assert NetworkPolicy(allow_ports=[port]).check_url(f"https://example.com:{port}/")


@pytest.mark.parametrize("port", [443, 1024, 8080, 8443, 65535])
def test_a_port_for_the_web_is_allowed(port: int) -> None:
    assert NetworkPolicy().check_url(f"https://example.com:{port}/")
    assert NetworkPolicy(allow_http=True).check_url("http://example.com:80/") == "http://example.com/"


@pytest.mark.parametrize("ports", [25, [0], [65536], ["25"], [True]])
def test_an_allowed_port_that_is_none_is_an_error_of_configuration(ports: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="allow_ports"):
        NetworkPolicy(allow_ports=ports)


@pytest.mark.parametrize(
    ("network", "address"),
    [
        ("169.254.0.0/16", "169.254.169.254"),
        ("169.254.0.0/16", "::ffff:169.254.169.254"),
        ("169.254.0.0/16", "169.254.170.2"),
        ("100.64.0.0/10", "100.100.100.200"),
        ("192.0.0.0/24", "192.0.0.192"),
        ("168.63.0.0/16", "168.63.129.16"),
        ("fd00::/8", "fd00:ec2::254"),
        ("0.0.0.0/0", "169.254.169.254"),
    ],
)
def test_metadata_stays_refused_within_an_allowed_network_unless_it_is_named_itself(network: str, address: str) -> None:
    assert NetworkPolicy(allow=[network]).vet(address) == "cloud metadata"
    plain = address.removeprefix("::ffff:")
    assert NetworkPolicy(allow=[plain]).vet(address) is None


def test_a_name_of_metadata_is_refused_even_where_loopback_is_allowed() -> None:
    for policy in (OVER_HTTP, NetworkPolicy.development()):
        with pytest.raises(ValidationFailed, match="metadata"):
            policy.check_url("http://metadata.google.internal/computeMetadata/v1/")
    named = NetworkPolicy(allow_http=True, allow=["169.254.169.254"])
    assert named.check_url("http://metadata.google.internal/")


def test_a_delegated_policy_parses_strictly_and_judges_no_address() -> None:
    policy = NetworkPolicy.delegated()
    assert policy.check_url("https://10.0.0.1:25/") == "https://10.0.0.1:25/"
    assert policy.check_url("https://localhost/") == "https://localhost/"
    assert policy.vet("127.0.0.1") is None
    for url in ("http://example.com/", "https://user@example.com/", "https://a..b/", "https://example.com/a b"):
        with pytest.raises(ValidationFailed):
            policy.check_url(url)
    assert NetworkPolicy.delegated(allow_http=True).check_url("http://example.com/") == "http://example.com/"
    assert policy != NetworkPolicy()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com/hooks", "https://example.com/hooks"),
        ("https://example.com/hooks?token=s3cret&a=b", "https://example.com/hooks?***"),
        ("https://example.com/T0/B00/s3cret-s3cret-s3cret", "https://example.com/T0/B00/***"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_token(url: str, shown: str) -> None:
    assert masked_url(url) == shown
