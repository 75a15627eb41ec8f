"""Runs one PostgreSQL server, and ends it when whoever holds the lifeline is gone, however that happened.

`python guardian.py LIFELINE FOLDER USER POSTGRES`: the lifeline is a file with a lock on it; the folder holds the data,
the log and the socket; USER is empty when the server needs no other than ours. Says `ready` and the server's process id
once it may be connected to, nothing if that never comes, and ends when the server does. When the lifeline was lost, the
folder that it is in goes too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

READY_WITHIN = 60.0
"""Seconds."""


def _is_ready(data: Path, pid: int) -> bool:
    """Whether the server says so where `pg_ctl` reads it: the first and the last line of its lock file."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _tell_when_ready(server: subprocess.Popen[bytes], data: Path) -> None:
    until = time.monotonic() + READY_WITHIN
    while server.poll() is None and time.monotonic() < until:
        if _is_ready(data, server.pid):
            with suppress(BrokenPipeError):  # whoever asked is dead
                os.write(sys.stdout.fileno(), f"ready {server.pid}\n".encode())
            return
        time.sleep(0.005)
    server.send_signal(signal.SIGQUIT)


def _end_with(lifeline: Path, lost: threading.Event, server: subprocess.Popen[bytes]) -> None:
    with lifeline.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    lost.set()
    while server.poll() is None:  # more than once: it may not listen yet
        server.send_signal(signal.SIGQUIT)  # at once, as after a crash
        time.sleep(0.1)


def main(lifeline: Path, folder: Path, user: str, postgres: str) -> None:
    """Run the server until it ends."""
    data, lost = folder / "data", threading.Event()
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen(
            [postgres, "-D", str(data)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", user=user or None
        ) as server,
    ):
        threading.Thread(target=_end_with, args=(lifeline, lost, server), daemon=True).start()
        _tell_when_ready(server, data)
        server.wait()
    if lost.is_set():
        shutil.rmtree(lifeline.parent, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
