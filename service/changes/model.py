"""The tables of the change feed.

Triggers write `changes`, in the transaction of the change: see `log_changes` in `service/db/ddl.py`. An entry
has the ids of the rows that a statement has changed, and nothing of their contents.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Identity, Index, LargeBinary, String
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from service.db.base import Base, BigInt, UtcDateTime, Xid8, now, text

Xid = Xid8().with_variant(BigInteger(), "sqlite")
# On PostgreSQL 8 bytes for each id, the highest first; on SQLite one id.
Ids = LargeBinary().with_variant(BigInteger(), "sqlite")
MAX_IDS = 5000  # of an entry


class current_xid(FunctionElement[int]):  # noqa: N801  (reads as SQL)
    """The id of the transaction; 0 on SQLite, which has one writer at a time."""

    type = Xid
    inherit_cache = True


@compiles(current_xid)
def _current_xid(element: current_xid, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "pg_current_xact_id()"


@compiles(current_xid, "sqlite")
def _current_xid_sqlite(element: current_xid, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "0"


class LogEntry(Base):
    """The rows of one table that a statement has changed."""

    __tablename__ = "changes"
    __table_args__ = (
        Index(None, "xid", "id").ddl_if(dialect="postgresql"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigInt, Identity(), primary_key=True)
    xid: Mapped[int] = mapped_column(Xid, server_default=current_xid())
    entity: Mapped[str] = mapped_column(text(63))  # the name of the table
    ids: Mapped[bytes] = mapped_column(Ids)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


class FeedRow(Base):
    """The identity of the log, in one row, and up to where it is pruned.

    The next four columns show whether the database is still the one that wrote the log: the cluster; its
    timeline, which a promotion and a restore change; the oid of the database, which a copy made with CREATE
    DATABASE does not keep; and the oid of this table, which a dump does not keep. It can't be recognised by
    its file instead: VACUUM FULL writes another one.
    """

    __tablename__ = "feed"

    feed_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    system_identifier: Mapped[int | None] = mapped_column(BigInteger)
    timeline: Mapped[int | None] = mapped_column(BigInteger)
    database_oid: Mapped[int | None] = mapped_column(BigInteger)
    table_oid: Mapped[int | None] = mapped_column(BigInteger)
    # Entries with a smaller xid are no longer in the log; on SQLite with a smaller id.
    pruned_xid: Mapped[int] = mapped_column(Xid, server_default="0")
