"""Reads on replicas: never older than the write whose token they carry, with `any` as old as the replica."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from sqlalchemy import make_url

from roster.client import BulkLoader, Consistency, RosterError, channel
from roster.consistency import ANY, KEY, PRIMARY
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    CountUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.server import Server
from tests.support.command import ROSTER, SERVER_DEFAULTS, Roster, run
from tests.support.errors import Refusal, refusal
from tests.support.mirror import MirrorRun
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import PostgresServer
from tests.support.rows import add_users
from tests.support.server import serve
from tests.support.standby import ReplicatedDatabase, Standby
from tests.support.statements import CHORES, record_statements
from tests.support.tokens import answer, at, counted


@pytest.fixture
async def server(replicated: ReplicatedDatabase) -> AsyncIterator[Server]:
    """A server that reads on the standby."""
    async with serve(replicated.url, replica_url=replicated.replica_url) as server:
        yield server


def create(email: str, **options: Any) -> CreateUserRequest:
    return CreateUserRequest(user=User(email=email), **options)


async def test_read_with_token_is_answered_by_the_replica(
    users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    """Once the replica has replayed the write."""
    created = await answer(users.CreateUser(create("ada@example.org")))
    await replicated.standby.catch_up()
    with counted() as counts:
        found = await users.GetUser(GetUserRequest(email="ada@example.org"), **at(created.token))
    assert (found, counts) == (created.response, {"source=replica": 1})


async def test_read_with_token_waits_once_for_a_replica_that_is_behind(
    users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    """After a wait that failed, reads go to the primary at once, until the replica has caught up."""
    await replicated.standby.pause_replay()
    created = await answer(users.CreateUser(create("ada@example.org")))
    request = GetUserRequest(id=created.response.id)
    with counted() as counts:
        for _ in range(3):
            assert await users.GetUser(request, **at(created.token)) == created.response
    assert counts == {"source=primary": 3, "fallback=behind": 3, "wait=behind": 1}

    await replicated.standby.resume_replay()
    await replicated.standby.catch_up()
    with counted() as counts:
        assert await users.GetUser(request, **at(created.token)) == created.response
    assert counts == {"source=replica": 1}
    await replicated.standby.pause_replay()
    created = await answer(users.CreateUser(create("bob@example.org")))
    with counted() as counts:
        await users.GetUser(GetUserRequest(id=created.response.id), **at(created.token))
    assert counts["wait=behind"] == 1


async def test_only_any_reads_what_the_replica_has(
    users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    """Without the key, reads go to the primary. Of several values, all are met."""
    await replicated.standby.pause_replay()
    created = await users.CreateUser(create("ada@example.org"))
    for consistency, expected in (
        ("", [created]),
        (PRIMARY, [created]),
        (ANY, []),
        (f"{ANY} {PRIMARY}", [created]),
    ):
        options = at(consistency)
        for one in (
            users.GetUser(GetUserRequest(id=created.id), **options),
            users.GetUser(GetUserRequest(id=created.id, view=User.WITH_POSTS), **options),
            users.GetUser(GetUserRequest(email=created.email), **options),
        ):
            found = (await answer(one)).response
            assert [found] * (found is not None) == expected
        counted = await answer(users.CountUsers(CountUsersRequest(), **options))
        assert counted.response.count == len(expected)
        for many in (
            users.BatchGetUsers(BatchGetUsersRequest(ids=[created.id]), **options),
            users.ListUsers(ListUsersRequest(), **options),
            users.ListUsers(ListUsersRequest(filter="is_active = true"), **options),
            users.ExportUsers(ExportUsersRequest(), **options),
        ):
            response: Any = (await answer(many)).response
            pages = response if isinstance(response, list) else [response]
            assert [user for page in pages for user in page.users] == expected


async def test_password_is_always_verified_on_the_primary(
    users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    await replicated.standby.pause_replay()
    user = User(email="ada@example.org", password="correct horse")
    created = await users.CreateUser(CreateUserRequest(user=user))
    request = VerifyPasswordRequest(id=created.id, password="correct horse")
    assert (await users.VerifyPassword(request, **at(ANY))).user == created


async def test_gathered_reads_meet_each_requirement(
    users: UserServiceAsyncStub, server: Server, replicated: ReplicatedDatabase
) -> None:
    """Those of 96 concurrent lookups that need the primary see what is not replayed, the others do not."""
    [old] = await add_users(server.database, 1)
    first = await answer(users.UpdateUser(UpdateUserRequest(user=User(id=old, full_name="First"))))
    await replicated.standby.catch_up()
    await users.GetUser(GetUserRequest(id=old), **at(first.token))
    await replicated.standby.pause_replay()
    second = await answer(users.UpdateUser(UpdateUserRequest(user=User(id=old, full_name="Second"))))
    wanted = [(ANY, "First"), (first.token, "First"), ("", "Second"), (second.token, "Second")]
    calls = [users.GetUser(GetUserRequest(id=old), **at(token)) for token, _ in wanted * 24]
    assert [(await call).full_name for call in calls] == [name for _, name in wanted * 24]


UNDECODABLE = [
    "",
    "x",
    "ANY",
    "0123456789abcdef-00000001",
    "0123456789abcdef-00000001-00000000030001480",
    "0123456789ABCDEF-00000001-0000000003000148",
    f"{ANY},{PRIMARY}",
]


async def test_token_that_does_not_decode_is_refused(users: UserServiceAsyncStub) -> None:
    """With every read, also next to another one; writes, which need none, ignore it."""
    for token in UNDECODABLE:
        metadata = ((KEY, ANY), (KEY, token))
        for read in (
            users.GetUser(GetUserRequest(id=1), metadata=metadata),
            users.ListUsers(ListUsersRequest(), metadata=metadata),
        ):
            refused = await refusal(read)
            assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")
            assert KEY in refused.message
    await users.CreateUser(create("ada@example.org"), metadata=metadata)


async def test_writes_return_tokens_also_with_errors_that_report_state(
    users: UserServiceAsyncStub, server: Server
) -> None:
    """A read with the token sees the state that the error is about."""
    key = str(uuid4())
    ada = await answer(users.CreateUser(create("ada@example.org", request_id=key)))
    bulk = [BulkCreateUsersRequest(users=[User(email="eve@example.org")])]
    gap = [*bulk, BulkCreateUsersRequest(offset=9, finish=True)]
    failing = BulkCreateUsersRequest(
        users=[User(email="?")], options=BulkOptions(max_failures=1, load_id="failing")
    )
    ended = {
        "OK": ada,
        "replayed": await answer(users.CreateUser(create("ada@example.org", request_id=key))),
        "EMAIL_TAKEN": await answer(users.CreateUser(create("ada@example.org"))),
        "VERSION_MISMATCH": await answer(
            users.UpdateUser(UpdateUserRequest(user=User(id=ada.response.id, full_name="A", version=7)))
        ),
        "USER_NOT_FOUND": await answer(users.DeleteUser(DeleteUserRequest(id=99))),
        "bulk": await answer(users.BulkCreateUsers(iter(bulk))),
        "bulk, refused": await answer(users.BulkCreateUsers(iter(gap))),
        "OPTIONS_CHANGED": await answer(users.BulkCreateUsers(iter([failing]))),
    }
    assert [name for name, end in ended.items() if not end.token] == []
    assert sorted(end.token for end in ended.values()) == [end.token for end in ended.values()]
    refused = {name: Refusal(end.error).reason for name, end in ended.items() if end.error}
    assert refused.keys() >= {"EMAIL_TAKEN", "VERSION_MISMATCH", "USER_NOT_FOUND"}

    invalid = await answer(users.CreateUser(create("nobody")))
    read = await answer(users.GetUser(GetUserRequest(id=ada.response.id)))
    assert (invalid.token, read.token) == ("", "")


async def test_without_replicas_nothing_changes(replicated: ReplicatedDatabase) -> None:
    """No metadata, and one statement for each call; a token is ignored, whatever it is."""
    with record_statements() as statements:
        async with serve(replicated.url) as server, grpc.aio.insecure_channel(server.address) as connection:
            users = UserServiceStub(connection)
            created = await answer(users.CreateUser(create("ada@example.org")))
            found = await answer(users.GetUser(GetUserRequest(id=created.response.id), **at("not a token")))
            assert server.replica is None
    assert (created.token, found.token, found.response) == ("", "", created.response)
    calls = [statement.sql for statement in statements if not CHORES.match(statement.sql)]
    assert [sql.partition(" ")[0] for sql in calls] == ["INSERT", "SELECT"]


async def test_concurrent_writes_share_the_query_for_their_token(
    users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    with record_statements() as statements:
        calls = [users.CreateUser(create(f"user{number}@example.org")) for number in range(32)]
        tokens = [(await answer(call)).token for call in calls]
    queries = [statement for statement in statements if "pg_walfile_name" in statement.sql]
    assert 0 < len(queries) < len(tokens)
    await replicated.standby.catch_up()
    for number, token in enumerate(tokens):
        await users.GetUser(GetUserRequest(email=f"user{number}@example.org"), **at(token))


# The client library.


async def test_channel_carries_tokens(server: Server, replicated: ReplicatedDatabase) -> None:
    """From unary writes, from their errors, and from bulk loads, to reads and exports."""
    async with channel(server.address) as connection, channel(server.address) as other:
        users = UserServiceStub(connection)
        await replicated.standby.pause_replay()
        bob = await UserServiceStub(other).CreateUser(create("bob@example.org"))
        with counted() as counts:
            with pytest.raises(RosterError):
                await users.CreateUser(create("bob@example.org"))
            assert await users.GetUser(GetUserRequest(id=bob.id)) == bob
            loader = BulkLoader(users.BulkCreateUsers, BulkCreateUsersRequest)
            async for _ in loader.run(rows("cyd@example.org")):
                pass
            exported = [
                user.email async for page in users.ExportUsers(ExportUsersRequest()) for user in page.users
            ]
            assert exported == ["bob@example.org", "cyd@example.org"]
        assert counts["fallback=behind"] == 2


async def rows(*emails: str) -> AsyncIterator[User]:
    for email in emails:
        yield User(email=email)


async def test_token_crosses_processes(server: Server, replicated: ReplicatedDatabase) -> None:
    """As an explicit value; `any` stays, whatever the channel writes."""
    await replicated.standby.pause_replay()
    consistency = Consistency()
    async with channel(server.address, consistency=consistency) as connection:
        ada = await UserServiceStub(connection).CreateUser(create("ada@example.org"))
    async with channel(server.address, consistency=Consistency(consistency.token)) as connection:
        with counted() as counts:
            assert await UserServiceStub(connection).GetUser(GetUserRequest(id=ada.id)) == ada
        assert counts["fallback=behind"] == 1
    async with channel(server.address, consistency=Consistency(ANY)) as connection:
        users = UserServiceStub(connection)
        await users.CreateUser(create("bob@example.org"))
        assert not (await users.ListUsers(ListUsersRequest())).users
        assert len((await users.ListUsers(ListUsersRequest(), **at(PRIMARY))).users) == 2


async def test_command_exports_from_a_replica(
    server: Server, replicated: ReplicatedDatabase, roster: Roster
) -> None:
    await replicated.standby.pause_replay()
    async with grpc.aio.insecure_channel(server.address) as connection:
        ada = await answer(UserServiceStub(connection).CreateUser(create("ada@example.org")))
    for consistency, lines in (("primary", 1), (ada.token, 1), ("any", 0)):
        done = await roster.run("export", "users", "--consistency", consistency)
        assert (done.status, len(done.out.splitlines())) == (0, lines)
    refused = await roster.run("export", "users", "--consistency", "x")
    assert (refused.status, "roster-consistency-token" in refused.err) == (2, True)


async def test_doctor_asks_each_replica(replicated: ReplicatedDatabase, tmp_path: Path) -> None:
    """One that is down is a warning; one of another database, or behind the wrong pooler, is a failure."""
    with (
        PostgresServer() as other,
        pgbouncer(replicated.replica_url, "transaction") as transactions,
        pgbouncer(replicated.replica_url, "session") as sessions,
    ):
        name = make_url(replicated.url).database
        await other.execute(f"CREATE DATABASE {name}")
        down, primary = "127.0.0.1:1", replicated.standby.primary
        ports = [make_url(server.url).port for server in (replicated.standby, primary, other)]
        hosts = [f"127.0.0.1:{port}" for port in (*ports, transactions.port, sessions.port)]
        url = f"postgresql://postgres@{','.join([*hosts, down])}/{name}"
        settings: Any = {**SERVER_DEFAULTS, "ROSTER_DATABASE_URL": replicated.url, "ROSTER_REPLICA_URL": url}
        done = await run(ROSTER, "doctor", folder=tmp_path, **settings)
    reported = [line.split() for line in done.out.splitlines() if " replica " in line]
    assert [line[0] for line in reported] == ["ok", "warn", "FAIL", "FAIL", "ok", "warn"]
    assert [line[2].rstrip(":") for line in reported] == [*hosts, down]
    assert " ".join(reported[3]).endswith("in ROSTER_REPLICA_URL")
    assert " ".join(reported[5]).endswith(f"{down}: connection refused; reads go to the primary")
    assert done.status == 1


async def doctor(folder: Path, url: str, replica_url: str) -> tuple[int | None, list[str]]:
    """Return the status of `roster doctor`, and what it reports on hosts."""
    settings: Any = {**SERVER_DEFAULTS, "ROSTER_DATABASE_URL": url, "ROSTER_REPLICA_URL": replica_url}
    done = await run(ROSTER, "doctor", folder=folder, **settings)
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    return done.status, [line for line in lines if "127.0.0.1:" in line and "settings" not in line]


async def test_doctor_reports_a_replay_that_is_paused(replicated: ReplicatedDatabase, tmp_path: Path) -> None:
    """And that a primary among the replicas is not used as one."""
    standby, primary = (f"127.0.0.1:{make_url(url).port}" for url in (replicated.replica_url, replicated.url))
    name = make_url(replicated.url).database
    url = f"postgresql://postgres@{standby},{primary}/{name}?target_session_attrs=prefer-standby"
    await replicated.standby.pause_replay()
    status, reported = await doctor(tmp_path, replicated.url, url)
    assert status == 0
    assert reported[0].startswith("ok database connected to")
    assert reported[1:] == [
        f"warn replica {standby} has paused its replay; run SELECT pg_wal_replay_resume() there",
        f"ok replica {primary} is the primary; reads use the standbys of the URL",
    ]


async def test_doctor_reports_two_primaries(replicated: ReplicatedDatabase, tmp_path: Path) -> None:
    """The old one comes first in the URL, so a server that starts now would use it."""
    with Standby(replicated.standby.primary) as promoted:
        await promoted.promote()
        old, new = (f"127.0.0.1:{make_url(server.url).port}" for server in (promoted.primary, promoted))
        url = f"postgresql://postgres@{old},{new}/{make_url(replicated.url).database}"
        status, reported = await doctor(tmp_path, url, replicated.on(promoted))
    assert status == 1
    assert reported[1].startswith(
        f"FAIL database {old} (timeline 1) and {new} (timeline 2) accept writes; stop"
    )
    assert reported[2].startswith(
        f"FAIL replica {new} was promoted, and has a later timeline than the server"
    )


async def test_mirror_reads_on_the_primary(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub, replicated: ReplicatedDatabase
) -> None:
    """A plan from a replica that lags would delete and create the wrong users."""
    await add_users(server.database, 2)
    await replicated.standby.catch_up()
    await replicated.standby.pause_replay()
    await users.CreateUser(create("fresh@example.org"))

    report = await mirror.run("email\nuser0@example.org\nfresh@example.org\n")
    await replicated.standby.resume_replay()

    assert report.counts == (2, 3, 3, 1, 0, 0)
    assert report.outcomes == {"deleted": 1, "skipped": 0, "failed": 0}
