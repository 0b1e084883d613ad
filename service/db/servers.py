"""RunningServer: the table of running servers, which shows which releases use the database."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import Uuid
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, UtcDateTime, now, text


class RunningServer(Base):
    """A process of `roster serve`. `revision` is the one that its code was written for."""

    __tablename__ = "servers"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    name: Mapped[str] = mapped_column(text(255))
    release: Mapped[str] = mapped_column(text(50))
    revision: Mapped[str] = mapped_column(text(32))
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
