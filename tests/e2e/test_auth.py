"""Authentication and authorisation: tokens, roles, fields that need a role, and the owners of loads."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from roster.v1.bulk_pb2 import AbortBulkLoadRequest, BulkOptions, GetBulkLoadRequest, ListBulkLoadsRequest
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    CreateUserRequest,
    GetUserRequest,
    UpdateUserRequest,
    UserKey,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.e2e.secured import Secured, secured
from tests.support.errors import Refusal, refusal
from tests.support.issuer import Issuer
from tests.support.rival import until
from tests.support.wire import RPCS

UNKNOWN = "a valid token or client certificate is required"
DENIED = "the caller has no role that allows this"
HASH = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNoIGF0IGFsbA"
CREATE = {"user": {"email": "ada@example.org"}}

Call = Callable[[Secured, str | None, str, dict[str, Any]], Awaitable[Refusal]]


@pytest.fixture
async def roster(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Secured]:
    """A server that authenticates callers by their tokens."""
    async with secured(sqlite_url, tmp_path, tokens=True) as server:
        yield server


async def from_python(server: Secured, token: str | None, rpc: str, message: dict[str, Any]) -> Refusal:
    """Call an RPC with our client, as a stream of responses.

    With a stream of requests grpc.aio's client can report INTERNAL in place of the status (grpc#36066).
    """
    method = RPCS[rpc]
    path = f"/{method.containing_service.full_name}/{rpc}"
    request = ParseDict(message, GetMessageClass(method.input_type)())
    async with server.channel(token) as channel:
        call: Any = channel.unary_stream(path)
        return await refusal(_drained(call(request.SerializeToString(), timeout=20)))


async def from_grpcurl(server: Secured, token: str | None, rpc: str, message: dict[str, Any]) -> Refusal:
    """Call an RPC with grpcurl."""
    return await refusal(server.grpcurl(token).call(rpc, message))


async def _drained(call: Any) -> list[Any]:
    return [answer async for answer in call]


WRONG: dict[str, Callable[[Issuer], str | None]] = {
    "no token": lambda _: None,
    "no token at all": lambda _: "nonsense",
    "expired": lambda issuer: issuer.token("writer", exp=datetime.now(UTC) - timedelta(minutes=2)),
    "not valid yet": lambda issuer: issuer.token("writer", nbf=datetime.now(UTC) + timedelta(hours=1)),
    "alg none": lambda issuer: issuer.unsigned("writer"),
    "RS256 to HS256": lambda issuer: issuer.hs256_token("writer"),
    "another audience": lambda issuer: issuer.token("writer", aud="billing"),
    "another issuer": lambda issuer: issuer.token("writer", iss="https://evil.example.org"),
    "without end": lambda issuer: issuer.token("writer", exp=None),
    "without audience": lambda issuer: issuer.token("writer", aud=None),
    "without issuer": lambda issuer: issuer.token("writer", iss=None),
    "without subject": lambda issuer: issuer.token("writer", sub=None),
    "what nobody knows is critical": lambda issuer: issuer.token("writer", {"crit": ["a\nb"], "a\nb": 1}),
    "somebody else's key": lambda _: Issuer().token("writer"),
    "an identity that breaks a line of the log": lambda issuer: issuer.token("writer\nadmin"),
    "an identity that is too long": lambda issuer: issuer.token("w" * 256),
}


@pytest.mark.parametrize("call", [from_python, from_grpcurl])
@pytest.mark.parametrize("wrong", WRONG)
async def test_unknown_caller_is_refused(
    wrong: str, call: Call, roster: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    """All causes have the same message; the log has the cause."""
    token = WRONG[wrong](roster.issuer)
    caplog.set_level(logging.WARNING, "service.interceptors.auth")
    refused = await call(roster, token, "CreateUser", CREATE)

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert refused.message == UNKNOWN
    assert await roster.stored() == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("/roster.v1.UserService/CreateUser was refused for ")
    assert "\n" not in line
    assert not token or token not in line


@pytest.mark.parametrize("call", [from_python, from_grpcurl])
@pytest.mark.parametrize(
    ("subject", "rpc", "message"),
    [
        ("reader", "CreateUser", CREATE),
        ("reader", "DeleteUser", {"id": 1}),
        ("writer", "VerifyPassword", {"email": "ada@example.org", "password": "secret"}),
        ("writer", "BulkCreateUsers", {"users": [{"email": "ada@example.org"}], "finish": True}),
        ("loader", "CreateUser", CREATE),
        ("loader", "BulkDeleteUsers", {"users": [{"id": 1}], "finish": True}),
        ("deleter", "BulkCreateUsers", {"users": [{"email": "ada@example.org"}], "finish": True}),
        ("verifier", "GetUser", {"id": 1}),
        ("reader", "ListBulkLoads", {}),
        ("dismissed", "GetUser", {"id": 1}),
        ("nobody", "GetUser", {"id": 1}),
        ("writer", "CreateUser", {"user": {"email": "ada@example.org", "hashed_password": HASH}}),
        ("loader", "BulkCreateUsers", {"options": {"load_id": "a", "restore": True}, "users": [{"id": 7}]}),
        ("support", "BulkCreateUsers", {"users": [{"email": "ada@example.org", "hashed_password": HASH}]}),
    ],
)
async def test_caller_without_the_role_is_refused(
    call: Call, subject: str, rpc: str, message: dict[str, Any], roster: Secured
) -> None:
    """All causes have the same message, and no row is looked up."""
    refused = await call(roster, roster.issuer.token(subject), rpc, message)

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert refused.message == DENIED
    assert await roster.stored() == 0


async def test_caller_with_the_role_is_served(roster: Secured) -> None:
    """Also by grpcurl, which reads the contract by reflection with the same token."""
    grpcurl = roster.grpcurl(roster.issuer.token("writer"), reflects=True)

    (created,) = await grpcurl.call("CreateUser", CREATE)
    assert await grpcurl.call("GetUser", {"id": created.id}) == [created]


async def test_only_a_writer_and_loader_may_set_a_hash(roster: Secured) -> None:
    """Other callers are refused, whatever else they update with it."""
    async with roster.channel(roster.issuer.token("admin")) as channel:
        admin = UserServiceStub(channel)
        user = User(email="ada@example.org", hashed_password=HASH)
        created = await admin.CreateUser(CreateUserRequest(user=user))
    async with roster.channel(roster.issuer.token("writer")) as channel:
        writer = UserServiceStub(channel)
        change = UpdateUserRequest(user=User(id=created.id, full_name="Ada", hashed_password=HASH))
        refused = await refusal(writer.UpdateUser(change))
        unchanged = await writer.GetUser(GetUserRequest(id=created.id))

    assert (refused.code, refused.message) == (grpc.StatusCode.PERMISSION_DENIED, DENIED)
    assert unchanged == created


async def test_only_a_verifier_may_verify_passwords(roster: Secured) -> None:
    """A verifier may do nothing else."""
    async with roster.channel(roster.issuer.token("verifier")) as channel:
        request = VerifyPasswordRequest(email="ada@example.org", password="secret")
        answer = await UserServiceStub(channel).VerifyPassword(request)

    assert answer.valid is False


async def test_deleter_deletes_in_bulk_and_sees_the_load(roster: Secured) -> None:
    """Its loads are its own, as those of a loader are."""
    async with roster.channel(roster.issuer.token("deleter")) as channel:
        message = BulkDeleteUsersRequest(
            options=BulkOptions(load_id="leavers"), users=[UserKey(id=7)], finish=True
        )
        events = [event async for event in UserServiceStub(channel).BulkDeleteUsers(iter([message]))]
        listed = await BulkServiceStub(channel).ListBulkLoads(ListBulkLoadsRequest())

    assert events[-1].summary.failed == 1
    assert [(each.caller, each.load_id) for each in listed.loads] == [("jwt:deleter", "leavers")]


async def load(server: Secured, subject: str, load_id: str) -> list[Any]:
    """Complete an empty load, and return its id."""
    async with server.channel(server.issuer.token(subject)) as channel:
        message = BulkCreateUsersRequest(options=BulkOptions(load_id=load_id), finish=True)
        return [event async for event in UserServiceStub(channel).BulkCreateUsers(iter([message]))]


async def test_load_is_visible_to_its_caller_and_admins(roster: Secured) -> None:
    """Other callers can't find it, and begin a load of their own under its name."""
    await load(roster, "loader", "theirs")
    await load(roster, "admin", "mine")
    async with roster.channel(roster.issuer.token("loader")) as channel:
        loads = BulkServiceStub(channel)
        for answer in (
            loads.GetBulkLoad(GetBulkLoadRequest(load_id="mine")),
            loads.AbortBulkLoad(AbortBulkLoadRequest(load_id="mine")),
        ):
            assert (await refusal(answer)).reason == "LOAD_NOT_FOUND"
        await load(roster, "loader", "mine")
        listed = await loads.ListBulkLoads(ListBulkLoadsRequest())
        assert [(each.caller, each.load_id) for each in listed.loads] == [
            ("jwt:loader", "mine"),
            ("jwt:loader", "theirs"),
        ]
    async with roster.channel(roster.issuer.token("admin")) as channel:
        listed = await BulkServiceStub(channel).ListBulkLoads(ListBulkLoadsRequest())
        assert [(each.caller, each.load_id) for each in listed.loads] == [
            ("jwt:loader", "mine"),
            ("jwt:admin", "mine"),
            ("jwt:loader", "theirs"),
        ]


async def test_callers_have_separate_request_ids(roster: Secured) -> None:
    """Otherwise a caller could read the response to another."""
    request_id = "0b0e9c5e-8f3e-4ac1-9a0e-6d9f1f6f3a11"
    created = []
    for subject in ("writer", "admin", "writer"):
        async with roster.channel(roster.issuer.token(subject)) as channel:
            user = User(email=f"{subject}@example.org")
            request = CreateUserRequest(user=user, request_id=request_id)
            created.append(await UserServiceStub(channel).CreateUser(request))

    assert [user.email for user in created] == [
        "writer@example.org",
        "admin@example.org",
        "writer@example.org",
    ]
    assert created[0] == created[2]


@pytest.mark.parametrize(
    "path",
    [
        "//roster.v1.UserService/GetUser",
        "/roster.v1.UserService/GetUser/",
        "/roster.v1.UserService//GetUser",
        "/roster.v1.UserService/getuser",
        "/roster.v1.UserService/GetUser?x",
        "roster.v1.UserService/GetUser",
        "/roster.v1.UserService/Missing",
        "/roster.v1.Missing/GetUser",
    ],
)
@pytest.mark.parametrize("subject", ["admin", "nobody", None])
async def test_unknown_method_is_refused_alike_for_all_callers(
    path: str, subject: str | None, roster: Secured
) -> None:
    """The response depends neither on the caller nor on the path."""
    request = GetUserRequest(id=1).SerializeToString()
    async with roster.channel(subject and roster.issuer.token(subject)) as channel:
        call: Any = channel.unary_unary(path)
        refused = await refusal(call(request))

    assert (refused.code, refused.message) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def test_log_names_a_refused_caller(roster: Secured, caplog: pytest.LogCaptureFixture) -> None:
    """A caller without the role is still identified."""
    caplog.set_level(logging.INFO, "service.calls")
    async with roster.channel(roster.issuer.token("stranger")) as channel:
        await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))

    async def logged() -> list[Any]:
        return [vars(line)["fields"] for line in caplog.records if line.name == "service.calls"]

    (fields,) = await until(logged)
    assert (fields["caller"], fields["code"]) == ("jwt:stranger", "PERMISSION_DENIED")


async def test_health_needs_no_authentication(roster: Secured) -> None:
    """Probes have no credentials."""
    async with roster.channel() as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest())

    assert answer.status == HealthCheckResponse.SERVING


async def test_two_tokens_are_refused(roster: Secured) -> None:
    """A proxy could have checked the other one."""
    token = roster.issuer.token("reader")
    both = tuple(("authorization", f"Bearer {word}") for word in (token, token))
    async with roster.channel() as channel:
        refused = await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1), metadata=both))

    assert (refused.code, refused.message) == (grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)


async def test_message_of_an_unauthenticated_caller_is_not_parsed(roster: Secured) -> None:
    """Parsing can take 70 times its bytes. An authorised caller learns what is wrong with it."""
    for token, code in (
        (None, grpc.StatusCode.UNAUTHENTICATED),
        (roster.issuer.token("reader"), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        async with roster.channel(token) as channel:
            call: Any = channel.unary_unary("/roster.v1.UserService/GetUser")
            assert (await refusal(call(b"\xff"))).code == code


@pytest.mark.parametrize("is_on", [True, False])
async def test_reflection_needs_a_role(is_on: bool, sqlite_url: str, tmp_path: Path) -> None:
    """It is refused to others, and where it is off."""
    async with secured(sqlite_url, tmp_path, tokens=True, reflection=is_on) as server:
        shown, hidden = [
            await server.grpcurl(server.issuer.token(subject), reflects=True).ask(server.address, "list")
            for subject in ("reader", "nobody")
        ]

    assert ("roster.v1.UserService" in shown.out.splitlines()) is is_on
    assert hidden.status
    assert "roster" not in hidden.out


async def test_keys_and_policy_are_reloaded_when_they_change(roster: Secured) -> None:
    """New keys apply from the next call on, and old ones no longer."""
    token, renewed = roster.issuer.token("support"), Issuer()
    async with roster.channel(token) as channel:
        await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))
        policy = roster.folder / "policy.toml"
        policy.write_text(policy.read_text().replace("UserService/GetUser", "UserService/ListUsers"))
        denied = await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))
        renewed.write(roster.folder)
        unknown = await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))
    async with roster.channel(renewed.token("reader")) as channel:
        served = await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))

    assert [denied.code, unknown.code, served.reason] == [
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        "USER_NOT_FOUND",
    ]
