"""Bulk loads on both databases, compared with a model."""

from contextlib import aclosing
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import Table, delete, insert, select

from roster.v1.bulk_pb2 import BulkAck
from service.auth.caller import set_caller
from service.auth.policy import ANONYMOUS
from service.bulk.stream import BulkStreams
from service.db.base import Entity
from service.db.engine import Database
from service.posts.model import Post
from service.users.model import User
from tests.support.bulk_loads import LOADS
from tests.support.bulk_model import ADA, Load, Tables, apply_load, initial_tables
from tests.support.items import ItemRow, create_table

MODELS: dict[str, type[Entity]] = {"users": User, "posts": Post, "items": ItemRow}
TABLES = {name: cast("Table", model.__table__) for name, model in MODELS.items()}
EXAMPLES = 20
FAILURE_CHARACTERS = 200


async def refill(database: Database) -> None:
    """Restore the rows that the model starts with."""
    async with database.begin() as session:
        await session.execute(delete(User))
        await session.execute(delete(ItemRow))
        for name, rows in initial_tables().items():
            await session.execute(insert(TABLES[name]), [{"id": id, **values} for id, values in rows.items()])


async def contents(database: Database) -> Tables:
    """Return the stored rows with the columns of the model."""
    found: Tables = {}
    async with database.read() as session:
        for name, rows in initial_tables().items():
            columns = [TABLES[name].c[column] for column in ("id", *rows[ADA])]
            found[name] = {}
            for id, *values in await session.execute(select(*columns)):
                found[name][id] = dict(zip(rows[ADA], values, strict=True))
    return found


async def run_load(database: Database, load: Load) -> list[BulkAck]:
    """Run a load as a stream does, and return its acks."""

    async def requests() -> Any:
        for request in load.requests():
            yield request.SerializeToString()

    set_caller(ANONYMOUS)
    events = BulkStreams(database).run(requests(), load.operation)
    async with aclosing(events):
        return [event.ack async for event in events if event.HasField("ack")]


def new_ids(acks: list[BulkAck], expected: list[BulkAck]) -> dict[int, int]:
    """Return the model's id of each new row; ids rise in file order."""
    pairs = [
        (id, name)
        for ack, model in zip(acks, expected, strict=True)
        for id, name in zip(ack.ids, model.ids, strict=True)
        if name < 0
    ]
    names = dict(pairs)
    assert sorted(names, key=lambda id: -names[id]) == sorted(names)
    return names


def as_model(acks: list[BulkAck], names: dict[int, int]) -> list[BulkAck]:
    """Return acks with the model's ids and without messages of failures."""
    for ack in acks:
        ack.ids[:] = [names.get(id, id) for id in ack.ids]
        for failure in ack.failures:
            assert 0 < len(failure.message) <= FAILURE_CHARACTERS
            failure.existing_id = names.get(failure.existing_id, failure.existing_id)
            failure.ClearField("message")
    return acks


@pytest.mark.parametrize("kind", LOADS)
@settings(
    deadline=None,
    max_examples=EXAMPLES,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example refills the database
)
@given(data=st.data())
async def test_load_has_the_result_of_rows_in_file_order(
    database: Database, kind: str, data: st.DataObject
) -> None:
    """Acks and tables equal those of the model, however the load is cut into messages."""
    load = data.draw(LOADS[kind])
    await create_table(database)
    await refill(database)

    acks = await run_load(database, load)

    expected, tables = apply_load(initial_tables(), load)
    names = new_ids(acks, expected)
    found = await contents(database)
    rows = found[load.operation.rows_field]
    found[load.operation.rows_field] = {names.get(id, id): values for id, values in rows.items()}
    assert as_model(acks, names) == expected
    assert found == tables
