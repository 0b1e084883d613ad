"""Run 0010 again, for databases that a development version had migrated to 0009 before 0010 existed."""

from alembic import context, op

revision = "0011"
down_revision = "0009"
min_revision = "0003"


def upgrade() -> None:
    if not op.get_context().as_sql:  # an empty database has run 0010
        context.script.get_revision("0010").module.upgrade()


def downgrade() -> None:
    """Do nothing: 0010 undoes its own steps."""
