"""Run 0006 again, for databases that a development version had migrated to 0005 before 0006 existed."""

from alembic import context, op

revision = "0007"
down_revision = "0005"
min_revision = "0003"


def upgrade() -> None:
    if not op.get_context().as_sql:  # an empty database has run 0006
        context.script.get_revision("0006").module.upgrade()


def downgrade() -> None:
    """Do nothing: 0006 undoes its own steps."""
