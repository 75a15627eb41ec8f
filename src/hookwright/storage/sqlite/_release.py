"""Release, take over, sweep: how rows that nobody will settle go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._clock import FOREVER, SECOND
from hookwright.storage._base import HOLD_MOST, SWEEP_ROWS, UNTRIED_MOST
from hookwright.storage.sqlite._claim import record_interruption
from hookwright.storage.sqlite._lanes import TURN_BITS, TURNS_END, UNLEASED, make_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright._models import Lease
    from hookwright.storage.sqlite._owner import Database


def release(database: Database, leases: Sequence[Lease], *, sent: bool, hold: int, now: int) -> None:
    """See `Storage.release`."""
    for lease in leases:
        held = database.execute(
            "DELETE FROM hookwright_lease WHERE endpoint_id = ? AND delivery_id = ? AND token = ? RETURNING 1",
            (lease.endpoint_id, lease.delivery_id, lease.token),
        ).fetchall()
        if not held:
            continue
        [(count, available_at)] = database.execute(
            "SELECT attempt_count, available_at FROM hookwright_delivery WHERE id = ?", (lease.delivery_id,)
        ).fetchall()
        if sent:
            record_interruption(database, lease.delivery_id, count + 1, now)
            database.execute(
                "UPDATE hookwright_delivery SET budget_from = budget_from + 1 WHERE id = ?", (lease.delivery_id,)
            )
        make_due(database, [(lease.endpoint_id, available_at)], now)
        if hold:
            database.execute(
                "UPDATE hookwright_lane SET hold_until = max(hold_until, ?) WHERE endpoint_id = ?",
                (now + hold, lease.endpoint_id),
            )


def free_leases(database: Database, now: int) -> None:
    """What whoever becomes the deliverer does: the rows of the dead are due at once, and nobody has earned more than 1.

    The wall clock may have been set back since the last one: no turn, hold or limit reaches further than it could now.
    """
    endpoints = database.execute("SELECT DISTINCT endpoint_id FROM hookwright_lease").fetchall()
    database.execute("UPDATE hookwright_lease SET until = 0")
    make_due(database, [(row[0], 0) for row in endpoints], now)
    # Those whose last attempt succeeded: else all would share the half of the slots that is left for whoever hangs.
    database.execute("UPDATE hookwright_lane SET earned = (last_success IS 1) WHERE earned <> (last_success IS 1)")
    database.execute(
        f"UPDATE hookwright_lane SET due_at = ?1 WHERE due_at > ?1 AND due_at < {TURNS_END}", (now >> TURN_BITS,)
    )
    database.execute(
        f"UPDATE hookwright_lane SET hold_until = ?1 WHERE hold_until > ?1 AND hold_until < {FOREVER}",
        (now + HOLD_MOST,),
    )
    database.execute(
        "UPDATE hookwright_lane SET failing_since = ?1"
        " WHERE failing_since IS NOT NULL AND (last_at > ?1 OR last_at < ?2)",
        (now, now - UNTRIED_MOST),
    )
    database.execute(
        f"UPDATE hookwright_lane SET rate_at = ?1 + max(rate_interval, {SECOND}),"
        f" rate_until = min(rate_until, ?1 + max(rate_interval, {SECOND}))"
        f" WHERE rate_at > ?1 + max(rate_interval, {SECOND})",
        (now,),
    )


# Not by the endpoint's own index: that holds what was swept before, and every batch would pass by it.
_SWEEP = f"""
UPDATE hookwright_delivery SET state = ?, available_at = NULL, finished_at = ?
WHERE id IN (
    SELECT d.id FROM hookwright_delivery AS d INDEXED BY hookwright_delivery_queue
    WHERE d.endpoint_id = ? AND d.available_at IS NOT NULL AND {UNLEASED} LIMIT ?
)
"""


def sweep(database: Database, now: int) -> bool:
    """See `Storage.sweep`."""
    left = SWEEP_ROWS
    for endpoint_id, state in database.execute(
        "SELECT endpoint_id, sweep FROM hookwright_lane WHERE sweep IS NOT NULL"
    ).fetchall():
        _interrupt_leased(database, endpoint_id, now)
        left -= database.execute(_SWEEP, (state, now, endpoint_id, left)).rowcount
        if left <= 0:
            return True
        _forget_swept(database, endpoint_id, state)
    return False


def _interrupt_leased(database: Database, endpoint_id: str, now: int) -> None:
    """Record that requests of a process that died may have left."""
    ended = database.execute(
        "DELETE FROM hookwright_lease WHERE endpoint_id = ? AND until <= ? RETURNING delivery_id, attempt_count + 1",
        (endpoint_id, now),
    ).fetchall()
    for delivery_id, number in ended:
        record_interruption(database, delivery_id, number, now)


def _forget_swept(database: Database, endpoint_id: str, state: str) -> None:
    waiting = database.execute(
        "SELECT 1 FROM hookwright_delivery INDEXED BY hookwright_delivery_queue WHERE endpoint_id = ?"
        " AND available_at IS NOT NULL LIMIT 1",
        (endpoint_id,),
    ).fetchone()
    if waiting is None and state == "cancelled":
        database.execute("DELETE FROM hookwright_lane WHERE endpoint_id = ?", (endpoint_id,))
    elif waiting is None:
        database.execute("UPDATE hookwright_lane SET sweep = NULL WHERE endpoint_id = ?", (endpoint_id,))
