"""Keep an exact copy of users and posts in SQLite. Kill it at any time and run it again: it continues."""

import asyncio
import os
import sqlite3
import sys
from typing import Any

from roster.client import Backoff, FeedReset, RosterError, TokenExpired, channel, watch_changes
from roster.v1 import posts_pb2, users_pb2
from roster.v1.changes_pb2 import Change
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.users_pb2_grpc import UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")
# No key but the id: two users can trade their e-mails, and a post can arrive before its author.
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS user (id INTEGER PRIMARY KEY, email, full_name, is_active, updated, version);
CREATE TABLE IF NOT EXISTS post (id INTEGER PRIMARY KEY, title, content, author_id, updated, version);
CREATE TABLE IF NOT EXISTS feed (id INTEGER PRIMARY KEY, token);
"""


def write(db: sqlite3.Connection, kind: str, row: Any) -> None:
    """Store a row, or delete the one with an id."""
    if kind == "user":
        full_name = row.full_name if row.HasField("full_name") else None
        values = (row.id, row.email, full_name, row.is_active, row.updated_at.ToMicroseconds(), row.version)
        db.execute("REPLACE INTO user VALUES (?, ?, ?, ?, ?, ?)", values)
    elif kind == "post":
        values = (row.id, row.title, row.content, row.author_id, row.updated_at.ToMicroseconds(), row.version)
        db.execute("REPLACE INTO post VALUES (?, ?, ?, ?, ?, ?)", values)
    else:
        table = "user" if kind == "deleted_user_id" else "post"
        db.execute(f"DELETE FROM {table} WHERE id = ?", [row])  # noqa: S608


async def copy(db: sqlite3.Connection, connection: Any) -> str:
    """Replace all rows by exports, in one transaction, and return the token of their beginning."""
    token = ""
    with db:
        db.execute("DELETE FROM user")
        db.execute("DELETE FROM post")
        async for users in UserServiceStub(connection).ExportUsers(users_pb2.ExportUsersRequest()):
            token = token or users.watch_token  # of the first message
            for user in users.users:
                write(db, "user", user)
        async for posts in PostServiceStub(connection).ExportPosts(posts_pb2.ExportPostsRequest()):
            for post in posts.posts:
                write(db, "post", post)
        if not token:  # it would mean now, and changes since the export would be missing
            raise SystemExit("the server has no change feed: its exports have no watch_token")
        db.execute("REPLACE INTO feed VALUES (1, ?)", [token])
    return token


async def main(path: str) -> None:
    db, backoff = sqlite3.connect(path), Backoff(max_retries=sys.maxsize, retry_connect=True)
    db.executescript(SCHEMA)
    async with channel(ADDRESS) as connection:
        while True:
            try:
                [token] = db.execute("SELECT token FROM feed").fetchone() or [await copy(db, connection)]
                async for response in watch_changes(connection, token, [Change.USERS, Change.POSTS]):
                    with db:  # all changes in the order received, and the token
                        for change in response.changes:
                            kind = change.WhichOneof("change") or ""
                            write(db, kind, getattr(change, kind))
                        db.execute("REPLACE INTO feed VALUES (1, ?)", [response.token])
            except (FeedReset, TokenExpired):
                with db:
                    db.execute("DELETE FROM feed")  # and copy everything again
            except RosterError as error:
                await backoff.wait(error)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "mirror.db"))
