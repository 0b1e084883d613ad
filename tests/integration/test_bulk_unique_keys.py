"""Bulk streams of an entity with two unique keys: parallel batches, moves of values, restore and replay."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import select

from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from service.auth.caller import set_caller
from service.auth.policy import ANONYMOUS
from service.bulk.operation import Operation
from service.bulk.stream import BulkStreams
from service.db.engine import Database
from service.settings import Settings
from tests.support.items import (
    CREATE_ITEMS,
    UPDATE_ITEMS,
    Item,
    ItemRow,
    create_table,
)
from tests.support.rival import rival

UPDATE_SLUG = BulkOptions(update_mask=FieldMask(paths=["slug"]))
UPDATE_BOTH = BulkOptions(update_mask=FieldMask(paths=["slug", "code"]))


@pytest.fixture
async def items(database: Database) -> Database:
    """A database with the table of items."""
    await create_table(database)
    return database


async def run(
    database: Database, operation: Operation, options: BulkOptions, *messages: Sequence[Any]
) -> list[BulkAck]:
    """Send messages, all of them before the first answer, and return the acks."""

    async def requests() -> AsyncIterator[bytes]:
        for number, rows in enumerate(messages):
            request = operation.request(items=rows, options=options if number == 0 else None)
            yield request.SerializeToString()

    set_caller(ANONYMOUS)
    events = BulkStreams(database).run(requests(), operation)
    return [event.ack async for event in events if event.HasField("ack")]


async def stored(database: Database) -> dict[str, tuple[int | None, int, str, int]]:
    """Return the items by slug."""
    columns = (ItemRow.slug, ItemRow.code, ItemRow.times, ItemRow.expected, ItemRow.version)
    async with database.read() as session:
        rows = (await session.execute(select(*columns))).all()
    return {slug: (code, times, expected, version) for slug, code, times, expected, version in rows}


async def create(database: Database, *rows: Any) -> list[int]:
    """Create items and return their ids."""
    (ack,) = await run(database, CREATE_ITEMS, BulkOptions(return_ids=True), rows)
    return list(ack.ids)


def failures(ack: BulkAck) -> list[tuple[int, str, int]]:
    return [(failure.offset, failure.reason, failure.existing_id) for failure in ack.failures]


async def test_parallel_batches_meet_each_others_keys(items: Database) -> None:
    """A key of a batch that is not committed yet is taken, whichever of the keys it is."""
    options = BulkOptions(return_ids=True)

    first, by_slug, by_code, free = await run(
        items,
        CREATE_ITEMS,
        options,
        [Item(slug="a", code=1)],
        [Item(slug="a", code=2), Item(slug="b", code=3)],
        [Item(slug="c", code=1)],
        [Item(slug="d", code=2)],
    )

    assert failures(by_slug) == [(1, "SLUG_TAKEN", first.ids[0])]
    assert failures(by_code) == [(3, "CODE_TAKEN", first.ids[0])]
    assert (first.created, by_slug.created, by_code.created, free.created) == (1, 1, 0, 1)
    assert sorted(await stored(items)) == ["a", "b", "d"]


async def test_values_swap_within_a_batch(items: Database) -> None:
    """Both keys change owners, and columns called `times` and `expected` keep their values."""
    rows = [Item(slug="a", code=1, times=7, expected="x"), Item(slug="b", code=2, times=8, expected="y")]
    first, second = await create(items, *rows)
    swapped = [
        Item(id=first, slug="tmp", code=0),
        Item(id=second, slug="a", code=1),
        Item(id=first, slug="b", code=2),
    ]

    (ack,) = await run(items, UPDATE_ITEMS, UPDATE_BOTH, swapped)

    assert ack.updated == 3
    assert await stored(items) == {"b": (2, 7, "x", 3), "a": (1, 8, "y", 2)}


async def test_values_move_across_parallel_batches(items: Database) -> None:
    """A batch can take the slug that the batch before frees."""
    first, second = await create(items, Item(slug="a", code=1), Item(slug="b", code=2))
    moves = [
        [Item(id=first, slug="c")],
        [Item(id=second, slug="a")],
        [Item(id=first, slug="b")],
        [Item(id=second, slug="b")],
    ]

    acks = await run(items, UPDATE_ITEMS, UPDATE_SLUG, *moves)

    assert [ack.updated for ack in acks] == [1, 1, 1, 0]
    assert failures(acks[3]) == [(3, "SLUG_TAKEN", first)]
    assert await stored(items) == {"b": (1, 0, "", 3), "a": (2, 0, "", 2)}


async def test_taken_value_fails_its_row_only(items: Database) -> None:
    """The row keeps its other value too."""
    first, second, third = await create(items, *(Item(slug=slug, code=ord(slug)) for slug in "abc"))
    rows = [Item(id=first, slug="d", code=ord("b")), Item(id=second, slug="e", code=5)]

    (ack,) = await run(items, UPDATE_ITEMS, UPDATE_BOTH, [*rows, Item(id=third, slug="d", code=0)])

    assert (ack.updated, failures(ack)) == (2, [(0, "CODE_TAKEN", second)])
    assert {slug: values[0] for slug, values in (await stored(items)).items()} == {
        "a": ord("a"),
        "e": 5,
        "d": None,
    }


async def test_entity_columns_do_not_control_updates(items: Database) -> None:
    """`times` and `expected` are written like any column; versions are checked as ever."""
    (id,) = await create(items, Item(slug="a", times=1, expected="no"))
    options = BulkOptions(update_mask=FieldMask(paths=["times", "expected"]))
    rows = [
        Item(id=id, times=50, expected="0", version=1),
        Item(id=id, times=60, expected="1", version=1),
        Item(id=id, times=70, expected="2", version=2),
    ]

    (ack,) = await run(items, UPDATE_ITEMS, options, rows)

    assert failures(ack) == [(1, "VERSION_MISMATCH", 0)]
    assert await stored(items) == {"a": (None, 70, "2", 3)}


async def test_restored_items_keep_ids_and_versions(items: Database) -> None:
    """A restored row is in conflict by its id or by any unique key."""
    (taken,) = await create(items, Item(slug="a", code=1))
    options = BulkOptions(restore=True, return_ids=True)
    rows = [
        Item(id=taken, slug="b", code=2),
        Item(id=100, slug="a", code=3),
        Item(id=101, slug="d", code=1),
        Item(id=102, slug="e", version=9),
    ]

    (ack,) = await run(items, CREATE_ITEMS, options, rows)
    (following,) = await create(items, Item(slug="f"))

    assert [reason for _, reason, _ in failures(ack)] == ["ID_TAKEN", "SLUG_TAKEN", "CODE_TAKEN"]
    assert (list(ack.ids), following) == ([0, 0, 0, 102], 103)
    assert (await stored(items))["e"] == (None, 0, "", 9)


async def test_replays_first_outcomes_of_a_named_load(items: Database) -> None:
    """Sent again, rows get the outcome that they had, however they are cut into messages."""
    options = BulkOptions(load_id="items", return_ids=True)
    rows = [Item(slug="a", code=1), Item(slug="b", code=1), Item(slug="a", code=2), Item(slug="c")]

    first = await run(items, CREATE_ITEMS, options, rows[:2], rows[2:])
    (again,) = await run(items, CREATE_ITEMS, options, rows)

    assert (again.replayed, again.created, again.failed) == (True, 2, 2)
    assert list(again.ids) == [id for ack in first for id in ack.ids]
    assert failures(again) == [failure for ack in first for failure in failures(ack)]
    assert sorted(await stored(items)) == ["a", "c"]


async def test_slug_taken_by_another_writer_fails_its_row(postgresql_url: str) -> None:
    """A conflict that appears after the look-up is found again, and is not retried for ever."""
    database = Database(Settings(database_url=postgresql_url))
    await create_table(database)
    (id,) = await create(database, Item(slug="a", code=1))
    async with rival(postgresql_url) as other:
        await other.execute("INSERT INTO items (id, slug, times, expected) VALUES (77, 'b', 0, '')")
        update = asyncio.create_task(run(database, UPDATE_ITEMS, UPDATE_SLUG, [Item(id=id, slug="b")]))
        await other.wait_for_blocked()
        await other.commit()

        (ack,) = await update

    assert failures(ack) == [(0, "SLUG_TAKEN", 77)]
    await database.close()
