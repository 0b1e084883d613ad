"""Random changes of users and posts, for tests of copies that follow the change feed."""

from random import Random
from typing import Any

from sqlalchemy import delete, insert, select, update

from service.db.base import Session
from service.db.engine import Database
from service.posts.model import Post
from service.users.model import User

USERS = (User.id, User.email, User.full_name, User.is_active, User.version)
POSTS = (Post.id, Post.title, Post.content, Post.author_id, Post.version)
Rows = list[tuple[Any, ...]]


async def read_rows(database: Database) -> tuple[Rows, Rows]:
    """Return all users and posts, by id: id, three columns and version of each."""
    async with database.read() as session:
        users = (await session.execute(select(*USERS).order_by(User.id))).all()
        posts = (await session.execute(select(*POSTS).order_by(Post.id))).all()
    return [tuple(row) for row in users], [tuple(row) for row in posts]


class RandomChanges:
    """Changes rows without the API: everything that can happen to them happens."""

    def __init__(self, database: Database, seed: int) -> None:
        self._database = database
        self._seed, self._choice = seed, Random(seed)
        self._number = 0

    async def make(self, count: int) -> None:
        """Make some changes, each in a transaction of its own; there are at least two users."""
        for _ in range(count):
            self._number += 1
            change = self._choice.choice([_rename, _add_post, _trade_emails, _delete, _restore])
            async with self._database.begin() as session:
                ids = list(await session.scalars(select(User.id).order_by(User.id)))
                first, second = self._choice.sample(ids, 2)
                await change(session, first, second, f"{self._seed}x{self._number} é")


async def _rename(session: Session, first: int, second: int, text: str) -> None:
    for id, name in ((first, text), (second, None)):
        values = {"full_name": name, "is_active": False, "version": User.version + 1}
        await session.execute(update(User).where(User.id == id).values(**values))


async def _add_post(session: Session, first: int, second: int, text: str) -> None:
    await session.execute(insert(Post).values(title=f"Post {text}", content=f"{text}\n", author_id=first))
    await session.execute(update(Post).where(Post.author_id == second).values(content="", version=2))


async def _trade_emails(session: Session, first: int, second: int, text: str) -> None:
    rows = await session.execute(select(User.id, User.email).where(User.id.in_([first, second])))
    emails = {row.id: row.email for row in rows}
    for id, email in ((first, f"{text}@x.org"), (second, emails[first]), (first, emails[second])):
        await session.execute(update(User).where(User.id == id).values(email=email))


async def _delete(session: Session, first: int, second: int, text: str) -> None:
    """Delete a user with all posts, and add another one."""
    await session.execute(delete(User).where(User.id == first))
    await session.execute(insert(User).values(email=f"new {text}@x.org"))


async def _restore(session: Session, first: int, second: int, text: str) -> None:
    """Delete a user with all posts, and restore the user with a lower version."""
    await session.execute(delete(User).where(User.id == first))
    await session.execute(insert(User).values(id=first, email=f"old {text}@x.org", version=1))
