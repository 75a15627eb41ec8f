"""Every exception that hookwright raises.

```
HookwrightError
├── ConfigurationError      the application set something up wrongly, or used it in the wrong place
├── ValidationFailed        an argument is wrong: `.field` names it, the message says what would be right
├── NotFound                no such endpoint, event or delivery (or it belongs to another tenant)
├── ConflictError           it is in a state, or was used before in a way, that forbids this
├── StorageError            the durable store could not do it; nothing was half-done
│   ├── StorageBusy         another writer holds the lock
│   ├── StorageFull         no space is left
│   ├── StorageCorrupt      the file is damaged, or is no database at all
│   ├── StorageClosed       the storage is not open (any more)
│   ├── StorageUnavailable  the database server cannot be reached
│   ├── CommitUnknown       the connection broke in the commit: `.event_id` may be stored, or not
│   ├── SchemaTooNew        a later version of hookwright wrote this database
│   └── StaleEndpoints      endpoints changed since they were matched (the dispatcher matches again)
└── WaitTimeout             also a TimeoutError: the outcome did not come in time
```

`hookwright.receiver.VerificationFailed` stands apart, as its file does: receivers copy that file alone.
"""

from __future__ import annotations


class HookwrightError(Exception):
    """The root of the tree: everything hookwright raises on purpose."""


class ConfigurationError(HookwrightError):
    """The application set something up wrongly, or used it in the wrong place: another loop, a forked child, closed."""


class ValidationFailed(HookwrightError, ValueError):
    """An argument is wrong; nothing was changed.

    `field` is the argument's name as the caller knows it; the message says what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[ValidationFailed], tuple[str, str]]:
        return (type(self), (self.field, self.message))


class NotFound(HookwrightError, LookupError):
    """No such endpoint, event or delivery, or it belongs to another tenant."""


class ConflictError(HookwrightError):
    """The thing's state, or an earlier use of the same key, forbids this; nothing was changed."""


class StorageError(HookwrightError):
    """The durable store could not do it. The operation was rolled back whole."""


class StorageBusy(StorageError):
    """Another writer held the database's lock for longer than we wait."""


class StorageFull(StorageError):
    """No space is left for the database."""


class StorageCorrupt(StorageError):
    """The file is damaged, or is no database at all. It was not modified."""


class StorageClosed(StorageError):
    """The storage is not open, or not any more."""


class StorageUnavailable(StorageError):
    """The database server cannot be reached, or does not answer. It is tried again for as long as it takes."""


class CommitLost(StorageUnavailable):
    """The connection broke while a change was committed: it may or may not have happened. Look before you repeat it.

    For events there is CommitUnknown, after it was tried to find out.
    """


class CommitUnknown(StorageError):
    """The connection broke while the event was committed, and nobody could say since whether it was stored.

    Emit it again with `event_id=error.event_id`: it is stored once, whatever happened. Of several events that were
    stored together, `event_id` is the first.
    """

    def __init__(self, event_id: str) -> None:
        super().__init__(
            f"the connection broke while event {event_id} was committed, and the server cannot be asked:"
            " emit it again with this event_id, it is stored once whatever happened"
        )
        self.event_id = event_id

    def __reduce__(self) -> tuple[type[CommitUnknown], tuple[str]]:
        return (type(self), (self.event_id,))


class SchemaTooNew(StorageError):
    """A later version of hookwright wrote this database; this one would not understand it."""


class StaleEndpoints(StorageError):
    """Endpoints changed since the event was matched against them; match again and repeat."""


class WaitTimeout(HookwrightError, TimeoutError):
    """The deliveries had not all ended when the time was up. They go on regardless."""
