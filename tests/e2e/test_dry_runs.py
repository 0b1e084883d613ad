"""Writes with `validate_only`: the answer of the call, and nothing written."""

import asyncio
from typing import Any
from uuid import uuid4

import grpc
import orjson
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from sqlalchemy import text

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.db.base import Base
from service.logs import Json
from service.server import Server
from service.users.passwords import Passwords
from tests.support.errors import refusal
from tests.support.rival import rival
from tests.support.rows import add_posts, add_users
from tests.support.wire import RPCS

# A call, and the reason for which it is refused. There are the users 1 to 9, each with a post; no two
# calls that succeed have a row in common.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("CreateUser", {"user": {"email": "ada@example.org", "full_name": "Ada", "password": "secret"}}, ""),
    ("CreateUser", {"user": {"email": "user0@example.org"}}, "EMAIL_TAKEN"),
    ("CreateUser", {"user": {"email": "alan@example.org"}, "on_conflict": "SKIP"}, ""),
    ("CreateUser", {"user": {"email": "user0@example.org"}, "on_conflict": "SKIP"}, ""),
    (
        "CreateUser",
        {
            "user": {"email": "user1@example.org", "full_name": "Ada"},
            "on_conflict": "UPDATE",
            "update_mask": "fullName",
        },
        "",
    ),
    ("UpdateUser", {"user": {"id": 3, "full_name": "Ada", "password": "secret", "version": 1}}, ""),
    ("UpdateUser", {"user": {"id": 1, "email": "user1@example.org"}}, "EMAIL_TAKEN"),
    ("UpdateUser", {"user": {"id": 1, "full_name": "Ada", "version": 7}}, "VERSION_MISMATCH"),
    ("UpdateUser", {"user": {"id": 99, "full_name": "Ada"}}, "USER_NOT_FOUND"),
    ("DeleteUser", {"id": 4, "version": 1}, ""),
    ("DeleteUser", {"id": 1, "version": 7}, "VERSION_MISMATCH"),
    ("DeleteUser", {"id": 99}, "USER_NOT_FOUND"),
    ("CreatePost", {"post": {"author_id": 1, "title": "Notes", "content": "…"}}, ""),
    ("CreatePost", {"post": {"author_id": 99, "title": "Notes"}}, "AUTHOR_NOT_FOUND"),
    ("UpdatePost", {"post": {"id": 2, "title": "Notes", "version": 1}}, ""),
    ("UpdatePost", {"post": {"id": 1, "title": "Notes", "version": 7}}, "VERSION_MISMATCH"),
    ("UpdatePost", {"post": {"id": 99, "title": "Notes"}}, "POST_NOT_FOUND"),
    ("DeletePost", {"id": 3, "version": 1}, ""),
    ("DeletePost", {"id": 1, "version": 7}, "VERSION_MISMATCH"),
    ("DeletePost", {"id": 99}, "POST_NOT_FOUND"),
]
NEW = {"id", "createdAt", "updatedAt"}


@pytest.fixture
async def api(server: Server, users: UserServiceAsyncStub, posts: PostServiceAsyncStub) -> dict[str, Any]:
    """The RPCs of a server with nine users, each with a post."""
    await add_posts(server.database, await add_users(server.database, 9))
    return vars(users) | vars(posts)


async def stored(server: Server) -> dict[str, Any]:
    """Return all rows of all tables."""
    async with server.database.read() as session:
        return {
            name: sorted(map(repr, await session.execute(text(f"SELECT * FROM {name}"))))
            for name in Base.metadata.tables
            if name not in {"roster_servers", "page_token_keys"}
        }


async def outcome(api: dict[str, Any], rpc: str, message: dict[str, Any], **more: Any) -> Any:
    """Return the status of a call, or its answer and its header."""
    request = ParseDict({**message, **more}, GetMessageClass(RPCS[rpc].input_type)())
    call = api[rpc](request)
    try:
        answer = MessageToDict(await call)
        if answer.get("version", "1") != "1":  # the time of another transaction
            del answer["updatedAt"]
    except grpc.aio.AioRpcError:
        refused = await refusal(call)
        return refused.reason, refused.message, refused.facts, refused.fields
    return answer, dict(await call.initial_metadata()).get("roster-outcome")


def test_every_write_with_a_dry_run_has_a_case() -> None:
    """One that succeeds, and one that is refused."""
    rpcs = {rpc for rpc, method in RPCS.items() if "validate_only" in method.input_type.fields_by_name}
    for is_refused in (False, True):
        assert {rpc for rpc, _, reason in CASES if bool(reason) == is_refused} == rpcs


async def test_dry_run_answers_like_the_call_and_writes_nothing(api: dict[str, Any], server: Server) -> None:
    """Neither rows, nor changes, nor the answer to its request_id."""
    before = await stored(server)
    dry_runs = []
    for rpc, message, reason in CASES:
        dry_runs.append(await outcome(api, rpc, message, validate_only=True, request_id=str(uuid4())))
        assert await stored(server) == before, (rpc, message)
        assert not reason or dry_runs[-1][0] == reason

    for (rpc, message, reason), dry in zip(CASES, dry_runs, strict=True):
        real = await outcome(api, rpc, message)
        assert dry == (real if reason else without_new_values(rpc, *real)), (rpc, message)


def without_new_values(rpc: str, answer: dict[str, Any], header: str | None) -> tuple[dict[str, Any], Any]:
    """Return the answer of a call as that of its dry run: a new row has no id and no times."""
    is_new = rpc.startswith("Create") and header in {"created", None}
    return {name: value for name, value in answer.items() if not (is_new and name in NEW)}, header


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("rpc", ["UpdateUser", "DeleteUser", "UpdatePost", "DeletePost"])
async def test_dry_run_waits_for_other_writes_of_the_row(
    rpc: str, api: dict[str, Any], database_url: str
) -> None:
    """Otherwise it would succeed where the call is refused."""
    row = {"id": 3, "version": 1}
    changed = {
        "UpdateUser": {"user": {**row, "full_name": "Ada"}},
        "UpdatePost": {"post": {**row, "title": "Notes"}},
    }
    async with rival(database_url) as other:
        for table in ("users", "posts"):
            await other.execute(f"UPDATE {table} SET version = 2")
        call = asyncio.create_task(outcome(api, rpc, changed.get(rpc, row), validate_only=True))
        await other.wait_for_blocked()
        await other.commit()
    assert (await call)[0] == "VERSION_MISMATCH"


async def test_dry_run_ignores_what_is_stored_for_its_request_id(
    api: dict[str, Any], users: UserServiceAsyncStub
) -> None:
    """It is neither replayed nor compared with another body, and the id remains free for the call."""
    request = CreateUserRequest(user=User(email="ada@example.org"), request_id=str(uuid4()))
    request.validate_only = True
    await users.CreateUser(request)
    request.validate_only = False
    ada = await users.CreateUser(request)

    request.validate_only = True
    assert (await refusal(users.CreateUser(request))).reason == "EMAIL_TAKEN"
    request.user.email = "bob@example.org"
    assert (await users.CreateUser(request)).id == 0
    request.user.email = "ada@example.org"
    request.validate_only = False
    assert await users.CreateUser(request) == ada


async def test_dry_run_computes_no_hash(users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it would be stored."""

    async def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Passwords, "hash", refuse)
    request = CreateUserRequest(user=User(email="ada@example.org", password="secret"), validate_only=True)
    assert (await users.CreateUser(request)).email == "ada@example.org"


async def test_audit_log_says_that_it_was_a_dry_run(
    api: dict[str, Any], users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever became of it; a bulk stream too."""
    for rpc, message, _ in CASES:
        await outcome(api, rpc, message, validate_only=True)
    options = BulkOptions(validate_only=True)
    bulk = BulkCreateUsersRequest(options=options, users=[User(email="ada@example.org")], finish=True)
    async for _ in users.BulkCreateUsers(iter([bulk])):
        pass
    await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))

    lines = [orjson.loads(Json().format(line)) for line in caplog.records if line.name == "roster.audit"]
    assert [line["dry_run"] for line in lines] == [True] * (len(CASES) + 1) + [False]
    assert [line["target"] for line in lines if line["method"].endswith("CreatePost")] == ["", ""]
