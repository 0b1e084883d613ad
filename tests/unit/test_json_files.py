"""JSON documents: arrays, objects with an array, and rows that span lines."""

import json
from typing import Any

import pytest

from roster.v1.bulk_pb2 import RowFailure
from service.cli.formats import Json, SourceError
from service.cli.formats.json_file import READ_BYTES
from service.cli.rows import Row
from tests.support.files import columns_of, rows_of, shown

FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")
PEOPLE = [
    {"email": "ada@example.org", "full_name": "Ada"},
    {"email": "alan@example.org", "full_name": "Alan"},
]
ADA = "email='ada@example.org' full_name='Ada'"
ALAN = "email='alan@example.org' full_name='Alan'"
LINES = "\n".join(map(json.dumps, PEOPLE))


def json_rows(data: bytes | str, ignore: tuple[str, ...] = ()) -> list[Row[Any]]:
    """Return the rows of JSON."""
    return rows_of(Json(columns_of(ignore=ignore)), data.encode() if isinstance(data, str) else data)


SHAPES = {
    "lines": LINES,
    "lines with a blank first one": "\n\n" + LINES,
    "array on a line": json.dumps(PEOPLE),
    "array over lines": json.dumps(PEOPLE, indent=2),
    "array with rows on lines": "[\n" + ",\n".join(map(json.dumps, PEOPLE)) + "\n]\n",
    "array with leading commas": "[" + json.dumps(PEOPLE[0]) + "\n," + json.dumps(PEOPLE[1]) + "]",
    "object on a line": json.dumps({"users": PEOPLE}),
    "object over lines": json.dumps({"users": PEOPLE}, indent=2),
    "object with another array": json.dumps({"realm": "x", "groups": [{"a": 1}], "users": PEOPLE, "c": []}),
    "object with one array of another name": json.dumps({"kind": "x", "people": PEOPLE, "next": None}),
    "objects with arrays, as of a stream": "\n".join(
        json.dumps({"users": [row]}, indent=1) for row in PEOPLE
    ),
    "rows over lines": "\n".join(json.dumps(row, indent=2) for row in PEOPLE),
    "rows without line ends": "".join(map(json.dumps, PEOPLE)),
    "row with an array": "\n".join(json.dumps({**row, "groups": ["a"]}) for row in PEOPLE),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", SHAPES.values(), ids=list(SHAPES))
def test_reads_each_shape(text: str, encoding: str) -> None:
    """The rows are the same in all of them, in UTF-8 and in UTF-16 as PowerShell writes it."""
    assert shown(json_rows(text.encode(encoding))) == [ADA, ALAN]


def test_numbers_the_rows_of_a_document() -> None:
    """An array on one line has no useful line numbers."""
    known = Json(columns_of())
    rows = rows_of(known, json.dumps(PEOPLE).encode())

    assert known.unit == "row"
    assert [row.number for row in rows] == [1, 2]
    assert json.loads(known.reject(rows[1], FAILURE))["_error"]["row"] == 2


def test_reads_documents_larger_than_a_read() -> None:
    """Values end at any place of what was read."""
    people = [
        {"email": f"{number}@example.org", "full_name": "é" * (number % 97), "n": number}
        for number in range(5000)
    ]
    text = json.dumps({"users": people}, indent=1, ensure_ascii=False)
    assert len(text) > 5 * READ_BYTES

    rows = json_rows(text)

    assert [row.message.email for row in rows if row.message] == [row["email"] for row in people]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ("7", "the row is JSON, but not an object"),
        ('["a@x"]', "the row is JSON, but not an object"),
        ("null", "the row is JSON, but not an object"),
        ('{"email": 7}', "email must be a string"),
        ('{"email": "a\\ud800@x"}', "email must be valid Unicode; it has half of a surrogate pair"),
        ('{"email": "a@x", "is_active": "maybe"}', "is_active must be true or false"),
        ('{"email": "a@x", "full_nmae": "A"}', 'the column "full_nmae" is not known. If it is full_name'),
    ],
)
def test_a_bad_element_fails_alone(element: str, reason: str) -> None:
    """The elements around it are loaded, and its reject has the values as they were."""
    known = Json(columns_of())
    rows = rows_of(known, f"[{json.dumps(PEOPLE[0])}, {element}, {json.dumps(PEOPLE[1])}]".encode())

    assert shown([rows[0], rows[2]]) == [ADA, ALAN]
    assert rows[1].failure is not None
    assert reason in rows[1].failure.message
    reject = json.loads(known.reject(rows[1], rows[1].failure))
    assert reject["_error"]["row"] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"email": "a@x"}', "damaged, at row 1: it ends too early"),
        ('[{"email": "a@x"} {"email": "b@x"}]', "damaged, at row 1: , is missing"),
        ('[{"email": "a@x"},]', "damaged, at row 1: ] follows a comma"),
        ('[{"email": "a@x"}, {"email": ]', "damaged, at row 2: Expecting value"),
        (
            '{"a": [{"email": "a@x"}], "b": [{"email": "b@x"}]}',
            r"several arrays \(a, b\); take one out: jq '.a' FILE",
        ),
        ('[{"email": "a@x", "fullname2": "A"}]', "is not known. If it is full_name"),
        ('{"mail": "a@x"}\n{"mail": "b@x"}', "is not known. If it is email, add --columns email=mail"),
        ("{\n", "damaged, at row 0: Expecting value"),
        ("[" * 100_000, "a value is too large|maximum recursion|it ends too early|Expecting"),
    ],
)
def test_refuses_a_document_that_it_does_not_understand(text: str, expected: str) -> None:
    """One sentence says where, or what to do."""
    with pytest.raises(SourceError, match=expected):
        json_rows(text)


def test_reads_the_names_of_protobuf_json() -> None:
    """As grpcurl prints users: camelCase, and 64-bit integers as strings."""
    rows = rows_of(
        Json(columns_of(operation="restore")),
        b'{"users": [{"id": "7", "email": "a@x", "fullName": "Ina", "isActive": false, "version": "2"}]}',
    )

    assert shown(rows) == ["id=7 email='a@x' full_name='Ina' is_active=False version=2"]


def test_rejects_keep_integers_of_any_size() -> None:
    """JSON has them, but its usual writers don't."""
    known = Json(columns_of())
    [row] = rows_of(known, b'[{"email": "a@x", "number": 123456789012345678901234567890}]')

    assert "123456789012345678901234567890" in json.loads(known.reject(row, FAILURE))["_line"]
