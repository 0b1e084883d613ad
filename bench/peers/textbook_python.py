"""UserService in Python as textbooks write it: grpc.aio, uvloop, and SQLAlchemy's ORM."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import grpc
from sqlalchemy import BigInteger, DateTime, Identity, Select, insert, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from bench.peers.serving import serve
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BatchGetUsersResponse,
    BulkCreateUsersRequest,
    ExportUsersRequest,
    ExportUsersResponse,
    GetUserRequest,
    ListUsersRequest,
    ListUsersResponse,
)
from roster.v1.users_pb2_grpc import UserServiceServicer

CONNECTIONS = 20
PAGE_ROWS = 50
EXPORT_ROWS = 1000


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    email: Mapped[str]
    hashed_password: Mapped[str | None] = mapped_column(deferred=True)
    full_name: Mapped[str | None]
    is_active: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    version: Mapped[int] = mapped_column(BigInteger)


class TextbookPython(UserServiceServicer):
    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self.sessions = sessions

    async def GetUser(self, request: GetUserRequest, context: Any) -> UserMessage:
        query = select(User).where(
            User.email == request.email if request.HasField("email") else User.id == request.id
        )
        async with self.sessions() as session:
            user = (await session.scalars(query)).one_or_none()
        if user is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return _message(user)

    async def BatchGetUsers(self, request: BatchGetUsersRequest, context: Any) -> BatchGetUsersResponse:
        found = {user.id: user for user in await self._users(select(User).where(User.id.in_(request.ids)))}
        return BatchGetUsersResponse(
            users=[_message(found[id]) for id in request.ids if id in found],
            missing_ids=[id for id in request.ids if id not in found],
        )

    async def ListUsers(self, request: ListUsersRequest, context: Any) -> ListUsersResponse:
        size = request.page_size or PAGE_ROWS
        users = await self._users(_after(int(request.page_token or 0), size + 1))
        token = str(users[size - 1].id) if len(users) > size else ""
        return ListUsersResponse(users=map(_message, users[:size]), next_page_token=token)

    async def BulkCreateUsers(
        self, requests: AsyncIterator[BulkCreateUsersRequest], context: Any
    ) -> AsyncIterator[BulkWriteResponse]:
        total = 0
        yield BulkWriteResponse(opened=BulkOpened(max_rows=5000, max_bytes=4 << 20))
        async for request in requests:
            created = len(request.users)
            async with self.sessions.begin() as session:
                await session.execute(insert(User), [_values(user) for user in request.users])
            yield BulkWriteResponse(ack=BulkAck(offset=total, next_offset=total + created, created=created))
            total += created
        yield BulkWriteResponse(
            summary=BulkSummary(next_offset=total, created=total, state=BulkLoad.FINISHED)
        )

    async def ExportUsers(
        self, request: ExportUsersRequest, context: Any
    ) -> AsyncIterator[ExportUsersResponse]:
        size, last = request.batch_size or EXPORT_ROWS, request.after_id
        while users := await self._users(_after(last, size)):
            last = users[-1].id
            yield ExportUsersResponse(users=map(_message, users), last_id=last)

    async def _users(self, query: Select[tuple[User]]) -> Sequence[User]:
        async with self.sessions() as session:
            return (await session.scalars(query)).all()


def _after(id: int, limit: int) -> Select[tuple[User]]:
    return select(User).where(User.id > id).order_by(User.id).limit(limit)


def _message(user: User) -> UserMessage:
    return UserMessage(
        id=user.id,
        email=user.email,
        full_name=user.full_name,
        is_active=user.is_active,
        created_at=user.created_at,
        updated_at=user.updated_at,
        version=user.version,
    )


def _values(user: UserMessage) -> dict[str, Any]:
    return {
        "email": user.email,
        "hashed_password": user.hashed_password or None,
        "full_name": user.full_name if user.HasField("full_name") else None,
        "is_active": user.is_active if user.HasField("is_active") else True,
    }


@asynccontextmanager
async def open_engine() -> AsyncIterator[TextbookPython]:
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0)
    yield TextbookPython(async_sessionmaker(engine, expire_on_commit=False))
    await engine.dispose()


if __name__ == "__main__":
    serve(open_engine)
