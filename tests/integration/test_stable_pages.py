"""Pages of ListUsers while rows are created and deleted between them.

A page is one statement, so that nothing can change within it.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.engine import Database
from service.users.model import User
from service.users.repository import UserRepository
from tests.support.server import serve

MOST_PAGES = 12 + 6 * 3 + 1  # one user a page, and an empty one
NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
FILTERS: dict[str, Callable[[User], bool]] = {
    "": lambda _: True,
    "full_name = null": lambda user: user.full_name is None,
    'full_name != "a"': lambda user: user.full_name not in (None, "a"),
    "NOT is_active = true OR full_name = null": lambda user: not user.is_active or user.full_name is None,
}

# Few times and few first letters: ties, and neighbours on both sides of a page's end.
new_users = st.fixed_dictionaries(
    {
        "email": st.sampled_from("aceA\U0001f600"),
        "full_name": st.sampled_from([None, "a", "b"]),
        "is_active": st.booleans(),
        "created_at": st.integers(0, 3).map(lambda hours: NOON + timedelta(hours=hours)),
    }
)


@dataclass(frozen=True)
class Change:
    """The users to create between two pages, and the positions of those to delete, modulo their number."""

    created: list[dict[str, Any]]
    deleted: list[int]


changes = st.builds(Change, st.lists(new_users, max_size=3), st.lists(st.integers(0, 99), max_size=3))


@pytest.fixture
async def users(database_url: str) -> AsyncIterator[UserServiceAsyncStub]:
    """A client of a server on the database."""
    async with serve(database_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield UserServiceStub(channel)


def row(message: UserMessage) -> User:
    """Return the row that a message shows."""
    return User(
        id=message.id,
        email=message.email,
        full_name=message.full_name if message.HasField("full_name") else None,
        is_active=message.is_active,
        created_at=message.created_at.ToDatetime(UTC),
    )


async def add(session: AsyncSession, rows: list[dict[str, Any]], numbers: Iterator[int]) -> None:
    if rows:
        emails = [f"{row['email']}{next(numbers)}@example.org" for row in rows]
        await session.execute(
            insert(User), [{**row, "email": email} for row, email in zip(rows, emails, strict=True)]
        )


async def remove(session: AsyncSession, numbers: list[int]) -> set[int]:
    """Delete some users, and return their ids."""
    ids = (await session.scalars(select(User.id).order_by(User.id))).all()
    chosen = {ids[number % len(ids)] for number in numbers if ids}
    await session.execute(delete(User).where(User.id.in_(chosen)))
    return chosen


# Each example begins by deleting what the one before it left, so they can share the database.
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    there=st.lists(new_users, min_size=1, max_size=12),
    between=st.lists(changes, max_size=6),
    field=st.sampled_from(sorted(UserRepository.sortable)),
    descending=st.booleans(),
    text=st.sampled_from(sorted(FILTERS)),
    page_size=st.integers(1, 4),
    with_posts=st.booleans(),
)
async def test_pages_show_each_remaining_user_once(
    database: Database,
    users: UserServiceAsyncStub,
    there: list[dict[str, Any]],
    between: list[Change],
    field: str,
    descending: bool,
    text: str,
    page_size: int,
    with_posts: bool,
) -> None:
    """Other users may be created and deleted between pages; holds in every order and direction."""
    numbers = count()
    async with database.begin() as session:
        await session.execute(delete(User))
        await add(session, there, numbers)
        staying = {user.id for user in await session.scalars(select(User)) if FILTERS[text](user)}

    order_by = f"{field} desc" if descending else field
    request = ListUsersRequest(filter=text, order_by=order_by, page_size=page_size)
    if with_posts:
        request.view = UserMessage.WITH_POSTS
    met: list[User] = []
    for change in [*between, *[Change([], [])] * MOST_PAGES]:
        page = await users.ListUsers(request)
        request.page_token = page.next_page_token
        met += map(row, page.users)
        if not request.page_token:
            break
        async with database.begin() as session:
            await add(session, change.created, numbers)
            staying -= await remove(session, change.deleted)

    keys = [tuple(getattr(user, column.key) for column in UserRepository.sortable[field]) for user in met]
    assert sorted(set(keys), reverse=descending) == keys
    assert all(FILTERS[text](user) for user in met)
    assert staying <= {user.id for user in met}
