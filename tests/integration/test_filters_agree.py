import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import insert, select

from service.db.engine import Database
from service.db.filters import condition
from tests.filter_model import COLUMNS, ROWS, USERS, Node, filters, matches, written


@pytest.fixture
async def filled(database: Database) -> Database:
    async with database.begin() as session:
        await session.execute(insert(USERS), [row._asdict() for row in ROWS])
    return database


# All examples read the same rows, so they can share the database.
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(node=filters)
async def test_both_databases_match_the_rows_that_the_model_says(filled: Database, node: Node) -> None:
    """A random filter finds on either database what three-valued logic in plain Python finds."""
    expression = condition(written(node), COLUMNS)
    assert expression is not None
    async with filled.read() as session:
        found = await session.scalars(select(USERS.c.id).where(expression).order_by(USERS.c.id))
        assert found.all() == [row.id for row in ROWS if matches(node, row)]
