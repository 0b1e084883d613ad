BEGIN;

SET LOCAL citus.multi_shard_modify_mode TO 'sequential';

-- Citus allows no triggers on the tables that it distributes, so there is no change feed.
DO $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT tgname, tgrelid::regclass AS tgtable FROM pg_trigger
        WHERE tgrelid IN ('users'::regclass, 'posts'::regclass) AND NOT tgisinternal
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.tgname, found.tgtable);
    END LOOP;
    IF EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'posts'::regclass) THEN
        RETURN;
    END IF;
    ALTER TABLE posts DROP CONSTRAINT IF EXISTS fk_posts_author_id_users;
    PERFORM create_reference_table('users');
    PERFORM create_distributed_table('posts', 'id', colocate_with => 'none');
    ALTER TABLE posts ADD CONSTRAINT fk_posts_author_id_users
        FOREIGN KEY (author_id) REFERENCES users (id) ON DELETE CASCADE;
    ALTER TABLE bulk_batches DROP CONSTRAINT IF EXISTS fk_bulk_batches_load_bulk_loads;
    PERFORM citus_add_local_table_to_metadata('bulk_batches');
    PERFORM citus_add_local_table_to_metadata('requests');
END
$$;

COMMIT;
