"""The SQL of every migration, in both directions, passes the linter squawk."""

import subprocess
import sys
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from alembic import command

from service.db import migrations, revisions

SQUAWK = Path(sys.executable).with_name("squawk")
STEPS = [*pairwise(["base", *revisions.numbers()])]
CONTRACTING = {revision.number for revision in revisions.revisions() if revision.is_contracting}
EXCLUDED = [
    "prefer-text-field",  # a length is a limit of the contract, which the database checks too
    "prefer-bigint-over-smallint",  # the state of a load is one of four
    "require-statement-timeout",  # an index may take hours to build; what blocks calls is a lock
    "prefer-robust-stmts",  # service.db.ddl looks before each statement outside a transaction
]
# What older code may still use. A contracting migration comes after it, and a downgrade takes away what the
# upgrade has added.
BREAKS_OLDER_CODE = [
    "ban-drop-table",
    "ban-drop-column",
    "ban-drop-constraint",
    "ban-drop-function",
    "renaming-column",
    "renaming-table",
]
# A downgrade that an interruption must not leave half done runs in one transaction, if its table is small.
BLOCKS_WRITES = {
    "0004": [
        "disallowed-unique-constraint",
        "constraint-missing-not-valid",
        "require-concurrent-index-deletion",
    ]
}


def lint(sql: str, excluded: list[str]) -> str:
    """Return the complaints of squawk."""
    options = ["--pg-version=14", "--reporter=gcc", f"--exclude={','.join(excluded)}"]
    done = subprocess.run(
        [SQUAWK, *options, "--stdin-filepath=migration.sql"],
        input=sql,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def printed(run: str, start: str, end: str) -> str:
    """Return the SQL of a migration on PostgreSQL."""
    output = StringIO()
    config = migrations.config("postgresql+asyncpg://")
    config.output_buffer = output
    getattr(command, run)(config, f"{start}:{end}", sql=True)
    return output.getvalue()


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_upgrade_passes_squawk(before: str, after: str) -> None:
    """An expanding one must not break servers that run."""
    allowed = BREAKS_OLDER_CODE if after in CONTRACTING else []
    assert lint(printed("upgrade", before, after), EXCLUDED + allowed) == ""


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_downgrade_passes_squawk(before: str, after: str) -> None:
    allowed = BREAKS_OLDER_CODE + BLOCKS_WRITES.get(after, [])
    assert lint(printed("downgrade", after, before), EXCLUDED + allowed) == ""


def test_squawk_complains_about_a_dropped_column() -> None:
    """An expanding migration can't drop a column by mistake."""
    sql = "SET lock_timeout = '1s'; ALTER TABLE users DROP COLUMN full_name;"
    assert "ban-drop-column" in lint(sql, EXCLUDED)
