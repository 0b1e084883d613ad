"""The migrations of the schema: what `roster migrate` runs, and what `roster serve` asks before it starts.

The functions without `async` block and run an event loop of their own: call them before the
server's loop starts, or in a thread.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncEngine

SERVICE = Path(__file__).parents[1]


def config(url: str = "") -> Config:
    """Return Alembic's configuration for a database; without a URL, for the one in the settings."""
    in_wheel, in_checkout = SERVICE / "alembic.ini", SERVICE.parent / "alembic.ini"
    configuration = Config(in_wheel if in_wheel.exists() else in_checkout)
    configuration.attributes["url"] = url
    return configuration


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema up to a revision, wholly or not at all; of two runs the second waits."""
    command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to a revision, "base" being an empty one; drops the data it held."""
    command.downgrade(config(url), revision)


def sql(url: str, revision: str = "head") -> None:
    """Print the SQL of an upgrade and run none of it; "0001:head" starts from a revision."""
    command.upgrade(config(url), revision, sql=True)


def head() -> str | None:
    """Return the revision that this code was written for."""
    return ScriptDirectory.from_config(config()).get_current_head()


def revisions() -> list[str]:
    """Return the revisions of this code, the first one first; a newer release may have brought others."""
    return [known.revision for known in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


async def current(engine: AsyncEngine) -> str | None:
    """Return the revision that the database is at; None where it was never migrated."""
    async with engine.connect() as connection:
        return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
