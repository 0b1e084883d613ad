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
from service.errors import InvalidField
from service.escape import escape

ROWS = 256  # read at once; a row has up to 1 MiB

# The values of all rows of a batch, computed when they are needed, and the index of one of them.
Original: TypeAlias = tuple[Callable[[], list[Values]], int]


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
                values = cache(partial(self._values, batch))
                for index in range(len(batch)):
                    number += 1
                    yield Row(number, batch.nbytes // len(batch), (values, index), parse)
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

    def _values(self, batch: Any) -> list[Values]:
        """Return the rows of a batch, with their times as text; raises SourceError."""
        is_temporal = self._pyarrow.types.is_temporal
        text = self._pyarrow.string()
        columns = [column.cast(text) if is_temporal(column.type) else column for column in batch.columns]
        rows: list[Values] = self._pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
        return rows

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


def _row(original: Original) -> Values:
    values, index = original
    return values()[index]
