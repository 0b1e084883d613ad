"""Tables whose rows Citus distributes over several servers (`deploy/sql/citus.sql`).

SQL about such a table reaches every server that has a part of it, a shard, unless it names values of the
column that decides in which shard a row is, here `id`. Citus refuses some statements of PostgreSQL for these
tables. Others it runs by copying a whole table to the coordinator. Statements that have such a form ask here.
"""

from typing import Any

from sqlalchemy import AdaptedConnection, Dialect, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from service.db.base import Base

IS_CITUS = "SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
# Not the reference tables, which all servers have, nor those that only the coordinator has.
DISTRIBUTED = """
    SELECT relname FROM pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE partmethod <> 'n' AND pg_table_is_visible(logicalrelid)
"""
# Citus writes to the shards of a server through several connections at once. After that, the transaction
# can't write a table that the shards refer to.
ONE_CONNECTION = text("SET LOCAL citus.multi_shard_modify_mode TO 'sequential'")


def find_distributed_tables(engine: AsyncEngine) -> None:
    """Ask with each new connection which tables are distributed."""
    dialect = engine.dialect

    def ask(connection: AdaptedConnection, _: object) -> None:
        dialect.distributed_tables = connection.run_async(_distributed_tables)  # type: ignore[attr-defined]

    event.listen(engine.sync_engine, "connect", ask)


async def _distributed_tables(driver: Any) -> frozenset[str]:
    is_citus = await driver.fetchval(IS_CITUS)
    return frozenset(row[0] for row in await driver.fetch(DISTRIBUTED)) if is_citus else frozenset()


def is_distributed(session: AsyncSession, model: type[Base]) -> bool:
    """Return whether the rows of a model are on several servers."""
    return model.__tablename__ in distributed_tables(session.get_bind().dialect)


def distributed_tables(dialect: Dialect) -> frozenset[str]:
    """Return the names of the distributed tables, as the newest connection has found them."""
    tables: frozenset[str] = getattr(dialect, "distributed_tables", frozenset())
    return tables
