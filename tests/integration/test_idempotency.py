"""Repeatable writes: which responses are stored, for which callers, and for how long."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import select, update

from roster.errors import RequestIdReused
from service.db.answers import Request
from service.db.bulk.batch import Result
from service.db.engine import Database
from service.idempotency import RequestRepository, delete_expired_requests
from service.users.repository import UserRepository

ID = UUID("7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10")
BODY = b"body"
ANSWER = (b"answer", Result.UPDATED)


@pytest.fixture
async def kept(database: Database) -> Database:
    """A database with the response to one request."""
    async with database.begin() as session:
        requests = RequestRepository(session, "ops", "CreateUser", UserRepository)
        assert await requests.claim(ID, BODY) is None
        await requests.store(ID, b"answer", Result.UPDATED)
    return database


async def claim(
    database: Database, *, caller: str = "ops", method: str = "CreateUser"
) -> tuple[bytes, Result] | None:
    async with database.begin() as session:
        return await RequestRepository(session, caller, method, UserRepository).claim(ID, BODY)


async def test_repeated_request_gets_first_response(kept: Database) -> None:
    """However often it comes."""
    assert [await claim(kept), await claim(kept)] == [ANSWER, ANSWER]


async def test_empty_response_is_stored_too(database: Database) -> None:
    """The response of a delete has no bytes."""
    async with database.begin() as session:
        requests = RequestRepository(session, "ops", "CreateUser", UserRepository)
        await requests.claim(ID, BODY)
        await requests.store(ID, b"", Result.DELETED)

    assert await claim(database) == (b"", Result.DELETED)


async def test_answer_of_an_earlier_release_was_that_of_a_create(kept: Database) -> None:
    """Such a release stored no outcome."""
    async with kept.begin() as session:
        await session.execute(update(Request).values(outcome=None))

    assert await claim(kept) == (b"answer", Result.CREATED)


async def test_another_body_is_refused(kept: Database) -> None:
    """The id belongs to the request that it first came with."""
    with pytest.raises(RequestIdReused):
        async with kept.begin() as session:
            await RequestRepository(session, "ops", "CreateUser", UserRepository).claim(ID, b"another body")


async def test_ids_are_scoped_to_callers_and_methods(kept: Database) -> None:
    """The same id of another caller or method is another request."""
    assert await claim(kept, caller="someone else") is None
    assert await claim(kept, method="UpdateUser") is None


async def test_failed_request_is_not_stored(database: Database) -> None:
    """The claim is rolled back with the unit of work that made it."""

    async def fail() -> None:
        async with database.begin() as session:
            await RequestRepository(session, "ops", "CreateUser", UserRepository).claim(ID, BODY)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await claim(database) is None


@pytest.mark.parametrize("first_fails", [False, True])
async def test_concurrent_request_waits_for_the_first(database: Database, first_fails: bool) -> None:
    """It gets the first response; if the first one fails, it takes its place."""
    claimed = asyncio.Event()

    async def first() -> None:
        async with database.begin() as session:
            requests = RequestRepository(session, "ops", "CreateUser", UserRepository)
            await requests.claim(ID, BODY)
            claimed.set()
            await requests.store(ID, b"answer", Result.UPDATED)
            await UserRepository(session).create({"email": "ada@example.org"})
            if first_fails:
                raise ZeroDivisionError

    async def second() -> tuple[bytes, Result] | None:
        await claimed.wait()
        return await claim(database)

    failed, answer = await asyncio.gather(first(), second(), return_exceptions=True)
    assert isinstance(failed, ZeroDivisionError) == first_fails
    assert answer == (None if first_fails else ANSWER)


async def test_responses_are_deleted_after_24_hours(kept: Database) -> None:
    """Not earlier; afterwards the same request is a new one."""
    async with kept.read() as session:
        created_at = await session.scalar(select(Request.created_at))
    assert created_at
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)

    async with kept.begin() as session:
        await delete_expired_requests(session, created_at + timedelta(hours=24))
    assert await claim(kept) == ANSWER
    async with kept.begin() as session:
        await delete_expired_requests(session, created_at + timedelta(hours=24, microseconds=1))
    assert await claim(kept) is None
