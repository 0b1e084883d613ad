-- Distributes Roster's tables over the nodes of a Citus cluster, and says why each table becomes what it does.
--
-- Before it: create the extension in Roster's database on every node, register the coordinator with
-- citus_set_coordinator_host and the workers with citus_add_node, and run `roster migrate`. The order does not
-- matter. Stop the servers: tables with rows are locked, for reads too, until the rows are on the workers.
--
-- Run this as the role that owns the tables (`roster_migrator`) or a superuser, on the coordinator. It changes
-- everything or nothing. Run it again after each `roster migrate`; what is done already is not repeated:
--   psql --set=ON_ERROR_STOP=1 --file=deploy/sql/citus.sql roster
--
-- `posts` gets as many shards as the setting citus.shard_count says, 32 by default. A shard is on one node, so
-- more nodes than shards are of no use. A query of all shards uses a processor for each, so that more shards make
-- it faster on machines with many cores, and cost the coordinator more connections. To change the number later
-- writes all posts again. 32 is right for up to 8 workers; otherwise take 4 for each worker that you may have:
--   PGOPTIONS='-c citus.shard_count=64' psql …
--
-- There is no command for the way back: dump the database, and restore it into one without the extension. See
-- docs/scaling.md.

BEGIN;

-- Don't write the shards of a node over several connections: such a transaction can't change, afterwards, a
-- table that the shards refer to.
SET LOCAL citus.multi_shard_modify_mode TO 'sequential';
-- A role may have a statement_timeout, which would end the copying of rows.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '10s';

-- Refuse what can't be distributed, before anything is locked.
DO $$
DECLARE
    found text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        RAISE EXCEPTION 'the extension citus is missing'
            USING HINT = 'Run CREATE EXTENSION citus in this database, on every node, and register the nodes.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_dist_node WHERE groupid = 0) THEN
        RAISE EXCEPTION 'Citus does not know under which name the workers reach the coordinator'
            USING HINT = 'Run SELECT citus_set_coordinator_host(''name'', 5432) with its host name and port.';
    END IF;
    IF (SELECT groupid FROM pg_dist_local_group) <> 0 THEN
        RAISE EXCEPTION 'this is a worker' USING HINT = 'Run this on the coordinator.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_dist_node WHERE isactive AND shouldhaveshards) THEN
        RAISE EXCEPTION 'no worker is registered that may have shards'
            USING HINT = 'Run SELECT citus_add_node(''name'', 5432) for each worker.';
    END IF;
    IF to_regclass('roster_schema') IS NULL OR to_regclass('posts') IS NULL THEN
        RAISE EXCEPTION 'Roster has no tables here'
            USING HINT = 'Run `roster migrate` with the URL of this database.';
    END IF;
    SELECT string_agg(DISTINCT application_name || coalesce(' at ' || host(client_addr), ''), ', ') INTO found
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name ~ '^roster( [0-9]+)?$';
    IF found IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_dist_partition WHERE logicalrelid = 'posts'::regclass AND partmethod = 'h'
    ) THEN
        RAISE EXCEPTION 'servers are connected: %', found
            USING HINT = 'Stop them. They must not run while their tables are distributed.';
    END IF;
    IF EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'posts'::regclass AND partmethod = 'n') THEN
        RAISE EXCEPTION 'posts is a local or a reference table of Citus'
            USING HINT = 'Run SELECT create_distributed_table_concurrently(''posts'', ''id''), then this again.';
    END IF;
    IF EXISTS (
        SELECT FROM pg_dist_partition WHERE logicalrelid = 'posts'::regclass AND partmethod <> 'n'
            AND (partmethod <> 'h' OR column_to_column_name(logicalrelid, partkey) <> 'id')
    ) THEN
        RAISE EXCEPTION 'posts is distributed, but not by id'
            USING HINT = 'Run SELECT alter_distributed_table(''posts'', distribution_column => ''id'') first.';
    END IF;
    SELECT string_agg(format('%s on %s', tgname, tgrelid::regclass), ', ') INTO found
    FROM pg_trigger
    WHERE tgrelid IN ('users'::regclass, 'posts'::regclass) AND NOT tgisinternal
      AND tgname NOT IN ('log_insert', 'log_update', 'log_delete', 'log_old_id', 'reset_feed');
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'tables have triggers that are not Roster''s: %', found
            USING HINT = 'Citus distributes no table that has triggers. Drop them.';
    END IF;
END
$$;

-- Citus distributes no table that has triggers, and it commits on the coordinator before the workers. So there
-- is no change feed. What the log has is incomplete from now on: emptying it begins another feed, and no token of
-- before is valid if the triggers come back.
DO $$
DECLARE
    found record;
    has_triggers boolean := false;
BEGIN
    FOR found IN
        SELECT tgname, tgrelid::regclass AS relation FROM pg_trigger
        WHERE tgrelid IN ('users'::regclass, 'posts'::regclass) AND NOT tgisinternal
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.tgname, found.relation);
        has_triggers := true;
    END LOOP;
    IF has_triggers THEN
        TRUNCATE changes;
    END IF;
END
$$;

-- `users` is a reference table: every node has all of its rows. This keeps e-mails unique (a unique key of a
-- distributed table must contain the column that decides where a row is), lets posts refer to users, and lets
-- each node join them. A write of a user is a write on every node.
--
-- `posts` is distributed by `id`, its primary key: a post is read and written on one node, whose share of the
-- posts does not depend on who wrote them. Reads by author ask all nodes.
--
-- The foreign key is dropped and added again: with it, Citus would make `posts` a local table of its own first,
-- which can't be distributed here, and whose sequence begins at 1 again.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'posts'::regclass) THEN
        RETURN;
    END IF;
    ALTER TABLE posts DROP CONSTRAINT IF EXISTS fk_posts_author_id_users;
    IF NOT EXISTS (
        SELECT FROM pg_dist_partition
        WHERE logicalrelid = 'users'::regclass AND partmethod = 'n' AND repmodel = 't'
    ) THEN
        PERFORM create_reference_table('users');
    END IF;
    PERFORM create_distributed_table('posts', 'id', colocate_with => 'none');
    ALTER TABLE posts ADD CONSTRAINT fk_posts_author_id_users
        FOREIGN KEY (author_id) REFERENCES users (id) ON DELETE CASCADE;
END
$$;

-- The rows that were copied are still in the files of the tables themselves, where no query finds them, and
-- neither does a delete. `posts` comes first: it refers to `users`.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['posts', 'users'] LOOP
        IF pg_relation_size(name::regclass) > 0 THEN
            PERFORM truncate_local_data_after_distributing_table(name::regclass);
        END IF;
    END LOOP;
END
$$;

-- `requests` and `bulk_batches` stay on the coordinator, but Citus must know them. They are written in the
-- transactions that write users and posts: the stored answer of a request, the outcomes of a batch. With tables that
-- Citus does not know, it takes a write of one shard for a transaction of one node. It commits that on the worker
-- first, without two-phase commit, and then on the coordinator. A crash in between stores a post whose request_id
-- is not stored: the retry creates it again. With a table that Citus knows, two nodes are written, so it uses
-- two-phase commit. (COPY, and writes of several shards or of users, always use it.)
--
-- The foreign key of `bulk_batches` goes. With it, Citus must know `bulk_loads` too, and refuses to write either
-- after rows were copied to several shards at once. Roster deletes the batches of a load itself.
--
-- Nothing is done for the other tables, which only the coordinator has. No transaction writes one together with
-- users or posts that does not write a table above: bulk_loads, roster_schema, schema_compatibility,
-- alembic_version, roster_servers, page_token_keys, changes, feed.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['requests', 'bulk_batches'] LOOP
        IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = to_regclass(name)) THEN
            IF name = 'bulk_batches' THEN
                ALTER TABLE bulk_batches DROP CONSTRAINT IF EXISTS fk_bulk_batches_load_bulk_loads;
            END IF;
            PERFORM citus_add_local_table_to_metadata(name::regclass);
        END IF;
    END LOOP;
END
$$;

-- Where somebody has made `posts` a local table of Citus by hand, Citus put a new table in its place, whose
-- sequence begins at 1. It continues after the largest id.
SELECT setval(sequence, last)
FROM pg_get_serial_sequence('posts', 'id') AS sequence, (SELECT max(id) AS last FROM posts) AS posts
WHERE last IS NOT NULL AND pg_sequence_last_value(sequence::regclass) IS NULL;

COMMIT;
