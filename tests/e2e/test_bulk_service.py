"""BulkService: loads looked at and stopped, while they run and after."""

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.rpc.code_pb2 import ALREADY_EXISTS, INVALID_ARGUMENT

from roster.v1.bulk_pb2 import (
    AbortBulkLoadRequest,
    BulkLoad,
    BulkLoadRow,
    BulkOptions,
    GetBulkLoadRequest,
    ListBulkLoadFailuresRequest,
    ListBulkLoadRowsRequest,
    ListBulkLoadsRequest,
    RowFailure,
)
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from tests.support.errors import refusal
from tests.support.load_stream import LOAD_ID, LoadStream

SEVEN_DAYS = 7 * 24 * 3600


@pytest.fixture
def loads(channel: grpc.aio.Channel) -> BulkServiceAsyncStub:
    """The client of BulkService."""
    return BulkServiceStub(channel)


async def got(loads: BulkServiceAsyncStub, load_id: str = LOAD_ID) -> BulkLoad:
    return await loads.GetBulkLoad(GetBulkLoadRequest(load_id=load_id))


async def pages(list_page: Any, request: Any, field: str) -> list[Sequence[Any]]:
    """Return the pages of a list, to its end."""
    found = []
    while True:
        page = await list_page(request)
        found.append(getattr(page, field))
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def failures(loads: BulkServiceAsyncStub, page_size: int = 1000) -> list[Sequence[RowFailure]]:
    request = ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=page_size)
    return await pages(loads.ListBulkLoadFailures, request, "failures")


async def test_a_load_can_be_looked_at_while_it_runs(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """It is there once its stream is open, and has the numbers of what is acknowledged."""
    stream = await LoadStream.open(users, on_conflict="SKIP")
    begun = await got(loads)
    await stream.acknowledged("a", "b", "a", "no one")
    running = await got(loads)
    await stream.finished()
    finished = await got(loads)

    assert (begun.load_id, begun.method) == (LOAD_ID, "roster.v1.UserService.BulkCreateUsers")
    assert begun.options == BulkOptions(load_id=LOAD_ID, on_conflict=BulkOptions.SKIP, return_ids=True)
    assert (begun.state, begun.next_offset) == (BulkLoad.OPEN, 0)
    assert (running.state, running.next_offset) == (BulkLoad.OPEN, 4)
    assert (running.created, running.updated, running.skipped, running.failed) == (2, 0, 1, 1)
    assert finished.state == BulkLoad.FINISHED
    assert begun.created_at == finished.created_at
    times = [load.updated_at.ToNanoseconds() for load in (begun, running, finished)]
    assert times == sorted(times)
    assert finished.expires_at.seconds - finished.updated_at.seconds == SEVEN_DAYS


async def test_updates_are_counted(users: UserServiceAsyncStub, loads: BulkServiceAsyncStub) -> None:
    """A row that was written to one that existed is neither created nor skipped."""
    stream = await LoadStream.open(users, on_conflict="UPDATE", update_mask={"paths": ["full_name"]})
    await stream.acknowledged("a", "a")

    load = await got(loads)
    assert (load.created, load.updated, load.skipped, load.failed) == (1, 1, 0, 0)


async def test_lists_the_newest_loads_first(users: UserServiceAsyncStub, loads: BulkServiceAsyncStub) -> None:
    """Page by page; to open a load again makes it no newer."""
    for load_id in "abcdea":
        await LoadStream.open(users, load_id=load_id)

    found = await pages(loads.ListBulkLoads, ListBulkLoadsRequest(page_size=2), "loads")

    assert [[load.load_id for load in page] for page in found] == [["e", "d"], ["c", "b"], ["a"]]
    assert found[2][0] == await got(loads, "a")


async def test_there_may_be_no_load(loads: BulkServiceAsyncStub) -> None:
    """An empty list has one page."""
    assert await pages(loads.ListBulkLoads, ListBulkLoadsRequest(), "loads") == [[]]


async def test_lists_failures_in_the_order_of_their_offsets(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """Page by page over many batches, of which most had none; exactly those that the acks told."""
    stream = await LoadStream.open(users)
    told: list[RowFailure] = []
    for batch in range(30):
        names = [f"user{batch}", "no one", f"user{batch}"] if batch % 2 else [f"user{batch}"]
        told.extend((await stream.acknowledged(*names)).failures)

    assert len(told) == 30
    for page_size in (1, 4, 7, 1000):
        found = await failures(loads, page_size)
        assert [failure for page in found for failure in page] == told
        assert {len(page) for page in found[:-1]} <= {page_size}


async def test_a_failure_is_told_as_in_its_ack(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """With code, reason, field, a sentence, and whose the key is."""
    stream = await LoadStream.open(users)
    (created,) = (await stream.acknowledged("a")).ids
    await stream.acknowledged("b", "a", "no one")

    ((taken, bad),) = await failures(loads)

    assert taken == RowFailure(
        offset=2,
        code=ALREADY_EXISTS,
        reason="EMAIL_TAKEN",
        field="email",
        message="email belongs to another user",
        existing_id=created,
    )
    assert (bad.offset, bad.code, bad.reason, bad.field) == (3, INVALID_ARGUMENT, "INVALID_FIELD", "email")


async def test_of_a_batch_that_failed_the_culprits_are_told(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """The rows that failed with them are in the count alone."""
    stream = await LoadStream.open(users, atomicity="BATCH")
    await stream.acknowledged("a", "no one", "b")

    assert [[failure.offset for failure in page] for page in await failures(loads)] == [[1]]
    assert (await got(loads)).failed == 3


async def test_a_load_without_failures_has_an_empty_page(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """There is nothing to go on with behind it."""
    await (await LoadStream.open(users)).acknowledged("a")

    assert await failures(loads) == [[]]


async def test_lists_rows_in_the_order_of_their_offsets(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """Page by page over the batches, with the outcome and the id of each row."""
    stream = await LoadStream.open(users, on_conflict="UPDATE", update_mask={"paths": ["full_name"]})
    ids = [*(await stream.acknowledged("a", "no one", "b", "a")).ids, *(await stream.acknowledged("c")).ids]
    outcomes = ["CREATED", "FAILED", "CREATED", "UPDATED", "CREATED"]
    expected = [
        BulkLoadRow(offset=offset, outcome=BulkLoadRow.Outcome.Value(outcome), id=id)
        for offset, (outcome, id) in enumerate(zip(outcomes, ids, strict=True))
    ]

    assert [row.id for row in expected] == [ids[0], 0, ids[2], ids[0], ids[4]]
    for page_size in (0, 1, 2, 3, 5, 5000):
        request = ListBulkLoadRowsRequest(load_id=LOAD_ID, page_size=page_size)
        found = await pages(loads.ListBulkLoadRows, request, "rows")
        assert [row for page in found for row in page] == expected
        assert len(found) == -(-5 // (page_size or 50))


async def test_rows_of_skipped_and_open_loads(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """A skipped row has the id of the existing one; a load without rows has an empty page."""
    request = ListBulkLoadRowsRequest(load_id=LOAD_ID)
    stream = await LoadStream.open(users, on_conflict="SKIP")
    assert await pages(loads.ListBulkLoadRows, request, "rows") == [[]]
    first, _ = (await stream.acknowledged("a", "a")).ids

    [[_, skipped]] = await pages(loads.ListBulkLoadRows, ListBulkLoadRowsRequest(load_id=LOAD_ID), "rows")
    assert skipped == BulkLoadRow(offset=1, outcome=BulkLoadRow.SKIPPED, id=first)


async def test_an_abort_answers_with_the_load(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """Its numbers are final, and to abort it again changes nothing."""
    await (await LoadStream.open(users)).acknowledged("a", "no one")

    aborted = await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID))

    assert (aborted.state, aborted.next_offset, aborted.failed) == (BulkLoad.ABORTED, 2, 1)
    assert aborted == await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID)) == await got(loads)
    assert len((await failures(loads))[0]) == 1


async def test_a_finished_load_is_not_aborted(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """There is nothing to stop: it is answered as it is."""
    await (await LoadStream.open(users)).finished()

    aborted = await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID))

    assert aborted.state == BulkLoad.FINISHED
    assert await got(loads) == aborted


async def test_a_load_that_is_not_there_is_told(loads: BulkServiceAsyncStub) -> None:
    """The same of every RPC that names one."""
    for call in (
        loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID)),
        loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID)),
        loads.ListBulkLoadRows(ListBulkLoadRowsRequest(load_id=LOAD_ID)),
        loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "LOAD_NOT_FOUND")


async def test_a_name_that_no_load_can_have_is_bad_input(loads: BulkServiceAsyncStub) -> None:
    """It is told before anything is looked up."""
    for load_id in ("", "x" * 256, "nul\0"):
        for call in (
            loads.GetBulkLoad(GetBulkLoadRequest(load_id=load_id)),
            loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=load_id)),
            loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=load_id)),
        ):
            refused = await refusal(call)
            assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["load_id"])


async def test_a_token_belongs_to_its_list(users: UserServiceAsyncStub, loads: BulkServiceAsyncStub) -> None:
    """A damaged one, or that of another list or another load, gets no page."""
    for load_id in (LOAD_ID, "other"):
        await (await LoadStream.open(users, load_id=load_id)).acknowledged("no one", "no one")
    of_loads = (await loads.ListBulkLoads(ListBulkLoadsRequest(page_size=1))).next_page_token
    of_failures = (
        await loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=1))
    ).next_page_token
    of_rows = (
        await loads.ListBulkLoadRows(ListBulkLoadRowsRequest(load_id=LOAD_ID, page_size=1))
    ).next_page_token

    for call in (
        loads.ListBulkLoads(ListBulkLoadsRequest(page_token=of_failures)),
        loads.ListBulkLoads(ListBulkLoadsRequest(page_token=of_loads[:-1])),
        loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_token=of_loads)),
        loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id="other", page_token=of_failures)),
        loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_token="x")),
        loads.ListBulkLoadRows(ListBulkLoadRowsRequest(load_id=LOAD_ID, page_token=of_failures)),
        loads.ListBulkLoadRows(ListBulkLoadRowsRequest(load_id="other", page_token=of_rows)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


async def test_a_page_size_is_not_negative(users: UserServiceAsyncStub, loads: BulkServiceAsyncStub) -> None:
    """The field at fault is told."""
    await LoadStream.open(users)
    for call in (
        loads.ListBulkLoads(ListBulkLoadsRequest(page_size=-1)),
        loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=-1)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_size"])
