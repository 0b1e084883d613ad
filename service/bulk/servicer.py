"""BulkService: what became of the loads that have a name."""

from datetime import timedelta

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceServicer
from service.bulk.convert import failure_to_message, load_to_message
from service.caller import current_caller
from service.db.bulk.loads import Load, LoadRepository
from service.db.engine import Database
from service.db.paging import decode_token, encode_token, fingerprint, page_size
from service.fields import check_load_id
from service.interceptors.around import Context

LOADS = fingerprint("loads")


class BulkServicer(BulkServiceServicer):
    """BulkService: progress, failures and the abort of bulk loads, while they run and after."""

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
        return pb.ListBulkLoadsResponse(
            loads=[load_to_message(load, self.kept_for) for load in page.rows],
            next_page_token=encode_token(LOADS, page.next_key),
        )

    async def ListBulkLoadFailures(
        self, request: pb.ListBulkLoadFailuresRequest, context: Context
    ) -> pb.ListBulkLoadFailuresResponse:
        load_id, limit = check_load_id(request.load_id), page_size(request.page_size)
        tied_to = fingerprint("failures", load_id)
        [after] = decode_token(tied_to, request.page_token, [Load.__table__.c.next_offset]) or [-1]
        async with self.database.read() as session:
            loads = LoadRepository(session, current_caller().owner)
            failures = await loads.failures(await loads.get(load_id), after, limit + 1)
        page = failures[:limit]
        return pb.ListBulkLoadFailuresResponse(
            failures=[failure_to_message(offset, error) for offset, error in page],
            next_page_token=encode_token(tied_to, [page[-1][0]] if len(failures) > limit else None),
        )

    async def AbortBulkLoad(self, request: pb.AbortBulkLoadRequest, context: Context) -> pb.BulkLoad:
        load_id = check_load_id(request.load_id)
        async with self.database.begin() as session:
            load = await LoadRepository(session, current_caller().owner).abort(load_id)
        return load_to_message(load, self.kept_for)
