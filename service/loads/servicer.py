"""BulkService: progress, rows, failures and abort of named loads."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceServicer
from service.auth.caller import current_caller
from service.bulk.convert import failure_fields
from service.db.engine import Database
from service.db.paging import check_token, decode_token, encode_token, fingerprint, page_size
from service.db.selection import MAX_ROWS_BYTES
from service.interceptors.chain import Context
from service.loads.convert import load_fields, load_row_fields, load_to_message
from service.loads.model import Load
from service.loads.repository import LoadRepository
from service.loads.rules import check_load_id, check_owner
from service.timeslice import TimeSlice, add_in_slices

FRAME_BYTES = 5  # tag and length in front of each message of a repeated field

RowT = TypeVar("RowT")


class LoadRequest(Protocol):
    """A request that names a load."""

    load_id: str
    caller: str


class BulkServicer(BulkServiceServicer):
    """BulkService: progress, rows, failures and abort of bulk loads, during a load and after it."""

    def __init__(self, database: Database, kept_for: timedelta) -> None:
        self.database = database
        self.kept_for = kept_for

    async def GetBulkLoad(self, request: pb.GetBulkLoadRequest, context: Context) -> pb.BulkLoad:
        load_id, owner = _key_from_request(request)
        async with self.database.read() as session:
            load = await _get(session, load_id, owner)
        return load_to_message(load, self.kept_for)

    async def ListBulkLoads(
        self, request: pb.ListBulkLoadsRequest, context: Context
    ) -> pb.ListBulkLoadsResponse:
        limit, caller = page_size(request.page_size), current_caller()
        owner = check_owner(request.caller, caller)
        listing = _listing("loads", owner=owner)
        after = decode_token(listing, request.page_token, [Load.__table__.c.id])
        async with self.database.read() as session:
            page = await LoadRepository(session, owner or caller.owner).page(after, limit)
        response = pb.ListBulkLoadsResponse()
        shown = await _add_fitting(response.loads, partial(load_fields, kept_for=self.kept_for), page.rows)
        next_key = page.next_key if len(shown) == len(page.rows) else [shown[-1].id]
        response.next_page_token = encode_token(listing, next_key)
        return response

    async def ListBulkLoadFailures(
        self, request: pb.ListBulkLoadFailuresRequest, context: Context
    ) -> pb.ListBulkLoadFailuresResponse:
        (load_id, owner), limit = _key_from_request(request), page_size(request.page_size)
        check_token(request.page_token)
        async with self.database.read() as session:
            load = await _get(session, load_id, owner)
            listing, after = _start_of_page(load, "failures", request.page_token)
            failures = await LoadRepository(session, load.caller).failures(load, after, limit + 1)
        response = pb.ListBulkLoadFailuresResponse()
        shown = await _add_fitting(response.failures, failure_fields, failures[:limit])
        next_key = [shown[-1][0]] if len(shown) < len(failures) else None
        response.next_page_token = encode_token(listing, next_key)
        return response

    async def ListBulkLoadRows(
        self, request: pb.ListBulkLoadRowsRequest, context: Context
    ) -> pb.ListBulkLoadRowsResponse:
        (load_id, owner), limit = _key_from_request(request), page_size(request.page_size)
        check_token(request.page_token)
        async with self.database.read() as session:
            load = await _get(session, load_id, owner)
            listing, after = _start_of_page(load, "rows", request.page_token)
            rows = await LoadRepository(session, load.caller).rows(load, after + 1, limit)
        response = pb.ListBulkLoadRowsResponse()
        await add_in_slices(response.rows, load_row_fields, rows)
        has_more = bool(rows) and rows[-1].offset + 1 < load.next_offset
        response.next_page_token = encode_token(listing, [rows[-1].offset] if has_more else None)
        return response

    async def AbortBulkLoad(self, request: pb.AbortBulkLoadRequest, context: Context) -> pb.BulkLoad:
        load_id, owner = _key_from_request(request)
        async with self.database.begin() as session:
            load = await _get(session, load_id, owner)
            load = await LoadRepository(session, load.caller).abort(load)
        return load_to_message(load, self.kept_for)


def _key_from_request(request: LoadRequest) -> tuple[str, str]:
    """Return the load_id and the owner in a request; raises InvalidField, PermissionDenied."""
    owner = check_owner(request.caller, current_caller())
    return check_load_id(request.load_id), owner


def _listing(*listing: str, owner: str) -> bytes:
    """Return what page tokens are bound to; without `owner` the same as in releases that did not have it."""
    return fingerprint(*listing, owner) if owner else fingerprint(*listing)


def _start_of_page(load: Load, name: str, page_token: str) -> tuple[bytes, int]:
    """Return what page tokens are bound to, and the offset after which the page begins, -1 for the first.

    Raises InvalidPageToken.
    """
    # Bound to the load that was found: an admin may begin one of this name before the next page.
    owner = load.caller if load.caller != current_caller().identity else ""
    listing = _listing(name, load.load_id, owner=owner)
    [after] = decode_token(listing, page_token, [Load.__table__.c.next_offset]) or [-1]
    return listing, after


async def _get(session: AsyncSession, load_id: str, owner: str) -> Load:
    """Return the load of `owner`. If that is "", the caller's own, or else for an admin the only one."""
    caller = current_caller()
    own = LoadRepository(session, owner or caller.identity)
    if owner or caller.owner:
        return await own.get(load_id)
    return await own.find(load_id) or await LoadRepository(session, None).get(load_id)


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
