"""Parquet, read with pyarrow."""

from collections.abc import Iterator, Mapping
from functools import partial
from io import BufferedReader
from math import isnan
from typing import Any

from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import Columns
from service.cli.formats.base import SourceError, json_reject
from service.cli.formats.write import pyarrow
from service.cli.rows import Row, Values
from service.errors import InvalidField
from service.escape import escape

ROWS = 256  # read at once; a row has up to 1 MiB


class Parquet:
    """Parquet, read with pyarrow. Null, NaN and missing fields are unset. Its rejects are NDJSON.

    Only the columns of fields are read. Times become text first: Python has no nanoseconds, and no years
    after 9999, and pyarrow fails on these as a whole.
    """

    name, suffix, unit = "Parquet", "ndjson", "row"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._pyarrow = pyarrow()

    def rows(self, file: BufferedReader) -> Iterator[Row]:
        number = 0
        try:
            parquet = self._pyarrow.parquet.ParquetFile(file)
            fields = self._fields(parquet.schema_arrow.names)
            parse = partial(self._to_message, fields=fields)
            for batch in parquet.iter_batches(ROWS, columns=list(fields)):
                for values in self._readable(batch).to_pylist():
                    number += 1
                    yield Row.parse(number, batch.nbytes // len(batch), values, parse)
        except (self._pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise SourceError(f"the file can't be read as Parquet: {escape(str(error))}") from None

    def _fields(self, names: list[str]) -> Mapping[str, str]:
        """Return the fields by column; raises SourceError."""
        shown = escape(", ".join(names[:10]))
        for column in self.columns.mapping.values():
            if column not in names:
                raise SourceError(f"--columns names {escape(column)}, but the file has the columns {shown}")
        try:
            fields = self.columns.fields_of(names)
        except InvalidField as error:
            raise SourceError(error.message) from None
        if not any(fields):
            raise SourceError(
                f"the file has none of the columns {', '.join(self.columns.names)}; it has {shown}; "
                "name the columns with --columns, such as --columns email=Mail"
            )
        return {name: field for name, field in zip(names, fields, strict=True) if field}

    def _readable(self, batch: Any) -> Any:
        """Return a batch with its times as text."""
        is_temporal = self._pyarrow.types.is_temporal
        columns = [
            column.cast(self._pyarrow.string()) if is_temporal(column.type) else column
            for column in batch.columns
        ]
        return self._pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)

    def _to_message(self, row: Values, fields: Mapping[str, str]) -> Message:
        values = [None if _is_nan(value) else value for value in row.values()]
        return self.columns.message_of(map(fields.__getitem__, row), values)

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row, failure: RowFailure) -> bytes:
        return json_reject(row.original, row, failure)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and isnan(value)
