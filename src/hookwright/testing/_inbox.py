"""Inbox: a real receiver on loopback, to test against and to look at webhooks on one's own machine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from hookwright._clock import SECOND, Clock
from hookwright.receiver import Revealing, VerificationFailed, Verifier

if TYPE_CHECKING:
    from types import TracebackType

_HEAD_LIMIT = 64 * 1024
_BODY_LIMIT = 1024 * 1024


@dataclass(frozen=True)
class Received:
    """One request, from the address `source`.

    `verified` is None when the Inbox knows no secret; `error` says why a signature did not fit.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes
    received_at: datetime
    verified: bool | None = None
    error: str | None = None
    source: str = ""

    @property
    def event_id(self) -> str | None:
        """The `webhook-id`: the same on every attempt."""
        return self.headers.get("webhook-id")

    def json(self) -> object:
        """Return the body, parsed."""
        return json.loads(self.body)


Reply = int | tuple[int, Mapping[str, str], bytes]
Responder = Reply | Callable[[Received], "Reply | Awaitable[Reply]"]


class Inbox:
    """Receives webhooks over HTTP on 127.0.0.1, keeps them in `received`, and verifies them when it knows a secret.

    It answers `status`, or what `respond_with` says. Give it the `clock` of a dispatcher that lives in virtual time:
    the age of signatures is judged by it. `echo=print` shows every webhook as it comes, with control characters
    escaped. Bodies over 1 MiB and anything that is not HTTP/1.1 with a Content-Length are answered 400.

    ```python
    from hookwright import Dispatcher, NetworkPolicy
    from hookwright.testing import Inbox

    async with Inbox() as inbox, Dispatcher("memory:", network=NetworkPolicy.development()) as dispatcher:
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["*"])
        inbox.expect(endpoint.secret)
        await dispatcher.emit("video.processed", {"video_id": "vid_123"})
        [webhook] = await inbox.wait_for(1)
        print(webhook.verified, webhook.json()["type"])
    ```
    """

    def __init__(
        self,
        *secrets: str | Revealing,
        status: int = 200,
        port: int = 0,
        echo: Callable[[str], object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._now = time.time if clock is None else (lambda: clock.wall() / SECOND)
        self._verifiers: list[Verifier] = []
        for secret in secrets:
            self.expect(secret)
        self._responders: list[Responder] = [status]
        self._port = port
        self._echo = echo
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[object] | None] = {}
        self._arrived = asyncio.Condition()
        self.received: list[Received] = []

    @property
    def url(self) -> str:
        """Where it listens, such as `http://127.0.0.1:49152/`."""
        return self.url_for("/")

    def url_for(self, path: str) -> str:
        """Return the url of a path: every path is served."""
        return f"http://127.0.0.1:{self._port}{path}"

    def expect(self, secret: str | Revealing | Verifier | None) -> None:
        """Verify signatures by this secret too: the one that `endpoints.create` returned. Any other scheme: a Verifier.

        Raises ValueError for what is no secret.
        """
        if secret is None:
            raise ValueError("this endpoint carries no secret: take the one that endpoints.create returned")
        self._verifiers.append(secret if isinstance(secret, Verifier) else Verifier(secret, now=self._now))

    def respond_with(self, *responders: Responder) -> None:
        """Answer so: one for each request from now on, the last one for all that follow.

        A responder is a status, a (status, headers, body), or a function of `Received` that returns one of these.
        """
        self._responders = list(responders) or [200]

    async def wait_for(self, count: int, *, timeout: float = 5.0) -> list[Received]:
        """Return what was received, as soon as that is `count`. Raises TimeoutError."""
        async with asyncio.timeout(timeout), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= count)
        return list(self.received)

    def clear(self) -> None:
        """Forget what was received."""
        self.received.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=_HEAD_LIMIT)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        serving = dict(self._connections)
        for writer, task in serving.items():
            writer.transport.abort()
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in serving.values() if task is not None))
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections[writer] = asyncio.current_task()
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Ours, from closing: raised on, it would reach the loop's exception handler instead of us.
            pass
        finally:
            del self._connections[writer]
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            received = await self._read(head, reader, str(writer.get_extra_info("peername")[0]))
        except (asyncio.LimitOverrunError, ValueError):
            writer.write(_answer((400, {"connection": "close"}, b"not a webhook")))
            await writer.drain()
            return False
        self.received.append(received)
        if self._echo is not None:
            self._echo(_shown(received))
        async with self._arrived:
            self._arrived.notify_all()
        responder = self._responders.pop(0) if len(self._responders) > 1 else self._responders[0]
        if callable(responder):
            reply = responder(received)
            responder = await reply if isinstance(reply, Awaitable) else reply
        if writer.is_closing():  # to which uvloop lets nobody write
            return False
        writer.write(_answer(responder if isinstance(responder, tuple) else (responder, {}, b"")))
        await writer.drain()
        return True

    async def _read(self, head: bytes, reader: asyncio.StreamReader, source: str) -> Received:
        request_line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else -1
        if not 0 <= length <= _BODY_LIMIT:
            raise ValueError("a webhook has a Content-Length of at most 1 MiB")
        body = await reader.readexactly(length)
        verified, error = self._verify(body, headers)
        return Received(method, path, headers, body, datetime.now(UTC), verified, error, source)

    def _verify(self, body: bytes, headers: Mapping[str, str]) -> tuple[bool | None, str | None]:
        error: str | None = None
        for verifier in self._verifiers:
            try:
                verifier.verify(body, headers)
            except VerificationFailed as failed:
                error = str(failed)
            else:
                return True, None
        return (False, error) if self._verifiers else (None, None)


def _answer(reply: tuple[int, Mapping[str, str], bytes]) -> bytes:
    status, headers, body = reply
    lines = [f"HTTP/1.1 {status} Inbox", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


_SIGNATURES: Mapping[bool | None, str] = {True: "verified", False: "NOT VERIFIED", None: "not checked"}


def _shown(received: Received) -> str:
    try:
        body = json.dumps(received.json(), indent=2)
    except ValueError:
        body = received.body.decode("utf-8", "backslashreplace")
    lines: Sequence[str] = [
        f"{received.method} {received.path}  {received.event_id or '-'}  signature: {_SIGNATURES[received.verified]}",
        *(f"  {line}" for line in body.split("\n")),
    ]
    # Whatever was received is data: nothing in it may move the cursor or colour the terminal.
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)
