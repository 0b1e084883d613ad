"""docs/adding-an-entity.md: its blocks, applied to a copy of the repository, make an entity that works."""

from pathlib import Path

import pytest

from tests.support.guide import apply_guide, apply_hunk, edit_migrations, run_python, run_tests
from tests.support.postgres import Postgres

PAGE = "adding-an-entity.md"
# Tests that need no example of each request.
ANNOTATIONS = (
    "test_each_field_that_is_sent_has_a_behaviour",
    "test_request_ids_are_uuids",
    "test_unary_rpcs_have_paths",
    "test_paths_and_bodies_name_fields_of_the_request",
    "test_no_two_rpcs_share_a_path",
)


def test_page_makes_an_entity_that_works(tmp_path: Path, postgres: Postgres) -> None:
    """Its migration matches its model; its contract, code and tests pass those of the repository."""
    copy = tmp_path / "copy"
    apply_guide(PAGE, copy)

    run_python(copy, "-m", "service", "migrate")
    run_python(copy, "-m", "alembic", "revision", "--autogenerate", "--message", "comments")
    run_python(copy, "-m", "alembic", "revision", "--message", "Log comments")
    edit_migrations(PAGE, copy)
    run_python(copy, "-m", "service", "migrate")
    run_python(copy, "-m", "alembic", "check")
    run_python(copy, "-m", "ruff", "check", "service", "tests/e2e/test_comments.py")
    run_python(copy, "-m", "ruff", "format", "--check", "service", "tests/e2e/test_comments.py")
    tests = ("tests/e2e/test_comments.py", "tests/unit/test_contract.py", "tests/unit/test_policy.py")
    run_tests(copy, postgres, *tests, *[f"tests/unit/test_annotations.py::{name}" for name in ANNOTATIONS])


@pytest.mark.parametrize("text", ["other\n", "line\nline\n"])
def test_rejects_hunks_that_do_not_fit_in_one_place(text: str) -> None:
    """The page no longer matches the code."""
    with pytest.raises(AssertionError, match="line"):
        apply_hunk(text, " line\n+more\n")
