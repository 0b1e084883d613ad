"""Rows of files: parsing, failures, and rejects."""

import gzip
import io
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings, strategies as st

from roster.v1.bulk_pb2 import BulkAck, BulkOptions, RowFailure
from roster.v1.resources_pb2 import Post, User
from service.cli.columns import Columns
from service.cli.formats import Csv, FileFormat, Json, Parquet, SourceError, csv_file
from service.cli.formats.base import MAX_LINE_BYTES
from service.cli.formats.csv_file import NO_ENCODING
from service.cli.formats.write import csv_line, csv_lines, json_line, json_lines, time_texts
from service.cli.rejects import RejectsFile
from service.cli.report import LoadReport
from service.cli.rows import POSTS, USERS, Row, columns_of
from service.cli.source import Source
from service.cli.terminal import UsageError
from service.cli.tracker import RowTracker
from tests.support.files import rows_of

NOT_UTF_8 = f"the row is not UTF-8; {NO_ENCODING}".encode()
ANY_FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")


def columns(message: type[Message], operation: str = "create") -> Columns:
    """Return the columns of an entity."""
    entity = USERS if message is User else POSTS
    return Columns(entity, entity.columns(operation, ["full_name"]))


async def rows_in(path: Path, file_format: FileFormat) -> list[Row[Any]]:
    """Return the rows of a file."""
    return [row async for chunk in Source(str(path), file_format).chunks(0) for row in chunk]


def emails(rows: Sequence[Row[Any]]) -> list[str]:
    """Return the e-mails of rows of users, "" for rows that failed."""
    return [getattr(row.message, "email", "") for row in rows]


GOOD_JSON = [
    (User, '{"email": "a@x"}', User(email="a@x")),
    (User, '{"email": "a@x", "full_name": ""}', User(email="a@x", full_name="")),
    (User, '{"email": "a@x", "full_name": null, "is_active": null}', User(email="a@x")),
    (User, '{"email": "a@x", "is_active": false}', User(email="a@x", is_active=False)),
    (User, '{"email": "a@x", "is_active": "True"}', User(email="a@x", is_active=True)),
    (Post, '{"title": "", "author_id": ""}', Post()),
    (User, '{"email": "a@x", "hashed_password": "h", "password": "p"}', None),
    (User, '{"full_name": "\\ud83d\\ude00 é\\u0000"}', User(full_name="😀 é\0")),
    (User, " \t{}\r", User()),
    (Post, '{"title": "t", "author_id": 7}', Post(title="t", author_id=7)),
    (Post, '{"author_id": "9223372036854775807"}', Post(author_id=(1 << 63) - 1)),
    (Post, '{"author_id": -9223372036854775808}', Post(author_id=-(1 << 63))),
    (Post, '{"content": "a\\r\\nb", "author_email": "a@x"}', Post(content="a\r\nb", author_email="a@x")),
]


@pytest.mark.parametrize(("message", "line", "expected"), GOOD_JSON)
def test_json_becomes_a_message(message: type[Message], line: str, expected: Message | None) -> None:
    """Known fields are copied; null is unset."""
    [row] = rows_of(Json(columns(message)), line.encode())

    assert row.failure is None
    assert row.message == (expected or User(email="a@x", hashed_password="h", password="p"))


BAD_JSON = [
    (User, b'{"email": 7}', "INVALID_FIELD", "email", "email must be a string"),
    (User, b'{"email": ["a@x"]}', "INVALID_FIELD", "email", "email must be a string"),
    (User, b'{"is_active": "maybe"}', "INVALID_FIELD", "is_active", "is_active must be true or false"),
    (User, b'{"is_active": 2}', "INVALID_FIELD", "is_active", "is_active must be true or false"),
    (Post, b'{"author_id": "x"}', "INVALID_FIELD", "author_id", "author_id must be an integer"),
    (Post, b'{"author_id": true}', "INVALID_FIELD", "author_id", "author_id must be an integer"),
    (Post, b'{"author_id": 1.5}', "INVALID_FIELD", "author_id", "author_id must be an integer"),
    (Post, b'{"author_id": 9223372036854775808}', "INVALID_FIELD", "author_id", "at most 64 bits"),
    (Post, b'{"author_id": "' + b"9" * 5000 + b'"}', "INVALID_FIELD", "author_id", "at most 64 bits"),
    (User, b'{"email": "a@x"', "MALFORMED_MESSAGE", "", "the line is not JSON: "),
    (User, b"nothing", "MALFORMED_MESSAGE", "", "the line is not JSON: "),
    (User, b'["a@x"]', "MALFORMED_MESSAGE", "", "the row is JSON, but not an object"),
    (User, b'{"email": "\\ud800"}', "INVALID_FIELD", "email", "surrogate"),
    (User, b'{"email": "\xff"}', "MALFORMED_MESSAGE", "", "UTF-8"),
    (User, b'{"full_name": "' + b"x" * (2 << 20) + b'"}', "TOO_LARGE", "", "the row is larger than 2 MiB"),
]


@pytest.mark.parametrize(
    ("message", "line", "reason", "field", "expected"), BAD_JSON, ids=[str(case[1][:30]) for case in BAD_JSON]
)
def test_invalid_json_fails_its_row(
    message: type[Message], line: bytes, reason: str, field: str, expected: str
) -> None:
    """The failure has a reason, the invalid field, and a message; the next row is parsed."""
    bad, good = rows_of(Json(columns(message)), line + b"\n{}\n")

    assert bad.failure is not None
    assert (bad.failure.reason, bad.failure.field) == (reason, field)
    assert expected in bad.failure.message
    assert good.message == message()


CSV_HEADER = b"email,full_name,is_active\r\n"
GOOD_CSV = [
    (b"a@x,,", User(email="a@x")),
    (b"a@x,Ada,TRUE\r\n", User(email="a@x", full_name="Ada", is_active=True)),
    (b"a@x,,0", User(email="a@x", is_active=False)),
    (b"a@x,,1", User(email="a@x", is_active=True)),
    (b"a@x,,False", User(email="a@x", is_active=False)),
    (
        b'a@x,"Ada, ""Countess""\r\nof Lovelace",',
        User(email="a@x", full_name='Ada, "Countess"\r\nof Lovelace'),
    ),
    (b'"",\xc3\xa9,""', User(full_name="é")),
    (b'a@x,"",', User(email="a@x", full_name="")),
    (b'a@x," ",', User(email="a@x", full_name=" ")),
    (b'"a@x","""",""', User(email="a@x", full_name='"')),
    (b'a@x,"\r\n\n",true\r\n', User(email="a@x", full_name="\r\n\n", is_active=True)),
]


@pytest.mark.parametrize(("line", "expected"), GOOD_CSV)
def test_csv_becomes_a_message(line: bytes, expected: User) -> None:
    """An empty cell is unset, a quoted one an empty string; quotes can contain commas and line ends."""
    [row] = rows_of(Csv(columns(User)), CSV_HEADER + line)

    assert (row.message, row.failure) == (expected, None)


BAD_CSV = [
    (b"a@x,,maybe\n", "INVALID_FIELD", "is_active", "is_active must be true or false"),
    (b"a@x\n", "MALFORMED_MESSAGE", "", "the row has 1 cell, but the header has 3"),
    (b"a@x,,,4\n", "MALFORMED_MESSAGE", "", "the row has 4 cells, but the header has 3"),
    (b"\xff@x,,\n", "MALFORMED_MESSAGE", "", "the row is not UTF-8"),
    (b'"a"x,,\n', "MALFORMED_MESSAGE", "", "text follows a closing quote"),
    (b'a@x,"A"d"a",\n', "MALFORMED_MESSAGE", "", "text follows a closing quote"),
    (b'a@x,"Ada,\n', "MALFORMED_MESSAGE", "", "a quote is never closed"),
    (b"x" * (MAX_LINE_BYTES + 1) + b"\n", "TOO_LARGE", "", "the row is longer than 8 MiB"),
    (b'"' + b"x" * (MAX_LINE_BYTES + 1) + b"\n", "TOO_LARGE", "", "the row is longer than 8 MiB"),
]


@pytest.mark.parametrize(
    ("line", "reason", "field", "expected"), BAD_CSV, ids=[str(case[0][:30]) for case in BAD_CSV]
)
def test_invalid_csv_fails_its_row(line: bytes, reason: str, field: str, expected: str) -> None:
    """The failure has a reason, the invalid field, and a message; the next row is parsed."""
    bad, good = rows_of(Csv(columns(User)), CSV_HEADER + line + b"b@x,,\n")

    assert bad.failure is not None
    assert (bad.failure.reason, bad.failure.field) == (reason, field)
    assert expected in bad.failure.message
    assert good.message == User(email="b@x")


def test_a_stray_quote_fails_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines after it are rows, however long the cell is that the quote would begin."""
    monkeypatch.setattr(csv_file, "MAX_LINE_BYTES", 1000)
    data = CSV_HEADER + b'a@x,,\nb@x,"Ada,\n' + b"c@x,xxxx,\n" * 200

    rows = rows_of(Csv(columns(User)), data)

    assert [row.number for row in rows] == list(range(2, 204))
    assert emails(rows) == ["a@x", "", *["c@x"] * 200]
    assert rows[1].original[0] == 'b@x,"Ada,\n'
    assert rows[1].failure is not None
    assert rows[1].failure.reason == "TOO_LARGE"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (b"\r\n \r\n", "the file is empty"),
        (b"a@x,Ada\n", "has none of the columns email, full_name, .*; it has a@x, Ada; .*--columns"),
        (b"email,E-Mail\n", 'the columns "email" and "E-Mail" are both email; choose one with --columns'),
        (b"email,\xff\n", "the header line is not UTF-8; .*--encoding, such as cp1252"),
        (b'foo,"bar\n', "has none of the columns email"),
        ("email,full_name\n".encode("utf-16-le"), "zero bytes; if it is UTF-16, add --encoding utf-16-le"),
        (b"email,full_nmae\n", 'column "full_nmae" is not known. If it is full_name, .*--ignore full_nmae'),
    ],
)
def test_refuses_csv_without_a_usable_header(data: bytes, expected: str) -> None:
    """The whole file is refused."""
    with pytest.raises(SourceError, match=expected):
        rows_of(Csv(columns(User)), data)


def test_collects_the_names_of_ignored_columns() -> None:
    """Each name once, in file order; `_error` of earlier rejects is not reported."""
    known = columns(User)
    rows_of(Json(known), b'{"id": 1, "email": "a@x", "_error": {}}\n{"foo": 1, "id": 2}\n')

    assert list(known.ignored) == ["id", "foo"]


def test_numbers_rows_by_their_first_line() -> None:
    """Blank lines are not rows, but they count as lines."""
    json_rows = rows_of(Json(columns(User)), b"\n{}\n \n{}\n")
    csv_rows = rows_of(Csv(columns(User)), b'email,full_name\n\na@x,"1\n2"\n\nb@x,\n')

    assert [row.number for row in json_rows] == [2, 4]
    assert [row.number for row in csv_rows] == [3, 6]


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
async def test_reads_plain_and_gzip_with_or_without_a_byte_order_mark(
    tmp_path: Path, packed: Any, mark: bytes
) -> None:
    """Compression is detected from the first bytes, not from the name."""
    path = tmp_path / "users"
    path.write_bytes(packed(mark + b'{"email": "a@x"}\n{"email": "b@x"}'))
    source = Source(str(path), Json(columns(User)))

    assert emails([row async for chunk in source.chunks(0) for row in chunk]) == ["a@x", "b@x"]
    assert source.bytes_read == source.bytes_total == path.stat().st_size


async def test_reports_damaged_gzip(tmp_path: Path) -> None:
    """A truncated file yields its complete rows, then an error."""
    path = tmp_path / "users.ndjson.gz"
    path.write_bytes(gzip.compress(b'{"email": "a@x"}\n' * 9)[:-9])

    with pytest.raises(SourceError, match="the compressed data is damaged"):
        await rows_in(path, Json(columns(User)))


async def test_a_line_that_is_too_long_fails_as_one_row(tmp_path: Path) -> None:
    """The line is not kept, and the lines after it are parsed."""
    path = tmp_path / "users.ndjson"
    path.write_bytes(b'{"email": "a@x"}\n' + b"x" * (3 * MAX_LINE_BYTES) + b'\n{"email": "b@x"}\n')

    rows = await rows_in(path, Json(columns(User)))

    assert emails(rows) == ["a@x", "", "b@x"]
    assert [row.number for row in rows] == [1, 2, 3]
    assert rows[1].failure is not None
    assert rows[1].failure.reason == "TOO_LARGE"


def test_json_rejects_have_the_row_and_its_error() -> None:
    """A row keeps its fields; a line that is not JSON is kept as text."""
    ndjson = Json(columns(User))
    rows = rows_of(ndjson, b'{"email": "a@x", "foo": [1.5], "_error": {"row": 3}}\nno \xff\xc3\xa9\n')

    [parsed, unparsed] = [json.loads(ndjson.reject(row, ANY_FAILURE)) for row in rows]

    error = {"reason": "EMAIL_TAKEN", "field": "email", "message": "email belongs to another user"}
    assert parsed == {"email": "a@x", "foo": [1.5], "_error": {**error, "row": 1}}
    assert unparsed == {"_line": "no \\xffé", "_error": {**error, "row": 2}}


def test_rejects_keep_deeply_nested_json() -> None:
    """The JSON parser accepts deeper nesting than the writer."""
    ndjson = Json(columns(User))
    line = b'{"email": "a@x", "foo": ' + b"[" * 500 + b"]" * 500 + b"}"
    [row] = rows_of(ndjson, line)

    assert ndjson.reject(row, ANY_FAILURE).startswith(line[:-1] + b',"_error":')


def test_csv_rejects_have_the_cells_as_they_were() -> None:
    """The error is the first column, so that rows with missing cells keep their columns."""
    csv_format = Csv(columns(User))
    rows = rows_of(csv_format, b'email,foo\na@x,"1,2"\nb@x\nc@x,1,2\n\xff@x,\n')

    rejected = [csv_format.reject(row, row.failure or ANY_FAILURE) for row in rows]

    assert csv_format.rejects_header() == b"_error,email,foo\n"
    assert rejected == [
        b'line 2: EMAIL_TAKEN email: email belongs to another user,a@x,"1,2"\n',
        b'"line 3: MALFORMED_MESSAGE: the row has 1 cell, but the header has 2",b@x\n',
        b'"line 4: MALFORMED_MESSAGE: the row has 3 cells, but the header has 2",c@x,1,2\n',
        b'"line 5: MALFORMED_MESSAGE: %s",\xff@x,\n' % NOT_UTF_8,
    ]


FILES = {
    Json: b'{"email": "a@x", "is_active": "maybe"}\n{"email": "b@x", "is_active": "maybe", "foo": 1}\n',
    Csv: b'email,is_active,foo\na@x,maybe,\n"b@x",maybe,"1\n2"\n',
}


@pytest.mark.parametrize("kind", [Json, Csv])
@pytest.mark.parametrize("is_fixed", [True, False])
async def test_rejects_can_be_loaded_again(
    tmp_path: Path, kind: type[Json] | type[Csv], is_fixed: bool
) -> None:
    """Once fixed, they load; unchanged, they fail in the same way. Their old `_error` is ignored."""
    path = tmp_path / "rejects"
    file_format = kind(columns(User))
    loaded = TrackedRows(path, file_format, FILES[kind])
    loaded.tracker.settle(BulkAck(failed=2, failures=[RowFailure(offset=0), RowFailure(offset=1)]))
    loaded.rejects.close()
    if is_fixed:
        path.write_bytes(path.read_bytes().replace(b"maybe", b"false").replace(b'"false"', b"false"))
    known = columns(User)

    rows = await rows_in(path, kind(known))

    assert "_error" not in known.ignored
    assert emails(rows) == (["a@x", "b@x"] if is_fixed else ["", ""])


class TrackedRows:
    """The rows of a file, all sent to the server, with their report and rejects."""

    def __init__(self, path: Path, file_format: FileFormat, data: bytes) -> None:
        self.rejects = RejectsFile(path, file_format)
        self.report = LoadReport("users", file_format, BulkOptions(), self.rejects)
        self.tracker = RowTracker(self.report, self.rejects)
        for row in rows_of(file_format, data):
            self.tracker.add(row)

    def rejected_lines(self) -> list[int]:
        """Close the rejects, and return their line numbers."""
        self.rejects.close()
        assert self.rejects.written_to
        lines = self.rejects.written_to.read_bytes().splitlines()
        return [json.loads(line)["_error"]["row"] for line in lines]


@pytest.fixture
def track(tmp_path: Path) -> Callable[[bytes], TrackedRows]:
    """Return a function that tracks the rows of NDJSON."""
    return partial(TrackedRows, tmp_path / "rejects.ndjson", Json(columns(User)))


Track = Callable[[bytes], TrackedRows]


def test_rejects_keep_the_order_of_the_file(track: Track) -> None:
    """A row that could not be parsed has its own reason, and not that of the empty row sent instead."""
    rows = track(b"{}\n2\n{}\n{}\n5\n")
    empty = RowFailure(offset=1, reason="INVALID_FIELD", field="email", message="email is empty")

    rows.tracker.settle(BulkAck(offset=0, next_offset=2, failed=2, failures=[RowFailure(offset=0), empty]))
    rows.tracker.settle(BulkAck(offset=2, created=2, failed=1, failures=[RowFailure(offset=4)]))

    assert rows.rejected_lines() == [1, 2, 5]
    assert (rows.report.rows, rows.report.failed) == (5, 3)
    assert rows.report.as_dict()["reasons"] == {"": 1, "MALFORMED_MESSAGE": 2}


def test_all_rows_of_a_failed_batch_are_rejected(track: Track) -> None:
    """An ack lists only the rows that failed the batch; the others have no id, even in a merged ack."""
    rows = track(b"{}\n{}\n{}\n{}\n{}\n")

    cause = RowFailure(offset=1, reason="R")
    rows.tracker.settle(BulkAck(offset=0, created=1, failed=3, failures=[cause], ids=[0, 0, 0, 7]))
    rows.tracker.settle(BulkAck(offset=4, created=1, ids=[8]))

    assert rows.rejected_lines() == [1, 2, 3]
    assert rows.report.as_dict()["reasons"] == {"BATCH_FAILED": 2, "R": 1}


def test_creates_the_rejects_with_the_first_failure(track: Track, tmp_path: Path) -> None:
    """A file with other content is never replaced."""
    path = tmp_path / "rejects.ndjson"
    path.write_text("earlier\n")
    rows = track(b"{}\n")

    assert (rows.rejects.written_to, list(tmp_path.iterdir())) == (None, [path])

    rows.tracker.settle(BulkAck(offset=0, next_offset=1, failed=1, failures=[RowFailure(offset=0)]))

    assert rows.rejected_lines() == [1]
    assert rows.rejects.written_to == tmp_path / "rejects.2.ndjson"
    assert path.read_text() == "earlier\n"


MOMENT = Timestamp(seconds=1_706_693_400, nanos=250_000)
TIMES = [
    ("2024-01-31T09:30:00.000250Z", MOMENT),
    ("2024-01-31T11:30:00.00025+02:00", MOMENT),
    ("2024-01-31T09:30:00.000250999Z", MOMENT),
    ("0001-01-01T00:00:00Z", Timestamp(seconds=-62_135_596_800)),
    ("9999-12-31T23:59:59.999999Z", Timestamp(seconds=253_402_300_799, nanos=999_999_000)),
    ("2024-01-31T09:30:00", None),
    ("2024-01-31", None),
    ("yesterday", None),
    (1_706_693_400, None),
    ("0001-01-01T00:00:00+02:00", None),
]


@pytest.mark.parametrize(("text", "expected"), TIMES)
@pytest.mark.parametrize("kind", [Json, Csv])
def test_times_are_read_as_rfc_3339(
    kind: type[Json] | type[Csv], text: Any, expected: Timestamp | None
) -> None:
    """Times have microseconds; one without a time zone fails its row. The server checks the range."""
    line = json_line({"created_at": text}) if kind is Json else f"created_at\n{text}\n".encode()
    [row] = rows_of(kind(columns(User, "restore")), line)

    if expected is None:
        assert row.failure is not None
        assert row.failure.field == "created_at"
    else:
        assert row.message == User(created_at=expected)


def test_reads_the_columns_of_each_operation() -> None:
    """Updates read ids, versions and the columns of the mask; restoring reads identity and times too."""
    assert USERS.columns("update", ["full_name", "nonsense"]) == ("id", "version", "full_name")
    assert USERS.columns("update", ["*"]) == ("id", "version", *USERS.loaded, *USERS.refused)
    assert POSTS.columns("restore", []) == ("id", "created_at", "updated_at", "version", *POSTS.loaded)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
restored = st.builds(
    User,
    id=st.integers(1, 1 << 53),
    email=texts.filter(bool),
    full_name=st.one_of(st.none(), st.sampled_from(["", '"', '""', ",", "\r", "\n", "a\r\nb"]), texts),
    is_active=st.booleans(),
    created_at=st.builds(Timestamp, seconds=st.integers(-62_135_596_800, 253_402_300_799)),
    updated_at=st.builds(
        Timestamp, seconds=st.just(0), nanos=st.integers(0, 999_999).map(lambda n: n * 1000)
    ),
    version=st.integers(1, 1 << 31),
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(restored, min_size=1, max_size=5))
def test_reads_back_what_it_writes(rows: list[User]) -> None:
    """Null, empty strings, quotes, line ends and times survive NDJSON and CSV."""
    columns_of_rows = dict(columns_of(rows, USERS.exported))
    times = time_texts([columns_of_rows[name] for name in USERS.times])
    columns_of_rows |= zip(USERS.times, times, strict=True)
    ndjson = json_lines(columns_of_rows)
    csv = csv_line(USERS.exported) + csv_lines(columns_of_rows)

    assert [row.message for row in rows_of(Json(columns(User, "restore")), ndjson)] == rows
    assert [row.message for row in rows_of(Csv(columns(User, "restore")), csv)] == rows


def parquet_of(**table: list[Any]) -> io.BytesIO:
    """Return a table as Parquet."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(table), file)
    return file


def test_parquet_becomes_messages() -> None:
    """Null is unset; a value of the wrong type fails its row, and the reject is JSON."""
    noon = datetime(2024, 1, 31, 12, tzinfo=UTC)
    names = ["", None]
    file = parquet_of(email=["a@x", "b@x"], full_name=names, created_at=[noon, noon], id=[7.5, None])
    parquet = Parquet(columns(User, "restore"))

    bad, good = rows_of(parquet, file.getvalue())

    assert good.message == User(email="b@x", created_at=Timestamp(seconds=int(noon.timestamp())))
    assert bad.failure is not None
    assert bad.failure.field == "id"
    assert json.loads(parquet.reject(bad, bad.failure)) == {
        "email": "a@x",
        "full_name": "",
        "created_at": "2024-01-31 12:00:00.000000Z",
        "id": 7.5,
        "_error": {
            "reason": "INVALID_FIELD",
            "field": "id",
            "message": "id must be an integer of at most 64 bits",
            "row": 1,
        },
    }


def test_reports_a_file_that_is_not_parquet() -> None:
    """The whole file is refused with one message."""
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    with pytest.raises(SourceError, match="can't be read as Parquet"):
        rows_of(Parquet(columns(User)), b"email\n")


def test_reports_how_to_install_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional dependency."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        Parquet(columns(User))
