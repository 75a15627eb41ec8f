"""One HTTP/1.1 connection that POSTs: strict about what it is answered, and gone as soon as anything unexpected comes.

Parsing is llhttp's, through httptools. What it leaves open is decided here: RFC 9112, 6.1 (a response with both
framings is an attack, and so is one that is transfer-coded other than chunked), 9.5 (the answer to no question).
"""

from __future__ import annotations

import asyncio
import math
import select
import ssl
from typing import TYPE_CHECKING, Any, cast

from hookwright.transport._base import RESPONSE_HEADERS, RESPONSE_KEPT, RESPONSE_READ, Failure, Response
from hookwright.transport._dial import tls_words

if TYPE_CHECKING:
    from collections.abc import Callable

BUFFER = 64 * 1024
"""Bytes that are read at once: what the parser is given in one turn of the loop."""

_WIRE_MOST = 1024 * 1024
"""Bytes of a response, framing included, after which it is cut: endless chunk extensions carry no body."""

_PIECE = 64 * 1024
_INTERIM_COST = 64
_FRAMING = frozenset([b"content-length", b"transfer-encoding"])
_BODILESS = frozenset([204, 304])  # RFC 9112, 6.3


class _Stop(Exception):
    """Raised in a callback to stop the parser; why is in the connection's state."""


class Stale(Exception):
    """A kept connection was closed before a byte of the answer came: the receiver need not have seen the request."""


class Connection(asyncio.BufferedProtocol):
    """A dialled connection. One `post` at a time; `is_reusable` says whether there may be another."""

    __slots__ = (
        "_body",
        "_ends_with_connection",
        "_error",
        "_head_size",
        "_headers",
        "_interim_size",
        "_is_complete",
        "_is_deaf",
        "_is_interim",
        "_is_paused",
        "_looks_at",
        "_loop",
        "_parser",
        "_poll",
        "_posts",
        "_received",
        "_refused",
        "_status",
        "_timer",
        "_unsent",
        "_until",
        "_view",
        "_waiter",
        "beneath",
        "has_received",
        "is_reusable",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, make_parser: Callable[[object], Any], buffer: bytearray) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = make_parser(self)
        self._view = memoryview(buffer)  # of all connections: nothing is left in it when a turn of the loop is over
        self._poll: select.poll | None = None
        self._waiter: asyncio.Future[Response | Failure] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf
        self._until = math.inf
        self._posts = 0
        self.beneath: asyncio.Transport | None = None
        self._unsent: bytes | memoryview = b""
        self._is_paused = False
        self._error: Exception | None = None
        self.has_received = False
        self.is_reusable = False
        self._begin()

    def _begin(self) -> None:
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._received = 0
        self._head_size = 0
        self._interim_size = 0
        self._is_interim = False
        self._ends_with_connection = False
        self._is_complete = False
        self._is_deaf = False
        self._refused = ""

    # -- the sender's side --------------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether nothing came since the last answer; unread bytes in the kernel count. Else it is not used again."""
        if self.transport.is_closing() or self.has_received:
            return False
        if self._poll is None:
            if not hasattr(select, "poll"):  # Windows: what the loop has read must do
                return True
            self._poll = select.poll()
            self._poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return self._poll.poll(0) == []

    async def post(self, message: bytes, until: float) -> Response | Failure:
        """Send a whole request and return its answer, at `until` (the loop's time) at the latest. Raises Stale."""
        if self._posts:
            self._begin()
        self._posts += 1
        self.is_reusable = False
        waiter: asyncio.Future[Response | Failure] = self._loop.create_future()
        self._waiter = waiter
        try:
            if self.transport.is_closing():
                self._end_of_connection(self._error)
            else:
                self._until = until
                if until < self._looks_at:
                    self._look_at(until)
                self._unsent = message
                self._write()
            return await waiter
        finally:
            self._waiter = None
            self._unsent = b""

    def _look_at(self, when: float) -> None:
        # One timer for many posts, which looks at the latest one's end: most are over long before it.
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at, self._timer = when, self._loop.call_at(when, self._look)

    def _look(self) -> None:
        at, self._looks_at, self._timer = self._looks_at, math.inf, None
        if self._waiter is None or self._waiter.done():
            return
        if at < self._until:
            self._look_at(self._until)
        else:
            self._finish(Failure("timeout", "no complete answer within the total timeout"))

    def _write(self) -> None:
        # In pieces: TLS would encrypt all of a large request at once, three times its size, for a receiver that may
        # never read.
        while self._unsent and not self._is_paused:
            if len(self._unsent) <= _PIECE:
                piece, self._unsent = self._unsent, b""
            else:
                piece, self._unsent = self._unsent[:_PIECE], memoryview(self._unsent)[_PIECE:]
            self.transport.write(piece)

    @property
    def _is_sent(self) -> bool:
        waiting = self.transport.get_write_buffer_size()
        if self.beneath is not None:
            waiting += self.beneath.get_write_buffer_size()
        return not self._unsent and not waiting

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self.transport.abort()

    # -- asyncio's side -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        return self._view  # asyncio's TLS reads into slices of it: of a bytearray they would be copies

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            # An answer to no question, or after the answer.
            self.has_received = True
            self.is_reusable = False
            self.transport.abort()
            return
        self._received += nbytes
        try:
            self._parser.feed_data(self._view[:nbytes])
        except Exception as error:  # noqa: BLE001  # the parser's own, or what stopped it in a callback
            self._cut(str(error))
            return
        if self._is_complete:
            self._resolve(waiter, reusable=self.is_reusable and self._is_sent)
        elif self._received > (_WIRE_MOST if self._status else 2 * RESPONSE_HEADERS + self._interim_size):
            self._refused = self._refused or "response headers over 32 KiB"
            self._cut("")

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._is_paused = False
        self._write()

    def eof_received(self) -> None:
        """See asyncio.BaseProtocol."""
        self.has_received = self.has_received or self._posts > 0  # nothing may follow the end
        self._end_of_connection(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._error = exc
        self._end_of_connection(exc)
        self._parser = None  # it refers to us
        if self._timer is not None:
            self._timer.cancel()

    def _end_of_connection(self, error: Exception | None) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._status and self._ends_with_connection and error is None:
            self._is_complete = True
            self._resolve(waiter, reusable=False)
        elif not self._received and self._posts > 1:
            waiter.set_exception(Stale())
        elif isinstance(error, ssl.SSLError):  # TLS 1.3 refuses a client's certificate after the handshake
            self._finish(Failure("tls_error", tls_words(error)))
        elif error is not None:
            self._finish(Failure("connect_error", "the connection broke"))
        else:
            self._finish(Failure("protocol_error", "the receiver hung up before its answer was complete"))

    def _cut(self, words: str) -> None:
        """End what the parser, or we, would not go on with."""
        waiter = self._waiter
        assert waiter is not None
        if self._is_complete:
            self._resolve(waiter, reusable=False)  # the answer was whole; what came behind it is dropped
        elif self._is_deaf:
            self.transport.pause_reading()  # endless interim responses end by the deadline, and cost nothing until then
        else:
            self._finish(Failure("protocol_error", self._refused or words[:200]))

    def _finish(self, failure: Failure) -> None:
        """Resolve with what there is: from the head on, an answer is judged by its status, however it ended."""
        assert self._waiter is not None
        if self._status:
            self._resolve(self._waiter, reusable=False)
        else:
            self.is_reusable = False
            self._waiter.set_result(failure)

    def _resolve(self, waiter: asyncio.Future[Response | Failure], *, reusable: bool) -> None:
        self.is_reusable = reusable
        headers = tuple(
            [
                (name.decode("ascii", "replace"), value.strip().decode("utf-8", "replace"))
                for name, value in self._headers
            ]
        )
        body, self._body, self._headers = self._body, bytearray(), []
        truncated = not self._is_complete or len(body) > RESPONSE_KEPT
        waiter.set_result(Response(self._status, headers, bytes(body[:RESPONSE_KEPT]), truncated))

    # -- the parser's side --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """See httptools."""
        if self._is_complete:
            raise _Stop
        self._head_size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Also called with trailers."""
        self._head_size += len(name) + len(value) + 4  # as sent, with ": " and CRLF
        if self._head_size > RESPONSE_HEADERS:
            self._refused = f"response headers over {RESPONSE_HEADERS // 1024} KiB"
            raise _Stop
        if not self._status:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """See httptools."""
        status: int = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._is_interim = True
            if any(name.lower() in _FRAMING for name, _ in self._headers):  # RFC 9110, 8.6: there is no body
                self._refused = "an interim answer has a body"
                raise _Stop
            self._headers.clear()
            self._interim_size += self._head_size + _INTERIM_COST
            if self._interim_size > RESPONSE_HEADERS:
                self._is_deaf = True
                raise _Stop
            return
        if not 200 <= status <= 599:  # RFC 9110, 15: what a final answer may be
            self._refused = f"status {status} is no final HTTP status"
        elif not self._parser.get_http_version().startswith("1."):
            self._refused = "the answer is not HTTP/1"
        else:
            self._check_framing(status)
        if self._refused:
            raise _Stop
        self._status = status
        self.is_reusable = self.is_reusable and self._parser.should_keep_alive()

    def _check_framing(self, status: int) -> None:
        lengths = codings = 0
        for name, value in self._headers:
            match name.lower():
                case b"content-length":
                    lengths += 1
                case b"transfer-encoding":
                    codings += 1 if value.strip().lower() == b"chunked" else 2
        if lengths + codings > 1:
            self._refused = "the answer's framing is ambiguous (Content-Length, Transfer-Encoding)"
        # A body where none may be, or a coding that HTTP/1.0 does not know, may come late and be taken for an answer.
        framed = lengths + codings
        odd = (status in _BODILESS and framed) or (codings and self._parser.get_http_version() == "1.0")
        self.is_reusable = not odd
        self._ends_with_connection = not lengths and not codings and status not in _BODILESS

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._body += body
        if len(self._body) > RESPONSE_READ:
            raise _Stop

    def on_message_complete(self) -> None:
        """See httptools."""
        if self._is_interim:
            self._is_interim = False
        else:
            self._is_complete = True
