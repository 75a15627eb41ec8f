"""Enqueue through a connection of the caller's, and find out when his transaction has ended.

SQLite has one writer at a time. So the first statement takes the lock without changing anything: what is read from then
on nobody else changes, and a transaction whose snapshot is too old to write fails before anything was written. Each
statement is a hop to the connection's thread, though: what most applications emit goes with one that does it all.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookwright._errors import HookwrightError, ValidationFailed
from hookwright.storage._connections import commits_alone
from hookwright.storage._emitted import stale
from hookwright.storage.sqlite import _enqueue, _schema
from hookwright.storage.sqlite._owner import DRIVER_ERRORS, convert_callers, raised_in_trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from hookwright._models import Receipt
    from hookwright.storage._connections import CallersConnection
    from hookwright.storage._emitted import Emitted
    from hookwright.storage.sqlite._bulk import Statement

_LOCK = "UPDATE hookwright_meta SET value = value WHERE key = 'endpoints_revision' RETURNING value"

_LOOK_FIRST = 0.002
_LOOK_MOST = 0.02


class Callers:
    """The connections of callers that wrote to one file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._admitted: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watched: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    async def enqueue(self, connection: CallersConnection, waiting: Sequence[Emitted], now: int) -> list[Receipt]:
        """See `Storage.enqueue`: all or none."""
        try:
            await self._admit(connection)
            statement = _enqueue.in_one(waiting[0], now) if len(waiting) == 1 and connection.in_transaction else None
            if statement is not None:
                return [await _at_once(connection, waiting[0], statement)]
            [[revision]] = await connection.fetch(_LOCK)
            if not connection.in_transaction:  # and so nothing but the lock was taken, and given back
                raise commits_alone()
            return await _all_or_none(connection, waiting, int(revision), now)
        except DRIVER_ERRORS as error:
            raise convert_callers(error) from error

    async def _admit(self, connection: CallersConnection) -> None:
        """Refuse a connection to anything but our file, and leave checkpoints to us where two may meet badly."""
        if connection.driver in self._admitted:
            return
        files = {row[1]: row[2] for row in await connection.fetch("PRAGMA database_list")}
        if not _same(files["main"], self._file):
            raise ValidationFailed(
                "connection",
                f"it is connected to {files['main'] or 'a database in memory'!r}, and this dispatcher keeps its events"
                f" in {str(self._file)!r}: with SQLite they share one file",
            )
        if not _schema.resets_the_log_safely():
            await connection.fetch("PRAGMA wal_autocheckpoint = 0")
        self._admitted.add(connection.driver)

    def watch(
        self, connection: CallersConnection, committed: Callable[[], None], transactions: Callable[[], int]
    ) -> Coroutine[Any, Any, None] | None:
        """See `Storage.watch`. `transactions` counts those of ours that were committed."""
        is_watched = connection.driver in self._watched
        self._watched[connection.driver] = transactions()
        if is_watched:
            return None
        return self._watch(weakref.ref(connection.driver), _schema.wal_stamp(self._file), committed, transactions)

    async def _watch(
        self,
        driver: weakref.ref[Any],
        stamp: tuple[int, int] | None,
        committed: Callable[[], None],
        transactions: Callable[[], int],
    ) -> None:
        pause = _LOOK_FIRST
        try:
            while self._may_be_open(driver(), transactions()):
                await asyncio.sleep(pause)
                pause = min(_LOOK_MOST, pause * 1.25)
                # Between two looks one transaction may have ended and the next begun: every commit is in the log.
                before, stamp = stamp, _schema.wal_stamp(self._file)
                if stamp != before:
                    committed()
        finally:
            self._forget(driver())
        committed()

    def _may_be_open(self, driver: Any, transactions: int) -> bool:
        # A driver that begins the next transaction with each commit is always in one. But he had the lock when he
        # emitted: what we have committed since, he had given it back for. (One may have been on its way before.)
        return driver is not None and transactions < self._watched[driver] + 2 and _in_transaction(driver)

    def _forget(self, driver: Any) -> None:
        if driver is not None:
            self._watched.pop(driver, None)


def _in_transaction(driver: Any) -> bool:
    # Read from the loop's thread, as aiosqlite's own property is made to be.
    with contextlib.suppress(ValueError):  # closed
        return bool(driver.in_transaction)
    return False


def _same(found: str, file: Path) -> bool:
    try:
        return Path(found).samefile(file)
    except OSError:
        return False


async def _at_once(connection: CallersConnection, emitted: Emitted, statement: Statement) -> Receipt:
    """Emit with one statement, in a transaction that is open: it would be committed by itself in none."""
    try:
        await connection.fetch(*statement)
    except DRIVER_ERRORS as error:
        if _enqueue.STALE in str(error):
            raise stale() from None
        if raised_in_trigger(error):  # a RAISE(FAIL) of somebody's backs out nothing
            await _take_back(connection, emitted.event.id)
        raise
    except BaseException:
        # Also when the caller was cancelled: what it had asked for runs in its connection's thread, and before this.
        await _take_back(connection, emitted.event.id)
        raise
    return _enqueue.receipt(emitted)


async def _take_back(connection: CallersConnection, event_id: str) -> None:
    """Delete an event that this emit may have inserted; no other has its id."""
    with contextlib.suppress(Exception):
        if connection.in_transaction:
            await connection.fetch("DELETE FROM hookwright_delivery WHERE event_id = ?", (event_id,))
            await connection.fetch("DELETE FROM hookwright_event WHERE id = ?", (event_id,))


async def _all_or_none(
    connection: CallersConnection, waiting: Sequence[Emitted], revision: int, now: int
) -> list[Receipt]:
    try:
        await connection.fetch("SAVEPOINT hookwright_emit")
        answers = await _run(connection, _enqueue.enqueueing(waiting, revision, now))
        receipts: list[Receipt] = []
        for answer in answers:
            if isinstance(answer, HookwrightError):
                raise answer
            receipts.append(answer)
    except BaseException:
        # Also when the caller was cancelled: what it had asked for runs in its connection's thread, and before this.
        with contextlib.suppress(Exception):  # a full disk may have ended the whole transaction, and this with it
            await connection.fetch("ROLLBACK TO hookwright_emit")
            await connection.fetch("RELEASE hookwright_emit")
        raise
    await connection.fetch("RELEASE hookwright_emit")
    return receipts


async def _run(connection: CallersConnection, steps: _enqueue.Steps[Any]) -> Any:
    try:
        statement = next(steps)
        while True:
            statement = steps.send(await connection.fetch(*statement))
    except StopIteration as end:
        return end.value
