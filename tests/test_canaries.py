"""No secret, header value, url token or event data is shown, whatever fails: canaries on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest

from hookwright import (
    DirectTransport,
    Dispatcher,
    Endpoint,
    HttpxTransport,
    NetworkPolicy,
    NewEvent,
    Page,
    Payload,
    Profile,
    RetryPolicy,
    Secret,
    Timeouts,
)
from hookwright.testing._transport_contract_base import (
    HOST,
    OK_HEAD,
    Row,
    good,
    receiving,
    row,
    serving,
    serving_unknown,
    trusting,
)
from hookwright.testing._transport_contract_endings import ANSWERS, ENDINGS
from hookwright.testing._transport_contract_framing import AMBIGUOUS, CHUNKS, HEADS, LENGTHS
from hookwright.testing._transport_contract_tls import HANDSHAKES
from tests import canaries
from tests.canaries import ATTRIBUTE, DATA, GIVEN, HEADERS, IDEMPOTENCY, OLD, PATH, Collector, collecting

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from hookwright import Delivery, Transport
    from hookwright.testing._transport_contract_base import Answer, Peer

KINDS = pytest.mark.parametrize("kind", [HttpxTransport, DirectTransport])
QUICK = Timeouts(total=6.0, connect=4.0, dns=2.0)  # a hundred others are at work, and all is logged
MADE = b"content-length: 0\r\n\r\n"


# -- receivers that echo ----------------------------------------------------------------------------------------


def echoes(make: Callable[[bytes, bytes], bytes], *, closes: bool = False) -> Answer:
    """Answer with what is made of the request's head and body."""

    async def answer(peer: Peer) -> None:
        whole = await peer.request()
        head, _, body = whole.partition(b"\r\n\r\n")
        await peer.say(make(head, body))
        if closes:
            peer.writer.close()
        else:
            await peer.gone()

    return answer


def _line(head: bytes, body: bytes = b"") -> bytes:
    return head.replace(b"\r\n", b" | ") + body


def _with_body(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def _headers(head: bytes, body: bytes) -> bytes:
    lines = b"".join(b"x-echo-%d: %b\r\n" % pair for pair in enumerate(head.split(b"\r\n")))
    return b"HTTP/1.1 500 No\r\nretry-after: %b\r\nset-cookie: %b\r\n" % (_line(head), _line(head)) + lines + MADE


def _json(head: bytes, body: bytes) -> bytes:
    known = {"head": head.decode(), "secrets": [GIVEN, OLD, *OLD.split("_")], "own": list(HEADERS.values())}
    plain = json.dumps(known)
    text = plain + plain.replace("/", "\\/")
    for character in "+&<>":
        text += plain.replace(character, f"\\u{ord(character):04X}")
    text += plain.replace('\\"', "\\u0022")
    keys = [canaries._key(name) for name in ("given", "old")]
    return _with_body(b"500 No", (text + " ".join(key.hex() for key in keys)).encode())


ECHOES = [
    row("in the body", echoes(lambda head, body: _with_body(b"500 No", head + body))),
    row("in the body of a success", echoes(lambda head, body: _with_body(b"200 OK", head + body))),
    row("in the body of 410", echoes(lambda head, body: _with_body(b"410 Gone", head + body))),
    row("in the body of 429", echoes(lambda head, body: _with_body(b"429 Wait", head + body))),
    row("as JSON, with what it knows", echoes(_json)),
    row("in headers", echoes(_headers)),
    row("in the reason", echoes(lambda head, body: b"HTTP/1.1 500 " + _line(head, body) + b"\r\n" + MADE)),
    row("in a name", echoes(lambda head, _: OK_HEAD + head.split(b"?token=")[1].split()[0] + b": a\r\n" + MADE)),
    row("in a bad header", echoes(lambda head, body: OK_HEAD + _line(head, body) + b"\r\n\r\n")),
    row("in a bad status line", echoes(lambda head, body: _line(head, body) + b"\r\n\r\n")),
    row("in a bad status", echoes(lambda head, body: b"HTTP/1.1 " + _line(head, body) + b"\r\n\r\n")),
    row("in a bad version", echoes(lambda head, body: b"HTTP/" + _line(head, body) + b" 200 OK\r\n\r\n")),
    row("in the length", echoes(lambda head, body: OK_HEAD + b"content-length: " + _line(head, body) + b"\r\n\r\n")),
    row("in the coding", echoes(lambda head, _: OK_HEAD + b"transfer-encoding: " + _line(head) + b"\r\n\r\n")),
    row("in a chunk's size", echoes(lambda head, _: OK_HEAD + b"transfer-encoding: chunked\r\n\r\n" + _line(head))),
    row("in an interim answer", echoes(lambda head, _: b"HTTP/1.1 103 E\r\nlink: " + _line(head) + b"\r\n\r\n")),
    row("as it came", echoes(lambda head, body: head + b"\r\n\r\n" + body)),
    row("cut off in the url", echoes(lambda head, _: OK_HEAD + b"content-length: 9999\r\n\r\n"
        + head.rpartition(b"%2B")[0], closes=True)),
    row("cut off in a secret", echoes(lambda *_: OK_HEAD + b"content-length: 9999\r\n\r\n" + GIVEN[:20].encode(),
        closes=True)),
]  # fmt: skip

ROWS = [*ENDINGS, *ANSWERS, *AMBIGUOUS, *HEADS, *CHUNKS[:3], *LENGTHS[:3], *ECHOES]


# -- the world --------------------------------------------------------------------------------------------------


async def names(host: str, port: int) -> list[str]:
    """Resolve, or fail as a resolver can."""
    if host == "nowhere.example":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if host == "broken.example":
        raise RuntimeError(PATH)
    if host == "slow.example":
        await asyncio.sleep(60)
    return ["10.1.1.1"] if host == "private.example" else [] if host == "empty.example" else ["127.0.0.1"]


def transport_of(kind: type[Transport]) -> Transport:
    return kind(network=NetworkPolicy.development(), ssl_context=trusting(), resolver=names)  # type: ignore[call-arg]  # one of ours


class Target(NamedTuple):
    name: str
    url: str
    profile: str = "default"


def profiles() -> dict[str, Profile]:
    once = RetryPolicy.schedule(0)
    return {
        "default": Profile(retry=once, timeouts=QUICK),
        "proving": Profile(retry=once, timeouts=QUICK, client_certificate=canaries.certificate()),
    }


@asynccontextmanager
async def targets(rows: Sequence[Row]) -> AsyncIterator[list[Target]]:
    """Run a receiver for each row, and add what no receiver is needed for."""
    async with AsyncExitStack() as stack:

        async def run(answer: Answer, context: ssl.SSLContext | None = None, *, bare: bool = False) -> str:
            receiver = await stack.enter_async_context(receiving(answer, context, bare=bare))
            return receiver.url().partition("/hook?")[0] + PATH

        found = [Target(each.name, await run(each.answer)) for each in rows]
        found += [Target(each.name, await run(each.answer, serving(), bare=True), "proving") for each in HANDSHAKES]
        found.append(Target("wrong name", await run(good, serving("other.example")), "proving"))
        found.append(Target("unknown", await run(good, serving_unknown()), "proving"))
        found.append(Target("echo, TLS", await run(ECHOES[0].answer, serving()), "proving"))
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))
        found.append(Target("refused", f"http://{HOST}:{nobody.getsockname()[1]}{PATH}"))
        lost = ("nowhere", "broken", "slow", "private", "empty")
        found += [Target(name, f"https://{name}.example{PATH}") for name in lost]
        yield found


async def subscribe(dispatcher: Dispatcher, url: str, profile: str = "default") -> Endpoint:
    """Create an endpoint with canaries everywhere, whose old secret still signs."""
    endpoint = await dispatcher.endpoints.create(
        url, events=["*"], filters={"who": [ATTRIBUTE]}, headers=HEADERS, secret=OLD, profile=profile
    )
    return await dispatcher.endpoints.rotate_secret(endpoint.id, secret=Secret(GIVEN), overlap=timedelta(hours=1))


async def emit(dispatcher: Dispatcher, key: str = IDEMPOTENCY) -> str:
    return (await dispatcher.emit("a.b", DATA, attributes={"who": ATTRIBUTE}, idempotency_key=key)).event_id


async def look(dispatcher: Dispatcher, collector: Collector, event_id: str) -> list[Delivery]:
    """Look at everything that an application can read."""
    show = collector.show
    event = await dispatcher.events.get(event_id)
    page: Page[Delivery] = await dispatcher.deliveries.list(event_id=event_id, limit=500)
    endpoints = await dispatcher.endpoints.list(limit=500)
    explanation = await dispatcher.explain("a.b", DATA, attributes={"who": ATTRIBUTE})
    show("read", event, page, endpoints, explanation, dispatcher, await dispatcher.health())
    show(
        "parts", dispatcher._storage, dispatcher._transport, dispatcher._vault, *dispatcher._preparer._profiles.values()
    )
    show("asked", NewEvent("a.b", DATA, {"who": ATTRIBUTE}, None, IDEMPOTENCY), Secret(GIVEN), canaries.ENCRYPTION)
    for endpoint in endpoints:
        show("endpoint", endpoint, await dispatcher.endpoints.stats(endpoint.id))
    for delivery in page:
        attempts = await dispatcher.deliveries.attempts(delivery.id)
        show("attempts", delivery, attempts)
        for attempt in attempts:
            collector.note("detail", f"{attempt.error} {attempt.detail}")
            collector.note("headers", repr(attempt.response_headers))
            collector.note("body", attempt.response_text, canaries.secrets())
        payload = await dispatcher.deliveries.payload(delivery.id)
        look_at_payload(collector, payload)
    return list(page)


def look_at_payload(collector: Collector, payload: Payload) -> None:
    collector.show("payload", payload)
    collector.note("payload's headers", repr(payload.headers))
    collector.note("payload's body", payload.body.decode(), canaries.secrets())


def storage_of(kind: type[Transport], path: Path) -> str:
    return "memory:" if kind is DirectTransport else f"sqlite:///{path / 'hooks.db'}"


async def sweep(kind: type[Transport], rows: Sequence[Row], storage: str, collector: Collector) -> set[str | None]:
    """Send to all of the targets once and look at what came of it; return the errors that they ended with."""
    async with (
        targets(rows) as found,
        Dispatcher(
            storage,
            transport=transport_of(kind),
            network=NetworkPolicy.development(),
            profiles=profiles(),
            keys=[canaries.ENCRYPTION],
            operational_events=True,
        ) as dispatcher,
    ):
        dispatcher.observe(collector.observe)
        for target in found:
            collector.show("created", await subscribe(dispatcher, target.url, target.profile))
        event_id = await emit(dispatcher)
        deliveries = await dispatcher.deliveries.wait(event_id, timeout=20)
        await look(dispatcher, collector, event_id)
    return {delivery.last_error for delivery in deliveries}


CODES = {"timeout", "connect_timeout", "connect_error", "protocol_error", "tls_error", "dns_error", "blocked_target"}


@KINDS
async def test_no_failing_receiver_makes_a_canary_sing(
    kind: type[Transport], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with collecting() as collector:
        ended = await sweep(kind, ROWS, storage_of(kind, tmp_path), collector)
    collector.note("output", "".join(capfd.readouterr()))
    assert collector.leaks == []
    assert ended == CODES | {"http_status", None}
    assert collector.looked_at > 1000


@KINDS
async def test_asyncios_own_debugging_tells_nothing(kind: type[Transport], tmp_path: Path) -> None:
    async with collecting(debug=True) as collector:
        await sweep(kind, ECHOES[:6], storage_of(kind, tmp_path), collector)
    assert collector.leaks == []
