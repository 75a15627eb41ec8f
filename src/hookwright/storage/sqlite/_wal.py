"""Is the write-ahead log whole? SQLite itself takes the first damaged frame for the end and forgets what follows.

That is right after a power cut, when the last transaction was never promised to anybody. But when committed
transactions follow, they were acknowledged, and opening the database would lose them without a word. The format:
https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING

from hookwright._errors import StorageCorrupt

if TYPE_CHECKING:
    from pathlib import Path

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint number, salt 1 and 2, checksum 1 and 2
_FRAME = struct.Struct(">6I")  # page, pages after a commit or 0, salt 1 and 2, checksum 1 and 2
_MAGIC = 0x377F0682
_TIMES = 3

Sum = tuple[int, int]


def check_wal(database: Path) -> None:
    """Raise StorageCorrupt when the log of a database has lost what it once held. Reads, and changes nothing.

    A damaged last transaction cannot be told from one that a power cut left unfinished: SQLite drops it, and so do we.
    """
    path = database.with_name(database.name + "-wal")
    # Another process may begin the log anew while we read: what was seen is believed when it is seen again.
    if all(_is_damaged(path) for _ in range(_TIMES)):
        raise StorageCorrupt(
            f"the write-ahead log {path.name!r} is damaged, and committed transactions follow the damage. It was left"
            " as it is: restore database and log from a backup, or move the log away to go on without what it holds"
        )


def _is_damaged(path: Path) -> bool:
    try:
        with path.open("rb") as log:
            return _has_lost(log)
    except FileNotFoundError:
        return False


def _has_lost(log: IO[bytes]) -> bool:
    header = log.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return False
    magic, _, page_size, _, salt_1, salt_2, sum_1, sum_2 = _HEADER.unpack(header)
    order = ">" if magic & 1 else "<"
    whole = magic & ~1 == _MAGIC and _checksum(order, header[:24], (0, 0)) == (sum_1, sum_2)
    if not whole:
        return any(log.read(_FRAME.size))  # zeros are what a power cut leaves of a log that was never written
    salts, so_far, valid, committed_beyond = (salt_1, salt_2), (sum_1, sum_2), True, False
    while len(frame := log.read(_FRAME.size + page_size)) == _FRAME.size + page_size:
        _, pages, salt_1, salt_2, sum_1, sum_2 = _FRAME.unpack_from(frame)
        if valid:
            so_far = _checksum(order, frame[_FRAME.size :], _checksum(order, frame[:8], so_far))
            valid = (salt_1, salt_2) == salts and so_far == (sum_1, sum_2)
        if not valid and (salt_1, salt_2) == salts:
            if committed_beyond:
                return True
            committed_beyond = pages > 0
    return False


def _checksum(order: str, data: bytes, so_far: Sum) -> Sum:
    one, other = so_far
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + other) & 0xFFFFFFFF
        other = (other + second + one) & 0xFFFFFFFF
    return one, other
