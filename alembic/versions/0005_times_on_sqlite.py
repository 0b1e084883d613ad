"""Write times on SQLite in one form: whole seconds with a fraction of six zeros.

Earlier code restored them without one. SQLite compares times as text, so filters and pages missed such rows.
It changes nothing on PostgreSQL. It is contracting because only what older code wrote is to be rewritten, and
because it comes after 0004: a release runs on the schema before its contracting migrations.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
min_revision = "0003"

WITHOUT_FRACTION = len("2023-05-05 10:00:00")
FRACTION = ".000000"


def upgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return
    for table in ("users", "posts"):
        for column in ("created_at", "updated_at"):
            time = sa.column(column, sa.String)
            is_whole = sa.func.length(time) == WITHOUT_FRACTION
            op.execute(sa.update(sa.table(table, time)).where(is_whole).values({time: time + FRACTION}))


def downgrade() -> None:
    """Do nothing: older code reads both forms."""
