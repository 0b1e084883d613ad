"""The rights of each RPC and view: the response shows what the table of roles says."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import CreatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, UpdateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.e2e.secured import POLICY, Secured, secured
from tests.support.wire import RPCS

TIMEOUT_SECONDS = 20
EMAIL, NAME, TITLE, CONTENT = "secret-email@example.org", "secret-name", "secret-title", "secret-content"
LOAD, PASSWORD = "secret-load", "correct horse battery staple"
SECRETS = {EMAIL, NAME, TITLE, CONTENT, LOAD}
USER, POST = {EMAIL, NAME}, {TITLE, CONTENT}


@dataclass(frozen=True)
class Case:
    """A call with the secrets in its response, and those shown only to callers with `needs`.

    A view is refused without these rights, and so are the changes of an entity, and a create that returns a
    stored user; an update shows less.
    """

    message: dict[str, Any]
    shows: set[str] = field(default_factory=set)
    needs: str = ""  # RPCs, separated by "+"
    shows_more: set[str] = field(default_factory=set)


# The user 1 and its post 1 are there.
CASES = {
    ("GetUser", ""): Case({"id": 1}, USER),
    ("GetUser", "WITH_POSTS"): Case({"id": 1}, needs="ListPosts", shows_more=USER | {TITLE}),
    ("BatchGetUsers", ""): Case({"ids": [1]}, USER),
    ("BatchGetUsers", "WITH_POSTS"): Case({"ids": [1]}, needs="ListPosts", shows_more=USER | {TITLE}),
    ("ListUsers", ""): Case({}, USER),
    ("ListUsers", "WITH_POSTS"): Case({}, needs="ListPosts", shows_more=USER | {TITLE}),
    ("ExportUsers", ""): Case({}, USER),
    ("CreateUser", ""): Case({"user": {"email": EMAIL}}),
    ("CreateUser", "SKIP"): Case({"user": {"email": EMAIL}}, needs="GetUser", shows_more=USER),
    ("CreateUser", "UPDATE"): Case(
        {"user": {"email": EMAIL, "is_active": True}, "update_mask": "isActive"},
        needs="GetUser+UpdateUser",
        shows_more=USER,
    ),
    ("UpdateUser", ""): Case({"user": {"id": 1, "is_active": True}}, needs="GetUser", shows_more=USER),
    ("DeleteUser", ""): Case({"id": 1, "version": 99}),
    ("VerifyPassword", ""): Case({"id": 1, "password": PASSWORD}, USER),
    ("BulkCreateUsers", ""): Case({"users": [{"email": EMAIL}], "finish": True}),
    ("BulkUpdateUsers", ""): Case({"users": [{"id": 1, "is_active": True}], "finish": True}),
    ("BulkDeleteUsers", ""): Case({"users": [{"id": 1, "version": 99}], "finish": True}),
    ("CountUsers", ""): Case({"filter": f'email = "{EMAIL}"'}),
    ("GetPost", ""): Case({"id": 1}, POST),
    ("GetPost", "WITH_AUTHOR"): Case({"id": 1}, needs="GetUser", shows_more=POST | USER),
    ("BatchGetPosts", ""): Case({"ids": [1]}, POST),
    ("BatchGetPosts", "WITH_AUTHOR"): Case({"ids": [1]}, needs="GetUser", shows_more=POST | USER),
    ("ListPosts", ""): Case({}, POST),
    ("ListPosts", "WITH_AUTHOR"): Case({}, needs="GetUser", shows_more=POST | USER),
    ("ExportPosts", ""): Case({}, POST),
    ("CreatePost", ""): Case({"post": {"author_id": 1, "title": "new", "content": "new"}}),
    ("UpdatePost", ""): Case({"post": {"id": 1, "title": TITLE}}, {TITLE}, "GetPost", POST),
    ("DeletePost", ""): Case({"id": 1, "version": 99}),
    ("BulkCreatePosts", ""): Case({"posts": [{"author_email": EMAIL, "title": "new"}], "finish": True}),
    ("BulkUpdatePosts", ""): Case({"posts": [{"id": 1, "title": TITLE}], "finish": True}),
    ("BulkDeletePosts", ""): Case({"posts": [{"id": 1, "version": 99}], "finish": True}),
    ("CountPosts", ""): Case({}),
    ("GetBulkLoad", ""): Case({"load_id": LOAD}),
    ("ListBulkLoads", ""): Case({}),
    ("ListBulkLoadFailures", ""): Case({"load_id": LOAD}),
    ("ListBulkLoadRows", ""): Case({"load_id": LOAD}),
    ("AbortBulkLoad", ""): Case({"load_id": LOAD}),
    ("ListChanges", "USERS"): Case({}, needs="GetUser", shows_more=USER),
    ("ListChanges", "POSTS"): Case({}, needs="GetPost", shows_more=POST),
    ("WatchChanges", "USERS"): Case({}, needs="GetUser", shows_more=USER),
    ("WatchChanges", "POSTS"): Case({}, needs="GetPost", shows_more=POST),
}


@pytest.fixture(scope="module")
async def roster(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Secured]:
    """A server with a user, a post and a load, and a caller for each RPC, and with each further right."""
    folder = tmp_path_factory.mktemp("rights")
    async with secured(f"sqlite:///{shutil.copy(sqlite_template, folder)}", folder, tokens=True) as server:
        (folder / "policy.toml").write_text(policy())
        async with server.channel(server.issuer.token("admin")) as channel:
            user = User(email=EMAIL, full_name=NAME, password=PASSWORD)
            await UserServiceStub(channel).CreateUser(CreateUserRequest(user=user))
            post = Post(author_id=1, title=TITLE, content=CONTENT)
            await PostServiceStub(channel).CreatePost(CreatePostRequest(post=post))
            message = BulkCreateUsersRequest(options=BulkOptions(load_id=LOAD), users=[user])
            assert [event async for event in UserServiceStub(channel).BulkCreateUsers(iter([message]))]
        yield server


def policy() -> str:
    """Return a policy with a role for each RPC; a caller's name lists its roles."""
    callers = {rpc: [rpc] for rpc in RPCS}
    cases = [(rpc, case.needs) for (rpc, _), case in CASES.items() if case.needs]
    callers |= {f"{rpc}+{needs}": [rpc, *needs.split("+")] for rpc, needs in cases}
    callers["CreateUser+UpdateUser"] = ["CreateUser", "UpdateUser"]
    identities = "".join(f'"jwt:{name}" = {roles}\n' for name, roles in callers.items())
    roles = "".join(f'{rpc} = ["{path(rpc)[1:]}"]\n' for rpc in RPCS)
    return POLICY.replace("\n[roles]", f"{identities}\n[roles]\n{roles}")


def path(rpc: str) -> str:
    return f"/{RPCS[rpc].containing_service.full_name}/{rpc}"


async def secrets_in(server: Secured, subject: str, rpc: str, message: dict[str, Any]) -> set[str]:
    """Return the secrets in the response; raises AioRpcError only if the caller lacks a right."""
    request = ParseDict(message, GetMessageClass(RPCS[rpc].input_type)())
    async with server.channel(server.issuer.token(subject)) as channel:
        send: Any = channel.stream_stream(path(rpc))
        call = send(iter([request.SerializeToString()]), timeout=TIMEOUT_SECONDS)
        try:
            if rpc == "WatchChanges":
                answered = repr(await call.read())  # it has no end
            else:
                answered = repr([answer async for answer in call])
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise
            answered = repr((error.details(), error.trailing_metadata()))
    return {secret for secret in SECRETS if secret in answered}


def test_every_rpc_and_every_view_has_a_case() -> None:
    """New ones fail here until their case says what they show."""
    methods = set()
    for rpc, method in RPCS.items():
        fields = method.input_type.fields_by_name
        shown = fields.get("view") or fields.get("entities") or fields.get("on_conflict")
        if shown and shown.enum_type:
            methods |= {(rpc, value.name) for value in shown.enum_type.values if value.number}
        if "entities" not in fields:
            methods.add((rpc, ""))

    assert CASES.keys() == methods


async def message_of(server: Secured, rpc: str, view: str) -> dict[str, Any]:
    """Return the message of a case."""
    if rpc in ("ListChanges", "WatchChanges"):
        beginning = replace(await server.server.feed.now(), since="0")
        return {"token": str(beginning), "entities": [view]}
    message = CASES[rpc, view].message
    if not view:
        return message
    return {**message, "on_conflict" if rpc == "CreateUser" else "view": view}


@pytest.mark.parametrize(("rpc", "view"), CASES)
async def test_response_shows_only_what_its_caller_may_read(rpc: str, view: str, roster: Secured) -> None:
    """With the right to the RPC alone, and with the further right of a view or an update."""
    case = CASES[rpc, view]
    message = await message_of(roster, rpc, view)
    if view:
        with pytest.raises(grpc.aio.AioRpcError):
            await secrets_in(roster, rpc, rpc, message)
    else:
        assert await secrets_in(roster, rpc, rpc, message) == case.shows
    if case.needs:
        assert await secrets_in(roster, f"{rpc}+{case.needs}", rpc, message) == case.shows_more


@pytest.mark.parametrize("caller", ["CreateUser", "CreateUser+GetUser", "CreateUser+UpdateUser"])
async def test_create_that_may_update_needs_all_rights(caller: str, roster: Secured) -> None:
    """Whether or not the user exists."""
    for email in (EMAIL, "nobody@example.org"):
        message = await message_of(roster, "CreateUser", "UPDATE")
        message["user"] = {**message["user"], "email": email}
        with pytest.raises(grpc.aio.AioRpcError):
            await secrets_in(roster, caller, "CreateUser", message)


async def test_view_is_refused_before_the_lookup(roster: Secured) -> None:
    """The response does not depend on whether the user exists."""
    for id in (1, 999):
        with pytest.raises(grpc.aio.AioRpcError):
            await secrets_in(roster, "GetUser", "GetUser", {"id": id, "view": "WITH_POSTS"})


async def test_replayed_update_shows_no_more_than_before(roster: Secured) -> None:
    """The stored response is complete, but its caller may have lost a right."""
    request_id = "0b0e9c5e-8f3e-4ac1-9a0e-6d9f1f6f3a11"
    change = UpdateUserRequest(user=User(id=1, is_active=True), request_id=request_id)
    async with roster.channel(roster.issuer.token("UpdateUser")) as channel:
        users = UserServiceStub(channel)
        first, again = [await users.UpdateUser(change) for _ in range(2)]

    assert first == again
    assert {each.name for each, _ in first.ListFields()} == {"id", "is_active", "updated_at", "version"}
