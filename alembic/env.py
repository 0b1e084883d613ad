"""Alembic runs this for each of its commands; `service/db/migrations.py` hands over the URL."""

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

import service.idempotency
import service.loads.repository
import service.posts.model
import service.users.model  # noqa: F401  (a table is known once its module is imported)
from service.db.base import Base, UtcDateTime
from service.db.engine import connect
from service.files import create_database
from service.settings import Settings

# A run waits for one under way (the number is arbitrary, and the same for all). From then on no statement
# waits long for a table, as calls would queue behind it.
OPENING = {
    "postgresql": ["SELECT pg_advisory_xact_lock(7238001)", "SET LOCAL lock_timeout = '5s'"],
    "sqlite": ["BEGIN IMMEDIATE"],
}


def numbered(migration: Any, revision: Any, directives: list[Any]) -> None:  # noqa: ARG001
    """Number the revisions 0001, 0002, and so on."""
    for script in directives:
        script.rev_id = f"{int(migration.script.get_current_head() or 0) + 1:04}"


def plain(kind: str, item: Any, _: Any) -> str | bool:
    """Write our own type as what it is in SQL: a migration imports nothing of the service."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "render_as_batch": True,
    "render_item": plain,
    "process_revision_directives": numbered,
    # SQLite can undo DDL as well.
    "transactional_ddl": True,
}


def run(connection: Connection) -> None:
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        for statement in OPENING[connection.dialect.name]:
            connection.exec_driver_sql(statement)
        context.run_migrations()


async def run_online(url: str) -> None:
    # Not the service's engine: on SQLite it enforces foreign keys, and replacing a table would cascade.
    options = {"async_creator_fn": connect}
    if url.startswith("sqlite"):
        options = {}
        create_database(url)
    engine = create_async_engine(url, poolclass=NullPool, connect_args=options)
    async with engine.connect() as connection:
        await connection.run_sync(run)


def run_offline(url: str) -> None:
    context.configure(url=url, literal_binds=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


url = context.config.attributes.get("url") or Settings().database_url
if context.is_offline_mode():
    run_offline(url)
else:
    asyncio.run(run_online(url))
