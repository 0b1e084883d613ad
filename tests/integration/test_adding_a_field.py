"""docs/adding-a-field.md: its blocks, applied to a copy of the repository, make a field that works."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.guide import BLOCK, CHECKOUT, apply_guide, run_python, run_tests
from tests.support.postgres import Postgres

PAGE = "adding-a-field.md"
NEW_USER = "INSERT INTO users (email) VALUES (?) RETURNING id"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with the new field, and a database of the release before."""
    folder = tmp_path / "copy"
    apply_guide(PAGE, folder)
    run_python(folder, "-m", "service", "migrate")
    run_python(folder, "-m", "alembic", "revision", "--autogenerate", "--message", "nickname")
    return folder


def create_and_delete_user(copy: Path, email: str) -> int:
    """Return the id of a user that no longer exists."""
    with closing(sqlite3.connect(copy / "roster.db")) as connection, connection:
        [id] = connection.execute(NEW_USER, (email,)).fetchone()
        connection.execute("DELETE FROM users")
    return int(id)


def test_page_makes_a_field_that_works(copy: Path, postgres: Postgres) -> None:
    """Its tests and those of the repository pass, with the migration as it was drafted."""
    run_python(copy, "-m", "service", "migrate")
    run_python(copy, "-m", "alembic", "check")
    run_python(copy, "-m", "ruff", "format", "--check", "service", "tests/e2e/test_nicknames.py")
    run_python(copy, "-m", "ruff", "check", "service", "tests/e2e/test_nicknames.py")
    tests = ["tests/e2e/test_nicknames.py", "tests/unit/test_convert.py", "tests/unit/test_annotations.py"]
    migrations = "tests/integration/test_migrations.py"
    names = ("test_models_and_migrations_agree", "test_every_migration_goes_down_and_up_again")
    run_tests(copy, postgres, *tests, *[f"{migrations}::{name}" for name in names])


def test_drafted_migration_never_reuses_ids(copy: Path) -> None:
    """SQLite keeps AUTOINCREMENT on the way up and on the way down."""
    ids = [create_and_delete_user(copy, "before@example.org")]
    run_python(copy, "-m", "service", "migrate")
    ids.append(create_and_delete_user(copy, "between@example.org"))
    run_python(copy, "-m", "alembic", "downgrade", "-1")
    ids.append(create_and_delete_user(copy, "after@example.org"))

    assert ids == [1, 2, 3]


def test_page_is_short() -> None:
    """A field takes at most 80 lines to read, and 8 files to change: those of the page, the migration and
    the reference.
    """
    page = (CHECKOUT / "docs" / PAGE).read_text()

    assert len(page.splitlines()) <= 80
    assert len(BLOCK.findall(page)) + 2 <= 8
