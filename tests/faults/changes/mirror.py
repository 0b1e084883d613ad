"""A mirror of users and posts that is built from the feed, and the tables to compare it with."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from roster.v1.changes_pb2 import Change
from roster.v1.resources_pb2 import Post, User

RowKey = tuple[str, int]  # the table and the id of a row
Rows = dict[RowKey, tuple[Any, ...]]

PROBE = "probe"  # the e-mails and titles of the rows whose delay is measured begin with it
ORDER = ("user", "post", "deleted_post_id", "deleted_user_id")
TABLES = {Change.USERS: "users", Change.POSTS: "posts"}
SHOWN = 4  # rows that differ, in an error
MICROSECONDS = "(extract(epoch FROM {}) * 1000000)::bigint"
MICROSECONDS_OF_SQLITE = "(strftime('%s', substr({0}, 1, 19)) * 1000000 + substr({0}, 21))"
COLUMNS = {
    "users": "id, email, full_name, is_active, version, {created_at}, {updated_at}",
    "posts": "id, title, content, author_id, version, {created_at}, {updated_at}",
}


class Mirror:
    """Rows as the changes say, applied in the order of their arrival."""

    def __init__(self, tables: Iterable[str]) -> None:
        self.tables = set(tables)
        self.rows: Rows = {}
        self.arrivals: dict[RowKey, float] = {}  # of the probes, on the monotonic clock

    def apply(self, changes: Iterable[Change]) -> set[RowKey]:
        """Apply the changes of one response, and return the keys of their rows.

        Raises AssertionError for what the contract excludes: an order, or a row that comes twice.
        """
        names = []
        seen = set()
        for change in changes:
            name = change.WhichOneof("change") or ""
            names.append(name)
            if name == "user":
                key = self.put_user(change.user)
            elif name == "post":
                key = self.put_post(change.post)
            else:
                key = ("users" if name == "deleted_user_id" else "posts"), getattr(change, name)
                self.rows.pop(key, None)
            assert key not in seen, f"{key} is in one response twice"
            seen.add(key)
        assert names == sorted(names, key=ORDER.index), f"a response has {names}"
        assert {table for table, _ in seen} <= self.tables, "a response has entities that were not asked for"
        return seen

    def put_user(self, user: User) -> RowKey:
        """Store a user, and return its key."""
        full_name = user.full_name if user.HasField("full_name") else None
        times = user.created_at.ToMicroseconds(), user.updated_at.ToMicroseconds()
        row = (user.email, full_name, user.is_active, user.version, *times)
        return self._put(("users", user.id), row, is_probe=user.email.startswith(PROBE))

    def put_post(self, post: Post) -> RowKey:
        """Store a post, and return its key."""
        times = post.created_at.ToMicroseconds(), post.updated_at.ToMicroseconds()
        row = (post.title, post.content, post.author_id, post.version, *times)
        return self._put(("posts", post.id), row, is_probe=post.title.startswith(PROBE))

    def _put(self, key: RowKey, row: tuple[Any, ...], *, is_probe: bool) -> RowKey:
        self.rows[key] = row
        if is_probe:
            self.arrivals.setdefault(key, time.monotonic())
        return key

    def begin_again(self) -> None:
        """Forget all rows."""
        self.rows = {}

    def difference(self, stored: Mapping[RowKey, tuple[Any, ...]]) -> str:
        """Return how the mirror differs from the tables, nothing if they are equal."""
        expected = {key: row for key, row in stored.items() if key[0] in self.tables}
        if self.rows == expected:
            return ""
        missing = sorted(expected.keys() - self.rows.keys())
        surplus = sorted(self.rows.keys() - expected.keys())
        common = expected.keys() & self.rows.keys()
        old = sorted(key for key in common if self.rows[key] != expected[key])
        return (
            f"{len(missing)} rows are missing: {missing[:SHOWN]}; "
            f"{len(surplus)} should not exist: {surplus[:SHOWN]}; "
            f"{len(old)} are old: {[(key, self.rows[key], expected[key]) for key in old[:SHOWN]]}"
        )


def select_rows(table: str, *, is_sqlite: bool = False) -> str:
    """Return the statement that reads a table in the form of a mirror."""
    clock = MICROSECONDS_OF_SQLITE if is_sqlite else MICROSECONDS
    times = {name: clock.format(name) for name in ("created_at", "updated_at")}
    return f"SELECT {COLUMNS[table].format(**times)} FROM {table}"
