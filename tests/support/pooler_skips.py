"""Tests that can't run through a pooler in transaction mode, with the reason of each."""

READS = "in this mode, a read has a transaction"
POOL = "it needs more connections at a time than the four of the pooler"
SETTINGS = "settings of the session in a URL are refused in this mode"
SOCKET = "the pooler of the tests has no socket"
USERS = "the pooler of the tests knows only the user postgres"
DEFAULTS = "the pooler's sessions keep the defaults of the database that they began with"
DIRECT = "migrations need a direct connection"
DOCTOR = "the doctor checks a pooler in another way; see tests/e2e/test_pooler.py"
SQLITE = "it uses SQLite too, which has no pooler"
STATEMENTS = "there are no prepared statements in this mode"
CODES = "PgBouncer 1.18 has no code for a missing database"

SKIPS: dict[str, str] = {
    "tests/integration/test_connect.py::test_connects_through_a_socket": SOCKET,
    "tests/integration/test_connect.py::test_missing_database_was_reached": CODES,
    "tests/integration/test_connect.py::test_parameters_reach_the_session": SETTINGS,
    "tests/integration/test_connect.py::test_schema_of_prisma_is_the_search_path": SETTINGS,
    "tests/integration/test_connect.py::test_user_defaults_to_that_of_the_process": USERS,
    "tests/integration/test_database.py::test_calls_do_not_wait_for_loads": POOL,
    "tests/integration/test_database.py::test_read_holds_no_transaction": READS,
    "tests/e2e/test_doctor.py::test_reports_each_check": DOCTOR,
    "tests/e2e/test_doctor.py::test_reports_too_many_connections": DOCTOR,
    "tests/e2e/test_error_statuses.py::test_stale_prepared_statement_is_retryable": STATEMENTS,
    "tests/e2e/test_error_statuses.py::test_write_to_a_standby_is_unavailable": DEFAULTS,
    "tests/e2e/test_export.py::test_exports_are_restored_byte_for_byte": SQLITE,
    "tests/e2e/test_start.py::test_migrate_names_what_is_missing": DIRECT,
    "tests/e2e/test_start.py::test_read_only_database_is_not_served": DEFAULTS,
    "tests/e2e/test_start.py::test_start_says_which_database_it_serves": SQLITE,
    "tests/e2e/test_start.py::test_tables_in_another_schema_are_found": SETTINGS,
}
