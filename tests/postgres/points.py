"""Fault points at the statements of asyncpg: see tests/faults/points.py."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.faults.points import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.points import Points

_VERBS = ("execute", "executemany", "fetch", "fetchrow", "fetchval")


@contextmanager
def asyncpg_statements(points: Points) -> Iterator[None]:
    """Let every statement of every asyncpg connection meanwhile pass `points`: before it is sent, after its answer."""

    def faulty(original: Any) -> Any:
        async def verb(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
            async with points.reaching(name_of(query)):
                return await original(self, query, *arguments, **options)

        return verb

    with pytest.MonkeyPatch.context() as patch:
        for name in _VERBS:
            patch.setattr(asyncpg.Connection, name, faulty(getattr(asyncpg.Connection, name)))
        yield
