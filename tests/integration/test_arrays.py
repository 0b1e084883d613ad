"""Arrays that are sent as text, read back from the database."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import Boolean, Text, bindparam, func, select

from service.db.arrays import ArrayText
from service.db.base import BigInt, ColumnType
from service.db.engine import Database
from service.settings import Settings
from service.validation import MAX_ID

# Characters that mean something in the form, or that it could drop.
PUNCTUATION = st.text(st.sampled_from("{}\"\\,' \t\n\v\r;NULa\x01\xa0\u2003\ufeff😀"), max_size=8)
NOT_NUL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
TEXTS = PUNCTUATION | NOT_NUL | st.sampled_from(["NULL", "null", "", '"', "\\", "{}"])

ARRAYS: dict[str, tuple[ColumnType, st.SearchStrategy[Any]]] = {
    "texts": (Text(), TEXTS),
    "integers": (BigInt, st.integers(-MAX_ID, MAX_ID)),
    "booleans": (Boolean(), st.booleans()),
}


@pytest.mark.parametrize("name", ARRAYS)
async def test_array_of_any_values_arrives_unchanged(name: str, postgresql_url: str) -> None:
    """Nulls, empty arrays, and texts that look like other elements included."""
    kind, elements = ARRAYS[name]
    drawn: list[list[Any]] = []

    @settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(values=st.lists(st.none() | elements, max_size=5))
    def draw(values: list[Any]) -> None:
        drawn.append(values)

    draw()
    database = Database(Settings(database_url=postgresql_url))
    async with database.read() as session:
        for values in drawn:
            array = bindparam("values", values, type_=ArrayText(kind))
            rows = func.unnest(array).table_valued("value", with_ordinality="position").render_derived()
            found = await session.execute(select(rows.c.value).order_by(rows.c.position))
            assert [row[0] for row in found] == values
    await database.close()
