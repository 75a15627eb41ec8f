"""The transport contract: urls that must never be dialled, whoever let them into the database."""

from __future__ import annotations

import functools
import socket
import sys

import pytest

from hookwright._addresses import NetworkPolicy
from hookwright.testing._transport_contract_base import OPEN, ContractBase, good

STRICT = NetworkPolicy(allow_http=True)
"""With http allowed, so that the rule on addresses refuses and not the one on schemes."""

INNER = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "0",
    "0.0.0.0",  # noqa: S104  # dialled, and nothing is bound to it
    "10.0.0.1",
    "172.31.255.254",
    "192.168.0.1",
    "169.254.169.254/latest/meta-data",
    "169.254.170.2",
    "192.0.0.192",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "0xffffffff",
    "192.88.99.1",
    "100.64.0.1",
    "168.63.129.16",
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
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[100::1]",
    "[3fff::1]",
    "[5f00::1]",
    "localhost",
    "foo.localhost",
    "metadata.google.internal",
]
"""Hosts that are an inner address, in whatever spelling, or that a resolver answers with one."""

MALFORMED = [
    "http://[fe80::1%25eth0]/",
    "http://127。0。0。1/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "http://127.0.0.1%00.example.com/",
    "http://example.com@127.0.0.1/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1?@example.com/",
    "http://[127.0.0.1]/",
    "http:///127.0.0.1/",
    "//127.0.0.1/",
    "http://127.0.0.1:0/",
    "https://example.com:99999/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_x",
    "ftp://example.com/",
    "javascript:alert(1)",
    "data:text/plain,x",
    "https://example.com/\r\nX: 1",
    "https://example.com/\tx",
    "https://user:pw@example.com/",
    "https://a..b/",
    "no url",
]
"""What no endpoint can be created with, and a database may hold all the same."""

PORTS = [25, 22, 1, 1023, 6379, 5432, 11211, 6000, 10080]


async def _inner(host: str, port: int) -> list[str]:
    """Answer as the system's resolver does for a number, and with an inner address for a name."""
    try:
        return [socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))]
    except OSError:
        return ["169.254.169.254" if host.startswith("metadata") else "127.0.0.1"]


_DIALLED: list[str] = []


@functools.cache
def _listen() -> None:
    # An audit hook cannot be taken away again; all sockets of the process pass it, whichever library opens them.
    sys.addaudithook(lambda event, given: _DIALLED.append(given[1][0]) if event == "socket.connect" else None)


class DiallingContract(ContractBase):
    """What a test of dialling needs to know."""

    @pytest.fixture
    def dialled(self) -> list[str]:
        """Every address that a socket of this process is connected to."""
        _listen()
        _DIALLED.clear()
        return _DIALLED


class TargetContract(DiallingContract):
    """No socket is opened for what the policy refuses, and the failure names the rule, never the address."""

    @pytest.mark.parametrize("host", INNER)
    async def test_an_inner_address_is_not_dialled_in_any_spelling(self, host: str, dialled: list[str]) -> None:
        async with self.facing(good, network=STRICT, resolver=_inner) as encounter:
            # transport_error: some clients take 0177.0.0.1 for no url at all.
            failure = await encounter.fails("blocked_target", "transport_error", url=f"http://{host}/")
            assert dialled == []
            assert not {"127.0.0.1", "169.254.169.254", host} & set(failure.detail.split())

    @pytest.mark.parametrize("url", MALFORMED)
    async def test_a_malformed_url_is_a_failure_and_opens_no_socket(self, url: str, dialled: list[str]) -> None:
        async with self.facing(good, network=STRICT, resolver=_inner) as encounter:
            await encounter.fails("blocked_target", "dns_error", "protocol_error", "transport_error", url=url)
            assert dialled == []

    @pytest.mark.parametrize("port", PORTS)
    async def test_a_port_of_another_service_is_not_dialled(self, port: int, dialled: list[str]) -> None:
        async with self.facing(good, network=OPEN, resolver=_inner) as encounter:
            await encounter.fails("blocked_target", url=f"https://example.com:{port}/")
            await encounter.fails("blocked_target", url=f"http://127.0.0.1:{port}/", revision=2)
            assert dialled == []
