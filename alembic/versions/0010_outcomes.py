"""Note what each write with a `request_id` did, to send it again with the stored answer.

It comes before 0004, which is contracting: a release's expanding migrations come first. It can be repeated:
0011 runs it again.
"""

import sqlalchemy as sa
from alembic import op

from service.db.ddl import add_columns

revision = "0010"
down_revision = "0008"


def upgrade() -> None:
    add_columns([("requests", sa.Column("outcome", sa.SmallInteger(), nullable=True))])


def downgrade() -> None:
    op.drop_column("requests", "outcome", if_exists=op.get_context().dialect.name != "sqlite")
