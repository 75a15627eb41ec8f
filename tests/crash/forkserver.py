"""A process with all imports done, no event loop and no threads, that forks a child for each command.

`python -m tests.crash.forkserver FD [MODULE ...]`. A command comes with the writing end of a pipe: what the child says
goes there, and its end-of-file says that the child is dead. The server reaps, and ends (with its last child) when the
driver does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.crash.child import Command, live
from tests.crash.receiver import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIFETIME = 90
"""Seconds after which a child ends by itself, whatever became of everything else."""

_IMPORTED_LATE = (
    "hookwright.storage.sql",
    "hookwright.transport.direct",
    "hookwright.transport._pinned",
    "importlib.resources",
    "encodings.idna",
)
"""What the package imports only when it is needed: done before the fork, so that children do not."""


# -- the process ------------------------------------------------------------------------------------------------


def _serve(control: socket.socket, modules: Sequence[str]) -> None:
    for name in (*_IMPORTED_LATE, *modules):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    last: int | None = None
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 65536, 1)
        if last is not None:
            if not message:
                os.kill(last, signal.SIGKILL)  # not reaped yet, so that it is still ours
            os.waitpid(last, 0)
        if not message:
            return
        last = os.fork()
        if last == 0:
            control.close()
            _become(Command(**json.loads(message)), pipes[0])
        os.close(pipes[0])
        control.sendall(b"%d\n" % last)


def _become(command: Command, pipe: int) -> None:
    signal.alarm(LIFETIME)
    status = 1
    try:
        live(command, lambda text: os.write(pipe, text.encode() + b"\n"))
        status = 0
    except BrokenPipeError:
        pass  # the driver is dead
    except BaseException as error:  # noqa: BLE001  # a child must never return into the server's code
        traceback.print_exc()
        os.write(pipe, f"failed {error!r}\n".encode())
    finally:
        os._exit(status)


# -- the driver's side --------------------------------------------------------------------------------------------


class Child:
    """A child that lives until it ends or is killed."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid = pid
        self._pipe = pipe
        self._rest = b""
        self.said: list[str] = []

    def kill(self) -> None:
        """End it as the out-of-memory killer does."""
        os.kill(self._pid, signal.SIGKILL)  # a zombie until the next command, so that the number is still its own

    def hear(self, word: str, timeout: float) -> bool:
        """Wait until it has said something that begins with `word`; False: it died first, or was silent for so long."""
        until = time.monotonic() + timeout
        with contextlib.suppress(TimeoutError):
            while not self._has_said(word) and self._read(until):
                pass
        return self._has_said(word)

    def ended(self, timeout: float) -> list[str]:
        """Wait until it is dead, and return all that it said; kill it, and say `failed`, when that takes too long."""
        try:
            self._read_all(timeout)
        except TimeoutError:
            self.kill()
            self._read_all(timeout)
            self.said.append(f"failed to end within {timeout:g} s")
        os.close(self._pipe)
        return self.said

    def _has_said(self, word: str) -> bool:
        return any(text.startswith(word) for text in self.said)

    def _read_all(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self._read(until):
            pass

    def _read(self, until: float) -> bool:
        """Take what it says; False: it is dead."""
        if not select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        read = os.read(self._pipe, 65536)
        *lines, self._rest = (self._rest + read).split(b"\n")
        self.said += [line.decode() for line in lines]
        return bool(read)


class ForkServer:
    """Asks the process for children, one at a time."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def fork(self, command: Command) -> Child:
        """Start a child. The last one must be dead."""
        reading, writing = os.pipe()
        try:
            socket.send_fds(self._control, [json.dumps(command._asdict()).encode()], [writing])
        finally:
            os.close(writing)
        return Child(int(self._control.recv(64)), reading)


@contextmanager
def forking(modules: Sequence[str] = ()) -> Iterator[ForkServer]:
    """Start the process, which imports the modules too, and end it."""
    ours, theirs = socket.socketpair()
    command = (sys.executable, "-m", "tests.crash.forkserver", str(theirs.fileno()), *modules)
    with ours, subprocess.Popen(command, pass_fds=(theirs.fileno(),), cwd=ROOT) as process:
        theirs.close()
        ours.settimeout(60)
        try:
            yield ForkServer(ours)
        finally:
            ours.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
