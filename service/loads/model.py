"""Load and LoadBatch: the tables of bulk loads that have a name."""

from datetime import datetime
from enum import IntEnum

from sqlalchemy import ForeignKey, Identity, Index, LargeBinary, SmallInteger, case, func, literal
from sqlalchemy.orm import Mapped, column_property, mapped_column

from service.db.base import Base, BigInt, UtcDateTime, now, text

# The options of a load need about 1,100 bytes at most, of which a load_id takes 1,020. Earlier releases also
# stored unknown fields, sometimes megabytes. Such options are not read.
MAX_OPTIONS_BYTES = 4 << 10
COUNTED = ("created", "updated", "skipped", "failed", "deleted", "deleted_posts")


class LoadState(IntEnum):
    """The state of a load; the numbers are the contract's."""

    OPEN = 1
    FINISHED = 2
    ABORTED = 3
    EXPIRED = 4


class Load(Base):
    """A bulk load. `epoch` counts the streams that opened it; only the newest may write.

    Until revision 0004, `load_id` alone is unique too.
    """

    __tablename__ = "bulk_loads"
    __table_args__ = (
        Index("uq_bulk_loads_load_id_caller", "load_id", "caller", unique=True),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigInt, Identity(), primary_key=True)
    load_id: Mapped[str] = mapped_column(text(255))
    caller: Mapped[str] = mapped_column(text(255))
    method: Mapped[str] = mapped_column(text(255))
    stored_options: Mapped[bytes] = mapped_column(
        "options", LargeBinary, deferred=True, deferred_raiseload=True
    )
    state: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    epoch: Mapped[int] = mapped_column(BigInt, server_default="1")
    next_offset: Mapped[int] = mapped_column(BigInt, server_default="0")
    created: Mapped[int] = mapped_column(BigInt, server_default="0")
    updated: Mapped[int] = mapped_column(BigInt, server_default="0")
    skipped: Mapped[int] = mapped_column(BigInt, server_default="0")
    failed: Mapped[int] = mapped_column(BigInt, server_default="0")
    deleted: Mapped[int] = mapped_column(BigInt, server_default="0")
    deleted_posts: Mapped[int] = mapped_column(BigInt, server_default="0")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    options: Mapped[bytes] = column_property(
        case(
            (func.length(stored_options) <= MAX_OPTIONS_BYTES, stored_options),
            else_=literal(b"", LargeBinary),
        )
    )


class LoadBatch(Base):
    """The outcome of the rows from `first_offset` to `next_offset`, exclusive."""

    __tablename__ = "bulk_batches"

    load: Mapped[int] = mapped_column(ForeignKey(Load.id, ondelete="CASCADE"), primary_key=True)
    first_offset: Mapped[int] = mapped_column(BigInt, primary_key=True)
    next_offset: Mapped[int] = mapped_column(BigInt)
    results: Mapped[bytes] = mapped_column(LargeBinary)
    ids: Mapped[bytes] = mapped_column(LargeBinary)
    failures: Mapped[bytes | None] = mapped_column(LargeBinary)
    deleted_posts: Mapped[bytes | None] = mapped_column(LargeBinary)  # by row; null if there are none
