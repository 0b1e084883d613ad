"""Parquet, read with pyarrow."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from io import BufferedReader, BytesIO, FileIO
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO, Any, TypeAlias

from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import Columns
from service.cli.formats.base import SourceError, json_reject
from service.cli.formats.write import pyarrow
from service.cli.rows import Row, Values
from service.escape import escape

ROWS = 256  # read at once; a row has up to 1 MiB

# The values of all rows of a batch, computed when they are needed, and the index of one of them.
Original: TypeAlias = tuple[Callable[[], list[Values]], int]


class Unreadable:
    """A value that Python can't hold, such as a time in the year 294247. No field accepts it."""

    def __str__(self) -> str:
        return "<unreadable>"


class Parquet:
    """Parquet, read with pyarrow. Null, NaN and missing fields are unset. Its rejects are NDJSON.

    Its columns are not in the order of the file, so a pipe or a compressed file is copied first, into the
    folder for temporary files. Only the columns of fields are read. Times become text first: Python has no
    nanoseconds, and no years after 9999, and pyarrow fails on these as a whole.
    """

    name, suffix, unit = "Parquet", "ndjson", "row"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._pyarrow = pyarrow()

    def rows(self, file: BufferedReader) -> Iterator[Row[Any]]:
        if _is_plain(file):
            yield from self._rows(file)
            return
        with TemporaryFile() as copy:
            copyfileobj(file, copy)
            copy.seek(0)
            yield from self._rows(copy)

    def _rows(self, file: IO[bytes]) -> Iterator[Row[Any]]:
        number = 0
        try:
            parquet = self._pyarrow.parquet.ParquetFile(file)
            fields = self._fields(parquet.schema_arrow.names)
            parse = partial(self._to_message, fields=fields)
            for batch in parquet.iter_batches(ROWS, columns=list(fields)):
                values = cache(partial(self._values, batch, fields))
                for index in range(len(batch)):
                    number += 1
                    yield Row(number, batch.nbytes // len(batch), (values, index), parse)
        except (self._pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise SourceError(f"the file can't be read as Parquet: {escape(str(error))}") from None

    def _fields(self, names: list[str]) -> Mapping[str, str]:
        """Return the fields by column; raises SourceError."""
        fields = self.columns.check(names, "the file")
        return {name: field for name, field in zip(names, fields, strict=True) if field}

    def _values(self, batch: Any, fields: Mapping[str, str]) -> list[Values]:
        """Return the rows of a batch."""
        columns = [
            self._column(column, is_time=fields[name] in self.columns.times)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        ]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _column(self, column: Any, *, is_time: bool) -> list[Any]:
        """Return the values of a column; one that Python can't hold becomes Unreadable."""
        text, is_temporal = self._pyarrow.string(), self._pyarrow.types.is_temporal
        errors = (self._pyarrow.ArrowException, ValueError, OverflowError, LookupError)
        try:
            readable = column.cast(text) if is_time and is_temporal(column.type) else column
            values: list[Any] = readable.to_pylist()
        except errors:  # of one of the values
            return [_value(cell, errors) for cell in column]
        return values

    def _to_message(self, original: Original, fields: Mapping[str, str]) -> Message:
        row = _row(original)
        return self.columns.message_of(map(fields.__getitem__, row), row.values())

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row[Any], failure: RowFailure) -> bytes:
        return json_reject(_row(row.original), row, failure)


def _is_plain(file: BufferedReader) -> bool:
    """Return whether it costs little to read a file in any order: not a pipe, and not compressed."""
    return isinstance(file.raw, FileIO | BytesIO) and file.seekable()


def _value(cell: Any, errors: tuple[type[Exception], ...]) -> Any:
    try:
        return cell.as_py()
    except errors:
        # Text that is not UTF-8 fails with that reason.
        return cell.as_buffer().to_pybytes() if hasattr(cell, "as_buffer") else Unreadable()


def _row(original: Original) -> Values:
    values, index = original
    return values()[index]
