"""Claim: lease what is due, in turn, as far as there is room, and wait for nobody.

The server does it, in one call of `claim_1` (`storage/sql/postgres_0001.sql`): a dozen statements would wait a dozen
times for their turn of this process's loop, with lanes locked meanwhile. Step by step: make lanes due that were
woken; lock those that are due; find their rows; lease them; move the lanes on; say when to come again. What another
transaction has locked is passed by, and looked at again in a moment. How much a lane gives is told in
`storage/_rooms.py`, which the function follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookwright._ids import new_token
from hookwright._models import Claim
from hookwright.storage._rows import lease_of
from hookwright.storage.postgres._database import lock_lanes
from hookwright.storage.postgres._lanes import make_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookwright.storage._base import ClaimRequest
    from hookwright.storage.postgres._database import Database

_MOST = 2**20
"""More than any claim brings."""

_CLAIM = (
    "SELECT * FROM hookwright.claim_1($1::int, $2::int, $3::int, $4::bigint, $5::int, $6::text[], $7::int[],"
    " $8::text[], $9::text[], $10::text, $11::bigint, $12::bool)"
)


async def claim(
    database: Database, request: ClaimRequest, *, owner: int, token: str, shared: bool
) -> tuple[Claim, int]:
    """See `Storage.claim`; and return the server's time. `shared`: other processes' leases take up room, too."""
    in_flight = request.in_flight
    *rows, summary = await database.fetch(
        _CLAIM,
        *(max(0, min(limit, _MOST)) for limit in (request.limit, request.unproven_limit, request.further_limit)),
        request.lease,
        request.endpoint_concurrency,
        list(in_flight),
        [len(ids) for ids in in_flight.values()],
        list(request.slow),
        [*(id for ids in in_flight.values() for id in ids), *request.settling],
        token,
        owner,
        shared,
    )
    now, next_due, revision = summary["created_at"], summary["available_at"], summary["renewed_at"]
    leases = [
        lease_of(row[1:], f"{token}{row[0]}", now + request.lease, taken_over=row[14], proven=row[15]) for row in rows
    ]
    return Claim(leases, next_due, revision), now


def in_our_time(claim: Claim, ahead_before: int, ahead_after: int) -> Claim:
    """Return a claim with its times by this process's clock, on which the dispatcher works.

    How far the server is ahead is known from before and after the claim: a lease ends early rather than late.
    """
    if ahead_before == ahead_after == 0:
        return claim
    leases = [
        lease._replace(
            until=lease.until - ahead_before, since=lease.since - ahead_before, due_at=lease.due_at - ahead_before
        )
        for lease in claim.leases
    ]
    next_due = None if claim.next_due is None else claim.next_due - ahead_after
    return claim._replace(leases=leases, next_due=next_due)


def claim_token() -> str:
    """Return what the tokens of one claim begin with."""
    return f"{new_token()}."


async def give_back(database: Database, tokens: Sequence[str]) -> set[str]:
    """End the leases of claims whose answer never came: nobody has them, and nothing was sent. Return whose there were.

    What is not there may be written later: the server may still run a statement whose connection is gone.
    """
    leased = "FROM hookwright.lease WHERE left(token, 25) = ANY($1::text[])"
    rows = await database.fetch(f"SELECT DISTINCT endpoint_id {leased}", list(tokens))
    if rows:
        now = await lock_lanes(database, [row[0] for row in rows])
        rows = await database.fetch(f"DELETE {leased} RETURNING endpoint_id, left(token, 25)", list(tokens))
        await make_due(database, [(row[0], 0) for row in rows], now)
    return {row[1] for row in rows}
