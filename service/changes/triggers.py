"""Create the triggers of the change feed again, on a database that has lost them or could not have them.

Citus has none. A dump of its coordinator that is restored into PostgreSQL has tables without triggers, at the
newest revision, so that no migration creates them.
"""

import logging

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from service.changes.kinds import KINDS
from service.changes.support import EVENTS, TRIGGERS
from service.db.ddl import HAS_TRANSACTION_IDS, IS_CITUS, log_changes

log = logging.getLogger(__name__)

TABLES = [kind.table for kind in KINDS]
# Disabled ones are not missing. Only the owner of the tables can create any.
ARE_MISSING = text(f"""
    SELECT ({HAS_TRANSACTION_IDS}) AND NOT ({IS_CITUS})
       AND NOT EXISTS (
           SELECT FROM pg_class
           WHERE oid = ANY (CAST(:tables AS text[])::regclass[]) AND NOT pg_has_role(relowner, 'USAGE')
       )
       AND :expected > (
           SELECT count(*) FROM pg_trigger
           WHERE tgrelid = ANY (CAST(:tables AS text[])::regclass[]) AND tgname = ANY (:names)
       )
""")  # noqa: S608  (constants)
BEGIN_FEED = text("UPDATE feed SET feed_id = replace(gen_random_uuid()::text, '-', '')")


def create_missing_triggers(connection: Connection) -> None:
    """Create the triggers that log changes if some are missing, and begin another feed.

    The log is incomplete. The feed comes first: if this is interrupted, the next run finds triggers missing.
    """
    if _are_missing(connection):
        connection.execute(BEGIN_FEED)
        connection.commit()
        context = MigrationContext.configure(connection)
        with Operations.context(context), context.begin_transaction():
            log_changes(*TABLES)
        if not _are_missing(connection):
            log.info("created the triggers of the change feed, which were missing; a new feed begins")


def _are_missing(connection: Connection) -> bool:
    names = [f"log_{event}" for event in EVENTS]
    parameters = {"tables": TABLES, "names": names, "expected": TRIGGERS}
    return bool(connection.scalar(ARE_MISSING, parameters))
