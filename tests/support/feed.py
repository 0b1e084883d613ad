"""The change feed of a database, as a consumer sees it that keeps the users in a copy."""

from collections.abc import Sequence

from sqlalchemy import text

from roster.errors import FeedReset
from service.changes.feed import Feed
from service.changes.kinds import ENTITIES
from service.changes.token import Token
from service.db.engine import Database
from service.settings import Settings


class Consumer:
    """A server of its own, and the tokens that it has given out."""

    def __init__(self, url: str) -> None:
        self.database = Database(Settings(database_url=url))
        self.feed = Feed(self.database)

    async def token(self) -> Token:
        """Return the current position."""
        return (await self.feed.now()).for_entities(ENTITIES)

    async def changed_ids(self, token: Token) -> list[int]:
        """Return the ids of the users that have changed after a token, deleted ones included."""
        page = await self.feed.read(token)
        assert not page.has_more
        return sorted(change.user.id or change.deleted_user_id for change in page.changes)

    async def is_reset(self, token: Token) -> bool:
        """Return whether the feed has begun again since a token."""
        try:
            await self.feed.read(token)
        except FeedReset:
            return True
        return False

    async def entries(self) -> int:
        """Return the number of entries in the log."""
        async with self.database.read() as session:
            return int(await session.scalar(text("SELECT count(*) FROM changes")) or 0)

    async def execute(self, *statements: str) -> None:
        """Execute statements, each in a transaction of its own."""
        for statement in statements:
            async with self.database.begin() as session:
                await session.execute(text(statement))

    async def add_user(self, name: str) -> int:
        """Store a user, and return the id."""
        async with self.database.begin() as session:
            insert = text("INSERT INTO users (email) VALUES (:email) RETURNING id")
            return int(await session.scalar(insert, {"email": f"{name}@example.org"}) or 0)

    async def close(self) -> None:
        """Close all connections."""
        await self.database.close()


async def assert_begins_again(url: str, tokens: Sequence[Token]) -> None:
    """Check that no server accepts any of these tokens, and that a new feed works."""
    servers = [Consumer(url), Consumer(url)]
    try:
        for token in tokens:
            assert [await server.is_reset(token) for server in servers] == [True, True]
        assert [await server.entries() for server in servers] == [0, 0]
        fresh = await servers[0].token()
        id = await servers[1].add_user("later")
        assert [await server.changed_ids(fresh) for server in servers] == [[id], [id]]
    finally:
        for server in servers:
            await server.close()
