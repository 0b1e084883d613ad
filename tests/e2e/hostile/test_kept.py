"""Bounds on the data that the server stores for callers."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import func, insert, select, update

from roster.v1.bulk_pb2 import (
    AbortBulkLoadRequest,
    BulkLoad,
    BulkOptions,
    GetBulkLoadRequest,
    ListBulkLoadsRequest,
)
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from roster.v1.users_pb2 import BulkCreateUsersRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.engine import Database
from service.loads.model import MAX_OPTIONS_BYTES, Load
from service.loads.repository import expire_loads
from service.server import Server
from tests.e2e.hostile.support import MIB, SCALE, bystander, victim
from tests.support.errors import refusal
from tests.support.load_stream import LOAD_ID, LoadStream

MAX_ANSWER_BYTES = 3 << 20
UNKNOWN_FIELD = b"\xfa\x7f"  # of length 3 MiB, in a field of number 2047
UNKNOWN = UNKNOWN_FIELD + b"\x80\x80\xc0\x01" + bytes(3 * MIB)
MOST = 1000


def options(**fields: Any) -> BulkOptions:
    """Return options with 3 MiB of an unknown field."""
    chosen = BulkOptions(**{"load_id": LOAD_ID, "return_ids": True, **fields})
    chosen.MergeFromString(UNKNOWN)
    return chosen


async def open_load(users: UserServiceAsyncStub, chosen: BulkOptions) -> None:
    """Open or reopen a load; raises AioRpcError."""
    call = users.BulkCreateUsers(iter([BulkCreateUsersRequest(options=chosen)]))
    assert [event async for event in call]


async def stored_bytes(database: Database) -> int:
    """Return the size of the largest stored options."""
    async with database.read() as session:
        return int(await session.scalar(select(func.max(func.length(Load.stored_options)))) or 0)


async def store_options(database: Database, kept: bytes) -> None:
    """Store options as earlier releases did."""
    async with database.begin() as session:
        await session.execute(update(Load).values(stored_options=kept))


@pytest.fixture
async def loads(server: Server) -> AsyncIterator[BulkServiceAsyncStub]:
    """A client of BulkService that refuses responses over 3 MiB."""
    limit = [("grpc.max_receive_message_length", MAX_ANSWER_BYTES)]
    async with grpc.aio.insecure_channel(server.address, options=limit) as channel:
        yield BulkServiceStub(channel)


async def test_unknown_options_are_not_stored(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """They are not compared either when the load is reopened."""
    await open_load(users, options())
    await LoadStream.open(users)
    await open_load(users, options())

    assert await stored_bytes(server.database) < 100
    load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
    assert load.options == BulkOptions(load_id=LOAD_ID, return_ids=True)


async def test_mask_is_stored_without_repetitions(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """A mask with 4,000 paths is refused."""
    repeated = FieldMask(paths=["full_name"] * 100)
    await open_load(users, options(on_conflict=BulkOptions.UPDATE, update_mask=repeated))
    await open_load(
        users, options(on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["full_name"]))
    )
    endless = FieldMask(paths=["full_name"] * 4000)
    refused = await refusal(
        open_load(users, BulkOptions(load_id="other", on_conflict=BulkOptions.UPDATE, update_mask=endless))
    )

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_MASK")
    assert await stored_bytes(server.database) < 100
    load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
    assert list(load.options.update_mask.paths) == ["full_name"]


async def test_large_options_of_earlier_releases_are_not_read(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """Pages stay small, and the load can be read and aborted."""
    await open_load(users, options())
    await store_options(server.database, options().SerializeToString())

    (listed,) = (await loads.ListBulkLoads(ListBulkLoadsRequest())).loads
    aborted = await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID))
    assert (listed.load_id, listed.options) == (LOAD_ID, BulkOptions())
    assert aborted.state == BulkLoad.ABORTED


async def test_options_are_deleted_when_a_load_expires(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """Also those of earlier releases; the load itself stays, so that it can't start twice."""
    await open_load(users, options())
    for _ in range(2):
        async with server.database.begin() as session:
            await expire_loads(session, datetime.now(UTC) + timedelta(days=1))
        assert await stored_bytes(server.database) == 0
        await store_options(server.database, UNKNOWN)
    refused = await refusal(LoadStream.open(users))

    assert refused.reason == "LOAD_EXPIRED"
    load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
    assert (load.state, load.options) == (BulkLoad.EXPIRED, BulkOptions())


async def test_page_of_loads_ends_at_3_mib(server: Server, loads: BulkServiceAsyncStub) -> None:
    """With 1,000 loads that have the longest names and options."""
    names = [f"{number:04d}" + "\U0001f600" * 251 for number in range(MOST)]
    kept = BulkOptions(update_mask=FieldMask(paths=["full_name"] * 370)).SerializeToString()
    assert MAX_OPTIONS_BYTES - 100 < len(kept) <= MAX_OPTIONS_BYTES
    rows = [
        {"load_id": name, "caller": "anonymous", "method": "m" * 255, "stored_options": kept}
        for name in names
    ]
    async with server.database.begin() as session:
        await session.execute(insert(Load), rows)

    found: list[str] = []
    token = ""
    while not found or token:
        page = await loads.ListBulkLoads(ListBulkLoadsRequest(page_size=MOST, page_token=token))
        assert page.loads
        found += [load.load_id for load in page.loads]
        token = page.next_page_token
    assert found == names[::-1]


async def test_streams_with_unknown_options_leak_no_memory(database_url: str, tmp_path: Path) -> None:
    """Each takes its message's size while it is read; others are answered meanwhile."""
    async with victim(tmp_path, database_url) as server, server.channel("loader") as channel:
        users = UserServiceStub(channel)
        await open_load(users, options())
        before = server.resident()
        server.forget_peak()

        async with bystander(server) as seen:
            for number in range(20 * SCALE):
                await open_load(users, options(load_id=f"load {number}"))

        assert server.peak() - before < 100
        assert await server.returns_to(before + 50)
    assert not seen.failures


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_distinct_filters_leak_no_memory(database_url: str, tmp_path: Path) -> None:
    """SQLAlchemy would cache up to 750 statements, 0.75 MiB for a filter of 2,000 characters."""
    random = Random(7)
    async with victim(tmp_path, database_url) as server, server.channel("reader") as channel:
        users = UserServiceStub(channel)
        await users.ListUsers(ListUsersRequest(filter="id=1"))
        before = server.resident()

        for _ in range(200 * SCALE):
            comparisons = [f"id{random.choice('=<>')}1" for _ in range(249)]
            await users.ListUsers(ListUsersRequest(filter=" OR ".join(comparisons)))

        assert server.resident() - before < 60


def test_unknown_field_is_unknown() -> None:
    """Otherwise the tests of this file would test nothing."""
    assert options().ByteSize() > 3 * MIB
    assert options() != BulkOptions(load_id=LOAD_ID, return_ids=True)
