"""Is the write-ahead log whole? SQLite itself takes the first damaged frame for the end and forgets what follows.

That is right after a power cut, when the last transaction was never promised to anybody. But when committed
transactions follow, they were acknowledged, and opening the database would lose them without a word. The format:
https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
import time
from typing import IO, TYPE_CHECKING, NamedTuple

from hookwright._errors import StorageCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint number, salt 1 and 2, checksum 1 and 2
_FRAME = struct.Struct(">6I")  # page, pages after a commit or 0, salt 1 and 2, checksum 1 and 2
_MAGIC = 0x377F0682
_LOOKS = 3
_PAUSE = 0.02

Sum = tuple[int, int]


def check_wal(database: Path) -> None:
    """Raise StorageCorrupt when the log of a database has lost what it once held. Reads, and changes nothing.

    A damaged last transaction cannot be told from one that a power cut left unfinished: SQLite drops it, and so do we.
    A log that changes while it is looked at belongs to a process that is alive and is not judged.
    """
    path = database.with_name(database.name + "-wal")
    before = _stamp(path)
    for _ in range(_LOOKS):
        if not _is_damaged(path) or _stamp(path) != before:
            return
        time.sleep(_PAUSE)  # in the connection's own thread; longer than a tick of a file's time
    raise StorageCorrupt(
        f"the write-ahead log {path.name!r} is damaged, and committed transactions follow the damage. It was left as it"
        " is: restore database and log from a backup, or move the log away to go on without what it holds"
    )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _is_damaged(path: Path) -> bool:
    try:
        with path.open("rb") as log:
            return _has_lost(log)
    except FileNotFoundError:
        return False


class _Frame(NamedTuple):
    """A frame as it stands in the log. `commits` says that a transaction ends with it."""

    commits: bool
    salts: Sum
    sum: Sum
    content: bytes

    def follows(self, before: Sum, order: str) -> bool:
        """Whether it was written behind a frame, or header, with that checksum."""
        return _checksum(order, self.content[_FRAME.size :], _checksum(order, self.content[:8], before)) == self.sum


def _has_lost(log: IO[bytes]) -> bool:
    header = log.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return False
    magic, _, page_size, _, *salts_and_sum = _HEADER.unpack(header)
    order = ">" if magic & 1 else "<"
    salts, before = (salts_and_sum[0], salts_and_sum[1]), (salts_and_sum[2], salts_and_sum[3])
    if magic & ~1 != _MAGIC or _checksum(order, header[:24], (0, 0)) != before:
        return any(log.read(_FRAME.size))  # zeros are what a power cut leaves of a log that was never written
    damaged: _Frame | None = None
    for frame in _frames(log, page_size):
        whole = frame.salts == salts and frame.follows(before, order)
        before = frame.sum
        # Behind the damage: a frame that was written behind the end of a transaction. What a commit that failed leaves
        # in the log ends with that end, and what stands further on was written behind something else.
        if damaged is not None and damaged.commits and whole:
            return True
        if damaged is not None or not whole:
            damaged = frame
    return False


def _frames(log: IO[bytes], page_size: int) -> Iterator[_Frame]:
    size = _FRAME.size + page_size
    while len(content := log.read(size)) == size:
        _, pages, salt_1, salt_2, sum_1, sum_2 = _FRAME.unpack_from(content)
        yield _Frame(pages > 0, (salt_1, salt_2), (sum_1, sum_2), content)


def _checksum(order: str, data: bytes, so_far: Sum) -> Sum:
    one, other = so_far
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + other) & 0xFFFFFFFF
        other = (other + second + one) & 0xFFFFFFFF
    return one, other
