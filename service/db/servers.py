"""Which servers use the database: the table of running servers, and the sessions of PostgreSQL."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Uuid,
    and_,
    column,
    exists,
    func,
    inspect,
    or_,
    select,
    table,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db import revisions
from service.db.base import Base, UtcDateTime, now, text
from service.db.schema import LAST_OLD_REVISION

# A server whose last heartbeat is older is dead.
LIFETIME = timedelta(seconds=60)
# The application name of servers is `roster` and the revision of their code; up to revision 0002, `roster`.
# Every role sees the names of all sessions, but only the addresses of its own.
APPLICATION = "roster"
SESSIONS = table("pg_stat_activity", *map(column, ("datname", "application_name", "client_addr")))


class RunningServer(Base):
    """A process of `roster serve`. `revision` is the one that its code was written for."""

    __tablename__ = "roster_servers"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    name: Mapped[str] = mapped_column(text(255))
    release: Mapped[str] = mapped_column(text(50))
    revision: Mapped[str] = mapped_column(text(32))
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


def older_servers(connection: Connection) -> list[str]:
    """Describe the running servers that can't use the newest schema of this release.

    Servers up to revision 0002 have no row in the table, but open sessions.
    """
    return [*_older_rows(connection), *_older_sessions(connection)]


def runs_before(revision: str) -> Select[tuple[bool]]:
    """Return the query for whether a server runs whose code was written for an earlier revision."""
    is_alive = RunningServer.seen_at > func.now() - LIFETIME
    is_earlier = SESSIONS.c.application_name < f"{APPLICATION} {revision}"
    row = exists().where(is_alive, RunningServer.revision < revision)
    session = exists().where(_is_of_roster(), is_earlier)
    return select(or_(row, session))


def _older_rows(connection: Connection) -> list[str]:
    if not inspect(connection).has_table(RunningServer.__tablename__):
        return []
    alive = select(RunningServer.name, RunningServer.release, RunningServer.revision).where(
        RunningServer.seen_at > func.now() - LIFETIME
    )
    rows = connection.execute(alive.order_by(RunningServer.name)).all()
    return [
        f"server {row.name} of release {row.release} (revision {row.revision})"
        for row in rows
        if _is_older(row.revision)
    ]


def _older_sessions(connection: Connection) -> list[str]:
    name, address = SESSIONS.c.application_name, func.host(SESSIONS.c.client_addr)
    sessions = (
        select(name, address.label("address"), func.count().label("count"))
        .where(_is_of_roster())
        .group_by(name, address)
        .order_by(name, address)
    )
    rows = connection.execute(sessions).all()
    return [
        f"{row.count} sessions with the application name {row.application_name!r} "
        f"from {row.address or 'an unknown address'}"
        for row in rows
        if _is_older(row.application_name.removeprefix(APPLICATION).strip() or LAST_OLD_REVISION)
    ]


def _is_of_roster() -> ColumnElement[bool]:
    name = SESSIONS.c.application_name
    is_named = (name == APPLICATION) | name.startswith(f"{APPLICATION} ")
    return and_(SESSIONS.c.datname == func.current_database(), is_named)


def _is_older(revision: str) -> bool:
    """Return whether code of this revision can't run on the newest schema of this release."""
    min_revision = revisions.revisions()[-1].min_revision
    older = revisions.numbers()[: revisions.numbers().index(min_revision)]
    return revision in older
