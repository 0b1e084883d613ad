"""Files of rows for `roster load`, read without a server."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from service.cli.columns import Columns
from service.cli.formats import FileFormat
from service.cli.rows import ENTITIES, Row


def columns_of(
    entity: str = "users",
    operation: str = "create",
    *,
    mapping: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> Columns:
    """Return the columns that an operation reads."""
    kind = ENTITIES[entity]
    return Columns(kind, kind.columns(operation, ["*"]), mapping, ignore)


def rows_of(file_format: FileFormat, data: bytes) -> list[Row[Any]]:
    """Return the rows of a file's content, parsed."""
    rows = list(file_format.rows(io.BufferedReader(io.BytesIO(data))))
    for row in rows:
        row.parse()
    return rows


def shown(rows: Sequence[Row[Any]]) -> list[str]:
    """Return each row as text: its fields, or the reason why it failed."""
    return [row.failure.message if row.failure else _fields(row) for row in rows]


def _fields(row: Row[Any]) -> str:
    assert row.message is not None
    return " ".join(f"{field.name}={value!r}" for field, value in row.message.ListFields())
