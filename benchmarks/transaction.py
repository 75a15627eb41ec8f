"""transaction: emit in the caller's transaction, against the same transaction with two plain inserts instead."""
