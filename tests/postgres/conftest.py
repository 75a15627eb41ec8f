"""Until hookwright.storage.postgres has PostgresStorage. Then this file goes, and the first line of manual.py."""

from __future__ import annotations

collect_ignore = ["test_postgres_contract.py"]
