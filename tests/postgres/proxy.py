"""A TCP proxy between driver and server that misbehaves as it is told, while connections live.

    async with Proxy(postgres_dsn) as proxy:
        connection = await asyncpg.connect(proxy.dsn)
        proxy.on_message = at_statement("COMMIT", Action.CUT_AFTER)

What passes can be bytes (`to_server` and `to_client`: delayed, swallowed, cut after so many) or messages of the
frontend (`on_message`): each is numbered, and cut or left without an answer at its boundary.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.postgres.wire import Answers, Frontend, Message

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Callable, Coroutine


class Action(enum.Enum):
    """What becomes of a connection at a message of its frontend.

    BEFORE: neither the message nor anything after it reaches the server. AFTER: the message does, with those that
    belong to it up to its Sync, and the server has answered them (so that it has done what they say), but nothing of
    that answer is passed back. A message of which no answer is due (an unfinished login, COPY data) is passed on, and
    that is all.

    CUT: then the client's connection is reset, and the server's closed. HANG: then nothing passes any more, either
    way, but the connection stays as it is until the proxy is told `reset` or is closed.
    """

    CUT_BEFORE = enum.auto()
    CUT_AFTER = enum.auto()
    HANG_BEFORE = enum.auto()
    HANG_AFTER = enum.auto()


class Way:
    """One direction, of all connections. What is set applies from the next bytes on."""

    def __init__(self) -> None:
        self.passed = 0
        """Bytes passed on so far."""
        self.delay = 0.0
        """Seconds that whatever comes is held back for, in order."""
        self.cut_after: int | None = None
        """When so many more bytes have passed, exactly, the connection that they passed on is reset; then it is None
        again.
        """
        self._flowing = asyncio.Event()
        self._flowing.set()

    def drop(self) -> None:
        """Swallow all that comes, a close too, as when the network is gone: neither side is told."""
        self._flowing.clear()

    def flow(self) -> None:
        """Let pass what comes from now on; what was swallowed stays lost."""
        self._flowing.set()

    async def _hold(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)

    async def _pass(self, writer: StreamWriter, data: bytes) -> None:
        if not self._flowing.is_set():
            return
        cut = self.cut_after is not None and len(data) >= self.cut_after
        data = data[: self.cut_after] if cut else data
        if self.cut_after is not None:
            self.cut_after = None if cut else self.cut_after - len(data)
        self.passed += len(data)
        writer.write(data)
        await writer.drain()
        if cut:
            raise _Cut

    async def _ended(self) -> None:
        await self._flowing.wait()


class _Cut(Exception):
    """This connection is to be reset."""


class _Hang(Exception):
    """This connection is to be left as it is, and nothing read from it."""


class Proxy:
    """Listens on 127.0.0.1 from `async with` on, and connects to the server of a DSN (TCP or unix socket)."""

    def __init__(self, dsn: str) -> None:
        self._target = _Target.of(dsn)
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._errors: list[Exception] = []
        self.to_server = Way()
        self.to_client = Way()
        self.messages: list[Message] = []
        """All that frontends sent, of all connections, in order; `message.number` is its place, from 1."""
        self.accepted = 0
        """Connections so far."""
        self.on_message: Callable[[Message], Action | None] | None = None
        """Asked about each message before it is passed on; None lets it pass. What it raises, leaving raises."""

    @property
    def dsn(self) -> str:
        """The same database and user, through the proxy, without TLS."""
        return self._target.through(self._port)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        self.reset()
        await asyncio.gather(*self._links.values(), return_exceptions=True)
        if self._errors:
            raise self._errors[0]

    async def refuse(self) -> None:
        """Refuse new connections (ECONNREFUSED); those that there are stay. Harmless when repeated."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def accept(self) -> None:
        """Accept connections again, at the same port."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accepted, "127.0.0.1", self._port)
            self._port = self._listener.sockets[0].getsockname()[1]

    def reset(self) -> None:
        """Reset all connections (RST to the client), also those that hang."""
        for task in self._links.values():
            task.cancel()

    def _accepted(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, self.accepted, reader, writer)
        self._links[link] = asyncio.create_task(self._run(link))

    async def _run(self, link: _Link) -> None:
        try:
            await link.run()
        except OSError:
            pass  # either side is gone, or could not be reached: the client sees it
        except Exception as error:  # noqa: BLE001  # told by `__aexit__`
            self._errors.append(error)
        finally:
            del self._links[link]

    def _asked(self, message: Message) -> Action | None:
        self.messages.append(message)
        return None if self.on_message is None else self.on_message(message)


class _Link:
    """One client's connection, and its own to the server."""

    def __init__(self, proxy: Proxy, number: int, reader: StreamReader, writer: StreamWriter) -> None:
        self._proxy = proxy
        self._client, self._to_client = reader, writer
        self._frontend = Frontend(number)
        self._answers = Answers()
        self._silent = False
        self._then: Action | None = None

    async def run(self) -> None:
        """Pass on until either side closes, or it is cut or cancelled."""
        try:
            self._server, self._to_server = await self._proxy._target.connect()
        except OSError:
            _reset(self._to_client)
            raise
        try:
            await _first(self._up(), self._down())
        except _Cut:
            _reset(self._to_client)
        except BaseException:
            _reset(self._to_client)
            raise
        finally:
            for writer in (self._to_client, self._to_server):
                writer.close()

    async def _up(self) -> None:
        way = self._proxy.to_server
        try:
            while data := await self._client.read(65536):
                await way._hold()
                for message in self._frontend.feed(data):
                    await self._one(message)
        except _Hang:
            await asyncio.Event().wait()
        await way._ended()

    async def _one(self, raw: tuple[str, bytes, str]) -> None:
        kind, data, sql = raw
        if kind == "encryption":  # what passes is to be read
            self._to_client.write(b"N")
            return
        message = Message(len(self._proxy.messages) + 1, self._frontend.connection, kind, sql, data)
        action = self._proxy._asked(message)
        if action is Action.CUT_BEFORE:
            raise _Cut
        if action is Action.HANG_BEFORE:
            self._silent = True
            raise _Hang
        if action is not None:
            self._silent = True
        self._answers.owed(kind)
        await self._proxy.to_server._pass(self._to_server, data)
        if self._silent:
            await self._finish(action, kind)

    async def _finish(self, action: Action | None, kind: str) -> None:
        """Pass on what belongs to the message, wait for the answer to it, and do what the action says."""
        self._then = action or self._then
        if self._frontend.inside_batch(kind):
            return
        await self._answers.all()
        raise _Cut if self._then is Action.CUT_AFTER else _Hang

    async def _down(self) -> None:
        way = self._proxy.to_client
        try:
            while data := await self._server.read(65536):
                await way._hold()
                if not self._silent:
                    await way._pass(self._to_client, data)
                self._answers.feed(data)
        finally:
            self._answers.closed()
        if self._silent:
            await asyncio.Event().wait()  # what is to become of it, the other direction says
        await way._ended()


class _Target(NamedTuple):
    """Where a DSN's server is, and what else the DSN says."""

    host: str
    port: int
    user: str
    password: str | None
    database: str
    options: dict[str, str]

    @classmethod
    def of(cls, dsn: str) -> _Target:
        parts = urlsplit(dsn)
        options = dict(parse_qsl(parts.query))
        host = options.pop("host", None) or parts.hostname or "127.0.0.1"
        port = int(options.pop("port", None) or parts.port or 5432)
        user = parts.username or options.pop("user", "postgres")
        return cls(host, port, user, parts.password, parts.path.lstrip("/"), options | {"sslmode": "disable"})

    async def connect(self) -> tuple[StreamReader, StreamWriter]:
        if self.host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self.host}/.s.PGSQL.{self.port}")
        return await asyncio.open_connection(self.host, self.port)

    def through(self, port: int) -> str:
        user = self.user if self.password is None else f"{self.user}:{self.password}"
        return f"postgresql://{user}@127.0.0.1:{port}/{self.database}?{urlencode(self.options)}"


# -- what `on_message` can be -------------------------------------------------------------------------------------


def at_number(number: int, action: Action) -> Callable[[Message], Action | None]:
    """Act at the message with this number: count what a scenario sends, and run it again once for every number."""
    return lambda message: action if message.number == number else None


def at_statement(text: str, action: Action, *, nth: int = 1) -> Callable[[Message], Action | None]:
    """Act at the n-th message from now on that runs a statement which has this text in it, and never again."""
    seen = 0

    def asked(message: Message) -> Action | None:
        nonlocal seen
        seen += message.runs and text in message.sql
        return action if seen == nth and message.runs and text in message.sql else None

    return asked


# -- small things -------------------------------------------------------------------------------------------------


def _reset(writer: StreamWriter) -> None:
    with suppress(OSError):
        one: socket.socket = writer.get_extra_info("socket")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _first(*coroutines: Coroutine[None, None, None]) -> None:
    """Run all until one ends, and raise what that raised; the others end with it."""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
