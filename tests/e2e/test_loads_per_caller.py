"""Loads of several callers with one name: each caller has its own, and an admin can use all of them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.client import BulkLoader
from roster.v1.bulk_pb2 import (
    AbortBulkLoadRequest,
    BulkLoad,
    BulkOptions,
    BulkSummary,
    GetBulkLoadRequest,
    ListBulkLoadFailuresRequest,
    ListBulkLoadsRequest,
)
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db import migrations
from service.loads.repository import LoadRepository
from tests.e2e.secured import Secured, secured
from tests.support.errors import refusal
from tests.support.load_stream import LOAD_ID, LoadStream, refused_to_open

SUBJECTS = ("loader", "importer", "admin")
LOADER, IMPORTER, ADMIN = (f"jwt:{subject}" for subject in SUBJECTS)

Channels = Mapping[str, grpc.aio.Channel]
Call = Callable[[BulkServiceAsyncStub, str], Awaitable[Any]]


@pytest.fixture
async def roster(database_url: str, tmp_path: Path) -> AsyncIterator[Secured]:
    """A server that knows its callers by their tokens."""
    async with secured(database_url, tmp_path, tokens=True) as server:
        yield server


@pytest.fixture
async def channels(roster: Secured) -> AsyncIterator[Channels]:
    """A channel of each caller."""
    async with AsyncExitStack() as stack:
        opened = {}
        for subject in SUBJECTS:
            channel = roster.channel(roster.issuer.token(subject))
            opened[f"jwt:{subject}"] = await stack.enter_async_context(channel)
        yield opened


@pytest.fixture
def users(channels: Channels) -> dict[str, UserServiceAsyncStub]:
    """The clients of UserService, by caller."""
    return {caller: UserServiceStub(channel) for caller, channel in channels.items()}


@pytest.fixture
def loads(channels: Channels) -> dict[str, BulkServiceAsyncStub]:
    """The clients of BulkService, by caller."""
    return {caller: BulkServiceStub(channel) for caller, channel in channels.items()}


def get(loads: BulkServiceAsyncStub, caller: str) -> Awaitable[BulkLoad]:
    return loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID, caller=caller))


def list_failures(loads: BulkServiceAsyncStub, caller: str) -> Awaitable[Any]:
    return loads.ListBulkLoadFailures(ListBulkLoadFailuresRequest(load_id=LOAD_ID, caller=caller))


def abort(loads: BulkServiceAsyncStub, caller: str) -> Awaitable[BulkLoad]:
    return loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID, caller=caller))


def list_loads(loads: BulkServiceAsyncStub, caller: str) -> Awaitable[Any]:
    return loads.ListBulkLoads(ListBulkLoadsRequest(caller=caller))


async def loaded(users: UserServiceAsyncStub, name: str, count: int) -> BulkSummary:
    """Load users in small messages, and return the summary."""

    async def rows() -> AsyncIterator[User]:
        for number in range(count):
            yield User(email=f"{name}{number}@example.org")

    loader = BulkLoader(
        users.BulkCreateUsers, BulkCreateUsersRequest, BulkOptions(load_id=LOAD_ID), batch_rows=20
    )
    async with aclosing(loader.run(rows())) as events:
        received = [event async for event in events]
    summary = received[-1]
    assert isinstance(summary, BulkSummary)
    return summary


async def emails(users: UserServiceAsyncStub) -> list[str]:
    """Return the names of all users, in the order of their ids."""
    stored = (await users.ListUsers(ListUsersRequest(page_size=1000))).users
    return [user.email.removesuffix("@example.org") for user in stored]


async def test_two_callers_load_under_one_name_at_once(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """Both loads complete, each with its own rows and counts."""
    loader, importer = await asyncio.gather(
        loaded(users[LOADER], "a", 200), loaded(users[IMPORTER], "b", 300)
    )

    assert loader == BulkSummary(next_offset=200, created=200, state=BulkLoad.FINISHED)
    assert importer == BulkSummary(next_offset=300, created=300, state=BulkLoad.FINISHED)
    expected = [*(f"a{number}" for number in range(200)), *(f"b{number}" for number in range(300))]
    assert sorted(await emails(users[ADMIN])) == sorted(expected)
    found = [await get(loads[caller], "") for caller in (LOADER, IMPORTER)]
    assert [(load.caller, load.load_id, load.created) for load in found] == [
        (LOADER, LOAD_ID, 200),
        (IMPORTER, LOAD_ID, 300),
    ]


async def test_callers_do_not_fence_off_each_other(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """A second stream or an abort ends only the caller's own stream."""
    stream, other = await LoadStream.open(users[LOADER]), await LoadStream.open(users[IMPORTER])
    first = await stream.acknowledged("a", "no one")
    newer = await LoadStream.open(users[IMPORTER], on_conflict="FAIL")
    await abort(loads[IMPORTER], "")

    replayed = await stream.acknowledged("x", "y", offset=0)
    assert (replayed.replayed, replayed.ids) == (True, first.ids)
    assert (await stream.acknowledged("b")).created == 1
    for fenced in (other, newer):
        assert (await fenced.refused("c")).reason == "LOAD_FENCED"
    assert (await refused_to_open(users[IMPORTER])).reason == "LOAD_ABORTED"
    assert (await stream.finished()).created == 2
    assert await emails(users[ADMIN]) == ["a", "b"]


async def test_admin_resumes_load_of_another_caller(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """The load stays that caller's, with one watermark and one fence for both."""
    stream = await LoadStream.open(users[LOADER])
    first = await stream.acknowledged("a", "no one")

    admin = await LoadStream.open(users[ADMIN], caller=LOADER)
    both = await admin.acknowledged("x", "y", "b", offset=0)
    fenced = await stream.refused("c")
    again = await LoadStream.open(users[LOADER])
    fenced_admin = await admin.refused("c")

    assert admin.opened.next_offset == 2
    assert (both.ids[:2], both.failures, both.created) == (first.ids, first.failures, 2)
    assert fenced.reason == fenced_admin.reason == "LOAD_FENCED"
    assert again.opened.next_offset == 3
    assert (await again.finished()).created == 2
    (load,) = (await list_loads(loads[ADMIN], "")).loads
    assert (load.caller, load.options) == (LOADER, BulkOptions(load_id=LOAD_ID, return_ids=True))
    assert await emails(users[ADMIN]) == ["a", "b"]


async def test_admin_resumes_load_from_before_authentication(
    roster: Secured, users: dict[str, UserServiceAsyncStub]
) -> None:
    """It belongs to `anonymous`; a caller with an identity begins another load."""
    options = BulkOptions(load_id=LOAD_ID).SerializeToString()
    async with roster.server.database.begin() as session:
        method = "roster.v1.UserService.BulkCreateUsers"
        await LoadRepository(session, "anonymous").open(LOAD_ID, method, options)

    admin = await LoadStream.open(users[ADMIN], caller="anonymous")
    other = await LoadStream.open(users[LOADER])

    assert (admin.opened.caller, other.opened.caller) == ("anonymous", LOADER)
    assert (await admin.acknowledged("a")).created == 1


async def test_rows_of_an_admin_count_as_the_admins(
    users: dict[str, UserServiceAsyncStub],
    loads: dict[str, BulkServiceAsyncStub],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The audit log names the caller who wrote them, and the owner of the load."""
    caplog.set_level(logging.INFO, "roster.audit")
    await (await LoadStream.open(users[LOADER])).acknowledged("a", "b")
    admin = await LoadStream.open(users[ADMIN], caller=LOADER)
    await admin.acknowledged("a", "b", offset=0)
    await admin.acknowledged("c")
    await admin.finished()
    assert await admin.call.read() is grpc.aio.EOF
    await abort(loads[ADMIN], "")

    assert admin.opened.caller == LOADER
    lines = [vars(record)["fields"] for record in caplog.records if record.name == "roster.audit"]
    written, aborted = [line for line in lines if line["caller"] == ADMIN]
    assert (written["target"], written["owner"], written["counts"]["created"]) == (LOAD_ID, LOADER, 1)
    assert (aborted["target"], aborted["owner"], aborted["outcome"]) == (LOAD_ID, LOADER, "OK")


async def test_admin_has_loads_of_its_own(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """Without `caller`, or with its own name, an admin never gets into another caller's load."""
    stream = await LoadStream.open(users[LOADER])
    await stream.acknowledged("a")

    first = await LoadStream.open(users[ADMIN])
    await first.acknowledged("b", "c")
    again = await LoadStream.open(users[ADMIN], caller=ADMIN)

    assert (first.opened.next_offset, again.opened.next_offset) == (0, 2)
    assert (await stream.acknowledged("d")).created == 1
    found = [await get(loads[ADMIN], caller) for caller in ("", ADMIN, LOADER)]
    assert [(load.caller, load.next_offset) for load in found] == [(ADMIN, 2), (ADMIN, 2), (LOADER, 2)]


async def test_admin_never_begins_a_load_for_another_caller(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """A caller who has no such load is NOT_FOUND; with `validate_only`, nothing is looked up."""
    refused = await refused_to_open(users[ADMIN], caller=LOADER)
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "LOAD_NOT_FOUND")
    await LoadStream.open(users[ADMIN], caller=LOADER, validate_only=True)
    assert not (await list_loads(loads[ADMIN], "")).loads

    assert (await LoadStream.open(users[ADMIN], caller=ADMIN)).opened.next_offset == 0


async def test_caller_is_not_compared_with_first_options(users: dict[str, UserServiceAsyncStub]) -> None:
    """The other options are, for an admin too."""
    await LoadStream.open(users[LOADER])
    await LoadStream.open(users[ADMIN], caller=ADMIN)

    assert (await LoadStream.open(users[ADMIN])).opened.load_id == LOAD_ID
    assert (await LoadStream.open(users[ADMIN], caller=LOADER)).opened.load_id == LOAD_ID
    refused = await refused_to_open(users[ADMIN], caller=LOADER, on_conflict="SKIP")
    assert refused.reason == "OPTIONS_CHANGED"


async def test_only_admins_name_a_caller(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """Others can't name themselves, and don't learn who has loads."""
    stream = await LoadStream.open(users[LOADER])

    for caller in (LOADER, IMPORTER, ADMIN):
        for options in ({}, {"validate_only": True}, {"load_id": ""}):
            refused = await refused_to_open(users[LOADER], caller=caller, **options)
            assert refused.code == grpc.StatusCode.PERMISSION_DENIED
        for call in (get, list_failures, abort, list_loads):
            refused = await refusal(call(loads[LOADER], caller))
            assert refused.code == grpc.StatusCode.PERMISSION_DENIED
    assert (await stream.acknowledged("a")).created == 1


@pytest.mark.parametrize("call", [get, list_failures, abort])
async def test_admin_without_own_load_gets_the_only_one(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub], call: Call
) -> None:
    """If several callers have one, the error lists them; if the admin has one, it comes first."""
    for caller, names in ((LOADER, ["no one"]), (IMPORTER, ["a", "no one"])):
        await (await LoadStream.open(users[caller])).acknowledged(*names)
        if caller == LOADER:
            only = [await call(loads[ADMIN], named) for named in ("", LOADER)]

    refused = await refusal(call(loads[ADMIN], ""))
    named = [await call(loads[ADMIN], caller) for caller in (LOADER, IMPORTER)]
    missing = await refusal(call(loads[ADMIN], ADMIN))
    await (await LoadStream.open(users[ADMIN])).acknowledged("b")
    own = await call(loads[ADMIN], "")

    assert only[0] == only[1] == named[0] != named[1]
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refused.fields == ["caller"]
    assert refused.message.endswith(f": {IMPORTER}, {LOADER}")
    assert missing.reason == "LOAD_NOT_FOUND"
    assert own not in named


async def test_abort_by_an_admin_ends_one_load(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """The other caller's load of this name goes on."""
    streams = {caller: await LoadStream.open(users[caller]) for caller in (LOADER, IMPORTER)}

    aborted = await abort(loads[ADMIN], IMPORTER)

    assert (aborted.caller, aborted.state) == (IMPORTER, BulkLoad.ABORTED)
    assert (await streams[IMPORTER].refused("a")).reason == "LOAD_FENCED"
    assert (await streams[LOADER].acknowledged("a")).created == 1


async def test_admin_lists_loads_of_all_or_of_one(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """Others list their own."""
    for caller in (LOADER, IMPORTER, ADMIN):
        await LoadStream.open(users[caller])

    async def owners(reader: str, caller: str) -> list[str]:
        return [load.caller for load in (await list_loads(loads[reader], caller)).loads]

    assert await owners(ADMIN, "") == [ADMIN, IMPORTER, LOADER]
    assert await owners(ADMIN, LOADER) == [LOADER]
    assert await owners(ADMIN, "jwt:stranger") == []
    assert await owners(LOADER, "") == [LOADER]


async def test_page_token_is_bound_to_caller(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """In a listing for another caller, or for all, it gets no page."""
    for caller in (LOADER, IMPORTER):
        for load_id in (LOAD_ID, "other"):
            await (await LoadStream.open(users[caller], load_id)).acknowledged("no one", "no one")
    admin, token = loads[ADMIN], {}
    for caller in (LOADER, ""):
        page = await admin.ListBulkLoads(ListBulkLoadsRequest(page_size=1, caller=caller))
        token[caller] = page.next_page_token
    failures: dict[str, Any] = {"load_id": LOAD_ID, "page_size": 1}
    request = ListBulkLoadFailuresRequest(**failures, caller=LOADER)
    of_failures = (await admin.ListBulkLoadFailures(request)).next_page_token

    for call in (
        admin.ListBulkLoads(ListBulkLoadsRequest(page_token=token[LOADER])),
        admin.ListBulkLoads(ListBulkLoadsRequest(page_token=token[LOADER], caller=IMPORTER)),
        admin.ListBulkLoads(ListBulkLoadsRequest(page_token=token[""], caller=LOADER)),
        admin.ListBulkLoadFailures(
            ListBulkLoadFailuresRequest(**failures, caller=IMPORTER, page_token=of_failures)
        ),
        loads[LOADER].ListBulkLoadFailures(ListBulkLoadFailuresRequest(**failures, page_token=of_failures)),
    ):
        assert (await refusal(call)).reason == "INVALID_PAGE_TOKEN"
    request.page_token = of_failures
    assert [row.offset for row in (await admin.ListBulkLoadFailures(request)).failures] == [1]
    second = ListBulkLoadsRequest(page_token=token[LOADER], caller=LOADER)
    assert [load.caller for load in (await admin.ListBulkLoads(second)).loads] == [LOADER]


async def test_page_token_stays_with_the_load_that_was_found(
    users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """An admin who begins a load of the same name between two pages gets no rows of that one."""
    await (await LoadStream.open(users[LOADER])).acknowledged("no one", "no one")
    request = ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=1)
    request.page_token = (await loads[ADMIN].ListBulkLoadFailures(request)).next_page_token
    await (await LoadStream.open(users[ADMIN])).acknowledged("no one", "no one")

    refused = await refusal(loads[ADMIN].ListBulkLoadFailures(request))
    assert refused.reason == "INVALID_PAGE_TOKEN"
    request.caller = LOADER
    assert [row.offset for row in (await loads[ADMIN].ListBulkLoadFailures(request)).failures] == [1]


async def test_second_caller_is_refused_before_contracting_migration(
    database_url: str, users: dict[str, UserServiceAsyncStub], loads: dict[str, BulkServiceAsyncStub]
) -> None:
    """The error says what to do, to an admin too; an admin can still resume the load by its caller."""
    await asyncio.to_thread(migrations.downgrade, database_url, "0010")
    stream = await LoadStream.open(users[LOADER])
    await stream.acknowledged("a")

    for caller in (IMPORTER, ADMIN):
        refused = await refused_to_open(users[caller])
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "LOAD_NOT_FOUND")
        assert refused.message == (
            "another caller has a load of this name; use another load_id, or ask the operator to run "
            "`roster migrate --contract`, after which each caller has names of its own"
        )
    assert (await stream.acknowledged("b")).created == 1
    admin = await LoadStream.open(users[ADMIN], caller=LOADER)
    assert (await admin.acknowledged("c", offset=2)).created == 1
    assert (await get(loads[ADMIN], "")).caller == LOADER
