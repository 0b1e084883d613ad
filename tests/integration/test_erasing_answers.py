"""Answers are erased with the rows in them, also while these are written; their `request_id`s stay used."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, text

from roster.errors import UserNotFound
from service.db import answers as answers_module
from service.db.answers import Request, cascading_columns, erase_answers
from service.db.base import Entity
from service.db.bulk.batch import Batch, WriteOptions
from service.db.bulk.table import BulkTable
from service.db.bulk.writer import BulkWriter
from service.db.engine import Database
from service.idempotency import RequestRepository, delete_expired_requests
from service.posts.model import Post
from service.posts.repository import POSTS, PostRepository
from service.settings import Settings
from service.users.model import User
from service.users.repository import USERS, UserRepository
from tests.support.items import ItemRow, create_table
from tests.support.rival import rival
from tests.support.rows import add_posts, add_users

ID = UUID("7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10")
BODY = b"body"
# The write of a server that has not committed yet. The user and the post have the id 1, a new post 2.
STORE = """
    INSERT INTO requests (caller, method, request_id, fingerprint, answer, entity, entity_id)
    VALUES ('ops', 'write', '7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10', 'body', 'answer', '{}', {})
"""
STORE_MANY = """
    INSERT INTO requests (caller, method, request_id, fingerprint, answer, entity, entity_id)
    SELECT 'ops', 'write', gen_random_uuid(), 'body', 'answer', 'users', id
    FROM generate_series(1, 5000) AS id
"""
ROWS_READ = """
    SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)
    FROM pg_stat_xact_user_tables WHERE relname = 'requests'
"""
WRITES = {
    "UpdateUser": ("UPDATE users SET full_name = 'Ada' WHERE id = 1", STORE.format("users", 1)),
    "UpdatePost": ("UPDATE posts SET title = 'Notes' WHERE id = 1", STORE.format("posts", 1)),
    "CreatePost": (
        "INSERT INTO posts (author_id, title, content) VALUES (1, 'Notes', '')",
        STORE.format("posts", 2),
    ),
}
DELETIONS = [(UserRepository, write) for write in WRITES] + [(PostRepository, "UpdatePost")]


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[Database]:
    """A database on PostgreSQL with a user and a post."""
    database = Database(Settings(database_url=postgresql_url))
    await add_posts(database, await add_users(database))
    yield database
    await database.close()


async def answers(database: Database) -> list[tuple[bytes | None, bytes]]:
    async with database.read() as session:
        found = await session.execute(select(Request.answer, Request.fingerprint).order_by(Request.entity_id))
        return [(row.answer, row.fingerprint) for row in found]


async def claim(database: Database, body: bytes = BODY) -> bytes | None:
    async with database.begin() as session:
        stored = await RequestRepository(session, "ops", "write", UserRepository).claim(ID, body)
        return stored[0] if stored else None


async def delete(database: Database, repository: type[Any]) -> None:
    async with database.begin() as session:
        await repository(session).delete(1)


async def test_erases_answers_about_listed_rows(database: Database) -> None:
    """One statement for all ids; rows of other entities and answers without a row are left alone."""
    stored = [("users", 1), ("users", 2), ("users", 3), ("posts", 1), (None, None)]
    async with database.begin() as session:
        for number, (entity, id) in enumerate(stored):
            key = {"caller": "ops", "method": "write", "request_id": UUID(int=number)}
            session.add(Request(**key, fingerprint=BODY, answer=b"", entity=entity, entity_id=id))
    async with database.begin() as session:
        await erase_answers(session, "users", [1, 3, 7])

    async with database.read() as session:
        erased = select(Request.entity_id).where(
            Request.answer.is_(None), func.length(Request.fingerprint) == 0
        )
        assert list(await session.scalars(erased.order_by(Request.entity_id))) == [1, 3]
        assert await session.scalar(select(func.count()).where(Request.answer == b"")) == 3


async def test_erasure_reads_only_answers_about_its_rows(postgresql: Database) -> None:
    """Also from a table of which PostgreSQL has no statistics yet."""
    async with postgresql.bulk() as session:
        await session.execute(text(STORE_MANY))
        read = await session.scalar(text(ROWS_READ))
        await erase_answers(session, "users", range(4001, 6001))

        assert await session.scalar(text(ROWS_READ)) - read <= 1000


@pytest.mark.parametrize(("repository", "write"), DELETIONS)
async def test_deletion_waits_for_a_write_and_erases_its_answer(
    postgresql: Database, postgresql_url: str, repository: type[Any], write: str
) -> None:
    """The write had not been committed when the deletion began."""
    async with rival(postgresql_url) as writer:
        for statement in WRITES[write]:
            await writer.execute(statement)
        deletion = asyncio.create_task(delete(postgresql, repository))
        await writer.wait_for_blocked()
        await writer.commit()
    await deletion

    assert await answers(postgresql) == [(None, b"")]


async def test_repetition_that_waits_for_a_deletion_is_not_found(
    postgresql: Database, postgresql_url: str
) -> None:
    """It does not create the row again, whatever its body."""
    async with rival(postgresql_url) as deletion:
        await deletion.execute(STORE.format("users", 1))
        await deletion.commit()
    async with rival(postgresql_url) as deletion:
        await deletion.execute("UPDATE requests SET answer = NULL, fingerprint = ''")
        repetitions = [asyncio.create_task(claim(postgresql, body)) for body in (BODY, b"another body")]
        await deletion.wait_for_blocked()
        await deletion.commit()

    for repetition in repetitions:
        with pytest.raises(UserNotFound):
            await repetition


async def test_expiry_does_not_wait_for_an_erasure(postgresql: Database, postgresql_url: str) -> None:
    """It would hold locks of other answers meanwhile, for which the erasure may wait."""
    async with rival(postgresql_url) as erasure:
        await erasure.execute(STORE.format("users", 1))
        await erasure.commit()
    async with rival(postgresql_url) as erasure:
        await erasure.execute("UPDATE requests SET answer = NULL, fingerprint = ''")
        async with postgresql.begin() as session:
            created_at = await session.scalar(select(Request.created_at))
            assert created_at
            await delete_expired_requests(session, created_at + timedelta(hours=25))
        await erasure.commit()
    assert len(await answers(postgresql)) == 1


@pytest.mark.parametrize("table", [USERS, POSTS])
async def test_bulk_delete_erases_answers_about_rows_at_any_depth(
    database: Database, monkeypatch: pytest.MonkeyPatch, table: BulkTable
) -> None:
    """As a single delete does: of a third entity too, whose rows are deleted with posts."""
    referring = {User: [(Post, Post.author_id)], Post: [(ItemRow, ItemRow.code)], ItemRow: []}
    monkeypatch.setattr(answers_module, "cascading_columns", referring.__getitem__)
    await create_table(database)
    [post] = await add_posts(database, await add_users(database))
    async with database.begin() as session:
        session.add(ItemRow(id=7, slug="remark", code=post, times=0, expected=""))
        key = {"caller": "ops", "method": "write", "request_id": ID}
        session.add(Request(**key, fingerprint=BODY, answer=b"remark", entity="items", entity_id=7))

    async with database.bulk() as session:
        await BulkWriter(session, table).delete(Batch(1, {"id": [1], "version": [0]}), WriteOptions())

    assert await answers(database) == [(None, b"")]


def test_entities_are_deleted_with_those_that_they_refer_to() -> None:
    """The foreign keys of the models say which."""
    deleted: dict[type[Entity], Any] = {User: [(Post, Post.author_id)], Post: []}
    assert {model: cascading_columns(model) for model in deleted} == deleted
