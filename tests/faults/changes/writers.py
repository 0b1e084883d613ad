"""Writers of random transactions: through the service, and with SQL of their own."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import asyncpg
import grpc

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import (
    BulkCreatePostsRequest,
    CreatePostRequest,
    DeletePostRequest,
    UpdatePostRequest,
)
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    UpdateUserRequest,
    UserKey,
)
from tests.faults.changes.followers import CALL_SECONDS, Stubs

# How many of 100 operations are of each kind.
KINDS = {
    "create users": 18,
    "update a user": 16,
    "delete users": 11,  # with their posts
    "restore users": 11,
    "delete and restore": 4,
    "trade e-mails": 6,
    "create posts": 18,
    "update posts": 9,
    "delete posts": 7,
}
BULK_ROWS = (2000, 6000)  # of the bulk loads; more than one entry of the log has
HOT = 12  # the newest users, which most writers choose
COLD = 0.3
EMAILS = 5000
UNKNOWN = 1 << 50  # the id of a row that does not exist
LOCK_TIMEOUT = "4s"
CLASHES = (
    asyncpg.UniqueViolationError,
    asyncpg.ForeignKeyViolationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
)
REFUSALS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,  # also after a deadlock, or a long wait for a lock
)
FAULTS = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
BROKEN = (asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError, asyncpg.InterfaceError, OSError)


class Rows:
    """The ids that writers know of; they may be wrong, because the transactions of others are open."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._users: list[int] = []
        self._deleted: list[int] = []
        self._posts: list[int] = []
        self._author = UNKNOWN

    def user(self) -> int:
        """Return the id of a user, often one that others choose too."""
        if not self._users:
            return UNKNOWN
        return self._random.choice(self._users if self._random.random() < COLD else self._users[-HOT:])

    def author(self) -> int:
        """Return the id of a user for a new post; the next deletes of users may choose the same."""
        self._author = self.user()
        return self._author

    def user_to_delete(self) -> int:
        """Return the id of a user, often of one for whom somebody is creating posts."""
        return self._author if self._random.random() < 0.5 else self.user()

    def post(self) -> int:
        """Return the id of a post."""
        return self._random.choice(self._posts[-200:]) if self._posts else UNKNOWN

    def deleted_user(self) -> int:
        """Return the id of a deleted user, 0 if there is none."""
        return self._random.choice(self._deleted) if self._deleted else 0

    def email(self) -> str:
        """Return an e-mail, which may be taken."""
        return f"user{self._random.randrange(EMAILS)}@example.org"

    def add_users(self, ids: Sequence[int]) -> None:
        """Note that users exist."""
        for id in ids:
            if id in self._deleted:
                self._deleted.remove(id)
            if id not in self._users:
                self._users.append(id)

    def remove_users(self, ids: Sequence[int]) -> None:
        """Note that users are deleted."""
        for id in ids:
            if id in self._users:
                self._users.remove(id)
            if id not in (*self._deleted, UNKNOWN):
                self._deleted.append(id)

    def add_posts(self, ids: Sequence[int]) -> None:
        """Note that posts exist."""
        self._posts += ids[:20]


class Plan:
    """The operations of a history, which the writers share out among themselves."""

    def __init__(self, random: Random, operations: int, bulk_loads: int) -> None:
        self._kinds = [kind for kind, part in KINDS.items() for _ in range(part * operations // 100)]
        random.shuffle(self._kinds)
        self._bulk_loads = bulk_loads
        self.rows = Rows(random)
        self.done: Counter[str] = Counter()

    @property
    def is_empty(self) -> bool:
        """Whether every operation has begun."""
        return not self._kinds

    def take(self) -> str:
        """Return the kind of the next operation."""
        kind = self._kinds.pop() if self._kinds else "update a user"
        self.done[kind] += 1
        return kind

    def takes_bulk_load(self) -> bool:
        """Return whether the next posts are a bulk load."""
        self._bulk_loads -= 1
        return self._bulk_loads >= 0


class SqlWriter:
    """A writer with a connection of its own, like psql, whose transactions take their time."""

    def __init__(self, url: str, plan: Plan, random: Random, *, faults: bool = False) -> None:
        self._url = url
        self._plan = plan
        self._rows = plan.rows
        self._random = random
        self._faults = faults
        self._changes: list[Callable[[], None]] = []  # of the known rows, once the transaction commits
        self._operations: dict[str, Callable[[], Awaitable[None]]] = {
            "create users": self.create_users,
            "update a user": self.update_user,
            "delete users": self.delete_users,
            "restore users": self.restore_user,
            "delete and restore": self.delete_and_restore,
            "trade e-mails": self.trade_emails,
            "create posts": self.create_posts,
            "update posts": self.update_posts,
            "delete posts": self.delete_posts,
        }

    async def run(self) -> None:
        """Write until the plan is empty."""
        while not self._plan.is_empty:
            try:
                connection = await asyncpg.connect(self._url, server_settings={"lock_timeout": LOCK_TIMEOUT})
                try:
                    while not self._plan.is_empty:
                        await self.write(connection)
                finally:
                    await asyncio.shield(connection.close(timeout=5))
            except BROKEN:
                if not self._faults:
                    raise
                await asyncio.sleep(0.1)

    async def write(self, connection: "asyncpg.Connection[Any]") -> None:
        """Run one transaction of a few operations; it may roll back."""
        self.connection = connection
        self._changes = []
        transaction = connection.transaction()
        await transaction.start()
        try:
            if self._random.random() < 0.5:
                await connection.execute("SELECT pg_current_xact_id()")
            await self._pause()
            for _ in range(self._random.randint(1, 5)):
                await self._operate()
            await self._pause()
        except CLASHES:
            await transaction.rollback()
            return
        if self._random.random() < 0.2:
            await transaction.rollback()
            return
        await transaction.commit()
        for note in self._changes:
            note()

    async def write_in_transaction(self, connection: "asyncpg.Connection[Any]") -> None:
        """Write in a transaction that is open; each operation that fails is rolled back."""
        self.connection = connection
        for operate in (self.create_users, self.create_posts, self.update_user, self.delete_users):
            with suppress(*CLASHES):
                async with connection.transaction():
                    await operate()

    async def _pause(self) -> None:
        if self._random.random() < 0.5:
            await asyncio.sleep(self._random.uniform(0, 0.06))

    async def _operate(self) -> None:
        """Run an operation, in a savepoint or not."""
        operate = self._operations[self._plan.take()]
        if self._random.random() < 0.7:
            await operate()
            return
        noted = len(self._changes)
        savepoint = self.connection.transaction()
        await savepoint.start()
        try:
            await operate()
        except (asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError):
            await savepoint.rollback()
            del self._changes[noted:]
            return
        if self._random.random() < 0.4:
            await savepoint.rollback()
            del self._changes[noted:]
        else:
            await savepoint.commit()

    async def _ids(self, statement: str, *values: Any) -> list[int]:
        return [row[0] for row in await self.connection.fetch(statement, *values)]

    def _note(self, change: Callable[[list[int]], None], ids: list[int]) -> None:
        self._changes.append(lambda: change(ids))

    async def create_users(self) -> None:
        emails = [self._rows.email() for _ in range(self._random.randint(1, 3))]
        statement = (
            "INSERT INTO users (email, full_name) SELECT unnest($1::text[]), 'New' "
            "ON CONFLICT (email) DO NOTHING RETURNING id"
        )
        self._note(self._rows.add_users, await self._ids(statement, emails))

    async def update_user(self) -> None:
        statement = "UPDATE users SET full_name = $2, version = version + 1, updated_at = clock_timestamp()"
        name = f"Name {self._random.random()}"
        await self.connection.execute(f"{statement} WHERE id = $1", self._rows.user(), name)

    async def delete_users(self) -> None:
        ids = sorted({self._rows.user_to_delete() for _ in range(self._random.choice([1, 1, 2]))})
        deleted = await self._ids("DELETE FROM users WHERE id = ANY ($1) RETURNING id", ids)
        self._note(self._rows.remove_users, deleted)

    async def restore_user(self) -> None:
        if id := self._rows.deleted_user():
            await self._restore(id)
        else:
            await self.delete_and_restore()

    async def delete_and_restore(self) -> None:
        deleted = await self._ids("DELETE FROM users WHERE id = $1 RETURNING id", self._rows.user())
        for id in deleted:
            await self._restore(id)

    async def _restore(self, id: int) -> None:
        statement = (
            "INSERT INTO users (id, email, full_name, version) VALUES ($1, $2, 'Restored', 3) "
            "ON CONFLICT DO NOTHING RETURNING id"
        )
        self._note(self._rows.add_users, await self._ids(statement, id, self._rows.email()))

    async def trade_emails(self) -> None:
        ids = sorted({self._rows.user(), self._rows.user()})
        found = await self.connection.fetch(
            "SELECT id, email FROM users WHERE id = ANY ($1) ORDER BY id FOR UPDATE", ids
        )
        if len(found) == 2:
            first, second = found
            update = "UPDATE users SET email = $2, version = version + 1 WHERE id = $1"
            await self.connection.execute(update, first["id"], f"trade{first['id']}@example.org")
            await self.connection.execute(update, second["id"], first["email"])
            await self.connection.execute(update, first["id"], second["email"])

    async def create_posts(self) -> None:
        author = self._rows.author()
        if self._plan.takes_bulk_load():
            rows = [(f"Copied {n}", "", author) for n in range(self._random.randint(*BULK_ROWS))]
            await self.connection.copy_records_to_table(
                "posts", records=rows, columns=["title", "content", "author_id"]
            )
            return
        statement = (
            "INSERT INTO posts (title, content, author_id) "
            "SELECT 'New', '', $1 FROM generate_series(1, $2) RETURNING id"
        )
        self._note(self._rows.add_posts, await self._ids(statement, author, self._random.randint(1, 4)))

    async def update_posts(self) -> None:
        title = f"Title {self._random.random()}"
        await self.connection.execute(
            "UPDATE posts SET title = $2, version = version + 1 WHERE id IN "
            "(SELECT id FROM posts WHERE author_id = $1 ORDER BY id LIMIT 20)",
            *(self._rows.user(), title),
        )

    async def delete_posts(self) -> None:
        ids = sorted({self._rows.post() for _ in range(3)})
        await self.connection.execute("DELETE FROM posts WHERE id = ANY ($1)", ids)


class CallWriter:
    """A writer that calls a service; another server may serve its next call."""

    def __init__(
        self,
        servers: Sequence[Stubs],
        plan: Plan,
        random: Random,
        *,
        faults: bool = False,
        locks: bool = True,
    ) -> None:
        self._servers = servers
        self._plan = plan
        self._rows = plan.rows
        self._random = random
        self._accepted = (*REFUSALS, *FAULTS) if faults else REFUSALS
        self._locks = locks  # whether restores may lock the table, which waits for all open transactions
        self._operations: dict[str, Callable[[Stubs], Awaitable[None]]] = {
            "create users": self.create_users,
            "update a user": self.update_user,
            "delete users": self.delete_users,
            "restore users": self.restore_user,
            "delete and restore": self.delete_and_restore,
            "trade e-mails": self.trade_emails,
            "create posts": self.create_posts,
            "update posts": self.update_posts,
            "delete posts": self.delete_posts,
        }

    async def run(self) -> None:
        """Write until the plan is empty."""
        while not self._plan.is_empty:
            stubs = self._random.choice(self._servers)
            try:
                await self._operations[self._plan.take()](stubs)
            except grpc.aio.AioRpcError as error:
                if error.code() not in self._accepted:
                    raise
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    await asyncio.sleep(0.05)

    def _request_id(self) -> str:
        """Return a request id or nothing. With one, a call claims it first, and so has its xid early."""
        return f"{self._random.getrandbits(128):032x}" if self._random.random() < 0.4 else ""

    async def create_users(self, stubs: Stubs) -> None:
        request = CreateUserRequest(user=User(email=self._rows.email()), request_id=self._request_id())
        user = await stubs.users.CreateUser(request, timeout=CALL_SECONDS)
        self._rows.add_users([user.id])

    async def update_user(self, stubs: Stubs) -> None:
        changed = User(id=self._rows.user(), full_name=f"Name {self._random.random()}")
        if self._random.random() < 0.3:
            changed.email = self._rows.email()
        request = UpdateUserRequest(user=changed, request_id=self._request_id())
        await stubs.users.UpdateUser(request, timeout=CALL_SECONDS)

    async def delete_users(self, stubs: Stubs) -> None:
        id = self._rows.user_to_delete()
        if self._random.random() < 0.5:
            request = DeleteUserRequest(id=id, request_id=self._request_id())
            await stubs.users.DeleteUser(request, timeout=CALL_SECONDS)
        else:
            keys = [UserKey(id=id) for id in {id, self._rows.user()}]
            await self._stream(stubs.users.BulkDeleteUsers, BulkDeleteUsersRequest(users=keys))
        self._rows.remove_users([id])

    async def restore_user(self, stubs: Stubs) -> None:
        if id := self._rows.deleted_user():
            await self._restore(stubs, id)
        else:
            await self.delete_and_restore(stubs)

    async def delete_and_restore(self, stubs: Stubs) -> None:
        id = self._rows.user()
        await stubs.users.DeleteUser(DeleteUserRequest(id=id), timeout=CALL_SECONDS)
        self._rows.remove_users([id])
        await self._restore(stubs, id)

    async def _restore(self, stubs: Stubs, id: int) -> None:
        if not self._locks:
            return
        request = BulkCreateUsersRequest(
            options=BulkOptions(restore=True), users=[User(id=id, email=self._rows.email(), version=3)]
        )
        await self._stream(stubs.users.BulkCreateUsers, request)
        self._rows.add_users([id])

    async def trade_emails(self, stubs: Stubs) -> None:
        """Give one user the e-mail of another one, which gets another."""
        first, second = self._rows.user(), self._rows.user()
        rows = [User(id=first, email=self._rows.email()), User(id=second, email=self._rows.email())]
        options = BulkOptions()
        options.update_mask.paths.append("email")
        await self._stream(stubs.users.BulkUpdateUsers, BulkUpdateUsersRequest(options=options, users=rows))
        rows[0].email, rows[1].email = rows[1].email, rows[0].email
        await self._stream(stubs.users.BulkUpdateUsers, BulkUpdateUsersRequest(options=options, users=rows))

    async def create_posts(self, stubs: Stubs) -> None:
        post = Post(title="New", author_id=self._rows.author())
        if self._plan.takes_bulk_load():
            rows = [post] * self._random.randint(*BULK_ROWS)
            await self._stream(stubs.posts.BulkCreatePosts, BulkCreatePostsRequest(posts=rows[:5000]))
        else:
            request = CreatePostRequest(post=post, request_id=self._request_id())
            created = await stubs.posts.CreatePost(request, timeout=CALL_SECONDS)
            self._rows.add_posts([created.id])

    async def update_posts(self, stubs: Stubs) -> None:
        post = Post(id=self._rows.post(), title=f"Title {self._random.random()}")
        await stubs.posts.UpdatePost(UpdatePostRequest(post=post), timeout=CALL_SECONDS)

    async def delete_posts(self, stubs: Stubs) -> None:
        await stubs.posts.DeletePost(DeletePostRequest(id=self._rows.post()), timeout=CALL_SECONDS)

    async def _stream(self, rpc: Any, request: Any) -> None:
        """Send a bulk stream of one message; its rows may fail."""
        async for _ in rpc(iter([request]), timeout=CALL_SECONDS):
            pass
