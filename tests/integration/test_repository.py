"""The reads and writes that all repositories have, tested with users."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import delete, insert

from roster.errors import UserNotFound, VersionMismatch
from service.db.base import Session
from service.db.engine import Database
from service.db.paging import Keyset, ListQuery
from service.users.model import User
from service.users.repository import UserRepository
from service.wire import EPOCH, MICROSECOND
from tests.support.rows import add_users

THEN = datetime(2024, 1, 31, 12, 30, 0, 123456, tzinfo=UTC)
SORTABLE = UserRepository.sortable
BY_ID = Keyset(SORTABLE["id"])


async def pages(
    database: Database, keyset: Keyset, limit: int, *, active: bool = False
) -> AsyncIterator[list[int]]:
    """Yield the ids of page after page, each read by a session of its own."""
    after: Any = []
    while after is not None:
        async with database.read() as session:
            conditions = [User.is_active.expression] if active else []
            query = ListQuery(conditions, keyset, after or None, limit)
            page = await UserRepository(session).page(query)
        yield [user.id for user in page.rows]
        after = page.next_key


def time_of(microseconds: int) -> datetime:
    return EPOCH + microseconds * MICROSECOND


async def walk(database: Database, keyset: Keyset, limit: int) -> list[int]:
    return [id async for page in pages(database, keyset, limit) for id in page]


@pytest.fixture
async def session(database: Database) -> AsyncIterator[Session]:
    async with database.begin() as session:
        yield session


@pytest.fixture
async def users(session: Session) -> UserRepository[Session]:
    return UserRepository(session)


async def test_create_returns_the_values_that_the_database_adds(users: UserRepository[Session]) -> None:
    """An id, version 1, and two equal times."""
    user = await users.create({"email": "ada@example.org"})

    assert (user.id, user.version, user.is_active, user.full_name) == (1, 1, True, None)
    assert user.created_at == user.updated_at
    assert abs(time_of(user.created_at) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_gets_what_was_created(database: Database) -> None:
    """Another session reads the values that were written."""
    async with database.begin() as session:
        created = await UserRepository(session).create({"email": "ada@example.org", "full_name": "Ada"})

    async with database.read() as session:
        user = await UserRepository(session).get(created.id)
    assert (user.email, user.full_name, user.created_at) == ("ada@example.org", "Ada", created.created_at)


async def test_get_raises_not_found_for_unknown_ids(users: UserRepository[Session]) -> None:
    """The error is the entity's own."""
    with pytest.raises(UserNotFound):
        await users.get(4711)


async def test_get_many_keeps_the_order_and_returns_none_for_missing_ids(database: Database) -> None:
    """The result has one element for each id."""
    first, second, third = await add_users(database, 3)

    async with database.read() as session:
        found = await UserRepository(session).get_many([third, 4711, first, second])
    assert [user and user.id for user in found] == [third, None, first, second]


async def test_get_many_accepts_an_empty_list(users: UserRepository[Session]) -> None:
    """The result is empty too."""
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
async def test_times_are_microseconds_since_1970(database: Database, time: datetime) -> None:
    """Exactly, in any year, and before 1970 too; the key of a page is the time itself."""
    ids = await add_users(database, 2, created_at=time)
    keyset = Keyset(SORTABLE["created_at"])

    async with database.read() as session:
        page = await UserRepository(session).page(ListQuery([], keyset, None, 1))
    assert [time_of(row.created_at) for row in page.rows] == [time]
    assert page.next_key == [time, ids[0]]


async def test_update_changes_the_given_columns_and_increments_the_version(database: Database) -> None:
    """The updated row is returned, with the time of the update."""
    (id,) = await add_users(database, full_name="Ada", created_at=THEN, updated_at=THEN)

    async with database.begin() as session:
        updated = await UserRepository(session).update(id, {"is_active": False})
    assert (updated.is_active, updated.full_name, updated.version) == (False, "Ada", 2)
    assert time_of(updated.created_at) == THEN
    assert abs(time_of(updated.updated_at) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_update_returns_the_row_as_it_is_now(users: UserRepository[Session]) -> None:
    """Also if the same session has read it before."""
    created = await users.create({"email": "ada@example.org"})

    assert (await users.update(created.id, {"full_name": "Ada"})).version == 2
    assert (await users.update(created.id, {"full_name": "Countess"})).full_name == "Countess"


async def test_update_checks_the_expected_version(users: UserRepository[Session]) -> None:
    """For an older version, the error has the current one."""
    created = await users.create({"email": "ada@example.org"})
    await users.update(created.id, {"full_name": "Ada"}, version=1)

    with pytest.raises(VersionMismatch) as caught:
        await users.update(created.id, {"full_name": "Countess"}, version=1)
    assert caught.value.facts == {"version": 2}


async def test_update_raises_not_found_for_unknown_ids(users: UserRepository[Session]) -> None:
    """With an expected version and without."""
    for version in (0, 1):
        with pytest.raises(UserNotFound):
            await users.update(4711, {"full_name": "Ada"}, version)


async def test_delete_removes_the_row(users: UserRepository[Session]) -> None:
    """A second delete raises NotFound."""
    created = await users.create({"email": "ada@example.org"})
    await users.delete(created.id)

    with pytest.raises(UserNotFound):
        await users.delete(created.id)


async def test_delete_checks_the_expected_version(users: UserRepository[Session]) -> None:
    """An older version keeps the row, the current version deletes it."""
    created = await users.create({"email": "ada@example.org"})
    await users.update(created.id, {"full_name": "Ada"})

    with pytest.raises(VersionMismatch) as caught:
        await users.delete(created.id, version=1)
    assert caught.value.facts == {"version": 2}
    await users.delete(created.id, version=2)


async def test_page_has_at_most_limit_rows_and_a_key_if_more_follow(database: Database) -> None:
    """The last page has no next key, even if it is full."""
    ids = await add_users(database, 6)

    assert [page async for page in pages(database, BY_ID, 4)] == [ids[:4], ids[4:]]
    assert [page async for page in pages(database, BY_ID, 3)] == [ids[:3], ids[3:]]


async def test_empty_table_is_one_empty_page(database: Database) -> None:
    """It has no next key."""
    assert [page async for page in pages(database, BY_ID, 3)] == [[]]


async def test_pages_have_every_row_once_and_in_order(database: Database) -> None:
    """In each order, in both directions, and for any page size; ids break ties.

    All users have the same time, that of their transaction; the order of their e-mails is that of their ids,
    reversed.
    """
    rows = [{"email": f"user{number}@example.org"} for number in range(20, 10, -1)]
    async with database.begin() as session:
        await session.execute(insert(User), rows)

    ids = list(range(1, 11))
    for field, descending, limit in product(SORTABLE, (False, True), (1, 3, 7, 10, 100)):
        expected = ids[::-1] if descending != (field == "email") else ids
        assert await walk(database, Keyset(SORTABLE[field], descending), limit) == expected


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("field", list(SORTABLE))
async def test_pages_are_stable_while_rows_are_created_and_deleted(
    database: Database, field: str, descending: bool
) -> None:
    """Every row that exists all the time is on one page, whatever is created or deleted around it."""
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


async def test_pages_have_only_rows_that_meet_the_conditions(database: Database) -> None:
    """In any number of pages."""
    ids = await add_users(database, 6)
    async with database.begin() as session:
        for id in ids[::2]:
            await UserRepository(session).update(id, {"is_active": False})

    found = [id async for page in pages(database, BY_ID, 2, active=True) for id in page]
    assert found == ids[1::2]
