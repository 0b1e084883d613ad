"""BulkService: progress, failures and abort of named loads."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceServicer
from service.auth.caller import current_caller
from service.bulk.convert import failure_fields
from service.db.engine import Database
from service.db.paging import decode_token, encode_token, fingerprint, page_size
from service.db.selection import MAX_ROWS_BYTES
from service.interceptors.chain import Context
from service.loads.convert import load_fields, load_to_message
from service.loads.model import Load
from service.loads.repository import LoadRepository
from service.loads.rules import check_load_id
from service.timeslice import TimeSlice

LOADS = fingerprint("loads")
FRAME_BYTES = 5  # tag and length in front of each message of a repeated field

RowT = TypeVar("RowT")


class BulkServicer(BulkServiceServicer):
    """BulkService: progress, failures and abort of bulk loads, during a load and after it."""

    def __init__(self, database: Database, kept_for: timedelta) -> None:
        self.database = database
        self.kept_for = kept_for

    async def GetBulkLoad(self, request: pb.GetBulkLoadRequest, context: Context) -> pb.BulkLoad:
        load_id = check_load_id(request.load_id)
        async with self.database.read() as session:
            load = await LoadRepository(session, current_caller().owner).get(load_id)
        return load_to_message(load, self.kept_for)

    async def ListBulkLoads(
        self, request: pb.ListBulkLoadsRequest, context: Context
    ) -> pb.ListBulkLoadsResponse:
        limit = page_size(request.page_size)
        after = decode_token(LOADS, request.page_token, [Load.__table__.c.id])
        async with self.database.read() as session:
            page = await LoadRepository(session, current_caller().owner).page(after, limit)
        response = pb.ListBulkLoadsResponse()
        shown = await _add_fitting(response.loads, partial(load_fields, kept_for=self.kept_for), page.rows)
        next_key = page.next_key if len(shown) == len(page.rows) else [shown[-1].id]
        response.next_page_token = encode_token(LOADS, next_key)
        return response

    async def ListBulkLoadFailures(
        self, request: pb.ListBulkLoadFailuresRequest, context: Context
    ) -> pb.ListBulkLoadFailuresResponse:
        load_id, limit = check_load_id(request.load_id), page_size(request.page_size)
        tied_to = fingerprint("failures", load_id)
        [after] = decode_token(tied_to, request.page_token, [Load.__table__.c.next_offset]) or [-1]
        async with self.database.read() as session:
            loads = LoadRepository(session, current_caller().owner)
            failures = await loads.failures(await loads.get(load_id), after, limit + 1)
        response = pb.ListBulkLoadFailuresResponse()
        shown = await _add_fitting(response.failures, failure_fields, failures[:limit])
        next_key = [shown[-1][0]] if len(shown) < len(failures) else None
        response.next_page_token = encode_token(tied_to, next_key)
        return response

    async def AbortBulkLoad(self, request: pb.AbortBulkLoadRequest, context: Context) -> pb.BulkLoad:
        load_id = check_load_id(request.load_id)
        async with self.database.begin() as session:
            load = await LoadRepository(session, current_caller().owner).abort(load_id)
        return load_to_message(load, self.kept_for)


async def _add_fitting(
    messages: Any, fields_of: Callable[[RowT], dict[str, Any]], rows: Sequence[RowT]
) -> Sequence[RowT]:
    """Add a message for each row until the response has 3 MiB; return the rows that were added."""
    size, time_slice = 0, TimeSlice()
    for number, row in enumerate(rows):
        size += messages.add(**fields_of(row)).ByteSize() + FRAME_BYTES
        if size > MAX_ROWS_BYTES and number:
            del messages[number:]
            return rows[:number]
        await time_slice.pause()
    return rows
