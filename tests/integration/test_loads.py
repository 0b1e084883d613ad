"""LoadRepository: watermarks, fencing, and outcomes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import text

from service.db.bulk.batch import Outcome, Result
from service.db.engine import Database
from service.errors import EmailTaken, InvalidField, LoadFenced, LoadNotFound, RosterError
from service.loads.model import Load, LoadState
from service.loads.repository import LoadRepository, expire_loads
from service.settings import Settings
from service.validation import MAX_ID
from tests.support.rival import until

METHOD, OPTIONS = "roster.v1.UserService.BulkCreateUsers", b"options"
CREATED, SKIPPED, FAILED = Result.CREATED, Result.SKIPPED, Result.FAILED
WAITS_FOR_A_LOAD = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
BAD = InvalidField("email is required", field="email")
TAKEN = EmailTaken("email belongs to another user", field="email", existing_id=1)


@pytest.fixture
async def load(database: Database) -> Load:
    """A new load."""
    return await opened(database)


async def opened(database: Database, load_id: str = "staff", caller: str = "ada") -> Load:
    async with database.begin() as session:
        return await LoadRepository(session, caller).open(load_id, METHOD, OPTIONS)


async def got(database: Database, load_id: str = "staff") -> Load:
    async with database.read() as session:
        return await LoadRepository(session, "ada").get(load_id)


async def recorded(database: Database, load: Load, offset: int, outcome: Outcome) -> None:
    async with database.begin() as session:
        await LoadRepository(session, "ada").record(load, offset, outcome)


async def outcome(database: Database, load: Load, start: int, end: int) -> Outcome:
    async with database.read() as session:
        return await LoadRepository(session, "ada").outcome(load, start, end)


async def failures(database: Database, load: Load, after: int, limit: int) -> list[int]:
    """Return the offsets of rows that failed."""
    async with database.read() as session:
        found = await LoadRepository(session, "ada").failures(load, after, limit)
    return [offset for offset, _ in found]


def of(*results: Result, ids: list[int] | None = None, **failures: RosterError) -> Outcome:
    """Return the outcome of a batch; `row2=…` is the error of row 2."""
    reasons = {int(name.removeprefix("row")): error for name, error in failures.items()}
    return Outcome(bytes(results), ids or [0] * len(results), reasons)


def comparable(outcome: Outcome) -> tuple[bytes, list[int], dict[int, tuple[Any, ...]]]:
    """Return an outcome in a form that can be compared."""
    reasons = {
        row: (error.reason, error.message, error.field, error.facts)
        for row, error in outcome.failures.items()
    }
    return outcome.results, outcome.ids, reasons


async def test_open_continues_existing_load(database: Database, load: Load) -> None:
    """It keeps its method and options, and its epoch counts the streams."""
    async with database.begin() as session:
        again = await LoadRepository(session, "ada").open("staff", "another method", b"others")

    assert (load.epoch, load.next_offset, load.state) == (1, 0, LoadState.OPEN)
    assert (again.id, again.epoch, again.method, again.options) == (load.id, 2, METHOD, OPTIONS)


async def test_concurrent_opens_get_different_epochs(database: Database) -> None:
    """Only the stream with the highest epoch may write."""
    loads = await asyncio.gather(*(opened(database) for _ in range(5)))

    assert sorted(load.epoch for load in loads) == [1, 2, 3, 4, 5]
    for load in loads:
        if load.epoch < 5:
            with pytest.raises(LoadFenced):
                await recorded(database, load, 0, of(CREATED))
        else:
            await recorded(database, load, 0, of(CREATED))


async def test_load_is_hidden_from_other_callers(database: Database, load: Load) -> None:
    """They can't fence off its stream either."""
    with pytest.raises(LoadNotFound):
        await opened(database, caller="bob")
    async with database.begin() as session:
        others = LoadRepository(session, "bob")
        with pytest.raises(LoadNotFound):
            await others.get("staff")
        with pytest.raises(LoadNotFound):
            await others.resume("staff")
        assert (await others.page(None, 10)).rows == []

    await recorded(database, load, 0, of(CREATED))


async def test_admin_sees_loads_of_all_callers(database: Database) -> None:
    """The newest first."""
    await opened(database, "first", "ada")
    await opened(database, "second", "bob")

    async with database.read() as session:
        page = await LoadRepository(session, None).page(None, 10)

    assert [(load.load_id, load.caller) for load in page.rows] == [("second", "bob"), ("first", "ada")]
    assert page.next_key is None


async def test_record_moves_watermark_and_counts_rows(database: Database, load: Load) -> None:
    """Whatever their results."""
    await recorded(database, load, 0, of(CREATED, Result.UPDATED, SKIPPED, FAILED, FAILED))
    await recorded(database, load, 5, of(CREATED))

    after = await got(database)
    assert after.next_offset == 6
    assert (after.created, after.updated, after.skipped, after.failed) == (2, 1, 1, 2)


async def test_record_requires_offset_at_watermark(database: Database, load: Load) -> None:
    """A batch after a gap, or one that is recorded, changes nothing."""
    await recorded(database, load, 0, of(CREATED, CREATED))

    for offset in (0, 1, 3):
        with pytest.raises(LoadFenced):
            await recorded(database, load, offset, of(FAILED))

    assert (await got(database)).next_offset == 2
    assert comparable(await outcome(database, load, 0, 9)) == comparable(of(CREATED, CREATED))


@pytest.mark.parametrize("state", [LoadState.FINISHED, LoadState.ABORTED, LoadState.EXPIRED])
async def test_closed_load_refuses_writes(database: Database, load: Load, state: LoadState) -> None:
    """A load that is finished, aborted or expired can't be recorded or finished."""
    async with database.begin() as session:
        loads = LoadRepository(session, "ada")
        if state == LoadState.FINISHED:
            await loads.finish(load)
        elif state == LoadState.ABORTED:
            await loads.abort(load)
        else:
            await expire_loads(session, datetime.now(UTC) + timedelta(days=1))

    for write in (LoadRepository.finish, LoadRepository.watermark):
        with pytest.raises(LoadFenced):
            async with database.begin() as session:
                await write(LoadRepository(session, "ada"), load)
    with pytest.raises(LoadFenced):
        await recorded(database, load, 0, of(CREATED))
    assert (await got(database)).state == state


async def test_only_newest_stream_reads_watermark(database: Database, load: Load) -> None:
    """An older stream gets LoadFenced."""
    await recorded(database, load, 0, of(CREATED, CREATED))
    newer = await opened(database)

    async with database.read() as session:
        loads = LoadRepository(session, "ada")
        assert await loads.watermark(newer) == 2
        with pytest.raises(LoadFenced):
            await loads.watermark(load)


async def test_outcome_of_any_range_of_rows(database: Database, load: Load) -> None:
    """From one batch or several, with each failure at its row."""
    batches = [
        of(CREATED, FAILED, ids=[7, 0], row1=BAD),
        of(SKIPPED, ids=[1]),
        of(FAILED, CREATED, FAILED, ids=[0, 9, 0], row0=TAKEN, row2=BAD),
    ]
    whole = Outcome()
    for batch in batches:
        await recorded(database, load, len(whole.ids), batch)
        whole.extend(batch)

    for start, end in combinations(range(len(whole.ids) + 1), 2):
        assert comparable(await outcome(database, load, start, end)) == comparable(whole.part(start, end))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.sampled_from([0, 1, MAX_ID]) | st.integers(0, MAX_ID), min_size=1, max_size=9))
async def test_stores_ids_in_any_order(database: Database, ids: list[int]) -> None:
    """Also the smallest next to the largest."""
    load = await opened(database)
    offset = (await got(database)).next_offset
    await recorded(database, load, offset, of(*[CREATED] * len(ids), ids=ids))

    assert (await outcome(database, load, offset, offset + len(ids))).ids == ids


async def test_failures_are_in_offset_order(database: Database, load: Load) -> None:
    """From any offset, over batches with many, few and no failures."""
    expected: list[int] = []
    offset = 0
    for batch in range(40):
        rows: dict[str, Any] = {f"row{row}": BAD for row in range(batch % 4)}
        await recorded(database, load, offset, of(*[FAILED] * 4, **rows))
        expected += range(offset, offset + len(rows))
        offset += 4

    assert len(expected) == 60
    for after in range(-1, offset, 7):
        behind = [row for row in expected if row > after]
        for limit in (1, 5, 60, 61):
            assert await failures(database, load, after, limit) == behind[:limit]


async def test_loads_expire_some_time_after_their_last_batch(database: Database) -> None:
    """Their outcomes are deleted, their counts stay. Loads with a later batch don't expire."""
    old, new = await opened(database, "old"), await opened(database, "new")
    await recorded(database, old, 0, of(FAILED, row0=BAD))
    between = (await got(database, "old")).updated_at
    while (await got(database, "new")).updated_at <= between:
        await recorded(database, new, (await got(database, "new")).next_offset, of(FAILED, row0=BAD))

    async with database.begin() as session:
        await expire_loads(session, between + timedelta(microseconds=1))

    expired, alive = await got(database, "old"), await got(database, "new")
    assert (expired.state, expired.next_offset, expired.failed) == (LoadState.EXPIRED, 1, 1)
    assert (await outcome(database, old, 0, 1)).ids == await failures(database, old, -1, 9) == []
    assert alive.state == LoadState.OPEN
    assert len(await failures(database, new, -1, 9)) == min(alive.next_offset, 9)


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[Database]:
    """The `Database` on PostgreSQL."""
    database = Database(Settings(database_url=postgresql_url))
    yield database
    await database.close()


async def test_load_with_batch_in_progress_does_not_expire(postgresql: Database) -> None:
    """If a batch commits during the expiry, all outcomes are kept."""
    load = await opened(postgresql)
    await recorded(postgresql, load, 0, of(CREATED))
    last = (await got(postgresql)).updated_at

    async with postgresql.begin() as batch:
        await LoadRepository(batch, "ada").record(load, 1, of(CREATED))
        expiry = asyncio.create_task(expired(postgresql, last + timedelta(microseconds=1)))
        async with postgresql.read() as session:
            await until(lambda: _waits(session))
    await expiry

    after = await got(postgresql)
    assert (after.state, after.next_offset) == (LoadState.OPEN, 2)
    assert (await outcome(postgresql, load, 0, 2)).created == 2


async def test_watermark_waits_for_commit_in_progress(postgresql: Database) -> None:
    """When the answer to a commit is lost, the database may still be committing."""
    load = await opened(postgresql)

    async with postgresql.begin() as batch:
        await LoadRepository(batch, "ada").record(load, 0, of(CREATED))
        watermark = asyncio.create_task(found_watermark(postgresql, load))
        async with postgresql.read() as session:
            await until(lambda: _waits(session))

    assert await watermark == 1


async def found_watermark(database: Database, load: Load) -> int:
    async with database.read() as session:
        return await LoadRepository(session, "ada").watermark(load)


async def expired(database: Database, before: datetime) -> None:
    async with database.begin() as session:
        await expire_loads(session, before)


async def _waits(session: Any) -> bool:
    return bool(await session.scalar(WAITS_FOR_A_LOAD))
