"""E-mails in several spellings, through the API: internationalised domains, and rows of earlier releases."""

from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import update

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkUpdateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from service.users.model import User as StoredUser
from tests.support.errors import refusal
from tests.support.load_stream import load_once
from tests.support.rows import add_users
from tests.support.users import list_users

UNICODE, ASCII = "ada@bücher.de", "ada@xn--bcher-kva.de"
SPELLINGS = [
    UNICODE,
    ASCII,
    "Ada@BÜCHER.de",
    "ada@bu\u0308cher.de",
    "ADA@XN--BCHER-KVA.DE",
    "ada@bücher。de.",
]
# As earlier releases stored them.
STORED = [ASCII, "a\u200bda@example.org", "<ada@example.org>", "ada@\uff45xample.org", "ada@example.net."]
PASSWORD = "correct horse"
# Filters that find a user stored in Unicode, whole and in part.
FOUND_BY = [
    'email = "ada@XN--bcher-kva.de"',
    'email = "Ada@BÜ*"',
    'email = "*@xn--bcher-kva.de"',
    'email = "*@bücher.DE"',
    'email = "*da@xn--bcher-kva*"',
    'email : "@xn--bcher-kva."',
    'email : "*BÜCHER*"',
    'email != "*@bucher.de"',
    'email:* AND -email : "bucher" AND -email = "*.org"',
]


async def create_in_bulk(users: UserServiceAsyncStub, *emails: str, **options: Any) -> Any:
    request = BulkCreateUsersRequest(
        options=BulkOptions(return_ids=True, **options),
        users=[User(email=email) for email in emails],
        finish=True,
    )
    return await load_once(users.BulkCreateUsers, request)


async def create_posts_by(posts: PostServiceAsyncStub, *emails: str) -> Any:
    rows = [Post(title="Notes", author_email=email) for email in emails]
    request = BulkCreatePostsRequest(options=BulkOptions(), posts=rows, finish=True)
    return await load_once(posts.BulkCreatePosts, request)


@pytest.mark.parametrize("first", SPELLINGS)
async def test_spellings_of_a_domain_are_one_user(users: UserServiceAsyncStub, first: str) -> None:
    """In creates, updates, look-ups, filters and logins, single and in bulk."""
    created = await users.CreateUser(CreateUserRequest(user=User(email=first, password=PASSWORD)))
    other = await users.CreateUser(CreateUserRequest(user=User(email="bob@example.org")))

    assert created.email == UNICODE
    for email in SPELLINGS:
        assert await users.GetUser(GetUserRequest(email=email)) == created
        found = await users.ListUsers(ListUsersRequest(filter=f'email = "{email}"'))
        assert list(found.users) == [created]
        login = await users.VerifyPassword(VerifyPasswordRequest(email=email, password=PASSWORD))
        assert login.valid
        for write in (
            users.CreateUser(CreateUserRequest(user=User(email=email))),
            users.UpdateUser(UpdateUserRequest(user=User(id=other.id, email=email))),
        ):
            taken = await refusal(write)
            assert (taken.reason, taken.facts) == ("EMAIL_TAKEN", {"existing_id": str(created.id)})
    ack = await create_in_bulk(users, *SPELLINGS, on_conflict=BulkOptions.SKIP)
    assert (ack.skipped, set(ack.ids)) == (len(SPELLINGS), {created.id})


@pytest.mark.parametrize("text", FOUND_BY)
async def test_filters_find_both_forms_of_a_domain(users: UserServiceAsyncStub, text: str) -> None:
    """Whole e-mails and parts of them are normalised as the stored one was, in lists and exports."""
    ada = await users.CreateUser(CreateUserRequest(user=User(email=UNICODE)))
    await users.CreateUser(CreateUserRequest(user=User(email="bob@bucher.de")))
    await users.CreateUser(CreateUserRequest(user=User(email="cyd@example.org")))
    restricted = f'{text} AND email != "cyd@example.org"'

    page = await users.ListUsers(ListUsersRequest(filter=restricted))
    exported = [message async for message in users.ExportUsers(ExportUsersRequest(filter=restricted))]

    assert list(page.users) == [ada]
    assert [user for message in exported for user in message.users] == [ada]


@pytest.mark.parametrize("view", [User.BASIC, User.WITH_POSTS])
@pytest.mark.parametrize("stored", STORED)
async def test_rows_of_earlier_releases_are_found_and_updatable(
    server: Server, users: UserServiceAsyncStub, stored: str, view: User.View.ValueType
) -> None:
    """By the spelling that was stored, which stays until the e-mail is written again."""
    [id] = await add_users(server.database, email=stored)

    found = await users.GetUser(GetUserRequest(email=stored, view=view))
    listed = await users.ListUsers(ListUsersRequest(filter=f'email = "{stored}"'))
    renamed = await users.UpdateUser(UpdateUserRequest(user=User(id=id, full_name="Ada")))

    assert (found.id, found.email) == (id, stored)
    assert [user.id for user in listed.users] == [id]
    assert (renamed.email, renamed.full_name) == (stored, "Ada")


async def test_earlier_spelling_is_taken_found_and_replaced(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """A domain that was stored in ASCII form counts as its Unicode form."""
    hashed = (await users.CreateUser(CreateUserRequest(user=User(email="x@y", password=PASSWORD)))).id
    [id] = await add_users(server.database, email=ASCII)

    assert (await users.GetUser(GetUserRequest(email=UNICODE))).id == id
    taken = await refusal(users.CreateUser(CreateUserRequest(user=User(email=UNICODE))))
    moved = await refusal(users.UpdateUser(UpdateUserRequest(user=User(id=hashed, email=UNICODE))))
    assert taken.facts == moved.facts == {"existing_id": str(id)}

    replaced = await users.UpdateUser(UpdateUserRequest(user=User(id=id, email=ASCII)))
    assert replaced.email == UNICODE


async def test_password_of_earlier_spelling_is_verified(server: Server, users: UserServiceAsyncStub) -> None:
    """In either form of the domain."""
    await users.CreateUser(CreateUserRequest(user=User(email="x@y", password=PASSWORD)))
    async with server.database.begin() as session:
        await session.execute(update(StoredUser).values(email=ASCII))

    for email in SPELLINGS:
        login = await users.VerifyPassword(VerifyPasswordRequest(email=email, password=PASSWORD))
        assert login.user.email == ASCII


@pytest.mark.parametrize("mode", ["FAIL", "SKIP", "UPDATE"])
async def test_bulk_create_meets_earlier_spelling(
    server: Server, users: UserServiceAsyncStub, mode: str
) -> None:
    """Whatever is to be done with the rows in conflict; the others are created."""
    [id] = await add_users(server.database, email=ASCII)
    mask = FieldMask(paths=["full_name"]) if mode == "UPDATE" else None

    ack = await create_in_bulk(
        users, "bob@example.org", UNICODE, on_conflict=BulkOptions.OnConflict.Value(mode), update_mask=mask
    )

    counts = {"FAIL": ack.failed, "SKIP": ack.skipped, "UPDATE": ack.updated}
    assert (ack.created, counts[mode]) == (1, 1)
    assert [failure.existing_id for failure in ack.failures] == [id] * (mode == "FAIL")
    assert [user.email for user in await list_users(users)] == [ASCII, "bob@example.org"]


async def test_bulk_update_meets_earlier_spelling(server: Server, users: UserServiceAsyncStub) -> None:
    """Another row can't take it, and its own row gets the normal form."""
    [id] = await add_users(server.database, email=ASCII)
    bob = await users.CreateUser(CreateUserRequest(user=User(email="bob@example.org")))
    rows = [User(id=bob.id, email=UNICODE), User(id=id, email=ASCII)]
    options = BulkOptions(update_mask=FieldMask(paths=["email"]))

    ack = await load_once(
        users.BulkUpdateUsers, BulkUpdateUsersRequest(options=options, users=rows, finish=True)
    )

    assert [(failure.offset, failure.reason) for failure in ack.failures] == [(0, "EMAIL_TAKEN")]
    assert [user.email for user in await list_users(users)] == [UNICODE, "bob@example.org"]


async def test_author_is_found_by_every_spelling(
    server: Server, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Also one of an earlier release, which a new user could not have."""
    await add_users(server.database, email="a\u200bda@example.org")
    await add_users(server.database, email=ASCII)
    await add_users(server.database, email="bob@例え.jp")

    ack = await create_posts_by(
        posts, "a\u200bda@example.org", UNICODE, ASCII, "bob@xn--r8jz45g.jp", "no@bücher.de"
    )

    assert [(failure.offset, failure.reason) for failure in ack.failures] == [(4, "AUTHOR_NOT_FOUND")]


@pytest.mark.parametrize(
    ("email", "message"),
    [
        ("ad\u200ba@example.org", "email must not contain the invisible character U+200B"),
        ("\ufeffada@example.org", "email must not contain the invisible character U+FEFF"),
        ("ada@exam\u202cple.org", "email must not contain the invisible character U+202C"),
        ("<ada@example.org>", "email must be one address alone, without the character U+003C (<)"),
        ("ada@example.org,", "email must be one address alone, without the character U+002C (,)"),
    ],
)
async def test_invisible_characters_and_separators_are_refused(
    users: UserServiceAsyncStub, email: str, message: str
) -> None:
    """In single and in bulk writes, by the same sentence."""
    ack = await create_in_bulk(users, email, "bob@example.org")
    single = await refusal(users.CreateUser(CreateUserRequest(user=User(email=email))))

    assert [failure.message for failure in ack.failures] == [message]
    assert single.message == f"user.{message}"
    assert [user.email for user in await list_users(users)] == ["bob@example.org"]
