"""`watch_changes` of the client library against a real server, and against one that is silent."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import text

from roster.client import (
    Backoff,
    Disconnected,
    FeedReset,
    InvalidField,
    StatementTimeout,
    TokenExpired,
    channel,
    watch_changes,
)
from roster.errors import Draining, RosterError
from roster.v1.changes_pb2 import Change, WatchChangesResponse
from roster.v1.changes_pb2_grpc import ChangeServiceServicer, add_ChangeServiceServicer_to_server
from service.changes.reset import reset_feed
from service.server import Server
from service.status import status_from_error
from tests.support.rows import add_posts, add_users
from tests.support.server import FREE_PORT, serve

Watch = AsyncIterator[WatchChangesResponse]


@asynccontextmanager
async def watching(address: str, token: str = "", **options: Any) -> AsyncIterator[Watch]:
    """Watch a server through a channel of the client library."""
    async with (
        asyncio.timeout(20),
        channel(address) as connection,
        aclosing(watch_changes(connection, token, **options)) as responses,
    ):
        yield responses


async def ids_until(responses: Watch, last_id: int) -> list[int]:
    """Return the ids of the users in the next responses, up to one id."""
    ids: list[int] = []
    while last_id not in ids:
        response = await anext(responses)
        ids += [change.user.id for change in response.changes]
    return ids


async def test_continues_on_the_next_server(database_url: str, tmp_path: Path) -> None:
    """Changes made while no server runs are not lost, and none arrives twice."""
    address = f"unix:{tmp_path}/roster.sock"
    async with serve(database_url, listen=address) as first, watching(address) as responses:
        assert not (await anext(responses)).changes
        before = await add_users(first.database, 2)
        seen = await ids_until(responses, before[-1])
        await first.stop(grace=1)
        async with serve(database_url, listen=address) as second:
            after = await add_users(second.database, 1, email="later@example.org")
            seen += await ids_until(responses, after[-1])

    assert seen == before + after


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_continues_from_a_token_with_some_entities(server: Server) -> None:
    """A consumer that was stopped gets what it has missed."""
    async with watching(server.address) as responses:
        token = (await anext(responses)).token
    [author] = await add_users(server.database)
    [post] = await add_posts(server.database, [author])

    async with watching(server.address, token, entities=[Change.POSTS]) as responses:
        response = await anext(responses)

    assert [change.post.id for change in response.changes] == [post]


async def expire(server: Server) -> None:
    """Prune the whole log, as its age does."""
    number = "9" if server.database.is_sqlite else "(pg_snapshot_xmax(pg_current_snapshot())::text)::xid8"
    async with server.database.begin() as session:
        await session.execute(text(f"UPDATE feed SET pruned_xid = {number}"))


async def reset(server: Server) -> None:
    """Begin another feed, as after a restore."""
    await reset_feed(server.database, is_forced=True)


@pytest.mark.parametrize(("end", "expected"), [(expire, TokenExpired), (reset, FeedReset)])
async def test_a_lost_position_is_a_typed_error(
    server: Server, end: Callable[[Server], Any], expected: type[RosterError]
) -> None:
    """The consumer makes a new copy; a retry does not help."""
    async with watching(server.address) as responses:
        token = (await anext(responses)).token
    await add_users(server.database)  # a transaction that the token has not seen
    await end(server)

    async with watching(server.address, token) as responses:
        with pytest.raises(expected):
            await anext(responses)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_damaged_token_is_refused(server: Server) -> None:
    async with watching(server.address, "x") as responses:
        with pytest.raises(InvalidField) as refused:
            await anext(responses)

    assert refused.value.field == "token"


@pytest.mark.parametrize("wait_for_ready", [False, True])
async def test_a_wrong_address_is_reported_at_once(*, wait_for_ready: bool) -> None:
    """Nothing has answered yet, so a retry may never help."""
    async with channel("127.0.0.1:1", wait_for_ready=wait_for_ready) as connection:
        with pytest.raises(Disconnected, match="no server answers"):
            await anext(watch_changes(connection))


class Unreliable(ChangeServiceServicer):
    """Answers each watch with the token it got and one more letter; then it is silent, or fails."""

    def __init__(self, failure: RosterError | None) -> None:
        self._failure = failure

    async def WatchChanges(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[WatchChangesResponse]:
        yield WatchChangesResponse(token=f"{request.token}x")
        if not self._failure:
            await asyncio.Event().wait()
            return
        status = status_from_error(self._failure)
        context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        await context.abort(code, status.message)

    async def ListChanges(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


@pytest.mark.parametrize("failure", [None, Draining("stops"), StatementTimeout("took too long")])
async def test_a_watch_that_breaks_continues_with_the_last_token(failure: RosterError | None) -> None:
    """A server that is silent counts as lost: a proxy may hide that it is gone."""
    server = grpc.aio.server()
    add_ChangeServiceServicer_to_server(Unreliable(failure), server)
    port = server.add_insecure_port(FREE_PORT)
    await server.start()
    backoff = Backoff(first_pause_seconds=0.01)
    async with watching(f"127.0.0.1:{port}", silence_seconds=0.2, backoff=backoff) as responses:
        tokens = [(await anext(responses)).token for _ in range(3)]
    await server.stop(None)

    assert tokens == ["x", "xx", "xxx"]


async def test_pauses_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage may last for days: a thousand retries take three hours."""
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("roster.client.backoff.asyncio.sleep", sleep)
    backoff = Backoff(max_retries=sys.maxsize)
    for _ in range(1100):
        await backoff.wait(Draining("stops"))

    assert max(pauses) <= 10.1
