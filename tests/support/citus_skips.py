"""Tests that can't run on Citus, with the reason of each."""

FEED = "it is about the change feed, which Citus can't have: it allows no triggers on its tables"
ORDER = "each worker checks authors in an order of its own, so such loads can deadlock until one is refused"
STATEMENTS = "the numbers are those of plain PostgreSQL; Citus needs more statements for some calls"
SIZES = "it computes a size of users with posts in one query, which the service does not do on Citus"
SHARDS = "it names each table that has a trace of a user, and on Citus the coordinator has shards too"
RPCS = "it expects an answer of all RPCs, and Citus can't have the change feed"
NEW = "it refers to posts from a table that Citus does not know"

SKIPS: dict[str, str] = {
    "tests/e2e/test_canary.py::test_no_secret_is_disclosed": RPCS,
    "tests/e2e/test_changes.py::test_feed_has_the_changes_of_others": FEED,
    "tests/e2e/test_changes.py::test_forged_token_of_this_feed_is_refused": FEED,
    "tests/e2e/test_changes.py::test_lag_grows_while_the_log_cannot_be_read": FEED,
    "tests/e2e/test_changes.py::test_large_rows_arrive_in_several_responses": FEED,
    "tests/e2e/test_changes.py::test_pruned_token_is_expired": FEED,
    "tests/e2e/test_changes.py::test_stop_ends_a_watch_at_once": FEED,
    "tests/e2e/test_changes.py::test_thousand_idle_watches_cost_one_poll": FEED,
    "tests/e2e/test_changes.py::test_token_of_another_database_is_refused": FEED,
    "tests/e2e/test_changes.py::test_token_within_an_entry_can_have_any_offset": FEED,
    "tests/e2e/test_changes.py::test_truncate_resets_the_feed": FEED,
    "tests/e2e/test_changes.py::test_watch_continues_after_its_token": FEED,
    "tests/e2e/test_changes.py::test_watch_moves_to_another_server_without_loss": FEED,
    "tests/e2e/test_changes.py::test_watch_reports_changes_as_they_happen": FEED,
    "tests/e2e/test_changes.py::test_watch_reports_only_its_entities": FEED,
    "tests/e2e/test_changes.py::test_watch_that_does_not_read_affects_nobody": FEED,
    "tests/e2e/test_changes_command.py::test_reset_begins_another_feed": FEED,
    "tests/e2e/test_client_changes.py::test_a_lost_position_is_a_typed_error": FEED,
    "tests/e2e/test_client_changes.py::test_continues_on_the_next_server": FEED,
    "tests/e2e/test_conflicts.py::test_update_is_one_change_for_the_feed": FEED,
    "tests/e2e/test_erasure.py::test_deleted_user_leaves_no_trace": SHARDS,
    "tests/e2e/test_mirror_example.py::test_is_exact_after_kills_and_a_reset": FEED,
    "tests/e2e/test_watch_tokens.py::test_changes_after_the_first_row_was_read_are_reported": FEED,
    "tests/e2e/test_watch_tokens.py::test_export_does_not_wait_for_the_token": FEED,
    "tests/e2e/test_watch_tokens.py::test_export_without_rows_has_only_the_token": FEED,
    "tests/e2e/test_watch_tokens.py::test_export_works_without_a_feed": FEED,
    "tests/e2e/test_watch_tokens.py::test_first_message_has_the_token": FEED,
    "tests/faults/changes/test_histories.py::test_history_that_once_failed_passes": FEED,
    "tests/faults/test_crossing.py::test_crossing_loads_and_deletes_are_all_answered": ORDER,
    "tests/integration/test_answer_sizes.py::test_user_with_posts_is_no_larger_than_its_size_in_sql": SIZES,
    "tests/integration/test_change_windows.py::test_changed_id_is_a_deletion_and_a_new_row": FEED,
    "tests/integration/test_change_windows.py::test_last_page_of_an_old_window_is_not_the_last_one": FEED,
    "tests/integration/test_change_windows.py::test_row_that_fits_no_response_is_an_error": FEED,
    "tests/integration/test_change_windows.py::test_watch_from_within_a_window_misses_nothing": FEED,
    "tests/integration/test_change_windows.py::test_window_ends_after_some_entries_of_any_table": FEED,
    "tests/integration/test_erasing_answers.py::test_bulk_delete_erases_answers_about_rows_at_any_depth": NEW,
    "tests/integration/test_feed_identity.py::test_copy_of_a_database_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_data_restored_into_existing_tables_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_data_restored_next_to_the_feed_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_dump_in_another_database_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_dump_in_another_schema_is_logged_there": FEED,
    "tests/integration/test_feed_identity.py::test_dump_in_the_same_database_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_feed_without_its_row_begins_again": FEED,
    "tests/integration/test_feed_identity.py::"
    "test_migrate_creates_missing_triggers_and_begins_another_feed": FEED,
    "tests/integration/test_feed_identity.py::test_reset_feed_is_that_of_all_servers": FEED,
    "tests/integration/test_feed_identity.py::test_schema_that_is_renamed_keeps_the_feed": FEED,
    "tests/integration/test_feed_identity.py::test_tables_that_are_written_anew_keep_the_feed": FEED,
    "tests/integration/test_feed_identity.py::test_truncate_begins_again": FEED,
    "tests/integration/test_feed_identity.py::test_truncate_that_is_rolled_back_changes_nothing": FEED,
    "tests/integration/test_feed_identity.py::test_writes_without_triggers_end_the_feed": FEED,
    "tests/integration/test_feed_plans.py::test_page_does_not_depend_on_the_length_of_the_log": FEED,
    "tests/integration/test_prune.py::test_keeps_what_is_not_old": FEED,
    "tests/integration/test_prune.py::test_one_server_prunes_at_a_time": FEED,
    "tests/integration/test_prune.py::test_token_expires_with_the_first_change_that_it_lacks": FEED,
    "tests/integration/test_prune.py::test_tokens_made_while_an_old_transaction_is_open_stay_valid": FEED,
    "tests/integration/test_statement_counts.py::"
    "test_a_call_takes_as_many_statements_for_a_thousand_rows_as_for_one": STATEMENTS,
}
