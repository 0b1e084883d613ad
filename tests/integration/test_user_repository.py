"""The reads and writes that only users have."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import func, select

from roster.errors import EmailTaken, UserNotFound
from service.db.base import Session
from service.db.engine import Database
from service.db.paging import ListQuery
from service.db.selection import Row
from service.posts.model import Post
from service.settings import Settings
from service.users.model import User
from service.users.repository import WITH_POSTS, UserRepository
from tests.support.rival import find_blocked_by, until
from tests.support.rows import add_posts, add_users

ADA = "ada@example.org"


@pytest.fixture
async def users(database: Database) -> AsyncIterator[UserRepository[Session]]:
    async with database.begin() as session:
        yield UserRepository(session)


@pytest.fixture
async def concurrent(postgresql_url: str) -> AsyncIterator[Database]:
    """A database with several concurrent writers."""
    database = Database(Settings(database_url=postgresql_url))
    yield database
    await database.close()


async def test_gets_a_user_by_email(users: UserRepository[Session]) -> None:
    """By the complete e-mail, in its normal form."""
    created = await users.create({"email": ADA})

    assert (await users.get_by_email(ADA)).id == created.id
    for email in ("ada@example.or", "ADA@example.org", ""):
        with pytest.raises(UserNotFound):
            await users.get_by_email(email)


async def test_lists_active_users_page_by_page(users: UserRepository[Session]) -> None:
    """Inactive users are on no page."""
    created = [
        await users.create({"email": f"{number}@example.org", "is_active": number != 1})
        for number in range(4)
    ]

    first = await users.list_active(limit=2)
    rest = await users.list_active(limit=2, after=first.next_key)
    assert [*first.rows, *rest.rows] == [created[0], created[2], created[3]]
    assert rest.next_key is None


async def test_email_belongs_to_one_user(users: UserRepository[Session]) -> None:
    """Neither a new user nor an updated one gets it; the error has the id of its user."""
    ada = await users.create({"email": ADA})
    alan = await users.create({"email": "alan@example.org"})

    with pytest.raises(EmailTaken) as created:
        await users.create({"email": ADA})
    with pytest.raises(EmailTaken) as updated:
        await users.update(alan.id, {"email": ADA})
    assert [caught.value.facts for caught in (created, updated)] == [{"existing_id": ada.id}] * 2


async def test_update_may_set_the_same_email_again(users: UserRepository[Session]) -> None:
    """It belongs to the user itself."""
    ada = await users.create({"email": ADA})

    assert (await users.update(ada.id, {"email": ADA})).version == 2


async def test_email_is_free_after_an_update_or_a_delete(users: UserRepository[Session]) -> None:
    """Another user can have it then."""
    ada = await users.create({"email": ADA})
    await users.update(ada.id, {"email": "countess@example.org"})
    second = await users.create({"email": ADA})
    await users.delete(second.id)

    assert (await users.create({"email": ADA})).email == ADA


@pytest.mark.parametrize(
    "take",
    [
        lambda users: users.create({"email": ADA}),
        lambda users: users.update(1, {"email": ADA}),
    ],
    ids=["create", "update"],
)
async def test_one_of_two_concurrent_writes_gets_the_email(
    concurrent: Database, take: Callable[[UserRepository[Session]], Awaitable[Row]]
) -> None:
    """The second waits for the commit of the first, and then raises EmailTaken."""
    await add_users(concurrent, 1)

    async def second() -> None:
        async with concurrent.begin() as session:
            await take(UserRepository(session))

    async with concurrent.begin() as session:
        await UserRepository(session).create({"email": ADA})
        task = asyncio.create_task(second())
        await until(lambda: find_blocked_by(session))
    with pytest.raises(EmailTaken):
        await task


async def test_rows_do_not_have_the_hash_of_the_password(database: Database) -> None:
    """Neither those created nor those read."""
    async with database.begin() as session:
        created = await UserRepository(session).create({"email": ADA, "hashed_password": "$argon2id$"})
        with pytest.raises(AttributeError, match="hashed_password"):
            _ = created.hashed_password
    async with database.read() as session:
        stored = await UserRepository(session).get(created.id)
        with pytest.raises(AttributeError, match="hashed_password"):
            _ = stored.hashed_password


async def test_users_are_read_with_their_newest_posts(database: Database) -> None:
    """At most 50, the newest first and without their contents, by each kind of read."""
    ada, alan, idle = await add_users(database, 3)
    ids = await add_posts(database, [ada, alan] * 51 + [ada])
    newest = {ada: ids[::2][:-51:-1], alan: ids[1::2][:-51:-1], idle: []}

    async with database.read() as session:
        users = UserRepository(session)
        read = [
            [await users.get(id, WITH_POSTS) for id in (ada, alan, idle)],
            [user for user in await users.get_many([ada, 4711, alan, idle], WITH_POSTS) if user],
            (await users.page(ListQuery([], users.by_id(), None, 10), WITH_POSTS)).rows,
        ]
        with pytest.raises(AttributeError, match="content"):
            _ = read[0][0].posts[0].content
    for found in read:
        assert {user.id: [post.id for post in posts] for user, posts in found} == newest


async def test_posts_are_deleted_with_their_author(database: Database) -> None:
    """Posts of other users remain."""
    ada, alan = await add_users(database, 2)
    _, kept = await add_posts(database, [ada, alan])

    async with database.begin() as session:
        await UserRepository(session).delete(ada)
    async with database.read() as session:
        assert (await session.scalars(select(Post.id))).all() == [kept]


async def test_stronger_hash_replaces_only_the_hash_that_was_verified(users: UserRepository[Session]) -> None:
    """A password changed meanwhile remains; neither the version nor the time changes."""
    ada = await users.create({"email": ADA, "hashed_password": "weak"})

    stored = select(User.hashed_password).where(User.id == ada.id)
    await users.replace_hash(ada.id, "another", "stronger")
    assert await users.session.scalar(stored) == "weak"
    await users.replace_hash(ada.id, "weak", "stronger")
    assert await users.session.scalar(stored) == "stronger"
    assert await users.get(ada.id) == ada


async def test_repository_never_commits(database: Database) -> None:
    """Its writes are rolled back with the transaction."""

    async def write(session: Session) -> None:
        users = UserRepository(session)
        user = await users.create({"email": ADA})
        await users.update(user.id, {"full_name": "Ada"})
        await users.delete(user.id)
        await users.create({"email": ADA})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with database.begin() as session:
            await write(session)
    async with database.read() as reading:
        assert await reading.scalar(select(func.count()).select_from(User)) == 0
