"""As much of PostgreSQL's protocol 3.0 as finds the messages in a stream (documentation, chapter "Message Formats")."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNTYPED = {80877102: "cancel", 80877103: "encryption", 80877104: "encryption"}
"""What the first message of a connection can be, by its code, other than a startup."""

_INSIDE = "PBDEC"
"""Messages after which more must come, a Sync at last: Parse, Bind, Describe, Execute, Close."""

_ANSWERED = {"startup", "Q", "S", "F"}
"""Messages whose answer ends with ReadyForQuery: startup, Query, Sync, FunctionCall."""


class Message(NamedTuple):
    """What a frontend sent. `kind` is its letter (Q is Query, P Parse, E Execute, S Sync), `startup` or `cancel`.

    `sql` is the statement, for Query, Parse, Bind and Execute; else it is empty.
    """

    number: int
    connection: int
    kind: str
    sql: str
    data: bytes

    @property
    def runs(self) -> bool:
        """Whether it makes the server run the statement: Query or Execute."""
        return self.kind in ("Q", "E")

    def __repr__(self) -> str:
        return f"<{self.number}: {self.connection} {self.kind} {' '.join(self.sql.split())[:60]}>"


class Frontend:
    """Finds the messages in what one client sends, and what the statements are that it prepared."""

    def __init__(self, connection: int) -> None:
        self.connection = connection
        self._rest = b""
        self._started = False
        self._statements: dict[str, str] = {}
        self._portals: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes, str]]:
        """Return the messages that are complete now: kind, bytes and statement."""
        self._rest += data
        while (end := self._end()) <= len(self._rest):
            message, self._rest = self._rest[:end], self._rest[end:]
            kind = chr(message[0]) if self._started else self._first(message)
            yield kind, message, self._sql(kind, message[5:])

    def inside_batch(self, kind: str) -> bool:
        """Whether the server answers such a message only when more has come."""
        return kind in _INSIDE

    def _end(self) -> int:
        start = 1 if self._started else 0
        length = self._rest[start : start + 4]
        return start + int.from_bytes(length) if len(length) == 4 else len(self._rest) + 1

    def _first(self, message: bytes) -> str:
        kind = _UNTYPED.get(int.from_bytes(message[4:8]), "startup")
        self._started = kind == "startup"
        return kind

    def _sql(self, kind: str, body: bytes) -> str:
        if kind not in ("Q", "P", "B", "E"):
            return ""
        first, rest = _string(body)
        if kind == "Q":
            return first
        if kind == "E":
            return self._portals.get(first, "")
        second, _ = _string(rest)
        if kind == "P":
            self._statements[first] = second
            return second
        self._portals[first] = self._statements.get(second, "")
        return self._portals[first]


class Answers:
    """Counts what a server has still to answer."""

    def __init__(self) -> None:
        self._rest = b""
        self._due = 0
        self._settled = asyncio.Event()
        self._settled.set()

    def owed(self, kind: str) -> None:
        """Such a message is passed on."""
        if kind in _ANSWERED:
            self._due += 1
            self._settled.clear()

    def feed(self, data: bytes) -> None:
        """The server sent this."""
        self._rest += data
        while len(self._rest) >= 5 and len(self._rest) > (end := int.from_bytes(self._rest[1:5])):
            kind, self._rest = chr(self._rest[0]), self._rest[end + 1 :]
            self._due -= kind == "Z"
            if self._due <= 0 or kind in "RGW":  # a password or data is waited for
                self._settled.set()

    def closed(self) -> None:
        """The server will not answer any more."""
        self._settled.set()

    async def all(self) -> None:
        """Wait until it has answered everything."""
        await self._settled.wait()


def _string(data: bytes) -> tuple[str, bytes]:
    text, _, rest = data.partition(b"\0")
    return text.decode(errors="replace"), rest
