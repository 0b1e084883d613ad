-- The roles of Roster on PostgreSQL: one for migrations, which owns the schema, and one for the service,
-- which can only read and write rows.
--
-- Run this as a superuser in Roster's own database before the first migration. Running it again is safe:
--   psql --set=ON_ERROR_STOP=1 --file=deploy/sql/roles.sql roster
-- Then give each role a password with \password, or a certificate in pg_hba.conf.

BEGIN;

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['roster_migrator', 'roster_service'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', name);
        END IF;
    END LOOP;
    -- By default, everybody may connect and create temporary tables.
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO roster_migrator, roster_service', current_database());
END
$$;

-- Before PostgreSQL 15, everybody may create tables in this schema.
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO roster_migrator;
GRANT USAGE ON SCHEMA public TO roster_service;

-- Privileges on everything that migrations create from now on. `restore` needs UPDATE on sequences to move them.
ALTER DEFAULT PRIVILEGES FOR ROLE roster_migrator IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO roster_service;
ALTER DEFAULT PRIVILEGES FOR ROLE roster_migrator IN SCHEMA public
    GRANT USAGE, UPDATE ON SEQUENCES TO roster_service;

-- The service reads the revision of the schema, but only migrations may write it. If a migration created these
-- tables, the default privileges would let the service write to them.
CREATE TABLE IF NOT EXISTS roster_schema (
    version_num varchar(32) CONSTRAINT roster_schema_pkc PRIMARY KEY
);
CREATE TABLE IF NOT EXISTS schema_compatibility (
    min_revision varchar(32) NOT NULL,
    keeps_alembic_version boolean NOT NULL
);
ALTER TABLE roster_schema OWNER TO roster_migrator;
ALTER TABLE schema_compatibility OWNER TO roster_migrator;
REVOKE ALL ON roster_schema, schema_compatibility FROM roster_service;
GRANT SELECT ON roster_schema, schema_compatibility TO roster_service;

-- PostgreSQL logs the service's statements without parameters and rows. Only a superuser can set this; if you are
-- not one, have it set in the server's configuration.
ALTER ROLE roster_service SET log_parameter_max_length = 0;
ALTER ROLE roster_service SET log_error_verbosity = 'terse';

COMMIT;
