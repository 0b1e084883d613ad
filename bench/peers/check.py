"""Checks that all servers give the same answers: those that the database contains, to the microsecond."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg
import grpc

from bench.databases import plain_url
from bench.servers import PEERS, ROSTER, available, start_server
from roster.v1.bulk_pb2 import BulkAck, BulkLoad
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import migrations
from tests.support.postgres import PostgresServer

# Users with and without a name, of several states, times and versions; every seventh id is missing.
INSERT = """
INSERT INTO users (email, full_name, is_active, created_at, updated_at, version)
SELECT 'user' || number || '@example.org', CASE WHEN number % 5 > 0 THEN 'Zoë ' || number END, number % 3 > 0,
    timestamptz '2024-02-28 23:59:59.999999Z' + number * interval '1 day 0.001001 s',
    timestamptz '1999-12-31 00:00:00Z' + number * interval '1 hour', number
FROM generate_series(1, 2500) number
"""
DELETE = "DELETE FROM users WHERE id % 7 = 0"
COLUMNS = "id, email, full_name, is_active, created_at, updated_at, version"
SELECT = f"SELECT {COLUMNS} FROM users WHERE id <= $1 ORDER BY id"
CREATED = "SELECT email, hashed_password, full_name, is_active, version FROM users WHERE id > $1 ORDER BY id"
HASH = "$argon2id$v=19$m=65536,t=3,p=4$QUFBQUFBQUFBQUFBQUFBQQ$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE"
SEEDED = 2500
DEADLINE = 20  # seconds
SENT = [  # in two messages
    [User(email="a@example.org", full_name="Ada \\ Tab\t\"'", hashed_password=HASH, is_active=False)],
    [User(email="b@example.org"), User(email="c@example.org", full_name="Ç", is_active=True)],
]


async def check(name: str, url: str) -> None:
    """Start a server on a new database, and compare the answers of all RPCs that peers have."""
    await asyncio.to_thread(migrations.upgrade, url)
    connection = await asyncpg.connect(plain_url(url))
    await connection.execute(INSERT)
    await connection.execute(DELETE)
    stored = [User(**row) for row in await connection.fetch(SELECT, SEEDED)]
    with start_server(name, plain_url(url)) as server, grpc.insecure_channel(server.address) as channel:
        await asyncio.to_thread(_check_answers, UserServiceStub(channel), stored)
    rows = [tuple(row) for row in await connection.fetch(CREATED, SEEDED)]
    await connection.close()
    _compare("created users", rows, [_stored(user) for message in SENT for user in message])


def _check_answers(users: Any, stored: Sequence[User]) -> None:
    for user in stored[::100]:
        _compare("GetUser", users.GetUser(GetUserRequest(id=user.id), timeout=DEADLINE), user)
        _compare("GetUser", users.GetUser(GetUserRequest(email=user.email), timeout=DEADLINE), user)
    _compare("GetUser of a missing id", _status(users.GetUser, 7), grpc.StatusCode.NOT_FOUND)

    asked = [stored[90].id, 7, *(user.id for user in stored[100:300]), 14]
    batch = users.BatchGetUsers(BatchGetUsersRequest(ids=asked), timeout=DEADLINE)
    _compare("BatchGetUsers", list(batch.users), [stored[90], *stored[100:300]])
    _compare("missing ids", list(batch.missing_ids), [7, 14])

    _compare("ListUsers", list(_list(users)), stored)
    exported = list(users.ExportUsers(ExportUsersRequest(after_id=1000), timeout=DEADLINE))
    rest = [user for user in stored if user.id > 1000]  # noqa: PLR2004
    _compare("ExportUsers", [user for message in exported for user in message.users], rest)
    _compare("last_id", [message.last_id for message in exported], [m.users[-1].id for m in exported])

    opened, *acks, summary = users.BulkCreateUsers(_messages(), timeout=DEADLINE)
    _compare("first response", opened.WhichOneof("event"), "opened")
    expected = [BulkAck(offset=0, next_offset=1, created=1), BulkAck(offset=1, next_offset=3, created=2)]
    _compare("acks", [response.ack for response in acks], expected)
    counts = summary.summary.next_offset, summary.summary.created, summary.summary.state
    _compare("summary", counts, (3, 3, BulkLoad.FINISHED))


def _status(method: Any, id: int) -> Any:
    try:
        return method(GetUserRequest(id=id), timeout=DEADLINE)
    except grpc.RpcError as error:
        return error.code()


def _list(users: Any) -> Iterator[User]:
    request = ListUsersRequest(page_size=100)
    while True:
        page = users.ListUsers(request, timeout=DEADLINE)
        yield from page.users
        request.page_token = page.next_page_token
        if not request.page_token:
            return


def _messages() -> Iterator[BulkCreateUsersRequest]:
    offset = 0
    for message in SENT:
        yield BulkCreateUsersRequest(offset=offset, users=message, finish=message is SENT[-1])
        offset += len(message)


def _stored(user: User) -> tuple[Any, ...]:
    full_name = user.full_name if user.HasField("full_name") else None
    is_active = user.is_active if user.HasField("is_active") else True
    return user.email, user.hashed_password or None, full_name, is_active, 1


def _compare(title: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{title}: {found} instead of {expected}"[:2000])


async def main() -> None:
    failed = False
    with PostgresServer() as postgresql:
        for name in available(ROSTER, *PEERS):
            async with postgresql.database() as url:
                try:
                    await check(name, url)
                except (ValueError, grpc.RpcError) as error:
                    failed = True
                    print(f"{name}: {error}", file=sys.stderr)
                else:
                    print(f"{name}: all answers are those of the database")
    sys.exit(failed)


if __name__ == "__main__":
    asyncio.run(main())
