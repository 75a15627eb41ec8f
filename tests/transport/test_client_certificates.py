"""Client certificates: presented where the profile says so, and nothing is ever sent without when they cannot be."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trustme

from hookwright import (
    ClientCertificate,
    ConfigurationError,
    DirectTransport,
    Dispatcher,
    Failure,
    HttpxTransport,
    NetworkPolicy,
    Profile,
    Request,
    Response,
    ValidationFailed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hookwright import Transport

LOCAL = NetworkPolicy.development()
RECEIVERS = trustme.CA()
SENDERS = trustme.CA()
BOTH = pytest.mark.parametrize("kind", [HttpxTransport, DirectTransport])


def certificate(name: str = "sender@hooks.example") -> ClientCertificate:
    issued = SENDERS.issue_cert(name)
    chain = "".join(blob.bytes().decode() for blob in issued.cert_chain_pems)
    return ClientCertificate(chain, issued.private_key_pem.bytes().decode())


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    RECEIVERS.configure_trust(context)
    return context


class Receiver:
    """Answers 200, and knows who sent: the name in the client's certificate, or None."""

    def __init__(self) -> None:
        self.url = ""
        self.senders: list[str | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length[15:]))
                shown: Any = writer.get_extra_info("peercert")
                self.senders.append(shown["subjectAltName"][0][1] if shown else None)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving(asks: ssl.VerifyMode = ssl.CERT_REQUIRED) -> AsyncIterator[Receiver]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    RECEIVERS.issue_cert("127.0.0.1").configure_cert(context)
    SENDERS.configure_trust(context)
    context.verify_mode = asks
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=context)
    receiver.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    try:
        yield receiver
    finally:
        server.close()


@asynccontextmanager
async def sending(kind: type[HttpxTransport | DirectTransport]) -> AsyncIterator[Transport]:
    transport = kind(network=LOCAL, ssl_context=trusting())
    try:
        yield transport
    finally:
        await transport.aclose()


def request(url: str, shown: ClientCertificate | None, endpoint_id: str = "ep_1") -> Request:
    return Request(url, (), b"{}", endpoint_id=endpoint_id, revision=1, total_timeout=5.0, client_certificate=shown)


@BOTH
async def test_a_receiver_that_asks_for_a_certificate_gets_the_profiles_and_no_other_endpoint_shows_it(
    kind: type[HttpxTransport | DirectTransport],
) -> None:
    async with receiving(ssl.CERT_OPTIONAL) as receiver, sending(kind) as transport:
        mine = certificate()
        for shown, endpoint_id in ((mine, "a"), (None, "b"), (certificate("other@hooks.example"), "c"), (mine, "a")):
            answer = await transport.send(request(receiver.url, shown, endpoint_id))
            assert isinstance(answer, Response), answer
        assert receiver.senders == ["sender@hooks.example", None, "other@hooks.example", "sender@hooks.example"]


@BOTH
async def test_a_receiver_that_demands_one_refuses_whoever_has_none(
    kind: type[HttpxTransport | DirectTransport],
) -> None:
    async with receiving() as receiver, sending(kind) as transport:
        refused = await transport.send(request(receiver.url, None))
        assert isinstance(refused, Failure)
        assert refused.code in {"tls_error", "connect_error", "protocol_error"}
        assert isinstance(await transport.send(request(receiver.url, certificate(), "ep_2")), Response)
        assert receiver.senders == ["sender@hooks.example"]


@BOTH
async def test_what_cannot_present_it_sends_nothing(
    kind: type[HttpxTransport | DirectTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = certificate()
    async with receiving(ssl.CERT_NONE) as receiver, sending(kind) as transport:
        plain = await transport.send(request(receiver.url.replace("https", "http"), shown))
        assert plain == Failure("auth_error", "a client certificate needs https")
        monkeypatch.setattr(ClientCertificate, "load_into", _unreadable)
        broken = await transport.send(request(receiver.url, shown))
        assert broken == Failure("auth_error", "the client certificate cannot be used (PermissionError)")
        monkeypatch.undo()
        assert isinstance(await transport.send(request(receiver.url, shown)), Response)  # the next one tries again
        assert len(receiver.senders) == 1


def _unreadable(shown: ClientCertificate, context: ssl.SSLContext) -> None:
    raise PermissionError("a path")


async def test_another_inner_transport_cannot_present_it_and_so_gets_no_request() -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(200)

    transport = HttpxTransport(httpx2.MockTransport(answer), network=NetworkPolicy.delegated())
    failure = await transport.send(request("https://hooks.example/", certificate()))
    assert isinstance(failure, Failure)
    assert failure.code == "auth_error"
    assert asked == []


async def test_a_profile_presents_it_and_wants_https() -> None:
    async with (
        receiving() as receiver,
        Dispatcher(
            "memory:",
            network=LOCAL,
            transport=DirectTransport(ssl_context=trusting()),
            profiles={"bank": Profile(client_certificate=certificate())},
        ) as dispatcher,
    ):
        with pytest.raises(ValidationFailed, match="must be https"):
            await dispatcher.endpoints.create("http://127.0.0.1:8080/", events=["*"], profile="bank")
        await dispatcher.endpoints.create(receiver.url, events=["*"], profile="bank")
        receipt = await dispatcher.emit("video.processed", {})
        [delivery] = await dispatcher.deliveries.wait(receipt.event_id, timeout=10)
        assert delivery.state == "succeeded"
        assert receiver.senders == ["sender@hooks.example"]


def test_a_certificate_is_read_at_once_and_shows_nothing(tmp_path: Path) -> None:
    issued = SENDERS.issue_cert("sender@hooks.example")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(chain))
    issued.private_key_pem.write_to_path(str(key))
    read = ClientCertificate.from_files(chain, key)
    assert read.key.strip() == key.read_text().strip()
    assert "PRIVATE" not in f"{read!r} {read} {Profile(client_certificate=read)!r}"
    other = SENDERS.issue_cert("other@hooks.example").private_key_pem.bytes().decode()
    for wrong in ((read.certificate, other), ("", read.key), (read.certificate, ""), ("x", "y")):
        with pytest.raises(ConfigurationError, match="client_certificate") as refused:
            ClientCertificate(*wrong)
        assert "PRIVATE" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        ClientCertificate.from_files(tmp_path / "none.pem", key)
    with pytest.raises(ConfigurationError, match="client_certificate"):
        Profile(client_certificate="client.pem")  # type: ignore[arg-type]  # what an untyped caller may pass


def test_a_key_under_a_password_needs_it_and_never_asks_the_terminal() -> None:
    from cryptography.hazmat.primitives import serialization

    issued = SENDERS.issue_cert("sender@hooks.example")
    chain = issued.cert_chain_pems[0].bytes().decode()
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"open sesame"),
    ).decode()
    assert ClientCertificate(chain, locked, "open sesame").password == "open sesame"
    for password in (None, "wrong"):
        with pytest.raises(ConfigurationError, match="client_certificate"):
            ClientCertificate(chain, locked, password)
