-- Times are integer microseconds UTC. Ids sort by time, so that inserts append to every index that ends in one.

CREATE TABLE hookwright_endpoint (
    id TEXT PRIMARY KEY,
    revision INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    disabled_reason TEXT,
    tenant TEXT,
    all_tenants INTEGER NOT NULL DEFAULT 0,
    url TEXT NOT NULL,
    events TEXT NOT NULL,
    filters TEXT NOT NULL,
    name TEXT,
    description TEXT,
    metadata TEXT NOT NULL,
    headers TEXT NOT NULL,
    keys TEXT NOT NULL,
    profile TEXT NOT NULL,
    concurrency INTEGER,
    timeout REAL,
    rate_limit REAL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX hookwright_endpoint_revision ON hookwright_endpoint (revision);

CREATE TABLE hookwright_event (
    id TEXT PRIMARY KEY,
    type TEXT NOT NULL,
    tenant TEXT,
    data BLOB NOT NULL,
    attributes TEXT NOT NULL,
    occurred_at INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    idempotency_key TEXT,
    digest BLOB,
    delivery_count INTEGER NOT NULL,
    trace_context TEXT,
    expunged_at INTEGER
);

CREATE UNIQUE INDEX hookwright_event_idempotency ON hookwright_event (idempotency_key)
WHERE idempotency_key IS NOT NULL;

CREATE INDEX hookwright_event_created ON hookwright_event (created_at);

-- available_at: since when it may be sent; 0 is at once. All that are pending have one, and none that has ended. A lease
-- leaves it as it is.
CREATE TABLE hookwright_delivery (
    id TEXT PRIMARY KEY,
    event_id TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    state TEXT NOT NULL,
    available_at INTEGER,
    attempt_count INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    budget_from INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    renewed_at INTEGER,
    finished_at INTEGER,
    last_status INTEGER,
    last_error TEXT
) WITHOUT ROWID;

-- Not WHERE state = 'pending': SQLite would look that up in the row, for each entry that it walks past.
CREATE INDEX hookwright_delivery_queue ON hookwright_delivery (endpoint_id, available_at, id)
WHERE available_at IS NOT NULL;

CREATE INDEX hookwright_delivery_event ON hookwright_delivery (event_id);

CREATE INDEX hookwright_delivery_endpoint ON hookwright_delivery (endpoint_id, id);

-- Not IN with three values: SQLite builds a table of them for each row that is written, which takes 25 us.
CREATE INDEX hookwright_delivery_unsuccessful ON hookwright_delivery (state, id)
WHERE state <> 'pending' AND state <> 'succeeded';

CREATE INDEX hookwright_delivery_endpoint_unsuccessful ON hookwright_delivery (endpoint_id, state, id)
WHERE state <> 'pending' AND state <> 'succeeded';

-- Only pending deliveries have one. until: when it may be taken over, so a crash heals by itself; 0: at once.
-- attempt_count: how many attempts the delivery had before this one.
CREATE TABLE hookwright_lease (
    endpoint_id TEXT NOT NULL,
    delivery_id TEXT NOT NULL,
    token TEXT NOT NULL,
    until INTEGER NOT NULL,
    attempt_count INTEGER NOT NULL,
    PRIMARY KEY (endpoint_id, delivery_id)
) WITHOUT ROWID;

CREATE TABLE hookwright_attempt (
    delivery_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    duration INTEGER NOT NULL,
    status INTEGER,
    error TEXT,
    detail TEXT,
    response_headers TEXT,
    response_body BLOB,
    response_truncated INTEGER NOT NULL DEFAULT 0,
    body_sha256 BLOB,
    PRIMARY KEY (delivery_id, number)
) WITHOUT ROWID;

-- One row for each endpoint. due_at: early, never late (see _lanes.py); hold_until: everything that makes it wait.
-- failures, failing_since, throttles: in a row. rate_interval: microseconds between attempts; rate_at: when the next one
-- would be due if they were evenly spaced (GCRA), rate_until when the lane opens again for that.
CREATE TABLE hookwright_lane (
    endpoint_id TEXT PRIMARY KEY,
    due_at INTEGER NOT NULL,
    hold_until INTEGER NOT NULL DEFAULT 0,
    earned INTEGER NOT NULL DEFAULT 0,
    cap INTEGER,
    failures INTEGER NOT NULL DEFAULT 0,
    failing_since INTEGER,
    throttles INTEGER NOT NULL DEFAULT 0,
    last_success INTEGER,
    last_at INTEGER,
    tested_at INTEGER,
    rate_interval INTEGER,
    rate_at INTEGER NOT NULL DEFAULT 0,
    rate_until INTEGER NOT NULL DEFAULT 0,
    sweep TEXT
) WITHOUT ROWID;

CREATE INDEX hookwright_lane_ready ON hookwright_lane (earned > 0, max(due_at, hold_until, rate_until));

CREATE INDEX hookwright_lane_sweep ON hookwright_lane (sweep) WHERE sweep IS NOT NULL;

-- One emit in an application's transaction, in one statement (see _callers.py): what fails in it backs out all of it.
-- pending and skipped: delivery and endpoint ids; due_at: of their lanes. No function of SQLite's that older versions
-- refuse in a trigger when the application says trusted_schema = OFF, as json_extract().
CREATE VIEW hookwright_emit AS
SELECT
    NULL AS endpoints_revision,
    NULL AS id,
    NULL AS type,
    NULL AS tenant,
    NULL AS data,
    NULL AS attributes,
    NULL AS occurred_at,
    NULL AS created_at,
    NULL AS delivery_count,
    NULL AS trace_context,
    NULL AS pending,
    NULL AS available_at,
    NULL AS due_at,
    NULL AS skipped
WHERE 0;

CREATE TRIGGER hookwright_emit_insert INSTEAD OF INSERT ON hookwright_emit
BEGIN
    SELECT RAISE(ABORT, 'hookwright: stale endpoints') FROM hookwright_meta
    WHERE key = 'endpoints_revision' AND value <> NEW.endpoints_revision;

    INSERT INTO hookwright_event (
        id, type, tenant, data, attributes, occurred_at, created_at, delivery_count, trace_context
    ) VALUES (
        NEW.id, NEW.type, NEW.tenant, NEW.data, NEW.attributes, NEW.occurred_at, NEW.created_at, NEW.delivery_count,
        NEW.trace_context
    );

    INSERT INTO hookwright_delivery (id, event_id, endpoint_id, state, available_at, created_at)
    SELECT key, NEW.id, value, 'pending', NEW.available_at, NEW.created_at FROM json_each(NEW.pending);

    INSERT INTO hookwright_delivery (id, event_id, endpoint_id, state, created_at, finished_at)
    SELECT key, NEW.id, value, 'skipped', NEW.created_at, NEW.created_at FROM json_each(NEW.skipped);

    UPDATE hookwright_lane SET due_at = NEW.due_at
    WHERE endpoint_id IN (SELECT value FROM json_each(NEW.pending)) AND due_at > NEW.due_at;
END;
