"""What the server and the drivers say, as errors of ours: the only place that knows both.

By SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html), which every driver passes on, so that none
needs to be imported for it.
"""

from __future__ import annotations

from hookwright._errors import (
    HookwrightError,
    SchemaTooNew,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

_REPEAT = "another transaction was in the way; repeat yours"
_BY_STATE: dict[str, tuple[type[StorageError], str]] = {
    "08": (StorageUnavailable, "the connection to PostgreSQL was lost"),
    "28": (StorageError, "PostgreSQL refuses the user: check name, password and pg_hba.conf"),
    "3D000": (
        StorageError,
        "the database does not exist: create it (CREATE DATABASE), hookwright makes its own schema",
    ),
    "3F000": (StorageError, "the schema is gone while it is in use: was it dropped?"),
    "42P01": (StorageError, "a table is gone while it is in use: was the schema dropped, or restored in part?"),
    "42501": (
        StorageError,
        "the user may not do that: GRANT CREATE ON DATABASE to make the schema; where that is made, USAGE ON SCHEMA and"
        " SELECT, INSERT, UPDATE, DELETE ON its tables (upgrades and reencrypt() are for their owner)",
    ),
    "42704": (StorageError, "the server does not know that: is a parameter of the address misspelt?"),
    "25P02": (StorageError, "the transaction was aborted by a statement before: roll it back"),
    "22021": (StorageError, "a text holds U+0000, which PostgreSQL cannot store"),
    "22P05": (StorageError, "a text holds U+0000, which PostgreSQL cannot store"),
    "25006": (StorageUnavailable, "the server is read-only: is it a standby? give the primary's address"),
    "40": (StorageBusy, _REPEAT),
    "53100": (StorageFull, "the server's disk is full; free space and repeat"),
    "53": (StorageUnavailable, "the server has no resources left, or no more connections"),
    "55P03": (StorageBusy, "another transaction holds the lock; if it is your own, commit it first"),
    "57014": (StorageBusy, "a statement took longer than it may; what holds it up?"),
    "57": (StorageUnavailable, "the server is stopping, starting, or ended the connection"),
    "25P03": (
        StorageUnavailable,
        "the connection was idle in a transaction for too long; did this process stand still?",
    ),
    "25P04": (StorageUnavailable, "a transaction took longer than the server allows"),
    "58": (StorageUnavailable, "the server's machine reported an error"),
    "XX001": (StorageCorrupt, "the database is damaged; restore it from a backup"),
    "XX002": (StorageCorrupt, "an index is damaged; REINDEX it, or restore a backup"),
}

# In a transaction of the application's own, where its connection or its user is not what they have to be.
_OF_CALLERS: dict[str, tuple[type[StorageError], str]] = {
    "42501": (
        StorageError,
        "the connection's user may not emit: in hookwright's schema it needs USAGE ON SCHEMA, SELECT ON meta, event and"
        " INSERT ON event, delivery, wake",
    ),
    "25006": (
        StorageError,
        "the transaction is read-only, or the server a standby: emit in a transaction that may write, on the primary",
    ),
    "25P02": (
        StorageError,
        "the transaction was aborted by a statement before: roll it back, and emit again in the next one",
    ),
}

_NOWHERE = "postgresql://"
"""What is shown of an address that leaves everything to the environment."""

_CLOSED = ("clos", "releas", "operation is in progress")


def convert(error: BaseException, where: str | None = None, *, callers: bool = False) -> HookwrightError:
    """Return our error for a driver's; one of ours stays what it is.

    `where` is the server's address as it may be shown, and is told with every error; an address that names nothing is
    not. `callers`: it was raised by a connection of the application's own.
    """
    told = where not in {None, _NOWHERE}
    server = f"PostgreSQL ({where})" if told else "PostgreSQL"
    at = f": {where}" if told else ""
    if isinstance(error, HookwrightError):
        return error
    if isinstance(error, TimeoutError):
        return StorageUnavailable(f"{server} does not answer in time")
    if isinstance(error, OSError):
        return StorageUnavailable(f"{server} cannot be reached: {type(error).__name__}: {error.strerror or error}")
    if type(error).__name__ == "TargetServerAttributeNotMatched":
        return StorageUnavailable(f"no server of {server} is what target_session_attrs asks for")
    state = getattr(error, "sqlstate", None)
    if not isinstance(state, str):  # the driver's own: it has no answer from the server
        # A connection that ends while it is used may confuse the driver ("cannot switch to state").
        closed = type(error).__name__ == "InternalClientError" or any(text in str(error) for text in _CLOSED)
        kind = StorageUnavailable if closed else StorageError
        return kind(f"the PostgreSQL driver reported an error ({type(error).__name__}: {_brief(error)}){at}")
    known = _OF_CALLERS.get(state) if callers else None
    known = known or _BY_STATE.get(state) or _BY_STATE.get(state[:2])
    kind, advice = known or (StorageError, "the database reported an error")
    return kind(f"{advice} (PostgreSQL {state}: {_brief(error)}){at}")


def _brief(error: BaseException) -> str:
    # Not `detail`, which shows a row's values.
    return str(error).partition("\n")[0]


def too_new(schema: int, known: int) -> SchemaTooNew:
    """Return the error for a database that a later version has changed so that this one cannot use it."""
    return SchemaTooNew(
        f"the database has schema {schema}, this version knows up to {known}: upgrade, or use another schema name"
    )
