"""JSON documents: arrays, objects with an array, and rows that span lines."""

import json
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.json_format import ParseError
from google.protobuf.struct_pb2 import Struct

from roster.v1.bulk_pb2 import RowFailure
from roster.v1.resources_pb2 import User
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
    "object with a known member before the array": json.dumps({"version": 3, "email": "x", "users": PEOPLE}),
    "object with a known member before the array, over lines": json.dumps(
        {"is_active": True, "users": PEOPLE}, indent=1
    ),
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
            r"several arrays \(a, b\); extract the one that has the rows, such as with jq '.a' FILE",
        ),
        ('[{"email": "a@x", "fullname2": "A"}]', "is not known. If it is full_name"),
        ('{"mail": "a@x"}\n{"mail": "b@x"}', "is not known. If it is email, add --columns email=mail"),
        ("{\n", "damaged, at row 0: Expecting value"),
        ("[" * 100_000, "a value is nested too deeply"),
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


NUMBERS = ["123456789012345678901234567890", "1.10", "0.12345678901234567890", "1e400", "-0.0", "1E3"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("template", ["%s\n", "[\n%s\n]", '{"users": [%s]}'])
def test_rejects_keep_numbers_as_they_were(template: str, number: str) -> None:
    """A row that failed for another reason can be loaded again, and nothing else of it has changed."""
    text = f'{{"email": "a", "number": {number}}}'
    known = Json(columns_of())
    [row] = rows_of(known, (template % text).encode())

    reject = known.reject(row, FAILURE)
    [again] = rows_of(known, reject)
    second = known.reject(again, FAILURE)

    assert reject.startswith(text[:-1].encode() + b',"_error":{')
    assert second.startswith(text[:-1].encode() + b',"_error":{')
    assert second.count(b"_error") == 1


ERROR_INSIDE = [
    '{"email": "a", "note": "\\"_error\\""}',
    '{"_error": {"row": 1}, "email": "a", "note": 1.10}',
    '{"email": "a", "_error": null, "note": {"_error": 1}}',
    "{ }",
]


@pytest.mark.parametrize("text", ERROR_INSIDE)
def test_rejects_have_one_error_wherever_it_was(text: str) -> None:
    """The members of the row are the same, in files that programs have rewritten too."""
    known = Json(columns_of())
    [row] = rows_of(known, text.encode())

    reject = json.loads(known.reject(row, FAILURE))

    assert reject.pop("_error")["reason"] == "EMAIL_TAKEN"
    assert reject == {name: value for name, value in json.loads(text).items() if name != "_error"}


REPEATED = [
    '{"email": "a@x", "email": "b@x"}',
    '{"email" : "a@x", "full_name": "A", "email"\t: "a@x"}',
    '{"email": "a@x", "n\\u006fte": 1, "note": 2}',
    '{"email": "a@x", "is_active": false, "is_active": true, "created_at": "2024-01-31T09:30:00Z"}',
    '{"email": "a@x", "meta": {"email": 1}, "meta": {}}',
]


@pytest.mark.parametrize("text", REPEATED)
@pytest.mark.parametrize("template", ["%s\n", "[\n%s\n]"])
def test_a_repeated_name_fails_its_row_as_in_protobuf(template: str, text: str) -> None:
    """Parsers disagree which value counts, so none is chosen; the reject has both."""
    with pytest.raises(ParseError, match="duplicate key"):
        json_format.Parse(text, Struct())
    known = Json(columns_of())

    [row] = rows_of(known, (template % text).encode())

    assert row.failure is not None
    assert row.failure.message == "the object has a name more than once; keep one of them"
    assert json.loads(known.reject(row, row.failure))["_line"] == text


def test_rows_with_repeated_names_are_on_lines() -> None:
    """Whatever the first lines are, each line fails alone."""
    rows = json_rows(f"{REPEATED[0]}\n{REPEATED[1]}\n{{what?\n{json.dumps(PEOPLE[0])}\n")

    assert shown([rows[3]]) == [ADA]
    assert [bool(row.failure) for row in rows] == [True, True, True, False]


@pytest.mark.parametrize(
    "text",
    [
        '{"email": "a@x", "meta": {"email": 1, "full_name": 2}}',
        '{"email": "a@x", "full_name": "\\"email\\": \\"b@x\\", \\":"}',
        '{"email": "a@x", "tags": [{"a": 1}, {"a": 2}]}',
    ],
)
def test_names_inside_others_are_not_repeated(text: str) -> None:
    """Text that looks like a member of the row may be in another object, or in a string."""
    [row] = json_rows(text)

    assert row.failure is None


@pytest.mark.parametrize("template", ["%s\n", "[%s]"])
def test_reads_the_constants_that_python_and_javascript_write(template: str) -> None:
    """NaN is a missing value, as pandas has it; infinity is a number, and no field takes it."""
    values = [
        {"email": "a@x", "full_name": float("nan"), "score": float("nan")},
        {"email": "b@x", "score": float("inf")},
        {"email": "c@x", "is_active": float("-inf")},
        {"email": "d@x", "full_name": float("inf")},
    ]
    separator = "\n" if template.endswith("\n") else ","
    known = Json(columns_of())

    rows = rows_of(known, (template % separator.join(map(json.dumps, values))).encode())

    assert shown(rows) == [
        "email='a@x'",
        "email='b@x'",
        "is_active must be true or false (yes/no and 1/0 work too)",
        "full_name must be a string",
    ]
    assert json.loads(known.reject(rows[2], FAILURE))["is_active"] == float("-inf")


CONCATENATED = {
    "byte order marks": "\ufeff%s\n\ufeff%s\n",
    "JSON text sequence": "\x1e%s\n\x1e%s\n",
    "old Mac line ends": "%s\r%s\r",
    "Windows line ends": "%s\r\n%s\r\n",
    "no last line end": "%s\n%s",
}


@pytest.mark.parametrize("template", CONCATENATED.values(), ids=list(CONCATENATED))
def test_reads_what_stands_between_rows(template: str) -> None:
    """Files that were put together have marks inside; `jq --seq` writes a separator before each row."""
    assert shown(json_rows(template % tuple(map(json.dumps, PEOPLE)))) == [ADA, ALAN]


def test_a_row_may_contain_any_line_separator_of_unicode() -> None:
    """Only a line feed ends a row: JavaScript does not escape the others."""
    name = "a\u2028b\u2029c\x85d"
    [first, _] = json_rows(
        json.dumps({"email": "ls@x", "full_name": name}, ensure_ascii=False) + "\n" + json.dumps(PEOPLE[0])
    )

    assert isinstance(first.message, User)
    assert first.message.full_name == name


OTHER_ROWS = [
    ('{"error": "not found", "code": 404}', "it has error, code; name the columns with --columns"),
    ('{"message": "Bad credentials"}\n', "it has message; name the columns"),
    ('[{"model": "auth.user", "pk": 1, "fields": {"email": "a@x"}}]', "such as with jq -c '.fields'"),
    ('{"type": "RECORD", "record": {"email": "a@x"}}\n' * 2, "such as with jq -c '.record'"),
    ('{"_airbyte_ab_id": "x", "_airbyte_data": {"email": "a@x"}}', "such as with jq -c '._airbyte_data'"),
    ('{"u1": {"email": "a@x"}, "u2": {"email": "b@x"}}', "such as with jq -c '.\\[\\]'"),
    ("email,full_name\na@x,A\n", "the file is not JSON: it begins with email,full_name; if it is CSV, add"),
    ("404 page not found\n", "the file is not JSON: it begins with 404 page not found"),
]


@pytest.mark.parametrize(("text", "expected"), OTHER_ROWS)
def test_refuses_rows_of_something_else_as_a_whole(text: str, expected: str) -> None:
    """Exports of Django, Singer, Airbyte and Firebase have the columns inside; servers answer with errors."""
    with pytest.raises(SourceError, match=expected):
        json_rows(text)


def test_a_first_row_without_known_columns_fails_alone() -> None:
    """The second row shows that the file is the right one."""
    rows = json_rows('{"foo": 1}\n' + json.dumps(PEOPLE[0]))

    assert shown(rows) == ["", ADA]


@pytest.mark.parametrize("template", ["%s\n", "[%s]"])
def test_a_number_of_any_size_fails_alone(template: str) -> None:
    """Python refuses to read integers of more than 4,300 digits."""
    bad = '{"email": ' + "9" * 5000 + "}"
    separator = "\n" if template.endswith("\n") else ","
    known = Json(columns_of())

    rows = rows_of(known, (template % separator.join([json.dumps(PEOPLE[0]), bad])).encode())

    assert shown(rows) == [ADA, "email must be a string"]
    assert b"9" * 5000 in known.reject(rows[1], FAILURE)
