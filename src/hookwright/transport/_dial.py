"""From a host's name to a connection: resolve, vet every address, dial exactly a vetted one, check the peer, TLS.

Both transports connect here and nowhere else. Nothing is decided on a name's text: an address is judged at every dial,
so that a name cannot change its mind between the check and the connection (DNS rebinding has no window).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
from collections import deque
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard, TypeVar

from hookwright._addresses import NetworkPolicy, advice
from hookwright._errors import ConfigurationError
from hookwright.transport._resolver import NoThreadLeft, SystemResolver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookwright.transport._resolver import Resolver

ADDRESSES_MOST = 64
"""Addresses of one name that are accepted; more is no host, but an attempt to keep us dialling."""

HANDSHAKES_AT_ONCE = 2
"""TLS handshakes that begin in one turn of the loop, if it is quick."""

HANDSHAKE_EACH = 0.004
"""Seconds of a turn for which another handshake begins in the next: where the loop is slow, they are no slower."""

NEXT_ADDRESS = 0.25
"""Seconds after which the next address is tried as well (RFC 8305, 5)."""


def own_network(network: NetworkPolicy | None) -> NetworkPolicy:
    """Return the policy that a transport of ours keeps to. Raises ConfigurationError for one that decides nothing."""
    if network is not None and network.is_delegated:
        raise ConfigurationError(
            "network: delegated() leaves addresses to another transport, HttpxTransport(inner); ours checks them itself"
        )
    return network or NetworkPolicy()


class DialFailed(Exception):
    """No connection. `code` is the attempt's; the text is safe to show: it names neither host nor address."""

    code = "connect_error"


class BlockedTarget(DialFailed):
    """The policy refuses the scheme, the port, or an address of the host."""

    code = "blocked_target"

    def __init__(self, rule: str) -> None:
        super().__init__(f"the network policy refuses the target ({rule}); {advice(rule)}")


class DNSFailed(DialFailed):
    """The host has no address, or none in time."""

    code = "dns_error"


class ConnectTimedOut(DialFailed):
    """No connection, or no TLS handshake, in time."""

    code = "connect_timeout"


class TLSFailed(DialFailed):
    """The TLS handshake failed."""

    code = "tls_error"


class OutOfResources(DialFailed):
    """Something of this machine's own ran out; the receiver has no part in it."""

    code = "local_error"


class AuthFailed(DialFailed):
    """A step that would prove who we are cannot be done; then nothing is sent."""

    code = "auth_error"


class Dialled(Protocol):
    """A protocol that keeps its transport from `connection_made` on, and whose transport may become a secure one."""

    transport: asyncio.Transport
    beneath: asyncio.Transport | None

    @property
    def has_received(self) -> bool:
        """Whether bytes came before any were sent."""
        ...


D = TypeVar("D", bound=Dialled)


class Target(NamedTuple):
    """Where to, and how long it may take (seconds)."""

    host: str
    port: int
    dns_timeout: float
    connect_timeout: float


class Handshakes:
    """Lets TLS handshakes begin a few in each turn of the loop, which each of them holds for a millisecond or two."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_turning = False
        self._begun = 0.0
        self._room = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Return when one may begin."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # what another one left undone will not be called any more
            self._loop, self._is_turning = loop, False
            self._waiting.clear()
        if not self._is_turning:
            self._begin_turn(loop, HANDSHAKES_AT_ONCE)
        if self._room > 0:
            self._room -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin_turn(self, loop: asyncio.AbstractEventLoop, room: int) -> None:
        self._is_turning, self._begun, self._room = True, loop.time(), room
        while self._waiting and self._room > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # its connection was given up meanwhile
                turn.set_result(None)
                self._room -= 1
        loop.call_soon(self._next_turn, loop)

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_turning = bool(self._waiting)
        if self._waiting:
            took = loop.time() - self._begun
            self._begin_turn(loop, max(HANDSHAKES_AT_ONCE, int(took / HANDSHAKE_EACH)))


class Reached(NamedTuple):
    """A connected socket, when (the loop's time) a TLS handshake must be over, and what it waits its turn at."""

    socket: socket.socket
    until: float
    handshakes: Handshakes


class Dialler:
    """Connects to what the policy permits. `resolver` replaces the system's."""

    def __init__(self, network: NetworkPolicy | None, resolver: Resolver | None) -> None:
        self.network = network
        self._policy = own_network(network)
        self._kept: NetworkPolicy | None = None
        self._handshakes = Handshakes()
        self._own_resolver = SystemResolver() if resolver is None else None
        self._resolver: Resolver = resolver or self._own_resolver  # type: ignore[assignment]  # one of them is there

    def close(self) -> None:
        """Let the threads of a resolver of ours end."""
        if self._own_resolver is not None:
            self._own_resolver.close()

    def keep_to(self, network: NetworkPolicy) -> None:
        """Judge by a dispatcher's policy, where none was given. Raises ConfigurationError for a second, other one."""
        if self.network is not None:
            return
        policy = own_network(network)
        if self._kept not in {None, policy}:
            raise ConfigurationError(
                "transport: it keeps to another dispatcher's network already: give it a network= of its own, or make"
                " one for each dispatcher"
            )
        self._kept = self._policy = policy

    def check_scheme(self, scheme: str) -> None:
        """Raise BlockedTarget for plain http, unless it is allowed: the endpoint may be older than the policy."""
        if scheme not in {"http", "https"}:
            raise BlockedTarget("scheme")
        if scheme == "http" and not self._policy.allow_http:
            raise BlockedTarget("plain http")

    async def connect(self, target: Target) -> Reached:
        """Connect, TCP only. Raises DialFailed."""
        if not self._policy.permits_port(target.port):
            raise BlockedTarget("port")
        addresses = await self._addresses(target)
        for address in addresses:
            rule = self._policy.vet(address)
            if rule is not None:
                raise BlockedTarget(rule)
        ours = self._of_our_family(addresses)
        if not ours:
            raise DialFailed("no address of the source address's family")
        until = asyncio.get_running_loop().time() + target.connect_timeout
        try:
            async with asyncio.timeout_at(until):
                found = self._dial(ours[0], target.port) if len(ours) == 1 else self._race(ours, target.port)
                return Reached(await found, until, self._handshakes)
        except TimeoutError:
            raise ConnectTimedOut("no connection in time") from None

    async def _addresses(self, target: Target) -> Sequence[str]:
        try:
            return [str(ipaddress.ip_address(target.host))]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(target.dns_timeout):
                addresses = await self._resolver(target.host, target.port)
        except TimeoutError:
            raise DNSFailed("no answer in time") from None
        except socket.gaierror as error:
            _check_room()
            raise DNSFailed(error.strerror or "no such name") from None
        except NoThreadLeft as error:
            raise OutOfResources(str(error)) from None
        except Exception as error:  # noqa: BLE001  # a resolver may be the application's; what it raises is its failure
            if lacks(error):
                raise lacking(error) from None
            raise DNSFailed(f"the resolver failed ({type(error).__name__})") from None
        if not addresses:
            raise DNSFailed("the name has no address")
        if len(addresses) > ADDRESSES_MOST:
            raise DNSFailed(f"the name has more than {ADDRESSES_MOST} addresses")
        return addresses

    def _of_our_family(self, addresses: Sequence[str]) -> Sequence[str]:
        """Return those that the source address can reach, the families in turn (RFC 8305, 4)."""
        if self._policy.local_address is not None:
            version = ipaddress.ip_address(self._policy.local_address).version
            return [address for address in addresses if ipaddress.ip_address(address).version == version]
        first = ":" in addresses[0]
        families = ([a for a in addresses if (":" in a) is same] for same in (first, not first))
        return [address for address in chain.from_iterable(zip_longest(*families)) if address is not None]

    async def _race(self, addresses: Sequence[str], port: int) -> socket.socket:
        """Happy eyeballs (RFC 8305): one more address every 250 ms, or as soon as one failed; the first wins."""
        waiting = list(reversed(addresses))
        dialling: set[asyncio.Task[socket.socket]] = set()
        failure: DialFailed = OutOfResources("no connection")
        try:
            while waiting or dialling:
                if waiting:
                    dialling.add(asyncio.get_running_loop().create_task(self._dial(waiting.pop(), port)))
                done, dialling = await asyncio.wait(
                    dialling, timeout=NEXT_ADDRESS if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                reached = [task.result() for task in done if task.exception() is None]
                for surplus in reached[1:]:
                    surplus.close()
                if reached:
                    return reached[0]
                for task in done:
                    error = task.exception()
                    if not isinstance(error, DialFailed) or isinstance(error, BlockedTarget):
                        assert error is not None
                        raise error  # one refused address refuses the name
                    if isinstance(failure, OutOfResources) or not isinstance(error, OutOfResources):
                        failure = error  # what a receiver did says more than what we lacked
            raise failure
        finally:
            for task in dialling:
                task.cancel()
                task.add_done_callback(_close)

    async def _dial(self, address: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            # With the protocol named: asyncio sets TCP_NODELAY only then, and without it a body that is written after
            # its head waits 40 ms for the receiver's delayed acknowledgement.
            dialled = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        except OSError as error:
            raise _no_connection(error) from None
        try:
            dialled.setblocking(False)
            if self._policy.local_address is not None:
                dialled.bind((self._policy.local_address, 0))
            # A literal address, for which asyncio asks no resolver and no executor.
            await asyncio.get_running_loop().sock_connect(dialled, (address, port))
            peer = dialled.getpeername()[0]
        except OSError as error:
            dialled.close()
            raise _no_connection(error, address) from None
        except BaseException:
            dialled.close()
            raise
        rule = self._policy.vet(peer)
        if rule is not None:
            dialled.close()
            raise BlockedTarget(rule)
        return dialled


_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def _is_reachable(address: str) -> bool:
    """Whether this machine has an address from which that one could be reached; if not, no port was lacking."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return False
    return True


def _check_room() -> None:
    """Raise OutOfResources when no socket can be had: a look-up that needed one does not say so."""
    try:
        socket.socket().close()
    except OSError as error:
        raise _no_connection(error) from None


def lacks(error: BaseException) -> TypeGuard[OSError]:
    """Say whether it was raised for want of something of this machine's own."""
    return isinstance(error, OSError) and error.errno in _OURS


def lacking(error: OSError) -> OutOfResources:
    """Return what says so."""
    return OutOfResources(os.strerror(error.errno or 0).lower())


def _no_connection(error: OSError, address: str = "") -> DialFailed:
    if lacks(error) or (error.errno == errno.EADDRNOTAVAIL and _is_reachable(address)):
        return lacking(error)
    return DialFailed("no connection: refused, reset or unreachable")


async def attach(factory: Callable[[], D], reached: Reached) -> D:
    """Put a protocol on a connected socket. It may be called with data before this returns: uvloop reads at once."""
    try:
        _, protocol = await asyncio.get_running_loop().create_connection(
            factory,  # type: ignore[type-var]  # what is Dialled is an asyncio protocol as well
            sock=reached.socket,
        )
    except BaseException:
        reached.socket.close()
        raise
    return protocol


async def secure(protocol: Dialled, tls: ssl.SSLContext, host: str, reached: Reached) -> None:
    """Do the TLS handshake, for the name `host`; the connection is closed when it fails. Raises DialFailed."""
    plain = protocol.transport
    try:
        # The receiver is not to blame for what waits here: that counts against the attempt's total timeout alone.
        loop = asyncio.get_running_loop()
        left = reached.until - loop.time()
        await reached.handshakes.turn()
        async with asyncio.timeout(left):
            if protocol.has_received:
                raise TLSFailed("the receiver sent plain text before the TLS handshake")
            if plain.is_closing():
                raise ConnectionResetError
            transport = await loop.start_tls(
                plain,
                protocol,  # type: ignore[arg-type]  # the same
                tls,
                server_hostname=host,
            )
    except BaseException as error:  # noqa: BLE001  # raised again, in our own words where it has any
        # asyncio leaves the socket of a cancelled handshake to the garbage collector.
        plain.abort()
        raise _handshake_error(error) from None
    assert transport is not None
    protocol.transport, protocol.beneath = transport, plain


def _handshake_error(error: BaseException) -> BaseException:
    match error:
        case TimeoutError():
            return ConnectTimedOut("no TLS handshake in time")
        case ssl.SSLError():
            return TLSFailed(tls_words(error))
        case OSError():
            return DialFailed("the connection broke during the TLS handshake")
        case _:
            return error


def tls_words(error: ssl.SSLError) -> str:
    """OpenSSL's own words, without the host that its text for a mismatch repeats."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if "match" in error.verify_message:
            return "the certificate is for another host"
        return f"certificate verify failed: {error.verify_message}"
    return (error.reason or "the TLS handshake failed").replace("_", " ").lower()


def _close(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
