"""Many endpoints, stored without asking a dispatcher for each, and what a process takes of the memory."""

from __future__ import annotations

import base64
import os
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hookwright._ids import new_id
from hookwright._models import EndpointRow, Key
from hookwright.storage.sqlite import _endpoints
from hookwright.storage.sqlite._owner import Database

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookwright._models import Tenant


def typical(number: int, tenant: Tenant, events: Iterable[str]) -> EndpointRow:
    """Return an endpoint as customers have them: a url of 60 characters, a secret, a name, metadata and a header."""
    now = time.time_ns() // 1000
    return EndpointRow(
        id=new_id("ep", now),
        url=f"https://customer-{number:06d}.example.com/webhooks/receive/v1/".ljust(60, "x"),
        events=tuple(events),
        created_at=now,
        updated_at=now,
        keys=(Key("whsec_" + base64.b64encode(os.urandom(32)).decode()),),
        name=f"customer {number}",
        metadata={"plan": "pro", "region": "eu"},
        headers=(("X-Api-Token", "0123456789abcdef"),),
        tenant=tenant,
    )


def store_endpoints(path: Path, rows: Iterable[EndpointRow]) -> None:
    """Store them in one transaction, as the storage's own verb stores one."""
    database = sqlite3.connect(path, isolation_level=None, factory=Database)
    database.execute("BEGIN IMMEDIATE")
    for row in rows:
        _endpoints.create(database, row)
    database.execute("COMMIT")
    database.close()


def resident() -> float:
    """Return what this process has in memory now (MB)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text("ascii").partition("VmRSS:")[2].split()[0]) / 1024
    return int(subprocess.check_output(("ps", "-o", "rss=", "-p", str(os.getpid())))) / 1024
