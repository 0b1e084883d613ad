"""Secrets put wherever callers can put them, and searched for in all output."""

import base64
import logging
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from argon2 import PasswordHasher
from google.protobuf.message import Message
from sqlalchemy import text

from roster.v1.changes_pb2 import ListChangesResponse, WatchChangesResponse
from service.changes.token import CHECKSUM_BYTES
from service.server import Server
from tests.support.wire import RPCS, Wire

PASSWORD, WRONG_PASSWORD = "canary-password", "canary-wrong-password"
CONTENT = "canary-content"
HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
# PostgreSQL quotes the beginning of a long value.
SALT, KEY = HASH.split("$")[4:]
# In a form that is none: refused, and not to be repeated either.
BAD_HASH = "$2b$04$canary-hash"
SECRETS = (PASSWORD, WRONG_PASSWORD, SALT, KEY, "canary-hash")
# A response may have the contents of posts; nothing else may.
CONFIDENTIAL = (*SECRETS, CONTENT)
# Makes every further write of a user with a hash fail in the database, which quotes the row.
REFUSES_HASHES = "ALTER TABLE users ADD CONSTRAINT no_hash CHECK (hashed_password IS NULL) NOT VALID"

ADA = {"email": "ada@example.org", "password": PASSWORD}
ALAN = {"email": "alan@example.org", "hashed_password": HASH}
NOTES = {"author_id": 1, "title": "Notes", "content": CONTENT}
REQUEST_ID = {"request_id": "7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10"}
CHANGED = {"update_mask": {"paths": ["hashed_password"]}}
EDITED = {"update_mask": {"paths": ["content"]}}
CALLS: list[tuple[str, list[Any]]] = [
    ("CreateUser", [{"user": ADA, **REQUEST_ID}]),
    ("CreateUser", [{"user": ADA, **REQUEST_ID}]),
    ("CreateUser", [{"user": {**ADA, "email": "x@example.org"}, **REQUEST_ID}]),
    ("CreateUser", [{"user": ALAN}]),
    ("CreateUser", [{"user": ALAN}]),
    ("CreateUser", [{"user": {**ALAN, "password": PASSWORD}}]),
    ("CreateUser", [{"user": {**ALAN, "hashed_password": BAD_HASH}}]),
    ("CreateUser", [{"user": {"email": "x@example.org", "password": PASSWORD + "\0"}}]),
    ("CreateUser", [b"\x0a\xff" + PASSWORD.encode()]),
    ("UpdateUser", [{"user": {"id": 1, "password": PASSWORD}}]),
    ("UpdateUser", [{"user": {"id": 1, "version": 99, "hashed_password": HASH}}]),
    ("GetUser", [{"id": 2, "view": "WITH_POSTS"}]),
    ("BatchGetUsers", [{"ids": [1, 2]}]),
    ("ListUsers", [{"page_size": 1}]),
    ("ListUsers", [{"filter": f'hashed_password = "{HASH}"'}]),
    ("ListUsers", [{"order_by": "hashed_password"}]),
    ("CountUsers", [{}]),
    ("CountUsers", [{"filter": f'hashed_password = "{HASH}"'}]),
    ("ExportUsers", [{}]),
    ("VerifyPassword", [{"id": 1, "password": PASSWORD}]),
    ("VerifyPassword", [{"id": 1, "password": WRONG_PASSWORD}]),
    ("VerifyPassword", [{"id": 99, "password": PASSWORD}]),
    ("VerifyPassword", [{"id": 1, "password": PASSWORD * 99}]),
    ("BulkCreateUsers", [{"options": {"load_id": "users", "return_ids": True}, "users": [ALAN, ADA]}]),
    (
        "BulkCreateUsers",
        [{"users": [{**ALAN, "email": "b@example.org"}, {**ALAN, "hashed_password": BAD_HASH}]}],
    ),
    (
        "BulkUpdateUsers",
        [{"options": CHANGED, "users": [{"id": 1, "hashed_password": HASH}], "finish": True}],
    ),
    ("CreatePost", [{"post": NOTES, **REQUEST_ID}]),
    ("CreatePost", [{"post": {**NOTES, "author_id": 99}}]),
    ("CreatePost", [{"post": {**NOTES, "content": CONTENT + "\0"}}]),
    ("UpdatePost", [{"post": {"id": 1, "content": CONTENT}}]),
    ("GetPost", [{"id": 1, "view": "WITH_AUTHOR"}]),
    ("BatchGetPosts", [{"ids": [1]}]),
    ("BulkCreatePosts", [{"options": {"load_id": "posts"}, "posts": [NOTES, {**NOTES, "author_id": 99}]}]),
    ("BulkUpdatePosts", [{"options": EDITED, "posts": [{"id": 1, "content": CONTENT}], "finish": True}]),
    ("ListPosts", [{"page_size": 1, "view": "WITH_AUTHOR"}]),
    ("ListPosts", [{"filter": f'content = "{CONTENT}"'}]),
    ("CountPosts", [{}]),
    ("CountPosts", [{"filter": f'content = "{CONTENT}"'}]),
    ("ExportPosts", [{}]),
    ("GetBulkLoad", [{"load_id": "users"}]),
    ("ListBulkLoads", [{"page_size": 1}]),
    ("ListBulkLoadFailures", [{"load_id": "users", "page_size": 1}]),
    ("ListBulkLoadRows", [{"load_id": "users", "page_size": 1}]),
    ("AbortBulkLoad", [{"load_id": "users"}]),
    ("BulkDeletePosts", [{"posts": [{"id": 2}, {"id": 99}], "finish": True}]),
    ("BulkDeleteUsers", [{"users": [{"email": PASSWORD}, {"email": "b@example.org"}], "finish": True}]),
    ("ListChanges", [{}]),
    ("WatchChanges", [{}]),
    ("DeletePost", [{"id": 1}]),
    ("DeleteUser", [{"id": 1}]),
]
BROKEN: list[tuple[str, list[Any]]] = [
    ("CreateUser", [{"user": {**ALAN, "email": "c@example.org"}}]),
    ("UpdateUser", [{"user": {"id": 2, "hashed_password": HASH}}]),
    ("VerifyPassword", [{"id": 2, "password": PASSWORD}]),
    ("BulkCreateUsers", [{"users": [{**ALAN, "email": "d@example.org"}]}]),
    ("BulkUpdateUsers", [{"options": CHANGED, "users": [{"id": 2, "hashed_password": HASH}]}]),
]


@pytest.fixture
async def wire(server: Server) -> AsyncIterator[Wire]:
    """A client of a server for one test."""
    with grpc.insecure_channel(server.address) as channel:
        yield Wire(channel)


@pytest.fixture
def sinks(caplog: pytest.LogCaptureFixture) -> dict[str, Callable[[], str]]:
    """Everything besides the responses that could hold a secret: the log, at its most verbose level."""
    caplog.set_level(logging.DEBUG)
    fields = logging.LogRecord("", 0, "", 0, "", None, None).__dict__.keys()

    def logged() -> str:
        extra = [vars(record)[name] for record in caplog.records for name in vars(record).keys() - fields]
        return caplog.text + repr(extra)

    return {"log": logged}


async def responses_and_error(wire: Wire, rpc: str, messages: list[Any]) -> tuple[list[Message], str]:
    """Return the responses of a call, and all parts of its error."""
    try:
        return await wire.call(rpc, *messages), ""
    except grpc.RpcError as error:
        failed: Any = error
        return [], f"{failed.details()} {failed.debug_error_string()} {failed.trailing_metadata()!r}"


def page_token(response: Message) -> str:
    """Return the token of a page or of the feed, and what is in it."""
    token = str(getattr(response, "next_page_token", "") or getattr(response, "token", ""))
    content = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    if isinstance(response, ListChangesResponse | WatchChangesResponse):
        content = zlib.decompress(content[1 + CHECKSUM_BYTES :])
    return token + content.decode(errors="replace")


def leaked(secrets: tuple[str, ...], output: str) -> list[str]:
    return [secret for secret in secrets if secret in output]


def test_every_rpc_is_called() -> None:
    """New RPCs must be listed here."""
    assert {rpc for rpc, _ in CALLS} == set(RPCS)


async def calls_answered(wire: Wire, calls: list[tuple[str, list[Any]]]) -> set[str]:
    """Make the calls, check each response, and return the RPCs that had one."""
    done = set()
    for rpc, messages in calls:
        responses, error = await responses_and_error(wire, rpc, messages)
        assert leaked(CONFIDENTIAL, error) == [], rpc
        assert leaked(SECRETS, str(responses)) == [], rpc
        assert leaked(CONFIDENTIAL, "".join(map(page_token, responses))) == [], rpc
        done |= {rpc} if responses else set()
    return done


async def test_no_secret_is_disclosed(
    sinks: dict[str, Callable[[], str]], server: Server, wire: Wire
) -> None:
    """In a response, error, page token or log line, even if the database fails."""
    [start] = await wire.call("ListChanges", {})
    assert await calls_answered(wire, CALLS) == set(RPCS)
    changes = [(rpc, [{"token": start.token}]) for rpc in ("ListChanges", "WatchChanges")]
    assert await calls_answered(wire, changes) == {"ListChanges", "WatchChanges"}
    if not server.database.is_sqlite:
        async with server.database.begin() as session:
            await session.execute(text(REFUSES_HASHES))
        assert await calls_answered(wire, BROKEN) <= {"BulkCreateUsers", "BulkUpdateUsers"}

    for name, output in sinks.items():
        assert "CreateUser" in output(), name
        assert leaked(CONFIDENTIAL, output()) == [], name
