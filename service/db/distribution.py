"""Tables whose rows Citus distributes over several servers (`deploy/sql/citus.sql`).

SQL about such a table reaches every server that has a part of it, a shard, unless it names values of the
column that decides in which shard a row is, here `id`. Citus refuses some statements of PostgreSQL for these
tables. Others it runs by copying a whole table to the coordinator. Statements that have such a form ask here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, AdaptedConnection, BigInteger, Dialect, bindparam, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from service.db.base import Base

IS_CITUS = "SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
# Not the reference tables, which all servers have, nor those that only the coordinator has.
DISTRIBUTED = """
    SELECT relname, count(*) FROM pg_dist_shard JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE shardminvalue IS NOT NULL AND pg_table_is_visible(logicalrelid) GROUP BY relname
"""
# Citus hides shards from the catalog, with a function for each row of pg_class. It makes the query with which
# asyncpg reads the types of arrays, once per connection, take 2 s of CPU.
SHOW_ALL_TABLES = "SET citus.override_table_visibility TO off"
# All shards have equal parts of the hashes, which are integers of 32 bits.
SHARDS_OF_IDS = text("""
    SELECT array_agg(((hashint8(id) + 2147483648) * :shards) >> 32 ORDER BY position)
    FROM unnest(:ids) WITH ORDINALITY AS given (id, position)
""").bindparams(bindparam("ids", type_=ARRAY(BigInteger)), bindparam("shards", type_=BigInteger))
# Citus writes to the shards of a server through several connections at once. After that, the transaction
# can't write a table that the shards refer to.
ONE_CONNECTION = text("SET LOCAL citus.multi_shard_modify_mode TO 'sequential'")
# Citus sends what SET LOCAL sets to the workers.
SEND_LOCAL_SETTINGS = text("SET LOCAL citus.propagate_set_commands TO 'local'")


def find_distributed_tables(*engines: AsyncEngine) -> None:
    """Ask with each new connection of the engines of a database which tables are distributed.

    All engines know what one of them has found: statements are built before an engine has a connection. One
    must have been open before the first statement is built; a server reads the schema when it starts.
    """

    def ask(connection: AdaptedConnection, _: object) -> None:
        counts = connection.run_async(_shard_counts)
        for engine in engines:
            engine.dialect.shard_counts = counts  # type: ignore[attr-defined]

    for engine in engines:
        event.listen(engine.sync_engine, "connect", ask)


async def _shard_counts(driver: Any) -> Mapping[str, int]:
    if not await driver.fetchval(IS_CITUS):
        return {}
    await driver.execute(SHOW_ALL_TABLES)
    return dict(await driver.fetch(DISTRIBUTED))


def is_distributed(session: AsyncSession, model: type[Base]) -> bool:
    """Return whether the rows of a model are on several servers."""
    return shard_count(session.get_bind().dialect, model) > 0


def is_citus(session: AsyncSession) -> bool:
    """Return whether any table is distributed."""
    return bool(getattr(session.get_bind().dialect, "shard_counts", {}))


def shard_count(dialect: Dialect, model: type[Base]) -> int:
    """Return how many shards a table has, as the newest connection has found; 0 if it is not distributed."""
    counts: Mapping[str, int] = getattr(dialect, "shard_counts", {})
    return counts.get(model.__tablename__, 0)


async def rows_by_shard(session: AsyncSession, model: type[Base], ids: Sequence[int]) -> list[list[int]]:
    """Return the positions of ids in a list, those of each shard together, in the order of the list.

    After a shard has been split, a group may have the ids of several; all ids of a shard stay in order.
    """
    shards = shard_count(session.get_bind().dialect, model)
    connection = await session.connection()
    found = await connection.execute(SHARDS_OF_IDS, {"ids": list(ids), "shards": shards})
    rows: list[list[int]] = [[] for _ in range(shards)]
    for position, shard in enumerate(found.scalar_one() or ()):
        rows[shard].append(position)
    return [group for group in rows if group]


async def limit_waits_for_locks(session: AsyncSession, seconds: float) -> None:
    """Set the lock_timeout of the transaction on all servers.

    The rows are locked on the workers, whose sessions don't have the settings of the coordinator's.
    """
    if is_citus(session):
        await session.execute(SEND_LOCAL_SETTINGS)
        await session.execute(text(f"SET LOCAL lock_timeout = '{seconds}s'"))
