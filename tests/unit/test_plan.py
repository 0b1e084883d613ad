"""Plans of batches, against the model of the bulk streams."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from roster.errors import PostNotFound
from roster.v1.bulk_pb2 import BulkAck
from service.bulk.convert import outcome_to_message
from service.bulk.operation import Kind, StreamOptions
from service.db.bulk.batch import Batch, Outcome, Result, WriteOptions
from service.db.bulk.plan import StoredKey, plan_creates, plan_updates
from service.users.repository import USERS
from tests.support.bulk_loads import LOADS
from tests.support.bulk_model import Load, Tables, Values, apply_load, initial_tables


async def write_load(tables: Tables, load: Load) -> list[BulkAck]:
    """Write a load into the tables, one set of rows after another, and return its acks."""
    options = StreamOptions.from_message(load.options, load.operation).write
    write = write_updates if load.operation.kind is Kind.UPDATE else write_creates
    acks: list[BulkAck] = []
    offset = 0
    for rows in load.batches:
        batch = await load.operation.batch(rows, options)
        outcome = await write(tables[load.operation.rows_field], batch, options)
        end = offset + len(rows)
        message = await outcome_to_message(offset, end, outcome, return_ids=True, is_replayed=False)
        acks.append(message.ack)
        offset = end
    return acks


async def write_creates(users: dict[int, Values], batch: Batch, options: WriteOptions) -> Outcome:
    ids = {user["email"]: id for id, user in users.items()}
    creates = await plan_creates(batch, [StoredKey(USERS.unique[0], ids)], options.on_conflict)
    if options.is_atomic and batch.failures:
        return Outcome.of_failed_batch(batch)
    if options.validate_only:
        return creates.outcome(batch, options, [])
    columns = {"version": [1] * len(creates.inserted), **creates.columns(batch, options)}
    first = min(0, *users) - 1
    new_ids = [first - row for row in range(len(creates.inserted))]
    for row, id in enumerate(new_ids):
        assert id not in users
        users[id] = {name: column[row] for name, column in columns.items()}
    for id, rows in creates.updated.items():
        change(users[id], batch, rows, options)
    return creates.outcome(batch, options, new_ids)


async def write_updates(posts: dict[int, Values], batch: Batch, options: WriteOptions) -> Outcome:
    versions = {id: post["version"] for id, post in posts.items()}
    updates = await plan_updates(batch, versions, lambda: PostNotFound("there is no such post"))
    if options.is_atomic and batch.failures:
        return Outcome.of_failed_batch(batch)
    results, ids = bytearray(batch.size), [0] * batch.size
    for id, rows in updates.items():
        for row in rows:
            results[row], ids[row] = Result.UPDATED, id
        if not options.validate_only:
            change(posts[id], batch, rows, options)
    return Outcome(bytes(results), ids, batch.failures)


def change(values: Values, batch: Batch, rows: list[int], options: WriteOptions) -> None:
    values.update({name: batch.columns[name][rows[-1]] for name in options.update_fields})
    values["version"] += len(rows)


def without_sentences(acks: list[BulkAck]) -> list[BulkAck]:
    for ack in acks:
        for failure in ack.failures:
            failure.ClearField("message")
    return acks


@pytest.mark.parametrize("kind", ["create users", "create or update users", "update posts"])
@given(data=st.data())
async def test_plan_has_the_result_of_rows_in_file_order(kind: str, data: Any) -> None:
    """Writing the sets of a plan gives the acks and tables of the model, which applies row by row."""
    load = data.draw(LOADS[kind])
    tables = initial_tables()

    acks = await write_load(tables, load)

    assert (without_sentences(acks), tables) == apply_load(initial_tables(), load)
