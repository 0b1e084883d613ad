"""UserService in Python without an ORM: grpc.aio, uvloop, and asyncpg's pool and prepared statements."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc

from bench.peers.serving import serve
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User
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
SELECT = "SELECT id, email, full_name, is_active, created_at, updated_at, version FROM users"
BY_ID = f"{SELECT} WHERE id = $1"
BY_EMAIL = f"{SELECT} WHERE email = $1"
BY_IDS = f"{SELECT} WHERE id = ANY ($1)"
AFTER = f"{SELECT} WHERE id > $1 ORDER BY id LIMIT $2"
COPIED = ("email", "hashed_password", "full_name", "is_active")


class RawPython(UserServiceServicer):
    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    async def GetUser(self, request: GetUserRequest, context: Any) -> User:
        if request.HasField("email"):
            row = await self.pool.fetchrow(BY_EMAIL, request.email)
        else:
            row = await self.pool.fetchrow(BY_ID, request.id)
        if row is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return User(**row)

    async def BatchGetUsers(self, request: BatchGetUsersRequest, context: Any) -> BatchGetUsersResponse:
        found = {row["id"]: row for row in await self.pool.fetch(BY_IDS, request.ids)}
        return BatchGetUsersResponse(
            users=[User(**found[id]) for id in request.ids if id in found],
            missing_ids=[id for id in request.ids if id not in found],
        )

    async def ListUsers(self, request: ListUsersRequest, context: Any) -> ListUsersResponse:
        size = request.page_size or PAGE_ROWS
        rows = await self.pool.fetch(AFTER, int(request.page_token or 0), size + 1)
        token = str(rows[size - 1]["id"]) if len(rows) > size else ""
        return ListUsersResponse(users=[User(**row) for row in rows[:size]], next_page_token=token)

    async def BulkCreateUsers(
        self, requests: AsyncIterator[BulkCreateUsersRequest], context: Any
    ) -> AsyncIterator[BulkWriteResponse]:
        total = 0
        yield BulkWriteResponse(opened=BulkOpened(max_rows=5000, max_bytes=4 << 20))
        async for request in requests:
            created = len(request.users)
            records = [_record(user) for user in request.users]
            await self.pool.copy_records_to_table("users", records=records, columns=COPIED)
            yield BulkWriteResponse(ack=BulkAck(offset=total, next_offset=total + created, created=created))
            total += created
        yield BulkWriteResponse(
            summary=BulkSummary(next_offset=total, created=total, state=BulkLoad.FINISHED)
        )

    async def ExportUsers(
        self, request: ExportUsersRequest, context: Any
    ) -> AsyncIterator[ExportUsersResponse]:
        size, last = request.batch_size or EXPORT_ROWS, request.after_id
        while rows := await self.pool.fetch(AFTER, last, size):
            last = rows[-1]["id"]
            yield ExportUsersResponse(users=[User(**row) for row in rows], last_id=last)


def _record(user: User) -> Sequence[Any]:
    full_name = user.full_name if user.HasField("full_name") else None
    is_active = user.is_active if user.HasField("is_active") else True
    return user.email, user.hashed_password or None, full_name, is_active


@asynccontextmanager
async def open_pool() -> AsyncIterator[RawPython]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], max_size=CONNECTIONS) as pool:
        yield RawPython(pool)


if __name__ == "__main__":
    serve(open_pool)
