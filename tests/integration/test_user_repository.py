"""What only the repository of users does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Database
from service.errors import EmailTaken, UserNotFound
from service.posts.model import Post
from service.settings import Settings
from service.users.model import User
from service.users.repository import UserRepository
from tests.rows import add_posts, add_users

ADA = "ada@example.org"


@pytest.fixture
async def users(database: Database) -> AsyncIterator[UserRepository]:
    async with database.begin() as session:
        yield UserRepository(session)


@pytest.fixture
async def concurrent(postgresql_url: str) -> AsyncIterator[Database]:
    """A database that has several writers at once."""
    database = Database(Settings(database_url=postgresql_url))
    yield database
    await database.close()


async def test_gets_a_user_by_email(users: UserRepository) -> None:
    """By all of it, in the form in which it is stored."""
    created = await users.create({"email": ADA})

    assert (await users.get_by_email(ADA)).id == created.id
    for email in ("ada@example.or", "ADA@example.org", ""):
        with pytest.raises(UserNotFound):
            await users.get_by_email(email)


async def test_lists_active_users_page_by_page(users: UserRepository) -> None:
    """Those who are not active are on no page."""
    created = [
        await users.create({"email": f"{number}@example.org", "is_active": number != 1})
        for number in range(4)
    ]

    first = await users.list_active(limit=2)
    rest = await users.list_active(limit=2, after=first.next_key)
    assert [*first.rows, *rest.rows] == [created[0], created[2], created[3]]
    assert rest.next_key is None


async def test_an_email_is_taken_once(users: UserRepository) -> None:
    """Neither a new user nor a changed one gets it; the error says who has it."""
    ada = await users.create({"email": ADA})
    alan = await users.create({"email": "alan@example.org"})

    with pytest.raises(EmailTaken) as created:
        await users.create({"email": ADA})
    with pytest.raises(EmailTaken) as updated:
        await users.update(alan.id, {"email": ADA})
    assert [caught.value.facts for caught in (created, updated)] == [{"existing_id": ada.id}] * 2


async def test_a_user_may_be_given_the_email_that_it_has(users: UserRepository) -> None:
    """It is the user's own."""
    ada = await users.create({"email": ADA})

    assert (await users.update(ada.id, {"email": ADA})).version == 2


async def test_an_email_that_was_given_up_is_free(users: UserRepository) -> None:
    """After a change and after a delete."""
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
async def test_of_two_at_once_one_gets_the_email(
    concurrent: Database, take: Callable[[UserRepository], Awaitable[User]]
) -> None:
    """The second waits for the first one's commit, and is then told that the e-mail is taken."""
    await add_users(concurrent, 1)
    waiting = select(func.count()).select_from(text("pg_locks")).where(text("NOT granted"))

    async def second() -> None:
        async with concurrent.begin() as session:
            await take(UserRepository(session))

    async with concurrent.begin() as session:
        await UserRepository(session).create({"email": ADA})
        task = asyncio.create_task(second())
        while not await session.scalar(waiting):
            pass
    with pytest.raises(EmailTaken):
        await task


async def test_the_hash_of_a_password_does_not_come_along(database: Database) -> None:
    """Neither with what was created nor with what was read: touching it raises."""
    async with database.begin() as session:
        created = await UserRepository(session).create({"email": ADA, "hashed_password": "$argon2id$"})
        with pytest.raises(InvalidRequestError, match="hashed_password"):
            _ = created.hashed_password
    async with database.read() as session:
        stored = await UserRepository(session).get(created.id)
        with pytest.raises(InvalidRequestError, match="hashed_password"):
            _ = stored.hashed_password


async def test_posts_do_not_come_along_unless_asked_for(users: UserRepository) -> None:
    """A lazy load would be a statement a row: it raises."""
    user = await users.create({"email": ADA})

    with pytest.raises(InvalidRequestError, match=r"User\.posts"):
        _ = user.posts


async def test_a_user_comes_with_the_newest_posts_first(database: Database) -> None:
    """At most 50, in each way of reading users; a post's content is left out, and raises."""
    ada, alan, idle = await add_users(database, 3)
    ids = await add_posts(database, [ada, alan] * 51 + [ada])
    newest = {ada: ids[::2][:-51:-1], alan: ids[1::2][:-51:-1], idle: []}

    async with database.read() as session:
        users = UserRepository(session, with_posts=True)
        read = [
            [await users.get(id) for id in (ada, alan, idle)],
            [user for user in await users.get_many([ada, alan, idle]) if user],
            (await users.list(limit=10)).rows,
        ]
        with pytest.raises(AttributeError, match="content"):
            _ = read[0][0].posts[0].content
    for found in read:
        assert {user.id: [post.id for post in user.posts] for user in found} == newest


async def test_a_user_s_posts_go_with_the_user(database: Database) -> None:
    """Those of others stay."""
    ada, alan = await add_users(database, 2)
    _, kept = await add_posts(database, [ada, alan])

    async with database.begin() as session:
        await UserRepository(session).delete(ada)
    async with database.read() as session:
        assert (await session.scalars(select(Post.id))).all() == [kept]


async def test_a_stronger_hash_replaces_only_the_one_that_was_checked(users: UserRepository) -> None:
    """A password that was changed meanwhile stays; neither version nor time change."""
    ada = await users.create({"email": ADA, "hashed_password": "weak"})

    stored = select(User.hashed_password).where(User.id == ada.id)
    await users.replace_hash(ada.id, "another", "stronger")
    assert await users.session.scalar(stored) == "weak"
    await users.replace_hash(ada.id, "weak", "stronger")
    assert await users.session.scalar(stored) == "stronger"
    await users.session.refresh(ada)
    assert (ada.version, ada.updated_at) == (1, ada.created_at)


async def test_a_repository_never_commits(database: Database) -> None:
    """What it wrote goes with the unit of work that it was given."""

    async def write(session: AsyncSession) -> None:
        users = UserRepository(session)
        user = await users.create({"email": ADA})
        await users.update(user.id, {"full_name": "Ada"})
        await users.delete(user.id)
        await users.create({"email": ADA})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with database.begin() as session:
            await write(session)
    async with database.read() as session:
        assert (await UserRepository(session).list(limit=1)).rows == []
