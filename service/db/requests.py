"""Repeatable writes: the answer of a write, kept in the write's own transaction."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Index, LargeBinary, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, UtcDateTime, now, text
from service.db.dialect import insert
from service.errors import RequestIdReused

KEPT_FOR = timedelta(hours=24)


class Request(Base):
    """A write that succeeded: who called what with which body, and what was answered."""

    __tablename__ = "requests"
    __table_args__ = (Index(None, "created_at"),)

    caller: Mapped[str] = mapped_column(text(255), primary_key=True)
    method: Mapped[str] = mapped_column(text(255), primary_key=True)
    request_id: Mapped[UUID] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


class RequestRepository:
    """The requests of one caller to one method.

    `claim` comes first in the transaction: of two calls with one id the second waits there for the
    first one's commit, and then finds its answer; a rollback lets it pass.
    """

    def __init__(self, session: AsyncSession, caller: str, method: str) -> None:
        self.session = session
        self.caller = caller
        self.method = method

    async def claim(self, request_id: UUID, fingerprint: bytes) -> bytes | None:
        """Return the first answer to this request, None where this is the first call.

        Raises RequestIdReused where the id came with another body.
        """
        key = {"caller": self.caller, "method": self.method, "request_id": request_id}
        claimed = await self.session.scalar(
            insert(self.session, Request)
            .values(**key, fingerprint=fingerprint)
            .on_conflict_do_nothing()
            .returning(Request.request_id)
        )
        if claimed:
            return None
        first = (
            await self.session.execute(select(Request.fingerprint, Request.answer).filter_by(**key))
        ).one_or_none()
        if first is None:  # forgotten in between
            return await self.claim(request_id, fingerprint)
        if first.fingerprint != fingerprint:
            raise RequestIdReused(
                "this request_id came before with another body; use a new one for a new request",
                field="request_id",
            )
        return bytes(first.answer)

    async def keep(self, request_id: UUID, answer: bytes) -> None:
        """Store the answer to a claimed request."""
        await self.session.execute(
            update(Request)
            .filter_by(caller=self.caller, method=self.method, request_id=request_id)
            .values(answer=answer)
        )


async def forget_requests(session: AsyncSession, at: datetime) -> None:
    """Delete the answers that were kept for 24 h at the time given."""
    await session.execute(delete(Request).where(Request.created_at < at - KEPT_FOR))
