"""LoadRepository: watermarks, fencing, and outcomes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import text

from roster.errors import EmailTaken, InvalidField, LoadExpired, LoadFenced, LoadNotFound, RosterError
from service.db import migrations
from service.db.bulk.batch import Outcome, Result
from service.db.engine import Database
from service.loads.model import Load, LoadState
from service.loads.repository import LoadRepository, LoadRow, expire_loads
from service.settings import Settings
from service.validation import MAX_ID
from tests.support.rival import until

METHOD, OPTIONS = "roster.v1.UserService.BulkCreateUsers", b"options"
CREATED, SKIPPED, FAILED = Result.CREATED, Result.SKIPPED, Result.FAILED
WAITS_FOR_A_LOAD = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
BAD = InvalidField("email is required", field="email")
TAKEN = EmailTaken("email belongs to another user", field="email", existing_id=1)


# The statement with which the release before revision 0003 opens a load, and the last columns it reads then.
PREVIOUS_RELEASE_OPENS = text(
    "INSERT INTO bulk_loads (load_id, caller, method, options) VALUES (:load_id, :caller, :method, :options) "
    "ON CONFLICT (load_id) DO UPDATE SET epoch = bulk_loads.epoch + 1"
)
PREVIOUS_RELEASE_READS = text("SELECT caller, epoch FROM bulk_loads WHERE load_id = :load_id")


@pytest.fixture(params=["0010", "head"])
async def revision(request: pytest.FixtureRequest, database_url: str) -> str:
    """The revision of the database: 0010 still has the key `load_id` besides (caller, load_id)."""
    if request.param != "head":
        await asyncio.to_thread(migrations.downgrade, database_url, request.param)
    return str(request.param)


@pytest.fixture
async def expanded(database_url: str, database: Database) -> Database:
    """The database at revision 0010."""
    await asyncio.to_thread(migrations.downgrade, database_url, "0010")
    return database


@pytest.fixture
async def load(database: Database) -> Load:
    """A new load."""
    return await opened(database)


async def opened(database: Database, load_id: str = "staff", caller: str = "ada") -> Load:
    async with database.begin() as session:
        return await LoadRepository(session, caller).open(load_id, METHOD, OPTIONS)


async def opened_by_previous_release(database: Database, caller: str = "ada") -> int:
    """Open the load as the previous release does, and return its epoch; raises LoadNotFound."""
    async with database.begin() as session:
        row = {"load_id": "staff", "caller": caller, "method": METHOD, "options": OPTIONS}
        await session.execute(PREVIOUS_RELEASE_OPENS, row)
        owner, epoch = (await session.execute(PREVIOUS_RELEASE_READS, {"load_id": "staff"})).one()
        if owner != caller:
            raise LoadNotFound("there is no such load", field="load_id")
    return int(epoch)


async def resumed(database: Database, caller: str) -> Load:
    async with database.begin() as session:
        return await LoadRepository(session, caller).resume("staff")


async def got(database: Database, load_id: str = "staff", caller: str | None = "ada") -> Load:
    async with database.read() as session:
        return await LoadRepository(session, caller).get(load_id)


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


async def rows(database: Database, load: Load, start: int, limit: int) -> list[LoadRow]:
    async with database.read() as session:
        return await LoadRepository(session, "ada").rows(load, start, limit)


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


@pytest.mark.usefixtures("revision")
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


async def test_concurrent_opens_of_two_callers_are_independent(database: Database) -> None:
    """Each caller has a load of this name, with epochs and a watermark of its own."""
    callers = ["ada", "bob"] * 4
    loads = await asyncio.gather(*(opened(database, caller=caller) for caller in callers))

    for caller in ("ada", "bob"):
        own = sorted((load for load in loads if load.caller == caller), key=lambda load: load.epoch)
        assert len({load.id for load in own}) == 1
        assert [load.epoch for load in own] == [1, 2, 3, 4]
        await recorded(database, own[-1], 0, of(CREATED, CREATED) if caller == "ada" else of(CREATED))
    assert [(await got(database, caller=caller)).next_offset for caller in ("ada", "bob")] == [2, 1]


async def test_second_caller_waits_for_contracting_migration(expanded: Database) -> None:
    """The error says so. The stream of the first caller is not fenced off."""
    load = await opened(expanded)

    with pytest.raises(LoadNotFound, match=r"`roster migrate --contract`") as caught:
        await opened(expanded, caller="bob")

    assert caught.value.field == "load_id"
    assert "ada" not in caught.value.message
    await recorded(expanded, load, 0, of(CREATED))


async def test_one_of_two_callers_begins_a_load_before_contracting(expanded: Database) -> None:
    """If both open it at once, the others get an error, and its owner's streams have their epochs."""
    callers = ["ada", "bob"] * 4
    outcomes = await asyncio.gather(
        *(opened(expanded, caller=caller) for caller in callers), return_exceptions=True
    )

    loads = [outcome for outcome in outcomes if isinstance(outcome, Load)]
    assert len({(load.id, load.caller) for load in loads}) == 1
    assert sorted(load.epoch for load in loads) == [1, 2, 3, 4]
    assert [type(outcome) for outcome in outcomes if outcome not in loads] == [LoadNotFound] * 4


async def test_previous_release_opens_the_same_loads(expanded: Database) -> None:
    """Both releases fence off each other's streams, and neither gets another caller's load."""
    first = await opened(expanded)
    await recorded(expanded, first, 0, of(CREATED))

    assert await opened_by_previous_release(expanded) == 2
    with pytest.raises(LoadFenced):
        await recorded(expanded, first, 1, of(CREATED))
    third = await opened(expanded)
    assert (third.epoch, third.next_offset) == (3, 1)
    with pytest.raises(LoadNotFound):
        await opened_by_previous_release(expanded, "bob")
    await recorded(expanded, third, 1, of(CREATED))


async def test_both_releases_open_a_load_at_once(expanded: Database) -> None:
    """Each stream gets an epoch of its own."""
    await opened(expanded)

    loads, epochs = await asyncio.gather(
        asyncio.gather(*(opened(expanded) for _ in range(4))),
        asyncio.gather(*(opened_by_previous_release(expanded) for _ in range(4))),
    )

    assert sorted([*epochs, *(load.epoch for load in loads)]) == [2, 3, 4, 5, 6, 7, 8, 9]


async def test_load_goes_on_through_contracting_migration(database_url: str, expanded: Database) -> None:
    """It keeps its outcomes and its stream, and another caller can then begin a load of its name."""
    load = await opened(expanded)
    await recorded(expanded, load, 0, of(CREATED, FAILED, ids=[7, 0], row1=BAD))

    await asyncio.to_thread(migrations.upgrade, database_url)

    await recorded(expanded, load, 2, of(CREATED, ids=[8]))
    assert (await outcome(expanded, load, 0, 3)).ids == [7, 0, 8]
    assert await failures(expanded, load, -1, 9) == [1]
    assert (await opened(expanded, caller="bob")).epoch == 1


async def test_resume_never_begins_a_load(database: Database, load: Load) -> None:
    """It continues the caller's load, and leaves another caller's alone."""
    assert (await resumed(database, "ada")).epoch == 2
    with pytest.raises(LoadNotFound):
        await resumed(database, "bob")

    assert (await got(database, caller=None)).epoch == 2


async def test_admin_gets_the_only_load_of_a_name(database: Database, load: Load) -> None:
    """If several callers have one, the error lists them, up to ten and to a size that fits into a status."""
    assert (await got(database, caller=None)).id == load.id

    await opened(database, caller="bob")
    with pytest.raises(InvalidField, match=r"of this name: ada, bob$") as caught:
        await got(database, caller=None)
    assert caught.value.field == "caller"

    for number in range(10):
        await opened(database, caller=f"caller {number} " + "\N{GRINNING FACE}" * 240)
    with pytest.raises(InvalidField, match=r"and others$") as caught:
        await got(database, caller=None)
    assert len(caught.value.message.encode()) < 1600


async def test_load_is_hidden_from_other_callers(database: Database, load: Load) -> None:
    """They can't fence off its stream either."""
    async with database.begin() as session:
        others = LoadRepository(session, "bob")
        with pytest.raises(LoadNotFound):
            await others.get("staff")
        assert await others.find("staff") is None
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


async def test_rows_of_any_page(database: Database, load: Load) -> None:
    """Over batches of any size, with the result and the id of each row; none from the watermark on."""
    expected: list[LoadRow] = []
    for size in (1, 3, 1, 1, 5, 2):
        first, last = len(expected), len(expected) + size
        ids = [row % 3 and row + 70 for row in range(first, last)]
        results = [CREATED if id else FAILED for id in ids]
        await recorded(database, load, first, of(*results, ids=ids))
        expected += map(LoadRow, range(first, last), results, ids)

    stored = await got(database)
    assert stored.next_offset == len(expected) == 13
    for start in range(15):
        for limit in (1, 2, 6, 13, 1000):
            assert await rows(database, stored, start, limit) == expected[start : start + limit]


async def test_rows_of_a_load_that_has_expired_meanwhile(database: Database, load: Load) -> None:
    """They are not taken for the end of the load, even if it was read before it expired."""
    await recorded(database, load, 0, of(CREATED, CREATED, ids=[7, 8]))
    before = await got(database)
    await expired(database, datetime.now(UTC) + timedelta(days=1))

    for stored in (before, await got(database)):
        with pytest.raises(LoadExpired):
            await rows(database, stored, 1, 10)


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


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("caller", ["ada", "bob"])
async def test_open_waits_for_a_load_that_is_just_begun(
    database: Database, revision: str, caller: str, *, commits: bool
) -> None:
    """Only if the other transaction commits there are two streams, or a load of another caller."""
    waits = caller == "ada" or revision == "0010"
    async with database.begin() as session:
        await LoadRepository(session, "ada").open("staff", METHOD, OPTIONS)
        second = asyncio.create_task(opened(database, caller=caller))
        if waits:
            async with database.read() as other:
                await until(lambda: _waits(other))
        if not commits:
            await session.rollback()

    if waits and commits and caller == "bob":
        with pytest.raises(LoadNotFound):
            await second
    else:
        is_second_stream = commits and caller == "ada"
        assert ((await second).caller, (await second).epoch) == (caller, 2 if is_second_stream else 1)


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
