"""Run 0008 again, for databases that a development version had migrated to 0007 before 0008 existed."""

from alembic import context, op

revision = "0009"
down_revision = "0007"
min_revision = "0003"


def upgrade() -> None:
    if not op.get_context().as_sql:  # an empty database has run 0008
        context.script.get_revision("0008").module.upgrade()


def downgrade() -> None:
    """Do nothing: 0008 undoes its own steps."""
