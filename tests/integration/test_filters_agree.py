from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import insert, select

from service.db.engine import Database
from service.db.repository import Repository
from service.posts.model import Post
from service.posts.repository import PostRepository
from service.users.model import User
from service.users.repository import UserRepository
from tests.support.filter_model import (
    POSTS,
    USERS,
    Node,
    PostRow,
    UserRow,
    matches,
    post_filters,
    user_filters,
    write_filter,
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
    database: Database,
    repository: type[Repository[Any, Any]],
    node: Node,
    rows: Sequence[UserRow | PostRow],
) -> None:
    model: Any = repository.model
    conditions = await repository.conditions(write_filter(node))
    async with database.read() as session:
        found = await session.scalars(select(model.id).where(*conditions).order_by(model.id))
        assert found.all() == [row.id for row in rows if matches(node, row)]


@sharing
@given(node=user_filters)
async def test_databases_find_the_users_of_the_model(filled: Database, node: Node) -> None:
    """The model evaluates a random filter in plain Python with three-valued logic."""
    await agrees(filled, UserRepository, node, USERS)


@sharing
@given(node=post_filters)
async def test_databases_find_the_posts_of_the_model(filled: Database, node: Node) -> None:
    """The same for the fields of posts."""
    await agrees(filled, PostRepository, node, POSTS)


@pytest.mark.parametrize(("repository", "row"), [(UserRepository, USERS[0]), (PostRepository, POSTS[0])])
def test_model_has_every_field_of_a_filter(
    repository: type[Repository[Any, Any]], row: UserRow | PostRow
) -> None:
    """`content` is stored, but is not a field of filters."""
    assert set(row._fields) - {"content"} == set(repository.filterable)
