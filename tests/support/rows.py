"""Rows written to a database and read from it without the API."""

from typing import Any

from sqlalchemy import insert, select

from service.db.engine import Database
from service.posts.model import Post
from service.users.model import User


async def add_users(database: Database, count: int = 1, **values: Any) -> list[int]:
    """Store users with the e-mails user0@example.org, user1@… and return their ids."""
    return await _add(database, User, [{"email": f"user{i}@example.org", **values} for i in range(count)])


async def add_posts(database: Database, author_ids: list[int], **values: Any) -> list[int]:
    """Store a post for each author named, as often as they are, and return the ids."""
    rows = [
        {"author_id": id, "title": f"Post {i}", "content": "", **values} for i, id in enumerate(author_ids)
    ]
    return await _add(database, Post, rows)


async def read_emails(database: Database) -> list[str]:
    """Return the e-mails of all users in the order of their ids."""
    async with database.read() as session:
        return list(await session.scalars(select(User.email).order_by(User.id)))


async def _add(database: Database, model: Any, rows: list[dict[str, Any]]) -> list[int]:
    statement = insert(model).returning(model.id, sort_by_parameter_order=True)
    async with database.begin() as session:
        return list(await session.scalars(statement, rows))
