"""PostReader: single posts, many concurrent look-ups in one statement."""

from typing import Any

from service.db.engine import Database
from service.db.reads import LookupBatcher
from service.db.repository import shown
from service.posts.model import Post
from service.posts.repository import PostRepository


class PostReader:
    """Posts by id, without their authors."""

    def __init__(self, database: Database) -> None:
        self._posts = LookupBatcher(database, Post.id, shown(Post))

    async def get(self, id: int) -> Any:
        """Return a post's columns; raises PostNotFound."""
        post = await self._posts.get(id)
        if post is None:
            raise PostRepository.missing()
        return post

    async def close(self) -> None:
        """End what is under way."""
        await self._posts.close()
