"""Pages while rows come and go between them: a page is one statement, so in between is all there is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from roster.v1.users_pb2 import ListUsersRequest
from service.db.engine import Database
from service.users.model import User
from service.users.repository import WITH_POSTS, UserRepository

SORTABLE = UserRepository.sortable
MOST_PAGES = 12 + 6 * 3 + 1  # one user a page, and an empty one
NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
FILTERS: dict[str, Callable[[Any], bool]] = {
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
    """What happens between two pages; whom it deletes is counted round the users there are."""

    created: list[dict[str, Any]]
    deleted: list[int]


changes = st.builds(Change, st.lists(new_users, max_size=3), st.lists(st.integers(0, 99), max_size=3))


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
    field=st.sampled_from(sorted(SORTABLE)),
    descending=st.booleans(),
    text=st.sampled_from(sorted(FILTERS)),
    page_size=st.integers(1, 4),
    with_posts=st.booleans(),
)
async def test_a_user_that_stays_is_met_once_whoever_comes_and_goes(
    database: Database,
    there: list[dict[str, Any]],
    between: list[Change],
    field: str,
    descending: bool,
    text: str,
    page_size: int,
    with_posts: bool,
) -> None:
    """In every order and direction; none is met twice, and all come in order."""
    numbers = count()
    async with database.begin() as session:
        await session.execute(delete(User))
        await add(session, there, numbers)
        staying = {user.id for user in await session.scalars(select(User)) if FILTERS[text](user)}

    order_by = f"{field} desc" if descending else field
    request = ListUsersRequest(filter=text, order_by=order_by, page_size=page_size)
    met: list[Any] = []
    for change in [*between, *[Change([], [])] * MOST_PAGES]:
        async with database.read() as session:
            query = await UserRepository.list_query(request)
            page = await UserRepository(session).page(query, WITH_POSTS if with_posts else None)
        request.page_token = query.next_token(page)
        met += [row.user if with_posts else row for row in page.rows]
        if not request.page_token:
            break
        async with database.begin() as session:
            await add(session, change.created, numbers)
            staying -= await remove(session, change.deleted)

    keys = [tuple(getattr(user, column.key) for column in SORTABLE[field]) for user in met]
    assert sorted(set(keys), reverse=descending) == keys
    assert all(FILTERS[text](user) for user in met)
    assert staying <= {user.id for user in met}
