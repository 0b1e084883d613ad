"""The change feed, as its consumers see it."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from prometheus_client import generate_latest
from sqlalchemy import text

from roster.errors import DatabaseUnavailable
from roster.v1.changes_pb2 import Change, ListChangesRequest, ListChangesResponse
from roster.v1.changes_pb2_grpc import ChangeServiceAsyncStub, ChangeServiceStub
from roster.v1.posts_pb2 import CreatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.changes import head, watcher
from service.changes.head import SharedPage
from service.changes.prune import prune_changes
from service.changes.token import Token
from service.logs import Json
from service.server import Server, utc_now
from tests.e2e.secured import Secured, secured
from tests.support.authority import Pair
from tests.support.changes import SMALL_WINDOW, Watch, forge, summary
from tests.support.errors import Refusal, refusal
from tests.support.rival import until
from tests.support.scrape import Scrape
from tests.support.server import serve
from tests.support.statements import record_statements

ADA = User(email="ada@example.org", full_name="Ada")
USERS, POSTS = Change.USERS, Change.POSTS
USERS_CHANGED = 500  # their changes do not fit into what a client receives without reading
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "POLL_SECONDS", 0.02)


@pytest.fixture
def changes(channel: grpc.aio.Channel) -> ChangeServiceAsyncStub:
    """The client of ChangeService."""
    return ChangeServiceStub(channel)


async def create_users(users: UserServiceAsyncStub, number: int) -> None:
    rows = [User(email=f"user{position}@example.org", full_name="x" * 100) for position in range(number)]
    async for _ in users.BulkCreateUsers(iter([BulkCreateUsersRequest(users=rows, finish=True)])):
        pass


async def listed(changes: ChangeServiceAsyncStub, **request: Any) -> ListChangesResponse:
    return await changes.ListChanges(ListChangesRequest(**request))


async def execute(server: Server, *statements: str) -> None:
    """Execute statements that Roster does not know of."""
    async with server.database.begin() as session:
        for statement in statements:
            await session.execute(text(statement))


def metric(name: str, **labels: str) -> float:
    return Scrape(generate_latest().decode()).value(name, **labels)


async def is_true(condition: bool) -> bool:
    return condition


async def stored_users(users: UserServiceAsyncStub) -> dict[tuple[str, int], User]:
    pages = users.ExportUsers(ExportUsersRequest())
    return {("user", user.id): user async for page in pages for user in page.users}


async def test_watch_reports_changes_as_they_happen(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """The first response is sent at once; then each change arrives with the row as it is."""
    watch = Watch(channel)
    async with asyncio.timeout(1):
        first = await watch.read()
    assert (list(first.changes), bool(first.token)) == ([], True)

    ada = await users.CreateUser(CreateUserRequest(user=ADA))
    async with asyncio.timeout(1):
        assert [change.user for change in await watch.changes(1)] == [ada]
    post = await posts.CreatePost(CreatePostRequest(post=Post(author_id=ada.id, title="Notes", content="…")))
    [change] = await watch.changes(1)
    assert change.post == post
    assert abs(change.changed_at.ToNanoseconds() - post.created_at.ToNanoseconds()) < 1e9
    ada = await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, is_active=False, version=1)))
    assert [change.user for change in await watch.changes(1)] == [ada]
    await users.DeleteUser(DeleteUserRequest(id=ada.id))
    assert [*map(summary, await watch.changes(2))] == [
        ("deleted_post_id", post.id),
        ("deleted_user_id", ada.id),
    ]


@on_sqlite
async def test_watch_has_a_heartbeat(channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without changes, each response has a token only."""
    monkeypatch.setattr(watcher, "HEARTBEAT_SECONDS", 0.1)
    watch = Watch(channel)

    responses = [await watch.read() for _ in range(3)]
    assert [len(response.changes) for response in responses] == [0, 0, 0]
    assert all(response.token for response in responses)


@on_postgresql
async def test_watch_continues_after_its_token(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub
) -> None:
    """The first response has the changes in between; those made now come after it."""
    first = Watch(channel)
    await first.read()
    first.call.cancel()
    ada = await users.CreateUser(CreateUserRequest(user=ADA))

    second = Watch(channel, first.token)
    assert [change.user for change in (await second.read()).changes] == [ada]
    await users.DeleteUser(DeleteUserRequest(id=ada.id))
    assert [*map(summary, await second.changes(1))] == [("deleted_user_id", ada.id)]
    third = Watch(channel, second.token)
    assert not (await third.read()).changes


@on_postgresql
async def test_watch_reports_only_its_entities(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """A token continues with some of its entities, but not with others."""
    of_users, of_posts, of_all = (
        Watch(channel, entities=[USERS]),
        Watch(channel, entities=[POSTS]),
        Watch(channel),
    )
    for watch in (of_users, of_posts, of_all):
        await watch.read()
    ada = await users.CreateUser(CreateUserRequest(user=ADA))
    await posts.CreatePost(CreatePostRequest(post=Post(author_id=ada.id, title="Notes")))
    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    while of_all.copy or not (await of_all.read()).changes:
        pass
    assert {summary(change)[0] for change in await of_posts.changes(1)} <= {"post", "deleted_post_id"}
    assert {summary(change)[0] for change in await of_users.changes(1)} <= {"user", "deleted_user_id"}
    assert await Watch(channel, of_all.token, [POSTS]).read()
    refused = await refusal(Watch(channel, of_users.token, [USERS, POSTS]).read())
    assert (refused.reason, refused.fields) == ("INVALID_FIELD", ["token"])
    assert "made for USERS only" in refused.message


@on_sqlite
async def test_list_returns_pages(changes: ChangeServiceAsyncStub, users: UserServiceAsyncStub) -> None:
    """Without a token it returns that of now; `has_more` says whether others follow."""
    now = await listed(changes)
    assert (list(now.changes), now.has_more) == ([], False)
    await create_users(users, 5)

    pages, token = [], now.token
    for _ in range(3):
        pages.append(await listed(changes, token=token, page_size=2))
        token = pages[-1].token
    assert [(len(page.changes), page.has_more) for page in pages] == [(2, True), (2, True), (1, False)]
    found = [change.user.email for page in pages for change in page.changes]
    assert sorted(found) == [f"user{position}@example.org" for position in range(5)]
    end = await listed(changes, token=token)
    assert (list(end.changes), end.has_more) == ([], False)
    assert len((await listed(changes, token=now.token)).changes) == 5
    assert len((await listed(changes, token=now.token, page_size=5000)).changes) == 5


async def test_large_rows_arrive_in_several_responses(
    channel: grpc.aio.Channel,
    changes: ChangeServiceAsyncStub,
    users: UserServiceAsyncStub,
    posts: PostServiceAsyncStub,
) -> None:
    """None has more than 3 MiB, and each row arrives once."""
    start, watch = await listed(changes), Watch(channel)
    await watch.read()
    ada = await users.CreateUser(CreateUserRequest(user=ADA))
    for _ in range(5):
        await posts.CreatePost(
            CreatePostRequest(post=Post(author_id=ada.id, title="a", content="x" * (1 << 20)))
        )

    rest = start
    found: list[Change] = []
    sizes = []
    while True:
        rest = await listed(changes, token=rest.token, page_size=1000)
        found += rest.changes
        sizes.append(rest.ByteSize())
        if not rest.has_more:
            break
    assert sorted(map(summary, found)) == [*(("post", id) for id in range(1, 6)), ("user", ada.id)]
    assert len(sizes) > 1
    assert max(sizes) <= 3 << 20
    for following in (watch, Watch(channel, start.token)):
        while len(following.copy) < 6:
            assert (await following.read()).ByteSize() <= 3 << 20


async def test_feed_has_the_changes_of_others(server: Server, channel: grpc.aio.Channel) -> None:
    """Whatever program writes the tables."""
    watch = Watch(channel)
    await watch.read()
    await execute(server, "INSERT INTO users (email, full_name) VALUES ('ada@example.org', 'Ada')")
    [change] = await watch.changes(1)
    assert change.user.email == "ada@example.org"
    await execute(server, "UPDATE users SET full_name = 'Countess'")
    [change] = await watch.changes(1)
    assert change.user.full_name == "Countess"
    await execute(server, "DELETE FROM users")
    assert [*map(summary, await watch.changes(1))] == [("deleted_user_id", change.user.id)]


@on_postgresql
async def test_truncate_resets_the_feed(
    server: Server, channel: grpc.aio.Channel, users: UserServiceAsyncStub
) -> None:
    """Nobody can say which rows it has deleted: consumers must export again."""
    watch = Watch(channel)
    await watch.read()
    await users.CreateUser(CreateUserRequest(user=ADA))
    await watch.changes(1)
    await execute(server, "TRUNCATE users CASCADE")

    refused = await refusal(watch.end())
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FEED_RESET")
    assert "export again" in refused.message
    assert (await refusal(Watch(channel, watch.token).read())).reason == "FEED_RESET"
    assert (await Watch(channel).read()).token


# Bad tokens


async def refused_token(channel: grpc.aio.Channel, token: str) -> Refusal:
    """Return the error for a token, which is the same for both RPCs."""
    refused = await refusal(Watch(channel, token).read())
    request = ListChangesRequest(token=token)
    also = await refusal(ChangeServiceStub(channel).ListChanges(request))
    assert (refused.code, refused.reason, refused.message) == (also.code, also.reason, also.message)
    return refused


async def test_pruned_token_is_expired(
    server: Server, channel: grpc.aio.Channel, changes: ChangeServiceAsyncStub, users: UserServiceAsyncStub
) -> None:
    """Its consumer must export again; newer tokens stay valid."""
    old = (await listed(changes)).token
    await users.CreateUser(CreateUserRequest(user=ADA))
    new = (await listed(changes, token=old)).token
    await prune_changes(server.database, utc_now())

    refused = await refused_token(channel, old)
    assert (refused.code, refused.reason) == (grpc.StatusCode.OUT_OF_RANGE, "TOKEN_EXPIRED")
    assert "export again" in refused.message
    assert not (await listed(changes, token=new)).changes


async def test_token_of_another_database_is_refused(sqlite_url: str, postgresql_url: str) -> None:
    """Also of the other kind of database."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serve(url)) for url in (sqlite_url, postgresql_url)]
        channels = [grpc.aio.insecure_channel(server.address) for server in servers]
        one, other = [await stack.enter_async_context(channel) for channel in channels]
        for here, there in ((one, other), (other, one)):
            foreign = (await listed(ChangeServiceStub(there))).token
            refused = await refused_token(here, foreign)
            assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FEED_RESET")


async def test_forged_token_of_this_feed_is_refused(
    server: Server, channel: grpc.aio.Channel, changes: ChangeServiceAsyncStub
) -> None:
    """It is of the future, or of the other kind of database."""
    now = Token.parse((await listed(changes)).token, [USERS, POSTS])
    future = (1 << 63) - 1
    forged = [
        (f"{future}:{future}:", ""),
        (f"1:{future}:", ""),
        (f"1:{future}:5,7", ""),
        ("1:2:", f"1:{future}:"),
        (str(future), ""),
        (f"5:{future}:{','.join(map(str, range(10**9, 10**9 + 20_000)))}", ""),
    ]
    other_kind = [("1:2:", "")] if server.database.is_sqlite else [("1", ""), ("0", "")]
    for since, end in forged + other_kind:
        refused = await refused_token(channel, forge(now.feed_id, since, end, 0, 0, 0, []))
        assert refused.reason == "FEED_RESET", (since, end)
    assert not (await listed(changes, token=str(now))).changes


@pytest.mark.parametrize("offset", [1, 5000])
async def test_token_within_an_entry_can_have_any_offset(
    server: Server, changes: ChangeServiceAsyncStub, users: UserServiceAsyncStub, offset: int
) -> None:
    """A forged one skips changes, or finds none: it harms only its caller."""
    now = Token.parse((await listed(changes)).token, [USERS, POSTS])
    await create_users(users, 3)
    page = Token.parse((await listed(changes, token=str(now), page_size=1)).token, [USERS, POSTS])
    values: Any = (page.feed_id, page.since, page.until, page.xid, page.id, offset, [])

    assert len((await listed(changes, token=forge(*values))).changes) <= 3


# Many watchers, and slow ones


async def test_stop_ends_a_watch_at_once(
    server: Server, channel: grpc.aio.Channel, users: UserServiceAsyncStub, database_url: str
) -> None:
    """Its last response has the newest token, from which it continues on another server."""
    watch = Watch(channel)
    await watch.read()
    ada = await users.CreateUser(CreateUserRequest(user=ADA))
    await watch.changes(1)
    stopping = asyncio.create_task(server.stop())
    async with asyncio.timeout(1):
        refused = await refusal(watch.end())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refused.retry_seconds is not None
    await stopping

    async with serve(database_url) as other, grpc.aio.insecure_channel(other.address) as again:
        await UserServiceStub(again).DeleteUser(DeleteUserRequest(id=ada.id))
        resumed = Watch(again, watch.token)
        assert [*map(summary, await resumed.changes(1))] == [("deleted_user_id", ada.id)]


@on_postgresql
async def test_watch_moves_to_another_server_without_loss(server: Server, database_url: str) -> None:
    """While users are written on the other one."""
    async with (
        serve(database_url) as other,
        grpc.aio.insecure_channel(other.address) as elsewhere,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        users = UserServiceStub(elsewhere)
        watch = Watch(channel)
        await watch.read()

        async def write() -> None:
            for position in range(50):
                await users.CreateUser(CreateUserRequest(user=User(email=f"{position}@example.org")))

        writing = asyncio.create_task(write())
        await watch.changes(5)
        stopping = asyncio.create_task(server.stop())
        assert (await refusal(watch.end())).reason == "DRAINING"
        moved = Watch(elsewhere, watch.token)
        moved.copy = watch.copy
        await writing
        while len(moved.copy) < 50:
            await moved.read()
        assert moved.copy == await stored_users(users)
        await stopping


@pytest.fixture
async def unread(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Watch]:
    """A watch whose client does not read, of users that are then changed again and again."""
    monkeypatch.setattr(head, "MAX_PAGES", 4)
    await create_users(users, USERS_CHANGED)
    async with grpc.aio.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        watch = Watch(channel)
        await watch.read()
        yield watch


async def change_all(server: Server, watch: Watch, times: int) -> None:
    """Change all users some times, and let a watch receive each change."""
    for number in range(times):
        await execute(server, f"UPDATE users SET full_name = '{number} {'x' * 150}'")
        await watch.changes(USERS_CHANGED)


@on_postgresql
async def test_watch_that_does_not_read_affects_nobody(
    server: Server,
    channel: grpc.aio.Channel,
    users: UserServiceAsyncStub,
    unread: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It holds one response, and no connection. It misses nothing once it reads again."""
    pool: Any = server.database.engine.pool
    reader = Watch(channel)
    await reader.read()
    await change_all(server, reader, head.MAX_PAGES + 6)

    gc.collect()
    kept = [each for each in gc.get_objects() if isinstance(each, SharedPage)]
    assert len(kept) <= head.MAX_PAGES
    assert metric("roster_watchers") == 2
    await until(lambda: is_true(metric("roster_watch_lag_seconds") > 0.1))
    await until(lambda: is_true(pool.checkedout() == 0))

    monkeypatch.setattr(watcher, "HEARTBEAT_SECONDS", 0.1)
    while (await unread.read()).changes:
        pass
    assert unread.copy == await stored_users(users)
    await until(lambda: is_true(metric("roster_watch_lag_seconds") == 0))


@on_sqlite
async def test_watch_that_does_not_read_does_not_delay_a_stop(
    server: Server, channel: grpc.aio.Channel, unread: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client continues with the last token that it reads."""
    monkeypatch.setattr("service.server.QUIET_SECONDS", 0.1)
    reader = Watch(channel)
    await reader.read()
    await change_all(server, reader, 2)

    loop = asyncio.get_running_loop()
    began = loop.time()
    await server.stop()
    assert loop.time() - began < 5


@on_postgresql
async def test_thousand_idle_watches_cost_one_poll(server: Server, channel: grpc.aio.Channel) -> None:
    """On one connection; a change reaches all of them."""
    watches = [Watch(channel) for _ in range(1000)]
    await asyncio.gather(*(watch.read() for watch in watches))
    assert metric("roster_watchers") == 1000

    with record_statements() as statements:
        await asyncio.sleep(10 * head.POLL_SECONDS)
    assert len([each for each in statements if "pg_current_snapshot" in each.sql]) <= 10
    await execute(server, "INSERT INTO users (email, full_name) VALUES ('ada@example.org', '')")
    found = await asyncio.gather(*(watch.changes(1) for watch in watches))
    assert {change.user.email for [change] in found} == {"ada@example.org"}
    for watch in watches:
        watch.call.cancel()
    await until(lambda: is_true(metric("roster_watchers") == 0))
    with record_statements() as statements:
        await asyncio.sleep(5 * head.POLL_SECONDS)
    assert not [each for each in statements if "pg_current_snapshot" in each.sql]


async def test_server_admits_only_so_many_watches(sqlite_url: str) -> None:
    """They do not count as calls, and calls do not count as watches; a place is free once a watch ends."""
    async with (
        serve(sqlite_url, max_watchers=2, max_calls=1, caller_streams=1) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        first, second = Watch(channel), Watch(channel)
        for watch in (first, second):
            await watch.read()
        refused = await refusal(Watch(channel).read())
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert refused.retry_seconds == 1
        assert "watches" in refused.message
        assert (await listed(ChangeServiceStub(channel))).token

        first.call.cancel()
        await until(lambda: is_true(metric("roster_watchers") == 1))
        assert (await Watch(channel).read()).token


# Rights, the audit log, metrics

READER = '[identities]\n"jwt:reader" = ["reader"]\n"dns:reader.example.org" = ["reader"]\n'
NOBODY = '[identities]\n"jwt:other" = ["reader"]\n'
WATCHER = """
[identities]
"jwt:reader" = ["watcher"]
[roles]
watcher = ["roster.v1.ChangeService/WatchChanges", "roster.v1.UserService/GetUser"]
"""


class Clock:
    """The time, and what a test adds to it."""

    added = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.added


@pytest.fixture
def clock() -> Clock:
    """The clock of the server."""
    return Clock()


@pytest.fixture
async def roster(
    sqlite_url: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Secured]:
    """A server with a policy, whose watches have a heartbeat of 0.1 s."""
    monkeypatch.setattr(watcher, "HEARTBEAT_SECONDS", 0.1)
    async with secured(
        sqlite_url, tmp_path, tokens=True, client_ca=True, clock=clock, max_watchers=4
    ) as server:
        (tmp_path / "policy.toml").write_text(READER)
        yield server


@pytest.fixture
def pair(roster: Secured) -> Pair:
    """A client certificate of the reader."""
    return roster.authority.issue("reader.example.org")


async def create_user(server: Server) -> None:
    async with server.database.begin() as session:
        await session.execute(text("INSERT INTO users (email, full_name) VALUES ('ada@example.org', '')"))


@pytest.mark.parametrize("has_token", [True, False], ids=["token", "certificate"])
async def test_watch_ends_when_the_policy_takes_its_right_away(
    has_token: bool, roster: Secured, pair: Pair
) -> None:
    """Before the next response: it gets no change that was made afterwards."""
    token = roster.issuer.token("reader") if has_token else None
    async with roster.channel(token, pair) as channel:
        watch = Watch(channel)
        await watch.read()
        (roster.folder / "policy.toml").write_text(NOBODY)
        await create_user(roster.server)

        refused = await refusal(watch.end())
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert watch.copy == {}


async def test_watch_ends_without_the_right_to_one_of_its_entities(roster: Secured, pair: Pair) -> None:
    """The role may still watch users."""
    async with roster.channel(roster.issuer.token("reader"), pair) as channel:
        of_all, of_users = Watch(channel), Watch(channel, entities=[USERS])
        for watch in (of_all, of_users):
            await watch.read()
        (roster.folder / "policy.toml").write_text(WATCHER)

        assert (await refusal(of_all.end())).code is grpc.StatusCode.PERMISSION_DENIED
        assert (await refusal(Watch(channel).read())).code is grpc.StatusCode.PERMISSION_DENIED
        assert await of_users.read()


async def test_watch_ends_when_its_token_expires(roster: Secured, pair: Pair, clock: Clock) -> None:
    """Its client opens another one, with a new token."""
    async with roster.channel(roster.issuer.token("reader"), pair) as channel:
        watch = Watch(channel)
        await watch.read()
        clock.added = timedelta(hours=2)
        await create_user(roster.server)

        refused = await refusal(watch.end())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert watch.copy == {}


async def test_caller_has_a_share_of_the_watches(roster: Secured, pair: Pair) -> None:
    """Half of those that the others leave."""
    (roster.folder / "policy.toml").write_text(READER + '"jwt:other" = ["reader"]\n')
    async with (
        roster.channel(roster.issuer.token("reader"), pair) as channel,
        roster.channel(roster.issuer.token("other"), pair) as others,
    ):
        watches = [Watch(channel), Watch(channel)]
        for watch in watches:
            await watch.read()
        refused = await refusal(Watch(channel).read())
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert "2 watches" in refused.message
        assert await Watch(others).read()


@on_sqlite
async def test_watch_is_counted_and_audited(
    server: Server, channel: grpc.aio.Channel, users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """At its beginning and at its end, with what was sent, but without any of it."""
    sent = metric("roster_changes_sent_total", grpc_method="WatchChanges")
    watch = Watch(channel, entities=[USERS])
    await watch.read()
    assert metric("roster_watchers") == 1
    await until(lambda: is_true(metric("roster_watch_lag_seconds") == 0))
    await create_users(users, 3)
    await watch.changes(3)
    watch.call.cancel()
    await server.drain.wait(20)

    assert metric("roster_changes_sent_total", grpc_method="WatchChanges") == sent + 3
    assert metric("roster_watchers") == 0
    lines = [orjson.loads(Json().format(line)) for line in caplog.records if line.name == "roster.audit"]
    fields = ("message", "caller", "target", "counts", "outcome")
    assert [tuple(line[name] for name in fields) for line in lines if line["message"] == "watch"] == [
        ("watch", "anonymous", "USERS", {"changes": 0}, "BEGUN"),
        ("watch", "anonymous", "USERS", {"changes": 3}, "CANCELLED"),
    ]
    assert "example.org" not in caplog.text


@on_postgresql
async def test_lag_grows_while_the_log_cannot_be_read(
    server: Server, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch goes on when the database answers again."""
    monkeypatch.setattr(head, "RETRY_SECONDS", 0.05)
    watch = Watch(channel)
    await watch.read()
    read = server.feed.read

    async def fail(*_: object) -> None:
        raise DatabaseUnavailable("a test's own")

    monkeypatch.setattr(server.feed, "read", fail)
    await until(lambda: is_true(metric("roster_watch_lag_seconds") > 0.1))
    monkeypatch.setattr(server.feed, "read", read)
    await execute(server, "INSERT INTO users (email, full_name) VALUES ('ada@example.org', '')")
    assert len(await watch.changes(1)) == 1
    await until(lambda: is_true(metric("roster_watch_lag_seconds") == 0))
