"""Page tokens that are damaged, forged, or from another list: INVALID_PAGE_TOKEN."""

from base64 import urlsafe_b64encode
from typing import Any
from uuid import uuid4
from zlib import crc32

import pytest
from grpc import StatusCode

from service.db.paging import VERSION, encode_token, fingerprint
from tests.support.errors import refusal
from tests.support.wire import Wire

USERS = {"filter": 'email : "@example.org"', "order_by": "created_at", "page_size": 1}
POSTS = {"filter": 'title = "Notes"', "order_by": "created_at desc", "page_size": 1}


@pytest.fixture
async def tokens(wire: Wire) -> dict[str, str]:
    """A valid token of each of the two lists."""
    authors = [await wire.call("CreateUser", {"user": {"email": f"{uuid4()}@example.org"}}) for _ in "ab"]
    for (author,) in authors:
        await wire.call("CreatePost", {"post": {"author_id": author.id, "title": "Notes"}})
    ((users,), (posts,)) = (await wire.call("ListUsers", USERS), await wire.call("ListPosts", POSTS))
    return {"ListUsers": users.next_page_token, "ListPosts": posts.next_page_token}


async def assert_refuses(wire: Wire, rpc: str, request: dict[str, Any]) -> None:
    refused = await refusal(wire.call(rpc, request))

    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")
    assert refused.fields == ["page_token"]
    assert request["page_token"] not in refused.message


@pytest.mark.parametrize(("rpc", "listing"), [("ListUsers", USERS), ("ListPosts", POSTS)])
async def test_refuses_a_damaged_token(
    wire: Wire, tokens: dict[str, str], rpc: str, listing: dict[str, Any]
) -> None:
    """It is truncated, extended, or one character differs."""
    whole = tokens[rpc]
    changed = [f"{whole[:at]}{'B' if whole[at] == 'A' else 'A'}{whole[at + 1 :]}" for at in (0, 3, 9, 20)]
    for token in [whole[:-1], whole[:-4], whole[:5], whole[1:], f"{whole}A", f"{whole}=", *changed]:
        await assert_refuses(wire, rpc, {**listing, "page_token": token})


@pytest.mark.parametrize(
    ("rpc", "elsewhere"),
    [
        ("ListUsers", {**USERS, "filter": 'email : "@example.com"'}),
        ("ListUsers", {**USERS, "filter": ""}),
        ("ListUsers", {**USERS, "order_by": "created_at desc"}),
        ("ListUsers", {**USERS, "order_by": "id"}),
        ("ListPosts", {**POSTS, "filter": ""}),
        ("ListPosts", {**POSTS, "order_by": "created_at"}),
        ("ListPosts", {**POSTS, "order_by": ""}),
        ("ListPosts", {**POSTS, "author_id": 1}),
    ],
)
async def test_refuses_token_of_another_listing(
    wire: Wire, tokens: dict[str, str], rpc: str, elsewhere: dict[str, Any]
) -> None:
    """With another filter, order or author its key has no meaning."""
    await assert_refuses(wire, rpc, {**elsewhere, "page_token": tokens[rpc]})


async def test_refuses_token_of_another_method(wire: Wire) -> None:
    """Even if filter and order are the same."""
    (page,) = await wire.call("ListUsers", {"page_size": 1})

    await assert_refuses(wire, "ListPosts", {"page_token": page.next_page_token, "page_size": 1})


async def test_accepts_token_with_another_page_size_and_view(wire: Wire, tokens: dict[str, str]) -> None:
    """They do not change the order of the rows."""
    token = tokens["ListUsers"]

    (page,) = await wire.call("ListUsers", {**USERS, "page_token": token, "page_size": 7, "view": 1})

    assert page.users


@pytest.mark.parametrize(
    ("order_by", "key"),
    [
        ("id", []),
        ("id", [1, 2]),
        ("id", ["1"]),
        ("id", [None]),
        ("id", [True]),
        ("id", [1.5]),
        ("id", [2**63]),
        ("id", [-(2**63) - 1]),
        ("id", {"1": 1}),
        ("id", "1"),
        ("email", [1]),
        ("email", ["a\0@example.org"]),
        ("email", ["\ud800"]),
        ("created_at", ["yesterday", 1]),
        ("created_at", ["0001-01-01T00:00:00+23:59", 1]),
        ("created_at", [1, 1]),
        ("created_at", ["2024-01-01T00:00:00+00:00"]),
    ],
)
async def test_refuses_forged_token(wire: Wire, order_by: str, key: Any) -> None:
    """Anyone can make a token with a valid checksum and an invalid key."""
    token = encode_token(fingerprint("users", "", order_by, False, 0), key)

    await assert_refuses(wire, "ListUsers", {"order_by": order_by, "page_token": token})


async def test_refuses_deeply_nested_token(wire: Wire) -> None:
    """It contains JSON, which Python reads recursively."""
    body = fingerprint("users", "", "id", False, 0) + b"[" * 40_000
    raw = VERSION + crc32(body).to_bytes(4, "big") + body

    await assert_refuses(wire, "ListUsers", {"page_token": urlsafe_b64encode(raw).decode().rstrip("=")})
