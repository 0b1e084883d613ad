"""The state of the schema in a database, and whether this release can run on it.

`roster_schema` is Alembic's version table, under a name that no other application has. `schema_compatibility`
has one row: the oldest revision whose code can run on this schema.

Releases up to revision 0002 kept the version in `alembic_version`, which may also belong to another
application. It is taken for Roster's only if Roster's tables exist with the columns of the revision that it
names. Then the version moves to `roster_schema`, and `alembic_version` stays as it is: servers of the older
release look there when they start. A contracting migration, which they can't use, writes its own revision
there, so that they refuse to start. A downgrade to 0002 or below moves the version back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import Connection, Inspector, inspect
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateTable

from service.db import revisions
from service.db.base import Base

VERSION_TABLE = "roster_schema"
OLD_VERSION_TABLE = "alembic_version"

# The tables and columns of the revisions of which `alembic_version` can be Roster's.
USERS = "id email hashed_password full_name is_active created_at updated_at version"
POSTS = "id title content author_id created_at updated_at version"
REQUESTS = "caller method request_id fingerprint answer created_at"
BULK_LOADS = (
    "id load_id caller method options state epoch next_offset created updated skipped failed "
    "created_at updated_at"
)
BULK_BATCHES = "load first_offset next_offset results ids failures"
OLD_TABLES = {
    "0001": {"users": USERS, "posts": POSTS, "requests": REQUESTS},
    "0002": {
        "users": USERS,
        "posts": POSTS,
        "requests": REQUESTS,
        "bulk_loads": BULK_LOADS,
        "bulk_batches": BULK_BATCHES,
    },
}
LAST_OLD_REVISION = "0002"

_metadata = sa.MetaData()
_version = sa.Table(
    VERSION_TABLE,
    _metadata,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),  # as Alembic names it
)
COMPATIBILITY = sa.Table(
    "schema_compatibility",
    _metadata,
    sa.Column("min_revision", sa.String(32), nullable=False),
    # Whether `alembic_version` is Roster's.
    sa.Column("keeps_alembic_version", sa.Boolean(), nullable=False),
)
FIRST: dict[str, str | bool] = {"min_revision": "0001", "keeps_alembic_version": False}
# For `--sql`, which prints how to make the schema in an empty database.
CREATE_COMPATIBILITY = (CreateTable(COMPATIBILITY), COMPATIBILITY.insert().values(FIRST))
_old_version = sa.Table(
    OLD_VERSION_TABLE,
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name=f"{OLD_VERSION_TABLE}_pkc"),
)


VERSIONS_ELSEWHERE = sa.text(
    "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE relname = :name AND relkind = 'r' AND NOT pg_table_is_visible(pg_class.oid) ORDER BY nspname"
)


@dataclass(frozen=True)
class Schema:
    """The revision that a schema is at, None before the first migration, and the oldest that it admits."""

    revision: str | None
    min_revision: str | None = None
    missing: tuple[str, ...] = ()  # tables and columns that this release needs
    elsewhere: tuple[str, ...] = ()  # schemas of PostgreSQL that have Roster's tables, but are not searched

    @property
    def is_newer(self) -> bool:
        """Whether a newer release has migrated it."""
        return self.revision is not None and self.revision not in revisions.numbers()

    @property
    def is_usable(self) -> bool:
        """Whether this release can run on it."""
        if self.missing:
            return False
        if self.is_newer:
            return self.min_revision in revisions.numbers()
        if self.revision is None:
            return False
        return all(revision.is_contracting for revision in revisions.pending(self.revision))

    def __str__(self) -> str:
        """Return one sentence: the state, and what to do."""
        return self._damage or self._state

    @property
    def _damage(self) -> str:
        """A sentence about tables that are not where the revision says they are; "" if they are."""
        if self.missing:
            remedy = "restore a backup, or create what is missing as `roster migrate --sql` prints it"
            if not self.is_newer and revisions.pending(self.revision):
                remedy = "run `roster migrate --contract`"
            return f"the schema is at revision {self.revision}, but lacks {', '.join(self.missing)}; {remedy}"
        if self.elsewhere:
            return (
                f"Roster's tables are in the schema {', '.join(self.elsewhere)}, which this role does not "
                f"search; add options=-csearch_path%3D{self.elsewhere[0]} to the parameters of "
                "ROSTER_DATABASE_URL, or run `roster migrate` to create new tables"
            )
        return ""

    @property
    def _state(self) -> str:
        head = revisions.head()
        if self.revision == head:
            return f"the schema is at revision {head}, the one of this release"
        if self.is_newer and self.is_usable:
            return (
                f"the schema is at revision {self.revision}, which is newer than this release, but compatible"
            )
        if self.is_newer:
            return (
                f"the schema is at revision {self.revision}, which is newer than this release and not "
                f"compatible with it; run the newer release, or downgrade with its `roster migrate --down "
                f"{head}`"
            )
        if self.is_usable:
            return (
                f"the schema is at revision {self.revision}, which this release can use; once no older "
                f"server runs, complete the upgrade to {head} with `roster migrate --contract`"
            )
        if self.revision is None:
            return (
                "the database has no schema; run `roster migrate` with the same ROSTER_DATABASE_URL to "
                f"create it at revision {head}"
            )
        return (
            f"the schema is at revision {self.revision}, but this release needs revision "
            f"{revisions.oldest_usable()}; run `roster migrate` with the same ROSTER_DATABASE_URL"
        )


class ReadOnlyDatabase(OSError):
    """The server refuses to write: it is a standby, or was set so."""


async def read_schema(engine: AsyncEngine) -> Schema:
    """Return the state of the schema in a database; raises ReadOnlyDatabase if it can't be written."""
    async with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            read_only = await connection.scalar(sa.select(sa.func.current_setting("transaction_read_only")))
            if read_only == "on":
                raise ReadOnlyDatabase(
                    "the database is read-only: it is a standby, or default_transaction_read_only is on"
                )
        return await connection.run_sync(schema_of)


def schema_of(connection: Connection) -> Schema:
    """Return the state of the schema in a database."""
    inspector = inspect(connection)
    if inspector.has_table(VERSION_TABLE):
        revision = connection.scalar(sa.select(_version.c.version_num))
        if revision is not None:
            has_compatibility = inspector.has_table(COMPATIBILITY.name)
            oldest = connection.scalar(sa.select(COMPATIBILITY.c.min_revision)) if has_compatibility else None
            return _with_missing(Schema(revision, oldest), inspector)
    if revision := _old_revision(connection, inspector):
        return _with_missing(Schema(revision), inspector)
    return Schema(None, elsewhere=_elsewhere(connection))


def _with_missing(schema: Schema, inspector: Inspector) -> Schema:
    # A revision that this release can't run on lacks them anyway.
    return replace(schema, missing=_missing(inspector)) if schema.is_usable else schema


def _missing(inspector: Inspector) -> tuple[str, ...]:
    """Return the tables, and the columns of existing tables, that the models have and the database lacks."""
    tables = [COMPATIBILITY, *Base.metadata.sorted_tables]
    names = [table.name for table in tables]
    found = inspector.get_multi_columns(filter_names=names, kind=ObjectKind.ANY)
    columns = {name: {column["name"] for column in each} for (_, name), each in found.items()}
    missing = [f"the table {table.name}" for table in tables if table.name not in columns]
    for table in tables:
        needed = {column.name for column in table.columns}
        absent = needed - columns.get(table.name, needed)
        missing += [f"the column {table.name}.{name}" for name in absent]
    return tuple(sorted(missing))


def _elsewhere(connection: Connection) -> tuple[str, ...]:
    """Return the schemas of PostgreSQL that have a version of Roster, but are not in the search path."""
    if connection.dialect.name != "postgresql":
        return ()
    return tuple(connection.scalars(VERSIONS_ELSEWHERE, {"name": VERSION_TABLE}))


def _old_revision(connection: Connection, inspector: Inspector) -> str | None:
    """Return the revision in `alembic_version` if that table is Roster's."""
    is_like_roster = _has_tables(inspector, "0001") and inspector.has_table(OLD_VERSION_TABLE)
    if not is_like_roster or _columns(inspector, OLD_VERSION_TABLE) != {"version_num"}:
        return None
    found: Sequence[str] = connection.scalars(sa.select(_old_version.c.version_num)).all()
    if len(found) == 1 and found[0] in OLD_TABLES and _has_tables(inspector, found[0]):
        return found[0]
    return None


def _has_tables(inspector: Inspector, revision: str) -> bool:
    return all(
        inspector.has_table(table) and set(columns.split()) <= _columns(inspector, table)
        for table, columns in OLD_TABLES[revision].items()
    )


def _columns(inspector: Inspector, table: str) -> set[str]:
    return {column["name"] for column in inspector.get_columns(table)}


def prepare(connection: Connection, needed: set[str]) -> None:
    """Create the tables of the version if they are missing, and move the version of an older release there.

    Raises CommandError if another application has one of the `needed` tables; then nothing is changed.
    """
    inspector = inspect(connection)
    has_version = inspector.has_table(VERSION_TABLE)
    if has_version and connection.scalar(sa.select(_version.c.version_num)) is not None:
        return
    revision = _old_revision(connection, inspector)
    own = set(OLD_TABLES[revision]) if revision else set()
    if not has_version:
        needed = needed | {COMPATIBILITY.name}
    foreign = sorted(name for name in needed - own if inspector.has_table(name))
    if foreign:
        from alembic.util import CommandError  # noqa: PLC0415  (only migrations, which it runs, come here)

        raise CommandError(
            f"this database has tables of another application with names that Roster needs: "
            f"{', '.join(foreign)}; give Roster a database of its own, or rename these tables"
        )
    _metadata.create_all(connection)
    connection.execute(COMPATIBILITY.delete())
    connection.execute(COMPATIBILITY.insert().values(FIRST | {"keeps_alembic_version": revision is not None}))
    if revision:
        connection.execute(_version.insert().values(version_num=revision))


def compatibility_of(number: str | None) -> sa.Update:
    """Return the statement that records the oldest revision that the schema admits at this revision."""
    return COMPATIBILITY.update().values(min_revision=_min_revision(number))


def _min_revision(number: str | None) -> str:
    known = {revision.number: revision.min_revision for revision in revisions.revisions()}
    return known.get(number or revisions.numbers()[0], "")


def record(connection: Connection, number: str | None) -> None:
    """Record the oldest revision that the schema admits, after a step to this revision."""
    connection.execute(compatibility_of(number))
    if number is None or not _keeps_old_version(connection):
        return
    admits_old_releases = _min_revision(number) in OLD_TABLES
    if admits_old_releases and number not in OLD_TABLES:
        number = LAST_OLD_REVISION
    connection.execute(_old_version.update().values(version_num=number))


def hand_back(connection: Connection) -> None:
    """Move the version of a schema at 0002 or below to `alembic_version`, for releases that look there.

    If `alembic_version` is that of another application, it is left alone, and the version stays here.
    """
    revision = connection.scalar(sa.select(_version.c.version_num))
    is_kept = _keeps_old_version(connection)
    is_foreign = inspect(connection).has_table(OLD_VERSION_TABLE) and not is_kept
    if is_foreign or (revision is not None and revision not in OLD_TABLES):
        return
    if is_kept:
        connection.execute(_old_version.delete())
    if revision:
        _old_version.create(connection, checkfirst=True)
        connection.execute(_old_version.insert().values(version_num=revision))
        connection.execute(_version.delete())


def _keeps_old_version(connection: Connection) -> bool:
    keeps = connection.scalar(sa.select(COMPATIBILITY.c.keeps_alembic_version))
    if not keeps or not inspect(connection).has_table(OLD_VERSION_TABLE):
        return False
    # Somebody may have dropped Roster's, and another application made its own.
    found = connection.scalars(sa.select(_old_version.c.version_num)).all()
    return set(found) <= set(revisions.numbers())
