-- Times are integer microseconds UTC. Ids are compared byte by byte (COLLATE "C"): they sort by time, so that inserts
-- append to every index that ends in one. `hookwright.` stands for the schema's name.

-- The one source of time, for every process: leases and due times are compared with nothing else.
CREATE FUNCTION hookwright.clock() RETURNS bigint LANGUAGE sql VOLATILE PARALLEL SAFE
AS 'SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint';

CREATE TABLE hookwright.endpoint (
    id text COLLATE "C" PRIMARY KEY,
    revision bigint NOT NULL,
    deleted boolean NOT NULL DEFAULT false,
    state text NOT NULL,
    disabled_reason text,
    tenant text,
    all_tenants boolean NOT NULL DEFAULT false,
    url text NOT NULL,
    events text NOT NULL,
    filters text NOT NULL,
    name text,
    description text,
    metadata text NOT NULL,
    headers text NOT NULL,
    keys text NOT NULL,
    profile text NOT NULL,
    concurrency integer,
    timeout double precision,
    rate_limit double precision,
    created_at bigint NOT NULL,
    updated_at bigint NOT NULL
);

CREATE INDEX endpoint_revision ON hookwright.endpoint (revision);

CREATE TABLE hookwright.event (
    id text COLLATE "C" PRIMARY KEY,
    type text NOT NULL,
    tenant text,
    data bytea NOT NULL,
    attributes text NOT NULL,
    occurred_at bigint NOT NULL,
    created_at bigint NOT NULL,
    idempotency_key text COLLATE "C",
    digest bytea,
    delivery_count integer NOT NULL,
    trace_context text,
    expunged_at bigint
);

CREATE UNIQUE INDEX event_idempotency ON hookwright.event (idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE INDEX event_created ON hookwright.event (created_at, id);

-- available_at: since when it may be sent; 0 is at once. All that are pending have one, and none that has ended. A lease
-- leaves it as it is.
CREATE TABLE hookwright.delivery (
    id text COLLATE "C" PRIMARY KEY,
    event_id text COLLATE "C" NOT NULL,
    endpoint_id text COLLATE "C" NOT NULL,
    state text NOT NULL,
    available_at bigint,
    attempt_count integer NOT NULL DEFAULT 0,
    interruptions integer NOT NULL DEFAULT 0,
    budget_from integer NOT NULL DEFAULT 0,
    created_at bigint NOT NULL,
    renewed_at bigint,
    finished_at bigint,
    last_status integer,
    last_error text
);

CREATE INDEX delivery_queue ON hookwright.delivery (endpoint_id, available_at, id) WHERE available_at IS NOT NULL;

CREATE INDEX delivery_event ON hookwright.delivery (event_id);

CREATE INDEX delivery_endpoint ON hookwright.delivery (endpoint_id, id);

CREATE INDEX delivery_unsuccessful ON hookwright.delivery (state, id)
WHERE state <> 'pending' AND state <> 'succeeded';

CREATE INDEX delivery_endpoint_unsuccessful ON hookwright.delivery (endpoint_id, state, id)
WHERE state <> 'pending' AND state <> 'succeeded';

-- Only pending deliveries have one. until: when it may be taken over, so a crash heals by itself; 0: at once.
-- attempt_count: how many attempts the delivery had before this one. owner: which process has it (see acquire).
CREATE TABLE hookwright.lease (
    endpoint_id text COLLATE "C" NOT NULL,
    delivery_id text COLLATE "C" NOT NULL,
    token text NOT NULL,
    until bigint NOT NULL,
    attempt_count integer NOT NULL,
    owner bigint NOT NULL,
    PRIMARY KEY (endpoint_id, delivery_id)
);

CREATE TABLE hookwright.attempt (
    delivery_id text COLLATE "C" NOT NULL,
    number integer NOT NULL,
    started_at bigint NOT NULL,
    duration bigint NOT NULL,
    status integer,
    error text,
    detail text,
    response_headers text,
    response_body bytea,
    response_truncated boolean NOT NULL DEFAULT false,
    body_sha256 bytea,
    PRIMARY KEY (delivery_id, number)
);

-- One row for each endpoint, and the lock that guards its deliveries and leases: whoever changes these holds it, and
-- takes several in the order of their ids. due_at: early, never late, but for what waits in `wake`; hold_until:
-- everything that makes it wait. failures, failing_since, throttles: in a row. rate_interval: microseconds between
-- attempts; rate_at: when the next one would be due if they were evenly spaced (GCRA), rate_until when the lane opens
-- again for that.
CREATE TABLE hookwright.lane (
    endpoint_id text COLLATE "C" PRIMARY KEY,
    due_at bigint NOT NULL,
    hold_until bigint NOT NULL DEFAULT 0,
    earned integer NOT NULL DEFAULT 0,
    cap integer,
    failures integer NOT NULL DEFAULT 0,
    failing_since bigint,
    throttles integer NOT NULL DEFAULT 0,
    last_success boolean,
    last_at bigint,
    tested_at bigint,
    rate_interval bigint,
    rate_at bigint NOT NULL DEFAULT 0,
    rate_until bigint NOT NULL DEFAULT 0,
    sweep text
) WITH (fillfactor = 50);

CREATE INDEX lane_proven ON hookwright.lane (greatest(due_at, hold_until, rate_until)) WHERE earned > 0;

CREATE INDEX lane_unproven ON hookwright.lane (greatest(due_at, hold_until, rate_until)) WHERE earned = 0;

CREATE INDEX lane_sweep ON hookwright.lane (sweep) WHERE sweep IS NOT NULL;

-- What was stored since the last claim: an emit only appends, so that a transaction of the application that stays open
-- holds up nobody. A claim makes the lanes due that are named here.
CREATE TABLE hookwright.wake (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint_id text COLLATE "C" NOT NULL,
    available_at bigint NOT NULL
);

-- Tables that are small and change all the time are looked after early; in those that grow, a hundredth is enough.
ALTER TABLE hookwright.wake SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0);
ALTER TABLE hookwright.lease SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0);
ALTER TABLE hookwright.lane SET (autovacuum_vacuum_scale_factor = 0.1, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0);
ALTER TABLE hookwright.delivery SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0.02);
ALTER TABLE hookwright.event SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
ALTER TABLE hookwright.attempt SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- ANALYZE would keep samples of their values, secrets and personal data among them; nothing is planned by these.
ALTER TABLE hookwright.endpoint ALTER url SET STATISTICS 0, ALTER filters SET STATISTICS 0, ALTER name SET STATISTICS 0,
    ALTER description SET STATISTICS 0, ALTER metadata SET STATISTICS 0, ALTER headers SET STATISTICS 0,
    ALTER keys SET STATISTICS 0;
ALTER TABLE hookwright.event ALTER data SET STATISTICS 0, ALTER attributes SET STATISTICS 0,
    ALTER trace_context SET STATISTICS 0;
ALTER TABLE hookwright.attempt ALTER detail SET STATISTICS 0, ALTER response_headers SET STATISTICS 0,
    ALTER response_body SET STATISTICS 0;
