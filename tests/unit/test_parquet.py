"""Parquet as pandas, Spark and warehouses write it."""

import datetime as dt
import gzip
import io
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from roster.v1.bulk_pb2 import RowFailure
from roster.v1.resources_pb2 import User
from service.cli.compression import decompress
from service.cli.formats import Parquet, SourceError
from service.cli.rows import Row
from tests.support.files import columns_of, rows_of, shown

pyarrow: Any = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
parquet: Any = pytest.importorskip("pyarrow.parquet")

FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")
YEAR_294247 = (1 << 63) - 1  # microseconds


def packed(columns: dict[str, Any]) -> bytes:
    """Return a table as Parquet."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def rows_in(columns: dict[str, Any], operation: str = "restore") -> list[Row[Any]]:
    """Return the rows of a table."""
    return rows_of(Parquet(columns_of(operation=operation)), packed(columns))


@pytest.mark.parametrize(
    "unread",
    [
        pyarrow.array([1], pyarrow.timestamp("ns")),
        pyarrow.array([YEAR_294247], pyarrow.timestamp("us")),
        pyarrow.array([-YEAR_294247], pyarrow.timestamp("us", "UTC")),
        pyarrow.array([1 << 30], pyarrow.date32()),
        pyarrow.array([1], pyarrow.duration("ns")),
        pyarrow.array([1], pyarrow.time64("ns")),
        pyarrow.array([[{"a": 1}]]),
        pyarrow.array([b"\xff"]),
    ],
    ids=lambda array: str(array.type),
)
def test_reads_only_the_columns_of_fields(unread: Any) -> None:
    """A value that Python can't hold does no harm in a column that nobody reads."""
    assert shown(rows_in({"email": ["a@x"], "seen": unread})) == ["email='a@x'"]


@pytest.mark.parametrize("kind", ["timestamp[ns, UTC]", "timestamp[us, UTC]", "timestamp[ms, Europe/Berlin]"])
def test_reads_times_of_any_unit(kind: str) -> None:
    """Times with a time zone are moments, whatever the zone; nanoseconds are cut off."""
    unit, zone = kind.removeprefix("timestamp[").removesuffix("]").split(", ")
    per_second = {"ns": 10**9, "us": 10**6, "ms": 10**3}[unit]
    moment = pyarrow.array([1_706_693_400 * per_second + 1], pyarrow.timestamp(unit, zone))

    [row] = rows_in({"email": ["a@x"], "created_at": moment})

    assert isinstance(row.message, User)
    assert row.message.created_at.seconds == 1_706_693_400
    assert row.message.created_at.nanos == {"ns": 0, "us": 1000, "ms": 10**6}[unit]


@pytest.mark.parametrize(
    "moment",
    [
        pyarrow.array([YEAR_294247, 0], pyarrow.timestamp("us", "UTC")),
        pyarrow.array([0, 0], pyarrow.timestamp("us")),
        pyarrow.array([0, 0], pyarrow.date32()),
        pyarrow.array([1, 2]),
    ],
    ids=lambda array: str(array.type),
)
def test_other_times_fail_their_rows(moment: Any) -> None:
    """Years after 9999, times without a time zone, and dates; the reject has the value as it was."""
    known = Parquet(columns_of(operation="restore"))
    first, *_ = rows_of(known, packed({"email": ["a@x", "b@x"], "created_at": moment}))

    assert first.failure is not None
    assert (first.failure.reason, first.failure.field) == ("INVALID_FIELD", "created_at")
    assert json.loads(known.reject(first, first.failure))["email"] == "a@x"


BYTES = ["binary", "large_binary", "large_string", "string", "dictionary"]


@pytest.mark.parametrize("kind", BYTES)
def test_reads_text_of_any_type(kind: str) -> None:
    """Spark and Impala write bytes, pandas categories are dictionaries; rejects have the text."""
    array = pyarrow.array(["jürgen@x", None])
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    array = array.cast(types.get(kind) or getattr(pyarrow, kind)())
    known = Parquet(columns_of(operation="restore"))

    first, second = rows_of(known, packed({"email": array, "id": [1, 2]}))

    assert shown([first, second]) == ["id=1 email='jürgen@x'", "id=2"]
    assert json.loads(known.reject(first, FAILURE))["email"] == "jürgen@x"


def test_bytes_that_are_not_utf_8_fail_their_row() -> None:
    """The others are read, and the reject shows the bytes."""
    known = Parquet(columns_of())
    bad, good = rows_of(known, packed({"email": pyarrow.array([b"\xff@x", b"b@x"])}))

    assert bad.failure is not None
    assert bad.failure.message == "email must be UTF-8"
    assert json.loads(known.reject(bad, bad.failure))["email"] == "\\xff@x"
    assert shown([good]) == ["email='b@x'"]


@pytest.mark.parametrize(
    "ids",
    [
        pyarrow.array([7, None], pyarrow.uint64()),
        pyarrow.array([7, None], pyarrow.int8()),
        pyarrow.array([7.0, None]),
        pyarrow.array([7.0, float("nan")]),
        pyarrow.array([Decimal(7), None], pyarrow.decimal128(38, 0)),
        pyarrow.array([Decimal(7), None], pyarrow.decimal256(76, 0)),
        pyarrow.array(["7", ""]),
    ],
    ids=lambda array: str(array.type),
)
def test_reads_ids_of_any_type(ids: Any) -> None:
    """Pandas writes floats with NaN, Snowflake decimals."""
    assert shown(rows_in({"email": ["a@x", "b@x"], "id": ids})) == ["id=7 email='a@x'", "email='b@x'"]


@pytest.mark.parametrize(
    "ids", [[7.5], [1e300], [(1 << 64) - 1], [Decimal("7.5")], [[7]], [dt.date(2024, 1, 1)]]
)
def test_refuses_other_ids(ids: list[Any]) -> None:
    """The row fails, not the file."""
    array = pyarrow.array(ids, pyarrow.uint64()) if ids == [(1 << 64) - 1] else ids
    [row] = rows_in({"email": ["a@x"], "id": array})

    assert row.failure is not None
    assert row.failure.message == "id must be an integer of at most 64 bits"


def test_reads_booleans_of_any_type() -> None:
    """Pandas writes 1.0 for a column with gaps, MySQL's exports 1."""
    for array in ([True, False], [1, 0], [1.0, 0.0], ["t", "no"], pyarrow.array([1, 0], pyarrow.int8())):
        assert shown(rows_in({"email": ["a@x", "b@x"], "is_active": array})) == [
            "email='a@x' is_active=True",
            "email='b@x' is_active=False",
        ]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (
            pyarrow.array([b"\xff", b"b"]).cast(pyarrow.binary()).view(pyarrow.string()),
            "full_name must be UTF-8",
        ),
        (pyarrow.array([[1], None], pyarrow.list_(pyarrow.timestamp("ns"))), "full_name must be a string"),
        (pyarrow.array([[1 << 30], None], pyarrow.list_(pyarrow.date32())), "full_name must be a string"),
        (pyarrow.array([1 << 62, None], pyarrow.time64("us")), "full_name must be a string"),
        (pyarrow.array([YEAR_294247, None], pyarrow.timestamp("us")), "full_name must be a string"),
        (pyarrow.array([0, None], pyarrow.timestamp("us", "Nowhere/City")), "full_name must be a string"),
    ],
    ids=lambda column: str(getattr(column, "type", "")),
)
def test_a_value_that_python_can_not_hold_fails_its_row(column: Any, reason: str) -> None:
    """The rows after it are read, and the reject can be written."""
    known = Parquet(columns_of())

    bad, good = rows_of(known, packed({"email": ["a@x", "b@x"], "full_name": column}))

    assert shown([bad]) == [reason]
    assert good.message is not None
    assert bad.failure is not None
    assert json.loads(known.reject(bad, bad.failure))["email"] == "a@x"


def test_refuses_a_file_without_known_columns() -> None:
    """The sentence has the columns of the file, and what to do."""
    with pytest.raises(SourceError, match=r"none of the columns email, .*; it has a, b; .*--columns"):
        rows_in({"a": [1], "b": [2]}, "create")
    with pytest.raises(SourceError, match="If it is email, add --columns email=mail"):
        rows_in({"mail": ["a@x"]}, "create")


class Pipe(io.BytesIO):
    """A file that can be read only once."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise OSError(29, "Illegal seek")


@pytest.mark.parametrize("packed_twice", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", [io.BytesIO, Pipe])
def test_reads_from_a_pipe(kind: type[io.BytesIO], packed_twice: Callable[[bytes], bytes]) -> None:
    """The list of columns is at the end of a file, so a pipe is copied first."""
    data = packed_twice(packed({"email": [f"{number}@x" for number in range(1000)]}))
    file = decompress(io.BufferedReader(kind(data)))

    rows = list(Parquet(columns_of()).rows(file))

    assert [row.number for row in rows] == list(range(1, 1001))


def test_rejects_keep_infinity() -> None:
    """Null would be loaded as an unset value. NaN is unset."""
    known = Parquet(columns_of())
    values = {"email": ["a@x", "b@x"], "is_active": [float("inf"), float("nan")]}

    rows = rows_of(known, packed(values))

    assert shown(rows) == ["is_active must be true or false (yes/no and 1/0 work too)", "email='b@x'"]
    assert json.loads(known.reject(rows[0], FAILURE))["_line"] == '{"email": "a@x", "is_active": Infinity}'
    assert json.loads(known.reject(rows[1], FAILURE))["is_active"] is None


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([{"first": "Ada"}]),
        pyarrow.array([["Ada"]]),
        pyarrow.array([[("first", "Ada")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    ],
    ids=["struct", "list", "map"],
)
def test_nested_values_fail_their_rows(column: Any) -> None:
    """No text is made of them; in a column that nobody reads they do no harm."""
    assert shown(rows_in({"email": ["a@x"], "full_name": column})) == ["full_name must be a string"]
    assert shown(rows_in({"email": ["a@x"], "x": column})) == ["email='a@x'"]


def test_reads_files_without_rows() -> None:
    """BigQuery and Spark write empty parts."""
    assert rows_in({"email": pyarrow.array([], pyarrow.string())}) == []


def test_column_names_may_have_dots() -> None:
    """To pyarrow a dot can mean a field of a struct."""
    columns = {"email": ["a@x"], "full.name": ["Ada"], "full_name.first": ["x"]}
    known = Parquet(columns_of(ignore=["full_name.first"]))

    assert shown(rows_of(known, packed(columns))) == ["email='a@x' full_name='Ada'"]
