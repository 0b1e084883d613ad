from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import insert, select

from service.db.engine import Database
from service.db.listing import Listing
from service.posts.model import Post
from service.posts.servicer import LISTING as POST_LISTING
from service.users.model import User
from service.users.servicer import LISTING as USER_LISTING
from tests.filter_model import (
    POSTS,
    USERS,
    Node,
    PostRow,
    UserRow,
    matches,
    post_filters,
    user_filters,
    written,
)

# All examples read the same rows, so they can share the database.
sharing = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
async def filled(database: Database) -> Database:
    async with database.begin() as session:
        await session.execute(insert(User), [row._asdict() for row in USERS])
        await session.execute(insert(Post), [row._asdict() for row in POSTS])
    return database


async def agrees(
    database: Database, model: Any, listing: Listing, node: Node, rows: Sequence[UserRow | PostRow]
) -> None:
    conditions = await listing.conditions(written(node))
    async with database.read() as session:
        found = await session.scalars(select(model.id).where(*conditions).order_by(model.id))
        assert found.all() == [row.id for row in rows if matches(node, row)]


@sharing
@given(node=user_filters)
async def test_both_databases_find_the_users_that_the_model_says(filled: Database, node: Node) -> None:
    """A random filter finds on either database what three-valued logic in plain Python finds."""
    await agrees(filled, User, USER_LISTING, node, USERS)


@sharing
@given(node=post_filters)
async def test_both_databases_find_the_posts_that_the_model_says(filled: Database, node: Node) -> None:
    """The same for the fields of posts."""
    await agrees(filled, Post, POST_LISTING, node, POSTS)


@pytest.mark.parametrize(("listing", "row"), [(USER_LISTING, USERS[0]), (POST_LISTING, POSTS[0])])
def test_the_model_has_every_field_of_a_filter(listing: Listing, row: UserRow | PostRow) -> None:
    """None is left out of the comparison; `content` is stored, but no field of a filter."""
    assert set(row._fields) - {"content"} == set(listing.filterable)
