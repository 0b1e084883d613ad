"""What every repository does, shown with that of users."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Database
from service.db.paging import Keyset
from service.errors import UserNotFound, VersionMismatch
from service.users.model import User
from service.users.repository import SORTABLE, UserRepository
from service.wire import EPOCH, MICROSECOND
from tests.rows import add_users

THEN = datetime(2024, 1, 31, 12, 30, 0, 123456, tzinfo=UTC)
BY_ID = Keyset(SORTABLE["id"])


async def pages(
    database: Database, keyset: Keyset, limit: int, *, active: bool = False
) -> AsyncIterator[list[int]]:
    """Yield the ids of page after page, each read by a session of its own."""
    after: Any = []
    while after is not None:
        async with database.read() as session:
            conditions = [User.is_active] if active else []
            page = await UserRepository(session).list(
                *conditions, keyset=keyset, after=after or None, limit=limit
            )
        yield [user.id for user in page.rows]
        after = page.next_key


async def walked(database: Database, keyset: Keyset, limit: int) -> list[int]:
    return [id async for page in pages(database, keyset, limit) for id in page]


@pytest.fixture
async def session(database: Database) -> AsyncIterator[AsyncSession]:
    async with database.begin() as session:
        yield session


@pytest.fixture
async def users(session: AsyncSession) -> UserRepository:
    return UserRepository(session)


async def test_a_created_row_has_what_the_database_gave_it(users: UserRepository) -> None:
    """Id, version 1, and two times, which are the same."""
    user = await users.create({"email": "ada@example.org"})

    assert (user.id, user.version, user.is_active, user.full_name) == (1, 1, True, None)
    assert user.created_at == user.updated_at
    assert user.created_at.utcoffset() == timedelta(0)


async def test_gets_what_was_created(database: Database) -> None:
    """Another session reads the values that were written."""
    async with database.begin() as session:
        created = await UserRepository(session).create({"email": "ada@example.org", "full_name": "Ada"})

    async with database.read() as session:
        user = await UserRepository(session).get(created.id)
    assert (user.email, user.full_name, user.created_at) == ("ada@example.org", "Ada", created.created_at)


async def test_get_refuses_an_id_that_is_nobody_s(users: UserRepository) -> None:
    """There is no such user."""
    with pytest.raises(UserNotFound):
        await users.get(4711)


async def test_gets_many_in_the_order_asked_with_none_for_the_missing(database: Database) -> None:
    """The answer lines up with the question."""
    first, second, third = await add_users(database, 3)

    async with database.read() as session:
        found = await UserRepository(session).get_many([third, 4711, first, second])
    assert [user and user.id for user in found] == [third, None, first, second]


async def test_gets_none_of_no_ids(users: UserRepository) -> None:
    """Nothing asked, nothing answered."""
    assert await users.get_many([]) == []


@pytest.mark.parametrize(
    "time",
    [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        THEN,
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    ],
)
async def test_a_time_among_columns_is_its_microseconds(database: Database, time: datetime) -> None:
    """To the last one, in any year, and before 1970 too; a page's key is the time itself."""
    ids = await add_users(database, 2, created_at=time)
    keyset = Keyset(SORTABLE["created_at"])

    async with database.read() as session:
        page = await UserRepository(session).as_columns().list(keyset=keyset, limit=1)
    rows: Sequence[Any] = page.rows
    assert [EPOCH + row.created_at * MICROSECOND for row in rows] == [time]
    assert page.next_key == [time, ids[0]]


async def test_an_update_changes_what_it_names_and_counts_the_version(database: Database) -> None:
    """The row comes back as it is now: one version further, its time that of the change."""
    (id,) = await add_users(database, full_name="Ada", created_at=THEN, updated_at=THEN)

    async with database.begin() as session:
        updated = await UserRepository(session).update(id, {"is_active": False})
    assert (updated.is_active, updated.full_name, updated.version) == (False, "Ada", 2)
    assert updated.created_at == THEN
    assert abs(updated.updated_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_an_update_tells_of_a_row_that_was_read_before_what_it_is_now(users: UserRepository) -> None:
    """A session that has a row in hand already doesn't answer with the old one."""
    created = await users.create({"email": "ada@example.org"})

    assert (await users.update(created.id, {"full_name": "Ada"})).version == 2
    assert (await users.update(created.id, {"full_name": "Countess"})).full_name == "Countess"


async def test_an_update_may_name_the_version_that_it_expects(users: UserRepository) -> None:
    """The current version lets it through; an older one doesn't, and the error says the current one."""
    created = await users.create({"email": "ada@example.org"})
    await users.update(created.id, {"full_name": "Ada"}, version=1)

    with pytest.raises(VersionMismatch) as caught:
        await users.update(created.id, {"full_name": "Countess"}, version=1)
    assert caught.value.facts == {"version": 2}


async def test_an_update_refuses_an_id_that_is_nobody_s(users: UserRepository) -> None:
    """Whether with a version or without."""
    for version in (0, 1):
        with pytest.raises(UserNotFound):
            await users.update(4711, {"full_name": "Ada"}, version)


async def test_a_delete_removes_the_row(users: UserRepository) -> None:
    """A second one finds nothing."""
    created = await users.create({"email": "ada@example.org"})
    await users.delete(created.id)

    with pytest.raises(UserNotFound):
        await users.delete(created.id)


async def test_a_delete_may_name_the_version_that_it_expects(users: UserRepository) -> None:
    """An older version keeps the row; the current one deletes it."""
    created = await users.create({"email": "ada@example.org"})
    await users.update(created.id, {"full_name": "Ada"})

    with pytest.raises(VersionMismatch) as caught:
        await users.delete(created.id, version=1)
    assert caught.value.facts == {"version": 2}
    await users.delete(created.id, version=2)


async def test_a_list_has_as_many_rows_as_asked_for_and_says_whether_more_follow(database: Database) -> None:
    """The last page has no next key, even where it is full."""
    ids = await add_users(database, 6)

    assert [page async for page in pages(database, BY_ID, 4)] == [ids[:4], ids[4:]]
    assert [page async for page in pages(database, BY_ID, 3)] == [ids[:3], ids[3:]]


async def test_a_list_of_nothing_is_one_empty_page(database: Database) -> None:
    """No rows, no next key."""
    assert [page async for page in pages(database, BY_ID, 3)] == [[]]


async def test_a_walk_meets_every_row_once_and_in_order(database: Database) -> None:
    """In each order, both ways, and for any size of a page; ties are broken by the id.

    All users have one time, that of their transaction; their e-mails go the other way than their ids.
    """
    rows = [{"email": f"user{number}@example.org"} for number in range(20, 10, -1)]
    async with database.begin() as session:
        await session.execute(insert(User), rows)

    ids = list(range(1, 11))
    for field, descending, limit in product(SORTABLE, (False, True), (1, 3, 7, 10, 100)):
        expected = ids[::-1] if descending != (field == "email") else ids
        assert await walked(database, Keyset(SORTABLE[field], descending), limit) == expected


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("field", list(SORTABLE))
async def test_a_walk_is_stable_while_rows_come_and_go(
    database: Database, field: str, descending: bool
) -> None:
    """Who is there all the time is met once, whatever is created or deleted before and behind the reader."""
    ids = await add_users(database, 20)
    met, gone = [], set()
    async for page in pages(database, Keyset(SORTABLE[field], descending), 3):
        met += page
        leaving = {page[-1], ids[len(met) % 20]}
        gone |= leaving
        async with database.begin() as session:
            await session.execute(delete(User).where(User.id.in_(leaving)))
            if len(met) < 30:
                for email in (f"a{len(met)}@example.org", f"user5{len(met)}@example.org", f"z{len(met)}@x"):
                    await UserRepository(session).create({"email": email})

    assert len(met) == len(set(met))
    assert set(ids) - gone <= set(met)


async def test_a_list_keeps_to_its_conditions(database: Database) -> None:
    """Rows that don't meet them are on no page."""
    ids = await add_users(database, 6)
    async with database.begin() as session:
        for id in ids[::2]:
            await UserRepository(session).update(id, {"is_active": False})

    found = [id async for page in pages(database, BY_ID, 2, active=True) for id in page]
    assert found == ids[1::2]
