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

CREATE INDEX delivery_event ON hookwright.delivery (event_id, id);

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

-- Claim and settle are one call each: what takes a turn of the process's event loop for every statement would otherwise
-- take most of the time, with lanes locked meanwhile. A statement in them sees what was committed before it began, which
-- is what makes it right to lock first and to read then. A version that changes one adds it under the next number, so
-- that processes of the version before go on with theirs.

-- See `_claim.py`. Rows with a place are leases; the last, without, has the time, when to come again, the endpoint counter.
CREATE FUNCTION hookwright.claim_1(
    p_limit integer, p_unproven integer, p_further integer, p_lease bigint, p_concurrency integer, p_busy text[],
    p_busy_counts integer[], p_slow text[], p_held text[], p_token text, p_owner bigint, p_shared boolean
) RETURNS TABLE (
    place integer, endpoint_id text, id text, event_id text, attempts integer, interruptions integer,
    budget_from integer, created_at bigint, available_at bigint, renewed_at bigint, type text, data bytea, tenant text,
    occurred_at bigint, taken_over boolean, proven boolean
) LANGUAGE plpgsql AS $claim$
#variable_conflict use_column
DECLARE
    c_turn CONSTANT integer := 12;               -- a turn is a time divided by 2 ** 12: 4 ms
    c_turns_end CONSTANT bigint := 17592186044416;  -- below are turns, above are times
    c_forever CONSTANT bigint := 4611686018427387904;
    c_woken CONSTANT integer := 1000;
    c_look_again CONSTANT bigint := 5000;
    v_now bigint;
    v_left integer := p_limit;
    v_unproven integer := p_unproven;
    v_further integer := p_further;
    v_lane record;
    v_room integer;
    v_count integer;
    v_first integer;
    v_tolerance bigint;
    v_early boolean;
    v_asked integer;
    v_most integer;
    v_from integer;
    v_to integer;
    v_at integer;
    v_seen text[] := '{}';
    v_taken text[] := '{}';      -- lanes that gave in this claim, and how much
    v_counts integer[] := '{}';
    v_lanes text[];              -- lanes with room, in turn
    v_rooms integer[];
    v_earned integer[];
    v_intervals bigint[];
    v_rates bigint[];
    v_chosen text[];
    v_proven boolean[];
    v_ended text[];
    v_served text[];
    v_empty text[];
    v_places integer := 0;
    v_stopped text[];
    v_after bigint := 0;
    v_last bigint;
    v_others integer := 0;
    v_next bigint;
    v_revision bigint;
    v_passed boolean;
BEGIN
    -- A crash of the server that forgets a claim forgets leases, and no event.
    PERFORM set_config('synchronous_commit', 'off', true);

    -- Make lanes due that were woken, those that nobody else has locked. Lock first, and change in a statement after
    -- that: one that locks a lane by its old version would compare that version, and lose the wake. When somebody has
    -- locked all that the next thousand name, look at those behind.
    v_now := hookwright.clock();
    LOOP
        SELECT array_agg(w.endpoint_id), max(w.last), sum(w.count) INTO v_lanes, v_last, v_asked FROM (
            SELECT next.endpoint_id, max(next.id) AS last, count(*) AS count FROM (
                SELECT wake.id, wake.endpoint_id FROM hookwright.wake WHERE wake.id > v_after
                ORDER BY wake.id LIMIT c_woken
            ) AS next GROUP BY next.endpoint_id
        ) AS w;
        EXIT WHEN v_lanes IS NULL;
        SELECT array_agg(held.endpoint_id) INTO v_served FROM unnest(v_lanes) AS woken (endpoint_id) CROSS JOIN LATERAL (
            SELECT l.endpoint_id FROM hookwright.lane AS l WHERE l.endpoint_id = woken.endpoint_id
            FOR UPDATE SKIP LOCKED
        ) AS held;
        -- Rows of endpoints that were deleted, or disabled, and swept before these were committed: to be swept.
        SELECT array_agg(p.id) INTO v_stopped FROM hookwright.endpoint AS p
        WHERE p.id = ANY(v_lanes) AND (p.deleted OR p.state = 'disabled') AND (
            p.id = ANY(v_served) OR NOT EXISTS (SELECT 1 FROM hookwright.lane AS l WHERE l.endpoint_id = p.id)
        );
        IF v_served IS NOT NULL THEN
            WITH folded AS (
                DELETE FROM hookwright.wake AS w USING (
                    SELECT next.id FROM (
                        SELECT wake.id, wake.endpoint_id FROM hookwright.wake
                        WHERE wake.id > v_after AND wake.id <= v_last ORDER BY wake.id
                    ) AS next WHERE (next.endpoint_id IN (SELECT unnest(v_served))) IS TRUE
                ) AS gone WHERE w.id = gone.id RETURNING w.endpoint_id, w.available_at
            ), due AS (
                SELECT folded.endpoint_id, min(folded.available_at) AS first FROM folded GROUP BY folded.endpoint_id
            )
            UPDATE hookwright.lane AS l
            SET due_at = least(l.due_at, CASE WHEN due.first > v_now THEN due.first ELSE v_now >> c_turn END)
            FROM due WHERE l.endpoint_id = due.endpoint_id;
        END IF;
        EXIT WHEN v_served IS NOT NULL OR v_asked < c_woken;
        v_after := v_last;
    END LOOP;

    IF v_stopped IS NOT NULL THEN
        INSERT INTO hookwright.lane (endpoint_id, due_at, hold_until, sweep)
        SELECT p.id, c_forever, c_forever, 'cancelled' FROM hookwright.endpoint AS p
        WHERE p.id = ANY(v_stopped) AND p.deleted ORDER BY p.id ON CONFLICT DO NOTHING;
        UPDATE hookwright.lane AS l SET sweep = 'skipped' FROM hookwright.endpoint AS p
        WHERE p.id = l.endpoint_id AND p.state = 'disabled' AND NOT p.deleted AND l.sweep IS NULL
            AND l.endpoint_id = ANY(v_stopped);
    END IF;

    IF p_shared THEN  -- lanes that are full elsewhere stay at the head: look past them
        SELECT count(DISTINCT h.endpoint_id) INTO v_others FROM hookwright.lease AS h WHERE h.owner <> p_owner;
    END IF;
    WHILE p_limit > 0 LOOP
        -- Lock the lanes that are due and not held, as many as can matter. Who has room for how much, in turn.
        v_early := false;
        v_lanes := '{}'; v_rooms := '{}'; v_earned := '{}'; v_intervals := '{}'; v_rates := '{}';
        FOR v_lane IN
            WITH a AS MATERIALIZED (
                SELECT greatest(l.due_at, l.hold_until, l.rate_until) AS turn, l.endpoint_id, l.earned, l.cap,
                    l.rate_interval, l.rate_at FROM hookwright.lane AS l
                WHERE l.earned > 0 AND greatest(l.due_at, l.hold_until, l.rate_until) < c_turns_end
                ORDER BY greatest(l.due_at, l.hold_until, l.rate_until)
                LIMIT p_limit + cardinality(p_busy) + v_others FOR UPDATE SKIP LOCKED
            ), b AS MATERIALIZED (
                SELECT greatest(l.due_at, l.hold_until, l.rate_until) >> c_turn AS turn, l.endpoint_id, l.earned, l.cap,
                    l.rate_interval, l.rate_at FROM hookwright.lane AS l
                WHERE l.earned > 0 AND greatest(l.due_at, l.hold_until, l.rate_until) >= c_turns_end
                    AND greatest(l.due_at, l.hold_until, l.rate_until) <= v_now
                ORDER BY greatest(l.due_at, l.hold_until, l.rate_until)
                LIMIT p_limit + cardinality(p_busy) + v_others FOR UPDATE SKIP LOCKED
            ), c AS MATERIALIZED (
                SELECT greatest(l.due_at, l.hold_until, l.rate_until) AS turn, l.endpoint_id, l.earned, l.cap,
                    l.rate_interval, l.rate_at FROM hookwright.lane AS l
                WHERE l.earned = 0 AND greatest(l.due_at, l.hold_until, l.rate_until) < c_turns_end
                ORDER BY greatest(l.due_at, l.hold_until, l.rate_until)
                LIMIT least(p_limit, p_unproven) + cardinality(p_busy) + v_others FOR UPDATE SKIP LOCKED
            ), d AS MATERIALIZED (
                SELECT greatest(l.due_at, l.hold_until, l.rate_until) >> c_turn AS turn, l.endpoint_id, l.earned, l.cap,
                    l.rate_interval, l.rate_at FROM hookwright.lane AS l
                WHERE l.earned = 0 AND greatest(l.due_at, l.hold_until, l.rate_until) >= c_turns_end
                    AND greatest(l.due_at, l.hold_until, l.rate_until) <= v_now
                ORDER BY greatest(l.due_at, l.hold_until, l.rate_until)
                LIMIT least(p_limit, p_unproven) + cardinality(p_busy) + v_others FOR UPDATE SKIP LOCKED
            )
            SELECT * FROM (
                SELECT * FROM a UNION ALL SELECT * FROM b UNION ALL SELECT * FROM c UNION ALL SELECT * FROM d
            ) AS heads ORDER BY heads.turn, heads.endpoint_id
        LOOP
            v_seen := v_seen || v_lane.endpoint_id;
            v_room := coalesce(v_lane.cap, p_concurrency);
            IF p_shared THEN  -- in a statement of its own, after the lock: others' leases are as they are now
                v_room := v_room - (
                    SELECT count(*) FROM hookwright.lease AS h
                    WHERE h.endpoint_id = v_lane.endpoint_id AND h.until > v_now AND h.owner <> p_owner
                );
            END IF;
            v_count := coalesce(p_busy_counts[array_position(p_busy, v_lane.endpoint_id)], 0);
            v_first := CASE WHEN v_lane.endpoint_id = ANY(p_busy) OR v_lane.endpoint_id = ANY(v_taken) THEN 0 ELSE 1 END;
            v_count := v_count + coalesce(v_counts[array_position(v_taken, v_lane.endpoint_id)], 0);
            v_room := least(greatest(1, v_lane.earned), v_room) - v_count;
            IF v_room > 0 AND v_lane.rate_interval IS NOT NULL THEN  -- the generic cell rate algorithm
                v_tolerance := greatest(0, 1000000 - v_lane.rate_interval);
                IF v_now + v_tolerance < greatest(v_lane.rate_at, v_now) THEN
                    v_room := 0;
                ELSE
                    v_room := least(v_room, (v_now + v_tolerance - greatest(v_lane.rate_at, v_now))
                        / v_lane.rate_interval + 1);
                END IF;
                IF v_room <= 0 THEN
                    UPDATE hookwright.lane AS l SET rate_until = v_lane.rate_at - v_tolerance
                    WHERE l.endpoint_id = v_lane.endpoint_id;
                    v_early := true;
                END IF;
            END IF;
            v_room := least(v_room, v_left, v_first + v_further);
            IF v_room > 0 THEN
                v_lanes := v_lanes || v_lane.endpoint_id;
                v_rooms := v_rooms || v_room;
                v_earned := v_earned || v_lane.earned;
                v_intervals := v_intervals || v_lane.rate_interval;
                v_rates := v_rates || v_lane.rate_at;
            END IF;
        END LOOP;

        -- Serve them, some at a time: those behind find nothing left.
        v_from := 1;
        v_most := 4 * p_limit;
        WHILE v_from <= cardinality(v_lanes) AND v_left > 0 LOOP
            v_asked := 0;
            v_to := v_from - 1;
            WHILE v_to < cardinality(v_lanes) AND v_asked < v_most LOOP
                v_to := v_to + 1;
                v_asked := v_asked + v_rooms[v_to];
            END LOOP;
            v_chosen := '{}'; v_proven := '{}'; v_ended := '{}'; v_served := '{}'; v_empty := '{}';

            -- Three walks along an index for each lane: rows for now, rows by time, and leases that have ended.
            FOR v_lane IN
                SELECT asked.place, asked.endpoint_id, asked.room, due.ids, due.ended
                FROM unnest(v_lanes[v_from:v_to], v_rooms[v_from:v_to]) WITH ORDINALITY
                    AS asked (endpoint_id, room, place)
                CROSS JOIN LATERAL (
                    SELECT array_agg(found.id ORDER BY found.since, found.id) AS ids,
                        array_agg(found.id) FILTER (WHERE found.ended) AS ended
                    FROM (
                        (SELECT d.id, d.created_at AS since, false AS ended FROM hookwright.delivery AS d
                         WHERE d.endpoint_id = asked.endpoint_id AND d.available_at <= 0 AND NOT EXISTS (
                             SELECT 1 FROM hookwright.lease AS h
                             WHERE h.endpoint_id = d.endpoint_id AND h.delivery_id = d.id
                         ) AND (d.id IN (SELECT unnest(p_held))) IS NOT TRUE ORDER BY d.available_at, d.id LIMIT asked.room)
                        UNION ALL
                        (SELECT d.id, d.available_at, false FROM hookwright.delivery AS d
                         WHERE d.endpoint_id = asked.endpoint_id AND d.available_at > 0 AND d.available_at <= v_now
                         AND NOT EXISTS (
                             SELECT 1 FROM hookwright.lease AS h
                             WHERE h.endpoint_id = d.endpoint_id AND h.delivery_id = d.id
                         ) AND (d.id IN (SELECT unnest(p_held))) IS NOT TRUE ORDER BY d.available_at, d.id LIMIT asked.room)
                        UNION ALL
                        (SELECT d.id, CASE WHEN h.until > 0 THEN h.until ELSE d.created_at END, true
                         FROM hookwright.lease AS h JOIN hookwright.delivery AS d ON d.id = h.delivery_id
                         WHERE h.endpoint_id = asked.endpoint_id AND h.until <= v_now
                         AND (h.delivery_id IN (SELECT unnest(p_held))) IS NOT TRUE
                         ORDER BY h.until, h.delivery_id LIMIT asked.room)
                    ) AS found
                ) AS due ORDER BY asked.place
            LOOP
                IF v_lane.ids IS NULL THEN
                    v_empty := v_empty || v_lane.endpoint_id;
                    CONTINUE;
                END IF;
                v_at := v_from + v_lane.place::integer - 1;
                v_first := CASE WHEN v_lane.endpoint_id = ANY(p_busy) OR v_lane.endpoint_id = ANY(v_taken)
                    THEN 0 ELSE 1 END;
                v_count := least(v_lane.room, cardinality(v_lane.ids), v_left, v_first + v_further);
                IF v_earned[v_at] = 0 OR v_lane.endpoint_id = ANY(p_slow) THEN
                    v_count := least(v_count, v_unproven);
                    v_unproven := v_unproven - v_count;
                END IF;
                CONTINUE WHEN v_count <= 0;
                v_left := v_left - v_count;
                v_further := v_further - greatest(0, v_count - v_first);
                IF v_lane.endpoint_id = ANY(v_taken) THEN
                    v_room := array_position(v_taken, v_lane.endpoint_id);
                    v_counts[v_room] := v_counts[v_room] + v_count;
                ELSE
                    v_taken := v_taken || v_lane.endpoint_id;
                    v_counts := v_counts || v_count;
                END IF;
                v_chosen := v_chosen || v_lane.ids[1:v_count];
                v_proven := v_proven || array_fill(v_earned[v_at] > 0, ARRAY[v_count]);
                v_ended := v_ended || coalesce(v_lane.ended, '{}');
                v_served := v_served || v_lane.endpoint_id;
                IF v_intervals[v_at] IS NOT NULL THEN
                    v_rates[v_at] := greatest(v_rates[v_at], v_now) + v_intervals[v_at] * v_count;
                    UPDATE hookwright.lane AS l SET rate_at = v_rates[v_at],
                        rate_until = v_rates[v_at] - greatest(0, 1000000 - v_intervals[v_at])
                    WHERE l.endpoint_id = v_lane.endpoint_id;
                END IF;
            END LOOP;

            -- Lease them, each under a fresh token. What is taken over from a process that died has a lease already.
            IF cardinality(v_chosen) > 0 THEN
                v_ended := ARRAY(SELECT unnest(v_ended) INTERSECT SELECT unnest(v_chosen));
                IF cardinality(v_ended) > 0 THEN
                    WITH taken AS (
                        UPDATE hookwright.delivery AS d SET attempt_count = d.attempt_count + 1,
                            interruptions = d.interruptions + 1, last_error = 'interrupted', last_status = NULL
                        WHERE d.id = ANY(v_ended) RETURNING d.id, d.attempt_count
                    )
                    INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, error)
                    SELECT taken.id, taken.attempt_count, v_now, 0, 'interrupted' FROM taken;
                END IF;
                RETURN QUERY
                WITH chosen AS MATERIALIZED (
                    SELECT c.id, c.proven, v_places + c.place AS place
                    FROM unnest(v_chosen, v_proven) WITH ORDINALITY AS c (id, proven, place)
                ), leased AS (
                    INSERT INTO hookwright.lease AS h (endpoint_id, delivery_id, token, until, attempt_count, owner)
                    SELECT d.endpoint_id, d.id, p_token || chosen.place, v_now + p_lease, d.attempt_count, p_owner
                    FROM chosen JOIN hookwright.delivery AS d ON d.id = chosen.id
                    ON CONFLICT (endpoint_id, delivery_id) DO UPDATE SET token = excluded.token, until = excluded.until,
                        attempt_count = excluded.attempt_count, owner = excluded.owner
                )
                SELECT chosen.place::integer, d.endpoint_id, d.id, d.event_id, d.attempt_count, d.interruptions,
                    d.budget_from, d.created_at, d.available_at, d.renewed_at, e.type, e.data, e.tenant, e.occurred_at,
                    d.id = ANY(v_ended), chosen.proven
                FROM chosen JOIN hookwright.delivery AS d ON d.id = chosen.id
                JOIN hookwright.event AS e ON e.id = d.event_id;
                v_places := v_places + cardinality(v_chosen);
            END IF;

            -- Move the lanes on: to the time of their first row, or to their next turn. A hold that is over goes: it
            -- would be the lane's place in the queue for ever, before all who take turns. Lanes in which nothing was
            -- found were early, and may have hidden others: then look again.
            IF cardinality(v_served) + cardinality(v_empty) > 0 THEN
                WITH moved AS (
                    UPDATE hookwright.lane AS l SET
                        hold_until = CASE WHEN l.hold_until > v_now THEN l.hold_until ELSE 0 END,
                        due_at = CASE WHEN found.first > v_now THEN found.first ELSE (v_now >> c_turn) + 1 END
                    FROM (
                        SELECT moving.endpoint_id, least(coalesce((
                            SELECT d.available_at FROM hookwright.delivery AS d
                            WHERE d.endpoint_id = moving.endpoint_id AND d.available_at IS NOT NULL AND NOT EXISTS (
                                SELECT 1 FROM hookwright.lease AS h
                                WHERE h.endpoint_id = d.endpoint_id AND h.delivery_id = d.id
                            ) ORDER BY d.available_at, d.id LIMIT 1
                        ), c_forever), coalesce((
                            SELECT min(h.until) FROM hookwright.lease AS h WHERE h.endpoint_id = moving.endpoint_id
                        ), c_forever)) AS first FROM unnest(v_served || v_empty) AS moving (endpoint_id)
                    ) AS found WHERE l.endpoint_id = found.endpoint_id RETURNING l.endpoint_id, l.due_at
                )
                SELECT v_early OR coalesce(bool_or(moved.due_at > v_now), false) INTO v_early FROM moved
                WHERE moved.endpoint_id = ANY(v_empty);
            END IF;
            v_from := v_to + 1;
            v_most := 2 * v_most;
        END LOOP;
        EXIT WHEN NOT v_early;
    END LOOP;

    -- When to come again: when the next lane opens, or in a moment for what somebody else had locked.
    SELECT min(later.ready) INTO v_next FROM (
        (SELECT greatest(l.due_at, l.hold_until, l.rate_until) AS ready FROM hookwright.lane AS l
         WHERE l.earned > 0 AND greatest(l.due_at, l.hold_until, l.rate_until) > greatest(v_now, c_turns_end)
         ORDER BY greatest(l.due_at, l.hold_until, l.rate_until) LIMIT 1)
        UNION ALL
        (SELECT greatest(l.due_at, l.hold_until, l.rate_until) FROM hookwright.lane AS l
         WHERE l.earned = 0 AND greatest(l.due_at, l.hold_until, l.rate_until) > greatest(v_now, c_turns_end)
         ORDER BY greatest(l.due_at, l.hold_until, l.rate_until) LIMIT 1)
    ) AS later;
    SELECT m.value, v_left > 0 AND (EXISTS (SELECT 1 FROM hookwright.wake) OR EXISTS (
        SELECT 1 FROM hookwright.lane AS l
        WHERE l.earned > 0 AND greatest(l.due_at, l.hold_until, l.rate_until) <= v_now AND l.endpoint_id <> ALL(v_seen)
    ) OR v_unproven > 0 AND EXISTS (
        SELECT 1 FROM hookwright.lane AS l
        WHERE l.earned = 0 AND greatest(l.due_at, l.hold_until, l.rate_until) <= v_now AND l.endpoint_id <> ALL(v_seen)
    )) INTO v_revision, v_passed FROM hookwright.meta AS m WHERE m.key = 'endpoints_revision';
    IF v_passed THEN
        v_next := least(coalesce(v_next, c_forever), v_now + c_look_again);
    END IF;
    created_at := v_now;
    available_at := CASE WHEN v_next < c_forever THEN v_next END;
    renewed_at := v_revision;
    RETURN NEXT;
END $claim$;

-- See `_settle.py`: results that are all successes, told once each. Returns the time, the places of those whose lease
-- held, and what their lanes were before.
CREATE FUNCTION hookwright.settle_1(
    p_ids text[], p_endpoints text[], p_tokens text[], p_started bigint[], p_duration bigint[], p_status integer[],
    p_headers text[], p_body bytea[], p_truncated boolean[], p_sha256 bytea[],
    OUT now bigint, OUT held integer[], OUT lanes text[], OUT failures integer[], OUT stopped boolean[]
) LANGUAGE plpgsql AS $settle$
#variable_conflict use_column
DECLARE
    v_now bigint;
BEGIN
    SELECT array_agg(l.endpoint_id), array_agg(l.failures), array_agg(l.sweep IS NOT NULL)
    INTO lanes, failures, stopped FROM (
        SELECT l.endpoint_id, l.failures, l.sweep FROM hookwright.lane AS l
        WHERE l.endpoint_id = ANY(p_endpoints) ORDER BY l.endpoint_id FOR UPDATE
    ) AS l;
    v_now := hookwright.clock();
    -- In a statement after the lock: a lease that was read before it may be another one by now.
    WITH given_up AS (
        DELETE FROM hookwright.lease AS h
        USING unnest(p_ids, p_endpoints, p_tokens, p_started, p_duration, p_status, p_headers, p_body, p_truncated,
            p_sha256) WITH ORDINALITY AS told (id, endpoint_id, token, started_at, duration, status, response_headers,
            response_body, response_truncated, body_sha256, place)
        WHERE h.endpoint_id = told.endpoint_id AND h.delivery_id = told.id AND h.token = told.token
        RETURNING told.*, h.attempt_count + 1 AS number
    ), ended AS (
        UPDATE hookwright.delivery AS d SET state = 'succeeded', available_at = NULL, finished_at = v_now,
            attempt_count = g.number, last_status = g.status, last_error = NULL
        FROM given_up AS g WHERE d.id = g.id
    ), tried AS (
        INSERT INTO hookwright.attempt (delivery_id, number, started_at, duration, status, response_headers,
            response_body, response_truncated, body_sha256)
        SELECT g.id, g.number, g.started_at, g.duration, g.status, g.response_headers, g.response_body,
            g.response_truncated, g.body_sha256 FROM given_up AS g
    ), counted AS (
        UPDATE hookwright.lane AS l SET failures = 0, failing_since = NULL, throttles = 0, last_success = true,
            last_at = v_now, earned = least(1024, greatest(1, l.earned) * (1 << least(10, c.successes)::integer))
        FROM (SELECT g.endpoint_id, count(*) AS successes FROM given_up AS g GROUP BY g.endpoint_id) AS c
        WHERE l.endpoint_id = c.endpoint_id
    )
    SELECT array_agg(g.place::integer) INTO held FROM given_up AS g;
    now := v_now;
END $settle$;

-- See `_callers.py`: one event in an application's transaction, which only appends. It does what the statement of
-- `_enqueue.py` does for many, at a third of its cost. Returns 1 when it is stored, and 0 when endpoints changed or its id
-- or key is there already; unless `p_checked`, -1 where the transaction's snapshot may be older than the emit.
CREATE FUNCTION hookwright.emit_1(
    p_id text, p_type text, p_tenant text, p_data bytea, p_attributes text, p_occurred_at bigint, p_key text,
    p_digest bytea, p_count integer, p_trace text, p_revision bigint, p_rows text[], p_endpoints text[],
    p_available_at bigint[], p_skipped boolean[], p_channel text, p_checked boolean
) RETURNS integer LANGUAGE plpgsql AS $emit$
DECLARE
    v_now CONSTANT bigint := hookwright.clock();
    v_revision bigint;
BEGIN
    IF NOT p_checked AND current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN -1;
    END IF;
    SELECT m.value INTO v_revision FROM hookwright.meta AS m WHERE m.key = 'endpoints_revision';
    IF p_revision <> v_revision THEN
        RETURN 0;
    END IF;
    IF p_digest IS NULL AND p_key IS NULL THEN  -- an id of ours, which nobody else has
        INSERT INTO hookwright.event (id, type, tenant, data, attributes, occurred_at, created_at, delivery_count,
            trace_context)
        VALUES (p_id, p_type, p_tenant, p_data, p_attributes, p_occurred_at, v_now, p_count, p_trace);
    ELSE
        INSERT INTO hookwright.event (id, type, tenant, data, attributes, occurred_at, created_at, idempotency_key,
            digest, delivery_count, trace_context)
        VALUES (p_id, p_type, p_tenant, p_data, p_attributes, p_occurred_at, v_now, p_key, p_digest, p_count, p_trace)
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN 0;
        END IF;
    END IF;
    INSERT INTO hookwright.delivery (id, event_id, endpoint_id, state, available_at, created_at, finished_at)
    SELECT d.id, p_id, d.endpoint_id, CASE WHEN d.skipped THEN 'skipped' ELSE 'pending' END,
        CASE WHEN NOT d.skipped THEN d.available_at END, v_now, CASE WHEN d.skipped THEN v_now END
    FROM unnest(p_rows, p_endpoints, p_available_at, p_skipped) AS d (id, endpoint_id, available_at, skipped);
    IF p_count > 0 THEN
        INSERT INTO hookwright.wake (endpoint_id, available_at)
        SELECT d.endpoint_id, d.available_at FROM unnest(p_endpoints, p_available_at, p_skipped)
            AS d (endpoint_id, available_at, skipped) WHERE NOT d.skipped;
        IF p_channel IS NOT NULL THEN
            PERFORM pg_notify(p_channel, '');
        END IF;
    END IF;
    RETURN 1;
END $emit$;
