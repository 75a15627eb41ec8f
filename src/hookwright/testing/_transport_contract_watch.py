"""What the transport contract measures an attempt with."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

RECEIVING: contextvars.ContextVar[bool] = contextvars.ContextVar("receiving", default=False)
"""Whether what runs is a receiver's, and not the transport's."""


class Watch:
    """Measures an attempt: wall time, growth of the process, and the longest callback that is not a receiver's.

    Processor time, not wall time: that would measure how busy the machine is. The process's peak is known on Linux
    only; elsewhere `growth` is 0. Collections within are cheap, since what is older is set aside.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.longest = 0.0
        self.growth = 0

    def __enter__(self) -> Watch:
        gc.freeze()
        self._resident = _peak_reset()
        self._real = asyncio.Handle._run  # noqa: SLF001  # where asyncio runs callbacks
        asyncio.Handle._run = self._timing(self._real)  # type: ignore[assignment, method-assign]  # noqa: SLF001
        self._begin = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds = time.monotonic() - self._begin
        asyncio.Handle._run = self._real  # type: ignore[method-assign]  # noqa: SLF001
        if self._resident:
            self.growth = _memory("VmHWM") - self._resident
        gc.unfreeze()

    def _timing(self, real: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        def run(handle: asyncio.Handle) -> None:
            begin = time.thread_time()
            try:
                real(handle)
            finally:
                if not handle._context.get(RECEIVING, False):  # type: ignore[attr-defined]  # noqa: SLF001
                    self.longest = max(self.longest, time.thread_time() - begin)

        return run


def _peak_reset() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        return _memory("VmRSS")
    except OSError:
        return 0


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
