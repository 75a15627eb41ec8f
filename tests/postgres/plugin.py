"""What `tests/conftest.py` takes over: one server for a whole run, and a schema of its own for each test."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.postgres.server import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RUN = pytest.StashKey[Run]()
_FOLDER = "postgres_folder"


def pytest_configure(config: pytest.Config) -> None:
    """Begin a run, or take part in the controller's."""
    given: dict[str, str] = getattr(config, "workerinput", {})
    config.stash[_RUN] = Run(Path(given[_FOLDER])) if _FOLDER in given else Run.begin()


def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist of the run."""
    node.workerinput[_FOLDER] = str(node.config.stash[_RUN].folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End it, and the server with it."""
    config.stash[_RUN].end()


@pytest.fixture(scope="session")
def postgres_dsn(pytestconfig: pytest.Config) -> str:
    """A superuser's DSN of the server that all tests of this run share: what is theirs is in schemas of their own."""
    return pytestconfig.stash[_RUN].dsn()


@pytest.fixture
def new_schema(postgres_dsn: str) -> Iterator[Callable[[], str]]:
    """Names for schemas that do not exist; whatever a test makes under them is dropped at its end."""
    names: list[str] = []

    def name() -> str:
        names.append(f"test_{uuid.uuid4().hex[:16]}")
        return names[-1]

    yield name
    _drop(postgres_dsn, names)


@pytest.fixture
def postgres_schema(new_schema: Callable[[], str]) -> str:
    """The name of one schema that does not exist yet."""
    return new_schema()


@pytest.fixture
def postgres_database(postgres_dsn: str) -> Iterator[str]:
    """A DSN of a database of the test's own, dropped at its end."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:16]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield urlsplit(postgres_dsn)._replace(path=f"/{name}").geturl()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _drop(dsn: str, names: list[str]) -> None:
    import psycopg

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET lock_timeout = '10s'; SET client_min_messages = error")
        for name in names:
            connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())
