"""The indexes that lists and foreign keys need."""

from typing import Any

from sqlalchemy import PrimaryKeyConstraint, Table, UniqueConstraint

from service.db.base import Base
from service.posts.repository import PostRepository
from service.users.repository import UserRepository


def indexes(table: Table) -> list[list[str]]:
    """Return the columns of each index and key of a table."""
    kinds = (PrimaryKeyConstraint, UniqueConstraint)
    keys = [constraint for constraint in table.constraints if isinstance(constraint, kinds)]
    return [[column.name for column in each.columns] for each in (*table.indexes, *keys)]


def has_index(columns: list[Any]) -> bool:
    """Return whether an index begins with these columns."""
    names = [column.name for column in columns]
    return any(index[: len(names)] == names for index in indexes(columns[0].table))


def test_every_order_and_every_reference_has_an_index() -> None:
    """No page sorts a whole table, and no delete scans one for dependent rows."""
    orders = [
        [attribute.property.columns[0] for attribute in order]
        for order in (*UserRepository.sortable.values(), *PostRepository.sortable.values())
    ]
    references = [[key.parent] for table in Base.metadata.sorted_tables for key in table.foreign_keys]

    assert "posts.author_id" in [str(column) for [column] in references]
    assert [str(columns) for columns in (*orders, *references) if not has_index(columns)] == []
