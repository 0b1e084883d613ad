"""CreateUser with `on_conflict`: one call makes sure that a user exists."""

import asyncio
from typing import Any
from uuid import uuid4

import grpc
import orjson
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import delete, func, insert, select, text

from roster.client import channel
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    DeleteUserRequest,
    GetUserRequest,
    UpdateUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.answers import Request
from service.db.base import Values
from service.logs import Json
from service.server import Server
from service.users import repository, servicer
from service.users.model import User as UserModel
from service.users.repository import UserRepository
from tests.e2e.clients import Grpcurl
from tests.support.errors import refusal
from tests.support.rival import find_blocked_by, until
from tests.support.rows import add_users
from tests.support.users import list_users

FAIL, SKIP, UPDATE = BulkOptions.FAIL, BulkOptions.SKIP, BulkOptions.UPDATE
EMAIL = "ada@example.org"
CALLS = 20  # at once


def skip(**fields: Any) -> CreateUserRequest:
    return CreateUserRequest(user=User(**{"email": EMAIL, **fields}), on_conflict=SKIP)


def update(*paths: str, **fields: Any) -> CreateUserRequest:
    user = User(**{"email": EMAIL, **fields})
    return CreateUserRequest(user=user, on_conflict=UPDATE, update_mask=FieldMask(paths=paths))


async def create(users: UserServiceAsyncStub, request: CreateUserRequest) -> tuple[str, User]:
    """Return the outcome in the response header, and the user."""
    call = users.CreateUser(request)
    headers: Any = await call.initial_metadata()
    return dict(headers).get("roster-outcome", ""), await call


async def changes(server: Server) -> int:
    """Return the number of entries in the log of changes."""
    async with server.database.read() as session:
        return int(await session.scalar(text("SELECT count(*) FROM changes")) or 0)


async def test_creates_a_user_whose_email_is_free(users: UserServiceAsyncStub) -> None:
    """With all fields, whatever the mask; the header comes only with SKIP or UPDATE."""
    plain = CreateUserRequest(user=User(email="alan@example.org"))
    assert (await create(users, plain))[0] == ""
    outcome, bob = await create(users, skip(email="bob@example.org", full_name="Bob", is_active=False))
    assert (outcome, bob.full_name, bob.is_active, bob.version) == ("created", "Bob", False, 1)
    outcome, ada = await create(users, update("is_active", full_name="Ada", is_active=True))
    assert (outcome, ada.full_name, ada.version) == ("created", "Ada", 1)


async def test_skip_returns_the_user_unchanged(server: Server, users: UserServiceAsyncStub) -> None:
    """The e-mail is normalised first; nothing is logged for the change feed."""
    _, ada = await create(users, skip(full_name="Ada"))
    logged = await changes(server)

    again = skip(email=" ADA@example.org", full_name="Countess", is_active=False, password="secret")
    assert await create(users, again) == ("skipped", ada)
    assert await users.GetUser(GetUserRequest(id=ada.id)) == ada
    assert await changes(server) == logged


async def test_update_is_one_change_for_the_feed(server: Server, users: UserServiceAsyncStub) -> None:
    """As one by UpdateUser is."""
    await create(users, skip(full_name="Ada"))
    logged = await changes(server)

    await create(users, update("is_active", is_active=False))
    assert await changes(server) == logged + 1


async def test_update_writes_the_fields_of_the_mask(users: UserServiceAsyncStub) -> None:
    """And no others; an unset name becomes null."""
    _, ada = await create(users, skip(full_name="Ada"))

    outcome, updated = await create(users, update("is_active", full_name="Countess", is_active=False))
    assert (outcome, updated.id, updated.version) == ("updated", ada.id, 2)
    assert (updated.full_name, updated.is_active, updated.created_at) == ("Ada", False, ada.created_at)
    assert updated == await users.GetUser(GetUserRequest(id=ada.id))

    _, updated = await create(users, update("full_name", "full_name"))
    assert not updated.HasField("full_name")
    _, updated = await create(users, update("*", full_name="Ada", is_active=True))
    assert (updated.full_name, updated.is_active, updated.version) == ("Ada", True, 4)


async def test_update_sets_a_password(users: UserServiceAsyncStub) -> None:
    """If the mask names it; otherwise only a new user gets it."""
    _, ada = await create(users, update("full_name", full_name="Ada", password="first"))
    for request, valid in [
        (update("full_name", full_name="Ada", password="second"), "first"),
        (update("password", password="third"), "third"),
        (update("*", full_name="Ada", is_active=True, password="fourth"), "fourth"),
        (update("*", full_name="Ada", is_active=True), "fourth"),
    ]:
        assert (await create(users, request))[0] == "updated"
        verified = await users.VerifyPassword(VerifyPasswordRequest(id=ada.id, password=valid))
        assert verified.valid


@pytest.mark.parametrize("mode", [SKIP, UPDATE], ids=["SKIP", "UPDATE"])
async def test_finds_a_user_stored_in_another_spelling(
    mode: BulkOptions.OnConflict.ValueType, server: Server, users: UserServiceAsyncStub
) -> None:
    """Earlier releases stored the domain as it came."""
    [id] = await add_users(server.database)
    async with server.database.begin() as session:
        await session.execute(text("UPDATE users SET email = 'ada@xn--bcher-kva.de'"))
    email = "ada@BÜCHER.de"

    found = await create(users, skip(email=email) if mode == SKIP else update("full_name", email=email))
    assert (found[0], found[1].id) == ("skipped" if mode == SKIP else "updated", id)
    refused = await refusal(users.CreateUser(CreateUserRequest(user=User(email=email))))
    assert (refused.reason, refused.facts) == ("EMAIL_TAKEN", {"existing_id": str(id)})


@pytest.mark.parametrize("existing", [False, True])
async def test_concurrent_calls_create_one_user_and_all_succeed(
    existing: bool, users: UserServiceAsyncStub
) -> None:
    """No call fails with EMAIL_TAKEN, and no update is lost."""
    if existing:
        await create(users, skip())
    requests = [skip() for _ in range(CALLS)] + [update("is_active", is_active=False) for _ in range(CALLS)]
    answers = await asyncio.gather(*(create(users, request) for request in requests))

    outcomes = [outcome for outcome, _ in answers]
    assert outcomes.count("created") == (not existing)
    [ada] = await list_users(users)
    assert {user.id for _, user in answers} == {ada.id}
    assert ada.version == 1 + outcomes.count("updated")
    assert outcomes.count("updated") + outcomes.count("skipped") == 2 * CALLS - (not existing)
    assert outcomes[:CALLS].count("updated") == 0


async def test_calls_succeed_while_others_delete_the_user(users: UserServiceAsyncStub) -> None:
    """Whatever they find, none fails."""

    async def churn() -> None:
        for _ in range(CALLS):
            _, user = await create(users, skip())
            await users.DeleteUser(DeleteUserRequest(id=user.id))

    async def ensure() -> None:
        for _ in range(CALLS):
            await create(users, skip())
            await create(users, update("is_active", is_active=True))

    await asyncio.gather(churn(), ensure(), ensure())


@pytest.mark.parametrize("deletions", [1, repository.MAX_ATTEMPTS])
async def test_user_deleted_after_the_conflict_is_created(
    deletions: int, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that happens again and again, the call can be retried."""
    attempts = 0
    first_insert = UserRepository._insert

    async def conflict(self: Any, values: Values) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts > deletions:
            return await first_insert(self, values)
        await self.session.execute(insert(UserModel).values(email=EMAIL))
        assert await first_insert(self, values) is None
        await self.session.execute(delete(UserModel))
        return None

    monkeypatch.setattr(UserRepository, "_insert", conflict)
    if deletions < repository.MAX_ATTEMPTS:
        assert (await create(users, skip()))[0] == "created"
    else:
        refused = await refusal(users.CreateUser(skip()))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert await list_users(users) == []


async def test_repeated_call_gets_first_answer_and_outcome(users: UserServiceAsyncStub) -> None:
    """Although by then the same call would do something else."""
    for request, expected in [
        (skip(), "created"),
        (skip(), "skipped"),
        (update("is_active", is_active=False), "updated"),
        (update("is_active", email="bob@example.org", is_active=True), "created"),
    ]:
        request.request_id = str(uuid4())
        first = await create(users, request)
        assert first[0] == expected
        await users.UpdateUser(UpdateUserRequest(user=User(id=first[1].id, full_name=str(uuid4()))))
        assert await create(users, request) == first

        request.on_conflict = FAIL
        request.ClearField("update_mask")
        assert (await refusal(users.CreateUser(request))).reason == "REQUEST_ID_REUSED"


async def test_answer_of_an_earlier_release_was_created(server: Server, users: UserServiceAsyncStub) -> None:
    """Such a release stored no outcome."""
    request = skip()
    request.request_id = str(uuid4())
    first = await create(users, request)
    async with server.database.begin() as session:
        await session.execute(text("UPDATE requests SET outcome = NULL"))

    assert await create(users, request) == first


async def test_deletion_erases_the_answer_of_a_skip(server: Server, users: UserServiceAsyncStub) -> None:
    """The answer shows the user as a created one does."""
    _, ada = await create(users, skip())
    request = skip()
    request.request_id = str(uuid4())
    await create(users, request)
    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    assert (await refusal(users.CreateUser(request))).reason == "USER_NOT_FOUND"
    async with server.database.read() as session:
        assert await session.scalar(select(func.count()).where(Request.answer.is_not(None))) == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_deletion_waits_for_a_skip_that_is_being_stored(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """Otherwise the answer would be stored after those about the user were erased."""
    _, ada = await create(users, skip())
    async with server.database.begin() as session:
        found, _ = await UserRepository(session).ensure({"email": EMAIL}, None)
        assert found.id == ada.id
        deletion = users.DeleteUser(DeleteUserRequest(id=ada.id))
        await until(lambda: find_blocked_by(session))
    await deletion


async def test_audit_log_says_what_was_done(
    users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """A skip has written nothing."""
    for request in (skip(), skip(), update("is_active", is_active=False)):
        await create(users, request)

    lines = [orjson.loads(Json().format(line)) for line in caplog.records if line.name == "roster.audit"]
    assert [line["effect"] for line in lines] == ["created", "skipped", "updated"]
    assert len({line["target"] for line in lines}) == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_audit_log_says_what_a_cancelled_call_has_stored(
    users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was cancelled while it sent its header."""

    async def cancel(*_: object) -> None:
        call.cancel()
        await asyncio.Event().wait()

    monkeypatch.setattr(servicer, "send_header", cancel)
    call = users.CreateUser(skip())
    with pytest.raises(asyncio.CancelledError):
        await call

    async def line() -> Any:
        lines = [Json().format(line) for line in caplog.records if line.name == "roster.audit"]
        return lines and orjson.loads(lines[0])

    logged = await until(line)
    [ada] = await list_users(users)
    assert (logged["outcome"], logged["effect"], logged["target"]) == ("CANCELLED", "created", ada.id)


async def test_python_client_shows_the_outcome(server: Server) -> None:
    """Its interceptors pass the header on."""
    async with channel(server.address) as connection:
        users = UserServiceStub(connection)
        assert [(await create(users, skip()))[0] for _ in range(2)] == ["created", "skipped"]


async def test_grpcurl_shows_the_outcome(server: Server) -> None:
    """As a header of the response."""
    sent = '{"user": {"email": "ada@example.org"}, "on_conflict": "SKIP"}'
    grpcurl = Grpcurl(server.address)
    for expected in ("created", "skipped"):
        ended = await grpcurl.ask("-v", "-d", sent, server.address, "roster.v1.UserService/CreateUser")
        headers = ended.out.partition("Response headers received:")[2].partition("Response contents:")[0]
        assert f"roster-outcome: {expected}\n" in headers
