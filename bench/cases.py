"""The cases of `make bench-bulk`: each sends rows through the service and to a reference."""

import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.databases import COPY_USERS, PSQL
from bench.measure import Approach
from bench.rows import (
    BATCH,
    add_duplicates,
    any_hash,
    bulk_options,
    change_message,
    copy_text,
    make_changes,
    make_posts,
    make_users,
    post_message,
    requests,
    user_message,
)
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    UserKey,
)

COPY_POSTS = r"\copy posts (title, content, author_id) from '{file}'"
COPY_CHANGES = """\
CREATE TEMPORARY TABLE changes (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id bigint, full_name text, is_active boolean
);
\\copy changes (id, full_name, is_active) from '{file}'
"""
UPDATE = """\
UPDATE users SET full_name = changes.full_name, is_active = changes.is_active,
    version = version + 1, updated_at = now()
FROM changes WHERE users.id = changes.id AND position BETWEEN {first} AND {last};
"""
DELETE = """\
CREATE TEMPORARY TABLE keys (id bigint);
\\copy keys from '{file}'
DELETE FROM users USING keys WHERE users.id = keys.id;
"""
COUNT_USERS = "SELECT count(*) FROM users"


@dataclass(frozen=True)
class Case:
    """An approach and its reference. Afterwards the query `check` must return `result` in both databases."""

    name: str
    title: str
    approach: Approach
    reference: Approach
    check: str
    result: int
    database: Literal["postgresql", "sqlite"] = "postgresql"
    users: Path | None = None  # the users in the database at the start


class Cases:
    """Creates the cases, and writes their rows to files in a folder."""

    def __init__(self, folder: Path, rows: int, load_id: str) -> None:
        self._folder = folder
        self._rows = rows
        self._load_id = load_id

    def case(self, name: str) -> Case:
        """Return the case of this name, which is a method."""
        case: Case = getattr(self, name)()
        return case

    def create(self) -> Case:
        r"""Create users without duplicates; the reference is \copy."""
        users = make_users(self._rows)
        reference = self._psql("create", COPY_USERS, users)
        approach = self._create_users("create", users, len(users))
        return Case("create", "create, clean rows", approach, reference, COUNT_USERS, len(users))

    def hashes(self) -> Case:
        r"""Create users whose hashes are of several algorithms; the reference is \copy."""
        users = make_users(self._rows, any_hash)
        reference = self._psql("hashes", COPY_USERS, users)
        approach = self._create_users("hashes", users, len(users))
        title = "create, hashes of 4 algorithms"
        return Case("hashes", title, approach, reference, COUNT_USERS, len(users))

    def duplicates(self) -> Case:
        r"""Create users of which every tenth is a duplicate; the reference is \copy of the distinct ones."""
        users = add_duplicates(make_users(self._rows))
        distinct = list(dict.fromkeys(users))
        reference = self._psql("duplicates", COPY_USERS, distinct)
        approach = self._create_users("duplicates", users, len(distinct), on_conflict=BulkOptions.SKIP)
        title = "create, 10 % duplicates, SKIP"
        return Case("duplicates", title, approach, reference, COUNT_USERS, len(distinct))

    def posts(self) -> Case:
        r"""Create posts by the e-mails of their authors; the reference is \copy with their ids."""
        users = make_users(self._rows // 5)
        posts = make_posts(self._rows * 2 // 5, len(users))
        messages = [post_message(post, users) for post in posts]
        stream = requests(BulkCreatePostsRequest, "posts", messages, bulk_options(self._load_id))
        return Case(
            "posts",
            "create posts by author_email",
            self._stream(
                "PostService/BulkCreatePosts", "posts", stream, _counts(len(posts), created=len(posts))
            ),
            self._psql("posts", COPY_POSTS, posts),
            "SELECT sum(author_id) FROM posts",
            sum(author_id for *_, author_id in posts),
            users=self._write("authors.txt", copy_text(users).encode()),
        )

    def update(self) -> Case:
        r"""Update users by id; the reference is \copy into a temporary table and UPDATE … FROM in batches."""
        users = make_users(self._rows * 2 // 5)
        changes = make_changes(users)
        batches = range(1, len(changes) + 1, BATCH)
        script = COPY_CHANGES + "".join(UPDATE.format(first=at, last=at + BATCH - 1) for at in batches)
        options = bulk_options(self._load_id, update_mask={"paths": ["full_name", "is_active"]})
        stream = requests(BulkUpdateUsersRequest, "users", list(map(change_message, changes)), options)
        counts = _counts(len(changes), updated=len(changes))
        return Case(
            "update",
            "update by id",
            self._stream("UserService/BulkUpdateUsers", "update", stream, counts),
            self._psql("update", script, changes, r"psql \copy + UPDATE … FROM"),
            f"{COUNT_USERS} WHERE version = 2 AND full_name LIKE '% II'",
            len(changes),
            users=self._write("updated.txt", copy_text(users).encode()),
        )

    def delete(self) -> Case:
        r"""Delete users without posts by id; the reference is \copy and DELETE … USING."""
        users = make_users(self._rows)
        ids = range(1, len(users) + 1)
        messages = [UserKey(id=id) for id in ids]
        stream = requests(BulkDeleteUsersRequest, "users", messages, bulk_options(self._load_id))
        counts = _counts(len(users), deleted=len(users))
        return Case(
            "delete",
            "delete by id",
            self._stream("UserService/BulkDeleteUsers", "delete", stream, counts),
            self._psql("delete", DELETE, [(id,) for id in ids], r"psql \copy + DELETE … USING"),
            COUNT_USERS,
            0,
            users=self._write("deleted.txt", copy_text(users).encode()),
        )

    def sqlite(self) -> Case:
        """Create users on SQLite; the reference is Python's sqlite3."""
        users = make_users(self._rows)
        reference = self._python("sqlite3 executemany", "executemany", users)
        approach = self._create_users("sqlite", users, len(users))
        return Case("sqlite", "create, SQLite", approach, reference, COUNT_USERS, len(users), "sqlite")

    def _create_users(self, name: str, users: Sequence[Any], distinct: int, **options: Any) -> Approach:
        options = bulk_options(self._load_id, **options)
        stream = requests(BulkCreateUsersRequest, "users", list(map(user_message, users)), options)
        counts = _counts(len(users), created=distinct, skipped=len(users) - distinct)
        return self._stream("UserService/BulkCreateUsers", name, stream, counts)

    def _stream(self, method: str, name: str, stream: list[bytes], counts: dict[str, int]) -> Approach:
        file = self._write(f"{name}.stream", pickle.dumps(stream))
        command = (sys.executable, "-m", "bench.worker", "stream", f"/roster.v1.{method}", file)
        return Approach("stream", counts["ids"], command, json.dumps(counts), through_server=True)

    def _psql(self, name: str, script: str, rows: Sequence[Any], title: str = r"psql \copy") -> Approach:
        file = self._write(f"{name}.txt", copy_text(rows).encode())
        script = script.replace("{file}", str(file)) + "\n\\echo done\n"
        return Approach(title, len(rows), PSQL, "done", script, greeting="\\echo ready\n")

    def _python(self, title: str, worker: str, rows: Sequence[Any]) -> Approach:
        file = self._write(f"{worker}.rows", pickle.dumps(rows))
        return Approach(title, len(rows), (sys.executable, "-m", "bench.worker", worker, file), "null")

    def _write(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        return path


def _counts(
    ids: int, *, created: int = 0, updated: int = 0, skipped: int = 0, deleted: int = 0
) -> dict[str, int]:
    counts = {"created": created, "updated": updated, "skipped": skipped, "failed": 0, "deleted": deleted}
    return {**counts, "ids": ids}
